"""Matrix products by hand on tile registers (AMX): bf16 with sums of f32, bytes with sums of i32.

    c[m, n] = sum_k a[m, k] * b[k, n], all in C order, M and N multiples of 16, K of the depth of a tile

A tile of sums is 16 rows by 16 columns; one of a has 16 rows of 64 bytes, which it takes from where they lie; one of b
has 16 rows too, each with 64 bytes: of 16 columns the two (bf16) or four (bytes) neighbours along the depth that one
row of a meets. So a worker packs two columns of such tiles into its scratch memory, as deep as K, then walks the rows
of a: two tiles of a meet two of b in four sums, which is all of the eight registers, and each tile that is loaded is
used twice. A product takes 16 cycles, a load 8, so that four of each keep the products' unit busy.
Source: Intel 248966, Optimization Reference Manual, chapter on AMX (blocking two by two).
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


BF16 = Product("tdpbf16ps", 2, "amx_bf16 avx512f avx512bw avx512vl")
I8 = Product("tdpbssd", 1, "amx_int8 avx2")
U8_I8 = Product("tdpbusd", 1, "amx_int8 avx2")
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


def writer(product: Product) -> Callable[[Any], None]:
    """The function that writes the whole kernel."""

    def write(k: Any) -> None:
        a, b, c = k.data("a"), k.data("b"), k.data("c")
        rows, columns, depth = k.extent("M"), k.extent("N"), k.extent("K")
        panel = k.scratch(product.element_bytes, (1, ("K",), product.depth), (ACROSS * SIDE, (), 1))
        panel_bytes, line = k.r64(), k.r64()  # of one column of tiles; from a row of a tile of it to the next
        x86.imul(panel_bytes, depth, SIDE * product.element_bytes)
        x86.mov(line, ROW_BYTES)
        start, stop = _share(k, columns)
        x86.ldtilecfg(x86.ptr[k.constant(x86.tile_configuration([(SIDE, ROW_BYTES)] * 8))])
        with k.loop(start, stop, ACROSS * SIDE) as column:
            one, done, next_column = k.label("one"), k.label("done"), k.r64()
            _pack(k, product, b, panel, column, columns, depth)
            x86.lea(next_column, x86.ptr[column + SIDE])
            x86.cmp(next_column, columns)
            x86.jge(one)
            second = k.r64()
            x86.lea(second, x86.ptr[panel + panel_bytes])
            _pack(k, product, b, second, next_column, columns, depth)
            _rows(k, product, a, (panel, second), c, column, rows, columns, depth, line)
            x86.jmp(done)
            k.place(one)
            _rows(k, product, a, (panel,), c, column, rows, columns, depth, line)
            k.place(done)
        x86.tilerelease()
        x86.ret()

    return write


def _share(k: Any, columns: Any) -> tuple[Any, Any]:
    """The columns of this worker: (first, end), the end so that a last tile without a second one counts."""
    width = ACROSS * SIDE
    worker, workers = k.worker(), k.workers()
    start, stop, each = k.r64(), k.r64(), k.r64()
    # pairs = ceil(N / width), each = ceil(pairs / workers) * width
    x86.lea(x86.rax, x86.ptr[columns + (width - 1)])
    x86.shr(x86.rax, width.bit_length() - 1)
    x86.lea(x86.rax, x86.ptr[x86.rax + workers - 1])
    x86.xor(x86.edx, x86.edx)
    x86.div(workers)
    x86.imul(each, x86.rax, width)
    x86.mov(start, worker)
    x86.imul(start, each)
    x86.lea(stop, x86.ptr[start + each])
    x86.cmp(stop, columns)
    x86.cmovg(stop, columns)
    x86.add(stop, SIDE)  # where the last pair is half a one, this makes it whole; where not, it adds none
    return start, stop


def _pack(k: Any, product: Product, b: Any, panel: Any, column: Any, columns: Any, depth: Any) -> None:
    """Columns `column` to `column` + 15 of all rows of b: a column of tiles, one behind the other."""
    source, target, row_bytes = k.r64(), k.r64(), k.r64()
    x86.lea(source, x86.ptr[b + column * product.element_bytes])
    x86.imul(row_bytes, columns, product.element_bytes)
    x86.mov(target, panel)
    interleave = _interleaving(k) if product.element_bytes == 2 else None
    with k.loop(0, depth, product.group):
        if product.element_bytes == 2:
            made, other = k.zmm(), k.zmm()
            x86.vmovdqu16(made.ymm, x86.ptr[source])
            x86.vmovdqu16(other.ymm, x86.ptr[source + row_bytes])
            x86.vpermt2w(made, interleave, other)
            x86.vmovups(x86.ptr[target], made)
        else:
            _interleave_bytes(k, source, row_bytes, target)
        for _ in range(product.group):
            x86.add(source, row_bytes)
        x86.add(target, ROW_BYTES)


def _interleaving(k: Any) -> Any:
    """Indices for vpermt2w: the 16 low words of two registers side by side."""
    low = k.zmm()
    x86.vmovups(low, x86.ptr[k.constant(np.stack([np.arange(16), np.arange(16) + 32], axis=1).astype(np.uint16))])
    return low


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


def _rows(k: Any, product: Product, a: Any, panels: tuple[Any, ...], c: Any, column: Any, rows: Any, columns: Any,
          depth: Any, line: Any) -> None:
    """All rows of a against one or two columns of tiles: two tiles of rows at a time, then what may be left is one."""
    a_row, c_place, a_bytes, c_bytes = k.r64(), k.r64(), k.r64(), k.r64()
    x86.mov(a_row, a)
    x86.lea(c_place, x86.ptr[c + column * 4])
    x86.imul(a_bytes, depth, product.element_bytes)
    x86.imul(c_bytes, columns, 4)
    with k.loop(0, rows, ACROSS * SIDE) as row:
        _micro_kernel(k, product, ACROSS, a_row, panels, c_place, a_bytes, c_bytes, depth, line)
    none_left = k.label("none_left")
    x86.cmp(row, rows)
    x86.jge(none_left)
    _micro_kernel(k, product, 1, a_row, panels, c_place, a_bytes, c_bytes, depth, line)
    k.place(none_left)


def _micro_kernel(k: Any, product: Product, down: int, a_row: Any, panels: tuple[Any, ...], c_place: Any, a_bytes: Any,
                  c_bytes: Any, depth: Any, line: Any) -> None:
    """`down` tiles of rows by one or two columns of tiles; moves a_row and c_place on where there may be more."""
    multiply = getattr(x86, product.multiply)
    sums = [[k.tile() for _ in panels] for _ in range(down)]
    for total in (total for row in sums for total in row):
        x86.tilezero(total)
    lefts, rights = [k.r64() for _ in range(down)], [k.r64() for _ in panels]
    for at, left in enumerate(lefts):
        x86.mov(left, a_row if at == 0 else a_bytes)
        if at:
            x86.shl(left, SIDE.bit_length() - 1)
            x86.add(left, lefts[at - 1])
    for right, panel in zip(rights, panels, strict=True):
        x86.mov(right, panel)
    with k.loop(0, depth, product.depth):
        of_a, of_b = [k.tile() for _ in lefts], [k.tile() for _ in rights]
        for tile, left in zip(of_a, lefts, strict=True):
            x86.tileloadd(tile, x86.ptr[left + a_bytes])
        for tile, right in zip(of_b, rights, strict=True):
            x86.tileloadd(tile, x86.ptr[right + line])
        for row, tile in zip(sums, of_a, strict=True):
            for total, other in zip(row, of_b, strict=True):
                multiply(total, tile, other)
        for left in lefts:
            x86.add(left, ROW_BYTES)
        for right in rights:
            x86.add(right, TILE_BYTES)
    for row in sums:
        for number, total in enumerate(row):
            x86.tilestored(x86.ptr[c_place + c_bytes + 4 * SIDE * number], total)
        for place, bytes_ in ((c_place, c_bytes), (a_row, a_bytes)) if down > 1 else ():
            moved = k.r64()
            x86.imul(moved, bytes_, SIDE)
            x86.add(place, moved)


def attach(kernel: Any, product: Product) -> None:
    """Let a kernel `(a, b, c)` over M, N, K run by hand where it can."""
    kernel.assembly(features=f"amx_tile bmi2 {product.features}", contiguous="a b c",
                    divisible={"M": SIDE, "N": SIDE, "K": product.depth},
                    flushes_denormals=product is BF16)(writer(product))
