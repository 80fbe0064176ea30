"""Operands that a loop does not change stand before it, if reading them there is surely allowed; nothing else moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import Tensor, each, f32, i32, max, min, span, tiles, whole, zeros
from sapper.ir.nodes import Function, Op
from sapper.ir.text import print_function
from sapper.ir.verifier import verify
from sapper.kernels import find
from sapper.tile.canonical import canonicalize
from sapper.tile.hoist import hoist_operands
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS, memory_of
from sapper.tile.reduce_loops import reduce_loops
from tests.strategies.amount import examples

M, N, K, P = sp.dims("M N K P")


def canonical(kernel: Any) -> Function:
    function: Function = kernel.tile_ir()
    reduce_loops(function)
    canonicalize(function)
    return function


def loads_in_loops(function: Function, name: str) -> int:
    """How many loads of a tensor stand in the loops that are not parallel."""
    loops = [op for op in function.walk() if op.name in ("tiles", "each") and not op.attributes["parallel"]]
    return len({op for loop in loops for op in loop.walk()
                if op.name == "load" and memory_of(op.operands[0]).name == name})


# Each carries a sum that the next iteration scales, so that no loop becomes a reduction.


@sp.kernel
def same_rows(a: Tensor[f32, M, K], b: Tensor[f32, P, K], out: Tensor[f32, M]):
    for m in tiles(M):
        k = whole(K)
        total = zeros(m, dtype=f32)
        for p in tiles(P):
            score = (a[m, k] * 2.0) @ b[p, k]
            total = total * 0.5 + max(score, over=p)
        out[m] = total


@sp.kernel
def rows_of_two_loops(a: Tensor[f32, M, K], b: Tensor[f32, N, P, K], out: Tensor[f32, M]):
    for m in tiles(span(0, min(M, 3))):
        k = whole(K)
        total = zeros(m, dtype=f32)
        for n in range(N):
            for p in tiles(P):
                total = total * 0.5 + max(a[m, k] @ b[n, p, k], over=p)
        out[m] = total


@sp.kernel
def whole_rows_inside(a: Tensor[f32, M, K], b: Tensor[f32, P, K], out: Tensor[f32, M]):
    for m in tiles(M):
        total = zeros(m, dtype=f32)
        for _ in range(2):
            for p in tiles(P):
                k = whole(K)
                total = total * 0.5 + max((a[m, k] * 2.0) @ b[p, k], over=p)
        out[m] = total


@sp.kernel
def rows_whose_length_changes(a: Tensor[f32, M, K], b: Tensor[f32, P, K], out: Tensor[f32, M]):
    for m in tiles(M):
        total = zeros(m, dtype=f32)
        for p in range(P):
            k = whole(span(0, min(p, K)))
            total = total * 0.5 + a[m, k] @ b[p, k]
        out[m] = total


@sp.kernel
def rows_of_a_view(a: Tensor[f32, 2, M, K], b: Tensor[f32, P, K], out: Tensor[f32, N, M]):
    turned = a.view(2, N, M // N, K)
    for n in each(N):
        for m in tiles(M // N):
            k = whole(K)
            total = zeros(m, dtype=f32)
            for p in tiles(P):
                total = total * 0.5 + max(turned[1, n, m, k] @ b[p, k], over=p)
            out[n, m + 0] = total


@sp.kernel
def rows_that_are_stored(a: Tensor[f32, M, K], b: Tensor[f32, P, K], start: Tensor[i32, N], out: Tensor[f32, M]):
    for m in tiles(span(start[0], start[1])):
        k = whole(K)
        total = zeros(m, dtype=f32)
        for p in tiles(P):
            total = total * 0.5 + max(a[m, k] @ b[p, k], over=p)
        out[m] = total


@sp.kernel
def shifted_rows(a: Tensor[f32, M, K], b: Tensor[f32, P, K], shift: i32, out: Tensor[f32, N]):
    for n in tiles(N):
        k = whole(K)
        total = zeros(n, dtype=f32)
        for p in tiles(P):
            total = total * 0.5 + max(a[n + shift, k] @ b[p, k], over=p)
        out[n] = total


@sp.kernel
def rows_past_the_end(a: Tensor[f32, M, K], b: Tensor[f32, P, K], count: i32, out: Tensor[f32, N]):
    for n in tiles(span(0, count)):
        k = whole(K)
        total = zeros(n, dtype=f32)
        for p in tiles(P):
            total = total * 0.5 + max(a[n, k] @ b[p, k], over=p)
        out[n] = total


@sp.kernel
def stored_rows(a: Tensor[f32, M, K], b: Tensor[f32, P, K], out: Tensor[f32, M]):
    for m in tiles(M):
        k = whole(K)
        total = zeros(m, dtype=f32)
        for p in range(P):
            total = total * 0.5 + a[m, k] @ b[p, k]
            a[m, k] = a[m, k] * 0.5
        out[m] = total


@sp.kernel
def rows_that_may_not_be_stored(
    a: Tensor[f32, M, K], b: Tensor[f32, P, K], start: Tensor[i32, N], out: Tensor[f32, M, N],
):
    for m in tiles(span(start[0], start[1])):
        k, n = whole(K), whole(N)
        total = zeros(m, dtype=f32)
        for p in tiles(P):
            total = total * 0.5 + max(a[m, k] @ b[p, k], over=p)
        out[m, n] = total


@pytest.mark.parametrize("kernel", [same_rows, rows_of_two_loops, whole_rows_inside, rows_of_a_view,
                                    rows_that_are_stored], ids=lambda kernel: kernel.name)
def test_rows_that_stay_the_same_leave_all_loops(kernel: Any) -> None:
    function = canonical(kernel)
    assert loads_in_loops(function, "a") == 1
    hoist_operands(function)
    verify(function, TILE_OPS)
    assert loads_in_loops(function, "a") == 0
    assert loads_in_loops(function, "b") == 1
    once = print_function(function)
    hoist_operands(function)
    assert print_function(function) == once


@pytest.mark.parametrize("kernel", [shifted_rows, rows_past_the_end, stored_rows, rows_that_may_not_be_stored,
                                    rows_whose_length_changes], ids=lambda kernel: kernel.name)
def test_rows_that_may_lie_outside_or_change_stay(kernel: Any) -> None:
    function = canonical(kernel)
    before = print_function(function)
    hoist_operands(function)
    assert print_function(function) == before


def test_an_empty_loop_reads_no_rows_that_there_are_not() -> None:
    function = canonical(rows_past_the_end)
    hoist_operands(function)
    out = np.full(5, np.nan, np.float32)
    arguments = {"a": np.ones((2, 3), np.float32), "b": np.ones((0, 3), np.float32), "count": 5, "out": out}
    interpret(function, arguments, 4)
    assert (out == 0).all()


@settings(deadline=None, max_examples=examples(25))
@given(m=st.integers(0, 6), n=st.integers(0, 3), p=st.integers(0, 5), k=st.integers(0, 4), tile=st.integers(1, 4),
       seed=st.integers(0, 99))
@pytest.mark.parametrize("kernel", [same_rows, rows_of_two_loops, whole_rows_inside], ids=lambda kernel: kernel.name)
def test_the_meaning_is_the_same(kernel: Any, m: int, n: int, p: int, k: int, tile: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    extents = (n, p, k) if kernel is rows_of_two_loops else (p, k)
    arguments = {"a": random.standard_normal((m, k), np.float32), "b": random.standard_normal(extents, np.float32)}
    results = []
    for hoisted in (False, True):
        function = canonical(kernel)
        if hoisted:
            hoist_operands(function)
        out = np.full(m, 7, np.float32)
        interpret(function, {**arguments, "out": out}, tile)
        results.append(out)
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize("name", ["attention_f16_128", "attention_bf16_128", "attention_decode_bf16_128"])
def test_queries_of_attention_stand_before_the_loop_over_positions(name: str) -> None:
    function = canonical(find(name).kernel)
    assert loads_in_loops(function, "q") == 1
    hoist_operands(function)
    verify(function, TILE_OPS)
    assert loads_in_loops(function, "q") == 0
    moved = [op for op in function.walk() if op.name == "load" and op.operands[0].name == "q"]
    assert all(isinstance(op, Op) for op in moved) and len(moved) == 1
