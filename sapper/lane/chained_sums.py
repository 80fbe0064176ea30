"""Chains of two contractions (chained.py) whose sums lie in a memory of their own: attention on tensor memory.

Enters a chain whose first contraction has a left operand that the loop does not change, and whose second one is added
to what the loop carries, where the target's groups have such a memory (MatrixGroup.sums_columns). Leaves lane IR in
which warps play the parts of sums_memory.py, each group of the storing ones with 128 rows, a warp with 32:

    copies   one warp, as in chained_groups.py
    starts   one warp; for each group the first product of a round, then the second of the round before
    stores   scores come from sums memory to registers; what is made of them goes back, packed, where the second product
             reads it; its sums are added to those that the loop carries, in registers, once they are there

So the first product of the next round is made while the softmax of this one is computed, and the second product of this
one during the softmax of the next: its sums are added then, where nothing of them is read before; a tile's first round
adds zeros. While one group computes the products of the other are made. (FlashAttention-4 has parts like these, but
keeps the carried sums in tensor memory, too, and corrects them there: github.com/Dao-AILab/flash-attention,
flash_attn/cute.)

The first left operand is kept in near memory for all of a tile, in panels as products read them.

Signals of each group:

    left    its panels are there                  once a tile, by its warps
    made    the scores of a round are there       by the products themselves
    taken   they are in registers                 by its warps
    put     weights are there, and the last sums of the second product are in registers   by its warps
    added   the sums of the second product are there                                      by the products themselves

    near memory   stages | left: [group][panel][row] | boxes of results of each warp | full, free | signals by kind and
                  group | counters of rounds, of tiles | where the sums begin
    sums memory   of each group: scores, sums of the second product, weights
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..ir.nodes import Block, Op, Value
from ..ir.types import ROW_B32, ROW_F32, S64, i32
from ..tile.schedule import MatrixGroup, MatrixUnit
from . import fragments
from .chained import Chain, Contraction, _axes
from .chained_pairs import FEWEST_STAGES, ChainPairLowering
from .chained_shared import SHORTEST_STEP
from .groups import COUNTER_BYTES, SIGNAL_BYTES
from .pieces import ELEMENT_BYTES
from .state import Scalar
from .sums_memory import STARTS

LOADED_COLUMNS = 32
"""Of the second product's sums that a warp brings to registers at once."""
LEFT, MADE, TAKEN, PUT, ADDED = range(5)
KINDS = 5
COUNTED_BYTES = 256
"""Of near memory, what counters and where the sums begin take at most."""
ROW_BLOCKS = 2
"""Of 16 rows that a warp has: 32 of the 128 of a group."""


@dataclass(frozen=True, slots=True)
class Shape:
    """groups: of warps. step: of a round. columns: of sums memory that a group has."""

    groups: int
    step: int
    columns: int


class ChainSumsLowering(ChainPairLowering):
    """Takes such chains, and leaves others to ChainPairLowering. order: the two contractions, None where the chain at
    hand is not one of these. late: the carried value to which the second product's sums of a round are added in the
    next one. shape: what was settled for it. signals_at: of near memory, where its signals begin."""

    order: tuple[Op, Op] | None = None
    late: int | None = None
    shape = Shape(0, 0, 0)
    left_at = signals_at = 0

    # The choice.

    def find_matrix_walk(self) -> None:
        super().find_matrix_walk()
        chain, group, unit = self.chain, self.facts.matrix_group, self.facts.matrix
        if chain is None or group is None or unit is None or not group.sums_columns or self.slices > 1 or self.groups \
                or not all(self._comes_in_boxes(op, chain.step) for op in chain.streams):
            return
        order = _order(chain)
        fitting = [] if order is None else [self._fitting_shape(group, chain, order, groups) for groups in (1, 2)]
        shapes = {self._round_cycles(chain, group, shape.groups * group.group_rows): shape
                  for shape in reversed(fitting) if shape is not None}     # of equals one group
        if order is None or not shapes or min(shapes) >= self._round_cycles(chain, unit, self.chain_rows()):
            return
        shape = shapes[min(shapes)]
        self.order, self.shape = order, shape
        flies = self._find_flying(chain)
        self.late = flies[1] if flies is not None and flies[0] is order[1] and _goes_only_to(
            chain, chain.loop.blocks[0].arguments[flies[1]], order[1]) else None
        self.groups, self.row_blocks, self.step = shape.groups, ROW_BLOCKS, shape.step
        self.few_registers = True
        self.warps = self.groups * group.group_warps + group.copy_warps
        stores = [op for op in chain.body.ops if op.name == "store" and self._goes_in_boxes(op, chain)]
        self.boxed = {} if self.schedule.chunks else dict.fromkeys(stores[:1], 0)

    def _fitting_shape(self, group: MatrixGroup, chain: Chain, order: tuple[Op, Op], groups: int) -> Shape | None:
        """With the longest step that fits: a thread has the carried sums and a round's scores of its share of 32
        rows."""
        first, second = (chain.contractions[op] for op in order)
        unit = self.facts.matrix
        assert unit is not None
        wide, step = self.extents[second.columns], unit.chain_step
        row_bytes = sum(self._padded_bytes(op, chain) for op in chain.streams)
        boxes = group.group_warps * 2 * fragments.ROWS * fragments.ROW_BYTES
        each = self._left_bytes(group, first) + boxes + KINDS * SIGNAL_BYTES
        while step >= SHORTEST_STEP:
            columns = step + wide + step // 2
            near = FEWEST_STAGES * (step * row_bytes + 2 * SIGNAL_BYTES) + groups * each + COUNTED_BYTES
            if wide + step <= group.chain_registers and groups * columns <= group.sums_columns \
                    and near <= group.near_bytes:
                return Shape(groups, step, columns)
            step //= 2
        return None

    def _left_bytes(self, group: MatrixGroup, found: Contraction) -> int:
        """Of near memory, for the panels of a group's left operand."""
        return self.extents[found.over] // fragments.PANEL * group.group_rows * fragments.ROW_BYTES

    # Memory.

    def left_bytes(self) -> int:
        if self.order is None:
            return super().left_bytes()
        assert self.chain is not None
        return self.groups * self._left_bytes(self._group, self.chain.contractions[self.order[0]])

    def least_bytes(self) -> int:
        if self.order is None:
            return super().least_bytes()
        return super().least_bytes() + self.left_bytes() + self.groups * KINDS * SIGNAL_BYTES

    def lay_out_meetings(self, at: int) -> int:
        if self.order is None:
            return super().lay_out_meetings(at)
        self.signals_at = at
        self.name_buffers([("signals of groups", at, self.groups * KINDS * SIGNAL_BYTES)])
        return at + self.groups * KINDS * SIGNAL_BYTES

    def _lay_out(self, group: MatrixGroup) -> MatrixGroup:
        group = super()._lay_out(group)
        if self.order is not None:
            self.left_at = group.stages * self.stage_bytes
            self.name_buffers([("left", self.left_at, self.left_bytes())])
            self.base_at = self.near_bytes_used - COUNTER_BYTES
        return group

    def set_aside(self) -> int:
        if self.order is None:
            return super().set_aside()
        return 1 << (self.groups * self.shape.columns - 1).bit_length()

    def signals(self, group: MatrixGroup, storing: int) -> list[tuple[int, int, int]]:
        if self.order is None:
            return super().signals(group, storing)
        return [(self.full_at, group.stages, 1), (self.free_at, group.stages, 1), *(
            (self._kind_at(kind), self.groups, 1 if kind in (MADE, ADDED) else group.group_warps)
            for kind in range(KINDS))]

    def _kind_at(self, kind: int) -> int:
        return self.signals_at + kind * self.groups * SIGNAL_BYTES

    def _wait(self, kind: int, group: Scalar, count: Scalar, before: int = 0) -> None:
        """Until the phase `count` of a group's signal is over, or the one `before` it."""
        parity = self.scalar("s_xor", self.scalar("s_and", count, 1), before)
        self.effect("signal_wait", [self._signal(group), self.value(parity)], disp=self._kind_at(kind))
        if kind != LEFT:
            self.effect("sums_acquire", [])

    def _scores_at(self, group: Scalar) -> Scalar:
        return self.add(self.sums_base, self.mul(group, self.shape.columns))

    def _added_at(self, group: Scalar) -> Scalar:
        return self.add(self._scores_at(group), self.step)

    def _weights_at(self, group: Scalar) -> Scalar:
        return self.add(self._scores_at(group), self.shape.columns - self.step // 2)

    # The tile.

    def _chain_tile(self, chain: Chain, unit: MatrixUnit, block: Block, start: Value, stop: Scalar) -> None:
        if self.order is not None and self.part_played == STARTS:
            self.begin_block(block)
            self._start_chain(chain, start)
        else:
            super()._chain_tile(chain, unit, block, start, stop)

    def _start_chain(self, chain: Chain, row: Value) -> None:
        """Of each round the first products, then the second ones of the round before."""
        words = self._stages_word(), self._rooms_word()
        counter, tiles = (self.emit(self.depth, "s_load", [word], S64, dtype=i32, near=True) for word in words)
        begun = counter
        for group in range(self.groups):
            self._wait(LEFT, group, tiles)

        def follow(counter: Value) -> None:
            self.fork(self.emit(self.depth, "s_cmp", [counter, begun], S64, cond="ne"),
                      lambda: self._start_second(self.sub(counter, 1)), lambda: None)

        def inside(here: Value, carried: list[Value]) -> list[Value]:
            (counter,) = carried
            self._start_first(chain, counter)
            follow(counter)
            return [self.value(self.add(counter, 1))]

        for first, last in self._chain_ranges(chain, row):
            (counter,) = self._loop_of(chain, first, last, [counter], inside)
        follow(counter)
        for word, value in zip(words, (counter, self.value(self.add(tiles, 1))), strict=True):
            self.effect("s_store", [value, word], dtype=i32, near=True)

    def _start_first(self, chain: Chain, counter: Value) -> None:
        assert self.order is not None
        found, stage = chain.contractions[self.order[0]], self._stage_of(self.chain_group, counter)
        self.effect("signal_wait", [self._signal(stage), self.value(self._parity_of(self.chain_group, counter))],
                    disp=self.full_at)
        for group in range(self.groups):
            self._wait(TAKEN, group, counter, before=1)
            left = self.value(self.add(self.near(), group * self._left_bytes(self._group, found)))
            self._start_products(self.order[0], "sums_multiply", left, self._scores_at(group), stage, lambda at: {
                "left_rows": True, "left_disp": self.left_at + at // fragments.PANEL * self._left_panel_bytes()
                + at % fragments.PANEL * ELEMENT_BYTES})
            self.effect("sums_signal", [self._signal(group)], disp=self._kind_at(MADE))

    def _start_second(self, counter: Scalar) -> None:
        assert self.order is not None
        stage = self._stage_of(self.chain_group, counter)
        for group in range(self.groups):
            self._wait(PUT, group, counter)
            self._start_products(self.order[1], "sums_multiply_rows", self.value(self._weights_at(group)),
                                 self._added_at(group), stage, lambda at: {"left_disp": at // 2})
            self.effect("sums_signal", [self._signal(group)], disp=self._kind_at(ADDED))
        self.effect("sums_signal", [self._signal(stage)], disp=self.free_at)

    def _start_products(self, op: Op, name: str, left: Value, place: Scalar, stage: Scalar,
                        left_at: Callable[[int], dict[str, object]]) -> None:
        """Those of a contraction's depth. left_at: attributes of the left operand from a depth on."""
        assert self.chain is not None
        found = self.chain.contractions[op]
        stream = next(s for s in self.box_streams if s.op is found.right)
        source = self.value(self.add(self.near(), self.mul(stage, self.stage_bytes)))
        deep, wide = (self.step if axis == self.chain.step else self.extents[axis]
                      for axis in (found.over, found.columns))
        with self.located(op):
            for at in range(0, deep, fragments.DEPTH):
                self.effect(name, [left, source, self.value(place), self.value(int(at > 0))], **{
                    "dtype": op.operands[0].type.dtype, "rows": self._group.group_rows, "columns": wide,  # type: ignore[union-attr]
                    **left_at(at), **self._right_of(stream, found, at)})

    def _left_panel_bytes(self) -> int:
        """Of one group's rows, 64 of the left operand's depth."""
        return self._group.group_rows * fragments.ROW_BYTES

    def _chain_loop(self, chain: Chain, unit: MatrixUnit, row: Value) -> None:
        if self.order is None:
            super()._chain_loop(chain, unit, row)
            return
        loop = chain.loop
        body = loop.blocks[0]
        self._settle_streams(chain)
        points = [self._coordinates(v.type.axes) for v in body.arguments]  # type: ignore[union-attr]
        if self.late is not None:
            self._clear_added(chain)
        self._put_left(chain)
        carried = [self.counter, *(self.row(v, at) for v, places in zip(loop.operands[2:], points, strict=True)
                                   for at in places)]
        for ragged, (first, last) in enumerate(self._chain_ranges(chain, row)):
            def inside(here: Value, carried: list[Value], ragged: bool = bool(ragged),
                       last: Scalar = last) -> list[Value]:
                self.counter, *rows = carried
                self._begin_round(chain, points, rows, here, last, ragged)
                terminator = body.terminator
                assert terminator is not None
                results = [self.row(v, at) for v, places in zip(terminator.operands, points, strict=True)
                           for at in places]
                return [self.value(self.add(self.counter, 1)), *results]

            carried = self._loop_of(chain, first, last, carried, inside)
        self.counter, *rows = carried
        self.assumed = frozenset()
        self._take(loop.results, points, iter(rows))
        if self.late is not None:
            result, found = loop.results[self.late], chain.contractions[self.order[1]]
            self.rows[result] = self._with_added(found, self.rows[result], self._keys(result, found), 1)

    def _put_left(self, chain: Chain) -> None:
        """Panels of the first left operand to near memory: each warp its 32 rows. Nobody reads those of the tile
        before: its last scores were there."""
        assert self.order is not None
        found, mine = chain.contractions[self.order[0]], self._number()
        warp = self.scalar("s_mod", self.warp(), self._group.group_warps)
        start = self.add(self.mul(mine, self._left_bytes(self._group, found)),
                         self.mul(warp, ROW_BLOCKS * fragments.ROWS * fragments.ROW_BYTES))
        place, offsets = self.value(self.add(self.add(self.near(), self.left_at), start)), self.matrix_offsets()
        for at in range(0, self.extents[found.over], fragments.DEPTH):
            panel, within = divmod(at, fragments.PANEL)
            for block in range(ROW_BLOCKS):
                self.effect("store_matrix", [place, offsets, *self._left(found, block, at // 4)],
                            flip=within * ELEMENT_BYTES, disp=panel * self._left_panel_bytes()
                            + block * fragments.ROWS * fragments.ROW_BYTES)
        self.effect("store_fence", [])
        self._tell(LEFT, mine)

    # Contractions.

    def _contract(self, op: Op, into: Value, start: Value | None) -> None:
        if self.order is None or op not in self.order:
            super()._contract(op, into, start)
            return
        assert self.chain is not None
        found = self.chain.contractions[op]
        keys = self._keys(into, found)
        if op is self.order[0]:
            self.rows[into] = dict(zip(keys, self._new_scores(), strict=True))
            return
        weights = [[row for depth in range(0, self.bound[found.over].count, 4)
                    for row in self._left(found, block, depth)] for block in range(ROW_BLOCKS)]
        if self.late is not None:
            argument = self.chain.loop.blocks[0].arguments[self.late]
            self.rows[argument] = self._with_added(found, self.rows[argument], self._keys(argument, found), 1)
        self._put_weights(weights)
        before = {} if start is None else {
            key: self.row(start, dict(zip(_axes(into), key, strict=True))) for key in keys}
        self.rows[into] = before if self.late is not None else self._with_added(found, before, keys, 0)

    def _keys(self, value: Value, found: Contraction) -> list[tuple[int, ...]]:
        """Of the rows of a contraction's sums, in the order in which they come from sums memory."""
        return [self._key(value, found, 2 * block + register // 2, 2 * eight + register % 2)
                for block in range(ROW_BLOCKS) for eight in range(self.bound[found.columns].count // 2)
                for register in range(4)]

    def _new_scores(self) -> Iterator[Value]:
        """Of this round."""
        mine = self._number()
        self._wait(MADE, mine, self.counter)
        for block in range(ROW_BLOCKS):
            yield from self._loaded(self._scores_at(mine), block, self.step)
        self._tell(TAKEN, mine)

    def _put_weights(self, weights: list[list[Value]]) -> None:
        """By blocks of 16 rows."""
        mine = self._number()
        for block, rows in enumerate(weights):
            self.effect("sums_store", [self._own_rows(self._weights_at(mine), block), *rows])
        self._tell(PUT, mine)

    def _with_added(self, found: Contraction, held: dict[tuple[int, ...], Value], keys: list[tuple[int, ...]],
                    rounds: int) -> dict[tuple[int, ...], Value]:
        """With the sums of the second product of so many rounds before this one; each part is added before the next
        one comes."""
        mine, made = self._number(), {}
        self._wait(ADDED, mine, self.counter, before=rounds)
        values = (value for block in range(ROW_BLOCKS)
                  for side in range(0, self.extents[found.columns], LOADED_COLUMNS)
                  for value in self._loaded(self.add(self._added_at(mine), side), block, LOADED_COLUMNS))
        for key, value in zip(keys, values, strict=True):
            made[key] = self.emit(self.depth, "add", [held[key], value], ROW_F32) if held else value
        return made

    def _clear_added(self, chain: Chain) -> None:
        """Zeros for the first round of a tile to add."""
        assert self.order is not None
        zeros = [self.emit(0, "bitcast", [self.constant(0, i32)], ROW_B32)] * (LOADED_COLUMNS // 2)
        mine = self._number()
        self.effect("sums_acquire", [])
        for block in range(ROW_BLOCKS):
            for side in range(0, self.extents[chain.contractions[self.order[1]].columns], LOADED_COLUMNS):
                place = self._own_rows(self.add(self._added_at(mine), side), block)
                self.effect("sums_store", [place, *zeros])

    def _tell(self, kind: int, group: Scalar) -> None:
        self.effect("sums_release", [])
        self.effect("signal_arrive", [self._signal(group)], disp=self._kind_at(kind))

    def _own_rows(self, place: Scalar, block: int) -> Value:
        """Where 16 rows of this warp's lie."""
        warp = self.scalar("s_mod", self.warp(), self._group.group_warps)
        row = self.add(self.mul(warp, ROW_BLOCKS * fragments.ROWS), block * fragments.ROWS)
        return self.value(self.add(place, self.mul(row, fragments.ROW_PLACES)))

    def _loaded(self, place: Scalar, block: int, columns: int) -> list[Value]:
        loaded = Op("sums_load", [self._own_rows(place, block)], [ROW_F32] * (columns // 2), {}, None, self.location)
        self.finish(loaded)
        return list(loaded.results)


def _goes_only_to(chain: Chain, value: Value, contraction: Op) -> bool:
    """Whether a carried value only goes to what a contraction is added to, so that it may be unfinished until then."""
    ops = chain.loop.blocks[0].ops
    while True:
        users = [op for op in ops if value in op.operands]
        if len(users) != 1 or len(users[0].results) != 1:
            return False
        if users[0].name == "add" and contraction.result in users[0].operands:
            return True
        value = users[0].result


def _order(chain: Chain) -> tuple[Op, Op] | None:
    """The two contractions, if these are all: one whose left operand the loop does not change, and one over its axis
    of what is made of the first."""
    body = chain.loop.blocks[0]
    order = tuple(op for op in body.ops if op in chain.contractions)
    if len(order) != 2:
        return None
    first, second = order
    changing: set[Value] = set(body.arguments)
    for op in body.ops:
        if any(v in changing for v in op.operands) or (
                op.name == "index" and op.attributes["axis"] == chain.step):
            changing.update(op.results)
    if chain.contractions[first].left in changing or chain.contractions[first].over == chain.step \
            or chain.contractions[second].over != chain.step:
        return None
    return first, second
