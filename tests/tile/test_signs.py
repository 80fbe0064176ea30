"""What is known of signs: true of every element, and found where exponentials need it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sapper as sp
from sapper import Tensor, each, exp, f32, i32, max, maximum, min, minimum, span, sum, tiles, whole, zeros
from sapper.kernels import library
from sapper.tile.signs import never_negative, never_positive, same_loads

M, N = sp.dims("M N")
LIBRARY = {k.name: k for k in library()}


@sp.kernel
def of_the_row(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        row = x[m, n]
        y[m, n] = exp(row - max(row, over=n))


@sp.kernel
def of_two(x: Tensor[f32, M, N], z: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        a, b = x[m, n], z[m, n]
        y[m, n] = exp(b - maximum(1.0, maximum(a, b)))


@sp.kernel
def of_itself(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        a = x[m, n]
        y[m, n] = exp(a - a)


@sp.kernel
def of_others(x: Tensor[f32, M, N], z: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        y[m, n] = exp(x[m, n] - max(z[m, n], over=n))


@sp.kernel
def the_other_way(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        row = x[m, n]
        y[m, n] = exp(max(row, over=n) - row)


@sp.kernel
def of_the_least(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        row = x[m, n]
        y[m, n] = exp(row - min(row, over=n))


@sp.kernel
def read_twice(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        y[m, n] = exp(x[m, n] - max(x[m, n], over=n))


@sp.kernel
def stored_between(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        most = max(x[m, n], over=n)
        x[m, n] = x[m, n] + 1.0
        y[m, n] = exp(x[m, n] - most)


@pytest.mark.parametrize(("kernel", "expected"), [(read_twice, True), (stored_between, False)])
def test_what_is_loaded_again_is_the_same_unless_something_is_stored(kernel: object, expected: bool) -> None:
    function = kernel.tile_ir()  # type: ignore[attr-defined]
    same = same_loads(function)
    found = [never_positive(op.operands[0], same) for op in function.walk() if op.name == "exp"]
    assert (known(kernel), found) == ([False], [expected])


def known(kernel: object) -> list[bool]:
    return [never_positive(op.operands[0]) for op in kernel.tile_ir().walk() if op.name == "exp"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("kernel", "expected"), [
    (of_the_row, True), (of_two, True), (of_itself, True), (of_others, False), (the_other_way, False),
    (of_the_least, False)], ids=lambda value: getattr(value, "name", ""))
def test_what_a_greatest_element_is_taken_of_is_never_above_it(kernel: object, expected: bool) -> None:
    assert known(kernel) == [expected]


@pytest.mark.parametrize("name", ["softmax", "softmax_bf16", "attention_decode_f32", "attention_decode_bf16"])
def test_weights_of_a_softmax_are_known_in_all_of_the_library(name: str) -> None:
    found = known(LIBRARY[name].kernel)
    assert found and all(found)


@sp.kernel
def of_spans(x: Tensor[f32, M], low: Tensor[i32, N], given: i32, y: Tensor[f32, N]):
    """Where each loop over tiles begins: plainly at 0 or more, the first three of them."""
    for n in each(N):
        total = zeros(dtype=f32)
        for m in tiles(span(0, M)):
            total += sum(x[m], over=m)
        for m in tiles(span(n * 4 // 3, M)):
            total += sum(x[m], over=m)
        for m in tiles(span(minimum(n + M, 7), M)):
            total += sum(x[m], over=m)
        for m in tiles(span(n - 1, M)):
            total += sum(x[m], over=m)
        for m in tiles(span(minimum(given, n), M)):
            total += sum(x[m], over=m)
        for m in tiles(span(low[n], M)):
            total += sum(x[m], over=m)
        y[n] = total


def test_indices_that_are_plainly_never_below_0() -> None:
    """Of counters it is known by where they start, which who asks has to say."""
    function = of_spans.tile_ir()
    (outer,) = [op for op in function.walk() if op.name == "each"]
    starts = [op.operands[0] for op in function.walk() if op.name == "tiles"]
    counters = {outer.blocks[0].arguments[0]: outer.operands[0]}
    assert [never_negative(start, counters.get) for start in starts] == [True, True, True, False, False, False]
    assert [never_negative(start) for start in starts] == [True, False, False, False, False, False]


hostile = st.lists(st.one_of(st.floats(width=32), st.sampled_from([np.inf, -np.inf, np.nan, 3e38, -3e38, -0.0])),
                   min_size=1, max_size=40)


@given(hostile)
def test_hostile_rows(values: list[float]) -> None:
    """Machine code that relies on it, beside what the interpreter makes: where a row has no NaN and infinity."""
    x = np.array([values], np.float32)
    found, expected = np.empty_like(x), np.empty_like(x)
    of_the_row(x, found)
    of_the_row(x, expected, interpret=True)
    if not np.isnan(x).any():
        np.testing.assert_allclose(found, expected, rtol=2e-7, atol=2e-45)
    assert not (found > 1).any()


@given(hostile, st.integers(0, 39))
def test_hostile_pairs(values: list[float], turn: int) -> None:
    x = np.array([values], np.float32)
    z = np.roll(x, turn)
    found, expected = np.empty_like(x), np.empty_like(x)
    of_two(x, z, found)
    of_two(x, z, expected, interpret=True)
    same = ~np.isnan(x) & ~np.isnan(z)
    np.testing.assert_allclose(found[same], expected[same], rtol=2e-7, atol=2e-45)
