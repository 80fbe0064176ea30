"""Loops that only accumulate become reductions, whatever the order of axes of what they add."""

from __future__ import annotations

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, f32, tiles, zeros
from sapper.ir.verifier import verify
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS
from sapper.tile.reduce_loops import reduce_loops

M, N, K = sp.dims("M N K")


@sp.kernel
def in_order(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        total = zeros(m, n, dtype=f32)
        for k in tiles(K):
            total += a[m, k] @ b[k, n]
        c[m, n] = sp.exp(total)


@sp.kernel
def factors_turned(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        total = zeros(m, n, dtype=f32)
        for k in tiles(K):
            total += b[k, n] @ a[m, k]
        c[m, n] = sp.exp(total)


@sp.kernel
def elementwise(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    """The sum has its axes in the order (n, m): an addition to zeros of order (m, n) has to stay."""
    for m, n in tiles(M, N):
        total = zeros(m, n, dtype=f32)
        for k in tiles(K):
            total += sp.sum(b[k, n] - a[m, k], over=k)
        c[m, n] = sp.exp(total)


@pytest.mark.parametrize(("kernel", "adds"), [(in_order, 0), (factors_turned, 0), (elementwise, 1)])
def test_accumulation_over_a_loop(kernel, adds: int) -> None:
    function = kernel.tile_ir()
    rng = np.random.default_rng(0)
    given = {"a": rng.standard_normal((3, 5)).astype(np.float32), "b": rng.standard_normal((5, 4)).astype(np.float32)}
    before, after = np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)
    interpret(function, {**given, "c": before})
    reduce_loops(function)
    verify(function, TILE_OPS)
    assert sum(op.name == "tiles" for op in function.walk()) == 1
    assert sum(op.name == "add" for op in function.walk()) == adds
    interpret(function, {**given, "c": after})
    np.testing.assert_array_equal(before, after)


@sp.kernel
def two_at_once(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        total = zeros(m, n, dtype=f32) + 0.5
        for k in tiles(K):
            total += a[m, k] @ b[k, n] + sp.sum(b[k, n] - a[m, k], over=k)
        c[m, n] = total


@sp.kernel
def two_in_turn(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        total = zeros(m, n, dtype=f32)
        for k in tiles(K):
            total += a[m, k] @ b[k, n]
            total += sp.sum(b[k, n] * b[k, n], over=k)
        c[m, n] = total


@sp.kernel
def largest_of_two(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        top = zeros(m, n, dtype=f32) - 100.0
        for k in tiles(K):
            top = sp.max(sp.max(a[m, k] - b[k, n], over=k), sp.max(top, sp.max(a[m, k] * b[k, n], over=k)))
        c[m, n] = top


@sp.kernel
def a_difference(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    """What is taken off is not a sum that grows."""
    for m, n in tiles(M, N):
        total = zeros(m, n, dtype=f32)
        for k in tiles(K):
            total += a[m, k] @ b[k, n] - sp.sum(a[m, k], over=k)
        c[m, n] = total


@sp.kernel
def a_sum_that_is_kept(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        total = zeros(m, n, dtype=f32)
        last = zeros(m, n, dtype=f32)
        for k in tiles(K):
            last = a[m, k] @ b[k, n] + sp.sum(b[k, n], over=k)
            total += last
        c[m, n] = total + last


@pytest.mark.parametrize(("kernel", "loops"), [
    (two_at_once, 0), (two_in_turn, 0), (largest_of_two, 0), (a_difference, 1), (a_sum_that_is_kept, 1)])
def test_accumulation_of_several(kernel, loops: int) -> None:
    function = kernel.tile_ir()
    rng = np.random.default_rng(0)
    given = {"a": rng.integers(-9, 9, (3, 5)).astype(np.float32), "b": rng.integers(-9, 9, (5, 4)).astype(np.float32)}
    before, after = np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)
    interpret(function, {**given, "c": before})
    reduce_loops(function)
    verify(function, TILE_OPS)
    assert sum(op.name == "tiles" for op in function.walk()) == 1 + loops
    interpret(function, {**given, "c": after})
    np.testing.assert_array_equal(before, after)    # sums of small integers are exact in any order
