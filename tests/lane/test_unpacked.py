"""Weights that are unpacked once for all rows that meet them (sapper/lane/unpacked.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper import Tensor, dims, each, f32, i8, i32, kernel, span, tiles, u8, whole, zeros
from sapper.ir.nodes import Function, Op
from sapper.lane.lower import lower
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Facts, Schedule
from tests.strategies import examples

from .run_lane import run_lane, specialize
from .test_packed import MACHINES, hostile
from .test_packed_blocks import arguments_of, expected_of, low, make_blocks, moved_up, ops_in, six_bits

B, E, M, P = dims("B E M P")
LANES, SLOT = 16, 4
MANY = {"M": 512, "P": 4, "B": 4}


@kernel
def super_blocks(
    q: Tensor[u8, E, P, B, 2, 3, 2, LANES, SLOT], first: Tensor[i32, E], last: Tensor[i32, E],
    x: Tensor[i8, B, M, 2, 3, 2, SLOT], y: Tensor[f32, M, P, LANES],
):
    """Loops in a loop, one after the other; rows in groups, each of which has weights of its own."""
    for e in each(E):
        for p, m in tiles(P, span(first[e], last[e])):
            l = whole(LANES)
            acc = zeros(m, p, l, dtype=f32)
            for b in each(B):
                w, s = whole(2), whole(SLOT)
                total = zeros(m, p, l, dtype=i32)
                for c in range(3):
                    one = q[e, p, b, 0, c, w, l, s]
                    total += (one & 15 | (one >> 6) << 4) @ x[b, m, 0, c, w, s] * 3
                for c in range(3):
                    other = q[e, p, b, 1, c, w, l, s]
                    total += ((other & 7) << 3 | (other << 5) & 192) @ x[b, m, 1, c, w, s]
                acc += total.to(f32)
            y[m, p, l] = acc


def grouped_arguments(e: int, p: int, b: int, m: int, seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    cuts = np.sort(random.integers(0, m + 1, e - 1))
    return {
        "q": hostile(random, u8, e, p, b, 2, 3, 2, LANES, SLOT), "first": np.append(0, cuts).astype(np.int32),
        "last": np.append(cuts, m).astype(np.int32), "x": hostile(random, i8, b, m, 2, 3, 2, SLOT),
        "y": np.full((m, p, LANES), np.nan, np.float32),
    }


def grouped_expected(arguments: dict[str, Any]) -> np.ndarray:
    q, x = arguments["q"], arguments["x"].astype(np.int64)
    unpacked = np.stack([3 * six_bits(q[:, :, :, 0]).astype(np.int64), moved_up(q[:, :, :, 1])], axis=3)
    expected = np.empty(arguments["y"].shape)
    for weights, first, last in zip(unpacked, arguments["first"], arguments["last"], strict=True):
        expected[first:last] = np.einsum("pbecwls,bmecws->mpl", weights, x[:, first:last])
    return expected


def lowered(weights: Any, facts: Facts, hints: dict[str, int], schedule: Schedule | None = None) -> Function:
    function = reduce_loops(make_blocks(weights, u8).tile_ir())
    return lower(function, schedule or Schedule(), facts, specialize(function, arguments_of(u8, 4, 4, 512), hints))


def unpacking_loops(lane: Function) -> list[Op]:
    return [op for op in ops_in(lane, "loop") if op.attributes["label"] == "unpack"]


def test_rows_in_registers_meet_what_was_unpacked() -> None:
    """In the loop over full tiles of rows, the first one, no bits are moved, or cut off."""
    lane = lowered(six_bits, MACHINES[16], MANY)
    (unpacking,) = unpacking_loops(lane)
    rows = next(op for op in ops_in(lane, "loop") if op.attributes["label"] == "m")
    assert ops_in(unpacking, "shr") and ops_in(unpacking, "or") and not ops_in(unpacking, "dot4_u8i8")
    assert ops_in(rows, "dot4_u8i8") and not any(ops_in(rows, name) for name in ("shl", "shr", "and", "or"))


@pytest.mark.parametrize(("weights", "facts", "hints"), [
    (low, {}, {}), (six_bits, {"fma_per_cycle": 2.0}, {}), (six_bits, {"dots": frozenset()}, {}),
    (six_bits, {}, {"M": 8}),
], ids=["little to unpack", "two dot products in a cycle", "no dot products", "few rows"])
def test_others_unpack_as_they_read(weights: Any, facts: dict[str, Any], hints: dict[str, int]) -> None:
    assert not unpacking_loops(lowered(weights, replace(MACHINES[16], **facts), MANY | hints))


def test_where_unpacking_takes_pipes_of_dot_products_two_in_a_cycle_meet_what_was_unpacked() -> None:
    facts = replace(MACHINES[16], fma_per_cycle=2.0, shared_pipes=True)
    assert unpacking_loops(lowered(six_bits, facts, MANY)) and not unpacking_loops(lowered(low, facts, MANY))


@pytest.mark.parametrize(("lane", "unpacked"), [("l", True), ("w", False)])
def test_a_schedule_that_has_other_lanes_unpacks_as_it_reads(lane: str, unpacked: bool) -> None:
    assert bool(unpacking_loops(lowered(six_bits, MACHINES[16], MANY, Schedule(lane=lane)))) == unpacked


@pytest.mark.parametrize(("weights", "rows", "worth"), [(low, 512, True), (low, 8, False), (six_bits, 8, True)])
def test_parts_of_dot_products_leave_less_time_for_unpacking(weights: Any, rows: int, worth: bool) -> None:
    """Where no instruction multiplies bytes; with whatever bits the weights were stored, these are known."""
    facts = replace(MACHINES[8], fma_per_cycle=2.0, split_dots=frozenset({"dot4_u8i8"}))
    lane = lowered(weights, facts, MANY | {"M": rows})
    assert bool(unpacking_loops(lane)) == worth
    stored = {op.attributes["bits"] for op in ops_in(lane, "load") if "bits" in op.attributes}
    assert stored == ({{low: 0x0F0F0F0F, six_bits: 0x3F3F3F3F}[weights]} if worth else set())


def make_two_scales(second: int) -> Any:
    """second: the half of x that the upper bits meet; the lower ones meet half 0."""
    @kernel(name="two_scales")
    def two_scales(q: Tensor[u8, P, B, 4, LANES, SLOT], x: Tensor[i8, B, M, 2, 4, SLOT],
                   scale: Tensor[u8, P, B, 2, LANES], y: Tensor[f32, M, P, LANES]):
        for p, m in tiles(P, M):
            l = whole(LANES)
            acc = zeros(m, p, l, dtype=f32)
            for b in each(B):
                w, s = whole(4), whole(SLOT)
                packed, left = q[p, b, w, l, s], x[b, m, 0, w, s]
                right = left if second == 0 else x[b, m, second, w, s]
                low, high = (packed & 15) @ left, (packed >> 4) @ right
                acc += (low * scale[p, b, 0, l].to(i32) + high * scale[p, b, 1, l].to(i32)).to(f32)
            y[m, p, l] = acc

    return two_scales


def most_at_once(loop: Op) -> int:
    """The most sums of dot products of a loop that are begun and not ended."""
    dots = [op for op in loop.walk() if op.name == "dot4_u8i8"]
    begun, most = 0, 0
    ends = {op.result for op in dots} - {op.operands[0] for op in dots}
    for op in dots:
        begun += op.operands[0].op not in dots
        most = max(most, begun)
        begun -= op.result in ends
    return most


@pytest.mark.parametrize(("registers", "second", "at_once"), [(16, 1, 8), (32, 1, 16), (16, 0, 16)])
@pytest.mark.parametrize("rows", [3, 64])
def test_sums_that_registers_do_not_hold_are_made_in_turn(registers: int, second: int, at_once: int, rows: int) -> None:
    """Four rows by two vectors, each with two sums, where these read nothing in common that would be held."""
    random = np.random.default_rng(rows)
    arguments = {"q": hostile(random, u8, 2, 3, 4, LANES, SLOT), "x": hostile(random, i8, 3, rows, 2, 4, SLOT),
                 "scale": hostile(random, u8, 2, 3, 2, LANES), "y": np.full((rows, 2, LANES), np.nan, np.float32)}
    facts = replace(MACHINES[8], vector_registers=registers, fma_per_cycle=2.0, split_dots=frozenset({"dot4_u8i8"}))
    function = reduce_loops(make_two_scales(second).tile_ir())
    lane = run_lane(function, arguments, Schedule(tile={"m": 4}), facts, specialize(function, arguments, {"M": 64}))
    rows_loop = next(op for op in ops_in(lane, "loop") if op.attributes["label"] == "m")
    assert most_at_once(rows_loop) == at_once
    x, q, scale = (arguments[name].astype(np.int64) for name in ("x", "q", "scale"))
    expected = sum(np.einsum("pbwls,bmws,pbl->mpl", part, x[:, :, h * second], scale[:, :, h])
                   for h, part in enumerate((q & 15, q >> 4)))
    np.testing.assert_array_equal(arguments["y"], expected)


@settings(max_examples=examples(30))
@given(p=st.integers(0, 3), b=st.integers(0, 3), m=st.integers(0, 30), words=st.integers(1, 4),
       lanes=st.sampled_from([4, 8, 16]), halves=st.integers(1, 2), tile=st.sampled_from([{}, {"p": 2, "m": 3}]),
       workers=st.integers(1, 2), seed=st.integers(0, 99))
def test_unpacked_blocks_are_exact(p, b, m, words, lanes, halves, tile, workers, seed) -> None:
    function = reduce_loops(make_blocks(moved_up, u8, words=words, halves=halves).tile_ir())
    arguments = arguments_of(u8, p, b, m, words, halves, seed)
    lane = run_lane(function, arguments, Schedule(tile=tile), MACHINES[lanes],
                    specialize(function, arguments, MANY), workers)
    assert bool(unpacking_loops(lane)) == (lanes > 4)
    np.testing.assert_array_equal(arguments["y"], expected_of(arguments, moved_up))


@settings(max_examples=examples(20))
@given(e=st.integers(1, 3), p=st.integers(1, 2), b=st.integers(0, 2), m=st.integers(0, 40),
       lanes=st.sampled_from([8, 16]), workers=st.integers(1, 2), seed=st.integers(0, 99))
def test_groups_of_rows_are_exact(e, p, b, m, lanes, workers, seed) -> None:
    function = reduce_loops(super_blocks.tile_ir())
    arguments = grouped_arguments(e, p, b, m, seed)
    specialization = specialize(function, arguments, MANY | {"E": 3})
    lane = run_lane(function, arguments, facts=MACHINES[lanes], specialization=specialization, workers=workers)
    assert unpacking_loops(lane)
    np.testing.assert_array_equal(arguments["y"], grouped_expected(arguments))


def make_one_word(along: int) -> Any:
    """along: bytes that each word of weights meets, in a contraction over one axis."""
    @kernel(name="one_word")
    def one_word(w: Tensor[u8, B, LANES, along], x: Tensor[i8, M, B, along], y: Tensor[i32, M, LANES]):
        for m in tiles(M):
            l, s = whole(LANES), whole(along)
            acc = zeros(m, l, dtype=i32)
            for b in each(B):
                acc += ((w[b, l, s] >> 3) ^ 5) @ x[m, b, s]
            y[m, l] = acc

    return one_word


@pytest.mark.parametrize("apart", [1, 2])
@pytest.mark.parametrize("along", [2, 4, 7])
@pytest.mark.parametrize("split", [frozenset(), frozenset({"dot4_u8i8"})], ids=["at once", "in parts"])
def test_elements_that_fill_no_slot_are_unpacked_where_they_are_read(split, along: int, apart: int) -> None:
    """Many rows meet slots that were unpacked, where there are any."""
    random = np.random.default_rng(along)
    x = hostile(random, i8, 33, 3, along * apart)[..., ::apart]
    arguments = {"w": hostile(random, u8, 3, LANES, along), "x": x, "y": np.full((len(x), LANES), -1, np.int32)}
    facts = replace(MACHINES[8], fma_per_cycle=2.0, split_dots=split)
    function = reduce_loops(make_one_word(along).tile_ir())
    specialization = specialize(function, arguments, {"M": 512, "B": 3})
    lane = run_lane(function, arguments, facts=facts, specialization=specialization)
    weights = (arguments["w"] >> 3 ^ 5).astype(np.int64)
    np.testing.assert_array_equal(arguments["y"], np.einsum("bls,mbs->ml", weights, x.astype(np.int64)))
    assert bool(ops_in(lane, "dot4_u8i8")) == (along >= SLOT)
