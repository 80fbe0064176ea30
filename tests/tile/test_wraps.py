"""Loops parted where an index wraps: which are, and that they mean what they did."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, each, f32, i32, kernel, tiles
from sapper.ir.verifier import verify
from sapper.tile.canonical import canonicalize
from sapper.tile.eager import run as run_eager
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS
from sapper.tile.wraps import part_wraps

M, N = sp.dims("M N")


@kernel
def rolled(x: Tensor[f32, M, N], s: i32, y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = x[m, (n + s) % N]


@kernel
def turned(x: Tensor[f32, M, N], s: i32, y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = x[m, (s - n) % N] * 2.0


@kernel
def stored(x: Tensor[f32, M, N], s: i32, y: Tensor[f32, M, N]):
    for m in each(M):
        for n in tiles(N):
            y[m, (n + 2 * s + 1) % N] = x[m, n] + 1.0


@kernel
def unproved(x: Tensor[f32, M, N], s: i32, y: Tensor[f32, M, N]):
    for m in each(M):
        for n in tiles(N):
            y[m, (n + s * s) % N] = x[m, n] + 1.0


@kernel
def periodic(x: Tensor[f32, M, N], s: i32, y: Tensor[f32, M, N]):
    """Three remainders, of which two are parted; along m, which is not the last index, none is."""
    for m, n in tiles(M, N):
        y[m, n] = x[m, n] - 0.5 * (x[m, (n + 1) % N] + x[m, (n - 1) % N]) + x[(m + 1) % M, n] + x[m, (n + s) % N]


@kernel
def elsewhere(x: Tensor[f32, M, N], s: i32, y: Tensor[f32, M, N]):
    """By another number than the axis walks, by that of another axis, of two axes, and after a remainder."""
    for m, n in tiles(M, N):
        y[m, n] = x[m, (n + s) % M % N] + x[m, (n + m) % N] + x[m, (2 * n) % N] + x[m, (n + s) % N // 2]


def parted(k: Any) -> Any:
    function = k.tile_ir()
    canonicalize(function)
    part_wraps(function)
    verify(function, TILE_OPS)
    return function


@pytest.mark.parametrize(("k", "loops", "left"), [
    (rolled, 3, 0), (turned, 3, 0), (stored, 3, 0), (unproved, 2, 1), (periodic, 5, 8)],
                         ids=lambda k: getattr(k, "name", ""))
def test_loops_part_where_they_wrap(k: Any, loops: int, left: int) -> None:
    """loops: how many there are then (one whose stores are not proved apart is left). left: remainders in them."""
    function = parted(k)
    assert sum(op.name in ("tiles", "each") for op in function.walk()) == loops
    assert sum(op.name == "mod" and bool(op.result.type.axes) for op in function.walk()) == left
    random = np.random.default_rng(0)
    for rows, columns, shift in ((1, 1, 0), (3, 7, 5), (2, 33, -40), (5, 18, 17), (2, 2, 1000)):
        x = random.standard_normal((rows, columns)).astype(np.float32)
        results = []
        for run in (lambda a: run_eager(k, a), lambda a: interpret(function, a, 3, check_races=True),
                    lambda a: k(**a, threads=2)):
            results.append(np.empty_like(x))
            run({"x": x, "s": shift, "y": results[-1]})
        for result in results[1:]:
            np.testing.assert_allclose(result, results[0], rtol=1e-6, atol=1e-6)     # sums of five, fused or not


def test_what_does_not_wrap_where_the_axis_ends_is_left() -> None:
    assert sum(op.name == "tiles" for op in parted(elsewhere).walk()) == 1
