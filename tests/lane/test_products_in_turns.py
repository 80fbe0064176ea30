"""Two products of one walk that have no operand in common, where registers are few (Reductions.meet_in_turns)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapper import Tensor, dims, f32, kernel, tiles, whole
from sapper.ir.nodes import Block, Function
from sapper.lane.choices import choices
from sapper.tile.canonical import canonicalize
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Facts, Schedule

from .run_lane import run_lane, specialize

AVX512, AVX2 = Facts(lanes=16, vector_registers=32), Facts(lanes=8, vector_registers=16)
M, N, K = dims("M N K")


@kernel
def apart(a: Tensor[f32, M, K], b: Tensor[f32, M, K], c: Tensor[f32, K, N], d: Tensor[f32, K, N],
          y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        k = whole(K)
        y[m, n] = (a[m, k] @ c[k, n]) * (b[m, k] @ d[k, n])


@kernel
def with_one_operand(a: Tensor[f32, M, K], b: Tensor[f32, M, K], c: Tensor[f32, K, N], d: Tensor[f32, K, N],
                     y: Tensor[f32, M, N]):
    """As gate and up have."""
    for m, n in tiles(M, N):
        k = whole(K)
        y[m, n] = (a[m, k] @ c[k, n]) * (a[m, k] @ d[k, n]) + b[m, 0]


def prepared(of: Any, rows: int, columns: int, depth: int) -> tuple[Function, dict[str, Any]]:
    random = np.random.default_rng(rows)
    function = reduce_loops(of.tile_ir())
    canonicalize(function)
    arguments = {name: random.standard_normal(shape).astype(np.float32) for name, shape in (
        ("a", (rows, depth)), ("b", (rows, depth)), ("c", (depth, columns)), ("d", (depth, columns)))}
    return function, {**arguments, "y": np.full((rows, columns), np.nan, np.float32)}


def registers(of: Any, facts: Facts, rows: int = 96) -> dict[str, int]:
    function, arguments = prepared(of, rows, 160, 64)
    found = choices(function, Schedule(), facts, specialize(function, arguments)).schedule.registers
    return {axis: found[axis] for axis in ("m", "n")}


def test_registers_hold_the_operands_of_one_at_a_time() -> None:
    assert registers(apart, AVX2) == {"m": 3, "n": 2}
    assert registers(with_one_operand, AVX2)["n"] == 1
    assert registers(apart, AVX512)["n"] == 1


@pytest.mark.parametrize(("of", "turns"), [(apart, True), (with_one_operand, False)], ids=["apart", "one operand"])
def test_one_is_done_before_the_other_in_each_step(of: Any, turns: bool) -> None:
    function, arguments = prepared(of, 96, 160, 64)
    lane = run_lane(function, arguments, facts=AVX2)

    def sums_in_order(block: Block) -> list[int]:
        """Which of the sums that a loop carries the multiply-adds of its first step add to."""
        carried = block.arguments[1:]
        return [carried.index(op.operands[2]) for op in block.ops if op.name == "fma" and op.operands[2] in carried]

    found = [order for op in lane.walk() if op.name == "loop" for order in [sums_in_order(op.blocks[0])] if order]
    full = max(found, key=len)
    assert len(full) == 12
    first = {place // 6 for place in full[:6]}
    assert (len(first) == 1) == turns


@pytest.mark.sampled(3)
@pytest.mark.parametrize("of", [apart, with_one_operand])
@pytest.mark.parametrize("shape", [(96, 160, 64), (35, 83, 131), (64, 16, 7), (31, 9, 30)])
def test_any_extents(of: Any, shape: tuple[int, int, int]) -> None:
    function, arguments = prepared(of, *shape)
    run_lane(function, arguments, facts=AVX2)
    a, b, c, d = (arguments[name].astype(np.float64) for name in "abcd")
    expected = (a @ c) * (b @ d) if of is apart else (a @ c) * (a @ d) + b[:, :1]
    bound = 2.0**-22 * shape[2] * 25 * np.maximum(1, np.abs(expected).max())     # terms below 25, rounded as added
    np.testing.assert_allclose(arguments["y"], expected, rtol=0, atol=bound)
