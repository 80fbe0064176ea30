"""Stores that join values with what is there: sums at places that may be met again.

Enters: the row of such a store at one piece of its axes. Leaves: what is there loaded, joined with the row, and stored;
lane after lane where two of them may hold values of one element. Holds: pieces follow each other in the order of the
walk, and so do loads and stores of lane IR, so that each piece sees what those before it have left.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from ..ir.nodes import Op, Value
from ..ir.types import MASK, S64, DType, RowType, i32
from ..tile.ops import place_of
from .axis_loops import AxisLoops
from .state import Access, Scalar, element_bytes, row_dtype

MemoryOperands = tuple[list[Value], dict[str, Any]]
"""Operands and attributes of an op on memory that say where."""

_SCALES = frozenset((1, 2, 4, 8))
"""By which an address multiplies an index."""


class Joins(AxisLoops):
    """Emits stores that join."""

    @cached_property
    def lane_memory(self) -> dict[tuple[str, DType], Scalar]:
        """Scratch memory for a row, by what it is and its element type, from which each lane's element is taken."""
        return {}

    def join(self, op: Op, pieces: list[tuple[dict[str, int], Value]]) -> None:
        """All pieces of a store, each as its register coordinates and its row."""
        name, dtype = op.attributes["join"], op.operands[1].type.dtype  # type: ignore[union-attr]
        lane = next((a for a in pieces[0][0] if self.bound[a].lane), None)
        beside: dict[tuple[int, ...], list[tuple[Access, dict[str, int], Value]]] = {}
        for at, row in pieces:
            access = self._at_scalars(self.access(op), at)
            if (name, dtype) in self.facts.joins:
                self._join_at_once(name, access, at, row)
            elif lane is not None and (access.gathers or self.lane_stride(access.axes) == 0):
                self._join_lane_by_lane(name, access, dtype, at, row, op.operands[1])
            else:
                beside.setdefault(tuple(n for a, n in at.items() if a != lane), []).append((access, at, row))
        # Rows that differ along the lane axis alone hold other elements: these are loaded before any is stored.
        for rows in beside.values():
            after = [self.emit(self.depth, name, [self.fetch_row(
                access, row_dtype(dtype), at, self.depth, self.lane_mask(tuple(at))), row], row.type)
                for access, at, row in rows]
            for (access, at, _), row in zip(rows, after, strict=True):
                self.put(access, row, dtype, at, tuple(at))

    def _join_at_once(self, name: str, access: Access, at: dict[str, int], row: Value) -> None:
        """Each lane in one step: others, and other workers, may join values with the same element meanwhile."""
        axes = tuple(at)
        offsets = self._offsets(access, self.lane_stride(access.axes), at, self.depth)
        operands, attributes = self.address(access, at)
        base, disp = self.address_of(operands, {**attributes, "disp": 0}), attributes["disp"]
        mask = self.lane_mask(axes)
        if not any(self.bound[a].lane for a in axes):
            mask = self.emit(0, "mask_first", [self.value(1)], MASK)
        tail = [] if mask is None else [mask]
        self.effect("join", [row, self.value(base), offsets, *tail], kind=name, dtype=access.dtype, scale=1, disp=disp,
                    masked=bool(tail))

    def _join_lane_by_lane(self, name: str, access: Access, dtype: DType, at: dict[str, int], row: Value,
                           joined: Value) -> None:
        """Lane after lane, as lanes may hold values of one element. joined: of which `row` is the row."""
        on_scalars = dtype.is_integer
        where_of_lane = self._join_places(access, at)
        element_of_lane = self._join_elements(joined, row, row_dtype(dtype), on_scalars, "values")

        def one(lane: Scalar) -> None:
            where, how = where_of_lane(lane)
            type = S64 if on_scalars else row.type
            before = self.emit(self.depth, "s_load" if on_scalars else "load_splat", where, type, dtype=dtype, **how)
            after = self.emit(self.depth, f"s_{name}" if on_scalars else name, [before, element_of_lane(lane)], type)
            self.effect("s_store" if on_scalars else "store_lane0", [after, *where], dtype=dtype, **how)

        mask = self.lane_mask(tuple(at))
        if mask is None:
            for lane in range(self.lanes):
                one(lane)
        else:
            assert mask.op is not None and mask.op.name == "mask_first"
            count = self.scalar("s_min", mask.op.operands[0], self.lanes)
            self.counted("lane", 0, count, 1, one)

    def _join_places(self, access: Access, at: dict[str, int]) -> Callable[[Scalar], MemoryOperands]:
        """Where the element of each lane lies, as operands and attributes of an op on memory."""
        operands, attributes = self.address(access, at)
        base, disp = self.address_of(operands, {**attributes, "disp": 0}), attributes["disp"]
        stride = self.lane_stride(access.axes)
        if stride == 0 and len(access.gathers) == 1:
            (index, step), = access.gathers
            index_of_lane = self._join_elements(index, self.row(index, at), i32, True, "places")

            def by_index(lane: Scalar) -> MemoryOperands:
                number = index_of_lane(lane)
                if step in _SCALES:
                    return self.memory_operands(base, number, step, disp)
                return self.memory_operands(base, self.mul(number, step), 1, disp)

            return by_index
        offset_of_lane = self._join_elements(None, self._offsets(access, stride, at, self.depth), i32, True, "places")
        return lambda lane: self.memory_operands(base, offset_of_lane(lane), 1, disp)

    def _join_elements(self, value: Value | None, row: Value, dtype: DType, on_scalars: bool,
                       name: str) -> Callable[[Scalar], Value]:
        """The element of each lane of a row, on its own: from where it was loaded, if nothing is stored there (`value`
        says), else from lane memory, as `dtype`."""
        made = row.op
        if made is not None and made.name in ("splat_const", "splat", "load_splat"):
            if on_scalars and made.name == "splat_const":
                constant = self.value(int(made.attributes["value"]))
                return lambda _: constant
            first = self.emit(self.depth, "lane0", [row], S64) if on_scalars else row
            return lambda _: first
        loaded = self._steady_load(value, row, None if on_scalars else dtype)
        if loaded is not None:
            dtype, ahead = loaded.attributes["dtype"], loaded.attributes["disp"]
            base = self.address_of(loaded.operands, {**loaded.attributes, "disp": 0})
        else:
            if row.type != RowType(dtype):
                row = self.emit(self.depth, "cvt", [row], RowType(dtype))
            base, ahead = self._in_lane_memory(name, dtype, row), 0
        step = element_bytes(dtype)

        def element(lane: Scalar) -> Value:
            operands, attributes = self.memory_operands(base, lane, step, ahead)
            if on_scalars:
                return self.emit(self.depth, "s_load", operands, S64, dtype=dtype, **attributes)
            return self.emit(self.depth, "load_splat", operands, RowType(dtype), dtype=dtype, **attributes)

        return element

    def _steady_load(self, value: Value | None, row: Value, dtype: DType | None) -> Op | None:
        """The load of consecutive elements, of integers or else of `dtype`, that a row is, if nothing is ever stored to
        their tensor."""
        if value is not None and dtype is None:
            value, row = _widened(value, "cast"), _widened(row, "cvt")
        if value is None or value.op is None or value.op.name != "load" or row.op is None or row.op.name != "load":
            return None
        if place_of(value.op.operands[0]) in map(place_of, self.stored):
            return None
        found = row.op.attributes["dtype"]
        return row.op if (found.is_integer and found.compute if dtype is None else found is dtype) else None

    def _in_lane_memory(self, name: str, dtype: DType, row: Value) -> Scalar:
        """Where a row lies once it is stored."""
        place = self.lane_memory.get((name, dtype))
        if place is None:
            place = self.lane_memory[name, dtype] = self.scratch([(self.lanes, 1)], dtype)
        operands, attributes = self.memory_operands(place, 0, 1, 0)
        self.effect("store", [row, *operands], dtype=dtype, masked=False, streaming=False, **attributes)
        return place


def _widened(value: Value, name: str) -> Value:
    """Of integers that ops of this name only widen, those that are widened."""
    while value.op is not None and value.op.name == name:
        before, after = (v.type.dtype for v in (value.op.operands[0], value))   # type: ignore[union-attr]
        if not ((before.is_integer and after.kind == "i" and before.bits < after.bits) or before is after):
            break
        value = value.op.operands[0]
    return value
