"""Products over several axes, as products of matrices.

Enters: a canonical tile function. Leaves: in place of a parallel loop over tiles that has one product, of rows or
columns or a depth of several axes, as a convolution's of channels and the places of a window, one of a matrix by a
matrix, each of whose rows, columns and depth are a single axis: axes that follow each other in memory are taken as one,
by views. What does not lie so, patches of an image, or only every other point, is copied first, by a loop of its own;
an image whose edges are cut off by `where` and clamped indices, once more before that, with its edges.
Other axes, as images of a batch, are loops around. So the product can be staged as any of two matrices.

    for b, o, p, q in tiles(B, O, P, Q):                          buffer d[B, C * 3 * 3, P * Q]
        y[b, o, p, q] = w[o, c, i, j] @ x[b, c, 2 * p + i, 2 * q + j]    d = x, for all b, c, i, j, p, q
                                                                  for b in each(B): for o, r in tiles(O, P * Q):
                                                                      y[b, o, r] = w[o, k] @ d[b, k, r]

Holds: the meaning is the same, but for the order of sums.

Measured on a Zen 3, one thread: docs/choices/nests.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import reduce
from itertools import count
from math import prod

from ..ir.checker import union_of_axes
from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import TensorType, TileType, index
from .affine import affine
from .ops import load_of, place_of
from .parts import INDEX, Writer, copy_op
from .plan import LATE, axes_of
from .product_parts import Typical, axes_brought, rename_axes
from .reduce_loops import as_reductions
from .sums import is_join
from .zeros import is_zero

Group = tuple[str, ...]
"""Axes that are taken as one, the last of which goes along memory first."""
Bounds = dict[str, tuple[Value, Value]]
"""Start and stop of axes."""
Sum = tuple[tuple[str, int], ...]
"""Axes, each with a factor, that are added up."""

LEAST_DEPTH = 8
"""Steps of the depth, in all, from which on a copy and a matrix are worth it."""

WELL_READ_ROWS = 128
"""How many rows meet patches of neighbouring points at least for these to be copied: they are read as well where they
lie. Measured on a Zen 3, one thread, windows of 3 x 3, times the speed where they are read in place: 64 channels of
56 x 56 points to 64 0.74, 128 of 28 x 28 to 128 1.16, of 8 images 1.03, 256 of 14 x 14 to 256 1.34."""

_REFUSED = frozenset({"asm", "buffer", "view", "part"})


def multiply_as_matrices(function: Function, typical: Typical, is_contiguous: Callable[[Value], bool], fewest: int,
                         most_bytes: int) -> None:
    """In place. typical: of an index scalar, None where nothing bounds it before the kernel runs. is_contiguous:
    whether a tensor is known to lie in C order. fewest: rows and columns from which on it is worth it, typically.
    most_bytes: of all copies, typically."""
    for loop in [op for op in function.body.ops if op.name == "tiles" and op.attributes["parallel"]]:
        found = _Finder(function, loop, typical, is_contiguous, fewest).product()
        if found is not None and (size_bytes := found.size_bytes(typical)) <= most_bytes:
            most_bytes -= size_bytes
            taken = {axis for op in function.walk() for axis in axes_brought(op)}
            at = function.body.ops.index(loop)
            function.body.ops[at:at + 1] = _Writer(found, taken).write()


@dataclass(slots=True)
class _Product:
    """A loop that becomes a product of matrices. ops: what it does, in order, of which the product is `contract`.
    sums: what stands for results of loops that were sums. rows, columns: of the result, as it is stored. depth: in the
    order of the operand that stays. outer: axes that become loops. copied: the operand that is copied, if one is."""

    loop: Op
    ops: list[Op]
    contract: Op
    sums: dict[Value, Value]
    bounds: Bounds
    rows: Group
    columns: Group
    depth: Group
    outer: Group
    copied: Value | None = None

    def copy_axes(self) -> list[Group]:
        """How a copy lies, from the outside: columns of the result go along memory, and so does the depth of rows."""
        assert self.copied is not None
        own = axes_of(self.copied)
        sides = (self.depth, self.columns) if set(self.columns) <= set(own) else (self.rows, self.depth)
        return [*((axis,) for axis in self.outer if axis in own), *sides]

    def size_bytes(self, typical: Typical) -> int:
        """Of the copy."""
        return 0 if self.copied is None else _tile(self.copied).dtype.size_bytes * prod(
            typical(self.bounds[axis][1]) or 1 for group in self.copy_axes() for axis in group)

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


class _Finder:
    """Looks at one loop."""

    def __init__(self, function: Function, loop: Op, typical: Typical, is_contiguous: Callable[[Value], bool],
                 fewest: int) -> None:
        self.loop, self.typical, self.is_contiguous, self.fewest = loop, typical, is_contiguous, fewest
        self.top = {value for op in function.body.ops for value in op.results} | set(function.arguments)
        self.stored = {place_of(op.operands[0]) for op in function.walk() if op.name == "store"}
        self.ops: list[Op] = []
        self.sums: dict[Value, Value] = {}
        self.bounds: Bounds = {}

    def product(self) -> _Product | None:
        """None where the loop is something else, or it is not worth it."""
        if "repeats" in self.loop.attributes or not self._look() or not all(map(self._is_known, self.bounds)):
            return None
        late = [op for op in self.ops if op.name in LATE]
        stores = [op for op in self.ops if op.name == "store"]
        if len(late) != 1 or late[0].name != "contract" or not stores or any(map(is_join, stores)):
            return None
        (contract,) = late
        axes = list(map(_axis, stores[0].operands[2:]))
        if sorted(axis or "" for axis in axes) != sorted(self.loop.attributes["axes"]):
            return None
        outer, rows, columns = _sides([axis for axis in axes if axis], contract)
        if not rows or not columns:
            return None
        left, right = contract.operands if rows[0] in axes_of(contract.operands[0]) else contract.operands[::-1]
        over = contract.attributes["over"]
        if not all(set(over) <= set(axes_of(value)) for value in (left, right)):
            return None
        depths = self._depth(left, rows, over), self._depth(right, columns, over)
        depth = depths[0] or depths[1]
        if not depth or min(map(self._extent, (rows, columns))) < self.fewest or self._extent(depth) < LEAST_DEPTH:
            return None
        found = _Product(self.loop, self.ops, contract, self.sums, self.bounds, rows, columns, depth, outer)
        if depths[0] != depths[1]:
            found.copied = right if depths[0] else left
            well = found.copied is right and _goes_along(right, columns[-1])
            if not self._may_move(found) or (well and self._extent(rows) < WELL_READ_ROWS):
                return None
        groups = [group for group in (rows, columns, depth) if len(group) > 1]
        after = found.behind([v for op in stores for v in op.operands], through=False)
        return found if (groups or outer) and all(self._fits(op, groups) for op in (*after, *stores)) else None

    def _look(self) -> bool:
        """Take note of what the loop does, in order, where loops that add products up are sums, and of bounds; whether
        there is nothing else in it."""
        for op in self.loop.blocks[0].ops:
            if op.name == "yield":
                continue
            made = as_reductions(op, of_wholes=True) if op.name == "tiles" and op.results else None
            if made is not None:
                self.ops += made[0]
                self.sums |= dict(zip(op.results, made[1], strict=True))
            elif op.blocks or op.name in _REFUSED:
                return False
            else:
                self.ops.append(op)
        for op in (self.loop, *self.ops):
            for number, axis in enumerate(axes_brought(op)):
                self.bounds[axis] = op.operands[2 * number], op.operands[2 * number + 1]
        return True

    def _is_known(self, axis: str) -> bool:
        """Whether an axis begins at 0 and ends where it is known before the loop."""
        start, stop = self.bounds[axis]
        return is_zero(start) and stop in self.top and self.typical(stop) is not None

    def _extent(self, group: Group) -> int:
        return prod(self.typical(self.bounds[axis][1]) or 1 for axis in group)

    def _depth(self, value: Value, group: Group, over: Collection[str]) -> Group | None:
        """In which order an operand has the axes that are contracted, if these follow each other in memory, and those
        of the group do."""
        load = load_of(value)
        if load is None:
            return None
        depth = tuple(axis for axis in map(_axis, load.operands[1:]) if axis is not None and axis in over)
        several = [axes for axes in (group, depth) if len(axes) > 1]
        return depth if sorted(depth) == sorted(over) and self._fits(load, several) else None

    def _fits(self, op: Op, groups: list[Group]) -> bool:
        """Whether an op on memory, or of elements, has axes of groups as a whole only."""
        members = {axis for group in groups for axis in group}
        if op.name not in ("load", "store"):
            return members.isdisjoint(map(_axis, op.operands))
        tensor, places = op.operands[0], op.operands[1 + (op.name == "store"):]
        dims = tensor.type.dims  # type: ignore[union-attr]
        at, merges = 0, False
        while at < len(places):
            group = next((g for g in groups if _axis(places[at]) == g[0]), None)
            if group is None:
                if not members.isdisjoint(axes_of(places[at])):
                    return False
                at += 1
                continue
            found = tuple(map(_axis, places[at:at + len(group)]))
            if found != group or not all(map(self._is_whole, group, dims[at:at + len(group)])):
                return False
            at, merges = at + len(group), True
        return not merges or (tensor.op is None and self.is_contiguous(tensor) and not any(
            isinstance(dim, tuple) for dim in dims))

    def _is_whole(self, axis: str, dim: object) -> bool:
        """Whether an axis is all of a dimension."""
        stop = self.bounds[axis][1].op
        return stop is not None and dim == (stop.attributes.get("name") if stop.name == "dim" else
                                            stop.attributes.get("value") if stop.name == "const" else None)

    def _may_move(self, found: _Product) -> bool:
        """Whether the operand that is copied may be made before the loop."""
        assert found.copied is not None
        return all(op.name != "load" or place_of(op.operands[0]) not in self.stored
                   for op in found.behind([found.copied], through=True))


def _axis(place: Value) -> str | None:
    """The axis whose coordinate an index is."""
    return place.op.attributes["axis"] if place.op is not None and place.op.name == "index" else None


def _goes_along(value: Value, axis: str) -> bool:
    """Whether neighbours along an axis lie side by side in memory."""
    load = load_of(value)
    form = None if load is None else affine(load.operands[-1])
    return form is not None and form.axes.get(axis) == 1


def _sides(axes: list[str], contract: Op) -> tuple[Group, Group, Group]:
    """Axes of a result in the order of memory, as loops around, rows and columns: those that follow each other and are
    of one operand alone, from the last one on."""
    own = [set(axes_of(value)) for value in contract.operands]
    groups: list[Group] = []
    for _ in range(2):
        side = next((s for s in (0, 1) if axes and axes[-1] in own[s] and axes[-1] not in own[1 - s]), None)
        end = len(axes)
        while side is not None and axes[:end] and axes[end - 1] in own[side] and axes[end - 1] not in own[1 - side]:
            end -= 1
        groups.append(tuple(axes[end:]))
        axes = axes[:end]
    return tuple(axes), groups[1], groups[0]


def _tile(value: Value) -> TileType:
    assert isinstance(value.type, TileType)
    return value.type


def _behind(value: Value, stop: Collection[Value]) -> set[Op]:
    """The ops that a value is made by, but for what `stop` is."""
    found: set[Op] = set()
    pending = [value]
    while pending:
        value = pending.pop()
        if value.op is not None and value.op not in found and value not in stop:
            found.add(value.op)
            pending += value.op.operands
    return found


def _sums_of(value: Value) -> dict[Value, Sum] | None:
    """Of an operand that is no plain load, as where the edges of an image are cut off, the indices by which alone it
    depends on axes, each with its sum of these; in the order of dimensions. None where it is none, or an axis is in
    several such sums."""
    load = load_of(value)
    if load is not None and all(affine(place) is not None for place in load.operands[1:]):
        return None
    loads: list[Op] = []

    def look(value: Value, seen: dict[Value, Sum | None]) -> None:
        if value in seen or not isinstance(value.type, TileType) or not axes_of(value):
            return
        form = affine(value) if value.type.dtype is index else None
        is_sum = form is not None and not form.scalars
        seen[value] = tuple(form.axes.items()) if form is not None and is_sum else None
        if value.op is not None and not is_sum:
            loads.extend([value.op] * (value.op.name == "load"))
            for operand in value.op.operands:
                look(operand, seen)

    found: dict[Value, Sum | None] = {}
    seen: dict[Value, Sum | None] = {}
    look(value, found)
    for load in tuple(loads):       # the dimensions of what is loaded come first
        look(load.result, seen)
    sums = {at: key for at, key in (seen | found).items() if key is not None}
    keys = set(sums.values())
    axes = [axis for key in keys for axis, _ in key]
    well = len(set(axes)) == len(axes) and set(axes) == set(axes_of(value)) and all(
        step > 0 for key in keys for _, step in key) and any(len(key) > 1 for key in keys)
    return sums if well else None


class _Writer:
    """Writes a product of matrices. made: what comes before its loop. names, extents: of groups as axes. counters: of
    the loops around. values: what stands for values of the loop as it was."""

    def __init__(self, product: _Product, taken: set[str]) -> None:
        self.product = product
        self.taken = taken
        self.made: list[Op] = []
        self.top = Writer(self.made, product.loop)
        self.body = Block()
        self.writer = Writer(self.body.ops, product.loop)
        self.around = Block([INDEX] * len(product.outer))
        self.counters = dict(zip(product.outer, self.around.arguments, strict=True))
        self.names: dict[Group, str] = {}
        self.extents: dict[Group, Value] = {}
        for group in (product.rows, product.columns, product.depth):
            name = "_".join(group)
            self.names[group] = name if len(group) == 1 else next(
                other for n in count() if (other := name + f"_{n}" * (n > 0)) not in taken)
            self.extents[group] = self._product_of([product.bounds[axis][1] for axis in group])
        self.values: dict[Value, Value] = {}
        self.places: dict[str, Value] = {}
        self.views: dict[tuple[Value, tuple[int, ...]], Value] = {}

    def write(self) -> list[Op]:
        """What stands for the loop."""
        product, zero = self.product, self.top.number(0)
        copy = None if product.copied is None else self._copy()
        self.writer.op("whole", [zero, self.extents[product.depth]], axis=self.names[product.depth])
        for op in self._kept():
            if op is product.contract:
                operands = [self._of_copy(copy) if v is product.copied and copy is not None else self._operand(v)
                            for v in op.operands]
                depth = self.names[product.depth]
                type = TileType(_tile(op.result).dtype, tuple(a for a in union_of_axes(operands) if a != depth))
                self.values[op.result] = self.writer.value("contract", operands, type, over=[depth])
            elif op.name == "load":
                self.values[op.result] = self._loaded(op.result)
            elif op.name == "store":
                tensor, places = self._place_of(op.operands[0], op.operands[2:])
                self.writer.op("store", [tensor, self.values.get(op.operands[1], op.operands[1]), *places])
            elif op.name == "index":
                if not self._is_in_group(op.attributes["axis"]):
                    self.values[op.result] = self._at(op.attributes["axis"])
            else:
                self._copy_op(op)
            self.values |= {old: self.values[new] for old, new in product.sums.items() if new in self.values}
        self.writer.op("yield", [])
        tiled = (product.rows, product.columns)
        loop = self._loop("tiles", [self.extents[group] for group in tiled], self.body,
                          axes=[self.names[group] for group in tiled])
        if product.outer:
            for axis, counter in self.counters.items():
                counter.name = axis
            self.around.ops += [loop, Op("yield", [], [], {}, None, product.loop.location)]
            loop = self._loop("each", [product.bounds[axis][1] for axis in product.outer], self.around,
                              count=len(product.outer))
        return [*self.made, loop]

    def _kept(self) -> list[Op]:
        """What goes on to be done in the loop, in order: all but what makes the operands of the product."""
        product = self.product
        stores = [op for op in product.ops if op.name == "store"]
        kept = {*stores, *product.behind([v for op in stores for v in op.operands], through=False)}
        for value in product.contract.operands:
            load = load_of(value)
            if value is not product.copied and load is not None:
                kept |= set(product.behind(load.operands, through=True))
        return [op for op in product.ops if op in kept]

    def _loop(self, name: str, stops: list[Value], body: Block, **attributes: object) -> Op:
        """A parallel loop."""
        zero = self.top.number(0)
        return Op(name, [v for stop in stops for v in (zero, stop)], [], {**attributes, "parallel": True}, [body],
                  self.product.loop.location)

    def _product_of(self, extents: list[Value]) -> Value:
        return reduce(lambda left, right: self.top.value("mul", [left, right]), extents)

    def _sum_of(self, values: list[Value]) -> Value:
        return reduce(lambda left, right: self.top.value("add", [left, right]), values)

    def _is_in_group(self, axis: str) -> bool:
        return any(len(group) > 1 and axis in group for group in self.names)

    def _at(self, axis: str) -> Value:
        """The coordinate of an axis, or of a loop around."""
        if axis in self.counters:
            return self.counters[axis]
        if axis not in self.places:
            self.places[axis] = self.writer.value("index", [], TileType(index, (axis,)), axis=axis)
        return self.places[axis]

    def _copy_op(self, op: Op) -> None:
        """An op of elements, on what stands for its operands."""
        made = copy_op(op, self.values)
        names = {axis: name for group, name in self.names.items() for axis in group}
        for value in made.results:
            assert isinstance(value.type, TileType)
            axes = union_of_axes(made.operands) or tuple(dict.fromkeys(
                names.get(axis, axis) for axis in value.type.axes if axis not in self.counters))
            value.type = TileType(value.type.dtype, axes)
        self.body.ops.append(made)

    def _operand(self, value: Value) -> Value:
        """An operand of the product that stays where it lies."""
        op = value.op
        assert op is not None
        if op.name == "load":
            return self._loaded(value)
        read = self._operand(op.operands[0])
        return self.writer.value("cast", [read], TileType(_tile(value).dtype, _tile(read).axes))

    def _loaded(self, value: Value) -> Value:
        """What a value of the loop as it was loads."""
        load = value.op
        assert load is not None
        tensor, places = self._place_of(load.operands[0], load.operands[1:])
        return self.writer.value("load", [tensor, *places], TileType(_tile(value).dtype, union_of_axes(places)))

    def _place_of(self, tensor: Value, places: list[Value]) -> tuple[Value, list[Value]]:
        """A tensor, or a view of it in which groups are one dimension, and where in it places are."""
        made: list[Value] = []
        counts: list[int] = []
        while len(places) > sum(counts):
            place = places[sum(counts)]
            axis = _axis(place)
            group = next((g for g in self.names if len(g) > 1 and axis == g[0]), None)
            if group is not None:
                made.append(self._at(self.names[group]))
            else:
                made.append(self.values.get(place, place) if axis is None else self._at(axis))
            counts.append(1 if group is None else len(group))
        return self._view(tensor, tuple(counts)), made

    def _view(self, tensor: Value, counts: tuple[int, ...], sizes: list[Value] | None = None) -> Value:
        """A tensor with so many neighbouring dimensions taken as one. sizes: of a buffer."""
        if max(counts) == 1:
            return tensor
        if (tensor, counts) not in self.views:
            assert isinstance(tensor.type, TensorType)
            sizes = sizes or [self.top.number(dim) if isinstance(dim, int) else self.top.value("dim", [], name=dim)
                              for dim in tensor.type.dims]
            ends = [sum(counts[:number + 1]) for number in range(len(counts))]
            extents = [self._product_of(sizes[end - number:end]) for end, number in zip(ends, counts, strict=True)]
            self.views[tensor, counts] = self.top.op(
                "view", [tensor, *extents], [TensorType(tensor.type.dtype, ("?",) * len(extents))], None,
                groups=[[number, 1] for number in counts]).result
        return self.views[tensor, counts]

    def _copy(self) -> Value:
        """The loops that copy an operand; the copy, as a matrix for each coordinate of loops around."""
        product = self.product
        assert product.copied is not None
        lies = product.copy_axes()
        axes = [axis for group in lies for axis in group]
        sizes = [product.bounds[axis][1] for axis in axes]
        made = product.behind([product.copied], through=True)
        sums = _sums_of(product.copied)
        ops: list[Op] = []
        if sums is None:
            values: dict[Value, Value] = {}
            ops += [copy_op(op, values) for op in made]
            value = values[product.copied]
        else:
            image = self._image(sums, made)
            value = self._of_image(Writer(ops, product.loop), image, sums)
        buffer = self.top.buffer(_tile(product.copied).dtype, sizes)
        self._fill(buffer, axes, sizes, ops, value)
        return self._view(buffer, tuple(map(len, lies)), sizes)

    def _image(self, sums: dict[Value, Sum], made: list[Op]) -> Value:
        """The loop that makes what an operand is, once for each value of the sums of axes that it depends on, as an
        image with zeros around it. made: what the operand is made by."""
        assert self.product.copied is not None
        names = {key: "_".join(axis for axis, _ in key) for key in sums.values()}
        sizes = list(map(self._values_of, names))
        ops: list[Op] = []
        writer = Writer(ops, self.product.loop)
        places = dict(zip(names, writer.places(list(names.values()), [self.top.number(0)] * len(names)), strict=True))
        values: dict[Value, Value] = {}
        for value, key in sums.items():
            form = affine(value)
            assert form is not None
            values[value] = writer.value("add", [places[key], writer.number(form.constant)], _tile(places[key])) \
                if form.constant else places[key]
        needed = _behind(self.product.copied, values)
        for op in made:
            if op in needed:
                copy = copy_op(op, values)
                copy.result.type = TileType(_tile(copy.result).dtype, union_of_axes(copy.operands))
                ops.append(copy)
        image = self.top.buffer(_tile(self.product.copied).dtype, sizes)
        self._fill(image, list(names.values()), sizes, ops, values[self.product.copied])
        return image

    def _of_image(self, writer: Writer, image: Value, sums: dict[Value, Sum]) -> Value:
        """What an operand is, of its image."""
        places = []
        for key in dict.fromkeys(sums.values()):
            parts = [writer.places([axis], [self.top.number(0)])[0] for axis, _ in key]
            parts = [part if step == 1 else writer.value("mul", [part, writer.number(step)], _tile(part))
                     for part, (_, step) in zip(parts, key, strict=True)]
            places.append(reduce(lambda left, right: writer.value(
                "add", [left, right], TileType(index, union_of_axes((left, right)))), parts))
        return self._read(writer, image, places)

    def _values_of(self, key: Sum) -> Value:
        """How many values a sum has: none where an axis has none. As the least of that and what bounds it, so that
        memory can be sized by it."""
        stops = [self.product.bounds[axis][1] for axis, _ in key]
        if key == ((key[0][0], 1),):
            return stops[0]
        steps = [step for _, step in key]
        ends = self._sum_of([self.top.value("mul", [stop, self.top.number(step)])
                             for stop, step in zip(stops, steps, strict=True)])
        exact = self.top.value("sub", [ends, self.top.number(sum(steps) - 1)])
        some = self.top.value("min", [self._product_of(stops), self.top.number(1)])
        numbers = [(stop.op.attributes["value"], step) for stop, step in zip(stops, steps, strict=True)
                   if stop.op is not None and stop.op.name == "const"]
        most, factor = self._product_of(stops), max(steps)
        if len(numbers) == len(stops) - 1:
            (most, step), = ((v, s) for v, s in zip(stops, steps, strict=True)
                             if v.op is None or v.op.name != "const")
            factor = max(step, 1 + sum(s * (number - 1) for number, s in numbers))
        return self.top.value("min", [self.top.value("mul", [exact, some]),
                                      self.top.value("mul", [most, self.top.number(factor)])])

    def _fill(self, buffer: Value, axes: list[str], sizes: list[Value], ops: list[Op], value: Value) -> None:
        """A loop that stores a value, which ops make, to all of a buffer."""
        body = Block()
        body.ops = ops
        writer = Writer(ops, self.product.loop)
        writer.op("store", [buffer, value, *writer.places(axes, [self.top.number(0)] * len(axes))])
        writer.op("yield", [])
        loop = self._loop("tiles", sizes, body, axes=axes)
        rename_axes(loop, self.taken)
        self.made.append(loop)

    def _of_copy(self, copy: Value) -> Value:
        """What the product reads of the copy."""
        places = [self._at(self.names.get(group, group[0])) for group in self.product.copy_axes()]
        return self._read(self.writer, copy, places)

    @staticmethod
    def _read(writer: Writer, buffer: Value, places: list[Value]) -> Value:
        assert isinstance(buffer.type, TensorType)
        return writer.value("load", [buffer, *places], TileType(buffer.type.dtype, union_of_axes(places)))
