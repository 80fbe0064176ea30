"""Nests of parallel loops, in one task or outside of all.

Enters: parallel loops nested perfectly, as ranges. Leaves: a loop for each index and for each resident axis; the other
axes are open, and walks loop over them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import gcd

from ..ir.nodes import Block, Op, Value
from ..ir.types import MASK, TileType
from ..tile.affine import affine
from ..tile.plan import LATE, Late, Plan, Walk, late_walk
from .extents import Range
from .late import LateLowering
from .residents import RESIDENT_VECTORS, ResidentLowering
from .state import Bound, Capacity, Open, Scalar, element_bytes

LATE_VECTORS = 16
"""Vectors of a row from which it pays to store it beside the arithmetic of the next one. Measured on a Zen 5, us for
rows of 4, 8 and 20: softmax in f32 46.8 to 58.2, 39.1 to 45.4, 11.5 to 10.7, in bf16 53.4 to 60.6, 46.8 to 49.3, 12.4
to 11.9."""


class NestLowering(ResidentLowering, LateLowering):
    """Emits nests of parallel loops."""

    def _chain(self, op: Op) -> list[Op]:
        """`op` and the parallel loops nested perfectly in it, as long as their bounds exist outside, or can be computed
        there, where there are many workers."""
        chain = [op]
        while True:
            inner = chain[-1].blocks[0]
            control = [o for o in inner.ops if o.blocks]
            others = [o for o in inner.ops if o.name in (*LATE, "store", "whole")]
            defined = {r for o in inner.ops for r in o.results} | {a for c in chain for a in c.blocks[0].arguments}
            if control:
                counters = {a for c in chain for a in c.blocks[0].arguments}
                inside = {r for c in chain for o in c.blocks[0].ops for r in o.results} | counters
                defined = {v for v in control[0].operands if v in inside and not _is_outside(v, counters)}
            if (len(control) != 1 or others or control[0].name not in ("tiles", "each")
                    or not control[0].attributes["parallel"] or any(v in defined for v in control[0].operands)
                    or any(isinstance(r.type, TileType) and r.type.axes for o in inner.ops for r in o.results
                           if o is not control[0])):
                return chain
            chain.append(control[0])

    def _ranges(self, op: Op) -> list[Range]:
        if op.name == "tiles":
            ranges = [self._range(op.operands[2 * i], op.operands[2 * i + 1])
                      for i in range(len(op.attributes["axes"]))]
            for r, axis in zip(ranges, op.attributes["axes"], strict=True):
                r.axis = axis
            return ranges
        count = op.attributes["count"]
        ranges = [self._range(op.operands[2 * i], op.operands[2 * i + 1]) for i in range(count)]
        for r, counter in zip(ranges, op.blocks[0].arguments, strict=False):
            r.counter = counter
            r.step = op.attributes.get("step", 1)
        if op.attributes.get("pieces"):
            ranges[0].end = op.blocks[0].arguments[1]
        return ranges

    def _late(self, ranges: list[Range], body: Block, plan: Plan) -> Late | None:
        """The walk of the body that follows a row behind, if all that the loops bind are single rows."""
        if not self.facts.software_prefetch or ranges[-1].axis is None:
            return None  # Such a target hides memory's time in another way.
        rows = frozenset(r.axis for r in ranges if r.axis is not None)
        along = [a for item in plan.items if isinstance(item, Walk) for a in item.axes if a not in rows]
        long = ranges[-1].hint > 1 and min(map(self._whole_hint, along), default=0) >= LATE_VECTORS * self.lanes
        return late_walk(plan, body, rows, self.streams, self.facts.requests.late_stores if long else 0)

    def _loops(self, ranges: list[Range], k: int, body: Callable[[list[Value]], list[Value]]) -> None:
        """Loops over indices and resident axes; other axes become open."""
        if k == len(ranges):
            body([])
            return
        r = ranges[k]
        if r.axis is None:
            assert r.counter is not None
            if r.end is not None:
                self.scalars[r.end] = self.value(r.stop)
                self.home[r.end] = self.depth
            if r.once or r.end is not None:
                self._with_counter(r, self.value(r.start), ranges, k, body)
                return

            def each(iv: Value) -> None:
                self.levels[-1].iterations = -(-r.hint // r.step)
                self._with_counter(r, iv, ranges, k, body)

            self.counted("each", r.start, r.stop, r.step, each)
            return
        if not r.resident:
            self._open(r.axis, r)
            self._loops(ranges, k + 1, body)
            self.open.pop(r.axis, None)
            return
        if r.blocked:
            self._blocks_of_panels(ranges, k, body)
            return
        if r.late is not None:
            self.late_rows(r.axis, r.start, r.stop, r.late)
            return
        self._resident(r, lambda: self._loops(ranges, k + 1, body))

    def _blocks_of_panels(self, ranges: list[Range], k: int, body: Callable[[list[Value]], list[Value]]) -> None:
        """Loops over blocks of as many panels as fill half of the second cache, over the ranges inside, and over the
        panels of a block: what a few rows have stays in the first cache for all of these."""
        r = ranges[k]
        assert r.axis is not None
        size = r.resident
        pieces = self.scalar("s_floordiv", self.block_bytes, self.scalar(
            "s_max", self.mul(self._panel_bytes(r), size), 1))
        columns = self.mul(self.scalar("s_max", pieces, 1), size)

        def block(number: Value) -> None:
            start = self.add(r.start, self.mul(number, columns))
            stop = self.scalar("s_min", self.add(start, columns), r.stop)
            inside = replace(r, start=start, stop=stop, blocked=(), fixed=None, divisor=gcd(r.divisor, size))
            self._loops([*ranges[:k], *ranges[k + 1:], inside], k, body)

        blocks = self.scalar("s_floordiv", self.sub(self.add(self.extent_of(r), columns), 1), columns)
        self.counted(r.axis, 0, blocks, 1, block)

    def _panel_bytes(self, r: Range) -> Scalar:
        """Of all matrices whose panels a range counts, one panel of each."""
        assert r.axis is not None
        total: Scalar = 0
        for op in r.blocked:
            size = element_bytes(op.operands[0].type.dtype)  # type: ignore[union-attr]
            for index, stride in zip(op.operands[1:], self.strides(op.operands[0]), strict=True):
                form = affine(index)
                if form is not None and r.axis in form.axes:
                    total = self.add(total, self.mul(stride, form.axes[r.axis] * size))
        return total

    def _with_counter(self, r: Range, iv: Value, ranges: list[Range], k: int,
                      body: Callable[[list[Value]], list[Value]]) -> None:
        assert r.counter is not None
        self.scalars[r.counter] = iv
        self.home[r.counter] = self.depth
        self._loops(ranges, k + 1, body)

    def _resident(self, r: Range, body: Callable[[], None]) -> None:
        """A loop over tiles whose elements along the axis stay in registers: full tiles, then fewer rows and single
        ones (of lanes, two vectors and masked ones)."""
        assert r.axis is not None
        axis = r.axis
        size, lanes = r.resident, self.lanes
        count = size // lanes if r.lane else size

        def at(iv: Value, n: int, mask: Value | None, rest: bool = False, apart: Scalar = 1) -> None:
            self.levels[-1].iterations = -(-r.hint // size)
            assert not r.lane or not any(b.lane for b in self.bound.values()), "lanes hold one axis"
            self.bound[axis] = Bound(iv, n, r.lane, mask, self.depth, resident=True, stop=r.stop, hint=r.hint,
                                     rest=rest, apart=apart)
            body()
            del self.bound[axis]

        if r.walked:
            def walked(iv: Value) -> None:
                self.levels[-1].iterations = -(-r.hint // size)
                rows = size if r.divisor % size == 0 else self.scalar("s_min", self.sub(r.stop, iv), size)
                self.open[axis] = Open(iv, rows, min(size, r.hint), gcd(size, r.divisor), Capacity(size))
                body()
                del self.open[axis]

            self.counted(axis, r.start, r.stop, size, walked)
            return
        extent = self.extent_of(r)
        if r.parted:
            part = self.scalar("s_floordiv", extent, size)
            self.counted(axis, r.start, self.add(r.start, part), 1, lambda iv: at(iv, count, None, apart=part))
            self.counted(axis, self.add(r.start, self.mul(part, size)), r.stop, 1, lambda iv: at(iv, 1, None, True))
            return
        if size == 1 or r.divisor % size == 0:
            self._full_tiles(r, r.stop, lambda iv: at(iv, count, None))
            return
        full = self.add(r.start, self.sub(extent, self.scalar("s_mod", extent, size)))
        if not isinstance(extent, int) or extent >= size:
            self._full_tiles(r, full, lambda iv: at(iv, count, None))
        if isinstance(extent, int) and extent % size == 0:
            return
        if r.lane:
            if count > RESIDENT_VECTORS:
                rest = self.sub(r.stop, full)
                stop = self.add(full, self.sub(rest, self.scalar("s_mod", rest, RESIDENT_VECTORS * lanes)))
                self.counted(axis, full, stop, RESIDENT_VECTORS * lanes,
                             partial(at, n=RESIDENT_VECTORS, mask=None, rest=True))
                full = stop

            def masked(iv: Value) -> None:
                mask = self.emit(self.depth, "mask_first", [self.value(self.sub(r.stop, iv))], MASK)
                at(iv, 1, mask, True)
            self.counted(axis, full, r.stop, lanes, masked)
        else:
            # What is left is a multiple of `left`; where the extent is known it is that.
            left = extent % size if isinstance(extent, int) else gcd(size, r.divisor)
            tails = (left,) if isinstance(extent, int) else (*(n for n in r.tails if n < size), 1)
            for rows in tails:
                rest = self.sub(r.stop, full)
                stop = r.stop if left % rows == 0 else self.add(full, self.sub(rest, self.scalar("s_mod", rest, rows)))
                self.counted(axis, full, stop, rows, partial(at, n=rows, mask=None, rest=True))
                if left % rows == 0:
                    break
                full, left = stop, gcd(left, rows)

    def _full_tiles(self, r: Range, stop: Scalar, tile: Callable[[Value], None]) -> None:
        assert r.axis is not None
        self.counted(r.axis, r.start, stop, r.resident, tile)


def _is_outside(value: Value, counters: set[Value]) -> bool:
    """Whether a scalar is computed of dimensions and numbers alone."""
    return value not in counters and value.op is not None and value.op.name in (
        "dim", "const", "add", "sub", "mul", "floordiv", "min", "max") and all(
        _is_outside(v, counters) for v in value.op.operands)
