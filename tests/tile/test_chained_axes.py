"""Columns of the last of two products as one piece (sapper/tile/chained_axes.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapper import Tensor, dims, f32, kernel, sigmoid, tiles, whole, zeros
from sapper.ir.verifier import verify
from sapper.tile.canonical import canonicalize
from sapper.tile.chained_axes import keep_columns_whole
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS

T, S, D, E = dims("T S D E")


@kernel
def weighed(q: Tensor[f32, T, D], k: Tensor[f32, S, D], v: Tensor[f32, S, E], o: Tensor[f32, T, E]):
    for t, e in tiles(T, E):
        acc = zeros(t, e, dtype=f32)
        for s in tiles(S):
            d = whole(D)
            acc += sigmoid(q[t, d] @ k[s, d]) @ v[s, e]
        o[t, e] = acc


@pytest.mark.parametrize(("made", "most", "axes"), [(weighed, 1024, ["t"]), (weighed, 1025, ["t", "e"])],
                         ids=["few", "many"])
def test_columns(made: Any, most: int, axes: list[str]) -> None:
    rng = np.random.default_rng(0)
    shapes = {"q": (5, 3), "k": (7, 3), "v": (7, 4), "o": (5, 4)}
    given = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    wanted = {name: array.copy() for name, array in given.items()}
    function = made.tile_ir()
    canonicalize(function)
    interpret(function, wanted, 2)
    keep_columns_whole(function, lambda value: most if value.op is None or value.op.name == "dim" else 0)
    assert next(op for op in function.body.ops if op.name == "tiles").attributes["axes"] == axes
    verify(function, TILE_OPS)
    interpret(function, given, 2)
    np.testing.assert_allclose(given["o"], wanted["o"], rtol=1e-5, atol=1e-5)
