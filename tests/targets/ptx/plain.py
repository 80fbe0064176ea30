"""Contractions of 16-bit elements that are rounded on their way to near memory."""

from __future__ import annotations

import sapper as sp
from sapper import Tensor, bf16, f16, f32, tiles, whole, zeros

M, N, K = sp.dims("M N K")


@sp.kernel
def rounded(a: Tensor[f32, M, K], b: Tensor[bf16, N, K], c: Tensor[f32, M, N]):
    """Activations of f32, rounded on their way."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k].to(bf16) @ b[n, k]
        c[m, n] = acc


@sp.kernel
def both_rounded(a: Tensor[f32, K, M], b: Tensor[f32, K, N], c: Tensor[f16, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[k, m].to(f16) @ b[k, n].to(f16)
        c[m, n] = acc.to(f16)


@sp.kernel
def gated_columns(x: Tensor[f32, M, K], gate: Tensor[bf16, N, K], up: Tensor[bf16, N, K], y: Tensor[f32, N, M]):
    """The rows of a tile lie in the lanes of its stores, and of few rows a warp has fewer than there are lanes. Two
    products with one left operand can't have theirs the other way round."""
    for m in tiles(M):
        n, k = whole(N), whole(K)
        y[n, m] = (x[m, k] @ gate[n, k]) * (x[m, k] @ up[n, k])


@sp.kernel
def either_way(x: Tensor[bf16, M, K], one: Tensor[bf16, N, K], other: Tensor[bf16, K, N], y: Tensor[f32, M, N]):
    """The right operands of two products lie in memory either way."""
    for m, n in tiles(M, N):
        k = whole(K)
        y[m, n] = x[m, k] @ one[n, k] - x[m, k] @ other[k, n]


KERNELS = (rounded, both_rounded)
