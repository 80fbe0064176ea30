"""Places: integers that quotients and remainders by powers of two make of coordinates, as `k // 2` and `k % 128`.

Enters an index of a load along axes whose coordinates are known as a scalar, a row and a number: those of pieces that
are computed (computed_pieces.py), and those of runs (runs.py), of which a lane has neighbours. Leaves the same of what
the index is at each neighbour (`Place`), which makes one address for all of them; a quotient that neighbours share is
one load, elements that lie together come up to 16 bytes at once, and a remainder that no lane changes is a number in
the code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..ir.nodes import Op, Value
from ..ir.types import ROW_B32, ROW_I32, DType, RowType, TensorType, TileType, b32, i4, i32
from ..tile.affine import affine
from ..tile.ops import memory_of
from ..tile.plan import axes_of
from .pieces import CHUNK_BYTES
from .state import Scalar, element_bytes, memory_dtype, row_dtype

if TYPE_CHECKING:
    from .spread import SpreadLowering


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
MOST_CAST = 1 << 7
"""Numbers below this are the same in all types of integers."""
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
        number = int(op.attributes["value"]) if op is not None and op.name == "const" else -1
        return (1, 1) if number < 0 else (FREE, number + 1)
    if op is None:
        return None
    if op.name == "index":
        extent = extents.get(op.attributes["axis"])
        return None if extent is None else (extent, extent)
    if op.name in ("full", "cast"):
        return forms_place(op.operands[0], extents)
    if op.name not in ("add", "mul", "floordiv", "mod"):
        return None
    left, right = _factor_last(op)
    first, second = forms_place(left, extents), forms_place(right, extents)
    if first is None or second is None:
        return None
    (aligned, bound), (other, more) = first, second
    if op.name == "add":
        return min(aligned, other), bound + more - 1
    factor = power_of_two(right)
    if factor is None:
        return None
    if op.name == "mul":
        return min(FREE, aligned * factor), (bound - 1) * factor + 1
    if aligned % factor == 0:
        return (aligned // factor, (bound - 1) // factor + 1) if op.name == "floordiv" else (FREE, min(bound, factor))
    if factor % aligned == 0 and bound <= aligned:
        return (1, 1) if op.name == "floordiv" else (aligned, bound)
    return None


def _factor_last(op: Op) -> tuple[Value, Value]:
    """The operands, of a product by a power of two that last."""
    first, second = op.operands
    return (second, first) if op.name == "mul" and power_of_two(second) is None else (first, second)


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


class Element(NamedTuple):
    """Of a load: a row, or a word with the element's place in it."""

    row: Value
    place: int | None


class Places:
    """Integers at the elements of a piece, where its axes are spread. aligned: of the piece's start along each axis.
    row_aligned: of the lanes there. mask: which lanes' elements at register coordinates are inside."""

    def __init__(self, low: SpreadLowering, aligned: dict[str, int], row_aligned: dict[str, int],
                 mask: Callable[[dict[str, int]], Value] | None = None) -> None:
        self.low, self.aligned, self.row_aligned, self.mask = low, aligned, row_aligned, mask
        self.bounds = aligned       # a piece starts at a multiple of its extent

    def of(self, value: Value, at: dict[str, int]) -> Place:
        op = value.op
        number = int(op.attributes["value"]) if op is not None and op.name == "const" else -1
        if number >= 0:
            return Place(0, None, number, FREE, FREE, number + 1)
        if not axes_of(value):
            return Place(self.low.integer(value), None, 0, 1, FREE, 1)
        assert op is not None
        if op.name == "index":
            axis = op.attributes["axis"]
            spread, j = self.low.bound[axis].spread, at[axis]
            lane = spread.lane(j)
            return Place(spread.origin, None if lane is self.low.constant(0, i32) else lane, spread.numbers[j],
                         self.aligned[axis], self.row_aligned[axis], self.bounds[axis])
        first, *rest = (self.of(v, at) for v in (op.operands if len(op.operands) == 1 else _factor_last(op)))
        if not rest:
            return first
        (second,) = rest
        return self._sum(first, second) if op.name == "add" else self._by(op.name, first, second.number)

    def row(self, value: Value, at: dict[str, int], level: int) -> Value | None:
        """The row of an integer that is a place; None of others."""
        op = value.op
        if op is None or not axes_of(value):
            return None
        if op.name == "cast":
            number = self.number(op.operands[0], at)
            if number is None or not 0 <= number < MOST_CAST or not _dtype(value).is_integer:
                return None
            return self.low.constant(number, i32)
        if op.name not in ("add", "mul", "floordiv", "mod") or forms_place(value, self.bounds) is None:
            return None
        low, place = self.low, self.of(value, at)
        start = low.row_of(low.add(place.scalar, place.number))
        return start if place.row is None else low.emit(level, "add", [place.row, start], ROW_I32)

    def number(self, value: Value, at: dict[str, int]) -> int | None:
        """The place that a value is in all lanes, if it is known."""
        if not axes_of(value) or forms_place(value, self.bounds) is None:
            op = value.op
            return int(op.attributes["value"]) if op is not None and op.name == "const" else None
        place = self.of(value, at)
        return None if place.row is not None or not isinstance(place.scalar, int) else place.scalar + place.number

    def chosen(self, value: Value, at: dict[str, int]) -> Value | None:
        """Of a choice between two values by a place that no lane changes: that one."""
        op = value.op
        if op is None or op.name != "select" or op.operands[0].op is None or op.operands[0].op.name != "eq":
            return None
        first, second = (self.number(v, at) for v in op.operands[0].op.operands)
        return None if first is None or second is None else op.operands[1 if first == second else 2]

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
                row, number, a = self._rows("add", row, number), 0, a._replace(row_aligned=1)
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

    # Loads.

    def fetch(self, load: Op, ats: Sequence[dict[str, int]], masks: Sequence[Value | None],
              level: int) -> list[Element]:
        """The elements of a load at neighbours, each where its mask says that it is inside."""
        low = self.low
        t = load.operands[0].type
        assert isinstance(t, TensorType)
        size = element_bytes(t.dtype)
        spots = [self.address(load, at) for at in ats]
        shared = all(spot[:2] == spots[0][:2] and mask is masks[0] for spot, mask in zip(spots, masks, strict=True))
        places = sorted({disp for _, _, disp in spots})
        with low.located(load):
            if shared:
                runs = self._runs(load, ats[0], places, size)
                if runs:
                    base, offsets, _ = spots[0]
                    found: dict[int, Element] = {}
                    for first, total in runs:
                        words = self._words(base, offsets, first, total, masks[0], level)
                        for at in range(0, total, size):
                            word, place = divmod(at, b32.size_bytes)
                            found[first + at] = Element(words[word], place // size)
                    return [found[disp] for _, _, disp in spots]
            made: dict[tuple[Value, Value, int, Value | None], Value] = {}
            elements = list[Element]()
            dtype = memory_dtype(t.dtype)
            for (base, offsets, disp), mask in zip(spots, masks, strict=True):
                key = (base, offsets, disp, mask)
                if key not in made:
                    made[key] = low.emit(level, "gather", [base, offsets, *([] if mask is None else [mask])],
                                         RowType(row_dtype(dtype)), dtype=dtype, scale=1, disp=disp,
                                         masked=mask is not None)
                elements.append(Element(made[key], None))
            return elements

    def _runs(self, load: Op, at: dict[str, int], places: Sequence[int], size: int) -> list[tuple[int, int]]:
        """Elements at these places as (first byte, bytes) of words that lie together, each run at a multiple of its
        bytes, up to 16; none where a word has other elements, or starts anywhere."""
        runs, first = list[tuple[int, int]](), places[0]
        ends = [one + size for one, following in zip(places, [*places[1:], -1], strict=True) if one + size != following]
        for end in ends:
            total = end - first
            if total % b32.size_bytes or (total & total - 1 and total > CHUNK_BYTES) or not self._is_aligned(
                    load, at, min(total & -total, CHUNK_BYTES), first):
                return []
            runs.append((first, total))
            first = next((place for place in places if place >= end), end)
        return runs

    def _words(self, base: Value, offsets: Value, first: int, total: int, mask: Value | None,
               level: int) -> list[Value]:
        """So many bytes of each lane, by 16 at most."""
        low, words = self.low, list[Value]()
        operands = [base, offsets, *([] if mask is None else [mask])]
        for at in range(0, total, CHUNK_BYTES):
            count = min(total - at, CHUNK_BYTES) // b32.size_bytes
            attributes = {"dtype": b32, "masked": mask is not None, "scale": 1, "disp": first + at}
            if count == 1:
                words.append(low.emit(level, "gather", operands, ROW_B32, **attributes))
            else:
                words += low.emit_run(level, operands, [ROW_B32] * count, {**attributes, "gathered": True})
        return words

    def _is_aligned(self, load: Op, at: dict[str, int], size_bytes: int, first: int) -> bool:
        """Whether what lanes read of a load starts at multiples of so many bytes. first: that in no lane changes."""
        low, tensor, size = self.low, load.operands[0], element_bytes(load.operands[0].type.dtype)  # type: ignore[union-attr]
        if first % size_bytes:
            return False
        if low.in_lines(tensor):
            place = self.of(load.operands[-1], at)
            return place.aligned * size % size_bytes == 0 and (
                place.row is None or place.row_aligned * size % size_bytes == 0)
        return self._lies_at_multiples(load, at, size_bytes, size)

    def _lies_at_multiples(self, load: Op, at: dict[str, int], size_bytes: int, size: int) -> bool:
        """The same of a view of a tensor that starts at a line, by how far apart its elements lie."""
        low, root = self.low, memory_of(load.operands[0])
        if not low.in_lines(root):
            return False
        for index, stride in zip(load.operands[1:], low.strides(load.operands[0]), strict=True):
            place, step = self.of(index, at), low.mul(stride, size)
            if low.is_multiple(step, size_bytes):
                continue
            if not isinstance(step, int) or place.aligned * step % size_bytes or (
                    place.row is not None and place.row_aligned * step % size_bytes):
                return False
        return True

    def element(self, load: Op, found: Element, level: int) -> Value:
        """The row of an element, made once."""
        low, t = self.low, load.result.type
        assert isinstance(t, TileType)
        memo = low.levels[level].memo
        key = ("element", found, t.dtype)
        if key not in memo:
            value = found.row if found.place is None else low.emit(
                level, "unpack", [found.row], RowType(row_dtype(t.dtype)), dtype=memory_dtype(t.dtype),
                place=found.place)
            memo[key] = low.wrap(value, i4, level) if t.dtype is i4 else value
        row: Value = memo[key]
        return row


class RunPlaces(Places):
    """Integers where a lane has neighbours of an axis (runs.py)."""

    def __init__(self, low: SpreadLowering, lane: str) -> None:
        self.lane, self.bound = lane, low.bound[lane]
        self.piece = self.bound.run * low.lanes
        super().__init__(low, {lane: self.piece}, {lane: self.bound.run})

    @property
    def holds(self) -> bool:
        """Whether a lane's neighbours are where a multiple of their number begins, all of them inside."""
        return self.bound.mask is None and self.bound.parts == 1 and self._is_multiple(self.bound.offset)

    def _is_multiple(self, start: Scalar) -> bool:
        """Whether a coordinate is a multiple of a piece, as an extent less its lowest bits is: where pieces end."""
        low = self.low
        if low.is_multiple(start, self.piece) or isinstance(start, int):
            return low.is_multiple(start, self.piece)
        op = start.op
        if op is None:
            first, step = low.steps.get(start, (1, 1))
            return step % self.piece == 0 and self._is_multiple(first)
        rest = op.operands[1].op if op.name == "s_sub" else None
        mask = rest.operands[1].op if rest is not None and rest.name == "s_and" else None
        return rest is not None and rest.operands[0] is op.operands[0] and mask is not None \
            and mask.name == "s_const" and mask.attributes["value"] & self.piece - 1 == self.piece - 1

    def row(self, value: Value, at: dict[str, int], level: int) -> Value | None:
        return super().row(value, at, level) if affine(value) is None else None

    def of(self, value: Value, at: dict[str, int]) -> Place:
        low, bound = self.low, self.bound
        if axes_of(value) and self.lane not in axes_of(value):
            return Place(low.integer(value, at), None, 0, 1, FREE, 1)
        if value.op is None or value.op.name != "index":
            return super().of(value, at)
        number, place = divmod(at[self.lane], bound.run)
        lane = low.bits(0, "shl", low.iota(), bound.run.bit_length() - 1)
        return Place(low.coordinate(self.lane, number * bound.run), lane, place, self.piece, bound.run, self.piece)

    def load(self, load: Op, at: dict[str, int], level: int) -> Value | None:
        """The row of a load whose indices are places; None of another."""
        low, bound = self.low, self.bound
        if not goes_by_places(load, self.lane, self.piece):
            return None
        number, place = divmod(at[self.lane], bound.run)
        ats = [{**at, self.lane: number * bound.run + j} for j in range(bound.run)]
        memo = low.levels[level].memo
        key = ("run", load, tuple(sorted(ats[0].items())))
        if key not in memo:
            memo[key] = self.fetch(load, ats, [None] * bound.run, level)
        elements: list[Element] = memo[key]
        return self.element(load, elements[place], level)


def goes_by_places(load: Op, axis: str, piece: int) -> bool:
    """Whether the indices of a load that an axis moves are places, and not all of them multiples of its coordinate.
    piece: what of the axis is at hand."""
    moving = [index for index in load.operands[1:] if axis in axes_of(index)]
    return any(affine(index) is None for index in moving) and all(
        axes_of(index) == (axis,) and forms_place(index, {axis: piece}) is not None for index in moving) and all(
        affine(index) is not None for index in load.operands[1:] if index not in moving)


def _dtype(value: Value) -> DType:
    assert isinstance(value.type, TileType)
    return value.type.dtype
