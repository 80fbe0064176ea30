"""4-bit weights to pairs of narrow floats, by hand: two numbers in one logic instruction and one multiply-add.

    unpack4_bf16x2    block: of a word, the signed numbers at bits `shift` and `shift` + 16 as bf16, the lower one low
    unpack4_f16x2     the same as f16

A small number is or-ed into the low bits of a float that is a power of two: the last bit of 2**7 (bf16) and of 2**10
(f16) is worth 1. Flipping the sign's bit of the four on the way makes it a number from 0 to 15 that is 8 too large, so
that what is subtracted is the power of two and 8 more; both are exact. lop3 does the cut, the flip and the or at once,
for both halves of the word, as (word & mask) ^ turn.

Source: Y. J. Kim, R. Henry, R. Fahim, H. H. Awadalla, "Who Says Elephants Can't Run: Bringing Large Scale MoE Models
into Cloud Scale Production" (SustaiNLP 2022), section 3.2, has it for f16, with numbers stored 8 too large already.
"""

from __future__ import annotations

from typing import Any

import sapper as sp
from sapper import Tensor, f16, f32, i32, ptx, tiles, where

N, = sp.dims("N"),
AND_XOR = 0xF0 & 0xCC ^ 0xAA
"""The table of lop3 for (a & b) ^ c (PTX ISA, lop3: a, b, c are 0xF0, 0xCC, 0xAA)."""
LOW_FOUR = 0x000F


def _both(half: int) -> int:
    return half << 16 | half


def _cut(word: Any, shift: int, offset: int) -> Any:
    """In a new register: of both halves the four bits from `shift` on, put into a power of two, 8 too large. offset:
    the float that is the power of two and 8."""
    moved, mask, turn = (ptx.current().b32() for _ in range(3))
    ptx.shr_u32(moved, word, shift)
    ptx.mov_b32(mask, _both(LOW_FOUR))
    ptx.mov_b32(turn, _both(offset))
    ptx.lop3_b32(moved, moved, mask, turn, AND_XOR)
    return moved


@ptx.block("unpack4_bf16x2", inputs="i32", result="i32", features="sm_80")
def unpack4_bf16x2(out: Any, word: Any, shift: int) -> None:
    """bf16 has sums from sm_90 on, but everywhere a multiply-add: 1 * x - 136."""
    one, less = (ptx.current().b32() for _ in range(2))
    ptx.mov_b32(one, _both(0x3F80))
    ptx.mov_b32(less, _both(0xC308))
    ptx.fma_rn_bf16x2(out, _cut(word, shift, 0x4308), one, less)


@ptx.block("unpack4_f16x2", inputs="i32", result="i32", features="sm_80")
def unpack4_f16x2(out: Any, word: Any, shift: int) -> None:
    """x - 1032."""
    more = ptx.current().b32()
    ptx.mov_b32(more, _both(0x6408))
    ptx.sub_rn_f16x2(out, _cut(word, shift, 0x6408), more)


def make_unpack(narrow: Any, by_hand: bool) -> Any:
    """y[j, n]: the numbers j and j + 4 of the eight in w[n], as a pair of bf16 or f16."""
    half_precision = narrow is f16
    block = unpack4_f16x2 if half_precision else unpack4_bf16x2

    def bits(number):
        """Of the narrow float, in the low half: the upper half of the f32 as it is, or its exponent 112 smaller."""
        whole = number.to(f32).bits(i32)
        if half_precision:
            return where(number == 0, 0, (whole >> 16 & 0x8000) | ((whole & 0x7FFFFFFF) >> 13) - (112 << 10))
        return whole >> 16 & 0xFFFF

    def pair(word, shift):
        return bits(word << (28 - shift) >> 28) | bits(word << (12 - shift) >> 28) << 16

    def unpacked(word, shift):
        if by_hand:
            return sp.asm(block, word, shift, meaning=lambda p: pair(p, shift))
        return pair(word, shift)

    @sp.kernel(name="unpack4")
    def unpack4(w: Tensor[i32, N], y: Tensor[i32, 4, N]):
        for n in tiles(N):
            word = w[n]
            y[0, n] = unpacked(word, 0)
            y[1, n] = unpacked(word, 4)
            y[2, n] = unpacked(word, 8)
            y[3, n] = unpacked(word, 12)

    return unpack4
