"""Rows of f32 rounded to bf16, to nearest even: what products with bf16 weights multiply these by.

    narrow_bf16        all of them
    narrow_rows_bf16   row rows[t] becomes row t, as experts take them; the caller sees to it that 0 <= rows[t] < M
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, each, f32, i32, tiles

from .record import NUMPY_DTYPES, Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

M, N, T = sp.dims("M N T")


@sp.kernel
def narrow_bf16(x: Tensor[f32, M, N], y: Tensor[bf16, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = x[m, n].to(bf16)


@sp.kernel
def narrow_rows_bf16(rows: Tensor[i32, T], x: Tensor[f32, M, N], y: Tensor[bf16, T, N]):
    for t in each(T):
        row = rows[t]
        for n in tiles(N):
            y[t, n] = x[row, n].to(bf16)


def reference(arguments: Arguments) -> dict[str, Array]:
    return {"y": arguments["x"].astype(NUMPY_DTYPES["bf16"])}


def rows_reference(arguments: Arguments) -> dict[str, Array]:
    return {"y": arguments["x"][arguments["rows"]].astype(NUMPY_DTYPES["bf16"])}


def make_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    return {"x": normal(random, shape["M"], shape["N"]), "y": unwritten(shape["M"], shape["N"], dtype="bf16")}


def make_rows_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    t, m, n = shape["T"], shape["M"], shape["N"]
    return {"rows": random.integers(0, m, t).astype(np.int32), "x": normal(random, m, n),
            "y": unwritten(t, n, dtype="bf16")}


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
    LibraryKernel(
        name="narrow_rows_bf16",
        kernel=narrow_rows_bf16,
        reference=rows_reference,
        make_arguments=make_rows_arguments,
        tolerance=Tolerance(0.0, 0.0, "rounding to nearest even is exact"),
        cases=(Case({"T": 2048, "M": 512, "N": 1024}, flops=0, bytes=2048 * (4 + 2 * 1024) + 4 * 512 * 1024),),
        check_shapes=({"T": 0, "M": 3, "N": 4}, {"T": 1, "M": 1, "N": 1}, {"T": 5, "M": 11, "N": 33},
                      {"T": 9, "M": 4, "N": 130}),
        dtype="bf16",
    ),
)
