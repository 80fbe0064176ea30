"""Images: what lies near each other in memory, but not side by side."""

from __future__ import annotations

import numpy as np

import sapper as sp
from sapper import Tensor, each, f32, maximum, minimum, sum, tiles, u8, whole, zeros

from . import Example, empty, normal

B, C, H, N, P, Q, W = sp.dims("B C H N P Q W")


@sp.kernel
def mean_of_squares(x: Tensor[f32, B, C, H, W], y: Tensor[f32, B, C, P, Q]):
    """Of every two by two."""
    for b, c in each(B, C):
        for p, q in tiles(P, Q):
            acc = zeros(p, q, dtype=f32)
            for i in range(2):
                for j in range(2):
                    acc += x[b, c, 2 * p + i, 2 * q + j]
            y[b, c, p, q] = 0.25 * acc


@sp.kernel
def enlarge(x: Tensor[f32, B, C, H, W], y: Tensor[f32, B, C, P, Q]):
    """Twice as high and wide: each pixel four times."""
    for b, c in each(B, C):
        for p, q in tiles(P, Q):
            y[b, c, p, q] = x[b, c, p // 2, q // 2]


@sp.kernel
def shuffle_pixels(x: Tensor[f32, B, C, 2, 2, H, W], y: Tensor[f32, B, C, H, 2, W, 2]):
    """Twice as high and wide: four channels become the pixels of one."""
    for b, c, i in each(B, C, 2):
        for h, w in tiles(H, W):
            j = whole(2)
            y[b, c, h, i, w, j] = x[b, c, i, j, h, w]


@sp.kernel
def grey(x: Tensor[u8, H, W, 3], y: Tensor[u8, H, W]):
    """Of red, green and blue side by side."""
    for h, w in tiles(H, W):
        light = x[h, w, 0].to(f32) * 0.299 + x[h, w, 1].to(f32) * 0.587 + x[h, w, 2].to(f32) * 0.114
        y[h, w] = (light + 0.5).to(u8)


@sp.kernel
def turn_points(x: Tensor[f32, N, 3], turn: Tensor[f32, 3, 3], y: Tensor[f32, N, 3]):
    """Each point of space by one matrix."""
    for n in tiles(N):
        i, j = whole(3), whole(3)
        y[n, i] = sum(turn[i, j] * x[n, j], over=j)


MEDIAN = ((0, 1), (3, 4), (6, 7), (1, 2), (4, 5), (7, 8), (0, 1), (3, 4), (6, 7), (0, 3), (5, 8), (4, 7), (3, 6),
          (1, 4), (2, 5), (4, 7), (4, 2), (6, 4), (4, 2))
"""Exchanges after which the fifth of nine is the one in the middle."""


@sp.kernel
def median_of_nine(x: Tensor[u8, H, W], y: Tensor[u8, H - 2, W - 2]):
    """Of each pixel and those around it, by a sorting network: a list of tiles is a tuple, and loops over it vanish."""
    for h, w in tiles(H - 2, W - 2):
        v = [x[h + i, w + j] for i in range(3) for j in range(3)]
        for a, b in MEDIAN:
            low, high = minimum(v[a], v[b]), maximum(v[a], v[b])
            v = [low if k == a else high if k == b else v[k] for k in range(9)]
        y[h, w] = v[4]


@sp.kernel
def mirror(x: Tensor[f32, H, W], y: Tensor[f32, H, W]):
    for h, w in tiles(H, W):
        y[h, w] = x[h, W - 1 - w]


def _mean_reference(x):
    b, c, h, w = x.shape
    return (x.reshape(b, c, h // 2, 2, w // 2, 2).mean((3, 5)),)


def _enlarge_reference(x):
    return (x.repeat(2, axis=2).repeat(2, axis=3),)


def _shuffle_reference(x):
    return (np.ascontiguousarray(x.transpose(0, 1, 4, 2, 5, 3)),)


def _grey_reference(x):
    red, green, blue = (x[..., c].astype(np.float32) * np.float32(weight) for c, weight in enumerate(GREY))
    return ((red + green + blue + np.float32(0.5)).astype(np.uint8),)


def _turn_reference(x, turn):
    return (x @ turn.T,)


def _median_reference(x):
    return (np.median(np.lib.stride_tricks.sliding_window_view(x, (3, 3)), (2, 3)).astype(np.uint8),)


def _mirror_reference(x):
    return (np.ascontiguousarray(x[:, ::-1]),)


def _torch_mean(x):
    from torch.nn.functional import avg_pool2d

    return avg_pool2d(x, 2)


def _torch_enlarge(x):
    from torch.nn.functional import interpolate

    return interpolate(x, scale_factor=2)


def _torch_shuffle(x):
    from torch.nn.functional import pixel_shuffle

    return pixel_shuffle(x.flatten(1, 3), 2)


def _torch_median(x):
    return x.unfold(0, 3, 1).unfold(1, 3, 1).flatten(2).median(2).values


def _torch_grey(x):
    import torch

    return (x.float() @ torch.tensor(GREY) + 0.5).to(torch.uint8)


GREY = (0.299, 0.587, 0.114)

EXAMPLES = [
    Example(mean_of_squares, lambda random, s: (
        normal(random, s["B"], s["C"], 2 * s["P"], 2 * s["Q"]), empty(s["B"], s["C"], s["P"], s["Q"])),
        _mean_reference, {"B": 4, "C": 64, "P": 28, "Q": 28}, {"B": 1, "C": 2, "P": 3, "Q": 37}, _torch_mean),
    Example(enlarge, lambda random, s: (
        normal(random, s["B"], s["C"], s["H"], s["W"]), empty(s["B"], s["C"], 2 * s["H"], 2 * s["W"])),
        _enlarge_reference, {"B": 2, "C": 64, "H": 32, "W": 32}, {"B": 1, "C": 2, "H": 3, "W": 19}, _torch_enlarge,
        tolerance=0),
    Example(shuffle_pixels, lambda random, s: (
        normal(random, s["B"], s["C"], 2, 2, s["H"], s["W"]), empty(s["B"], s["C"], s["H"], 2, s["W"], 2)),
        _shuffle_reference, {"B": 2, "C": 32, "H": 64, "W": 64}, {"B": 1, "C": 2, "H": 3, "W": 37}, _torch_shuffle,
        tolerance=0),
    Example(grey, lambda random, s: (
        random.integers(0, 256, (s["H"], s["W"], 3), np.uint8), empty(s["H"], s["W"], dtype=np.uint8)),
        _grey_reference, {"H": 480, "W": 640}, {"H": 3, "W": 41}, _torch_grey,
        tolerance=1 / 200),    # a step, of 200 and more, where a sum lies between two
    Example(turn_points, lambda random, s: (normal(random, s["N"], 3), normal(random, 3, 3), empty(s["N"], 3)),
            _turn_reference, {"N": 65536}, {"N": 45}, lambda x, turn: x @ turn.T),
    Example(median_of_nine, lambda random, s: (
        random.integers(0, 256, (s["H"], s["W"]), np.uint8), empty(s["H"] - 2, s["W"] - 2, dtype=np.uint8)),
        _median_reference, {"H": 480, "W": 640}, {"H": 5, "W": 73}, _torch_median, tolerance=0),
    Example(mirror, lambda random, s: (normal(random, s["H"], s["W"]), empty(s["H"], s["W"])),
            _mirror_reference, {"H": 512, "W": 1024}, {"H": 3, "W": 43}, lambda x: x.flip(1), tolerance=0),
]
