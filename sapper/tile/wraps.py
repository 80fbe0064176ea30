"""Loops that read or write at `(n + shift) % N`, as a row that is turned or a periodic stencil, parted where it wraps.

Enters: a canonical tile function. Leaves: of a parallel loop over tiles whose axis n walks 0 .. N, and in which the
last index of a tensor is such a remainder, a loop up to the wrap and one from there, with `n + first` and `n + first -
N` in place of the remainder; both stand in a loop over the other axes. So neighbours are read where neighbours lie,
while a remainder is a division and a gather for each element. Holds: the meaning is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import TileType, index
from .affine import Affine, affine
from .parts import Writer, copy_op
from .product_parts import axes_brought, rename_axes

MOST_WRAPS = 2
"""Different remainders along an axis: each doubles the loops."""


def part_wraps(function: Function) -> None:
    """In place."""
    taken = {axis for op in function.walk() for axis in axes_brought(op)}
    blocks = [function.body]
    while blocks:
        block = blocks.pop()
        for op in list(block.ops):
            wraps = list(_wraps(op)) if _is_plain(op) else []
            at = next((n for n, (axis, _, divisor, _) in enumerate(wraps) if _walks(op, axis, divisor)), None)
            if at is None:
                blocks += op.blocks
                continue
            place = block.ops.index(op)
            block.ops[place:place + 1] = _part(op, wraps[at][0], taken)


def _is_plain(op: Op) -> bool:
    """Whether this is a loop of which there may well be several: nothing in it is a loop, or takes long."""
    return op.name == "tiles" and op.attributes["parallel"] and "repeats" not in op.attributes and all(
        inner.name not in ("contract", "whole") and not inner.blocks for inner in op.blocks[0].ops)


def _wraps(loop: Op) -> Iterator[tuple[str, Op, Value, Affine]]:
    """Remainders that are last indices: the axis, the op, what it divides by, and what it divides, which is the axis's
    coordinate, or that negative, and what is known before the loop."""
    ops = loop.blocks[0].ops
    inside = {value for op in ops for value in op.results}
    for op in ops:
        made = op.operands[-1].op if op.name in ("load", "store") else None
        if made is None or made.name != "mod" or made not in ops:
            continue
        type, divisor = made.result.type, made.operands[1]
        assert isinstance(type, TileType)
        form = affine(made.operands[0])
        if form is None or type.dtype is not index or len(form.axes) != 1 or divisor in inside or (
                divisor.type != TileType(index)) or not inside.isdisjoint(form.scalars):
            continue
        ((axis, factor),) = form.axes.items()
        if axis in loop.attributes["axes"] and abs(factor) == 1:
            yield axis, made, divisor, form


def _walks(loop: Op, axis: str, extent: Value) -> bool:
    """Whether an axis walks all from 0 to this extent."""
    at = 2 * loop.attributes["axes"].index(axis)
    start, stop = loop.operands[at:at + 2]
    return start.op is not None and start.op.attributes.get("value") == 0 and _are_same(stop, extent)


def _are_same(one: Value, other: Value) -> bool:
    return one is other or (one.op is not None and other.op is not None and one.op.name in ("dim", "const") and (
        one.op.name == other.op.name and one.op.attributes == other.op.attributes))


def _part(loop: Op, axis: str, taken: set[str]) -> list[Op]:
    """The ops that a loop becomes."""
    before: list[Op] = []
    top = Writer(before, loop)
    axes = loop.attributes["axes"]
    bounds = {name: loop.operands[2 * n:2 * n + 2] for n, name in enumerate(axes)}
    inner = Op("tiles", bounds.pop(axis), (), {"axes": [axis], "parallel": True}, loop.blocks, loop.location)
    parted = _parted(inner, top, inner.operands[1], taken, MOST_WRAPS)
    return [*before, *within(loop, bounds, parted)]


def within(loop: Op, bounds: Mapping[str, list[Value]], parts: list[Op]) -> list[Op]:
    """Loops over parts of one axis of a loop, in one over its other axes, of which bounds are start and stop."""
    if not bounds:
        return parts
    outer = Op("tiles", [v for both in bounds.values() for v in both], (), {"axes": list(bounds), "parallel": True},
               [Block()], loop.location)
    outer.blocks[0].ops += [*parts, Op("yield", [], (), {}, None, loop.location)]
    return [outer]


def _parted(loop: Op, top: Writer, extent: Value, taken: set[str], left: int) -> list[Op]:
    """A loop along one axis, inside of 0 .. extent, parted at the wrap of each remainder by the extent."""
    found = next((wrap for wrap in _wraps(loop) if _are_same(wrap[2], extent)), None) if left else None
    if found is None:
        return [loop]
    form = found[3]
    (factor,) = form.axes.values()
    terms = [top.value("mul", [top.number(count), scalar]) for scalar, count in form.scalars.items()]
    shift = top.number(form.constant)
    for term in terms:
        shift = top.value("add", [shift, term])
    first = top.value("mod", [shift, extent])
    start, stop = loop.operands
    wrap = top.value("sub", [extent, first]) if factor > 0 else top.value("add", [first, top.number(1)])
    wrap = top.value("min", [top.value("max", [wrap, start]), stop])
    second = copy_op(loop, {})
    rename_axes(second, taken)
    loop.operands[1] = second.operands[0] = wrap
    _replace(loop, form, first)
    _replace(second, form, top.value("sub" if factor > 0 else "add", [first, extent]))
    return [part for half in (loop, second) for part in _parted(half, top, extent, taken, left - 1)]


def _replace(loop: Op, form: Affine, shift: Value) -> None:
    """Write the coordinate and a shift for the remainders of a form, which is of the axis whatever its name."""
    ops = loop.blocks[0].ops
    for axis, made, _, other in list(_wraps(loop)):
        if made.name == "mod" and (other.constant, other.scalars, list(other.axes.values())) == (
                form.constant, form.scalars, list(form.axes.values())):
            place = Op("index", [], (TileType(index, (axis,)),), {"axis": axis}, None, loop.location)
            ops.insert(ops.index(made), place)
            positive = form.axes[next(iter(form.axes))] > 0
            made.name, made.operands = ("add", [place.result, shift]) if positive else ("sub", [shift, place.result])
