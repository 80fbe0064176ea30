"""Reductions: accumulators, the loops that fill them, and what becomes of them behind these.

Enters a walk at one piece of its outer axes; leaves its sums, maxima, contractions, ... as rows in registers. A short
chain of dependent additions gets several accumulators; long sums are added up in blocks; a loop that a micro-kernel by
hand fits is that one (by_hand.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import gcd, prod

from ..ir.nodes import Block, Op, Value
from ..ir.types import MASK, ROW_I32, S64, DType, RowType, TileType, f32, f64, i32, u8
from ..tile.plan import LATE, Walk, axes_of
from .axis_loops import Carried, WalkChoice
from .by_hand import Fit, emit_steps, takes
from .moves import one_by_one, rounds, together
from .rows import Rows
from .staged import StagedPanel, StagedRows
from .staging import Staging
from .state import Access, Open, row_dtype
from .tile_bound import dtype_of

FEWEST_JOINED = 4
"""Rows whose lanes are joined together: log2(lanes) rounds for one take as many shuffles as for all of them."""

OPERANDS_AND_PRODUCT = 4
"""Registers beside those of sums: for two operands that span the lanes, one that is spread over them, and a product."""

MOST_ALSO = 64
"""Contractions that are added to one sum, at most."""

SUM_BLOCK = 32768
"""Elements that are summed by themselves where there may be many more."""


@dataclass(slots=True)
class Accumulator:
    """One reduction in flight. rows: (outer coordinates, chain) -> value row, and index row for argmax. errors: outer
    coordinates of one operand -> what packed products of it are too large by (sapper/lane/packed.py).

    also: further contractions that are added to the same rows, and taken_off those of all that are taken off. total:
    the value that the rows become; else the op's."""

    op: Op
    outer: list[tuple[int, ...]]
    slots: int
    rows: dict[tuple[tuple[int, ...], int], Value]
    indices: dict[tuple[tuple[int, ...], int], Value]
    errors: dict[tuple[int, ...], Value] = field(default_factory=dict)
    also: tuple[Op, ...] = ()
    taken_off: frozenset[Op] = frozenset()
    total: Value | None = None

    @property
    def value(self) -> Value:
        """What the rows become."""
        return self.op.result if self.total is None else self.total

    def carried(self) -> Carried:
        return [*self.rows.values(), *self.indices.values(), *self.errors.values()]

    def receive(self, values: Iterator[Value]) -> None:
        """Take what `carried` gave, a round later."""
        for held in (self.rows, self.indices, self.errors):
            for key in held:
                held[key] = next(values)  # type: ignore[index]

    @property
    def rounds(self) -> bool:
        """Whether it is a sum whose every addition loses bits that count: one in f32."""
        kind = self.op.attributes.get("kind", "sum")
        return kind == "sum" and all(row.type == RowType(f32) for row in self.rows.values())


@dataclass(slots=True)
class SumOfContractions:
    """What one accumulator holds. others: what else is added. taken_off: those of the contractions that are."""

    total: Value
    contractions: list[Op] = field(default_factory=list)
    others: list[Value] = field(default_factory=list)
    taken_off: list[Op] = field(default_factory=list)


class Reductions(Staging):
    """Emits the reductions of walks. errors_before: operand -> where its errors are kept (WalkChoice.errors_first)."""

    errors_before: dict[Value, Access]
    unpacked_places: Mapping[Value, object]

    @property
    def sixteen_registers(self) -> bool:
        """Whether vector registers are 16, not 32. Those of a thread of a GPU are other ones."""
        return self.facts.vector_registers < 32 and not self.facts.many_workers

    def meet_in_turns(self, contractions: list[Op]) -> bool:
        """Whether two contractions that have no operand in common come one after the other in each step of the depth,
        where registers are few: these hold the operands of one at a time, and more sums, 3 x 2 of each in place of
        6 x 1: 10 loads serve 12 multiply-adds, not 14. Measured on a Zen 3, both products of a complex one with sums of
        their own, GFLOP/s, before and now: 240 cubed 55 to 68, 84; 300 cubed 67, 74; 512 cubed 56 to 65, 71."""
        if len(contractions) != 2 or self.packing is not None or not self.sixteen_registers:
            return False
        if any(op.name != "contract" for op in contractions):
            return False
        first, second = ({_source(v) for v in op.operands} for op in contractions)
        return first.isdisjoint(second)

    def widen_here(self, choice: WalkChoice) -> None:
        """Widen what a piece of the depth meets, or the next one (WalkChoice.widened_ahead)."""
        raise NotImplementedError("control knows what is kept")

    def widen_first(self, choice: WalkChoice) -> None:
        """Widen what the first piece of the depth meets."""
        raise NotImplementedError("control knows what is kept")

    def _slots(self, walk: Walk, choice: WalkChoice) -> int:
        """Independent accumulators, so that a short chain of dependent adds does not bound the loop."""
        if choice.by_hand is not None and choice.lane is not None and takes(self, choice.by_hand, choice.lane):
            return 1
        outer = 1
        for axis in walk.outer:
            outer *= self.bound[axis].count
        inner = 1
        for axis in choice.reduced:
            inner *= choice.counts[axis]
        outer *= len(walk.reductions)
        if self.packing is not None and self.bound and all(
                choice.counts[a] == self.open[a].extent for a in choice.reduced):
            return 1    # No loop: what a loop round it does next is independent of this sum.
        return max(1, min(inner, -(-8 // outer)))

    def _start_all(self, walk: Walk, choice: WalkChoice, slots: int) -> list[Accumulator]:
        """An accumulator for each sum of contractions, and for each reduction that is in none."""
        accumulators = []
        shared: set[Op] = set()
        for op in walk.reductions:
            if op in shared:
                continue
            accumulator = self._start(op, slots)
            found = self.sum_of(op, walk) if choice.by_hand is None and choice.lane not in walk.reduced else None
            if found is not None:
                shared |= set(found.contractions)
                accumulator.total, accumulator.taken_off = found.total, frozenset(found.taken_off)
                accumulator.also = tuple(c for c in found.contractions if c is not op)
                for point in accumulator.outer if found.others else ():
                    at = dict(zip(axes_of(op.result), point, strict=True))
                    row, *rest = [self.row(value, at) for value in found.others]
                    for other in rest:
                        row = self.emit(self.depth, "add", [row, other], ROW_I32)
                    accumulator.rows[point, 0] = row
            accumulators.append(accumulator)
        return accumulators

    def sum_of(self, op: Op, walk: Walk) -> SumOfContractions | None:
        """The sum that a contraction of a walk is a part of, if nothing else reads its parts; None if it is by itself.
        Of i32 all that is added, as that does not come from the reductions of this walk, nor of walks behind it. Of
        floats only what contractions add, or take off, and where registers are few: two sums for one take as many."""
        axes = set(axes_of(op.result))
        found = None
        total = op.result
        while op.name == "contract" and self.straight_operand(op) is None:
            readers = self.users.get(total, ())
            reader = readers[0] if len(readers) == 1 else None
            dtype = dtype_of(total)
            joined = row_dtype(dtype) is i32 or (dtype in (f32, f64) and self.sixteen_registers)
            if reader is None or total in walk.after or not joined or reader.name not in self._joining(dtype) or (
                    set(axes_of(reader.result)) != axes):
                break
            total = reader.result
            made = SumOfContractions(total)
            if not self._parts_of_sum(made, total, walk, True, False) or (dtype.is_float and made.others):
                break
            found = made
        return found

    def _joining(self, dtype: DType) -> tuple[str, ...]:
        """Ops that make a part of a sum: packed dot products only add."""
        return ("add", "sub") if dtype.is_float and self.packing is None else ("add",)

    def _parts_of_sum(self, made: SumOfContractions, value: Value, walk: Walk, top: bool, taken_off: bool) -> bool:
        """Split a sum into contractions of a walk and other values; whether that can be."""
        op = value.op
        if op in walk.reductions:
            assert op is not None
            made.contractions.append(op)
            made.taken_off += [op] * taken_off
            return (op.name == "contract" and self.straight_operand(op) is None and value not in walk.after
                    and len(self.users[value]) == 1)
        if op is not None and op.name in self._joining(dtype_of(value)) and (
                top or (len(self.users[value]) == 1 and value not in walk.after)):
            first, second = op.operands
            return self._parts_of_sum(made, first, walk, False, taken_off) and (
                self._parts_of_sum(made, second, walk, False, taken_off != (op.name == "sub")))
        made.others.append(value)
        return not self._depends(value, {r.result for r in walk.reductions})

    def _depends(self, value: Value, results: set[Value]) -> bool:
        """Whether a value needs one of the results, or one that a walk behind this one makes."""
        if value in results or value.op is None or value in self.rows or value in self.buffers:
            return value in results
        return value.op.name in LATE or any(self._depends(v, results) for v in value.op.operands)

    def _start(self, op: Op, slots: int) -> Accumulator:
        t = op.result.type
        assert isinstance(t, TileType)
        kind = op.attributes.get("kind", "sum")
        source = op.operands[0].type.dtype  # type: ignore[union-attr]
        dtype = row_dtype(t.dtype if kind == "sum" else source)
        value: float | int = 0.0 if dtype.is_float else 0
        # The extremes of the source's own dtype, not of its rows: an empty reduction gives them.
        narrow, signed = (source if source.bits < 32 else dtype), source.kind != "u"
        if kind in ("max", "argmax"):
            value = float("-inf") if dtype.is_float else -(1 << (narrow.bits - 1)) if signed else 0
        elif kind in ("min", "argmin"):
            value = float("inf") if dtype.is_float else (1 << (narrow.bits - signed)) - 1
        start = self.constant(value, dtype)
        points = [tuple(p[a] for a in t.axes) for p in self._coordinates(t.axes)]
        keys = [(p, s) for p in points for s in range(slots)]
        indices = {}
        if kind.startswith("arg"):
            none = self.constant((1 << 31) - 1, i32)
            indices = dict.fromkeys(keys, none)
        started = Accumulator(op, points, slots, dict.fromkeys(keys, start), indices)
        straight = self.straight_operand(op)
        if straight is not None:
            panel = self.staged.get(straight.op) if straight.op is not None else None
            if isinstance(panel, StagedPanel):
                for point in points:
                    started.rows[point, 0] = panel.start(dict(zip(t.axes, point, strict=True)), self.depth)
            elif straight not in self.errors_before:
                axes = self._outer_axes(straight)
                for at in self._coordinates(axes):
                    started.errors[tuple(at[a] for a in axes)] = start
        return started

    @staticmethod
    def _unpack(accumulators: list[Accumulator], carried: Carried) -> None:
        values = iter(carried)
        for a in accumulators:
            a.receive(values)

    def _outer_axes(self, operand: Value) -> tuple[str, ...]:
        """The axes of an operand of a packed contraction but for the contracted ones."""
        assert self.packing is not None
        return tuple(a for a in axes_of(operand) if a not in self.packing.reduced)

    def _take_errors_off(self, accumulators: list[Accumulator]) -> None:
        for a in accumulators:
            straight = self.straight_operand(a.op)
            if straight is None or not (a.errors or straight in self.errors_before):
                continue
            axes, outer = a.op.result.type.axes, self._outer_axes(straight)  # type: ignore[union-attr]
            if straight in self.errors_before:
                for at in self._coordinates(outer):
                    operands, attributes = self.address(self.errors_before[straight], at)
                    a.errors[tuple(at.values())] = self.emit(self.depth, "load", operands, ROW_I32, dtype=i32,
                                                             masked=False, **attributes)
            for point in a.outer:
                at = dict(zip(axes, point, strict=True))
                row = a.rows[point, 0]
                error = a.errors[tuple(at[axis] for axis in outer)]
                a.rows[point, 0] = self.emit(self.depth, "sub", [row, error], row.type)

    def _reduce(self, walk: Walk, choice: WalkChoice, k: int, accumulators: list[Accumulator], carried: Carried,
                part: Open | None = None) -> Carried:
        """The loops over the reduced axes from the k-th on, and what they do. part: the range of the one reduced axis
        that is taken, if not all of it; elements that fill no slot are in none."""
        if k == len(choice.reduced):
            return self._reduce_step(walk, choice, accumulators, carried)
        axis = choice.reduced[k]
        if choice.widened_ahead:
            self.widen_first(choice)

        def within(values: Carried) -> Carried:
            return self._reduce(walk, choice, k + 1, accumulators, values)

        if part is None and choice.by_hand is None and self._sums_long(axis, choice, accumulators):
            return self._reduce_blocks(axis, choice, accumulators, carried, within)
        by_hand = None
        if choice.by_hand is not None:
            by_hand = self._reduce_by_hand(walk, choice, choice.by_hand, accumulators, carried)
        if part is not None and part.apart != 1:
            start, count = part.offset, choice.depth_parts
            if choice.depth_block > count:      # several steps of each place
                return self._loop(axis, start, self.add(start, part.extent), count, False, False, carried, within,
                                  part.apart)
            return self._bind(axis, start, count, False, None, carried, within, apart=part.apart)
        if choice.depth_parts and part is None:
            carried = self.parted_loop(axis, choice.depth_parts, carried, within)
        else:
            carried = by_hand or self.axis_loop(axis, choice.counts[axis], axis == choice.lane, carried, within, part)
        if self.packing is None or part is not None or self.all_depth is not None:
            return carried
        with self.rest_of_depth() as any_left:
            if any_left:
                plain = replace(choice, counts={**choice.counts, axis: 1}, prefetched=[], reread=[], by_hand=None,
                                depth_parts=0)
                carried = self._reduce(walk, plain, k, accumulators, carried)
        return carried

    def _reduce_step(self, walk: Walk, choice: WalkChoice, accumulators: list[Accumulator],
                     carried: Carried) -> Carried:
        """One step of the innermost loop: all sums take their elements, and what comes later is asked for."""
        self._prefetch_next_rows(walk, choice)
        if choice.widened_here is not None:
            self.widen_here(choice)
        self._unpack(accumulators, carried)
        pieces = list(enumerate(self._coordinates(walk.reduced)))
        in_turn = self._sums_in_turn(choice, accumulators)
        places = self._step_order(choice, accumulators, pieces, in_turn)
        reread = [panel for op in choice.reread if isinstance(panel := self.staged[op], StagedPanel)]
        terms = [op for op in choice.prefetched if self.panels_of(op) is None and choice.lane not in walk.reduced]
        in_blocks = choice.depth_parts and choice.row_pieces > 1
        by_place = [op for op in choice.prefetched if in_blocks and op not in terms]
        done = [0] * len(pieces)
        for place, (number, inner, a, point, ops) in enumerate(places):
            axes = a.op.result.type.axes  # type: ignore[union-attr]
            at = {**inner, **dict(zip(axes, point, strict=True))}
            for op in ops:
                self._accumulate(a, op, point, number % a.slots, at, walk)
            done[number] += 1
            for panel in reread:
                self._prefetch_reread(panel, inner, done[number], len(places) // len(pieces))
            last = ops[-1] is (a.op, *a.also)[-1] and not (in_turn and a is not accumulators[-1])
            if last and (place + 1 == len(places) or places[place + 1][0] != number):
                for op in terms:
                    if choice.depth_parts and choice.lane is not None:
                        self._prefetch_part(op, choice.lane, inner)
                    else:
                        self._prefetch_ahead(op, walk, inner)
                for op in by_place:
                    self._prefetch_place(self.staged[op], inner, self.requests.long_row_ahead_bytes)
                for value in choice.rows_again:
                    self._prefetch_row_again(value, choice.order[0], choice.reduced[0], inner[choice.reduced[0]])
        for _, inner in pieces:
            for a in accumulators:
                self._add_errors(a, inner)
        for op in choice.prefetched:
            if self.panels_of(op) is None and choice.lane in walk.reduced:
                self._prefetch(op, walk, choice)
            elif op not in terms and op not in by_place:
                self._prefetch_panel(self.staged[op], walk, choice)
        self._ask_after_step(choice)
        self.request_stores(walk.inner)
        self._roots(walk.inner, walk)
        return [v for a in accumulators for v in a.carried()]

    def _step_order(
        self, choice: WalkChoice, accumulators: list[Accumulator], pieces: list[tuple[int, dict[str, int]]],
        in_turn: bool
    ) -> list[tuple[int, dict[str, int], Accumulator, tuple[int, ...], tuple[Op, ...]]]:
        """In which order the sums take their elements: of each turn the piece of the reduced axes, the sum, its point,
        and the contractions that add to it."""
        most = max(len(a.also) for a in accumulators) + 1
        at_once = min(most, self._contractions_at_once(accumulators))
        turns = [slice(first, first + at_once) for first in range(0, most, at_once)]
        order = [(number, inner, a, point, ops) for turn in turns
                 for number, inner, a, point in self._point_order(choice, accumulators, pieces, in_turn)
                 if (ops := (a.op, *a.also)[turn])]
        if self.packing is None and most > 1:
            order.sort(key=lambda place: place[0])      # what several read of a step is held for it alone
        return order

    def _contractions_at_once(self, accumulators: list[Accumulator]) -> int:
        """How many contractions that are added to one sum a point meets before the next point does: as many packed ones
        as registers hold the operands of that span the lanes. 4 rows by two vectors of Q6_K, whose words are four such:
        309 instructions on AVX2, not 323; on a Zen 3 4, 16 and 128 rows take 0.87, 0.91 and 0.97 of the time. Of floats
        one (sum_of)."""
        if self.packing is None:
            return 1 if any(dtype_of(a.value).is_float for a in accumulators) else MOST_ALSO
        lanes = max((bound.count for bound in self.bound.values() if bound.lane), default=1)
        free = self.facts.vector_registers - OPERANDS_AND_PRODUCT - sum(len(a.rows) for a in accumulators)
        return max(1, free // lanes)

    def _point_order(
        self, choice: WalkChoice, accumulators: list[Accumulator], pieces: list[tuple[int, dict[str, int]]],
        in_turn: bool
    ) -> list[tuple[int, dict[str, int], Accumulator, tuple[int, ...]]]:
        """The same where all contractions of a sum are met at once."""
        in_streams = bool(self.requests.row_streams) and choice.parted is not None
        if in_streams or (choice.lane in choice.reduced and self.rows_at_once([a.op for a in accumulators]) > 1):
            # What is read together is used up before the next is.
            return [(number, inner, *pair) for pair in self._by_point(accumulators) for number, inner in pieces]
        groups = [[a] for a in accumulators] if in_turn else [accumulators]
        by_step = choice.lane not in choice.reduced and self.meet_in_turns([a.op for a in accumulators])
        return [(number, inner, *pair) for some in groups for number, inner in pieces
                for together in ([[a] for a in some] if by_step else [some]) for pair in self._by_point(together)]

    def _ask_after_step(self, choice: WalkChoice) -> None:
        """Requests for what later steps, or the next block or tile, read."""
        for op in choice.staged:
            staged = self.staged.get(op)
            if choice.blocked and isinstance(staged, StagedRows):
                staged.prefetch_next()
            if op in choice.reread and isinstance(staged, StagedRows):
                staged.prefetch_ahead(self.requests.reread_ahead_bytes)
        for op in choice.panels_again:
            self._prefetch_panel_again(op, choice.reduced[0])
        for op in choice.block_ahead:
            self._prefetch_next_block(op, choice)
        for op in choice.rows_ahead:
            self._prefetch_rows_after(op, choice.order[-1], choice.reduced[0] if choice.reduced else None)
        for op in choice.rows_later:
            self._prefetch_rows_later(op, choice.order[-1], choice.reduced[0])
        for op in choice.tile_ahead:
            self._prefetch_tile_after(op, choice.order[-1], choice.reduced[0])

    def _sums_in_turn(self, choice: WalkChoice, accumulators: list[Accumulator]) -> bool:
        """Whether the sums of short packed products, which are unrolled, are made one after the other: registers do not
        hold all of them at once, and no two read the same rows, or what is unpacked of the same."""
        if self.packing is None or any(choice.counts[a] != self.open[a].extent for a in choice.reduced) or (
                sum(len(a.rows) for a in accumulators) + OPERANDS_AND_PRODUCT <= self.facts.vector_registers):
            return False
        read = [{v for op in (a.op, *a.also) for v in op.operands} for a in accumulators]
        apart = set().union(*read)
        return len(apart) == sum(map(len, read)) and all(
            v in self.unpacked_places or (v.op is not None and v.op.name == "load") for v in apart)

    @staticmethod
    def _by_point(accumulators: list[Accumulator]) -> list[tuple[Accumulator, tuple[int, ...]]]:
        """The results of all reductions, those at one place together: what they read in common need not be held. The
        axis with the fewest places goes innermost: of what spans it alone every row is held until all others are done,
        of what spans the others one at a time. 8 queries' sums of 2 vectors then take 2 registers for operands and
        one more, the other way round 8 and one."""
        pairs = [(a, point) for a in accumulators for point in a.outer]
        if len({a.op.result.type.axes for a in accumulators}) == 1:  # type: ignore[union-attr]
            points = accumulators[0].outer
            places = [len(set(along)) for along in zip(*points, strict=True)]
            axes = sorted(range(len(places)), key=lambda axis: -places[axis])
            pairs.sort(key=lambda pair: [pair[1][axis] for axis in axes])
        return pairs

    def _add_errors(self, a: Accumulator, inner: dict[str, int]) -> None:
        straight = self.straight_operand(a.op)
        if straight is None:
            return
        first = straight.type.dtype is u8  # type: ignore[union-attr]
        axes = self._outer_axes(straight)
        for point, error in a.errors.items():
            row = self.slot_row(straight, {**inner, **dict(zip(axes, point, strict=True))}, False)
            a.errors[point] = self.add_error(row, first, error)

    def _reduce_by_hand(self, walk: Walk, choice: WalkChoice, found: Fit, accumulators: list[Accumulator],
                        carried: Carried) -> Carried | None:
        """The same by a micro-kernel, and what its step leaves of the depth by one element at a time; None where it is
        not written for this tile."""
        lane = choice.lane
        assert lane is not None
        if not takes(self, found, lane):
            return None
        # What the sums of turned operands are off by (packed.py) is not the micro-kernel's: its products are exact.
        keys = [(number, point) for number, a in enumerate(accumulators) for point, _ in a.rows]
        held: list[int] = []
        start = 0
        for a in accumulators:
            held += range(start, start + len(a.rows))
            start += len(a.carried())

        def place(key: tuple[int, tuple[int, ...]]) -> tuple[int, int, int]:
            axes = axes_of(accumulators[key[0]].op.result)
            return key[0], key[1][axes.index(found.rows)], key[1][axes.index(lane)]

        in_rows = sorted(keys, key=place)
        at = {key: carried[position] for key, position in zip(keys, held, strict=True)}
        made = emit_steps(self, found, lane, [at[key] for key in in_rows])
        if made is None:
            return None
        sums, done = made
        at = dict(zip(in_rows, sums, strict=True))
        carried = list(carried)
        for key, position in zip(keys, held, strict=True):
            carried[position] = at[key]
        o = self.open[found.depth]
        if done == o.extent:
            return carried
        return self._loop(found.depth, self.add(o.offset, done), self.add(o.offset, o.extent), 1, False, False, carried,
                          lambda values: self._reduce(walk, choice, len(choice.reduced), accumulators, values))

    def _sums_long(self, axis: str, choice: WalkChoice, accumulators: list[Accumulator]) -> bool:
        """Whether sums along an axis may have so many terms that adding one after the other loses too much, and there
        are registers for sums of blocks beside the totals, not only in the walk's tails."""
        extent = self.open[axis].extent
        whole = prod(choice.counts[a] for a in choice.order) * len(accumulators)
        rows = max(whole, sum(len(a.rows) for a in accumulators))
        return (extent > SUM_BLOCK if isinstance(extent, int) else self.open[axis].hint >= SUM_BLOCK // 2) and (
            any(a.rounds for a in accumulators) and 2 * rows + 4 <= self.facts.vector_registers)

    def _reduce_blocks(self, axis: str, choice: WalkChoice, accumulators: list[Accumulator], carried: Carried,
                       inner: Callable[[Carried], Carried]) -> Carried:
        """Reduce block by block: a sum of n terms then rounds about 2 sqrt(n) times in a chain, not n times (N. Higham,
        "The accuracy of floating point summation", SIAM J. Sci. Comput. 14, 1993, section 3)."""
        o = self.open[axis]
        lane, count = axis == choice.lane, choice.counts[axis]
        step = count * self.lanes if lane else count
        size = -(-SUM_BLOCK // step) * step
        sums = [a.rounds and place < len(a.rows) for a in accumulators for place in range(len(a.rows) + len(a.indices))]
        zero = self.constant(0.0, f32)

        def block(start: Value, totals: Carried) -> Carried:
            first = [zero if is_sum else t for is_sum, t in zip(sums, totals, strict=True)]
            parts = self.axis_loop(axis, count, lane, first, inner, Open(start, size, size, size, None))
            return [self.emit(self.depth, "add", [t, p], t.type) if is_sum else p
                    for is_sum, t, p in zip(sums, totals, parts, strict=True)]

        blocks_end = self.add(o.offset, self.sub(o.extent, self.scalar("s_mod", o.extent, size)))
        body = Block([S64, *[v.type for v in carried]])
        first, last = self.value(o.offset), self.value(blocks_end)
        self.steps[body.arguments[0]] = o.offset, size
        self.enter(body)
        self.effect("yield", block(body.arguments[0], list(body.arguments[1:])))
        self.leave()
        loop = Op("loop", [first, last, *carried], [v.type for v in carried], {"step": size, "label": axis}, [body],
                  self.location)
        self.finish(loop)
        rest = Open(blocks_end, self.sub(self.add(o.offset, o.extent), blocks_end), o.hint, gcd(o.divisor, size))
        return self.axis_loop(axis, count, lane, list(loop.results), inner, rest)

    def _accumulate(self, a: Accumulator, op: Op, point: tuple[int, ...], slot: int, at: dict[str, int],
                    walk: Walk) -> None:
        key = (point, slot)
        old = a.rows[key]
        depth = self.depth
        mask = None
        for axis in walk.reduced:
            if self.bound[axis].lane:
                mask = self.bound[axis].mask
        if op.name == "contract" and self.packing is not None:
            # Where a mask cuts the depth, both operands are 0, turned or not: nothing is added.
            a.rows[key] = self.dot(op, at, old)
            return
        if op.name == "contract":
            factors = left, right = [self._contract_row(v, at, old) for v in op.operands]
            if op in a.taken_off:
                left = self.emit(depth, "neg", [left], left.type)
            if old.type in (RowType(f32), RowType(f64)):
                new = self.emit(depth, "fma", [left, right, old], old.type)
            else:
                new = self.emit(depth, "add", [old, self.emit(depth, "mul", [left, right], old.type)], old.type)
        else:
            kind = op.attributes["kind"]
            row = self.row(op.operands[0], at)
            if kind.startswith("arg"):
                better = self.emit(depth, "cmp", [row, old], MASK, cond="gt" if kind == "argmax" else "lt")
                if mask is not None:
                    better = self.emit(depth, "mask_and", [better, mask], MASK)
                (axis,) = op.attributes["over"]
                place = self._coordinate(axis, at, self.bound[axis].depth)
                a.rows[key] = self.emit(depth, "select", [better, row, old], old.type)
                a.indices[key] = self.emit(depth, "select", [better, place, a.indices[key]], RowType(i32))
                return
            if row.type != old.type:
                row = self.emit(depth, "cvt", [row], old.type)
            new = self.emit(depth, "add" if kind == "sum" else kind, [old, row] if kind == "sum" else [row, old],
                            old.type)
            factors = [row] if kind == "sum" else []
        if mask is not None and not (factors and all(_is_zero_outside(mask, row) for row in factors)):
            new = self.emit(depth, "select", [mask, new, old], old.type)
        a.rows[key] = new

    def _contract_row(self, value: Value, at: dict[str, int], like: Value) -> Value:
        row = self.row(value, at)
        return row if row.type == like.type else self.emit(self.depth, "cvt", [row], like.type)

    def _complete(self, a: Accumulator, choice: WalkChoice, joint: str | None = None) -> None:
        """Join slots and lanes; the result becomes the row of the reduction's value. joint: see `WalkChoice`; or an
        axis that registers hold (joined_rows.py)."""
        op = a.op
        t = op.result.type
        assert isinstance(t, TileType)
        kind = op.attributes.get("kind", "sum")
        across = choice.lane is not None and choice.lane in op.attributes["over"]
        rows: Rows = {}
        jointly: dict[tuple[int, ...], dict[int, Value]] = {}
        waiting: list[tuple[tuple[int, ...], Value]] = []
        at_once = across and joint is None and self.facts.moves is not None and not kind.startswith("arg")
        for point in a.outer:
            pairs = [(a.rows[point, s], a.indices.get((point, s))) for s in range(a.slots)]
            while len(pairs) > 1:
                pairs = [self._join(kind, pairs[i], pairs[i + 1]) if i + 1 < len(pairs) else pairs[i]
                         for i in range(0, len(pairs), 2)]
            if joint is not None:
                place = t.axes.index(joint)
                jointly.setdefault((*point[:place], 0, *point[place + 1:]), {})[point[place]] = pairs[0][0]
                continue
            if at_once:
                waiting.append((point, pairs[0][0]))
                continue
            pair = self._join_lanes(kind, pairs[0]) if across else pairs[0]
            rows[point] = self._result(op, kind, *pair)
        for first in range(0, len(waiting), self.lanes):
            some = dict(waiting[first:first + self.lanes])
            for point, row in zip(some, self._join_lanes_of_rows(kind, list(some.values())), strict=True):
                rows[point] = self._result(op, kind, row, None)
        for point, parts in jointly.items():
            rows[point] = self._result(op, kind, self._join_rows(kind, parts), None)
        memo = self.levels[self.level_of(a.value)].memo
        held = joint is not None and not self.bound[joint].lane
        self.joined.pop(a.value, None)
        if held and joint is not None:
            self.joined[a.value] = joint
        for point, row in rows.items():
            at = dict(zip(t.axes, point, strict=True))
            key = self.joined_key(a.value, at, joint) if held and joint is not None else (
                a.value, tuple(at[axis] for axis in axes_of(a.value)))
            memo[key] = row

    def _joined_in_registers(self, walk: Walk, choice: WalkChoice) -> str | None:
        """The axis that registers hold, of a few rows whose lanes are joined together (joined_rows.py). Where lanes are
        threads what they exchange has its price (moves.py)."""
        if choice.lane not in walk.reduced or self.facts.moves is not None:
            return None
        kinds = {op.attributes.get("kind", "contract") for op in walk.reductions}
        if kinds & {"contract", "argmax", "argmin"} or any(f"{kind}_of_lanes" in self.blocks for kind in kinds):
            return None
        found = {tuple(a for a in axes_of(op.result) if self.bound[a].count >= FEWEST_JOINED) for op in walk.reductions}
        axes = found.pop()
        return axes[0] if len(axes) == 1 and not found and axes[0] in self.joining and (
            self.bound[axes[0]].count <= self.lanes) else None

    def _join_lanes_of_rows(self, kind: str, rows: list[Value]) -> list[Value]:
        """The lanes of each of several rows joined, in every lane: by what takes fewer instructions (moves.py)."""
        moves = self.facts.moves
        assert moves is not None
        if together(len(rows), self.lanes, moves) >= one_by_one(len(rows), self.lanes, moves):
            return [self._join_lanes(kind, (row, None))[0] for row in rows]
        whole = self._join_rows(kind, dict(enumerate(rows)))
        return [self.emit(self.depth, "broadcast_lane", [whole], whole.type, lane=number)
                for number in range(len(rows))]

    def _join_lanes(self, kind: str, pair: tuple[Value, Value | None]) -> tuple[Value, Value | None]:
        """The lanes of a row joined, in every lane."""
        row_type = pair[0].type
        assert isinstance(row_type, RowType)
        made = None if pair[1] is not None else self.by_block(f"{kind}_of_lanes", [pair[0]], row_type.dtype, self.depth)
        if made is not None:
            return made, None
        distance = self.lanes // 2
        while distance:
            pair = self._join(kind, pair, tuple(None if v is None else self._shuffled(v, distance) for v in pair))  # type: ignore[arg-type]
            distance //= 2
        return pair

    def _result(self, op: Op, kind: str, result: Value, place: Value | None) -> Value:
        """What a reduction gives, from its joined rows."""
        t = op.result.type
        assert isinstance(t, TileType)
        depth = self.depth
        if place is not None:
            # Nothing was greater than the start value: all are equal to it, so the first index wins.
            (axis,) = op.attributes["over"]
            none = self.emit(depth, "cmp", [place, self.constant((1 << 31) - 1, i32)], MASK, cond="eq")
            offset = self.open[axis].offset if axis in self.open else self.bound[axis].offset
            first = self.emit(depth, "splat", [self.value(offset)], RowType(i32))
            return self.emit(depth, "select", [none, first, place], RowType(i32))
        if t.dtype.name in ("bf16", "f16"):
            return self.rounded(result, t.dtype, depth)
        return self.wrap(result, t.dtype, depth) if t.dtype.is_integer and kind == "sum" else result

    def _shuffled(self, row: Value, distance: int) -> Value:
        return self.emit(self.depth, "shuffle_xor", [row], row.type, distance=distance)

    def _join_rows(self, kind: str, rows: dict[int, Value]) -> Value:
        """Join the lanes of each of several rows: what belongs to row i comes to lane i, and to those beyond the rows
        something. A transposition in which two rows that exchange half of their lanes are joined at once."""
        if len(rows) == self.lanes:
            first = rows[0].type.dtype  # type: ignore[union-attr]
            made = self.by_block(f"{kind}_of_each_row", [rows[i] for i in range(self.lanes)], first, self.depth)
            if made is not None:
                return made
        for distance, kept in rounds(len(rows), self.lanes):
            halves: dict[int, Value] = {}
            for number, met in kept:
                if met:
                    pair = self._halves_exchanged(rows[number], rows[number | distance], distance)
                else:
                    pair = rows[number], self._shuffled(rows[number], distance)
                halves[number] = self._join(kind, (pair[0], None), (pair[1], None))[0]
            rows = halves
        return rows[0]

    def _halves_exchanged(self, one: Value, other: Value, distance: int) -> tuple[Value, Value]:
        """Two rows that are joined: half of the lanes go on with the one, the others with the other. A register of
        lanes is exchanged as a whole; threads give what they do not keep."""
        if self.facts.moves is None:
            exchange = Op("exchange", [one, other], [one.type] * 2, {"distance": distance}, None, self.location)
            self.finish(exchange)
            return exchange.results[0], exchange.results[1]
        upper = self._upper(distance)
        kept = self.emit(self.depth, "select", [upper, other, one], one.type)
        given = self.emit(self.depth, "select", [upper, one, other], one.type)
        return kept, self._shuffled(given, distance)

    def _upper(self, distance: int) -> Value:
        """The lanes whose number has the bit `distance` set."""
        memo = self.levels[0].memo
        key = ("upper lanes", distance)
        if key not in memo:
            bit = self.emit(0, "and", [self.iota(), self.constant(distance, i32)], RowType(i32))
            memo[key] = self.emit(0, "cmp", [bit, self.constant(0, i32)], MASK, cond="ne")
        found: Value = memo[key]
        return found

    def _join(self, kind: str, a: tuple[Value, Value | None], b: tuple[Value, Value | None]) -> tuple[
            Value, Value | None]:
        depth = self.depth
        left, right = a[0], b[0]
        if not kind.startswith("arg"):
            return self.emit(depth, "add" if kind == "sum" else kind, [left, right], left.type), None
        assert a[1] is not None and b[1] is not None
        better = self.emit(depth, "cmp", [right, left], MASK, cond="gt" if kind == "argmax" else "lt")
        same = self.emit(depth, "cmp", [right, left], MASK, cond="eq")
        before = self.emit(depth, "cmp", [b[1], a[1]], MASK, cond="lt")
        take = self.emit(depth, "mask_or", [better, self.emit(depth, "mask_and", [same, before], MASK)], MASK)
        return (self.emit(depth, "select", [take, right, left], left.type),
                self.emit(depth, "select", [take, b[1], a[1]], RowType(i32)))


def _source(value: Value) -> Value:
    """The tensor that an operand is loaded from, or else the operand."""
    while value.op is not None and value.op.name == "cast":
        value = value.op.operands[0]
    return value.op.operands[0] if value.op is not None and value.op.name == "load" else value


def _is_zero_outside(mask: Value, row: Value) -> bool:
    """Whether a row is 0 in the lanes that a mask leaves out, as what is read under it is: it adds nothing there."""
    op = row.op
    if op is None:
        return False
    if op.name in ("load", "gather"):
        return bool(op.attributes.get("masked")) and op.operands[-1] is mask
    return op.name in ("mul", "neg", "cvt", "abs") and all(_is_zero_outside(mask, v) for v in op.operands)
