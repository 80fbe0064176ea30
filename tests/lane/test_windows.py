"""Reads of places that are near each other, and stores that fill what lies between lanes: rows and permutations, the
elements that NumPy takes, and no memory touched beyond them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import cycle
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sapper.ir.nodes import Function
from sapper.ir.types import DType, bf16, f8e4m3, f32, f64, i4, i8, i32, u8
from sapper.lang.builtins import each, maximum, minimum, span, sum, tiles, where, whole, zeros
from sapper.lang.dims import dims
from sapper.lang.kernel import Kernel, kernel
from sapper.lang.tensor import Tensor
from sapper.targets import target
from sapper.targets.x86_64.detect import host
from sapper.tile.canonical import canonicalize
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Facts
from tests.strategies.amount import examples

from ..codegen.run_native import run_native
from .run_lane import run_lane, specialize

AVX512 = Facts(lanes=16, picks=True)
FACTS = [AVX512, Facts(lanes=8, vector_registers=16, picks=True), Facts(lanes=4, vector_registers=8, picks=True)]
A, B, M, N, K, P = dims("A B M N K P")


@kernel
def strided(x: Tensor[f32, M, A], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = x[m, 2 * n + 1] + x[m, 3 * n] - x[m, 4 * n + 2] * x[m, 6 * n + 5] + x[m, 8 * n]


@kernel
def backwards(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = x[m, N - 1 - n]


@kernel
def repeated(x: Tensor[f32, M, A], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = x[m, n // 2] + x[m, n // 3] * x[m, n // 64] - x[m, (n + 5) // 4]


@kernel
def clamped(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        left = where(n >= 2, x[m, maximum(n - 2, 0)], 0.0)
        right = x[m, minimum(n + 3, N - 1)]
        y[m, n] = left - right * x[m, maximum(minimum(N - 1 - n, N - 3), 0)]


@kernel
def packed(x: Tensor[f32, M, K], w: Tensor[u8, N, A], scale: Tensor[f32, N, B], y: Tensor[f32, M, N]):
    """Two weights of four bits in a byte, a scale for 32."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            both = w[n, k // 2]
            q = where(k % 2 == 0, both & 15, both >> 4)
            acc += x[m, k] @ (q.to(f32) * scale[n, k // 32])
        y[m, n] = acc


@kernel
def pooled(x: Tensor[f32, B, M, A], y: Tensor[f32, B, P, N]):
    for b in each(B):
        for p, n in tiles(P, N):
            acc = zeros(p, n, dtype=f32)
            for i in range(2):
                for j in range(2):
                    acc += x[b, 2 * p + i, 2 * n + j]
            y[b, p, n] = acc


@kernel
def turned(x: Tensor[f32, N, 3], r: Tensor[f32, 3, 3], y: Tensor[f32, N, 3]):
    for n in tiles(N):
        i, j = whole(3), whole(3)
        y[n, i] = sum(r[i, j] * x[n, j], over=j)


@kernel
def planes(x: Tensor[u8, N, 4], y: Tensor[i32, 4, N], z: Tensor[i8, N, 4]):
    for n in tiles(N):
        c = whole(4)
        y[c, n] = x[n, c].to(i32) - 1
        z[n, c] = x[n, c].to(i8)


@kernel
def beside(x: Tensor[bf16, 2, N], y: Tensor[bf16, N, 2], z: Tensor[bf16, N]):
    for n in tiles(N):
        c = whole(2)
        y[n, c] = x[c, n]
        z[n] = x[0, n // 2] + x[1, N - 1 - n]


def function_of(what: Kernel) -> Function:
    function = what.tile_ir()
    canonicalize(function)
    return reduce_loops(function)


def run_and_count(what: Kernel, arguments: dict[str, Any], facts: Facts, **hints: int) -> Counter:
    """hints: typical extents of some dimensions; others are large."""
    function = function_of(what)
    lane = run_lane(function, arguments, facts=facts, specialization=specialize(function, arguments, hints))
    return Counter(op.name for op in lane.walk())


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum_of(shape)).standard_normal(shape).astype(np.float32)


def sum_of(numbers: tuple[int, ...]) -> int:
    return int(np.sum(numbers))


def case_of(name: str, n: int) -> tuple[Kernel, dict[str, Any], dict[str, np.ndarray]]:
    """A kernel, its arguments for an extent, and what it gives."""
    i = np.arange(n)
    if name == "strided":
        x = normal(3, 8 * n + 2)
        y = x[:, 2 * i + 1] + x[:, 3 * i] - x[:, 4 * i + 2] * x[:, 6 * i + 5] + x[:, 8 * i]
        return strided, {"x": x, "y": np.zeros(y.shape, y.dtype)}, {"y": y}
    if name == "backwards":
        x = normal(3, n)
        return backwards, {"x": x, "y": np.zeros(x.shape, x.dtype)}, {"y": x[:, ::-1]}
    if name == "repeated":
        x = normal(3, (n + 8) // 2)
        y = x[:, i // 2] + x[:, i // 3] * x[:, i // 64] - x[:, (i + 5) // 4]
        return repeated, {"x": x, "y": np.zeros(y.shape, y.dtype)}, {"y": y}
    if name == "clamped":
        x = normal(3, n)
        left = np.where(i >= 2, x[:, np.maximum(i - 2, 0)], 0)
        y = left - x[:, np.minimum(i + 3, n - 1)] * x[:, np.maximum(np.minimum(n - 1 - i, n - 3), 0)]
        return clamped, {"x": x, "y": np.zeros(y.shape, y.dtype)}, {"y": y}
    if name == "packed":
        k = 2 * n
        x, scale = normal(1, k), normal(3, -(-k // 32))
        w = np.random.default_rng(n).integers(0, 256, (3, n), np.uint8)
        q = np.stack([w & 15, w >> 4], axis=-1).reshape(3, k) * scale[:, np.arange(k) // 32]
        return packed, {"x": x, "w": w, "scale": scale, "y": np.zeros((1, 3), np.float32)}, {"y": x @ q.T}
    if name == "pooled":
        x = normal(2, 6, 2 * n)
        return pooled, {"x": x, "y": np.zeros((2, 3, n), np.float32)}, {"y": x.reshape(2, 3, 2, n, 2).sum((2, 4))}
    if name == "turned":
        x, r = normal(n, 3), normal(3, 3)
        return turned, {"x": x, "r": r, "y": np.zeros(x.shape, x.dtype)}, {"y": x @ r.T}
    if name == "planes":
        x = np.random.default_rng(n).integers(0, 256, (n, 4), np.uint8)
        y = x.T.astype(np.int32) - 1
        arguments = {"x": x, "y": np.zeros(y.shape, y.dtype), "z": np.zeros((n, 4), np.int8)}
        return planes, arguments, {"y": y, "z": x.view(np.int8)}
    x = normal(2, n).astype(ml_dtypes.bfloat16)
    y, z = x.T.copy(), x[0, i // 2] + x[1, ::-1]
    return beside, {"x": x, "y": np.zeros(y.shape, y.dtype), "z": np.zeros(z.shape, z.dtype)}, {"y": y, "z": z}


NAMES = ["strided", "backwards", "repeated", "clamped", "packed", "pooled", "turned", "planes", "beside"]


def check(arguments: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    for name, values in expected.items():
        # Sums of at most 2 n products of numbers near 1, in another order than NumPy's.
        np.testing.assert_allclose(arguments[name].astype(np.float64), values.astype(np.float64), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("facts", FACTS, ids=lambda f: f"{f.lanes} lanes")
@pytest.mark.parametrize("n", [3, 16, 45])
@pytest.mark.parametrize("name", NAMES)
def test_windows_are_rows_and_permutations(name: str, n: int, facts: Facts) -> None:
    what, arguments, expected = case_of(name, n)
    names = run_and_count(what, arguments, facts)
    check(arguments, expected)
    if n >= 16:
        assert not names["gather"] and not names["scatter"]
        assert names["pick"] or names["unzip"] or names["zip"] or names["exchange"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("level", ["v3", "v4"])
@pytest.mark.parametrize("name", NAMES)
def test_windows_as_machine_code(name: str, level: str) -> None:
    if not target(level).features <= host().features:
        pytest.skip(f"this CPU has not all features of {level}")
    for n in (16, 45):
        what, arguments, expected = case_of(name, n)
        run_native(function_of(what), arguments, target(level))
        check(arguments, expected)


@kernel
def pairs(x: Tensor[bf16, K, N, 2], w: Tensor[f32, M, K, 2], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        k, s = whole(K), whole(2)
        y[m, n] = w[m, k, s] @ x[k, n, s]


@pytest.mark.parametrize("facts", FACTS, ids=lambda f: f"{f.lanes} lanes")
@pytest.mark.parametrize("n", [5, 64])
def test_pairs_of_bf16_are_halves_of_a_slot_for_each_lane(facts: Facts, n: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.standard_normal((3, n, 2)).astype(ml_dtypes.bfloat16)
    w = rng.standard_normal((2, 3, 2)).astype(np.float32)
    x[0, 0], x[-1, -1] = (2.0**-130, -0.0), (2.0**100, 3.0)
    arguments = {"x": x, "w": w, "y": np.full((2, n), np.nan, np.float32)}
    names = run_and_count(pairs, arguments, facts)
    np.testing.assert_allclose(arguments["y"], np.einsum("mks,kns->mn", w, x.astype(np.float32)), rtol=1e-5, atol=1e-5)
    assert not names["unzip"] and not names["pick"] and not names["gather"]
    assert names["shl"] and names["and"]


def test_targets_without_picks_gather() -> None:
    what, arguments, expected = case_of("repeated", 64)
    names = run_and_count(what, arguments, replace(AVX512, picks=False))
    check(arguments, expected)
    assert names["gather"] and not names["pick"]


def test_what_does_not_fill_is_scattered() -> None:
    """Of four elements three are stored: the fourth one is another's."""

    @kernel
    def three_of_four(x: Tensor[f32, 3, N], y: Tensor[f32, N, 4]):
        for n in tiles(N):
            c = whole(3)
            y[n, c + 0] = x[c, n]

    x, y = normal(3, 40), np.full((40, 4), 7, np.float32)
    run_and_count(three_of_four, {"x": x, "y": y}, AVX512)
    np.testing.assert_array_equal(y[:, :3], x.T)
    assert (y[:, 3] == 7).all()


def test_rows_that_are_shared_are_read_after_they_are_stored() -> None:
    """The second statement reads what the first one wrote."""

    @kernel
    def twice(x: Tensor[f32, N, 2]):
        for n in tiles(N):
            c = whole(2)
            x[n, c] = x[n, c] + 1.0
            x[n, c] = x[n, c] * 2.0

    x = normal(37, 2)
    arguments = {"x": x.copy()}
    run_and_count(twice, arguments, AVX512)
    np.testing.assert_array_equal(arguments["x"], (x + 1) * 2)


@pytest.mark.parametrize("facts", FACTS, ids=lambda f: f"{f.lanes} lanes")
def test_quotients_that_begin_anywhere(facts: Facts) -> None:
    """What some bits of a number leave is a multiple of a power of two, not of six."""

    @kernel
    def sixths(t: Tensor[i32, M], x: Tensor[f32, A], y: Tensor[f32, M, 16]):
        for m in each(M):
            n = whole(16)
            y[m, n] = x[(n + (t[m] & 12)) // 6]

    t, x, y = np.arange(16, dtype=np.int32), normal(6), np.zeros((16, 16), np.float32)
    run_and_count(sixths, {"t": t, "x": x, "y": y}, facts)
    np.testing.assert_array_equal(y, x[(np.arange(16) + (t[:, None] & 12)) // 6])


@pytest.mark.parametrize("facts", FACTS, ids=lambda f: f"{f.lanes} lanes")
def test_what_squares_read_is_stored_in_turns(facts: Facts) -> None:
    """x lies along the other axis: a walk takes squares of it, and then one element of each pair at a time."""

    @kernel
    def in_turns(x: Tensor[f32, 2, M, N], y: Tensor[f32, M, N, 2]):
        for m, n in tiles(M, N):
            c = whole(2)
            y[m, n, c] = x[c, m, n]

    x, y = normal(2, 37, 35).swapaxes(1, 2), np.zeros((35, 37, 2), np.float32)
    names = run_and_count(in_turns, {"x": x, "y": y}, facts)
    np.testing.assert_array_equal(y, np.moveaxis(x, 0, 2))
    assert names["exchange"]


SCALES = {f32: np.float32, bf16: ml_dtypes.bfloat16, u8: np.uint8, f64: np.float64, f8e4m3: ml_dtypes.float8_e4m3fn,
          i4: ml_dtypes.int4}


@pytest.mark.parametrize(("dtype", "facts"), [*zip(SCALES, cycle(FACTS), strict=False)], ids=lambda v: str(
    getattr(v, "name", "")))
@pytest.mark.parametrize(("rows", "k"), [(1, 112), (2, 117)])
def test_scales_of_groups_are_one_load_for_all_lanes(dtype: DType, rows: int, k: int, facts: Facts) -> None:
    """Weights lie along the depth, and their scales along the other axis: lanes go where the weights lie. What is left
    of a ragged depth may be gathered."""

    @kernel
    def grouped(x: Tensor[f32, M, K], w: Tensor[i8, N, K], scale: Tensor[dtype, B, N], y: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=f32)
            for k in tiles(K):
                acc += x[m, k] @ (w[n, k].to(f32) * scale[k // 32 + 1, n].to(f32))
            y[m, n] = acc

    n, rng = 5, np.random.default_rng(rows)
    x, w = normal(rows, k), rng.integers(-8, 8, (n, k)).astype(np.int8)
    scale = rng.integers(0, 8, (5, n)).astype(SCALES[dtype])
    y = np.zeros((rows, n), np.float32)
    names = run_and_count(grouped, {"x": x, "w": w, "scale": scale, "y": y}, facts, M=rows, N=512, K=512)
    wanted = x.astype(np.float64) @ (w * scale.astype(np.float64)[np.arange(k) // 32 + 1].T).T
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-3)
    assert names["load_splat"] and (k % 16 or not names["gather"])


@pytest.mark.parametrize("facts", FACTS, ids=lambda f: f"{f.lanes} lanes")
@pytest.mark.parametrize("start", [0, 5, 30, 32])
def test_groups_that_begin_anywhere(start: int, facts: Facts) -> None:
    """Where a vector may lie in two groups each lane reads its own."""

    @kernel
    def sums(x: Tensor[f32, N, K], scale: Tensor[f32, B, N], first: i32, y: Tensor[f32, N]):
        for n in tiles(N):
            k = whole(span(first, K))
            y[n] = sum(x[n, k] * scale[k // 32, n], over=k)

    x, scale, y = normal(3, 117), normal(4, 3), np.zeros(3, np.float32)
    run_and_count(sums, {"x": x, "scale": scale, "first": start, "y": y}, facts)
    k = np.arange(start, 117)
    np.testing.assert_allclose(y, (x[:, k] * scale[k // 32].T).sum(1), rtol=1e-4, atol=1e-4)


IN_NUMPY = {
    "add": np.add, "less": np.subtract, "from": lambda i, number: number - i, "max": np.maximum, "min": np.minimum,
    "div": lambda i, number: i // (number + 1),
}


def add(i: Any, number: Any) -> Any:
    return i + number


def less(i: Any, number: Any) -> Any:
    return i - number


def turn_round(i: Any, number: Any) -> Any:
    return number - i


def quotient(i: Any, number: Any) -> Any:
    return i // (number + 1)


IN_A_KERNEL = {"add": add, "less": less, "from": turn_round, "max": maximum, "min": minimum, "div": quotient}


@st.composite
def indices(draw: st.DrawFn) -> list[tuple[str, int]]:
    """Steps that make an index of a coordinate."""
    steps = st.tuples(st.sampled_from(["add", "less", "from", "max", "min", "div"]), st.integers(0, 40))
    return draw(st.lists(steps, min_size=1, max_size=3))


@settings(max_examples=examples(60), deadline=None)
@example(steps=[("div", 3), ("div", 1)], n=9, facts=FACTS[2])     # all lanes have the first quotient
@given(steps=indices(), n=st.integers(1, 70), facts=st.sampled_from(FACTS))
def test_indices_of_many_steps(steps: list[tuple[str, int]], n: int, facts: Facts) -> None:
    """Whatever moves by one element at most: chains of sums, differences, limits and quotients."""
    places = np.arange(n)
    for name, number in steps:
        places = IN_NUMPY[name](places, number)
    shift = -int(places.min())
    padded = [*steps, ("add", 0), ("add", 0)][:3]
    (f, a), (g, b), (h, c) = ((IN_A_KERNEL[name], number) for name, number in padded)

    @kernel
    def taken(x: Tensor[f32, A], y: Tensor[f32, N]):
        for n in tiles(N):
            y[n] = x[h(g(f(n, a), b), c) + shift]

    x = normal(int(places.max()) + shift + 1)
    arguments = {"x": x, "y": np.zeros(n, np.float32)}
    names = run_and_count(taken, arguments, facts)
    np.testing.assert_array_equal(arguments["y"], x[places + shift])
    assert not names["gather"]
