"""Sums of products as one (sapper/tile/joined_depths.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, each, f32, i32, span, tiles, u8, whole, zeros
from sapper.ir.extents import evaluate_nested
from sapper.ir.nodes import Function
from sapper.ir.verifier import verify
from sapper.tile.canonical import canonicalize
from sapper.tile.interpret import interpret
from sapper.tile.joined_depths import join_depths
from sapper.tile.ops import TILE_OPS
from sapper.tile.reduce_loops import reduce_loops

M, N, K, H, B = sp.dims("M N K H B")
EXTENTS = {"M": 3, "N": 5, "K": 12, "H": 6, "B": 3}


@sp.kernel
def pairs(x: Tensor[f32, M, H, 2], w: Tensor[u8, N, H], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for h in tiles(H):
            q = w[n, h].to(i32)
            acc += x[m, h, 1] @ (q >> 4).to(f32) + x[m, h, 0] @ (q & 15).to(f32)
        y[m, n] = 2.0 * acc


@sp.kernel
def of_columns(x: Tensor[f32, M, K], w: Tensor[u8, N, K // 2], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for h in tiles(K // 2):
            acc += (w[n, h] & 15).to(f32) @ x[m, 2 * h]
            acc += (w[n, h] >> 4).to(f32) @ x[m, 2 * h + 1]
        y[m, n] = acc


@sp.kernel
def halves(x: Tensor[f32, M, B, 8], w: Tensor[u8, N, B, 4], s: Tensor[f32, N, B], y: Tensor[f32, M, N]):
    """Loops in order, one in the other, that begin with something."""
    for m, n in tiles(M, N):
        acc = s[n, 0] + zeros(m, n, dtype=f32)
        for b in each(B):
            j = whole(4)
            q, scale = w[n, b, j], s[n, b]
            acc += x[m, b, j] @ ((q & 15).to(f32) * scale) + x[m, b, j + 4] @ ((q >> 4).to(f32) * scale)
        y[m, n] = acc


@sp.kernel
def quarters(x: Tensor[f32, B, M, 4, 4], w: Tensor[u8, N, 4], y: Tensor[f32, M, N]):
    """Two bits each; of a view, and under a scalar index."""
    of_rows = x.view(B, M, 16)
    for b in each(B, disjoint=True):
        if b == 1:
            for m, n in tiles(M, N):
                j = whole(4)
                q = w[n, j].to(i32)
                acc = of_rows[b, m, j] @ (q & 3).to(f32) + of_rows[b, m, j + 4] @ (q >> 2 & 3).to(f32)
                y[m, n] = acc + of_rows[b, m, j + 8] @ (q >> 4 & 3).to(f32) + of_rows[b, m, j + 12] @ (q >> 6).to(f32)


@sp.kernel
def split(x: Tensor[f32, M, K], w: Tensor[u8, N, K // 2], y: Tensor[f32, M, N]):
    """What the source split, and nothing else, is read as it was."""
    in_pairs = x.view(M, K // 2, 2)
    for m, n in tiles(M, N):
        h = whole(K // 2)
        q = w[n, h].to(i32)
        y[m, n] = in_pairs[m, h, 0] @ (q & 15).to(f32) + in_pairs[m, h, 1] @ (q >> 4).to(f32)


@sp.kernel
def digits(x: Tensor[f32, M, B, 4], w: Tensor[f32, B, N, 4], y: Tensor[f32, M, N]):
    """A single product over two axes."""
    for m, n in tiles(M, N):
        b, j = whole(B), whole(4)
        y[m, n] = x[m, b, j] @ (w[b, n, j] * 2.0)


@sp.kernel
def gated(x: Tensor[f32, M, H, 2], w: Tensor[u8, N, H], v: Tensor[u8, N, H], y: Tensor[f32, M, N]):
    """Two sums over one depth."""
    for m, n in tiles(M, N):
        a = zeros(m, n, dtype=f32)
        b = zeros(m, n, dtype=f32)
        for h in tiles(H):
            a += x[m, h, 0] @ (w[n, h] & 15).to(f32) + x[m, h, 1] @ (w[n, h] >> 4).to(f32)
            b += x[m, h, 0] @ (v[n, h] & 15).to(f32) + x[m, h, 1] @ (v[n, h] >> 4).to(f32)
        y[m, n] = a * b


@sp.kernel
def gated_in_order(x: Tensor[f32, M, B, 8], w: Tensor[u8, N, B, 4], v: Tensor[u8, N, B, 4], y: Tensor[f32, M, N]):
    """Two sums of one loop."""
    for m, n in tiles(M, N):
        a = zeros(m, n, dtype=f32)
        b = zeros(m, n, dtype=f32)
        for c in each(B):
            j = whole(4)
            a += x[m, c, j] @ (w[n, c, j] & 15).to(f32) + x[m, c, j + 4] @ (w[n, c, j] >> 4).to(f32)
            b += x[m, c, j] @ (v[n, c, j] & 15).to(f32) + x[m, c, j + 4] @ (v[n, c, j] >> 4).to(f32)
        y[m, n] = a * b


KERNELS = (pairs, of_columns, halves, quarters, split, digits, gated, gated_in_order)


def joined(kernel: Any, serves: bool = True) -> tuple[Function, bool]:
    function = kernel.tile_ir()
    reduce_loops(function)
    canonicalize(function)
    found = join_depths(function, lambda: serves)
    verify(function, TILE_OPS)
    return function, found


def results(function: Function) -> np.ndarray:
    random = np.random.default_rng(3)
    arrays = {}
    for value in function.tensors():
        shape = [evaluate_nested(d, EXTENTS) for d in value.type.dims]  # type: ignore[union-attr]
        is_float = value.type.dtype is f32  # type: ignore[union-attr]
        arrays[value.name] = random.standard_normal(shape).astype(np.float32) if is_float else random.integers(
            0, 256, shape).astype(np.uint8)
    interpret(function, arrays)
    return arrays["y"]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_the_same_by_one_product(kernel: Any) -> None:
    """For each sum one, all over one axis."""
    function, found = joined(kernel)
    assert found
    products = [op for op in function.walk() if op.name == "contract"]
    assert len(products) == (2 if kernel in (gated, gated_in_order) else 1)
    assert len({tuple(op.attributes["over"]) for op in products}) == 1 == len(products[0].attributes["over"])
    assert not any(op.results for op in function.walk() if op.name in ("each", "tiles"))
    assert {op.name for op in function.walk()}.isdisjoint({"eq", "select"}) or kernel is quarters
    np.testing.assert_allclose(results(function), results(kernel.tile_ir()), rtol=1e-5, atol=1e-5)


def test_what_was_split() -> None:
    """Its extent is known as that of the tensor, and so by what it can be divided."""
    function, _ = joined(split)
    assert {op.operands[0].name for op in function.walk() if op.name == "load"} == {"x", "w"}
    (whole,) = [op for op in function.walk() if op.name == "whole"]
    assert whole.operands[1].op is not None and whole.operands[1].op.attributes == {"name": "K"}


def test_what_does_not_serve_stays() -> None:
    before = halves.tile_ir()
    reduce_loops(before)
    canonicalize(before)
    function, found = joined(halves, serves=False)
    assert not found and [op.name for op in function.walk()] == [op.name for op in before.walk()]
    np.testing.assert_array_equal(results(function), results(before))


@sp.kernel
def with_gaps(x: Tensor[f32, M, B, 8], w: Tensor[f32, N, B, 8], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        b, j = whole(B), whole(4)
        y[m, n] = x[m, b, j] @ w[n, b, j]


@sp.kernel
def of_thirds(x: Tensor[f32, M, H, 3], w: Tensor[f32, N, H], y: Tensor[f32, M, N]):
    """No digits of powers of two."""
    for m, n in tiles(M, N):
        h = whole(H)
        y[m, n] = x[m, h, 0] @ w[n, h] + x[m, h, 1] @ w[n, h] + x[m, h, 2] @ w[n, h]


@sp.kernel
def from_one_on(x: Tensor[f32, M, B, 4], w: Tensor[f32, N, B, 4], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        b, j = whole(span(1, B)), whole(4)
        y[m, n] = x[m, b, j] @ w[n, b, j]


@sp.kernel
def summed_twice(x: Tensor[f32, M, B, 4], w: Tensor[f32, N, B, 4], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for b in each(B):
            j = whole(4)
            acc += acc + x[m, b, j] @ w[n, b, j]
        y[m, n] = acc


@pytest.mark.parametrize("kernel", [with_gaps, of_thirds, from_one_on, summed_twice], ids=lambda k: k.name)
def test_what_is_no_such_sum(kernel: Any) -> None:
    assert not joined(kernel)[1]
