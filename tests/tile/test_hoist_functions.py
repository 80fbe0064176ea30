"""Functions of inputs over whole axes are computed once, before the loop that needs them; nothing else moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, each, exp, f32, f64, i32, log, max, min, rsqrt, span, sum, tanh, tiles, where, whole, zeros
from sapper.ir.nodes import Function, Op
from sapper.ir.text import print_function
from sapper.ir.verifier import verify
from sapper.lane.lower import Lowering
from sapper.tile.canonical import canonicalize
from sapper.tile.hoist_functions import FEWEST_TRIPS, WEIGHT_TRIPS, hoist_functions
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS
from sapper.tile.plan import COSTLY
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Facts, Schedule
from tests.lane.run_lane import specialize

M, N, K = sp.dims("M N K")
LARGE = 1 << 30


@sp.kernel
def differences(x: Tensor[f32, M, K], a: Tensor[f32, N, K], s: Tensor[f32, N, K], out: Tensor[f32, M, N]):
    for m in tiles(M):
        n, k = whole(N), whole(K)
        out[m, n] = sum(x[m, k] * a[n, k] - exp(s[n, k]), over=k)


@sp.kernel
def mixture(x: Tensor[f64, M, K], a: Tensor[f64, N, K], v: Tensor[f64, N, K], out: Tensor[f64, M, N]):
    """The logarithm, but not what it is of, which is used besides."""
    for m in tiles(M):
        n, k = whole(N), whole(K)
        d = x[m, k] - a[n, k]
        out[m, n] = sum(log(v[n, k]) - d * d * v[n, k], over=k)


@sp.kernel
def gains(x: Tensor[f32, M, K], g: Tensor[f32, K], out: Tensor[f32, M, K]):
    for m in tiles(M):
        k = whole(K)
        out[m, k] = x[m, k] * rsqrt(sum(x[m, k] * x[m, k], over=k) + 1e-5) * (1 + tanh(g[k]))


@sp.kernel
def masked(x: Tensor[f32, M, K], g: Tensor[f32, K], count: i32, out: Tensor[f32, M]):
    for m in tiles(M):
        k = whole(K)
        out[m] = sum(where(k < count, x[m, k] / (1 + exp(g[k])), 0.0), over=k)


@sp.kernel
def in_loops_in_loops(x: Tensor[f32, M, N, K], g: Tensor[f32, K], out: Tensor[f32, M, N]):
    for n in each(N):
        for m in tiles(M):
            k = whole(K)
            out[m, n] = sum(x[m, n, k] + 1 / g[k], over=k)


@sp.kernel
def in_order(x: Tensor[f32, M, K], g: Tensor[f32, K], out: Tensor[f32, K]):
    k = whole(K)
    total = zeros(k, dtype=f32)
    for m in range(M):
        total = total * 0.5 + x[m, k] * exp(g[k]) + max(x[m, k], over=k)
    out[k] = total


@sp.kernel
def two_loops(x: Tensor[f32, M, K], g: Tensor[f32, K], out: Tensor[f32, M], low: Tensor[f32, M]):
    for m in tiles(M):
        k = whole(K)
        out[m] = max(x[m, k], over=k)
    for m in tiles(M):
        k = whole(K)
        low[m] = min((x[m, k] + out[m]) * exp(g[k]), over=k)


@sp.kernel
def of_what_was_summed(x: Tensor[f32, M, K], g: Tensor[f32, K], out: Tensor[f32, M]):
    """Before the loop, not before the sum that it is computed of."""
    k = whole(K)
    total = sum(g[k], over=k)
    for m in tiles(M):
        out[m] = sum(x[m, k] + exp(g[k] - total), over=k)


@sp.kernel
def weights(x: Tensor[f32, M, K], a: Tensor[f32, N, K], s: Tensor[f32, N, K], out: Tensor[f32, M, N]):
    for m in tiles(M):
        n, k = whole(N), whole(K)
        out[m, n] = sum((x[m, k] - a[n, k]) * exp(s[n, k]), over=k)


MOVING = [differences, mixture, gains, masked, in_loops_in_loops, in_order, two_loops,
          of_what_was_summed, weights]


@sp.kernel
def stored(x: Tensor[f32, M, K], g: Tensor[f32, K], out: Tensor[f32, M]):
    for m in range(M):
        k = whole(K)
        out[m] = sum(x[m, k] + exp(g[k]), over=k)
        g[k] = g[k] * 0.5


@sp.kernel
def of_the_row(x: Tensor[f32, M, K], g: Tensor[f32, M], out: Tensor[f32, M]):
    for m in tiles(M):
        k = whole(K)
        out[m] = sum(x[m, k] + exp(g[m]), over=k)


@sp.kernel
def perhaps_outside(x: Tensor[f32, M, K], g: Tensor[f32, K], count: i32, out: Tensor[f32, M]):
    for m in tiles(M):
        k = whole(span(0, count))
        out[m] = sum(x[m, k] + exp(g[k]), over=k)


@sp.kernel
def perhaps_not(x: Tensor[f32, M, K], g: Tensor[f32, K], count: i32, out: Tensor[f32, M]):
    for m in range(M):
        k = whole(K)
        total = max(x[m, k], over=k)
        if count > m:
            total = sum(x[m, k] + exp(g[k]), over=k)
        out[m] = total


@sp.kernel
def products(x: Tensor[f32, M, K], s: Tensor[f32, N, K], out: Tensor[f32, M, N]):
    for m in tiles(M):
        n, k = whole(N), whole(K)
        out[m, n] = x[m, k] @ exp(s[n, k])


@sp.kernel
def no_sums(x: Tensor[f32, M, K], g: Tensor[f32, K], out: Tensor[f32, M, K]):
    for m in tiles(M):
        k = whole(K)
        out[m, k] = x[m, k] + exp(g[k])


@sp.kernel
def cheap(x: Tensor[f32, M, K], g: Tensor[f32, K], out: Tensor[f32, M]):
    for m in tiles(M):
        k = whole(K)
        out[m] = sum(x[m, k] + (g[k] * 2 + 1), over=k)


STAYING = [stored, of_the_row, perhaps_outside, perhaps_not, products, no_sums, cheap]


def canonical(kernel: Any) -> Function:
    function: Function = kernel.tile_ir()
    reduce_loops(function)
    canonicalize(function)
    return function


def hoisted(function: Function, extent: int = WEIGHT_TRIPS, most_bytes: int = LARGE) -> int:
    moved = hoist_functions(function, lambda value: 0 if value.op is not None and value.op.name == "const" else extent,
                            most_bytes)
    verify(function, TILE_OPS)
    return moved


def costly(function: Function, loops: bool) -> list[str]:
    """Costly elementwise ops that no loop changes, in loops or before them."""
    def walk(op: Op, inside: bool) -> list[str]:
        mine = [op.name] if inside == loops and op.name in COSTLY and "m" not in op.result.type.axes else []  # type: ignore[union-attr]
        return mine + [name for block in op.blocks for inner in block.ops for name in walk(inner, True)]

    return [name for op in function.body.ops for name in walk(op, False)]


@pytest.mark.parametrize("kernel", MOVING, ids=lambda kernel: kernel.name)
def test_what_no_iteration_changes_stands_before_the_loop(kernel: Any) -> None:
    function = canonical(kernel)
    before = costly(function, True)
    assert before and not costly(function, False)
    assert hoisted(function) == 1
    assert costly(function, False) == before and not costly(function, True)


@pytest.mark.parametrize("kernel", STAYING, ids=lambda kernel: kernel.name)
def test_all_else_stays(kernel: Any) -> None:
    function = canonical(kernel)
    text = print_function(function)
    assert hoisted(function) == 0 and print_function(function) == text


@pytest.mark.parametrize(("kernel", "fewest", "most_bytes"), [
    (gains, FEWEST_TRIPS, 4 * FEWEST_TRIPS), (weights, WEIGHT_TRIPS, 4 * WEIGHT_TRIPS**2)], ids=["gains", "weights"])
def test_what_is_not_worth_it_stays(kernel: Any, fewest: int, most_bytes: int) -> None:
    function = canonical(kernel)
    assert hoisted(function, fewest - 1, most_bytes) == 0
    assert hoisted(function, fewest, most_bytes - 1) == 0
    assert hoisted(function, fewest, most_bytes) == 1


@sp.kernel
def weights_by_hand(x: Tensor[f32, M, K], a: Tensor[f32, N, K], s: Tensor[f32, N, K], out: Tensor[f32, M, N]):
    n, k = whole(N), whole(K)
    w = exp(s[n, k])
    for m in tiles(M):
        out[m, n] = sum((x[m, k] - a[n, k]) * w, over=k)


@pytest.mark.parametrize("kernel", [weights, weights_by_hand], ids=lambda kernel: kernel.name)
def test_weights_of_many_rows_pass_through_a_buffer(kernel: Any) -> None:
    """One part makes them, and the other reads them as it does a tensor; not of few rows, nor by many workers."""
    for rows, facts, parts in ((5000, Facts(), 2), (300, Facts(), 0), (5000, Facts(many_workers=True), 0)):
        specialization = specialize(kernel.tile_ir(), arguments(kernel, {"M": rows, "N": 3, "K": 5}))
        lowering = Lowering(canonical(kernel), Schedule(), facts, specialization, facts.lanes)
        made = [op for op in lowering.function.body.ops if op.name == "part"]
        assert len(made) == parts
        if parts:
            assert not any(op.name == "exp" for op in made[1].walk())
            assert len([op for op in made[1].walk() if op.name == "load"]) == 3


def arguments(kernel: Any, sizes: dict[str, int]) -> dict[str, Any]:
    source = np.random.default_rng(3)
    made: dict[str, Any] = {}
    for value in kernel.tile_ir().arguments:
        if not hasattr(value.type, "dims"):
            made[value.name] = 5
            continue
        shape = [sizes[dim] for dim in value.type.dims]
        dtype = np.float64 if value.type.dtype is f64 else np.float32
        made[value.name] = source.uniform(0.5, 2, shape).astype(dtype) if value.name not in ("out", "low") else \
            np.full(shape, np.nan, dtype)
    return made


@pytest.mark.parametrize("sizes", [(70, 3, 21), (0, 3, 5), (1, 1, 1), (65, 0, 9)], ids=str)
@pytest.mark.parametrize("kernel", MOVING, ids=lambda kernel: kernel.name)
def test_the_meaning_stays_bit_for_bit(kernel: Any, sizes: tuple[int, int, int]) -> None:
    found = []
    for moves in (False, True):
        function = canonical(kernel)
        assert not moves or hoisted(function) == 1
        given = arguments(kernel, dict(zip(("M", "N", "K"), sizes, strict=True)))
        interpret(function, given)
        found.append(given.get("low", given["out"]))
    assert found[0].tobytes() == found[1].tobytes()


@pytest.mark.parametrize("sizes", [(300, 3, 21), (129, 7, 64), (0, 3, 5), (1500, 5, 19)], ids=str)
@pytest.mark.parametrize("kernel", [*MOVING, weights_by_hand], ids=lambda kernel: kernel.name)
def test_compiled_results_are_right(kernel: Any, sizes: tuple[int, int, int]) -> None:
    """By one thread and by two, of the same code."""
    expected, *runs = (arguments(kernel, dict(zip(("M", "N", "K"), sizes, strict=True))) for _ in range(3))
    interpret(canonical(kernel), expected)
    for threads, given in enumerate(runs, 1):
        kernel(*given.values(), threads=threads)
        for name in given.keys() & {"out", "low"}:
            np.testing.assert_allclose(given[name], expected[name], rtol=1e-12 if kernel is mixture else 1e-5,
                                       atol=1e-4)
