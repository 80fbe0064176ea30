"""Where zeros are to be reckoned with."""

from __future__ import annotations

from typing import Any

import pytest

import sapper as sp
from sapper.ir.types import f32
from sapper.kernels import find
from sapper.lang.builtins import tiles
from sapper.lang.dims import dims
from sapper.lang.kernel import kernel
from sapper.lang.tensor import Tensor
from sapper.tile.zeros import often_zero

M, N = dims("M N")


@kernel
def relu_scaled(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = sp.maximum(x[m, n], 0.0) * -3.0


@kernel
def limited_sum(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = sp.maximum(x[m, n], 0.0) + x[m, n]


@pytest.mark.parametrize(("made", "expected"), [
    (relu_scaled, True), (limited_sum, False), ("gelu", True), ("gelu_bf16", True), ("swiglu_bf16", False),
    ("softmax", False), ("rms_norm_bf16", False), ("layer_norm", False), ("rms_norm_quantize", True),
])
def test_zeros_come_of_what_chooses_limits_rounds_or_saturates(made: Any, expected: bool) -> None:
    function = (find(made).kernel if isinstance(made, str) else made).tile_ir()
    assert any(often_zero(op.operands[1]) for op in function.walk() if op.name == "store") == expected
