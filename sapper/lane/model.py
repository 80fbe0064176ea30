"""The analytic model: lane axis, register factors, loop order and staging of a walk, from facts of the target.

Everything here is a default that a `Schedule` overrides. The rules, in short: the lane axis is the one along which
most accesses are contiguous; accumulators of a contraction fill the vector registers (register_factors.py); operands
that are read again and again are staged; results too large for the caches are stored past them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cached_property
from math import gcd, prod
from typing import TYPE_CHECKING, Any

from ..ir.nodes import Block, Op, Value
from ..ir.types import TileType, bf16, bool_, f32, i8, u8
from ..tile.ops import memory_of
from ..tile.plan import Walk, axes_of
from ..tile.schedule import Panels, ScheduleError
from ..tile.sums import is_join
from .axis_loops import WalkChoice
from .by_hand import Fit, fit
from .kept_operands import KeptOperands
from .packed import DOT2_BF16, FMA2_BF16, Dot, Packing, Term, dot_for, load_behind, slot_loads
from .places import goes_by_places
from .prefetches import FEW_ROWS, LINE_BYTES
from .register_factors import (
    ADDRESSED_ROWS,
    DEEP,
    FEW_AT_ONCE,
    LANE_BYTES,
    MUCH_ARITHMETIC,
    SINGLE_DEPTH_ROWS,
    SLOT_BYTES,
    STAGE_ROWS,
    UNROLLED_INSTRUCTIONS,
)
from .staging import WIDE_ROW_BYTES
from .state import PAIR, Scalar, element_bytes
from .tile_blocks import fit as fit_blocks
from .tile_fit import ACROSS, TileWalk, dot_of, fewest_rows, is_worth
from .tile_fit import fit as fit_tiles
from .tile_slots import fit as fit_slots

if TYPE_CHECKING:
    from .extents import Range

PAIR_COST = 2.0
"""Of an access to every second element, of which another one takes the others: a row, and a permutation."""

DEPTH_BLOCKS = 8
"""How many blocks of a panel's depth, which few rows meet one after the other, half of the second cache holds."""

PLACE_STEPS = 8
"""Steps of each place of a panel's depth in such a block, where rows meet it from several (Requests.panel_parts)."""

NEAR_ROWS = 8
"""Rows of near memory that are read before the first is used: such a read takes some thirty cycles."""

SHARED_SET_ROWS = 4
"""Rows of a matrix that many others meet, read at once where they lie: those a multiple of 4 KiB apart share a set of
the first cache, which has eight lines or so, and the other operand and what is asked for ahead pass through it too.
Measured on a Zen 3, f32, six rows in place and copied, GFLOP/s of 100: rows of 1024, 128 x 576 and 1024 x 1024, 46 and
69, 58 and 89; rows of 1000 and 256 equal within the noise."""


class Model(KeptOperands):
    """streaming_loops: the loops at hand that are not parallel, from the outside inwards, each with its range."""

    streaming_loops: list[tuple[Block, Range]]

    @cached_property
    def readers(self) -> Counter[Value]:
        """How many loads read each tensor."""
        return Counter(memory_of(op.operands[0]) for op in self.function.walk() if op.name == "load")

    # The choice.

    def choose(self, walk: Walk) -> WalkChoice:
        loops = [a for a in walk.axes if a in self.open]
        bound_lane = next((a for a in walk.axes if a in self.bound and self.bound[a].lane), None)
        contraction = any(r.name == "contract" for r in walk.reductions)
        lane = bound_lane
        panels = self._panels(walk)
        if panels:
            lane = self._columns(panels)
            if bound_lane not in (None, lane):      # a nest around has the lanes, and a vector has but one axis
                self._refuse_panels(panels)
        elif lane is None and loops:
            # A slot's neighbours are to come from two rows.
            free = [a for a in loops if a not in self.paired_axes(walk)]
            lane = self.schedule.lane if self.schedule.lane in free else None
            if lane is None and free:
                lane = self._lane(walk, free, contraction)
        bound = None if bound_lane is None else (
            fit_blocks(self, walk, bound_lane) or fit_slots(self, walk, bound_lane))
        if bound is not None:
            return WalkChoice(lane, {bound.rows: self.lanes}, [bound.rows], list(walk.reduced), bound=bound)
        by_hand = self._micro_kernel(walk, lane)

        def smaller() -> WalkChoice:
            self.typical = False
            choice = self._choose_vectors(walk, loops, lane, contraction, by_hand)
            self.typical = True
            return choice

        tiles = self._tiles(walk, lane) if by_hand is None else None
        if tiles is None:
            choice = self._choose_vectors(walk, loops, lane, contraction, by_hand)
            if choice.column_block and len(choice.order) > 1 and choice.packing is None and (
                    self.requests.rows_end_to_end) and (
                    self.least_rows(choice.order[1]) <= FEW_AT_ONCE < self.rows_hint(choice.order[1])):
                choice.few, choice.fewest = self._end_to_end(choice, FEW_AT_ONCE), FEW_AT_ONCE + 1
            if choice.reduced == [lane] and len(choice.order) == 2 and all(isinstance(r, Op) for r in walk.after) and (
                    self._few_together(choice.order)) and self.least_rows(choice.order[1]) <= FEW_AT_ONCE:
                choice.few, choice.fewest = smaller(), FEW_AT_ONCE + 1
            if choice.blocked and choice.depth_block:
                choice.few = smaller()
                elements = 1 if choice.packing is None else choice.packing.dot.elements
                choice.few_axis, choice.fewest = choice.reduced[0], DEEP * choice.depth_block * elements
            return choice
        choice = self._choose_tiles(walk, tiles)
        if self._may_be_few(walk, tiles):
            choice.few = self._choose_vectors(walk, loops, lane, contraction, None)
            choice.fewest = fewest_rows(self, tiles)
        return choice

    def _choose_vectors(self, walk: Walk, loops: list[str], lane: str | None, contraction: bool,
                        by_hand: Fit | None) -> WalkChoice:
        panels = self._panels(walk)
        packing = self._packing(walk, lane) if by_hand is None or by_hand.piece.elements > 1 else None
        if panels and {1 if packing is None else packing.dot.elements} != {p.elements for p in panels.values()}:
            packing = None if all(p.elements == 1 for p in panels.values()) else self._refuse_panels(panels)
        with self.packed(packing):
            choice = self._choose(walk, loops, lane, contraction, by_hand)
        if packing is not None:
            if self._serves(packing, lane, choice.staged):
                choice.packing = packing
                choice.errors_first = self._errors_first(packing, choice)
            elif panels:
                self._refuse_panels(panels)
            else:
                choice = self._choose(walk, loops, lane, contraction, None)
        choice.run = self._fit_run(walk, choice, lane)
        rows = [a for a in choice.order if a != lane and a not in self.schedule.registers]
        if lane is not None and rows and any(value in self.buffers and self.buffers[value].near
                                             for value in self._kept_values(walk)):
            instructions = choice.counts[lane] * max(1, self.costs(walk, set()))
            most = min(NEAR_ROWS // choice.counts[lane], UNROLLED_INSTRUCTIONS // 4 // instructions)
            choice.counts[rows[-1]] = self._fit(rows[-1], max(1, most), False)
        return choice

    def _errors_first(self, packing: Packing, choice: WalkChoice) -> str | None:
        """The axis of few rows that meet many, in dot products along the lanes or in blocks of a matrix [in, out], if
        what the products of each are too large by is best summed before: once, not for each piece of the many."""
        along = choice.reduced == [choice.lane] or choice.column_block
        if len(choice.order) != 2 or not along or choice.by_hand is not None:
            return None
        many, few = choice.order
        for contraction, term in packing.terms.items():
            if term.turned is None:
                return None
            straight = contraction.operands[1 - term.turned]
            if set(axes_of(straight)) != {few, *choice.reduced}:
                return None
        several = self.open[few].extent != 1 and self.extent_hint(few) > 1
        again = self.extent_hint(many) >= STAGE_ROWS * choice.counts[many]
        return few if several and again and self.is_bounded(few) else None

    def _fit_run(self, walk: Walk, choice: WalkChoice, lane: str | None) -> int:
        """The run of a walk; the register factor of its lane axis becomes a multiple of it, but for one that the
        schedule asks for, or that many sums have."""
        run = 1 if choice.by_hand is not None or choice.packing is not None or choice.blocked or choice.staged \
            or self.behind is not None else self.run_of(walk, lane)
        if run > 1:
            assert lane is not None
            sums = lane in walk.outer and any(op.name == "contract" for op in walk.reductions)
            if lane in self.schedule.registers or sums:
                return gcd(run, choice.counts[lane])
            choice.counts[lane] = -(-choice.counts[lane] // run) * run * self._runs_at_once(walk, choice, lane, run)
        return run

    def _runs_at_once(self, walk: Walk, choice: WalkChoice, lane: str, run: int) -> int:
        """Two where registers hold what is read by them: twice as much is then under way, and an address of 64 bits,
        which takes two additions, serves for two runs, as the distance to the second is a constant."""
        o = self.open[lane]
        most = o.capacity.constant if o.capacity is not None and not o.capacity.dims else self.extent_hint(lane)
        if min(most, self.extent_hint(lane)) < 2 * run * self.lanes or choice.counts[lane] > run:
            return 1
        others = prod(count for axis, count in choice.counts.items() if axis != lane)
        read = sum(element_bytes(self.access(op).dtype) for op in self.reads(walk) if lane in self.access(op).axes)
        return 2 if 2 * run * others * read <= self.facts.vector_registers * f32.size_bytes else 1

    def _tiles(self, walk: Walk, lane: str | None) -> TileWalk | None:
        """How tile registers serve a walk, where they are worth it or the schedule asks for them. Their columns lie
        across the lanes: where results are contiguous, if nothing says which axis that is."""
        wanted = self.schedule.matrix
        if not wanted and (wanted is False or self.facts.tiles is None):
            return None
        if not any(r.name == "contract" for r in walk.reductions):
            return None
        says_more = self.schedule.order or self.schedule.stage is not None
        if not wanted and (says_more or self.schedule.registers.keys() & set(walk.axes)):
            return None     # it speaks of vectors
        fixed = self._panels(walk) or self.schedule.lane is not None
        free = [axis for axis in walk.outer if axis not in self.paired_axes(walk)]
        candidates = [lane] if fixed else sorted(free, key=lambda axis: not self._results_lie_along(walk, axis))
        reasons = []
        for columns in candidates:
            found = fit_tiles(self, walk, columns or "")
            if isinstance(found, str):
                reasons.append(found)
            elif wanted or (is_worth(self, found) and (
                    not found.parted or fixed or self._results_lie_along(walk, columns or ""))):
                return found
        if wanted and reasons:
            raise ScheduleError(f"schedule of {self.function.name}: matrix = true, but {reasons[0]}; mend: leave it "
                                "out, and the model takes matrix instructions where they serve")
        return None

    def tile_rows(self, axis: str) -> int:
        """How many rows a task takes at once where contractions over an axis may run on tile registers; 0 where none
        does."""
        unit = self.facts.tiles
        if unit is None or self.schedule.matrix is False:
            return 0
        products = [[v.type.dtype for v in (*op.operands, op.result)] for op in self.function.walk()  # type: ignore[union-attr]
                    if op.name == "contract" and axis in axes_of(op.result)]
        return ACROSS * unit.size if any(dot_of(unit, *product) is not None for product in products) else 0

    def _may_be_few(self, walk: Walk, found: TileWalk) -> bool:
        """Whether a walk on tile registers has code for fewer rows besides, as many as its class of extents has too."""
        rows = self.open[found.rows]
        typical = not isinstance(rows.extent, int) and rows.hint <= FEW_ROWS and rows.divisor < FEW_ROWS
        return typical and not self.schedule.matrix and all(isinstance(root, Op) for root in walk.after)

    def _results_lie_along(self, walk: Walk, axis: str) -> bool:
        stores = [self.access(root) for root in walk.after if isinstance(root, Op)]
        return any(access.axes.get(axis) == element_bytes(access.dtype) for access in stores)

    def _choose_tiles(self, walk: Walk, found: TileWalk) -> WalkChoice:
        unit = self.facts.tiles
        assert unit is not None
        counts = {found.rows: ACROSS * unit.size, found.columns: ACROSS // len(walk.reductions), found.depth: 1}
        staged = [] if found.within is not None or found.kept else list(found.rights)
        packed = {op: panels for op in staged if (panels := self.panels_of(op)) is not None}
        joined = [op for op, panels in packed.items() if panels.elements != found.dot.elements]
        return WalkChoice(found.columns, counts, [found.columns, found.rows], [found.depth], staged,
                          packing=found.packing(self, walk), blocked=True, widened=joined, tiles=found)

    def _panels(self, walk: Walk) -> dict[Op, Panels]:
        """The loads of packed tensors that a walk contracts."""
        found = {}
        for reduction in walk.reductions:
            for value in reduction.operands if reduction.name == "contract" else ():
                load = load_behind(value)
                panels = self.panels_of(load) if load is not None else None
                if load is not None and panels is not None:
                    columns, depth = self._panel_axes(load, panels)
                    if walk.reduced != (depth,) or depth not in self.open or columns not in self.open:
                        self._refuse_panels({load: panels})
                    if panels.elements > 1 and self.open[depth].offset != 0 and (
                            self.sequential_tiles.get(depth, 1) % panels.elements
                            or load.result.type.dtype in (i8, u8)):  # type: ignore[union-attr]
                        self._refuse_panels({load: panels})     # a piece ends in a slot, or has no sum of its own
                    found[load] = panels
        return found

    def _columns(self, panels: dict[Op, Panels]) -> str:
        """The lane axis: that of the columns of all panels."""
        axes = {self._panel_axes(op, p)[0] for op, p in panels.items()}
        if len(axes) > 1:
            self._refuse_panels(panels)
        return axes.pop()

    def _held_counts(self, walk: Walk, loops: list[str], lane: str | None, contraction: bool, by_hand: Fit | None,
                     panels: dict[Op, Panels]) -> dict[str, int]:
        """How much of each axis is held at once (vectors of the lane axis), as the schedule, a micro-kernel, squares of
        registers, pairs and panels have it."""
        counts = self._counts(walk, loops, lane, contraction)
        if by_hand is not None and lane is not None:
            counts |= {by_hand.rows: by_hand.piece.rows[0], lane: by_hand.piece.vectors[0]}
        for root in walk.roots():
            filling = self.filling_axis(root, lane) if isinstance(root, Op) and root.name == "store" else None
            if filling is not None and filling in loops:
                counts[filling] = self.extent_hint(filling)
        for axis in loops:
            forced = self.schedule.registers.get(axis)
            if forced is not None:
                counts[axis] = forced
        for op in (*self.reads(walk), *(r for r in walk.inner if isinstance(r, Op))):
            square = self._squared(walk, op, loops, lane)
            if square is not None:
                counts |= {axis: self.lanes if axis == square else 1 for axis in loops}
        for axis in self.paired_axes(walk) & set(loops):
            counts[axis] = max(PAIR, counts[axis] // PAIR * PAIR)
        for found in panels.values():
            assert lane is not None
            counts[lane] = gcd(counts[lane], found.width // self.lanes)
        if by_hand is not None and by_hand.piece.left == "blocks" and by_hand.depth in counts:
            counts[by_hand.depth] = gcd(counts[by_hand.depth], self.lanes)  # of tiles at the edges: no step crosses two
        return counts

    def _choose(self, walk: Walk, loops: list[str], lane: str | None, contraction: bool,
                by_hand: Fit | None) -> WalkChoice:
        panels = self._panels(walk)
        counts = self._held_counts(walk, loops, lane, contraction, by_hand, panels)
        order = self._order(walk, [a for a in loops if a in walk.outer], lane, contraction)
        reduced = [a for a in walk.reduced if a in loops]
        reduced.sort(key=lambda a: a == lane)
        if by_hand is not None:
            staged = [op for op in by_hand.staged if op not in panels]
        else:
            staged = self._staged(walk, lane, counts, order, contraction)
        staged_panels = any(lane in axes_of(op.result) for op in staged)
        widened = [op for op in staged if op in panels]
        staged += [op for op in panels if op not in staged]
        if not panels:
            prefetched = self._prefetched(walk, lane, counts, order, reduced)
        else:
            prefetched = [op for op in panels if self.facts.software_prefetch and op not in widened]
        blocked = self._blocks(walk, lane, counts, order, staged)
        rows_here = [op for op in staged if lane not in axes_of(op.result) and not self.is_bounded(order[-1])]
        if not blocked:
            staged = [op for op in staged if op not in rows_here]
        # Rows that all lanes meet at once come from memory once, in turns with arithmetic if nobody asks for them.
        once = self.facts.software_prefetch and lane in self.bound and len(order) == 1
        rows_ahead = self._rows_ahead(walk, order[-1], staged) if (blocked or once) and by_hand is None else []
        if not rows_ahead and by_hand is None and len(order) == 2 and self._is_one_piece(lane, counts):
            rows_ahead = [op for op in self._rows_ahead(walk, order[1], staged)
                          if self.is_contiguous(self.access(op), order[1], walk.reduced[0])]
        asked: dict[str, Any] = {} if by_hand is not None else {
            "tile_ahead": self._tile_ahead(walk, order, reduced),
            "rows_later": self._rows_later(lane, counts, order, reduced),
            "reread": self._reread(lane, counts, order, reduced, staged),
            "rows_again": self._rows_again(walk, lane, counts, order, reduced),
            "panels_again": self._panels_again(walk, lane, order, reduced)}
        asks = blocked and by_hand is None and not self.is_shallow(order[1])
        block_ahead = self._block_ahead(lane, counts, reduced, staged) if asks else []
        row_pieces = 1 if by_hand is not None or widened else self._row_pieces(lane, counts, order, panels)
        deep = blocked and by_hand is None and not rows_here and self._is_deep(lane, counts, reduced, staged)
        depth_block = column_block = 0
        if blocked and by_hand is None and not rows_here and lane is not None and (
                steps := self.depth_in_blocks(walk, order[1], lane)):
            depth_block, deep, block_ahead = steps, False, []
        joined_once: list[Op] = []
        if row_pieces > 1:
            blocked, deep, block_ahead, rows_ahead = False, False, [], []
            counts[order[-1]] = self.open[order[-1]].divisor // row_pieces
            step_bytes = sum(found.width * found.elements * element_bytes(self.access(op).dtype)
                             for op, found in panels.items())
            depth_block = max(1, self.block_bytes // DEPTH_BLOCKS // step_bytes // self.lanes) * self.lanes
            if self.requests.panel_parts:
                depth_block = PLACE_STEPS * self.requests.panel_parts
        few = order[1] if len(order) == 2 else None
        if lane is not None and order[:1] == [lane] and len(order) <= 2 and not staged_panels and (
                self.reads_in_blocks(walk, few, lane)):
            prefetched = self.matrices(walk, lane)
            if few is not None and self.slot_elements == SLOT_BYTES and self.least_rows(few) > counts[few]:
                joined_once = prefetched
            depth_block, column_block = self._block_of_weights(few, lane, counts[lane] * self.lanes)
        parted = self._parted(walk, lane, counts, order, prefetched)
        joint, rolled = (self._joint(walk, lane, counts, order), self._rolled(walk, lane, counts, order)) \
            if parted is None else (None, None)
        choice = WalkChoice(lane, counts, order, reduced, staged, prefetched, joint, rolled,
                            by_hand=by_hand, widened=widened, blocked=blocked, deep=deep, rows_here=rows_here,
                            rows_ahead=rows_ahead, block_ahead=block_ahead, **asked, parted=parted,
                            depth_block=depth_block, row_pieces=row_pieces, column_block=column_block,
                            joined_once=joined_once)
        if column_block and self.rows_end_to_end(few):
            return self._end_to_end(choice, 1 if few is None else self.rows_hint(few))
        return self._depth_from_places(walk, self._panels_in_parts(self._from_places(choice, panels), panels))

    def _block_of_weights(self, few: str | None, lane: str, width: int) -> tuple[int, int]:
        """Of weights that lie [depth, columns] and few rows meet: steps of the depth in a block, and columns that meet
        it before any meets the next. width: columns held at once."""
        single = (few is None or self.rows_hint(few) == 1) and self.extent_hint(lane) > width
        room_bytes = self.block_bytes // 2 // FEW_ROWS
        if single:
            # Long pieces of rows: where each block has all 4096 columns, not 2048, one row of bf16 by 4096 x 4096
            # takes 2.10 ms on a Zen 3 in place of 2.73, of f32 3.60 in place of 3.85.
            room_bytes = max(room_bytes, self.near_bytes // 2)
        depth_block = (SINGLE_DEPTH_ROWS if single else self.rows_of_block) // self.slot_elements
        return depth_block, max(1, room_bytes // (LANE_BYTES * width)) * width

    def _panels_in_parts(self, choice: WalkChoice, panels: dict[Op, Panels]) -> WalkChoice:
        """Packed panels that few rows meet, from several places of their depth at a time (Requests.panel_parts): a step
        of each adds to the same sums. Measured on a Granite Rapids, one thread, 4096 x 4096 from memory, of the time as
        one stream, by 3, 4, 5 and 8 parts: f32 of 2 rows 0.81, 0.86, 0.81 and 0.87, 4 rows 0.81, 0.90, 0.81 and 0.87,
        8 rows 0.77, 0.84, 0.72 and 0.79, 12 and 16 rows by 3 and 5 0.79 and 0.74, 0.98 and 0.91; bf16 by bf16 of 4 rows
        0.74, 0.86, 0.78 and 0.86, i8 0.96, 0.99, 0.96 and 1.00. Parts a power of two apart share the sets of the first
        cache."""
        lane, parts, order = choice.lane, self.requests.panel_parts, choice.order
        if not panels or not parts or choice.parts > 1 or choice.by_hand or choice.widened or self.bound:
            return choice
        rows = order[1:]
        if order[:1] != [lane] or len(rows) > 1 or any(self.rows_hint(axis) > FEW_ROWS for axis in rows):
            return choice
        if len(choice.reduced) != 1 or choice.reduced[0] in self.sequential_tiles:
            return choice
        return replace(choice, counts={**choice.counts, choice.reduced[0]: parts}, depth_parts=parts)

    def _from_places(self, choice: WalkChoice, panels: dict[Op, Panels]) -> WalkChoice:
        """Packed panels that a single row meets, from as many places at a time as the target says, where the processor
        follows these by itself (Requests.row_streams). Measured on a Zen 3, from memory, in GB/s by one stream and so,
        one thread and two: f32 of 4096 x 4096 16.4, 25.4 and 25.8, 42.6; bf16 17.1, 21.8 and 25.6, 35.5; i8 17.0, 21.7
        and 25.8, 28.4; of 1536 x 576 16.7, 25.2, bf16 18.6, 20.6, i8 15.9, 19.3."""
        lane = choice.lane
        places = self.requests.panel_streams or self.requests.short_row_streams
        parts = 1 if self.requests.again else places // max(1, len(panels))
        if lane is None or not panels or parts < 2 or choice.order[:1] != [lane] or choice.by_hand or choice.widened:
            return choice
        single = all(self.bound[a].count == 1 if a in self.bound else self.extent_hint(a) == 1
                     for a in (*self.bound, *choice.order[1:]))
        if not single or any(found.width != choice.counts[lane] * self.lanes for found in panels.values()):
            return choice
        asked = list(panels) if self.requests.places_ahead_bytes else []
        return replace(choice, counts={**choice.counts, lane: choice.counts[lane] * parts}, parted=lane, parts=parts,
                       prefetched=asked, staged=list(panels), rows_here=[], blocked=False, deep=False, block_ahead=[])

    def _depth_from_places(self, walk: Walk, choice: WalkChoice) -> WalkChoice:
        """Rows of a matrix, one after the other in memory, each of which is a term of the sums for a single row: from
        as many places of the depth at a time, where the processor follows these by itself. Measured on a Zen 3, 6 of
        18 matrices of 768 x 1024 in panels of 32, from memory, in GB/s as one stream and so, one thread and two: f32
        16.6, 22.0 and 27.0, 30.5; bf16 15.4, 18.4 and 25.5, 29.0. Where memory is best read line by line, each of them
        is asked for (_prefetch_part): on a Granite Rapids such take 0.93 of the time as one stream in f32 and 0.98 in
        bf16 without, 0.91 and 0.91 with requests 512 bytes ahead, 0.93 and 0.97 1 KiB ahead; gate and up of 1024 x 768
        0.99 and 1.13, 0.96 and 0.95, 0.98 and 1.00."""
        lane, parts = choice.lane, 1 if self.requests.again else (
            self.requests.short_row_streams // max(1, len(choice.prefetched)))
        if lane is None or parts < 2 or not choice.prefetched or choice.order != [lane] or choice.by_hand:
            return choice
        if lane not in walk.outer or len(choice.reduced) != 1 or choice.depth_block or choice.packing:
            return choice
        (depth,) = choice.reduced
        single = all(bound.count == 1 for bound in self.bound.values())
        if not single or depth in self.sequential_tiles or not all(
                self.is_whole_rows(self.access(op), depth, lane) for op in choice.prefetched):
            return choice
        asked = choice.prefetched if self.requests.line_by_line and self.requests.places_ahead_bytes else []
        return replace(choice, counts={**choice.counts, depth: parts}, depth_parts=parts, prefetched=asked)

    def _end_to_end(self, choice: WalkChoice, most: int) -> WalkChoice:
        """A matrix [in, out] that is read in blocks, of few rows from end to end (Requests.rows_end_to_end), as far as
        there is room for the sums of so many vectors. The longer the better: one of f32 by 14336 x 2048 takes 5.8 ms on
        a Zen 3 by all columns, 6.1 by 4096 at a time."""
        assert choice.lane is not None
        width = choice.counts[choice.lane] * self.lanes
        columns = max(1, self.block_bytes // 4 // most // (LANE_BYTES * width)) * width
        rows, parts = max(1, self.requests.rows_end_to_end // self.slot_elements), self.requests.row_streams
        if most > 1 or not self.parts_depth or rows < parts:
            return replace(choice, depth_block=rows, column_block=columns)
        return replace(choice, depth_block=parts, depth_parts=parts, column_block=columns, prefetched=[])

    def _row_pieces(self, lane: str | None, counts: dict[str, int], order: list[str], panels: dict[Op, Panels]) -> int:
        """Into how many pieces few rows are parted that meet a block of packed panels' depth before any meets the next;
        1 where the registers hold the sums of all of them, or nobody knows how many there are. Else the first rows meet
        a panel at the speed of memory, and those that are left meet it again, as it comes from the second cache, and
        memory rests. Measured on a Zen 5, 16 rows by 4096 x 4096 from memory, 14 and 2 rows after each other and twice
        8, in percent of the peak: f32 80 and 90, bf16 88 and 99, i8 83 and 90; on a Zen 4 90 and 92, 88 and 90, 88 and
        91. By blocks of 128 and 256 steps, in place of 512, on a Zen 5 1 % less, and as much where they are asked for
        into the second cache. Where half of them does not fit the registers they stay as they are, but where there are
        16 registers: there a third or a quarter of them will do. On a Zen 3, 16 rows of f32, six at a time and four
        times four, in ms: 9.53 and 7.53; of bf16, which is bound by arithmetic, as long. Where panels come from several
        places of their depth (Requests.panel_parts) a block is PLACE_STEPS of each, which the first cache keeps: on a
        Granite Rapids 16 rows of f32 take 0.74 to 0.78 of the time of 8 rows and 8 by all of a panel, by blocks of 16
        or 32 steps 0.78 to 0.86."""
        if not self.facts.software_prefetch:
            return 1
        if len(order) != 2 or order[0] != lane or any(axis in self.schedule.registers for axis in order):
            return 1
        if not panels or any(found.width != counts[lane] * self.lanes for found in panels.values()):
            return 1
        rows = self.open[order[1]]
        if not rows.hint <= rows.divisor <= FEW_ROWS or rows.divisor % 2:
            return 1
        most = counts[order[1]]
        if most >= rows.divisor or (rows.divisor > 2 * most and not self.sixteen_registers):
            return 1
        return next((n for n in (2, 3, 4) if rows.divisor % n == 0 and rows.divisor // n <= most), 1)

    def _block_ahead(self, lane: str | None, counts: dict[str, int], reduced: list[str], staged: list[Op]) -> list[Op]:
        """The operands of which a block of panels is copied from whole rows, one after the other, in memory."""
        if lane is None or len(reduced) != 1 or LINE_BYTES % counts[reduced[0]]:
            return []
        return [op for op in staged if lane in axes_of(op.result) and self.panels_of(op) is None
                and list(self.access(op).axes) == [lane, reduced[0]] and not self.access(op).gathers
                and self.is_whole_rows(self.access(op), lane, reduced[0])]

    def _reread(self, lane: str | None, counts: dict[str, int], order: list[str], reduced: list[str],
                staged: list[Op]) -> list[Op]:
        """The operands that come from the second cache again and again, as many rows meet panels that fill more than
        half of the first (Requests.reread_ahead_bytes)."""
        if not self.requests.reread_ahead_bytes or lane is None or order[-1:] in ([], [lane]) or len(reduced) != 1:
            return []
        panel_bytes = self.extent_hint(reduced[0]) * counts.get(lane, 1) * self.lanes * sum(
            self.operand_dtype(op).size_bytes for op in staged if lane in axes_of(op.result))
        return staged if self.extent_hint(order[-1]) >= STAGE_ROWS and panel_bytes > self.near_bytes // 2 else []

    def _panels_again(self, walk: Walk, lane: str | None, order: list[str], reduced: list[str]) -> list[Op]:
        """The loads of a panel's vectors, one step of the depth after the other in memory, in a nest that holds the
        lanes and some rows, each piece of which meets all of the panel (Requests.reread_ahead_bytes). Measured on a
        Cascade Lake, panels of pairs of bf16 by 128 rows of 7168 x 2048 and of 2048 x 7168, 0.76 to 0.83 and 0.82 to
        0.89 of the time; 2 KiB ahead as long. The rows beside them asked for as well, 1.04. By 16 rows, which meet
        panels from memory, 1, 2 and 4 KiB ahead, 0.86 and 0.94, 0.84 and 0.92, 0.83 and 0.84."""
        if not self.requests.reread_ahead_bytes or lane not in self.bound or order or not reduced or self.packing:
            return []
        rows = {a for a in walk.outer if not self.bound[a].lane and self.bound[a].hint > 1}
        found = []
        for op in self.reads(walk):
            access = self.access(op)
            per_lane, step = access.axes.get(lane), access.axes.get(reduced[0])
            if isinstance(per_lane, int) and isinstance(step, int) and rows - access.axes.keys() and (
                    not access.gathers and step == per_lane * self.lanes * self.bound[lane].count
                    and step % LINE_BYTES == 0):
                found.append(op)
        return found

    def _rows_again(self, walk: Walk, lane: str | None, counts: dict[str, int], order: list[str],
                    reduced: list[str]) -> list[Value]:
        """The operands of rows that lie one after the other, as values of a cache, of which each step takes a few
        elements for lanes that are held, if the first cache has no room for all of them beside what they meet
        (Requests.reread_ahead_bytes)."""
        if not self.requests.reread_ahead_bytes or lane not in self.bound or len(order) != 1 or len(reduced) != 1:
            return []
        (columns,), (rows,) = order, reduced
        found = []
        for value in dict.fromkeys(v for r in walk.reductions if r.name == "contract" for v in r.operands):
            access = self.access_of(value)
            if access is None or access.gathers or lane in access.axes or rows not in access.axes:
                continue
            size = element_bytes(access.dtype)
            if access.axes.get(columns) == size and counts[columns] * size <= LINE_BYTES and (
                    counts[columns] < self.extent_hint(columns)
                    and self.extent_hint(rows) * self.extent_hint(columns) * size > self.near_bytes // 4):
                found.append(value)
        return found

    def _squared(self, walk: Walk, op: Op, loops: list[str], lane: str | None) -> str | None:
        """The axis along which a load or store goes through squares of registers that are transposed."""
        square = None if walk.reductions else self.square_axis(op, self.access(op), lane)
        if lane is None or square not in loops or min(map(self.extent_hint, (square, lane))) < self.lanes:
            return None
        return square

    def _is_one_piece(self, lane: str | None, counts: dict[str, int]) -> bool:
        """Whether the vectors of one step hold all of a lane axis that is walked, and memory is asked for."""
        extent = self.open[lane].extent if lane in self.open else None
        fits = lane is not None and isinstance(extent, int) and extent <= counts[lane] * self.lanes
        return fits and self.facts.software_prefetch

    def _rows_ahead(self, walk: Walk, row_axis: str, staged: list[Op]) -> list[Op]:
        """The operands whose rows are read where they lie, each along itself, if there are many."""
        if self.extent_hint(row_axis) < STAGE_ROWS or len(walk.reduced) != 1:
            return []
        found = []
        for op in self.reads(walk):
            access = self.access(op)
            along = access.axes.get(walk.reduced[0]) == element_bytes(access.dtype)
            if op not in staged and along and row_axis in access.axes and not access.gathers:
                found.append(op)
        return found

    def _tile_ahead(self, walk: Walk, order: list[str], reduced: list[str]) -> list[Op]:
        """The loads of a tile of rows, one after the other in memory, that others meet as they lie in scratch memory:
        the next tile is asked for meanwhile, as the processor does not see it coming."""
        if not self.requests.row_streams or len(reduced) != 1 or not order or order[-1] not in self.sequential_tiles:
            return []
        found = []
        for load in filter(None, (load_behind(operand) for op in walk.reductions for operand in op.operands)):
            value = load.result
            if value in self.buffers and value not in self.slot_axes and axes_of(value) == (order[-1], reduced[0]):
                access = self.access(load)
                if not access.gathers and self.is_whole_rows(access, order[-1], reduced[0]):
                    found.append(load)
        return found

    def _rows_later(self, lane: str | None, counts: dict[str, int], order: list[str], reduced: list[str]) -> list[Op]:
        """The loads of rows, one after the other in memory, that another contraction in the body of a sequential loop
        meets in the same tile, as weights that are made of these scores meet values (Requests.reread_ahead_bytes): it
        reads a few elements of each row at a time, where the processor sees no stream."""
        if not self.requests.reread_ahead_bytes or lane not in self.bound or len(order) != 1 or len(reduced) != 1:
            return []
        (rows,), (depth,) = order, reduced
        if rows not in self.sequential_tiles or depth not in self.open or not self.streaming_loops:
            return []
        contractions = [op for op in self.streaming_loops[-1][0].ops if op.name == "contract"]
        read = Counter(load_behind(value) for op in contractions for value in op.operands)
        found = []
        for load in (load_behind(v) for op in contractions if rows in op.attributes["over"] for v in op.operands):
            axes = axes_of(load.result) if load is not None and read[load] == 1 else ()
            if load is None or len(axes) != 2 or axes[0] != rows or axes[1] not in self.open:
                continue
            if load.result not in self.buffers and self.is_contiguous(self.access(load), *axes) and (
                    self.share_of_rows(load, counts[rows], counts[depth], rows, depth)):
                found.append(load)
        return found

    def _blocks(self, walk: Walk, lane: str | None, counts: dict[str, int], order: list[str], staged: list[Op]) -> bool:
        """Whether panels are staged several at once, so that a few rows are read once for all of them. Not where a walk
        keeps what spans the lane axis: that is found by where it lies in all of the axis."""
        if len(order) != 2 or order[0] != lane or not self.facts.software_prefetch:
            return False
        values = [*(r for r in walk.roots() if isinstance(r, Value)), *self.buffers, *self.rows]
        if any(lane in v.type.axes for v in values if isinstance(v.type, TileType)):
            return False
        return (any(lane in op.result.type.axes for op in staged)  # type: ignore[union-attr]
                and self.extent_hint(lane) > counts[lane] * self.lanes)

    def _is_deep(self, lane: str | None, counts: dict[str, int], reduced: list[str], staged: list[Op]) -> bool:
        """Whether panels are so deep that two fill a block, and are copied from pieces of rows shorter than two lines,
        in which processors read: where vectors are short. Not from narrow elements, whose copy takes its time."""
        if lane is None or len(reduced) != 1 or self.packing is not None:
            return False
        width, found = counts[lane] * self.lanes, [op for op in staged if lane in axes_of(op.result)]
        size = element_bytes(self.operand_dtype(found[0]))
        depth_bytes = self.extent_hint(reduced[0]) * width * size * len(found)
        return 2 * depth_bytes >= self.block_bytes and all(
            self.panels_of(op) is None and element_bytes(self.access(op).dtype) == size
            and self.access(op).axes.get(lane) == size and width * size < WIDE_ROW_BYTES for op in found)

    def _micro_kernel(self, walk: Walk, lane: str | None) -> Fit | None:
        """The first micro-kernel that the schedule names and that fits; why the others do not is kept."""
        if not any(r.name == "contract" for r in walk.reductions):
            return None
        for key in self.contractions:
            found = fit(self, walk, lane, key)
            outer = [a for a in walk.outer if a in self.open]
            if isinstance(found, Fit) and self._order(walk, outer, lane, True)[0] != lane:
                found = f"the schedule's order does not have the lane axis {lane} outermost, where its panel is copied"
            if isinstance(found, Fit) and found.piece.elements > 1:
                packing = self._packing(walk, lane)
                if packing is None or packing.dot.elements != found.piece.elements:
                    found = f"no packed dot product of {found.piece.elements} elements serves this walk"
                elif any(term.turned is not None and lane in axes_of(op.operands[term.turned])
                         for op, term in packing.terms.items()):
                    found = "of few rows it is the other operand whose highest bits are inverted"
            if isinstance(found, Fit):
                return found
            self.refused.setdefault(key, found)
        return None

    def _packing(self, walk: Walk, lane: str | None) -> Packing | None:
        """How a walk of contractions of narrow operands could run on packed dot products, as far as types say."""
        if not walk.reductions or walk.inner or any(axis not in self.open for axis in walk.reduced):
            return None
        for depth in walk.reduced:
            elements = self.open[depth]
            dots = {self._dot_of(op, depth) for op in walk.reductions}
            dot = dots.pop()
            if dot is None or dots:
                continue
            if len(walk.reduced) > 1 and (not isinstance(elements.extent, int) or elements.extent % dot.elements):
                continue
            in_slots = any(value in self.slot_axes for op in walk.reductions for value in op.operands)
            if self.extent_hint(depth) < dot.elements and not in_slots and not self._panels(walk):
                continue
            kept = all(value in self.slot_axes for op in walk.reductions for value in op.operands)
            few = next((a for a in walk.outer if a in self.open and a != lane), None)
            in_blocks = (few is not None and dot.elements == SLOT_BYTES and self.facts.interleaves
                         and self.reads_in_blocks(walk, few, lane))
            terms = {op: self._term(op, lane, depth, in_blocks) for op in walk.reductions}
            return Packing(dot, depth, walk.reduced, elements, kept, terms)
        return None

    def tile_packing(self, walk: Walk, lane: str | None) -> Packing | None:
        """The same for tile registers, which multiply all signs: no operand is turned."""
        packing = self._packing(walk, lane)
        return None if packing is None else replace(packing, terms={op: Term() for op in walk.reductions})

    def _dot_of(self, op: Op, depth: str) -> Dot | None:
        """The packed dot product for a contraction whose operands have slots along an axis. Of several contracted axes
        slots lie along the one that is contiguous in both."""
        if op.name != "contract":
            return None
        if any(value in self.slot_axes for value in op.operands):
            ready = all(self.slot_axes[value] == depth and value in self.buffers if value in self.slot_axes
                        else value.op is not None and value.op.name == "load" and not self.access(value.op).gathers
                        for value in op.operands)
            return DOT2_BF16 if ready else None
        for value in op.operands:
            loads = slot_loads(value)
            if value in self.rows or value in self.buffers or depth not in axes_of(value) or loads is None:
                return None
            for load in loads:
                access = self.access(load)
                if access.gathers or load.result in self.buffers or depth not in access.axes:
                    return None
                if len(op.attributes["over"]) > 1 and access.axes[depth] != element_bytes(access.dtype):
                    return None
        return dot_for(op, self.facts)

    def _term(self, op: Op, lane: str | None, depth: str, in_blocks: bool) -> Term:
        """Of two operands of one sign that is turned which does not span the lanes: the sums that mend it then serve
        all rows; along the lanes, and of a matrix that few rows meet in blocks, the longer one: they are then few. None
        is where no instruction multiplies bytes, or one does those of one sign."""
        unsigned = [v.type.dtype is u8 for v in op.operands]  # type: ignore[union-attr]
        if op.operands[0].type.dtype is bf16:  # type: ignore[union-attr]
            return Term()
        if unsigned[0] != unsigned[1]:
            return Term(unsigned.index(True))
        if "dot4_u8i8" in self.facts.split_dots or "dot4_i8i8" in self.facts.dots:
            return Term()
        spans = [lane in v.type.axes for v in op.operands]  # type: ignore[union-attr]
        turned = spans.index(False) if False in spans else 0
        if lane != depth and (in_blocks or self._meets_alone(op.operands[turned], op.operands[1 - turned], lane)):
            turned = 1 - turned
        if lane == depth:
            rows = [self._extent(v, depth) for v in op.operands]
            turned = int(rows[1] > rows[0])
        return Term(1 - turned if unsigned[0] else turned, turned)

    def _meets_alone(self, row: Value, matrix: Value, lane: str | None) -> bool:
        """Whether a single row meets a matrix whose bytes are interleaved where it lies: it has one sum that mends, and
        each vector of the matrix has to be turned once, or else a sum of its own."""
        load = load_behind(matrix)
        in_place = load is not None and self.panels_of(load) is None and lane in axes_of(matrix)
        return in_place and self.facts.interleaves and all(
            self.extent_hint(axis) == 1 for axis in axes_of(row) if axis not in axes_of(matrix))

    def _extent(self, value: Value, depth: str) -> int:
        """Typical number of elements of a value at one place of an axis."""
        return prod(self.extent_hint(a) for a in axes_of(value) if a != depth)

    def _serves(self, packing: Packing, lane: str | None, staged: list[Op]) -> bool:
        """Whether slots of all operands can be had: those that lie in memory as slots, or beside each other along the
        lanes, or are spread over them, or are copied. An operand is turned for all or none of its contractions."""
        made = packing.dot is not FMA2_BF16
        turned: dict[Value, bool] = {}
        for op, term in packing.terms.items():
            for number, value in enumerate(op.operands):
                if value in self.slot_axes:
                    continue
                if turned.setdefault(value, term.turned == number) != (term.turned == number):
                    return False
                for load in slot_loads(value) or ():
                    access = self.access(load)
                    size = element_bytes(access.dtype)
                    joined = made and lane != packing.depth and (
                        load in staged or access.axes.get(lane or "", size) == size)
                    if not made and load in staged:
                        return False
                    if access.axes[packing.depth] != size and not joined:
                        return False
        return True

    def _lane(self, walk: Walk, loops: list[str], contraction: bool) -> str:
        """The cheapest lane axis, by the cost of its accesses in each row of the walk."""
        scored = []
        reads, stores = self.reads(walk), [r for r in walk.roots() if isinstance(r, Op) and r.name == "store"]
        kept = [] if self.facts.many_workers else [
            self.buffers[v] for v in self._kept_values(walk) if v in self.buffers and v not in self.slot_axes]
        # What is summed is stored once: single elements there cost little beside some for each term.
        gathers = bool(walk.reductions) and any(self.access(op).gathers for op in reads)
        for position, axis in enumerate(loops):
            cost = 0.0
            for op in reads:
                if self.is_paired(op, axis, reads):
                    cost += PAIR_COST
                    continue
                window = self.window_cost(op, self.access(op), axis)
                if window is not None:
                    cost += window
                    continue
                if self.facts.run_bytes and goes_by_places(op, axis, self.lanes * self.facts.run_bytes):
                    cost += 1.0
                    continue
                cost += self._access_cost(self.access(op).axes, axis, element_bytes(op.result.type.dtype),  # type: ignore[union-attr]
                                          bool(self.access(op).gathers) and self._gather_spans(op, axis),
                                          self._may_stage(op, walk, axis, contraction))
            cost += sum(self._access_cost(buffer.axes, axis, element_bytes(buffer.dtype), False, False)
                        for buffer in kept)
            for op in stores:
                access = self.access(op)
                weight: float = 1 if axis in walk.outer and walk.reductions else 2
                if gathers:
                    weight /= prod(self.extent_hint(a) for a in walk.reduced)
                if is_join(op):
                    meets = self._gather_spans(op, axis) or access.axes.get(axis, 0) == 0
                    cost += weight * self._access_cost(access.axes, axis, element_bytes(access.dtype), meets, False)
                    continue
                in_turns = self.is_paired(op, axis, stores) or self.filling_axis(op, axis) is not None
                cost += weight * (PAIR_COST if in_turns else self._access_cost(
                    access.axes, axis, element_bytes(access.dtype), bool(access.gathers), False))
            if axis in walk.reduced:
                # Joining the lanes of every result, once for all of the reduced extent.
                steps = max(1, self.extent_hint(axis) // self.lanes)
                cost += 6.0 / steps
                outer = [a for a in walk.outer if a in self.open and self.extent_hint(a) >= STAGE_ROWS]
                if contraction and len(outer) > 1:
                    # Dot products load both operands for each piece; a broadcast operand would come for nothing.
                    cost += len(walk.reductions)
            extent = self.extent_hint(axis)
            if extent < self.lanes:
                cost = (cost + 1) * self.lanes / extent
            scored.append((cost, -position if axis not in walk.reduced else position, axis))
        return min(scored)[2]

    def _access_cost(self, axes: dict[str, Scalar], axis: str, size: int, gathers: bool, may_stage: bool) -> float:
        if gathers:
            return float(self.facts.gather_cost * self.lanes)
        stride = axes.get(axis, 0)
        if stride == 0:
            return 0.1           # an element for all lanes: mostly an operand of the arithmetic
        if stride == size:
            return 1.0
        return 1.1 if may_stage else float(self.facts.gather_cost * self.lanes)

    def _may_stage(self, op: Op, walk: Walk, axis: str, contraction: bool) -> bool:
        """Whether this operand would be packed if `axis` became the lane axis: it is read again for many rows."""
        if not contraction or axis in walk.reduced or axis not in op.result.type.axes:  # type: ignore[union-attr]
            return False
        others = [a for a in walk.outer if a in self.open and a not in op.result.type.axes]  # type: ignore[union-attr]
        if self.facts.many_workers and self.schedule.stage is None:
            return False
        return self._wants_stage(op) and any(self.extent_hint(a) >= STAGE_ROWS for a in others)

    def _wants_stage(self, op: Op) -> bool:
        return self.schedule.stage is None or memory_of(op.operands[0]).name in self.schedule.stage

    def _order(self, walk: Walk, outer: list[str], lane: str | None, contraction: bool) -> list[str]:
        if contraction:
            # The lane panel, or else the second operand's rows (weights), outermost: read once for all rows.
            right = next(r for r in walk.reductions if r.name == "contract").operands[1]
            first = lane if lane in outer else next((a for a in outer if a in right.type.axes), None)  # type: ignore[union-attr]
            order = sorted(outer, key=lambda a: a != first)
        else:
            across = self._across(walk, outer, lane)
            if across is not None and any(self._squared(walk, op, outer, lane) == across for op in self.reads(walk)):
                # Whole lines are read whichever way squares are walked: lines that are stored shall follow each other.
                # Measured on a Zen 5, f32: 512 x 576 in 23 us, not 89; 4096 x 4096 in 6.0 ms, not 6.3.
                across = None
            once = across is None and self._computes_along(walk, outer, lane)
            order = sorted(outer, key=lambda a: (a == lane) != once if across is None else (a != lane, a == across))
        forced = [a for a in self.schedule.order if a in outer]
        return forced + [a for a in order if a not in forced]

    def _computes_along(self, walk: Walk, outer: list[str], lane: str | None) -> bool:
        """Whether so much is computed of the lane axis alone that it is worth walking the other axis inside: it is then
        computed once for all of that, not for each row. Measured on a Zen 5, tables of cosines of 4096 positions, whose
        frequencies are powers: 81 us in place of 282."""
        if lane not in outer or len(outer) != 2 or walk.reductions or self.facts.many_workers:
            return False
        alone = self.costs(walk, set(), frozenset({lane}))
        return alone >= MUCH_ARITHMETIC and self.extent_hint(next(a for a in outer if a != lane)) >= NEAR_ROWS

    def _staged(self, walk: Walk, lane: str | None, counts: dict[str, int], order: list[str],
                contraction: bool) -> list[Op]:
        if not contraction or lane is None or lane not in walk.outer or lane not in self.open:
            return []
        if self.facts.many_workers and self.schedule.stage is None:
            return []
        loops = [a for a in walk.outer if a in self.open and a != lane]
        if len(loops) != 1 or len([a for a in walk.reduced if a in self.open]) != 1 or len(walk.reduced) != 1:
            return []
        (row_axis,) = loops
        depth_axis = walk.reduced[0]
        # Of few rows only these themselves are worth a copy, as more of them than have addresses are read at once.
        asked = self.schedule.stage is not None
        few = not asked and self.extent_hint(row_axis) < STAGE_ROWS
        if not self.is_bounded(depth_axis):
            return []
        staged = []
        for reduction in walk.reductions:
            for value in reduction.operands:
                while value.op is not None and value.op.name == "cast" and value not in self.buffers:
                    value = value.op.operands[0]
                op = value.op
                if (op is None or op.name != "load" or op in staged or not self._wants_stage(op) or value in self.rows
                        or (self.panels_of(op) is not None and not self._widens(op))):
                    continue
                axes = set(value.type.axes)  # type: ignore[union-attr]
                open_axes = {a for a in axes if a in self.open}
                # Of an axis that a nest holds at several coordinates there would be a copy for each.
                several = any(a in self.bound and (self.bound[a].lane or self.bound[a].count > 1) for a in axes)
                is_mask = value.type.dtype is bool_  # type: ignore[union-attr]
                if (is_mask or value in self.buffers or depth_axis not in axes or several
                        or open_axes - {depth_axis, lane, row_axis}):
                    continue
                columns = self.stages_columns(op, row_axis, counts)
                # Where nobody knows how many rows there may be, those at hand are copied, if for several panels.
                again = asked or self.extent_hint(lane) >= (
                    3 if self.is_bounded(row_axis) else 2) * counts[lane] * self.lanes
                again = again and (self.is_bounded(row_axis) or not columns)
                # Rows are copied in blocks of as many steps of depth as there are lanes, and no step may cross two.
                whole = columns or self.lanes % counts[depth_axis] == 0
                panel, rows = lane in axes and row_axis not in axes, row_axis in axes and lane not in axes
                well = not whole or self._reads_well(op, row_axis, depth_axis, counts)
                if panel and few:
                    # Nor is one that is read once, for all rows, nor one for what is computed here and then kept, nor
                    # one that lies packed: few pieces of rows widen it in less time than it takes to store it widened
                    # (16 rows of bf16 by 4096 x 4096 on a Zen 3: 6.4 ms, and 9.4).
                    meets = self._meets_rows_in_memory(walk, row_axis, lane)
                    panel = self.panels_of(op) is None and self.access(op).axes.get(depth_axis) != element_bytes(
                        self.access(op).dtype) and (
                        self.extent_hint(lane) > counts[lane] * self.lanes
                        and (self.rows_hint if meets else self.extent_hint)(row_axis) > counts[row_axis]
                        and (self.packing is not None or not meets)
                        and not self.reads_in_blocks(walk, row_axis, lane)
                        and not any(v in self.slot_axes for v in reduction.operands))
                if panel or (rows and again and not well):
                    staged.append(op)
        if staged and order[0] != lane:
            # A panel is a piece of the lane axis: inside a loop over rows it would be copied again for each of them.
            if self.schedule.stage:
                raise ScheduleError(f"schedule of {self.function.name}: stage {', '.join(self.schedule.stage)} with "
                                    f"order {' '.join(order)}; expected the lane axis {lane} outermost where operands "
                                    "are staged; mend: leave out order, or stage")
            return []
        return staged

    def _reads_well(self, op: Op, row_axis: str, depth_axis: str, counts: dict[str, int]) -> bool:
        """Whether elements of a few rows are as well broadcast from where they lie: without a copy, each row has an
        address register, and one index serves all."""
        most = SHARED_SET_ROWS if self.extent_hint(row_axis) >= STAGE_ROWS else ADDRESSED_ROWS
        if self.schedule.stage is not None or counts[row_axis] > most:
            return False
        access = self.access(op)
        return access.dtype.bits >= 32 and access.axes.get(depth_axis) == element_bytes(access.dtype) \
            and not access.gathers

    def _widens(self, op: Op) -> bool:
        """Whether the rows of an operand are wider than its elements in memory."""
        return self.packing is None and element_bytes(self.access(op).dtype) < self.operand_dtype(op).size_bytes

    def _rolled(self, walk: Walk, lane: str | None, counts: dict[str, int], order: list[str]) -> str | None:
        """The rows over which what follows the reductions is a loop: where unrolled it would be long."""
        if not walk.reductions or lane in walk.reduced:
            return None
        rows = 1
        for axis in order:
            rows *= counts[axis]
        cost = self.costs(Walk(walk.outer, (), [], [], walk.after), set())
        longest = max((a for a in order if a != lane), key=lambda a: counts[a], default=None)
        return longest if rows * cost > UNROLLED_INSTRUCTIONS else None

    def _prefetched(self, walk: Walk, lane: str | None, counts: dict[str, int], order: list[str],
                    reduced: list[str]) -> list[Op]:
        """Contiguous matrices that are read only once, row by row: weights times a vector, or a few, or a cache that
        few rows share. Rows of dot products are reduced along the lanes; others are each a term of all sums."""
        contraction = all(r.name == "contract" for r in walk.reductions)
        if not self.facts.software_prefetch or lane is None or not contraction or len(reduced) != 1:
            return []
        if reduced != [lane]:
            return self._prefetched_terms(walk, lane, counts, order, reduced[0])
        if not order or any(self.extent_hint(axis) > FEW_ROWS for axis in order[1:]):
            return []
        if (streams := self._row_streams(walk, lane)):
            return streams
        found = []
        for op in self.reads(walk):
            access = self.access(op)
            if list(access.axes) == [order[0], lane] and not access.gathers and (
                    self.is_whole_rows(access, order[0], lane) or self.lies_in_pieces(op, order[0], lane)):
                found.append(op)
        return found

    def _prefetched_terms(self, walk: Walk, lane: str, counts: dict[str, int], order: list[str], rows: str) -> list[Op]:
        once = all(self.extent_hint(a) <= counts[a] for a in order if a != lane)
        if self.packing is not None or not once or rows not in self.open:
            return []
        found = []
        for op in self.reads(walk):
            access, memory = self.access(op), memory_of(op.operands[0])
            again = self.readers[memory] > 1 or memory in self.stored
            plain = set(access.axes) == {rows, lane} and not access.gathers and not again
            if plain and access.axes[lane] == element_bytes(access.dtype):
                found.append(op)
        return found
