"""A loop over tiles that becomes a product of matrices (as_matrices.py): what was found out about it.

Enters: its ops and bounds. Leaves: how rows, columns and depth are made of its axes, and what is copied how.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from math import prod

from ..ir.nodes import Op, Value
from ..ir.types import TileType
from .plan import axes_of
from .product_parts import Typical

Group = tuple[str, ...]
"""Axes that are taken as one, the last of which goes along memory first."""
Bounds = dict[str, tuple[Value, Value]]
"""Start and stop of axes."""
Sum = tuple[tuple[str, int], ...]
"""Axes, each with a factor, that are added up."""

PIECE_COLUMNS, MULTIPLE = 128, 64
"""Rows or columns of a piece of the copy at least: all of the other operand is read for each. What a piece of a line is
a multiple of."""

MOST_WHOLE = 16
"""Pieces up to which one image is copied as a whole, or are several of few points each, so that workers share rows of
the product, too: of 8 images of 7 x 7 points, 512 channels, two that have an image each, and so all rows, take 1.2
times as long."""


@dataclass(slots=True)
class Product:
    """A loop that becomes a product of matrices. ops: what it does, in order, of which the product is `contract`.
    sums: what stands for results of loops that were sums. counters: of the loops around, each taken as an axis. rows,
    columns: of the result, as it is stored. depth: in the order of the operand that stays. outer: axes that become
    loops. copied: the operand that is copied, if one is; turned: the other one, if its depth does not lie as one axis
    either: it is copied once, and runs: axes that are neighbours there and in the copy. ordered: axes of the depth that
    lie apart from the others: loops in order add up products. parted: the axis of which each piece is copied by itself,
    by who multiplies it then; None: all is copied first, by all workers."""

    loop: Op
    ops: list[Op]
    contract: Op
    sums: dict[Value, Value]
    counters: dict[Value, str]
    bounds: Bounds
    rows: Group
    columns: Group
    depth: Group
    outer: Group
    copied: Value | None = None
    turned: Value | None = None
    ordered: Group = ()
    runs: list[Group] = field(default_factory=list)
    parted: str | None = None

    @property
    def is_right(self) -> bool:
        """Whether columns are copied."""
        assert self.copied is not None
        return set(self.columns) <= set(axes_of(self.copied))

    @property
    def own_group(self) -> Group:
        """Of rows or columns, those that are copied."""
        return self.columns if self.is_right else self.rows

    def copy_axes(self) -> list[Group]:
        """How a copy lies, from the outside: columns of the result go along memory, and so does the depth of rows."""
        assert self.copied is not None
        own = axes_of(self.copied)
        sides = (self.rows, self.depth) if not self.is_right else (self.columns, self.depth) if self.ordered else (
            self.depth, self.columns)
        return [*((axis,) for axis in self.outer if axis in own and self.parted is None), *sides]

    def part(self, typical: Typical, piece_bytes: int) -> None:
        """Have each worker copy for itself what it multiplies, a piece at a time, where there are loops around, or the
        whole copy would be large."""
        if self.copied is None:
            return

        def extent(group: Group) -> int:
            return prod(typical(self.bounds[axis][1]) or 1 for axis in group)

        size_bytes = tile_of(self.copied).dtype.size_bytes
        group, others = (self.columns, self.rows) if self.is_right else (self.rows, self.columns)
        one, few = extent(self.outer) * extent(group[:-2]) == 1, extent(group) < PIECE_COLUMNS
        if (one or few) and not (self.counters or self.ordered) and (
                extent((*self.outer, *group, *self.depth)) * size_bytes <= MOST_WHOLE * piece_bytes):
            return
        while len(group) > 1 and extent(group[1:]) > PIECE_COLUMNS and (
                extent((*group[1:], *self.depth)) * size_bytes > piece_bytes):
            self.outer, group = (*self.outer, group[0]), group[1:]
        self.rows, self.columns = (others, group) if self.is_right else (group, others)
        self.parted = group[0]

    def behind(self, values: Collection[Value], through: bool) -> list[Op]:
        """The ops of the loop that values are made by, in order; through: also what the product multiplies."""
        found: set[Op] = set()
        pending = list(values)
        while pending:
            value = pending.pop()
            op = self.sums.get(value, value).op
            if op is not None and op not in found:
                found.add(op)
                if through or op is not self.contract:
                    pending += op.operands
        return [op for op in self.ops if op in found]


def axis_at(place: Value) -> str | None:
    """The axis whose coordinate an index is."""
    return place.op.attributes["axis"] if place.op is not None and place.op.name == "index" else None


def tile_of(value: Value) -> TileType:
    assert isinstance(value.type, TileType)
    return value.type
