"""Multi-head latent attention of one token on groups of warps: two share 64 heads, each with half of the vector."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise
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
from sapper.tile.ops import TILE_OPS
from sapper.tile.schedule import DimClass, Facts, Schedule, Specialization
from tests.strategies.amount import examples

from .left_out import blocks_of, missed, replaced

ENTRY = find("latent_attention_decode_narrow")
TENSORS = [name for name, type in ENTRY.kernel.parameters if hasattr(type, "dims")]
TARGET = targets.target("sm_90a")
PRODUCT = "wgmma.mma_async.sync.aligned.m64n{}k16.f32.bf16.bf16"


def known(*unaligned: str) -> Specialization:
    return Specialization({d: DimClass(2048, 1) for d in "PB"}, dict.fromkeys(TENSORS, "contiguous"),
                          frozenset(TENSORS) - set(unaligned))


def lowered(heads: int = 64, latent: int = 512, shared: int = 64, facts: Facts | None = None,
            unaligned: tuple[str, ...] = ()) -> Function:
    tile = ENTRY.kernel.tile_ir({"H": heads, "C": latent, "S": shared})
    return to_lane(tile, Schedule(), facts or facts_of(TARGET), known(*unaligned))


def arguments_of(heads: int, position: int, latent: int = 512, shared: int = 64) -> dict[str, Any]:
    """Positions that are not filled hold NaN."""
    made: dict[str, Any] = ENTRY.make_arguments(
        np.random.default_rng(5), {"H": heads, "C": latent, "S": shared, "position": position})
    return made


def emulated(arguments: dict[str, Any], aligned: list[str] = TENSORS, workers: int = 2, lazy: bool = False) -> Any:
    """Counters, after a comparison. Races, uninitialised reads and accesses out of bounds raise; lazy: a copy lands,
    and a product reads, only when it is waited for."""
    counters = emulate.run(ENTRY.kernel, *arguments.values(), target="sm_90a", workers=workers,
                           static=frozenset("HCS"), aligned=aligned, options=emulate.Options(lazy=lazy)).counters
    wrong = ENTRY.compare(arguments, ENTRY.reference(arguments))
    assert wrong is None, wrong
    return counters


@pytest.mark.sampled(3)
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize(("heads", "position"), [(64, 70), (100, 256 + 33), (128, 0), (17, 255)])
def test_on_the_emulator(heads: int, position: int, lazy: bool) -> None:
    """The latent vector is keys and values of the same copy, read along both axes."""
    counters = emulated(arguments_of(heads, position), lazy=lazy)
    instructions = counters.instructions
    pieces = sum(-(-min(256, position + 1 - first) // 64) for first in range(0, position + 1, 256)) * -(-heads // 64)
    # A half of 256 + 32 deep and a half of 256 columns wide, by each of 8 warps.
    assert instructions[PRODUCT.format(64)] == pieces * 18 * 8
    assert instructions[PRODUCT.format(256)] == pieces * 4 * 8
    assert counters.shared_cycles == counters.shared_ideal
    assert any(name.endswith("global.shared::cta.bulk_group") for name in instructions)


def test_one_worker_has_many_tiles() -> None:
    """What is kept of a tile, halves, and boxes of results lie where those of the last tile did."""
    emulated(arguments_of(128, 600), workers=1, lazy=True)


def test_results_that_do_not_lie_aligned_are_stored_by_lanes() -> None:
    counters = emulated(arguments_of(64, 80), aligned=[name for name in TENSORS if name != "partial"])
    assert counters.instructions[PRODUCT.format(256)]
    assert not any(name.endswith("global.shared::cta.bulk_group") for name in counters.instructions)


@settings(max_examples=examples(5), deadline=None)
@given(heads=st.integers(17, 140), position=st.integers(0, 700), workers=st.integers(1, 5),
       latent=st.sampled_from([256, 512]), shared=st.sampled_from([64, 128]), lazy=st.booleans())
def test_any_shape(heads: int, position: int, workers: int, latent: int, shared: int, lazy: bool) -> None:
    emulated(arguments_of(heads, position, latent, shared), workers=workers, lazy=lazy)


def test_at_the_lane_station() -> None:
    arguments = arguments_of(70, 100)
    lane = lowered(70)
    verify(lane, LANE_OPS)
    text = print_function(lane)
    assert print_function(parse_function(text, {"tile": TILE_OPS, "lane": LANE_OPS})) == text
    lane = finish_lane(lane, TARGET)
    memory = Memory()
    words = [0, 0, memory.allocate("sync", 1024)]
    extents = {"P": len(arguments["latents"]), "B": 1}
    for slot in lane.attributes["slots"]:
        name, _, kind = slot.partition(".")
        words.append(memory.add_array(name, arguments[name]) if kind == "data" else extents[kind] if name == "dim" else
                     int(np.float32(arguments[kind]).view(np.int32)) if kind == "scale" else arguments[kind])
    run(lane, np.array(words), memory, workers=2)
    wrong = ENTRY.compare(arguments, ENTRY.reference(arguments))
    assert wrong is None, wrong


# What is chosen.

def with_group(**changes: Any) -> Facts:
    facts = facts_of(TARGET)
    assert facts.matrix_group is not None
    return replace(facts, matrix_group=replace(facts.matrix_group, **changes))


def shape_of(lane: Function) -> tuple[int, int, int, int]:
    """Warps, positions of a piece, products from near memory and from registers."""
    names = Counter(op.name for op in lane.walk())
    (step,) = {op.attributes["step"] for op in lane.walk() if op.name == "loop" and op.attributes["label"] == "p"}
    return lane.attributes["warps"], step, names["group_multiply"] // 2, names["group_multiply_rows"] // 2


def test_what_registers_lack_is_kept_in_near_memory() -> None:
    """Sums 128, scores 32, weights 16, queries 64 + 8: three panels of 16 registers go to near memory, so that a piece
    has 64 positions. With more registers fewer go there; with less near memory a piece has 32."""
    assert shape_of(lowered()) == (12, 64, 12, 4 + 2 + 4)
    assert shape_of(lowered(facts=with_group(chain_registers=216))) == (12, 64, 8, 8 + 2 + 4)
    assert shape_of(lowered(facts=with_group(chain_registers=248))) == (12, 64, 0, 16 + 2 + 4)
    assert shape_of(lowered(facts=with_group(near_bytes=200 << 10, chain_registers=224))) == (12, 32, 0, 16 + 2 + 2)
    assert shape_of(lowered(facts=with_group(near_bytes=200 << 10))) == (12, 32, 8, 8 + 2 + 2)


def test_what_groups_do_not_take_stays_with_warps() -> None:
    """Too few registers, or too little near memory; and 16 heads, for which both wait for the same copies, unless these
    are slow or products of groups fast: then the tile is padded."""
    for heads, changes in ((16, {}), (64, {"chain_registers": 150}), (64, {"near_bytes": 90 << 10})):
        lane = lowered(heads, facts=with_group(**changes))
        names = {op.name for op in lane.walk()}
        assert "matrix_multiply" in names and "group_multiply_rows" not in names


def test_rows_are_padded_where_that_costs_less() -> None:
    """Of 17 heads and more each 16 would have the cache copied once more. Where copies take no time, 64 rows of a group
    take as long as 32 of warps, whose products are half as many in a cycle."""
    def on_groups(heads: int, cache_bytes: int = 32) -> bool:
        facts = with_group(cache_bytes=cache_bytes)
        assert facts.matrix is not None
        facts = replace(facts, matrix=replace(facts.matrix, cache_bytes=cache_bytes))
        return any(op.name == "group_multiply_rows" for op in lowered(heads, facts=facts).walk())

    assert [on_groups(heads) for heads in (1, 16, 17, 32, 64)] == [False, False, True, True, True]
    assert [on_groups(heads, 1 << 20) for heads in (16, 32, 33, 48, 64)] == [False, False, True, True, True]


def test_near_memory_is_told_apart() -> None:
    """Buffers do not overlap but for halves and the boxes of results, which lie in the same place."""
    buffers = {name: (at, at + size) for name, at, size in lowered().attributes["near_buffers"]}
    assert buffers["sums"] == buffers["halves"]
    del buffers["sums"]
    places = sorted(buffers.values())
    assert all(end <= start for (_, end), (start, _) in pairwise(places))
    assert places[-1][1] <= targets.target("sm_90a").shared_bytes


def test_all_lanes_have_stored_and_read_when_one_says_so() -> None:
    """A lane arrives for its warp: in each of two loops the lanes meet after the halves are stored, and are read."""
    lane = finish_lane(lowered(), TARGET)
    loops = [block for block in blocks_of(lane) if any(op.name == "load_run" and op.attributes.get("near")
                                                     for op in block.ops)]
    assert len(loops) == 2
    for block in loops:
        names = [op.name for op in block.ops if op.name in ("store_run", "load_run", "sync_lanes", "signal_arrive")]
        assert names == ["signal_arrive", *["store_run"] * 8, "sync_lanes", "signal_arrive", *["load_run"] * 8,
                         "sync_lanes", "signal_arrive"]


# What is left out, or wrong.

@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["signal_wait", "signal_arrive", "signal_start", "store_fence", "store_wait",
                                  "group_wait", "group_fence", "group_commit", "sync_warps", "tensor_copy"])
def test_the_rehearsal_finds_what_is_left_out(name: str) -> None:
    """Each op of that name, left out by itself; but the wait before the first box of the results, as those of the last
    tile have been read, and the arrival after a ragged piece: nothing follows the only one that is rehearsed."""
    harmless = {"store_wait": [2], "signal_arrive": [5]}.get(name, [])
    assert missed(finish_lane(lowered(), TARGET), name) == harmless


ARRIVAL = r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64 .*;"
WAIT, NO_WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 (%p\d+), .*;", r"setp.eq.s32 \1, 0, 0;"
FAULTS = {
    "queries are stored before the last tile's are read": (WAIT, NO_WAIT, 0),
    "queries are read before they are stored": (WAIT, NO_WAIT, 1),
    "a piece is read before it has landed": (WAIT, NO_WAIT, 2),
    "halves are written over": (WAIT, NO_WAIT, 3),
    "halves are read before they are there": (WAIT, NO_WAIT, 4),
    "nor is the ragged piece waited for": (WAIT, NO_WAIT, 5),
    "its halves are written over": (WAIT, NO_WAIT, 6),
    "its halves are read before they are there": (WAIT, NO_WAIT, 7),
    "boxes are stored over halves": (WAIT, NO_WAIT, 8),
    "nobody says that queries are there": (ARRIVAL, "", 1),
    "a free stage is not told": (ARRIVAL, "", 2),
    "nor after a ragged piece": (ARRIVAL, "", 5),
    "halves are not told": (ARRIVAL, "", 3),
    "what was read is not told": (ARRIVAL, "", 4),
    "queries are not seen by products": (r"fence\.proxy\.async\.shared::cta;", "", 0),
    "the other parity": (r"(mbarrier\.try_wait\.parity\.shared::cta\.b64 %p\d+, \[%r\d+\+\d+\]), 1;", r"\1, 0;", 0),
    "both have the same half": (r"(mul\.lo\.s64 %rd\d+, %rd\d+), 32768;", r"\1, 0;", 0),
    "scores read in flight": (r"wgmma\.wait_group\.sync\.aligned 0;", "", 0),
    "values are not turned": (r"(wgmma\.mma_async\.sync\.aligned\.m64n256k16.*), 1;", r"\1, 0;", 0),
    "another panel of the queries": (r"(stmatrix.*\[%r\d+)\+8192\]", r"\1+16384]", 0),
}


@cache
def compiled_for_many_heads() -> Compiled:
    return compile_kernel(ENTRY.kernel, {"H": 128, "C": 512, "S": 64}, dict.fromkeys(TENSORS, "contiguous"),
                          dict.fromkeys("PB", (4096, 1)), TARGET, None, frozenset(TENSORS))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str) -> None:
    """On the emulator: an error, a wrong result, or nobody can go on."""
    compiled = compiled_for_many_heads()
    arguments = arguments_of(128, 150)
    extents = {"P": len(arguments["latents"]), "B": 1}
    words = [arguments[s.split(".")[0]] if s.endswith("data") else extents[s.split(".")[1]] if s.startswith("dim") else
             arguments[s.split(".")[1]] for s in compiled.slots]
    words = [int(np.float32(w).view(np.int32)) if isinstance(w, float) else w for w in words]
    maps = [emulate.TensorMap(arguments[name], box, 128) for name, _, _, box in compiled.tensor_maps]
    faulty = emulate.load(replaced(compiled.text(), *FAULTS[fault]))
    try:
        faulty.launch(grid=(1,), block=(32 * compiled.warps,),
                      arguments=[np.zeros(64), 64, np.zeros(1024, np.uint8), *words, *maps],
                      shared_bytes=compiled.near_bytes, options=emulate.Options(lazy=True))
    except emulate.EmulationError:
        return
    assert ENTRY.compare(arguments, ENTRY.reference(arguments)) is not None
