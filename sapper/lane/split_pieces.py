"""Pieces of f32 operands for matrix instructions of bf16: each element as a sum of three, split on its way to near
memory, as where it can't be copied there as it is (part_pieces.py).

Enters a load of f32 elements; leaves in near memory three planes of bf16 elements, each as PlainPiece leaves one. With
every element x rounded to the nearest bf16, and what is left rounded again,

    x = high + middle + low      |middle| <= 2^-8 |x|, |low| <= 2^-16 |x|

holds exactly: 24 bits of f32 in three times 8, the sign of each part being its own. Of a product of two such sums, only
middle * low, low * middle and low * low are left out: 2^-23 |x y| at most, what two roundings to f32 may change. A
product of a sum and an element of bf16 is whole. (The idea of three parts: Henry, Tang, Heinecke, "Leveraging the
bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", 2019.)

A finite x that bf16 would round to infinity keeps the largest bf16 as its high part. An infinity, or NaN, stands in the
low part, which meets only the high part of its partner: no infinity meets the 0 that is a part of a number, and its own
high part is one of its sign, for another infinity. What x has below the least normal number may be lost
(docs/language.md, Products).
"""

from __future__ import annotations

from ..ir.nodes import Op, Value
from ..ir.types import MASK, ROW_F32, DType, bf16, f32
from .exact_parts import one_for_infinity
from .matrix import PLANES, MatrixLowering
from .plain_pieces import PlainPiece
from .state import Scalar

LARGEST = 2.0**128 - 2.0**120
"""Of bf16."""


class SplitPiece(PlainPiece):
    """planes: parts of an element."""

    planes = PLANES

    def __init__(self, low: MatrixLowering, op: Op, outer: str, depth_axis: str, extent: int, depth: int, at: int,
                 dtype: DType) -> None:
        super().__init__(low, op, outer, depth_axis, extent, depth, at, dtype)
        self.plane_bytes = self.bytes
        self.bytes *= self.planes

    def copy(self, stage: Value, start: Scalar, rest: Scalar) -> None:
        for number in range(self.passes):
            for first in range(0, self.chunk_elements, self.group):
                parts = map(self._parts, self.elements(start, rest, number, first))
                for plane, elements in enumerate(zip(*parts, strict=True)):
                    self.store(stage, number, first, list(elements), plane)

    def _parts(self, x: Value) -> tuple[Value, Value, Value]:
        """Rows of f32 whose elements bf16 has: packing rounds nothing but the last, of which nothing is left."""
        low, level = self.low, self.low.depth

        def made(name: str, *operands: Value) -> Value:
            return low.emit(level, name, list(operands), ROW_F32)

        def rounded(row: Value) -> Value:
            return low.emit(level, "round_to", [row], ROW_F32, dtype=bf16)

        largest, least, zero = (low.constant(number, f32) for number in (LARGEST, -LARGEST, 0.0))
        one = one_for_infinity(low, level, x)
        finite = low.emit(level, "cmp", [made("abs", x), low.constant(float("inf"), f32)], MASK, cond="lt")
        high = made("select", finite, made("max", made("min", rounded(x), largest), least), one)
        rest = made("sub", x, high)
        middle = made("select", finite, rounded(rest), zero)
        return high, middle, made("sub", rest, middle)
