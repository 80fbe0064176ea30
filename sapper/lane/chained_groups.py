"""Chains of contractions (chained.py) on matrix instructions of groups of warps: attention on wgmma.

Enters a chain whose streamed operands can be copied by boxes; leaves lane IR in which one warp has them copied to
near memory, stages ahead, and each group of warps takes 64 rows, as in groups.py. Left operands are in registers: what
a product's sums become is packed where it lies.

    wait for the stage, product 1 (and what flies from the round before), wait, what is computed of it, product 2

Product 2 adds to sums that the loop carries. It flies on while the next round begins, until that round's product 1 is
done: the wait for both also says that the stage of the round before is free.

Two groups with rows of their own take turns (FlashAttention-3, Shah et al., 2024, 3.1): who has its turn starts
product 2 of a round and product 1 of the next, and gives it to the other, whose weights were computed meanwhile. So the
products of one fill the time in which the other has none. Each group has a signal, at which the warps of the other
arrive; a count of its turns, which says the phase, waits between tiles beside the counter. The first group begins: its
count is one ahead.

Rows of a box past the loop's end, but inside of the tensor, may hold anything. Columns of them are masked; as the depth
of a product they would meet weights of 0, and 0 times NaN is NaN. So a piece that is cut short is copied row by row,
the rows past the end from outside of the tensor, where copies bring zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..ir.nodes import Block, Op, Value
from ..ir.types import ROW_F32, S64, f32, i32
from ..tile.schedule import MatrixGroup, MatrixUnit
from . import fragments
from .boxed_stores import MOST_DIMENSIONS
from .chained import Chain, Contraction, _axes
from .chained_shared import SharedRowsLowering
from .groups import COUNTER_BYTES, SIGNAL_BYTES
from .pieces import ELEMENT_BYTES
from .state import Scalar

GROUPS_IN_TURN = 2
OUTSIDE = 1 << 30
"""A coordinate outside of every tensor."""


@dataclass(frozen=True, slots=True)
class BoxStream:
    """A streamed operand. at: its first byte in a stage. panels: of 64 elements of its contiguous axis `across`. map,
    row_map: tensor maps with a piece's rows of a panel, and with one. deep: whether the step's axis is contracted."""

    op: Op
    across: str
    at: int
    panels: int
    panel_bytes: int
    map: int
    row_map: int
    deep: bool

    @property
    def bytes(self) -> int:
        return self.panels * self.panel_bytes


class ChainGroupLowering(SharedRowsLowering):
    """Takes chains where the target has groups, and leaves others to SharedRowsLowering. flying: the contraction whose
    sums the loop carries unfinished, if there is one, and which of the carried values they are. given: how many turns
    this group had, and turns_at: of near memory, where their signals begin."""

    flying: tuple[Op, int] | None = None
    turns_at = 0
    given: Scalar = 0
    box_streams: tuple[BoxStream, ...] = ()
    unfinished: tuple[Value, ...] = ()

    def find_matrix_walk(self) -> None:
        super().find_matrix_walk()
        chain, group = self.chain, self.facts.matrix_group
        if chain is None or group is None or group.sums_columns or not all(
                self._comes_in_boxes(op, chain.step) for op in chain.streams):
            return
        groups, high = self.groups_of_chain(group, chain)
        unit = self.facts.matrix
        if unit is None or not groups or \
                self._round_cycles(chain, group, high) >= self._round_cycles(chain, unit, self.chain_rows()):
            return
        self.take_chain(groups)
        self.warps = groups * group.group_warps + group.copy_warps
        self.flying = self._find_flying(chain)
        stores = [op for op in chain.body.ops if op.name == "store" and self._goes_in_boxes(op, chain)]
        self.boxed = {} if self.schedule.chunks else dict.fromkeys(stores[:1], 0)

    def groups_of_chain(self, group: MatrixGroup, chain: Chain) -> tuple[int, int]:
        """How many groups a worker has, and rows; 0: the chain is not one for groups. Settles nothing."""
        del chain
        rows = self.facts.matrix.chain_rows  # type: ignore[union-attr]
        groups = rows // group.group_rows if self.slices == 1 and 2 * group.group_rows <= rows else 0
        return groups, groups * group.group_rows

    def take_chain(self, groups: int) -> None:
        """What groups_of_chain found is done."""
        self.groups, self.row_blocks = groups, 1

    def _round_cycles(self, chain: Chain, unit: MatrixUnit | MatrixGroup, high: int) -> float:
        """What a coordinate of the loop's axis takes for all rows, `high` of which a worker has at once, those that are
        not there among them: products and copies run side by side. Where both are bound by copies, groups gain
        nothing, and rows that are few stay with warps."""
        products = sum(self.extents[found.columns if found.over == chain.step else found.over]
                       for found in chain.contractions.values())
        copied = sum(self.extents[a] for op in chain.streams for a in _axes(op.result) if a != chain.step)
        return -(-self.chain_extent(chain) // high) * max(
            high * products / unit.products, copied * ELEMENT_BYTES / unit.cache_bytes)

    def _goes_in_boxes(self, store: Op, chain: Chain) -> bool:
        """Whether a store can go by copies: of rows of a whole axis, in panels."""
        axes = _axes(store.operands[1])
        if len(axes) != 2 or chain.rows not in axes:
            return False
        (columns,) = [a for a in axes if a != chain.rows]
        return columns in self.extents and self.is_boxed(store, chain.rows, columns, self.chain_rows()) \
            and self.part_extent(columns) % self.panel_columns(store) == 0

    def _comes_in_boxes(self, op: Op, step: str) -> bool:
        """Whether a piece is a box of the tensor, of whole panels."""
        forms = self._forms(op)
        (across,) = [a for a in _axes(op.result) if a != step]
        return len(forms) <= MOST_DIMENSIONS and self.extents[across] % fragments.PANEL == 0 and all(
            factor == 1 for form in forms for factor in form.axes.values()) and all(len(f.axes) <= 1 for f in forms)

    def _find_flying(self, chain: Chain) -> tuple[Op, int] | None:
        """The last contraction, if its sums go to the next round, and nothing of them is read before the first."""
        body = chain.loop.blocks[0]
        order = [op for op in body.ops if op in chain.contractions]
        terminator = body.terminator
        assert terminator is not None
        if len(order) < 2:
            return None
        last = order[-1].result
        for at, value in enumerate(terminator.operands):
            adds = value.op is not None and value.op.name == "add" and last in value.op.operands
            if (adds and self._used_once(last)) and sum(v is value for op in body.ops for v in op.operands) == 1 \
                    and not _depends(order[0], body.arguments[at]):
                return order[-1], at
        return None

    def chain_rows(self) -> int:
        group = self.facts.matrix_group
        if self.chain is None or not self.groups or group is None:
            return super().chain_rows()
        return self.groups * group.group_rows

    def _columns_of(self, store: Op) -> str:
        assert self.chain is not None
        (columns,) = [a for a in _axes(store.operands[1]) if a != self.chain.rows]
        return columns

    def _store_spread(self, op: Op) -> None:
        if op in self.boxed and self.chain is not None:
            self.store_boxes(op, self.chain.rows, self._columns_of(op))
        else:
            super()._store_spread(op)

    # Near memory.

    def _lay_out(self, group: MatrixGroup) -> MatrixGroup:
        chain = self.chain
        if chain is None:
            return super()._lay_out(group)
        at, streams = 0, []
        for op in chain.streams:
            (across,) = [a for a in _axes(op.result) if a != chain.step]
            sizes = {across: fragments.PANEL, chain.step: self.step}
            deep = any(c.over == chain.step for c in chain.contractions.values() if c.right is op)
            streams.append(BoxStream(
                op, across, at, self.extents[across] // fragments.PANEL, self.step * fragments.ROW_BYTES,
                self._map(op, sizes), self._map(op, {**sizes, chain.step: 1}) if deep else -1, deep))
            at += streams[-1].bytes
        self.box_streams, self.stage_bytes = tuple(streams), at
        stages = group.stages
        rest, multiplying = self.counters_bytes(), self.groups * group.group_warps
        while stages * (at + 2 * SIGNAL_BYTES) + self.least_bytes() + rest > group.near_bytes:
            stages //= 2
        self.sums_at = self.full_at = stages * at + self.left_bytes()
        for store in self.boxed:
            columns = self._columns_of(store)
            self.boxed[store] = self._map(store, {chain.rows: fragments.ROWS, columns: self.panel_columns(store)})
            left = group.near_bytes - self.sums_at - 2 * stages * SIGNAL_BYTES - rest
            self.fit_pieces(store, self.part_extent(columns), left // multiplying)
            self.full_at += multiplying * self.pieces_bytes(store)
        sums_end = self.full_at
        self.full_at = self.lay_out_meetings(sums_end)
        self.free_at = self.full_at + stages * SIGNAL_BYTES
        self.counters_at = self.free_at + stages * SIGNAL_BYTES
        self.near_bytes_used = self.counters_at + self.counters_bytes() + self.takes_turns * self.warps * COUNTER_BYTES
        self.name_stages([(stream.op, stream.at, stream.bytes) for stream in self.box_streams], stages, at)
        self.name_buffers([("sums", self.sums_at, sums_end - self.sums_at)])
        self.name_signals()
        return replace(group, stages=stages)

    def left_bytes(self) -> int:
        """Of near memory for left operands that are kept there, between the stages and the sums."""
        return 0

    def least_bytes(self) -> int:
        """Of near memory for what is there beside stages, but for signals of these and counters: two boxes of each
        warp."""
        assert self.facts.matrix_group is not None
        warps = self.groups * self.facts.matrix_group.group_warps
        return sum(2 * fragments.ROWS * fragments.ROW_BYTES * warps for _ in self.boxed)

    def lay_out_meetings(self, at: int) -> int:
        """Settle where groups meet, or give each other their turns, behind the sums, which end at a byte; gives its
        end."""
        if not self.takes_turns:
            return at
        self.turns_at = at
        self.name_buffers([("turns", at, GROUPS_IN_TURN * SIGNAL_BYTES)])
        return at + GROUPS_IN_TURN * SIGNAL_BYTES

    @property
    def takes_turns(self) -> bool:
        """Whether two groups do, each with rows of its own."""
        group = self.facts.matrix_group
        return group is not None and group.turns and self.groups == GROUPS_IN_TURN and self.slices == 1 \
            and self.flying is not None

    def start_turns(self) -> None:
        if self.takes_turns:
            ahead = self.emit(0, "s_cmp", [self.value(self._number()), self.value(0)], S64, cond="eq")
            self.effect("s_store", [ahead, self.value(self._turn_word())], dtype=i32, near=True)

    def _turn_word(self) -> Scalar:
        return self.add(self.near(), self.add(self.counters_at + self.warps * COUNTER_BYTES,
                                              self.mul(self.warp(), COUNTER_BYTES)))

    def _number(self) -> Scalar:
        """Of this warp's group."""
        assert self.facts.matrix_group is not None
        return self.scalar("s_floordiv", self.warp(), self.facts.matrix_group.group_warps)

    def _take_turn(self) -> None:
        if self.takes_turns:
            self.effect("signal_wait", [self._signal(self._number()), self.value(self.scalar("s_and", self.given, 1))],
                        disp=self.turns_at)
            self.given = self.add(self.given, 1)

    def _give_turn(self) -> None:
        if self.takes_turns:
            self.effect("signal_arrive", [self._signal(self.scalar("s_xor", self._number(), 1))], disp=self.turns_at)

    def _start_signals(self, group: MatrixGroup, multiplying: int) -> None:
        for number in range(GROUPS_IN_TURN if self.takes_turns else 0):
            self.effect("signal_start", [self.near()], arrivals=group.group_warps,
                        disp=self.turns_at + number * SIGNAL_BYTES)
        super()._start_signals(group, multiplying)

    def part_extent(self, axis: str) -> int:
        """Of a whole axis, what one warp has."""
        return self.extents[axis] // (self.slices if axis in self.parted else 1)

    # The block.

    def _chain_tile(self, chain: Chain, unit: MatrixUnit, block: Block, start: Value, stop: Scalar) -> None:
        if not self.groups:
            super()._chain_tile(chain, unit, block, start, stop)
            return
        own = self.add(self.near(), self.add(self.counters_at, self.mul(self.warp(), COUNTER_BYTES)))
        self.counter = self.emit(self.depth, "s_load", [self.value(own)], S64, dtype=i32, near=True)
        if self.multiplies:
            if self.takes_turns:
                self.given = self.emit(self.depth, "s_load", [self.value(self._turn_word())], S64, dtype=i32, near=True)
            super()._chain_tile(chain, unit, block, start, stop)
            if self.takes_turns:
                self.effect("s_store", [self.value(self.given), self.value(self._turn_word())], dtype=i32, near=True)
        else:
            self.begin_block(block)
            for ragged, (first, last) in enumerate(self._chain_ranges(chain, start)):
                self._copy_pieces(chain, first, last, bool(ragged))
        self.effect("s_store", [self.counter, self.value(own)], dtype=i32, near=True)

    def _loop_of(self, chain: Chain, first: Scalar, last: Scalar, carried: list[Value],
                 body: Callable[[Value, list[Value]], list[Value]]) -> list[Value]:
        block = Block([S64, *[v.type for v in carried]])
        self.enter(block)
        self.effect("yield", body(block.arguments[0], list(block.arguments[1:])))
        self.leave()
        made = Op("loop", [self.value(first), self.value(last), *carried], [v.type for v in carried],
                  {"step": self.step, "label": chain.step}, [block], chain.loop.location)
        self.finish(made)
        return list(made.results)

    def _copy_pieces(self, chain: Chain, first: Scalar, last: Scalar, ragged: bool) -> None:
        group = self.chain_group

        def body(here: Value, carried: list[Value]) -> list[Value]:
            (counter,) = carried
            following = self.add(counter, 1)
            stage = self._stage_of(group, counter)
            signal = self._signal(stage)
            target = self.value(self.add(self.near(), self.mul(stage, self.stage_bytes)))
            parity = self.scalar("s_xor", self._parity_of(group, following if self.frees_late else counter), 1)
            self.effect("signal_wait", [signal, self.value(parity)], disp=self.free_at)
            self.effect("signal_expect", [signal], disp=self.full_at, bytes=self.stage_bytes)
            rest = self.sub(last, here)
            for stream in self.box_streams:
                if not ragged or not stream.deep:
                    self._copy_boxes(chain, stream, target, signal, here)
                    continue
                if not chain.below:     # all whole pieces were before
                    self._copy_rows(chain, stream, target, signal, here, rest)
                    continue
                whole = self.emit(self.depth, "s_cmp", [self.value(rest), self.value(self.step)], S64, cond="ge")
                self.fork(whole, lambda stream=stream: self._copy_boxes(  # type: ignore[misc]
                    chain, stream, target, signal, here), lambda stream=stream: self._copy_rows(  # type: ignore[misc]
                        chain, stream, target, signal, here, rest))
            return [self.value(following)]

        (self.counter,) = self._loop_of(chain, first, last, [self.counter], body)

    def _copy_boxes(self, chain: Chain, stream: BoxStream, target: Value, signal: Value, here: Value) -> None:
        for panel in range(stream.panels):
            at = {chain.step: here, stream.across: self.value(panel * fragments.PANEL)}
            with self.located(stream.op):
                self.effect("tensor_copy", [target, signal, *self._coordinates_of(stream.op, at)], map=stream.map,
                            disp=stream.at + panel * stream.panel_bytes, signal_disp=self.full_at)

    def _copy_rows(self, chain: Chain, stream: BoxStream, target: Value, signal: Value, here: Value,
                   rest: Scalar) -> None:
        block = Block([S64])
        self.enter(block)
        row = block.arguments[0]
        inside = self.emit(self.depth, "s_cmp", [row, self.value(rest)], S64, cond="lt")
        mine = self.emit(self.depth, "s_select", [inside, self.value(self.add(here, row)), self.value(OUTSIDE)], S64)
        place = self.value(self.add(target, self.mul(row, fragments.ROW_BYTES)))
        for panel in range(stream.panels):
            at = {chain.step: mine, stream.across: self.value(panel * fragments.PANEL)}
            with self.located(stream.op):
                self.effect("tensor_copy", [place, signal, *self._coordinates_of(stream.op, at)], map=stream.row_map,
                            disp=stream.at + panel * stream.panel_bytes, signal_disp=self.full_at)
        self.effect("yield", [])
        self.leave()
        self.finish(Op("loop", [self.value(0), self.value(self.step)], (), {"step": 1, "label": "row"}, [block],
                       self.location))

    def _chain_loop(self, chain: Chain, unit: MatrixUnit, row: Value) -> None:
        if not self.groups:
            super()._chain_loop(chain, unit, row)
            return
        group, loop = self.chain_group, chain.loop
        body = loop.blocks[0]
        self._settle_streams(chain)
        points = [self._coordinates(v.type.axes) for v in body.arguments]  # type: ignore[union-attr]
        self._take_turn()
        turns = int(self.takes_turns)
        carried = [self.counter, *[self.value(self.given)] * turns, *(
            self.row(v, at) for v, places in zip(loop.operands[2:], points, strict=True) for at in places)]
        for ragged, (first, last) in enumerate(self._chain_ranges(chain, row)):
            def inside(here: Value, carried: list[Value], ragged: bool = bool(ragged),
                       last: Scalar = last) -> list[Value]:
                counter, *rows = carried
                if turns:
                    self.given, *rows = rows
                stage = self._stage_of(group, counter)
                self.effect("signal_wait", [self._signal(stage), self.value(self._parity_of(group, counter))],
                            disp=self.full_at)
                self.source = self.value(self.add(self.near(), self.mul(stage, self.stage_bytes)))
                self._begin_round(chain, points, rows, here, last, ragged)
                if self.flying is not None:
                    self._land(chain, body, counter, group)
                terminator = body.terminator
                assert terminator is not None
                results = [self.row(v, at) for v, places in zip(terminator.operands, points, strict=True)
                           for at in places]
                if self.flying is None:
                    self.effect("signal_arrive", [self._signal(stage)], disp=self.free_at)
                return [self.value(self.add(counter, 1)), *[self.value(self.given)] * turns, *results]

            carried = self._loop_of(chain, first, last, carried, inside)
        self.counter, *rows = carried
        if turns:
            self.given, *rows = rows
        self._give_turn()
        if self.flying is not None:
            where = self._places_of(points, self.flying[1])
            rows[where] = self._finished(rows[where])
        self.assumed = frozenset()
        self._take(loop.results, points, iter(rows))

    @staticmethod
    def _places_of(points: list[list[dict[str, int]]], number: int) -> slice:
        """Where the rows of a carried value are among all."""
        first = sum(map(len, points[:number]))
        return slice(first, first + len(points[number]))

    def _land(self, chain: Chain, body: Block, counter: Value, group: MatrixGroup) -> None:
        """The first contraction, then a wait for it and for what the round before left flying, whose stage is free
        then."""
        assert self.flying is not None
        argument = body.arguments[self.flying[1]]
        ops, into = self.batch_of(next(op for op in body.ops if op in chain.contractions))
        held = self.rows[argument]
        self.unfinished = tuple(held.values())
        sums = self._multiply_batch(ops, into, None)
        self.rows[argument] = dict(zip(held, self.landed, strict=True))
        self.unfinished = ()
        before = self._stage_of(group, self.sub(counter, 1))
        self.effect("signal_arrive", [self._signal(before)], disp=self.free_at)
        self.rows[into] = self.whole_sums(chain.contractions[ops[0]], sums)

    def batch_of(self, contraction: Op) -> tuple[tuple[Op, ...], Value]:
        """The contractions that are summed without a wait between, this one the first, and what their sums are."""
        return (contraction,), contraction.result

    def _finished(self, sums: list[Value]) -> list[Value]:
        done = Op("group_wait", sums, [ROW_F32] * len(sums), {"pending": 0}, None, self.location)
        self.finish(done)
        return list(done.results)

    def _contract(self, op: Op, into: Value, start: Value | None) -> None:
        chain = self.chain
        assert chain is not None
        if not self.groups:
            super()._contract(op, into, start)
            return
        ops, into = ((op,), into) if start is not None else self.batch_of(op)
        self.rows[into] = self.whole_sums(chain.contractions[op], self._multiply_batch(ops, into, start))

    def _multiply_batch(self, ops: tuple[Op, ...], into: Value, start: Value | None) -> dict[tuple[int, ...], Value]:
        """A batch of contractions that give one value, the first added to `start`; waits for it unless it flies."""
        assert self.chain is not None
        found = self.chain.contractions[ops[0]]
        columns = self.bound[found.columns].count
        keys = [self._key(into, found, register // 2, 2 * block + register % 2)
                for block in range(columns // 2) for register in range(4)]
        zero = self.constant(0.0, f32)
        sums = [zero if start is None else self.row(start, dict(zip(_axes(into), key, strict=True))) for key in keys]
        products = [(op, self.product(op, depth)) for op in ops       # left operands are there before the batch begins
                    for depth in range(0, self.bound[self.chain.contractions[op].over].count, 4)]
        flies = self.flying is not None and ops[0] is self.flying[0]
        if flies:
            self._take_turn()
        self.effect("group_fence", [])
        for number, (op, (name, operands, attributes)) in enumerate(products):
            made = Op(name, [*operands, *sums], [ROW_F32] * len(sums), {
                **attributes, "dtype": op.operands[0].type.dtype, "fresh": start is None and number == 0}, None,  # type: ignore[union-attr]
                op.location)
            self.finish(made)
            sums = list(made.results)
        self.effect("group_commit", [])
        if not flies:
            if self.unfinished:
                self._give_turn()
            done = self._finished([*sums, *self.unfinished])
            sums, self.landed = done[:len(sums)], done[len(sums):]
        return dict(zip(keys, sums, strict=True))

    def product(self, op: Op, depth: int) -> tuple[str, list[Value], dict[str, object]]:
        """The lane op that contracts what is `depth` registers down, its operands before the sums, its attributes."""
        assert self.chain is not None
        found = self.chain.contractions[op]
        stream = next(s for s in self.box_streams if s.op is found.right)
        source = self.source_of(stream)
        return "group_multiply_rows", [source, *self._left(found, 0, depth)], self._right_of(stream, found, depth * 4)

    def source_of(self, stream: BoxStream) -> Value:
        """Of near memory, what a group reads of a stage begins there, but for the stream's own place in it."""
        del stream
        return self.source

    def _right_of(self, stream: BoxStream, found: Contraction, depth: int) -> dict[str, object]:
        assert self.chain is not None
        if found.over == self.chain.step:
            return {"right_rows": False, "right_panel_bytes": stream.panel_bytes,
                    "right_disp": stream.at + depth * fragments.ROW_BYTES}
        panel, within = divmod(depth, fragments.PANEL)
        return {"right_rows": True, "right_disp": stream.at + panel * stream.panel_bytes + 2 * within}


def _depends(op: Op, value: Value) -> bool:
    """Whether what an op computes is made of a value."""
    stack, seen = list(op.operands), set()
    while stack:
        v = stack.pop()
        if v is value:
            return True
        if v not in seen and v.op is not None:
            seen.add(v)
            stack += v.op.operands
    return False
