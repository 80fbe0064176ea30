"""Operands that are gathered element by element: made once, before the nest whose products they are of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapper import Tensor, dims, each, f32, i32, kernel, maximum, minimum, span, sum, tiles, where, whole, zeros
from sapper.ir.nodes import Function
from sapper.tile.schedule import Schedule

from .run_lane import run_lane, specialize
from .test_nest_lanes import AVX2, AVX512, normal

B, C, N, O, P, T = dims("B C N O P T")


@kernel
def strided(x: Tensor[f32, B, C, T], w: Tensor[f32, O, C, 3], bias: Tensor[f32, O], y: Tensor[f32, B, O, P]):
    """Every other point of a window whose edges are 0."""
    for b in each(B):
        for o, p in tiles(O, P):
            acc = zeros(o, p, dtype=f32)
            for i in range(3):
                t = 2 * p + i - 1
                for c in tiles(C):
                    acc += w[o, c, i] @ where((t >= 0) & (t < T), x[b, c, minimum(maximum(t, 0), T - 1)], 0.0)
            y[b, o, p] = acc + bias[o]


@kernel
def weights_along(x: Tensor[f32, B, C, T], w: Tensor[f32, 3, C, O], bias: Tensor[f32, O], y: Tensor[f32, B, P, O]):
    """The weights go across the lanes, and what is gathered lies along them, part of the points from the second on."""
    for b in each(B):
        for p, o in tiles(span(1, P), O):
            acc = zeros(p, o, dtype=f32)
            for i in range(3):
                t = 2 * p + i - 1
                for c in tiles(C):
                    acc += where(t < T, x[b, c, minimum(t, T - 1)], 0.0) @ w[i, c, o]
            y[b, p, o] = acc + bias[o]


@kernel
def looked_up(x: Tensor[f32, C, T], place: Tensor[i32, P, 3], w: Tensor[f32, O, C, 3], y: Tensor[f32, O, P]):
    """Places that are data."""
    for o, p in tiles(O, P):
        acc = zeros(o, p, dtype=f32)
        for i in range(3):
            for c in tiles(C):
                acc += w[o, c, i] @ x[c, place[p, i]]
        y[o, p] = acc


@kernel
def changing(x: Tensor[f32, C, T], w: Tensor[f32, O, C, 3], y: Tensor[f32, O, T]):
    """What is gathered is stored to in the end: it is read where it is."""
    for o, p in tiles(O, T):
        acc = zeros(o, p, dtype=f32)
        for i in range(3):
            for c in tiles(C):
                acc += w[o, c, i] @ x[c, minimum(p + i, T - 1)]
        y[o, p] = acc
    for c, p in tiles(C, T):
        x[c, p] = 0.0


@kernel
def guarded(x: Tensor[f32, C, T], count: Tensor[i32, 1], w: Tensor[f32, O, C, 3], y: Tensor[f32, O, T]):
    """Only as many taps as there are: their end is not known before."""
    for o, p in tiles(O, T):
        acc = zeros(o, p, dtype=f32)
        for i in range(count[0]):
            for c in tiles(C):
                acc += w[o, c, i] @ x[c, minimum(p + i, T - 1)]
        y[o, p] = acc


def windows(x: np.ndarray, points: int, step: int, left: int) -> np.ndarray:
    """[..., points, 3] of the last axis, 0 past its ends."""
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(left, 3)])
    return np.stack([padded[..., i:i + step * points:step] for i in range(3)], -1)


def case(made: Any) -> tuple[dict[str, Any], np.ndarray]:
    x, w, bias = normal(2, 5, 46), normal(33, 5, 3), normal(33)
    if made is strided:
        want = np.einsum("bcpi,oci->bop", windows(x, 23, 2, 1), w) + bias[:, None]
        return {"x": x, "w": w, "bias": bias, "y": np.full((2, 33, 23), np.nan, np.float32)}, want
    if made is weights_along:
        want = np.einsum("bcpi,oci->bpo", windows(x, 23, 2, 1), w) + bias
        want[:, 0] = -1
        return {"x": x, "w": np.ascontiguousarray(w.transpose(2, 1, 0)), "bias": bias,
                "y": np.full((2, 23, 33), -1, np.float32)}, want
    x = x[0]
    if made is looked_up:
        place = np.random.default_rng(1).integers(0, 46, (23, 3)).astype(np.int32)
        return {"x": x, "place": place, "w": w, "y": np.full((33, 23), np.nan, np.float32)}, np.einsum(
            "cpi,oci->op", x[:, place], w)
    want = np.einsum("cpi,oci->op", np.stack([x[:, np.minimum(np.arange(46) + i, 45)] for i in range(3)], 2), w)
    more = {"count": np.full(1, 3, np.int32)} if made is guarded else {}
    return {"x": x, **more, "w": w, "y": np.full((33, 46), np.nan, np.float32)}, want


def parts_of(lane: Function) -> int:
    """Loops one after the other, between which workers meet."""
    return 1 + len([op for op in lane.walk() if op.name == "barrier"])


@pytest.mark.parametrize(("made", "facts"), [
    (strided, AVX512), (strided, AVX2), (weights_along, AVX2), (looked_up, AVX512), (changing, AVX2), (guarded, AVX512),
], ids=lambda value: getattr(value, "name", ""))
def test_gathered_once(made: Any, facts: Any) -> None:
    def parts(schedule: Schedule | None, hints: dict[str, int]) -> int:
        function, (arguments, want) = made.tile_ir(), case(made)
        lane = run_lane(function, arguments, schedule, facts, specialize(function, arguments, hints))
        np.testing.assert_allclose(arguments["y"], want, rtol=1e-4, atol=1e-4)
        labels.update(op.attributes["label"] for op in lane.walk() if op.name == "loop")
        return parts_of(lane)

    labels: set[str] = set()
    large, written = dict.fromkeys("COPT", 128) | {"B": 2}, 2 if made is changing else 1
    assert parts(None, large) == written + (made not in (changing, guarded))
    assert ("made0.1" in labels) == (made in (strided, looked_up))     # a few columns at a time, as rows meet them
    if made is strided:
        assert parts(None, large | {"O": 8}) == 1      # few rows meet them
        assert parts(Schedule(tile={"o": 6}), large) == 1


@kernel
def summed(x: Tensor[f32, C, T], w: Tensor[f32, O, C], y: Tensor[f32, O, T], z: Tensor[f32, C]):
    """A sum elsewhere does not matter."""
    for o, p in tiles(O, T):
        c = whole(C)
        y[o, p] = w[o, c] @ x[c, T - 1 - minimum(p, T - 1)]
    for c in tiles(C):
        t = whole(T)
        z[c] = sum(x[c, t], over=t)


def test_beside_sums() -> None:
    x, w = normal(5, 46), normal(33, 5)
    arguments = {"x": x, "w": w, "y": np.zeros((33, 46), np.float32), "z": np.zeros(5, np.float32)}
    function = summed.tile_ir()
    lane = run_lane(function, arguments, None, AVX512, specialize(function, arguments, dict.fromkeys("COT", 128)))
    np.testing.assert_allclose(arguments["y"], w @ x[:, ::-1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(arguments["z"], x.sum(1), rtol=1e-4, atol=1e-4)
    assert parts_of(lane) == 3


@kernel
def from_the_top(x: Tensor[f32, C, T], w: Tensor[f32, O, C], y: Tensor[f32, O, T]):
    """Axes that come before the loop."""
    o, c = whole(O), whole(C)
    for p in tiles(T):
        y[o, p] = w[o, c] @ x[c, T - 1 - minimum(p, T - 1)]


def test_axes_from_the_top() -> None:
    x, w = normal(5, 46), normal(33, 5)
    arguments = {"x": x, "w": w, "y": np.zeros((33, 46), np.float32)}
    function = from_the_top.tile_ir()
    lane = run_lane(function, arguments, None, AVX512, specialize(function, arguments, dict.fromkeys("COT", 128)))
    np.testing.assert_allclose(arguments["y"], w @ x[:, ::-1], rtol=1e-4, atol=1e-4)
    assert parts_of(lane) == 2


@kernel
def every_other_tap(x: Tensor[f32, C, T], w: Tensor[f32, O, C, 5], y: Tensor[f32, O, P]):
    """Between the taps there may be nothing to read."""
    for o, p in tiles(O, P):
        acc = zeros(o, p, dtype=f32)
        for i in range(0, 5, 2):
            for c in tiles(C):
                acc += w[o, c, i] @ x[c, minimum(p, T - 1) + (i % 2) * T]
        y[o, p] = acc


def test_steps_leave_counters_out() -> None:
    x, w = normal(5, 46), normal(33, 5, 5)
    arguments = {"x": x, "w": w, "y": np.zeros((33, 46), np.float32)}
    function = every_other_tap.tile_ir()
    lane = run_lane(function, arguments, None, AVX512, specialize(function, arguments, dict.fromkeys("COPT", 128)))
    np.testing.assert_allclose(arguments["y"], w[:, :, ::2].sum(2) @ x, rtol=1e-4, atol=1e-4)
    assert parts_of(lane) == 1


H, W = dims("H W")


@kernel
def image(x: Tensor[f32, B, C, H, W], w: Tensor[f32, O, C, 3, 3], y: Tensor[f32, B, O, H, W]):
    for b in each(B):
        for o, h, v in tiles(O, H, W):
            acc = zeros(o, h, v, dtype=f32)
            for i in range(3):
                for j in range(3):
                    p, q = h + i - 1, v + j - 1
                    inside = (p >= 0) & (p < H) & (q >= 0) & (q < W)
                    for c in tiles(C):
                        near = x[b, c, minimum(maximum(p, 0), H - 1), minimum(maximum(q, 0), W - 1)]
                        acc += w[o, c, i, j] @ where(inside, near, 0.0)
            y[b, o, h, v] = acc


@kernel
def image_by_elements(x: Tensor[f32, B, C, H, W], w: Tensor[f32, O, C, 3, 3], y: Tensor[f32, B, O, H, W]):
    for b, h in each(B, H):
        for o, v in tiles(O, W):
            acc = zeros(o, v, dtype=f32)
            for c in range(C):
                for i in range(3):
                    for j in range(3):
                        p, q = h + i - 1, v + j - 1
                        inside = (p >= 0) & (p < H) & (q >= 0) & (q < W)
                        acc += w[o, c, i, j] * where(
                            inside, x[b, c, minimum(maximum(p, 0), H - 1), minimum(maximum(q, 0), W - 1)], 0.0)
            y[b, o, h, v] = acc


@kernel
def image_and_taps(x: Tensor[f32, B, C, H, W], w: Tensor[f32, O, C, 3, 3], y: Tensor[f32, B, O, H, W]):
    """The tap matters by itself, too."""
    for b, h in each(B, H):
        for o, v in tiles(O, W):
            acc = zeros(o, v, dtype=f32)
            for c in range(C):
                for i in range(3):
                    for j in range(3):
                        p, q = minimum(h + i, H - 1), minimum(v + j, W - 1)
                        acc += w[o, c, i, j] * where(i + j < 4, x[b, c, p, q], 0.0)
            y[b, o, h, v] = acc


@pytest.mark.parametrize(("made", "facts"), [
    (image, AVX512), (image_by_elements, AVX2), (image_and_taps, AVX512)], ids=lambda value: getattr(value, "name", ""))
@pytest.mark.parametrize("extents", [(2, 3, 5, 21), (1, 2, 0, 4)], ids=str)
def test_windows_read_one_image(made: Any, facts: Any, extents: tuple[int, ...]) -> None:
    x, w = normal(*extents), normal(7, extents[1], 3, 3)
    y = np.full((extents[0], 7, *extents[2:]), np.nan, np.float32)
    edges = ((0, 0), (0, 0), *(((0, 2), (0, 2)) if made is image_and_taps else ((1, 1), (1, 1))))
    arguments, function = {"x": x, "w": w, "y": y}, made.tile_ir()
    lane = run_lane(function, arguments, None, facts, specialize(function, arguments, dict.fromkeys("COHW", 64)))
    assert parts_of(lane) == 1 + (made is not image_and_taps)
    assert any(op.attributes["label"] == "o" and op.attributes["step"] > 1 for op in lane.walk() if op.name == "loop")
    if 0 not in extents:
        padded = np.pad(x, edges, mode="edge" if made is image_and_taps else "constant")
        taps = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
        kept = w * (np.add.outer(range(3), range(3)) < 4) if made is image_and_taps else w
        np.testing.assert_allclose(y, np.einsum("bchwij,ocij->bohw", taps, kept), rtol=1e-4, atol=1e-4)


@kernel
def by_channel(x: Tensor[f32, B, C, H, W], w: Tensor[f32, C, 3, 3], y: Tensor[f32, B, C, H, W]):
    """Each channel by itself: what they share is but their taps."""
    for b, c, h, v in tiles(B, C, H, W):
        acc = zeros(b, c, h, v, dtype=f32)
        for i in range(3):
            for j in range(3):
                p, q = h + i - 1, v + j - 1
                inside = (p >= 0) & (p < H) & (q >= 0) & (q < W)
                acc += w[c, i, j] * where(
                    inside, x[b, c, minimum(maximum(p, 0), H - 1), minimum(maximum(q, 0), W - 1)], 0.0)
        y[b, c, h, v] = acc


@kernel
def by_two_channels(x: Tensor[f32, B, C, H, W], z: Tensor[f32, B, C, H, W], w: Tensor[f32, C, 3, 3],
                    y: Tensor[f32, B, C, H, W]):
    """Two images, in a loop over channels."""
    for b, c in each(B, C):
        for h, v in tiles(H, W):
            acc = zeros(h, v, dtype=f32)
            for i in range(3):
                for j in range(3):
                    p, q = h + i - 1, v + j - 1
                    inside = (p >= 0) & (p < H) & (q >= 0) & (q < W)
                    at, along = minimum(maximum(p, 0), H - 1), minimum(maximum(q, 0), W - 1)
                    acc += w[c, i, j] * where(inside, x[b, c, at, along], 0.0)
                    acc += w[c, i, j] * where(inside, z[b, c, at, along], 0.0)
            y[b, c, h, v] = acc


@pytest.mark.parametrize("made", [by_channel, by_two_channels], ids=lambda made: made.name)
@pytest.mark.parametrize("facts", [AVX2, AVX512], ids=["avx2", "avx512"])
@pytest.mark.parametrize("channels", [64, 1])
@pytest.mark.parametrize("extents", [(2, 3, 5, 21), (1, 2, 0, 4), (2, 1, 3, 1)], ids=str)
def test_windows_of_single_channels_read_images(made: Any, facts: Any, channels: int, extents: tuple[int, ...]) -> None:
    """Of many, each channel is copied by who has it, with no other part before; of few, all are before."""
    x, w = normal(*extents), normal(extents[1], 3, 3)
    arguments = {"x": x, "w": w, "y": np.full(extents, np.nan, np.float32)}
    arguments |= {"z": normal(*extents)} if made is by_two_channels else {}
    function = made.tile_ir()
    lane = run_lane(function, arguments, None, facts, specialize(
        function, arguments, {"B": 1, "C": channels, "H": 64, "W": 64}), workers=2)
    assert parts_of(lane) == (1 if channels == 64 else 1 + len(arguments) - 2)
    if 0 not in extents:
        padded = np.pad(x + arguments.get("z", np.float32(0)), ((0, 0), (0, 0), (1, 1), (1, 1)))
        taps = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
        np.testing.assert_allclose(arguments["y"], np.einsum("bchwij,cij->bchw", taps, w), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [8, 2])
def test_few_rows_read_the_image_of_many_taps(rows: int) -> None:
    """Taps count as rows do: nine of each of two rows read an element."""
    x, w = normal(1, 3, 5, 21), normal(rows, 3, 3, 3)
    y = np.full((1, rows, 5, 21), np.nan, np.float32)
    arguments, function = {"x": x, "w": w, "y": y}, image_by_elements.tile_ir()
    lane = run_lane(function, arguments, None, AVX2, specialize(
        function, arguments, dict.fromkeys("CHW", 64) | {"B": 1, "O": rows}))
    assert parts_of(lane) == 2
    taps = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3))
    np.testing.assert_allclose(y, np.einsum("bchwij,ocij->bohw", taps, w), rtol=1e-4, atol=1e-4)


Q = dims("Q")


def spread_windows(step: int, apart: int, by_products: bool) -> Any:
    """Windows around each point of several, or every so many, whose taps lie so far apart."""
    if by_products:
        @kernel
        def made(x: Tensor[f32, B, C, H, W], w: Tensor[f32, O, C, 3, 3], y: Tensor[f32, B, O, P, Q]):
            for b, h in each(B, P):
                for o, v in tiles(O, Q):
                    acc = zeros(o, v, dtype=f32)
                    for i in range(3):
                        for j in range(3):
                            p, q = step * h + apart * (i - 1), step * v + apart * (j - 1)
                            inside = (p >= 0) & (p < H) & (q >= 0) & (q < W)
                            for c in tiles(C):
                                near = x[b, c, minimum(maximum(p, 0), H - 1), minimum(maximum(q, 0), W - 1)]
                                acc += w[o, c, i, j] @ where(inside, near, 0.0)
                    y[b, o, h, v] = acc
    else:
        @kernel
        def made(x: Tensor[f32, B, C, H, W], w: Tensor[f32, O, C, 3, 3], y: Tensor[f32, B, O, P, Q]):
            for b in each(B):
                for o, h, v in tiles(O, P, Q):
                    acc = zeros(o, h, v, dtype=f32)
                    for c in range(C):
                        for i in range(3):
                            for j in range(3):
                                p, q = step * h + apart * (i - 1), step * v + apart * (j - 1)
                                inside = (p >= 0) & (p < H) & (q >= 0) & (q < W)
                                near = x[b, c, minimum(maximum(p, 0), H - 1), minimum(maximum(q, 0), W - 1)]
                                acc += w[o, c, i, j] * where(inside, near, 0.0)
                    y[b, o, h, v] = acc
    return made


@pytest.mark.parametrize(("step", "apart", "by_products"), [(1, 2, False), (2, 1, True), (2, 2, False), (1, 4, True)])
@pytest.mark.parametrize("extents", [(2, 3, 5, 21), (1, 2, 1, 1)], ids=str)
def test_windows_of_taps_and_points_that_are_apart(step: int, apart: int, by_products: bool,
                                                   extents: tuple[int, ...]) -> None:
    """They read one image, too, of which some elements may be no point's."""
    x, w = normal(*extents), normal(7, extents[1], 3, 3)
    points = tuple((n - 1) // step + 1 for n in extents[2:])
    y = np.full((extents[0], 7, *points), np.nan, np.float32)
    function, arguments = spread_windows(step, apart, by_products).tile_ir(), {"x": x, "w": w, "y": y}
    lane = run_lane(function, arguments, None, AVX2, specialize(
        function, arguments, dict.fromkeys("CHWPQ", 64) | {"B": 1, "O": 7}))
    assert parts_of(lane) == 2
    padded = np.pad(x, ((0, 0), (0, 0), (apart, apart), (apart, apart)))
    want = np.zeros(y.shape)
    for i in range(3):
        for j in range(3):
            tap = padded[..., apart * i:, apart * j:][..., :step * (points[0] - 1) + 1:step,
                                                      :step * (points[1] - 1) + 1:step]
            want += np.einsum("bchw,oc->bohw", tap, w[..., i, j])
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)


@kernel
def only_even(x: Tensor[f32, C, T], w: Tensor[f32, O, C, 9], y: Tensor[f32, O, W]):
    """Sums are even: an odd one would be outside."""
    for o, v in tiles(O, W):
        acc = zeros(o, v, dtype=f32)
        for c in range(C):
            for i in range(9):
                p = 2 * v + 2 * i
                acc += w[o, c, i] * x[c, (p % 2) * T + minimum(p, T - 1)]
        y[o, v] = acc


def test_places_between_sums_are_not_read() -> None:
    x, w, y = normal(2, 9), normal(7, 2, 9), np.full((7, 21), np.nan, np.float32)
    arguments, function = {"x": x, "w": w, "y": y}, only_even.tile_ir()
    lane = run_lane(function, arguments, None, AVX2, specialize(function, arguments, dict.fromkeys("CTWO", 64)))
    assert parts_of(lane) == 1
    even = x[:, np.minimum(2 * np.add.outer(np.arange(21), range(9)), 8)]
    np.testing.assert_allclose(y, np.einsum("cvi,oci->ov", even, w), rtol=1e-4, atol=1e-4)


@kernel
def line_of_windows(x: Tensor[f32, B, C, H, W], w: Tensor[f32, O, C, 3, 3], y: Tensor[f32, B, O, H, W]):
    """A line of points at a time, as one product over channels and taps."""
    for b, h in each(B, H):
        for o, v in tiles(O, W):
            c, i, j = whole(C), whole(3), whole(3)
            p, q = h + i - 1, v + j - 1
            inside = (p >= 0) & (p < H) & (q >= 0) & (q < W)
            y[b, o, h, v] = w[o, c, i, j] @ where(
                inside, x[b, c, minimum(maximum(p, 0), H - 1), minimum(maximum(q, 0), W - 1)], 0.0)


def test_what_a_product_over_several_axes_reads_lies_along_its_points() -> None:
    x, w = normal(1, 3, 5, 21), normal(40, 3, 3, 3)
    arguments = {"x": x, "w": w, "y": np.full((1, 40, 5, 21), np.nan, np.float32)}
    function = line_of_windows.tile_ir()
    lane = run_lane(function, arguments, None, AVX2, specialize(
        function, arguments, dict.fromkeys("COHW", 64) | {"B": 1}))
    taps = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3))
    np.testing.assert_allclose(arguments["y"], np.einsum("bchwij,ocij->bohw", taps, w), rtol=1e-4, atol=1e-4)
    assert parts_of(lane) == 2
    loops = [{inner.name for inner in op.walk()} for op in lane.walk() if op.name == "loop"]
    assert [names for names in loops if "fma" in names] and not [n for n in loops if {"fma", "gather"} <= n]
