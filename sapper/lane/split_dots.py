"""Packed dot products, by products of parts of the slots, for targets without an instruction for them.

Enters: a lane function. Leaves: the same without `fma2_bf16`, and, where `dot4_u8i8` is no instruction, without that
and its kin of two operands of one sign; where these are instructions, by them.
Holds: results are the same for all operands.

A slot of bf16 is two numbers of f32: its upper half as it is, its lower half shifted up. Of bytes there are two ways,
and the bits that an operand may have decide:

- *Pairs.* `pairs_u8i8` (vpmaddubsw) adds two products of bytes to a word, and saturates: 255 * 127 * 2 does not fit 16
  bits. Up to 128 on the unsigned side does, and that is proved where bits were cut off, as those of 4-bit weights
  are. Words of one sum are added up as long as they surely fit, 8 products of 4-bit weights for instance, before
  `dot2_i16` by ones (vpmaddwd) brings them to the sum: 2 1/4 instructions for four products in each lane.
- *Words.* Else both operands are widened, their even bytes and their odd ones apart, which leaves every product in its
  lane: two `dot2_i16`.

An operand is widened where it is defined, once for all products that it is part of.

Where bytes of one sign are multiplied by an instruction (`dot4_i8i8`), unsigned ones that are below 128 are signed as
they are, and 128 is taken off others: a * b = (a - 128) * b + 64 * b + 64 * b.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.nodes import Block, Function, Location, Op, Value
from ..ir.types import ROW_B32, ROW_F32, ROW_I32, DType, RowType, bf16, i8, u8
from .even_odd import PASSED_BY_LOADS

ALL_BITS = (1 << 32) - 1
ONES = 0x00010001
"""A word 1, twice."""
UPPER_HALF = -0x10000
"""As an i32."""

BYTE_DOTS = {"dot4_u8i8": (u8, i8), "dot4_i8i8": (i8, i8), "dot4_u8u8": (u8, u8)}
"""Products of bytes, and of which those are."""


LOADS = frozenset({"load", "load_splat"})


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
    if op.name in LOADS:
        return 0xFF if op.attributes["dtype"] is u8 else int(op.attributes.get("bits", ALL_BITS))
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


class _Splitter:
    def __init__(self, function: Function, of_bytes: bool) -> None:
        self.of_bytes = of_bytes
        self.uses = function.count_uses()
        self.known: dict[Value, int] = {}
        self.sums: dict[Op, _Sum] = {}
        self.wanted: dict[Value, list[DType]] = {}
        self.widened: dict[tuple[Value, DType], list[Value]] = {}
        self.ops: list[Op] = []
        self.head: list[Op] = []
        self.ones, self.upper = (self.constant(word) for word in (ONES, UPPER_HALF))

    def constant(self, word: int) -> Value:
        """These 32 bits in every lane."""
        number = Op("splat_const", [], (ROW_I32,), {"value": word})
        cast = Op("bitcast", [number.result], (ROW_B32,))
        self.head += [number, cast]
        return cast.result

    def plan(self, block: Block) -> None:
        """How each product is computed: `sums`, or by `wanted` words."""
        here: dict[Value, _Sum] = {}
        for op in block.ops:
            for inner in op.blocks:
                self.plan(inner)
            if op.name == "fma2_bf16":
                self.want(op.operands[1], bf16)
                self.want(op.operands[2], bf16)
            if op.name not in BYTE_DOTS or not self.of_bytes:
                continue
            total, a, b = op.operands
            if op.name != "dot4_u8i8":
                for value, dtype in zip((a, b), BYTE_DOTS[op.name], strict=True):
                    self.want(value, dtype)
                continue
            low, high = pair_range(bits_of(a, self.known), bits_of(b, self.known))
            before = here.get(total) if self.uses[total] == 1 else None
            if before is not None and fits(before.low + low, before.high + high):
                before.low, before.high, before.last = before.low + low, before.high + high, op
                here[op.result] = self.sums[op] = before
            elif fits(low, high):
                here[op.result] = self.sums[op] = _Sum(total, low, high, op)
            else:
                self.want(a, u8)
                self.want(b, i8)

    def want(self, value: Value, dtype: DType) -> None:
        if dtype not in self.wanted.setdefault(value, []):
            self.wanted[value].append(dtype)

    def write(self, block: Block) -> None:
        """The ops of a block, and of those in it, anew. What is loaded and sums of words are added to is loaded where
        they are: a register less is held till then."""
        ops: list[Op] = []
        late: dict[Value, Op] = {}
        totals = {found.total for found in self.sums.values()}
        for value in block.arguments:
            if value in self.wanted:
                self.widen(value, ops)
        for op in block.ops:
            for inner in op.blocks:
                self.write(inner)
            if op.name in LOADS and op.result in totals:
                late[op.result] = op
                continue
            held = self.sums.get(op)
            wanted = list(late) if op.name not in PASSED_BY_LOADS else [
                *op.operands] if held is None else [held.total] if held.last is op else []
            ops += [late.pop(value) for value in wanted if value in late]
            if op.name == "fma2_bf16":
                self.split_bf16(op, ops)
            elif op.name in BYTE_DOTS and self.of_bytes:
                self.split_bytes(op, ops)
            else:
                ops.append(op)
            for value in op.results:
                if value in self.wanted:
                    self.widen(value, ops)
        block.ops = ops

    def widen(self, value: Value, ops: list[Op]) -> None:
        """The parts of a row that products want: words of even and odd bytes, or f32 of lower and upper halves."""
        at = value.op.location if value.op is not None else None
        for dtype in self.wanted[value]:
            if dtype is bf16:
                bits = self.emit(ops, "bitcast", [value], ROW_I32, at)
                raised = self.emit(ops, "shl", [bits], ROW_I32, at, amount=16)
                upper = self.emit(ops, "and", [value, self.upper], ROW_B32, at)
                found = [self.emit(ops, "bitcast", [half], ROW_F32, at) for half in (raised, upper)]
            else:
                found = [self.emit(ops, "widen_bytes", [value], ROW_B32, at, dtype=dtype, odd=odd)
                         for odd in (False, True)]
            self.widened[value, dtype] = found

    def split_bf16(self, op: Op, ops: list[Op]) -> None:
        """The upper halves first, as `fma2_bf16` says."""
        total, a, b = op.operands
        for left, right in zip(self.widened[a, bf16][::-1], self.widened[b, bf16][::-1], strict=True):
            total = self.emit(ops, "fma", [left, right, total], ROW_F32, op.location)
        self.replace(op, ops[-1])

    def split_bytes(self, op: Op, ops: list[Op]) -> None:
        total, a, b = op.operands
        found = self.sums.get(op)
        if found is None:
            first, second = BYTE_DOTS[op.name]
            for left, right in zip(self.widened[a, first], self.widened[b, second], strict=True):
                total = self.emit(ops, "dot2_i16", [total, left, right], ROW_I32, op.location)
        else:
            words = self.emit(ops, "pairs_u8i8", [a, b], ROW_B32, op.location)
            if found.words is not None:
                words = self.emit(ops, "add_i16", [found.words, words], ROW_B32, op.location)
            found.words = words
            if found.last is not op:
                return      # only the next product reads what this one would be
            total = self.emit(ops, "dot2_i16", [found.total, words, self.ones], ROW_I32, op.location)
        self.replace(op, ops[-1])

    @staticmethod
    def replace(op: Op, last: Op) -> None:
        """What `last` computes stands for the result of `op`."""
        last.results = op.results
        op.result.move_to(last)

    @staticmethod
    def emit(ops: list[Op], name: str, operands: list[Value], type: RowType, location: Location | None,
             **attributes: object) -> Value:
        op = Op(name, operands, (type,), attributes, None, location)
        ops.append(op)
        return op.result


SIGNS, HALVES = 0x80808080, 0x40404040
"""128 and 64 in each byte."""


def _multiply_signed(function: Function) -> None:
    """Products of u8 and i8 become products of i8, in place."""
    splitter = _Splitter(function, False)
    signs, halves = splitter.constant(SIGNS), splitter.constant(HALVES)
    signed: dict[tuple[Block, Value], Value] = {}

    def visit(block: Block) -> None:
        ops: list[Op] = []
        for op in block.ops:
            for inner in op.blocks:
                visit(inner)
            if op.name != "dot4_u8i8":
                ops.append(op)
                continue
            total, a, b = op.operands
            if bits_of(a, splitter.known) & SIGNS:
                if (block, a) not in signed:
                    signed[block, a] = splitter.emit(ops, "xor", [a, signs], ROW_B32, op.location)
                a = signed[block, a]
                for _ in range(2):
                    total = splitter.emit(ops, "dot4_i8i8", [total, halves, b], ROW_I32, op.location)
            splitter.emit(ops, "dot4_i8i8", [total, a, b], ROW_I32, op.location)
            splitter.replace(op, ops[-1])
        block.ops = ops

    visit(function.body)
    function.body.ops[:0] = splitter.head


def split_dots(function: Function, legal: frozenset[str]) -> None:
    """In place."""
    split = {"fma2_bf16"} if legal & {"dot4_u8i8", "dot4_i8i8"} else {"fma2_bf16", *BYTE_DOTS}
    names = {op.name for op in function.walk()}
    if "dot4_i8i8" in legal and "dot4_u8i8" in names - legal:
        _multiply_signed(function)
    if split.isdisjoint(names):
        return
    splitter = _Splitter(function, "dot4_u8i8" in split)
    splitter.plan(function.body)
    splitter.write(function.body)
    function.body.ops[:0] = splitter.head
