"""Kernels with every kind of parameter, for tests of built libraries."""

from __future__ import annotations

from sapper import (
    Tensor,
    bf16,
    bool_,
    dims,
    each,
    exp,
    f16,
    f32,
    f64,
    i8,
    i16,
    i32,
    i64,
    kernel,
    maximum,
    minimum,
    tiles,
    u8,
    where,
    whole,
    zeros,
)

M, N, K, B = dims("M N K B")


@kernel
def scale(x: Tensor[f32, M, N], factor: f32, out: Tensor[f32, M, N]):
    """out = factor * x."""
    for m, n in tiles(M, N):
        out[m, n] = x[m, n] * factor


@kernel
def matmul(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[k, n]
        c[m, n] = acc


@kernel
def pairs(x: Tensor[f32, M, K], out: Tensor[f32, M, N]):
    """Needs K >= 2 * N."""
    for m, n in tiles(M, N):
        out[m, n] = x[m, 2 * n] + x[m, 2 * n + 1]


@kernel
def many(
    x: Tensor[i64, N], a: i8, b: u8, c: i16, d: i32, e: i64, f: bool_, g: f32, h: f64, i: f16, j: bf16, k: f32, l: f32,
    m: f32, o: f32, p: f32, q: f64, r: f64, s: i8, out: Tensor[f64, N, 3],
):
    """More arguments of each class than registers."""
    for n in each(N):
        whole_part = x[n] + a.to(i64) * 2 + b.to(i64) * 3 + c.to(i64) * 5 + d.to(i64) * 7 + e * 11 + s.to(i64) * 13
        out[n, 0] = whole_part.to(f64)
        out[n, 1] = g.to(f64) + h * 2.0 + i.to(f64) * 3.0 + j.to(f64) * 5.0 + k.to(f64) * 7.0 + l.to(f64) * 11.0
        rest = m.to(f64) * 2.0 + o.to(f64) * 3.0 + p.to(f64) * 5.0 + q * 7.0 + r * 11.0
        out[n, 2] = rest if f else -rest


@kernel
def blocks(x: Tensor[u8, M, K], out: Tensor[f32, M, N]):
    """Words of 4 bytes, each a multiple of K, added to their number in the row."""
    words = x.view(M, K // 4, dtype=f32)
    for m, n in tiles(M, K // 4):
        out[m, n] = words[m, n] + n.to(f32)


@kernel
def halves(x: Tensor[f32, M, K // N, 3], w: Tensor[f32, N], out: Tensor[f32, M, K]):
    """An extent is computed; its last stride is known, the first follows from it."""
    for m, i in tiles(M, K // N):
        out[m, i + 0] = x[m, i, 0] + x[m, i, 2] * w[0]


@kernel(in_place=[("x", "y")])
def twice(x: Tensor[f32, N], y: Tensor[f32, N], register: f32):
    """`register` is a word of C."""
    for n in tiles(N):
        y[n] = x[n] * register


@kernel
def digits(x: Tensor[f32, K], w: Tensor[f32, M], out: Tensor[f32, N]):
    """How far indices reach is computed of extents; where there is nothing to write, nothing is asked."""
    for n in tiles(N):
        out[n] = x[(n // 2 * 3 + n % 2) ^ 1] + w[minimum(n, 3) - N + M]


@kernel
def picked(x: Tensor[u8, M, N], at: Tensor[i32, K], out: Tensor[u8, K]):
    """Each lane reads a row of its own, which it finds by an offset."""
    for k in tiles(K):
        out[k] = x[at[k], at[k] % 2]


@kernel
def beside(x: Tensor[f32, M, N], own: Tensor[f32, K], out: Tensor[f32, M, N + K]):
    """A softmax over what rows have and what all share: how much scratch memory it takes is computed of a sum."""
    for m in tiles(M):
        n = whole(N + K)
        row = where(n < N, x[m, minimum(n, N - 1)], own[maximum(n - N, 0)])
        power = exp(row - max(row, over=n))
        out[m, n] = power / sum(power, over=n)


@kernel
def placed(x: Tensor[f32, N], position: i32, back: bool_, cache: Tensor[f32, K]):
    """Where indices are hangs on scalars, and on a branch."""
    for n in each(N):
        if back:
            cache[position - n] = x[5 * n % 7]
        else:
            cache[position + n] = x[n]
