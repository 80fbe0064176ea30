"""Softmax over the rows of a matrix, made safe by the row's maximum; computed in f32, whatever the rows' type."""

from functools import partial
from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, exp, f32, max, sum, tiles, whole

from .record import (
    NUMPY_DTYPES,
    Arguments,
    Array,
    Case,
    LibraryKernel,
    Shape,
    Tolerance,
    normal,
    rounded_to_bf16,
    torch_view,
    unwritten,
)

M, N = sp.dims("M N")


def reference(arguments: Arguments) -> dict[str, Array]:
    x = arguments["x"].astype(np.float64)
    e = np.exp(x - x.max(axis=1, keepdims=True, initial=-np.inf))
    return {"y": e / e.sum(axis=1, keepdims=True)}


@sp.kernel
def softmax(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        row = x[m, n]
        e = exp(row - max(row, over=n))
        y[m, n] = e * (1.0 / sum(e, over=n))


@sp.kernel
def softmax_bf16(x: Tensor[bf16, M, N], y: Tensor[bf16, M, N]):
    for m in tiles(M):
        n = whole(N)
        row = x[m, n].to(f32)
        e = exp(row - max(row, over=n))
        y[m, n] = (e * (1.0 / sum(e, over=n))).to(bf16)


def make_arguments(random: "np.random.Generator", shape: Shape, dtype: str) -> Arguments:
    m, n = shape["M"], shape["N"]
    return {"x": normal(random, m, n, dtype=dtype, scale=4.0), "y": unwritten(m, n, dtype=dtype)}


def numpy_peer(arguments: Arguments) -> Any:
    x, out = arguments["x"], np.empty_like(arguments["y"])

    def run() -> None:
        np.subtract(x, x.max(axis=1, keepdims=True), out=out)
        np.exp(out, out=out)
        np.divide(out, out.sum(axis=1, keepdims=True), out=out)

    return run


def torch_peer(arguments: Arguments) -> Any:
    import torch

    x = torch_view(arguments["x"])
    out = torch.empty_like(x)
    return lambda: torch.softmax(x, dim=1, out=out)


TOLERANCE = Tolerance(
    4e-6, 1e-38, "x - max is rounded once, 2**-24 of up to 40, and exp makes that relative; exp is within 2 ulp"
)


def _entry(kernel: Any, dtype: str) -> LibraryKernel:
    size = NUMPY_DTYPES[dtype].itemsize
    return LibraryKernel(
        name=kernel.name,
        kernel=kernel,
        reference=reference,
        make_arguments=partial(make_arguments, dtype=dtype),
        tolerance=TOLERANCE if dtype == "f32" else rounded_to_bf16(TOLERANCE),
        cases=tuple(
            Case({"M": m, "N": n}, flops=5 * m * n, bytes=2 * size * m * n) for m, n in ((512, 512), (8192, 4096))
        ),
        check_shapes=({"M": 0, "N": 5}, {"M": 1, "N": 1}, {"M": 3, "N": 17}, {"M": 7, "N": 257}, {"M": 2, "N": 4096}),
        dtype=dtype,
        peers={"numpy": numpy_peer, "torch": torch_peer} if dtype == "f32" else {"torch": torch_peer},
    )


KERNELS = (_entry(softmax, "f32"), _entry(softmax_bf16, "bf16"))
