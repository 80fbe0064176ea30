"""Columns of products of ragged groups become axes around the loop over groups, and mean the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapper import Tensor, each, f32, i8, i32, kernel, span, tiles, whole, zeros
from sapper import dims as named
from sapper.ir.nodes import Function, Op
from sapper.ir.verifier import verify
from sapper.tile.canonical import canonicalize
from sapper.tile.group_columns import lift_columns
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS

E, G, J, N, T = named("E G J N T")


@kernel
def counted(x: Tensor[i8, J, G, 8], w: Tensor[i8, E, N, T, G, 8, 4], first: Tensor[i32, E], last: Tensor[i32, E],
            y: Tensor[f32, J, N, T, 4]):
    """A counter, by which two carried sums go, the one of them also inside of a loop; one begins with 0."""
    for n in each(N):
        for e in each(E):
            for t in each(T):
                for m in tiles(span(first[e], last[e])):
                    l = whole(4)
                    acc = zeros(m, l, dtype=f32)
                    rest = zeros(m, l, dtype=f32)
                    for g in each(G):
                        k = whole(8)
                        part = zeros(m, l, dtype=f32)
                        for d in range(2):
                            part += (x[m, g, k] @ w[e, n, t, g, k, l]).to(f32) * (d + 1).to(f32)
                        acc += part
                        rest += x[m, g, 0].to(f32)
                    y[m, n, t, l] = acc - rest


@kernel
def tiled(x: Tensor[i8, J, G, 8], w: Tensor[i8, E, N, T, G, 8, 4], first: Tensor[i32, E], last: Tensor[i32, E],
          y: Tensor[f32, J, N, T, 4]):
    """An axis of the tiles already."""
    for n in each(N):
        for e in each(E):
            for t, m in tiles(T, span(first[e], last[e])):
                l = whole(4)
                acc = zeros(m, t, l, dtype=f32)
                for g in each(G):
                    k = whole(8)
                    acc += (x[m, g, k] @ w[e, n, t, g, k, l]).to(f32)
                y[m, n, t, l] = acc


@kernel
def turned(x: Tensor[i8, J, G, 8], w: Tensor[i8, E, N, T, G, 8, 4], first: Tensor[i32, E], last: Tensor[i32, E],
           y: Tensor[f32, J, N, T, 4]):
    """Which columns are written depends on the group: those of two groups may be the same ones, in this order."""
    for n in each(N):
        for e in each(E):
            for t in each(T):
                for m in tiles(span(first[e], last[e])):
                    l, k = whole(4), whole(8)
                    y[m, n, (t + e) % T, l] = (x[m, 0, k] @ w[e, n, t, 0, k, l]).to(f32)


@kernel
def read(x: Tensor[i8, J, G, 8], w: Tensor[i8, E, N, T, G, 8, 4], first: Tensor[i32, E], last: Tensor[i32, E],
         y: Tensor[f32, J, N, T, 4]):
    """What another column's group has written is read."""
    for n in each(N):
        for e in each(E):
            for t in each(T):
                for m in tiles(span(first[e], last[e])):
                    l, k = whole(4), whole(8)
                    y[m, n, t, l] = (x[m, 0, k] @ w[e, n, t, 0, k, l]).to(f32) + y[m, n, t, l]


@kernel
def of_its_own_length(x: Tensor[i8, J, G, 8], w: Tensor[i8, E, N, T, G, 8, 4], first: Tensor[i32, E],
                      last: Tensor[i32, E], y: Tensor[f32, J, N, T, 4]):
    """Which rows a column has, and how long its sum is, depends on it."""
    for n in each(N):
        for e in each(E):
            for t in each(T):
                for m in tiles(span(first[e], last[e])):
                    l = whole(4)
                    acc = zeros(m, l, dtype=f32)
                    for g in range(t):
                        k = whole(8)
                        acc += (x[m, g, k] @ w[e, n, t, g, k, l]).to(f32)
                    y[m, n, t, l] = acc


def lifted(kernel: Any, serves: bool = True) -> tuple[Function, bool]:
    function = kernel.tile_ir()
    canonicalize(function)
    changed = lift_columns(function, lambda: serves)
    verify(function, TILE_OPS)
    return function, changed


def nest(function: Function) -> list[tuple[str, bool, list[str]]]:
    """The loops around tiles: name, whether parallel, axes."""
    found: list[tuple[str, bool, list[str]]] = []
    ops: list[Op] = function.body.ops
    while control := [op for op in ops if op.blocks and not op.results]:
        (loop,) = control
        found.append((loop.name, loop.attributes["parallel"], loop.attributes.get("axes", [])))
        ops = loop.blocks[0].ops
    return found


def arguments() -> dict[str, np.ndarray]:
    """Rows of groups that overlap: which one writes a row last is seen."""
    random = np.random.default_rng(2)
    return {"x": random.integers(-9, 9, (7, 2, 8)).astype(np.int8),
            "w": random.integers(-9, 9, (3, 2, 3, 2, 8, 4)).astype(np.int8),
            "first": np.array([0, 2, 3], np.int32), "last": np.array([4, 2, 7], np.int32),
            "y": np.zeros((7, 2, 3, 4), np.float32)}


@pytest.mark.parametrize("kernel", [counted, tiled], ids=lambda k: k.name)
def test_columns_are_axes_around_groups(kernel: Any) -> None:
    function, changed = lifted(kernel)
    assert changed and nest(function) == [
        ("each", True, []), ("tiles", True, ["t"]), ("each", False, []), ("tiles", True, ["m"])]
    expected, found = arguments(), arguments()
    interpret(kernel.tile_ir(), expected)
    interpret(function, found)
    np.testing.assert_array_equal(found["y"], expected["y"])


@pytest.mark.parametrize("kernel", [turned, read, of_its_own_length], ids=lambda k: k.name)
def test_what_depends_on_more_is_left(kernel: Any) -> None:
    assert not lifted(kernel)[1]


def test_what_does_not_serve_is_as_before() -> None:
    function, changed = lifted(counted, serves=False)
    assert not changed and nest(function) == [
        ("each", True, []), ("each", False, []), ("each", True, []), ("tiles", True, ["m"])]
    interpret(function, arguments())
