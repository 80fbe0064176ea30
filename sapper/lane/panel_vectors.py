"""Vectors that meet weights in panels: a worker's warps share the depth, and half a warp has a panel of 16 columns.

Enters a function of parallel loops around panels, of which each is a tile of 16 columns and loops in order over blocks
of the depth, which add up what a block gives. Leaves lane IR in which sums stay in registers: lane 16 i + l has column
l of panel i of two. Each warp takes some blocks in a row of `warps` times so many; what a lane reads of them are words
as they lie in memory (places.py), of a vector up to 16 bytes at once, all before they are needed. Then all warps' sums
pass through near memory and are added in the order of the warps.

Where panels are counted one by one, and contractions are over all of the depth, lanes are along that, too: each has all
16 columns of its places in registers, 16 bytes of fp8, and lanes exchange halves of their sums (`_sums_of_lanes`).

    near memory   each warp's sums, 128 bytes for a result

Where vectors are of bytes, too, an instruction adds up four products, of words (byte_words.py).

So a matrix of 4096 rows has 128 tasks of eight warps each, in place of 256 of a warp, half of whose lanes were idle,
and a warp has 2 KiB of weights of 4 bits on their way.
Holds: results are the same, but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import prod

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import MASK, ROW_B32, ROW_F32, ROW_I32, S64, RowType, TileType, f32, i8, i32, u8
from ..tile.affine import affine
from ..tile.ops import memory_of
from ..tile.plan import axes_of
from ..tile.semantics import ELEMENTWISE
from ..tile.sums import is_join
from ..tile.zeros import is_zero
from .block_nests import PANEL, extents_of, number_of
from .block_products import BlockProducts, loads_of
from .byte_words import byte_word
from .pieces import CHUNK_BYTES
from .places import FREE, Element, Places, forms_place
from .spread import Spread
from .state import Bound, Scalar, element_bytes, row_dtype

PANELS = 2
"""Of a worker at once: half a warp has one."""
MOST_SUMMED = 128
"""Elements of a contraction, which is written out."""
DOT_BYTES = 4
"""That one instruction multiplies, and adds up."""
MOST_WRITTEN_OUT = 8
"""Rounds of a loop in a block."""
MOST_RESULTS = 4
"""Of a loop whose rounds warps share."""
BYTES_ON_THEIR_WAY, MOST_BLOCKS = 64, 4
"""Of weights for a lane, and blocks for that: eight warps then have 16 KiB on their way, which 132 processors need for
3.35 TB/s and 600 ns."""
PLAIN = frozenset({"whole", "index", "const", "dim", "yield", "full", "load"})


@dataclass(frozen=True, slots=True)
class PanelNest:
    """panels, columns: the axes; panels are None where they are counted. body: of the nest. shared: loops over blocks
    whose rounds warps share, or contractions over the depth where panels are counted."""

    panels: str | None
    columns: str
    body: Block
    shared: tuple[Op, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        return (self.columns,) if self.panels is None else (self.panels, self.columns)


def find_panels(function: Function, block: Block) -> PanelNest | None:
    """The nest that a part of a function is, if it is one."""
    while True:
        control = [op for op in block.ops if op.blocks]
        if len(control) != 1 or control[0].results or not control[0].attributes.get("parallel") or any(
                op.name in ("store", "reduce", "contract", "buffer") for op in block.ops):
            return None
        (outer,), (block,) = control, control[0].blocks
        if outer.name == "tiles" or not any(op.attributes.get("parallel") for op in block.ops if op.blocks):
            break
    panels = outer.attributes.get("axes", [None])
    columns = [op.attributes["axis"] for op in block.ops if op.name == "whole"
               and [number_of(v) for v in op.operands] == [0, PANEL]]
    if len(panels) != 1 or len(columns) != 1 or "repeats" in outer.attributes:
        return None
    finder = _Finder(function, panels[0], columns[0])
    found = finder.takes(block) and finder.shared
    return PanelNest(panels[0], columns[0], block, tuple(finder.shared)) if found else None


class _Finder:
    """shared: the loops that were found."""

    def __init__(self, function: Function, panels: str | None, columns: str) -> None:
        self.function, self.panels = function, panels
        self.axes = {columns} if panels is None else {panels, columns}
        self.columns = columns
        self.shared: list[Op] = []

    def takes(self, block: Block, inside: bool = False, around: bool = False) -> bool:
        """Whether all ops of a block can be done. inside: of a loop that is shared. around: there is a loop around."""
        wholes = {op.attributes["axis"]: number_of(op.operands[1]) if number_of(op.operands[0]) == 0 else None
                  for op in block.ops if op.name == "whole"}
        depth = [axis for axis, extent in wholes.items() if not extent]
        if len(depth) > (self.panels is None):
            return False
        loaded = {load for op in block.ops if op.name == "contract" for v in op.operands for load in loads_of(v)}
        for op in block.ops:
            values = [v for v in (*op.operands, *op.results) if isinstance(v.type, TileType)]
            if any(v.type.dtype.bits > 32 and v.type.dtype.name != "index" for v in values):  # type: ignore[union-attr]
                return False
            if op.blocks:
                shared = not inside and self.panels is not None and _adds_up(op) and any(
                    inner.name in ("contract", "reduce") for inner in op.walk())
                if not self._is_ordered(op, inside) or not self.takes(op.blocks[0], inside or shared, True):
                    return False
                self.shared += [op] if shared else []
            elif op.name == "store":
                if around or is_join(op) or set(axes_of(op.operands[1])) != self.axes or any(
                        affine(v) is None for v in op.operands[2:]):
                    return False
            elif op.name in ("contract", "reduce"):
                if not (self._is_over_depth(op, depth) if depth else inside and self._is_short(op)):
                    return False
                self.shared += [op] if depth else []
            elif op.name == "load":
                if not all(self._is_place(v, inside or (bool(depth) and op in loaded)) for v in op.operands[1:]) or (
                        inside and not self._lies_side_by_side(op)):
                    return False
            elif op.name not in PLAIN and op.name not in ELEMENTWISE - {"asm"}:
                return False
        return True

    def _is_short(self, op: Op) -> bool:
        """Whether a sum can be written out."""
        return op.attributes.get("kind", "sum") == "sum" and set(axes_of(op.result)) <= self.axes \
            and 0 < prod(extents_of(self.function, op).values()) <= MOST_SUMMED

    def _is_over_depth(self, op: Op, depth: list[str]) -> bool:
        loads = [load for v in op.operands for load in loads_of(v)]
        return op.name == "contract" and op.attributes["over"] == depth and set(axes_of(op.result)) == self.axes and (
            isinstance(op.result.type, TileType) and op.result.type.dtype is f32) and all(
            set(axes_of(load.result)) <= {*self.axes, *depth} for load in loads)

    def _is_ordered(self, loop: Op, inside: bool) -> bool:
        """Whether it carries rows. inside: of a loop that is shared; these may be of integers."""
        return loop.name == "each" and not loop.attributes["parallel"] and loop.attributes["count"] == 1 and \
            loop.attributes.get("step", 1) == 1 and 0 < len(loop.results) <= MOST_RESULTS and all(
            isinstance(v.type, TileType) and v.type.dtype in (f32, i32)[:1 + inside] and set(v.type.axes) == self.axes
            for v in loop.results)

    def _lies_side_by_side(self, load: Op) -> bool:
        """Whether what lanes read at once for neighbouring columns does, as in panels."""
        *_, last = [-1, *(n for n, v in enumerate(load.operands[1:]) if self.columns in axes_of(v))]
        behind = load.operands[2 + last:] if last >= 0 else ()
        extents = {op.attributes["axis"]: number_of(op.operands[1]) or 0 for op in self.function.walk()
                   if op.name == "whole"}
        size: int = prod(extents.get(axis, 0) for v in behind for axis in axes_of(v)) * element_bytes(
            load.result.type.dtype)     # type: ignore[union-attr]
        return last < 0 or 0 < size <= CHUNK_BYTES

    @staticmethod
    def _is_place(index: Value, moves: bool) -> bool:
        """Whether it is known where lanes' elements lie. moves: of a loop whose rounds warps share."""
        return not axes_of(index) or (
            forms_place(index, dict.fromkeys(axes_of(index), 1)) if moves else affine(index)) is not None


def _adds_up(loop: Op) -> bool:
    """Whether each value that a loop carries begins with 0, and a round but adds to it."""
    (body,) = loop.blocks
    used = [v for op in loop.walk() for v in op.operands if op is not loop]

    def adds(value: Value, carried: Value) -> bool:
        op = value.op
        if value is carried:
            return True
        return op is not None and op.name == "add" and op in body.ops and used.count(value) == 1 and any(
            adds(v, carried) for v in op.operands)

    first = len(loop.operands) - len(loop.results)
    carried = body.arguments[len(body.arguments) - len(loop.results):]
    return all(is_zero(begin) and used.count(mine) == 1 and adds(made, mine) for begin, mine, made in zip(
        loop.operands[first:], carried, body.ops[-1].operands, strict=True))


class PanelVectors(BlockProducts):
    """Finds such nests and emits them. vectors: that of the part at hand. panel_words: of what is loaded in a round."""

    vectors: PanelNest | None = None
    panel_words: dict[Op, dict[tuple[int, ...], Element]]
    part_vectors: dict[Block, PanelNest]

    def find_matrix_walk(self) -> None:
        super().find_matrix_walk()
        unit, schedule, body = self.facts.matrix, self.schedule, self.function.body
        self.part_vectors, self.panel_words = {}, {}
        if unit is None or self.warps > 1 or schedule.lane or schedule.order or schedule.registers or schedule.tile \
                or schedule.chunks:
            return
        warps = prod(unit.block_warps)
        for block in [op.blocks[0] for op in body.ops if op.name == "part"] or [body]:
            found = find_panels(self.function, block)
            if found is not None and all(
                    self.hint(op.operands[1])[0] >= warps if op.blocks else
                    self._extent_of(op.attributes["over"][0], False) >= warps * self.lanes for op in found.shared):
                self.part_vectors[block] = found
        self.vectors = self.part_vectors.get(body)
        if self.part_vectors:
            self.warps = warps

    def take_part(self, part: Block) -> None:
        super().take_part(part)
        if self.part_vectors:
            self.vectors = self.part_vectors.get(part)
            self.warps_have_tasks = self.vectors is None

    @property
    def tiles_are_tasks(self) -> bool:
        return super().tiles_are_tasks or self.vectors is not None

    @property
    def has_warps_together(self) -> bool:
        return super().has_warps_together or self.vectors is not None

    @property
    def axes_of_tiles(self) -> tuple[str, str]:
        return super().axes_of_tiles if self.vectors is None else (self.vectors.panels or "", "")

    @property
    def size_of_tiles(self) -> tuple[int, int]:
        return super().size_of_tiles if self.vectors is None else (PANELS, 1)

    # The nest.

    def panel_vectors(self, block: Block) -> None:
        """Emit the nest for all of its open panels."""
        nest = self.vectors
        assert nest is not None
        if nest.panels is None:
            column = self.bits(0, "shr", self.iota(), 1)
            even = self.emit(0, "cmp", [self.bits(0, "and", self.iota(), 1), self.constant(0, i32)], MASK, cond="eq")
            self._vectors_of_panels(nest, block, {nest.columns: Spread(0, [column], [0])}, even)
            return
        panels = self.open[nest.panels]
        last = self.sub(self.add(panels.offset, panels.extent), 1)
        half = self.bits(0, "shr", self.iota(), PANEL.bit_length() - 1)
        along = Spread(0, [self.bits(0, "and", self.iota(), PANEL - 1)], [0])

        def two(panel: Value) -> None:
            left = self.row_of(self.sub(last, panel))
            inside = self.emit(self.depth, "cmp", [half, left], MASK, cond="le")
            across = Spread(panel, [self.least(half, left)], [0], [inside], repeats=True)
            assert nest.panels is not None
            self._vectors_of_panels(nest, block, {nest.panels: across, nest.columns: along}, inside)

        self._count(panels, PANELS, two)

    def _vectors_of_panels(self, nest: PanelNest, block: Block, spreads: dict[str, Spread], inside: Value) -> None:
        """inside: lanes that store."""
        with self._spread_axes(spreads):
            self._vector_block(nest, block, None)
            first = self.emit(0, "s_cmp", [self.value(self.warp()), self.value(0)], S64, cond="eq")
            mine = self.emit(0, "mask_first", [self.value(self.mul(first, self.lanes))], MASK)
            at = dict.fromkeys(spreads, 0)
            for op in block.ops:
                if op.name == "store":
                    access = self.access(op)
                    base, offsets, disp = self.spread_address(access, at)
                    mask = self.all_of(mine, inside)
                    assert mask is not None
                    self.effect("scatter", [self.row(op.operands[1], at), base, offsets, mask], dtype=access.dtype,
                                scale=1, disp=disp, masked=True, disjoint=True)

    @contextmanager
    def _spread_axes(self, spreads: dict[str, Spread]) -> Iterator[None]:
        outside = {axis: self.bound[axis] for axis in spreads if axis in self.bound}
        for axis, spread in spreads.items():
            self.bound[axis] = Bound(spread.origin, len(spread.numbers), False, None, self.depth, spread=spread)
        yield
        for axis in spreads:
            del self.bound[axis]
        self.bound |= outside

    def _vector_block(self, nest: PanelNest, block: Block, counter: Scalar | None) -> list[Value]:
        """The loops of a block, and rows of what it yields. counter: of a round of a loop."""
        if counter is None:
            self.begin_block(block)
        else:
            self._begin_at(block, counter)
        outer = self.places
        loads: list[Op] = []
        at = dict.fromkeys(nest.axes, 0)
        zero = self.constant(0, i32)
        wholes = {op.attributes["axis"]: Spread(0, [zero], list(range(number_of(op.operands[1]) or 0)))
                  for op in block.ops if op.name == "whole" and op.attributes["axis"] != nest.columns
                  and number_of(op.operands[1]) is not None}
        contractions = [op for op in block.ops if op in nest.shared and not op.blocks]
        if contractions:
            self._share_depth(nest, contractions)
        with self._spread_axes(wholes):
            if outer is not None or self._is_vector_sum(nest, block):
                aligned = {axis: 1 if axis in at else FREE for axis in self.bound}
                self.places = Places(self, aligned, dict(aligned))
                loads = [op for op in block.ops if op.name == "load" and axes_of(op.result)]
                for load in loads:
                    self._fetch_words(load, self.places, None)
            for op in block.ops:
                if op in nest.shared:
                    if op.blocks:
                        self._share_rounds(nest, op)
                elif op.blocks:
                    self._vector_loop(nest, op)
            yielded = block.ops[-1].operands
            rows = [self.row(v, at) for v in yielded]
        for load in loads:
            del self.rows[load.result], self.panel_words[load]
        self.places = outer
        return rows

    @staticmethod
    def _is_vector_sum(nest: PanelNest, block: Block) -> bool:
        return any(block in op.blocks for op in nest.shared)

    def _fetch_words(self, load: Op, places: Places, mask: Value | None) -> None:
        """All that a lane has of a load, in registers."""
        axes = axes_of(load.result)
        coordinates = list(product(*(range(self.bound[axis].count) for axis in axes)))
        found = places.fetch(load, [dict(zip(axes, at, strict=True)) for at in coordinates],
                             [mask] * len(coordinates), self.depth)
        self.panel_words[load] = dict(zip(coordinates, found, strict=True))
        self.rows[load.result] = {at: places.element(load, element, self.depth)
                                  for at, element in self.panel_words[load].items()}

    def _hold_row(self, values: Sequence[Value], rows: Sequence[Value]) -> None:
        for value, row in zip(values, rows, strict=True):
            self.home[value] = self.depth
            self.depths[row] = min(self.depths.get(row, 0), self.depth)
            self.rows[value] = {(0,) * len(axes_of(value)): row}

    def _vector_loop(self, nest: PanelNest, loop: Op) -> None:
        """A loop that each warp takes all of. Of a few rounds of words of bytes it is written out, so that all of a
        block is on its way together; elements by themselves would want more registers than there are."""
        start, stop = (self.integer(v) for v in loop.operands[:2])
        at = dict.fromkeys(nest.axes, 0)
        rows = [self.row(v, at) for v in loop.operands[2:]]
        contractions = [op for op in loop.walk() if op.name == "contract"]
        words = all(op.result.type.dtype is i32 for op in contractions) and all(  # type: ignore[union-attr]
            memory_of(load.operands[0]).name in self.specialization.aligned
            for op in contractions for v in op.operands for load in loads_of(v))
        if words and start == 0 and isinstance(stop, int) and stop <= MOST_WRITTEN_OUT:
            rows = self._rounds_together(nest, loop, range(stop), rows)
        else:
            rows = self._vector_rounds(nest, loop, start, stop, 1, 1, rows)
        self._hold_row(loop.results, rows)

    def _rounds_together(self, nest: PanelNest, loop: Op, rounds: Sequence[Scalar], rows: list[Value]) -> list[Value]:
        """Rounds one after the other, at the level at hand."""
        body = loop.blocks[0]
        for number in rounds:
            self.enter_again()
            self._hold_row(body.arguments[1:], rows)
            rows = self._vector_block(nest, body, number)
            self.leave()
        return rows

    def _vector_rounds(self, nest: PanelNest, loop: Op, start: Scalar, stop: Scalar, step: int, together: int,
              rows: list[Value]) -> list[Value]:
        """Rounds from `start` on, so many together, to carry these rows."""
        block = Block([S64, *[row.type for row in rows]])
        self.enter(block)
        self.effect("yield", self._rounds_together(nest, loop, [
            self.add(block.arguments[0], number) for number in range(together)], list(block.arguments[1:])))
        self.leave()
        made = Op("loop", [self.value(start), self.value(stop), *rows], [row.type for row in rows],
                  {"step": step, "label": "blocks"}, [block], loop.location)
        self.finish(made)
        return list(made.results)

    def _share_rounds(self, nest: PanelNest, loop: Op) -> None:
        """A loop of whose rounds each warp takes some; leaves the sums of all."""
        start, stop = (self.integer(v) for v in loop.operands[:2])
        rows = [self.constant(0.0, f32)] * len(loop.results)
        together, warp = self._blocks_together(nest, loop), self.warp()
        if together > 1:
            rounds = self.scalar("s_floordiv", self.sub(stop, start), together)
            ends = self.add(start, self.mul(rounds, together))
            mine = self.add(start, self.mul(warp, together))
            rows = self._vector_rounds(nest, loop, mine, ends, together * self.warps, together, rows)
            start = ends
        rows = self._vector_rounds(nest, loop, self.add(start, warp), stop, self.warps, 1, rows)
        self._hold_row(loop.results, self._sums_of_warps(rows))

    def _blocks_together(self, nest: PanelNest, loop: Op) -> int:
        """Rounds at once, so that enough is on its way."""
        (body,) = loop.blocks
        if any(op.blocks for op in body.ops):
            return 1
        ends = {op.attributes["axis"]: number_of(op.operands[1]) or 1 for op in body.ops if op.name == "whole"}
        loads = [op for op in body.ops if op.name == "load" and nest.columns in axes_of(op.result)]
        sizes: list[int] = [element_bytes(op.result.type.dtype) * prod(  # type: ignore[union-attr]
            ends.get(axis, 1) for axis in axes_of(op.result)) for op in loads]
        return max(1, min(MOST_BLOCKS, -(-BYTES_ON_THEIR_WAY // max(1, sum(sizes)))))

    def _share_depth(self, nest: PanelNest, contractions: Sequence[Op]) -> None:
        """The same of contractions over the depth: its places are along the lanes."""
        (axis,) = contractions[0].attributes["over"]
        depth = self.open[axis]
        start, stop = depth.offset, self.add(depth.offset, depth.extent)
        loads = list(dict.fromkeys(load for op in contractions for v in op.operands for load in loads_of(v)
                                   if axes_of(load.result)))
        sizes: list[int] = [element_bytes(load.result.type.dtype) * (  # type: ignore[union-attr]
            PANEL if nest.columns in axes_of(load.result) else 1) for load in loads]
        several = max(1, min(MOST_BLOCKS, -(-BYTES_ON_THEIR_WAY // sum(sizes))))
        whole = self.lanes * several
        ends = self.add(start, self.mul(self.scalar("s_floordiv", depth.extent, whole), whole))
        rows = [self.constant(0.0, f32)] * (PANEL * len(contractions))
        for first, last, count in (start, ends, several), (ends, stop, 1):
            rows = self._depth_rounds(nest, contractions, loads, first, last, count, rows)
        sums = [self._sums_of_lanes(rows[first:first + PANEL]) for first in range(0, len(rows), PANEL)]
        self._hold_row([op.result for op in contractions], self._sums_of_warps(sums))

    def _depth_rounds(self, nest: PanelNest, contractions: Sequence[Op], loads: Sequence[Op], start: Scalar,
                      stop: Scalar, several: int, rows: list[Value]) -> list[Value]:
        """Rounds of this warp, of `several` places of each lane; of one, it may be past the end."""
        (axis,) = contractions[0].attributes["over"]
        block = Block([S64, *[row.type for row in rows]])
        self.enter(block)
        here, *totals = block.arguments
        inside = self.emit(self.depth, "cmp", [self.iota(), self.row_of(self.sub(stop, here))], MASK, cond="lt") \
            if several == 1 else None
        made: list[Value] = []
        with self._spread_axes({
                axis: Spread(here, [self.iota()], [self.lanes * number for number in range(several)]),
                nest.columns: Spread(0, [self.constant(0, i32)], list(range(PANEL)))}):
            aligned = {name: 1 if name == axis else FREE for name in self.bound}
            outer, self.places = self.places, Places(self, aligned, dict(aligned))
            for load in loads:
                self._fetch_words(load, self.places, inside)
            for number, op in enumerate(contractions):
                for column in range(PANEL):
                    total = totals[number * PANEL + column]
                    for place in range(several):
                        at = {axis: place, nest.columns: column}
                        total = self.emit(self.depth, "fma", [*(self.row(v, at) for v in op.operands), total], ROW_F32)
                    made.append(total)
            for load in loads:
                del self.rows[load.result], self.panel_words[load]
            self.places = outer
        if inside is not None:
            made = [self.emit(self.depth, "select", [inside, new, old], ROW_F32)
                    for new, old in zip(made, totals, strict=True)]
        self.effect("yield", made)
        self.leave()
        each = self.lanes * several
        loop = Op("loop", [self.value(self.add(start, self.mul(self.warp(), each))), self.value(stop), *rows],
                  [row.type for row in rows], {"step": each * self.warps, "label": axis}, [block],
                  contractions[0].location)
        self.finish(loop)
        return list(loop.results)

    def _sums_of_lanes(self, rows: list[Value]) -> Value:
        """Of 16 rows, sums of all lanes: of row i in lanes 2 i and 2 i + 1. Two rows become one by an exchange, after
        which half of the lanes have the first, half the second."""
        distance = self.lanes // 2
        while len(rows) > 1:
            count = len(rows) // 2
            bit = self.emit(0, "cmp", [self.constant(0, i32), self.bits(0, "and", self.iota(), distance)], MASK,
                            cond="lt")
            joined = []
            for first, second in zip(rows[:count], rows[count:], strict=True):
                mine = self.emit(self.depth, "select", [bit, second, first], ROW_F32)
                other = self.emit(self.depth, "select", [bit, first, second], ROW_F32)
                joined.append(self.emit(self.depth, "add", [mine, self._exchanged(other, distance)], ROW_F32))
            rows, distance = joined, distance // 2
        return self.emit(self.depth, "add", [rows[0], self._exchanged(rows[0], distance)], ROW_F32)

    def _exchanged(self, row: Value, distance: int) -> Value:
        return self.emit(self.depth, "shuffle_xor", [row], ROW_F32, distance=distance)

    def _sums_of_warps(self, rows: list[Value]) -> list[Value]:
        """Sums of all warps, through near memory."""
        padded = rows + rows[-1:] * (len(rows) % 2)
        each = len(padded) * self.lanes * f32.size_bytes
        self.near_bytes_used = max(self.near_bytes_used, self.warps * each)
        self.name_buffers([("sums", 0, self.warps * each)])
        self.effect("sync_warps", [])       # the last sums are read
        operands, attributes = self.memory_operands(self.add(self.near(), self.mul(self.warp(), each)), 0, 1, 0)
        self.effect("store_run", [*operands, *padded], dtype=f32, streaming=False, near=True, **attributes)
        self.effect("sync_warps", [])
        totals: list[Value] = []
        for warp in range(self.warps):
            operands, attributes = self.memory_operands(self.near(), 0, 1, warp * each)
            read = Op("load_run", operands, [ROW_F32] * len(padded), {
                "dtype": f32, "masked": False, "near": True, **attributes}, None, self.location)
            self.finish(read)
            totals = [self.emit(self.depth, "add", [total, part], ROW_F32) for total, part in zip(
                totals, read.results, strict=True)] if totals else list(read.results)
        return totals[:len(rows)]

    # Values.

    def _compute(self, value: Value, at: dict[str, int], level: int) -> Value:
        op = value.op
        if self.vectors is None or op is None or op.name not in ("contract", "reduce"):
            return super()._compute(value, at, level)
        over: list[str] = op.attributes["over"]
        dots = self._dots(op, at, level)
        if dots is not None:
            return dots
        total: Value | None = None
        for place in product(*(range(self.bound[axis].count) for axis in over)):
            rows = [self.row(v, {**at, **dict(zip(over, place, strict=True))}) for v in op.operands]
            type = RowType(row_dtype(value.type.dtype))     # type: ignore[union-attr]
            if total is not None and len(rows) == 2 and type == ROW_F32:
                total = self.emit(level, "fma", [*rows, total], type)
                continue
            term = rows[0] if len(rows) == 1 else self.emit(level, "mul", rows, type)
            total = term if total is None else self.emit(level, "add", [total, term], type)
        assert total is not None
        return total

    def _dots(self, op: Op, at: dict[str, int], level: int) -> Value | None:
        """A sum of products of bytes, four by each instruction; None where these do not lie together in words."""
        over: list[str] = op.attributes["over"]
        sides = {v.type.dtype: v for v in op.operands if isinstance(v.type, TileType)}
        if op.name != "contract" or sides.keys() != {u8, i8} or self.bound[over[-1]].count % DOT_BYTES:
            return None
        places = list(product(*(range(self.bound[axis].count) for axis in over)))
        total = self.constant(0, i32)
        for first in range(0, len(places), DOT_BYTES):
            ats = [{**at, **dict(zip(over, place, strict=True))} for place in places[first:first + DOT_BYTES]]
            words = [byte_word(self, level, self.panel_words, sides[dtype], ats) for dtype in (u8, i8)]
            if None in words:
                return None
            bits = [self.emit(level, "bitcast", [word], ROW_B32) for word in words if word is not None]
            total = self.emit(level, "dot4_u8i8", [total, *bits], ROW_I32)
        return total
