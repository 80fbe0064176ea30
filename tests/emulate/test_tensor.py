"""Tensor copies and wgmma agree with each other in every swizzle and for both majors, and with NumPy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sapper import emulate
from sapper.emulate import EmulationError, MemoryFault, Options, TensorMap
from sapper.emulate.tensor_map import swizzled
from sapper.emulate.unit_wgmma import Descriptor

BF16 = ml_dtypes.bfloat16
CODE = {0: 0, 128: 1, 64: 2, 32: 3}
"""Bits 62 and 63 of a matrix descriptor."""

COPY = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
PRODUCT = """.version 8.0
.target sm_90a
.address_size 64
.visible .entry product(.param .align 64 .b8 map_a[128], .param .align 64 .b8 map_b[128], .param .u64 out,
                        .param .u64 descriptor_a, .param .u64 descriptor_b)
.reqntid 128
{
 .reg .pred %p<4>; .reg .b32 %r<16>; .reg .b64 %d<16>; .reg .f32 %f<4>;
 .shared .align 1024 .b8 a[8192];
 .shared .align 1024 .b8 b[8192];
 .shared .align 8 .b64 full;
 mov.u32 %r1, %tid.x;
 setp.eq.u32 %p1, %r1, 0;
 mov.u32 %r2, a;
 mov.u32 %r3, b;
 mov.u32 %r4, full;
 mov.u64 %d1, map_a;
 cvta.param.u64 %d1, %d1;
 mov.u64 %d2, map_b;
 cvta.param.u64 %d2, %d2;
 @%p1 mbarrier.init.shared.b64 [%r4], 1;
 fence.mbarrier_init.release.cluster;
 bar.sync 0;
 @!%p1 bra wait;
 mbarrier.arrive.expect_tx.shared.b64 _, [%r4], BYTES;
COPIES
wait:
 mbarrier.try_wait.parity.shared.b64 %p2, [%r4], 0;
 @!%p2 bra wait;
 ld.param.u64 %d3, [descriptor_a];
 ld.param.u64 %d4, [descriptor_b];
 shr.u32 %r5, %r2, 4;
 cvt.u64.u32 %d5, %r5;
 or.b64 %d3, %d3, %d5;
 shr.u32 %r5, %r3, 4;
 cvt.u64.u32 %d5, %r5;
 or.b64 %d4, %d4, %d5;
 setp.ne.u32 %p3, %r1, %r1;
 wgmma.fence.sync.aligned;
 wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %d3, %d4, %p3, 1, 1, TA, TB;
 wgmma.commit_group.sync.aligned;
 wgmma.wait_group.sync.aligned 0;
 ld.param.u64 %d6, [out];
 mad.wide.u32 %d6, %r1, 16, %d6;
 st.global.v4.f32 [%d6], {%f0, %f1, %f2, %f3};
 ret;
}
"""


def descriptor(swizzle: int, leading: int, stride: int) -> np.uint64:
    return np.uint64(CODE[swizzle] << 62 | (stride >> 4) << 32 | (leading >> 4) << 16)


def operand(extent: int, swizzle: int, transposed: bool, seed: int) -> tuple[Any, TensorMap, list[tuple[int, int, int]],
                                                                             Any]:
    """(matrix (extent, 16), its map, the boxes as (bytes into the buffer, x, y), its descriptor)."""
    matrix = np.random.default_rng(seed).standard_normal((extent, 16)).astype(BF16)
    width = (swizzle or 16) // 2  # elements in a row of the swizzle
    if not transposed:
        stored = np.zeros((extent, max(width, 16)), BF16)
        stored[:, :16] = matrix
        if swizzle:
            return matrix, TensorMap(stored, (extent, width), swizzle), [(0, 0, 0)], descriptor(swizzle, 16,
                                                                                                8 * swizzle)
        boxes = [(0, 0, 0), (16 * extent, 8, 0)]  # two columns of 16 bytes, each of all rows
        return matrix, TensorMap(stored, (extent, 8), 0), boxes, descriptor(0, 16 * extent, 128)
    stored = np.zeros((16, max(width, extent)), BF16)
    stored[:, :extent] = matrix.T
    count = -(-extent // width)
    boxes = [(number * 16 * width * 2, number * width, 0) for number in range(count)]
    if swizzle:
        return matrix, TensorMap(stored, (16, width), swizzle), boxes, descriptor(swizzle, 32 * width, 16 * width)
    return matrix, TensorMap(stored, (16, 8), 0), boxes, descriptor(0, 128, 256)


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize(("transposed_a", "transposed_b"), [(False, False), (True, False), (False, True), (True, True)])
def test_tensor_copies_and_products_agree(swizzle: int, transposed_a: bool, transposed_b: bool, lazy: bool) -> None:
    a, map_a, boxes_a, descriptor_a = operand(64, swizzle, transposed_a, 0)
    b, map_b, boxes_b, descriptor_b = operand(8, swizzle, transposed_b, 1)
    copies = [
        f" add.u32 %r6, %r{register}, {at};\n {COPY} [%r6], [%d{number}, {{{x}, {y}}}], [%r4];"
        for number, register, boxes in ((1, 2, boxes_a), (2, 3, boxes_b)) for at, x, y in boxes]
    size = sum(len(boxes) * int(np.prod(one.box)) * 2 for one, boxes in ((map_a, boxes_a), (map_b, boxes_b)))
    text = PRODUCT.replace("COPIES", "\n".join(copies)).replace("BYTES", str(size))
    text = text.replace("TA", str(int(transposed_a))).replace("TB", str(int(transposed_b)))
    out = np.zeros((128, 4), np.float32)
    emulate.load(text).launch(arguments=[map_a, map_b, out, descriptor_a, descriptor_b], options=Options(lazy=lazy))
    exact = a.astype(np.float32) @ b.astype(np.float32).T
    thread, register = np.ogrid[:128, :4]
    rows = thread // 32 * 16 + thread % 32 // 4 + 8 * (register // 2)
    np.testing.assert_allclose(out, exact[rows, thread % 4 * 2 + register % 2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_descriptor_reaches_every_element_once(swizzle: int, transposed: bool) -> None:
    _, _, _, bits = operand(64, swizzle, transposed, 0)
    places = Descriptor.decode(int(bits)).offsets(64, 16, 2, transposed)
    assert len(set(places.ravel().tolist())) == 64 * 16


def test_a_swizzle_permutes_chunks_inside_their_rows() -> None:
    offsets = np.arange(0, 4096, 16)
    for swizzle in (32, 64, 128):
        moved = swizzled(offsets, swizzle)
        assert sorted(moved.tolist()) == offsets.tolist() and (moved // 128 == offsets // 128).all()
    # A column of 16-byte chunks of eight rows of 128 bytes lies in all 32 banks.
    assert len(set((swizzled(np.arange(8) * 128, 128) % 128).tolist())) == 8


@pytest.mark.parametrize(("box", "swizzle", "message"), [
    ((8,), 0, "box of 1 dimensions for an array of 2"), ((300, 8), 0, "extents of 1 to 256"),
    ((8, 8), 16, "expected one of"),
    ((8, 64), 64, "rows of 128 bytes, expected at most its swizzle"), ((8, 4), 0, "expected a multiple of 16"),
])
def test_maps_that_no_driver_takes(box: tuple[int, ...], swizzle: int, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        TensorMap(np.zeros((16, 64), BF16), box, swizzle)
    with pytest.raises(EmulationError, match="expected multiples of 16"):
        TensorMap(np.zeros((16, 5), BF16), (16, 8))


def test_a_map_that_is_none_is_told() -> None:
    text = PRODUCT.replace("COPIES", f" {COPY} [%r2], [%d1, {{0, 0}}], [%r4];").replace("BYTES", "16")
    text = text.replace("TA", "0").replace("TB", "0")
    with pytest.raises(EmulationError, match="no tensor map; expected a TensorMap"):
        emulate.load(text).launch(arguments=[bytes(128), bytes(128), np.zeros(512, np.float32), 0, 0])


def test_a_product_outside_of_shared_memory_is_told() -> None:
    text = PRODUCT.replace("COPIES", "").replace("BYTES", "0").replace("TA", "0").replace("TB", "0")
    with pytest.raises(MemoryFault, match=r"outside of the \d+ bytes of shared memory"):
        emulate.load(text).launch(arguments=[bytes(128), bytes(128), np.zeros(512, np.float32),
                                             descriptor(0, 0x3FFF0, 0x3FFF0), descriptor(0, 16, 16)])
