"""Many matrix products in one launch, with weights [out, in] as checkpoints hold them.

    batched_matmul_nt   c[b] = a[b] @ w[b].T for every b
    masked_matmul_nt    the same for the first rows[b] rows of a[b] alone; those that follow are neither read nor
                        written. So lie the tokens of each expert where every expert has room for the most of them.

Tokens that lie expert after expert are multiplied by `grouped_matmul` (sapper/kernels/moe.py). f32, bf16 by bf16 with
sums in f32, and i8 by i8 with sums in i32.
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, each, f32, i8, i32, span, tiles, zeros

from .record import NUMPY_DTYPES, Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

B, M, N, K = sp.dims("B M N K")


def make_batched_matmul_nt(dtype: Any, result: Any, name: str) -> Any:
    @sp.kernel(name=f"batched_matmul_nt_{name}")
    def batched_matmul_nt(a: Tensor[dtype, B, M, K], w: Tensor[dtype, B, N, K], c: Tensor[result, B, M, N]):
        for b in each(B):
            for m, n in tiles(M, N):
                acc = zeros(m, n, dtype=result)
                for k in tiles(K):
                    acc += a[b, m, k] @ w[b, n, k]
                c[b, m, n] = acc

    return batched_matmul_nt


def make_masked_matmul_nt(dtype: Any, result: Any, name: str) -> Any:
    @sp.kernel(name=f"masked_matmul_nt_{name}")
    def masked_matmul_nt(
        a: Tensor[dtype, B, M, K], rows: Tensor[i32, B], w: Tensor[dtype, B, N, K], c: Tensor[result, B, M, N]
    ):
        for b in each(B):
            for m, n in tiles(span(0, rows[b]), N):
                acc = zeros(m, n, dtype=result)
                for k in tiles(K):
                    acc += a[b, m, k] @ w[b, n, k]
                c[b, m, n] = acc

    return masked_matmul_nt


TYPES = {"f32": (f32, f32), "bf16_bf16": (bf16, f32), "i8": (i8, i32)}
BATCHED = {name: make_batched_matmul_nt(*types, name) for name, types in TYPES.items()}
MASKED = {name: make_masked_matmul_nt(*types, name) for name, types in TYPES.items()}


def reference(arguments: Arguments) -> dict[str, Array]:
    c = arguments["a"].astype(np.float64) @ arguments["w"].astype(np.float64).transpose(0, 2, 1)
    if "rows" in arguments:
        unwritten_rows = np.arange(c.shape[1]) >= arguments["rows"][:, None]
        c[unwritten_rows] = arguments["c"][unwritten_rows]
    return {"c": c}


def rows_of(groups: int, most: int) -> Array:
    """Rows of masked groups: of three, one is full, one empty, and one has a ragged half."""
    rows: Array = np.array([(most, 0, most // 2 + most % 2)[group % 3] for group in range(groups)], np.int32)
    return rows


def make_arguments(random: "np.random.Generator", shape: Shape, dtype: str, masked: bool) -> Arguments:
    b, m, n, k = (shape[name] for name in "BMNK")
    if dtype == "i8":
        arguments: Arguments = {"a": random.integers(-128, 128, (b, m, k)).astype(np.int8)}
        weights: Array = random.integers(-128, 128, (b, n, k)).astype(np.int8)
    else:
        arguments = {"a": normal(random, b, m, k, dtype=dtype)}
        weights = normal(random, b, n, k, dtype=dtype, scale=1.0 / np.sqrt(k + 1.0))
    if masked:
        arguments["rows"] = rows_of(b, m)
    return arguments | {"w": weights, "c": unwritten(b, m, n, dtype="i32" if dtype == "i8" else "f32")}


def torch_peer(arguments: Arguments) -> Any:
    """In the type of the operands."""
    import torch

    def tensor(array: Array) -> Any:
        if array.dtype == NUMPY_DTYPES["bf16"]:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    a, w = tensor(arguments["a"]), tensor(arguments["w"]).transpose(1, 2)
    out = torch.empty(arguments["c"].shape, dtype=a.dtype)
    return lambda: torch.bmm(a, w, out=out)


def _entry(name: str, masked: bool) -> LibraryKernel:
    dtype = name.split("_")[0]
    size = 1 if dtype == "i8" else NUMPY_DTYPES[dtype].itemsize
    shape = dict(zip("BMNK", (16, 128, 512, 512), strict=True))
    b, m, n, k = shape.values()
    used = rows_of(b, m) if masked else np.full(b, m)
    rows, groups = int(used.sum()), int((used > 0).sum())
    return LibraryKernel(
        name=f"{'masked' if masked else 'batched'}_matmul_nt_{name}", kernel=(MASKED if masked else BATCHED)[name],
        reference=reference, make_arguments=lambda random, shape: make_arguments(random, shape, dtype, masked),
        tolerance=Tolerance(0.0, 0.0, "sums of integers are exact") if dtype == "i8" else Tolerance(
            1e-5, 2e-5, "a sum of K rounded products near 1 / sqrt(K) in any order: near 2**-24 * sqrt(K) in practice"),
        cases=(Case(shape, flops=2 * rows * n * k,
                    bytes=size * k * (rows + groups * n) + 4 * rows * n + (4 * b if masked else 0)),),
        check_shapes=tuple(dict(zip("BMNK", extents, strict=True)) for extents in (
            (0, 3, 4, 5), (2, 0, 3, 4), (2, 3, 4, 0), (1, 1, 1, 1), (4, 5, 7, 3), (3, 30, 70, 33), (7, 17, 33, 66))),
        dtype=dtype, products={"f32": "f32", "bf16": "bf16", "i8": "i8"}[dtype],
        peers={} if masked or dtype == "i8" else {"torch": torch_peer},
    )


KERNELS = tuple(_entry(name, masked) for masked in (False, True) for name in TYPES)
