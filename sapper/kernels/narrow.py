"""Rows of f32 rounded to bf16, to nearest even: what products with bf16 weights multiply these by."""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, f32, tiles

from .record import NUMPY_DTYPES, Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

M, N = sp.dims("M N")


@sp.kernel
def narrow_bf16(x: Tensor[f32, M, N], y: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = x[m, n].to(bf16)


def reference(arguments: Arguments) -> dict[str, Array]:
    return {"y": arguments["x"].astype(NUMPY_DTYPES["bf16"])}


def make_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    return {"x": normal(random, shape["M"], shape["N"]), "y": unwritten(shape["M"], shape["N"], dtype="bf16")}


def torch_peer(arguments: Arguments) -> Any:
    import torch

    x = torch.from_numpy(arguments["x"])
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    return lambda: out.copy_(x)


KERNELS = (
    LibraryKernel(
        name="narrow_bf16",
        kernel=narrow_bf16,
        reference=reference,
        make_arguments=make_arguments,
        tolerance=Tolerance(0.0, 0.0, "rounding to nearest even is exact"),
        cases=tuple(Case({"M": m, "N": n}, flops=0, bytes=6 * m * n) for m, n in ((512, 1536), (8192, 4096))),
        check_shapes=({"M": 0, "N": 3}, {"M": 1, "N": 1}, {"M": 5, "N": 33}, {"M": 3, "N": 130}),
        dtype="bf16",
        peers={"torch": torch_peer},
    ),
)
