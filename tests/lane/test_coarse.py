"""What follows a coarse result: (1 + f) g is one multiply-add."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from sapper.ir.types import ROW_F32
from sapper.kernels import find
from sapper.kernels.activation import gelu_reference
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Facts, Schedule

from .run_lane import run_lane


@pytest.mark.parametrize(("name", "fused"), [("gelu_bf16", True), ("gelu", False)])
def test_one_and_a_coarse_result_times_a_factor(name: str, fused: bool) -> None:
    dtype = np.dtype(np.float32 if name == "gelu" else ml_dtypes.bfloat16)
    x = (np.random.default_rng(3).standard_normal((3, 64), np.float32) * 2).astype(dtype)
    y = np.zeros_like(x)
    lane = run_lane(reduce_loops(find(name).kernel.tile_ir()), {"x": x, "y": y}, Schedule(registers={"n": 2}), Facts())
    names = [op.name for op in lane.walk() if op.results and op.results[0].type == ROW_F32]
    functions = names.count("erf")      # of two rows at once, and of tails
    assert functions >= 2 and names.count("fma") == (functions if fused else 0)
    assert names.count("mul") == (2 if fused else 3) * functions
    np.testing.assert_allclose(y.astype(np.float64), gelu_reference(x), rtol=2.0**-7, atol=2e-6)
