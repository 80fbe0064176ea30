"""Vector work by hand: an exponential, sums of rows, 4-bit weights, an embedding table.

    exp_by_table      block for `exp`: 32 powers of two from registers, three terms
    row_sum           s[m] = sum_n x[m, n]: sixteen rows are summed across their lanes together
    sum_of_each_row   block for the last step of that in generated code; sum_of_lanes: for one row
    round_to_bf16     block for the cast to bf16
    unpack4           block: one of eight signed 4-bit numbers of a word, as a float, by a table of sixteen
    embedding         y[t, d] = table[ids[t], d]: asks for the row of a later token while it copies one
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, f32, i32, tiles, x86

M, N, T, V, D = sp.dims("M N T V D")
FEATURES = "avx512f avx512bw avx512dq avx512vl bmi2"


# --- exp --------------------------------------------------------------------------------------------------------------

def _spread(value: float) -> Any:
    return x86.broadcast[x86.current().constant(np.float32(value))]


_STEP = math.log(2) / 32
_STEP_HIGH = float((np.float32(_STEP).view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32))
"""The leading 12 bits of ln(2)/32, so that its product with an integer below 2**12 is exact."""


@x86.block("exp_by_table", inputs="f32", result="f32", features="avx512f", implements="exp")
def exp_by_table(out: Any, x: Any) -> None:
    """e^x = 2^floor(k/32) 2^(k%32/32) e^r with k the nearest integer to 32 x log2(e), so |r| <= ln(2)/64, where three
    terms leave an error of 6e-10. Source: P. Tang, "Table-driven implementation of the exponential function in IEEE
    floating-point arithmetic" (1989); here the table is two registers, and vscalefps takes the floor."""
    a = x86.current()
    k, index, r, square, power, kept = (a.zmm() for _ in range(6))
    # Beyond these the result is 0 or infinity anyway; of a NaN, minimum and maximum give the second operand, x.
    x86.vbroadcastss(kept, x86.ptr[a.constant(np.float32(89))])
    x86.vminps(kept, kept, x)
    x86.vbroadcastss(r, x86.ptr[a.constant(np.float32(-105))])
    x86.vmaxps(r, r, kept)
    magic = 1.5 * 2**23  # adding it leaves the integer in the low bits
    x86.vbroadcastss(index, x86.ptr[a.constant(np.float32(magic))])
    x86.vfmadd231ps(index, r, _spread(1 / _STEP))
    x86.vsubps(k, index, _spread(magic))
    x86.vfnmadd231ps(r, k, _spread(_STEP_HIGH))
    x86.vfnmadd231ps(r, k, _spread(_STEP - _STEP_HIGH))
    powers = (2.0 ** (np.arange(32) / 32)).astype(np.float32)
    x86.vmovups(power, x86.ptr[a.constant(powers[:16])])
    x86.vpermi2ps(index, power, x86.ptr[a.constant(powers[16:])])
    x86.vmulps(square, r, r)
    x86.vbroadcastss(power, x86.ptr[a.constant(np.float32(1 / 6))])
    x86.vfmadd213ps(power, r, _spread(0.5))
    x86.vfmadd213ps(power, square, r)
    x86.vfmadd213ps(power, index, index)
    x86.vmulps(k, k, _spread(1 / 32))
    x86.vscalefps(out, power, k)


# --- Sums of rows -------------------------------------------------------------------------------------------------

def make_row_sum() -> Any:
    @sp.kernel(name="row_sum")
    def row_sum(x: Tensor[f32, M, N], s: Tensor[f32, M]):
        for m in tiles(M):
            total = sp.zeros(m, dtype=f32)
            for n in tiles(N):
                total += sp.sum(x[m, n], over=n)
            s[m] = total

    return row_sum


def write_row_sum(a: Any) -> None:
    """Sixteen rows at a time: their sixteen vectors of partial sums are transposed and added in four stages, 30
    shuffles and 15 additions, where a row by itself takes 4 and 4."""
    x, s, rows, columns = a.data("x"), a.data("s"), a.extent("M"), a.extent("N")
    row_bytes = a.r64()
    x86.imul(row_bytes, columns, 4)
    with a.loop(0, rows, 16) as row:
        bases = [a.r64() for _ in range(6)]
        x86.mov(bases[0], x)
        for before, base in pairwise(bases):
            x86.lea(base, x86.ptr[before + row_bytes * 2])
            x86.add(base, row_bytes)
        sums = [a.zmm() for _ in range(16)]
        for total in sums:
            x86.vxorps(total.xmm, total.xmm, total.xmm)
        with a.loop(0, columns, 16):
            for number, total in enumerate(sums):
                beside = number % 3
                base = bases[number // 3]
                x86.vaddps(total, total, x86.ptr[base + row_bytes * beside if beside else base])
            for base in bases:
                x86.add(base, 64)
        x86.vmovups(x86.ptr[s + row * 4], _transposed_sum(a, sums))
        moved = a.r64()
        x86.imul(moved, row_bytes, 16)
        x86.add(x, moved)
    with a.loop(row, rows) as row:
        total = a.zmm()
        x86.vxorps(total.xmm, total.xmm, total.xmm)
        with a.loop(0, columns, 16) as column:
            x86.vaddps(total, total, x86.ptr[x + column * 4])
        half, quarter = a.ymm(), a.xmm()
        x86.vextractf32x8(half, total, 1)
        x86.vaddps(half, half, total.ymm)
        x86.vextractf32x4(quarter, half, 1)
        x86.vaddps(quarter, quarter, half.xmm)
        other = a.xmm()
        x86.vmovhlps(other, quarter, quarter)
        x86.vaddps(quarter, quarter, other)
        x86.vmovshdup(other, quarter)
        x86.vaddss(quarter, quarter, other)
        x86.vmovss(x86.ptr[s + row * 4], quarter)
        x86.add(x, row_bytes)
    x86.ret()


def _transposed_sum(a: Any, sums: list[Any]) -> Any:
    """A vector whose lane i is the sum of the lanes of sums[i]."""
    for low, high in ((x86.vunpcklps, x86.vunpckhps), (x86.vunpcklpd, x86.vunpckhpd)):
        joined = []
        for first, second in zip(sums[::2], sums[1::2], strict=True):
            one, two = a.zmm(), a.zmm()
            low(one, first, second)
            high(two, first, second)
            x86.vaddps(one, one, two)
            joined.append(one)
        sums = joined
    while len(sums) > 1:
        joined = []
        for first, second in zip(sums[::2], sums[1::2], strict=True):
            one, two = a.zmm(), a.zmm()
            x86.vshuff32x4(one, first, second, 0x88)
            x86.vshuff32x4(two, first, second, 0xDD)
            x86.vaddps(one, one, two)
            joined.append(one)
        sums = joined
    return sums[0]


@x86.block("sum_of_each_row", inputs=" ".join(["f32"] * 16), result="f32", features="avx512f",
           implements="sum_of_each_row")
def sum_of_each_row(out: Any, *parts: Any) -> None:
    """The same tree as a block: lane i is the sum of the lanes of part i."""
    x86.vmovaps(out, _transposed_sum(x86.current(), list(parts)))


@x86.block("sum_of_lanes", inputs="f32", result="f32", features="avx512f avx512dq", implements="sum_of_lanes")
def sum_of_lanes(out: Any, row: Any) -> None:
    """One row by itself, its sum in every lane: in each stage a row is added to itself with halves, quarters, pairs and
    neighbours exchanged; the last two stages stay within 128 bits, where a shuffle takes one cycle and not three."""
    a = x86.current()
    turned = a.zmm()
    x86.vshuff64x2(turned, row, row, 0x4E)
    x86.vaddps(out, row, turned)
    x86.vshuff64x2(turned, out, out, 0xB1)
    x86.vaddps(out, out, turned)
    x86.vpermilps(turned, out, 0x4E)
    x86.vaddps(out, out, turned)
    x86.vpermilps(turned, out, 0xB1)
    x86.vaddps(out, out, turned)


# --- Casts ------------------------------------------------------------------------------------------------------------

@x86.block("round_to_bf16", inputs="f32", result="f32", features="avx512f", implements="to_bf16")
def round_to_bf16(out: Any, row: Any) -> None:
    """The nearest bf16 of each lane, ties to even, in the upper half of the lane: half a unit is added, less one, which
    a masked addition puts back where the last bit that stays is 1. A NaN keeps its bits and is made quiet.
    (vcvtneps2bf16 takes denormals for 0.) What lies in the lower half is cleared."""
    a = x86.current()
    odd, nan = a.mask(), a.mask()

    def words(value: int) -> Any:
        return x86.broadcast[a.constant(np.uint32(value))]

    x86.vptestmd(odd, row, words(0x10000))
    x86.vcmpps(nan, row, row, 3)
    x86.vpaddd(out, row, words(0x7FFF))
    x86.vpaddd(out[odd], out, words(1))
    x86.vpord(out[nan], row, words(0x400000))
    x86.vpandd(out, out, words(0xFFFF0000))


# --- 4-bit weights --------------------------------------------------------------------------------------------------

@x86.block("unpack4", inputs="i32", result="f32", features="avx512f")
def unpack4(out: Any, word: Any, shift: int) -> None:
    """The signed 4-bit number at bit `shift` of each word as a float: vpermps takes the low four bits of each lane as
    its index, so no bit has to be cleared, and the table holds the floats, so nothing is converted."""
    a = x86.current()
    index = a.zmm()
    numbers = np.concatenate([np.arange(8), np.arange(-8, 0)]).astype(np.float32)
    x86.vpsrld(index, word, shift)
    x86.vpermps(out, index, x86.ptr[a.constant(numbers)])


def make_dot4(by_hand: bool) -> Any:
    """y[n] = sum_j w4[j of n] * v[j, n]: eight 4-bit weights in each word."""
    def nibble(word, shift):
        return (word << (28 - shift) >> 28).to(f32)

    def weight(word, shift):
        if by_hand:
            return sp.asm(unpack4, word, shift, meaning=lambda p: nibble(p, shift))
        return nibble(word, shift)

    @sp.kernel(name="dot4")
    def dot4(w: Tensor[i32, N], v: Tensor[f32, 8, N], y: Tensor[f32, N]):
        for n in tiles(N):
            word = w[n]
            y[n] = (weight(word, 0) * v[0, n] + weight(word, 4) * v[1, n] + weight(word, 8) * v[2, n]
                    + weight(word, 12) * v[3, n] + weight(word, 16) * v[4, n] + weight(word, 20) * v[5, n]
                    + weight(word, 24) * v[6, n] + weight(word, 28) * v[7, n])

    return dot4


# --- Embedding ------------------------------------------------------------------------------------------------------

AHEAD = 4
"""Tokens between the row that is copied and the one that is asked for."""


def make_embedding() -> Any:
    @sp.kernel(name="embedding")
    def embedding(table: Tensor[f32, V, D], ids: Tensor[i32, T], y: Tensor[f32, T, D]):
        for t, d in tiles(T, D):
            y[t, d] = table[ids[t], d]

    return embedding


def write_embedding(a: Any) -> None:
    """A row is asked for AHEAD tokens early, line by line while another is copied: rows lie anywhere, so the hardware
    sees each stream only after it has begun."""
    table, ids, y = a.data("table"), a.data("ids"), a.data("y")
    tokens, columns = a.extent("T"), a.extent("D")
    row_bytes, last = a.r64(), a.r64()
    x86.imul(row_bytes, columns, 4)
    x86.lea(last, x86.ptr[tokens - 1])
    with a.loop(0, tokens) as token:
        source, later, number = a.r64(), a.r64(), a.r64()
        x86.lea(number, x86.ptr[token + AHEAD])
        x86.cmp(number, last)
        x86.cmovg(number, last)
        for pointer, at in ((later, number), (source, token)):
            x86.movsxd(pointer, x86.dword[ids + at * 4])
            x86.imul(pointer, row_bytes)
            x86.add(pointer, table)
        value = a.zmm()
        with a.loop(0, columns, 16) as column:
            x86.prefetcht0(x86.ptr[later + column * 4])
            x86.vmovups(value, x86.ptr[source + column * 4])
            x86.vmovups(x86.ptr[y + column * 4], value)
        x86.add(y, row_bytes)
    x86.ret()


def attach_row_sum(kernel: Any) -> None:
    kernel.assembly(features=FEATURES, contiguous="x s", divisible={"N": 16})(write_row_sum)


def attach_embedding(kernel: Any) -> None:
    kernel.assembly(features=FEATURES, contiguous="table ids y", divisible={"D": 16})(write_embedding)
