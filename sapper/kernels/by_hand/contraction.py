"""Inner loops of matrix products by hand, for schedules to name.

    f32_14x32         AVX-512: 14 rows x 2 vectors are 28 sums; 2 vectors of the panel and 2 broadcasts: 32 registers
    f32_14x32_blocks  the same over rows that were copied into blocks: for rows apart by what the first cache folds
    f32_14x32_columns the same where the rows of the left operand lie side by side: all hang on one address
    f32_6x16          AVX2: 6 rows x 2 vectors are 12 sums; 2 and 2 of 16 registers
    bf16_14x32        AVX-512 BF16: as f32_14x32, two neighbours of the depth in each lane
    u8i8_14x32        AVX-512 VNNI: as f32_14x32, four neighbours in each lane, left of u8, right of i8
    i8_14x32_blocks   the same of i8 and i8 over blocks, in which the highest bit of each byte is inverted
    f32_2x14x16       AVX-512, two products of one left operand (SwiGLU): 14 rows x a vector of each
    bf16_2x14x16      the same of bf16

In each step of the depth two vectors of the panel, or one of each, meet one element of each row, spread over the lanes
once for both. A sum is used again after 28 (12) multiply-adds, which hides their latency of 4 cycles on two units. Rows
are read where they lie: three of them hang on one base register (base, base + stride, base + 2 * stride). In blocks all
hang on one: a row is a line of 16 steps.
`vpdpbusd` multiplies u8 by i8. An i8 with its highest bit inverted is a u8 that is 128 larger: what that adds to the
sums, the generated code takes off where they begin; it inverts the bits as it copies (lane/packed.py).
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


def _fused(total: Any, vector: Any, element: Any) -> None:
    x86.vfmadd231ps(total, vector, element)


def _pairs(total: Any, vector: Any, element: Any) -> None:
    x86.vdpbf16ps(total, vector, element)


def _bytes(total: Any, vector: Any, element: Any) -> None:
    x86.vpdpbusd(total, element, vector)


def _step(t: Any, step: int, address: Any, add: Any = _fused) -> None:
    """One step of the depth. address: of a row's element. add: the product."""
    panel = []
    for right, product in zip(t.rights, t.products, strict=True):
        vectors = [t.vector() for _ in product[0]]
        for number, vector in enumerate(vectors):
            x86.vmovaps(vector, x86.ptr[right + (step * len(vectors) + number) * t.vector_bytes])
        panel.append(vectors)
    for row in range(len(t.sums)):
        element = t.vector()
        if add is _fused:
            x86.vbroadcastss(element, x86.dword[address(row)])
        else:
            x86.vpbroadcastd(element, x86.dword[address(row)])
        for product, vectors in zip(t.products, panel, strict=True):
            for total, vector in zip(product[row], vectors, strict=True):
                add(total, vector, element)


def _over_rows(t: Any, add: Any = _fused) -> None:
    """All steps, UNROLLED to a round, of rows where they lie."""
    bases = _bases(t, len(t.sums))
    with t.loop(0, t.depth, UNROLLED):
        for step in range(UNROLLED):
            def address(row: int, step: int = step) -> Any:
                base = bases[row // 3] + 4 * step
                return base + t.left_stride * (row % 3) if row % 3 else base

            _step(t, step, address, add)
        for base in bases:
            x86.add(base, 4 * UNROLLED)
        for right, product in zip(t.rights, t.products, strict=True):
            x86.add(right, UNROLLED * len(product[0]) * t.vector_bytes)


def _over_blocks(t: Any, add: Any = _fused) -> None:
    """A block of 16 steps in a round of four times UNROLLED."""
    with t.loop(0, t.depth, BLOCK):
        inner = t.r64()
        x86.mov(inner, t.left)
        with t.loop(0, BLOCK, UNROLLED):
            for step in range(UNROLLED):
                _step(t, step, lambda row, step=step: inner + (row * t.vector_bytes + 4 * step), add)
            x86.add(inner, 4 * UNROLLED)
            x86.add(t.right, UNROLLED * len(t.sums[0]) * t.vector_bytes)
        x86.add(t.left, t.block_bytes)


def _over_columns(t: Any) -> None:
    """Rows that lie side by side: a step of the depth after the other."""
    with t.loop(0, t.depth, UNROLLED):
        for step in range(UNROLLED):
            _step(t, step, lambda row: t.left + 4 * row)
            x86.add(t.left, t.left_stride)
        x86.add(t.right, UNROLLED * len(t.sums[0]) * t.vector_bytes)


def _pairs_over_rows(t: Any) -> None:
    _over_rows(t, _pairs)


def _bytes_over_rows(t: Any) -> None:
    _over_rows(t, _bytes)


def _bytes_over_blocks(t: Any) -> None:
    _over_blocks(t, _bytes)


BLOCK = 16
"""Steps of the depth in a block: the lanes of a zmm."""
f32_14x32 = x86.micro_kernel("f32_14x32", vector="zmm", rows=(14,), vectors=(2,), step=UNROLLED, features="avx512f")(
    _over_rows)
f32_14x32_blocks = x86.micro_kernel("f32_14x32_blocks", vector="zmm", rows=(14,), vectors=(2,), step=BLOCK,
                                    features="avx512f", left="blocks")(_over_blocks)
f32_14x32_columns = x86.micro_kernel("f32_14x32_columns", vector="zmm", rows=(14,), vectors=(2,), step=UNROLLED,
                                     features="avx512f", left="columns")(_over_columns)
f32_6x16 = x86.micro_kernel("f32_6x16", vector="ymm", rows=(6,), vectors=(2,), step=UNROLLED, features="avx2 fma")(
    _over_rows)
bf16_14x32 = x86.micro_kernel("bf16_14x32", vector="zmm", rows=(14,), vectors=(2,), step=UNROLLED,
                              features="avx512f avx512_bf16", dtype="bf16")(_pairs_over_rows)
u8i8_14x32 = x86.micro_kernel("u8i8_14x32", vector="zmm", rows=(14,), vectors=(2,), step=UNROLLED,
                              features="avx512f avx512_vnni", dtype="u8", right_dtype="i8")(_bytes_over_rows)
i8_14x32_blocks = x86.micro_kernel("i8_14x32_blocks", vector="zmm", rows=(14,), vectors=(2,), step=BLOCK,
                                   features="avx512f avx512_vnni", dtype="i8", left="blocks")(_bytes_over_blocks)
f32_2x14x16 = x86.micro_kernel("f32_2x14x16", vector="zmm", rows=(14,), vectors=(1,), step=UNROLLED,
                               features="avx512f", rights=2)(_over_rows)
bf16_2x14x16 = x86.micro_kernel("bf16_2x14x16", vector="zmm", rows=(14,), vectors=(1,), step=UNROLLED,
                                features="avx512f avx512_bf16", dtype="bf16", rights=2)(_pairs_over_rows)
