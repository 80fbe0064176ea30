"""Sums of words that a number scales: the words meet that number where they are brought to 32 bits, in place of ones.

Enters: a lane function without dot products of bytes (split_dots.py). Leaves: the same, in which

    mul (dot2_i16 0, words, ones), number    is    dot2_i16 0, words, (number, number)

and sums of more words, dot2_i16 (dot2_i16 0, words, ones), others, ones, as weights of 5 bits have, likewise, where the
number is known to fit 16 bits, as scales of 6 and 8 bits do, and nothing else reads the sum. Of a Zen 3's 44 cycles for
a block of Q5_K's weights by 4 rows and two vectors 40 are left.
Holds: results are the same for all operands, as both wrap alike.
"""

from __future__ import annotations

from collections import Counter

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import ROW_B32, ROW_I32, i8, i16
from .split_dots import ONES, bits_of

WORD = 16


def is_word(value: Value, known: dict[Value, int]) -> bool:
    """Whether every lane of a row<i32> is a number of 16 bits with its sign. known: of `bits_of`."""
    op = value.op
    if op is None:
        return False
    if op.name in ("load", "load_splat"):
        return op.attributes["dtype"] in (i8, i16) or is_positive_word(value, known)
    return (op.name == "sar" and int(op.attributes.get("amount", 0)) >= WORD) or is_positive_word(value, known)


def is_positive_word(value: Value, known: dict[Value, int]) -> bool:
    return bits_of(value, known) < 1 << WORD - 1


def constant_of(value: Value) -> int | None:
    """The number that is in every lane, if it is known."""
    op = value.op
    while op is not None and op.name == "bitcast":
        op = op.operands[0].op
    return int(op.attributes["value"]) if op is not None and op.name == "splat_const" else None


class _Scaling:
    def __init__(self, uses: Counter[Value]) -> None:
        self.uses = uses
        self.known: dict[Value, int] = {}
        self.count = 0

    def block(self, block: Block) -> None:
        ops: list[Op] = []
        pairs: dict[Value, Value] = {}
        for op in block.ops:
            for inner in op.blocks:
                self.block(inner)
            sides = op.operands if op.name == "mul" and op.results[0].type == ROW_I32 else []
            for total, number in zip(sides, reversed(sides), strict=True):
                words = self.plain_sum(total)
                if words and is_word(number, self.known):
                    if number not in pairs:
                        pairs[number] = self.pair(number, ops)
                    (nothing, first), *others = words
                    for one in others:
                        ops.append(Op("dot2_i16", [nothing, first, pairs[number]], (ROW_I32,)))
                        nothing, first = ops[-1].result, one[1]
                    op.name, op.operands = "dot2_i16", [nothing, first, pairs[number]]
                    self.count += 1
                    break
            ops.append(op)
        block.ops = ops

    def plain_sum(self, value: Value) -> list[tuple[Value, Value]]:
        """What such a sum is added to, 0 at first, and its words, of each that it is made of; nothing for another."""
        op = value.op
        if op is None or op.name != "dot2_i16" or self.uses[value] != 1 or constant_of(op.operands[2]) != ONES:
            return []
        added, words = op.operands[:2]
        before = [] if constant_of(added) == 0 else self.plain_sum(added)
        return [*before, (added, words)] if before or constant_of(added) == 0 else []

    def pair(self, number: Value, ops: list[Op]) -> Value:
        """The number in both words of a lane."""
        def emit(name: str, *operands: Value, **attributes: object) -> Value:
            op = Op(name, list(operands), (ROW_B32 if name == "bitcast" else ROW_I32,), attributes)
            ops.append(op)
            return op.result

        low = number
        if not is_positive_word(number, self.known):
            low = emit("and", number, emit("splat_const", value=(1 << WORD) - 1))
        return emit("bitcast", emit("or", low, emit("shl", number, amount=WORD)))


def scale_words(function: Function) -> int:
    """In place; how many sums are scaled so."""
    scaling = _Scaling(function.count_uses())
    scaling.block(function.body)
    return scaling.count
