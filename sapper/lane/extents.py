"""What is known of the extents of loops before the kernel runs.

Enters: bounds of loops and of whole axes, as index scalars of tile IR, and the specialisation. Leaves: typical values
and divisors for choices, bounds for the size of scratch memory, `Range`s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from types import MappingProxyType

from ..ir.nodes import Block, Op, Value
from ..tile.affine import Affine, affine
from ..tile.schedule import DimClass, Specialization
from ..tile.signs import never_negative
from .late import LateWalk
from .panel_vectors import PanelVectors
from .state import Capacity, Open, Scalar


@dataclass(slots=True)
class Range:
    """One dimension of a loop nest: an axis of `tiles`, or an index of `each`. resident: how many coordinates a loop
    over tiles takes at once. parted: each of these from another part of the range. walked: what spans them is in
    scratch memory, and walks loop over them. once: a task has one index of them, or one tile, and needs no loop.
    forward: it surely does not end before it begins. body: of the nest, where the range is its last one. fixed: the
    extent, where it is a number though the start is none. tails: how many coordinates a loop takes at once of what is
    left, before single ones. panels: the matrices that are copied for each piece (nest_panels.py).
    blocked: the matrices whose panels it counts, if it is walked in blocks for the second cache: the loops inside it go
    around the walk of each block. loop: that of weights which rows walk by parts of so many `steps`, if they do
    (depth_parts.py); below: the range before counts panels of these; together: it is of rows that go on together.
    end: of `pieces` (tile/indices_together.py), the value that says where one ends; counter: where it begins."""

    start: Scalar
    stop: Scalar
    axis: str | None = None
    counter: Value | None = None
    end: Value | None = None
    step: int = 1
    hint: int = 1024
    divisor: int = 1
    capacity: Capacity | None = None
    resident: int = 0
    parted: bool = False
    lane: bool = False
    late: LateWalk | None = None
    walked: bool = False
    once: bool = False
    forward: bool = True
    body: Block | None = None
    fixed: int | None = None
    tails: tuple[int, ...] = ()
    panels: tuple[Value, ...] = ()
    blocked: tuple[Op, ...] = ()
    loop: Op | None = None
    steps: int = 0
    below: bool = False
    together: bool = False


def hint(value: Value, specialization: Specialization,
         stops: Mapping[Value, Value] = MappingProxyType({})) -> tuple[int, int, Capacity | None]:
    """(typical value, divisor, bound for scratch memory) of an index scalar. stops: where counters of loops end."""
    op = value.op
    if value in stops:
        return 256, 1, hint(stops[value], specialization, stops)[2]
    if op is not None and op.name == "const":
        c = int(op.attributes["value"])
        return c, _power_in(c), Capacity(c)
    if op is not None and op.name == "dim":
        name = op.attributes["name"]
        dim = specialization.dims.get(name, DimClass())
        return dim.hint, dim.divisor, Capacity(1, (name,))
    if op is not None and op.name in ("min", "add", "sub", "mul", "floordiv"):
        (a, of_a, most_a), (b, of_b, most_b) = (hint(v, specialization, stops) for v in op.operands)
        # Where typical values make no difference, as of a loop's counter, the first one bounds it.
        difference = a - b if a > b else a
        known = {"min": min(a, b), "add": a + b, "sub": difference, "mul": a * b, "floordiv": a // max(1, b)}
        divisor = {"mul": max(of_a, of_b), "floordiv": 1}.get(op.name, gcd(of_a, of_b))
        most = _most(op.name, most_a, most_b)
        if op.name == "sub" and not never_negative(op.operands[1]):
            most = None
        over = op.operands[0].op
        if op.name == "floordiv" and over is not None and over.name == "add" and most_b is not None:
            # A quotient rounded up, (x + c) // d with c below d, is at most x.
            x, (_, _, most_c) = over.operands[0], hint(over.operands[1], specialization, stops)
            if most_c is not None and not (most_c.dims or most_b.dims) and most_c.constant < most_b.constant:
                most = hint(x, specialization, stops)[2]
        return max(1, known[op.name]), divisor, most
    return 256, 1, None


def _power_in(number: int) -> int:
    """A power of two up to 64 that divides a number."""
    return next(d for d in (64, 32, 16, 1) if number % d == 0)


def _difference(start: Value, stop: Value) -> int | None:
    """How much a range is long, where that is a number, at least 0, wherever it starts; else None."""
    first, last = affine(start), affine(stop)
    between = None if first is None or last is None else last.plus(first.scaled(-1))
    return max(0, between.constant) if between is not None and between.is_constant else None


def _most(name: str, a: Capacity | None, b: Capacity | None) -> Capacity | None:
    """A bound of the result of an op on extents with these bounds, none of them negative."""
    if name == "min":
        return min((c for c in (a, b) if c is not None), key=lambda c: (len(c.dims), c.is_sum), default=None)
    if name in ("sub", "floordiv"):
        return a
    if name == "add" and a is not None and b is not None:
        if Capacity(0) in (a, b):
            return b if a == Capacity(0) else a
        if not a.dims and not b.dims:
            return Capacity(a.constant + b.constant)
        # A product of dimensions and something might not fit 64 bits.
        if max(len(a.dims), len(b.dims)) == 1 and min(a.constant, b.constant) > 0:
            return Capacity(1, (("add", a.nested, b.nested),))
    if name == "mul" and a is not None and b is not None:
        return Capacity(a.constant * b.constant, (*a.dims, *b.dims))
    return None


def _bounds(value: Value, name: str) -> list[Affine]:
    """Forms of an index scalar and of what it is the largest ("max") or the least of ("min"): all are bounds of it."""
    op = value.op
    if op is not None and op.name == name:
        return [form for operand in op.operands for form in _bounds(operand, name)]
    if op is not None and op.name in ("add", "sub", "mul"):
        left, right = op.operands
        if op.name == "add":
            return [a.plus(b) for a in _bounds(left, name) for b in _bounds(right, name)]
        other = affine(right)
        if op.name == "sub" and other is not None:
            return [form.plus(other.scaled(-1)) for form in _bounds(left, name)]
        for factor, one in ((other, left), (affine(left), right)):
            if op.name == "mul" and factor is not None and factor.is_constant and factor.constant >= 0:
                return [form.scaled(factor.constant) for form in _bounds(one, name)]
    form = affine(value)
    return [] if form is None else [form]


def most_between(start: Value, stop: Value) -> Capacity | None:
    """A bound of the extent of start ... stop that is a number, as of max(first - constant, 0) ... min(first +
    constant, ...), or None."""
    known = [between.constant for first in _bounds(start, "max") for last in _bounds(stop, "min")
             if (between := last.plus(first.scaled(-1))).is_constant]
    return Capacity(max(0, min(known))) if known else None


def may_be_negative(value: Value) -> bool:
    """Whether an index is computed so that it may be below 0. What memory, a call or a loop gives is not."""
    op = value.op
    if op is None or op.name not in ("const", "sub", "neg", "add", "mul", "min", "max"):
        return False
    if op.name == "const":
        return bool(op.attributes["value"] < 0)
    found = [may_be_negative(operand) for operand in op.operands]
    return op.name in ("sub", "neg") or (all(found) if op.name == "max" else any(found))


class ExtentLowering(PanelVectors):
    """Knows the extents of axes, and opens axes."""

    def hint(self, value: Value) -> tuple[int, int, Capacity | None]:
        return hint(value, self.specialization, self._stops)

    @cached_property
    def _starts(self) -> dict[Value, Value]:
        """Where each counter of a loop begins."""
        return {counter: start for op in self.function.walk() if op.name == "each" for counter, start in zip(
            op.blocks[0].arguments, op.operands[:2 * op.attributes["count"]:2], strict=False)}

    @cached_property
    def _stops(self) -> dict[Value, Value]:
        """Where each counter of a loop ends."""
        found = {counter: stop for op in self.function.walk() if op.name == "each" for counter, stop in zip(
            op.blocks[0].arguments, op.operands[1:2 * op.attributes["count"]:2], strict=False)}
        return found | {op.blocks[0].arguments[1]: op.operands[1] for op in self.function.walk()
                        if op.name == "each" and op.attributes.get("pieces")}

    def _range(self, start: Value, stop: Value) -> Range:
        first, last = self.integer(start), self.integer(stop)
        fixed = _difference(start, stop)
        if fixed is not None and not isinstance(first, int):
            return Range(first, last, hint=max(1, fixed), divisor=_power_in(fixed), capacity=Capacity(fixed),
                         fixed=fixed)
        _, divisor, capacity = self.hint(stop)
        if may_be_negative(start):     # then the range may be longer than where it stops
            capacity = self._most_between(start, stop)
        elif capacity is not None and capacity.is_sum:
            capacity = _most("min", self._most_between(start, stop), capacity)
        capacity = self.most_from(start, stop) or capacity
        if first != 0:
            divisor = gcd(divisor, self.hint(start)[1])
        return Range(first, last, hint=self._extent_hint(start, stop), divisor=divisor, capacity=capacity,
                     forward=first == 0 and never_negative(stop))

    def most_from(self, start: Value, stop: Value) -> Capacity | None:
        return most_between(start, stop)

    def _most_between(self, start: Value, stop: Value) -> Capacity | None:
        """A bound of a range's extent by what is left where the start is taken off the stop, as of i - W ... i + 1."""
        first, last = affine(start), affine(stop)
        if first is None or last is None:
            return None
        between = last.plus(first.scaled(-1))
        most = None if between.axes else Capacity(max(0, between.constant))
        for part, count in between.scalars.items():
            if count > 0:
                most = _most("add", _most("mul", Capacity(count), self.hint(part)[2]), most)
            elif not never_negative(part, self._starts.get):
                return None
        return most

    def _extent_hint(self, start: Value, stop: Value) -> int:
        hint = self.hint(stop)[0]
        known = start.op is not None and start.op.name in ("const", "dim")
        typical, most = max(1, hint - self.hint(start)[0]) if known else hint, self.most_from(start, stop)
        return typical if most is None else max(1, min(typical, most.constant))

    def _whole_hint(self, axis: str) -> int:
        """Typical extent of an axis of `whole`; 0 of any other."""
        op = self._wholes.get(axis)
        return 0 if op is None else self._extent_hint(*op.operands)

    @cached_property
    def _wholes(self) -> dict[str, Op]:
        """By axis: axes are unique in a function, which stays as it is while it is lowered."""
        return {op.attributes["axis"]: op for op in self.function.walk() if op.name == "whole"}

    def extent_of(self, r: Range) -> Scalar:
        return self.sub(r.stop, r.start) if r.fixed is None else r.fixed

    def _open(self, axis: str, r: Range) -> None:
        extent = self.extent_of(r)
        if r.fixed is None and not r.forward:
            extent = self.scalar("s_max", extent, 0)
        self.open[axis] = Open(r.start, extent, r.hint, r.divisor, r.capacity, once=r.once)

    def is_bounded(self, axis: str) -> bool:
        """Whether scratch memory may be set aside for a value over an axis: not if its range is known only as the
        kernel runs."""
        o = self.open.get(axis)
        return o is None or isinstance(o.extent, int) or o.capacity is not None
