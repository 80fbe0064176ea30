"""topk and scans at every station, and what routing, sampling and gates make of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import (
    Schedule,
    Tensor,
    bf16,
    cummax,
    cummin,
    cumsum,
    each,
    emulate,
    exp,
    f32,
    i32,
    kernel,
    max,
    sigmoid,
    span,
    sum,
    tiles,
    topk,
    where,
    whole,
)
from sapper.ir.text import parse_function, print_function
from sapper.ir.verifier import verify
from sapper.kernels import find
from sapper.tile.eager import run as run_eager
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS
from sapper.tile.rounding import expect
from sapper.tile.schedule import Facts
from sapper.tile.semantics import numpy_dtype
from tests.lane.run_lane import run_lane
from tests.strategies import assert_expected

M, N, K, E, T, V = sp.dims("M N K E T V")


@kernel
def largest(x: Tensor[f32, M, N], values: Tensor[f32, M, 5], places: Tensor[i32, M, 5]):
    for m in tiles(M):
        n, k = whole(N), whole(5)
        found, at = topk(x[m, n], k, over=n)
        values[m, k] = found
        places[m, k] = at.to(i32)


@kernel
def largest_of_columns(x: Tensor[bf16, N, M], values: Tensor[bf16, M, K], places: Tensor[i32, M, K]):
    """As many as an extent says; the axis is not along memory."""
    for m in each(M):
        n, k = whole(span(1, N)), whole(K)
        found, at = topk(x[n, m], k, over=n)
        values[m, k], places[m, k] = found, at.to(i32)


@kernel
def running(x: Tensor[f32, M, N], sums: Tensor[f32, M, N], highest: Tensor[f32, M, N], down: Tensor[i32, M, N]):
    for m in tiles(M):
        n = whole(N)
        sums[m, n] = cumsum(x[m, n], over=n)
        highest[m, n] = cummax(x[m, n] * 2.0, over=n)
        down[m, n] = cummin(floor_of(x[m, n] * 10.0), over=n)


def floor_of(t):
    return sp.floor(where(sp.abs(t) < 100.0, t, 0.0)).to(i32)


@kernel
def down_the_rows(x: Tensor[f32, N, M], out: Tensor[f32, N, M]):
    """Along an axis that is not along memory, of a tile that both span."""
    n, m = whole(N), whole(M)
    out[n, m] = cumsum(x[n, m], over=n)


@kernel
def gate(scores: Tensor[f32, T, E], bias: Tensor[f32, E], expert: Tensor[i32, T, 3], weight: Tensor[f32, T, 3]):
    """Routing limited to groups: 2 of 4 groups by the sum of their two best, then 3 experts of those."""
    grouped, biases = scores.view(T, 4, E // 4), bias.view(4, E // 4)
    for t in tiles(T):
        g, e, two, j, k = whole(4), whole(E // 4), whole(2), whole(2), whole(3)
        best, _ = topk(sigmoid(grouped[t, g, e]) + biases[g, e], two, over=e)
        _, chosen = topk(sum(best, over=two), j, over=g)
        n = whole(E)
        allowed = max((chosen == n // (E // 4)).to(i32), over=j)
        score = sigmoid(scores[t, n])
        _, at = topk(where(allowed > 0, score + bias[n], -1e30), k, over=n)
        picked = sigmoid(scores[t, at])
        expert[t, k] = at.to(i32)
        weight[t, k] = picked / sum(picked, over=k)


@kernel
def offsets(count: Tensor[i32, E], start: Tensor[i32, E]):
    """Where each expert's rows begin: a scan without the element itself."""
    e = whole(E)
    start[e] = cumsum(count[e], over=e) - count[e]


@kernel
def top_p(logits: Tensor[f32, V], p: f32, u: f32, token: Tensor[i32, 1]):
    """Nucleus sampling among the 8 likeliest."""
    v, k = whole(V), whole(8)
    value, place = topk(logits[v], k, over=v)
    weight = exp(value - max(value, over=k))
    before = cumsum(weight, over=k) - weight
    kept = where(before < p * sum(weight, over=k), weight, 0.0)
    part = cumsum(kept, over=k)
    drawn = max(where((part - kept <= u * sum(kept, over=k)) & (kept > 0.0), k, 0), over=k)
    token[0] = max(where(k == drawn, place, 0), over=k).to(i32)


@kernel
def ragged(x: Tensor[f32, M, N], length: Tensor[i32, M], out: Tensor[f32, M, N]):
    """Memory tells how long the axis is: no longer than the dimension that it walks."""
    for m in each(M):
        n = whole(span(0, length[m]))
        out[m, n] = cumsum(x[m, n], over=n)


KERNELS = {k.name: k for k in (largest, largest_of_columns, running, down_the_rows, gate, offsets, top_p, ragged)}


def arguments_of(name: str, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    sizes = {"M": 1 + seed % 3, "N": (2, 70, 33, 200)[seed % 4], "K": (1, 2, 20)[seed % 3], "E": 16, "T": 3, "V": 300}
    given: dict[str, Any] = {}
    for parameter, type in KERNELS[name].parameters:
        if not hasattr(type, "dims"):
            given[parameter] = {"p": 0.6, "u": 0.4}[parameter]
            continue
        shape = tuple(sizes.get(d, d) for d in type.dims)
        if parameter == "count":
            given[parameter] = rng.integers(0, 9, shape, np.int32)
        elif parameter == "length":
            given[parameter] = rng.integers(0, sizes["N"] + 1, shape, np.int32)
        else:
            values = np.round(rng.standard_normal(shape) * 8) / 8  # coarse: there are ties
            if parameter == "x" and seed % 2:
                values.flat[:: 7] = rng.choice([np.nan, -np.inf, np.inf, -0.0], values.flat[::7].size)
            given[parameter] = values.astype(numpy_dtype(type.dtype))
    return given


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", KERNELS)
def test_every_station(name: str) -> None:
    k = KERNELS[name]
    function = k.tile_ir()
    verify(function, TILE_OPS)
    text = print_function(function)
    assert print_function(parse_function(text, {"tile": TILE_OPS})) == text
    for seed in range(5):
        expected = expect(function, arguments_of(name, seed))
        for run in (lambda a: interpret(function, a, 2), lambda a: run_eager(k, a),
                    lambda a: run_lane(k.tile_ir(), a, facts=Facts(lanes=4, vector_registers=16), workers=2),
                    lambda a: run_lane(k.tile_ir(), a), lambda a: k(*a.values()),
                    *([lambda a: emulate.run(k, *a.values(), target="sm_80", workers=2)] if seed == 1 else [])):
            given = arguments_of(name, seed)
            run(given)
            assert_expected(given, expected, name)


@pytest.mark.parametrize("name", ["largest", "running", "gate"])
def test_with_rows_across_the_lanes(name: str) -> None:
    axis = "t" if name == "gate" else "m"
    for seed in range(3):
        given = arguments_of(name, seed)
        expected = expect(KERNELS[name].tile_ir(), given)
        run_lane(KERNELS[name].tile_ir(), given, Schedule(lane=axis), Facts(lanes=4, vector_registers=16))
        assert_expected(given, expected, name)


def test_what_topk_means() -> None:
    nan, inf = np.nan, np.inf
    x = np.float32([[3, 5, nan, 5, -inf, 1], [nan, nan, nan, nan, -inf, -inf]])
    for run in (lambda a: run_eager(largest, a), lambda a: interpret(largest.tile_ir(), a),
                lambda a: largest(*a.values())):
        given = {"x": x, "values": np.zeros((2, 5), np.float32), "places": np.zeros((2, 5), np.int32)}
        run(given)
        np.testing.assert_array_equal(given["values"], [[5, 5, 3, 1, -inf], [-inf] * 5])
        np.testing.assert_array_equal(given["places"], [[1, 3, 0, 5, 0], [0] * 5])


def test_the_largest_of_many() -> None:
    """Falling values: every row of lanes is above the end of the list, and none of the elements after the first k."""
    top_k = find("top_k").kernel
    for x in (np.arange(50_000, dtype=np.float32), -np.arange(50_000, dtype=np.float32),
              np.random.default_rng(0).standard_normal(50_000, np.float32)):
        for k in (1, 40, 100):
            values, places = np.zeros((1, k), np.float32), np.zeros((1, k), np.int32)
            top_k(x[None], values, places)
            want = np.argsort(-x, kind="stable")[:k]
            np.testing.assert_array_equal(places[0], want)
            np.testing.assert_array_equal(values[0], x[want])
