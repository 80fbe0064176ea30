"""Vectors that meet weights in panels: warps share the depth (sapper/lane/panel_vectors.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, each, emulate, f32, i8, sum, targets, tiles, u8, whole, zeros
from sapper.codegen.pipeline import compile_kernel, facts_of, to_lane
from sapper.kernels import find
from sapper.lane.choices import choices
from sapper.lane.panel_vectors import PanelNest, find_panels
from sapper.targets.ptx import assembler
from sapper.tile.canonical import canonicalize
from sapper.tile.interpret import interpret
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import DimClass, Schedule, Specialization

from .test_block_products import arguments_of, tensors_of

B, P = sp.dims("B P")
DOT = "dp4a.u32.s32"

CASES = {
    "matvec_q4": {"P": 3, "B": 43}, "matvec_swiglu_q8": {"P": 2, "B": 19}, "matvec_residual_q4m": {"P": 1, "B": 7},
    "matvec_q4k": {"P": 2, "S": 9}, "matvec_residual_q6k": {"P": 3, "S": 2},
    "expert_matvec_q4": {"E": 3, "K": 2, "P": 3, "B": 33},
    "expert_matvec_swiglu_q4m": {"E": 3, "K": 2, "P": 2, "B": 9},
    "expert_matmul_q4": {"E": 3, "K": 2, "P": 3, "G": 9},
    "expert_matmul_swiglu_q6k": {"E": 2, "K": 1, "P": 1, "S": 9},
    "matvec_residual_fp8": {"P": 3, "K": 1301, "A": 2}, "expert_matvec_fp8": {"E": 3, "S": 2, "P": 2, "K": 300, "A": 1},
}
"""Blocks by fours and single ones, fewer than warps, one panel of two; loops in blocks, a loop over experts around; one
part of two, of quantised numbers; all of the depth, which ends inside of a row of lanes."""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CASES)
def test_on_the_emulator(name: str) -> None:
    """Lazily where tensors are aligned; others have elements one by one."""
    entry, lazy = find(name), not name.endswith("q8")
    arguments = entry.make_arguments(np.random.default_rng(5), CASES[name])
    expected = entry.reference(arguments)
    run = emulate.run(entry.kernel, *arguments.values(), target="sm_80" if lazy else "sm_90a", workers=2,
                      aligned=tensors_of(entry.kernel) if lazy else [], options=emulate.Options(lazy=lazy))
    assert entry.compare(arguments, expected) is None
    assert (DOT in run.counters.instructions) == name.startswith("expert_matmul")


@sp.kernel
def odd(w: Tensor[u8, P, B, 2, 16, 4], x: Tensor[i8, B, 8], s: Tensor[f32, B, P, 16], y: Tensor[f32, P, 16],
        z: Tensor[f32, 16, P]):
    """A product of integers, a sum beside it, two values that are carried, of which one adds twice; two stores."""
    for p in tiles(P):
        l = whole(16)
        acc = zeros(p, l, dtype=f32)
        both = zeros(p, l, dtype=f32)
        for b in each(B):
            j, i = whole(2), whole(4)
            acc += (w[p, b, j, l, i] @ x.view(B, 2, 4)[b, j, i]).to(f32) * s[b, p, l]
            both += sum(w[p, b, j, l, i].to(f32), over=(j, i)) + s[b, p, l]
            both += 0.5
        y[p, l] = acc + both
        z[l, p] = both


@sp.kernel
def fading(w: Tensor[f32, P, B, 8, 16], x: Tensor[f32, B, 8], y: Tensor[f32, P, 16]):
    """What is carried is more than a sum."""
    for p in tiles(P):
        l = whole(16)
        acc = zeros(p, l, dtype=f32)
        for b in each(B):
            j = whole(8)
            acc = acc * 0.5 + w[p, b, j, l] @ x[b, j]
        y[p, l] = acc


@sp.kernel
def watched(w: Tensor[f32, P, B, 8, 16], x: Tensor[f32, B, 8], y: Tensor[f32, P, 16]):
    """Another value sees what a sum has come to."""
    for p in tiles(P):
        l = whole(16)
        acc = zeros(p, l, dtype=f32)
        most = zeros(p, l, dtype=f32)
        for b in each(B):
            j = whole(8)
            acc += w[p, b, j, l] @ x[b, j]
            most = sp.maximum(most, acc)
        y[p, l] = most


@sp.kernel
def wide(w: Tensor[f32, P, B, 8, 32], x: Tensor[f32, B, 8], y: Tensor[f32, P, 32]):
    for p in tiles(P):
        l = whole(32)
        acc = zeros(p, l, dtype=f32)
        for b in each(B):
            j = whole(8)
            acc += w[p, b, j, l] @ x[b, j]
        y[p, l] = acc


@sp.kernel
def rows(w: Tensor[f32, P, 16, B, 8], x: Tensor[f32, B, 8], y: Tensor[f32, P, 16]):
    """The depth lies along memory: no panels."""
    for p in tiles(P):
        l = whole(16)
        acc = zeros(p, l, dtype=f32)
        for b in each(B):
            j = whole(8)
            acc += w[p, l, b, j] @ x[b, j]
        y[p, l] = acc


@sp.kernel
def scaled(w: Tensor[i8, P, B, 16], x: Tensor[f32, P, B], s: Tensor[f32, 16, P], y: Tensor[f32, P, 16]):
    """Counted panels: an operand is computed, also of what has no place along the depth; the sum is added to itself."""
    for p in each(P):
        l = whole(16)
        acc = zeros(l, dtype=f32)
        for b in tiles(B):
            acc += (w[p, b, l].to(f32) * s[l, p]) @ x[p, b]
        y[p, l] = acc * s[l, p] + acc


@sp.kernel
def signs(w: Tensor[i8, P, B, 2, 16, 4], v: Tensor[u8, P, B, 2, 16, 4], x: Tensor[i8, B, 2, 4], y: Tensor[f32, P, 16]):
    """Bytes whose signs no instruction has, and others, of which each word is joined, shifted both ways and masked."""
    for p in tiles(P):
        l = whole(16)
        acc = zeros(p, l, dtype=f32)
        for b in each(B):
            j, i = whole(2), whole(4)
            q, bits = x[b, j, i], v[p, b, j, l, i]
            acc += ((w[p, b, j, l, i] >> 1) @ q).to(f32)
            acc += ((((bits << 3) | (bits >> 5)) ^ (bits & 51)) @ q).to(f32)
        y[p, l] = acc


def nest_of(kernel: Any) -> PanelNest | None:
    function = kernel.tile_ir()
    reduce_loops(function)
    canonicalize(function)
    return find_panels(function, function.body)


@pytest.mark.parametrize(("kernel", "blocks", "results"), [(odd, 21, 2), (scaled, 299, 1), (signs, 19, 1)],
                         ids=["odd", "scaled", "signs"])
def test_kernels_of_that_form(kernel: Any, blocks: int, results: int) -> None:
    nest = nest_of(kernel)
    assert nest is not None and [len(op.results) for op in nest.shared] == [results]
    arguments = arguments_of(kernel, {"P": 3, "B": blocks})
    copies = {name: array.copy() for name, array in arguments.items()}
    interpret(kernel.tile_ir(), copies)
    run = emulate.run(kernel, *arguments.values(), target="sm_80", workers=1, aligned=tensors_of(kernel))
    assert (DOT in run.counters.instructions) == (kernel is not scaled)
    for name in set("yz") & set(copies):
        np.testing.assert_allclose(arguments[name], copies[name], rtol=1e-5, atol=1e-5 * np.abs(copies[name]).max())


@pytest.mark.parametrize("kernel", [fading, watched, wide, rows], ids=lambda k: k.name)
def test_others_are_left(kernel: Any) -> None:
    assert nest_of(kernel) is None


def test_loops_that_warps_share() -> None:
    """That over blocks, and not the one inside, nor that over experts around it."""
    for name, depth in ("matvec_q4k", 0), ("expert_matvec_q4", 1):
        nest = nest_of(find(name).kernel)
        assert nest is not None
        (shared,) = nest.shared
        assert (shared in nest.body.ops) == (depth == 0)


def warps(blocks: int, schedule: Schedule) -> int:
    kernel = find("matvec_q4").kernel
    known = Specialization({"P": DimClass(256, 1), "B": DimClass(blocks, 1)},
                           dict.fromkeys(tensors_of(kernel), "contiguous"))
    function = to_lane(kernel.tile_ir(), schedule, facts_of(targets.target("sm_90a")), known)
    return int(function.attributes.get("warps", 1))


def test_short_depths_are_not_shared() -> None:
    """Nor what a schedule walks otherwise."""
    assert [warps(blocks, Schedule()) for blocks in (128, 8, 4)] == [8, 8, 1]
    assert warps(128, Schedule(lane="l")) == 1


@pytest.mark.parametrize("name", ["matvec_q4", "expert_matmul_q4"])
def test_what_is_chosen_is_chosen_again(name: str) -> None:
    kernel = find(name).kernel
    function = kernel.tile_ir()
    canonicalize(function)
    known = Specialization(dict.fromkeys(function.attributes["dims"], DimClass(64, 1)),
                           dict.fromkeys(tensors_of(kernel), "contiguous"))
    facts = facts_of(targets.target("sm_90a"))
    chosen = choices(function, Schedule(), facts, known).schedule
    assert to_lane(kernel.tile_ir(), chosen, facts, known).attributes["warps"] == 8


@pytest.mark.skipif(None in map(assembler.find_tool, ("ptxas", "nvdisasm")),
                    reason="ptxas or nvdisasm is not installed")
@pytest.mark.parametrize(("name", "weights", "loads", "most"), [
    ("matvec_q4", 4 * 32, 4 * 13, 4.0), ("matvec_fp8", 4 * 16, 4 * 2, 3.0), ("expert_matmul_q4", 4 * 32, 33, 1.5),
    ("expert_matmul_q4k", 8 * 32, 63, 1.2)])
def test_machine_code(name: str, weights: int, loads: int, most: float) -> None:
    """Of so many weights of a lane, in 16 bytes each: a multiply-add, one and a half or two operations that make them
    floats, and up to half an operation more. Where vectors are of bytes, an instruction multiplies four."""
    kernel = find(name).kernel
    names = tensors_of(kernel)
    function = kernel.tile_ir()
    text = compile_kernel(kernel, {}, dict.fromkeys(names, "contiguous"),
                          dict.fromkeys(function.attributes["dims"], (2**31 - 1, 64)), targets.target("sm_90a"), None,
                          frozenset(names)).text()
    (made,) = assembler.assemble([text], "sm_90a").values()
    loop = max((loop for loop in made.loops() if not loop["BAR"]), key=lambda loop: loop.total())
    assert not made.spilled_bytes and loop["LDG"] == loads
    assert loop["IDP"] >= weights // 4 if name.startswith("expert_matmul") else loop["FFMA"] >= weights
    assert loop.total() <= weights * most
