"""Elements of any width, contiguous along another axis than the lanes', go through squares of registers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, tiles
from sapper.ir.types import DType, bf16, bool_, f32, f64, i4, i8, i16, i64, u8
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Facts
from sapper.tile.semantics import numpy_dtype

from .run_lane import run_lane

FACTS = [Facts(lanes=16), Facts(lanes=8, vector_registers=16)]
WIDTHS = (f32, bf16, i16, i8, u8, f64, i64)
M, N = sp.dims("M N")


def transpose_of(dtype: DType) -> Any:
    @sp.kernel
    def transpose(x: Tensor[dtype, M, N], y: Tensor[dtype, N, M]):
        for n, m in tiles(N, M):
            y[n, m] = x[m, n]

    return transpose


@pytest.mark.parametrize("facts", FACTS, ids=lambda f: f"{f.lanes} lanes")
@pytest.mark.parametrize("extents", [(64, 32), (37, 70)])
@pytest.mark.parametrize("dtype", WIDTHS, ids=lambda d: d.name)
def test_transpose(dtype: DType, extents: tuple[int, int], facts: Facts) -> None:
    x = np.random.default_rng(1).integers(0, 100, extents).astype(numpy_dtype(dtype))
    y = np.zeros(extents[::-1], x.dtype)
    lane = run_lane(reduce_loops(transpose_of(dtype).tile_ir()), {"x": x, "y": y}, facts=facts)
    np.testing.assert_array_equal(y, x.T)
    assert "exchange" in {op.name for op in lane.walk()}


def pairs_of(dtype: DType) -> Any:
    @sp.kernel
    def pairs(x: Tensor[dtype, M, N, 2], y: Tensor[dtype, M, N, 2]):
        for m, n in tiles(M, N):
            y[m, n, 0] = x[m, n, 1]
            y[m, n, 1] = x[m, n, 0]

    return pairs


@pytest.mark.parametrize("facts", FACTS, ids=lambda f: f"{f.lanes} lanes")
@pytest.mark.parametrize("dtype", [bool_, i4], ids=lambda d: d.name)
def test_what_is_otherwise_in_registers_goes_one_by_one(dtype: DType, facts: Facts) -> None:
    """Bools are masks there, and numbers of four bits are cut to these."""
    low, high = (0, 2) if dtype is bool_ else (-8, 8)
    x = np.random.default_rng(1).integers(low, high, (35, 40, 2)).astype(numpy_dtype(dtype))
    y, turned = np.zeros_like(x), np.zeros((40, 35), x.dtype)
    run_lane(reduce_loops(pairs_of(dtype).tile_ir()), {"x": x, "y": y}, facts=facts)
    np.testing.assert_array_equal(y, x[..., ::-1])
    one = np.ascontiguousarray(x[..., 0])
    run_lane(reduce_loops(transpose_of(dtype).tile_ir()), {"x": one, "y": turned}, facts=facts)
    np.testing.assert_array_equal(turned, one.T)
