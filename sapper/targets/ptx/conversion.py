"""What the conversions of the PTX table compute, as NumPy over all lanes. See meaning.py for what holds.

Source: PTX ISA, sections "cvt", "cvt.pack"; OCP 8-bit Floating Point Specification (e4m3, e5m2).
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from . import rounding as r
from .meaning import canonical, dtype_of, flush
from .rows import BITS, Form

Array = NDArray[Any]

_FP8: dict[str, Any] = {"e4m3x2": ml_dtypes.float8_e4m3fn, "e5m2x2": ml_dtypes.float8_e5m2}


def _types(form: Form) -> tuple[str, str]:
    return form.results[0].type, form.sources[0].type


def _limits(type: str) -> tuple[int, int]:
    bits = BITS[type]
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if type[0] == "s" else (0, (1 << bits) - 1)


def integer_to_integer(form: Form, a: Array) -> Array:
    """Wraps, or clamps with .sat."""
    to, source = _types(form)
    if "sat" in form:
        low, high = _limits(to)
        low_source, high_source = _limits(source)
        a = np.clip(a, max(low, low_source), min(high, high_source))
    return a.astype(dtype_of(to))


def _exact64(a: Array) -> Array:
    """Integers as float64 that rounds like the exact value (see rounding.py)."""
    if a.dtype.itemsize < 8:
        return a.astype(np.float64)
    high, low = a >> a.dtype.type(32), a & a.dtype.type(0xFFFFFFFF)
    return r.exact_add(high.astype(np.float64) * 2.0**32, low.astype(np.float64))


def integer_to_float(form: Form, a: Array) -> Array:
    to = form.results[0].type
    if to == "f64":
        return a.astype(np.float64) if form.get("rnd") == "rn" else _directed(a, form.get("rnd"))
    if to == "f32" and form.get("rnd") == "rn":
        return _saturate(form, a.astype(np.float32))
    return _saturate(form, r.round_to(_exact64(a), to, form.get("rnd")).astype(dtype_of(to)))


def _directed(a: Array, mode: str) -> Array:
    """Integers to float64 in a direction."""
    near = a.astype(np.float64)
    result = near.copy()
    for index, (value, rounded) in enumerate(zip(a.tolist(), near.tolist(), strict=True)):
        difference = int(rounded) - value
        down = mode == "rm" or (mode == "rz" and value > 0)
        if difference > 0 and down:
            result[index] = np.nextafter(rounded, -np.inf)
        elif difference < 0 and not down:
            result[index] = np.nextafter(rounded, np.inf)
    return result


def _saturate(form: Form, value: Array) -> Array:
    if "sat" in form:
        return np.where(value > 0, np.minimum(value, np.ones((), value.dtype)), np.zeros((), value.dtype))
    return value


_INTEGRAL: dict[str, Any] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def float_to_integer(form: Form, a: Array) -> Array:
    """Rounded, clamped to the type; NaN gives 0."""
    to, source = _types(form)
    if "ftz" in form and source == "f32":
        a = flush(a)
    low, high = _limits(to)
    with np.errstate(all="ignore"):
        value = _INTEGRAL[form.get("rnd")](r.as64(a))
        value = np.where(np.isnan(value), 0.0, value)
        result = np.clip(value, float(low), _below(high)).astype(np.int64 if low < 0 else np.uint64)
    result = np.where(value >= float(high), high, result) if high < 2**63 else np.where(
        value >= float(high), np.uint64(high), result)
    return result.astype(dtype_of(to))


def _below(high: int) -> float:
    """The largest float64 that is not above an integer."""
    value = float(high)
    return value if int(value) <= high else float(np.nextafter(value, 0.0))


def float_to_integral(form: Form, a: Array) -> Array:
    """A float rounded to an integer, as a float."""
    to, source = _types(form)
    if "ftz" in form and source == "f32":
        a = flush(a)
    with np.errstate(all="ignore"):
        return _saturate(form, canonical(_INTEGRAL[form.get("rnd")](r.as64(a)).astype(dtype_of(to)), to))


def float_to_float(form: Form, a: Array) -> Array:
    to, source = _types(form)
    if "ftz" in form and source == "f32":
        a = flush(a)
    result = _narrow(r.as64(a), to, form.get("rnd", "rn"))
    if "relu" in form:
        result = np.where(result < 0, np.zeros((), result.dtype), result)
    if "ftz" in form and to == "f32":
        result = flush(result)
    return canonical(_saturate(form, result), to)


def _narrow(value: Array, to: str, mode: str) -> Array:
    if to == "f64":
        return value
    with np.errstate(all="ignore"):
        if mode == "rn" and to in ("f16", "f32"):
            return value.astype(dtype_of(to))
        return r.round_to(value, to, mode).astype(dtype_of(to))


def float_to_tf32(form: Form, a: Array) -> Array:
    """tf32: f32 with 10 bits after the point, in the upper bits of a register."""
    value = r.round_to(r.as64(a), "tf32", form.get("rnd", "rna")).astype(np.float32)
    if "relu" in form:
        value = np.where(value < 0, np.float32(0), value)
    return canonical(value, "f32").view(np.uint32)


def pack_floats(form: Form, a: Array, b: Array) -> Array:
    """a to the upper, b to the lower half."""
    return _narrow_packed(form, r.as64(np.concatenate([b, a]))).reshape(2, -1).T


def _narrow_packed(form: Form, value: Array) -> Array:
    to = form.results[0].type
    if "relu" in form:
        value = np.where(value < 0, 0.0, value)
    if to in _FP8:
        return r.round_to(value, to.removesuffix("x2"), "rn", saturate=True).astype(_FP8[to]).view(np.uint8)
    half = to.removesuffix("x2")
    return canonical(_narrow(value, half, form.get("rnd", "rn")), half)


def narrow_packed(form: Form, a: Array) -> Array:
    return np.stack([_narrow_packed(form, r.as64(a[:, half])) for half in (0, 1)], axis=1)


def widen_packed(form: Form, a: Array) -> Array:
    value = np.ascontiguousarray(a).view(_FP8[form.sources[0].type]).astype(np.float16)
    if "relu" in form:
        value = np.where(value < 0, np.float16(0), value)
    return canonical(value, "f16")


def pack_integers(form: Form, a: Array, b: Array, *rest: Array) -> Array:
    """a above b, each clamped; with c the lower bytes of c move up (PTX ISA, cvt.pack)."""
    to = form.get("dtype")
    low, high = _limits(to)
    bits = BITS[to]
    mask = np.uint32((1 << bits) - 1)
    upper, lower = (np.clip(value, low, high).astype(np.int64).astype(np.uint32) & mask for value in (a, b))
    result = (upper << np.uint32(bits)) | lower
    if rest:
        result = (rest[0] << np.uint32(2 * bits)) | result
    return result
