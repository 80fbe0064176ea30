"""Embedding lookup: row tokens[t] of a table becomes row t of the activations, widened to f32.

`embedding_panels` takes a table that was packed for products (sapper.pack): row v is column v % W of panel v / W.
`embedding_pairs_bf16` takes one whose elements are packed in pairs besides, for products of bf16.

The caller sees to it that 0 <= tokens[t] < V; the kernel cannot afford to.
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, each, f32, i32, tiles

from .record import EXACT, NUMPY_DTYPES, Arguments, Array, Case, LibraryKernel, Shape, normal, unwritten

J, T, V, E, P, W = sp.dims("J T V E P W")


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


def make_embedding_panels(table_dtype: Any) -> Any:
    """The kernel for a table of that dtype in panels."""

    @sp.kernel(name=f"embedding_panels_{table_dtype.name}")
    def embedding_panels(tokens: Tensor[i32, T], table: Tensor[table_dtype, P, E, W], y: Tensor[f32, T, E]):
        for t in each(T):
            token = tokens[t]
            panel, column = token // W.to(i32), token % W.to(i32)
            for e in tiles(E):
                y[t, e] = table[panel, e, column].to(f32)

    return embedding_panels


@sp.kernel
def embedding_pairs_bf16(tokens: Tensor[i32, T], table: Tensor[bf16, P, J, W, 2], y: Tensor[f32, T, J, 2]):
    for t in each(T):
        token = tokens[t]
        panel, column = token // W.to(i32), token % W.to(i32)
        for j, e in tiles(J, 2):
            y[t, j, e] = table[panel, j, column, e].to(f32)


embedding_f32 = make_embedding(f32)
embedding_bf16 = make_embedding(bf16)
embedding_panels_f32 = make_embedding_panels(f32)
embedding_panels_bf16 = make_embedding_panels(bf16)


def make_arguments(random: "np.random.Generator", shape: Shape, dtype: str) -> Arguments:
    t, v, e = shape["T"], shape["V"], shape["E"]
    tokens = random.integers(0, v, t).astype(np.int32)
    return {"tokens": tokens, "table": normal(random, v, e, dtype=dtype), "y": unwritten(t, e)}


def numpy_peer(arguments: Arguments) -> Any:
    tokens, table, out = arguments["tokens"], arguments["table"], np.empty_like(arguments["y"])

    def run() -> None:
        out[...] = table[tokens]

    return run


def panels_reference(arguments: Arguments) -> dict[str, Array]:
    panels, features, width = arguments["table"].shape
    table = arguments["table"].swapaxes(1, 2).reshape(panels * width, features)
    return {"y": table[arguments["tokens"]].astype(np.float32)}


def make_panels_arguments(random: "np.random.Generator", shape: Shape, dtype: str) -> Arguments:
    t, p, e, w = (shape[name] for name in "TPEW")
    tokens = random.integers(0, p * w, t).astype(np.int32)
    return {"tokens": tokens, "table": normal(random, p, e, w, dtype=dtype), "y": unwritten(t, e)}


def pairs_reference(arguments: Arguments) -> dict[str, Array]:
    panels, pairs, width, two = arguments["table"].shape
    table = arguments["table"].swapaxes(1, 2).reshape(panels * width, pairs, two)
    return {"y": table[arguments["tokens"]].astype(np.float32)}


def make_pairs_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    t, p, j, w = (shape[name] for name in "TPJW")
    tokens = random.integers(0, p * w, t).astype(np.int32)
    return {"tokens": tokens, "table": normal(random, p, j, w, 2, dtype="bf16"), "y": unwritten(t, j, 2)}


def _pairs_entry() -> LibraryKernel:
    return LibraryKernel(
        name="embedding_pairs_bf16",
        kernel=embedding_pairs_bf16,
        reference=pairs_reference,
        make_arguments=make_pairs_arguments,
        tolerance=EXACT,
        # Of each line of memory one pair is used.
        cases=tuple(Case({"T": t, "P": p, "J": j, "W": w}, flops=0, bytes=t * (4 + j * (64 + 8)))
                    for t, p, j, w in ((1, 1536, 288, 32), (512, 1536, 288, 32))),
        check_shapes=({"T": 0, "P": 3, "J": 4, "W": 32}, {"T": 1, "P": 1, "J": 1, "W": 1},
                      {"T": 5, "P": 3, "J": 35, "W": 16}, {"T": 9, "P": 2, "J": 65, "W": 32}),
        dtype="bf16",
    )


def _panels_entry(kernel: Any, dtype: str) -> LibraryKernel:
    return LibraryKernel(
        name=f"embedding_panels_{dtype}",
        kernel=kernel,
        reference=panels_reference,
        make_arguments=lambda random, shape: make_panels_arguments(random, shape, dtype),
        tolerance=EXACT,
        # Of each line of memory one element is used.
        cases=tuple(Case({"T": t, "P": p, "E": e, "W": w}, flops=0, bytes=t * (4 + e * (64 + 4)))
                    for t, p, e, w in ((1, 1536, 576, 32), (512, 1536, 576, 32))),
        check_shapes=({"T": 0, "P": 3, "E": 4, "W": 32}, {"T": 1, "P": 1, "E": 1, "W": 1},
                      {"T": 5, "P": 3, "E": 35, "W": 16}, {"T": 9, "P": 2, "E": 130, "W": 32}),
        dtype=dtype,
    )


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


KERNELS = (
    _entry(embedding_f32, "f32"), _entry(embedding_bf16, "bf16"),
    _panels_entry(embedding_panels_f32, "f32"), _panels_entry(embedding_panels_bf16, "bf16"),
    _pairs_entry(),
)
