"""Chains of contractions on groups of warps (chained_groups.py) whose rows are too long for one group: two share them.

Enters a chain one of whose whole axes is so long that 64 rows of sums over it do not fit the registers of a group: the
latent vector of multi-head latent attention, 512 numbers that are keys and values at once. Leaves what
ChainGroupLowering does, with two groups that have the same 64 rows, each with one half of that axis:

    contraction over the axis   each group sums its half of the depth; the halves pass through near memory, and both
                                go on with equal numbers, as a + b = b + a
    contraction that gives it   each group has its half of the columns, as in FlashMLA (github.com/deepseek-ai/FlashMLA,
                                docs/20250422-new-kernel-deep-dive.md): 64 x 512 sums of f32 are half of a processor's
                                registers
    what does not span it       is computed by both, and stored by the first

The piece of the stream is copied once: products read its rows along the depth as keys, and turned as values.

A contraction whose sums are only added to those over the long axis (the turned part of a key) is halved, too, and the
two are one batch, summed in the same registers.

Of the left operand over the long axis as much is kept in near memory, for all of a tile, as registers lack for a longer
piece: its panels are stored as products read them, before and after which the warps of the group meet.

A warp's rows are those of one warp of the other group: these two meet twice in a round, when both have stored their
half sums and when both have read the other's. A signal has two phases for a round, and so for a tile: the parities that
are waited for are 0 and 1, whatever was before. Where the halves lay, boxes of the results lie at the end of a tile.

    near memory   stages | left: [group][panel][row] | halves, sums: [warp] | met, kept signals | full, free | counters
"""

from __future__ import annotations

from typing import Any

from ..ir.nodes import Op, Value
from ..ir.types import ROW_F32
from ..tile.schedule import MatrixGroup, MatrixUnit
from . import fragments
from .chained import Chain, Contraction
from .chained_groups import BoxStream, ChainGroupLowering
from .chained_shared import RUN, SHORTEST_STEP
from .groups import COUNTER_BYTES, SIGNAL_BYTES
from .pieces import ELEMENT_BYTES
from .state import Scalar

PAIR = 2
"""Groups that share rows."""
FEWEST_STAGES = 2
STORED, READ = 0, 1
"""Parities of the phases in a round: both have stored, both have read."""
EMPTY, FILLED = 0, 1
"""And in a tile: nobody reads what is kept of the last one any more, all of this one is there."""
Batches = dict[Op, tuple[tuple[Op, ...], Value]]
"""Of each contraction of a batch: the contractions of it, and what their sums are."""


class ChainPairLowering(ChainGroupLowering):
    """Takes chains whose rows two groups can share. batches: contractions that are summed together, by each of them.
    kept: panels of the first one's left operand in near memory."""

    kept = 0
    kept_at = met_at = 0
    """Of near memory: where these begin, and signals: of warps that meet, then of groups whose panels are there."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batches: Batches = {}
        self.found: tuple[int, frozenset[str], int, int, Batches] | None = None

    # The choice.

    def groups_of_chain(self, group: MatrixGroup, chain: Chain) -> tuple[int, int]:
        self.found = None
        if self.slices > 1 or self._registers(chain, (), frozenset(), self.step) > group.chain_registers:
            self.found = self._pair(group, chain)
        return super().groups_of_chain(group, chain) if self.found is None else (PAIR, group.group_rows)

    def take_chain(self, groups: int) -> None:
        super().take_chain(groups)
        if self.found is not None:
            self.slices, self.parted, self.step, self.kept, self.batches = self.found
            self.few_registers = True

    def _pair(self, group: MatrixGroup, chain: Chain) -> tuple[int, frozenset[str], int, int, Batches] | None:
        """Slices, which axes are cut, the step, panels that are kept, batches; None where two groups can't share."""
        axis = max(self.extents, key=lambda a: self.extents[a])
        ops, into = _batch_over(chain, axis)
        parted = frozenset(chain.contractions[op].over for op in ops)
        widest = max(columns for _, columns in group.shapes)
        if into is None or self.extents[axis] > PAIR * widest or not all(
                self._has_halves(a) and not self.is_reduced(chain, a) for a in parted):
            return None
        step = self.facts.matrix.chain_step  # type: ignore[union-attr]
        while step >= SHORTEST_STEP:
            registers = self._registers(chain, ops, parted, step)
            for kept in range(1 + self.extents[axis] // (PAIR * fragments.PANEL)):
                if registers - kept * fragments.PANEL // 4 <= group.chain_registers \
                        and self._pair_bytes(group, chain, step, kept) <= group.near_bytes:
                    return PAIR, parted, step, kept, dict.fromkeys(ops, (ops, into))
            step //= 2
        return None

    def _has_halves(self, axis: str) -> bool:
        """Whether half of an axis is as deep as instructions are, and begins with a panel or within the only one."""
        half = self.extents[axis] // PAIR
        return self.extents[axis] % (PAIR * fragments.DEPTH) == 0 and (
            half % fragments.PANEL == 0 or self.extents[axis] == fragments.PANEL)

    def _registers(self, chain: Chain, batch: tuple[Op, ...], parted: frozenset[str], step: int) -> int:
        """What sums and left operands take of a thread. Weights are there until their product is done, beside the next
        round's scores."""
        held = {axis: extent // (PAIR if axis in parted else 1) for axis, extent in self.extents.items()}
        held[chain.step] = step
        sums = sum(held[found.columns] // 2 for op, found in chain.contractions.items() if op not in batch[1:])
        return sums + sum(held[found.over] // 4 for found in chain.contractions.values())

    def _pair_bytes(self, group: MatrixGroup, chain: Chain, step: int, kept: int) -> int:
        """Of near memory, with the fewest stages."""
        warps = PAIR * group.group_warps
        row_bytes = sum(self._padded_bytes(op, chain) for op in chain.streams)
        return FEWEST_STAGES * (step * row_bytes + 2 * SIGNAL_BYTES) + kept * _kept_bytes(group) \
            + warps * self._place_bytes(step) + _signals_bytes(group) + (warps + group.copy_warps) * COUNTER_BYTES

    def _place_bytes(self, step: int) -> int:
        """Of near memory that is one warp's: for its half sums, or two boxes of results."""
        return max(self._slice_bytes(step), 2 * fragments.ROWS * fragments.ROW_BYTES)

    def batch_of(self, contraction: Op) -> tuple[tuple[Op, ...], Value]:
        return self.batches.get(contraction) or super().batch_of(contraction)

    def _compute(self, value: Value, at: dict[str, int], level: int) -> Value:
        for op, (_, into) in self.batches.items():
            if value is into:
                self._contract(op, value, None)
                return self.rows[value][tuple(at[a] for a in value.type.axes)]  # type: ignore[union-attr]
        return super()._compute(value, at, level)

    # Which rows, and which half.

    @property
    def _shares_rows(self) -> bool:
        return self.groups > 0 and self.slices > 1

    def row_group(self) -> Scalar:
        if not self._shares_rows:
            return super().row_group()
        return self.scalar("s_mod", self.warp(), self._group.group_warps)

    def _slice(self) -> Scalar:
        if not self._shares_rows:
            return super()._slice()
        return self.scalar("s_floordiv", self.warp(), self._group.group_warps)

    def chain_rows(self) -> int:
        return super().chain_rows() // (self.slices if self.groups else 1)

    def source_of(self, stream: BoxStream) -> Value:
        if stream.across not in self.parted:
            return super().source_of(stream)
        panels, within = divmod(self.part_extent(stream.across), fragments.PANEL)
        return self.value(self.add(self.source, self.mul(self._slice(), panels * stream.panel_bytes
                                                         + within * ELEMENT_BYTES)))

    # Near memory.

    def left_bytes(self) -> int:
        return self.kept * _kept_bytes(self._group) if self._shares_rows else super().left_bytes()

    def least_bytes(self) -> int:
        if not self._shares_rows:
            return super().least_bytes()
        group = self._group
        return self.left_bytes() + PAIR * group.group_warps * self._place_bytes(self.step) + _signals_bytes(group)

    def lay_out_meetings(self, at: int) -> int:
        if not self._shares_rows:
            return super().lay_out_meetings(at)
        group = self._group
        self.kept_at = self.sums_at - self.left_bytes()
        self.met_at = self.sums_at + PAIR * group.group_warps * self._place_bytes(self.step)
        self.name_buffers([("left", self.kept_at, self.left_bytes()),
                           ("halves", self.sums_at, self.met_at - self.sums_at),
                           ("met", self.met_at, _signals_bytes(group))])
        return self.met_at + _signals_bytes(group)

    def fit_pieces(self, store: Op, columns: int, most_bytes: int) -> None:
        super().fit_pieces(store, columns, self._place_bytes(self.step) if self._shares_rows else most_bytes)

    def pieces_bytes(self, store: Op) -> int:
        return self._place_bytes(self.step) if self._shares_rows else super().pieces_bytes(store)

    def _start_signals(self, group: MatrixGroup, multiplying: int) -> None:
        if self._shares_rows:
            for number, arrivals in enumerate([PAIR] * group.group_warps + [group.group_warps] * PAIR):
                self.effect("signal_start", [self.near()], arrivals=arrivals, disp=self.met_at + number * SIGNAL_BYTES)
        super()._start_signals(group, multiplying)

    # The tile.

    def _chain_loop(self, chain: Chain, unit: MatrixUnit, row: Value) -> None:
        if not self._shares_rows:
            super()._chain_loop(chain, unit, row)
            return
        if self.boxed:
            self.effect("store_wait", [], pending=0)        # halves lie where boxes were
        if self.kept:
            self._keep_left(chain)
        super()._chain_loop(chain, unit, row)
        if self.boxed:
            self.effect("signal_wait", [self._signal(self.row_group()), self.value(READ)], disp=self.met_at)

    def _keep_left(self, chain: Chain) -> None:
        """Panels of the left operand to near memory: each warp its 16 rows."""
        found = chain.contractions[next(iter(self.batches))]
        signal, disp = self._signal(self._slice()), self.met_at + self._group.group_warps * SIGNAL_BYTES
        self.effect("signal_arrive", [signal], disp=disp)
        self.effect("signal_wait", [signal, self.value(EMPTY)], disp=disp)
        mine = self.mul(self.row_group(), fragments.ROWS * fragments.ROW_BYTES)
        place, offsets = self.value(self.add(self._left_panels(), mine)), self.matrix_offsets()
        for panel in range(self.kept):
            for at in range(0, fragments.PANEL, fragments.DEPTH):
                left = self._left(found, 0, (panel * fragments.PANEL + at) // 4)
                self.effect("store_matrix", [place, offsets, *left], flip=at * ELEMENT_BYTES,
                            disp=panel * _panel_bytes(self._group))
        self.effect("store_fence", [])
        self.effect("signal_arrive", [signal], disp=disp)
        self.effect("signal_wait", [signal, self.value(FILLED)], disp=disp)

    def _left_panels(self) -> Scalar:
        """Where this group's are."""
        return self.add(self.add(self.near(), self.kept_at),
                        self.mul(self._slice(), self.kept * _panel_bytes(self._group)))

    def product(self, op: Op, depth: int) -> tuple[str, list[Value], dict[str, object]]:
        panel, within = divmod(4 * depth, fragments.PANEL)
        if panel >= self.kept or op is not next(iter(self.batches)):
            return super().product(op, depth)
        assert self.chain is not None
        found = self.chain.contractions[op]
        stream = next(s for s in self.box_streams if s.op is found.right)
        return "group_multiply", [self.value(self._left_panels()), self.source_of(stream)], {
            **self._right_of(stream, found, depth * 4), "left_rows": True,
            "left_disp": panel * _panel_bytes(self._group) + within * ELEMENT_BYTES}

    def whole_sums(self, found: Contraction, sums: dict[tuple[int, ...], Value]) -> dict[tuple[int, ...], Value]:
        """Of the half that this group has summed, and of the other's."""
        if not self._shares_rows or found.over not in self.parted:
            return super().whole_sums(found, sums)
        each, rows = self._place_bytes(self.step), list(sums.values())
        mine, other = (self.add(self.add(self.near(), self.sums_at), self.mul(warp, each)) for warp in (
            self.warp(), self.scalar("s_xor", self.warp(), self._group.group_warps)))
        signal = self._signal(self.row_group())
        self.effect("signal_wait", [signal, self.value(READ)], disp=self.met_at)
        self.put_runs(mine, rows)
        self._met(signal)
        self.effect("signal_wait", [signal, self.value(STORED)], disp=self.met_at)
        whole = []
        for first in range(0, len(rows), RUN):
            whole += [self.emit(self.depth, "add", [row, part], ROW_F32)
                      for row, part in zip(rows[first:first + RUN], self.take_run(other, first), strict=True)]
        self._met(signal)
        return dict(zip(sums, whole, strict=True))

    def _met(self, signal: Value) -> None:
        """One of the lanes says that all have done so."""
        self.effect("sync_lanes", [])
        self.effect("signal_arrive", [signal], disp=self.met_at)

    @property
    def _group(self) -> MatrixGroup:
        assert self.facts.matrix_group is not None
        return self.facts.matrix_group


def _panel_bytes(group: MatrixGroup) -> int:
    """Of one group's rows."""
    return group.group_rows * fragments.ROW_BYTES


def _kept_bytes(group: MatrixGroup) -> int:
    """Of a panel of each group."""
    return PAIR * _panel_bytes(group)


def _signals_bytes(group: MatrixGroup) -> int:
    return (group.group_warps + PAIR) * SIGNAL_BYTES


def _batch_over(chain: Chain, axis: str) -> tuple[tuple[Op, ...], Value | None]:
    """The only contraction over an axis, with another whose sums meet its own in an addition and nowhere else; and what
    the two give. None, where several are over the axis: groups that share rows meet once in a round."""
    found = [op for op, contraction in chain.contractions.items() if contraction.over == axis]
    if len(found) != 1:
        return (), None
    (first,) = found
    body = chain.loop.blocks[0]
    for op in body.ops:
        if op.name != "add" or first.result not in op.operands:
            continue
        others = [v.op for v in op.operands if v.op is not first]
        users = [user for user in body.ops for v in user.operands if v in op.operands]
        if len(others) == 1 and others[0] in chain.contractions and users == [op, op] \
                and chain.contractions[others[0]].over not in (axis, chain.step):
            return (first, others[0]), op.result
    return (first,), first.result
