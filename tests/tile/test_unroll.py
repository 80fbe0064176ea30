"""Short loops in order within longer ones are written out, and mean the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapper import Tensor, dims, each, f32, i8, i32, kernel, tiles, u8, where, whole, zeros
from sapper.ir.nodes import Function
from sapper.ir.verifier import verify
from sapper.tile.canonical import canonicalize
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.unroll import unroll

C, M, N, O = dims("C M N O")


@kernel
def window(x: Tensor[f32, C, 5, N], w: Tensor[f32, O, C, 2, 3], y: Tensor[f32, O, N]):
    for o, n in tiles(O, N):
        total, acc = zeros(o, n, dtype=f32), zeros(o, n, dtype=f32)
        for c in range(C):
            for i in range(2):
                for j in range(3):
                    acc += where(j == 2, 0.5, 1.0) * (w[o, c, i, j] * x[c, i + j, n])
                total = total * 0.5 + acc
        y[o, n] = total


@kernel
def window_of_two_counters(x: Tensor[f32, C, 5, N], w: Tensor[f32, O, C, 2, 3], y: Tensor[f32, O, N]):
    for o, n in tiles(O, N):
        total = zeros(o, n, dtype=f32)
        for c in range(C):
            for i, j in each(2, 3):
                total = total * 0.5 + w[o, c, i, j] * x[c, i + j, n]
        y[o, n] = total


@kernel
def by_steps(x: Tensor[f32, C, 5, N], w: Tensor[f32, O, C, 2, 3], y: Tensor[f32, O, N]):
    for o, n in tiles(O, N):
        total = zeros(o, n, dtype=f32)
        for c in range(C):
            for i in range(0, 5, 2):
                total = total * 0.5 + w[o, c, 0, 0] * x[c, i, n]
        y[o, n] = total


@kernel
def for_each_channel(x: Tensor[f32, C, 5, N], w: Tensor[f32, O, C, 2, 3], y: Tensor[f32, O, N]):
    """The loop around it carries nothing: it stores."""
    for n in tiles(N):
        for o in range(O):
            total = zeros(n, dtype=f32)
            for i, j in each(2, 3):
                total = total * 0.5 + w[o, 0, i, j] * x[0, i + j, n]
            y[o, n] = total


@kernel
def alone(x: Tensor[f32, C, 5, N], w: Tensor[f32, O, C, 2, 3], y: Tensor[f32, O, N]):
    """No loop in order is around it."""
    for o, n in tiles(O, N):
        total = zeros(o, n, dtype=f32)
        for i in range(2):
            total = total * 0.5 + w[o, 0, i, 0] * x[0, i, n]
        y[o, n] = total


@kernel
def of_many(x: Tensor[f32, C, 5, N], w: Tensor[f32, O, C, 2, 3], y: Tensor[f32, O, N]):
    for o, n in tiles(O, N):
        total = zeros(o, n, dtype=f32)
        for c in range(C):
            for i in range(100):
                total = total * 0.5 + w[o, c, i % 2, 0] * x[c, i % 5, n]
        y[o, n] = total


@kernel
def of_products(x: Tensor[f32, C, 5, N], w: Tensor[f32, O, C, 2, 3], y: Tensor[f32, O, N]):
    """Contractions have ways of their own."""
    for o, n in tiles(O, N):
        total = zeros(o, n, dtype=f32)
        for c in range(C):
            for i in range(2):
                j = whole(3)
                total = total * 0.5 + w[o, c, i, j] @ x[c, i + j, n]
        y[o, n] = total


@kernel
def of_blocks(x: Tensor[i8, M, C, 3, 4], w: Tensor[u8, O, C, 3, 8, 4], y: Tensor[i32, M, O, 8]):
    """Each part of a block is met by the words of its own."""
    for o, m in tiles(O, M):
        l = whole(8)
        total = zeros(m, o, l, dtype=i32)
        for c in each(C):
            for i in range(3):
                s = whole(4)
                total += (w[o, c, i, l, s] @ x[m, c, i, s]) * (i + 1).to(i32)
        y[m, o, l] = total


@kernel
def of_two_matrices(x: Tensor[i8, M, C, 3, 4], w: Tensor[u8, O, C, 3, 8, 4], other: Tensor[u8, O, C, 3, 8, 4],
                    y: Tensor[i32, M, O, 8]):
    for o, m in tiles(O, M):
        l = whole(8)
        total = zeros(m, o, l, dtype=i32)
        for c in each(C):
            for i in range(3):
                s = whole(4)
                total += w[o, c, i, l, s] @ x[m, c, i, s]
            for i in range(3):
                s = whole(4)
                total -= other[o, c, i, l, s] @ x[m, c, i, s]
        y[m, o, l] = total


def canonical(of: Any) -> Function:
    function: Function = of.tile_ir()
    reduce_loops(function)
    canonicalize(function)
    return function


def loops(function: Function) -> int:
    return sum(op.name in ("tiles", "each") and not op.attributes["parallel"] for op in function.walk())


@pytest.mark.parametrize(("of", "left"), [
    (window, 1), (window_of_two_counters, 1), (by_steps, 1), (for_each_channel, 1), (alone, 1), (of_many, 2),
    (of_products, 2)],
    ids=lambda value: getattr(value, "name", ""))
def test_short_loops_are_written_out(of: Any, left: int) -> None:
    function, random = canonical(of), np.random.default_rng(1)
    arguments = {"x": random.standard_normal((3, 5, 4), np.float32),
                 "w": random.standard_normal((2, 3, 2, 3), np.float32)}
    results = []
    for _ in range(2):
        out = np.full((2, 4), np.nan, np.float32)
        interpret(function, {**arguments, "y": out}, 2)
        results.append(out)
        unroll(function)
        verify(function, TILE_OPS)
        assert loops(function) == left or len(results) == 2
    np.testing.assert_array_equal(*results)
    assert np.isfinite(results[0]).all()


@pytest.mark.parametrize(("of", "rows", "left"), [
    (of_blocks, 1, 1), (of_blocks, 4, 2), (of_blocks, None, 2), (of_two_matrices, 1, 3)],
    ids=["one row", "few rows", "not asked for", "two matrices"])
def test_parts_of_blocks_are_written_out_for_one_row(of: Any, rows: int | None, left: int) -> None:
    """rows: how many there typically are."""
    function, random = canonical(of), np.random.default_rng(1)
    arguments = {"x": random.integers(-128, 128, (2, 2, 3, 4), np.int8),
                 **{name: random.integers(0, 256, (3, 2, 3, 8, 4), np.uint8) for name in ("w", "other")}}
    names = {argument.name for argument in function.arguments}
    typical = {"M": rows, "O": 64, "C": 8}
    results = []
    for _ in range(2):
        out = np.full((2, 3, 8), -1, np.int32)
        interpret(function, {name: array for name, array in {**arguments, "y": out}.items() if name in names}, 2)
        results.append(out)
        unroll(function, None if rows is None else lambda value: typical.get(value.op.attributes.get("name"), 0))
        verify(function, TILE_OPS)
    np.testing.assert_array_equal(*results)
    assert loops(function) == left
