"""Rows whose sums along the lanes are joined: what follows is computed for all of them at once."""

from __future__ import annotations

import numpy as np
import pytest

from sapper.ir.nodes import Function
from sapper.ir.types import f32, i8, i32
from sapper.kernels import library
from sapper.lane.lower import lower
from sapper.lang.builtins import abs, max, round, tiles, where, whole
from sapper.lang.builtins import sum as total_of
from sapper.lang.dims import dims
from sapper.lang.kernel import kernel
from sapper.lang.tensor import Tensor
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Facts, Schedule

from .run_lane import run_lane, specialize

AVX512 = Facts(lanes=16, vector_registers=32)
AVX2 = Facts(lanes=8, vector_registers=16)
M, N = dims("M N")


@kernel
def quantise(x: Tensor[f32, M, N], q: Tensor[i8, M, N], scale: Tensor[f32, M], total: Tensor[i32, M, 3]):
    for m in tiles(M):
        n = whole(N)
        row = x[m, n]
        largest = max(abs(row), over=n)
        scale[m] = largest / 127.0
        quants = round(row * where(largest > 0.0, 127.0 / largest, 0.0)).to(i32)
        q[m, n] = quants.to(i8)
        total[m, 1] = total_of(quants, over=n)


@kernel
def marked(x: Tensor[f32, M, N], y: Tensor[f32, M, N], shift: Tensor[f32, M], high: Tensor[f32, M]):
    """The maximum decides, as a truth value, about all of a row, and meets what was loaded for each."""
    for m in tiles(M):
        n = whole(N)
        largest = max(x[m, n], over=n)
        high[m] = largest + shift[m]
        y[m, n] = where(largest > 2.0, x[m, n], 1.0)


@kernel
def of_one_row(x: Tensor[f32, N], shift: Tensor[f32, M], high: Tensor[f32, M], y: Tensor[f32, N, M]):
    """What is loaded along the lanes has no axis of rows."""
    for m in tiles(M):
        n = whole(N)
        largest = max(x[n] + shift[m], over=n)
        high[m] = largest
        y[n, m] = x[n] - largest


def pieces(lane: Function) -> list[int]:
    """Rows at once of each loop over m."""
    return [op.attributes["step"] for op in lane.walk() if op.name == "loop" and op.attributes["label"] == "m"]


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
def test_what_follows_is_computed_once(rows: int, facts: Facts) -> None:
    x = np.random.default_rng(rows).standard_normal((37, 21)).astype(np.float32)
    x[9] = 0.0
    arguments = {"x": x, "q": np.zeros((37, 21), np.int8), "scale": np.zeros(37, np.float32),
                 "total": np.full((37, 3), 7, np.int32)}
    function = reduce_loops(quantise.tile_ir())
    schedule = Schedule(tile={"m": rows})
    run_lane(function, arguments, schedule, facts)
    largest = np.abs(x).max(1)
    factor = np.where(largest > 0, np.float32(127) / np.where(largest > 0, largest, 1), np.float32(0))
    quants = np.rint(x * factor[:, None]).astype(np.int32)
    np.testing.assert_array_equal(arguments["q"], quants)
    np.testing.assert_array_equal(arguments["scale"], largest / np.float32(127))
    np.testing.assert_array_equal(arguments["total"], np.stack([np.full(37, 7), quants.sum(1), np.full(37, 7)], 1))
    lane = lower(function, schedule, facts, specialize(function, arguments))
    divisions = [op for op in lane.walk() if op.name == "div"]
    assert rows in pieces(lane)
    assert len(divisions) == sum(2 if 4 <= piece <= facts.lanes else 2 * piece for piece in pieces(lane))


@pytest.mark.parametrize("rows", [4, 8])
def test_truth_values_and_what_is_loaded_are_of_each_row(rows: int) -> None:
    x = np.random.default_rng(rows).standard_normal((19, 33)).astype(np.float32)
    shift = np.arange(19, dtype=np.float32)
    arguments = {"x": x, "y": np.zeros_like(x), "shift": shift, "high": np.zeros(19, np.float32)}
    run_lane(reduce_loops(marked.tile_ir()), arguments, Schedule(tile={"m": rows}), AVX512)
    largest = x.max(1)
    np.testing.assert_array_equal(arguments["high"], largest + shift)
    np.testing.assert_array_equal(arguments["y"], np.where(largest[:, None] > 2, x, np.float32(1)))


@pytest.mark.parametrize("name", ["quantize_groups_32_128", "quantize_groups_128_128", "quantize_super"])
def test_short_rows_whose_sums_lie_side_by_side_are_taken_by_eight(name: str) -> None:
    entry = next(k for k in library() if k.name == name)
    function = reduce_loops(entry.kernel.tile_ir())
    shape = {**entry.check_shapes[-1], "M": 21, "C": 24}
    arguments = entry.make_arguments(np.random.default_rng(5), shape)
    lane = run_lane(function, arguments, facts=AVX512, specialization=specialize(function, arguments, shape))
    assert entry.compare(arguments, entry.reference(arguments)) is None
    assert pieces(lane)[0] == 8


def test_rows_that_follow_each_other_are_taken_one_by_one() -> None:
    entry = next(k for k in library() if k.name == "quantize_fp8")
    function = reduce_loops(entry.kernel.tile_ir())
    shape = {"M": 3, "B": 24}
    arguments = entry.make_arguments(np.random.default_rng(5), shape)
    lane = run_lane(function, arguments, facts=AVX512, specialization=specialize(function, arguments, shape))
    assert entry.compare(arguments, entry.reference(arguments)) is None
    assert {op.attributes["step"] for op in lane.walk() if op.name == "loop" and op.attributes["label"] == "b"} == {1}


def test_a_row_of_one_axis_serves_all_rows() -> None:
    x, shift = (np.random.default_rng(0).standard_normal(size).astype(np.float32) for size in (21, 37))
    arguments = {"x": x, "shift": shift, "high": np.zeros(37, np.float32), "y": np.zeros((21, 37), np.float32)}
    run_lane(reduce_loops(of_one_row.tile_ir()), arguments, Schedule(), AVX512)
    np.testing.assert_array_equal(arguments["high"], (x[:, None] + shift).max(0))
    np.testing.assert_array_equal(arguments["y"], x[:, None] - arguments["high"])
