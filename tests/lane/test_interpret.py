"""The lane interpreter: every op, memory that guards itself, workers that meet."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.ir.text import parse_function
from sapper.ir.verifier import verify
from sapper.lane.arithmetic import fma32, fma64
from sapper.lane.interpret import Program, bind_arguments, run
from sapper.lane.memory import LaneError, Memory
from sapper.lane.ops import LANE_OPS
from tests.strategies import examples

TABLES = {"lane": LANE_OPS}
NUMPY = {"f32": np.float32, "f64": np.float64, "i32": np.int32, "i64": np.int64, "b32": np.uint32}


def program(body: str, lanes: int = 8, slots: tuple[str, ...] = (), scratch_bytes: int = 0) -> Any:
    names = ", ".join([f'"{s}"' for s in slots])
    text = f"lane func @f() {{lanes = {lanes}, slots = [{names}], scratch_bytes = {scratch_bytes}}} {{\n"
    text += "".join([f"%{s.replace('.', '_')}: s64 = arg {{slot = {n + 3}}}\n" for n, s in enumerate(slots)])
    function = parse_function(text + body + "\n}", TABLES)
    verify(function, LANE_OPS)
    return function


def rows(op: str, types: list[str], result: str, inputs: list[list[Any]], attributes: str = "") -> np.ndarray:
    """What an op of rows makes of vectors of any length that is a power of 2."""
    lanes = len(inputs[0])
    arrays = {f"x{n}": np.array(v, NUMPY[t]) for n, (t, v) in enumerate(zip(types, inputs, strict=True))}
    arrays["y"] = np.zeros(lanes, NUMPY[result])
    body = "".join([f"%v{n}: row<{t}> = load %x{n}_data {{dtype = :{t}}}\n" for n, t in enumerate(types)])
    body += f"%r: row<{result}> = {op} {', '.join([f'%v{n}' for n in range(len(types))])} {attributes}\n"
    body += f"store %r, %y_data {{dtype = :{result}}}"
    function = program(body, lanes, tuple([f"{a}.data" for a in arrays]))
    words, memory = bind_arguments(function, arrays)
    run(function, words, memory)
    return arrays["y"]


def same(found: np.ndarray, expected: list[Any]) -> None:
    expected_array = np.array(expected, found.dtype)
    np.testing.assert_array_equal(found, expected_array)
    if found.dtype.kind == "f":
        np.testing.assert_array_equal(np.signbit(found)[~np.isnan(found)],
                                      np.signbit(expected_array)[~np.isnan(expected_array)])


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16, 32, 64])
def test_any_lane_count(lanes: int) -> None:
    x = list(range(lanes))
    same(rows("add", ["f32", "f32"], "f32", [x, x]), [2 * v for v in x])


@pytest.mark.parametrize(
    ("op", "type", "inputs", "expected"),
    [
        ("add", "f32", [[1e8, 3.0], [1.0, -0.0]], [1e8, 3.0]),
        ("add", "i32", [[2**31 - 1, 5], [1, -7]], [-(2**31), -2]),
        ("add", "i64", [[2**63 - 1, 5], [1, -7]], [-(2**63), -2]),
        ("sub", "i32", [[-(2**31), 5], [1, 7]], [2**31 - 1, -2]),
        ("sub", "f64", [[1.0, 5.0], [1.0, 7.0]], [0.0, -2.0]),
        ("mul", "i32", [[65536, -3], [65536, 7]], [0, -21]),
        ("mul", "f32", [[3.0, 1e30], [0.5, 1e30]], [1.5, INF]),
        ("min", "f32", [[NAN, 1.0, -0.0, 0.0], [2.0, NAN, 0.0, -0.0]], [2.0, NAN, 0.0, -0.0]),
        ("max", "f32", [[NAN, 1.0, -0.0, 0.0], [2.0, NAN, 0.0, -0.0]], [2.0, NAN, 0.0, -0.0]),
        ("max", "i32", [[-1, 5], [1, 2]], [1, 5]),
        ("min", "i64", [[-1, 5], [1, 2]], [-1, 2]),
        ("div", "f32", [[1.0, -1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 3.0]], [INF, -INF, NAN, np.float32(1) / np.float32(3)]),
        ("div", "f64", [[1.0, 7.0], [3.0, 2.0]], [1 / 3, 3.5]),
        ("neg", "f32", [[0.0, -2.0]], [-0.0, 2.0]),
        ("neg", "i32", [[-(2**31), 4]], [-(2**31), -4]),
        ("abs", "f32", [[-0.0, -2.0]], [0.0, 2.0]),
        ("abs", "i32", [[-(2**31), -4]], [-(2**31), 4]),
        ("sqrt", "f32", [[4.0, -0.0, -1.0, 2.0]], [2.0, -0.0, NAN, np.sqrt(np.float32(2))]),
        ("floor", "f32", [[1.5, -1.5, -0.0, INF]], [1.0, -2.0, -0.0, INF]),
        ("ceil", "f32", [[1.5, -1.5, -0.5, -INF]], [2.0, -1.0, -0.0, -INF]),
        ("round", "f64", [[0.5, 1.5, -0.5, 2.5]], [0.0, 2.0, -0.0, 2.0]),
        ("trunc", "f32", [[1.9, -1.9, -0.5, 3e9]], [1.0, -1.0, -0.0, 3e9]),
        ("and", "i32", [[12, -1], [10, 7]], [8, 7]),
        ("or", "b32", [[12, 0], [10, 7]], [14, 7]),
        ("xor", "i64", [[12, -1], [10, 0]], [6, -1]),
        ("not", "i32", [[0, 5]], [-1, -6]),
        ("idiv", "i32", [[7, -7, 7, -7], [2, 2, -2, -2]], [3, -4, -4, 3]),
        ("imod", "i32", [[7, -7, 7, -7], [2, 2, -2, -2]], [1, 1, -1, -1]),
        ("idiv", "i64", [[-(2**63), 9], [-1, 3]], [-(2**63), 3]),
        ("shl", "i32", [[1, -1], [31, 4]], [-(2**31), -16]),
        ("shr", "i32", [[-1, 8], [28, 1]], [15, 4]),
        ("sar", "i32", [[-256, 8], [4, 1]], [-16, 4]),
        ("shr", "i64", [[-1, 8], [60, 1]], [15, 4]),
        ("exp", "f32", [[0.0, 1.0, -INF, INF, 89.0, NAN, -104.0, -87.5]],
         [1.0, np.float32(math.e), 0.0, INF, INF, NAN, 0.0, np.float32(math.exp(-87.5))]),
        ("exp2", "f64", [[10.0, -1.0]], [1024.0, 0.5]),
        ("log", "f32", [[1.0, 0.0, -1.0, INF]], [0.0, -INF, NAN, INF]),
        ("log2", "f32", [[8.0, 2.0**-149]], [3.0, -149.0]),
        ("tanh", "f32", [[0.0, 50.0, -50.0, -0.0]], [0.0, 1.0, -1.0, -0.0]),
        ("sigmoid", "f32", [[0.0, INF, -INF, NAN]], [0.5, 1.0, 0.0, NAN]),
        ("erf", "f32", [[0.0, INF, -INF, 1.0]], [0.0, 1.0, -1.0, np.float32(math.erf(1))]),
        ("sin", "f64", [[0.0, math.pi / 2]], [0.0, 1.0]),
        ("cos", "f32", [[0.0, math.pi]], [1.0, -1.0]),
        ("rsqrt", "f32", [[4.0, 0.0]], [0.5, INF]),
    ],
)
def test_row_arithmetic(op: str, type: str, inputs: list[list[Any]], expected: list[Any]) -> None:
    same(rows(op, [type] * len(inputs), type, inputs), expected)


def test_scale_exponent_rounds_once() -> None:
    a = [1.0, 1.0, -1.5, 1.0, INF, 0.0, 1.0, 1.0000001]
    n = [3.9, -149.0, -149.5, 200.0, -INF, INF, NAN, -127.0]
    expected = [8.0, 2.0**-149, -(2.0**-149), INF, NAN, NAN, NAN, np.float32(np.float32(1.0000001) * 2.0**-127)]
    same(rows("scale_exponent", ["f32", "f32"], "f32", [a, n]), expected)
    same(rows("scale_exponent", ["f64", "f64"], "f64", [[1.5, 1.0], [-1074.0, 1e300]]), [2 * 2.0**-1074, INF])


def test_scale_exponent_is_zero_below_a_power() -> None:
    a, n = [1.0, 1.0, -1.0, NAN, NAN, 1.0, INF, 1.0], [-3.0, -3.5, -3.5, -4.0, 0.0, NAN, -INF, -3.0]
    same(rows("scale_exponent", ["f32", "f32", "f32"], "f32", [a, n, [-3.0] * 7 + [NAN]]),
         [0.125, 0.0, 0.0, 0.0, NAN, NAN, 0.0, 0.125])


@pytest.mark.parametrize(
    ("op", "types", "result", "inputs", "attributes", "expected"),
    [
        ("shl", ["i32"], "i32", [[1, 3]], "{amount = 4}", [16, 48]),
        ("shr", ["b32"], "b32", [[0x80000000, 3]], "{amount = 1}", [0x40000000, 1]),
        ("sar", ["i32"], "i32", [[-5, 3]], "{amount = 1}", [-3, 1]),
        ("cvt", ["f32"], "i32", [[1.9, -1.9]], "", [1, -1]),
        ("cvt", ["i32"], "f32", [[2**24 + 1, 2**24 + 3]], "", [2.0**24, 2.0**24 + 4]),
        ("cvt", ["f64"], "f32", [[1 + 2.0**-24, 1 + 2.0**-23 + 2.0**-24]], "", [1.0, 1 + 2.0**-22]),
        ("cvt", ["i64"], "f32", [[2**53 + 1, -(2**40)]], "", [2.0**53, -(2.0**40)]),
        ("cvt", ["i64"], "i32", [[2**32 + 5, -1]], "", [5, -1]),
        ("cvt", ["f32"], "i32", [[3e9, NAN]], "", [-(2**31), -(2**31)]),
        ("cvt", ["f32"], "i32", [[1.5, 2.5, -1.9, 3e9]], "{nearest = true}", [2, 2, -2, -(2**31)]),
        ("bitcast", ["f32"], "i32", [[1.0, -0.0]], "", [0x3F800000, -(2**31)]),
        ("bitcast", ["i64"], "f64", [[0x3FF0000000000000, 0]], "", [1.0, 0.0]),
        ("round_to", ["f32"], "f32", [[1 + 2.0**-8, 1 + 3 * 2.0**-8]], "{dtype = :bf16}", [1.0, 1 + 2.0**-6]),
        ("round_to", ["f32"], "f32", [[70000.0, 2.0**-25]], "{dtype = :f16}", [INF, 0.0]),
        ("shuffle_xor", ["f32"], "f32", [[0, 1, 2, 3, 4, 5, 6, 7]], "{distance = 2}", [2, 3, 0, 1, 6, 7, 4, 5]),
        ("broadcast_lane", ["i32"], "i32", [[5, 6, 7, 8]], "{lane = 2}", [7] * 4),
    ],
)
def test_row_conversions(op: str, types: list[str], result: str, inputs: list[list[Any]], attributes: str,
                         expected: list[Any]) -> None:
    same(rows(op, types, result, inputs, attributes), expected)


def test_exchange_transposes() -> None:
    """log2(4) stages over four rows transpose a 4 x 4 square."""
    x = np.arange(16, dtype=np.float32).reshape(4, 4)
    y = np.zeros_like(x)
    body = "".join([f"%a{n}: row<f32> = load %x_data {{dtype = :f32, disp = {16 * n}}}\n" for n in range(4)])
    body += "%b0: row<f32>, %b1: row<f32> = exchange %a0, %a1 {distance = 1}\n"
    body += "%b2: row<f32>, %b3: row<f32> = exchange %a2, %a3 {distance = 1}\n"
    body += "%c0: row<f32>, %c2: row<f32> = exchange %b0, %b2 {distance = 2}\n"
    body += "%c1: row<f32>, %c3: row<f32> = exchange %b1, %b3 {distance = 2}\n"
    body += "".join([f"store %c{n}, %y_data {{dtype = :f32, disp = {16 * n}}}\n" for n in range(4)])
    function = program(body, 4, ("x.data", "y.data"))
    run(function, *bind_arguments(function, {"x": x, "y": y}))
    np.testing.assert_array_equal(y, x.T)


def test_packed_dot_products() -> None:
    pairs = np.array([1.5, 2.0, -3.0, 0.25], ml_dtypes.bfloat16).view(np.uint32).tolist()
    same(rows("dot2_bf16", ["f32", "b32", "b32"], "f32", [[1.0, 2.0], pairs, pairs]),
         [1 + 2.25 + 4, 2 + 9 + 0.0625])
    small = np.array([2.0**-130, 2.0**-130], ml_dtypes.bfloat16).view(np.uint32).tolist() * 2
    ones = np.array([1.0, 1.0], ml_dtypes.bfloat16).view(np.uint32).tolist() * 2
    same(rows("fma2_bf16", ["f32", "b32", "b32"], "f32", [[0.0, 1.0], small, ones]), [2.0**-129, 1.0])
    a = np.array([255, 1, 2, 3, 255, 255, 255, 255], np.uint8).view(np.uint32).tolist()
    b = np.array([-128, 1, -2, 3, 127, 127, 127, 127], np.int8).view(np.uint32).tolist()
    same(rows("dot4_u8i8", ["i32", "b32", "b32"], "i32", [[10, 2**31 - 1], a, b]),
         [10 - 255 * 128 + 1 - 4 + 9, 4 * 255 * 127 - 2**31 - 1])
    same(rows("dot4_i8i8", ["i32", "b32", "b32"], "i32", [[0, 0], a, b]), [128 + 1 - 4 + 9, -4 * 127])
    same(rows("dot4_u8u8", ["i32", "b32", "b32"], "i32", [[0, 0], a, b]), [255 * 128 + 1 + 2 * 254 + 9, 4 * 255 * 127])
    same(rows("pairs_u8i8", ["b32", "b32"], "b32", [a, b]),
         np.array([-255 * 128 + 1, 5, 2**15 - 1, 2**15 - 1], np.int16).view(np.uint32).tolist())
    words = np.array([-2**15, -2**15, 3, -4], np.int16).view(np.uint32).tolist()
    same(rows("dot2_i16", ["i32", "b32", "b32"], "i32", [[0, 1], words, words]), [-2**31, 26])
    same(rows("add_i16", ["b32", "b32"], "b32", [words, words]),
         np.array([0, 0, 6, -8], np.int16).view(np.uint32).tolist())
    bytes_of = np.array([[1, 255, 0, 7, 128, 127, 5, 0], [2, 254, 0, 6, 127, 128, 5, 1]], np.uint8)
    same(rows("max_u8", ["b32", "b32"], "b32", bytes_of.view(np.uint32).tolist()),
         bytes_of.max(axis=0).view(np.uint32).tolist())
    for dtype, kind in (("i8", np.int8), ("u8", np.uint8)):
        for odd in (False, True):
            same(rows("widen_bytes", ["b32"], "b32", [b], f"{{dtype = :{dtype}, odd = {str(odd).lower()}}}"),
                 np.array(b, np.uint32).view(kind)[odd::2].astype(np.int16).view(np.uint32).tolist())


def test_packing_and_interleaving() -> None:
    """Nearest even, denormals are zero; each slot holds an element of either row."""
    values = [[1.0, 1 + 2.0**-8, 2.0**-130, INF], [-3.0, 1 + 3 * 2.0**-8, 0.5, 2.0]]
    packed = rows("pack_bf16", ["f32", "f32"], "b32", values)
    halves = np.array(packed, np.uint32).view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(halves, [1.0, -3.0, 1.0, 1 + 2.0**-6, 0.0, 0.5, INF, 2.0])
    for count in (2, 4):
        x = np.arange(4 * count * count, dtype=f"u{4 // count}")
        y = np.zeros_like(x)
        body = "".join([f"%a{n}: row<b32> = load %x_data {{dtype = :b32, disp = {16 * n}}}\n" for n in range(count)])
        made, taken = ([f"%{name}{n}" for n in range(count)] for name in "ba")
        body += f"{', '.join([f'{name}: row<b32>' for name in made])} = interleave {', '.join(taken)}\n"
        body += "".join([f"store %b{n}, %y_data {{dtype = :b32, disp = {16 * n}}}\n" for n in range(count)])
        function = program(body, 4, ("x.data", "y.data"))
        run(function, *bind_arguments(function, {"x": x, "y": y}))
        np.testing.assert_array_equal(y, x.reshape(count, 4 * count).T.reshape(-1))


# FMA.


def _round_f32(exact: Fraction) -> float:
    """An exact number rounded to f32 by searching round the f64 quotient's neighbours."""
    near = np.float32(exact.numerator / exact.denominator)
    best = [near, np.nextafter(near, np.float32(INF)), np.nextafter(near, np.float32(-INF))]
    finite = [v for v in best if np.isfinite(v)]
    return float(min(finite, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.int32)) & 1)))


F32S = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(F32S, F32S, F32S)
@settings(max_examples=examples(300))
def test_fma32_is_rounded_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    with np.errstate(over="ignore"):
        found = float(fma32(np.float32([a]), np.float32([b]), np.float32([c]))[0])
    if abs(exact) >= Fraction(2) ** 127:
        return
    assert found == _round_f32(exact)


def test_fma32_where_double_rounding_goes_wrong() -> None:
    # a * b + c lies just above the middle of two f32 values, by less than f64 can see beside it.
    a, b, c = 1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    naive = np.float32(a * b + c)
    found = fma32(np.float32([a]), np.float32([b]), np.float32([c]))[0]
    assert found == _round_f32(exact) and found != naive


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False),
       st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=examples(200))
def test_fma64_is_rounded_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    found = float(fma64(np.float64([a]), np.float64([b]), np.float64([c]))[0])
    if math.isfinite(found):
        error = abs(Fraction(found) - exact)
        for other in (math.nextafter(found, INF), math.nextafter(found, -INF)):
            if math.isfinite(other):
                assert error <= abs(Fraction(other) - exact)
    else:
        assert abs(exact) > Fraction(1.7e308)


def test_fma_special_values() -> None:
    a = [INF, 0.0, 1.0, 1e38, NAN, -0.0, 1.0, 1e300]
    b = [0.0, INF, INF, 1e38, 1.0, 1.0, -1.0, 1e300]
    c = [1.0, 1.0, -INF, -1e38, 1.0, -0.0, 1.0, -INF]
    large = float(Fraction(1e38) ** 2 - Fraction(1e38))
    same(rows("fma", ["f64"] * 3, "f64", [a, b, c]), [NAN, NAN, NAN, large, NAN, -0.0, 0.0, -INF])
    a[-1] = b[-1] = 1.0
    same(rows("fma", ["f32"] * 3, "f32", [a, b, c]), [NAN, NAN, NAN, INF, NAN, -0.0, 0.0, -INF])


# Scalars and masks.


@pytest.mark.parametrize(
    ("op", "a", "b", "expected"),
    [
        ("s_add", 2**63 - 1, 1, -(2**63)), ("s_sub", -(2**63), 1, 2**63 - 1), ("s_mul", 2**32, 2**32, 0),
        ("s_min", -3, 2, -3), ("s_max", -3, 2, 2), ("s_and", 12, 10, 8), ("s_or", 12, 10, 14), ("s_xor", 12, 10, 6),
        ("s_shl", 3, 62, -(2**62)), ("s_shr", -1, 60, 15), ("s_sar", -256, 4, -16), ("s_floordiv", -7, 2, -4),
        ("s_mod", -7, 2, 1), ("s_mod", 7, -2, -1),
        ("s_cmp {cond = \"lt\"}", -1, 1, 1), ("s_cmp {cond = \"ge\"}", -1, 1, 0), ("s_cmp {cond = \"eq\"}", 5, 5, 1),
        ("s_cmp {cond = \"ne\"}", 5, 5, 0), ("s_cmp {cond = \"le\"}", 5, 5, 1), ("s_cmp {cond = \"gt\"}", 5, 4, 1),
    ],
)
def test_scalar_ops(op: str, a: int, b: int, expected: int) -> None:
    name, _, attributes = op.partition(" ")
    y = np.zeros(1, np.int64)
    function = program(f"%r: s64 = {name} %scalar_a, %scalar_b {attributes}\ns_store %r, %y_data {{dtype = :i64}}",
                       slots=("scalar.a", "scalar.b", "y.data"))
    run(function, *bind_arguments(function, {"y": y}, {"a": a, "b": b}))
    assert y[0] == expected


@pytest.mark.parametrize("op", ["s_floordiv", "s_mod"])
def test_scalar_division_by_zero(op: str) -> None:
    function = program(f"%r: s64 = {op} %scalar_a, %scalar_b", slots=("scalar.a", "scalar.b"))
    with pytest.raises(LaneError, match="found the divisor 0"):
        run(function, *bind_arguments(function, {}, {"a": 1, "b": 0}))


@pytest.mark.parametrize(("count", "first"), [(-1, 0), (0, 0), (3, 3), (8, 8), (100, 8)])
def test_masks(count: int, first: int) -> None:
    y = np.zeros((6, 8), np.int32)
    z = np.zeros(4, np.int64)
    body = """
    %m: mask = mask_first %scalar_n
    %i: row<i32> = iota
    %four: row<i32> = splat_const {value = 4}
    %low: mask = cmp %i, %four {cond = "lt"}
    %n: mask = mask_not %m
    %a: mask = mask_and %m, %low
    %o: mask = mask_or %m, %low
    %x: mask = mask_xor %m, %low
    %any: s64 = mask_any %m
    %all: s64 = mask_all %m
    %r0: row<i32> = mask_to_row %m
    %r1: row<i32> = mask_to_row %n
    %r2: row<i32> = mask_to_row %a
    %r3: row<i32> = mask_to_row %o
    %r4: row<i32> = mask_to_row %x
    %r5: row<i32> = select %m, %i, %four
    %l: s64 = lane0 %r5
    %s: s64 = s_select %any, %scalar_n, %l
    s_store %any, %z_data {dtype = :i64}
    s_store %all, %z_data {dtype = :i64, disp = 8}
    s_store %l, %z_data {dtype = :i64, disp = 16}
    s_store %s, %z_data {dtype = :i64, disp = 24}
    """ + "\n".join([f"store %r{n}, %y_data {{dtype = :i32, disp = {32 * n}}}" for n in range(6)])
    function = program(body, 8, ("scalar.n", "y.data", "z.data"))
    run(function, *bind_arguments(function, {"y": y, "z": z}, {"n": count}))
    i = np.arange(8)
    m, low = i < first, i < 4
    np.testing.assert_array_equal(y, np.array([m, ~m, m & low, m | low, m ^ low, np.where(m, i, 4)], np.int32))
    lane0 = 0 if first else 4
    assert z.tolist() == [int(first > 0), int(first == 8), lane0, count if first else lane0]


@pytest.mark.parametrize("cond", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_cmp_with_nan(cond: str) -> None:
    x = np.array([1, 2, 3, NAN, 0.0, NAN, -1, INF], np.float32)
    y = np.array([2, 2, 2, 1, -0.0, NAN, 1, INF], np.float32)
    r = np.zeros(8, np.int32)
    function = program(
        "%a: row<f32> = load %x_data {dtype = :f32}\n%b: row<f32> = load %y_data {dtype = :f32}\n"
        f'%m: mask = cmp %a, %b {{cond = "{cond}"}}\n%i: row<i32> = mask_to_row %m\nstore %i, %r_data {{dtype = :i32}}',
        8, ("x.data", "y.data", "r.data"))
    run(function, *bind_arguments(function, {"x": x, "y": y, "r": r}))
    compare = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
               "ge": np.greater_equal}
    np.testing.assert_array_equal(r, compare[cond](x, y))


def test_splats_and_constants() -> None:
    y = np.zeros((4, 4), np.int32)
    body = """
    %a: row<i32> = splat %scalar_n
    %b: row<i32> = splat_const {value = 4294967295}
    %c: row<f32> = splat_const {value = 1.5}
    %d: row<i64> = splat %scalar_n
    store %a, %y_data {dtype = :i32}
    store %b, %y_data {dtype = :i32, disp = 16}
    store %c, %y_data {dtype = :f32, disp = 32}
    store_lane0 %d, %y_data {dtype = :i64, disp = 48}
    """
    function = program(body, 4, ("scalar.n", "y.data"))
    run(function, *bind_arguments(function, {"y": y}, {"n": 2**32 + 7}))
    assert y[0].tolist() == [7] * 4 and y[1].tolist() == [-1] * 4
    assert y[2].view(np.float32).tolist() == [1.5] * 4 and y[3].tolist() == [7, 1, 0, 0]


# Memory.


@pytest.mark.parametrize(("dtype", "row", "values"), [
    ("bf16", "f32", np.array([1.5, -2, 3e38, INF], ml_dtypes.bfloat16)),
    ("f16", "f32", np.array([1.5, -2, 65504, 6e-8], np.float16)),
    ("f32", "f32", np.array([1.5, -2, 1e-45, INF], np.float32)),
    ("f64", "f64", np.array([1.5, -2, 1e-300, INF], np.float64)),
    ("i8", "i32", np.array([1, -2, 127, -128], np.int8)),
    ("u8", "i32", np.array([1, 2, 127, 255], np.uint8)),
    ("i16", "i32", np.array([1, -2, 32767, -32768], np.int16)),
    ("i32", "i32", np.array([1, -2, 2**31 - 1, -(2**31)], np.int32)),
    ("bool", "i32", np.array([True, False, True, True])),
    ("i64", "i64", np.array([1, -2, 2**63 - 1, -(2**63)], np.int64)),
    ("b32", "b32", np.array([1, 2, 2**32 - 1, 0], np.uint32)),
])
def test_memory_dtypes(dtype: str, row: str, values: np.ndarray) -> None:
    """load, load_splat, gather, store, store_lane0 and scatter of every dtype, an element past the start."""
    size = values.itemsize
    x = np.concatenate([values[:1], values])
    y, z, w, s = (np.zeros_like(values) for _ in range(4))
    body = f"""
    %one: s64 = s_const {{value = 1}}
    %i: row<i32> = iota
    %three: row<i32> = splat_const {{value = 3}}
    %back: row<i32> = sub %three, %i
    %a: row<{row}> = load %x_data, %one {{dtype = :{dtype}, scale = {size}, indexed = true}}
    %b: row<{row}> = load_splat %x_data {{dtype = :{dtype}, disp = {2 * size}}}
    %c: row<{row}> = gather %x_data, %back {{dtype = :{dtype}, scale = {size}, disp = {size}}}
    store %a, %y_data {{dtype = :{dtype}}}
    store_lane0 %b, %z_data {{dtype = :{dtype}, disp = {3 * size}}}
    scatter %a, %w_data, %back {{dtype = :{dtype}, scale = {size}}}
    store %c, %s_data {{dtype = :{dtype}}}
    """
    function = program(body, 4, ("x.data", "y.data", "z.data", "w.data", "s.data"))
    run(function, *bind_arguments(function, {"x": x, "y": y, "z": z, "w": w, "s": s}))
    assert y.tobytes() == values.tobytes()
    assert z.tolist()[:3] == [0, 0, 0] and z[3:].tobytes() == values[1:2].tobytes()
    assert w.tobytes() == values[::-1].tobytes() and s.tobytes() == values[::-1].tobytes()


def test_runs_are_neighbours() -> None:
    x, y = np.arange(16, dtype=np.float16), np.zeros(16, np.int8)
    function = program("""
    %a: row<f32>, %b: row<f32>, %c: row<f32>, %d: row<f32> = load_run %x_data {dtype = :f16}
    %i: row<i32> = cvt %a
    %j: row<i32> = cvt %b
    %k: row<i32> = cvt %c
    %l: row<i32> = cvt %d
    store_run %y_data, %l, %k, %j, %i {dtype = :i8}
    """, 4, ("x.data", "y.data"))
    run(function, *bind_arguments(function, {"x": x, "y": y}))
    assert y.tolist() == [3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12]


def test_narrowing_stores() -> None:
    x = np.array([1 + 2.0**-8, 70000, -0.0, NAN], np.float32)
    n = np.array([300, -1, 65536 + 5, 2**31 - 1], np.int32)
    h, b, i = np.zeros(4, np.float16), np.zeros(4, ml_dtypes.bfloat16), np.zeros(4, np.int8)
    body = """
    %a: row<f32> = load %x_data {dtype = :f32}
    %c: row<i32> = load %n_data {dtype = :i32}
    store %a, %h_data {dtype = :f16}
    store %a, %b_data {dtype = :bf16}
    store %c, %i_data {dtype = :i8}
    """
    function = program(body, 4, ("x.data", "n.data", "h.data", "b.data", "i.data"))
    run(function, *bind_arguments(function, {"x": x, "n": n, "h": h, "b": b, "i": i}))
    np.testing.assert_array_equal(h, np.array([1 + 2.0**-8, INF, -0.0, NAN], np.float16))
    np.testing.assert_array_equal(b.astype(np.float32), np.array([1, 70144, -0.0, NAN], np.float32))
    assert i.tolist() == [44, -1, 5, -1]


@pytest.mark.parametrize("dtype", ["i8", "u8", "i16", "i32", "i64", "bool"])
def test_scalar_memory(dtype: str) -> None:
    kind = {"i8": np.int8, "u8": np.uint8, "i16": np.int16, "i32": np.int32, "i64": np.int64, "bool": np.bool_}[dtype]
    x = np.array([0, -1]).astype(kind)
    y, w = np.zeros(2, np.int64), np.zeros(1, kind)
    body = f"""
    %one: s64 = s_const {{value = 1}}
    %a: s64 = s_load %x_data, %one {{dtype = :{dtype}, scale = {x.itemsize}, indexed = true}}
    s_store %a, %y_data {{dtype = :i64, disp = 8}}
    s_store %a, %w_data {{dtype = :{dtype}}}
    """
    function = program(body, 4, ("x.data", "y.data", "w.data"))
    run(function, *bind_arguments(function, {"x": x, "y": y, "w": w}))
    assert y.tolist() == [0, int(x[1])] and w[0] == x[1]


def test_masked_memory_touches_nothing_in_lanes_that_are_off() -> None:
    x = np.arange(5, dtype=np.float32) + 1
    y = np.full(5, -1, np.float32)
    g = np.full(8, -1, np.float32)
    body = """
    %n: s64 = s_const {value = 5}
    %m: mask = mask_first %n
    %i: row<i32> = iota
    %a: row<f32> = load %x_data, %m {dtype = :f32, masked = true}
    %b: row<f32> = gather %x_data, %i, %m {dtype = :f32, scale = 4, masked = true}
    %c: row<f32> = add %a, %b
    store %c, %y_data, %m {dtype = :f32, masked = true}
    scatter %c, %y_data, %i, %m {dtype = :f32, scale = 4, masked = true}
    store %c, %g_data {dtype = :f32}
    """
    function = program(body, 8, ("x.data", "y.data", "g.data"))
    run(function, *bind_arguments(function, {"x": x, "y": y, "g": g}))
    np.testing.assert_array_equal(y, 2 * x)
    np.testing.assert_array_equal(g, [2, 4, 6, 8, 10, 0, 0, 0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%r: row<f32> = load %x_data {dtype = :f32, disp = 4}", r"lane 7.*0 bytes past the end of x \(32 bytes\)"),
        ("%r: row<f32> = load %x_data {dtype = :f32, disp = -4}", "lane 0.*4 bytes before x"),
        ("%r: row<f32> = load_splat %x_data {dtype = :f32, disp = 30}", "a read of 4 bytes"),
        ("%r: row<f32> = gather %x_data, %i {dtype = :f32, scale = 8}", "lane 4"),
        ("%r: s64 = s_load %x_data {dtype = :i64, disp = 32}", "a read of 8 bytes"),
        ("s_store %x_data, %x_data {dtype = :i64, disp = 25}", "a write of 8 bytes"),
        ("store %f, %x_data {dtype = :f32, disp = 4}", "lane 7"),
        ("store %f, %ro_data {dtype = :f32}", "ro, which is read-only"),
        ("store_lane0 %f, %x_data {dtype = :f32, disp = 32}", "lane 0"),
        ("scatter %f, %x_data, %i {dtype = :f32, scale = 8}", "lane 4"),
        ("%r: row<f32> = load %zero {dtype = :f32}", "at 0x0"),
        ("store %f, %x_data {dtype = :f32, disp = 4, streaming = true}", "aligned to 32 bytes"),
        ("store_run %x_data, %f, %f {dtype = :f32}", "lane 4"),
        ("store_run %x_data, %f, %f {dtype = :bf16, disp = 2}", "aligned to 4 bytes"),
    ],
)
def test_accesses_outside_are_refused(line: str, message: str) -> None:
    memory = Memory()
    x = memory.allocate("x", 32)
    read_only = np.zeros(8, np.float32)
    read_only.flags.writeable = False
    function = program("%zero: s64 = s_const {value = 0}\n%i: row<i32> = iota\n%f: row<f32> = cvt %i\n" + line, 8,
                       ("x.data", "ro.data"))
    words = np.array([0, 0, 0, x, memory.add_array("ro", read_only)], np.int64)
    with pytest.raises(LaneError, match=message) as caught:
        run(function, words, memory)
    assert line.split(" = ")[-1].split(" ")[0].split("{")[0] in str(caught.value)
    assert "expected" in str(caught.value)


def test_prefetch_may_point_anywhere() -> None:
    function = program("%z: s64 = s_const {value = 8}\nprefetch %z {level = 2}\nfence_streaming", 8)
    run(function, *bind_arguments(function, {}))


def test_memory_joins_what_overlaps_and_knows_strided_arrays() -> None:
    base = np.zeros(16, np.float32)
    memory = Memory()
    address = memory.add_array("x", base[::-2])
    assert address == base.ctypes.data + 60
    found = memory.find(base.ctypes.data + 4, 60, True)
    assert not isinstance(found, str) and len(found) == 60
    assert isinstance(memory.find(base.ctypes.data, 4, False), str)
    memory.add_array("y", base[:4])
    found = memory.find(base.ctypes.data, 64, True)
    assert not isinstance(found, str) and len(found) == 64
    past = memory.find(base.ctypes.data, 65, False)
    assert isinstance(past, str) and "x+y (64 bytes)" in past
    memory.add_array("empty", base[:0])


def test_too_few_words_and_unknown_slots() -> None:
    function = program("", 8, ("x.data",))
    with pytest.raises(LaneError, match="found an argument block of 3 words"):
        run(function, np.zeros(3, np.int64), Memory())
    with pytest.raises(LaneError, match=r"found slot 'x\.data'"):
        bind_arguments(function, {})


def test_bound_words() -> None:
    function = program("", 8, ("a.data", "a.stride.0", "a.stride.1", "dim.M", "scalar.f", "scalar.d", "scalar.n"),
                       scratch_bytes=70)
    a = np.zeros((4, 6), np.float32)[:, ::2]
    words, memory = bind_arguments(function, {"a": a}, {"f": np.float32(-1), "d": 1.0, "n": np.int32(-2)}, {"M": 4}, 3)
    assert words[0] % 64 == 0 and words[1] == 128 and words[2] % 64 == 0
    assert not isinstance(memory.find(int(words[0]), 3 * 128, True), str)
    assert words[3:].tolist() == [a.ctypes.data, 6, 2, 4, 0xBF800000, 0x3FF0000000000000, -2]


# Control.


def test_loop_carries_and_if_yields() -> None:
    y = np.zeros(2, np.int64)
    body = """
    %zero: s64 = s_const {value = 0}
    %one: s64 = s_const {value = 1}
    %a: s64, %b: s64 = loop %zero, %scalar_n, %zero, %one {step = 3, label = "k"} (%i: s64, %p: s64, %q: s64) {
      %c: s64 = s_cmp %i, %scalar_n {cond = "lt"}
      %odd: s64 = s_and %i, %one
      %r: s64 = if %odd {
        %t: s64 = s_add %p, %i
        yield %t
      } {
        yield %p
      }
      yield %q, %r
    }
    s_store %a, %y_data {dtype = :i64}
    s_store %b, %y_data {dtype = :i64, disp = 8}
    """
    function = program(body, 4, ("scalar.n", "y.data"))
    compiled = Program(function)
    for n in (0, 1, 4, 10, 11):
        compiled.run(*bind_arguments(function, {"y": y}, {"n": n}))
        p, q = 0, 1
        for i in range(0, n, 3):
            p, q = q, (p + i if i & 1 else p)
        assert y.tolist() == [p, q]


def test_tasks_are_shared_out_and_barriers_hold() -> None:
    """Every task runs once; after the barrier each worker sees what all of them wrote."""
    body = """
    %w: s64 = worker
    %n: s64 = workers
    %zero: s64 = s_const {value = 0}
    %one: s64 = s_const {value = 1}
    tasks %scalar_n {counter = 2} (%i: s64) {
      %old: s64 = s_load %x_data, %i {dtype = :i64, scale = 8, indexed = true}
      %w1: s64 = s_add %w, %one
      %new: s64 = s_add %old, %w1
      s_store %new, %x_data, %i {dtype = :i64, scale = 8, indexed = true}
    }
    barrier
    %sum: s64 = loop %zero, %scalar_n, %zero {step = 1} (%j: s64, %s: s64) {
      %v: s64 = s_load %x_data, %j {dtype = :i64, scale = 8, indexed = true}
      %t: s64 = s_add %s, %v
      yield %t
    }
    s_store %sum, %y_data, %w {dtype = :i64, scale = 8, indexed = true}
    """
    for workers in (1, 2, 3, 7):
        function = program(body, 4, ("scalar.n", "x.data", "y.data"))
        x, y = np.zeros(10, np.int64), np.zeros(workers, np.int64)
        words, memory = bind_arguments(function, {"x": x, "y": y}, {"n": 10}, workers=workers)
        run(function, words, memory, workers)
        assert all(1 <= v <= workers for v in x.tolist())
        assert x.tolist()[:workers] == list(range(1, workers + 1))      # its own index is a worker's first task
        assert set(x.tolist()) == set(range(1, workers + 1))
        assert y.tolist() == [x.sum()] * workers


def test_a_barrier_sets_a_counter_back() -> None:
    body = """
    %one: s64 = s_const {value = 1}
    tasks %scalar_n {counter = 7} (%i: s64) {
      s_store %one, %x_data, %i {dtype = :i64, scale = 8, indexed = true}
    }
    barrier {reset = 7}
    tasks %scalar_n {counter = 7} (%j: s64) {
      s_store %one, %y_data, %j {dtype = :i64, scale = 8, indexed = true}
    }
    """
    for text, again in ((body, 10), (body.replace(" {reset = 7}", ""), 0)):      # else each has its first task only
        for workers in (1, 3):
            function = program(text, 4, ("scalar.n", "x.data", "y.data"))
            x, y = np.zeros(10, np.int64), np.zeros(10, np.int64)
            run(function, *bind_arguments(function, {"x": x, "y": y}, {"n": 10}, workers=workers), workers)
            done = again or workers
            assert x.tolist() == [1] * 10 and y.tolist() == [1] * done + [0] * (10 - done)


def test_a_barrier_that_not_all_reach_is_an_error() -> None:
    function = program("%w: s64 = worker\nif %w {\nbarrier\n} {\n}", 4)
    with pytest.raises(LaneError, match="expected all to arrive"):
        run(function, *bind_arguments(function, {}, workers=3), workers=3)


def test_a_failing_worker_fails_the_run() -> None:
    function = program("%w: s64 = worker\n%one: s64 = s_const {value = 1}\n%d: s64 = s_sub %w, %one\n"
                       "%q: s64 = s_floordiv %one, %d\nbarrier", 4)
    with pytest.raises(LaneError, match="divisor 0"):
        run(function, *bind_arguments(function, {}, workers=4), workers=4)
    function = program("", 4)
    run(function, *bind_arguments(function, {}, workers=4), workers=4)


def test_only_lane_functions_run() -> None:
    function = program("", 4)
    function.stage = "tile"
    with pytest.raises(LaneError, match="found a tile function"):
        Program(function)
