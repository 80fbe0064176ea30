"""Two numbers rounded to bf16 in one word (sapper/lane/rounded_words.py)."""

from __future__ import annotations

import numpy as np
import pytest

from sapper.ir.nodes import Function
from sapper.ir.verifier import verify
from sapper.lane.interpret import bind_arguments, run
from sapper.lane.ops import LANE_OPS
from sapper.lane.rounded_words import round_words
from sapper.lane.simplify import simplify

from .test_interpret import program

LANES = 64
HEAD = """%s: row<f32> = load %s_data {dtype = :f16}
%t: row<f32> = load %s_data {dtype = :f16, disp = 128}
%w: row<i32> = load %w_data {dtype = :i32}
%n: row<f32> = cvt %w
%h: row<f32> = splat_const {value = 0.5}
%l: row<f32> = lookup %w {table = [-8.0, 1.0, 2.0, 3.0, -4.0, 5.0, 6.0, 7.0, 0.5, 9.0, 1.0, 1.0, 0.0, 3.0, 4.0, 15.0]}
"""
TAIL = """%a: row<f32> = round_to %low {dtype = :bf16}
%b: row<f32> = round_to %high {dtype = :bf16}
%c: row<i32> = bitcast %a
%d: row<i32> = bitcast %b
%moved: row<i32> = sar %c {amount = 16}
%mask: row<i32> = splat_const {value = 65535}
%half: row<i32> = and %moved, %mask
%both: row<i32> = or ORDER
store %both, %y_data {dtype = :i32}
"""
WEIGHTS = "%low: row<f32> = mul %n, %s\n%high: row<f32> = mul %n, %l\n"


def words(body: str, order: str = "%d, %half") -> Function:
    function = program(HEAD + body + TAIL.replace("ORDER", order), LANES, ("s.data", "w.data", "y.data"))
    verify(function, LANE_OPS)
    return function


def results(function: Function) -> np.ndarray:
    random = np.random.default_rng(5)
    scales = random.integers(0, 1 << 16, 2 * LANES).astype(np.uint16).view(np.float16)
    scales[:3] = 2.0**-24, -0.0, np.inf
    arrays = {"s": scales, "w": random.integers(-200, 200, LANES).astype(np.int32), "y": np.zeros(LANES, np.int32)}
    with np.errstate(all="ignore"):
        run(function, *bind_arguments(function, arrays))
    return arrays["y"]


@pytest.mark.parametrize("order", ["%d, %half", "%half, %d"])
@pytest.mark.parametrize(("legal", "made"), [("pack_bf16", "pack_bf16"), ("pack2", "pack2")])
@pytest.mark.parametrize("body", [
    WEIGHTS, "%low: row<f32> = fma %n, %s, %t\n%high: row<f32> = neg %t\n",
    "%p: row<f32> = mul %s, %n\n%low: row<f32> = sub %p, %t\n%high: row<f32> = mul %p, %n\n"],
    ids=["a product", "a sum", "a product of a product"])
def test_words(body: str, legal: str, made: str, order: str) -> None:
    plain, joined = words(body, order), words(body, order)
    assert round_words(joined, frozenset({legal})) == 1
    simplify(joined)
    verify(joined, LANE_OPS)
    names = [op.name for op in joined.body.ops]
    assert made in names and not {"round_to", "sar", "or"} & set(names)
    expected, found = (y.view(np.uint16).astype(np.uint32) << 16 for y in map(results, (plain, joined)))
    wide = [y.view(np.float32) for y in (expected, found)]
    np.testing.assert_array_equal(*map(np.isnan, wide))
    np.testing.assert_array_equal(found[~np.isnan(wide[0])], expected[~np.isnan(wide[0])])


@pytest.mark.parametrize("body", [
    "%low: row<f32> = mul %s, %t\n%high: row<f32> = neg %t\n",
    "%low: row<f32> = mul %s, %h\n%high: row<f32> = neg %t\n",
    "%f: row<f32> = bitcast %w\n%low: row<f32> = add %f, %s\n%high: row<f32> = neg %t\n"],
    ids=["a product of two numbers of f16", "of less than 1", "a sum with any number"])
def test_what_may_be_denormal(body: str) -> None:
    """An instruction takes those for 0."""
    assert round_words(words(body), frozenset({"pack_bf16"})) == 0
    assert round_words(words(body), frozenset({"pack2"})) == 1


@pytest.mark.parametrize(("old", "new"), [
    ("65535", "32767"), ("amount = 16", "amount = 15"), ("sar", "shl"),
    ("%low {dtype = :bf16}", "%low {dtype = :f16}")])
def test_other_words_stay(old: str, new: str) -> None:
    text = HEAD + WEIGHTS + TAIL.replace("ORDER", "%d, %half")
    assert old in text
    function = program(text.replace(old, new), LANES, ("s.data", "w.data", "y.data"))
    assert round_words(function, frozenset({"pack_bf16"})) == 0
