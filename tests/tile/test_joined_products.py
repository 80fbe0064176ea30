"""Products that are summed at their places are made first (sapper/tile/joined_products.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapper import Tensor, dims, f32, i32, kernel, tiles, whole
from sapper.ir.nodes import Function, Value
from sapper.ir.verifier import verify
from sapper.tile.canonical import canonicalize
from sapper.tile.interpret import interpret
from sapper.tile.joined_products import part_joined_products
from sapper.tile.ops import TILE_OPS

C, E, H, O, P, W = dims("C E H O P W")
SIZES = {"C": 3, "E": 4, "H": 5, "O": 6, "P": 7, "W": 8}


@kernel
def transposed(x: Tensor[f32, C, H, W], w: Tensor[f32, C, O, 3, 2], y: Tensor[f32, O, 2 * H + 1, 2 * W]):
    """A convolution written as a scatter."""
    for o, i, j, h, v in tiles(O, 3, 2, H, W):
        c = whole(C)
        y[o, 2 * h + i, 2 * v + j] += x[c, h, v] @ w[c, o, i, j]


@kernel
def combined(x: Tensor[f32, P, C], w: Tensor[f32, C, W], token: Tensor[i32, P], y: Tensor[f32, E, W]):
    """What is made of the sums goes with them."""
    for p, v in tiles(P, W):
        c = whole(C)
        y[token[p], v] += 2.0 * (x[p, c] @ w[c, v]) + 1.0


@kernel
def scaled(x: Tensor[f32, P, C], w: Tensor[f32, C, W], gain: Tensor[f32, 1], token: Tensor[i32, P],
           y: Tensor[f32, E, W]):
    """A number that is read in the loop."""
    for p, v in tiles(P, W):
        c = whole(C)
        y[token[p], v] += (gain[0] * x[p, c]) @ w[c, v]


@kernel
def own_rows(x: Tensor[f32, P, C], w: Tensor[f32, C, W], y: Tensor[f32, P, W]):
    """Each element once: nothing is met again."""
    for p, v in tiles(P, W):
        c = whole(C)
        y[p, v] += x[p, c] @ w[c, v]


@kernel
def of_rows(x: Tensor[f32, P, C], w: Tensor[f32, C, W], token: Tensor[i32, P], y: Tensor[f32, E, W]):
    """Whole rows, which no loop goes along."""
    for p in tiles(P):
        c, v = whole(C), whole(W)
        y[token[p], v] += x[p, c] @ w[c, v]


@kernel
def of_itself(x: Tensor[f32, E, W], w: Tensor[f32, W, W], token: Tensor[i32, E], y: Tensor[f32, E, W]):
    """It stores to what it reads, in a loop after."""
    for p, v in tiles(E, W):
        c = whole(W)
        y[token[p], v] += x[p, c] @ w[c, v]
    for p, v in tiles(E, W):
        x[p, v] = 0.0


@pytest.mark.parametrize(("made", "loops"), [
    (transposed, 2), (combined, 2), (scaled, 2), (own_rows, 1), (of_rows, 1), (of_itself, 2),
], ids=lambda value: getattr(value, "name", ""))
def test_made_before(made: Any, loops: int) -> None:
    def top() -> list[str]:
        return [op.name for op in function.body.ops if op.blocks]

    def typical(value: Value) -> int:
        op = value.op
        return int(op.attributes["value"]) if op is not None and op.name == "const" else 64

    rng = np.random.default_rng(0)
    function: Function = made.tile_ir()
    canonicalize(function)
    given = {}
    for tensor in function.tensors():
        shape = [SIZES[d] if isinstance(d, str) else d for d in tensor.type.dims if not isinstance(d, tuple)]
        shape += [11, 16] if made is transposed and tensor.name == "y" else []
        given[tensor.name] = rng.integers(0, 4, shape, np.int32) if tensor.type.dtype is i32 else (
            rng.standard_normal(shape, np.float32))
    wanted = {name: array.copy() for name, array in given.items()}
    interpret(function, wanted)
    before = top()
    part_joined_products(function, typical, 65, 1 << 30)
    part_joined_products(function, typical, 28, 1 << 10)
    assert top() == before                      # too few rows; too large
    part_joined_products(function, typical, 28, 1 << 40)
    assert len(top()) == loops
    verify(function, TILE_OPS)
    interpret(function, given)
    for name, array in wanted.items():
        np.testing.assert_allclose(given[name], array, rtol=1e-4, atol=1e-4)
