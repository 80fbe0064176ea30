"""Walks as loops over register-sized pieces.

Enters a walk of a plan (sapper/tile/plan.py) and its choices (lane axis, register factors, loop order, staging);
leaves lane IR appended to the current level. Every axis loop is a main loop over full steps and a tail of smaller
ones: a register axis ends in single rows, a lane axis in masked rows, so no main loop carries a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import gcd, prod
from typing import TYPE_CHECKING, Any

from ..ir.nodes import Block, Op, Value
from ..ir.types import MASK, ROW_I32, S64, DType, RowType, TensorType, TileType, bool_, f32, f64, i32, u8
from ..tile.plan import Walk, axes_of
from ..tile.schedule import Panels
from .by_hand import Fit, emit_steps, takes
from .narrow_stores import MOST_ROWS, Job
from .packed import Packing
from .pairs import Pairs
from .rows import LoweringError, Rows
from .slots import PAIR
from .state import Access, Bound, Capacity, Open, Scalar, element_bytes, memory_dtype, row_dtype
from .tile_registers import TileWalk, emit_walk

if TYPE_CHECKING:
    from .layout import Layout

Carried = list[Value]

ROLLED_ROWS = 2
"""Rows computed at once where what follows a reduction is a loop over rows."""

SUM_BLOCK = 32768
"""Elements that are summed by themselves where there may be many more."""

AHEAD_BYTES = 8192
"""How far ahead of a packed panel memory is asked for: further than its latency, and past the next page."""

NEAR_AHEAD_BYTES = 4096
"""The same for weights in blocks."""

STREAM_AHEAD_BYTES = 16384
"""The same, at least, of rows beside which results are stored past the caches. They are asked into L2: what was asked
into L1 made those stores wait."""

STREAM_REQUESTS = 3
"""How many times each line of such rows is asked for, in walks of rows before it. A Zen 4 drops a prefetch that finds
no free miss buffer, as it often does beside those stores. RMSNorm of 8192 x 4096 f32 by requests: 9.6, 8.0, 5.7 ms (a
copy takes 6.9); LayerNorm 10.5 with one and 6.9 with three."""

ROWS_AHEAD_BYTES = 10240
"""The same, at least, of rows of a matrix: it stays in half of L1 until its turn comes."""

PANEL_NEAR_AHEAD_BYTES = 2048
"""How far where a panel is read as fast as memory gives it, below SLOW_STEPS multiply-adds for each byte: the processor
then asks for what is further by itself, as long as it sees some of the accesses miss. Measured on a Zen 4: 97 % of what
plain reads reach for 4 rows, where 8192 makes 69 %; for 16 rows 76 and 89 % of the multiply-adds."""
SLOW_STEPS = 1 / 8

FEW_ROWS = 16
"""Typical number of rows up to which a contraction is bound by memory."""

COPY_AHEAD_STEPS = 32
"""How many steps of the depth ahead of a copy memory is asked for."""

WIDE_ROW_BYTES = 128
"""Rows of a panel from this size on are copied panel by panel: they are whole cache lines."""

BLOCK_PANELS = 8
"""Most panels that are walked with the same rows: these then come from the last cache so many times less often."""


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
    rows_here: staged operands of which only the rows at hand are copied, for all panels of a block. rows_ahead: loads
    of rows that are read where they lie for all panels of a block, and whose next rows are asked for meanwhile.
    tiles: how tile registers serve the walk, if they do; the counts are then those of the tiles of sums.
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
    rows_here: list[Op] = field(default_factory=list)
    rows_ahead: list[Op] = field(default_factory=list)
    tiles: TileWalk | None = None

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
            factors[axis] = (Factor(count, REGISTER, registers), Factor(lanes if axis == self.lane else 1, LANE, 1))
            registers *= count
        return Layout(dict(reversed(factors.items())))


@dataclass(slots=True)
class Accumulator:
    """One reduction in flight. rows: (outer coordinates, chain) -> value row, and index row for argmax. errors: outer
    coordinates of one operand -> what packed products of it are too large by (sapper/lane/packed.py).

    also: further contractions that are added to the same rows. total: the value that the rows become; else the op's."""

    op: Op
    outer: list[tuple[int, ...]]
    slots: int
    rows: dict[tuple[tuple[int, ...], int], Value]
    indices: dict[tuple[tuple[int, ...], int], Value]
    errors: dict[tuple[int, ...], Value] = field(default_factory=dict)
    also: tuple[Op, ...] = ()
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
class Behind:
    """A walk that is done piece by piece with its host, for other rows. bound: where these are; rows, buffers: the kept
    values that it reads, of these rows."""

    host: Walk
    walk: Walk
    bound: dict[str, Bound]
    rows: dict[Value, Rows]
    buffers: dict[Value, Access]


class WalkLowering(Pairs):
    """Emits walks. Subclasses choose (`choose`) and give scratch memory (`allocate`).

    near_bytes: size of L1. block_bytes: of panels that are walked with the same rows. block_loads: the loads of the
    block whose walks are being emitted; asking: the walks among them that ask for what they will read, if the block
    stores past the caches. pending_buffers, carried_buffers: where kept values lie, of the walk at hand and of loops
    that carry them. stage_memory: scratch memory of each staged operand. behind: what a walk does beside its own work.
    paired: axes that the walk at hand takes in steps of two, as it keeps slots. uses_tiles: whether the function has
    tile registers configured.
    """

    pending_buffers: dict[Value, Access]
    carried_buffers: dict[Value, Access]
    stage_memory: dict[tuple[str, Op], Scalar]
    near_bytes: int
    block_bytes: int
    prefetches_rows: bool
    block_loads: list[Op]
    asking: list[Walk]
    behind: Behind | None = None
    uses_tiles = False
    paired: set[str] | frozenset[str] = frozenset()

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

    def allocate(self, value: Value, dtype: DType, axes: list[tuple[str, Capacity | int]]) -> Access:
        raise NotImplementedError("control gives scratch memory")

    # Loops over one axis.

    def axis_loop(self, axis: str, count: int, lane: bool, carried: Carried,
                  body: Callable[[Carried], Carried], within: Open | None = None,
                  tails: tuple[int, ...] | None = None) -> Carried:
        """Run `body` with `axis` bound to each piece of its open extent, or of a range within it, threading carried
        values through. tails: how many rows at once of what is left, before single ones."""
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
                if rest:
                    mask = self.emit(0, "mask_first", [self.value(rest)], MASK)
                    carried = self._bind(axis, start, 1, True, mask, carried, body)
            return carried
        stop = self.add(o.offset, o.extent)
        if o.divisor % step == 0:
            return self._loop(axis, o.offset, stop, count, lane, False, carried, body)
        whole_end = self.add(o.offset, self.sub(o.extent, self.scalar("s_mod", o.extent, step)))
        carried = self._loop(axis, o.offset, whole_end, count, lane, False, carried, body)
        start = whole_end
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

    def _loop(self, axis: str, start: Scalar, stop: Scalar, count: int, lane: bool, masked: bool, carried: Carried,
              body: Callable[[Carried], Carried]) -> Carried:
        block = Block([S64, *[v.type for v in carried]])
        start_value, stop_value = self.value(start), self.value(stop)
        self.enter(block)
        counter = block.arguments[0]
        mask = None
        if masked:
            mask = self.emit(self.depth, "mask_first", [self.value(self.sub(stop, counter))], MASK)
        outer = self.bound.get(axis)
        self.bound[axis] = Bound(counter, count, lane, mask, self.depth, stop=stop)
        results = body(list(block.arguments[1:]))
        self._restore(axis, outer)
        self.effect("yield", results)
        self.leave()
        step = count * self.lanes if lane else count
        op = Op("loop", [start_value, stop_value, *carried], [v.type for v in carried], {"step": step, "label": axis},
                [block], self.location)
        self.finish(op)
        return list(op.results)

    def _bind(self, axis: str, offset: Scalar, count: int, lane: bool, mask: Value | None, carried: Carried,
              body: Callable[[Carried], Carried], narrow: bool = False) -> Carried:
        """One piece without a loop. It gets a level of its own in the same block, with its own memo."""
        self.enter_again()
        outer = self.bound.get(axis)
        self.bound[axis] = Bound(offset, count, lane, mask, self.depth, narrow=narrow)
        results = body(carried)
        self._restore(axis, outer)
        self.leave()
        for value in results:
            self.depths[value] = min(self.depths.get(value, 0), self.depth)
        return results

    def _restore(self, axis: str, outer: Bound | None) -> None:
        if outer is None:
            del self.bound[axis]
        else:
            self.bound[axis] = outer

    # A walk.

    def walk(self, walk: Walk) -> None:
        choice = self.choose(walk)
        if choice.tiles is not None:
            emit_walk(self, walk, choice)
            return
        with self.packed(choice.packing):
            self._walk(walk, choice)

    def _walk(self, walk: Walk, choice: WalkChoice) -> None:
        self.paired = self.paired_axes(walk)
        pending = list(choice.staged)
        order = [*choice.order, choice.order[0]] if choice.blocked else choice.order

        def outer(k: int) -> None:
            axis = order[k] if k < len(order) else None
            for op in list(pending):
                if k < 2 and op in choice.rows_here:
                    continue
                if axis is None or axis not in op.result.type.axes:  # type: ignore[union-attr]
                    pending.remove(op)
                    self._stage(op, walk, choice)
            if axis is None:
                self._piece(walk, choice)
            else:
                mine = list(pending)

                def body(carried: Carried) -> Carried:
                    pending[:] = mine
                    outer(k + 1)
                    return carried

                if choice.blocked and k == 0:
                    self._panel_blocks(choice, axis, lambda: body([]))
                else:
                    contracts = any(r.name == "contract" for r in walk.reductions)
                    self.axis_loop(axis, choice.counts[axis], axis == choice.lane, [], body,
                                   tails=self._tails(axis, choice.counts[axis]) if contracts else None)
                pending[:] = []

        outer(0)
        for op in choice.staged:
            self.staged.pop(op, None)

    def _tails(self, axis: str, count: int) -> tuple[int, ...]:
        """How many rows of a contraction at once what is left of its rows is cut into: each piece reads all of the
        other operand again, from memory where there are few rows in all. Of a sequential loop only the last tile leaves
        any: code for them is not worth its length."""
        o = self.open[axis]
        if o.capacity == Capacity(o.hint) and not isinstance(o.extent, int):
            return (PAIR,) if axis in self.paired and count > PAIR else ()
        sizes = (8, 4, 2) if o.hint <= FEW_ROWS else () if self.facts.many_workers else (4, 2)
        return tuple(size for size in sizes if size < count)

    def counted(self, label: str, start: Scalar, stop: Scalar, step: int, body: Callable[[Value], None]) -> None:
        """A loop that carries nothing."""
        block = Block([S64])
        first, last = self.value(start), self.value(stop)
        self.enter(block)
        body(block.arguments[0])
        self.effect("yield", [])
        self.leave()
        self.finish(Op("loop", [first, last], (), {"step": step, "label": label}, [block], self.location))

    def _panel_blocks(self, choice: WalkChoice, lane: str, body: Callable[[], Carried]) -> None:
        """Run `body` with the lane axis open to one block of panels after another."""
        o = self.open[lane]
        size = self._block_columns(choice, lane)

        def block(start: Scalar, extent: Scalar) -> None:
            width = choice.counts[lane] * self.lanes
            self.open[lane] = Open(start, extent, min(o.hint, BLOCK_PANELS * width), gcd(o.divisor, width))
            body()

        def numbered(number: Value) -> None:
            start = self.mul(number, size)
            block(self.add(o.offset, start), self.scalar("s_min", self.sub(o.extent, start), size))

        if isinstance(size, int) and isinstance(o.extent, int) and o.extent <= size:
            block(o.offset, o.extent)
        else:
            blocks = self.scalar("s_floordiv", self.sub(self.add(o.extent, size), 1), size)
            self.counted(lane, 0, blocks, 1, numbered)
        self.open[lane] = o

    def _block_columns(self, choice: WalkChoice, lane: str) -> Scalar:
        """Columns of a block: of as many panels as fill half of the second cache."""
        width = choice.counts[lane] * self.lanes
        (depth_axis,) = choice.reduced
        panel_bytes = self.mul(self._panel_depth(depth_axis), width * 4 * sum(
            lane in op.result.type.axes for op in choice.staged))  # type: ignore[union-attr]
        fitting = self.scalar("s_floordiv", self.block_bytes, self.scalar("s_max", panel_bytes, 1))
        return self.mul(self.scalar("s_max", self.scalar("s_min", fitting, BLOCK_PANELS), 1), width)

    def _panel_depth(self, depth_axis: str) -> Scalar:
        """Steps of the depth that a panel has room for: transposed squares are stored whole."""
        return self.round_up(self.open[depth_axis].extent, self.lanes)

    def _piece(self, walk: Walk, choice: WalkChoice) -> None:
        """All of the walk at one piece of its outer axes."""
        if walk.reductions:
            slots = self._slots(walk, choice)
            accumulators = self._start_all(walk, choice, slots)
            carried = [v for a in accumulators for v in a.carried()]
            carried = self._reduce(walk, choice, 0, accumulators, carried)
            self._unpack(accumulators, carried)
            self._take_errors_off(accumulators)
            joint = choice.joint if choice.joint is not None and self.bound[choice.joint].count > 1 else None
            if joint is not None:
                self._finish_jointly(walk, choice, accumulators, joint)
            elif choice.rolled is not None and self.bound[choice.rolled].count > ROLLED_ROWS:
                self._finish_in_loop(walk, choice, accumulators, choice.rolled)
            else:
                self._finish(walk, choice, accumulators)
        else:
            self._prefetch_next_rows(walk, choice)
            self._roots(walk.inner, walk)

    def _finish(self, walk: Walk, choice: WalkChoice, accumulators: list[Accumulator],
                joint: str | None = None) -> None:
        for accumulator in accumulators:
            self._complete(accumulator, choice, joint)
        self._roots(walk.after)

    def _finish_jointly(self, walk: Walk, choice: WalkChoice, accumulators: list[Accumulator], axis: str) -> None:
        """The rows of `axis`, whose lanes are summed, become one row along it: with fewer instructions than each by
        itself, and what follows is computed for all of them at once."""
        rows = self.bound[axis]
        mask = None if rows.count == self.lanes else self.emit(0, "mask_first", [self.value(rows.count)], MASK)

        def finish(carried: Carried) -> Carried:
            self._finish(walk, choice, accumulators, axis)
            return carried

        self._bind(axis, rows.offset, 1, True, mask, [], finish, narrow=mask is not None)

    def _finish_in_loop(self, walk: Walk, choice: WalkChoice, accumulators: list[Accumulator], axis: str) -> None:
        """The results go through scratch memory, so that what follows is code for a few rows, run for all."""
        rows = self.bound[axis]
        for a in accumulators:
            value = a.value
            axes: list[tuple[str, Capacity | int]] = [
                (name, self.bound[name].count * (self.lanes if self.bound[name].lane else 1))
                for name in sorted(value.type.axes, key=lambda name: self.bound[name].lane)]  # type: ignore[union-attr]
            access = self.allocate(value, value.type.dtype, axes)  # type: ignore[union-attr]
            access.relative = False
            for name, step in access.axes.items():
                access.base = self.sub(access.base, self.mul(self.bound[name].offset, step))
            self._complete(a, choice)
            for at in self._coordinates(value.type.axes):  # type: ignore[union-attr]
                self.put(access, self.row(value, at), value.type.dtype, at, value.type.axes, padded=True)  # type: ignore[union-attr]
            self.buffers[value] = access

        def finish(carried: Carried) -> Carried:
            self._roots(walk.after)
            return carried

        step = ROLLED_ROWS if rows.count % ROLLED_ROWS == 0 else 1
        self._loop(axis, rows.offset, self.add(rows.offset, rows.count), step, False, False, [], finish)
        for a in accumulators:
            del self.buffers[a.value]

    def _prefetch_next_rows(self, walk: Walk, choice: WalkChoice) -> None:
        """Where results go past the caches, ask for what the next rows will read, or, where nothing is held for a row,
        for what lies further: memory and arithmetic then work at the same time, instead of in turns. The processor's
        own prefetching stops at the end of each page of 4 KiB."""
        if choice.lane is None or not any(asking is walk for asking in self.asking):
            return
        requests = -(-STREAM_REQUESTS // len(self.asking))
        first = 1 + (len(self.asking) > 1 and any(isinstance(root, Op) and self.streams(root) for root in walk.inner))
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
            ahead = self._ahead(access.axes[rows[0]], self.bound[rows[0]].count) if rows else STREAM_AHEAD_BYTES
            assert isinstance(stride, int)
            piece_bytes = self.bound[choice.lane].count * self.lanes * self.slot_elements * stride
            for number in range(first, first + requests):
                there = replace(access, base=self.add(access.base, self.mul(ahead, number)))
                operands, attributes = self.address(there, dict.fromkeys(axes, 0))
                disp = attributes.pop("disp")
                for line in range(0, piece_bytes, 64):
                    self.effect("prefetch", operands, level=2, disp=disp + line, **attributes)

    def _ahead(self, stride: Scalar, count: int) -> Scalar:
        """How far ahead the nearest rows are asked for: whole rows, as far as a part of the second cache has room."""
        step = self.mul(self.scalar("s_max", stride, 1), count)
        rows = self.scalar("s_floordiv", self.add(step, STREAM_AHEAD_BYTES - 1), step)
        return self.scalar("s_min", self.mul(step, rows), self.block_bytes // 4)

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

    def _coordinates(self, axes: tuple[str, ...]) -> list[dict[str, int]]:
        points: list[dict[str, int]] = [{}]
        for axis in axes:
            points = [{**p, axis: j} for p in points for j in range(self.bound[axis].count)]
        return points

    def _start_all(self, walk: Walk, choice: WalkChoice, slots: int) -> list[Accumulator]:
        """An accumulator for each reduction; integer contractions that are only added to each other share one, which
        begins with what else is added to them."""
        accumulators = []
        shared: set[Op] = set()
        for op in walk.reductions:
            if op in shared:
                continue
            accumulator = self._start(op, slots)
            found = self._added_to(op, walk) if choice.by_hand is None and choice.lane not in walk.reduced else None
            if found is not None:
                total, contractions, others = found
                shared |= set(contractions)
                accumulator.total, accumulator.also = total, tuple(c for c in contractions if c is not op)
                for point in accumulator.outer if others else ():
                    at = dict(zip(axes_of(op.result), point, strict=True))
                    row, *rest = [self.row(value, at) for value in others]
                    for other in rest:
                        row = self.emit(self.depth, "add", [row, other], ROW_I32)
                    accumulator.rows[point, 0] = row
            accumulators.append(accumulator)
        return accumulators

    def _added_to(self, op: Op, walk: Walk) -> tuple[Value, list[Op], list[Value]] | None:
        """The sum of i32 that a contraction of a walk is a part of, if nothing else reads its parts: the sum, all
        contractions in it, and what else is added. What else there is does not come from the walk's reductions."""
        axes = set(axes_of(op.result))
        found = None
        total = op.result
        while op.name == "contract" and self.straight_operand(op) is None:
            readers = self.users.get(total, ())
            reader = readers[0] if len(readers) == 1 else None
            if (reader is None or reader.name != "add" or total in walk.after or row_dtype(total.type.dtype) is not i32  # type: ignore[union-attr]
                    or set(axes_of(reader.result)) != axes):
                break
            total = reader.result
            contractions: list[Op] = []
            others: list[Value] = []
            if not self._parts_of_sum(total, walk, contractions, others, True):
                break
            found = total, contractions, others
        return found

    def _parts_of_sum(self, value: Value, walk: Walk, contractions: list[Op], others: list[Value], top: bool) -> bool:
        """Split a sum into contractions of a walk and other values; whether that can be."""
        op = value.op
        if op in walk.reductions:
            assert op is not None
            contractions.append(op)
            return (op.name == "contract" and self.straight_operand(op) is None and value not in walk.after
                    and len(self.users[value]) == 1)
        if op is not None and op.name == "add" and (top or (len(self.users[value]) == 1 and value not in walk.after)):
            return all(self._parts_of_sum(v, walk, contractions, others, False) for v in op.operands)
        others.append(value)
        return not self._depends(value, {r.result for r in walk.reductions})

    def _depends(self, value: Value, results: set[Value]) -> bool:
        if value in results or value.op is None or value in self.rows or value in self.buffers:
            return value in results
        return any(self._depends(v, results) for v in value.op.operands)

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
            else:
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
            if straight is None or not a.errors:
                continue
            axes, outer = a.op.result.type.axes, self._outer_axes(straight)  # type: ignore[union-attr]
            for point in a.outer:
                at = dict(zip(axes, point, strict=True))
                row = a.rows[point, 0]
                error = a.errors[tuple(at[axis] for axis in outer)]
                a.rows[point, 0] = self.emit(self.depth, "sub", [row, error], row.type)

    def _reduce(self, walk: Walk, choice: WalkChoice, k: int, accumulators: list[Accumulator],
                carried: Carried) -> Carried:
        if k < len(choice.reduced):
            axis = choice.reduced[k]

            def within(values: Carried) -> Carried:
                return self._reduce(walk, choice, k + 1, accumulators, values)

            if choice.by_hand is None and self._sums_long(axis, choice, accumulators):
                return self._reduce_blocks(axis, choice, accumulators, carried, within)
            by_hand = None
            if choice.by_hand is not None:
                by_hand = self._reduce_by_hand(walk, choice, choice.by_hand, accumulators, carried)
            carried = by_hand or self.axis_loop(axis, choice.counts[axis], axis == choice.lane, carried, within)
            if self.packing is None:
                return carried
            with self.rest_of_depth() as any_left:
                if any_left:
                    plain = replace(choice, counts={**choice.counts, axis: 1}, prefetched=[], by_hand=None)
                    carried = self._reduce(walk, plain, k, accumulators, carried)
            return carried
        self._prefetch_next_rows(walk, choice)
        self._unpack(accumulators, carried)
        pieces = list(enumerate(self._coordinates(walk.reduced)))
        if choice.lane in choice.reduced and self.rows_at_once([a.op for a in accumulators]) > 1:
            # What is read together is used up before the next is.
            places = [(number, inner, *pair) for pair in self._by_point(accumulators) for number, inner in pieces]
        else:
            places = [(number, inner, *pair) for number, inner in pieces for pair in self._by_point(accumulators)]
        for number, inner, a, point in places:
            axes = a.op.result.type.axes  # type: ignore[union-attr]
            at = {**inner, **dict(zip(axes, point, strict=True))}
            for op in (a.op, *a.also):
                self._accumulate(a, op, point, number % a.slots, at, walk)
        for _, inner in pieces:
            for a in accumulators:
                self._add_errors(a, inner)
        for op in choice.prefetched:
            if self.panels_of(op) is None and choice.lane in walk.reduced:
                self._prefetch(op, walk, choice)
            elif self.panels_of(op) is None:
                self._prefetch_ahead(op)
            else:
                self._prefetch_panel(self.staged[op], walk)
        for op in choice.staged:
            staged = self.staged.get(op)
            if choice.blocked and isinstance(staged, StagedRows):
                staged.prefetch_next()
        for op in choice.rows_ahead:
            self._prefetch_rows_after(op, choice.order[-1])
        self._roots(walk.inner, walk)
        return [v for a in accumulators for v in a.carried()]

    @staticmethod
    def _by_point(accumulators: list[Accumulator]) -> list[tuple[Accumulator, tuple[int, ...]]]:
        """The results of all reductions, those at one place together: what they read in common need not be held."""
        pairs = [(a, point) for a in accumulators for point in a.outer]
        if len({a.op.result.type.axes for a in accumulators}) == 1:  # type: ignore[union-attr]
            place = {point: at for at, point in enumerate(accumulators[0].outer)}
            pairs.sort(key=lambda pair: place[pair[1]])
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
        self.enter(body)
        self.effect("yield", block(body.arguments[0], list(body.arguments[1:])))
        self.leave()
        loop = Op("loop", [first, last, *carried], [v.type for v in carried], {"step": size, "label": axis}, [body],
                  self.location)
        self.finish(loop)
        rest = Open(blocks_end, self.sub(self.add(o.offset, o.extent), blocks_end), o.hint, gcd(o.divisor, size))
        return self.axis_loop(axis, count, lane, list(loop.results), inner, rest)

    def _prefetch(self, op: Op, walk: Walk, choice: WalkChoice) -> None:
        """Ask for the blocks of rows after this one, line by line in the order of memory.

        A block is `count` whole rows of a contiguous matrix, hence contiguous itself, and its loop over the reduced
        axis asks for as many bytes further on as it reads here: the next block, or ROWS_AHEAD_BYTES on where that is
        short. The streams of the rows are short: the hardware finds each of them too late.
        """
        (axis,) = [a for a in op.result.type.axes if a in walk.outer]  # type: ignore[union-attr]
        (depth_axis,) = walk.reduced
        access = self.access(op)
        rows, depth = self.bound[axis], self.bound[depth_axis]
        size = element_bytes(access.dtype) * self.slot_elements
        step_bytes = rows.count * depth.count * self.lanes * size
        least_bytes = ROWS_AHEAD_BYTES // len(choice.prefetched)
        distance = self.scalar("s_max", self.mul(access.axes[axis], rows.count), least_bytes)
        block = self.add(self.add(access.base, self.mul(access.axes[axis], rows.offset)), distance)
        ahead = self.mul(self.sub(depth.offset, self.open[depth_axis].offset), rows.count * size)
        o = self.open[depth_axis]
        block_bytes = rows.count * size * (o.extent if isinstance(o.extent, int) else o.hint)
        ahead_bytes = max(block_bytes, least_bytes) * len(choice.prefetched)
        level = 1 if ahead_bytes <= self.near_bytes // 2 else 2
        for line in range(0, step_bytes, 64):
            operands, attributes = self.memory_operands(block, ahead, 1, access.disp + line)
            self.effect("prefetch", operands, level=level, **attributes)

    def _prefetch_ahead(self, op: Op) -> None:
        """Ask for what lies AHEAD_BYTES further in a matrix whose rows are read one after the other, into the second
        cache: the first has places for too few requests at a time. Measured on a Zen 4, 4 sums over rows of 128 f32:
        24 GB/s, and 20 where it is asked into the first."""
        access = self.access(op)
        step = max(1, 64 // element_bytes(access.dtype) // self.lanes)
        for at in self._coordinates(axes_of(op.result)):
            if all(not self.bound[a].lane or at[a] % step == 0 for a in at):
                operands, attributes = self.address(access, at)
                disp = attributes.pop("disp") + AHEAD_BYTES
                self.effect("prefetch", operands, level=2, disp=disp, **attributes)

    def _prefetch_rows_after(self, op: Op, row_axis: str) -> None:
        """Ask for the rows after these, as far along the depth as these are read: each begins pages away from the one
        before, where the processor does not see ahead."""
        access = self.access(op)
        rows = self.bound[row_axis].count
        for row in range(rows):
            operands, attributes = self.address(access, {**dict.fromkeys(axes_of(op.result), 0), row_axis: rows + row})
            self.effect("prefetch", operands, level=2, **attributes)

    def _prefetch_panel(self, panel: StagedPanel, walk: Walk) -> None:
        """Ask for what lies further: panels are one stream, and the processor's own prefetching stops at the end of
        each page."""
        steps = self.bound[panel.depth_axis].count
        access = panel.access()
        piece_bytes = panel.piece_bytes * self.bound[panel.lane].count
        multiply_adds = prod(self.bound[axis].count for axis in walk.outer)
        ahead = PANEL_NEAR_AHEAD_BYTES if multiply_adds < SLOW_STEPS * piece_bytes else AHEAD_BYTES
        for step in range(steps):
            operands, attributes = self.address(access, {panel.depth_axis: step})
            disp = attributes.pop("disp") + ahead
            for line in range(0, piece_bytes, 64):
                self.effect("prefetch", operands, level=2, disp=disp + line, **attributes)

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
            left, right = (self._contract_row(v, at, old) for v in op.operands)
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
        a.rows[key] = new if mask is None else self.emit(depth, "select", [mask, new, old], old.type)

    def _contract_row(self, value: Value, at: dict[str, int], like: Value) -> Value:
        row = self.row(value, at)
        return row if row.type == like.type else self.emit(self.depth, "cvt", [row], like.type)

    def _complete(self, a: Accumulator, choice: WalkChoice, joint: str | None = None) -> None:
        """Join slots and lanes; the result becomes the row of the reduction's value. joint: see `WalkChoice`."""
        op = a.op
        t = op.result.type
        assert isinstance(t, TileType)
        kind = op.attributes.get("kind", "sum")
        across = choice.lane is not None and choice.lane in op.attributes["over"]
        rows: Rows = {}
        together: dict[tuple[int, ...], dict[int, Value]] = {}
        for point in a.outer:
            pairs = [(a.rows[point, s], a.indices.get((point, s))) for s in range(a.slots)]
            while len(pairs) > 1:
                pairs = [self._join(kind, pairs[i], pairs[i + 1]) if i + 1 < len(pairs) else pairs[i]
                         for i in range(0, len(pairs), 2)]
            if joint is not None:
                place = t.axes.index(joint)
                together.setdefault((*point[:place], 0, *point[place + 1:]), {})[point[place]] = pairs[0][0]
                continue
            pair = self._join_lanes(kind, pairs[0]) if across else pairs[0]
            rows[point] = self._result(op, kind, *pair)
        for point, parts in together.items():
            rows[point] = self._result(op, kind, self._join_rows(kind, parts), None)
        memo = self.levels[self.level_of(a.value)].memo
        for point, row in rows.items():
            at = dict(zip(t.axes, point, strict=True))
            memo[a.value, tuple(at[axis] for axis in axes_of(a.value))] = row

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
        steps = [1 << bit for bit in reversed(range(self.lanes.bit_length() - 1))]
        for distance in sorted(steps, key=lambda step: step > max(rows)):   # no row so far away: last, when one is left
            halves: dict[int, Value] = {}
            for number, row in rows.items():
                if not number & distance:
                    other = rows.get(number | distance)
                    if other is None:
                        pair = row, self._shuffled(row, distance)
                    else:
                        exchange = Op("exchange", [row, other], [row.type] * 2, {"distance": distance}, None,
                                      self.location)
                        self.finish(exchange)
                        pair = exchange.results[0], exchange.results[1]
                    halves[number] = self._join(kind, (pair[0], None), (pair[1], None))[0]
            rows = halves
        return rows[0]

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

    # Stores and kept values.

    def _roots(self, roots: list[Op | Value], host: Walk | None = None) -> None:
        """All rows of all roots first where the walk stores what it also loads, so that no load sees a new value. What
        is done beside the walk `host` comes between."""
        jobs: list[tuple[Op | Value, dict[str, int], Value]] = []
        squares: list[Op] = []
        for root in roots:
            if isinstance(root, Op) and self.stores_squares(root, self.access(root)):
                squares.append(root)
                continue
            value = root if isinstance(root, Value) else root.operands[1]
            axes = list(value.type.axes)  # type: ignore[union-attr]
            if isinstance(root, Op):
                for index in root.operands[2:]:
                    axes += [a for a in index.type.axes if a not in axes]  # type: ignore[union-attr]
            depth = self.slot_axes.get(root) if isinstance(root, Value) else None
            for at in self._coordinates(tuple(axes)):
                if depth is None:
                    jobs.append((root, at, self.row(value, at)))
                elif at[depth] % PAIR == 0:
                    jobs.append((root, at, self.slots_of(value, at)))
        if self.behind is not None and self.behind.host is host:
            self._roots_behind(self.behind, host)
        rounded: list[Job] = []
        stores = [(root, at, row) for root, at, row in jobs if isinstance(root, Op)]
        pairs = self.paired_stores(stores)
        for even, odd in pairs.items():
            self.store_pair(stores[even], stores[odd], self.streams(stores[even][0]))
        taken = [stores[number] for pair in pairs.items() for number in pair]
        for root, at, row in jobs:
            if isinstance(root, Value):
                self._keep(root, at, row)
            elif (root, at, row) in taken:
                continue
            elif self.rounds_by_instruction(root, at, row):
                rounded.append((root, at, row))
            else:
                self._store(root, at, row)
        if len(rounded) > MOST_ROWS:
            for root, at, row in rounded:
                self._store(root, at, row)
        elif rounded:
            self.store_rounded(rounded, [self.streams(op) for op, _, _ in rounded])
        for op in squares:
            self._store_squares(op)

    def _store_squares(self, op: Op) -> None:
        access, value = self.access(op), op.operands[1]
        lane = next(a for a in access.axes if self.bound[a].lane)
        axis = self.square_axis(op, access, lane)
        assert axis is not None
        for at in self._coordinates(tuple(access.axes)):
            if at[axis] == 0:
                rows = [self.row(value, {**at, axis: i}) for i in range(self.lanes)]
                self.store_square(op, access, at, rows, self.streams(op))

    def _roots_behind(self, behind: Behind, host: Walk) -> None:
        """The same piece of the walk behind, at a level of its own: the same ops have other rows there."""
        self.enter_again()
        bound, rows, buffers = self.bound, self.rows, self.buffers
        self.bound = {**bound, **{a: replace(bound[a], depth=self.depth) for a in host.axes}, **behind.bound}
        self.rows, self.buffers = {**rows, **behind.rows}, {**buffers, **behind.buffers}
        self._roots(behind.walk.inner)
        self.bound, self.rows, self.buffers = bound, rows, buffers
        self.leave()

    def _store(self, op: Op, at: dict[str, int], row: Value) -> None:
        value = op.operands[1]
        axes = tuple(at)
        access = self._at_scalars(self.access(op), op, at)
        # A value that does not span the lane axis is stored by every lane that the index spans, through a full row.
        self.put(access, row, value.type.dtype, at, axes, streaming=self.streams(op))  # type: ignore[union-attr]

    def streams(self, op: Op) -> bool:
        raise NotImplementedError("the model decides")

    def _keep(self, value: Value, at: dict[str, int], row: Value) -> None:
        t = value.type
        assert isinstance(t, TileType)
        if all(a not in self.open for a in t.axes):
            self.rows.setdefault(value, {})[tuple(at[a] for a in t.axes)] = row
            return
        access = self.pending_buffers.get(value)
        if access is None:
            access = self.pending_buffers[value] = self._buffer_for(value)
        # Scratch memory is padded to whole rows: masks would only cost.
        narrow = any(self.bound[axis].narrow for axis in t.axes)
        self.put(access, row, t.dtype, at, t.axes, padded=not narrow)

    def _buffer_for(self, value: Value) -> Access:
        known = self.carried_buffers.get(value)
        if known is not None:
            return known
        axes = [(axis, self.extent_of_buffer(axis, value)) for axis in value.type.axes]  # type: ignore[union-attr]
        lanes_last = sorted(axes, key=lambda pair: pair[0] in self.bound and self.bound[pair[0]].lane)
        if value in self.slot_axes:
            return self.allocate_slots(value, lanes_last)
        dtype = value.type.dtype  # type: ignore[union-attr]
        if value.op is not None and value.op.name == "load" and dtype is not bool_:
            dtype = row_dtype(dtype)     # what was loaded is widened once, not each time that the copy is read
        return self.allocate(value, dtype, lanes_last)

    def extent_of_buffer(self, axis: str, value: Value) -> Capacity | int:
        """How many elements along an axis scratch memory for a value has."""
        o = self.open.get(axis)
        if o is None:
            bound = self.bound[axis]
            return bound.count * (self.lanes if bound.lane else 1)
        if isinstance(o.extent, int):
            return o.extent
        if o.capacity is None:
            raise LoweringError(f"the extent of axis {axis} is only known when the kernel runs, and a value over "
                                "it must be kept in scratch memory; walk it with tiles(...)", value.op)
        return o.capacity

    def use_tiles(self) -> None:
        """Have the tile registers configured, once, before all that is being emitted."""
        if not self.uses_tiles:
            self.uses_tiles = True
            self.levels[0].builder.block.ops.append(Op("tile_configure", [], ()))

    # Staging: operands of a contraction copied to scratch memory in the order in which the inner loop reads them.

    def _stage(self, op: Op, walk: Walk, choice: WalkChoice) -> None:
        lane = choice.lane
        self.staged.pop(op, None)        # the copy itself reads the tensor
        axes = op.result.type.axes  # type: ignore[union-attr]
        (depth_axis,) = [a for a in axes if a in walk.reduced]
        rows = [a for a in axes if a not in walk.reduced and a in self.open]
        panels = self.panels_of(op)
        if panels is not None:
            assert lane is not None
            self.staged[op] = PanelInPlace(self, op, panels, lane, depth_axis)
            if op in choice.widened:
                self.staged[op] = self._stage_panels(op, lane, depth_axis, walk, choice)
        elif lane is not None and lane in axes:
            self.staged[op] = self._stage_panels(op, lane, depth_axis, walk, choice)
        else:
            (row_axis,) = rows
            if op in choice.rows_here:
                self.staged[op] = self._stage_rows_here(op, row_axis, depth_axis, choice)
                return
            stage = self._stage_columns if self.stages_columns(op, row_axis, choice.counts) else self._stage_rows
            self.staged[op] = stage(op, row_axis, depth_axis, choice)

    def panels_of(self, op: Op) -> Panels | None:
        """The panels in which a load's tensor was packed."""
        found = self.stride_classes.get(op.operands[0].name)
        return found if isinstance(found, Panels) else None

    def stages_columns(self, op: Op, row_axis: str, counts: Mapping[str, int]) -> bool:
        """Whether an operand that is staged along its rows is contiguous there, and a vector holds so many of them."""
        access = self.access(op)
        contiguous = access.axes.get(row_axis) == element_bytes(access.dtype) and not access.gathers
        return contiguous and counts[row_axis] <= self.lanes

    def _stage_panels(self, op: Op, lane: str, depth_axis: str, walk: Walk, choice: WalkChoice) -> StagedPanel:
        """Copy [depth][piece] for the piece that the lane axis is bound to, or one after another for all of a block."""
        dtype = self.operand_dtype(op)
        width = choice.counts[lane] * self.lanes
        key = ("panel", op)
        if key not in self.stage_memory:
            depth = (self._capacity(depth_axis), self.lanes * self.slot_elements)
            self.stage_memory[key] = self._scratch_of(op, [depth, (width, 1)])
            if choice.blocked:       # a block has one panel, or fits: the room for both follows on that for one
                self.scratch([(self.block_bytes, 64)], u8)
        column_bytes = self.mul(self._panel_depth(depth_axis), dtype.size_bytes) if choice.blocked else 0
        panel = StagedPanel(self, self.stage_memory[key], depth_axis, lane, dtype, column_bytes)
        turned = any(self.straight_operand(contraction) is op.result for contraction in walk.reductions)
        if turned:
            key = ("start", op)
            if key not in self.stage_memory:
                panels = BLOCK_PANELS if choice.blocked else 1
                self.stage_memory[key] = self.scratch([(panels * width, 1)], i32)
            panel.start_base = self.stage_memory[key]

        def starts(carried: Carried) -> Carried:
            if turned:
                self._stage_start(op, panel)
            return carried

        access = self.access(op)
        along_depth = access.axes.get(depth_axis) == element_bytes(access.dtype) and not access.gathers

        def over_pieces(copy: Callable[[Carried], Carried]) -> Carried:
            return self.axis_loop(lane, choice.counts[lane], True, [], copy) if choice.blocked else copy([])

        def transpose(carried: Carried) -> Carried:
            into = self._scatter_into if self.transposes_by_scatter else self._transpose_into
            into(op, panel, lane, depth_axis, self.operand_access(op))
            return starts(carried)

        def copy(carried: Carried) -> Carried:
            for at in self._coordinates((depth_axis, lane)):
                panel.store(at, self.operand_row(op, at))
            if self.prefetches_rows and not access.gathers:
                self._prefetch_rows(op, panel)
            return carried

        if along_depth:
            over_pieces(transpose)
        elif choice.blocked and width * element_bytes(access.dtype) < WIDE_ROW_BYTES:
            # All pieces of a step of the depth, which lie side by side, before the next step.
            self.axis_loop(depth_axis, 1, False, [], lambda _: over_pieces(copy))
            if turned:
                over_pieces(starts)
        else:
            over_pieces(lambda _: starts(self.axis_loop(depth_axis, 4, False, [], copy)))
        return panel

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

    def _stage_start(self, op: Op, panel: StagedPanel) -> None:
        """What sums of products with a panel's columns begin with: minus what they will be too large by."""
        bound = self.bound[panel.lane]
        first = op.result.type.dtype is u8  # type: ignore[union-attr]

        def column_sums(carried: Carried) -> Carried:
            sums = list(carried)
            for at in self._coordinates((panel.depth_axis, panel.lane)):
                row = panel.load(at, self.depth)
                sums[at[panel.lane]] = self.add_error(row, first, sums[at[panel.lane]])
            return sums

        zero = self.constant(0, i32)
        for piece, total in enumerate(self.axis_loop(panel.depth_axis, 4, False, [zero] * bound.count, column_sums)):
            panel.store_start(piece, self.emit(self.depth, "sub", [zero, total], ROW_I32))

    def _scratch_of(self, op: Op, extents: list[tuple[Capacity | int, int]]) -> Scalar:
        """Scratch memory for so many elements of an operand: as wide as in memory where they are packed in slots."""
        dtype = op.result.type.dtype  # type: ignore[union-attr]
        return self.scratch(extents, row_dtype(dtype) if self.packing is None else dtype)

    def _scatter_into(self, op: Op, panel: StagedPanel, lane: str, depth_axis: str, access: Access) -> None:
        """The source is contiguous along the depth: load rows along it, and scatter each down a column of the panel."""
        piece, walked = self.bound[lane], self.open[lane]
        extent: Scalar = piece.count * self.lanes
        if piece.mask is not None:
            extent = self.scalar("s_min", self.sub(self.add(walked.offset, walked.extent), piece.offset), extent)
        column = Access(panel.base, 0, {depth_axis: panel.depth_bytes, lane: panel.dtype.size_bytes},
                        memory_dtype(panel.dtype), relative=True)
        self.open[lane] = Open(piece.offset, extent, piece.count * self.lanes)

        def copy(carried: Carried) -> Carried:
            for at in self._coordinates((lane, depth_axis)):
                self.put(column, self.operand_row(op, at), panel.dtype, at, (lane, depth_axis), disjoint=True)
            return carried

        self.axis_loop(lane, 4, False, [], lambda carried: self.axis_loop(depth_axis, 1, True, carried, copy))
        self.open[lane] = walked

    def _transpose_into(self, op: Op, panel: StagedPanel, lane: str, depth_axis: str, access: Access) -> None:
        """The source is contiguous along the depth: load squares of rows, exchange lanes with rows, store."""
        lanes = self.lanes
        outer = self.bound[lane]
        last = None
        if outer.mask is not None:
            o = self.open[lane]
            last = self.sub(self.add(o.offset, o.extent), 1)

        def square(carried: Carried) -> Carried:
            inner = self.bound[depth_axis]
            for j in range(outer.count):
                rows = []
                for i in range(lanes):
                    offset = self.add(outer.offset, j * lanes + i)
                    if last is not None:     # rows past the edge repeat the last: their lanes are never used
                        offset = self.scalar("s_min", offset, last)
                    self.bound[lane] = Bound(offset, 1, False, None, outer.depth)
                    operands, attributes = self.address(access, {lane: 0, depth_axis: 0})
                    tail = [inner.mask] if inner.mask is not None else []
                    rows.append(self.emit(self.depth, "load", [*operands, *tail], RowType(panel.dtype),
                                          dtype=access.dtype, masked=bool(tail), **attributes))
                self.bound[lane] = outer
                for i, row in enumerate(self.transposed(rows, self.depth)):
                    panel.store_at(inner.offset, i, j, row)      # it is deep enough for whole squares
            return carried

        self.axis_loop(depth_axis, 1, True, [], square)

    def _stage_rows(self, op: Op, row_axis: str, depth_axis: str, choice: WalkChoice) -> StagedRows:
        """All of row_axis and depth: blocks of [count rows][lanes of depth], in the order in which the loops run."""
        dtype = self.operand_dtype(op)
        count = choice.counts[row_axis]
        key = ("rows", op)
        if key not in self.stage_memory:
            self.stage_memory[key] = self._scratch_of(op, [
                (self._capacity(row_axis), count), (self._capacity(depth_axis), self.lanes * self.slot_elements)])
        depth_extent = self.round_up(self.open[depth_axis].extent, self.lanes)
        staged = StagedRows(self, self.stage_memory[key], row_axis, depth_axis, count, depth_extent, dtype)

        def rows(carried: Carried) -> Carried:
            def copy(inner: Carried) -> Carried:
                for at in self._coordinates((row_axis, depth_axis)):
                    staged.store(at, self.operand_row(op, at))
                return inner
            return self.axis_loop(depth_axis, 1, True, carried, copy)

        self.axis_loop(row_axis, count, False, [], rows)
        return staged

    def _stage_rows_here(self, op: Op, row_axis: str, depth_axis: str, choice: WalkChoice) -> StagedRows:
        """As `_stage_rows`, of the rows that are bound alone: where nobody knows how many there may be."""
        dtype, count = self.operand_dtype(op), choice.counts[row_axis]
        key = ("rows", op)
        if key not in self.stage_memory:
            self.stage_memory[key] = self._scratch_of(op, [
                (count, 1), (self._capacity(depth_axis), self.lanes * self.slot_elements)])
        staged = StagedRowsHere(self, self.stage_memory[key], row_axis, depth_axis, count, 0, dtype)

        def copy(carried: Carried) -> Carried:
            for at in self._coordinates((row_axis, depth_axis)):
                staged.store(at, self.operand_row(op, at))
            return carried

        self.axis_loop(depth_axis, 1, True, [], copy)
        return staged

    def _stage_columns(self, op: Op, row_axis: str, depth_axis: str, choice: WalkChoice) -> StagedColumns:
        """As `_stage_rows`, of a matrix that is contiguous along the rows' axis: one vector for each step of depth."""
        dtype = self.operand_dtype(op)
        count = choice.counts[row_axis]
        key = ("columns", op)
        if key not in self.stage_memory:
            blocks = self._capacity(row_axis)
            c = blocks if isinstance(blocks, Capacity) else Capacity(blocks)
            # A block of `count` rows takes one vector: lanes / count times the rows, rounded up to whole blocks.
            widened = Capacity(c.constant * -(-self.lanes // count), c.dims)
            self.stage_memory[key] = self._scratch_of(
                op, [(widened, self.lanes), (self._capacity(depth_axis), self.slot_elements)])
        depth_extent = self.open[depth_axis].extent
        staged = StagedColumns(self, self.stage_memory[key], row_axis, depth_axis, count, depth_extent, dtype)
        rows = self.open[row_axis]

        def block(carried: Carried) -> Carried:
            here = self.bound[row_axis]
            left = self.sub(self.add(rows.offset, rows.extent), here.offset)
            mask = self.emit(self.depth, "mask_first", [self.value(self.scalar("s_min", left, count))], MASK)
            self.bound[row_axis] = Bound(here.offset, 1, True, mask, here.depth)

            def copy(inner: Carried) -> Carried:
                for at in self._coordinates((row_axis, depth_axis)):
                    staged.store(at, self.operand_row(op, at))
                return inner

            self.axis_loop(depth_axis, 4, False, [], copy)
            self.bound[row_axis] = here
            return carried

        # Every block, the last one too, has a vector of its own; the mask cuts what it lacks.
        self._loop(row_axis, rows.offset, self.add(rows.offset, rows.extent), count, False, False, [], block)
        return staged

    def _capacity(self, axis: str) -> Capacity | int:
        """Most elements along an axis."""
        o = self.open[axis] if self.packing is None or axis != self.packing.depth else self.packing.elements
        if isinstance(o.extent, int):
            return o.extent
        if o.capacity is None:
            raise LoweringError(f"axis {axis} has no bound that scratch memory could be sized by")
        return o.capacity


class StagedPanel:
    """[depth][pieces of the lane axis]: what the rows of a contraction's vector operand are read from.

    dtype: of the rows. memory: how they lie. column_bytes: where there is a panel for each piece of a block, how much
    further than the first that of a column is. in_place: of an element, where it is a piece of a packed tensor.
    """

    in_place: DType | None = None

    def __init__(self, lowering: WalkLowering, base: Scalar, depth_axis: str, lane: str, dtype: DType,
                 column_bytes: Scalar) -> None:
        self.lowering = lowering
        self.base = base
        self.depth_axis = depth_axis
        self.lane = lane
        self.dtype = dtype
        self.memory = memory_dtype(dtype)
        self.column_bytes = column_bytes
        self.piece_bytes = lowering.lanes * dtype.size_bytes
        self.start_base: Scalar = 0

    @property
    def depth_bytes(self) -> int:
        """From one step of the depth to the next, in the panel of the piece that is bound."""
        return self.lowering.bound[self.lane].count * self.piece_bytes

    def access(self) -> Access:
        """Of the first row at each step of the depth."""
        axes: dict[str, Scalar] = {self.depth_axis: self.depth_bytes}
        if self.column_bytes:
            axes[self.lane] = self.column_bytes
        return Access(self.base, 0, axes, self.memory, relative=True)

    def address(self, at: dict[str, int]) -> tuple[list[Value], dict[str, Any]]:
        """Operands and attributes of a memory op for the row at register coordinates."""
        access = self.access()
        access.disp = at[self.lane] * self.piece_bytes
        return self.lowering.address(access, {self.depth_axis: at[self.depth_axis]})

    def load(self, at: dict[str, int], level: int) -> Value:
        operands, attributes = self.address(at)
        return self.lowering.emit(level, "load", operands, RowType(self.dtype), dtype=self.memory,
                                  masked=False, **attributes)

    def store(self, at: dict[str, int], row: Value) -> None:
        operands, attributes = self.address(at)
        self.lowering.effect("store", [row, *operands], dtype=self.memory, masked=False, streaming=False,
                             **attributes)

    def store_at(self, depth_offset: Scalar, i: int, piece: int, row: Value) -> None:
        """Row i of a square that starts at depth_offset."""
        low = self.lowering
        outer = low.bound[self.depth_axis]
        low.bound[self.depth_axis] = Bound(depth_offset, low.lanes, False, None, outer.depth)
        self.store({self.depth_axis: i, self.lane: piece}, row)
        low.bound[self.depth_axis] = outer

    def _start_address(self, piece: int) -> tuple[list[Value], dict[str, Any]]:
        low = self.lowering
        relative = bool(self.column_bytes)
        axes: dict[str, Scalar] = {self.lane: i32.size_bytes} if relative or self.in_place is not None else {}
        access = Access(self.start_base, piece * self.piece_bytes, axes, i32, relative=relative)
        return low.address(access, {})

    def start(self, at: dict[str, int], level: int) -> Value:
        """The row that a sum of products with this piece of the lane axis begins with, of i32."""
        operands, attributes = self._start_address(at[self.lane])
        return self.lowering.emit(level, "load", operands, ROW_I32, dtype=i32, masked=False, **attributes)

    def store_start(self, piece: int, row: Value) -> None:
        operands, attributes = self._start_address(piece)
        self.lowering.effect("store", [row, *operands], dtype=i32, masked=False, streaming=False, **attributes)


class PanelInPlace(StagedPanel):
    """The panels of a packed tensor, which need no copy: a piece of the lane axis lies in one of them."""

    def __init__(self, lowering: WalkLowering, op: Op, panels: Panels, lane: str, depth_axis: str) -> None:
        super().__init__(lowering, lowering.slot(f"{op.operands[0].name}.data"), depth_axis, lane,
                         lowering.operand_dtype(op), 0)
        low, t = lowering, op.operands[0].type
        assert isinstance(t, TensorType)
        self.panels = panels
        self.in_place = t.dtype
        if low.packing is None:
            self.memory = t.dtype
        columns, depth = (d if isinstance(d, int) else low.slot(f"dim.{d}")
                          for d in (t.dims[panels.columns], t.dims[panels.depth]))
        self.slot_bytes = panels.elements * t.dtype.size_bytes
        self.piece_bytes = low.lanes * self.slot_bytes
        self.panel_bytes = low.mul(low.ceil_div(depth, panels.elements), panels.width * self.slot_bytes)
        self.start_base = low.add(self.base, low.mul(low.ceil_div(columns, panels.width), self.panel_bytes))

    @property
    def depth_bytes(self) -> int:
        return self.panels.width * self.slot_bytes

    def _base(self) -> Scalar:
        """Of the panel, or the part of one, in which the piece lies that is bound."""
        low, width = self.lowering, self.panels.width
        bound = low.bound[self.lane]
        base = low.add(self.base, low.mul(low.scalar("s_floordiv", bound.offset, width), self.panel_bytes))
        if bound.count * low.lanes < width:
            base = low.add(base, low.mul(low.scalar("s_mod", bound.offset, width), self.slot_bytes))
        return base

    def access(self) -> Access:
        return Access(self._base(), 0, {self.depth_axis: self.depth_bytes}, self.memory, relative=True)

    def rest(self, start: Scalar) -> InPlace:
        """The elements that fill no slot, from a coordinate of the depth on: the beginnings of the last slots."""
        low = self.lowering
        assert self.in_place is not None
        size = self.in_place.size_bytes
        last = low.mul(low.scalar("s_floordiv", start, self.panels.elements), self.depth_bytes)
        before = low.add(low.mul(low.bound[self.lane].offset, self.slot_bytes), low.mul(start, size))
        base = low.sub(low.add(self._base(), last), before)
        return InPlace(low, Access(base, 0, {self.lane: self.slot_bytes, self.depth_axis: size}, self.in_place))


class InPlace:
    """An operand that is read where it lies."""

    in_place = None

    def __init__(self, lowering: WalkLowering, access: Access) -> None:
        self.lowering, self.access = lowering, access

    def load(self, at: dict[str, int], level: int) -> Value:
        return self.lowering.fetch_row(self.access, row_dtype(self.access.dtype), at, level, None)


class StagedRows:
    """[row blocks][depth blocks][count rows][lanes of depth]: where a contraction reads broadcast elements."""

    in_place = None

    def __init__(self, lowering: WalkLowering, base: Scalar, row_axis: str, depth_axis: str, count: int,
                 depth_extent: Scalar, dtype: DType) -> None:
        self.lowering = lowering
        self.base = base
        self.row_axis = row_axis
        self.depth_axis = depth_axis
        self.count = count
        self.depth_extent = depth_extent
        self.dtype = dtype

    @property
    def step_bytes(self) -> int:
        """What a block of rows takes for each step of the depth."""
        return self.count * self.dtype.size_bytes

    def row_start(self) -> Scalar:
        """The first of the rows that are bound, counted from the first that is staged."""
        return self.lowering.sub(self.lowering.bound[self.row_axis].offset, self.lowering.open[self.row_axis].offset)

    def address(self, at: dict[str, int]) -> tuple[list[Value], dict[str, object]]:
        """Operands and attributes of a memory op for the element at register coordinates."""
        low, size = self.lowering, self.dtype.size_bytes
        row, depth = low.bound[self.row_axis], low.bound[self.depth_axis]
        lanes = low.lanes
        row_start = self.row_start()
        if row.count == self.count:
            base = low.add(self.base, low.mul(low.mul(self.depth_extent, size), row_start))
        else:
            block = low.scalar("s_floordiv", row_start, self.count)
            inside = low.sub(row_start, low.mul(block, self.count))
            base = low.add(low.add(self.base, low.mul(low.mul(low.mul(self.depth_extent, size), self.count), block)),
                           low.mul(inside, lanes * size))
        depth_start = low.sub(depth.offset, low.open[self.depth_axis].offset)
        if depth.lane:
            index = low.mul(depth_start, self.count * size)
            disp = at[self.depth_axis] * lanes * self.count * size
        else:
            whole = low.scalar("s_and", depth_start, -lanes)
            inside = low.scalar("s_and", depth_start, lanes - 1)
            index = low.add(low.mul(whole, self.count * size), low.mul(inside, size))
            disp = at[self.depth_axis] * size
        disp += at[self.row_axis] * lanes * size
        return low.memory_operands(base, index, 1, disp)

    def load(self, at: dict[str, int], level: int) -> Value:
        operands, attributes = self.address(at)
        return self.lowering.emit(level, "load_splat", operands, RowType(self.dtype), dtype=self.dtype, **attributes)

    def store(self, at: dict[str, int], row: Value) -> None:
        operands, attributes = self.address(at)
        self.lowering.effect("store", [row, *operands], dtype=self.dtype, masked=False, streaming=False, **attributes)

    def prefetch_next(self) -> None:
        """Ask for as much of the next block of rows as is read of this one."""
        low = self.lowering
        row, depth = low.bound[self.row_axis], low.bound[self.depth_axis]
        if row.count != self.count or depth.lane:
            return
        start = low.add(low.sub(row.offset, low.open[self.row_axis].offset), self.count)
        block = low.mul(self.depth_extent, self.step_bytes)
        base = low.add(self.base, low.mul(block, low.scalar("s_floordiv", start, self.count)))
        index = low.mul(low.sub(depth.offset, low.open[self.depth_axis].offset), self.step_bytes)
        for line in range(0, depth.count * self.step_bytes, 64):
            operands, attributes = low.memory_operands(base, index, 1, line)
            low.effect("prefetch", operands, level=2, **attributes)


class StagedRowsHere(StagedRows):
    """[depth blocks][count rows][lanes of depth]: the rows that are bound."""

    def row_start(self) -> Scalar:
        return 0

    def prefetch_next(self) -> None:
        """The next rows are copied from the matrix itself, along which the processor sees ahead."""


class StagedColumns(StagedRows):
    """[row blocks][depth][one vector of rows]: broadcast elements whose source is contiguous along the rows."""

    @property
    def step_bytes(self) -> int:
        return self.lowering.lanes * self.dtype.size_bytes

    def address(self, at: dict[str, int]) -> tuple[list[Value], dict[str, object]]:
        low, size = self.lowering, self.dtype.size_bytes
        vector_bytes = low.lanes * size
        row, depth = low.bound[self.row_axis], low.bound[self.depth_axis]
        start = low.sub(row.offset, low.open[self.row_axis].offset)
        block = low.scalar("s_floordiv", start, self.count)
        base = low.add(self.base, low.mul(low.mul(self.depth_extent, vector_bytes), block))
        if row.count != self.count and not row.lane:
            base = low.add(base, low.mul(low.sub(start, low.mul(block, self.count)), size))
        index = low.mul(low.sub(depth.offset, low.open[self.depth_axis].offset), vector_bytes)
        disp = at[self.depth_axis] * vector_bytes + (0 if row.lane else at[self.row_axis] * size)
        return low.memory_operands(base, index, 1, disp)
