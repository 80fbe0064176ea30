"""What every tile op means, on NumPy arrays.

Enters: arrays whose dimensions are named axes. Leaves: arrays. Holds: this module *defines* the language; the tile
interpreter (interpret.py) and the eager run of the author's own function (eager.py) both compute through it, and every
compiled station must agree with it.

Rules that hold throughout:

- f16, bf16 values are held in their own type, computed in f32, and rounded to their type after each op.
- f32 functions without an exact definition in IEEE 754 (exp, tanh, ...) are computed in f64 and rounded once, so that
  the result is within half an ulp and a bit: the compiled kernel's own error is then all that a comparison sees.
- Sums and contractions of f32 (and of f16 and bf16, whose inside is f32) accumulate in f64 and are rounded once to f32:
  at least as precise as any order of lanes.
- Integers wrap. `index` is computed in 64 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from ..ir.types import (
    DTYPES,
    DType,
    bf16,
    bool_,
    f8e4m3,
    f8e5m2,
    f16,
    f32,
    f64,
    i4,
    i8,
    i16,
    i32,
    i64,
    index,
    u8,
)

Array = np.ndarray[Any, Any]
Axes = tuple[str, ...]

_NUMPY: dict[DType, np.dtype[Any]] = {
    f64: np.dtype(np.float64), f32: np.dtype(np.float32), f16: np.dtype(np.float16),
    bf16: np.dtype(ml_dtypes.bfloat16), f8e4m3: np.dtype(ml_dtypes.float8_e4m3fn),
    f8e5m2: np.dtype(ml_dtypes.float8_e5m2), i64: np.dtype(np.int64), i32: np.dtype(np.int32),
    i16: np.dtype(np.int16), i8: np.dtype(np.int8), i4: np.dtype(ml_dtypes.int4), u8: np.dtype(np.uint8),
    bool_: np.dtype(np.bool_), index: np.dtype(np.int64),
}
_F32, _F64, _I64 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int64)
_NARROW = frozenset(_NUMPY[d] for d in (f16, bf16, f8e4m3, f8e5m2))
_BY_NUMPY: dict[np.dtype[Any], DType] = {_NUMPY[d]: d for d in DTYPES.values() if d is not index}


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """The NumPy type that holds a dtype (index: int64; i4 and fp8: ml_dtypes, one element a byte)."""
    return _NUMPY[dtype]


def dtype_of(array: Array) -> DType | None:
    """The dtype that an array holds, None for one that sapper does not know. int64 is i64, never index."""
    return _BY_NUMPY.get(array.dtype)


# Axes ---------------------------------------------------------------------------------------------------------------


def union_axes(*several: Axes) -> Axes:
    """All axes, in order of first appearance."""
    first = several[0] if several else ()
    if all(axes == first or not axes for axes in several[1:]):
        return first
    return tuple(dict.fromkeys(axis for axes in several for axis in axes))


def align(array: Array, axes: Axes, onto: Axes) -> Array:
    """A view of `array` (dimensions `axes`) with dimensions `onto`, of size 1 for an axis it does not span."""
    if axes == onto or not axes:
        return array
    order = [axes.index(axis) for axis in onto if axis in axes]
    if len(order) != len(axes):
        raise ValueError(f"a tile over {axes} cannot be spread onto {onto}: an axis would be lost")
    return array.transpose(order)[tuple(slice(None) if axis in axes else None for axis in onto)]


# Elementwise --------------------------------------------------------------------------------------------------------


def _erf(x: Array) -> Array:
    return np.asarray(_ERF(x), dtype=np.float64)


_ERF = np.frompyfunc(math.erf, 1, 1)


_TRANSCENDENTAL: dict[str, Callable[[Array], Array]] = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2, "tanh": np.tanh, "erf": _erf, "sin": np.sin,
    "cos": np.cos, "rsqrt": lambda x: 1.0 / np.sqrt(x), "sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)),
}
"""Computed in f64, whatever the operand."""

_DIRECT: dict[str, Callable[..., Any]] = {
    "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "floor": np.floor, "ceil": np.ceil, "round": np.rint,
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
    "max": lambda a, b: np.where(a > b, a, b), "min": lambda a, b: np.where(a < b, a, b),
    "floordiv": np.floor_divide, "mod": np.remainder, "shl": np.left_shift, "shr": np.right_shift,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}

ELEMENTWISE = frozenset([*_TRANSCENDENTAL, *_DIRECT, "select", "asm", "cast", "bitcast"])
"""Ops that `elementwise` computes."""


def elementwise(name: str, operands: Sequence[Array], result: DType) -> Array:
    """One elementwise op on arrays that broadcast against each other by position.

    name: an op of sapper/tile/ops.py. operands: arrays of the op's operand types. result: dtype of the result (it
    decides what `cast` and `bitcast` do). KeyError for a name that is not elementwise.
    """
    if name == "cast":
        return cast(operands[0], result)
    if name == "asm":
        return np.asanyarray(np.broadcast_arrays(*operands)[0])
    if name == "bitcast":
        return np.asanyarray(operands[0]).view(_NUMPY[result])
    with np.errstate(all="ignore"):
        if name == "select":
            return np.asanyarray(np.where(*operands))
        wide = [a.astype(_F32) if a.dtype in _NARROW else a for a in operands]
        if name in _TRANSCENDENTAL:
            value = _TRANSCENDENTAL[name](wide[0].astype(_F64))
            if result is not f64:
                value = np.asarray(value).astype(_F32)
        else:
            value = _DIRECT[name](*wide)
        return np.asanyarray(value).astype(_NUMPY[result], copy=False)


def cast(array: Array, result: DType) -> Array:
    """The `cast` op: `array` as another dtype.

    To f16, bf16 and fp8: rounded to f32 first, then to the type, both to nearest even (so f64 and integers are rounded
    twice, as a chip does that has no direct conversion). Float to integer truncates; NaN and values out of range are
    unspecified by the language, and here they are what x86-64 gives (CVTTPS2DQ, CVTTSS2SI: Intel SDM volume 1, 4.8.3.7
    "integer indefinite"): the lowest integer of 32 bits (64 for i64 and index). Narrower integers take the low bits of
    the 32-bit result. Integers wrap. To bool is `!= 0`.
    """
    source, target = array.dtype, _NUMPY[result]
    if source == target:
        return np.asanyarray(array)
    with np.errstate(all="ignore"):
        if result is bool_:
            return np.asanyarray(array != np.zeros((), source))
        if result.is_float:
            if target in _NARROW:
                array = array.astype(_F32)
            return np.asanyarray(array.astype(target))
        if source.kind == "f" or source in _NARROW:
            wide = 64 if result.bits == 64 else 32
            exact = np.trunc(array.astype(_F64))
            inside = (exact >= -(2.0 ** (wide - 1))) & (exact < 2.0 ** (wide - 1))
            lowest = -(2 ** (wide - 1))
            array = np.where(inside, np.where(inside, exact, 0.0).astype(_I64), lowest)
        elif source == np.bool_ or source == _NUMPY[i4]:
            array = array.astype(_I64)
        if result is i4:
            array = ((array.astype(_I64) & 15) ^ 8) - 8
        return np.asanyarray(array.astype(target))


# Reductions ---------------------------------------------------------------------------------------------------------


def _lowest(dtype: np.dtype[Any], sign: int) -> Any:
    """The value that loses every comparison: -inf or the lowest integer for sign -1, +inf or the highest for +1."""
    if dtype == np.bool_:
        return dtype.type(sign > 0)
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return dtype.type(info.min if sign < 0 else info.max)
    return dtype.type(math.copysign(math.inf, sign))


def _fold_extreme(kind: str, x: Array) -> Array:
    """max or min over the last dimension. NaN elements do not take part."""
    identity = _lowest(x.dtype, -1 if kind == "max" else 1)
    if x.shape[-1] == 0:
        return np.full(x.shape[:-1], identity, x.dtype)
    ordered = np.where(np.isnan(x), identity, x) if x.dtype.kind == "f" else x
    return np.asarray(np.max(ordered, axis=-1) if kind == "max" else np.min(ordered, axis=-1)).astype(x.dtype)


def _fold_position(kind: str, x: Array) -> Array:
    """argmax or argmin over the last dimension: the first of the greatest (least) elements. NaN elements do not take
    part; 0 where none is left."""
    if x.shape[-1] == 0:
        return np.zeros(x.shape[:-1], np.int64)
    find = np.argmax if kind == "argmax" else np.argmin
    if x.dtype.kind != "f" or not np.isnan(x).any():
        return np.asarray(find(x, axis=-1), dtype=np.int64)
    identity = _lowest(x.dtype, -1 if kind == "argmax" else 1)
    position = np.asarray(find(np.where(np.isnan(x), identity, x), axis=-1), dtype=np.int64)
    best = np.take_along_axis(x, position[..., None], axis=-1)[..., 0]
    return np.where(np.isnan(best) | (best == identity), 0, position)


def reduce(kind: str, array: Array, axes: Axes, over: Sequence[str], result: DType,
           starts: Sequence[int] = (0,)) -> Array:
    """The `reduce` op: `array` (dimensions `axes`) without the axes `over`, the others in their order.

    kind: sum, max, min, argmax, argmin. starts: the first coordinate of each axis of `over`, which argmax and argmin
    need (one axis only). Over nothing: sum is 0, max the lowest value (-inf for floats), argmax the start.
    NaN elements take no part in max, min, argmax and argmin, so the result does not depend on the order, which is a
    schedule's to choose (as maxNum of IEEE 754-2008).
    """
    kept = [axis for axis in axes if axis not in over]
    moved = array.transpose([axes.index(axis) for axis in (*kept, *over)]) if axes else array
    shape = moved.shape[: len(kept)]
    x = moved.reshape((*shape, math.prod(moved.shape[len(kept):])))
    target = _NUMPY[result]
    with np.errstate(all="ignore"):
        if kind == "sum":
            if result.is_float:
                total = np.sum(x.astype(_F64, copy=False), axis=-1)
                return np.asarray(total if result is f64 else total.astype(_F32).astype(target))
            return np.asarray(np.sum(x.astype(target, copy=False), axis=-1, dtype=target))
        wide = x.astype(_F32) if x.dtype in _NARROW else x
        if kind in ("max", "min"):
            return _fold_extreme(kind, wide).astype(target)
        if kind not in ("argmax", "argmin"):
            raise KeyError(f"reduce of kind {kind!r}; expected sum, max, min, argmax or argmin")
        if len(over) != 1:
            raise ValueError(f"{kind} over {list(over)}: expected one axis")
        return (_fold_position(kind, wide) + int(starts[0])).astype(target)


def scan(kind: str, array: Array, dimension: int, result: DType) -> Array:
    """The `scan` op along one dimension of an array: sum, max or min of each element and all before it."""
    target = _NUMPY[result]
    with np.errstate(all="ignore"):
        if kind == "sum":
            if not result.is_float:
                return np.asarray(np.cumsum(array, axis=dimension, dtype=target))
            total = np.cumsum(array.astype(_F64, copy=False), axis=dimension)
            return np.asarray(total if result is f64 else total.astype(_F32).astype(target))
        wide = array.astype(_F32) if array.dtype in _NARROW else array
        if wide.dtype.kind == "f":
            wide = np.where(np.isnan(wide), _lowest(wide.dtype, -1 if kind == "max" else 1), wide)
        running = np.maximum if kind == "max" else np.minimum
        return np.asarray(running.accumulate(wide, axis=dimension)).astype(target)


def topk(array: Array, axes: Axes, over: str, count: int, start: int) -> tuple[Array, Array]:
    """The `topk` op: values and coordinates, the axis `over` replaced by a last one of `count`. start: the first
    coordinate of `over`."""
    x = np.moveaxis(array, axes.index(over), -1)
    wide = x.astype(_F32) if x.dtype in _NARROW else x
    lowest = _lowest(wide.dtype, -1)
    ordered = np.where(np.isnan(wide), lowest, wide) if wide.dtype.kind == "f" else wide
    # Stable and falling: sort backwards what lies backwards.
    places = x.shape[-1] - 1 - np.argsort(ordered[..., ::-1], axis=-1, kind="stable")[..., ::-1][..., :count]
    values = np.take_along_axis(ordered, places, axis=-1)
    places = np.where(values == lowest, 0, places) + start
    lacking = [(0, 0)] * (x.ndim - 1) + [(0, count - values.shape[-1])]
    return (np.pad(values, lacking, constant_values=lowest).astype(x.dtype),
            np.pad(places, lacking, constant_values=start).astype(np.int64))


def contract(a: Array, a_axes: Axes, b: Array, b_axes: Axes, over: Sequence[str], onto: Axes, result: DType) -> Array:
    """The `contract` op: sum(a * b) over the axes `over`, with dimensions `onto`.

    Floats accumulate in f64 (products of f32 are exact there) and are rounded once. i8, u8 and i16 are exact in f64
    and then wrap to the result; wider integers wrap throughout.
    """
    over_set = set(over)
    batch = [x for x in a_axes if x in b_axes and x not in over_set]
    shared = [x for x in a_axes if x in b_axes and x in over_set]
    a_free = [x for x in a_axes if x not in b_axes and x not in over_set]
    b_free = [x for x in b_axes if x not in a_axes and x not in over_set]
    small = a.dtype.itemsize <= 2 and b.dtype.itemsize <= 2
    middle = _F64 if result.is_float or small else _I64

    def operand(x: Array, axes: Axes, groups: tuple[list[str], list[str], list[str]]) -> tuple[Array, list[int]]:
        x = x.astype(middle)
        alone = tuple(position for position, axis in enumerate(axes)
                      if axis in over_set and axis not in groups[0] + groups[1] + groups[2])
        if alone:  # an axis that only this operand has
            x = np.asarray(x.sum(axis=alone))
            axes = tuple(axis for position, axis in enumerate(axes) if position not in alone)
        x = x.transpose([axes.index(axis) for group in groups for axis in group]) if axes else x
        sizes = list(x.shape)
        ends = (len(groups[0]), len(groups[0]) + len(groups[1]))
        return x.reshape(math.prod(sizes[:ends[0]]), math.prod(sizes[ends[0]:ends[1]]),
                         math.prod(sizes[ends[1]:])), sizes

    with np.errstate(all="ignore"):
        left, left_sizes = operand(a, a_axes, (batch, a_free, shared))
        right, right_sizes = operand(b, b_axes, (batch, shared, b_free))
        product = np.matmul(left, right)
        made = (*batch, *a_free, *b_free)
        shape = (left_sizes[: len(batch) + len(a_free)]
                 + right_sizes[len(batch) + len(shared):])
        product = align(product.reshape(shape), made, onto)
        target = _NUMPY[result]
        if result.is_float:
            return np.asarray(product if result is f64 else product.astype(_F32).astype(target))
        return np.asarray(product.astype(_I64).astype(target))


# Memory -------------------------------------------------------------------------------------------------------------


class OutOfBounds(IndexError):
    """An index outside a tensor. tensor: its name; dimension: which, from 0; index: the one that is farthest out."""

    def __init__(self, message: str, tensor: str, dimension: int, index: int) -> None:
        super().__init__(message)
        self.tensor = tensor
        self.dimension = dimension
        self.index = index


def check_bounds(shape: Sequence[int], indices: Sequence[Array], tensor: str, where: Callable[[], str],
                 doing: str) -> None:
    """Raise OutOfBounds, naming place, tensor, dimension, index and extent, unless every index is inside `shape`.

    indices: one integer array for each dimension, broadcasting. Nothing is accessed, hence nothing checked, when
    together they have no element. where: gives the place, asked only when it is needed.
    """
    for array in indices:
        if array.size == 0:
            return
    for dimension, (extent, array) in enumerate(zip(shape, indices, strict=True)):
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= extent:
            found = low if low < 0 else high
            raise OutOfBounds(
                f"{where()}: {doing} of {tensor} out of bounds: dimension {dimension} has extent {extent}, "
                f"found index {found}; expected 0 <= index < {extent}", tensor, dimension, found)


def view(array: Array, extents: Sequence[int], dtype: DType) -> Array:
    """The same memory with other extents, of another dtype. ValueError where it has other elements, or they do not lie
    so that strides can say where."""
    target = _NUMPY[dtype]
    if array.size * array.itemsize != math.prod(extents) * target.itemsize:
        raise ValueError(f"found a tensor of {array.size} elements of {array.itemsize} bytes; expected "
                         f"{' * '.join(map(str, extents))} elements of {target.itemsize} bytes")
    if not array.size:
        return np.zeros(tuple(extents), target)
    made = (array if array.dtype == target else array.view(target)).reshape(tuple(extents))
    if not np.may_share_memory(made, array):
        raise ValueError(f"found a tensor with strides {array.strides} in bytes; expected axes that are merged, or "
                         "read as another dtype, to be contiguous")
    return made


_JOINED: dict[str, np.ufunc] = {
    "add": np.add, "max": np.maximum, "min": np.minimum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def joined(name: str, array: Array, where: tuple[Array, ...], values: Array) -> tuple[tuple[Array, ...], Array]:
    """The elements of an array that indices name, each once, and what the op `name` makes of each and all values for
    it. Sums of floats are rounded once, as `reduce` does."""
    where = tuple(np.broadcast_arrays(*where))
    flat, place = np.unique(np.ravel_multi_index(where, array.shape).reshape(-1), return_inverse=True)
    elements = tuple(np.unravel_index(flat, array.shape))
    floats = array.dtype.kind == "f" or array.dtype in _NARROW
    total = array[elements].astype(_F64 if floats else array.dtype)
    with np.errstate(all="ignore"):
        spread = np.broadcast_to(values, where[0].shape).reshape(-1)
        _JOINED[name].at(total, place.reshape(-1), spread.astype(total.dtype))
        if array.dtype in _NARROW:
            total = total.astype(_F32)
        return elements, total.astype(array.dtype)


def constant(value: Any, dtype: DType) -> Array:
    """A Python number as a scalar of a dtype. Integers wrap; floats are rounded as `cast` does."""
    if isinstance(value, bool | np.bool_):
        return cast(np.asarray(value, np.bool_), dtype)
    if dtype.is_float:
        return cast(np.asarray(float(value), _F64), dtype)
    if dtype is bool_:
        return np.asarray(value != 0)
    whole = int(value)
    return cast(np.asarray((whole + 2**63) % 2**64 - 2**63, _I64), dtype)
