"""What the rows compute, as NumPy over lanes and Python integers: the helpers that instructions.py names.

Enters: arrays of lanes and unsigned Python ints (see `Row.meaning`). Leaves: the same. Holds: floating point rounds to
nearest even with denormals kept (MXCSR at its default), NaNs follow the rule of SDM volume 1, 4.8.3.5 (the first
operand that is a NaN wins, quieted; an invalid operation gives the negative quiet NaN).
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

Array = Any
Meaning = Callable[..., Any]

_BITS: dict[str, Any] = {"float32": np.uint32, "float64": np.uint64}
_QUIET = {"float32": np.uint32(1 << 22), "float64": np.uint64(1 << 51)}
_DEFAULT_NAN = {"float32": np.uint32(0xFFC00000), "float64": np.uint64(0xFFF8000000000000)}


# --- Integers and flags --------------------------------------------------------------------------------------------

def _flags_of(result: int, size: int, **more: int) -> dict[str, int]:
    """s, z and p of `result`; p is over its low byte."""
    return {"s": result >> (size - 1) & 1, "z": int(result == 0), "p": 1 - (result & 0xFF).bit_count() % 2, **more}


def _sum(a: int, b: int, carry: int, size: int) -> tuple[int, dict[str, int]]:
    full = a + b + carry
    result = full & ((1 << size) - 1)
    overflow = (~(a ^ b) & (a ^ result)) >> (size - 1) & 1
    return result, _flags_of(result, size, c=full >> size, o=overflow, a=(a ^ b ^ result) >> 4 & 1)


def _difference(a: int, b: int, borrow: int, size: int) -> tuple[int, dict[str, int]]:
    full = a - b - borrow
    result = full & ((1 << size) - 1)
    overflow = ((a ^ b) & (a ^ result)) >> (size - 1) & 1
    return result, _flags_of(result, size, c=int(full < 0), o=overflow, a=(a ^ b ^ result) >> 4 & 1)


def add(size: int) -> Meaning:
    return lambda a, b: _sum(a, b, 0, size)


def adc(size: int) -> Meaning:
    return lambda a, b, flags: _sum(a, b, flags["c"], size)


def sub(size: int) -> Meaning:
    return lambda a, b: _difference(a, b, 0, size)


def sbb(size: int) -> Meaning:
    return lambda a, b, flags: _difference(a, b, flags["c"], size)


def cmp(size: int) -> Meaning:
    return lambda a, b: _difference(a, b, 0, size)[1]


def _logic(operation: Callable[[int, int], int]) -> Callable[[int], Meaning]:
    def sized(size: int) -> Meaning:
        def compute(a: int, b: int) -> tuple[int, dict[str, int]]:
            result = operation(a, b)
            return result, _flags_of(result, size, c=0, o=0)
        return compute
    return sized


bit_and = _logic(lambda a, b: a & b)
bit_or = _logic(lambda a, b: a | b)
bit_xor = _logic(lambda a, b: a ^ b)


def test(size: int) -> Meaning:
    return lambda a, b: _flags_of(a & b, size, c=0, o=0)


def signed(value: int, size: int) -> int:
    """An unsigned `size`-bit pattern as two's complement."""
    return value - (1 << size) if value >> (size - 1) & 1 else value


def imul(size: int) -> Meaning:
    def compute(a: int, b: int) -> tuple[int, dict[str, int]]:
        full = signed(a, size) * signed(b, size)
        result = full & ((1 << size) - 1)
        overflow = int(signed(result, size) != full)
        return result, {"c": overflow, "o": overflow}
    return compute


def copy(a: Any) -> Any:
    return a


def condition(code: int) -> Callable[[dict[str, int]], bool]:
    """The condition of Jcc number `code` (SDM volume 1, appendix B) as a function of the flags."""
    tests: tuple[Callable[[dict[str, int]], int], ...] = (
        lambda f: f["o"], lambda f: f["c"], lambda f: f["z"], lambda f: f["c"] | f["z"], lambda f: f["s"],
        lambda f: f["p"], lambda f: f["s"] ^ f["o"], lambda f: f["z"] | (f["s"] ^ f["o"]),
    )
    positive = tests[code >> 1]
    return (lambda flags: not positive(flags)) if code & 1 else (lambda flags: bool(positive(flags)))


def set_condition(holds: Callable[[dict[str, int]], bool]) -> Meaning:
    return lambda flags: int(holds(flags))


def conditional_move(holds: Callable[[dict[str, int]], bool]) -> Meaning:
    return lambda a, b, flags: b if holds(flags) else a


# --- Floating point ------------------------------------------------------------------------------------------------

def nan_rule(result: Array, *sources: Array) -> Array:
    """`result` with its NaNs replaced by what the processor gives (see the head of the file)."""
    name = result.dtype.name
    bits = result.view(_BITS[name]).copy()
    bits[np.isnan(result)] = _DEFAULT_NAN[name]
    for source in reversed(sources):
        isnan = np.isnan(source)
        bits[isnan] = source.view(_BITS[name])[isnan] | _QUIET[name]
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
        result = sources[0].copy()
        result[:1] = meaning(*(s[:1] if isinstance(s, np.ndarray) else s for s in sources))
        return result
    return compute


def exact_fma(a: float, b: float, c: float) -> float:
    """a * b + c of finite doubles, rounded once to a double (nearest even)."""
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return a * b + c if a * b == 0 else c * 0.0 + (a * b + c)
    try:
        return exact.numerator / exact.denominator
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def round_to_f32(exact: Fraction) -> np.float32:
    """A non-zero exact value rounded once to f32: to a double with the last bit made odd where inexact, then down."""
    try:
        near = exact.numerator / exact.denominator
    except OverflowError:
        return np.float32(np.inf if exact > 0 else -np.inf)
    if Fraction(near) != exact:
        bits = int(np.float64(near).view(np.uint64))
        if not bits & 1:
            towards_larger = (Fraction(near) < exact) == (exact > 0)
            bits += 1 if towards_larger else -1
            near = float(np.uint64(bits).view(np.float64))
    with np.errstate(all="ignore"):
        return np.float32(near)


def fma(negate_ab: bool = False, negate_c: bool = False) -> Meaning:
    """(+-)a * b (+-) c, rounded once, for f32 and f64 arrays; NaNs are looked for in the order a, b, c."""
    def compute(a: Array, b: Array, c: Array, nan_order: tuple[Array, ...] | None = None) -> Array:
        with np.errstate(all="ignore"):
            left, right = (-a if negate_ab else a), (-c if negate_c else c)
            if a.dtype == np.float32:
                wide = left.astype(np.float64) * b.astype(np.float64) + right.astype(np.float64)
                result = wide.astype(np.float32)
            else:
                result = left * b + right
            finite = np.isfinite(left) & np.isfinite(b) & np.isfinite(right)
            for i in np.flatnonzero(finite):
                x, y, z = float(left[i]), float(b[i]), float(right[i])
                exact = Fraction(x) * Fraction(y) + Fraction(z)
                if exact == 0:
                    negative_product = bool(np.signbit(x) ^ np.signbit(y))
                    both = (x == 0 or y == 0) and z == 0 and negative_product and bool(np.signbit(z))
                    result[i] = -0.0 if both else 0.0
                elif a.dtype == np.float32:
                    result[i] = round_to_f32(exact)
                else:
                    result[i] = exact_fma(x, y, z)
            return nan_rule(result, *(nan_order or (a, b, c)))
    return compute


def fma_order(meaning: Meaning, order: str) -> Meaning:
    """The 132, 213 and 231 forms: which operands are multiplied (first, second) and added (last)."""
    first, second, third = (int(letter) - 1 for letter in order)
    return lambda *operands: meaning(operands[first], operands[second], operands[third])


def broadcast(a: Array) -> Array:
    """Lane 0 for every lane; `execute` repeats it to the length of the row."""
    return a[:1]
