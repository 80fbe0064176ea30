"""How an index is computed, written down for a call to look through (ir/indices.py).

Enters: the values of an index, loops and branches around it. Leaves: a row "indexed" of the attribute "requires".
Holds: a row says of exactly the elements that are touched where they are, but that loops whose ends depend on data are
taken to run; what is computed of data, or carried through a loop that does not add the same in each step, raises
`Unknown`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..ir.extents import MAX_EXTENT, OPERATORS
from ..ir.indices import Known
from ..ir.nodes import Op, Value
from ..ir.types import DType, TileType
from .affine import Affine
from .bindings import Carried, Walked, dtype_of
from .dims import DimExpression, nested
from .reach import Unknown

MOST_NODES = 300
"""Of the computation of one index."""
COMPARED = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}
"""Comparisons, and what holds where they do not."""
_WRAPPING = ("add", "sub", "mul")


class Computation:
    """Nodes of one row. walks: what axes, by name, and indices of loops walk. carries: scalars to which a loop adds the
    same in each step. dimensions: values computed of
    dimensions. static: extents that are numbers. moving: places of nodes that depend on a counter."""

    def __init__(self, walks: Mapping[Any, Walked], carries: Mapping[Value, Carried],
                 dimensions: Mapping[Value, DimExpression], static: Mapping[str, int],
                 parameters: Iterable[Value]) -> None:
        self.walks, self.carries, self.dimensions, self.static = walks, carries, dimensions, static
        self.parameters = frozenset(parameters)
        self.nodes: list[list[Any]] = []
        self.counters: list[list[int]] = []
        self.guards: list[int] = []
        self.moving: set[int] = set()
        self.walked: dict[Any, int] = {}
        self.scalars: dict[str, Known] = {}
        self._known: dict[tuple[Any, ...], int] = {}
        self._values: dict[Value, int] = {}

    def row(self, tensor: str, dimension: int, text: str, low: int, high: int, extent: int) -> list[Any]:
        return [tensor, "indexed", dimension, text, self.nodes, self.counters, self.guards, low, high, extent]

    def leaves(self) -> dict[tuple[str, str], Known]:
        """What a call knows, and what is known of it before."""
        return {(op, name): (0, MAX_EXTENT, 1) if op == "dim" else self.scalars[name]
                for op, name, *_ in self.nodes if op in ("dim", "scalar")}

    # Nodes.

    def add(self, op: str, *operands: Any) -> int:
        """The place of a node; equal ones are one."""
        key = (op, *operands)
        place = self._known.get(key)
        if place is None:
            if len(self.nodes) >= MOST_NODES:
                raise Unknown
            place = self._known[key] = len(self.nodes)
            self.nodes.append([op, *operands])
            if op == "counter" or (op not in ("number", "dim", "scalar")
                                   and not self.moving.isdisjoint(operands[:1 if op == "wrap" else None])):
                self.moving.add(place)
        return place

    def number(self, number: int) -> int:
        return self.add("number", number)

    def extent(self, value: Any) -> int:
        """Of an extent as in `ir.extents`."""
        if isinstance(value, (list, tuple)):
            return self.add(value[0], *map(self.extent, value[1:]))
        if isinstance(value, str):
            return self.number(self.static[value]) if value in self.static else self.add("dim", value)
        return self.number(value)

    def form(self, form: Affine) -> int:
        total = self.number(form.constant)
        for symbol, coefficient in form.terms.items():
            term = self.extent(symbol) if isinstance(symbol, str) else self.value(symbol)
            total = self.add("add", total, self.add("mul", term, self.number(coefficient)))
        return total

    def value(self, value: Value) -> int:
        place = self._values.get(value)
        if place is None:
            place = self._values[value] = self._computed(value)
        return place

    def _computed(self, value: Value) -> int:
        if value in self.dimensions:
            return self.extent(nested(self.dimensions[value]))
        op, dtype = value.op, dtype_of(value)
        if not isinstance(value.type, TileType) or dtype.kind not in "xiub":
            raise Unknown
        if op is None:
            if value in self.walks:
                return self.counter(value)
            if value in self.carries:
                return self._wrapped(self.carried(self.carries[value]), dtype)
            if value not in self.parameters:
                raise Unknown
            bits = 1 if dtype.kind == "b" else _bits(dtype)
            least = 0 if dtype.kind in "ub" else -(1 << (bits - 1))
            self.scalars[value.name] = least, least + (1 << bits) - 1, 1
            return self.add("scalar", value.name)
        if op.name == "dim":
            return self.extent(op.attributes["name"])
        if op.name == "const":
            return self.number(int(op.attributes["value"]))
        if op.name == "index":
            return self.counter(op.attributes["axis"])
        if op.name == "if":
            at = op.results.index(value)
            sides = [block.ops[-1].operands[at] for block in op.blocks]
            return self.add("select", self.value(op.operands[0]), *map(self.value, sides))
        return self._elementwise(op, dtype)

    def _elementwise(self, op: Op, dtype: DType) -> int:
        places = [self.value(operand) for operand in op.operands]
        if op.name == "full":
            return places[0]
        if op.name == "cast":
            if dtype.kind == "b":
                return self.add("ne", places[0], self.number(0))
            return self._wrapped(places[0], dtype)
        if op.name == "neg":
            return self._wrapped(self.add("sub", self.number(0), places[0]), dtype)
        if op.name == "abs":
            return self._wrapped(self.add("max", places[0], self.add("sub", self.number(0), places[0])), dtype)
        if op.name == "not":
            return self.add("eq", places[0], self.number(0)) if dtype.kind == "b" else self._wrapped(
                self.add("sub", self.number(-1), places[0]), dtype)
        if op.name in ("shl", "shr"):
            return self._shifted(op, places, dtype)
        if op.name not in OPERATORS and op.name not in (*COMPARED, "and", "select"):
            raise Unknown
        made = self.add(op.name, *places)
        return self._wrapped(made, dtype) if op.name in _WRAPPING else made

    def _shifted(self, op: Op, places: list[int], dtype: DType) -> int:
        kind, *by = self.nodes[places[1]]
        if kind != "number" or not 0 <= by[0] < min(_bits(dtype), 63):
            raise Unknown
        factor = self.number(1 << by[0])
        return self._wrapped(self.add("mul" if op.name == "shl" else "floordiv", places[0], factor), dtype)

    def _wrapped(self, place: int, dtype: DType) -> int:
        """Integers of fewer than 64 bits wrap."""
        if _bits(dtype) == 64 or self.nodes[place][0] == "number":
            return place
        return self.add("wrap", place, _bits(dtype), int(dtype.kind != "u"))

    # Loops and branches.

    def counter(self, key: Any) -> int:
        """What an axis, by its name, or the index of a loop takes."""
        if key not in self.walked:
            start, stop, step = self.walks[key]
            first, behind = self.value(start), self.value(stop)
            place = self.walked[key] = self.add("counter", len(self.counters))
            self.counters.append([first, behind, step])
            if not self.moving.isdisjoint((first, behind)):
                self.guard("ge", place, first)
                self.guard("lt", place, behind)
                if step != 1:
                    steps = self.add("mod", self.add("sub", place, first), self.number(step))
                    self.guard("eq", steps, self.number(0))
        return self.walked[key]

    def carried(self, scalar: Carried) -> int:
        """What it is in the step at hand."""
        start, _, step = self.walks[scalar.counter]
        taken = self.add("sub", self.counter(scalar.counter), self.value(start))
        steps = self.add("floordiv", taken, self.number(step))
        return self.add("add", self.value(scalar.initial), self.add("mul", steps, self.form(scalar.step)))

    def guard(self, op: str, *operands: int) -> None:
        place = self.add(op, *operands)
        if place not in self.guards:
            self.guards.append(place)

    def runs(self, key: Any) -> None:
        """The loop or axis is not empty; taken for granted where that depends on data."""
        start, stop, _ = self.walks[key]
        try:
            ends = self.value(start), self.value(stop)
        except Unknown:
            return
        self.guard("lt", *ends)

    def holds(self, condition: Value, wanted: bool) -> None:
        """A branch is taken where a condition is true, or false."""
        op = condition.op
        name = "" if op is None else op.name
        if op is not None and name == "not" and dtype_of(condition).kind == "b":
            self.holds(op.operands[0], not wanted)
        elif op is not None and name == ("and" if wanted else "or"):
            for operand in op.operands:
                self.holds(operand, wanted)
        elif op is not None and name in COMPARED:
            self.guard(name if wanted else COMPARED[name], *map(self.value, op.operands))
        elif op is not None and name == "if" and self._constant(op, condition, wanted) == (not wanted):
            self.holds(op.operands[0], wanted)      # a short `and`, or `or`
            self.holds(op.blocks[0 if wanted else 1].ops[-1].operands[op.results.index(condition)], wanted)
        else:
            self.guard("ne" if wanted else "eq", self.value(condition), self.number(0))

    @staticmethod
    def _constant(op: Op, result: Value, first: bool) -> bool | None:
        """What an if op gives where it goes the second way (`first`: where its condition is false), if it is known."""
        side = op.blocks[1 if first else 0].ops[-1].operands[op.results.index(result)].op
        return None if side is None or side.name != "const" else bool(side.attributes["value"])


def _bits(dtype: DType) -> int:
    return 64 if dtype.kind == "x" else dtype.bits
