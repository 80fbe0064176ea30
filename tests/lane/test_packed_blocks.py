"""Sums over short blocks in a loop: computed bytes in slots, several contracted axes, contractions that share a sum.

As weights in blocks have them (sapper/kernels/quantized.py): the lane interpreter on lane IR for 4, 8 and 16 lanes.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper import Tensor, dims, each, f32, i8, i32, kernel, tiles, u8, whole, zeros
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Facts
from tests.strategies import examples

from .run_lane import run_lane
from .test_packed import MACHINES, dots_in, hostile

P, B, M = dims("P B M")
LANES, SLOT = 16, 4


def make_blocks(weights, kind, words=2, start=True, halves=1):
    """y = the sum over b of scale[b] * (the products of a block); weights(q): what is multiplied of the bytes q."""

    @kernel(name="blocks")
    def blocks(q: Tensor[kind, P, B, words, LANES, SLOT], x: Tensor[i8, B, M, halves, words, SLOT],
               begin: Tensor[i32, B, M], scale: Tensor[f32, B], y: Tensor[f32, M, P, LANES]):
        for p, m in tiles(P, M):
            l = whole(LANES)
            acc = zeros(m, p, l, dtype=f32)
            for b in each(B):
                w, s = whole(words), whole(SLOT)
                products = weights(q[p, b, w, l, s]) @ x[b, m, 0, w, s]
                if halves == 2:
                    products += (q[p, b, w, l, s] >> 4) @ x[b, m, 1, w, s]
                if start:
                    products += begin[b, m]
                acc += products.to(f32) * scale[b]
            y[m, p, l] = acc

    return blocks


def arguments_of(kind, p, b, m, words=2, halves=1, seed=0):
    random = np.random.default_rng(seed)
    return {
        "q": hostile(random, kind, p, b, words, LANES, SLOT), "x": hostile(random, i8, b, m, halves, words, SLOT),
        "begin": random.integers(-1000, 1000, (b, m)).astype(np.int32),
        "scale": random.integers(-2, 3, b).astype(np.float32), "y": np.full((m, p, LANES), np.nan, np.float32),
    }


def expected_of(arguments, weights, start=True):
    """Exact: all sums are small integers."""
    q, x = arguments["q"], arguments["x"].astype(np.int64)
    parts = [weights(q).astype(np.int64)] + ([(q >> 4).astype(np.int64)] if x.shape[2] == 2 else [])
    total = sum(np.einsum("pbwls,bmws->mpbl", part, x[:, :, h]) for h, part in enumerate(parts))
    if start:
        total = total + arguments["begin"].T[:, None, :, None]
    return np.einsum("mpbl,b->mpl", total, arguments["scale"])


def ops_in(function, name):
    return [op for op in function.walk() if op.name == name]


def plain(q):
    return q


def low(q):
    return q & 15


def high(q):
    return q >> 4


def inverted(q):
    return ~q


def turned(q):
    return q ^ 128


def shifted(q):
    return (q << 3) | 5


def both(q):
    return (q >> 2 & 3) | (q & 48)


def halved(q):
    return q >> 1


def six_bits(q):
    return q & 15 | (q >> 6 & 3) << 4


def moved_up(q):
    return (q & 7) << 3 | (q << 5 & 192)


def moved_down(q):
    return (q & 240) >> 4 ^ q >> 3 & 17


OPERATIONS = {one.__name__: one for one in (
    plain, low, high, inverted, turned, shifted, both, six_bits, moved_up, moved_down)}


@pytest.mark.parametrize(("name", "ands"), [("low", 1), ("high", 1), ("six_bits", 2), ("moved_up", 2)])
def test_bits_are_cut_off_once_and_where_there_are_any(name: str, ands: int) -> None:
    function = reduce_loops(make_blocks(OPERATIONS[name], u8, words=1).tile_ir())
    arguments = arguments_of(u8, 1, 1, 1, words=1)
    assert len(ops_in(run_lane(function, arguments, facts=MACHINES[16]), "and")) == ands


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_on_bytes_are_done_in_slots(name: str, lanes: int) -> None:
    weights = OPERATIONS[name]
    function = reduce_loops(make_blocks(weights, u8).tile_ir())
    arguments = arguments_of(u8, 2, 3, 3)
    lane = run_lane(function, arguments, facts=MACHINES[lanes])
    assert dots_in(lane)
    np.testing.assert_array_equal(arguments["y"], expected_of(arguments, weights))


def test_a_shift_of_signed_bytes_is_not() -> None:
    """It would draw the sign of one byte into its neighbour's place: the bytes are widened."""
    function = reduce_loops(make_blocks(halved, i8).tile_ir())
    arguments = arguments_of(i8, 2, 2, 2)
    assert not dots_in(run_lane(function, arguments, facts=MACHINES[16]))
    np.testing.assert_array_equal(arguments["y"], expected_of(arguments, halved))


def test_signed_bytes_are_turned_after_what_is_done_to_them() -> None:
    function = reduce_loops(make_blocks(inverted, i8).tile_ir())
    arguments = arguments_of(i8, 2, 3, 2)
    assert dots_in(run_lane(function, arguments, facts=MACHINES[16]))
    np.testing.assert_array_equal(arguments["y"], expected_of(arguments, inverted))


def test_what_is_added_to_each_other_is_one_sum() -> None:
    """Both halves and the start: no addition of integers is left, and the sum of a row begins with what is added."""
    function = reduce_loops(make_blocks(low, u8, halves=2).tile_ir())
    arguments = arguments_of(u8, 1, 3, 1, halves=2)
    lane = run_lane(function, arguments, facts=MACHINES[16])
    assert dots_in(lane)
    assert not [op for op in ops_in(lane, "add") if op.results[0].type.dtype is i32]
    np.testing.assert_array_equal(arguments["y"], expected_of(arguments, low))


def test_a_part_that_something_else_reads_is_kept_apart() -> None:
    @kernel
    def apart(q: Tensor[u8, P, B, 2, LANES, SLOT], x: Tensor[i8, B, 2, SLOT], y: Tensor[f32, P, LANES]):
        for p in tiles(P):
            l = whole(LANES)
            acc = zeros(p, l, dtype=f32)
            for b in each(B):
                w, s = whole(2), whole(SLOT)
                low = (q[p, b, w, l, s] & 15) @ x[b, w, s]
                acc += (low + (q[p, b, w, l, s] >> 4) @ x[b, w, s]).to(f32) + low.to(f32)
            y[p, l] = acc

    given = arguments_of(u8, 2, 3, 1)
    arguments = {"q": given["q"], "x": np.ascontiguousarray(given["x"][:, 0, 0]), "y": given["y"][0]}
    q, x = arguments["q"].astype(np.int64), arguments["x"].astype(np.int64)
    assert dots_in(run_lane(reduce_loops(apart.tile_ir()), arguments, facts=MACHINES[16]))
    wanted = 2 * np.einsum("pbwls,bws->pl", q & 15, x) + np.einsum("pbwls,bws->pl", q >> 4, x)
    np.testing.assert_array_equal(arguments["y"], wanted)


def test_sums_stay_in_registers_and_weights_are_asked_for() -> None:
    """The loop over blocks loads and stores no sum, and asks for the line of each vector of weights that it reads."""
    function = reduce_loops(make_blocks(plain, u8, start=False).tile_ir())
    arguments = arguments_of(u8, 1, 2, 1)
    lane = run_lane(function, arguments, facts=MACHINES[16])
    (loop,) = [op for op in ops_in(lane, "loop") if op.attributes["label"] == "each"]
    assert not ops_in(loop, "store")
    assert len(ops_in(loop, "prefetch")) == len(ops_in(loop, "load")) == 2


@settings(max_examples=examples(40))
@given(p=st.integers(0, 5), b=st.integers(0, 4), m=st.integers(0, 30), words=st.integers(1, 8),
       names=st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=3), kind=st.sampled_from([u8, i8]),
       start=st.booleans(), halves=st.integers(1, 2), lanes=st.sampled_from([4, 8, 16]), dots=st.booleans(),
       seed=st.integers(0, 99))
def test_any_block_is_exact(p, b, m, words, names, kind, start, halves, lanes, dots, seed) -> None:
    if kind is i8:
        names, halves = [name for name in names if name in ("low", "inverted")], 1

    def weights(q):
        for name in names:
            q = OPERATIONS[name](q)
        return q

    first, second, third = (*(OPERATIONS[name] for name in names), *[plain] * 3)[:3]

    def together(q):
        return third(second(first(q)))

    function = reduce_loops(make_blocks(together, kind, words, start, halves).tile_ir())
    arguments = arguments_of(kind, p, b, m, words, halves, seed)
    facts = MACHINES[lanes] if dots else Facts(lanes=lanes, vector_registers=2 * lanes)
    run_lane(function, arguments, facts=facts, workers=1 + seed % 2)
    np.testing.assert_array_equal(arguments["y"], expected_of(arguments, weights, start))
