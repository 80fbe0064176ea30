"""Matrix products whose operands are brought through registers: unaligned, ragged, strided, rounded from f32."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, emulate, f32, i8, i32, tiles, zeros
from sapper.ir.verifier import verify
from sapper.lane.ops import LANE_OPS
from sapper.tile.interpret import interpret
from sapper.tile.schedule import DimClass, Specialization

from .kernels import bf16_nn, bf16_nt, f16_tn, gated
from .plain import both_rounded, either_way, gated_columns, rounded
from .test_matrix import lowered

NUMPY = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}


def arguments_of(kernel: Any, extents: dict[str, int]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    made = {name: random.standard_normal([extents[d] for d in type.dims]).astype(NUMPY[type.dtype.name])
            for name, type in kernel.parameters}
    made[list(made)[-1]][...] = np.nan
    return made


@pytest.mark.sampled(3)
@pytest.mark.parametrize("level", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(("kernel", "extents", "aligned"), [
    (rounded, {"M": 96, "N": 160, "K": 144}, "b"), (rounded, {"M": 131, "N": 77, "K": 101}, ""),
    (both_rounded, {"M": 130, "N": 70, "K": 99}, ""), (bf16_nn, {"M": 65, "N": 131, "K": 67}, ""),
    (bf16_nt, {"M": 100, "N": 99, "K": 75}, ""), (f16_tn, {"M": 67, "N": 70, "K": 130}, ""),
    (gated, {"M": 70, "N": 90, "K": 93}, ""), (gated_columns, {"M": 70, "N": 37, "K": 60}, "")],
    ids=lambda v: getattr(v, "name", None))
def test_on_the_emulator(kernel: Any, extents: dict[str, int], aligned: str, level: str) -> None:
    """Eager and lazy: with races, uninitialised reads and bounds checked."""
    for lazy in (False, True):
        arguments = arguments_of(kernel, extents)
        copies = {name: array.copy() for name, array in arguments.items()}
        interpret(kernel.tile_ir(), copies)
        counters = emulate.run(kernel, *arguments.values(), target=level, workers=2, aligned=aligned,
                               options=emulate.Options(lazy=lazy)).counters
        found, wanted = (a[list(a)[-1]].astype(np.float64) for a in (arguments, copies))
        narrow = kernel.parameters[-1][1].dtype.name != "f32"
        tolerance = 2e-2 if narrow else 1e-4        # the sums are in another order
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)
        assert any(name.startswith("mma.sync") for name in counters.instructions)


def test_strides_that_are_known_at_run_time_only() -> None:
    random = np.random.default_rng(1)
    wide = random.standard_normal((90, 200)).astype(ml_dtypes.bfloat16)
    a, b = wide[:, 1:181:2], random.standard_normal((90, 80)).astype(ml_dtypes.bfloat16)
    c = np.full((90, 80), np.nan, np.float32)
    counters = emulate.run(bf16_nn, a, b, c, target="sm_80", workers=1, aligned="").counters
    np.testing.assert_allclose(c, a.astype(np.float64) @ b.astype(np.float64), rtol=1e-4, atol=1e-4)
    assert any(name.startswith("mma.sync") for name in counters.instructions)


def test_an_operand_that_can_be_copied_is() -> None:
    known = Specialization({d: DimClass(4096, 16) for d in "MNK"}, dict.fromkeys("abc", "contiguous"), frozenset("b"))
    lane = lowered(rounded, known)
    verify(lane, LANE_OPS)
    names = {op.name for op in lane.walk()}
    assert {"async_copy", "pack2", "matrix_multiply"} <= names
    assert "async_copy" not in {op.name for op in lowered(both_rounded, known).walk()}


def test_tiles_of_two_products_whose_operands_lie_either_way() -> None:
    """A tile has as many columns as a piece that lies across takes, and half of the rows instead."""
    random = np.random.default_rng(2)
    x, one, other = (random.integers(-4, 5, shape).astype(ml_dtypes.bfloat16)
                     for shape in ((20, 36), (70, 36), (36, 70)))
    y = np.full((20, 70), np.nan, np.float32)
    counters = emulate.run(either_way, x, one, other, y, target="sm_80", workers=1, aligned="").counters
    np.testing.assert_array_equal(y, x.astype(np.float32) @ (one.T.astype(np.float32) - other.astype(np.float32)))
    assert any(name.startswith("mma.sync") for name in counters.instructions)


M, N, K = sp.dims("M N K")


@sp.kernel
def complex_parts(a: Tensor[i8, M, K], b: Tensor[i8, K, N], c: Tensor[i8, M, K], d: Tensor[i8, K, N],
                  real: Tensor[i32, N, M], imaginary: Tensor[i32, N, M]):
    for m, n in tiles(M, N):
        x, y = zeros(n, m, dtype=i32), zeros(n, m, dtype=i32)
        for k in tiles(K):
            x += a[m, k] @ b[k, n]
            x -= c[m, k] @ d[k, n]
            y += a[m, k] @ d[k, n]
            y += c[m, k] @ b[k, n]
        real[n, m], imaginary[n, m] = x, y


def test_a_sum_does_not_begin_with_one_that_is_made_after_it() -> None:
    random = np.random.default_rng(0)
    a, b, c, d = (random.integers(-9, 10, shape).astype(np.int8) for shape in ((3, 8), (8, 5)) * 2)
    real, imaginary = np.zeros((5, 3), np.int32), np.zeros((5, 3), np.int32)
    emulate.run(complex_parts, a, b, c, d, real, imaginary, target="sm_80", workers=2)
    product = (a + 1j * c) @ (b + 1j * d)
    np.testing.assert_array_equal(real.T, product.real)
    np.testing.assert_array_equal(imaginary.T, product.imag)


@sp.kernel
def distances(a: Tensor[f32, M, K], b: Tensor[f32, N, K], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += sp.sum(abs(a[m, k] - b[n, k]), over=k)
        c[m, n] = acc


@pytest.mark.parametrize("level", ["sm_80", "sm_90a"])
def test_a_sum_that_is_no_product(level: str) -> None:
    """It has one operand, and no matrix instruction."""
    arguments = arguments_of(distances, {"M": 33, "N": 18, "K": 21})
    emulate.run(distances, *arguments.values(), target=level, workers=2)
    a, b, found = arguments.values()
    np.testing.assert_allclose(found, np.abs(a[:, None] - b).sum(axis=2), rtol=1e-5)
