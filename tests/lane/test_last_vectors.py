"""What is left of a row that is only stored: its last whole vector once more, where a store under a mask takes long."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sapper import Tensor, dims, f32, i8, kernel, sum, tiles, whole
from sapper.tile.requests import USUAL

from .run_lane import run_lane, specialize
from .test_nest_lanes import AVX2, normal

M, N, P = dims("M N P")
WHOLE = replace(AVX2, requests=USUAL._replace(last_whole=True))


@kernel
def moved(x: Tensor[f32, M, N], y: Tensor[f32, M, P]):
    for m, p in tiles(M, P):
        y[m, p] = 2.0 * x[m, p + 1]


@kernel
def to_bytes(x: Tensor[f32, M, N], y: Tensor[i8, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = x[m, n].to(i8)


@kernel
def in_place(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    """What was stored would be read again."""
    for m, n in tiles(M, N):
        y[m, n] = y[m, n] + x[m, n]


@kernel
def summed(x: Tensor[f32, M, N], y: Tensor[f32, N]):
    """Joined with memory, once."""
    for n in tiles(N):
        y[n] = 0.0
    for m, n in tiles(M, N):
        y[n + 0 * m] += x[m, n]


@kernel
def scaled(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    """Behind a sum, rows that are stored."""
    for m in tiles(M):
        n = whole(N)
        y[m, n] = x[m, n] / sum(x[m, n] * x[m, n], over=n)


def masked_stores(lane: Any) -> int:
    return len([op for op in lane.walk() if op.name == "store" and op.attributes["masked"]])


@pytest.mark.parametrize("width", [0, 1, 7, 8, 9, 28, 31, 32, 33, 45, 100])
@pytest.mark.parametrize("known", [False, True], ids=["any", "known"])
@pytest.mark.parametrize("made", [moved, to_bytes, in_place, summed, scaled], ids=lambda made: made.name)
def test_rows_of_any_length(made: Any, known: bool, width: int) -> None:
    known = known and width > 0
    columns = width + 3 if made is moved else width
    x = np.round(20 * normal(3, columns)).astype(np.float32) + np.float32(0.25)
    shape = (width,) if made is summed else (3, width)
    y = np.ones(shape, np.int8 if made is to_bytes else np.float32)
    if made is to_bytes:        # rows that lie apart: neighbours would be one line (tile/joined_lines.py)
        y = np.ones((3, width + 1), np.int8)[:, :width]
    function = made.tile_ir({"M": 3, "N": columns, "P": width} if known else {})
    lane = run_lane(function, {"x": x, "y": y}, None, WHOLE, specialize(function, {"x": x, "y": y}))
    want = {moved: 2 * x[:, 1:width + 1], to_bytes: x.astype(np.int8), in_place: x + 1, summed: x.sum(axis=0),
            scaled: x / np.maximum((x * x).sum(axis=1, keepdims=True), 1e-9)}[made]
    np.testing.assert_allclose(y, want, rtol=1e-5)
    if known and made in (moved, to_bytes) and width < 64:      # longer rows are parted among tasks
        assert masked_stores(lane) == (0 < width < 8)


def test_where_masks_are_quick() -> None:
    x, y = normal(3, 48), np.empty((3, 45), np.float32)
    function = moved.tile_ir({"M": 3, "N": 48, "P": 45})
    assert masked_stores(run_lane(function, {"x": x, "y": y}, None, AVX2, specialize(function, {"x": x, "y": y}))) == 1
