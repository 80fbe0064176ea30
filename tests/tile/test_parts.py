"""Parts: what stands between parallel loops, values that pass between them, reductions that workers share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import (
    Tensor,
    argmax,
    argmin,
    bf16,
    each,
    emulate,
    exp,
    f32,
    i32,
    kernel,
    max,
    maximum,
    span,
    sum,
    tiles,
    where,
    whole,
    zeros,
)
from sapper.ir.text import parse_function, print_function
from sapper.ir.verifier import verify
from sapper.lang.kernel import Kernel
from sapper.targets.x86_64.detect import host_target
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS
from sapper.tile.parts import split_parts
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.rounding import expect
from sapper.tile.schedule import Facts, LoweringError
from sapper.tile.semantics import numpy_dtype
from tests.lane.run_lane import run_lane, specialize
from tests.strategies import assert_expected

M, N, B = sp.dims("M N B")


@kernel
def softmax_of_all(x: Tensor[f32, N], out: Tensor[f32, N]):
    """Two reductions and a loop, each of which needs the one before."""
    n = whole(N)
    high = max(x[n], over=n)
    total = sum(exp(x[n] - high), over=n)
    for m in tiles(N):
        out[m] = exp(x[m] - high) / total


@kernel
def centred(x: Tensor[f32, M, N], out: Tensor[f32, M, N]):
    """A tile passes: the mean of each column."""
    n = whole(N)
    mean = zeros(n, dtype=f32)
    for m in tiles(M):
        mean += sum(x[m, n], over=m)
    mean = mean / M.to(f32)
    for i in tiles(M):
        out[i, n] = x[i, n] - mean


@kernel
def online(x: Tensor[f32, N], out: Tensor[f32, N], last: Tensor[i32, 2]):
    """A sequential loop returns floats and an integer; the loop after it is bounded by that."""
    high = zeros(dtype=f32) - 1e30
    total = zeros(dtype=f32)
    steps = zeros(dtype=i32)
    for n in tiles(N):
        above = maximum(high, max(x[n], over=n))
        total = total * exp(high - above) + sum(exp(x[n] - above), over=n)
        high = above
    for j in range(N):
        steps = steps + 1 if x[j] > 0.0 else steps
    last[0] = steps
    for m in tiles(span(0, steps)):
        out[m] = exp(x[m] - high) / total


@kernel
def overwritten(x: Tensor[f32, N], first: Tensor[f32, B], out: Tensor[f32, N]):
    """x changes between the two loops; what was read before them is the old value."""
    old = x[0]
    n = whole(N)
    before = x[n]
    for m in tiles(N):
        x[m] = x[m] * 2.0
    for m in tiles(N):
        out[m] = x[m] + old
    out[n] = out[n] + before
    for b in each(B):
        first[b] = old


@kernel
def places(x: Tensor[f32, N], y: Tensor[bf16, N], where_high: Tensor[i32, 2], out: Tensor[bf16, N]):
    """argmax and a sum in bf16 over a long axis."""
    n = whole(N)
    high = argmax(x[n], over=n)
    total = sum(y[n], over=n)
    where_high[0] = high.to(i32)
    for m in tiles(N):
        out[m] = where(m == high, total, y[m])


@kernel
def span_by_row(x: Tensor[f32, N], stop: Tensor[i32, 1], out: Tensor[f32, N]):
    n = whole(span(0, stop[0]))
    e = exp(x[n])
    total = sum(e, over=n)
    for m in tiles(N):
        out[m] = x[m] * total


@kernel
def of_a_function(x: Tensor[f32, N], low: Tensor[i32, 1], out: Tensor[f32, N]):
    """Several reductions of what costs much: a piece computes it once for all."""
    n = whole(N)
    e = exp(x[n] * x[n])
    low[0] = argmin(e, over=n).to(i32)
    high, total = max(e, over=n), sum(e, over=n)
    for m in tiles(N):
        out[m] = x[m] * high - total


KERNELS = [softmax_of_all, centred, online, overwritten, places, span_by_row, of_a_function]


def arguments_of(k: Kernel, n: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    sizes = {"M": 5, "N": n, "B": 3}
    given = {}
    for name, type in k.parameters:
        shape = tuple(sizes.get(d, d) for d in type.dims)
        given[name] = (np.full(shape, min(3, n), np.int32) if type.dtype is i32 else
                       rng.standard_normal(shape).astype(np.float32 if type.dtype is f32 else numpy_dtype(bf16)))
    return given


def always(start: Any, stop: Any) -> bool:
    return True


@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
@pytest.mark.parametrize("k", KERNELS, ids=lambda k: k.name)
def test_parts_mean_what_the_kernel_means(k: Kernel, split: bool) -> None:
    """The pass alone, under the tile interpreter; its text is read back."""
    function = reduce_loops(k.tile_ir())
    made = split_parts(function, lambda start, stop: split, always)
    verify(made, TILE_OPS)
    assert [op.name for op in made.body.ops if op.blocks].count("part") >= 2
    text = print_function(made)
    assert print_function(parse_function(text, {"tile": TILE_OPS})) == text
    for n in (1, 37, 33000):
        given = arguments_of(k, n, n)
        if n > 1000 and k is online:  # one element at a time
            continue
        expected = expect(k.tile_ir(), given, tile_sizes=(None, 8 if n < 100 else 4000))
        interpret(made, given)
        assert_expected(given, expected, text)


@pytest.mark.parametrize("lanes", [16, 4])
@pytest.mark.parametrize("k", KERNELS, ids=lambda k: k.name)
def test_parts_on_several_workers(k: Kernel, lanes: int) -> None:
    for n, hint in ((1, 1), (37, 16384), (37, 64)):
        given = arguments_of(k, n, n)
        expected = expect(k.tile_ir(), given)
        function = reduce_loops(k.tile_ir())
        run_lane(function, given, facts=Facts(lanes=lanes), workers=3,
                 specialization=specialize(function, given, {"M": hint, "N": hint, "B": hint}))
        assert_expected(given, expected, k.name)


@kernel
def at_the_highest(x: Tensor[f32, N], y: Tensor[f32, N], out: Tensor[f32, 1]):
    n = whole(N)
    out[0] = y[argmax(x[n], over=n)]


@kernel
def many_sums(x: Tensor[f32, N], out: Tensor[f32, N]):
    """Each sum needs the one before: more parallel loops than there are task counters."""
    n = whole(N)
    total = sum(x[n], over=n)
    for _ in (1, 2, 3, 4, 5, 6, 7, 8, 9):
        total = sum(where(x[n] > total, x[n], 1.0), over=n)
    for m in tiles(N):
        out[m] = x[m] + total


@kernel
def many_loops(x: Tensor[i32, N], out: Tensor[i32, N]):
    """Each loop reads what the one before wrote, turned round."""
    for _ in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10):
        for m in tiles(N):
            out[m] = x[N - 1 - m] * 3 + 1
        for m in tiles(N):
            x[m] = out[m] * 5 - m.to(i32)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("k, loops", [(many_sums, 11), (many_loops, 20)], ids=["sums", "loops"])
def test_more_parallel_loops_than_counters(k: Kernel, loops: int, workers: int) -> None:
    given: dict[str, Any] = {name: np.arange(3).astype(numpy_dtype(type.dtype)) for name, type in k.parameters}
    expected = expect(k.tile_ir(), given)
    function = reduce_loops(k.tile_ir())
    made = run_lane(function, given, workers=workers, specialization=specialize(function, given, {"N": 16384}))
    tasks = [op.attributes["counter"] for op in made.walk() if op.name == "tasks"]
    assert made.attributes["counters"] == 8 and tasks == [n % 8 for n in range(loops)]
    assert_expected(given, expected, k.name)


def test_more_parallel_loops_than_counters_on_several_workers() -> None:
    rng = np.random.default_rng(1)
    for threads in (1, 2, 2):
        x = rng.integers(-1000, 1000, 70000, np.int32)
        out, expected, other = np.zeros_like(x), x.copy(), np.zeros_like(x)
        many_loops(expected, other, interpret=True)
        many_loops(x, out, threads=threads)
        assert (x == expected).all() and (out == other).all()


def test_an_address_waits_for_the_reduction_that_it_comes_from() -> None:
    given = {"x": np.float32([1, 5, 2]), "y": np.float32([7, 8, 9]), "out": np.zeros(1, np.float32)}
    run_lane(reduce_loops(at_the_highest.tile_ir()), given)
    assert given["out"][0] == 8


@kernel
def kept_over_a_span(x: Tensor[f32, N], stop: Tensor[i32, 1], out: Tensor[f32, N]):
    n = whole(span(0, stop[0]))
    before = x[n]
    for m in tiles(N):
        x[m] = x[m] * 2.0
    for m in tiles(N):
        out[m] = x[m]
    out[n] = before


def test_a_value_over_a_range_known_at_run_time_only_is_refused_with_its_line() -> None:
    given = {"x": np.ones(4, np.float32), "stop": np.int32([2]), "out": np.zeros(4, np.float32)}
    with pytest.raises(LoweringError, match=r"test_parts.py:\d+:14: a value over axis n passes .* mend: walk n to"):
        run_lane(reduce_loops(kept_over_a_span.tile_ir()), given)


@kernel
def sums(x: Tensor[f32, N], of_all: Tensor[f32, 2]):
    n = whole(N)
    of_all[0] = sum(x[n], over=n)
    of_all[1] = sum(x[n] * x[n], over=n)


@kernel
def row_sums(x: Tensor[f32, M, N], out: Tensor[f32, M]):
    for m in tiles(M):
        n = whole(N)
        out[m] = sum(x[m, n], over=n)


def test_long_sums_are_accurate() -> None:
    """16 million terms: one after the other, in 128 sums, they would lose 3 to 4 digits more. The same for any number
    of workers."""
    x = np.random.default_rng(0).random(1 << 24, np.float32)
    wanted = np.sum(x, dtype=np.float64), np.sum(x * x, dtype=np.float64)
    found = [np.zeros(2, np.float32) for _ in range(2)]
    for threads, of_all in enumerate(found, 1):
        sums(x, of_all, threads=threads)
    np.testing.assert_array_equal(*found)
    np.testing.assert_allclose(found[0], wanted, rtol=3e-7)
    rows = np.zeros(2, np.float32)
    row_sums(x.reshape(2, -1), rows)
    # A row is 8 million terms in 128 sums with 16 lanes: the roundings of 2**16 terms, half an ulp of up to 2**15 each,
    # add up as a random walk does, to 0.08 in each sum and 1 in all, 2e-7 of it; in 64 sums of 8 lanes to twice that.
    rtol = 3e-7 * 16 / host_target().lanes
    np.testing.assert_allclose(rows, x.reshape(2, -1).sum(axis=1, dtype=np.float64), rtol=rtol)


@pytest.mark.parametrize("k", KERNELS[:5], ids=lambda k: k.name)
def test_parts_on_a_gpu(k: Kernel) -> None:
    given = arguments_of(k, 40, 1)
    expected = expect(k.tile_ir(), given)
    emulate.run(k, *given.values(), target="sm_80", workers=8)
    assert_expected(given, expected, k.name)
