"""Meanings of PTX rows against exact arithmetic in Python's integers and fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sapper.targets.ptx import fragments
from sapper.targets.ptx.instructions import TABLE, form
from sapper.targets.ptx.meaning import dtype_of
from tests.strategies.amount import examples

FORMATS = {"f16": (11, -24, 15), "bf16": (8, -133, 127), "f32": (24, -149, 127), "f64": (53, -1074, 1023)}
"""Bits of the significand, exponent of the least subnormal, largest exponent."""
NUMPY: dict[str, Any] = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64}
BITS = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}


def rounded(exact: Fraction, type: str, mode: str) -> float:
    """The number of a format that a direction gives, by integers alone."""
    bits, least, highest = FORMATS[type]
    if exact == 0:
        return 0.0
    size = abs(exact)
    exponent = math.floor(math.log2(float(size))) if Fraction(1, 1 << 1000) < size < 1 << 1000 else 0
    while Fraction(2) ** exponent > size:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= size:
        exponent += 1
    quantum = Fraction(2) ** max(exponent - bits + 1, least)
    scaled = exact / quantum
    low = math.floor(scaled)
    rest = scaled - low
    if mode == "rn":
        up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low % 2 == 1)
    else:
        up = rest > 0 and (mode == "rp" or (mode == "rz" and exact < 0))
    result = (low + up) * quantum
    largest = (Fraction(2) - Fraction(2) ** (1 - bits)) * Fraction(2) ** highest
    if abs(result) > largest:
        stays = mode == "rz" or (mode == "rm" and exact > 0) or (mode == "rp" and exact < 0)
        return math.copysign(float(largest) if stays else math.inf, exact)
    return float(result)


def numbers(type: str) -> st.SearchStrategy[float]:
    """Finite values of a format, subnormals and neighbours of powers of two included."""

    def value(bits: int) -> float:
        return float(np.array([bits], f"u{BITS[type] // 8}").view(NUMPY[type])[0])

    return st.integers(0, (1 << BITS[type]) - 1).map(value).filter(math.isfinite)


def near(type: str) -> st.SearchStrategy[float]:
    """Values close to each other, so that sums cancel and halves are met."""
    return st.one_of(numbers(type), st.integers(-(1 << 12), 1 << 12).map(
        lambda n: float(np.array([n / 64], np.float64).astype(NUMPY[type])[0])))


def call(text: str, *values: float) -> float:
    one = form(text)
    sources = one.sources[:len(values)]
    assert all(operand.optional for operand in one.sources[len(values):])
    arrays = [np.array([value, value], dtype_of(operand.type))
              for value, operand in zip(values, sources, strict=True)]
    assert one.row.meaning is not None
    result = one.row.meaning(one, *arrays)
    assert result.dtype == dtype_of(one.results[0].type)
    return float(result[0])


def agrees(found: float, expected: float) -> bool:
    return found == expected or (math.isnan(found) and math.isnan(expected))


@settings(deadline=None, max_examples=examples(150))
@given(data=st.data(), type=st.sampled_from(["f16", "bf16", "f32", "f64"]),
       mode=st.sampled_from(["rn", "rz", "rm", "rp"]),
       op=st.sampled_from(["add", "sub", "mul", "fma"]))
def test_sums_and_products_round_once(data: st.DataObject, type: str, mode: str, op: str) -> None:
    if type in ("f16", "bf16"):
        mode = "rn"
    a, b, c = (data.draw(near(type)) for _ in range(3))
    values = (a, b, c) if op == "fma" else (a, b)
    x, y, z = Fraction(a), Fraction(b), Fraction(c)
    exact = {"add": x + y, "sub": x - y, "mul": x * y, "fma": x * y + z}[op]
    expected = rounded(exact, type, mode)
    if (type == "f64" and abs(expected) in (0.0, math.inf)) or (type == "f64" and abs(expected) < 1e-290):
        return  # the error terms of f64 products underflow there
    found = call(f"{op}.{mode}.{type}", *values)
    assert agrees(found, expected), (values, found, expected)


@settings(deadline=None, max_examples=examples(150))
@given(a=near("f32"), b=near("f32"), mode=st.sampled_from(["rn", "rz", "rm", "rp"]))
def test_quotients_and_roots_round_once(a: float, b: float, mode: str) -> None:
    if b != 0:
        assert agrees(call(f"div.{mode}.f32", a, b), rounded(Fraction(a) / Fraction(b), "f32", mode))
    size = Fraction(abs(a))
    root = call(f"sqrt.{mode}.f32", abs(a))
    below, above = (Fraction(float(np.nextafter(np.float32(root), np.float32(side)))) for side in (0, np.inf)) if (
        0 < root < 3e38) else (Fraction(root), Fraction(root))
    exact = Fraction(root) ** 2
    if mode == "rn" and root > 0:
        assert ((below + Fraction(root)) / 2) ** 2 <= size <= ((above + Fraction(root)) / 2) ** 2
    elif mode in ("rz", "rm"):
        assert exact <= size and (root == 0 or above**2 > size)
    elif mode == "rp":
        assert exact >= size and (root == 0 or below**2 < size)


@settings(deadline=None, max_examples=examples(150))
@given(a=numbers("f32"), to=st.sampled_from(["f16", "bf16"]), mode=st.sampled_from(["rn", "rz"]))
def test_narrowing_rounds_once(a: float, to: str, mode: str) -> None:
    assert agrees(call(f"cvt.{mode}.{to}.f32", a), rounded(Fraction(a), to, mode))


@pytest.mark.parametrize("mode, expected", [("rn", math.inf), ("rp", math.inf), ("rz", np.finfo(np.float64).max),
                                            ("rm", np.finfo(np.float64).max)])
def test_a_fused_product_of_f64_overflows(mode: str, expected: float) -> None:
    big, one = np.array([1e200, -1e200]), np.array([1.0, 1.0])
    found = form(f"fma.{mode}.f64")
    first, second = found.row.meaning(found, big, np.abs(big), one)  # type: ignore[misc]
    other = {"rn": math.inf, "rp": np.finfo(np.float64).max, "rz": np.finfo(np.float64).max, "rm": math.inf}[mode]
    assert (first, second) == (expected, -other)


def test_fp8_agrees_with_its_specification() -> None:
    values = np.concatenate([np.linspace(-500, 500, 4001), np.linspace(-0.02, 0.02, 999)]).astype(np.float32)
    for name, kind, largest in (("e4m3x2", ml_dtypes.float8_e4m3fn, 448.0), ("e5m2x2", ml_dtypes.float8_e5m2, 57344.0)):
        one = form(f"cvt.rn.satfinite.{name}.f32")
        assert one.row.meaning is not None
        packed = one.row.meaning(one, values, -values)
        expected = np.clip(values, -largest, largest).astype(kind).view(np.uint8)
        assert (packed[:, 1] == expected).all()
        back = form(f"cvt.rn.f16x2.{name}")
        assert back.row.meaning is not None
        halves = back.row.meaning(back, packed)
        assert (halves[:, 1].astype(np.float32) == expected.view(kind).astype(np.float32)).all()


WORD = st.integers(0, (1 << 32) - 1)


def signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def integer(text: str, *values: int) -> int:
    one = form(text)
    arrays = [np.array([value & ((1 << operand.bits) - 1)] * 2, f"u{operand.bits // 8}").view(dtype_of(operand.type))
              for value, operand in zip(values, [o for o in one.operands if o.reads or o.role == "i"], strict=True)]
    assert one.row.meaning is not None
    return int(one.row.meaning(one, *arrays)[0]) & ((1 << one.results[0].bits) - 1)


@settings(deadline=None, max_examples=examples(200))
@given(a=WORD, b=WORD, c=WORD, bits=st.sampled_from([16, 32, 64]), sign=st.sampled_from("us"))
def test_integers_wrap(a: int, b: int, c: int, bits: int, sign: str) -> None:
    a, b, c = (value * (0x1_0000_0001 if bits == 64 else 1) & ((1 << bits) - 1) for value in (a, b, c))
    x, y, z = (signed(v, bits) if sign == "s" else v for v in (a, b, c))
    mask, type = (1 << bits) - 1, f"{sign}{bits}"
    assert integer(f"add.{type}", a, b) == (x + y) & mask
    assert integer(f"sub.{type}", a, b) == (x - y) & mask
    assert integer(f"mul.lo.{type}", a, b) == (x * y) & mask
    assert integer(f"mul.hi.{type}", a, b) == (x * y >> bits) & mask
    assert integer(f"mad.lo.{type}", a, b, c) == (x * y + z) & mask
    assert integer(f"min.{type}", a, b) == min(x, y) & mask
    if y:
        quotient = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
        assert integer(f"div.{type}", a, b) == quotient & mask
        assert integer(f"rem.{type}", a, b) == (x - quotient * y) & mask
    shift = c & 127
    assert integer(f"shl.b{bits}", a, shift) == (a << shift) & mask
    assert integer(f"shr.{type}", a, shift) == (x >> min(shift, bits - (sign == "s"))) & mask
    if bits < 64:
        assert integer(f"mul.wide.{type}", a, b) == (x * y) & ((1 << 2 * bits) - 1)


@settings(deadline=None, max_examples=examples(200))
@given(a=WORD, b=WORD, c=WORD, position=st.integers(0, 70), length=st.integers(0, 70), table=st.integers(0, 255))
@example(a=1 << 31, b=0, c=0, position=1, length=32, table=0)
def test_operations_on_bits(a: int, b: int, c: int, position: int, length: int, table: int) -> None:
    bit = [sum(((table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1))) & 1) << i for i in range(32))]
    assert integer("lop3.b32", a, b, c, table) == bit[0]
    field = (a >> position) & ((1 << length) - 1)
    assert integer("bfe.u32", a, position, length) == field
    # PTX ISA, bfe: bits beyond the word are the sign bit, which is the last bit of the field or of the word.
    last = min(position + length - 1, 31)
    sign = a >> last & 1 if length else 0
    wide = sum((a >> position + i & 1 if i < length and position + i <= 31 else sign) << i for i in range(32))
    assert integer("bfe.s32", a, position, length) == (wide if length else 0)
    inserted = b
    for i in range(length):
        if position + i < 32:
            inserted = inserted & ~(1 << position + i) | ((a >> i & 1) << position + i if i < 32 else 0)
    assert integer("bfi.b32", a, b, position, length) == inserted
    assert integer("popc.b32", a) == a.bit_count() and integer("clz.b32", a) == 32 - a.bit_length()
    assert integer("brev.b32", a) == int(f"{a:032b}"[::-1], 2)
    both, count = b << 32 | a, c & 31
    assert integer("shf.l.wrap.b32", a, b, c) == both << count >> 32 & 0xFFFFFFFF
    assert integer("shf.r.clamp.b32", a, b, position) == both >> min(position, 32) & 0xFFFFFFFF
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    nibbles = [c >> 4 * i & 15 for i in range(4)]
    chosen = [source[n & 7] if n < 8 else 255 * (source[n & 7] >> 7) for n in nibbles]
    assert integer("prmt.b32", a, b, c) == int.from_bytes(bytes(chosen), "little")


@pytest.mark.parametrize(("text", "values", "expected"), [
    ("add.ftz.f32", (2.0**-140, 0.0), 0.0), ("add.f32", (2.0**-140, 0.0), 2.0**-140),
    ("add.sat.f32", (0.75, 0.5), 1.0), ("add.sat.f32", (-3.0, 0.5), 0.0), ("mul.sat.f32", (math.inf, 0.0), 0.0),
    ("min.f32", (math.nan, 1.0), 1.0), ("min.NaN.f32", (math.nan, 1.0), math.nan), ("max.f32", (-0.0, 0.0), 0.0),
    ("fma.rn.relu.bf16", (1.0, -2.0, 1.0), 0.0), ("ex2.approx.f32", (-3.0,), 0.125), ("lg2.approx.f32", (8.0,), 3.0),
    ("rsqrt.approx.f32", (0.0,), math.inf), ("tanh.approx.f32", (math.inf,), 1.0), ("neg.f32", (0.0,), -0.0),
])
def test_special_values(text: str, values: tuple[float, ...], expected: float) -> None:
    found = call(text, *values)
    assert (agrees(found, expected) and math.copysign(1, found) == math.copysign(1, expected)) or math.isnan(expected)


@pytest.mark.parametrize(("type", "bits"), [("f32", 0x7FFFFFFF), ("f16", 0x7FFF), ("bf16", 0x7FFF)])
def test_nan_results_are_canonical(type: str, bits: int) -> None:
    one = form(f"mul.{type}")
    assert one.row.meaning is not None
    result = one.row.meaning(one, np.array([math.inf], NUMPY[type]), np.array([0.0], NUMPY[type]))
    assert int(result.view(f"u{BITS[type] // 8}")[0]) == bits


@pytest.mark.parametrize(("text", "value", "expected"), [
    ("cvt.rzi.s32.f32", 3.9e9, 2**31 - 1), ("cvt.rzi.u32.f32", -5.0, 0), ("cvt.rni.s32.f32", 2.5, 2),
    ("cvt.rpi.s32.f32", -2.5, -2), ("cvt.rmi.s8.f32", -200.0, -128), ("cvt.rzi.s32.f32", math.nan, 0),
    ("cvt.rzi.u64.f32", 2.0**63, 2**63), ("cvt.rzi.s64.f64", 1e30, 2**63 - 1), ("cvt.sat.u8.s32", -3, 0),
    ("cvt.sat.s8.s32", 1000, 127), ("cvt.u16.s32", -1, 65535), ("cvt.rn.f32.u64", 2**64 - 1, 2.0**64),
    ("cvt.rz.f32.u64", 2**64 - 1, float.fromhex("0x1.fffffep63")), ("cvt.rn.f32.s32", 2**24 + 1, 2.0**24),
])
def test_conversions(text: str, value: float, expected: float) -> None:
    one = form(text)
    assert one.row.meaning is not None
    result = one.row.meaning(one, np.array([value], dtype_of(one.sources[0].type)))
    assert result[0] == expected and result.dtype == dtype_of(one.results[0].type)


@pytest.mark.parametrize(("rows_columns", "shape"), [
    (fragments.fragment_a(4, 2), (16, 16)), (fragments.fragment_a(2, 2), (16, 8)),
    (fragments.fragment_a(4, 1), (16, 8)),
    (fragments.fragment_a(4, 4), (16, 32)), (fragments.fragment_b(2, 2), (16, 8)),
    (fragments.fragment_b(2, 4), (32, 8)),
    (fragments.fragment_c(4, 1), (16, 8)), (fragments.fragment_c(2, 2), (16, 8)),
    (fragments.fragment_wgmma(64, 1), (64, 128)), (fragments.fragment_wgmma(16, 2), (64, 64)),
])
def test_a_fragment_holds_every_element_once(rows_columns: tuple[Any, Any], shape: tuple[int, int]) -> None:
    rows, columns = rows_columns
    places = {(int(r), int(c)) for r, c in zip(rows.ravel(), columns.ravel(), strict=True)}
    assert len(places) == rows.size == shape[0] * shape[1]
    assert max(r for r, _ in places) == shape[0] - 1 and max(c for _, c in places) == shape[1] - 1


def test_every_row_without_a_unit_has_a_meaning() -> None:
    from sapper.emulate.units import UNITS

    for row in TABLE.rows.values():
        assert row.meaning is not None or row.unit in UNITS or row.unit in ("control", "call"), row.name
