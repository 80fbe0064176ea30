"""What the rows of RISC-V compute, on Python ints and NumPy arrays.

Enters: what a row's operands hold (see `Row` in rows.py). Leaves: what its written operands hold. Holds: vectors come
and go as arrays with an element for each lane, masks as arrays of truth values; general and float registers are
unsigned, and floats of 32 bits have ones above them (20.2, NaN boxing). Source: RISC-V Instruction Set Manual, Volume
I, chapters 2, 13, 14, 20, 21 and 30.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...lane.arithmetic import fma32, fma64

Array = Any
Meaning = Callable[..., Any]
BITS = 64
ALL = (1 << BITS) - 1
_TYPES = {"f16": np.float16, "f32": np.float32, "f64": np.float64, "i8": np.int8, "i16": np.int16, "i32": np.int32,
          "i64": np.int64, "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64, "m": np.bool_}


def dtype_of(name: str) -> Any:
    return np.dtype(_TYPES[name])


def _signed(number: int, bits: int = BITS) -> int:
    number &= (1 << bits) - 1
    return number - (1 << bits) if number >> (bits - 1) else number


# --- General registers ------------------------------------------------------------------------------------------------

def same(value: Any) -> Any:
    return value


def number(value: int) -> int:
    return value & ALL


def upper(value: int) -> int:
    """20 bits above 12 of 0, sign-extended."""
    return _signed(value << 12, 32) & ALL


def add(a: int, b: int) -> int:
    return a + b & ALL


def add_word(a: int, b: int) -> int:
    return _signed(a + b, 32) & ALL


def subtract(a: int, b: int) -> int:
    return a - b & ALL


def multiply(a: int, b: int) -> int:
    return a * b & ALL


def multiply_high(a: int, b: int) -> int:
    """The upper half of a product with signs."""
    return _signed(a) * _signed(b) >> BITS & ALL


def negate(a: int) -> int:
    return -a & ALL


def _truncated(x: int, y: int) -> int:
    return (abs(x) // abs(y)) * (1 if (x < 0) == (y < 0) else -1)


def divide(a: int, b: int) -> int:
    """Towards 0; by 0 it is -1."""
    return (_truncated(_signed(a), _signed(b)) if b else -1) & ALL


def divide_unsigned(a: int, b: int) -> int:
    """By 0 it is all ones."""
    return a // b if b else ALL


def remainder(a: int, b: int) -> int:
    """With the sign of a; by 0 it is a."""
    return a if not b else _signed(a) - _signed(b) * _truncated(_signed(a), _signed(b)) & ALL


def bit_and(a: Any, b: Any) -> Any:
    return a & b & ALL if isinstance(a, int) else a & b


def bit_or(a: Any, b: Any) -> Any:
    return (a | b) & ALL if isinstance(a, int) else a | b


def bit_xor(a: Any, b: Any) -> Any:
    return (a ^ b) & ALL if isinstance(a, int) else a ^ b


def smaller_number(a: int, b: int) -> int:
    return a if _signed(a) < _signed(b) else b


def larger_number(a: int, b: int) -> int:
    return a if _signed(a) > _signed(b) else b


def positive(a: int) -> int:
    return larger_number(a, 0)


def less(a: int, b: int) -> int:
    return int(_signed(a) < _signed(b))


def is_zero(a: int) -> int:
    return int(not a)


def is_not_zero(a: int) -> int:
    return int(a != 0)


def shift_left(a: int, amount: int) -> int:
    return a << amount % BITS & ALL


def shift_right(a: int, amount: int) -> int:
    return a >> amount % BITS


def shift_right_signed(a: int, amount: int) -> int:
    return _signed(a) >> amount % BITS & ALL


# --- Memory and floats ------------------------------------------------------------------------------------------------

def loaded(bits: int, signed: bool = False) -> Meaning:
    return lambda memory: _signed(memory, bits) & ALL if signed else memory


def stored(bits: int) -> Meaning:
    return lambda value: value & (1 << bits) - 1


def added_to(bits: int) -> Meaning:
    """What memory held, and what it holds then."""
    return lambda value, memory: (_signed(memory, bits) & ALL, memory + value & (1 << bits) - 1)


def swapped_with(bits: int) -> Meaning:
    """What memory held, and what it holds then."""
    return lambda value, memory: (_signed(memory, bits) & ALL, value & (1 << bits) - 1)


def boxed(bits: int) -> Meaning:
    """A float register with a float of so many bits."""
    return lambda value: value & (1 << bits) - 1 | ALL >> bits << bits


def word_of_float(value: int) -> int:
    return _signed(value, 32) & ALL


def half_to_single(value: int) -> int:
    half = np.uint16(value & 0xFFFF).view(np.float16) if value >> 16 == ALL >> 16 else np.float16(np.nan)
    return int(boxed(32)(int(np.float32(half).view(np.uint32))))


def of_floats(operation: Callable[..., Any], bits: int, made_bits: int = 0) -> Meaning:
    """An operation on scalars of so many bits in float registers. made_bits: of the result, where it has others."""
    taken, made = np.dtype(f"f{bits // 8}"), np.dtype(f"f{(made_bits or bits) // 8}")

    def unboxed(value: int) -> Any:
        whole = bits == BITS or value >> bits == ALL >> bits
        return np.frombuffer((value & (1 << bits) - 1).to_bytes(bits // 8, "little"), taken)[0] if whole \
            else taken.type(np.nan)

    def rule(*values: int) -> int:
        result = np.asarray(operation(*map(unboxed, values))).astype(made)
        result = np.where(np.isnan(result), made.type(np.nan), result)      # of NaNs there is one
        return int(boxed(8 * made.itemsize)(int.from_bytes(result.tobytes(), "little")))
    return rule


def float_of_number(bits: int) -> Meaning:
    dtype = np.dtype(f"f{bits // 8}")

    def rule(value: int) -> int:
        made = np.asarray(np.int64(_signed(value))).astype(dtype)
        return int(boxed(bits)(int.from_bytes(made.tobytes(), "little")))
    return rule


# --- Vectors ----------------------------------------------------------------------------------------------------------

def number_row(value: int, count: int, size: int) -> Array:
    """The low bits of a number in each lane."""
    return np.full(count, value & (1 << 8 * size) - 1, f"u{size}").view(f"i{size}")


def by_number(meaning: Meaning) -> Meaning:
    """The last operand is a number, whose low bits are in each lane."""
    def rule(*values: Any) -> Any:
        *others, a, b = values
        return meaning(*others, a, number_row(b, len(a), a.itemsize).view(a.dtype))
    return rule


def by_float(meaning: Meaning) -> Meaning:
    """The last operand is a float register."""
    def rule(*values: Any) -> Any:
        *others, a, b = values
        return meaning(*others, a, float_row(b, len(a), a.itemsize))
    return rule


def float_row(value: int, count: int, size: int) -> Array:
    """A float register in each lane: NaN where it is no float of that size."""
    if value >> 8 * size != ALL >> 8 * size:
        return np.full(count, np.nan, f"f{size}")
    return np.full(count, value & (1 << 8 * size) - 1, f"u{size}").view(f"f{size}")


def scalar_between(meaning: Meaning, spread: Callable[[int, int, int], Array]) -> Meaning:
    """(row, scalar, row): the scalar is spread."""
    return lambda own, scalar, row: meaning(own, spread(scalar, len(row), row.itemsize), row)


def add_rows(a: Array, b: Array) -> Array:
    return a + b


def subtract_rows(a: Array, b: Array) -> Array:
    return a - b


def subtract_from(a: Array, b: Array) -> Array:
    return b - a


def multiply_rows(a: Array, b: Array) -> Array:
    return a * b


def divide_floats(a: Array, b: Array) -> Array:
    return a / b


def divide_by(a: Array, b: Array) -> Array:
    return b / a


def divide_rows(a: Array, b: Array) -> Array:
    return _lane_by_lane(a, b, divide)


def remainder_rows(a: Array, b: Array) -> Array:
    return _lane_by_lane(a, b, remainder)


def _lane_by_lane(a: Array, b: Array, meaning: Callable[[int, int], int]) -> Array:
    bits = 8 * a.itemsize
    return np.array([_signed(meaning(int(x) & ALL, int(y) & ALL), bits) for x, y in zip(a, b, strict=True)], a.dtype)


def larger(a: Array, b: Array) -> Array:
    return np.maximum(a, b)


def smaller(a: Array, b: Array) -> Array:
    return np.minimum(a, b)


def multiply_add(total: Array, a: Array, b: Array) -> Array:
    return total + a * b


def _fma(a: Array, b: Array, c: Array) -> Array:
    return fma32(a, b, c) if a.itemsize == 4 else fma64(a, b, c)


def fused(total: Array, a: Array, b: Array) -> Array:
    return _fma(a, b, total)


def fused_negative(total: Array, a: Array, b: Array) -> Array:
    return _fma(-a, b, total)


def fused_factor(factor: Array, a: Array, b: Array) -> Array:
    return _fma(factor, a, b)


def fused_negative_factor(factor: Array, a: Array, b: Array) -> Array:
    return _fma(-factor, a, b)


def equal(a: Array, b: Array) -> Array:
    return a == b


def unequal(a: Array, b: Array) -> Array:
    return a != b


def below(a: Array, b: Array) -> Array:
    return a < b


def at_most(a: Array, b: Array) -> Array:
    return a <= b


def above(a: Array, b: Array) -> Array:
    return a > b


def at_least(a: Array, b: Array) -> Array:
    return a >= b


def _bits(a: Array) -> Array:
    return a.view(f"u{a.itemsize}")


def _sign(a: Array) -> Array:
    return a.dtype.type(1 << 8 * a.itemsize - 1)


def with_sign(a: Array, b: Array) -> Array:
    return (_bits(a) & ~_sign(_bits(a)) | _bits(b) & _sign(_bits(a))).view(a.dtype)


def negative(a: Array) -> Array:
    return (_bits(a) ^ _sign(_bits(a))).view(a.dtype)


def absolute(a: Array) -> Array:
    return (_bits(a) & ~_sign(_bits(a))).view(a.dtype)


def root(a: Array) -> Array:
    return np.sqrt(a)


def shift_left_rows(a: Array, b: Array) -> Array:
    return a << (b & b.dtype.type(8 * a.itemsize - 1))


def shift_right_rows(a: Array, b: Array) -> Array:
    return a >> (b & b.dtype.type(8 * a.itemsize - 1)).astype(a.dtype)


def narrowed_right(name: str) -> Meaning:
    """Shifted to the right, the lower half of the bits."""
    return lambda a, amount: (a >> a.dtype.type(amount % (8 * a.itemsize))).astype(dtype_of(name))


def chosen(b: Array, a: Array, mask: Array) -> Array:
    return np.where(mask, a, b)


def chosen_number(b: Array, a: int, mask: Array) -> Array:
    return chosen(b, number_row(a, len(b), b.itemsize).view(b.dtype), mask)


def chosen_float(b: Array, a: int, mask: Array) -> Array:
    return chosen(b, float_row(a, len(b), b.itemsize), mask)


def extended(name: str) -> Meaning:
    return lambda old, a: a.astype(dtype_of(name))


def spread_number(count: int, bits: int) -> Meaning:
    return lambda value: np.full(count, value & (1 << bits) - 1, f"u{bits // 8}")


def spread_float(count: int, bits: int) -> Meaning:
    return lambda value: float_row(value, count, bits // 8)


def numbers(count: int, bits: int) -> Meaning:
    return lambda: np.arange(count, dtype=f"u{bits // 8}")


def first_number(a: Array) -> int:
    return _signed(int(a[0]), 8 * a.itemsize) & ALL


def _saturated(a: Array, made: Any) -> Array:
    """Whole numbers as integers: NaN is the largest, and so is what is too large."""
    limits = np.iinfo(made)
    inside = (a >= float(limits.min)) & (a < -float(limits.min))
    whole = np.where(inside, a, 0).astype(made)
    return np.where(inside, whole, np.where((a > 0) | np.isnan(a), limits.max, limits.min)).astype(made)


def to_integer(name: str) -> Meaning:
    return lambda *values: _saturated(np.trunc(values[-1]), dtype_of(name))


def to_nearest(name: str) -> Meaning:
    return lambda *values: _saturated(np.rint(values[-1]), dtype_of(name))


def converted(name: str) -> Meaning:
    return lambda *values: values[-1].astype(dtype_of(name))


def masked(meaning: Meaning) -> Meaning:
    """Of lanes that are on; others stay."""
    def rule(old: Array, *values: Any) -> Any:
        return np.where(values[-1], meaning(*values[:-1]), old)
    return rule


def loaded_where(old: Array, memory: Array, mask: Array) -> Array:
    return np.where(mask, memory, old)


def stored_where(memory: Array, value: Array, mask: Array) -> Array:
    return np.where(mask, value, memory)


def gathered(old: Array, a: Array, places: Array) -> Array:
    """Lanes by their numbers; 0 beyond the last."""
    inside = places < len(a)
    return np.where(inside, a[np.where(inside, places, 0)], 0).astype(a.dtype)


def gathered_number(old: Array, a: Array, place: int) -> Array:
    return gathered(old, a, np.full(len(a), place, np.uint64))


def gathered_where(old: Array, a: Array, places: Array, mask: Array) -> Array:
    return np.where(mask, gathered(old, a, places), old)


def slid_up_where(old: Array, a: Array, distance: int, mask: Array) -> Array:
    made = old.copy()
    made[distance:] = np.where(mask, np.roll(a, distance), old)[distance:]
    return made


def slid_down_where(old: Array, a: Array, distance: int, mask: Array) -> Array:
    moved = np.concatenate([a[distance:], np.zeros(min(distance, len(a)), a.dtype)])
    return np.where(mask, moved, old)


def mask_and(a: Array, b: Array) -> Array:
    return a & b


def mask_or(a: Array, b: Array) -> Array:
    return a | b


def mask_xor(a: Array, b: Array) -> Array:
    return a ^ b


def mask_not(a: Array) -> Array:
    return ~a


def how_many(a: Array) -> int:
    return int(np.count_nonzero(a))
