"""Contractions on tile registers inside a loop that holds the lane axis of their sums: blocks of quantised weights.

Enters a walk of a loop that carries sums (`each` over blocks of weights): the columns lie in the lanes, the rows are
open and few enough for scratch memory, and the contracted axes are a block's, of known extents. `fit` says how tile
registers serve it, `emit_walk` emits it. For each such walk:

    unpack    the right operand's slots, by whatever makes them (packed.py), to tiles in scratch memory, once for all rows
    multiply  tile by tile of rows, read where they lie; the sums to scratch memory
    finish    what follows, row by row: scales, and the sums that the loop carries, which lie in scratch memory too

Integer contractions that are only added to each other share their sums, and their tiles where what they read of the
left operand lies side by side: the two halves of a block of four bits.

What holds: every tile is whole. Where a block is shorter than a tile, the right one's other rows are zeros, so that
whatever the left one reads beyond a block counts nothing: elements are integers. No tile reads beyond the tensor: the
rows that would are copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ir.nodes import Block, Op, Value
from ..ir.types import MASK, ROW_B32, S64, TILE_B32, DType, TensorType, TileRegisterType, TileType, b32, i32, u8
from ..tile.ops import memory_of
from ..tile.plan import Walk, axes_of
from .packed import slot_loads
from .state import Access, Bound, Scalar, element_bytes

if TYPE_CHECKING:
    from .axis_loops import WalkChoice
    from .model import Model
    from .walk import WalkLowering

CHUNK_TILES = 4
"""Tiles of rows that the unpacked weights meet: unpacking then costs a few percent of what follows, and the sums and
those that the loop carries stay in the first cache."""

FEWEST_ROWS = 2
"""Tiles of rows from which they are worth it."""

HELD_TILES = 4
"""Tiles of the right operand that stay in registers while the rows go by."""

FINISHED_ROWS = 4
"""Rows of sums that are finished at once."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Slots that one contraction takes side by side of the left operand. places: the coordinates of the contracted
    axes, slots of the depth, in that order."""

    contraction: Op
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


def serves(model: Model, contraction: Op) -> bool:
    """Whether the types and the operands of a contraction are what tiles take here, before any axis is bound."""
    unit = model.facts.tiles
    if unit is None or unit.size != model.lanes or model.schedule.matrix is False:
        return False
    dtypes = tuple(_dtype(v).name for v in contraction.operands)
    return _dtype(contraction.result) is i32 and dtypes[::-1] in unit.products and dtypes in unit.products and all(
        slot_loads(v) is not None for v in contraction.operands)


def fit(model: Model, walk: Walk, lane: str) -> TileBlocks | None:
    """How tiles serve a walk whose axis `lane` is bound, or None: vectors then take it."""
    rows = [axis for axis in walk.outer if axis in model.open]
    if len(rows) != 1 or walk.inner or not walk.reductions or not _few(model, rows[0]):
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
    sums = tuple(Sum(value, tuple(found[op] for op in parts)) for value, parts in _sums(model, walk))
    return TileBlocks(rows[0], lane, packing.depth, sums)


def _few(model: Model, rows: str) -> bool:
    """Whether there are no more rows than scratch memory is set aside for."""
    o, most = model.open[rows], CHUNK_TILES * model.lanes
    return o.extent <= most if isinstance(o.extent, int) else (
        o.capacity is not None and not o.capacity.dims and o.capacity.constant <= most)


def _dtype(value: Value) -> DType:
    assert isinstance(value.type, TileType)
    return value.type.dtype


def _segment(model: Model, op: Op, rows: str, lane: str, depth: str, elements: int) -> Segment | None:
    """The slots of a contraction in the order in which the left operand has them in memory, one behind the other."""
    (right,) = [v for v in op.operands if lane in axes_of(v)] or [None]
    (left,) = [v for v in op.operands if rows in axes_of(v)] or [None]
    if right is None or left is None or right is left or left.op is None or left.op.name != "load":
        return None
    if left in model.buffers or left in model.rows or right in model.buffers or right in model.rows:
        return None
    access = model.access(left.op)
    memory = memory_of(left.op.operands[0])
    if access.gathers or memory not in model.function.arguments or any(
            axis in access.axes for axis in axes_of(right) if axis not in op.attributes["over"]):
        return None
    extents: dict[str, int] = {}
    size = element_bytes(access.dtype)
    for axis in sorted(op.attributes["over"], key=lambda a: (not isinstance(access.axes.get(a), int), access.axes.get(a))):
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
    return Segment(op, left.op, right, tuple(places))


def _sums(model: Model, walk: Walk) -> list[tuple[Value, list[Op]]]:
    """The contractions of a walk by the sums of integers that they are only parts of."""
    parts: dict[Value, list[Op]] = {op.result: [op] for op in walk.reductions}
    merged = True
    while merged:
        merged = False
        for value in list(parts):
            users = model.users.get(value, [])
            total = users[0] if len(users) == 1 else None
            if total is None or total.name != "add" or value in walk.after or _dtype(value) is not i32:
                continue
            if all(v in parts for v in total.operands) and total.operands[0] is not total.operands[1]:
                parts[total.result] = [op for v in total.operands for op in parts.pop(v)]
                merged = True
                break
    return list(parts.items())


def emit_walk(low: WalkLowering, walk: Walk, choice: WalkChoice) -> None:
    """All of a walk, with the choice that the model made for it."""
    assert choice.blocks is not None
    low.use_tiles()
    with low.packed(choice.packing):
        _Emission(low, walk, choice.blocks).run()


@dataclass(slots=True)
class _Tile:
    """A product: which sum it is added to, where its left operand begins behind the address of a row, and the slots of
    its right one."""

    total: int
    left: Op
    access: Access
    disp: int
    slots: list[tuple[Value, dict[str, int]]]


class _Emission:
    """The emission of one walk. size: of a tile, rows and slots; row_bytes: of its rows. rows: the open ones."""

    def __init__(self, low: WalkLowering, walk: Walk, found: TileBlocks) -> None:
        unit = low.facts.tiles
        assert unit is not None
        self.low, self.walk, self.found = low, walk, found
        self.size, self.row_bytes = unit.size, unit.size * b32.size_bytes
        self.tile_bytes = self.size * self.row_bytes
        self.rows = low.open[found.rows]
        self.tiles = [tile for number, total in enumerate(found.sums) for tile in self._tiles(number, total)]

    def _tiles(self, number: int, total: Sum) -> list[_Tile]:
        """The segments of a sum, those side by side in memory joined, in pieces of a tile."""
        low, size = self.low, b32.size_bytes
        accesses = [(low.operand_access(segment.left), segment) for segment in total.segments]
        made: list[_Tile] = []
        for access, segment in sorted(accesses, key=lambda one: one[0].disp):
            for position, place in enumerate(segment.places):
                disp = access.disp + position * size
                last = made[-1] if made else None
                if (last is None or len(last.slots) == self.size or disp != last.disp + len(last.slots) * size
                        or (access.base, access.axes) != (last.access.base, last.access.axes)):
                    last = _Tile(number, segment.left, access, disp, [])
                    made.append(last)
                last.slots.append((segment.right, place))
        return made

    def run(self) -> None:
        low, found = self.low, self.found
        for axis in self.walk.reduced:
            o = low.open[axis]
            assert isinstance(o.extent, int)
            low.bound[axis] = Bound(o.offset, o.extent, False, None, low.depth)
        rights = self._unpack()
        held = [self._load(right, self.row_bytes) for right in rights] if len(rights) <= HELD_TILES else None
        sums = self._memory("sums", len(found.sums) * CHUNK_TILES)
        kind = TileRegisterType(i32)

        def piece(start: Value) -> None:
            lefts = self._left_tiles(start)
            totals = [low.emit(low.depth, "tile_zero", [], kind) for _ in found.sums]
            for position, tile in enumerate(self.tiles):
                left = self._load(*lefts[position])
                right = self._load(rights[position], self.row_bytes) if held is None else held[position]
                totals[tile.total] = low.emit(
                    low.depth, "tile_multiply", [totals[tile.total], left, right], kind, dtype=_dtype(tile.left.result),
                    right_dtype=_dtype(tile.slots[0][0]))
            to = low.add(sums, low.mul(low.sub(start, self.rows.offset), self.row_bytes))
            for number, total in enumerate(totals):
                low.effect("tile_store", [total, low.value(to), low.value(self.row_bytes)],
                           disp=number * CHUNK_TILES * self.tile_bytes)

        low.counted(found.rows, self.rows.offset, low.add(self.rows.offset, self.rows.extent), self.size, piece)
        for axis in self.walk.reduced:
            del low.bound[axis]
        self._finish(sums)

    def _load(self, base: Scalar, stride: Scalar) -> Value:
        low = self.low
        return low.emit(low.depth, "tile_load", [low.value(base), low.value(stride)], TILE_B32, disp=0)

    def _memory(self, name: str, tiles: int) -> Scalar:
        """Scratch memory for so many tiles."""
        low = self.low
        key = (f"tile block {name}", self.walk.reductions[0])
        if key not in low.stage_memory:
            low.stage_memory[key] = low.scratch([(tiles * self.tile_bytes, 1)], u8)
        return low.stage_memory[key]

    # The right operand.

    def _unpack(self) -> list[Scalar]:
        """The tiles of the right operand, made in scratch memory: where they are."""
        low = self.low
        is_new = ("tile block rights", self.walk.reductions[0]) not in low.stage_memory
        base = self._memory("rights", len(self.tiles))
        for number, tile in enumerate(self.tiles):
            start = low.value(low.add(base, number * self.tile_bytes))
            for row, (right, place) in enumerate(tile.slots):
                at = {**place, **{axis: 0 for axis in axes_of(right) if axis not in place}}
                low.effect("store", [low.slot_row(right, at, False), start], dtype=b32, masked=False, streaming=False,
                           disp=row * self.row_bytes)
            if is_new:
                self._clear(start, len(tile.slots))
        return [low.add(base, number * self.tile_bytes) for number in range(len(self.tiles))]

    def _clear(self, start: Value, first: int) -> None:
        """Zeros behind a tile's rows, stored once, before all that is being emitted."""
        low = self.low
        zeros = low.emit(0, "bitcast", [low.constant(0, i32)], ROW_B32)
        for row in range(first, self.size):
            low.levels[0].builder.block.ops.append(Op("store", [zeros, start], (), {
                "dtype": b32, "masked": False, "streaming": False, "disp": row * self.row_bytes}))

    # The left operand.

    def _left_tiles(self, start: Value) -> list[tuple[Scalar, Scalar]]:
        """Address and stride of each tile of the left operand, from a row on: where it lies, or, if a whole tile there
        reached beyond the tensor, copies of the rows that there are."""
        low, found = self.low, self.found
        low.bound[found.rows] = Bound(start, 1, False, None, low.depth)
        places, strides = [], []
        for tile in self.tiles:
            access = Access(tile.access.base, tile.disp, tile.access.axes, b32)
            places.append(low.address_of(*low.address(access, {})))
            strides.append(tile.access.axes[found.rows])
        del low.bound[found.rows]
        beyond: Scalar = 0
        for tile, place, stride in zip(self.tiles, places, strides, strict=True):
            reach = low.add(low.add(place, low.mul(stride, self.size - 1)), self.row_bytes)
            beyond = low.scalar("s_max", beyond, low.sub(reach, self._end(tile.left)))
        reaches = low.emit(low.depth_of(beyond), "s_cmp", [low.value(beyond), low.value(0)], S64, cond="gt")
        copied, in_place = Block(), Block()
        low.enter(copied)
        made = self._copy(places, strides, low.scalar("s_min", self.size, low.sub(
            low.add(self.rows.offset, self.rows.extent), start)))
        low.effect("yield", [low.value(scalar) for pair in made for scalar in pair])
        low.leave()
        low.enter(in_place)
        low.effect("yield", [low.value(scalar) for pair in zip(places, strides, strict=True) for scalar in pair])
        low.leave()
        choice = Op("if", [reaches], [S64] * 2 * len(places), {}, [copied, in_place], low.location)
        low.finish(choice)
        return list(zip(choice.results[::2], choice.results[1::2], strict=True))

    def _end(self, load: Op) -> Scalar:
        """The address behind the last element of the tensor that a load reads."""
        low, tensor = self.low, memory_of(load.operands[0])
        assert isinstance(tensor.type, TensorType)
        size = element_bytes(tensor.type.dtype)
        end = low.add(low.slot(f"{tensor.name}.data"), size)
        for dim, stride in zip(tensor.type.dims, low.strides(tensor), strict=True):
            extent = dim if isinstance(dim, int) else low.slot(f"dim.{dim}")
            end = low.add(end, low.mul(low.mul(low.sub(extent, 1), stride), size))
        return end

    def _copy(self, places: list[Scalar], strides: list[Scalar], count: Scalar) -> list[tuple[Scalar, Scalar]]:
        """Copies of `count` rows of all tiles, each row with zeros behind its slots."""
        low = self.low
        base = self._memory("lefts", len(places))
        made: list[tuple[Scalar, Scalar]] = []
        for number, (tile, place, stride) in enumerate(zip(self.tiles, places, strides, strict=True)):
            to = low.add(base, number * self.tile_bytes)
            mask = low.emit(0, "mask_first", [low.value(len(tile.slots))], MASK)

            def row(position: Value, place: Scalar = place, stride: Scalar = stride, to: Scalar = to,
                    mask: Value = mask) -> None:
                source = low.value(low.add(place, low.mul(position, stride)))
                value = low.emit(low.depth, "load", [source, mask], ROW_B32, dtype=b32, masked=True, disp=0)
                low.effect("store", [value, low.value(low.add(to, low.mul(position, self.row_bytes)))], dtype=b32,
                           masked=False, streaming=False, disp=0)

            low.counted("copy", 0, count, 1, row)
            made.append((to, self.row_bytes))
        return made

    # The sums.

    def _finish(self, sums: Scalar) -> None:
        """What follows the contractions, row by row."""
        low, found = self.low, self.found
        for number, total in enumerate(found.sums):
            axes: dict[str, Scalar] = {found.rows: self.row_bytes, found.lane: i32.size_bytes}
            low.buffers[total.value] = Access(sums, number * CHUNK_TILES * self.tile_bytes, axes, i32, relative=True)

        def finish(carried: list[Value]) -> list[Value]:
            low._roots(self.walk.after)
            return carried

        low.axis_loop(found.rows, FINISHED_ROWS, False, [], finish, tails=())
        for total in found.sums:
            del low.buffers[total.value]
