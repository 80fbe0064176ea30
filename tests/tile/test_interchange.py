"""Loops over indices inside the tiles of a product stand around them, and mean the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapper import Tensor, dims, each, f32, kernel, tiles, whole, zeros
from sapper.ir.verifier import verify
from sapper.tile.canonical import canonicalize
from sapper.tile.interchange import interchange
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS
from sapper.tile.reduce_loops import reduce_loops

B, K, M, N, Q = dims("B K M N Q")


@kernel
def taps(x: Tensor[f32, B, N, K], g: Tensor[f32, B, M, Q], y: Tensor[f32, M, N, 2, 2]):
    for m, n in tiles(M, N):
        for i in range(2):
            for j in range(2):
                acc = zeros(m, n, dtype=f32)
                for b in range(B):
                    q = whole(Q)
                    acc += g[b, m, q] @ x[b, n, q + (i + j)]
                y[m, n, i, j] = acc


@kernel
def taps_together(x: Tensor[f32, B, N, K], g: Tensor[f32, B, M, Q], y: Tensor[f32, M, N, 2, 2]):
    for m, n in tiles(M, N):
        b, q = whole(B), whole(Q)
        for i, j in each(2, 2):
            y[m, n, i, j] = g[b, m, q] @ x[b, n, q + (i + j)]


@kernel
def read_again(x: Tensor[f32, B, N, K], g: Tensor[f32, B, M, Q], y: Tensor[f32, M, N, 2, 2]):
    """An iteration reads what the one before it wrote."""
    for m, n in tiles(M, N):
        b, q = whole(B), whole(Q)
        y[m, n, 0, 0] = g[b, m, q] @ x[b, n, q + 0]
        for i in range(1):
            for j in range(1):
                y[m, n, i, j + 1] = y[m, n, i, j] + g[b, m, q] @ x[b, n, q + 1]
                y[m, n, i + 1, j] = y[m, n, i, j + 1]
                y[m, n, i + 1, j + 1] = g[b, m, q] @ x[b, n, q + 2]


@kernel
def met(x: Tensor[f32, B, N, K], g: Tensor[f32, B, M, Q], y: Tensor[f32, M, N, 2, 2]):
    """Iterations write an element again: the last one counts."""
    for m, n in tiles(M, N):
        b, q = whole(B), whole(Q)
        for i in range(2):
            y[m, n, i, 0] = g[b, m, q] @ x[b, n, q + i]
            y[m, n, i, 1] = g[b, m, q] @ x[b, n, q + (i + 1)]
            y[m, n, 1, 0] = g[b, m, q] @ x[b, n, q + 1]


@kernel
def by_steps(x: Tensor[f32, B, N, K], g: Tensor[f32, B, M, Q], y: Tensor[f32, M, N, 2, 2]):
    """Not every element is written."""
    for m, n in tiles(M, N):
        b, q = whole(B), whole(Q)
        for i in range(0, 2, 2):
            y[m, n, i, 0] = g[b, m, q] @ x[b, n, q + i]


@kernel
def of_rows(x: Tensor[f32, B, N, K], g: Tensor[f32, B, M, Q], y: Tensor[f32, M, N, 2, 2]):
    """A row of a tile meets one of each matrix: nothing is a product of two."""
    for m in tiles(M):
        for n in range(N):
            b, q = whole(B), whole(Q)
            for i, j in each(2, 2):
                y[m, n, i, j] = g[b, m, q] @ x[b, n, q + (i + j)]


@pytest.mark.parametrize(("of", "around"), [
    (taps, True), (taps_together, True), (read_again, False), (met, False), (by_steps, False),
    (of_rows, False)], ids=lambda v: str(v))
def test_loops_over_indices_stand_around_tiles(of: Any, around: bool) -> None:
    random = np.random.default_rng(0)
    x = random.integers(-4, 5, (2, 3, 7)).astype(np.float32)        # exact, however it is added
    g = random.integers(-4, 5, (2, 4, 5)).astype(np.float32)
    function = of.tile_ir()
    reduce_loops(function)
    canonicalize(function)
    expected, found = np.zeros((4, 3, 2, 2), np.float32), np.zeros((4, 3, 2, 2), np.float32)
    interpret(function, {"x": x, "g": g, "y": expected})
    interchange(function)
    verify(function, TILE_OPS)
    loops = [op for op in function.body.ops if op.blocks]
    assert [op.name for op in loops] == ["each" if around else "tiles"]
    assert not around or loops[0].attributes == {"count": 2, "parallel": True}
    interpret(function, {"x": x, "g": g, "y": found})
    np.testing.assert_array_equal(found, expected)
    if of not in (read_again, met, by_steps):
        every = [[np.einsum("bmq,bnq->mn", g, x[..., i + j:i + j + 5]) for j in range(2)] for i in range(2)]
        np.testing.assert_array_equal(found, np.moveaxis(np.array(every), (0, 1), (2, 3)))
