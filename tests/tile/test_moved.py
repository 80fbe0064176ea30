"""Narrow floats that are only moved are integers; others stay what they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, each, tiles, where
from sapper.ir.types import DType, TensorType, bf16, f8e4m3, f8e5m2, f16, f32, i32
from sapper.ir.verifier import verify
from sapper.tile.moved import MOVED_AS, move_as_integers
from sapper.tile.ops import TILE_OPS
from sapper.tile.semantics import numpy_dtype

B, M, N = sp.dims("B M N")


def rows_of(dtype: DType) -> Any:
    @sp.kernel
    def rows(x: Tensor[dtype, M, N], place: Tensor[i32, B], y: Tensor[dtype, B, N]):
        pairs, turned = x.view(M, N // 2, 2), y.view(B, N // 2, 2)
        for b, n in tiles(B, N // 2):
            turned[b, n, 0] = pairs[place[b], n, 1]
            turned[b, n, 1] = pairs[place[b], n, 0]

    return rows


@sp.kernel
def passed_on(x: Tensor[bf16, N], y: Tensor[bf16, N], z: Tensor[bf16, N], w: Tensor[f32, N]):
    """y is computed with, and so x, which comes to it, stays too."""
    for n in tiles(N):
        y[n] = x[n]
        z[n] = y[n]
        w[n] = y[n].to(f32)


@sp.kernel
def two_of_three(x: Tensor[bf16, M, N], y: Tensor[bf16, N], z: Tensor[bf16, N]):
    for m in each(1):
        for n in tiles(N):
            y[n] = x[m, n]
            z[n] = where(n > 2, z[n], 1.0)


@sp.kernel
def added(x: Tensor[bf16, B, N], place: Tensor[i32, B], y: Tensor[bf16, M, N]):
    for b, n in tiles(B, N):
        y[place[b], n] += x[b, n]


def types_of(kernel: Any) -> dict[str, str]:
    function = kernel.tile_ir()
    move_as_integers(function)
    verify(function, TILE_OPS)
    return {v.name: v.type.dtype.name for v in function.arguments if isinstance(v.type, TensorType)}


@pytest.mark.parametrize("dtype", MOVED_AS, ids=lambda d: d.name)
def test_every_bit_is_moved(dtype: DType) -> None:
    """NaN of any kind among them, by machine code with and without AVX-512."""
    kernel = rows_of(dtype)
    integer = {8: np.uint8, 16: np.uint16}[dtype.bits]
    assert types_of(kernel) == {"x": MOVED_AS[dtype].name, "place": "i32", "y": MOVED_AS[dtype].name}
    x = np.random.default_rng(1).integers(0, 1 << dtype.bits, (9, 70)).astype(integer)
    place = np.array([3, 0, 8, 8], np.int32)
    for target in (None, "v3"):
        y = np.zeros((4, 70), integer)
        kernel(x.view(numpy_dtype(dtype)), place, y.view(numpy_dtype(dtype)), **({"target": target} if target else {}))
        np.testing.assert_array_equal(y.reshape(4, 35, 2), x[place].reshape(4, 35, 2)[..., ::-1])


def test_what_is_computed_with_stays() -> None:
    assert types_of(passed_on) == {"x": "bf16", "y": "bf16", "z": "bf16", "w": "f32"}
    assert types_of(added) == {"x": "bf16", "place": "i32", "y": "bf16"}
    assert types_of(two_of_three) == {"x": "i16", "y": "i16", "z": "bf16"}


def test_other_types_stay() -> None:
    assert not {f32, i32} & MOVED_AS.keys() and {bf16, f16, f8e4m3, f8e5m2} == MOVED_AS.keys()
