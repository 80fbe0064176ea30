"""What is stored and loaded in one block: every load sees the stores before it, and none of those after it."""

from __future__ import annotations

import numpy as np
import pytest

import sapper as sp
from sapper import (
    Tensor,
    argmax,
    bf16,
    bool_,
    cumsum,
    each,
    emulate,
    exp,
    f32,
    i32,
    i64,
    kernel,
    max,
    span,
    sum,
    tiles,
    whole,
    zeros,
)
from sapper.codegen.pipeline import facts_of, finish_lane
from sapper.ir.nodes import Op
from sapper.lang.kernel import Kernel
from sapper.runtime.check import check_kernel
from sapper.targets.x86_64.detect import host
from sapper.targets.x86_64.target import TARGETS
from sapper.tile.canonical import canonicalize
from sapper.tile.plan import Walk, plan_block
from sapper.tile.reduce_loops import reduce_loops

from .run_lane import run_lane

M, N, B = sp.dims("M N B")


@kernel
def three_stores(x: Tensor[f32, N], o: Tensor[f32, N]):
    for n in tiles(N):
        o[n] = 1.0
        o[n] += x[n]
        o[n] *= 2.0


@kernel
def turned_read_back(x: Tensor[f32, N], o: Tensor[f32, N], y: Tensor[f32, N]):
    n = whole(N)
    o[n] = x[n] * 2.0
    y[n] = o[N - 1 - n]


@kernel
def turned_before(x: Tensor[f32, N], o: Tensor[f32, N], y: Tensor[f32, N]):
    n = whole(N)
    a = o[N - 1 - n]
    o[n] = x[n] * 2.0
    y[n] = a


@kernel
def turned_in_place(x: Tensor[f32, N], o: Tensor[f32, N], y: Tensor[f32, N]):
    n = whole(N)
    o[n] = o[N - 1 - n] + x[n]
    y[n] = 1.0


@kernel
def scalar_before_and_after(x: Tensor[f32, B, N], o: Tensor[f32, B]):
    for b in each(B):
        n = whole(N)
        old = x[b, 0]
        x[b, n] = x[b, n] * 2.0
        o[b] = old + x[b, 0]


@kernel
def sums_before_and_after(x: Tensor[f32, B, N], o: Tensor[f32, B]):
    for b in each(B):
        n = whole(N)
        s = sum(x[b, n], over=n)
        x[b, n] = x[b, n] - s
        t = sum(x[b, n], over=n)
        x[b, n] = x[b, n] * t
        o[b] = s + t + x[b, 0]


@kernel
def two_scalars_swapped(x: Tensor[i32, B, N], o: Tensor[i32, B]):
    for b in each(B):
        old = x[b, 0]
        x[b, 0] = x[b, 1]
        x[b, 1] = old
        o[b] = x[b, 0] - x[b, 1]


@kernel
def rows_with_a_fixed_column(x: Tensor[f32, M, N], o: Tensor[f32, M, N], y: Tensor[f32, M]):
    for m in tiles(M):
        n = whole(N)
        o[m, n] = x[m, n]
        o[m, N - 1] = 0.0
        y[m] = max(o[m, n], over=n)
        o[m, n] = o[m, n] / y[m]


@kernel
def function_of_what_was_there(x: Tensor[f32, N], o: Tensor[f32, N], y: Tensor[f32, N]):
    n = whole(N)
    a = o[N - 1 - n]
    b = exp(a)
    y[n] = b
    o[n] = x[n] * 2.0 + b
    y[n] = y[n] + a


@kernel
def scalar_after_a_loop(x: Tensor[i32, B, N], o: Tensor[i32, B]):
    for b in each(B):
        for i in range(3):
            x[b, 0] = x[b, 0] + i.to(i32)
        t = x[b, 0]
        o[b] = t


@kernel
def scalar_between_two_stores(x: Tensor[i32, B, N], o: Tensor[i32, B]):
    for b in each(B):
        x[b, 0] = x[b, 1]
        t = x[b, 0]
        x[b, 0] = 5
        o[b] = t


@kernel
def tile_before_a_loop(x: Tensor[f32, M, N], o: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        old = x[m, n]
        for i in range(3):
            x[m, n] = old * i.to(f32) + x[m, n]
        o[m, n] = old


@kernel
def tile_handed_on(x: Tensor[f32, M, N], o: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        acc = zeros(m, n, dtype=f32)
        for i in range(3):
            a = x[m, n]
            x[m, n] = acc + i.to(f32)
            acc = a
        o[m, n] = acc


@kernel
def integer_handed_on(x: Tensor[i64, B], o: Tensor[i64, B]):
    for b in each(B):
        acc = zeros(dtype=i64)
        for _ in range(4):
            a = x[b]
            x[b] = acc * 3 + a
            acc = a - x[b]
        o[b] = acc


@kernel
def conditions(x: Tensor[f32, B, N], o: Tensor[f32, B]):
    for b in each(B):
        c = x[b, 0] > 0.0
        x[b, 0] = 1.0
        if c:
            x[b, 0] = 2.0
        d = x[b, 0] > 1.5
        x[b, 0] = -1.0
        o[b] = x[b, 0] if d else 7.0


@kernel
def best_and_second(x: Tensor[f32, M, N], o: Tensor[f32, M]):
    for m in tiles(M):
        n = whole(N)
        i = argmax(x[m, n], over=n)
        best = x[m, i]
        x[m, i] = -100.0
        j = argmax(x[m, n], over=n)
        o[m] = best - x[m, j]


@kernel
def turned_three_times(x: Tensor[f32, M, N], o: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        x[m, n] = x[m, N - 1 - n]
        o[m, n] = x[m, N - 1 - n]
        x[m, n] = o[m, N - 1 - n] + x[m, n]


@kernel
def second_store_wins(x: Tensor[f32, N], y: Tensor[f32, N], o: Tensor[f32, N]):
    n = whole(N)
    o[n] = x[n]
    o[N - 1 - n] = y[n]


@kernel
def gathered(x: Tensor[f32, M, N], i: Tensor[i32, N], o: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        o[m, n] = x[m, n]
        t = o[m, i[n]]
        o[m, n] = t * 2.0
        o[m, n] += o[m, i[n]]


@kernel
def bools(x: Tensor[bool_, M, N], o: Tensor[bool_, M, N]):
    for m in tiles(M):
        n = whole(N)
        a = x[m, n]
        x[m, n] = ~x[m, N - 1 - n]
        o[m, n] = a & x[m, n]
        x[m, n] = o[m, n] ^ a


@kernel
def edges_of_a_row(x: Tensor[bf16, M, N], o: Tensor[bf16, M]):
    for m in tiles(M):
        n = whole(N)
        first = x[m, 0]
        x[m, n] = x[m, n] * first
        last = x[m, N - 1]
        x[m, n] = x[m, n] + last
        o[m] = first + last + x[m, 0]


@kernel
def product_read_back(a: Tensor[f32, M, N], b: Tensor[f32, N, N], o: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        k = whole(N)
        o[m, n] = a[m, k] @ b[k, n]
        t = o[m, k] @ b[k, n]
        o[m, n] = t + o[m, n]


@kernel
def branches(x: Tensor[f32, M, N], o: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        for i in range(2):
            if i > 0:
                x[m, n] = x[m, N - 1 - n] + 1.0
            else:
                x[m, n] = x[m, n] * 2.0
            o[m, n] = x[m, n]
        x[m, n] = o[m, n] - x[m, 0]


@kernel
def rotated(x: Tensor[f32, M, 4], o: Tensor[f32, M]):
    for m in tiles(M):
        a = x[m, 0]
        x[m, 0] = x[m, 1]
        x[m, 1] = x[m, 2]
        x[m, 2] = x[m, 3]
        x[m, 3] = a
        o[m] = x[m, 0] - x[m, 3]


@kernel
def at_the_top(x: Tensor[f32, N], o: Tensor[f32, 4]):
    t = x[0]
    x[0] = 5.0
    o[0] = t
    n = whole(N)
    s = sum(x[n], over=n)
    x[n] = x[n] - s
    o[1] = s
    u = x[0]
    for m in tiles(N):
        x[m] = x[m] + u
    o[2] = x[0]
    o[3] = u


@kernel
def sum_added_to_what_was_stored(x: Tensor[f32, M, N], out: Tensor[f32, N], factor: f32):
    for n in tiles(N):
        m = whole(M)
        total = sum(x[m, n], over=m)
        out[n] = factor
        out[n] += total


KERNELS = [value for value in list(globals().values()) if isinstance(value, Kernel)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("k", KERNELS, ids=lambda k: k.name)
def test_loads_see_the_stores_before_them(k: Kernel) -> None:
    report = check_kernel(k, runs=6)
    assert report.ok, report
    assert set(report.passed) >= {"tile sizes", "lower", "simplify", "native"}


def items_of(k: Kernel) -> list[list[str]]:
    """The walks of a kernel's innermost block: for each the tensors that it stores, `kept` for a value."""
    function = k.tile_ir()
    canonicalize(function)
    block = function.body
    while any(op.blocks for op in block.ops):
        block = next(op for op in block.ops if op.blocks).blocks[0]
    wholes = frozenset(op.attributes["axis"] for op in function.walk() if op.name == "whole")
    items = plan_block(block, wholes).items
    assert all(isinstance(item, Walk) for item in items)
    return [[root.operands[0].name if isinstance(root, Op) else "kept" for root in item.roots()] for item in items]


@kernel
def softmax_of_a_range(x: Tensor[f32, B, N], start: Tensor[i32, B], stop: Tensor[i32, B], out: Tensor[f32, B, N]):
    for b in each(B):
        n = whole(span(start[b], stop[b]))
        e = exp(x[b, n] - max(x[b, n], over=n))
        out[b, n] = e / sum(e, over=n)


def test_what_no_memory_can_be_set_aside_for_is_computed_again() -> None:
    x = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    start, stop = np.int32([0, 3, 20]), np.int32([50, 19, 20])
    out, expected = np.zeros_like(x), np.zeros_like(x)
    softmax_of_a_range(x, start, stop, out)
    softmax_of_a_range(x, start, stop, expected, interpret=True)
    np.testing.assert_allclose(out, expected, rtol=1e-6)


@kernel
def pairs(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    """Even and odd elements change places: they never meet."""
    for m in tiles(M):
        i = whole(N // 2)
        even = x[m, 2 * i]
        x[m, 2 * i] = x[m, 2 * i + 1]
        x[m, 2 * i + 1] = even
        y[m, i] = even


def test_only_what_may_meet_is_kept() -> None:
    assert items_of(pairs) == [["x", "x", "y"]]
    assert items_of(turned_in_place) == [["kept"], ["o", "y"]]


@kernel(in_place=[("out", "x")])
def read_before(x: Tensor[f32, M, N], w: Tensor[f32, N, B], out: Tensor[f32, M, N], y: Tensor[f32, M, B],
                low: Tensor[f32, M, N]):
    for m in tiles(M):
        n, b = whole(N), whole(B)
        row = x[m, n]
        out[m, n] = cumsum(row, over=n)
        y[m, b] = row @ w[n, b]
        low[m, n] = row - max(row, over=n)


@kernel(in_place=[("out", "x")])
def read_after(x: Tensor[f32, M, N], out: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        before = x[m, n]
        out[m, n] = before + 1.0
        y[m, n] = x[m, n] * before


@kernel(in_place=[("out", "x")])
def read_before_in_parts(x: Tensor[f32, M, N], w: Tensor[f32, N, B], out: Tensor[f32, M, N], y: Tensor[f32, M, B],
                         low: Tensor[f32, M, N]):
    """Two loops that workers share, one after the other."""
    for m in tiles(M):
        n, b = whole(N), whole(B)
        row = x[m, n]
        out[m, n] = cumsum(row, over=n)
        y[m, b] = row @ w[n, b]
    for m, n in tiles(M, N):
        low[m, n] = x[m, n]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("target", ["v3", "v4", "sm_80"])
@pytest.mark.parametrize(("rows", "columns"), [(3, 70), (5, 4), (1, 1)])
@pytest.mark.parametrize("static", [False, True])
def test_tensors_in_one_place(target: str, rows: int, columns: int, static: bool) -> None:
    """Of two tensors that may be one, what was read stays what it was, and what is read sees what was written."""
    random = np.random.default_rng(0)
    x = random.integers(-9, 9, (rows, columns)).astype(np.float32)          # sums are exact
    w = random.integers(-9, 9, (columns, 5)).astype(np.float32)
    one, two = x.copy(), x.copy()
    given = {"x": one, "w": w, "out": one, "y": np.zeros((rows, 5), np.float32), "low": np.zeros_like(x)}
    run_in_place(read_before, given, target, static)
    np.testing.assert_array_equal(one, np.cumsum(x, axis=1))
    np.testing.assert_array_equal(given["y"], x @ w)
    np.testing.assert_array_equal(given["low"], x - x.max(axis=1, keepdims=True))
    one = x.copy()
    given = {"x": one, "w": w, "out": one, "y": np.zeros((rows, 5), np.float32), "low": np.zeros_like(x)}
    run_in_place(read_before_in_parts, given, target, static)
    np.testing.assert_array_equal(given["low"], np.cumsum(x, axis=1))
    np.testing.assert_array_equal(given["y"], x @ w)
    given = {"x": two, "out": two, "y": np.zeros_like(x)}
    run_in_place(read_after, given, target, static)
    np.testing.assert_array_equal(two, x + 1)
    np.testing.assert_array_equal(given["y"], (x + 1) * x)


def run_in_place(k: Kernel, arguments: dict[str, np.ndarray], target: str, static: bool) -> None:
    if target == "sm_80":
        emulate.run(k, *arguments.values(), target=target)
    elif TARGETS[target].features <= host().features:
        k(**arguments, static=static, target=target)
    else:
        function = reduce_loops(k.tile_ir())
        canonicalize(function)
        run_lane(function, arguments, None, facts_of(TARGETS[target]),
                 passes=lambda lane: finish_lane(lane, TARGETS[target]))
