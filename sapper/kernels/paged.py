"""Attention over a paged KV cache: many sequences at once, each token with a position and an owner of its own.

The cache is cut into pages of PAGE positions (Kwon et al., 2023, section 4.1). table[s, i] is the page that holds the
positions i * PAGE ... of sequence s. A step brings T tokens of any sequences: token t belongs to sequence owner[t] and
stands at place[t] in it; a sequence that decodes has one, one whose prompt is read has several, in any order. A token
sees the positions 0 ... place[t] of its own sequence.

    rotate_and_cache_paged    queries and keys turn (sapper/kernels/rope.py); keys and values go to their pages
    norm_rotate_and_cache_paged    the same after RMSNorm of each head of queries and keys
    attention_paged           online softmax, page after page; the G heads that share a key/value head form the tile

Of DeepSeek's latent cache (sapper/kernels/mla.py) the same, absorbed for any number of tokens:

    compress_paged            latent vectors and shared keys go to their pages
    absorb_rows               queries go into the latent space
    latent_attention_paged    and meet the pages there; latent_attention_paged_rounded in products of bf16
    project_values_rows       what each head found comes out

No two tokens of a step share a place, and no two sequences a page that is written: iterations over tokens are disjoint.
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import (
    Tensor,
    bf16,
    cdiv,
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
    whole,
    zeros,
)

from .mla import LN_2, LOG2_E
from .online_softmax import attend
from .record import NUMPY_DTYPES, Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten
from .rope import normed, normed_reference, tables, with_norms
from .shares import GRAIN, buffers, cuts, leave, part_of_row, rows_of_share, shared_reference

T, H, G, D, R, P, B, N, S, C, V, X, W = sp.dims("T H G D R P B N S C V X W")
PAGE = 64
"""Positions of a page. A multiple of the lanes of all targets; what a sequence wastes is half a page."""
MINUS_INFINITY = float("-inf")


def make_rotate_and_cache_paged(cache: Any) -> Any:
    """q [T, H, 2, R], k, v [T, G, 2, R]: may be views of one buffer. keys, values [N, G, PAGE, 2, R]: N pages."""

    @sp.kernel(name=f"rotate_and_cache_paged_{cache.name}")
    def rotate_and_cache_paged(
        q: Tensor[f32, T, H, 2, R], k: Tensor[f32, T, G, 2, R], v: Tensor[f32, T, G, 2, R],
        cosine: Tensor[f32, P, R], sine: Tensor[f32, P, R], owner: Tensor[i32, T], place: Tensor[i32, T],
        table: Tensor[i32, B, S], q_turned: Tensor[f32, T, H, 2, R], keys: Tensor[cache, N, G, PAGE, 2, R],
        values: Tensor[cache, N, G, PAGE, 2, R],
    ):
        for t in each(T, disjoint=True):
            position = place[t]
            page = table[owner[t], position // PAGE]
            row = position % PAGE
            for h, r in tiles(H, R):
                c = cosine[position, r]
                s = sine[position, r]
                a = q[t, h, 0, r]
                b = q[t, h, 1, r]
                q_turned[t, h, 0, r] = a * c - b * s
                q_turned[t, h, 1, r] = a * s + b * c
            for g, r in tiles(G, R):
                c = cosine[position, r]
                s = sine[position, r]
                a = k[t, g, 0, r]
                b = k[t, g, 1, r]
                keys[page, g, row, 0, r] = (a * c - b * s).to(cache)
                keys[page, g, row, 1, r] = (a * s + b * c).to(cache)
                values[page, g, row, 0, r] = v[t, g, 0, r].to(cache)
                values[page, g, row, 1, r] = v[t, g, 1, r].to(cache)

    return rotate_and_cache_paged


def make_norm_rotate_and_cache_paged(cache: Any) -> Any:
    """The same of queries and keys after their norm; q_gain, k_gain [2, R] as the halves of a head lie."""

    @sp.kernel(name=f"norm_rotate_and_cache_paged_{cache.name}")
    def norm_rotate_and_cache_paged(
        q: Tensor[f32, T, H, 2, R], k: Tensor[f32, T, G, 2, R], v: Tensor[f32, T, G, 2, R],
        q_gain: Tensor[f32, 2, R], k_gain: Tensor[f32, 2, R], epsilon: f32,
        cosine: Tensor[f32, P, R], sine: Tensor[f32, P, R], owner: Tensor[i32, T], place: Tensor[i32, T],
        table: Tensor[i32, B, S], q_turned: Tensor[f32, T, H, 2, R], keys: Tensor[cache, N, G, PAGE, 2, R],
        values: Tensor[cache, N, G, PAGE, 2, R],
    ):
        for t in each(T, disjoint=True):
            position = place[t]
            page = table[owner[t], position // PAGE]
            row = position % PAGE
            for h in tiles(H):
                r = whole(R)
                c = cosine[position, r]
                s = sine[position, r]
                a, b = normed(q[t, h, 0, r], q[t, h, 1, r], r, R, q_gain, epsilon)
                q_turned[t, h, 0, r] = a * c - b * s
                q_turned[t, h, 1, r] = a * s + b * c
            for g in tiles(G):
                r = whole(R)
                c = cosine[position, r]
                s = sine[position, r]
                a, b = normed(k[t, g, 0, r], k[t, g, 1, r], r, R, k_gain, epsilon)
                keys[page, g, row, 0, r] = (a * c - b * s).to(cache)
                keys[page, g, row, 1, r] = (a * s + b * c).to(cache)
                values[page, g, row, 0, r] = v[t, g, 0, r].to(cache)
                values[page, g, row, 1, r] = v[t, g, 1, r].to(cache)

    return norm_rotate_and_cache_paged


def make_attention_paged(cache: Any) -> Any:
    """q, out [T, H, G, D]; keys, values [N, H, PAGE, D]. Rows are the key heads of tokens."""

    @sp.kernel(name=f"attention_paged_{cache.name}", specialise="G D")
    def attention_paged(
        q: Tensor[f32, T, H, G, D], keys: Tensor[cache, N, H, PAGE, D], values: Tensor[cache, N, H, PAGE, D],
        owner: Tensor[i32, T], place: Tensor[i32, T], table: Tensor[i32, B, S], row: Tensor[i32, W + 1],
        at: Tensor[i32, W + 1], scale: f32, highest: Tensor[f32, W, 2, G], total: Tensor[f32, W, 2, G],
        partial: Tensor[f32, W, 2, G, D], out: Tensor[f32, T, H, G, D],
    ):
        for w in each(W, disjoint=True):
            first, behind = rows_of_share(row, at, w)
            for r in range(first, behind):
                t = r // H
                h = r % H
                sequence = owner[t]
                count = place[t] + 1
                begin, end = part_of_row(row, at, w, r, count)
                for g in tiles(G):
                    d = whole(D)
                    query = q[t, h, g, d]
                    top = full(g, value=MINUS_INFINITY, dtype=f32)
                    sums = zeros(g, dtype=f32)
                    acc = zeros(g, d, dtype=f32)
                    for i in range(begin // PAGE, cdiv(end, PAGE)):
                        page = table[sequence, i]
                        for p in tiles(span(max(begin - i * PAGE, 0), min(PAGE, end - i * PAGE))):
                            score = (query @ keys[page, h, p, d]) * scale
                            top, sums, acc = attend(top, sums, acc, score, values[page, h, p, d], p, exp, f32)
                    if end - begin == count:
                        out[t, h, g, d] = acc / sums
                    else:
                        leave(highest, total, partial, w, begin, g, d, top, sums, acc)

    return attention_paged


def make_compress_paged(cache: Any) -> Any:
    """q [T, H, 2, R], latent [T, C], key [T, 2, R]: may be views. latents [N, PAGE, C], keys [N, PAGE, 2, R]."""

    @sp.kernel(name=f"compress_paged_{cache.name}")
    def compress_paged(
        q: Tensor[f32, T, H, 2, R], latent: Tensor[f32, T, C], key: Tensor[f32, T, 2, R], gain: Tensor[f32, C],
        epsilon: f32, cosine: Tensor[f32, P, R], sine: Tensor[f32, P, R], owner: Tensor[i32, T],
        place: Tensor[i32, T], table: Tensor[i32, B, S], q_turned: Tensor[f32, T, H, 2, R],
        latents: Tensor[cache, N, PAGE, C], keys: Tensor[cache, N, PAGE, 2, R],
    ):
        for t in each(T, disjoint=True):
            position = place[t]
            page = table[owner[t], position // PAGE]
            row = position % PAGE
            for h, r in tiles(H, R):
                c = cosine[position, r]
                s = sine[position, r]
                a = q[t, h, 0, r]
                b = q[t, h, 1, r]
                q_turned[t, h, 0, r] = a * c - b * s
                q_turned[t, h, 1, r] = a * s + b * c
            i = whole(C)
            vector = latent[t, i]
            factor = rsqrt(sum(vector * vector, over=i) / C.to(f32) + epsilon)
            latents[page, row, i] = (vector * factor * gain[i]).to(cache)
            for r in tiles(R):
                c = cosine[position, r]
                s = sine[position, r]
                a = key[t, 0, r]
                b = key[t, 1, r]
                keys[page, row, 0, r] = (a * c - b * s).to(cache)
                keys[page, row, 1, r] = (a * s + b * c).to(cache)

    return compress_paged


def make_latent_attention_paged(cache: Any) -> Any:
    """q, out [T, H, C] in the latent space, q_turned [T, H, X]; latents [N, PAGE, C], keys [N, PAGE, X]. Rows are
    tokens."""

    @sp.kernel(name=f"latent_attention_paged_{cache.name}", specialise="H C X")
    def latent_attention_paged(
        q: Tensor[f32, T, H, C], q_turned: Tensor[f32, T, H, X], latents: Tensor[cache, N, PAGE, C],
        keys: Tensor[cache, N, PAGE, X], owner: Tensor[i32, T], place: Tensor[i32, T], table: Tensor[i32, B, S],
        row: Tensor[i32, W + 1], at: Tensor[i32, W + 1], scale: f32, highest: Tensor[f32, W, 2, H],
        total: Tensor[f32, W, 2, H], partial: Tensor[f32, W, 2, H, C], out: Tensor[f32, T, H, C],
    ):
        for w in each(W, disjoint=True):
            first, behind = rows_of_share(row, at, w)
            for t in range(first, behind):
                sequence = owner[t]
                count = place[t] + 1
                begin, end = part_of_row(row, at, w, t, count)
                for h in tiles(H):
                    c = whole(C)
                    s = whole(X)
                    query = q[t, h, c] * scale
                    turn = q_turned[t, h, s] * scale
                    top = full(h, value=MINUS_INFINITY, dtype=f32)
                    sums = zeros(h, dtype=f32)
                    acc = zeros(h, c, dtype=f32)
                    for i in range(begin // PAGE, cdiv(end, PAGE)):
                        page = table[sequence, i]
                        for p in tiles(span(max(begin - i * PAGE, 0), min(PAGE, end - i * PAGE))):
                            latent = latents[page, p, c]
                            score = query @ latent + turn @ keys[page, p, s]
                            top, sums, acc = attend(top, sums, acc, score, latent, p, exp, f32)
                    if end - begin == count:
                        out[t, h, c] = acc / sums
                    else:
                        leave(highest, total, partial, w, begin, h, c, top, sums, acc)

    return latent_attention_paged


@sp.kernel(specialise="H C X")
def latent_attention_paged_rounded(
    q: Tensor[f32, T, H, C], q_turned: Tensor[f32, T, H, X], latents: Tensor[bf16, N, PAGE, C],
    keys: Tensor[bf16, N, PAGE, X], owner: Tensor[i32, T], place: Tensor[i32, T], table: Tensor[i32, B, S],
    row: Tensor[i32, W + 1], at: Tensor[i32, W + 1], scale: f32, highest: Tensor[f32, W, 2, H],
    total: Tensor[f32, W, 2, H], partial: Tensor[f32, W, 2, H, C], out: Tensor[f32, T, H, C],
):
    """The same in products of bf16: queries and weights are rounded. A page is met as one tile: shares begin with one.
    """
    for w in each(W, disjoint=True):
        first, behind = rows_of_share(row, at, w)
        for t in range(first, behind):
            sequence = owner[t]
            count = place[t] + 1
            begin, end = part_of_row(row, at, w, t, count)
            h = whole(H)
            c = whole(C)
            s = whole(X)
            top = full(h, value=MINUS_INFINITY, dtype=f32)
            sums = zeros(h, dtype=f32)
            acc = zeros(h, c, dtype=f32)
            for i in range(begin // PAGE, cdiv(end, PAGE)):
                page = table[sequence, i]
                p = whole(span(0, min(PAGE, end - i * PAGE)))
                query = (q[t, h, c] * (scale * LOG2_E)).to(bf16)
                turn = (q_turned[t, h, s] * (scale * LOG2_E)).to(bf16)
                # Each product has latents of its own, as one has pairs along c and the other along p.
                score = query @ latents[page, p, c] + turn @ keys[page, p, s]
                top, sums, acc = attend(top, sums, acc, score, latents[page, p, c], p, exp2, bf16)
            if end - begin == count:
                out[t, h, c] = acc / sums
            else:
                leave(highest, total, partial, w, begin, h, c, top * LN_2, sums, acc)


def make_absorb_rows(weight: Any) -> Any:
    """Queries of T tokens in the latent space; w [H, D, C]: the rows of the weights that make keys."""

    @sp.kernel(name=f"absorb_rows_{weight.name}")
    def absorb_rows(q: Tensor[f32, T, H, D], w: Tensor[weight, H, D, C], y: Tensor[f32, T, H, C]):
        for h in each(H):
            for t, c in tiles(T, C):
                acc = zeros(t, c, dtype=f32)
                for d in tiles(D):
                    acc += q[t, h, d] @ w[h, d, c]
                y[t, h, c] = acc

    return absorb_rows


def make_project_values_rows(weight: Any) -> Any:
    """What each head of T tokens found, from the latent space; w [H, V, C]: the rows that make values."""

    @sp.kernel(name=f"project_values_rows_{weight.name}")
    def project_values_rows(x: Tensor[f32, T, H, C], w: Tensor[weight, H, V, C], y: Tensor[f32, T, H, V]):
        for h in each(H):
            for t, v in tiles(T, V):
                acc = zeros(t, v, dtype=f32)
                for c in tiles(C):
                    acc += x[t, h, c] @ w[h, v, c]
                y[t, h, v] = acc

    return project_values_rows


rotate_and_cache_paged_f32 = make_rotate_and_cache_paged(f32)
rotate_and_cache_paged_bf16 = make_rotate_and_cache_paged(bf16)
norm_rotate_and_cache_paged_f32 = make_norm_rotate_and_cache_paged(f32)
norm_rotate_and_cache_paged_bf16 = make_norm_rotate_and_cache_paged(bf16)
attention_paged_f32 = make_attention_paged(f32)
attention_paged_bf16 = make_attention_paged(bf16)
compress_paged_f32 = make_compress_paged(f32)
compress_paged_bf16 = make_compress_paged(bf16)
latent_attention_paged_f32 = make_latent_attention_paged(f32)
latent_attention_paged_bf16 = make_latent_attention_paged(bf16)
absorb_rows_f32 = make_absorb_rows(f32)
absorb_rows_bf16 = make_absorb_rows(bf16)
project_values_rows_f32 = make_project_values_rows(f32)
project_values_rows_bf16 = make_project_values_rows(bf16)

# ------------------------------------------------------------------------------------------- references and arguments


def gathered(pages: Array, arguments: Arguments, t: int) -> Array:
    """[positions, ...] that token t sees, of pages [N, PAGE, ...]."""
    count = int(arguments["place"][t]) + 1
    own = arguments["table"][arguments["owner"][t], : -(-count // PAGE)]
    seen: Array = pages[own].reshape(-1, *pages.shape[2:])[:count].astype(np.float64)
    return seen


def counts_of(arguments: Arguments, rows: int) -> list[int]:
    """The positions of each row, of which tokens have so many."""
    return [int(place) + 1 for place in arguments["place"] for _ in range(rows)]


def attention_reference(arguments: Arguments) -> dict[str, Array]:
    keys, values = (arguments[name].swapaxes(1, 2) for name in ("keys", "values"))
    heads = arguments["q"].shape[1]

    def found(row: int, seen: slice) -> tuple[Array, Array]:
        t, h = divmod(row, heads)
        met, given = (gathered(pages, arguments, t)[seen, h] for pages in (keys, values))
        return arguments["q"][t, h].astype(np.float64) @ met.T * arguments["scale"], given

    return shared_reference(arguments, counts_of(arguments, heads), found)


def turn(x: Array, arguments: Arguments, t: int) -> Array:
    """x [..., 2, R] turned by the position of token t."""
    cosine, sine = (arguments[name][arguments["place"][t]].astype(np.float64) for name in ("cosine", "sine"))
    a, b = x[..., 0, :].astype(np.float64), x[..., 1, :].astype(np.float64)
    return np.stack([a * cosine - b * sine, a * sine + b * cosine], axis=-2)


def spots(arguments: Arguments) -> list[tuple[int, int]]:
    """Page and row of each token."""
    return [(int(arguments["table"][owner, place // PAGE]), int(place % PAGE))
            for owner, place in zip(arguments["owner"], arguments["place"], strict=True)]


def cache_reference(arguments: Arguments) -> dict[str, Array]:
    keys, values = arguments["keys"].copy(), arguments["values"].copy()
    q_turned = np.empty(arguments["q"].shape)
    for t, (page, row) in enumerate(spots(arguments)):
        q_turned[t] = turn(arguments["q"][t], arguments, t)
        keys[page, :, row] = turn(arguments["k"][t], arguments, t).astype(keys.dtype)
        values[page, :, row] = arguments["v"][t].astype(values.dtype)
    return {"q_turned": q_turned, "keys": keys, "values": values}


def norm_cache_reference(arguments: Arguments) -> dict[str, Array]:
    return cache_reference(normed_reference(arguments))


def compress_reference(arguments: Arguments) -> dict[str, Array]:
    latents, keys = arguments["latents"].copy(), arguments["keys"].copy()
    q_turned = np.empty(arguments["q"].shape)
    for t, (page, row) in enumerate(spots(arguments)):
        q_turned[t] = turn(arguments["q"][t], arguments, t)
        vector = arguments["latent"][t].astype(np.float64)
        factor = 1.0 / np.sqrt(np.square(vector).mean() + arguments["epsilon"])
        latents[page, row] = (vector * factor * arguments["gain"]).astype(latents.dtype)
        keys[page, row] = turn(arguments["key"][t], arguments, t).astype(keys.dtype)
    return {"q_turned": q_turned, "latents": latents, "keys": keys}


def latent_reference(arguments: Arguments) -> dict[str, Array]:
    def found(t: int, seen: slice) -> tuple[Array, Array]:
        latents, keys = (gathered(arguments[name], arguments, t)[seen] for name in ("latents", "keys"))
        score = arguments["q"][t].astype(np.float64) @ latents.T + arguments["q_turned"][t].astype(np.float64) @ keys.T
        return score * arguments["scale"], latents

    return shared_reference(arguments, counts_of(arguments, 1), found)


def absorb_reference(arguments: Arguments) -> dict[str, Array]:
    return {"y": np.einsum("thd,hdc->thc", arguments["q"].astype(np.float64), arguments["w"].astype(np.float64))}


def project_reference(arguments: Arguments) -> dict[str, Array]:
    return {"y": np.einsum("thc,hvc->thv", arguments["x"].astype(np.float64), arguments["w"].astype(np.float64))}


def places(random: "np.random.Generator", shape: Shape) -> Arguments:
    """owner, place and table of T tokens of B sequences up to position `position`; pages are dealt at random."""
    t, b, position = shape["T"], shape["B"], shape["position"]
    each_pages = position // PAGE + 1
    owner = np.sort(random.integers(0, b, t)).astype(np.int32)
    # The tokens of one sequence stand at its last positions, one after the other; no sequence has more than those.
    back = np.array([np.count_nonzero(owner[i + 1 :] == owner[i]) for i in range(t)], np.int32)
    place = np.maximum(position - owner % 3, 0).astype(np.int32) - back
    table = random.permutation(b * each_pages).reshape(b, each_pages).astype(np.int32)
    return {"owner": owner, "place": np.maximum(place, 0).astype(np.int32), "table": table}


def shared(made: Arguments, shape: Shape, rows: int, grain: int = GRAIN) -> Arguments:
    """row and at: of the tokens that are made, rows of each."""
    row, at = cuts(counts_of(made, rows), shape["W"], grain)
    return {"row": row, "at": at}


def page_count(shape: Shape) -> int:
    return int(shape["B"] * (shape["position"] // PAGE + 1))


def angles(shape: Shape) -> Arguments:
    cosine, sine = tables(shape["position"] + 1, shape["R"])
    return {"cosine": cosine, "sine": sine}


def attention_arguments(random: "np.random.Generator", shape: Shape, cache: str) -> Arguments:
    t, h, g, d, n = shape["T"], shape["H"], shape["G"], shape["D"], page_count(shape)
    made = {
        "q": normal(random, t, h, g, d), "keys": normal(random, n, h, PAGE, d, dtype=cache),
        "values": normal(random, n, h, PAGE, d, dtype=cache), **places(random, shape),
    }
    return {**made, **shared(made, shape, h), "scale": d**-0.5, **buffers(shape["W"], g, d),
            "out": unwritten(t, h, g, d)}


def cache_arguments(random: "np.random.Generator", shape: Shape, cache: str) -> Arguments:
    t, h, g, r, n = shape["T"], shape["H"], shape["G"], shape["R"], page_count(shape)
    qkv = normal(random, t, h + 2 * g, 2, r)
    return {
        "q": qkv[:, :h], "k": qkv[:, h : h + g], "v": qkv[:, h + g :], **angles(shape), **places(random, shape),
        "q_turned": unwritten(t, h, 2, r), "keys": normal(random, n, g, PAGE, 2, r, dtype=cache),
        "values": normal(random, n, g, PAGE, 2, r, dtype=cache),
    }


def compress_arguments(random: "np.random.Generator", shape: Shape, cache: str) -> Arguments:
    t, h, r, c, n = shape["T"], shape["H"], shape["R"], shape["C"], page_count(shape)
    joined = normal(random, t, c + 2 * r)
    return {
        "q": normal(random, t, h, 2, r), "latent": joined[:, :c], "key": joined[:, c:].reshape(t, 2, r),
        "gain": normal(random, c), "epsilon": 1e-6, **angles(shape), **places(random, shape),
        "q_turned": unwritten(t, h, 2, r), "latents": normal(random, n, PAGE, c, dtype=cache),
        "keys": normal(random, n, PAGE, 2, r, dtype=cache),
    }


def latent_arguments(random: "np.random.Generator", shape: Shape, cache: str, grain: int = GRAIN) -> Arguments:
    t, h, c, s, n = shape["T"], shape["H"], shape["C"], shape["X"], page_count(shape)
    made = {
        "q": normal(random, t, h, c), "q_turned": normal(random, t, h, s),
        "latents": normal(random, n, PAGE, c, dtype=cache), "keys": normal(random, n, PAGE, s, dtype=cache),
        **places(random, shape),
    }
    return {**made, **shared(made, shape, 1, grain), "scale": (c + s) ** -0.5, **buffers(shape["W"], h, c),
            "out": unwritten(t, h, c)}


def absorb_arguments(random: "np.random.Generator", shape: Shape, weight: str) -> Arguments:
    t, h, d, c = shape["T"], shape["H"], shape["D"], shape["C"]
    return {"q": normal(random, t, h, d), "w": normal(random, h, d, c, dtype=weight), "y": unwritten(t, h, c)}


def project_arguments(random: "np.random.Generator", shape: Shape, weight: str) -> Arguments:
    t, h, v, c = shape["T"], shape["H"], shape["V"], shape["C"]
    return {"x": normal(random, t, h, c), "w": normal(random, h, v, c, dtype=weight), "y": unwritten(t, h, v)}


ATTENTION = Tolerance(2e-5, 5e-6, "scores of a few units are rounded to f32 and exp makes that relative; the sums run "
                      "in any order and values cancel")
ROUNDED = Tolerance(2.0**-7, 2.0**-6, "queries rounded to bf16 move scores of a few units by some 2**-8, and exp makes "
                    "that relative; weights are rounded by 2**-9; values of a few units cancel")
PRODUCTS = Tolerance(1e-5, 3e-5, "sums of up to 512 products in f32, in any order, which may cancel")
SMALL = ({"T": 0, "B": 1, "H": 1, "G": 1, "D": 2, "R": 1, "C": 3, "V": 2, "X": 2, "W": 2, "position": 0},
         {"T": 1, "B": 1, "H": 1, "G": 1, "D": 1, "R": 1, "C": 1, "V": 1, "X": 1, "W": 3, "position": 3},
         {"T": 5, "B": 3, "H": 2, "G": 3, "D": 5, "R": 5, "C": 9, "V": 7, "X": 6, "W": 4, "position": 33},
         {"T": 9, "B": 4, "H": 3, "G": 2, "D": 64, "R": 32, "C": 40, "V": 33, "X": 20, "W": 7, "position": 150})
"""T: tokens; W: of what attends, the shares. One token that several have is beside them."""
ALONE = {"T": 1, "B": 1, "H": 1, "G": 3, "D": 9, "C": 9, "X": 6, "W": 3, "position": 200}


def _shapes(names: str, *more: dict[str, int]) -> tuple[dict[str, int], ...]:
    return tuple({name: shape[name] for name in names.split()} for shape in (*SMALL, *more))


def _rounding(dtype: str, reason: str, absolute: float = 2e-6) -> Tolerance:
    return Tolerance(2e-6, absolute, reason) if dtype == "f32" else Tolerance(
        2.0**-7, absolute, f"{reason}, then once to bf16, where the two may round apart")


def _attention(kernel: Any, cache: str) -> LibraryKernel:
    size = NUMPY_DTYPES[cache].itemsize
    return LibraryKernel(
        name=f"attention_paged_{cache}", kernel=kernel, reference=attention_reference,
        make_arguments=lambda random, shape: attention_arguments(random, shape, cache), tolerance=ATTENTION,
        cases=tuple(
            Case({"T": t, "B": t, "H": h, "G": g, "D": d, "W": 4, "position": position},
                 flops=4 * t * h * g * d * (position + 1), bytes=8 * t * h * g * d + 2 * size * t * h * d * position)
            for t, h, g, d, position in ((8, 3, 3, 64, 511),)
        ),
        check_shapes=_shapes("T B H G D W position", ALONE), dtype=cache,
    )


def _cache(kernel: Any, cache: str) -> LibraryKernel:
    size = NUMPY_DTYPES[cache].itemsize
    return LibraryKernel(
        name=f"rotate_and_cache_paged_{cache}", kernel=kernel, reference=cache_reference,
        make_arguments=lambda random, shape: cache_arguments(random, shape, cache),
        tolerance=_rounding(cache, "two products and their difference, which may cancel"),
        cases=tuple(
            Case({"T": t, "B": t, "H": h, "G": g, "R": r, "position": 511}, flops=6 * t * (h + g) * r,
                 bytes=t * r * (8 * (h + 2 * g) + 8 + 8 * h + 4 * g * size))
            for t, h, g, r in ((8, 9, 3, 32),)
        ),
        check_shapes=_shapes("T B H G R position"), dtype=cache,
    )


def _norm_cache(kernel: Any, cache: str) -> LibraryKernel:
    size = NUMPY_DTYPES[cache].itemsize
    return LibraryKernel(
        name=f"norm_rotate_and_cache_paged_{cache}", kernel=kernel, reference=norm_cache_reference,
        make_arguments=lambda random, shape: with_norms(random, cache_arguments(random, shape, cache), shape["R"]),
        tolerance=_rounding(cache, "a sum of squares, its root, and products of some ten, which may cancel", 4e-6),
        cases=tuple(
            Case({"T": t, "B": t, "H": h, "G": g, "R": r, "position": 511}, flops=14 * t * (h + g) * r,
                 bytes=t * r * (8 * (h + 2 * g) + 8 + 8 * h + 4 * g * size) + 16 * r)
            for t, h, g, r in ((8, 32, 8, 64),)
        ),
        check_shapes=_shapes("T B H G R position"), dtype=cache,
    )


def _compress(kernel: Any, cache: str) -> LibraryKernel:
    size = NUMPY_DTYPES[cache].itemsize
    return LibraryKernel(
        name=f"compress_paged_{cache}", kernel=kernel, reference=compress_reference,
        make_arguments=lambda random, shape: compress_arguments(random, shape, cache),
        tolerance=_rounding(cache, "a sum of squares, its root, two products each"),
        cases=tuple(
            Case({"T": t, "B": t, "H": h, "R": r, "C": c, "position": 511}, flops=t * (6 * (h + 1) * r + 4 * c),
                 bytes=t * (16 * h * r + 8 * r + (4 + size) * (c + 2 * r)) + 4 * c)
            for t, h, r, c in ((8, 16, 32, 512),)
        ),
        check_shapes=_shapes("T B H R C position"), dtype=cache,
    )


def _latent(kernel: Any, cache: str, rounded: bool = False) -> LibraryKernel:
    size = NUMPY_DTYPES[cache].itemsize
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=latent_reference,
        make_arguments=lambda random, shape: latent_arguments(random, shape, cache, PAGE if rounded else GRAIN),
        tolerance=ROUNDED if rounded else ATTENTION,
        cases=tuple(
            Case({"T": t, "B": t, "H": h, "C": c, "X": s, "W": 4, "position": position},
                 flops=2 * t * h * (2 * c + s) * (position + 1),
                 bytes=4 * t * h * (2 * c + s) + size * t * position * (c + s))
            for t, h, c, s, position in ((4, 16, 512, 64, 511),)
        ),
        check_shapes=_shapes("T B H C X W position", ALONE), dtype=cache, products="bf16" if rounded else "f32",
    )


def _rows(name: str, kernel: Any, weight: str) -> LibraryKernel:
    reference, arguments, last = {"absorb_rows": (absorb_reference, absorb_arguments, "D"),
                                  "project_values_rows": (project_reference, project_arguments, "V")}[name]
    size = NUMPY_DTYPES[weight].itemsize
    return LibraryKernel(
        name=f"{name}_{weight}", kernel=kernel, reference=reference,
        make_arguments=lambda random, shape: arguments(random, shape, weight), tolerance=PRODUCTS,
        cases=tuple(
            Case({"T": t, "H": h, last: d, "C": c}, flops=2 * t * h * d * c,
                 bytes=4 * t * h * (d + c) + size * h * d * c)
            for t, h, d, c in ((8, 16, 128, 512),)
        ),
        check_shapes=_shapes(f"T H {last} C"), dtype=weight,
    )


KERNELS = (
    _cache(rotate_and_cache_paged_f32, "f32"),
    _cache(rotate_and_cache_paged_bf16, "bf16"),
    _norm_cache(norm_rotate_and_cache_paged_f32, "f32"),
    _norm_cache(norm_rotate_and_cache_paged_bf16, "bf16"),
    _attention(attention_paged_f32, "f32"),
    _attention(attention_paged_bf16, "bf16"),
    _compress(compress_paged_f32, "f32"),
    _compress(compress_paged_bf16, "bf16"),
    _latent(latent_attention_paged_f32, "f32"),
    _latent(latent_attention_paged_bf16, "bf16"),
    _latent(latent_attention_paged_rounded, "bf16", True),
    _rows("absorb_rows", absorb_rows_f32, "f32"),
    _rows("absorb_rows", absorb_rows_bf16, "bf16"),
    _rows("project_values_rows", project_values_rows_f32, "f32"),
    _rows("project_values_rows", project_values_rows_bf16, "bf16"),
)
