"""Pairs of small whole numbers as f16 by their bits.

Enters: a lane function for a target that computes with pairs of f16. Leaves: the same, in which

    pack2 (cvt (((word >> shift) & mask) + number), cvt (((word >> shift + 16) & mask) + number))
        is    sub2 (bits, 1024 - number)

where `bits` are those of 1024 + n twice, which an `or` makes of the word, shifted, and 0x64006400: 1024 has 1 as its
last place in f16. A byte with a sign is one without after its highest bit is turned, less 128.
Holds: results are the same, all exact: whole numbers up to 2048 are numbers of f16.

Eight weights of 4 bits so take 11 operations, in place of 20; four bytes with a sign 6, in place of 4 conversions, of
which an SM starts a quarter as many, and 2 that pack.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import ROW_B32, ROW_I32, RowType, f16, i8, u8
from .packed_pairs import unrounded
from .small_integers import Small, small

FRACTION, MAGIC = 10, 0x64006400
"""The bits of 1024 in f16, twice."""
HALF = 16
SIGNS = 0x80808080
LARGEST = 2048


@dataclass(frozen=True, slots=True)
class _Bits:
    """found: what an integer is of a word, in which the highest bit of each byte is turned, if it is `turned`."""

    found: Small
    turned: bool


def pack_by_bits(function: Function) -> int:
    """In place; how many pairs are made so."""
    return _pack(function.body)


def _pack(block: Block) -> int:
    count = sum(_pack(inner) for op in block.ops for inner in op.blocks)
    writer = _Writer()
    for op in block.ops:
        writer.write(op)
    block.ops = writer.ops
    return count + writer.count


def _bits_of(value: Value) -> _Bits | None:
    """Of a float that is a small integer."""
    op = unrounded(value, f16).op
    if op is None or op.name != "cvt" or op.operands[0].type != ROW_I32:
        return None
    inner = op.operands[0].op
    if inner is not None and inner.name == "unpack" and inner.attributes["dtype"] in (i8, u8):
        signed = inner.attributes["dtype"] is i8
        return _Bits(Small(inner.operands[0], 8 * inner.attributes["place"], 0xFF, -128 if signed else 0), signed)
    found = small(op.operands[0])
    return None if found is None else _Bits(found, False)


class _Writer:
    """ops: of a block. count: pairs. made: words that are shifted, or turned."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.count = 0
        self.made: dict[tuple[str, Value, int], Value] = {}

    def write(self, op: Op) -> None:
        pair = [_bits_of(v) for v in op.operands] if op.name == "pack2" and op.attributes["dtype"] is f16 else []
        if not pair or None in pair or not self._serves(*pair):  # type: ignore[arg-type]
            self.ops.append(op)
            return
        low, _ = pair
        assert low is not None
        found, word = low.found, low.found.word
        if word.type != ROW_I32:
            word = self._once("bitcast", word, 0, op)
        if low.turned:
            word = self._once("xor", word, SIGNS, op)
        if found.shift:
            word = self._once("shr", word, found.shift, op)
        mask = self._emit("and", [word, self._number(found.mask | found.mask << HALF, op)], ROW_I32, op)
        bits = self._emit("or", [mask, self._number(MAGIC, op)], ROW_I32, op)
        less = _half_bits((1 << FRACTION) - found.number)
        pairs = [self._emit("bitcast", [v], ROW_B32, op) for v in (bits, self._number(less | less << HALF, op))]
        made = self._emit("sub2", pairs, ROW_B32, op, dtype=f16).op
        assert made is not None
        made.results = op.results
        op.result.move_to(made)
        self.count += 1

    @staticmethod
    def _serves(low: _Bits, high: _Bits) -> bool:
        a, b = low.found, high.found
        return a.word is b.word and low.turned == high.turned and b.shift == a.shift + HALF and a.mask == b.mask \
            and a.number == b.number and a.mask < 1 << FRACTION and a.mask + abs(a.number) <= LARGEST \
            and 0 < (1 << FRACTION) - a.number <= LARGEST

    def _once(self, name: str, word: Value, number: int, at: Op) -> Value:
        key = name, word, number
        if key not in self.made:
            self.made[key] = self._emit(name, [word], ROW_I32, at) if name == "bitcast" else \
                self._emit(name, [word], ROW_I32, at, amount=number) if name == "shr" else \
                self._emit(name, [word, self._number(number, at)], ROW_I32, at)
        return self.made[key]

    def _number(self, value: int, at: Op) -> Value:
        return self._emit("splat_const", [], ROW_I32, at, value=value if value < 1 << 31 else value - (1 << 32))

    def _emit(self, name: str, operands: list[Value], type: RowType, at: Op, **attributes: object) -> Value:
        self.ops.append(Op(name, operands, (type,), attributes, None, at.location))
        return self.ops[-1].result


def _half_bits(number: int) -> int:
    """Those of a whole number of f16."""
    (bits,) = struct.unpack("<H", struct.pack("<e", float(number)))
    return int(bits)
