"""Contractions on matrix instructions of groups of warps: some warps copy, the others multiply, tile after tile.

Enters the same walk as sapper/lane/matrix.py takes, where the target has such instructions and boxes of both operands
can be copied (`MatrixGroup`). Leaves lane IR: the function's body twice, once for each part that a warp may play.

    copies      one warp has boxes of both operands, `depth` deep, copied to the next stage as soon as it is free
    multiplies  each group takes 64 rows through the instructions, sums in registers; then the sums go to near memory,
                some columns at a time, and the walk's stores read them there like any other value, or copies of boxes
                store them (boxed_stores.py)

Stages are used in turn, tile after tile without a break, so that the next tile is copied while the sums of this one are
stored. A counter says where a warp is: its low bits are the stage, the others how often the stages were used. Between
tiles it waits in a word of near memory, since tasks carry no values.

Each stage has two signals. `full`: the copies announce their bytes; the multiplying warps wait for it. `free`: these
warps arrive once their group's instructions no longer read the stage; the copying warp waits for it. A group starts the
next stage's instructions before it waits for those of the stage before, so the arrival is one stage late; before the
first stage there is none, and that arrival says that the last one is free.

    near memory   stage 0 (left, right, ...), stage 1, ... | sums of each warp | full, free of each stage | counters
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..ir.nodes import Block, Op, Value
from ..ir.types import MASK, ROW_F32, ROW_I32, S64, TensorType, f32, i32
from ..tile.affine import affine
from ..tile.plan import Walk, plan_block
from ..tile.schedule import MatrixGroup, MatrixUnit
from . import fragments
from .boxed_stores import MOST_DIMENSIONS
from .clusters import Clusters
from .fragments import PANEL, ROW_BYTES
from .matrix import MatrixLowering, MatrixWalk, Sum
from .state import Scalar

PIECE_ROWS = 8
"""Rows of the sums that pass through near memory at once."""
SIGNAL_BYTES, COUNTER_BYTES = 8, 4
REGISTER_GRANULE = 8


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand's piece in each stage. at: its first byte there. map: of its tensor. along_depth: whether rows of 128
    bytes lie along the depth; otherwise along the outer axis, and there is a panel for each 64 of it. size: bytes of an
    element."""

    op: Op
    outer: str
    extent: int
    depth: int
    at: int
    map: int
    along_depth: bool
    size: int

    @property
    def bytes(self) -> int:
        return self.extent * self.depth * self.size

    @property
    def panel_bytes(self) -> int:
        return self.depth * ROW_BYTES

    def outer_bytes(self, outer: Scalar, low: MatrixLowering) -> Scalar:
        """From the piece's first byte to an outer coordinate, a multiple of 64."""
        return low.mul(outer, ROW_BYTES) if self.along_depth else low.mul(low.scalar("s_floordiv", outer, PANEL),
                                                                          self.panel_bytes)

    def depth_bytes(self, depth: int) -> int:
        return depth * (self.size if self.along_depth else ROW_BYTES)


class GroupLowering(Clusters):
    """Emits walks for groups of warps where that can be done, and leaves the others to MatrixLowering.

    groups, columns: of the tile. deep: elements of the depth in a stage. narrow: they have 8 bits. multiplies: which
    part is being emitted. stays_held: whether sums are stored from registers. frees_late: whether a stage is given back
    when the next one's instructions began.
    """

    deep = columns = 0
    stays_held = False
    frees_late = True

    def find_matrix_walk(self) -> None:
        super().find_matrix_walk()
        group, walk = self.facts.matrix_group, self.only_walk()
        self.tensor_maps: list[list[object]] = []
        if group is None or walk is None or self.shared_loops or len(
                plan_block(self.function.body, self.wholes).items) != 1:
            return
        found, dtypes = self.matrix_walk, (*group.dtypes, *group.byte_dtypes)
        if self.schedule.matrix is not False and (found is None or found.computed
                                                  or found.dtype.name in group.narrow_dtypes):
            # Bytes, which single warps would make wider where they are computed.
            dtypes = group.narrow_dtypes
            found = self.match_matrix_walk(walk, dtypes, True)
        if found is None or found.plain is not None or found.around:
            return
        loads = [(op, found.rows) for op in found.left] + [(op, found.columns) for op in found.right]
        dtype = found.left[0].operands[0].type.dtype  # type: ignore[union-attr]
        self.deep = group.depth_bytes // dtype.size_bytes
        self.narrow = dtypes is group.narrow_dtypes
        if dtype.name in group.byte_dtypes and found.is_scaled:
            return
        if dtype.name in dtypes and all(self._is_box(op, found.depth) for op, _ in loads) \
                and not any(self._turns_sums(root, found) for root in walk.after):
            shape = self._shape(group, found)
            if shape is not None and (not self.narrow or self._takes_scales(group, found, shape)):
                self.matrix_walk = found
                self._take_groups(group, shape)
                store = self._boxed_store(walk, found)
                self.boxed = {} if store is None else {store: 0}

    def matrix_unit(self) -> MatrixUnit | MatrixGroup:
        return self.facts.matrix_group if self.groups and self.facts.matrix_group else super().matrix_unit()

    def take_tile(self, tile: tuple[int, int]) -> None:
        group = self.facts.matrix_group
        if group is None or not self.groups:
            super().take_tile(tile)
        else:
            self._take_groups(group, (tile[0] // group.group_rows, tile[1]))

    def _take_groups(self, group: MatrixGroup, shape: tuple[int, int]) -> None:
        self.groups, self.columns = shape
        self.few_registers = self.narrow and self.columns > group.narrow_columns
        self.warps = self.groups * group.group_warps + group.copy_warps

    def fitting_tiles(self) -> list[tuple[int, int]]:
        group, found = self.facts.matrix_group, self.matrix_walk
        if group is None or found is None or not self.groups:
            return super().fitting_tiles()
        return [(groups * group.group_rows, wide) for groups, wide in self._shapes(group, found)
                if not self.narrow or self._takes_scales(group, found, (groups, wide))]

    def _takes_scales(self, group: MatrixGroup, found: MatrixWalk, shape: tuple[int, int]) -> bool:
        """Whether all lies along the depth, and each scale is one number for the tile's columns, or rows, or one for
        each row, in every stage."""
        if len(found.right) > 1 or any(found.depth not in self._forms(op)[-1].axes for op in found.left + found.right):
            return False
        (left, right), = found.scales
        tile = {found.rows: shape[0] * group.group_rows, found.columns: min(shape[1], group.narrow_columns)}
        return all(scale is None or self._scale_indices(scale, outer, found.depth, tile[outer]) is not None
                   for scale, outer in ((left, found.rows), (right, found.columns))) and (
            right is None or self._by_row(right, found.columns) is None)

    def _scale_indices(self, scale: Op, outer: str, depth: str,
                       extent: int) -> list[tuple[str | None, Value | int]] | None:
        """Of each dimension of a scale: (axis, how many of its coordinates share an element), or (None, a scalar)."""
        t = scale.operands[0].type
        assert isinstance(t, TensorType)
        if t.dtype is not f32 or self.specialization.strides.get(scale.operands[0].name, "contiguous") != "contiguous":
            return None
        made: list[tuple[str | None, Value | int]] = []
        for value in scale.operands[1:]:
            shared, index = 1, value
            if value.op is not None and value.op.name == "floordiv" and value.op.operands[1].op is not None \
                    and value.op.operands[1].op.name == "const":
                shared, index = int(value.op.operands[1].op.attributes["value"]), value.op.operands[0]
            axes = index.type.axes  # type: ignore[union-attr]
            if not axes:
                made.append((None, value))
                continue
            if index.op is None or index.op.name != "index" or (axes[0] == depth and shared % self.deep) \
                    or (axes[0] == outer and shared != 1 and shared % extent) or axes[0] not in (outer, depth):
                return None
            made.append((axes[0], shared))
        return made

    @staticmethod
    def _by_row(scale: Op, outer: str) -> Value | None:
        """The index of a scale that is one for each row."""
        return next((v for v in scale.operands[1:] if v.op is not None and v.op.name == "index"
                     and v.op.attributes["axis"] == outer), None)

    def _shape(self, group: MatrixGroup, found: MatrixWalk) -> tuple[int, int] | None:
        """Groups and columns of the tile, until the model compares tiles (settle_product): as the schedule says, else
        the first shape of which there is one for each worker, or the last; None where the schedule asks for another
        tile."""
        rows, columns = (self._extent_from_zero(axis) for axis in (found.rows, found.columns))
        shapes = self._shapes(group, found)
        enough = (shape for shape in shapes if -(-rows // (shape[0] * group.group_rows)) * -(-columns // shape[1])
                  >= group.workers)
        return next(enough, shapes[-1] if shapes else None)

    def _shapes(self, group: MatrixGroup, found: MatrixWalk) -> list[tuple[int, int]]:
        """Groups and columns that the tile may have, the largest first; the one that the schedule asks for, or none."""
        forced = self.schedule.tile.keys() & {found.rows, found.columns, found.depth}
        shapes = []
        for groups, most in group.shapes:
            wide = most // len(found.right)
            tile = {found.rows: groups * group.group_rows, found.columns: wide, found.depth: self.deep}
            if wide >= PANEL and all(tile[axis] == self.schedule.tile[axis] for axis in forced):
                shapes.append((groups, wide))
        return shapes[:1] if forced else shapes

    def _is_box(self, op: Op, depth: str) -> bool:
        """Whether what a tile reads is a box of the tensor, with nothing but zeros, or rows that nobody wants, where it
        reaches past the tensor's end."""
        t = op.operands[0].type
        assert isinstance(t, TensorType)
        forms = [affine(v) for v in op.operands[1:]]
        for dim, form in zip(t.dims, forms, strict=True):
            assert form is not None
            if any(factor != 1 for factor in form.axes.values()) or len(form.axes) > 1:
                return False
            if depth in form.axes and (form.constant or form.scalars or not self._ends_at(depth, dim)):
                return False
        return len(forms) <= MOST_DIMENSIONS

    def matrix_tile(self) -> tuple[int, int]:
        if not self.groups:
            return super().matrix_tile()
        assert self.facts.matrix_group is not None
        return self.groups * self.facts.matrix_group.group_rows, self.columns

    @property
    def tiles_are_tasks(self) -> bool:
        """Whether each task is one tile: it costs nothing, as the copies for the next one go on all the time."""
        return self.groups > 0 and not self.schedule.chunks

    # Parts.

    def parts(self, body: Callable[[], None]) -> None:
        group = self.facts.matrix_group
        if not self.groups:
            super().parts(body)
            return
        assert group is not None
        group = self._lay_out(group)
        self.chain_group = group
        own = self.add(self.near(), self.add(self.counters_at, self.mul(self.warp(), COUNTER_BYTES)))
        self.effect("s_store", [self.value(0), self.value(own)], dtype=i32, near=True)
        self.start_turns()
        first = self.emit(0, "s_cmp", [self.warp(), self.value(0)], S64, cond="eq")
        multiplying = self.groups * group.group_warps
        self.fork(first, lambda: self._start_signals(group, multiplying), lambda: None)
        self.effect("sync_warps" if self.cluster == 1 else "sync_cluster", [])
        more, fewer = self.budgets(group)

        def multiply() -> None:
            self.multiplies = True
            if more:
                self.effect("register_budget", [], registers=more, more=True)
            body()
            if self.boxed:
                self.effect("store_wait", [], pending=0)       # near memory is there until it was read

        def copy() -> None:
            self.multiplies = False
            self.only_warp = multiplying if self.shares is not None else None
            if fewer:
                self.effect("register_budget", [], registers=fewer, more=False)
            self.fork(self.emit(0, "s_cmp", [self.warp(), self.value(multiplying)], S64, cond="eq"), body,
                         lambda: None)

        self.fork(self.emit(0, "s_cmp", [self.warp(), self.value(multiplying)], S64, cond="lt"), multiply, copy)
        if self.cluster > 1:
            self.effect("sync_cluster", [])

    def start_turns(self) -> None:
        """Before signals are started: what else is kept between tiles begins here."""

    def _lay_out(self, group: MatrixGroup) -> MatrixGroup:
        """The places in near memory; gives the group with as many stages as there are."""
        found = self.matrix_walk
        assert found is not None
        high, wide = self.matrix_tile()
        for store in self.boxed:
            self.boxed[store] = self._map(store, {found.rows: fragments.ROWS,
                                                  found.columns: self.panel_columns(store)})
        self.pieces = [self._operand(found.left[0], found.rows, found.depth, high, 0)]
        for op in found.right:
            last = self.pieces[-1]
            self.pieces.append(self._operand(op, found.columns, found.depth, wide, last.at + last.bytes))
        self.stage_bytes = self.pieces[-1].at + self.pieces[-1].bytes
        self.sums_at = group.stages * self.stage_bytes
        multiplying = self.groups * group.group_warps
        walk = self.only_walk()
        assert walk is not None
        self.stays_held = not self.boxed and self.stays(
            walk, found, fragments.ROWS, self.held_columns(), multiplying, self.sums_at)
        rest = 2 * group.stages * SIGNAL_BYTES + self.counters_bytes() + self.records_bytes()
        most_bytes = (group.near_bytes - self.sums_at - rest) // multiplying
        self.piece_columns = self.held_columns()
        for store in self.boxed:
            self.fit_pieces(store, self.held_columns(), most_bytes)
        while self._sums_bytes() > most_bytes:
            self.piece_columns //= 2
        self.full_at = self.sums_at + multiplying * self._sums_bytes()
        self.free_at = self.full_at + group.stages * SIGNAL_BYTES
        self.counters_at = self.free_at + group.stages * SIGNAL_BYTES
        self.near_bytes_used = self.counters_at + self.counters_bytes()
        self.name_stages([(piece.op, piece.at, piece.bytes) for piece in self.pieces], group.stages, self.stage_bytes)
        self.name_buffers([("sums", self.sums_at, self.full_at - self.sums_at)])
        self.name_signals()
        return group

    def name_signals(self) -> None:
        self.name_buffers([("full", self.full_at, self.free_at - self.full_at),
                           ("free", self.free_at, self.counters_at - self.free_at),
                           ("counters", self.counters_at, self.near_bytes_used - self.counters_at)])

    def counters_bytes(self) -> int:
        """Of near memory, for counters and what else tiles leave each other."""
        return self.warps * COUNTER_BYTES

    def held_columns(self) -> int:
        """Of the sums of 16 rows that a warp has in registers at once, for each contraction."""
        return self.columns

    def _sums_bytes(self) -> int:
        """Near memory of a warp for a piece of the sums of all contractions."""
        for store in self.boxed:
            return self.pieces_bytes(store)
        if self.stays_held:
            return 0
        return PIECE_ROWS * self.sum_row_bytes(self.piece_columns) * (len(self.pieces) - 1)

    def _operand(self, op: Op, outer: str, depth_axis: str, extent: int, at: int) -> Operand:
        t = op.operands[0].type
        assert isinstance(t, TensorType)
        forms = self._forms(op)
        along_depth = depth_axis in forms[-1].axes
        sizes = {outer: extent // self.copied_parts(outer) if along_depth else PANEL, depth_axis: self.deep}
        return Operand(op, outer, extent, self.deep, at, self._map(op, sizes), along_depth, t.dtype.size_bytes)

    def _start_signals(self, group: MatrixGroup, multiplying: int) -> None:
        for stage in range(group.stages):
            for at, arrivals in ((self.full_at, 1), (self.free_at, multiplying * self.cluster)):
                self.effect("signal_start", [self.near()], arrivals=arrivals, disp=at + stage * SIGNAL_BYTES)
        self.effect("signal_fence", [])

    def budgets(self, group: MatrixGroup) -> tuple[int, int]:
        """Registers of a thread that multiplies, and of one that copies; 0 where all have enough at the start."""
        if self.groups == 1:
            return 0, 0
        threads, copying = self.groups * group.group_warps * self.lanes, group.copy_warps * self.lanes
        every = threads + copying        # each begins with as many, and no more than these can be moved
        begun = group.registers // every // REGISTER_GRANULE * REGISTER_GRANULE * every
        rest = begun - copying * group.copy_registers
        return rest // threads // REGISTER_GRANULE * REGISTER_GRANULE, group.copy_registers

    # The walk.

    def _tile(self, walk: Walk, found: MatrixWalk, unit: MatrixUnit, row: Value, column: Value) -> None:
        group = self.facts.matrix_group
        if not self.groups:
            super()._tile(walk, found, unit, row, column)
            return
        assert group is not None
        warp = self.warp() if self.only_warp is None else self.only_warp
        own = self.add(self.near(), self.add(self.counters_at, self.mul(warp, COUNTER_BYTES)))
        counter = self.emit(self.depth, "s_load", [self.value(own)], S64, dtype=i32, near=True)
        starts = {found.rows: row, found.columns: column}
        sums: list[Value] = []
        if self.multiplies:
            counter, sums = self._multiply_tile(group, found, counter, starts)
        else:
            counter = self._copy_tile(group, found, counter, starts)
        self.effect("s_store", [counter, self.value(own)], dtype=i32, near=True)
        if self.multiplies:
            mine = self.mul(self.warp(), group.group_rows // group.group_warps)
            self.finish_segment(found, sums, row, column, lambda sums, row, column: self.store_sums(
                walk, found, sums, self.value(self.add(row, mine)), column))

    def piece_depth(self) -> int:
        return self.deep if self.groups else super().piece_depth()

    def _stage_of(self, group: MatrixGroup, counter: Scalar) -> Scalar:
        return self.scalar("s_and", counter, group.stages - 1)

    def _parity_of(self, group: MatrixGroup, counter: Scalar) -> Scalar:
        return self.scalar("s_and", self.scalar("s_floordiv", counter, group.stages), 1)

    def _signal(self, stage: Scalar) -> Value:
        return self.value(self.add(self.near(), self.mul(stage, SIGNAL_BYTES)))

    def _depth_loop(self, found: MatrixWalk, carried: list[Value],
                    body: Callable[[Value, list[Value]], list[Value]]) -> list[Value]:
        deep = self.open[found.depth]
        first, last = self.value(deep.offset), self.value(self.add(deep.offset, deep.extent))
        block = Block([S64, *[v.type for v in carried]])
        self.enter(block)
        self.effect("yield", body(block.arguments[0], list(block.arguments[1:])))
        self.leave()
        loop = Op("loop", [first, last, *carried], [v.type for v in carried],
                  {"step": self.deep, "label": found.depth}, [block], self.location)
        self.finish(loop)
        return list(loop.results)

    def _copy_tile(self, group: MatrixGroup, found: MatrixWalk, counter: Value, starts: dict[str, Value]) -> Value:
        def body(here: Value, carried: list[Value]) -> list[Value]:
            (counter,) = carried
            following = self.add(counter, 1)
            stage = self._stage_of(group, counter)
            signal = self._signal(stage)
            target = self.value(self.add(self.near(), self.mul(stage, self.stage_bytes)))
            parity = self.scalar("s_xor", self._parity_of(group, following if self.frees_late else counter), 1)
            self.effect("signal_wait", [signal, self.value(parity)], disp=self.free_at, **self.of_cluster(self.cluster))
            self.effect("signal_expect", [signal], disp=self.full_at, bytes=self.stage_bytes)
            for operand in self.pieces:
                self.copy_operand(operand, target, signal, {**starts, found.depth: here}, self.full_at)
            return [self.value(following)]

        return self._depth_loop(found, [counter], body)[0]

    def _multiply_tile(self, group: MatrixGroup, found: MatrixWalk, counter: Value,
                       starts: dict[str, Value]) -> tuple[Value, list[Value]]:
        left, *right = self.pieces
        mine = left.outer_bytes(self.mul(self.scalar("s_floordiv", self.warp(), group.group_warps), group.group_rows),
                                self)
        wide = min(self.columns, group.narrow_columns) if self.narrow else self.columns
        sides = range(0, self.columns, wide)    # parts that are summed anew, which needs registers beside the totals
        each = group.group_rows * wide // (group.group_warps * self.lanes)
        dtype = left.op.operands[0].type.dtype  # type: ignore[union-attr]

        def body(here: Value, carried: list[Value]) -> list[Value]:
            counter, *sums = carried
            scales = self.scales(found, {**starts, found.depth: here}, group, sides)     # on their way meanwhile
            stage = self._stage_of(group, counter)
            self.effect("signal_wait", [self._signal(stage), self.value(self._parity_of(group, counter))],
                        disp=self.full_at)
            source = self.add(self.near(), self.mul(stage, self.stage_bytes))
            rows = self.value(self.add(source, mine))
            free: list[Value] = []
            for part, side in enumerate(sides):
                self.effect("group_fence", [])
                for depth in range(0, self.deep, fragments.GROUP_DEPTH_BYTES // left.size):
                    for number, piece in enumerate(right):
                        place = slice((number + part) * each, (number + part + 1) * each)
                        if depth == 0:
                            totals = sums[place]
                            sums[place] = free or totals
                        made = Op("group_multiply", [rows, self.value(source), *sums[place]], [ROW_F32] * each, {
                            "dtype": dtype, "left_rows": left.along_depth, "right_rows": piece.along_depth,
                            "left_disp": left.at + left.depth_bytes(depth),
                            "right_disp": piece.at + piece.depth_bytes(depth) + side * ROW_BYTES,
                            "left_panel_bytes": left.panel_bytes, "right_panel_bytes": piece.panel_bytes,
                            "fresh": self.narrow and depth == 0,
                        }, None, self.location)
                        self.finish(made)
                        sums[place] = made.results
                self.effect("group_commit", [])
                if self.narrow:
                    free = self._all_done(sums[place])
                    sums[place] = self.add_block(free, scales[part], totals)
            if not self.narrow:
                self.effect("group_wait", [], pending=1)
            before = self._stage_of(group, self.sub(counter, 1))
            self.effect("signal_arrive", [self._signal(before)], disp=self.free_at, **self.of_cluster(self.cluster))
            return [self.value(self.add(counter, 1)), *sums]

        zeros = [self.constant(0.0, f32)] * (each * len(right) * len(sides))
        counter, *sums = self._depth_loop(found, [counter, *zeros], body)
        return counter, sums if self.narrow else self._all_done(sums)

    def _all_done(self, sums: list[Value]) -> list[Value]:
        done = Op("group_wait", sums, [ROW_F32] * len(sums), {"pending": 0}, None, self.location)
        self.finish(done)
        return list(done.results)

    def scales(self, found: MatrixWalk, at: dict[str, Value], group: MatrixGroup,
                sides: range) -> list[list[Value | None]]:
        """By what the sums of one block of the depth are multiplied, for each part of the columns: those of a lane's
        upper rows, and of its lower."""
        none: list[Value | None] = [None, None]
        if not self.narrow:
            return [none for _ in sides]
        (left, right), = found.scales
        of_rows = none if left is None else self._scale_rows(left, found.rows, found.depth, at, group)
        columns, made = self.open[found.columns], []
        for side in sides:
            if right is None:
                made.append([*of_rows])
                continue
            start: Scalar = at[found.columns]
            if side:        # there may be no column so far, and no scale of its block
                last = self.sub(self.add(columns.offset, columns.extent), 1)
                start = self.scalar("s_min", self.add(start, side), last)
            of_columns = self._scale_rows(right, found.columns, found.depth, {**at, found.columns: self.value(start)},
                                          group)
            made.append([value if by is None else self.emit(self.depth, "mul", [by, value], ROW_F32)
                         for by, value in zip(of_rows, of_columns, strict=True)])
        return made

    def add_block(self, sums: list[Value], scales: list[Value | None], totals: list[Value]) -> list[Value]:
        """The sums of one block of the depth, times its scales, to the totals, in f32: the instruction keeps fewer bits
        of a sum of such elements than f32 has, so that none runs over more than a block (DeepSeek-V3 Technical Report,
        section 3.3.2: about 14 bits; promotion every 128)."""
        made = []
        for number, (value, total) in enumerate(zip(sums, totals, strict=True)):
            by = scales[number % 4 // 2]
            made.append(self.emit(self.depth, "add", [total, value], ROW_F32) if by is None else
                        self.emit(self.depth, "fma", [value, by, total], ROW_F32))
        return made

    def _scale_rows(self, scale: Op, outer: str, depth: str, at: dict[str, Value], group: MatrixGroup) -> list[Value]:
        """The scales of the rows that a lane holds: lane div 4, and 8 below."""
        tensor = scale.operands[0]
        base: Scalar = self.slot(f"{tensor.name}.data")
        mine: Scalar = 0
        indices = self._scale_indices(scale, outer, depth, 1)
        assert indices is not None
        for (axis, shared), stride in zip(indices, self.strides(tensor), strict=True):
            step = self.mul(stride, f32.size_bytes)
            if axis is None:
                base = self.add(base, self.mul(self.integer(shared), step))  # type: ignore[arg-type]
            elif axis == outer and shared == 1:
                mine = step
            else:
                block = self.scalar("s_floordiv", self.place_of_block(axis, at[axis]), shared)
                base = self.add(base, self.mul(block, step))
        if isinstance(mine, int) and mine == 0:
            return [self.emit(self.depth, "load_splat", [self.value(base)], ROW_F32, dtype=f32)] * 2
        start = self.add(at[outer], self.mul(self.warp(), group.group_rows // group.group_warps))
        rest = self.sub(self.add(self.open[outer].offset, self.open[outer].extent), start)
        base = self.value(self.add(base, self.mul(start, mine)))
        row = self.bits(0, "shr", self.iota(), 2)
        made = []
        for below in (0, 8):
            here = self.emit(0, "add", [row, self.constant(below, i32)], ROW_I32)
            mask = self.emit(self.depth, "cmp", [here, self.row_of(rest)], MASK, cond="lt")
            offsets = self.emit(self.depth_of(mine), "mul", [here, self.row_of(mine)], ROW_I32)
            made.append(self.emit(self.depth, "gather", [base, offsets, mask], ROW_F32, dtype=f32, scale=1,
                                  masked=True))
        return made

    def store_sums(self, walk: Walk, found: MatrixWalk, sums: list[Value], start: Value, column: Value) -> None:
        """Each warp its own 16 rows from `start` on, some columns after the others."""
        for store in self.boxed:
            self._store_boxed_walk(store, walk, found, sums, start, column)
            return
        rows, columns = self.open[found.rows], self.open[found.columns]
        row_end, column_end = self.add(rows.offset, rows.extent), self.add(columns.offset, columns.extent)
        warp_rows, wide = fragments.ROWS, self.held_columns()
        if self.stays_held:
            each = len(sums) // len(found.right)
            whole = [[Sum(sums[number * each + at], at % 4 // 2 * 8, at // 4 * fragments.COLUMNS + at % 2)
                      for at in range(each)] for number in range(len(found.right))]
            self.store_held(walk, found, whole, (start, warp_rows, row_end), (column, wide, column_end))
            return
        place = self.add(self.near(), self.add(self.sums_at, self.mul(self.warp(), self._sums_bytes())))
        each, held = len(sums) // len(found.right), self.piece_columns // 2
        for top in range(0, warp_rows, PIECE_ROWS):
            for side in range(0, wide, self.piece_columns):
                placed = [[Sum(sums[number * each + side // 2 + at], 0, at // 4 * fragments.COLUMNS + at % 2)
                           for at in range(held) if at % 4 // 2 == top // PIECE_ROWS]
                          for number in range(len(found.right))]
                self._finish_tile(walk, found, placed, (self.add(start, top), PIECE_ROWS, row_end),
                                  (self.add(column, side), self.piece_columns, column_end), place)
