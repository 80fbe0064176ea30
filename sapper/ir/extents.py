"""Extents that are computed of dimensions: a name or a number as it is, else (op, left, right) of such.

They stand in the types of tensors (`tensor<u8, N, K // 2>`), and as lists in the attribute "requires".
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .types import Dim, TensorType

MAX_EXTENT = 2**31 - 1
"""Of a dimension."""

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "min": min,
    "max": max,
    "or": operator.or_,
    "xor": operator.xor,
}


def evaluate_nested(value: Any, sizes: Mapping[str, int]) -> int:
    """An extent, given those of dimensions by name; ZeroDivisionError for a division by an extent of 0."""
    if isinstance(value, (list, tuple)):
        op, left, right = value
        return int(OPERATORS[op](evaluate_nested(left, sizes), evaluate_nested(right, sizes)))
    return sizes[value] if isinstance(value, str) else int(value)


def names_in(value: Any) -> list[str]:
    """The dimensions that an extent is made of."""
    if isinstance(value, (list, tuple)):
        return [name for side in value[1:] for name in names_in(side)]
    return [value] if isinstance(value, str) else []


def fixed(dim: Dim, sizes: Mapping[str, int]) -> Dim:
    """The same extent where those of some dimensions are numbers."""
    if not isinstance(dim, tuple):
        return sizes.get(dim, dim) if isinstance(dim, str) else dim
    if all(name in sizes for name in names_in(dim)):
        return evaluate_nested(dim, sizes)
    op, left, right = dim
    return op, fixed(left, sizes), fixed(right, sizes)


def shape_of(dims: Iterable[Dim], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The extents of a tensor with these dims; no negative one."""
    return tuple(dim if isinstance(dim, int) else max(0, evaluate_nested(dim, sizes)) for dim in dims)


def names_of(types: Iterable[object]) -> list[str]:
    """The dimensions by name that tensors among `types` have for themselves, each once."""
    return list(dict.fromkeys(
        dim for type in types if isinstance(type, TensorType) for dim in type.dims if isinstance(dim, str)))
