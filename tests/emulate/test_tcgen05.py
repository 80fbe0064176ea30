"""tcgen05: products in tensor memory agree with NumPy in every kind, major and swizzle; loads and stores reach the
cells that the manual says; what is wrong is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sapper import emulate
from sapper.emulate import EmulationError, Options, RaceError, Result

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


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize(("type_a", "type_b", "sums"), [
    (np.float16, np.float16, np.float32), (np.float16, np.float16, np.float16), (BF16, BF16, np.float32),
    (np.float32, np.float32, np.float32), (E4M3, E4M3, np.float32), (E4M3, E5M2, np.float32),
    (E5M2, E4M3, np.float16), (np.int8, np.int8, np.int32), (np.uint8, np.int8, np.int32)])
def test_products_of_every_type(type_a: Any, type_b: Any, sums: Any, lazy: bool) -> None:
    product(type_a, type_b, sums, 128, 48, 128, (False, False), lazy)


@pytest.mark.parametrize(("m", "n"), [(64, 8), (64, 256), (128, 16), (128, 256)])
def test_products_of_every_extent(m: int, n: int) -> None:
    product(BF16, BF16, np.float32, m, n, 32, (False, True), lazy=True)


def test_signs() -> None:
    product(BF16, BF16, np.float32, 128, 16, 64, (False, False), lazy=False, negated=(True, False))
    product(BF16, BF16, np.float32, 128, 16, 64, (False, False), lazy=False, negated=(True, True))


def described(a: Any, b: Any, sums: Any = np.float32, swizzle: int = 32) -> tuple[Any, Any, tuple[int, int, int]]:
    """What `run` takes for two matrices whose depth is contiguous."""
    image_a, *strides_a = image(a, swizzle, False)
    image_b, *strides_b = image(b, swizzle, False)
    return image_a, image_b, (descriptor(swizzle, *strides_a), descriptor(swizzle, *strides_b),
                              instruction(len(a), len(b), a.dtype.type, b.dtype.type, sums))


A, B = random((128, 16), BF16, 0), random((16, 16), BF16, 1)
EXACT = A.astype(np.float32) @ B.astype(np.float32).T
GIVEN = described(A, B)
RIGHT = Steps(product=mma("f16"), load=load_all(16))


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_sums_go_on_and_are_scaled(lazy: bool) -> None:
    """3 products: of nothing, on top, and on top of a quarter."""
    steps = replace(RIGHT, product="\n".join([mma("f16"), mma("f16", keeps="%p5"),
                                              mma("f16", keeps="%p5", scale=", 2")]))
    out, result = run(steps, *GIVEN, lazy=lazy)
    np.testing.assert_allclose(out.view(np.float32)[:, :16], 1.5 * EXACT, rtol=1e-5, atol=1e-5)
    assert result.counters.instructions["tcgen05.mma.cta_group::1.kind::f16"] == 3 * 4  # by warps that reach it


def test_lanes_that_are_left_alone_keep_their_sums() -> None:
    masks = " mov.b32 %v250, 0x0000FFFF;\n mov.b32 %v251, 0;\n mov.b32 %v252, 0xFFFFFFFF;\n mov.b32 %v253, 1;\n"
    steps = replace(RIGHT, product=mma("f16") + "\n" + masks + mma("f16", keeps="%p5", more=vector(4, 250) + ", "))
    out, _ = run(steps, *GIVEN)
    left = np.zeros(128, bool)
    left[:16], left[64:96], left[96] = True, True, True
    exact = np.where(left[:, None], EXACT, 2 * EXACT)
    np.testing.assert_allclose(out.view(np.float32)[:, :16], exact, rtol=1e-5, atol=1e-5)


def test_integers_wrap_or_saturate() -> None:
    a, b = np.full((128, 32), -128, np.int8), np.full((16, 32), 127, np.int8)
    image_a, image_b, (first, second, bits) = described(a, b, np.int32)
    fill = f" mov.b32 %v0, {-2**31 & 0xFFFFFFFF};\n tcgen05.st.sync.aligned.32x32b.x16.b32 [%r11], {{" + ", ".join(
        ["%v0"] * 16) + "};\n tcgen05.wait::st.sync.aligned;\n tcgen05.fence::before_thread_sync;\n bar.sync 0;\n" \
        " tcgen05.fence::after_thread_sync;"
    steps = replace(RIGHT, start=fill, product=mma("i8", keeps="%p5"))
    for saturates in (0, 1):
        out, _ = run(steps, image_a, image_b, (first, second, bits | saturates << 3))
        exact = -2**31 - 128 * 127 * 32 + (0 if saturates else 2**32)
        assert (out.view(np.int32)[:, :16] == (-2**31 if saturates else exact)).all()


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("type", [BF16, np.float32, E4M3, np.int8])
def test_a_may_lie_in_tensor_memory(type: Any, lazy: bool) -> None:
    """Its rows are lanes, its depth of 32 bytes 8 columns, here from column 256 on."""
    depth, integer = 32 // np.dtype(type).itemsize, np.dtype(type).kind == "i"
    a, b = random((128, depth), type, 0), random((16, depth), type, 1)
    sums: Any = np.int32 if integer else np.float32
    _, image_b, (_, second, bits) = described(a, b, sums)
    move = " mad.wide.u32 %d9, %r1, 32, %d1;\n add.u32 %r13, %r11, 256;\n" + "".join(
        f" ld.global.v4.b32 {vector(4, 4 * half)}, [%d9+{16 * half}];\n" for half in (0, 1)) + (
        f" tcgen05.st.sync.aligned.32x32b.x8.b32 [%r13], {vector(8)};\n tcgen05.wait::st.sync.aligned;\n"
        " tcgen05.fence::before_thread_sync;\n bar.sync 0;\n tcgen05.fence::after_thread_sync;")
    kind = CODES[type][0]
    steps = replace(RIGHT, start=move, product=mma(kind, a="[%r4+256]"))
    out, _ = run(steps, a.view(np.uint8).reshape(-1), image_b, (0, second, bits), lazy)
    wide = np.float64 if integer else np.float32
    np.testing.assert_allclose(out.view(sums)[:, :16], a.astype(wide) @ b.astype(wide).T, rtol=1e-5, atol=1e-5)


# --- Copies and scales ----------------------------------------------------------------------------------------------


def rows_copied(shape: str) -> Any:
    """Which row of the source each of 128 lanes gets."""
    lane = np.arange(128)
    return {"128x256b": lane, "128x128b": lane, "32x128b.warpx4": lane % 32,
            "64x128b.warpx2::02_13": lane % 64, "64x128b.warpx2::01_23": lane // 64 * 32 + lane % 32}[shape]


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize(("shape", "rows", "columns"), [
    ("128x256b", 128, 8), ("128x128b", 128, 4), ("32x128b.warpx4", 32, 4), ("64x128b.warpx2::02_13", 64, 4),
    ("64x128b.warpx2::01_23", 64, 4)])
def test_copies_from_shared_to_tensor_memory(shape: str, rows: int, columns: int, lazy: bool) -> None:
    """Rows in groups of 8, without a swizzle."""
    given = np.random.default_rng(0).integers(0, 2**32, (rows, 8), dtype=np.uint32)
    data, *strides = image(given.view(np.float32), 0, False)
    load = f" tcgen05.ld.sync.aligned.32x32b.x{columns}.b32 {vector(columns)}, [%r11];\n" \
        " tcgen05.wait::ld.sync.aligned;\n" + "".join(
            f" st.global.b32 [%d8+{4 * column}], %v{column};\n" for column in range(columns))
    steps = Steps(product=f" @%p1 tcgen05.cp.cta_group::1.{shape} [%r4], %d5;", load=load)
    out, _ = run(steps, data, None, (descriptor(0, *strides), 0, 0), lazy)
    np.testing.assert_array_equal(out[:, :columns], given[rows_copied(shape), :columns])
    for wrong, told in ((replace(steps, wait="bar.sync 0;"), "still writes"),
                        (replace(steps, fill=""), r"fence\.proxy")):
        with pytest.raises(RaceError, match=told):
            run(wrong, data, None, (descriptor(0, *strides), 0, 0), lazy)


SCALED = " @%p1 tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale.scale_vec::1X [%r4], %d5, %d7, %r12, [%r4+256], " \
    "[%r4+260], %p4;"


def scales_stored(byte: int) -> str:
    """Row r of A has 2^(r mod 7), of B 2^-(r mod 5), at lane r mod 32 of all warps; exponents in one byte of a word."""
    lines = [" and.b32 %r14, %r1, 31;\n add.u32 %r13, %r11, 256;\n"]
    for column in range(4):
        lines.append(f" add.u32 %r15, %r14, {32 * column};\n rem.u32 %r15, %r15, 7;\n add.u32 %r15, %r15, 127;\n"
                     f" shl.b32 %v{column}, %r15, {8 * byte};\n")
    lines.append(" rem.u32 %r15, %r14, 5;\n sub.u32 %r15, 127, %r15;\n" f" shl.b32 %v4, %r15, {8 * byte};\n"
                 f" tcgen05.st.sync.aligned.32x32b.x4.b32 [%r13], {vector(4)};\n add.u32 %r13, %r11, 260;\n"
                 " tcgen05.st.sync.aligned.32x32b.x1.b32 [%r13], {%v4};\n tcgen05.wait::st.sync.aligned;\n"
                 " tcgen05.fence::before_thread_sync;\n bar.sync 0;\n tcgen05.fence::after_thread_sync;")
    return "".join(lines)


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("byte", [0, 3])
def test_products_with_scales(byte: int, lazy: bool) -> None:
    a, b = random((128, 32), E4M3, 0), random((24, 32), E5M2, 1)
    image_a, image_b, (first, second, bits) = described(a, b)
    bits = bits & ~(1 << 4) | 1 << 23 | byte << 29 | byte << 4
    steps = Steps(start=scales_stored(byte), product=SCALED, load=load_all(24))
    out, _ = run(steps, image_a, image_b, (first, second, bits), lazy)
    exact = (a.astype(np.float32) * 2.0 ** (np.arange(128) % 7)[:, None]) @ (
        b.astype(np.float32) * 2.0 ** -(np.arange(24) % 5)[:, None]).T
    np.testing.assert_allclose(out.view(np.float32)[:, :24], exact, rtol=1e-5, atol=1e-3)
    by_warp = " shr.u32 %r16, %r1, 5;\n add.u32 %r15, %r15, %r16;\n"
    for old, new, told in ((" shl.b32 %v0,", by_warp + " shl.b32 %v0,", "scales differ"),
                           ("[%r13], {%v4};", "[%r11], {%v4};", "nobody wrote")):
        with pytest.raises(EmulationError, match=told):
            run(replace(steps, start=steps.start.replace(old, new)), image_a, image_b, (first, second, bits), lazy)
    with pytest.raises(EmulationError, match="expected UE8M0 scales"):
        run(steps, image_a, image_b, (first, second, bits & ~(1 << 23)), lazy)


# --- Loads and stores -----------------------------------------------------------------------------------------------


def cells_of(shape: str, register: int, lane: int, split: int) -> tuple[int, int]:
    """(lane, column) as the manual's figures have them, written out element by element."""
    group, member = divmod(lane, 4)
    if shape == "32x32b":
        return lane, register
    if shape == "16x32bx2":
        return lane % 16, register + (split if lane >= 16 else 0)
    if shape == "16x64b":
        return group + (8 if lane & 1 else 0), 2 * register + (1 if lane & 2 else 0)
    if shape == "16x128b":
        return group + (8 if register & 1 else 0), 4 * (register >> 1) + member
    return group + (8 if register & 2 else 0), 8 * (register >> 2) + 2 * member + (register & 1)


SHAPES = [("32x32b", 8, 8), ("16x64b", 4, 4), ("16x128b", 2, 4), ("16x256b", 2, 8), ("16x32bx2", 8, 8)]
"""With a number of repetitions, and the registers that these have."""


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("halves", [False, True], ids=["words", "halves"])
@pytest.mark.parametrize(("shape", "number", "count"), SHAPES)
def test_loads_and_stores_reach_the_cells_of_their_shape(shape: str, number: int, count: int, halves: bool,
                                                         lazy: bool) -> None:
    """What a store of one shape puts into cells, a load of whole lanes finds there, and the other way round."""
    split, further = (" 32,", ", 32") if shape == "16x32bx2" else ("", "")
    packed, unpacked = (".pack::16b", ".unpack::16b") if halves else ("", "")
    registers = vector(count)
    fill = "".join(f" mad.lo.u32 %v{register}, %r1, 65537, {0x00640000 + 1000 * register};\n"
                   for register in range(count))
    whole = f" mov.b32 %v99, 7;\n tcgen05.st.sync.aligned.32x32b.x64.b32 [%r11], {{{', '.join(['%v99'] * 64)}}};\n" \
            " tcgen05.wait::st.sync.aligned;\n"
    store = f" tcgen05.st.sync.aligned.{shape}.x{number}{unpacked}.b32 [%r11],{split} {registers};\n" \
            " tcgen05.wait::st.sync.aligned;\n"
    back = f" tcgen05.ld.sync.aligned.{shape}.x{number}{packed}.b32 {registers}, [%r11]{further};\n" \
           " tcgen05.wait::ld.sync.aligned;\n" + "".join(
               f" st.global.b32 [%d8+{512 + 4 * register}], %v{register};\n" for register in range(count))
    steps = Steps(start=whole + fill + store + back, load=load_all(64))
    out, _ = run(steps, lazy=lazy, uninitialised=not halves)
    thread, register = np.ogrid[:128, :count]
    values = (thread * 65537 + 0x00640000 + 1000 * register).astype(np.uint32)
    np.testing.assert_array_equal(out[:, 128:128 + count], values)
    cells = np.full((128, 64), 7, np.uint32)
    for thread in range(128):
        for register in range(count):
            lane, column = cells_of(shape, register, thread % 32, 0)
            lane, column = thread // 32 * 32 + lane, column + (32 if further and thread % 32 >= 16 else 0)
            value = int(values[thread, register])
            if halves:
                column += column - (32 if further and thread % 32 >= 16 else 0)
                cells[lane, column], cells[lane, column + 1] = value & 0xFFFF, value >> 16
            else:
                cells[lane, column] = value
    np.testing.assert_array_equal(out[:, :64], cells)


# --- What is wrong --------------------------------------------------------------------------------------------------


STORED = """ mov.b32 %v0, 1;
 tcgen05.st.sync.aligned.32x32b.x1.b32 [%r11], {%v0};
 tcgen05.wait::st.sync.aligned;"""
LOADED = """ tcgen05.ld.sync.aligned.32x32b.x1.b32 {%v1}, [%r11];
 tcgen05.wait::ld.sync.aligned;
 st.global.b32 [%d8], %v1;"""
MOVED = Steps(start=STORED, load=LOADED)
BOTH = [False, True]
FAULTS: list[tuple[str, Steps, list[bool], str]] = [
    ("dropped commit", replace(RIGHT, commit=""), BOTH, "nobody can go on"),
    ("dropped wait", replace(RIGHT, wait="bar.sync 0;"), BOTH, "still writes; expected tcgen05.commit"),
    ("dropped fence after the wait", replace(RIGHT, after=""), BOTH,
     "race on tensor memory at lanes 32 to 47, column 0"),
    ("dropped fence before a barrier", replace(RIGHT, load=load_all(16), before="", free=
     " tcgen05.fence::after_thread_sync;\n" + mma("f16") + "\n" + RIGHT.free), BOTH, "read by warp 1 before"),
    ("dropped fence after a barrier", replace(RIGHT, load=load_all(16), free=mma("f16") + "\n" + RIGHT.free), BOTH,
     "read by warp 1 before"),
    ("dropped wait::ld", replace(RIGHT, load=load_all(16, "")), BOTH, r"in flight; expected tcgen05\.wait::ld before"),
    ("dropped wait::st", replace(MOVED, start=STORED.replace("tcgen05.wait::st.sync.aligned;", "")), BOTH,
     r"still writes; expected tcgen05\.wait::st"),
    ("store before wait::ld", replace(MOVED, load=LOADED.replace(" tcgen05.wait::ld.sync.aligned;", STORED)), BOTH,
     r"still reads; expected tcgen05\.wait::ld"),
    ("dropped fence of proxies", replace(RIGHT, fill=""), BOTH, r"expected fence\.proxy\.async between"),
    ("overwritten operand", replace(RIGHT, wait=" st.shared.b32 [%r6], %r1;\n bar.sync 0;"), BOTH,
     "is written while the asynchronous read"),
    ("operand overwritten by others without a wait",
     replace(RIGHT, wait=" bar.sync 0;\n @!%p3 st.shared.b32 [%r6], %r3;\n bar.sync 0;\n" + RIGHT.wait), BOTH,
     "is written while the asynchronous read"),
    ("dropped dealloc", replace(RIGHT, free=""), BOTH, "ends with tensor memory at column 0; expected tcgen05.dealloc"),
    ("dealloc of too few columns", replace(RIGHT, free=RIGHT.free.replace("512", "256")), [False],
     "of 256 columns at 0, where there is an allocation of 512 columns"),
    ("dealloc of what nobody waited for", replace(RIGHT, wait="", after="", load=""), BOTH, "frees .*, which line"),
    ("dealloc that others are not done for",
     replace(RIGHT, before="@%p3 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r4, 512;", free=""), [False],
     "others may still use; expected a barrier|not allocated"),
    ("use after dealloc", replace(RIGHT, free=RIGHT.free + "\n bar.sync 0;\n" + LOADED), [False],
     "columns 0 to 0, of which 0 is not allocated"),
    ("alloc after relinquish_alloc_permit",
     replace(RIGHT, start=" @%p3 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r5], 32;"), [False],
     "after tcgen05.relinquish_alloc_permit"),
    ("unwritten cells", replace(RIGHT, load=load_all(24)), BOTH, "at lane 0, column 16 of block 0, which nobody wrote"),
    ("sums of nothing that go on", replace(RIGHT, product=mma("f16", keeps="%p5")), BOTH, "which nobody wrote"),
    ("another warp's lanes", replace(MOVED, load=LOADED.replace("%r11", "%r4")), [False],
     "begins at lane 0 of tensor memory; its lanes are 32 to 63"),
    ("lanes of half a warp", replace(MOVED, load=" add.u32 %r13, %r11, 1048576;\n" + LOADED.replace("%r11", "%r13")),
     [False], "begins at lane 16 of tensor memory; its lanes are 0 to 31, in steps of 32"),
    ("columns that are none", replace(MOVED, load=" add.u32 %r13, %r11, 511;\n" + LOADED.replace(
        "%r11", "%r13").replace("x1.b32 {%v1}", "x2.b32 {%v1, %v2}")), [False],
     "touches tensor memory at columns 511 to 512"),
    ("sums below the last lane", replace(RIGHT, product=" add.u32 %r13, %r4, 1048576;\n" + mma("f16", d="%r13")),
     [False], "found lane 16 of tensor memory, expected 0 for M = 128"),
    ("addresses that differ", replace(MOVED, load=" add.u32 %r13, %r11, %r1;\n" + LOADED.replace("%r11", "%r13")),
     [False], "the address differs between threads"),
]


@pytest.mark.parametrize(("steps", "lazy", "told"),
                         [pytest.param(steps, lazy, told, id=f"{name}, {'lazy' if lazy else 'eager'}")
                          for name, steps, modes, told in FAULTS for lazy in modes])
def test_a_fault_is_told(steps: Steps, lazy: bool, told: str) -> None:
    with pytest.raises(EmulationError, match=told):
        run(steps, *GIVEN, lazy=lazy)


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_what_the_faults_are_made_of_is_right(lazy: bool) -> None:
    out, _ = run(RIGHT, *GIVEN, lazy=lazy)
    np.testing.assert_allclose(out.view(np.float32)[:, :16], EXACT, rtol=1e-5, atol=1e-5)
    out, _ = run(MOVED, *GIVEN, lazy=lazy)
    assert (out[:, 0] == 1).all()


@pytest.mark.parametrize(("which", "change", "told"), [
    (2, lambda bits: bits & ~(31 << 24) | 12 << 24, "found M = 192"),
    (2, lambda bits: bits & ~(63 << 17) | 1 << 17, "found N = 8 in .* expected a multiple of 16"),
    (2, lambda bits: bits | 3 << 7, "found type of A 3"), (2, lambda bits: bits | 7 << 10, "found type of B 7"),
    (2, lambda bits: bits | 3 << 4, "found type of D 3"), (2, lambda bits: bits | 4, "sparse"),
    (2, lambda bits: bits | 8, "saturation of floats"),
    (0, lambda bits: bits & ~(3 << 46), "found version 0"), (0, lambda bits: bits | 1 << 49, "base offset 1"),
    (1, lambda bits: bits | 1 << 52, "bits 52 to 60"), (1, lambda bits: bits & ~(7 << 61) | 3 << 61, "swizzle 3"),
    (0, lambda bits: bits | 0x3FFF << 32, "nobody wrote|outside of the"),
    (1, lambda bits: bits & ~(7 << 61) | 2 << 61, "nobody wrote|outside of the"),
], ids=lambda value: "" if callable(value) else str(value))
def test_wrong_bits_of_descriptors_are_told(which: int, change: Callable[[int], int], told: str) -> None:
    image_a, image_b, bits = GIVEN
    with pytest.raises(EmulationError, match=told):
        run(RIGHT, image_a, image_b, tuple(change(one) if place == which else one for place, one in enumerate(bits)))


def test_a_transposed_operand_of_tf32_is_told() -> None:
    with pytest.raises(EmulationError, match="wants the swizzle of 32-byte chunks"):
        product(np.float32, np.float32, np.float32, 128, 32, 128, (False, True), lazy=False)


def test_a_wrong_swizzle_or_stride_gives_a_wrong_result() -> None:
    a, b = random((128, 16), BF16, 0), random((64, 16), BF16, 1)
    image_a, image_b, (first, second, bits) = described(a, b, swizzle=128)
    steps, exact = replace(RIGHT, load=load_all(64)), a.astype(np.float32) @ b.astype(np.float32).T
    for wrong in (second & ~(7 << 61) | SWIZZLE_CODE[64] << 61, second & ~(0x3FFF << 32) | 8 << 32):
        out, _ = run(steps, image_a, image_b, (first, wrong, bits), uninitialised=False)
        assert np.abs(out.view(np.float32)[:, :64] - exact).max() > 0.1


def test_an_allocation_waits_until_another_is_freed() -> None:
    again = RIGHT.free + "\n @!%p3 bra E;\n tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r5], 512;\n" \
        " bar.warp.sync -1;\n ld.shared.u32 %r4, [%r5];\n tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r4, 512;\nE:"
    text = text_of(replace(RIGHT, free=again), GIVEN[0].size, GIVEN[1].size).replace(
        "@%p3 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;", "")
    out = np.zeros((128, 256), np.uint32)
    emulate.load(text).launch(arguments=[GIVEN[0], GIVEN[1], out, *GIVEN[2]])
    np.testing.assert_allclose(out.view(np.float32)[:, :16], EXACT, rtol=1e-5, atol=1e-5)
    early = text.replace("mad.wide.u32 %d8, %r1, 1024, %d8;",
                         "@%p3 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r5], 32;")
    with pytest.raises(emulate.DeadlockError, match="waits for free tensor memory"):
        emulate.load(early).launch(arguments=[GIVEN[0], GIVEN[1], out, *GIVEN[2]])


def test_products_of_one_thread_run_in_their_order_and_of_another_behind_fences() -> None:
    """Thread 32 adds to what thread 0 issued and has not waited for."""
    second = "@%p7 " + mma("f16", keeps="%p5").strip().removeprefix("@%p1 ")
    fences = " setp.eq.u32 %p7, %r1, 32;\n tcgen05.fence::before_thread_sync;\n bar.sync 0;\n" \
             " tcgen05.fence::after_thread_sync;\n"
    steps = replace(RIGHT, product=mma("f16") + "\n" + fences + second,
                    commit="@%p7 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r3];")
    with pytest.raises(RaceError, match=r"still writes; expected tcgen05\.commit"):  # thread 0's has no commit
        run(steps, *GIVEN)
    # its own one at another mbarrier, which nobody needs to wait for: the second is made after it
    both = steps.commit + "\n @%p1 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r3];"
    text = text_of(replace(steps, commit=both), GIVEN[0].size, GIVEN[1].size).replace(
        "mbarrier.init.shared.b64 [%r3], 1;", "mbarrier.init.shared.b64 [%r3], 2;")
    for lazy in BOTH:
        out = np.zeros((128, 256), np.uint32)
        emulate.load(text).launch(arguments=[GIVEN[0], GIVEN[1], out, *GIVEN[2]], options=Options(lazy=lazy))
        np.testing.assert_allclose(out.view(np.float32)[:, :16], 2 * EXACT, rtol=1e-5, atol=1e-5)
    with pytest.raises(RaceError, match=r"which line .* still writes"):
        emulate.load(text.replace("tcgen05.fence::before_thread_sync;\n bar", "bar", 1)).launch(
            arguments=[GIVEN[0], GIVEN[1], out, *GIVEN[2]])


def test_a_commit_arrives_in_each_block_of_its_mask() -> None:
    """Block 1 waits for what block 0 issued."""
    first = " mov.u32 %r16, %cluster_ctarank;\n setp.eq.and.u32 %p1, %r16, 0, %p1;\n mov.b16 %h1, MASK;\n" \
        " barrier.cluster.arrive;\n barrier.cluster.wait;\n"
    commit = "@%p1 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%r3], %h1;"
    steps = replace(RIGHT, product=first + mma("f16"), commit=commit, load="")
    text = text_of(steps, GIVEN[0].size, GIVEN[1].size)
    arguments = [GIVEN[0], GIVEN[1], np.zeros((128, 256), np.uint32), *GIVEN[2]]
    for lazy in BOTH:
        emulate.load(text.replace("MASK", "3")).launch(grid=(2,), cluster=(2,), arguments=arguments,
                                                       options=Options(lazy=lazy))
    with pytest.raises(emulate.DeadlockError, match=r"block \(1, 0, 0\)"):
        emulate.load(text.replace("MASK", "1")).launch(grid=(2,), cluster=(2,), arguments=arguments)
    with pytest.raises(EmulationError, match="found the mask 0x4 of blocks"):
        emulate.load(text.replace("MASK", "4")).launch(grid=(2,), cluster=(2,), arguments=arguments)
