"""Inner loops of matrix products by hand, for schedules to name.

    f32_14x32    AVX-512: 14 rows x 2 vectors are 28 sums; 2 vectors of the panel and 2 broadcasts: all 32 registers
    f32_6x16     AVX2: 6 rows x 2 vectors are 12 sums; 2 and 2 of 16 registers

In each step of the depth two vectors of the panel meet one element of each row, spread over the lanes once for both. A
sum is used again after 28 (12) multiply-adds, which hides their latency of 4 cycles on two units. Rows are read where
they lie: three of them hang on one base register (base, base + stride, base + 2 * stride).
"""

from __future__ import annotations

from typing import Any

from sapper import x86

UNROLLED = 4


def _bases(t: Any, rows: int) -> list[Any]:
    """Address registers of rows 0, 3, 6, ..."""
    bases = [t.left]
    for _ in range(3, rows, 3):
        base = t.r64()
        x86.lea(base, x86.ptr[bases[-1] + t.left_stride * 2])
        x86.add(base, t.left_stride)
        bases.append(base)
    return bases


def _broadcast_steps(t: Any) -> None:
    """All steps, UNROLLED to a round."""
    bases = _bases(t, len(t.sums))
    vectors = len(t.sums[0])
    with t.loop(0, t.depth, UNROLLED):
        for step in range(UNROLLED):
            panel = [t.vector() for _ in range(vectors)]
            for number, vector in enumerate(panel):
                x86.vmovaps(vector, x86.ptr[t.right + (step * vectors + number) * t.vector_bytes])
            for row, sums in enumerate(t.sums):
                address = bases[row // 3] + 4 * step
                if row % 3:
                    address = address + t.left_stride * (row % 3)
                element = t.vector()
                x86.vbroadcastss(element, x86.dword[address])
                for total, vector in zip(sums, panel, strict=True):
                    x86.vfmadd231ps(total, vector, element)
        for base in bases:
            x86.add(base, 4 * UNROLLED)
        x86.add(t.right, UNROLLED * vectors * t.vector_bytes)


f32_14x32 = x86.micro_kernel("f32_14x32", vector="zmm", rows=(14,), vectors=(2,), step=UNROLLED, features="avx512f")(
    _broadcast_steps)
f32_6x16 = x86.micro_kernel("f32_6x16", vector="ymm", rows=(6,), vectors=(2,), step=UNROLLED, features="avx2 fma")(
    _broadcast_steps)
