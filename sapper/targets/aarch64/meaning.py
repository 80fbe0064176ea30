"""What the rows of AArch64 compute, on Python ints and NumPy arrays.

Enters: what a row's operands hold (see `Row` in rows.py). Leaves: what its written operands hold. Holds: vectors come
and go as arrays of the row's elements, those of half a register as the lower half of one; general registers are
unsigned. Source: Arm Architecture Reference Manual DDI 0487, C6.2, C7.2 and J1.3 (shared pseudocode).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any
Flags = dict[str, int]
CONDITIONS: dict[str, Callable[[Flags], bool]] = {
    "eq": lambda f: f["z"] == 1, "ne": lambda f: f["z"] == 0, "hs": lambda f: f["c"] == 1, "lo": lambda f: f["c"] == 0,
    "mi": lambda f: f["n"] == 1, "pl": lambda f: f["n"] == 0, "vs": lambda f: f["v"] == 1, "vc": lambda f: f["v"] == 0,
    "hi": lambda f: f["c"] == 1 and f["z"] == 0, "ls": lambda f: f["c"] == 0 or f["z"] == 1,
    "ge": lambda f: f["n"] == f["v"], "lt": lambda f: f["n"] != f["v"],
    "gt": lambda f: f["z"] == 0 and f["n"] == f["v"], "le": lambda f: f["z"] == 1 or f["n"] != f["v"],
}
"""What flags say (C1.2.4)."""
BITS = 64
ALL = (1 << BITS) - 1


def _signed(number: int, bits: int = BITS) -> int:
    return number - (1 << bits) if number >> (bits - 1) & 1 else number


# --- General registers ------------------------------------------------------------------------------------------------

def same(value: Any) -> Any:
    return value


def shifted_immediate(number: int, shift: int) -> int:
    return number << shift


def inverted_immediate(number: int, shift: int) -> int:
    return ~(number << shift) & ALL


def kept_immediate(old: int, number: int, shift: int) -> int:
    return old & ~(0xFFFF << shift) | number << shift


def add(a: int, b: int) -> int:
    return a + b & ALL


def subtract(a: int, b: int) -> int:
    return a - b & ALL


def add_word(a: int, b: int, shift: int) -> int:
    return a + (_signed(b & 0xFFFFFFFF, 32) << shift) & ALL


def _flags(a: int, b: int, bits: int, subtracts: bool = True) -> dict[str, int]:
    """N, Z, C and V of a - b, or of a + b (AddWithCarry)."""
    mask = (1 << bits) - 1
    other, carry = (~b & mask, 1) if subtracts else (b, 0)
    whole = a + other + carry
    result = whole & mask
    exact = _signed(a, bits) + _signed(other, bits) + carry
    return {"n": result >> (bits - 1), "z": int(not result), "c": int(whole != result),
            "v": int(_signed(result, bits) != exact)}


def compare(a: int, b: int) -> tuple[Any, ...]:
    return (_flags(a, b, BITS),)


def compare_negative(a: int, b: int) -> tuple[Any, ...]:
    return (_flags(a, b, BITS, False),)


def compare_words(a: int, b: int) -> tuple[Any, ...]:
    return (_flags(a & 0xFFFFFFFF, b & 0xFFFFFFFF, 32),)


def subtract_flags(a: int, b: int) -> tuple[Any, ...]:
    return a - b & ALL, _flags(a, b, BITS)


def multiply(a: int, b: int) -> int:
    return a * b & ALL


def multiply_high(a: int, b: int) -> int:
    """The upper half of a product with signs."""
    return _signed(a) * _signed(b) >> BITS & ALL


def multiply_subtract(a: int, b: int, c: int) -> int:
    return c - a * b & ALL


def divide(a: int, b: int) -> int:
    """Towards 0; by 0 it is 0."""
    x, y = _signed(a), _signed(b)
    return 0 if not y else (abs(x) // abs(y)) * (1 if (x < 0) == (y < 0) else -1) & ALL


def divide_unsigned(a: int, b: int) -> int:
    return a // b if b else 0


def bit_and(a: Any, b: Any) -> Any:
    return a & b


def bit_or(a: Any, b: Any) -> Any:
    return a | b


def bit_xor(a: Any, b: Any) -> Any:
    return a ^ b


def shift_left(a: int, amount: int) -> int:
    return a << amount % BITS & ALL


def shift_right(a: int, amount: int) -> int:
    return a >> amount % BITS


def shift_right_signed(a: int, amount: int) -> int:
    return _signed(a) >> amount % BITS & ALL


def chosen(condition: str) -> Callable[..., int]:
    holds = CONDITIONS[condition]
    return lambda a, b, flags: a if holds(flags) else b


def truth(condition: str) -> Callable[..., int]:
    holds = CONDITIONS[condition]
    return lambda flags: int(holds(flags))


# --- Memory -----------------------------------------------------------------------------------------------------------

def loaded(bits: int, signed: bool = False) -> Callable[[int], int]:
    return lambda memory: _signed(memory, bits) & ALL if signed else memory


def stored(bits: int) -> Callable[[int], int]:
    return lambda value: value & (1 << bits) - 1


def added_to(bits: int) -> Callable[[int, int], tuple[int, int]]:
    """What memory held, and what it holds then."""
    return lambda value, memory: (memory, memory + value & (1 << bits) - 1)


def swapped_with(bits: int) -> Callable[[int, int], tuple[int, int]]:
    """What memory held, and what it holds then."""
    return lambda value, memory: (memory, value & (1 << bits) - 1)


def swapped_if_same(bits: int) -> Callable[[int, int, int], tuple[int, int]]:
    """What memory held, and what it holds then: the new number where that was the expected one."""
    mask = (1 << bits) - 1
    return lambda expected, value, memory: (memory, value & mask if memory == expected & mask else memory)


# --- Vectors ----------------------------------------------------------------------------------------------------------

def add_rows(a: Array, b: Array) -> Array:
    return a + b


def subtract_rows(a: Array, b: Array) -> Array:
    return a - b


def multiply_rows(a: Array, b: Array) -> Array:
    return a * b


def divide_rows(a: Array, b: Array) -> Array:
    return a / b


def _all_ones(condition: Array, like: Array) -> Array:
    return np.where(condition, -1, 0).astype(f"i{like.itemsize}")


def equal(a: Array, b: Array) -> Array:
    return _all_ones(a == b, a)


def at_least(a: Array, b: Array) -> Array:
    return _all_ones(a >= b, a)


def above(a: Array, b: Array) -> Array:
    return _all_ones(a > b, a)


def _fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once: exact by way of long doubles where these have the bits, else by Python's fractions."""
    from fractions import Fraction

    made = []
    for x, y, z in zip(a, b, c, strict=True):
        if not (np.isfinite(x) and np.isfinite(y) and np.isfinite(z)):
            made.append(x * y + z)
            continue
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        made.append(_rounded(exact, a.dtype) if exact else x * y + z)
    return np.array(made, a.dtype)


def _rounded(exact: Any, dtype: Any) -> Any:
    """The float nearest to a fraction, ties to even."""
    if dtype == np.float64:
        try:
            return float(exact)
        except OverflowError:
            return np.inf if exact > 0 else -np.inf
    facts = np.finfo(dtype)
    magnitude = abs(exact)
    exponent = max(magnitude.numerator.bit_length() - magnitude.denominator.bit_length() - 1, facts.minexp)
    if magnitude >= 2 * 2.0**exponent:
        exponent += 1
    unit = exponent - facts.nmant
    scaled = magnitude / 2**unit if unit >= 0 else magnitude * 2**-unit
    value = round(scaled) * 2.0**unit       # exact in f64; round() is to even
    with np.errstate(over="ignore"):
        return dtype.type(value if exact > 0 else -value)


def fused(c: Array, a: Array, b: Array) -> Array:
    return _fused(a, b, c)


def fused_negative(c: Array, a: Array, b: Array) -> Array:
    return _fused(-a, b, c)


def by_element(meaning: Callable[[Array, Array, Array], Array]) -> Callable[[Array, Array, Array, int], Array]:
    """One element of the second factor for all of the first."""
    return lambda c, a, b, place: meaning(c, a, np.full_like(a, b[place]))


def negate(a: Array) -> Array:
    return -a


def absolute(a: Array) -> Array:
    return abs(a)


def root(a: Array) -> Array:
    return np.sqrt(a)


def nearest(a: Array) -> Array:
    return np.rint(a)


def floor(a: Array) -> Array:
    return np.floor(a)


def ceiling(a: Array) -> Array:
    return np.ceil(a)


def truncated(a: Array) -> Array:
    return np.trunc(a)


def to_float(a: Array) -> Array:
    """The bits are integers."""
    return a.view(f"i{a.itemsize}").astype(a.dtype)


def _saturated(a: Array) -> Array:
    """Whole numbers as integers: NaN is 0, what is too large the largest."""
    limits = np.iinfo(f"i{a.itemsize}")
    inside = (a >= float(limits.min)) & (a < -float(limits.min))
    whole = np.where(inside, a, 0).astype(limits.dtype)
    return np.where(inside | np.isnan(a), whole, np.where(a > 0, limits.max, limits.min)).astype(limits.dtype)


def to_integer(a: Array) -> Array:
    return _saturated(np.trunc(a))


def to_nearest(a: Array) -> Array:
    return _saturated(np.rint(a))


_TYPES = {"f16": np.float16, "f32": np.float32, "f64": np.float64, "i8": np.int8, "i16": np.int16, "i32": np.int32,
          "i64": np.int64, "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64}


def dtype_of(name: str) -> Any:
    return np.dtype(_TYPES[name])


def widened(name: str) -> Callable[[Array], Array]:
    """The lower half, in elements of twice the bits."""
    return lambda a: a[: 16 // dtype_of(name).itemsize].astype(dtype_of(name))


def narrowed(name: str) -> Callable[[Array], Array]:
    """All elements, in half of the bits."""
    return lambda a: a.astype(dtype_of(name))


def scalar_to_float(name: str) -> Callable[[int], Array]:
    return lambda number: np.array([_signed(number)], dtype_of(name))


def larger(a: Array, b: Array) -> Array:
    return np.maximum(a, b)


def smaller(a: Array, b: Array) -> Array:
    return np.minimum(a, b)


def _shifted(number: int, amount: int, bits: int) -> int:
    """By the lowest byte of the amount, signed; to the right where it is negative."""
    amount = _signed(amount & 0xFF, 8)
    return (number << amount if amount >= 0 else number >> -amount) & (1 << bits) - 1


def shift_by_rows(a: Array, b: Array) -> Array:
    bits = 8 * a.itemsize
    return np.array([_shifted(int(x), int(y), bits) for x, y in zip(a, b, strict=True)], f"u{a.itemsize}")


def shift_by_rows_unsigned(a: Array, b: Array) -> Array:
    return shift_by_rows(a.view(f"u{a.itemsize}"), b)


def shift_left_rows(a: Array, amount: int) -> Array:
    return a << a.dtype.type(amount)


def _right(a: Array, amount: int) -> Array:
    bits = 8 * a.itemsize
    return a >> a.dtype.type(min(amount, bits - 1)) if a.dtype.kind == "i" or amount < bits else np.zeros_like(a)


def shift_right_rows_signed(a: Array, amount: int) -> Array:
    return _right(a, amount)


def shift_right_rows(a: Array, amount: int) -> Array:
    return _right(a.view(f"u{a.itemsize}"), amount)


def bit_not(a: Array) -> Array:
    return ~a


def select_by_result(mask: Array, a: Array, b: Array) -> Array:
    return a & mask | b & ~mask


def insert_where(old: Array, a: Array, mask: Array) -> Array:
    return a & mask | old & ~mask


def insert_unless(old: Array, a: Array, mask: Array) -> Array:
    return a & ~mask | old & mask


def extracted(a: Array, b: Array, place: int) -> Array:
    return np.concatenate([a, b])[place : place + len(a)]


def dot_of_four(c: Array, a: Array, b: Array) -> Array:
    """Sums of 32 bits, with the products of four bytes each."""
    products = a.astype(np.int32) * b.astype(np.int32)
    return c.view(np.int32) + products.reshape(-1, 4).sum(1, dtype=np.int32)


def dot_by_element(c: Array, a: Array, b: Array, place: int) -> Array:
    """Four bytes of the second factor for all of the first."""
    return dot_of_four(c, a, np.tile(b[4 * place:4 * place + 4], len(a) // 4))


def dot_of_signs(first: str, second: str) -> Callable[..., Array]:
    """The same of bytes of these kinds, by four of the second factor for all where their place is given."""
    def dot(c: Array, a: Array, b: Array, *place: int) -> Array:
        x, y = a.view(first), b.view(second)
        return dot_by_element(c, x, y, *place) if place else dot_of_four(c, x, y)

    return dot


def matrices_of_bytes(first: str, second: str) -> Callable[..., Array]:
    """2 x 2 sums of 32 bits, with the products of 2 x 8 bytes by as many, whose rows are the columns of the other
    factor."""
    def multiply(c: Array, a: Array, b: Array) -> Array:
        x, y = (v.view(kind).reshape(2, 8).astype(np.int32) for v, kind in ((a, first), (b, second)))
        return c.view(np.int32) + (x @ y.T).reshape(-1)

    return multiply


_LEAST_NORMAL, _LARGEST = 2.0**-126, 2.0**128 - 2.0**104
_FLOAT, _WORD = struct.Struct("<f"), struct.Struct("<I")


def _to_odd(value: float, rest: float = 0.0) -> float:
    """value + rest, which is less than a digit of it: of the two f32 around it that whose last bit is set, or itself if
    it is one; what is below the normal numbers is 0, what is beyond the largest infinite (BFRound)."""
    size = abs(value)
    if size < _LEAST_NORMAL or (size == _LEAST_NORMAL and value * rest < 0):
        return math.copysign(0.0, value)
    if not size <= _LARGEST:
        return value if size != size else math.copysign(_LARGEST if size < 2.0**128 else math.inf, value)
    packed = _FLOAT.pack(value)
    near: float = _FLOAT.unpack(packed)[0]
    below = value - near or rest
    bits: int = _WORD.unpack(packed)[0]
    if not below or bits & 1:
        return near
    made: float = _FLOAT.unpack(_WORD.pack(bits + (1 if (below > 0) == (near > 0) else -1)))[0]
    return made


def _sum_to_odd(a: float, b: float) -> float:
    """Of f32, which f64 sum up to a rest (Knuth's two-sum)."""
    whole = a + b
    if not math.isfinite(whole):
        return whole
    from_a = whole - b
    return _to_odd(whole, (a - from_a) + (b - (whole - from_a)))


def _flushed(values: Array) -> list[float]:
    """f32 as Python's floats, denormals 0."""
    with np.errstate(invalid="ignore"):
        numbers: list[float] = values.astype(np.float64).tolist()
    return [math.copysign(0.0, n) if abs(n) < _LEAST_NORMAL else n for n in numbers]


def _bfloat16(a: Array) -> list[float]:
    return _flushed((a.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32))


def _add_pair(total: float, a: list[float], b: list[float]) -> float:
    """The two products are summed, and their sum added, each rounded to odd (BFDotAdd without FPCR.EBF)."""
    return _sum_to_odd(total, _sum_to_odd(_to_odd(a[0] * b[0]), _to_odd(a[1] * b[1])))


def _as_floats(sums: list[float]) -> Array:
    """Of NaN the default one."""
    made = np.array(sums, np.float32)
    return np.where(np.isnan(made), np.uint32(0x7FC00000).view(np.float32), made)


def dot_of_bfloat16(c: Array, a: Array, b: Array, *place: int) -> Array:
    """f32 sums, with the products of two bf16 each; the second two for all where their place is given."""
    x, y = _bfloat16(a), _bfloat16(b)
    if place:
        y = y[2 * place[0]:2 * place[0] + 2] * (len(x) // 2)
    return _as_floats([_add_pair(total, x[2 * n:2 * n + 2], y[2 * n:2 * n + 2])
                       for n, total in enumerate(_flushed(c.view(np.float32)))])


def matrices_of_bfloat16(c: Array, a: Array, b: Array) -> Array:
    """2 x 2 sums of f32, with the products of 2 x 4 bf16 by as many, whose rows are the columns of the other factor:
    two of the four first, then the others."""
    x, y = _bfloat16(a), _bfloat16(b)
    made = []
    for n, total in enumerate(_flushed(c.view(np.float32))):
        for half in (0, 2):
            total = _add_pair(total, x[n // 2 * 4 + half:][:2], y[n % 2 * 4 + half:][:2])
        made.append(total)
    return _as_floats(made)


def as_bfloat16(a: Array) -> Array:
    """f32 -> bf16, as u16: nearest even, denormals kept; NaN is made quiet."""
    bits = a.view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))
    return (np.where(np.isnan(a), bits | np.uint32(0x400000), rounded) >> np.uint32(16)).astype(np.uint16)


def upper_as_bfloat16(old: Array, a: Array) -> Array:
    """The same, in the upper half of the old row."""
    return np.concatenate([old.view(np.uint16)[:4], as_bfloat16(a)])


def shifted_wide(a: Array) -> Array:
    return a[:4].astype(np.uint32) << 16


def shifted_narrow(a: Array, amount: int) -> Array:
    return (a >> np.uint32(amount)).astype(np.uint16)


def _zipped(a: Array, b: Array) -> Array:
    return np.stack([a, b], 1).reshape(-1)


def zip_low(a: Array, b: Array) -> Array:
    return _zipped(a, b)[: len(a)]


def zip_high(a: Array, b: Array) -> Array:
    return _zipped(a, b)[len(a) :]


def even(a: Array, b: Array) -> Array:
    return np.concatenate([a, b])[::2]


def odd(a: Array, b: Array) -> Array:
    return np.concatenate([a, b])[1::2]


def even_pairs(a: Array, b: Array) -> Array:
    return _zipped(a[::2], b[::2])


def odd_pairs(a: Array, b: Array) -> Array:
    return _zipped(a[1::2], b[1::2])


def swapped(a: Array) -> Array:
    return a.reshape(-1, 2)[:, ::-1].reshape(-1)


def spread(length: int, bits: int) -> Callable[[int], Array]:
    return lambda number: np.full(length // bits, number & (1 << bits) - 1, f"u{bits // 8}")


def spread_element(length: int) -> Callable[[Array, int], Array]:
    return lambda a, place: np.full(length // 8 // a.itemsize, a[place])


def insert_element(old: Array, to: int, a: Array, place: int) -> Array:
    made = old.copy()
    made[to] = a[place]
    return made


def element(a: Array, place: int) -> Array:
    return a[place : place + 1]


def element_number(signed: bool) -> Callable[[Array, int], int]:
    return lambda a, place: _signed(int(a[place]), 8 * a.itemsize) & ALL if signed else int(a[place])


def insert_number(old: Array, to: int, number: int) -> Array:
    made = old.copy()
    made[to] = number & (1 << 8 * old.itemsize) - 1
    return made


def vector_to_number(a: Array) -> int:
    return int.from_bytes(a.tobytes(), "little")


def largest(a: Array) -> Array:
    return a.max(keepdims=True)


def smallest(a: Array) -> Array:
    return a.min(keepdims=True)


def larger_pairs(a: Array, b: Array) -> Array:
    return np.concatenate([a, b]).reshape(-1, 2).max(1)


def smaller_pairs(a: Array, b: Array) -> Array:
    return np.concatenate([a, b]).reshape(-1, 2).min(1)


def repeated(byte: int) -> Callable[[], Array]:
    return lambda: np.full(16, byte, np.uint8)


def repeated_word(shift: int) -> Callable[[int], Array]:
    return lambda number: np.full(4, number << shift, np.uint32)
