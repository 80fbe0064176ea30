"""Tile registers inside a loop that carries what it contracts (attention), at their own station."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sapper import Tensor, bf16, dims, f32, i32, kernel, span, tiles, where, whole, zeros
from sapper.codegen.pipeline import facts_of
from sapper.ir.types import TILE_F32
from sapper.kernels import find
from sapper.lane.lower import lower
from sapper.targets import target
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import DimClass, Schedule, Specialization
from tests.strategies import examples

from .run_lane import run_lane, specialize
from .test_tile_registers import MACHINES, tiles_in

T, P, D = dims("T P D")
TILES = ({"t": 64, "p": 32}, {"t": 128, "p": 64}, {"t": 96, "p": 128})
"""A single tile of the depth could stay in registers for all rows, but not beside four sums; eight sums; six."""


@kernel
def chained(q: Tensor[f32, T, D], keys: Tensor[bf16, P, D], values: Tensor[bf16, P, D], stop: i32, kept: f32,
            out: Tensor[f32, T, D]):
    """The two products of attention, with a mask between them and no softmax: sums of small integers are exact.

    kept: 1; as acc is not only added to, the loop carries it."""
    for t in tiles(T):
        d = whole(D)
        query = q[t, d].to(bf16)
        acc = zeros(t, d, dtype=f32)
        for p in tiles(span(0, stop)):
            score = where(p <= 2 * t, query @ keys[p, d], 0.0)
            acc = acc * kept + score.to(bf16) @ values[p, d]
        out[t, d] = acc


@kernel
def chained_floats(q: Tensor[f32, T, D], keys: Tensor[bf16, P, D], values: Tensor[bf16, P, D], stop: i32, kept: f32,
                   out: Tensor[f32, T, D]):
    """The same of floats, which tiles take as three parts."""
    for t in tiles(T):
        d = whole(D)
        acc = zeros(t, d, dtype=f32)
        for p in tiles(span(0, stop)):
            score = where(p <= 2 * t, q[t, d] @ keys[p, d], 0.0)
            acc = acc * kept + score @ values[p, d]
        out[t, d] = acc


def chained_arguments(t, p, d, stop, seed=0, most=1):
    """What lies beyond `stop` is no number. most: of queries."""
    random = np.random.default_rng(seed)
    keys, values = (random.integers(-1, 2, (p, d)).astype(ml_dtypes.bfloat16) for _ in range(2))
    keys[stop:] = values[stop:] = np.nan
    return {"q": random.integers(-most, most + 1, (t, d)).astype(np.float32), "keys": keys, "values": values,
            "stop": stop, "kept": 1.0, "out": np.zeros((t, d), np.float32)}


def chained_expected(arguments):
    stop = arguments["stop"]
    keys, values = (arguments[name][:stop].astype(np.float32) for name in ("keys", "values"))
    score = arguments["q"] @ keys.T
    kept = np.arange(stop)[None] <= 2 * np.arange(len(score))[:, None]
    return np.where(kept, score, 0) @ values


def run_chained(arguments, lanes, schedule=None, hint=512, of=chained):
    function = of.tile_ir({"D": arguments["q"].shape[1]})
    return run_lane(reduce_loops(function), arguments, schedule, MACHINES[lanes],
                    specialize(function, arguments, {"T": hint, "P": hint}))


@settings(max_examples=examples(15), deadline=None)
@example(t=2, p=2, beyond=0, lanes=4, deep=1, seed=0)
@given(t=st.integers(0, 40), p=st.integers(1, 140), beyond=st.integers(0, 20), lanes=st.sampled_from([4, 8, 16]),
       deep=st.integers(1, 3), seed=st.integers(0, 99))
def test_chained_products_are_exact(t, p, beyond, lanes, deep, seed) -> None:
    """Tiles of keys that the loop does not fill, and such as would reach beyond the tensor; every number of queries."""
    arguments = chained_arguments(t, p, 2 * lanes * deep, max(0, p - beyond), seed)
    assert tiles_in(run_chained(arguments, lanes))
    np.testing.assert_array_equal(arguments["out"], chained_expected(arguments))


@settings(max_examples=examples(15), deadline=None)
@given(t=st.integers(0, 40), p=st.integers(1, 140), beyond=st.integers(0, 20), lanes=st.sampled_from([4, 8, 16]),
       deep=st.integers(1, 3), seed=st.integers(0, 99))
def test_chained_products_of_floats_are_exact(t, p, beyond, lanes, deep, seed) -> None:
    """Queries of 11 bits, and scores of 17: some have two parts, and others three."""
    arguments = chained_arguments(t, p, 2 * lanes * deep, max(0, p - beyond), seed, 1 << 10)
    assert tiles_in(run_chained(arguments, lanes, of=chained_floats))
    np.testing.assert_array_equal(arguments["out"], chained_expected(arguments))


@pytest.mark.parametrize(("queries", "d", "loads", "products"), [
    (64, 64, 2 * (1 + 3 * 4), 2 * 3 * 4), (32, 64, 2 * (2 + 3 * 2), 2 * 3 * 4), (16, 128, 4 * (3 + 4), 4 * 3 * 4),
    (16, 64, 2, 2 * 3)])
def test_parts_meet_the_same_keys(queries, d, loads, products) -> None:
    """Two or four tiles deep: a tile of keys by four of queries, two by two, and four by one, whose parts then stay;
    where they are few, all of them do for all keys."""
    arguments = chained_arguments(queries, 128, d, 128, most=1 << 10)
    lane = run_chained(arguments, 16, Schedule(tile={"t": queries}), hint=queries, of=chained_floats)
    np.testing.assert_array_equal(arguments["out"], chained_expected(arguments))
    bodies = [[op.name for op in loop.blocks[0].ops] for loop in lane.walk() if loop.name == "loop"]
    scores = next(names for names in bodies if "tile_multiply" in names)
    assert (scores.count("tile_load"), scores.count("tile_multiply")) == (loads, products)


def test_a_tensor_met_along_both_axes_is_read_as_it_lies_and_turned() -> None:
    """As latent vectors are, which are keys and values: here of MLA's decoding in floats."""
    entry = find("latent_attention_decode_bf16")
    shape = {"H": 16, "C": 64, "S": 32, "position": 200}
    arguments = entry.make_arguments(np.random.default_rng(0), shape)
    expected = entry.reference(arguments)
    function = reduce_loops(entry.kernel.tile_ir({"C": 64, "S": 32}))
    lane = run_lane(function, arguments, None, MACHINES[16], specialize(function, arguments, {"H": 16, "P": 512}))
    assert tiles_in(lane) and entry.compare(arguments, expected) is None


def test_queries_that_are_left_meet_tiles_of_the_same_size() -> None:
    """What the tiles of keys leave lies where the first loop put it."""
    arguments = chained_arguments(27, 70, 24, 66)
    assert tiles_in(run_chained(arguments, 4))
    np.testing.assert_array_equal(arguments["out"], chained_expected(arguments))


@pytest.mark.parametrize(("d", "schedule"), [
    (40, None), (64, Schedule(matrix=False)), (64, Schedule(registers={"p": 4}))])
@pytest.mark.parametrize("of", [chained, chained_floats], ids=lambda k: k.name)
def test_vectors_take_what_tiles_do_not(d, schedule, of) -> None:
    """Floats as they are, not in parts."""
    arguments = chained_arguments(20, 50, d, 50)
    lane = run_chained(arguments, 16, schedule, of=of)
    assert not tiles_in(lane) and ("dot2_bf16" in [op.name for op in lane.walk()]) == (of is chained)
    np.testing.assert_array_equal(arguments["out"], chained_expected(arguments))


@pytest.mark.parametrize(("queries", "d", "loads", "products"), [
    (64, 64, 2 + 2 * 4, 2 * 4), (128, 64, 2 * (2 + 2 * 4), 2 * 2 * 4), (32, 128, 4 * (2 + 2), 4 * 4), (32, 64, 2, 4)])
def test_there_are_four_sums_at_once(queries, d, loads, products) -> None:
    """All that there is room for beside the operands: of a tile of keys and four of queries, or two of either; but of
    two where registers hold all of the queries. Keys are two or four tiles deep."""
    arguments = chained_arguments(queries, 128, d, 128)
    lane = run_chained(arguments, 16, Schedule(tile={"t": queries}), hint=queries)
    np.testing.assert_array_equal(arguments["out"], chained_expected(arguments))
    bodies = [[op.name for op in loop.blocks[0].ops] for loop in lane.walk() if loop.name == "loop"]
    scores = next(names for names in bodies if "tile_multiply" in names)
    assert scores.count("tile_multiply") == products
    assert scores.count("tile_load") == loads and "dot2_bf16" not in [op.name for op in lane.walk()]


def test_scores_of_which_none_is_masked_are_left_as_they_are() -> None:
    """What would mask them is in branches, whose other side has nothing."""
    function = find("attention_bf16_64").kernel.tile_ir()
    known = Specialization({dim: DimClass(2048, 1) for dim in "THGP"},
                           dict.fromkeys(("q", "keys", "values", "out"), "contiguous"))
    lane = lower(reduce_loops(function), Schedule(), facts_of(target("graniterapids")), known)
    branches = [op for op in lane.walk() if op.name == "if" and [o.name for o in op.blocks[0].ops] == ["yield"]]
    within = {op for branch in branches for op in branch.walk()}
    masks = [op for op in lane.walk() if op.name == "select"]
    assert branches and masks and set(masks) <= within and tiles_in(lane)


@pytest.mark.parametrize("tile", TILES)
def test_tiles_that_a_schedule_names_are_exact(tile) -> None:
    arguments = chained_arguments(160, 128, 64, 128)
    assert tiles_in(run_chained(arguments, 16, Schedule(tile=tile)))
    np.testing.assert_array_equal(arguments["out"], chained_expected(arguments))


def test_sums_that_are_added_to_what_a_loop_carries_begin_with_it() -> None:
    """Where that lies, which no other sums then take up the first cache beside."""
    lane = run_chained(chained_arguments(64, 128, 64, 128), 16, Schedule(tile={"t": 64}), hint=64)
    loops = [loop.blocks[0].ops for loop in lane.walk() if loop.name == "loop"]
    first, second = [ops for ops in loops if any(op.name == "tile_multiply" for op in ops)][:2]
    assert [op.name for op in first if op.name == "tile_zero"] and not [op for op in second if op.name == "tile_zero"]
    begun = [op for op in second if op.name == "tile_load" and op.result.type == TILE_F32]
    stored = [op for op in second if op.name == "tile_store"]
    assert len(begun) == len(stored) == 4
    assert [op.operands[0] for op in begun] == [op.operands[1] for op in stored]
