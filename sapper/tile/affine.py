"""Index values as affine forms of axis coordinates and scalars.

Enters a tile IR value of integer type; leaves `Affine`: constant + sum of coefficient * coordinate(axis) + sum of
coefficient * scalar, or None where the value is something else (a gather).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..ir.nodes import Value
from ..ir.types import TileType


@dataclass(slots=True)
class Affine:
    """constant + sum(axes[a] * coordinate(a)) + sum(scalars[s] * s); all coefficients are integers."""

    constant: int = 0
    axes: dict[str, int] = field(default_factory=dict)
    scalars: dict[Value, int] = field(default_factory=dict)

    def scaled(self, factor: int) -> Affine:
        return Affine(self.constant * factor, {a: c * factor for a, c in self.axes.items()},
                      {s: c * factor for s, c in self.scalars.items()})

    def plus(self, other: Affine) -> Affine:
        axes, scalars = dict(self.axes), dict(self.scalars)
        for a, c in other.axes.items():
            axes[a] = axes.get(a, 0) + c
        for s, c in other.scalars.items():
            scalars[s] = scalars.get(s, 0) + c
        return Affine(self.constant + other.constant, {a: c for a, c in axes.items() if c},
                      {s: c for s, c in scalars.items() if c})

    @property
    def is_constant(self) -> bool:
        return not self.axes and not self.scalars


def affine(value: Value) -> Affine | None:
    """The affine form of an integer value. Wrapping is not modelled: only `index` and 32-bit sums are followed."""
    op = value.op
    assert isinstance(value.type, TileType)
    if op is None:
        return Affine(scalars={value: 1}) if not value.type.axes else None
    name = op.name
    if name == "const":
        number = op.attributes["value"]
        return Affine(constant=number) if isinstance(number, int) else None
    if name == "index":
        return Affine(axes={op.attributes["axis"]: 1})
    if name == "full" or (name == "cast" and op.operands[0].type.dtype.is_integer  # type: ignore[union-attr]
                          and value.type.dtype.bits >= op.operands[0].type.dtype.bits):  # type: ignore[union-attr]
        return affine(op.operands[0])
    if name in ("add", "sub", "mul"):
        left, right = affine(op.operands[0]), affine(op.operands[1])
        if left is not None and right is not None:
            if name == "add":
                return left.plus(right)
            if name == "sub":
                return left.plus(right.scaled(-1))
            if right.is_constant:
                return left.scaled(right.constant)
            if left.is_constant:
                return right.scaled(left.constant)
    if not value.type.axes:
        return Affine(scalars={value: 1})
    return None
