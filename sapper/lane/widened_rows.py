"""Rows that are widened to scratch memory while something meets them first.

Enters: a walk that keeps a tile of narrow rows, as of latent vectors in bf16 that are keys and values, and the walk
behind it, which contracts them along themselves. Leaves the second one alone: each piece of it, of some rows by as many
elements as there are lanes, widens these to where all that follows reads them, too. What is stored then goes to the
first cache beside multiply-adds, which leave the ports for it idle, and is there when they read it. Where two of these
start in a cycle, and registers are few, a piece widens what the next one meets: what it met itself would have to come
from the store in time for multiply-adds that wait for nothing else.

What holds: the walk has each row in one piece only.

Measured on a Zen 4, latent_attention_decode_bf16 of 16 heads and 512, 4096 and 8192 positions, one thread, the least in
us: 181, 1617 and 3534 by a walk of its own, 180, 1461 and 2933 with the next tile asked for, 170, 1387 and 2837 so, and
166, 1329 and 2710 with rows a line further apart than 2 KiB, as 16 of these would lie in two sets of the first cache.
On a Zen 3, 512 positions, in percent of the peak, by 6 x 2 sums: 77 by a walk of its own with rows a line further
apart, 77 by the piece that meets them, and 82 by the one before.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.nodes import Op, Value
from ..tile.plan import Walk, axes_of
from .axis_loops import Carried, WalkChoice
from .kept_tiles import KeptTiles
from .packed import load_behind
from .state import Bound, Scalar, element_bytes


class WidenedRows(KeptTiles):
    """Emits walks that widen what they read. widening: the next walk that does, and the load."""

    widening: tuple[Walk, Op] | None = None

    def is_widened_by(self, walk: Walk, following: Walk | Op | None) -> bool:
        """Whether the walk behind one that keeps rows does so in its place; the rows have a buffer then."""
        value = walk.inner[0] if len(walk.inner) == len(walk.roots()) == 1 else None
        if not isinstance(value, Value) or not isinstance(following, Walk) or self.facts.many_workers or (
                self.facts.fma_per_cycle >= 2 and not self.sixteen_registers):
            return False
        load = value.op
        if load is None or all(load_behind(o) is not load for op in following.reductions for o in op.operands):
            return False
        access, axes = self.access(load), axes_of(value)
        narrow = self.kept_dtype(value).bits > access.dtype.bits and value not in self.slot_axes
        if not narrow or len(axes) != 2 or access.gathers or access.axes.get(axes[1]) != element_bytes(access.dtype):
            return False
        self.buffers[value] = access    # as good as where it will lie
        fits = self._has_rows_once(self.choose(following), *axes)
        del self.buffers[value]
        if fits:
            extents = [(axis, self.extent_of_buffer(axis, value)) for axis in axes]
            self.buffers[value] = self.allocate(value, self.kept_dtype(value), extents, apart=True)
            self.widening = following, load
        return fits

    def _has_rows_once(self, choice: WalkChoice, rows: str, depth: str) -> bool:
        """Whether a walk has each row in one piece, and the depth in whole vectors, neither across its lanes."""
        extent = self.open[depth].extent if depth in self.open else None
        whole = isinstance(extent, int) and extent % self.lanes == 0
        special = choice.on_tiles or choice.by_hand or choice.packing or choice.parted or choice.depth_block
        across = choice.lane in (rows, depth)
        return whole and choice.order == [rows] and choice.reduced == [depth] and not across and not special

    def choose(self, walk: Walk) -> WalkChoice:
        choice = super().choose(walk)
        if self.widening is None or self.widening[0] is not walk:
            return choice
        (depth,) = choice.reduced
        ahead = self.facts.fma_per_cycle >= 2 and self.open[depth].extent != self.lanes
        return replace(choice, counts={**choice.counts, depth: self.lanes}, widened_here=self.widening[1],
                       widened_ahead=ahead)

    def widen_first(self, choice: WalkChoice) -> None:
        load, (depth,) = choice.widened_here, choice.reduced
        assert load is not None

        def first(carried: Carried) -> Carried:
            self._widen(load, self.bound[depth].offset)
            return carried

        self._bind(depth, self.open[depth].offset, self.lanes, False, None, [], first)

    def widen_here(self, choice: WalkChoice) -> None:
        load, (depth,) = choice.widened_here, choice.reduced
        assert load is not None
        offset = self.bound[depth].offset
        if choice.widened_ahead:    # behind the last vector there is none: that one again
            o = self.open[depth]
            last = self.add(o.offset, self.sub(o.extent, self.lanes))
            offset = self.scalar("s_min", self.add(offset, self.lanes), last)
        self._widen(load, offset)

    def _widen(self, load: Op, offset: Scalar) -> None:
        """Keep the rows at hand, a vector of each."""
        value, bound, buffers, pending = load.result, self.bound, self.buffers, self.pending_buffers
        rows, depth = axes_of(value)
        self.enter_again()
        along = Bound(offset, 1, True, None, self.depth)
        self.bound = {**bound, rows: replace(bound[rows], depth=self.depth), depth: along}
        self.buffers = {kept: access for kept, access in buffers.items() if kept is not value}
        self.pending_buffers = {value: buffers[value]}
        for at in self._coordinates((rows, depth)):
            self._keep(value, at, self.row(value, at))
        self.bound, self.buffers, self.pending_buffers = bound, buffers, pending
        self.leave()
