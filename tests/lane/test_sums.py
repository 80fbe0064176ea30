"""Sums at elements that a loop may meet again, lowered: who adds, in which lanes, and what comes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import Tensor, i8, i64, kernel, tiles, u8
from sapper.ir.nodes import Function
from sapper.ir.types import DType, bf16, f32, f64, i32
from sapper.ir.verifier import verify
from sapper.lane.extents import hint
from sapper.lane.lower import lower
from sapper.lane.synchronise import synchronise, unsynchronised
from sapper.tile.canonical import canonicalize
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS
from sapper.tile.rounding import expect
from sapper.tile.schedule import DimClass, Facts, Schedule, Specialization
from sapper.tile.semantics import numpy_dtype
from sapper.tile.sums import share_sums
from tests.lang.test_random_kernels import kernel_of
from tests.lang.test_sums import histogram, mirrored, rows_at_tokens, windows
from tests.strategies import assert_expected, examples
from tests.strategies.sums import arguments_of_sums, sums

from .run_lane import run_lane, specialize

N, V = sp.dims("N V")


def loops(k: Any, at_once: frozenset[Any] = frozenset()) -> list[tuple[list[str], bool]]:
    function = k.tile_ir()
    share_sums(function, at_once)
    verify(function, TILE_OPS)
    return [(op.attributes["axes"], op.attributes["parallel"]) for op in function.walk() if op.name == "tiles"]


def test_axes_that_meet_nothing_stand_outside() -> None:
    assert loops(rows_at_tokens) == [(["n"], True), (["m"], False)]
    assert loops(windows) == [(["m"], True), (["p", "r"], False)]
    assert loops(histogram) == loops(mirrored) == [(["n"], False)]


def test_what_the_target_does_at_once_is_shared_out_as_it_stands() -> None:
    assert loops(histogram, frozenset({("add", i32)})) == [(["n"], True)]
    assert loops(histogram, frozenset({("max", i32)})) == [(["n"], False)]


def lowered(k: Any, arguments: dict[str, Any], schedule: Schedule | None = None, workers: int = 1) -> list[str]:
    """The names of the ops; the results are those of the interpreter."""
    function = k.tile_ir()
    canonicalize(function)
    expected = {name: array.copy() for name, array in arguments.items()}
    interpret(k.tile_ir(), expected)
    lane = run_lane(function, arguments, schedule, workers=workers)
    for name, array in expected.items():
        np.testing.assert_allclose(arguments[name], array, rtol=1e-5, atol=1e-5)
    return [op.name for op in lane.walk()]


@pytest.mark.parametrize("workers", [1, 3])
def test_lanes_go_along_an_axis_that_meets_nothing(workers: int) -> None:
    random = np.random.default_rng(0)
    arguments = {"g": random.standard_normal((40, 326)).astype(np.float32),
                 "token": random.integers(0, 5, 40).astype(np.int32), "out": np.ones((5, 326), np.float32)}
    ops = lowered(rows_at_tokens, arguments, workers=workers)
    assert "store" in ops and not {"scatter", "store_lane0", "s_store"} & set(ops) and "tasks" in ops


def test_workers_add_to_parts_of_rows_that_are_not_short() -> None:
    """512 bytes: short ones would meet in lines of the cache all the time."""
    M = sp.dims("M")

    def least(dtype: DType, contiguous: bool = True) -> object:
        @kernel
        def rows(g: Tensor[f32, M, N], token: Tensor[i32, M], out: Tensor[dtype, V, N]):
            for m, n in tiles(M, N):
                out[token[m], n] += g[m, n].to(dtype)

        function = rows.tile_ir()
        canonicalize(function)
        share_sums(function, frozenset())
        facts = Facts(lanes=16, vector_registers=32)
        strides = {} if contiguous else {"out": (True, False)}
        (((constant, dims, granule),),) = lower(function, Schedule(), facts, Specialization({}, strides)).attributes[
            "tasks"]
        return constant, dims, granule

    assert least(f32) == (1, ["N"], 128) and least(f64) == (1, ["N"], 64) and least(bf16) == (1, ["N"], 256)
    assert least(f32, contiguous=False)[2] < 128


def test_windows_overlap_from_row_to_row_and_not_from_lane_to_lane() -> None:
    random = np.random.default_rng(0)
    ops = lowered(windows, {"x": random.standard_normal((2, 19, 35)).astype(np.float32),
                            "image": np.zeros((2, 53), np.float32)})
    assert "store_lane0" not in ops


def test_lane_after_lane_where_any_may_meet_another() -> None:
    random = np.random.default_rng(0)
    ops = lowered(histogram, {"x": random.integers(0, 3, 41).astype(np.int32), "count": np.zeros(3, np.int32)})
    assert ops.count("s_store") == 16 + 1 and not {"scatter", "gather"} & set(ops)


def rows_in_scratch(ops: list[str]) -> bool:
    """Do places or values of lanes lie in scratch memory?"""
    return "store" in ops


@pytest.mark.parametrize("index", [u8, i8, i32, i64], ids=str)
@pytest.mark.parametrize("value", [f32, i32], ids=str)
def test_what_was_loaded_is_read_lane_by_lane_from_where_it_lies(index: DType, value: DType) -> None:
    @kernel
    def totals(x: Tensor[value, N], place: Tensor[index, N], total: Tensor[value, V]):
        for n in tiles(N):
            total[place[n].to(i32)] += x[n]

    @kernel
    def far_totals(x: Tensor[value, N], place: Tensor[index, N], total: Tensor[value, V]):
        for n in tiles(N):
            total[place[n]] += x[n]

    random = np.random.default_rng(0)
    arguments = {"x": random.integers(-9, 9, 41).astype(numpy_dtype(value)),
                 "place": random.integers(0, 5, 41).astype(numpy_dtype(index)),
                 "total": np.zeros(5, numpy_dtype(value))}
    assert not rows_in_scratch(lowered(far_totals if index is i64 else totals, arguments))


def test_what_may_have_changed_or_is_computed_lies_in_scratch_memory() -> None:
    @kernel(in_place=[("count", "x")])
    def counted_where_they_lie(x: Tensor[i32, N], count: Tensor[i32, N]):
        for n in tiles(N):
            count[x[n]] += 1

    @kernel
    def halved(x: Tensor[i32, N], count: Tensor[i32, V]):
        for n in tiles(N):
            count[x[n] // 2] += 1

    x = np.random.default_rng(0).integers(0, 41, 41).astype(np.int32)
    assert rows_in_scratch(lowered(halved, {"x": x, "count": np.zeros(41, np.int32)}))
    assert rows_in_scratch(lowered(counted_where_they_lie, {"x": x, "count": np.zeros(41, np.int32)}))


@pytest.mark.parametrize("lane", ["m", "n"])
def test_any_axis_may_lie_across_the_lanes(lane: str) -> None:
    random = np.random.default_rng(0)
    arguments = {"g": random.standard_normal((37, 21)).astype(np.float32),
                 "token": random.integers(0, 5, 37).astype(np.int32), "out": np.ones((5, 21), np.float32)}
    ops = lowered(rows_at_tokens, arguments, Schedule(lane=lane))
    assert ("store_lane0" in ops) == (lane == "m")


@kernel
def sums_of_segments(x: Tensor[f32, N], segment: Tensor[i32, N], total: Tensor[f32, V]):
    for n in tiles(N):
        total[segment[n]] += x[n]


def shared(k: Any, **typical: int) -> Function:
    """The tile IR of a kernel whose extents are typically so many."""
    function: Function = k.tile_ir()
    specialization = Specialization({name: DimClass(extent) for name, extent in typical.items()}, {})
    share_sums(function, frozenset(), lambda value: hint(value, specialization)[0])
    return function


@pytest.mark.parametrize("k", [histogram, sums_of_segments], ids=lambda k: k.name)
@pytest.mark.parametrize("extent", [0, 1, 100, 300, 1000, 20011])
def test_copies_have_all_values_between_them(k: Any, extent: int) -> None:
    """Also where there are too few for copies, or none."""
    random = np.random.default_rng(extent)
    function = shared(k, N=20000, V=21)
    assert [op.name for op in function.body.ops if op.blocks] == ["each", "tiles", "tiles"]
    places, total = random.integers(0, 21, extent).astype(np.int32), random.integers(0, 9, 21)
    arguments: dict[str, Any] = {"x": places, "count": total.astype(np.int32)} if k is histogram else {
        "x": random.integers(0, 9, extent).astype(np.float32), "segment": places, "total": total.astype(np.float32)}
    expected = {name: array.copy() for name, array in arguments.items()}
    interpret(k.tile_ir(), expected)
    interpret(function, arguments, 7)
    for name, array in expected.items():
        np.testing.assert_array_equal(arguments[name], array)   # numbers that are exact in f32 as well


def test_copies_are_for_long_loops_that_add_to_few_elements() -> None:
    @kernel
    def bits(x: Tensor[i32, N], y: Tensor[i32, V]):
        for n in tiles(N):
            y[x[n]] |= 1

    @kernel
    def narrow(x: Tensor[i32, N], y: Tensor[u8, V]):
        for n in tiles(N):
            y[x[n]] += 1

    for k, n, v, copied in ((histogram, 20000, 64, True), (histogram, 1000, 64, False), (histogram, 20000, 9000, False),
                            (bits, 20000, 64, False), (narrow, 20000, 64, False)):
        assert any(op.name == "buffer" for op in shared(k, N=n, V=v).body.ops) == copied


def test_copies_are_the_same_for_any_number_of_workers() -> None:
    random = np.random.default_rng(0)
    x, segment = random.standard_normal(3000).astype(np.float32), random.integers(0, 40, 3000).astype(np.int32)
    results = []
    for workers in (1, 2, 3):
        function, total = sums_of_segments.tile_ir(), np.zeros(40, np.float32)
        canonicalize(function)
        arguments = {"x": x, "segment": segment, "total": total}
        lane = run_lane(function, arguments, workers=workers, specialization=specialize(
            function, arguments, {"N": 20000, "V": 64}))
        assert any(op.name == "barrier" for op in lane.walk())
        results.append(total)
    expected = np.zeros(40)
    np.add.at(expected, segment, x)
    np.testing.assert_allclose(results[0], expected, rtol=1e-4, atol=1e-4)
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


THREADS = Facts(lanes=32, vector_registers=24, wide_lanes=32, indexed_addresses=False, software_prefetch=False,
                transposes_by_scatter=True, many_workers=True,
                joins=frozenset(("add", dtype) for dtype in (i32, f32)))


@pytest.mark.parametrize("k", [rows_at_tokens, histogram, windows], ids=lambda k: k.name)
def test_threads_join_in_one_step_and_need_not_meet_for_that(k: Any) -> None:
    random = np.random.default_rng(0)
    arguments: dict[str, Any] = {
        "rows_at_tokens": {"g": random.standard_normal((40, 70)).astype(np.float32),
                           "token": random.integers(0, 5, 40).astype(np.int32), "out": np.ones((5, 70), np.float32)},
        "histogram": {"x": random.integers(0, 9, 300).astype(np.int32), "count": np.zeros(9, np.int32)},
        "windows": {"x": random.standard_normal((2, 5, 40)).astype(np.float32),
                    "image": np.zeros((2, 44), np.float32)}}[k.name]
    function, expected = k.tile_ir(), {name: array.copy() for name, array in arguments.items()}
    canonicalize(function)
    interpret(k.tile_ir(), expected)
    lane = run_lane(function, arguments, facts=THREADS, workers=3, passes=synchronise)
    for name, array in expected.items():
        np.testing.assert_allclose(arguments[name], array, rtol=1e-5, atol=1e-5)
    ops = [op.name for op in lane.walk()]
    assert "join" in ops and not set(ops) & {"store", "scatter", "s_store"}
    assert unsynchronised(lane) == []
    inner = [op for op in lane.walk() if op.name == "loop" and any(o.name == "join" for o in op.blocks[0].ops)]
    assert k is not rows_at_tokens or not any(o.name == "sync_lanes" for op in inner for o in op.blocks[0].ops)


@settings(max_examples=examples(60))
@given(sums(), st.integers(0, 40), st.integers(1, 40), st.integers(1, 30), st.integers(0, 99), st.integers(1, 3),
       st.sampled_from([8, 16]), st.sampled_from([None, 1, 40, 5000]))
def test_random_sums(drawn: tuple[str, str], rows: int, columns: int, spread: int, seed: int, workers: int, lanes: int,
                     hint: int | None) -> None:
    source, dtype = drawn
    k = kernel_of(source)
    arguments = arguments_of_sums(dtype, rows, columns, spread, seed)
    expected = expect(k.tile_ir(), arguments, runs=2, tile_sizes=(None, 3))
    function = k.tile_ir()
    canonicalize(function)
    specialization = specialize(function, arguments, None if hint is None else dict.fromkeys("MNVW", hint))
    run_lane(function, arguments, facts=Facts(lanes=lanes), specialization=specialization, workers=workers)
    assert_expected(arguments, expected, source)
