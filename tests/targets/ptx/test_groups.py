"""Contractions by groups of warps, while other warps copy: at the lane station, and as PTX on the emulator."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import Tensor, bf16, each, emulate, f32, span, targets, tiles, zeros
from sapper.codegen.pipeline import compile_kernel, facts_of, finish_lane, to_lane
from sapper.emulate.unit_wgmma import Descriptor
from sapper.ir.nodes import Function
from sapper.ir.text import parse_function, print_function
from sapper.ir.verifier import verify
from sapper.kernels import find
from sapper.lane import fragments
from sapper.lane.interpret import run
from sapper.lane.memory import LaneError, Memory
from sapper.lane.ops import LANE_OPS
from sapper.lane.synchronise import unsynchronised
from sapper.tile.ops import TILE_OPS
from sapper.tile.schedule import DimClass, MatrixGroup, Schedule, Specialization, UnfollowedError
from tests.strategies.amount import examples

from .kernels import KERNELS, bf16_nn, bf16_nt, gated
from .left_out import told
from .test_matrix import arguments_of, assert_near, expected, specialization

TARGET = targets.target("sm_90a")
B, M, N, K = sp.dims("B M N K")


@sp.kernel
def batched(a: Tensor[bf16, B, M, K], b: Tensor[bf16, B, N, K], c: Tensor[f32, B, M, N]):
    for i in each(B):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=f32)
            for k in tiles(K):
                acc += a[i, m, k] @ b[i, n, k]
            c[i, m, n] = acc


@sp.kernel
def part_of_depth(a: Tensor[bf16, M, K], b: Tensor[bf16, N, K], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(span(0, K - 8)):
            acc += a[m, k] @ b[n, k]
        c[m, n] = acc


def alone(tile: dict[str, int]) -> Schedule:
    """Of workers that are no cluster, where the tile is said."""
    return Schedule(tile=tile, cluster={"m": 1} if len(tile) > 1 else {})


def lowered(kernel: Any, tile: dict[str, int], known: Specialization | None = None) -> Function:
    return to_lane(kernel.tile_ir(), alone(tile), facts_of(TARGET), known or specialization(kernel))


def interpret_lane(lane: Function, arguments: dict[str, np.ndarray], extents: dict[str, int], workers: int) -> None:
    memory = Memory()
    words = [0, 0, memory.allocate("sync", 1024)]
    for slot in lane.attributes["slots"]:
        name, _, kind = slot.partition(".")
        words.append(memory.add_array(name, arguments[name]) if kind == "data" else extents[kind])
    run(lane, np.array(words), memory, workers=workers)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_lane_ir(kernel: Any) -> None:
    extents = {"M": 96, "N": 160, "K": 96}
    arguments = arguments_of(kernel, extents)
    lane = lowered(kernel, {"m": 64, "n": 64})
    assert lane.attributes["warps"] == 8
    verify(lane, LANE_OPS)
    text = print_function(lane)
    assert print_function(parse_function(text, {"tile": TILE_OPS, "lane": LANE_OPS})) == text
    wanted = expected(kernel, arguments)
    lane = finish_lane(lane, TARGET)
    assert unsynchronised(lane) == []
    interpret_lane(lane, arguments, extents, workers=2)
    assert_near(arguments[list(arguments)[-1]], wanted)


TILES = {"large": {"m": 128, "n": 256}, "one group": {"m": 64, "n": 128}}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("kernel", "tile", "lazy"), [
    *((kernel, "large", False) for kernel in KERNELS), *((kernel, "one group", True) for kernel in KERNELS),
    (bf16_nn, "large", True)], ids=lambda value: getattr(value, "name", value))
def test_on_the_emulator(kernel: Any, tile: str, lazy: bool) -> None:
    """Several tiles for each of two workers, of which one has more; edges in all three directions."""
    size = dict(TILES[tile])
    size["n"] //= 2 if kernel is gated else 1
    names = [name for name, _ in kernel.parameters]
    extents = {"M": size["m"] + 48, "N": size["n"] + 48, "K": 144 if tile == "large" else 336}
    arguments = arguments_of(kernel, extents)
    wanted = expected(kernel, arguments)
    counters = emulate.run(kernel, *arguments.values(), target="sm_90a", workers=2, aligned=names,
                           schedule=Schedule(tile=size), options=emulate.Options(lazy=lazy)).counters
    assert_near(arguments[names[-1]], wanted)
    columns = size["n"]
    assert any(name.startswith(f"wgmma.mma_async.sync.aligned.m64n{columns}k16") for name in counters.instructions)
    if not lazy:
        assert counters.shared_cycles - counters.shared_ideal <= counters.shared_ideal      # stores of single sums


def test_coordinates_of_tensors_with_more_dimensions() -> None:
    extents = {"B": 3, "M": 72, "N": 88, "K": 80}
    arguments = arguments_of(batched, extents)
    wanted = expected(batched, arguments)
    counters = emulate.run(batched, *arguments.values(), target="sm_90a", workers=2, aligned="abc",
                           schedule=Schedule(tile={"m": 64, "n": 64})).counters
    assert_near(arguments["c"], wanted)
    assert any(name.startswith("cp.async.bulk.tensor.3d") for name in counters.instructions)


def test_rows_of_which_memory_says_how_many_there_are() -> None:
    """No box of sums: what lies behind the rows stays."""
    entry = find("masked_matmul_nt_bf16_bf16")
    arguments = entry.make_arguments(np.random.default_rng(3), {"B": 3, "M": 96, "N": 128, "K": 128})
    wanted = entry.reference(arguments)
    counters = emulate.run(entry.kernel, *arguments.values(), target="sm_90a", workers=2, aligned=["a", "w", "c"],
                           schedule=Schedule(tile={"m": 64, "n": 64})).counters
    assert entry.compare(arguments, wanted) is None, entry.compare(arguments, wanted)
    assert any(name.startswith("wgmma") for name in counters.instructions)


def test_tiles_are_taken_by_bands_of_rows() -> None:
    """Nine rows of tiles are a band of eight and one more; three workers take them in turn."""
    extents = {"M": 8 * 64 + 16, "N": 144, "K": 64}
    arguments = arguments_of(bf16_nn, extents)
    wanted = expected(bf16_nn, arguments)
    counters = emulate.run(bf16_nn, *arguments.values(), target="sm_90a", workers=3, aligned="abc",
                           schedule=Schedule(tile={"m": 64, "n": 64})).counters
    assert_near(arguments["c"], wanted)
    assert counters.instructions["wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16"] == 9 * 3 * 4 * 4


def shape_of(kernel: Any, extents: dict[str, int]) -> tuple[int, int] | None:
    """Groups and columns that the model takes; None where the kernel is kept off such instructions."""
    names = [name for name, _ in kernel.parameters]
    known = Specialization({d: DimClass(n, 64) for d, n in extents.items()}, dict.fromkeys(names, "contiguous"),
                           frozenset(names[:-1]))
    lane = lowered(kernel, {}, known)
    multiply = next((op for op in lane.walk() if op.name == "group_multiply"), None)
    return None if multiply is None else ((lane.attributes["warps"] - 4) // 4, (len(multiply.operands) - 2) * 2)


def test_the_tile_that_takes_least_time_by_the_model() -> None:
    """On 132 processors: of 1280 x 1280 there are 100 tiles of 128 x 128, of 2048 x 2048 128 of 128 x 256."""
    found = {n: shape_of(bf16_nt, {"M": n, "N": n, "K": 1024}) for n in (256, 1280, 2048, 8192)}
    assert found == {256: (1, 64), 1280: (2, 128), 2048: (2, 256), 8192: (2, 256)}
    assert shape_of(gated, {"M": 8192, "N": 8192, "K": 1024}) == (2, 128)


def test_what_is_no_box_goes_to_other_instructions() -> None:
    """Past the end of the depth the copies would bring what lies there, not zeros."""
    assert shape_of(part_of_depth, {"M": 4096, "N": 4096, "K": 4096}) is None
    with pytest.raises(UnfollowedError, match=r"tile m = 100: found tiles of \d+, as matrix instructions take them"):
        lowered(bf16_nn, {"m": 100})


def compiled(kernel: Any, tile: dict[str, int]) -> Any:
    known = specialization(kernel, 64)
    return compile_kernel(kernel, {}, known.strides, dict.fromkeys("MNK", (4096, 64)), TARGET, alone(tile),
                          known.aligned)


def test_a_kernel_says_which_maps_it_needs() -> None:
    made = compiled(bf16_nn, TILES["large"])
    assert made.tensor_maps == (("a", "bf16", ("M", "K"), (128, 64)), ("b", "bf16", ("K", "N"), (64, 64)))
    head = made.text()[:made.text().index("{")]
    maps = [f".align 64 .b8 map_{number}[128]" for number in range(2)]
    assert re.findall(r"(?m)^    \.param (.*?),?$", head)[-2:] == maps
    assert head.startswith(".version 8.0\n.target sm_90a\n") and ".reqntid 384" in head
    assert made.near_bytes <= TARGET.shared_bytes


def test_the_same_bytes_each_time() -> None:
    assert compiled(gated, {}).text() == compiled(gated, {}).text()


@pytest.mark.parametrize("kernel", [bf16_nt, gated], ids=lambda k: k.name)
@pytest.mark.parametrize("shape", MatrixGroup().shapes, ids=str)
def test_every_tile_fits_near_memory_and_registers(kernel: Any, shape: tuple[int, int]) -> None:
    groups, columns = shape[0], shape[1] // (2 if kernel is gated else 1)
    if columns < 64:
        with pytest.raises(UnfollowedError, match=r"found tiles of .*, as matrix instructions take them"):
            lowered(kernel, {"m": 64 * groups, "n": columns})
        return
    made = compiled(kernel, {"m": 64 * groups, "n": columns})
    assert made.warps == 4 * groups + 4 and made.near_bytes <= TARGET.shared_bytes
    more, fewer = (int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32 (\d+);", made.text()) or (0, 0))
    begun = 65536 // (32 * made.warps) // 8 * 8 * 32 * made.warps
    assert 128 * (groups * more + fewer) <= begun and (more > 0) == (groups > 1)


@settings(deadline=None, max_examples=examples(60))
@given(st.booleans(), st.integers(1, 4), st.integers(0, 3), st.integers(0, 7))
def test_the_lane_machine_and_descriptors_agree_on_swizzled_places(along_depth: bool, panels: int, depth: int,
                                                                   start: int) -> None:
    """Where the elements of an operand lie, 16 of the depth from `depth` steps on: two formulas, from one manual."""
    panel_bytes = 64 * 128
    address = 1024 * start + depth * (32 if along_depth else 2048)
    leading = 16 if along_depth else panel_bytes
    found = Descriptor(address, leading, 1024, 128).offsets(64 * panels, 16, 2, not along_depth)
    rows, columns = np.arange(64 * panels)[:, None], np.arange(16)[None, :]
    wanted = fragments.swizzled(address + fragments.near_offsets(rows, columns, along_depth, panel_bytes))
    np.testing.assert_array_equal(found, wanted)


FAULTS = {
    "copies do not wait for free stages": (r"(?m)^    mbarrier\.try_wait.*$", "    setp.eq.s32 %p1, 0, 0;", 1),
    "sums do not wait for full stages": (r"@(%p\d+) bra (\$signal\d+);", "", 0),
    "wrong phase": (r"(mbarrier\.try_wait\.parity\.shared::cta\.b64 %p\d+, \[[^]]*\]), %r\d+;", r"\1, 1;", 0),
    "stages given back too early": (r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 2;", 0),
    "sums read in flight": (r"wgmma\.wait_group\.sync\.aligned 0;", "wgmma.wait_group.sync.aligned 1;", 0),
    "no fence of the sums": (r"wgmma\.fence\.sync\.aligned;", "", 0),
    "no commit": (r"wgmma\.commit_group\.sync\.aligned;", "", 0),
    "no arrival": (r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64 .*;", "", 0),
    "too few bytes announced": (r"(expect_tx\.shared::cta\.b64 _, \[[^]]*\]), \d+;", r"\1, 4096;", 0),
    "one signal for two stages": (r"(and\.b64 %rd\d+, %rd\d+), 3;", r"\1, 1;", 0),
    "lanes do not meet before they read sums": (r"bar\.warp\.sync 0xffffffff;", "", None),
    "signals start after their use": (r"bar\.sync 0;", "", 0),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str) -> None:
    """On the emulator: an error, a wrong result, or nobody can go on."""
    made = compiled(bf16_nt, {"m": 64, "n": 64})
    extents = {"M": 64, "N": 192, "K": 384}
    arguments = arguments_of(bf16_nt, extents)
    wanted = expected(bf16_nt, arguments)
    if not told(made, FAULTS[fault], arguments, extents):
        with pytest.raises(AssertionError):
            assert_near(arguments["c"], wanted)


def test_a_signal_that_nobody_gives_is_told() -> None:
    extents = {"M": 64, "N": 64, "K": 128}
    lane = finish_lane(lowered(bf16_nt, {"m": 64, "n": 64}), TARGET)
    for block in [b for op in lane.walk() for b in op.blocks]:
        block.ops[:] = [op for op in block.ops if op.name != "tensor_copy"]
    with pytest.raises(LaneError, match="found nobody who can go on; expected 0 arrivals and 16384 bytes in phase 0"):
        interpret_lane(lane, arguments_of(bf16_nt, extents), extents, workers=1)


def test_counts() -> None:
    """Of a worker's tile: one copy of each operand and four products of each group for each stage."""
    made = compiled(bf16_nt, TILES["large"])
    found = Counter(re.findall(r"(?m)^    (?:@%p\d+ )?(wgmma\.mma|cp\.async\.bulk|mbarrier\.try_wait)", made.text()))
    assert found == {"wgmma.mma": 4, "cp.async.bulk": 2, "mbarrier.try_wait": 2}
