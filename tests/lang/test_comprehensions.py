"""Comprehensions make tuples of tiles, written out."""

from __future__ import annotations

import numpy as np

import sapper as sp
from sapper import Tensor, f32, kernel, maximum, minimum, tiles, u8
from sapper.tile.eager import run

H, W, M, N = sp.dims("H W M N")

SORTING = ((0, 1), (3, 4), (6, 7), (1, 2), (4, 5), (7, 8), (0, 1), (3, 4), (6, 7), (0, 3), (5, 8), (4, 7), (3, 6),
           (1, 4), (2, 5), (4, 7), (4, 2), (6, 4), (4, 2))
"""Exchanges that bring the median of nine to place 4."""


def exchanged(v, a, b):
    low, high = minimum(v[a], v[b]), maximum(v[a], v[b])
    return [low if i == a else high if i == b else v[i] for i in range(9)]


@kernel
def median(x: Tensor[u8, H, W], y: Tensor[u8, H - 2, W - 2]):
    for h, w in tiles(H - 2, W - 2):
        v = [x[h + i, w + j] for i in range(3) for j in range(3)]
        for a, b in SORTING:
            v = exchanged(v, a, b)
        y[h, w] = v[4]


@kernel
def odd_ones(x: Tensor[f32, N], y: Tensor[f32, M]):
    for m in tiles(M):
        i = 7
        a, b = [(i + 1) * x[m + i] for i in range(5) if i % 2 == 1]
        y[m] = a + b + i


def test_a_network_sorts_nine_tiles() -> None:
    x = np.random.default_rng(0).integers(0, 256, (7, 37)).astype(np.uint8)
    found, meant = np.empty((5, 35), np.uint8), np.empty((5, 35), np.uint8)
    median(x, found)
    run(median, [x, meant])
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3)).reshape(5, 35, 9)
    np.testing.assert_array_equal(found, np.median(windows, -1))
    np.testing.assert_array_equal(found, meant)


def test_conditions_choose_and_names_stay_inside() -> None:
    x = np.arange(9, dtype=np.float32)
    found, meant = np.empty(5, np.float32), np.empty(5, np.float32)
    odd_ones(x, found)
    run(odd_ones, [x, meant])
    np.testing.assert_array_equal(found, 2 * x[1:6] + 4 * x[3:8] + 7)
    np.testing.assert_array_equal(found, meant)
