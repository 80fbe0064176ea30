"""Pieces of operands that no 16-byte copy can bring: through registers, element by element.

Enters a load whose rows start anywhere, with any strides, or whose f32 elements the source rounds to 16 bits; leaves
the same piece in near memory as Piece does, so that what multiplies it need not know. These loads are not
asynchronous: a round waits for those of the piece that it brings.
"""

from __future__ import annotations

from ..ir.nodes import Op, Value
from ..ir.types import MASK, ROW_B32, ROW_F32, ROW_I32, DType, b32, i32
from .matrix import CHUNK_BYTES, MatrixLowering, Piece
from .state import Scalar

SLOT_ELEMENTS = 2
"""Of 16 bits in a register."""


class PlainPiece(Piece):
    """dtype: of the elements in near memory."""

    def __init__(self, low: MatrixLowering, op: Op, outer: str, depth_axis: str, extent: int, depth: int, at: int,
                 dtype: DType) -> None:
        super().__init__(low, op, outer, depth_axis, extent, depth, at)
        self.dtype = dtype
        across = self.access.axes[outer]
        self.along_depth = not (isinstance(across, int) and across == self.access.dtype.size_bytes)
        self.size = dtype.size_bytes
        self.arrange()

    def prepare(self, start: Scalar, rest: Scalar) -> None:
        low = self.low
        level = low.depth
        row, elements = self.spread()
        across, down = self.access.axes[self.outer], self.access.axes[self.depth_axis]
        depth = low.open[self.depth_axis]
        base = low.add(low.add(self.access.base, self.access.disp), low.mul(start, across))
        self.base = low.add(base, low.mul(depth.offset, down))
        self.step = low.mul(down, self.depth)
        self.stride = down
        self.whole_pieces = depth.divisor % self.depth == 0
        last = low.row_of(low.sub(rest, 1))

        def far(rows: Value, stride: Scalar, level: int = level) -> Value:
            return low.emit(level, "mul", [rows, low.row_of(stride)], ROW_I32)

        def inside(rows: Value, number: int, level: int = level) -> Value:
            moved = low.emit(level, "add", [rows, low.constant(number, i32)], ROW_I32) if number else rows
            return low.emit(level, "min", [moved, last], ROW_I32)

        # Of each lane: its place along the depth, and its offsets to outer coordinates, of each pass or element. Those
        # of elements are computed anew in each round: there are too many to hold.
        self.depth_lane = elements if self.along_depth else row
        self.depth_offsets = far(self.depth_lane, down)
        rows = [far(inside(row, number * self.rows_of_pass), across) for number in range(self.passes)] \
            if self.along_depth else []
        self.outer_offset = rows.__getitem__ if self.along_depth else lambda number: far(
            inside(elements, number, low.depth), across, low.depth)

    def copy(self, stage: Value, start: Scalar, rest: Scalar) -> None:
        low = self.low
        for number in range(self.passes):
            slots: list[Value] = []
            for first in range(0, self.chunk_elements, SLOT_ELEMENTS):
                pair = [self._element(start, rest, number, first + more) for more in range(SLOT_ELEMENTS)]
                slots.append(low.emit(low.depth, "pack2", pair, ROW_B32, dtype=self.dtype))
            for place, slot in enumerate(slots):
                low.effect("scatter", [slot, stage, self.target], dtype=b32, scale=1, masked=False, near=True,
                           disjoint=True, disp=self.at + number * self.rows_of_pass * self.row_bytes
                           + place * CHUNK_BYTES * SLOT_ELEMENTS // self.chunk_elements)

    def _element(self, start: Scalar, rest: Scalar, number: int, element: int) -> Value:
        """One element of each lane's chunk of a pass; 0 past the end of the depth."""
        low = self.low
        passed = element if self.along_depth else number * self.rows_of_pass
        memo = low.levels[-1].memo
        mine = number if self.along_depth else element
        key = ("plain", self.depth_offsets, mine)
        if key not in memo:
            memo[key] = low.emit(low.depth, "add", [self.outer_offset(mine), self.depth_offsets], ROW_I32)
        mask = []
        if not self.whole_pieces:
            limit = ("inside", self.depth_lane, rest, passed)
            if limit not in memo:
                left = low.row_of(low.sub(rest, passed))
                memo[limit] = low.emit(low.depth, "cmp", [self.depth_lane, left], MASK, cond="lt")
            mask = [memo[limit]]
        else:       # all of it, or nothing: stages ahead of the end are not read
            known = ("any", rest)
            if known not in memo:
                memo[known] = low.emit(low.depth, "cmp", [low.constant(0, i32), low.row_of(rest)], MASK, cond="lt")
            mask = [memo[known]]
        disp = 0
        if isinstance(self.stride, int):
            disp = passed * self.stride
        else:
            start = low.add(start, low.mul(self.stride, passed))
        return low.emit(low.depth, "gather", [low.value(start), memo[key], *mask], ROW_F32, dtype=self.access.dtype,
                        scale=1, disp=disp, masked=True)
