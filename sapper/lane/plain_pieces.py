"""Pieces of operands that no 16-byte copy can bring: through registers, element by element.

Enters a load whose rows start anywhere, with any strides, or whose f32 elements the source rounds to 16 bits; leaves
the same piece in near memory as Piece does, so that what multiplies it need not know. These loads are not
asynchronous: a round waits for those of the piece that it brings. A lane takes a run of neighbours along the depth
together (runs.py) where their place allows it, and stores each of its chunks at once; else, as addresses take the
registers that a chunk would, a slot at a time. Lanes that differ by eight have their chunks in the same banks. Where
rows lie along the outer axis they take different slots of them at a time: lane l the slot (l div 8 mod 4) xor j as its
j-th. Along the depth that would want more registers than there are.
"""

from __future__ import annotations

from ..ir.nodes import Op, Value
from ..ir.types import MASK, ROW_B32, ROW_F32, ROW_I32, DType, b32, i32
from .matrix import MatrixLowering
from .pieces import Piece
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
        source = self.access.dtype
        along = self.along_depth and self.access.axes[depth_axis] == source.size_bytes \
            and low._outer_axis(op, depth_axis, (source.name,), low.around) is not None
        self.run = low.facts.run_bytes // source.size_bytes if along else 1
        self.group = self.chunk_elements if along else SLOT_ELEMENTS
        self.turns = not self.along_depth

    def prepare(self, start: Scalar, rest: Scalar) -> None:
        low = self.low
        level = low.depth
        row, elements = self.spread()
        if self.turns:
            slots = self.chunk_elements // SLOT_ELEMENTS
            turn = low.bits(0, "and", low.bits(0, "shr", low.iota(), 3), slots - 1)
            elements = low.emit(0, "add", [elements, low.bits(0, "shl", turn, 1)], ROW_I32)
            self.target = low.emit(0, "add", [self.target, low.bits(0, "shl", turn, 2)], ROW_I32)
        across, down = self.access.axes[self.outer], self.access.axes[self.depth_axis]
        depth = low.open[self.depth_axis]
        base = low.add(low.add(self.access.base, self.access.disp), low.mul(start, across))
        for axis in low.around:
            base = low.add(base, low.mul(low.open[axis].offset, self.access.axes[axis]))
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
        self.outer_offset = rows.__getitem__ if self.along_depth else lambda element: far(
            inside(self.turned(elements, element & -SLOT_ELEMENTS), element % SLOT_ELEMENTS, low.depth), across,
            low.depth)

    def turned(self, row: Value, bits: int) -> Value:
        """What is of a lane's first slot as it is of another."""
        return self.low.bits(self.low.depth, "xor", row, bits) if bits else row

    def copy(self, stage: Value, start: Scalar, rest: Scalar) -> None:
        for number in range(self.passes):
            for first in range(0, self.chunk_elements, self.group):
                self.store(stage, number, first, self.elements(start, rest, number, first))

    def store(self, stage: Value, number: int, first: int, elements: list[Value], plane: int = 0) -> None:
        """A group of elements of each lane's chunk of a pass, from one on, rounded, to a plane."""
        low = self.low
        slots = [low.emit(low.depth, "pack2", elements[at:at + SLOT_ELEMENTS], ROW_B32, dtype=self.dtype)
                 for at in range(0, len(elements), SLOT_ELEMENTS)]
        disp = self.at + plane * self.plane_bytes + number * self.rows_of_pass * self.row_bytes
        target, within = self.target, first * self.size
        if self.turns:
            target = self.turned(target, within)
        else:
            disp += within
        if len(slots) > 1:
            low.effect("store_run", [stage, target, *slots], dtype=b32, gathered=True, scale=1, near=True,
                       disjoint=True, streaming=False, disp=disp)
        else:
            low.effect("scatter", [*slots, stage, target], dtype=b32, scale=1, masked=False, near=True,
                       disjoint=True, disp=disp)

    def elements(self, start: Scalar, rest: Scalar, number: int, first: int) -> list[Value]:
        """A group of elements of each lane's chunk of a pass, from one on."""
        found: list[Value] = []
        for at in range(first, first + self.group, self.run):
            found += [self._element(start, rest, number, at)] if self.run == 1 else self._neighbours(
                start, rest, number, at)
        return found

    def _neighbours(self, start: Scalar, rest: Scalar, number: int, first: int) -> list[Value]:
        """A run from an element on: all of it lies before the end of the depth, or nothing."""
        low = self.low
        base, offsets, mask, disp = self._place(start, rest, number, first)
        made = Op("load_run", [base, offsets, mask], [ROW_F32] * self.run, {
            "dtype": self.access.dtype, "gathered": True, "masked": True, "scale": 1, "disp": disp}, None, low.location)
        low.finish(made)
        return list(made.results)

    def _element(self, start: Scalar, rest: Scalar, number: int, element: int) -> Value:
        """One element of each lane's chunk of a pass; 0 past the end of the depth."""
        base, offsets, mask, disp = self._place(start, rest, number, element)
        return self.low.emit(self.low.depth, "gather", [base, offsets, mask], ROW_F32, dtype=self.access.dtype, scale=1,
                             disp=disp, masked=True)

    def _place(self, start: Scalar, rest: Scalar, number: int, element: int) -> tuple[Value, Value, Value, int]:
        """Base and offsets of an element of each lane's chunk, which lanes' are inside, and disp."""
        low = self.low
        passed = element if self.along_depth else number * self.rows_of_pass
        memo = low.levels[-1].memo
        mine = number if self.along_depth else element
        key = ("plain", self.depth_offsets, mine)
        if key not in memo:
            memo[key] = low.emit(low.depth, "add", [self.outer_offset(mine), self.depth_offsets], ROW_I32)
        if not self.whole_pieces:
            limit = ("inside", self.depth_lane, rest, passed)
            if limit not in memo:
                left = low.row_of(low.sub(rest, passed))
                memo[limit] = low.emit(low.depth, "cmp", [self.depth_lane, left], MASK, cond="lt")
            mask: Value = memo[limit]
        else:       # all of it, or nothing: stages ahead of the end are not read
            known = ("any", rest)
            if known not in memo:
                memo[known] = low.emit(low.depth, "cmp", [low.constant(0, i32), low.row_of(rest)], MASK, cond="lt")
            mask = memo[known]
        disp = 0
        if isinstance(self.stride, int):
            disp = passed * self.stride
        else:
            start = low.add(start, low.mul(self.stride, passed))
        return low.value(start), memo[key], mask, disp
