"""Matrix products by hand on tile registers (AMX): bf16 with sums of f32, bytes with sums of i32.

    c[m, n] = sum_k a[m, k] * b[k, n], all in C order, M a multiple of 16, N of 64, K of the depth of a tile

A tile of sums is 16 rows by 16 columns; one of a has 16 rows of 64 bytes along the depth; one of b has 16 rows too,
each with 64 bytes: of 16 columns the two (bf16) or four (bytes) neighbours along the depth that one row of a meets. Two
tiles of a meet two of b in four sums, which is all of the eight registers, and each tile that is loaded is used twice.
A product takes 16 cycles, a load 8, so that four of each keep the products' unit busy.

    lines   both operands are copied into lines of tiles, 1 KiB each, one behind the other along the depth: 16 rows of
            a, or 16 columns of b. So tiles are read in order, and never across two cache lines.
    b       a worker copies its columns once, for all rows
    a       by blocks of rows that the second cache holds, each of which meets all columns

Source: Intel 248966, Optimization Reference Manual, chapter on AMX (blocking two by two); blocks that stay in the
second cache as in K. Goto and R. van de Geijn, "Anatomy of high-performance matrix multiplication" (2008).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, f32, i8, i32, tiles, u8, x86, zeros

SIDE, ROW_BYTES = 16, 64
"""Rows of a tile, and columns of one of sums; bytes of a row."""
TILE_BYTES = SIDE * ROW_BYTES
ACROSS = 2
"""Tiles of sums in either direction."""
COLUMNS = 64
"""N is a multiple of it."""


@dataclass(frozen=True)
class Product:
    """multiply: the mnemonic. element_bytes: of a and b. features: besides those of tiles."""

    multiply: str
    element_bytes: int
    features: str

    @property
    def depth(self) -> int:
        """Elements of the depth in a tile: K is a multiple of it."""
        return ROW_BYTES // self.element_bytes

    @property
    def group(self) -> int:
        """Neighbours along the depth that stand side by side in a tile of b."""
        return 4 // self.element_bytes


BF16 = Product("tdpbf16ps", 2, "amx_bf16 avx512vl")
I8 = Product("tdpbssd", 1, "amx_int8")
U8_I8 = Product("tdpbusd", 1, "amx_int8")
M, N, K = sp.dims("M N K")


def make_product(product: Product) -> Any:
    """The kernel that a product stands for."""
    left = {BF16: bf16, I8: i8, U8_I8: u8}[product]
    right, total = (bf16, f32) if product is BF16 else (i8, i32)

    @sp.kernel(name=f"matmul_{left.name}_{right.name}")
    def matmul(a: Tensor[left, M, K], b: Tensor[right, K, N], c: Tensor[total, M, N]):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=total)
            for k in tiles(K):
                acc += a[m, k] @ b[k, n]
            c[m, n] = acc

    return matmul


def writer(product: Product, block: int) -> Callable[[Any], None]:
    """The function that writes the whole kernel. block: rows of a that are copied at a time, a multiple of 16."""

    def write(k: Any) -> None:
        a, b, c = k.data("a"), k.data("b"), k.data("c")
        rows, columns, depth = k.extent("M"), k.extent("N"), k.extent("K")
        # This worker's columns of b, then `block` rows of a: room for both is in a multiple of N.
        right = k.scratch(product.element_bytes, (1, ("K",), product.depth), (1 + -(-block // COLUMNS), ("N",), 1))
        line_bytes, row_bytes, bound = k.r64(), k.r64(), k.r64()
        x86.imul(line_bytes, depth, SIDE * product.element_bytes)
        x86.mov(row_bytes, ROW_BYTES)
        start, stop = _share(k, columns)
        nothing = k.label("nothing")
        x86.cmp(start, stop)
        x86.jge(nothing)
        x86.test(rows, rows)
        x86.je(nothing)
        left = _copy_columns(k, product, b, right, start, stop, columns, depth, line_bytes)
        x86.ldtilecfg(x86.ptr[k.constant(x86.tile_configuration([(SIDE, ROW_BYTES)] * 8))])
        x86.lea(bound, x86.ptr[rows + (block - 1)])
        with k.loop(0, bound, block) as first:
            last = k.r64()
            x86.lea(last, x86.ptr[first + block])
            x86.cmp(last, rows)
            x86.cmovg(last, rows)
            _copy_rows(k, product, a, left, first, last, depth, line_bytes)
            at_right = k.r64()
            x86.mov(at_right, right)
            with k.loop(_copy(k, start), stop, ACROSS * SIDE) as column:
                second = k.r64()
                x86.lea(second, x86.ptr[at_right + line_bytes])
                _rows(k, product, left, (at_right, second), c, column, first, last, columns, depth, line_bytes,
                      row_bytes)
                x86.lea(at_right, x86.ptr[second + line_bytes])
        x86.tilerelease()
        k.place(nothing)
        x86.ret()

    return write


def _copy(k: Any, register: Any) -> Any:
    """A register that begins with what another one holds."""
    made = k.r64()
    x86.mov(made, register)
    return made


def _share(k: Any, columns: Any) -> tuple[Any, Any]:
    """The columns of this worker: (first, end)."""
    worker, workers = k.worker(), k.workers()
    start, stop, each = k.r64(), k.r64(), k.r64()
    # each = ceil(N / COLUMNS / workers) * COLUMNS
    x86.mov(x86.rax, columns)
    x86.shr(x86.rax, COLUMNS.bit_length() - 1)
    x86.lea(x86.rax, x86.ptr[x86.rax + workers - 1])
    x86.xor(x86.edx, x86.edx)
    x86.div(workers)
    x86.imul(each, x86.rax, COLUMNS)
    x86.mov(start, worker)
    x86.imul(start, each)
    x86.lea(stop, x86.ptr[start + each])
    x86.cmp(stop, columns)
    x86.cmovg(stop, columns)
    return start, stop


def _copy_rows(k: Any, product: Product, a: Any, left: Any, first: Any, last: Any, depth: Any,
               line_bytes: Any) -> None:
    """Rows `first` to `last` of a into lines of tiles."""
    source, target, place = k.r64(), k.r64(), k.r64()
    x86.imul(source, depth, product.element_bytes)
    x86.imul(source, first)
    x86.add(source, a)
    x86.mov(target, left)
    line, row = _copy(k, first), k.r64()
    next_line = k.here("line")  # there is one at least
    x86.xor(row.r32, row.r32)
    next_row = k.here("row")
    x86.lea(place, x86.ptr[target + row])
    with k.loop(0, depth, product.depth):
        value = k.zmm()
        x86.vmovups(value, x86.ptr[source])
        x86.vmovups(x86.ptr[place], value)
        x86.add(source, ROW_BYTES)
        x86.add(place, TILE_BYTES)
    x86.add(row, ROW_BYTES)
    x86.cmp(row, TILE_BYTES)
    x86.jl(next_row)
    x86.add(target, line_bytes)
    x86.add(line, SIDE)
    x86.cmp(line, last)
    x86.jl(next_line)


def _copy_columns(k: Any, product: Product, b: Any, right: Any, start: Any, stop: Any, columns: Any, depth: Any,
                  line_bytes: Any) -> Any:
    """Columns `start` to `stop` of all rows of b into lines of tiles: of bf16 two at a time, whole cache lines. Gives
    the place behind them."""
    source, target, row_bytes, ahead = k.r64(), k.r64(), k.r64(), k.r64()
    lines = 2 if product.element_bytes == 2 else 1
    x86.imul(row_bytes, columns, product.element_bytes)
    x86.mov(target, right)
    interleave = [_interleaving(k, half) for half in range(2)] if lines == 2 else []
    with k.loop(_copy(k, start), stop, lines * SIDE) as column:
        x86.lea(source, x86.ptr[b + column * product.element_bytes])
        with k.loop(0, depth, product.group):
            x86.lea(ahead, x86.ptr[source + row_bytes * 8])
            x86.prefetcht0(x86.ptr[ahead])
            x86.prefetcht0(x86.ptr[ahead + row_bytes])
            if lines == 2:
                first, second = k.zmm(), k.zmm()
                x86.vmovups(first, x86.ptr[source])
                x86.vmovups(second, x86.ptr[source + row_bytes])
                for place, indices in zip((target + 0, target + line_bytes), interleave, strict=True):
                    made = k.zmm()
                    x86.vmovaps(made, indices)
                    x86.vpermi2w(made, first, second)
                    x86.vmovups(x86.ptr[place], made)
            else:
                _interleave_bytes(k, source, row_bytes, target)
            for _ in range(product.group):
                x86.add(source, row_bytes)
            x86.add(target, ROW_BYTES)
        if lines == 2:
            x86.add(target, line_bytes)
    return target


def _interleaving(k: Any, half: int) -> Any:
    """Indices for vpermi2w: the 16 low (or high) words of two registers side by side."""
    made = k.zmm()
    words = np.arange(16) + 16 * half
    x86.vmovups(made, x86.ptr[k.constant(np.stack([words, words + 32], axis=1).astype(np.uint16))])
    return made


def _interleave_bytes(k: Any, source: Any, row_bytes: Any, target: Any) -> None:
    """16 bytes of each of four rows, the four of a column side by side."""
    lines = [k.xmm() for _ in range(4)]
    third = k.r64()
    x86.lea(third, x86.ptr[source + row_bytes * 2])
    for line, place in zip(lines, (source + 0, source + row_bytes, third + 0, third + row_bytes), strict=True):
        x86.vmovdqu(line, x86.ptr[place])
    pairs = []
    for first, second in (lines[:2], lines[2:]):
        low, high = k.xmm(), k.xmm()
        x86.vpunpcklbw(low, first, second)
        x86.vpunpckhbw(high, first, second)
        pairs.append((low, high))
    for half in range(2):
        for number, join in enumerate((x86.vpunpcklwd, x86.vpunpckhwd)):
            made = k.xmm()
            join(made, pairs[0][half], pairs[1][half])
            x86.vmovdqu(x86.ptr[target + 16 * (2 * half + number)], made)


def _rows(k: Any, product: Product, left: Any, rights: tuple[Any, ...], c: Any, column: Any, first: Any, last: Any,
          columns: Any, depth: Any, line_bytes: Any, row_bytes: Any) -> None:
    """The copied rows against two lines of columns: two lines of rows at a time, then what may be left is one."""
    at_left, c_place, c_bytes = k.r64(), k.r64(), k.r64()
    x86.mov(at_left, left)
    x86.imul(c_bytes, columns, 4)
    x86.mov(c_place, first)
    x86.imul(c_place, c_bytes)
    x86.add(c_place, c)
    x86.lea(c_place, x86.ptr[c_place + column * 4])
    none_left = k.label("none_left")
    with k.loop(_copy(k, first), last, ACROSS * SIDE) as row:
        _micro_kernel(k, product, ACROSS, at_left, rights, c_place, c_bytes, depth, line_bytes, row_bytes)
    x86.cmp(row, last)
    x86.jge(none_left)
    _micro_kernel(k, product, 1, at_left, rights, c_place, c_bytes, depth, line_bytes, row_bytes)
    k.place(none_left)


def _micro_kernel(k: Any, product: Product, down: int, at_left: Any, rights: tuple[Any, ...], c_place: Any,
                  c_bytes: Any, depth: Any, line_bytes: Any, row_bytes: Any) -> None:
    """`down` lines of rows by two lines of columns; moves at_left and c_place on where there may be more."""
    multiply = getattr(x86, product.multiply)
    sums = [[k.tile() for _ in rights] for _ in range(down)]
    for total in (total for row in sums for total in row):
        x86.tilezero(total)
    of_a = [_copy(k, at_left)]
    if down > 1:
        of_a.append(k.r64())
        x86.lea(of_a[1], x86.ptr[at_left + line_bytes])
    of_b = [_copy(k, right) for right in rights]
    with k.loop(0, depth, product.depth):
        a_tiles, b_tiles = [k.tile() for _ in of_a], [k.tile() for _ in of_b]
        for tile, place in zip((*a_tiles, *b_tiles), (*of_a, *of_b), strict=True):
            x86.tileloadd(tile, x86.ptr[place + row_bytes])
        for row, tile in zip(sums, a_tiles, strict=True):
            for total, other in zip(row, b_tiles, strict=True):
                multiply(total, tile, other)
        for place in (*of_a, *of_b):
            x86.add(place, TILE_BYTES)
    for row in sums:
        for number, total in enumerate(row):
            x86.tilestored(x86.ptr[c_place + c_bytes + 4 * SIDE * number], total)
        if down > 1:
            moved = k.r64()
            x86.imul(moved, c_bytes, SIDE)
            x86.add(c_place, moved)
    if down > 1:
        x86.mov(at_left, of_a[-1])  # which has come to the end of its line


def attach(kernel: Any, product: Product, block: int = 256) -> None:
    """Let a kernel `(a, b, c)` over M, N, K run by hand where it can. block: see `writer`."""
    kernel.assembly(features=f"amx_tile avx512f avx512bw bmi2 {product.features}", contiguous="a b c",
                    divisible={"M": SIDE, "N": COLUMNS, "K": product.depth},
                    flushes_denormals=product is BF16)(writer(product, block))
