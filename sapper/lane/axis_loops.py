"""Loops over one axis, and how a walk is computed.

Enters an axis with its extent, a size of piece, and what is to be done with each piece; leaves a main loop over full
pieces and a tail of smaller ones: a register axis ends in single rows, a lane axis in masked rows, so no main loop
carries a mask. `WalkChoice` is what the model (model.py) or a schedule (choices.py) decides of a walk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import gcd, prod
from typing import TYPE_CHECKING

from ..ir.nodes import Block, Op, Value
from ..ir.types import MASK, S64, DType
from ..tile.plan import Walk
from .by_hand import Fit
from .packed import Packing
from .runs import Runs
from .state import MOST_VALUES, PAIR, Access, Bound, Capacity, Open, Scalar, too_many_values

if TYPE_CHECKING:
    from .layout import Layout
    from .tile_blocks import TileBlocks
    from .tile_fit import TileWalk
    from .tile_slots import TileSlots

Carried = list[Value]
"""What a loop hands from round to round."""


@dataclass(slots=True)
class WalkChoice:
    """How one walk is computed. counts: register factor of each open axis (in vectors for the lane axis).

    order: open outer axes, outermost first. reduced: open reduced axes, outermost first. staged: loads copied to
    scratch memory before the first loop over an axis that they do not span. prefetched: loads of matrices that are
    read once, whose next rows are asked for early. joint: where the lane axis is reduced, the axis whose results come
    to lie side by side in the lanes. rolled: the axis along which what follows the reductions is a loop, not unrolled.
    packing: packed dot products; counts of the contracted axis are then of slots. widened: packed tensors whose
    elements are narrower than a row's and read for many rows: they are copied as well.
    by_hand: the micro-kernel that the loop over the reduced axis is, where a tile is one that it is written for.
    blocked: the rows are walked once for each block of panels of the lane axis, as many as stay in the second cache.
    deep: such a block is copied from pieces of rows for more panels than stay there, and these are walked one by one.
    rows_here: staged operands of which only the rows at hand are copied, for all panels of a block. rows_ahead: loads
    of rows that are read where they lie for all panels of a block, and whose next rows are asked for meanwhile.
    reread: staged or packed operands whose panels many rows meet, piece after piece, and which are asked into the first
    cache meanwhile. rows_again: operands of whose rows, one after the other, pieces of the columns meet a few elements
    each, again and again, and which are asked there, too.
    panels_again: loads of vectors, one after the other in memory, that rows held by a nest meet again and again, and
    which are asked there, too.
    tile_ahead: loads of rows that a sequential loop keeps a tile of, whose next tile is asked for meanwhile.
    rows_later: loads of whole rows that a later walk of a sequential loop meets in the same tile, and which are asked
    for meanwhile.
    widened_here: the one whose rows this walk widens to scratch memory as it meets them. widened_ahead: each piece of
    the depth does so for the next one.
    block_ahead: staged operands of which what the next block of panels is copied from is asked for meanwhile.
    tiles: how tile registers serve the walk, if they do; the counts are then those of the tiles of sums. bound: how
    they serve it where the columns are. few: what is chosen instead, as the kernel runs, where there are fewer rows
    than `fewest`, or less of `few_axis`, where that is another axis.
    run: neighbours along the lane axis that a lane takes together (runs.py).
    depth_block: where not 0, all rows meet so many steps of the depth before any meets the next, and their sums pass
    from one block to the next through scratch memory; where `blocked`, so they do for each block of panels, of which as
    much is copied at a time. row_pieces: how many pieces of rows meet each block.
    column_block: where not 0, so many columns meet it besides before any meets the next. joined_once: of what is
    joined to slots there, the loads that are so before, a piece of the columns at a time, for all pieces of rows.
    parted: the axis whose rows, of those taken at once, come from as many places of it, each read on from there.
    parts: where not 1 that is the lane axis, of which so many parts have as many vectors each.
    depth_parts: where not 0 the depth is parted, and each of so many parts has a step at a time; a depth_block, if
    there are any, has as many steps of each.
    errors_first: the axis of the rows of which it is summed before all else what packed dot products are too large by.
    """

    lane: str | None
    counts: dict[str, int]
    order: list[str]
    reduced: list[str]
    staged: list[Op] = field(default_factory=list)
    prefetched: list[Op] = field(default_factory=list)
    joint: str | None = None
    rolled: str | None = None
    packing: Packing | None = None
    by_hand: Fit | None = None
    widened: list[Op] = field(default_factory=list)
    blocked: bool = False
    deep: bool = False
    rows_here: list[Op] = field(default_factory=list)
    rows_ahead: list[Op] = field(default_factory=list)
    tile_ahead: list[Op] = field(default_factory=list)
    reread: list[Op] = field(default_factory=list)
    rows_again: list[Value] = field(default_factory=list)
    panels_again: list[Op] = field(default_factory=list)
    rows_later: list[Op] = field(default_factory=list)
    widened_here: Op | None = None
    widened_ahead: bool = False
    block_ahead: list[Op] = field(default_factory=list)
    tiles: TileWalk | None = None
    run: int = 1
    few: WalkChoice | None = None
    fewest: int = 0
    few_axis: str | None = None
    bound: TileBlocks | TileSlots | None = None
    parted: str | None = None
    parts: int = 1
    depth_parts: int = 0
    depth_block: int = 0
    row_pieces: int = 1
    column_block: int = 0
    joined_once: list[Op] = field(default_factory=list)
    errors_first: str | None = None

    @property
    def near(self) -> bool:
        """Whether such a block is one panel, copied from the second cache, which few rows meet in the first."""
        return self.tiles is not None and self.tiles.near

    @property
    def on_tiles(self) -> bool:
        """Whether tile registers hold the sums."""
        return self.tiles is not None or self.bound is not None

    def layout(self, axes: tuple[str, ...], lanes: int, bound: Mapping[str, int]) -> Layout:
        """Where a result over `axes`, one piece of the walk, lies in registers.

        bound: register factors of the axes that loops outside the walk bind. A lane axis that is reduced is among the
        axes: each lane holds a part of the sum until the loop ends.
        """
        from .layout import LANE, REGISTER, Factor, Layout

        if self.lane is not None and self.lane in self.reduced:
            axes = (*axes, self.lane)
        factors: dict[str, tuple[Factor, ...]] = {}
        registers = 1
        for axis in reversed(axes):
            count = 1 if axis in self.reduced else self.counts.get(axis) or bound.get(axis, 1)
            run = self.run if axis == self.lane and count % self.run == 0 else 1
            factors[axis] = (Factor(count // run, REGISTER, registers * run),
                             Factor(lanes if axis == self.lane else 1, LANE, 1),
                             *([Factor(run, REGISTER, registers)] if run > 1 else []))
            registers *= count
        return Layout(dict(reversed(factors.items())))


class AxisLoops(Runs):
    """Loops. Subclasses choose (`choose`) and give scratch memory (`allocate`).

    paired: axes that the walk at hand takes in steps of two, as it keeps slots. lane_run: neighbours along the lane
    axis that a lane of the walk at hand takes, where whole pieces are. chunked: axes of rows that walks take many of.
    squared: the depth of the walk at hand, if its products take two slots of two rows at once (two_by_two.py).
    """

    paired: set[str] | frozenset[str] = frozenset()
    squared: str | None = None
    lane_run = 1
    chunked: frozenset[str] = frozenset()

    @cached_property
    def users(self) -> dict[Value, list[Op]]:
        """The ops that read each value, once for each operand."""
        found: dict[Value, list[Op]] = {}
        for op in self.function.walk():
            for value in op.operands:
                found.setdefault(value, []).append(op)
        return found

    def choose(self, walk: Walk) -> WalkChoice:
        raise NotImplementedError("the model chooses")

    def allocate(self, value: Value, dtype: DType, axes: list[tuple[str, Capacity | int]],
                 apart: bool = False) -> Access:
        raise NotImplementedError("control gives scratch memory")

    def axis_loop(self, axis: str, count: int, lane: bool, carried: Carried,
                  body: Callable[[Carried], Carried], within: Open | None = None,
                  tails: tuple[int, ...] | None = None, again: bool = False) -> Carried:
        """Run `body` with `axis` bound to each piece of its open extent, or of a range within it, threading carried
        values through. tails: how many rows at once of what is left, powers of two, before single ones. again: of
        lanes, nothing is carried, and what is left of whole vectors may be done with its neighbours once more."""
        o = self.open[axis] if within is None else within
        step = count * self.lanes if lane else count
        if isinstance(o.extent, int):
            whole = o.extent // step * step
            if whole:
                if whole == step:
                    carried = self._bind(axis, o.offset, count, lane, None, carried, body)
                else:
                    carried = self._loop(axis, o.offset, self.add(o.offset, whole), count, lane, False, carried, body)
            rest = o.extent - whole
            if rest:
                start = self.add(o.offset, whole)
                if not lane:
                    return self._bind(axis, start, rest, False, None, carried, body)
                if rest >= self.lanes:
                    carried = self._bind(axis, start, rest // self.lanes, True, None, carried, body)
                    start = self.add(start, rest // self.lanes * self.lanes)
                    rest %= self.lanes
                if rest and again and o.extent >= self.lanes:
                    carried = self._bind(axis, self.add(o.offset, o.extent - self.lanes), 1, True, None, carried, body)
                elif rest:
                    mask = self.emit(0, "mask_first", [self.value(rest)], MASK)
                    carried = self._bind(axis, start, 1, True, mask, carried, body)
            return carried
        stop = self.add(o.offset, o.extent)
        if o.divisor % step == 0:
            return self._loop(axis, o.offset, stop, count, lane, False, carried, body)
        whole_end = self.add(o.offset, self.sub(o.extent, self.scalar("s_mod", o.extent, step)))
        carried = self._loop(axis, o.offset, whole_end, count, lane, False, carried, body)
        start = whole_end
        if lane and again:
            self._last_vectors(axis, start, stop, o, body)
            return []
        if lane:
            return self._loop(axis, start, stop, 1, True, o.divisor % self.lanes != 0, carried, body)
        for size in ((4,) if count > 8 else ()) if tails is None else tails:
            end = self.add(start, self.scalar("s_and", self.sub(stop, start), -size))
            carried = self._loop(axis, start, end, size, False, False, carried, body)
            start = end
        if count > PAIR and axis in self.paired and tails is None:
            even_end = self.add(start, self.scalar("s_and", self.sub(stop, start), -PAIR))
            carried = self._loop(axis, start, even_end, PAIR, False, False, carried, body)
            start = even_end
        if count > 1:
            carried = self._loop(axis, start, stop, 1, False, False, carried, body)
        return carried

    def _last_vectors(self, axis: str, start: Scalar, stop: Scalar, o: Open,
                      body: Callable[[Carried], Carried]) -> None:
        """What is left of an axis across the lanes: whole vectors, and the last one that there is, part of which was
        done before. Less than a vector takes a mask."""
        whole = self.add(start, self.scalar("s_and", self.sub(stop, start), -self.lanes))
        self._loop(axis, start, whole, 1, True, False, [], body)
        if o.divisor % self.lanes == 0:
            return
        extent = self.value(o.extent)
        long = self.emit(self.depth_of(extent), "s_cmp", [extent, self.value(self.lanes)], S64, cond="ge")
        left = self.emit(self._depth_of_all(whole, stop), "s_cmp", [self.value(whole), self.value(stop)], S64,
                         cond="lt")
        both = self.emit(self._depth_of_all(long, left), "s_and", [long, left], S64)
        last = self.sub(stop, self.lanes)
        first = self.emit(self._depth_of_all(both, last, stop), "s_select",
                          [both, self.value(last), self.value(stop)], S64)
        self._loop(axis, first, stop, 1, True, False, [], body)
        short = self.emit(self._depth_of_all(long, whole, stop), "s_select",
                          [long, self.value(stop), self.value(whole)], S64)
        self._loop(axis, short, stop, 1, True, True, [], body)

    def _depth_of_all(self, *scalars: Scalar) -> int:
        return max(map(self.depth_of, scalars))

    def parted_loop(self, axis: str, count: int, carried: Carried, body: Callable[[Carried], Carried]) -> Carried:
        """Run `body` with `axis` bound to `count` coordinates of its open extent, which is parted among them: the next
        ones are their neighbours. What is left is taken one by one. Values are threaded through."""
        o = self.open[axis]
        part = self.scalar("s_floordiv", o.extent, count)
        carried = self._loop(axis, o.offset, self.add(o.offset, part), count, False, False, carried, body, part)
        taken = self.add(o.offset, self.mul(part, count))
        return self._loop(axis, taken, self.add(o.offset, o.extent), 1, False, False, carried, body)

    def parted_lanes(self, axis: str, count: int, parts: int, body: Callable[[Carried], Carried]) -> None:
        """The same of an axis across the lanes, carrying nothing: `count // parts` vectors of each of so many parts. Of
        what is left as many vectors are taken at once."""
        o, vectors = self.open[axis], count // parts
        width = vectors * self.lanes
        part = self.mul(self.scalar("s_floordiv", o.extent, parts * width), width)
        self._loop(axis, o.offset, self.add(o.offset, part), count, True, False, [], body, part, parts)
        taken = self.mul(part, parts)
        self.axis_loop(axis, vectors, True, [], body, replace(
            o, offset=self.add(o.offset, taken), extent=self.sub(o.extent, taken), divisor=gcd(o.divisor, width)))

    def _loop(self, axis: str, start: Scalar, stop: Scalar, count: int, lane: bool, masked: bool, carried: Carried,
              body: Callable[[Carried], Carried], apart: Scalar = 1, parts: int = 1) -> Carried:
        block = Block([S64, *[v.type for v in carried]])
        start_value, stop_value = self.value(start), self.value(stop)
        self.enter(block)
        counter = block.arguments[0]
        mask = None
        if masked:
            mask = self.emit(self.depth, "mask_first", [self.value(self.sub(stop, counter))], MASK)
        outer = self.bound.get(axis)
        step = count // parts * self.lanes if lane else count if apart == 1 else 1
        self.steps[counter] = start, step
        self.bound[axis] = Bound(counter, count, lane, mask, self.depth, stop=stop,
                                 run=self._run_of_piece(count, lane, mask), apart=apart, parts=parts)
        results = body(list(block.arguments[1:]))
        self._restore(axis, outer)
        self.effect("yield", results)
        self.leave()
        op = Op("loop", [start_value, stop_value, *carried], [v.type for v in carried], {"step": step, "label": axis},
                [block], self.location)
        self.finish(op)
        return list(op.results)

    def _bind(self, axis: str, offset: Scalar, count: int, lane: bool, mask: Value | None, carried: Carried,
              body: Callable[[Carried], Carried], narrow: bool = False, apart: Scalar = 1) -> Carried:
        """One piece without a loop. It gets a level of its own in the same block, with its own memo."""
        self.enter_again()
        outer = self.bound.get(axis)
        self.bound[axis] = Bound(offset, count, lane, mask, self.depth, narrow=narrow,
                                 run=self._run_of_piece(count, lane, mask), apart=apart)
        results = body(carried)
        self._restore(axis, outer)
        self.leave()
        for value in results:
            self.depths[value] = min(self.depths.get(value, 0), self.depth)
        return results

    def _run_of_piece(self, count: int, lane: bool, mask: Value | None) -> int:
        """None where lanes may be off."""
        return self.lane_run if lane and mask is None and count % self.lane_run == 0 else 1

    def _restore(self, axis: str, outer: Bound | None) -> None:
        if outer is None:
            del self.bound[axis]
        else:
            self.bound[axis] = outer

    def counted(self, label: str, start: Scalar, stop: Scalar, step: int, body: Callable[[Value], None]) -> None:
        """A loop that carries nothing."""
        block = Block([S64])
        first, last = self.value(start), self.value(stop)
        self.steps[block.arguments[0]] = start, step
        self.enter(block)
        body(block.arguments[0])
        self.effect("yield", [])
        self.leave()
        self.finish(Op("loop", [first, last], (), {"step": step, "label": label}, [block], self.location))

    def _coordinates(self, axes: tuple[str, ...]) -> list[dict[str, int]]:
        if prod(self.bound[axis].count for axis in axes) > MOST_VALUES:
            raise too_many_values()
        points: list[dict[str, int]] = [{}]
        for axis in axes:
            points = [{**p, axis: j} for p in points for j in range(self.bound[axis].count)]
        return points
