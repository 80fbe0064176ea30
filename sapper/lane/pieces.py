"""Pieces of operands in near memory, for matrix instructions (matrix.py), and the order in which the depth brings them.

A piece lies there as rows of 16-byte chunks, along whichever axis is contiguous in the tensor. Chunk c of row r
stands at c ^ (r mod 8): the eight rows that load_matrix reads at once then lie in different banks, and so do the chunks
that a copy writes. Rows past the edge repeat the last one, since their sums are never stored; the depth past the edge
is zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..ir.nodes import Op, Value
from ..ir.types import MASK, ROW_B32, ROW_I32, S64, i32
from .state import Scalar

if TYPE_CHECKING:
    from .matrix import MatrixLowering, MatrixWalk

CHUNK_BYTES, ELEMENT_BYTES, SWIZZLED_ROWS = 16, 2, 8
CHUNK_ELEMENTS = CHUNK_BYTES // ELEMENT_BYTES


class Piece:
    """One operand's piece in near memory: `extent` coordinates of its outer axis times `depth`.

    at: its first byte in a stage. along_depth: whether the tensor, and so each row here, is contiguous along the depth.
    ends_alike: so much of the depth is inside together, or past its end.
    origin: the load that it is of, or most of it.
    """

    def __init__(self, low: MatrixLowering, op: Op, outer: str, depth_axis: str, extent: int, depth: int,
                 at: int) -> None:
        self.low, self.op, self.outer, self.depth_axis = low, op, outer, depth_axis
        self.extent, self.depth, self.at = extent, depth, at
        self.access = low.access(op)
        self.dtype = self.access.dtype
        self.size = self.dtype.size_bytes
        self.along_depth = self.access.axes[depth_axis] == self.size
        self.origin = op
        self.arrange()

    def arrange(self) -> None:
        """How rows of chunks lie."""
        self.rows, length = (self.extent, self.depth) if self.along_depth else (self.depth, self.extent)
        self.row_bytes = length * self.size
        self.chunk_elements = CHUNK_BYTES // self.size
        self.chunks = length // self.chunk_elements
        self.bytes = self.extent * self.depth * self.size

    # To near memory.

    def prepare(self, start: Scalar, rest: Scalar) -> None:
        """Where each lane copies from and to, for the tile whose outer coordinates are start .. start + rest - 1."""
        low = self.low
        level = low.depth
        row, elements = self.spread()
        self.stride = self.access.axes[self.outer if self.along_depth else self.depth_axis]
        step = low.row_of(self.stride)
        base = low.add(low.add(self.access.base, self.access.disp), low.mul(start, self.access.axes[self.outer]))
        for axis in low.around:
            base = low.add(base, low.mul(low.open[axis].offset, self.access.axes[axis]))
        depth = low.open[self.depth_axis]
        self.base = low.add(base, low.mul(depth.offset, self.access.axes[self.depth_axis]))
        self.step = low.mul(self.access.axes[self.depth_axis], self.depth)

        def offsets(of_row: Value, of_elements: Value) -> Value:
            far = low.emit(level, "mul", [of_row, step], ROW_I32)
            near = low.bits(level, "shl", of_elements, self.size.bit_length() - 1)
            return low.emit(level, "add", [far, near], ROW_I32)

        if self.along_depth:
            last = low.row_of(low.sub(rest, 1))
            rows = [low.emit(0, "add", [row, low.constant(number * self.rows_of_pass, i32)], ROW_I32)
                    for number in range(self.passes)]
            self.offsets = [offsets(low.emit(level, "min", [mine, last], ROW_I32), elements) for mine in rows]
        else:
            last = low.row_of(low.sub(rest, self.chunk_elements))
            self.offsets = [offsets(row, low.emit(level, "min", [elements, last], ROW_I32))]
        # Where the depth ends with a whole pass, its first row (chunk) says for all whether it is inside.
        granule = self.depth if self.along_depth else self.rows_of_pass
        self.whole_pieces = depth.divisor % self.depth == 0
        self.ends_alike = self.depth if self.whole_pieces else 1
        self.first = low.constant(0, i32) if depth.divisor % granule == 0 else elements if self.along_depth else row

    def spread(self) -> tuple[Value, Value]:
        """The row of each lane's chunk in the first pass, and the chunk's first element."""
        low = self.low
        threads = low.warps * low.lanes
        self.passes = self.rows * self.chunks // threads
        self.rows_of_pass = threads // self.chunks
        thread = low.thread()
        row = low.bits(0, "shr", thread, self.chunks.bit_length() - 1)
        chunk = low.bits(0, "and", thread, self.chunks - 1)
        self.target = self.swizzled(row, chunk)
        return row, low.bits(0, "shl", chunk, self.chunk_elements.bit_length() - 1)

    def start_of(self, start: Scalar, passed: int) -> Scalar:
        """Where a pass begins that so many rows come before, all of whose offsets are those of the first pass."""
        return self.low.add(start, self.low.mul(self.stride, passed))

    def target_of(self, number: int) -> Value:
        """Where each lane's chunk of a pass goes, but for rows of the passes before."""
        del number
        return self.target

    def copy(self, stage: Value, start: Scalar, rest: Scalar) -> None:
        """The piece that lies from address `start` on, to a stage. rest: how much of the depth is left there."""
        low = self.low
        for number in range(self.passes):
            offsets, passed = self.offsets[0], number * self.rows_of_pass
            if self.along_depth:
                offsets, passed = self.offsets[number], 0
            left = low.sub(rest, passed - passed % self.ends_alike)
            mask = low.emit(low.depth, "cmp", [self.first, low.row_of(left)], MASK, cond="lt")
            here = low.value(self.start_of(start, passed))
            with low.located(self.op):
                low.effect("async_copy", [stage, self.target_of(number), here, offsets, mask], masked=True,
                           source_disp=0, disp=self.at + number * self.rows_of_pass * self.row_bytes)

    def finish(self, stage: Value, part: int = 0, parts: int = 1) -> None:
        """One of so many parts of what is left of the last copy, to the same stage, among the products of the piece at
        hand."""

    # To registers.

    def place(self, warp_start: Scalar, left: bool) -> None:
        """Where each lane's row of the matrices lies that load_matrix takes: 16 outer coordinates x 16 of depth, whose
        four quarters are in the order in which the instruction wants its registers.

        warp_start: first outer coordinate of this warp, a multiple of 16 at least.
        """
        low = self.low
        lane = low.iota()
        inside = low.bits(0, "and", lane, 7)
        one = low.bits(0, "and", low.bits(0, "shr", lane, 3), 1)
        two = low.bits(0, "shr", lane, 4)
        outer_half, depth_half = (one, two) if left else (two, one)     # registers of a: outer first; of b: depth first
        start = low.row_of(warp_start)

        def eights(half: Value, rest: Value) -> Value:
            return low.emit(0, "add", [low.bits(0, "shl", half, 3), rest], ROW_I32)

        if self.along_depth:
            row = low.emit(0, "add", [eights(outer_half, inside), start], ROW_I32)
            chunk = depth_half
        else:
            row = eights(depth_half, inside)
            chunk = low.emit(0, "add", [outer_half, low.bits(0, "shr", start, 3)], ROW_I32)
        self.source = self.swizzled(row, chunk)

    def swizzled(self, row: Value, chunk: Value) -> Value:
        """Bytes from the start of the piece to a chunk of a row."""
        return self.low.swizzled(row, chunk, self.row_bytes)

    planes = 1
    """Parts that elements are a sum of, each `plane_bytes` behind the one before."""
    plane_bytes = 0

    def registers(self, stage: Value, outers: Sequence[int], depth: int) -> list[list[list[Value]]]:
        """Of each plane, from each of these outer coordinates on, the four registers of 16 x 16 elements."""
        return [[self.fragments(stage, outer, depth, plane) for outer in outers] for plane in range(self.planes)]

    def fragments(self, stage: Value, outer: int, depth: int, plane: int = 0) -> list[Value]:
        """The four registers of 16 x 16 elements, from an outer coordinate of this warp and a depth of the stage."""
        across, down = (depth, outer) if self.along_depth else (outer, depth)
        return self.fragments_at(stage, plane * self.plane_bytes + down * self.row_bytes, across)

    def fragments_at(self, stage: Value, disp: int, across: int) -> list[Value]:
        """The same of the row so many bytes from the start of the piece, from an element of it on."""
        low = self.low
        # Moving along a row turns bits of the chunk's number that are 0 in every lane before the swizzle.
        made = Op("load_matrix", [stage, self.source], [ROW_B32] * 4,
                  {"transposed": not self.along_depth, "flip": across * self.size, "disp": self.at + disp}, None,
                  low.location)
        low.finish(made)
        return list(made.results)


class PlainDepth:
    """Pieces of a tile's operands, one after the other along the depth: where each begins, and how much is left there.
    start, stop, step: of the loop over them; what it carries is the address of each operand's next piece."""

    def __init__(self, low: MatrixLowering, found: MatrixWalk, pieces: Sequence[Piece], depth: int) -> None:
        self.low, self.pieces, self.depth = low, pieces, depth
        self.deep = low.open[found.depth]
        self.start, self.stop, self.step = self.deep.offset, low.add(self.deep.offset, self.deep.extent), depth

    def copy_early(self, stage: Value, number: int) -> None:
        """The pieces of that number, before the loop."""
        low = self.low
        for piece in self.pieces:
            rest = low.sub(self.deep.extent, number * self.depth)
            piece.copy(stage, low.add(piece.base, low.mul(piece.step, number)), rest)
            piece.finish(stage)

    def first(self, ahead: int) -> list[Value]:
        """What the loop carries, of its first round, which copies pieces so many ahead."""
        low = self.low
        return [low.value(low.add(piece.base, low.mul(piece.step, ahead))) for piece in self.pieces]

    def copy(self, stage: Value, place: Sequence[Value], here: Value, ahead: int) -> None:
        """The pieces so many ahead of the loop's counter."""
        rest = self.low.sub(self.low.sub(self.stop, ahead * self.depth), here)
        for piece, address in zip(self.pieces, place, strict=True):
            piece.copy(stage, address, rest)

    def following(self, place: Sequence[Value]) -> list[Value]:
        return [self.low.value(self.low.add(a, piece.step)) for piece, a in zip(self.pieces, place, strict=True)]


class WindowDepth(PlainDepth):
    """The same where axes stand round the depth, as those of a window: all of its pieces come for each place in it.

    The loop counts pieces. It carries, behind the addresses, how much of the depth lies before the pieces, and their
    place along each axis but the outermost, the innermost first.
    """

    def __init__(self, low: MatrixLowering, found: MatrixWalk, pieces: Sequence[Piece], depth: int) -> None:
        super().__init__(low, found, pieces, depth)
        self.axes = found.around[::-1]
        self.each = low.ceil_div(self.deep.extent, depth)
        total = self.each
        for axis in self.axes:
            total = low.mul(total, low.open[axis].extent)
        self.start, self.stop, self.step = 0, total, 1
        # From the last piece along some of the axes to the first one of the next place along the axis round them.
        self.back: list[list[Scalar]] = []
        for piece in pieces:
            before: Scalar = low.mul(low.sub(self.each, 1), piece.step)
            self.back.append([])
            for axis in self.axes:
                self.back[-1].append(low.sub(piece.access.axes[axis], before))
                before = low.add(before, low.mul(low.sub(low.open[axis].extent, 1), piece.access.axes[axis]))
        self.early: list[Value] = []

    def copy_early(self, stage: Value, number: int) -> None:
        self.early = self.following(self.early) if number else [
            self.low.value(v) for v in (*(piece.base for piece in self.pieces), 0, *[0] * (len(self.axes) - 1))]
        self._copy(stage, self.early, number)

    def first(self, ahead: int) -> list[Value]:
        return self.following(self.early)

    def copy(self, stage: Value, place: Sequence[Value], here: Value, ahead: int) -> None:
        self._copy(stage, place, self.low.add(here, ahead))

    def _copy(self, stage: Value, place: Sequence[Value], number: Scalar) -> None:
        """Pieces of that number, past the last of which there is nothing to copy."""
        low = self.low
        left = low.sub(self.deep.extent, place[len(self.pieces)])
        known = low.emit(low.depth, "s_cmp", [low.value(number), low.value(self.stop)], S64, cond="lt")
        rest = low.emit(low.depth, "s_select", [known, low.value(left), low.value(0)], S64)
        for piece, address in zip(self.pieces, place, strict=False):
            piece.copy(stage, address, rest)

    def following(self, place: Sequence[Value]) -> list[Value]:
        low, count = self.low, len(self.pieces)

        def chosen(condition: Value, then: Scalar, other: Scalar) -> Value:
            return low.emit(low.depth, "s_select", [condition, low.value(then), low.value(other)], S64)

        def reaches(a: Scalar, b: Scalar) -> Value:
            return low.emit(low.depth, "s_cmp", [low.value(a), low.value(b)], S64, cond="ge")

        moved = low.add(place[count], self.depth)
        over = reaches(moved, self.deep.extent)
        steps: list[Scalar] = [chosen(over, back[0], piece.step) for piece, back in zip(
            self.pieces, self.back, strict=True)]
        behind = [chosen(over, 0, moved)]
        for number, axis in enumerate(self.axes[:-1]):
            at = place[count + 1 + number]
            moved = low.add(at, 1)
            ends = low.emit(low.depth, "s_and", [over, reaches(moved, low.open[axis].extent)], S64)
            behind.append(chosen(ends, 0, chosen(over, moved, at)))
            steps = [chosen(ends, back[number + 1], step) for step, back in zip(steps, self.back, strict=True)]
            over = ends
        addresses = [low.value(low.add(a, step)) for a, step in zip(place[:count], steps, strict=True)]
        return [*addresses, *behind]
