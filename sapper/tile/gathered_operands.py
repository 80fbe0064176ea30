"""Operands of products that are gathered element by element, brought to memory before the loops that multiply them.

Enters: a canonical tile function. Leaves: where a product in loops has an operand of f32 that is computed of elements
gathered along the last dimension of a tensor, as a window whose edges are cut off by `where` and clamped indices, a
parallel loop before the nest that makes each element once, and a load of it in its place: so a nest of plain products
is left, whose operands lie side by side. So is what a loop in order multiplies and adds element by element. What spans
the operand may be counted by loops around it, as taps are; where a point and a tap matter by their sum alone, it is
made once for each sum, and the taps read one image with edges around it. Holds: the meaning is the same; it reads only
what nothing in the function stores to.

Measured on a Cascade Lake, one thread: docs/choices/nests.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from math import prod

from ..ir.checker import union_of_axes
from ..ir.nodes import Block, Function, Op, Value
from ..ir.rewriter import eliminate_dead
from ..ir.types import TensorType, TileType, f32, index
from .affine import affine
from .ops import TILE_OPS, place_of
from .parts import Writer, copy_op
from .plan import LATE, axes_of
from .product_parts import axes_brought, copied, rename_axes
from .zeros import is_zero

Typical = Callable[[Value], int | None]
Variable = str | Value
"""An axis, by name, or a counter."""
Bounds = dict[Variable, tuple[Value, Value]]
"""Start and stop of axes and counters."""
Place = tuple[tuple[Variable, int], ...]
"""Variables by whose sum an operand lies in memory, each with a factor: one, or two."""
Sums = dict[Value, tuple[Place, int]]
"""Sums of two variables and a constant."""

FEWEST_SUMS = 2
"""Places that are sums from which on products of matrices read them: copies of an image for each of nine taps are much,
those of a line for three lie as their products want them. Measured on a Cascade Lake, times PyTorch's speed, by sums
and by taps: 64 channels of 32 x 32 points to 64, taps in loops 0.93 and 0.77; 128 of 1000 to 128 0.93 and 1.01."""

FEWEST_MET = 18
"""Rows, or columns, times taps that an element of an image meets, from which on the image is made with its edges for
what loops add up. Measured on a Zen 3, one thread, 32 channels, ms with elements gathered at each tap and so, by rows:
3 x 3 taps of 32 x 32 points, 1 0.20 and 0.15, 2 0.41 and 0.19, 4 0.84 and 0.23, 8 1.80 and 0.21, 16 2.21 and 0.39;
3 taps of 1000 points, 2 0.032 and 0.040, 4 0.054 and 0.047, 8 0.120 and 0.082, 16 0.28 and 0.12."""

FEWEST_TAPS, CHANNELS = 6, 16
"""Of a window that each channel has for itself, for its image to be made; so many channels, typically, for each to be
made by who has it, not all before. Measured on a Zen 3, one thread, 8 images, in ms as it was, with all images made
before, and one by one: 3 x 3 of 96 channels of 56 x 56 5.3, 6.6 and 2.7, of 384 of 14 x 14 2.5, 6.6 and 1.0, 5 x 5 of
240 of 28 x 28 10.7, 13.9 and 3.5; of one image 0.63, 0.31 and 0.31, 0.38, 0.14 and 0.12, 2.5, 0.63 and 0.45."""


def bring_gathered(function: Function, typical: Typical, fewest: int, most_bytes: int, of: str) -> None:
    """In place. typical: of an index scalar, None where nothing bounds it before the kernel runs. fewest: rows or
    columns that meet an operand, typically, for it to be made before. most_bytes: of all such memory, typically. of:
    of which products, "contract", or "mul", what a loop in order adds up, of windows alone."""
    stored = {place_of(op.operands[0]) for op in function.walk() if op.name == "store"}
    wholes: Bounds = {op.attributes["axis"]: (op.operands[0], op.operands[1])
                      for op in function.body.ops if op.name == "whole"}
    for nest in [op for op in function.body.ops if op.attributes.get("parallel")]:
        finder = _Finder(function, stored, typical, fewest, of)
        finder.block(nest, wholes, function.body)
        counted = False
        for operand in finder.found:
            most_bytes -= operand.size_bytes(typical)
            if most_bytes >= 0 and (operand.alone is not None or not counted):
                before = nest
                nest = operand.make(function, nest)
                counted |= nest is not before       # others would ask for axes that are none now
        if finder.found and of == "mul":
            eliminate_dead(function, TILE_OPS)      # else what was gathered is (clamps.py)


@dataclass(slots=True)
class _Around:
    """A loop over tiles, and the block that it is in."""

    tiles: Op
    block: Block


class _Operand:
    """One that is made before. ops: what it is computed by, in order, but for sums. places: as it lies in memory.
    users: the products that read it, each with its block and the place of the operand. alone: the loop over tiles that
    has it, if each channel has its own window."""

    alone: _Around | None = None

    def __init__(self, value: Value, ops: list[Op], places: list[Place], sums: Sums, bounds: Bounds) -> None:
        self.value = value
        self.ops = ops
        self.places = places
        self.sums = sums
        self.bounds = {variable: bounds[variable] for place in places for variable, _ in place}
        self.users: list[tuple[Block, Op, int]] = []

    def size_bytes(self, typical: Typical) -> int:
        def extent(place: Place) -> int:
            return sum(factor * (self._span(typical, variable) - 1) for variable, factor in place) + 1

        return f32.size_bytes * prod(max(1, extent(place)) for place in self.places)

    def _span(self, typical: Typical, variable: Variable) -> int:
        return (typical(self.bounds[variable][1]) or 0) - (typical(self.bounds[variable][0]) or 0)

    def make(self, function: Function, nest: Op) -> Op:
        """The loop that makes it, before the nest, and the loads that take its place there. What the nest is then."""
        if self.alone is not None and (found := self._make_alone(function, nest, self.alone)) is not None:
            return found
        made: list[Op] = []
        top = Writer(made, self.value.op or nest)
        ends = {place: self._ends(top, place) for place in self.places}
        buffer = top.buffer(f32, [top.value("sub", [stop, start]) for start, stop in ends.values()])
        axes = {place: name for place in self.places for name, _ in place if isinstance(name, str)}
        counters = [place for place in self.places if place not in axes]
        values: dict[Value, Value] = {}
        around = Block([TileType(index)] * len(counters))
        body = Block()
        writer = Writer(body.ops, self.value.op or nest)
        at: dict[Place, Value] = {}     # where an element lies, from 0 of all of its variables on
        for place, counter in zip(counters, around.arguments, strict=True):
            variable = place[0][0]
            assert isinstance(variable, Value)
            counter.name, at[place] = variable.name, counter
            if len(place) == 1:
                values[variable] = counter
        for place, axis in axes.items():
            at[place] = writer.places([axis], [writer.number(0)])[0]
        for total, (place, constant) in self.sums.items():
            values[total] = writer.value("add", [at[place], writer.number(constant)], at[place].type)  # type: ignore[arg-type]
        body.ops += [copy_op(op, values) for op in self.ops]
        writer.op("store", [buffer, values[self.value], *(self._from(writer, at[place], ends[place][0])
                                                          for place in self.places)])
        writer.op("yield", [])
        bounds = [value for place in axes for value in ends[place]]
        loop = Op("tiles", bounds, [], {"axes": list(axes.values()), "parallel": True}, [body], top.location)
        rename_axes(loop, {axis for op in function.walk() for axis in axes_brought(op)})
        if counters:
            around.ops += [loop, Op("yield", [], [], {}, None, top.location)]
            bounds = [value for place in counters for value in ends[place]]
            loop = Op("each", bounds, [], {"count": len(counters), "parallel": True}, [around], top.location)
        before = function.body.ops.index(nest)
        function.body.ops[before:before] = [*made, loop]
        for block, product, operand in self.users:
            ops: list[Op] = []
            reader = Writer(ops, product)
            places = [self._from(reader, self._read_at(reader, place), ends[place][0]) for place in self.places]
            read = reader.value("load", [buffer, *places], TileType(f32, tuple(axes.values())))
            block.ops[block.ops.index(product):block.ops.index(product)] = ops
            product.operands[operand] = read
        return nest

    def _make_alone(self, function: Function, nest: Op, around: _Around) -> Op | None:
        """Have the image of a channel made by who has it, just before its window goes over it, if there are
        channels."""
        tiles, block = around.tiles, around.block
        windows = [place for place in self.places if len(place) > 1]
        inner = [name for place in windows for name, _ in place if isinstance(name, str)]
        outer = [axis for axis in tiles.attributes["axes"] if axis not in inner]
        if tiles.results or len(inner) < len(windows) or (not outer and tiles is nest):
            return None
        made: list[Op] = []
        top = Writer(made, nest)
        sizes = [self._ends(top, place)[1] for place in windows]
        size = reduce(lambda a, b: top.value("mul", [a, b]), sizes)
        memory = top.op("buffer", [size], [TensorType(f32, ("?",))], None, own=True).result
        image = top.op("view", [memory, *sizes], [TensorType(f32, ("?",) * len(sizes))], None,
                       groups=[[1, len(sizes)]]).result
        at = function.body.ops.index(nest)
        function.body.ops[at:at] = made
        if outer:
            block = around.block = _count(tiles, outer, block)
            nest = function.body.ops[at + len(made)] if tiles is nest else nest
        values: dict[Value, Value] = {}
        body = Block()
        writer = Writer(body.ops, nest)
        places = dict(zip(windows, writer.places(inner, [writer.number(0)] * len(inner)), strict=True))
        for total, (place, constant) in self.sums.items():
            values[total] = writer.value("add", [places[place], writer.number(constant)], places[place].type)  # type: ignore[arg-type]
        body.ops += [copied(op, values) for op in self.ops if op.name != "index" or op.attributes["axis"] in inner]
        writer.op("store", [image, values[self.value], *places.values()])
        writer.op("yield", [])
        zero = top.number(0)
        function.body.ops.insert(at, made.pop())
        loop = Op("tiles", [v for size in sizes for v in (zero, size)], [], {"axes": inner, "parallel": True}, [body],
                  nest.location)
        rename_axes(loop, {axis for op in function.walk() for axis in axes_brought(op)})
        block.ops.insert(block.ops.index(tiles), loop)
        for users, product, operand in self.users:
            ops: list[Op] = []
            reader = Writer(ops, product)
            read_at = [self._read_at(reader, place) for place in windows]
            read = reader.value("load", [image, *read_at], TileType(f32, union_of_axes(read_at)))
            users.ops[users.ops.index(product):users.ops.index(product)] = ops
            product.operands[operand] = read
        return nest

    def _ends(self, writer: Writer, place: Place) -> tuple[Value, Value]:
        """The least sum of the variables of a place, and one more than the largest. Two variables begin at 0; there is
        no sum where one of them has no values."""
        start, stop = self.bounds[place[0][0]]
        if len(place) == 1:
            return start, stop
        ends = [self.bounds[variable][1] if factor == 1 else writer.value(
            "mul", [self.bounds[variable][1], writer.number(factor)]) for variable, factor in place]
        more = writer.number(sum(factor for _, factor in place) - 1)
        sums = writer.value("sub", [writer.value("add", ends), more])
        return start, writer.value("min", [sums, writer.value("mul", ends)])

    def _read_at(self, writer: Writer, place: Place) -> Value:
        """The sum of the variables of a place, where the operand is read."""
        found = next(((total, constant) for total, (of, constant) in self.sums.items() if of == place), None)
        if found is not None:
            return writer.value("sub", [found[0], writer.number(found[1])], found[0].type)  # type: ignore[arg-type]
        ((variable, _),) = place
        return writer.places([variable], [writer.number(0)])[0] if isinstance(variable, str) else variable

    def _from(self, writer: Writer, at: Value, start: Value) -> Value:
        """A place counted from where it starts."""
        return at if is_zero(start) else writer.value("sub", [at, start], at.type)  # type: ignore[arg-type]


class _Finder:
    """Looks through a nest. found: the operands that are worth it."""

    def __init__(self, function: Function, stored: set[Value], typical: Typical, fewest: int, of: str) -> None:
        self.stored = stored
        self.of = of
        self.typical = typical
        self.fewest = fewest
        self.top = {value for op in function.body.ops for value in op.results} | set(function.arguments)
        self.found: list[_Operand] = []
        self.known: dict[Value, _Operand] = {}

    def block(self, op: Op, bounds: Bounds, outside: Block) -> None:
        """What is in the blocks of an op. bounds: of the loops around it. outside: where it is."""
        if op.name not in ("each", "tiles"):
            return          # what a condition guards may be gathered from nowhere
        bounds = dict(bounds)
        pairs = list(zip(op.operands[::2], op.operands[1::2], strict=False))
        names = op.attributes["axes"] if op.name == "tiles" else op.blocks[0].arguments[:op.attributes["count"]]
        if op.attributes.get("step", 1) == 1:   # what a longer step leaves out may be gathered from nowhere, too
            bounds |= dict(zip(names, pairs, strict=False))
        block = op.blocks[0]
        if op.name == "tiles" and op.attributes["parallel"]:
            self.around = _Around(op, outside)
        for inner in block.ops:
            if inner.name == "whole":
                bounds[inner.attributes["axis"]] = (inner.operands[0], inner.operands[1])
            elif inner.blocks:
                self.block(inner, bounds, block)
            elif inner.name == self.of and (self.of == "contract" or (op.name == "each" and op.results)):
                for number, value in enumerate(inner.operands):
                    if self.known.get(value) is not None or self.is_worth_it(inner, value, bounds):
                        self.known[value].users.append((block, inner, number))

    def is_worth_it(self, product: Op, value: Value, bounds: Bounds) -> bool:
        rows, over = axes_of(product.result), product.attributes.get("over", ())
        own = [axis for axis in axes_of(value) if axis not in over]
        others = [axis for axis in rows if axis not in own]
        assert isinstance(value.type, TileType)
        alone = product.name == "mul" and not others      # each channel by itself: only taps share the image
        if value.type.dtype is not f32 or not own or (not alone and len(others) != 1):
            return False
        ops: dict[Op, None] = {}
        places: dict[Place, None] = {}
        sums: Sums = {}
        window = self._gather(value, ops, places, bounds, sums) and _apart(places) and all(
            _is_inside(place, sums) for op in ops if op.name == "load" for place in op.operands[1:])
        if not window or (product.name == "contract" and sum(len(place) > 1 for place in places) < FEWEST_SUMS):
            ops, places, sums = {}, {}, {}
            if not self._gather(value, ops, places, bounds, None):
                return False
        taps = prod(self._extent(v, bounds) for place in places if len(place) > 1 for v, _ in place if v not in rows)
        if not alone:
            met = self._extent(others[0], bounds)
            if met < self.fewest and (not sums or met * taps < FEWEST_MET):
                return False
        if not sums and (len(own) > 1 or product.name == "mul"):
            return False
        gathered = [op for op in ops if op.name == "load" and affine(op.operands[-1]) is None]
        if not gathered:
            return False
        if alone:
            own = [axis for index in gathered[0].operands[1:] for axis in axes_of(index)]
            if taps < FEWEST_TAPS or sorted(own) != sorted(rows):
                return False
        by_axis = {name: place for place in places for name, _ in place if isinstance(name, str)}
        counters = [place for place in places if place not in by_axis.values()]
        other = product.operands[1 - product.operands.index(value)].op
        # Along the lanes of the product, beside each other: its own axis, if nothing lies better.
        lanes = bool(others) and other is not None and other.name == "load" and (
            others[0] in axes_of(other.operands[-1]))
        axes = [*own, *over] if lanes else [*over, *own]
        placed = [by_axis.get(axis, ((axis, 1),)) for axis in axes]
        self.known[value] = _Operand(value, list(ops), [*counters, *placed], sums, bounds)
        self.found.append(self.known[value])
        if alone and prod(self._extent(v, bounds) for place in places if len(place) == 1 for v, _ in place) >= CHANNELS:
            self.known[value].alone = self.around
        return True

    def _extent(self, place: Variable, bounds: Bounds) -> int:
        start, stop = (self.typical(value) or 0 for value in bounds[place])
        return stop - start

    def _gather(self, value: Value, ops: dict[Op, None], places: dict[Place, None], bounds: Bounds,
                sums: Sums | None) -> bool:
        """Take the ops that compute a value, in order, and what it depends on; whether all of it can be made before the
        nest. sums: of variables, where these are taken for one; None where they are not."""
        op = value.op
        if value in self.top and (op is None or op.name != "index"):
            return not axes_of(value)
        total = self._sum(value, bounds) if sums is not None else None
        if sums is not None and total is not None:
            sums[value] = total
            places[total[0]] = None
            return True
        if op is None or op.name == "index":
            variable = value if op is None else op.attributes["axis"]
            if not self._is_known(variable, bounds):
                return False
            places[(variable, 1),] = None
            if op is not None:
                ops[op] = None
            return True
        if op.blocks or op.name in LATE or (op.name == "load" and place_of(op.operands[0]) in self.stored):
            return False
        for operand in op.operands[op.name == "load":]:
            if not self._gather(operand, ops, places, bounds, sums):
                return False
        ops[op] = None
        return True

    def _is_known(self, variable: Variable, bounds: Bounds) -> bool:
        """Whether a variable has ends that are known before the nest."""
        return variable in bounds and all(
            v in self.top and self.typical(v) is not None for v in bounds[variable])

    def _sum(self, value: Value, bounds: Bounds) -> tuple[Place, int] | None:
        """The two variables that a value is the sum of, one axis at most, and a constant."""
        form = affine(value) if value.type.dtype is index else None  # type: ignore[union-attr]
        if form is None or len(form.axes) > 1 or len(form.axes) + len(form.scalars) != 2:
            return None
        place: Place = (*form.axes.items(), *form.scalars.items())
        known = all(factor > 0 and self._is_known(v, bounds) and is_zero(bounds[v][0]) for v, factor in place)
        return (place, form.constant) if known else None


def _count(tiles: Op, axes: list[str], block: Block) -> Block:
    """Have some axes of a loop over tiles counted by one over indices around it; the block of that."""
    bounds = {axis: tiles.operands[2 * n:2 * n + 2] for n, axis in enumerate(tiles.attributes["axes"])}
    around = Block([TileType(index)] * len(axes))
    counters = dict(zip(axes, around.arguments, strict=True))
    for axis, counter in counters.items():
        counter.name = axis
    values: dict[Value, Value] = {}
    for op in tiles.walk():
        if op.name == "index" and op.attributes["axis"] in counters:
            values[op.result] = counters[op.attributes["axis"]]
    blocks = [tiles.blocks[0]]
    while blocks:
        inner = blocks.pop()
        inner.ops[:] = [op for op in inner.ops if not (op.results and op.result in values)]
        blocks += [nested for op in inner.ops for nested in op.blocks]
        for value in (*inner.arguments, *(v for op in inner.ops for v in op.results)):
            if isinstance(value.type, TileType):
                value.type = TileType(value.type.dtype, tuple(a for a in value.type.axes if a not in counters))
        for op in inner.ops:
            op.operands = [values.get(v, v) for v in op.operands]
    loop = Op("each", [v for axis in axes for v in bounds[axis]], [], {"count": len(axes), "parallel": True}, [around],
              tiles.location)
    block.ops[block.ops.index(tiles)] = loop
    tiles.attributes["axes"] = [axis for axis in bounds if axis not in counters]
    tiles.operands = [v for axis, pair in bounds.items() if axis not in counters for v in pair]
    around.ops += [tiles, Op("yield", [], [], {}, None, tiles.location)]
    return around


def _apart(places: dict[Place, None]) -> bool:
    """Whether each variable is in one place only."""
    variables = [variable for place in places for variable, _ in place]
    return len(set(variables)) == len(variables)


def _is_inside(place: Value, sums: Sums) -> bool:
    """Whether an index finds an element at each sum between the least and the largest, as it does at these. Where
    variables have factors others may be no sum of theirs, as 1 is not of 2 * j: then it must rise with sums."""
    def leaps(value: Value) -> bool:
        if value in sums:
            return any(factor > 1 for _, factor in sums[value][0])
        return value.op is not None and any(map(leaps, value.op.operands))

    def rises(value: Value) -> bool:
        return value in sums or not leaps(value) or (
            value.op is not None and value.op.name in ("min", "max", "add") and all(map(rises, value.op.operands)))

    return rises(place)
