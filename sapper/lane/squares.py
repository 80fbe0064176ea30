"""Squares of elements, transposed in registers: memory that is contiguous along another axis than the lanes'.

Enters a load or a store with an axis across the lanes (queries of attention), of a tensor that is contiguous along
another axis, of which as many rows are taken at once as there are lanes; leaves loads or stores of whole rows along
that axis, and exchanges between lanes, in place of a gather or a scatter for each row.

What holds: rows of a square past the edge of the lane axis repeat the last one when they are read, and are not written:
a store that writes nothing goes to the last one too, as one to memory that is not there takes a thousand cycles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from ..ir.nodes import Op, Value
from ..ir.types import MASK, RowType, bf16, bool_, i4, i32
from ..tile.ops import place_of
from .layout import Exchange, Layout, Step, convert
from .slots import KeptSlots
from .state import Access, Bound, element_bytes, row_dtype


class Squares(KeptSlots):
    """transposes_by_scatter: see Facts."""

    transposes_by_scatter: bool

    def square_axis(self, op: Op, access: Access, lane: str | None) -> str | None:
        """The axis along which a load or store is contiguous, if it spans the lanes of another one."""
        size = element_bytes(access.dtype)
        if lane is None or access.axes.get(lane, 0) in (0, size) or access.gathers or self.transposes_by_scatter:
            return None
        if op.operands[0].op is not None or not is_as_in_memory(op):
            return None
        return next((a for a, step in access.axes.items() if step == size), None)

    def _square(self, op: Op, access: Access) -> tuple[str, str] | None:
        """The lane axis, and the other one if a whole square of it is bound."""
        lane = next((a for a in access.axes if a in self.bound and self.bound[a].lane), None)
        axis = self.square_axis(op, access, lane)
        bound = self.bound.get(axis) if axis is not None else None
        if lane is None or axis is None or bound is None or bound.lane or bound.count != self.lanes:
            return None
        whole = self.bound[lane].mask is None or self.bound[lane].stop is not None
        return (lane, axis) if whole else None

    def transposed(self, rows: list[Value], level: int) -> list[Value]:
        """A square of rows, row i of the result being lane i of each."""
        return self.exchanged(rows, _exchanges(self.lanes), level)

    def exchanged(self, rows: list[Value], steps: tuple[Step, ...], level: int) -> list[Value]:
        """Rows after steps that are all exchanges."""
        rows = list(rows)
        for step in steps:
            assert isinstance(step, Exchange)
            for i in range(len(rows)):
                if not i & step.register_stride:
                    pair = [rows[i], rows[i + step.register_stride]]
                    rows[i], rows[i + step.register_stride] = self.emit_pair(
                        level, "exchange", pair, {"distance": step.distance})
        return rows

    @contextmanager
    def _turned(self, lane: str, axis: str, row: int, writes: bool) -> Iterator[dict[str, int]]:
        """Within, the lanes lie along `axis`, at a row of what was the lane axis. Gives the coordinates of both."""
        outer, inner = self.bound[lane], self.bound[axis]
        offset, mask, at = outer.offset, None, {lane: row, axis: 0}
        if outer.mask is not None:
            offset, at[lane] = self.add(offset, row), 0
            assert outer.stop is not None
            if writes:
                first = row // self.lanes * self.lanes
                left = self.value(self.sub(self.sub(outer.stop, outer.offset), first))
                rows = self.emit(self.depth, "splat", [left], RowType(i32))
                mask = self.emit(self.depth, "cmp", [rows, self.constant(row - first, i32)], MASK, cond="gt")
            offset = self.scalar("s_min", offset, self.sub(outer.stop, 1))
        rows_in_all = 1 if outer.mask is not None else outer.count * self.lanes
        self.bound[lane] = Bound(offset, rows_in_all, False, None, outer.depth)
        self.bound[axis] = Bound(inner.offset, 1, True, mask, inner.depth)
        yield at
        self.bound[lane], self.bound[axis] = outer, inner

    def square_row(self, op: Op, access: Access, at: dict[str, int], level: int) -> Value | None:
        """The row of a load, of a square that is read when the first of its rows is; None if there is no square."""
        found = self._square(op, access)
        if found is None:
            return None
        lane, axis = found
        memo = self.levels[level].memo
        key = ("square", op, tuple(place for a, place in at.items() if a != axis))
        if key not in memo:
            rows = []
            for i in range(self.lanes):
                with self._turned(lane, axis, at[lane] * self.lanes + i, False) as turned:
                    operands, attributes = self.address(access, {**at, **turned})
                rows.append(self.emit(level, "load", operands, RowType(row_dtype(access.dtype)), dtype=access.dtype,
                                      masked=False, **attributes))
            memo[key] = self.transposed(rows, level)
        square: list[Value] = memo[key]
        return square[at[axis]]

    def stores_squares(self, op: Op, access: Access) -> bool:
        """Whether a store is made of squares, and nothing that it changes is read here."""
        return self._square(op, access) is not None and all(
            load.name != "load" or place_of(load.operands[0]) is not place_of(op.operands[0])
            for load in self.function.walk())

    def store_square(self, op: Op, access: Access, at: dict[str, int], rows: list[Value], streaming: bool) -> None:
        """Store rows of all places along the other axis. at: of the first."""
        found = self._square(op, access)
        assert found is not None
        lane, axis = found
        dtype = op.operands[1].type.dtype  # type: ignore[union-attr]
        # Stores round what they narrow: that was done before would be done twice.
        for i, row in enumerate(self.transposed([unrounded(row) for row in rows], self.depth)):
            with self._turned(lane, axis, at[lane] * self.lanes + i, True) as turned:
                self.put(access, row, dtype, {**at, **turned}, tuple(at), streaming=streaming)


def is_as_in_memory(op: Op) -> bool:
    """Whether rows of what a load gives or a store takes are what memory holds: bools are masks in registers, and of an
    i4 memory may hold more than its bits."""
    value = op.result if op.name == "load" else op.operands[1]
    return value.type.dtype not in (bool_, i4)  # type: ignore[union-attr]


def unrounded(row: Value) -> Value:
    """A row before it was rounded to bf16, if it was."""
    op = row.op
    rounded = op is not None and op.name == "round_to" and op.attributes["dtype"] is bf16
    return op.operands[0] if op is not None and rounded else row


@cache
def _exchanges(lanes: int) -> tuple[Step, ...]:
    """The steps from rows in registers to rows in lanes."""
    return convert(Layout.parse(f"m: {lanes}@register; n: {lanes}@lane"),
                   Layout.parse(f"m: {lanes}@lane; n: {lanes}@register")).steps
