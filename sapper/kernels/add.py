"""Sums: c = a + b of vectors, the smallest whole kernel, and a bias added to every row of a matrix."""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, f32, tiles

from .record import Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

M, N = sp.dims("M N")


def reference(arguments: Arguments) -> dict[str, Array]:
    return {"c": arguments["a"].astype(np.float64) + arguments["b"]}


@sp.kernel
def vector_add(a: Tensor[f32, N], b: Tensor[f32, N], c: Tensor[f32, N]):
    for n in tiles(N):
        c[n] = a[n] + b[n]


@sp.kernel
def add_bias_in_place(x: Tensor[f32, M, N], bias: Tensor[f32, N]):
    for m, n in tiles(M, N):
        x[m, n] = x[m, n] + bias[n]


def bias_reference(arguments: Arguments) -> dict[str, Array]:
    return {"x": arguments["x"].astype(np.float64) + arguments["bias"]}


def bias_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    return {"x": normal(random, shape["M"], shape["N"]), "bias": normal(random, shape["N"])}


def make_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    n = shape["N"]
    return {"a": normal(random, n), "b": normal(random, n), "c": unwritten(n)}


def torch_peer(arguments: Arguments) -> Any:
    import torch

    a, b = torch.from_numpy(arguments["a"]), torch.from_numpy(arguments["b"])
    out = torch.empty_like(a)
    return lambda: torch.add(a, b, out=out)


def numpy_peer(arguments: Arguments) -> Any:
    a, b, out = arguments["a"], arguments["b"], np.empty_like(arguments["c"])
    return lambda: np.add(a, b, out=out)


KERNELS = (
    LibraryKernel(
        name="vector_add",
        kernel=vector_add,
        reference=reference,
        make_arguments=make_arguments,
        tolerance=Tolerance(2.0**-24, 0.0, "one addition, rounded once to f32"),
        cases=tuple(Case({"N": n}, flops=n, bytes=12 * n) for n in (1 << 14, 1 << 20, 1 << 25)),
        check_shapes=({"N": 0}, {"N": 1}, {"N": 15}, {"N": 1000}, {"N": 4099}),
        peers={"numpy": numpy_peer, "torch": torch_peer},
    ),
    LibraryKernel(
        name="add_bias_in_place",
        kernel=add_bias_in_place,
        reference=bias_reference,
        make_arguments=bias_arguments,
        tolerance=Tolerance(2.0**-24, 0.0, "one addition, rounded once to f32"),
        cases=tuple(Case({"M": m, "N": n}, flops=m * n, bytes=4 * m * n + 4 * n) for m, n in ((1, 2048), (512, 2048))),
        check_shapes=({"M": 0, "N": 3}, {"M": 1, "N": 1}, {"M": 3, "N": 17}, {"M": 5, "N": 100}),
    ),
)
