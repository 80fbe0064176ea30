"""Attention on matrix instructions: contractions chained in registers, at the lane station and on the emulator."""

from __future__ import annotations

import re
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
from sapper.kernels import find
from sapper.kernels.attention_narrow import KERNELS, attention_bf16_64, attention_bf16_128
from sapper.kernels.record import Arguments, LibraryKernel
from sapper.lane.interpret import Memory, run
from sapper.lane.ops import LANE_OPS
from sapper.lane.rehearse import rehearse
from sapper.tile.ops import TILE_OPS
from sapper.tile.schedule import DimClass, Schedule, Specialization

from .test_matrix import without

TENSORS = ("q", "keys", "values", "out")
RAGGED = ({"T": 128, "H": 1, "G": 1, "position": 0}, {"T": 145, "H": 1, "G": 2, "position": 51},
          {"T": 3, "H": 2, "G": 1, "position": 200}, {"T": 0, "H": 1, "G": 1, "position": 0})


def specialization(aligned: bool = True) -> Specialization:
    return Specialization({d: DimClass(2048, 1) for d in "THGP"}, dict.fromkeys(TENSORS, "contiguous"),
                          frozenset(TENSORS if aligned else ()))


def lowered(kernel: Any, known: Specialization, schedule: Schedule | None = None, level: str = "sm_80") -> Function:
    return to_lane(kernel.tile_ir(), schedule or Schedule(), facts_of(targets.target(level)), known)


def made(entry: LibraryKernel, shape: dict[str, int]) -> tuple[Arguments, dict[str, Any]]:
    arguments = entry.make_arguments(np.random.default_rng(5), shape)
    with np.errstate(all="ignore"):
        return arguments, entry.reference(arguments)


def compiled_for(kernel: Any, level: str) -> Any:
    known = specialization()
    return compile_kernel(kernel, {}, known.strides, dict.fromkeys("THGP", (4096, 1)), targets.target(level), None,
                          known.aligned)


@pytest.mark.parametrize("entry", KERNELS, ids=lambda entry: entry.name)
def test_lane_ir(entry: LibraryKernel) -> None:
    shape = {"T": 40, "H": 1, "G": 1, "position": 45}
    arguments, expected = made(entry, shape)
    lane = lowered(entry.kernel, specialization())
    assert lane.attributes["warps"] > 1
    verify(lane, LANE_OPS)
    text = print_function(lane)
    assert print_function(parse_function(text, {"tile": TILE_OPS, "lane": LANE_OPS})) == text
    lane = finish_lane(lane, targets.target("sm_80"))
    memory = Memory()
    words = [0, 0, memory.allocate("sync", 1024)]
    extents = {**shape, "P": arguments["keys"].shape[1]}
    for slot in lane.attributes["slots"]:
        name, _, kind = slot.partition(".")
        words.append(memory.add_array(name, arguments[name]) if kind == "data" else extents[kind] if name == "dim" else
                     int(np.float32(arguments[kind]).view(np.int32)) if kind == "scale" else arguments[kind])
    run(lane, np.array(words), memory, workers=2)
    assert entry.compare(arguments, expected) is None, entry.compare(arguments, expected)


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("entry", KERNELS, ids=lambda entry: entry.name)
def test_on_the_emulator(entry: LibraryKernel, lazy: bool) -> None:
    """Races, uninitialised reads and accesses out of bounds raise; lazy: a copy lands only when it is waited for."""
    for shape in RAGGED[1:2] if lazy or entry is not KERNELS[0] else RAGGED:
        arguments, expected = made(entry, shape)
        result = emulate.run(entry.kernel, *arguments.values(), target="sm_80", workers=2, aligned=TENSORS,
                             options=emulate.Options(lazy=lazy))
        assert entry.compare(arguments, expected) is None, entry.compare(arguments, expected)
        assert any(name.startswith("mma.sync") for name in result.counters.instructions) == (shape["T"] > 0)


@pytest.mark.parametrize(("part", "number"), [("bar.sync", 1), ("bar.sync", 2), ("cp.async.wait_group", 0),
                                              ("cp.async.wait_group", 1)])
def test_no_meeting_can_be_left_out(part: str, number: int) -> None:
    """The same program without one of them is caught, or wrong."""
    entry = find("attention_bf16_64")
    compiled = compiled_for(entry.kernel, "sm_80")
    shape = {"T": 256, "H": 1, "G": 1, "position": 70}
    arguments, expected = made(entry, shape)
    extents = {**shape, "P": arguments["keys"].shape[1]}
    words = [arguments[s.split(".")[0]] if s.endswith("data") else extents[s.split(".")[1]] if s.startswith("dim") else
             arguments[s.split(".")[1]] for s in compiled.slots]
    words = [int(np.float32(w).view(np.int32)) if isinstance(w, float) else w for w in words]
    faulty = emulate.load(without(compiled.text(), part, number))
    try:
        faulty.launch(grid=(1,), block=(32 * compiled.warps,),
                      arguments=[np.zeros(64), 64, np.zeros(1024, np.uint8), *words],
                      shared_bytes=compiled.near_bytes, options=emulate.Options(lazy=True))
    except emulate.EmulationError:
        return
    assert entry.compare(arguments, expected) is not None


@pytest.mark.parametrize("name", ["async_wait", "sync_warps", "async_commit"])
def test_the_rehearsal_finds_what_is_left_out(name: str) -> None:
    """Each op of that name in a loop, left out by itself."""
    places = [(b, i) for b in _blocks(_finished()) for i, op in enumerate(b.ops) if op.name == name]
    inside = [n for n, (b, _) in enumerate(places) if any(op.name == "matrix_multiply" for op in b.ops)]
    assert len(inside) == 2
    for number in inside:
        lane = _finished()
        block, at = [(b, i) for b in _blocks(lane) for i, op in enumerate(b.ops) if op.name == name][number]
        del block.ops[at]
        assert rehearse(lane), f"{name} {number}"


def _finished() -> Function:
    return finish_lane(lowered(attention_bf16_64, specialization()), targets.target("sm_80"))


def _blocks(function: Function) -> list[Any]:
    return [function.body, *(b for op in function.walk() for b in op.blocks)]


def test_loads_have_no_bank_conflicts() -> None:
    for entry in KERNELS[:2]:
        arguments, _ = made(entry, {"T": 128, "H": 1, "G": 1, "position": 64})
        counters = emulate.run(entry.kernel, *arguments.values(), target="sm_80", workers=1, aligned=TENSORS).counters
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
    assert "warps" not in lowered(attention_bf16_64, specialization(), Schedule(registers={"t": 4})).attributes
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
