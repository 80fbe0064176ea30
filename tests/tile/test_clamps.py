"""Loops parted where an index is clamped: which are, and that they mean what they did."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, each, f32, i32, kernel, maximum, minimum, tiles, u8, where, zeros
from sapper.ir.nodes import Function
from sapper.ir.verifier import verify
from sapper.tile.canonical import canonicalize
from sapper.tile.clamps import part_clamps
from sapper.tile.eager import run as run_eager
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS

M, N = sp.dims("M N")


@kernel
def moved(x: Tensor[f32, M, N], s: i32, y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = x[m, minimum(maximum(n + s, 0), N - 1)]


@kernel
def beside(x: Tensor[f32, M, N], s: i32, y: Tensor[f32, M, N]):
    """The other order, an edge each, and what is clamped along m, which is not the last index."""
    for m, n in tiles(M, N):
        right = where(n + 1 < N, x[m, minimum(n + 1, N - 1)], 0.0)
        y[m, n] = right - 2.0 * x[m, n] + x[m, maximum(n - 3, 0)] + x[minimum(m + 1, M - 1), n]


@kernel
def left(x: Tensor[f32, M, N], s: i32, y: Tensor[f32, M, N]):
    """One edge."""
    for m in each(M):
        for n in tiles(N):
            y[m, n] = x[m, n] - x[m, maximum(n - 1, 0)]


@kernel
def blurred(x: Tensor[f32, M, N], s: i32, y: Tensor[f32, M, N]):
    """A counter moves the window."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for i in range(-1, 2):
            for j in range(5):
                acc += x[minimum(maximum(m + i, 0), M - 1), maximum(minimum(n + 2 - j, N - 1), 0)]
        y[m, n] = acc


@kernel
def every_second(x: Tensor[f32, M, N], s: i32, y: Tensor[f32, M, N]):
    """Steps of two and three."""
    for m, n in tiles(M, N):
        y[m, n] = x[m, minimum(maximum(2 * n + s, 0), N - 1)] + x[m, minimum(3 * n + 1, N - 1)]


@kernel
def elsewhere(x: Tensor[f32, M, N], s: i32, y: Tensor[f32, M, N]):
    """To what data say, or coordinates; of an axis that goes backwards, or not alone; and of no load's last index."""
    for m, n in tiles(M, N):
        last = maximum(x[m, 0].to(i32) % 1, 0)
        y[m, n] = (x[m, minimum(n, last + N - 1)] + x[m, maximum(N - 1 - n, 0)] + x[m, minimum(n + m, N - 1)]
                   + x[minimum(m + 1, M - 1), n] + minimum(n + 1, N - 1).to(f32))


def parted(k: Any, fewest: int = 0, typical: int | None = 100) -> Function:
    function: Function = k.tile_ir()
    canonicalize(function)
    part_clamps(function, fewest, lambda value: typical)
    verify(function, TILE_OPS)
    return function


@pytest.mark.parametrize(("k", "loops", "left"), [(moved, 4, 2), (beside, 4, 4), (left, 2, 1), (blurred, 4, 2),
                                                  (every_second, 4, 4)], ids=lambda k: getattr(k, "name", ""))
def test_loops_part_where_nothing_is_clamped(k: Any, loops: int, left: int) -> None:
    """loops: over tiles, then. left: loads in these at a last index that is clamped."""
    function = parted(k)
    assert sum(op.name == "tiles" for op in function.walk()) == loops
    lasts = [op.operands[-1].op for op in function.walk() if op.name == "load"]
    assert sum(op is not None and op.name in ("max", "min") for op in lasts) == left
    random = np.random.default_rng(0)
    for rows, columns, shift in ((1, 1, 0), (3, 2, 1), (3, 7, 5), (2, 33, -40), (5, 18, 17), (2, 130, -3)):
        x = random.standard_normal((rows, columns)).astype(np.float32)
        results = []
        for run in (lambda a: run_eager(k, a), lambda a: interpret(function, a, 3, check_races=True),
                    lambda a: k(**a, threads=2)):
            results.append(np.empty_like(x))
            run({"x": x, "s": shift, "y": results[-1]})
        for result in results[1:]:
            np.testing.assert_allclose(result, results[0], rtol=1e-5, atol=1e-5)     # sums of fifteen, in any order


def test_a_schedule_is_for_what_is_not_clamped() -> None:
    walked = [op for op in parted(moved).walk() if op.name == "tiles" and op.attributes["axes"] != ["m"]]
    assert [op.attributes["axes"] for op in walked] == [["n_1"], ["n"], ["n_2"]]
    x = np.random.default_rng(0).standard_normal((3, 400), dtype=np.float32)
    y = np.empty_like(x)
    moved(x, 2, y, schedule=sp.Schedule(lane="n"))
    np.testing.assert_array_equal(y, x[:, np.minimum(np.arange(400) + 2, 399)])


def test_what_is_not_known_before_the_loop_is_left() -> None:
    assert sum(op.name == "tiles" for op in parted(elsewhere).walk()) == 1


@pytest.mark.parametrize(("fewest", "typical"), [(101, 100), (1, None)])
def test_short_axes_and_unknown_ones_are_left(fewest: int, typical: int | None) -> None:
    assert sum(op.name == "tiles" for op in parted(moved, fewest, typical).walk()) == 1


@kernel
def largest(x: Tensor[u8, M, N], y: Tensor[u8, M, N]):
    for m, n in tiles(M, N):
        best = x[m, n]
        for i in range(-1, 2):
            for j in range(-1, 2):
                best = maximum(best, x[minimum(maximum(m + i, 0), M - 1), minimum(maximum(n + j, 0), N - 1)])
        y[m, n] = best


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 31), (4, 100)])
def test_bytes(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    y = np.zeros_like(x)
    largest(x, y)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, 1, mode="edge"), (3, 3))
    np.testing.assert_array_equal(y, windows.max((2, 3)))
