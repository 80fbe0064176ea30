"""Operands of packed contractions kept as slots (sapper/lane/slots.py), and squares (sapper/lane/squares.py)."""

from __future__ import annotations

from builtins import max as builtins_max
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import Tensor, bf16, f32, i32, max, maximum, sum, tiles, where, whole, zeros
from sapper.kernels import library
from sapper.lane.lower import lower
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import DimClass, Facts, Schedule, TileUnit
from tests.lane.run_lane import run_lane, specialize
from tests.strategies import examples

LIBRARY = {entry.name: entry for entry in library()}
DOTS = Facts(dots=frozenset({"dot2_bf16"}))
NARROW = Facts(lanes=8, vector_registers=16, dots=frozenset({"dot2_bf16"}))
TILES = Facts(dots=DOTS.dots, tiles=TileUnit(16, frozenset({("bf16", "bf16")}), 64))

M, N, K, E = sp.dims("M N K E")


@sp.kernel
def chained(a: Tensor[bf16, M, K], b: Tensor[bf16, N, K], c: Tensor[bf16, N, E], out: Tensor[bf16, M, E]):
    """Two products, of which the first goes into the second tile by tile of n, with m across the lanes."""
    for m in tiles(M):
        k, e = whole(K), whole(E)
        left = (a[m, k].to(f32) * 0.5).to(bf16)
        acc = zeros(m, e, dtype=f32)
        total = zeros(m, dtype=f32)
        highest = zeros(m, dtype=f32)
        for n in tiles(N):
            score = left @ b[n, k]
            higher = maximum(highest, max(score, over=n))
            one = where(higher >= highest, 1.0, 0.0)      # what is only added to would be one long sum, not a loop
            total = total * one + sum(score, over=n)
            acc = acc * one + score.to(bf16) @ c[n, e]
            highest = higher
        out[m, e] = (acc + total).to(bf16)


def arguments_of(m: int, n: int, k: int, e: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Small integers, of which all sums are exact, and the results too after one rounding."""
    random = np.random.default_rng(seed)

    def numbers(*extents: int) -> np.ndarray:
        return (2 * random.integers(-1, 2, extents)).astype(ml_dtypes.bfloat16)

    return {"a": numbers(m, k), "b": numbers(n, k), "c": numbers(n, e),
            "out": np.full((m, e), np.nan, ml_dtypes.bfloat16)}


def expected_of(arguments: dict[str, np.ndarray]) -> np.ndarray:
    a, b, c = (arguments[name].astype(np.float64) for name in "abc")
    score = 0.5 * a @ b.T
    rounded = score.astype(ml_dtypes.bfloat16).astype(np.float64)
    return (rounded @ c + score.sum(axis=1, keepdims=True)).astype(ml_dtypes.bfloat16)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("facts", [DOTS, NARROW], ids=["16 lanes", "8 lanes"])
@pytest.mark.parametrize("extents", [(33, 70, 64, 32), (16, 1, 1, 1), (40, 65, 7, 19), (3, 5, 2, 3)])
def test_products_of_what_was_computed(facts: Facts, extents: tuple[int, int, int, int]) -> None:
    function = reduce_loops(chained.tile_ir())
    arguments = arguments_of(*extents)
    specialization = specialize(function, arguments, {"M": 512, "N": 512})
    lane = lower(function, Schedule(), facts, specialization)
    names = [op.name for op in lane.walk()]
    assert "dot2_bf16" in names and "pack_bf16" in names
    run_lane(function, arguments, facts=facts, specialization=specialization)
    np.testing.assert_array_equal(arguments["out"], expected_of(arguments))


@settings(max_examples=examples(15))
@given(m=st.integers(1, 70), n=st.integers(0, 140), k=st.integers(1, 40), e=st.integers(1, 40),
       seed=st.integers(0, 99), tile=st.sampled_from([0, 1, 5, 32, 128]), rows=st.integers(1, 9))
@example(m=16, n=37, k=2, e=18, seed=75, tile=5, rows=6)
def test_any_extents_and_tiles(m: int, n: int, k: int, e: int, seed: int, tile: int, rows: int) -> None:
    function = reduce_loops(chained.tile_ir())
    arguments = arguments_of(m, n, k, e, seed)
    schedule = Schedule(tile={"n": tile} if tile else {}, registers={"n": rows, "e": 1 + rows % 3})
    run_lane(function, arguments, schedule=schedule, facts=(DOTS, NARROW)[seed % 2],
             specialization=specialize(function, arguments, {"M": 512, "N": 512}))
    np.testing.assert_array_equal(arguments["out"], expected_of(arguments))


def test_what_lies_past_the_cache_counts_nothing() -> None:
    """With an odd number of positions the last slot is half full; the next position holds NaN."""
    for name in ("attention_rounded_f32", "attention_rounded_bf16"):
        entry = LIBRARY[name]
        function = reduce_loops(entry.kernel.tile_ir())
        for extents in ({"T": 18, "H": 1, "G": 2, "D": 16, "position": 51},
                        {"T": 1, "H": 2, "G": 1, "D": 3, "position": 2}):
            arguments = entry.make_arguments(np.random.default_rng(4), extents)
            specialization = specialize(function, arguments, {"T": 512, "D": 64, "P": 512})
            lane = lower(function, Schedule(), DOTS, specialization)
            assert "dot2_bf16" in {op.name for op in lane.walk()}
            run_lane(function, arguments, facts=DOTS, specialization=specialization)
            assert entry.compare(arguments, entry.reference(arguments)) is None


def test_without_the_instruction_elements_are_widened() -> None:
    entry = LIBRARY["attention_rounded_bf16"]
    function = reduce_loops(entry.kernel.tile_ir())
    arguments = entry.make_arguments(np.random.default_rng(4), {"T": 40, "H": 1, "G": 1, "D": 20, "position": 5})
    specialization = specialize(function, arguments, {"T": 512, "D": 64, "P": 512})
    lane = lower(function, Schedule(), Facts(), specialization)
    assert not {"dot2_bf16", "pack_bf16", "interleave"} & {op.name for op in lane.walk()}
    run_lane(function, arguments, facts=Facts(), specialization=specialization)
    assert entry.compare(arguments, entry.reference(arguments)) is None


@pytest.mark.parametrize("facts", [Facts(), Facts(lanes=8, vector_registers=16)], ids=["16 lanes", "8 lanes"])
@pytest.mark.parametrize("name", ["attention_f32", "attention_bf16"])
def test_queries_and_results_go_through_squares(name: str, facts: Facts) -> None:
    entry = LIBRARY[name]
    function = reduce_loops(entry.kernel.tile_ir())
    arguments = entry.make_arguments(np.random.default_rng(4), {"T": 70, "H": 1, "G": 2, "D": 32, "position": 9})
    specialization = specialize(function, arguments, {"T": 512, "P": 512})
    static = lower(function, Schedule(), facts, specialize(function, arguments, {"T": 512, "P": 512, "D": 32}))
    assert "exchange" in {op.name for op in static.walk()}
    run_lane(function, arguments, facts=facts, specialization=specialization)
    assert entry.compare(arguments, entry.reference(arguments)) is None


def test_few_operands_of_products_are_held_at_once() -> None:
    """8 rows by 2 vectors of sums: the vectors and one element of the rows at a time, not 8 of these."""
    function = reduce_loops(chained.tile_ir())
    specialization = specialize(function, arguments_of(64, 128, 64, 64), {"M": 512, "N": 512})
    lane = lower(function, Schedule(), DOTS, specialization)
    loops = [block for op in lane.walk() for block in op.blocks if not any(inner.blocks for inner in block.ops)]
    fullest = [[op for op in block.ops if op.name == "dot2_bf16"] for block in loops]
    most = builtins_max(len(dots) for dots in fullest)
    assert most >= 16
    for dots in fullest:
        if len(dots) < most:
            continue
        uses = [set(op.operands[1:]) for op in dots]
        for number in range(len(uses)):
            begun = set().union(*uses[:number + 1])
            assert len(begun & set().union(*uses[number:])) <= 3


@sp.kernel
def plain(a: Tensor[bf16, M, K], b: Tensor[bf16, N, K], c: Tensor[bf16, N, E], out: Tensor[f32, M, E]):
    """The same with no maximum that runs along: the weights of all n are there at once."""
    for m in tiles(M):
        k, e = whole(K), whole(E)
        acc = zeros(m, e, dtype=f32)
        for n in tiles(N):
            acc += maximum(a[m, k] @ b[n, k], 0.0).to(bf16) @ c[n, e]
        out[m, e] = acc


@settings(max_examples=examples(24))
@given(extents=st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(1, 20), st.integers(1, 36)),
       hints=st.tuples(*[st.sampled_from([8, 16, 128, 8192])] * 4), facts=st.sampled_from([DOTS, NARROW, TILES]))
def test_weights_that_are_there_at_once(extents: tuple[int, ...], hints: tuple[int, ...], facts: Facts) -> None:
    """Whatever lies across the lanes as they are made, and with a last n that fills no slot where they meet c."""
    given = arguments_of(*extents)
    a, b, c = (given[name].astype(np.float32) for name in "abc")
    given["out"] = np.full(given["out"].shape, np.nan, np.float32)
    function = reduce_loops(plain.tile_ir())
    run_lane(function, given, None, facts, specialize(function, given, dict(zip("MNKE", hints, strict=True))))
    np.testing.assert_array_equal(given["out"], np.maximum(a @ b.T, 0) @ c)


@pytest.mark.parametrize("n", [5, 16, 33])
def test_weights_that_are_kept_meet_tile_registers(n: int) -> None:
    given = arguments_of(9, n, 32, 8)
    a, b, c = (given[name].astype(np.float32) for name in "abc")
    given["out"] = np.full((9, 8), np.nan, np.float32)
    function = reduce_loops(plain.tile_ir())
    specialization = specialize(function, given, {"M": 512, "N": 512, "K": 8, "E": 16})
    lane = lower(reduce_loops(plain.tile_ir()), Schedule(), TILES, specialization)
    assert {"tile_load", "pack_bf16"} <= {op.name for op in lane.walk()}
    run_lane(function, given, None, TILES, specialization)
    np.testing.assert_array_equal(given["out"], np.maximum(a @ b.T, 0) @ c)


@pytest.mark.parametrize(("n", "divisor"), [(8, 8), (9, 1)])
def test_weights_of_short_rows(n: int, divisor: int) -> None:
    """Few of each row: the depth of the first product goes across the lanes, and rows are summed together."""
    given = arguments_of(20, n, 8, 8)
    a, b, c = (given[name].astype(np.float32) for name in "abc")
    given["out"] = np.full((20, 8), np.nan, np.float32)
    function = reduce_loops(plain.tile_ir())
    found = specialize(function, given, {"M": 8192, "N": 16, "K": 16, "E": 16})
    specialization = replace(found, dims={**found.dims, "N": DimClass(16, divisor)})
    lane = lower(reduce_loops(plain.tile_ir()), Schedule(), DOTS, specialization)
    assert {"dot2_bf16", "pack_bf16"} <= {op.name for op in lane.walk()}
    run_lane(function, given, None, DOTS, specialization)
    np.testing.assert_array_equal(given["out"], np.maximum(a @ b.T, 0) @ c)


@sp.kernel
def gathered(a: Tensor[bf16, M, K], b: Tensor[bf16, N, K], place: Tensor[i32, N], c: Tensor[bf16, N, E],
             out: Tensor[f32, M, E]):
    for m in tiles(M):
        k, e = whole(K), whole(E)
        acc = zeros(m, e, dtype=f32)
        for n in tiles(N):
            acc += maximum(a[m, k] @ b[n, k], 0.0).to(bf16) @ c[place[n], e]
        out[m, e] = acc


def test_products_with_gathered_rows_take_no_slots() -> None:
    given = arguments_of(20, 9, 4, 5)
    a, b, c = (given[name].astype(np.float32) for name in "abc")
    given |= {"place": np.arange(9, dtype=np.int32)[::-1].copy(), "out": np.zeros((20, 5), np.float32)}
    function = reduce_loops(gathered.tile_ir())
    run_lane(function, given, None, DOTS, specialize(function, given, {"M": 2048, "N": 8, "K": 8, "E": 8}))
    np.testing.assert_array_equal(given["out"], np.maximum(a @ b.T, 0) @ c[::-1])
