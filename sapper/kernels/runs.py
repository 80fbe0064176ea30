"""Attention of runs: the pieces of prompts in a step of several sequences (paged.py), as a session attends to a prompt.

A run is some tokens of one sequence that stand one behind the other, in as many rows of a step. Token by token, as
paged.py takes them, each reads all positions before it; the tokens of a run share what they read. The pages of the
sequences that have runs are copied, one behind the other, to where their positions lie side by side; then run r, of
count[r] tokens from row start[r] on, of which the first stands at position[r], finds its sequence from base[r] on.

    gather_pages            the pages of keys and values that a step's runs read
    attention_runs          attention.py for runs

Of DeepSeek's latent cache the same, naively (mla.py), between which `expand` makes keys and values of what is gathered:

    gather_latents          the pages of latent vectors and shared keys
    latent_attention_runs   mla.py for runs

Kernels whose name ends in `rounded` are those of attention.py and mla_rounded.py: in products of bf16.
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, each, f32, i32, tiles

from . import attention, mla
from .attention import ROUNDED_PRODUCTS, attend_queries
from .mla import attend_expanded
from .paged import ATTENTION, PAGE
from .record import EXACT, NUMPY_DTYPES, Arguments, Array, Case, LibraryKernel, Shape, normal

T, H, G, D, S, V, C, X, P, N, R, J = sp.dims("T H G D S V C X P N R J")


def make_gather_pages(cache: Any) -> Any:
    """key_pages, value_pages [N, H, PAGE, D]; page [J]: which of the N pages. keys, values [H, P, D], P >= J * PAGE:
    page[j] is at positions j * PAGE ..."""

    @sp.kernel(name=f"gather_pages_{cache.name}")
    def gather_pages(
        key_pages: Tensor[cache, N, H, PAGE, D], value_pages: Tensor[cache, N, H, PAGE, D], page: Tensor[i32, J],
        keys: Tensor[cache, H, P, D], values: Tensor[cache, H, P, D],
    ):
        for j, h in each(J, H, disjoint=True):
            n = page[j]
            for p, d in tiles(PAGE, D):
                keys[h, j * PAGE + p, d] = key_pages[n, h, p, d]
                values[h, j * PAGE + p, d] = value_pages[n, h, p, d]

    return gather_pages


def make_gather_latents(cache: Any) -> Any:
    """latent_pages [N, PAGE, C], key_pages [N, PAGE, X]; page [J]. latents [P, C], keys [P, X]."""

    @sp.kernel(name=f"gather_latents_{cache.name}")
    def gather_latents(
        latent_pages: Tensor[cache, N, PAGE, C], key_pages: Tensor[cache, N, PAGE, X], page: Tensor[i32, J],
        latents: Tensor[cache, P, C], keys: Tensor[cache, P, X],
    ):
        for j in each(J, disjoint=True):
            n = page[j]
            for p, c in tiles(PAGE, C):
                latents[j * PAGE + p, c] = latent_pages[n, p, c]
            for p, x in tiles(PAGE, X):
                keys[j * PAGE + p, x] = key_pages[n, p, x]

    return gather_latents


def make_attention_runs(name: str, cache: Any, products: Any = f32) -> Any:
    """The kernel for keys and values of that dtype, in products of another; see `attention.make_attention`."""
    rounded = products is not f32
    narrow, wide = attention.QUERY_BLOCK, attention.WIDE_QUERY_BLOCK

    @sp.kernel(name=name, specialise="D")
    def attention_runs(
        q: Tensor[f32, T, H, G, D], keys: Tensor[cache, H, P, D], values: Tensor[cache, H, P, D],
        start: Tensor[i32, R], count: Tensor[i32, R], position: Tensor[i32, R], base: Tensor[i32, R], scale: f32,
        out: Tensor[f32, T, H, G, D],
    ):
        for r, h, g in each(R, H, G, disjoint=True):
            row, tokens, place, begin = start[r], count[r], position[r], base[r]
            size = sp.max(sp.min(D // 2, wide), narrow) if rounded else narrow
            for block in each((tokens + size - 1) // size, disjoint=True):
                first = block * size
                stop = sp.min(first + size, tokens)
                attend_queries(q, keys, values, out, row, begin, place, first, stop, h, g, scale, f32, products)

    return attention_runs


def make_latent_attention_runs(name: str, cache: Any, products: Any = f32) -> Any:
    """q, out [T, H, ...]; keys, values [P, H, ...] of all that is gathered; see `mla.make_latent_attention`."""
    rounded = products is not f32
    size = mla.WIDE_QUERY_BLOCK if rounded else mla.QUERY_BLOCK

    @sp.kernel(name=name, specialise="D S V")
    def latent_attention_runs(
        q: Tensor[f32, T, H, D], q_turned: Tensor[f32, T, H, S], keys: Tensor[products, P, H, D],
        shared: Tensor[cache, P, S], values: Tensor[products, P, H, V], start: Tensor[i32, R], count: Tensor[i32, R],
        position: Tensor[i32, R], base: Tensor[i32, R], scale: f32, out: Tensor[f32, T, H, V],
    ):
        for r, h in each(R, H, disjoint=True):
            row, tokens, place, begin = start[r], count[r], position[r], base[r]
            for block in each((tokens + size - 1) // size, disjoint=True):
                first = block * size
                stop = sp.min(first + size, tokens)
                attend_expanded(q, q_turned, keys, shared, values, out, row, begin, place, first, stop, h, scale,
                                products)

    return latent_attention_runs


gather_pages_f32 = make_gather_pages(f32)
gather_pages_bf16 = make_gather_pages(bf16)
gather_latents_f32 = make_gather_latents(f32)
gather_latents_bf16 = make_gather_latents(bf16)
attention_runs_f32 = make_attention_runs("attention_runs_f32", f32)
attention_runs_bf16 = make_attention_runs("attention_runs_bf16", bf16)
attention_runs_rounded = make_attention_runs("attention_runs_rounded", bf16, bf16)
latent_attention_runs_f32 = make_latent_attention_runs("latent_attention_runs_f32", f32)
latent_attention_runs_bf16 = make_latent_attention_runs("latent_attention_runs_bf16", bf16)
latent_attention_runs_rounded = make_latent_attention_runs("latent_attention_runs_rounded", bf16, bf16)

# ------------------------------------------------------------------------------------------- references and arguments


def of_pages(name: str, arguments: Arguments) -> Array:
    """[J * PAGE, ...]: the pages that are gathered, one behind the other."""
    pages = arguments[name][arguments["page"]]
    found: Array = pages.reshape(-1, *pages.shape[2:])
    return found


def gather_pages_reference(arguments: Arguments) -> dict[str, Array]:
    expected = {name: arguments[name].copy() for name in ("keys", "values")}
    for name, pages in (("keys", "key_pages"), ("values", "value_pages")):
        found = arguments[pages][arguments["page"]]
        for h, of_head in enumerate(found.swapaxes(0, 1)):
            expected[name][h, : found.shape[0] * PAGE] = of_head.reshape(-1, found.shape[-1])
    return expected


def gather_latents_reference(arguments: Arguments) -> dict[str, Array]:
    expected = {name: arguments[name].copy() for name in ("latents", "keys")}
    for name, pages in (("latents", "latent_pages"), ("keys", "key_pages")):
        found = of_pages(pages, arguments)
        expected[name][: len(found)] = found
    return expected


def each_run(arguments: Arguments) -> list[tuple[slice, slice, int]]:
    """Of each run: its rows, where its positions lie, and the position of its first token."""
    names = ("start", "count", "position", "base")
    return [(slice(start, start + count), slice(base, base + position + count), position)
            for start, count, position, base in zip(*(arguments[name].tolist() for name in names), strict=True)]


def attention_runs_reference(arguments: Arguments) -> dict[str, Array]:
    out = arguments["out"].astype(np.float64)
    for rows, seen, position in each_run(arguments):
        out[rows] = attention.reference({
            "q": arguments["q"][rows], "keys": arguments["keys"][:, seen], "values": arguments["values"][:, seen],
            "position": position, "scale": arguments["scale"]})["out"]
    return {"out": out}


def latent_attention_runs_reference(arguments: Arguments) -> dict[str, Array]:
    out = arguments["out"].astype(np.float64)
    for rows, seen, position in each_run(arguments):
        out[rows] = mla.attention_reference({
            **{name: arguments[name][rows] for name in ("q", "q_turned")},
            **{name: arguments[name][seen] for name in ("keys", "shared", "values")},
            "position": position, "scale": arguments["scale"]})["out"]
    return {"out": out}


def some_runs(shape: Shape) -> Arguments:
    """R runs, of which the first has T tokens from `position` on and those behind it fewer; rows of no run between."""
    numbers = range(shape["R"])
    counts = [max(shape["T"] - 3 * r, 0) for r in numbers]
    positions = [max(shape["position"] - 70 * r, 0) for r in numbers]
    pages = [-(-sum(seen) // PAGE) for seen in zip(positions, counts, strict=True)]
    starts, bases = ([sum(before[:r]) for r in numbers] for before in ([count + 1 for count in counts], pages))
    return {"start": np.array(starts, np.int32), "count": np.array(counts, np.int32),
            "position": np.array(positions, np.int32), "base": np.array(bases, np.int32) * PAGE}


def extents_of(runs: Arguments) -> tuple[int, int]:
    """Rows of a step with these runs, and positions that it gathers; some more than are used."""
    start, count, position, base = runs.values()
    rows, seen = (int(ends.max(initial=0)) for ends in (start + count, base + position + count))
    return rows + 2, -(-seen // PAGE) * PAGE + 3


def unseen(array: Array, runs: Arguments, axis: int = 0) -> Array:
    """Positions that no run has hold NaN, so that reading one is found."""
    seen = np.zeros(array.shape[axis], bool)
    for _, positions, _ in each_run(runs):
        seen[positions] = True
    array[(slice(None),) * axis + (~seen,)] = np.nan
    return array


def attention_runs_arguments(random: "np.random.Generator", shape: Shape, cache: str) -> Arguments:
    runs, (h, g, d) = some_runs(shape), (shape[name] for name in "HGD")
    rows, seen = extents_of(runs)
    keys, values = (unseen(normal(random, h, seen, d, dtype=cache), runs, 1) for _ in range(2))
    return {"q": normal(random, rows, h, g, d), "keys": keys, "values": values, **runs, "scale": d**-0.5,
            "out": normal(random, rows, h, g, d)}


def latent_attention_runs_arguments(
    random: "np.random.Generator", shape: Shape, cache: str, expanded: str
) -> Arguments:
    runs, (h, d, s, v) = some_runs(shape), (shape[name] for name in "HDSV")
    rows, seen = extents_of(runs)
    joined = unseen(normal(random, seen, h, d + v, dtype=expanded), runs)
    return {
        "q": normal(random, rows, h, d), "q_turned": normal(random, rows, h, s), "keys": joined[:, :, :d],
        "shared": unseen(normal(random, seen, s, dtype=cache), runs), "values": joined[:, :, d:], **runs,
        "scale": (d + s) ** -0.5, "out": normal(random, rows, h, v),
    }


def gather_pages_arguments(random: "np.random.Generator", shape: Shape, cache: str) -> Arguments:
    h, d, n, j = (shape[name] for name in "HDNJ")
    pages = {name: normal(random, n, h, PAGE, d, dtype=cache) for name in ("key_pages", "value_pages")}
    return {**pages, "page": random.integers(0, n, j).astype(np.int32),
            **{name: normal(random, h, j * PAGE + 3, d, dtype=cache) for name in ("keys", "values")}}


def gather_latents_arguments(random: "np.random.Generator", shape: Shape, cache: str) -> Arguments:
    c, x, n, j = (shape[name] for name in "CXNJ")
    return {
        "latent_pages": normal(random, n, PAGE, c, dtype=cache), "key_pages": normal(random, n, PAGE, x, dtype=cache),
        "page": random.integers(0, n, j).astype(np.int32), "latents": normal(random, j * PAGE + 3, c, dtype=cache),
        "keys": normal(random, j * PAGE + 3, x, dtype=cache),
    }


def pairs_of(shape: dict[str, int]) -> tuple[int, int, int]:
    """Queries of some runs, pairs of these with positions that they see, and those positions."""
    queries = pairs = seen = 0
    for rows, positions, position in each_run(some_runs(shape)):
        count = rows.stop - rows.start
        queries, seen = queries + count, seen + positions.stop - positions.start
        pairs += count * position + count * (count + 1) // 2
    return queries, pairs, seen


def attention_case(shape: dict[str, int], size: int) -> Case:
    queries, pairs, seen = pairs_of(shape)
    h, g, d = (shape[name] for name in "HGD")
    return Case(shape, flops=4 * pairs * h * g * d, bytes=8 * queries * h * g * d + 2 * size * h * seen * d)


def latent_case(shape: dict[str, int], size: int) -> Case:
    queries, pairs, seen = pairs_of(shape)
    h, d, s, v = (shape[name] for name in "HDSV")
    return Case(shape, flops=2 * pairs * h * (d + s + v),
                bytes=4 * queries * h * (d + s + v) + size * seen * h * (d + v))


SMALL = ({"R": 0, "T": 0, "position": 0, "H": 1, "G": 1, "D": 2, "S": 1, "V": 1},
         {"R": 1, "T": 1, "position": 0, "H": 1, "G": 1, "D": 1, "S": 1, "V": 1},
         {"R": 2, "T": 7, "position": 66, "H": 2, "G": 3, "D": 5, "S": 3, "V": 4},
         {"R": 3, "T": 40, "position": 100, "H": 2, "G": 2, "D": 64, "S": 16, "V": 33})


def _runs_entry(kernel: Any, cache: str, rounded: bool, latent: bool) -> LibraryKernel:
    names = "R T position " + ("H D S V" if latent else "H G D")
    expanded = "bf16" if rounded else "f32"
    size = NUMPY_DTYPES[expanded if latent else cache].itemsize
    prompt = {"R": 1, "T": 256, "position": 768}
    return LibraryKernel(
        name=kernel.name, kernel=kernel,
        reference=latent_attention_runs_reference if latent else attention_runs_reference,
        make_arguments=(lambda random, shape: latent_attention_runs_arguments(random, shape, cache, expanded)) if latent
        else (lambda random, shape: attention_runs_arguments(random, shape, cache)),
        tolerance=ROUNDED_PRODUCTS["f32"] if rounded else ATTENTION,
        cases=(latent_case({**prompt, "H": 16, "D": 128, "S": 64, "V": 128}, size) if latent
               else attention_case({**prompt, "H": 3, "G": 3, "D": 64}, size),),
        check_shapes=tuple({name: shape[name] for name in names.split()} for shape in SMALL), dtype=cache,
        products="bf16" if rounded else "f32",
    )


def _gather_entry(kernel: Any, cache: str, latent: bool) -> LibraryKernel:
    names, extents = ("CX", (512, 64)) if latent else ("HD", (3, 64))
    one = PAGE * (sum(extents) if latent else 2 * extents[0] * extents[1]) * NUMPY_DTYPES[cache].itemsize
    shapes: tuple[dict[str, int], ...] = tuple(
        {"N": n, "J": j, **dict(zip(names, rest, strict=True))}
        for n, j, rest in ((1, 0, (1, 1)), (1, 1, (1, 1)), (3, 5, (2, 7)), (4, 2, (3, 64))))
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=gather_latents_reference if latent else gather_pages_reference,
        make_arguments=(lambda random, shape: gather_latents_arguments(random, shape, cache)) if latent
        else (lambda random, shape: gather_pages_arguments(random, shape, cache)),
        tolerance=EXACT, cases=(Case({"N": 64, "J": 16, **dict(zip(names, extents, strict=True))}, flops=0,
                                     bytes=2 * 16 * one),),
        check_shapes=shapes, dtype=cache,
    )


KERNELS = (
    _gather_entry(gather_pages_f32, "f32", False),
    _gather_entry(gather_pages_bf16, "bf16", False),
    _gather_entry(gather_latents_f32, "f32", True),
    _gather_entry(gather_latents_bf16, "bf16", True),
    _runs_entry(attention_runs_f32, "f32", False, False),
    _runs_entry(attention_runs_bf16, "bf16", False, False),
    _runs_entry(attention_runs_rounded, "bf16", True, False),
    _runs_entry(latent_attention_runs_f32, "f32", False, True),
    _runs_entry(latent_attention_runs_bf16, "bf16", False, True),
    _runs_entry(latent_attention_runs_rounded, "bf16", True, True),
)
