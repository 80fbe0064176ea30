"""Sequential loops that only accumulate become reductions over a whole axis.

Enters tile IR; leaves tile IR in which `for k in tiles(K): acc += sum(x, over=k)` (and `a @ b`, max, min) is one
`reduce` or `contract` over k, brought into scope by `whole`; `acc += a @ b - c @ d` becomes two, that are joined after.
So is `for k in each(K): acc += x[k, n]`, and of products of two elements, `acc += a[m, k] * b[k, n]`, a sum over k;
inside other loops in order only where the innermost alone goes along memory (`acc += g[b, o, q] * x[b, c, q + i]`).
The schedule may then block the reductions as it likes: nothing in the kernel says how. Holds: the meaning is the same,
but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import count

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import TileType, f32, f64, i32, index
from .affine import affine
from .loop_products import spread
from .ops import load_of
from .plan import axes_of
from .product_parts import axes_brought
from .zeros import is_zero

_COMBINE = {"add": "sum", "max": "max", "min": "min"}

SHORT_LOOP = 64
"""Loops over indices that are known to have fewer passes are left: a window's, or channels of a pixel, of which other
loops go along memory."""


def reduce_loops(function: Function) -> Function:
    """Rewrite in place, innermost loops first; returns the function."""
    _block(function.body, function, (), False)
    return function


def _block(block: Block, function: Function, tiled: Collection[str], in_order: bool) -> None:
    """tiled: the axes of the loop over tiles around the block; in_order: loops over indices stand between."""
    position = 0
    while position < len(block.ops):
        op = block.ops[position]
        for nested in op.blocks:
            parallel = op.name == "tiles" and op.attributes["parallel"]
            between = op.name == "each"
            _block(nested, function, op.attributes["axes"] if parallel else tiled if between else (), between)
        replacement = as_reductions(op) if op.name == "tiles" and op.results else None
        if op.name == "each" and op.results and all(set(axes_of(v)) <= set(tiled) for v in op.results):
            replacement = _as_sums(op, function, in_order)
        if replacement is not None:
            ops, values = replacement
            block.ops[position:position + 1] = ops
            _replace(function.body, dict(zip(op.results, values, strict=True)))
            position += len(ops)
        else:
            position += 1


def as_reductions(op: Op, of_wholes: bool = False) -> tuple[list[Op], list[Value]] | None:
    """The ops that stand for a loop over tiles, and for its results; None where it does something else. of_wholes: it
    may bring whole axes, too."""
    axes = op.attributes["axes"]
    body = op.blocks[0]
    terminator = body.terminator
    if terminator is None or any(o.blocks or o.name in ("store", "whole")[:2 - of_wholes] for o in body.ops):
        return None
    bounds, initial = op.operands[:2 * len(axes)], op.operands[2 * len(axes):]
    members = set(body.ops)
    uses: dict[Value, int] = {}
    for o in body.ops:
        for v in o.operands:
            uses[v] = uses.get(v, 0) + 1
    dropped: set[Op] = {terminator}
    values: list[Value] = []
    tail: list[Op] = []
    for argument, start, out in zip(body.arguments, initial, terminator.operands, strict=True):
        combine = out.op
        if combine is None or uses.get(argument, 0) != 1:
            return None
        name = "add" if combine.name == "sub" else combine.name
        if name not in _COMBINE:
            return None
        joined, parts = _joined(out, name, members, uses)
        if (argument, False) not in parts:
            return None
        parts.remove((argument, False))
        for part, _ in parts:
            source = part.op
            if source is None or source not in members:
                return None
            kind = source.attributes.get("kind") if source.name == "reduce" else "sum" * (source.name == "contract")
            if kind != _COMBINE[name] or not set(axes) <= set(source.attributes["over"]):
                return None
        dropped.update(joined)
        assert isinstance(out.type, TileType)
        total = start
        for part, taken_off in sorted(parts, key=lambda pair: pair[1]):
            if total is start and name == "add" and not taken_off and is_zero(start) and part.op is not None and (
                    _has_axes(part.op, out.type.axes)):
                total = part         # 0 + x: partial sums start at +0 anyway
                continue
            tail.append(Op("sub" if taken_off else name, [total, part], (out.type,), {}, None, combine.location))
            total = tail[-1].result
        values.append(total)
    wholes = [Op("whole", [bounds[2 * i], bounds[2 * i + 1]], (), {"axis": axis}, None, op.location)
              for i, axis in enumerate(axes)]
    return [*wholes, *[o for o in body.ops if o not in dropped], *tail], values


def _as_sums(op: Op, function: Function, in_order: bool) -> tuple[list[Op], list[Value]] | None:
    """A loop over one index that adds elements of tensors, or products of two, to what it carries: each is summed.
    in_order: of `_block`."""
    body, (first, last) = op.blocks[0], op.operands[:2]
    if len(body.arguments) != 1 + len(op.results) or op.attributes.get("step", 1) != 1 or any(
            o.blocks or o.name in ("store", "whole") for o in body.ops) or not _is_long(first, last):
        return None
    counter, terminator = body.arguments[0], body.terminator
    assert terminator is not None
    taken = {axis for other in function.walk() for axis in axes_brought(other)}
    axis = next(name for n in count() if (name := f"{counter.name}_{n}" if n else counter.name) not in taken)
    along = Op("index", [], [TileType(index, (axis,))], {"axis": axis}, None, op.location)
    made = [Op("whole", [first, last], (), {"axis": axis}, None, op.location), along]
    values, spread_over = [], {counter: along.result}
    terms: list[tuple[Value, Value]] = []
    for argument, out in zip(body.arguments[1:], terminator.operands, strict=True):
        total = out.op
        if total is None or total.name != "add" or total not in body.ops or argument not in total.operands or any(
                argument in o.operands for o in body.ops if o is not total):
            return None
        (term,) = (v for v in total.operands if v is not argument) if total.operands[0] is not total.operands[1] else (
            argument,)
        is_element = _is_along if in_order else _is_element
        if not _is_element_or_product(term, counter, is_element) or term.type.dtype not in (f32, f64, i32):  # type: ignore[union-attr]
            return None
        terms.append((out, term))
    added = {out.op for out, _ in terms}
    made += [spread(o, spread_over, []) for o in body.ops if o is not terminator and o not in added]
    for (out, term), start in zip(terms, op.operands[2:], strict=True):
        summed = spread_over[term]
        axes = tuple(a for a in axes_of(summed) if a != axis)
        assert isinstance(out.type, TileType)
        location = out.op.location if out.op is not None else op.location
        made.append(Op("reduce", [summed], [TileType(out.type.dtype, axes)], {"kind": "sum", "over": [axis]}, None,
                       location))
        if not (is_zero(start) and axes == out.type.axes):
            made.append(Op("add", [start, made[-1].result], [out.type], {}, None, location))
        values.append(made[-1].result)
    return made, values


def _is_long(first: Value, last: Value) -> bool:
    """Whether a loop goes along all of a dimension, which is not known to be short. Others may have ends in reverse."""
    if last.op is None or not is_zero(first):
        return False
    return last.op.name == "dim" or (last.op.name == "const" and last.op.attributes["value"] >= SHORT_LOOP)


def _is_element_or_product(value: Value, counter: Value, is_element: Callable[[Value, Value], bool]) -> bool:
    """Whether a value is an element of a tensor at the counter of a loop, or a product of two such."""
    op = value.op
    if op is not None and op.name == "mul":
        return all(is_element(v, counter) for v in op.operands)
    return is_element(value, counter)


def _is_along(value: Value, counter: Value) -> bool:
    """Whether a value is loaded where the last index alone goes with a loop's counter, step by step, and has no axis of
    tiles: of these none has neighbours that vectors could hold."""
    op = load_of(value)
    forms = [affine(v) for v in op.operands[1:]] if op is not None else []
    if not forms or any(form is None for form in forms):
        return False
    *others, last = forms
    return last.scalars.get(counter) == 1 and not last.axes and not any(counter in form.scalars for form in others)  # type: ignore[union-attr]


def _is_element(value: Value, counter: Value) -> bool:
    """Whether a value is loaded, but for a cast, where one index is a loop's counter and the others are of tiles."""
    op = load_of(value)
    if op is None:
        return False
    others = [v for v in op.operands[1:] if v is not counter]
    return len(others) + 2 == len(op.operands) and all(
        v.op is not None and (v.op.name in ("index", "const", "dim")) for v in others)


def _joined(
    out: Value, name: str, members: set[Op], uses: dict[Value, int]
) -> tuple[list[Op], list[tuple[Value, bool]]]:
    """The ops of one name, and differences in a sum, that make a value, each read by the next alone; and what they
    join, from left to right, with whether it is taken off."""
    ops: list[Op] = []
    values: list[tuple[Value, bool]] = []
    names = {name, "sub"} if name == "add" else {name}

    def visit(value: Value, taken_off: bool) -> None:
        op = value.op
        if op is not None and op.name in names and op in members and uses[value] == 1:
            ops.append(op)
            first, second = op.operands
            visit(first, taken_off)
            visit(second, taken_off != (op.name == "sub"))
        else:
            values.append((value, taken_off))

    visit(out, False)
    return ops, values


def _has_axes(op: Op, axes: tuple[str, ...]) -> bool:
    """Whether the result of a reduction spans these axes in this order, if need be after a product's factors changed
    places: what reads the sum has the sum's order of axes."""
    result = op.result
    assert isinstance(result.type, TileType)
    if result.type.axes != axes and op.name == "contract":
        spanned = dict.fromkeys(a for v in reversed(op.operands) for a in v.type.axes)  # type: ignore[union-attr]
        if tuple(a for a in spanned if a not in op.attributes["over"]) == axes:
            op.operands.reverse()
            result.type = TileType(result.type.dtype, axes)
    return result.type.axes == axes


def _replace(block: Block, mapping: dict[Value, Value]) -> None:
    for op in block.ops:
        if any(v in mapping for v in op.operands):
            op.operands = [mapping.get(v, v) for v in op.operands]
        for nested in op.blocks:
            _replace(nested, mapping)
