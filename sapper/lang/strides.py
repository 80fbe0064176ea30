"""Indices with strides that are dimensions, taken apart: `g * S + r` names an element of its own for each g and r < S.
And indices that are digits, put together: where `x // 4` and `x % 4` are the same, x is.

Enters: the affine forms of two accesses. Leaves: forms that are equal where those are, with one symbol less in a term:
of `stride * a + b`, where all that b walks is shorter than the stride, a and b by themselves (a number written in
digits, of a base that is not known); what digits make out. Holds: equal quotients, and rests, are one symbol;
dimensions are named by strings and never differ between two accesses; a product of symbols is a Product, of which there
is one for the same symbols; integers do not wrap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import gcd
from typing import Any

from ..ir.nodes import Value
from .affine import Affine, Range, extreme
from .dims import Dim, DimExpression, evaluate

Varies = Callable[[Any], bool]
RangesOf = Callable[[Any], Sequence[Range]]
"""Ranges that a symbol walks, one inside the other or not: it is in all of them."""


class Product:
    """What two symbols or more are when multiplied."""

    __slots__ = ("factors",)

    def __init__(self, factors: tuple[Any, ...]) -> None:
        self.factors = factors

    def __repr__(self) -> str:
        return " * ".join(map(str, self.factors))


class Strides:
    """The products of one kernel. form_of: the affine form of a value. static: extents that are numbers.
    dimensions: values that are computed from dimensions alone."""

    def __init__(self, form_of: Callable[[Value], Affine], static: Mapping[str, int],
                 dimensions: dict[Value, DimExpression]) -> None:
        self._form_of, self._static, self._dimensions = form_of, static, dimensions
        self._order: dict[Any, int] = {}
        self._products: dict[tuple[Any, ...], Product] = {}
        self._values: dict[Value, Affine] = {}
        self._divided: dict[tuple[Any, ...], Affine] = {}
        self._quotients: dict[str, tuple[Affine, int]] = {}

    def expanded(self, form: Affine) -> Affine:
        """The form with dimensions by name and products as such."""
        made = Affine(form.constant)
        for symbol, coefficient in form.terms.items():
            part = self._expanded_value(symbol) if isinstance(symbol, Value) else (
                Affine(self._static[symbol]) if symbol in self._static else Affine(0, {symbol: 1}))
            made = made.plus(part, coefficient)
        return made

    def _expanded_value(self, value: Value) -> Affine:
        made = self._values.get(value)
        if made is None:
            op = value.op
            if value in self._dimensions:
                made = self._of_dimensions(self._dimensions[value])
            elif op is not None and op.name == "mul":
                left, right = (self.expanded(self._form_of(operand)) for operand in op.operands)
                made = self.times(left, right)
            elif op is not None and op.name in ("floordiv", "mod"):
                key = op.name, *(_key(self.expanded(self._form_of(operand))) for operand in op.operands)
                made = self._divided.setdefault(key, Affine(0, {value: 1}))
            else:
                made = Affine(0, {value: 1})
            self._values[value] = made
        return made

    def _of_dimensions(self, expression: DimExpression | int) -> Affine:
        if isinstance(expression, int):
            return Affine(expression)
        try:
            return Affine(evaluate(expression, self._static))
        except KeyError:
            pass
        if not isinstance(expression, Dim):
            left, right = self._of_dimensions(expression.left), self._of_dimensions(expression.right)
            if expression.op in ("add", "sub"):
                return left.plus(right, 1 if expression.op == "add" else -1)
            if expression.op == "mul":
                return self.times(left, right)
            if expression.op == "floordiv" and not right.terms and right.constant > 0:
                self._quotients[str(expression)] = left, right.constant
        return Affine(0, {str(expression): 1})

    def times(self, form: Affine, other: Affine) -> Affine:
        made = Affine(form.constant * other.constant)
        for one, two in ((form, other), (other, form)):
            made = made.plus(Affine(0, one.terms), two.constant)
        for symbol, coefficient in form.terms.items():
            for second, count in other.terms.items():
                made = made.plus(Affine(0, {self._product(symbol, second): coefficient * count}))
        return made

    def _product(self, *symbols: Any) -> Any:
        factors = sorted((factor for symbol in symbols for factor in factors_of(symbol)),
                         key=lambda factor: self._order.setdefault(factor, len(self._order)))
        key = tuple(factors)
        return key[0] if len(key) == 1 else self._products.setdefault(key, Product(key))

    def wholes(self, known: Iterable[Any]) -> list[Affine]:
        """What symbols that are known make out as its digits: x where `x // 8`, `x // 2 % 4` and `x % 2` are known."""
        parts: dict[Any, tuple[Affine, list[tuple[Any, Any]]]] = {}
        for symbol in known:
            whole, low, high = self._digits(Affine(0, {symbol: 1}))
            parts.setdefault(_key(whole), (whole, []))[1].append((low, high))
        made = []
        for whole, ranges in parts.values():
            reached: list[Any] = [None]
            for bound in reached:
                reached += [low for low, high in ranges if high == bound and low not in reached]
            if 1 in reached and (1, None) not in ranges:
                made.append(whole)
        return made

    def _digits(self, form: Affine) -> tuple[Affine, Any, Any]:
        """A form as `whole // low % (high // low)`: whole, low and high, which is None where nothing is cut off above.
        A bound is a number above 0, or the key of a form."""
        symbol = form.single
        op = symbol.op if isinstance(symbol, Value) else None
        if op is None or op.name not in ("floordiv", "mod"):
            return form, 1, None
        number, divisor = (self.expanded(self._form_of(operand)) for operand in op.operands)
        by = _key(divisor) if divisor.terms else divisor.constant
        if by in (0, 1) or (isinstance(by, int) and by < 0):
            return form, 1, None
        whole, low, high = self._digits(number)
        if (low, high) != (1, None) and not (isinstance(low, int) and isinstance(by, int) and (
                high is None or (isinstance(high, int) and high // low % by == 0))):
            whole, low, high = number, 1, None      # its digits are not among those of the whole
        if op.name == "mod":
            return whole, low, low * by if low != 1 else by
        return whole, low * by if low != 1 else by, high

    def rest(self, form: Affine) -> tuple[Affine, int] | None:
        """Of an index that is a rest by a number: what is divided, and the number."""
        found = self.rest_of(form)
        return None if found is None or found[1].terms else (found[0], found[1].constant)

    def rest_of(self, form: Affine) -> tuple[Affine, Affine] | None:
        """Of an index that is a rest: what is divided, and by what."""
        op = form.single.op if isinstance(form.single, Value) else None
        if op is None or op.name != "mod":
            return None
        number, divisor = (self.expanded(self._form_of(operand)) for operand in op.operands)
        return number, divisor

    def apart(self, first: Sequence[Affine], second: Sequence[Affine], varies: Varies, ranges_of: RangesOf
              ) -> tuple[list[Affine], list[Affine]]:
        """Expanded forms of two accesses, a pair for each dimension, with every stride that can be taken out taken
        out. varies: of a symbol that is no product, whether it may differ between the two."""
        pending, found = list(zip(first, second, strict=True)), []
        while pending:
            form, other = self._whole_of_rests(*pending.pop(), varies, ranges_of)
            strides = {factor: None for product in form.terms if isinstance(product, Product)
                       for factor in product.factors if not varies(factor)}
            for stride in strides:
                parts = self._split(form, other, stride, varies, ranges_of)
                if parts:
                    pending += parts
                    break
            else:
                found.append((form, other))
        return [form for form, _ in found], [other for _, other in found]

    def _whole_of_rests(self, form: Affine, other: Affine, varies: Varies, ranges_of: RangesOf
                        ) -> tuple[Affine, Affine]:
        """What two rests are of, where that differs by less than their divisor and so is equal if they are: n + s of
        `(n + s) % N` for n below N."""
        found = [self.rest_of(form), self.rest_of(other)]
        if found[0] is None or found[1] is None or found[0][1] != found[1][1]:
            return form, other
        (number, divisor), (second, _) = found      # type: ignore[misc]
        nears = self._is_less(number, second, divisor, varies, ranges_of) and self._is_less(
            second, number, divisor, varies, ranges_of)
        return (number, second) if nears else (form, other)

    def _is_less(self, upper: Affine, lower: Affine, bound: Affine, varies: Varies, ranges_of: RangesOf) -> bool:
        """Whether a form is less than a bound above another one, whatever they walk."""
        most, least = self._reach(upper, varies, ranges_of, True), self._reach(lower, varies, ranges_of, False)
        unbounded = any(varies(factor) for symbol in (*most.terms, *least.terms) for factor in factors_of(symbol))
        return not unbounded and self._is_negative(most.plus(least, -1).plus(bound, -1))

    def _split(self, form: Affine, other: Affine, stride: Any, varies: Varies, ranges_of: RangesOf
               ) -> list[tuple[Affine, Affine]]:
        (high, low), (other_high, other_low) = self._by_stride(form, stride), self._by_stride(other, stride)
        unit = gcd(high.constant, other_high.constant, *high.terms.values(), *other_high.terms.values())
        for upper, lower in ((low, other_low), (other_low, low)):
            if not self._is_less(upper, lower, Affine(0, {stride: unit}), varies, ranges_of):
                return []
        return [(low, other_low), (high, other_high)]

    def _by_stride(self, form: Affine, stride: Any) -> tuple[Affine, Affine]:
        """Of stride * a + b: a and b."""
        high, low = Affine(0), Affine(form.constant)
        for symbol, coefficient in form.terms.items():
            factors = list(factors_of(symbol))
            if stride in factors:
                factors.remove(stride)
                high = high.plus(Affine(0, {self._product(*factors): 1}) if factors else Affine(1), coefficient)
            else:
                low = low.plus(Affine(0, {symbol: 1}), coefficient)
        return high, low

    def _reach(self, form: Affine, varies: Varies, ranges_of: RangesOf, largest: bool) -> Affine:
        """The largest (smallest) value by what does not vary. Of several ranges the one that dimensions bound."""

        def range_of(symbol: Any) -> Range | None:
            if isinstance(symbol, (str, Product)) or not varies(symbol):
                return None
            ranges = [(self.expanded(start), self.expanded(stop)) for start, stop in ranges_of(symbol)]
            bounded = [both for both in ranges if all(isinstance(s, str) for form in both for s in form.terms)]
            return next(iter([*bounded, *ranges]), None)

        return extreme(form, range_of, largest)

    def _is_negative(self, form: Affine) -> bool:
        for symbol, coefficient in list(form.terms.items()):
            if symbol in self._quotients and coefficient % self._quotients[symbol][1] == 0 and coefficient > 0:
                whole, divisor = self._quotients[symbol]        # a quotient times its divisor is the whole at most
                form = form.plus(Affine(0, {symbol: -coefficient})).plus(whole, coefficient // divisor)
        return form.constant < 0 and all(coefficient < 0 and self._is_extent(symbol)
                                         for symbol, coefficient in form.terms.items())

    def _is_extent(self, symbol: Any) -> bool:
        """Whether a symbol is a dimension, or a quotient of such, and so never below 0."""
        whole, _ = self._quotients.get(symbol, (None, 1))
        return isinstance(symbol, str) and (symbol.isidentifier() if whole is None else whole.constant >= 0 and all(
            coefficient > 0 and self._is_extent(part) for part, coefficient in whole.terms.items()))


def _key(form: Affine) -> tuple[Any, ...]:
    return form.constant, frozenset(form.terms.items())


def factors_of(symbol: Any) -> tuple[Any, ...]:
    """What is multiplied in a symbol: itself alone, if it is no product."""
    return symbol.factors if isinstance(symbol, Product) else (symbol,)
