"""Loops that read at a clamped index, as `x[m, minimum(maximum(n + 1, 0), N - 1)]`, parted where nothing is clamped.

Enters: a canonical tile function. Leaves: of a parallel loop over tiles along whose axis n such indices, the last ones
of tensors, move, three: up to where the first of them is what is clamped, from there, with `n + 1` in its place, and
from where the last one is. All stand in a loop over the other axes. Neighbours are then read as rows but at the edges;
there it takes a mask, a row of unknown length and a permutation (sapper/lane/windows.py) for each index, for bytes on
AVX2 an instruction for each element. Holds: the meaning is the same.

On a Zen 3, 1080 x 1920, one thread, in ms before and now: the largest of 3 x 3 bytes around each 3.8 and 0.85, of five
in a line 3.9 and 0.46; in f32 sums of five in a line 4.2 and 1.1, of three with zeros beyond the edges 1.6 and 0.87; a
vector of a million moved by three 0.84 and 0.26.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..ir.nodes import Function, Op, Value
from ..ir.types import TileType, index
from .affine import Affine, affine
from .parts import Writer, copy_op
from .product_parts import axes_brought, rename_axes
from .wraps import within

FEWEST_VECTORS = 4
"""Of an axis, typically, from which on it is parted: the edges take a vector each, and more instructions."""


@dataclass(slots=True)
class Clamp:
    """An index that is clamped. axis: along which it moves, and by how much. plain: the value that it is where nothing
    is clamped. firsts: coordinates of the axis, times that step, from which on it is not, rounded up; ends: up to
    which, rounded down."""

    value: Value
    axis: str
    step: int
    plain: Value
    firsts: list[Affine]
    ends: list[Affine]


def part_clamps(function: Function, fewest: int, typical: Callable[[Value], int | None]) -> None:
    """In place. fewest: elements of an axis, typically, that are worth it. typical: what an index scalar is."""
    taken = {axis for op in function.walk() for axis in axes_brought(op)}
    blocks = [function.body]
    while blocks:
        block = blocks.pop()
        for op in list(block.ops):
            found = _axis_and_clamps(op)
            if found is None or (typical(op.operands[2 * op.attributes["axes"].index(found[0]) + 1]) or 0) < fewest:
                blocks += op.blocks
                continue
            place = block.ops.index(op)
            block.ops[place:place + 1] = _part(op, *found, taken)


def _axis_and_clamps(loop: Op) -> tuple[str, list[Clamp]] | None:
    """The first axis of a loop along which last indices of loads are clamped, and these, if there may well be several
    such loops: nothing in it takes long, and loops in it are over indices."""
    if loop.name != "tiles" or not loop.attributes["parallel"] or "repeats" in loop.attributes:
        return None
    ops = set(loop.walk()) - {loop}
    if any(inner.name in ("contract", "whole") or (inner.blocks and inner.name != "each") for inner in ops):
        return None
    inside = {value for op in ops for value in (*op.results, *(v for block in op.blocks for v in block.arguments))}
    counters = {counter: (op.operands[2 * n], op.operands[2 * n + 1]) for op in ops if op.name == "each"
                for n, counter in enumerate(op.blocks[0].arguments[:op.attributes["count"]])
                if inside.isdisjoint(op.operands[2 * n:2 * n + 2])}
    found: dict[str, dict[Value, Clamp]] = {}
    for op in loop.walk():
        clamp = _clamp(op.operands[-1], ops, inside, counters) if op.name == "load" else None
        if clamp is not None:
            found.setdefault(clamp.axis, {})[clamp.value] = clamp
    axis = next((a for a in loop.attributes["axes"] if a in found), None)
    return None if axis is None else (axis, list(found[axis].values()))


def _clamp(value: Value, ops: set[Op], inside: set[Value], counters: Mapping[Value, tuple[Value, Value]]
           ) -> Clamp | None:
    """What an index of a load is clamped to; None if it is not, or otherwise than by what is known before the loop.
    counters: of loops inside, and where these begin and end."""
    plain, lowest, highest = value, list[Affine](), list[Affine]()
    while plain.op in ops and plain.op.name in ("max", "min"):
        op, bound = plain.op, None
        for number, operand in enumerate(op.operands):
            form = affine(operand)
            if form is not None and not form.axes and inside.isdisjoint(form.scalars):
                bound, plain = form, op.operands[1 - number]
        if bound is None:
            return None
        (lowest if op.name == "max" else highest).append(bound)
    form = affine(plain)
    if plain is value or form is None or len(form.axes) != 1 or value.type != plain.type or (
            value.type != TileType(index, tuple(form.axes))):
        return None
    ((axis, step),) = form.axes.items()
    if step < 1:
        return None
    least, most = Affine(form.constant), Affine(form.constant)
    for scalar, count in form.scalars.items():
        if scalar not in inside:
            ends = [Affine(scalars={scalar: 1})] * 2
        elif scalar in counters:
            start, stop = map(affine, counters[scalar])
            assert start is not None and stop is not None
            ends = [start, stop.plus(Affine(-1))]
        else:
            return None
        low, high = ends if count > 0 else ends[::-1]
        least, most = least.plus(low.scaled(count)), most.plus(high.scaled(count))
    return Clamp(value, axis, step, plain, [bound.plus(least.scaled(-1)).plus(Affine(step - 1)) for bound in lowest],
                 [bound.plus(most.scaled(-1)).plus(Affine(step)) for bound in highest])


def _part(loop: Op, axis: str, clamps: list[Clamp], taken: set[str]) -> list[Op]:
    """The ops that a loop becomes."""
    before: list[Op] = []
    top = Writer(before, loop)
    bounds = {name: loop.operands[2 * n:2 * n + 2] for n, name in enumerate(loop.attributes["axes"])}
    start, stop = bounds.pop(axis)
    first, end = start, stop
    for clamp in clamps:
        for form in clamp.firsts:
            first = top.value("max", [first, _written(form, clamp.step, top)])
        for form in clamp.ends:
            end = top.value("min", [end, _written(form, clamp.step, top)])
    first = first if first is start else top.value("min", [first, stop])
    end = end if end is stop else top.value("max", [end, first])
    inner = Op("tiles", [first, end], (), {"axes": [axis], "parallel": True}, loop.blocks, loop.location)
    edges = [copy_op(inner, {}), copy_op(inner, {})]
    for edge, ends in zip(edges, ([start, first], [end, stop]), strict=True):
        edge.operands = ends
        rename_axes(edge, taken)        # a schedule that names the axis means what is not clamped
    plain = {clamp.value: clamp.plain for clamp in clamps}
    for op in inner.walk():
        op.operands = [plain.get(v, v) for v in op.operands]
    parts = [edges[0], inner, edges[1]]
    parts = [part for part, edge in zip(parts, (first is not start, True, end is not stop), strict=True) if edge]
    return [*before, *within(loop, bounds, parts)]


def _written(form: Affine, step: int, top: Writer) -> Value:
    """The quotient of a form and a step, rounded down."""
    value = top.number(form.constant)
    for scalar, count in form.scalars.items():
        value = top.value("add", [value, top.value("mul", [top.number(count), scalar])])
    return value if step == 1 else top.value("floordiv", [value, top.number(step)])
