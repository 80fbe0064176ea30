"""Memory that loops over an index ask for early: weights, read from one end to the other.

Enters: the body of such a loop, and its range. Leaves: prefetches at the end of the body. (Those of walks are in
prefetches.py.) Where the target says scales_ahead_bytes, a single row of packed products asks for scales that near, and
for all else as for rows that are streams (STREAMS_AHEAD_BYTES). Measured on a Zen 4, one thread, in percent of what
plain reads reach just before and after, where the processor was left to read all but scales ahead, and so: 4096 x 4096
in Q4_K 78 and 90, Q6_K 60 and 86, Q4_0 74 and 84, Q8_0 98 and 93; a model's matrices in Q4_0 77 to 95 and 92 to 103,
in Q6_K 66 to 91 and 90 to 95, in Q8_0 92 to 112 and 96 to 107. One request 83 to 47, two and three 58 to 83. Products
of f32 ask so for pieces of super blocks (2048 x 2048 in Q4_K: 299 and 194 us, in Q6_K: 512 and 450); else they take
longer than memory. The distances below were measured on a Zen 4 in another machine.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..ir.nodes import Block, Op, Value
from ..ir.types import i32, u8
from ..tile.ops import memory_of
from ..tile.plan import axes_of
from .extents import Range
from .model import Model
from .prefetches import FEW_ROWS, LINE_BYTES, NEAR_AHEAD_BYTES, STREAMS_AHEAD_BYTES
from .scratch import PAGE_BYTES
from .state import Scalar, element_bytes

OFTEN = 8
"""Weights that so many pieces of rows read one after the other are in the caches for all of them but the first, and are
not asked for. But where rows are streams (asks_again): experts may have few rows, and a request more for each line
costs many nothing. Measured on a Zen 4, 16 experts of 768 x 1024 in Q4_0, 4 of them for each of 4, 16 and 64 tokens,
one thread, ms of 7 layers: down 2.32, 4.91, 13.7 and so 1.61, 3.61, 12.1, gate and up 2.89, 7.56, 25.4 and so 2.81,
7.23, 24.7; of 2 tokens 1.65 and 1.28, 1.79 and 2.05; a prompt of 512 tokens, all of it, 635 and 631."""

FAR_AHEAD_BYTES = 32768
"""How far ahead weights are asked for by loops that use them for several rows: there arithmetic takes longer than
memory, and what is asked into the second cache does not stand in its way. Measured on a Zen 4, Q4_1 of 14336 x 4096: 4
rows at 80 % of memory's speed, against 60 % where it is asked into L1; a single row at 69 %, against 85 %."""

DIRECT_AHEAD_BYTES = 3072
"""And by loops of a single row that multiply weights as they are read, which arithmetic keeps up with: near enough that
the processor sees some accesses miss, and asks for more by itself. Measured on a Zen 4, 8 bits of 14336 x 4096: 29 to
32 GB/s, against 26 to 28 where they are asked into L1."""

PIECES_AHEAD_BYTES = 8192
"""And by loops of a single row over pieces of a stream that another loop goes on with elsewhere, as those of a super
block of Q4_K and Q6_K: the processor's own prefetching starts anew with each, and the first cache waits for too few
lines at a time to make up for it. Measured on a Zen 4, 14336 x 4096: 21.6 and 26.5 GB/s, against 19.7 and 17.6 where
they are asked for as other weights are, which lose by this (25 to 20 GB/s)."""


class StreamPrefetches(Model):
    """Emits prefetches of streams."""

    def _stream_steps(self, body: Block, r: Range) -> dict[Value, int]:
        """The matrices that a loop reads, and how many bytes further its next pass reads each."""
        steps: dict[Value, int] = {}
        for op in (inner for one in body.ops for inner in one.walk()):
            if r.counter is not None and op.name == "load" and self._is_resident_row(op):
                step = self.scalar_strides(op).get(r.counter, 0) * r.step
                if step > 0:
                    matrix = memory_of(op.operands[0])
                    steps[matrix] = max(step, steps.get(matrix, 0))
        return steps

    def _prefetch_streams(self, body: Block, r: Range) -> None:
        """Ask for what a loop over an index will read later for contractions: what spans the lanes is a matrix, read
        from one end to the other. The processor's own prefetching stops at the end of each page."""
        sums = [inner.result.type.dtype for op in body.ops for inner in op.walk()  # type: ignore[union-attr]
                if inner.name == "contract"]
        if not self.facts.software_prefetch or not sums or any(b.apart != 1 for b in self.bound.values()):
            return      # what comes from several places the processor follows by itself
        several = any(b.resident and not b.lane and b.count > 1 for b in self.bound.values())
        direct = any(inner.name == "contract" and value.op is not None and value.op.name == "load"
                     and self._is_resident_row(value.op) for inner in body.ops for value in inner.operands)
        asked: set[tuple[Value, int]] = set()
        for op in body.ops:
            if op.name != "load" or not self._is_resident_row(op):
                continue
            access, strides = self.access(op), self.scalar_strides(op)
            step = strides.pop(r.counter, 0) * r.step if r.counter is not None else 0
            again = max((b.hint // b.count for a, b in self.bound.items()
                         if b.resident and not b.lane and a not in access.axes), default=1)
            if access.gathers or not 0 < step <= PAGE_BYTES or (
                    again >= OFTEN and not self.asks_again):
                continue
            ahead, level = (FAR_AHEAD_BYTES, 2) if several else (DIRECT_AHEAD_BYTES, 2) if direct else (
                NEAR_AHEAD_BYTES, 1)
            pieces = not several and strides and isinstance(r.start, int) and isinstance(r.stop, int) and (
                (r.stop - r.start) // r.step * step not in strides.values())
            if pieces:
                ahead, level = PIECES_AHEAD_BYTES, 2
            if self.requests.block_ahead_bytes:
                # Pieces of a stream that meet plain numbers take no less than they are asked for ahead without this: on
                # a Granite Rapids Q4_K and Q6_K by f32 1.17 and 1.04 of the time 3 KiB ahead, by bytes 0.92 and 1.02.
                least = ahead if pieces and i32 not in sums else 0
                ahead, level = max(least, self.requests.block_ahead_bytes), 2
                if not several and (self.requests.block_level or self.requests.stream_level) == 1:
                    ahead, level = self._share_bytes(op), 1
            if several and self.requests.block_rows_ahead_bytes:
                ahead, level = self.requests.block_rows_ahead_bytes, self.requests.stream_level
            distances: tuple[int, ...] = (ahead,)
            if not several and (i32 in sums or pieces) and self.requests.scales_ahead_bytes:
                distances, level = (STREAMS_AHEAD_BYTES, 2) if step > LINE_BYTES else (
                    (self.requests.scales_ahead_bytes,), 1)
            rows = [a for a in axes_of(op.result) if a in self.bound and not self.bound[a].lane]
            first = access.disp // LINE_BYTES * LINE_BYTES
            last = access.disp + min(step, self._reach_bytes(op, step))
            fixed = replace(access, axes={a: access.axes[a] for a in rows if a in access.axes}, disp=0)
            for at in self._coordinates(tuple(rows)):
                operands, attributes = self.address(fixed, at)
                disp = attributes.pop("disp")
                for line in (line for ahead in distances
                             for line in range(disp + ahead + first, disp + ahead + last, LINE_BYTES)):
                    if (operands[-1], line) not in asked:
                        asked.add((operands[-1], line))
                        self.effect("prefetch", operands, level=level, disp=line, **attributes)
        if self.requests.next_rows:
            self._prefetch_next_rows_of(body)

    def prefetch_packed(self, block: Block) -> None:
        """Ask for what a loop that unpacks weights, words of several in whole rows, reads widened_ahead_bytes later: a
        line makes several vectors, so that the processor has few of them on their way by itself."""
        ahead = self.requests.widened_ahead_bytes
        loads = [op for op in block.ops if op.name == "load" and axes_of(op.result)]
        if not self.facts.software_prefetch or not ahead or not any(map(_reads_words, loads)):
            return
        if any(inner.name == "contract" for op in block.ops for inner in op.walk()):
            return
        asked: set[tuple[Value, int]] = set()
        for op in loads:
            axes, access = axes_of(op.result), self.access(op)
            if any(self.bound[a].lane or self.bound[a].count > 1 for a in axes if a in self.bound) or any(
                    a not in self.bound for value, _ in access.gathers for a in axes_of(value)):
                continue
            access = self._at_scalars(access, dict.fromkeys(axes, 0))
            if access.gathers or element_bytes(access.dtype) not in (
                    stride for a, stride in access.axes.items() if a not in self.bound):
                continue
            fixed = replace(access, axes={a: s for a, s in access.axes.items() if a in self.bound})
            operands, attributes = self.address(fixed, {})
            disp = attributes.pop("disp") + ahead
            for line in range(disp, disp + self._reach_bytes(op, LINE_BYTES), LINE_BYTES):
                if (operands[-1], line) not in asked:
                    asked.add((operands[-1], line))
                    self.effect("prefetch", operands, level=1, disp=line, **attributes)

    def _prefetch_next_rows_of(self, body: Block) -> None:
        """Ask for what the many rows that weights meet have in the next pass of the loop that moves them, into the
        first cache: the groups of a row lie as far apart as all rows are long, where the processor sees no stream."""
        spans: dict[tuple[Value, ...], list[tuple[int, int, dict[str, Any]]]] = {}
        for op in body.ops:
            if op.name != "load" or self._is_resident_row(op) or self.access(op).gathers:
                continue
            rows = tuple(a for a in axes_of(op.result) if a in self.bound and self.bound[a].count > 1
                         and not self.bound[a].lane and self.bound[a].hint > FEW_ROWS)
            step = self._step_to_next(op, rows)
            if step is None:
                continue
            access = self.access(op)
            there = replace(access, base=self.add(access.base, step),
                            axes={a: access.axes[a] for a in rows if a in access.axes})
            for at in self._coordinates(rows):
                operands, attributes = self.address(there, at)
                first = attributes.pop("disp")
                spans.setdefault(tuple(operands), []).append(
                    (first, first + self._reach_bytes(op, LINE_BYTES), attributes))
        for place, parts in spans.items():
            asked = -LINE_BYTES
            for first, end, attributes in sorted(parts, key=lambda part: part[:2]):
                for byte in range(max(first, asked + LINE_BYTES), end, LINE_BYTES):
                    self.effect("prefetch", list(place), level=1, disp=byte, **attributes)
                    asked = byte

    def _step_to_next(self, op: Op, rows: tuple[str, ...]) -> Scalar | None:
        """How many bytes further a load of rows reads in the next pass of the loop that moves it far, if one does."""
        steps = [self.scalar_step(op, loop.counter) for _, loop in reversed(self.streaming_loops)
                 if loop.counter is not None and rows]
        return next((step for step in steps if not isinstance(step, int) or step >= PAGE_BYTES), None)

    def _share_bytes(self, op: Op) -> int:
        """How far ahead a matrix is asked for where all that the outermost loop over matrices reads, each as early as
        the others, is asked for block_ahead_bytes ahead: whole lines of it."""
        ahead = self.requests.block_ahead_bytes
        steps = next(filter(None, (self._stream_steps(*loop) for loop in self.streaming_loops)), {})
        if (step := steps.get(memory_of(op.operands[0]))) is not None:
            ahead = ahead * step // sum(steps.values())
        return -(-ahead // LINE_BYTES) * LINE_BYTES

    def _reach_bytes(self, op: Op, most: int) -> int:
        """From the first byte to behind the last of what a load reads at one index and one row; `most` if unknown."""
        access = self.access(op)
        reach = element_bytes(access.dtype)
        for axis, stride in access.axes.items():
            if axis in self.bound and not self.bound[axis].lane:
                continue
            count = self.lanes if axis in self.bound else self.open[axis].extent if axis in self.open else 1
            if not isinstance(stride, int) or not isinstance(count, int):
                return most
            reach += (count - 1) * stride
        return reach

    def _is_resident_row(self, op: Op) -> bool:
        return any(a in self.bound and self.bound[a].lane and self.bound[a].resident for a in axes_of(op.result))


def _reads_words(op: Op) -> bool:
    """Whether a load reads bytes as words of 32 bits."""
    tensor = op.operands[0]
    return tensor.type.dtype is i32 and memory_of(tensor).type.dtype is u8  # type: ignore[union-attr]
