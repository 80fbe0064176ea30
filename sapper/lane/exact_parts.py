"""Floats as sums of bf16, of which a processor with products of bf16 makes products of wider floats.

A float of 24 bits is three of 8: what it rounds to as bf16, what the rest rounds to, and what is left then. No bit is
lost down to 2**-126, below which products of tiles take zero for what they are given. Products of two bf16 are exact in
f32, so those of all parts together are what the product of the floats is, and sums of them lose no more than others.

Where both operands have three parts, six of nine products count: the first that is left out is some 2**-24 of the
whole, as much as one rounding (Ozaki et al., Error-free transformations of matrix multiplication, 2012; Henry, Tang
and Heinecke, Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations, 2019).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir.nodes import Value
from ..ir.types import MASK, ROW_B32, ROW_F32, ROW_I32, DType, bf16, f16, f32, i32

if TYPE_CHECKING:
    from .rows import RowEvaluation

PARTS = {bf16: 1, f16: 2, f32: 3}
"""How many bf16 a float of each dtype is."""

Products = tuple[tuple[int, int], ...]
"""Which part of the left operand meets which one of the right."""

_SIX = ((0, 2), (0, 1), (1, 1), (1, 0), (0, 0), (2, 0))
"""From each product to the next one operand stays."""

_INFINITY_TO_ONE = ~(1 << 30)
"""By the upper bit of the exponent they differ."""


def products(left: DType, right: DType) -> Products | None:
    """The products of parts that make up a product of floats; None where a dtype has no parts."""
    if left not in PARTS or right not in PARTS:
        return None
    a, b = PARTS[left], PARTS[right]
    if min(a, b) == 1:
        return tuple((i, j) for i in reversed(range(a)) for j in reversed(range(b)))
    return tuple((i, j) for i, j in _SIX if i < a and j < b)


def slots_of_parts(low: RowEvaluation, level: int, even: Value, odd: Value, dtype: DType, rounds: bool) -> list[Value]:
    """The parts of two rows of floats, as wide as f32, of which each slot holds one element: rows of slots.

    Parts are cut off, which no float is too large for, and of an infinity nothing is left. rounds: so that what is left
    out of products is as often above as below, the second part is rounded, and then has 16 bits; and an infinity is the
    last part, behind one of its sign and zero, as it would otherwise meet zeros of the other operand's parts.
    """
    if PARTS[dtype] == 1:
        return [joined(low, level, even, odd)]
    rows = [_Parts(low, level, row) for row in (even, odd)]
    if PARTS[dtype] == 2:
        return [joined(low, level, *(row.cut for row in rows)), joined(low, level, *(row.rest for row in rows))]
    if not rounds:
        seconds = [cut(low, level, row.rest) for row in rows]
        made = [joined(low, level, *(row.cut for row in rows)), joined(low, level, *seconds)]
        lasts = [low.emit(level, "sub", [row.rest, second], ROW_F32) for row, second in zip(rows, seconds, strict=True)]
        return [*made, joined(low, level, *lasts)]
    second = low.emit(level, "pack_bf16", [row.rest for row in rows], ROW_B32)
    lasts = [row.last(widened) for row, widened in zip(rows, widened(low, level, second), strict=True)]
    return [joined(low, level, *(row.first() for row in rows)), second, joined(low, level, *lasts)]


class _Parts:
    """A row of floats: its upper half, what is left of it, and where it is infinite."""

    def __init__(self, low: RowEvaluation, level: int, row: Value) -> None:
        self.low, self.level, self.row = low, level, row
        size = low.emit(level, "abs", [row], ROW_F32)
        self.infinite = low.emit(level, "cmp", [size, low.constant(float("inf"), f32)], MASK, cond="eq")
        self.cut = cut(low, level, row)
        rest = low.emit(level, "sub", [row, self.cut], ROW_F32)
        self.rest = low.emit(level, "select", [self.infinite, low.constant(0.0, f32), rest], ROW_F32)

    def first(self) -> Value:
        """The upper half; of an infinity one, of its sign."""
        one = one_for_infinity(self.low, self.level, self.row)
        return self.low.emit(self.level, "select", [self.infinite, one, self.cut], ROW_F32)

    def last(self, second: Value) -> Value:
        """What a second part leaves of the rest; of an infinity all."""
        left = self.low.emit(self.level, "sub", [self.rest, second], ROW_F32)
        return self.low.emit(self.level, "select", [self.infinite, self.row, left], ROW_F32)


def one_for_infinity(low: RowEvaluation, level: int, row: Value) -> Value:
    """One, of the sign of an infinity; of anything that is no number a number."""
    bits = low.emit(level, "bitcast", [row], ROW_I32)
    one = low.emit(level, "and", [bits, low.constant(_INFINITY_TO_ONE, i32)], ROW_I32)
    return low.emit(level, "bitcast", [one], ROW_F32)


def cut(low: RowEvaluation, level: int, row: Value) -> Value:
    """The upper half of each float."""
    return low.emit(level, "bitcast", [_upper(low, level, row)], ROW_F32)


def _upper(low: RowEvaluation, level: int, row: Value) -> Value:
    bits = low.emit(level, "bitcast", [row], ROW_I32)
    return low.emit(level, "and", [bits, low.constant(-1 << 16, i32)], ROW_I32)


def joined(low: RowEvaluation, level: int, even: Value, odd: Value) -> Value:
    """Slots of floats whose upper halves are all of them."""
    below = low.emit(level, "shr", [low.emit(level, "bitcast", [even], ROW_I32)], ROW_I32, amount=16)
    return low.emit(level, "bitcast", [low.emit(level, "or", [_upper(low, level, odd), below], ROW_I32)], ROW_B32)


def widened(low: RowEvaluation, level: int, slots: Value) -> list[Value]:
    """Both elements of slots of bf16 as f32."""
    bits = low.emit(level, "bitcast", [slots], ROW_I32)
    lower = low.emit(level, "shl", [bits], ROW_I32, amount=16)
    return [low.emit(level, "bitcast", [lower], ROW_F32), cut(low, level, slots)]
