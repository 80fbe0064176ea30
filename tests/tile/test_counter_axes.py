"""Counters of short loops around sums become axes, and mean the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapper import Tensor, dims, each, f32, kernel, span, sum, tiles, whole, zeros
from sapper.ir.verifier import verify
from sapper.tile.canonical import canonicalize
from sapper.tile.counter_axes import spread_counters
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS
from sapper.tile.reduce_loops import reduce_loops

B, C, K, O, Q = dims("B C K O Q")


@kernel
def taps(x: Tensor[f32, B, C, K], g: Tensor[f32, B, C, Q], y: Tensor[f32, C, 2, 3]):
    for c in tiles(C):
        for i in range(2):
            for j in range(3):
                acc = zeros(c, dtype=f32)
                for b in range(B):
                    q = whole(Q)
                    acc += sum(g[b, c, q] * x[b, c, q + (i + j)], over=q)
                y[c, i, j] = acc


@kernel
def taps_added(x: Tensor[f32, B, C, K], g: Tensor[f32, B, C, Q], y: Tensor[f32, C, 2, 3]):
    """To what is there, which no other iteration reads."""
    for c in tiles(C):
        for i, j in each(2, 3):
            b, q = whole(B), whole(Q)
            y[c, i, j] += 2.0 * sum(g[b, c, q] * x[b, c, q + (i + j)], over=(b, q))


@kernel
def taps_of_each(x: Tensor[f32, B, C, K], g: Tensor[f32, B, C, Q], y: Tensor[f32, C, 2, 3]):
    """No loop over tiles is around them; what is summed is no product."""
    for c in each(C):
        for i in range(2):
            for j in range(3):
                b, q = whole(B), whole(Q)
                y[c, i, j] = sum(abs(g[b, c, q] - x[b, c, q + (i + j)]), over=(b, q))


@kernel
def from_a_start(x: Tensor[f32, B, C, K], g: Tensor[f32, B, C, Q], y: Tensor[f32, C, 2, 3]):
    """The sum begins with what the tap before it has read."""
    for c in tiles(C):
        for i in range(2):
            for j in range(3):
                acc = x[0, c, i + j]
                for b in range(B):
                    q = whole(Q)
                    acc += sum(g[b, c, q] * x[b, c, q + (i + j)], over=q)
                y[c, i, j] = acc


@kernel
def one_after_the_other(x: Tensor[f32, B, C, K], g: Tensor[f32, B, C, Q], y: Tensor[f32, C, 2, 3]):
    """A tap reads what the one before it wrote."""
    for c in tiles(C):
        for i in range(2):
            y[c, i, 0] = 1.0
            for j in range(1, 3):
                b, q = whole(B), whole(Q)
                y[c, i, j] = y[c, i, j - 1] + sum(g[b, c, q] * x[b, c, q + (i + j)], over=(b, q))


@kernel
def of_more_and_more(x: Tensor[f32, B, C, K], g: Tensor[f32, B, C, Q], y: Tensor[f32, C, 2, 3]):
    """What a tap sums ends where its number says."""
    for c in tiles(C):
        for i, j in each(2, 3):
            b, q = whole(B), whole(span(0, i + j))
            y[c, i, j] = sum(g[b, c, q] * x[b, c, q + 0], over=(b, q))


@kernel
def nothing_shared(x: Tensor[f32, B, C, K], g: Tensor[f32, B, C, Q], y: Tensor[f32, C, 2, 3]):
    for c in tiles(C):
        for i, j in each(2, 3):
            b = whole(B)
            y[c, i, j] = sum(g[b, c, i + j] * x[b, c, i * 3 + j], over=b)


@kernel
def by_steps(x: Tensor[f32, B, C, K], g: Tensor[f32, B, C, Q], y: Tensor[f32, C, 2, 3]):
    """Not every element is written."""
    for c in tiles(C):
        for i in range(0, 3, 2):
            b, q = whole(B), whole(Q)
            y[c, 0, i] = sum(g[b, c, q] * x[b, c, q + i], over=(b, q))


@kernel
def products(x: Tensor[f32, B, C, K], g: Tensor[f32, B, O, Q], y: Tensor[f32, C, O, 2, 3]):
    """Rows by columns for each tap."""
    for c, o in tiles(C, O):
        for i, j in each(2, 3):
            b, q = whole(B), whole(Q)
            y[c, o, i, j] = g[b, o, q] @ x[b, c, q + (i + j)]


@pytest.mark.parametrize(("of", "axes"), [
    (taps, ["c", "i", "j"]), (taps_added, ["c", "i", "j"]), (taps_of_each, ["i", "j"]), (from_a_start, ["c", "i", "j"]),
    (one_after_the_other, None), (of_more_and_more, None), (nothing_shared, None), (by_steps, None),
    (products, None),
], ids=lambda v: v.name if hasattr(v, "name") else None)
def test_counters_of_short_loops_become_axes(of: Any, axes: list[str] | None) -> None:
    random = np.random.default_rng(0)
    x = random.integers(-4, 5, (2, 5, 9)).astype(np.float32)        # exact, however it is added
    g = random.integers(-4, 5, (2, 5, 6)).astype(np.float32)
    function = of.tile_ir()
    reduce_loops(function)
    canonicalize(function)
    extents = (5, 5, 2, 3) if of is products else (5, 2, 3)
    expected, found = np.ones(extents, np.float32), np.ones(extents, np.float32)
    interpret(function, {"x": x, "g": g, "y": expected})
    spread_counters(function)
    verify(function, TILE_OPS)
    interpret(function, {"x": x, "g": g, "y": found})
    np.testing.assert_array_equal(found, expected)
    innermost = [op for op in function.walk() if op.name == "tiles"]
    assert [op.attributes["axes"] for op in innermost if "i" in op.attributes["axes"]] == ([axes] if axes else [])
    assert not axes or not any(op.name == "each" for op in function.walk()) or of is taps_of_each


def test_taps_are_summed_side_by_side() -> None:
    """Natively, on extents that fill no vector."""
    random = np.random.default_rng(1)
    x, g = random.standard_normal((3, 7, 41), np.float32), random.standard_normal((3, 7, 36), np.float32)
    for of in (taps, taps_added, taps_of_each):
        y = np.ones((7, 2, 3), np.float32)
        of(x, g, y)
        windows = [[x[..., i + j:i + j + 36] for j in range(3)] for i in range(2)]
        terms = [[abs(g - w) if of is taps_of_each else g * w for w in row] for row in windows]
        sums = np.moveaxis(np.array(terms, np.float64).sum((2, 4)), 2, 0)
        np.testing.assert_allclose(y, 2 * sums + 1 if of is taps_added else sums, rtol=2e-5, atol=1e-4)
