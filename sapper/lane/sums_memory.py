"""Contractions whose sums lie in a memory of their own: one warp starts the products, others store the sums.

Enters the same walk as groups.py takes, where the target's groups have such a memory (MatrixGroup.sums_columns).
Leaves lane IR: the function's body three times, once for each part that a warp may play.

    copies      one warp has boxes of both operands copied to the next stage as soon as it is free
    starts      one warp starts the products of each stage; they read near memory and add to the sums by themselves
    stores      a group of warps for each 128 rows brings the sums of a tile to registers, 16 rows by some columns at
                once, and stores them as groups.py does

The sums of two tiles have room, so that the products of the next one go on while those of the last are stored. Elements
of 8 bits are summed anew in each stage, a block of the depth: the storing warps add its sums, times their scales, to
totals in registers, while the products of the next block go to the other room.

Signals of each stage: `full`, as in groups.py; `free`, at which its products arrive by themselves when they are done.
Signals of each of the two rooms: `made`, at which the last products of its sums arrive; `taken`, at which the storing
warps arrive once all is in registers. A count of how often rooms were used says the room, and the phase; like the
counter of stages it waits between tiles in a word of near memory.

    near memory   stage 0 (left, right, ...), stage 1, ... | sums of each warp | full, free of each stage | made, taken
                  of each room | counters, counts of rooms | where the sums begin
    sums memory   room 0 (for each 128 rows: columns of each contraction), room 1
"""

from __future__ import annotations

from collections.abc import Callable

from ..ir.nodes import Op, Value
from ..ir.types import MASK, ROW_F32, ROW_I32, S64, RowType, f32, i32
from ..tile.plan import Walk
from ..tile.schedule import MatrixGroup, MatrixUnit
from . import fragments
from .depth_shares import Cluster
from .groups import COUNTER_BYTES, SIGNAL_BYTES, GroupLowering
from .matrix import MatrixWalk
from .state import Scalar

ROOMS = 2
HELD_COLUMNS, MOST_SHARED = 64, 128
"""That a warp brings to registers at once, of each contraction, and of all where workers hand over sums."""
LEAST_OF_TWO = 128
"""Columns of a tile that has rows for two groups of warps."""
LEAST_COLUMNS = 32
"""Of sums memory that can be set aside: a power of two, from these on (PTX ISA, "tcgen05.alloc")."""
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

    def _cycles(self, found: MatrixWalk, tile: tuple[int, int], cluster: Cluster, shares: int | None) -> float:
        group = self._sums_group()
        sums = tile[0] * tile[1] * len(found.right)
        if group is not None and shares is not None and sums > MOST_SHARED * group.group_rows:
            return float("inf")     # a thread has all of a tile's sums where workers share its depth
        return super()._cycles(found, tile, cluster, shares)

    def _shapes(self, group: MatrixGroup, found: MatrixWalk) -> list[tuple[int, int]]:
        shapes = super()._shapes(group, found)
        if not group.sums_columns:
            return shapes
        # Two halves of 64 columns are no better than one tile of 128, and want twice the descriptors.
        return [(groups, columns) for groups, columns in shapes if (groups == 1 or columns >= LEAST_OF_TWO) and (
            not self.narrow or columns <= group.narrow_columns)]

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

    def set_aside(self) -> int:
        """Columns of sums memory."""
        return max(LEAST_COLUMNS, ROOMS * self._tile_columns())

    # Parts.

    def parts(self, body: Callable[[], None]) -> None:
        group = self._sums_group()
        if group is None:
            super().parts(body)
            return
        self.frees_late = False
        group = self.chain_group = self._lay_out(group)
        for word in (self._stages_word(), self._rooms_word()):
            self.effect("s_store", [self.value(0), word], dtype=i32, near=True)
        storing = self.groups * group.group_warps
        first = self.emit(0, "s_cmp", [self.warp(), self.value(0)], S64, cond="eq")
        base = self.value(self.add(self.near(), self.base_at))

        def start() -> None:
            self._start_signals(group, storing)
            self.effect("sums_open", [base], columns=self.set_aside())

        self.fork(first, start, lambda: None)
        self._meet()
        self.sums_base = self.emit(0, "s_load", [base], S64, dtype=i32, near=True)

        def play(part: str, warp: int) -> None:
            self.part_played, self.multiplies = part, part == STORES
            self.only_warp = warp if self.shares is not None and part != STORES else None
            body()

        more, fewer = self.budgets(group)

        def store() -> None:
            if more:
                self.effect("register_budget", [], registers=more, more=True)
            play(STORES, 0)
            if self.boxed:
                self.effect("store_wait", [], pending=0)        # near memory is there until it was read

        def rest() -> None:
            if fewer:
                self.effect("register_budget", [], registers=fewer, more=False)
            self.fork(self._is_warp(storing), copy, lambda: self.fork(
                self._is_warp(storing + 1), lambda: play(STARTS, storing + 1), lambda: None))

        def copy() -> None:
            play(COPIES, storing)
            if self.cluster > 1:
                self._outlast_others(group)

        self.fork(self.emit(0, "s_cmp", [self.warp(), self.value(storing)], S64, cond="lt"), store, rest)
        self.only_warp = None
        self._meet()
        self.fork(first, lambda: self.effect("sums_close", [self.value(self.sums_base)], columns=self.set_aside()),
                  lambda: None)

    def _outlast_others(self, group: MatrixGroup) -> None:
        """Until products of the whole cluster have given back every stage: by themselves they arrive at signals of this
        worker, which has to be there then (as the `producer_tail` of CUTLASS's pipelines)."""
        counter = self.emit(self.depth, "s_load", [self._stages_word()], S64, dtype=i32, near=True)
        for number in range(group.stages):
            following = self.add(counter, number)
            parity = self.scalar("s_xor", self._parity_of(group, following), 1)
            self.effect("signal_wait", [self._signal(self._stage_of(group, following)), self.value(parity)],
                        disp=self.free_at, **self.of_cluster(self.cluster))

    def _meet(self) -> None:
        self.effect("sync_warps" if self.cluster == 1 else "sync_cluster", [])

    def _is_warp(self, number: int) -> Value:
        return self.emit(0, "s_cmp", [self.warp(), self.value(number)], S64, cond="eq")

    def _start_signals(self, group: MatrixGroup, multiplying: int) -> None:
        if self._sums_group() is None:
            super()._start_signals(group, multiplying)
            return
        for at, count, arrivals in self.signals(group, multiplying):
            for number in range(count):
                self.effect("signal_start", [self.near()], arrivals=arrivals, disp=at + number * SIGNAL_BYTES)
        self.effect("signal_fence", [])

    def signals(self, group: MatrixGroup, storing: int) -> list[tuple[int, int, int]]:
        """(where they begin, how many, arrivals of a phase) of signals of each kind. storing: how many warps do."""
        return [(self.full_at, group.stages, 1), (self.free_at, group.stages, self.cluster),
                (self.made_at, ROOMS, 1), (self.taken_at, ROOMS, storing)]

    def _near_word(self, number: Scalar) -> Value:
        return self.value(self.add(self.near(), self.add(self.counters_at, self.mul(number, COUNTER_BYTES))))

    def _stages_word(self) -> Value:
        """The word with this warp's counter of stages."""
        return self._near_word(self.warp())

    def _rooms_word(self) -> Value:
        """The word with this warp's count of rooms."""
        return self._near_word(self.add(self.warp(), self.warps))

    # The walk.

    def _tile(self, walk: Walk, found: MatrixWalk, unit: MatrixUnit, row: Value, column: Value) -> None:
        group = self._sums_group()
        if group is None:
            super()._tile(walk, found, unit, row, column)
            return
        starts = {found.rows: row, found.columns: column}
        word = self._rooms_word() if self.part_played == STORES else self._stages_word()
        counter = self.emit(self.depth, "s_load", [word], S64, dtype=i32, near=True)
        if self.part_played == COPIES:
            counter = self._copy_tile(group, found, counter, starts)
        elif self.part_played == STARTS:
            counter = self._start_tile(group, found, counter)
        else:
            take = self._add_tile if self.narrow else self._store_tile
            counter = take(group, walk, found, counter, starts)
        self.effect("s_store", [counter, word], dtype=i32, near=True)

    def _room_of(self, count: Scalar) -> tuple[Scalar, Scalar]:
        """The room that is used next, and the parity of its phase."""
        return self.scalar("s_mod", count, ROOMS), self.scalar("s_mod", self.scalar("s_floordiv", count, ROOMS), 2)

    def _sums_at(self, room: Scalar, group: Scalar, number: int) -> Scalar:
        """Where the sums of a contraction begin, of 128 rows."""
        part = self.add(self.mul(group, (len(self.pieces) - 1) * self.columns), number * self.columns)
        return self.add(self.sums_base, self.add(self.mul(room, self._tile_columns()), part))

    def _start_tile(self, group: MatrixGroup, found: MatrixWalk, counter: Value) -> Value:
        word = self._rooms_word()
        rooms = self.emit(self.depth, "s_load", [word], S64, dtype=i32, near=True)

        def body(here: Value, carried: list[Value]) -> list[Value]:
            counter, rooms, adds = carried
            stage = self._stage_of(group, counter)
            room, _ = self._room_of(rooms)
            if self.narrow:
                self._wait_taken(rooms)
            self.effect("signal_wait", [self._signal(stage), self.value(self._parity_of(group, counter))],
                        disp=self.full_at)
            self.effect("sums_acquire", [])
            self._start_stage(group, stage, room, adds)
            self.effect("sums_signal", [self._signal(stage)], disp=self.free_at, **self.of_cluster(self.cluster))
            if self.narrow:
                self.effect("sums_signal", [self._signal(room)], disp=self.made_at)
                rooms = self.value(self.add(rooms, 1))
            return [self.value(self.add(counter, 1)), rooms, self.value(0 if self.narrow else 1)]

        if not self.narrow:
            self._wait_taken(rooms)
        counter, rooms, _ = self._depth_loop(found, [counter, rooms, self.value(0)], body)
        if not self.narrow:
            self.effect("sums_signal", [self._signal(self._room_of(rooms)[0])], disp=self.made_at)
            rooms = self.value(self.add(rooms, 1))
        self.effect("s_store", [rooms, word], dtype=i32, near=True)
        return counter

    def _wait_taken(self, rooms: Scalar) -> None:
        room, parity = self._room_of(rooms)
        self.effect("signal_wait", [self._signal(room), self.value(self.scalar("s_xor", parity, 1))],
                    disp=self.taken_at)

    def _start_stage(self, group: MatrixGroup, stage: Scalar, room: Scalar, adds: Value) -> None:
        """The products of a stage, added to what is in the room if `adds` is not 0."""
        left, *right = self.pieces
        dtype, *others = (piece.op.operands[0].type.dtype for piece in self.pieces)  # type: ignore[union-attr]
        source = self.value(self.add(self.near(), self.mul(stage, self.stage_bytes)))
        for depth in range(0, self.deep, fragments.GROUP_DEPTH_BYTES // left.size):
            for mine in range(self.groups):
                top = left.outer_bytes(mine * group.group_rows, self)
                assert isinstance(top, int)
                for number, piece in enumerate(right):
                    place = self.value(self._sums_at(room, mine, number))
                    self.effect("sums_multiply", [source, source, place, self.value(1) if depth else adds], **{
                        "dtype": dtype, "right_dtype": others[number],
                        "rows": group.group_rows, "columns": self.columns,
                        "left_rows": left.along_depth, "right_rows": piece.along_depth,
                        "left_disp": left.at + left.depth_bytes(depth) + top,
                        "right_disp": piece.at + piece.depth_bytes(depth),
                        "left_panel_bytes": left.panel_bytes, "right_panel_bytes": piece.panel_bytes})

    def _wait_made(self, rooms: Scalar) -> Scalar:
        """Until the sums of the next room are there; gives it."""
        room, parity = self._room_of(rooms)
        self.effect("signal_wait", [self._signal(room), self.value(parity)], disp=self.made_at)
        self.effect("sums_acquire", [])
        return room

    def _give_back(self, room: Scalar) -> None:
        self.effect("sums_release", [])
        self.effect("signal_arrive", [self._signal(room)], disp=self.taken_at)

    def _load_sums(self, group: MatrixGroup, room: Scalar, contraction: int, top: Scalar, side: Scalar,
                   columns: int) -> list[Value]:
        """16 rows of this warp's, from `top` on, by so many columns."""
        mine, warp = (self.scalar(name, self.warp(), group.group_warps) for name in ("s_floordiv", "s_mod"))
        row = self.add(self.mul(warp, group.group_rows // group.group_warps), top)
        place = self.add(self._sums_at(room, mine, contraction), self.add(self.mul(row, fragments.ROW_PLACES), side))
        loaded = Op("sums_load", [self.value(place)], [self._sum_type()] * (fragments.ROWS * columns // self.lanes), {},
                    None, self.location)
        self.finish(loaded)
        return list(loaded.results)

    def _store_part(self, group: MatrixGroup, walk: Walk, found: MatrixWalk, sums: list[Value],
                    starts: dict[str, Value], top: Scalar, side: Scalar) -> None:
        first = self.mul(self.warp(), group.group_rows // group.group_warps)
        start = self.add(self.add(starts[found.rows], first), top)
        self.store_sums(walk, found, sums, self.value(start), self.value(self.add(starts[found.columns], side)))

    def _store_tile(self, group: MatrixGroup, walk: Walk, found: MatrixWalk, rooms: Value,
                    starts: dict[str, Value]) -> Value:
        wide, halves = self.held_columns(), group.group_rows // group.group_warps // fragments.ROWS
        room = self._wait_made(rooms)
        following = self.value(self.add(rooms, 1))
        if self.turn is not None:
            sums = [value for top, side in self._held_parts(group) for contraction in range(len(self.pieces) - 1)
                    for value in self._load_sums(group, room, contraction, top, side, wide)]
            self._give_back(room)
            self._store_parts(group, walk, found, sums, starts)
            return following

        def part(number: Value) -> None:
            top = self.mul(self.scalar("s_mod", number, halves), fragments.ROWS)
            side = self.mul(self.scalar("s_floordiv", number, halves), wide)
            sums = [value for contraction in range(len(self.pieces) - 1)
                    for value in self._load_sums(group, room, contraction, top, side, wide)]
            self._store_part(group, walk, found, self._or_zeros(found, sums), starts, top, side)

        self.counted("part", 0, halves * (self.columns // wide), 1, part)
        self._give_back(room)
        return following

    def _held_parts(self, group: MatrixGroup) -> list[tuple[int, int]]:
        """(row, column) of what a warp brings to registers at once."""
        return [(top, side) for top in range(0, group.group_rows // group.group_warps, fragments.ROWS)
                for side in range(0, self.columns, self.held_columns())]

    def _store_parts(self, group: MatrixGroup, walk: Walk, found: MatrixWalk, sums: list[Value],
                     starts: dict[str, Value]) -> None:
        """All of a tile's sums, part after part; or those of a segment of it."""
        parts = self._held_parts(group)
        each = len(sums) // len(parts)

        def store(sums: list[Value], row: Value, column: Value) -> None:
            for number, (top, side) in enumerate(parts):
                self._store_part(group, walk, found, sums[number * each:(number + 1) * each],
                                 {found.rows: row, found.columns: column}, top, side)

        self.finish_segment(found, sums, starts[found.rows], starts[found.columns], store)

    def _add_tile(self, group: MatrixGroup, walk: Walk, found: MatrixWalk, rooms: Value,
                  starts: dict[str, Value]) -> Value:
        """The sums of each block of the depth, times its scales, to totals in registers."""
        wide, parts = self.held_columns(), self._held_parts(group)
        each = fragments.ROWS * wide // self.lanes

        def body(here: Value, carried: list[Value]) -> list[Value]:
            rooms, *totals = carried
            scales = {top: self.scales(found, {**starts, found.depth: here,
                                               found.rows: self.value(self.add(starts[found.rows], top))},
                                       group, range(1))[0] for top, _ in parts}     # on their way meanwhile
            room = self._wait_made(rooms)
            made = []
            for number, (top, side) in enumerate(parts):
                sums = self._load_sums(group, room, 0, top, side, wide)
                made += self.add_block(sums, scales[top], totals[number * each:(number + 1) * each])
            self._give_back(room)
            return [self.value(self.add(rooms, 1)), *made]

        rooms, *totals = self._depth_loop(found, [rooms, *[self.constant(0.0, f32)] * (each * len(parts))], body)
        self._store_parts(group, walk, found, totals, starts)
        return rooms

    def _or_zeros(self, found: MatrixWalk, sums: list[Value]) -> list[Value]:
        """The sums, or zeros where the depth has no elements and nothing was multiplied."""
        deep = self.open[found.depth].extent
        if isinstance(deep, int) and deep > 0:
            return sums
        some = self.emit(self.depth, "cmp", [self.row_of(0), self.row_of(deep)], MASK, cond="lt")
        kind = self._sum_type()
        zero = self.constant(0.0 if kind == ROW_F32 else 0, kind.dtype)
        return [self.emit(self.depth, "select", [some, value, zero], kind) for value in sums]

    def _sum_type(self) -> RowType:
        dtype = self.pieces[0].op.operands[0].type.dtype  # type: ignore[union-attr]
        return ROW_I32 if dtype.is_integer else ROW_F32
