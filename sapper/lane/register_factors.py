"""How many rows and vectors of each axis a walk holds at once: the register factors of the model (model.py).

Enters: a walk, its lane axis. Leaves: a count for each of its axes (`_counts`). Holds: sums of a contraction fill the
vector registers; what is read from memory is read as much at once, and in as many streams, as the target's facts say.
A `Schedule` overrides each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NoReturn

from ..ir.nodes import Function, Op, Value
from ..ir.types import FLOAT8, TensorType, TileType, bf16, index
from ..tile.plan import COSTLY, LATE, Walk, axes_of
from ..tile.schedule import DimClass, Facts, LoweringError, Panels, Schedule, Specialization
from ..tile.sums import is_join
from .packed import plain_axis
from .prefetches import FEW_ROWS, LINE_BYTES, LONG_LINES, SHORT_LINES
from .state import PAIR, Capacity, element_bytes
from .tile_bound import dtype_of
from .walk import WalkLowering

ADDRESSED_ROWS = 8
"""Rows of a matrix that a contraction reads at once in place; an x86-64 has 16 general registers."""

CONSTANT_ROWS = 16
"""The same where they are known distances apart and a vector of lanes meets them: 8 sums are just as many as two units
have in flight."""

SET_ROWS = 12
"""Rows of a matrix that a contraction reads at once where they lie, however far apart: more than a set of the first
cache has lines for would drive each other out."""

MOST_WHOLE_VECTORS, WHOLE_ROW_SUMS = 8, 16
"""Vectors of a row that is read whole for a few others, and of the sums with them where extents are only guessed."""

MUCH_ARITHMETIC = 12
"""Instructions of a row, about, that take longer than its way from and to memory."""

UNROLLED_INSTRUCTIONS = 256
"""Longest code, about, for what follows a reduction: some 2 KiB of the 32 that the first cache for code has."""

SPLIT_DOT = 3
"""Instructions of a product of slots for which there is none, with the load that spreads an element."""

LINES_AT_ONCE = 2
"""Lines of a matrix that is read once, where memory is best read line by line."""

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

DEPTH_ROWS, SINGLE_DEPTH_ROWS, SLOT_BYTES = 64, 16, 4
"""Rows of a matrix [in, out] in memory that few rows, or a single one, meet before any meets the next ones
(reads_in_blocks); bytes of a slot. Measured on a Zen 4, 1, 4 and 16 rows by 4096 x 4096, in ms, 3 vectors by 8 rows and
all of the depth for them, and a line of each row of such blocks: f32 6.40, 3.99, 6.15 and 3.23, 4.06, 6.34, bf16 3.34,
2.02, 3.84 and 1.72, 1.83, 3.44; i8 of 1, 4 and 8 rows, copied in panels of 4 vectors, 2.12, 1.69, 2.03 and 1.01, 0.88,
1.41. With what the next block begins with asked for, too, by blocks of 64, 32 and 16 rows, in percent of what plain
reads reach: one row of i8 89, 89 and 93, of f32 94, 97 and 96, 4 rows of i8 83, 84 and 74; of f32 by 64 and 32 rows 88
and 91, and of 8 rows 67 and 50, as all sums pass through memory for each block."""

LONG_ROW_LINES = 8
"""Lines of a row from which on it takes longer to read than its sums to finish, where registers are few."""

FEW_AT_ONCE = 4
"""How many of few rows meet a matrix whose rows lie along the depth at once, where there are 16 registers: what comes
from memory comes once for so many."""

WHOLE_PANEL_ROWS = 4
"""Rows that meet packed panels of several matrices at once, all vectors of each, so that these are read as they lie. Of
more rows each would meet a vector of a panel, and every other line of it, or half of each, before the next. Measured on
a Zen 4, gate and up of 1536 x 576 from memory, 1, 2, 4, 8 and 16 rows, us: pairs of bf16 190, 204, 212, 148, 297, and
so 109, 108, 104, 171, 301 (six rows at once: 107, 117, 182, 305 of 2, 4, 8 and 16); bf16 by f32 156, 178, 213, 263,
532, and so 123, 117, 142, 266, 507."""

VECTORS_AT_ONCE = 4
"""Vectors that a walk without contractions computes at once."""

OVERWRITTEN_VECTORS = 4
"""Vectors at once of a state that is made anew in place, where registers are few."""

ROWS_ON_THEIR_WAY = 4
"""Rows that a warp loads before it adds them up, where sums do not go along its lanes: with 16 warps for each
processor, and 512 bytes of each row, that is 32 KB on their way; not measured."""

STREAMS = 4
"""Rows that are read from memory side by side. Measured on a Granite Rapids, argmax of 512 rows of 49152: 17.6 GB/s row
by row, 19.8 by two, and 22.4 by four."""

STAGE_ROWS = 28
"""From how many rows on operands are packed: packing a panel then costs a few percent of its use."""

BESIDE_SUMS = 4
"""Vector registers that the sums of a contraction leave for its operands."""

DEEP = 5
"""From how many blocks of the depth on (Requests.depth_block) many rows meet them one by one."""


@dataclass(slots=True)
class _Sums:
    """What a contraction's counts are chosen by. outer: axes of its result that it walks; rows: of them those beside
    the lane axis, the longest first. fixed: sums of what loops around hold for each. counts: of each axis, filled.
    several: sums in one walk; contractions, but for those of floats that one sum takes (Reductions.sum_of)."""

    walk: Walk
    lane: str | None
    outer: list[str]
    rows: list[str]
    fixed: int
    several: int
    counts: dict[str, int]


class RegisterFactors(WalkLowering):
    """typical: whether what is chosen is for extents as they typically are; else for fewer rows, or less of the depth,
    than blocks of it (depth_in_blocks) and more rows at once (_few_together) are for."""

    typical = True

    def __init__(self, function: Function, schedule: Schedule, facts: Facts, specialization: Specialization,
                 lanes: int) -> None:
        super().__init__(function, lanes, dict(specialization.strides))
        self.schedule = schedule
        self.facts = facts
        self.indexed_addresses = facts.indexed_addresses
        self.near_bytes = facts.l1_bytes
        self.block_bytes = facts.l2_bytes // 2
        self.requests = facts.requests
        self.errors_before = {}
        self.joining, self.joined = frozenset(), {}
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
                visit(operand)  # noqa: F821
            if op.name == "load":
                found.append(op)

        for reduction in walk.reductions:
            visit(reduction.result, top=True)
        for root in (*walk.inner, *walk.after):
            for v in ([root] if isinstance(root, Value) else root.operands):
                visit(v)
        del visit   # it holds itself, and so all that it reads
        return found

    def costs(self, walk: Walk, kept: set[Value], along: frozenset[str] | None = None) -> int:
        """Instructions, about, of the elementwise ops of one row. kept: values that exist, but where they are roots.
        along: only those whose results have just these axes, and are no indices."""
        total, seen = 0, set()
        kept = kept - {root for root in walk.roots() if isinstance(root, Value)}

        def visit(value: Value) -> None:
            nonlocal total
            if value in seen or value in kept or value in self.rows or value in self.buffers or value.op is None:
                return
            seen.add(value)
            if along is None or (along == frozenset(axes_of(value)) and value.type.dtype is not index):  # type: ignore[union-attr]
                total += COSTLY.get(value.op.name, 1)
            for operand in value.op.operands:
                if isinstance(operand.type, TileType):
                    visit(operand)  # noqa: F821

        for root in walk.roots():
            for v in ([root] if isinstance(root, Value) else root.operands):
                if isinstance(v.type, TileType):
                    visit(v)
        del visit   # it holds itself, and so all that it reads
        return total

    def extent_hint(self, axis: str) -> int:
        o = self.open.get(axis)
        if o is not None:
            return max(1, o.extent if isinstance(o.extent, int) else o.hint)
        bound = self.bound[axis]
        return bound.count * (self.lanes if bound.lane else 1)

    # Panels that were packed before the call.

    def _panel_axes(self, op: Op, panels: Panels) -> tuple[str, str]:
        """The axes of the columns and of the depth, each of which indexes its dimension alone and begins at 0."""
        columns, depth = (plain_axis(self.function, op.operands[1 + at]) for at in (panels.columns, panels.depth))
        if columns is None or depth is None:
            self._refuse_panels({op: panels})
        return columns, depth

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

    # The choice.

    def _counts(self, walk: Walk, loops: list[str], lane: str | None, contraction: bool) -> dict[str, int]:
        counts = dict.fromkeys(loops, 1)
        outer = [a for a in loops if a in walk.outer]
        fixed = prod(self.bound[axis].count for axis in walk.outer if axis in self.bound)
        if contraction:
            self._contraction_counts(_Sums(
                walk, lane, outer, self._rows_beside(outer, lane), fixed, self._several(walk, lane), counts))
        elif lane in loops:
            assert lane is not None
            self._pointwise_counts(walk, outer, lane, fixed, counts)
        elif loops:
            last = loops[-1]
            at_once = self._overwritten_at_once(walk, fixed) or self._rows_at_once(walk, fixed)
            counts[last] = self._fit(last, at_once, False)
        return counts

    def _rows_at_once(self, walk: Walk, fixed: int) -> int:
        """How many rows are computed at once for lanes that loops around hold (fixed: vectors of them): where registers
        are few, and much is computed, no more than four vectors in all, as each result waits for the last of them to
        be stored. Measured on a Zen 3, of the time by four rows of four vectors, whose weights of the softmax pass
        through memory: attention_f32 of 512 + 512 positions and heads of 128 0.98, attention_rounded_f32 of 1024 tokens
        0.98."""
        long = self.sixteen_registers and self.costs(walk, set()) >= MUCH_ARITHMETIC
        return max(1, VECTORS_AT_ONCE // fixed) if long else VECTORS_AT_ONCE

    def _several(self, walk: Walk, lane: str | None) -> int:
        made = [self.sum_of(op, walk) for op in walk.reductions if dtype_of(op.result).is_float
                and lane not in walk.reduced]
        shared = {found.total: len(found.contractions) - 1 for found in made if found is not None}
        return len(walk.reductions) - sum(shared.values())

    def _rows_beside(self, outer: list[str], lane: str | None) -> list[str]:
        """Axes of a contraction's result beside the lane axis, the longest first."""
        return sorted((a for a in outer if a != lane and (lane in outer or self.extent_hint(a) > 1)
                       and self.open[a].extent != 1),
                      key=lambda a: -self.extent_hint(a))

    def _contraction_counts(self, sums: _Sums) -> None:
        walk, lane, rows, counts = sums.walk, sums.lane, sums.rows, sums.counts
        budget = max(1, (self.facts.vector_registers - BESIDE_SUMS) // (sums.fixed * sums.several))
        if lane in sums.outer:
            self._count_beside_lanes(sums, lane, budget)
        elif lane in self.bound and rows:
            # Each row is read through an address of its own, and those have to stay in registers too: but where
            # rows are known distances apart. More of them are worth it where a single vector meets them.
            most = CONSTANT_ROWS if sums.fixed == 1 and self._lie_at_constants(walk, rows[0]) else ADDRESSED_ROWS
            most = min(budget, most)
            counts[rows[0]] = self._fit(rows[0], most, False, self._hiding_rows(sums, most))
        elif rows:
            self._count_across_lanes(sums, budget)
        if self._is_short_block(walk, lane, prod(counts[a] for a in sums.outer) * sums.fixed * sums.several):
            counts |= {axis: self.extent_hint(axis) for axis in walk.reduced}
        elif (axis := next((a for a in walk.reduced if a in counts and self.open[a].extent != 1), None)) is not None:
            self._count_steps(sums, axis)

    def _hiding_rows(self, sums: _Sums, most: int) -> int:
        """How many rows of sums, up to `most`, are more than two units have in flight beside lanes that loops around
        hold, where registers are few: with just as many, each sum waits for itself whenever it starts late, and what
        the lanes meet is read more often. What is left of a tile is then a smaller step (WalkLowering._tails). 1: that
        is not asked for, as where rows are columns of a tile in scratch memory, of which a divisor of a line comes from
        the first cache as quickly, or where a single one would be left. Measured on a Zen 3, of the time by divisors of
        64 positions and of the columns: these alone by 6 or 3, in f32 where they lie, latent attention of 512 tokens
        0.88, of one token 0.96; positions alone, latent attention in bf16 of one token 0.96, of several 0.96 to 0.99;
        columns in scratch memory 1.01 to 1.04; 64 columns by 3 1.03 to 1.05."""
        (axis, *_), o = sums.rows, self.open[sums.rows[0]]
        enough = min(most, 2 * self.facts.fma_latency // (sums.fixed * sums.several) + 1)
        kept = [self.buffers[v] for op in sums.walk.reductions for v in op.operands if v in self.buffers]
        if not self.sixteen_registers or any(access.axes.get(axis) == element_bytes(access.dtype) for access in kept):
            return 1
        return 1 if isinstance(o.extent, int) and o.extent % self._fit(axis, most, False, enough) == 1 else enough

    def _count_beside_lanes(self, sums: _Sums, lane: str, budget: int) -> None:
        """Vectors of the lane axis, and the rows that meet them: of the result, a rectangle of sums."""
        walk, rows, fixed, several, counts = sums.walk, sums.rows, sums.fixed, sums.several, sums.counts
        registers = self.facts.vector_registers
        panel = self._panel_vectors(walk, rows, fixed, lane)
        many = bool(rows) and self.extent_hint(rows[0]) >= STAGE_ROWS
        in_turns = many and several > 1 and self.meet_in_turns(walk.reductions)
        alone = not rows and self.reads_in_blocks(walk, None, lane)
        squares = self.facts.two_by_two and self.packing is not None
        if squares and many:
            panel = min(panel, 2)
        whole = several > 1 and self._takes_whole_panels(walk, rows, panel * several * fixed, lane)
        wide = max(1, panel // (1 if in_turns or whole else several)) if rows or fixed > 1 or alone else min(8, budget)
        counts[lane] = self._fit(lane, wide, True)
        if not rows:
            return
        # Accumulators, a register for each vector of the second operand, and one to spare.
        vectors = counts[lane] * several
        # No fewer than a unit has in flight on each of two ports: else each sum waits for itself.
        hidden = 2 * self.facts.fma_latency // (vectors * fixed) + 1
        operands = counts[lane] if in_turns else vectors
        # Where elements of a row that lie side by side are loaded together, each row has a register for them.
        most = max(1, (registers - operands - 1) // (vectors * fixed + self.facts.lane_factors))
        if whole and self.panel_width(lane) > 1:
            most = min(most, WHOLE_PANEL_ROWS)
        if squares and many:    # two slots of all vectors; of two rows a register, which is read late if copied so
            copied = self.panel_width(lane) == 1 and len(walk.reduced) == 1 and fixed == 1
            most = max(1, (registers - 2 * operands - 2) // (vectors * fixed + (not copied)) & ~1)
        if any(v in self.slot_axes for op in walk.reductions for v in op.operands):
            # The rows that are read where they lie may be a power of two apart: few sets of a cache.
            most = min(most, SET_ROWS)
        if self._meets_rows_in_memory(walk, rows[0], lane):
            most = min(most, ADDRESSED_ROWS)
            if self.reads_in_blocks(walk, rows[0], lane):
                most = self._joined_rows(vectors) or min(most, registers // 2 // vectors)
        if self.requests.panel_parts and self.panel_width(lane) > 1 and self.rows_hint(rows[0]) <= FEW_ROWS:
            most = min(most, ADDRESSED_ROWS)    # of 14 at once, 4 to 8 rows would be 4 and single ones
        # Nor far fewer than fit: each piece of rows reads all of the second operand again.
        fewest = max(min(hidden, most), -(-most * 3 // 4))
        even = self._even_rows(walk, rows[0], lane, range(max(hidden, -(-most // 2)), most + 1))
        counts[rows[0]] = even or self._fit(rows[0], most, False, fewest, 2)
        if squares and counts[rows[0]] > 2 and (many or self.extent_hint(rows[0]) > counts[rows[0]]):
            counts[rows[0]] &= ~1
        if several == 1 and self._takes_whole_rows(rows, fixed, lane):
            counts[rows[0]] = self.extent_hint(rows[0])

    def _count_across_lanes(self, sums: _Sums, budget: int) -> None:
        """Rows of both operands where the contracted axis lies across the lanes: a square of sums reads the least. What
        an operand lacks an axis of is read once for several of its coordinates: not so axes that all of them have."""
        walk, lane, rows, fixed, several, counts = (
            sums.walk, sums.lane, sums.rows, sums.fixed, sums.several, sums.counts)
        lacking = [a for a in rows if any(a not in axes_of(v) for op in walk.reductions for v in op.operands)]
        rows = lacking if len(lacking) > 1 else rows
        matrices = self._row_streams(walk, lane)
        first = self._fit(rows[0], self._rows_of_streams(walk, rows[0], lane, matrices) if matrices else
                          self._streamed_rows(walk, rows[0], lane, fixed), False)
        if len(rows) > 1:
            first = self._fit(rows[0], 4, False)
            long = first * self._row_bytes(walk, rows[0], lane) > self.facts.l1_bytes // 4
            if (long and self.extent_hint(rows[1]) < STAGE_ROWS and self.facts.vector_registers >= 32
                    and not self.requests.line_by_line):
                # Few rows meet more of the other matrix, which comes from memory, unless the first cache holds it for
                # all of them. Measured on a Zen 5, 16 rows by 4096 x 4096, 6 x 4 and 4 x 6: f32 46 and 41 % of the
                # floor, bf16 45 and 40; 4 rows of i8 84 and 95 % of memory. On a Zen 4, 4 and 16 rows: f32 3.20 and
                # 5.17 ms in place of 3.68 and 5.81, bf16 1.56 and 2.51 of 2.37 and 4.03.
                first = self._fit(rows[0], 6, False, fewest=5)
        counts[rows[0]] = min(first, budget)
        few = self._few_at_once(several) if len(rows) > 1 and fixed == 1 and (
            self.extent_hint(rows[1]) < STAGE_ROWS) else 0
        met = self._few_together(rows) if fixed == several == 1 else 0
        if few:
            counts[rows[0]] = self._fit(rows[0], few, False, fewest=few)
            counts[rows[1]] = self._fit(rows[1], FEW_AT_ONCE, False, 2)
        elif met:
            counts[rows[1]] = self._fit(rows[1], met, False)
            against = max(1, (self.facts.vector_registers - BESIDE_SUMS) // counts[rows[1]])
            counts[rows[0]] = self._fit(rows[0], against, False, fewest=against)
        elif len(rows) > 1:
            free = self.facts.vector_registers - BESIDE_SUMS - min(first, 4)
            second = max(1, free // (first * several))
            if self._mends_sums():
                second = max(min(second, 2), (free - 1) // ((first + 1) * several))
            if self.requests.line_by_line and fixed == 1 and self.extent_hint(rows[1]) < STAGE_ROWS:
                # As much is made of fewer, so that rows come from places (_come_from_places). Measured on a Granite
                # Rapids, 4096 x 4096 from memory, of the time by six: 4 rows of bf16 0.67, by bf16 0.61, f32 0.93; 2
                # rows of bf16 by bf16 0.85, 8 1.01, of f32 0.97, 16 1.00.
                second = min(second, FEW_AT_ONCE)
            # 1 divides all, but is half of 2: better only where code for a row that is left has no place.
            fewest = 1 if self.facts.many_workers else min(2, second)
            counts[rows[1]] = self._fit(rows[1], second, False, fewest)

    def _count_steps(self, sums: _Sums, axis: str) -> None:
        """Of the first contracted axis that is walked: by how many steps its loop is unrolled."""
        walk, lane, outer, fixed, several, counts = (
            sums.walk, sums.lane, sums.outer, sums.fixed, sums.several, sums.counts)
        accumulators = fixed * prod(counts[a] for a in outer)
        # Unrolled by 4 where the lane axis is not reduced (by 2 in loops that are themselves inside a loop over tiles:
        # there are many of them); enough independent chains where it is. By 2 where memory bounds the walk and gives a
        # line at a time sooner (panels of bf16: 15.0 and 16.5 GB/s).
        # Slots that are loaded together, and spread by no instruction, are as many as a register has lanes.
        together = self.facts.lane_factors and self.packing is not None
        unrolled = 4 if lane not in self.bound or accumulators < 16 or together else 2
        if lane in self.bound:
            unrolled = self._overwritten_at_once(walk, fixed) or unrolled
        at_once = prod(counts[a] for a in outer if a != lane)
        if self.requests.line_by_line and fixed == 1 and outer and at_once <= LINES_AT_ONCE:
            unrolled = LINES_AT_ONCE // at_once
        wide = (lane in outer and counts[lane or ""] * several >= WIDE_VECTORS
                and not self.facts.many_workers and not self.facts.lane_factors)
        if wide or (accumulators >= 2 * self.facts.fma_latency and len(sums.rows) == 1
                    and self.reads_in_blocks(walk, sums.rows[0], lane)):
            unrolled = 1     # there are sums enough, and a row after the other is read
        if self.requests.stream_level == 1 and fixed > 1 and lane in outer and (
                accumulators > 2 * self.facts.fma_latency):
            # Likewise where heads share values. Attention of 8 x 4 heads to 4096 positions in f32, from memory on a
            # Zen 5: 751 us, where they are taken by four 872.
            unrolled = 1
        if self.packing is not None and self._is_short(axis, accumulators * several):
            unrolled = self.extent_hint(axis)
        if not isinstance(self.open[axis].extent, int):
            # Elements of a further axis, as the two of a pair, are steps as well, and each loads its rows.
            unrolled = max(1, unrolled // prod(self.extent_hint(a) for a in walk.reduced if a != axis))
        if axis == lane:
            unrolled = max(1, min(unrolled, 8 // accumulators), self.rows_at_once(walk.reductions))
            if (matrices := self._row_streams(walk, lane)):
                unrolled = max(unrolled, *(LINE_BYTES // self._vector_bytes(op) for op in matrices))
        if (pairs := self._pairs_between_lanes(walk, lane)) not in (None, axis):
            counts[pairs], unrolled = PAIR, max(1, unrolled // PAIR)
        counts[axis] = self._fit(axis, unrolled, axis == lane)

    def _pointwise_counts(self, walk: Walk, outer: list[str], lane: str, fixed: int, counts: dict[str, int]) -> None:
        """Of a walk that contracts nothing: vectors, and rows whose sums are then joined together."""
        across = self._across(walk, outer, lane)
        wide = 1 if self._stores_lines(walk) else max(1, self._vectors_at_once(walk) // fixed)
        if across is None:
            counts[lane] = self._fit(lane, wide, True)
            counts |= self._rows_of_short_vectors(walk, lane, outer, wide // counts[lane])
        else:
            counts[across] = self._fit(across, wide, False)
        if self.facts.many_workers and walk.reduced and lane not in walk.reduced:
            # A sum waits for what it adds: rows at once are as many loads on their way.
            counts[walk.reduced[-1]] = self._fit(walk.reduced[-1], ROWS_ON_THEIR_WAY, False)
        if lane in walk.reduced and outer and fixed == 1 and len(walk.reductions) == 1:
            # Several rows are summed at once where their lanes can then be joined together.
            together = counts | {outer[-1]: self._fit(outer[-1], ADDRESSED_ROWS, False)}
            if self._joint(walk, lane, together, outer[-1:]) is not None:
                counts |= together
            elif self._extent_bytes(walk) > self.facts.l2_bytes:
                # Others are so many streams from memory: a processor follows each as far as the end of its page.
                streams = self._fit(outer[-1], STREAMS, False)
                counts |= {outer[-1]: streams, lane: max(1, counts[lane] * 2 // streams)}

    def _pairs_between_lanes(self, walk: Walk, lane: str | None) -> str | None:
        """The axis along which a walk contracts pairs of bf16 that are a slot for each lane: both are in one row."""
        for axis in walk.reduced:
            for op in self.reads(walk) if axis in self.open and self.open[axis].extent == PAIR else ():
                access = self.access(op)
                if access.dtype is bf16 and access.axes.get(axis) == bf16.size_bytes and (
                        self._elements_apart(op, access, lane or "") == PAIR):
                    return axis
        return None

    def _overwritten_at_once(self, walk: Walk, fixed: int) -> int:
        """Of how many coordinates at once a walk makes a state anew that loops carry in memory, in lanes that are held
        (fixed: vectors of them), where registers are few: all of its rows are computed before any is stored. 0: of as
        many as any other walk. Measured on a Zen 3, gated delta rule of 64 x 64, 4 vectors by 4, 2 and 1 in us: 1275,
        1016 and 717."""
        overwrites = any(isinstance(root, Value) and root in self.carried_buffers for root in walk.inner)
        return max(1, OVERWRITTEN_VECTORS // fixed) if overwrites and fixed > 1 and self.sixteen_registers else 0

    def _rows_of_short_vectors(self, walk: Walk, lane: str, outer: list[str], wide: int) -> dict[str, int]:
        """Where the lane axis is shorter than what is computed at once (wide: how many times), so many coordinates of
        short axes that the largest read has not: what they share, as the two halves of a byte do, is read and widened
        once. Measured on a Zen 4, of the time of single ones: 1536 x 640 in Q4_0 to f32 0.59, to rows of bf16 0.63, in
        Q4_1 0.64, to panels of bf16 0.73. Not of axes that only smaller reads have not, as scales: by four such places
        Q4_K takes 1.13 of the time of single ones."""
        reads = self.reads(walk)
        counts: dict[str, int] = {}
        if not reads or walk.reductions or walk.reduced:
            return counts
        for op in reads if self.facts.float8_rows > 1 else ():
            # Rows of fp8 that lie one after the other are widened together.
            access = self.access(op)
            behind = next((a for a in outer if a != lane and access.axes.get(a) == self.lanes), None)
            if access.dtype in FLOAT8 and behind is not None and self.open[lane].extent == self.lanes:
                return {behind: self._fit(behind, self.facts.float8_rows, False)}
        if self.facts.many_workers:
            # Of the next axis whatever its extent: a row of some elements has fewer loads on their way than a warp may.
            axis = next((a for a in reversed(outer) if a != lane), None)
            return counts if axis is None else {axis: self._fit(axis, wide, False)}
        if self.facts.fma_per_cycle >= 2:
            return counts
        has = axes_of(max(reads, key=lambda op: prod(map(self.extent_hint, axes_of(op.result)))).result)
        for axis in (a for a in reversed(outer) if a != lane and a not in has and isinstance(self.open[a].extent, int)):
            counts[axis] = self._fit(axis, wide, False)
            wide //= counts[axis]
        return counts

    def _joined_rows(self, vectors: int) -> int:
        """How many rows meet bytes that are joined to slots for them, so many vectors, where registers are few: as many
        as have sums in all of them. Some then wait in memory, which takes less than to join bytes anew."""
        joins = self.packing is not None and self.packing.dot.elements == SLOT_BYTES
        return self.facts.vector_registers // vectors if joins and self.sixteen_registers else 0

    def _few_at_once(self, several: int) -> int:
        """How many rows of a matrix, which lie along the depth, few rows meet at once, FEW_AT_ONCE of them, where
        registers do not hold a larger square; 0 where they do, or sums that mend others need some. several: products
        that share the few rows. A product of slots for which there is no instruction has two parts of each operand.
        Measured on a Zen 3, 4096 x 4096, in ms, 4 rows of the matrix by 2 of the few, and so: f32 by 4 rows 5.50 and
        3.88, by 16 15.8 and 10.1; bf16 by 4 rows 2.45 and 1.96, by 16 8.14 and 7.67; i8 by 4 rows 1.40 and 1.27."""
        if not self.sixteen_registers or self._mends_sums():
            return 0
        parts = 2 if self.packing is not None and self.packing.dot.name in self.facts.split_dots else 1
        return max(1, (self.facts.vector_registers - parts) // (several * (FEW_AT_ONCE + parts)))

    def _few_together(self, rows: list[str]) -> int:
        """How many of few rows meet a matrix at once (Requests.few_at_once), whose rows, the first of these axes, lie
        along the depth. Measured on a Cascade Lake, 4096 x 4096 from memory, of the time that 6 rows of the matrix by 4
        of the few take, 3 by 8: 8 rows of f32 0.89, bf16 0.82, i8 0.79, 16 rows 0.92, 0.91 and 0.82, 12 rows of f32 by
        4 x 6 0.92. Four rows of f32, and two of bf16, 1.04 and 1.11: fewer have code of their own."""
        if len(rows) != 2 or self.bound or not self.typical or self.schedule.registers or (
                self.facts.vector_registers < 32):
            return 0
        return self.requests.few_at_once if FEW_AT_ONCE < self.rows_hint(rows[1]) < STAGE_ROWS else 0

    def _lie_at_constants(self, walk: Walk, axis: str) -> bool:
        """Whether the coordinates of an axis are known distances apart in all that a walk reads."""
        return all(isinstance(self.access(op).axes.get(axis, 0), int) for op in self.reads(walk))

    def _vectors_at_once(self, walk: Walk) -> int:
        """Vectors of the lane axis where nothing is contracted. Rows that are rounded by an instruction are tested for
        denormals together, and a branch parts one piece from the next; where a processor has many units but looks ahead
        little, larger pieces help if there is much arithmetic. Only of walks that do not take part of a row after
        another. Measured on a Zen 5 by 8 vectors in place of 4: GELU in bf16 12 % quicker, in the last cache and from
        memory, SwiGLU 4 to 5 %; softmax and LayerNorm, whose walks take rows, 12 % slower; f32 that is only rounded 2
        to 6 % slower. On a Zen 4 likewise: GELU in bf16 4 % quicker, SwiGLU 6 to 7 %; f32 that is only rounded 4 %
        slower from memory.

        Where the first cache takes streams, those that leave past the caches have four lines at once between them.
        Measured on a Zen 5, 4096 x 32 x 64 in f32, by two vectors in place of four: rotary embeddings of halves, which
        leave as two streams, 2.30 ms in place of 2.81, interleaved ones 2.43 in place of 2.55."""
        stores = [root for root in walk.inner if isinstance(root, Op)]
        streams = self.requests.stream_level == 1 and not walk.reductions and all(map(self.streams, stores))
        if streams and len(stores) > 1:
            return max(1, 4 // len(stores))
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
        """Whether a sum inside another loop is no loop: a block of quantised weights, whose sum is then scaled. Where a
        product is several instructions, what is left of rows is not worth as many."""
        extent = self.open[axis].extent
        if (self.packing is not None and self.packing.dot.name in self.facts.split_dots
                and any(b.rest for b in self.bound.values())):
            products *= SPLIT_DOT
        return isinstance(extent, int) and bool(self.bound) and extent * products <= UNROLLED_INSTRUCTIONS

    def _is_short_block(self, walk: Walk, lane: str | None, sums: int) -> bool:
        """Whether a sum over several axes inside another loop, for lanes that are held, is no loop either: a block of
        quantised weights that meets plain numbers. By how much these are shifted in their words depends on the place
        alone, and is constant then. Measured on a Zen 5, matvec of 14336 x 4096 on one thread, in percent of what plain
        reads reach: Q4_0 42 and 87 (by tables of floats too), Q4_1 46 and 66, Q8_0 78 and 91, Q4_K 38 and 45."""
        if self.packing is not None or lane not in self.bound or len(walk.reduced) < 2:
            return False
        extents = [self.open[axis].extent if axis in self.open else None for axis in walk.reduced]
        if not all(isinstance(extent, int) for extent in extents):
            return False
        return sums * prod(map(self.extent_hint, walk.reduced)) <= UNROLLED_INSTRUCTIONS // 2

    def _takes_whole_panels(self, walk: Walk, rows: list[str], sums: int, lane: str) -> bool:
        """Whether rows meet all vectors of the panels of several matrices at once (WHOLE_PANEL_ROWS): any number of
        rows where the panels are as wide, and few where these were packed. sums: for each row."""
        if rows and (self.facts.vector_registers - sums - 1) // sums < WHOLE_PANEL_ROWS:
            return False
        few = not rows or self.rows_hint(rows[0]) <= FEW_ROWS
        return (few and self.panel_width(lane) > self.lanes) or self._lie_in_panels(walk, lane)

    def _lie_in_panels(self, walk: Walk, lane: str) -> bool:
        """Whether what is read along the lanes has rows of two vectors, known to follow one another in memory."""
        extent, depth = self.open[lane].extent, walk.reduced[0]
        panels = [self.access(op).axes for op in self.matrices(walk, lane)]
        return extent == 2 * self.lanes and bool(panels) and all(
            axes.get(depth) == self.mul(axes[lane], extent) for axes in panels)

    def _panel_vectors(self, walk: Walk, rows: list[str], fixed: int, lane: str) -> int:
        """Vectors of the lane axis that a contraction holds: whole rows where they are short and met by few. A
        broadcast element serves so many multiply-adds: where two of them go in a cycle, 6 x 4 loads 10 vectors for 24,
        and 14 x 2 loads 16 for 28. Few rows are not worth it, nor rows that lie side by side in memory, which are
        copied a vector at a time: 6 leave most of it empty. Nor is a panel so deep that half of the second cache has no
        room for it, or that half has no room for the next one beside it, which is asked for meanwhile: all rows would
        read it from the last one, 6 at a time, which is too slow. On a Zen 5, f32, in GFLOP/s by four vectors and by
        two: 128 x 1024 x 14336 175 and 191, 512 x 2048 x 4096 220 and 231, x 2048 251 and 246."""
        if self._takes_whole_rows(rows, fixed, lane):
            return -(-self.extent_hint(lane) // self.lanes)
        if self.reads_in_blocks(walk, rows[0] if rows else None, lane):
            if self.extent_hint(lane) < LONG_LINES * self._line_vectors(walk, lane) * self.lanes:
                return 2
            # Of bytes no more than are joined to slots at a time: their sums are many.
            return min(self._line_vectors(walk, lane), max(1, self.facts.vector_registers // SLOT_BYTES))
        if not rows or self.facts.vector_registers < 32 or self.facts.fma_per_cycle < 2:
            return 2
        few = self.extent_hint(rows[0]) < STAGE_ROWS or self.panel_width(lane) > 1
        if self._meets_rows_in_memory(walk, rows[0], lane):
            few_vectors = FEW_VECTORS if self.packing is None else FEW_COPIED_VECTORS
            return WIDE_VECTORS if self.extent_hint(rows[0]) == 1 else few_vectors
        depth = self.depth_in_blocks(walk, rows[0], lane)
        depth_bytes = (depth or prod(map(self.extent_hint, walk.reduced))) * LANE_BYTES    # of slots where it is packed
        asks = not depth and not self.is_shallow(rows[0]) and self._asks_for_next_block(walk, lane)
        room_bytes = self.block_bytes // (2 if asks else 1)
        if WIDE_PANEL * self.lanes * depth_bytes > room_bytes:
            return 2
        beside = any(lane not in op.result.type.axes and self.stages_columns(op, rows[0], {rows[0]: 1})  # type: ignore[union-attr]
                     for op in self.reads(walk))
        return 2 if few or beside else WIDE_PANEL

    def depth_in_blocks(self, walk: Walk, rows: str, lane: str) -> int:
        """How many steps of the depth many rows meet in a block of panels before any meets the next ones
        (Requests.depth_block): where the rows, all of their depth, do not stay in the second cache beside such a block.
        0: all steps. What is made of the sums is stored, and what rows meet is copied or packed by panels."""
        steps = self.requests.depth_block
        depth = walk.reduced[0] if len(walk.reduced) == 1 else None
        if not steps or not self.typical or depth not in self.open or self.bound or walk.inner:
            return 0
        if not all(isinstance(root, Op) for root in walk.after) or any(r.name != "contract" for r in walk.reductions):
            return 0
        if self.schedule.stage is not None or self.schedule.order or depth in self.sequential_tiles or (
                self.schedule.registers or not self.facts.software_prefetch):
            return 0
        extents = {axis: self.extent_hint(axis) for axis in (rows, lane, depth)}
        if not self.is_bounded(rows) or not self.is_bounded(depth) or extents[rows] < STAGE_ROWS:
            return 0
        long = extents[depth] >= 2 * steps and extents[rows] * extents[depth] * LANE_BYTES >= self.block_bytes
        return steps if long and extents[lane] > WIDE_PANEL * self.lanes else 0

    def is_shallow(self, rows: str) -> bool:
        """Whether a few blocks of the depth, as deeper ones have code of their own (DEEP), are met by more rows than
        have room for their sums in half of the second cache. A panel of all of this depth then fills a half, and the
        next one is not asked for meanwhile: that it is copied for so many rows costs less."""
        return not self.typical and 0 < self.requests.depth_block < self.extent_hint(rows)

    def _mends_sums(self) -> bool:
        """Whether products with a turned operand (packed.py) are too large: where the depth lies in the lanes, each row
        of the other operand has a sum of its own for that, and a register has the bits that turn. Measured on a Zen 5,
        i8, with 6 rows by 4, which spill, and with 4 by 4, in percent of the floor: 8 rows by 2048 x 2048 65 and 77, by
        4096 x 4096 59 and 60; 12 rows by 1536 x 576 44 and 60, by 2048 x 2048 51 and 63, by 4096 x 4096 50 and 47."""
        return self.packing is not None and any(term.turned is not None for term in self.packing.terms.values())

    def _asks_for_next_block(self, walk: Walk, lane: str) -> bool:
        """Whether panels are copied from rows that lie along the depth, which the block before asks for."""
        if not self.facts.software_prefetch or len(walk.reduced) != 1:
            return False
        accesses = [self.access(op) for op in self.reads(walk) if lane in axes_of(op.result)]
        return any(access.axes.get(walk.reduced[0]) == element_bytes(access.dtype) for access in accesses)

    def _even_rows(self, walk: Walk, axis: str, lane: str, counts: range) -> int:
        """The most rows at once of some counts that leave none, where how many there are is only known as the kernel
        runs, and the block that they meet stays in the first cache, where it costs little to read it again; or 0. What
        is left of rows is code of its own. Measured on a Zen 4, scores of 64 heads by 64 positions at a time, each of
        64 + 64 numbers: by 8 rows 3 % less time than by 14, and two fifths less code."""
        block = prod(map(self.extent_hint, (lane, *walk.reduced))) * LANE_BYTES
        if isinstance(self.open[axis].extent, int) or not self.is_bounded(lane) or block > self.facts.l1_bytes // 2:
            return 0
        return max((count for count in counts if self.open[axis].divisor % count == 0), default=0)

    def _meets_rows_in_memory(self, walk: Walk, axis: str | None, lane: str | None) -> bool:
        """Whether few rows meet a matrix whose rows, contiguous along the lanes, are read where they lie. Several lines
        of each are then read at once, unless memory is best read line by line and not in blocks of rows
        (Requests.rows_in_blocks), or thousands of workers read it."""
        by_line = self.requests.line_by_line and not self.requests.rows_in_blocks
        if lane is None or by_line or self.facts.many_workers:
            return False
        if self.panel_width(lane) > 1 or (axis is not None and self.extent_hint(axis) >= STAGE_ROWS):
            return False
        matrices = [op for op in self.reads(walk) if lane in axes_of(op.result) and axis not in axes_of(op.result)]
        return bool(matrices) and all(self._lies_along_lanes(op, lane) for op in matrices)

    def reads_in_blocks(self, walk: Walk, axis: str | None, lane: str | None) -> bool:
        """Whether few rows along an axis, or a single one that has none, meet a matrix [in, out] in memory in blocks of
        its depth, of which the columns go by inside: a line of each row of a block, then the next ones. All of the
        depth for a few columns would take a line here and there from every page of the matrix. The sums wait in scratch
        memory meanwhile. Bytes are joined to slots anew for each piece of rows: more than two of these are worth a
        copy. Where two multiply-adds start in a cycle, and registers are many, several lines of each row are read at
        once instead (WIDE_VECTORS), but where the target says so (Requests.rows_in_blocks)."""
        depth = walk.reduced[0] if len(walk.reduced) == 1 else None
        wide = self.facts.fma_per_cycle >= 2 and not self.sixteen_registers and not self.requests.rows_in_blocks
        if depth not in self.open or walk.inner or wide:
            return False
        if self.schedule.stage is not None or self.schedule.order or not all(isinstance(r, Op) for r in walk.after):
            return False
        joined = self.packing is not None and self.packing.dot.elements == SLOT_BYTES
        if joined and (not self.facts.interleaves or len(walk.reductions) > 1):
            return False
        if axis is None and lane is not None:
            # Measured on a Zen 3 alone, from four places (parts_depth), in GB/s, a few columns and all rows, and so: a
            # vector by 128 x 512, 16 matrices, in f32 15 and 22, in bf16 11 and 19; sums of 8192 x 1024 8 and 21.
            others = any(a in self.bound or (a in self.open and a != lane) for a in walk.outer)
            sums = all(r.attributes.get("kind", "sum") == "sum" for r in walk.reductions)
            if others or not sums or self.packing is not None or not self.parts_depth:
                return False
        return (lane in self.open and not self._takes_whole_rows([axis] if axis else [], 1, lane)
                and self.extent_hint(lane) >= self._least_columns(walk, depth, lane)
                and self.extent_hint(depth) * self.slot_elements >= 2 * (
                    self.rows_end_to_end(axis) or self.rows_of_block)
                and (axis is None or (self.is_bounded(axis) and self.rows_hint(axis) < STAGE_ROWS))
                and self._meets_rows_in_memory(walk, axis, lane))

    @property
    def rows_of_block(self) -> int:
        """How many rows of a matrix [in, out] few others meet before any meets the next ones. Measured on a Cascade
        Lake, by 64, 32, 16 and 8 of 4096 x 4096 from memory, in ms: 8 rows of f32 20.7, 17.7, 11.0 and 12.9, bf16 8.9,
        7.7, 7.0 and 7.7, i8 5.0, 3.9, 3.8 and 4.3; 16 rows 24.7, 22.4, 22.5 and 21.4, 14.7, 14.2, 14.1 and 14.1, 7.1,
        5.1, 5.1 and 5.3."""
        return self.requests.rows_in_blocks or DEPTH_ROWS

    def rows_end_to_end(self, axis: str | None) -> int:
        """Of how many rows of a matrix [in, out] all columns meet the few vectors along an axis before any of the next
        ones does; 0 where it is read in other blocks. Measured on a Zen 3, a vector by 4096 x 4096, in ms, by 16 rows
        and 2016 columns, and by 16, 8 and 4 rows from end to end: f32 6.2, 5.9, 3.0 and 3.0 (NumPy 3.1), bf16 2.75,
        2.53, 1.80 and 1.94, i8 2.30, 2.01, 1.50 and 1.53: 16 rows of 16 KiB do not fit a set of the first cache. By 64
        and by 8 rows, 2, 4, 8 and 12 vectors of f32 6.7 and 4.7, 7.1 and 5.5, 9.1 and 11.7, 13.0 and 19.9 (NumPy 8, 7,
        8 and 10): more of these pass too many sums through memory."""
        return self.requests.rows_end_to_end if axis is None or self.rows_hint(axis) <= FEW_AT_ONCE else 0

    @property
    def parts_depth(self) -> bool:
        """Whether the rows of a matrix [in, out] that a single vector meets from end to end come from several places
        of it, each read on from there."""
        return bool(self.requests.rows_end_to_end and self.requests.row_streams) and not self.requests.again

    def _least_columns(self, walk: Walk, depth: str, lane: str) -> int:
        """How long rows are at least of which a block is read line by line."""
        short = all(self.are_short_rows(op, depth, lane) for op in self.matrices(walk, lane))
        return (SHORT_LINES if short else LONG_LINES) * self._line_vectors(walk, lane) * self.lanes

    def rows_hint(self, axis: str) -> int:
        """Typical extent of an axis of which a task has all; what its class has at least, where that is more."""
        return max(self.extent_hint(axis), self.least_rows(axis))

    def least_rows(self, axis: str) -> int:
        """What the class of an axis of which a task has all has at least."""
        capacity = self.open[axis].capacity
        if capacity is None or not capacity.dims:
            return 1
        classes = [self.specialization.dims.get(str(dim), DimClass()) for dim in capacity.dims]
        return capacity.constant * prod(found.divisor for found in classes)

    def _line_vectors(self, walk: Walk, lane: str) -> int:
        """Vectors whose lanes are a line of each row of what a walk reads along them."""
        sizes = [element_bytes(self.access(op).dtype) for op in self.matrices(walk, lane)]
        return max(1, LINE_BYTES // (min(sizes) * self.lanes)) if sizes else 1

    def matrices(self, walk: Walk, lane: str | None) -> list[Op]:
        """What a walk reads along its lanes and all that it reduces."""
        return [op for op in self.reads(walk) if {lane, *walk.reduced} <= set(axes_of(op.result))]

    def _lies_along_lanes(self, op: Op, lane: str) -> bool:
        access = self.access(op)
        return access.axes.get(lane) == element_bytes(access.dtype) and not access.gathers

    def _takes_whole_rows(self, rows: list[str], fixed: int, lane: str) -> bool:
        """Whether a matrix of short rows that few others meet is read row by row, in the order of memory, for all of
        these at once: where extents are known, even where the sums fill all registers, and for one that is known to be
        alone. fixed: rows that are bound."""
        vectors = -(-self.extent_hint(lane) // self.lanes)
        met = fixed * (self.extent_hint(rows[0]) if rows else 1)
        known = all(isinstance(self.open[axis].extent, int) for axis in (lane, *rows[:1]))
        most = self.facts.vector_registers if known else WHOLE_ROW_SUMS
        return (met > 1 or (known and bool(rows))) and 2 < vectors <= MOST_WHOLE_VECTORS and vectors * met <= most

    def _streamed_rows(self, walk: Walk, axis: str, lane: str | None, met: int) -> int:
        """Rows of matrices times a vector held at once: 8, or 4 where these fit half of L1, into which they are then
        asked. Measured on a Zen 4, rows of 576 bf16: 22 GB/s by 4 rows, 17 by 8, on another day 31 and 24. Where memory
        is best read line by line, two, a line of each in turn, which on a Granite Rapids are 3 to 10 % quicker than two
        lines of one. 8 rows of a matrix that lies in the second cache are a quarter quicker, but weights seldom do: 576
        x 1536 in bf16 from memory are 17 % slower by 8 than by two.

        Where the first cache takes streams, a single row: memory is then read as it lies. Or four, if several rows
        (met) meet each, whose sums over the lanes are then finished together: attention_decode_bf16 of 3 x 3 heads of
        64 and 512 positions in 8.0 us from the caches, 11.3 by single rows, and in 15.4 from memory, not 16.8. Four
        too if the vector that they share leaves less than half of that cache, as each row reads it again. Measured on a
        Zen 5, bf16: 4096 x 4096 at 117 % of what plain reads reach by one row, 91 by four, 89 by eight; 4096 x 14336 at
        66, 80 and 81."""
        if self.requests.line_by_line and all(axis not in self.bound for axis in walk.outer):
            return LINES_AT_ONCE
        if self.requests.stream_level == 1:
            return 1 if met == 1 and self._row_bytes(walk, axis, lane, False) <= self.facts.l1_bytes // 2 else 4
        return 4 if 4 * self._row_bytes(walk, axis, lane) <= self.facts.l1_bytes // 2 else 8

    def _row_streams(self, walk: Walk, lane: str | None) -> list[Op]:
        """The matrices of which a vector, and nothing else, meets the rows, where these are read as streams
        (Requests.row_streams)."""
        outer = [axis for axis in walk.outer if axis in self.bound or self.extent_hint(axis) > 1]
        if not self.requests.row_streams or len(outer) != 1 or outer[0] in self.bound or lane not in walk.reduced:
            return []
        if len(walk.reduced) > 1 or any(r.name != "contract" for r in walk.reductions):
            return []
        matrices = [op for op in self.reads(walk) if {outer[0], lane} <= set(axes_of(op.result))]
        along = all(set(self.access(op).axes) == {outer[0], lane} and self._lies_along_lanes(op, lane or "")
                    and not self.lies_in_pieces(op, outer[0], lane or "") for op in matrices)
        return matrices if along else []

    def _vector_bytes(self, op: Op) -> int:
        """What a load reads for one vector."""
        return element_bytes(self.access(op).dtype) * self.slot_elements * self.lanes

    def _rows_of_streams(self, walk: Walk, axis: str, lane: str | None, matrices: list[Op]) -> int:
        """How many rows of each matrix are streams at a time (_row_streams): half as many as the target says where half
        of the first cache surely holds the vector, for extents of up to four times the typical. A longer one is better
        shared by more; each stream takes a while to begin.

        Measured on a Zen 4, from memory, in percent of what plain reads reach, by 1, 2 and 4 rows in all: bf16 of 576 x
        576 89, 85, 85; of 960 x 576 with a norm 90, 94, 88; gate and up of 1536 x 576 98, 100, 96; 2048 x 2048 98, 102,
        100; 4096 x 4096 96, 100, 96; 4096 x 7168 76, 83, 92; 2048 x 8192 80, 87, 96; 4096 x 14336 73, 81, 94; f32 of
        1536 x 576 94, 98, 99, of 4096 x 4096 98, 101, 106; i8 by i8 93, 99, 98. Eight, bf16 of 4096 x 14336: 86."""
        short = 4 * self._row_bytes(walk, axis, lane, False) <= self.near_bytes // 2
        streams = self.requests.row_streams
        return max(1, ((self.requests.short_row_streams or streams // 2) if short else streams) // len(matrices))

    def _parted(self, walk: Walk, lane: str | None, counts: dict[str, int], order: list[str],
                prefetched: list[Op]) -> str | None:
        """The axis of rows that are taken several at once for a vector that fills much of the first cache
        (_streamed_rows), from as many places of the matrix: so many long streams, in place of rows that end together,
        after which the processor has to find new ones. Measured on a Zen 5, 4096 x 14336: bf16 85 % of what plain reads
        reach, and 80 by neighbours; f32 105 and 102. Eight places 79; the depth in blocks that fit the first cache, for
        4 to 16 rows each, 70: what the processor asks for behind each piece is for nothing."""
        if self._row_streams(walk, lane):
            return order[0] if order else None
        if prefetched and self._come_from_places(walk, lane, counts, order):
            return order[0]
        if len(order) != 1 or len(prefetched) != 1 or self.requests.stream_level != 1 or lane not in walk.reduced:
            return None
        single = all(self.bound[axis].count == 1 for axis in walk.outer if axis in self.bound)
        long = self._row_bytes(walk, order[0], lane, False) > self.facts.l1_bytes // 2
        return order[0] if single and long and counts[order[0]] > 1 else None

    def _come_from_places(self, walk: Walk, lane: str | None, counts: dict[str, int], order: list[str]) -> bool:
        """Whether the rows of a matrix that few others meet at once, in dot products along the lanes, come from as many
        places of it, where the processor follows these by itself. Their results then do not lie side by side: not where
        much is made of each, nor of bytes, which come in pairs. Measured on a Zen 3, by neighbours and so, from memory,
        in GB/s, one thread and two: f32 of 4096 x 4096, 2 rows 24 and 27, 35 and 43, 4 rows 20 and 25, 32 and 40, 8
        rows 10.4 and 13.4, 13 and 15.5; of 1536 x 576, 4 rows 14 and 24, 26 and 30; bf16 of 4096 x 4096, 2 rows 18.5
        and 20, 27 to 33 and 32, 4 rows 16.6 and 17, 27 and 29; i8, 4 rows 12.6 and 10.7; 16 rows of f32 60 and 62
        GFLOP/s, 77 and 88.

        Rows that end before what is asked for ahead do, without requests, where the others are as many as are known and
        held, as heads that share keys: of 8192 rows of 128 that 4 others meet, one thread, f32 17 and 26. With 16
        registers not where rows are so short that to finish sums one by one takes as long as to read them: of heads of
        128 in bf16 neighbours take 0.77 to 0.85 of the time of attention for 4 others, 0.95 to 0.98 for two, of 64 in
        bf16 0.83, in f32 0.86 to 0.90; but of 128 in f32 1.0 to 1.05 and 1.14 to 1.17.

        Where memory is best read line by line bytes come from places, too: on a Granite Rapids 2 and 4 rows of i8 by
        4096 x 4096 12.5 and 15.4, 13.3 and 14.8."""
        if self.requests.again or not self.requests.row_streams or len(order) != 2 or lane not in walk.reduced:
            return False
        axis, other = order
        pairs = self.slot_elements == SLOT_BYTES and not self.requests.line_by_line
        if pairs or axis in self.sequential_tiles or counts[axis] < 2:
            return False
        row_bytes = self._row_bytes(walk, axis, lane)
        if row_bytes <= self.requests.long_row_ahead_bytes:
            if self.sixteen_registers and row_bytes < LONG_ROW_LINES * LINE_BYTES:
                return False
            return self.open[other].extent == counts[other] and all(
                self.bound[a].count == 1 for a in walk.outer if a in self.bound)
        made = self.costs(Walk(walk.outer, (), [], [], walk.after), set()) * prod(counts[axis] for axis in order)
        return not self.bound and made <= UNROLLED_INSTRUCTIONS // 2

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
                if self.facts.many_workers or 2 * count <= typical:
                    return min(count, typical)
                # A piece as long as the axis may be, or nearly, would fit few extents: most would be walked by single
                # vectors. But for what its class has at least.
                half = typical // 2 if count >= typical else -(-typical // 2)
                return min(count, max(1, half, o.divisor // self.lanes))
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
            axes = axes_of(root)
            along = [a for a in axes if a != self.slot_axes.get(root)]      # neighbours along a depth share a slot
            if along[-1:] != [axis] or any(self.bound[a].lane for a in axes if a in self.bound):
                return False
        stores = [] if isinstance(root, Value) else [root]
        for op in (*stores, *self.reads(Walk((), (), [], [], [root]))):
            access = self.access(op)
            if (access.gathers and self._gather_spans(op, axis)) or access.axes.get(axis, 0) not in (
                    0, element_bytes(access.dtype)):
                return False
        return True

    def _gather_spans(self, op: Op, axis: str) -> bool:
        return any(axis in v.type.axes for v, _ in self.access(op).gathers)  # type: ignore[union-attr]

    # Stores past the caches.

    def _streaming_tensors(self) -> set[str]:
        """Tensors that are stored past the caches: results, unless such are asked for to be written."""
        if self.schedule.streaming is not None:
            return set(self.schedule.streaming)
        return set() if self.requests.store_ahead_bytes else set(self._large_results)

    @cached_property
    def _large_results(self) -> frozenset[str]:
        """Tensors that are written, never read, and, as the call promises, aligned and too large for the caches."""
        loaded = {op.operands[0].name for op in self.function.walk() if op.name == "load" or is_join(op)}
        return frozenset(t.name for t in self.function.tensors() if t.name in self.specialization.aligned - loaded)

    def streams(self, op: Op) -> bool:
        name = op.operands[0].name
        return op.operands[0].op is None and name in self.streaming_tensors and name in self.specialization.aligned

    def goes_to_memory(self, op: Op) -> bool:
        """Whether a store is of a large result, past the caches or asked for to be written."""
        name = op.operands[0].name
        return self.streams(op) or (
            bool(self.requests.store_ahead_bytes) and op.operands[0].op is None and name in self._large_results)

    def typical_bytes(self, tensor: Value) -> int:
        """Size of a tensor, or of a view of it, by the typical extents of its dimensions."""
        t = tensor.type
        assert isinstance(t, TensorType)
        return t.dtype.size_bytes * prod(
            self.specialization.typical(dim) for dim in t.dims)
