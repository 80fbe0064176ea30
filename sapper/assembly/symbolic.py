"""Arrays and integers whose values are not known: what a row's meaning computes on them is a term for each lane.

Enters: the calls that a meaning makes of NumPy. Leaves: `Lanes` and `Number`s over terms (terms.py). Holds: meanings
stand once, in `targets/*/meaning*.py`, and are run on these as on arrays and ints; a step that needs a value which is
not known (a jump, an address, a place in memory) raises `NotSymbolic` and nothing is guessed.

`Lanes` is a subclass of `numpy.ndarray`, so that slices, reshapes and transposes are NumPy's own; its elements are
terms, and `dtype` is that of the values that they stand for. NumPy hands its functions over by its protocols
(NEP 13 and NEP 18).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np

from . import terms
from .terms import NotSymbolic as NotSymbolic
from .terms import Term

NUMBER_BITS = 130
"""Bits of a Number, two's complement: more than a product of two words, so that it acts as a Python int does."""


class Number:
    """An int that is not known: a general register, an opmask, a flag."""

    def __init__(self, term: Term) -> None:
        self.term = terms.extended(term, NUMBER_BITS, False) if term.width < NUMBER_BITS else term

    def __bool__(self) -> bool:
        if self.term.operator == "const":
            return bool(self.term.detail)
        raise NotSymbolic("a decision depends on the data")

    def __index__(self) -> int:
        if self.term.operator == "const":
            return int(self.term.detail)
        raise NotSymbolic("a place or a count depends on the data")

    def __int__(self) -> int:
        return self.__index__()

    def integer(self) -> Number:
        return self

    def bytes(self, size: int) -> Lanes:
        """The low bytes, the lowest first."""
        return lanes_of([terms.part(self.term, 8 * at, 8) for at in range(size)], "u1")

    def bits(self, count: int) -> Lanes:
        """The low bits as truths."""
        return lanes_of([terms.part(self.term, at, 1) for at in range(count)], bool)

    def lane(self, dtype: Any) -> Lanes:
        """The low bits as an array of one element."""
        return lanes_of([terms.part(self.term, 0, 8 * np.dtype(dtype).itemsize)], dtype)

    def bit_count(self) -> Number:
        return Number(reduce(terms.add, (terms.extended(terms.part(self.term, at, 1), NUMBER_BITS, False)
                                         for at in range(64))))

    def bit_length(self) -> int:
        return int(self).bit_length()

    def __mod__(self, other: int) -> Number:
        if other & (other - 1):
            raise NotSymbolic(f"a remainder by {other}")
        return Number(terms.both(self.term, terms.const(other - 1, NUMBER_BITS)))

    def __invert__(self) -> Number:
        return Number(terms.invert(self.term))

    def __neg__(self) -> Number:
        return Number(terms.sub(terms.const(0, NUMBER_BITS), self.term))

    def chosen(self, then: Any, otherwise: Any) -> Number:
        """then where this is not 0."""
        return Number(terms.ite(_is_on(self.term), _number(then), _number(otherwise)))

    __hash__ = None  # type: ignore[assignment]


def _number(value: Any) -> Term:
    return value.term if isinstance(value, Number) else terms.const(int(value), NUMBER_BITS)


def _is_on(a: Term) -> Term:
    return terms.invert(terms.equal(a, terms.const(0, a.width)))


_INTEGERS: dict[str, Callable[[Term, Term], Term]] = {
    "add": terms.add, "sub": terms.sub, "mul": terms.mul, "and": terms.both, "or": terms.either,
    "xor": terms.differing, "lshift": terms.shift_left, "rshift": terms.shift_right_signed,
    "eq": terms.equal, "ne": lambda a, b: terms.invert(terms.equal(a, b)),
    "lt": lambda a, b: terms.less(a, b, True), "gt": lambda a, b: terms.less(b, a, True),
    "le": lambda a, b: terms.invert(terms.less(b, a, True)), "ge": lambda a, b: terms.invert(terms.less(a, b, True)),
}


def _operator(operation: Callable[[Term, Term], Term], reflected: bool) -> Callable[[Number, Any], Any]:
    def apply(self: Number, other: Any) -> Any:
        if isinstance(other, np.ndarray):
            return NotImplemented
        a, b = (_number(other), self.term) if reflected else (self.term, _number(other))
        return Number(operation(a, b))
    return apply


for _word, _operation in _INTEGERS.items():
    setattr(Number, f"__{_word}__", _operator(_operation, False))
    if _word not in ("eq", "ne", "lt", "gt", "le", "ge"):
        setattr(Number, f"__r{_word}__", _operator(_operation, True))


# --- Arrays -----------------------------------------------------------------------------------------------------------

def lanes_of(elements: Sequence[Term], dtype: Any) -> Lanes:
    made = np.empty(len(elements), object)
    made[:] = elements
    return _wrapped(made, np.dtype(dtype))


def unknown(name: str, shape: tuple[int, ...], dtype: Any) -> Lanes:
    """An array of inputs `name.0`, `name.1`, ..."""
    kind = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    made: Any = lanes_of([terms.variable(f"{name}.{at}", _bits(kind)) for at in range(count)], kind).reshape(shape)
    return made  # type: ignore[no-any-return]


def symbolic(value: Any) -> bool:
    return isinstance(value, (Lanes, Number))


def _bits(dtype: np.dtype[Any]) -> int:
    return 1 if dtype == np.dtype(bool) else 8 * dtype.itemsize


def _wrapped(elements: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> Lanes:
    made = np.asarray(elements, object).view(Lanes)
    made.of = dtype
    return made


def as_lanes(value: Any, dtype: np.dtype[Any] | None = None) -> Lanes:
    """A value as Lanes; numbers, known arrays and lists too. dtype: of what has none of its own."""
    if isinstance(value, Lanes):
        return value
    if isinstance(value, Number):
        return value.lane(dtype or np.dtype(np.int64)).reshape(())  # type: ignore[return-value]
    if isinstance(value, (list, tuple)) and any(symbolic(x) for x in value):
        return np.stack([as_lanes(x, dtype) for x in value])  # type: ignore[return-value]
    known = np.asarray(value)
    if dtype is not None and not isinstance(value, np.ndarray):
        known = known.astype(dtype)
    made = np.empty(known.shape, object)
    bits = _bits(known.dtype)
    whole = known.astype(np.uint8) if bits == 1 else np.ascontiguousarray(known).view(f"u{known.dtype.itemsize}")
    made.reshape(-1)[:] = [terms.const(int(x), bits) for x in np.ravel(whole)]
    return _wrapped(made, known.dtype)


def _plain(array: Lanes) -> np.ndarray[Any, Any]:
    return np.ndarray.view(array, np.ndarray)


def _each(function: Callable[..., Term], dtype: np.dtype[Any], *arrays: Lanes) -> Lanes:
    """function on the terms of arrays that broadcast."""
    spread = np.broadcast_arrays(*(_plain(a) for a in arrays))
    made = np.empty(spread[0].shape, object)
    made.reshape(-1)[:] = [function(*ts) for ts in zip(*(np.ravel(a) for a in spread), strict=True)]
    return _wrapped(made, dtype)


class Lanes(np.ndarray[Any, Any]):
    """An array of terms. of: the dtype of what they stand for."""

    of: np.dtype[Any]

    def __array_finalize__(self, source: Any) -> None:
        self.of = getattr(source, "of", np.dtype(np.uint8))

    @property
    def dtype(self) -> Any:
        return self.of

    @property
    def itemsize(self) -> int:
        return self.of.itemsize

    @property
    def nbytes(self) -> int:
        return self.of.itemsize * self.size

    def terms(self) -> list[Term]:
        return list(np.ravel(_plain(self)))

    # --- Other dtypes -------------------------------------------------------------------------------------------------

    def view(self, dtype: Any = None, *_: Any) -> Any:  # type: ignore[override]
        """The same bits as another dtype; along the last axis where the sizes differ."""
        if isinstance(dtype, type) and issubclass(dtype, np.ndarray):
            return np.ndarray.view(self, dtype)
        to, bits = np.dtype(dtype), self.of.itemsize
        if to.itemsize == bits or self.ndim == 0:
            return _wrapped(_plain(self), to)
        rows = _plain(self).reshape(-1, self.shape[-1])
        if to.itemsize < bits:
            times = bits // to.itemsize
            cut = [[terms.part(t, 8 * to.itemsize * at, 8 * to.itemsize) for t in row for at in range(times)]
                   for row in rows]
        else:
            times = to.itemsize // bits
            cut = [[terms.concat(reversed(row[at:at + times])) for at in range(0, len(row), times)] for row in rows]
        made = np.empty((len(rows), len(cut[0]) if cut else 0), object)
        for at, row in enumerate(cut):
            made[at] = row
        return _wrapped(made.reshape(*self.shape[:-1], -1), to)

    def astype(self, dtype: Any, *_: Any, **__: Any) -> Any:
        to = np.dtype(dtype)
        if to.itemsize > 8:
            raise NotSymbolic("extended precision")
        return self if to == self.of else _each(lambda t: converted(t, self.of, to), to, self)

    def bytes(self) -> Lanes:
        """All bytes, the lowest of each element first."""
        flat: Lanes = _wrapped(np.ravel(_plain(self)), self.of)
        return flat.view(np.uint8)  # type: ignore[no-any-return]

    def number(self) -> Number:
        """Bytes as an int, the lowest first."""
        return Number(terms.concat(reversed(self.terms())))

    def taken_from(self, table: Any) -> Lanes:
        """table[self]."""
        whole = as_lanes(table)
        return _chosen(_plain(whole), self, whole.of)

    def integer(self) -> Number:
        """The one element as an int."""
        (only,) = Lanes.terms(self)
        return Number(terms.extended(only, NUMBER_BITS, self.of.kind == "i"))

    def __bool__(self) -> bool:
        return bool(self.integer())

    def __int__(self) -> int:
        return int(self.integer())

    def __index__(self) -> int:
        return int(self.integer())

    # --- Elements -----------------------------------------------------------------------------------------------------

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, Lanes):
            if place.of == np.dtype(bool):
                raise NotSymbolic("which lanes are taken depends on the data")
            return _chosen(_plain(self), place, self.of)
        found = np.ndarray.__getitem__(_plain(self), place)
        if isinstance(found, Term):
            cell = np.empty((), object)
            cell[()] = found
            found = cell
        return _wrapped(found, self.of)

    def __setitem__(self, place: Any, value: Any) -> None:
        given = as_lanes(value, self.of)
        if given.of.itemsize != self.of.itemsize:
            given = given.astype(self.of)
        if isinstance(place, Lanes):
            if place.of != np.dtype(bool):
                raise NotSymbolic("where something is stored depends on the data")
            _plain(self)[...] = _plain(_each(terms.ite, self.of, place, given, self))
        elif _plain(given).shape == ():
            np.ndarray.__setitem__(_plain(self), place, _plain(given)[()])
        else:
            np.ndarray.__setitem__(_plain(self), place, _plain(given))

    def __iter__(self) -> Any:
        return (self[at] for at in range(len(self)))

    def tobytes(self, *_: Any) -> Any:
        raise NotSymbolic("bytes are asked for that depend on the data")

    def tolist(self) -> Any:
        raise NotSymbolic("numbers are asked for that depend on the data")

    # --- NumPy's protocols --------------------------------------------------------------------------------------------

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        if method == "reduce":
            return _folded(ufunc, inputs[0], options.get("axis", 0), options.get("keepdims", False))
        if method != "__call__" or any(v is not None for k, v in options.items() if k in ("out", "where")):
            raise NotSymbolic(f"{ufunc.__name__}.{method}")
        return computed(ufunc, inputs)

    def __array_function__(self, function: Any, types: Any, arguments: Any, options: Any) -> Any:
        handler = _FUNCTIONS.get(function.__name__)
        if handler is None:
            raise NotSymbolic(f"numpy.{function.__name__} on what is not known")
        return handler(*arguments, **options)


def _chosen(table: np.ndarray[Any, Any], index: Lanes, dtype: np.dtype[Any]) -> Lanes:
    """table[index] for an index that is not known: of every entry the one whose number it is."""
    if table.ndim != 1:
        raise NotSymbolic("a table of several dimensions")

    def pick(t: Term) -> Term:
        if t.operator == "const":
            return table[t.detail]  # type: ignore[no-any-return]
        found = table[-1]
        for at in range(len(table) - 2, -1, -1):
            found = terms.ite(terms.equal(t, terms.const(at, t.width)), table[at], found)
        return found  # type: ignore[no-any-return]

    return _each(pick, dtype, index)


def _folded(ufunc: Any, array: Any, axis: Any, keepdims: bool) -> Any:
    whole = as_lanes(array)
    if whole.of == np.dtype(bool) and ufunc is np.add:
        whole = whole.astype(np.int64)
    if axis is None:
        whole, axis = whole.reshape(-1), 0  # type: ignore[assignment]
    moved = np.moveaxis(_plain(whole), axis, 0)
    made = reduce(lambda a, b: computed(ufunc, (a, b)), (_wrapped(np.asarray(row, object), whole.of) for row in moved))
    return np.expand_dims(made, axis) if keepdims else made


# --- Functions --------------------------------------------------------------------------------------------------------

def converted(a: Term, source: np.dtype[Any], to: np.dtype[Any]) -> Term:
    """`astype` on one element."""
    if to == np.dtype(bool):
        if source.kind == "f":
            return terms.invert(_float_zero(a))
        return _is_on(a)
    if source.kind in "iub" and to.kind in "iu":
        return terms.extended(a, _bits(to), source.kind == "i")
    if source == np.dtype(np.float32) and to.name == "bfloat16":
        return _to_bf16(a)
    if source.name == "bfloat16" and to == np.dtype(np.float32):
        return terms.concat([a, terms.const(0, 16)])
    return terms.call(f"cast {source.name} to {to.name}", _caster(to), (_name(source),), _name(to), a)


_casters: dict[str, Callable[[Any], Any]] = {}


def _caster(to: np.dtype[Any]) -> Callable[[Any], Any]:
    return _casters.setdefault(_name(to), lambda x: x.astype(to))


def _name(dtype: np.dtype[Any]) -> str:
    """A name from which terms.py makes the dtype again."""
    return dtype.name


def _to_bf16(a: Term) -> Term:
    """The upper half, rounded to nearest even: the carry out of the lower half may go up as far as infinity. A NaN
    stays one."""
    odd = terms.extended(terms.part(a, 16, 1), 32, False)
    rounded = terms.part(terms.add(terms.add(a, terms.const(0x7FFF, 32)), odd), 16, 16)
    quiet = terms.concat([terms.part(a, 31, 1), terms.const(0x7FC0, 15)])
    return terms.ite(_is_nan(a), quiet, rounded)


_EXPONENT_BITS = {16: 5, 32: 8, 64: 11}


def _magnitude(a: Term) -> Term:
    return terms.part(a, 0, a.width - 1)


def _infinity(width: int) -> Term:
    """The magnitude of an infinity; those of NaNs are larger."""
    exponent = _EXPONENT_BITS[width]
    return terms.const(((1 << exponent) - 1) << (width - 1 - exponent), width - 1)


def _is_nan(a: Term) -> Term:
    return terms.less(_infinity(a.width), _magnitude(a))


def is_nan(a: Term, dtype: Any) -> Term:
    """Whether the value is a NaN of the float dtype."""
    return _is_nan(a) if np.dtype(dtype).name != "bfloat16" else _is_nan(terms.concat([a, terms.const(0, 16)]))


def _float_zero(a: Term) -> Term:
    return terms.equal(_magnitude(a), terms.const(0, a.width - 1))


def _float_less(a: Term, b: Term) -> Term:
    """By sign and magnitude; zeros are equal, and a NaN is neither less nor more."""
    sign_a, sign_b = (terms.part(x, x.width - 1, 1) for x in (a, b))
    smaller, larger = terms.less(_magnitude(a), _magnitude(b)), terms.less(_magnitude(b), _magnitude(a))
    zeros = terms.both(_float_zero(a), _float_zero(b))
    ordered = terms.ite(sign_a, terms.ite(sign_b, larger, terms.invert(zeros)),
                        terms.ite(sign_b, terms.const(0, 1), smaller))
    return terms.both(ordered, terms.invert(terms.either(_is_nan(a), _is_nan(b))))


def _float_equal(a: Term, b: Term) -> Term:
    same = terms.either(terms.equal(a, b), terms.both(_float_zero(a), _float_zero(b)))
    return terms.both(same, terms.invert(terms.either(_is_nan(a), _is_nan(b))))


def _comparison(name: str, kind: str) -> Callable[[Term, Term], Term]:
    is_less = _float_less if kind == "f" else lambda a, b: terms.less(a, b, kind == "i")
    same = _float_equal if kind == "f" else terms.equal
    return {
        "less": is_less, "greater": lambda a, b: is_less(b, a), "equal": same,
        "not_equal": lambda a, b: terms.invert(same(a, b)),
        "less_equal": lambda a, b: terms.either(is_less(a, b), same(a, b)),
        "greater_equal": lambda a, b: terms.either(is_less(b, a), same(a, b)),
    }[name]


_COMPARISONS = frozenset({"less", "less_equal", "equal", "not_equal", "greater", "greater_equal"})
_INTEGER_UFUNCS: dict[str, Callable[..., Term]] = {
    "add": terms.add, "subtract": terms.sub, "multiply": terms.mul, "bitwise_and": terms.both,
    "bitwise_or": terms.either, "bitwise_xor": terms.differing, "invert": terms.invert,
    "logical_and": terms.both, "logical_or": terms.either, "logical_not": terms.invert,
    "left_shift": terms.shift_left,
    "negative": lambda a: terms.sub(terms.const(0, a.width), a),
    "bitwise_count": lambda a: reduce(terms.add, (terms.extended(terms.part(a, at, 1), 8, False)
                                                  for at in range(a.width))),
}
_FLOAT_BITS: dict[str, Callable[[Term], Term]] = {
    "isnan": _is_nan, "isinf": lambda a: terms.equal(_magnitude(a), _infinity(a.width)),
    "isfinite": lambda a: terms.less(_magnitude(a), _infinity(a.width)),
    "signbit": lambda a: terms.part(a, a.width - 1, 1),
}


def computed(ufunc: Any, inputs: Sequence[Any]) -> Lanes:
    """A ufunc on inputs of which some are not known. What is no matter of bits becomes a call."""
    name = ufunc.__name__
    if name in _COMPARISONS or name in _FLOAT_BITS:  # which a bf16 passes as the f32 that it is
        inputs = [x.astype(np.float32) if isinstance(x, np.ndarray) and x.dtype.name == "bfloat16" else x
                  for x in inputs]
    given = [x.dtype if isinstance(x, np.ndarray) else np.dtype(np.int64) if isinstance(x, Number)
             else type(x) if type(x) in (int, float) else np.asarray(x).dtype for x in inputs]
    if name in _COMPARISONS | {"minimum", "maximum"}:
        common: Any = _common(inputs, given)
        a, b = (as_lanes(x, common).astype(common) for x in inputs)
        order = _comparison(name if name in _COMPARISONS else "less", common.kind)
        if name in _COMPARISONS:
            return _each(order, np.dtype(bool), a, b)
        if common.kind in "iu":
            smaller = name == "minimum"
            return _each(lambda x, y: terms.ite(order(x, y) if smaller else order(y, x), x, y), common, a, b)
    if ufunc.nout > 1:
        raise NotSymbolic(f"numpy.{name} on what is not known")
    *sources, result = ufunc.resolve_dtypes((*given, *[None] * ufunc.nout))
    if any(d.itemsize > 8 for d in (*sources, result)):
        raise NotSymbolic(f"{name} in extended precision")
    arrays = [as_lanes(x, s).astype(s) for x, s in zip(inputs, sources, strict=True)]
    kinds = {s.kind for s in sources}
    if name in _FLOAT_BITS and kinds == {"f"}:
        return _each(_FLOAT_BITS[name], np.dtype(bool), *arrays)
    if name == "right_shift":
        signed = sources[0].kind == "i"
        return _each(terms.shift_right_signed if signed else terms.shift_right, result, *arrays)
    if name in _INTEGER_UFUNCS and kinds <= set("iub"):
        return _each(_INTEGER_UFUNCS[name], result, *arrays)
    if name in ("absolute", "negative", "copysign") and kinds == {"f"}:
        return _each(_signs[name], result, *arrays)
    if name == "absolute" and kinds == {"i"}:
        zero = terms.const(0, _bits(result))
        return _each(lambda t: terms.ite(terms.less(t, zero, True), terms.sub(zero, t), t), result, *arrays)
    return _each(lambda *ts: terms.call(name, ufunc, tuple(map(_name, sources)), _name(result), *ts), result, *arrays)


def _with_sign(sign: Term, a: Term) -> Term:
    return terms.concat([sign, _magnitude(a)])


_signs: dict[str, Callable[..., Term]] = {
    "absolute": lambda a: _with_sign(terms.const(0, 1), a),
    "negative": lambda a: _with_sign(terms.invert(terms.part(a, a.width - 1, 1)), a),
    "copysign": lambda a, b: _with_sign(terms.part(b, b.width - 1, 1), a),
}


def _common(inputs: Sequence[Any], given: Sequence[Any]) -> np.dtype[Any]:
    """The dtype in which two inputs are compared; a Python number takes that of the other."""
    own = [d for d in given if isinstance(d, np.dtype)]
    return np.dtype(np.result_type(*own)) if own else np.dtype(np.int64)


def _where(condition: Any, a: Any, b: Any) -> Lanes:
    own = [x.dtype for x in (a, b) if isinstance(x, (np.ndarray, np.generic))]
    kind = np.dtype(np.result_type(*own)) if own else np.dtype(np.int64)
    truth = as_lanes(condition)
    return _each(terms.ite, kind, truth if truth.of == np.dtype(bool) else truth != 0,
                 as_lanes(a, kind).astype(kind), as_lanes(b, kind).astype(kind))


def _clip(a: Any, low: Any, high: Any) -> Any:
    return np.minimum(np.maximum(a, low), high)


def _along(a: Any, index: Any, axis: int) -> Lanes:
    table, wanted = as_lanes(a), as_lanes(index)
    if table.ndim != 2 or axis not in (1, -1):
        raise NotSymbolic("take_along_axis along another than the last of two axes")
    return np.stack([_chosen(_plain(row), which, table.of)  # type: ignore[return-value]
                     for row, which in zip(table, wanted, strict=True)])


def _pack(bits: Any, axis: Any = None, bitorder: str = "big") -> Lanes:
    if bitorder != "little":
        raise NotSymbolic("packbits from the highest bit")
    on = [t if t.width == 1 else _is_on(t) for t in as_lanes(bits).terms()]
    on += [terms.const(0, 1)] * (-len(on) % 8)
    return lanes_of([terms.concat(reversed(on[at:at + 8])) for at in range(0, len(on), 8)], "u1")


def _structural(function: Callable[..., Any], many: bool) -> Callable[..., Any]:
    """A NumPy function that only moves elements, on the terms themselves."""
    def apply(first: Any, *rest: Any, **options: Any) -> Any:
        given = [as_lanes(x) for x in first] if many else [as_lanes(first)]
        kinds = {x.of for x in given}
        kind = kinds.pop() if len(kinds) == 1 else np.dtype(np.result_type(*kinds, given[0].of))
        plain = [_plain(x.astype(kind)) for x in given]
        return _wrapped(function(plain if many else plain[0], *rest, **options), kind)
    return apply


def _zeros_like(a: Any, dtype: Any = None, **_: Any) -> Lanes:
    array = as_lanes(a)
    kind = np.dtype(dtype or array.of)
    made = np.empty(array.shape, object)
    made.fill(terms.const(0, _bits(kind)))
    return _wrapped(made, kind)


def _broadcast_arrays(*arrays: Any, **_: Any) -> tuple[Lanes, ...]:
    given = [as_lanes(a) for a in arrays]
    return tuple(_wrapped(spread, a.of)
                 for spread, a in zip(np.broadcast_arrays(*(_plain(a) for a in given)), given, strict=True))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "where": _where, "clip": _clip, "take_along_axis": _along, "packbits": _pack, "zeros_like": _zeros_like,
    "empty_like": _zeros_like, "broadcast_arrays": _broadcast_arrays,
    "concatenate": _structural(np.concatenate, True), "stack": _structural(np.stack, True),
    "repeat": _structural(np.repeat, False), "tile": _structural(np.tile, False),
    "reshape": _structural(np.reshape, False), "ravel": _structural(np.ravel, False),
    "broadcast_to": _structural(np.broadcast_to, False), "expand_dims": _structural(np.expand_dims, False),
    "transpose": _structural(np.transpose, False),
    "all": lambda a, axis=None, **_: _folded(np.logical_and, a, axis, False),
    "any": lambda a, axis=None, **_: _folded(np.logical_or, a, axis, False),
}
