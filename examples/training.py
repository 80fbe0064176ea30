"""Gradients and a step of an optimiser."""

from __future__ import annotations

import numpy as np

import sapper as sp
from sapper import Tensor, exp, f32, i32, tiles, where, whole

from . import Example, empty, normal

K, M, N = sp.dims("K M N")


@sp.kernel
def layer_norm_gradient(x: Tensor[f32, M, N], dy: Tensor[f32, M, N], gain: Tensor[f32, N], dx: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        centred = x[m, n] - sum(x[m, n], over=n) / float(N)
        scale = sp.rsqrt(sum(centred * centred, over=n) / float(N) + 1e-5)
        normed = centred * scale
        d = dy[m, n] * gain[n]
        dx[m, n] = scale * (d - sum(d, over=n) / float(N) - normed * (sum(d * normed, over=n) / float(N)))


@sp.kernel
def rms_norm_gradient(
    x: Tensor[f32, M, N], dy: Tensor[f32, M, N], gain: Tensor[f32, N], dx: Tensor[f32, M, N], dgain: Tensor[f32, N],
):
    """And of the gain, to which all rows add: `0 * m` says that each of them does."""
    for n in tiles(N):
        dgain[n] = 0.0
    for m in tiles(M):
        n = whole(N)
        scale = sp.rsqrt(sum(x[m, n] * x[m, n], over=n) / float(N) + 1e-6)
        d = dy[m, n] * gain[n]
        dx[m, n] = scale * (d - x[m, n] * (scale * scale * sum(d * x[m, n], over=n) / float(N)))
        dgain[n + 0 * m] += dy[m, n] * x[m, n] * scale


@sp.kernel
def cross_entropy_gradient(logits: Tensor[f32, M, N], label: Tensor[i32, M], dlogits: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        power = exp(logits[m, n] - max(logits[m, n], over=n))
        dlogits[m, n] = (power / sum(power, over=n) - where(n == label[m], 1.0, 0.0)) / float(M)


@sp.kernel
def linear_gradient(x: Tensor[f32, M, K], dy: Tensor[f32, M, N], dw: Tensor[f32, K, N], dbias: Tensor[f32, N]):
    """Of the weights and the bias of x w + bias."""
    for k, n in tiles(K, N):
        m = whole(M)
        dw[k, n] = x[m, k] @ dy[m, n]
    for n in tiles(N):
        m = whole(M)
        dbias[n] = sum(dy[m, n], over=m)


@sp.kernel(in_place=[("after", "before")])
def embedding_gradient(before: Tensor[f32, K, N], dy: Tensor[f32, M, N], token: Tensor[i32, M],
                       after: Tensor[f32, K, N]):
    """Of the table, added to what other batches gave."""
    for k, n in tiles(K, N):
        after[k, n] = before[k, n]
    for m, n in tiles(M, N):
        after[token[m], n] += dy[m, n]


@sp.kernel(in_place=[("next_p", "p"), ("next_m", "m"), ("next_v", "v")])
def adam_step(
    p: Tensor[f32, N], m: Tensor[f32, N], v: Tensor[f32, N], gradient: Tensor[f32, N], rate: f32,
    next_p: Tensor[f32, N], next_m: Tensor[f32, N], next_v: Tensor[f32, N],
):
    """arXiv:1412.6980, without the correction of the first steps."""
    for n in tiles(N):
        mean = 0.9 * m[n] + 0.1 * gradient[n]
        spread = 0.999 * v[n] + 0.001 * gradient[n] * gradient[n]
        next_m[n] = mean
        next_v[n] = spread
        next_p[n] = p[n] - rate * mean / (sp.sqrt(spread) + 1e-8)


@sp.kernel
def dropout(x: Tensor[f32, N], seed: i32, y: Tensor[f32, N]):
    """A tenth of all elements, by a hash of their places, become 0."""
    for n in tiles(N):
        mixed = (n.to(i32) * -1640531527) ^ seed
        mixed = (mixed ^ ((mixed >> 16) & 65535)) * 2146121005
        mixed = (mixed ^ ((mixed >> 15) & 131071)) * -2073254261
        y[n] = where((mixed & 1023) >= 102, x[n] * (1024.0 / 922.0), 0.0)


def _layer_norm_reference(x, dy, gain):
    centred = x - x.mean(1, keepdims=True)
    scale = 1 / np.sqrt((centred * centred).mean(1, keepdims=True) + 1e-5)
    normed, d = centred * scale, dy * gain
    return (scale * (d - d.mean(1, keepdims=True) - normed * (d * normed).mean(1, keepdims=True)),)


def _rms_norm_reference(x, dy, gain):
    scale, d = 1 / np.sqrt((x * x).mean(1, keepdims=True) + 1e-6), dy * gain
    return scale * (d - x * scale * scale * (d * x).mean(1, keepdims=True)), (dy * x * scale).sum(0)


def _cross_entropy_reference(logits, label):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    found = powers / powers.sum(1, keepdims=True)
    found[np.arange(len(label)), label] -= 1
    return (found / len(label),)


def _embedding_reference(before, dy, token):
    after = before.copy()
    np.add.at(after, token, dy)
    return (after,)


def _adam_reference(p, m, v, gradient, rate):
    mean, spread = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient * gradient
    return p - rate * mean / (np.sqrt(spread) + 1e-8), mean, spread


def _dropout_reference(x, seed):
    mixed = (np.arange(len(x), dtype=np.uint32) * np.uint32(-1640531527 & 0xFFFFFFFF)) ^ np.uint32(seed)
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(2146121005)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(-2073254261 & 0xFFFFFFFF)
    return (np.where((mixed & 1023) >= 102, x * np.float32(1024 / 922), np.float32(0)),)


def _torch_layer_norm(x, dy, gain):
    import torch

    mean = x.mean(1, keepdim=True)
    scale = torch.rsqrt(x.var(1, unbiased=False, keepdim=True) + 1e-5)
    return torch.ops.aten.native_layer_norm_backward(
        dy, x, list(gain.shape), mean, scale, gain, gain, [True, False, False])[0]


def _torch_rms_norm(x, dy, gain):
    import torch

    scale, d = torch.rsqrt((x * x).mean(1, keepdim=True) + 1e-6), dy * gain
    return scale * (d - x * scale * scale * (d * x).mean(1, keepdim=True)), (dy * x * scale).sum(0)


def _torch_cross_entropy(logits, label):
    import torch

    found = torch.softmax(logits, 1)
    found[torch.arange(len(label)), label.long()] -= 1
    return found / len(label)


def _torch_adam(p, m, v, gradient, rate):
    mean, spread = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient * gradient
    return p - rate * mean / (spread.sqrt() + 1e-8), mean, spread


EXAMPLES = [
    Example(layer_norm_gradient, lambda random, s: (
        normal(random, s["M"], s["N"]), normal(random, s["M"], s["N"]), normal(random, s["N"]),
        empty(s["M"], s["N"])),
        _layer_norm_reference, {"M": 512, "N": 1024}, {"M": 3, "N": 61}, _torch_layer_norm),
    Example(rms_norm_gradient, lambda random, s: (
        normal(random, s["M"], s["N"]), normal(random, s["M"], s["N"]), normal(random, s["N"]),
        empty(s["M"], s["N"]), empty(s["N"])),
        _rms_norm_reference, {"M": 512, "N": 1024}, {"M": 3, "N": 61}, _torch_rms_norm, results=2),
    Example(cross_entropy_gradient, lambda random, s: (
        normal(random, s["M"], s["N"]), random.integers(0, s["N"], s["M"], np.int32), empty(s["M"], s["N"])),
        _cross_entropy_reference, {"M": 64, "N": 8192}, {"M": 3, "N": 61}, _torch_cross_entropy),
    Example(linear_gradient, lambda random, s: (
        normal(random, s["M"], s["K"]), normal(random, s["M"], s["N"]), empty(s["K"], s["N"]), empty(s["N"])),
        lambda x, dy: (x.T @ dy, dy.sum(0)),
        {"M": 512, "K": 256, "N": 256}, {"M": 19, "K": 5, "N": 37}, lambda x, dy: (x.T @ dy, dy.sum(0)), results=2),
    Example(embedding_gradient, lambda random, s: (
        normal(random, s["K"], s["N"]), normal(random, s["M"], s["N"]),
        random.integers(0, s["K"], s["M"], np.int32), empty(s["K"], s["N"])),
        _embedding_reference, {"M": 4096, "N": 256, "K": 4096}, {"M": 19, "N": 37, "K": 7},
        lambda before, dy, token: before.index_add(0, token, dy)),
    Example(adam_step, lambda random, s: (
        normal(random, s["N"]), normal(random, s["N"]), normal(random, s["N"]) ** 2, normal(random, s["N"]), 1e-3,
        *(empty(s["N"]) for _ in range(3))),
        _adam_reference, {"N": 1 << 18}, {"N": 77}, _torch_adam, results=3),
    Example(dropout, lambda random, s: (normal(random, s["N"]), 7, empty(s["N"])),
            _dropout_reference, {"N": 1 << 18}, {"N": 77}),
]
