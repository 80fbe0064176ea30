"""Symbolic dimensions: names for extents that are known at the call, and arithmetic on them.

`M, N = dims("M N")` names two. In a kernel's annotation a Dim stands for an extent; in a kernel's body, and in
Python constants that it closes over (`HALF = D // 2`), it is an integer: arithmetic on it outside a running kernel
builds a DimExpression, which the compiler folds or computes, and inside one (under the interpreter) gives an int.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Union

from ..ir.extents import OPERATORS
from ..ir.types import SYMBOLS
from ..ir.types import Dim as Extent
from . import context


class DimExpression:
    """An integer made of dimensions: op is one of OPERATORS; left and right are ints or DimExpressions."""

    __slots__ = ("left", "op", "right")

    def __init__(self, op: str, left: DimLike, right: DimLike) -> None:
        self.op = op
        self.left = left
        self.right = right

    def evaluate(self, sizes: Mapping[str, int]) -> int:
        """Its value, given the extent of every dimension by name; KeyError if one is missing."""
        return int(OPERATORS[self.op](evaluate(self.left, sizes), evaluate(self.right, sizes)))

    def _resolve(self) -> int | None:
        if context.current() is None:
            return None
        return int(OPERATORS[self.op](int(self.left), int(self.right)))

    def _value(self, what: str) -> int:
        size = self._resolve()
        if size is None:
            raise TypeError(f"{self} has no {what}: a dimension has a size only while a kernel runs")
        return size

    def __index__(self) -> int:
        return self._value("integer value")

    def __int__(self) -> int:
        return self._value("integer value")

    def __float__(self) -> float:
        return float(self._value("integer value"))

    def __bool__(self) -> bool:
        return bool(self._value("truth value"))

    def __add__(self, other: Any) -> Any:
        return _combine("add", self, other)

    def __radd__(self, other: Any) -> Any:
        return _combine("add", other, self)

    def __sub__(self, other: Any) -> Any:
        return _combine("sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return _combine("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return _combine("mul", self, other)

    def __rmul__(self, other: Any) -> Any:
        return _combine("mul", other, self)

    def __floordiv__(self, other: Any) -> Any:
        return _combine("floordiv", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return _combine("floordiv", other, self)

    def __mod__(self, other: Any) -> Any:
        return _combine("mod", self, other)

    def __rmod__(self, other: Any) -> Any:
        return _combine("mod", other, self)

    def __truediv__(self, other: Any) -> Any:
        return self._quotient(self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._quotient(other, self)

    def _quotient(self, left: Any, right: Any) -> float:
        if context.current() is None:
            raise TypeError(f"found {left} / {right}; expected an integer, as extents are; write {left} // {right}, or "
                            f"cdiv({left}, {right}), which rounds up")
        return float(left) / float(right)

    def __neg__(self) -> Any:
        return _combine("sub", 0, self)

    def __lt__(self, other: Any) -> Any:
        return self._value("integer value") < other

    def __le__(self, other: Any) -> Any:
        return self._value("integer value") <= other

    def __gt__(self, other: Any) -> Any:
        return self._value("integer value") > other

    def __ge__(self, other: Any) -> Any:
        return self._value("integer value") >= other

    def _equal(self, other: object) -> bool:
        return (
            isinstance(other, DimExpression) and not isinstance(other, Dim)
            and (self.op, self.left, self.right) == (other.op, other.left, other.right)
        )

    def __eq__(self, other: object) -> Any:
        size = self._resolve()
        return self._equal(other) if size is None else size == other

    def __hash__(self) -> int:
        return hash((self.op, self.left, self.right))

    def __repr__(self) -> str:
        negative = self.op == "sub" and isinstance(self.left, int) and self.left == 0
        return f"(-{self.right})" if negative else f"({self.left} {SYMBOLS[self.op]} {self.right})"


class Dim(DimExpression):
    """One symbolic dimension, known by its name: two Dims of one name are the same dimension."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        if not name.isidentifier():
            raise ValueError(f"a dimension's name must be an identifier; found {name!r}")
        self.name = name

    def evaluate(self, sizes: Mapping[str, int]) -> int:
        return sizes[self.name]

    def _resolve(self) -> int | None:
        running = context.current()
        return None if running is None else int(running.dim(self.name))

    def _equal(self, other: object) -> bool:
        return isinstance(other, Dim) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return self.name


DimLike = Union[DimExpression, int]


def evaluate(value: DimLike, sizes: Mapping[str, int]) -> int:
    """The value of an int or DimExpression, given the extents by name."""
    return value.evaluate(sizes) if isinstance(value, DimExpression) else value


def nested(value: DimLike) -> Any:
    """An int as it is, a dimension by its name, other expressions as [op, left, right]."""
    if isinstance(value, Dim):
        return value.name
    return [value.op, nested(value.left), nested(value.right)] if isinstance(value, DimExpression) else value


def extent_of(value: DimLike) -> Extent:
    """The same with tuples, as the types of tensors have it."""
    if isinstance(value, Dim):
        return value.name
    return (value.op, extent_of(value.left), extent_of(value.right)) if isinstance(value, DimExpression) else value


def expression_of(extent: Extent) -> DimLike:
    """What `extent_of` is of."""
    if isinstance(extent, str):
        return Dim(extent)
    return extent if isinstance(extent, int) else DimExpression(extent[0], *map(expression_of, extent[1:]))


def _combine(op: str, left: Any, right: Any) -> Any:
    if context.current() is not None:
        return OPERATORS[op](
            int(left) if isinstance(left, DimExpression) else left,
            int(right) if isinstance(right, DimExpression) else right,
        )
    for side in (left, right):
        if not isinstance(side, (int, DimExpression)) or isinstance(side, bool):
            return NotImplemented
    return DimExpression(op, left, right)


def cdiv(a: Any, b: Any) -> Any:
    """a / b, rounded up: how many blocks of b cover a. Integers, extents or, in a kernel, integer tiles."""
    return -(-a // b)


def dims(names: str) -> Any:
    """`M, N, K = dims("M N K")`: one Dim for each name, a tuple if there are several.

    Raises ValueError if there is no name, or one is not an identifier.
    """
    made = tuple(Dim(name) for name in names.replace(",", " ").split())
    if not made:
        raise ValueError('dims needs at least one name, as in dims("M N")')
    return made[0] if len(made) == 1 else made
