"""Causal attention whose queries, cache and results have 16 bits, for heads of a fixed size.

q [T, H, G, D], keys [H, P, D], values [H, P, E], out [T, H, G, E]: as in attention.py. Scores and sums are f32; weights
are rounded to the type of the values before they multiply these, so that both products can run on matrix instructions
(FlashAttention-2, Dao, 2023). `scale` is by what scores are multiplied before they are exponents of 2:
log2(e) / sqrt(D).
"""

from typing import Any

import ml_dtypes
import numpy as np

import sapper as sp
from sapper import Tensor, bf16, each, exp2, f32, full, i32, min, span, tiles, where, whole, zeros

from . import attention as plain
from .online_softmax import attend
from .record import NUMPY_DTYPES, Arguments, Array, Case, LibraryKernel, Shape, Tolerance

T, H, G, P = sp.dims("T H G P")
LOG2_E = 1.4426950408889634
MINUS_INFINITY = float("-inf")
QUERY_BLOCK = 128
NUMPY = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


def make_attention(narrow: Any, depth: int, width: int) -> Any:
    """The kernel for elements of that dtype, `depth` of them in a key and `width` in a value."""
    shape = f"{depth}" if depth == width else f"{depth}x{width}"

    @sp.kernel(name=f"attention_{narrow.name}_{shape}")
    def attention(
        q: Tensor[narrow, T, H, G, depth], keys: Tensor[narrow, H, P, depth], values: Tensor[narrow, H, P, width],
        position: i32, scale: f32, out: Tensor[narrow, T, H, G, width],
    ):
        for h, g in each(H, G):
            for block in each((T + QUERY_BLOCK - 1) // QUERY_BLOCK, disjoint=True):
                first = block * QUERY_BLOCK
                stop = min(first + QUERY_BLOCK, T)
                for t in tiles(span(first, stop)):
                    d = whole(depth)
                    e = whole(width)
                    highest = full(t, value=MINUS_INFINITY, dtype=f32)
                    total = zeros(t, dtype=f32)
                    acc = zeros(t, e, dtype=f32)
                    for p in tiles(span(0, position + stop)):
                        score = (q[t, h, g, d] @ keys[h, p, d]) * scale
                        visible = where(p <= position + t, score, MINUS_INFINITY)
                        highest, total, acc = attend(highest, total, acc, visible, values[h, p, e], p, exp2, narrow)
                    out[t, h, g, e] = (acc / total).to(narrow)

    return attention


attention_bf16_64 = make_attention(bf16, 64, 64)
attention_bf16_128 = make_attention(bf16, 128, 128)
attention_f16_128 = make_attention(sp.f16, 128, 128)
attention_bf16_192x128 = make_attention(bf16, 192, 128)


def reference(arguments: Arguments) -> dict[str, Array]:
    return plain.reference(arguments | {"scale": arguments["scale"] / LOG2_E})


def make_arguments(random: "np.random.Generator", shape: Shape, dtype: str, depth: int, width: int) -> Arguments:
    """Positions of the cache that are not filled hold NaN, so that reading one is found."""
    count, h, g, position = (shape[name] for name in ("T", "H", "G", "position"))
    filled, capacity = position + count, position + count + 5

    def made(*extents: int) -> Array:
        return random.standard_normal(extents, dtype=np.float32).astype(NUMPY[dtype])

    q, keys, values = made(count, h, g, depth), made(h, capacity, depth), made(h, capacity, width)
    keys[:, filled:] = np.nan
    values[:, filled:] = np.nan
    return {"q": q, "keys": keys, "values": values, "position": position, "scale": LOG2_E * depth**-0.5,
            "out": np.full((count, h, g, width), np.nan, NUMPY[dtype])}


def torch_peer(arguments: Arguments) -> Any:
    """PyTorch's own; see attention.torch_peer. Its f16 is not compared: it runs in f32 on CPUs."""
    return plain.torch_peer(arguments | {"q": arguments["q"].astype(np.float32),
                                         "scale": arguments["scale"] / LOG2_E})


def case(t: int, h: int, g: int, position: int, depth: int, width: int) -> Case:
    """flops: two products over the visible pairs of query and position; bytes: q, out and the filled cache once."""
    pairs = t * position + t * (t + 1) // 2
    return Case({"T": t, "H": h, "G": g, "position": position}, flops=2 * pairs * h * g * (depth + width),
                bytes=2 * (depth + width) * h * (t * g + position + t))


def _entry(kernel: Any, dtype: str, depth: int, width: int) -> LibraryKernel:
    half_ulp = 2.0**-9 if dtype == "bf16" else 2.0**-12
    return LibraryKernel(
        name=kernel.name,
        kernel=kernel,
        reference=reference,
        make_arguments=lambda random, shape: make_arguments(random, shape, dtype, depth, width),
        tolerance=Tolerance(2 * half_ulp, 5 * half_ulp, "each weight and the result are rounded to the narrow type, "
                            "and the weights multiply values of up to five"),
        cases=(case(512, 3, 3, 0, depth, width), case(512, 8, 4, 512, depth, width)),
        check_shapes=({"T": 1, "H": 1, "G": 1, "position": 0}, {"T": 7, "H": 2, "G": 3, "position": 6},
                      {"T": 0, "H": 1, "G": 1, "position": 0}, {"T": 131, "H": 1, "G": 1, "position": 0},
                      {"T": 20, "H": 3, "G": 1, "position": 33}),
        dtype=dtype,
        products="bf16" if dtype == "bf16" else "f32",
        peers={"torch": torch_peer} if dtype in NUMPY_DTYPES and depth == width else {},
    )


KERNELS = (
    _entry(attention_bf16_64, "bf16", 64, 64),
    _entry(attention_bf16_128, "bf16", 128, 128),
    _entry(attention_f16_128, "f16", 128, 128),
    _entry(attention_bf16_192x128, "bf16", 192, 128),
)
