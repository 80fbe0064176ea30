"""Quotients by what a loop does not change, by a reciprocal that is made once before.

Enters: a lane function, for a target on which a quotient takes a dozen instructions and more. Leaves: of each `div` of
f32 rows whose divisor is made outside the loop that it stands in, two products where few bits of it count (`coarse`),
else six ops: an estimate, what is left of the dividend, and a correction.

With y the reciprocal of b, correctly rounded, q = a y and r = a - b q, which is exact, q + r y is a / b correctly
rounded (P. Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990). Where r is
not small beside a, q is the result: a or b is 0, infinite or NaN then. Both are scaled by a power of two first, so that
a divisor below the normal numbers has a reciprocal, too.

Holds: results are those of a division, but for dividends below 2**-102, whose r may be inexact: there they may be one
ulp off; and a quotient that is hardly finite may be infinite.
"""

from __future__ import annotations

from typing import NamedTuple

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import MASK, ROW_F32, Type

LEAST_NORMAL, SCALE = 2.0**-126, 2.0**64


class _Divisor(NamedTuple):
    """What is made once. scale: for the dividend. scaled: times it. reciprocal: of that."""

    scale: Value
    scaled: Value
    reciprocal: Value


def divide_by_reciprocals(function: Function) -> int:
    """In place; how many quotients are made so."""
    homes: dict[Value, Block] = {}
    found: list[tuple[Block, Op]] = []
    _find(function.body, frozenset(), homes, found)
    made: dict[Value, _Divisor] = {}
    for block, op in found:
        divisor = op.operands[1]
        if divisor not in made:
            made[divisor] = _prepare(divisor, homes[divisor])
        at = block.ops.index(op)
        block.ops[at:at + 1] = _quotient(op, made[divisor])
    return len(found)


def _find(block: Block, inside: frozenset[Block], homes: dict[Value, Block], found: list[tuple[Block, Op]]) -> None:
    """inside: the blocks from the body of the innermost loop on; none where there is no loop."""
    homes.update(dict.fromkeys(block.arguments, block))
    for op in block.ops:
        homes.update(dict.fromkeys(op.results, block))
        if op.name == "div" and op.result.type == ROW_F32 and inside and homes[op.operands[1]] not in inside:
            found.append((block, op))
        for inner in op.blocks:
            around = frozenset([inner]) if op.name == "loop" else inside | {inner} if inside else inside
            _find(inner, around, homes, found)


class _Writer:
    def __init__(self, op: Op | None) -> None:
        self.location = op.location if op is not None else None
        self.ops: list[Op] = []

    def value(self, name: str, *operands: Value, type: Type = ROW_F32, **attributes: object) -> Value:
        op = Op(name, list(operands), (type,), attributes, None, self.location)
        self.ops.append(op)
        return op.result

    def number(self, value: float) -> Value:
        return self.value("splat_const", value=value)


def _prepare(divisor: Value, home: Block) -> _Divisor:
    """Behind where a divisor is made."""
    out = _Writer(divisor.op)
    tiny = out.value("cmp", out.value("abs", divisor), out.number(LEAST_NORMAL), type=MASK, cond="lt")
    one = out.number(1.0)
    scale = out.value("select", tiny, out.number(SCALE), one)
    scaled = out.value("mul", divisor, scale)
    reciprocal = out.value("div", one, scaled)
    at = 0 if divisor in home.arguments else 1 + next(n for n, op in enumerate(home.ops) if op is divisor.op)
    home.ops[at:at] = out.ops
    return _Divisor(scale, scaled, reciprocal)


def _quotient(op: Op, by: _Divisor) -> list[Op]:
    """Ops that give the result of a division."""
    out = _Writer(op)
    dividend = out.value("mul", op.operands[0], by.scale)
    estimate = out.value("mul", dividend, by.reciprocal)
    if not op.attributes.get("coarse"):
        rest = out.value("fma", out.value("neg", estimate), by.scaled, dividend)
        small = out.value("cmp", out.value("abs", rest), out.value("abs", dividend), type=MASK, cond="lt")
        out.value("select", small, out.value("fma", rest, by.reciprocal, estimate), estimate)
    last = out.ops[-1]
    last.results = op.results
    for value in last.results:
        value.move_to(last)
    return out.ops
