"""SwiGLU and GELU, elementwise.

SwiGLU: y = silu(gate) * up with silu(x) = x * sigmoid(x) (Shazeer, 2020).
GELU: y = x * (1 + erf(x / sqrt(2))) / 2, the exact form (Hendrycks and Gimpel, 2016).
`silu` and `gelu_of` are plain functions which other kernels inline.
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, erf, f32, sigmoid, tiles

from .record import Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

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


def swiglu_arguments(random: np.random.Generator, shape: Shape) -> Arguments:
    m, n = shape["M"], shape["N"]
    return {"gate": normal(random, m, n, scale=3.0), "up": normal(random, m, n), "y": unwritten(m, n)}


def gelu_arguments(random: np.random.Generator, shape: Shape) -> Arguments:
    m, n = shape["M"], shape["N"]
    return {"x": normal(random, m, n, scale=2.0), "y": unwritten(m, n)}


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

    gate, up = torch.from_numpy(arguments["gate"]), torch.from_numpy(arguments["up"])
    out = torch.empty_like(gate)
    return lambda: torch.mul(torch.nn.functional.silu(gate), up, out=out)


def gelu_torch(arguments: Arguments) -> Any:
    import torch

    x = torch.from_numpy(arguments["x"])
    return lambda: torch.nn.functional.gelu(x)


CHECK_SHAPES = ({"M": 0, "N": 3}, {"M": 1, "N": 1}, {"M": 3, "N": 17}, {"M": 5, "N": 1000})

KERNELS = (
    LibraryKernel(
        name="swiglu",
        kernel=swiglu,
        reference=lambda arguments: {"y": silu_reference(arguments["gate"]) * arguments["up"]},
        make_arguments=swiglu_arguments,
        tolerance=Tolerance(1e-6, 1e-38, "sigmoid within a few ulp, then two products"),
        cases=tuple(
            Case({"M": m, "N": n}, flops=5 * m * n, bytes=12 * m * n) for m, n in ((512, 1536), (8192, 4096))
        ),
        check_shapes=CHECK_SHAPES,
        peers={"numpy": swiglu_numpy, "torch": swiglu_torch},
    ),
    LibraryKernel(
        name="gelu",
        kernel=gelu,
        reference=lambda arguments: {"y": gelu_reference(arguments["x"])},
        make_arguments=gelu_arguments,
        tolerance=Tolerance(1e-6, 1e-6, "1 + erf(x) cancels for negative x, which leaves an absolute error"),
        cases=tuple(Case({"M": m, "N": n}, flops=5 * m * n, bytes=8 * m * n) for m, n in ((512, 3072), (8192, 4096))),
        check_shapes=CHECK_SHAPES,
        peers={"torch": gelu_torch},
    ),
)
