"""Sums of groups of warps stored by copies of boxes: as lane IR, as PTX on the emulator, with faults planted."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, bf16, each, emulate, exp, f16, f32, maximum, span, targets, tiles, where, zeros
from sapper.codegen.pipeline import Compiled, compile_kernel, facts_of, finish_lane, to_lane
from sapper.emulate.errors import MemoryFault, RaceError
from sapper.ir.nodes import Function
from sapper.ir.text import parse_function, print_function
from sapper.ir.verifier import verify
from sapper.lane.ops import LANE_OPS
from sapper.lane.rehearse import rehearse
from sapper.targets.ptx import assembler
from sapper.tile.ops import TILE_OPS
from sapper.tile.schedule import DimClass, Schedule, Specialization
from tests.lane.test_rehearse import changed, dropped

from .kernels import bf16_nn, bf16_nt, gated
from .test_groups import interpret_lane
from .test_matrix import arguments_of, expected

TARGET = targets.target("sm_90a")
B, M, N, K = sp.dims("B M N K")
STORE = re.compile(r"cp\.async\.bulk\.tensor\.\dd\.global")


@sp.kernel
def f16_nn(a: Tensor[f16, M, K], b: Tensor[f16, K, N], c: Tensor[f16, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[k, n]
        c[m, n] = acc.to(f16)


@sp.kernel
def gated_bf16(x: Tensor[bf16, M, K], gate: Tensor[bf16, N, K], up: Tensor[bf16, N, K], y: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        g = zeros(m, n, dtype=f32)
        u = zeros(m, n, dtype=f32)
        for k in tiles(K):
            g += x[m, k] @ gate[n, k]
            u += x[m, k] @ up[n, k]
        y[m, n] = (g / (1.0 + exp(-g)) * u).to(bf16)


@sp.kernel
def batched_bf16(a: Tensor[bf16, B, M, K], b: Tensor[bf16, B, N, K], c: Tensor[bf16, B, M, N]):
    for i in each(B):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=f32)
            for k in tiles(K):
                acc += a[i, m, k] @ b[i, n, k]
            c[i, m, n] = acc.to(bf16)


@sp.kernel
def added(a: Tensor[bf16, M, K], b: Tensor[bf16, N, K], bias: Tensor[f32, N], c: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[n, k]
        c[m, n] = (acc + bias[n]).to(bf16)


@sp.kernel
def rescaled(a: Tensor[bf16, M, K], b: Tensor[bf16, N, K], by_row: Tensor[f32, M], bias: Tensor[bf16, N],
             residual: Tensor[bf16, M, N], c: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[n, k]
        c[m, n] = maximum(acc * by_row[m] + bias[n].to(f32) + residual[m, n].to(f32), 0.0).to(bf16)


@sp.kernel
def residual_f32(a: Tensor[bf16, M, K], b: Tensor[bf16, N, K], residual: Tensor[f32, M, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[n, k]
        c[m, n] = residual[m, n] + acc


@sp.kernel
def by_columns(a: Tensor[bf16, M, K], b: Tensor[bf16, N, K], table: Tensor[f32, N, M], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[n, k]
        c[m, n] = acc * table[n, m]


@sp.kernel
def lower(a: Tensor[bf16, M, K], b: Tensor[bf16, N, K], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[n, k]
        c[m, n] = where(n <= m, acc, 0.0)


@sp.kernel
def turned(a: Tensor[bf16, M, K], b: Tensor[bf16, N, K], up: Tensor[bf16, N, K], c: Tensor[bf16, N, M]):
    """Two products with one left operand."""
    for m, n in tiles(M, N):
        g = zeros(m, n, dtype=f32)
        u = zeros(m, n, dtype=f32)
        for k in tiles(K):
            g += a[m, k] @ b[n, k]
            u += a[m, k] @ up[n, k]
        c[n, m] = (g + u).to(bf16)


@sp.kernel
def some_rows(a: Tensor[bf16, M, K], b: Tensor[bf16, N, K], c: Tensor[bf16, M, N]):
    for m, n in tiles(span(0, M - 8), N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[n, k]
        c[m, n] = acc.to(bf16)


def assert_rounded(found: np.ndarray, wanted: np.ndarray) -> None:
    """The sums are in another order, so that some are rounded to the next number."""
    tolerance = 2e-3 if found.dtype == np.float16 else 2e-2
    np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=tolerance, atol=tolerance)


BOXED = (bf16_nt, f16_nn, gated_bf16, batched_bf16, added, rescaled, residual_f32, by_columns, lower, bf16_nn, gated)


def lane_of(kernel: Any, tile: dict[str, int], aligned: str = "all") -> Function:
    names = [name for name, _ in kernel.parameters]
    dims = {d: DimClass(4096, 1 if d == "B" else 32) for d in "BMNK"}
    known = Specialization(dims, dict.fromkeys(names, "contiguous"),
                           frozenset(names if aligned == "all" else names[:-1]))
    return finish_lane(to_lane(kernel.tile_ir(), Schedule(tile=tile), facts_of(TARGET), known), TARGET)


def stores_boxes(lane: Function) -> bool:
    return any(op.name == "tensor_store" for op in lane.walk())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kernel", BOXED, ids=lambda k: k.name)
def test_the_lane_station(kernel: Any) -> None:
    extents = {"M": 96, "N": 160, "K": 96, "B": 2}
    arguments = arguments_of(kernel, extents)
    lane = lane_of(kernel, {"m": 64, "n": 64})
    verify(lane, LANE_OPS)
    assert stores_boxes(lane) and rehearse(lane) == []
    text = print_function(lane)
    assert print_function(parse_function(text, {"tile": TILE_OPS, "lane": LANE_OPS})) == text
    wanted = expected(kernel, arguments)
    interpret_lane(lane, arguments, extents, workers=2)
    assert_rounded(arguments[list(arguments)[-1]], wanted)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("kernel", "tile", "lazy"), [
    (bf16_nt, (128, 256), True), (bf16_nt, (64, 64), False), (f16_nn, (128, 128), True), (f16_nn, (64, 128), False),
    (gated_bf16, (128, 128), True), (batched_bf16, (64, 64), True), (rescaled, (128, 256), True),
    (added, (64, 64), False), (residual_f32, (128, 256), True), (by_columns, (64, 128), False),
    (lower, (64, 64), False), (bf16_nn, (64, 64), True), (gated, (128, 128), False)], ids=str)
def test_on_the_emulator(kernel: Any, tile: tuple[int, int], lazy: bool) -> None:
    """Several tiles for each of two workers; edges in all three directions, and columns that a box is cut off at."""
    extents = {"B": 2, "M": tile[0] + 40, "N": tile[1] + 32, "K": 144}
    arguments = arguments_of(kernel, extents)
    wanted = expected(kernel, arguments)
    counters = emulate.run(kernel, *arguments.values(), target="sm_90a", workers=2, aligned=list(arguments),
                           schedule=Schedule(tile={"m": tile[0], "n": tile[1]}),
                           options=emulate.Options(lazy=lazy)).counters
    assert_rounded(arguments[list(arguments)[-1]], wanted)
    assert any(map(STORE.match, counters.instructions)) and "st.global" not in " ".join(counters.instructions)
    assert counters.shared_cycles == counters.shared_ideal
    if kernel in (bf16_nt, bf16_nn, gated):         # nothing is loaded by lanes
        assert counters.global_sectors == counters.global_ideal


@pytest.mark.parametrize("kernel", [turned, some_rows], ids=lambda k: k.name)
def test_what_is_no_box_of_sums_is_stored_by_lanes(kernel: Any) -> None:
    """Sums across the rows, and rows that end before the tensor does."""
    tile = {"m": 64, "n": 64} if kernel is turned else {}
    assert not stores_boxes(lane_of(kernel, tile))
    extents = {"M": 80, "N": 96, "K": 64}
    arguments = arguments_of(kernel, extents)
    before = arguments["c"].copy()
    wanted = expected(kernel, arguments)
    emulate.run(kernel, *arguments.values(), target="sm_90a", workers=2, aligned=list(arguments),
                schedule=Schedule(tile=tile))
    kept = ~np.isnan(wanted)
    assert_rounded(arguments["c"][kept], wanted[kept])
    assert np.isnan(before).all() and np.isnan(arguments["c"].astype(np.float32)).sum() == (~kept).sum()


def test_a_tensor_whose_rows_may_lie_anywhere_is_stored_by_lanes() -> None:
    assert not stores_boxes(lane_of(bf16_nt, {"m": 64, "n": 64}, aligned="operands"))


FAULTS = {
    "not waited for before the next": (dropped("store_wait", 0), "store_matrix: found a write over what may still"),
    "not waited for at the end": (dropped("store_wait", -1), "did not wait for before its end"),
    "no fence": (dropped("store_fence"), "tensor_store: found ordinary stores that copies and matrix instructions"),
    "the wrong panel": (changed("tensor_store", disp=64), "found"),
    "over the signals": (changed("store_matrix", 0, disp=1 << 15), "found"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_in_lane_ir(fault: str) -> None:
    plant, message = FAULTS[fault]
    lane = lane_of(bf16_nt, {"m": 64, "n": 64})
    plant(lane)
    assert any(message in str(found) for found in rehearse(lane)), rehearse(lane)


@pytest.mark.parametrize("number", range(0, 8, 3))
def test_a_piece_that_comes_too_early_over_another(number: int) -> None:
    """Eight pieces of 32 columns take turns in two places."""
    lane = lane_of(bf16_nn, {"m": 128, "n": 256})
    assert sum(op.name == "store_wait" for op in lane.walk()) == 9 and rehearse(lane) == []
    changed("store_wait", number, pending=2)(lane)
    assert any("store_run: found a write over what may still be read" in str(found) for found in rehearse(lane))


def without(pattern: str, number: int = 0) -> Callable[[str], str]:
    """Without the instruction `number` that matches."""
    def change(text: str) -> str:
        found = list(re.finditer(rf"^ .*{pattern}.*\n", text, re.MULTILINE))[number]
        return text[:found.start()] + text[found.end():]

    return change


@pytest.mark.parametrize("plant, lazy, error", [
    (without(r"fence\.proxy\.async\.shared::cta"), False, RaceError),
    (lambda text: text.replace("fence.proxy.async.shared::cta", "fence.proxy.async.global", 1), False, RaceError),
    (without(r"cp\.async\.bulk\.wait_group\.read"), True, RaceError),
    (lambda text: text.replace("wait_group.read 0", "wait_group.read 1", 1), True, RaceError),
    (without("stmatrix", 3), False, MemoryFault)],
    ids=["fence", "fence of another memory", "wait", "weak wait", "sums left out"])
def test_planted_faults_in_the_text(plant: Callable[[str], str], lazy: bool, error: Any) -> None:
    """Two tiles for one worker, so that the second's sums come over what is copied."""
    arguments = arguments_of(bf16_nt, {"M": 128, "N": 64, "K": 64})
    names = list(arguments)
    made: Compiled = compile_kernel(
        bf16_nt, {}, dict.fromkeys(names, "contiguous"), dict.fromkeys("MNK", (128, 64)), TARGET,
        Schedule(tile={"m": 64, "n": 64}), frozenset(names))
    options = emulate.Options(lazy=lazy)
    emulate.run(bf16_nt, *arguments.values(), target="sm_90a", workers=1, code=made, options=options)
    text = plant(made.text())
    assert text != made.text()
    with pytest.raises(error):
        emulate.run(bf16_nt, *arguments.values(), target="sm_90a", workers=1, options=options,
                    code=dataclasses.replace(made, text=lambda: text))


@pytest.mark.skipif(assembler.find_tool("ptxas") is None, reason="ptxas is not installed")
def test_ptxas_spills_nothing() -> None:
    for kernel in (bf16_nt, gated_bf16, batched_bf16, rescaled, residual_f32, by_columns):
        names = [name for name, _ in kernel.parameters]
        text = compile_kernel(kernel, {}, dict.fromkeys(names, "contiguous"), dict.fromkeys("BMNK", (2**31 - 1, 64)),
                              TARGET, None, frozenset(names)).text()
        wide = kernel.parameters[-1][1].dtype is f32
        assert STORE.search(text) and ("stmatrix" in text) != wide
        assert assembler.assemble([text], "sm_90a")[kernel.name].spilled_bytes == 0
