"""Packed dot products at their own station: contractions of narrow operands as lane IR, under the lane interpreter."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper import Tensor, bf16, dims, each, exp, f32, i8, i32, kernel, max, maximum, sum, tiles, u8, whole, zeros
from sapper.codegen.pipeline import facts_of, panels_of_kernel
from sapper.lane.packed import DOTS
from sapper.lane.rows import LoweringError
from sapper.runtime.packed import pack_array
from sapper.targets.x86_64.target import TARGETS
from sapper.tile.canonical import canonicalize
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.requests import Requests
from sapper.tile.schedule import Facts, Schedule
from tests.strategies import examples
from tests.strategies.schedule import as_far_as_followed

from .run_lane import run_lane, specialize

M, N, K, B = dims("M N K B")
DOT_NAMES = frozenset(dot.name for dot in DOTS)
MACHINES = {lanes: Facts(lanes=lanes, vector_registers=2 * lanes, dots=DOT_NAMES, l2_bytes=512 * lanes,
                         interleaves=True)
            for lanes in (4, 8, 16)}
ORDERS = ("nn", "nt", "tn", "tt")
PAIRS = ((i8, i8, i32), (u8, i8, i32), (i8, u8, i32), (u8, u8, i32), (bf16, bf16, f32))
NUMPY = {i8: np.int8, u8: np.uint8, i32: np.int32, f32: np.float32, bf16: ml_dtypes.bfloat16}


def make_product(order, left, right, result, specialise=""):
    """c = a @ b; order: n for [M, K] and [K, N], t for the transposed, one letter each. specialise: as a kernel's."""
    a_dims, b_dims = (M, K) if order[0] == "n" else (K, M), (K, N) if order[1] == "n" else (N, K)
    a_turned, b_turned = order[0] == "t", order[1] == "t"

    @kernel(name=f"product_{order}", specialise=specialise)
    def product(a: Tensor[left, *a_dims], b: Tensor[right, *b_dims], c: Tensor[result, M, N]):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=result)
            for k in tiles(K):
                acc += (a[k, m] if a_turned else a[m, k]) @ (b[n, k] if b_turned else b[k, n])
            c[m, n] = acc

    return product


PRODUCTS = {(order, types): make_product(order, *types) for order in ORDERS for types in PAIRS}


def hostile(random, dtype, *extents):
    """Mostly the extremes, of which sums of pairs do not fit 16 bits; of bf16 small integers, whose sums are exact."""
    if dtype is bf16:
        return random.integers(-8, 9, extents).astype(ml_dtypes.bfloat16)
    info = np.iinfo(NUMPY[dtype])
    picks = random.choice([info.min, info.min + 1, info.max, 0, info.max // 2], extents)
    return np.where(random.random(extents) < 0.3, random.integers(info.min, info.max + 1, extents), picks).astype(
        NUMPY[dtype])


def arguments_of(order, types, m, n, k, seed=0):
    random = np.random.default_rng(seed)
    a = hostile(random, types[0], *((m, k) if order[0] == "n" else (k, m)))
    b = hostile(random, types[1], *((k, n) if order[1] == "n" else (n, k)))
    return {"a": a, "b": b, "c": np.full((m, n), -1, NUMPY[types[2]])}


def expected_of(order, arguments):
    wide = np.float64 if arguments["c"].dtype == np.float32 else np.int64
    a, b = arguments["a"].astype(wide), arguments["b"].astype(wide)
    return (a if order[0] == "n" else a.T) @ (b if order[1] == "n" else b.T)


def dots_in(lane):
    return len([op for op in lane.walk() if op.name in DOT_NAMES])


@settings(max_examples=examples(40))
@given(m=st.integers(0, 40), n=st.integers(0, 60), k=st.integers(0, 70), order=st.sampled_from(ORDERS),
       types=st.sampled_from(PAIRS), lanes=st.sampled_from([4, 8, 16]), lane=st.sampled_from([None, None, "n", "k"]),
       rows=st.integers(1, 8), stage=st.sampled_from([None, (), ("a", "b"), ("b",)]), seed=st.integers(0, 99),
       hint=st.sampled_from([None, 40]), dots=st.sampled_from([DOT_NAMES, DOT_NAMES - {"dot2_bf16"}]))
def test_any_schedule_is_exact(m, n, k, order, types, lanes, lane, rows, stage, seed, hint, dots) -> None:
    function = reduce_loops(PRODUCTS[order, types].tile_ir())
    arguments = arguments_of(order, types, m, n, k, seed)
    hints = None if hint is None else dict.fromkeys("MNK", hint)
    as_far_as_followed(Schedule(lane=lane, registers={"m": rows}, stage=stage), lambda schedule: run_lane(
        function, arguments, schedule, replace(MACHINES[lanes], dots=dots), specialize(function, arguments, hints),
        workers=1 + seed % 2))
    np.testing.assert_array_equal(arguments["c"], expected_of(order, arguments))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("types", PAIRS, ids=lambda t: f"{t[0].name}-{t[1].name}")
@pytest.mark.parametrize(("order", "m"), [("nn", 1), ("nt", 1), ("nn", 40), ("nt", 40), ("tn", 40)])
def test_the_model_packs(order, m, types) -> None:
    function = reduce_loops(PRODUCTS[order, types].tile_ir())
    arguments = arguments_of(order, types, m, 100, 67)
    lane = run_lane(function, arguments, facts=MACHINES[16])
    assert dots_in(lane)
    np.testing.assert_array_equal(arguments["c"], expected_of(order, arguments))
    plain = run_lane(function, arguments, facts=Facts(lanes=16, vector_registers=32))
    assert not dots_in(plain)


@pytest.mark.parametrize("order", ["nn", "nt"])
def test_elements_that_fill_no_slot_are_read_where_panels_are_asked_for_again(order) -> None:
    """They meet operands that lie in no panel, of which nothing can be asked for."""
    types = (i8, i8, i32)
    facts = replace(MACHINES[16], requests=Requests(reread_ahead_bytes=1024))
    function, arguments = reduce_loops(PRODUCTS[order, types].tile_ir()), arguments_of(order, types, 40, 100, 67)
    lane = run_lane(function, arguments, None, facts, specialize(function, arguments, dict.fromkeys("MNK", 8192)))
    assert any(op.name == "prefetch" for op in lane.walk())
    np.testing.assert_array_equal(arguments["c"], expected_of(order, arguments))


def test_slots_of_bf16_that_are_no_instruction_serve_where_memory_has_them() -> None:
    """Dot products along the depth read slots; operands that would have to be joined, or are copied, are widened."""
    facts = replace(MACHINES[8], dots=frozenset({"fma2_bf16"}))
    types = (bf16, bf16, f32)
    for order, m, slots in (("nt", 3, True), ("nt", 40, False), ("nn", 3, False), ("tn", 40, False)):
        arguments = arguments_of(order, types, m, 100, 67)
        lane = run_lane(reduce_loops(PRODUCTS[order, types].tile_ir()), arguments, facts=facts)
        assert bool(dots_in(lane)) == slots, (order, m)
        np.testing.assert_array_equal(arguments["c"], expected_of(order, arguments))


def test_only_where_types_and_memory_allow() -> None:
    """Mixed operands are widened; so are operands whose rows would have to be gathered."""
    mixed = make_product("nt", f32, bf16, f32)
    function = reduce_loops(mixed.tile_ir())
    arguments = {"a": np.ones((3, 40), np.float32), "b": np.ones((5, 40), ml_dtypes.bfloat16),
                 "c": np.zeros((3, 5), np.float32)}
    assert not dots_in(run_lane(function, arguments, facts=MACHINES[16]))
    assert (arguments["c"] == 40).all()

    types = (i8, i8, i32)
    function = reduce_loops(PRODUCTS["tn", types].tile_ir())
    arguments = arguments_of("tn", types, 3, 50, 40)
    assert not dots_in(run_lane(function, arguments, Schedule(lane="k"), MACHINES[16]))


@settings(max_examples=examples(25))
@given(m=st.integers(1, 19), n=st.integers(150, 260), k=st.integers(0, 150), static=st.booleans(),
       types=st.sampled_from(PAIRS[:4]), workers=st.integers(1, 3), seed=st.integers(0, 99))
def test_errors_of_few_rows_that_meet_many_are_summed_before(m, n, k, static, types, workers, seed) -> None:
    """Once, not in the loop over the many."""
    arguments = arguments_of("nt", types, m, n, k, seed)
    expected = expected_of("nt", arguments)
    function = reduce_loops(PRODUCTS["nt", types].tile_ir({"M": m, "N": n, "K": k} if static else None))
    lane = run_lane(function, arguments, Schedule(lane="k"), MACHINES[16], workers=workers)
    np.testing.assert_array_equal(arguments["c"], expected)
    inside, outside = [], [op for op in lane.walk() if op.name == "dot4_u8i8" and is_error(op)]
    for loop in lane.walk():
        if loop.name == "loop" and loop.attributes["label"] == "n":
            inside += [op for op in loop.walk() if op in outside]
    if m > 1 and k >= 64:
        assert bool(outside) == (types[0] is types[1]) and not inside


@pytest.mark.parametrize("types", [(i8, i8, i32), (u8, u8, i32)])
@pytest.mark.parametrize(("order", "m"), [("nt", 3), ("nn", 3), ("nt", 40)])
def test_nothing_is_turned_where_no_instruction_multiplies_bytes(types, order, m) -> None:
    """They are widened as they are: there is nothing to mend."""
    arguments = arguments_of(order, types, m, 100, 67)
    facts = replace(MACHINES[8], split_dots=MACHINES[8].dots)
    lane = run_lane(reduce_loops(PRODUCTS[order, types].tile_ir()), arguments, facts=facts)
    names = {op.name for op in lane.walk()}
    assert f"dot4_{types[0].name}{types[1].name}" in names and not names & {"xor", "dot4_u8i8"}
    np.testing.assert_array_equal(arguments["c"], expected_of(order, arguments))


def is_error(op):
    """Whether a dot product is one with the bits that turn, a constant."""
    return any(v.op is not None and v.op.name == "bitcast" for v in op.operands[1:])


@kernel
def two_products(x: Tensor[i8, M, K], y: Tensor[i8, N, K], z: Tensor[u8, N, K], out: Tensor[i32, M, N],
                 other: Tensor[i32, M, N]):
    """x has to be turned for y, and must not be for z."""
    for m, n in tiles(M, N):
        first = zeros(m, n, dtype=i32)
        second = zeros(m, n, dtype=i32)
        for k in tiles(K):
            first += x[m, k] @ y[n, k]
            second += x[m, k] @ z[n, k]
        out[m, n] = first
        other[m, n] = second


@kernel
def gram(x: Tensor[i8, M, K], out: Tensor[i32, M, M]):
    for m, n in tiles(M, M):
        acc = zeros(m, n, dtype=i32)
        for k in tiles(K):
            acc += x[m, k] @ x[n, k]
        out[m, n] = acc


@kernel
def squares(x: Tensor[i8, B, M, K], start: Tensor[i32, B], out: Tensor[i32, B, M]):
    """Both operands are one value: it would have to be turned and not."""
    for b in each(B):
        for m in tiles(M):
            k = whole(K)
            row = x[b, m, k].to(i32)
            out[b, m] = sum(row * row, over=k) + start[b]


@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize("k", [3, 8, 77, 128])
def test_operands_that_are_shared(m, k) -> None:
    random = np.random.default_rng(m)
    x, y, z = hostile(random, i8, m, k), hostile(random, i8, 21, k), hostile(random, u8, 21, k)
    out, other = np.zeros((m, 21), np.int32), np.zeros((m, 21), np.int32)
    wide = x.astype(np.int32)
    run_lane(reduce_loops(two_products.tile_ir()), {"x": x, "y": y, "z": z, "out": out, "other": other},
             facts=MACHINES[16])
    np.testing.assert_array_equal(out, wide @ y.T.astype(np.int32))
    np.testing.assert_array_equal(other, wide @ z.T.astype(np.int32))

    result = np.zeros((m, m), np.int32)
    run_lane(reduce_loops(gram.tile_ir()), {"x": x, "out": result}, facts=MACHINES[16])
    np.testing.assert_array_equal(result, wide @ wide.T)

    batch, start = np.stack([x, x[::-1]]), np.array([5, -7], np.int32)
    result = np.zeros((2, m), np.int32)
    function = reduce_loops(squares.tile_ir())
    canonicalize(function)
    run_lane(function, {"x": batch, "start": start, "out": result}, facts=MACHINES[16])
    np.testing.assert_array_equal(result, (batch.astype(np.int32) ** 2).sum(axis=2) + start[:, None])


def test_sums_wrap() -> None:
    """131 200 products of 128 * 128 pass 2**31, and each of them by the turned operand is larger still."""
    k = 131200
    function = reduce_loops(PRODUCTS["nt", (i8, i8, i32)].tile_ir())
    arguments = {"a": np.full((1, k), -128, np.int8), "b": np.full((2, k), -128, np.int8),
                 "c": np.zeros((1, 2), np.int32)}
    assert dots_in(run_lane(function, arguments, facts=MACHINES[16]))
    assert (arguments["c"] == k * 128 * 128 - 2**32).all()


@kernel
def faded(a: Tensor[bf16, M, K], b: Tensor[bf16, K, N], c: Tensor[f32, M, N]):
    """As attention: what is summed so far fades with the largest element, where a piece has a larger one."""
    for m in tiles(M):
        n = whole(N)
        total, high = zeros(m, n, dtype=f32), zeros(m, dtype=f32)
        for k in tiles(K):
            higher = maximum(high, max(a[m, k].to(f32), over=k))
            total = total * exp(high - higher) + a[m, k] @ b[k, n]      # of ones: fades once, while it is 0
            high = higher
        c[m, n] = total


@pytest.mark.parametrize("rows", [1, 3])
def test_a_loop_takes_pieces_of_the_depth_of_panels(rows) -> None:
    target = TARGETS["zen4"]
    random = np.random.default_rng(0)
    b = random.integers(-8, 9, (300, 40)).astype(ml_dtypes.bfloat16)
    arguments = {"a": np.ones((rows, 300), ml_dtypes.bfloat16), "b": b, "c": np.zeros((rows, 40), np.float32)}
    packed = {"b": pack_array(b, bf16, panels_of_kernel(faded, "b", target))}
    assert packed["b"].panels.elements == 2
    for schedule in (None, Schedule(tile={"k": 16})):
        arguments["c"][...] = np.nan
        run_lane(reduce_loops(faded.tile_ir()), arguments, schedule, facts_of(target), packed=packed)
        np.testing.assert_array_equal(arguments["c"], np.tile(b.astype(np.float32).sum(axis=0), (rows, 1)))
    with pytest.raises(LoweringError, match="found b packed in 32 columns and 2 elements along dimension 0"):
        run_lane(reduce_loops(faded.tile_ir()), arguments, Schedule(tile={"k": 3}), facts_of(target), packed=packed)
