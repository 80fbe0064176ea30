"""Views: split and merged axes, other dtypes; what is refused while compiling, and what at the call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import (
    CallError,
    KernelError,
    Tensor,
    bf16,
    each,
    emulate,
    exp,
    f32,
    f64,
    i8,
    i16,
    i32,
    kernel,
    max,
    maximum,
    minimum,
    span,
    sum,
    tiles,
    u8,
    whole,
    zeros,
)
from sapper.ir.text import parse_function, print_function
from sapper.ir.verifier import verify
from sapper.tile.eager import run as run_eager
from sapper.tile.interpret import RaceError, interpret
from sapper.tile.ops import TILE_OPS
from sapper.tile.semantics import numpy_dtype

T, H, K, D, N, M, B = sp.dims("T H K D N M B")


@kernel
def rotate(x: Tensor[f32, T, H, D], cos: Tensor[f32, T, D], sin: Tensor[f32, T, D], out: Tensor[f32, T, H, D]):
    """RoPE on interleaved pairs: a last axis of two."""
    pairs, turned = x.view(T, H, D // 2, 2), out.view(T, H, D // 2, 2)
    for t, h, i in tiles(T, H, D // 2):
        a, b = pairs[t, h, i, 0], pairs[t, h, i, 1]
        turned[t, h, i, 0] = a * cos[t, i] - b * sin[t, i]
        turned[t, h, i, 1] = a * sin[t, i] + b * cos[t, i]


@kernel
def grouped_scores(q: Tensor[f32, H, D], k: Tensor[f32, K, T, D], out: Tensor[f32, H, T]):
    """H query heads share K key heads, H // K to each."""
    of_group, scores = q.view(K, H // K, D), out.view(K, H // K, T)
    for j in each(K):
        for g, t in tiles(H // K, T):
            d = whole(D)
            scores[j, g, t] = of_group[j, g, d] @ k[j, t, d]


@kernel
def dequantize(packed: Tensor[u8, M, N], out: Tensor[f32, M, D]):
    """Blocks of 18 bytes: a bf16 scale, then 32 numbers of 4 bits, low halves first."""
    scales, bytes_ = packed.view(M, N // 2, dtype=bf16), packed.view(M, N // 18, 18)
    blocks = out.view(M, D // 32, 2, 16)
    for m, b in tiles(M, N // 18):
        i = whole(16)
        pair = bytes_[m, b, i + 2].to(i32)
        scale = scales[m, b * 9].to(f32)
        blocks[m, b, 0, i] = ((pair & 15) - 8).to(f32) * scale
        blocks[m, b, 1, i] = ((pair >> 4) - 8).to(f32) * scale


@kernel
def merged(x: Tensor[f32, M, T, D], out: Tensor[f32, M, N]):
    flat = x.view(M, T * D)
    for m, n in tiles(M, T * D):
        out[m, n] = flat[m, n] + 1.0


@kernel
def words(x: Tensor[i8, N], out: Tensor[i32, M]):
    w = x.view(N // 4, dtype=i32)
    for n in tiles(N // 4):
        out[n] = w[n]


@kernel
def paged(q: Tensor[f32, B, D], keys: Tensor[f32, N, 4, D], values: Tensor[f32, N, 4, D], page: Tensor[i32, B, T],
          length: Tensor[i32, B], out: Tensor[f32, B, D]):
    """Attention of one query each over a cache in pages of 4, whose places a table says."""
    for b in each(B):
        d = whole(D)
        high, total, acc = zeros(dtype=f32) - 1e30, zeros(dtype=f32), zeros(d, dtype=f32)
        for t in tiles(span(0, length[b])):
            place = page[b, t // 4]
            score = q[b, d] @ keys[place, t % 4, d]
            above = maximum(high, max(score, over=t))
            weight = exp(score - above)
            scale = exp(high - above)
            total = total * scale + sum(weight, over=t)
            acc = acc * scale + weight @ values[place, t % 4, d]
            high = above
        out[b, d] = acc / total


def case(name: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments, and what the outputs must hold."""
    rng = np.random.default_rng(seed)
    t, h, k, d = 3, 4, 2, 2 * (1 + seed % 20)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    if name == "rotate":
        x, cos, sin = normal(t, h, d), normal(t, d), normal(t, d)
        a, b = x[..., ::2], x[..., 1::2]
        c, s = cos[:, None, :d // 2], sin[:, None, :d // 2]
        want = np.stack([a * c - b * s, a * s + b * c], -1).reshape(x.shape)
        return {"x": x, "cos": cos, "sin": sin, "out": np.zeros_like(x)}, {"out": want}
    if name == "grouped_scores":
        q, keys = normal(h, d), normal(k, t, d)
        want = np.einsum("kgd,ktd->kgt", q.reshape(k, h // k, d), keys).reshape(h, t)
        return {"q": q, "k": keys, "out": np.zeros((h, t), np.float32)}, {"out": want}
    if name == "dequantize":
        blocks = 1 + seed % 5
        packed = rng.integers(0, 256, (t, blocks, 18), np.uint8)
        scale = (normal(t, blocks) * 0.1).astype(numpy_dtype(bf16))
        packed[:, :, :2] = scale.reshape(t, blocks, 1).view(np.uint8)
        low, high = packed[:, :, 2:] & 15, packed[:, :, 2:] >> 4
        want = (np.concatenate([low, high], -1).astype(np.float32) - 8) * scale[..., None].astype(np.float32)
        return ({"packed": packed.reshape(t, -1), "out": np.zeros((t, 32 * blocks), np.float32)},
                {"out": want.reshape(t, -1)})
    if name == "paged":
        keys, values, query = normal(12, 4, d), normal(12, 4, d), normal(t, d)
        page = rng.permutation(12).astype(np.int32).reshape(t, 4)
        length = rng.integers(1, 17, t, np.int32)
        want = np.zeros((t, d), np.float32)
        for b in range(t):
            k, v = (x[page[b]].reshape(16, d)[:length[b]] for x in (keys, values))
            weight = np.exp(query[b] @ k.T)
            want[b] = weight @ v / weight.sum()
        return {"q": query, "keys": keys, "values": values, "page": page, "length": length,
                "out": np.zeros((t, d), np.float32)}, {"out": want}
    if name == "merged":
        x = normal(2, 2 * t, d)[:, :t]  # rows apart: the merged axes are contiguous all the same
        return {"x": x, "out": np.zeros((2, t * d), np.float32)}, {"out": x.reshape(2, -1) + 1}
    x = rng.integers(-128, 128, 4 * d, np.int8)
    return {"x": x, "out": np.zeros(d, np.int32)}, {"out": x.view(np.int32)}


KERNELS = {k.name: k for k in (rotate, grouped_scores, dequantize, merged, words, paged)}


@pytest.mark.parametrize("name", KERNELS)
def test_every_station(name: str) -> None:
    k = KERNELS[name]
    function = k.tile_ir()
    verify(function, TILE_OPS)
    text = print_function(function)
    assert print_function(parse_function(text, {"tile": TILE_OPS})) == text
    for seed in (0, 7, 18):
        for run in (lambda a: interpret(function, a, 2), lambda a: interpret(function, a, check_races=True),
                    lambda a: run_eager(k, a), lambda a: k(*a.values()), lambda a: k(*a.values(), static=True),
                    *([lambda a: emulate.run(k, *a.values(), target="sm_80", workers=2)] if seed == 7 else [])):
            arguments, wanted = case(name, seed)
            run(arguments)
            for tensor, values in wanted.items():
                np.testing.assert_allclose(arguments[tensor], values, rtol=2e-5, atol=1e-6)


def test_the_call_is_checked() -> None:
    with pytest.raises(CallError, match=r"H = 5, K = 2\n.*H to be a multiple of K"):
        grouped_scores(np.zeros((5, 4), np.float32), np.zeros((2, 3, 4), np.float32), np.zeros((5, 3), np.float32))
    x = np.zeros((2, 3, 4), np.float32)
    out = np.zeros((2, 12), np.float32)
    merged(x, out)
    with pytest.raises(CallError, match="dimensions 1 to 2 to be contiguous"):
        merged(np.zeros((2, 4, 3), np.float32).swapaxes(1, 2), out)
    with pytest.raises(CallError, match="N to be a multiple of 4"):
        words(np.zeros(6, np.int8), np.zeros(1, np.int32))
    with pytest.raises(CallError, match="contiguous"):
        words(np.zeros(16, np.int8)[::2], np.zeros(2, np.int32))


def test_interpreters_check_too() -> None:
    arguments = {"x": np.zeros(6, np.int8), "out": np.zeros(1, np.int32)}
    with pytest.raises(ValueError, match=r"test_views.py:\d+:\d+: view of x: found a tensor of 6 elements of 1 bytes"):
        interpret(words.tile_ir(), arguments)
    with pytest.raises(KernelError, match="x cannot be viewed like this"):
        run_eager(words, arguments)


def test_two_views_of_one_memory_may_meet() -> None:
    @kernel
    def shifted(x: Tensor[f32, N]):
        pairs = x.view(N // 2, 2)
        for i in each(N // 2 - 1):
            pairs[i, 0] = x[2 * i + 2]

    (loop,) = [op for op in shifted.tile_ir().walk() if op.name == "each"]
    assert loop.attributes["parallel"] is False
    x = np.arange(8, dtype=np.float32)
    shifted(x)
    np.testing.assert_array_equal(x, [2, 1, 4, 3, 6, 5, 6, 7])

    @kernel
    def racing(x: Tensor[f32, N]):
        pairs = x.view(N // 2, 2)
        for i in tiles(N // 2):
            pairs[i, 0] = x[i]

    with pytest.raises(KernelError, match="read and written"):
        racing.tile_ir()


def test_two_views_are_apart_where_their_first_dimensions_are() -> None:
    """A bitonic merge of each row: the steps of one row come in order, those of two never meet."""
    @kernel
    def merged(x: Tensor[f32, M, 16]):
        for m in tiles(M):
            for s in (8, 4, 2, 1):
                pairs = x.view(M, 16 // (2 * s), 2, s)
                j, k = whole(16 // (2 * s)), whole(s)
                a, b = pairs[m, j, 0, k], pairs[m, j, 1, k]
                pairs[m, j, 0, k] = minimum(a, b)
                pairs[m, j, 1, k] = maximum(a, b)

    (loop,) = [op for op in merged.tile_ir().walk() if op.name == "tiles"]
    assert loop.attributes["parallel"] is True
    x = np.random.default_rng(0).standard_normal((37, 16)).astype(np.float32)
    x = np.concatenate([np.sort(x[:, :8], axis=1), np.sort(x[:, 8:], axis=1)[:, ::-1]], axis=1)
    found, interpreted = x.copy(), x.copy()
    merged(found)
    interpret(merged.tile_ir(), {"x": interpreted}, 5, check_races=True)
    np.testing.assert_array_equal(found, np.sort(x, axis=1))
    np.testing.assert_array_equal(interpreted, found)


def test_races_are_seen_through_views() -> None:
    """The loop is made parallel by hand: iterations meet in bytes of one tensor that two views show."""
    @kernel
    def halves(x: Tensor[i32, N], out: Tensor[i32, M]):
        h = x.view(N * 2, dtype=i16)
        for i in each(N * 2):
            h[i] = x[i // 2].to(i16)

    function = halves.tile_ir()
    (loop,) = [op for op in function.walk() if op.name == "each"]
    loop.attributes = {"count": 1, "parallel": True}
    with pytest.raises(RaceError, match=r"x\[0\] is"):
        interpret(function, {"x": np.arange(4, dtype=np.int32), "out": np.zeros(1, np.int32)}, check_races=True)


def test_the_last_axis_becomes_part_of_wider_elements() -> None:
    """Axes before it that stay what they are form groups of their own, however the extents happen to agree."""
    @kernel
    def joined(x: Tensor[u8, N, 4, 16, 4], out: Tensor[i32, N, 4, 16]):
        words = x.view(N, 4, 16, dtype=i32)
        for n in tiles(N):
            w, l = whole(4), whole(16)
            out[n, w, l] = words[n, w, l]

    x = np.random.default_rng(0).integers(0, 256, (3, 4, 16, 4)).astype(np.uint8)
    out = np.zeros((3, 4, 16), np.int32)
    joined(x, out)
    np.testing.assert_array_equal(out, x.view(np.int32)[..., 0])

    @kernel
    def lost(x: Tensor[u8, N, 16, 4], out: Tensor[i32, N, 16]):
        words = x.view(N, 16, dtype=f64)
        out[0, 0] = words[0, 0].to(i32)

    with pytest.raises(KernelError, match="cannot be viewed like this"):
        lost.tile_ir()
