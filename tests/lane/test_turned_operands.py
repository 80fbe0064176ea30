"""Tensors of whose rows products gather the same elements: turned once, so that rows lie across the lanes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapper import Tensor, dims, f32, i32, kernel, sum, tiles, u8, whole, zeros
from sapper.ir.nodes import Function
from sapper.tile.canonical import canonicalize
from sapper.tile.reduce_loops import reduce_loops

from .run_lane import run_lane, specialize
from .test_nest_lanes import AVX2, AVX512, normal

B, J, K, M, N = dims("B J K M N")


@kernel
def two_of_four(x: Tensor[f32, M, K], w: Tensor[f32, N, J], at: Tensor[u8, N, J], y: Tensor[f32, M, N]):
    """Of each four columns the two that a row of the weights has."""
    for m, n in tiles(M, N):
        j = whole(J)
        y[m, n] = sum(x[m, 4 * (j // 2) + at[n, j].to(i32)] * w[n, j], over=j)


@kernel
def listed(x: Tensor[f32, B, M, K], w: Tensor[f32, N, J], at: Tensor[i32, N, J], y: Tensor[f32, B, N, M]):
    """Columns from a list, of the rows of several matrices."""
    for b, n, m in tiles(B, N, M):
        acc = zeros(b, n, m, dtype=f32)
        for j in tiles(J):
            acc += sum(x[b, m, at[n, j]] * w[n, j], over=j)
        y[b, n, m] = acc


@kernel
def cleared(x: Tensor[f32, M, K], w: Tensor[f32, N, J], at: Tensor[i32, N, J], y: Tensor[f32, M, N]):
    """What is gathered is stored to in the end: it is read where it is."""
    for m, n in tiles(M, N):
        j = whole(J)
        y[m, n] = sum(x[m, at[n, j]] * w[n, j], over=j)
    for m, k in tiles(M, K):
        x[m, k] = 0.0


def run(made: Any, facts: Any, hints: dict[str, int], **arguments: np.ndarray) -> tuple[Function, np.ndarray]:
    """What it was lowered to, and the result, of 17 rows."""
    w, shape = normal(5, 6), {"listed": (2, 5, 17)}.get(made.name, (17, 5))
    given = {**arguments, "w": w, "y": np.full(shape, np.nan, np.float32)}
    function = reduce_loops(made.tile_ir())
    canonicalize(function)
    given = {tensor.name: given[tensor.name] for tensor in function.tensors()}
    lane = run_lane(function, given, None, facts, specialize(function, given, hints))
    return lane, given["y"]


def gathers(lane: Function) -> bool:
    """Where it multiplies; rows that are left of a copy may be gathered."""
    return any(op.name == "gather" for loop in lane.walk() if loop.name == "loop" and loop.attributes["label"] == "j"
               for op in loop.walk())


LARGE = {"M": 64, "N": 512, "K": 512, "J": 256}


@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
def test_rows_lie_across_the_lanes(facts: Any) -> None:
    x, at = normal(17, 12), np.random.default_rng(3).integers(0, 4, (5, 6)).astype(np.uint8)
    places = 4 * (np.arange(6) // 2) + at
    wanted = np.einsum("mnj,nj->mn", x[:, places], normal(5, 6))
    for more, turned in (({}, True), ({"M": 2}, False), ({"N": 4}, False)):     # few rows; few that read each again
        lane, y = run(two_of_four, facts, LARGE | more, x=x, at=at)
        np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
        assert gathers(lane) is not turned


def test_of_several_matrices_and_where_it_is_stored_to() -> None:
    x, at = normal(2, 17, 12), np.random.default_rng(3).integers(0, 12, (5, 6)).astype(np.int32)
    wanted = np.einsum("bmnj,nj->bnm", x[:, :, at], normal(5, 6))
    lane, y = run(listed, AVX512, LARGE | {"B": 2}, x=x, at=at)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
    assert not gathers(lane)
    lane, y = run(cleared, AVX512, LARGE, x=x[0].copy(), at=at)
    np.testing.assert_allclose(y, wanted[0].T, rtol=1e-4, atol=1e-4)
    assert gathers(lane)
