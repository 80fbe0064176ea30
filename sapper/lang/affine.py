"""Affine integer forms: constant + sum of coefficient * symbol.

A symbol is an Axis, an IR value (a loop index, or anything opaque), or a dimension's name (a str). Forms serve the
proofs about indices: bounds, and that two accesses of different loop iterations never meet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import gcd
from typing import Any

Symbol = Any


class Affine:
    """constant + sum(terms[s] * s); no coefficient is zero."""

    __slots__ = ("constant", "terms")

    def __init__(self, constant: int, terms: dict[Symbol, int] | None = None) -> None:
        self.constant = constant
        self.terms: dict[Symbol, int] = terms or {}

    def plus(self, other: Affine, factor: int = 1) -> Affine:
        """self + factor * other."""
        terms = dict(self.terms)
        for symbol, coefficient in other.terms.items():
            total = terms.get(symbol, 0) + factor * coefficient
            if total:
                terms[symbol] = total
            else:
                terms.pop(symbol, None)
        return Affine(self.constant + factor * other.constant, terms)

    def times(self, factor: int) -> Affine:
        if factor == 0:
            return Affine(0)
        return Affine(self.constant * factor, {s: c * factor for s, c in self.terms.items()})

    @property
    def single(self) -> Symbol | None:
        """The symbol, if the form is exactly that symbol."""
        if self.constant == 0 and len(self.terms) == 1:
            ((symbol, coefficient),) = self.terms.items()
            return symbol if coefficient == 1 else None
        return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Affine) and self.constant == other.constant and self.terms == other.terms

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return " + ".join([str(self.constant), *(f"{c}*{s}" for s, c in self.terms.items())])


Range = tuple[Affine, Affine]
"""start and stop (exclusive) of what a symbol walks."""

RangeOf = Callable[[Symbol], "Range | None"]


def extreme(form: Affine, range_of: RangeOf, largest: bool) -> Affine:
    """The form with every symbol that walks a range replaced by its last (or first) value: the largest (smallest)
    value that it takes, if no range is empty. Symbols without a range stay.

    A symbol goes before those that its range is made of: in i - j with j below i, j is i - 1 at most.
    """
    while True:
        walked = [s for s in form.terms if range_of(s) is not None]
        if not walked:
            return form
        symbol = next(s for s in walked if not any(_bounded_by(t, s, range_of) for t in walked))
        coefficient = form.terms[symbol]
        start, stop = range_of(symbol) or (form, form)
        end = stop.plus(Affine(-1)) if (coefficient > 0) == largest else start
        form = form.plus(Affine(0, {symbol: -coefficient})).plus(end, coefficient)


def _bounded_by(symbol: Symbol, other: Symbol, range_of: RangeOf) -> bool:
    """Whether the range of a symbol is made of another one, directly or not."""
    bounds = range_of(symbol)
    return bounds is not None and any(
        s == other or _bounded_by(s, other, range_of) for bound in bounds for s in bound.terms)


def fixed_when_meeting(
    first: list[Affine],
    second: list[Affine],
    varies: Callable[[Symbol], bool],
    spread_of: Callable[[Symbol], int | None],
    ends_of: Callable[[Symbol], tuple[int, int] | None] = lambda symbol: None,
) -> set[Symbol] | None:
    """The symbols that must agree where two accesses name one element; None if they never do.

    first, second: the indices of two accesses to one tensor, a form for each dimension. varies(s): whether s may
    differ between the two. spread_of(s): last minus first value, if known. ends_of(s): first and last value, if known.

    The accesses meet if all dimensions agree. A dimension that can't agree settles it: u[1 - s] and u[s] are apart, and
    y[8 * p + q] and y[8 * p + q + 4] for q below 4. One whose varying part is c1*s1 + c2*s2 + ..., the same in both,
    fixes all of its symbols if each |c| exceeds what the smaller terms can add up to (a number written in digits).
    """
    fixed: set[Symbol] = set()
    progress = True
    while progress:
        progress = False
        for form, other in zip(first, second, strict=True):
            moving, rest = _parts(form, lambda symbol: symbol not in fixed and varies(symbol))
            other_moving, other_rest = _parts(other, lambda symbol: symbol not in fixed and varies(symbol))
            difference = rest.plus(other_rest, -1)
            terms = [*moving.items(), *((s, -c) for s, c in other_moving.items()), *difference.terms.items()]
            if _never_add_up(-difference.constant, terms, ends_of):
                return None
            if difference == Affine(0) and moving and moving == other_moving and _digits(moving, spread_of):
                fixed.update(moving)
                progress = True
    return fixed


def have_other_rests(form: Affine, other: Affine, divisor: int, varies: Callable[[Symbol], bool]) -> bool:
    """Whether two forms, divided by a number, never leave the same rest."""
    (moving, rest), (other_moving, other_rest) = _parts(form, varies), _parts(other, varies)
    units = divisor, *moving.values(), *other_moving.values(), *rest.plus(other_rest, -1).terms.values()
    return (rest.constant - other_rest.constant) % gcd(*units) != 0


def _parts(form: Affine, varies: Callable[[Symbol], bool]) -> tuple[dict[Symbol, int], Affine]:
    """The terms that vary, and all else."""
    moving = {s: c for s, c in form.terms.items() if varies(s)}
    return moving, Affine(form.constant, {s: c for s, c in form.terms.items() if s not in moving})


def _never_add_up(total: int, terms: list[tuple[Symbol, int]], ends_of: Callable[[Symbol], tuple[int, int] | None]
                  ) -> bool:
    """Whether symbols times their coefficients never add up to a number: it is no multiple of what divides all of
    these, or, but for multiples of one of them (or of none), outside what the others reach."""
    unit = gcd(*(coefficient for _, coefficient in terms))
    if total % unit if unit else total:
        return True
    ends = {symbol: ends_of(symbol) for symbol, _ in terms} if total else {}
    for unit in {0, *(abs(coefficient) for _, coefficient in terms)} if total else ():
        low = high = 0
        for symbol, coefficient in terms:
            reach = ends[symbol]
            if unit and coefficient % unit == 0:
                continue
            if reach is None:
                break
            low += min(coefficient * end for end in reach)
            high += max(coefficient * end for end in reach)
        else:
            if not low <= total <= high if unit == 0 else (total - low) // unit == (total - high - 1) // unit:
                return True
    return False


def _digits(terms: Mapping[Symbol, int], spread_of: Callable[[Symbol], int | None]) -> bool:
    reach = 0
    ordered = sorted(terms.items(), key=lambda entry: abs(entry[1]))
    for position, (symbol, coefficient) in enumerate(ordered):
        if abs(coefficient) <= reach:
            return False
        if position + 1 < len(ordered):
            spread = spread_of(symbol)
            if spread is None:
                return False
            reach += abs(coefficient) * spread
    return True
