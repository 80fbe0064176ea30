"""Which values are 0, or often exactly 0 though nothing that they are computed of is.

Enters: a value of tile IR. Leaves: whether to reckon with zeros among its elements, here and there. So it is with what
is rounded to an integer, chosen, or limited (ReLU), and with a sum of a constant and a function that saturates, as 1 +
erf(x) of GELU; a product is 0 where a factor is. Holds: results do not depend on it, it chooses between two ways to the
same.
"""

from __future__ import annotations

from ..ir.nodes import Value

_KEEPS = frozenset({"cast", "neg", "abs", "mul", "div"})
_MAKES = frozenset({"max", "min", "select", "round", "floor", "ceil", "trunc"})
_SATURATES = frozenset({"erf", "tanh", "sigmoid"})


def is_zero(value: Value) -> bool:
    """Whether all elements of a value are the constant 0."""
    op = value.op
    if op is not None and op.name == "full":
        return is_zero(op.operands[0])
    return op is not None and op.name == "const" and op.attributes["value"] == 0


def often_zero(value: Value) -> bool:
    op = value.op
    if op is None:
        return False
    if op.name in ("add", "sub"):
        names = {operand.op.name for operand in op.operands if operand.op is not None}
        return bool(names & _SATURATES and names & {"full", "const"})
    return op.name in _MAKES or (op.name in _KEEPS and any(map(often_zero, op.operands)))
