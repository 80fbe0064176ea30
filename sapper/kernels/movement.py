"""Elements put elsewhere: transposes, and gathers along rows.

transpose: y[n, m] = x[m, n].
gather: y[m, k] = x[m, index[m, k]]. The caller sees to it that 0 <= index < N. Whole rows are gathered by `embedding`.
"""

from functools import partial
from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, f32, i32, tiles, whole

from .record import EXACT, NUMPY_DTYPES, Arguments, Array, Case, LibraryKernel, Shape, normal, torch_view, unwritten

M, N, K = sp.dims("M N K")


def transpose_reference(arguments: Arguments) -> dict[str, Array]:
    return {"y": arguments["x"].T}


def make_transpose(dtype: Any) -> Any:
    """The kernel for elements of that dtype."""

    @sp.kernel(name=f"transpose_{dtype.name}")
    def transpose(x: Tensor[dtype, M, N], y: Tensor[dtype, N, M]):
        for m, n in tiles(M, N):
            y[n, m] = x[m, n]

    return transpose


def gather_reference(arguments: Arguments) -> dict[str, Array]:
    return {"y": np.take_along_axis(arguments["x"], arguments["index"].astype(np.int64), axis=1)}


def make_gather(dtype: Any) -> Any:
    """The kernel for elements of that dtype."""

    @sp.kernel(name=f"gather_{dtype.name}")
    def gather(x: Tensor[dtype, M, N], index: Tensor[i32, M, K], y: Tensor[dtype, M, K]):
        for m in tiles(M):
            k = whole(K)
            y[m, k] = x[m, index[m, k]]

    return gather


def transpose_arguments(random: "np.random.Generator", shape: Shape, dtype: str) -> Arguments:
    m, n = shape["M"], shape["N"]
    return {"x": normal(random, m, n, dtype=dtype), "y": unwritten(n, m, dtype=dtype)}


def gather_arguments(random: "np.random.Generator", shape: Shape, dtype: str) -> Arguments:
    m, n, k = shape["M"], shape["N"], shape["K"]
    return {"x": normal(random, m, n, dtype=dtype), "index": random.integers(0, n, (m, k)).astype(np.int32),
            "y": unwritten(m, k, dtype=dtype)}


def transpose_torch(arguments: Arguments) -> Any:
    x, out = torch_view(arguments["x"]), torch_view(np.empty_like(arguments["y"]))
    return lambda: out.copy_(x.T)


def gather_torch(arguments: Arguments) -> Any:
    import torch

    x, index = torch_view(arguments["x"]), torch_view(arguments["index"].astype(np.int64))
    return lambda: torch.gather(x, 1, index)


def _transpose(kernel: Any, dtype: str) -> LibraryKernel:
    return LibraryKernel(
        name=kernel.name,
        kernel=kernel,
        reference=transpose_reference,
        make_arguments=partial(transpose_arguments, dtype=dtype),
        tolerance=EXACT,
        cases=tuple(
            Case({"M": m, "N": n}, flops=0, bytes=2 * NUMPY_DTYPES[dtype].itemsize * m * n)
            for m, n in ((512, 576), (4096, 4096))
        ),
        check_shapes=({"M": 0, "N": 4}, {"M": 1, "N": 1}, {"M": 3, "N": 17}, {"M": 21, "N": 34}, {"M": 130, "N": 70}),
        dtype=dtype,
        peers={"torch": transpose_torch},
    )


def _gather(kernel: Any, dtype: str) -> LibraryKernel:
    size = NUMPY_DTYPES[dtype].itemsize
    return LibraryKernel(
        name=kernel.name,
        kernel=kernel,
        reference=gather_reference,
        make_arguments=partial(gather_arguments, dtype=dtype),
        tolerance=EXACT,
        cases=(Case({"M": 512, "N": 1024, "K": 256}, flops=0, bytes=512 * (1024 * size + 256 * (size + 4))),),
        check_shapes=({"M": 0, "N": 4, "K": 2}, {"M": 1, "N": 1, "K": 1}, {"M": 3, "N": 17, "K": 5},
                      {"M": 5, "N": 100, "K": 34}),
        dtype=dtype,
        peers={"torch": gather_torch},
    )


KERNELS = (
    _transpose(make_transpose(f32), "f32"), _transpose(make_transpose(bf16), "bf16"),
    _gather(make_gather(f32), "f32"), _gather(make_gather(bf16), "bf16"),
)
