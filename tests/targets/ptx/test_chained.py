"""Attention on matrix instructions: contractions chained in registers, at the lane station and on the emulator."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, bf16, emulate, exp2, f32, full, max, maximum, sum, targets, tiles, whole, zeros
from sapper.codegen.pipeline import compile_kernel, facts_of, finish_lane, to_lane
from sapper.ir.nodes import Function
from sapper.ir.text import parse_function, print_function
from sapper.ir.verifier import verify
from sapper.kernels import attention_narrow, find
from sapper.kernels.attention_narrow import PREFILL as KERNELS
from sapper.kernels.attention_narrow import attention_bf16_64, attention_bf16_128
from sapper.kernels.record import Arguments, LibraryKernel
from sapper.lane.interpret import run
from sapper.lane.memory import Memory
from sapper.lane.ops import LANE_OPS
from sapper.tile.ops import TILE_OPS
from sapper.tile.schedule import DimClass, Schedule, Specialization

from .left_out import missed, replaced

TENSORS = ("q", "keys", "values", "out")
RAGGED = ({"T": 128, "H": 1, "G": 1, "position": 0}, {"T": 145, "H": 1, "G": 2, "position": 51},
          {"T": 3, "H": 2, "G": 1, "position": 200}, {"T": 0, "H": 1, "G": 1, "position": 0})


PRODUCT = {"sm_80": "mma.sync", "sm_90a": "wgmma.mma_async", "sm_100a": "tcgen05.mma"}


def specialization(aligned: bool = True) -> Specialization:
    return Specialization({d: DimClass(2048, 1) for d in "THGP"}, dict.fromkeys(TENSORS, "contiguous"),
                          frozenset(TENSORS if aligned else ()))


def lowered(kernel: Any, known: Specialization, schedule: Schedule | None = None, level: str = "sm_80") -> Function:
    return to_lane(kernel.tile_ir(), schedule or Schedule(), facts_of(targets.target(level)), known)


def made(entry: LibraryKernel, shape: dict[str, int]) -> tuple[Arguments, dict[str, Any]]:
    arguments = entry.make_arguments(np.random.default_rng(5), shape)
    with np.errstate(all="ignore"):
        return arguments, entry.reference(arguments)


@cache
def compiled_for(kernel: Any, level: str) -> Any:
    known = specialization()
    return compile_kernel(kernel, {}, known.strides, dict.fromkeys("THGP", (4096, 1)), targets.target(level), None,
                          known.aligned)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("level", PRODUCT)
@pytest.mark.parametrize("entry", KERNELS[1:], ids=lambda entry: entry.name)
def test_lane_ir(entry: LibraryKernel, level: str) -> None:
    shape = {"T": 40, "H": 1, "G": 1, "position": 45}
    arguments, expected = made(entry, shape)
    lane = lowered(entry.kernel, specialization(), level=level)
    assert lane.attributes["warps"] > 1
    verify(lane, LANE_OPS)
    text = print_function(lane)
    assert print_function(parse_function(text, {"tile": TILE_OPS, "lane": LANE_OPS})) == text
    lane = finish_lane(lane, targets.target(level))
    memory = Memory()
    words = [0, 0, memory.allocate("sync", 1024)]
    extents = {**shape, "P": arguments["keys"].shape[1]}
    for slot in lane.attributes["slots"]:
        name, _, kind = slot.partition(".")
        words.append(memory.add_array(name, arguments[name]) if kind == "data" else extents[kind] if name == "dim" else
                     int(np.float32(arguments[kind]).view(np.int32)) if kind == "scale" else arguments[kind])
    run(lane, np.array(words), memory, workers=2)
    assert entry.compare(arguments, expected) is None, entry.compare(arguments, expected)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("level", PRODUCT)
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("entry", KERNELS, ids=lambda entry: entry.name)
def test_on_the_emulator(entry: LibraryKernel, lazy: bool, level: str) -> None:
    """Races, uninitialised reads and accesses out of bounds raise; lazy: a copy lands only when it is waited for."""
    for shape in RAGGED[1:2] if lazy or entry is not KERNELS[0] else RAGGED:
        arguments, expected = made(entry, shape)
        result = emulate.run(entry.kernel, *arguments.values(), target=level, workers=2, aligned=TENSORS,
                             options=emulate.Options(lazy=lazy))
        assert entry.compare(arguments, expected) is None, entry.compare(arguments, expected)
        product = PRODUCT[level] if shape["T"] > 32 else "mma.sync"     # few rows are not worth a group of warps
        assert any(name.startswith(product) for name in result.counters.instructions) == (shape["T"] > 0)
        boxes = any(name.endswith("global.shared::cta.bulk_group") for name in result.counters.instructions)
        assert boxes == (product != "mma.sync" and shape["T"] > 0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("level", PRODUCT)
@pytest.mark.parametrize("shape", [(2, 1, 63), (1, 8, 2 * 256 + 40), (1, 20, 70)], ids=str)
def test_heads_that_share_a_cache(shape: tuple[int, int, int], level: str) -> None:
    """One token; what the splits leave is joined."""
    shared, group, position = shape
    decode, merge = find("attention_decode_bf16_128"), find("merge_attention_bf16_128")
    arguments, expected = made(decode, {"H": shared, "G": group, "position": position})
    tensors = [name for name, value in arguments.items() if isinstance(value, np.ndarray)]
    for lazy in (False, True):
        counters = emulate.run(decode.kernel, *arguments.values(), target=level, workers=2, aligned=tensors,
                               options=emulate.Options(lazy=lazy)).counters
        assert decode.compare(arguments, expected) is None, decode.compare(arguments, expected)
        assert any("mma" in name for name in counters.instructions)
    joined = {name: arguments[name] for name in ("highest", "total", "partial")} | {
        "position": position, "out": np.zeros((shared, group, 128), ml_dtypes.bfloat16)}
    wanted = merge.reference(joined)
    emulate.run(merge.kernel, *joined.values(), target=level, workers=2)
    assert merge.compare(joined, wanted) is None, merge.compare(joined, wanted)


def test_few_rows_take_few_warps() -> None:
    known = Specialization({d: DimClass(2048, 1) for d in "HPB"}, {}, frozenset({"q", "keys", "values"}))
    kernel = find("attention_decode_bf16_128").kernel
    for group in (1, 16, 33):       # of more than 32 some blocks of rows
        lane = to_lane(kernel.tile_ir({"G": group}), Schedule(), facts_of(targets.target("sm_80")), known)
        assert lane.attributes["warps"] == 2
    few = Specialization({**specialization().dims, "T": DimClass(8, 1)}, specialization().strides, frozenset(TENSORS))
    for level in PRODUCT:
        assert lowered(attention_bf16_64, few, level=level).attributes["warps"] == 2


SM_80_FAULTS = {
    "the last rows' pieces are written over": (r"bar\.sync 0;", "", 0),
    "pieces are read before all have landed": (r"bar\.sync 0;", "", 1),
    "the same in the second loop": (r"bar\.sync 0;", "", 2),
    "copies are not waited for": (r"cp\.async\.wait_group 0;", "", 0),
    "nor in the second loop": (r"cp\.async\.wait_group 0;", "", 1),
    "a weak wait": (r"cp\.async\.wait_group 0;", "cp.async.wait_group 1;", 0),
    "another chunk": (r"xor\.b32 (%r\d+), (%r\d+), 32;", r"xor.b32 \1, \2, 64;", 0),
    "pairs the other way round": (r"(cvt\.rn\.bf16x2\.f32 %r\d+), (%r\d+), (%r\d+);", r"\1, \3, \2;", 0),
    "a sum over half of the lanes": (r"(shfl\.sync\.bfly\.b32 %r\d+, %r\d+), 2,", r"\1, 1,", 0),
    "not transposed": (r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans\.", "ldmatrix.sync.aligned.m8n8.x4.", 0),
}
SM_90A_FAULTS = {
    # Before each of the loops, and in both, a turn is waited for: the first, third and fifth wait.
    "copies do not wait for free stages": (r"@(%p\d+) bra (\$signal\d+);", "", 5),
    "sums do not wait for full stages": (r"@(%p\d+) bra (\$signal\d+);", "", 1),
    "nor in the second loop": (r"@(%p\d+) bra (\$signal\d+);", "", 3),
    "wrong phase": (r"(mbarrier\.try_wait\.parity\.shared::cta\.b64 %p\d+, \[[^]]*\]), %r\d+;", r"\1, 1;", 1),
    "a turn is waited for in the wrong phase":
        (r"(mbarrier\.try_wait\.parity\.shared::cta\.b64 %p\d+, \[[^]]*\]), %r\d+;", r"\1, 1;", 2),
    "a turn is not given": (r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64 .*;", "", 0),
    "a turn is not given in the second loop": (r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64 .*;", "", 2),
    "the last turn is not given": (r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64 .*;", "", 4),
    "scores read in flight": (r"wgmma\.wait_group\.sync\.aligned 0;", "wgmma.wait_group.sync.aligned 1;", 0),
    "results read in flight": (r"wgmma\.wait_group\.sync\.aligned 0;", "", 2),
    "no fence of the sums": (r"wgmma\.fence\.sync\.aligned;", "", 1),
    "no commit": (r"wgmma\.commit_group\.sync\.aligned;", "", 3),
    "no arrival": (r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64 .*;", "", 1),
    "too few bytes announced": (r"(expect_tx\.shared::cta\.b64 _, \[[^]]*\]), \d+;", r"\1, 4096;", 0),
    "one signal for two stages": (r"(and\.b64 %rd\d+, %rd\d+), 3;", r"\1, 1;", 0),
    "signals start after their use": (r"bar\.sync 0;", "", 0),
    "a piece cut short is copied whole": (r"setp\.ge\.s64 (%p\d+), %rd\d+, 64;", r"setp.ge.s64 \1, 99, 64;", 0),
}
FAULTS = {"sm_80": SM_80_FAULTS, "sm_90a": SM_90A_FAULTS}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("level", "fault"), [(level, fault) for level, faults in FAULTS.items() for fault in faults])
def test_planted_faults_are_caught(level: str, fault: str) -> None:
    """On the emulator: an error, a wrong result, or nobody can go on."""
    entry = find("attention_bf16_64")
    compiled = compiled_for(entry.kernel, level)
    # An odd number of pieces for two stages, and more of them than four stages in the first loop of the first task.
    shape = {"T": 256, "H": 1, "G": 1, "position": 148 if level == "sm_80" else 340}
    arguments, expected = made(entry, shape)
    extents = {**shape, "P": arguments["keys"].shape[1]}
    words = [arguments[s.split(".")[0]] if s.endswith("data") else extents[s.split(".")[1]] if s.startswith("dim") else
             arguments[s.split(".")[1]] for s in compiled.slots]
    words = [int(np.float32(w).view(np.int32)) if isinstance(w, float) else w for w in words]
    maps = [emulate.TensorMap(arguments[name], box, 128) for name, _, _, box in compiled.tensor_maps]
    faulty = emulate.load(replaced(compiled.text(), *FAULTS[level][fault]))
    try:
        faulty.launch(grid=(1,), block=(32 * compiled.warps,),
                      arguments=[np.zeros(64), 64, np.zeros(1024, np.uint8), *words, *maps],
                      shared_bytes=compiled.near_bytes, options=emulate.Options(lazy=True))
    except emulate.EmulationError:
        return
    assert entry.compare(arguments, expected) is not None


REHEARSED = {"sm_80": ("async_wait", "sync_warps", "async_commit"),
             "sm_90a": ("signal_wait", "signal_arrive", "signal_expect", "group_wait", "group_fence", "group_commit",
                        "tensor_copy", "signal_start", "signal_fence", "sync_warps", "store_fence", "store_wait")}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("level", "name"), [(level, name) for level, names in REHEARSED.items() for name in names])
def test_the_rehearsal_finds_what_is_left_out(level: str, name: str) -> None:
    """Each op of that name, left out by itself; but the end of the batch that the next round's batch takes up, and the
    waits for a turn: who does not wait for it computes the same, out of turn."""
    lane = finish_lane(lowered(attention_bf16_64, specialization(), level=level), targets.target(level))
    missing = missed(lane, name)
    harmless = {"group_commit": [1], "signal_wait": [0, 2, 4]} if level == "sm_90a" else {}
    assert missing == harmless.get(name, [])


def test_groups_give_their_turns_to_each_other() -> None:
    """Each round: a turn is waited for before product 2, and given after product 1 of the next round."""
    lane = finish_lane(lowered(attention_bf16_128, specialization(), level="sm_90a"), targets.target("sm_90a"))
    starts = [op for op in lane.walk() if op.name == "signal_start"]
    turns = {op.attributes["disp"] for op in starts[:2]}
    assert [op.attributes["arrivals"] for op in starts[:2]] == [4, 4]
    told = {"signal_wait": "wait", "signal_arrive": "give", "group_commit": "products", "group_wait": "done"}
    for loop in [op for op in lane.walk() if op.name == "loop" and op.attributes["label"] == "p"]:
        ops = [op for op in loop.blocks[0].ops if op.name in told and (
            not op.name.startswith("signal") or op.attributes["disp"] == min(turns))]
        if any(op.name == "group_commit" for op in ops):
            assert [told[op.name] for op in ops] == ["products", "give", "done", "wait", "products"]


def test_loads_have_no_bank_conflicts() -> None:
    for entry, level in zip(KERNELS[:3], ("sm_80", "sm_80", "sm_90a"), strict=True):
        arguments, _ = made(entry, {"T": 128, "H": 1, "G": 1, "position": 64})
        counters = emulate.run(entry.kernel, *arguments.values(), target=level, workers=1, aligned=TENSORS).counters
        assert counters.shared_cycles == counters.shared_ideal


def test_the_first_loop_computes_no_condition() -> None:
    """The causal mask is known to hold there: its pieces are whole and before all of the block's rows."""
    text = compiled_for(attention_bf16_128, "sm_80").text()
    loops = [part for part in re.split(r"\n\$?\w+:", text) if "mma.sync" in part]
    assert len(loops) == 2
    assert loops[0].count("setp") < 12 < 48 < loops[1].count("setp")   # 32 elements of a thread, 16 columns


def test_what_is_not_chained() -> None:
    assert "warps" in lowered(attention_bf16_64, specialization()).attributes
    assert "warps" not in lowered(attention_bf16_64, specialization(aligned=False)).attributes
    assert "warps" not in lowered(attention_bf16_64, specialization(), Schedule(registers={"p": 4})).attributes
    assert "warps" not in lowered(find("attention_bf16").kernel, specialization()).attributes
    assert "warps" not in lowered(attention_bf16_64, specialization(), level="zen4").attributes


T, P = sp.dims("T P")


@sp.kernel
def biased(q: Tensor[bf16, T, 64], keys: Tensor[bf16, P, 64], values: Tensor[bf16, P, 48], bias: Tensor[f32, T, P],
           gate: Tensor[f32, P], out: Tensor[f32, T, 48], norm: Tensor[f32, T]):
    """Not causal: rows of the loop's axis, of the block's and of both are read; two results, of f32."""
    for t in tiles(T):
        d, e = whole(64), whole(48)
        highest = full(t, value=-1e30, dtype=f32)
        total = zeros(t, dtype=f32)
        acc = zeros(t, e, dtype=f32)
        for p in tiles(P):
            score = ((q[t, d] * 0.125).to(bf16) @ keys[p, d]) * gate[p] + bias[t, p]
            higher = maximum(highest, max(score, over=p))
            shrink = exp2(highest - higher)
            weight = exp2(score - higher)
            total = total * shrink + sum(weight, over=p)
            acc = acc * shrink + weight.to(bf16) @ values[p, e]
            highest = higher
        out[t, e] = acc / total
        norm[t] = total


def test_no_box_reaches_over_rows_that_are_not_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 rows end inside of the 128 that a worker has, where the next block begins."""
    for block, boxes in ((128, True), (64, False)):
        monkeypatch.setattr(attention_narrow, "QUERY_BLOCK", block)
        kernel = attention_narrow.make_attention(bf16, 64, 64)
        names = [op.name for op in lowered(kernel, specialization(), level="sm_90a").walk()]
        assert "group_multiply_rows" in names and ("tensor_store" in names) == boxes


@pytest.mark.parametrize("shape", [(64, 128), (150, 77)])
def test_what_stands_beside_the_contractions(shape: tuple[int, int]) -> None:
    count, filled = shape
    random = np.random.default_rng(2)
    kind = ml_dtypes.bfloat16
    q, keys, values = (random.standard_normal(s).astype(kind) for s in ((count, 64), (filled, 64), (filled, 48)))
    bias, gate = random.standard_normal(shape).astype(np.float32), random.standard_normal(filled).astype(np.float32)
    out, norm = np.full((count, 48), np.nan, np.float32), np.full(count, np.nan, np.float32)
    result = emulate.run(biased, q, keys, values, bias, gate, out, norm, target="sm_80", workers=2,
                         aligned=("q", "keys", "values", "out"))
    assert any(name.startswith("mma.sync") for name in result.counters.instructions)
    scaled = (q.astype(np.float32) * np.float32(0.125)).astype(kind).astype(np.float64)
    score = scaled @ keys.astype(np.float64).T * gate + bias
    weight = np.exp2(score - score.max(axis=1, keepdims=True))
    wanted = weight @ values.astype(np.float64) / weight.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(norm, weight.sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=5 * 2.0**-9)   # weights are rounded to bf16
