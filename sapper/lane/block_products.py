"""Products of bytes in blocks, of which each has scales of its own, on matrix instructions: weights in panels.

Enters a nest of rows, and of columns in panels of 16, whose loop in order goes over blocks of the depth and adds up

    total += (contract(a, w) + contract(b, v) + start).to(f32) * scale

Leaves lane IR in which all sums stay in registers. What is multiplied are whole numbers of 8 bits, which f16 has, too:
their products are exact in the instruction's f32, and so are sums below 2**24 (of 256 products at least), which begin
with the `start` of their row. (Of bytes as they are one instruction would make what two make here; but its sums
are integers, of which each takes a difference, or a conversion, that these do without.)
What the loop does with sums is evaluated where they are, on rows that are spread over lanes and registers as the sums
are (spread.py): scales, minima, sums of groups.

    near memory   stage 0 (rows and columns of each part of a block), stage 1

Each round of the loop multiplies a stage and fills the other one. A lane brings a row, or a column, of a block to
registers, words as they lie in memory; made into elements, by whatever computes them, they are stored behind the
products that are emitted meanwhile. Elements are in the order in which the contractions name them, but that the middle
two of four change places, of rows and columns alike: so two that lie 16 bits apart in a word are neighbours, and are
made together (packed_bits.py).
Holds: results are the same but for roundings, of integers beyond 2**24 too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import gcd, prod

from ..ir.nodes import Block, Op, Value
from ..ir.types import MASK, ROW_B32, ROW_F32, ROW_I32, S64, DType, TileType, b32, f16, f32, i32
from ..tile.ops import memory_of
from ..tile.plan import axes_of
from ..tile.schedule import DimClass, MatrixUnit
from ..tile.sums import is_join
from . import fragments
from .block_nests import PANEL, BlockNest, BlockPart, BlockSum, extents_of, find_nest, number_of
from .byte_words import byte_word
from .chained_sums import ChainSumsLowering
from .matrix import FEWEST
from .pieces import CHUNK_BYTES, CHUNK_ELEMENTS, ELEMENT_BYTES, SWIZZLED_ROWS, Piece
from .places import FREE, Element, Places
from .spread import Spread
from .state import Bound, Scalar

STAGES = 2
MOST_SUMS, MOST_NEAR_BYTES = 64, 160 << 10
"""Registers of a thread for sums, and near memory for stages: with more of either ptxas 13.0 spills in the loop, as for
Q6_K on sm_90a, whose near memory has room for twice the rows."""
ORDER = (0, 2, 1, 3)
"""Of four elements that lie together."""
FEW_OPERATIONS = 2
"""Of an element that is made of a word by itself: what shifts and masks it is part of what makes a float."""
INSTRUCTIONS_TOGETHER = 8
"""Sums that are made at a time: an instruction waits for the one before of its own alone."""
BLOCKS_WAITING = 2
"""Of a loop inside: what comes for the next round waits in registers while so many are multiplied."""

FEWEST_ROWS = 2
"""Typical ones for which a tile is worth its size."""

Item = tuple[int, int]
"""What a warp brings of a piece at once: 32 rows, or columns, from one on, and the place in the loop inside."""


class BlockPiece(Piece):
    """One operand's part of a block: `extent` rows, or columns, each of which lies along the depth. at: its first byte
    in a stage. A warp has 32 of them, one to a lane, or several times 32, all at some places of the inner loop: these
    are a panel, whose rows no other warp writes."""

    low: BlockProducts

    def __init__(self, low: BlockProducts, nest: BlockNest, part: BlockPart, left: bool, extent: int, at: int) -> None:
        self.low, self.nest, self.part, self.left, self.extent, self.at = low, nest, part, left, extent, at
        self.depth, self.size, self.dtype, self.along_depth = part.depth * part.count, ELEMENT_BYTES, f16, True
        self.elements = [element for found in part.sums.values() for element in self._elements(found)]
        blocks = extent // low.lanes
        self.along = min(low.warps, blocks)         # warps that have other rows
        self.beside = low.warps // self.along       # and those that may have other places of the inner loop
        self.shares = gcd(part.count, self.beside)
        self.each = part.count // self.shares
        self.items: list[Item] = [(block, number) for number in range(self.each)
                                  for block in range(0, blocks, self.along)]
        self.panel_depth = self.each * part.depth
        self.row_bytes = self.panel_depth * self.size
        self.panel_bytes = extent * self.row_bytes
        self.bytes = self.depth // self.panel_depth * self.panel_bytes

    def _elements(self, found: BlockSum) -> list[tuple[Value, dict[str, int]] | None]:
        """What a row, or a column, has of a sum along the depth: an operand, and where; None: 0."""
        made: list[tuple[Value, dict[str, int]] | None] = []
        for contraction in found.contractions:
            (operand,) = [v for v in contraction.operands if (self.nest.rows in axes_of(v)) == self.left]
            ats: list[dict[str, int]] = [{}]
            for axis, extent in self.low.contracted(contraction).items():
                ats = [{**at, axis: j} for at in ats for j in range(extent)]
            made += [(operand, at) for at in ats]
        return made + [None] * (found.depth - len(made))

    def prepare(self, start: Scalar, stop: Scalar) -> None:
        """start: of the tile's rows, or panels, stop: where the axis ends."""
        low = self.low
        warp = low.warp()
        mine = low.scalar("s_mod", warp, self.along)
        beside = low.scalar("s_floordiv", warp, self.along)
        share = low.scalar("s_mod", beside, self.shares)
        self.number: Scalar = low.mul(share, self.each)
        row = low.emit(0, "add", [low.row_of(low.mul(mine, low.lanes)), low.iota()], ROW_I32)
        self.target = self.swizzled(row, low.constant(0, i32))
        if self.shares > 1:
            self.target = low.emit(0, "add", [self.target, low.row_of(low.mul(share, self.panel_bytes))], ROW_I32)
        self.mine = None if self.shares == self.beside else low.emit(
            0, "s_cmp", [low.value(beside), low.value(self.shares)], S64, cond="lt")
        self.lanes_of: dict[int, dict[str, Spread]] = {}
        for block, _ in self.items:
            if block in self.lanes_of:
                continue
            lane = low.emit(0, "add", [row, low.constant(block * low.lanes, i32)], ROW_I32) if block else row
            last = low.row_of(low.sub(low.sub(stop, start), 1))
            if self.left:
                self.lanes_of[block] = {self.nest.rows: Spread(start, [low.least(lane, last)], [0])}
                continue
            panel = low.bits(0, "shr", lane, PANEL.bit_length() - 1)
            self.lanes_of[block] = {
                self.nest.columns[0]: Spread(start, [low.least(panel, last)], [0]),
                self.nest.columns[1]: Spread(0, [low.bits(0, "and", low.iota(), PANEL - 1)], [0])}

    def swizzled(self, row: Value, chunk: Value) -> Value:
        """Bytes from the start of a panel to a chunk of a row. Two rows of 64 bytes are as one of 128."""
        low = self.low
        if self.row_bytes >= fragments.ROW_BYTES:
            return low.swizzled(row, chunk, self.row_bytes)
        turn = low.bits(0, "and", low.bits(0, "shr", row, 1), SWIZZLED_ROWS // 2 - 1)
        start = low.bits(0, "shl", row, self.row_bytes.bit_length() - 1)
        turned = low.emit(0, "xor", [chunk, turn], ROW_I32)
        return low.emit(0, "add", [start, low.bits(0, "shl", turned, 4)], ROW_I32)

    def fragments(self, stage: Value, outer: int, depth: int, plane: int = 0) -> list[Value]:
        panel, across = divmod(depth, self.panel_depth)
        return self.fragments_at(stage, panel * self.panel_bytes + outer * self.row_bytes, across)

    def inside(self, known: Value) -> Value:
        """The lanes that have something to bring. known: all, if there is a block."""
        low = self.low
        if self.mine is None:
            return known
        mine = low.emit(0, "cmp", [low.constant(0, i32), low.row_of(self.mine)], MASK, cond="lt")
        return low.all_of(known, mine) or known

    def fetch(self, item: tuple[int, int], round_: Scalar, known: Value) -> dict[Op, list[Element]]:
        """What a part of the piece is computed of, to registers. known: lanes for which there is a block."""
        mask = self.inside(known)
        places = self._enter(item, round_)
        fetched = {load: places.fetch(load, ats, [mask] * len(ats), self.low.depth)
                   for load, ats in self._loads().items()}
        self._leave()
        return fetched

    def store(self, item: tuple[int, int], round_: Scalar, stage: Value, fetched: dict[Op, list[Element]]) -> None:
        """The elements of a part, to a stage."""
        if self.mine is None:
            self._store(item, round_, stage, fetched)
        else:
            self.low.fork(self.mine, lambda: self._store(item, round_, stage, fetched), lambda: None)

    def _store(self, item: tuple[int, int], round_: Scalar, stage: Value, fetched: dict[Op, list[Element]]) -> None:
        low = self.low
        block, number = item
        places = self._enter(item, round_)
        self.words = {}
        for load, ats in self._loads().items():
            coordinates = [tuple(at[a] for a in axes_of(load.result)) for at in ats]
            self.words[load] = dict(zip(coordinates, fetched[load], strict=True))
            low.rows[load.result] = {at: places.element(load, element, low.depth)
                                     for at, element in self.words[load].items()}
        zero = low.constant(0.0, f32)
        for first in range(0, len(self.elements), CHUNK_ELEMENTS):
            rows: list[Value] = []
            for four in range(first, first + CHUNK_ELEMENTS, len(ORDER)):
                rows += self._four(self.elements[four:four + len(ORDER)], zero)
            words = [low.emit(low.depth, "pack2", rows[at:at + 2], ROW_B32, dtype=self.dtype)
                     for at in range(0, len(rows), 2)]
            turned = (number * self.part.depth + first) // CHUNK_ELEMENTS * CHUNK_BYTES
            target = low.bits(low.depth, "xor", self.target, turned) if turned else self.target
            low.effect("store_run", [stage, target, *words], dtype=b32, gathered=True, scale=1, near=True,
                       disjoint=True, streaming=False, disp=self.at + block * low.lanes * self.row_bytes)
        for load in self._loads():
            del low.rows[load.result]
        self._leave()

    def _four(self, elements: Sequence[tuple[Value, dict[str, int]] | None], zero: Value) -> list[Value]:
        """Four elements as floats, in their order. Of more operations than a mask and a shift they are made in a word,
        if they lie in one."""
        first, low = elements[0], self.low
        if first is not None and None not in elements and all(
                e is not None and e[0] is first[0] for e in elements) and _operations(first[0]) > FEW_OPERATIONS:
            dtype = _dtype(first[0])
            outer = dict.fromkeys((self.nest.rows, *self.nest.columns), 0)
            ats = [{**outer, **element[1]} for element in elements if element is not None]
            word = byte_word(low, low.depth, self.words, first[0], ats)
            if word is not None:
                bits = low.emit(low.depth, "bitcast", [word], ROW_B32)
                return [low.emit(low.depth, "cvt", [low.emit(
                    low.depth, "unpack", [bits], ROW_I32, dtype=dtype, place=place)], ROW_F32) for place in ORDER]
        return [zero if element is None else self._element(*element) for element in (elements[at] for at in ORDER)]

    def _element(self, operand: Value, at: dict[str, int]) -> Value:
        low = self.low
        row = low.row(operand, {**at, **dict.fromkeys((self.nest.rows, *self.nest.columns), 0)})
        return low.cast(row, _dtype(operand), f32, low.depth)

    def _loads(self) -> dict[Op, list[dict[str, int]]]:
        """What the elements are computed of, at which places of the contractions."""
        found: dict[Op, dict[tuple[int, ...], dict[str, int]]] = {}
        outer = dict.fromkeys((self.nest.rows, *self.nest.columns), 0)
        for operand, at in (element for element in self.elements if element is not None):
            for load in loads_of(operand):
                place = {**outer, **at}
                found.setdefault(load, {})[tuple(place[a] for a in axes_of(load.result))] = place
        return {load: list(ats.values()) for load, ats in found.items()}

    def _enter(self, item: tuple[int, int], round_: Scalar) -> Places:
        """A level in which a lane has a row, or a column, of a block of a round."""
        low = self.low
        block, number = item
        low.enter_again()
        low.begin_round(self.part, round_, low.add(self.number, number))
        self.spreads = dict(self.lanes_of[block])
        aligned = dict.fromkeys(self.spreads, 1)
        for found in self.part.sums.values():
            for contraction in found.contractions:
                for axis, extent in low.contracted(contraction).items():
                    self.spreads[axis] = Spread(0, [low.constant(0, i32)], list(range(extent)))
                    aligned[axis] = FREE
        self.outside = {axis: low.bound.get(axis) for axis in self.spreads}
        for axis, spread in self.spreads.items():
            low.bound[axis] = Bound(spread.origin, len(spread.numbers), False, None, low.depth, spread=spread)
        low.places = Places(low, aligned, dict(aligned))
        return low.places

    def _leave(self) -> None:
        low = self.low
        for axis, bound in self.outside.items():
            del low.bound[axis]
            if bound is not None:
                low.bound[axis] = bound
        low.places = None
        low.leave()


class BlockProducts(ChainSumsLowering):
    """Finds such nests and emits them. nest_tile: rows and columns that a worker computes at once, nest_warps: and the
    warps along each. block_pieces: of each part its rows' and its columns'. stage: near memory of the block at hand."""

    nest: BlockNest | None = None
    nest_tile = nest_warps = (0, 0)
    block_pieces: list[tuple[BlockPiece, BlockPiece]]
    stage: Value

    def find_matrix_walk(self) -> None:
        super().find_matrix_walk()
        unit, schedule = self.facts.matrix, self.schedule
        if unit is None or self.part_walks or self.chain is not None or schedule.matrix is False or schedule.registers \
                or schedule.tile or schedule.chunks or any(map(is_join, self.function.walk())):
            return
        nest = find_nest(self.function, self.specialization)
        tile = None if nest is None else self._tile_of_nest(nest, unit)
        if tile is not None:
            self.nest, self.nest_tile, self.nest_warps = nest, tile, unit.warps_of_blocks(*tile)
            self.warps = prod(unit.block_warps)
            self.few_registers = True

    def _tile_of_nest(self, nest: BlockNest, unit: MatrixUnit) -> tuple[int, int] | None:
        """The largest of which there is one for each worker, or of which there are most; None: there is none. Parts of
        columns are tried where registers have no room for all of them; few rows have tiles of their own, where
        these fit. Those of groups are no tasks."""
        rows, panels = self._rows_of_nest(nest), self._extent_of(nest.columns[0], False)
        if rows < FEWEST_ROWS or panels * PANEL < FEWEST:
            return None
        shapes = list(dict.fromkeys((high, wide // parts) for parts in (1, 2, 4) for high, wide in unit.shapes))

        def fits(high: int, wide: int) -> bool:
            near = sum((wide + high * (part.rows is None)) * part.depth * part.count for part in nest.parts)
            down, across = unit.warps_of_blocks(high, wide)
            return high % (fragments.ROWS * down) == 0 and wide % (PANEL * across) == 0 \
                and high * wide * nest.sets <= MOST_SUMS * down * across * self.lanes \
                and STAGES * near * ELEMENT_BYTES <= min(unit.near_bytes, MOST_NEAR_BYTES)

        few = [shape for shape in unit.few_shapes if rows <= shape[0] and fits(*shape)]
        fitting = sorted(few or (shape for shape in shapes if fits(*shape)), key=lambda shape: (-prod(shape), sum(
            size // warps for size, warps in zip(shape, unit.warps_of_blocks(*shape), strict=True))))

        def tasks(high: int, wide: int) -> int:
            return (1 if nest.groups is not None else -(-rows // high)) * -(-panels * PANEL // wide) * self._nests()

        enough = next((tile for tile in fitting if tasks(*tile) >= unit.workers), None)
        return enough or max(fitting, key=lambda tile: (tasks(*tile), prod(tile)), default=None)

    def _rows_of_nest(self, nest: BlockNest) -> int:
        """How many rows there typically are: where memory tells how many a group has, groups share those of what is
        stored evenly, and each has some."""
        rows = self._extent_of(nest.rows, False)
        if nest.groups is None:
            return rows
        groups = self.hint(nest.groups.operands[1])[0]
        for op in (op for op in nest.body.ops if op.name == "store"):
            for index, dim in zip(op.operands[2:], op.operands[0].type.dims, strict=True):  # type: ignore[union-attr]
                if axes_of(index) == (nest.rows,) and isinstance(dim, str):
                    most = self.specialization.dims.get(dim, DimClass()).hint
                    rows = min(rows, most, max(FEWEST_ROWS, most // groups))
        return rows

    @property
    def tiles_are_tasks(self) -> bool:
        return super().tiles_are_tasks or self.nest is not None

    @property
    def has_warps_together(self) -> bool:
        """Whether a worker's warps have a task together."""
        return self.matrix_walk is not None or self.chain is not None or self.nest is not None

    @property
    def axes_of_tiles(self) -> tuple[str, str]:
        """Rows and columns of a worker's tile."""
        if self.nest is not None:
            return self.nest.rows, self.nest.columns[0]
        assert self.matrix_walk is not None
        return self.matrix_walk.rows, self.matrix_walk.columns

    @property
    def size_of_tiles(self) -> tuple[int, int]:
        """How many of each it has."""
        return self.matrix_tile() if self.nest is None else (self.nest_tile[0], self.nest_tile[1] // PANEL)

    # What is asked of a nest.

    def contracted(self, contraction: Op) -> dict[str, int]:
        """The axes that a contraction is over, with their extents."""
        return extents_of(self.function, contraction)

    def least(self, row: Value, last: Value) -> Value:
        """The lesser of two, made once."""
        depth = max(self.depths.get(row, 0), self.depths.get(last, 0))
        memo = self.levels[depth].memo
        key = ("least", row, last)
        if key not in memo:
            memo[key] = self.emit(depth, "min", [row, last], ROW_I32)
        found: Value = memo[key]
        return found

    def begin_round(self, part: BlockPart, round_: Scalar, number: Scalar) -> None:
        """Begin the blocks of a round of the loop, and of one of the loop inside, at the level at hand."""
        assert self.nest is not None
        self._begin_at(self.nest.loop.blocks[0], round_)
        if part.loop is not None:
            self._begin_at(part.loop.blocks[0], number)

    def _begin_at(self, block: Block, counter: Scalar) -> None:
        self.scalars[block.arguments[0]] = counter
        self.home[block.arguments[0]] = self.depth
        self.begin_block(block)

    # The nest.

    def block_products(self, block: Block) -> None:
        """Emit the nest for all of its open rows and panels."""
        nest = self.nest
        assert nest is not None
        high, wide = self.nest_tile
        rows, panels = self.open[nest.rows], self.open[nest.columns[0]]
        self._count(panels, wide // PANEL, lambda panel: self._count(
            rows, high, lambda row: self._tile_of_blocks(nest, block, row, panel)))

    def _tile_of_blocks(self, nest: BlockNest, block: Block, row: Value, panel: Value) -> None:
        self.begin_block(block)
        high, wide = (size // warps for size, warps in zip(self.nest_tile, self.nest_warps, strict=True))
        mine = [self.scalar(name, self.warp(), self.nest_warps[1]) for name in ("s_floordiv", "s_mod")]
        mine_row = self.add(row, self.mul(mine[0], high))
        mine_panel = self.add(panel, self.mul(mine[1], wide // PANEL))
        rows, panels = self.open[nest.rows], self.open[nest.columns[0]]
        row_end, panel_end = self.add(rows.offset, rows.extent), self.add(panels.offset, panels.extent)
        down = self.down(mine_row, high // 8, self.row_of(self.sub(self.sub(row_end, 1), mine_row)))
        across = self._panels_across(mine_panel, wide // PANEL, self.sub(self.sub(panel_end, 1), mine_panel))
        inside = self.along(0, PANEL)
        outer = {axis: self.bound.get(axis) for axis in (nest.rows, *nest.columns)}
        for axis, spread in zip(outer, (down, across, inside), strict=True):
            self.bound[axis] = Bound(spread.origin, len(spread.numbers), False, None, self.depth, spread=spread)

        self.block_pieces = []
        found: dict[int, BlockPiece] = {}
        stage_bytes = 0
        for part in nest.parts:
            pair = []
            for left, origin in ((True, part if part.rows is None else part.rows), (False, part)):
                piece = found.get(id(origin)) if left else None
                if piece is None:
                    piece = BlockPiece(self, nest, origin, left, self.nest_tile[not left], stage_bytes)
                    piece.place(self.mul(mine[not left], (high, wide)[not left]), left)
                    piece.prepare(*((row, row_end) if left else (panel, panel_end)))
                    stage_bytes += piece.bytes
                    if left:
                        found[id(origin)] = piece
                pair.append(piece)
            self.block_pieces.append((pair[0], pair[1]))
        self.near_bytes_used = max(self.near_bytes_used, STAGES * stage_bytes)
        self.name_buffers((f"{'rows' if piece.left else 'columns'} {piece.at} {stage}", stage * stage_bytes + piece.at,
                           piece.bytes) for stage in range(STAGES) for piece in self._pieces())
        self._rounds(nest, stage_bytes)
        down.repeats = across.repeats = False       # another warp may store the last row that is read
        for op in block.ops:
            if op.name == "store":
                self._store_of_nest(nest, op)
        for axis, bound in outer.items():
            del self.bound[axis]
            if bound is not None:
                self.bound[axis] = bound

    def _pieces(self) -> list[BlockPiece]:
        """All pieces, each once."""
        return list(dict.fromkeys(piece for pair in self.block_pieces for piece in pair))

    def _panels_across(self, origin: Scalar, count: int, last: Scalar) -> Spread:
        """So many panels, up to the last, counted from the origin."""
        lanes, valid, least = [], [], self.row_of(last)
        for number in range(count):
            panel = self.constant(number, i32)
            lanes.append(self.emit(self.depth, "min", [panel, least], ROW_I32))
            valid.append(self.emit(self.depth, "cmp", [panel, least], MASK, cond="le"))
        return Spread(origin, lanes, [0] * count, valid, repeats=True)

    def _rounds(self, nest: BlockNest, stage_bytes: int) -> None:
        """The loop over blocks, two stages in turn."""
        loop, body = nest.loop, nest.loop.blocks[0]
        start, stop = (self.integer(v) for v in loop.operands[:2])
        points = self._points(nest)
        zero = self.constant(0, i32)

        def known(round_: Scalar) -> Value:
            left = self.row_of(self.sub(stop, round_))
            return self.emit(self.depth, "cmp", [zero, left], MASK, cond="lt")

        self.effect("sync_warps", [])       # the last tile's stages are read
        here = known(start)
        for piece in self._pieces():
            for item in piece.items:
                piece.store(item, start, self.near(), piece.fetch(item, start, here))
        first = [self.row(v, at) for v in loop.operands[2:] for at in points]
        carried = [self.near(), self.value(self.add(self.near(), stage_bytes)), *first]
        block = Block([S64, *[v.type for v in carried]])
        self.enter(block)
        round_, reading, writing = block.arguments[:3]
        self.stage = reading
        self._hold(body.arguments[1:], points, iter(block.arguments[3:]))
        self.effect("sync_warps", [])
        following = self.add(round_, 1)
        some = known(following)
        results = self._round(nest, points, round_, lambda part, parts: self._fetch_ahead(
            following, some, writing, part, parts))
        self.effect("yield", [writing, reading, *results])
        self.leave()
        made = Op("loop", [self.value(start), self.value(stop), *carried], [v.type for v in carried],
                  {"step": 1, "label": "blocks"}, [block], loop.location)
        self.finish(made)
        self._hold(loop.results, points, iter(made.results[2:]))

    def _fetch_ahead(self, following: Scalar, some: Value, writing: Value, part: int, parts: int) -> Callable[[], None]:
        """Fetch a part of what the next round multiplies; gives what stores it."""
        items = [(piece, item) for piece in self._pieces() for item in piece.items]
        mine = items[len(items) * part // parts:len(items) * (part + 1) // parts]
        waiting = [(piece, item, piece.fetch(item, following, some)) for piece, item in mine]

        def store() -> None:
            for piece, item, fetched in waiting:
                piece.store(item, following, writing, fetched)
        return store

    def _round(self, nest: BlockNest, points: list[dict[str, int]], round_: Value,
               ahead: Callable[[int, int], Callable[[], None]]) -> list[Value]:
        """What a round of the loop gives. ahead: fetches some parts of the next one."""
        body = nest.loop.blocks[0]
        yielded = body.ops[-1].operands
        done: dict[Op, list[Value]] = {}
        made: dict[Value, list[Value]] = {}

        def begin() -> None:
            self._begin_at(body, round_)
            for op, rows in done.items():
                self._hold(op.results, points, iter(rows))

        steps = [(loop, number) for loop in nest.loops for number in range(number_of(loop.operands[1]) or 0)]
        parts = -(-len(steps) // BLOCKS_WAITING)
        store: Callable[[], None] = lambda: None  # noqa: E731
        totals = list[Value]()
        for place, (loop, number) in enumerate(steps):
            (block,) = loop.blocks
            if place % BLOCKS_WAITING == 0:
                store = ahead(place // BLOCKS_WAITING, parts)
            begin()
            if number == 0:
                totals = [self._of_sums(v, at) for v in loop.operands[2:] for at in points]
            self.enter_again()
            self._begin_at(block, number)
            self._hold(block.arguments[1:], points, iter(totals))
            totals = self._evaluated(block.ops[-1].operands, points)
            self.leave()
            if (place + 1) % BLOCKS_WAITING == 0 or place + 1 == len(steps):
                store()
            if place + 1 == len(steps) or steps[place + 1][0] is not loop:
                done[loop] = totals
                begin()
                for value in yielded:       # what need not wait for the others
                    if value not in made and self._is_made_of(value, body, done):
                        made[value] = self._evaluated([value], points)
        if not steps:
            store = ahead(0, 1)
        begin()
        left = [v for v in dict.fromkeys(yielded) if v not in made]
        rows = self._evaluated(left, points)
        made.update({v: rows[place * len(points):(place + 1) * len(points)] for place, v in enumerate(left)})
        if not steps:
            store()
        return [row for v in yielded for row in made[v]]

    @staticmethod
    def _is_made_of(value: Value, body: Block, done: Sequence[Op] | dict[Op, list[Value]]) -> bool:
        """Whether a value of a round is made of loops inside that are done, without contractions beside these."""
        pending = [value]
        while pending:
            op = pending.pop().op
            if op is None or op not in body.ops or op in done:
                continue
            if op.blocks or op.name == "contract":
                return False
            pending += op.operands
        return True

    def _points(self, nest: BlockNest) -> list[dict[str, int]]:
        """Registers of sums: those of an instruction together, and of those that are summed together."""
        rows, panels, lanes = (self.bound[axis].count for axis in (nest.rows, *nest.columns))
        several = self._together(nest)
        return [{nest.rows: row + r // 2, nest.columns[0]: panel, nest.columns[1]: column + r % 2}
                for first in range(0, panels, several) for row in range(0, rows, 2)
                for panel in range(first, min(first + several, panels)) for column in range(0, lanes, 2)
                for r in range(4)]

    def _together(self, nest: BlockNest) -> int:
        """Panels that are summed together, by all rows."""
        return max(1, INSTRUCTIONS_TOGETHER // self.bound[nest.rows].count)

    def _evaluated(self, values: Sequence[Value], points: list[dict[str, int]]) -> list[Value]:
        """Rows of values at all points, the values of a point together."""
        made: dict[tuple[int, int], Value] = {}
        for place in range(0, len(points), 4):
            for number, value in enumerate(values):
                made.update({(number, place + r): self.row(value, points[place + r]) for r in range(4)})
        return [made[number, place] for number in range(len(values)) for place in range(len(points))]

    def _hold(self, values: Sequence[Value], points: list[dict[str, int]], rows: Iterator[Value]) -> None:
        for value in values:
            self.home[value] = self.depth
            self.rows[value] = {}
            for at in points:
                row = next(rows)
                self.depths[row] = min(self.depths.get(row, 0), self.depth)
                self.rows[value][tuple(at[a] for a in axes_of(value))] = row

    # Values.

    def _compute(self, value: Value, at: dict[str, int], level: int) -> Value:
        nest, op = self.nest, value.op
        if nest is None or op is None or self.places is not None:
            return super()._compute(value, at, level)
        if nest.part_of(value) is not None:
            return self._sum_of_block(nest, value, at, level)
        if op.name == "cast" and op.operands[0] in nest.floats:
            return self.row(op.operands[0], at)
        if value in nest.floats and op.name == "add":
            return self._added(nest, value, at, level)
        if value in nest.floats:
            rows = [self._as_float(v, at) for v in op.operands]
            if op.name == "shl":
                amount = number_of(op.operands[1])
                assert amount is not None
                return self.emit(level, "mul", [rows[0], self.constant(2.0**amount, f32)], ROW_F32)
            return self.emit(level, op.name, rows, ROW_F32)
        return super()._compute(value, at, level)

    def _added(self, nest: BlockNest, value: Value, at: dict[str, int], level: int) -> Value:
        """A sum of integers, which any order gives: products by multiply-adds, behind all else."""
        products, pending = list[Value](), [value]
        total: Value | None = None
        while pending:
            term = pending.pop(0)
            made = term in nest.floats and term.op is not None and nest.part_of(term) is None
            if made and term.op.name == "add":      # type: ignore[union-attr]
                pending[:0] = term.op.operands      # type: ignore[union-attr]
            elif made and term.op.name == "mul":    # type: ignore[union-attr]
                products.append(term)
            else:
                row = self._as_float(term, at)
                total = row if total is None else self.emit(level, "add", [total, row], ROW_F32)
        for term in products:
            assert term.op is not None
            rows = [self._as_float(v, at) for v in term.op.operands]
            total = self.emit(level, "mul", rows, ROW_F32) if total is None else self.emit(
                level, "fma", [*rows, total], ROW_F32)
        assert total is not None
        return total

    def _of_sums(self, value: Value, at: dict[str, int]) -> Value:
        """A row with which sums begin."""
        return self._as_float(value, at) if _dtype(value) is i32 else self.row(value, at)

    def _as_float(self, value: Value, at: dict[str, int]) -> Value:
        """An integer as a float, made once."""
        row = self.row(value, at)
        if row.type == ROW_F32:
            return row
        level = self.level_of(value)
        memo = self.levels[level].memo
        if ("float", row) not in memo:
            memo["float", row] = self.emit(level, "cvt", [row], ROW_F32)
        made: Value = memo["float", row]
        return made

    def _sum_of_block(self, nest: BlockNest, value: Value, at: dict[str, int], level: int) -> Value:
        """Four registers of a sum, of an instruction each 16 of the depth."""
        known = nest.part_of(value)
        assert known is not None
        part, found = known
        left, right = self.block_pieces[nest.parts.index(part)]
        rows, panels, lanes = (self.bound[axis].count for axis in (nest.rows, *nest.columns))
        first = at[nest.columns[0]] // self._together(nest) * self._together(nest)
        columns = [(panel, column) for panel in range(first, min(first + self._together(nest), panels))
                   for column in range(0, lanes, 2)]
        sums: dict[tuple[int, int, int], list[Value]] = {}
        for row in range(0, rows, 2):
            begin = [self._beginning(found, {nest.rows: row + more}) for more in range(2)]
            sums.update({(row, *place): [begin[0]] * 2 + [begin[1]] * 2 for place in columns})
        number = 0 if part.loop is None else self.scalars[part.loop.blocks[0].arguments[0]]
        assert isinstance(number, int)
        for step in range(found.first, found.first + found.depth, fragments.DEPTH):
            depth = number * part.depth + step
            a = {row: left.fragments(self.stage, row // 2 * fragments.ROWS, depth) for row in range(0, rows, 2)}
            b = {panel: right.fragments(self.stage, panel * PANEL, depth) for panel in dict(columns)}
            for (row, panel, column), before in sums.items():
                made = Op("matrix_multiply", [*a[row], *b[panel][column:column + 2], *before], [ROW_F32] * 4,
                          {"dtype": f16, "right_dtype": f16}, None, self.location)
                self.finish(made)
                sums[row, panel, column] = list(made.results)
        memo = self.levels[level].memo
        for (row, panel, column), results in sums.items():
            for r, result in enumerate(results):
                place = {nest.rows: row + r // 2, nest.columns[0]: panel, nest.columns[1]: column + r % 2}
                memo[value, tuple(place[a] for a in axes_of(value))] = result
        mine: Value = memo[value, tuple(at[a] for a in axes_of(value))]
        return mine

    def _beginning(self, found: BlockSum, at: dict[str, int]) -> Value:
        """With what a sum begins: what else it adds, of its row."""
        total: Value | None = None
        for value in found.others:
            row = self._as_float(value, at)
            total = row if total is None else self.emit(self.level_of(value), "add", [total, row], ROW_F32)
        return self.constant(0.0, f32) if total is None else total

    # Memory.

    def _store_of_nest(self, nest: BlockNest, op: Op) -> None:
        """Two neighbours of a panel together, where they lie so."""
        value, access = op.operands[1], self.access(op)
        down, across = (self.bound[axis].spread for axis in (nest.rows, nest.columns[0]))
        together = access.axes.get(nest.columns[1]) == access.dtype.size_bytes == f32.size_bytes \
            and memory_of(op.operands[0]).name in self.specialization.aligned
        for at in self._points(nest):
            base, offsets, disp = self.spread_address(access, at)
            mask = self.all_of(down.mask(at[nest.rows]), across.mask(at[nest.columns[0]]))
            tail = [] if mask is None else [mask]
            if not together:
                self.effect("scatter", [self.row(value, at), base, offsets, *tail], dtype=access.dtype, scale=1,
                            disp=disp, masked=bool(tail), disjoint=True)
            elif at[nest.columns[1]] % 2 == 0:
                pair = [self.row(value, {**at, nest.columns[1]: at[nest.columns[1]] + more}) for more in range(2)]
                self.effect("store_run", [base, offsets, *pair, *tail], dtype=access.dtype, gathered=True, scale=1,
                            disp=disp, masked=bool(tail), disjoint=True, streaming=False)


def _operations(value: Value) -> int:
    """That make a value of what is loaded, and of numbers."""
    op = value.op
    return 0 if op is None or op.name in ("load", "const", "full") else 1 + sum(map(_operations, op.operands))


def loads_of(value: Value) -> list[Op]:
    """What a value is computed of."""
    found, pending = dict[Op, None](), [value]
    while pending:
        op = pending.pop().op
        if op is not None and op.name == "load":
            found[op] = None
        elif op is not None:
            pending += op.operands
    return list(found)


def _dtype(value: Value) -> DType:
    assert isinstance(value.type, TileType)
    return value.type.dtype
