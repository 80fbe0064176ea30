"""Indices that are looked through at a call, as `5 * k % 7`, `cache[position + t]` or `x[t - j]` where t >= j.

Enters: a row "indexed" of the attribute "requires" (docs/ir.md), which says how an index is computed, and what is known
of dimensions and scalars. Leaves: whether all values that the index takes are inside its tensor; one that is not.
Holds: `proves` never says so of an index that leaves its tensor; `outside` is exact.

A row is [tensor, "indexed", dimension, text, nodes, counters, guards, low, high, extent]. nodes are computed in order,
each [op, operand, ...] of earlier ones by their places, or a leaf: [number, n], [dim, name], [scalar, name], [counter,
c]. counters: [start, stop, step] of what loops and axes walk; places of nodes, and a number. guards: places of what has
to be 1 for the element to be touched. low, high: places of the smallest and the largest index, which are one node where
counters are walked.

What is known of a value is (low, high, step): it is low, low + step, ... or high.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import gcd, prod
from typing import Any, NamedTuple

import numpy

Known = tuple[int, int, int]
Numbers = Any
"""An array of i64, or one of its elements."""

LEAST, MOST = -(1 << 63), (1 << 63) - 1
ANY: Known = (LEAST, MOST, 1)
CHUNK = 1 << 16
"""Indices that are computed at once."""
MOST_POINTS = 1 << 27
"""Indices that are computed for one row, at some 10 ns each."""
UNSPECIFIED = -(1 << 40)
"""What stands for a quotient by 0: outside of any tensor."""
TURNED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}


class TooMany(Exception):
    """An index takes more values than can be looked at."""


class Row(NamedTuple):
    """A row, as above."""

    tensor: str
    kind: str
    dimension: int
    text: str
    nodes: Sequence[Sequence[Any]]
    counters: Sequence[Sequence[int]]
    guards: Sequence[int]
    low: int
    high: int
    extent: int

    def names(self, kind: str) -> list[str]:
        """The dimensions ("dim") or scalars that it is made of, each once."""
        return list(dict.fromkeys(node[1] for node in self.nodes if node[0] == kind))


def proves(row: Row, leaves: Mapping[tuple[str, str], Known]) -> bool:
    """Whether an index is surely inside. leaves: what is known of each ("dim", name) and ("scalar", name)."""
    known = _Box(row, leaves).known(())
    return known is None or _inside(row, known)


def surely_outside(row: Row, leaves: Mapping[tuple[str, str], Known]) -> tuple[int, int] | None:
    """A value of the index, and the extent, if none at all is inside. What dimensions are walked is taken to be more
    than nothing, where the tensor is not empty; other loops and branches have to be certain."""
    known = _Box(row, leaves).known(())
    if known is None or known[row.extent][1] < 1 or not all(
            known[guard][0] == 1 or _is_of_dimensions(row, guard) for guard in row.guards):
        return None
    low, high, extent = known[row.low], known[row.high], known[row.extent]
    return (low[1], extent[1]) if low[1] < 0 else (high[0], extent[1]) if high[0] >= extent[1] else None


def _is_of_dimensions(row: Row, place: int) -> bool:
    op, *operands = row.nodes[place]
    return op in ("number", "dim") or (op in KNOWN and all(_is_of_dimensions(row, operand) for operand in operands))


def outside(row: Row, sizes: Mapping[tuple[str, str], int]) -> tuple[int, int] | None:
    """A value of the index that is not inside, and the extent; None where there is none. Raises TooMany."""
    box = _Box(row, {leaf: (size, size, 0) for leaf, size in sizes.items()})
    first = box.known(())
    if first is None or _inside(row, first):
        return None
    places = [place for place, node in enumerate(row.nodes) if node[0] == "counter"]
    pending, points = [tuple(first[place] for place in places)], 0
    while pending:
        ranges = pending.pop()
        known = box.known(ranges)
        if known is None or _inside(row, known):
            continue
        ranges = tuple(known[place] for place in places)
        counts = [_count(each) for each in ranges]
        if prod(counts) > CHUNK:
            at = counts.index(max(counts))
            for half in _halves(ranges[at]):
                pending.append((*ranges[:at], half, *ranges[at + 1:]))
            continue
        points += prod(counts)
        if points > MOST_POINTS:
            raise TooMany
        found = _computed(row, sizes, ranges)
        if found is not None:
            return found
    return None


def freedom(row: Row, sizes: Mapping[tuple[str, str], int], limits: Mapping[tuple[str, str], tuple[int, int]]
            ) -> dict[tuple[str, str], tuple[int, int]] | None:
    """How far each of some leaves may go from where it is, so that the row holds for all that lie there together; None
    where it is not proved where they are. limits: the leaves, and where they ever are. Of these what the row is made
    of is in what leaves; the first ones go as far as they can."""
    leaves = {leaf: (size, size, 0) for leaf, size in sizes.items()}
    found = {leaf: (sizes[leaf], sizes[leaf]) for leaf in limits if leaf[1] in row.names(leaf[0])}

    def between(leaf: tuple[str, str], here: int, end: int) -> bool:
        return proves(row, leaves | {leaf: (min(here, end), max(here, end), int(here != end))})

    if not proves(row, leaves):
        return None
    for leaf in found:
        here = sizes[leaf]
        high = _furthest(here, limits[leaf][1], partial(between, leaf, here))
        low = _furthest(here, limits[leaf][0], partial(between, leaf, high))
        leaves[leaf], found[leaf] = (low, high, min(1, high - low)), (low, high)
    return found


def _furthest(start: int, end: int, holds: Callable[[int], bool]) -> int:
    """The number farthest from start towards end up to which something holds, as it does at start."""
    if holds(end):
        return end
    while abs(end - start) > 1:
        middle = (start + end) // 2
        start, end = (middle, end) if holds(middle) else (start, middle)
    return start


def _inside(row: Row, known: Sequence[Known]) -> bool:
    return known[row.low][0] >= 0 and known[row.high][1] < known[row.extent][0]


def _count(known: Known) -> int:
    low, high, step = known
    return 1 + (high - low) // step if step else 1


def _halves(known: Known) -> Iterator[Known]:
    low, high, step = known
    middle = low + _count(known) // 2 * step
    yield _made(low, middle - step, step)
    yield _made(middle, high, step)


# Ranges of values.


class _Box:
    """What is known of the nodes of a row. limits: of some, by the guards."""

    def __init__(self, row: Row, leaves: Mapping[tuple[str, str], Known]) -> None:
        self.row, self.leaves = row, leaves

    def known(self, ranges: Sequence[Known]) -> list[Known] | None:
        """Of each node, where counters are in some ranges (all that they walk); None where nothing is touched."""
        limits: dict[int, tuple[int, int]] = {}
        found: list[Known] = []
        for _ in range(3 if self.row.guards else 1):
            found = []
            for place in range(len(self.row.nodes)):
                value = self.node(place, found, ranges)
                if value is not None and place in limits:
                    value = _cut(value, *limits[place])
                if value is None:
                    return None
                found.append(value)
            before = dict(limits)
            if not all(self.learn(guard, found, limits) for guard in self.row.guards):
                return None
            if limits == before:
                break
        return found

    def node(self, place: int, found: Sequence[Known], ranges: Sequence[Known]) -> Known | None:
        op, *operands = self.row.nodes[place]
        if op == "number":
            return operands[0], operands[0], 0
        if op in ("dim", "scalar"):
            return self.leaves[op, operands[0]]
        if op == "counter":
            if ranges:
                return ranges[int(operands[0])]
            start, stop, step = self.row.counters[operands[0]]
            low, high = found[start][0], found[stop][1] - 1
            return _made(low, high, step if found[start][0] == found[start][1] else 1) if low <= high else None
        if op == "wrap":
            return _wrapped(found[operands[0]], *operands[1:])
        return KNOWN[op](*(found[operand] for operand in operands))

    def learn(self, guard: int, found: Sequence[Known], limits: dict[int, tuple[int, int]]) -> bool:
        """Take what a guard says of its operands into the limits. Whether it can hold."""
        if found[guard][1] < 1:
            return False
        op, *operands = self.row.nodes[guard]
        _limit(limits, guard, 1, 1)
        if op not in TURNED:
            return True
        for name, (this, other) in ((op, operands), (TURNED[op], operands[::-1])):
            low, high, _ = found[other]
            if name in ("lt", "le", "eq"):
                _limit(limits, this, LEAST, high - (name == "lt"))
            if name in ("gt", "ge", "eq"):
                _limit(limits, this, low + (name == "gt"), MOST)
        for place, node in enumerate(self.row.nodes):
            if node[0] == "sub" and set(node[1:]) == set(operands):
                name = op if list(node[1:]) == operands else TURNED[op]
                if name in ("lt", "le", "eq"):
                    _limit(limits, place, LEAST, -(name == "lt"))
                if name in ("gt", "ge", "eq"):
                    _limit(limits, place, int(name == "gt"), MOST)
        return True


def _limit(limits: dict[int, tuple[int, int]], place: int, low: int, high: int) -> None:
    before = limits.get(place, (LEAST, MOST))
    limits[place] = max(before[0], low), min(before[1], high)


def _cut(known: Known, low: int, high: int) -> Known | None:
    """Those of the values from low to high."""
    first, last, step = known
    if low > first:
        first += -(-(low - first) // step) * step if step else 0
    high = min(high, last)
    if first > high or first < low:
        return None
    return _made(first, high, step)


def _made(low: int, high: int, step: int) -> Known:
    """Values from low by steps up to high at most."""
    if low < LEAST or high > MOST:
        return ANY
    if step:
        high = low + (high - low) // step * step
    return low, high, step if high > low else 0


def _add(a: Known, b: Known) -> Known:
    return _made(a[0] + b[0], a[1] + b[1], gcd(a[2], b[2]))


def _sub(a: Known, b: Known) -> Known:
    return _made(a[0] - b[1], a[1] - b[0], gcd(a[2], b[2]))


def _mul(a: Known, b: Known) -> Known:
    ends = [one * other for one in a[:2] for other in b[:2]]
    return _made(min(ends), max(ends), gcd(a[0] * b[2], b[0] * a[2], a[2] * b[2]))


def _floordiv(a: Known, b: Known) -> Known:
    if b[0] < 1:
        return ANY
    ends = [one // other for one in a[:2] for other in b[:2]]
    exact = b[0] == b[1] and a[2] % b[0] == 0
    return _made(min(ends), max(ends), a[2] // b[0] if exact else 1)


def _mod(a: Known, b: Known) -> Known:
    if b[0] < 1:
        return ANY
    if a[0] >= 0 and a[1] < b[0]:
        return a
    if b[0] < b[1]:
        return _made(0, min(b[1] - 1, a[1] if a[0] >= 0 else MOST), 1)
    if a[0] // b[0] == a[1] // b[0]:
        return _made(a[0] % b[0], a[1] % b[0], a[2])
    step = gcd(a[2], b[0])
    return _made(a[0] % step, b[0] - 1, step)


def _minimum(a: Known, b: Known) -> Known:
    return _made(min(a[0], b[0]), min(a[1], b[1]), gcd(a[2], b[2], a[0] - b[0]))


def _maximum(a: Known, b: Known) -> Known:
    return _made(max(a[0], b[0]), max(a[1], b[1]), gcd(a[2], b[2], a[0] - b[0]))


def _select(condition: Known, a: Known, b: Known) -> Known:
    if condition[0] == condition[1]:
        return a if condition[0] else b
    return _made(min(a[0], b[0]), max(a[1], b[1]), gcd(a[2], b[2], a[0] - b[0]))


def _and(a: Known, b: Known) -> Known:
    if a[0] == a[1] >= 0:
        a, b = b, a
    if b[0] == b[1] and b[0] >= 0 and not b[0] & (b[0] + 1):
        return _mod(a, (b[0] + 1, b[0] + 1, 0))
    natural = [each[1] for each in (a, b) if each[0] >= 0]
    return _made(0, min(natural), 1) if natural else ANY


def _or(a: Known, b: Known) -> Known:
    return _made(max(a[0], b[0]), _all_bits(a, b), 1) if a[0] >= 0 <= b[0] else ANY


def _xor(a: Known, b: Known) -> Known:
    return _made(0, _all_bits(a, b), 1) if a[0] >= 0 <= b[0] else ANY


def _all_bits(a: Known, b: Known) -> int:
    return (1 << max(a[1], b[1]).bit_length()) - 1


def _wrapped(a: Known, bits: int, signed: int) -> Known:
    low = -(1 << (bits - 1)) if signed else 0
    high = low + (1 << bits) - 1
    if low <= a[0] and a[1] <= high:
        return a
    step = gcd(a[2], 1 << bits)
    return _made(low + (a[0] - low) % step, high, step) if step else (low + (a[0] - low) % (1 << bits),) * 2 + (0,)


def _compared(op: str) -> Callable[[Known, Known], Known]:
    def compare(a: Known, b: Known) -> Known:
        apart = a[1] < b[0] or b[1] < a[0] or (a[0] - b[0]) % (gcd(a[2], b[2]) or abs(a[0] - b[0]) + 1) != 0
        always, never = {
            "lt": (a[1] < b[0], a[0] >= b[1]), "le": (a[1] <= b[0], a[0] > b[1]),
            "gt": (a[0] > b[1], a[1] <= b[0]), "ge": (a[0] >= b[1], a[1] < b[0]),
            "eq": (a[0] == a[1] == b[0] == b[1], apart), "ne": (apart, a[0] == a[1] == b[0] == b[1])}[op]
        return int(always), int(not never), int(not always and not never)

    return compare


KNOWN: dict[str, Callable[..., Known]] = {
    "add": _add, "sub": _sub, "mul": _mul, "floordiv": _floordiv, "mod": _mod, "min": _minimum, "max": _maximum,
    "select": _select, "and": _and, "or": _or, "xor": _xor, **{op: _compared(op) for op in TURNED}}


# Values, one by one.


def _computed(row: Row, sizes: Mapping[tuple[str, str], int], ranges: Sequence[Known]) -> tuple[int, int] | None:
    """As `outside`, of the values of counters in some ranges."""
    walked = numpy.ix_(*(numpy.arange(_count(each), dtype=numpy.int64) * each[2] + each[0] for each in ranges))
    values: list[Numbers] = []
    with numpy.errstate(all="ignore"):
        for op, *operands in row.nodes:
            if op == "number":
                values.append(numpy.int64(operands[0]))
            elif op in ("dim", "scalar"):
                values.append(numpy.int64(sizes[op, operands[0]]))
            elif op == "counter":
                values.append(walked[operands[0]])
            elif op == "wrap":
                values.append(_wrap(values[operands[0]], *operands[1:]))
            else:
                values.append(COMPUTED[op](*(values[operand] for operand in operands)))
    shape = tuple(map(_count, ranges))
    touched = numpy.ones(shape, bool)
    for guard in row.guards:
        touched &= numpy.asarray(values[guard], bool)
    low, high, extent = values[row.low], values[row.high], values[row.extent]
    for index, out in ((low, low < 0), (high, high >= extent)):
        wrong = numpy.broadcast_to(touched & out, shape)
        if wrong.any():
            at = numpy.unravel_index(int(wrong.argmax()), shape)
            return tuple(int(numpy.broadcast_to(each, shape)[at]) for each in (index, extent))  # type: ignore[return-value]
    return None


def _wrap(value: Numbers, bits: int, signed: int) -> Numbers:
    low = -(1 << (bits - 1)) if signed else 0
    return (value - low) % (1 << bits) + low


def _divided(divide: Callable[[Numbers, Numbers], Numbers]) -> Callable[[Numbers, Numbers], Numbers]:
    def by(a: Numbers, b: Numbers) -> Numbers:
        return numpy.where(b == 0, UNSPECIFIED, divide(a, numpy.where(b == 0, 1, b)))

    return by


def _flag(compare: Callable[[Numbers, Numbers], Numbers]) -> Callable[[Numbers, Numbers], Numbers]:
    return lambda a, b: compare(a, b).astype(numpy.int64)


COMPUTED: dict[str, Callable[..., Numbers]] = {
    "add": numpy.add, "sub": numpy.subtract, "mul": numpy.multiply, "floordiv": _divided(numpy.floor_divide),
    "mod": _divided(numpy.remainder), "min": numpy.minimum, "max": numpy.maximum,
    "select": lambda condition, a, b: numpy.where(condition != 0, a, b),
    "and": numpy.bitwise_and, "or": numpy.bitwise_or, "xor": numpy.bitwise_xor,
    "lt": _flag(numpy.less), "le": _flag(numpy.less_equal), "gt": _flag(numpy.greater),
    "ge": _flag(numpy.greater_equal), "eq": _flag(numpy.equal), "ne": _flag(numpy.not_equal)}
