"""Contractions of fp8; with block scales as DeepSeek-V3 has them: 1 x 128 of activations, 128 x 128 of weights."""

from __future__ import annotations

import sapper as sp
from sapper import Tensor, bf16, f8e4m3, f32, tiles, zeros

M, N, K, KB, NB = sp.dims("M N K KB NB")


@sp.kernel
def block_scaled(a: Tensor[f8e4m3, M, K], sa: Tensor[f32, M, KB], b: Tensor[f8e4m3, N, K], sb: Tensor[f32, NB, KB],
                 c: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += (a[m, k].to(f32) * sa[m, k // 128]) @ (b[n, k].to(f32) * sb[n // 128, k // 128])
        c[m, n] = acc.to(bf16)


@sp.kernel
def unscaled(a: Tensor[f8e4m3, M, K], b: Tensor[f8e4m3, N, K], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k].to(f32) @ b[n, k].to(f32)
        c[m, n] = acc
