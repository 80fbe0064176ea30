"""What is known of values without their elements: which are never above 0.

Enters: a value of tile IR. Leaves: whether each of its elements is surely at most 0, or NaN: so is what has a greatest
element, or a maximum, subtracted that was taken of it (softmax, and attention block by block). Holds: true whatever the
elements are, infinities and NaN among them, as `max` gives one of its operands, and rounding a difference keeps its
sign. What memory is read for twice is two values here, as a store may come between.
"""

from __future__ import annotations

from ..ir.nodes import Value


def never_positive(value: Value) -> bool:
    op = value.op
    return op is not None and op.name == "sub" and _never_above(op.operands[0], op.operands[1])


def _never_above(value: Value, other: Value) -> bool:
    """Whether an element of `value` is never above that of `other` at the same place, if neither is NaN."""
    if value is other:
        return True
    op = other.op
    if op is None or not (op.name == "max" or (op.name == "reduce" and op.attributes["kind"] == "max")):
        return False
    return any(_never_above(value, operand) for operand in op.operands)
