"""The analytic model: lane axis, register factors, loop order and staging of a walk, from facts of the target.

Everything here is a default that a `Schedule` overrides. The rules, in short: the lane axis is the one along which
most accesses are contiguous; accumulators of a contraction fill the vector registers; operands that are read
again and again are staged; results too large for the caches are stored past them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cached_property
from math import gcd, prod
from typing import NoReturn

from ..ir.nodes import Function, Op, Value
from ..ir.types import TileType, bf16, f32, u8
from ..tile.affine import affine
from ..tile.ops import memory_of
from ..tile.plan import COSTLY, LATE, Walk, axes_of
from ..tile.schedule import Facts, LoweringError, Panels, Schedule, ScheduleError, Specialization
from .axis_loops import WalkChoice
from .by_hand import Fit, fit
from .packed import DOT2_BF16, FMA2_BF16, Dot, Packing, Term, dot_for, load_behind, slot_loads
from .prefetches import FEW_ROWS
from .slots import PAIR
from .state import Access, Capacity, Open, Scalar, element_bytes
from .tile_blocks import fit as fit_blocks
from .tile_registers import ACROSS, TileWalk, fewest_rows, is_worth
from .tile_registers import fit as fit_tiles
from .tile_slots import fit as fit_slots
from .walk import WalkLowering

ADDRESSED_ROWS = 8
"""Rows of a matrix that a contraction reads at once in place; an x86-64 has 16 general registers."""

SET_ROWS = 12
"""Rows of a matrix that a contraction reads at once where they lie, however far apart: more than a set of the first
cache has lines for would drive each other out."""

MOST_WHOLE_VECTORS, WHOLE_ROW_SUMS = 8, 16
"""Vectors of a row that is read whole for a few others, and of the sums with them where extents are only guessed."""

MUCH_ARITHMETIC = 12
"""Instructions of a row, about, that take longer than its way from and to memory."""

UNROLLED_INSTRUCTIONS = 256
"""Longest code, about, for what follows a reduction: some 2 KiB of the 32 that the first cache for code has."""

PAIR_COST = 2.0
"""Of an access to every second element, of which another one takes the others: a row, and a permutation."""

LINES_AT_ONCE = 2
"""Lines of a matrix that is read once, where memory is best read line by line."""

LINE_BYTES = 64

WIDE_VECTORS = 12
"""Vectors of a matrix [in, out] in memory that a single row meets: it is read so much of a row at a time, each a page
or more after the one before. Measured on a Zen 5, 4096 x 4096, in percent of what plain reads reach: 41 with 2
vectors, 75 with 8, 84 with 12, 77 with 16 in f32; 23, 56, 69 and 52 in bf16."""

FEW_VECTORS, FEW_COPIED_VECTORS = 3, 4
"""The same where a few rows meet it, 8 at a time, and where its elements are joined to slots as they are copied.
Measured likewise, 4, 8 and 16 rows, in percent of the floor: f32 45, 38 and 27 with 2 vectors and 14 rows, 62, 66
and 49 with 3 and 8; i8, copied, 34, 31 and 31 with 4 and 6, 29, 27 and 28 with 3 and 8, and 14, 14 and 8 where it
is joined anew for each piece of rows."""

WIDE_PANEL, LANE_BYTES = 4, 4
"""Vectors of a panel that many rows meet where two multiply-adds start in a cycle; bytes of a lane."""

STREAMS = 4
"""Rows that are read from memory side by side. Measured on a Granite Rapids, argmax of 512 rows of 49152: 17.6 GB/s row
by row, 19.8 by two, and 22.4 by four."""

NEAR_ROWS = 8
"""Rows of near memory that are read before the first is used: such a read takes some thirty cycles."""

STAGE_ROWS = 28
"""From how many rows on operands are packed: packing a panel then costs a few percent of its use."""


class Model(WalkLowering):
    def __init__(self, function: Function, schedule: Schedule, facts: Facts, specialization: Specialization,
                 lanes: int) -> None:
        super().__init__(function, lanes, dict(specialization.strides))
        self.schedule = schedule
        self.facts = facts
        self.indexed_addresses = facts.indexed_addresses
        self.near_bytes = facts.l1_bytes
        self.block_bytes = facts.l2_bytes // 2
        self.requests = facts.requests
        self.prefetches_rows = facts.software_prefetch
        self.transposes_by_scatter = facts.transposes_by_scatter
        self.specialization = specialization
        self.streaming_tensors = self._streaming_tensors()

    # What a walk touches.

    def reads(self, walk: Walk) -> list[Op]:
        """Loads (ops) and values in scratch memory that the walk computes from, in order, each once."""
        seen: set[Value] = set()
        found: list[Op] = []

        def visit(value: Value, top: bool = False) -> None:
            if value in seen or not isinstance(value.type, TileType):
                return
            seen.add(value)
            op = value.op
            if op is None or value in self.rows or value in self.buffers or op.blocks:
                return
            if op.name in LATE and not top:
                return
            for operand in op.operands:
                visit(operand)
            if op.name == "load":
                found.append(op)

        for reduction in walk.reductions:
            visit(reduction.result, top=True)
        for root in (*walk.inner, *walk.after):
            for v in ([root] if isinstance(root, Value) else root.operands):
                visit(v)
        return found

    def costs(self, walk: Walk, kept: set[Value]) -> int:
        """Instructions, about, of the elementwise ops of one row. kept: values that exist, but where they are roots."""
        total, seen = 0, set()
        kept = kept - {root for root in walk.roots() if isinstance(root, Value)}

        def visit(value: Value) -> None:
            nonlocal total
            if value in seen or value in kept or value in self.rows or value in self.buffers or value.op is None:
                return
            seen.add(value)
            total += COSTLY.get(value.op.name, 1)
            for operand in value.op.operands:
                if isinstance(operand.type, TileType):
                    visit(operand)

        for root in walk.roots():
            for v in ([root] if isinstance(root, Value) else root.operands):
                if isinstance(v.type, TileType):
                    visit(v)
        return total

    def keeps_operand(self, contraction: Op, value: Value, outside: bool) -> bool:
        """Whether an operand of a contraction whose result spans a lane axis held in registers is worth a copy in
        scratch memory: one that spans that axis, if every iteration of a loop reads it again; one that does not, of
        which an element is spread over the lanes at a time, if it is narrow in memory: it is widened by vectors."""
        lanes = {a for a in contraction.result.type.axes if a in self.bound and self.bound[a].lane}  # type: ignore[union-attr]
        axes = value.type.axes  # type: ignore[union-attr]
        if not lanes and not outside and self._is_met_by_rows(contraction, value):
            return True
        if not lanes and (outside or not self._fits_near(contraction, value)):
            return False
        if not axes or value in self.rows or (value in self.buffers and value not in self.slot_axes):
            return False
        if not all(a in self.bound or (a in self.open and self.is_bounded(a)) for a in axes):
            return False
        if len(contraction.attributes["over"]) > 1 and dot_for(contraction, self.facts) is not None:
            return False
        depth = self._slot_depth(contraction)
        if depth is not None:
            if self._lies_as_slots(value, depth) or (
                    not lanes and value.op is not None and value.op.name == "load"):
                return False
            self.slot_axes[value] = depth
            return True
        if not lanes:
            return False
        if lanes & set(axes):
            return outside
        source = value.op.operands[0] if value.op is not None and value.op.name == "cast" else value
        return source.op is not None and source.op.name == "load" and source.type.dtype.bits < 32  # type: ignore[union-attr]

    def _slot_depth(self, contraction: Op) -> str | None:
        """The axis along which a contraction that holds lanes of its result takes slots of bf16, or None: where the
        target lacks the dot product, or an operand is neither slots in memory nor a value of its own."""
        if len(contraction.attributes["over"]) != 1 or "dot2_bf16" not in self.facts.dots:
            return None
        depth: str = contraction.attributes["over"][0]
        if depth in self.bound:
            return None
        for value in contraction.operands:
            op = value.op
            if value.type.dtype is not bf16 or op is None or op.name in LATE or op.blocks:  # type: ignore[union-attr]
                return None
            if op.name != "load" and any(
                    user.name != "contract" or tuple(user.attributes["over"]) != (depth,)
                    for user in self.users.get(value, ())):
                return None
        return depth

    @cached_property
    def readers(self) -> Counter[Value]:
        """How many loads read each tensor."""
        return Counter(memory_of(op.operands[0]) for op in self.function.walk() if op.name == "load")

    def _fits_near(self, contraction: Op, value: Value) -> bool:
        """Whether a value that is computed for a contraction has room in the caches of a core, typically, and an axis
        besides the contracted ones to go across the lanes as it is computed."""
        op, axes = value.op, axes_of(value)
        if op is None or op.name == "load" or value.type.dtype is not bf16:  # type: ignore[union-attr]
            return False
        if not all(a in self.bound or a in self.open for a in axes):
            return False
        across = [a for a in axes if a in self.open and a not in contraction.attributes["over"]]
        return any(self.extent_hint(a) >= self.lanes for a in across) and (
            prod(self.extent_hint(a) for a in axes) * bf16.size_bytes <= self.facts.l2_bytes // 2)

    def _is_met_by_rows(self, contraction: Op, value: Value) -> bool:
        """Whether a vector that is computed from several meets the rows of a matrix one by one: each row would read all
        of these again, from a first cache that takes the matrix too. Measured on a Zen 5, bf16 of 6144 x 4096 by a
        vector and a gain: 59 % of what plain reads reach where they are multiplied for each row, and 93 where once."""
        if self.requests.stream_level != 1 or value.op is None or value.type.dtype is not f32:  # type: ignore[union-attr]
            return False
        axes, over = axes_of(value), contraction.attributes["over"]
        rows = [a for a in axes_of(contraction.result) if a in self.open and self.extent_hint(a) >= STAGE_ROWS]
        loads = {op for op in self._loads_behind(value) if set(axes_of(op.result)) & set(axes)}
        return (axes == tuple(over) and len(loads) > 1 and len(rows) == len(axes_of(contraction.result)) == 1
                and all(a in self.open and self.is_bounded(a) for a in axes))

    def _loads_behind(self, value: Value) -> list[Op]:
        """The loads that a value is computed from, as far as it is not kept."""
        op = value.op
        if op is None or op.blocks or op.name in LATE or value in self.buffers or value in self.rows:
            return []
        if op.name == "load":
            return [op]
        return [load for v in op.operands if isinstance(v.type, TileType) for load in self._loads_behind(v)]

    def _lies_as_slots(self, value: Value, depth: str) -> bool:
        """Whether a value is read from memory in which neighbours along an axis are neighbours, and spans no lanes."""
        op = value.op
        if op is None or op.name != "load" or op.operands[0].op is not None:
            return False
        forms = [affine(index) for index in op.operands[1:]]
        strides = self.stride_classes.get(op.operands[0].name, "contiguous")
        unit = len(forms) - 1 if strides == "contiguous" else None
        if isinstance(strides, tuple) and not isinstance(strides, Panels) and True in strides:
            unit = strides.index(True)
        if unit is None or any(form is None for form in forms) or forms[unit].axes.get(depth) != 1:  # type: ignore[union-attr]
            return False
        lanes = {a for a in value.type.axes if a in self.bound and self.bound[a].lane}  # type: ignore[union-attr]
        return not lanes and not any(depth in form.axes for n, form in enumerate(forms) if n != unit)  # type: ignore[union-attr]

    def extent_hint(self, axis: str) -> int:
        o = self.open.get(axis)
        if o is not None:
            return max(1, o.extent if isinstance(o.extent, int) else o.hint)
        bound = self.bound[axis]
        return bound.count * (self.lanes if bound.lane else 1)

    # The choice.

    def choose(self, walk: Walk) -> WalkChoice:
        loops = [a for a in walk.axes if a in self.open]
        bound_lane = next((a for a in walk.axes if a in self.bound and self.bound[a].lane), None)
        contraction = any(r.name == "contract" for r in walk.reductions)
        lane = bound_lane
        panels = self._panels(walk)
        if panels:
            lane = self._columns(panels)
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
        tiles = self._tiles(walk, lane) if by_hand is None else None
        if tiles is None:
            return self._choose_vectors(walk, loops, lane, contraction, by_hand)
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
            choice.counts[lane] = -(-choice.counts[lane] // run) * run
        return run

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
        candidates = [lane] if fixed else sorted(walk.outer, key=lambda axis: not self._results_lie_along(walk, axis))
        reasons = []
        for columns in candidates:
            found = fit_tiles(self, walk, columns or "")
            if isinstance(found, str):
                reasons.append(found)
            elif wanted or is_worth(self, found):
                return found
        if wanted and reasons:
            raise ScheduleError(f"schedule of {self.function.name}: matrix = true, but {reasons[0]}; mend: leave it "
                                "out, and the model takes tile registers where they serve")
        return None

    def tile_rows(self, axis: str) -> int:
        """How many rows a task takes at once where contractions over an axis may run on tile registers; 0 where none
        does."""
        unit = self.facts.tiles
        if unit is None or self.schedule.matrix is False:
            return 0
        products = [tuple(v.type.dtype.name for v in op.operands) for op in self.function.walk()  # type: ignore[union-attr]
                    if op.name == "contract" and axis in axes_of(op.result)]
        return ACROSS * unit.size if any(product in unit.products for product in products) else 0

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
        return WalkChoice(found.columns, counts, [found.columns, found.rows], [found.depth], list(found.rights),
                          packing=found.packing(self, walk), blocked=True, tiles=found)

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
                    found[load] = panels
        return found

    def _columns(self, panels: dict[Op, Panels]) -> str:
        """The lane axis: that of the columns of all panels."""
        axes = {self._panel_axes(op, p)[0] for op, p in panels.items()}
        if len(axes) > 1:
            self._refuse_panels(panels)
        return axes.pop()

    def _panel_axes(self, op: Op, panels: Panels) -> tuple[str, str]:
        """The axes of the columns and of the depth, each of which indexes its dimension alone and begins at 0."""
        axes = []
        for dimension in (panels.columns, panels.depth):
            form = affine(op.operands[1 + dimension])
            found = list(form.axes.items()) if form is not None and not form.constant and not form.scalars else []
            if len(found) != 1 or found[0][1] != 1 or not self._begins_at_zero(found[0][0]):
                self._refuse_panels({op: panels})
            axes.append(found[0][0])
        return axes[0], axes[1]

    def _begins_at_zero(self, axis: str) -> bool:
        for op in self.function.walk():
            axes = op.attributes["axes"] if op.name == "tiles" else [op.attributes.get("axis")]
            if op.name in ("tiles", "whole") and axis in axes:
                start = op.operands[2 * axes.index(axis)].op
                return start is not None and start.name == "const" and start.attributes["value"] == 0
        return False

    def panel_width(self, axis: str | None) -> int:
        """Tasks along the columns of panels take whole ones."""
        widths = [1]
        for op in self.function.walk():
            panels = self.panels_of(op) if op.name == "load" else None
            if panels is not None and self._panel_axes(op, panels)[0] == axis:
                widths.append(panels.width)
        return max(widths)

    def _refuse_panels(self, panels: dict[Op, Panels]) -> NoReturn:
        op, found = next(iter(panels.items()))
        raise LoweringError(
            f"found {op.operands[0].name} packed in {found.width} columns and {found.elements} elements along "
            f"dimension {found.depth}; expected a tensor that is packed for this kernel and target, and contracted by "
            "plain axes from 0 on; mend: sapper.pack with this kernel and target", op)

    def _choose(self, walk: Walk, loops: list[str], lane: str | None, contraction: bool,
                by_hand: Fit | None) -> WalkChoice:
        panels = self._panels(walk)
        counts = self._counts(walk, loops, lane, contraction)
        if by_hand is not None and lane is not None:
            counts |= {by_hand.rows: by_hand.piece.rows[0], lane: by_hand.piece.vectors[0]}
        for axis in loops:
            forced = self.schedule.registers.get(axis)
            if forced is not None:
                counts[axis] = forced
        if not walk.reductions:
            for op in (*self.reads(walk), *(r for r in walk.inner if isinstance(r, Op))):
                square = self.square_axis(op, self.access(op), lane)
                if lane is not None and square in loops and min(map(self.extent_hint, (square, lane))) >= self.lanes:
                    counts |= {axis: self.lanes if axis == square else 1 for axis in loops}
        for axis in self.paired_axes(walk) & set(loops):
            counts[axis] = max(PAIR, counts[axis] // PAIR * PAIR)
        for found in panels.values():
            assert lane is not None
            counts[lane] = gcd(counts[lane], found.width // self.lanes)
        if by_hand is not None and by_hand.piece.left == "blocks" and by_hand.depth in counts:
            counts[by_hand.depth] = gcd(counts[by_hand.depth], self.lanes)  # of tiles at the edges: no step crosses two
        order = self._order(walk, [a for a in loops if a in walk.outer], lane, contraction)
        reduced = [a for a in walk.reduced if a in loops]
        reduced.sort(key=lambda a: a == lane)
        if by_hand is not None:
            staged = [op for op in by_hand.staged if op not in panels]
        else:
            staged = self._staged(walk, lane, counts, order, contraction)
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
        return WalkChoice(lane, counts, order, reduced, staged, prefetched,
                          self._joint(walk, lane, counts, order), self._rolled(walk, lane, counts, order),
                          by_hand=by_hand, widened=widened, blocked=blocked, rows_here=rows_here,
                          rows_ahead=rows_ahead)

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
            if self.extent_hint(depth) < dot.elements and not self._panels(walk):
                continue
            kept = all(value in self.slot_axes for op in walk.reductions for value in op.operands)
            terms = {op: self._term(op, lane, depth) for op in walk.reductions}
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

    def _term(self, op: Op, lane: str | None, depth: str) -> Term:
        """Of two operands of one sign that is turned which does not span the lanes: the sums that mend it then serve
        all rows; along the lanes, the longer one: they are then few."""
        unsigned = [v.type.dtype is u8 for v in op.operands]  # type: ignore[union-attr]
        if op.operands[0].type.dtype is bf16:  # type: ignore[union-attr]
            return Term()
        if unsigned[0] != unsigned[1]:
            return Term(unsigned.index(True))
        spans = [lane in v.type.axes for v in op.operands]  # type: ignore[union-attr]
        turned = spans.index(False) if False in spans else 0
        if lane == depth:
            rows = [self._extent(v, depth) for v in op.operands]
            turned = int(rows[1] > rows[0])
        return Term(1 - turned if unsigned[0] else turned, turned)

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
        for position, axis in enumerate(loops):
            cost = 0.0
            for op in reads:
                if self.is_paired(op, axis, reads):
                    cost += PAIR_COST
                    continue
                cost += self._access_cost(self.access(op).axes, axis, element_bytes(op.result.type.dtype),  # type: ignore[union-attr]
                                          bool(self.access(op).gathers) and self._gather_spans(op, axis),
                                          self._may_stage(op, walk, axis, contraction))
            for op in stores:
                access = self.access(op)
                weight = 1 if axis in walk.outer and walk.reductions else 2
                cost += weight * (PAIR_COST if self.is_paired(op, axis, stores) else self._access_cost(
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

    def _gather_spans(self, op: Op, axis: str) -> bool:
        return any(axis in v.type.axes for v, _ in self.access(op).gathers)  # type: ignore[union-attr]

    def _may_stage(self, op: Op, walk: Walk, axis: str, contraction: bool) -> bool:
        """Whether this operand would be packed if `axis` became the lane axis: it is read again for many rows."""
        if not contraction or axis in walk.reduced or axis not in op.result.type.axes:  # type: ignore[union-attr]
            return False
        others = [a for a in walk.outer if a in self.open and a not in op.result.type.axes]  # type: ignore[union-attr]
        if self.facts.many_workers and self.schedule.stage is None:
            return False
        return self._wants_stage(op) and any(self.extent_hint(a) >= STAGE_ROWS for a in others)

    def _wants_stage(self, op: Op) -> bool:
        return self.schedule.stage is None or op.operands[0].name in self.schedule.stage

    def _counts(self, walk: Walk, loops: list[str], lane: str | None, contraction: bool) -> dict[str, int]:
        registers = self.facts.vector_registers
        counts = dict.fromkeys(loops, 1)
        fixed = 1
        for axis in walk.outer:
            if axis in self.bound:
                fixed *= self.bound[axis].count
        outer = [a for a in loops if a in walk.outer]
        if contraction:
            several = len(walk.reductions)
            budget = max(1, (registers - 4) // (fixed * several))
            rows = sorted((a for a in outer if a != lane and (lane in outer or self.extent_hint(a) > 1)),
                          key=lambda a: -self.extent_hint(a))
            if lane in outer:
                panel = self._panel_vectors(walk, rows, fixed, lane)
                wide = max(1, panel // several) if rows or fixed > 1 else min(8, budget)
                counts[lane] = self._fit(lane, wide, True)
                if rows:
                    # Accumulators, a register for each vector of the second operand, and one to spare.
                    vectors = counts[lane] * several
                    # No fewer than a unit has in flight on each of two ports: else each sum waits for itself.
                    hidden = 2 * self.facts.fma_latency // (vectors * fixed) + 1
                    most = max(1, (registers - vectors - 1) // (vectors * fixed))
                    if any(v in self.slot_axes for op in walk.reductions for v in op.operands):
                        # The rows that are read where they lie may be a power of two apart: few sets of a cache.
                        most = min(most, SET_ROWS)
                    if self._meets_rows_in_memory(walk, rows[0], lane):
                        most = min(most, ADDRESSED_ROWS)
                    # Nor far fewer than fit: each piece of rows reads all of the second operand again.
                    fewest = max(min(hidden, most), -(-most * 3 // 4))
                    counts[rows[0]] = self._fit(rows[0], most, False, fewest, 2)
                    if several == 1 and self._takes_whole_rows(rows, fixed, lane):
                        counts[rows[0]] = self.extent_hint(rows[0])
            elif lane in self.bound and rows:
                # Each row is read through an address of its own, and those have to stay in registers too.
                counts[rows[0]] = self._fit(rows[0], min(budget, ADDRESSED_ROWS), False)
            elif rows:
                # Dot products along the lane axis: a square of accumulators reads the least.
                first = self._fit(rows[0], self._streamed_rows(walk, rows[0], lane), False)
                if len(rows) > 1:
                    first = self._fit(rows[0], 4, False)
                    if self.requests.stream_level == 1 and self.extent_hint(rows[1]) < STAGE_ROWS and (
                            first * self._row_bytes(walk, rows[0], lane) > self.facts.l1_bytes // 4):
                        # Few rows meet more of the other matrix, which comes from memory, unless the first cache holds
                        # it for all of them. Measured on a Zen 5, 16 rows by 4096 x 4096, 6 x 4 and 4 x 6: f32 46 and
                        # 41 % of the floor, bf16 45 and 40; 4 rows of i8 84 and 95 % of memory.
                        first = self._fit(rows[0], 6, False, fewest=5)
                counts[rows[0]] = min(first, budget)
                if len(rows) > 1:
                    second = max(1, (registers - 4 - min(first, 4)) // (first * len(walk.reductions)))
                    # 1 divides all, but is half of 2: better only where code for a row that is left has no place.
                    fewest = 1 if self.facts.many_workers else min(2, second)
                    counts[rows[1]] = self._fit(rows[1], second, False, fewest)
            for axis in walk.reduced:
                if axis in counts and self.open[axis].extent != 1:
                    accumulators = fixed
                    for a in outer:
                        accumulators *= counts[a]
                    # Unrolled by 4 where the lane axis is not reduced (by 2 in loops that are themselves inside a
                    # loop over tiles: there are many of them); enough independent chains where it is. By 2 where
                    # memory bounds the walk and gives a line at a time sooner (panels of bf16: 15.0 and 16.5 GB/s).
                    unrolled = 4 if lane not in self.bound or accumulators < 16 else 2
                    at_once = prod(counts[a] for a in outer if a != lane)
                    if self.requests.line_by_line and fixed == 1 and outer and at_once <= LINES_AT_ONCE:
                        unrolled = LINES_AT_ONCE // at_once
                    if lane in outer and counts[lane] * several >= WIDE_VECTORS and not self.facts.many_workers:
                        unrolled = 1     # there are sums enough, and a row after the other is read
                    if self.packing is not None and self._is_short(axis, accumulators * several):
                        unrolled = self.extent_hint(axis)
                    if self.facts.many_workers and not isinstance(self.open[axis].extent, int):
                        # Elements of a further axis, as the two of a pair, are steps as well, and each loads its rows.
                        unrolled = max(1, unrolled // prod(self.extent_hint(a) for a in walk.reduced if a != axis))
                    if axis == lane:
                        unrolled = max(1, min(unrolled, 8 // accumulators), self.rows_at_once(walk.reductions))
                    counts[axis] = self._fit(axis, unrolled, axis == lane)
                    break
            return counts
        if lane in loops:
            assert lane is not None
            across = self._across(walk, outer, lane)
            wide = 1 if self._stores_lines(walk) else max(1, self._vectors_at_once(walk) // fixed)
            if across is None:
                counts[lane] = self._fit(lane, wide, True)
            else:
                counts[across] = self._fit(across, wide, False)
            if lane in walk.reduced and outer and fixed == 1 and len(walk.reductions) == 1:
                # Several rows are summed at once where their lanes can then be joined together.
                together = counts | {outer[-1]: self._fit(outer[-1], ADDRESSED_ROWS, False)}
                if self._joint(walk, lane, together, outer[-1:]) is not None:
                    counts = together
                elif self._extent_bytes(walk) > self.facts.l2_bytes:
                    # Others are so many streams from memory: a processor follows each as far as the end of its page.
                    streams = self._fit(outer[-1], STREAMS, False)
                    counts |= {outer[-1]: streams, lane: max(1, counts[lane] * 2 // streams)}
        elif loops:
            last = loops[-1]
            counts[last] = self._fit(last, 4, False)
        return counts

    def _vectors_at_once(self, walk: Walk) -> int:
        """Vectors of the lane axis where nothing is contracted. Rows that are rounded by an instruction are tested for
        denormals together, and a branch parts one piece from the next; where a processor has many units but looks ahead
        little, larger pieces help if there is much arithmetic. Only of walks that do not take part of a row after
        another. Measured on a Zen 5 by 8 vectors in place of 4: GELU in bf16 12 % quicker, in the last cache and from
        memory, SwiGLU 4 to 5 %; softmax and LayerNorm, whose walks take rows, 12 % slower; f32 that is only rounded 2
        to 6 % slower."""
        stores = [root for root in walk.inner if isinstance(root, Op)]
        alone = len(stores) == 1 and not walk.reductions and all(axis not in self.bound for axis in walk.axes)
        rounds = alone and self.access(stores[0]).dtype is bf16 and "dot2_bf16" in self.facts.dots
        return self.facts.rounded_at_once if rounds and self.costs(walk, set()) >= MUCH_ARITHMETIC else 4

    def _stores_lines(self, walk: Walk) -> bool:
        """Whether rows of a walk leave past the caches, each as whole lines, while memory is best read line by line:
        one line at a time then comes and one goes."""
        stores = [root for root in walk.inner if isinstance(root, Op)]
        return self.requests.line_by_line and not walk.reductions and bool(stores) and all(
            self.streams(op) and element_bytes(self.access(op).dtype) * self.lanes >= LINE_BYTES for op in stores)

    def _extent_bytes(self, walk: Walk) -> int:
        """Bytes that a walk reads, typically."""
        return sum(prod(map(self.extent_hint, axes_of(op.result))) * element_bytes(self.access(op).dtype)
                   for op in self.reads(walk))

    def _is_short(self, axis: str, products: int) -> bool:
        """Whether a sum inside another loop is no loop: a block of quantised weights, whose sum is then scaled."""
        extent = self.open[axis].extent
        return isinstance(extent, int) and bool(self.bound) and extent * products <= UNROLLED_INSTRUCTIONS

    def _panel_vectors(self, walk: Walk, rows: list[str], fixed: int, lane: str) -> int:
        """Vectors of the lane axis that a contraction holds: whole rows where they are short and met by few. A
        broadcast element serves so many multiply-adds: where two of them go in a cycle, 6 x 4 loads 10 vectors for 24,
        and 14 x 2 loads 16 for 28. Few rows are not worth it, nor rows that lie side by side in memory, which are
        copied a vector at a time: 6 leave most of it empty. Nor is a panel so deep that half of the second cache has no
        room for it: all rows would read it from the last one, 6 at a time, which is too slow. 128 x 1024 x 14336 in f32
        on a Zen 5: 175 GFLOP/s, and 191 by two vectors."""
        if self._takes_whole_rows(rows, fixed, lane):
            return -(-self.extent_hint(lane) // self.lanes)
        if not rows or self.facts.fma_per_cycle < 2 or self.facts.vector_registers < 32:
            return 2
        few = self.extent_hint(rows[0]) < STAGE_ROWS or self.panel_width(lane) > 1
        if self._meets_rows_in_memory(walk, rows[0], lane):
            few_vectors = FEW_VECTORS if self.packing is None else FEW_COPIED_VECTORS
            return WIDE_VECTORS if self.extent_hint(rows[0]) == 1 else few_vectors
        depth_bytes = prod(self.extent_hint(a) for a in walk.reduced) * LANE_BYTES     # of slots, where they are packed
        if WIDE_PANEL * self.lanes * depth_bytes > self.block_bytes:
            return 2
        beside = any(lane not in op.result.type.axes and self.stages_columns(op, rows[0], {rows[0]: 1})  # type: ignore[union-attr]
                     for op in self.reads(walk))
        return 2 if few or beside else WIDE_PANEL

    def _meets_rows_in_memory(self, walk: Walk, axis: str, lane: str | None) -> bool:
        """Whether few rows meet a matrix whose rows, contiguous along the lanes, are read where they lie. Several lines
        of each are then read at once, unless memory is best read line by line, or thousands of workers read it."""
        if lane is None or self.requests.line_by_line or self.facts.many_workers:
            return False
        if self.panel_width(lane) > 1 or self.extent_hint(axis) >= STAGE_ROWS:
            return False
        matrices = [op for op in self.reads(walk) if lane in axes_of(op.result) and axis not in axes_of(op.result)]
        return bool(matrices) and all(self._lies_along_lanes(op, lane) for op in matrices)

    def _lies_along_lanes(self, op: Op, lane: str) -> bool:
        access = self.access(op)
        return access.axes.get(lane) == element_bytes(access.dtype) and not access.gathers

    def _takes_whole_rows(self, rows: list[str], fixed: int, lane: str) -> bool:
        """Whether a matrix of short rows that few others meet is read row by row, in the order of memory, for all of
        these at once: where extents are known, even where the sums fill all registers. fixed: rows that are bound."""
        vectors = -(-self.extent_hint(lane) // self.lanes)
        met = fixed * (self.extent_hint(rows[0]) if rows else 1)
        known = all(isinstance(self.open[axis].extent, int) for axis in (lane, *rows[:1]))
        most = self.facts.vector_registers if known else WHOLE_ROW_SUMS
        return met > 1 and 2 < vectors <= MOST_WHOLE_VECTORS and vectors * met <= most

    def _streamed_rows(self, walk: Walk, axis: str, lane: str | None) -> int:
        """Rows of matrices times a vector held at once: 8, or 4 where these fit half of L1, into which they are then
        asked. Measured on a Zen 4, rows of 576 bf16: 22 GB/s by 4 rows, 17 by 8, on another day 31 and 24. Where memory
        is best read line by line, two, a line of each in turn, which on a Granite Rapids are 3 to 10 % quicker than two
        lines of one. 8 rows of a matrix that lies in the second cache are a quarter quicker, but weights seldom do: 576
        x 1536 in bf16 from memory are 17 % slower by 8 than by two.

        Where the first cache takes streams, a single row: memory is then read as it lies. Or four, if the vector that
        they share leaves less than half of that cache, as each row reads it again. Measured on a Zen 5, bf16: 4096 x
        4096 at 117 % of what plain reads reach by one row, 91 by four, 89 by eight; 4096 x 14336 at 66, 80 and 81."""
        if self.requests.line_by_line and all(axis not in self.bound for axis in walk.outer):
            return LINES_AT_ONCE
        if self.requests.stream_level == 1:
            return 1 if self._row_bytes(walk, axis, lane, False) <= self.facts.l1_bytes // 2 else 4
        return 4 if 4 * self._row_bytes(walk, axis, lane) <= self.facts.l1_bytes // 2 else 8

    def _row_bytes(self, walk: Walk, axis: str, lane: str | None, along: bool = True) -> int:
        """Bytes, typically, that a walk along the lanes reads for each coordinate of an axis; or else for all of it."""
        length = self.extent_hint(lane) * self.slot_elements if lane is not None else 1
        kept = {value for op in walk.reductions for value in op.operands if value in self.buffers}
        sizes = [(op.result, element_bytes(self.access(op).dtype)) for op in self.reads(walk)]
        sizes += [(value, element_bytes(self.buffers[value].dtype)) for value in kept]
        return length * sum(size for value, size in sizes
                            if lane in axes_of(value) and (axis in axes_of(value)) == along)

    def _fit(self, axis: str, count: int, lane: bool, fewest: int = 1, spare: int = 1) -> int:
        """The largest count <= `count` that suits the extent: no larger than it, a divisor of it if one is near and not
        below `fewest`. spare: how many times the typical extent it may be, where the extent is not known."""
        o = self.open[axis]
        extent = o.extent if isinstance(o.extent, int) else None
        if extent is None:
            if lane:
                if o.divisor % (count * self.lanes) == 0:
                    return count
                typical = -(-o.hint // self.lanes)
                # A piece as long as the axis may be would fit few extents: most would be walked by single vectors.
                return min(count, typical if self.facts.many_workers or count < typical else max(1, typical // 2))
            # A tile of a sequential loop is mostly whole.
            multiple = o.hint if o.capacity == Capacity(o.hint) else o.divisor
            count = max(1, min(count, o.hint * (spare if o.hint > 1 else 1)))
            return next((c for c in range(count, max(fewest, count * 2 // 3, 1) - 1, -1) if multiple % c == 0), count)
        units = -(-extent // self.lanes) if lane else extent
        count = max(1, min(count, units))
        for candidate in range(count, max(fewest, count * 2 // 3, 1) - 1, -1):
            if units % candidate == 0:
                return candidate
        return count

    def _order(self, walk: Walk, outer: list[str], lane: str | None, contraction: bool) -> list[str]:
        if contraction:
            # The lane panel, or else the second operand's rows (weights), outermost: read once for all rows.
            right = next(r for r in walk.reductions if r.name == "contract").operands[1]
            first = lane if lane in outer else next((a for a in outer if a in right.type.axes), None)  # type: ignore[union-attr]
            order = sorted(outer, key=lambda a: a != first)
        else:
            across = self._across(walk, outer, lane)
            order = sorted(outer, key=lambda a: a == lane if across is None else (a != lane, a == across))
        forced = [a for a in self.schedule.order if a in outer]
        return forced + [a for a in order if a not in forced]

    def _across(self, walk: Walk, outer: list[str], lane: str | None) -> str | None:
        """The axis along which an access that strides over the lanes is contiguous, as in a transpose. Walked inside,
        it takes all of the lines that one vector touches before another's: 4096 x 4096 f32 in 14 ms, not 125."""
        if walk.reductions or lane not in outer:
            return None
        stores = [root for root in walk.inner if isinstance(root, Op)]
        for access in map(self.access, (*stores, *self.reads(walk))):
            size = element_bytes(access.dtype)
            if not access.gathers and access.axes.get(lane, size) != size:
                along = [a for a in outer if a != lane and access.axes.get(a) == size]
                if along:
                    return along[0]
        return None

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
        few = self.schedule.stage is None and self.extent_hint(row_axis) < STAGE_ROWS
        if not self.is_bounded(depth_axis):
            return []
        staged = []
        for reduction in walk.reductions:
            for value in reduction.operands:
                while value.op is not None and value.op.name == "cast":
                    value = value.op.operands[0]
                op = value.op
                if (op is None or op.name != "load" or op in staged or not self._wants_stage(op) or value in self.rows
                        or (self.panels_of(op) is not None and not self._widens(op))):
                    continue
                axes = set(value.type.axes)  # type: ignore[union-attr]
                open_axes = {a for a in axes if a in self.open}
                if value in self.buffers or depth_axis not in axes or open_axes - {depth_axis, lane, row_axis}:
                    continue
                columns = self.stages_columns(op, row_axis, counts)
                # Where nobody knows how many rows there may be, those at hand are copied, if for several panels.
                again = self.extent_hint(lane) >= (3 if self.is_bounded(row_axis) else 2) * counts[lane] * self.lanes
                again = again and (self.is_bounded(row_axis) or not columns)
                # Rows are copied in blocks of as many steps of depth as there are lanes, and no step may cross two.
                whole = columns or self.lanes % counts[depth_axis] == 0
                panel, rows = lane in axes and row_axis not in axes, row_axis in axes and lane not in axes
                well = not whole or self._reads_well(op, row_axis, depth_axis, counts)
                if panel and few:
                    # Nor is one that is read once, for all rows, nor one for what is computed here and then kept.
                    panel = self.access(op).axes.get(depth_axis) != element_bytes(self.access(op).dtype) and (
                        self.extent_hint(lane) > counts[lane] * self.lanes
                        and self.extent_hint(row_axis) > counts[row_axis]
                        and (self.packing is not None or not self._meets_rows_in_memory(walk, row_axis, lane))
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
        """Whether elements of a few rows are as well broadcast from where they lie: each row has an address register
        then, and one index serves all, where the blocks of a copy take arithmetic that competes for the ports of the
        multiply-adds."""
        if self.schedule.stage is not None or counts[row_axis] > ADDRESSED_ROWS:
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

    def _joint(self, walk: Walk, lane: str | None, counts: dict[str, int], order: list[str]) -> str | None:
        """The axis of sums over the lanes that are finished together: what follows them reads and writes memory along
        that axis only, or element by element."""
        if lane not in walk.reduced or any(r.attributes.get("kind") in ("argmax", "argmin") for r in walk.reductions):
            return None
        for axis in reversed(order):
            if 2 <= counts[axis] <= self.lanes and walk.after and all(self._lies_along(r, axis) for r in walk.after):
                return axis
        return None

    def _lies_along(self, root: Op | Value, axis: str) -> bool:
        """Whether a root that becomes a row along `axis`, and all that it is computed from, is contiguous there."""
        if isinstance(root, Value):
            axes = root.type.axes  # type: ignore[union-attr]
            if axes[-1] != axis or any(self.bound[a].lane for a in axes if a in self.bound):
                return False
        stores = [] if isinstance(root, Value) else [root]
        for op in (*stores, *self.reads(Walk((), (), [], [], [root]))):
            access = self.access(op)
            if (access.gathers and self._gather_spans(op, axis)) or access.axes.get(axis, 0) not in (
                    0, element_bytes(access.dtype)):
                return False
        return True

    def is_bounded(self, axis: str) -> bool:
        """Whether scratch memory can be sized by the axis: not if its range is known only as the kernel runs."""
        return isinstance(self.open[axis].extent, int) or self.open[axis].capacity is not None

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
        found = []
        for op in self.reads(walk):
            access = self.access(op)
            if list(access.axes) == [order[0], lane] and not access.gathers:
                o = self.open[lane] if self.packing is None else self.packing.elements
                if self._is_whole_rows(access, order[0], lane, o):
                    found.append(op)
        return found

    def _prefetched_terms(self, walk: Walk, lane: str, counts: dict[str, int], order: list[str], rows: str) -> list[Op]:
        once = all(self.extent_hint(a) <= counts[a] for a in order if a != lane)
        if self.packing is not None or not once or rows not in self.open:
            return []
        found = []
        for op in self.reads(walk):
            access = self.access(op)
            again = self.readers[memory_of(op.operands[0])] > 1
            plain = set(access.axes) == {rows, lane} and not access.gathers and not again
            if plain and access.axes[lane] == element_bytes(access.dtype):
                found.append(op)
        return found

    def _is_whole_rows(self, access: Access, rows: str, lane: str, along: Open) -> bool:
        """Whether a matrix has its rows, contiguous along an axis, one after the other."""
        size = element_bytes(access.dtype)
        return access.axes[rows] == self.mul(along.extent, size) and access.axes[lane] == size

    # Stores past the caches.

    def _streaming_tensors(self) -> set[str]:
        """Tensors that are written, never read, and, as the call promises, aligned and too large for the caches."""
        if self.schedule.streaming is not None:
            return set(self.schedule.streaming)
        loaded = {op.operands[0].name for op in self.function.walk() if op.name == "load"}
        return {t.name for t in self.function.tensors() if t.name in self.specialization.aligned - loaded}

    def streams(self, op: Op) -> bool:
        name = op.operands[0].name
        return op.operands[0].op is None and name in self.streaming_tensors and name in self.specialization.aligned
