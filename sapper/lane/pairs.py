"""Pairs of elements: two loads of every second element, which together are all of a stretch of memory.

Enters loads whose lanes are two elements apart (the even and the odd ones of rotary embeddings); leaves loads of whole
rows, and exchanges of elements between two of them, in place of gathers. Stores that are pairs are found here, too, and
made with others that fill what lies between lanes (windows.py).

What holds: both of a pair are accessed by the same walk, so that no element is touched that would not be anyhow. Rows
under a mask are not taken.
"""

from __future__ import annotations

from ..ir.nodes import Op, Value
from ..ir.types import RowType
from .squares import is_as_in_memory
from .state import Access, element_bytes, row_dtype
from .windows import Windows


class Pairs(Windows):
    """block_loads: the loads of the block whose walks are being emitted."""

    block_loads: list[Op]

    def pair_stride(self, access: Access, lane: str) -> bool:
        """Whether an access takes every second element along an axis."""
        return (not access.gathers and not self.transposes_by_scatter
                and access.axes.get(lane) == 2 * element_bytes(access.dtype))

    def _lane_of_pair(self, access: Access) -> str | None:
        lane = next((a for a in access.axes if a in self.bound and self.bound[a].lane), None)
        whole = lane is not None and self.bound[lane].mask is None and self.pair_stride(access, lane)
        return lane if whole else None

    def place_in_pair(self, op: Op, others: list[Op]) -> tuple[Op, int] | None:
        """Which of `others` has the other elements, and whether op has the even (0) or the odd ones (1)."""
        access = self.access(op)
        size = element_bytes(access.dtype)
        for other in others:
            if other is op or other.operands[0] is not op.operands[0]:
                continue
            there = self.access(other)
            same = there.base is access.base and there.axes == access.axes and not there.gathers
            if same and abs(there.disp - access.disp) == size:
                return other, int(access.disp > there.disp)
        return None

    def is_paired(self, op: Op, lane: str, others: list[Op]) -> bool:
        """Whether an access would be one of a pair, were the axis across the lanes."""
        return (is_as_in_memory(op) and self.pair_stride(self.access(op), lane)
                and self.place_in_pair(op, others) is not None)

    def pair_row(self, op: Op, access: Access, at: dict[str, int], level: int) -> Value | None:
        """The row of a load that is one of a pair, or None."""
        lane = self._lane_of_pair(access) if is_as_in_memory(op) else None
        place = self.place_in_pair(op, self.block_loads) if lane is not None and not self.staged else None
        if place is None or lane is None:
            return None
        other, odd = place
        low = self.access(other) if odd else access
        memo = self.levels[level].memo
        key = ("pair", other if odd else op, tuple(sorted(at.items())))
        if key not in memo:
            operands, attributes = self.address(low, at)
            row = RowType(row_dtype(low.dtype))
            disp, row_bytes = attributes.pop("disp"), self.lanes * element_bytes(low.dtype)
            parts = [self.emit(level, "load", operands, row, dtype=low.dtype, masked=False,
                               disp=disp + part * row_bytes, **attributes) for part in (0, 1)]
            memo[key] = self.emit_pair(level, "unzip", parts, {})
        found: Value = memo[key][odd]
        return found
