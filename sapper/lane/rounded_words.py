"""Two numbers rounded to bf16 that shifts and masks join in one word: what weights in blocks become for products.

Enters: a lane function for a target that rounds two rows to the halves of slots. Leaves: the same, in which

    or (bits (round_to bf16 a), and (sar (bits (round_to bf16 b), 16), 0xFFFF))    is    pack2 (b, a)

or pack_bf16 where that is the instruction. Holds: results are the same. pack_bf16 takes denormals for 0, so it stands
only for rows that have none: multiples of 2**-24, the least number of f16, are 0 or far above 2**-126, and so are their
sums and their products with integers, rounded or not.
"""

from __future__ import annotations

from ..ir.nodes import Function, Op, Value
from ..ir.rewriter import Replacement, Rewriter, Rule, RuleSet, rewrite
from ..ir.types import ROW_B32, ROW_I32, bf16, f16

HALF = 0xFFFF
GRID = 2.0**-24
"""The least number of f16, of which all others are multiples."""
DEPTH = 20
"""Ops behind each other that are looked at."""
_KEEP = frozenset({"neg", "abs", "round_to"})
_MEET = frozenset({"add", "sub", "min", "max"})


def round_words(function: Function, legal: frozenset[str]) -> int:
    """In place; how many words are rounded at once now."""
    rules = RuleSet([Rule("round_words", ("or",), lambda op, rewriter: _joined(op, rewriter, legal))])
    return rewrite(function, rules)


def _joined(op: Op, rewriter: Rewriter, legal: frozenset[str]) -> Replacement:
    for upper, lower in (op.operands, op.operands[::-1]):
        high, low = _rounded(upper), _rounded(_lower_half(lower))
        if high is None or low is None:
            continue
        if "pack_bf16" in legal:
            if not (_on_grid(low) and _on_grid(high)):
                return None
            words = rewriter.build("pack_bf16", [low, high], ROW_B32)
        else:
            words = rewriter.build("pack2", [low, high], ROW_B32, dtype=bf16)
        return [rewriter.build("bitcast", [words], ROW_I32)]
    return None


def _lower_half(value: Value) -> Value | None:
    """The row of which a value has the upper halves in its lower ones, and nothing in the upper."""
    op = value.op
    if op is None or op.name != "and":
        return None
    for moved, mask in (op.operands, op.operands[::-1]):
        shift = moved.op
        if _number(mask) == HALF and shift is not None and shift.name in ("sar", "shr") and (
                shift.attributes.get("amount") == bf16.bits):
            return shift.operands[0]
    return None


def _rounded(value: Value | None) -> Value | None:
    """The row of f32 of which a value has the bits, rounded to bf16."""
    op = None if value is None else value.op
    inner = op.operands[0].op if op is not None and op.name == "bitcast" else None
    known = inner is not None and inner.name == "round_to" and inner.attributes["dtype"] is bf16
    return inner.operands[0] if inner is not None and known else None


def _number(value: Value) -> float | None:
    """The constant that all lanes hold."""
    op = value.op
    return op.attributes["value"] if op is not None and op.name == "splat_const" else None


def _on_grid(value: Value, step: float = GRID, depth: int = 0) -> bool:
    """Whether all numbers of a row of f32 are multiples of a step, or infinite, or NaN."""
    op = value.op
    if op is None or depth > DEPTH:
        return False
    if op.name in ("load", "load_splat", "gather"):
        return op.attributes["dtype"] is f16 and step <= GRID
    if op.name == "cvt":
        return op.operands[0].type == ROW_I32
    if op.name == "lookup":
        return all(number % step == 0 for number in op.attributes["table"])
    number = _number(value)
    if number is not None:
        return number % step == 0
    if op.name in _KEEP or op.name in _MEET:
        return all(_on_grid(v, step, depth + 1) for v in op.operands)
    if op.name in ("mul", "fma"):
        a, b, *rest = op.operands
        product = any(_on_grid(one, 1.0, depth + 1) and _on_grid(other, step, depth + 1)
                      for one, other in ((a, b), (b, a)))
        return product and all(_on_grid(v, step, depth + 1) for v in rest)
    return False
