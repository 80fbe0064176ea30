"""Products whose weights, or activations, are computed on their way: weights of 4 and 8 bits with their scales."""

from __future__ import annotations

import sapper as sp
from sapper import Tensor, bf16, each, exp, f8e4m3, f8e5m2, f16, f32, i8, i32, maximum, span, tiles, u8, whole, zeros

M, N, K, KB, NB, B, E = sp.dims("M N K KB NB B E")


@sp.kernel
def int8(x: Tensor[bf16, M, K], w: Tensor[i8, N, K], s: Tensor[f32, N], y: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += x[m, k] @ w[n, k].to(bf16)
        y[m, n] = (acc * s[n]).to(bf16)


@sp.kernel
def int8_in_out(x: Tensor[f16, M, K], w: Tensor[i8, K, N], s: Tensor[f32, KB, N], y: Tensor[f32, M, N]):
    """Weights as (in, out): neighbours of a lane are columns."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += x[m, k] @ (w[k, n].to(f32) * s[k // 128, n]).to(f16)
        y[m, n] = acc


@sp.kernel
def int4(x: Tensor[bf16, M, K], w: Tensor[u8, N, K // 2], s: Tensor[f32, N, KB], y: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            q = (w[n, k // 2].to(i32) >> (k % 2 * 4)) & 15
            acc += x[m, k] @ ((q - 8).to(f32) * s[n, k // 128]).to(bf16)
        y[m, n] = acc.to(bf16)


@sp.kernel
def int4_zeros(x: Tensor[f16, M, K], w: Tensor[u8, N, K // 2], s: Tensor[f16, N, KB], z: Tensor[u8, N, KB],
               y: Tensor[f16, M, N]):
    """With zero points of groups of 32."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            q = (w[n, k // 2].to(i32) >> (k % 2 * 4)) & 15
            acc += x[m, k] @ ((q - z[n, k // 32].to(i32)).to(f16) * s[n, k // 32])
        y[m, n] = acc.to(f16)


@sp.kernel
def int4_halves(x: Tensor[bf16, M, K], w: Tensor[u8, N, KB, 16], s: Tensor[f16, N, KB], y: Tensor[f32, M, N]):
    """Blocks of 32, whose first half is in the lower bits (GGUF's Q4_0)."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            q = (w[n, k // 32, k % 16].to(i32) >> (k % 32 // 16 * 4)) & 15
            acc += x[m, k] @ ((q - 8).to(f32) * s[n, k // 32].to(f32)).to(bf16)
        y[m, n] = acc


@sp.kernel
def int4_pairs(x: Tensor[bf16, M, K], w: Tensor[u8, N, K // 2], s: Tensor[f32, N, KB], y: Tensor[bf16, M, N]):
    """Two products, of the lower bits and the upper ones."""
    in_pairs = x.view(M, K // 2, 2)
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for h in tiles(K // 2):
            q, scale = w[n, h], s[n, h // 64]
            low, high = ((q & 15).to(f32) - 8.0) * scale, ((q >> 4).to(f32) - 8.0) * scale
            acc += in_pairs[m, h, 0] @ low.to(bf16) + in_pairs[m, h, 1] @ high.to(bf16)
        y[m, n] = acc.to(bf16)


@sp.kernel
def int4_blocks(x: Tensor[f16, M, KB, 32], w: Tensor[u8, N, KB, 16], s: Tensor[f16, N, KB], y: Tensor[f32, M, N]):
    """The same of blocks of 32, one after the other."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for b in each(KB):
            j = whole(16)
            q, scale = w[n, b, j].to(i32), s[n, b]
            acc += x[m, b, j] @ (((q & 15) - 8).to(f16) * scale)
            acc += x[m, b, j + 16] @ (((q >> 4) - 8).to(f16) * scale)
        y[m, n] = acc


@sp.kernel
def int4_words(x: Tensor[f16, M, K], w: Tensor[i32, KB, N], s: Tensor[f16, KB, N], y: Tensor[f16, M, N]):
    """Eight of the depth in a word, as GPTQ has them."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            q = (w[k // 8, n] >> (k % 8 * 4)) & 15
            acc += x[m, k] @ ((q - 8).to(f16) * s[k // 128, n])
        y[m, n] = acc.to(f16)


@sp.kernel
def int4_columns(x: Tensor[f16, M, K], w: Tensor[i32, K, NB], s: Tensor[f16, KB, N], y: Tensor[f16, M, N]):
    """Eight columns in a word, as AWQ has them, but for their order."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            q = (w[k, n // 8] >> (n % 8 * 4)) & 15
            acc += x[m, k] @ ((q - 8).to(f16) * s[k // 128, n])
        y[m, n] = acc.to(f16)


@sp.kernel
def of_table(x: Tensor[bf16, M, K], w: Tensor[u8, N, K // 2], s: Tensor[f32, N, KB], t: Tensor[f32, 16],
             y: Tensor[bf16, M, N]):
    """NF4 and the like."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            q = (w[n, k // 2].to(i32) >> (k % 2 * 4)) & 15
            acc += x[m, k] @ (t[q] * s[n, k // 64]).to(bf16)
        y[m, n] = acc.to(bf16)


@sp.kernel
def fp8_blocks(x: Tensor[bf16, M, K], w: Tensor[f8e4m3, N, K], s: Tensor[f32, NB, KB], y: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += x[m, k] @ (w[n, k].to(f32) * s[n // 128, k // 128]).to(bf16)
        y[m, n] = acc.to(bf16)


@sp.kernel
def fp8_plain(x: Tensor[f16, M, K], w: Tensor[f8e5m2, N, K], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += x[m, k] @ w[n, k].to(f16)
        y[m, n] = acc


@sp.kernel
def experts(x: Tensor[bf16, E, M, K], w: Tensor[u8, E, N, K // 2], s: Tensor[bf16, E, N, KB], y: Tensor[bf16, E, M, N]):
    for e in each(E):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=f32)
            for k in tiles(K):
                q = (w[e, n, k // 2].to(i32) >> (k % 2 * 4)) & 15
                acc += x[e, m, k] @ ((q - 8).to(bf16) * s[e, n, k // 128])
            y[e, m, n] = acc.to(bf16)


@sp.kernel
def grouped(x: Tensor[bf16, M, K], start: Tensor[i32, E], stop: Tensor[i32, E], w: Tensor[u8, E, N, K // 2],
            s: Tensor[f32, E, N, KB], y: Tensor[bf16, M, N]):
    """Rows of each expert are one after the other, and begin anywhere."""
    for e in each(E, disjoint=True):
        for m, n in tiles(span(start[e], stop[e]), N):
            acc = zeros(m, n, dtype=f32)
            for k in tiles(K):
                q = (w[e, n, k // 2].to(i32) >> (k % 2 * 4)) & 15
                acc += x[m, k] @ ((q - 8).to(f32) * s[e, n, k // 128]).to(bf16)
            y[m, n] = acc.to(bf16)


@sp.kernel
def gated4(x: Tensor[bf16, M, K], w: Tensor[u8, N, K // 2], s: Tensor[f32, N, KB], v: Tensor[u8, N, K // 2],
           t: Tensor[f32, N, KB], y: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        a = zeros(m, n, dtype=f32)
        b = zeros(m, n, dtype=f32)
        for k in tiles(K):
            q = (w[n, k // 2].to(i32) >> (k % 2 * 4)) & 15
            p = (v[n, k // 2].to(i32) >> (k % 2 * 4)) & 15
            a += x[m, k] @ ((q - 8).to(f32) * s[n, k // 128]).to(bf16)
            b += x[m, k] @ ((p - 8).to(f32) * t[n, k // 128]).to(bf16)
        y[m, n] = (a / (1.0 + exp(-a)) * b).to(bf16)


@sp.kernel
def gated_pairs(x: Tensor[bf16, M, K], w: Tensor[u8, N, K // 2], s: Tensor[f32, N, KB], v: Tensor[u8, N, K // 2],
                t: Tensor[f32, N, KB], y: Tensor[bf16, M, N]):
    """The same by halves: four products."""
    in_pairs = x.view(M, K // 2, 2)
    for m, n in tiles(M, N):
        a = zeros(m, n, dtype=f32)
        b = zeros(m, n, dtype=f32)
        for h in tiles(K // 2):
            q, p, scale, other = w[n, h].to(i32), v[n, h].to(i32), s[n, h // 64], t[n, h // 64]
            a += in_pairs[m, h, 0] @ (((q & 15) - 8).to(f32) * scale).to(bf16)
            a += in_pairs[m, h, 1] @ (((q >> 4) - 8).to(f32) * scale).to(bf16)
            b += in_pairs[m, h, 0] @ (((p & 15) - 8).to(f32) * other).to(bf16)
            b += in_pairs[m, h, 1] @ (((p >> 4) - 8).to(f32) * other).to(bf16)
        y[m, n] = (a / (1.0 + exp(-a)) * b).to(bf16)


@sp.kernel
def two_layers(x: Tensor[bf16, M, K], w: Tensor[u8, N, K // 2], s: Tensor[f32, N, KB], v: Tensor[i8, K, N],
               y: Tensor[bf16, M, K]):
    """Each is a loop of its own, and makes its weights on their way."""
    for m in tiles(M):
        n, k, h = whole(N), whole(K), whole(K)
        q = (w[n, k // 2].to(i32) >> (k % 2 * 4)) & 15
        a = maximum(x[m, k] @ ((q - 8).to(f32) * s[n, k // 128]).to(bf16), 0.0).to(bf16)
        y[m, h] = (a @ v[h, n].to(bf16)).to(bf16)


@sp.kernel
def normed(x: Tensor[f32, M, K], r: Tensor[f32, M], g: Tensor[bf16, K], w: Tensor[u8, N, K // 2],
           s: Tensor[f32, N, KB], y: Tensor[bf16, M, N]):
    """Both operands are computed: activations that a norm scales, none of them less than its place says."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            a = maximum(x[m, k] * r[m] * g[k].to(f32), (k % 4).to(f32) * 0.25)
            q = (w[n, k // 2].to(i32) >> (k % 2 * 4)) & 15
            acc += a.to(bf16) @ ((q - 8).to(f32) * s[n, k // 128]).to(bf16)
        y[m, n] = acc.to(bf16)


KERNELS = (int8, int8_in_out, int4, int4_zeros, int4_halves, int4_pairs, int4_blocks, int4_words, int4_columns,
           of_table, fp8_blocks, fp8_plain, experts, grouped, gated4, gated_pairs, two_layers, normed)


# Bytes by bytes, each block of 128 with scales.


@sp.kernel
def blocks(x: Tensor[i8, M, B, 128], s: Tensor[f32, M, B], w: Tensor[i8, N, B, 128], t: Tensor[f16, N, B],
           y: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for b in each(B):
            k = whole(128)
            part = x[m, b, k] @ w[n, b, k]
            acc += part.to(f32) * s[m, b] * t[n, b].to(f32)
        y[m, n] = acc.to(bf16)


@sp.kernel
def blocks_in_turn(x: Tensor[u8, M, K], w: Tensor[i8, N, K], t: Tensor[f32, N, B], y: Tensor[f32, M, N]):
    """One side alone has scales."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for b in each(B):
            part = zeros(m, n, dtype=i32)
            for k in tiles(span(b * 128, b * 128 + 128)):
                part += x[m, k] @ w[n, k]
            acc += part.to(f32) * t[n, b]
        y[m, n] = acc


@sp.kernel
def scaled_bytes(x: Tensor[i8, M, K], s: Tensor[f32, M, B], w: Tensor[i8, N, K], t: Tensor[f32, NB, B],
                 y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += (x[m, k].to(f32) * s[m, k // 128]) @ (w[n, k].to(f32) * t[n // 32, k // 128])
        y[m, n] = acc


BLOCKS = (blocks, blocks_in_turn, scaled_bytes)
