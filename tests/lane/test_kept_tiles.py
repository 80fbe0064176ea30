"""Tiles of slots that stay for later runs of their loop (sapper/lane/kept_tiles.py)."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import Tensor, bf16, each, f32, i32, max, maximum, min, span, tiles, where, whole, zeros
from sapper.ir.nodes import Function
from sapper.ir.types import i64
from sapper.lane.lower import lower
from sapper.tile.interpret import interpret
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Facts, Schedule, TileUnit
from tests.lane.run_lane import run_lane, specialize
from tests.lane.test_tile_registers import DOT_NAMES, PRODUCTS_OF_TILES
from tests.strategies import examples

WIDTH, BLOCK = 32, 32
HINTS = {"M": 512, "N": 512, "G": 1}

H, G, M, N = sp.dims("H G M N")


@sp.kernel
def shared(
    a: Tensor[bf16, H, G, M, 2], b: Tensor[bf16, N, 2], c: Tensor[bf16, H, N, WIDTH], position: i32,
    out: Tensor[f32, H, G, M, WIDTH],
):
    """Two products, of which the first goes into the second; block by block of m the loop over n ends further on."""
    for h, g in each(H, G):
        for block in each((M + BLOCK - 1) // BLOCK):
            first = block * BLOCK
            stop = min(first + BLOCK, M)
            for m in tiles(span(first, stop)):
                k, e = whole(2), whole(WIDTH)
                acc = zeros(m, e, dtype=f32)
                highest = zeros(m, dtype=f32)
                for n in tiles(span(0, position + stop)):
                    score = a[h, g, m, k] @ b[n, k]
                    higher = maximum(highest, max(score, over=n))
                    one = where(higher >= highest, 1.0, 0.0)     # what is only added to would be one long sum
                    acc = acc * one + score.to(bf16) @ c[h, n, e]
                    highest = higher
                out[h, g, m, e] = acc


@sp.kernel
def overwrites(
    a: Tensor[bf16, G, M, 2], b: Tensor[bf16, N, 2], c: Tensor[bf16, N, WIDTH], position: i32,
    out: Tensor[f32, G, M, WIDTH],
):
    """The same, but what is multiplied is changed between one run of the loop and the next."""
    for g in range(G):
        for m in tiles(M):
            k, e = whole(2), whole(WIDTH)
            acc = zeros(m, e, dtype=f32)
            highest = zeros(m, dtype=f32)
            for n in tiles(span(0, position + M)):
                score = a[g, m, k] @ b[n, k]
                higher = maximum(highest, max(score, over=n))
                one = where(higher >= highest, 1.0, 0.0)
                acc = acc * one + score.to(bf16) @ c[n, e]
                highest = higher
            out[g, m, e] = acc
        for n, e in tiles(N, WIDTH):
            c[n, e] = (c[n, e].to(f32) + 1.0).to(bf16)


def facts_for(room: int) -> Facts:
    """So large a second cache that tiles of so many rows of c stay."""
    return Facts(dots=frozenset({"dot2_bf16"}), l2_bytes=room * WIDTH * 2 // 4)


def tiles_for(room: int) -> Facts:
    """The same of tile registers."""
    return replace(facts_for(room), lanes=16, l2_bytes=room * WIDTH * 2 // 2, dots=DOT_NAMES,
                   tiles=TileUnit(16, PRODUCTS_OF_TILES, 64))


ROOMY, ON_TILES = facts_for(1024), tiles_for(1024)


def arguments_of(h: int, g: int, m: int, position: int, seed: int = 0) -> dict[str, np.ndarray | int]:
    """Of `shared`: small integers, of which all sums are exact."""
    random = np.random.default_rng(seed)

    def numbers(*extents: int) -> np.ndarray:
        return random.integers(-1, 2, extents).astype(ml_dtypes.bfloat16)

    n = position + m
    return {"a": numbers(h, g, m, 2), "b": numbers(n, 2), "c": numbers(h, n, WIDTH), "position": position,
            "out": np.full((h, g, m, WIDTH), np.nan, np.float32)}


def of_one(arguments: dict[str, np.ndarray | int]) -> dict[str, np.ndarray | int]:
    """The same of `overwrites`, of the first of h."""
    return {name: value if isinstance(value, int) or name == "b" else value[0] for name, value in arguments.items()}


def copied(arguments: dict[str, np.ndarray | int]) -> dict[str, np.ndarray | int]:
    return {name: value if isinstance(value, int) else value.copy() for name, value in arguments.items()}


def lowered(facts: Facts, **hints: int) -> Function:
    function = reduce_loops(shared.tile_ir())
    return lower(function, Schedule(), facts, specialize(function, arguments_of(1, 2, 64, 64), {**HINTS, **hints}))


def stays(function: Function) -> bool:
    """Whether a word says what is there of the slots of c."""
    assert "interleave" in {op.name for op in function.walk()}
    return any(op.name == "s_load" and op.attributes["dtype"] is i64 for op in function.walk())


def test_tiles_stay_where_a_loop_around_comes_to_them_again() -> None:
    assert stays(lowered(ROOMY))
    assert stays(lowered(ROOMY, M=BLOCK, G=4))
    assert not stays(lowered(ROOMY, M=BLOCK))


def test_tiles_of_tile_registers_stay_as_they_turned_them() -> None:
    made = lowered(ON_TILES)
    assert stays(made)
    turns = [op for op in made.walk() if op.name == "loop" and op.attributes["label"] == "turn"]
    branches = [op for op in made.walk() if op.name == "if"]
    assert turns and all(any(turn in list(branch.walk()) for branch in branches) for turn in turns)
    assert not stays(lowered(replace(ON_TILES, l2_bytes=8 * WIDTH)))


def test_a_second_cache_without_room_for_a_tile_keeps_none() -> None:
    assert stays(lowered(facts_for(64)))
    assert not stays(lowered(facts_for(32)))


@settings(max_examples=examples(10), deadline=None)
@example(64, 1, 2, 1, 1, tiles_for(1024), 0).via("a tile that ends sooner than it did in the run before")
@given(m=st.integers(1, 70), h=st.integers(1, 2), g=st.integers(1, 2), position=st.integers(0, 140),
       workers=st.integers(1, 3), facts=st.sampled_from([make(room) for make in (facts_for, tiles_for)
                                                         for room in (64, 128, 1024)]), seed=st.integers(0, 99))
def test_any_room(m: int, h: int, g: int, position: int, workers: int, facts: Facts, seed: int) -> None:
    function = reduce_loops(shared.tile_ir())
    arguments = arguments_of(h, g, m, position, seed)
    expected = copied(arguments)
    interpret(function, expected)
    run_lane(function, arguments, facts=facts, specialization=specialize(function, arguments, HINTS), workers=workers)
    np.testing.assert_array_equal(arguments["out"], expected["out"])


@pytest.mark.parametrize("facts", [ROOMY, ON_TILES], ids=["vectors", "tiles"])
def test_the_neighbour_in_a_last_slot_counts_nothing(facts: Facts) -> None:
    """The first of g leaves all tiles; the first block of the second one ends at 33, in a slot, or a tile, with what
    follows: infinite, and not for this block."""
    function = reduce_loops(shared.tile_ir())
    arguments = arguments_of(1, 2, 64, 1)
    expected = copied(arguments)
    interpret(function, expected)
    arguments["c"][:, 33:] = np.inf  # type: ignore[index]
    run_lane(function, arguments, facts=facts, specialization=specialize(function, arguments, HINTS))
    np.testing.assert_array_equal(arguments["out"][:, :, :32], expected["out"][:, :, :32])  # type: ignore[index]


def test_what_the_kernel_stores_does_not_stay() -> None:
    function = reduce_loops(overwrites.tile_ir())
    arguments = of_one(arguments_of(1, 2, 40, 40))
    expected = copied(arguments)
    interpret(function, expected)
    specialization = specialize(function, arguments, HINTS)
    assert not stays(lower(function, Schedule(), ROOMY, specialization))
    run_lane(function, arguments, facts=ROOMY, specialization=specialization)
    np.testing.assert_array_equal(arguments["out"], expected["out"])
