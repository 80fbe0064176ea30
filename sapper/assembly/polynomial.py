"""Whole numbers that are not known yet, and what follows from inequalities between them.

Leaves: `Polynomial`s over `Symbol`s; `Known`, a set of polynomials that are not negative, which proves others, or finds
numbers for which another is negative. Holds: a proof is right for all numbers; that none is found says nothing.

A proof goes from the newest symbol to the oldest. Where a polynomial rises with a symbol, the symbol is replaced by
what it is never below, where it falls, by what it is never above: M*N - m*N - n with n <= N - 1 is at least
M*N - m*N - N + 1, with m <= M - 1 at least 1. Symbols are made in the order in which loops nest, so a bound speaks of
older ones only (J. Fourier's and T. Motzkin's elimination, one bound at a time).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from random import Random

Monomial = tuple["Symbol", ...]
_numbers = count()
_MOST_TERMS = 48
_MOST_DEPTH = 24
_MOST_STEPS = 400
"""A proof that takes more steps than these is given up."""


@dataclass(frozen=True, slots=True, eq=False)
class Symbol:
    """natural: never negative. free: any number within what is known of it may occur (an extent, the rounds of a
    loop); else it is something that was worked out, and not all of that is known."""

    name: str
    natural: bool
    free: bool
    number: int

    @staticmethod
    def new(name: str, natural: bool = True, free: bool = True) -> Symbol:
        return Symbol(name, natural, free, next(_numbers))

    def __lt__(self, other: Symbol) -> bool:
        return self.number < other.number


class Polynomial:
    """A sum of products of symbols with whole coefficients. terms: product -> coefficient, never 0."""

    __slots__ = ("_key", "terms")

    def __init__(self, terms: Mapping[Monomial, int]) -> None:
        self.terms = {m: c for m, c in terms.items() if c}
        self._key: frozenset[tuple[Monomial, int]] | None = None

    @staticmethod
    def of(value: int | Symbol | Polynomial) -> Polynomial:
        if isinstance(value, Polynomial):
            return value
        return Polynomial({(value,): 1} if isinstance(value, Symbol) else {(): value})

    @property
    def key(self) -> frozenset[tuple[Monomial, int]]:
        if self._key is None:
            self._key = frozenset(self.terms.items())
        return self._key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Polynomial) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __add__(self, other: int | Polynomial) -> Polynomial:
        terms = dict(self.terms)
        for monomial, coefficient in Polynomial.of(other).terms.items():
            terms[monomial] = terms.get(monomial, 0) + coefficient
        return Polynomial(terms)

    def __sub__(self, other: int | Polynomial) -> Polynomial:
        return self + Polynomial.of(other) * -1

    def __mul__(self, other: int | Polynomial) -> Polynomial:
        if isinstance(other, int):
            return Polynomial({m: c * other for m, c in self.terms.items()})
        terms: dict[Monomial, int] = {}
        for one, a in self.terms.items():
            for two, b in other.terms.items():
                both = tuple(sorted(one + two))
                terms[both] = terms.get(both, 0) + a * b
        return Polynomial(terms)

    @property
    def symbols(self) -> set[Symbol]:
        return {s for monomial in self.terms for s in monomial}

    @property
    def constant(self) -> int | None:
        """The number that it is, None if it has symbols."""
        return self.terms.get((), 0) if not self.terms or set(self.terms) == {()} else None

    def parts(self, symbol: Symbol) -> tuple[Polynomial, Polynomial] | None:
        """(a, b) of a * symbol + b, both without the symbol; None where it stands in a power."""
        with_it: dict[Monomial, int] = {}
        rest: dict[Monomial, int] = {}
        for monomial, coefficient in self.terms.items():
            if symbol not in monomial:
                rest[monomial] = coefficient
                continue
            left = list(monomial)
            left.remove(symbol)
            if symbol in left:
                return None
            with_it[tuple(left)] = coefficient
        return Polynomial(with_it), Polynomial(rest)

    def replaced(self, symbol: Symbol, by: Polynomial) -> Polynomial:
        found = Polynomial({})
        for monomial, coefficient in self.terms.items():
            term = Polynomial({tuple(s for s in monomial if s is not symbol): coefficient})
            for s in monomial:
                if s is symbol:
                    term = term * by
            found = found + term
        return found

    def divided(self, by: int) -> Polynomial | None:
        """The quotient, None where there is a rest."""
        if any(c % by for c in self.terms.values()):
            return None
        return Polynomial({m: c // by for m, c in self.terms.items()})

    def value(self, numbers: Mapping[Symbol, int]) -> int:
        total = 0
        for monomial, coefficient in self.terms.items():
            for symbol in monomial:
                coefficient *= numbers[symbol]
            total += coefficient
        return total

    def __str__(self) -> str:
        parts = []
        for monomial, coefficient in sorted(self.terms.items(), key=lambda term: (-len(term[0]), term[0])):
            names = [s.name for s in monomial]
            size = [str(abs(coefficient))] if abs(coefficient) != 1 or not names else []
            parts.append(("- " if coefficient < 0 else "+ ") + "*".join(size + names))
        text = " ".join(parts) or "0"
        return text[2:] if text.startswith("+ ") else text.replace("- ", "-", 1) if text.startswith("- ") else text


def _sign(polynomial: Polynomial) -> int:
    """1: never negative, -1: never positive, as its coefficients say by themselves; 0: neither is known."""
    if all(all(s.natural for s in m) for m in polynomial.terms):
        if all(c > 0 for c in polynomial.terms.values()):
            return 1
        if all(c < 0 for c in polynomial.terms.values()):
            return -1
    return 0


class Known:
    """Polynomials that are not negative."""

    __slots__ = ("_proved", "facts")

    def __init__(self, facts: Iterable[Polynomial] = ()) -> None:
        self.facts = tuple(dict.fromkeys(f for f in facts if _sign(f) < 1))
        self._proved: dict[Polynomial, bool] = {}

    def and_(self, more: Iterable[Polynomial]) -> Known:
        new = [f for f in more if f not in self.facts and _sign(f) < 1]
        return Known((*self.facts, *new)) if new else self

    def proves(self, polynomial: Polynomial) -> bool:
        """Whether a polynomial is never negative, as far as is found."""
        if _sign(polynomial) == 1 or polynomial in self.facts:
            return True
        if polynomial not in self._proved:
            self._proved[polynomial] = False  # while it is asked for
            self._proved[polynomial] = self._prove(polynomial, 0, [_MOST_STEPS])
        return self._proved[polynomial]

    def _prove(self, polynomial: Polynomial, depth: int, steps: list[int]) -> bool:
        if _sign(polynomial) == 1:
            return True
        steps[0] -= 1
        symbols = polynomial.symbols
        if not symbols or depth > _MOST_DEPTH or len(polynomial.terms) > _MOST_TERMS or steps[0] < 0:
            return False
        newest = max(symbols)
        parts = polynomial.parts(newest)
        if parts is None:
            return False
        if _sign(parts[0]) == 0:  # N*a - a*b: by an older symbol, whose bounds make the slope's sign plain
            return any(self._prove(lower, depth + 1, steps) for s in sorted(symbols - {newest}, reverse=True)
                       for lower in self._lower(polynomial, s))
        return any(self._prove(lower, depth + 1, steps) for lower in self._lower(polynomial, newest))

    def _lower(self, polynomial: Polynomial, symbol: Symbol) -> list[Polynomial]:
        """Polynomials that are never above a multiple of this one, without the symbol."""
        parts = polynomial.parts(symbol)
        if parts is None or (sign := _sign(parts[0])) == 0:
            return []
        slope, rest = parts
        found = [rest] if sign == 1 and symbol.natural else []
        for fact in self.facts:
            bound = fact.parts(symbol)
            if bound is None:
                continue
            scale, limit = bound
            if not scale.terms or _sign(scale) != sign or any(s > symbol for s in fact.symbols):
                continue  # scale * symbol is above -limit, or below limit
            size = scale * sign
            if size.constant is not None or self.proves(size - 1):
                found.append(slope * limit * -sign + rest * size)
        return found

    def refutes(self, polynomial: Polynomial) -> dict[Symbol, int] | None:
        """Numbers that fulfil all that is known and make a polynomial negative; None if none are found, or if it speaks
        of what was worked out."""
        facts = [f for f in self.facts if all(s.free for s in f.symbols)]
        wanted = set(polynomial.symbols)
        grown = True
        while grown:
            related = {s for f in self.facts if f.symbols & wanted for s in f.symbols}
            grown = not related <= wanted
            wanted |= related
        if not all(s.free for s in polynomial.symbols):
            return None
        mixed = [f for f in self.facts if f not in facts and f.symbols & polynomial.symbols]
        if mixed:
            return None
        symbols = sorted(s for s in wanted if s.free)
        random = Random(0)
        for trial in range(_TRIALS):
            numbers: dict[Symbol, int] = {}
            for symbol in symbols:
                tried = _SMALL if trial < _TRIALS // 2 else _LARGE
                self._give(symbol, trial if trial < 2 else random.choice(tried), numbers, facts)
            if all(f.value(numbers) >= 0 for f in facts if f.symbols <= numbers.keys()) \
                    and polynomial.value(numbers) < 0:
                return numbers
        return None

    @staticmethod
    def _give(symbol: Symbol, choice: int, numbers: dict[Symbol, int], facts: list[Polynomial]) -> None:
        """A number for a symbol, the older ones having theirs: the choice, moved to what is known of the symbol."""
        low, high = 0 if symbol.natural else None, None
        for fact in facts:
            if symbol not in fact.symbols or not fact.symbols <= {symbol, *numbers}:
                continue
            at_zero, at_one = fact.value(numbers | {symbol: 0}), fact.value(numbers | {symbol: 1})
            slope = at_one - at_zero
            if slope > 0:
                low = max(-(at_zero // slope), low if low is not None else -(at_zero // slope))
            elif slope < 0:
                high = min(at_zero // -slope, high if high is not None else at_zero // -slope)
        if choice == _HIGHEST:
            value = high if high is not None else max(low or 0, 1)
        else:
            value = choice
        value = value if high is None else min(value, high)
        numbers[symbol] = value if low is None else max(value, low)


_HIGHEST = -1
_SMALL = (_HIGHEST, _HIGHEST, 0, 1, 2, 3)
_LARGE = (_HIGHEST, _HIGHEST, 0, 1, 5, 16, 17, 33, 1 << 16)
"""Numbers that are tried, small ones first, as a reader sees through them sooner."""
_TRIALS = 400
