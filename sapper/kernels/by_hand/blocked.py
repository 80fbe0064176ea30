"""A matrix product in blocks of the depth, by hand: what GotoBLAS does beyond packing.

    c[m, n] = sum_k a[m, k] * b[k, n], all f32 in C order, N a multiple of 16, K of 4

Source: K. Goto and R. van de Geijn, "Anatomy of high-performance matrix multiplication" (ACM TOMS 2008): the depth is
taken DEPTH at a time, so that what one micro-kernel reads of b stays in the first cache, and all rows of a block of a
in the second while every panel of b meets them; T. Smith et al., "Anatomy of high-performance many-threaded matrix
multiplication" (IPDPS 2014): a tile of c is asked for when its micro-kernel begins, whose sums meet it at the end.

    for each block of the depth, and what is left
      for each panel of 32 columns (a worker's share)     pack DEPTH x 32 of b: 32 KiB
        for 14 rows at a time                             prefetch c, multiply-add over the block, add to c
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from sapper import x86

from .matmul import AVX512, _pack, _second_half, _share

DEPTH = 256
UNROLLED = 4
COLUMNS = AVX512.columns


def writer(block_depth: int) -> Callable[[Any], None]:
    """The function that writes the kernel, with blocks of so many steps of the depth, a multiple of UNROLLED."""
    return lambda k: _write(k, block_depth)


def _write(k: Any, block_depth: int) -> None:
    a, b, c = k.data("a"), k.data("b"), k.data("c")
    rows, columns, depth = k.extent("M"), k.extent("N"), k.extent("K")
    start, stop = _share(k, AVX512, columns)
    panel = k.scratch(4, (block_depth, (), 1), (COLUMNS, (), 1))
    a_bytes, c_bytes, rest = k.r64(), k.r64(), k.r64()
    x86.imul(a_bytes, depth, 4)
    x86.imul(c_bytes, columns, 4)

    def steps(block: Any, chunk: Any) -> None:
        """The steps of the depth from `block` on, so many of them, for all of this worker's panels."""
        added = _any_before(k, block)
        column = k.r64()
        x86.mov(column, start)
        with k.loop(column, stop, COLUMNS):
            half = _second_half(k, AVX512, column, columns)
            a_row, c_row, b_block = k.r64(), k.r64(), k.r64()
            x86.mov(b_block, block)
            x86.imul(b_block, c_bytes)
            x86.add(b_block, b)
            _pack(k, AVX512, b_block, panel, column, columns, chunk, half, None)
            x86.lea(a_row, x86.ptr[a + block * 4])
            x86.lea(c_row, x86.ptr[c + column * 4])
            with k.loop(0, rows, AVX512.rows) as row:
                _tile(k, AVX512.rows, a_row, panel, c_row, a_bytes, c_bytes, chunk, half, added)
            with k.loop(row, rows):
                _tile(k, 1, a_row, panel, c_row, a_bytes, c_bytes, chunk, half, added)

    with k.loop(0, depth, block_depth) as block:
        steps(block, block_depth)
    x86.mov(rest, depth)
    x86.sub(rest, block)
    steps(block, rest)  # of an empty depth, too, whose sums are 0
    x86.ret()


def _any_before(k: Any, block: Any) -> Any:
    """An opmask that is all on but in the first block of the depth, where c holds nothing yet."""
    mask, lanes, none = k.mask(), k.r64(), k.r64()
    x86.xor(none.r32, none.r32)
    x86.mov(lanes, -1)
    x86.test(block, block)
    x86.cmove(lanes, none)
    x86.kmovq(mask, lanes)
    return mask


def _tile(k: Any, rows: int, a_row: Any, panel: Any, c_row: Any, a_bytes: Any, c_bytes: Any, depth: Any, half: Any,
          added: Any) -> None:
    """`rows` rows by two vectors of c; moves a_row and c_row on."""
    sums = [[k.zmm(), k.zmm()] for _ in range(rows)]
    for total in (total for pair in sums for total in pair):
        x86.vxorps(total.xmm, total.xmm, total.xmm)
    bases = [k.r64() for _ in range(0, rows, 3)]
    x86.mov(bases[0], a_row)
    for before, base in pairwise(bases):
        x86.lea(base, x86.ptr[before + a_bytes * 2])
        x86.add(base, a_bytes)
    ahead = k.r64()
    x86.mov(ahead, c_row)
    for _ in range(rows):
        x86.prefetcht0(x86.ptr[ahead])
        x86.prefetcht0(x86.ptr[ahead + 64])
        x86.add(ahead, c_bytes)
    at_panel = k.r64()
    x86.mov(at_panel, panel)
    with k.loop(0, depth, UNROLLED):
        for step in range(UNROLLED):
            pair = [k.zmm(), k.zmm()]
            for number, vector in enumerate(pair):
                x86.vmovaps(vector, x86.ptr[at_panel + (128 * step + 64 * number)])
            for row in range(rows):
                address = bases[row // 3] + 4 * step
                element = k.zmm()
                x86.vbroadcastss(element, x86.dword[address + a_bytes * (row % 3) if row % 3 else address])
                for total, vector in zip(sums[row], pair, strict=True):
                    x86.vfmadd231ps(total, vector, element)
        for base in bases:
            x86.add(base, 4 * UNROLLED)
        x86.add(at_panel, 128 * UNROLLED)
    both = k.mask()
    x86.kandw(both, half, added)
    for one, two in sums:
        x86.vaddps(one[added], one, x86.ptr[c_row])
        x86.vaddps(two[both], two, x86.ptr[c_row + 64])
        x86.vmovups(x86.ptr[c_row], one)
        x86.vmovups(x86.ptr[c_row + 64][half], two)
        x86.add(c_row, c_bytes)
    moved = k.r64()
    x86.imul(moved, a_bytes, rows)
    x86.add(a_row, moved)


def attach(kernel: Any, block_depth: int = DEPTH) -> None:
    """Let a kernel `(a, b, c)` over M, N, K run by hand where it can."""
    kernel.assembly(features="avx512f avx512bw avx512dq avx512vl bmi2", contiguous="a b c",
                    divisible={"N": 16, "K": 16})(writer(block_depth))
