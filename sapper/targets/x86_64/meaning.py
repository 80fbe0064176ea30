"""What the rows compute, as NumPy over lanes and Python integers: the helpers that instructions.py names.

Enters: arrays of lanes and unsigned Python ints (see `Row.meaning`), or ones whose values are not known
(sapper/assembly/symbolic.py): what moves or combines bits works on both. Leaves: the same. Holds: floating point rounds
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

Array = Any
Meaning = Callable[..., Any]

_BITS: dict[str, Any] = {"float32": np.uint32, "float64": np.uint64}
_QUIET = {"float32": np.uint32(1 << 22), "float64": np.uint64(1 << 51)}
_DEFAULT_NAN: dict[str, Any] = {"float32": np.uint32(0xFFC00000), "float64": np.uint64(0xFFF8000000000000)}


# --- Between arrays and ints: what is not known does it by its own method -------------------------------------------

def plain(value: Any) -> Any:
    """A truth, a lane or a NumPy integer as an int."""
    return value.integer() if hasattr(value, "integer") else int(value)


def number(raw: Array) -> Any:
    """Bytes as an int, the lowest first."""
    return raw.number() if hasattr(raw, "number") else int.from_bytes(raw.tobytes(), "little")


def raw_bytes(value: Any, size_bytes: int) -> Array:
    """The low bytes of an int."""
    if hasattr(value, "bytes"):
        return value.bytes(size_bytes)
    low = int(value) & ((1 << 8 * size_bytes) - 1)
    return np.frombuffer(low.to_bytes(size_bytes, "little"), np.uint8)


def mask_bits(mask: Any, lanes: int) -> Array:
    """The low bits of an int as truths."""
    return mask.bits(lanes) if hasattr(mask, "bits") else np.array([mask >> i & 1 for i in range(lanes)], bool)


def one_lane(value: Any, dtype: Any) -> Array:
    """The low bits of an int as an array of one element."""
    if hasattr(value, "lane"):
        return value.lane(dtype)
    return np.array([value & ((1 << 8 * np.dtype(dtype).itemsize) - 1)], dtype)


def select(truth: Any, then: Any, otherwise: Any) -> Any:
    """then if an int is not 0."""
    return truth.chosen(then, otherwise) if hasattr(truth, "chosen") else then if truth else otherwise


def taken(table: Array, index: Array) -> Array:
    """table[index]."""
    return index.taken_from(table) if hasattr(index, "taken_from") else table[index]


def padded(value: Array, size_bytes: int) -> Array:
    """Bytes with zeros behind them."""
    return np.concatenate([value[:size_bytes], np.zeros(max(0, size_bytes - len(value)), np.uint8)])


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


# --- Floating point ------------------------------------------------------------------------------------------------

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


# --- Lanes: moves between them ------------------------------------------------------------------------------------

def broadcast(lanes: int) -> Meaning:
    """Lane 0 in `lanes` lanes; an integer is a general register."""
    return lambda a: np.repeat(a[:1], lanes)


def broadcast_general(lanes: int, bits: int) -> Meaning:
    dtype = np.dtype(f"u{bits // 8}")
    return lambda a: np.repeat(one_lane(a, dtype), lanes)


def repeat(times: int) -> Meaning:
    """The whole operand `times` times."""
    return lambda a: np.tile(a, times)


def by_128(a: Array) -> Array:
    """Lanes in rows of 128 bits."""
    return a.reshape(-1, 16 // a.itemsize)


def interleave(high: bool) -> Meaning:
    """unpcklo and unpckhi: halves of each 128 bits of two sources, alternating."""
    def compute(a: Array, b: Array) -> Array:
        x, y = by_128(a), by_128(b)
        half = x.shape[1] // 2
        part = slice(half, None) if high else slice(0, half)
        return np.stack([x[:, part], y[:, part]], axis=2).reshape(-1)
    return compute


def pack(target: str) -> Meaning:
    """Saturate both sources' lanes to `target`, 128 bits at a time."""
    dtype = np.dtype(target)
    limits = np.iinfo(dtype)
    def compute(a: Array, b: Array) -> Array:
        both = np.concatenate([by_128(a), by_128(b)], axis=1).astype(np.int64)
        return np.clip(both, limits.min, limits.max).astype(dtype).reshape(-1)
    return compute


def shuffle_two(a: Array, b: Array, imm: int) -> Array:
    """shufps, shufpd: the low half of each 128 bits from `a`, the high half from `b`."""
    x, y = by_128(a), by_128(b)
    out = np.empty_like(x)
    for row in range(len(x)):
        if x.shape[1] == 4:
            out[row] = (x[row, imm & 3], x[row, imm >> 2 & 3], y[row, imm >> 4 & 3], y[row, imm >> 6 & 3])
        else:
            out[row] = (x[row, imm >> 2 * row & 1], y[row, imm >> 2 * row + 1 & 1])
    return out.reshape(-1)


def shuffle_one(a: Array, imm: int) -> Array:
    """pshufd, permilps, permilpd: `shuffle_two` of one source."""
    return shuffle_two(a, a, imm)


def shuffle_words(high: bool) -> Meaning:
    def compute(a: Array, imm: int) -> Array:
        out = by_128(a).copy()
        base = 4 if high else 0
        for lane in range(4):
            out[:, base + lane] = by_128(a)[:, base + (imm >> 2 * lane & 3)]
        return out.reshape(-1)
    return compute


def permute_in_128(a: Array, index: Array) -> Array:
    """vpermilps, vpermilpd with a control vector."""
    x, selector = by_128(a), by_128(index)
    chosen = selector & 3 if x.shape[1] == 4 else selector >> 1 & 1
    return np.take_along_axis(x, chosen.astype(np.int64), axis=1).reshape(-1)


def shuffle_bytes(a: Array, index: Array) -> Array:
    x, selector = by_128(a), by_128(index)
    out = np.take_along_axis(x, (selector & 15).astype(np.int64), axis=1)
    out[selector & 0x80 != 0] = 0
    return out.reshape(-1)


def permute(index: Array, a: Array) -> Array:
    """Any lane to any lane: index first, as in vpermps, vpermd."""
    return taken(a, (index & (len(a) - 1)).astype(np.int64))


def permute_immediate(a: Array, imm: int) -> Array:
    """vpermq, vpermpd: lanes of each 256 bits."""
    x = a.reshape(-1, 4)
    return x[:, [imm >> 2 * lane & 3 for lane in range(4)]].reshape(-1)


def permute_two(table: Array, index: Array, other: Array) -> Array:
    """vpermt2*: the first operand is overwritten, `index` chooses from both tables."""
    return taken(np.concatenate([table, other]), (index & (2 * len(table) - 1)).astype(np.int64))


def permute_two_index(index: Array, table: Array, other: Array) -> Array:
    """vpermi2*: the index is overwritten."""
    return permute_two(table, index.view(table.dtype) if index.dtype.kind == "f" else index, other)


def permute_halves(a: Array, b: Array, imm: int) -> Array:
    """vperm2f128, vperm2i128."""
    quarters = [*a.reshape(2, -1), *b.reshape(2, -1)]
    parts = [np.zeros_like(quarters[0]) if imm >> 4 * half & 8 else quarters[imm >> 4 * half & 3] for half in (0, 1)]
    return np.concatenate(parts)


def shuffle_128(a: Array, b: Array, imm: int) -> Array:
    """vshuff32x4 and its kin: 128-bit parts, the low half of the result from `a`, the high from `b`."""
    x, y = by_128(a), by_128(b)
    if len(x) == 2:
        return np.concatenate([x[imm & 1], y[imm >> 1 & 1]])
    return np.concatenate([x[imm & 3], x[imm >> 2 & 3], y[imm >> 4 & 3], y[imm >> 6 & 3]])


def align_lanes(a: Array, b: Array, imm: int) -> Array:
    """valignd, valignq: a above b, shifted right by lanes."""
    start = imm & (len(a) - 1)
    return np.concatenate([b, a])[start:start + len(a)]


def align_bytes(a: Array, b: Array, imm: int) -> Array:
    """vpalignr: the same by bytes in each 128 bits."""
    joined = np.concatenate([by_128(b), by_128(a), np.zeros_like(by_128(a))], axis=1)
    start = min(imm, 32)
    return joined[:, start:start + 16].reshape(-1)


def insert_part(a: Array, b: Array, imm: int) -> Array:
    start = imm % (len(a) // len(b)) * len(b)
    return np.concatenate([a[:start], b, a[start + len(b):]])


def extract_part(bits: int) -> Meaning:
    def compute(a: Array, imm: int) -> Array:
        parts = a.reshape(-1, bits // (8 * a.itemsize))
        return parts[imm % len(parts)]
    return compute


def extract_lane(a: Array, imm: int) -> Any:
    return plain(a[imm & (len(a) - 1)])


def insert_lane(a: Array, value: int, imm: int) -> Array:
    return insert_part(a, one_lane(value, a.dtype), imm)


def duplicate(odd: bool) -> Meaning:
    """movshdup, movsldup, movddup: the odd or the even lanes twice."""
    return lambda a: np.repeat(a[int(odd)::2], 2)


def sign_bits(a: Array) -> Any:
    """movmskps, movmskpd, pmovmskb."""
    return pack_bits(a >> (8 * a.itemsize - 1) & 1)


def pack_bits(a: Array) -> Any:
    """Lane i's truth as bit i of an int."""
    return number(np.packbits(a != 0, bitorder="little"))


def masked_load(mask: Array, a: Array) -> Array:
    return np.where(top_bit(mask), a, np.zeros_like(a))


def top_bit(a: Array) -> Array:
    """True where the sign bit is set."""
    return a.view(f"i{a.itemsize}") < 0


def masked_store(old: Array, mask: Array, a: Array) -> Array:
    """vmaskmovps to memory: lanes that are off keep what was there."""
    return np.where(top_bit(mask), a, old)


def second(_: Any, b: Any) -> Any:
    return b


def gather_by_vector(old: Array, elements: Array, mask: Array) -> tuple[Array, Array]:
    """AVX2 gathers: the mask is a vector, and zero afterwards."""
    count = min(len(old), len(elements))
    out = np.zeros_like(old)
    out[:count] = np.where(top_bit(mask)[:count], elements[:count], old[:count])
    return out, np.zeros_like(mask)


def from_general(bits: int) -> Meaning:
    """A general register (or memory) in lane 0, zeros above."""
    dtype = np.dtype(f"u{bits // 8}")
    return lambda a: one_lane(a, dtype)


def to_general(a: Array) -> Any:
    return plain(a[0])


def permute_pairs(a: Array, imm: int) -> Array:
    """vpermilpd with an immediate: one bit for each lane."""
    return a[[i // 2 * 2 + (imm >> i & 1) for i in range(len(a))]]


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


# --- Lanes: integers ----------------------------------------------------------------------------------------------

def saturating(operation: Callable[[Array, Array], Array]) -> Meaning:
    def compute(a: Array, b: Array) -> Array:
        limits = np.iinfo(a.dtype)
        return np.clip(operation(a.astype(np.int64), b.astype(np.int64)), limits.min, limits.max).astype(a.dtype)
    return compute


def multiply_high(a: Array, b: Array) -> Array:
    return (a.astype(np.int64) * b.astype(np.int64) >> 16).astype(a.dtype)


def multiply_even(dtype: str) -> Meaning:
    """vpmuludq, vpmuldq: the low half of each 64-bit lane, zero- or sign-extended."""
    def compute(a: Array, b: Array) -> Array:
        x, y = (v.view(dtype)[::2].astype(np.int64).view(np.uint64) for v in (a, b))
        return x * y
    return compute


def multiply_add_words(a: Array, b: Array) -> Array:
    """vpmaddwd: pairs of i16 products added to i32 (wrapping)."""
    products = a.astype(np.int64) * b.astype(np.int64)
    return (products[::2] + products[1::2]).astype(np.int32)


def multiply_add_bytes(a: Array, b: Array) -> Array:
    """vpmaddubsw: u8 times i8, pairs added to i16 with saturation."""
    products = a.astype(np.int64) * b.view(np.int8).astype(np.int64)
    return np.clip(products[::2] + products[1::2], -32768, 32767).astype(np.int16)


def dot_product(group: int, unsigned: bool, saturate: bool) -> Meaning:
    """vpdpbusd, vpdpwssd: groups of `group` products added to an i32 accumulator."""
    def compute(total: Array, a: Array, b: Array) -> Array:
        x = a.view(np.uint8 if unsigned else np.int16).astype(np.int64)
        y = b.view(np.int8 if unsigned else np.int16).astype(np.int64)
        exact = total.astype(np.int64) + (x * y).reshape(-1, group).sum(axis=1)
        return (np.clip(exact, -(1 << 31), (1 << 31) - 1) if saturate else exact).astype(np.int32)
    return compute


def sum_of_differences(a: Array, b: Array) -> Array:
    """vpsadbw: |a - b| of eight bytes added to each u64."""
    return np.abs(a.astype(np.int64) - b.astype(np.int64)).reshape(-1, 8).sum(axis=1).astype(np.uint64)


def absolute(a: Array) -> Array:
    return np.where(a < 0, -a, a)


def shift_left(a: Array, count: Any) -> Array:
    return _shift(a, count, lambda x, n: x << n, 0)


def shift_right(a: Array, count: Any) -> Array:
    return _shift(a, count, lambda x, n: x >> n, 0)


def shift_right_signed(a: Array, count: Any) -> Array:
    x = a.view(f"i{a.itemsize}")
    bits = 8 * a.itemsize
    n = np.minimum(_count(count), np.uint64(bits - 1)).astype(x.dtype)
    return (x >> n).view(a.dtype)


def _count(count: Any) -> Array:
    """By how many places: one number, or one for each lane."""
    return count.astype(np.uint64) if isinstance(count, np.ndarray) else one_lane(count, np.uint64)


def _shift(a: Array, count: Any, operation: Callable[[Array, Array], Array], beyond: int) -> Array:
    bits = 8 * a.itemsize
    wide = _count(count)
    n = np.minimum(wide, np.uint64(bits - 1)).astype(a.dtype)
    return np.where(wide >= bits, a.dtype.type(beyond), operation(a, n)).astype(a.dtype)


def by_low_quadword(shift: Meaning) -> Meaning:
    """Shifts by the low 64 bits of an xmm register."""
    return lambda a, count: shift(a, count.view(np.uint64)[:1])


def shift_bytes(left: bool) -> Meaning:
    """vpslldq, vpsrldq: each 128 bits by whole bytes."""
    def compute(a: Array, imm: int) -> Array:
        x = by_128(a)
        n = min(imm, 16)
        zeros = np.zeros((len(x), n), np.uint8)
        parts = [zeros, x[:, :16 - n]] if left else [x[:, n:], zeros]
        return np.concatenate(parts, axis=1).reshape(-1)
    return compute


def rotate_left(a: Array, count: Any) -> Array:
    bits = 8 * a.itemsize
    n = _count(count).astype(a.dtype) & a.dtype.type(bits - 1)
    back = (a.dtype.type(bits) - n) & a.dtype.type(bits - 1)
    return np.where(n == 0, a, a << n | a >> back).astype(a.dtype)


def rotate_right(a: Array, count: Any) -> Array:
    bits = 8 * a.itemsize
    n = _count(count).astype(a.dtype) & a.dtype.type(bits - 1)
    return rotate_left(a, (a.dtype.type(bits) - n) & a.dtype.type(bits - 1))


def ternary_logic(a: Array, b: Array, c: Array, imm: int) -> Array:
    """vpternlog: bit a:b:c (a the most significant) of `imm`, for each bit."""
    out = np.zeros_like(a)
    for index in range(8):
        if imm >> index & 1:
            out = out | (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return out


def all_ones(truth: Array, dtype: Any) -> Array:
    """A comparison's result in a vector register: all bits on or off."""
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    return np.where(truth, ~unsigned.type(0), unsigned.type(0))


def compare_lanes(operation: Callable[[Array, Array], Array]) -> Meaning:
    return lambda a, b: all_ones(operation(a, b), a.dtype)


def compare_integers(a: Array, b: Array, imm: int) -> Array:
    """vpcmpd and its kin: predicates 0 to 7."""
    truth = (a == b, a < b, a <= b, np.zeros(len(a), bool))[imm & 3]
    return ~truth if imm & 4 else truth


_FLOAT_PREDICATES = (2, 1, 3, 8, 13, 14, 12, 7, 10, 9, 11, 0, 5, 6, 4, 15)
"""Which of less 1, equal 2, greater 4, unordered 8 make predicate n (and n + 16) of vcmpps true."""


def compare_floats(a: Array, b: Array, imm: int) -> Array:
    allowed = _FLOAT_PREDICATES[imm & 15]
    unordered = np.isnan(a) | np.isnan(b)
    truth = np.zeros(len(a), bool)
    for bit, holds in ((1, a < b), (2, a == b), (4, a > b), (8, unordered)):
        if allowed & bit:
            truth = truth | holds
    return truth


def compare_floats_lanes(a: Array, b: Array, imm: int) -> Array:
    return all_ones(compare_floats(a, b, imm), a.dtype)


def blend_by_vector(a: Array, b: Array, control: Array) -> Array:
    return np.where(top_bit(control), b, a)


def blend_by_immediate(a: Array, b: Array, imm: int) -> Array:
    """Bit i of `imm` takes lane i of b; vpblendw repeats the eight bits."""
    return np.where([imm >> (i & 7) & 1 for i in range(len(a))], b, a)


def narrow(dtype: str, saturate: bool) -> Meaning:
    """vpmovdb, vpmovsdb, vpmovusdb and their kin; the source's dtype says whether it is signed."""
    target = np.dtype(dtype)
    limits = np.iinfo(target)
    def compute(a: Array) -> Array:
        if not saturate:
            return a.astype(target)
        low = limits.min if a.dtype.kind == "i" else 0
        return np.clip(a, a.dtype.type(low), a.dtype.type(limits.max)).astype(target)
    return compute


def extend(dtype: str) -> Meaning:
    target = np.dtype(dtype)
    return lambda a: a.astype(target)


def from_mask(lanes: int, bits: int) -> Meaning:
    """vpmovm2b and its kin."""
    return lambda mask: all_ones(mask_bits(mask, lanes), f"u{bits // 8}")


# --- Lanes: floating point ----------------------------------------------------------------------------------------

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
    """vrcpps, vrsqrtps: denormal inputs count as zeros."""
    return lambda a: meaning(np.where(np.isnan(a), a, flush(a)))


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


# --- Running a row ------------------------------------------------------------------------------------------------

def _read(operand: Any, raw: Any) -> Any:
    """An operand's raw value (bytes of a vector or of memory, or an int) as its meaning takes it."""
    if not isinstance(raw, np.ndarray) or operand.kind == "tile" or operand.sibmem:
        return raw
    if operand.index_bits == 0 and operand.memory_bits:
        size_bytes = operand.memory_bits // 8
        if len(raw) > size_bytes:
            raw = raw[:size_bytes]
        elif operand.broadcast_bits and len(raw) == operand.broadcast_bits // 8:
            raw = np.tile(raw, size_bytes // len(raw))
    if operand.kind == "gpr" or operand.kind == "mask":
        return number(raw)
    return raw.view(f"{operand.dtype[0]}{int(operand.dtype[1:]) // 8}") if operand.dtype else number(raw)


def _merge(row: Any, result: Array, old: Array, first: Any, mask: int, zeroing: bool) -> Array:
    """`result` under the opmask. old: lanes of the destination before, at least as many."""
    lanes = len(result)
    if row.packing:
        on = mask_bits(mask, lanes)
        out = np.zeros_like(result) if zeroing else old[:lanes].copy()
        if row.packing == "compress":
            out[:on.sum()] = result[on]
        else:
            out[on] = result[:on.sum()]
        return out
    if row.scalar:
        off = np.zeros_like(result[:1]) if zeroing else old[:1]
        return np.concatenate([np.where(mask_bits(mask, 1), result[:1], off), result[1:]])
    off = np.zeros_like(result) if zeroing else (first if row.blend else old)[:lanes]
    # Through the bits, so that a NaN keeps its payload.
    bits = f"u{result.itemsize}"
    return np.where(mask_bits(mask, lanes), result.view(bits), off.view(bits)).view(result.dtype)


def execute(
    row: Any,
    operands: list[Any],
    in_memory: tuple[bool, ...],
    mask: int | None = None,
    zeroing: bool = False,
    flags: dict[str, int] | None = None,
    implicit: tuple[Any, ...] = (),
) -> tuple[list[Any], list[Any], dict[str, int], int | None]:
    """Run a row's meaning, opmask included.

    operands: one raw value for each explicit operand, before the instruction: uint8 arrays (a whole vector register of
        the operand's bits, the bytes of memory, one broadcast element, the gathered elements, the [rows][bytes] of a
        tile), ints for general registers, masks and immediates. in_memory: which of them are memory. implicit: of
        `row.implicit_reads`.
    Returns (operands afterwards, values of `row.implicit_writes`, defined flags written, opmask afterwards).
    Raises ValueError for a row without a meaning, OverflowError where the processor would trap.
    """
    if row.meaning is None:
        raise ValueError(f"row {row.name}: found no meaning; expected a row that computes values")
    specs = row.operands
    reads = [_read(o, v) for o, v in zip(specs, operands, strict=True) if o.reads or o.role == "a"]
    if row.flags_read:
        reads.append(flags)
    result = row.meaning(*reads, *implicit)
    values: list[Any] = list(result) if isinstance(result, tuple) else [result]
    written_flags = values.pop() if values and isinstance(values[-1], dict) else {}
    after = list(operands)
    for position, operand in enumerate(specs):
        if not operand.writes:
            continue
        value = values.pop(0)
        if operand.kind == "tile" or operand.sibmem:
            after[position] = np.ascontiguousarray(np.broadcast_to(value, operands[position].shape))
        elif operand.kind == "mask" and not in_memory[position]:
            after[position] = (pack_bits(value) if isinstance(value, np.ndarray) else plain(value)) \
                & (-1 if mask is None else mask) & ((1 << 64) - 1)
        elif operand.kind == "gpr" and not in_memory[position]:
            after[position] = plain(value) & ((1 << operand.bits) - 1)
        elif not isinstance(value, np.ndarray):
            after[position] = raw_bytes(value, operand.memory_bits // 8)
        else:
            old = operands[position]
            value = value if value.flags.c_contiguous else value.copy()
            if in_memory[position]:
                value = value[:len(old) // value.itemsize]
            if mask is not None:
                view = old[:len(old) // value.itemsize * value.itemsize].view(value.dtype)
                value = _merge(row, value, view, reads[0] if row.blend else None, mask, zeroing)
            after[position] = padded(value.view(np.uint8), len(old) if in_memory[position] else operand.bits // 8)
    mask_after = 0 if row.masking == "required" and mask is not None else mask
    return after, [v if isinstance(v, np.ndarray) else plain(v) for v in values], written_flags, mask_after
