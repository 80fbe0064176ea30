"""What the rows of the PTX table compute on the registers of a lane, as NumPy over all lanes.

Enters: arrays as said at the head of rows.py. Leaves: arrays of the result's type.
Holds: results are those of the PTX ISA to the bit where it defines them: rounding modes, subnormals flushed to signed
zeros by .ftz, NaN results canonical (0x7fffffff for f32, 0x7fff for f16 and bf16). Approximate functions give the
rounded exact value, which lies inside their documented error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ...lane.arithmetic import fma32
from . import rounding as r
from .rows import BITS, Form

Array = NDArray[Any]
RowMeaning = Callable[..., Any]

_NUMPY: dict[str, Any] = {
    "pred": np.bool_, "f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": ml_dtypes.bfloat16,
    "tf32": np.uint32, "f16x2": np.float16, "bf16x2": ml_dtypes.bfloat16, "u16x2": np.uint16, "s16x2": np.int16,
    "f32x2": np.float32, "e4m3x2": np.uint8, "e5m2x2": np.uint8,
}
_KINDS = {"b": "u", "u": "u", "s": "i"}
PACKED = frozenset({"f16x2", "bf16x2", "u16x2", "s16x2", "f32x2", "e4m3x2", "e5m2x2"})
"""Types whose arrays have a second axis."""


@cache
def dtype_of(type: str) -> Any:
    """The NumPy dtype of the elements of a PTX type."""
    found = _NUMPY.get(type)
    return np.dtype(found if found is not None else f"{_KINDS[type[0]]}{BITS[type] // 8}")


def in_order(value: Array) -> Array:
    """The same, its elements one after another, so that it may be viewed as others. What stands for values that are not
    known (assembly/symbolic.py) stays what it is."""
    return value if value.flags.c_contiguous else value.copy()


def _is_float(type: str) -> bool:
    return type.startswith(("f", "bf"))


def _element(type: str) -> str:
    return type.removesuffix("x2")


# --- Floats ---------------------------------------------------------------------------------------------------------

_NAN_BITS: dict[str, Any] = {"f16": np.uint16(0x7FFF), "bf16": np.uint16(0x7FFF), "f32": np.uint32(0x7FFFFFFF)}


def flush(value: Array) -> Array:
    """f32 subnormals to zeros of their sign (.ftz; PTX ISA 9.7.3)."""
    small = np.abs(value) < np.float32(2.0**-126)
    return np.where(small, np.copysign(np.float32(0), value), value) if np.count_nonzero(small) else value


def canonical(value: Array, type: str) -> Array:
    """NaNs become the canonical one of the type."""
    if type == "f64":
        return value
    wrong = np.isnan(value)
    if not np.count_nonzero(wrong):
        return value
    value = value.copy()
    bits = _NAN_BITS[type]
    value.view(bits.dtype)[wrong] = bits
    return value


def _finish(value: Array, form: Form, type: str) -> Array:
    """After rounding: flush, saturate to [0, 1] (NaN to +0), canonical NaN."""
    if "ftz" in form and type == "f32":
        value = flush(value)
    if "sat" in form:
        return np.where(value > 0, np.minimum(value, np.ones((), value.dtype)), np.zeros((), value.dtype))
    if "relu" in form:
        value = np.where(value < 0, np.zeros((), value.dtype), value)
    return canonical(value, type)


def round_float(exact: Array, type: str, mode: str = "rn") -> Array:
    """Exact float64 values (see rounding.py) in format `type`."""
    with np.errstate(all="ignore"):
        if type == "f64":
            return exact
        if mode == "rn" and type != "bf16":
            return exact.astype(_NUMPY[type])
        return r.round_to(exact, type, mode).astype(_NUMPY[type])


def _inputs(form: Form, type: str, values: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(flush(value) for value in values) if "ftz" in form and type == "f32" else values


def _float_type(form: Form) -> str:
    return _element(form.results[0].type)


def float_add(form: Form, a: Array, b: Array) -> Array:
    return _add(form, a, b)


def float_sub(form: Form, a: Array, b: Array) -> Array:
    return _add(form, a, -b)


def _add(form: Form, a: Array, b: Array) -> Array:
    type, mode = _float_type(form), form.get("rnd", "rn")
    a, b = _inputs(form, type, (a, b))
    with np.errstate(all="ignore"):
        if mode == "rn" and type in ("f32", "f64"):
            return _finish(a + b, form, type)
        if type == "f64":
            return _directed64(a + b, r.two_sum_error(a, b, a + b), mode)
        return _finish(round_float(r.exact_add(r.as64(a), r.as64(b)), type, mode), form, type)


def float_mul(form: Form, a: Array, b: Array) -> Array:
    type, mode = _float_type(form), form.get("rnd", "rn")
    a, b = _inputs(form, type, (a, b))
    with np.errstate(all="ignore"):
        if mode == "rn" and type in ("f32", "f64"):
            return _finish(a * b, form, type)
        if type == "f64":
            return _directed64(a * b, r.two_product(a, b)[1], mode)
        return _finish(round_float(r.as64(a) * r.as64(b), type, mode), form, type)


def float_fma(form: Form, a: Array, b: Array, c: Array) -> Array:
    type, mode = _float_type(form), form.get("rnd", "rn")
    a, b, c = _inputs(form, type, (a, b, c))
    if type == "f64":
        return r.fma64(a, b, c, mode)
    if type == "f32" and mode == "rn":
        with np.errstate(all="ignore"):
            return _finish(fma32(a, b, c), form, type)
    return _finish(round_float(r.exact_fma(r.as64(a), r.as64(b), r.as64(c)), type, mode), form, type)


def _directed64(value: Array, error: Array, mode: str) -> Array:
    """A float64 result rounded to nearest, moved one step where the direction asks for it."""
    down = {"rm": error < 0, "rp": np.zeros(error.shape, bool), "rz": (error < 0) & (value > 0)}[mode]
    up = {"rm": np.zeros(error.shape, bool), "rp": error > 0, "rz": (error > 0) & (value < 0)}[mode]
    return np.where(down, np.nextafter(value, -np.inf), np.where(up, np.nextafter(value, np.inf), value))


def float_div(form: Form, a: Array, b: Array) -> Array:
    type, mode = _float_type(form), form.get("rnd", "rn")
    a, b = _inputs(form, type, (a, b))
    with np.errstate(all="ignore"):
        if type == "f64":
            return a / b
        return _finish(round_float(r.exact_divide(r.as64(a), r.as64(b)), type, mode), form, type)


def float_sqrt(form: Form, a: Array) -> Array:
    type, mode = _float_type(form), form.get("rnd", "rn")
    (a,) = _inputs(form, type, (a,))
    with np.errstate(all="ignore"):
        if type == "f64":
            return np.sqrt(a)
        return _finish(round_float(r.exact_sqrt(r.as64(a)), type, mode), form, type)


def float_rcp(form: Form, a: Array) -> Array:
    return float_div(form, np.ones_like(a), a)


def _approximate(function: Any) -> Any:
    def meaning(form: Form, a: Array) -> Array:
        type = _float_type(form)
        (a,) = _inputs(form, type, (a,))
        with np.errstate(all="ignore"):
            return _finish(round_float(function(r.as64(a)), type), form, type)

    return meaning


ex2 = _approximate(np.exp2)
lg2 = _approximate(np.log2)
rsqrt = _approximate(lambda a: np.where(a == 0, np.copysign(np.inf, a), 1 / np.sqrt(a)))
sin = _approximate(np.sin)
cos = _approximate(np.cos)
tanh = _approximate(np.tanh)


def _upper(value: Array) -> Array:
    """The upper 32 bits of float64 values; subnormals as zeros."""
    kept = (np.ascontiguousarray(value).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)
    return np.where(np.abs(kept) < 2.0**-1022, np.copysign(0.0, kept), kept)


def rcp_upper(form: Form, a: Array) -> Array:
    """rcp.approx.ftz.f64 reads and gives the upper 32 bits only (PTX ISA, rcp.approx.ftz.f64)."""
    with np.errstate(all="ignore"):
        return _upper(1.0 / _upper(a))


def rsqrt_upper(form: Form, a: Array) -> Array:
    with np.errstate(all="ignore"):
        kept = _upper(a)
        return _upper(np.where(kept == 0, np.copysign(np.inf, kept), 1 / np.sqrt(kept)))


def float_abs(form: Form, a: Array) -> Array:
    (a,) = _inputs(form, _float_type(form), (a,))
    return np.abs(a)


def float_neg(form: Form, a: Array) -> Array:
    (a,) = _inputs(form, _float_type(form), (a,))
    return -a


def minimum(form: Form, *values: Array) -> Array:
    return _extreme(form, values, least=True)


def maximum(form: Form, *values: Array) -> Array:
    return _extreme(form, values, least=False)


def _extreme(form: Form, values: tuple[Array, ...], least: bool) -> Array:
    """NaN loses unless .NaN; -0 is below +0 (PTX ISA 9.7.3, min and max)."""
    type = _element(form.results[0].type)
    result = values[0]
    if not _is_float(type):
        for other in values[1:]:
            result = np.minimum(result, other) if least else np.maximum(result, other)
        return np.maximum(result, np.zeros((), result.dtype)) if "relu" in form else result
    result, *others = _inputs(form, type, values)
    for other in others:
        before = (result < other) | ((result == other) & (np.signbit(result) > np.signbit(other)))
        chosen = np.where(before == least, result, other)
        if "NaN" in form:
            chosen = np.where(np.isnan(result), result, np.where(np.isnan(other), other, chosen))
        else:
            chosen = np.where(np.isnan(result), other, np.where(np.isnan(other), result, chosen))
        if "abs" in form or "xorsign" in form:
            sign = np.signbit(result) ^ np.signbit(other)
            chosen = np.copysign(chosen, np.where(sign, -1, 1).astype(chosen.dtype))
        result = chosen.astype(values[0].dtype)
    return _finish(result, form, type)


def copysign(form: Form, a: Array, b: Array) -> Array:
    """The sign of a with the size of b (PTX ISA 9.7.3, copysign)."""
    return np.copysign(b, a)


def test_class(form: Form, a: Array) -> Array:
    least = np.finfo(a.dtype).smallest_normal
    finite, normal = np.isfinite(a), np.isfinite(a) & (np.abs(a) >= least)
    return np.asarray({
        "finite": finite, "infinite": np.isinf(a), "number": ~np.isnan(a), "notanumber": np.isnan(a),
        "normal": normal, "subnormal": finite & ~normal & (a != 0),
    }[form.get("op")])


# --- Integers -------------------------------------------------------------------------------------------------------


def add(form: Form, a: Array, b: Array) -> Array:
    return _saturated(a, b, np.add) if "sat" in form else a + b


def sub(form: Form, a: Array, b: Array) -> Array:
    return _saturated(a, b, np.subtract) if "sat" in form else a - b


def _saturated(a: Array, b: Array, operation: Any) -> Array:
    """s32 with clamping."""
    exact = operation(a.astype(np.int64), b.astype(np.int64))
    return np.asanyarray(np.clip(exact, -(2**31), 2**31 - 1).astype(a.dtype))


_WIDE: dict[int, dict[str, Any]] = {
    16: {"u": np.uint32, "i": np.int32}, 32: {"u": np.uint64, "i": np.int64},
}


def _high64(a: Array, b: Array) -> Array:
    """The upper 64 bits of the 128-bit product, by halves of 32 bits."""
    unsigned_a, unsigned_b = a.view(np.uint64), b.view(np.uint64)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = unsigned_a & low, unsigned_a >> shift, unsigned_b & low, unsigned_b >> shift
    middle = a1 * b0 + ((a0 * b0) >> shift)
    other = a0 * b1 + (middle & low)
    high = a1 * b1 + (middle >> shift) + (other >> shift)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, unsigned_b, np.uint64(0)) - np.where(b < 0, unsigned_a, np.uint64(0))
    return np.asanyarray(high.view(a.dtype))


def _product(form: Form, a: Array, b: Array) -> Array:
    if "lo" in form:
        return a * b
    bits = a.dtype.itemsize * 8
    if bits == 64:
        return _high64(in_order(a), in_order(b))
    wide = _WIDE[bits][a.dtype.kind]
    product = a.astype(wide) * b.astype(wide)
    return np.asanyarray(product if "wide" in form else (product >> wide(bits)).astype(a.dtype))


def mul(form: Form, a: Array, b: Array) -> Array:
    return _product(form, a, b)


def mad(form: Form, a: Array, b: Array, c: Array) -> Array:
    product = _product(form, a, b)
    return _saturated(product, c, np.add) if "sat" in form else product + c


def mul24(form: Form, a: Array, b: Array) -> Array:
    """Bits 0..31 (lo) or 16..47 (hi) of the product of the low 24 bits."""
    wide: Any = np.int64 if a.dtype.kind == "i" else np.uint64
    shift = a.dtype.type(8)
    a, b = (value << shift >> shift for value in (a, b))
    return np.asanyarray((a.astype(wide) * b.astype(wide) >> wide(0 if "lo" in form else 16)).astype(a.dtype))


def mad24(form: Form, a: Array, b: Array, c: Array) -> Array:
    return mul24(form, a, b) + c


def div(form: Form, a: Array, b: Array) -> Array:
    """Rounds to zero; division by zero gives all ones, as hardware does (PTX leaves it open)."""
    zero = b == 0
    with np.errstate(all="ignore"):
        quotient = a // np.where(zero, np.ones((), b.dtype), b)
        if a.dtype.kind == "i":
            remainder = a - quotient * b
            quotient = quotient + ((remainder != 0) & ((a < 0) != (b < 0))).astype(a.dtype)
    return np.where(zero, ~np.zeros((), a.dtype), quotient)


def rem(form: Form, a: Array, b: Array) -> Array:
    return np.where(b == 0, a, a - div(form, a, b) * b)


def absolute(form: Form, a: Array) -> Array:
    return np.abs(a)


def negate(form: Form, a: Array) -> Array:
    return -a


def sad(form: Form, a: Array, b: Array, c: Array) -> Array:
    return np.asanyarray(c + np.where(a < b, b - a, a - b).astype(c.dtype))


def _shift_count(b: Array, bits: int) -> tuple[Array, Array]:
    """(count to shift by, whether it is at least the size): counts are clamped to the size."""
    return np.minimum(b, b.dtype.type(bits - 1)), b >= bits


def shl(form: Form, a: Array, b: Array) -> Array:
    count, over = _shift_count(b, a.dtype.itemsize * 8)
    return np.where(over, np.zeros((), a.dtype), a << count.astype(a.dtype))


def shr(form: Form, a: Array, b: Array) -> Array:
    count, over = _shift_count(b, a.dtype.itemsize * 8)
    shifted = a >> count.astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(over, np.zeros((), a.dtype), shifted)


def shf(form: Form, a: Array, b: Array, c: Array) -> Array:
    """Funnel shift of b:a; .l gives the upper word of a left shift, .r the lower word of a right shift."""
    count = (np.minimum(c, 32) if "clamp" in form else c & np.uint32(31)).astype(np.uint64)
    both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    if "r" in form:
        return (both >> count).astype(np.uint32)
    return ((both << count) >> np.uint64(32)).astype(np.uint32)


def bit_and(form: Form, a: Array, b: Array) -> Array:
    return a & b


def bit_or(form: Form, a: Array, b: Array) -> Array:
    return a | b


def bit_xor(form: Form, a: Array, b: Array) -> Array:
    return a ^ b


def bit_not(form: Form, a: Array) -> Array:
    return ~a


def cnot(form: Form, a: Array) -> Array:
    return np.asanyarray((a == 0).astype(a.dtype))


def lop3(form: Form, a: Array, b: Array, c: Array, table: Array) -> Array:
    """Bit i of the table is the result where a, b, c spell i (PTX ISA 9.7.8, lop3)."""
    result = np.zeros_like(a)
    number = int(table[0])
    for index in range(8):
        if number >> index & 1:
            result = result | (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


def popc(form: Form, a: Array) -> Array:
    return np.bitwise_count(a).astype(np.uint32)


def clz(form: Form, a: Array) -> Array:
    bits = a.dtype.itemsize * 8
    for shift in (1, 2, 4, 8, 16, 32)[: 5 if bits == 32 else 6]:
        a = a | (a >> a.dtype.type(shift))
    return (bits - np.bitwise_count(a)).astype(np.uint32)


def bfind(form: Form, a: Array) -> Array:
    """Position of the highest set bit, or of the highest that differs from the sign; all ones if there is none."""
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    bits = a.dtype.itemsize * 8
    plain = np.where(a < 0, ~a, a).view(unsigned) if a.dtype.kind == "i" else a
    zeros = clz(form, plain)
    if "shiftamt" in form:
        return np.where(plain == 0, np.uint32(0xFFFFFFFF), zeros)
    return np.where(plain == 0, np.uint32(0xFFFFFFFF), np.uint32(bits - 1) - zeros)


def brev(form: Form, a: Array) -> Array:
    """Neighbours change places: bits, pairs, fours, ..., halves."""
    bits = a.dtype.itemsize * 8
    size = 1
    while size < bits:
        low = a.dtype.type(((1 << bits) - 1) // ((1 << size) + 1))
        count = a.dtype.type(size)
        a = (a >> count & low) | ((a & low) << count)
        size *= 2
    return a


def bfe(form: Form, a: Array, position: Array, length: Array) -> Array:
    """Bits from `position`, sign-extended for signed types by the last bit in reach (PTX ISA 9.7.1, bfe)."""
    bits = a.dtype.itemsize * 8
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    start, size = (position & 255).astype(np.int64), (length & 255).astype(np.int64)
    plain = a.view(unsigned) if a.dtype.kind == "i" else a
    shifted = np.where(start < bits, plain >> np.minimum(start, bits - 1).astype(unsigned), 0).astype(unsigned)
    one = unsigned.type(1)
    reached = np.clip(np.minimum(size, bits - start), 0, bits)  # bits of the field inside the word
    short = np.minimum(reached, bits - 1).astype(unsigned)
    mask = np.where(reached == bits, ~np.zeros((), unsigned), (one << short) - one)
    field = shifted & mask
    if a.dtype.kind == "i":
        last = np.minimum(start + size - 1, bits - 1)
        sign = (plain >> np.maximum(last, 0).astype(unsigned)) & one
        field = np.where((size > 0) & (sign != 0), field | ~mask, field)
    return field.astype(unsigned).view(a.dtype)


def bfi(form: Form, a: Array, b: Array, position: Array, length: Array) -> Array:
    """b with `length` bits of a put in at `position`."""
    bits = a.dtype.itemsize * 8
    kind = a.dtype.type
    start, size = (position & 255).astype(np.int64), (length & 255).astype(np.int64)
    ones = ~np.zeros((), a.dtype)
    mask = np.where(size >= bits, ones, (kind(1) << np.minimum(size, bits - 1).astype(a.dtype)) - kind(1))
    shift = np.minimum(start, bits - 1).astype(a.dtype)
    mask = np.where(start < bits, mask << shift, kind(0))
    return np.asanyarray((b & ~mask) | ((a << shift) & mask))


def bmsk(form: Form, position: Array, length: Array) -> Array:
    """`length` ones from `position`."""
    start, size = position.astype(np.uint64), length.astype(np.uint64)
    if "wrap" in form:
        start, size = start & np.uint64(31), size & np.uint64(31)
    start, size = np.minimum(start, np.uint64(32)), np.minimum(size, np.uint64(32))
    return ((((np.uint64(1) << size) - np.uint64(1)) << start) & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def szext(form: Form, a: Array, position: Array) -> Array:
    """The low bits of a, extended by sign or zeros."""
    length = position & np.uint32(31) if "wrap" in form else np.minimum(position, np.uint32(32))
    shift = (np.uint64(64) - length.astype(np.uint64)) & np.uint64(63)
    wide = a.astype(np.uint32).astype(np.uint64) if a.dtype.kind == "u" else a.view(np.uint32).astype(np.uint64)
    moved = wide << shift
    result = (moved.view(np.int64) >> shift.astype(np.int64)) if a.dtype.kind == "i" else moved >> shift
    return np.where(length == 0, 0, result).astype(np.int64).astype(a.dtype)


def fns(form: Form, mask: Array, base: Array, offset: Array) -> Array:
    """Position of the offset-th set bit from `base`, upwards or downwards (PTX ISA 9.7.1, fns)."""
    result = np.full(mask.shape, 0xFFFFFFFF, np.uint32)
    for lane, (bits, start, count) in enumerate(zip(mask.tolist(), base.tolist(), offset.tolist(), strict=True)):
        step = 1 if count >= 0 else -1
        wanted = max(abs(count), 1)
        position = start
        while 0 <= position < 32:
            wanted -= bits >> position & 1
            if wanted == 0 and bits >> position & 1:
                result[lane] = position
                break
            position += step
    return result


def prmt(form: Form, a: Array, b: Array, selector: Array) -> Array:
    """Bytes of b:a by the four nibbles of the selector; bit 3 of a nibble replicates the byte's sign."""
    both = np.concatenate([in_order(x).view(np.uint8).reshape(len(a), 4) for x in (a, b)], axis=1)
    mode = form.get("mode")
    place, shift = np.arange(4, dtype=np.uint32), (selector[:, None] & np.uint32(3))
    if not mode:
        nibble = (selector[:, None] >> (place * np.uint32(4))) & np.uint32(15)
    else:
        modes: dict[str, Callable[[], Array]] = {
            "f4e": lambda: place + shift, "b4e": lambda: (shift - place) & np.uint32(7),
            "rc8": lambda: shift + 0 * place, "ecl": lambda: np.maximum(place, shift),
            "ecr": lambda: np.minimum(place, shift),
            "rc16": lambda: (shift & np.uint32(1)) * np.uint32(2) + (place & np.uint32(1)),
        }
        nibble = modes[mode]()
    chosen = np.take_along_axis(both, (nibble & np.uint32(7)).astype(np.int64), axis=1)
    chosen = np.where(nibble & np.uint32(8) != 0, np.where(chosen & 0x80 != 0, np.uint8(0xFF), np.uint8(0)), chosen)
    return in_order(chosen.astype(np.uint8)).view(np.uint32).reshape(len(a))


def _bytes_of(value: Array, unsigned: bool) -> Array:
    return in_order(value).view(np.uint8 if unsigned else np.int8).reshape(len(value), 4).astype(np.int64)


def dp4a(form: Form, a: Array, b: Array, c: Array) -> Array:
    """c + the four products of bytes."""
    total = (_bytes_of(a, form.get("atype") == "u32") * _bytes_of(b, form.get("btype") == "u32")).sum(axis=1)
    return np.asanyarray((total + c.astype(np.int64)).astype(c.dtype))


def dp2a(form: Form, a: Array, b: Array, c: Array) -> Array:
    """c + two products of the halves of a with the lower or upper two bytes of b."""
    halves = in_order(a).view(np.uint16 if form.get("atype") == "u32" else np.int16)
    halves = halves.reshape(len(a), 2).astype(np.int64)
    bytes_ = _bytes_of(b, form.get("btype") == "u32")[:, :2] if "lo" in form else _bytes_of(
        b, form.get("btype") == "u32")[:, 2:]
    return np.asanyarray(((halves * bytes_).sum(axis=1) + c.astype(np.int64)).astype(c.dtype))


# --- Moving, choosing, comparing ------------------------------------------------------------------------------------


def mov(form: Form, a: Array) -> Array:
    return a


def selp(form: Form, a: Array, b: Array, p: Array) -> Array:
    return np.where(p, a, b)


def slct(form: Form, a: Array, b: Array, c: Array) -> Array:
    """a where c >= 0, else b."""
    return np.where(c >= 0, a, b)


_COMPARE: dict[str, Any] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}
_COMBINE: dict[str, Any] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def compare(form: Form, type: str, a: Array, b: Array) -> Array:
    """The comparison of set and setp. Ordered ones are false with NaN, unordered ones (equ, ...) true."""
    operator = form.get("cmp")
    a, b = _inputs(form, type, (a, b))
    with np.errstate(invalid="ignore"):
        if operator in ("num", "nan"):
            either = np.isnan(a) | np.isnan(b)
            return either if operator == "nan" else ~either
        if operator in ("equ", "neu", "ltu", "leu", "gtu", "geu"):
            return np.asanyarray(_COMPARE[operator[:2]](a, b) | np.isnan(a) | np.isnan(b))
        if operator == "ne" and _is_float(type):
            return np.asanyarray((a != b) & ~np.isnan(a) & ~np.isnan(b))
        return np.asanyarray(_COMPARE[operator](a, b))


def setp(form: Form, a: Array, b: Array, *predicate: Array) -> tuple[Array, Array]:
    """(p, q): the comparison and its opposite, each combined with the predicate if there is one."""
    type = form.get("type")
    holds = compare(form, _element(type), a, b)
    if type in PACKED:  # p is for the low halves, q for the high ones
        halves = holds[:, 0], holds[:, 1]
        if predicate:
            low, high = (_COMBINE[form.get("bool")](half, predicate[0]) for half in halves)
            return low, high
        return halves
    opposite = ~holds
    if predicate:
        holds, opposite = (_COMBINE[form.get("bool")](value, predicate[0]) for value in (holds, opposite))
    return holds, opposite


def vabsdiff(form: Form, a: Array, b: Array, c: Array) -> Array:
    """Differences of bytes or halves without their signs, beside each other as many bits as there are; or their sum
    added to c."""
    size = 1 if form.row.opcode.endswith("4") else 2
    parts = [in_order(value).view(f"{'u' if type == 'u32' else 'i'}{size}").reshape(len(value), -1).astype(np.int64)
             for value, type in zip((a, b), form.mnemonic.split(".")[2:4], strict=True)]
    found = abs(parts[0] - parts[1])
    if "add" in form:
        return np.asanyarray((found.sum(axis=1) + c.astype(np.int64)).astype(c.dtype))
    return np.asanyarray(in_order(found.astype(f"u{size}")).view(c.dtype)[:, 0])


def set_value(form: Form, a: Array, b: Array, *predicate: Array) -> Array:
    holds = compare(form, _element(form.get("stype")), a, b)
    if predicate:
        holds = _COMBINE[form.get("bool")](holds, predicate[0].reshape(-1, *[1] * (holds.ndim - 1)))
    result = dtype_of(form.get("dtype"))
    true = np.ones((), result) if result.kind == "f" or result == ml_dtypes.bfloat16 else ~np.zeros((), result)
    return np.where(holds, true, np.zeros((), result))
