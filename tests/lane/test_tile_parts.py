"""Products of wider floats on tile registers, as products of parts in bf16, under the lane interpreter."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper import Tensor, bf16, dims, each, f32, i8, i32, kernel, span, tiles, zeros
from sapper.codegen.pipeline import facts_of, panels_of_kernel
from sapper.ir.types import f16
from sapper.lane.exact_parts import PARTS, products
from sapper.runtime.packed import pack_array
from sapper.targets.x86_64.target import TARGETS
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Schedule
from tests.strategies import examples

from .run_lane import run_lane, specialize
from .test_packed import ORDERS, make_product
from .test_tile_registers import MACHINES, tiles_in

M, N, K, B, E, J = dims("M N K B E J")
TYPES = ((f32, bf16), (f32, f32), (bf16, f32), (f16, f16), (f16, f32))
PRODUCTS = {(order, types): make_product(order, *types, f32) for order in ORDERS for types in TYPES}
NUMPY = {f32: np.float32, f16: np.float16, bf16: ml_dtypes.bfloat16}


def arguments_of(order, types, m, n, k, seed=0):
    random = np.random.default_rng(seed)
    a = random.standard_normal((m, k) if order[0] == "n" else (k, m)).astype(NUMPY[types[0]])
    b = random.standard_normal((k, n) if order[1] == "n" else (n, k)).astype(NUMPY[types[1]])
    return {"a": a, "b": b, "c": np.full((m, n), np.nan, np.float32)}


def assert_as_exact_as_floats(order, arguments):
    """Sums of k products in f32, in any order, are off by at most k roundings of the sum of their sizes; what is left
    out of products is worth one more, and so is each part that was rounded."""
    a, b = (arguments[name].astype(np.float64) for name in "ab")
    a, b = a if order[0] == "n" else a.T, b if order[1] == "n" else b.T
    bound = (a.shape[1] + 4) * 2.0 ** -24 * (np.abs(a) @ np.abs(b))
    assert (np.abs(arguments["c"] - a @ b) <= bound).all()


@settings(max_examples=examples(40))
@given(m=st.integers(0, 70), n=st.integers(0, 70), k=st.integers(0, 80), order=st.sampled_from(ORDERS),
       types=st.sampled_from(TYPES), lanes=st.sampled_from([4, 8, 16]), seed=st.integers(0, 99),
       hint=st.sampled_from([None, 40]))
def test_any_product_is_as_exact_as_one_of_floats(m, n, k, order, types, lanes, seed, hint) -> None:
    function = reduce_loops(PRODUCTS[order, types].tile_ir())
    arguments = arguments_of(order, types, m, n, k, seed)
    hints = None if hint is None else dict.fromkeys("MNK", hint)
    made = run_lane(function, arguments, Schedule(matrix=True), MACHINES[lanes],
                    specialize(function, arguments, hints), workers=1 + seed % 2)
    assert tiles_in(made)
    assert_as_exact_as_floats(order, arguments)


@pytest.mark.parametrize("types", TYPES, ids=lambda t: f"{t[0].name}-{t[1].name}")
@pytest.mark.parametrize(("m", "k"), [(40, 64), (33, 96), (5, 33)])
def test_packed_panels_serve_too(types, m, k) -> None:
    kernel, target = PRODUCTS["nt", types], TARGETS["sapphirerapids"]
    arguments = arguments_of("nt", types, m, 70, k)
    packed = {"b": pack_array(arguments["b"], types[1], panels_of_kernel(kernel, "b", target))}
    even = types[1] is not bf16 or k % 16 == 0
    made = run_lane(reduce_loops(kernel.tile_ir()), arguments, Schedule(matrix=even or None), facts_of(target),
                    packed=packed)
    assert bool(tiles_in(made)) == even     # known to be pairs
    assert_as_exact_as_floats("nt", arguments)


@pytest.mark.parametrize("types", [(f32, bf16), (f32, f32)], ids=lambda t: f"{t[0].name}-{t[1].name}")
@pytest.mark.parametrize("order", ["nt", "tn"])
def test_no_bit_of_a_float_is_lost(types, order) -> None:
    """Times one, all floats that are no denormals, nor parts of which are, come back as they were."""
    random = np.random.default_rng(1)
    exponents = random.integers(-100, 127, (64, 16))
    a = (np.ldexp(random.uniform(1, 2, (64, 16)), exponents) * random.choice([-1, 1], (64, 16))).astype(np.float32)
    if types[1] is bf16:        # else the parts of the largest ones add up to more on the way
        a[:, 0] = np.finfo(np.float32).max
    arguments = {"a": a if order[0] == "n" else a.T.copy(), "b": np.eye(16, dtype=NUMPY[types[1]]),
                 "c": np.zeros((64, 16), np.float32)}
    assert tiles_in(run_lane(reduce_loops(PRODUCTS[order, types].tile_ir()), arguments, Schedule(matrix=True),
                             MACHINES[16]))
    np.testing.assert_array_equal(arguments["c"], a)


@pytest.mark.parametrize("types", [(f32, bf16), (f32, f32)], ids=lambda t: f"{t[0].name}-{t[1].name}")
def test_infinities_and_nans_are_what_they_are_in_floats(types) -> None:
    arguments = arguments_of("nt", types, 40, 40, 40)
    for row, value in enumerate((np.inf, -np.inf, np.nan)):
        arguments["a"][row, 7 + row] = value
    arguments["b"][6, 7] = 0            # by an infinity: no number
    arguments["b"][8, 7] = 1            # whose second part is none
    if types[1] is f32:
        arguments["b"][5, 3] = arguments["b"][9, 7] = -np.inf
        arguments["a"][4, 3] = 1
    with np.errstate(invalid="ignore"):
        expected = arguments["a"].astype(np.float32) @ arguments["b"].astype(np.float32).T
        assert tiles_in(run_lane(reduce_loops(PRODUCTS["nt", types].tile_ir()), arguments, Schedule(matrix=True),
                                 MACHINES[16]))
    odd = ~np.isfinite(expected)
    assert odd.sum() >= 3 * 39
    np.testing.assert_array_equal(arguments["c"][odd], expected[odd])
    assert np.isfinite(arguments["c"][~odd]).all()


def test_products_of_parts() -> None:
    assert products(f32, bf16) == ((2, 0), (1, 0), (0, 0)) and products(bf16, f32) == ((0, 2), (0, 1), (0, 0))
    six = products(f32, f32)
    assert six is not None and sorted(six) == [(i, j) for i in range(3) for j in range(3 - i)]
    assert all(before[0] == after[0] or before[1] == after[1] for before, after in pairwise(six))
    assert sorted(products(f16, f16)) == [(i, j) for i in range(2) for j in range(2)]       # type: ignore[arg-type]
    assert products(f32, i8) is None and PARTS[f32] == 3


@pytest.mark.parametrize(("types", "rows"), [((f32, bf16), 17), ((f32, f32), 64), ((f16, f16), 64)],
                         ids=lambda t: t[0].name + "-" + t[1].name if isinstance(t, tuple) else "")
def test_the_model_takes_parts_where_rows_are_many(types, rows) -> None:
    function = reduce_loops(PRODUCTS["nt", types].tile_ir())
    for m in (rows - 1, rows):
        arguments = arguments_of("nt", types, m, 128, 64)
        assert bool(tiles_in(run_lane(function, arguments, facts=MACHINES[16]))) == (m == rows)
        assert_as_exact_as_floats("nt", arguments)


@pytest.mark.parametrize(("left", "right", "result", "k"), [(bf16, bf16, f32, 96), (i8, i8, i32, 112)],
                         ids=["bf16", "i8"])
def test_a_left_operand_that_the_cache_does_not_hold_goes_in_tiles(left, right, result, k) -> None:
    """As what is left of its rows, and of the depth: zeros."""
    function = reduce_loops(make_product("nt", left, right, result).tile_ir())
    random = np.random.default_rng(3)
    numpy = {bf16: ml_dtypes.bfloat16, i8: np.int8}
    arguments = {"a": random.integers(-8, 9, (77, k)).astype(numpy[left]),
                 "b": random.integers(-8, 9, (70, k)).astype(numpy[right]),
                 "c": np.zeros((77, 70), np.float32 if result is f32 else np.int32)}
    small = replace(MACHINES[16], l2_bytes=1 << 13)
    lanes = [run_lane(function, arguments, Schedule(matrix=True), small,
                      specialize(function, arguments, {"M": 77, "N": columns, "K": k})) for columns in (70, 512)]
    expected = arguments["a"].astype(np.float64) @ arguments["b"].astype(np.float64).T
    np.testing.assert_array_equal(arguments["c"], expected)
    alone = [sum(op.operands[1].op.attributes.get("value") == 64 for op in lane.walk() if op.name == "tile_load")
             for lane in lanes]         # bytes between rows of a tile by itself
    assert alone[1] > alone[0]


@kernel
def mixture(x: Tensor[f32, J, K], start: Tensor[i32, E], stop: Tensor[i32, E], w: Tensor[bf16, E, B, N, K],
            y: Tensor[f32, J, B, N]):
    for b in each(B):
        for e in each(E):
            for m, n in tiles(span(start[e], stop[e]), N):
                acc = zeros(m, n, dtype=f32)
                for k in tiles(K):
                    acc += x[m, k] @ w[e, b, n, k]
                y[m, b, n] = acc


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_rows_of_an_expert_are_copied_once_for_several_blocks(workers) -> None:
    random = np.random.default_rng(4)
    bounds = np.array([0, 3, 3, 40, 61], np.int32)
    arguments = {"x": random.standard_normal((64, 48)).astype(np.float32), "start": bounds[:-1].copy(),
                 "stop": bounds[1:].copy(), "w": random.standard_normal((4, 5, 32, 48)).astype(ml_dtypes.bfloat16),
                 "y": np.zeros((64, 5, 32), np.float32)}
    function = reduce_loops(mixture.tile_ir())
    made = run_lane(function, arguments, Schedule(matrix=True), MACHINES[16], workers=workers)
    assert tiles_in(made)
    for e in range(4):
        rows = slice(bounds[e], bounds[e + 1])
        x, w = arguments["x"][rows].astype(np.float64), arguments["w"][e].astype(np.float64)
        bound = 52 * 2.0 ** -24 * np.einsum("mk,bnk->mbn", np.abs(x), np.abs(w))
        assert (np.abs(arguments["y"][rows] - np.einsum("mk,bnk->mbn", x, w)) <= bound).all()
    assert not arguments["y"][61:].any()
    (copy,) = [op for op in made.walk() if op.name == "if" and any(inner.name == "unzip" for inner in op.walk())]
    loops = [op.attributes.get("label") for op in made.walk() if op.name == "loop" and copy in op.walk()]
    assert loops[:2] == ["each", "each"]        # experts, and blocks inside
