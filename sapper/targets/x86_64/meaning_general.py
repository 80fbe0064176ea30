"""What the rows of general registers and opmasks compute, as Python integers: the helpers that instructions.py names.

Enters: unsigned ints (see `Row.meaning`). Leaves: the same, and flags by their letters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .meaning_values import Array, Meaning, number, plain, raw_bytes, select

# --- Integers and flags --------------------------------------------------------------------------------------------

def _flags_of(result: int, size: int, **more: int) -> dict[str, int]:
    """s, z and p of `result`; p is over its low byte."""
    return {"s": result >> (size - 1) & 1, "z": plain(result == 0), "p": 1 - ((result & 0xFF).bit_count() & 1), **more}


def _sum(a: int, b: int, carry: int, size: int) -> tuple[int, dict[str, int]]:
    full = a + b + carry
    result = full & ((1 << size) - 1)
    overflow = (~(a ^ b) & (a ^ result)) >> (size - 1) & 1
    return result, _flags_of(result, size, c=full >> size, o=overflow, a=(a ^ b ^ result) >> 4 & 1)


def _difference(a: int, b: int, borrow: int, size: int) -> tuple[int, dict[str, int]]:
    full = a - b - borrow
    result = full & ((1 << size) - 1)
    overflow = ((a ^ b) & (a ^ result)) >> (size - 1) & 1
    return result, _flags_of(result, size, c=plain(full < 0), o=overflow, a=(a ^ b ^ result) >> 4 & 1)


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
    sign = 1 << (size - 1)
    return (value ^ sign) - sign


def imul(size: int) -> Meaning:
    def compute(a: int, b: int) -> tuple[int, dict[str, int]]:
        full = signed(a, size) * signed(b, size)
        result = full & ((1 << size) - 1)
        overflow = plain(signed(result, size) != full)
        return result, {"c": overflow, "o": overflow}
    return compute


def copy(a: Any) -> Any:
    return a


def condition(code: int) -> Callable[[dict[str, int]], int]:
    """The condition of Jcc number `code` (SDM volume 1, appendix B) as a function of the flags: 0 or 1."""
    tests: tuple[Callable[[dict[str, int]], int], ...] = (
        lambda f: f["o"], lambda f: f["c"], lambda f: f["z"], lambda f: f["c"] | f["z"], lambda f: f["s"],
        lambda f: f["p"], lambda f: f["s"] ^ f["o"], lambda f: f["z"] | (f["s"] ^ f["o"]),
    )
    positive = tests[code >> 1]
    return (lambda flags: 1 ^ positive(flags)) if code & 1 else positive


def set_condition(holds: Callable[[dict[str, int]], int]) -> Meaning:
    return holds


def conditional_move(holds: Callable[[dict[str, int]], int]) -> Meaning:
    return lambda a, b, flags: select(holds(flags), b, a)


# --- Opmasks, wider general-register operations -------------------------------------------------------------------

def mask_binary(operation: Callable[[int, int], int], size: int) -> Meaning:
    limit = (1 << size) - 1
    return lambda a, b: operation(a, b) & limit


def mask_invert(size: int) -> Meaning:
    limit = (1 << size) - 1
    return lambda a: ~a & limit


def mask_test_zero(size: int) -> Meaning:
    """kortest: z if no bit of the union is on, c if all are."""
    limit = (1 << size) - 1
    def compute(a: int, b: int) -> dict[str, int]:
        both = (a | b) & limit
        return {"z": plain(both == 0), "c": plain(both == limit), "o": 0, "s": 0, "a": 0, "p": 0}
    return compute


def mask_test_common(size: int) -> Meaning:
    """ktest: z if a & b is 0, c if ~a & b is 0."""
    limit = (1 << size) - 1
    return lambda a, b: {"z": plain(a & b & limit == 0), "c": plain(~a & b & limit == 0),
                         "o": 0, "s": 0, "a": 0, "p": 0}


def mask_shift(size: int, left: bool) -> Meaning:
    limit = (1 << size) - 1
    def compute(a: int, imm: int) -> int:
        if imm >= size:
            return 0
        return (a << imm) & limit if left else (a & limit) >> imm
    return compute


def mask_unpack(half: int) -> Meaning:
    low = (1 << half) - 1
    return lambda a, b: (a & low) << half | b & low


def low_bits(size: int) -> Meaning:
    limit = (1 << size) - 1
    return lambda a: a & limit


def test_vector(signs_of: int) -> Meaning:
    """vptest (signs_of 0), vtestps, vtestpd (sign bits of lanes of so many bits): z if a & b is 0, c if ~a & b is."""
    def compute(a: Array, b: Array) -> dict[str, int]:
        both, rest = a & b, ~a & b
        if signs_of:
            both, rest = both >> (signs_of - 1), rest >> (signs_of - 1)
        return {"z": plain((both == 0).all()), "c": plain((rest == 0).all()), "o": 0, "s": 0, "a": 0, "p": 0}
    return compute


def shift_general(kind: str) -> Callable[[int], Meaning]:
    """shl, shr, sar, rol, ror of a general register: with flags where the count says that they are defined."""
    def sized(size: int) -> Meaning:
        limit = (1 << size) - 1
        def compute(a: int, count: int) -> tuple[int, dict[str, int]]:
            n = count & (63 if size == 64 else 31)
            if kind in ("rol", "ror"):
                turn = (n if kind == "rol" else -n) % size
                return (a << turn | a >> (size - turn)) & limit if turn else a, {}
            value = {"shl": a << n & limit, "shr": a >> n, "sar": signed(a, size) >> n & limit}[kind]
            if n == 0:
                return value, {}
            carry = a >> (size - n) & 1 if kind == "shl" else signed(a, size) >> (n - 1) & 1
            flags = _flags_of(value, size, c=carry)
            del flags["p"]
            if n == 1:
                flags["o"] = {"shl": (value >> (size - 1) & 1) ^ carry, "shr": a >> (size - 1) & 1, "sar": 0}[kind]
            return value, {**flags, "p": _flags_of(value, size)["p"]}
        return compute
    return sized


def shift_without_flags(kind: str) -> Callable[[int], Meaning]:
    return lambda size: lambda a, count: shift_general(kind)(size)(a, count & (size - 1))[0]


def negate(size: int) -> Meaning:
    return lambda a: _difference(0, a, 0, size)


def increment(step: int) -> Callable[[int], Meaning]:
    def sized(size: int) -> Meaning:
        def compute(a: int) -> tuple[int, dict[str, int]]:
            value, flags = _sum(a, 1, 0, size) if step > 0 else _difference(a, 1, 0, size)
            del flags["c"]
            return value, flags
        return compute
    return sized


def invert(size: int) -> Meaning:
    return lambda a: ~a & ((1 << size) - 1)


def sign_extend(source: int, size: int) -> Meaning:
    return lambda a: signed(a & ((1 << source) - 1), source) & ((1 << size) - 1)


def sign_fill(size: int) -> Meaning:
    """cdq, cqo: register 2 gets the sign of register 0."""
    return lambda a: -(a >> (size - 1) & 1) & ((1 << size) - 1)


def divide(is_signed: bool) -> Callable[[int], Meaning]:
    """div, idiv: operand, low half, high half -> quotient, remainder (towards zero); OverflowError as it would trap."""
    def sized(size: int) -> Meaning:
        limit = (1 << size) - 1
        def compute(divisor: int, low: int, high: int) -> tuple[int, int]:
            dividend = high << size | low
            if is_signed:
                dividend, divisor = signed(dividend, 2 * size), signed(divisor, size)
            if divisor == 0:
                raise OverflowError("division by zero traps")
            quotient = abs(dividend) // abs(divisor)
            remainder = abs(dividend) % abs(divisor)
            if (dividend < 0) != (divisor < 0):
                quotient = -quotient
            if dividend < 0:
                remainder = -remainder
            low_limit, high_limit = (-(1 << size - 1), (1 << size - 1) - 1) if is_signed else (0, limit)
            if not low_limit <= quotient <= high_limit:
                raise OverflowError("a quotient that does not fit traps")
            return quotient & limit, remainder & limit
        return compute
    return sized


def multiply_wide(is_signed: bool) -> Callable[[int], Meaning]:
    """mul, imul with one operand: operand, register 0 -> low half, high half."""
    def sized(size: int) -> Meaning:
        limit = (1 << size) - 1
        def compute(a: int, b: int) -> tuple[int, int, dict[str, int]]:
            full = signed(a, size) * signed(b, size) if is_signed else a * b
            low, high = full & limit, full >> size & limit
            lost = plain(signed(low, size) != full) if is_signed else plain(high != 0)
            return low, high, {"c": lost, "o": lost}
        return compute
    return sized


def multiply_no_flags(size: int) -> Meaning:
    """mulx: operand, register 2 -> high half, low half."""
    limit = (1 << size) - 1
    return lambda a, b: (a * b >> size, a * b & limit)


def exchange_add(size: int) -> Meaning:
    """xadd: destination, source -> sum, old destination."""
    def compute(a: int, b: int) -> tuple[int, int, dict[str, int]]:
        total, flags = _sum(a, b, 0, size)
        return total, a, flags
    return compute


def exchange(a: int, b: int) -> tuple[int, int]:
    return b, a


def compare_exchange(size: int) -> Meaning:
    """cmpxchg: destination, source, register 0 -> destination, register 0."""
    def compute(a: int, b: int, expected: int) -> tuple[int, int, dict[str, int]]:
        flags = _difference(expected, a, 0, size)[1]
        same = a == expected
        return select(same, b, a), select(same, expected, a), flags
    return compute


def count_bits(size: int) -> Meaning:
    return lambda a: (a.bit_count(), {"z": plain(a == 0), "c": 0, "o": 0, "s": 0, "a": 0, "p": 0})


def count_trailing(size: int) -> Meaning:
    def compute(a: int) -> tuple[int, dict[str, int]]:
        n = (a & -a).bit_length() - 1 if a else size
        return n, {"c": int(a == 0), "z": int(n == 0)}
    return compute


def count_leading(size: int) -> Meaning:
    def compute(a: int) -> tuple[int, dict[str, int]]:
        n = size - a.bit_length()
        return n, {"c": int(a == 0), "z": int(n == 0)}
    return compute


def scan(reverse: bool) -> Callable[[int], Meaning]:
    """bsf, bsr: old destination, source; the destination stays where the source is 0 (as both vendors do)."""
    def sized(size: int) -> Meaning:
        def compute(old: int, a: int) -> tuple[int, dict[str, int]]:
            if a == 0:
                return old, {"z": 1}
            return (a.bit_length() - 1 if reverse else (a & -a).bit_length() - 1), {"z": 0}
        return compute
    return sized


def zero_high(size: int) -> Meaning:
    """bzhi: bits from `index[7:0]` up become 0."""
    def compute(a: int, index: int) -> tuple[int, dict[str, int]]:
        n = index & 0xFF
        value = a & ((1 << min(n, size)) - 1)
        flags = _flags_of(value, size, c=plain(n > size - 1), o=0)
        return value, {k: v for k, v in flags.items() if k in "szco"}
    return compute


def and_not(size: int) -> Meaning:
    def compute(a: int, b: int) -> tuple[int, dict[str, int]]:
        value = ~a & b
        return value, {k: v for k, v in _flags_of(value, size, c=0, o=0).items() if k in "szco"}
    return compute


def reset_lowest(size: int) -> Meaning:
    """blsr."""
    def compute(a: int) -> tuple[int, dict[str, int]]:
        value = a & (a - 1)
        return value, {k: v for k, v in _flags_of(value, size, c=plain(a == 0), o=0).items() if k in "szco"}
    return compute


def extract_bits(size: int) -> Meaning:
    """pext."""
    def compute(a: int, mask: int) -> int:
        places = [i for i in range(size) if mask >> i & 1]
        return sum((a >> place & 1) << i for i, place in enumerate(places))
    return compute


def deposit_bits(size: int) -> Meaning:
    """pdep."""
    def compute(a: int, mask: int) -> int:
        places = [i for i in range(size) if mask >> i & 1]
        return sum((a >> i & 1) << place for i, place in enumerate(places))
    return compute


def bit_test(size: int) -> Meaning:
    return lambda a, index: {"c": a >> (index & (size - 1)) & 1}


def swap_bytes(size: int) -> Meaning:
    return lambda a: number(raw_bytes(a, size // 8)[::-1])
