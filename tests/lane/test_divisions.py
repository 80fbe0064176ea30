"""Quotients by what a loop does not change are those of a division."""

from __future__ import annotations

import numpy as np
import pytest

from sapper.ir.nodes import Block, Builder, Function
from sapper.ir.types import ROW_F32, S64, f32
from sapper.ir.verifier import verify
from sapper.lane.divisions import divide_by_reciprocals
from sapper.lane.interpret import bind_arguments, run
from sapper.lane.ops import LANE_OPS

SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, 3.0, 1e-45, 3e-39, 1.2e-38, 1e-30, 3e38, -7.5], np.float32)


def function_of(lanes: int, rows: int, inside: bool, **attributes: bool) -> Function:
    """y[i] = x[i] / d for rows of lanes. inside: the divisor is loaded in the loop."""
    function = Function("f", "lane")
    function.attributes = {"lanes": lanes, "slots": ["x.data", "d.data", "y.data"]}
    build = Builder(function.body)
    x, d, y = (build.value("arg", [], S64, slot=3 + n) for n in range(3))
    body = Block([S64])
    inner = Builder(body)
    divisor = (inner if inside else build).value("load", [d], ROW_F32, dtype=f32)
    start, stop = (build.value("s_const", [], S64, value=n) for n in (0, rows * lanes))
    at = body.arguments[0]
    dividend = inner.value("load", [x, at], ROW_F32, dtype=f32, scale=4, indexed=True)
    quotient = inner.value("div", [dividend, divisor], ROW_F32, **attributes)
    inner.add("store", [quotient, y, at], dtype=f32, scale=4, indexed=True)
    inner.add("yield", [])
    build.add("loop", [start, stop], [], [body], step=lanes)
    return function


def quotients(x: np.ndarray, d: np.ndarray, **attributes: bool) -> np.ndarray:
    function = function_of(len(d), len(x), False, **attributes)
    assert divide_by_reciprocals(function) == 1
    verify(function, LANE_OPS)
    inside = [op.name for op in next(op for op in function.body.ops if op.name == "loop").walk()]
    assert "div" not in inside
    y = np.zeros_like(x)
    with np.errstate(all="ignore"):
        run(function, *bind_arguments(function, {"x": x.ravel(), "d": d, "y": y.ravel()}))
    return y


def samples() -> tuple[np.ndarray, np.ndarray]:
    """Dividends, a row of them for each divisor's lane; every pair of special values, and random ones of any size."""
    random = np.random.default_rng(1)
    bits = random.integers(0, 1 << 32, (300, 128), dtype=np.uint32).view(np.float32)
    near = random.uniform(1, 2, (300, 128)).astype(np.float32)
    special = np.repeat(SPECIAL[:, None], 128, axis=1)
    d = np.concatenate([SPECIAL, random.uniform(1, 2, 50).astype(np.float32), bits[0, :65]])
    return np.concatenate([special, bits, near]), d


def test_they_are_rounded_once() -> None:
    x, d = samples()
    found = quotients(x, d)
    with np.errstate(all="ignore"):
        exact = x / d
    exactly = (np.abs(x) >= 2.0**-102) | ~(np.abs(x) > 0)
    same = (found.view(np.uint32) == exact.view(np.uint32)) | (np.isnan(found) & np.isnan(exact))
    overflow = np.abs(exact) == np.finfo(np.float32).max     # the estimate of these may already be infinite
    assert (same | ~exactly | overflow).all()
    with np.errstate(all="ignore"):
        assert (same | (np.abs(found - exact) <= np.spacing(np.abs(exact))) | overflow).all()


def test_few_bits_are_right_by_two_products() -> None:
    x, d = samples()
    found = quotients(x, d, coarse=True)
    with np.errstate(all="ignore"):
        exact = x.astype(np.float64) / d
        near = np.abs(found - exact) <= np.abs(exact) * 2.0**-22 + 1e-44
        assert (near | (found == exact.astype(np.float32)) | (np.isnan(found) & np.isnan(exact))).all()


@pytest.mark.parametrize("inside", [False, True])
def test_only_what_the_loop_does_not_change_is_made_before(inside: bool) -> None:
    function = function_of(32, 4, inside)
    assert divide_by_reciprocals(function) == (not inside)
