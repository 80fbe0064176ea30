"""Rotary position embedding (Su et al., 2021): pairs of features turn by an angle that grows with the position.

With R pairs in each head of 2 * R features, pair i at position p turns by the angle whose cosine and sine stand
in cosine[p, i] and sine[p, i]. Which features form a pair differs between checkpoints:

    half-split    feature i with i + R         (Hugging Face): a head is viewed as [2, R]
    interleaved   feature 2 * i with 2 * i + 1  (the paper, GGUF): a head is viewed as [R, 2]

Each is there out of place and in place. `rotate_and_cache` is the form that a decoder wants: it turns the queries
and the keys of new tokens and puts keys and values into the cache, in one pass. `norm_rotate_and_cache` is that of
models in which each head of queries and keys goes through RMSNorm first, over all its features, with gains that all
heads of queries share, and others that all heads of keys do (Qwen3).
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, f32, i32, rsqrt, sum, tiles, whole

from .record import NUMPY_DTYPES, Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

T, H, R, P, G = sp.dims("T H R P G")


def turned(x: Array, arguments: Arguments, pair_axis: int) -> Array:
    """x [T, H, ...] turned, where `pair_axis` (of length 2) tells the two features of a pair apart."""
    start = arguments["position"]
    cosine = arguments["cosine"][start : start + x.shape[0], None, :].astype(np.float64)
    sine = arguments["sine"][start : start + x.shape[0], None, :].astype(np.float64)
    a, b = np.take(x, 0, axis=pair_axis).astype(np.float64), np.take(x, 1, axis=pair_axis).astype(np.float64)
    return np.stack([a * cosine - b * sine, a * sine + b * cosine], axis=pair_axis)


def half_split_reference(arguments: Arguments) -> dict[str, Array]:
    return {"y": turned(arguments["x"], arguments, 2)}


def interleaved_reference(arguments: Arguments) -> dict[str, Array]:
    return {"y": turned(arguments["x"], arguments, 3)}


def half_split_in_place_reference(arguments: Arguments) -> dict[str, Array]:
    return {"x": turned(arguments["x"], arguments, 2)}


def interleaved_in_place_reference(arguments: Arguments) -> dict[str, Array]:
    return {"x": turned(arguments["x"], arguments, 3)}


@sp.kernel
def rope_half_split(
    x: Tensor[f32, T, H, 2, R], cosine: Tensor[f32, P, R], sine: Tensor[f32, P, R], position: i32,
    y: Tensor[f32, T, H, 2, R],
):
    for t, h, r in tiles(T, H, R):
        c = cosine[position + t, r]
        s = sine[position + t, r]
        a = x[t, h, 0, r]
        b = x[t, h, 1, r]
        y[t, h, 0, r] = a * c - b * s
        y[t, h, 1, r] = a * s + b * c


@sp.kernel
def rope_interleaved(
    x: Tensor[f32, T, H, R, 2], cosine: Tensor[f32, P, R], sine: Tensor[f32, P, R], position: i32,
    y: Tensor[f32, T, H, R, 2],
):
    for t, h, r in tiles(T, H, R):
        c = cosine[position + t, r]
        s = sine[position + t, r]
        a = x[t, h, r, 0]
        b = x[t, h, r, 1]
        y[t, h, r, 0] = a * c - b * s
        y[t, h, r, 1] = a * s + b * c


@sp.kernel
def rope_half_split_in_place(
    x: Tensor[f32, T, H, 2, R], cosine: Tensor[f32, P, R], sine: Tensor[f32, P, R], position: i32
):
    for t, h, r in tiles(T, H, R):
        c = cosine[position + t, r]
        s = sine[position + t, r]
        a = x[t, h, 0, r]
        b = x[t, h, 1, r]
        x[t, h, 0, r] = a * c - b * s
        x[t, h, 1, r] = a * s + b * c


@sp.kernel
def rope_interleaved_in_place(
    x: Tensor[f32, T, H, R, 2], cosine: Tensor[f32, P, R], sine: Tensor[f32, P, R], position: i32
):
    for t, h, r in tiles(T, H, R):
        c = cosine[position + t, r]
        s = sine[position + t, r]
        a = x[t, h, r, 0]
        b = x[t, h, r, 1]
        x[t, h, r, 0] = a * c - b * s
        x[t, h, r, 1] = a * s + b * c


def rotate_and_cache_reference(arguments: Arguments) -> dict[str, Array]:
    keys, values = arguments["keys"].copy(), arguments["values"].copy()
    filled = slice(arguments["position"], arguments["position"] + arguments["q"].shape[0])
    keys[:, filled] = turned(arguments["k"], arguments, 2).swapaxes(0, 1).astype(keys.dtype)
    values[:, filled] = arguments["v"].swapaxes(0, 1).astype(values.dtype)
    return {"q_turned": turned(arguments["q"], arguments, 2), "keys": keys, "values": values}


def make_rotate_and_cache(cache_dtype: Any) -> Any:
    """The kernel for a cache of that dtype.

    q [T, H, 2, R], k and v [T, G, 2, R]: queries, keys and values of new tokens, of which t stands at position + t;
    they may be views of one buffer. q_turned [T, H, 2, R]. keys, values [G, P, 2, R]: the cache, of which rows
    position ... position + T - 1 are written.
    """

    @sp.kernel(name=f"rotate_and_cache_{cache_dtype.name}")
    def rotate_and_cache(
        q: Tensor[f32, T, H, 2, R], k: Tensor[f32, T, G, 2, R], v: Tensor[f32, T, G, 2, R],
        cosine: Tensor[f32, P, R], sine: Tensor[f32, P, R], position: i32,
        q_turned: Tensor[f32, T, H, 2, R],
        keys: Tensor[cache_dtype, G, P, 2, R], values: Tensor[cache_dtype, G, P, 2, R],
    ):
        for t, h, r in tiles(T, H, R):
            c = cosine[position + t, r]
            s = sine[position + t, r]
            a = q[t, h, 0, r]
            b = q[t, h, 1, r]
            q_turned[t, h, 0, r] = a * c - b * s
            q_turned[t, h, 1, r] = a * s + b * c
        for t, g, r in tiles(T, G, R):
            c = cosine[position + t, r]
            s = sine[position + t, r]
            a = k[t, g, 0, r]
            b = k[t, g, 1, r]
            keys[g, position + t, 0, r] = (a * c - b * s).to(cache_dtype)
            keys[g, position + t, 1, r] = (a * s + b * c).to(cache_dtype)
            values[g, position + t, 0, r] = v[t, g, 0, r].to(cache_dtype)
            values[g, position + t, 1, r] = v[t, g, 1, r].to(cache_dtype)

    return rotate_and_cache


rotate_and_cache_f32 = make_rotate_and_cache(f32)
rotate_and_cache_bf16 = make_rotate_and_cache(bf16)


def normed(a: Any, b: Any, r: Any, pairs: Any, gain: Any, epsilon: Any) -> Any:
    """The halves a and b of heads after RMSNorm over both, for kernels to inline; gain [2, pairs]."""
    factor = rsqrt(sum(a * a + b * b, over=r) / (2 * pairs).to(f32) + epsilon)
    return a * factor * gain[0, r], b * factor * gain[1, r]


def normed_reference(arguments: Arguments) -> Arguments:
    """The arguments of a kernel without norms that gives what one with norms gives for these."""
    made = dict(arguments)
    for heads in ("q", "k"):
        x, gain = arguments[heads].astype(np.float64), arguments[f"{heads}_gain"].astype(np.float64)
        mean_square = np.square(x).mean(axis=(-2, -1), keepdims=True)
        made[heads] = x / np.sqrt(mean_square + arguments["epsilon"]) * gain
    return made


def make_norm_rotate_and_cache(cache_dtype: Any) -> Any:
    """rotate_and_cache of queries and keys after their norm; q_gain, k_gain [2, R] as the halves of a head lie."""

    @sp.kernel(name=f"norm_rotate_and_cache_{cache_dtype.name}")
    def norm_rotate_and_cache(
        q: Tensor[f32, T, H, 2, R], k: Tensor[f32, T, G, 2, R], v: Tensor[f32, T, G, 2, R],
        q_gain: Tensor[f32, 2, R], k_gain: Tensor[f32, 2, R], epsilon: f32,
        cosine: Tensor[f32, P, R], sine: Tensor[f32, P, R], position: i32,
        q_turned: Tensor[f32, T, H, 2, R],
        keys: Tensor[cache_dtype, G, P, 2, R], values: Tensor[cache_dtype, G, P, 2, R],
    ):
        for t, h in tiles(T, H):
            r = whole(R)
            c = cosine[position + t, r]
            s = sine[position + t, r]
            a, b = normed(q[t, h, 0, r], q[t, h, 1, r], r, R, q_gain, epsilon)
            q_turned[t, h, 0, r] = a * c - b * s
            q_turned[t, h, 1, r] = a * s + b * c
        for t, g in tiles(T, G):
            r = whole(R)
            c = cosine[position + t, r]
            s = sine[position + t, r]
            a, b = normed(k[t, g, 0, r], k[t, g, 1, r], r, R, k_gain, epsilon)
            keys[g, position + t, 0, r] = (a * c - b * s).to(cache_dtype)
            keys[g, position + t, 1, r] = (a * s + b * c).to(cache_dtype)
            values[g, position + t, 0, r] = v[t, g, 0, r].to(cache_dtype)
            values[g, position + t, 1, r] = v[t, g, 1, r].to(cache_dtype)

    return norm_rotate_and_cache


norm_rotate_and_cache_f32 = make_norm_rotate_and_cache(f32)
norm_rotate_and_cache_bf16 = make_norm_rotate_and_cache(bf16)


def norm_rotate_and_cache_reference(arguments: Arguments) -> dict[str, Array]:
    return rotate_and_cache_reference(normed_reference(arguments))


def tables(positions: int, pairs: int, base: float = 10000.0) -> tuple[Array, Array]:
    """cosine and sine [positions, pairs], f32, of position * base ** (-pair / pairs)."""
    frequency = base ** (-np.arange(pairs, dtype=np.float64) / max(1, pairs))
    angle = np.arange(positions, dtype=np.float64)[:, None] * frequency
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def make_arguments(random: "np.random.Generator", shape: Shape, last: str, in_place: bool) -> Arguments:
    t, h, r, position = shape["T"], shape["H"], shape["R"], shape["position"]
    extents = (t, h, 2, r) if last == "half" else (t, h, r, 2)
    cosine, sine = tables(position + t + 3, r)
    arguments = {"x": normal(random, *extents), "cosine": cosine, "sine": sine, "position": position}
    return arguments if in_place else {**arguments, "y": unwritten(*extents)}


def cache_arguments(random: "np.random.Generator", shape: Shape, dtype: str) -> Arguments:
    t, h, g, r, position = shape["T"], shape["H"], shape["G"], shape["R"], shape["position"]
    cosine, sine = tables(position + t + 3, r)
    qkv = normal(random, t, h + 2 * g, 2, r)
    return {
        "q": qkv[:, :h], "k": qkv[:, h : h + g], "v": qkv[:, h + g :],
        "cosine": cosine, "sine": sine, "position": position, "q_turned": unwritten(t, h, 2, r),
        "keys": normal(random, g, position + t + 3, 2, r, dtype=dtype),
        "values": normal(random, g, position + t + 3, 2, r, dtype=dtype),
    }


def with_norms(random: "np.random.Generator", arguments: Arguments, pairs: int) -> Arguments:
    """Arguments of a kernel with norms, from those of one without."""
    norms = {"q_gain": normal(random, 2, pairs), "k_gain": normal(random, 2, pairs), "epsilon": 1e-6}
    before = {name: arguments[name] for name in ("q", "k", "v")}
    return {**before, **norms, **{name: value for name, value in arguments.items() if name not in before}}


def _entry(name: str, kernel: Any, reference: Any, last: str, in_place: bool) -> LibraryKernel:
    return LibraryKernel(
        name=name,
        kernel=kernel,
        reference=reference,
        make_arguments=lambda random, shape: make_arguments(random, shape, last, in_place),
        tolerance=Tolerance(2e-7, 5e-7, "two products and their difference, which may cancel, rounded to f32 each"),
        cases=tuple(
            Case({"T": t, "H": h, "R": r, "position": 0}, flops=6 * t * h * r, bytes=16 * t * h * r + 8 * t * r)
            for t, h, r in ((512, 9, 32), (4096, 32, 64))
        ),
        check_shapes=(
            {"T": 0, "H": 1, "R": 2, "position": 0}, {"T": 1, "H": 1, "R": 1, "position": 0},
            {"T": 5, "H": 3, "R": 7, "position": 2}, {"T": 3, "H": 9, "R": 32, "position": 11},
        ),
    )


CACHE_SHAPES: tuple[dict[str, int], ...] = (
    {"T": 1, "H": 1, "G": 1, "R": 1, "position": 0}, {"T": 1, "H": 9, "G": 3, "R": 32, "position": 7},
    {"T": 5, "H": 4, "G": 2, "R": 5, "position": 3},
)


def _cache_entry(kernel: Any, dtype: str, norms: bool = False) -> LibraryKernel:
    size = NUMPY_DTYPES[dtype].itemsize
    rounding = "two products and their difference, which may cancel, rounded to f32 each"
    relative, absolute, flops, heads, gains, shapes = 2e-7, 5e-7, 6, (9, 3, 32), 0, CACHE_SHAPES
    if norms:
        rounding = "a sum of squares, its root, and products of some ten, which may cancel, rounded to f32 each"
        relative, absolute, flops, heads, gains = 1e-6, 4e-6, 14, (32, 8, 64), 16
        shapes = (*CACHE_SHAPES, {"T": 3, "H": 4, "G": 1, "R": 64, "position": 2})

    def arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
        made = cache_arguments(random, shape, dtype)
        return with_norms(random, made, shape["R"]) if norms else made

    return LibraryKernel(
        name=kernel.name,
        kernel=kernel,
        reference=norm_rotate_and_cache_reference if norms else rotate_and_cache_reference,
        make_arguments=arguments,
        tolerance=Tolerance(relative, absolute, rounding) if dtype == "f32"
        else Tolerance(2.0**-7, absolute, f"{rounding}, then once to bf16, where the two may round apart"),
        cases=tuple(
            Case(
                {"T": t, "H": h, "G": g, "R": r, "position": 0}, flops=flops * t * (h + g) * r,
                bytes=t * r * (8 * (h + 2 * g) + 8 + 8 * h + 4 * g * size) + gains * r,
            )
            for t, (h, g, r) in ((1, heads), (512, heads))
        ),
        check_shapes=shapes,
        dtype=dtype,
    )


KERNELS = (
    _entry("rope_half_split", rope_half_split, half_split_reference, "half", False),
    _entry("rope_interleaved", rope_interleaved, interleaved_reference, "inter", False),
    _entry("rope_half_split_in_place", rope_half_split_in_place, half_split_in_place_reference, "half", True),
    _entry("rope_interleaved_in_place", rope_interleaved_in_place, interleaved_in_place_reference, "inter", True),
    _cache_entry(rotate_and_cache_f32, "f32"),
    _cache_entry(rotate_and_cache_bf16, "bf16"),
    _cache_entry(norm_rotate_and_cache_f32, "f32", norms=True),
    _cache_entry(norm_rotate_and_cache_bf16, "bf16", norms=True),
)
