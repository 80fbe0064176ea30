"""Values of 8 bits, four neighbours in a word: what is done with each of them is done once, in the word.

Enters a value of bytes that is computed of loads, whose words are in registers; leaves a row of words with four of its
elements each, the first in the low bits. Bits are joined, masked and shifted; what another operation makes, or memory
has apart, has no words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..ir.nodes import Op, Value
from ..ir.types import ROW_I32, TileType, i32
from ..tile.plan import axes_of
from .block_nests import number_of
from .matrix import MatrixLowering
from .places import Element

JOINED = frozenset({"and", "or", "xor"})
Words = Mapping[Op, Mapping[tuple[int, ...], Element]]
"""Of each load, by place along the axes of what it gives."""


def byte_word(low: MatrixLowering, level: int, words: Words, value: Value,
              ats: Sequence[dict[str, int]]) -> Value | None:
    """row<i32>: a value's elements at four places, of all of its axes; None where they have no word."""
    op = value.op
    assert op is not None and isinstance(value.type, TileType)
    if op.name == "load":
        if op not in words:
            return None
        found = [words[op][tuple(at[a] for a in axes_of(value))] for at in ats]
        beside = all(element.row is found[0].row and element.place == place for place, element in enumerate(found))
        return low.emit(level, "bitcast", [found[0].row], ROW_I32) if beside else None
    if op.name == "cast":
        before = op.operands[0]
        assert isinstance(before.type, TileType)
        return byte_word(low, level, words, before, ats) if before.type.dtype.bits == 8 else None
    number = number_of(op.operands[-1]) if op.operands else None
    shifts = op.name in ("shl", "shr") and number is not None and 0 <= number < 8 and (
        op.name == "shl" or value.type.dtype.kind != "i")
    first = byte_word(low, level, words, op.operands[0], ats) if shifts or op.name in JOINED else None
    if first is None:
        return None

    def joined(name: str, row: Value, number: int) -> Value:
        mask = (number & 0xFF) * 0x01010101
        return low.emit(level, name, [row, low.constant(mask - (mask >> 31 << 32), i32)], ROW_I32)

    if number is None:
        second = byte_word(low, level, words, op.operands[1], ats)
        return None if second is None else low.emit(level, op.name, [first, second], ROW_I32)
    if op.name in JOINED:
        return joined(op.name, first, number)
    moved = low.emit(level, op.name, [first], ROW_I32, amount=number) if number else first
    return joined("and", moved, 0xFF << number if op.name == "shl" else 0xFF >> number)
