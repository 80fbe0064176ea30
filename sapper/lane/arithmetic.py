"""What the pure ops of the lane IR compute, on NumPy vectors of `lanes` elements.

Enters: an op. Leaves: a function from the values of its operands to that of its result. Holds: each op means what its
line in sapper/lane/ops.py says; f32 arithmetic is rounded to f32 after each op, `fma` is rounded once. No vector is
changed in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..ir.nodes import Op, Value
from ..ir.types import (
    NARROW_FLOATS,
    DType,
    RowType,
    b32,
    bf16,
    bool_,
    f8e4m3,
    f8e5m2,
    f16,
    f32,
    f64,
    i8,
    i16,
    i32,
    i64,
    u8,
)

Array = NDArray[Any]

NUMPY_ROWS: dict[DType, np.dtype[Any]] = {
    f32: np.dtype(np.float32), f64: np.dtype(np.float64), i32: np.dtype(np.int32), i64: np.dtype(np.int64),
    b32: np.dtype(np.uint32),
}
"""What holds the lanes of a row."""

ELEMENTS: dict[DType, np.dtype[Any]] = {
    **NUMPY_ROWS, bf16: np.dtype(ml_dtypes.bfloat16), f16: np.dtype(np.float16), i8: np.dtype(np.int8),
    u8: np.dtype(np.uint8), i16: np.dtype(np.int16), bool_: np.dtype(np.uint8),
    f8e4m3: np.dtype(ml_dtypes.float8_e4m3fn), f8e5m2: np.dtype(ml_dtypes.float8_e5m2),
}
"""What holds elements in memory."""
ROW_OF_ELEMENTS: dict[DType, np.dtype[Any]] = {
    f32: NUMPY_ROWS[f32], **dict.fromkeys(NARROW_FLOATS, NUMPY_ROWS[f32]), f64: NUMPY_ROWS[f64],
    i64: NUMPY_ROWS[i64], b32: NUMPY_ROWS[b32], **dict.fromkeys((i8, u8, i16, i32, bool_), NUMPY_ROWS[i32]),
}
"""What they become in a row."""
LOW = (1 << 64) - 1


def wrap64(value: int) -> int:
    """The low 64 bits, as a signed integer."""
    value &= LOW
    return value - (1 << 64) if value >> 63 else value


# Arrays of no dimension: NumPy takes longer to make one of a scalar than for what is done with it.
_BELOW_F32, _HALF_F32 = np.array((1 << 29) - 1, np.uint64), np.array(1 << 28, np.uint64)
"""Bits of an f64 below those of an f32, and the half of the last one."""
_DENORMAL_F32, _ONE = np.array((0x381 << 53) - 1, np.uint64), np.array(1, np.uint64)
"""The magnitude's bits of 2**-126 as f64, doubled to lose the sign, less 1."""


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in f32, rounded once.

    The product of two 24-bit significands is exact in f64. The sum is rounded there to odd, and then to f32, which
    is the sum rounded once because 53 >= 24 + 2 (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums:
    proved algorithms using rounding to odd", 2008).
    """
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    bits = total.view(np.uint64)
    # Rounding twice goes wrong only at what looks like a tie of the second time, where all bits below are 0; the
    # rest of this is for those, and for results that have fewer bits (below 2**-126, but for 0).
    if np.count_nonzero((bits & _BELOW_F32) == _HALF_F32) or np.count_nonzero((bits + bits) - _ONE < _DENORMAL_F32):
        part = total - product
        error = (product - (total - part)) + (addend - part)  # exact (Knuth's two-sum)
        signed = total.view(np.int64)
        to_odd = (error != 0) & ((signed & 1) == 0) & np.isfinite(total)
        away = (error > 0) == (total > 0)  # the true sum is farther from zero than the rounded one
        total = np.where(to_odd, signed + np.where(away, 1, -1), signed).view(np.float64)
    return total.astype(np.float32)


def _fma64_one(a: float, b: float, c: float) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return a * b + c
    if not math.isfinite(c):
        return c  # whatever a * b would overflow to
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        # An exact zero is +0 unless both terms are -0 (IEEE 754, 6.3); a product of non-zeros must not underflow here.
        sign = math.copysign(1.0, a) * math.copysign(1.0, b)
        return -0.0 if sign < 0 and c == 0 and math.copysign(1.0, c) < 0 else 0.0
    try:
        rounded = exact.numerator / exact.denominator  # Python rounds a quotient of integers once, to nearest even
    except OverflowError:
        rounded = math.inf if exact > 0 else -math.inf
    return -0.0 if rounded == 0 and exact < 0 else rounded


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in f64, rounded once, by rational arithmetic."""
    return np.array([_fma64_one(*abc) for abc in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], np.float64)


def scale_exponent(a: Array, n: Array, least: Array | None = None) -> Array:
    """a * 2**floor(n), rounded once; with `least`, 0 where n is below that."""
    limit = 4200  # beyond the distance between the extremes of f64
    power = np.where(np.isfinite(n), np.clip(np.floor(n), -limit, limit), 0).astype(np.int32)
    scaled = np.ldexp(a, power)
    infinite = np.where(n > 0, a * a.dtype.type(np.inf), a * a.dtype.type(0))
    result = np.where(np.isinf(n), infinite, np.where(np.isnan(n), n, scaled))
    return result if least is None else np.where(n < least, result.dtype.type(0), result)


def cvt(value: Array, to: np.dtype[Any]) -> Array:
    """Conversion between rows; a float that does not fit an integer gives its lowest (unspecified by the lane IR)."""
    if value.dtype.kind == "f" and to.kind == "i":
        limit = 2.0 ** (8 * to.itemsize - 1)
        fits = (value >= -limit) & (value < limit)
        return np.where(fits, np.where(fits, value, 0).astype(to), np.iinfo(to).min)
    return value.astype(to)


def _unsigned(value: Any) -> Any:
    return value.view(np.uint32 if value.dtype.itemsize == 4 else np.uint64)


def _shift(name: str) -> Callable[[Any, Any], Any]:
    def left(a: Any, n: Any) -> Any:
        return (_unsigned(a) << (_unsigned(n) & (8 * a.dtype.itemsize - 1))).view(a.dtype)

    def logical(a: Any, n: Any) -> Any:
        return (_unsigned(a) >> (_unsigned(n) & (8 * a.dtype.itemsize - 1))).view(a.dtype)

    def arithmetic(a: Any, n: Any) -> Any:
        signed = a.view(np.int32 if a.dtype.itemsize == 4 else np.int64)
        return (signed >> (n.view(signed.dtype) & (8 * a.dtype.itemsize - 1))).view(a.dtype)

    return {"shl": left, "shr": logical, "sar": arithmetic}[name]


def _idiv(a: Array, b: Array) -> Array:
    """Floor division; 0 where the divisor is 0, as it may be in lanes that a mask has switched off."""
    return np.where(b == 0, a.dtype.type(0), np.where(b == -1, -a, np.floor_divide(a, np.where(b == 0, 1, b))))


def _imod(a: Any, b: Any) -> Any:
    return a - b * _idiv(a, b)


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


_MATH: dict[str, Callable[[Array], Array]] = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2, "tanh": np.tanh, "sigmoid": _sigmoid, "erf": _erf,
    "sin": np.sin, "cos": np.cos, "rsqrt": lambda x: 1 / np.sqrt(x), "reciprocal": lambda x: 1 / x,
}


def _in_f64(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """f32 functions are computed in f64 and rounded, which is within 0.51 ulp."""
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}


def _dot2(acc: Array, a: Array, b: Array) -> Array:
    """The odd pair first, each product added with one rounding; denormals are zero on the way in and out (VDPBF16PS,
    Intel SDM volume 2)."""
    def add(x: Array, y: Array, total: Array) -> Array:
        return flushed(fma32(flushed(x.view(np.float32)), flushed(y.view(np.float32)), flushed(total)))

    high, half = np.uint32(0xFFFF0000), np.uint32(16)
    return add(a << half, b << half, add(a & high, b & high, acc))


def _fma2(acc: Array, a: Array, b: Array) -> Array:
    """The odd pair first, each product added with one rounding."""
    high, half = np.uint32(0xFFFF0000), np.uint32(16)
    first = fma32((a & high).view(np.float32), (b & high).view(np.float32), acc)
    return fma32((a << half).view(np.float32), (b << half).view(np.float32), first)


def fraction(a: Array) -> Array:
    """What lies beyond the nearest integer, exactly (VREDUCEPS, Intel SDM volume 2)."""
    rest = a - np.rint(a)
    return np.where(np.isinf(a), np.float32(0), np.where(rest == 0, np.float32(0), rest))


def fraction_down(a: Array) -> Array:
    """What lies above the next integer below, rounded down (VREDUCEPS)."""
    exact = a.astype(np.float64) - np.floor(a.astype(np.float64))
    rest = exact.astype(np.float32)
    rest = np.where((rest > exact) | (rest == 1), np.nextafter(rest, np.float32(-1)), rest)     # it is below 1
    return np.where(np.isinf(a), np.float32(0), np.where(rest == 0, np.float32(-0.0), rest))


def _pack_bf16(a: Array, b: Array) -> Array:
    """VCVTNE2PS2BF16 (Intel SDM volume 2), the two results side by side in each slot; a NaN keeps its upper bits."""
    packed: Array = halves(a) | halves(b) << np.uint32(16)
    return packed


def halves(row: Array) -> Array:
    """bf16 in the lower halves."""
    bits = flushed(row).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))
    chosen: Array = np.where(np.isnan(row), bits | np.uint32(0x400000), rounded)
    return chosen >> np.uint32(16)


def _concat_bf16(a: Array, b: Array) -> Array:
    """VCVTNE2PS2BF16 (Intel SDM volume 2)."""
    return np.concatenate([halves(a), halves(b)]).astype(np.uint16).view(np.uint32)


_EXPONENT_F32, _LEAST_F32, _ZERO_F32 = (np.array(0x7F800000, np.uint32), np.array(np.finfo(np.float32).tiny),
                                         np.array(0, np.float32))


def flushed(row: Array) -> Array:
    """With zeros for denormals, of their signs. Most rows have neither: that is seen at once."""
    if np.count_nonzero(row.view(np.uint32) & _EXPONENT_F32) == row.size:
        return row
    return np.where(np.abs(row) < _LEAST_F32, np.copysign(_ZERO_F32, row), row)


def _dot4(left: Any, right: Any) -> Callable[[Any, Any, Any], Any]:
    """Of bytes of these two kinds."""
    def dot(acc: Any, a: Any, b: Any) -> Any:
        lanes = len(acc)
        products = a.view(left).reshape(lanes, 4).astype(np.int32) * b.view(right).reshape(lanes, 4).astype(np.int32)
        return acc + products.sum(axis=1, dtype=np.int32)

    return dot


_BYTES = {"i8": np.int8, "u8": np.uint8}


def _two_by_two(dot: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """Of matrices of two rows of two slots in each four lanes, by the dot products of their slots."""
    def multiply(acc: Any, a: Any, b: Any) -> Any:
        lane = np.arange(len(acc))
        left, right = lane & ~1, lane & ~3 | (lane & 1) << 1
        return dot(dot(acc, a[left], b[right]), a[left + 1], b[right + 1])

    return multiply


def _scaled_float8(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """As `widen_float8` has them: the bits below the sign where f32 has its exponent and mantissa."""
    wide = codes.astype(np.uint32)
    return ((wide & 0x80) << 24 | (wide & 0x7F) << 20).view(np.float32)


def _words(row: Any) -> Any:
    return row.view(np.int16)


def _dot2_i16(acc: Any, a: Any, b: Any) -> Any:
    products = _words(a).astype(np.int32).reshape(-1, 2) * _words(b).astype(np.int32).reshape(-1, 2)
    return acc + products.sum(axis=1, dtype=np.int32)


def _pairs_u8i8(a: Any, b: Any) -> Any:
    products = a.view(np.uint8).astype(np.int32) * b.view(np.int8).astype(np.int32)
    sums = np.clip(products[::2] + products[1::2], -(1 << 15), (1 << 15) - 1)
    return sums.astype(np.int16).view(np.uint32)


def round_to(value: Array, dtype: DType) -> Array:
    """An f32 row rounded to bf16, f16 or fp8, nearest even."""
    return value.astype(ELEMENTS[dtype]).astype(np.float32)


_SCALAR_BINARY: dict[str, Callable[[int, int], int]] = {
    "s_add": lambda a, b: wrap64(a + b),
    "s_sub": lambda a, b: wrap64(a - b),
    "s_mul": lambda a, b: wrap64(a * b),
    "s_min": lambda a, b: a if a < b else b,
    "s_max": lambda a, b: a if a > b else b,
    "s_and": lambda a, b: a & b,
    "s_or": lambda a, b: a | b,
    "s_xor": lambda a, b: a ^ b,
    "s_shl": lambda a, b: wrap64(a << (b & 63)),
    "s_shr": lambda a, b: wrap64((a & LOW) >> (b & 63)),
    "s_sar": lambda a, b: a >> (b & 63),
    "s_floordiv": lambda a, b: wrap64(a // b),
    "s_mod": lambda a, b: a % b,
}

_ROW_PLAIN: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "min": lambda a, b: np.where(a < b, a, b),
    "max": lambda a, b: np.where(a > b, a, b),
    "neg": lambda a: -a,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "floor": np.floor,
    "ceil": np.ceil,
    "round": np.rint,
    "trunc": np.trunc,
    "scale_exponent": scale_exponent,
    "fraction": fraction,
    "copy_sign": lambda a, b: np.copysign(a, b),
    "fma": lambda a, b, c: fma32(a, b, c) if a.dtype == np.float32 else fma64(a, b, c),
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "idiv": _idiv,
    "imod": _imod,
    "select": lambda m, a, b: np.where(m, a, b),
    "mask_and": lambda a, b: a & b,
    "mask_or": lambda a, b: a | b,
    "mask_xor": lambda a, b: a ^ b,
    "mask_not": lambda a: ~a,
    "mask_any": lambda a: int(a.any()),
    "mask_all": lambda a: int(a.all()),
    "mask_to_row": lambda a: a.astype(np.int32),
    "lane0": lambda a: int(a[0]),
    "dot2_bf16": _dot2,
    "fma2_bf16": _fma2,
    "dot4_u8i8": _dot4(np.uint8, np.int8),
    "dot4_i8i8": _dot4(np.int8, np.int8),
    "dot4_u8u8": _dot4(np.uint8, np.uint8),
    "two_by_two_bf16": _two_by_two(_dot2),
    **{f"two_by_two_{a}{b}": _two_by_two(_dot4(_BYTES[a], _BYTES[b])) for a, b in (("i8", "i8"), ("u8", "u8"),
                                                                                    ("u8", "i8"))},
    "dot2_i16": _dot2_i16,
    "pairs_u8i8": _pairs_u8i8,
    "add_i16": lambda a, b: (_words(a) + _words(b)).view(np.uint32),
    "max_u8": lambda a, b: np.maximum(a.view(np.uint8), b.view(np.uint8)).view(np.uint32),
    "pack_bf16": _pack_bf16,
    "concat_bf16": _concat_bf16,
    "is_denormal": lambda a: (a != 0) & (np.abs(a) < np.finfo(np.float32).tiny),
    "any_zero_bf16": lambda *rows: int(any((row.view(np.uint16) & 0x7FFF == 0).any() for row in rows)),
    **{name: _in_f64(function) for name, function in _MATH.items()},
}


def row_constant(value: float | int, dtype: DType, lanes: int) -> Array:
    """A constant in every lane; integers keep their low bits."""
    kind = NUMPY_ROWS[dtype]
    if kind.kind == "f":
        return np.full(lanes, value, kind)
    unsigned = np.dtype(f"u{kind.itemsize}")
    return np.full(lanes, int(value) & ((1 << dtype.bits) - 1), unsigned).view(kind)


def _row_numpy(value: Value) -> np.dtype[Any]:
    assert isinstance(value.type, RowType)
    return NUMPY_ROWS[value.type.dtype]


def pure_function(op: Op, lanes: int) -> Callable[..., Any] | None:
    """The function from operand values to the result of a pure op (exchange: to both); None if it is not one."""
    name = op.name
    attributes = op.attributes
    if name in _SCALAR_BINARY:
        return _SCALAR_BINARY[name]
    if name in ("shl", "shr", "sar"):
        shift = _shift(name)
        if len(op.operands) == 2:
            return shift
        amount = np.full(lanes, attributes["amount"], _row_numpy(op.operands[0]))
        return lambda a: shift(a, amount)
    if name == "fraction" and attributes.get("down"):
        return fraction_down
    if name in _ROW_PLAIN:
        return _ROW_PLAIN[name]
    if name == "s_const":
        scalar = wrap64(attributes["value"])
        return lambda: scalar
    if name == "s_cmp":
        compare = _COMPARE[attributes["cond"]]
        return lambda a, b: int(compare(a, b))
    if name == "s_select":
        return lambda c, a, b: a if c else b
    if name == "cmp":
        return _COMPARE[attributes["cond"]]
    if name == "splat_const":
        assert isinstance(op.result.type, RowType)
        constant = row_constant(attributes["value"], op.result.type.dtype, lanes)
        return lambda: constant
    if name == "splat":
        assert isinstance(op.result.type, RowType)
        dtype = op.result.type.dtype
        return lambda s: row_constant(s, dtype, lanes)
    if name == "iota":
        numbers = np.arange(lanes, dtype=np.int32)
        return lambda: numbers
    if name == "mask_first":
        places = np.arange(lanes)
        return lambda count: places < count
    if name == "lookup":
        table = np.array(attributes["table"], np.float32)
        return lambda i: table[i & 15]
    if name == "pick":
        return lambda a, i: a[i % lanes]
    if name == "cvt":
        to = _row_numpy(op.result)
        if attributes.get("nearest"):
            return lambda a: cvt(np.rint(a), to)
        return lambda a: cvt(a, to)
    if name == "bitcast":
        to = _row_numpy(op.result)
        return lambda a: a.view(to)
    if name == "round_to":
        narrow = attributes["dtype"]
        return lambda a: round_to(a, narrow)
    if name == "pack2":
        kind = ELEMENTS[attributes["dtype"]]
        return lambda a, b: np.stack([a, b], axis=1).astype(kind).view(np.uint32)[:, 0]
    if name in ("add2", "sub2", "mul2"):
        kind, compute = ELEMENTS[attributes["dtype"]], {"add2": np.add, "sub2": np.subtract, "mul2": np.multiply}[name]
        return lambda a, b: compute(a.view(kind).astype(np.float32), b.view(kind).astype(np.float32)).astype(
            kind).view(np.uint32)
    if name == "unpack":
        kind, row = ELEMENTS[attributes["dtype"]], ROW_OF_ELEMENTS[attributes["dtype"]]
        each, place = 4 // kind.itemsize, attributes["place"]
        return lambda a: a.view(kind)[place::each].astype(row)
    if name == "shuffle_xor":
        source = np.arange(lanes) ^ attributes["distance"]
        return lambda a: a[source]
    if name == "broadcast_lane":
        lane = attributes["lane"]
        return lambda a: np.full(lanes, a[lane])
    if name == "widen_float8":
        kind, rows = ELEMENTS[attributes["dtype"]], len(op.results)
        if attributes.get("scaled"):
            return lambda a: tuple(_scaled_float8(a.view(np.uint8)[: rows * lanes]).reshape(-1, 2, 2).transpose(
                1, 2, 0).reshape(rows, lanes))
        return lambda a: tuple(a.view(kind)[: rows * lanes].astype(np.float32).reshape(rows, lanes))
    if name == "widen_bytes":
        kind, odd = ELEMENTS[attributes["dtype"]], int(attributes["odd"])
        return lambda a: a.view(kind)[odd::2].astype(np.int16).view(np.uint32)
    if name == "exchange":
        distance = attributes["distance"]
        clear = (np.arange(lanes) & distance) == 0
        up = (np.arange(lanes) + distance) % lanes
        down = (np.arange(lanes) - distance) % lanes
        return lambda a, b: (np.where(clear, a, b[down]), np.where(clear, a[up], b))
    if name == "unzip":
        return lambda a, b: (np.concatenate([a[::2], b[::2]]), np.concatenate([a[1::2], b[1::2]]))
    if name == "zip":
        return lambda a, b: tuple(np.stack([a, b], axis=1).reshape(2, lanes))
    if name == "interleave":
        count, narrow = len(op.operands), np.dtype(f"u{4 // len(op.operands)}")
        return lambda *parts: tuple(np.stack([part.view(narrow) for part in parts], axis=1).reshape(
            count, count * lanes).view(np.uint32))
    return None


def multiply_tiles(c: Array, a: Array, b: Array, kinds: tuple[Any, Any]) -> Array:
    """c [i, j] + the sum over d of the products of slots a [i, d] and b [d, j]; kinds: of the elements of a and b.

    Of bf16, first and second elements have sums of their own, in the order of d, which are added at the end (TDPBF16PS,
    Intel SDM volume 2, as it says without exceptions to fused multiply-adds, and with denormals as zero).
    """
    each = 4 // np.dtype(kinds[0]).itemsize
    left = a.view(kinds[0]).reshape(*a.shape, each)
    right = b.view(kinds[1]).reshape(*b.shape, each)
    if c.dtype == np.int32:
        wide = (m.astype(np.int64) for m in (left, right))
        total: Array = (c + np.einsum("ide,dje->ij", *wide)).astype(np.int32)
        return total
    left, right = (flushed(m.astype(np.float32)) for m in (left, right))
    sums = np.zeros((each, *c.shape), np.float32)
    for d in range(a.shape[1]):
        for e in range(each):
            sums[e] = flushed(fma32(left[:, d, e, None], right[None, d, :, e], sums[e]))
    return flushed(flushed(c) + flushed(sums[0] + sums[1]))
