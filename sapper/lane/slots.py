"""Operands of packed contractions that are kept in scratch memory as slots.

Enters a contraction of bf16 in a loop that holds a lane axis of its result (attention); leaves each of its operands
that can't be read as it lies (the model decides, sapper/lane/model.py) as rows of slots, two neighbours along the
contracted axis, the depth, in each. So queries, the weights of a softmax and a piece of a cache of values are rounded
and joined once, where they are computed, and read as often as needed.

What holds: in memory the depth comes first, so that a slot's neighbours are other rows and lanes. A walk that keeps
such a value takes the depth in steps of two from its beginning, and only its last step may be single. The slot that is
then half empty holds 0 above: the products of what lies there count nothing, whatever the tensor holds beyond its edge.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..ir.nodes import Op, Value
from ..ir.types import ROW_B32, ROW_F32, ROW_I32, DType, b32, bf16, f32, i32
from ..tile.plan import Walk, axes_of
from .packed import PackedRows
from .state import PAIR, Access, Capacity, Scalar


class KeptSlots(PackedRows):
    """Subclasses give scratch memory."""

    def scratch(self, extents: list[tuple[Capacity | int, int]], dtype: DType, shared: bool = False) -> Scalar:
        raise NotImplementedError("control gives scratch memory")

    def _rounded(self, capacity: Capacity, multiple: int) -> Scalar:
        raise NotImplementedError("control gives scratch memory")

    def paired_axes(self, walk: Walk) -> set[str]:
        """The axes that a walk takes in steps of two, as it keeps slots along them."""
        return {self.slot_axes[root] for root in walk.roots() if isinstance(root, Value) and root in self.slot_axes}

    def slot_tails(self, roots: Iterable[Op | Value], axis: str) -> tuple[int, ...]:
        """How many coordinates of an axis at once what is left of it is taken by, where these are finished by pieces:
        by two if one of them is kept in slots along it."""
        return (PAIR,) if any(isinstance(v, Value) and self.slot_axes.get(v) == axis for v in roots) else ()

    def allocate_slots(self, value: Value, axes: list[tuple[str, Capacity | int]]) -> Access:
        """Scratch memory for a value whose elements along slot_axes[value] are in pairs. axes: with their capacities,
        the last one contiguous."""
        depth = self.slot_axes[value]
        others = [(axis, c) for axis, c in axes if axis != depth]
        ordered = [(axis, c, PAIR) for axis, c in axes if axis == depth]
        ordered += [(axis, c, self.lanes if axis == others[-1][0] else 1) for axis, c in others]
        base = self.scratch([(c, multiple) for _, c, multiple in ordered], bf16)
        access = Access(base, 0, {}, b32, relative=True)
        step: Scalar = b32.size_bytes
        for axis, c, multiple in reversed(ordered):
            access.axes[axis] = step if axis != depth else self.scalar("s_floordiv", step, PAIR)
            capacity = c if isinstance(c, Capacity) else Capacity(c)
            step = self.mul(step, self._rounded(capacity, multiple))
        return access

    def slots_of(self, value: Value, at: dict[str, int]) -> Value:
        """The row of slots that begins with the element at these coordinates, of which that of the depth is even."""
        depth = self.slot_axes[value]
        op = value.op
        joined = self._interleaved_pair(value, at)
        if joined is not None:
            return joined
        # A value that is rounded is so here: once, and by one instruction for both rows.
        source = op.operands[0] if op is not None and op.name == "cast" and op.operands[0].type.dtype is f32 else value  # type: ignore[union-attr]
        low = self.row(source, at)
        beyond = at[depth] + 1 == self.bound[depth].count
        high = self.constant(0.0, f32) if beyond else self.row(source, {**at, depth: at[depth] + 1})
        return self.emit(self.depth, "pack_bf16", [low, high], ROW_B32)

    def _interleaved_pair(self, value: Value, at: dict[str, int]) -> Value | None:
        """The row of slots of a load that is contiguous along the lanes: two vectors of elements of either neighbour
        give two rows of slots. None where it is not so, or the other vector is not at hand."""
        op, depth = value.op, self.slot_axes[value]
        lane = next((a for a in axes_of(value) if self.bound[a].lane), None)
        if op is None or op.name != "load" or lane is None:
            return None
        access = self.access(op)
        if access.gathers or access.axes.get(lane) != bf16.size_bytes or (
                self.bound[lane].mask is not None or self.bound[lane].count % PAIR):
            return None
        first = {**at, lane: at[lane] // PAIR * PAIR}
        memo = self.levels[-1].memo
        key = ("interleaved", value, tuple(first[a] for a in axes_of(value)))
        if key not in memo:
            rows = []
            for number in range(PAIR):
                place = {**first, depth: at[depth] + number}
                if place[depth] == self.bound[depth].count:
                    rows.append(self.emit(0, "bitcast", [self.constant(0, i32)], ROW_B32))
                    continue
                operands, attributes = self.address(access, place)
                rows.append(self.emit(self.depth, "load", operands, ROW_B32, dtype=b32, masked=False, **attributes))
            memo[key] = self.emit_pair(self.depth, "interleave", rows, {})
        found: Value = memo[key][at[lane] % PAIR]
        return found

    def kept_slots(self, value: Value, at: dict[str, int]) -> Value:
        """A row of slots from scratch memory, while the depth is open in slots."""
        level = self.level_of(value)
        memo = self.levels[level].memo
        key = ("kept slots", value, tuple(at[a] for a in axes_of(value)))
        if key not in memo:
            depth, held = self.slot_axes[value], self.buffers[value]
            access = Access(held.base, held.disp, {**held.axes, depth: self.mul(held.axes[depth], PAIR)}, b32,
                            relative=True)
            memo[key] = self.fetch_row(access, b32, at, level, self.lane_mask(axes_of(value)), padded=True)
        found: Value = memo[key]
        return found

    def _compute(self, value: Value, at: dict[str, int], level: int) -> Value:
        if self.in_rest and value in self.slot_axes:
            return self._last_of_slots(value, at, level)
        return super()._compute(value, at, level)

    def _last_of_slots(self, value: Value, at: dict[str, int], level: int) -> Value:
        """The element that is left of the depth, where the other operand of its product is not kept: the lower half of
        the last slot."""
        held = self.buffers[value]
        access = Access(held.base, held.disp, held.axes, b32, relative=True)
        slots = self.fetch_row(access, b32, at, level, self.lane_mask(axes_of(value)), padded=True)
        bits = self.emit(level, "shl", [self.emit(level, "bitcast", [slots], ROW_I32)], ROW_I32, amount=bf16.bits)
        return self.emit(level, "bitcast", [bits], ROW_F32)


