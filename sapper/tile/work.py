"""About how long a kernel takes on one core: a polynomial in its dimensions.

Enters a canonical tile IR function and the lanes of a row. Leaves terms (nanoseconds, dims): the time is the sum over
them of nanoseconds * product of dims. Holds: an estimate from counts of ops, no model of caches or latencies, right
within a factor of about three; it decides how many workers are worth waking, and nothing else. An op counts once for
each element of the axes that it and its operands span and for each turn of the `each` loops around it. An extent that
is known only as the kernel runs counts as the dimension that its axis indexes; a block of one, as from b * 128 to the
smaller of b * 128 + 128 and the end, as its length.
"""

from __future__ import annotations

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import TensorType, TileType
from .affine import affine
from .plan import COSTLY

ROW_NS = 0.17
"""One vector instruction: three in five cycles of a core at 3.6 GHz."""
SCALAR_NS = 0.5
BYTES_PER_NS = 60.0
"""Somewhat less than the rate of L3: what comes from DRAM is large, and worth sharing in any case."""
UNKNOWN_EXTENT = 256
_FREE = ("const", "full", "index", "dim", "whole", "yield", "view")

Term = tuple[float, tuple[str, ...]]
"""(factor, dims): factor * product of dims."""


def work(function: Function, lanes: int) -> tuple[Term, ...]:
    """The terms, one for each product of dims, those with the fewest dims first."""
    counted = _Work(function, lanes)
    counted.block(function.body, (1.0, ()))
    return tuple((ns, dims) for dims, ns in sorted(counted.total.items(), key=lambda item: (len(item[0]), item[0])))


class _Work:
    """total: nanoseconds by sorted dims. extents: of each axis, and of what an index of `each` walks."""

    def __init__(self, function: Function, lanes: int) -> None:
        self.lanes = lanes
        self.total: dict[tuple[str, ...], float] = {}
        self.extents: dict[str, Term] = {}
        self.users: dict[Value, list[Op]] = {}
        for op in function.walk():
            for value in op.operands:
                self.users.setdefault(value, []).append(op)

    def block(self, block: Block, turns: Term) -> None:
        for op in block.ops:
            inner = turns
            if op.name == "tiles":
                for at, axis in enumerate(op.attributes["axes"]):
                    self.extents[axis] = self.extent(op, at, self._coordinates(op.blocks[0], axis))
            elif op.name == "whole":
                axis = op.attributes["axis"]
                self.extents[axis] = self.extent(op, 0, self._coordinates(block, axis))
            elif op.name == "each":
                for at in range(op.attributes["count"]):
                    factor, dims = self.extent(op, at, [op.blocks[0].arguments[at]])
                    inner = _times(inner, (factor / op.attributes.get("step", 1), dims))
            for own in op.blocks:
                self.block(own, inner)
            if not op.blocks and op.name not in _FREE:
                self.count(op, turns)

    @staticmethod
    def _coordinates(block: Block, axis: str) -> list[Value]:
        return [inner.result for op in block.ops for inner in op.walk()
                if inner.name == "index" and inner.attributes["axis"] == axis]

    def extent(self, op: Op, at: int, coordinates: list[Value]) -> Term:
        """Of the range between operands 2 * at and 2 * at + 1 of a loop, whose coordinates are these values."""
        length = _length(op.operands[2 * at], op.operands[2 * at + 1])
        if length is not None:
            return float(length), ()
        known = _monomial(op.operands[2 * at + 1])
        if known is None:
            return next((e for v in coordinates if (e := self._indexed(v)) is not None), (UNKNOWN_EXTENT, ()))
        return known

    def _indexed(self, value: Value) -> Term | None:
        """The extent of a dimension that a value, or a sum with it, is an index of."""
        for user in self.users.get(value, []):
            if user.name in ("load", "store"):
                tensor = user.operands[0].type
                assert isinstance(tensor, TensorType)
                place = user.operands.index(value) - (1 if user.name == "load" else 2)
                if place >= 0:
                    dim = tensor.dims[place]
                    if dim == "?":
                        sizes = user.operands[0].op.operands  # type: ignore[union-attr]
                        return _monomial(sizes[len(sizes) - len(tensor.dims) + place])
                    if isinstance(dim, tuple):
                        return None
                    return (1.0, (dim,)) if isinstance(dim, str) else (float(dim), ())
            if user.name in ("add", "sub", "cast") and (found := self._indexed(user.result)) is not None:
                return found
        return None

    def count(self, op: Op, turns: Term) -> None:
        tiles = [v.type for v in (*op.operands, *op.results) if isinstance(v.type, TileType)]
        axes = dict.fromkeys(axis for type in tiles for axis in type.axes)
        elements = turns
        for axis in axes:
            elements = _times(elements, self.extents[axis])
        if not axes:
            self.add(SCALAR_NS * COSTLY.get(op.name, 1), elements)
            return
        registers = max([1.0, *(type.dtype.bits / 32 for type in tiles if type.dtype.name != "index")])
        rows = registers / self.lanes
        self.add(ROW_NS * COSTLY.get(op.name, 1) * rows, elements)
        if op.name in ("load", "store"):
            assert isinstance(op.operands[0].type, TensorType)
            self.add(op.operands[0].type.dtype.bits / 8 / BYTES_PER_NS, elements)

    def add(self, ns: float, count: Term) -> None:
        dims = tuple(sorted(count[1]))
        self.total[dims] = self.total.get(dims, 0.0) + ns * count[0]


def _times(a: Term, b: Term) -> Term:
    return a[0] * b[0], a[1] + b[1]


def _length(start: Value, stop: Value) -> int | None:
    """The most coordinates that a range which begins at a value of the run has, where a constant says it."""
    if stop.op is not None and stop.op.name == "min":
        lengths = [length for v in stop.op.operands if (length := _length(start, v)) is not None]
        return min(lengths, default=None)
    first, last = affine(start), affine(stop)
    if first is None or last is None or not first.scalars:
        return None
    between = last.plus(first.scaled(-1))
    return None if any(between.axes.values()) or any(between.scalars.values()) else max(0, between.constant)


def _monomial(value: Value) -> Term | None:
    """About what an index scalar is; None where that is known only as the kernel runs."""
    op = value.op
    if op is None:
        return None
    if op.name == "const":
        return float(op.attributes["value"]), ()
    if op.name == "dim":
        return 1.0, (op.attributes["name"],)
    if op.name not in ("add", "sub", "mul", "floordiv", "min"):
        return None
    a, b = (_monomial(v) for v in op.operands)
    if a is None or b is None:
        return (a or b) if op.name == "min" else None
    if op.name == "mul":
        return _times(a, b)
    if op.name == "floordiv":
        return None if b[1] or not b[0] else (a[0] / b[0], a[1])
    return max(a, b, key=lambda term: len(term[1])) if op.name == "add" else a
