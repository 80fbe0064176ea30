"""Stores that join values with what is there: sums at places that may be met again.

Enters: the row of such a store at one piece of its axes. Leaves: what is there loaded, joined with the row, and stored;
lane after lane where two of them may hold values of one element. Holds: pieces follow each other in the order of the
walk, and so do loads and stores of lane IR, so that each piece sees what those before it have left.
"""

from __future__ import annotations

from functools import cached_property

from ..ir.nodes import Op, Value
from ..ir.types import MASK, S64, DType, RowType, i32
from .axis_loops import AxisLoops
from .state import Access, Scalar, element_bytes, row_dtype


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
                self._join_lane_by_lane(name, access, dtype, at, row)
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

    def _join_lane_by_lane(self, name: str, access: Access, dtype: DType, at: dict[str, int], row: Value) -> None:
        """Lane after lane, as lanes may hold values of one element."""
        offsets = self._offsets(access, self.lane_stride(access.axes), at, self.depth)
        operands, attributes = self.address(access, at)
        base, disp = self.address_of(operands, {**attributes, "disp": 0}), attributes["disp"]
        places = self._in_lane_memory("places", i32, offsets)
        each = row.op is None or row.op.name not in ("splat_const", "splat", "load_splat")
        values = self._in_lane_memory("values", row_dtype(dtype), row) if each else 0
        on_scalars = dtype.is_integer
        step = element_bytes(row_dtype(dtype))

        def one(lane: Scalar) -> None:
            place = self._element(places, lane, i32, 4, True)
            where, how = self.memory_operands(base, place, 1, disp)
            type = S64 if on_scalars else row.type
            before = self.emit(self.depth, "s_load" if on_scalars else "load_splat", where, type, dtype=dtype, **how)
            if each:
                value = self._element(values, lane, row_dtype(dtype), step, on_scalars)
            else:
                value = self.emit(self.depth, "lane0", [row], S64) if on_scalars else row
            after = self.emit(self.depth, f"s_{name}" if on_scalars else name, [before, value], type)
            self.effect("s_store" if on_scalars else "store_lane0", [after, *where], dtype=dtype, **how)

        mask = self.lane_mask(tuple(at))
        if mask is None:
            for lane in range(self.lanes):
                one(lane)
        else:
            assert mask.op is not None and mask.op.name == "mask_first"
            count = self.scalar("s_min", mask.op.operands[0], self.lanes)
            self.counted("lane", 0, count, 1, one)

    def _element(self, row: Scalar, lane: Scalar, dtype: DType, step: int, on_scalars: bool) -> Value:
        """Of a row in lane memory that of a lane."""
        operands, attributes = self.memory_operands(row, lane, step, 0)
        if on_scalars:
            return self.emit(self.depth, "s_load", operands, S64, dtype=dtype, **attributes)
        return self.emit(self.depth, "load_splat", operands, RowType(dtype), dtype=dtype, **attributes)

    def _in_lane_memory(self, name: str, dtype: DType, row: Value) -> Scalar:
        """Where a row lies once it is stored."""
        place = self.lane_memory.get((name, dtype))
        if place is None:
            place = self.lane_memory[name, dtype] = self.scratch([(self.lanes, 1)], dtype)
        operands, attributes = self.memory_operands(place, 0, 1, 0)
        self.effect("store", [row, *operands], dtype=dtype, masked=False, streaming=False, **attributes)
        return place
