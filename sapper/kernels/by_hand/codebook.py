"""4-bit codes to the bytes of a codebook, by hand: 64 codes in one lookup.

    y[h, n] = book[w[n] >> 4 h & 15], h = 0 the low halves of the bytes, 1 the high ones

Source: a byte shuffle as a table of sixteen bytes is W. Mula's, "SSSE3: fast popcount" (2008), where halves of bytes
look up their bits; W. Mula, N. Kurz and D. Lemire, "Faster population counts using AVX2 instructions" (The Computer
Journal 2018) has it at 32 bytes. Here the table is any codebook (NF4, IQ4_NL, FP4), so that weights become bytes for
integer dot products. A shuffle ignores bits 4 to 6 and gives 0 where bit 7 is set, so both halves are cut to four bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, i8, i32, tiles, u8, x86

N, = sp.dims("N"),
FEATURES = "avx512f avx512bw bmi2"


def make_codebook() -> Any:
    @sp.kernel(name="codebook")
    def codebook(w: Tensor[u8, N], book: Tensor[i8, 16], y: Tensor[i8, 2, N]):
        for n in tiles(N):
            packed = w[n].to(i32)
            y[0, n] = book[packed & 15]
            y[1, n] = book[packed >> 4 & 15]

    return codebook


def write_codebook(a: Any) -> None:
    w, book, y, n = a.data("w"), a.data("book"), a.data("y"), a.extent("N")
    table, four, high = a.zmm(), a.zmm(), a.r64()
    x86.vbroadcasti32x4(table, x86.ptr[book])
    x86.vpbroadcastd(four, x86.ptr[a.constant(np.uint32(0x0F0F0F0F))])
    x86.lea(high, x86.ptr[y + n])

    def decode(at: Any, count: Any = None) -> None:
        """64 bytes from `at` on, or under an opmask."""
        codes, upper = a.zmm(), a.zmm()
        x86.vmovdqu8(codes if count is None else codes[count, x86.z], x86.ptr[w + at])
        x86.vpsrlw(upper, codes, 4)
        for target, half in ((y, codes), (high, upper)):
            x86.vpandd(half, half, four)
            x86.vpshufb(half, table, half)
            place = x86.ptr[target + at]
            x86.vmovdqu8(place if count is None else place[count], half)

    with a.loop(0, n, 64) as at:
        decode(at)
    ones, rest = a.r64(), a.mask()
    x86.sub(n, at)
    x86.mov(ones, -1)
    x86.bzhi(ones, ones, n)
    x86.kmovq(rest, ones)
    decode(at, rest)
    x86.ret()


def attach(kernel: Any) -> None:
    kernel.assembly(features=FEATURES, contiguous="w book y")(write_codebook)
