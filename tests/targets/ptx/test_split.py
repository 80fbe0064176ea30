"""f32 operands on matrix instructions of bf16, as sums of three parts: as exact as f32, whatever the elements are."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, bf16, emulate, f32, tiles, zeros
from sapper.kernels import find
from sapper.lane.matrix import plane_pairs
from sapper.tile.schedule import DimClass, Specialization

from .plain import rounded
from .test_matrix import lowered

M, N, K = sp.dims("M N K")


@sp.kernel
def both(a: Tensor[f32, M, K], b: Tensor[f32, N, K], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[n, k]
        c[m, n] = acc


@sp.kernel
def left_only(a: Tensor[f32, M, K], b: Tensor[bf16, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[k, n]
        c[m, n] = acc


@sp.kernel
def right_only(a: Tensor[bf16, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[k, n]
        c[m, n] = acc


@pytest.mark.sampled(4)
@pytest.mark.parametrize("level", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(("kernel", "aligned"), [(both, ""), (left_only, ""), (left_only, "b"), (right_only, "")],
                         ids=lambda v: getattr(v, "name", v))
@pytest.mark.parametrize("extents", [(64, 128, 64), (70, 133, 99), (129, 66, 130)], ids=str)
def test_as_exact_as_f32(kernel: Any, aligned: str, extents: tuple[int, int, int], level: str) -> None:
    m, n, k = extents
    if aligned and n % 8:
        pytest.skip("rows of 16 bytes only")
    random = np.random.default_rng(m)
    types = [type.dtype.name for _, type in kernel.parameters]
    a, b = (random.standard_normal(shape).astype(np.float32) * 10.0 ** random.uniform(-3, 3, shape)
            for shape in ((m, k), (k, n)))
    a, b = (x.astype(np.float32 if t == "f32" else ml_dtypes.bfloat16) for x, t in zip((a, b), types, strict=False))
    c = np.full((m, n), np.nan, np.float32)
    given = b if kernel is not both else np.ascontiguousarray(b.T)
    counters = emulate.run(kernel, a, given, c, target=level, workers=2, aligned=aligned).counters
    assert any(name.startswith("mma.sync") for name in counters.instructions)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    terms = np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64))
    # K sums are rounded, of each product 2^-23 is left out, and the emulator's mma rounds each of its sums once more.
    assert (np.abs(c - exact) <= (k + 4) * 2.0**-24 * terms).all()
    # What splitting must not lose: rounding a to bf16 alone would be off by far more.
    assert np.abs(c - exact).max() < 2.0**-18 * terms.max()


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize(("kernel", "depth", "aligned"), [(left_only, 128, "ac"), (rounded, 80, "abc")],
                         ids=lambda v: getattr(v, "name", v))
def test_neighbours_are_taken_together(kernel: Any, depth: int, aligned: str, lazy: bool) -> None:
    """Of rows that start at multiples of 64 bytes, where the other operand's start anywhere, or there are no parts; the
    last piece of 80 numbers is masked. Rows past the edge repeat."""
    random = np.random.default_rng(depth)
    types = [type.dtype.name for _, type in kernel.parameters]
    kinds = [np.float32 if t == "f32" else ml_dtypes.bfloat16 for t in types]
    a, b = random.standard_normal((70, depth)).astype(kinds[0]), random.standard_normal((96, depth)).astype(kinds[1])
    c = np.full((70, 96), np.nan, np.float32)
    given = np.ascontiguousarray(b.T) if kernel is left_only else b
    counters = emulate.run(kernel, a, given, c, target="sm_80", workers=2, aligned=aligned,
                           options=emulate.Options(lazy=lazy)).counters
    left = a.astype(ml_dtypes.bfloat16) if kernel is rounded else a
    exact = left.astype(np.float64) @ b.astype(np.float64).T
    np.testing.assert_allclose(c, exact, rtol=0, atol=1e-4)
    assert counters.instructions["ld.global.v4.b32"] and counters.instructions["st.shared.v4.b32"]
    assert "ld.global.b32" not in counters.instructions and counters.shared_cycles < 1.1 * counters.shared_ideal


def test_infinities_nans_and_the_largest() -> None:
    """Only what f32 arithmetic makes of them comes out."""
    a, b = np.zeros((64, 64), np.float32), np.zeros((64, 64), np.float32)
    largest, tiny = np.finfo(np.float32).max, np.float32(1e-42)
    a[:8, 0] = np.inf, -np.inf, np.nan, largest, -largest, tiny, np.float32(3.4e38), 1.0
    b[0, 0], b[0, 2] = 0.5, 1_001_003.0    # the second's middle part is below zero
    b[0, 3], b[0, 4], b[0, 5] = np.inf, -np.inf, np.nan
    c = np.full((64, 64), np.nan, np.float32)
    with np.errstate(all="ignore"):
        emulate.run(both, a, np.ascontiguousarray(b.T), c, target="sm_80", workers=1, aligned="")
    with np.errstate(all="ignore"):
        # What is below the least normal number may be lost.
        np.testing.assert_allclose(c[:8, 0], a[:8, 0] * np.float32(0.5), rtol=0, atol=2.0**-127)
        known = [0, 1, 2, 5, 7]             # sums of finite terms that overflow are anything (docs/language.md)
        np.testing.assert_allclose(c[known, 2], a[known, 0] * b[0, 2], rtol=2.0**-22, atol=2.0**-126 * 1.1e6)
        known = [0, 1, 2, 3, 4, 6, 7]       # a tiny number may be 0
        np.testing.assert_array_equal(c[known, 3:6], a[known, :1] * b[:1, 3:6])
    assert (c[8:, :3] == 0).all() and np.isnan(c[8:, 3:6]).all() and np.isnan(c[:3, 1]).all()  # infinity times 0
    assert (c[3:8, 1] == 0).all()


def test_only_products_that_f32_would_lose_are_left_out() -> None:
    assert plane_pairs(3, 1) == [(2, 0), (1, 0), (0, 0)]
    assert plane_pairs(1, 3) == [(0, 2), (0, 1), (0, 0)]
    assert sorted(plane_pairs(3, 3)) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    assert plane_pairs(3, 3)[-1] == (0, 0)


def test_which_walks_are_split() -> None:
    known = Specialization({d: DimClass(4096, 16) for d in "MNK"}, dict.fromkeys("abc", "contiguous"), frozenset("b"))
    for kernel, products in ((both, 6), (left_only, 3), (right_only, 3)):
        lane = lowered(kernel, known)
        sums = [op for op in lane.walk() if op.name == "matrix_multiply"]
        assert len(sums) == products * 2 * 4 * 4    # 16 x 8 blocks of a warp's 32 x 32, 16 deep four times
    few = Specialization({d: DimClass(16, 1) for d in "MNK"}, dict.fromkeys("abc", "contiguous"), frozenset())
    assert not [op for op in lowered(both, few).walk() if op.name == "matrix_multiply"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["matmul_nn_f32", "matmul_nt_bf16", "matmul_tn_bf16", "matmul_nt_bias_gelu_f32",
                                  "matmul_swiglu_bf16", "batched_matmul_nt_f32", "masked_matmul_nt_f32"])
def test_library_kernels(name: str) -> None:
    entry = find(name)
    shape = max((s for s in entry.check_shapes if np.prod(list(s.values())) <= 300_000),
                key=lambda s: int(np.prod(list(s.values()))))
    shape = {dim: max(size, 65) if dim in "MNK" else size for dim, size in shape.items()}
    arguments = entry.make_arguments(np.random.default_rng(5), shape)
    expected = entry.reference(arguments)
    counters = emulate.run(entry.kernel, *arguments.values(), target="sm_80", workers=2).counters
    assert any(name.startswith("mma.sync") for name in counters.instructions)
    wrong = entry.compare(arguments, expected)
    assert wrong is None, wrong
