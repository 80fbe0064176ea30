"""What all rows of a nest read is copied a few columns at a time (sapper/lane/nest_panels.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper import Tensor, dims, each, f32, i32, kernel, tiles, zeros
from sapper.ir.nodes import Function, Op
from sapper.lane.lower import lower
from sapper.lane.nest_panels import ROOM
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Facts, Schedule
from tests.strategies import examples

from .run_lane import run_lane, specialize

AVX512 = Facts(lanes=16, vector_registers=32)
AVX2 = Facts(lanes=8, vector_registers=16)
B, C, N, O, Q, T = dims("B C N O Q T")


@kernel
def window(x: Tensor[f32, B, T, C], w: Tensor[f32, 3, C, O], y: Tensor[f32, B, Q, O]):
    for b in each(B):
        for q, o in tiles(Q, O):
            acc = zeros(q, o, dtype=f32)
            for i in range(3):
                for c in tiles(C):
                    acc += x[b, q + i, c] @ w[i, c, o]
            y[b, q, o] = acc


@kernel
def own_weights(x: Tensor[f32, B, T, C], w: Tensor[f32, B, 3, C, O], y: Tensor[f32, B, Q, O]):
    """Each index of the nest has other ones."""
    for b in each(B):
        for q, o in tiles(Q, O):
            acc = zeros(q, o, dtype=f32)
            for i in range(3):
                for c in tiles(C):
                    acc += x[b, q + i, c] @ w[b, i, c, o]
            y[b, q, o] = acc


@kernel
def chosen_weights(x: Tensor[f32, B, T, C], which: i32, w: Tensor[f32, N, 3, C, O], y: Tensor[f32, B, Q, O]):
    """One of many."""
    for b in each(B):
        for q, o in tiles(Q, O):
            acc = zeros(q, o, dtype=f32)
            for i in range(3):
                for c in tiles(C):
                    acc += x[b, q + i, c] @ w[which, i, c, o]
            y[b, q, o] = acc


@kernel
def shifted(x: Tensor[f32, B, T, C], w: Tensor[f32, 3, C, N], y: Tensor[f32, B, Q, O]):
    """Some of the columns, from the second on."""
    for b in each(B):
        for q, o in tiles(Q, O):
            acc = zeros(q, o, dtype=f32)
            for i in range(3):
                for c in tiles(C):
                    acc += x[b, q + i, c] @ w[i, c, o + 1]
            y[b, q, o] = acc


@kernel
def changed(x: Tensor[f32, B, T, C], w: Tensor[f32, 3, C, O], y: Tensor[f32, B, Q, O]):
    """The weights are stored to, after all that reads them."""
    for b in each(B):
        for q, o in tiles(Q, O):
            acc = zeros(q, o, dtype=f32)
            for i in range(3):
                for c in tiles(C):
                    acc += x[b, q + i, c] @ w[i, c, o]
            y[b, q, o] = acc
    for c, o in tiles(C, O):
        w[0, c, o] = 0.0


def arguments_of(b: int, q: int, c: int, o: int, *, columns: int = 0, own: bool = False) -> dict[str, Any]:
    random = np.random.default_rng(b + q + c + o)
    weights = random.standard_normal(((b,) if own else ()) + (3, c, columns or o)).astype(np.float32)
    return {"x": random.standard_normal((b, q + 2, c)).astype(np.float32), "w": weights,
            "y": np.full((b, q, o), np.nan, np.float32)}


def expected_of(arguments: dict[str, Any]) -> Any:
    x, w = arguments["x"].astype(np.float64), arguments["w"].astype(np.float64)
    return sum(x[:, i:x.shape[1] - 2 + i] @ w[i] for i in range(3))


def close(found: Any, expected: Any, terms: int) -> None:
    """Sums of so many products of numbers below 5, each rounded."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=terms * 25 * 2.0**-24)


def copies_of(function: Function, tensor: str) -> list[Op]:
    """The loops that copy a tensor's columns."""
    return [op for op in function.walk() if op.name == "loop" and str(op.attributes["label"]).startswith(f"{tensor}.")]


def lowered(of: Any, arguments: dict[str, Any], facts: Facts = AVX2, schedule: Schedule | None = None) -> Function:
    function = reduce_loops(of.tile_ir())
    return lower(function, schedule or Schedule(), facts, specialize(function, arguments))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("shape", [(2, 33, 7, 131), (3, 40, 16, 128), (40, 1, 5, 70)])
def test_columns_at_hand_are_copied_once_for_all_rows(shape: tuple[int, int, int, int], workers: int,
                                                      facts: Facts) -> None:
    function, arguments = reduce_loops(window.tile_ir()), arguments_of(*shape)
    lane = run_lane(function, arguments, facts=facts, workers=workers)
    close(arguments["y"], expected_of(arguments), 3 * shape[2])
    assert copies_of(lane, "w")
    inside = next(op for op in lane.walk() if op.name == "loop" and op.attributes["label"] == "o")
    names = [op.attributes["label"] for op in inside.blocks[0].ops if op.name == "loop"]
    assert names[0].startswith("w.") and "each" in names[1:], "the copy comes before the loops over what it serves"


def test_what_reads_the_copy_reads_nothing_else() -> None:
    """Past the copy each step of the depth finds the columns of the one before it beside its own."""
    lane = lowered(window, arguments_of(2, 33, 7, 128))
    loops = [op.blocks[0] for op in lane.walk() if op.name == "loop"]
    products = [block for block in loops if any(op.name == "fma" for op in block.ops)]
    assert products
    vector_bytes = AVX2.lanes * 4
    steps = {op.attributes["disp"] // vector_bytes for block in products for op in block.ops
             if op.name == "load" and op.attributes["dtype"] is f32}
    assert steps == set(range(8)), "four steps of two vectors, without a gap"


@pytest.mark.parametrize(("of", "arguments", "why"), [
    (window, arguments_of(1, 9, 7, 131), "few rows"),
    (window, arguments_of(2, 33, 7, 16), "all columns are at hand"),
    (own_weights, arguments_of(2, 33, 7, 131, own=True), "each index has others"),
    (chosen_weights, {**arguments_of(2, 33, 7, 131, own=True), "which": 1}, "there are others, that nobody reads"),
    (shifted, arguments_of(2, 33, 7, 131, columns=132), "columns begin elsewhere"),
    (changed, arguments_of(2, 33, 7, 131), "the kernel stores to them"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_read_where_it_lies(of: Any, arguments: dict[str, Any], why: str) -> None:
    assert not copies_of(lowered(of, arguments), "w"), why


def test_columns_that_caches_have_no_room_for_are_read_where_they_lie() -> None:
    arguments = arguments_of(2, 33, 7, 131)
    panel_bytes = 3 * 7 * 2 * AVX2.lanes * 4 // ROOM
    assert copies_of(lowered(window, arguments, replace(AVX2, l2_bytes=panel_bytes)), "w")
    assert not copies_of(lowered(window, arguments, replace(AVX2, l2_bytes=panel_bytes - 1)), "w")


def test_turned_weights_are_read_where_they_lie() -> None:
    arguments = arguments_of(2, 33, 7, 131)
    arguments["w"] = np.ascontiguousarray(arguments["w"].transpose(0, 2, 1)).transpose(0, 2, 1)
    assert not copies_of(lowered(window, arguments), "w")
    run_lane(reduce_loops(window.tile_ir()), arguments, facts=AVX2)
    close(arguments["y"], expected_of(arguments), 21)


def test_a_schedule_may_refuse_or_name_what_is_copied() -> None:
    arguments = arguments_of(2, 33, 7, 131)
    assert copies_of(lowered(window, arguments, schedule=Schedule(stage=("w",))), "w")
    assert not copies_of(lowered(window, arguments, schedule=Schedule(stage=())), "w")
    assert not copies_of(lowered(window, arguments, schedule=Schedule(stage=("x",))), "w")


@settings(max_examples=examples(20))
@given(b=st.integers(0, 3), q=st.integers(0, 14), c=st.integers(0, 18), o=st.integers(0, 75),
       facts=st.sampled_from([AVX512, AVX2]), workers=st.sampled_from([1, 2]))
def test_any_extents(b: int, q: int, c: int, o: int, facts: Facts, workers: int) -> None:
    """Code that is made for many rows serves few, and rows that lie apart."""
    function, arguments = reduce_loops(window.tile_ir()), arguments_of(b, q, c, o)
    wide = np.zeros((3, c, o + 5), np.float32)
    wide[..., :o] = arguments["w"]
    arguments["w"] = wide[..., :o]
    hints = {"B": 4, "Q": 64, "T": 66, "O": 128, "C": 16}
    lane = run_lane(function, arguments, facts=facts, workers=workers,
                    specialization=specialize(function, arguments, hints))
    assert copies_of(lane, "w")
    close(arguments["y"], expected_of(arguments), 3 * c + 1)
