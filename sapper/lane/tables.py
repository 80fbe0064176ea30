"""Tables of 16 floats in a register, where a lane takes one by the low four bits of an index.

Enters: a lane function, for a target that has `lookup`. Leaves: the same, where a 4-bit integer that becomes a float is
looked up: a shift and a lookup in place of two shifts, or a shift and a mask, and a conversion. Holds: the same bits;
what is no longer used is left to simplify.py. `pick`, a lookup in a table that the kernel was given, has an index that
need not be cut to the bits that it takes, either.
"""

from __future__ import annotations

from ..ir.nodes import Function, Op, Value
from ..ir.rewriter import Replacement, Rewriter, Rule, RuleSet, rewrite
from ..ir.types import ROW_F32, ROW_I32

WORD_BITS, INDEX_BITS = 32, 4
SIGNED = tuple(float(n - 16 if n > 7 else n) for n in range(16))
UNSIGNED = tuple(float(n) for n in range(16))
LARGEST_OFFSET = 1 << 20
"""Of which the floats of a table are exact, and no difference leaves 32 bits."""


def use_tables(function: Function) -> int:
    """Look up, in place, what can be; how often."""
    return rewrite(function, _RULES)


def _constant_of(value: Value) -> int | None:
    op = value.op
    return int(op.attributes["value"]) if op is not None and op.name == "splat_const" else None


def _shift(value: Value, name: str) -> tuple[Value, int] | None:
    """(what is shifted, by how many bits) by a shift of this name whose amount is known."""
    op = value.op
    if op is None or op.name != name or "amount" not in op.attributes:
        return None
    return op.operands[0], int(op.attributes["amount"])


def _nibble(op: Op, build: Rewriter) -> Replacement:
    """(x << 28 - s >> 28) as a float, or (x >> s & 15), or that less a number: by a table of -8 to 7, or of 0 to 15, or
    of these less it."""
    if op.results[0].type != ROW_F32 or op.operands[0].type != ROW_I32:
        return None
    integer = op.operands[0]
    high = _shift(integer, "sar")
    if high is not None and high[1] == WORD_BITS - INDEX_BITS:
        before = _shift(high[0], "shl") or (high[0], 0)
        source, amount, table = before[0], WORD_BITS - INDEX_BITS - before[1], SIGNED
        if amount < 0:
            return None
        if amount:
            source = build.build("shr", [source], ROW_I32, amount=amount)
    else:
        integer, offset = _less(integer)
        found = _masked(integer, 1 << INDEX_BITS)
        if found is None or abs(offset) > LARGEST_OFFSET:
            return None
        source, table = found, tuple(number - offset for number in UNSIGNED)
    return [build.build("lookup", [source], ROW_F32, table=table)]


def _less(value: Value) -> tuple[Value, int]:
    """x and c, if a row is x - c; else itself and 0."""
    op = value.op
    offset = _constant_of(op.operands[1]) if op is not None and op.name == "sub" else None
    return (value, 0) if op is None or offset is None else (op.operands[0], offset)


def _masked(value: Value, size: int) -> Value | None:
    """What a value was before all but its low bits, those of a place in a table of `size`, were cut off."""
    op = value.op
    if op is None or op.name != "and":
        return None
    for kept, other in (op.operands, op.operands[::-1]):
        if _constant_of(other) == size - 1:
            return kept
    return None


def _index(op: Op, build: Rewriter) -> Replacement:
    """pick(row, i & lanes - 1) is pick(row, i)."""
    found = _masked(op.operands[1], build.function.attributes["lanes"])
    return None if found is None else [build.build("pick", [op.operands[0], found], op.results[0].type)]


_RULES = RuleSet([
    Rule("nibble-to-float", ("cvt",), _nibble),
    Rule("index-of-pick", ("pick",), _index),
])
