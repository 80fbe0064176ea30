"""Sums of products whose depths lie between each other, as one product.

Enters a canonical tile function. Leaves, in place of a sum of contractions

    x[m, h, 0] @ low[n, h] + x[m, h, 1] @ high[n, h]          halves of a byte that are neighbours along the depth
    x[m, b, j] @ low[n, b, j] + x[m, b, j + 16] @ high[n, b, j]      that are half a block of 32 apart (GGUF's)

one contraction over all places k of x, in whose other operand a digit of k says which of them stands there:

    x[m, k] @ select(k % 2 == 0, low[n, k // 2], high[n, k // 2])

or by how far its bits are shifted, where the two differ in nothing but which bits of a byte they are of,
where the caller says that this serves: matrix instructions take it, and read x as it lies. The sum may be that of loops
in order, which go on over the depth, and a single contraction over axes that are digits of a place. Holds: the meaning
is the same, but for the order of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from math import prod
from typing import NamedTuple

from ..ir.checker import union_of_axes
from ..ir.nodes import Block, Function, Op, Value
from ..ir.rewriter import eliminate_dead
from ..ir.types import DType, TensorType, TileType, Type, bool_, index, u8
from .affine import Affine, affine
from .loop_products import spread
from .ops import TILE_OPS, load_of
from .plan import axes_of
from .product_parts import EXTENT_OPS, axes_brought
from .semantics import ELEMENTWISE

Serves = Callable[[], bool]
Key = str | Value
"""Of a range that the sum goes over: its axis, or the counter of a loop."""
COPIED = (ELEMENTWISE - {"asm"}) | {"load", "const", "index"}


class _Digit(NamedTuple):
    """Of a place: place // coefficient % extent. Of the highest one there may be any number. key: what it stands for;
    None: which term."""

    coefficient: int
    extent: int | None
    key: Key | None


def join_depths(function: Function, serves: Serves, fewest: int = 1) -> bool:
    """In place; whether the sums of a loop over tiles were joined. serves: whether the function as it is then does.
    fewest: products of a sum."""
    for tiles in [op for op in function.walk() if op.name == "tiles" and op.attributes["parallel"]]:
        block = tiles.blocks[0]
        before, head = list(block.ops), list(function.body.ops)
        taken = {axis for op in function.walk() for axis in axes_brought(op)}
        depths: list[_Depth] = []
        joined: list[tuple[Op, list[Value]]] = []
        for op in before:
            sums = _of_loop(op) if op.blocks else _of_tree(op, block)
            known = list(depths)
            if not sums or min(len(found.terms) for found in sums) < fewest or not all(
                    found.write(taken, depths) for found in sums):
                depths = known
                continue
            at, results = block.ops.index(op), list(op.results)
            block.ops[at:at + 1] = [made for found in sums for made in found.ops]
            joined.append((op, results))
            for found, result in zip(sums, results, strict=True):
                result.move_to(found.ops[-1])
                found.ops[-1].results = [result]
                if found.view is not None:
                    tensor = found.view.operands[0].op
                    place = 0 if tensor is None else function.body.ops.index(tensor) + 1
                    function.body.ops[place:place] = [*found.head, found.view]
        if not joined:
            continue
        eliminate_dead(function, TILE_OPS)
        walked = {op.attributes["axis"] for op in function.walk() if op.name == "index"}
        block.ops[:] = [op for op in block.ops if op.name != "whole" or op.attributes["axis"] in walked]
        if serves():
            return True
        function.body.ops[:], block.ops[:] = head, before
        for op, results in joined:
            op.results = results
            for result in results:
                result.move_to(op)
    return False


@dataclass(slots=True)
class _Depth:
    """A depth that sums were joined to. place: along it. which: of several products stands there. made: what was made
    of places, by what it is. views: of tensors."""

    digits: tuple[_Digit, ...]
    extent: Value
    place: Value
    which: Value | None
    values: dict[Value, Value]
    made: dict[object, Value]
    views: dict[Value, Value]


class _Sum:
    """terms: contractions over the same axes. begin: what they are added to. ranges: start and stop of what they go
    over. inside: ops that go away with their loops.

    ops: what stands for it. view, head: of x, if its dimensions are not one yet, and what that is made of."""

    def __init__(self, result: Value, terms: Sequence[Op], begin: Value | None, ranges: dict[Key, tuple[Value, Value]],
                 inside: set[Op]) -> None:
        self.result, self.terms, self.begin, self.ranges, self.inside = result, list(terms), begin, ranges, inside
        self.location = terms[0].location
        self.ops: list[Op] = []
        self.head: list[Op] = []
        self.view: Op | None = None

    def write(self, taken: set[str], depths: list[_Depth]) -> bool:
        """Whether there is a way; then the ops are there. taken: names of axes. depths: those of other sums, to which
        that of this one is added."""
        tensors = dict.fromkeys(load.operands[0] for v in self.terms[0].operands if (load := load_of(v)) is not None)
        return any(self._write(tensor, taken, depths) for tensor in tensors)

    def _write(self, tensor: Value, taken: set[str], depths: list[_Depth]) -> bool:
        """tensor: of the operands that are read as they lie."""
        self.ops, self.head, self.view = [], [], None
        read, other = list[Value](), list[Value]()
        for term in self.terms:
            mine = [v for v in term.operands if (load := load_of(v)) is not None and load.operands[0] is tensor]
            if not mine or _dtype(mine[0]) is not _dtype((read or mine)[0]):
                return False
            read.append(mine[0])
            other += [v for v in term.operands if v is not mine[0]]
        loads = [load for v in read if (load := load_of(v)) is not None]
        found = self._digits(loads) if len(other) == len(read) else None
        if found is None or len({_dtype(v) for v in other}) > 1:
            return False
        first, digits, order = found
        if not all(self._copies(v) for v in (*other, *loads[0].operands[1:1 + first])):
            return False
        self._settle(digits, tensor, first, taken, depths)
        place, which = self.depth.place, self.depth.which
        *others, chosen = (self._copy(other[number]) for number in order)
        shifted = None if which is None or len(others) != 1 else self._shifted(others[0], chosen, which)
        for number, value in reversed(list(enumerate(others if shifted is None else []))):
            assert which is not None
            here = self._emit("eq", [which, self._number(number)], bool_)
            chosen = self._emit("select", [here, value, chosen], _dtype(chosen))
        chosen = shifted or chosen
        sides = [self._read(read[0], first, place), chosen]
        type = self.result.type
        assert isinstance(type, TileType)
        (axis,) = axes_of(place)
        if tuple(a for a in union_of_axes(sides) if a != axis) != type.axes:
            sides.reverse()
        self._op("contract", sides, type, over=[axis])
        if self.begin is not None:
            self._op("add", [self.begin, self.ops[-1].result], type)
        return True

    # Where the elements of x lie.

    def _digits(self, loads: Sequence[Op]) -> tuple[int, list[_Digit], list[int]] | None:
        """The first dimension that the sum goes over, the digits of a place from it on, the lowest first, and the
        terms in the order of their places."""
        keys = set(self.ranges)
        forms = [[affine(v) for v in load.operands[1:]] for load in loads]
        if any(form is None for mine in forms for form in mine):
            return None
        known = [[form for form in mine if form is not None] for mine in forms]
        first = next((number for number, form in enumerate(known[0]) if keys & {*form.axes, *form.scalars}), None)
        sizes = _sizes(loads[0].operands[0])
        if first is None or None in sizes[first + 1:] or not _has_named_sizes(loads[0].operands[0]) or any(
                mine[:first] != known[0][:first] for mine in known):
            return None
        flat = []
        for mine in known:
            total = Affine()
            for form, size in zip(mine[first:], [1, *sizes[first + 1:]], strict=True):
                assert size is not None
                total = total.scaled(size).plus(form)
            flat.append(total)
        steps: dict[Key, int] = dict([*flat[0].axes.items(), *flat[0].scalars.items()])
        if steps.keys() != keys or any((form.axes, form.scalars) != (flat[0].axes, flat[0].scalars) for form in flat):
            return None
        order = sorted(range(len(flat)), key=lambda number: flat[number].constant)
        starts = [flat[number].constant for number in order]
        apart = {b - a for a, b in pairwise(starts)}
        if starts[0] != 0 or len(apart) > 1:
            return None
        digits = [_Digit(step, self._extent(key), key) for key, step in steps.items()]
        digits += [_Digit(step, len(loads), None) for step in apart]
        digits.sort(key=lambda digit: digit.coefficient)
        below = 1
        for digit in digits:
            if digit.coefficient != below or (digit.extent is None and digit is not digits[-1]):
                return None
            below *= digit.extent or 1
        if len(digits) < 2 or any(digit.coefficient & digit.coefficient - 1 for digit in digits):
            return None
        return first, digits, order

    def _extent(self, key: Key) -> int | None:
        return _constant(self.ranges[key][1])

    def _settle(self, digits: Sequence[_Digit], tensor: Value, first: int, taken: set[str],
                depths: list[_Depth]) -> None:
        """Find the depth: that of another sum, or a new one."""
        extent = self._total(digits[-1], tensor, first)
        for depth in depths:
            if depth.digits == tuple(digits) and _is_same(depth.extent, extent):
                self.depth, self.ops = depth, []
                return
        key = digits[-1].key or digits[0].key
        name = key if isinstance(key, str) else key.name if key is not None else ""
        axis = next(made for n in count() if (made := f"{name}_{n}" if n else name) not in taken)
        taken.add(axis)
        self.ops.append(Op("whole", [self._number(0), extent], (), {"axis": axis}, None, self.location))
        place = self._op("index", [], TileType(index, (axis,)), axis=axis)
        self.depth = _Depth(tuple(digits), extent, place, None, {}, {}, {})
        self.depth.which = self._take_digits(digits, place)
        depths.append(self.depth)

    def _total(self, highest: _Digit, tensor: Value, first: int) -> Value:
        """How many places there are: the extent of a tensor's last dimension, if all of that was split."""
        if highest.key is None:
            return self._number(highest.coefficient * (highest.extent or 1))
        most, split = self.ranges[highest.key][1], _before_split(tensor, first)
        sizes = _sizes(tensor)[first + 1:]
        if split is None or tensor.op is None or highest.coefficient != prod(size or 0 for size in sizes) \
                or not _is_same(most, tensor.op.operands[1 + first]):
            return self._emit("mul", [most, self._number(highest.coefficient)], index)
        return self._extents(split, self.ops)[-1]

    def _extents(self, tensor: Value, ops: list[Op]) -> list[Value]:
        t = tensor.type
        assert isinstance(t, TensorType)
        return list(tensor.op.operands[1:]) if tensor.op is not None else [
            self._number(dim, ops) if isinstance(dim, int) else
            self._op("dim", [], TileType(index), ops, name=dim) for dim in t.dims]

    def _take_digits(self, digits: Sequence[_Digit], place: Value) -> Value | None:
        """Have axes and counters as digits of a place. Gives which term it is."""
        which = None
        for coefficient, extent, key in digits:
            value = place
            if extent is not None and key is not digits[-1].key:
                value = self._emit("mod", [value, self._number(coefficient * extent)], index)
            if coefficient > 1:
                value = self._emit("floordiv", [value, self._number(coefficient)], index)
            if key is None:
                which = value
            elif isinstance(key, str):
                self.depth.made["index", key] = value
            else:
                self.depth.values[key] = value
        return which

    def _read(self, value: Value, first: int, place: Value) -> Value:
        """An operand, at a place."""
        op = value.op
        assert op is not None
        if op.name == "cast":
            return self._emit("cast", [self._read(op.operands[0], first, place)], _dtype(value))
        tensor, *indices = op.operands
        if first + 1 < len(indices):
            tensor = _before_split(tensor, first) or self.depth.views.get(tensor) or self._joined(tensor, first)
        return self._emit("load", [tensor, *(self._copy(v) for v in indices[:first]), place], _dtype(value))

    def _joined(self, tensor: Value, first: int) -> Value:
        """A tensor whose dimensions are one from the first of them on: of a view that leaves those before, what it is
        of."""
        t, root = tensor.type, tensor
        assert isinstance(t, TensorType)
        if tensor.op is not None and tensor.op.attributes["groups"][:first] == [[1, 1]] * first and \
                _dtype(tensor.op.operands[0]) is t.dtype and _has_named_sizes(tensor.op.operands[0]):
            root = tensor.op.operands[0]
        sizes = self._extents(root, self.head)
        merged = sizes[first]
        for size in sizes[first + 1:]:
            merged = self._op("mul", [merged, size], TileType(index), self.head)
        groups = [[1, 1]] * first + [[len(sizes) - first, 1]]
        self.view = Op("view", [root, *sizes[:first], merged], (TensorType(t.dtype, ("?",) * (first + 1)),),
                       {"groups": groups}, None, self.location)
        self.depth.views[tensor] = self.view.result
        return self.view.result

    # Copies.

    def _depends(self, value: Value) -> bool:
        """Whether a value is none beside the sum."""
        return value in self.ranges or value.op in self.inside or any(axis in self.ranges for axis in axes_of(value))

    def _copies(self, value: Value) -> bool:
        """Whether a value can be copied: it is made by ops that take elements one by one, from memory too."""
        pending, seen = [value], set[Value]()
        while pending:
            v = pending.pop()
            if v in seen or v in self.ranges or not self._depends(v):
                continue
            seen.add(v)
            if v.op is None or v.op.name not in COPIED:
                return False
            pending += v.op.operands[v.op.name == "load":]
        return True

    def _copy(self, value: Value) -> Value:
        """A value where axes and counters are digits; the same once."""
        if value in self.depth.values or not self._depends(value):
            return self.depth.values.get(value, value)
        op = value.op
        assert op is not None
        axis = op.attributes.get("axis") if op.name == "index" else None
        if axis is not None and ("index", axis) in self.depth.made:
            self.depth.values[value] = self.depth.made["index", axis]
            return self.depth.values[value]
        operands = [v if isinstance(v.type, TensorType) else self._copy(v) for v in op.operands]
        key = (op.name, *operands, str(sorted(op.attributes.items())), _dtype(value))
        if key not in self.depth.made:
            made = spread(op, self.depth.values, [])
            self.ops.append(made)
            self.depth.made[key] = made.result
        self.depth.values[value] = self.depth.made[key]
        return self.depth.made[key]

    # Halves.

    def _shifted(self, low: Value, high: Value, which: Value) -> Value | None:
        """What is `low` of the lower bits of a byte, and `high` of the upper ones, as one value of bits that a shift by
        `which` brings; None if they differ in more."""
        known: dict[tuple[Value, Value], Value | None] = {}

        def merge(a: Value, b: Value) -> Value | None:
            if a is b:
                return a
            if (a, b) not in known:
                known[a, b] = shift(a, b) or again(a, b)
            return known[a, b]

        def shift(a: Value, b: Value) -> Value | None:
            byte, mask = _masked(a)
            above, upper = _masked(b)
            amount = _shift_of(above, byte)
            if mask is None or amount is None or mask != (1 << amount) - 1 or mask != (
                    upper if upper is not None else 0xFF >> amount if _is_byte(byte) else None):
                return None
            dtype = _dtype(byte)
            by = self._emit("cast", [self._emit("mul", [which, self._number(amount)], index)], dtype)
            full = self._op("const", [], TileType(dtype), value=mask)
            return self._emit("and", [self._emit("shr", [byte, by], dtype), full], dtype)

        def again(a: Value, b: Value) -> Value | None:
            if a.op is None or b.op is None or a.op.name != b.op.name or a.op.name not in ELEMENTWISE \
                    or a.op.attributes != b.op.attributes or _dtype(a) is not _dtype(b):
                return None
            merged = [merge(v, other) for v, other in zip(a.op.operands, b.op.operands, strict=True)]
            return None if None in merged else self._emit(a.op.name, [v for v in merged if v is not None], _dtype(a))

        return merge(low, high)

    def _op(self, opcode: str, operands: list[Value], type: Type, ops: list[Op] | None = None,
            **attributes: object) -> Value:
        op = Op(opcode, operands, (type,), attributes, None, self.location)
        (self.ops if ops is None else ops).append(op)
        return op.result

    def _emit(self, name: str, operands: list[Value], dtype: DType) -> Value:
        return self._op(name, operands, TileType(dtype, union_of_axes(operands)))

    def _number(self, value: int, ops: list[Op] | None = None) -> Value:
        return self._op("const", [], TileType(index), ops, value=value)


def _of_tree(op: Op, block: Block) -> list[_Sum]:
    """A sum of contractions, or a single one, over axes of `whole`, that is no part of such a sum."""
    terms = _terms(op.result, None) if op.name in ("add", "contract") else None
    if not terms or any(other.name == "add" and op.result in other.operands and _terms(other.result, None)
                        for other in block.ops):
        return []
    ranges: dict[Key, tuple[Value, Value]] = {
        axis: (other.operands[0], other.operands[1]) for other in block.ops for axis in axes_brought(other)
        if other.name == "whole" and axis in terms[0].attributes["over"]}
    found = _sum(op.result, terms, None, ranges, set())
    return [] if found is None else [found]


def _of_loop(loop: Op) -> list[_Sum]:
    """What loops in order, one in the other, add up; nothing if one of their results is something else."""
    ranges: dict[Key, tuple[Value, Value]] = {}
    inside: set[Op] = set()
    level, results = loop, len(loop.results)
    while True:
        body = level.blocks[0]
        if level.name not in ("each", "tiles") or level.attributes["parallel"] or not results or (
                len(level.results) != results or level.attributes.get("step", 1) != 1):
            return []
        carried, bounds = body.arguments[-results:], level.operands[:-results]
        keys: list[Key] = list(level.attributes["axes"] if level.name == "tiles" else body.arguments[:-results])
        ranges.update(zip(keys, zip(bounds[::2], bounds[1::2], strict=True), strict=True))
        ranges.update({op.attributes["axis"]: (op.operands[0], op.operands[1])
                       for op in body.ops if op.name == "whole"})
        inside.update(body.ops)
        nested = [op for op in body.ops if op.blocks]
        if not nested:
            break
        if len(nested) > 1 or body.ops[-1].operands != nested[0].results or nested[0].operands[-results:] != carried:
            return []
        level = nested[0]
    sums = list[_Sum]()
    for total, begin, own, result in zip(body.ops[-1].operands, loop.operands[-results:], carried, loop.results,
                                         strict=True):
        terms = _terms(total, own)
        found = _sum(result, terms, begin, ranges, inside) if terms else None
        if found is None:
            return []
        sums.append(found)
    return sums


def _sum(result: Value, terms: list[Op], begin: Value | None, ranges: dict[Key, tuple[Value, Value]],
         inside: set[Op]) -> _Sum | None:
    over = {axis for axis in ranges if isinstance(axis, str)}
    if not all(_constant(start) == 0 for start, _ in ranges.values()) or any(
            stop.op in inside or stop in ranges for _, stop in ranges.values()) or any(
            set(term.attributes["over"]) != over or not _is_alike(term.result, result) for term in terms):
        return None
    zero = begin is not None and begin.op is not None and begin.op.name == "full" \
        and _constant(begin.op.operands[0]) == 0
    return _Sum(result, terms, None if zero else begin, ranges, inside)


def _terms(value: Value, carried: Value | None) -> list[Op] | None:
    """The contractions that a value is the sum of, with a carried value once; None where it is something else."""
    terms, pending, left = list[Op](), [value], carried
    while pending:
        v = pending.pop()
        if v is left and v is not None:
            left = None
        elif v.op is not None and v.op.name == "add":
            pending += reversed(v.op.operands)
        elif v.op is not None and v.op.name == "contract":
            terms.append(v.op)
        else:
            return None
    return terms if left is None else None


def _masked(value: Value) -> tuple[Value, int | None]:
    """What a value has bits of, and which; None: all."""
    op = value.op
    mask = _constant(op.operands[1]) if op is not None and op.name == "and" else None
    return (value, None) if op is None or mask is None else (op.operands[0], mask)


def _shift_of(value: Value, byte: Value) -> int | None:
    """By how many places another one is shifted for a value."""
    op = value.op
    return _constant(op.operands[1]) if op is not None and op.name == "shr" and op.operands[0] is byte else None


def _is_byte(value: Value) -> bool:
    """Whether a value has 8 bits, and no sign."""
    op = value.op
    return _dtype(value) is u8 or (op is not None and op.name == "cast" and _dtype(op.operands[0]) is u8)


def _is_alike(value: Value, other: Value) -> bool:
    """Whether two values are of one type, but for the order of their axes."""
    return _dtype(value) is _dtype(other) and set(axes_of(value)) == set(axes_of(other))


def _sizes(tensor: Value) -> list[int | None]:
    """The extents of a tensor, where they are numbers."""
    t = tensor.type
    assert isinstance(t, TensorType)
    if tensor.op is not None:
        return [_constant(v) for v in tensor.op.operands[1:]]
    return [dim if isinstance(dim, int) else None for dim in t.dims]


def _before_split(tensor: Value, first: int) -> Value | None:
    """Of a view that does nothing but split the last dimension, from `first` on: the tensor that it is of."""
    if tensor.op is None:
        return None
    before, count = tensor.op.operands[0], len(_sizes(tensor))
    return before if tensor.op.attributes["groups"] == [[1, 1]] * first + [[1, count - first]] and \
        before.type.dtype is tensor.type.dtype and _has_named_sizes(before) else None  # type: ignore[union-attr]


def _is_same(value: Value, other: Value) -> bool:
    """Whether two extents are made alike, of dimensions and numbers."""
    a, b = value.op, other.op
    return value is other or (a is not None and b is not None and a.name == b.name and a.name in ("dim", *EXTENT_OPS)
                              and a.attributes == b.attributes and all(map(_is_same, a.operands, b.operands))) or (
        _constant(value) is not None and _constant(value) == _constant(other))


def _has_named_sizes(tensor: Value) -> bool:
    """Whether the extents of a tensor are numbers, dimensions, or values."""
    t = tensor.type
    assert isinstance(t, TensorType)
    return tensor.op is not None or all(isinstance(dim, int | str) for dim in t.dims)


def _constant(value: Value) -> int | None:
    return int(value.op.attributes["value"]) if value.op is not None and value.op.name == "const" else None


def _dtype(value: Value) -> DType:
    assert isinstance(value.type, TileType | TensorType)
    return value.type.dtype
