"""Causal attention over a KV cache, with grouped heads and an online softmax (Milakov and Gimelshein, 2018).

q [T, H, G, D]: the queries of T new tokens, token t at position + t. H key/value heads serve G query heads each, as
query head h * G + g does belong to key/value head h. keys, values [H, P, D]: the cache, of which positions
0 ... position + T - 1 are filled. out [T, H, G, D]. Query t sees the positions 0 ... position + t.

`attention` walks blocks of queries (prefill); a block ends its walk over the cache at the last position that one of
its queries sees, so a small block skips more of what is masked. `attention_rounded` is the same in products of bf16: it
rounds queries and the weights of the softmax, as PyTorch and FlashAttention do, and sums in f32. `attention_decode` is
for one token: the G heads that share a key/value head form the tile, so that the cache is read once;
`attention_decode_split` shares out its positions too.

The running maximum starts at minus infinity. The first tile of positions always holds position 0, which every query
sees, so after it the maximum is finite and no difference of infinities arises.
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import (
    Tensor,
    bf16,
    each,
    exp,
    exp2,
    f32,
    full,
    i32,
    max,
    min,
    span,
    sum,
    tiles,
    where,
    whole,
    zeros,
)

from .online_softmax import attend, join
from .record import NUMPY_DTYPES, Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

T, H, G, D, P, B = sp.dims("T H G D P B")
MINUS_INFINITY = float("-inf")
LOG2_E = 1.4426950408889634
QUERY_BLOCK, WIDE_QUERY_BLOCK = 32, 64
"""Queries that meet a position together; of long heads in products of bf16 more: on tile registers of a Granite Rapids
64 of 128 features take 0.80 of the time of 32, of 64 features 1.03 to 1.07 (on vectors 1.01 to 1.03, and 1.06); and on
sm_90a they are what a group of warps multiplies."""
DECODE_SPLIT = 2048
"""Positions of a split: each begins two streams from memory, which takes its time."""


def reference(arguments: Arguments) -> dict[str, Array]:
    q = arguments["q"].astype(np.float64)
    if q.ndim == 3:
        q = q[None]
    count, position = q.shape[0], arguments["position"]
    keys = arguments["keys"][:, : position + count].astype(np.float64)
    values = arguments["values"][:, : position + count].astype(np.float64)
    score = np.einsum("thgd,hpd->thgp", q, keys) * arguments["scale"]
    visible = np.arange(position + count)[None, :] <= position + np.arange(count)[:, None]
    score = np.where(visible[:, None, None, :], score, -np.inf)
    weight = np.exp(score - score.max(axis=-1, keepdims=True, initial=-np.inf))
    weight /= weight.sum(axis=-1, keepdims=True)
    out = np.einsum("thgp,hpd->thgd", weight, values)
    return {"out": out if arguments["q"].ndim == 4 else out[0]}


def attend_queries(q: Any, keys: Any, values: Any, out: Any, row: Any, base: Any, position: Any, first: Any, stop: Any,
                   h: Any, g: Any, scale: Any, activation: Any, products: Any) -> None:
    """What the queries first ... stop - 1 of a sequence find, for one head.

    Query t is row + t of q, and stands at position + t; position p of the sequence is base + p of keys and values.
    Scores are scale times products, of which the weights are powers of e: powers of two of LOG2_E times them, as these
    take fewer instructions.
    """
    for t in tiles(span(first, stop)):
        d = whole(D)
        query = (q[row + t, h, g, d].to(f32) * (scale * LOG2_E)).to(products)
        highest = full(t, value=MINUS_INFINITY, dtype=f32)
        total = zeros(t, dtype=f32)
        acc = zeros(t, d, dtype=f32)
        for p in tiles(span(0, position + stop)):
            score = where(p <= position + t, query @ keys[h, base + p, d], MINUS_INFINITY)
            highest, total, acc = attend(highest, total, acc, score, values[h, base + p, d], p, exp2, products)
        out[row + t, h, g, d] = (acc * (1.0 / total)).to(activation)


def make_attention(name: str, cache: Any, activation: Any = f32, products: Any = f32) -> Any:
    """The kernel for a cache of that dtype, and for queries and results of another.

    products: f32, or bf16, to which queries and weights are then rounded.
    """
    rounded = products is not f32

    @sp.kernel(name=name, specialise="D")
    def attention(
        q: Tensor[activation, T, H, G, D], keys: Tensor[cache, H, P, D], values: Tensor[cache, H, P, D], position: i32,
        scale: f32, out: Tensor[activation, T, H, G, D],
    ):
        for h, g in each(H, G):
            size = max(min(D // 2, WIDE_QUERY_BLOCK), QUERY_BLOCK) if rounded else QUERY_BLOCK
            for block in each((T + size - 1) // size, disjoint=True):
                first = block * size
                attend_queries(q, keys, values, out, 0, 0, position, first, min(first + size, T), h, g, scale,
                               activation, products)

    return attention


def make_attention_decode(cache: Any) -> Any:
    """The kernel for one token and a cache of that dtype; q and out [H, G, D]."""

    @sp.kernel(name=f"attention_decode_{cache.name}", specialise="G D")
    def attention_decode(
        q: Tensor[f32, H, G, D], keys: Tensor[cache, H, P, D], values: Tensor[cache, H, P, D], position: i32,
        scale: f32, out: Tensor[f32, H, G, D],
    ):
        for h in each(H):
            for g in tiles(G):
                d = whole(D)
                query = q[h, g, d]
                highest = full(g, value=MINUS_INFINITY, dtype=f32)
                total = zeros(g, dtype=f32)
                acc = zeros(g, d, dtype=f32)
                for p in tiles(span(0, position + 1)):
                    score = (query @ keys[h, p, d]) * scale
                    highest, total, acc = attend(highest, total, acc, score, values[h, p, d], p, exp, f32)
                out[h, g, d] = acc / total

    return attention_decode


def make_attention_decode_split(cache: Any) -> Any:
    """The same for a long cache: all cores share the positions, DECODE_SPLIT at a time.

    highest, total [B, H, G], partial [B, H, G, D]: what each split leaves, for B of at least position // DECODE_SPLIT
    + 1 splits: the maximum of its scores (in powers of two), the sum of its weights, and that of its weighted values.
    They are joined when all are there.
    """

    @sp.kernel(name=f"attention_decode_split_{cache.name}", specialise="G D")
    def attention_decode_split(
        q: Tensor[f32, H, G, D], keys: Tensor[cache, H, P, D], values: Tensor[cache, H, P, D], position: i32,
        scale: f32, highest: Tensor[f32, B, H, G], total: Tensor[f32, B, H, G], partial: Tensor[f32, B, H, G, D],
        out: Tensor[f32, H, G, D],
    ):
        for h, b in each(H, position // DECODE_SPLIT + 1):
            g, d = whole(G), whole(D)
            p = whole(span(b * DECODE_SPLIT, min(b * DECODE_SPLIT + DECODE_SPLIT, position + 1)))
            score = (q[h, g, d] @ keys[h, p, d]) * (scale * LOG2_E)
            top = max(score, over=p)
            weight = exp2(score - top)
            highest[b, h, g] = top
            total[b, h, g] = sum(weight, over=p)
            partial[b, h, g, d] = weight @ values[h, p, d]
        for h, g in each(H, G):
            d = whole(D)
            top = zeros(dtype=f32) + MINUS_INFINITY
            sums = zeros(dtype=f32)
            acc = zeros(d, dtype=f32)
            for b in range(position // DECODE_SPLIT + 1):
                top, sums, acc = join(top, sums, acc, highest[b, h, g], total[b, h, g], partial[b, h, g, d], exp2)
            out[h, g, d] = acc / sums

    return attention_decode_split


attention_f32 = make_attention("attention_f32", f32)
attention_bf16 = make_attention("attention_bf16", bf16)
attention_rounded_f32 = make_attention("attention_rounded_f32", bf16, products=bf16)
attention_rounded_bf16 = make_attention("attention_rounded_bf16", bf16, activation=bf16, products=bf16)
attention_decode_split_f32 = make_attention_decode_split(f32)
attention_decode_split_bf16 = make_attention_decode_split(bf16)
attention_decode_f32 = make_attention_decode(f32)
attention_decode_bf16 = make_attention_decode(bf16)


def torch_peer(arguments: Arguments) -> Any:
    """PyTorch's own, on heads laid out and repeated as it wants them. A bf16 cache makes it compute in bf16."""
    import torch

    def tensor(array: Array) -> Any:
        narrow = array.dtype == NUMPY_DTYPES["bf16"]
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if narrow else torch.from_numpy(array)

    q = arguments["q"]
    q = q if q.ndim == 4 else q[None]
    count, heads, group, depth = q.shape
    position = arguments["position"]
    keys, values = (tensor(arguments[name][:, : position + count]).repeat_interleave(group, 0)[None]
                    for name in ("keys", "values"))
    query = tensor(q).permute(1, 2, 0, 3).reshape(1, heads * group, count, depth).to(keys.dtype).contiguous()
    visible = torch.ones(count, position + count, dtype=torch.bool).tril(position)
    options = {"is_causal": True} if not position else {} if count == 1 else {"attn_mask": visible}
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(query, keys, values, scale=arguments["scale"], **options)


def make_arguments(random: "np.random.Generator", shape: Shape, cache: str, decode: bool,
                   activation: str = "f32") -> Arguments:
    """Positions of the cache that are not filled hold NaN, so that reading one is found."""
    h, g, d, position = shape["H"], shape["G"], shape["D"], shape["position"]
    count = 1 if decode else shape["T"]
    filled, capacity = position + count, position + count + 5
    keys, values = (normal(random, h, capacity, d, dtype=cache) for _ in range(2))
    keys[:, filled:] = np.nan
    values[:, filled:] = np.nan
    extents = (h, g, d) if decode else (count, h, g, d)
    return {
        "q": normal(random, *extents, dtype=activation), "keys": keys, "values": values, "position": position,
        "scale": d**-0.5, "out": unwritten(*extents, dtype=activation),
    }


def case(t: int, h: int, g: int, d: int, position: int, cache_size: int, decode: bool, size: int = 4) -> Case:
    """flops: two products over the visible pairs of query and position; bytes: q, out (of `size` bytes an element) and
    the filled cache once."""
    pairs = t * position + t * (t + 1) // 2
    shape = {"H": h, "G": g, "D": d, "position": position}
    moved = 2 * size * t * h * g * d + 2 * cache_size * h * (position + t) * d
    return Case(shape if decode else {"T": t, **shape}, flops=4 * pairs * h * g * d, bytes=moved)


EXACT_PRODUCTS = Tolerance(2e-5, 5e-6, "scores of a few units are rounded to f32 and exp makes that relative; the sums "
                           "run in any order and values cancel")
ROUNDED_PRODUCTS = {
    "f32": Tolerance(2.0**-7, 2.0**-6, "a query rounded to bf16 moves a score of a few units by some 2**-8 at most, "
                     "and exp makes that relative; weights are rounded by 2**-9; values of a few units cancel"),
}
ROUNDED_PRODUCTS["bf16"] = Tolerance(2.0**-6, 2.0**-6, f"{ROUNDED_PRODUCTS['f32'].reason}; the result is rounded too")


def split_arguments(random: "np.random.Generator", shape: Shape, cache: str) -> Arguments:
    made = make_arguments(random, shape, cache, True)
    h, g, d, splits = shape["H"], shape["G"], shape["D"], shape["position"] // DECODE_SPLIT + 1
    out = made.pop("out")
    return {**made, "highest": unwritten(splits, h, g), "total": unwritten(splits, h, g),
            "partial": unwritten(splits, h, g, d), "out": out}


def _split_entry(kernel: Any, cache: str) -> LibraryKernel:
    return LibraryKernel(
        name=kernel.name,
        kernel=kernel,
        reference=reference,
        make_arguments=lambda random, shape: split_arguments(random, shape, cache),
        tolerance=EXACT_PRODUCTS,
        cases=tuple(case(1, h, g, 128, 8191, NUMPY_DTYPES[cache].itemsize, True) for h, g in ((16, 1), (8, 4))),
        check_shapes=(
            {"H": 1, "G": 1, "D": 1, "position": 0}, {"H": 2, "G": 3, "D": 5, "position": 6},
            {"H": 2, "G": 1, "D": 64, "position": DECODE_SPLIT},
            {"H": 1, "G": 7, "D": 64, "position": 3 * DECODE_SPLIT + 18},
            {"H": 1, "G": 4, "D": 128, "position": DECODE_SPLIT - 1},
        ),
        dtype=cache,
        peers={"torch": torch_peer},
    )


def _entry(kernel: Any, cache: str, decode: bool, rounded: bool = False, activation: str = "f32") -> LibraryKernel:
    cache_size, size = NUMPY_DTYPES[cache].itemsize, NUMPY_DTYPES[activation].itemsize
    extents: tuple[tuple[int, int, int, int, int], ...] = ((512, 3, 3, 64, 0), (512, 8, 4, 128, 512))
    if decode:
        extents = ((1, 3, 3, 64, 511), (1, 8, 4, 128, 4095))
    if rounded:
        extents += ((2048, 32, 1, 128, 0),)
    shapes: tuple[dict[str, int], ...] = (
        {"H": 1, "G": 1, "D": 1, "position": 0}, {"H": 2, "G": 3, "D": 5, "position": 6},
        {"H": 3, "G": 3, "D": 64, "position": 33},
    )
    if not decode:
        shapes = tuple({"T": t, **shape} for t, shape in zip((1, 7, 20), shapes, strict=True))
        shapes += ({"T": 0, "H": 1, "G": 1, "D": 4, "position": 0}, {"T": 9, "H": 1, "G": 2, "D": 16, "position": 0})
    return LibraryKernel(
        name=kernel.name,
        kernel=kernel,
        reference=reference,
        make_arguments=lambda random, shape: make_arguments(random, shape, cache, decode, activation),
        tolerance=ROUNDED_PRODUCTS[activation] if rounded else EXACT_PRODUCTS,
        cases=tuple(case(*extent, cache_size, decode, size) for extent in extents),
        check_shapes=shapes,
        dtype=activation if rounded else cache,
        products="bf16" if rounded else "f32",
        peers={"torch": torch_peer},
    )


KERNELS = (
    _entry(attention_f32, "f32", False),
    _entry(attention_bf16, "bf16", False),
    _entry(attention_rounded_f32, "bf16", False, True),
    _entry(attention_rounded_bf16, "bf16", False, True, "bf16"),
    _entry(attention_decode_f32, "f32", True),
    _entry(attention_decode_bf16, "bf16", True),
    _split_entry(attention_decode_split_f32, "f32"),
    _split_entry(attention_decode_split_bf16, "bf16"),
)
