"""Contractions on tile registers inside a loop that holds the lane axis of their sums: attention.

Enters a walk that contracts an operand that is kept as slots in scratch memory and spans the lanes (slots.py: queries,
weights of a softmax) with another one: one that is contiguous along the depth in a tensor (keys), or one that is kept
as slots too (values). The slots that span the lanes are tiles of the right operand as they lie. Keys are tiles of the
left one as they lie; slots of values are turned, squares of them at a time, into rows along the depth, and stay so for
later runs of the loop (kept_tiles.py).

What holds: the depth is taken whole, as far as scratch memory has room for it; slots beyond those that there are, and
what the left operand has there, are zeros. tile_bound.py says what holds besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ir.nodes import Value
from ..ir.types import ROW_B32, TILE_F32, b32, bf16, f32, i32
from ..tile.plan import Walk, axes_of, ops_behind
from .packed import DOT2_BF16, Packing, Term
from .state import PAIR, Access, Bound, Scalar
from .tile_bound import BoundTiles, Left, dtype_of, lies_in_tensor
from .tile_fit import is_kept

if TYPE_CHECKING:
    from .model import Model
    from .walk import WalkLowering

MOST_SUMS = 4
"""Tiles of sums at once: half of all that there are."""


@dataclass(frozen=True, slots=True)
class TileSlots:
    """How tiles serve a walk. rows: its open axis. lane: the bound one of the columns. depth: the contracted one. left,
    right: the operands. most, slots: of the rows, and of the depth, that there may be."""

    rows: str
    lane: str
    depth: str
    left: Value
    right: Value
    most: int
    slots: int

    @property
    def row_bytes(self) -> int:
        """Of a row along the depth."""
        return self.slots * b32.size_bytes

    def packing(self, low: WalkLowering, walk: Walk) -> Packing:
        return Packing(DOT2_BF16, self.depth, walk.reduced, low.open[self.depth], True,
                       {op: Term() for op in walk.reductions})

    def emit(self, low: WalkLowering, walk: Walk) -> None:
        """All of the walk."""
        with low.packed(self.packing(low, walk)):
            _Emission(low, walk, self).run()


def fit(model: Model, walk: Walk, lane: str, kept: Value | None = None) -> TileSlots | None:
    """How tiles serve a walk whose axis `lane` is bound, or None: vectors then take it. kept: an operand that is
    going to be kept as slots."""
    unit = model.facts.tiles
    if unit is None or unit.size != model.lanes or model.schedule.matrix is False or model.schedule.registers:
        return None
    rows = [axis for axis in walk.outer if axis in model.open]
    if len(rows) != 1 or len(walk.reduced) != 1 or len(walk.reductions) != 1 or walk.inner:
        return None
    (op,), (depth,) = walk.reductions, walk.reduced
    if op.name != "contract" or depth not in model.open or not model.bound[lane].resident or (
            dtype_of(op.result) is not f32 or any(dtype_of(v) is not bf16 for v in op.operands)
            or ("bf16", "bf16") not in unit.products):
        return None
    left = next((v for v in op.operands if set(axes_of(v)) == {rows[0], depth}), None)
    right = next((v for v in op.operands if set(axes_of(v)) == {lane, depth}), None)
    if left is None or right is None or not is_kept(model, right, depth):
        return None
    most, deep, tile = model.open[rows[0]].most, model.open[depth].most, unit.size * PAIR
    if most is None or deep is None or deep % tile or model.extent_hint(rows[0]) < unit.size:
        return None
    if left is kept or is_kept(model, left, depth):
        if model.open[rows[0]].extent != most or most % unit.size:
            return None
    elif not lies_in_tensor(model, left) or left.op is None or (
            model.open[depth].extent != deep or model.access(left.op).axes.get(depth) != bf16.size_bytes):
        return None
    return TileSlots(rows[0], lane, depth, left, right, most, deep // PAIR)


class _Emission(BoundTiles):
    """The emission of one walk. deep: tiles along the depth."""

    def __init__(self, low: WalkLowering, walk: Walk, found: TileSlots) -> None:
        super().__init__(low, walk, found.rows, found.lane, found.most, f32)
        self.found = found
        self.deep = found.slots // self.size

    def run(self) -> None:
        low, rows, found = self.low, self.rows, self.found
        low.use_tiles()
        count = low.open[found.depth].extent
        right, stride = cleared_slots(low, found, found.right, count)
        places = [(number * self.size * stride, column * self.row_bytes)
                  for number in range(self.deep) for column in range(self.wide)]
        held = [self.load(low.add(right, at), stride, disp) for at, disp in places] \
            if len(places) + self.wide < 2 * MOST_SUMS else []      # which leaves one for the left operand
        if not held:
            self.tall = max(number for number in range(1, max(1, MOST_SUMS // self.wide) + 1)
                            if self.most % (number * self.size) == 0)
        lefts = self._turned() if found.left in low.slot_axes else self._in_place()
        carried = self._carried()
        if carried is not None:
            self._begin(*carried)
        into = None if carried is None else low.kept_access(carried[0])

        def products(start: Value) -> None:
            positions = [low.add(low.sub(start, rows.offset), number * self.size) for number in range(self.tall)]
            for first in range(0, self.wide, MOST_SUMS):
                columns = range(first, min(first + MOST_SUMS, self.wide))
                totals = [[self.zeros() if into is None else self._sums(into, position, column) for column in columns]
                          for position in positions]
                for number, (left, left_stride) in enumerate(lefts):
                    def slots(place: int, number: int = number, first: int = first) -> Value:
                        place += number * self.wide + first
                        return held[place] if held else self.load(
                            low.add(right, places[place][0]), stride, places[place][1])

                    kept = [slots(place) for place in range(len(columns))] if self.tall > 1 else []
                    for position, sums in zip(positions, totals, strict=True):
                        a = self.load(low.add(left, low.mul(position, left_stride)), left_stride)
                        for place in range(len(columns)):
                            b = kept[place] if kept else slots(place)
                            sums[place] = self.multiply(sums[place], a, b, (bf16, bf16))
                for position, sums in zip(positions, totals, strict=True):
                    if into is None:
                        self.store(sums, position, first)
                    else:
                        self._store_into(into, position, first, sums)

        low.counted(self.axis, rows.offset, low.add(rows.offset, rows.extent), self.tall * self.size, products)
        if into is None:
            self.finish([self.walk.reductions[0].result])

    # Sums that are only added to what a loop carries begin with that, where it lies.

    def _carried(self) -> tuple[Value, Value] | None:
        """The value that all of the walk is for, kept in scratch memory, and what the sums are added to for it."""
        low, (op,) = self.low, self.walk.reductions
        if self.found.left not in low.slot_axes or len(self.walk.after) != 1:
            return None     # the rows may end within a tile
        (total,) = self.walk.after
        if not isinstance(total, Value) or total.op is None or total.op.name != "add" or total in low.slot_axes or (
                low.users.get(op.result) != [total.op] or low.kept_dtype(total) is not f32):
            return None
        access, others = low.kept_access(total), [v for v in total.op.operands if v is not op.result]
        if access is None or len(others) != 1 or access.axes.keys() != {self.axis, self.lane} or (
                access.axes[self.lane] != f32.size_bytes or op in ops_behind(others[0])):
            return None
        return total, others[0]

    def _begin(self, total: Value, addend: Value) -> None:
        """What sums are added to, where the total is to lie."""
        low = self.low

        def rows(carried: list[Value]) -> list[Value]:
            points = low._coordinates(axes_of(total))
            for at, row in [(at, low.row(addend, at)) for at in points]:
                low._keep(total, at, row)
            return carried

        low.axis_loop(self.axis, self.rows_at_once, False, [], rows)

    def _sums(self, access: Access, position: Scalar, column: int) -> Value:
        low = self.low
        place = low.add(access.base, low.mul(access.axes[self.axis], position))
        return low.emit(low.depth, "tile_load", [low.value(place), low.value(access.axes[self.axis])], TILE_F32,
                        disp=access.disp + column * self.row_bytes)

    def _store_into(self, access: Access, position: Scalar, first: int, totals: list[Value]) -> None:
        low = self.low
        place = low.value(low.add(access.base, low.mul(access.axes[self.axis], position)))
        for column, total in enumerate(totals, first):
            low.effect("tile_store", [total, place, low.value(access.axes[self.axis])],
                       disp=access.disp + column * self.row_bytes)

    def _in_place(self) -> list[tuple[Scalar, Scalar]]:
        """The left operand where it lies in a tensor, tile by tile along the depth."""
        low, depth = self.low, self.found.depth
        load = self.found.left.op
        assert load is not None
        low.bound[depth] = Bound(low.open[depth].offset, 1, False, None, low.depth)
        access = low.operand_access(load)
        made = self.left_rows([Left(load, access, access.disp + number * self.row_bytes, self.size)
                               for number in range(self.deep)])
        del low.bound[depth]
        return made

    def _turned(self) -> list[tuple[Scalar, Scalar]]:
        """The same of slots that are kept: rows of the depth in scratch memory."""
        low, found = self.low, self.found
        to = low.turned.get(found.left)
        if to is None:
            to = self.memory("left", self.most * found.row_bytes)
            turn(low, found, to, low.open[found.depth].extent)
        return [(low.add(to, number * self.row_bytes), found.row_bytes) for number in range(self.deep)]


def cleared_slots(low: WalkLowering, found: TileSlots, value: Value, count: Scalar) -> tuple[Scalar, int]:
    """Address and stride of the slots of a kept value, to the end of its memory: behind the `count` that there are come
    zeros."""
    access, row_bytes = low.buffers[value], low.lanes * b32.size_bytes
    per_element = access.axes[found.depth]
    assert isinstance(per_element, int)
    base, stride = low.add(access.base, access.disp), per_element * PAIR
    zeros = low.emit(0, "bitcast", [low.constant(0, i32)], ROW_B32)

    def clear(at: Value) -> None:
        low.effect("store", [zeros, low.value(low.add(base, at))], dtype=b32, masked=False, streaming=False, disp=0)

    first = low.mul(count, stride)
    if first != found.slots * stride:
        low.counted("rest", first, found.slots * stride, row_bytes, clear)
    return base, stride


def turn(low: WalkLowering, found: TileSlots, to: Scalar, count: Scalar) -> None:
    """Copy the slots of the left operand, `count` that are kept, to rows along the depth."""
    size = low.lanes
    source, stride = cleared_slots(low, found, found.left, count)

    def square(row: Value, slot: Value) -> None:
        """size slots of as many rows."""
        start = low.value(low.add(low.add(source, low.mul(slot, stride)), low.mul(row, b32.size_bytes)))
        lines = [low.emit(low.depth, "load", [start], ROW_B32, dtype=b32, masked=False, disp=number * stride)
                 for number in range(size)]
        place = low.value(low.add(low.add(to, low.mul(row, found.row_bytes)), low.mul(slot, b32.size_bytes)))
        for number, line in enumerate(low.transposed(lines, low.depth)):
            low.effect("store", [line, place], dtype=b32, masked=False, streaming=False, disp=number * found.row_bytes)

    low.counted("turn", 0, found.most, size, lambda row: low.counted(
        "turn", 0, found.slots, size, lambda slot: square(row, slot)))
