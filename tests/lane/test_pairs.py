"""Loads and stores of every second element: whole rows where both of a pair are there, else gathers and scatters."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sapper.ir.types import DType, bf16, f16, f32, f64, i8, i16, i32, i64, u8
from sapper.lang.builtins import maximum, tiles
from sapper.lang.dims import dims
from sapper.lang.kernel import kernel
from sapper.lang.tensor import Tensor
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Facts
from sapper.tile.semantics import numpy_dtype

from .run_lane import run_lane, specialize
from .test_late import aligned

FACTS = [Facts(lanes=16), Facts(lanes=8, vector_registers=16), Facts(lanes=4, vector_registers=8)]
M, R, N = dims("M R N")


@kernel
def turned(x: Tensor[f32, M, R, 2], c: Tensor[f32, R], y: Tensor[f32, M, R, 2]):
    for m, r in tiles(M, R):
        a = x[m, r, 0]
        b = x[m, r, 1]
        y[m, r, 0] = a * c[r] - b
        y[m, r, 1] = a + b * c[r]


@kernel
def turned_in_place(x: Tensor[f32, M, R, 2], c: Tensor[f32, R]):
    for m, r in tiles(M, R):
        a = x[m, r, 0]
        b = x[m, r, 1]
        x[m, r, 0] = a * c[r] - b
        x[m, r, 1] = a + b * c[r]


@kernel
def of_columns(x: Tensor[i32, M, N], y: Tensor[i32, M, N], z: Tensor[i32, M, R]):
    for m, r in tiles(M, R):
        odd = x[m, 2 * r + 1]
        even = x[m, 2 * r]
        y[m, 2 * r + 1] = even
        y[m, 2 * r] = odd
        z[m, r] = odd - even


@kernel
def one_of_two(x: Tensor[f32, M, R, 2], y: Tensor[f32, M, R]):
    for m, r in tiles(M, R):
        y[m, r] = x[m, r, 1] + 1.0


def names_of(function: Any, arguments: dict[str, Any], facts: Facts, streamed: frozenset[str] = frozenset()) -> Counter:
    known = replace(specialize(function, arguments), aligned=streamed)
    lane = run_lane(function, arguments, facts=facts, specialization=known)
    streams = sum(bool(op.attributes.get("streaming")) for op in lane.walk() if op.name == "store")
    return Counter(op.name for op in lane.walk()) + Counter(streams=streams)


@pytest.mark.parametrize("facts", FACTS, ids=lambda f: f"{f.lanes} lanes")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("pairs", [1, 16, 40, 64, 77])
def test_pairs_are_whole_rows(pairs: int, in_place: bool, facts: Facts) -> None:
    random = np.random.default_rng(pairs)
    x = aligned(random.standard_normal((5, pairs, 2)).astype(np.float32))
    c = aligned(random.standard_normal(pairs).astype(np.float32))
    expected = np.stack([x[..., 0] * c - x[..., 1], x[..., 0] + x[..., 1] * c], axis=-1)
    arguments = {"x": x, "c": c} | ({} if in_place else {"y": aligned(np.zeros_like(x))})
    function = reduce_loops((turned_in_place if in_place else turned).tile_ir())
    streamed = frozenset({"y"} if not in_place and pairs % 8 == 0 else ())
    names = names_of(function, arguments, facts, streamed)
    np.testing.assert_allclose(arguments["x" if in_place else "y"], expected, rtol=2e-6, atol=2e-6)
    if pairs == 1:
        return  # then the lanes may well lie along another axis
    assert names["unzip"] and names["zip"]
    # What fills no row, if anything can be left, is gathered, and stored as the rest is.
    assert (names["gather"] > 0) == (pairs % 16 != 0) and not names["scatter"]
    assert (names["streams"] > 0) == bool(streamed)


@pytest.mark.parametrize("facts", FACTS, ids=lambda f: f"{f.lanes} lanes")
def test_pairs_of_columns_in_any_order(facts: Facts) -> None:
    x = aligned(np.random.default_rng(1).integers(-9, 9, (3, 128), np.int32))
    arguments = {"x": x, "y": aligned(np.zeros_like(x)), "z": aligned(np.zeros((3, 64), np.int32))}
    names = names_of(reduce_loops(of_columns.tile_ir()), arguments, facts)
    assert (arguments["y"] == x.reshape(3, 64, 2)[..., ::-1].reshape(3, 128)).all()
    assert (arguments["z"] == x[:, 1::2] - x[:, ::2]).all()
    assert names["unzip"] and names["zip"] and not names["gather"] and not names["scatter"]


def greatest_of_two(dtype: DType) -> Any:
    @kernel
    def greatest(x: Tensor[dtype, M, N], y: Tensor[dtype, M, N]):
        for m, r in tiles(M, N // 2):
            y[m, 2 * r + 1] = x[m, 2 * r]
            y[m, 2 * r] = maximum(x[m, 2 * r], x[m, 2 * r + 1])

    return greatest


@pytest.mark.parametrize("facts", FACTS, ids=lambda f: f"{f.lanes} lanes")
@pytest.mark.parametrize("columns", [64, 70])
@pytest.mark.parametrize("dtype", [bf16, f16, i16, i8, u8, f64, i64], ids=lambda d: d.name)
def test_pairs_of_any_width(dtype: DType, columns: int, facts: Facts) -> None:
    x = aligned(np.random.default_rng(1).integers(0, 100, (3, columns)).astype(numpy_dtype(dtype)))
    arguments = {"x": x, "y": aligned(np.zeros_like(x))}
    streamed = frozenset({"y"} if columns % 64 == 0 else ())
    names = names_of(reduce_loops(greatest_of_two(dtype).tile_ir()), arguments, facts, streamed)
    assert (arguments["y"][:, ::2] == np.maximum(x[:, ::2], x[:, 1::2])).all()
    assert (arguments["y"][:, 1::2] == x[:, ::2]).all()
    assert names["unzip"] and names["zip"]


def test_one_of_a_pair_alone_is_gathered() -> None:
    """The elements between are not the kernel's to touch."""
    x = aligned(np.random.default_rng(1).standard_normal((3, 64, 2)).astype(np.float32))
    arguments = {"x": x, "y": aligned(np.zeros((3, 64), np.float32))}
    names = names_of(reduce_loops(one_of_two.tile_ir()), arguments, FACTS[0])
    np.testing.assert_array_equal(arguments["y"], x[..., 1] + 1)
    assert names["gather"] and not names["unzip"]
