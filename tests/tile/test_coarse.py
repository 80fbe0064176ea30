"""Functions of which few bits count: found where only a rounding to bf16 follows, and nowhere else."""

from __future__ import annotations

import pytest

import sapper as sp
from sapper import Tensor, bf16, exp, f16, f32, max, sum, tiles, whole
from sapper.kernels import find
from sapper.tile.coarse import FUNCTIONS, beside_one, coarse

M, N = sp.dims("M N")


@sp.kernel
def to_half(x: Tensor[f32, M, N], y: Tensor[f16, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = exp(x[m, n]).to(f16)


@sp.kernel
def also_stored(x: Tensor[f32, M, N], y: Tensor[bf16, M, N], z: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        e = exp(x[m, n])
        y[m, n] = (e * 2.0).to(bf16)
        z[m, n] = -e


@sp.kernel
def cancels(x: Tensor[f32, M, N], y: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = (exp(x[m, n]) - 1.0).to(bf16)


@sp.kernel
def sums_of_both_signs(x: Tensor[f32, M, N], y: Tensor[bf16, M]):
    for m in tiles(M):
        n = whole(N)
        y[m] = sum(exp(x[m, n]) * x[m, n], over=n).to(bf16)


@sp.kernel
def chosen(x: Tensor[f32, M, N], y: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        e = exp(x[m, n])
        y[m, n] = sp.where(x[m, n] > 0.0, e, -e).to(bf16)


@sp.kernel
def chooses(x: Tensor[f32, M, N], y: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = sp.where(exp(x[m, n]) > 1.0, 2.0, 3.0).to(bf16)


@sp.kernel
def erf_alone(x: Tensor[f32, M, N], y: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = sp.erf(x[m, n]).to(bf16)


@sp.kernel
def erf_less_one(x: Tensor[f32, M, N], y: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = (0.25 + sp.erf(x[m, n])).to(bf16)


@sp.kernel
def largest_of(x: Tensor[f32, M, N], y: Tensor[bf16, M]):
    for m in tiles(M):
        n = whole(N)
        y[m] = max(exp(x[m, n]), over=n).to(bf16)


@sp.kernel
def tanh_and_one(x: Tensor[f32, M, N], y: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = (0.5 * x[m, n] * (1.0 + sp.tanh(x[m, n]))).to(bf16)


@sp.kernel
def erf_and_more(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        e = sp.erf(x[m, n])
        y[m, n] = (1.5 + e) * e


def counts(kernel: object) -> tuple[int, int]:
    """Functions that may be coarse, and all."""
    function = kernel.tile_ir()  # type: ignore[attr-defined]
    return len(coarse(function)), len([op for op in function.walk() if op.name in FUNCTIONS])


@pytest.mark.parametrize("kernel", [chosen, tanh_and_one])
def test_what_is_only_rounded_may_be_coarse(kernel: object) -> None:
    few, all_of_them = counts(kernel)
    assert few == all_of_them > 0


@pytest.mark.parametrize("kernel", [
    to_half, also_stored, cancels, sums_of_both_signs, chooses, erf_alone, erf_less_one, largest_of])
def test_what_more_bits_come_of_may_not(kernel: object) -> None:
    few, all_of_them = counts(kernel)
    assert few == 0 < all_of_them


@pytest.mark.parametrize(("name", "few"), [
    ("softmax_bf16", True), ("softmax", False), ("swiglu_bf16", True), ("swiglu", False), ("gelu_bf16", True),
    ("gelu", False), ("attention_decode_f32", False), ("attention_decode_bf16", False)])
def test_of_the_library(name: str, few: bool) -> None:
    found, all_of_them = counts(find(name).kernel)
    assert (found == all_of_them) == few and (found > 0) == few


@pytest.mark.parametrize(("kernel", "found"), [
    (find("gelu").kernel, 1), (erf_alone, 0), (erf_less_one, 0), (erf_and_more, 0)])
def test_what_is_added_to_one_alone(kernel: object, found: int) -> None:
    assert len(beside_one(kernel.tile_ir(), frozenset({"erf"}))) == found  # type: ignore[attr-defined]
