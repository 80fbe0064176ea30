"""Rows of a few elements are written out, and mean the same."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper import (
    Tensor,
    argmax,
    argmin,
    bf16,
    cumsum,
    dims,
    each,
    exp,
    f32,
    f64,
    i8,
    i32,
    kernel,
    max,
    min,
    sum,
    tiles,
    where,
    whole,
)
from sapper.codegen.pipeline import compile_kernel
from sapper.ir.verifier import verify
from sapper.lane.windows import STRIDES
from sapper.runtime.check import check_kernel
from sapper.targets import target
from sapper.tile.canonical import canonicalize
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS
from sapper.tile.schedule import Facts, Schedule
from sapper.tile.short_axes import write_out_short_axes
from tests.lane.run_lane import run_lane
from tests.strategies import examples

B, N = dims("B N")


@kernel
def softmax(x: Tensor[f32, N, 8], y: Tensor[f32, N, 8]):
    for n in tiles(N):
        c = whole(8)
        e = exp(x[n, c] - max(x[n, c], over=c))
        y[n, c] = e / sum(e, over=c)


@kernel
def turned(a: Tensor[f32, 3, 3], x: Tensor[f32, N, 3], y: Tensor[f32, N, 3]):
    for n in tiles(N):
        i, j = whole(3), whole(3)
        y[n, i] = a[i, j] @ x[n, j]


@kernel
def products(a: Tensor[f32, N, 2, 3], b: Tensor[f32, N, 3, 2], y: Tensor[f32, N, 2, 2]):
    for n in tiles(N):
        i, j, k = whole(2), whole(2), whole(3)
        y[n, i, j] = sum(a[n, i, k] * b[n, k, j], over=k)


@kernel
def boxes(x: Tensor[f32, B, N, 4], low: Tensor[f32, B, N, 2], size: Tensor[f32, B, N]):
    for b in each(B):
        for n in tiles(N):
            c = whole(2)
            side = x[b, n, c + 2] - x[b, n, c]
            low[b, n, c] = where(side < 0.0, x[b, n, c + 2], x[b, n, c])
            size[b, n] = sum(side * side, over=c)


@kernel
def best(x: Tensor[f32, N, 6], high: Tensor[i32, N], low: Tensor[i32, N], span: Tensor[f32, N]):
    for n in tiles(N):
        c = whole(6)
        high[n] = argmax(x[n, c], over=c).to(i32)
        low[n] = argmin(x[n, c], over=c).to(i32)
        span[n] = max(x[n, c], over=c) - min(x[n, c], over=c)


@kernel
def totals(x: Tensor[bf16, N, 4], y: Tensor[bf16, N, 4], z: Tensor[bf16, N]):
    for n in tiles(N):
        c = whole(4)
        y[n, c] = cumsum(x[n, c], over=c)
        z[n] = sum(x[n, c], over=c)


@kernel
def bytes_from_the_least(x: Tensor[i8, N, 4], y: Tensor[i8, N, 4]):
    for n in tiles(N):
        c = whole(4)
        y[n, c] = where(c == 1, x[n, c], x[n, c] - min(x[n, c], over=c))


@kernel
def in_place(x: Tensor[f32, N, 4]):
    for n in tiles(N):
        c = whole(4)
        x[n, c] = x[n, c] - min(x[n, c], over=c)


@kernel
def over_part_of_a_row(x: Tensor[f32, N, 8], y: Tensor[f32, N, 8]):
    for n, r in tiles(N, 2):
        c = whole(4)
        y[n, r * 4 + c] = x[n, r * 4 + c] - sum(x[n, r * 4 + c], over=c)


@kernel
def read_after_a_store(x: Tensor[f32, N, 3], y: Tensor[f32, N, 3]):
    for n in tiles(N):
        c = whole(3)
        x[n, c] = x[n, c] - min(x[n, c], over=c)
        y[n, c] = x[n, c] + max(x[n, c], over=c)


KERNELS = (softmax, turned, products, boxes, best, totals, bytes_from_the_least, in_place, over_part_of_a_row,
           read_after_a_store)


def written_out(of: Any, most: int = 8, lanes_step: Any = lambda _, elements: elements in STRIDES,
                named: tuple[str, ...] = (), most_apart: int = 0) -> Any:
    function = of.tile_ir()
    canonicalize(function)
    write_out_short_axes(function, most, most_apart, lanes_step, named)
    verify(function, TILE_OPS)
    return function


def arguments(of: Any, count: int, seed: int) -> dict[str, Any]:
    """Numbers of which sums are exact in any order; of floats some that are none, and infinite ones."""
    random = np.random.default_rng(seed)
    dtypes = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "i8": np.int8, "i32": np.int32}
    made = {}
    for name, type in of.parameters:
        shape = [dim if isinstance(dim, int) else 2 if dim == "B" else count for dim in type.dims]
        values = random.integers(-8, 9, shape).astype(np.float32)
        if of is best:
            values[random.random(shape) < 0.2] = np.nan
            values[random.random(shape) < 0.1] = -np.inf
        with np.errstate(invalid="ignore"):
            made[name] = values.astype(dtypes[type.dtype.name])
    return made


@pytest.mark.parametrize("of", KERNELS, ids=lambda of: of.name)
def test_the_meaning_is_the_same(of: Any) -> None:
    expected = arguments(of, 37, 0)
    found = {name: value.copy() for name, value in expected.items()}
    with np.errstate(invalid="ignore"):
        interpret(of.tile_ir(), expected)
        function = written_out(of)
        assert not any(op.name in ("whole", "reduce", "contract", "scan") for op in function.walk())
        interpret(function, found)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].astype(np.float64), value.astype(np.float64), rtol=2e-6)


@settings(max_examples=examples(20))
@given(of=st.sampled_from(KERNELS), count=st.integers(1, 70), lanes=st.sampled_from([16, 32]), picks=st.booleans())
def test_lane_ir_means_the_same(of: Any, count: int, lanes: int, picks: bool) -> None:
    expected = arguments(of, count, count)
    found = {name: value.copy() for name, value in expected.items()}
    facts = Facts(lanes=lanes, picks=picks, many_workers=lanes == 32, transposes_by_scatter=lanes == 32)
    with np.errstate(all="ignore"):
        interpret(of.tile_ir(), expected)
        run_lane(of.tile_ir(), found, facts=facts)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].astype(np.float64), value.astype(np.float64), rtol=2e-5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("of", [softmax, boxes, best, totals, in_place], ids=lambda of: of.name)
def test_machine_code(of: Any) -> None:
    report = check_kernel(of, runs=3)
    assert report.ok, report


@kernel
def no_sum(x: Tensor[f32, N, 4], y: Tensor[f32, N, 4]):
    for n in tiles(N):
        c = whole(4)
        y[n, c] = x[n, c] * 2.0


@kernel
def rows_of_five(x: Tensor[f32, N, 5], y: Tensor[f32, N, 5]):
    for n in tiles(N):
        c = whole(5)
        y[n, c] = x[n, c] - sum(x[n, c], over=c)


@kernel
def planes(x: Tensor[f32, 4, N], y: Tensor[f32, 4, N]):
    for n in tiles(N):
        c = whole(4)
        y[c, n] = x[c, n] - sum(x[c, n], over=c)


@kernel
def beside_a_long_one(x: Tensor[f32, N, 4], w: Tensor[f32, B], y: Tensor[f32, N, 4]):
    for n in tiles(N):
        b, c = whole(B), whole(4)
        y[n, c] = x[n, c] - sum(x[n, c], over=c) * sum(w[b], over=b)


@kernel
def below_a_long_one(x: Tensor[f32, B, N, 4], w: Tensor[f32, N], y: Tensor[f32, B, N, 4]):
    m = whole(N)
    for b, n in tiles(B, N):
        c = whole(4)
        y[b, n, c] = x[b, n, c] - sum(x[b, n, c] * w[m], over=(c, m))


@pytest.mark.parametrize("of", [no_sum, rows_of_five, planes, beside_a_long_one, below_a_long_one],
                         ids=lambda of: of.name)
def test_what_stays(of: Any) -> None:
    """As well computed as it lies; lanes would gather; lanes go along memory already; a long axis is in there."""
    assert any(op.name == "whole" for op in written_out(of).walk())


def test_threads_take_rows_whose_elements_do_not_meet() -> None:
    assert not any(op.name == "whole" for op in written_out(no_sum, most_apart=4).walk())
    assert any(op.name == "whole" for op in written_out(no_sum, most_apart=3).walk())


def test_what_is_named_twice_is_read_once() -> None:
    assert sum_of(written_out(softmax), "load") == 8
    assert sum_of(written_out(read_after_a_store), "load") == 2 * 3


def sum_of(function: Any, name: str) -> int:
    return len([op for op in function.walk() if op.name == name])


def test_longer_rows_and_named_axes_stay() -> None:
    for function in (written_out(softmax, most=4), written_out(softmax, named=("c",))):
        assert any(op.name == "whole" for op in function.walk())


def test_a_schedule_may_ask_for_rows() -> None:
    """Stores are rows in either way: neighbouring ones are put in order, not scattered."""
    def text(schedule: Schedule | None) -> str:
        return compile_kernel(softmax, static_dims={}, unit_strides=dict.fromkeys("xy", "contiguous"), dim_classes={},
                              target=target("zen4"), schedule=schedule).text()

    assert "scatter" not in text(None) and "vpermt2ps" in text(None)
    assert "vpermt2ps" not in text(Schedule(lane="c"))


def test_a_schedule_may_ask_for_tasks_along_a_short_axis() -> None:
    made = compile_kernel(over_part_of_a_row, static_dims={}, unit_strides=dict.fromkeys("xy", "contiguous"),
                          dim_classes={}, target=target("zen4"), schedule=Schedule(chunks={"r": 2}))
    assert made.tasks


def test_rows_of_64_bits_are_not_gathered() -> None:
    @kernel
    def differences(x: Tensor[f64, N, 3], y: Tensor[f64, N, 3]):
        for n in tiles(N):
            c = whole(3)
            y[n, c] = x[n, c] - sum(x[n, c], over=c)

    text = compile_kernel(differences, static_dims={}, unit_strides=dict.fromkeys("xy", "contiguous"), dim_classes={},
                          target=target("zen4"), schedule=None).text()
    assert "gather" not in text and "scatter" not in text
