"""Embedding lookup: row tokens[t] of a table becomes row t of the activations, widened to f32.

The caller sees to it that 0 <= tokens[t] < V; the kernel cannot afford to.
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, each, f32, i32, tiles

from .record import EXACT, NUMPY_DTYPES, Arguments, Array, Case, LibraryKernel, Shape, normal, unwritten

T, V, E = sp.dims("T V E")


def reference(arguments: Arguments) -> dict[str, Array]:
    return {"y": arguments["table"][arguments["tokens"]].astype(np.float32)}


def make_embedding(table_dtype: Any) -> Any:
    """The kernel for a table of that dtype."""

    @sp.kernel(name=f"embedding_{table_dtype.name}")
    def embedding(tokens: Tensor[i32, T], table: Tensor[table_dtype, V, E], y: Tensor[f32, T, E]):
        for t in each(T):
            token = tokens[t]
            for e in tiles(E):
                y[t, e] = table[token, e].to(f32)

    return embedding


embedding_f32 = make_embedding(f32)
embedding_bf16 = make_embedding(bf16)


def make_arguments(random: np.random.Generator, shape: Shape, dtype: str) -> Arguments:
    t, v, e = shape["T"], shape["V"], shape["E"]
    tokens = random.integers(0, v, t).astype(np.int32)
    return {"tokens": tokens, "table": normal(random, v, e, dtype=dtype), "y": unwritten(t, e)}


def numpy_peer(arguments: Arguments) -> Any:
    tokens, table, out = arguments["tokens"], arguments["table"], np.empty_like(arguments["y"])

    def run() -> None:
        out[...] = table[tokens]

    return run


def _entry(kernel: Any, dtype: str) -> LibraryKernel:
    size = NUMPY_DTYPES[dtype].itemsize
    return LibraryKernel(
        name=f"embedding_{dtype}",
        kernel=kernel,
        reference=reference,
        make_arguments=lambda random, shape: make_arguments(random, shape, dtype),
        tolerance=EXACT,
        cases=tuple(
            Case({"T": t, "V": v, "E": e}, flops=0, bytes=t * (4 + e * (size + 4))) for t, v, e in ((512, 49152, 576),)
        ),
        check_shapes=(
            {"T": 0, "V": 3, "E": 4}, {"T": 1, "V": 1, "E": 1}, {"T": 5, "V": 11, "E": 35}, {"T": 9, "V": 40, "E": 576}
        ),
        dtype=dtype,
        peers={"numpy": numpy_peer},
    )


KERNELS = (_entry(embedding_f32, "f32"), _entry(embedding_bf16, "bf16"))
