"""Views: a tensor's memory with other extents, or as another dtype.

Enters: a tensor, the wanted extents and a dtype. Leaves: the value of a `view` op, which stands at the head of the
function. Extents are compared as products of powers of dimensions: `N // 16` times 16 is N. What that takes for
granted is recorded for the call to check (docs/ir.md, "requires"): that a division has no rest, that merged axes are
contiguous.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from itertools import accumulate
from typing import Any

from ..ir.nodes import Block, Value
from ..ir.types import DType, TensorType, bool_, index
from .affine import Affine
from .bindings import dims_of, dtype_of
from .dims import Dim, DimExpression, evaluate, expression_of, nested
from .operations import Operations

Extent = int | DimExpression


class Monomial:
    """number * product of dimensions to the powers `powers`; an expression that is no such product is a dimension of
    its own."""

    __slots__ = ("number", "powers")

    def __init__(self, number: Fraction, powers: Mapping[str, int]) -> None:
        self.number = number
        self.powers = {name: power for name, power in sorted(powers.items()) if power}

    def times(self, other: Monomial, sign: int = 1) -> Monomial:
        powers = dict(self.powers)
        for name, power in other.powers.items():
            powers[name] = powers.get(name, 0) + sign * power
        return Monomial(self.number * other.number**sign if other.number else Fraction(0), powers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Monomial) and (self.number, self.powers) == (other.number, other.powers)

    __hash__ = None  # type: ignore[assignment]

    @property
    def is_whole(self) -> bool:
        """Whether it is an integer for any extents."""
        return self.number.denominator == 1 and all(power > 0 for power in self.powers.values())


ONE = Monomial(Fraction(1), {})


def product(extents: Sequence[Extent | str], divided: list[DimExpression]) -> Monomial:
    """The product of extents. divided: takes each quotient in them that must have no rest."""
    total = ONE
    for extent in extents:
        total = total.times(_monomial(extent, divided))
    return total


def _monomial(extent: Extent | str, divided: list[DimExpression]) -> Monomial:
    if isinstance(extent, int):
        return Monomial(Fraction(extent), {})
    if isinstance(extent, Dim):
        return Monomial(Fraction(1), {extent.name: 1})
    if isinstance(extent, DimExpression) and extent.op in ("mul", "floordiv"):
        left, right = _monomial(extent.left, divided), _monomial(extent.right, divided)
        if extent.op == "mul":
            return left.times(right)
        if right.number:
            quotient = left.times(right, -1)
            if not quotient.is_whole:
                divided.append(extent)
            return quotient
    return Monomial(Fraction(1), {str(extent): 1})


def groups_of(before: Sequence[Extent | str], after: Sequence[Extent | str], ratio: Fraction) -> list[list[int]] | None:
    """How extents become others: [count before, count after] of neighbours with equal products, as few as can be; None
    where the products differ. ratio: elements of the last group become so many."""
    groups: list[list[int]] = []
    start, first = 0, 0
    factors, others = ([_monomial(extent, []) for extent in extents] for extents in (before, after))
    factors[-1:] = [factor.times(Monomial(ratio, {})) for factor in factors[-1:]]
    while start < len(before) and first < len(after):
        left = list(accumulate(factors[start:], Monomial.times))
        right = list(accumulate(others[first:], Monomial.times))
        found = next((
            [p, q] for total in range(2, len(left) + len(right) + 1) for p in range(1, total) for q in [total - p]
            if p <= len(left) and q <= len(right) and left[p - 1] == right[q - 1]), None)
        if found is None:
            return None
        groups.append(found)
        start, first = start + found[0], first + found[1]
    if not groups:
        return None
    # What is left are ones, or elements that the last group's become parts of: [16, 4] of a byte are [16] of 4 bytes.
    p, q = groups[-1][0] + len(before) - start, groups[-1][1] + len(after) - first
    groups[-1] = [p, q]
    same = reduce(Monomial.times, factors[-p:]) == reduce(Monomial.times, others[-q:])
    return groups if same else None


@dataclass(frozen=True, slots=True)
class View:
    """What a view shows: the tensor whose memory it is, its own extents."""

    tensor: Value
    extents: tuple[Extent, ...]


class Views(Operations):
    """Operations, and views. conditions: rows for the attribute "requires"."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.views: dict[Value, View] = {}
        self.made: dict[tuple[Any, ...], Value] = {}
        self.conditions: list[list[Any]] = []

    def memory_of(self, tensor: Value) -> Value:
        """The tensor whose memory a tensor is."""
        view = self.views.get(tensor)
        return tensor if view is None else view.tensor

    def extents_of(self, tensor: Value) -> tuple[Extent, ...]:
        view = self.views.get(tensor)
        return tuple(map(expression_of, dims_of(tensor))) if view is None else view.extents

    def extent_form(self, tensor: Value, dimension: int, node: Any) -> Affine:
        """An extent as an affine form, a dimension by its name."""
        extent = self.extents_of(tensor)[dimension]
        if isinstance(extent, Dim):
            return Affine(0, {extent.name: 1})
        if isinstance(extent, int):
            return Affine(extent)
        value = self.dimension(extent, node)
        return self.form_of(value) if isinstance(value, Value) else Affine(value)

    def view(self, shown: Value, extents: Sequence[Any], dtype: Any, node: Any, nodes: Sequence[Any]) -> Value:
        """tensor.view(*extents, dtype=...)"""
        tensor = self.memory_of(shown)
        have: DType = dtype_of(tensor)
        dtype = dtype_of(shown) if dtype is None else dtype
        if not isinstance(dtype, DType) or dtype.kind == "x" or (dtype is not have and bool_ in (dtype, have)):
            self.fail("bad-argument", f"view() of {have.name} as no other dtype", node, self.describe(dtype),
                      "a dtype such as i32; bool is viewed as bool only", "write dtype=i32, or leave dtype out")
        for extent, extent_node in zip(extents, nodes, strict=True):
            if isinstance(extent, bool) or not isinstance(extent, (int, DimExpression)) or (
                    isinstance(extent, int) and extent < 0):
                self.fail("bad-argument", "an extent of view() is known before the kernel runs", extent_node,
                          self.describe(extent), "an integer, a Dim, or arithmetic on them",
                          "index the tensor with span(...) or arithmetic instead")
        if not extents:
            extents = self.extents_of(shown)
        have_extents = self.extents_of(tensor)
        ratio = Fraction(have.size_bytes, dtype.size_bytes)
        divided: list[DimExpression] = []
        total = product(extents, divided)
        product([extent for extent in have_extents if extent not in extents], divided)  # counted as if without a rest
        groups = groups_of(have_extents, extents, ratio)
        if groups is None:
            def spelled(these: Sequence[Any]) -> str:
                return f"[{', '.join(map(str, these))}]"

            part = next((extent for extent in extents if isinstance(extent, int) and extent > 1), 16)
            split = ", ".join(map(str, (*have_extents[:-1], f"{have_extents[-1]} // {part}", part)))
            widths = f", whose elements are {have.size_bytes} bytes and become {dtype.size_bytes}"
            self.fail("view", f"{tensor.name} cannot be viewed like this", node,
                      f"extents {spelled(extents)} for {spelled(have_extents)}{widths if ratio != 1 else ''}",
                      "as many elements, neighbouring axes split or merged",
                      f"divide what is split: {tensor.name}.view({split})" if total.is_whole else
                      "name the extents of the tensor, split or multiplied")
        self.require(tensor, divided, groups, ratio, dtype.size_bytes, node)
        key = (tensor, dtype.name, *map(repr, extents))
        found = self.made.get(key)
        if found is None:
            found = self.made[key] = self._at_the_head(tensor, tuple(extents), dtype, groups, node)
        return found

    def require(self, tensor: Value, divided: list[DimExpression], groups: list[list[int]],
                ratio: Fraction, element_bytes: int, node: Any) -> None:
        for extent in divided:
            try:
                rest = evaluate(extent.left, self.static) % evaluate(extent.right, self.static)
            except KeyError:
                self.condition_on(tensor, "multiple", nested(extent.left), nested(extent.right))
                continue
            if rest:
                self.fail("view", f"{extent} leaves a rest", node, f"{extent.left} = "
                          f"{evaluate(extent.left, self.static)}", f"a multiple of {extent.right}",
                          "make it a multiple, or divide by something else")
        first = 0
        for count, _ in groups:
            if count > 1:
                self.condition_on(tensor, "contiguous", first, first + count - 1)
            first += count
        if ratio != 1:
            self.condition_on(tensor, "contiguous", 0, first, element_bytes)

    def condition_on(self, tensor: Value, *row: Any) -> None:
        """Something that the call has to check, once."""
        if [tensor.name, *row] not in self.conditions:
            self.conditions.append([tensor.name, *row])

    def _at_the_head(self, tensor: Value, extents: tuple[Extent, ...], dtype: DType, groups: list[list[int]],
                     node: Any) -> Value:
        """The op, before all others: its extents are made of dimensions, so that it can stand there."""
        outside, known, level = self.builder.block, self.known, self.level
        head = Block()
        head.ops = self.prelude
        self.builder.block, self.known, self.level = head, known[:1], 0
        sizes = [self.value(extent, index, node) for extent in extents]
        self.at(node)
        found = self.builder.value("view", [tensor, *sizes], TensorType(dtype, ("?",) * len(extents)), groups=groups)
        self.builder.block, self.known, self.level = outside, known, level
        found.name = tensor.name
        self.views[found] = View(tensor, extents)
        self.levels[found] = 0
        return found
