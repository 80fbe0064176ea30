"""What the rows of the warp compute: NumPy over (warps, 32).

Enters: `meaning(form, active, *sources)`: `active` says which lanes take part; sources are (warps, 32), a vector of
registers (registers, warps, 32). Leaves: results of the same shapes.
Source: PTX ISA, the sections of the same names. Sums of matrix instructions are made in float32 (float64 for f64) from
exact products, in no order that the ISA promises; or, where that is asked for, as short_sums.py has it.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from . import fragments as f
from .meaning import maximum, minimum
from .rows import Form
from .short_sums import ShortSum, add_products

Array = NDArray[Any]
_LANE = np.arange(32, dtype=np.int64)
_BIT = np.uint32(1) << np.arange(32, dtype=np.uint32)


def bits_of(lanes: Array) -> Array:
    """One word for each warp from 32 predicates."""
    return np.asanyarray((lanes * _BIT).sum(axis=1, dtype=np.uint32))


def shuffle(form: Form, active: Array, value: Array, b: Array, c: Array, mask: Array) -> tuple[Array, Array]:
    """(value from the other lane, whether it is in reach). Pseudo-code of PTX ISA, shfl.sync."""
    clamp, segment = (c & 31).astype(np.int64), (c >> 8 & 31).astype(np.int64)
    distance, mode = (b & 31).astype(np.int64), form.get("mode")
    highest = (_LANE & segment) | (clamp & ~segment)
    lowest = _LANE & segment
    if mode == "up":
        source = _LANE - distance
        inside = source >= highest
    elif mode == "down":
        source = _LANE + distance
        inside = source <= highest
    elif mode == "bfly":
        source = _LANE ^ distance
        inside = source <= highest
    else:
        source = lowest | (distance & ~segment)
        inside = source <= highest
    source = np.where(inside, source, _LANE)
    return np.take_along_axis(value, source, axis=1), inside


def vote(form: Form, active: Array, value: Array, mask: Array) -> Array:
    mode = form.get("mode")
    every, some = (value | ~active).all(axis=1), (value & active).any(axis=1)
    results: dict[str, Any] = {"all": every, "any": some, "uni": every | ~some}
    result: Array = np.asanyarray(results[mode])
    return np.broadcast_to(result[:, None], value.shape).copy()


def ballot(form: Form, active: Array, value: Array, mask: Array) -> Array:
    return np.broadcast_to(bits_of(value & active)[:, None], value.shape).copy()


def match_any(form: Form, active: Array, value: Array, mask: Array) -> Array:
    same = (value[:, :, None] == value[:, None, :]) & active[:, None, :]
    return np.asanyarray((same * _BIT).sum(axis=2, dtype=np.uint32))


def match_all(form: Form, active: Array, value: Array, mask: Array) -> tuple[Array, Array]:
    first = value[np.arange(len(value)), active.argmax(axis=1)]
    same: Array = np.asanyarray(((value == first[:, None]) | ~active).all(axis=1))
    word = np.where(same, bits_of(active), np.uint32(0))
    return (np.broadcast_to(word[:, None], value.shape).copy(), np.broadcast_to(same[:, None], value.shape).copy())


def reduce(form: Form, active: Array, value: Array, mask: Array) -> Array:
    op = form.get("op")
    if value.dtype == np.float32:
        return _reduce_floats(form, active, value)
    neutral: dict[str, Any] = {"add": 0, "or": 0, "xor": 0, "and": np.uint32(0xFFFFFFFF)}
    if op in ("min", "max"):
        limits = np.iinfo(value.dtype)
        neutral[op] = limits.max if op == "min" else limits.min
    kept = np.where(active, value, np.asanyarray(neutral[op]).astype(value.dtype))
    function: Any = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                     "xor": np.bitwise_xor}[op]
    result = function.reduce(kept, axis=1, dtype=value.dtype)
    return np.broadcast_to(result[:, None], value.shape).copy()


def _reduce_floats(form: Form, active: Array, value: Array) -> Array:
    combine = minimum if form.get("op") == "min" else maximum
    value = np.abs(value) if "abs" in form else value
    result = value.copy()
    for warp in range(len(value)):
        lanes = np.flatnonzero(active[warp])
        best = value[warp, lanes[:1]]
        for lane in lanes[1:]:
            best = combine(form, best, value[warp, lane:lane + 1])
        result[warp] = best[0]
    return result


def elect(form: Form, active: Array, mask: Array) -> tuple[Array, Array]:
    """The lowest lane of the mask is elected (PTX leaves open which)."""
    leader = active.argmax(axis=1)
    return (np.broadcast_to(leader[:, None], active.shape).astype(np.uint32),
            np.broadcast_to(_LANE, active.shape) == leader[:, None])


def transpose(form: Form, active: Array, value: Array) -> Array:
    """movmatrix: an 8 x 8 matrix of 16-bit elements, transposed."""
    halves = _halves(value[None])
    rows, columns = f.fragment_b(1, 2)
    matrix = f.gather(halves, rows, columns, (8, 8))
    return np.asarray(_whole(f.scatter(matrix.transpose(0, 2, 1), rows, columns))[0])


def _halves(registers: Array) -> Array:
    """(registers, warps, 32) words as (registers, warps, 32, 2)."""
    return np.ascontiguousarray(registers).view(np.uint16).reshape(*registers.shape, 2)


def _whole(parts: Array) -> Array:
    return np.ascontiguousarray(parts).view(np.uint32)[..., 0]


ELEMENTS: dict[str, Any] = {
    "f16": np.float16, "bf16": ml_dtypes.bfloat16, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2,
    "u8": np.uint8, "s8": np.int8, "f64": np.float64, "f32": np.float32, "s32": np.int32,
}


def elements(registers: Array, type: str) -> Array:
    """(..., slots) elements of a matrix operand, widened to what the product is made in."""
    if type == "tf32":  # the lower 13 bits do not take part
        return (registers & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    if type == "f64":
        return registers.view(np.float64)[..., None]
    kind = np.dtype(ELEMENTS[type])
    parts = np.ascontiguousarray(registers).view(kind).reshape(*registers.shape, 4 // kind.itemsize)
    return widened(parts)


def widened(values: Array) -> Array:
    """Matrix elements in the type in which products are exact: float32, float64 for integers (exact up to 2**53)."""
    if values.dtype == ml_dtypes.bfloat16:
        return (values.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if values.dtype.kind in "iu":
        return values.astype(np.float64)
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float32)


def accumulate(product: Array, sum: Array, saturate: bool) -> Array:
    """sum + product in the type of the sum: float32 or float64, f16 rounded once, s32 wrapped or clamped."""
    if sum.dtype == np.int32:
        total = product.astype(np.int64) + sum
        return (np.clip(total, -(2**31), 2**31 - 1) if saturate else total).astype(np.int32)
    if sum.dtype == np.float16:
        return (product + sum.astype(np.float32)).astype(np.float16)
    return (product + sum).astype(sum.dtype)


def matrix_multiply(form: Form, active: Array, a: Array, b: Array, c: Array, how: ShortSum | None = None) -> Array:
    """D = A B + C on the fragments of each warp (PTX ISA, mma). how: the sums are made so, None: in float32."""
    m, n, k = f.shape_of(form.mnemonic)
    types = form.mnemonic.split(".")
    type_a, type_b, type_c = types[-3], types[-2], types[-1]
    if type_c == "f64":
        return _multiply_f64(a, b, c)
    a_parts, b_parts = elements(a, type_a), elements(b, type_b)
    matrix_a = f.gather(a_parts, *f.fragment_a(len(a), a_parts.shape[-1]), (m, k))
    matrix_b = f.gather(b_parts, *f.fragment_b(len(b), b_parts.shape[-1]), (k, n))
    if type_c == "f16":
        c_parts = np.ascontiguousarray(c).view(np.float16).reshape(*c.shape, 2)
    else:
        c_parts = c[..., None]
    places = f.fragment_c(len(c), c_parts.shape[-1])
    if how is not None:
        sums = add_products(how, (type_a, type_b), matrix_a, matrix_b, f.gather(c_parts, *places, (m, n)))
        result = f.scatter(sums, *places)
    else:
        product = f.scatter(np.matmul(matrix_a, matrix_b), *places)
        result = accumulate(product, c_parts, "satfinite" in form)
    return _whole(result) if type_c == "f16" else result[..., 0]


def opaque_multiply(form: Form, active: Array, a: Array, b: Array, c: Array) -> Array:
    """wmma.mma. Matrices lie in fragments as `f.opaque` has them."""
    m, n, k = f.shape_of(form.mnemonic)
    words = [word for word in form.mnemonic.split(".") if word in ELEMENTS or word == "tf32"]
    type_a, type_d, type_c = words[1] if len(words) == 4 else "f16", words[0], words[-1]
    left, right = (f.from_opaque(elements(part, type_a), shape) for part, shape in ((a, (m, k)), (b, (k, n))))
    sums = np.ascontiguousarray(c).view(np.float16).reshape(*c.shape, 2) if type_c == "f16" else c[..., None]
    sums = f.from_opaque(sums, (m, n)).astype(ELEMENTS[type_d])
    total = accumulate(np.matmul(left, right), sums, "satfinite" in form)
    slots = 2 if type_d == "f16" else 1
    result = f.to_opaque(total, m * n // 32 // slots, slots)
    return _whole(result) if type_d == "f16" else result[..., 0]


def _multiply_f64(a: Array, b: Array, c: Array) -> Array:
    """m8n8k4: A row g, column t; B row t, column g; C row g, column 2 t + r."""
    a, b = a[0].reshape(-1, 8, 4), b[0].reshape(-1, 8, 4).transpose(0, 2, 1)
    total = np.matmul(a, b)
    columns = 2 * f.MEMBER[None, :] + np.arange(2)[:, None]
    return np.asarray(total[:, f.GROUP[None, :], columns].transpose(1, 0, 2) + c)
