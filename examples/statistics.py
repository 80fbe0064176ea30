"""Sums, maxima and scans down the columns of a matrix, or over several axes."""

from __future__ import annotations

import numpy as np

import sapper as sp
from sapper import Tensor, each, exp, f32, i32, tiles, whole, zeros

from . import Example, empty, normal

B, C, G, K, M, N = sp.dims("B C G K M N")
GROUP = 8


@sp.kernel
def batch_statistics_nhwc(x: Tensor[f32, M, C], mean: Tensor[f32, C], variance: Tensor[f32, C]):
    for c in tiles(C):
        m = whole(M)
        middle = sum(x[m, c], over=m) / float(M)
        mean[c] = middle
        variance[c] = sum((x[m, c] - middle) * (x[m, c] - middle), over=m) / float(M)


@sp.kernel
def batch_statistics_nchw(x: Tensor[f32, B, C, N], mean: Tensor[f32, C], variance: Tensor[f32, C]):
    for c in tiles(C):
        b, n = whole(B), whole(N)
        middle = sum(x[b, c, n], over=(b, n)) / float(B * N)
        mean[c] = middle
        variance[c] = sum((x[b, c, n] - middle) * (x[b, c, n] - middle), over=(b, n)) / float(B * N)


@sp.kernel
def group_norm(x: Tensor[f32, B, C, N], gain: Tensor[f32, C], y: Tensor[f32, B, C, N]):
    groups, gains, results = x.view(B, C // GROUP, GROUP, N), gain.view(C // GROUP, GROUP), y.view(
        B, C // GROUP, GROUP, N)
    for b, g in each(B, C // GROUP):
        c, n = whole(GROUP), whole(N)
        centred = groups[b, g, c, n] - sum(groups[b, g, c, n], over=(c, n)) / float(GROUP * N)
        scale = sp.rsqrt(sum(centred * centred, over=(c, n)) / float(GROUP * N) + 1e-5)
        results[b, g, c, n] = centred * scale * gains[g, c]


@sp.kernel
def softmax_of_columns(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for n in tiles(N):
        m = whole(M)
        power = exp(x[m, n] - max(x[m, n], over=m))
        y[m, n] = power / sum(power, over=m)


@sp.kernel
def largest_of_columns(x: Tensor[f32, M, N], place: Tensor[i32, N]):
    for n in tiles(N):
        m = whole(M)
        place[n] = sp.argmax(x[m, n], over=m).to(i32)


@sp.kernel
def sums_down(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for n in tiles(N):
        m = whole(M)
        y[m, n] = sp.cumsum(x[m, n], over=m)


@sp.kernel
def mean_of_bags(table: Tensor[f32, N, C], token: Tensor[i32, B, K], y: Tensor[f32, B, C]):
    """Of K rows of a table each."""
    for b in each(B):
        for c in tiles(C):
            acc = zeros(c, dtype=f32)
            for k in range(K):
                acc += table[token[b, k], c]
            y[b, c] = acc / float(K)


@sp.kernel
def sums_of_segments(x: Tensor[f32, N], segment: Tensor[i32, N], total: Tensor[f32, M]):
    for m in tiles(M):
        total[m] = 0.0
    for n in tiles(N):
        total[segment[n]] += x[n]


def _softmax_reference(x):
    powers = np.exp(x - x.max(0))
    return (powers / powers.sum(0),)


def _group_norm_reference(x, gain):
    b, c, n = x.shape
    groups = x.reshape(b, c // GROUP, -1)
    centred = groups - groups.mean(2, keepdims=True)
    normed = centred / np.sqrt((centred * centred).mean(2, keepdims=True) + 1e-5)
    return (normed.reshape(b, c, n) * gain[:, None],)


def _torch_statistics(axes):
    def peer(x):
        import torch

        variance, mean = torch.var_mean(x, axes, unbiased=False)
        return mean, variance

    return peer


def _torch_group_norm(x, gain):
    from torch.nn.functional import group_norm

    return group_norm(x, x.shape[1] // GROUP, gain)


def _segments_reference(x, segment):
    total = np.zeros(len(x) // 16, np.float32)
    np.add.at(total, segment, x)
    return (total,)


def _torch_segments(x, segment):
    return x.new_zeros(len(x) // 16).index_add(0, segment, x)


def _torch_bags(table, token):
    from torch.nn.functional import embedding_bag

    return embedding_bag(token, table, mode="mean")


EXAMPLES = [
    Example(batch_statistics_nhwc, lambda random, s: (normal(random, s["M"], s["C"]), empty(s["C"]), empty(s["C"])),
            lambda x: (x.mean(0), x.var(0)), {"M": 12544, "C": 64}, {"M": 23, "C": 37}, _torch_statistics(0),
            results=2),
    Example(batch_statistics_nchw, lambda random, s: (
        normal(random, s["B"], s["C"], s["N"]), empty(s["C"]), empty(s["C"])),
        lambda x: (x.mean((0, 2)), x.var((0, 2))), {"B": 16, "C": 64, "N": 784}, {"B": 2, "C": 5, "N": 39},
        _torch_statistics((0, 2)), results=2),
    Example(group_norm, lambda random, s: (
        normal(random, s["B"], s["C"], s["N"]), normal(random, s["C"]), empty(s["B"], s["C"], s["N"])),
        _group_norm_reference, {"B": 4, "C": 64, "N": 1024}, {"B": 1, "C": 16, "N": 39}, _torch_group_norm),
    Example(softmax_of_columns, lambda random, s: (normal(random, s["M"], s["N"]), empty(s["M"], s["N"])),
            _softmax_reference, {"M": 512, "N": 512}, {"M": 5, "N": 83}, lambda x: x.softmax(0)),
    Example(largest_of_columns, lambda random, s: (normal(random, s["M"], s["N"]), empty(s["N"], dtype=np.int32)),
            lambda x: (x.argmax(0).astype(np.int32),), {"M": 1024, "N": 1024}, {"M": 5, "N": 83},
            lambda x: x.argmax(0)),
    Example(sums_down, lambda random, s: (normal(random, s["M"], s["N"]), empty(s["M"], s["N"])),
            lambda x: (np.cumsum(x, 0, dtype=np.float32),), {"M": 512, "N": 1024}, {"M": 5, "N": 83},
            lambda x: x.cumsum(0)),
    Example(mean_of_bags, lambda random, s: (
        normal(random, s["N"], s["C"]), random.integers(0, s["N"], (s["B"], s["K"]), np.int32),
        empty(s["B"], s["C"])),
        lambda table, token: (table[token].mean(1),), {"N": 4096, "C": 128, "B": 512, "K": 20},
        {"N": 9, "C": 37, "B": 3, "K": 4}, _torch_bags),
    Example(sums_of_segments, lambda random, s: (
        normal(random, s["N"]), random.integers(0, s["N"] // 16, s["N"], np.int32), empty(s["N"] // 16)),
        _segments_reference, {"N": 65536}, {"N": 333}, _torch_segments),
]
