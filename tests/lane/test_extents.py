"""What is known of extents before the kernel runs (sapper/lane/extents.py)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from sapper import Tensor, dims, each, exp, f32, i32, kernel, maximum, minimum, span, tiles, where, whole, zeros
from sapper.ir.types import TileType, index
from sapper.lane.extents import hint, most_between
from sapper.lane.state import Capacity
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Facts, LoweringError, Specialization

from .run_lane import run_lane

D, E, P, T = dims("D E P T")


@kernel
def triangular(k: Tensor[f32, T, D], x: Tensor[f32, T, E], u: Tensor[f32, T, E]):
    """Rows in turn, each less its products with those before in a block of eight: how many these are, a counter says.
    What is added up passes from one block to the next."""
    for e in tiles(E):
        d = whole(D)
        total = zeros(d, e, dtype=f32)
        for p in range(T // 8):
            for r in range(8):
                j = whole(span(0, r))
                near = sum((k[p * 8 + j, d] @ k[p * 8 + r, d]) * u[p * 8 + j, e], over=j)
                u[p * 8 + r, e] = x[p * 8 + r, e] - k[p * 8 + r, d] @ total - near
            j = whole(8)
            total = total + k[p * 8 + j, d] @ u[p * 8 + j, e]


@pytest.mark.parametrize("shape", [(2, 5, 19), (2, 17, 33)])
def test_what_spans_a_counters_range_has_room(shape: tuple[int, int, int]) -> None:
    b, d, e = shape
    random = np.random.default_rng(d)
    k = (random.standard_normal((8 * b, d)) / 8).astype(np.float32)
    x = random.standard_normal((8 * b, e)).astype(np.float32)
    arguments: dict[str, Any] = {"k": k, "x": x, "u": np.zeros((8 * b, e), np.float32)}
    run_lane(reduce_loops(triangular.tile_ir()), arguments, facts=Facts(lanes=8, vector_registers=16))
    expected, total = x.astype(np.float64), np.zeros((d, e))
    for block, keys in zip(expected.reshape(b, 8, e), k.astype(np.float64).reshape(b, 8, d), strict=True):
        for r in range(8):
            block[r] -= keys[r] @ total + (keys[:r] @ keys[r]) @ block[:r]
        total += keys.T @ block
    # Eight sums of products of at most d small numbers, each rounded, and what rows before were off by.
    np.testing.assert_allclose(arguments["u"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_counter_is_bounded_by_where_its_loop_ends() -> None:
    function = triangular.tile_ir()
    loop = next(op for op in function.walk() if op.name == "each" and op.operands[1].op.attributes.get("value") == 8)
    (counter,) = loop.blocks[0].arguments[:1]
    assert counter.type == TileType(index)
    assert hint(counter, Specialization())[2] is None
    assert hint(counter, Specialization(), {counter: loop.operands[1]})[2] == Capacity(8)


@kernel
def windows(x: Tensor[f32, T, D], reach: i32, y: Tensor[f32, T, D]):
    """Of this block of eight rows and the two before it, of the next five rows, and of as many as a call says."""
    for b in each(T // 8):
        t, d = whole(span(b * 8, b * 8 + 8)), whole(D)
        j = whole(span(maximum(b - 2, 0) * 8, b * 8 + 8))
        weight = exp(x[t, d] @ x[j, d])
        n = whole(span(8 * b, minimum(8 * b + 5, T)))
        k = whole(span(maximum(b * 8 - reach, 0), b * 8 + 8))
        y[t, d] = (weight @ x[j, d]) / sum(weight, over=j) + sum(x[n, d], over=n) + sum(x[k, d], over=k)


def test_ends_on_both_sides_of_a_place_bound_what_is_between() -> None:
    function = windows.tile_ir()
    found = {op.attributes["axis"]: most_between(*op.operands) for op in function.walk() if op.name == "whole"}
    assert found == {"t": Capacity(8), "d": None, "j": Capacity(24), "n": Capacity(5), "k": None}
    x = np.random.default_rng(0).standard_normal((40, 9)).astype(np.float32) / 4
    arguments: dict[str, Any] = {"x": x, "reach": 3, "y": np.zeros_like(x)}
    lane = run_lane(reduce_loops(function), arguments, facts=Facts(lanes=8, vector_registers=16))
    for t in range(40):
        b = t // 8
        near = x[max(b - 2, 0) * 8:b * 8 + 8]
        weight = np.exp(near @ x[t])
        expected = weight @ near / weight.sum() + x[8 * b:8 * b + 5].sum(0) + x[max(8 * b - 3, 0):8 * b + 8].sum(0)
        np.testing.assert_allclose(arguments["y"][t], expected, rtol=1e-4, atol=1e-4)
    loops = [op for op in lane.walk() if op.name == "loop" and any(i.name == "fma" for i in op.blocks[0].ops)]
    assert loops and not any(inner.name == "exp" for op in loops for inner in op.walk())   # they are kept


@kernel
def added_up(x: Tensor[f32, T, D], bias: Tensor[f32, P], y: Tensor[f32, T, D + P], last: Tensor[f32, 2 * D + 1]):
    """Extents that are sums: of a row and what stands beside it, and of what passes from step to step."""
    for t in tiles(T):
        n = whole(D + P)
        row = where(n < D, x[t, minimum(n, D - 1)], bias[maximum(n - D, 0)])
        power = exp(row - max(row, over=n))
        y[t, n] = power / sum(power, over=n)
    k = whole(2 * D + 1)
    most = zeros(k, dtype=f32)
    for t in range(T):
        most = maximum(most * 0.5, x[t, minimum(k // 2, D - 1)])
    last[k] = most


def test_extents_that_are_sums() -> None:
    x, bias = np.random.default_rng(2).standard_normal((5, 9)).astype(np.float32), np.ones(10, np.float32)
    y, last = np.zeros((5, 19), np.float32), np.zeros(19, np.float32)
    arguments: dict[str, Any] = {"x": x, "bias": bias, "y": y, "last": last}
    lane = run_lane(reduce_loops(added_up.tile_ir()), arguments, facts=Facts(lanes=8, vector_registers=16))
    power = np.exp(np.concatenate([x, np.tile(bias, (5, 1))], 1))
    np.testing.assert_allclose(arguments["y"], power / power.sum(1, keepdims=True), rtol=1e-5)
    most = np.zeros(19, np.float32)
    for row in x:
        most = np.maximum(most * 0.5, row[np.minimum(np.arange(19) // 2, 8)])
    np.testing.assert_allclose(arguments["last"], most, rtol=1e-6)
    factors = [tuple(factor) for _, axes in lane.attributes["scratch"] for _, dims_, _ in axes for factor in dims_
               if not isinstance(factor, str)]
    assert ("add", "P", "D") in factors and any(factor[0] == "add" and factor[2] == 1 for factor in factors)


@kernel
def before(q: Tensor[f32, T, D], k: Tensor[f32, T + P, D], bias: Tensor[f32, P], y: Tensor[f32, T, D]):
    """Attention to the P keys before each query, of which the first ones are padding: i - P may be below 0."""
    for i in each(T):
        d, j = whole(D), whole(span(i - P, i))
        power = exp(q[i, d] @ k[j + P, d] + bias[j - i + P])
        y[i, d] = (power / sum(power, over=j)) @ k[j + P, d]


@pytest.mark.parametrize(("t", "p"), [(3, 70), (20, 7)])
def test_a_range_that_starts_below_0_has_room(t: int, p: int) -> None:
    random = np.random.default_rng(3)
    q, k, bias = (random.standard_normal(shape).astype(np.float32) / 4 for shape in ((t, 5), (t + p, 5), p))
    arguments: dict[str, Any] = {"q": q, "k": k, "bias": bias, "y": np.zeros_like(q)}
    run_lane(reduce_loops(before.tile_ir()), arguments, facts=Facts(lanes=8, vector_registers=16))
    for i in range(t):
        power = np.exp(k[i:i + p] @ q[i] + bias)
        np.testing.assert_allclose(arguments["y"][i], power / power.sum() @ k[i:i + p], rtol=1e-4, atol=1e-5)


@kernel
def passed_on(x: Tensor[f32, D], y: Tensor[f32, D], out: Tensor[f32, D]):
    n = whole(span(0 - D, 0))
    power = exp(x[n + D])
    y[n + D] = power / sum(power, over=n)
    for d in tiles(D):
        out[d] = sum(power, over=n) * x[d]


def test_what_starts_below_0_does_not_pass_from_loop_to_loop() -> None:
    arguments: dict[str, Any] = {name: np.ones(5, np.float32) for name in ("x", "y", "out")}
    with pytest.raises(LoweringError, match="passes from one part of the kernel to another"):
        run_lane(reduce_loops(passed_on.tile_ir()), arguments, facts=Facts(lanes=8, vector_registers=16))


@kernel
def sequences(q: Tensor[f32, T, D], k: Tensor[f32, T, D], start: Tensor[i32, P], y: Tensor[f32, T, D]):
    """Attention of sequences that lie one after the other, each to itself."""
    for b in each(P - 1, disjoint=True):
        for t in tiles(span(start[b], start[b + 1])):
            d, s = whole(D), whole(span(start[b], start[b + 1]))
            score = where(s <= t, q[t, d] @ k[s, d], -1e9)
            power = exp(score - max(score, over=s))
            y[t, d] = (power / sum(power, over=s)) @ k[s, d]


def test_axes_whose_ends_lie_in_memory_are_no_longer_than_what_they_walk() -> None:
    """Values over two of them are kept, and their powers are not computed for each that reads them."""
    start = np.array([0, 1, 1, 20, 37], np.int32)
    q, k = np.random.default_rng(1).standard_normal((2, 37, 9)).astype(np.float32)
    arguments: dict[str, Any] = {"q": q, "k": k, "start": start, "y": np.zeros_like(q)}
    lane = run_lane(reduce_loops(sequences.tile_ir()), arguments, facts=Facts(lanes=8, vector_registers=16), workers=2)
    for first, last in pairwise(start):
        score = np.where(np.tri(last - first, dtype=bool), q[first:last] @ k[first:last].T, np.float32(-1e9))
        power = np.exp(score - score.max(1, keepdims=True, initial=-3e38))
        np.testing.assert_allclose(arguments["y"][first:last], power / power.sum(1, keepdims=True) @ k[first:last],
                                   rtol=1e-4, atol=1e-5)
    loops = [op for op in lane.walk() if op.name == "loop" and any(i.name == "fma" for i in op.blocks[0].ops)]
    assert not any(inner.name == "exp" for op in loops for inner in op.walk())


@kernel
def decoded(q: Tensor[f32, D], x: Tensor[f32, P, D], y: Tensor[f32, P, D], stop: i32, out: Tensor[f32, D]):
    d, e = whole(D), whole(D)
    total = zeros(e, dtype=f32)
    for p in tiles(span(0, stop)):
        total += (q[d] @ x[p, d]) @ y[p, e]
    out[e] = total


@kernel
def decoded_from_pages(q: Tensor[f32, D], x: Tensor[f32, T, 4, D], page: Tensor[i32, P], stop: i32,
                       out: Tensor[f32, E, D]):
    for h in each(E):
        d, e = whole(D), whole(D)
        total = zeros(e, dtype=f32)
        for p in tiles(span(0, stop)):
            total += (q[d] @ x[page[p // 4], p % 4, d]) @ x[page[p // 4], p % 4, e]
        out[h, e] = total


@pytest.mark.parametrize("stop", [0, 7, 12])
def test_what_passes_between_products_along_a_span_has_room_for_all_that_is_walked(stop: int) -> None:
    """Outside any loop, too, and where an axis walks a table of pages."""
    random = np.random.default_rng(stop)
    q, x, y = (random.integers(-4, 5, shape).astype(np.float32) for shape in (9, (12, 9), (12, 9)))
    out = np.ones(9, np.float32)
    run_lane(reduce_loops(decoded.tile_ir()), {"q": q, "x": x, "y": y, "stop": stop, "out": out})
    np.testing.assert_array_equal(out, (q @ x[:stop].T) @ y[:stop])
    page = np.int32([2, 0, 1])
    out = np.ones((2, 9), np.float32)
    run_lane(reduce_loops(decoded_from_pages.tile_ir()), {
        "q": q, "x": x.reshape(3, 4, 9), "page": page, "stop": stop, "out": out})
    rows = x.reshape(3, 4, 9)[page].reshape(12, 9)[:stop]
    np.testing.assert_array_equal(out, [(q @ rows.T) @ rows] * 2)
