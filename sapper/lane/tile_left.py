"""The left operand of products on tile registers (tile_registers.py): where its tiles lie.

Enters a walk and how tiles serve it (tile_fit.py). Leaves: rows that are read where they lie in a tensor, or copies of
them: tile by tile in the order in which products read them (tile_copies.py), or row by row with zeros behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..ir.nodes import Op, Value
from ..ir.types import ROW_B32, S64, b32, bf16, i32, i64
from ..tile.affine import affine
from ..tile.ops import memory_of
from ..tile.plan import Walk
from .state import Access, Bound, Capacity, Open, Scalar
from .tile_bound import dtype_of
from .tile_copies import copy_parts, copy_slots, lies_along_rows, turn_parts
from .tile_fit import ACROSS, TileWalk, divides, lies_in_rows

if TYPE_CHECKING:
    from .walk import WalkLowering

COPIED_FOR_COLUMNS = 512
"""Columns from which a copy of a left operand that the second cache does not hold is worth it (_goes_in_tiles). On a
Granite Rapids, of the time without: bf16 of 1024 cubed 0.93, of 2048 cubed 0.80, 128 x 4096 x 4096 0.87, i8 0.98, 0.93;
512 cubed, which the cache holds, 1.06."""

COPIED_BLOCKS = 8
"""Halves of the second cache that such a copy takes at most: each worker has one."""


@dataclass(slots=True)
class Left:
    """Where the left operand lies: its row 0, which is the first of the walk, and how far apart rows are. in_tiles: it
    lies tile by tile (tile_copies.py), zeros behind the depth's end, and the stride is what a row takes of that. here:
    so lie only the rows of the piece at hand, as nobody knows how many there may be."""

    base: Scalar
    stride: Scalar
    in_tiles: bool = False
    here: bool = False


class LeftOperand:
    """Where it is found, of one walk.

    size: of a tile, rows and slots; row_bytes: of its rows. range: the rows. columns: all of them, not a block's.
    elements, slots: the depth; rest: whole slots beyond whole tiles of it; partial: elements beyond these.
    """

    elements: Open
    slots: Open

    def __init__(self, low: WalkLowering, walk: Walk, found: TileWalk) -> None:
        unit = low.facts.tiles
        assert unit is not None
        self.low, self.walk, self.found = low, walk, found
        self.size, self.row_bytes = unit.size, unit.size * b32.size_bytes
        self.left_dtype = bf16 if found.parted else dtype_of(found.left)
        self.range, self.columns = low.open[found.rows], low.open[found.columns]
        self.left = Left(0, 0)
        self.rest: Scalar = 0
        self.partial: Scalar = 0

    @property
    def beyond(self) -> Scalar:
        """0 if whole tiles are all of the depth."""
        return self.low.add(self.rest, self.partial)

    @property
    def _padded_bytes(self) -> Scalar:
        """Of a copied row: whole tiles."""
        deep = self.size * self.found.step_slots
        return self.low.mul(self.low.ceil_div(self.elements.extent, deep), self.row_bytes)

    def place_left(self) -> Left:
        low, found, extent = self.low, self.found, self.range.extent
        if found.parted or self._goes_in_tiles():
            bounded = low.is_bounded(found.rows)
            dim = None if bounded else self._dim_of_rows()
            room = low._capacity(found.rows) if bounded else ACROSS * self.size
            if dim is not None:
                room = Capacity(1, (dim,)) if isinstance(dim, str) else dim
            place = self._copied_rows("left", room)
            if bounded:
                self._copy_once(place, extent)
            elif dim is not None:       # there is no room for more than that
                self._copy_once(place, low.scalar("s_min", extent, low.extent(dim)))
            return Left(place, low.mul(self._padded_bytes, found.left_parts), True, not bounded and dim is None)
        if not lies_in_rows(low, found):
            copy = self._copy_kept if found.left in low.slot_axes else self._copy_elements
            return self._copy(self._copied_rows("left", low._capacity(found.rows)), extent, copy)
        assert found.left.op is not None
        access = low.access(found.left.op)
        low.read_in_rows.add(tuple(found.left.op.operands))
        base = low.add(low.add(access.base, access.disp), low.mul(self.range.offset, access.axes[found.rows]))
        lies = Left(low.add(base, low.mul(self.elements.offset, access.axes[found.depth])), access.axes[found.rows])
        if divides(self.size, self.range) or (isinstance(extent, int) and extent >= self.size):
            return lies
        few = self._copied_rows("few", self.size)
        copy = self._copy_slots if self.partial == 0 else self._copy_elements
        if isinstance(extent, int):
            return self._copy(few, extent, copy)
        is_few = low.emit(low.depth_of(extent), "s_cmp", [extent, low.value(self.size)], S64, cond="lt")
        self._copy(few, self._selected(is_few, extent, 0), copy)
        return Left(self._selected(is_few, few, lies.base), self._selected(is_few, self._padded_bytes, lies.stride))

    def _dim_of_rows(self) -> int | str | None:
        """How many rows the tensor has that the left operand is read from, which bounds their range; None if it is
        none, or is read otherwise than by that axis."""
        op = self.found.left.op
        if op is None or op.name != "load" or memory_of(op.operands[0]) is not op.operands[0]:
            return None
        for index, dim in zip(op.operands[1:], op.operands[0].type.dims, strict=True):  # type: ignore[union-attr]
            form = affine(index)
            if form is not None and form.axes == {self.found.rows: 1} and not form.scalars and form.constant == 0:
                return dim if isinstance(dim, int | str) else None
        return None

    def _copy_once(self, place: Scalar, count: Scalar) -> None:
        """Copy the first `count` rows that are open, but not where the worker's walk before had the same ones: words of
        its scratch memory say where the first of them is, and how many there are."""
        low, found, rows = self.low, self.found, self.range

        def copy() -> None:
            low.open[found.rows] = replace(rows, extent=count)
            self._copy_in_tiles(place)
            low.open[found.rows] = rows

        first = self._first_element()
        if first is None:
            copy()
            return
        key = ("tile words", self.walk.reductions[0])       # of the same memory, wherever the walk is emitted
        if key not in low.stage_memory:
            low.stage_memory[key] = low.scratch([(2, 1)], i64)
            low.levels[0].builder.block.ops.append(
                Op("s_store", [low.value(-1), low.value(low.stage_memory[key])], (), {"dtype": i64}))
        words = low.value(low.stage_memory[key])
        others: Value | None = None
        for disp, wanted in ((0, first), (i64.size_bytes, low.value(count))):
            there = low.emit(low.depth, "s_load", [words], S64, dtype=i64, disp=disp)
            differs = low.emit(low.depth, "s_cmp", [there, wanted], S64, cond="ne")
            others = differs if others is None else low.emit(low.depth, "s_or", [others, differs], S64)
        assert others is not None

        def anew() -> None:
            copy()
            low.effect("s_store", [first, words], dtype=i64)
            low.effect("s_store", [low.value(count), words], dtype=i64, disp=i64.size_bytes)

        low.fork(others, anew, lambda: None)

    def _first_element(self) -> Value | None:
        """The address of the left operand's first element, where all that is copied follows from it: it lies in a
        tensor that the kernel only reads."""
        low, found, op = self.low, self.found, self.found.left.op
        if op is None or op.name != "load" or found.left in low.buffers or found.left in low.rows or (
                memory_of(op.operands[0]) in low.stored):
            return None
        access = low.access(op)
        same = all(isinstance(s, int) or low.depth_of(s) == 0 for s in (self.elements.offset, self.elements.extent))
        if access.gathers or not same or access.axes.keys() - {found.rows, found.depth}:
            return None
        start = low.add(access.base, low.mul(self.range.offset, access.axes.get(found.rows, 0)))
        return low.value(low.add(start, access.disp))

    def _copy_in_tiles(self, place: Scalar) -> None:
        """The rows that are open, to tiles from `place` on."""
        low, found, rounds = self.low, self.found, self.found.right_parts > 1
        of = low, found.left, found.rows, found.depth, place
        if found.parted and lies_along_rows(low, found.left, found.rows):
            turn_parts(*of, rounds)
            return
        rows = low.open[found.rows]
        low._loop(found.rows, rows.offset, low.add(rows.offset, rows.extent), 1, False, False, [],
                  lambda _: copy_parts(*of, rounds) if found.parted else copy_slots(*of))

    def _goes_in_tiles(self) -> bool:
        """Whether a left operand that lies in a tensor is copied tile by tile, in the order in which products read it:
        a processor follows one stream from the last cache, and not 32 rows."""
        low, found = self.low, self.found
        if not lies_in_rows(low, found) or found.within is not None or self.partial != 0:
            return False
        if not low.is_bounded(found.rows):
            return False
        size_bytes = self.range.hint * self.elements.hint * self.left_dtype.size_bytes
        fits = low.block_bytes <= size_bytes <= COPIED_BLOCKS * low.block_bytes
        return fits and self.columns.hint >= COPIED_FOR_COLUMNS

    def _selected(self, condition: Value, then: Scalar, other: Scalar) -> Value:
        low = self.low
        depth = max(low.depth_of(scalar) for scalar in (condition, then, other))
        return low.emit(depth, "s_select", [condition, low.value(then), low.value(other)], S64)

    def _copied_rows(self, name: str, rows: object) -> Scalar:
        """Scratch memory for so many rows, whole tiles of them."""
        low, op = self.low, self.walk.reductions[0]
        key = (f"tile {name}", op)
        if key not in low.stage_memory:
            low.stage_memory[key] = low.scratch([
                (rows, self.size), (low._capacity(self.found.depth), self.size * self.found.step_slots),  # type: ignore[list-item]
                (self.found.left_parts * self.found.dot.elements // self.found.step_slots, 1)], self.left_dtype)
        return low.stage_memory[key]

    def _copy(self, base: Scalar, count: Scalar, copy: Callable[[Access], None]) -> Left:
        """The first `count` rows, with zeros behind the depth's end."""
        low, found = self.low, self.found
        stride = self._padded_bytes
        place = Access(low.sub(base, low.mul(self.range.offset, stride)), 0, {found.rows: stride}, b32)

        def row(_: list[Value]) -> list[Value]:
            copy(place)
            return []

        low._loop(found.rows, self.range.offset, low.add(self.range.offset, count), 1, False, False, [], row)
        return Left(base, stride)

    def _copy_slots(self, place: Access) -> None:
        """A row that is contiguous along the depth: slots as they are, and what is left of the last tile, zeros."""
        low, found = self.low, self.found

        def slots(_: list[Value]) -> list[Value]:
            at = {found.rows: 0, found.depth: 0}
            if found.within is None:
                row = low.slot_row(found.left, at, False)
            else:
                assert found.left.op is not None
                mask = low.bound[found.depth].mask
                row = low.fetch_row(self._slots_of(low.access(found.left.op)), b32, at, low.depth, mask)
            to = Access(place.base, 0, {**place.axes, found.depth: b32.size_bytes}, b32)
            to.base = low.sub(to.base, low.mul(self.slots.offset, b32.size_bytes))
            low.put(to, row, b32, at, (found.rows, found.depth), padded=True)
            return []

        low.axis_loop(found.depth, 1, True, [], slots)

    def _copy_kept(self, place: Access) -> None:
        """A row of slots that are kept (slots.py), which are neighbours along the rows there; the last one may be half
        full, with 0 above."""
        low, found, full = self.low, self.found, self.slots
        low.open[found.depth] = replace(full, extent=low.ceil_div(self.elements.extent, found.dot.elements))

        def slots(_: list[Value]) -> list[Value]:
            at = {found.rows: 0, found.depth: 0}
            to = Access(place.base, 0, {**place.axes, found.depth: b32.size_bytes}, b32)
            low.put(to, low.kept_slots(found.left, at), b32, at, (found.rows, found.depth), padded=True)
            return []

        low.axis_loop(found.depth, 1, True, [], slots)
        low.open[found.depth] = full

    def _copy_elements(self, place: Access) -> None:
        """A row of any value, element by element."""
        low, found = self.low, self.found
        dtype = dtype_of(found.left)
        if self.beyond != 0:
            low.bound[found.depth] = Bound(0, 1, False, None, low.depth)
            end = Access(low.add(place.base, low.sub(self._padded_bytes, self.row_bytes)), 0, place.axes, b32)
            operands, attributes = low.address(end, {found.rows: 0})
            low.effect("store", [self._zeros(), *operands], dtype=b32, masked=False, streaming=False, **attributes)
            del low.bound[found.depth]

        def elements(_: list[Value]) -> list[Value]:
            to = Access(low.sub(place.base, low.mul(self.elements.offset, dtype.size_bytes)), 0,
                        {**place.axes, found.depth: dtype.size_bytes}, dtype)
            for at in low._coordinates((found.rows, found.depth)):
                low.put(to, low.row(found.left, at), dtype, at, (found.rows, found.depth))
            return []

        with low.unpacked():
            low.axis_loop(found.depth, 2, True, [], elements)

    def _slots_of(self, access: Access) -> Access:
        """Where the slots of an operand lie that has their elements as its last dimension."""
        return Access(access.base, access.disp, {axis: step for axis, step in access.axes.items()
                                                 if axis != self.found.within}, b32)

    def _zeros(self) -> Value:
        low = self.low
        return low.emit(0, "bitcast", [low.constant(0, i32)], ROW_B32)
