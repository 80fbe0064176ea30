"""Two rows of bf16 side by side as their even and odd elements: what is taken, what is not, and that bits stay."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sapper.codegen.pipeline import facts_of, finish_lane
from sapper.ir.nodes import Function
from sapper.ir.types import bf16, f32
from sapper.kernels import find
from sapper.lang.builtins import sum, tiles, whole
from sapper.lang.dims import dims
from sapper.lang.kernel import kernel
from sapper.lang.tensor import Tensor
from sapper.targets.x86_64.target import TARGETS, Target
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Schedule

from .run_lane import run_lane

AVX2, AVX512 = TARGETS["v3"], TARGETS["v4"]
M, N = dims("M N")


@kernel
def product(x: Tensor[bf16, M, N], gain: Tensor[bf16, N], y: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = (x[m, n].to(f32) * gain[n].to(f32)).to(bf16)


@kernel
def scaled_by_sum(x: Tensor[bf16, M, N], y: Tensor[bf16, M, N]):
    for m in tiles(M):
        n = whole(N)
        row = x[m, n].to(f32)
        y[m, n] = (row * sum(row, over=n)).to(bf16)


@kernel
def by_index(x: Tensor[bf16, M, N], y: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = (x[m, n].to(f32) * n.to(f32)).to(bf16)


@kernel
def with_f32(x: Tensor[bf16, M, N], other: Tensor[f32, M, N], y: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = (x[m, n].to(f32) + other[m, n]).to(bf16)


@kernel
def read_twice(x: Tensor[bf16, M, N], wide: Tensor[f32, M, N], y: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        row = x[m, n].to(f32) * 3.0
        wide[m, n] = row
        y[m, n] = row.to(bf16)


def numbers(*shape: int) -> np.ndarray:
    """With infinities, NaN, zeros and numbers that bf16 has no normal form for."""
    random = np.random.default_rng(3)
    x = random.standard_normal(shape).astype(ml_dtypes.bfloat16)
    for value in (np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-39, 3e38):
        x.reshape(-1)[random.integers(0, x.size, 2)] = value
    return x


def lowered(function: Function, arguments: dict[str, Any], vectors: int, target: Target = AVX2) -> list[str]:
    with np.errstate(all="ignore"):
        lane = run_lane(reduce_loops(function), arguments, Schedule(registers={"n": vectors}), facts_of(target),
                        passes=lambda lane: finish_lane(lane, target))
    return [op.name for op in lane.walk()]


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    same = (found.view(np.uint16) == expected.view(np.uint16)) | (np.isnan(found) & np.isnan(expected))
    assert same.all()


@pytest.mark.parametrize("target", [AVX2, AVX512], ids=lambda t: t.name)
@pytest.mark.parametrize("vectors", [1, 2, 4])
@pytest.mark.parametrize("extent", [16, 37, 64, 100])
def test_elementwise_rows(extent: int, vectors: int, target: Target) -> None:
    x, gain = numbers(3, extent), numbers(extent)
    y = np.zeros_like(x)
    names = lowered(product.tile_ir(), {"x": x, "gain": gain, "y": y}, vectors, target)
    with np.errstate(all="ignore"):
        assert_same(y, (x.astype(np.float32) * gain.astype(np.float32)).astype(ml_dtypes.bfloat16))
    assert ("pack2" in names) == (vectors > 1)


@pytest.mark.parametrize("target", [AVX2, AVX512], ids=lambda t: t.name)
@pytest.mark.parametrize("name", ["swiglu_bf16", "gelu_bf16"])
def test_functions_of_each_lane(name: str, target: Target) -> None:
    """Their tables and powers of two, too."""
    entry = find(name)
    arguments = entry.make_arguments(np.random.default_rng(1), {"M": 3, "N": 100})
    expected = entry.reference(arguments)
    assert "pack2" in lowered(entry.kernel.tile_ir(), arguments, 4, target)
    assert entry.compare(arguments, expected) is None


def test_an_instruction_that_rounds_takes_rows_in_order() -> None:
    x = np.ones((2, 128), ml_dtypes.bfloat16)
    assert "pack2" not in lowered(product.tile_ir(), {"x": x, "gain": x[0], "y": np.zeros_like(x)}, 4, TARGETS["zen4"])


def test_a_sum_along_the_lanes_is_the_same_in_all() -> None:
    x = np.random.default_rng(1).integers(-4, 5, (2, 64)).astype(ml_dtypes.bfloat16)
    y = np.zeros_like(x)
    names = lowered(scaled_by_sum.tile_ir(), {"x": x, "y": y}, 4)
    wide = x.astype(np.float32)
    assert_same(y, (wide * wide.sum(axis=1, keepdims=True)).astype(ml_dtypes.bfloat16))
    assert "pack2" in names


def test_what_depends_on_the_place_stays_in_order() -> None:
    x = np.random.default_rng(1).standard_normal((2, 64)).astype(ml_dtypes.bfloat16)
    y = np.zeros_like(x)
    names = lowered(by_index.tile_ir(), {"x": x, "y": y}, 4)
    assert_same(y, (x.astype(np.float32) * np.arange(64, dtype=np.float32)).astype(ml_dtypes.bfloat16))
    assert "pack2" not in names


@pytest.mark.parametrize("function", [with_f32, read_twice])
def test_what_meets_rows_in_order_stays_in_order(function: Any) -> None:
    x = np.random.default_rng(1).standard_normal((2, 64)).astype(ml_dtypes.bfloat16)
    other = np.ones((2, 64), np.float32)
    y = np.zeros_like(x)
    names = lowered(function.tile_ir(), {"x": x, "other" if function is with_f32 else "wide": other, "y": y}, 4)
    wide = x.astype(np.float32)
    assert_same(y, (wide + 1 if function is with_f32 else wide * 3).astype(ml_dtypes.bfloat16))
    assert "pack2" not in names


def test_in_place() -> None:
    x = numbers(2, 64)
    gain, expected = numbers(64), x.astype(np.float32)
    with np.errstate(all="ignore"):
        expected = (expected * gain.astype(np.float32)).astype(ml_dtypes.bfloat16)
    assert "pack2" in lowered(product.tile_ir(), {"x": x, "gain": gain, "y": x}, 4)
    assert_same(x, expected)
