"""What the rows of floating point compute, as NumPy over lanes: the helpers that instructions.py names.

Enters: arrays of lanes and unsigned Python ints (see `Row.meaning`). Leaves: the same. Holds: floating point rounds
to nearest even with denormals kept (MXCSR at its default), NaNs follow the rule of SDM volume 1, 4.8.3.5 (the first
operand that is a NaN wins, quieted; an invalid operation gives the negative quiet NaN).
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from ...lane.arithmetic import fma32
from . import tiles
from .meaning_general import signed
from .meaning_values import Array, Meaning

_BITS: dict[str, Any] = {"float32": np.uint32, "float64": np.uint64}
_QUIET = {"float32": np.uint32(1 << 22), "float64": np.uint64(1 << 51)}
_DEFAULT_NAN: dict[str, Any] = {"float32": np.uint32(0xFFC00000), "float64": np.uint64(0xFFF8000000000000)}


# --- Arithmetic ----------------------------------------------------------------------------------------------------

def nan_rule(result: Array, *sources: Array) -> Array:
    """`result` with its NaNs replaced by what the processor gives (see the head of the file)."""
    name = result.dtype.name
    bits = np.where(np.isnan(result), _DEFAULT_NAN[name], result.view(_BITS[name]))
    for source in reversed(sources):
        bits = np.where(np.isnan(source), source.view(_BITS[name]) | _QUIET[name], bits)
    return bits.view(result.dtype)


def _float_binary(operation: Callable[[Array, Array], Array]) -> Meaning:
    def compute(a: Array, b: Array) -> Array:
        with np.errstate(all="ignore"):
            return nan_rule(operation(a, b), a, b)
    return compute


float_add = _float_binary(np.add)
float_subtract = _float_binary(np.subtract)
float_multiply = _float_binary(np.multiply)
float_divide = _float_binary(np.divide)


def float_minimum(a: Array, b: Array) -> Array:
    return np.where(a < b, a, b)


def float_maximum(a: Array, b: Array) -> Array:
    return np.where(a > b, a, b)


def scalar(meaning: Meaning) -> Meaning:
    """`meaning` on lane 0; the other lanes come from the first source."""
    def compute(*sources: Array) -> Array:
        low = meaning(*(s[:1] if isinstance(s, np.ndarray) else s for s in sources))
        return np.concatenate([low, sources[0][1:]])
    return compute


def round_to_f64(exact: Any) -> float:
    """A non-zero `Fraction` rounded once to a double (nearest even; division of Python ints is exact to that)."""
    try:
        return float(exact.numerator / exact.denominator)
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def fma(negate_ab: bool = False, negate_c: bool = False) -> Meaning:
    """(+-)a * b (+-) c, rounded once, for f32 and f64 arrays; NaNs are looked for in the order a, b, c."""
    def compute(a: Array, b: Array, c: Array) -> Array:
        with np.errstate(all="ignore"):
            left, right = (-a if negate_ab else a), (-c if negate_c else c)
            if a.dtype == np.float32:
                return nan_rule(fma32(left, b, right), a, b, c)
            result = left * b + right
            finite = np.isfinite(left) & np.isfinite(b) & np.isfinite(right)
            for i in np.flatnonzero(finite):
                x, y, z = float(left[i]), float(b[i]), float(right[i])
                exact = Fraction(x) * Fraction(y) + Fraction(z)
                if exact == 0:
                    negative_product = bool(np.signbit(x) ^ np.signbit(y))
                    both = (x == 0 or y == 0) and z == 0 and negative_product and bool(np.signbit(z))
                    result[i] = -0.0 if both else 0.0
                else:
                    result[i] = round_to_f64(exact)
            # A product that only overflows when it is rounded alone must not turn an infinite addend into a NaN.
            result = np.where(np.isfinite(left) & np.isfinite(b) & np.isinf(right), right, result)
            return nan_rule(result, a, b, c)
    return compute


def fma_order(meaning: Meaning, order: str) -> Meaning:
    """The 132, 213 and 231 forms: which operands are multiplied (first, second) and added (last)."""
    first, second, third = (int(letter) - 1 for letter in order)
    return lambda *operands: meaning(operands[first], operands[second], operands[third])


# --- Roots, roundings, parts of numbers, conversions -----------------------------------------------------------------

def float_sqrt(a: Array) -> Array:
    with np.errstate(all="ignore"):
        return nan_rule(np.sqrt(a), a)


_ROUNDINGS: tuple[Callable[[Array], Array], ...] = (np.rint, np.floor, np.ceil, np.trunc)


def _rounded_at(a: Array, imm: int, places: int) -> Array:
    """`a` rounded to a multiple of 2**-places, exactly (extended precision has the exponent range for it)."""
    rounding = _ROUNDINGS[0 if imm & 4 else imm & 3]
    scale = np.longdouble(2) ** places
    with np.errstate(all="ignore"):
        exact = rounding(a.astype(np.longdouble) * scale) / scale
        return np.copysign(exact, a.astype(np.longdouble)).astype(a.dtype)


def float_round(a: Array, imm: int) -> Array:
    """vroundps: rounding mode in the low bits of `imm`."""
    return nan_rule(_rounded_at(a, imm, 0), a)


def round_scale(a: Array, imm: int) -> Array:
    """vrndscaleps: to imm[7:4] binary places."""
    return nan_rule(_rounded_at(a, imm, imm >> 4 & 15), a)


def reduce(a: Array, imm: int) -> Array:
    """vreduceps: what `round_scale` leaves, itself rounded as `imm` says; 0 for infinities."""
    mode = 0 if imm & 4 else imm & 3
    with np.errstate(all="ignore"):
        x, y = a.astype(np.longdouble), -_rounded_at(a, imm, imm >> 4 & 15).astype(np.longdouble)
        total = x + y
        part = total - x
        lost = (x - (total - part)) + (y - part)  # total + lost is exact
        rest = total.astype(a.dtype)
        over, under = rest - total, lost
        above = (over > 0) | (over == 0) & (under < 0)
        below = (over < 0) | (over == 0) & (under > 0)
        down = above if mode == 1 else above & (rest > 0) if mode == 3 else np.zeros(len(a), bool)
        up = below if mode == 2 else below & (rest < 0) if mode == 3 else np.zeros(len(a), bool)
        rest = np.where(down, np.nextafter(rest, a.dtype.type(-np.inf)), rest)
        rest = np.where(up, np.nextafter(rest, a.dtype.type(np.inf)), rest)
    rest = np.where(rest == 0, a.dtype.type(-0.0 if mode == 1 else 0.0), rest)
    return nan_rule(np.where(np.isinf(a), a.dtype.type(0), rest), a)


def get_exponent(a: Array) -> Array:
    """vgetexpps: floor(log2 |a|) as a float."""
    exponent = (np.frexp(a)[1] - 1).astype(a.dtype)
    exponent = np.where(a == 0, a.dtype.type(-np.inf), np.where(np.isinf(a), a.dtype.type(np.inf), exponent))
    return nan_rule(np.where(np.isnan(a), a, exponent), a)


def select_range(a: Array, b: Array, imm: int) -> Array:
    """vrangeps: the lesser, the greater, or that of lesser or greater magnitude, by imm[1:0]; its sign by imm[3:2]. A
    quiet NaN gives way to a number."""
    name, greater, sign = a.dtype.name, imm & 1, imm >> 2 & 3
    left, right = (np.abs(a), np.abs(b)) if imm & 2 else (a, b)
    first = np.where(left == right, np.signbit(a) ^ bool(greater), left > right if greater else left < right)
    number: Array = np.where(np.isnan(b) | (first & ~np.isnan(a)), a, b)
    chosen = number.view(_BITS[name])
    top = a.view(_BITS[name]).dtype.type(1) << (8 * a.itemsize - 1)
    if sign != 1:
        chosen = (chosen & ~top) | (top & (a.view(_BITS[name]) if sign == 0 else top if sign == 3 else top ^ top))
    for source in (b, a):
        signalling = np.isnan(source) & (source.view(_BITS[name]) & _QUIET[name] == 0)
        chosen = np.where(signalling, source.view(_BITS[name]) | _QUIET[name], chosen)
    return chosen.view(a.dtype)


def classify(a: Array, imm: int) -> Array:
    """vfpclassps: whether a number is of one of the classes whose bits imm has."""
    negative, magnitude = np.signbit(a), np.abs(a)
    quiet = a.view(_BITS[a.dtype.name]) & _QUIET[a.dtype.name] != 0
    denormal = (a != 0) & (magnitude < np.finfo(a.dtype).tiny)
    infinite, zero = np.isinf(a), a == 0
    classes = (np.isnan(a) & quiet, zero & ~negative, zero & negative, infinite & ~negative, infinite & negative,
               denormal, negative & ~zero & ~infinite & ~np.isnan(a), np.isnan(a) & ~quiet)
    found: Array = np.zeros(len(a), bool)
    for bit, of_class in enumerate(classes):
        if imm >> bit & 1:
            found = found | of_class
    return found


def get_mantissa(a: Array, imm: int) -> Array:
    """vgetmantps: the mantissa in the interval imm[1:0], its sign by imm[3:2]."""
    interval, sign = imm & 3, imm >> 2 & 3
    fraction, exponent = np.frexp(np.where(np.isnan(a), a.dtype.type(1), np.abs(a)))
    fraction, exponent = fraction * a.dtype.type(2), exponent - 1  # fraction in [1, 2)
    half = (np.zeros(len(a), bool), exponent % 2 != 0, np.ones(len(a), bool), fraction >= 1.5)[interval]
    special = (a == 0) | np.isinf(a)
    out = np.where(special, a.dtype.type(1), np.where(half, fraction / 2, fraction)).astype(a.dtype)
    negative = np.signbit(a)
    out = np.where(negative & (sign & 1 == 0), -out, out)
    if sign & 2:
        out = np.where(negative & (a != 0), a.dtype.type(np.nan), out)
    return nan_rule(np.where(np.isnan(a), a, out), a)


def scale_exponent(a: Array, b: Array) -> Array:
    """vscalefps: a * 2**floor(b), rounded once."""
    limit = 40000
    power = np.clip(np.floor(np.where(np.isnan(b), 0, b).astype(np.float64)), -limit, limit).astype(np.int64)
    with np.errstate(all="ignore"):
        # Twice, because one step would leave the range of extended precision and round twice.
        wide = a.astype(np.longdouble)
        out = np.ldexp(wide, np.clip(power, -8000, 8000)).astype(a.dtype)
        out = np.where((b == np.inf) & (a == 0) | (b == -np.inf) & np.isinf(a), a.dtype.type(np.nan), out)
        quiet_a = np.isnan(a) & (a.view(_BITS[a.dtype.name]) & _QUIET[a.dtype.name] != 0)
        result = nan_rule(out.astype(a.dtype), a, b)
        result = np.where(quiet_a & (b == np.inf), a.dtype.type(np.inf), result)
        return np.where(quiet_a & (b == -np.inf), a.dtype.type(0), result)


def reciprocal(a: Array) -> Array:
    """The exact value that vrcp14ps approximates."""
    with np.errstate(all="ignore"):
        return nan_rule(np.divide(a.dtype.type(1), a), a)


def reciprocal_sqrt(a: Array) -> Array:
    """The exact value that vrsqrt14ps approximates."""
    with np.errstate(all="ignore"):
        return nan_rule((1 / np.sqrt(a.astype(np.longdouble))).astype(a.dtype), a)


def estimate(meaning: Meaning) -> Meaning:
    """vrcpps, vrsqrtps: denormal inputs count as zeros, and denormal results are zeros of their sign."""
    return lambda a: flush(meaning(np.where(np.isnan(a), a, flush(a))))


def to_integer(dtype: str, truncate: bool) -> Meaning:
    """Floats to integers; out of range and NaN give the indefinite value: 100...0 signed, all ones unsigned."""
    target = np.dtype(dtype)
    limits = np.iinfo(target)
    indefinite = limits.min if target.kind == "i" else limits.max
    def compute(a: Array) -> Array:
        with np.errstate(all="ignore"):
            whole = (np.trunc if truncate else np.rint)(a.astype(np.longdouble))
            inside = (whole >= limits.min) & (whole <= limits.max)
            return np.where(inside, np.where(inside, whole, 0).astype(target), target.type(indefinite))
    return compute


def to_float(dtype: str) -> Meaning:
    """Integers or floats to floats, rounded to nearest even."""
    def compute(a: Array) -> Array:
        with np.errstate(all="ignore"):
            result = a.astype(dtype)
        if a.dtype.kind != "f":
            return result
        bits, shift = (_BITS[result.dtype.name], 29)
        if a.dtype.itemsize < result.dtype.itemsize:
            nan = a.view(np.uint32).astype(np.uint64)
            payload = (nan & 0x80000000) << 32 | np.uint64(0x7FF8000000000000) | (nan & 0x3FFFFF) << shift
        else:
            nan = a.view(np.uint64)
            payload = nan >> 32 & 0x80000000 | np.uint64(0x7FC00000) | nan >> shift & 0x3FFFFF
        return np.where(np.isnan(a), payload.astype(bits), result.view(bits)).view(dtype)
    return compute


def half_to_float(a: Array) -> Array:
    """f16 (as u16) to f32; signalling NaNs are quieted."""
    result = a.view(np.float16).astype(np.float32)
    wide = a.astype(np.uint32)
    nan = (wide & 0x7C00 == 0x7C00) & (wide & 0x3FF != 0)
    quiet = (wide & 0x8000) << 16 | 0x7FC00000 | (wide & 0x3FF) << 13
    return np.where(nan, quiet, result.view(np.uint32)).view(np.float32)


def float_to_half(a: Array, imm: int) -> Array:
    """f32 to f16 (as u16), rounding mode in the low bits of `imm`."""
    with np.errstate(all="ignore"):
        near = a.astype(np.float16)
        mode = 0 if imm & 4 else imm & 3
        wide = near.astype(np.float32)
        none = np.zeros(len(a), bool)
        if mode:
            down = (wide > a) & ((a > 0) | (mode != 3)) if mode != 2 else none
            up = (wide < a) & ((a < 0) | (mode != 3)) if mode != 1 else none
            near = np.where(down, np.nextafter(near, np.float16(-np.inf)), near)
            near = np.where(up, np.nextafter(near, np.float16(np.inf)), near)
            near = np.copysign(near, a.astype(np.float16))
    source = a.view(np.uint32)
    quiet = (source >> 16 & 0x8000 | 0x7E00 | source >> 13 & 0x1FF).astype(np.uint16)
    return np.where(np.isnan(a), quiet, near.view(np.uint16))


def flush(a: Array) -> Array:
    """Denormals to zero, sign kept."""
    return np.where(np.abs(a) < np.finfo(a.dtype).tiny, np.copysign(a.dtype.type(0), a), a)


def float_to_bf16(a: Array) -> Array:
    """vcvtneps2bf16: f32 to bf16 (as u16), nearest even; denormals count as zero, NaNs are quieted."""
    bits = a.view(np.uint32)
    rounded = bits + (0x7FFF + (bits >> 16 & 1)) >> 16
    denormal = bits & 0x7F800000 == 0
    rounded = np.where(denormal, bits >> 16 & 0x8000, rounded)
    return np.where(np.isnan(a), bits >> 16 | 0x40, rounded).astype(np.uint16)


def bf16_to_float(a: Array) -> Array:
    """bf16 (as u16) to f32: the same bits above sixteen zeros."""
    return (a.astype(np.uint32) << 16).view(np.float32)


def dot_bf16(total: Array, a: Array, b: Array) -> Array:
    """vdpbf16ps: two products added to f32, one after the other, each step a fused multiply-add, odd element first;
    denormals are zero on the way in and out."""
    multiply_add = fma()
    x, y = flush(bf16_to_float(a.view(np.uint16))), flush(bf16_to_float(b.view(np.uint16)))
    first = flush(multiply_add(x[1::2], y[1::2], flush(total)))
    return flush(multiply_add(x[::2], y[::2], first))


tile_dot_bf16 = tiles.dot_pairs(bf16_to_float, flush, fma(), float_add)
tile_dot_f16 = tiles.dot_pairs(half_to_float, flush, fma(), float_add)


def insert_converted(size: int) -> Meaning:
    """vcvtsi2ss, vcvtsi2sd: a general register as lane 0."""
    def compute(a: Array, value: int) -> Array:
        out = a.copy()
        out[0] = np.array([signed(value, size)], np.int64).astype(a.dtype)[0]
        return out
    return compute


def extract_converted(size: int, truncate: bool) -> Meaning:
    convert = to_integer(f"i{size // 8}", truncate)
    return lambda a: int(convert(a[:1])[0]) & ((1 << size) - 1)


def insert_float(a: Array, b: Array) -> Array:
    """vcvtss2sd, vcvtsd2ss: lane 0 of b in the other precision."""
    out = a.copy()
    out[:1] = to_float(a.dtype.str)(b[:1])
    return out


def compare_ordered(a: Array, b: Array) -> dict[str, int]:
    """vucomiss: unordered sets z, p and c."""
    x, y = a[0], b[0]
    unordered = int(np.isnan(x) or np.isnan(y))
    return {"z": int(x == y) | unordered, "p": unordered, "c": int(x < y) | unordered, "o": 0, "s": 0, "a": 0}
