"""Bounds by random rounding: exact kernels have none, inexact ones a small one, open questions an infinite one."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from sapper.ir.types import bf16, f16, f32, f64, i32
from sapper.lang.builtins import argmax, exp, maximum, tiles, whole, zeros
from sapper.lang.dims import dims
from sapper.lang.kernel import kernel
from sapper.lang.tensor import Tensor
from sapper.tile.rounding import Expectation, expect, reached, rounds, ulp
from tests.strategies import assert_agree, tolerance

K, M, N = dims("K M N")


@kernel
def added(x: Tensor[f32, M], out: Tensor[f32, M]):
    for m in tiles(M):
        out[m] = x[m] + x[m] / 3.0


@kernel
def normed(x: Tensor[f32, M, N], out: Tensor[f32, M, N], best: Tensor[f32, M], at: Tensor[i32, M]):
    for m in tiles(M):
        n = whole(N)
        e = exp(x[m, n])
        out[m, n] = e / sum(e, over=n)
        best[m] = max(x[m, n], over=n)
        at[m] = argmax(x[m, n], over=n).to(i32)


def run_normed(x):
    rows = len(x)
    arguments = {"x": x, "out": np.zeros_like(x), "best": np.zeros(rows, np.float32), "at": np.zeros(rows, np.int32)}
    return expect(normed.tile_ir(), arguments)


def test_ulp():
    values = np.array([1.0, 1.5, 2.0, -3.0, 0.0, 1e-45, np.inf, np.nan], np.float32)
    expected = [2.0**-23, 2.0**-23, 2.0**-22, 2.0**-22, 2.0**-149, 2.0**-149, 0, 0]
    np.testing.assert_array_equal(ulp(values, f32), expected)
    assert ulp(np.array([1.0]), f64)[0] == np.spacing(1.0)
    assert ulp(np.array([1.0], ml_dtypes.bfloat16), bf16)[0] == 2.0**-7
    assert ulp(np.array([1.0], np.float16), f16)[0] == np.spacing(np.float16(1.0))


def test_exact_kernels_have_no_tolerance():
    x = np.array([1.0, np.nan, np.inf], np.float32)
    function = added.tile_ir()
    assert not reached(function, rounds)
    out = expect(function, {"x": x, "out": np.zeros(3, np.float32)})["out"]
    assert not out.bound.any()
    assert out.mismatch(out.values.copy()) is None
    nearly = out.values.copy()
    nearly[0] = np.nextafter(nearly[0], np.float32(9))
    assert "out[0] is" in str(out.mismatch(nearly))


def test_inexact_kernels_have_a_small_one():
    x = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)
    before = x.copy()
    expected = run_normed(x)
    np.testing.assert_array_equal(x, before)
    out = expected["out"]
    relative = out.bound / np.abs(out.values)
    assert relative.max() < 1e-5 and relative.min() > 0
    assert not expected["x"].bound.any() and not expected["best"].bound.any() and not expected["at"].bound.any()
    good = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    assert out.mismatch(good) is None
    assert out.mismatch(good * np.float32(1.0001)) is not None
    lacking = np.exp(x) / np.exp(x[:, :-1]).sum(axis=1, keepdims=True)
    assert out.mismatch(lacking) is not None
    assert "4 of 4 elements" in str(expected["at"].mismatch(expected["at"].values + 1))
    assert "expected float32" in str(out.mismatch(good.astype(np.float64)))


def test_an_array_of_two_names_has_the_bound_of_what_is_stored() -> None:
    """Also by the name that is only read."""
    @kernel(in_place=[("out", "x")])
    def moved(x: Tensor[f32, M], by: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = 0.9 * x[m] + 0.1 * by[m]

    x, by = np.random.default_rng(0).standard_normal((2, 9), dtype=np.float32)
    found = expect(moved.tile_ir(), {"x": x, "by": by, "out": x})
    np.testing.assert_array_equal(found["x"].bound, found["out"].bound)
    assert found["x"].bound.all() and not found["by"].bound.any()


def test_cancellation_widens_the_bound_of_its_element_only():
    x = np.zeros((2, 4), np.float32)
    x[0] = [1e8, 1.0, -1e8, 1.0]
    x[1] = [1.0, 2.0, 3.0, 4.0]

    @kernel
    def summed(x: Tensor[f32, M, N], out: Tensor[f32, M]):
        for m in tiles(M):
            n = whole(N)
            out[m] = sum(x[m, n], over=n)

    out = expect(summed.tile_ir(), {"x": x, "out": np.zeros(2, np.float32)})["out"]
    assert out.values[0] == 2.0 and out.bound[0] > 2.0 and out.bound[1] < 1e-4
    large = np.array([[3e38, 3e38, -3e38, -3e38], [np.inf, 1, 1, 1]], np.float32)
    out = expect(summed.tile_ir(), {"x": large, "out": np.zeros(2, np.float32)})["out"]
    assert np.isinf(out.bound[0])  # a partial sum may overflow
    assert out.bound[1] == 0 and out.mismatch(np.array([7.0, 1e30], np.float32)) is not None


def test_denormal_bf16_may_count_as_zero_in_products():
    @kernel
    def multiplied(a: Tensor[bf16, M, N], b: Tensor[bf16, N], out: Tensor[f32, M]):
        for m in tiles(M):
            n = whole(N)
            out[m] = a[m, n] @ b[n] + 1.0

    a = np.array([[2.0**-130, 0, 1], [1, 1, 0]], ml_dtypes.bfloat16)
    b = np.array([2.0**127, 1, 0], ml_dtypes.bfloat16)
    out = expect(multiplied.tile_ir(), {"a": a, "b": b, "out": np.zeros(2, np.float32)})["out"]
    assert out.values[0] == 1.125 and out.mismatch(np.array([1.0, out.values[1]], np.float32)) is None
    assert out.mismatch(np.array([1.125, out.values[1] * 0.99], np.float32)) is not None
    a, b = np.array([[2.0**-130, 0, 1], [1, 1, 1]], ml_dtypes.bfloat16), np.array([np.inf, 1, 2], ml_dtypes.bfloat16)
    out = expect(multiplied.tile_ir(), {"a": a, "b": b, "out": np.zeros(2, np.float32)})["out"]
    assert np.isinf(out.values).all() and out.mismatch(np.array([np.nan, np.inf], np.float32)) is None
    assert out.mismatch(np.array([np.inf, np.nan], np.float32)) is not None


def test_functions_that_flush_may_give_zero_below_the_normal_numbers():
    @kernel
    def weighted(x: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = exp(x[m]) * 64.0

    arguments = {"x": np.array([-88, -95, 0], np.float32), "out": np.zeros(3, np.float32)}
    for flushes in (False, True):
        out = expect(weighted.tile_ir(), arguments, flushes=flushes)["out"]
        assert (out.mismatch(np.array([0, 0, 64], np.float32)) is None) == flushes
        assert out.mismatch(out.values) is None and out.mismatch(out.values * np.array([1, 1, .99], np.float32))


def test_products_that_are_added_may_overflow_together():
    @kernel
    def both(a: Tensor[f32, M, N], b: Tensor[f32, N], out: Tensor[f32, M]):
        for m in tiles(M):
            n = whole(N)
            out[m] = a[m, n] @ b[n] - a[m, n] @ (b[n] * 0.5)

    a = np.array([[3e38, 0, 1], [1, 1, 1]], np.float32)
    arguments = {"a": a, "b": np.array([1, 1, 2], np.float32), "out": np.zeros(2, np.float32)}
    out = expect(both.tile_ir(), arguments)["out"]
    assert np.isfinite(out.values).all() and out.mismatch(np.array([np.inf, 2], np.float32)) is None
    assert out.mismatch(np.array([out.values[0], np.inf], np.float32)) is not None


def test_a_product_inside_a_sum_neither_overflows_nor_vanishes():
    @kernel
    def added(a: Tensor[f32, N], b: Tensor[f32, N], c: Tensor[f32, N], alone: Tensor[f32, N], out: Tensor[f32, N]):
        for n in tiles(N):
            alone[n] = a[n] * b[n]
            out[n] = a[n] * b[n] + c[n]

    a, b = np.array([3e38, 3e38, 1e-30, np.inf, 2], np.float32), np.array([3, 3, 1e-30, 2, 3], np.float32)
    c = np.array([-np.inf, -3e38, 2.0**-149, -np.inf, -6], np.float32)
    alone, out = np.zeros((2, 5), np.float32)
    found = expect(added.tile_ir(), {"a": a, "b": b, "c": c, "alone": alone, "out": out})
    alone, out = found["alone"], found["out"]
    assert np.isnan(out.values[[0, 3]]).all() and np.isposinf(out.values[1])
    fused = np.array([-np.inf, np.inf, 2.0**-148, np.nan, 0], np.float32)
    assert out.mismatch(fused) is None and out.bound[3] == 0 and out.bound[4] < 1e-5
    assert (alone.bound[[0, 1, 3]] == 0).all() and np.isinf(alone.values[[0, 1, 3]]).all()


def test_the_first_product_that_overflows_decides_of_a_sum():
    """A maximum with 0 hides the NaN that products of their own would give."""
    @kernel
    def rectified(a: Tensor[f32, M, N], b: Tensor[f32, M, N], out: Tensor[f32, N]):
        for n in tiles(N):
            acc = zeros(n, dtype=f32)
            for m in range(M):
                acc += a[m, n] * b[m, n]
            out[n] = maximum(acc, 0.0)

    a = np.array([[3e38, -3e38, 1], [-3e38, 3e38, 2], [1, 1, 3]], np.float32)
    arguments = {"a": a, "b": np.full_like(a, 9.0), "out": np.zeros(3, np.float32)}
    for seed in range(8):
        out = expect(rectified.tile_ir(), arguments, seed=seed)["out"]
        assert out.mismatch(np.array([np.inf, 0, 54], np.float32)) is None and np.isfinite(out.bound[2])
        assert out.mismatch(np.array([np.inf, 0, 55], np.float32)) is not None


def test_infinities_of_both_signs_are_nan_whatever_overflows():
    @kernel
    def summed(a: Tensor[f32, M, N], out: Tensor[f32, M]):
        for m in tiles(M):
            n = whole(N)
            out[m] = sum(a[m, n], over=n)

    a = np.array([[3e38, 3e38, np.inf, -np.inf], [3e38, 3e38, -3e38, np.inf]], np.float32)
    out = expect(summed.tile_ir(), {"a": a, "out": np.zeros(2, np.float32)}, runs=12)["out"]
    assert out.bound[0] == 0 and np.isnan(out.values[0])
    assert np.isinf(out.bound[1])


def test_values_joined_with_infinities_may_overflow_before():
    @kernel
    def joined(a: Tensor[f32, M, N], out: Tensor[f32, M]):
        for m, n in tiles(M, N):
            out[m + 0 * n] += a[m, n]

    a = np.array([[3e38, 3e38, -np.inf], [3e38, np.inf, -np.inf], [1, 2, np.inf]], np.float32)
    out = expect(joined.tile_ir(), {"a": a, "out": np.zeros(3, np.float32)}, runs=12)["out"]
    assert out.mismatch(np.array([np.nan, np.nan, np.inf], np.float32)) is None     # inf before -inf
    assert out.mismatch(np.array([-np.inf, np.inf, np.inf], np.float32)) is not None
    assert out.mismatch(np.array([-np.inf, np.nan, np.nan], np.float32)) is not None


def test_sums_that_overflow_may_all_do_so_the_same_way():
    """However many there are, the largest may be the least."""
    @kernel
    def largest(a: Tensor[f32, N], b: Tensor[f32, M, N], out: Tensor[f32, 1]):
        m, n = whole(M), whole(N)
        out[0] = max(a[n] @ b[m, n], over=m)

    a, b = np.array([3e38] * 8 + [-3e38] * 6, np.float32), np.ones((200, 14), np.float32)
    out = expect(largest.tile_ir(), {"a": a, "b": b, "out": np.zeros(1, np.float32)})["out"]
    assert np.isposinf(out.values[0])
    assert out.mismatch(np.array([-np.inf], np.float32)) is None


def test_one_of_many_sums_may_overflow_before_they_are_added_up():
    """More runs look for that where something would be wrong."""
    @kernel
    def layers(x: Tensor[f32, M, N], u: Tensor[f32, K, N], w: Tensor[f32, K], out: Tensor[f32, M]):
        for m in tiles(M):
            k, n = whole(K), whole(N)
            out[m] = maximum(x[m, n] @ u[k, n], 0.0) @ w[k]

    x = np.array([[3e38, 3e38, -3e38, 3e38], [1, 2, 3, 4]], np.float32)
    w = np.array([1e-30] * 5 + [-np.inf], np.float32)       # nothing of what becomes 0 is a number there
    arguments = {"x": x, "u": np.ones((6, 4), np.float32), "w": w, "out": np.zeros(2, np.float32)}
    out = expect(layers.tile_ir(), arguments)["out"]
    assert np.isnan(out.values[0]) and out.values[1] == -np.inf
    last_alone = np.array([-np.inf, -np.inf], np.float32)
    assert out.mismatch(last_alone) is None
    assert out.mismatch(np.array([-np.inf, np.inf], np.float32)) is not None
    assert Expectation("out", f32, out.values, out.bound).mismatch(last_alone) is not None


def test_nan_takes_no_part_in_a_maximum():
    x = np.random.default_rng(1).standard_normal((2, 20)).astype(np.float32)
    x[0, 7] = np.nan
    expected = run_normed(x)
    assert expected["best"].bound[0] == 0 and expected["best"].values[0] == np.nanmax(x[0])
    assert expected["at"].bound[0] == 0 and expected["at"].values[0] == np.nanargmax(x[0])


def test_expectation_of_infinities():
    one = Expectation("x", f32, np.array([np.inf, np.nan, 1.0], np.float32), np.array([0.0, 0.0, np.inf]))
    assert one.mismatch(np.array([np.inf, np.nan, -7.0], np.float32)) is None
    assert one.mismatch(np.array([-np.inf, np.nan, 1.0], np.float32)) is not None
    assert one.mismatch(np.array([np.inf, 1.0, 1.0], np.float32)) is not None
    assert one.mismatch(np.zeros(2, np.float32)) is not None


def test_simple_comparison():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((8, 300)).astype(np.float32), rng.standard_normal((300, 8)).astype(np.float32)
    exact = (a.astype(float) @ b.astype(float)).astype(np.float32)
    assert_agree(a @ b, exact, f32, 300)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_agree(a[:, :-1] @ b[:-1], exact, f32, 300)
    with pytest.raises(AssertionError, match="first at"):
        assert_agree(np.array([1.0, 5.0], np.float32), np.array([np.inf, 5.0], np.float32), f32)
    with pytest.raises(AssertionError):
        assert_agree(np.array([1], np.int32), np.array([2], np.int32), i32)
    assert tolerance(i32, 1000) == 0 and tolerance(f32, 10) < tolerance(f32, 1000) < tolerance(bf16)
