"""Sequential loops that only accumulate become reductions over a whole axis.

Enters tile IR; leaves tile IR in which `for k in tiles(K): acc += sum(x, over=k)` (and `a @ b`, max, min) is one
`reduce` or `contract` over k, brought into scope by `whole`; `acc += a @ b + c @ d` becomes two, that are added after.
The schedule may then block the reductions as it likes: nothing in the kernel says how.
"""

from __future__ import annotations

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import TileType

_COMBINE = {"add": "sum", "max": "max", "min": "min"}


def reduce_loops(function: Function) -> Function:
    """Rewrite in place, innermost loops first; returns the function."""
    _block(function.body, function)
    return function


def _block(block: Block, function: Function) -> None:
    position = 0
    while position < len(block.ops):
        op = block.ops[position]
        for nested in op.blocks:
            _block(nested, function)
        replacement = _as_reductions(op) if op.name == "tiles" and op.results else None
        if replacement is not None:
            ops, values = replacement
            block.ops[position:position + 1] = ops
            _replace(function.body, dict(zip(op.results, values, strict=True)))
            position += len(ops)
        else:
            position += 1


def _as_reductions(op: Op) -> tuple[list[Op], list[Value]] | None:
    axes = op.attributes["axes"]
    body = op.blocks[0]
    terminator = body.terminator
    if terminator is None or any(o.blocks or o.name in ("store", "whole") for o in body.ops):
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
        if combine is None or combine.name not in _COMBINE or uses.get(argument, 0) != 1:
            return None
        joined, parts = _joined(out, combine.name, members, uses)
        if argument not in parts:
            return None
        parts.remove(argument)
        for part in parts:
            source = part.op
            if source is None or source not in members:
                return None
            kind = source.attributes.get("kind") if source.name == "reduce" else "sum" * (source.name == "contract")
            if kind != _COMBINE[combine.name] or not set(axes) <= set(source.attributes["over"]):
                return None
        dropped.update(joined)
        assert isinstance(out.type, TileType)
        total = start
        for part in parts:
            if total is start and combine.name == "add" and _is_zero(start) and part.op is not None and (
                    _has_axes(part.op, out.type.axes)):
                total = part         # 0 + x: partial sums start at +0 anyway
                continue
            tail.append(Op(combine.name, [total, part], (out.type,), {}, None, combine.location))
            total = tail[-1].result
        values.append(total)
    wholes = [Op("whole", [bounds[2 * i], bounds[2 * i + 1]], (), {"axis": axis}, None, op.location)
              for i, axis in enumerate(axes)]
    return [*wholes, *[o for o in body.ops if o not in dropped], *tail], values


def _joined(out: Value, name: str, members: set[Op], uses: dict[Value, int]) -> tuple[list[Op], list[Value]]:
    """The ops of one name that make a value, each read by the next alone, and what they join, from left to right."""
    ops: list[Op] = []
    values: list[Value] = []

    def visit(value: Value) -> None:
        if value.op is not None and value.op.name == name and value.op in members and uses[value] == 1:
            ops.append(value.op)
            for operand in value.op.operands:
                visit(operand)
        else:
            values.append(value)

    visit(out)
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


def _is_zero(value: Value) -> bool:
    op = value.op
    if op is not None and op.name == "full":
        return _is_zero(op.operands[0])
    return op is not None and op.name == "const" and op.attributes["value"] == 0


def _replace(block: Block, mapping: dict[Value, Value]) -> None:
    for op in block.ops:
        if any(v in mapping for v in op.operands):
            op.operands = [mapping.get(v, v) for v in op.operands]
        for nested in op.blocks:
            _replace(nested, mapping)
