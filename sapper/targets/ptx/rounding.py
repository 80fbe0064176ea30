"""Exact arithmetic and rounding for the meaning of PTX rows, on NumPy arrays.

Enters: arrays of float64 that hold f16, bf16, f32 (or narrower) values exactly. Leaves: float64 arrays.
Holds: `exact_*` return a float64 that rounds, in any direction, to any format of at most 50 bits as the exact result
would: where the exact result has no float64, its last bit is set ("round to odd").
Source: S. Boldo, G. Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to
odd", IEEE Transactions on Computers 57(4), 2008.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Format:
    """A binary floating-point format. bits: of the significand with its hidden one. least: exponent of the smallest
    positive number (a subnormal, 2**least). largest: the greatest finite number."""

    bits: int
    least: int
    largest: float


FORMATS: dict[str, Format] = {
    "f16": Format(11, -24, 65504.0),
    "bf16": Format(8, -133, float.fromhex("0x1.fep127")),
    "tf32": Format(11, -136, float.fromhex("0x1.ffcp127")),
    "f32": Format(24, -149, float.fromhex("0x1.fffffep127")),
    "e4m3": Format(4, -9, 448.0),
    "e5m2": Format(3, -16, 57344.0),
    "e2m1": Format(2, -1, 6.0),
}


def _to_odd(value: Floats, error: Floats) -> Floats:
    """`value` + `error` with the last bit set where the error is not zero, nor NaN as that of a NaN; |error| is at most
    half an ulp of value."""
    inexact = (np.abs(error) > 0) & np.isfinite(value)
    if not np.count_nonzero(inexact):
        return value
    bits = value.view(np.int64).copy()
    even = inexact & ((bits & 1) == 0)
    bits[even] += np.where((error[even] > 0) == (value[even] > 0), 1, -1)
    return bits.view(np.float64)


def exact_add(a: Floats, b: Floats) -> Floats:
    with np.errstate(all="ignore"):
        total = a + b
        rest = total - a
        error = (a - (total - rest)) + (b - rest)
        return _to_odd(np.atleast_1d(total), np.atleast_1d(error))


def exact_fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """a * b + c where a * b has at most 53 bits."""
    with np.errstate(all="ignore"):
        return exact_add(a * b, c)


def exact_divide(a: Floats, b: Floats) -> Floats:
    """a / b where both have at most 24 bits."""
    with np.errstate(all="ignore"):
        quotient = np.atleast_1d(a / b)
        high, low = two_product(quotient, np.broadcast_to(b, quotient.shape))
        error = (a - high) - low  # the sign of the remainder
        return _to_odd(quotient, error * np.sign(b))


def exact_sqrt(a: Floats) -> Floats:
    with np.errstate(all="ignore"):
        root = np.atleast_1d(np.sqrt(a))
        high, low = two_product(root, root)
        return _to_odd(root, (a - high) - low)


def two_product(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """(high, low) with high + low = a * b exactly, away from overflow and underflow (Dekker, Veltkamp)."""
    split = float(2**27 + 1)
    a_high = a * split - (a * split - a)
    b_high = b * split - (b * split - b)
    a_low, b_low = a - a_high, b - b_high
    high = a * b
    return high, ((a_high * b_high - high) + a_high * b_low + a_low * b_high) + a_low * b_low


def round_to(value: Floats, to: str, mode: str = "rn", saturate: bool = False) -> Floats:
    """The numbers of format `to` nearest to `value` in the direction of `mode`.

    mode: rn (nearest, ties to even), rna (ties away), rz (to zero), rm (down), rp (up).
    saturate: what is too large becomes the largest finite number, not an infinity (satfinite). NaN stays NaN.
    """
    form = FORMATS[to]
    with np.errstate(all="ignore"):
        _, exponent = np.frexp(value)
        quantum = np.maximum(exponent - form.bits, form.least)
        scaled = np.ldexp(value, -quantum)
        if mode == "rna":
            rounded = np.copysign(np.floor(np.abs(scaled) + 0.5), scaled)
        else:
            rounded = {"rn": np.rint, "rz": np.trunc, "rm": np.floor, "rp": np.ceil}[mode](scaled)
        result = np.copysign(np.ldexp(rounded, quantum), value)
    over = np.abs(result) > form.largest
    if np.count_nonzero(over):
        finite = np.full(result.shape, saturate)
        if not saturate:
            toward = {"rn": None, "rna": None, "rz": 0, "rm": 1, "rp": -1}[mode]
            if toward is not None:  # directed rounding stops at the largest number on the side it rounds away from
                finite = (np.sign(result) == toward) if toward else np.full(result.shape, True)
                finite &= np.isfinite(value)
        limit = np.where(finite, form.largest, np.inf)
        result = np.where(over, np.copysign(limit, value), result)
    return np.where(np.isnan(value), value, result)


def as64(value: Any) -> Floats:
    """float64 of the same values."""
    return np.asarray(value).astype(np.float64)


def two_sum_error(a: Floats, b: Floats, total: Floats) -> Floats:
    """a + b - total, exactly, where total is a + b rounded to nearest (Knuth)."""
    rest = total - a
    return np.asarray(np.nan_to_num((a - (total - rest)) + (b - rest)))


def fma64(a: Floats, b: Floats, c: Floats, mode: str = "rn") -> Floats:
    """a * b + c with one rounding, in Python's exact fractions: slow, and rare in kernels."""
    result = np.empty(np.broadcast_shapes(a.shape, b.shape, c.shape))
    for index, (x, y, z) in enumerate(zip(a.tolist(), b.tolist(), c.tolist(), strict=True)):
        result[index] = _fma_once(x, y, z, mode)
    return result


def _fma_once(x: float, y: float, z: float, mode: str) -> float:
    with np.errstate(all="ignore"):
        plain = float(np.float64(x) * np.float64(y) + np.float64(z))
    if not all(math.isfinite(value) for value in (x, y, z)):
        return plain
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    if exact == 0:
        return plain
    try:
        nearest = exact.numerator / exact.denominator  # int / int rounds correctly to nearest
    except OverflowError:
        nearest = math.inf if exact > 0 else -math.inf
        return nearest if mode == "rn" else _directed_overflow(nearest, mode)
    if mode == "rn" or Fraction(nearest) == exact:
        return nearest
    above = Fraction(nearest) > exact
    down = mode == "rm" or (mode == "rz" and exact > 0)
    if above and down:
        return math.nextafter(nearest, -math.inf)
    if not above and not down:
        return math.nextafter(nearest, math.inf)
    return nearest


def _directed_overflow(infinity: float, mode: str) -> float:
    stays = mode == "rz" or (mode == "rm" and infinity > 0) or (mode == "rp" and infinity < 0)
    return math.copysign(sys.float_info.max, infinity) if stays else infinity
