"""Contractions whose sums lie in a memory of their own: one warp starts the products, others store the sums.

Enters the same walk as groups.py takes, where the target's groups have such a memory (MatrixGroup.sums_columns).
Leaves lane IR: the function's body three times, once for each part that a warp may play.

    copies      one warp has boxes of both operands copied to the next stage as soon as it is free
    starts      one warp starts the products of each stage; they read near memory and add to the sums by themselves
    stores      a group of warps for each 128 rows brings the sums of a tile to registers, 16 rows by some columns at
                once, and stores them as groups.py does

The sums of two tiles have room, so that the products of the next one go on while those of the last are stored.

Signals of each stage: `full`, as in groups.py; `free`, at which its products arrive by themselves when they are done.
Signals of each of the two rooms: `made`, at which the products of a tile's last stage arrive; `taken`, at which the
storing warps arrive once all is in registers. A count of tiles says the room, and the phase; like the counter of
stages it waits between tiles in a word of near memory.

    near memory   stage 0 (left, right, ...), stage 1, ... | sums of each warp | full, free of each stage | made, taken of
                  each room | counters, counts of tiles | where the sums begin
    sums memory   room 0 (for each 128 rows: columns of each contraction), room 1
"""

from __future__ import annotations

from collections.abc import Callable

from ..ir.nodes import Op, Value
from ..ir.types import MASK, ROW_F32, S64, f32, i32
from ..tile.plan import Walk
from ..tile.schedule import MatrixGroup, MatrixUnit
from . import fragments
from .groups import COUNTER_BYTES, SIGNAL_BYTES, GroupLowering
from .matrix import MatrixWalk
from .state import Scalar

ROOMS = 2
HELD_COLUMNS = 64
"""That a warp brings to registers at once, of each contraction."""
LEAST_COLUMNS = 32
"""Of sums memory that can be set aside: a power of two, from these on (PTX ISA, "tcgen05.alloc")."""
ROW_PLACES = 1 << 16
"""From a place in sums memory to the one a row below."""
COPIES, STARTS, STORES = "copies", "starts", "stores"


class SumsMemoryLowering(GroupLowering):
    """Emits walks so where the target's groups have a memory for sums, and leaves the others to GroupLowering.

    part_played: by the warps for which the body is being emitted. sums_base: where the sums begin.
    """

    part_played = ""
    sums_base: Scalar = 0
    made_at = taken_at = base_at = 0

    def _sums_group(self) -> MatrixGroup | None:
        """The target's groups, where the walk at hand is one for them and their sums have a memory."""
        group = self.facts.matrix_group
        return group if group is not None and group.sums_columns and self.groups else None

    def _unshareable(self, asked: str | None) -> str | None:
        if self._sums_group() is not None:
            return "sums in a memory of their own, which workers do not hand over"
        return super()._unshareable(asked)

    # Near memory.

    def held_columns(self) -> int:
        return min(self.columns, HELD_COLUMNS) if self._sums_group() is not None else super().held_columns()

    def counters_bytes(self) -> int:
        if self._sums_group() is None:
            return super().counters_bytes()
        return 2 * ROOMS * SIGNAL_BYTES + 2 * self.warps * COUNTER_BYTES + COUNTER_BYTES

    def _lay_out(self, group: MatrixGroup) -> MatrixGroup:
        group = super()._lay_out(group)
        if self._sums_group() is not None:
            self.made_at = self.counters_at
            self.taken_at = self.made_at + ROOMS * SIGNAL_BYTES
            self.counters_at = self.taken_at + ROOMS * SIGNAL_BYTES
            self.base_at = self.near_bytes_used - COUNTER_BYTES
        return group

    def _tile_columns(self) -> int:
        """Of sums memory that a tile takes."""
        return self.groups * (len(self.pieces) - 1) * self.columns

    def _set_aside(self) -> int:
        return max(LEAST_COLUMNS, ROOMS * self._tile_columns())

    # Parts.

    def parts(self, body: Callable[[], None]) -> None:
        group = self._sums_group()
        if group is None:
            super().parts(body)
            return
        self.frees_late = False
        group = self._lay_out(group)
        for word in (self._stages_word(), self._tiles_word()):
            self.effect("s_store", [self.value(0), word], dtype=i32, near=True)
        storing = self.groups * group.group_warps
        first = self.emit(0, "s_cmp", [self.warp(), self.value(0)], S64, cond="eq")
        base = self.value(self.add(self.near(), self.base_at))

        def start() -> None:
            self._start_signals(group, storing)
            self.effect("sums_open", [base], columns=self._set_aside())

        self.fork(first, start, lambda: None)
        self._meet()
        self.sums_base = self.emit(0, "s_load", [base], S64, dtype=i32, near=True)

        def play(part: str, more: Callable[[], None] = lambda: None) -> None:
            self.part_played, self.multiplies = part, part == STORES
            body()
            more()

        def store() -> None:
            play(STORES, lambda: self.effect("store_wait", [], pending=0) if self.boxed else None)

        def rest() -> None:
            self.fork(self._is_warp(storing), lambda: play(COPIES), lambda: play(STARTS))

        self.fork(self.emit(0, "s_cmp", [self.warp(), self.value(storing)], S64, cond="lt"), store, rest)
        self._meet()
        self.fork(first, lambda: self.effect("sums_close", [self.value(self.sums_base)], columns=self._set_aside()),
                  lambda: None)

    def _meet(self) -> None:
        self.effect("sync_warps" if self.cluster == 1 else "sync_cluster", [])

    def _is_warp(self, number: int) -> Value:
        return self.emit(0, "s_cmp", [self.warp(), self.value(number)], S64, cond="eq")

    def _start_signals(self, group: MatrixGroup, multiplying: int) -> None:
        if self._sums_group() is None:
            super()._start_signals(group, multiplying)
            return
        for at, count, arrivals in ((self.full_at, group.stages, 1), (self.free_at, group.stages, self.cluster),
                                    (self.made_at, ROOMS, 1), (self.taken_at, ROOMS, multiplying)):
            for number in range(count):
                self.effect("signal_start", [self.near()], arrivals=arrivals, disp=at + number * SIGNAL_BYTES)
        self.effect("signal_fence", [])

    def _word(self, number: Scalar) -> Value:
        return self.value(self.add(self.near(), self.add(self.counters_at, self.mul(number, COUNTER_BYTES))))

    def _stages_word(self) -> Value:
        """The word with this warp's counter of stages."""
        return self._word(self.warp())

    def _tiles_word(self) -> Value:
        """The word with this warp's count of tiles."""
        return self._word(self.add(self.warp(), self.warps))

    # The walk.

    def _tile(self, walk: Walk, found: MatrixWalk, unit: MatrixUnit, row: Value, column: Value) -> None:
        group = self._sums_group()
        if group is None:
            super()._tile(walk, found, unit, row, column)
            return
        starts = {found.rows: row, found.columns: column}
        word = self._tiles_word() if self.part_played == STORES else self._stages_word()
        counter = self.emit(self.depth, "s_load", [word], S64, dtype=i32, near=True)
        if self.part_played == COPIES:
            counter = self._copy_tile(group, found, counter, starts)
        elif self.part_played == STARTS:
            counter = self._start_tile(group, found, counter)
        else:
            self._store_tile(group, walk, found, counter, starts)
            counter = self.value(self.add(counter, 1))
        self.effect("s_store", [counter, word], dtype=i32, near=True)

    def _room_of(self, count: Scalar) -> tuple[Scalar, Scalar]:
        """The room of a tile's sums, and the parity of its phase."""
        return self.scalar("s_mod", count, ROOMS), self.scalar("s_mod", self.scalar("s_floordiv", count, ROOMS), 2)

    def _sums_at(self, room: Scalar, group: Scalar, number: int) -> Scalar:
        """Where the sums of a contraction begin, of 128 rows."""
        part = self.add(self.mul(group, (len(self.pieces) - 1) * self.columns), number * self.columns)
        return self.add(self.sums_base, self.add(self.mul(room, self._tile_columns()), part))

    def _start_tile(self, group: MatrixGroup, found: MatrixWalk, counter: Value) -> Value:
        left, *right = self.pieces
        dtype = left.op.operands[0].type.dtype  # type: ignore[union-attr]
        word = self._tiles_word()
        count = self.emit(self.depth, "s_load", [word], S64, dtype=i32, near=True)
        room, parity = self._room_of(count)
        self.effect("signal_wait", [self._signal(room), self.value(self.scalar("s_xor", parity, 1))],
                    disp=self.taken_at)

        def body(here: Value, carried: list[Value]) -> list[Value]:
            counter, adds = carried
            stage = self._stage_of(group, counter)
            self.effect("signal_wait", [self._signal(stage), self.value(self._parity_of(group, counter))],
                        disp=self.full_at)
            self.effect("sums_acquire", [])
            source = self.value(self.add(self.near(), self.mul(stage, self.stage_bytes)))
            for depth in range(0, self.deep, fragments.GROUP_DEPTH_BYTES // left.size):
                again = self.value(1) if depth else adds
                for mine in range(self.groups):
                    top = left.outer_bytes(mine * group.group_rows, self)
                    assert isinstance(top, int)
                    for number, piece in enumerate(right):
                        place = self.value(self._sums_at(room, mine, number))
                        self.effect("sums_multiply", [source, source, place, again], **{
                            "dtype": dtype, "rows": group.group_rows, "columns": self.columns,
                            "left_rows": left.along_depth, "right_rows": piece.along_depth,
                            "left_disp": left.at + left.depth_bytes(depth) + top,
                            "right_disp": piece.at + piece.depth_bytes(depth),
                            "left_panel_bytes": left.panel_bytes, "right_panel_bytes": piece.panel_bytes})
            self.effect("sums_signal", [self._signal(stage)], disp=self.free_at, **self.of_cluster(self.cluster))
            return [self.value(self.add(counter, 1)), self.value(1)]

        counter, _ = self._depth_loop(found, [counter, self.value(0)], body)
        self.effect("sums_signal", [self._signal(room)], disp=self.made_at)
        self.effect("s_store", [self.value(self.add(count, 1)), word], dtype=i32, near=True)
        return counter

    def _store_tile(self, group: MatrixGroup, walk: Walk, found: MatrixWalk, count: Value,
                    starts: dict[str, Value]) -> None:
        room, parity = self._room_of(count)
        mine = self.scalar("s_floordiv", self.warp(), group.group_warps)
        warp_rows = group.group_rows // group.group_warps
        down = self.mul(self.scalar("s_mod", self.warp(), group.group_warps), warp_rows)
        self.effect("signal_wait", [self._signal(room), self.value(parity)], disp=self.made_at)
        self.effect("sums_acquire", [])
        parts = [(top, side) for top in range(0, warp_rows, fragments.ROWS)
                 for side in range(0, self.columns, self.held_columns())]
        for top, side in parts:
            sums = [value for number in range(len(self.pieces) - 1) for value in self._load_sums(
                self.add(self._sums_at(room, mine, number), self.mul(self.add(down, top), ROW_PLACES)), side)]
            if (top, side) == parts[-1]:
                self.effect("sums_release", [])
                self.effect("signal_arrive", [self._signal(room)], disp=self.taken_at)
            start = self.add(self.add(starts[found.rows], self.mul(self.warp(), warp_rows)), top)
            self.store_sums(walk, found, self._or_zeros(found, sums), self.value(start),
                            self.value(self.add(starts[found.columns], side)))

    def _load_sums(self, place: Scalar, side: int) -> list[Value]:
        held = fragments.ROWS * self.held_columns() // self.lanes
        loaded = Op("sums_load", [self.value(place)], [ROW_F32] * held, {"disp": side}, None, self.location)
        self.finish(loaded)
        return list(loaded.results)

    def _or_zeros(self, found: MatrixWalk, sums: list[Value]) -> list[Value]:
        """The sums, or zeros where the depth has no elements and nothing was multiplied."""
        deep = self.open[found.depth].extent
        if isinstance(deep, int) and deep > 0:
            return sums
        some = self.emit(self.depth, "cmp", [self.row_of(0), self.row_of(deep)], MASK, cond="lt")
        zero = self.constant(0.0, f32)
        return [self.emit(self.depth, "select", [some, value, zero], ROW_F32) for value in sums]
