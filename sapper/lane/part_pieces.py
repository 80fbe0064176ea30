"""Pieces of f32 operands for matrix instructions of bf16, which lie in near memory as they are in memory: each lane
splits the elements of its fragments into parts of bf16 (exact_parts.py), in registers.

Copies are asynchronous, as those of other pieces, and bring 4 bytes of an element, where parts in near memory
(split_pieces.py) would be 6 that come through registers. Each warp splits what it reads, and so each element is split
once for each warp that has its row, or column.

Which 16 of the depth a fragment's depth is, and in which order, is free as long as both operands agree. Where both are
such pieces, member m of a group of four lanes has those from 4 m to 4 m + 3, 16 bytes where rows lie along the depth
(run = 4). Where load_matrix brings the other one, it has 2 m, 2 m + 1, 2 m + 8 and 2 m + 9 (run = 2).

Chunks of 16 bytes are swizzled within 128 bytes so that neither copies nor these reads meet in a bank. Of rows along
the depth a phase of 16 bytes has two rows' four chunks, which the row's last bit parts; one of 8 bytes four rows' two,
which its last two bits part. Of rows along the outer axis, of 4 bytes, it has two chunks of four rows, one for each
member, which these part.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from ..ir.nodes import Op, Value
from ..ir.types import MASK, ROW_B32, ROW_F32, ROW_I32, DType, bf16, f32
from . import fragments
from .exact_parts import PARTS, cut, joined, one_for_infinity, widened
from .matrix import MatrixLowering
from .pieces import CHUNK_BYTES, Piece
from .state import Scalar

EIGHT = 8
"""Rows of the left operand, or columns of the right one, that a register has."""
HALVES = 2
"""Of a fragment's depth, each in another register, of two elements in each lane."""


class PartPiece(Piece):
    """dtype: of parts. run: see the head of the file. rounds: whether the other operand has parts, too."""

    def __init__(self, low: MatrixLowering, op: Op, outer: str, depth_axis: str, extent: int, depth: int, at: int,
                 dtype: DType, run: int, rounds: bool) -> None:
        super().__init__(low, op, outer, depth_axis, extent, depth, at)
        self.dtype, self.run, self.rounds = dtype, run, rounds
        self.planes = PARTS[f32]

    # Where chunks lie.

    def swizzled(self, row: Value, chunk: Value) -> Value:
        low = self.low
        turned = low.emit(0, "xor", [chunk, self._turn(row)], ROW_I32)
        start = low.bits(0, "shl", row, self.row_bytes.bit_length() - 1)
        return low.emit(0, "add", [start, low.bits(0, "shl", turned, CHUNK_BYTES.bit_length() - 1)], ROW_I32)

    def _turn(self, row: Value) -> Value:
        """What is added to the numbers of a row's chunks, bit by bit."""
        low = self.low
        if self.along_depth:
            bits, shift = (1, 2) if self.run == 4 else (3, 1)
            return low.bits(0, "shl", low.bits(0, "and", row, bits), shift)
        member = low.bits(0, "shr", row, self.run.bit_length() - 1)
        return low.bits(0, "shl", low.bits(0, "and", member, 3), 1)

    def spread(self) -> tuple[Value, Value]:
        row, elements = super().spread()
        # Rows of another pass may have another turn.
        self.targets = [self.target]
        for number in range(1, self.passes):
            passed = 0 if self.along_depth else number * self.rows_of_pass >> self.run.bit_length() - 1 & 3
            self.targets.append(self.low.bits(0, "xor", self.target, 2 * passed * CHUNK_BYTES)
                                if passed else self.target)
        return row, elements

    def prepare(self, start: Scalar, rest: Scalar) -> None:
        super().prepare(start, rest)
        if not self.along_depth:
            together = gcd(self.low.open[self.depth_axis].divisor, self.depth)
            self.ends_alike = together if together % self.rows_of_pass == 0 else 1

    def start_of(self, start: Scalar, passed: int) -> Scalar:
        """From the pass before: so much else is in registers that there is room for one distance."""
        step = self.low.mul(self.stride, self.rows_of_pass)
        return self.low.add(self.start_of(start, passed - self.rows_of_pass), step) if passed else start

    def target_of(self, number: int) -> Value:
        return self.targets[number]

    # To registers.

    def place(self, warp_start: Scalar, left: bool) -> None:
        low = self.low
        self.left = left
        lane, start = low.iota(), low.row_of(warp_start)
        group, member = low.bits(0, "shr", lane, 2), low.bits(0, "and", lane, 3)
        if self.along_depth:
            row = low.emit(0, "add", [group, start], ROW_I32)
            first = low.bits(0, "shl", member, self.run.bit_length() + 1)
        else:
            row = low.bits(0, "shl", member, self.run.bit_length() - 1)
            first = low.bits(0, "shl", low.emit(0, "add", [group, start], ROW_I32), 2)
        chunk, within = low.bits(0, "shr", first, 4), low.bits(0, "and", first, CHUNK_BYTES - 1)
        self.source = low.emit(0, "add", [self.swizzled(row, chunk), within], ROW_I32)

    def registers(self, stage: Value, outers: Sequence[int], depth: int) -> list[list[list[Value]]]:
        blocks = [self._block(stage, outer, depth) for outer in outers]
        return [list(plane) for plane in zip(*blocks, strict=True)]

    def _block(self, stage: Value, outer: int, depth: int) -> list[list[Value]]:
        """Of each plane the four registers of 16 x 16 elements."""
        made: list[list[Value]] = [[] for _ in range(self.planes)]
        halves = [self._elements(stage, outer + eight, depth) for eight in (0, EIGHT)]
        places = [(eight, half) for half in range(HALVES) for eight in range(2)] if self.left else \
            [(eight, half) for eight in range(2) for half in range(HALVES)]
        for eight, half in places:
            for plane, slots in enumerate(self._parts(*halves[eight][2 * half:2 * half + 2])):
                made[plane].append(slots)
        return made

    def _elements(self, stage: Value, outer: int, depth: int) -> list[Value]:
        """Of each lane's row, or column, from an outer coordinate of this warp on: those of a fragment's depth."""
        found: list[Value] = []
        for number in range(0, 4, self.run if self.along_depth else 1):
            half, slot = divmod(number, 2)
            far = depth + (2 * half if self.run == 4 else 8 * half) + slot
            across, down = (far, outer) if self.along_depth else (outer, far)
            # Moving along a row turns bits of the place in 128 bytes that are 0 in every lane before the swizzle.
            line, flip = divmod(across * self.size, fragments.ROW_BYTES)
            found += self._read(stage, flip, self.at + down * self.row_bytes + line * fragments.ROW_BYTES)
        return found

    def _read(self, stage: Value, flip: int, disp: int) -> list[Value]:
        low = self.low
        made = Op("load_run", [stage, self.source], [ROW_F32] * (self.run if self.along_depth else 1), {
            "dtype": f32, "gathered": True, "scale": 1, "flip": flip, "disp": disp, "near": True}, None, low.location)
        low.finish(made)
        return list(made.results)

    # To parts.

    def _parts(self, even: Value, odd: Value) -> list[Value]:
        """Slots of two rows' parts, the largest first."""
        return self._rounded(even, odd) if self.rounds else self._cut(even, odd)

    def _cut(self, *rows: Value) -> list[Value]:
        """Each part is cut off; of an infinity nothing is left, and NaN is what its rest is."""
        low, level = self.low, self.low.depth
        firsts = [cut(low, level, row) for row in rows]
        rests = [low.emit(level, "select", [self._infinite(row), low.constant(0.0, f32), self._left(row, first)],
                          ROW_F32) for row, first in zip(rows, firsts, strict=True)]
        seconds = [cut(low, level, rest) for rest in rests]
        lasts = map(self._left, rests, seconds)
        return [joined(low, level, *part) for part in (firsts, seconds, lasts)]

    def _rounded(self, *rows: Value) -> list[Value]:
        """The second part is rounded, so that what is left out of products is as often above as below. An infinity is
        one of its sign, and in the last part itself: that meets the other operand's first part alone, which is 0 of
        nothing else."""
        low, level = self.low, self.low.depth
        infinite = [self._infinite(row) for row in rows]
        finite = [low.emit(level, "select", [mask, one_for_infinity(low, level, row), row], ROW_F32)
                  for mask, row in zip(infinite, rows, strict=True)]
        firsts = [cut(low, level, row) for row in finite]
        rests = [self._left(row, first) for row, first in zip(finite, firsts, strict=True)]
        second = low.emit(level, "pack2", rests, ROW_B32, dtype=bf16)
        lasts = [low.emit(level, "select", [mask, row, self._left(rest, middle)], ROW_F32) for mask, row, rest, middle
                 in zip(infinite, rows, rests, widened(low, level, second), strict=True)]
        return [joined(low, level, *firsts), second, joined(low, level, *lasts)]

    def _infinite(self, row: Value) -> Value:
        low, level = self.low, self.low.depth
        size = low.emit(level, "abs", [row], ROW_F32)
        return low.emit(level, "cmp", [size, low.constant(float("inf"), f32)], MASK, cond="eq")

    def _left(self, row: Value, part: Value) -> Value:
        return self.low.emit(self.low.depth, "sub", [row, part], ROW_F32)
