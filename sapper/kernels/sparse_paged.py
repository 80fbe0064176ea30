"""DeepSeek sparse attention (sparse.py) over a paged cache (paged.py): each token has an owner and a place of its own.

    cache_index_paged              index keys go to their pages
    index_scores_paged             the scores of the positions of a token's own sequence, in their order
    choose_positions_paged         which of them are kept
    latent_attention_paged_sparse  absorbed attention over those
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
    f32,
    full,
    i32,
    max,
    maximum,
    min,
    span,
    sum,
    tiles,
    where,
    whole,
    zeros,
)

from .online_softmax import attend
from .paged import (
    ATTENTION,
    PAGE,
    angles,
    counts_of,
    gathered,
    latent_arguments,
    page_count,
    places,
    spots,
    turn,
)
from .record import EXACT, NUMPY_DTYPES, Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten
from .shares import leave, part_of_row, rows_of_share, shared_reference
from .sparse import BELOW_ALL, MINUS_INFINITY, SCORES, choose, choose_reference, key_of, some_scores, sortable

T, H, E, R, P, B, N, S, C, X, Q, W = sp.dims("T H E R P B N S C X Q W")


def make_cache_index_paged(cache: Any) -> Any:
    """`cache_index` (sparse.py); keys [N, PAGE, 2, R], rests [N, PAGE, E]: N pages."""

    @sp.kernel(name=f"cache_index_paged_{cache.name}")
    def cache_index_paged(
        q: Tensor[f32, T, H, 2, R], key: Tensor[f32, T, 2, R], rest: Tensor[f32, T, E], cosine: Tensor[f32, P, R],
        sine: Tensor[f32, P, R], owner: Tensor[i32, T], place: Tensor[i32, T], table: Tensor[i32, B, S],
        q_turned: Tensor[f32, T, H, 2, R], keys: Tensor[cache, N, PAGE, 2, R], rests: Tensor[cache, N, PAGE, E],
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
            for r in tiles(R):
                c = cosine[position, r]
                s = sine[position, r]
                a = key[t, 0, r]
                b = key[t, 1, r]
                keys[page, row, 0, r] = (a * c - b * s).to(cache)
                keys[page, row, 1, r] = (a * s + b * c).to(cache)
            for e in tiles(E):
                rests[page, row, e] = rest[t, e].to(cache)

    return cache_index_paged


def make_index_scores_paged(cache: Any) -> Any:
    """scores [T, Q]: of positions 0 ... place[t]; keys [N, PAGE, X], rests [N, PAGE, E]."""

    @sp.kernel(name=f"index_scores_paged_{cache.name}")
    def index_scores_paged(
        q_turned: Tensor[f32, T, H, X], q: Tensor[f32, T, H, E], weight: Tensor[f32, T, H],
        keys: Tensor[cache, N, PAGE, X], rests: Tensor[cache, N, PAGE, E], owner: Tensor[i32, T],
        place: Tensor[i32, T], table: Tensor[i32, B, S], scores: Tensor[f32, T, Q],
    ):
        for t in each(T):
            for i in each(place[t] // PAGE + 1):
                page = table[owner[t], i]
                p = whole(span(0, min(PAGE, place[t] + 1 - i * PAGE)))
                h = whole(H)
                x = whole(X)
                e = whole(E)
                met = q_turned[t, h, x] @ keys[page, p, x] + q[t, h, e] @ rests[page, p, e]
                scores[t, i * PAGE + p] = sum(maximum(met, 0.0) * weight[t, h], over=h)

    return index_scores_paged


@sp.kernel
def choose_positions_paged(
    scores: Tensor[f32, T, Q], place: Tensor[i32, T], kept: i32, lowest: Tensor[i32, T], last: Tensor[i32, T]
):
    """`choose_positions` (sparse.py) for tokens at any positions."""
    for t in each(T):
        count = place[t] + 1
        key, end = choose(scores, t, count, min(kept, count))
        lowest[t] = key
        last[t] = end


def make_latent_attention_paged_sparse(cache: Any) -> Any:
    """`latent_attention_paged` (paged.py) of each token over the positions that it keeps; shares are of all positions.
    """

    @sp.kernel(name=f"latent_attention_paged_sparse_{cache.name}")
    def latent_attention_paged_sparse(
        q: Tensor[f32, T, H, C], q_turned: Tensor[f32, T, H, X], latents: Tensor[cache, N, PAGE, C],
        keys: Tensor[cache, N, PAGE, X], owner: Tensor[i32, T], place: Tensor[i32, T], table: Tensor[i32, B, S],
        scores: Tensor[f32, T, Q], lowest: Tensor[i32, T], last: Tensor[i32, T], row: Tensor[i32, W + 1],
        at: Tensor[i32, W + 1], scale: f32, highest: Tensor[f32, W, 2, H], total: Tensor[f32, W, 2, H],
        partial: Tensor[f32, W, 2, H, C], out: Tensor[f32, T, H, C],
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
                    top = full(h, value=BELOW_ALL, dtype=f32)
                    sums = zeros(h, dtype=f32)
                    acc = zeros(h, c, dtype=f32)
                    for i in range(begin // PAGE, cdiv(end, PAGE)):
                        page = table[sequence, i]
                        for p in tiles(span(max(begin - i * PAGE, 0), min(PAGE, end - i * PAGE))):
                            key = sortable(scores[t, i * PAGE + p])
                            kept = (key > lowest[t]) | ((key == lowest[t]) & (i * PAGE + p <= last[t]))
                            latent = latents[page, p, c]
                            score = query @ latent + turn @ keys[page, p, s]
                            score = where(kept, score, MINUS_INFINITY)
                            top, sums, acc = attend(top, sums, acc, score, latent, p, exp, f32)
                    if end - begin == count:
                        out[t, h, c] = acc / sums
                    else:
                        leave(highest, total, partial, w, begin, h, c, top, sums, acc)

    return latent_attention_paged_sparse


cache_index_paged_f32 = make_cache_index_paged(f32)
cache_index_paged_bf16 = make_cache_index_paged(bf16)
index_scores_paged_f32 = make_index_scores_paged(f32)
index_scores_paged_bf16 = make_index_scores_paged(bf16)
latent_attention_paged_sparse_f32 = make_latent_attention_paged_sparse(f32)
latent_attention_paged_sparse_bf16 = make_latent_attention_paged_sparse(bf16)

# ------------------------------------------------------------------------------------------- references and arguments


def cache_reference(arguments: Arguments) -> dict[str, Array]:
    keys, rests = arguments["keys"].copy(), arguments["rests"].copy()
    q_turned = np.empty(arguments["q"].shape)
    for t, (page, row) in enumerate(spots(arguments)):
        q_turned[t] = turn(arguments["q"][t], arguments, t)
        keys[page, row] = turn(arguments["key"][t], arguments, t).astype(keys.dtype)
        rests[page, row] = arguments["rest"][t].astype(rests.dtype)
    return {"q_turned": q_turned, "keys": keys, "rests": rests}


def scores_reference(arguments: Arguments) -> dict[str, Array]:
    scores = arguments["scores"].copy()
    for t in range(len(scores)):
        q_turned, q, weight = (arguments[name][t].astype(np.float64) for name in ("q_turned", "q", "weight"))
        keys, rests = (gathered(arguments[name], arguments, t) for name in ("keys", "rests"))
        scores[t, : len(keys)] = weight @ np.maximum(q_turned @ keys.T + q @ rests.T, 0.0)
    return {"scores": scores}


def choose_paged_reference(arguments: Arguments) -> dict[str, Array]:
    found = [choose_reference({**arguments, "scores": row[None], "position": int(place)})
             for row, place in zip(arguments["scores"], arguments["place"], strict=True)]
    return {name: np.array([one[name][0] for one in found], np.int32) for name in ("lowest", "last")}


def sparse_reference(arguments: Arguments) -> dict[str, Array]:
    def found(t: int, seen: slice) -> tuple[Array, Array]:
        latents, keys = (gathered(arguments[name], arguments, t)[seen] for name in ("latents", "keys"))
        row = np.array([key_of(score) for score in arguments["scores"][t, seen]])
        lowest, last = arguments["lowest"][t], arguments["last"][t]
        kept = (row > lowest) | ((row == lowest) & (np.arange(seen.start, seen.stop) <= last))
        score = arguments["q"][t].astype(np.float64) @ latents.T + arguments["q_turned"][t].astype(np.float64) @ keys.T
        return np.where(kept, score * arguments["scale"], -np.inf), latents

    return shared_reference(arguments, counts_of(arguments, 1), found)


def cache_arguments(random: "np.random.Generator", shape: Shape, cache: str) -> Arguments:
    t, h, r, e, n = shape["T"], shape["H"], shape["R"], shape["E"], page_count(shape)
    q, key = normal(random, t, h, 2 * r + e), normal(random, t, 2 * r + e)
    return {
        "q": q[:, :, : 2 * r].reshape(t, h, 2, r), "key": key[:, : 2 * r].reshape(t, 2, r), "rest": key[:, 2 * r :],
        **angles(shape), **places(random, shape), "q_turned": unwritten(t, h, 2, r),
        "keys": normal(random, n, PAGE, 2, r, dtype=cache), "rests": normal(random, n, PAGE, e, dtype=cache),
    }


def scores_arguments(random: "np.random.Generator", shape: Shape, cache: str) -> Arguments:
    t, h, x, e, n = shape["T"], shape["H"], shape["X"], shape["E"], page_count(shape)
    size = (x + e) ** -0.5
    return {
        "q_turned": normal(random, t, h, x, scale=size), "q": normal(random, t, h, e, scale=size),
        "weight": normal(random, t, h), "keys": normal(random, n, PAGE, x, dtype=cache),
        "rests": normal(random, n, PAGE, e, dtype=cache), **places(random, shape),
        "scores": unwritten(t, shape["position"] + 2),
    }


def choose_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    t = shape["T"]
    return {
        "scores": some_scores(random, t, shape["position"] + 1), "place": places(random, shape)["place"],
        "kept": shape["K"], "lowest": unwritten(t, dtype="i32"), "last": unwritten(t, dtype="i32"),
    }


def sparse_arguments(random: "np.random.Generator", shape: Shape, cache: str) -> Arguments:
    dense = latent_arguments(random, shape, cache)
    last = {name: dense.pop(name) for name in ("row", "at", "scale", "highest", "total", "partial", "out")}
    choosing = {**choose_arguments(random, shape), "place": dense["place"]}
    return {**dense, "scores": choosing["scores"], **choose_paged_reference(choosing), **last}


SMALL = ({"T": 0, "B": 1, "H": 1, "R": 1, "E": 2, "C": 3, "X": 2, "K": 1, "W": 2, "position": 0},
         {"T": 1, "B": 1, "H": 1, "R": 1, "E": 1, "C": 1, "X": 1, "K": 2, "W": 3, "position": 3},
         {"T": 5, "B": 3, "H": 2, "R": 5, "E": 3, "C": 9, "X": 6, "K": 4, "W": 4, "position": 33},
         {"T": 9, "B": 4, "H": 3, "R": 32, "E": 17, "C": 40, "X": 20, "K": 12, "W": 7, "position": 150})


def _shapes(names: str) -> tuple[dict[str, int], ...]:
    return tuple({name: shape[name] for name in names.split()} for shape in SMALL)


def _entries(cache: str) -> tuple[LibraryKernel, ...]:
    size = NUMPY_DTYPES[cache].itemsize
    rounding = "two products and their difference, which may cancel"
    made = globals()
    return (
        LibraryKernel(
            name=f"cache_index_paged_{cache}", kernel=made[f"cache_index_paged_{cache}"], reference=cache_reference,
            make_arguments=lambda random, shape: cache_arguments(random, shape, cache),
            tolerance=Tolerance(2e-6, 2e-6, rounding) if cache == "f32"
            else Tolerance(2.0**-7, 2e-6, f"{rounding}, then once to bf16, where the two may round apart"),
            cases=(Case({"T": 8, "B": 8, "H": 64, "R": 32, "E": 64, "position": 511}, flops=8 * 6 * 65 * 32,
                        bytes=8 * (8 * 64 * 64 + (4 + size) * 128 + 8 * 32)),),
            check_shapes=_shapes("T B H R E position"), dtype=cache,
        ),
        LibraryKernel(
            name=f"index_scores_paged_{cache}", kernel=made[f"index_scores_paged_{cache}"],
            reference=scores_reference, make_arguments=lambda random, shape: scores_arguments(random, shape, cache),
            tolerance=SCORES,
            cases=(Case({"T": 8, "B": 8, "H": 64, "X": 64, "E": 64, "position": 511}, flops=2 * 8 * 64 * 129 * 512,
                        bytes=8 * (4 * 64 * 129 + (4 + size * 128) * 512)),),
            check_shapes=_shapes("T B H X E position"), dtype=cache,
        ),
        LibraryKernel(
            name=f"latent_attention_paged_sparse_{cache}", kernel=made[f"latent_attention_paged_sparse_{cache}"],
            reference=sparse_reference, make_arguments=lambda random, shape: sparse_arguments(random, shape, cache),
            tolerance=ATTENTION,
            cases=(Case({"T": 4, "B": 4, "H": 16, "C": 512, "X": 64, "K": 128, "W": 4, "position": 511},
                        flops=2 * 4 * 16 * (2 * 512 + 64) * 512,
                        bytes=4 * 4 * 16 * (2 * 512 + 64) + (size * 576 + 4) * 4 * 512),),
            check_shapes=_shapes("T B H C X K W position"), dtype=cache,
        ),
    )


KERNELS = (
    *_entries("f32"),
    *_entries("bf16"),
    LibraryKernel(
        name="choose_positions_paged", kernel=choose_positions_paged, reference=choose_paged_reference,
        make_arguments=choose_arguments, tolerance=EXACT,
        cases=(Case({"T": 8, "B": 8, "K": 128, "position": 511}, flops=33 * 8 * 512, bytes=4 * 8 * 512 + 12 * 8),),
        check_shapes=_shapes("T B K position"),
    ),
)
