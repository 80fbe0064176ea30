"""The machine on small texts: threads that part and meet, waits and deadlocks, memory, races, what messages say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapper import emulate
from sapper.emulate import (
    ConvergenceError,
    DeadlockError,
    EmulationError,
    MemoryFault,
    Options,
    ParseError,
    RaceError,
    Uninitialised,
    races,
)

HEAD = """.version 8.0
.target sm_90a
.address_size 64
"""
REGISTERS = " .reg .pred %p<16>; .reg .b16 %h<16>; .reg .b32 %r<64>; .reg .f32 %f<16>; .reg .b64 %d<32>;\n"


def text(body: str, shared_bytes: int = 0, before: str = "") -> str:
    """A kernel `test` with one pointer %d1, %r1 = %tid.x, and %d2 the address of the thread's own word there."""
    shared = f" .shared .align 128 .b8 memory[{shared_bytes}];\n" if shared_bytes else ""
    start = """ ld.param.u64 %d1, [out];
 mov.u32 %r1, %tid.x;
 mad.wide.u32 %d2, %r1, 4, %d1;
"""
    return f"{HEAD}{before}.visible .entry test(.param .u64 out)\n{{\n{REGISTERS}{shared}{start}{body}\n}}\n"


def run(body: str, threads: int = 32, shared_bytes: int = 0, words: int = 256, grid: int = 1, cluster: int = 1,
        **options: Any) -> list[int]:
    out = np.zeros(words, np.uint32)
    emulate.load(text(body, shared_bytes)).launch("test", grid=(grid,), block=(threads,), cluster=(cluster,),
                                                  arguments=[out], options=Options(**options))
    return [int(word) for word in out]


# --- Threads that part and meet -------------------------------------------------------------------------------------


def test_threads_part_at_a_branch_and_meet_again() -> None:
    """After the branch the whole warp votes: it only works if both sides came together."""
    found = run("""
 and.b32 %r2, %r1, 3;
 setp.eq.u32 %p1, %r2, 0;
 @%p1 bra side;
 mov.b32 %r3, 7;
 bra join;
side:
 mov.b32 %r3, 9;
join:
 vote.sync.ballot.b32 %r4, %p1, -1;
 add.u32 %r5, %r3, %r4;
 st.global.u32 [%d2], %r5;
 ret;""")
    assert found[:4] == [9 + 0x11111111, 7 + 0x11111111, 7 + 0x11111111, 7 + 0x11111111]


def test_a_side_laid_out_after_the_join_still_meets() -> None:
    found = run("""
 setp.lt.u32 %p1, %r1, 5;
 mov.b32 %r3, 1;
 @%p1 bra far;
join:
 vote.sync.ballot.b32 %r4, %p1, -1;
 add.u32 %r4, %r4, %r3;
 st.global.u32 [%d2], %r4;
 ret;
far:
 mov.b32 %r3, 100;
 bra join;""")
    assert found[0] == 31 + 100 and found[5] == 31 + 1


def test_loops_of_different_lengths() -> None:
    found = run("""
 mov.b32 %r2, 0;
 mov.b32 %r3, 0;
loop:
 add.u32 %r2, %r2, %r3;
 add.u32 %r3, %r3, 1;
 setp.le.u32 %p1, %r3, %r1;
 @%p1 bra loop;
 st.global.u32 [%d2], %r2;""", threads=64)
    assert found[:64] == [n * (n + 1) // 2 for n in range(64)]


def test_a_thread_polls_while_the_rest_of_its_warp_waits_at_a_barrier_and_other_warps_go_on() -> None:
    """The last thread of block 1 waits for what block 0 stores behind the barrier at which all others arrived."""
    found = run("""
 mov.u32 %r2, %ctaid.x;
 mad.lo.u32 %r3, %r2, 32, %r1;
 setp.ne.u32 %p1, %r3, 63;
 @%p1 bra there;
again:
 ld.acquire.gpu.global.u32 %r4, [%d1+512];
 setp.eq.u32 %p2, %r4, 0;
 @%p2 bra again;
there:
 bar.sync 0;
 setp.ne.u32 %p3, %r3, 0;
 @%p3 bra end;
 mov.b32 %r5, 1;
 st.release.gpu.global.u32 [%d1+512], %r5;
end:
 ret;
""", grid=2, step_limit=100_000)
    assert found[128] == 1


@pytest.mark.parametrize("cooperative", [True, False])
def test_a_cooperative_launch_brings_the_workspace_of_the_grids_barrier(cooperative: bool) -> None:
    """As grid_group::sync of cooperative_groups.h has it: a pointer in two halves, zero where the launch is none."""
    body = """
 mov.u32 %r2, %envreg1;
 mov.u32 %r3, %envreg2;
 mov.b64 %d3, {%r3, %r2};
 setp.eq.u64 %p1, %d3, 0;
 @%p1 trap;
 mov.b32 %r4, 5;
 atom.add.release.gpu.global.u32 %r5, [%d3+4], %r4;
 st.global.u32 [%d2], %r5;
"""
    out = np.zeros(32, np.uint32)
    if cooperative:
        emulate.load(text(body)).launch(block=(32,), arguments=[out], cooperative=True)
        assert sorted(out) == list(range(0, 160, 5))
    else:
        with pytest.raises(EmulationError, match="trap"):
            emulate.load(text(body)).launch(block=(32,), arguments=[out])


def test_a_shuffle_that_part_of_its_members_never_reach_is_a_deadlock() -> None:
    with pytest.raises(DeadlockError, match=r"(?s)nobody can go on.*warp 0 \(16 lanes\).*shfl.*waits for the other "
                                            r"members"):
        run("""
 setp.lt.u32 %p1, %r1, 16;
 @%p1 bra wait;
 bar.sync 0;
wait:
 shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;
 bar.sync 0;""")


@pytest.mark.parametrize("instruction", [
    "shfl.sync.bfly.b32 %r2, %r1, 1, 31, 0x7fffffff", "vote.sync.any.pred %p1, %p1, 0x7fffffff",
    "bar.warp.sync 0x7fffffff"])
def test_a_lane_that_its_own_mask_does_not_name_is_told(instruction: str) -> None:
    with pytest.raises(EmulationError, match=r"found block .*lane 31 with the member mask 0x7fffffff; expected one"):
        run(f"""
 setp.lt.u32 %p1, %r1, 16;
 {instruction};""")


def test_reading_a_lane_that_takes_no_part_is_told() -> None:
    with pytest.raises(EmulationError, match=r"block .*lane 0 reads a lane that takes no part"):
        run("""
 setp.ge.u32 %p1, %r1, 8;
 @%p1 bra done;
 shfl.sync.down.b32 %r2, %r1, 8, 31, 0xFF;
done:
 ret;""")


def test_a_whole_warp_instruction_under_a_lanes_predicate_is_told() -> None:
    with pytest.raises(ConvergenceError, match="differs inside a warp"):
        run(" setp.lt.u32 %p1, %r1, 5;\n @%p1 bar.sync 0;")


def test_a_predicated_barrier_waits_for_the_lanes_that_are_elsewhere() -> None:
    """Warp 1 skips it by its predicate; half of warp 0 comes later, and then the whole of it arrives."""
    found = run("""
 setp.lt.u32 %p1, %r1, 32;
 and.b32 %r2, %r1, 1;
 setp.eq.u32 %p2, %r2, 0;
 mov.b32 %r3, 5;
 @%p2 bra far;
back:
 @%p1 bar.sync 1, 32;
 st.global.u32 [%d2], %r3;
 ret;
far:
 mov.b32 %r3, 6;
 bra back;""", threads=64)
    assert found[:64] == [6, 5] * 32


# --- Barriers -------------------------------------------------------------------------------------------------------


def test_a_barrier_that_a_warp_skips_is_a_deadlock_with_the_count() -> None:
    with pytest.raises(DeadlockError, match=r"warp 0: at line \d+: bar.sync 0, 64; waits for barrier 0 \(32 of 64 "
                                            r"threads"):
        run(" setp.ge.u32 %p1, %r1, 32;\n @%p1 bra done;\n bar.sync 0, 64;\ndone:\n ret;", threads=64)


def test_threads_that_left_are_not_waited_for() -> None:
    assert run(" setp.ge.u32 %p1, %r1, 32;\n @%p1 exit;\n bar.sync 0;\n st.global.u32 [%d2], 3;", threads=64)[0] == 3


def test_producer_and_consumer_with_named_barriers() -> None:
    """Warp 1 produces, warp 0 consumes: bar.arrive and bar.sync on two barriers, as in CUTLASS's pipelines."""
    found = run("""
 mov.u32 %r9, memory;
 and.b32 %r8, %r1, 31;
 mad.lo.u32 %r9, %r8, 4, %r9;
 mov.b32 %r4, 0;
 mov.b32 %r5, 0;
 setp.ge.u32 %p1, %r1, 32;
 @%p1 bra producer;
consumer:
 bar.sync 1, 64;
 ld.shared.u32 %r6, [%r9];
 add.u32 %r5, %r5, %r6;
 bar.arrive 2, 64;
 add.u32 %r4, %r4, 1;
 setp.lt.u32 %p2, %r4, 3;
 @%p2 bra consumer;
 st.global.u32 [%d2], %r5;
 ret;
producer:
 mad.lo.u32 %r6, %r4, 100, %r8;
 st.shared.u32 [%r9], %r6;
 bar.arrive 1, 64;
 bar.sync 2, 64;
 add.u32 %r4, %r4, 1;
 setp.lt.u32 %p2, %r4, 3;
 @%p2 bra producer;
 ret;""", threads=64, shared_bytes=128)
    assert found[:32] == [300 + 3 * lane for lane in range(32)]


def test_a_reduction_at_a_barrier() -> None:
    found = run("""
 setp.lt.u32 %p1, %r1, 40;
 bar.red.popc.u32 %r2, 0, %p1;
 bar.red.or.pred %p2, 0, %p1;
 bar.red.and.pred %p3, 0, %p1;
 selp.u32 %r3, 1000, 0, %p2;
 selp.u32 %r4, 2000, 0, %p3;
 add.u32 %r2, %r2, %r3;
 add.u32 %r2, %r2, %r4;
 st.global.u32 [%d2], %r2;""", threads=64)
    assert found[:64] == [1040] * 64


def test_an_mbarrier_nobody_arrives_at_is_a_deadlock_with_its_state() -> None:
    with pytest.raises(DeadlockError, match=r"parity 0 of the mbarrier at shared memory\+0 .*32 of 32 arrivals"):
        run("""
 mov.u32 %r9, memory;
 setp.eq.u32 %p1, %r1, 0;
 @%p1 mbarrier.init.shared.b64 [%r9], 32;
 bar.sync 0;
again:
 mbarrier.try_wait.parity.shared.b64 %p2, [%r9], 0;
 @!%p2 bra again;""", shared_bytes=8)


def test_an_mbarrier_must_be_made_known_before_its_use() -> None:
    body = """
 mov.u32 %r9, memory;
 setp.eq.u32 %p1, %r1, 0;
 @%p1 mbarrier.init.shared.b64 [%r9], 64;
 bar.sync 0;
 mbarrier.arrive.shared.b64 %d3, [%r9];"""
    run(body, threads=64, shared_bytes=8)
    for barrier in ("", " bar.warp.sync -1;\n"):
        with pytest.raises(RaceError, match=r"race on shared memory\+0 .*read by warp \d"):
            run(body.replace(" bar.sync 0;\n", barrier), threads=64, shared_bytes=8)


def test_too_many_arrivals_are_told() -> None:
    with pytest.raises(EmulationError, match="3 arrivals, where 2 are pending in phase 0"):
        run("""
 mov.u32 %r9, memory;
 setp.eq.u32 %p1, %r1, 0;
 @%p1 mbarrier.init.shared.b64 [%r9], 2;
 bar.sync 0;
 @%p1 mbarrier.arrive.shared.b64 %d3, [%r9], 3;""", shared_bytes=8)


def test_endless_loops_end_with_the_place() -> None:
    with pytest.raises(DeadlockError, match=r"(?s)instructions ran without an end.*bra loop"):
        run("loop:\n add.u32 %r2, %r1, 1;\n bra loop;", step_limit=5000)


def test_all_arrive_at_a_cluster_barrier() -> None:
    found = run("""
 mov.u32 %r9, memory;
 mov.u32 %r2, %cluster_ctarank;
 setp.eq.u32 %p1, %r1, 0;
 add.u32 %r3, %r2, 10;
 @%p1 st.shared.u32 [%r9], %r3;
 barrier.cluster.arrive.aligned;
 barrier.cluster.wait.aligned;
 xor.b32 %r4, %r2, 1;
 mapa.shared::cluster.u32 %r5, %r9, %r4;
 ld.shared::cluster.u32 %r6, [%r5];
 mad.lo.u32 %r7, %r2, 32, %r1;
 mad.wide.u32 %d3, %r7, 4, %d1;
 st.global.u32 [%d3], %r6;
 barrier.cluster.arrive.aligned;
 barrier.cluster.wait.aligned;""", shared_bytes=4, grid=2, cluster=2)
    assert found[:64] == [11] * 32 + [10] * 32


REACHES = """
 mov.u32 %r9, memory;
 mov.u32 %r2, %cluster_ctarank;
 xor.b32 %r4, %r2, 1;
 mapa.shared::cluster.u32 %r5, %r9, %r4;
 setp.eq.u32 %p1, %r2, 0;
 {early}
 st.shared::cluster.u32 [%r5], %r2;
 {late}"""


@pytest.mark.parametrize(("early", "told"), [("@%p1 ret;", "reaches into shared memory of block 0, which has ended"),
                                             ("", "block 0 ends, while warp 0 of block 1 may still reach into")])
def test_a_block_that_ends_before_others_are_done_with_it_is_told(early: str, told: str) -> None:
    with pytest.raises(RaceError, match=f"{told}.*expected barrier.cluster"):
        run(REACHES.format(early=early, late=""), shared_bytes=4, grid=2, cluster=2)
    run(REACHES.format(early="", late="barrier.cluster.arrive;\n barrier.cluster.wait;"), shared_bytes=4, grid=2,
        cluster=2)


# --- Memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "message"), [
    (" st.global.u32 [%d2+1024], 1;", r"lane 0, address 0x\w+: 4 bytes out of bounds at .*\+1024 \(it has 1024 "
                                      r"bytes\)"),
    (" st.global.u32 [%d2+2], 1;", "expected an address that is a multiple of 4"),
    (" ld.shared.u32 %r2, [memory+16];", "outside of the 16 bytes of shared memory"),
    (" ld.shared.u32 %r2, [memory];", "lane 0, .*reads shared memory that nobody wrote"),
    (" add.u32 %r2, %r3, 1;", "register %r3 is read before it is written, by block .*warp 0, lane 0"),
    (" st.global.u32 [0], 1;", "out of bounds"),
    (" mbarrier.arrive.shared.b64 %d3, [memory+8];", "no mbarrier was initialised at shared memory.8"),
    (" trap;", "trap; is reached"),
])
def test_faults_name_the_instruction_and_the_lane(body: str, message: str) -> None:
    with pytest.raises((MemoryFault, EmulationError), match=message) as caught:
        run(body, shared_bytes=16)
    assert caught.value.line > 0


def test_global_memory_that_nobody_wrote() -> None:
    out = np.zeros(32, np.uint32)
    module = emulate.load(text(" ld.global.u32 %r2, [%d2];"))
    with pytest.raises(MemoryFault, match="reads global memory that nobody wrote: argument 0"):
        module.launch(block=(32,), arguments=[Uninitialised(out)])
    module.launch(block=(32,), arguments=[Uninitialised(out)], options=Options(uninitialised=False))


@pytest.mark.parametrize("step", [128, -128])
def test_an_instruction_that_leaves_the_allocation_where_it_was(step: int) -> None:
    with pytest.raises(MemoryFault, match="4 bytes out of bounds"):
        run(f"again:\n ld.global.u32 %r2, [%d2];\n add.s64 %d2, %d2, {step};\n bra again;", step_limit=1000)


def test_an_instruction_that_goes_on_to_memory_that_nobody_wrote() -> None:
    body = text("again:\n ld.global.u32 %r2, [%d2];\n ld.param.u64 %d2, [other];\n bra again;")
    module = emulate.load(body.replace("(.param .u64 out)", "(.param .u64 out, .param .u64 other)"))
    with pytest.raises(MemoryFault, match="reads global memory that nobody wrote: argument 1"):
        module.launch(block=(32,), arguments=[np.zeros(32, np.uint32), Uninitialised(np.zeros(32, np.uint32))],
                      options=Options(step_limit=1000))


def test_local_memory_and_initialised_variables() -> None:
    before = ".global .align 4 .u32 table[4] = {5, 6, 7, 8};\n.const .align 4 .f32 half = 0f3F000000;\n"
    body = """
 .local .align 4 .b8 stack[16];
 mov.u64 %d3, stack;
 cvta.local.u64 %d3, %d3;
 st.u32 [%d3+4], %r1;
 ld.local.u32 %r2, [stack+4];
 ld.global.u32 %r3, [table+8];
 ld.const.f32 %f1, [half];
 mov.b32 %r4, %f1;
 add.u32 %r2, %r2, %r3;
 add.u32 %r2, %r2, %r4;
 st.global.u32 [%d2], %r2;"""
    out = np.zeros(32, np.uint32)
    emulate.load(text(body, before=before)).launch(block=(32,), arguments=[out])
    assert out.tolist() == [lane + 7 + 0x3F000000 for lane in range(32)]


def test_bank_conflicts_are_counted() -> None:
    counters = {}
    for stride in (4, 8, 128):
        out = np.zeros(256, np.uint32)
        result = emulate.load(text(f" mov.u32 %r9, memory;\n mad.lo.u32 %r9, %r1, {stride}, %r9;\n st.shared.u32 "
                                   f"[%r9], 1;",
                                   4096)).launch(block=(32,), arguments=[out])
        counters[stride] = result.counters.shared_cycles
    assert counters == {4: 1, 8: 2, 128: 32}


def test_sectors_are_counted() -> None:
    out = np.zeros(256, np.uint32)
    result = emulate.load(text(" st.global.u32 [%d2], 1;")).launch(block=(32,), arguments=[out])
    assert (result.counters.global_sectors, result.counters.global_ideal) == (4, 4)
    body = " mad.wide.u32 %d2, %r1, 32, %d1;\n st.global.u32 [%d2], 1;"
    result = emulate.load(text(body)).launch(block=(32,), arguments=[out])
    assert (result.counters.global_sectors, result.counters.global_ideal) == (32, 4)


def test_lanes_of_several_warps_are_counted_by_warp() -> None:
    # One lane of each warp stores to a word of its own, in one bank: no two of them are of one warp.
    body = """
 mov.u32 %r9, memory;
 shr.u32 %r8, %r1, 5;
 mad.lo.u32 %r9, %r8, 128, %r9;
 and.b32 %r8, %r1, 31;
 setp.eq.u32 %p1, %r8, 3;
 @%p1 st.shared.u32 [%r9], 1;
 @%p1 st.global.u32 [%d2], 1;"""
    out = np.zeros(256, np.uint32)
    counters = emulate.load(text(body, 4096)).launch(block=(128,), arguments=[out]).counters
    assert (counters.shared_accesses, counters.shared_cycles, counters.shared_ideal) == (4, 4, 4)
    assert (counters.global_accesses, counters.global_sectors, counters.global_ideal) == (4, 4, 4)


def test_lines_are_counted_where_it_is_asked_for() -> None:
    body = """
 mov.u32 %r9, memory;
 mad.lo.u32 %r9, %r1, 8, %r9;
 st.shared.u32 [%r9+1024], 1;
 bar.sync 0;
 ld.shared.u32 %r8, [%r9+1024];
 st.global.u32 [%d2], %r8;"""
    out = np.zeros(256, np.uint32)
    source = text(body, 4096)
    counters = emulate.load(source).launch(block=(128,), arguments=[out], options=Options(lines=True)).counters
    lines = {source.splitlines()[number - 1].strip(): counted for number, counted in counters.lines.items()}
    store, load = lines["st.shared.u32 [%r9+1024], 1;"], lines["ld.shared.u32 %r8, [%r9+1024];"]
    assert store.runs == load.runs == 4 and (store.shared_cycles, store.shared_ideal) == (8, 4)
    assert [store.touches(*part) for part in ((1024, 4), (1028, 4), (1024, 512), (0, 1024), (2048, 64))] == [
        (False, True), (False, False), (False, True), (False, False), (False, False)]
    assert load.touches(1024, 512) == (True, False)
    assert lines["st.global.u32 [%d2], %r8;"].global_sectors == 16
    for name in ("shared_cycles", "shared_ideal", "global_sectors", "global_ideal"):
        assert getattr(counters, name) == sum(getattr(line, name) for line in counters.lines.values())
    assert sum(counters.instructions.values()) == sum(line.runs for line in counters.lines.values())
    assert not emulate.load(source).launch(block=(64,), arguments=[out]).counters.lines


# --- Races ----------------------------------------------------------------------------------------------------------

EXCHANGE = """
 mov.u32 %r9, memory;
 mad.lo.u32 %r8, %r1, 4, %r9;
 st.shared.u32 [%r8], %r1;
 BARRIER
 xor.b32 %r2, %r1, MASK;
 mad.lo.u32 %r8, %r2, 4, %r9;
 ld.shared.u32 %r3, [%r8];
 st.global.u32 [%d2], %r3;"""


@pytest.mark.parametrize(("mask", "barrier", "hint"), [
    (1, "", "expected bar.warp.sync"), (32, "", "expected a barrier"), (32, "bar.warp.sync -1;", "expected a barrier"),
])
def test_an_exchange_without_its_barrier_is_a_race(mask: int, barrier: str, hint: str) -> None:
    body = EXCHANGE.replace("BARRIER", barrier).replace("MASK", str(mask))
    with pytest.raises(RaceError, match=r"race on shared memory\+\d+ .*read by warp \d .*written before by warp "
                                        r".*" + hint):
        run(body, threads=64, shared_bytes=256)
    run(body, threads=64, shared_bytes=256, races=False)


@pytest.mark.parametrize(("mask", "barrier"), [(1, "bar.warp.sync -1;"), (32, "bar.sync 0;"), (32, "barrier.sync 3;")])
def test_an_exchange_with_its_barrier_is_none(mask: int, barrier: str) -> None:
    body = EXCHANGE.replace("BARRIER", barrier).replace("MASK", str(mask))
    assert run(body, threads=64, shared_bytes=256)[:64] == [lane ^ mask for lane in range(64)]


def test_two_values_at_one_place_with_one_instruction() -> None:
    with pytest.raises(MemoryFault, match="another lane stores a different value there"):
        run(" st.global.u32 [%d1], %r1;")


def test_blocks_that_write_one_place_are_a_race() -> None:
    with pytest.raises(RaceError, match="race on argument 0"):
        run(" st.global.u32 [%d2], 1;", grid=2)


def test_blocks_of_different_batches_that_write_one_place_are_a_race() -> None:
    with pytest.raises(RaceError, match="race on argument 0"):
        run(" st.global.u32 [%d2], 1;", threads=1024, words=1024, grid=3)


READ = """
 xor.b32 %r2, %r1, 32;
 mad.wide.u32 %d3, %r2, 4, %d1;
 ld.global.u32 %r3, [%d3];
"""
READ_AGAIN = READ + """
 bar.sync 0;
 mov.u64 %d4, other;
 mad.wide.u32 %d5, %r1, 4, %d4;
 and.b32 %r4, %r1, 1;
 setp.eq.u32 %p1, %r4, 0;
 selp.b64 %d6, %d3, %d5, %p1;
 ld.global.u32 %r5, [%d6];
"""


@pytest.mark.parametrize("limit", [races.LATE_LIMIT, 0], ids=["looked at late", "looked at once"])
@pytest.mark.parametrize("reads", [READ, READ_AGAIN], ids=["one allocation", "then of several"])
def test_what_another_warp_reads_is_written_behind_a_barrier(reads: str, limit: int,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(races, "LATE_LIMIT", limit)

    def run_with(barrier: str) -> None:
        code = text(f"{reads} {barrier} st.global.u32 [%d2], %r3;", before=".global .align 4 .b8 other[256];\n")
        emulate.load(code).launch("test", block=(64,), arguments=[np.zeros(64, np.uint32)])

    run_with("bar.sync 0;")
    with pytest.raises(RaceError, match=r"race on argument 0\+\d+ .*written, and read before by another warp"):
        run_with("")


def test_atomics_do_not_race_and_add_up() -> None:
    assert run(" atom.global.add.u32 %r2, [%d1], 1;", threads=64, grid=3)[0] == 192


# --- Scopes ---------------------------------------------------------------------------------------------------------

HAND_OVER = """
 mov.u32 %r9, memory;
 mov.u32 %r2, %cluster_ctarank;
 setp.eq.u32 %p1, %r1, 0;
 @%p1 mbarrier.init.shared::cta.b64 [%r9], 1;
 START
 mapa.shared::cluster.u32 %r5, %r9, 1;
 setp.ne.u32 %p2, %r2, 0;
 @%p2 bra receiver;
 @!%p1 bra done;
 st.shared::cluster.u32 [%r5+16], 7;
 SEND
 bra done;
receiver:
 RECEIVE
 @!%p3 bra receiver;
 AFTER
 ld.shared.u32 %r6, [%r9+16];
 st.global.u32 [%d2], %r6;
done:
 barrier.cluster.arrive;
 barrier.cluster.wait;"""
START = ("fence.mbarrier_init.release.cluster;\n barrier.cluster.arrive.relaxed.aligned;\n"
         " barrier.cluster.wait.acquire.aligned;")
SEND = "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r5];"
RECEIVE = "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [%r9], 0;"
FENCED_SEND = "fence.acq_rel.cluster;\n mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%r5];"
FENCED_RECEIVE = RECEIVE.replace("acquire", "relaxed"), "fence.acq_rel.cluster;"


def hand_over(start: str = START, send: str = SEND, receive: str = RECEIVE, after: str = "") -> None:
    body = HAND_OVER
    for name, given in (("START", start), ("SEND", send), ("RECEIVE", receive), ("AFTER", after)):
        body = body.replace(f" {name}\n", f" {given}\n")
    for lazy in (False, True):
        assert run(body, shared_bytes=32, grid=2, cluster=2, lazy=lazy)[:32] == [7] * 32


@pytest.mark.parametrize("right", [
    {}, {"send": FENCED_SEND}, {"receive": FENCED_RECEIVE[0], "after": FENCED_RECEIVE[1]},
    {"send": FENCED_SEND.replace("acq_rel", "release"), "receive": FENCED_RECEIVE[0],
     "after": "fence.acquire.cluster;"},
    {"start": "barrier.cluster.arrive.aligned;\n barrier.cluster.wait.aligned;"},
    {"start": "fence.acq_rel.cluster;\n barrier.cluster.arrive.relaxed;\n barrier.cluster.wait;"},
])
def test_a_word_is_handed_to_another_block_by_an_mbarrier(right: dict[str, str]) -> None:
    hand_over(**right)


@pytest.mark.parametrize("wrong", [
    {"send": "mbarrier.arrive.shared::cluster.b64 _, [%r5];"},      # its scope is the block, if none is named
    {"receive": "mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r9], 0;"},
    {"receive": RECEIVE.replace("acquire.cluster", "acquire.cta")},
    {"send": SEND.replace("release", "relaxed")}, {"receive": FENCED_RECEIVE[0]},
    {"send": FENCED_SEND.replace("acq_rel.cluster", "acq_rel.cta")},
    {"send": FENCED_SEND.replace("acq_rel", "acquire")},
    *({"receive": FENCED_RECEIVE[0], "after": fence} for fence in ("fence.acq_rel.cta;", "fence.release.cluster;")),
    {"send": "fence.mbarrier_init.release.cluster;\n mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%r5];"},
])
def test_a_word_that_is_handed_over_too_weakly_is_a_race(wrong: dict[str, str]) -> None:
    with pytest.raises(RaceError, match=r"race on shared memory\+16 .*read by warp 0 of block 1.*written before by "
                                        r"warp 0 of block 0"):
        hand_over(**wrong)


@pytest.mark.parametrize("start", [
    START.replace("fence.mbarrier_init.release.cluster;\n ", ""), "bar.sync 0;",
    START.replace("fence.mbarrier_init.release.cluster", "fence.acq_rel.cta")])
def test_an_mbarrier_that_another_block_does_not_know_to_be_there_is_a_race(start: str) -> None:
    with pytest.raises((RaceError, EmulationError), match=r"race on shared memory\+0 |no mbarrier was initialised"):
        hand_over(start=start)


OVERWRITE = """
 mov.u32 %r9, memory;
 mov.u32 %r2, %cluster_ctarank;
 setp.eq.u32 %p1, %r1, 0;
 @%p1 mbarrier.init.shared::cta.b64 [%r9], 32;
 st.shared.u32 [%r9+16], 5;
 barrier.cluster.arrive;
 barrier.cluster.wait;
 setp.eq.u32 %p2, %r2, 0;
 @%p2 bra writer;
 READ
 mapa.shared::cluster.u32 %r5, %r9, 0;
 mbarrier.arrive.shared::cluster.b64 _, [%r5];
 st.global.u32 [%d2], %r6;
 bra done;
writer:
 mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r9], 0;
 @!%p3 bra writer;
 mapa.shared::cluster.u32 %r5, %r9, 1;
 @%p1 st.shared::cluster.u32 [%r5+16], 7;
done:
 barrier.cluster.arrive;
 barrier.cluster.wait;"""


def test_what_was_read_before_an_arrival_may_be_overwritten_whatever_its_scope() -> None:
    """But not what was written before it."""
    read = "ld.shared.u32 %r6, [%r9+16];"
    assert run(OVERWRITE.replace("READ", read), shared_bytes=32, grid=2, cluster=2)[:32] == [5] * 32
    written = "@%p1 st.shared.u32 [%r9+16], 6;\n bar.warp.sync -1;\n "
    with pytest.raises(RaceError, match=r"race on shared memory\+16 .*written by warp 0 of block 0.*written before by "
                                        r"warp 0 of block 1"):
        run(OVERWRITE.replace("READ", written + read), shared_bytes=32, grid=2, cluster=2)


@pytest.mark.parametrize(("operation", "grid", "cluster", "scopes"), [
    ("atom.SCOPE.global.add.u32 %r2, [%d1], 1;", 2, 1, "gpu sys"),
    ("red.relaxed.SCOPE.global.add.u32 [%d1], 1;", 2, 2, "cluster gpu"),
    ("red.relaxed.SCOPE.global.add.u32 [%d1], 1;", 3, 1, "gpu"),
    ("atom.SCOPE.shared::cluster.add.u32 %r2, [%r5], 1;", 2, 2, "cluster gpu"),
])
def test_atomic_operations_are_so_for_whom_they_reach(operation: str, grid: int, cluster: int, scopes: str) -> None:
    body = f"""
 mov.u32 %r9, memory;
 mapa.shared::cluster.u32 %r5, %r9, 0;
 st.shared.u32 [%r9], 0;
 barrier.cluster.arrive;
 barrier.cluster.wait;
 {operation}
 barrier.cluster.arrive;
 barrier.cluster.wait;"""
    for scope in ("cta", "cluster", "gpu", "sys"):
        if scope == "cluster" and scope not in scopes:
            continue
        code = body.replace("SCOPE", scope)
        if scope == "cta":
            with pytest.raises(RaceError, match=r"race on"):
                run(code, threads=64 if grid < 3 else 1024, shared_bytes=8, grid=grid, cluster=cluster)
        else:
            run(code, threads=64 if grid < 3 else 1024, shared_bytes=8, grid=grid, cluster=cluster)


def test_global_memory_written_here_is_copied_behind_a_fence_of_proxies() -> None:
    body = """
 mov.u32 %r9, memory;
 setp.eq.u32 %p1, %r1, 0;
 @%p1 mbarrier.init.shared::cta.b64 [%r9], 1;
 mul.lo.u32 %r4, %r1, 3;
 st.global.u32 [%d2], %r4;
 FENCE
 bar.sync 0;
 @!%p1 bra wait;
 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], 128;
 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r9+16], [%d1], 128, [%r9];
wait:
 mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r9], 0;
 @!%p3 bra wait;
 mad.lo.u32 %r8, %r1, 4, %r9;
 ld.shared.u32 %r6, [%r8+16];
 st.global.u32 [%d2+128], %r6;"""
    for fence in ("fence.proxy.async;", "fence.proxy.async.global;"):
        assert run(body.replace("FENCE", fence), shared_bytes=256)[32:64] == [3 * n for n in range(32)]
    for fence in ("", "fence.proxy.async.shared::cta;", "fence.acq_rel.gpu;"):
        with pytest.raises(RaceError, match=r"an asynchronous copy reads argument 0\+0 .*, written at line \d+ by "
                                            r"ordinary stores; expected fence.proxy.async"):
            run(body.replace("FENCE", fence), shared_bytes=256)
    with pytest.raises(RaceError, match=r"fence\.proxy\.async"):       # before the stores it says nothing of them
        run(body.replace("FENCE", "").replace(" st.global", " fence.proxy.async;\n st.global", 1), shared_bytes=256)


# --- Calls ----------------------------------------------------------------------------------------------------------

TWICE = """.func (.param .b32 result) twice(.param .b32 given)
{
 .reg .b32 %r<4>; .reg .pred %p<2>;
 ld.param.u32 %r1, [given];
 setp.gt.u32 %p1, %r1, 20;
 @%p1 bra large;
 add.u32 %r2, %r1, %r1;
 st.param.u32 [result], %r2;
 ret;
large:
 st.param.u32 [result], 0;
 ret;
}
"""
CALL = """{
 .param .b32 passed;
 .param .b32 returned;
 st.param.u32 [passed], %r1;
 call.uni (returned), twice, (passed);
 ld.param.u32 %r2, [returned];
}
"""


def test_a_function_is_called_twice() -> None:
    out = np.zeros(32, np.uint32)
    body = CALL + " mov.u32 %r1, %r2;\n" + CALL + " st.global.u32 [%d2], %r2;"
    emulate.load(text(body, before=TWICE)).launch("test", block=(32,), arguments=[out])
    assert out.tolist() == [4 * n if n <= 10 else 0 for n in range(32)]


@pytest.mark.parametrize(("change", "message"), [
    (("add.u32 %r2, %r1, %r1;", "call.uni (result), twice, (given);"), "no recursion"),
    (("twice, (passed)", "other, (passed)"), "expected the name of a function .*other has no body in it"),
    (("twice, (passed)", "twice, (passed, passed)"), "has 2 parameters, found 3"),
])
def test_calls_that_can_not_be_run(change: tuple[str, str], message: str) -> None:
    out = np.zeros(32, np.uint32)
    whole = text(CALL, before=TWICE).replace(*change)
    with pytest.raises(EmulationError, match=message):
        emulate.load(whole).launch("test", block=(32,), arguments=[out])


def test_sums_of_many_words_carry() -> None:
    a, b = 0xFFFFFFFF_FFFFFFFF_00000001, 0x00000001_80000000_FFFFFFFF
    words = [(n >> 32 * i) & 0xFFFFFFFF for n in (a, b) for i in range(3)]
    body = "".join(f" mov.b32 %r{10 + i}, {word};\n" for i, word in enumerate(words))
    for op, start in (("add", 20), ("sub", 30)):
        body += f" {op}.cc.u32 %r{start}, %r10, %r13;\n {op}c.cc.u32 %r{start + 1}, %r11, %r14;\n"
        body += f" {op}c.u32 %r{start + 2}, %r12, %r15;\n"
    body += " mad.lo.cc.u32 %r40, %r11, %r11, %r11;\n madc.hi.u32 %r41, %r11, %r11, 0;\n"
    body += "".join(f" st.global.u32 [%d1+{4 * i}], %r{r};\n" for i, r in enumerate((20, 21, 22, 30, 31, 32, 40, 41)))
    found = run(body, threads=1)
    assert sum(word << 32 * i for i, word in enumerate(found[:3])) == (a + b) % (1 << 96)
    assert sum(word << 32 * i for i, word in enumerate(found[3:6])) == (a - b) % (1 << 96)
    assert found[6] | found[7] << 32 == 0xFFFFFFFF * 0xFFFFFFFF + 0xFFFFFFFF


def test_the_state_of_an_mbarrier_tells_what_was_pending() -> None:
    assert run("""
 mov.u32 %r9, memory;
 setp.eq.u32 %p1, %r1, 0;
 @%p1 mbarrier.init.shared.b64 [%r9], 5;
 bar.sync 0;
 @!%p1 bra done;
 mbarrier.arrive.noComplete.shared.b64 %d3, [%r9], 2;
 mbarrier.arrive.shared.b64 %d3, [%r9];
 mbarrier.pending_count.b64 %r2, %d3;
 st.global.u32 [%d2], %r2;
done:
 ret;""", shared_bytes=8)[0] == 3


# --- Text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "message"), [
    (" frobnicate.u32 %r1, %r2;", "the table has no frobnicate.u32"), (" add.u32 %r1, %r2;", "too few operands"),
    (" add.u32 %r1, %r2, %r3, %r4;", "too many operands"), (" ld.global.u32 %r1, [nowhere];",
                                                            "unknown variable 'nowhere'"),
    (" cvt.rmi.f32 %f1, %f2;", "the table has no cvt.rmi.f32"),
    (" add.u32 %r1, %r2, _;", "reads an operand; found _"), (" mov.b64 {%r1, %r2}, %r3;", "found %r3 of 32 bits"),
    (" .shared .align 48 .b8 odd[16];", "power of two"), (" .local .pred odd;", "expected bytes"),
])
def test_what_is_no_ptx_is_told_with_its_line(body: str, message: str) -> None:
    with pytest.raises(ParseError, match=r"line \d+: .*" + message):
        run(body)


@pytest.mark.parametrize(("body", "message"), [
    (" bra nowhere;", "unknown label"), (" mov.u32 %r1, %nothing;", "unknown special register %nothing"),
    (" mov.u32 %r1, %r99;", "unknown special register %r99, and no .reg of this name"),
])
def test_what_is_unknown_is_told_at_the_launch(body: str, message: str) -> None:
    with pytest.raises(EmulationError, match=r"line \d+: .*" + message):
        run(body)


def test_scopes_have_their_own_registers_and_labels() -> None:
    inner = ("{{ .reg .b32 %r1; .reg .pred done; mov.b32 %r1, {0}; setp.eq.u32 done, %r1, {0};\n"
             "@done bra end; trap; end: }}\n")
    assert run(inner.format(7) + inner.format(8) + " st.global.u32 [%d2], %r1;")[:3] == [0, 1, 2]


@pytest.mark.parametrize(("launch", "message"), [
    ({"kernel": "none", "arguments": []}, "no kernel 'none'; found test"),
    ({"arguments": []}, "has 1 parameters, found 0 arguments"),
    ({"arguments": [np.zeros(4, np.uint32)], "block": (0,)}, "expected sizes above 0"),
    ({"arguments": [np.zeros(4, np.uint32)], "block": (1025,)}, "at most 1024 threads"),
    ({"arguments": [np.zeros(4, np.uint32)], "shared_bytes": -1}, "found -1 bytes of shared memory"),
    ({"arguments": [np.zeros((4, 4), np.uint32)[:, ::2]]}, "not contiguous"),
    ({"arguments": [np.zeros(4, np.uint32)], "grid": (3,), "cluster": (2,)}, "no multiple of the cluster"),
])
def test_launches_that_do_not_fit(launch: dict[str, Any], message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        emulate.load(text(" ret;")).launch(**launch)


# --- Branches by number ---------------------------------------------------------------------------------------------


BRANCHES = """
 and.b32 %r2, %r1, 3;
 GUARD
places: .branchtargets
   first,
   second, third;
 @%p1 brx.idx %r2, places;
 mov.b32 %r3, 40;
 bra end;
first:
 mov.b32 %r3, 10;
 bra end;
second:
 mov.b32 %r3, 20;
 bra end;
third:
 mov.b32 %r3, 30;
end:
 vote.sync.ballot.b32 %r4, 1, -1;
 and.b32 %r4, %r4, 1;
 add.u32 %r3, %r3, %r4;
 st.global.u32 [%d2], %r3;
 ret;"""


def test_threads_part_at_a_branch_by_number() -> None:
    found = run(BRANCHES.replace("GUARD", "setp.lt.u32 %p1, %r2, 3;"), words=32)
    assert found == [11, 21, 31, 41] * 8


def test_a_number_that_has_no_label_is_told() -> None:
    with pytest.raises(EmulationError, match=r"brx\.idx %r2, places; is reached by .* lane 3"):
        run(BRANCHES.replace("GUARD", "setp.ne.u32 %p1, %r2, 9;"))
    with pytest.raises(ParseError, match=r"no \.branchtargets before"):
        run(BRANCHES.replace("places:", "others:").replace("GUARD", "setp.lt.u32 %p1, %r2, 3;"))


def test_the_highest_of_three() -> None:
    found = run("""
 cvt.rn.f32.u32 %f1, %r1;
 mov.b32 %f2, 0f41200000;
 max.f32 %f3, %f1, %f2, 0f41A00000;
 min.f32 %f4, %f1, %f2, %f3;
 add.f32 %f4, %f3, %f4;
 cvt.rzi.u32.f32 %r2, %f4;
 st.global.u32 [%d2], %r2;
 ret;""", words=32)
    assert found == [max(number, 20) + min(number, 10) for number in range(32)]
