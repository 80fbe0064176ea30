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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from ..ir.nodes import Op, Value
from ..ir.types import MASK, ROW_B32, ROW_F32, ROW_I32, DType, RowType, TensorType, TileType, b32, f32, i4, i32
from ..tile.ops import memory_of
from ..tile.plan import COSTLY, axes_of
from ..tile.schedule import Panels
from ..tile.semantics import ELEMENTWISE
from .matrix import MatrixLowering
from .pieces import CHUNK_BYTES, Piece
from .spread import Spread, SpreadLowering
from .state import Bound, Scalar, element_bytes, memory_dtype, row_dtype

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


class Place(NamedTuple):
    """An integer at the elements of a lane: scalar + row + number, a row of None being 0. aligned: the scalar is a
    multiple of it; row_aligned: so is the row. bound: row + number is less."""

    scalar: Scalar
    row: Value | None
    number: int
    aligned: int
    row_aligned: int
    bound: int


COUNTED = ("index", "i32", "i64")
"""Types of places: narrower ones might wrap."""
FREE = 1 << 62
"""What 0 is a multiple of."""


def power_of_two(value: Value) -> int | None:
    """The positive power of two that a value is, if it is one."""
    op = value.op
    while op is not None and op.name in ("full", "cast"):
        op = op.operands[0].op
    number = op.attributes["value"] if op is not None and op.name == "const" else 0
    return int(number) if isinstance(number, int) and number > 0 and number & (number - 1) == 0 else None


def forms_place(value: Value, extents: dict[str, int]) -> tuple[int, int] | None:
    """Of an integer what Place has as `aligned` and `bound`, if it is a place wherever pieces of these extents start:
    each a multiple of its extent."""
    op, t = value.op, value.type
    if not isinstance(t, TileType) or t.dtype.name not in COUNTED:
        return None
    if not axes_of(value):
        return (1, 1) if op is None or op.name != "const" else (FREE, max(1, int(op.attributes["value"]) + 1))
    if op is None:
        return None
    if op.name == "index":
        extent = extents.get(op.attributes["axis"])
        return None if extent is None else (extent, extent)
    if op.name in ("full", "cast"):
        return forms_place(op.operands[0], extents)
    if op.name not in ("add", "mul", "floordiv", "mod"):
        return None
    first, second = (forms_place(v, extents) for v in op.operands)
    if first is None or second is None:
        return None
    (aligned, bound), (other, more) = first, second
    if op.name == "add":
        return min(aligned, other), bound + more - 1
    factor = power_of_two(op.operands[1])
    if factor is None:
        return None
    if op.name == "mul":
        return min(FREE, aligned * factor), (bound - 1) * factor + 1
    if aligned % factor == 0:
        return (aligned // factor, (bound - 1) // factor + 1) if op.name == "floordiv" else (FREE, min(bound, factor))
    if factor % aligned == 0 and bound <= aligned:
        return (1, 1) if op.name == "floordiv" else (aligned, bound)
    return None


def number_at(value: Value, at: dict[str, int]) -> int:
    """A place where the axes have these coordinates, and scalars are 0."""
    op = value.op
    if op is None or (not axes_of(value) and op.name != "const"):
        return 0
    if op.name == "const":
        return int(op.attributes["value"])
    if op.name == "index":
        return at.get(op.attributes["axis"], 0)
    first, *rest = (number_at(v, at) for v in op.operands)
    if not rest:
        return first
    (second,) = rest
    return {"add": first + second, "mul": first * second, "floordiv": first // max(1, second),
            "mod": first % max(1, second)}[op.name]


@dataclass(frozen=True, slots=True)
class Computed:
    """What an operand is computed of: its loads, those first that have most bits, and the axis along which a lane has
    neighbours."""

    value: Value
    loads: tuple[Op, ...]
    along: str


def find_computed(low: MatrixLowering, value: Value, extents: dict[str, int]) -> Computed | None:
    """What a value is computed of, if it can be so in pieces of these extents of its two axes."""
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
            if isinstance(low.stride_classes.get(tensor.name), Panels) or t.dtype.name not in READ:
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


class Fetched(NamedTuple):
    """Of a load in one pass, by register along the axis of neighbours: a row, or a word with the element's place in
    it."""

    rows: list[tuple[Value, int | None]]


class Places:
    """Integers at the elements of a piece, where its axes are spread. aligned: of the piece's start along each axis.
    row_aligned: of the lanes there. mask: which lanes' elements at register coordinates are inside."""

    def __init__(self, low: SpreadLowering, aligned: dict[str, int], row_aligned: dict[str, int],
                 mask: Callable[[dict[str, int]], Value] | None = None) -> None:
        self.low, self.aligned, self.row_aligned, self.mask = low, aligned, row_aligned, mask
        self.bounds = aligned       # a piece starts at a multiple of its extent

    def of(self, value: Value, at: dict[str, int]) -> Place:
        op = value.op
        if op is not None and op.name == "const":
            number = int(op.attributes["value"])
            return Place(0, None, number, FREE, FREE, number + 1)
        if not axes_of(value):
            return Place(self.low.integer(value), None, 0, 1, FREE, 1)
        assert op is not None
        if op.name == "index":
            axis = op.attributes["axis"]
            spread, j = self.low.bound[axis].spread, at[axis]
            return Place(spread.origin, spread.lane(j), spread.numbers[j], self.aligned[axis], self.row_aligned[axis],
                         self.bounds[axis])
        first, *rest = (self.of(v, at) for v in op.operands)
        if not rest:
            return first
        (second,) = rest
        return self._sum(first, second) if op.name == "add" else self._by(op.name, first, second.number)

    def row(self, value: Value, at: dict[str, int], level: int) -> Value | None:
        """The row of an integer that is a place; None of others."""
        op = value.op
        if op is None or not axes_of(value) or op.name not in ("add", "mul", "floordiv", "mod") \
                or forms_place(value, self.bounds) is None:
            return None
        low, place = self.low, self.of(value, at)
        start = low.row_of(low.add(place.scalar, place.number))
        return start if place.row is None else low.emit(level, "add", [place.row, start], ROW_I32)

    def chosen(self, value: Value, at: dict[str, int]) -> Value | None:
        """Of a choice between two values by a place that no lane changes: that one."""
        op = value.op
        if op is None or op.name != "select" or op.operands[0].op is None or op.operands[0].op.name != "eq":
            return None
        sides = op.operands[0].op.operands
        if any(forms_place(v, self.bounds) is None for v in sides):
            return None
        places = [self.of(v, at) for v in sides]
        if any(place.row is not None or not isinstance(place.scalar, int) for place in places):
            return None
        first, second = (int(place.scalar) + place.number for place in places)  # type: ignore[arg-type]
        return op.operands[1 if first == second else 2]

    def address(self, load: Op, at: dict[str, int]) -> tuple[Value, Value, int]:
        """Base, offsets of the lanes, disp of an element."""
        low = self.low
        tensor = load.operands[0]
        base: Scalar = low.slot(f"{memory_of(tensor).name}.data") if memory_of(tensor) not in low.tensor_bases \
            else low.tensor_bases[memory_of(tensor)]
        size, disp, offsets = element_bytes(tensor.type.dtype), 0, None  # type: ignore[union-attr]
        for index, stride in zip(load.operands[1:], low.strides(tensor), strict=True):
            place, step = self.of(index, at), low.mul(stride, size)
            base = low.add(base, low.mul(place.scalar, step))
            if isinstance(step, int):
                disp += place.number * step
            else:
                base = low.add(base, low.mul(step, place.number))
            if place.row is None:
                continue
            far = self._rows("mul", place.row, low.row_of(step))
            offsets = far if offsets is None else self._rows("add", offsets, far)
        return low.value(base), low.constant(0, i32) if offsets is None else offsets, disp

    def look_up(self, load: Op, at: dict[str, int], level: int) -> Value:
        """An element of a table, whose place is computed. Lanes past the end of the depth have read 0, of which no
        place may come: they read nothing."""
        low, tensor = self.low, load.operands[0]
        assert self.mask is not None
        dtype = memory_dtype(tensor.type.dtype)  # type: ignore[union-attr]
        base: Scalar = low.tensor_bases.get(memory_of(tensor)) or low.slot(f"{memory_of(tensor).name}.data")
        offsets = low.constant(0, i32)
        for index, stride in zip(load.operands[1:], low.strides(tensor), strict=True):
            far = low.emit(level, "mul", [low.row(index, at), low.row_of(low.mul(stride, dtype.size_bytes))], ROW_I32)
            offsets = low.emit(level, "add", [offsets, far], ROW_I32)
        return low.emit(level, "gather", [low.value(base), offsets, self.mask(at)], RowType(row_dtype(dtype)),
                        dtype=dtype, scale=1, disp=0, masked=True)

    def _rows(self, name: str, a: Value, b: Value | int) -> Value:
        """Made once, as far outside as can be."""
        low = self.low
        other = low.constant(b, i32) if isinstance(b, int) else b
        depth = max(low.depths.get(a, 0), low.depths.get(other, 0))
        memo = low.levels[depth].memo
        key = ("place", name, a, other)
        if key not in memo:
            memo[key] = low.emit(depth, name, [a, other], ROW_I32)
        found: Value = memo[key]
        return found

    def _sum(self, a: Place, b: Place) -> Place:
        row = a.row if b.row is None else b.row if a.row is None else self._rows("add", a.row, b.row)
        return Place(self.low.add(a.scalar, b.scalar), row, a.number + b.number, min(a.aligned, b.aligned),
                     min(a.row_aligned, b.row_aligned), a.bound + b.bound - 1)

    def _by(self, name: str, a: Place, factor: int) -> Place:
        low = self.low
        if name == "mul":
            row = None if a.row is None else self._rows("mul", a.row, factor)
            return Place(low.mul(a.scalar, factor), row, a.number * factor, min(FREE, a.aligned * factor),
                         min(FREE, a.row_aligned * factor), (a.bound - 1) * factor + 1)
        quotient = name == "floordiv"
        if a.aligned % factor:      # the piece lies within one of the divisor's blocks
            scalar = low.scalar("s_floordiv" if quotient else "s_mod", a.scalar, factor)
            return Place(scalar, None, 0, 1, FREE, 1) if quotient else a._replace(scalar=scalar)
        scalar = low.scalar("s_floordiv", a.scalar, factor) if quotient else 0
        aligned = a.aligned // factor if quotient else FREE
        bound = (a.bound - 1) // factor + 1 if quotient else min(a.bound, factor)
        row, number = a.row, a.number
        if row is not None and row is not self.low.constant(0, i32):
            if a.row_aligned % factor and number >= a.row_aligned:
                row, number = self._rows("add", row, number), 0
            if quotient:
                made: Value | None = self._rows("sar", row, factor.bit_length() - 1)
            else:
                made = None if a.row_aligned % factor == 0 else self._rows("and", row, factor - 1)
        else:
            made = None
        inside = made is not None and not quotient and a.row_aligned % factor     # the row keeps its alignment
        number = number // factor if quotient else number % factor
        row_aligned = max(1, a.row_aligned // factor) if quotient else a.row_aligned if inside else FREE
        return Place(scalar, made, number, aligned, row_aligned, bound)


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
        self.waiting: list[list[Fetched]] = []

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
            fetched = [self._fetch(load, number) for load in self.found.loads]
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

    def _fetch(self, load: Op, number: int) -> Fetched:
        low = self.low
        tensor = load.operands[0]
        t = tensor.type
        assert isinstance(t, TensorType)
        size = element_bytes(t.dtype)
        spots = [self.places.address(load, self._at(j)) for j in range(self.group)]
        masks = [self._mask(number, j) for j in range(self.group)]
        shared = all(spot[:2] == spots[0][:2] and mask is masks[0] for spot, mask in zip(spots, masks, strict=True))
        places = sorted({disp for _, _, disp in spots})
        total = len(places) * size
        with low.located(load):
            if shared and total >= b32.size_bytes and places == list(range(places[0], places[0] + total, size)) \
                    and total & (total - 1) == 0 and self._is_aligned(load, min(total, CHUNK_BYTES), places[0]):
                base, offsets, first = spots[0][0], spots[0][1], places[0]
                words = self._words(base, offsets, first, total, masks[0])
                each = b32.size_bytes // size
                found = [divmod((disp - first) // size, each) for _, _, disp in spots]
                return Fetched([(words[word], place) for word, place in found])
            made: dict[tuple[Value, Value, int, Value], Value] = {}
            rows = list[tuple[Value, int | None]]()
            dtype = memory_dtype(t.dtype)
            for (base, offsets, disp), mask in zip(spots, masks, strict=True):
                key = (base, offsets, disp, mask)
                if key not in made:
                    made[key] = low.emit(low.depth, "gather", [base, offsets, mask], RowType(row_dtype(dtype)),
                                         dtype=dtype, scale=1, disp=disp, masked=True)
                rows.append((made[key], None))
            return Fetched(rows)

    def _words(self, base: Value, offsets: Value, first: int, total: int, mask: Value) -> list[Value]:
        """So many bytes of each lane, by 16 at most."""
        low, words = self.low, list[Value]()
        for at in range(0, total, CHUNK_BYTES):
            count = min(total - at, CHUNK_BYTES) // b32.size_bytes
            attributes = {"dtype": b32, "masked": True, "scale": 1, "disp": first + at}
            if count == 1:
                words.append(low.emit(low.depth, "gather", [base, offsets, mask], ROW_B32, **attributes))
                continue
            made = Op("load_run", [base, offsets, mask], [ROW_B32] * count, {**attributes, "gathered": True}, None,
                      low.location)
            low.finish(made)
            words += made.results
        return words

    def _is_aligned(self, load: Op, size_bytes: int, first: int) -> bool:
        """Whether what lanes read of a load starts at multiples of so many bytes."""
        tensor, size = load.operands[0], element_bytes(load.operands[0].type.dtype)  # type: ignore[union-attr]
        place = self.places.of(load.operands[-1], self._at(0))
        return self.low.in_lines(tensor) and first % size_bytes == 0 and place.aligned * size % size_bytes == 0 \
            and (place.row is None or place.row_aligned * size % size_bytes == 0)

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

    def _compute(self, stage: Value, number: int, fetched: list[Fetched], firsts: Sequence[int]) -> None:
        """Some chunks of each lane in a pass, to near memory."""
        low = self.low
        for load, found in zip(self.found.loads, fetched, strict=True):
            low.rows[load.result] = self._rows(load, found)
        for first in firsts:
            self._store(stage, number, first)
        for load in self.found.loads:
            del low.rows[load.result]

    def _rows(self, load: Op, fetched: Fetched) -> dict[tuple[int, ...], Value]:
        """The rows of a load, by its register coordinates."""
        low, t = self.low, load.result.type
        assert isinstance(t, TileType)
        made: dict[tuple[Value, int | None], Value] = {}
        rows: dict[tuple[int, ...], Value] = {}
        for j, (row, place) in enumerate(fetched.rows):
            if (row, place) not in made:
                value = row
                if place is not None:
                    value = low.emit(low.depth, "unpack", [row], RowType(row_dtype(t.dtype)),
                                     dtype=memory_dtype(t.dtype), place=place)
                made[row, place] = low.wrap(value, i4, low.depth) if t.dtype is i4 else value
            at = self._at(j)
            rows.setdefault(tuple(at[a] for a in t.axes), made[row, place])
        return rows

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
