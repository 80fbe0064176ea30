"""Workers of a cluster, of whom each copies a part of what all read: at the lane station, rehearsed, emulated."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper import emulate, targets
from sapper.codegen.pipeline import Compiled, compile_kernel, facts_of, finish_lane, to_lane
from sapper.ir.checker import VerificationError
from sapper.ir.nodes import Function, Op
from sapper.ir.text import parse_function, print_function
from sapper.ir.types import S64
from sapper.ir.verifier import verify
from sapper.kernels import find
from sapper.lane.memory import LaneError
from sapper.lane.ops import LANE_OPS
from sapper.lane.rehearse import rehearse
from sapper.targets.ptx import assembler
from sapper.tile.ops import TILE_OPS
from sapper.tile.schedule import DimClass, Schedule, ScheduleError, Specialization
from tests.strategies.amount import examples

from . import test_narrow as narrow
from .kernels import KERNELS, bf16_nn, bf16_nt, f16_tn, gated
from .left_out import replaced
from .narrow import block_scaled
from .test_depth_shares import PRODUCTS, Share
from .test_depth_shares import interpret_lane as interpret_shares
from .test_groups import batched, interpret_lane
from .test_matrix import arguments_of, assert_near, expected

TARGET = targets.target("sm_90a")
TILE = {"m": 64, "n": 128}
ROWS, COLUMNS = Schedule(tile=TILE, cluster={"m": 2}), Schedule(tile=TILE, cluster={"n": 2})
GROUPED = find("grouped_matmul_bf16_bf16").kernel
MASKED = find("masked_matmul_nt_bf16_bf16").kernel
MULTICAST = re.compile(r"cp\.async\.bulk\.tensor\.\dd\..*multicast::cluster")


def known_of(kernel: Any) -> Specialization:
    names = [name for name, _ in kernel.parameters]
    return Specialization({d: DimClass(4096, 16) for _, type in kernel.parameters for d in type.dims},
                          dict.fromkeys(names, "contiguous"), frozenset(names[:-1]))


def lowered(kernel: Any, schedule: Schedule) -> Function:
    return finish_lane(to_lane(kernel.tile_ir(), schedule, facts_of(TARGET), known_of(kernel)), TARGET)


COMPILED: dict[tuple[Any, ...], Compiled] = {}


def compiled(kernel: Any, schedule: Schedule) -> Compiled:
    """Made once for all tests: nobody changes it."""
    key = kernel, repr(schedule)
    if key not in COMPILED:
        known = known_of(kernel)
        COMPILED[key] = compile_kernel(kernel, {}, known.strides,
                                       {d: (c.hint, c.divisor) for d, c in known.dims.items()}, TARGET, schedule,
                                       known.aligned)
    return COMPILED[key]


@pytest.mark.parametrize("schedule", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_lane_ir(schedule: Schedule) -> None:
    lane = lowered(bf16_nt, schedule)
    verify(lane, LANE_OPS)
    text = print_function(lane)
    lane = parse_function(text, {"tile": TILE_OPS, "lane": LANE_OPS})
    assert print_function(lane) == text and lane.attributes["cluster"] == 2 and rehearse(lane) == []
    extents = {"M": 80, "N": 144, "K": 336}
    arguments = arguments_of(bf16_nt, extents)
    wanted = expected(bf16_nt, arguments)
    interpret_lane(lane, arguments, extents, workers=2)
    assert_near(arguments["c"], wanted)
    with pytest.raises(LaneError, match="found 3 workers; expected a multiple of the 2 of a cluster"):
        interpret_lane(lane, arguments, extents, workers=3)


def test_ops_of_a_cluster_act_on_all_of_it() -> None:
    lane = lowered(bf16_nt, ROWS)
    next(op for op in lane.walk() if op.name == "signal_arrive").attributes["workers"] = 4
    with pytest.raises(VerificationError, match="found workers = 4; expected the function's attribute cluster"):
        verify(lane, LANE_OPS)


def counted(kernel: Any, schedule: Schedule, extents: dict[str, int], workers: int, lazy: bool) -> emulate.Counters:
    """What a run counts, whose result is right."""
    arguments = arguments_of(kernel, extents)
    wanted = expected(kernel, arguments)
    names = list(arguments)
    result = emulate.run(kernel, *arguments.values(), target="sm_90a", workers=workers, aligned=names,
                         schedule=schedule, options=emulate.Options(lazy=lazy))
    assert_near(arguments[names[-1]], wanted)
    return result.counters


def counted_with_scales(schedule: Schedule, extents: dict[str, int], workers: int, lazy: bool) -> emulate.Counters:
    """The same of a product in fp8."""
    arguments = narrow.arguments_of(block_scaled, extents)
    wanted = narrow.expected(block_scaled, arguments)
    result = emulate.run(block_scaled, *arguments.values(), target="sm_90a", workers=workers, aligned="abc",
                         schedule=schedule, options=emulate.Options(lazy=lazy))
    narrow.assert_near(arguments["c"], wanted)
    return result.counters


@pytest.mark.sampled(3)
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize(("kernel", "schedule", "extents"), [
    (bf16_nn, ROWS, {"M": 144, "N": 160, "K": 336}), (bf16_nt, COLUMNS, {"M": 80, "N": 304, "K": 144}),
    (f16_tn, ROWS, {"M": 48, "N": 96, "K": 80}), (batched, ROWS, {"B": 3, "M": 144, "N": 96, "K": 80}),
    (bf16_nt, Schedule(tile=TILE, cluster={"m": 4}), {"M": 336, "N": 96, "K": 144}),
    (gated, Schedule(tile={"m": 64, "n": 64}, cluster={"m": 2}), {"M": 144, "N": 96, "K": 144})],
    ids=["nn", "nt, columns", "tn, one tile", "batched", "four workers", "gated"])
def test_on_the_emulator(kernel: Any, schedule: Schedule, extents: dict[str, int], lazy: bool) -> None:
    """Edges in all directions; tiles that are no multiple of a cluster."""
    counters = counted(kernel, schedule, extents, 3, lazy)
    assert any(MULTICAST.match(name) for name in counters.instructions)


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("schedule", [
    Schedule(tile={"m": 128, "n": 128}, cluster={"m": 2}), Schedule(tile={"m": 64, "n": 128}, cluster={"n": 2}),
    Schedule(tile={"m": 64, "n": 64}, cluster={"n": 4})], ids=["rows", "columns", "four workers"])
def test_scales_of_blocks(schedule: Schedule, lazy: bool) -> None:
    """Of three blocks of columns: a tile past the end has no scale of its own, and its sums are stored nowhere."""
    counters = counted_with_scales(schedule, narrow.extents_of(80, 304, 272), 4, lazy)
    assert any(MULTICAST.match(name) for name in counters.instructions)


def test_each_worker_copies_half_of_what_both_read() -> None:
    """Boxes: the left operand's rows are a worker's own, of the right one's there are half."""
    maps = {name: [(name, box) for name, _, _, box in compiled(bf16_nt, schedule).tensor_maps][:2]
            for name, schedule in (("rows", ROWS), ("columns", COLUMNS))}
    assert maps == {"rows": [("a", (64, 64)), ("b", (64, 64))], "columns": [("a", (32, 64)), ("b", (128, 64))]}


def test_what_a_launch_must_know() -> None:
    made = compiled(bf16_nt, ROWS)
    assert made.cluster == 2 and not made.barriers
    assert ".reqnctapercluster 2, 1, 1\n" in made.text()
    assert made.tasks == (((1, ("M",), 128), (2, (), 1), (1, ("N",), 128)),)


SHARED = Schedule(tile={"m": 64, "n": 64}, stream="k", cluster={"m": 2})
SPLIT = Schedule(tile={"m": 64, "n": 64}, split={"k": 3}, cluster={"n": 2})
RELEASE = "st.release.gpu.global.u32"


@pytest.mark.parametrize("schedule", [SHARED, SPLIT], ids=["stream", "split"])
def test_shares_of_clusters_in_lane_ir(schedule: Schedule) -> None:
    lane = lowered(bf16_nt, schedule)
    assert lane.attributes["cluster"] == 2 and rehearse(lane) == []
    extents = {"M": 80, "N": 64, "K": 336}
    arguments = arguments_of(bf16_nt, extents)
    wanted = expected(bf16_nt, arguments)
    interpret_shares(lane, arguments, extents, workers=6)
    assert_near(arguments["c"], wanted)


@settings(deadline=None, max_examples=examples(8))
@given(st.integers(1, 130), st.integers(1, 130), st.integers(1, 300), st.integers(1, 4), st.integers(0, 3),
       st.sampled_from("mn"), st.booleans())
def test_any_share_of_clusters_gives_the_sums(m: int, n: int, k: int, clusters: int, parts: int, axis: str,
                                              lazy: bool) -> None:
    """Whatever the extents and the workers: a cluster has the pieces that a worker alone would have of tiles as wide; a
    tile past the end is handed over, too, and stored nowhere."""
    share = {"split": {"k": parts}} if parts else {"stream": "k"}
    schedule = Schedule(tile={"m": 64, "n": 64}, cluster={axis: 2}, **share)
    extents = {"M": m, "N": n, "K": -(-k // 8) * 8}
    arguments = arguments_of(bf16_nt, extents)
    wanted = expected(bf16_nt, arguments)
    made = compile_kernel(bf16_nt, {}, dict.fromkeys("abc", "contiguous"),
                          {"M": (4096, 1), "N": (4096, 1), "K": (4096, 8)}, TARGET, schedule, frozenset("ab"))
    result = emulate.run(bf16_nt, *arguments.values(), target="sm_90a", workers=2 * clusters, aligned=["a", "b"],
                         code=made, options=emulate.Options(lazy=lazy))
    assert_near(arguments["c"], wanted)
    tiles = {"m": -(-m // 64), "n": -(-n // 64)}
    tiles[axis] = -(-tiles[axis] // 2)
    cut = Share(tiles["m"] * tiles["n"], -(-k // 64), clusters, parts).cut
    products = sum(count for name, count in result.counters.instructions.items() if PRODUCTS.match(name))
    assert products == 2 * 16 * sum(cut.values())
    whose = [tile for _, tile in cut]
    assert result.counters.instructions.get(RELEASE, 0) == 2 * 4 * sum(whose.count(t) - 1 for t in set(whose))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize(("kernel", "schedule", "extents"), [
    (bf16_nn, Schedule(tile=TILE, stream="k", cluster={"m": 2}), {"M": 208, "N": 160, "K": 336}),
    (gated, SPLIT, {"M": 80, "N": 144, "K": 400}),
    (batched, SHARED, {"B": 3, "M": 144, "N": 96, "K": 208})], ids=["nn", "gated", "batched"])
def test_shares_of_clusters_on_the_emulator(kernel: Any, schedule: Schedule, extents: dict[str, int],
                                            lazy: bool) -> None:
    counters = counted(kernel, schedule, extents, 26, lazy)
    assert any(MULTICAST.match(name) for name in counters.instructions) and counters.instructions[RELEASE]


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_shares_of_clusters_with_scales_of_blocks(lazy: bool) -> None:
    schedule = Schedule(tile={"m": 64, "n": 128}, stream="k", cluster={"n": 2})
    counters = counted_with_scales(schedule, narrow.extents_of(80, 304, 528), 10, lazy)
    assert counters.instructions[RELEASE]


@pytest.mark.parametrize("schedule", [SHARED, SPLIT], ids=["stream", "split"])
@pytest.mark.parametrize(("name", "told"), [
    ("hand_over", "take_over: found a wait for what nobody does"),
    ("take_over", "load_run: found (bytes that nobody wrote|what was not waited for)")])
def test_a_dropped_op_of_a_shared_tile_is_found(schedule: Schedule, name: str, told: str) -> None:
    lane = lowered(bf16_nt, schedule)
    for block in [b for op in lane.walk() for b in op.blocks]:
        block.ops[:] = [op for op in block.ops if op.name != name]
    assert any(re.search(told, str(fault)) for fault in rehearse(lane)), rehearse(lane)


def test_waiting_for_another_rank_is_found() -> None:
    """Of the next cluster it is the other worker whose sums are waited for."""
    lane = lowered(bf16_nt, SHARED)
    op = next(op for op in lane.walk() if op.name == "take_over")
    block = next(b for o in lane.walk() for b in o.blocks if op in b.ops)
    one = Op("s_const", [], [S64], {"value": 1}, None, None)
    turned = Op("s_xor", [op.operands[0], one.result], [S64], {}, None, None)
    at = block.ops.index(op)
    block.ops[at:at] = [one, turned]
    op.operands[0] = turned.result
    assert any("what was not waited for" in str(fault) for fault in rehearse(lane)), rehearse(lane)


FAULTS = {
    "half of the workers get the copy": (r"(?m)^(    mov\.b16 %h\d+), 3;", r"\1, 1;", 0),
    "copied for itself alone": (r"\.multicast::cluster( [^\n]*), %h\d+;", r"\1;", 0),
    "arrivals at its own signal alone": (r"(mapa\.shared::cluster\.u32 %r\d+, %r\d+), %r\d+;", r"\1, 0;", 0),
    "one worker's arrivals are enough": (r"(?m)^(    @%p\d+ mbarrier\.init\S+ \[[^]]*\]), 8;", r"\1, 4;", None),
    "workers do not meet before they copy": (r"barrier\.cluster\.arrive\.release\.aligned;\n\s*"
                                             r"barrier\.cluster\.wait\.acquire\.aligned;", "bar.sync 0;", 0),
    "a worker ends before the other": (r"barrier\.cluster\.arrive\.release\.aligned;\n\s*"
                                       r"barrier\.cluster\.wait\.acquire\.aligned;", "", 1),
    "too few bytes announced": (r"(expect_tx\.shared::cta\.b64 _, \[[^]]*\]), \d+;", r"\1, 16384;", 0),
    "workers meet, and tell nothing": (r"fence\.mbarrier_init\S+(\s*\S+:\s*barrier\.cluster\.arrive)\.release",
                                       r"\1.relaxed", 0),
    "a stage is never full": (r"(?m)^(    @%p\d+ mbarrier\.init\S+ \[[^]]*\]), 1;", r"\1, 2;", 0),
    "coordinates are exchanged":
        (r"(shared::cluster\.global\S+ \[[^]]*\], \[%rd\d+, \{)(%r\d+), (%r\d+)", r"\1\3, \2", 0),
    "free stages are not waited for":
        (r"(?m)^    mbarrier\.try_wait.*$", "    setp.eq.s32 %p1, 0, 0;", 1),
    "the rank is left in the descriptor": (r"bfe\.u32 (%r\d+), (%r\d+), 4, 14;", r"shr.u32 \1, \2, 4;", None),
}


OF_ROWS = "the rank is left in the descriptor"
"""No fault where all lies along the depth: the field that it falls into is not read then (PTX ISA, "Strides")."""


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("fault", "kernel"), [
    *((fault, bf16_nn) for fault in FAULTS), *((fault, block_scaled) for fault in FAULTS if fault != OF_ROWS)],
    ids=lambda value: getattr(value, "name", value))
def test_planted_faults_are_caught(fault: str, kernel: Any) -> None:
    made = compiled(kernel, ROWS)
    if kernel is bf16_nn:
        extents, near = {"M": 128, "N": 128, "K": 384}, assert_near
        arguments = arguments_of(kernel, extents)
        wanted = expected(kernel, arguments)
    else:
        extents, near = narrow.extents_of(128, 128, 768), narrow.assert_near
        arguments = narrow.arguments_of(kernel, extents)
        wanted = narrow.expected(kernel, arguments)
    words = [arguments[s.split(".")[0]] if s.endswith("data") else extents[s.split(".")[1]] for s in made.slots]

    def launch(text: str) -> None:
        maps = [emulate.TensorMap(arguments[name], box, 128) for name, _, _, box in made.tensor_maps]
        emulate.load(text).launch(
            grid=(2,), block=(256,), arguments=[np.zeros(64), 64, np.zeros(1024, np.uint8), *words, *maps],
            shared_bytes=made.near_bytes, options=emulate.Options(lazy=True))

    launch(made.text())
    near(arguments["c"], wanted)
    arguments["c"][...] = np.nan
    try:
        launch(replaced(made.text(), *FAULTS[fault]))
    except emulate.EmulationError:
        return
    with pytest.raises(AssertionError):
        near(arguments["c"], wanted)


REHEARSED = {
    "no meeting at the start": ("sync_cluster", 0, None, "a signal that may not have started"),
    "arrival at its own signal": ("signal_arrive", 0, {"workers": 1}, "a wait for what nobody does"),
    "copied for itself": ("tensor_copy", 1, {"workers": 1}, "found a wait for what nobody does"),
    "no meeting at the end": ("sync_cluster", 1, None, "another worker that may have ended before"),
    "free is not waited for": ("signal_wait", 1, None, "tensor_copy: found a write over"),
    "fewer bytes announced": ("signal_expect", 0, {"bytes": 16384}, "found a wait for what nobody does"),
}


@pytest.mark.parametrize("kernel", [bf16_nt, block_scaled], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("fault", REHEARSED)
def test_planted_faults_are_rehearsed(fault: str, kernel: Any) -> None:
    name, number, attributes, told = REHEARSED[fault]
    lane = lowered(kernel, ROWS)
    assert rehearse(lane) == []
    op = [op for op in lane.walk() if op.name == name][number]
    if attributes is None:
        block = next(b for b in (lane.body, *(b for o in lane.walk() for b in o.blocks)) if op in b.ops)
        block.ops.remove(op)
    else:
        op.attributes.update(attributes)
    assert any(told in str(found) for found in rehearse(lane)), rehearse(lane)


REFUSED: dict[str, tuple[Any, str, Schedule, str]] = {
    "another level": (bf16_nt, "sm_80", ROWS, "found a walk, or a target, without them"),
    "the depth": (bf16_nt, "sm_90a", Schedule(cluster={"k": 2}), "that is neither of its rows, m, nor of its columns"),
    "three": (bf16_nt, "sm_90a", Schedule(cluster={"m": 3}), "found a size that is none of 1, 2, 4"),
    "chunks": (bf16_nt, "sm_90a", Schedule(cluster={"m": 2}, chunks={"m": 2}), "found chunks besides"),
    "one panel": (bf16_nn, "sm_90a", Schedule(tile={"m": 64, "n": 64}, cluster={"m": 2}), "with fewer parts"),
    "groups": (GROUPED, "sm_90a", Schedule(cluster={"m": 2}), "found a loop over groups, whose tiles are no tasks"),
    "rows of memory": (MASKED, "sm_90a", Schedule(cluster={"m": 2}),
                       "found rows of which memory tells how many there are"),
    "two axes": (bf16_nt, "sm_90a", Schedule(cluster={"m": 2, "n": 2}), "found another axis besides"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_done_is_told(case: str) -> None:
    kernel, level, schedule, message = REFUSED[case]
    with pytest.raises(ScheduleError, match=f"cluster of .*{re.escape(message)}.*mend: leave cluster out"):
        to_lane(kernel.tile_ir(), schedule, facts_of(targets.target(level)), known_of(kernel))


def test_the_model_takes_clusters_of_tiles_that_are_tasks() -> None:
    """Of 4096 x 4096 two workers read the same columns; not where rows are counted in memory, or by a loop in order."""
    found = {kernel.name: lowered(kernel, Schedule()).attributes.get("cluster", 1)
             for kernel in (bf16_nt, block_scaled, batched, MASKED, GROUPED)}
    assert list(found.values()) == [2, 2, 2, 1, 1]


@pytest.mark.skipif(assembler.find_tool("ptxas") is None, reason="ptxas is not installed")
def test_nothing_spills_and_no_loop_waits_for_memory() -> None:
    """A barrier of memory in the loop over the depth, MEMBAR, would cost as long as some of its products."""
    texts = [compiled(kernel, Schedule(cluster={"m": 2})).text() for kernel in (*KERNELS, block_scaled)]
    found = assembler.assemble(texts, "sm_90a")
    assert [name for name, made in found.items() if made.spilled_bytes] == []
    if assembler.find_tool("nvdisasm") is None:
        return
    innermost = [next(loop for loop in made.loops() if loop["HGMMA"] or loop["QGMMA"]) for made in found.values()]
    assert len(innermost) == len(texts) and not any(loop["MEMBAR"] or loop["ERRBAR"] for loop in innermost)
