"""What follows sums along the lanes, for several rows at once.

Enters: sums, maxima, ... along the lanes, of rows of an axis that registers hold. They are joined together
(`Reductions.complete`) in one row, whose lane i has what belongs to row i of the axis. Leaves: what is computed of such
values and of nothing else that spans the axis as one row, too: a division in place of one for each, and a store of
neighbours. Where a row by itself is asked for, its lane is brought to all others.
"""

from __future__ import annotations

from ..ir.nodes import Op, Value
from ..ir.types import MASK, TileType, bool_
from ..tile.plan import LATE, axes_of
from .rows import RowEvaluation
from .state import element_bytes

_NO_ARITHMETIC = frozenset({*LATE, "const", "full", "index", "load", "asm"})


class JoinedRows(RowEvaluation):
    """joining: axes whose rows, several at once, may have their sums joined. joined: values of reductions -> the axis
    whose rows are lanes of one row."""

    joining: frozenset[str]
    joined: dict[Value, str]

    def joined_axis(self, value: Value) -> str | None:
        """The axis whose rows of a value can be had as lanes of one row."""
        found = self.joined.get(value)
        op = value.op
        if found is not None or op is None or op.blocks or op.name in _NO_ARITHMETIC:
            return found
        axes = set(axes_of(value)) & set(self.joined.values())
        if len(axes) != 1 or any(self.bound[a].lane for a in axes_of(value) if a in self.bound):
            return None
        (axis,) = axes
        spanning = [v for v in op.operands if isinstance(v.type, TileType) and axis in v.type.axes]
        return axis if all(self.joined_axis(v) == axis for v in spanning) else None

    def joined_row(self, value: Value, at: dict[str, int], axis: str) -> Value:
        """The row whose lane i is the value at coordinate i of the axis; at: the other coordinates."""
        if axis not in axes_of(value):
            return self.row(value, at)
        level = self.level_of(value)
        memo = self.levels[level].memo
        key = self.joined_key(value, at, axis)
        found: Value | None = memo.get(key)
        if found is None:
            op = value.op
            assert op is not None
            rows = [self.joined_row(v, at, axis) for v in op.operands]
            with self.located(op):
                dtype = value.type.dtype  # type: ignore[union-attr]
                found = self.by_block(op.name, rows, dtype, level) or self._elementwise(op, op.name, rows, dtype, level)
            memo[key] = found
        return found

    @staticmethod
    def joined_key(value: Value, at: dict[str, int], axis: str) -> object:
        return value, axis, tuple([at[a] for a in axes_of(value) if a != axis])

    def _compute(self, value: Value, at: dict[str, int], level: int) -> Value:
        axis = self.joined_axis(value) if self.joined and value.type.dtype is not bool_ else None  # type: ignore[union-attr]
        if axis is None:
            return super()._compute(value, at, level)
        whole = self.joined_row(value, at, axis)
        return self.emit(level, "broadcast_lane", [whole], whole.type, lane=at[axis])

    def stored_joined(self, op: Op) -> str | None:
        """The axis along which a store takes a joined row as it is: neighbours in memory."""
        axis = self.joined_axis(op.operands[1]) if self.joined else None
        access = self.access(op) if axis is not None else None
        if axis is None or access is None or access.gathers or access.dtype.bits < 32 or self.bound[axis].apart != 1:
            return None
        spans_lane = any(self.bound[a].lane for a in access.axes)
        return None if spans_lane or access.axes.get(axis) != element_bytes(access.dtype) else axis

    def store_joined(self, op: Op, at: dict[str, int], row: Value, axis: str) -> None:
        access, count = self.access(op), self.bound[axis].count
        operands, attributes = self.address(access, at)
        masked = count < self.lanes
        mask = [self.emit(0, "mask_first", [self.value(count)], MASK)] if masked else []
        with self.located(op):
            self.effect("store", [row, *operands, *mask], dtype=access.dtype, masked=masked, streaming=False,
                        **attributes)
