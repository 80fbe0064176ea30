"""What is known of extents before the kernel runs (sapper/lane/extents.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapper import Tensor, dims, f32, kernel, span, sum, tiles, whole, zeros
from sapper.ir.types import TileType, index
from sapper.lane.extents import hint
from sapper.lane.state import Capacity
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Facts, Specialization

from .run_lane import run_lane

D, E, T = dims("D E T")


@kernel
def triangular(k: Tensor[f32, T, D], x: Tensor[f32, T, E], u: Tensor[f32, T, E]):
    """Rows in turn, each less its products with those before in a block of eight: how many these are, a counter says.
    What is added up passes from one block to the next."""
    for e in tiles(E):
        d = whole(D)
        total = zeros(d, e, dtype=f32)
        for p in range(T // 8):
            for r in range(8):
                j = whole(span(0, r))
                near = sum((k[p * 8 + j, d] @ k[p * 8 + r, d]) * u[p * 8 + j, e], over=j)
                u[p * 8 + r, e] = x[p * 8 + r, e] - k[p * 8 + r, d] @ total - near
            j = whole(8)
            total = total + k[p * 8 + j, d] @ u[p * 8 + j, e]


@pytest.mark.parametrize("shape", [(2, 5, 19), (2, 17, 33)])
def test_what_spans_a_counters_range_has_room(shape: tuple[int, int, int]) -> None:
    b, d, e = shape
    random = np.random.default_rng(d)
    k = (random.standard_normal((8 * b, d)) / 8).astype(np.float32)
    x = random.standard_normal((8 * b, e)).astype(np.float32)
    arguments: dict[str, Any] = {"k": k, "x": x, "u": np.zeros((8 * b, e), np.float32)}
    run_lane(reduce_loops(triangular.tile_ir()), arguments, facts=Facts(lanes=8, vector_registers=16))
    expected, total = x.astype(np.float64), np.zeros((d, e))
    for block, keys in zip(expected.reshape(b, 8, e), k.astype(np.float64).reshape(b, 8, d), strict=True):
        for r in range(8):
            block[r] -= keys[r] @ total + (keys[:r] @ keys[r]) @ block[:r]
        total += keys.T @ block
    # Eight sums of products of at most d small numbers, each rounded, and what rows before were off by.
    np.testing.assert_allclose(arguments["u"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_counter_is_bounded_by_where_its_loop_ends() -> None:
    function = triangular.tile_ir()
    loop = next(op for op in function.walk() if op.name == "each" and op.operands[1].op.attributes.get("value") == 8)
    (counter,) = loop.blocks[0].arguments[:1]
    assert counter.type == TileType(index)
    assert hint(counter, Specialization())[2] is None
    assert hint(counter, Specialization(), {counter: loop.operands[1]})[2] == Capacity(8)
