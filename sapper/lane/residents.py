"""Which axes of a parallel loop stay in registers: how many of their elements are held there at once.

Enters: the ranges of a loop nest, and the plan of its body. Leaves: `resident`, `lane` and `walked` of each range; or
an axis of `whole` that is bound. Values that pass between walks, or into loops inside (sums, maxima), then need no
memory, but for those that are walked, whose sums tile registers make, or which are products in blocks (nest_lanes.py):
these are too many at once.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod

from ..ir.nodes import Block, Op, Value
from ..ir.types import FLOAT8, MASK, b32, bf16, i32
from ..tile.affine import affine
from ..tile.ops import memory_of, place_of
from ..tile.plan import Plan, Walk, axes_of, ops_behind, plan_block
from ..tile.schedule import ScheduleError
from .extents import Range
from .nest_lanes import MOST_ROWS, OPERAND_REGISTERS, NestLanes
from .packed import constant_behind
from .row_waits import CACHE_SHARE, FAR_BYTES, MEMORY_BYTES, WORTH, rows_in_turn, waits_of
from .state import Bound
from .tile_blocks import CHUNK_TILES, FEWEST_ROWS, is_worth, serves, sums_of
from .tile_bound import dtype_of

RESIDENT_VECTORS = 2
"""Vectors of a lane axis that carried values span: an element spread over the lanes serves so many multiply-adds."""

MANY_VECTORS = 4
"""The same where registers are few and loops inside contract: 4 by 3 sums hide the latency of a multiply-add, which 2
by 4 only just do, and what those loops read, as keys, is read half as often. Two vectors of what is left. Measured on
a Zen 3, latent_attention_f32 of 512 tokens, in percent of what a product of 512 cubed reaches beside it: 2 by 4 and
tiles of 64 positions 75, 2 by 6 and 48 77, 4 by 3 and 48 82."""

RESIDENT_ROWS = FEWER_ROWS = 4
"""Rows that carried values span where the lane axis is another; and in the tail of more."""

TAILS_OF_SUMS = FEWER_ROWS, 2
"""The same where sums fill the registers: a single row reads as much of the other operand as all rows of a tile do. On
a Granite Rapids 2 rows by 16384 x 576 in Q8_0, from memory, take 399 us in place of 675 by single ones, 3 436 in place
of 701 (1 401, 4 424); by 1536 x 576 in Q4_1 29 and 45, 35 and 49 (22, 33)."""

TAILS_WIDENED = 8, FEWER_ROWS, 2
"""The same where what they meet is fp8, whose widening takes several instructions for a vector."""

TAILS_TOGETHER, MOST_TOGETHER = (8, FEWER_ROWS), 2
"""The same where more rows than registers have sums for meet each block (Requests.rows_together), and the most sums of
each row that a block has there. On a Cascade Lake 16 rows by 7168 x 4096 from memory take, of the time of 8 and 8, 0.81
in Q8_0, 0.84 in Q4_0, 0.86 in Q4_1, and gate and up; with sums of super blocks, three for each row, 1.10 in Q4_K, 1.11
in Q6_K. What is left by fours, as elsewhere: 8 and 12 rows 1.34 and 1.15 to 1.25."""

PIECES_OF_MANY_ROWS = 2
"""Vectors of the operand that spans the lanes, for many rows: a load that spreads an element takes a cycle, as does the
dot product that it is for. Few rows wait for memory, which is quicker as one stream than as two: up to twice MOST_ROWS,
or half of that where products are of bf16, of which a dot product takes half as many as of bytes. Measured on a Zen 4,
16 rows in two pieces, in ms: fp8 of 7168 x 2048 2.6 in place of 3.3, of 2048 x 7168 2.5 of 3.0; Q8_0 of 14336 x 4096
6.6 of 5.0."""

MUCH_UNPACKING = 2.5
"""Operations for a vector of weights from which on these are unpacked for twice the rows, in one piece, where a load
that spreads an element takes no longer than a dot product. Measured on a Zen 4, 512 rows by 1024 x 4096, in percent of
the peak of dot products: Q6_K (4 then, 2.75 now) 62.4 by 8 rows and 58.8 by 4 and two pieces; Q4_0 (1) 79.8 and 83.9,
Q4_K 77.5 and 77.6."""

ADDRESS_REGISTERS = 2
"""Of a thread: what rows meet has addresses of 64 bits."""

MOST_IN_PLACES = 1600
"""Ops of a loop over blocks, for all places that it reads at a time: what they become has room in the first cache."""

JOINED_ROWS, SHORT_ROW = 8, 512
"""Rows at once whose sums lie in memory as these follow each other (joined_rows.py), and elements of a row."""

SHORT_LIST, FEW_ELEMENTS = 8, 256
"""How many largest elements of how many are found for a row in each lane; measured: three times as fast as rows one by
one for 6 of 64."""


def unpacking_of(value: Value) -> int:
    """Operations that make a vector of a value of what is loaded."""
    return sum(op.name not in ("load", "const") for op in ops_behind(value))


class ResidentLowering(NestLanes):
    """Chooses resident axes."""

    def _residents(self, ranges: list[Range], body: Block, plan: Plan, late: bool) -> None:
        """Axes of values that pass between walks or into control ops get a size: they stay in registers. late: the last
        walk follows a row behind, if rows are single."""
        nested = any(isinstance(item, Op) and "repeats" not in item.attributes for item in plan.items)
        on_tiles = self._rows_on_tiles(ranges, plan)
        sums = self._sums_in_registers(ranges, plan) if on_tiles is None else {}
        chunks = self._chunks_of_products(ranges, plan)
        across = self._neighbours(ranges, plan, body, nested) if not chunks and (nested or plan.crossing) else None
        if nested and (across is None or self._joins_slots(plan)) and not (chunks or sums) and on_tiles is None:
            chunks = self._chunks_of_products(ranges, plan, carried=True)
            across = None if chunks else across
        self.chunked |= chunks.keys()
        if across is not None:
            sums |= self._sums_across(across, ranges, plan)
        carrying = {r.axis for r in ranges
                    if nested and r.axis is not None and self._carries_contractions(r.axis, plan)}
        by_lane = None if self.reads_panels(body) else self._lane_of_nest(ranges, plan, carrying, across, nested)
        for r in ranges if not self.has_warps_together else ():
            if r.axis is None:
                continue
            if r.axis == on_tiles:
                r.resident, r.walked = CHUNK_TILES * self.lanes, True
                continue
            if r.axis in chunks:
                r.resident, r.walked = self._whole_panels(r.axis, chunks[r.axis]), True
                continue
            lane = r.axis == self.schedule.lane or (self.schedule.lane is None and r.axis == by_lane)
            if r.axis in plan.crossing or nested or len(plan.items) > 1:
                self.followed.settable.add(("tile", r.axis))
            if r.axis in plan.crossing or nested or lane or (r.axis in self.schedule.tile and len(plan.items) > 1):
                r.lane = lane and (len(plan.items) > 1 or r.axis == across)
                if lane and not r.lane and not nested:
                    continue
                size = 1
                if r.axis == across:
                    size = self.lanes * (sums.get(across) or self._vectors_of_nest(r, plan))
                elif r.lane:
                    most = MANY_VECTORS if self.sixteen_registers and r.axis in carrying else RESIDENT_VECTORS
                    size = self.lanes * next((n for n in (most, RESIDENT_VECTORS) if r.hint >= n * self.lanes), 1)
                elif r.axis in carrying and not any(other.lane or other.resident > 1 for other in ranges):
                    size = self._resident_rows(r)
                else:
                    size = sums.get(r.axis) or (1 if late else self._rows_that_wait(r, ranges, plan))
                    self.joining |= {r.axis}
                    if size == 1 and (places := self._places_of_nest(r, ranges, plan)) > 1:
                        size, r.parted = places, True
                r.resident = self.schedule.tile.get(r.axis, size)
                r.blocked = self._blocked(r, ranges, plan) if r.axis in sums else ()
                few = across is not None or not self.facts.many_workers
                r.tails = TAILS_OF_SUMS if few and r.axis in sums else (FEWER_ROWS,)
                if r.axis in sums and r.resident == self.requests.rows_together:
                    r.tails = TAILS_TOGETHER
                elif r.axis in sums and _meets_float8(plan):
                    r.tails = TAILS_WIDENED
                if r.lane and r.resident % self.lanes:
                    raise ScheduleError(f"schedule of {self.function.name}: tile of {r.axis} is {r.resident}, and the "
                                        f"model has {r.axis} across the lanes; expected a multiple of the "
                                        f"{self.lanes} lanes, or another lane axis")

        self._walk_by_parts(ranges, plan, sums)

    def _walk_by_parts(self, ranges: list[Range], plan: Plan, sums: dict[str, int]) -> None:
        """Has many rows walk the one loop that carries their sums by parts (Requests.part_bytes)."""
        rows, loops = ranges[-1], [item for item in plan.items if isinstance(item, Op)]
        if not self.requests.part_bytes or rows.axis not in sums or rows.hint <= 2 * MOST_ROWS or len(loops) != 1:
            return
        loop = loops[0]
        ends = loop.operands[:2]
        if loop.name != "each" or loop.attributes["count"] != 1 or any(
                v.op is None or v.op.name not in ("const", "dim") for v in ends):
            return
        walked = {r.axis for r in ranges}
        if any(rows.axis in axes_of(v) and set(axes_of(v)) & set(axes_of(op.result)) - walked
               for op in loop.walk() if op.name == "contract" for v in op.operands):
            return      # it counts panels
        columns = ranges[-2] if len(ranges) > 1 and ranges[-2].axis in sums else None
        pieces = 1 if columns is None else columns.resident
        bytes_of_step = pieces * self._weights_of(loop.blocks[0]) * self.lanes
        if not bytes_of_step:
            return
        rows.loop, rows.below = loop, columns is not None
        rows.steps = max(1, self.requests.part_bytes // bytes_of_step)
        if columns is not None:
            columns.blocked = ()

    def _weights_of(self, block: Block) -> int:
        """How many weights of a row the contractions of a block and of the loops inside meet, in all rounds."""
        weights = 0
        for op in block.ops:
            if op.name == "contract":
                weights += prod(self._whole_hint(axis) for axis in op.attributes["over"])
            elif op.name == "each":
                ends = op.operands[:2 * op.attributes["count"]]
                rounds = prod(self._extent_hint(*pair) for pair in zip(ends[::2], ends[1::2], strict=True))
                weights += rounds * self._weights_of(op.blocks[0])
        return weights

    def _whole_panels(self, axis: str, size: int) -> int:
        """How much of an axis is taken at once: so much, or as the schedule says. No vectors reach from one panel of a
        packed tensor into the next."""
        width, forced = self.panel_width(axis), self.schedule.tile.get(axis)
        self.followed.settable.add(("tile", axis))
        if forced is not None and forced % width:
            raise ScheduleError(f"schedule of {self.function.name}: tile of {axis} is {forced}, but the columns of a "
                                f"packed tensor lie along it; expected a multiple of {width}")
        return -(-size // width) * width if forced is None else forced

    def _lane_of_nest(self, ranges: list[Range], plan: Plan, carrying: set[str], across: str | None, nested: bool
                      ) -> str | None:
        """The one axis of a nest that lies across the lanes, if one does: of those that would the longest, of equals
        the innermost; none where a nest around has them. carrying: over which loops inside carry contractions. across,
        nested: of `_residents`."""
        if any(b.lane for b in self.bound.values()):
            return None
        found = [r for r in ranges if r.axis is not None and (
            r.axis == across or (r.axis in carrying and r.hint >= self.lanes)
            or (nested and self._lists_by_lane(r, plan)))]
        return max(reversed(found), key=lambda r: r.hint).axis if found else None

    def _places_of_nest(self, r: Range, ranges: list[Range], plan: Plan) -> int:
        """From how many places at a time a nest reads the panels of a matrix that a single row meets in one loop over
        its blocks (Requests.block_places). Of two matrices there are two streams already, and products of f32 take
        longer than memory.

        Measured on a Zen 3, 14336 x 4096 from memory, in GB/s by one place, two and four, one thread and two: Q4_0
        16.4, 18.7, 20.7 and 20.0, 26.4, 35.2; Q4_1 15.8, 21.5, 21.3 and 25.5, 32.7, 30.8; Q8_0 16.8, 18.4, 21.2 and
        25.7, 35.0, 37.8; gate and up of Q4_0 19.0, 17.0, 13.8; Q4_K 13.7, 14.3, 14.5, Q6_K 15.8, 16.7, 14.2. Where
        super blocks are written out (Requests.blocks_written_out), 4096 x 4096, of the time by pieces, by one place,
        two and four: Q4_K 1.60, 0.89, 0.82, Q6_K 1.54, 0.84, 0.83. On a Cascade
        Lake, in percent of what plain reads reach, by one place that is asked for and by eight that are not: Q4_0 106
        and 102, Q4_1 108 and 96, Q8_0 108 and 106. On a Granite Rapids, of the time of one place that is asked for by
        eight that are not, one thread, 2048 and 16000 x 1024 on huge pages: Q4_0 0.96 to
        1.0, Q8_0 0.89 to 0.92; on pages of 4 KiB, 2048 x 1024, 0.62 to 0.91 and 0.85 to 1.01, gate and up of Q4_0 by
        four each 1.05, of Q8_0 1.10. In a model two to eight places that are asked for as well take 0.97 to 1.05."""
        places = self.requests.block_places
        loops = [item for item in plan.items if isinstance(item, Op) and item.blocks]
        if not places or len(loops) != 1 or loops[0].name != "each" or r.hint < 2 * places or any(
                other.axis is not None and other.hint > 1 for other in ranges if other is not r):
            return 1
        products = [op for op in loops[0].walk() if op.name == "contract"]
        loads = [op for product in products for v in product.operands for op in ops_behind(v)
                 if op.name == "load" and r.axis in axes_of(op.result)]
        while places > 1 and places * len(loops[0].blocks[0].ops) > MOST_IN_PLACES:
            places //= 2
        one = len({memory_of(load.operands[0]) for load in loads}) == 1
        exact = all(op.result.type.dtype is i32 for op in products)  # type: ignore[union-attr]
        return places if one and exact and all(self._is_run(load, loops[0]) for load in loads) else 1

    def _is_run(self, load: Op, loop: Op) -> bool:
        """Whether each loop within loops over indices goes on reading where its last pass before ended."""
        strides = self.scalar_strides(load)
        known = [(strides.get(op.blocks[0].arguments[0], 0), constant_behind(op.operands[1]))
                 for op in loop.walk() if op.name == "each" and op.attributes["count"] == 1]
        steps = [(step, count) for step, count in known if step]
        return bool(steps) and all(
            outer == inner * (count or 0) for (outer, _), (inner, count) in pairwise(steps))

    def _rows_that_wait(self, r: Range, ranges: list[Range], plan: Plan) -> int:
        """Four where loops inside wait for what they carry along each; else two where they wait for sums of themselves
        for long, or four that lie apart. Not neighbours whose results go past the caches: memory takes longer then, and
        the last walk may follow a row behind instead (late.py)."""
        assert r.axis is not None
        stores = [root for item in plan.items if isinstance(item, Walk) for root in item.roots()
                  if isinstance(root, Op) and root.name == "store"]
        if self.facts.many_workers or r.hint < 2:
            return 1
        if not any(other.axis is not None and (other.lane or other.resident > 1) for other in ranges):
            walked = {a for a in (*(other.axis for other in ranges), *self.bound) if a is not None}
            free = self.facts.vector_registers - OPERAND_REGISTERS
            in_turn = rows_in_turn(r.axis, plan, walked, lambda values: values <= free)
            if in_turn > 1 and r.hint >= in_turn:
                return in_turn
        if r.hint >= JOINED_ROWS and self._sums_lie_along(r.axis, plan, stores):
            return JOINED_ROWS
        near = self._lie_side_by_side(r.axis, plan)
        for other in ranges:
            if other is not r and other.axis is not None and (
                    near or other.resident > 1 or self._sums_lie_along(other.axis, plan, stores)):
                return 1
        streams = any(map(self.streams, stores))
        if near and streams:
            return 1
        far = streams or (self.facts.requests.pairs_in_caches and not self._stay_in_cache(r, plan))
        waits = waits_of(r.axis, plan, self.facts, self._whole_hint, MEMORY_BYTES if far else FAR_BYTES)
        most = min(r.hint, 2 if near else 4)
        return next((n for n in (4, 2) if n <= most and waits is not None and waits.saved(n) >= WORTH), 1)

    def _stay_in_cache(self, r: Range, plan: Plan) -> bool:
        """Whether all rows that a walk reads or writes surely stay in the last cache."""
        wholes = {a for item in plan.items if isinstance(item, Walk) for a in item.axes} & self.wholes
        places = {place_of(op.operands[0]): value.type.dtype.size_bytes  # type: ignore[union-attr]
                  for op in self.function.walk() if op.name in ("load", "store")
                  for value in (op.operands[1] if op.name == "store" else op.result,)
                  if r.axis in axes_of(value) and wholes & set(axes_of(value))}
        stops = [op.operands[-1].op for op in self.function.walk()
                 if op.name == "whole" and op.attributes["axis"] in wholes]
        unknown = (not isinstance(r.stop, int)) + sum(stop is None or stop.name != "const" for stop in stops)
        size: int = r.hint * prod(map(self._whole_hint, wholes)) * sum(places.values())
        return (size * CACHE_SHARE << unknown) <= self.facts.l3_bytes

    def _sums_lie_along(self, axis: str, plan: Plan, stores: list[Op]) -> bool:
        """Whether short rows have sums, or what comes of these, that lie in memory as the rows follow each other. Not
        where the rows do, too: these are best read as the one stream that they are. Measured on a Zen 4, blocks of 128
        of quantize_fp8 by one and by eight: 557 and 574 us from the last cache, 9.0 and 19.9 ms from memory."""
        walks = [item for item in plan.items if isinstance(item, Walk)]
        wholes = {a for walk in walks for a in walk.axes} & self.wholes
        short = prod(map(self._whole_hint, wholes)) <= SHORT_ROW
        sums = [op for op in stores if wholes.isdisjoint(axes_of(op.operands[1]))]
        along = any(_steps(index, axis) for op in sums for index in op.operands[2:][-1:])
        return bool(wholes) and short and along and not self._lie_side_by_side(axis, plan)

    def _lie_side_by_side(self, axis: str, plan: Plan) -> bool:
        """Whether rows that are read end where the next ones begin."""
        walks = [item for item in plan.items if isinstance(item, Walk)]
        wholes = {a for walk in walks for a in walk.axes} & self.wholes
        loads = [op for walk in walks for op in self.reads(walk) if wholes & set(axes_of(op.result))]
        return any(_steps(index, axis) for op in loads for index in op.operands[1:][-2:-1])

    def _resident_rows(self, r: Range) -> int:
        """Rows that loops inside contract at once: what those read (a cache of keys) is then read once for all."""
        extent = self.extent_of(r)
        rows = extent if isinstance(extent, int) else r.hint
        pieces = -(-rows // RESIDENT_ROWS)
        return -(-rows // max(1, pieces))

    def _sums_in_registers(self, ranges: list[Range], plan: Plan) -> dict[str, int]:
        """How much at once of the axes over which `each` carries sums of contractions, one operand of which spans the
        lanes. As many rows of the other as the registers hold: what the first costs to read and to unpack is paid once
        for all of them. And more than one piece of the first, so that an element spread over the lanes serves each."""
        for item in plan.items:
            contractions = [op for op in item.walk() if op.name == "contract"] if isinstance(item, Op) else []
            if not isinstance(item, Op) or item.name != "each" or not item.results or not contractions:
                continue
            walked = {r.axis for r in ranges if r.axis is not None}
            lanes = {a for value in item.results for a in axes_of(value)} - walked
            operands = [frozenset(axes_of(value)) for op in contractions for value in op.operands]
            columns = {a for axes in operands if axes & lanes for a in axes & walked}
            rows = {a for axes in operands if not axes & lanes for a in axes & walked} - columns
            spanning = [axes for axes in operands if axes & lanes]
            if len(columns) > 1 or len(rows) > 1 or 2 * len(spanning) != len(operands):
                continue
            if len(lanes) != 1 or not self._fills_vectors(self._whole_hint(*lanes)) or (
                    self._whole_hint(*lanes) < self.lanes and not rows):
                continue
            hints = {r.axis: r.hint for r in ranges if r.axis is not None}
            each = max(1, self._whole_hint(*lanes) // self.lanes)
            vectors = len(item.results) * each
            many = max((hints[a] for a in rows), default=1)
            # For each a carried sum, and one of integers that is scaled before it is added; some for operands. Where
            # these are few, carried sums may lie in memory, as every block of products touches them but once.
            free = self.facts.vector_registers - OPERAND_REGISTERS
            most = max(1, free // (self._sums_at_once(item) * each), min(FEWER_ROWS, free // each))
            if self.requests.block_loads:
                taken = self._sums_at_once(item) * each + ADDRESS_REGISTERS * vectors
                words = sum(prod(map(self._whole_hint, op.attributes["over"])) for op in contractions) // b32.size_bytes
                most = max(1, min(free // taken, self.requests.block_loads // max(1, words)))
            wide = self.facts.fma_per_cycle < 2 and dtype_of(contractions[0].operands[0]) is bf16
            few = MOST_ROWS if wide else 2 * MOST_ROWS
            pieces = max(1, min(PIECES_OF_MANY_ROWS // vectors, most)) if many > few else 1
            unpacking = [unpacking_of(v) for op in contractions for v in op.operands if lanes & set(axes_of(v))]
            scarce = self.facts.fma_per_cycle < 2 or self.facts.shared_pipes
            if scarce and sum(unpacking) >= MUCH_UNPACKING * len(unpacking):
                pieces = 1
            # Blocks that a loop makes touch carried sums so seldom that these may lie in memory. Measured on a Cascade
            # Lake, fp8, 12 rows by two panels in place of 6: 0.92 to 0.94 of the time, 8 by three as long, 6 by four
            # 1.05 to 1.08.
            long = self.facts.shared_pipes and any(op.name == "tiles" and _contracts(op) for op in item.walk())
            together = self.requests.rows_together
            exact = all(dtype_of(op.result) is i32 for op in contractions)
            unknown = not any(isinstance(self.extent_of(r), int) for r in ranges if r.axis in rows)
            if 1 < many <= together and (exact or long) and unknown and self._sums_at_once(item) <= MOST_TOGETHER:
                return dict.fromkeys(columns, 1) | dict.fromkeys(rows, together)
            found = {a: min(pieces, hints[a]) for a in columns}
            held = prod(found.values())
            most = max(1, min(MOST_ROWS, most // held) if long else min(MOST_ROWS, most) // held)
            return found | dict.fromkeys(rows, most if many > 2 * MOST_ROWS else -(-many // -(-many // most)))
        return {}

    def _blocked(self, r: Range, ranges: list[Range], plan: Plan) -> tuple[Op, ...]:
        """The loads of the matrices in panels that a range counts, if many rows meet each and these are asked for
        (Requests.next_rows). Not where panels are unpacked once for all rows (unpacked.py)."""
        inside = ranges[next(i for i, other in enumerate(ranges) if other is r) + 1:]
        if not self.requests.next_rows or len(inside) != 1 or inside[0].hint <= 2 * MOST_ROWS:
            return ()
        unpacking = [unpacking_of(v) for item in plan.items if isinstance(item, Op) for op in item.walk()
                     if op.name == "contract" for v in op.operands if r.axis in axes_of(v)]
        if self.facts.shared_pipes and sum(unpacking) >= MUCH_UNPACKING * len(unpacking):
            return ()
        loads = {memory_of(op.operands[0]): op for item in plan.items if isinstance(item, Op) for op in item.walk()
                 if op.name == "load" and r.axis in axes_of(op.result) and inside[0].axis not in axes_of(op.result)}
        return tuple(loads.values())

    def _sums_at_once(self, loop: Op) -> int:
        """Sums that a loop holds while it contracts: those that it carries, or that a loop inside does, and those that
        are scaled before they are added to these, of which two share what they are made of in a super block: 4 rows of
        Q4_K by two vectors take 6 % less time on a Zen 5 than 6, whose sums do not fit. And what the loops inside that
        came before have made, as gate before up. Measured on a Zen 4, SwiGLU of 512 rows, by 8 and 12 rows at once: of
        Q8_0 by 1536 x 576 6.1 and 6.8 ms, by 14336 x 4096 321 and 341, of Q4_0 5.6 and 6.2; of fp8, 128 rows by 2048 x
        7168, 35 and 49. What is measured where two multiply-adds start in a cycle is the count without these."""
        inside = [op for op in loop.walk() if op is not loop and op.name == "each" and op.results and _contracts(op)]
        most = made = 0
        for one in inside or [loop]:
            sums = len(sums_of(self, Walk((), (), _contracts(one))))
            if self.facts.fma_per_cycle < 2:
                loops = [op for op in one.blocks[0].ops if op.name == "tiles" and _contracts(op)]
                sums = max([sums, *(len(op.results) for op in loops)])
            most = max(most, made + len(one.results) + sums)
            made += len(one.results) if self.facts.fma_per_cycle < 2 else 0
        return most

    def _rows_on_tiles(self, ranges: list[Range], plan: Plan) -> str | None:
        """The axis of many rows over which `each` carries sums of contractions that tile registers take."""
        for item in plan.items:
            if not isinstance(item, Op) or item.name != "each" or not item.results:
                continue
            contractions = [op for op in item.walk() if op.name == "contract"]
            body = plan_block(item.blocks[0], self.wholes)
            plain = all(isinstance(inner, Walk) for inner in body.items)
            if not contractions or not plain or not all(serves(self, op) for op in contractions) or not (
                    is_worth(self, contractions, len(item.results), self._whole_hint)):
                continue
            forced = self.schedule.tile.keys() | self.schedule.registers.keys()     # they speak of vectors
            walked = {r.axis: r.hint for r in ranges if r.axis is not None}
            lanes = {a for value in item.results for a in axes_of(value)} - walked.keys()
            rows = {a for op in contractions for value in op.operands if not lanes & set(axes_of(value))
                    for a in axes_of(value) if a in walked}
            if len(lanes) == len(rows) == 1 and not rows & forced and self._whole_hint(*lanes) == self.lanes and (
                    walked[next(iter(rows))] >= FEWEST_ROWS * self.lanes):
                return rows.pop()
        return None

    def _lists_by_lane(self, r: Range, plan: Plan) -> bool:
        """Whether short lists of the largest of few elements are made for many rows (experts of tokens): a list in each
        lane needs no branch, though every element goes down it."""
        for item in plan.items:
            if isinstance(item, Op) and item.name == "topk" and r.axis in axes_of(item.results[0]):
                over, into = (self._whole_hint(a) for a in (item.attributes["over"][0], item.attributes["into"]))
                if into <= SHORT_LIST and over <= FEW_ELEMENTS and r.hint >= 4 * self.lanes:
                    return True
        return False

    def _bind_short_axis(self, block: Block) -> str | None:
        """Bind an axis of `whole` that is a vector or two long and spanned by a sum that `each` carries: the lanes hold
        it in the loop, and the sum stays in registers."""
        if any(b.lane for b in self.bound.values()):
            return None
        carried = {axis for op in block.ops if op.name == "each" for value in op.results for axis in axes_of(value)
                   if any(inner.name == "contract" for inner in op.walk())}
        for op in block.ops:
            if op.name != "whole" or op.attributes["axis"] not in carried:
                continue
            axis = str(op.attributes["axis"])
            o = self.open[axis]
            if isinstance(o.extent, int) and self._fills_vectors(o.extent) and self.schedule.lane in (None, axis) and (
                    o.extent >= self.lanes or _rows_meet(block, axis)):
                del self.open[axis]
                count, mask = o.extent // self.lanes, None
                if count == 0:
                    count, mask = 1, self.emit(0, "mask_first", [self.value(o.extent)], MASK)
                self.bound[axis] = Bound(o.offset, count, True, mask, self.depth, resident=True)
                return axis
        return None

    def _fills_vectors(self, extent: int) -> bool:
        """Half a warp does, too, where rows meet what it holds: sums in registers are worth more than the other half,
        as memory of a warp's own is as far as any."""
        return extent in (self.lanes, RESIDENT_VECTORS * self.lanes) or (
            self.facts.many_workers and 2 * extent == self.lanes)


def _rows_meet(block: Block, axis: str) -> bool:
    """Whether loops in order multiply what spans an axis by several rows."""
    return any(set(axes_of(v)) - {axis, *op.attributes["over"]} for loop in block.ops if loop.name == "each"
               for op in loop.walk() if op.name == "contract" for v in op.operands if axis not in axes_of(v))


def _contracts(loop: Op) -> list[Op]:
    """The contractions of a loop that no loop inside makes."""
    return [op for op in loop.blocks[0].ops if op.name == "contract"]


def _meets_float8(plan: Plan) -> bool:
    """Whether something is contracted that is fp8 in memory."""
    contractions = [op for item in plan.items if isinstance(item, Op) for op in item.walk() if op.name == "contract"]
    return any(op.name == "load" and dtype_of(op.result) in FLOAT8
               for contraction in contractions for value in contraction.operands for op in ops_behind(value))


def _steps(index: Value, axis: str) -> bool:
    """Whether an index grows by 1 along an axis."""
    form = affine(index)
    return form is not None and form.axes.get(axis) == 1
