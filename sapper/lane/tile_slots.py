"""Contractions on tile registers inside a loop that holds the lane axis of their sums: attention.

Enters a walk that contracts an operand that is kept as slots in scratch memory and spans the lanes (slots.py: queries,
weights of a softmax) with another one: one that is contiguous along the depth in a tensor (keys), or one that is kept
as slots too (values). The slots that span the lanes are tiles of the right operand as they lie. Keys are tiles of the
left one as they lie; slots of values are turned, squares of them at a time, into rows along the depth, and stay so for
later runs of the loop (kept_tiles.py). Several contractions that have the left operand in common, and whose results are
only added up, are one with several right ones: parts of a float (sapper/tile/float_parts.py).

What holds: the depth is taken whole, as far as scratch memory has room for it; slots beyond those that there are, and
what the left operand has there, are zeros. tile_bound.py says what holds besides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from ..ir.nodes import Op, Value
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
    rights: the operands. total: the sum of all contractions. most, slots: of the rows, and of the depth, that there may
    be."""

    rows: str
    lane: str
    depth: str
    left: Value
    rights: tuple[Value, ...]
    total: Value
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
        low.in_slots.update(walk.reductions)
        with low.packed(self.packing(low, walk)):
            _Emission(low, walk, self).run()


def fit(model: Model, walk: Walk, lane: str, kept: Value | None = None) -> TileSlots | None:
    """How tiles serve a walk whose axis `lane` is bound, or None: vectors then take it. kept: an operand that is
    going to be kept as slots."""
    unit = model.facts.tiles
    if unit is None or unit.size != model.lanes or model.schedule.matrix is False or model.schedule.registers:
        return None
    rows = [axis for axis in walk.outer if axis in model.open]
    if len(rows) != 1 or len(walk.reduced) != 1 or not walk.reductions or walk.inner:
        return None
    (depth,), total = walk.reduced, _total(model, walk.reductions)
    if total is None or depth not in model.open or not model.bound[lane].resident or (
            ("bf16", "bf16") not in unit.products):
        return None
    lefts, rights = ([v for op in walk.reductions for v in op.operands if set(axes_of(v)) == {axis, depth}]
                     for axis in (rows[0], lane))
    left = lefts[0] if len(set(lefts)) == 1 and len(lefts) == len(rights) == len(walk.reductions) else None
    if left is None or not all(is_kept(model, right, depth) for right in rights):
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
    return TileSlots(rows[0], lane, depth, left, tuple(rights), total, most, deep // PAIR)


def _total(model: Model, contractions: list[Op]) -> Value | None:
    """What contractions of bf16 add up to in f32, if nothing else becomes of any of them."""
    if any(op.name != "contract" or dtype_of(op.result) is not f32 or any(dtype_of(v) is not bf16 for v in op.operands)
           for op in contractions):
        return None
    terms = [op.result for op in contractions]
    while len(terms) > 1:
        users = model.users.get(terms[0], [])
        other = next((v for v in terms[1:] if len(users) == 1 and model.users.get(v, []) == users), None)
        if other is None or users[0].name != "add":
            return None
        terms = [users[0].result, *(v for v in terms[1:] if v is not other)]
    return terms[0]


class _Emission(BoundTiles):
    """The emission of one walk. deep: tiles along the depth. kept_left: whether the left operand is kept as slots along
    it."""

    def __init__(self, low: WalkLowering, walk: Walk, found: TileSlots) -> None:
        super().__init__(low, walk, found.rows, found.lane, found.most, f32)
        self.found = found
        self.deep = found.slots // self.size
        self.kept_left = low.slot_axes.get(found.left) == found.depth

    def run(self) -> None:
        low, rows, found = self.low, self.rows, self.found
        low.use_tiles()
        count = low.open[found.depth].extent
        parts = [cleared_slots(low, found, right, count) for right in found.rights]

        def tile(step: int, part: int, column: int) -> Value:
            right, stride = parts[part]
            return self.load(low.add(right, step * self.size * stride), stride, column * self.row_bytes)

        slots = list(product(range(self.deep), range(len(parts)), range(self.wide)))
        few = len(slots) + self.wide < 2 * MOST_SUMS    # which leaves one for the left operand
        held = {slot: tile(*slot) for slot in slots} if few else {}
        if not held:
            self.tall = max(number for number in range(1, max(1, MOST_SUMS // self.wide) + 1)
                            if self.most % (number * self.size) == 0)
        lefts = self._turned() if self.kept_left else self._in_place()
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
                for step, left in enumerate(lefts):
                    def right(part: int, column: int, step: int = step) -> Value:
                        return held.get((step, part, column)) or tile(step, part, column)

                    self._multiply(left, positions, right, len(parts), columns, totals)
                for position, sums in zip(positions, totals, strict=True):
                    if into is None:
                        self.store(sums, position, first)
                    else:
                        self._store_into(into, position, first, sums)

        low.counted(self.axis, rows.offset, low.add(rows.offset, rows.extent), self.tall * self.size, products)
        if into is None:
            self.finish([found.total])

    def _multiply(self, left: tuple[Scalar, Scalar], positions: list[Scalar], right: Callable[[int, int], Value],
                  parts: int, columns: range, totals: list[list[Value]]) -> None:
        """A step of the depth, of rows from each position on by columns. left: its first row, and their stride. right:
        of a part and a column."""
        ways = list(product(range(parts), enumerate(columns)))

        def rows(position: Scalar) -> Value:
            return self.load(self.low.add(left[0], self.low.mul(position, left[1])), left[1])

        if parts > 1 and len(positions) * (len(columns) + 1) < 2 * MOST_SUMS:   # which leaves one for slots
            tiles = [rows(position) for position in positions]
            for part, (place, column) in ways:
                b = right(part, column)
                for a, sums in zip(tiles, totals, strict=True):
                    sums[place] = self.multiply(sums[place], a, b, (bf16, bf16))
            return
        kept = [right(part, column) for part, (_, column) in ways] if len(positions) > 1 else []
        for position, sums in zip(positions, totals, strict=True):
            a = rows(position)
            for number, (part, (place, column)) in enumerate(ways):
                sums[place] = self.multiply(sums[place], a, kept[number] if kept else right(part, column), (bf16, bf16))

    # Sums that are only added to what a loop carries begin with that, where it lies.

    def _carried(self) -> tuple[Value, Value] | None:
        """The value that all of the walk is for, kept in scratch memory, and what the sums are added to for it."""
        low, sums = self.low, self.found.total
        if not self.kept_left or len(self.walk.after) != 1:
            return None     # the rows may end within a tile
        (total,) = self.walk.after
        if not isinstance(total, Value) or total.op is None or total.op.name != "add" or total in low.slot_axes or (
                low.users.get(sums) != [total.op] or low.kept_dtype(total) is not f32):
            return None
        access, others = low.kept_access(total), [v for v in total.op.operands if v is not sums]
        if access is None or len(others) != 1 or access.axes.keys() != {self.axis, self.lane} or (
                access.axes[self.lane] != f32.size_bytes or sums.op in ops_behind(others[0])):
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
