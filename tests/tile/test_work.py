"""The estimate of a kernel's time: which products of dimensions it has, and that it grows where the work does."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings

import sapper as sp
from sapper import Tensor, bf16, each, f32, i32, span, tiles, whole, zeros
from sapper.tile.canonical import canonicalize
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.work import ROW_NS, UNKNOWN_EXTENT, work
from tests.strategies import built, examples, kernels

M, N, K, B = sp.dims("M N K B")


def work_of(kernel: Any, lanes: int = 16, static: dict[str, int] | None = None) -> dict[tuple[str, ...], float]:
    function = kernel.tile_ir(static or {})
    reduce_loops(function)
    canonicalize(function)
    return {dims: ns for ns, dims in work(function, lanes)}


@sp.kernel
def product(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[k, n]
        c[m, n] = acc


@sp.kernel
def halves(x: Tensor[f32, B, N], y: Tensor[f32, B, N]):
    for b in each(B):
        n = whole(N // 2)
        y[b, n] = sp.exp(x[b, n])


@sp.kernel
def ragged(x: Tensor[f32, M, N], start: Tensor[i32, B], stop: Tensor[i32, B], y: Tensor[f32, B, N]):
    for b in each(B):
        for n in tiles(N):
            total = zeros(n, dtype=f32)
            for m in tiles(span(start[b], stop[b])):
                total += sp.sum(x[m, n], over=m)
            y[b, n] = total


@sp.kernel
def repeated(count: i32, x: Tensor[f32, N], y: Tensor[f32, N]):
    for n in tiles(N):
        total = x[n]
        for _ in range(count):
            total = total * 0.5
        y[n] = total


def test_a_product_is_the_product_of_its_dimensions() -> None:
    terms = work_of(product)
    assert set(terms) == {("K", "M"), ("K", "N"), ("M", "N"), ("K", "M", "N")}
    assert terms["K", "M", "N"] == pytest.approx(ROW_NS / 16)
    assert work_of(product, lanes=8)["K", "M", "N"] == pytest.approx(ROW_NS / 8)
    assert set(work_of(product, static={"K": 64})) == {("M",), ("N",), ("M", "N")}


def test_part_of_a_dimension_counts_as_that_part() -> None:
    @sp.kernel
    def all_of_it(x: Tensor[f32, B, N], y: Tensor[f32, B, N]):
        for b in each(B):
            n = whole(N)
            y[b, n] = sp.exp(x[b, n])

    assert work_of(halves)["B", "N"] == pytest.approx(work_of(all_of_it)["B", "N"] / 2)


def test_blocks_of_a_dimension_count_as_all_of_it() -> None:
    """Each as long as it can be, not as long as what it is cut off at; a start that is known says nothing of blocks."""
    @sp.kernel
    def blocks(x: Tensor[f32, K], scale: Tensor[f32, M, B], y: Tensor[f32, M, K]):
        for m, b in each(M, B):
            for k in tiles(span(b * 128, sp.minimum(b * 128 + 128, K))):
                y[m, k] = x[k] * scale[m, b]

    @sp.kernel
    def whole_rows(x: Tensor[f32, K], scale: Tensor[f32, M, B], y: Tensor[f32, M, K]):
        for m in each(M):
            for k in tiles(K):
                y[m, k] = x[k] * scale[m, 0]

    @sp.kernel
    def known_start(x: Tensor[f32, N], y: Tensor[f32, N]):
        for n in tiles(span(0, N)):
            y[n] = x[n] * 2.0

    in_blocks = work_of(blocks)
    assert all("K" not in dims for dims in in_blocks)
    assert in_blocks["B", "M"] == pytest.approx(128 * work_of(whole_rows)["K", "M"], rel=0.2)
    assert set(work_of(known_start)) == {("N",)}


def test_a_range_known_at_run_time_counts_as_the_dimension_that_it_indexes() -> None:
    assert ("B", "M", "N") in work_of(ragged)


def test_a_range_that_indexes_nothing_counts_as_a_guess() -> None:
    once = ROW_NS / 16
    assert work_of(repeated)["N",] == pytest.approx(UNKNOWN_EXTENT * once, rel=0.2)


def test_narrow_elements_cost_less_memory_and_functions_more_instructions() -> None:
    def terms(dtype: Any, function: Any) -> float:
        @sp.kernel
        def apply(x: Tensor[dtype, N], y: Tensor[f32, N]):
            for n in tiles(N):
                y[n] = function(x[n].to(f32))

        return work_of(apply)["N",]

    assert terms(bf16, abs) < terms(f32, abs) < terms(f32, sp.tanh)


@settings(max_examples=examples(60))
@given(case=kernels())
def test_random_kernels_have_an_estimate(case: Any) -> None:
    kernel, _ = built(case)
    terms = work_of(kernel)
    dims = {d for t in case.tensors for d in t.dims if isinstance(d, str)}
    for product_of, ns in terms.items():
        assert set(product_of) <= dims and product_of == tuple(sorted(product_of))
        assert ns > 0 and math.isfinite(ns)
