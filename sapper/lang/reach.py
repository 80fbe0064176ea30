"""How far an index reaches that is more than a sum of coordinates: `k // 2`, `k % N`, `minimum(k, N - 1)`.

Enters: an affine form whose symbols are axes, dimensions and values computed of these. Leaves: its values, as lists of
`ir.extents`, at places of its axes where it may be largest or smallest: the first and the last, and, of digits such as
`k // 4 * 8 + k % 4`, the ends of blocks. Holds: each place is one that the axes come to if they are not empty, so that
what lies outside there is wrong in every call; of an index that rises or falls along each axis, and of sums of digits,
one of the values is the extreme.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, product
from types import MappingProxyType
from typing import Any

from ..ir.extents import OPERATORS
from ..ir.nodes import Value
from .affine import Affine, RangeOf
from .bindings import dtype_of
from .dims import DimExpression, nested

Nested = Any
"""A number, the name of a dimension, or [op, left, right] of such."""

MOST_PLACES = 16
"""Of an index, as far as they are looked at."""
MOST_STEPS = 500
"""Taken through the values that one index is made of, which may read one another twice and so be very many."""
NOWHERE: Mapping[Any, Nested] = MappingProxyType({})
_BITS = ("or", "xor")


class Unknown(Exception):
    """A symbol that depends on data, or is computed in another way."""


class Reach:
    """Indices of one kernel. form_of: the affine form of a value; range_of: what a symbol walks; static: extents that
    are numbers; dimensions: values that are computed of dimensions alone."""

    def __init__(self, form_of: Callable[[Value], Affine], range_of: RangeOf, static: Mapping[str, int],
                 dimensions: Mapping[Value, DimExpression]) -> None:
        self.form_of, self.range_of, self.static, self.dimensions = form_of, range_of, static, dimensions
        self.steps = 0
        self.exact = False      # whether the values last found are the extremes

    def values(self, form: Affine, largest: bool) -> list[Nested] | None:
        """The values of a form where it may be largest, or smallest; None where they depend on more than dimensions."""
        self.steps, self.exact = 0, False
        try:
            form = self.by_outer_axes(form, largest)
            axes = self.walked(form)
            extreme = self.extreme(form, largest)
            if extreme is not None:
                self.exact = True
                return [extreme]
            found: list[Nested] = []
            for place in islice(self.placed(form, axes, largest), MOST_PLACES):
                value = self.at(form, place)
                if value not in found:
                    found.append(value)
            self.exact = all(self.rises(form, axis) is not None and not any(map(self.walked, self.range_of(axis) or ()))
                             for axis in axes)
        except Unknown:
            return None
        finally:
            self.steps = 0
        return found

    def by_outer_axes(self, form: Affine, largest: bool) -> Affine:
        """The form with the ends of axes whose ranges are made of others, as in span(c * 64, c * 64 + 64), but of those
        that matter elsewhere in it."""
        while True:
            inner = next((symbol for symbol in form.terms if (bounds := self.range_of(symbol)) is not None and any(
                map(self.walked, bounds)) and symbol not in self.walked(form.plus(Affine(0, {symbol: 1}),
                                                                                 -form.terms[symbol]))), None)
            if inner is None:
                return form
            start, stop = self.range_of(inner) or (form, form)
            coefficient = form.terms[inner]
            end = stop.plus(Affine(-1)) if (coefficient > 0) == largest else start
            form = form.plus(Affine(0, {inner: -coefficient})).plus(end, coefficient)

    def placed(self, form: Affine, axes: list[Any], largest: bool) -> Iterator[dict[Any, Nested]]:
        """Where all axes may be for a form to be extreme, those first that the ranges of others are made of, at whose
        ends these begin and end."""
        outer: dict[Any, None] = {}
        for axis in axes:
            bounds = self.range_of(axis) or ()
            around = [symbol for bound in bounds for symbol in self.walked(bound)]
            if around and not self.is_never_empty(*bounds):
                raise Unknown
            outer.update(dict.fromkeys(around))
        if not outer:
            for chosen in product(*(self.places(form, axis, largest) for axis in axes)):
                yield dict(zip(axes, chosen, strict=True))
            return
        inner = [axis for axis in axes if axis not in outer]
        for place in self.placed(Affine(0), list(outer), largest):
            for chosen in product(*(self.places(form, axis, largest, place) for axis in inner)):
                yield place | dict(zip(inner, chosen, strict=True))

    def is_never_empty(self, start: Affine, stop: Affine) -> bool:
        """Whether a range surely has a coordinate, or has one unless dimensions alone say otherwise."""
        extent = stop.plus(start, -1)
        if all(isinstance(symbol, str) or symbol in self.dimensions for symbol in extent.terms):
            return bool(extent.terms) or extent.constant > 0
        op = stop.single.op if isinstance(stop.single, Value) else None
        if op is not None and op.name == "min":
            return all(self.is_never_empty(start, self.form_of(part)) for part in op.operands)
        values = self.values(start, True)
        try:
            end, walked = self.at(stop, {}), self.counts(self.walked(start))
        except Unknown:
            return False
        return values is not None and all(is_below(value, end, walked) for value in values)

    def extreme(self, form: Affine, largest: bool) -> Nested | None:
        """The largest or smallest value, where no axis stands in two symbols and each has an extreme by itself."""
        total: Nested = form.constant
        seen: list[Any] = []
        for symbol, coefficient in form.terms.items():
            axes = self.walked(Affine(0, {symbol: 1}))
            term = None if any(axis in seen for axis in axes) else self.symbol_extreme(
                symbol, axes, (coefficient > 0) == largest)
            if term is None:
                return None
            seen += axes
            total = made("add", total, made("mul", coefficient, term)) if coefficient > 0 else (
                made("sub", total, made("mul", -coefficient, term)))
        return total

    def symbol_extreme(self, symbol: Any, axes: list[Any], largest: bool) -> Nested | None:
        if not axes:
            return self.symbol_at(symbol, {})
        bounds = self.range_of(symbol)
        if bounds is not None:
            return None if any(map(self.walked, bounds)) else self.at(
                bounds[1].plus(Affine(-1)) if largest else bounds[0], {})
        op, (number, *others) = self.parts(symbol)
        if op not in ("floordiv", "mod") or self.walked(others[0]) or not self.is_natural(others[0]):
            return None
        divisor, least, most = self.at(others[0], {}), self.extreme(number, False), self.extreme(number, True)
        if least is None or most is None:
            return None
        if op == "floordiv":
            return made("floordiv", most if largest else least, divisor)
        if self.counts(axes) == [divisor] and axes[0] in number.terms and self.is_dense(number):    # (k + s) % K
            return made("sub", divisor, 1) if largest else 0
        if not isinstance(divisor, int) or not isinstance(least, int) or not 0 <= least < divisor:
            return None
        if not self.is_dense(number) or (not largest and least > 0):
            return None
        return made("min", most, divisor - 1) if largest else 0

    def is_dense(self, form: Affine) -> bool:
        """Whether a form takes all values between its extremes."""
        for symbol, coefficient in form.terms.items():
            if not self.walked(Affine(0, {symbol: 1})):
                continue
            if coefficient != 1:
                return False
            if self.range_of(symbol) is None:
                op, (number, *_others) = self.parts(symbol)
                if op not in ("floordiv", "mod") or not self.is_dense(number):
                    return False
        return True

    def counts(self, axes: Iterable[Any]) -> list[Nested]:
        """How many coordinates axes and indices of loops have, where dimensions alone say it; each number once."""
        found: list[Nested] = []
        for axis in axes:
            bounds = self.range_of(axis)
            try:
                count = None if bounds is None else self.at(bounds[1].plus(bounds[0], -1), {})
            except Unknown:
                continue
            if count is not None and count not in found:
                found.append(count)
        return found

    def walked(self, form: Affine) -> list[Any]:
        """The axes that a form is made of, and indices of loops."""
        found: dict[Any, None] = {}
        for symbol in form.terms:
            if not isinstance(symbol, str) and symbol not in self.dimensions:
                if self.range_of(symbol) is not None:
                    found[symbol] = None
                else:
                    for operand in self.parts(symbol)[1]:
                        found.update(dict.fromkeys(self.walked(operand)))
        return list(found)

    def walked_by(self, form: Affine) -> list[Any]:
        """As `walked`; nothing where a form depends on data."""
        self.steps = 0
        try:
            return self.walked(form)
        except Unknown:
            return []
        finally:
            self.steps = 0

    def parts(self, symbol: Any) -> tuple[str, list[Affine]]:
        """A value as an op of OPERATORS and its operands. Raises Unknown."""
        op = symbol.op if isinstance(symbol, Value) else None
        self.steps += 1
        if self.steps > MOST_STEPS or op is None or dtype_of(symbol).size_bytes < 4:
            raise Unknown
        forms = [self.form_of(operand) for operand in op.operands]
        if op.name in OPERATORS and (op.name not in _BITS or (not forms[1].terms and forms[1].constant >= 0)):
            return op.name, forms
        if op.name == "abs":
            return "max", [forms[0], forms[0].times(-1)]
        if len(forms) == 2 and not forms[1].terms:
            number = forms[1].constant
            if op.name in ("shl", "shr") and 0 <= number < 31:
                return ("mul" if op.name == "shl" else "floordiv"), [forms[0], Affine(1 << number)]
            if op.name == "and" and number > 0 and number & number + 1 == 0:
                return "mod", [forms[0], Affine(number + 1)]
        raise Unknown

    def at(self, form: Affine, place: Mapping[Any, Nested]) -> Nested:
        """A form where each axis is at its place."""
        total: Nested = form.constant
        for positive in (True, False):
            for symbol, coefficient in form.terms.items():
                if (coefficient > 0) == positive:
                    term = self.symbol_at(symbol, place)
                    if positive:
                        total = made("add", total, made("mul", coefficient, term))
                    else:
                        total = made("sub", total, made("mul", -coefficient, term))
        return total

    def symbol_at(self, symbol: Any, place: Mapping[Any, Nested]) -> Nested:
        if isinstance(symbol, str):
            return self.static.get(symbol, symbol)
        if symbol in self.dimensions:
            return self.fixed(nested(self.dimensions[symbol]))
        if symbol in place:
            return place[symbol]
        if self.range_of(symbol) is not None:       # in the range of an axis: what it walks depends on another one
            raise Unknown
        op, operands = self.parts(symbol)
        return made(op, *(self.at(operand, place) for operand in operands))

    def fixed(self, value: Nested) -> Nested:
        if isinstance(value, list):
            return made(value[0], *map(self.fixed, value[1:]))
        return self.static.get(value, value) if isinstance(value, str) else value

    def places(self, form: Affine, axis: Any, largest: bool, place: Mapping[Any, Nested] = NOWHERE) -> list[Nested]:
        """Where along an axis a form may be largest, or smallest. place: of axes that its range is made of."""
        bounds = self.range_of(axis)
        assert bounds is not None
        first, last = self.at(bounds[0], place), self.at(bounds[1].plus(Affine(-1)), place)
        rises = self.rises(form, axis) if axis in self.walked(form) else None
        if rises is not None:
            return [last if (rises >= 0) == largest else first]
        found = [last, first]
        for period in self.periods(form, axis)[1]:  # where the last block begins, and where the last whole one ends
            found.append(made("max", first, made("mul", made("floordiv", last, period), period)))
            end = made("sub", made("mul", made("floordiv", made("add", last, 1), period), period), 1)
            found.append(made("max", first, end))
        return found

    def rises(self, form: Affine, axis: Any) -> int | None:
        """1 where a form rises along an axis, -1 where it falls, 0 where it does not depend on it; else None."""
        found = {direction if direction is None else direction * (1 if coefficient > 0 else -1)
                 for symbol, coefficient in form.terms.items()
                 for direction in (self.symbol_rises(symbol, axis),)} - {0}
        return 0 if not found else found.pop() if len(found) == 1 else None

    def symbol_rises(self, symbol: Any, axis: Any) -> int | None:
        if symbol is axis:
            return 1
        if isinstance(symbol, str) or symbol in self.dimensions or self.range_of(symbol) is not None:
            return 0
        op, operands = self.parts(symbol)
        found = {self.rises(operand, axis) for operand in operands} - {0}
        if not found:
            return 0
        direction = found.pop() if len(found) == 1 else None
        if op == "mul" and not all(map(self.is_natural, operands)):
            return None
        if op in ("floordiv", "mod") and (op == "mod" or self.rises(operands[1], axis) != 0
                                          or not self.is_natural(operands[1])):
            return None
        return None if op in ("sub", *_BITS) else direction

    def is_natural(self, form: Affine) -> bool:
        """Whether a form is certainly 0 or more."""
        return form.constant >= 0 and all(
            coefficient > 0 and self.symbol_is_natural(symbol) for symbol, coefficient in form.terms.items())

    def symbol_is_natural(self, symbol: Any) -> bool:
        if isinstance(symbol, str):
            return True
        if symbol in self.dimensions:
            return is_natural(nested(self.dimensions[symbol]))
        bounds = self.range_of(symbol)
        if bounds is not None:
            return self.is_natural(bounds[0])
        try:
            op, operands = self.parts(symbol)
        except Unknown:
            return False
        natural = map(self.is_natural, operands)
        return self.is_natural(operands[1]) if op == "mod" else any(natural) if op == "max" else (
            op != "sub" and all(natural))

    def periods(self, form: Affine, axis: Any) -> tuple[Nested, list[Nested]]:
        """How long an axis stays at one value of a form, and the lengths of the blocks that digits in it cut."""
        unit: Nested = 1
        found: list[Nested] = []
        for symbol in form.terms:
            if symbol is axis or isinstance(symbol, str) or self.symbol_rises(symbol, axis) == 0:
                continue
            op, operands = self.parts(symbol)
            for operand in operands:
                inner, more = self.periods(operand, axis)
                found += [length for length in more if length not in found]
                if op in ("floordiv", "mod", *_BITS) and operand is operands[0] and not self.walked(operands[1]):
                    length = made("mul", inner, 1 << operands[1].constant.bit_length() if op in _BITS else
                                  self.at(operands[1], {}))
                    unit = length if op == "floordiv" else inner
                    if length not in found:
                        found.append(length)
        return unit, found


def is_natural(value: Nested) -> bool:
    """Whether a value computed of dimensions is certainly 0 or more."""
    if not isinstance(value, list):
        return isinstance(value, str) or value >= 0
    op, left, right = value
    return is_natural(right) if op == "mod" else op != "sub" and is_natural(left) and is_natural(right)


def is_below(value: Nested, bound: Nested, walked: Sequence[Nested] = ()) -> bool:
    """Whether a value is certainly below a bound, dimensions being 0 or more, and what is walked 1 or more."""
    if value == 0 and bound in walked:
        return True
    if isinstance(value, list):
        op, left, right = value
        if (op == "mod" and right == bound) or (op == "sub" and left == bound and isinstance(right, int) and right > 0):
            return True
        if op in ("min", "max") and (any if op == "min" else all)(is_below(v, bound, walked) for v in (left, right)):
            return True
        match value, bound:     # the last of digits: (Q - 1) * J + r, r below J
            case ["add", ["mul", ["sub", a, 1], b], rest], ["mul", c, d] if a == c and b == d:
                return is_below(rest, b, walked)
            case ["mul", ["floordiv", most, int(by)], int(times)], _ if by == times > 0:
                return is_below(most, bound, walked)
            case ["sub", ["min", a, b], int(less)], _:
                return any(is_below(made("sub", most, less), bound, walked) for most in (a, b))
    most = ceiling(value)
    return most is not None and (most < bound if isinstance(bound, int) else most < 0 and is_natural(bound))


def ceiling(value: Nested) -> int | None:
    """A number that a value is at most, or None."""
    if not isinstance(value, list):
        return value if isinstance(value, int) else None
    op, left, right = value
    most, other = ceiling(left), ceiling(right)
    if op == "mod" and isinstance(right, int):
        return right - 1
    if op == "min":
        return min((number for number in (most, other) if number is not None), default=None)
    if most is None or other is None or op not in ("add", "max", "mul", "floordiv"):
        return None
    if op in ("mul", "floordiv") and not (isinstance(right, int) and right > 0):
        return None
    return int(OPERATORS[op](most, other))


def made(op: str, left: Nested, right: Nested) -> Nested:
    """[op, left, right], or what it is where that is simple."""
    if isinstance(left, int) and isinstance(right, int) and not (right == 0 and op in ("floordiv", "mod")):
        return int(OPERATORS[op](left, right))
    if (op in ("add", "sub") and right == 0) or (op in ("mul", "floordiv") and right == 1):
        return left
    if (op == "add" and left == 0) or (op == "mul" and left == 1):
        return right
    if op == "mul" and 0 in (left, right):
        return 0
    if op in ("add", "sub") and isinstance(left, list) and isinstance(right, int) and left[0] in ("add", "sub") \
            and isinstance(left[2], int):
        number = (left[2] if left[0] == "add" else -left[2]) + (right if op == "add" else -right)
        return made("add", left[1], number) if number >= 0 else ["sub", left[1], -number]
    if op == "add" and isinstance(right, int) and right < 0:
        return ["sub", left, -right]
    if op in ("add", "mul") and isinstance(left, int):
        return made(op, right, left)
    return [op, left, right]
