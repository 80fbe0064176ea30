"""Vector add: c = a + b, the smallest whole kernel."""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, f32, tiles

from .record import Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

N = sp.dims("N")


def reference(arguments: Arguments) -> dict[str, Array]:
    return {"c": arguments["a"].astype(np.float64) + arguments["b"]}


@sp.kernel
def vector_add(a: Tensor[f32, N], b: Tensor[f32, N], c: Tensor[f32, N]):
    for n in tiles(N):
        c[n] = a[n] + b[n]


def make_arguments(random: np.random.Generator, shape: Shape) -> Arguments:
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
)
