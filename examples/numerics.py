"""Work of other fields: nothing here knows of models."""

from __future__ import annotations

import numpy as np

import sapper as sp
from sapper import Tensor, each, exp, f32, f64, i32, minimum, span, tiles, u8, where, whole, zeros

from . import Example, empty, normal

B, E, J, K, M, N, P = sp.dims("B E J K M N P")
STEPS = 50


@sp.kernel
def gravity(x: Tensor[f32, 3, N], mass: Tensor[f32, N], force: Tensor[f32, 3, N]):
    """Of all bodies on each."""
    for i in tiles(N):
        j = whole(N)
        dx, dy, dz = x[0, j] - x[0, i], x[1, j] - x[1, i], x[2, j] - x[2, i]
        square = dx * dx + dy * dy + dz * dz + 0.01
        pull = mass[j] * sp.rsqrt(square) / square
        force[0, i] = sum(dx * pull, over=j)
        force[1, i] = sum(dy * pull, over=j)
        force[2, i] = sum(dz * pull, over=j)


@sp.kernel
def call_prices(spot: Tensor[f32, N], strike: Tensor[f32, N], years: Tensor[f32, N], price: Tensor[f32, N]):
    """Black and Scholes, of European calls at a volatility of 20 % and a rate of 5 %."""
    for n in tiles(N):
        width = 0.2 * sp.sqrt(years[n])
        first = (sp.log(spot[n] / strike[n]) + 0.07 * years[n]) / width
        second = first - width
        price[n] = 0.5 * (spot[n] * (1.0 + sp.erf(first * 0.70710678))
                          - strike[n] * exp(-0.05 * years[n]) * (1.0 + sp.erf(second * 0.70710678)))


@sp.kernel
def escape_times(real: Tensor[f32, M], imaginary: Tensor[f32, N], steps: Tensor[i32, M, N]):
    """How long z = z**2 + c stays within 2, up to STEPS."""
    for m, n in tiles(M, N):
        re, im, count = zeros(m, n, dtype=f32), zeros(m, n, dtype=f32), zeros(m, n, dtype=i32)
        for _ in range(STEPS):
            inside = re * re + im * im < 4.0
            count += where(inside, 1, 0).to(i32)
            further = re * re - im * im + real[m]
            im = where(inside, 2.0 * re * im + imaginary[n], im)
            re = where(inside, further, re)
        steps[m, n] = count


@sp.kernel
def sparse_product(start: Tensor[i32, P], column: Tensor[i32, J], value: Tensor[f32, J], x: Tensor[f32, N],
                   y: Tensor[f32, M]):
    """A matrix by compressed rows times a vector. `m + 0`: P is M + 1."""
    for m in each(M):
        j = whole(span(start[m + 0], start[m + 1]))
        y[m] = sum(value[j] * x[column[j]], over=j)


@sp.kernel
def table_product(x: Tensor[f32, M, K], w: Tensor[u8, N, P], table: Tensor[f32, 16], scale: Tensor[f32, N, J],
                  y: Tensor[f32, M, N]):
    """By weights of four bits, two in a byte, each a number of a table times the scale of its 64 (NF4)."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            both = w[n, k // 2]
            place = where(k % 2 == 0, both >> 4, both & 15)
            acc += x[m, k] @ (table[place.to(i32)] * scale[n, k // 64])
        y[m, n] = acc


@sp.kernel
def complex_product(
    a_re: Tensor[f32, M, K], a_im: Tensor[f32, M, K], b_re: Tensor[f32, K, N], b_im: Tensor[f32, K, N],
    c_re: Tensor[f32, M, N], c_im: Tensor[f32, M, N],
):
    for m, n in tiles(M, N):
        k = whole(K)
        c_re[m, n] = a_re[m, k] @ b_re[k, n] - a_im[m, k] @ b_im[k, n]
        c_im[m, n] = a_re[m, k] @ b_im[k, n] + a_im[m, k] @ b_re[k, n]


@sp.kernel
def double_product(a: Tensor[f64, M, K], b: Tensor[f64, K, N], c: Tensor[f64, M, N]):
    for m, n in tiles(M, N):
        k = whole(K)
        c[m, n] = a[m, k] @ b[k, n]


@sp.kernel
def histogram(x: Tensor[i32, N], count: Tensor[i32, M]):
    for m in tiles(M):
        count[m] = 0
    for n in tiles(N):
        count[x[n]] += 1


@sp.kernel
def smallest_labels(left: Tensor[i32, E], right: Tensor[i32, E], label: Tensor[i32, N], smallest: Tensor[i32, N]):
    """A step towards the connected parts of a graph: of each node and its neighbours."""
    for n in tiles(N):
        smallest[n] = label[n]
    for e in tiles(E):
        smallest[left[e]] = sp.minimum(smallest[left[e]], label[right[e]])
        smallest[right[e]] = sp.minimum(smallest[right[e]], label[left[e]])


@sp.kernel
def heat_on_a_torus(x: Tensor[f32, M, N], rate: f32, y: Tensor[f32, M, N]):
    """A step of it: what leaves on one side comes in on the other."""
    for m, n in tiles(M, N):
        beside = x[m, (n + 1) % N] + x[m, (n - 1) % N] + x[(m + 1) % M, n] + x[(m - 1) % M, n]
        y[m, n] = x[m, n] + rate * (beside - 4.0 * x[m, n])


@sp.kernel
def cholesky(a: Tensor[f32, B, N, N], upper: Tensor[f32, B, N, N]):
    """a is upper.T @ upper. A row at a time: an element at a time each would wait for the one before it."""
    for b in each(B):
        for i in range(N):
            k, j = whole(span(0, i)), whole(span(i, N))
            row = a[b, i, j] - sum(upper[b, k, i] * upper[b, k, j], over=k)
            upper[b, i, j] = row
            upper[b, i, j] = row * sp.rsqrt(upper[b, i, i])
            upper[b, i, k] = 0.0


@sp.kernel
def triangular_solve(lower: Tensor[f32, N, N], b: Tensor[f32, N, M], x: Tensor[f32, N, M]):
    """lower @ x is b. What is known goes into 16 rows as one product, which then follow one by one."""
    for m in tiles(M):
        for first in range(0, N, 16):
            stop = minimum(first + 16, N)
            i, known = whole(span(first, stop)), whole(span(0, first))
            x[i, m] = b[i, m] - lower[i, known] @ x[known, m]
            for row in range(first, stop):
                k = whole(span(first, row))
                x[row, m] = (x[row, m] - sum(lower[row, k] * x[k, m], over=k)) / lower[row, row]


def _gravity_reference(x, mass):
    between = x[:, None, :] - x[:, :, None]
    square = (between * between).sum(0) + np.float32(0.01)
    return ((between * (mass / np.sqrt(square) / square)).sum(2),)


def _prices_reference(spot, strike, years):
    from math import erf

    def likely(x):
        return 0.5 + 0.5 * np.vectorize(erf)(x * 0.70710678)

    s, k, t = (x.astype(np.float64) for x in (spot, strike, years))
    width = 0.2 * np.sqrt(t)
    first = (np.log(s / k) + 0.07 * t) / width
    return (s * likely(first) - k * np.exp(-0.05 * t) * likely(first - width),)


def _escape_reference(real, imaginary):
    c = real.astype(np.float64)[:, None] + 1j * imaginary
    z, count = np.zeros_like(c), np.zeros(c.shape, np.int32)
    for _ in range(STEPS):
        inside = z.real**2 + z.imag**2 < 4
        count += inside
        z = np.where(inside, z * z + c, z)
    return (count,)


def _sparse_reference(start, column, value, x):
    return (np.add.reduceat(value * x[column], start[:-1]),)


def _table_reference(x, w, table, scale):
    weights = table[np.stack([w >> 4, w & 15], axis=-1).reshape(len(w), -1)] * scale.repeat(64, axis=1)
    return (x @ weights.T,)


def _complex_reference(a_re, a_im, b_re, b_im):
    return a_re @ b_re - a_im @ b_im, a_re @ b_im + a_im @ b_re


def _labels_reference(left, right, label):
    smallest = label.copy()
    np.minimum.at(smallest, left, label[right])
    np.minimum.at(smallest, right, label[left])
    return (smallest,)


def _torus_reference(x, rate):
    beside = sum(np.roll(x, step, axis) for axis in (0, 1) for step in (-1, 1))
    return (x + np.float32(rate) * (beside - 4 * x),)


def _torch_gravity(x, mass):
    import torch

    between = x[:, None, :] - x[:, :, None]
    square = (between * between).sum(0) + 0.01
    return (between * (mass * torch.rsqrt(square) / square)).sum(2)


def _torch_prices(spot, strike, years):
    import torch

    width = 0.2 * years.sqrt()
    first = (torch.log(spot / strike) + 0.07 * years) / width
    return 0.5 * (spot * (1 + torch.erf(first * 0.70710678))
                  - strike * torch.exp(-0.05 * years) * (1 + torch.erf((first - width) * 0.70710678)))


def _torch_sparse(start, column, value, x):
    import torch

    return torch.sparse_csr_tensor(start, column, value, (len(start) - 1, len(x))) @ x


def _torch_table(x, w, table, scale):
    import torch

    weights = table[torch.stack([w >> 4, w & 15], -1).flatten(1).long()] * scale.repeat_interleave(64, 1)
    return x @ weights.T


def _torch_complex(a_re, a_im, b_re, b_im):
    import torch

    return torch.view_as_real(torch.complex(a_re, a_im) @ torch.complex(b_re, b_im)).unbind(-1)


def _torch_labels(left, right, label):
    left, right = left.long(), right.long()
    smallest = label.scatter_reduce(0, left, label[right], "amin")
    return smallest.scatter_reduce_(0, right, label[left], "amin")


def _cholesky_reference(a):
    return (np.linalg.cholesky(a.astype(np.float64)).transpose(0, 2, 1),)


def _positive(random, b, n):
    a = normal(random, b, n, n)
    return a @ a.transpose(0, 2, 1) + 4 * np.eye(n, dtype=np.float32)


def _lower(random, n):
    return np.tril(0.1 * normal(random, n, n), -1) + np.diag(1 + random.random(n, dtype=np.float32))


def _torch_torus(x, rate):
    return x + rate * (x.roll(1, 0) + x.roll(-1, 0) + x.roll(1, 1) + x.roll(-1, 1) - 4 * x)


def _torch_cholesky(a):
    import torch

    return torch.linalg.cholesky(a, upper=True)


def _torch_solve(lower, b):
    import torch

    return torch.linalg.solve_triangular(lower, b, upper=False)


EXAMPLES = [
    Example(gravity, lambda random, s: (
        normal(random, 3, s["N"]), random.random(s["N"], np.float32), empty(3, s["N"])),
        _gravity_reference, {"N": 1024}, {"N": 53}, _torch_gravity),
    Example(call_prices, lambda random, s: (
        *(random.random(s["N"], np.float32) + np.float32(0.5) for _ in range(3)), empty(s["N"])),
        _prices_reference, {"N": 1 << 18}, {"N": 53}, _torch_prices),
    # Near the border of the set a step more or less depends on the last bits: these points are away from it.
    Example(escape_times, lambda random, s: (
        np.linspace(-2, 1, s["M"], dtype=np.float32), np.linspace(1.3, 2, s["N"], dtype=np.float32),
        empty(s["M"], s["N"], dtype=np.int32)),
        _escape_reference, {"M": 256, "N": 256}, {"M": 5, "N": 37}),
    Example(sparse_product, lambda random, s: (
        np.arange(s["M"] + 1, dtype=np.int32) * s["K"], random.integers(0, s["N"], s["M"] * s["K"], np.int32),
        normal(random, s["M"] * s["K"]), normal(random, s["N"]), empty(s["M"])),
        _sparse_reference, {"M": 4096, "N": 4096, "K": 16}, {"M": 5, "N": 21, "K": 3}, _torch_sparse),
    Example(table_product, lambda random, s: (
        normal(random, s["M"], 64 * s["J"]), random.integers(0, 256, (s["N"], 32 * s["J"]), np.uint8),
        np.linspace(-1, 1, 16, dtype=np.float32), normal(random, s["N"], s["J"]), empty(s["M"], s["N"])),
        _table_reference, {"M": 1, "N": 4096, "J": 64}, {"M": 2, "N": 19, "J": 1}, _torch_table),
    Example(complex_product, lambda random, s: (
        *(normal(random, s["M"], s["K"]) for _ in range(2)), *(normal(random, s["K"], s["N"]) for _ in range(2)),
        *(empty(s["M"], s["N"]) for _ in range(2))),
        _complex_reference, {"M": 256, "N": 256, "K": 256}, {"M": 5, "N": 37, "K": 19}, _torch_complex, results=2),
    Example(double_product, lambda random, s: (
        random.standard_normal((s["M"], s["K"])), random.standard_normal((s["K"], s["N"])),
        empty(s["M"], s["N"], dtype=np.float64)),
        lambda a, b: (a @ b,), {"M": 512, "N": 512, "K": 512}, {"M": 5, "N": 37, "K": 19}, lambda a, b: a @ b),
    Example(histogram, lambda random, s: (      # the last number occurs: bincount ends with the largest
        np.append(random.integers(0, s["M"], s["N"] - 1, np.int32), np.int32(s["M"] - 1)),
        empty(s["M"], dtype=np.int32)),
        lambda x: (np.bincount(x).astype(np.int32),), {"M": 64, "N": 65536}, {"M": 21, "N": 1000},
        lambda x: x.bincount()),
    Example(smallest_labels, lambda random, s: (
        *(random.integers(0, s["N"], s["E"], np.int32) for _ in range(2)),
        random.permutation(s["N"]).astype(np.int32), empty(s["N"], dtype=np.int32)),
        _labels_reference, {"E": 65536, "N": 4096}, {"E": 70, "N": 21}, _torch_labels),
    Example(heat_on_a_torus, lambda random, s: (normal(random, s["M"], s["N"]), 0.1, empty(s["M"], s["N"])),
            _torus_reference, {"M": 512, "N": 512}, {"M": 5, "N": 37}, _torch_torus),
    Example(cholesky, lambda random, s: (_positive(random, s["B"], s["N"]), empty(s["B"], s["N"], s["N"])),
            _cholesky_reference, {"B": 256, "N": 32}, {"B": 2, "N": 21},
            _torch_cholesky),
    Example(triangular_solve, lambda random, s: (
        _lower(random, s["N"]), normal(random, s["N"], s["M"]), empty(s["N"], s["M"])),
        lambda lower, b: (np.linalg.solve(lower.astype(np.float64), b),), {"N": 256, "M": 256}, {"N": 37, "M": 21},
        _torch_solve),
]
