"""Matrix products by hand: micro-kernels of some rows by two vectors, over packed panels of b.

    c[m, n] = sum_k a[m, k] * b[k, n], all in C order, N a multiple of 16

One panel is two vectors wide and K deep; a worker packs it into its scratch memory, then walks the rows of a in steps
of the micro-kernel. In each step of k it loads two vectors of the panel and broadcasts one element of each row, which
then meets both: 14 rows x 2 zmm are 28 sums, 2 vectors and 2 broadcasts, all 32 registers; 6 rows x 2 ymm are 12, 2 and
2 of 16. A sum is used again after 28 (12) multiply-adds, which hides their latency of 4 on two units.
Source: the loop order is that of F. Van Zee and R. van de Geijn, "BLIS: a framework for rapidly instantiating BLAS
functionality" (2015): packed panels, a micro-kernel over them, rows outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sapper import x86


@dataclass(frozen=True)
class Shape:
    """A micro-kernel. rows: of a. vector: "zmm" or "ymm". unrolled: steps of k in one round. pair: elements of k that
    one multiply-add takes: 1 (f32), or 2 (bf16 by vdpbf16ps)."""

    rows: int
    vector: str
    unrolled: int = 4
    pair: int = 1

    @property
    def vector_bytes(self) -> int:
        return 64 if self.vector == "zmm" else 32

    @property
    def columns(self) -> int:
        """Columns of c in a panel."""
        return 2 * self.vector_bytes // 4

    @property
    def step_bytes(self) -> int:
        """Bytes of a panel for one step of k."""
        return 2 * self.vector_bytes


COLUMNS = 16
"""N is a multiple of it."""
AVX512 = Shape(14, "zmm")
AVX2 = Shape(6, "ymm")
BF16 = Shape(14, "zmm", pair=2)


def writer(shape: Shape) -> Callable[[Any], None]:
    """The function that writes the whole kernel."""

    def write(k: Any) -> None:
        a, b, c = k.data("a"), k.data("b"), k.data("c")
        rows, columns, depth = k.extent("M"), k.extent("N"), k.extent("K")
        start, stop = _share(k, shape, columns)
        panel = k.scratch(4 // shape.pair, (1, ("K",), 4), (shape.columns, (), 1))
        interleave = _interleaving(k) if shape.pair == 2 else None
        with k.loop(start, stop, shape.columns) as column:
            half = _second_half(k, shape, column, columns)
            _pack(k, shape, b, panel, column, columns, depth, half, interleave)
            _rows(k, shape, a, panel, c, column, rows, columns, depth, half)
        x86.ret()

    return write


def _has_halves(shape: Shape) -> bool:
    """Whether the last panel may be half a one: N is a multiple of COLUMNS."""
    return shape.columns > COLUMNS


def _share(k: Any, shape: Shape, columns: Any) -> tuple[Any, Any]:
    """The columns of this worker: (first, end), the end so that a panel that is half a one counts."""
    width = shape.columns
    worker, workers = k.worker(), k.workers()
    start, stop, each = k.r64(), k.r64(), k.r64()
    # panels = ceil(N / width), each = ceil(panels / workers) * width
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
    if _has_halves(shape):
        x86.add(stop, width - 1)
    return start, stop


def _second_half(k: Any, shape: Shape, column: Any, columns: Any) -> Any:
    """An opmask for the panel's second vector: all on, or none where the last panel is half a one."""
    if not _has_halves(shape):
        return None
    mask, zero, ones, there = k.mask(), k.r64(), k.r64(), k.r64()
    x86.xor(zero.r32, zero.r32)
    x86.mov(ones, -1)
    x86.lea(there, x86.ptr[column + shape.columns // 2])
    x86.cmp(there, columns)
    x86.cmovl(zero, ones)
    x86.kmovq(mask, zero)
    return mask


def _interleaving(k: Any) -> Any:
    """Indices for vpermt2w: the 16 low words of two rows side by side."""
    low = k.zmm()
    x86.vmovups(low, x86.ptr[k.constant(np.stack([np.arange(16), np.arange(16) + 32], axis=1).astype(np.uint16))])
    return low


def _pack(k: Any, shape: Shape, b: Any, panel: Any, column: Any, columns: Any, depth: Any, half: Any,
          interleave: Any) -> None:
    """Copy columns `column` and on of all rows of b to the panel."""
    element = 4 // shape.pair
    source, target, row_bytes = k.r64(), k.r64(), k.r64()
    x86.lea(source, x86.ptr[b + column * element])
    x86.imul(row_bytes, columns, element)
    x86.mov(target, panel)
    with k.loop(0, depth, shape.pair):
        for at in range(2):
            made = k.new(shape.vector)
            place = source + at * shape.vector_bytes // shape.pair
            if shape.pair == 1:
                x86.vmovups(made if at == 0 or half is None else made[half, x86.z], x86.ptr[place])
            else:
                other = k.zmm()
                # Half a panel reads on into the next row, which is there: what that gives is never stored.
                x86.vmovdqu16(made.ymm, x86.ptr[place])
                x86.vmovdqu16(other.ymm if at == 0 else other.ymm[half, x86.z], x86.ptr[place + row_bytes])
                x86.vpermt2w(made, interleave, other)
            x86.vmovaps(x86.ptr[target + at * shape.vector_bytes], made)
        for _ in range(shape.pair):
            x86.add(source, row_bytes)
        x86.add(target, shape.step_bytes)


def _rows(k: Any, shape: Shape, a: Any, panel: Any, c: Any, column: Any, rows: Any, columns: Any, depth: Any,
          half: Any) -> None:
    """All rows of a against the panel: in steps of the micro-kernel, then one by one."""
    element = 4 // shape.pair
    a_row, c_row, a_bytes, c_bytes = k.r64(), k.r64(), k.r64(), k.r64()
    x86.mov(a_row, a)
    x86.lea(c_row, x86.ptr[c + column * 4])
    x86.imul(a_bytes, depth, element)
    x86.imul(c_bytes, columns, 4)
    with k.loop(0, rows, shape.rows) as row:
        _micro_kernel(k, shape, shape.rows, a_row, panel, c_row, a_bytes, c_bytes, depth, half)
    with k.loop(row, rows):
        _micro_kernel(k, shape, 1, a_row, panel, c_row, a_bytes, c_bytes, depth, half)


def _micro_kernel(k: Any, shape: Shape, rows: int, a_row: Any, panel: Any, c_row: Any, a_bytes: Any, c_bytes: Any,
                  depth: Any, half: Any) -> None:
    """`rows` rows by two vectors of c; moves a_row and c_row on."""
    def new() -> Any:
        return k.new(shape.vector)

    sums = [[new(), new()] for _ in range(rows)]
    for pair in sums:
        for total in pair:
            x86.vxorps(total.xmm, total.xmm, total.xmm)
    # Three rows hang on one base: base, base + a_bytes, base + 2 * a_bytes.
    bases: list[Any] = []
    for at in range(0, rows, 3):
        base = k.r64()
        if at == 0:
            x86.mov(base, a_row)
        else:
            x86.lea(base, x86.ptr[bases[-1] + a_bytes * 2])
            x86.add(base, a_bytes)
        bases.append(base)

    def step(number: int) -> None:
        first, second = new(), new()
        x86.vmovaps(first, x86.ptr[at_panel + number * shape.step_bytes])
        x86.vmovaps(second, x86.ptr[at_panel + (number * shape.step_bytes + shape.vector_bytes)])
        for row in range(rows):
            base, beside = bases[row // 3], row % 3
            address = base + 4 * number if beside == 0 else base + a_bytes * beside + 4 * number
            value = new()
            if shape.pair == 2:
                x86.vpbroadcastd(value, x86.dword[address])
                x86.vdpbf16ps(sums[row][0], first, value)
                x86.vdpbf16ps(sums[row][1], second, value)
            else:
                x86.vbroadcastss(value, x86.dword[address])
                x86.vfmadd231ps(sums[row][0], first, value)
                x86.vfmadd231ps(sums[row][1], second, value)

    at_panel = k.r64()
    x86.mov(at_panel, panel)

    def walk(start: Any, steps: int) -> Any:
        with k.loop(start, depth, steps * shape.pair) as counter:
            for number in range(steps):
                step(number)
            for base in bases:
                x86.add(base, 4 * steps)
            x86.add(at_panel, steps * shape.step_bytes)
        return counter

    counter = walk(0, shape.unrolled)
    if shape.pair == 1:  # pairs come by sixteen elements at least
        walk(counter, 1)
    for pair in sums:
        second = x86.ptr[c_row + shape.vector_bytes]
        x86.vmovups(x86.ptr[c_row], pair[0])
        x86.vmovups(second if half is None else second[half], pair[1])
        x86.add(c_row, c_bytes)
    if rows == 1:
        x86.add(a_row, a_bytes)
    else:
        moved = k.r64()
        x86.imul(moved, a_bytes, rows)
        x86.add(a_row, moved)


def attach(kernel: Any, shape: Shape) -> None:
    """Let a kernel `(a, b, c)` over M, N, K run by hand where it can."""
    features = {"zmm": "avx512f avx512bw avx512dq avx512vl bmi2", "ymm": "avx2 fma"}[shape.vector]
    if shape.pair == 2:
        features += " avx512_bf16"
    divisible = {"N": COLUMNS} | ({"K": 16} if shape.pair == 2 else {})
    kernel.assembly(features=features, contiguous="a b c", divisible=divisible,
                    flushes_denormals=shape.pair == 2)(writer(shape))
