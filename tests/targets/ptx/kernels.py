"""Kernels that contract tensors of 16-bit elements, in each order of their axes."""

from __future__ import annotations

import sapper as sp
from sapper import Tensor, bf16, exp, f16, f32, tiles, zeros

M, N, K = sp.dims("M N K")


@sp.kernel
def bf16_nn(a: Tensor[bf16, M, K], b: Tensor[bf16, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[k, n]
        c[m, n] = acc


@sp.kernel
def bf16_nt(a: Tensor[bf16, M, K], b: Tensor[bf16, N, K], c: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[n, k]
        c[m, n] = (acc * 0.5).to(bf16)


@sp.kernel
def f16_tn(a: Tensor[f16, K, M], b: Tensor[f16, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[k, m] @ b[k, n]
        c[m, n] = acc


@sp.kernel
def gated(x: Tensor[bf16, M, K], gate: Tensor[bf16, N, K], up: Tensor[bf16, N, K], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        g = zeros(m, n, dtype=f32)
        u = zeros(m, n, dtype=f32)
        for k in tiles(K):
            g += x[m, k] @ gate[n, k]
            u += x[m, k] @ up[n, k]
        y[m, n] = g / (1.0 + exp(-g)) * u


@sp.kernel
def turned_bf16(a: Tensor[bf16, M, K], b: Tensor[bf16, N, K], c: Tensor[bf16, N, M]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[n, k]
        c[n, m] = acc.to(bf16)


KERNELS = (bf16_nn, bf16_nt, f16_tn, gated)
