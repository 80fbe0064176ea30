"""Convolutions and windows: loops over the window, round whatever is summed in it."""

from __future__ import annotations

import numpy as np

import sapper as sp
from sapper import Tensor, each, f32, full, i8, i32, tiles, where, whole, zeros

from . import Example, empty, normal

B, C, H, K, N, O, P, Q, S, T, W = sp.dims("B C H K N O P Q S T W")
LOWEST = -3e38


@sp.kernel
def causal_convolution(x: Tensor[f32, T, C], w: Tensor[f32, 4, C], y: Tensor[f32, T, C]):
    """Each channel by itself, of this token and the three before it (Mamba)."""
    for t, c in tiles(T, C):
        acc = zeros(t, c, dtype=f32)
        for k in range(4):
            acc += w[k, c] * where(t >= k, x[sp.maximum(t - k, 0), c], 0.0)
        y[t, c] = acc


@sp.kernel
def convolution_nhwc(x: Tensor[f32, B, H, W, C], w: Tensor[f32, 3, 3, C, O], y: Tensor[f32, B, P, Q, O]):
    for b, p in each(B, P):
        for q, o in tiles(Q, O):
            acc = zeros(q, o, dtype=f32)
            for i in range(3):
                for j in range(3):
                    for c in tiles(C):
                        acc += x[b, p + i, q + j, c] @ w[i, j, c, o]
            y[b, p, q, o] = acc


@sp.kernel
def convolution_nchw(x: Tensor[f32, B, C, H, W], w: Tensor[f32, O, C, 3, 3], y: Tensor[f32, B, O, P, Q]):
    for b, p in each(B, P):
        for o, q in tiles(O, Q):
            acc = zeros(o, q, dtype=f32)
            for c in range(C):
                for i in range(3):
                    for j in range(3):
                        acc += w[o, c, i, j] * x[b, c, p + i, q + j]
            y[b, o, p, q] = acc


@sp.kernel
def strided_convolution(x: Tensor[f32, B, C, H, W], w: Tensor[f32, O, C, 3, 3], y: Tensor[f32, B, O, P, Q]):
    """Around every other point, with zeros around the image; all of it as one product."""
    for b, o, p, q in tiles(B, O, P, Q):
        c, i, j = whole(C), whole(3), whole(3)
        h, v = 2 * p + i - 1, 2 * q + j - 1
        inside = (h >= 0) & (h < H) & (v >= 0) & (v < W)
        point = x[b, c, sp.maximum(sp.minimum(h, H - 1), 0), sp.maximum(sp.minimum(v, W - 1), 0)]
        y[b, o, p, q] = w[o, c, i, j] @ where(inside, point, 0.0)


@sp.kernel
def patch_embedding(x: Tensor[f32, B, C, 14 * P, 14 * Q], w: Tensor[f32, O, C, 14, 14], y: Tensor[f32, B, P, Q, O]):
    """Squares of an image as vectors (vision transformers)."""
    squares = x.view(B, C, P, 14, Q, 14)
    for b, p, q, o in tiles(B, P, Q, O):
        c, i, j = whole(C), whole(14), whole(14)
        y[b, p, q, o] = squares[b, c, p, i, q, j] @ w[o, c, i, j]


@sp.kernel
def convolution_by_channel(x: Tensor[f32, B, C, H, W], w: Tensor[f32, C, 3, 3], y: Tensor[f32, B, C, P, Q]):
    """Channels first, each by itself (depthwise)."""
    for b, c in each(B, C):
        for p, q in tiles(P, Q):
            acc = zeros(p, q, dtype=f32)
            for i in range(3):
                for j in range(3):
                    acc += x[b, c, p + i, q + j] * w[c, i, j]
            y[b, c, p, q] = acc


@sp.kernel
def convolution_gradient(g: Tensor[f32, B, P, Q, O], w: Tensor[f32, 3, 3, C, O], dx: Tensor[f32, B, H, W, C]):
    """Of what convolution_nhwc reads: windows that end past the edges, where the gradient is 0."""
    for b, h in each(B, H):
        for v, c in tiles(W, C):
            acc = zeros(v, c, dtype=f32)
            for i in range(3):
                for j in range(3):
                    inside = (v >= j) & (v - j < Q) & (h >= i) & (h - i < P)
                    p, q = sp.minimum(sp.maximum(h - i, 0), P - 1), sp.minimum(sp.maximum(v - j, 0), Q - 1)
                    for o in tiles(O):
                        acc += where(inside, g[b, p, q, o], 0.0) @ w[i, j, c, o]
            dx[b, h, v, c] = acc


@sp.kernel
def weights_gradient(x: Tensor[f32, B, C, H, W], g: Tensor[f32, B, O, P, Q], dw: Tensor[f32, O, C, 3, 3]):
    """Of the weights of convolution_nchw: each tap adds up products of pixels over all images."""
    for o, c in tiles(O, C):
        for i in range(3):
            for j in range(3):
                acc = zeros(o, c, dtype=f32)
                for b in range(B):
                    for p in range(P):
                        for q in range(Q):
                            acc += g[b, o, p, q] * x[b, c, p + i, q + j]
                dw[o, c, i, j] = acc


@sp.kernel
def weights_gradient_by_channel(x: Tensor[f32, B, C, H, W], g: Tensor[f32, B, C, P, Q], dw: Tensor[f32, C, 3, 3]):
    """Of the weights of convolution_by_channel: nine sums that read the same gradient, and nearly the same image."""
    for c in tiles(C):
        for i in range(3):
            for j in range(3):
                acc = zeros(c, dtype=f32)
                for b in range(B):
                    p, q = whole(P), whole(Q)
                    acc += sum(g[b, c, p, q] * x[b, c, p + i, q + j], over=(p, q))
                dw[c, i, j] = acc


@sp.kernel
def convolution_i8(
    x: Tensor[i8, B, H, W, C], w: Tensor[i8, O, 3, 3, C], scale: Tensor[f32, O], y: Tensor[i8, B, P, Q, O],
):
    """Of quantised channels, exact in i32, and quantised again."""
    for b, p in each(B, P):
        for q, o in tiles(Q, O):
            acc = zeros(q, o, dtype=i32)
            for i in range(3):
                for j in range(3):
                    for c in tiles(C):
                        acc += x[b, p + i, q + j, c] @ w[o, i, j, c]
            y[b, p, q, o] = sp.round(sp.maximum(sp.minimum(acc.to(f32) * scale[o], 127.0), -127.0)).to(i8)


@sp.kernel
def largest_of_squares(x: Tensor[f32, B, H, W, C], y: Tensor[f32, B, P, Q, C]):
    """Of every two by two."""
    for b, p in each(B, P):
        for q, c in tiles(Q, C):
            top = full(q, c, value=LOWEST, dtype=f32)
            for i in range(2):
                for j in range(2):
                    top = sp.maximum(top, x[b, 2 * p + i, 2 * q + j, c])
            y[b, p, q, c] = top


@sp.kernel
def blur(x: Tensor[f32, S, W], w: Tensor[f32, K], y: Tensor[f32, S, P]):
    """Along each row, by a window whose length a call says."""
    for s, p in tiles(S, P):
        acc = zeros(s, p, dtype=f32)
        for k in range(K):
            acc += w[k] * x[s, p + k]
        y[s, p] = acc


@sp.kernel
def heat_step(x: Tensor[f32, H, W], y: Tensor[f32, P, Q]):
    """Five points. `p + 0`: P is less than H, and part of x is meant."""
    for p, q in tiles(P, Q):
        y[p, q] = 0.2 * (x[p + 1, q + 1] + x[p + 0, q + 1] + x[p + 2, q + 1] + x[p + 1, q + 0] + x[p + 1, q + 2])


def _windows(x, rows, columns):
    return np.lib.stride_tricks.sliding_window_view(x, (rows, columns), axis=(-2, -1))


@sp.kernel
def sum_of_patches(x: Tensor[f32, C, 3, 3, P, Q], image: Tensor[f32, C, H, W]):
    """Patches, each added where it came from: the gradient of what they were cut from."""
    for c, h, w in tiles(C, H, W):
        image[c, h, w] = 0.0
    for c, r, s, p, q in tiles(C, 3, 3, P, Q):
        image[c, p + r, q + s] += x[c, r, s, p, q]


def _causal_reference(x, w):
    padded = np.concatenate([np.zeros((3, x.shape[1]), np.float32), x])
    return (sum(w[k] * padded[3 - k : 3 - k + len(x)] for k in range(4)),)


def _nhwc_reference(x, w):
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    return (np.einsum("bpqcij,ijco->bpqo", windows, w, optimize=True),)


def _nchw_reference(x, w):
    return (np.einsum("bcpqij,ocij->bopq", _windows(x, 3, 3), w, optimize=True),)


def _strided_reference(x, w):
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::2, ::2]
    return (np.einsum("bcpqij,ocij->bopq", windows, w, optimize=True),)


def _embedding_reference(x, w):
    b, c, h, v = x.shape
    squares = x.reshape(b, c, h // 14, 14, v // 14, 14)
    return (np.einsum("bcpiqj,ocij->bpqo", squares, w, optimize=True),)


def _channel_reference(x, w):
    return (np.einsum("bcpqij,cij->bcpq", _windows(x, 3, 3), w),)


def _gradient_reference(g, w):
    padded = np.pad(g, ((0, 0), (2, 2), (2, 2), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[..., ::-1, ::-1]
    return (np.einsum("bhvoij,ijco->bhvc", windows, w, optimize=True),)


def _weights_reference(x, g):
    return (np.einsum("bopq,bcijpq->ocij", g, _windows(x, *g.shape[2:]), optimize=True),)


def _weights_by_channel_reference(x, g):
    return (np.einsum("bcpq,bcijpq->cij", g.astype(np.float64), _windows(x, g.shape[2], g.shape[3])),)


def _i8_reference(x, w, scale):
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float32), (3, 3), axis=(1, 2))
    sums = np.einsum("bpqcij,oijc->bpqo", windows, w.astype(np.float32), optimize=True)    # below 2**24: exact
    return (np.rint(np.clip(sums * scale, -127, 127)).astype(np.int8),)


def _squares_reference(x):
    b, h, w, c = x.shape
    return (x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4)),)


def _blur_reference(x, w):
    return (np.lib.stride_tricks.sliding_window_view(x, len(w), axis=1) @ w,)


def _heat_reference(x):
    return (0.2 * (x[1:-1, 1:-1] + x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:]),)


def _patches_reference(x):
    c, _, _, p, q = x.shape
    image = np.zeros((c, p + 2, q + 2), np.float32)
    for r in range(3):
        for s in range(3):
            image[:, r:r + p, s:s + q] += x[:, r, s]
    return (image,)


def _torch_patches(x):
    from torch.nn.functional import fold

    c, _, _, p, q = x.shape
    return fold(x.reshape(c * 9, p * q), (p + 2, q + 2), 3)


def _torch_causal(x, w):
    from torch.nn.functional import conv1d, pad

    return conv1d(pad(x.T[None], (3, 0)), w.flip(0).T[:, None], groups=x.shape[1])[0].T


def _torch_nhwc(x, w):
    from torch.nn.functional import conv2d

    return conv2d(x.permute(0, 3, 1, 2), w.permute(3, 2, 0, 1)).permute(0, 2, 3, 1)


def _torch_nchw(x, w):
    from torch.nn.functional import conv2d

    return conv2d(x, w)


def _torch_strided(x, w):
    from torch.nn.functional import conv2d

    return conv2d(x, w, stride=2, padding=1)


def _torch_embedding(x, w):
    from torch.nn.functional import conv2d

    return conv2d(x, w, stride=14).permute(0, 2, 3, 1)


def _torch_channel(x, w):
    from torch.nn.functional import conv2d

    return conv2d(x, w[:, None], groups=w.shape[0])


def _torch_gradient(g, w):
    from torch.nn.functional import conv_transpose2d

    return conv_transpose2d(g.permute(0, 3, 1, 2), w.permute(3, 2, 0, 1)).permute(0, 2, 3, 1)


def _torch_weights(x, g):
    import torch

    return torch.nn.grad.conv2d_weight(x, (g.shape[1], x.shape[1], 3, 3), g)


def _torch_weights_by_channel(x, g):
    import torch

    return torch.nn.grad.conv2d_weight(x, (x.shape[1], 1, 3, 3), g, groups=x.shape[1])


def _torch_i8(x, w, scale):
    """By f32, as PyTorch has no such convolution for CPUs outside of its quantised modules."""
    from torch.nn.functional import conv2d

    sums = conv2d(x.permute(0, 3, 1, 2).float(), w.permute(0, 3, 1, 2).float()).permute(0, 2, 3, 1)
    return (sums * scale).clamp(-127, 127).round().to(x.dtype)


def _torch_squares(x):
    from torch.nn.functional import max_pool2d

    return max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


def _torch_blur(x, w):
    from torch.nn.functional import conv1d

    return conv1d(x[:, None], w[None, None])[:, 0]


EXAMPLES = [
    Example(causal_convolution, lambda random, s: (
        normal(random, s["T"], s["C"]), normal(random, 4, s["C"]), empty(s["T"], s["C"])),
        _causal_reference, {"T": 1024, "C": 1024}, {"T": 7, "C": 37}, _torch_causal),
    Example(convolution_nhwc, lambda random, s: (
        normal(random, s["B"], s["P"] + 2, s["Q"] + 2, s["C"]), normal(random, 3, 3, s["C"], s["O"]),
        empty(s["B"], s["P"], s["Q"], s["O"])),
        _nhwc_reference, {"B": 2, "P": 32, "Q": 32, "C": 64, "O": 64}, {"B": 1, "P": 3, "Q": 9, "C": 5, "O": 35},
        _torch_nhwc),
    Example(convolution_nchw, lambda random, s: (
        normal(random, s["B"], s["C"], s["P"] + 2, s["Q"] + 2), normal(random, s["O"], s["C"], 3, 3),
        empty(s["B"], s["O"], s["P"], s["Q"])),
        _nchw_reference, {"B": 2, "P": 32, "Q": 32, "C": 64, "O": 64}, {"B": 1, "P": 3, "Q": 37, "C": 3, "O": 5},
        _torch_nchw),
    Example(strided_convolution, lambda random, s: (
        normal(random, s["B"], s["C"], 2 * s["P"], 2 * s["Q"]), normal(random, s["O"], s["C"], 3, 3),
        empty(s["B"], s["O"], s["P"], s["Q"])),
        _strided_reference, {"B": 2, "C": 64, "O": 128, "P": 28, "Q": 28}, {"B": 1, "C": 3, "O": 33, "P": 4, "Q": 9},
        _torch_strided),
    Example(patch_embedding, lambda random, s: (
        normal(random, s["B"], s["C"], 14 * s["P"], 14 * s["Q"]), normal(random, s["O"], s["C"], 14, 14),
        empty(s["B"], s["P"], s["Q"], s["O"])),
        _embedding_reference, {"B": 1, "C": 3, "O": 1024, "P": 16, "Q": 16}, {"B": 1, "C": 2, "O": 35, "P": 2, "Q": 3},
        _torch_embedding),
    Example(convolution_by_channel, lambda random, s: (
        normal(random, s["B"], s["C"], s["P"] + 2, s["Q"] + 2), normal(random, s["C"], 3, 3),
        empty(s["B"], s["C"], s["P"], s["Q"])),
        _channel_reference, {"B": 2, "C": 128, "P": 56, "Q": 56}, {"B": 1, "C": 2, "P": 5, "Q": 37}, _torch_channel),
    Example(convolution_gradient, lambda random, s: (
        normal(random, s["B"], s["P"], s["Q"], s["O"]), normal(random, 3, 3, s["C"], s["O"]),
        empty(s["B"], s["P"] + 2, s["Q"] + 2, s["C"])),
        _gradient_reference, {"B": 2, "P": 32, "Q": 32, "C": 64, "O": 64}, {"B": 1, "P": 3, "Q": 5, "C": 19, "O": 6},
        _torch_gradient),
    Example(weights_gradient, lambda random, s: (
        normal(random, s["B"], s["C"], s["P"] + 2, s["Q"] + 2), normal(random, s["B"], s["O"], s["P"], s["Q"]),
        empty(s["O"], s["C"], 3, 3)),
        _weights_reference, {"B": 2, "P": 32, "Q": 32, "C": 64, "O": 64}, {"B": 2, "P": 2, "Q": 19, "C": 3, "O": 5},
        _torch_weights),
    Example(weights_gradient_by_channel, lambda random, s: (
        normal(random, s["B"], s["C"], s["P"] + 2, s["Q"] + 2), normal(random, s["B"], s["C"], s["P"], s["Q"]),
        empty(s["C"], 3, 3)),
        _weights_by_channel_reference, {"B": 4, "C": 64, "P": 56, "Q": 56}, {"B": 2, "P": 2, "Q": 19, "C": 3},
        _torch_weights_by_channel, tolerance=1e-4),
    Example(convolution_i8, lambda random, s: (
        random.integers(-100, 101, (s["B"], s["P"] + 2, s["Q"] + 2, s["C"]), np.int8),
        random.integers(-100, 101, (s["O"], 3, 3, s["C"]), np.int8), random.random(s["O"], np.float32) / 2000,
        empty(s["B"], s["P"], s["Q"], s["O"], dtype=np.int8)),
        _i8_reference, {"B": 2, "P": 32, "Q": 32, "C": 64, "O": 64}, {"B": 1, "P": 3, "Q": 9, "C": 7, "O": 35},
        _torch_i8),
    Example(largest_of_squares, lambda random, s: (
        normal(random, s["B"], 2 * s["P"], 2 * s["Q"], s["C"]), empty(s["B"], s["P"], s["Q"], s["C"])),
        _squares_reference, {"B": 4, "P": 32, "Q": 32, "C": 64}, {"B": 1, "P": 3, "Q": 5, "C": 35}, _torch_squares),
    Example(blur, lambda random, s: (
        normal(random, s["S"], s["P"] + s["K"] - 1), normal(random, s["K"]), empty(s["S"], s["P"])),
        _blur_reference, {"S": 512, "P": 1024, "K": 15}, {"S": 3, "P": 41, "K": 6}, _torch_blur),
    Example(heat_step, lambda random, s: (normal(random, s["P"] + 2, s["Q"] + 2), empty(s["P"], s["Q"])),
            _heat_reference, {"P": 1024, "Q": 1024}, {"P": 5, "Q": 43}, lambda x: _heat_reference(x)[0]),
    Example(sum_of_patches, lambda random, s: (
        normal(random, s["C"], 3, 3, s["P"], s["Q"]), empty(s["C"], s["P"] + 2, s["Q"] + 2)),
        _patches_reference, {"C": 64, "P": 56, "Q": 56}, {"C": 3, "P": 5, "Q": 37}, _torch_patches),
]
