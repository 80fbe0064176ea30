"""What the rows that move lanes or compute with integers in them do, as NumPy: the helpers that instructions.py names.

Enters: arrays of lanes and unsigned Python ints (see `Row.meaning`), or ones whose values are not known
(sapper/assembly/symbolic.py): what moves or combines bits works on both. Leaves: the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .meaning_values import Array, Meaning, mask_bits, number, one_lane, plain, taken

# --- Moves between lanes -------------------------------------------------------------------------------------------

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


# --- Integers ------------------------------------------------------------------------------------------------------

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
