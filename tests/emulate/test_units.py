"""Instructions of warps, of the asynchronous engine and of clusters, that no foreign text at hand uses."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from sapper import emulate
from sapper.emulate import DeadlockError, Options, RaceError, TensorMap
from sapper.emulate.races import Clocks, Shadow

from .test_machine import run, text


def test_matches_reductions_and_elections() -> None:
    found = run("""
 and.b32 %r2, %r1, 3;
 match.any.sync.b32 %r3, %r2, -1;
 match.all.sync.b32 %r4|%p1, %r2, -1;
 match.all.sync.b32 %r5|%p2, 7, -1;
 redux.sync.add.u32 %r6, %r1, -1;
 redux.sync.max.s32 %r7, %r1, -1;
 redux.sync.xor.b32 %r8, %r1, -1;
 elect.sync %r9|%p3, -1;
 selp.u32 %r10, 1, 0, %p3;
 selp.u32 %r11, 1, 0, %p1;
 selp.u32 %r12, 1, 0, %p2;
 mad.wide.u32 %d3, %r1, 32, %d1;
 st.global.v4.u32 [%d3], {%r3, %r4, %r5, %r6};
 st.global.v4.u32 [%d3+16], {%r7, %r8, %r10, %r11};""")
    for lane in range(32):
        assert found[8 * lane:8 * lane + 8] == [0x11111111 << (lane & 3), 0, 0xFFFFFFFF, 496, 31, 0, int(lane == 0), 0]


def test_votes_of_part_of_a_warp() -> None:
    found = run("""
 setp.ge.u32 %p1, %r1, 12;
 @%p1 bra done;
 setp.lt.u32 %p2, %r1, 5;
 vote.sync.any.pred %p3, %p2, 0xFFF;
 vote.sync.all.pred %p4, %p2, 0xFFF;
 vote.sync.ballot.b32 %r2, %p2, 0xFFF;
 activemask.b32 %r3;
 selp.u32 %r4, 1, 0, %p3;
 selp.u32 %r5, 2, 0, %p4;
 add.u32 %r4, %r4, %r5;
 mad.lo.u32 %r2, %r4, 65536, %r2;
 xor.b32 %r2, %r2, %r3;
 st.global.u32 [%d2], %r2;
done:
 ret;""")
    assert found[:13] == [(0x1001F) ^ 0xFFF] * 12 + [0]


@pytest.mark.parametrize("transposed", ["", ".trans"])
def test_what_stmatrix_stores_ldmatrix_loads(transposed: str) -> None:
    found = run(f"""
 mov.u32 %r9, memory;
 mad.lo.u32 %r10, %r1, 16, %r9;
 mad.lo.u32 %r2, %r1, 7, 100;
 mad.lo.u32 %r3, %r1, 11, 200;
 shl.b32 %r3, %r3, 16;
 or.b32 %r2, %r2, %r3;
 not.b32 %r3, %r2;
 stmatrix.sync.aligned.m8n8.x2{transposed}.shared.b16 [%r10], {{%r2, %r3}};
 bar.warp.sync -1;
 ldmatrix.sync.aligned.m8n8.x2{transposed}.shared.b16 {{%r4, %r5}}, [%r10];
 xor.b32 %r6, %r2, %r4;
 xor.b32 %r7, %r3, %r5;
 or.b32 %r6, %r6, %r7;
 st.global.u32 [%d2], %r6;""", shared_bytes=512)
    assert found[:32] == [0] * 32


def test_transposing_in_registers_is_loading_transposed() -> None:
    found = run("""
 mov.u32 %r9, memory;
 mad.lo.u32 %r10, %r1, 16, %r9;
 mad.lo.u32 %r2, %r1, 65543, 100;
 setp.lt.u32 %p1, %r1, 8;
 stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r10], {%r2};
 bar.warp.sync -1;
 ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r4}, [%r10];
 movmatrix.sync.aligned.m8n8.trans.b16 %r5, %r2;
 xor.b32 %r6, %r5, %r4;
 st.global.u32 [%d2], %r6;""", shared_bytes=512)
    assert found[:32] == [0] * 32


@pytest.mark.parametrize(("op", "expected"), [
    ("atom.global.inc.u32 %r2, [%d1], 4;", [32 % 5]), ("atom.global.dec.u32 %r2, [%d1], 4;", [3]),
    ("atom.global.max.u32 %r2, [%d1], %r1;", [31]), ("red.global.or.b32 [%d1], %r1;", [31]),
    ("red.global.add.u64 [%d1], 1;", [32]), ("atom.global.cas.b32 %r2, [%d1], %r1, %r3;", [32]),
    ("red.global.add.f32 [%d1], 0f3F800000;", [int(np.float32(32).view(np.uint32))]),
    ("red.global.add.noftz.f16x2 [%d1], 0x3C004000;", [0x50005400]),
    ("red.global.add.noftz.bf16x2 [%d1], 0x3F804000;", [0x42004280]),
    ("red.global.v2.f32.add [%d1], {%f1, %f1};", [int(np.float32(32).view(np.uint32))] * 2),
])
def test_atomics_one_after_another(op: str, expected: list[int]) -> None:
    body = f" add.u32 %r3, %r1, 1;\n mov.f32 %f1, 0f3F800000;\n {op}"
    assert run(body)[:len(expected)] == expected


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_copies_that_arrive_at_an_mbarrier(lazy: bool) -> None:
    body = """
 mov.u32 %r9, memory;
 add.u32 %r8, %r9, 512;
 setp.eq.u32 %p1, %r1, 0;
 @%p1 mbarrier.init.shared.b64 [%r8], 32;
 bar.sync 0;
 mad.lo.u32 %r10, %r1, 4, %r9;
 cp.async.ca.shared.global [%r10], [%d2], 4;
 cp.async.mbarrier.arrive.noinc.shared.b64 [%r8];
wait:
 mbarrier.try_wait.parity.shared.b64 %p2, [%r8], 0;
 @!%p2 bra wait;
 xor.b32 %r11, %r10, 4;
 ld.shared.u32 %r2, [%r11];
 st.global.u32 [%d2+128], %r2;"""
    out = np.arange(64, dtype=np.uint32)
    emulate.load(text(body, 528)).launch(block=(32,), arguments=[out], options=Options(lazy=lazy))
    assert out[32:].tolist() == [lane ^ 1 for lane in range(32)]
    broken = text(body.replace(" @!%p2 bra wait;", "") if lazy else body.replace(
        " cp.async.mbarrier.arrive.noinc.shared.b64 [%r8];", " mbarrier.arrive.shared.b64 %d3, [%r8];"), 528)
    with pytest.raises(RaceError, match="in flight"):
        emulate.load(broken).launch(block=(32,), arguments=[out], options=Options(lazy=lazy))


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_a_store_to_a_peer_reports_its_bytes(lazy: bool) -> None:
    """Each of two blocks stores into the other's shared memory with st.async, and waits for what comes."""
    found = run("""
 mov.u32 %r9, memory;
 add.u32 %r8, %r9, 128;
 mov.u32 %r2, %cluster_ctarank;
 setp.eq.u32 %p1, %r1, 0;
 @%p1 mbarrier.init.shared.b64 [%r8], 1;
 @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r8], 128;
 fence.mbarrier_init.release.cluster;
 barrier.cluster.arrive;
 barrier.cluster.wait;
 xor.b32 %r3, %r2, 1;
 mad.lo.u32 %r10, %r1, 4, %r9;
 mapa.shared::cluster.u32 %r4, %r10, %r3;
 mapa.shared::cluster.u32 %r5, %r8, %r3;
 mad.lo.u32 %r6, %r2, 100, %r1;
 st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r4], %r6, [%r5];
wait:
 mbarrier.try_wait.parity.acquire.cluster.shared.b64 %p2, [%r8], 0;
 @!%p2 bra wait;
 ld.shared.u32 %r7, [%r10];
 mad.lo.u32 %r11, %r2, 32, %r1;
 mad.wide.u32 %d3, %r11, 4, %d1;
 st.global.u32 [%d3], %r7;
 barrier.cluster.arrive;
 barrier.cluster.wait;""", shared_bytes=136, grid=2, cluster=2, lazy=lazy)
    assert found[:64] == [100 + lane for lane in range(32)] + list(range(32))


MULTICAST = """.version 8.0
.target sm_90a
.address_size 64
.visible .entry multicast(.param .align 64 .b8 map[128], .param .u64 out)
{
 .reg .pred %p<4>; .reg .b32 %r<16>; .reg .b64 %d<16>; .reg .b16 %h<2>;
 .shared .align 128 .b8 box[256];
 .shared .align 8 .b64 full;
 mov.u32 %r1, %tid.x;
 mov.u32 %r2, box;
 mov.u32 %r3, full;
 mov.u32 %r4, %cluster_ctarank;
 setp.eq.u32 %p1, %r1, 0;
 @%p1 mbarrier.init.shared.b64 [%r3], 1;
 @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r3], 256;
 fence.mbarrier_init.release.cluster;
 barrier.cluster.arrive;
 barrier.cluster.wait;
 setp.eq.and.u32 %p1, %r4, 0, %p1;
 mov.u64 %d1, map;
 cvta.param.u64 %d1, %d1;
 mov.b16 %h1, 3;
 @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
   [%r2], [%d1, {4, 2}], [%r3], %h1;
wait:
 mbarrier.try_wait.parity.shared.b64 %p2, [%r3], 0;
 @!%p2 bra wait;
 mad.lo.u32 %r5, %r1, 8, %r2;
 ld.shared.b64 %d2, [%r5];
 ld.param.u64 %d3, [out];
 mad.lo.u32 %r6, %r4, 32, %r1;
 mad.wide.u32 %d3, %r6, 8, %d3;
 st.global.b64 [%d3], %d2;
 barrier.cluster.arrive;
 barrier.cluster.wait;
}
"""


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_a_box_for_all_blocks_of_a_cluster(lazy: bool) -> None:
    """Elements outside of the tensor are zeros, and count as bytes."""
    tensor = np.arange(6 * 16, dtype=np.int32).reshape(6, 16)
    out = np.zeros((2, 8, 8), np.int32)
    emulate.load(MULTICAST).launch(grid=(2,), cluster=(2,), block=(32,), arguments=[TensorMap(tensor, (8, 8)), out],
                                   options=Options(lazy=lazy))
    expected = np.zeros((8, 8), np.int32)
    expected[:4] = tensor[2:6, 4:12]
    assert (out == expected).all()


REDUCE = """
 mov.u32 %r9, memory;
 mad.lo.u32 %r10, %r1, 4, %r9;
 st.shared.u32 [%r10], %r1;
 fence.proxy.async.shared::cta;
 bar.sync 0;
 setp.eq.u32 %p1, %r1, 0;
 @!%p1 bra done;
 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%d1], [%r9], 128;
 cp.async.bulk.commit_group;
 cp.async.bulk.wait_group.read 0;
done:
 ret;"""


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_a_bulk_reduction(lazy: bool) -> None:
    assert run(REDUCE, grid=2, shared_bytes=128, lazy=lazy)[:32] == [2 * lane for lane in range(32)]


@pytest.mark.parametrize(("dropped", "message"), [
    (" fence.proxy.async.shared::cta;\n", "expected fence.proxy.async"), (" bar.sync 0;\n", "race on shared memory"),
    (" cp.async.bulk.wait_group.read 0;\n", "may still read shared memory"),
])
def test_a_bulk_reduction_without_what_it_needs(dropped: str, message: str) -> None:
    with pytest.raises(RaceError, match=message):
        run(REDUCE.replace(dropped, ""), threads=64, shared_bytes=256)


@pytest.mark.parametrize("space", ["", ".shared::cluster", ".global"])
def test_a_proxy_fence_is_one_of_its_memory(space: str) -> None:
    body = REDUCE.replace("async.shared::cta;", f"async{space};")
    if space != ".global":
        assert run(body, grid=2, shared_bytes=128)[:32] == [2 * lane for lane in range(32)]
        return
    with pytest.raises(RaceError, match=r"expected fence\.proxy\.async"):
        run(body, shared_bytes=128)


@pytest.mark.parametrize(("given", "taken", "more"), [(24, 232, ""), (24, 256, ""), (104, 208, "pool has 48"),
                                                      (120, 136, ""), (120, 232, "pool has 96")])
def test_registers_come_from_the_pool_of_the_block(given: int, taken: int, more: str) -> None:
    """512 threads have 128 each: what three groups of warps give back the four warps of the first may take."""
    body = f"""
 setp.lt.u32 %p1, %r1, 128;
 @%p1 bra takes;
 setmaxnreg.dec.sync.aligned.u32 {given};
 bra.uni done;
takes:
 setmaxnreg.inc.sync.aligned.u32 {taken};
done:
 st.global.u32 [%d2], %r1;"""
    if not more:
        run(body, threads=512, words=512)
        return
    with pytest.raises(DeadlockError, match=rf"waits for {taken - 128} more registers .*{more}"):
        run(body, threads=512, words=512)


def test_packed_halves_are_a_low_and_a_high_one() -> None:
    found = run(" mov.b32 %r2, 0x3F804000;\n fma.rn.bf16x2 %r3, %r2, %r2, %r2;\n st.global.u32 [%d2], %r3;")
    low, high = np.array([found[0]], np.uint32).view(ml_dtypes.bfloat16).astype(np.float32).tolist()
    assert (low, high) == (6.0, 2.0)


def test_the_granules_of_a_copy_are_those_of_its_bytes_each_once() -> None:
    shadow = Shadow(1 << 12, 4, 2, Clocks(1, 2, 1), "shared memory", str)
    random = np.random.default_rng(0)
    for count in (0, 1, 7, 500):
        for size in (1, 2, 4, 8):
            offsets = random.integers(64, (1 << 12) // size, (count, 2)) * size
            touched = offsets[..., None] + np.arange(size)
            np.testing.assert_array_equal(shadow.places(offsets, size), np.unique(touched // 4))


def test_a_read_by_several_warps_is_a_race_with_a_write_that_one_of_them_does_not_know() -> None:
    clocks = Clocks(1, 3, 1)
    shadow = Shadow(1 << 12, 4, 3, clocks, "shared memory", str)
    places, both = np.arange(8), np.array([0, 1])
    shadow.check_write(places[None], np.array([2]), np.array([0]), 5)
    clocks.acquire(np.array([0, 2]), clocks.joint(np.array([0, 2])))
    with pytest.raises(RaceError, match="read by warp 1 of block 0"):
        shadow.check_reads_of_all(places, both, 6)
    clocks.acquire(np.array([1, 2]), clocks.joint(np.array([1, 2])))
    shadow.check_reads_of_all(places, both, 7)
    with pytest.raises(RaceError, match=r"written by warp 2 .* and read before by warp 0"):
        shadow.check_write(places[None], np.array([2]), np.array([0]), 8)
