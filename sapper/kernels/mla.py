"""Multi-head latent attention (DeepSeek-V2, 2024): keys and values of all heads in one short vector for each position.

The cache holds, for position p, the latent vector latents[p] of C numbers (512), from which the keys [D] and values [V]
of each of H heads follow by w [H * (D + V), C], the keys of all heads before the values; and the turned key of 2 * R
numbers (64), which all heads share. A query has D numbers that meet the key and 2 * R that meet the shared key.

`compress` writes the cache: the latent vector is normed, queries and shared keys turn by their positions. There are two
ways to attend:

    naive      for many tokens: keys and values of all positions are made (`expand`), then `latent_attention` is
               attention with them, as sapper/kernels/attention.py has it
    absorbed   for one token: q @ (w_key @ latent) = (q @ w_key) @ latent, so queries go into the latent space
               (`absorb`), meet the cache there (`latent_attention_decode`), and come out by `project_values`; for a few
               `latent_attention_rows`, between `absorb_rows` and `project_values_rows` (paged.py)

In `latent_attention_decode` the cores share the positions, SPLIT at a time, so that the cache is read once for all
heads; each split leaves its maximum, its total and its sum, which `merge_splits` joins. In products of bf16
`latent_attention_decode_rounded` does it, LONG_SPLIT positions at a time, for `merge_long_splits`; mla_narrow.py has
the same as a loop over tiles of positions, as matrix instructions of GPUs want it. mla_rounded.py is the naive way in
products of bf16; mla_blocks.py absorbs and projects by weights in blocks.
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
    rsqrt,
    span,
    sum,
    tiles,
    where,
    whole,
    zeros,
)

from .online_softmax import attend, join
from .record import NUMPY_DTYPES, Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten
from .rope import tables, turned

T, H, D, R, S, C, V, P, B, N = sp.dims("T H D R S C V P B N")
MINUS_INFINITY = float("-inf")
LOG2_E, LN_2 = 1.4426950408889634, 0.6931471805599453
QUERY_BLOCK, WIDE_QUERY_BLOCK = 32, 64
"""Queries that meet a position together; in products of bf16 more: on tile registers of a Granite Rapids 512 tokens of
16 heads take 0.88 of the time (on vectors 1.08), and on sm_90a they are what a group of warps multiplies."""
SPLIT, LONG_SPLIT = 128, 256


def make_compress(cache: Any) -> Any:
    """The kernel for a cache of that dtype.

    q [T, H, 2, R]: the part of the queries that turns; latent [T, C], key [T, 2, R]: of new tokens, of which t stands
    at position + t; all may be views. q_turned [T, H, 2, R]. latents, keys: the cache.
    """

    @sp.kernel(name=f"compress_{cache.name}")
    def compress(
        q: Tensor[f32, T, H, 2, R], latent: Tensor[f32, T, C], key: Tensor[f32, T, 2, R], gain: Tensor[f32, C],
        epsilon: f32, cosine: Tensor[f32, P, R], sine: Tensor[f32, P, R], position: i32,
        q_turned: Tensor[f32, T, H, 2, R], latents: Tensor[cache, P, C], keys: Tensor[cache, P, 2, R],
    ):
        for t, h, r in tiles(T, H, R):
            c = cosine[position + t, r]
            s = sine[position + t, r]
            a = q[t, h, 0, r]
            b = q[t, h, 1, r]
            q_turned[t, h, 0, r] = a * c - b * s
            q_turned[t, h, 1, r] = a * s + b * c
        for t in tiles(T):
            i = whole(C)
            row = latent[t, i]
            factor = rsqrt(sum(row * row, over=i) / C.to(f32) + epsilon)
            latents[position + t, i] = (row * factor * gain[i]).to(cache)
        for t, r in tiles(T, R):
            c = cosine[position + t, r]
            s = sine[position + t, r]
            a = key[t, 0, r]
            b = key[t, 1, r]
            keys[position + t, 0, r] = (a * c - b * s).to(cache)
            keys[position + t, 1, r] = (a * s + b * c).to(cache)

    return compress


def make_expand(cache: Any, weight: Any, result: Any = f32, name: str | None = None) -> Any:
    """keys and values of P positions: y[p] = w @ latents[p], w [N, C] with N = H * (D + V)."""

    @sp.kernel(name=name or f"expand_{cache.name}_{weight.name}")
    def expand(latents: Tensor[cache, P, C], w: Tensor[weight, N, C], y: Tensor[result, P, N]):
        for p, n in tiles(P, N):
            acc = zeros(p, n, dtype=f32)
            for c in tiles(C):
                acc += latents[p, c] @ w[n, c]
            y[p, n] = acc.to(result)

    return expand


def attend_expanded(q: Any, q_turned: Any, keys: Any, shared: Any, values: Any, out: Any, row: Any, base: Any,
                    position: Any, first: Any, stop: Any, h: Any, scale: Any, products: Any) -> None:
    """What the queries first ... stop - 1 of a sequence find, for one head; the operands as `attend_queries`
    (attention.py) has them."""
    for t in tiles(span(first, stop)):
        d = whole(D)
        s = whole(S)
        v = whole(V)
        factor = scale * LOG2_E
        query = (q[row + t, h, d] * factor).to(products)
        turn = (q_turned[row + t, h, s] * factor).to(products)
        highest = full(t, value=MINUS_INFINITY, dtype=f32)
        total = zeros(t, dtype=f32)
        acc = zeros(t, v, dtype=f32)
        for p in tiles(span(0, position + stop)):
            score = query @ keys[base + p, h, d] + turn @ shared[base + p, s]
            score = where(p <= position + t, score, MINUS_INFINITY)
            highest, total, acc = attend(highest, total, acc, score, values[base + p, h, v], p, exp2, products)
        out[row + t, h, v] = acc * (1.0 / total)


def make_latent_attention(name: str, cache: Any, products: Any = f32) -> Any:
    """Causal attention of T new tokens over P = position + T positions; shared [P, S]: the turned keys.

    products: the dtype of keys and values: f32, or bf16, to which queries and weights are then rounded.
    """
    rounded = products is not f32

    @sp.kernel(name=name, specialise="D S V")
    def latent_attention(
        q: Tensor[f32, T, H, D], q_turned: Tensor[f32, T, H, S], keys: Tensor[products, P, H, D],
        shared: Tensor[cache, P, S], values: Tensor[products, P, H, V], position: i32, scale: f32,
        out: Tensor[f32, T, H, V],
    ):
        for h in each(H):
            size = WIDE_QUERY_BLOCK if rounded else QUERY_BLOCK
            for block in each((T + size - 1) // size):
                first = block * size
                attend_expanded(q, q_turned, keys, shared, values, out, 0, 0, position, first, min(first + size, T), h,
                                scale, products)

    return latent_attention


def make_absorb(weight: Any) -> Any:
    """Queries of one token in the latent space; w [H, D, C]: the rows of the weights that make keys."""

    @sp.kernel(name=f"absorb_{weight.name}")
    def absorb(q: Tensor[f32, H, D], w: Tensor[weight, H, D, C], y: Tensor[f32, H, C]):
        for h in each(H):
            for c in tiles(C):
                acc = zeros(c, dtype=f32)
                for d in tiles(D):
                    acc += q[h, d] @ w[h, d, c]
                y[h, c] = acc

    return absorb


def make_latent_attention_rows(cache: Any) -> Any:
    """Absorbed attention of a few tokens, of which t stands at position + t: each reads the cache for all heads.

    q, out [T, H, C] in the latent space, q_turned [T, H, S].
    """

    @sp.kernel(name=f"latent_attention_rows_{cache.name}", specialise="H C S")
    def latent_attention_rows(
        q: Tensor[f32, T, H, C], q_turned: Tensor[f32, T, H, S], latents: Tensor[cache, P, C],
        keys: Tensor[cache, P, S], position: i32, scale: f32, out: Tensor[f32, T, H, C],
    ):
        for t in each(T):
            for h in tiles(H):
                c = whole(C)
                s = whole(S)
                query = q[t, h, c] * scale
                turn = q_turned[t, h, s] * scale
                highest = full(h, value=MINUS_INFINITY, dtype=f32)
                total = zeros(h, dtype=f32)
                acc = zeros(h, c, dtype=f32)
                for p in tiles(span(0, position + t + 1)):
                    latent = latents[p, c]
                    score = query @ latent + turn @ keys[p, s]
                    highest, total, acc = attend(highest, total, acc, score, latent, p, exp, f32)
                out[t, h, c] = acc / total

    return latent_attention_rows


def make_latent_attention_decode(cache: Any) -> Any:
    """One token at `position`, splits of SPLIT positions; highest, total [B, H] and partial [B, H, C] for each.

    A cache of fewer positions is one of chosen ones (sparse.py), which is full then; so it is in `merge_splits`.
    """

    @sp.kernel(name=f"latent_attention_decode_{cache.name}", specialise="H C S")
    def latent_attention_decode(
        q: Tensor[f32, H, C], q_turned: Tensor[f32, H, S], latents: Tensor[cache, P, C], keys: Tensor[cache, P, S],
        position: i32, scale: f32, highest: Tensor[f32, B, H], total: Tensor[f32, B, H],
        partial: Tensor[f32, B, H, C],
    ):
        filled = min(position + 1, P)
        for b in each((filled + SPLIT - 1) // SPLIT):
            for h in tiles(H):
                c = whole(C)
                s = whole(S)
                query = q[h, c] * scale
                turn = q_turned[h, s] * scale
                top = full(h, value=MINUS_INFINITY, dtype=f32)
                sums = zeros(h, dtype=f32)
                acc = zeros(h, c, dtype=f32)
                for p in tiles(span(b * SPLIT, min(b * SPLIT + SPLIT, filled))):
                    latent = latents[p, c]
                    score = query @ latent + turn @ keys[p, s]
                    top, sums, acc = attend(top, sums, acc, score, latent, p, exp, f32)
                highest[b, h] = top
                total[b, h] = sums
                partial[b, h, c] = acc

    return latent_attention_decode


@sp.kernel(specialise="H C S")
def latent_attention_decode_rounded(
    q: Tensor[f32, H, C], q_turned: Tensor[f32, H, S], latents: Tensor[bf16, P, C], keys: Tensor[bf16, P, S],
    position: i32, scale: f32, highest: Tensor[f32, B, H], total: Tensor[f32, B, H], partial: Tensor[f32, B, H, C],
):
    """The same in products of bf16: queries and weights are rounded. A split is one tile: nothing is carried."""
    for b in each(position // LONG_SPLIT + 1):
        h = whole(H)
        c = whole(C)
        s = whole(S)
        p = whole(span(b * LONG_SPLIT, min(b * LONG_SPLIT + LONG_SPLIT, position + 1)))
        query = (q[h, c] * (scale * LOG2_E)).to(bf16)
        turn = (q_turned[h, s] * (scale * LOG2_E)).to(bf16)
        score = query @ latents[p, c] + turn @ keys[p, s]
        top = max(score, over=p)
        weight = exp2(score - top)
        highest[b, h] = top * LN_2
        total[b, h] = sum(weight, over=p)
        partial[b, h, c] = weight.to(bf16) @ latents[p, c]


def make_merge_splits(split: int, name: str) -> Any:
    """The kernel for splits of so many positions."""

    @sp.kernel(name=name, specialise="C")
    def merge_splits(
        highest: Tensor[f32, B, H], total: Tensor[f32, B, H], partial: Tensor[f32, B, H, C], position: i32,
        out: Tensor[f32, H, C],
    ):
        """The softmax over all splits of the positions 0 ... position."""
        for h in each(H):
            c = whole(C)
            top = zeros(dtype=f32) + MINUS_INFINITY
            sums = zeros(dtype=f32)
            acc = zeros(c, dtype=f32)
            for b in range(min(position // split + 1, B)):
                top, sums, acc = join(top, sums, acc, highest[b, h], total[b, h], partial[b, h, c], exp)
            out[h, c] = acc / sums

    return merge_splits


def make_project_values(weight: Any) -> Any:
    """What each head found, from the latent space; w [H, V, C]: the rows of the weights that make values."""

    @sp.kernel(name=f"project_values_{weight.name}")
    def project_values(x: Tensor[f32, H, C], w: Tensor[weight, H, V, C], y: Tensor[f32, H, V]):
        for h in each(H):
            for v in tiles(V):
                acc = zeros(v, dtype=f32)
                for c in tiles(C):
                    acc += w[h, v, c] @ x[h, c]
                y[h, v] = acc

    return project_values


compress_f32 = make_compress(f32)
compress_bf16 = make_compress(bf16)
expand_f32_f32 = make_expand(f32, f32)
expand_f32_bf16 = make_expand(f32, bf16)
expand_bf16_f32 = make_expand(bf16, f32)
expand_bf16_bf16 = make_expand(bf16, bf16)
latent_attention_f32 = make_latent_attention("latent_attention_f32", f32)
latent_attention_bf16 = make_latent_attention("latent_attention_bf16", bf16)
absorb_f32 = make_absorb(f32)
absorb_bf16 = make_absorb(bf16)
latent_attention_rows_f32 = make_latent_attention_rows(f32)
latent_attention_rows_bf16 = make_latent_attention_rows(bf16)
latent_attention_decode_f32 = make_latent_attention_decode(f32)
latent_attention_decode_bf16 = make_latent_attention_decode(bf16)
merge_splits = make_merge_splits(SPLIT, "merge_splits")
merge_long_splits = make_merge_splits(LONG_SPLIT, "merge_long_splits")
project_values_f32 = make_project_values(f32)
project_values_bf16 = make_project_values(bf16)

# ------------------------------------------------------------------------------------------- references and arguments


def compress_reference(arguments: Arguments) -> dict[str, Array]:
    latents, keys = arguments["latents"].copy(), arguments["keys"].copy()
    rows = arguments["latent"].astype(np.float64)
    filled = slice(arguments["position"], arguments["position"] + len(rows))
    factor = 1.0 / np.sqrt(np.square(rows).mean(axis=1, keepdims=True) + arguments["epsilon"])
    latents[filled] = (rows * factor * arguments["gain"]).astype(latents.dtype)
    keys[filled] = turned(arguments["key"][:, None], arguments, 2)[:, 0].astype(keys.dtype)
    return {"q_turned": turned(arguments["q"], arguments, 2), "latents": latents, "keys": keys}


def expand_reference(arguments: Arguments) -> dict[str, Array]:
    return {"y": arguments["latents"].astype(np.float64) @ arguments["w"].astype(np.float64).T}


def attention_reference(arguments: Arguments) -> dict[str, Array]:
    names = ("q", "q_turned", "keys", "shared", "values")
    q, q_turned, keys, shared, values = (arguments[name].astype(np.float64) for name in names)
    position, count = arguments["position"], len(q)
    score = np.einsum("thd,phd->thp", q, keys) + np.einsum("ths,ps->thp", q_turned, shared)
    score = score * arguments["scale"]
    visible = np.arange(position + count)[None, :] <= position + np.arange(count)[:, None]
    score = np.where(visible[:, None, :], score, -np.inf)
    weight = np.exp(score - score.max(axis=-1, keepdims=True, initial=-np.inf))
    return {"out": np.einsum("thp,phv->thv", weight / weight.sum(axis=-1, keepdims=True), values)}


def absorb_reference(arguments: Arguments) -> dict[str, Array]:
    return {"y": np.einsum("hd,hdc->hc", arguments["q"].astype(np.float64), arguments["w"].astype(np.float64))}


def rows_reference(arguments: Arguments) -> dict[str, Array]:
    out = np.empty(arguments["out"].shape)
    for t, (query, turn) in enumerate(zip(arguments["q"], arguments["q_turned"], strict=True)):
        seen = slice(arguments["position"] + t + 1)
        latents, keys = (arguments[name][seen].astype(np.float64) for name in ("latents", "keys"))
        score = (query @ latents.T + turn @ keys.T) * arguments["scale"]
        weight = np.exp(score - score.max(axis=1, keepdims=True))
        out[t] = weight / weight.sum(axis=1, keepdims=True) @ latents
    return {"out": out}


def decode_reference(arguments: Arguments, split: int = SPLIT) -> dict[str, Array]:
    """What each split leaves."""
    expected = {name: arguments[name].copy() for name in ("highest", "total", "partial")}
    for b in range(arguments["position"] // split + 1):
        part = slice(b * split, (b + 1) * split if b < arguments["position"] // split else arguments["position"] + 1)
        latents, keys = (arguments[name][part].astype(np.float64) for name in ("latents", "keys"))
        score = (arguments["q"] @ latents.T + arguments["q_turned"] @ keys.T) * arguments["scale"]
        weight = np.exp(score - score.max(axis=1, keepdims=True))
        expected["highest"][b] = score.max(axis=1)
        expected["total"][b] = weight.sum(axis=1)
        expected["partial"][b] = weight @ latents
    return expected


def merge_reference(arguments: Arguments, split: int = SPLIT) -> dict[str, Array]:
    splits = arguments["position"] // split + 1
    highest, total, partial = (arguments[name][:splits].astype(np.float64) for name in ("highest", "total", "partial"))
    weight = np.exp(highest - highest.max(axis=0))
    return {"out": (weight[:, :, None] * partial).sum(axis=0) / (weight * total).sum(axis=0)[:, None]}


def project_reference(arguments: Arguments) -> dict[str, Array]:
    return {"y": np.einsum("hc,hvc->hv", arguments["x"].astype(np.float64), arguments["w"].astype(np.float64))}


def compress_arguments(random: "np.random.Generator", shape: Shape, cache: str) -> Arguments:
    t, h, r, c, position = (shape[name] for name in ("T", "H", "R", "C", "position"))
    cosine, sine = tables(position + t + 3, r)
    joined = normal(random, t, c + 2 * r)
    return {
        "q": normal(random, t, h, 2, r), "latent": joined[:, :c], "key": joined[:, c:].reshape(t, 2, r),
        "gain": normal(random, c), "epsilon": 1e-6, "cosine": cosine, "sine": sine, "position": position,
        "q_turned": unwritten(t, h, 2, r), "latents": normal(random, position + t + 3, c, dtype=cache),
        "keys": normal(random, position + t + 3, 2, r, dtype=cache),
    }


def expand_arguments(
    random: "np.random.Generator", shape: Shape, cache: str, weight: str, result: str = "f32"
) -> Arguments:
    p, n, c = shape["P"], shape["N"], shape["C"]
    w = normal(random, n, c, dtype=weight, scale=1.0 / np.sqrt(c + 1.0))
    return {"latents": normal(random, p, c, dtype=cache), "w": w, "y": unwritten(p, n, dtype=result)}


def attention_arguments(random: "np.random.Generator", shape: Shape, cache: str, expanded_in: str = "f32") -> Arguments:
    t, h, d, s, v, position = (shape[name] for name in ("T", "H", "D", "S", "V", "position"))
    p = position + t
    expanded = normal(random, p, h, d + v, dtype=expanded_in)
    return {
        "q": normal(random, t, h, d), "q_turned": normal(random, t, h, s), "keys": expanded[:, :, :d],
        "shared": normal(random, p, s, dtype=cache), "values": expanded[:, :, d:], "position": position,
        "scale": (d + s) ** -0.5, "out": unwritten(t, h, v),
    }


def absorb_arguments(random: "np.random.Generator", shape: Shape, weight: str) -> Arguments:
    h, d, c = shape["H"], shape["D"], shape["C"]
    w = normal(random, h, d, c, dtype=weight, scale=1.0 / np.sqrt(d + 1.0))
    return {"q": normal(random, h, d), "w": w, "y": unwritten(h, c)}


def decode_arguments(random: "np.random.Generator", shape: Shape, cache: str, split: int = SPLIT) -> Arguments:
    """Positions of the cache that are not filled hold NaN, so that reading one is found."""
    h, c, s, position = (shape[name] for name in ("H", "C", "S", "position"))
    latents, keys = (normal(random, position + 6, extent, dtype=cache) for extent in (c, s))
    latents[position + 1 :] = np.nan
    keys[position + 1 :] = np.nan
    splits = position // split + 1
    return {
        "q": normal(random, h, c), "q_turned": normal(random, h, s), "latents": latents, "keys": keys,
        "position": position, "scale": (c + s) ** -0.5, "highest": unwritten(splits, h),
        "total": unwritten(splits, h), "partial": unwritten(splits, h, c),
    }


def rows_arguments(random: "np.random.Generator", shape: Shape, cache: str) -> Arguments:
    """Positions of the cache that are not filled hold NaN, so that reading one is found."""
    t, h, c, s, position = (shape[name] for name in ("T", "H", "C", "S", "position"))
    latents, keys = (normal(random, position + t + 5, extent, dtype=cache) for extent in (c, s))
    latents[position + t :] = np.nan
    keys[position + t :] = np.nan
    return {
        "q": normal(random, t, h, c), "q_turned": normal(random, t, h, s), "latents": latents, "keys": keys,
        "position": position, "scale": (c + s) ** -0.5, "out": unwritten(t, h, c),
    }


def merge_arguments(random: "np.random.Generator", shape: Shape, split: int = SPLIT) -> Arguments:
    h, c, position = shape["H"], shape["C"], shape["position"]
    splits = position // split + 1
    return {
        "highest": normal(random, splits, h), "total": 1.0 + random.random((splits, h), np.float32),
        "partial": normal(random, splits, h, c), "position": position, "out": unwritten(h, c),
    }


def project_arguments(random: "np.random.Generator", shape: Shape, weight: str) -> Arguments:
    h, v, c = shape["H"], shape["V"], shape["C"]
    w = normal(random, h, v, c, dtype=weight, scale=1.0 / np.sqrt(c + 1.0))
    return {"x": normal(random, h, c), "w": w, "y": unwritten(h, v)}


SUMS = Tolerance(1e-5, 2e-5, "a sum of rounded products near 1 / sqrt(count) in any order")
SOFTMAX = Tolerance(2e-5, 5e-6, "scores of a few units are rounded to f32 and exp makes that relative; the sums run in "
                    "any order and values cancel")
ROUNDED = Tolerance(2.0**-7, 2.0**-3, "queries rounded to bf16 move scores of a few units by some 2**-8, and exp makes "
                    f"that relative; weights are rounded by 2**-9; sums over {LONG_SPLIT} weights, not yet divided by")
UNNORMALISED = Tolerance(2e-5, 5e-5, f"as in attention, over sums of {SPLIT} weights that are not yet divided by")


def _compress_entry(kernel: Any, cache: str) -> LibraryKernel:
    size = NUMPY_DTYPES[cache].itemsize
    rounding = "the norm's sum in any order; two products and their difference, which may cancel, rounded to f32 each"
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=compress_reference,
        make_arguments=lambda random, shape: compress_arguments(random, shape, cache),
        tolerance=Tolerance(2e-6, 1e-6, rounding) if cache == "f32"
        else Tolerance(2.0**-7, 1e-6, f"{rounding}, then once to bf16, where the two may round apart"),
        cases=tuple(
            Case({"T": t, "H": h, "R": r, "C": c, "position": 0}, flops=t * (6 * (h + 1) * r + 4 * c),
                 bytes=t * (16 * h * r + 16 * r + (4 + size) * (c + 2 * r)) + 4 * c)
            for t, h, r, c in ((1, 16, 32, 512), (512, 16, 32, 512))
        ),
        check_shapes=(
            {"T": 0, "H": 1, "R": 2, "C": 3, "position": 0}, {"T": 1, "H": 1, "R": 1, "C": 1, "position": 0},
            {"T": 5, "H": 3, "R": 4, "C": 19, "position": 2}, {"T": 3, "H": 4, "R": 32, "C": 64, "position": 11},
        ),
        dtype=cache,
    )


def expand_entry(
    kernel: Any, cache: str, weight: str, result: str = "f32", tolerance: Tolerance = SUMS
) -> LibraryKernel:
    cache_size, size, made = (NUMPY_DTYPES[name].itemsize for name in (cache, weight, result))
    p, n, c = 512, 4096, 512
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=expand_reference,
        make_arguments=lambda random, shape: expand_arguments(random, shape, cache, weight, result),
        tolerance=tolerance,
        cases=(Case({"P": p, "N": n, "C": c}, flops=2 * p * n * c,
                    bytes=cache_size * p * c + size * n * c + made * p * n),),
        check_shapes=({"P": 0, "N": 4, "C": 3}, {"P": 1, "N": 1, "C": 1}, {"P": 5, "N": 33, "C": 17},
                      {"P": 20, "N": 70, "C": 64}),
        dtype=weight,
        products="bf16" if cache == weight == "bf16" else "f32",
    )


def attention_entry(
    kernel: Any, cache: str, expanded_in: str = "f32", tolerance: Tolerance = SOFTMAX
) -> LibraryKernel:
    """expanded_in: the dtype of keys and values."""
    cases = []
    for t, h, d, s, v, position in ((512, 16, 128, 64, 128, 0),):
        pairs = t * position + t * (t + 1) // 2
        made, size_cached = (NUMPY_DTYPES[name].itemsize for name in (expanded_in, cache))
        size = 4 * h * t * (d + s + v) + (position + t) * (made * h * (d + v) + size_cached * s)
        cases.append(Case({"T": t, "H": h, "D": d, "S": s, "V": v, "position": position},
                          flops=2 * pairs * h * (d + s + v), bytes=size))
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=attention_reference,
        make_arguments=lambda random, shape: attention_arguments(random, shape, cache, expanded_in),
        tolerance=tolerance,
        cases=tuple(cases),
        check_shapes=(
            {"T": 0, "H": 1, "D": 4, "S": 2, "V": 3, "position": 0},
            {"T": 1, "H": 1, "D": 1, "S": 2, "V": 1, "position": 0},
            {"T": 7, "H": 2, "D": 5, "S": 4, "V": 6, "position": 6},
            {"T": 20, "H": 3, "D": 16, "S": 8, "V": 12, "position": 33},
        ),
        dtype=cache,
        products=expanded_in,
    )


def _head_entry(kernel: Any, weight: str, name: str, reference: Any, arguments: Any) -> LibraryKernel:
    """absorb (name "D") or project_values ("V"): a matrix for each head, times a vector."""
    h, n, c = 16, 128, 512
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=reference,
        make_arguments=lambda random, shape: arguments(random, shape, weight), tolerance=SUMS,
        cases=(Case({"H": h, name: n, "C": c}, flops=2 * h * n * c,
                    bytes=NUMPY_DTYPES[weight].itemsize * h * n * c + 4 * h * (n + c)),),
        check_shapes=({"H": 1, name: 1, "C": 1}, {"H": 3, name: 5, "C": 19}, {"H": 2, name: 33, "C": 64}),
        dtype=weight,
    )


def _decode_peer(arguments: Arguments) -> Any:
    """PyTorch on the two parts of the cache side by side, for all positions at once, in the type of the cache."""
    import torch

    def tensor(array: Array) -> Any:
        narrow = array.dtype == NUMPY_DTYPES["bf16"]
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if narrow else torch.from_numpy(array)

    filled = arguments["position"] + 1
    latents = tensor(arguments["latents"])[:filled]
    cache = torch.cat([latents, tensor(arguments["keys"])[:filled]], 1)
    query = torch.cat([tensor(arguments["q"]), tensor(arguments["q_turned"])], 1).to(cache.dtype)
    scale = arguments["scale"]
    return lambda: torch.softmax(query @ cache.T * scale, 1) @ latents


def decode_entry(kernel: Any, cache: str, rounded: bool = False) -> LibraryKernel:
    cases = []
    split = LONG_SPLIT if rounded else SPLIT
    for h, c, s, position in ((16, 512, 64, 511), (16, 512, 64, 4095), (16, 512, 64, 8191)):
        splits = position // split + 1
        size = 4 * h * (c + s) + NUMPY_DTYPES[cache].itemsize * (position + 1) * (c + s) + 4 * splits * h * (c + 2)
        cases.append(Case({"H": h, "C": c, "S": s, "position": position}, flops=2 * h * (position + 1) * (2 * c + s),
                          bytes=size))
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=lambda arguments: decode_reference(arguments, split),
        make_arguments=lambda random, shape: decode_arguments(random, shape, cache, split),
        tolerance=ROUNDED if rounded else UNNORMALISED,
        cases=tuple(cases),
        check_shapes=(
            {"H": 1, "C": 1, "S": 2, "position": 0}, {"H": 3, "C": 19, "S": 4, "position": 33},
            {"H": 16, "C": 64, "S": 8, "position": 2 * split}, {"H": 4, "C": 32, "S": 8, "position": split - 1},
        ),
        dtype=cache,
        products="bf16" if rounded else "f32",
        peers={"torch": _decode_peer},
    )


def _rows_entry(kernel: Any, cache: str) -> LibraryKernel:
    size = NUMPY_DTYPES[cache].itemsize

    def case(t: int, h: int, c: int, s: int, position: int) -> Case:
        pairs = t * position + t * (t + 1) // 2
        return Case({"T": t, "H": h, "C": c, "S": s, "position": position}, flops=2 * pairs * h * (2 * c + s),
                    bytes=4 * t * h * (2 * c + s) + size * (position + t) * (c + s))

    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=rows_reference,
        make_arguments=lambda random, shape: rows_arguments(random, shape, cache), tolerance=SOFTMAX,
        cases=(case(16, 16, 512, 64, 1024),),
        check_shapes=(
            {"T": 0, "H": 1, "C": 3, "S": 2, "position": 0}, {"T": 1, "H": 1, "C": 1, "S": 1, "position": 0},
            {"T": 5, "H": 3, "C": 9, "S": 6, "position": 33}, {"T": 3, "H": 2, "C": 40, "S": 20, "position": 150},
        ),
        dtype=cache,
    )


def _merge_entry(kernel: Any, split: int) -> LibraryKernel:
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=lambda arguments: merge_reference(arguments, split),
        make_arguments=lambda random, shape: merge_arguments(random, shape, split), tolerance=SOFTMAX,
        cases=(Case({"H": 16, "C": 512, "position": 4095}, flops=4 * 16 * 512 * (4096 // split),
                    bytes=4 * 16 * (4096 // split * 514 + 512)),),
        check_shapes=({"H": 1, "C": 1, "position": 0}, {"H": 3, "C": 19, "position": 2 * split},
                      {"H": 4, "C": 64, "position": 5 * split - 1}),
    )


KERNELS = (
    _compress_entry(compress_f32, "f32"),
    _compress_entry(compress_bf16, "bf16"),
    expand_entry(expand_f32_f32, "f32", "f32"),
    expand_entry(expand_f32_bf16, "f32", "bf16"),
    expand_entry(expand_bf16_f32, "bf16", "f32"),
    expand_entry(expand_bf16_bf16, "bf16", "bf16"),
    attention_entry(latent_attention_f32, "f32"),
    attention_entry(latent_attention_bf16, "bf16"),
    _head_entry(absorb_f32, "f32", "D", absorb_reference, absorb_arguments),
    _head_entry(absorb_bf16, "bf16", "D", absorb_reference, absorb_arguments),
    _rows_entry(latent_attention_rows_f32, "f32"),
    _rows_entry(latent_attention_rows_bf16, "bf16"),
    decode_entry(latent_attention_decode_f32, "f32"),
    decode_entry(latent_attention_decode_bf16, "bf16"),
    decode_entry(latent_attention_decode_rounded, "bf16", True),
    _merge_entry(merge_splits, SPLIT),
    _merge_entry(merge_long_splits, LONG_SPLIT),
    _head_entry(project_values_f32, "f32", "V", project_reference, project_arguments),
    _head_entry(project_values_bf16, "bf16", "V", project_reference, project_arguments),
)
