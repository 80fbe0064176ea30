"""Loops over weights in blocks that many rows walk part by part (sapper/lane/depth_parts.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sapper import Tensor, dims, each, f16, f32, i8, i32, kernel, tiles, u8, whole, zeros
from sapper.codegen.pipeline import facts_of
from sapper.ir.nodes import Function, Op
from sapper.lane import depth_parts
from sapper.lane.lower import lower
from sapper.targets.x86_64.target import TARGETS
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.requests import Requests
from sapper.tile.schedule import Facts, Schedule
from tests.strategies import examples

from .run_lane import run_lane, specialize
from .test_packed import MACHINES, hostile
from .test_packed_blocks import arguments_of, expected_of, low, make_blocks, ops_in, plain, six_bits
from .test_unpacked import grouped_arguments, grouped_expected, super_blocks, unpacking_loops

B, M, P = dims("B M P")
LANES, SLOT = 16, 4
MANY = {"M": 512, "P": 4, "B": 64}
PARTS = replace(MACHINES[16], fma_per_cycle=2.0, shared_pipes=True, requests=Requests(part_bytes=512, next_rows=True))
"""Two blocks of two words for two panels of 16 lanes are a part."""


@kernel
def gated(q: Tensor[u8, 2, P, B, 2, LANES, SLOT], x: Tensor[i8, B, M, 2, SLOT], kept: Tensor[f32, M, P, LANES],
          y: Tensor[f32, M, P, LANES]):
    """Two sums in one loop, and rows that are read behind it."""
    for p, m in tiles(P, M):
        l = whole(LANES)
        one = zeros(m, p, l, dtype=f32)
        other = zeros(m, p, l, dtype=f32)
        for b in each(B):
            w, s = whole(2), whole(SLOT)
            one += (q[0, p, b, w, l, s] @ x[b, m, w, s]).to(f32)
            other += ((q[1, p, b, w, l, s] & 15) @ x[b, m, w, s]).to(f32)
        y[m, p, l] = kept[m, p, l] + one * other


@kernel
def of_a_vector(q: Tensor[u8, P, B, 2, LANES, SLOT], x: Tensor[i8, B, 2, SLOT], y: Tensor[f32, P, LANES]):
    for p in tiles(P):
        l = whole(LANES)
        acc = zeros(p, l, dtype=f32)
        for b in each(B):
            w, s = whole(2), whole(SLOT)
            acc += (q[p, b, w, l, s] @ x[b, w, s]).to(f32)
        y[p, l] = acc


def loops(lane: Function, label: str) -> list[Op]:
    return [op for op in ops_in(lane, "loop") if op.attributes["label"] == label]


def lowered(weights: Any, facts: Facts = PARTS, hints: dict[str, int] | None = None) -> Function:
    function = reduce_loops(make_blocks(weights, u8).tile_ir())
    return lower(function, Schedule(), facts, specialize(function, arguments_of(u8, 4, 64, 512), MANY | (hints or {})))


def test_tiles_of_rows_are_inside_of_parts_and_parts_inside_of_panels() -> None:
    lane = lowered(low)
    rows, panels, part, tile = (loops(lane, label)[0] for label in ("rows", "p", "part", "m"))
    for outer, inner in ((rows, panels), (panels, part), (part, tile)):
        assert inner in list(outer.walk())


@pytest.mark.parametrize(("weights", "unpacked"), [(plain, False), (low, True), (six_bits, True)])
def test_what_is_unpacked_is_unpacked_for_a_part(weights: Any, unpacked: bool) -> None:
    lane = lowered(weights)
    part = loops(lane, "part")[0]
    assert bool(unpacking_loops(lane)) == unpacked == any(op in list(part.walk()) for op in unpacking_loops(lane))


def test_each_tile_asks_for_weights_of_the_next_part() -> None:
    """Both parts of a panel are 256 bytes, to be asked for by 512 rows, those of a tile going together."""
    lane = lowered(plain)
    (tile, *_), (walk, *_) = loops(lane, "m"), loops(lane, "each")
    inside = list(walk.walk())
    asked = [op for op in ops_in(lane, "prefetch") if op in list(tile.walk()) and op not in inside]
    assert {op.attributes["level"] for op in asked} == {2} and len(asked) == 2


def test_panels_that_a_vector_meets_walk_all_of_the_loop() -> None:
    """However many they are."""
    function = reduce_loops(of_a_vector.tile_ir())
    arguments = {"q": np.zeros((64, 9, 2, LANES, SLOT), np.uint8), "x": np.zeros((9, 2, SLOT), np.int8),
                 "y": np.zeros((64, LANES), np.float32)}
    lane = lower(function, Schedule(), PARTS, specialize(function, arguments, {"P": 512, "B": 64}))
    assert loops(lane, "each") and not loops(lane, "part")


@pytest.mark.parametrize(("facts", "hints"), [
    ({"requests": Requests()}, {}), ({}, {"M": 16}),
], ids=["not asked for", "few rows"])
def test_others_walk_all_of_the_loop(facts: dict[str, Any], hints: dict[str, int]) -> None:
    assert not loops(lowered(low, replace(PARTS, **facts), hints), "part")


@settings(max_examples=examples(10))
@given(p=st.integers(0, 3), b=st.integers(0, 9), m=st.integers(0, 150), weights=st.sampled_from([plain, low]),
       most=st.sampled_from([16, 128]), part=st.sampled_from([256, 512, 768]), workers=st.integers(1, 2),
       seed=st.integers(0, 99))
@example(p=1, b=16, m=7, weights=plain, most=16, part=768, workers=1, seed=0)     # four parts of four, not five
def test_parts_are_exact(p: int, b: int, m: int, weights: Any, most: int, part: int, workers: int, seed: int) -> None:
    function = reduce_loops(make_blocks(weights, u8).tile_ir())
    arguments = arguments_of(u8, p, b, m, seed=seed)
    with patch.object(depth_parts, "ROWS_OF_PARTS", most):
        facts = replace(PARTS, requests=PARTS.requests._replace(part_bytes=part))
        lane = run_lane(function, arguments, None, facts, specialize(function, arguments, MANY), workers)
    assert loops(lane, "part")
    np.testing.assert_array_equal(arguments["y"], expected_of(arguments, weights))


def test_two_sums_and_what_is_read_behind_them_are_exact() -> None:
    random = np.random.default_rng(3)
    p, b, m = 3, 5, 31
    arguments = {"q": hostile(random, u8, 2, p, b, 2, LANES, SLOT), "x": hostile(random, i8, b, m, 2, SLOT),
                 "kept": random.integers(-9, 9, (m, p, LANES)).astype(np.float32),
                 "y": np.full((m, p, LANES), np.nan, np.float32)}
    function = reduce_loops(gated.tile_ir())
    lane = run_lane(function, arguments, None, PARTS, specialize(function, arguments, MANY))
    q, x = arguments["q"].astype(np.int64), arguments["x"].astype(np.int64)
    one, other = (np.einsum("pbwls,bmws->mpl", part, x).astype(np.float32) for part in (q[0], q[1] & 15))
    np.testing.assert_array_equal(arguments["y"], arguments["kept"] + one * other)
    # What follows the loop reads memory where its last part ends, not in each.
    (ends, *_) = [op for op in ops_in(lane, "if") if any(inner.name == "store" for inner in op.blocks[1].ops)]
    assert any(op.name == "load" for op in ends.blocks[0].ops)
    assert not any(op.name == "load" for op in ends.blocks[1].ops)


@kernel
def scaled(q: Tensor[u8, P, B, 2, LANES, SLOT], wide: Tensor[f16, P, B, LANES], whole_scale: Tensor[u8, P, B, LANES],
           x: Tensor[i8, B, M, 2, SLOT], y: Tensor[f32, M, P, LANES]):
    """Scales that are widened, of two dtypes."""
    for p, m in tiles(P, M):
        l = whole(LANES)
        acc = zeros(m, p, l, dtype=f32)
        for b in each(B):
            w, s = whole(2), whole(SLOT)
            products = (q[p, b, w, l, s] @ x[b, m, w, s]) * whole_scale[p, b, l].to(i32)
            acc += products.to(f32) * wide[p, b, l].to(f32)
        y[m, p, l] = acc


@pytest.mark.parametrize("m", [3, 31])
def test_scales_are_widened_once_for_a_part(m: int) -> None:
    random = np.random.default_rng(m)
    p, b = 3, 5
    arguments = {"q": hostile(random, u8, p, b, 2, LANES, SLOT),
                 "wide": random.integers(-4, 5, (p, b, LANES)).astype(np.float16),
                 "whole_scale": random.integers(0, 256, (p, b, LANES)).astype(np.uint8),
                 "x": random.integers(-3, 4, (b, m, 2, SLOT)).astype(np.int8),
                 "y": np.full((m, p, LANES), np.nan, np.float32)}
    function = reduce_loops(scaled.tile_ir())
    lane = run_lane(function, arguments, None, PARTS, specialize(function, arguments, MANY))
    q, x = arguments["q"].astype(np.int64), arguments["x"].astype(np.int64)
    products = np.einsum("pbwls,bmws->mpbl", q, x) * arguments["whole_scale"].astype(np.int64)
    np.testing.assert_array_equal(arguments["y"], np.einsum("mpbl,pbl->mpl", products, arguments["wide"].astype(int)))
    narrow = [op.attributes["dtype"] for loop in loops(lane, "m") for op in loop.walk() if op.name == "load"]
    assert f16 not in narrow and u8 not in narrow


@pytest.mark.parametrize(("e", "p", "b", "m"), [(3, 2, 3, 40), (2, 1, 1, 7), (3, 2, 2, 0)])
def test_groups_of_rows_are_exact(e: int, p: int, b: int, m: int) -> None:
    """Some of them empty; super blocks are parts by themselves."""
    function = reduce_loops(super_blocks.tile_ir())
    arguments = grouped_arguments(e, p, b, m, seed=e)
    lane = run_lane(function, arguments, facts=PARTS, specialization=specialize(function, arguments, MANY | {"E": 3}))
    assert loops(lane, "part")
    np.testing.assert_array_equal(arguments["y"], grouped_expected(arguments))


@kernel
def strided(x: Tensor[f16, B, M], w: Tensor[f16, 3, B, P], y: Tensor[f32, 42, P]):
    for m, p in tiles(42, P):
        acc = zeros(m, p, dtype=f32)
        for s in range(3):
            b = whole(B)
            acc += x[b, 2 * m + 2 * s] @ w[s, b, p]
        y[m, p] = acc


def test_rows_that_were_brought_side_by_side_are_none_of_the_arguments() -> None:
    """The points of a window that strides are copied first; what has been made so may be walked part by part."""
    random = np.random.default_rng(0)
    x, w = random.integers(-3, 4, (5, 90)).astype(np.float16), random.integers(-3, 4, (3, 5, 42)).astype(np.float16)
    given = {"x": x, "w": w, "y": np.zeros((42, 42), np.float32)}
    function = reduce_loops(strided.tile_ir())
    run_lane(function, given, None, facts_of(TARGETS["cascadelake"]),
             specialize(function, given, {"M": 64, "B": 64, "P": 64}))
    points = np.stack([x[:, 2 * s:][:, :84:2] for s in range(3)]).astype(np.float32)
    np.testing.assert_array_equal(given["y"], np.einsum("sbm,sbp->mp", points, w.astype(np.float32)))
