"""States that loops carry from token to token in scratch memory: which axis lies across the lanes, what is overwritten
in place, and what is computed once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from sapper.ir.nodes import Function, Op
from sapper.ir.types import f32
from sapper.lang.builtins import each, exp, tiles, whole, zeros
from sapper.lang.dims import dims
from sapper.lang.kernel import kernel
from sapper.lang.tensor import Tensor
from sapper.tile.schedule import Facts

from .test_nest_lanes import AVX2, AVX512, lowered, normal

B, D, M, N, T = dims("B D M N T")


@kernel
def delta_rule(q: Tensor[f32, T, D], k: Tensor[f32, T, D], v: Tensor[f32, T, N], y: Tensor[f32, T, N]):
    """arXiv:2412.06464: what a key finds is made to be its value."""
    for n in tiles(N):
        d = whole(D)
        state = zeros(d, n, dtype=f32)
        for t in range(T):
            state = state * 0.5
            state = state + k[t, d] * (v[t, n] - k[t, d] @ state)
            y[t, n] = q[t, d] @ state


@kernel
def decayed(w: Tensor[f32, T, D], v: Tensor[f32, T, N], q: Tensor[f32, T, D], last: Tensor[f32, B, N, D],
            y: Tensor[f32, T, N]):
    """Each column fades by itself: that is the same for all rows."""
    for b in each(B):
        n, d = whole(N), whole(D)
        state = zeros(n, d, dtype=f32)
        for t in range(T):
            state = state * exp(-exp(w[t, d])) + v[t, n] * q[t, d]
            if b == 0:
                y[t, n] = sum(state * q[t, d], over=d)
        last[b, n, d] = state


@kernel
def decayed_in_sums(w: Tensor[f32, T, D], v: Tensor[f32, T, N], q: Tensor[f32, T, D], y: Tensor[f32, B, T, N]):
    for b in each(B):
        n, d = whole(N), whole(D)
        state = zeros(n, d, dtype=f32)
        for t in range(T):
            state = state * exp(-exp(w[t, d])) + v[t, n] * q[t, d]
            y[b, t, n] = sum(state * q[t, d], over=d)


@kernel
def several_queries(q: Tensor[f32, T, M, D], k: Tensor[f32, T, D], v: Tensor[f32, T, N], y: Tensor[f32, T, M, N]):
    """The new state is met by each of them."""
    for n in tiles(N):
        m, d = whole(M), whole(D)
        state = zeros(d, n, dtype=f32)
        for t in range(T):
            state = state * 0.5 + k[t, d] * v[t, n]
            y[t, m, n] = q[t, m, d] @ state


@kernel
def old_and_new(q: Tensor[f32, T, D], k: Tensor[f32, T, D], v: Tensor[f32, T, N], y: Tensor[f32, T, N]):
    """Sums of the old state wait for sums of the new one."""
    for n in tiles(N):
        d = whole(D)
        state = zeros(d, n, dtype=f32)
        for t in range(T):
            new = state * 0.5 + k[t, d] * v[t, n]
            found = q[t, d] @ new
            y[t, n] = k[t, d] @ (state * found)
            state = new


def of_delta(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    state, y = np.zeros((q.shape[1], v.shape[1])), []
    for query, key, value in zip(q, k, v, strict=True):
        state = state * 0.5
        state += np.outer(key, value - key @ state)
        y.append(query @ state)
    return np.array(y)


def of_old_and_new(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    state, y = np.zeros((q.shape[1], v.shape[1])), []
    for query, key, value in zip(q, k, v, strict=True):
        new = state * 0.5 + np.outer(key, value)
        y.append(key @ (state * (query @ new)))
        state = new
    return np.array(y)


def loops_of_a_token(lane: Function) -> Iterator[Op]:
    for loop in lane.walk():
        if loop.name == "loop" and loop.attributes["label"] == "each":
            yield from (op for op in loop.walk() if op.name == "loop" and op.attributes["label"] != "each")


def copies(lane: Function) -> list[Op]:
    """Loops of a token that only move."""
    moves = {"load", "store", "gather", "scatter", "s_mul", "s_add", "s_sub", "s_min", "mask_first", "yield"}
    return [loop for loop in loops_of_a_token(lane) if {op.name for op in loop.blocks[0].ops} <= moves]


FACTS = pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
SHAPES = pytest.mark.parametrize(("tokens", "d", "n"), [(1, 1, 1), (3, 7, 33), (4, 33, 17), (2, 64, 65)])
HINTS = {"T": 64, "D": 64, "N": 64, "M": 4, "B": 2}


@FACTS
@SHAPES
def test_lanes_leave_an_axis_that_is_summed(tokens: int, d: int, n: int, facts: Facts) -> None:
    """Keys and queries lie along it, and values only along the other one; nothing is gathered, or copied."""
    q, k, v = normal(tokens, d), 0.3 * normal(tokens, d), normal(tokens, n)
    arguments = {"q": q, "k": k, "v": v, "y": np.full((tokens, n), np.nan, np.float32)}
    lane = lowered(delta_rule, arguments, facts, hints=HINTS)
    np.testing.assert_allclose(arguments["y"], of_delta(q, k, v), rtol=1e-4, atol=1e-4 * np.sqrt(d))
    assert not any(op.name in ("gather", "scatter") for op in lane.walk())
    assert list(loops_of_a_token(lane)) and not copies(lane)


@FACTS
@SHAPES
@pytest.mark.parametrize("summed", [False, True])
def test_what_is_the_same_for_all_rows_of_a_state_is_computed_once(tokens: int, d: int, n: int, facts: Facts,
                                                                    summed: bool) -> None:
    w, v, q = normal(tokens, d), normal(tokens, n), normal(tokens, d)
    state, wanted = np.zeros((n, d)), []
    for decay, value, query in zip(w, v, q, strict=True):
        state = state * np.exp(-np.exp(decay)) + np.outer(value, query)
        wanted.append(state @ query)
    arguments = {"w": w, "v": v, "q": q}
    if summed:
        arguments["y"] = np.full((2, tokens, n), np.nan, np.float32)
        lane = lowered(decayed_in_sums, arguments, facts, hints=HINTS)
        np.testing.assert_allclose(arguments["y"], [wanted, wanted], rtol=1e-4, atol=1e-4)
        made = [loop for loop in loops_of_a_token(lane) if any(op.name == "exp" for op in loop.walk())]
        assert made and not any(op.attributes.get("label") == "n" for loop in made for op in loop.walk())
    else:
        arguments |= {"last": np.full((2, n, d), np.nan, np.float32), "y": np.full((tokens, n), np.nan, np.float32)}
        lowered(decayed, arguments, facts, hints=HINTS)
        np.testing.assert_allclose(arguments["y"], wanted, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(arguments["last"], [state, state], rtol=1e-4, atol=1e-4)


@FACTS
@SHAPES
def test_a_state_that_is_read_again_is_not_overwritten(tokens: int, d: int, n: int, facts: Facts) -> None:
    q, k, v = normal(tokens, 3, d), normal(tokens, d), normal(tokens, n)
    arguments = {"q": q, "k": k, "v": v, "y": np.full((tokens, 3, n), np.nan, np.float32)}
    lowered(several_queries, arguments, facts, hints=HINTS)
    state = np.zeros((d, n))
    for query, key, value, found in zip(q, k, v, arguments["y"], strict=True):
        state = state * 0.5 + np.outer(key, value)
        np.testing.assert_allclose(found, query @ state, rtol=1e-4, atol=1e-4)
    arguments = {"q": q[:, 0], "k": k, "v": v, "y": np.full((tokens, n), np.nan, np.float32)}
    lowered(old_and_new, arguments, facts, hints=HINTS)
    wanted = of_old_and_new(q[:, 0], k, v)
    np.testing.assert_allclose(arguments["y"], wanted, rtol=1e-3, atol=1e-4 * max(1.0, np.abs(wanted).max()))
