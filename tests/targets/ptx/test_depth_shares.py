"""Workers that share the depth of a product (split-K, stream-K): at the lane station, rehearsed, on the emulator."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper import emulate, targets
from sapper.codegen.pipeline import Compiled, compile_kernel, facts_of, finish_lane, to_lane
from sapper.ir.nodes import Function
from sapper.ir.text import parse_function, print_function
from sapper.ir.verifier import verify
from sapper.kernels import find
from sapper.lane.interpret import run
from sapper.lane.memory import Memory
from sapper.lane.ops import LANE_OPS
from sapper.lane.rehearse import rehearse
from sapper.targets.ptx import assembler
from sapper.targets.ptx.text import FLAGS_AT, SYNC_BYTES
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS
from sapper.tile.schedule import DimClass, Schedule, ScheduleError, Specialization
from tests.strategies.amount import examples

from .kernels import KERNELS, bf16_nn, bf16_nt, gated
from .left_out import replaced
from .narrow import block_scaled
from .test_groups import batched, part_of_depth
from .test_matrix import arguments_of, assert_near, expected, specialization
from .test_narrow import arguments_of as narrow_arguments
from .test_narrow import assert_near as assert_near_of_narrow
from .test_narrow import extents_of as narrow_extents

SMALL = {"m": 64, "n": 64}
RELEASE = "st.release.gpu.global.u32"
STREAM = Schedule(tile=SMALL, stream="k", cluster={"m": 1})
SPLIT = Schedule(tile=SMALL, split={"k": 3}, cluster={"m": 1})
LEVELS = ("sm_80", "sm_90a")


def lowered(kernel: Any, level: str, schedule: Schedule, known: Specialization | None = None) -> Function:
    target = targets.target(level)
    lane = to_lane(kernel.tile_ir(), schedule, facts_of(target), known or specialization(kernel))
    return finish_lane(lane, target)


COMPILED: dict[tuple[Any, ...], Compiled] = {}


def compiled(kernel: Any, level: str, schedule: Schedule) -> Compiled:
    """Made once for all tests: nobody changes it."""
    key = kernel, level, repr(schedule)
    if key not in COMPILED:
        known = specialization(kernel, 64)
        COMPILED[key] = compile_kernel(kernel, {}, known.strides, dict.fromkeys("MNK", (4096, 64)),
                                       targets.target(level), schedule, known.aligned)
    return COMPILED[key]


def hands_over(lane: Function) -> bool:
    return any(op.name == "take_over" for op in lane.walk())


# At the lane station.


def interpret_lane(lane: Function, arguments: dict[str, np.ndarray], extents: dict[str, int], workers: int) -> None:
    memory = Memory()
    ((size, ((rows, _, _), (lanes, _, _))), *_) = lane.attributes["scratch"]
    each = size * rows * lanes
    words = [memory.allocate("scratch", each * workers), each, memory.allocate("sync", 1024)]
    for slot in lane.attributes["slots"]:
        name, _, kind = slot.partition(".")
        words.append(memory.add_array(name, arguments[name]) if kind == "data" else extents[kind])
    run(lane, np.array(words), memory, workers=workers)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("schedule", [STREAM, SPLIT], ids=["stream", "split"])
@pytest.mark.parametrize("level", LEVELS)
def test_lane_ir(level: str, schedule: Schedule) -> None:
    lane = lowered(bf16_nt, level, schedule)
    verify(lane, LANE_OPS)
    text = print_function(lane)
    lane = parse_function(text, {"tile": TILE_OPS, "lane": LANE_OPS})
    assert print_function(lane) == text and rehearse(lane) == []
    extents = {"M": 80, "N": 64, "K": 336}
    arguments = arguments_of(bf16_nt, extents)
    wanted = expected(bf16_nt, arguments)
    interpret_lane(lane, arguments, extents, workers=5)
    assert_near(arguments["c"], wanted)


class Share:
    """What each worker does by the definition: positions w R / G of R tiles, whole pieces."""

    def __init__(self, tiles: int, pieces: int, workers: int, parts: int) -> None:
        self.cut: dict[tuple[int, int], int] = {}
        if parts:
            cut = max(1, min(workers // tiles, parts, pieces))
            shared, sharers = (tiles, tiles * cut) if cut > 1 else (0, 1)
        else:
            shared = 0 if tiles % workers == 0 else tiles % workers + min(tiles // workers, 1) * workers
            sharers = max(1, min(workers, shared * pieces))
        whole = tiles - shared
        for worker in range(workers):
            for tile in range(worker, whole, workers):
                self.cut[worker, tile] = pieces
            if worker < sharers:
                for piece in range(self.place(worker, shared, sharers, pieces),
                                   self.place(worker + 1, shared, sharers, pieces)):
                    key = worker, whole + piece // pieces
                    self.cut[key] = self.cut.get(key, 0) + 1

    @staticmethod
    def place(worker: int, shared: int, sharers: int, pieces: int) -> int:
        return worker * shared * pieces // sharers


PRODUCTS = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n64k16\.f32\.bf16\.bf16$")


@settings(deadline=None, max_examples=examples(8))
@given(st.integers(1, 130), st.integers(1, 130), st.integers(1, 300), st.integers(1, 9), st.integers(0, 4))
def test_any_share_gives_the_sums(m: int, n: int, k: int, workers: int, parts: int) -> None:
    """Every (tile, piece) once, whatever the extents and the workers."""
    schedule = replace(SPLIT, split={"k": parts}) if parts else STREAM
    extents = {"M": m, "N": n, "K": -(-k // 8) * 8}
    arguments = arguments_of(bf16_nt, extents)
    wanted = expected(bf16_nt, arguments)
    made = compile_kernel(bf16_nt, {}, dict.fromkeys("abc", "contiguous"),
                          {"M": (4096, 1), "N": (4096, 1), "K": (4096, 8)}, targets.target("sm_90a"), schedule,
                          frozenset("ab"))
    result = emulate.run(bf16_nt, *arguments.values(), target="sm_90a", workers=workers, aligned=["a", "b"], code=made)
    assert_near(arguments["c"], wanted)
    share = Share(-(-m // 64) * -(-n // 64), -(-k // 64), workers, parts)
    products = sum(count for name, count in result.counters.instructions.items() if PRODUCTS.match(name))
    assert products == 16 * sum(share.cut.values())
    handed = result.counters.instructions.get(RELEASE, 0)
    tiles = [tile for _, tile in share.cut]
    assert handed == 4 * sum(tiles.count(tile) - 1 for tile in set(tiles))


# On the emulator.


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize(("level", "kernel", "schedule"), [
    ("sm_80", bf16_nn, STREAM), ("sm_80", gated, SPLIT), ("sm_90a", bf16_nn, SPLIT), ("sm_90a", gated, STREAM)],
    ids=lambda value: getattr(value, "name", value if isinstance(value, str) else ""))
def test_on_the_emulator(level: str, kernel: Any, schedule: Schedule, lazy: bool) -> None:
    names = [name for name, _ in kernel.parameters]
    extents = {"M": 80, "N": 96, "K": 208}
    arguments = arguments_of(kernel, extents)
    wanted = expected(kernel, arguments)
    counters = emulate.run(kernel, *arguments.values(), target=level, workers=9, aligned=names, schedule=schedule,
                           options=emulate.Options(lazy=lazy)).counters
    assert_near(arguments[names[-1]], wanted)
    assert counters.instructions.get(RELEASE, 0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["matmul_nt_i8", "matmul_nt_f32", "matmul_tn_bf16", "matmul_nt_bias_gelu_f32",
                                  "matmul_nt_residual_bf16", "matmul_swiglu_bf16"])
def test_products_of_the_library(name: str) -> None:
    """Elements that are brought through registers or split, and what is computed of sums. Integers are exact."""
    entry = find(name)
    arguments = entry.make_arguments(np.random.default_rng(5), {"M": 80, "N": 96, "K": 208})
    wanted = entry.reference(arguments)
    counters = emulate.run(entry.kernel, *arguments.values(), target="sm_80", workers=7, aligned="ab",
                           schedule=Schedule(stream="k")).counters
    assert entry.compare(arguments, wanted) is None, entry.compare(arguments, wanted)
    assert counters.instructions.get(RELEASE, 0)


def test_sums_of_scaled_blocks_are_scaled_before_they_are_handed_over() -> None:
    extents = narrow_extents(80, 144, 400)
    arguments = narrow_arguments(block_scaled, extents)
    copies = {name: array.copy() for name, array in arguments.items()}
    interpret(block_scaled.tile_ir(), copies)
    counters = emulate.run(block_scaled, *arguments.values(), target="sm_90a", workers=7, aligned="abc",
                           schedule=Schedule(tile={"m": 128, "n": 128}, stream="k")).counters
    assert_near_of_narrow(arguments["c"], copies["c"].astype(np.float64))
    assert counters.instructions.get(RELEASE, 0)


def test_tiles_of_several_matrices() -> None:
    extents = {"B": 3, "M": 72, "N": 56, "K": 144}
    arguments = arguments_of(batched, extents)
    wanted = expected(batched, arguments)
    counters = emulate.run(batched, *arguments.values(), target="sm_90a", workers=5, aligned="abc",
                           schedule=STREAM).counters
    assert_near(arguments["c"], wanted)
    assert counters.instructions.get(RELEASE, 0)


def launch(made: Compiled, arguments: dict[str, np.ndarray], extents: dict[str, int], sync: np.ndarray, workers: int,
           text: str = "") -> None:
    words = [arguments[s.split(".")[0]] if s.endswith("data") else extents[s.split(".")[1]] for s in made.slots]
    maps = [emulate.TensorMap(arguments[name], box, 128) for name, _, _, box in made.tensor_maps]
    size = made.scratch[0][0] * made.scratch[0][1][0][0] * made.scratch[0][1][1][0]
    emulate.load(text or made.text()).launch(
        grid=(workers,), block=(32 * made.warps,), shared_bytes=made.near_bytes, cooperative=True,
        arguments=[np.full(size * workers, 0xFF, np.uint8), size, sync, *words, *maps],
        options=emulate.Options(lazy=True, step_limit=12_000))


def test_the_same_sums_in_every_run_and_flags_that_are_zero_again() -> None:
    made = compiled(bf16_nn, "sm_90a", STREAM)
    assert made.barriers        # workers wait for each other: all must run at once
    extents = {"M": 64, "N": 64, "K": 320}
    arguments, sync = arguments_of(bf16_nn, extents), np.zeros(SYNC_BYTES, np.uint8)
    results = []
    for _ in range(2):
        launch(made, arguments, extents, sync, 3)
        assert not sync[FLAGS_AT:].any()
        results.append(arguments["c"].copy())
        arguments["c"][...] = np.nan
    np.testing.assert_array_equal(*results)


FAULTS = {
    "handed over without a release": (r"st\.release\.gpu\.global\.u32", "st.relaxed.gpu.global.u32", 0),
    "taken over without an acquire": (r"ld\.acquire\.gpu\.global\.u32", "ld.relaxed.gpu.global.u32", 0),
    "nobody waits for the flag": (r"(?m)^    @%p\d+ bra\.uni \$take_over\d+;", "", 0),
    "the flag is not raised": (r"(?m)^    @%p\d+ st\.release.*$", "", 0),
    "the flag stays raised": (r"(?m)^    @%p\d+ st\.relaxed\.gpu\.global\.u32.*$", "", 0),
    "a neighbour's sums": (r"(ld\.global\.v4\.b32 \{[^}]*\}, \[%rd\d+)\+512\]", r"\1+1024]", 0),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, level: str) -> None:
    """On the emulator: an error, a wrong result, or a flag that is left to the next launch."""
    made = compiled(bf16_nt, level, STREAM)
    extents = {"M": 64, "N": 64, "K": 256}
    arguments, sync = arguments_of(bf16_nt, extents), np.zeros(SYNC_BYTES, np.uint8)
    wanted = expected(bf16_nt, arguments)
    launch(made, arguments, extents, sync, 2)
    assert_near(arguments["c"], wanted)
    arguments["c"][...] = np.nan
    try:
        launch(made, arguments, extents, sync, 2, replaced(made.text(), *FAULTS[fault]))
    except emulate.EmulationError:
        return
    with pytest.raises(AssertionError):
        assert_near(arguments["c"], wanted)
        assert not sync[FLAGS_AT:].any()


@pytest.mark.parametrize("level", LEVELS)
def test_lanes_meet_around_the_flag(level: str) -> None:
    """The emulator takes a warp's lanes to run together, so that it does not miss these."""
    text = compiled(bf16_nt, level, STREAM).text()
    assert re.search(r"bar\.warp\.sync 0xffffffff;\n\s*@%p\d+ st\.release\.gpu\.global\.u32", text)
    assert re.search(r"st\.relaxed\.gpu\.global\.u32 [^\n]*\n\s*bar\.warp\.sync 0xffffffff;", text)


# The rehearsal.


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("level", LEVELS)
def test_what_lowering_makes_is_right(level: str, kernel: Any) -> None:
    assert rehearse(lowered(kernel, level, Schedule(stream="k"))) == []


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "told"), [
    ("hand_over", "take_over: found a wait for what nobody does"),
    ("take_over", "load_run: found (bytes that nobody wrote|what was not waited for)")])
@pytest.mark.parametrize("schedule", [STREAM, SPLIT], ids=["stream", "split"])
@pytest.mark.parametrize("level", LEVELS)
def test_a_dropped_op_is_found(level: str, schedule: Schedule, name: str, told: str) -> None:
    lane = lowered(bf16_nt, level, schedule)
    for block in [b for op in lane.walk() for b in op.blocks]:
        block.ops[:] = [op for op in block.ops if op.name != name]
    assert any(re.search(told, str(fault)) for fault in rehearse(lane)), rehearse(lane)


def test_handing_over_before_the_sums_are_stored_is_found() -> None:
    lane = lowered(bf16_nt, "sm_90a", STREAM)
    block = next(b for op in lane.walk() for b in op.blocks if any(o.name == "hand_over" for o in b.ops))
    block.ops.insert(0, block.ops.pop(next(n for n, op in enumerate(block.ops) if op.name == "hand_over")))
    assert any("what was not waited for" in str(fault) for fault in rehearse(lane)), rehearse(lane)


# The choice.


def chosen(level: str, m: int, n: int, k: int, schedule: Schedule | None = None) -> Function:
    known = Specialization({"M": DimClass(m, 64), "N": DimClass(n, 64), "K": DimClass(k, 64)},
                           dict.fromkeys("abc", "contiguous"), frozenset("ab"))
    return lowered(bf16_nt, level, schedule or Schedule(), known)


@pytest.mark.parametrize("level", LEVELS)
def test_the_model_shares_where_tiles_leave_workers_idle(level: str) -> None:
    assert hands_over(chosen(level, 128, 4096, 16384))          # few tiles, a long depth
    # A last wave that is mostly idle, or no whole one.
    assert hands_over(chosen(level, *((1024, 1024, 4096) if level == "sm_80" else (1536, 1536, 4096))))
    assert not hands_over(chosen(level, 16384, 16384, 16384))   # waves enough
    assert not hands_over(chosen(level, 512, 512, 512))         # the sums would take longer than what is saved
    assert not hands_over(chosen(level, 128, 4096, 16384, Schedule(split={"k": 1})))


def test_a_shared_tile_is_larger_than_one_for_each_worker() -> None:
    """64 x 64 would be read four times as often."""
    multiply = next(op for op in chosen("sm_90a", 128, 4096, 16384).walk() if op.name == "group_multiply")
    assert 2 * (len(multiply.operands) - 2) >= 128


def test_as_many_workers_are_launched_as_share() -> None:
    tasks = [lowered(bf16_nt, "sm_90a", schedule).attributes["tasks"] for schedule in (STREAM, SPLIT)]
    assert [loop[-1] for ((*loop,),) in tasks] == [[1, ["K"], 64], [3, [], 1]]


REFUSED = {
    "another axis": (bf16_nt, "sm_90a", Schedule(split={"m": 2}), "split of m: found another axis than k"),
    "no matrix instructions": (bf16_nt, "sm_80", Schedule(registers={"m": 4}, stream="k"),
                               "stream of k: found a walk that is not one product on matrix instructions"),
    "a CPU": (bf16_nt, "avx512", Schedule(stream="k"), "stream of k: found a walk that is not one product"),
    "part of the depth": (part_of_depth, "sm_80", Schedule(stream="k"), "found an extent of k that is known only"),
    "chunks": (bf16_nt, "sm_80", Schedule(chunks={"m": 2}, stream="k"), "found chunks too"),
    "no axis": (bf16_nt, "sm_80", Schedule(stream="z"), "no axis 'z'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_shared_is_told(case: str) -> None:
    kernel, level, schedule, message = REFUSED[case]
    level = next(name for name in targets.known_targets() if name.startswith("zen4")) if level == "avx512" else level
    with pytest.raises(ScheduleError, match=re.escape(message)):
        to_lane(kernel.tile_ir(), schedule, facts_of(targets.target(level)), specialization(kernel, 64))


def test_schedules_that_contradict_themselves() -> None:
    with pytest.raises(ScheduleError, match="split and stream: found both, of k and k; expected one"):
        Schedule(split={"k": 2}, stream="k")
    with pytest.raises(ScheduleError, match="schedule entry split of axis k: found 0"):
        Schedule(split={"k": 0})
    with pytest.raises(ScheduleError, match="schedule entry stream: found 3"):
        Schedule(stream=3)  # type: ignore[arg-type]
    assert Schedule.from_json(STREAM.to_json()) == STREAM and Schedule.from_json(SPLIT.to_json()) == SPLIT


@pytest.mark.skipif(assembler.find_tool("ptxas") is None, reason="ptxas is not installed")
@pytest.mark.parametrize("level", LEVELS)
def test_sums_stay_in_registers(level: str) -> None:
    """No spill; on sm_90a workers are clusters, too."""
    texts = [compiled(kernel, level, Schedule(stream="k")).text() for kernel in KERNELS]
    for name, made in assembler.assemble(texts, level).items():
        assert made.spilled_bytes == 0, name
        assert all("div.s64" not in text and "rem.s64" not in text for text in texts)
