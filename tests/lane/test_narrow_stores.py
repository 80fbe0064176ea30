"""bf16 stored by the instruction that takes denormals for 0: rows with any of them go another way."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from sapper.ir.types import bf16, f32
from sapper.lang.builtins import tiles
from sapper.lang.dims import dims
from sapper.lang.kernel import kernel
from sapper.lang.tensor import Tensor
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Facts, Schedule

from .run_lane import run_lane, specialize
from .test_late import aligned

ROUNDING = Facts(dots=frozenset({"dot2_bf16"}), flushes_as_it_rounds=True)
M, N = dims("M N")


@kernel
def halve(x: Tensor[f32, M, N], y: Tensor[bf16, M, N], z: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = (x[m, n] * 0.5).to(bf16)
        z[m, n] = (x[m, n] * 0.25).to(bf16)


@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("extent", [16, 48, 64, 112, 200, 208])
def test_rows_with_denormals_anywhere(extent: int, streaming: bool, vectors: int) -> None:
    random = np.random.default_rng(extent)
    x = aligned(random.standard_normal((12, extent)).astype(np.float32))
    for row in range(1, 12):
        x[row, random.integers(0, extent, row)] = random.choice(np.array(
            [1e-39, -3e-40, 1.5e-38, 1e-45, 2.3e-38, np.nan, np.inf, -0.0], np.float32), row)
    size = extent * 12
    outputs = {name: aligned(np.full((12, extent), 7, ml_dtypes.bfloat16)) for name in "yz"}
    function = reduce_loops(halve.tile_ir())
    known = specialize(function, {"x": x, **outputs})
    # Streams need rows that start at cache lines.
    if streaming and extent % 32 == 0:
        known = replace(known, aligned=frozenset("yz"))
    lane = run_lane(function, {"x": x, **outputs}, Schedule(registers={"n": vectors}), ROUNDING, known)
    with np.errstate(all="ignore"):
        for name, factor in (("y", 0.5), ("z", 0.25)):
            expected = (x * np.float32(factor)).astype(ml_dtypes.bfloat16)
            same = outputs[name].view(np.uint16) == expected.view(np.uint16)
            assert (same | np.isnan(expected) & np.isnan(outputs[name])).all() and same.size == size
    names = [op.name for op in lane.walk()]
    assert "is_denormal" in names and ("concat_bf16" in names) == (vectors % 2 == 0 or extent == 32)
    # Where all rows are stored two at a time, only a zero among what is stored asks for the test of each row.
    assert ("any_zero_bf16" in names) == ("concat_bf16" in names)
    plain = run_lane(function, {"x": x, **outputs}, None, Facts())
    assert "is_denormal" not in {op.name for op in plain.walk()}
