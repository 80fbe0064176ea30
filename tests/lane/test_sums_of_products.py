"""Products of matrices that are only added to, or taken off, each other: one sum for all, where registers are few."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapper.ir.nodes import Function
from sapper.ir.types import f32, f64
from sapper.lang.builtins import maximum, tiles, whole
from sapper.lang.dims import dims
from sapper.lang.kernel import kernel
from sapper.lang.tensor import Tensor
from sapper.tile.schedule import Facts
from tests.tile.test_shared_operands import both_parts

from .test_nest_lanes import AVX2, AVX512, lowered, normal

K, M, N = dims("K M N")


@kernel
def added(a: Tensor[f32, 3, M, K], b: Tensor[f32, 3, K, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        k = whole(K)
        y[m, n] = a[0, m, k] @ b[0, k, n] + a[1, m, k] @ b[1, k, n] - a[2, m, k] @ b[2, k, n]


@kernel
def beside_a_start(a: Tensor[f32, 3, M, K], b: Tensor[f32, 3, K, N], y: Tensor[f32, M, N]):
    """What is added to the sums keeps its own place: it may be far larger than a product."""
    for m, n in tiles(M, N):
        k = whole(K)
        y[m, n] = y[m, n] - (a[2, m, k] @ b[2, k, n] - (a[0, m, k] @ b[0, k, n] + a[1, m, k] @ b[1, k, n]))


@kernel
def read_by_itself(a: Tensor[f32, 3, M, K], b: Tensor[f32, 3, K, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        k = whole(K)
        first = a[0, m, k] @ b[0, k, n]
        y[m, n] = maximum(first, 0.0) + (first + a[1, m, k] @ b[1, k, n]) - a[2, m, k] @ b[2, k, n]


def sums_of(lane: Function) -> int:
    """How many sums the loop with the most of them carries."""
    return max(len(op.results) for op in lane.walk() if op.name == "loop")


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 19), (40, 33, 50)])
@pytest.mark.parametrize("facts", [AVX2, AVX512], ids=["8 lanes", "16 lanes"])
@pytest.mark.parametrize("made", [added, beside_a_start, read_by_itself], ids=lambda made: made.name)
def test_results_are_right(made: Any, facts: Facts, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    a, b, y = normal(3, m, k), normal(3, k, n), normal(m, n)
    first, second, third = (x.astype(np.float64) @ w for x, w in zip(a, b, strict=True))
    wanted = {added: first + second - third, beside_a_start: y + first + second - third,
              read_by_itself: np.maximum(first, 0) + first + second - third}[made]
    arguments = {"a": a, "b": b, "y": y}
    lowered(made, arguments, facts, hints={"M": 256, "K": 256, "N": 256})
    # Of 3 k products and four sums, each term at most some 16, in f32.
    np.testing.assert_allclose(arguments["y"], wanted, rtol=1e-4, atol=2e-5 * np.sqrt(k))


@pytest.mark.parametrize(("made", "sums"), [(added, 12), (beside_a_start, 12)], ids=["added", "beside a start"])
def test_one_sum_takes_them_where_registers_are_few(made: Any, sums: int) -> None:
    """Six rows by two vectors, as of one product."""
    arguments = {"a": normal(3, 40, 33), "b": normal(3, 33, 50), "y": np.zeros((40, 50), np.float32)}
    assert sums_of(lowered(made, arguments, AVX2, hints={"M": 256, "K": 256, "N": 256})) == sums


@kernel
def both_parts_of_doubles(a: Tensor[f64, 2, M, K], b: Tensor[f64, 2, K, N], c: Tensor[f64, 2, M, N]):
    for m, n in tiles(M, N):
        k = whole(K)
        c[0, m, n] = a[0, m, k] @ b[0, k, n] - a[1, m, k] @ b[1, k, n]
        c[1, m, n] = a[0, m, k] @ b[1, k, n] + a[1, m, k] @ b[0, k, n]


def test_doubles_are_met_one_product_after_the_other() -> None:
    """Each step of the depth meets all points with one product, then with the other: operands of one are held."""
    a, b = normal(2, 40, 33).astype(np.float64), normal(2, 33, 50).astype(np.float64)
    arguments = {"a": a, "b": b, "c": np.zeros((2, 40, 50))}
    lane = lowered(both_parts_of_doubles, arguments, AVX2, hints={"M": 256, "K": 256, "N": 256})
    wanted = (a[0] + 1j * a[1]) @ (b[0] + 1j * b[1])
    np.testing.assert_allclose(arguments["c"], [wanted.real, wanted.imag], rtol=1e-12, atol=1e-12)
    loop = max((op for op in lane.walk() if op.name == "loop"), key=lambda op: len(op.results))
    carried = loop.blocks[0].arguments[1:]
    first = [op for op in loop.blocks[0].ops if op.name == "fma"][:len(carried)]
    assert len(carried) == 12 and {op.operands[2] for op in first} == set(carried)


def test_complex_products_have_two_sums() -> None:
    """Six rows by a vector of each part: twelve sums."""
    arguments = {"a": normal(2, 40, 33), "b": normal(2, 33, 50), "c": np.zeros((2, 40, 50), np.float32)}
    lane = lowered(both_parts, arguments, AVX2, hints={"M": 256, "K": 256, "N": 256})
    wanted = (arguments["a"][0] + 1j * arguments["a"][1]) @ (arguments["b"][0] + 1j * arguments["b"][1])
    np.testing.assert_allclose(arguments["c"], [wanted.real, wanted.imag], rtol=1e-4, atol=1e-4)
    assert sums_of(lane) == 12
