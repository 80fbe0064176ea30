"""The meaning of every tile op, against NumPy, exact integers, or numbers worked out by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.ir.types import bf16, bool_, f8e4m3, f16, f32, f64, i4, i8, i16, i32, i64, index, u8
from sapper.tile import ops
from sapper.tile.semantics import (
    ELEMENTWISE,
    align,
    cast,
    check_bounds,
    constant,
    contract,
    dtype_of,
    elementwise,
    numpy_dtype,
    reduce,
    union_axes,
)
from tests.strategies import examples

BF16 = ml_dtypes.bfloat16


def one(name, *values, dtype=f32, result=None):
    arrays = [np.asarray([v], numpy_dtype(dtype)) for v in values]
    return elementwise(name, arrays, result or dtype)[0]


def test_every_elementwise_op_of_the_table_has_a_meaning():
    control = {"dim", "const", "full", "index", "whole", "load", "store", "reduce", "contract", "tiles", "each", "if",
               "yield", "view", "buffer", "part", "scan", "topk"}
    assert set(ops.TILE_OPS.rows) - control == ELEMENTWISE


@pytest.mark.parametrize("name", ["exp", "exp2", "log", "log2", "tanh", "sin", "cos", "erf", "sqrt"])
def test_float_functions_are_the_nearest_f32(name):
    x = np.linspace(0.01, 20, 997, dtype=np.float32)
    scalar = {"exp2": lambda v: 2.0**v}.get(name) or getattr(math, name)
    expected = np.array([scalar(float(v)) for v in x]).astype(np.float32)
    np.testing.assert_array_equal(elementwise(name, [x], f32), expected)


def test_hostile_floats():
    assert math.isnan(one("log", -1.0)) and one("log", 0.0) == -math.inf
    assert one("rsqrt", 0.0) == math.inf and one("rsqrt", -0.0) == -math.inf and one("rsqrt", 4.0) == 0.5
    assert one("exp", 89.0) == math.inf and one("exp", -math.inf) == 0.0
    assert one("sigmoid", -200.0) == 0.0 and one("sigmoid", math.inf) == 1.0 and one("sigmoid", 0.0) == 0.5
    assert one("tanh", math.inf) == 1.0 and one("erf", -math.inf) == -1.0 and math.isnan(one("erf", math.nan))
    assert one("div", 1.0, -0.0) == -math.inf and math.isnan(one("div", 0.0, 0.0))
    assert math.copysign(1.0, one("neg", 0.0)) == -1.0 and math.copysign(1.0, one("abs", -0.0)) == 1.0
    assert [one("round", v) for v in (0.5, 1.5, 2.5, -0.5)] == [0, 2, 2, 0]
    assert one("mul", 1e-30, 1e-15) == np.float32(1e-45)  # denormals are kept


def test_max_and_min_are_comparisons():
    nan = math.nan
    assert one("max", nan, 1.0) == 1.0 and math.isnan(one("max", 1.0, nan))
    assert one("min", nan, 1.0) == 1.0 and math.isnan(one("min", 1.0, nan))
    assert math.copysign(1, one("max", 0.0, -0.0)) == -1.0 and math.copysign(1, one("min", -0.0, 0.0)) == 1.0


@pytest.mark.parametrize("dtype", [bf16, f16])
def test_narrow_floats_compute_in_f32_and_round_once_an_op(dtype):
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(500).astype(numpy_dtype(dtype)) for _ in range(2))
    wide_a, wide_b = a.astype(np.float32), b.astype(np.float32)
    for name, value in [("add", wide_a + wide_b), ("mul", wide_a * wide_b), ("div", wide_a / wide_b)]:
        result = elementwise(name, [a, b], dtype)
        assert result.dtype == numpy_dtype(dtype)
        np.testing.assert_array_equal(result, value.astype(numpy_dtype(dtype)))
    np.testing.assert_array_equal(elementwise("lt", [a, b], bool_), wide_a < wide_b)


@pytest.mark.parametrize("dtype", [i8, u8, i16, i32, i64])
@given(data=st.data())
@settings(max_examples=examples(60))
def test_integers_wrap(dtype, data):
    info = np.iinfo(numpy_dtype(dtype))
    number = st.integers(info.min, info.max) | st.sampled_from([info.min, info.max, 0, 1])
    a, b = data.draw(number), data.draw(number)

    def wrap(v):
        return (v - info.min) % 2**dtype.bits + info.min

    exact = {"add": a + b, "sub": a - b, "mul": a * b, "and": a & b, "or": a | b, "xor": a ^ b, "max": max(a, b),
             "min": min(a, b)}
    if b != 0:
        exact |= {"floordiv": a // b, "mod": a % b}
    shift = b % dtype.bits
    for name, value in exact.items():
        assert int(one(name, a, b, dtype=dtype)) == wrap(value), name
    assert int(one("shl", a, shift, dtype=dtype)) == wrap(a << shift)
    assert int(one("shr", a, shift, dtype=dtype)) == a >> shift
    assert int(one("neg", a, dtype=dtype)) == wrap(-a) and int(one("abs", a, dtype=dtype)) == wrap(abs(a))
    assert int(one("not", a, dtype=dtype)) == wrap(~a)


def test_bool_ops():
    a, b = np.array([True, True, False]), np.array([True, False, False])
    np.testing.assert_array_equal(elementwise("and", [a, b], bool_), [True, False, False])
    np.testing.assert_array_equal(elementwise("or", [a, b], bool_), [True, True, False])
    np.testing.assert_array_equal(elementwise("xor", [a, b], bool_), [False, True, False])
    np.testing.assert_array_equal(elementwise("not", [a], bool_), [False, False, True])


def test_comparisons_with_nan():
    for name, expected in [("eq", False), ("ne", True), ("lt", False), ("le", False), ("gt", False), ("ge", False)]:
        assert bool(one(name, math.nan, 1.0, result=bool_)) is expected


def test_select_broadcasts():
    picked = elementwise("select", [np.array([[True], [False]]), np.ones((1, 3), np.float32), np.float32(0)], f32)
    np.testing.assert_array_equal(picked, [[1, 1, 1], [0, 0, 0]])


def test_casts():
    x = np.array([1.9, -1.9, 300.0, -129.0, math.nan, math.inf, -math.inf, 3e9], np.float32)
    lowest = -(2**31)
    np.testing.assert_array_equal(cast(x, i32), [1, -1, 300, -129, lowest, lowest, lowest, lowest])
    np.testing.assert_array_equal(cast(x, i8), [1, -1, 44, 127, 0, 0, 0, 0])
    np.testing.assert_array_equal(cast(x, u8), [1, 255, 44, 127, 0, 0, 0, 0])
    np.testing.assert_array_equal(cast(x, i64), [1, -1, 300, -129, -(2**63), -(2**63), -(2**63), 3_000_000_000])
    np.testing.assert_array_equal(cast(x.astype(BF16), i32)[:2], [1, -1])
    np.testing.assert_array_equal(cast(np.array([0.0, -0.0, math.nan, 0.1], np.float32), bool_), [0, 0, 1, 1])
    np.testing.assert_array_equal(cast(np.array([2, 0, -1]), bool_), [True, False, True])
    np.testing.assert_array_equal(cast(np.array([True, False]), f32), [1.0, 0.0])
    np.testing.assert_array_equal(cast(np.array([300, -129], np.int32), i8), [44, 127])
    np.testing.assert_array_equal(cast(np.array([-1], np.int8), u8), [255])
    np.testing.assert_array_equal(cast(np.array([9, -9, 7], np.int32), i4).astype(np.int32), [-7, 7, 7])
    np.testing.assert_array_equal(cast(np.array([-8, 7], ml_dtypes.int4), i32), [-8, 7])
    assert cast(np.array([448.0], np.float32), f8e4m3)[0] == 448.0
    assert cast(np.array([2**24 + 1], np.int32), f32)[0] == 2.0**24  # ties to even


def test_casts_to_narrow_floats_go_through_f32():
    value = 1.0 + 2.0**-8 + 2.0**-40  # above the tie of bf16 in f64, on it in f32
    assert float(cast(np.array([value]), bf16)[0]) == 1.0
    assert float(cast(np.array([65520.0 - 1e-4]), f16)[0]) == math.inf


def test_bitcast():
    assert elementwise("bitcast", [np.array([1.0], np.float32)], i32)[0] == 0x3F800000
    assert elementwise("bitcast", [np.array([0x3F80], np.int16)], bf16)[0] == 1.0


def test_align_and_union():
    x = np.arange(6).reshape(2, 3)
    assert union_axes(("m",), ("n", "m"), ()) == ("m", "n")
    assert align(x, ("m", "n"), ("n", "b", "m")).shape == (3, 1, 2)
    assert align(x, ("m", "n"), ("n", "b", "m"))[2, 0, 1] == 5
    with pytest.raises(ValueError, match="an axis would be lost"):
        align(x, ("m", "n"), ("m",))


def test_sums_are_more_precise_than_any_order():
    x = np.array([1e8, 1.0, -1e8, 1.0], np.float32)
    assert reduce("sum", x, ("k",), ["k"], f32) == 2.0
    narrow = np.full(1000, 0.1, BF16)
    assert reduce("sum", narrow, ("k",), ["k"], bf16) == np.float32(1000 * float(narrow[0])).astype(BF16)


def test_reductions_over_several_axes_and_of_nothing():
    x = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    np.testing.assert_array_equal(reduce("sum", x, ("a", "b", "c"), ["c", "a"], i32), x.sum(axis=(0, 2)))
    np.testing.assert_array_equal(reduce("max", x, ("a", "b", "c"), ["a", "c"], i32), x.max(axis=(0, 2)))
    np.testing.assert_array_equal(reduce("argmin", x, ("a", "b", "c"), ["b"], index, [10]), np.full((2, 4), 10))
    empty = np.zeros((2, 0), np.float32)
    np.testing.assert_array_equal(reduce("max", empty, ("a", "b"), ["b"], f32), [-math.inf] * 2)
    np.testing.assert_array_equal(reduce("sum", empty, ("a", "b"), ["b"], f32), [0.0] * 2)
    np.testing.assert_array_equal(reduce("argmax", empty, ("a", "b"), ["b"], index, [7]), [7] * 2)
    assert reduce("min", np.zeros(0, np.int8), ("a",), ["a"], i8) == 127
    assert reduce("sum", np.full(300, 127, np.int8), ("a",), ["a"], i8) == np.int64(300 * 127).astype(np.int8)


@given(st.lists(st.sampled_from([0.0, 1.0, -2.0, math.nan, math.inf, -math.inf, 3.0]), min_size=1, max_size=6))
@settings(max_examples=examples(100))
def test_nan_takes_no_part_in_extremes(values):
    x = np.array(values, np.float32)
    numbers = [v for v in values if not math.isnan(v)]
    best, smallest = max(numbers, default=-math.inf), min(numbers, default=math.inf)
    position = values.index(best) if best > -math.inf else 0
    np.testing.assert_array_equal(reduce("max", x, ("k",), ["k"], f32), np.float32(best))
    np.testing.assert_array_equal(reduce("min", x, ("k",), ["k"], f32), np.float32(smallest))
    assert reduce("argmax", x, ("k",), ["k"], index) == position


def test_argmax_takes_the_lowest_of_equals():
    assert reduce("argmax", np.array([1, 3, 3], np.int32), ("k",), ["k"], index, [5]) == 6
    with pytest.raises(ValueError, match="expected one axis"):
        reduce("argmax", np.zeros((1, 1)), ("a", "b"), ["a", "b"], index)


def test_contract_is_einsum_whatever_the_order_of_axes():
    rng = np.random.default_rng(0)
    a, b = rng.integers(-8, 8, (2, 3, 4)).astype(np.float32), rng.integers(-8, 8, (4, 5, 2)).astype(np.float32)
    result = contract(a, ("b", "m", "k"), b, ("k", "n", "b"), ["k"], ("n", "b", "m"), f32)
    np.testing.assert_array_equal(result, np.einsum("bmk,knb->nbm", a, b))
    result = contract(a, ("b", "m", "k"), b, ("k", "n", "b"), ["k", "b"], ("m", "n"), f32)
    np.testing.assert_array_equal(result, np.einsum("bmk,knb->mn", a, b))
    result = contract(a, ("b", "m", "k"), b[:, 0, 0], ("k",), ["k", "m"], ("b",), f32)
    np.testing.assert_array_equal(result, np.einsum("bmk,k->b", a, b[:, 0, 0]))
    assert contract(a[:, :, :0], ("b", "m", "k"), b[:0], ("k", "n", "b"), ["k"], ("b", "m", "n"), f32).sum() == 0


def test_contract_rounds_once():
    rng = np.random.default_rng(3)
    a, b = (rng.standard_normal(64).astype(np.float32) for _ in range(2))
    exact = sum(Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b, strict=True))
    assert contract(a, ("k",), b, ("k",), ["k"], (), f32) == np.float32(float(exact))


def test_integer_contractions_are_exact_and_wrap():
    a, b = np.full(40, -128, np.int8), np.full(40, 255, np.uint8)
    assert contract(a, ("k",), b, ("k",), ["k"], (), i32) == -128 * 255 * 40
    wide = np.full(3, 2**30, np.int32)
    assert contract(wide, ("k",), wide + 1, ("k",), ["k"], (), i32) == np.int64(3 * 2**30).astype(np.int32)
    assert contract(a.astype(BF16), ("k",), b.astype(np.float32), ("k",), ["k"], (), f32) == -128 * 255 * 40


def test_bounds_name_everything():
    with pytest.raises(IndexError, match=r'f.py:3:1: load of x out of bounds: dimension 1 has extent 4, found index 4'):
        check_bounds((3, 4), [np.array(2), np.array([3, 4])], "x", lambda: "f.py:3:1", "load")
    with pytest.raises(IndexError, match="found index -1"):
        check_bounds((3,), [np.array([-1, 2])], "x", lambda: "here", "store")
    check_bounds((3, 4), [np.array(7), np.zeros(0, np.int64)], "x", lambda: "here", "load")


def test_constants_and_dtypes():
    assert constant(300, i8) == 44 and constant(True, bool_) and constant(2, bool_)
    assert constant(0.1, bf16) == np.float32(0.1).astype(BF16) and constant(1, f64).dtype == np.float64
    assert constant(2**32 - 1, i32) == -1
    assert constant(2.0**60, f32) == 2.0**60
    assert dtype_of(np.zeros(1, BF16)) is bf16 and dtype_of(np.zeros(1, np.int64)) is i64
    assert dtype_of(np.zeros(1, np.complex64)) is None
