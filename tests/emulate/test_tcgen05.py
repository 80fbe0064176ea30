"""tcgen05: products in tensor memory agree with NumPy in every kind, major and swizzle; loads and stores reach the
cells that the manual says; what is wrong is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sapper import emulate
from sapper.emulate import Options, Result

BF16, E4M3, E5M2 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
SWIZZLE_CODE = {0: 0, 128: 2, 64: 4, 32: 6}
"""Bits 61 to 63 of a descriptor."""
CODES: dict[Any, tuple[str, int]] = {np.float16: ("f16", 0), BF16: ("f16", 1), np.float32: ("tf32", 2),
                                     E4M3: ("f8f6f4", 0), E5M2: ("f8f6f4", 1), np.uint8: ("i8", 0), np.int8: ("i8", 1)}
"""Kind, and bits of the instruction descriptor, by the type of an element."""
SUM_CODES = {np.float16: 0, np.float32: 1, np.int32: 2}


def image(matrix: Any, swizzle: int, transposed: bool) -> tuple[Any, int, int]:
    """(bytes in shared memory, leading, stride) of a matrix (rows, 32 bytes of depth). transposed: rows are contiguous.

    Of 16-byte chunks, as the manual draws them: without a swizzle cores of 8 lines by 16 bytes one after another; with
    one, lines of so many bytes in groups of 8, whose chunk c of line l lies at c ^ (l * swizzle / 128 mod 8)."""
    stored = np.ascontiguousarray(matrix.T if transposed else matrix)
    lines, size = stored.shape[0], stored.itemsize
    wide = stored.view(np.uint8).reshape(lines, -1)
    chunks = wide.reshape(lines, -1, 16)
    if not swizzle:
        cores = chunks.reshape(lines // 8, 8, -1, 16).transpose(2, 0, 1, 3)  # (chunk, group of lines, line, 16)
        across, along = 16 * lines, 128  # from chunk to chunk, from group to group
        return cores.reshape(-1).copy(), *((along, across) if transposed else (across, along))
    width = swizzle // 16
    parts = -(-chunks.shape[1] // width)
    data = np.zeros((parts, lines, width, 16), np.uint8)
    for part in range(parts):
        for line in range(lines):
            for chunk in range(min(width, chunks.shape[1] - part * width)):
                data[part, line, chunk ^ (line % 8 * swizzle // 128)] = chunks[line, part * width + chunk]
    assert size * matrix.shape[1] == 32
    return data.reshape(-1), swizzle * lines, 8 * swizzle


def descriptor(swizzle: int, leading: int, stride: int) -> int:
    return SWIZZLE_CODE[swizzle] << 61 | 1 << 46 | (stride >> 4) << 32 | (leading >> 4) << 16


def instruction(m: int, n: int, type_a: Any, type_b: Any, sums: Any, transposed: tuple[bool, bool] = (False, False),
                negated: tuple[bool, bool] = (False, False)) -> int:
    return (m >> 4 << 24 | n >> 3 << 17 | transposed[1] << 16 | transposed[0] << 15 | negated[1] << 14
            | negated[0] << 13 | CODES[type_b][1] << 10 | CODES[type_a][1] << 7 | SUM_CODES[sums] << 4)


@dataclass
class Steps:
    """Pieces of the text that a test may replace. columns: allocated. tail: after the loads."""

    fill: str = "fence.proxy.async.shared::cta;"
    product: str = ""
    commit: str = "@%p1 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r3];"
    wait: str = "W: mbarrier.try_wait.parity.shared.b64 %p2, [%r3], 0;\n @!%p2 bra W;"
    after: str = "tcgen05.fence::after_thread_sync;"
    load: str = ""
    waited: str = "tcgen05.wait::ld.sync.aligned;"
    before: str = "tcgen05.fence::before_thread_sync;"
    free: str = "@%p3 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r4, 512;"
    start: str = ""
    """Before the product, by all threads."""
    registers: dict[str, int] = field(default_factory=dict)


TEXT = """.version 8.6
.target sm_100a
.address_size 64
.visible .entry product(.param .u64 given_a, .param .u64 given_b, .param .u64 out, .param .u64 descriptor_a,
                        .param .u64 descriptor_b, .param .u32 shape)
.reqntid 128
{
 .reg .pred %p<8>; .reg .b32 %r<64>; .reg .b32 %v<260>; .reg .b64 %d<16>; .reg .b16 %h<4>;
 .shared .align 1024 .b8 a[SIZE_A];
 .shared .align 1024 .b8 b[SIZE_B];
 .shared .align 8 .b64 made;
 .shared .align 4 .b32 place;
 mov.u32 %r1, %tid.x;
 setp.eq.u32 %p1, %r1, 0;
 setp.lt.u32 %p3, %r1, 32;
 mov.pred %p4, 0;
 mov.pred %p5, 1;
 mov.u32 %r3, made;
 mov.u32 %r5, place;
 ld.param.u64 %d1, [given_a];
 ld.param.u64 %d2, [given_b];
 mov.u32 %r6, a;
 mov.u32 %r7, b;
 shl.b32 %r8, %r1, 4;
A: setp.ge.u32 %p6, %r8, SIZE_A;
 @%p6 bra B0;
 cvt.u64.u32 %d3, %r8;
 add.u64 %d4, %d1, %d3;
 add.u32 %r9, %r6, %r8;
 ld.global.v4.b32 {%v0, %v1, %v2, %v3}, [%d4];
 st.shared.v4.b32 [%r9], {%v0, %v1, %v2, %v3};
 add.u32 %r8, %r8, 2048;
 bra A;
B0: shl.b32 %r8, %r1, 4;
B: setp.ge.u32 %p6, %r8, SIZE_B;
 @%p6 bra C;
 cvt.u64.u32 %d3, %r8;
 add.u64 %d4, %d2, %d3;
 add.u32 %r9, %r7, %r8;
 ld.global.v4.b32 {%v0, %v1, %v2, %v3}, [%d4];
 st.shared.v4.b32 [%r9], {%v0, %v1, %v2, %v3};
 add.u32 %r8, %r8, 2048;
 bra B;
C: FILL
 @%p1 mbarrier.init.shared.b64 [%r3], 1;
 @%p3 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r5], 512;
 @%p3 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
 bar.sync 0;
 ld.shared.u32 %r4, [%r5];
 shr.u32 %r10, %r1, 5;
 shl.b32 %r10, %r10, 21;
 add.u32 %r11, %r4, %r10;
 ld.param.u64 %d5, [descriptor_a];
 shr.u32 %r8, %r6, 4;
 cvt.u64.u32 %d6, %r8;
 or.b64 %d5, %d5, %d6;
 ld.param.u64 %d7, [descriptor_b];
 shr.u32 %r8, %r7, 4;
 cvt.u64.u32 %d6, %r8;
 or.b64 %d7, %d7, %d6;
 ld.param.u32 %r12, [shape];
 ld.param.u64 %d8, [out];
 mad.wide.u32 %d8, %r1, 1024, %d8;
START
PRODUCT
 COMMIT
 WAIT
 AFTER
LOAD
 BEFORE
 bar.sync 0;
 FREE
 ret;
}
"""
"""Thread 0 issues; %r4: the memory, %r11: the same at the lanes of the warp, %d8: 1024 bytes of `out` for a thread."""


def text_of(steps: Steps, size_a: int = 16, size_b: int = 16) -> str:
    text = TEXT
    for word, piece in (("FILL", steps.fill), ("START", steps.start), ("PRODUCT", steps.product),
                        ("COMMIT", steps.commit), ("WAIT", steps.wait), ("AFTER", steps.after), ("LOAD", steps.load),
                        ("BEFORE", steps.before), ("FREE", steps.free)):
        text = text.replace(word, piece, 1)
    return text.replace("SIZE_A", str(size_a)).replace("SIZE_B", str(size_b))


def vector(count: int, first: int = 0) -> str:
    return "{" + ", ".join(f"%v{first + number}" for number in range(count)) + "}"


def load_all(columns: int, waited: str = "tcgen05.wait::ld.sync.aligned;") -> str:
    """The first columns of the warp's lanes, to `out`."""
    lines = []
    for first in range(0, columns, 8):
        lines += [f" add.u32 %r13, %r11, {first};", f" tcgen05.ld.sync.aligned.32x32b.x8.b32 {vector(8)}, [%r13];",
                  f" {waited}", f" st.global.v4.b32 [%d8+{4 * first}], {vector(4)};",
                  f" st.global.v4.b32 [%d8+{4 * first + 16}], {vector(4, 4)};"]
    return "\n".join(lines)


def mma(kind: str, a: str = "%d5", keeps: str = "%p4", more: str = "", scale: str = "", d: str = "%r4") -> str:
    return f" @%p1 tcgen05.mma.cta_group::1.kind::{kind} [{d}], {a}, %d7, %r12, {more}{keeps}{scale};"


def run(steps: Steps, a: Any = None, b: Any = None, described: tuple[int, int, int] = (0, 0, 0), lazy: bool = False,
        **options: Any) -> tuple[Any, Result]:
    """(`out` as (128, 256) words, counters)."""
    empty = np.zeros(16, np.uint8)
    a, b = empty if a is None else a, empty if b is None else b
    out = np.zeros((128, 256), np.uint32)
    result = emulate.load(text_of(steps, a.size, b.size)).launch(
        arguments=[a, b, out, *described], options=Options(lazy=lazy, **options))
    return out, result


def rows_of(m: int) -> Any:
    """The lane of each row."""
    return np.arange(m) if m == 128 else np.arange(m) // 16 * 32 + np.arange(m) % 16


def random(shape: tuple[int, int], dtype: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind in "iu" and np.dtype(dtype).itemsize == 1:
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max + 1, shape).astype(dtype)
    values = rng.standard_normal(shape).astype(np.float32)
    if dtype is np.float32:  # those that tf32 has
        return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return values.astype(dtype)


def product(type_a: Any, type_b: Any, sums: Any, m: int, n: int, swizzle: int, transposed: tuple[bool, bool],
            lazy: bool, negated: tuple[bool, bool] = (False, False)) -> None:
    depth = 32 // np.dtype(type_a).itemsize
    a, b = random((m, depth), type_a, 0), random((n, depth), type_b, 1)
    image_a, *strides_a = image(a, swizzle, transposed[0])
    image_b, *strides_b = image(b, swizzle, transposed[1])
    steps = Steps(product=mma(CODES[type_a][0]), load=load_all(n))
    if sums is np.float16:
        steps.load = load_halves(n)
    described = (descriptor(swizzle, *strides_a), descriptor(swizzle, *strides_b),
                 instruction(m, n, type_a, type_b, sums, transposed, negated))
    out, _ = run(steps, image_a, image_b, described, lazy, uninitialised=m == 128)  # 64 rows: half of the lanes
    wide = np.float64 if sums is np.int32 else np.float32
    exact = a.astype(wide) @ b.astype(wide).T * (-1 if negated[0] != negated[1] else 1)
    found = out.view(sums)[:, :n][rows_of(m)]
    np.testing.assert_allclose(found.astype(wide), exact, rtol=1e-3 if sums is np.float16 else 1e-5, atol=1e-5)


def load_halves(columns: int) -> str:
    """The same of sums of 16 bits, two to a register."""
    lines = []
    for first in range(0, columns, 8):
        lines += [f" add.u32 %r13, %r11, {first};",
                  f" tcgen05.ld.sync.aligned.32x32b.x4.pack::16b.b32 {vector(4)}, [%r13];",
                  " tcgen05.wait::ld.sync.aligned;", f" st.global.v4.b32 [%d8+{2 * first}], {vector(4)};"]
    return "\n".join(lines)


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_products_in_every_swizzle_and_major(swizzle: int, transposed: tuple[bool, bool], lazy: bool) -> None:
    product(BF16, BF16, np.float32, 64, 16, swizzle, transposed, lazy)
