"""Attention that no library has: biases, windows, a gradient, and a layer's other products round it."""

from __future__ import annotations

import numpy as np

import sapper as sp
from sapper import Tensor, each, exp, f32, full, i32, tiles, where, whole, zeros

from . import Example, empty, normal

B, D, H, K, M, N, R, S, T = sp.dims("B D H K M N R S T")
LOWEST = -3e38


@sp.kernel
def biased_attention(
    q: Tensor[f32, B, H, T, D], k: Tensor[f32, B, H, S, D], v: Tensor[f32, B, H, S, D], bias: Tensor[f32, H, T, S],
    y: Tensor[f32, B, H, T, D],
):
    """Any bias of queries by keys. The scores of a query stand for a whole row."""
    for b, h in each(B, H):
        for t in tiles(T):
            d, s = whole(D), whole(S)
            score = (q[b, h, t, d] @ k[b, h, s, d]) * 0.125 + bias[h, t, s]
            weight = exp(score - max(score, over=s))
            y[b, h, t, d] = (weight @ v[b, h, s, d]) / sum(weight, over=s)


@sp.kernel
def window_attention(
    q: Tensor[f32, H, T, D], k: Tensor[f32, H, T, D], v: Tensor[f32, H, T, D], slope: Tensor[f32, H], window: sp.i32,
    y: Tensor[f32, H, T, D],
):
    """Causal, as far back as `window`, and the further the less (ALiBi, arXiv:2108.12409), with a softmax that goes
    along the keys."""
    for h in each(H):
        for t in tiles(T):
            d = whole(D)
            top = full(t, value=LOWEST, dtype=f32)
            total = zeros(t, dtype=f32)
            acc = zeros(t, d, dtype=f32)
            for s in tiles(T):
                score = (q[h, t, d] @ k[h, s, d]) * 0.125 - slope[h] * (t - s).to(f32)
                score = where((s <= t) & (t - s < window), score, LOWEST)
                higher = sp.maximum(top, max(score, over=s))
                weight = exp(score - higher)
                fade = exp(top - higher)
                total = total * fade + sum(weight, over=s)
                acc = acc * fade + weight @ v[h, s, d]
                top = higher
            y[h, t, d] = acc / total


@sp.kernel
def listed_attention(
    q: Tensor[f32, T, H, D], cache: Tensor[f32, S, D], listed: Tensor[i32, T, N], y: Tensor[f32, T, H, D],
):
    """To the positions that a token lists, or fewer: a negative one is none. All heads share a cache, whose rows are
    keys and values (sparse attention of DeepSeek-V3.2)."""
    for t in each(T):
        h, d, n = whole(H), whole(D), whole(N)
        place = sp.maximum(listed[t, n], 0)
        score = where(listed[t, n] >= 0, (q[t, h, d] @ cache[place, d]) * 0.125, LOWEST)
        weight = exp(score - max(score, over=n))
        y[t, h, d] = (weight @ cache[place, d]) / sum(weight, over=n)


@sp.kernel
def gradient_of_queries(
    q: Tensor[f32, H, T, D], k: Tensor[f32, H, S, D], v: Tensor[f32, H, S, D], dy: Tensor[f32, H, T, D],
    dq: Tensor[f32, H, T, D],
):
    """Of softmax(q k / 8) v, from that of the result."""
    for h in each(H):
        for t in tiles(T):
            d, s = whole(D), whole(S)
            score = (q[h, t, d] @ k[h, s, d]) * 0.125
            power = exp(score - max(score, over=s))
            weight = power / sum(power, over=s)
            dweight = dy[h, t, d] @ v[h, s, d]
            dscore = weight * (dweight - sum(dweight * weight, over=s))
            dq[h, t, d] = (dscore @ k[h, s, d]) * 0.125


@sp.kernel
def normed_product(x: Tensor[f32, M, K], gain: Tensor[f32, K], w: Tensor[f32, N, K], y: Tensor[f32, M, N]):
    """RMSNorm, and a linear layer of it."""
    for m in tiles(M):
        k = whole(K)
        row = x[m, k] * sp.rsqrt(sum(x[m, k] * x[m, k], over=k) / float(K) + 1e-6) * gain[k]
        for n in tiles(N):
            y[m, n] = row @ w[n, k]


@sp.kernel
def low_rank_product(
    x: Tensor[f32, M, K], w: Tensor[f32, N, K], a: Tensor[f32, R, K], b: Tensor[f32, N, R], y: Tensor[f32, M, N],
):
    """A linear layer and an adapter of it (LoRA, arXiv:2106.09685)."""
    for m in tiles(M):
        k, r = whole(K), whole(R)
        low = x[m, k] @ a[r, k]
        for n in tiles(N):
            y[m, n] = x[m, k] @ w[n, k] + 2.0 * (low @ b[n, r])


@sp.kernel
def two_layers(x: Tensor[f32, M, K], w1: Tensor[f32, K, H], w2: Tensor[f32, H, N], y: Tensor[f32, M, N]):
    for m in tiles(M):
        k, h = whole(K), whole(H)
        hidden = sp.maximum(x[m, k] @ w1[k, h], 0.0)
        for n in tiles(N):
            y[m, n] = hidden @ w2[h, n]


def _softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _biased_reference(q, k, v, bias):
    return (_softmax(q @ k.swapaxes(-1, -2) * np.float32(0.125) + bias) @ v,)


def _window_bias(tokens, slope, window):
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    seen = (distance >= 0) & (distance < window)
    return np.where(seen, -slope[:, None, None] * distance, np.float32(LOWEST)).astype(np.float32)


def _window_reference(q, k, v, slope, window):
    return _biased_reference(q, k, v, _window_bias(q.shape[1], slope, window))


def _listed_reference(q, cache, listed):
    score = np.where(listed[:, None] >= 0, q @ cache[listed].swapaxes(1, 2) * np.float32(0.125), np.float32(LOWEST))
    return (_softmax(score) @ cache[listed],)


def _gradient_reference(q, k, v, dy):
    weight = _softmax(q @ k.swapaxes(-1, -2) * np.float32(0.125))
    dweight = dy @ v.swapaxes(-1, -2)
    return ((weight * (dweight - (dweight * weight).sum(-1, keepdims=True))) @ k * np.float32(0.125),)


def _normed_reference(x, gain, w):
    return ((x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-6) * gain) @ w.T,)


def _torch_biased(q, k, v, bias):
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.125)


def _torch_window(q, k, v, slope, window):
    import torch

    bias = torch.from_numpy(_window_bias(q.shape[1], slope.numpy(), window))
    return _torch_biased(q[None], k[None], v[None], bias[None])[0]


def _torch_listed(q, cache, listed):
    import torch

    rows = cache[listed.clamp(min=0)]
    score = (q @ rows.transpose(1, 2) * 0.125).masked_fill(listed[:, None] < 0, LOWEST)
    return torch.softmax(score, -1) @ rows


def _torch_gradient(q, k, v, dy):
    import torch

    weight = torch.softmax(q @ k.transpose(1, 2) * 0.125, -1)
    dweight = dy @ v.transpose(1, 2)
    return (weight * (dweight - (dweight * weight).sum(-1, keepdim=True))) @ k * 0.125


def _torch_normed(x, gain, w):
    from torch.nn.functional import rms_norm

    return rms_norm(x, gain.shape, gain, 1e-6) @ w.T


EXAMPLES = [
    Example(biased_attention, lambda random, s: (
        normal(random, s["B"], s["H"], s["T"], s["D"]),
        *(normal(random, s["B"], s["H"], s["S"], s["D"]) for _ in range(2)), normal(random, s["H"], s["T"], s["S"]),
        empty(s["B"], s["H"], s["T"], s["D"])),
        _biased_reference, {"B": 2, "H": 4, "T": 256, "S": 256, "D": 64}, {"B": 1, "H": 2, "T": 19, "S": 37, "D": 21},
        _torch_biased),
    Example(window_attention, lambda random, s: (
        *(normal(random, s["H"], s["T"], s["D"]) for _ in range(3)),
        np.float32(2) ** -np.arange(1, s["H"] + 1, dtype=np.float32), s["window"], empty(s["H"], s["T"], s["D"])),
        _window_reference, {"H": 8, "T": 512, "D": 64, "window": 256}, {"H": 2, "T": 70, "D": 20, "window": 9},
        _torch_window),
    Example(listed_attention, lambda random, s: (
        normal(random, s["T"], s["H"], s["D"]), normal(random, s["S"], s["D"]), np.stack(
            [random.permutation(s["S"])[:s["N"]] - np.where(np.arange(s["N"]) % 5 == 4, s["S"], 0)
             for _ in range(s["T"])]).astype(np.int32), empty(s["T"], s["H"], s["D"])),
        _listed_reference, {"T": 16, "H": 16, "D": 128, "S": 4096, "N": 512},
        {"T": 3, "H": 5, "D": 21, "S": 40, "N": 33}, _torch_listed),
    Example(gradient_of_queries, lambda random, s: (
        *(normal(random, s["H"], s[n], s["D"]) for n in "TSST"), empty(s["H"], s["T"], s["D"])),
        _gradient_reference, {"H": 4, "T": 256, "S": 256, "D": 64}, {"H": 2, "T": 19, "S": 37, "D": 21},
        _torch_gradient),
    Example(normed_product, lambda random, s: (
        normal(random, s["M"], s["K"]), normal(random, s["K"]), normal(random, s["N"], s["K"]),
        empty(s["M"], s["N"])),
        _normed_reference, {"M": 256, "K": 512, "N": 512}, {"M": 5, "K": 37, "N": 21}, _torch_normed),
    Example(low_rank_product, lambda random, s: (
        normal(random, s["M"], s["K"]), normal(random, s["N"], s["K"]), normal(random, s["R"], s["K"]),
        normal(random, s["N"], s["R"]), empty(s["M"], s["N"])),
        lambda x, w, a, b: (x @ w.T + 2 * (x @ a.T) @ b.T,),
        {"M": 256, "K": 512, "N": 512, "R": 16}, {"M": 5, "K": 37, "N": 21, "R": 3},
        lambda x, w, a, b: x @ w.T + 2 * (x @ a.T) @ b.T),
    Example(two_layers, lambda random, s: (
        normal(random, s["M"], s["K"]), 0.05 * normal(random, s["K"], s["H"]), 0.05 * normal(random, s["H"], s["N"]),
        empty(s["M"], s["N"])),
        lambda x, w1, w2: (np.maximum(x @ w1, 0) @ w2,),
        {"M": 256, "K": 256, "H": 1024, "N": 256}, {"M": 133, "K": 21, "H": 70, "N": 37},
        lambda x, w1, w2: (x @ w1).clamp(min=0) @ w2),
]
