"""Contractions inside a loop that carries what it contracts, on matrix instructions: attention.

Enters a block of rows (`Chain`) whose sequential loop contracts 16-bit elements, reduces, and carries sums of its rows;
leaves lane IR in which all of that stays in registers. Every warp of a worker takes rows of its own; the operands that
all of them read, pieces of `step` coordinates of the loop's axis, are copied to near memory some stages ahead.

Axes are spread over lanes and registers as the sums are (spread.py): elementwise ops need nothing new, a reduction
along a row ends with two exchanges between lanes, and two neighbours of the sums of one contraction, packed, are a
register of the next one's left operand.

    near memory   stage 0 (a piece of each streamed operand), stage 1, ...

A piece lies as panels of 64 elements of its contiguous axis; a panel as rows of 128 bytes, the chunk c of 16 bytes of
row r at c ^ (r mod 8), as in matrix.py.

The loop comes twice. The first runs over whole pieces, as far as conditions that compare the rows' axis with the loop's
(the causal mask) hold for all of the block's rows: they are not computed there. The second takes the rest, with masks.
Rows past the edge repeat the last one and are not stored; pieces past it are zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..ir.nodes import Block, Op, Value
from ..ir.types import (
    MASK,
    ROW_B32,
    ROW_F32,
    ROW_I32,
    S64,
    DType,
    RowType,
    TileType,
    f32,
    i32,
)
from ..tile.affine import Affine, affine
from ..tile.schedule import MatrixUnit
from ..tile.sums import is_join
from . import fragments
from .pieces import CHUNK_BYTES, CHUNK_ELEMENTS, ELEMENT_BYTES
from .state import Bound, Capacity, Scalar, row_dtype
from .sums_memory import SumsMemoryLowering

PANEL_CHUNKS = fragments.ROW_BYTES // CHUNK_BYTES
NARROW = ("bf16", "f16")
MOST_EXTENT = 256
FEW_ROWS, FEWEST_WARPS = 32, 2
"""Rows for which a worker of few warps is made, and how few: one warp by itself has no near memory of its own."""
ELEMENTWISE_BANNED = frozenset({"topk", "scan", "view", "buffer", "part", "asm"})
NEUTRAL: dict[str, float] = {"sum": 0.0, "max": float("-inf"), "min": float("inf")}
COMBINE = {"sum": "add", "max": "max", "min": "min"}


@dataclass(frozen=True, slots=True)
class Contraction:
    """left: what is contracted, of the rows' axis and `over`; right: the load of the other operand."""

    left: Value
    right: Op
    over: str
    columns: str


@dataclass(frozen=True, slots=True)
class Chain:
    """rows, step: axes of the block and of its loop. body: the block. loop: the op in it. contractions: by op.
    streams: the loads that are copied to near memory. below: conditions `rows' axis - step's axis + form >= 0`, by
    value, with that form."""

    rows: str
    step: str
    body: Block
    loop: Op
    contractions: dict[Op, Contraction]
    streams: tuple[Op, ...]
    below: dict[Value, Affine]


class Stream:
    """A streamed operand's piece in near memory: `step` rows of its contiguous axis. at: its first byte in a stage.
    A contraction over the contiguous axis reads it along the depth, one over the step's axis turns it."""

    def __init__(self, low: ChainLowering, op: Op, at: int) -> None:
        self.low, self.op, self.at = low, op, at
        chain = low.chain
        assert chain is not None
        self.access = low.access(op)
        (self.across,) = [a for a in op.result.type.axes if a != chain.step]  # type: ignore[union-attr]
        self.sources: dict[bool, Value] = {}
        self.chunks = low.extents[self.across] // CHUNK_ELEMENTS
        self.panel_bytes = low.step * fragments.ROW_BYTES
        self.bytes = -(-self.chunks // PANEL_CHUNKS) * self.panel_bytes
        self.stride = self.access.axes[chain.step]

    def prepare(self, start: Scalar) -> None:
        """Where each lane copies from and to: 8 chunks of a row, and all warps some rows. start: of the step's axis."""
        low = self.low
        threads = low.warps * low.lanes
        thread = low.thread()
        self.row = low.bits(0, "shr", thread, 3)
        self.chunk = low.bits(0, "and", thread, PANEL_CHUNKS - 1)
        self.rows_of_pass = threads // PANEL_CHUNKS
        self.target = low.swizzled(self.row, self.chunk, fragments.ROW_BYTES)
        step = low.row_of(self.stride)
        far = low.emit(low.depth_of(self.stride), "mul", [self.row, step], ROW_I32)
        self.offsets = low.emit(low.depth_of(self.stride), "add", [far, low.bits(0, "shl", self.chunk, 4)], ROW_I32)
        self.base = low.add(low.add(self.access.base, self.access.disp), low.mul(start, self.stride))
        self.next = low.mul(self.stride, low.step)

    def copy(self, stage: Value, start: Scalar, rest: Scalar) -> None:
        """The piece that lies from address `start` on, to a stage. rest: how many of its rows there are."""
        low = self.low
        for passed in range(0, low.step, self.rows_of_pass):
            inside = low.rows_inside(self.row, rest, passed)
            here = low.value(low.add(start, low.mul(self.stride, passed)))
            for panel, first in enumerate(range(0, self.chunks, PANEL_CHUNKS)):
                mask = inside
                if self.chunks - first < PANEL_CHUNKS:
                    few = low.emit(0, "cmp", [self.chunk, low.constant(self.chunks - first, i32)], MASK, cond="lt")
                    mask = low.emit(low.depth, "mask_and", [inside, few], MASK)
                with low.located(self.op):
                    low.effect("async_copy", [stage, self.target, here, self.offsets, mask], masked=True,
                               source_disp=first * CHUNK_BYTES,
                               disp=self.at + panel * self.panel_bytes + passed * fragments.ROW_BYTES)

    def place(self, along_depth: bool) -> None:
        """Where the row of each lane lies that load_matrix takes: see Piece.place."""
        low = self.low
        lane = low.iota()
        inside = low.bits(0, "and", lane, 7)
        depth_half = low.bits(0, "and", low.bits(0, "shr", lane, 3), 1)
        outer_half = low.bits(0, "shr", lane, 4)
        row_half, chunk = (outer_half, depth_half) if along_depth else (depth_half, outer_half)
        row = low.emit(0, "add", [low.bits(0, "shl", row_half, 3), inside], ROW_I32)
        self.sources[along_depth] = low.swizzled(row, chunk, fragments.ROW_BYTES)

    def fragments(self, stage: Value, outer: int, depth: int, along_depth: bool) -> list[Value]:
        """The four registers of 16 x 16 elements from an outer coordinate and a depth on."""
        low = self.low
        across, down = (depth, outer) if along_depth else (outer, depth)
        panel, flip = divmod(across * ELEMENT_BYTES, fragments.ROW_BYTES)
        # Moving within a row turns bits of the chunk's number that are 0 in every lane before the swizzle.
        made = Op("load_matrix", [stage, self.sources[along_depth]], [ROW_B32] * 4,
                  {"transposed": not along_depth, "flip": flip,
                   "disp": self.at + panel * self.panel_bytes + down * fragments.ROW_BYTES}, None, low.location)
        low.finish(made)
        return list(made.results)


class ChainLowering(SumsMemoryLowering):
    """Finds chains and emits them. step: coordinates of the loop's axis in a piece. row_blocks: of 16 rows that a warp
    has. extents: of the whole axes. assumed: conditions that hold in the loop at hand."""

    chain: Chain | None = None
    assumed: frozenset[Value] = frozenset()
    step = 0
    row_blocks = 0

    def find_matrix_walk(self) -> None:
        super().find_matrix_walk()
        unit = self.facts.matrix
        if unit is None or self.matrix_walk is not None or self.schedule.registers or any(
                map(is_join, self.function.walk())):
            return
        self.extents: dict[str, int] = {}
        body = self._only_rows()
        self.chain = _match(self, *body, unit) if body is not None else None
        shape = self._chain_shape(unit, self.chain) if self.chain is not None else None
        if shape is None:
            self.chain = None
        else:
            self.step, self.warps, self.row_blocks = shape
            self.few_registers = self.row_blocks > 1

    def _only_rows(self) -> tuple[str, Block] | None:
        """The axis and the block of a nest of loops that does nothing but go through blocks of rows."""
        block = self.function.body
        while True:
            if any(op.name in ("store", "reduce", "contract", *ELEMENTWISE_BANNED) for op in block.ops):
                return None
            control = [op for op in block.ops if op.blocks]
            if len(control) != 1 or control[0].results or control[0].name not in ("tiles", "each"):
                return None
            (loop,) = control
            block = loop.blocks[0]
            if loop.name == "tiles" and any(op.blocks for op in block.ops if op.results):
                axes: list[str] = loop.attributes["axes"]
                return (axes[0], block) if len(axes) == 1 and loop.attributes["parallel"] else None

    def _chain_shape(self, unit: MatrixUnit, chain: Chain) -> tuple[int, int, int] | None:
        """Coordinates of a piece, warps, blocks of 16 rows of each: as many as the registers hold; None: not one."""
        if max(self.extents.values(), default=0) > MOST_EXTENT:
            return None
        each = self._chain_registers(chain, unit.chain_step, 1)
        blocks = 2 if 2 * each <= unit.chain_registers else 1
        rows = self.chain_extent(chain)
        if rows <= FEW_ROWS:        # heads that share a cache: warps without rows of their own copy it, too
            return unit.chain_step, max(FEWEST_WARPS, -(-rows // fragments.ROWS)), 1
        return unit.chain_step, unit.chain_rows // (fragments.ROWS * blocks), blocks

    def chain_extent(self, chain: Chain) -> int:
        """Typical number of the block's rows, no more than there are at most."""
        (loop,) = (op for op in self.function.walk() if op.name == "tiles" and op.attributes["axes"] == [chain.rows])
        most = self.most_from(*loop.operands[:2])
        hint = self._extent_of(chain.rows, False)
        return hint if most is None or most.dims else min(hint, most.constant)

    def most_from(self, start: Value, stop: Value) -> Capacity | None:
        raise NotImplementedError("control knows the extents")

    def _chain_registers(self, chain: Chain, step: int, slices: int) -> int:
        """What sums and left operands of 16 rows take of a thread, where the longest axis is cut into slices."""
        longest = max(self.extents.values())
        held = {axis: extent // (slices if extent == longest else 1) for axis, extent in self.extents.items()}
        held[chain.step] = step
        return sum(held[found.columns] // 2 + (0 if chain.step in _axes(found.left) else held[found.over] // 4)
                   for found in chain.contractions.values())

    def is_streamable(self, load: Op, step: str) -> bool:
        """Whether rows of a tensor along another axis than the step's can be copied in 16-byte pieces."""
        last = affine(load.operands[-1])
        return self._outer_axis(load, step, NARROW) is not None and last is not None and step not in last.axes

    @property
    def tiles_are_tasks(self) -> bool:
        return super().tiles_are_tasks or (self.chain is not None and not self.schedule.chunks)

    def chain_rows(self) -> int:
        return self.warps * self.row_blocks * fragments.ROWS

    def begin_block(self, block: Block) -> None:
        raise NotImplementedError("control knows the blocks")

    # Rows of numbers.

    def rows_inside(self, row: Value, rest: Scalar, passed: int) -> Value:
        """Which lanes' rows, `passed` further, are among `rest` rows; made once for all pieces."""
        memo = self.levels[-1].memo
        key = ("inside", row, rest, passed)
        if key not in memo:
            memo[key] = self.emit(self.depth, "cmp", [row, self.row_of(self.sub(rest, passed))], MASK, cond="lt")
        found: Value = memo[key]
        return found

    # The block.

    def chained(self, block: Block) -> None:
        """Emit the block for all of its open rows."""
        chain, unit = self.chain, self.facts.matrix
        assert chain is not None and unit is not None
        o = self.open[chain.rows]
        stop = self.add(o.offset, o.extent)
        self._count(o, self.chain_rows(), lambda start: self._chain_tile(chain, unit, block, start, stop))

    def _chain_tile(self, chain: Chain, unit: MatrixUnit, block: Block, start: Value, stop: Scalar) -> None:
        self.begin_block(block)
        loop = chain.loop
        self._settle_homes(loop.blocks[0])
        mine = self.add(start, self.mul(self.row_group(), self.row_blocks * fragments.ROWS))
        rows = self.down(mine, 2 * self.row_blocks, self.row_of(self.sub(self.sub(stop, 1), mine)))
        outer_rows = self.bound.get(chain.rows)
        self.bound[chain.rows] = Bound(mine, len(rows.numbers), False, None, self.depth, spread=rows)
        for axis in self.extents:
            first, extent = self.part_of(axis)
            self.bound[axis] = Bound(first, extent // 4, False, None, 0, spread=self.along(first, extent))
        self._chain_loop(chain, unit, start)
        for op in block.ops:
            if op.name == "store":
                self._store_spread(op)
        for axis in (chain.rows, chain.step, *self.extents):
            del self.bound[axis]
        if outer_rows is not None:
            self.bound[chain.rows] = outer_rows

    def row_group(self) -> Scalar:
        """Which 16 rows, or several times as many, are this warp's."""
        return self.warp()

    def part_of(self, axis: str) -> tuple[Scalar, int]:
        """Which part of a whole axis is this warp's: where it begins, and its extent."""
        return 0, self.extents[axis]

    def _settle_homes(self, body: Block) -> None:
        """What the loop does not change is at home outside of it: its loads, too, as it stores nothing."""
        assert self.chain is not None
        changing: set[Value] = set(body.arguments)
        for op in body.ops:
            if any(v in changing for v in op.operands) or (
                    op.name == "index" and op.attributes["axis"] == self.chain.step):
                changing.update(op.results)
            else:
                self.inside_invariant.update(op.results)

    @property
    def inside_invariant(self) -> set[Value]:
        memo = self.levels[-1].memo
        found: set[Value] = memo.setdefault("invariant", set())
        return found

    def _chain_loop(self, chain: Chain, unit: MatrixUnit, row: Value) -> None:
        loop = chain.loop
        body = loop.blocks[0]
        self._settle_streams(chain)
        start, stop = (self.integer(v) for v in loop.operands[:2])
        streams, at = [], 0
        for op in chain.streams:
            streams.append(Stream(self, op, at))
            at += streams[-1].bytes
        stage_bytes, end = at, self.add(self.near(), unit.chain_stages * at)
        self.sums_at = unit.chain_stages * stage_bytes
        self.near_bytes_used = max(self.near_bytes_used, self.sums_at + self.shared_sums_bytes())
        self.name_stages([(stream.op, stream.at, stream.bytes) for stream in streams], unit.chain_stages, stage_bytes)
        self.name_buffers([("sums", self.sums_at, self.shared_sums_bytes())])
        for stream in streams:
            stream.prepare(start)
        for found in chain.contractions.values():
            next(s for s in streams if s.op is found.right).place(found.over != chain.step)
        self.streamed = {stream.op: stream for stream in streams}
        ahead = unit.chain_stages - 1
        self.effect("sync_warps", [])       # what the last block of rows left in near memory is read
        for number in range(ahead):
            stage = self.value(self.add(self.near(), number * stage_bytes))
            for stream in streams:
                stream.copy(stage, self.add(stream.base, self.mul(stream.next, number)),
                            self.sub(self.sub(stop, start), number * self.step))
            self.effect("async_commit", [])
        points = [self._coordinates(v.type.axes) for v in body.arguments]  # type: ignore[union-attr]
        carried = [self.near(), self.value(self.add(self.near(), ahead * stage_bytes)),
                   *(self.value(self.add(s.base, self.mul(s.next, ahead))) for s in streams),
                   *(self.row(v, at) for v, places in zip(loop.operands[2:], points, strict=True) for at in places)]
        for ragged, (first, last) in enumerate(self._chain_ranges(chain, row)):
            block = Block([S64, *[v.type for v in carried]])
            self.enter(block)
            here, reading, writing = block.arguments[:3]
            addresses = block.arguments[3:3 + len(streams)]
            self.effect("async_wait", [], pending=unit.chain_stages - 2)
            self.effect("sync_warps", [])
            rest = self.sub(self.sub(stop, ahead * self.step), here)
            for stream, address in zip(streams, addresses, strict=True):
                stream.copy(writing, address, rest)
            self.effect("async_commit", [])
            self.stage = reading
            self._begin_round(chain, points, block.arguments[3 + len(streams):], here, stop, bool(ragged))
            terminator = body.terminator
            assert terminator is not None
            results = [self.row(v, at) for v, places in zip(terminator.operands, points, strict=True) for at in places]
            self.effect("yield", [self._next(reading, stage_bytes, end), self._next(writing, stage_bytes, end),
                                  *(self.value(self.add(a, s.next)) for a, s in zip(addresses, streams, strict=True)),
                                  *results])
            self.leave()
            made = Op("loop", [self.value(first), self.value(last), *carried], [v.type for v in carried],
                      {"step": self.step, "label": chain.step}, [block], loop.location)
            self.finish(made)
            carried = list(made.results)
        self.effect("async_wait", [], pending=0)
        self.assumed = frozenset()
        self._take(loop.results, points, iter(carried[2 + len(streams):]))

    sums_at = 0
    """Of near memory, behind the stages."""

    def shared_sums_bytes(self) -> int:
        """Of near memory for sums that several warps have parts of."""
        return 0

    def _settle_streams(self, chain: Chain) -> None:
        """Addresses of what is streamed are computed before the loop. The loop's invariants are at home there."""
        invariant = self.inside_invariant
        for op in chain.streams:
            for value in (op.result, *op.operands[1:]):
                if value in invariant:
                    self.home[value] = self.depth
            self.home[op.result] = self.depth

    def _chain_ranges(self, chain: Chain, row: Value) -> list[tuple[Scalar, Scalar]]:
        """Of the two loops: whole pieces in which all conditions hold, and the rest."""
        start, stop = (self.integer(v) for v in chain.loop.operands[:2])
        extent = self.sub(self.scalar("s_min", stop, self._below(chain, row, stop)), start)
        whole = self.mul(self.scalar("s_floordiv", self.scalar("s_max", extent, 0), self.step), self.step)
        middle = self.add(start, whole)
        return [(start, middle), (middle, stop)]

    def _begin_round(self, chain: Chain, points: list[list[dict[str, int]]], rows: list[Value], here: Value,
                     stop: Scalar, ragged: bool) -> None:
        """The carried values, and the piece at `here`. ragged: with masks."""
        body = chain.loop.blocks[0]
        outer = self.depth - 1
        invariant = self.levels[outer].memo.get("invariant", set())
        self.begin_block(body)
        for value in invariant:
            self.home[value] = outer
        self._take(body.arguments, points, iter(rows))
        spread = self.along(here, self.step)
        if ragged:
            spread.valid = self.inside(spread, self.sub(stop, here))
        self.bound[chain.step] = Bound(here, self.step // 4, False, None, self.depth, spread=spread)
        self.assumed = frozenset() if ragged else frozenset(chain.below)

    def _take(self, values: list[Value], points: list[list[dict[str, int]]], rows: Iterator[Value]) -> None:
        for value, places in zip(values, points, strict=True):
            self.home[value] = self.depth
            self.rows[value] = {tuple(at[a] for a in value.type.axes): next(rows)  # type: ignore[union-attr]
                                for at in places}

    def _below(self, chain: Chain, row: Value, stop: Scalar) -> Scalar:
        """Up to where the loop's axis fulfils the conditions for all rows from `row` on."""
        least: Scalar = stop
        for form in chain.below.values():
            limit: Scalar = self.add(row, form.constant + 1)
            for scalar, factor in form.scalars.items():
                limit = self.add(limit, self.mul(self.integer(scalar), factor))
            least = self.scalar("s_min", least, limit)
        return least

    # Values.

    def _compute(self, value: Value, at: dict[str, int], level: int) -> Value:
        chain, op = self.chain, value.op
        if chain is None or op is None:
            return super()._compute(value, at, level)
        if op.name == "select" and op.operands[0] in self.assumed:
            return self.row(op.operands[1], at)
        if op in chain.contractions:
            self._contract(op, value, None)
            return self.rows[value][tuple(at[a] for a in value.type.axes)]  # type: ignore[union-attr]
        if op.name == "add":
            for product, start in (op.operands, reversed(op.operands)):
                if product.op in chain.contractions and product not in self.rows and self._used_once(product) \
                        and not self.is_parted(product.op) and _axes(product) == _axes(value) == _axes(start):
                    assert product.op is not None
                    self._contract(product.op, value, start)
                    return self.rows[value][tuple(at[a] for a in value.type.axes)]  # type: ignore[union-attr]
        if op.name == "reduce":
            return self._reduce_spread(op, at, level)
        return super()._compute(value, at, level)

    def is_parted(self, contraction: Op) -> bool:
        """Whether each warp contracts only a part of the depth: such sums begin with nothing."""
        return False

    def whole_sums(self, found: Contraction, sums: dict[tuple[int, ...], Value]) -> dict[tuple[int, ...], Value]:
        """The sums of a contraction, of this warp's part of the depth, as those of all of it."""
        return sums

    def piece_start(self, stream: Stream) -> Value:
        """What this warp reads of a stage of near memory, but for the stream's own place in it, begins there."""
        return self.stage

    def _used_once(self, value: Value) -> bool:
        assert self.chain is not None
        return sum(v is value for op in self.chain.loop.blocks[0].ops for v in op.operands) == 1

    def _reduce_spread(self, op: Op, at: dict[str, int], level: int) -> Value:
        (axis,) = op.attributes["over"]
        kind = op.attributes["kind"]
        bound = self.bound[axis]
        assert bound.spread is not None
        result = RowType(row_dtype(op.result.type.dtype))  # type: ignore[union-attr]
        neutral = self.constant(NEUTRAL[kind], result.dtype)
        total = neutral
        for j in range(bound.count):
            row = self.row(op.operands[0], {**at, axis: j})
            mask = bound.spread.mask(j)
            if mask is not None:
                row = self.emit(level, "select", [mask, row, neutral], result)
            total = row if kind == "sum" and not j else self.emit(level, COMBINE[kind], [row, total], result)
        for distance in (1, 2):
            other = self.emit(level, "shuffle_xor", [total], result, distance=distance)
            total = self.emit(level, COMBINE[kind], [other, total], result)
        return total

    def _contract(self, op: Op, into: Value, start: Value | None) -> None:
        """Emit a contraction, whose sums begin with those of `start`, and are rows of `into`."""
        chain = self.chain
        assert chain is not None
        found = chain.contractions[op]
        stream = self.streamed[found.right]
        columns = self.bound[found.columns].count
        dtype = found.right.operands[0].type.dtype  # type: ignore[union-attr]

        def key(row: int, column: int) -> tuple[int, ...]:
            return self._key(into, found, row, column)

        zero = self.constant(0.0, row_dtype(into.type.dtype))  # type: ignore[union-attr]
        sums = {key(row, column): zero if start is None else self.row(start, {chain.rows: row, found.columns: column})
                for row in range(2 * self.row_blocks) for column in range(columns)}
        piece = self.piece_start(stream)
        for depth in range(0, self.bound[found.over].count, 4):
            left = [self._left(found, block, depth) for block in range(self.row_blocks)]
            for pair in range(0, columns, 4):
                right = stream.fragments(piece, pair * 4, depth * 4, found.over != chain.step)
                for block in range(self.row_blocks):
                    for half in range(2):
                        keys = [key(2 * block + r // 2, pair + 2 * half + r % 2) for r in range(4)]
                        made = Op("matrix_multiply", [*left[block], *right[2 * half:2 * half + 2],
                                                      *(sums[k] for k in keys)], [ROW_F32] * 4, {"dtype": dtype}, None,
                                  op.location)
                        self.finish(made)
                        sums.update(zip(keys, made.results, strict=True))
        self.rows[into] = self.whole_sums(found, sums)

    def _key(self, value: Value, found: Contraction, row: int, column: int) -> tuple[int, ...]:
        """Of a register of sums: as `rows` has it."""
        assert self.chain is not None
        at = {self.chain.rows: row, found.columns: column}
        return tuple(at[a] for a in _axes(value))

    def _left(self, found: Contraction, block: int, depth: int) -> list[Value]:
        """The four registers of the left operand: 16 rows, 16 of its depth from register `depth` on."""
        assert self.chain is not None
        value = found.left
        level = self.level_of(value)
        memo = self.levels[level].memo
        key = ("left", value, block, depth)
        if key not in memo:
            memo[key] = [self.pair(value, {self.chain.rows: 2 * block + r % 2, found.over: depth + r // 2 * 2},
                                    found.over, level) for r in range(4)]
        made: list[Value] = memo[key]
        return made

    # Memory.

    def _store_spread(self, op: Op) -> None:
        """Rows of sums by the cheapest way, all else element by element."""
        chain = self.chain
        assert chain is not None
        value = op.operands[1]
        axes = _axes(value)
        along = self.axis_along(op)
        if along is not None and along != chain.rows and set(axes) == {chain.rows, along}:
            self.store_spread(op, chain.rows, along, masked=lambda mask: self.mask_of_parts(mask, axes))
            return
        access = self.access(op)
        spread = self.bound[chain.rows].spread
        assert spread is not None
        for at in self._coordinates(axes):
            base, offsets, disp = self.spread_address(access, at)
            mask = spread.mask(at[chain.rows]) if chain.rows in axes else None
            if not any(self.bound[a].spread for a in axes if a != chain.rows):
                mask = self._first_of_four(mask)
            mask = self.mask_of_parts(mask, axes)
            tail = [] if mask is None else [mask]
            self.effect("scatter", [self.row(value, at), base, offsets, *tail], dtype=access.dtype, scale=1,
                        disp=disp, masked=bool(tail), disjoint=True)

    def mask_of_parts(self, mask: Value | None, axes: tuple[str, ...]) -> Value | None:
        """The mask of a store, off where another warp stores the same."""
        return mask

    def _first_of_four(self, mask: Value | None) -> Value:
        """Four lanes hold what has no columns: one of them stores it."""
        first = self.emit(0, "cmp", [self.bits(0, "and", self.iota(), 3), self.constant(0, i32)], MASK, cond="eq")
        return first if mask is None else self.emit(self.depth, "mask_and", [mask, first], MASK)


def _axes(value: Value) -> tuple[str, ...]:
    assert isinstance(value.type, TileType)
    return value.type.axes


def _dtype(value: Value) -> DType:
    assert isinstance(value.type, TileType)
    return value.type.dtype


def _match(low: ChainLowering, rows: str, body: Block, unit: MatrixUnit) -> Chain | None:
    """The chain that a block of rows is, if all in it can be done in registers of the matrix instructions."""
    loops = [op for op in body.ops if op.blocks]
    if len(loops) != 1 or loops[0].name != "tiles" or len(loops[0].attributes["axes"]) != 1 \
            or loops[0].attributes["parallel"]:
        return None
    (loop,) = loops
    (step,) = loop.attributes["axes"]
    inner = loop.blocks[0]
    if inner.terminator is None or any(op.blocks or op.name == "store" for op in inner.ops):
        return None
    for op in (*body.ops, *inner.ops):
        if op.name == "whole":
            bounds = [v.op.attributes["value"] if v.op is not None and v.op.name == "const" else None
                      for v in op.operands]
            if bounds[0] != 0 or not isinstance(bounds[1], int) or bounds[1] % fragments.DEPTH:
                return None
            low.extents[op.attributes["axis"]] = bounds[1]
    contractions: dict[Op, Contraction] = {}
    below: dict[Value, Affine] = {}
    known = {rows, step, *low.extents}
    for op in (*body.ops, *inner.ops):
        if op is loop or op.name in ("whole", "yield"):
            continue
        if op.name in ELEMENTWISE_BANNED or not _is_plain(op, known, rows):
            return None
        if op.name == "contract":
            found = _contraction(low, op, rows, step, unit)
            if found is None or op not in inner.ops:
                return None
            same = next((c.right for c in contractions.values() if _reads_the_same(c.right, found.right)), found.right)
            contractions[op] = replace(found, right=same)
        form = _condition(op, rows, step)
        if form is not None:
            below[op.result] = form
    if not contractions:
        return None
    streams: list[Op] = []
    for contraction in contractions.values():
        if contraction.right not in streams:
            streams.append(contraction.right)
    if any(_is_read_otherwise(s, contractions, inner) for s in streams):
        return None
    return Chain(rows, step, body, loop, contractions, tuple(streams), below)


def _reads_the_same(one: Op, other: Op) -> bool:
    """Whether two loads, with no store between them, read the same elements: those of a piece are then copied once."""
    return one.operands[0] is other.operands[0] and all(
        affine(a) == affine(b) is not None for a, b in zip(one.operands[1:], other.operands[1:], strict=True))


def _is_read_otherwise(load: Op, contractions: dict[Op, Contraction], inner: Block) -> bool:
    """Whether what is streamed has other uses than as a right operand."""
    users = [op for op in inner.ops if load.result in op.operands]
    return any(contractions.get(op) is None or contractions[op].right is not load for op in users)


def _is_plain(op: Op, known: set[str], rows: str) -> bool:
    """Whether an op can be done on registers of sums: elementwise, or a reduction of a row."""
    for value in (*op.operands, *op.results):
        t = value.type
        if isinstance(t, TileType) and (not set(t.axes) <= known or (t.dtype.bits > 32 and t.dtype.name != "index")):
            return False
    if op.name == "reduce":
        return len(op.attributes["over"]) == 1 and op.attributes["over"][0] != rows \
            and op.attributes["kind"] in NEUTRAL and _dtype(op.result) is f32 \
            and op.attributes["over"][0] in _axes(op.operands[0])
    if op.name in ("load", "store"):
        return all(affine(v) is not None for v in op.operands[1 if op.name == "load" else 2:]) \
            and (op.name == "load" or rows in _axes(op.operands[1]))
    return True


def _contraction(low: ChainLowering, op: Op, rows: str, step: str, unit: MatrixUnit) -> Contraction | None:
    (over, *more) = op.attributes["over"]
    if more or over == rows or rows not in _axes(op.result) or len(_axes(op.result)) != 2:
        return None
    (columns,) = [a for a in _axes(op.result) if a != rows]
    for left, right in (op.operands, reversed(op.operands)):
        load = right.op
        if load is None or load.name != "load" or set(_axes(left)) != {rows, over} or step not in _axes(right):
            continue
        if _dtype(left) is not _dtype(right) or _dtype(right).name not in unit.dtypes or step not in (over, columns):
            continue
        if low.is_streamable(load, step):
            return Contraction(left, load, over, columns)
    return None


def _condition(op: Op, rows: str, step: str) -> Affine | None:
    """The form f of a condition `f + row - step >= 0`, without its axes: one that holds for all rows from some on."""
    if op.name not in ("le", "lt", "ge", "gt") or set(_axes(op.result)) != {rows, step}:
        return None
    forms = [affine(v) for v in op.operands]
    low, high = forms if op.name in ("le", "lt") else reversed(forms)
    if low is None or high is None:
        return None
    form = high.plus(low.scaled(-1))
    if form.axes != {rows: 1, step: -1}:
        return None
    return Affine(form.constant - (op.name in ("lt", "gt")), {}, form.scalars)
