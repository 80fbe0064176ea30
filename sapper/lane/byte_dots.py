"""Packed dot products of bytes, by ones of words, for targets without an instruction for them.

Enters: a lane function. Leaves: the same without `dot4_u8i8`. Holds: sums are exact for all operands, as those of
`dot4_u8i8` are.

Two ways, of which the bits that an operand may have decide:

- *Pairs.* `pairs_u8i8` (vpmaddubsw) adds two products of bytes to a word, and saturates: 255 * 127 * 2 does not fit 16
  bits. Up to 128 on the unsigned side does, and that is proved where bits were cut off, as those of 4-bit weights
  are. Words of one sum are added up as long as they surely fit, 8 products of 4-bit weights for instance, before
  `dot2_i16` by ones (vpmaddwd) brings them to the sum: 2 1/4 instructions for four products in each lane.
- *Words.* Else both operands are widened, their even bytes and their odd ones apart, which leaves every product in its
  lane: two `dot2_i16`. An operand is widened where it is defined, once for all products that it is part of.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..ir.nodes import Block, Function, Location, Op, Value
from ..ir.types import ROW_B32, ROW_I32, DType, i8, u8

ALL_BITS = (1 << 32) - 1
ONES = 0x00010001
"""A word 1, twice."""


def fits(low: int, high: int) -> bool:
    """Whether a word of 16 bits holds all from low to high."""
    return low >= -(1 << 15) and high < 1 << 15


def bits_of(value: Value, known: dict[Value, int]) -> int:
    """The bits that a lane of a row of 32 bits may have. known: what was found before."""
    if value not in known:
        known[value] = _bits_of(value, known)
    return known[value]


def _bits_of(value: Value, known: dict[Value, int]) -> int:
    op = value.op
    if op is None or value.type not in (ROW_B32, ROW_I32):
        return ALL_BITS
    if op.name == "splat_const":
        return int(op.attributes["value"]) & ALL_BITS
    if op.name == "bitcast":
        return bits_of(op.operands[0], known)
    if op.name == "and":
        return bits_of(op.operands[0], known) & bits_of(op.operands[1], known)
    if op.name in ("or", "xor"):
        return bits_of(op.operands[0], known) | bits_of(op.operands[1], known)
    if op.name in ("shl", "shr") and "amount" in op.attributes:
        bits, amount = bits_of(op.operands[0], known), int(op.attributes["amount"])
        return bits << amount & ALL_BITS if op.name == "shl" else bits >> amount
    return ALL_BITS


def pair_range(unsigned: int, signed: int) -> tuple[int, int]:
    """Between which bounds the sums of two products lie, by the bits that four u8 and four i8 may have."""
    most, magnitude = (max(bits >> shift & 0xFF for shift in (0, 8, 16, 24)) for bits in (unsigned, signed))
    return (0, 2 * most * magnitude) if magnitude < 128 else (-2 * most * 128, 2 * most * 127)


@dataclass(slots=True)
class _Sum:
    """Products of a block that are added up in words. total: what they are added to. low, high: bounds of the words.
    words: what is emitted of them. last: the product after which they are brought to the total."""

    total: Value
    low: int
    high: int
    last: Op
    words: Value | None = None


class _Expander:
    def __init__(self, function: Function) -> None:
        self.uses = Counter(value for op in function.walk() for value in op.operands)
        self.known: dict[Value, int] = {}
        self.sums: dict[Op, _Sum] = {}
        self.wanted: dict[Value, list[DType]] = {}
        self.widened: dict[tuple[Value, DType], list[Value]] = {}
        self.ops: list[Op] = []
        ones = Op("splat_const", [], (ROW_I32,), {"value": ONES})
        cast = Op("bitcast", [ones.result], (ROW_B32,))
        self.head, self.ones = [ones, cast], cast.result

    def plan(self, block: Block) -> None:
        """How each product is computed: `sums`, or by `wanted` words."""
        here: dict[Value, _Sum] = {}
        for op in block.ops:
            for inner in op.blocks:
                self.plan(inner)
            if op.name != "dot4_u8i8":
                continue
            total, a, b = op.operands
            low, high = pair_range(bits_of(a, self.known), bits_of(b, self.known))
            before = here.get(total) if self.uses[total] == 1 else None
            if before is not None and fits(before.low + low, before.high + high):
                before.low, before.high, before.last = before.low + low, before.high + high, op
                here[op.result] = self.sums[op] = before
            elif fits(low, high):
                here[op.result] = self.sums[op] = _Sum(total, low, high, op)
            else:
                for value, dtype in ((a, u8), (b, i8)):
                    if dtype not in self.wanted.setdefault(value, []):
                        self.wanted[value].append(dtype)

    def write(self, block: Block) -> None:
        """The ops of a block, and of those in it, anew."""
        ops: list[Op] = []
        for value in block.arguments:
            self.widen(value, ops)
        for op in block.ops:
            for inner in op.blocks:
                self.write(inner)
            if op.name == "dot4_u8i8":
                self.expand(op, ops)
            else:
                ops.append(op)
            for value in op.results:
                self.widen(value, ops)
        block.ops = ops

    def widen(self, value: Value, ops: list[Op]) -> None:
        for dtype in self.wanted.get(value, ()):
            made = [Op("widen_bytes", [value], (ROW_B32,), {"dtype": dtype, "odd": odd}, None,
                       value.op.location if value.op is not None else None) for odd in (False, True)]
            ops += made
            self.widened[value, dtype] = [op.result for op in made]

    def expand(self, op: Op, ops: list[Op]) -> None:
        total, a, b = op.operands
        found = self.sums.get(op)
        if found is None:
            for left, right in zip(self.widened[a, u8], self.widened[b, i8], strict=True):
                total = self.emit(ops, "dot2_i16", [total, left, right], op.location)
        else:
            words = self.emit(ops, "pairs_u8i8", [a, b], op.location)
            if found.words is not None:
                words = self.emit(ops, "add_i16", [found.words, words], op.location)
            found.words = words
            if found.last is not op:
                return      # only the next product reads what this one would be
            total = self.emit(ops, "dot2_i16", [found.total, words, self.ones], op.location)
        last = ops[-1]
        last.results = op.results
        op.results[0].owner = last

    @staticmethod
    def emit(ops: list[Op], name: str, operands: list[Value], location: Location | None) -> Value:
        op = Op(name, operands, (ROW_I32 if name == "dot2_i16" else ROW_B32,), None, None, location)
        ops.append(op)
        return op.result


def expand_byte_dots(function: Function, legal: frozenset[str]) -> None:
    """In place, where `legal` has no "dot4_u8i8"."""
    if "dot4_u8i8" in legal or not any(op.name == "dot4_u8i8" for op in function.walk()):
        return
    expander = _Expander(function)
    expander.plan(function.body)
    expander.write(function.body)
    function.body.ops[:0] = expander.head
