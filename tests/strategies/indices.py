"""Random rows "indexed" (sapper/ir/indices.py), and whether an index is outside, by plain Python."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

from hypothesis import strategies as st

from sapper.ir.indices import TURNED, UNSPECIFIED, Row

Sizes = Mapping[tuple[str, str], int]
BINARY = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "min": min, "max": max, "and": operator.and_,
    "or": operator.or_, "xor": operator.xor, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "eq": operator.eq, "ne": operator.ne,
    "floordiv": lambda a, b: a // b if b else UNSPECIFIED, "mod": lambda a, b: a % b if b else UNSPECIFIED}
SIZES = st.fixed_dictionaries({
    ("dim", "A"): st.integers(0, 9), ("dim", "B"): st.integers(0, 5), ("scalar", "p"): st.integers(-12, 12),
    ("scalar", "f"): st.integers(0, 1)})


def leaves_of(sizes: Sizes) -> dict[tuple[str, str], tuple[int, int, int]]:
    return {leaf: (size, size, 0) for leaf, size in sizes.items()}


@st.composite
def rows(draw: st.DrawFn) -> Row:
    nodes: list[list[Any]] = [["dim", "A"], ["dim", "B"], ["scalar", "p"], ["scalar", "f"],
                              ["number", draw(st.integers(-3, 9))], ["number", draw(st.integers(0, 4))]]
    counters: list[list[int]] = []
    for _ in range(draw(st.integers(0, 2))):
        fresh = [n for n, node in enumerate(nodes) if node[0] in ("dim", "number", "min", "counter")]
        ends = st.sampled_from(fresh)
        counters.append([draw(ends), draw(ends), draw(st.sampled_from([1, 1, 2, 3]))])
        nodes.append(["counter", len(counters) - 1])
        if draw(st.booleans()):
            nodes.append(["min", draw(st.sampled_from(fresh)), len(nodes) - 1])
    anywhere = st.deferred(lambda: st.integers(0, len(nodes) - 1))
    for _ in range(draw(st.integers(1, 6))):
        op = draw(st.sampled_from([*BINARY, "add", "sub", "mod", "floordiv", "select", "wrap"]))
        if op == "wrap":
            nodes.append([op, draw(anywhere), draw(st.sampled_from([3, 8])), draw(st.integers(0, 1))])
        else:
            nodes.append([op, *(draw(anywhere) for _ in range(3 if op == "select" else 2))])
    index = len(nodes) - 1
    extent = draw(st.sampled_from([0, 1, 4, 5]))
    guards = []
    for _ in range(draw(st.integers(0, 2))):
        nodes.append([draw(st.sampled_from(list(TURNED))), draw(anywhere), draw(anywhere)])
        guards.append(len(nodes) - 1)
    for start, stop, step in counters:      # as the front end has them, where the ends are counters'
        if any(nodes[end][0] in ("counter", "min") for end in (start, stop)):
            place = next(n for n, node in enumerate(nodes) if node == ["counter", counters.index([start, stop, step])])
            guards += range(len(nodes), len(nodes) + 2)
            nodes += [["ge", place, start], ["lt", place, stop]]
            if step > 1:
                nodes += [["sub", place, start], ["number", step], ["number", 0]]
                nodes += [["mod", len(nodes) - 3, len(nodes) - 2], ["eq", len(nodes), len(nodes) - 1]]
                guards.append(len(nodes) - 1)
    return Row("x", "indexed", 0, "x[i]", nodes, counters, guards, index, index, extent)


@st.composite
def rows_of_sums(draw: st.DrawFn) -> Row:
    """Of ops that rise, so that their ranges say all."""
    nodes: list[list[Any]] = [["number", 0], ["dim", "A"], ["dim", "B"], ["scalar", "p"], ["counter", 0],
                              ["counter", 1]]
    for _ in range(draw(st.integers(1, 5))):
        op = draw(st.sampled_from(["add", "add", "sub", "min", "max", "mul", "floordiv"]))
        here = st.integers(1, len(nodes) - 1)
        if op in ("mul", "floordiv"):
            nodes.append(["number", draw(st.integers(1, 3))])
            nodes.append([op, draw(here), len(nodes) - 1])
        else:
            nodes.append([op, draw(here), draw(here)])
    return Row("x", "indexed", 0, "x[i]", nodes, [[0, 1, 1], [0, 2, 2]], [], len(nodes) - 1, len(nodes) - 1,
               draw(st.sampled_from([1, 2])))


def _values(row: Row, sizes: Sizes) -> Iterator[list[int]]:
    """The nodes' values, for each place that the counters come to."""
    values: list[int] = [0] * len(row.nodes)

    def compute(place: int) -> Iterator[list[int]]:
        if place == len(row.nodes):
            yield values
            return
        op, *operands = row.nodes[place]
        if op == "counter":
            start, stop, step = row.counters[operands[0]]
            for number in range(values[start], values[stop], step):
                values[place] = number
                yield from compute(place + 1)
            return
        if op == "number":
            values[place] = operands[0]
        elif op in ("dim", "scalar"):
            values[place] = sizes[op, operands[0]]
        elif op == "wrap":
            least = -(1 << (operands[1] - 1)) if operands[2] else 0
            values[place] = (values[operands[0]] - least) % (1 << operands[1]) + least
        elif op == "select":
            values[place] = values[operands[1] if values[operands[0]] else operands[2]]
        else:
            values[place] = int(BINARY[op](*(values[operand] for operand in operands)))
        yield from compute(place + 1)

    return compute(0)


def is_outside(row: Row, sizes: Sizes) -> bool:
    return any(all(values[guard] for guard in row.guards) and not (
        values[row.low] >= 0 and values[row.high] < values[row.extent]) for values in _values(row, sizes))
