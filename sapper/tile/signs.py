"""What is known of values without their elements: which are never above 0, and which indices are never below.

Enters: a value of tile IR. Leaves: whether each of its elements is surely at most 0, or NaN: so is what has a greatest
element, or a maximum, subtracted that was taken of it (softmax, and attention block by block). Holds: true whatever the
elements are, infinities and NaN among them, as `max` gives one of its operands, and rounding a difference keeps its
sign. What memory is read for twice is two values, unless nothing is stored between (`same_loads`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from ..ir.nodes import Block, Function, Value


def same_loads(function: Function) -> dict[Value, Value]:
    """What is loaded again, with nothing between that stores -> what was loaded first."""
    found: dict[Value, Value] = {}

    def look(block: Block) -> None:
        first: dict[tuple[Value, ...], Value] = {}
        for op in block.ops:
            for inner in op.blocks:
                look(inner)
            if op.blocks or op.name == "store":
                first.clear()
            elif op.name == "load":
                found[op.result] = first.setdefault(tuple(op.operands), op.result)

    look(function.body)
    return found


def never_positive(value: Value, same: Mapping[Value, Value] = MappingProxyType({})) -> bool:
    """same: values that are others, element by element."""
    op = value.op
    return op is not None and op.name == "sub" and _never_above(op.operands[0], op.operands[1], same)


def _never_above(value: Value, other: Value, same: Mapping[Value, Value]) -> bool:
    """Whether an element of `value` is never above that of `other` at the same place, if neither is NaN."""
    if same.get(value, value) is same.get(other, other):
        return True
    op = other.op
    if op is None or not (op.name == "max" or (op.name == "reduce" and op.attributes["kind"] == "max")):
        return False
    return any(_never_above(value, operand, same) for operand in op.operands)


def never_negative(index: Value, start_of: Callable[[Value], Value | None] = lambda value: None) -> bool:
    """Whether it is plain that an index is 0 or more, as dimensions are. start_of: where the range of a coordinate or a
    counter begins; None for other values."""
    start, op = start_of(index), index.op
    if start is not None:
        return never_negative(start, start_of)
    if op is None:
        return False
    if op.name == "const":
        return bool(op.attributes["value"] >= 0)
    return op.name == "dim" or (op.name in ("min", "max", "add", "mul", "floordiv", "mod") and all(
        never_negative(value, start_of) for value in op.operands))
