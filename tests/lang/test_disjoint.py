"""Loops whose author asserts that iterations do not meet: they run in parallel, and interpreters watch them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import KernelError, Tensor, each, emulate, f32, i32, kernel, span, tiles, whole, zeros
from sapper.ir.text import parse_function, print_function
from sapper.ir.verifier import VerificationError, verify
from sapper.runtime.check import check_kernel
from sapper.tile.eager import run as run_eager
from sapper.tile.interpret import RaceError, interpret
from sapper.tile.ops import TILE_OPS
from tests.lane.run_lane import run_lane

E, T, K, N, B = sp.dims("E T K N B")


@kernel
def experts(x: Tensor[f32, T, K], w: Tensor[f32, E, K, N], start: Tensor[i32, E], stop: Tensor[i32, E],
            place: Tensor[i32, T], out: Tensor[f32, T, N]):
    """A grouped matmul over ragged groups: the rows of each expert go to places of their own."""
    for e in each(E, disjoint=True):
        for t in tiles(span(start[e], stop[e])):
            for n in tiles(N):
                acc = zeros(t, n, dtype=f32)
                for k in tiles(K):
                    acc += x[place[t], k] @ w[e, k, n]
                out[t, n] = acc


@kernel
def scatter(x: Tensor[f32, T, K], place: Tensor[i32, T], out: Tensor[f32, T, K]):
    for t in each(T, disjoint=True):
        k = whole(K)
        out[place[t], k] = x[t, k]


@kernel
def proved(x: Tensor[f32, T], out: Tensor[f32, T]):
    for t in each(T, disjoint=True):
        out[t] = x[t]


def groups(rng: np.random.Generator) -> dict[str, Any]:
    e, t, k, n = 4, 23, 9, 21
    ends = np.sort(rng.integers(0, t + 1, e - 1))
    start, stop = np.concatenate([[0], ends]).astype(np.int32), np.concatenate([ends, [t]]).astype(np.int32)
    return {"x": rng.standard_normal((t, k)).astype(np.float32), "w": rng.standard_normal((e, k, n)).astype(np.float32),
            "start": start, "stop": stop, "place": rng.permutation(t).astype(np.int32),
            "out": np.zeros((t, n), np.float32)}


def test_ragged_groups_at_every_station() -> None:
    function = experts.tile_ir()
    verify(function, TILE_OPS)
    text = print_function(function)
    assert print_function(parse_function(text, {"tile": TILE_OPS})) == text
    loops = {op.name: op for op in function.walk() if op.name == "each"}
    assert loops["each"].attributes == {"count": 1, "parallel": True, "asserted": True}
    for seed, run in enumerate((lambda a: interpret(function, a, check_races=True), lambda a: run_eager(experts, a),
                                lambda a: run_lane(experts.tile_ir(), a, workers=3),
                                lambda a: experts(*a.values(), threads=2),
                                lambda a: emulate.run(experts, *a.values(), target="sm_80", workers=2))):
        given = groups(np.random.default_rng(seed))
        want = np.zeros_like(given["out"])
        for e in range(4):
            rows = slice(given["start"][e], given["stop"][e])
            want[rows] = given["x"][given["place"][rows]] @ given["w"][e]
        run(given)
        np.testing.assert_allclose(given["out"], want, rtol=1e-5, atol=1e-5)


def test_the_loop_has_tasks() -> None:
    made = run_lane(scatter.tile_ir(), {"x": np.ones((3, 2), np.float32), "place": np.int32([2, 0, 1]),
                                        "out": np.zeros((3, 2), np.float32)}, workers=2)
    assert any(op.name == "tasks" for op in made.walk())


def test_what_is_proved_needs_no_assertion() -> None:
    (loop,) = [op for op in proved.tile_ir().walk() if op.name == "each"]
    assert loop.attributes == {"count": 1, "parallel": True}


def test_interpreters_name_both_iterations() -> None:
    given = {"x": np.ones((4, 2), np.float32), "place": np.int32([3, 1, 0, 1]), "out": np.zeros((4, 2), np.float32)}
    with pytest.raises(RaceError, match=r"out\[1, 0\] is written by two iterations .*: t = 1 and t = 3"):
        interpret(scatter.tile_ir(), given, check_races=True)
    with pytest.raises(KernelError, match=r"out\[1, 0\] is written by two iterations .*: t = 1 and t = 3") as caught:
        run_eager(scatter, given)
    assert caught.value.kind == "disjoint" and "out[place[t], k] = x[t, k]" in str(caught.value)
    with pytest.raises(KernelError, match="t = 1 and t = 3"):
        scatter(*given.values(), interpret=True)


def test_reads_are_watched_through_views() -> None:
    @kernel
    def shift(x: Tensor[f32, T]):
        pairs = x.view(T // 2, 2)
        for t in each(T // 2 - 1, disjoint=True):
            pairs[t, 0] = x[2 * t + 2]

    with pytest.raises(KernelError, match=r"x\[1, 0\] is written by one iteration .*: t = 1, t = 0"):
        run_eager(shift, {"x": np.arange(8, dtype=np.float32)[::-1]})


def test_check_tests_the_assertion() -> None:
    def arguments(places: Any) -> Any:
        def make(random: np.random.Generator, shape: dict[str, int]) -> dict[str, Any]:
            t = shape["T"]
            return {"x": np.ones((t, 2), np.float32), "place": places(random, t).astype(np.int32),
                    "out": np.zeros((t, 2), np.float32)}

        return make

    good = check_kernel(scatter, runs=6, make_arguments=arguments(lambda random, t: random.permutation(t)),
                        shapes=({"T": 5},))
    assert good.ok, good
    bad = check_kernel(scatter, runs=6, make_arguments=arguments(lambda random, t: np.zeros(t)), shapes=({"T": 5},))
    assert not bad.ok and "t = 0 and t = 1" in str(bad.finding)


def test_an_asserted_loop_is_parallel() -> None:
    function = scatter.tile_ir()
    (loop,) = [op for op in function.walk() if op.name == "each"]
    loop.attributes["parallel"] = False
    with pytest.raises(VerificationError, match="an asserted loop that is not parallel"):
        verify(function, TILE_OPS)
