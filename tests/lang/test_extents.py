"""Extents that are computed of others: `Tensor[u8, N, K // 2]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import (
    CallError,
    KernelError,
    Tensor,
    cdiv,
    each,
    emulate,
    f32,
    i8,
    i32,
    kernel,
    max,
    sum,
    tiles,
    u8,
    whole,
    zeros,
)
from sapper.ir.text import parse_function, print_function
from sapper.ir.verifier import verify
from sapper.runtime.check import check_kernel
from sapper.targets import target
from sapper.tile.eager import run as run_eager
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS

M, N, K, T, R, H = sp.dims("M N K T R H")


@kernel
def int4_matmul(a: Tensor[f32, M, K], b: Tensor[u8, N, K // 2], scale: Tensor[f32, N, cdiv(K, 8)],
                c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for h in tiles(K // 2):
            byte = b[n, h].to(i32)
            s = scale[n, h // 4]
            acc += a[m, 2 * h] @ (((byte & 15) - 8).to(f32) * s)
            acc += a[m, 2 * h + 1] @ (((byte >> 4) - 8).to(f32) * s)
        c[m, n] = acc


@kernel
def convolve(x: Tensor[f32, T], w: Tensor[f32, R], y: Tensor[f32, T - R + 1]):
    for t in tiles(T - R + 1):
        r = whole(R)
        y[t] = sum(x[t + r] * w[r], over=r)


@kernel
def halves(x: Tensor[f32, M, K // 2, 3], z: Tensor[f32, M, 2 * K], y: Tensor[f32, M, K]):
    """The middle extent of a contiguous tensor is computed."""
    pairs = y.view(M, K // 2, 2)
    for m, i in tiles(M, K // 2):
        pairs[m, i, 0] = x[m, i, 0] + z[m, i + 0]
        pairs[m, i, 1] = x[m, i, 2] * z[m, 2 * K - 1 - i]


@kernel
def largest(x: Tensor[f32, M, K], y: Tensor[f32, M, cdiv(K, 8)]):
    for m, g in tiles(M, cdiv(K, 8)):
        j = whole(8)
        k = 8 * g + j
        y[m, g] = max(sp.where(k < K, x[m, sp.minimum(k, K - 1)], 0.0), over=j)


@kernel
def ragged_sums(x: Tensor[f32, T], start: Tensor[i32, H + 1], y: Tensor[f32, H]):
    """An axis below H walks an extent of H + 1 by itself: it is inside whatever H is."""
    for h in tiles(H):
        s = whole(T)
        y[h] = sum(sp.where((s >= start[h]) & (s < start[h + 1]), x[s], 0.0), over=s)


@kernel
def running(x: Tensor[f32, 4], w: Tensor[f32, T], y: Tensor[f32, cdiv(T, 8)]):
    """Kept in memory for as many blocks as there are: a quotient that is rounded up has a bound."""
    b, c = whole(-(-T // 8)), whole(cdiv(T, 8))
    s = sp.cumsum(x[b % 4], over=b)
    y[c] = max(sp.where(b <= c, s, 0.0), over=b)


def case(name: str) -> tuple[dict[str, Any], Any]:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((5, 22), np.float32)
    if name == "int4_matmul":
        b = rng.integers(0, 256, (7, 11), np.uint8)
        scale = rng.standard_normal((7, 3), np.float32)
        w = np.stack([(b & 15).astype(np.int8) - 8, (b >> 4).astype(np.int8) - 8], 2).reshape(7, 22) * scale.repeat(
            8, 1)[:, :22]
        return {"a": x, "b": b, "scale": scale, "c": np.zeros((5, 7), np.float32)}, x @ w.T
    if name == "convolve":
        return {"x": x[0], "w": x[1, :5], "y": np.zeros(18, np.float32)}, np.correlate(x[0], x[1, :5], "valid")
    if name == "halves":
        a, z = rng.standard_normal((5, 11, 3), np.float32), rng.standard_normal((5, 44), np.float32)
        want = np.stack([a[:, :, 0] + z[:, :11], a[:, :, 2] * z[:, :32:-1]], 2).reshape(5, 22)
        return {"x": a, "z": z, "y": np.zeros((5, 22), np.float32)}, want
    if name == "ragged_sums":
        return {"x": x[0], "start": np.array([3, 3, 20], np.int32), "y": np.zeros(2, np.float32)}, [0, x[0, 3:20].sum()]
    if name == "running":
        x = np.array([1, -1, 5, 2], np.float32)
        return {"x": x, "w": np.zeros(46, np.float32), "y": np.zeros(6, np.float32)}, [1, 1, 5, 7, 8, 8]
    padded = np.pad(x, ((0, 0), (0, 2)))
    return {"x": x, "y": np.zeros((5, 3), np.float32)}, padded.reshape(5, 3, 8).max(2)


@pytest.mark.parametrize("k", [int4_matmul, convolve, halves, largest, ragged_sums, running], ids=lambda k: k.name)
def test_every_station(k: Any) -> None:
    function = k.tile_ir()
    verify(function, TILE_OPS)
    text = print_function(function)
    assert print_function(parse_function(text, {"tile": TILE_OPS})) == text
    for run in (lambda a: interpret(function, a, 2), lambda a: run_eager(k, a), lambda a: k(*a.values()),
                lambda a: k(*a.values(), static=True),
                lambda a: emulate.run(k, *a.values(), target="sm_80", workers=2)):
        arguments, wanted = case(k.name)
        run(arguments)
        np.testing.assert_allclose(list(arguments.values())[-1], wanted, rtol=1e-4, atol=1e-5)
    assert k.tile_ir({"K": 22, "T": 22, "R": 5, "M": 5, "N": 7, "H": 2}).attributes["dims"] == []


def test_the_call_is_checked() -> None:
    arguments = case("int4_matmul")[0]
    wrong = arguments | {"b": arguments["b"][:, :10]}
    with pytest.raises(CallError, match=r"extent 10 along dimension 1.*\n.*K // 2 = 11, where K = 22 in `a`\n.*agree"):
        int4_matmul(*wrong.values())
    with pytest.raises(ValueError, match=r"dimension 1 of b is 10; expected K // 2 = 11, where K = 22 \(from dim"):
        interpret(int4_matmul.tile_ir(), wrong)
    with pytest.raises(CallError, match=r"extent 0 .*\n.*\(T - R\) \+ 1 = -1, where T = 3 in `x`, R = 5 in `w`"):
        convolve(*(np.zeros(n, np.float32) for n in (3, 5, 0)))


def test_views_ask_for_quotients_without_a_rest() -> None:
    """[N, K // 2] has N * K // 2 elements only where K is even."""
    @kernel
    def flat(x: Tensor[u8, N, K // 2], w: Tensor[f32, K], y: Tensor[u8, N * K // 2]):
        all_of_it = x.view(N * K // 2)
        for i in tiles(N * K // 2):
            y[i] = all_of_it[i]

    flat(np.zeros((2, 3), np.uint8), np.zeros(6, np.float32), np.zeros(6, np.uint8))
    with pytest.raises(CallError, match="K to be a multiple of 2"):
        flat(np.zeros((2, 3), np.uint8), np.zeros(7, np.float32), np.zeros(7, np.uint8))


def test_quotients_of_axes_stay_inside() -> None:
    """Where K is odd, the last k // 2 is K // 2 itself: an element too far."""
    @kernel
    def low_bits(b: Tensor[u8, N, K // 2], y: Tensor[i32, N, K]):
        for n, k in tiles(N, K):
            y[n, k] = b[n, k // 2].to(i32) >> (4 * (k % 2)).to(i32) & 15

    y = np.zeros((3, 6), np.int32)
    low_bits(np.full((3, 3), 0x51, np.uint8), y)
    assert y.tolist() == [[1, 5] * 3] * 3
    with pytest.raises(CallError, match=r"K = 7\n.*\(K - 1\) // 2 to be below K // 2"):
        low_bits(np.zeros((3, 3), np.uint8), np.zeros((3, 7), np.int32))


REACHES: list[Callable[..., Any]] = [
    lambda k, n, K, N: k // 2,
    lambda k, n, K, N: 2 * (k // 2) + 1,
    lambda k, n, K, N: k // N,
    lambda k, n, K, N: k * N + n,
    lambda k, n, K, N: (k * N + n) // 5,
    lambda k, n, K, N: k % 3,
    lambda k, n, K, N: k % N,
    lambda k, n, K, N: (k + N) % K,
    lambda k, n, K, N: (k + n + 1) % 4,
    lambda k, n, K, N: k // 3 % 2,
    lambda k, n, K, N: k // 4 * 8 + k % 4,
    lambda k, n, K, N: k // 4 + k % 4 * 2,
    lambda k, n, K, N: k % 4 // 2 + 3 * n,
    lambda k, n, K, N: 3 - k % 4,
    lambda k, n, K, N: (k ^ 1) + (n | 1),
    lambda k, n, K, N: (k >> 1) + (n & 3),
    lambda k, n, K, N: k * k,
    lambda k, n, K, N: K - 1 - k // 2,
    lambda k, n, K, N: N // 2 + k,
    lambda k, n, K, N: sp.minimum(k, N - 1),
    lambda k, n, K, N: sp.maximum(k - 3, n),
]


@pytest.mark.parametrize("at", REACHES)
def test_arrays_that_an_index_leaves_are_refused(at: Callable[..., Any]) -> None:
    """Of an array with an extent of its own the smallest that holds all elements is taken, a smaller one refused."""
    @kernel
    def gather(x: Tensor[f32, T], y: Tensor[f32, N, K]):
        for n, k in tiles(N, K):
            y[n, k] = x[at(k, n, K, N)]

    for n, k in [(1, 1), (3, 5), (5, 3), (4, 8), (1, 6)]:
        x, y = np.arange(99, dtype=np.float32), np.zeros((n, k), np.float32)
        gather(x, y, interpret=True)
        length = int(y.max()) + 1
        gather(x[:length], y, interpret=True)
        with pytest.raises(CallError, match="since the kernel indexes so far"):
            gather(x[:length - 1], y, interpret=True)
    gather(x[:0], y[:0], interpret=True)     # nothing is read
    gather(x[:0], y[:, :0], interpret=True)


BELOW: list[Callable[..., Any]] = [
    lambda k, n, K, N: N - 1 - k,
    lambda k, n, K, N: N - 1 - k // 2,
    lambda k, n, K, N: n - k,
    lambda k, n, K, N: n + k - K // 2,
    lambda k, n, K, N: sp.minimum(n, N - 3),
]


@pytest.mark.parametrize("at", BELOW)
def test_indices_below_0_are_refused(at: Callable[..., Any]) -> None:
    @kernel
    def gather(x: Tensor[f32, T], y: Tensor[f32, N, K]):
        for n, k in tiles(N, K):
            y[n, k] = x[at(k, n, K, N)]

    x = np.zeros(99, np.float32)
    gather(x, np.zeros((3, 1), np.float32), interpret=True)
    with pytest.raises(CallError, match="to be 0 or more, since the kernel begins to index there"):
        gather(x, np.zeros((2, 8), np.float32), interpret=True)
    gather(x, np.zeros((0, 8), np.float32), interpret=True)


STEPS: list[Callable[..., Any]] = [
    lambda k: k,
    lambda k: k + 1,
    lambda k: k // 2,
    lambda k: k // 4 * 8 + k % 2,
    lambda k: k - k // 2,
    lambda k: K - 1 - k // 2,
]


@pytest.mark.parametrize("at", STEPS)
def test_counters_that_take_steps_end_somewhere(at: Callable[..., Any]) -> None:
    """By themselves, and with a block between them, which ends where the axis does or is whole."""
    @kernel
    def single(x: Tensor[f32, T], w: Tensor[f32, K], y: Tensor[f32, 1]):
        for k in range(1, K, 4):
            y[0] = sp.maximum(y[0], x[at(k)])

    @kernel
    def cut_off(x: Tensor[f32, T], w: Tensor[f32, K], y: Tensor[f32, 1]):
        for i in range(0, K, 4):
            for k in range(i, sp.minimum(i + 4, K)):
                y[0] = sp.maximum(y[0], x[at(k)])

    @kernel
    def blocks(x: Tensor[f32, T], w: Tensor[f32, K], y: Tensor[f32, 1]):
        for i in range(0, K, 4):
            j = whole(4)
            y[0] = sp.maximum(y[0], max(x[at(i + j)], over=j))

    for one in (single, cut_off, blocks):
        for k in (2, 5, 8, 11):
            x, w, y = np.arange(99, dtype=np.float32), np.zeros(k, np.float32), np.zeros(1, np.float32)
            one(x, w, y, interpret=True)
            length = int(y[0]) + 1
            one(x[:length], w, y, interpret=True)
            with pytest.raises(CallError, match="since the kernel indexes so far"):
                one(x[:length - 1], w, y, interpret=True)
        one(x[:0], w[:0], y, interpret=True)        # nothing is read


def test_blocks_of_an_axis_ask_for_whole_ones() -> None:
    """Machine code would read and write past the end."""
    @kernel
    def doubled(x: Tensor[f32, K], y: Tensor[f32, K]):
        for i in range(0, K, 4):
            j = whole(4)
            y[i + j] = 2.0 * x[i + j]

    x, y = np.arange(8, dtype=np.float32), np.zeros(8, np.float32)
    doubled(x, y)
    assert y.tolist() == (2 * x).tolist()
    for options in ({}, {"interpret": True}):
        with pytest.raises(CallError, match=r"K = 7\n.*\+ 3 to be below K"):
            doubled(x[:7], y[:7], **options)
    with pytest.raises(KernelError, match="index 0 of x reaches beyond its end"):
        doubled(x[:7], y[:7], static=True)


def test_indices_in_loops_that_may_be_empty_are_checked() -> None:
    """But those of counters that say how long such a loop is."""
    @kernel
    def shared(k: Tensor[f32, T, H], length: Tensor[i32, 1], y: Tensor[f32, R], z: Tensor[f32, R]):
        for r in each(R):
            total = 0.0
            for t in tiles(sp.span(0, length[0])):
                total += sum(k[t, r // 4], over=t)
            y[r] = total
        for r in range(0, R, 2):
            for t in range(length[0]):
                z[r] = k[t, r // 4]

    length, y = np.full(1, 3, np.int32), np.zeros(8, np.float32)
    shared(np.ones((3, 2), np.float32), length, y, y.copy())
    assert y.tolist() == [3.0] * 8
    with pytest.raises(CallError, match=r"H = 1, R = 8\n.*\(R - 1\) // 4 to be below H"):
        shared(np.ones((3, 1), np.float32), length, y, y.copy())

    @kernel
    def before(x: Tensor[f32, N], start: Tensor[i32, N], y: Tensor[f32, N]):
        for n in range(N):
            total = 0.0
            for i in range(n):
                total += x[n - 1 - i] + x[n - 1]
            for i in range(sp.minimum(start[n], 1)):
                total += x[n - 1 + i]
            y[n] = total

    x = np.arange(4, dtype=np.float32)
    y = np.zeros(4, np.float32)
    before(x, np.arange(4, dtype=np.int32), y)
    assert y.tolist() == [0, 0, 4, 11]


def test_an_index_of_many_parts_is_looked_through() -> None:
    """Each step reads the last one twice: 8192 ways to the coordinate."""
    @kernel
    def gather(x: Tensor[f32, T], y: Tensor[f32, N]):
        for n in tiles(N):
            a = n // 2 + n % 3
            b = a // 2 + a % 3
            c = b // 2 + b % 3
            d = c // 2 + c % 3
            e = d // 2 + d % 3
            f = e // 2 + e % 3
            g = f // 2 + f % 3
            h = g // 2 + g % 3
            i = h // 2 + h % 3
            j = i // 2 + i % 3
            k = j // 2 + j % 3
            l = k // 2 + k % 3
            m = l // 2 + l % 3
            o = m // 2 + m % 3
            y[n] = x[o]

    x, y = np.arange(99, dtype=np.float32), np.zeros(50, np.float32)
    gather(x, y, interpret=True)
    length = int(y.max()) + 1
    gather(x[:length], y, interpret=True)
    with pytest.raises(CallError, match=rf"index {length - 1} of dimension 0, in x\[o\]"):
        gather(x[:length - 1], y, interpret=True)


def test_elements_beyond_the_reach_of_offsets_are_refused() -> None:
    """Lanes find their elements by offsets of 32 bits. None of this memory is touched but some bytes."""
    @kernel
    def pick(x: Tensor[u8, M, N], at: Tensor[i32, K], y: Tensor[u8, K]):
        for k in tiles(K):
            y[k] = x[at[k], N - 1 - at[k]]

    at, y = np.array([0, 1], np.int32), np.zeros(2, np.uint8)
    x = sp.empty((2, 2**30), "u8")
    x[0, -1], x[1, -2] = 3, 4
    pick(x, at, y)
    assert y.tolist() == [3, 4]
    x = sp.empty((3, 2**30), "u8")
    for far in (x, x[::-1]):
        with pytest.raises(CallError, match=r"elements 3221225471 bytes apart(?s:.*)less than 2 GiB"):
            pick(far, at, y)


def test_coordinates_in_narrow_integers_wrap() -> None:
    """So that they meet again: sums join there, and an array of 256 is long enough."""
    @kernel
    def wrap(x: Tensor[f32, N], y: Tensor[f32, T], z: Tensor[f32, T]):
        for n in tiles(N):
            y[n.to(i8).to(i32) + 128] += x[n]
        for n in each(N):
            z[n.to(u8)] = x[n]

    x, zeroed = np.arange(300, dtype=np.float32), np.zeros(256, np.float32)
    for options in ({"interpret": True}, {"threads": 2}):
        y, z = zeroed.copy(), zeroed.copy()
        wrap(x, y, z, **options)
        assert np.roll(y, 128).tolist() == [2 * n + 256 if n < 44 else n for n in range(256)]
        assert z.tolist() == [n + 256 if n < 44 else n for n in range(256)]


def test_an_index_that_is_certainly_outside_is_refused_at_once() -> None:
    @kernel
    def before(x: Tensor[f32, T], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = x[n % 4 - 1]

    with pytest.raises(KernelError, match="index 0 of x is negative"):
        before.tile_ir()


@pytest.mark.parametrize(("extent", "mend"), [
    (K // 2, r"write P \* 2 where K is meant"), (2 * K, r"write P // 2 where"), (K + 1, "write P - 1 where"),
    (M + K, "write P - M where K"), (M - K, "what follows from P where K")])
def test_a_dimension_that_no_tensor_has_is_refused(extent: Any, mend: str) -> None:
    with pytest.raises(KernelError, match=mend) as caught:
        @kernel
        def f(x: Tensor[f32, M, extent], y: Tensor[f32, M]):
            for m in tiles(M):
                y[m] = x[m, 0]
    assert caught.value.kind == "unbound-dim"


def test_an_axis_walks_what_it_indexes() -> None:
    @kernel
    def f(x: Tensor[f32, M, K // 2], w: Tensor[f32, K], y: Tensor[f32, M, K]):
        for m, k in tiles(M, K):
            y[m, k] = x[m, k]

    with pytest.raises(KernelError, match=r"k walks K, dimension 1 of x is K // 2"):
        f.tile_ir()
    with pytest.raises(TypeError, match=r"found K / 2; expected an integer, .* write K // 2, or cdiv\(K, 2\)"):
        Tensor[f32, K / 2]

def test_asserted_extents_are_checked_at_the_call() -> None:
    @kernel
    def blocks(x: Tensor[f32, M, K], y: Tensor[f32, N]):
        assert K % 4 == 0, "blocks of 4"
        assert 1 < M <= 8 and N == 2 * M
        for n in tiles(N):
            y[n] = x[n // 2, 0]

    def call(m: int, k: int, n: int, **options: Any) -> None:
        blocks(np.ones((m, k), np.float32), np.ones(n, np.float32), **options)

    call(2, 4, 4)
    for extents, expected in (((2, 6, 4), "K to be a multiple of 4"), ((1, 4, 2), "2 <= M, as the kernel asks"),
                              ((9, 4, 18), "M <= 8"), ((4, 4, 7), r"2 \* M <= N"), ((4, 4, 9), r"N <= 2 \* M")):
        for options in ({}, {"interpret": True}, {"static": "N"}):
            with pytest.raises(CallError, match=expected):
                call(*extents, **options)
    with pytest.raises(KernelError, match="blocks of 4"):
        call(2, 6, 4, static=True)
    report = check_kernel(blocks, target("v3"), runs=3)
    assert report.finding is None and report.cases == 3


def test_a_computed_extent_is_no_dimension() -> None:
    assert K % 7 != K and K != K % 7 and K % 7 == K % 7
