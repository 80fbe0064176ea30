"""SwiGLU and GELU, elementwise.

SwiGLU: y = silu(gate) * up with silu(x) = x * sigmoid(x) (Shazeer, 2020).
GELU: y = x * (1 + erf(x / sqrt(2))) / 2, the exact form (Hendrycks and Gimpel, 2016).
`silu` and `gelu_of` are plain functions which other kernels inline. All is computed in f32.
"""

from functools import partial
from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, erf, f32, sigmoid, tiles

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
INVERSE_SQRT_2 = 0.7071067811865476


def erf_reference(x: Array) -> Array:
    """erf in float64."""
    from math import erf as erf_of_scalar

    return np.array([erf_of_scalar(value) for value in x.ravel().tolist()]).reshape(x.shape)


def silu_reference(x: Array) -> Array:
    """x * sigmoid(x) in float64; exp(-|x|) keeps it from overflowing."""
    x = x.astype(np.float64)
    e = np.exp(-np.abs(x))
    return x * np.where(x < 0, e, 1.0) / (1.0 + e)


def swiglu_reference(arguments: Arguments) -> dict[str, Array]:
    return {"y": silu_reference(arguments["gate"]) * arguments["up"].astype(np.float64)}


def gelu_reference(x: Array) -> Array:
    x = x.astype(np.float64)
    return 0.5 * x * (1.0 + erf_reference(x * INVERSE_SQRT_2))


def silu(x):
    return x * sigmoid(x)


def gelu_of(x):
    return 0.5 * x * (1.0 + erf(x * INVERSE_SQRT_2))


@sp.kernel
def swiglu(gate: Tensor[f32, M, N], up: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = silu(gate[m, n]) * up[m, n]


@sp.kernel
def gelu(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = gelu_of(x[m, n])


@sp.kernel
def swiglu_bf16(gate: Tensor[bf16, M, N], up: Tensor[bf16, M, N], y: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = (silu(gate[m, n].to(f32)) * up[m, n].to(f32)).to(bf16)


@sp.kernel
def gelu_bf16(x: Tensor[bf16, M, N], y: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = gelu_of(x[m, n].to(f32)).to(bf16)


def swiglu_arguments(random: "np.random.Generator", shape: Shape, dtype: str) -> Arguments:
    m, n = shape["M"], shape["N"]
    return {"gate": normal(random, m, n, dtype=dtype, scale=3.0), "up": normal(random, m, n, dtype=dtype),
            "y": unwritten(m, n, dtype=dtype)}


def gelu_arguments(random: "np.random.Generator", shape: Shape, dtype: str) -> Arguments:
    m, n = shape["M"], shape["N"]
    return {"x": normal(random, m, n, dtype=dtype, scale=2.0), "y": unwritten(m, n, dtype=dtype)}


def swiglu_numpy(arguments: Arguments) -> Any:
    gate, up, out = arguments["gate"], arguments["up"], np.empty_like(arguments["y"])

    def run() -> None:
        np.negative(gate, out=out)
        np.exp(out, out=out)
        np.add(out, np.float32(1.0), out=out)
        np.divide(gate, out, out=out)
        np.multiply(out, up, out=out)

    return run


def swiglu_torch(arguments: Arguments) -> Any:
    import torch

    gate, up = torch_view(arguments["gate"]), torch_view(arguments["up"])
    out = torch.empty_like(gate)
    return lambda: torch.mul(torch.nn.functional.silu(gate), up, out=out)


def gelu_torch(arguments: Arguments) -> Any:
    import torch

    x = torch_view(arguments["x"])
    return lambda: torch.nn.functional.gelu(x)


CHECK_SHAPES = ({"M": 0, "N": 3}, {"M": 1, "N": 1}, {"M": 3, "N": 17}, {"M": 5, "N": 1000})


def _swiglu(kernel: Any, dtype: str) -> LibraryKernel:
    tolerance = Tolerance(1e-6, 1e-38, "sigmoid within a few ulp, then two products")
    return LibraryKernel(
        name=kernel.name,
        kernel=kernel,
        reference=swiglu_reference,
        make_arguments=partial(swiglu_arguments, dtype=dtype),
        tolerance=tolerance if dtype == "f32" else rounded_to_bf16(tolerance),
        cases=tuple(
            Case({"M": m, "N": n}, flops=5 * m * n, bytes=3 * NUMPY_DTYPES[dtype].itemsize * m * n)
            for m, n in ((512, 1536), (8192, 4096))
        ),
        check_shapes=CHECK_SHAPES,
        dtype=dtype,
        peers={"numpy": swiglu_numpy, "torch": swiglu_torch} if dtype == "f32" else {"torch": swiglu_torch},
    )


def _gelu(kernel: Any, dtype: str) -> LibraryKernel:
    tolerance = Tolerance(1e-6, 1e-6, "1 + erf(x) cancels for negative x, which leaves an absolute error")
    return LibraryKernel(
        name=kernel.name,
        kernel=kernel,
        reference=lambda arguments: {"y": gelu_reference(arguments["x"])},
        make_arguments=partial(gelu_arguments, dtype=dtype),
        tolerance=tolerance if dtype == "f32" else rounded_to_bf16(tolerance),
        cases=tuple(
            Case({"M": m, "N": n}, flops=5 * m * n, bytes=2 * NUMPY_DTYPES[dtype].itemsize * m * n)
            for m, n in ((512, 3072), (8192, 4096))
        ),
        check_shapes=CHECK_SHAPES,
        dtype=dtype,
        peers={"torch": gelu_torch},
    )


KERNELS = (_swiglu(swiglu, "f32"), _swiglu(swiglu_bf16, "bf16"), _gelu(gelu, "f32"), _gelu(gelu_bf16, "bf16"))
