"""Memory asked for before it is needed, where the processor does not see what comes next.

Enters a walk at one of its pieces, or a packed panel; leaves prefetches of what pieces after it read. How far ahead is
measured: see each constant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from math import prod
from typing import TYPE_CHECKING

from ..ir.nodes import Block, Op, Value
from ..ir.types import S64, b32
from ..tile.affine import affine
from ..tile.ops import memory_of
from ..tile.plan import Walk, axes_of
from ..tile.requests import Requests
from ..tile.sums import is_join
from .axis_loops import WalkChoice
from .staged import StagedPanel
from .state import Access, Open, Scalar, element_bytes
from .stores import Stores

if TYPE_CHECKING:
    from .extents import Range

LINE_BYTES = 64

AHEAD_BYTES = 8192
"""How far ahead of a packed panel memory is asked for: further than its latency, and past the next page."""

NEAR_AHEAD_BYTES = 4096
"""The same for weights in blocks."""

STREAM_AHEAD_BYTES = 16384
"""The same, at least, of rows beside which results are stored past the caches."""

ROWS_AHEAD_BYTES = 10240
"""The same, at least, of rows of a matrix: it stays in half of L1 until its turn comes."""

ROW_AHEAD_BYTES = 5120
"""The same of single rows of one matrix where the first cache takes streams, if their elements are widened: what is
multiplied as it lies, or comes as two streams, the processor asks for early enough by itself. Measured on a Zen 5, each
from memory that 64 MiB or more of other reads had passed through, in percent of what plain reads reach. matvec of 576 x
1536, 2048 x 2048 and 4096 x 4096, bf16: 85, 88, 91 without, 90, 93, 97 with 4 KiB, 89, 94, 97 with 5 and 88, 91, 93
with 8; f32: 98, 101, 103 without, 90, 92, 100 with 4 KiB. matmul_nt_i8 of one row 95 without, 93. matvec_swiglu_bf16 of
1536 x 576 and norm_matvec_swiglu_bf16 of 14336 x 4096: 95 and 96 without, 92 and 94 with 4 KiB."""

LONG_ROW_AHEAD_BYTES = 2048
"""The same of each of several rows at once, along themselves, where half of the first cache, which takes streams, has
no room for the next rows. Measured on a Zen 5, 4 and 16 rows of f32 by 4096 x 4096: 82 and 38 % of the floor, and
66 and 36 where the next rows are asked for."""

PLACES_AHEAD_BYTES = 1536
"""The same of rows in several places of a matrix whose elements are widened. Measured on a Zen 5, in percent of what
plain reads reach, 2048 and 1536: matvec_residual_bf16 of 4096 x 14336 90 and 91, 4096 x 11008 87 and 88, 7168 x 18432
87 and 88, matvec_bf16 of 2048 x 10944 90 and 92."""

STREAMS_AHEAD_BYTES = (10240, 8192, 6144, 4096, 2048)
"""The same of rows that are read as so many streams (Requests.row_streams): each line is asked into the second cache
again and again, as a Zen 4 drops a request that finds no free miss buffer, and some 100 lines have to be on their way
at a time: memory answers after 200 ns. Without requests the processor keeps to one distance, and for minutes at a time,
as neighbours use the memory too, reaches half of what plain reads do. Measured there, bf16, four places, each against
plain reads just before and after, the median and what nine of ten reach, in percent. Without requests in such minutes,
and by one, two, three and four from 8 KiB on, 8192 x 4096: 60 and 55, 77 and 69, 87 and 81, 93 and 87, 105 and 92.
With 10, 8, 6, 4 and 2 KiB, and without that of 10: 2048 x 2048 99 and 89, 96 and 85; 4096 x 14336 100 and 89, 101 and
97; 49152 x 576 96 and 92, 94 and 88; f32 of 4096 x 4096 102 and 96, 93 and 87, i8 by i8 93 and 85, 83 and 75."""

LONG_WHOLE_ROW_BYTES = 256
"""From how long a row on that is read whole, as those of a cache of values are, its lines are asked for after each row,
even if one number each meets it: requests for four such rows at once find too few places. Measured on a Zen 4, in
percent of what plain reads reach, without requests, by four rows at once and by each, five times: 16 heads of 128 in
bf16 and 8192 positions 96, 90 and 94, 512 positions 85, 85 and 90; in f32 94, 98 and 98. Six times from 12 KiB on 96,
92 and 98, but 0.7 % longer where arithmetic takes as long as memory (8 x 4 heads in bf16)."""

BLOCK_FURTHER_BYTES = (16384, 12288, 8192, 4096, 0)
"""How much further than the next block of rows each line is asked for where rows are streams, for the same reason, if
several rows meet each block, all at once; where pieces of these meet it one after the other, each asks once. Measured
on a Zen 4, 4096 x 4096, in percent of what plain reads reach, without requests, by one into the second cache, by two,
three, four and five: 4 rows of i8 54, 78, 78, 86, 96 and 100, of bf16 62, 67, 72, 80, 88 and 94. In ms, 8 rows of i8 by
one to five in both pieces 0.84, 0.80, 0.86, 0.96 and 1.08, and 1.00 by five in the first piece only; 16 rows of i8 by
one, two and five 1.54, 1.56 and 2.11, of bf16 2.59, 2.87 and 3.01. It was one into the first cache for i8: 4, 8 and 16
rows 1.12, 1.50 and 2.04."""

LONG_STORED_ROWS = 4
"""How many times as long as lines are asked for ahead, to be written, rows are where that may be in vain at the end of
each."""

SLOW_STEPS = 1 / 8
"""Multiply-adds for each byte of a panel below which it is read as fast as memory gives it. It is then asked for as
near as the target says (stream_ahead_bytes): the processor asks for what is further by itself as long as it sees some
of the accesses miss. Measured on a Zen 4: with 2048, 97 % of what plain reads reach for 4 rows, where 8192 makes 69 %;
for 16 rows 76 and 89 % of the multiply-adds. On a Granite Rapids, one row of bf16: with 3072, 14.7 GB/s, as plain
reads; with 2048 and 4096, 14.1 and 14.3."""

BLOCK_LINES_AHEAD, BLOCK_LINES_AGAIN, SINGLE_LINES_AGAIN, LONG_LINES = 2, (4, 3, 2, 1), (20, 16, 12, 8, 4), 8
"""How many lines further along themselves rows are asked for of which a block is read line by line, and where rows are
streams (STREAMS_AHEAD_BYTES): those that several meet, and a single row, whose blocks have fewer. And of how many lines
these rows are at least."""

SHORT_ROW_BYTES, SHORT_LINES = 2048, 4
"""Of rows of a matrix [in, out], two to a page and more, no streams by themselves: bytes at most, and at least
how many lines, where blocks of them are asked for in the order of memory (are_short_rows)."""

ROWS_AGAIN_AHEAD = 8
"""How many rows ahead those are asked for of which a few elements are met at a time, again and again. On a Cascade Lake
4 and 16 are within 2 % of it."""

FEW_ROWS = 16
"""Typical number of rows up to which a contraction is bound by memory."""

COPY_AHEAD_STEPS = 32
"""How many steps of the depth ahead of a copy memory is asked for."""


class Prefetches(Stores):
    """How often, and into which cache, what is read beside stores past the caches is best asked for differs by target
    (Facts). A Zen 4 drops a prefetch that finds no free miss buffer, as it often does there: RMSNorm of 8192 x 4096 f32
    by requests: 9.6, 8.0, 5.7 ms (a copy takes 6.9); LayerNorm 10.5 with one and 6.9 with three. Where memory is read
    line by line, once is enough, and near is better: GELU of 8192 x 4096 in f32 on a Granite Rapids took 13.9 ms with
    three requests 16 KiB ahead, 12.6 with one 4 KiB ahead, and 11.0 where its loop takes a line at a time besides
    (model.py). On a Zen 5, 8192 x 4096 f32, in percent of what a copy reaches: RMSNorm by four requests in all 85, by
    two 92, by two into L1 100; LayerNorm by three 84, into L1 99; softmax by three 94, by two into L1 103, by one 97.
    SwiGLU, which reads two streams: 84 by three requests 16 KiB ahead, 98 by one, 107 by one 4 KiB ahead.

    near_bytes: size of L1. block_bytes: of panels that are walked with the same rows. asking: the walks of the block
    at hand that ask for what they will read, if it stores past the caches (block_loads: its loads). next_block: where
    the next block of panels begins, or the last one, if the walk at hand asks for that. depth_part: the part of the
    depth that all rows meet before the next. sequential_tiles: of each axis of a loop in order the size of a tile; what
    is left of the rows that meet them takes the same one, as buffers have room for that.
    """

    near_bytes: int
    block_bytes: int
    requests: Requests
    prefetches_rows: bool
    sequential_tiles: dict[str, int]
    streaming_loops: list[tuple[Block, Range]]
    asking: list[Walk]
    next_block: Scalar | None = None
    depth_part: Open | None = None

    def goes_to_memory(self, op: Op) -> bool:
        raise NotImplementedError("the model decides")

    def typical_bytes(self, tensor: Value) -> int:
        raise NotImplementedError("the model knows the extents")

    def _prefetch_next_rows(self, walk: Walk, choice: WalkChoice) -> None:
        """Where results go past the caches, ask for what the next rows will read, or, where nothing is held for a row,
        for what lies further: memory and arithmetic then work at the same time, instead of in turns. The processor's
        own prefetching stops at the end of each page of 4 KiB."""
        if choice.lane is None or not any(asking is walk for asking in self.asking):
            return
        stores = any(isinstance(root, Op) and self.goes_to_memory(root) for root in walk.inner)
        first = 1 + (len(self.asking) > 1 and stores)
        for op in self.block_loads:
            axes = op.result.type.axes  # type: ignore[union-attr]
            access = self.access(op)
            rows = [a for a in axes if a in self.bound and self.bound[a].resident and not self.bound[a].lane]
            stride = access.axes.get(choice.lane)
            if self.pair_stride(access, choice.lane):
                pair = self.place_in_pair(op, self.block_loads)
                if pair is None or pair[1]:
                    continue
            elif access.gathers or stride != element_bytes(access.dtype):
                continue
            if any(a not in self.bound for a in axes) or not (rows or set(axes) == set(walk.outer)):
                continue
            wanted = self.requests.row_requests if rows else self.requests.stream_requests
            requests = 1 if self.requests.once else -(-wanted // len(self.asking))
            ahead = self._ahead(access.axes[rows[0]], self.bound[rows[0]].count) if rows else self._stream_ahead_bytes
            assert isinstance(stride, int)
            piece_bytes = self.bound[choice.lane].count * self.lanes * self.slot_elements * stride
            for number in range(first, first + requests):
                there = replace(access, base=self.add(access.base, self.mul(ahead, number)))
                operands, attributes = self.address(there, dict.fromkeys(axes, 0))
                disp = attributes.pop("disp")
                for line in range(0, piece_bytes, 64):
                    self.effect("prefetch", operands, level=self.requests.request_level, disp=disp + line, **attributes)

    def request_stores(self, roots: list[Op | Value]) -> None:
        """Ask for lines that a walk will store to (Requests.store_ahead_bytes), as far as they follow one another. What
        is stored goes in order, and so waits for each line that is not there.

        On a Cascade Lake, one thread, GB/s of a copy in memory and in the last cache: plain stores 8.0 and 11.4, past
        the caches 8.7, with reads asked for 9.3 and 12.8, past the caches 9.7 to 10.1; lines to be written asked for 1,
        2, 4 and 8 KiB ahead, and reads, 12.0, 12.0, 11.8, 12.1 and 22.1, 19.8, 22.4, 22.9; two threads in memory: plain
        15.9, past the caches 17.2 to 20.0, so 23.0."""
        ahead = self.requests.store_ahead_bytes
        stores = [root for root in roots if isinstance(root, Op) and not is_join(root)] if ahead else []
        for op in stores:
            access = self.access(op)
            lane = next((a for a in access.axes if a in self.bound and self.bound[a].lane), None)
            if lane is None or self.bound[lane].mask is not None or access.gathers or self.streams(op):
                continue
            stride = element_bytes(access.dtype)
            if self.pair_stride(access, lane) and (place := self.place_in_pair(op, stores)) is not None:
                stride *= 2
                if place[1]:
                    continue
            long = self.extent_hint(lane) * stride >= LONG_STORED_ROWS * ahead
            if access.axes[lane] != stride or not (long or self._rows_follow(op, lane)):
                continue
            if self.typical_bytes(op.operands[0]) <= 2 * self.near_bytes:
                continue
            axes = tuple(a for a in access.axes if a in self.bound and a != lane)
            piece_bytes = self.bound[lane].count * self.lanes * self.slot_elements * stride
            for at in self._coordinates(axes):
                operands, attributes = self.address(access, {**at, lane: 0})
                disp = attributes.pop("disp")
                for line in range(0, piece_bytes, LINE_BYTES):
                    self.effect("prefetch", operands, level=1, write=True, disp=disp + ahead + line, **attributes)

    def _rows_follow(self, op: Op, lane: str) -> bool:
        """Whether a store along the lanes goes on, behind the end of a row, with what lies there in memory."""
        tensor, _, *indices = op.operands
        if len(indices) == 1:
            return True
        rows = [axis for axis in self.bound if axis != lane and axis in self.access(op).axes]
        others = [set(form.axes) - {lane} for index in indices if (form := affine(index)) is not None]
        near = next(filter(None, reversed(others)), set())      # what the last index has in which there is another axis
        return self.stride_classes.get(memory_of(tensor).name) == "contiguous" and bool(rows) and rows[-1] in near

    @property
    def _stream_ahead_bytes(self) -> int:
        if self.requests.once:
            return self.requests.stream_ahead_bytes
        return NEAR_AHEAD_BYTES if self.requests.stream_requests == 1 else STREAM_AHEAD_BYTES

    def _ahead(self, stride: Scalar, count: int) -> Scalar:
        """How far ahead the nearest rows are asked for: whole rows, as far as a part of the second cache has room."""
        step = self.mul(self.scalar("s_max", stride, 1), count)
        least_bytes = self.requests.stream_ahead_bytes if self.requests.once else STREAM_AHEAD_BYTES
        rows = self.scalar("s_floordiv", self.add(step, least_bytes - 1), step)
        return self.scalar("s_min", self.mul(step, rows), self.block_bytes // 4)

    def _prefetch(self, op: Op, walk: Walk, choice: WalkChoice) -> None:
        """Ask for the blocks of rows after this one, line by line in the order of memory.

        A block is `count` whole rows of a contiguous matrix, hence contiguous itself, and its loop over the reduced
        axis asks for as many bytes further on as it reads here: the next block, or ROWS_AHEAD_BYTES on where that is
        short. The streams of the rows are short: the hardware finds each of them too late. Rows one by one are one
        stream. Measured on a Granite Rapids, 49152 x 576 bf16: 9.7 GB/s by 4 rows asked into L1, 14.6 asked into L2,
        and 16.4 line by line. Where rows that a vector meets are streams, blocks that several meet are asked for again
        and again, too (BLOCK_FURTHER_BYTES).
        """
        (axis,) = [a for a in op.result.type.axes if a in walk.outer]  # type: ignore[union-attr]
        (depth_axis,) = walk.reduced
        if self.requests.row_streams and choice.parted is not None:
            if self.asks_again:
                self._prefetch_along_rows(op, axis, depth_axis, STREAMS_AHEAD_BYTES, self.requests.stream_level)
            elif any(self.bound[other].count > 1 for other in choice.order if other != axis):
                if not self.are_short_rows(op, axis, depth_axis):
                    self._prefetch_along_rows(op, axis, depth_axis, (self.requests.long_row_ahead_bytes,), 1)
            elif self.requests.places_ahead_bytes:
                self._prefetch_along_rows(op, axis, depth_axis, (self.requests.places_ahead_bytes,), 1)
            return
        if self.lies_in_pieces(op, axis, depth_axis):
            self._prefetch_pieces(op, axis, depth_axis)
            return
        access = self.access(op)
        rows, depth = self.bound[axis], self.bound[depth_axis]
        size = element_bytes(access.dtype) * self.slot_elements
        step_bytes = rows.count * depth.count * self.lanes * size
        into_first = self.requests.stream_level == 1
        if into_first and rows.count == 1 and (len(choice.prefetched) > 1 or size >= b32.size_bytes):
            return      # the processor asks for it early enough
        most_bytes = ROW_AHEAD_BYTES if into_first else ROWS_AHEAD_BYTES
        by_line = self.requests.line_by_line
        least_bytes = self.requests.stream_ahead_bytes if by_line else most_bytes // len(choice.prefetched)
        page = self._step_to_next_place(op)
        distance = page if page is not None else least_bytes if rows.count == 1 and (by_line or into_first) else (
            self.scalar("s_max", self.mul(access.axes[axis], rows.count), least_bytes))
        o = self.open[depth_axis]
        block_bytes = rows.count * size * (o.extent if isinstance(o.extent, int) else o.hint)
        along_bytes = self.requests.long_row_ahead_bytes or (LONG_ROW_AHEAD_BYTES if into_first else 0)
        if along_bytes and rows.count > 1 and block_bytes * len(choice.prefetched) > self.near_bytes // 2:
            in_places = rows.apart != 1 and element_bytes(self.operand_access(op).dtype) < b32.size_bytes
            self._prefetch_along_rows(op, axis, depth_axis, (PLACES_AHEAD_BYTES if in_places else along_bytes,), 1)
            return
        block = self.add(self.add(access.base, self.mul(access.axes[axis], rows.offset)), distance)
        ahead = self.mul(self.sub(depth.offset, self.open[depth_axis].offset), rows.count * size)
        ahead_bytes = max(block_bytes, least_bytes) * len(choice.prefetched)

        def ask(level: int, *further: int) -> None:
            for line in (line for first in further for line in range(first, first + step_bytes, LINE_BYTES)):
                operands, attributes = self.memory_operands(block, ahead, 1, access.disp + line)
                self.effect("prefetch", operands, level=level, **attributes)

        if page is not None:
            ask(self.requests.stream_level, 0)
        elif self.asks_again:
            self._ask_again(ask, axis, choice)
        else:
            ask(1 if into_first or (ahead_bytes <= self.near_bytes // 2 and not by_line) else 2, 0)

    def _ask_again(self, ask: Callable[..., None], axis: str, choice: WalkChoice) -> None:
        """Ask for the next block of rows as often as is best by the pieces of what meets it (BLOCK_FURTHER_BYTES)."""
        level = self.requests.stream_level
        pieces: Scalar = 1
        for other in choice.order:
            if other != axis:
                pieces = self.mul(pieces, self.ceil_div(self.open[other].extent, choice.counts[other]))
        if isinstance(pieces, int):
            ask(level, *(BLOCK_FURTHER_BYTES if pieces == 1 else (0,)))
        else:
            several = self.emit(self.depth_of(pieces), "s_cmp", [pieces, self.value(1)], S64, cond="gt")
            self.fork(several, lambda: ask(level, 0), lambda: ask(level, *BLOCK_FURTHER_BYTES))

    @property
    def asks_again(self) -> bool:
        """Whether what arithmetic keeps up with is asked for again and again."""
        return bool(self.requests.row_streams) and self.requests.again

    def _prefetch_along_rows(self, op: Op, row_axis: str, depth_axis: str, distances: tuple[int, ...],
                             level: int) -> None:
        """Ask for what the rows at hand read so many bytes later."""
        access = self.operand_access(op)
        size = element_bytes(access.dtype)
        step_bytes = self.bound[depth_axis].count * self.lanes * size
        for row in range(self.bound[row_axis].count):
            operands, attributes = self.address(access, {row_axis: row, depth_axis: 0})
            disp = attributes.pop("disp")
            for ahead_bytes in distances:
                for place in range(disp + ahead_bytes, disp + ahead_bytes + step_bytes, LINE_BYTES):
                    self.effect("prefetch", operands, level=level, disp=place, **attributes)

    def _prefetch_pieces(self, op: Op, row_axis: str, depth_axis: str) -> None:
        """Ask for rows that are read when as much has been, as nothing else finds short ones that do not follow one
        another. Once: each time more is another page to find. Measured on a Zen 4, in us, without requests, by one and
        by the five of STREAMS_AHEAD_BYTES: keys and values [2048, 16, 64] in bf16, from memory in large pages, 1148,
        467 and 446, in small ones 1452, 1442 and 1641, in the caches 371, 304 and 370. 4096 rows of 1024 f32 of 2048
        as streams 1069, by one request 624."""
        access = self.operand_access(op)
        rows, size = self.bound[row_axis].count, element_bytes(access.dtype)
        ahead = max(rows, AHEAD_BYTES // (self.extent_hint(depth_axis) * size))
        for row in range(rows):
            operands, attributes = self.address(access, {row_axis: row + ahead, depth_axis: 0})
            disp = attributes.pop("disp")
            for place in range(disp, disp + self.bound[depth_axis].count * self.lanes * size, LINE_BYTES):
                self.effect("prefetch", operands, level=2, disp=place, **attributes)

    def lies_in_pieces(self, op: Op, rows: str, lane: str) -> bool:
        """Whether a matrix that is read along the lanes has short rows that do not follow one another in memory, as
        those of one head of a cache [position, head, dim]: no stream is as long as memory takes to answer."""
        short = self.extent_hint(lane) * self.slot_elements * element_bytes(self.access(op).dtype) <= AHEAD_BYTES
        return bool(self.requests.row_streams) and short and lane in self.open and (
            not self.is_whole_rows(self.access(op), rows, lane))

    def is_whole_rows(self, access: Access, rows: str, lane: str) -> bool:
        """Whether a matrix has its rows, contiguous along an axis, one after the other; gathered ones lie anywhere."""
        size = element_bytes(access.dtype)
        along = self.open[lane] if self.packing is None else self.packing.elements
        return access.axes.get(rows) == self.mul(along.extent, size) and access.axes.get(lane) == size

    def _prefetch_ahead(self, op: Op, walk: Walk, row: dict[str, int]) -> None:
        """Ask for rows further on of a matrix whose rows, or the same piece of each, are read one after the other: into
        the second cache, as the first has places for too few requests at a time. Measured on a Zen 4, 4 sums over rows
        of 128 f32: 24 GB/s, and 20 where it is asked into the first. row: the one that was just read: where rows are
        read whole, one is asked for, as requests for four at once find too few places, too. Else those for all rows at
        hand come together behind the last one.

        Rows that few meet whole, or one number each meets, or in blocks few, as long as arithmetic keeps up, are asked
        for again and again where rows are streams (STREAMS_AHEAD_BYTES). Measured there, in percent of what plain reads
        reach, before and now: absorb_bf16 of 16 x 128 x 512 38 and 86, in f32 38 and 88; one row by 4096 x 4096 in
        blocks, f32 75 and 91, bf16 61 and 87, i8 47 and 71; 4 rows, f32 55 and 82, bf16 by bf16 54 and 82, i8 56 and
        73; attention_decode_f32 of 8 x 4 heads and 4096 positions 77 and 93, and 90 without requests, 77 to 85 by one
        or two, 89 by four, of 3 x 3 heads and 512 66, 84 and 80 (without), of bf16 69, 73 and 60."""
        (row_axis,) = walk.reduced
        lane = next(axis for axis in axes_of(op.result) if axis != row_axis)
        page = self._step_to_next_place(op)
        size = element_bytes(self.access(op).dtype)
        row_bytes = self.bound[lane].count * self.lanes * size * self.slot_elements
        at_once = self.bound[row_axis].count
        step = max(1, LINE_BYTES // size // self.lanes)
        extent = self.open[lane].extent if lane in self.open else None
        whole = isinstance(extent, int) and extent <= self.bound[lane].count * self.lanes
        several = lane in self.open and self.open[lane].hint > self.bound[lane].count * self.lanes    # pieces
        alone = all(self.bound[axis].count == 1 for axis in walk.outer if axis != lane)
        near, in_block = alone or self.requests.line_by_line, self.depth_part is not None
        distances: tuple[int, ...] = (self.requests.stream_ahead_bytes if near else AHEAD_BYTES,)
        lines: tuple[int, ...] = (BLOCK_LINES_AHEAD,)
        few = prod(self.bound[axis].count for axis in walk.outer) < SLOW_STEPS * row_bytes
        again = self.asks_again and (
            whole or (few and (alone or (in_block and op not in self.staged))))
        if again:
            others = [self.open[axis] for axis in walk.outer if axis != lane and axis in self.open]
            single = several and all(o.hint == 1 for o in others)
            distances, lines = STREAMS_AHEAD_BYTES, SINGLE_LINES_AGAIN if single else BLOCK_LINES_AGAIN
        if self.depth_part is not None and several and self.are_short_rows(op, row_axis, lane):
            self._prefetch_block_after(op, lane, row_axis, row[row_axis], self.depth_part)
            return
        if self.depth_part is not None and several:
            self._prefetch_lines(op, lane, row_axis, row[row_axis], lines, self.depth_part)
            return
        together = in_block or not whole or (alone and not (again and row_bytes >= LONG_WHOLE_ROW_BYTES))
        if together and row[row_axis] + 1 < at_once:
            return
        beyond, steps = (lane, [line * step for line in lines]) if in_block else (
            row_axis, [max(-(-ahead_bytes // row_bytes), at_once) for ahead_bytes in distances])
        if page is not None:
            steps = [0]
        if page is None and several and self._prefetch_tile_of_pieces(op, row_axis, lane):
            return
        side_by_side = self.access(op).axes.get(row_axis) == row_bytes
        for at in self._coordinates(axes_of(op.result)):
            if not together and at[row_axis] != row[row_axis]:
                continue
            if side_by_side and at[row_axis] * row_bytes % LINE_BYTES >= row_bytes:
                continue    # a row before has asked for the line that begins it
            for access, ahead in product(self._places_of_slots(op), steps) if at[lane] % step == 0 else ():
                there = access if page is None else replace(access, base=self.add(access.base, page))
                operands, attributes = self.address(there, {**at, beyond: at[beyond] + ahead})
                self.effect("prefetch", operands, level=2, **attributes)

    def _prefetch_tile_of_pieces(self, op: Op, row_axis: str, lane: str) -> bool:
        """Ask for the next tile of whole rows in the order of memory, though of this one a few columns are read at a
        time, so many bytes as are read now; whether it is done. Measured on a Zen 3, attention of one token, of the
        time by requests for the same columns of later rows: 8 x 4 heads of 128 and 4096 positions, f32 0.86, bf16 1.0,
        from memory 0.89 and 0.88; 3 x 3 of 64 and 512, 0.97 and 0.95, from memory 0.92 and 0.96."""
        access, rows, columns = self.access(op), self.bound[row_axis], self.bound[lane]
        size, extent, tile = element_bytes(access.dtype), self.open[lane].extent, self.sequential_tiles.get(row_axis)
        share = columns.count * self.lanes * size
        whole = isinstance(extent, int) and access.axes.get(row_axis) == extent * size and access.axes.get(lane) == size
        if tile is None or not whole or access.gathers or rows.count * share % LINE_BYTES:
            return False
        start = self.open[row_axis].offset
        block = self.add(access.base, self.mul(access.axes[row_axis], self.add(start, tile)))
        inside = self.add(self.mul(self.sub(columns.offset, self.open[lane].offset), tile * size),
                          self.mul(self.sub(rows.offset, start), share))
        for line in range(0, rows.count * share, LINE_BYTES):
            operands, attributes = self.memory_operands(block, inside, 1, access.disp + line)
            self.effect("prefetch", operands, level=2, **attributes)
        return True

    def _step_to_next_place(self, op: Op) -> Scalar | None:
        """How many bytes further on, or back, the next turn of a loop reads what a load reads in this one, where an
        index of it stands in a table: that of a cache's page. In the last turn that of the first, one index of the loop
        around further on: the next head's. None where no index stands in a table.

        What lies behind a page is none of it. Measured on a Zen 4, keys and values in bf16 from memory, one thread, us
        by requests along the page and so: 64 sequences of 3 x 3 heads of 64 at 300 and 1000 positions 965 and 725, 3080
        to 4160 and 2160; 16 of 8 x 4 heads of 128 at 300 and 2000 1130 and 1110, 7780 and 6550."""
        strides = self.strides(op.operands[0])
        for _, loop in reversed(self.streaming_loops):
            for value, stride in zip(op.operands[1:], strides, strict=True):
                table = value.op
                if loop.counter is None or table is None or table.name != "load" or axes_of(value):
                    continue
                step = self.scalar_step(table, loop.counter)
                if step == 0:
                    continue
                here = self.integer(loop.counter)
                goes_on = self._compare("lt", self.add(here, 1), loop.stop)
                turns = self._selected(goes_on, 1, self.sub(loop.start, here))
                access = self._at_scalars(self.access(table), {})
                there = replace(access, base=self.add(access.base, self.mul(step, turns)))
                operands, attributes = self.address(there, {})
                level = max([self.level_of(value), *map(self.depth_of, operands)])
                memo, key = self.levels[level].memo, ("next", table)
                if key not in memo:
                    memo[key] = self.emit(level, "s_load", operands, S64, dtype=access.dtype, **attributes)
                further = self.mul(self.sub(memo[key], self.integer(value)), stride)
                around = [s for index, s in zip(op.operands[1:], strides, strict=True) if index.op is None and
                          index is not loop.counter and index not in self.function.arguments]
                if around:
                    further = self.add(further, self._selected(goes_on, 0, around[-1]))
                return self.mul(further, element_bytes(self.access(op).dtype))
        return None

    def _prefetch_part(self, op: Op, lane: str, at: dict[str, int]) -> None:
        """Ask for what follows a row of one of the parts of the depth, each of which goes on in the order of memory."""
        access = self.access(op)
        step = max(1, LINE_BYTES // element_bytes(access.dtype) // self.lanes)
        for piece in range(0, self.bound[lane].count, step):
            operands, attributes = self.address(access, {**at, lane: piece})
            disp = attributes.pop("disp") + self.requests.places_ahead_bytes
            self.effect("prefetch", operands, level=1, disp=disp, **attributes)

    def _places_of_slots(self, op: Op) -> list[Access]:
        """Where the elements of each slot of a load lie that are apart, or else the load."""
        return [self.access(op)] if self.packing is None else [
            self.neighbour(op, number) for number in range(self.slot_elements)]

    def _prefetch_lines(self, op: Op, lane: str, row_axis: str, row: int, lines: tuple[int, ...], part: Open) -> None:
        """Ask for lines further on of one of the rows of a block that are read line by line (WalkChoice.column_block).
        What lies past the end of the columns is that of the next block, which begins with them again: else each block
        would begin with lines that nobody has asked for. part: of the depth, that the block is."""
        columns = self.open[lane]
        last = self.sub(self.add(columns.offset, columns.extent), 1)
        for access in self._places_of_slots(op):
            size = element_bytes(access.dtype)
            step = max(1, LINE_BYTES // size // self.lanes)
            back = self.sub(self.mul(part.extent, access.axes[row_axis]), self.mul(columns.extent, size))
            for first, line in product(range(0, self.bound[lane].count, step), lines):
                there = self.add(self.bound[lane].offset, (first + line * step) * self.lanes)
                further: Scalar = 0
                for number in range(-(-line // LONG_LINES) if isinstance(part.extent, int) else 0):
                    left = self.sub(self.add(last, self.mul(columns.extent, number)), there)
                    further = self.add(further, self.scalar("s_and", self.scalar("s_sar", left, 63), back))
                operands, attributes = self.address(access, {row_axis: row, lane: first + line * step})
                if not isinstance(further, int):
                    index = self.mul(operands[1], attributes["scale"]) if attributes["indexed"] else 0
                    operands, attributes = self.memory_operands(
                        operands[0], self.add(index, further), 1, attributes["disp"])
                self.effect("prefetch", operands, level=2, **attributes)

    def are_short_rows(self, op: Op, row_axis: str, lane: str) -> bool:
        """Whether rows that few others meet in blocks are short, and lie one after the other, where the processor
        follows what it sees in the order of memory (Requests.rows_end_to_end)."""
        extent, access = self.open[lane].extent, self.access(op)
        return self.requests.rows_end_to_end > 0 and self.packing is None and isinstance(extent, int) and (
            extent * element_bytes(access.dtype) <= SHORT_ROW_BYTES) and self.is_whole_rows(access, row_axis, lane)

    def _prefetch_block_after(self, op: Op, lane: str, row_axis: str, row: int, part: Open) -> None:
        """Ask for the block after this one, a line in each step, in the order of memory, though this one is read a line
        of each row at a time: what meets the lines in such steps does not look like a stream to the processor. Measured
        on a Zen 3, 8192 rows of 128 numbers, from memory, that 4 others meet, in GB/s, with lines of the same rows
        asked for and so: f32 10.9 and 16.1, bf16 8.6 and 14.0 (before, by all rows for each piece of the columns)."""
        access = self.access(op)
        size = element_bytes(access.dtype)
        rows, columns = self.bound[row_axis], self.bound[lane]
        row_bytes = columns.count * self.lanes * size
        block = self.mul(access.axes[row_axis], self.add(part.offset, part.extent))
        before = self.mul(self.sub(columns.offset, self.open[lane].offset), self.mul(part.extent, size))
        base = self.add(self.add(access.base, block), before)
        inside = self.mul(self.sub(rows.offset, part.offset), row_bytes)
        for line in range(-(-row * row_bytes // LINE_BYTES) * LINE_BYTES, (row + 1) * row_bytes, LINE_BYTES):
            operands, attributes = self.memory_operands(base, inside, 1, access.disp + line)
            self.effect("prefetch", operands, level=1, **attributes)

    def _prefetch_rows_after(self, op: Op, row_axis: str, depth_axis: str | None) -> None:
        """Ask for the rows after these, as far along the depth as these are read: each begins pages away from the one
        before, where the processor does not see ahead. Whole rows that follow one another are asked for in the order
        of memory, each line once. depth_axis: what is walked of the depth, if it is not one step."""
        access = self.access(op)
        rows = self.bound[row_axis]
        if depth_axis is not None and self.is_contiguous(access, row_axis, depth_axis):
            depth, size = self.bound[depth_axis], element_bytes(access.dtype) * self.slot_elements
            step_bytes = rows.count * depth.count * size
            if step_bytes % LINE_BYTES == 0:
                near = rows.count * self.extent_hint(depth_axis) * size <= self.near_bytes // 8
                level = 1 if near and not self.requests.line_by_line else 2
                block = self.add(access.base, self.mul(access.axes[row_axis], self.add(rows.offset, rows.count)))
                inside = self.mul(self.sub(depth.offset, self.open[depth_axis].offset), rows.count * size)
                for line in range(0, step_bytes, LINE_BYTES):
                    operands, attributes = self.memory_operands(block, inside, 1, access.disp + line)
                    self.effect("prefetch", operands, level=level, **attributes)
                return
        for row in range(rows.count):
            operands, attributes = self.address(
                access, {**dict.fromkeys(axes_of(op.result), 0), row_axis: rows.count + row})
            self.effect("prefetch", operands, level=2, **attributes)

    def _prefetch_tile_after(self, op: Op, row_axis: str, depth_axis: str) -> None:
        """Ask for the rows that lie a tile further on than these, of which a copy is read, in the order of memory."""
        access, rows, depth = self.access(op), self.bound[row_axis], self.bound[depth_axis]
        step_bytes = rows.count * depth.count * element_bytes(access.dtype)
        if step_bytes < LINE_BYTES:
            return
        further = self.add(rows.offset, self.sequential_tiles[row_axis])
        block = self.add(access.base, self.mul(access.axes[row_axis], further))
        inside = self.mul(self.sub(depth.offset, self.open[depth_axis].offset), step_bytes // depth.count)
        for line in range(0, step_bytes, LINE_BYTES):
            operands, attributes = self.memory_operands(block, inside, 1, access.disp + line)
            self.effect("prefetch", operands, level=2, **attributes)

    def share_of_rows(self, op: Op, count: int, steps: int, row_axis: str, depth_axis: str) -> int:
        """How many bytes of `count` whole rows are asked for in so many steps of a depth, if all are along all of it; 0
        where these are no lines."""
        extent, row_bytes = self.open[depth_axis].extent, self.access(op).axes[row_axis]
        if not isinstance(extent, int) or not isinstance(row_bytes, int):
            return 0
        share, rest = divmod(count * steps * row_bytes, extent)
        return 0 if rest or share % LINE_BYTES else share

    def _prefetch_rows_later(self, op: Op, row_axis: str, depth_axis: str) -> None:
        """Ask for as much of the rows that are met later as this step reads of those that are met now, in the order of
        memory."""
        access, rows, depth = self.access(op), self.bound[row_axis], self.bound[depth_axis]
        share = self.share_of_rows(op, rows.count, depth.count, row_axis, depth_axis)
        block = self.add(access.base, self.mul(access.axes[row_axis], rows.offset))
        inside = self.mul(self.sub(depth.offset, self.open[depth_axis].offset), share // depth.count)
        for line in range(0, share, LINE_BYTES):
            operands, attributes = self.memory_operands(block, inside, 1, access.disp + line)
            self.effect("prefetch", operands, level=2, **attributes)

    def is_contiguous(self, access: Access, row_axis: str, depth_axis: str) -> bool:
        """Whether it is known that whole rows follow one another; gathered ones lie anywhere."""
        extent = self.open[depth_axis].extent
        size = element_bytes(access.dtype) * self.slot_elements
        return isinstance(extent, int) and access.axes.get(row_axis) == extent * size

    def _prefetch_next_block(self, op: Op, choice: WalkChoice) -> None:
        """Ask for a part of what the next block of panels is copied from, into the second cache: a line in each step of
        the loop over the depth. The pieces of rows and panels of this block ask for one part after another, and what
        is left of them once all are asked for, for the last one again, which costs nothing. The copy then takes them
        from a cache: else memory and arithmetic work in turns. Measured on a Zen 5, 128 rows by 4096 x 4096 that lie
        along the depth, in percent of the peak: bf16 89 and 93, i8 82 and 86, f32, whose panels are narrower then, 77
        and 84; f32 by 2048 x 2048 85 and 88."""
        lane, row_axis, depth_axis = choice.lane, choice.order[-1], choice.reduced[0]
        assert lane is not None
        rows, piece, depth = self.bound[row_axis], self.bound[lane], self.bound[depth_axis]
        at_edges = any(self.bound[a].count != choice.counts[a] for a in (row_axis, lane, depth_axis))
        if self.next_block is None or at_edges:
            return
        access = self.access(op)
        step_bytes = LINE_BYTES // depth.count
        width = piece.count * self.lanes
        part_bytes = self.mul(self.open[depth_axis].extent, step_bytes)
        panels = self.ceil_div(self.open[lane].extent, width)
        panel = self.scalar("s_floordiv", self.sub(piece.offset, self.open[lane].offset), width)
        number = self.scalar("s_floordiv", self.sub(rows.offset, self.open[row_axis].offset), rows.count)
        start = self.mul(self.add(self.mul(number, panels), panel), part_bytes)
        last = self.sub(self.mul(access.axes[lane], self.open[lane].extent), part_bytes)
        start = self.scalar("s_max", self.scalar("s_min", start, last), 0)
        base = self.add(self.add(access.base, self.mul(access.axes[lane], self.next_block)), start)
        inside = self.mul(self.sub(depth.offset, self.open[depth_axis].offset), step_bytes)
        operands, attributes = self.memory_operands(base, inside, 1, access.disp)
        self.effect("prefetch", operands, level=2, **attributes)

    def _prefetch_next_part(self, panel: StagedPanel, choice: WalkChoice, part: Open) -> None:
        """Ask for what lies one block of the depth further on than all of this part of it, each piece of rows for its
        share: memory is then read at one speed."""
        row_axis = choice.order[-1]
        rows, depth = self.bound[row_axis], self.bound[panel.depth_axis]
        access = panel.access()
        step_bytes = panel.depth_bytes // choice.row_pieces
        number = self.scalar("s_floordiv", self.sub(rows.offset, self.open[row_axis].offset), rows.count)
        share = self.mul(number, self.mul(part.extent, step_bytes))
        before = self.mul(self.sub(part.offset, self.open[panel.depth_axis].offset), panel.depth_bytes)
        base = self.add(self.add(access.base, before), share)
        inside = self.mul(self.sub(depth.offset, part.offset), step_bytes)
        for line in range(0, depth.count * step_bytes, LINE_BYTES):
            operands, attributes = self.memory_operands(base, inside, 1, choice.depth_block * panel.depth_bytes + line)
            self.effect("prefetch", operands, level=self.requests.stream_level, **attributes)

    def _prefetch_place(self, panel: StagedPanel, step: dict[str, int], ahead_bytes: int) -> None:
        """Ask for what lies further in one of several places from which panels are read."""
        lane = self.bound[panel.lane]
        for piece in range(lane.count):
            if piece % (lane.count // lane.parts) * panel.piece_bytes % LINE_BYTES == 0:
                operands, attributes = panel.address({**step, panel.lane: piece})
                disp = attributes.pop("disp") + ahead_bytes
                self.effect("prefetch", operands, level=1, disp=disp, **attributes)

    def _prefetch_panel(self, panel: StagedPanel, walk: Walk, choice: WalkChoice) -> None:
        """Ask for what lies further: panels are one stream, and the processor's own prefetching stops at the end of
        each page. Or those of several places, or parts of the depth, each for itself."""
        if self.depth_part is not None:
            self._prefetch_next_part(panel, choice, self.depth_part)
            return
        steps = self.bound[panel.depth_axis].count
        if choice.parts > 1 or choice.depth_parts:
            ahead = self.requests.places_ahead_bytes if choice.parts > 1 else self.requests.long_row_ahead_bytes
            for step in range(steps):
                self._prefetch_place(panel, {panel.depth_axis: step}, ahead)
            return
        access = panel.access()
        piece_bytes = panel.piece_bytes * self.bound[panel.lane].count
        multiply_adds = prod(self.bound[axis].count for axis in walk.outer)
        ahead = self.requests.panel_ahead_bytes or self.requests.stream_ahead_bytes
        if multiply_adds >= SLOW_STEPS * piece_bytes:
            ahead = max(self.requests.stream_ahead_bytes, AHEAD_BYTES)
        for step in range(steps):
            operands, attributes = self.address(access, {panel.depth_axis: step})
            disp = attributes.pop("disp") + ahead
            for line in range(0, piece_bytes, 64):
                self.effect("prefetch", operands, level=self.requests.stream_level, disp=disp + line, **attributes)

    def _prefetch_reread(self, panel: StagedPanel, step: dict[str, int], done: int, of: int) -> None:
        """Ask a step of a panel, and so of the one that follows it in a block, from the second cache into the first:
        the lines that are due behind product `done` of the step."""
        operands, attributes = self.address(panel.access(), {panel.depth_axis: step[panel.depth_axis]})
        disp = attributes.pop("disp") + self.requests.reread_ahead_bytes
        lines = range(0, panel.piece_bytes * self.bound[panel.lane].count, LINE_BYTES)
        for line in lines[(done - 1) * len(lines) // of:done * len(lines) // of]:
            self.effect("prefetch", operands, level=1, disp=disp + line, **attributes)

    def _prefetch_panel_again(self, op: Op, depth: str) -> None:
        """Ask for what a panel (WalkChoice.panels_again) has some steps of the depth later, into the first cache: few
        rows meet it as a stream from memory."""
        many = any(self.bound[a].hint > FEW_ROWS for a in self.bound if a not in self.access(op).axes)
        ahead = self.requests.reread_ahead_bytes if many else self.requests.stream_ahead_bytes
        access, axes = self.access(op), axes_of(op.result)
        lane, step = next(a for a in axes if self.bound[a].lane), access.axes[depth]
        assert isinstance(step, int)
        within = {a for a in axes if isinstance(access.axes.get(a), int) and access.axes[a] < step and a != lane}  # type: ignore[operator]
        outer = tuple(a for a in axes if a not in within and a != lane)
        for at in self._coordinates(outer):
            operands, attributes = self.address(access, {**dict.fromkeys(axes, 0), **at})
            first = attributes.pop("disp") + ahead
            for line in range(first, first + step, LINE_BYTES):
                self.effect("prefetch", operands, level=1, disp=line, **attributes)

    def _prefetch_row_again(self, value: Value, columns: str, row_axis: str, row: int) -> None:
        """Ask for what a step reads of a row of an operand (WalkChoice.rows_again) some rows later: the line of its
        last element, and, as arrays may begin anywhere in one, of its first, where a step reads as much as a line has.
        """
        access = self.access_of(value)
        assert access is not None
        count = self.bound[columns].count
        both = count * element_bytes(access.dtype) == LINE_BYTES and not access.relative
        for column in (0, count - 1) if both else (count - 1,):
            operands, attributes = self.address(access, {row_axis: row + ROWS_AGAIN_AHEAD, columns: column})
            self.effect("prefetch", operands, level=1, **attributes)

    def _prefetch_rows(self, op: Op, panel: StagedPanel) -> None:
        """Ask for the rows of memory that are copied COPY_AHEAD_STEPS steps of the depth later: they are far apart."""
        access = self.operand_access(op)
        step = self.access(op).axes[panel.depth_axis]
        row_bytes = self.bound[panel.lane].count * self.lanes * element_bytes(self.access(op).dtype)
        for number in range(self.slot_elements):
            row = Access(self.add(access.base, self.mul(step, number)), access.disp, access.axes, access.dtype)
            for at in range(self.bound[panel.depth_axis].count):
                operands, attributes = self.address(row, {panel.depth_axis: COPY_AHEAD_STEPS + at})
                disp = attributes.pop("disp")
                for line in range(0, row_bytes, 64):
                    self.effect("prefetch", operands, level=2, disp=disp + line, **attributes)
