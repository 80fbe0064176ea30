"""Pieces of operands that are computed: weights of few bits with scales of blocks, activations that a norm scales.

Enters a value of 16 bits that is computed, element by element, from what is loaded along the two axes of the operand;
leaves the same piece in near memory as Piece does, so that what multiplies it need not know. A lane takes neighbours
along the axis along which memory is contiguous, as many as their narrowest load has in 16 bytes, up to four chunks:

    fetch       what lies in memory to registers, before the products of the piece at hand
    finish      the elements, computed and rounded, to near memory, among the last of these products, which hide the way

Memory is read as it lies: so a weight of 4 bits takes an eighth of a register until its element is made, once for all
warps. An index may have quotients and remainders by powers of two, as `k // 2` of halves of bytes and `k // 128` of
scales do. At a lane's element it is a scalar, a row and a number (`Place`), which makes one address for all neighbours;
a quotient that neighbours share is one load, and a remainder that no lane changes is a number in the code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from ..ir.nodes import Op, Value
from ..ir.types import MASK, ROW_B32, ROW_F32, ROW_I32, DType, TensorType, TileType, b32, f32, i32
from ..tile.plan import COSTLY, axes_of
from ..tile.schedule import Panels
from ..tile.semantics import ELEMENTWISE
from .pieces import CHUNK_BYTES, Piece
from .places import Element, Places, forms_place, number_at
from .spread import Spread, SpreadLowering
from .state import Bound, Scalar, element_bytes

MOST_CHUNKS = 4
"""Of a lane at once."""
MOST_HELD = 32
"""Registers of a lane that may wait for the products."""
MOST_OPS = 12
"""For each element (plan.py: COSTLY). A lane of a warp makes half an element for each product of 16 x 8 x 16, of which
an A100 starts one in 8 cycles for each of its schedulers: a dozen instructions are made in the time of the products."""
MOST_LOOKED_UP = 256
"""Elements of a table."""
READ = frozenset({"f32", "bf16", "f16", "f8e4m3", "f8e5m2", "i8", "u8", "i16", "i32", "i4"})


@dataclass(frozen=True, slots=True)
class Computed:
    """What an operand is computed of: its loads, those first that have most bits, and the axis along which a lane has
    neighbours."""

    value: Value
    loads: tuple[Op, ...]
    along: str


def find_computed(strides: Mapping[str, object], value: Value, extents: dict[str, int]) -> Computed | None:
    """What a value is computed of, if it can be so in pieces of these extents of its two axes. strides: of tensors."""
    if set(axes_of(value)) != set(extents):
        return None
    pending, seen, loads, ops = [value], set[Value](), list[Op](), 0
    while pending:
        v = pending.pop()
        t = v.type
        assert isinstance(t, TileType)
        if v in seen or not t.axes or forms_place(v, extents) is not None:
            continue
        seen.add(v)
        if v.op is None or not set(t.axes) <= set(extents) or (t.dtype.bits > 32 and t.dtype.name != "index"):
            return None
        if v.op.name == "load":
            tensor, *indices = v.op.operands
            if isinstance(strides.get(tensor.name), Panels) or t.dtype.name not in READ:
                return None
            looked_up = [index for index in indices if forms_place(index, extents) is None]
            if looked_up and not _is_table(tensor):
                return None
            pending += looked_up
            if not looked_up:
                loads.append(v.op)
        elif v.op.name in ELEMENTWISE - {"asm"} or v.op.name == "full":
            ops += 0 if v.op.name in ("full", "cast") else COSTLY.get(v.op.name, 1)
            pending += v.op.operands
        else:
            return None
    whole = [load for load in loads if set(axes_of(load.result)) == set(extents)]
    if not whole or ops > MOST_OPS:
        return None
    loads.sort(key=lambda load: (load not in whole, -load.result.type.dtype.bits))  # type: ignore[union-attr]
    along = axes_of(loads[0].operands[-1])
    return Computed(value, tuple(loads), along[0]) if len(along) == 1 else None


def _is_table(tensor: Value) -> bool:
    """Whether it surely stays in the first cache, where elements are looked up."""
    t = tensor.type
    assert isinstance(t, TensorType)
    return all(isinstance(dim, int) for dim in t.dims) and prod(
        dim for dim in t.dims if isinstance(dim, int)) <= MOST_LOOKED_UP


class ComputedPiece(Piece):
    """found: what it is computed of. dtype: of the elements in near memory."""

    low: SpreadLowering

    def __init__(self, low: SpreadLowering, found: Computed, outer: str, depth_axis: str, extent: int, depth: int,
                 at: int, dtype: DType) -> None:
        op = found.value.op
        assert op is not None
        self.low, self.op, self.found, self.outer, self.depth_axis = low, op, found, outer, depth_axis
        self.extent, self.depth, self.at, self.dtype, self.size = extent, depth, at, dtype, dtype.size_bytes
        self.along_depth = found.along == depth_axis
        self.origin = found.loads[0]
        self.arrange()
        self.waiting: list[list[list[Element]]] = []

    def prepare(self, start: Scalar, rest: Scalar) -> None:
        low, found = self.low, self.found
        level, depth = low.depth, low.open[self.depth_axis]
        self.base, self.step = depth.offset, self.depth     # a place is a coordinate of the depth
        self.whole_pieces = depth.divisor % self.depth == 0
        along, divisor = (self.depth_axis, depth.divisor) if self.along_depth else (
            self.outer, low.open[self.outer].divisor)
        self.group = self._group(along, divisor)
        self.runs = divisor % self.group == 0       # neighbours are inside, or outside, together
        length = self.row_bytes // self.size
        threads, groups = low.warps * low.lanes, length // self.group
        self.rows_of_pass = threads // groups
        self.passes = self.rows * groups // threads
        thread = low.thread()
        row = low.bits(0, "shr", thread, groups.bit_length() - 1)
        first = low.bits(0, "and", thread, groups - 1)
        chunk = low.bits(0, "shl", first, (self.group // self.chunk_elements).bit_length() - 1)
        self.target = low.swizzled(row, chunk, self.row_bytes)
        elements = low.bits(0, "shl", first, self.group.bit_length() - 1)
        last = low.row_of(low.sub(rest, 1))

        def moved(rows: Value, number: int) -> Value:
            return low.emit(0, "add", [rows, low.constant(number, i32)], ROW_I32) if number else rows

        def inside(rows: Value, last: Value) -> Value:
            return low.emit(level, "min", [rows, last], ROW_I32)

        numbers = list(range(self.group))
        self.depth_lane = elements if self.along_depth else row
        self.spreads: list[dict[str, Spread]] = []
        for number in range(self.passes):
            passed = number * self.rows_of_pass
            if self.along_depth:
                outer = Spread(start, [inside(moved(row, passed), last)], [0])
                deep = Spread(0, [elements], numbers)
            else:
                deep = Spread(0, [row], [passed])
                outer = Spread(start, [inside(elements, low.row_of(low.sub(rest, self.group)))], numbers) \
                    if self.runs else Spread(start, [inside(moved(elements, j), last) for j in numbers],
                                             [0] * self.group)
            self.spreads.append({self.outer: outer, self.depth_axis: deep})
        row_aligned = {self.outer: 1, self.depth_axis: self.group if self.along_depth else 1}
        if not self.along_depth and self.runs:
            row_aligned[self.outer] = self.group
        self.places = Places(low, {self.outer: self.extent, self.depth_axis: self.depth}, row_aligned,
                             lambda at: self._mask(self.passed, at[found.along]))
        words = self.passes * sum(-(-self._bytes(load, along, self.group) // b32.size_bytes)
                                  for load in self.found.loads)
        self.waits = words <= MOST_HELD

    def _group(self, along: str, divisor: int) -> int:
        """How many neighbours a lane takes."""
        low, group = self.low, self.chunk_elements * MOST_CHUNKS
        length = self.row_bytes // self.size
        fits = self.rows * length // (low.warps * low.lanes)        # elements of a lane
        while group > self.chunk_elements and (group > min(length, fits) or divisor % group or any(
                self._bytes(load, along, group) > low.facts.run_bytes for load in self.found.loads)):
            group //= 2
        return group

    def _bytes(self, load: Op, along: str, group: int) -> int:
        """That a lane reads of a load for so many neighbours."""
        places = {tuple(number_at(v, {along: j}) for v in load.operands[1:]) for j in range(group)}
        t = load.operands[0].type
        assert isinstance(t, TensorType)
        return len(places) * element_bytes(t.dtype)

    # To near memory.

    def copy(self, stage: Value, start: Scalar, rest: Scalar) -> None:
        """What the piece is computed of, from coordinate `start` of the depth on, of which `rest` are left."""
        self.start, self.rest = start, rest
        self.waiting = []
        for number in range(self.passes):
            self._enter(number)
            ats = [self._at(j) for j in range(self.group)]
            masks = [self._mask(number, j) for j in range(self.group)]
            fetched = [self.places.fetch(load, ats, masks, self.low.depth) for load in self.found.loads]
            if self.waits:
                self.waiting.append(fetched)
            else:
                self._compute(stage, number, fetched, self._firsts())
            self._leave()

    def _enter(self, number: int) -> None:
        """A level in which the axes are spread as they are in a pass."""
        low, self.passed = self.low, number
        low.enter_again()
        for axis, spread in self.spreads[number].items():
            here = replace(spread, origin=self.start) if axis == self.depth_axis else spread
            low.bound[axis] = Bound(here.origin, len(here.numbers), False, None, low.depth, spread=here)
        low.places = self.places

    def _leave(self) -> None:
        low = self.low
        for axis in (self.outer, self.depth_axis):
            del low.bound[axis]
        low.places = None
        low.leave()

    def _at(self, j: int) -> dict[str, int]:
        """Register coordinates of a lane's neighbour."""
        return {self.outer: 0 if self.along_depth else j, self.depth_axis: j if self.along_depth else 0}

    def _mask(self, number: int, j: int) -> Value:
        """Which lanes' neighbour lies before the end of the depth."""
        low = self.low
        if self.whole_pieces:       # all of the piece, or nothing: stages ahead of the end are not read
            left, mine = self.rest, low.constant(0, i32)
        else:
            passed = (0 if self.runs else j) if self.along_depth else number * self.rows_of_pass
            left, mine = low.sub(self.rest, passed), self.depth_lane
        depth = max(low.depth_of(left), low.depths.get(mine, 0))
        memo = low.levels[depth].memo
        key = ("inside", mine, left)
        if key not in memo:
            memo[key] = low.emit(depth, "cmp", [mine, low.row_of(left)], MASK, cond="lt")
        found: Value = memo[key]
        return found

    def finish(self, stage: Value, part: int = 0, parts: int = 1) -> None:
        firsts = self._firsts()
        total = self.passes * len(firsts)
        mine = range(total * part // parts, total * (part + 1) // parts)
        for number, fetched in enumerate(self.waiting):
            chunks = [first for chunk, first in enumerate(firsts) if number * len(firsts) + chunk in mine]
            if chunks:
                self._enter(number)
                self._compute(stage, number, fetched, chunks)
                self._leave()

    def _firsts(self) -> Sequence[int]:
        """Of a lane's chunks in a pass."""
        return range(0, self.group, self.chunk_elements)

    def _compute(self, stage: Value, number: int, fetched: list[list[Element]], firsts: Sequence[int]) -> None:
        """Some chunks of each lane in a pass, to near memory."""
        low = self.low
        for load, found in zip(self.found.loads, fetched, strict=True):
            rows: dict[tuple[int, ...], Value] = {}
            for j, element in enumerate(found):
                at = self._at(j)
                rows.setdefault(tuple(at[a] for a in axes_of(load.result)),
                                self.places.element(load, element, low.depth))
            low.rows[load.result] = rows
        for first in firsts:
            self._store(stage, number, first)
        for load in self.found.loads:
            del low.rows[load.result]

    def _store(self, stage: Value, number: int, first: int) -> None:
        """A chunk of each lane, computed."""
        low = self.low
        op = self.found.value.op
        assert op is not None
        # Rounding a pair rounds each: what is rounded anyway is not rounded before.
        wide = op.operands[0] if op.name == "cast" and op.operands[0].type.dtype is f32 else op.result  # type: ignore[union-attr]
        rows = []
        for j in range(first, first + self.chunk_elements):
            row = low.row(wide, self._at(j))
            if row.op is not None and row.op.name == "round_to" and row.op.attributes["dtype"] is self.dtype:
                row = row.op.operands[0]
            if not (self.whole_pieces or self.runs):
                row = low.emit(low.depth, "select", [self._mask(number, j), row, low.constant(0.0, f32)], ROW_F32)
            rows.append(row)
        words = [low.emit(low.depth, "pack2", rows[at:at + 2], ROW_B32, dtype=self.dtype)
                 for at in range(0, len(rows), 2)]
        if self.runs and not self.whole_pieces:
            zero = low.emit(0, "bitcast", [low.constant(0, i32)], ROW_B32)
            words = [low.emit(low.depth, "select", [self._mask(number, first), word, zero], ROW_B32) for word in words]
        turned = first // self.chunk_elements * CHUNK_BYTES
        target = low.bits(low.depth, "xor", self.target, turned) if turned else self.target
        low.effect("store_run", [stage, target, *words], dtype=b32, gathered=True, scale=1, near=True, disjoint=True,
                   streaming=False, disp=self.at + number * self.rows_of_pass * self.row_bytes)
