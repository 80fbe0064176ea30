"""Products over several axes, as loops in order over all of these but the one along memory.

Enters: a canonical tile function. Leaves: where a product of rows of f32 is over several axes and both operands lie
along one of these, as the gradient of a convolution's weights is over images, lines and points of a line, loops in
order over the others that add up products over that one. Sums of dot products would read each row again for every few
rows of the other operand, a short piece at a time; loops that carry a product keep copies of both. Holds: the meaning
is the same, but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import TileType, f32
from .affine import affine
from .parts import Writer
from .plan import axes_of
from .product_parts import copied


def loop_over_depths(function: Function, extent_of: Callable[[str], int], fewest: int) -> None:
    """In place. extent_of: an axis, typically. fewest: rows and columns from which on it is worth it."""
    blocks = [inner for op in function.body.ops for inner in op.blocks]
    while blocks:
        block = blocks.pop()
        blocks += [inner for op in block.ops for inner in op.blocks]
        bounds = {op.attributes["axis"]: op.operands for op in block.ops if op.name == "whole"}
        for product in [op for op in block.ops if op.name == "contract"]:
            depth = _depth(product)
            if depth is None or min(map(extent_of, axes_of(product.result))) < fewest:
                continue
            others = [axis for axis in product.attributes["over"] if axis != depth]
            if all(axis in bounds for axis in others):
                _loop(function, block, product, depth, {axis: bounds[axis] for axis in others})


def _depth(product: Op) -> str | None:
    """The axis of several ones along which both operands lie in memory, each with a row of its own beside."""
    over: list[str] = product.attributes["over"]
    if len(over) < 2 or len(axes_of(product.result)) != 2:
        return None
    found = set()
    for value in product.operands:
        op = value.op
        assert isinstance(value.type, TileType)
        if op is None or op.name != "load" or value.type.dtype is not f32 or len(axes_of(value)) != 1 + len(over):
            return None
        if any(affine(index) is None for index in op.operands[1:]):
            return None
        found.add(axes_of(op.operands[-1]))
    axes = found.pop()
    return axes[0] if not found and len(axes) == 1 and axes[0] in over else None


def _loop(function: Function, block: Block, product: Op, depth: str, bounds: Mapping[str, list[Value]]) -> None:
    made: list[Op] = []
    before = Writer(made, product)
    type = product.result.type
    assert isinstance(type, TileType)
    zero = before.value("const", [], TileType(f32), value=0.0)
    body = Block([before.number(0).type] * len(bounds) + [type])
    *counters, total = body.arguments
    for axis, counter in zip(bounds, counters, strict=True):
        counter.name = axis
    values: dict[Value, Value] = {}
    for value in product.operands:
        _bring(value, dict(zip(bounds, counters, strict=True)), values, body.ops)
    part = copied(product, values)
    part.attributes["over"] = [depth]
    body.ops.append(part)
    writer = Writer(body.ops, product)
    writer.op("yield", [writer.value("add", [total, part.result], type)])
    start = before.value("full", [zero], type)
    loop = before.op("each", [*(v for pair in bounds.values() for v in pair), start], [type], [body],
                     count=len(bounds), parallel=False)
    at = block.ops.index(product)
    block.ops[at:at + 1] = made
    for op in function.walk():
        if op is not loop:
            op.operands = [loop.result if v is product.result else v for v in op.operands]
    operands = {value for op in function.walk() for value in op.operands}
    used = {op.attributes["axis"] for op in function.walk() if op.name == "index" and op.result in operands}
    block.ops[:] = [op for op in block.ops if op.name != "whole" or op.attributes["axis"] not in bounds or (
        op.attributes["axis"] in used)]


def _bring(value: Value, counters: Mapping[str, Value], values: dict[Value, Value], ops: list[Op]) -> None:
    """Copies of the ops that compute an operand of the axes, where counters take their place."""
    op = value.op
    if value in values or op is None or not axes_of(value):
        return
    if op.name == "index":
        if op.attributes["axis"] in counters:
            values[value] = counters[op.attributes["axis"]]
        return
    for operand in op.operands[op.name == "load":]:
        _bring(operand, counters, values, ops)
    ops.append(copied(op, values))
