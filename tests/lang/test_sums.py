"""Sums at elements that a loop may meet again: what is read as one, and that all interpreters add every value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import KernelError, Tensor, each, f32, i32, kernel, maximum, tiles, whole
from sapper.ir.text import parse_function, print_function
from sapper.ir.verifier import VerificationError, verify
from sapper.runtime.check import check_kernel
from sapper.tile.eager import run as run_eager
from sapper.tile.interpret import RaceError, interpret
from sapper.tile.ops import TILE_OPS
from sapper.tile.rounding import expect
from tests.strategies import assert_expected, examples
from tests.strategies.sums import arguments_of_sums, sums

from .test_random_kernels import kernel_of

M, N, V, P, R = sp.dims("M N V P R")


@kernel
def rows_at_tokens(g: Tensor[f32, M, N], token: Tensor[i32, M], out: Tensor[f32, V, N]):
    for m, n in tiles(M, N):
        out[token[m], n] += g[m, n]


@kernel
def histogram(x: Tensor[i32, N], count: Tensor[i32, V]):
    for n in tiles(N):
        count[x[n]] += 1


@kernel
def windows(x: Tensor[f32, M, P, R], image: Tensor[f32, M, N]):
    for m, p, r in tiles(M, P, R):
        image[m, p + r] -= x[m, p, r]


@kernel
def mirrored(x: Tensor[f32, N], out: Tensor[f32, N]):
    for n in tiles(N):
        out[n] += x[n]
        out[N - 1 - n] += x[n]


@kernel
def in_turn(x: Tensor[f32, M, N], token: Tensor[i32, M], out: Tensor[f32, V, N]):
    for m in each(M):
        for n in tiles(N):
            out[token[m], n] += x[m, n]


def loops(k: Any) -> list[dict[str, Any]]:
    return [op.attributes for op in k.tile_ir().walk() if op.name in ("tiles", "each")]


def joins(k: Any) -> list[str | None]:
    return [op.attributes.get("join") for op in k.tile_ir().walk() if op.name == "store"]


def test_what_is_a_sum() -> None:
    assert joins(rows_at_tokens) == joins(histogram) == joins(windows) == ["add"]
    assert [loop["repeats"] for k in (rows_at_tokens, histogram, windows) for loop in loops(k)] == [
        ["m"], ["n"], ["p", "r"]]
    assert joins(mirrored) == ["add", "add"]   # neither meets itself, but each meets the other
    assert joins(in_turn) == [None]            # a loop in turn says in which order
    assert loops(in_turn)[0]["ordered"]


def test_updates_written_out() -> None:
    """Element and value on either side, by a function or an operator: the same as an augmented assignment."""
    @kernel
    def largest(x: Tensor[f32, N], at: Tensor[i32, N], out: Tensor[f32, V], low: Tensor[f32, V]):
        for n in tiles(N):
            out[at[n]] = maximum(x[n], out[at[n]])
            low[at[n]] = min(low[at[n]], x[n])

    @kernel
    def bits(x: Tensor[i32, N], at: Tensor[i32, N], out: Tensor[i32, V], total: Tensor[i32, V]):
        for n in tiles(N):
            out[at[n]] = x[n] | out[at[n]]
            total[at[n]] = total[at[n]] - x[n]

    @kernel
    def along(x: Tensor[f32, M, N], out: Tensor[f32, M]):
        for m, n in tiles(M, N):
            out[m + 0 * n] = maximum(out[m + 0 * n], x[m, n])

    assert (joins(largest), joins(bits), joins(along)) == (["max", "min"], ["or", "add"], ["max"])
    assert [loop["repeats"] for k in (largest, bits, along) for loop in loops(k)] == [["n"], ["n"], ["n"]]
    random = np.random.default_rng(0)
    at, x = random.integers(0, 5, 40).astype(np.int32), random.standard_normal(40).astype(np.float32)
    top, low, both, total = np.zeros(6), np.zeros(6), np.zeros(6, np.int32), np.zeros(6, np.int32)
    whole = (x * 9).astype(np.int32)
    for f, made, values in ((np.maximum, top, x), (np.minimum, low, x), (np.bitwise_or, both, whole),
                            (np.subtract, total, whole)):
        f.at(made, at, values)
    for run in (run_eager, lambda k, given, size: interpret(k.tile_ir(), given, size, check_races=True),
                lambda k, given, size: k(**given)):
        for size in (None, 3):
            given = {"x": x, "at": at, "out": np.zeros(6, np.float32), "low": np.zeros(6, np.float32)}
            run(largest, given, size)
            np.testing.assert_array_equal([given["out"], given["low"]], [top.astype(np.float32),
                                                                         low.astype(np.float32)])
            given = {"x": whole, "at": at, "out": np.zeros(6, np.int32), "total": np.zeros(6, np.int32)}
            run(bits, given, size)
            np.testing.assert_array_equal([given["out"], given["total"]], [both, total])
            given = {"x": x.reshape(4, 10), "out": np.zeros(4, np.float32)}
            run(along, given, size)
            np.testing.assert_array_equal(given["out"], np.maximum(x.reshape(4, 10).max(axis=1), 0))


def test_what_is_no_update() -> None:
    """An element less than which a value is taken the other way round, another element, another op."""
    @kernel
    def turned(x: Tensor[f32, N], at: Tensor[i32, N], out: Tensor[f32, V]):
        for n in tiles(N):
            out[at[n]] = x[n] - out[at[n]]

    @kernel
    def product(x: Tensor[f32, N], at: Tensor[i32, N], out: Tensor[f32, V]):
        for n in tiles(N):
            out[at[n]] = out[at[n]] * x[n]

    @kernel
    def beside(x: Tensor[f32, N], at: Tensor[i32, N], out: Tensor[f32, V]):
        for n in tiles(N):
            out[at[n]] = maximum(out[at[n] + 1], x[n])

    def doubled(value: Any) -> Any:
        return maximum(value, value + value)

    @kernel
    def twice(at: Tensor[i32, N], out: Tensor[f32, V]):
        for n in tiles(N):
            out[at[n]] = doubled(out[at[n]])

    for k in (turned, product, beside, twice):
        with pytest.raises(KernelError):
            k.tile_ir()
    at, out = np.array([1, 0], np.int32), np.array([3.0, 5.0], np.float32)
    run_eager(turned, {"x": np.array([1.0, 2.0], np.float32), "at": at, "out": out})
    np.testing.assert_array_equal(out, [2.0 - 3.0, 1.0 - 5.0])


def test_what_is_none() -> None:
    @kernel
    def apart(x: Tensor[f32, M, N], out: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            out[m, n] += x[m, n]

    @kernel
    def by_batch(x: Tensor[i32, M, N], count: Tensor[i32, M, V]):
        for m in each(M):
            for n in tiles(N):
                count[m, x[m, n]] += 1

    assert joins(apart) == [None]
    assert [loop.get("parallel") for loop in loops(by_batch)] == [True, True]
    assert loops(by_batch)[1]["repeats"] == ["n"]


def test_text_and_verifier() -> None:
    function = windows.tile_ir()
    verify(function, TILE_OPS)
    text = print_function(function)
    assert 'join = "add"' in text and 'repeats = ["p", "r"]' in text
    assert print_function(parse_function(text, {"tile": TILE_OPS})) == text
    for before, after in (('join = "add"', 'join = "mul"'), ('join = "add"', 'join = "or"'), ('["p", "r"]', '["q"]')):
        with pytest.raises(VerificationError):
            verify(parse_function(text.replace(before, after), {"tile": TILE_OPS}), TILE_OPS)


@pytest.mark.parametrize("size", [None, 1, 2, 5])
def test_meaning(size: int | None) -> None:
    random = np.random.default_rng(1)
    token, g = random.integers(0, 4, 11).astype(np.int32), random.standard_normal((11, 3)).astype(np.float32)
    expected = np.ones((4, 3))
    np.add.at(expected, token, g)
    for run in (run_eager, lambda k, given, size: interpret(k.tile_ir(), given, size, check_races=True)):
        out, count = np.ones((4, 3), np.float32), np.ones(4, np.int32)
        run(rows_at_tokens, {"g": g, "token": token, "out": out}, size)
        np.testing.assert_allclose(out, expected, rtol=1e-5)
        run(histogram, {"x": token, "count": count}, size)
        np.testing.assert_array_equal(count, 1 + np.bincount(token, minlength=4))


def test_sums_are_rounded_once_by_the_interpreter() -> None:
    ones, out = np.ones(4096, np.float32), np.full(1, 2.0**24, np.float32)
    interpret(windows.tile_ir(), {"x": -ones.reshape(1, 1, 4096)[:, :, :1], "image": out.reshape(1, 1)})
    assert out[0] == 2.0**24    # half an ulp goes to the even one
    interpret(rows_at_tokens.tile_ir(), {"g": ones.reshape(4096, 1), "token": np.zeros(4096, np.int32),
                                         "out": out.reshape(1, 1)})
    assert out[0] == 2.0**24 + 4096


def test_a_loop_whose_author_says_that_it_meets_nothing_is_watched() -> None:
    @kernel
    def asserted(x: Tensor[i32, M, N], place: Tensor[i32, M], count: Tensor[i32, V, 4]):
        for m in each(M, disjoint=True):
            for n in tiles(N):
                count[place[m], x[m, n]] += 1

    def given(places: list[int]) -> dict[str, Any]:
        return {"x": np.array([[1, 1], [2, 1]], np.int32), "place": np.array(places, np.int32),
                "count": np.zeros((3, 4), np.int32)}

    for places in ([0, 2], [1, 0]):
        for run in (run_eager, lambda k, a: interpret(k.tile_ir(), a, check_races=True)):
            arguments = given(places)
            run(asserted, arguments)
            assert arguments["count"][places[0], 1] == 2
    with pytest.raises(KernelError, match="by one iteration of a parallel loop and written by another"):
        run_eager(asserted, given([1, 1]))
    with pytest.raises(RaceError, match="two iterations"):
        interpret(asserted.tile_ir(), given([1, 1]), check_races=True)


@pytest.mark.parametrize("k", [rows_at_tokens, histogram, windows, mirrored], ids=lambda k: k.name)
def test_check(k: Any) -> None:
    assert check_kernel(k, runs=4).ok


@settings(max_examples=examples(80))
@given(sums(), st.integers(0, 9), st.integers(1, 9), st.integers(1, 30), st.integers(0, 99))
def test_random_sums(drawn: tuple[str, str], rows: int, columns: int, spread: int, seed: int) -> None:
    """One meaning for every tile size, eager or not; no other iteration touches what is added to."""
    source, dtype = drawn
    k = kernel_of(source)
    function, arguments = k.tile_ir(), arguments_of_sums(dtype, rows, columns, spread, seed)
    verify(function, TILE_OPS)
    expected = expect(function, arguments)
    for size in (None, 1, 2, 3):
        for run in (run_eager, lambda k, given, size: interpret(function, given, size, check_races=True)):
            given_ = {name: array.copy() for name, array in arguments.items()}
            run(k, given_, size)
            assert_expected(given_, expected, source)


def test_whole_axes_meet_no_element_twice() -> None:
    @kernel
    def k(x: Tensor[i32, N], count: Tensor[i32, V]):
        n = whole(N)
        count[x[n]] += 1

    with pytest.raises(KernelError) as caught:
        k.tile_ir()
    assert caught.value.kind == "write-race" and "loop" in caught.value.mend
