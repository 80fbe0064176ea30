"""Operands of products that are gathered element by element, brought to memory before the loops that multiply them.

Enters: a canonical tile function. Leaves: where a product in loops has an operand of f32 that is computed of elements
gathered along the last dimension of a tensor, as a window whose edges are cut off by `where` and clamped indices, a
parallel loop before the nest that makes each element once, and a load of it in its place: so a nest of plain products
is left, whose operands lie side by side. What spans the operand may be counted by loops around it, as taps are. Holds:
the meaning is the same; it reads only what nothing in the function stores to.

Measured on a Cascade Lake, one thread: docs/choices/nests.md.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import TileType, f32
from .affine import affine
from .ops import place_of
from .parts import Writer, copy_op
from .plan import LATE, axes_of
from .product_parts import axes_brought, rename_axes

Typical = Callable[[Value], int | None]
Bounds = dict[str | Value, tuple[Value, Value]]
"""Start and stop of axes, by name, and of counters."""


def bring_gathered(function: Function, typical: Typical, fewest: int, most_bytes: int) -> None:
    """In place. typical: of an index scalar, None where nothing bounds it before the kernel runs. fewest: rows or
    columns that meet an operand, typically, for it to be made before. most_bytes: of all such memory, typically."""
    stored = {place_of(op.operands[0]) for op in function.walk() if op.name == "store"}
    for nest in [op for op in function.body.ops if op.attributes.get("parallel")]:
        finder = _Finder(function, stored, typical, fewest)
        finder.block(nest, {})
        for operand in finder.found:
            most_bytes -= operand.size_bytes(typical)
            if most_bytes >= 0:
                operand.make(function, nest)


class _Operand:
    """One that is made before. ops: what it is computed by, in order. places: the counters and axes that it spans, as
    it lies in memory. users: the products that read it, each with its block and the place of the operand."""

    def __init__(self, value: Value, ops: list[Op], places: list[str | Value], bounds: Bounds) -> None:
        self.value = value
        self.ops = ops
        self.places = places
        self.bounds = {place: bounds[place] for place in places}
        self.users: list[tuple[Block, Op, int]] = []

    def size_bytes(self, typical: Typical) -> int:
        extents = ((typical(stop) or 0) - (typical(start) or 0) for start, stop in self.bounds.values())
        return f32.size_bytes * prod(max(1, extent) for extent in extents)

    def make(self, function: Function, nest: Op) -> None:
        """The loop that makes it, before the nest, and the loads that take its place there."""
        made: list[Op] = []
        top = Writer(made, self.value.op or nest)
        buffer = top.buffer(f32, [top.value("sub", [stop, start]) for start, stop in self.bounds.values()])
        axes = [place for place in self.places if isinstance(place, str)]
        counters = [place for place in self.places if isinstance(place, Value)]
        values: dict[Value, Value] = {}
        around = Block([counter.type for counter in counters])
        for old, new in zip(counters, around.arguments, strict=True):
            new.name, values[old] = old.name, new
        body = Block()
        writer = Writer(body.ops, self.value.op or nest)
        body.ops += [copy_op(op, values) for op in self.ops]
        writer.op("store", [buffer, values[self.value], *self._at(writer, values)])
        writer.op("yield", [])
        bounds = [value for axis in axes for value in self.bounds[axis]]
        loop = Op("tiles", bounds, [], {"axes": axes, "parallel": True}, [body], top.location)
        rename_axes(loop, {axis for op in function.walk() for axis in axes_brought(op)})
        if counters:
            around.ops += [loop, Op("yield", [], [], {}, None, top.location)]
            bounds = [value for counter in counters for value in self.bounds[counter]]
            loop = Op("each", bounds, [], {"count": len(counters), "parallel": True}, [around], top.location)
        at = function.body.ops.index(nest)
        function.body.ops[at:at] = [*made, loop]
        for block, product, operand in self.users:
            ops: list[Op] = []
            reader = Writer(ops, product)
            read = reader.value("load", [buffer, *self._at(reader, {})], TileType(f32, tuple(axes)))
            block.ops[block.ops.index(product):block.ops.index(product)] = ops
            product.operands[operand] = read

    def _at(self, writer: Writer, values: dict[Value, Value]) -> list[Value]:
        """The indices of its elements in memory."""
        found = []
        for place, (start, _) in self.bounds.items():
            if isinstance(place, str):
                found += writer.places([place], [start])
            else:
                found.append(writer.value("sub", [values.get(place, place), start]))
        return found


class _Finder:
    """Looks through a nest. found: the operands that are worth it."""

    def __init__(self, function: Function, stored: set[Value], typical: Typical, fewest: int) -> None:
        self.stored = stored
        self.typical = typical
        self.fewest = fewest
        self.top = {value for op in function.body.ops for value in op.results} | set(function.arguments)
        self.found: list[_Operand] = []
        self.known: dict[Value, _Operand] = {}

    def block(self, op: Op, bounds: Bounds) -> None:
        """What is in the blocks of an op. bounds: of the loops around it."""
        if op.name not in ("each", "tiles"):
            return          # what a condition guards may be gathered from nowhere
        bounds = dict(bounds)
        pairs = list(zip(op.operands[::2], op.operands[1::2], strict=False))
        names = op.attributes["axes"] if op.name == "tiles" else op.blocks[0].arguments[:op.attributes["count"]]
        if op.attributes.get("step", 1) == 1:   # what a longer step leaves out may be gathered from nowhere, too
            bounds |= dict(zip(names, pairs, strict=False))
        block = op.blocks[0]
        for inner in block.ops:
            if inner.name == "whole":
                bounds[inner.attributes["axis"]] = (inner.operands[0], inner.operands[1])
            elif inner.blocks:
                self.block(inner, bounds)
            elif inner.name == "contract":
                for number, value in enumerate(inner.operands):
                    if self.known.get(value) is not None or self.is_worth_it(inner, value, bounds):
                        self.known[value].users.append((block, inner, number))

    def is_worth_it(self, product: Op, value: Value, bounds: Bounds) -> bool:
        rows, over = axes_of(product.result), product.attributes["over"]
        own = [axis for axis in axes_of(value) if axis not in over]
        others = [axis for axis in rows if axis not in own]
        assert isinstance(value.type, TileType)
        if value.type.dtype is not f32 or len(own) != 1 or len(others) != 1 or (
                self._extent(others[0], bounds) < self.fewest):
            return False
        ops: dict[Op, None] = {}
        places: dict[str | Value, None] = {}
        if not self._gather(value, ops, places, bounds) or not any(
                op.name == "load" and affine(op.operands[-1]) is None for op in ops):
            return False
        counters = [place for place in places if isinstance(place, Value)]
        other = product.operands[1 - product.operands.index(value)].op
        # Along the lanes of the product, beside each other: its own axis, if nothing lies better.
        lanes = other is not None and other.name == "load" and others[0] in axes_of(other.operands[-1])
        axes = [*own, *over] if lanes else [*over, *own]
        self.known[value] = _Operand(value, list(ops), [*counters, *axes], bounds)
        self.found.append(self.known[value])
        return True

    def _extent(self, place: str | Value, bounds: Bounds) -> int:
        start, stop = (self.typical(value) or 0 for value in bounds[place])
        return stop - start

    def _gather(self, value: Value, ops: dict[Op, None], places: dict[str | Value, None], bounds: Bounds) -> bool:
        """Take the ops that compute a value, in order, and the axes and counters that it depends on; whether all of it
        can be made before the nest."""
        if value in self.top:
            return not axes_of(value)
        op = value.op
        if op is None or op.name == "index":
            place = value if op is None else op.attributes["axis"]
            if place not in bounds or any(v not in self.top or self.typical(v) is None for v in bounds[place]):
                return False
            places[place] = None
            if op is not None:
                ops[op] = None
            return True
        if op.blocks or op.name in LATE or (op.name == "load" and place_of(op.operands[0]) in self.stored):
            return False
        for operand in op.operands[op.name == "load":]:
            if not self._gather(operand, ops, places, bounds):
                return False
        ops[op] = None
        return True
