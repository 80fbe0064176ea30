"""Loops in order that add products up become one contraction, which means the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, bf16, each, f32, full, i8, i32, maximum, tiles, zeros
from sapper.ir.nodes import Function, Op, Value
from sapper.ir.text import parse_function, print_function
from sapper.ir.verifier import verify
from sapper.lang.kernel import Kernel
from sapper.tile.canonical import canonicalize
from sapper.tile.interpret import interpret
from sapper.tile.loop_products import join_loops
from sapper.tile.ops import TILE_OPS
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.semantics import numpy_dtype

B, C, K, M, N, O = sp.dims("B C K M N O")


@sp.kernel
def window(x: Tensor[f32, B, M, C], w: Tensor[f32, K, 3, C, O], y: Tensor[f32, B, N, O]):
    """A window whose length a call says, in one that is known."""
    for b in each(B):
        for n, o in tiles(N, O):
            acc = zeros(n, o, dtype=f32)
            for k in range(K):
                for j in range(3):
                    for c in tiles(C):
                        acc += x[b, n + k + j, c] @ w[k, j, c, o]
            y[b, n, o] = maximum(acc, 0.0)


@sp.kernel
def from_one(x: Tensor[bf16, M, C], w: Tensor[bf16, 2, C, O], y: Tensor[f32, N, O]):
    """The sum does not begin with 0."""
    for n, o in tiles(N, O):
        acc = full(n, o, value=1.0, dtype=f32)
        for j in range(2):
            for c in tiles(C):
                acc += x[n + j, c] @ w[j, c, o]
        y[n, o] = acc


@sp.kernel
def of_bytes(x: Tensor[i8, M, C], w: Tensor[i8, O, 3, C], y: Tensor[i32, N, O]):
    for n, o in tiles(N, O):
        acc = zeros(n, o, dtype=i32)
        for j in range(3):
            for c in tiles(C):
                acc += x[n + j, c] @ w[o, j, c]
        y[n, o] = acc


def joined(k: Kernel) -> Function:
    function = k.tile_ir()
    reduce_loops(function)
    canonicalize(function)

    def typical(value: Value) -> int | None:
        return 8

    def is_product(op: Op, extents: Mapping[str, int]) -> bool:
        assert {axis for v in op.operands for axis in v.type.axes} <= extents.keys()
        return True

    join_loops(function, typical, is_product)
    return function


def loops_in_order(function: Function) -> int:
    return sum(op.name == "each" and not op.attributes["parallel"] for op in function.walk())


@pytest.mark.parametrize(("k", "over"), [(window, 3), (from_one, 2), (of_bytes, 2)], ids=["f32", "from one", "bytes"])
def test_the_meaning_is_the_same(k: Kernel, over: int) -> None:
    function = joined(k)
    verify(function, TILE_OPS)
    assert loops_in_order(function) == 0
    assert [len(op.attributes["over"]) for op in function.walk() if op.name == "contract"] == [over]
    text = print_function(function)
    assert print_function(parse_function(text, {"tile": TILE_OPS})) == text
    for sizes in ({"B": 2, "C": 5, "K": 2, "M": 10, "N": 6, "O": 7}, {"B": 1, "C": 3, "K": 0, "M": 3, "N": 1, "O": 2}):
        random = np.random.default_rng(2)
        given: dict[str, Any] = {
            name: random.integers(-9, 10, [d if isinstance(d, int) else sizes[d] for d in type.dims]).astype(
                numpy_dtype(type.dtype)) for name, type in k.parameters}
        wanted = {name: array.copy() for name, array in given.items()}
        interpret(function, given)
        interpret(k.tile_ir(), wanted)
        for name, array in given.items():
            np.testing.assert_array_equal(array, wanted[name])      # sums of small integers are exact


@sp.kernel
def scaled(x: Tensor[f32, M, C], w: Tensor[f32, 3, C, O], y: Tensor[f32, N, O]):
    """The sum is more than added to."""
    for n, o in tiles(N, O):
        acc = zeros(n, o, dtype=f32)
        for j in range(3):
            acc = acc * 0.5
            for c in tiles(C):
                acc += x[n + j, c] @ w[j, c, o]
        y[n, o] = acc


@sp.kernel
def one_matrix(x: Tensor[f32, M, C], w: Tensor[f32, C, O], y: Tensor[f32, N, O]):
    """An operand is the same in all rounds."""
    for n, o in tiles(N, O):
        acc = zeros(n, o, dtype=f32)
        for j in range(3):
            for c in tiles(C):
                acc += x[n + j, c] @ w[c, o]
        y[n, o] = acc


@sp.kernel
def growing(x: Tensor[f32, M, C], w: Tensor[f32, 3, C, O], y: Tensor[f32, N, O]):
    """What is contracted grows."""
    for n, o in tiles(N, O):
        acc = zeros(n, o, dtype=f32)
        for j in range(3):
            for c in tiles(sp.span(0, j + 1)):
                acc += x[n + j, c] @ w[j, c, o]
        y[n, o] = acc


@pytest.mark.parametrize("k", [scaled, one_matrix, growing], ids=lambda k: k.name)
def test_others_stay(k: Kernel) -> None:
    assert loops_in_order(joined(k)) == 1
