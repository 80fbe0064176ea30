"""Causal attention whose queries, cache and results have 16 bits, for heads of a fixed size.

q [T, H, G, D], keys [H, P, D], values [H, P, E], out [T, H, G, E]: as in attention.py. Scores and sums are f32; weights
are rounded to the type of the values before they multiply these, so that both products can run on matrix instructions
(FlashAttention-2, Dao, 2023). `scale` is by what scores are multiplied before they are exponents of 2:
log2(e) / sqrt(D), or another number above 0.
"""

from typing import Any

import ml_dtypes
import numpy as np

import sapper as sp
from sapper import Tensor, bf16, each, exp2, f32, full, i32, min, span, tiles, where, whole, zeros

from . import attention as plain
from .online_softmax import attend_scaled, join
from .record import NUMPY_DTYPES, Arguments, Array, Case, LibraryKernel, Shape, Tolerance, unwritten

T, H, G, P, B = sp.dims("T H G P B")
LOG2_E = 1.4426950408889634
MINUS_INFINITY = float("-inf")
QUERY_BLOCK = 128
DECODE_SPLIT, HEAD_BLOCK = 256, 32
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
                        score = where(p <= position + t, q[t, h, g, d] @ keys[h, p, d], MINUS_INFINITY)
                        highest, total, acc = attend_scaled(highest, total, acc, score, scale, values[h, p, e], p, exp2,
                                                            narrow)
                    out[t, h, g, e] = (acc * (1.0 / total)).to(narrow)

    return attention


def make_attention_decode(narrow: Any, depth: int) -> Any:
    """The kernel for one token, q [H, G, depth]: the G heads that share a cache are its rows, DECODE_SPLIT positions a
    task. Each split leaves the maximum of its scores in exponents of 2, the sum of its weights, and that of its
    weighted values: highest, total [B, H, G], partial [B, H, G, depth], for `merge_attention` to join."""

    @sp.kernel(name=f"attention_decode_{narrow.name}_{depth}", specialise="G")
    def attention_decode(
        q: Tensor[narrow, H, G, depth], keys: Tensor[narrow, H, P, depth], values: Tensor[narrow, H, P, depth],
        position: i32, scale: f32, highest: Tensor[f32, B, H, G], total: Tensor[f32, B, H, G],
        partial: Tensor[f32, B, H, G, depth],
    ):
        for h, b in each(H, position // DECODE_SPLIT + 1):
            for block in each((G + HEAD_BLOCK - 1) // HEAD_BLOCK, disjoint=True):
                first = block * HEAD_BLOCK
                for g in tiles(span(first, min(first + HEAD_BLOCK, G))):
                    d = whole(depth)
                    e = whole(depth)
                    top = full(g, value=MINUS_INFINITY, dtype=f32)
                    sums = zeros(g, dtype=f32)
                    acc = zeros(g, e, dtype=f32)
                    for p in tiles(span(b * DECODE_SPLIT, min(b * DECODE_SPLIT + DECODE_SPLIT, position + 1))):
                        score = q[h, g, d] @ keys[h, p, d]
                        top, sums, acc = attend_scaled(top, sums, acc, score, scale, values[h, p, e], p, exp2, narrow)
                    highest[b, h, g] = top * scale
                    total[b, h, g] = sums
                    partial[b, h, g, e] = acc

    return attention_decode


def make_merge_attention(narrow: Any, depth: int) -> Any:
    """What the splits left, joined; out [H, G, depth]."""

    @sp.kernel(name=f"merge_attention_{narrow.name}_{depth}")
    def merge_attention(
        highest: Tensor[f32, B, H, G], total: Tensor[f32, B, H, G], partial: Tensor[f32, B, H, G, depth], position: i32,
        out: Tensor[narrow, H, G, depth],
    ):
        for h, g in each(H, G):
            e = whole(depth)
            top = zeros(dtype=f32) + MINUS_INFINITY
            sums = zeros(dtype=f32)
            acc = zeros(e, dtype=f32)
            for b in range(position // DECODE_SPLIT + 1):
                top, sums, acc = join(top, sums, acc, highest[b, h, g], total[b, h, g], partial[b, h, g, e], exp2)
            out[h, g, e] = (acc / sums).to(narrow)

    return merge_attention


attention_bf16_64 = make_attention(bf16, 64, 64)
attention_bf16_128 = make_attention(bf16, 128, 128)
attention_f16_128 = make_attention(sp.f16, 128, 128)
attention_bf16_192x128 = make_attention(bf16, 192, 128)
attention_decode_bf16_128 = make_attention_decode(bf16, 128)
merge_attention_bf16_128 = make_merge_attention(bf16, 128)


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


def splits_of(arguments: Arguments) -> dict[str, Array]:
    """What attention_decode leaves of each split, in f64."""
    q, position = arguments["q"].astype(np.float64), arguments["position"]
    count = position // DECODE_SPLIT + 1
    made = {name: np.empty(arguments[name].shape) for name in ("highest", "total", "partial")}
    for b in range(count):
        keys, values = (arguments[name][:, :position + 1][:, b * DECODE_SPLIT:][:, :DECODE_SPLIT].astype(np.float64)
                        for name in ("keys", "values"))
        score = np.einsum("hgd,hpd->hgp", q, keys) * arguments["scale"]
        made["highest"][b] = score.max(axis=-1)
        weight = np.exp2(score - made["highest"][b][..., None])
        made["total"][b] = weight.sum(axis=-1)
        made["partial"][b] = np.einsum("hgp,hpe->hge", weight, values)
    return made


def joined(arguments: Arguments) -> dict[str, Array]:
    """The same splits as merge_attention joins them, in f64."""
    highest, total, partial = (arguments[name].astype(np.float64) for name in ("highest", "total", "partial"))
    weight = np.exp2(highest - highest.max(axis=0))
    return {"out": (weight[..., None] * partial).sum(axis=0) / (weight * total).sum(axis=0)[..., None]}


def decode_arguments(random: np.random.Generator, shape: Shape, dtype: str, depth: int) -> Arguments:
    """As of attention for one token, with room for its splits."""
    h, g, position = (shape[name] for name in ("H", "G", "position"))
    made = make_arguments(random, {"T": 1, **shape}, dtype, depth, depth)
    count = position // DECODE_SPLIT + 1
    left = {"highest": unwritten(count, h, g), "total": unwritten(count, h, g),
            "partial": unwritten(count, h, g, depth)}
    return {"q": made["q"][0], **{name: made[name] for name in ("keys", "values", "position", "scale")}, **left}


def merge_arguments(random: np.random.Generator, shape: Shape, dtype: str, depth: int) -> Arguments:
    made = decode_arguments(random, shape, dtype, depth)
    splits = {name: value.astype(np.float32) for name, value in splits_of(made).items()}
    return {**splits, "position": shape["position"], "out": np.full(made["q"].shape, np.nan, NUMPY[dtype])}


def _decode_entry(kernel: Any, dtype: str, depth: int, merges: bool) -> LibraryKernel:
    """flops, bytes: of the products, and the filled cache once; of joining, what the splits left."""
    half_ulp = 2.0**-9 if dtype == "bf16" else 2.0**-12
    made = merge_arguments if merges else decode_arguments
    h, g, position = 8, 4, 8191
    left = (position // DECODE_SPLIT + 1) * h * g * (depth + 2)
    work = Case({"H": h, "G": g, "position": position}, flops=3 * left if merges else 4 * position * h * g * depth,
                bytes=4 * left + 2 * h * g * depth if merges else 4 * depth * h * (g + position))
    return LibraryKernel(
        name=kernel.name,
        kernel=kernel,
        reference=joined if merges else splits_of,
        make_arguments=lambda random, shape: made(random, shape, dtype, depth),
        tolerance=Tolerance(
            2 * half_ulp, 2.0**-20, "the result is rounded to the narrow type, which is half an ulp: of a number just "
            "above a power of two twice as much as of one below") if merges else Tolerance(
            2 * half_ulp, 32 * half_ulp, "up to 256 weights of 1 at most are rounded to the narrow type, and multiply "
            "values of a few units that cancel: errors of 16 times one of them are usual"),
        cases=(work,),
        check_shapes=({"H": 1, "G": 1, "position": 0}, {"H": 5, "G": 4, "position": 1}, {"H": 2, "G": 3, "position": 6},
                      {"H": 1, "G": 4, "position": DECODE_SPLIT}, {"H": 2, "G": 8, "position": 2 * DECODE_SPLIT + 33}),
        dtype=dtype,
        products="bf16" if dtype == "bf16" else "f32",
    )


def _entry(kernel: Any, dtype: str, depth: int, width: int) -> LibraryKernel:
    half_ulp = 2.0**-9 if dtype == "bf16" else 2.0**-12
    return LibraryKernel(
        name=kernel.name,
        kernel=kernel,
        reference=reference,
        make_arguments=lambda random, shape: make_arguments(random, shape, dtype, depth, width),
        tolerance=Tolerance(2 * half_ulp, 5 * half_ulp, "each weight and the result are rounded to the narrow type, "
                            "and the weights multiply values of up to five"),
        cases=(case(512, 3, 3, 0, depth, width), case(512, 8, 4, 512, depth, width),
               case(2048, 32, 1, 0, depth, width)),
        check_shapes=({"T": 1, "H": 1, "G": 1, "position": 0}, {"T": 7, "H": 2, "G": 3, "position": 6},
                      {"T": 0, "H": 1, "G": 1, "position": 0}, {"T": 131, "H": 1, "G": 1, "position": 0},
                      {"T": 20, "H": 3, "G": 1, "position": 33}),
        dtype=dtype,
        products="bf16" if dtype == "bf16" else "f32",
        peers={"torch": torch_peer} if dtype in NUMPY_DTYPES and depth == width else {},
    )


PREFILL = (
    _entry(attention_bf16_64, "bf16", 64, 64),
    _entry(attention_bf16_128, "bf16", 128, 128),
    _entry(attention_f16_128, "f16", 128, 128),
    _entry(attention_bf16_192x128, "bf16", 192, 128),
)
KERNELS = (
    *PREFILL,
    _decode_entry(attention_decode_bf16_128, "bf16", 128, False),
    _decode_entry(merge_attention_bf16_128, "bf16", 128, True),
)
