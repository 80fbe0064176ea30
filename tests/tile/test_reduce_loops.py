"""Loops that only accumulate become reductions, whatever the order of axes of what they add."""

from __future__ import annotations

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, bf16, each, f32, tiles, whole, zeros
from sapper.ir.verifier import verify
from sapper.tile.canonical import canonicalize
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
    for m, n in tiles(M, N):
        total = zeros(m, n, dtype=f32)
        for k in tiles(K):
            total += sp.sum(a[m, k], over=k) - (a[m, k] @ b[k, n] - sp.sum(b[k, n], over=k))
        c[m, n] = total


@sp.kernel
def what_is_taken_off(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        total = zeros(m, n, dtype=f32)
        for k in tiles(K):
            total -= a[m, k] @ b[k, n]
        c[m, n] = total


@sp.kernel
def signs_in_turn(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        total = zeros(m, n, dtype=f32)
        for k in tiles(K):
            total = a[m, k] @ b[k, n] - total
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
    (two_at_once, 0), (two_in_turn, 0), (largest_of_two, 0), (a_difference, 0), (what_is_taken_off, 0),
    (signs_in_turn, 1), (a_sum_that_is_kept, 1)])
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


@sp.kernel
def by_indices(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        total = zeros(m, n, dtype=f32)
        for k in each(K):
            total += a[m, k] * b[k, n]
        c[m, n] = sp.exp(total)


@sp.kernel
def turned_by_indices(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    """The product has its axes in the order (n, m)."""
    for m, n in tiles(M, N):
        total = zeros(m, n, dtype=f32) + 0.5
        for k in range(K):
            total += b[k, n] * a[m, k]
        c[m, n] = total


@sp.kernel
def two_sums(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        rows, columns = zeros(m, dtype=f32), zeros(n, dtype=f32)
        for k in range(K):
            rows += a[m, k]
            columns += b[k, n]
        c[m, n] = rows * columns


B, Q = sp.dims("B Q")


@sp.kernel
def within_others(x: Tensor[f32, B, N, K], g: Tensor[f32, B, M, Q], y: Tensor[f32, M, N, 2]):
    """The gradient of a window's weights."""
    for m, n in tiles(M, N):
        for i in range(2):
            acc = zeros(m, n, dtype=f32)
            for b in range(B):
                for q in range(Q):
                    acc += g[b, m, q] * x[b, n, q + i]
            y[m, n, i] = acc


@sp.kernel
def along_tiles(x: Tensor[f32, B, K, N], g: Tensor[f32, B, Q, M], y: Tensor[f32, M, N, 2]):
    """Axes of tiles go along memory, too."""
    for m, n in tiles(M, N):
        for i in range(2):
            acc = zeros(m, n, dtype=f32)
            for b in range(B):
                for q in range(Q):
                    acc += g[b, q, m] * x[b, q + i, n]
            y[m, n, i] = acc


@pytest.mark.parametrize(("kernel", "sums"), [(within_others, 1), (along_tiles, 0)])
def test_inside_other_loops_what_goes_along_memory_alone_is_a_sum(kernel, sums: int) -> None:
    function = kernel.tile_ir()
    rng = np.random.default_rng(0)
    across = kernel is along_tiles
    x, g = rng.integers(-4, 5, (2, 3, 6)).astype(np.float32), rng.integers(-4, 5, (2, 4, 5)).astype(np.float32)
    given = {"x": x.swapaxes(1, 2) if across else x, "g": g.swapaxes(1, 2) if across else g}
    y = np.zeros((4, 3, 2), np.float32)
    reduce_loops(function)
    canonicalize(function)
    verify(function, TILE_OPS)
    assert sum(op.name == "contract" for op in function.walk()) == sums
    interpret(function, {**{name: np.ascontiguousarray(a) for name, a in given.items()}, "y": y})
    np.testing.assert_array_equal(y, np.stack([np.einsum("bmq,bnq->mn", g, x[..., i:i + 5]) for i in range(2)], 2))


@pytest.mark.parametrize(("kernel", "sums"), [(by_indices, ["contract"]), (turned_by_indices, ["contract"]),
                                              (two_sums, ["reduce", "reduce"])])
@pytest.mark.parametrize("k", [0, 1, 5])
def test_loops_over_indices_that_add_elements_are_sums(kernel, sums: list[str], k: int) -> None:
    function = kernel.tile_ir()
    rng = np.random.default_rng(0)
    given = {"a": rng.integers(-4, 5, (3, k)).astype(np.float32),      # exact, however it is added
             "b": rng.integers(-4, 5, (k, 4)).astype(np.float32)}
    before, after = np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)
    interpret(function, {**given, "c": before})
    reduce_loops(function)
    canonicalize(function)
    verify(function, TILE_OPS)
    assert not any(op.name == "each" for op in function.walk())
    assert [op.name for op in function.walk() if op.name in ("reduce", "contract")] == sums
    interpret(function, {**given, "c": after})
    np.testing.assert_array_equal(before, after)


@sp.kernel
def window(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N - 4):
        total = zeros(m, n, dtype=f32)
        for k in each(K):
            total += a[m, k] * b[0, n + k]
        c[m, n] = total


@sp.kernel
def short(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        total = zeros(m, n, dtype=f32)
        for k in each(3):
            total += a[m, k] * b[k, n]
        c[m, n] = total


@sp.kernel
def from_one(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        total = zeros(m, n, dtype=f32)
        for k in range(1, K):
            total += a[m, k] * b[k, n]
        c[m, n] = total


@sp.kernel
def carried_twice(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        total, largest = zeros(m, n, dtype=f32), zeros(n, dtype=f32)
        for k in each(K):
            largest = sp.maximum(largest, b[k, n])
            total += a[m, k] * b[k, n]
        c[m, n] = total * largest


@sp.kernel
def part_of_a_tile(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        total = zeros(m, n, dtype=f32)
        for k in each(K):
            total += a[m, k] * b[k, n]
        c[m, n] = total


@sp.kernel
def rounded(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        total = zeros(m, n, dtype=bf16)
        for k in each(K):
            total += b[k, n].to(bf16)
        c[m, n] = total.to(f32) + a[m, 0]


@sp.kernel
def prefixes(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    """Each sum so far is of use."""
    for n in tiles(N):
        total = zeros(n, dtype=f32)
        for k in each(K):
            total += b[k, n]
            b[k, n] = total
        c[0, n] = total + a[0, 0]


@sp.kernel
def stored_beside(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    """The last of many stores to one place counts."""
    for n in tiles(N):
        total = zeros(n, dtype=f32)
        for k in each(K):
            total += b[k, n]
            b[0, n] = b[k, n] + a[0, k]
        c[0, n] = total


@pytest.mark.parametrize("kernel", [
    window, short, from_one, carried_twice, part_of_a_tile, rounded, prefixes, stored_beside])
def test_other_loops_over_indices_stay(kernel) -> None:
    function = kernel.tile_ir()
    reduce_loops(function)
    assert any(op.name == "each" for op in function.walk())


@pytest.mark.parametrize("kernel", [prefixes, stored_beside])
def test_what_is_stored_in_a_loop_of_sums_stays_in_order(kernel) -> None:
    random = np.random.default_rng(0)
    given = {"a": random.integers(-4, 5, (3, 70)).astype(np.float32),
             "b": random.integers(-4, 5, (70, 33)).astype(np.float32), "c": np.zeros((3, 33), np.float32)}
    wanted = {name: value.copy() for name, value in given.items()}
    kernel(*wanted.values(), interpret=True)
    kernel(*given.values())
    for name, value in given.items():
        np.testing.assert_array_equal(value, wanted[name])      # small integers: sums are exact
