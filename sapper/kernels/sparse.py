"""DeepSeek sparse attention (DeepSeek-V3.2, 2025): an indexer chooses the positions that a token attends to.

Besides the cache of latent vectors (mla.py) there is one of index keys: S + E numbers (64 and 64) for each position, of
which the first ones turn (S = 2 * R, in half-split pairs, rope.py). A token has an index query of as many numbers and a
weight for each of H index heads (64), and looks at position p with the score

    score[t, p] = sum over h of weight[t, h] * max(query[t, h] @ key[p], 0)

Of its positions 0 ... position + t the K (2048) of the highest scores are kept, among equals those that come first. The
published scale of the scores is left out, as no choice depends on it.

    cache_index              index queries turn, and so do index keys, which were normed, on their way to the cache
    index_scores             the scores
    choose_positions         of each token the lowest score that is kept, as an integer of the same order (`sortable`),
                             and the last position that is kept with it
    list_positions           of one token the positions that are kept, rising
    gather_positions         and their rows of the cache, on which `latent_attention_decode` then works
    latent_attention_sparse  for many tokens: naive attention (mla.py) where what is not kept is masked

A chunk of tokens masks rather than gathers: its keys and values are made once for all tokens, and until a context is a
few times longer than K that is less work than a gather for each token.
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import (
    Tensor,
    bf16,
    each,
    exp,
    f32,
    full,
    i32,
    maximum,
    min,
    span,
    sum,
    tiles,
    where,
    whole,
    zeros,
)

from .mla import QUERY_BLOCK
from .online_softmax import attend
from .record import EXACT, NUMPY_DTYPES, Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten
from .rope import tables, turned

T, H, D, E, R, P, Q, K, S, V, C = sp.dims("T H D E R P Q K S V C")
MINUS_INFINITY = float("-inf")
BELOW_ALL = -1e30
"""Where the running maximum of a softmax begins: finite, as a tile of positions may have none that is kept."""
LOWEST_KEY = -(2**31)
POSITION_BITS = 31
SCORED = 64
"""Positions whose scores a core makes at once: those of all index heads stay in its first cache."""


def sortable(score):
    """An i32 of the same order as an f32."""
    bits = score.bits(i32)
    return where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def make_cache_index(cache: Any) -> Any:
    """q [T, H, 2, R]: the part of the index queries that turns; key [T, 2, R], rest [T, E]: of new tokens, of which t
    stands at position + t; all may be views. q_turned [T, H, 2, R]. keys, rests: the cache.
    """

    @sp.kernel(name=f"cache_index_{cache.name}")
    def cache_index(
        q: Tensor[f32, T, H, 2, R], key: Tensor[f32, T, 2, R], rest: Tensor[f32, T, E], cosine: Tensor[f32, P, R],
        sine: Tensor[f32, P, R], position: i32, q_turned: Tensor[f32, T, H, 2, R], keys: Tensor[cache, P, 2, R],
        rests: Tensor[cache, P, E],
    ):
        for t, h, r in tiles(T, H, R):
            c = cosine[position + t, r]
            s = sine[position + t, r]
            a = q[t, h, 0, r]
            b = q[t, h, 1, r]
            q_turned[t, h, 0, r] = a * c - b * s
            q_turned[t, h, 1, r] = a * s + b * c
        for t, r in tiles(T, R):
            c = cosine[position + t, r]
            s = sine[position + t, r]
            a = key[t, 0, r]
            b = key[t, 1, r]
            keys[position + t, 0, r] = (a * c - b * s).to(cache)
            keys[position + t, 1, r] = (a * s + b * c).to(cache)
        for t, e in tiles(T, E):
            rests[position + t, e] = rest[t, e].to(cache)

    return cache_index


def make_index_scores(cache: Any) -> Any:
    """scores [T, P]: of the positions up to that of the last token."""

    @sp.kernel(name=f"index_scores_{cache.name}")
    def index_scores(
        q_turned: Tensor[f32, T, H, S], q: Tensor[f32, T, H, E], weight: Tensor[f32, T, H], keys: Tensor[cache, P, S],
        rests: Tensor[cache, P, E], position: i32, scores: Tensor[f32, T, P],
    ):
        count = position + T
        for t, block in each(T, (count + SCORED - 1) // SCORED, disjoint=True):  # p stays below SCORED
            first = block * SCORED
            p = whole(span(0, min(SCORED, count - first)))
            h = whole(H)
            s = whole(S)
            e = whole(E)
            met = q_turned[t, h, s] @ keys[first + p, s] + q[t, h, e] @ rests[first + p, e]
            scores[t, first + p] = sum(maximum(met, 0.0) * weight[t, h], over=h)

    return index_scores


def choose(scores, t, count, kept):
    """The lowest key that is kept and the last position that is kept with it, of the first `count` scores of row t.

    The key is found bit by bit from the highest, the position likewise where not all of that key are kept.
    """
    lowest = zeros(dtype=i32) + LOWEST_KEY
    for bit in range(32):
        # The first candidate is LOWEST_KEY + 2**31, that is 0: sums wrap.
        candidate = lowest + (zeros(dtype=i32) + 1 << (31 - bit).to(i32))
        found = zeros(dtype=i32)
        for p in tiles(span(0, count)):
            found += sum(where(sortable(scores[t, p]) >= candidate, 1, 0).to(i32), over=p)
        lowest = candidate if found >= kept else lowest
    above = zeros(dtype=i32)
    equal = zeros(dtype=i32)
    for p in tiles(span(0, count)):
        key = sortable(scores[t, p])
        above += sum(where(key > lowest, 1, 0).to(i32), over=p)
        equal += sum(where(key == lowest, 1, 0).to(i32), over=p)
    wanted = kept.to(i32) - above
    last = zeros(dtype=i32)
    for bit in range(POSITION_BITS if wanted < equal else 0):
        candidate = last + (zeros(dtype=i32) + 1 << (POSITION_BITS - 1 - bit).to(i32))
        before = zeros(dtype=i32)
        for p in tiles(span(0, count)):
            here = (sortable(scores[t, p]) == lowest) & (p < candidate)
            before += sum(where(here, 1, 0).to(i32), over=p)
        last = candidate if before < wanted else last
    return lowest, last if wanted < equal else count.to(i32)


@sp.kernel
def choose_positions(
    scores: Tensor[f32, T, P], position: i32, kept: i32, lowest: Tensor[i32, T], last: Tensor[i32, T]
):
    """Where there are no more than `kept` positions, all are kept."""
    for t in each(T):
        count = position + t + 1
        key, end = choose(scores, t, count, min(kept, count))
        lowest[t] = key
        last[t] = end


@sp.kernel
def list_positions(
    scores: Tensor[f32, T, P], lowest: Tensor[i32, T], last: Tensor[i32, T], position: i32, places: Tensor[i32, K]
):
    """Of token 0, which stands at `position`."""
    listed = zeros(dtype=i32)
    for p in range(position + 1):
        key = sortable(scores[0, p])
        if key > lowest[0] or (key == lowest[0] and p <= last[0]):
            places[listed] = p.to(i32)
            listed = listed + 1


def make_gather_positions(cache: Any) -> Any:
    """The rows of `places` of both parts of the cache, at most Q, of the positions up to `position`."""

    @sp.kernel(name=f"gather_positions_{cache.name}")
    def gather_positions(
        places: Tensor[i32, K], latents: Tensor[cache, P, C], keys: Tensor[cache, P, S], position: i32,
        some_latents: Tensor[cache, Q, C], some_keys: Tensor[cache, Q, S],
    ):
        for j in each(min(position + 1, Q)):
            place = places[j]
            for c in tiles(C):
                some_latents[j, c] = latents[place, c]
            for s in tiles(S):
                some_keys[j, s] = keys[place, s]

    return gather_positions


def make_latent_attention_sparse(cache: Any) -> Any:
    """`latent_attention` (mla.py) of each token over the positions that it keeps."""

    @sp.kernel(name=f"latent_attention_sparse_{cache.name}")
    def latent_attention_sparse(
        q: Tensor[f32, T, H, D], q_turned: Tensor[f32, T, H, S], keys: Tensor[f32, P, H, D],
        shared: Tensor[cache, P, S], values: Tensor[f32, P, H, V], scores: Tensor[f32, T, Q], lowest: Tensor[i32, T],
        last: Tensor[i32, T], position: i32, scale: f32, out: Tensor[f32, T, H, V],
    ):
        for h in each(H):
            for block in each((T + QUERY_BLOCK - 1) // QUERY_BLOCK):
                first = block * QUERY_BLOCK
                stop = min(first + QUERY_BLOCK, T)
                for t in tiles(span(first, stop)):
                    d = whole(D)
                    s = whole(S)
                    v = whole(V)
                    query = q[t, h, d] * scale
                    turn = q_turned[t, h, s] * scale
                    highest = full(t, value=BELOW_ALL, dtype=f32)
                    total = zeros(t, dtype=f32)
                    acc = zeros(t, v, dtype=f32)
                    for p in tiles(span(0, position + stop)):
                        key = sortable(scores[t, p])
                        kept = (key > lowest[t]) | ((key == lowest[t]) & (p <= last[t]))
                        score = query @ keys[p, h, d] + turn @ shared[p, s]
                        score = where(kept & (p <= position + t), score, MINUS_INFINITY)
                        highest, total, acc = attend(highest, total, acc, score, values[p, h, v], p, exp, f32)
                    out[t, h, v] = acc * (1.0 / total)

    return latent_attention_sparse


cache_index_f32 = make_cache_index(f32)
cache_index_bf16 = make_cache_index(bf16)
index_scores_f32 = make_index_scores(f32)
index_scores_bf16 = make_index_scores(bf16)
gather_positions_f32 = make_gather_positions(f32)
gather_positions_bf16 = make_gather_positions(bf16)
latent_attention_sparse_f32 = make_latent_attention_sparse(f32)
latent_attention_sparse_bf16 = make_latent_attention_sparse(bf16)

# ------------------------------------------------------------------------------------------- references and arguments


def cache_reference(arguments: Arguments) -> dict[str, Array]:
    keys, rests = arguments["keys"].copy(), arguments["rests"].copy()
    filled = slice(arguments["position"], arguments["position"] + len(arguments["key"]))
    keys[filled] = turned(arguments["key"][:, None], arguments, 2)[:, 0].astype(keys.dtype)
    rests[filled] = arguments["rest"].astype(rests.dtype)
    return {"q_turned": turned(arguments["q"], arguments, 2), "keys": keys, "rests": rests}


def scores_of(arguments: Arguments) -> Array:
    """[T, positions]"""
    names = ("q_turned", "q", "weight", "keys", "rests")
    q_turned, q, weight, keys, rests = (arguments[name].astype(np.float64) for name in names)
    met = np.einsum("ths,ps->thp", q_turned, keys) + np.einsum("the,pe->thp", q, rests)
    found: Array = np.einsum("thp,th->tp", np.maximum(met, 0.0), weight)
    return found


def scores_reference(arguments: Arguments) -> dict[str, Array]:
    scores = arguments["scores"].copy()
    stop = arguments["position"] + len(scores)
    scores[:, :stop] = scores_of(arguments)[:, :stop]
    return {"scores": scores}


def kept_of(scores: Array, count: int, kept: int) -> Array:
    """The positions that are kept, rising, of the first `count`."""
    return np.sort(np.argsort(-scores[:count], kind="stable")[:kept])


def key_of(score: Any) -> int:
    bits = int(np.float32(score).view(np.int32))
    return bits ^ 0x7FFFFFFF if bits < 0 else bits


def choose_reference(arguments: Arguments) -> dict[str, Array]:
    scores, kept = arguments["scores"], arguments["kept"]
    lowest, last = (np.empty(len(scores), np.int32) for _ in range(2))
    for t, row in enumerate(scores):
        count = arguments["position"] + t + 1
        found = kept_of(row, count, kept)
        score = row[found].min()
        lowest[t] = key_of(score)
        equal = np.flatnonzero(row[:count] == score)
        taken = np.flatnonzero(row[found] == score)
        last[t] = count if len(equal) == len(taken) else found[taken[-1]]
    return {"lowest": lowest, "last": last}


def list_reference(arguments: Arguments) -> dict[str, Array]:
    places = arguments["places"].copy()
    found = kept_of(arguments["scores"][0], arguments["position"] + 1, len(places))
    places[: len(found)] = found
    return {"places": places}


def gather_reference(arguments: Arguments) -> dict[str, Array]:
    expected = {name: arguments[name].copy() for name in ("some_latents", "some_keys")}
    count = int(np.minimum(arguments["position"] + 1, len(expected["some_keys"])))
    for name, part in expected.items():
        part[:count] = arguments[name.removeprefix("some_")][arguments["places"][:count]]
    return expected


def sparse_reference(arguments: Arguments) -> dict[str, Array]:
    names = ("q", "q_turned", "keys", "shared", "values")
    q, q_turned, keys, shared, values = (arguments[name].astype(np.float64) for name in names)
    out = np.zeros(arguments["out"].shape)
    for t in range(len(q)):
        count = arguments["position"] + t + 1
        row = np.array([key_of(score) for score in arguments["scores"][t, :count]])
        lowest, last = arguments["lowest"][t], arguments["last"][t]
        kept = (row > lowest) | ((row == lowest) & (np.arange(count) <= last))
        score = np.einsum("hd,phd->hp", q[t], keys[:count]) + q_turned[t] @ shared[:count].T
        score = np.where(kept, score * arguments["scale"], -np.inf)
        weight = np.exp(score - score.max(axis=1, keepdims=True))
        out[t] = np.einsum("hp,phv->hv", weight / weight.sum(axis=1, keepdims=True), values[:count])
    return {"out": out}


def cache_arguments(random: "np.random.Generator", shape: Shape, cache: str) -> Arguments:
    t, h, r, e, position = (shape[name] for name in ("T", "H", "R", "E", "position"))
    cosine, sine = tables(position + t + 3, r)
    q, key = normal(random, t, h, 2 * r + e), normal(random, t, 2 * r + e)
    return {
        "q": q[:, :, : 2 * r].reshape(t, h, 2, r), "key": key[:, : 2 * r].reshape(t, 2, r), "rest": key[:, 2 * r :],
        "cosine": cosine, "sine": sine, "position": position, "q_turned": unwritten(t, h, 2, r),
        "keys": normal(random, position + t + 3, 2, r, dtype=cache),
        "rests": normal(random, position + t + 3, e, dtype=cache),
    }


def scores_arguments(random: "np.random.Generator", shape: Shape, cache: str) -> Arguments:
    t, h, s, e, position = (shape[name] for name in ("T", "H", "S", "E", "position"))
    count = position + t + 2
    size = (s + e) ** -0.5
    return {
        "q_turned": normal(random, t, h, s, scale=size), "q": normal(random, t, h, e, scale=size),
        "weight": normal(random, t, h), "keys": normal(random, count, s, dtype=cache),
        "rests": normal(random, count, e, dtype=cache), "position": position, "scores": unwritten(t, count),
    }


def some_scores(random: "np.random.Generator", t: int, count: int) -> Array:
    """Coarse, so that there are ties; of both signs."""
    scores: Array = np.round(normal(random, t, count) * np.float32(8)) / np.float32(8) + np.float32(0.0)
    return scores


def choose_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    t, position = shape["T"], shape["position"]
    return {
        "scores": some_scores(random, t, position + t), "position": position, "kept": shape["K"],
        "lowest": unwritten(t, dtype="i32"), "last": unwritten(t, dtype="i32"),
    }


def chosen(random: "np.random.Generator", shape: Shape, t: int) -> Arguments:
    """scores, lowest and last of t tokens."""
    arguments = choose_arguments(random, {**shape, "T": t})
    return {"scores": arguments["scores"], **choose_reference(arguments)}


def list_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    return {**chosen(random, shape, 1), "position": shape["position"],
            "places": np.full(shape["K"], -1, np.int32)}


def gather_arguments(random: "np.random.Generator", shape: Shape, cache: str) -> Arguments:
    k, c, s, position = (shape[name] for name in ("K", "C", "S", "position"))
    count = position + 1
    places = np.sort(random.permutation(count)[:k]).astype(np.int32)
    return {
        "places": np.concatenate([places, np.zeros(k - len(places), np.int32)]),
        "latents": normal(random, count, c, dtype=cache), "keys": normal(random, count, s, dtype=cache),
        "position": position, "some_latents": normal(random, k, c, dtype=cache),
        "some_keys": normal(random, k, s, dtype=cache),
    }


def sparse_arguments(random: "np.random.Generator", shape: Shape, cache: str) -> Arguments:
    t, h, d, s, v, position = (shape[name] for name in ("T", "H", "D", "S", "V", "position"))
    expanded = normal(random, position + t, h, d + v)
    return {
        "q": normal(random, t, h, d), "q_turned": normal(random, t, h, s), "keys": expanded[:, :, :d],
        "shared": normal(random, position + t, s, dtype=cache), "values": expanded[:, :, d:],
        **chosen(random, shape, t), "position": position, "scale": (d + s) ** -0.5, "out": unwritten(t, h, v),
    }


TURNED = Tolerance(2e-6, 1e-6, "two products and their difference, which may cancel, rounded to f32 each")
SCORES = Tolerance(1e-5, 2e-5, "sums of up to a few thousand products in any order, which cancel")
SOFTMAX = Tolerance(2e-5, 5e-6, "scores of a few units are rounded to f32 and exp makes that relative; the sums run in "
                    "any order and values cancel")


def _cache(kernel: Any, cache: str) -> LibraryKernel:
    size = NUMPY_DTYPES[cache].itemsize
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=cache_reference,
        make_arguments=lambda random, shape: cache_arguments(random, shape, cache),
        tolerance=TURNED if cache == "f32"
        else Tolerance(2.0**-7, 1e-6, f"{TURNED.reason}, then once to bf16, where the two may round apart"),
        cases=tuple(
            Case({"T": t, "H": 64, "R": 32, "E": 64, "position": 0}, flops=t * 6 * 65 * 32,
                 bytes=t * (8 * 64 * 64 + (4 + size) * 128 + 8 * 32)) for t in (1, 128)
        ),
        check_shapes=({"T": 0, "H": 1, "R": 1, "E": 1, "position": 0}, {"T": 1, "H": 1, "R": 1, "E": 1, "position": 3},
                      {"T": 5, "H": 3, "R": 4, "E": 19, "position": 2},
                      {"T": 3, "H": 4, "R": 32, "E": 64, "position": 11}),
        dtype=cache,
    )


def _scores(kernel: Any, cache: str) -> LibraryKernel:
    size = NUMPY_DTYPES[cache].itemsize
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=scores_reference,
        make_arguments=lambda random, shape: scores_arguments(random, shape, cache), tolerance=SCORES,
        cases=tuple(
            Case({"T": t, "H": 64, "S": 64, "E": 64, "position": position}, flops=2 * t * 64 * 129 * (position + 1),
                 bytes=4 * t * (64 * 129 + position + t) + size * 128 * (position + t))
            for t, position in ((1, 4095), (64, 4000))
        ),
        check_shapes=({"T": 0, "H": 1, "S": 2, "E": 1, "position": 0}, {"T": 1, "H": 1, "S": 1, "E": 1, "position": 0},
                      {"T": 3, "H": 5, "S": 4, "E": 19, "position": 33},
                      {"T": 2, "H": 8, "S": 32, "E": 32, "position": 70}),
        dtype=cache,
    )


def _gather(kernel: Any, cache: str) -> LibraryKernel:
    size = NUMPY_DTYPES[cache].itemsize
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=gather_reference,
        make_arguments=lambda random, shape: gather_arguments(random, shape, cache), tolerance=EXACT,
        cases=(Case({"K": 2048, "C": 512, "S": 64, "position": 8191}, flops=0, bytes=2 * size * 2048 * 576),),
        check_shapes=({"K": 3, "C": 1, "S": 2, "position": 0}, {"K": 5, "C": 19, "S": 8, "position": 33},
                      {"K": 64, "C": 40, "S": 16, "position": 200}),
        dtype=cache,
    )


def _sparse(kernel: Any, cache: str) -> LibraryKernel:
    t, h, d, s, v = 512, 16, 128, 64, 128
    pairs = t * (t + 1) // 2
    size = 4 * h * (t * (d + s + v) + t * (d + v)) + NUMPY_DTYPES[cache].itemsize * t * s + 4 * t * t
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=sparse_reference,
        make_arguments=lambda random, shape: sparse_arguments(random, shape, cache), tolerance=SOFTMAX,
        cases=(Case({"T": t, "H": h, "D": d, "S": s, "V": v, "K": 128, "position": 0},
                    flops=2 * pairs * h * (d + s + v), bytes=size),),
        check_shapes=(
            {"T": 0, "H": 1, "D": 4, "S": 2, "V": 3, "K": 2, "position": 0},
            {"T": 1, "H": 1, "D": 1, "S": 2, "V": 1, "K": 1, "position": 0},
            {"T": 7, "H": 2, "D": 5, "S": 4, "V": 6, "K": 3, "position": 6},
            {"T": 20, "H": 3, "D": 16, "S": 8, "V": 12, "K": 9, "position": 133},
        ),
        dtype=cache,
    )


CHOOSING = ({"T": 1, "K": 1, "position": 0}, {"T": 3, "K": 4, "position": 1}, {"T": 2, "K": 20, "position": 333})
KERNELS = (
    _cache(cache_index_f32, "f32"),
    _cache(cache_index_bf16, "bf16"),
    _scores(index_scores_f32, "f32"),
    _scores(index_scores_bf16, "bf16"),
    LibraryKernel(
        name="choose_positions", kernel=choose_positions, reference=choose_reference,
        make_arguments=choose_arguments, tolerance=EXACT,
        cases=(Case({"T": 1, "K": 2048, "position": 8191}, flops=33 * 8192, bytes=4 * 8192 + 8),),
        check_shapes=({"T": 0, "K": 1, "position": 0}, *CHOOSING),
    ),
    LibraryKernel(
        name="list_positions", kernel=list_positions, reference=list_reference, make_arguments=list_arguments,
        tolerance=EXACT,
        cases=(Case({"T": 1, "K": 2048, "position": 8191}, flops=0, bytes=4 * 8192 + 4 * 2048 + 8),),
        check_shapes=(*CHOOSING, {"T": 1, "K": 100, "position": 2500}),
    ),
    _gather(gather_positions_f32, "f32"),
    _gather(gather_positions_bf16, "bf16"),
    _sparse(latent_attention_sparse_f32, "f32"),
    _sparse(latent_attention_sparse_bf16, "bf16"),
)
