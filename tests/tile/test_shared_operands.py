"""Loads that products of matrices have in common are one; all others stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, f32, tiles, whole, zeros
from sapper.ir.verifier import verify
from sapper.tile.canonical import canonicalize
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.shared_operands import share_operands

K, M, N = sp.dims("K M N")


@sp.kernel
def both_parts(a: Tensor[f32, 2, M, K], b: Tensor[f32, 2, K, N], c: Tensor[f32, 2, M, N]):
    for m, n in tiles(M, N):
        real, imaginary = zeros(m, n, dtype=f32), zeros(m, n, dtype=f32)
        for k in tiles(K):
            real += a[0, m, k] @ b[0, k, n] - a[1, m, k] @ b[1, k, n]
            imaginary += a[0, m, k] @ b[1, k, n] + a[1, m, k] @ b[0, k, n]
        c[0, m, n] = real
        c[1, m, n] = imaginary


@sp.kernel
def by_a_vector(a: Tensor[f32, 2, M, K], b: Tensor[f32, 2, K, N], c: Tensor[f32, 2, M, N]):
    for m in tiles(M):
        k, n = whole(K), whole(N)
        c[0, m, n] = b[0, k, n] @ b[1, k, 0] + a[0, m, 0] * 0.0
        c[1, m, n] = b[1, k, n] @ b[1, k, 0] + a[0, m, 0] * 0.0


@sp.kernel
def what_is_stored(a: Tensor[f32, 2, M, K], b: Tensor[f32, 2, K, N], c: Tensor[f32, 2, M, N]):
    for m in tiles(M):
        k, n = whole(K), whole(N)
        c[0, m, n] = a[0, m, k] @ b[0, k, n]
        a[0, m, k] = a[0, m, k] * 2.0
        c[1, m, n] = a[0, m, k] @ b[1, k, n]


@pytest.mark.parametrize(("kernel", "gone"), [(both_parts, 4), (by_a_vector, 0), (what_is_stored, 0)],
                         ids=lambda value: getattr(value, "name", None))
def test_what_products_have_in_common_is_loaded_once(kernel: Any, gone: int) -> None:
    function = kernel.tile_ir()
    reduce_loops(function)
    canonicalize(function)
    random = np.random.default_rng(0)
    given = {"a": random.standard_normal((2, 5, 7), np.float32), "b": random.standard_normal((2, 7, 6), np.float32)}
    results = []
    for shares in (False, True):
        loads = sum(op.name == "load" for op in function.walk())
        if shares:
            share_operands(function)
            verify(function, TILE_OPS)
            assert sum(op.name == "load" for op in function.walk()) == loads - gone
        arguments = {name: array.copy() for name, array in given.items()} | {"c": np.zeros((2, 5, 6), np.float32)}
        interpret(function, arguments)
        results.append(arguments["c"])
    np.testing.assert_array_equal(*results)


def test_what_is_met_along_other_axes_is_loaded_for_each() -> None:
    """Latent vectors, which are keys and values: a copy that serves both serves neither well."""
    @sp.kernel
    def attended(q: Tensor[f32, M, K], latent: Tensor[f32, N, K], out: Tensor[f32, M, K]):
        for m in tiles(M):
            k, n = whole(K), whole(N)
            score = q[m, k] @ latent[n, k]
            out[m, k] = score @ latent[n, k]

    function = attended.tile_ir()
    loads = sum(op.name == "load" for op in function.walk())
    share_operands(function)
    assert sum(op.name == "load" for op in function.walk()) == loads == 3
