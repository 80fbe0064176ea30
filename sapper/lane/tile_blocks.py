"""Contractions on tile registers inside a loop that holds the lane axis of their sums: blocks of quantised weights.

Enters a walk of a loop that carries sums (`each` over blocks of weights): the columns lie in the lanes, the rows are
open and few enough for scratch memory, and the contracted axes are a block's, of known extents. `fit` says how tile
registers serve it, `emit_walk` emits it. For each such walk:

    unpack    the right operand's slots, as packed.py makes them, to tiles in scratch memory, once for all rows
    multiply  tile by tile of rows, read where they lie; the sums to scratch memory
    finish    what follows, row by row: scales, and the sums that the loop carries, which lie in scratch memory too

Integer contractions that are only added to each other share their sums, and their tiles where what they read of the
left operand lies side by side: the two halves of a block of four bits.

What holds: where a block is shorter than a tile, the right one's other rows are zeros, so that whatever the left one
reads beyond a block counts nothing: elements are integers. tile_bound.py says what holds besides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from ..ir.nodes import Op, Value
from ..ir.types import b32, i8, i32
from ..tile.plan import Walk, axes_of
from .packed import Packing, slot_loads
from .state import Bound, Scalar, element_bytes
from .tile_bound import BoundTiles, Left, dtype_of, lies_in_tensor

if TYPE_CHECKING:
    from .model import Model
    from .walk import WalkLowering

CHUNK_TILES = 4
"""Tiles of rows that the unpacked weights meet: unpacking then costs a few percent of what follows, and the sums and
those that the loop carries stay in the first cache."""

FEWEST_ROWS = 2
"""Tiles of rows from which they are worth it."""

FEWEST_SLOTS = 1
"""Tiles of the depth that a sum has at least: to store, read and scale sums takes as long as four products of tiles, so
that blocks of 32 gain nothing. On a Granite Rapids those of 64 take 0.7 to 0.8 of the time of vectors, of 128 0.5 to
0.7."""

HELD_TILES = 4
"""Tiles of the right operand that stay in registers while the rows go by."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Slots that one contraction takes side by side of the left operand. places: the coordinates of the contracted
    axes, slots of the depth, in that order."""

    left: Op
    right: Value
    places: tuple[dict[str, int], ...]


@dataclass(frozen=True, slots=True)
class Sum:
    """Contractions that are only added to each other. value: their sum."""

    value: Value
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class TileBlocks:
    """How tiles serve a walk. rows: its open axis. lane: the bound one of the columns. depth: along which slots lie."""

    rows: str
    lane: str
    depth: str
    sums: tuple[Sum, ...]
    packing: Packing

    def emit(self, low: WalkLowering, walk: Walk) -> None:
        """All of the walk."""
        low.use_tiles()
        with low.packed(self.packing):
            _Emission(low, walk, self).run()


def serves(model: Model, contraction: Op) -> bool:
    """Whether the types and the operands of a contraction are what tiles take here, before any axis is bound."""
    unit = model.facts.tiles
    if unit is None or unit.size != model.lanes or model.schedule.matrix is False:
        return False
    dtypes = tuple(dtype_of(v).name for v in contraction.operands)
    return dtype_of(contraction.result) is i32 and dtypes[::-1] in unit.products and dtypes in unit.products and all(
        slot_loads(v) is not None for v in contraction.operands)


def is_worth(model: Model, contractions: Sequence[Op], sums: int, extents: Callable[[str], int]) -> bool:
    """Whether so many sums of contractions are long enough."""
    elements = sum(prod(extents(axis) for axis in op.attributes["over"]) for op in contractions)
    return elements >= sums * FEWEST_SLOTS * model.lanes * (b32.bits // i8.bits)


def fit(model: Model, walk: Walk, lane: str) -> TileBlocks | None:
    """How tiles serve a walk whose axis `lane` is bound, or None: vectors then take it."""
    rows = [axis for axis in walk.outer if axis in model.open]
    most = model.open[rows[0]].most if len(rows) == 1 else None
    if most is None or most > CHUNK_TILES * model.lanes or walk.inner or not walk.reductions:
        return None
    if not all(op.name == "contract" and serves(model, op) for op in walk.reductions):
        return None
    if model.bound[lane].count != 1 or model.bound[lane].mask is not None:
        return None
    if not all(axis in model.open and isinstance(model.open[axis].extent, int) for axis in walk.reduced):
        return None
    packing = model.tile_packing(walk, lane)
    if packing is None:
        return None
    found: dict[Op, Segment] = {}
    for op in walk.reductions:
        segment = _segment(model, op, rows[0], lane, packing.depth, packing.dot.elements)
        if segment is None:
            return None
        found[op] = segment
    sums = tuple(Sum(value, tuple(found[op] for op in parts)) for value, parts in sums_of(model, walk))
    if not is_worth(model, walk.reductions, len(sums), model.extent_hint):
        return None
    return TileBlocks(rows[0], lane, packing.depth, sums, packing)


def _segment(model: Model, op: Op, rows: str, lane: str, depth: str, elements: int) -> Segment | None:
    """The slots of a contraction in the order in which the left operand has them in memory, one behind the other."""
    right = next((v for v in op.operands if lane in axes_of(v)), None)
    left = next((v for v in op.operands if rows in axes_of(v)), None)
    if right is None or left is None or right is left or not lies_in_tensor(model, left):
        return None
    assert left.op is not None
    access = model.access(left.op)
    if right in model.buffers or right in model.rows or any(
            axis in access.axes for axis in axes_of(right) if axis not in op.attributes["over"]):
        return None
    extents: dict[str, int] = {}
    size = element_bytes(access.dtype)
    over = [axis for axis in op.attributes["over"] if isinstance(access.axes.get(axis), int)]
    if len(over) < len(op.attributes["over"]):
        return None
    for axis in sorted(over, key=access.axes.__getitem__):  # type: ignore[arg-type]
        extent = model.open[axis].extent
        if access.axes.get(axis) != size or not isinstance(extent, int):
            return None
        extents[axis] = extent
        size *= extent
    if next(iter(extents)) != depth or extents[depth] % elements:
        return None
    extents[depth] //= elements
    places: list[dict[str, int]] = [{}]
    for axis, extent in reversed(extents.items()):
        places = [{**place, axis: j} for place in places for j in range(extent)]
    return Segment(left.op, right, tuple(places))


def sums_of(model: Model, walk: Walk) -> list[tuple[Value, list[Op]]]:
    """The contractions of a walk by the sums of integers that they are only parts of."""
    parts: dict[Value, list[Op]] = {op.result: [op] for op in walk.reductions}
    merged = True
    while merged:
        merged = False
        for value in list(parts):
            users = model.users.get(value, [])
            total = users[0] if len(users) == 1 else None
            if total is None or total.name != "add" or value in walk.after or dtype_of(value) is not i32:
                continue
            if all(v in parts for v in total.operands) and total.operands[0] is not total.operands[1]:
                parts[total.result] = [op for v in total.operands for op in parts.pop(v)]
                merged = True
                break
    return list(parts.items())


class _Emission(BoundTiles):
    """The emission of one walk. tiles: of the left operand; totals: which sum each one's products are added to; slots:
    those of the right operand that it meets, with their coordinates."""

    def __init__(self, low: WalkLowering, walk: Walk, found: TileBlocks) -> None:
        super().__init__(low, walk, found.rows, found.lane, CHUNK_TILES * low.lanes, i32)
        self.sums = found.sums
        self.tiles: list[Left] = []
        self.totals: list[int] = []
        self.slots: list[list[tuple[Value, dict[str, int]]]] = []
        for number, total in enumerate(found.sums):
            self._join(number, total)

    def _join(self, number: int, total: Sum) -> None:
        """The segments of a sum, those side by side in memory joined, in pieces of a tile."""
        accesses = [(self.low.operand_access(segment.left), segment) for segment in total.segments]
        last: Left | None = None
        for access, segment in sorted(accesses, key=lambda one: one[0].disp):
            for position, place in enumerate(segment.places):
                disp = access.disp + position * b32.size_bytes
                if (last is None or last.slots == self.size or disp != last.disp + last.slots * b32.size_bytes
                        or (access.base, access.axes) != (last.access.base, last.access.axes)):
                    last = Left(segment.left, access, disp, 0)
                    self.tiles.append(last)
                    self.totals.append(number)
                    self.slots.append([])
                last.slots += 1
                self.slots[-1].append((segment.right, place))

    def run(self) -> None:
        low, rows = self.low, self.rows
        for axis in self.walk.reduced:
            o = low.open[axis]
            assert isinstance(o.extent, int)
            low.bound[axis] = Bound(o.offset, o.extent, False, None, low.depth)
        rights = self._unpack()
        held = [self.load(right, self.row_bytes) for right in rights] if len(rights) <= HELD_TILES else []
        lefts = self.left_rows(self.tiles)
        for axis in self.walk.reduced:
            del low.bound[axis]

        def products(start: Value) -> None:
            position = low.sub(start, rows.offset)
            totals = [self.zeros() for _ in self.sums]
            for number, (total, (left, stride)) in enumerate(zip(self.totals, lefts, strict=True)):
                a = self.load(low.add(left, low.mul(position, stride)), stride)
                b = held[number] if held else self.load(rights[number], self.row_bytes)
                dtypes = dtype_of(self.tiles[number].load.result), dtype_of(self.slots[number][0][0])
                totals[total] = self.multiply(totals[total], a, b, dtypes)
            self.store(totals, position)

        low.counted(self.axis, rows.offset, low.add(rows.offset, rows.extent), self.size, products)
        self.finish([total.value for total in self.sums])

    def _unpack(self) -> list[Scalar]:
        """Make the tiles of the right operand in scratch memory: where they are."""
        low, is_new = self.low, not self.has_memory("rights")
        base = self.memory("rights", len(self.tiles) * self.tile_bytes)
        made: list[Scalar] = []
        for number, slots in enumerate(self.slots):
            start = low.value(low.add(base, number * self.tile_bytes))
            for row, (right, place) in enumerate(slots):
                at = {**place, **{axis: 0 for axis in axes_of(right) if axis not in place}}
                low.effect("store", [low.slot_row(right, at, False), start], dtype=b32, masked=False, streaming=False,
                           disp=row * self.row_bytes)
            if is_new:
                self.clear(start, len(slots), self.size)
            made.append(start)
        return made
