"""Kernels of several loops, of which some are products on matrix instructions: those that a kernel has, and those that
products become which are passed on (sapper/tile/product_parts.py)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sapper as sp
from sapper import (
    Tensor,
    bf16,
    each,
    emulate,
    exp,
    f16,
    f32,
    i8,
    i32,
    max,
    maximum,
    sigmoid,
    sum,
    targets,
    tiles,
    whole,
    zeros,
)
from sapper.codegen.pipeline import compile_kernel, facts_of, to_lane
from sapper.lane.choices import choices
from sapper.targets.ptx import assembler
from sapper.tile.canonical import canonicalize
from sapper.tile.interpret import interpret
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import DimClass, Schedule, Specialization

from .test_ptxas import needs_ptxas

B, D, H, K, M, N, S, T = sp.dims("B D H K M N S T")
NUMPY = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32, "i8": np.int8}


@sp.kernel
def gated_layer(x: Tensor[bf16, M, K], gate: Tensor[bf16, H, K], up: Tensor[bf16, H, K], down: Tensor[bf16, N, H],
                y: Tensor[bf16, M, N]):
    """SwiGLU with what follows it."""
    for m in tiles(M):
        k, h = whole(K), whole(H)
        left, right = x[m, k] @ gate[h, k], x[m, k] @ up[h, k]
        hidden = (left * sigmoid(left) * right).to(bf16)
        for n in tiles(N):
            y[m, n] = (hidden @ down[n, h]).to(bf16)


@sp.kernel
def biased_rows(q: Tensor[f16, B, T, D], k: Tensor[f16, B, S, D], v: Tensor[f16, B, S, D], bias: Tensor[f32, T, S],
                y: Tensor[f16, B, T, D]):
    for b in each(B):
        for t in tiles(T):
            d, s = whole(D), whole(S)
            score = (q[b, t, d] @ k[b, s, d]).to(f32) * 0.125 + bias[t, s]
            weight = exp(score - max(score, over=s))
            share = (weight / sum(weight, over=s)).to(f16)
            y[b, t, d] = (share @ v[b, s, d]).to(f16)


@sp.kernel
def exponential_rows(x: Tensor[f32, M, K], w: Tensor[f32, K, N], y: Tensor[f32, M, N], total: Tensor[f32, M]):
    """The operand is computed, in f32; a sum of it is stored besides."""
    for m in tiles(M):
        k, n = whole(K), whole(N)
        power = exp(x[m, k] - max(x[m, k], over=k))
        total[m] = sum(power, over=k)
        y[m, n] = power @ w[k, n]


@sp.kernel
def with_bias(x: Tensor[bf16, M, K], dy: Tensor[bf16, M, N], dw: Tensor[f32, K, N], dbias: Tensor[f32, N],
              largest: Tensor[f32, 1]):
    """Two loops, and what one worker does alone."""
    m = whole(M)
    for k, n in tiles(K, N):
        dw[k, n] = x[m, k] @ dy[m, n]
    for n_1 in tiles(N):
        dbias[n_1] = sum(dy[m, n_1].to(f32), over=m)
    n_2 = whole(N)
    largest[0] = max(dbias[n_2], over=n_2)


@sp.kernel
def window_bf16(x: Tensor[bf16, B, S, T, K], w: Tensor[bf16, 3, 2, K, N], y: Tensor[f32, B, D, M, N]):
    """A convolution, of windows of 3 by 2."""
    for b, d in each(B, D):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=f32)
            for i in range(3):
                for j in range(2):
                    for k in tiles(K):
                        acc += x[b, d + i, m + j, k] @ w[i, j, k, n]
            y[b, d, m, n] = maximum(acc, 0.0)


@sp.kernel
def window_i8(x: Tensor[i8, B, T, K], w: Tensor[i8, N, 3, K], scale: Tensor[f32, N], y: Tensor[f32, B, M, N]):
    for b in each(B):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=i32)
            for j in range(3):
                for k in tiles(K):
                    acc += x[b, m + j, k] @ w[n, j, k]
            y[b, m, n] = acc.to(f32) * scale[n]


@sp.kernel
def window_f32(x: Tensor[f32, H, T, K], w: Tensor[f32, H, D, K, N], y: Tensor[f32, M, N]):
    """The window's extents are the call's."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for i in range(H):
            for j in range(D):
                for k in tiles(K):
                    acc += x[i, m + j, k] @ w[i, j, k, n]
        y[m, n] = acc


KERNELS = {
    gated_layer: {"M": 97, "K": 72, "H": 136, "N": 80}, biased_rows: {"B": 2, "T": 70, "S": 101, "D": 64},
    exponential_rows: {"M": 66, "K": 75, "N": 68}, with_bias: {"M": 90, "K": 70, "N": 130},
    window_bf16: {"B": 1, "D": 2, "S": 4, "M": 71, "T": 72, "K": 70, "N": 66},
    window_i8: {"B": 2, "M": 70, "T": 72, "K": 192, "N": 72}, window_f32: {
        "H": 2, "D": 3, "M": 69, "T": 71, "K": 65, "N": 67}}


def arguments_of(kernel: Any, extents: dict[str, int]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    return {name: (random.standard_normal([d if isinstance(d, int) else extents[d] for d in type.dims]) * (
        50 if type.dtype is i8 else 0.25)).astype(NUMPY[type.dtype.name]) for name, type in kernel.parameters}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize(("kernel", "aligned", "level"), [
    (gated_layer, "x gate up down y", "sm_80"), (gated_layer, "", "sm_90a"), (biased_rows, "q k v", "sm_90a"),
    (exponential_rows, "", "sm_80"), (with_bias, "", "sm_80"), (window_bf16, "x w", "sm_80"),
    (window_bf16, "", "sm_90a"), (window_i8, "x w", "sm_80"), (window_f32, "", "sm_90a")],
    ids=lambda v: getattr(v, "name", v))
def test_on_the_emulator(kernel: Any, aligned: str, level: str, lazy: bool) -> None:
    """With races, uninitialised reads and bounds checked; ragged, and with rows in pieces of 16 bytes."""
    extents = KERNELS[kernel]
    if aligned:
        extents = {d: -(-n // 32) * 32 if d in "HKN" else n for d, n in extents.items()}
    arguments, wanted = arguments_of(kernel, extents), arguments_of(kernel, extents)
    interpret(kernel.tile_ir(), wanted)
    counters = emulate.run(kernel, *arguments.values(), target=level, workers=3, aligned=aligned.split(),
                           options=emulate.Options(lazy=lazy)).counters
    for name, found in arguments.items():
        tolerance = 1e-4 if found.dtype == np.float32 else 2e-2        # the sums are in another order
        np.testing.assert_allclose(found.astype(np.float64), wanted[name].astype(np.float64), rtol=tolerance,
                                   atol=tolerance)
    assert any(name.startswith("mma.sync") for name in counters.instructions)
    assert any(name.startswith("cp.async.cg") for name in counters.instructions) == bool(aligned)


def text_of(kernel: Any, level: str, static: dict[str, int] | None = None) -> str:
    dims = {d for _, type in kernel.parameters for d in type.dims if isinstance(d, str)} - (static or {}).keys()
    names = [name for name, _ in kernel.parameters]
    return compile_kernel(kernel, static or {}, dict.fromkeys(names, "contiguous"), dict.fromkeys(dims, (8192, 64)),
                          targets.target(level), None, frozenset(names)).text()


@needs_ptxas
@pytest.mark.parametrize("level", ["sm_80", "sm_90a"])
def test_nothing_is_spilled(level: str) -> None:
    texts = [text_of(kernel, level, {d: 16 for d in KERNELS[kernel] if d == "B"}) for kernel in KERNELS]
    made = assembler.assemble(texts, level)
    assert {name: one.spilled_bytes for name, one in made.items()} == {kernel.name: 0 for kernel in KERNELS}


def test_the_model_s_schedule_written_out_is_followed() -> None:
    """A search starts from it: what names tiles would leave products in the loops that pass them on."""
    facts = facts_of(targets.target("sm_80"))
    known = Specialization({d: DimClass(1024, 64) for d in "MKHN"}, {})

    def loops(schedule: Schedule) -> int:
        lane = to_lane(gated_layer.tile_ir(), schedule, facts, known)
        return [op.name for op in lane.walk()].count("matrix_multiply")

    function = gated_layer.tile_ir()
    reduce_loops(function)
    canonicalize(function)
    made = choices(function, Schedule(), facts, known)
    assert loops(made.schedule) == loops(Schedule()) > 0 == loops(Schedule(matrix=False))
    assert made.product is None


@sp.kernel
def scaled_by_all(x: Tensor[f32, M, K], scale: Tensor[f32, K], w: Tensor[f32, K, N], y: Tensor[f32, M, N]):
    """What all rows share spans no axis: a loop of its own would walk none."""
    for m, n in tiles(M, N):
        k = whole(K)
        y[m, n] = (x[m, k] * sum(scale[k] * scale[k], over=k)) @ w[k, n]


@pytest.mark.parametrize("level", ["sm_80", "sm_90a"])
def test_what_all_rows_share_spans_no_axis(level: str) -> None:
    random = np.random.default_rng(0)
    x, scale, w = (random.standard_normal(shape, dtype=np.float32) for shape in ((33, 17), (17,), (17, 20)))
    y = np.full((33, 20), np.nan, np.float32)
    code = compile_kernel(scaled_by_all, {}, dict.fromkeys(("x", "scale", "w", "y"), "contiguous"),
                          dict.fromkeys(("M", "K", "N"), (2**31 - 1, 1)), targets.target(level), None)
    emulate.run(scaled_by_all, x, scale, w, y, target=level, workers=9, code=code)
    np.testing.assert_allclose(y, (x * (scale * scale).sum()) @ w, rtol=1e-4, atol=1e-4)
