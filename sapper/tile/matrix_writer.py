"""Writes a product of matrices in place of a loop over tiles (as_matrices.py).

Enters: what was found out about the loop (matrix_form.py). Leaves: the loops that copy what does not lie so, in order,
and the loop that multiplies. Holds: the meaning is the same, but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import reduce
from itertools import count

from ..ir.checker import union_of_axes
from ..ir.nodes import Block, Op, Value
from ..ir.types import DType, TensorType, TileType, index
from .affine import affine
from .matrix_form import MULTIPLE, PIECE_COLUMNS, Group, Product, Sum, axis_at, tile_of
from .ops import load_of
from .parts import INDEX, Writer, copy_op
from .plan import axes_of
from .product_parts import copied, rename_axes


class MatrixWriter:
    """Writes a product of matrices. made: what comes before its loop. around: what that is in, if anything; counters:
    of outer axes, of it; first: where the piece at hand begins, along the axis that is parted, and ends: where axes
    end, this one from there on. names, extents: of groups as axes. values: what stands for values of the loop as it
    was."""

    def __init__(self, product: Product, taken: set[str], piece_bytes: int) -> None:
        self.product = product
        self.taken = taken
        self.made: list[Op] = []
        self.top = Writer(self.made, product.loop)
        self.body = Block()
        self.writer = Writer(self.body.ops, product.loop)
        self.around = Block([INDEX] * (len(product.outer) + (product.parted is not None)))
        self.inside = self.top if product.parted is None else Writer(self.around.ops, product.loop)
        self.counters = dict(zip(product.outer, self.around.arguments, strict=False))
        self.values: dict[Value, Value] = {counter: self.counters[axis] for counter, axis in product.counters.items()}
        self.places: dict[str, Value] = {}
        self.views: dict[tuple[Value, tuple[int, ...]], Value] = {}
        self.ends = {axis: stop for axis, (_, stop) in product.bounds.items()}
        self.stops = [self.ends[axis] for axis in product.outer]
        self.first: Value | None = None
        self.piece, self.in_order = self.inside, Block([INDEX] * len(product.ordered))
        if product.parted is not None:
            self._part(product.parted, piece_bytes)
        if product.ordered:
            self.inside = Writer(self.in_order.ops, product.loop)
            self.counters |= zip(product.ordered, self.in_order.arguments, strict=True)
        self.names: dict[Group, str] = {}
        self.extents: dict[Group, Value] = {}
        for group in (product.rows, product.columns, product.depth):
            name = "_".join(group)
            self.names[group] = name if len(group) == 1 else next(
                other for n in count() if (other := name + f"_{n}" * (n > 0)) not in taken)
            taken.add(self.names[group])
            writer = self.piece if product.parted in group else self.top
            self.extents[group] = self._product_of([self.ends[axis] for axis in group], writer)

    def _part(self, parted: str, piece_bytes: int) -> None:
        """Begin what is done for a piece of the copy: how long it is, and where."""
        product, top, inside = self.product, self.top, self.inside
        assert product.copied is not None
        stop, rest = self.ends[parted], product.own_group[1:]
        elements = top.number(piece_bytes // tile_of(product.copied).dtype.size_bytes)
        least, one = top.number(PIECE_COLUMNS), top.number(1)
        depth = self._product_of([self.ends[axis] for axis in product.depth])
        beside = self._product_of([self.ends[axis] for axis in rest]) if rest else one
        unit = self._product_of([depth, beside])
        self.room = [unit, elements, self._product_of([depth, least])]
        sums = _sums_of(product.copied)
        if sums is not None:
            keys = [key for key in map(self._inner, dict.fromkeys(sums.values())) if key]
            line = self._product_of([one, *(self._bound(key, (parted,)) for key in keys)])
            short = self._product_of([least, *(self._bound(key, product.own_group) for key in keys)])
            self.image_room = [line, elements, short]
            unit = self._sum_of([unit, line])
        fitting = top.value("floordiv", [elements, self._sum_of([unit, one])])
        if rest:
            few = top.value("floordiv", [least, self._sum_of([beside, one])])
            size = self._sum_of([fitting, few, one])
        else:
            multiple = top.number(MULTIPLE)
            size = self._product_of([top.value("floordiv", [self._sum_of([fitting, least]), multiple]), multiple])
        self.size = top.value("min", [stop, size])
        some = top.value("sub", [self._sum_of([stop, size]), one])
        self.stops.append(top.value("min", [stop, top.value("floordiv", [some, size])]))
        self.first = inside.value("mul", [self.around.arguments[-1], size])
        self.ends[parted] = inside.value("min", [self.size, inside.value("sub", [stop, self.first])])
        self.start = self._product_of([self.first, beside], inside) if rest else self.first

    def write(self) -> list[Op]:
        """What stands for the loop."""
        product, zero = self.product, self.top.number(0)
        turned = None if product.turned is None else self._turn(product.turned)
        copy = None if product.copied is None else self._copy()
        self.writer.op("whole", [zero, self.extents[product.depth]], axis=self.names[product.depth])
        for op in self._kept():
            if op is product.contract:
                operands = [self._of_copy(copy) if v is product.copied and copy is not None else
                            self._operand(v, turned if v is product.turned else None) for v in op.operands]
                depth = self.names[product.depth]
                type = TileType(tile_of(op.result).dtype, tuple(a for a in union_of_axes(operands) if a != depth))
                self.values[op.result] = self.writer.value("contract", operands, type, over=[depth])
            elif op.name == "load":
                self.values[op.result] = self._loaded(op.result)
            elif op.name == "store":
                tensor, places = self._place_of(op.operands[0], op.operands[2:])
                value = self.values.get(op.operands[1], op.operands[1])
                if product.ordered:
                    self._clear(tensor, places, tile_of(value).dtype)
                    before = self._read(self.writer, tensor, places)
                    value = self.writer.value("add", [before, value], tile_of(before))
                self.writer.op("store", [tensor, value, *places])
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
        if product.ordered:
            self.in_order.ops += [loop, Op("yield", [], [], {}, None, product.loop.location)]
            loop = self._loop("each", [product.bounds[axis][1] for axis in product.ordered], self.in_order,
                              count=len(product.ordered))
            loop.attributes["parallel"] = False
        if self.stops:
            for axis, counter in self.counters.items():
                counter.name = axis.split(".")[0]
            self.around.ops += [loop, Op("yield", [], [], {}, None, product.loop.location)]
            loop = self._loop("each", self.stops, self.around, count=len(self.stops))
        return [*self.made, loop]

    def _clear(self, tensor: Value, stored: list[Value], dtype: DType) -> None:
        """The loop that stores the zeros to which products are added, of the piece at hand."""
        names = [self.names[group] for group in (self.product.rows, self.product.columns)]
        body = Block()
        writer = Writer(body.ops, self.product.loop)
        zero = writer.value("const", [], TileType(dtype), value=0.0 if dtype.is_float else 0)
        values = {}
        for group, name in zip((self.product.rows, self.product.columns), names, strict=True):
            type = TileType(index, (name,))
            at = writer.value("index", [], type, axis=name)
            values[name] = at if self.product.parted not in group else writer.value("add", [at, self.start], type)
        places = [values[axes[0]] if (axes := axes_of(place)) else place for place in stored]
        writer.op("store", [tensor, writer.value("full", [zero], TileType(dtype, tuple(names))), *places])
        writer.op("yield", [])
        stops = [self.extents[group] for group in (self.product.rows, self.product.columns)]
        loop = self._loop("tiles", stops, body, axes=names)
        rename_axes(loop, self.taken)
        self.piece.ops.append(loop)

    def _kept(self) -> list[Op]:
        """What goes on to be done in the loop, in order: all but what makes the operands of the product."""
        product = self.product
        stores = [op for op in product.ops if op.name == "store"]
        kept = {*stores, *product.behind([v for op in stores for v in op.operands], through=False)}
        for value in product.contract.operands:
            load = load_of(value)
            if value not in (product.copied, product.turned) and load is not None:
                kept |= set(product.behind(load.operands, through=True))
        return [op for op in product.ops if op in kept]

    def _loop(self, name: str, stops: list[Value], body: Block, **attributes: object) -> Op:
        """A parallel loop."""
        zero = self.top.number(0)
        return Op(name, [v for stop in stops for v in (zero, stop)], [], {**attributes, "parallel": True}, [body],
                  self.product.loop.location)

    def _product_of(self, extents: list[Value], writer: Writer | None = None) -> Value:
        return reduce(lambda left, right: (writer or self.top).value("mul", [left, right]), extents)

    def _sum_of(self, values: list[Value], writer: Writer | None = None) -> Value:
        return reduce(lambda left, right: (writer or self.top).value("add", [left, right]), values)

    def _is_in_group(self, axis: str) -> bool:
        return any(len(group) > 1 and axis in group for group in self.names)

    def _at(self, axis: str) -> Value:
        """The coordinate of an axis, or of a loop around."""
        if axis in self.counters:
            return self.counters[axis]
        if axis not in self.places:
            type = TileType(index, (axis,))
            at = self.writer.value("index", [], type, axis=axis)
            group = next(g for g, name in self.names.items() if name == axis)
            self.places[axis] = at if self.product.parted not in group else self.writer.value(
                "add", [at, self.start], type)
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

    def _operand(self, value: Value, turned: Value | None = None) -> Value:
        """An operand of the product that stays where it lies, or else its copy."""
        op = value.op
        assert op is not None
        if op.name == "load":
            if turned is None:
                return self._loaded(value)
            side = self.product.rows if self.product.is_right else self.product.columns
            names = [self.names[side], self.names[self.product.depth]]
            return self._read(self.writer, turned, list(map(self._at, names if self.product.is_right else names[::-1])))
        read = self._operand(op.operands[0], turned)
        return self.writer.value("cast", [read], TileType(tile_of(value).dtype, tile_of(read).axes))

    def _loaded(self, value: Value) -> Value:
        """What a value of the loop as it was loads."""
        load = value.op
        assert load is not None
        tensor, places = self._place_of(load.operands[0], load.operands[1:])
        return self.writer.value("load", [tensor, *places], TileType(tile_of(value).dtype, union_of_axes(places)))

    def _place_of(self, tensor: Value, places: list[Value]) -> tuple[Value, list[Value]]:
        """A tensor, or a view of it in which groups are one dimension, and where in it places are."""
        made: list[Value] = []
        counts: list[int] = []
        while len(places) > sum(counts):
            place = places[sum(counts)]
            axis = axis_at(place)
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
            if tensor.op is not None and tensor.op.name == "buffer":
                sizes = sizes or list(tensor.op.operands)
            sizes = sizes or [self.top.number(dim) if isinstance(dim, int) else self.top.value("dim", [], name=dim)
                              for dim in tensor.type.dims]
            ends = [sum(counts[:number + 1]) for number in range(len(counts))]
            extents = [self._product_of(sizes[end - number:end]) for end, number in zip(ends, counts, strict=True)]
            self.views[tensor, counts] = self._as(tensor, extents, [[number, 1] for number in counts])
        return self.views[tensor, counts]

    def _as(self, tensor: Value, extents: list[Value], groups: list[list[int]]) -> Value:
        assert isinstance(tensor.type, TensorType)
        return self.top.op("view", [tensor, *extents], [TensorType(tensor.type.dtype, ("?",) * len(extents))], None,
                           groups=groups).result

    def _copy(self) -> Value:
        """The loops that copy an operand; the copy, as a matrix for each coordinate of loops around."""
        product = self.product
        assert product.copied is not None
        lies = product.copy_axes()
        axes = [axis for group in lies for axis in group]
        sizes = [self.size if axis == product.parted else product.bounds[axis][1] for axis in axes]
        made = product.behind([product.copied], through=True)
        sums = _sums_of(product.copied)
        ops: list[Op] = []
        writer = Writer(ops, product.loop)
        if sums is None:
            value = self._copied(made, writer)
        else:
            image, low = self._image(sums, made)
            value = self._of_image(writer, image, sums, low)
        dtype = tile_of(product.copied).dtype
        if product.parted is None:
            buffer = self.top.buffer(dtype, sizes)
            self._fill(buffer, axes, [self.ends[axis] for axis in axes], ops, value)
            return self._view(buffer, tuple(map(len, lies)), sizes)
        buffer = self._own_buffer(dtype, sizes, self.room)
        places = self._as(buffer, sizes, [[1, len(sizes)]])
        self._fill(places, axes, [self.ends[axis] for axis in axes], ops, value)
        ends = [sum(map(len, lies[:number + 1])) for number in range(len(lies))]
        extents = [self._product_of(sizes[end - len(group):end]) for end, group in zip(ends, lies, strict=True)]
        return self._as(buffer, extents, [[1, len(extents)]])

    def _turn(self, value: Value) -> Value:
        """The loop that copies the other operand, once; the copy, as a matrix."""
        product = self.product
        lies = [product.rows, product.depth] if product.is_right else [product.depth, product.columns]
        axes = [axis for group in lies for axis in group]
        sizes = [product.bounds[axis][1] for axis in axes]
        load = load_of(value)
        assert load is not None
        own = [axis_at(place) or "" for place in load.operands[1:]]
        runs = product.runs
        names = {run: "_".join(run) for run in runs}
        ops: list[Op] = []
        writer = Writer(ops, product.loop)
        ends = [self._product_of([product.bounds[axis][1] for axis in run]) for run in runs]
        places = dict(zip(runs, writer.places(list(names.values()), [self.top.number(0)] * len(runs)), strict=True))
        there = sorted(runs, key=lambda run: own.index(run[0]))
        source = self._view(load.operands[0], tuple(map(len, there)))
        read = self._read(writer, source, [places[run] for run in there])
        buffer = self.top.buffer(tile_of(load.result).dtype, sizes)
        self._fill(self._view(buffer, tuple(map(len, runs)), sizes), list(names.values()), ends, ops, read, self.top)
        return self._view(buffer, tuple(map(len, lies)), sizes)

    def _own_buffer(self, dtype: DType, sizes: list[Value], room: list[Value]) -> Value:
        """Memory of each worker's own, one dimension of it. room: the sum of what bounds its size."""
        size = self.top.value("min", [self._product_of(sizes), self._sum_of(room)])
        return self.top.op("buffer", [size], [TensorType(dtype, ("?",))], None, own=True).result

    def _copied(self, made: list[Op], writer: Writer) -> Value:
        """What an operand is, made at the coordinates of the copy."""
        assert self.product.copied is not None
        values = dict(self.values)
        for op in made:
            axis = op.attributes["axis"] if op.name == "index" else None
            if self.product.parted is None:
                writer.ops.append(copy_op(op, values))
            elif axis in self.counters:
                values[op.result] = self.counters[axis]
            else:
                writer.ops.append(copied(op, values))
                if axis == self.product.parted and self.first is not None:
                    at = values[op.result]
                    values[op.result] = writer.value("add", [at, self.first], tile_of(at))
        return values[self.product.copied]

    # The image.

    def _inner(self, key: Sum) -> Sum:
        """The part of a sum that no loop around the copy makes."""
        return key if self.product.parted is None else tuple(
            (axis, step) for axis, step in key if axis not in self.counters)

    def _image(self, sums: dict[Value, Sum], made: list[Op]) -> tuple[Value, dict[Sum, Value | None]]:
        """The loop that makes what an operand is, once for each value of the sums of axes that it depends on, as an
        image with zeros around it; the least of these values, where it is not 0. made: what the operand is made by."""
        assert self.product.copied is not None
        keys = list(dict.fromkeys(sums.values()))
        names = {key: "_".join(axis for axis, _ in inner) for key in keys if (inner := self._inner(key))}
        sizes = [self._values_of(self._inner(key)) for key in names]
        ops: list[Op] = []
        writer = Writer(ops, self.product.loop)
        places = dict(zip(names, writer.places(list(names.values()), [self.top.number(0)] * len(names)), strict=True))
        low = {key: self._low(self._inner(key)) for key in keys}
        values: dict[Value, Value] = dict(self.values)
        for value, key in sums.items():
            form = affine(value)
            assert form is not None
            place = places.get(key)
            parts = [part for part in (low[key], self._outer(key)) if part is not None]
            if form.constant or (not parts and place is None):
                parts.append(self.inside.number(form.constant))
            shift = self._sum_of(parts, self.inside) if parts else None
            if place is None or shift is None:
                values[value] = place or shift      # type: ignore[assignment]
            else:
                values[value] = writer.value("add", [place, shift], tile_of(place))
        needed = _behind(self.product.copied, values)
        for op in made:
            if op in needed:
                copy = copy_op(op, values)
                copy.result.type = TileType(tile_of(copy.result).dtype, union_of_axes(copy.operands))
                ops.append(copy)
        dtype = tile_of(self.product.copied).dtype
        if self.product.parted is None:
            image, ends = self.top.buffer(dtype, sizes), sizes
        else:
            image = self._as(self._own_buffer(dtype, sizes, self.image_room), sizes, [[1, len(sizes)]])
            ends = [self._values_of(self._inner(key), here=True) if self.product.parted in dict(key) else size
                    for key, size in zip(names, sizes, strict=True)]
        self._fill(image, list(names.values()), ends, ops, values[self.product.copied])
        return image, low

    def _low(self, key: Sum) -> Value | None:
        """The least value of a sum of axes; None for 0."""
        parts = [self.inside.value("mul", [self.inside.value("sub", [self.ends[axis], self.inside.number(1)]),
                                           self.inside.number(step)]) for axis, step in key if step < 0]
        return self._sum_of(parts, self.inside) if parts else None

    def _outer(self, key: Sum) -> Value | None:
        """What loops around, and where the piece at hand begins, add to a sum of axes."""
        starts = self.counters if self.first is None or self.product.parted is None else {
            **self.counters, self.product.parted: self.first}
        parts = [starts[axis] if step == 1 else self.inside.value("mul", [starts[axis], self.inside.number(step)])
                 for axis, step in key if axis in starts]
        return self._sum_of(parts, self.inside) if parts and self.product.parted is not None else None

    def _of_image(self, writer: Writer, image: Value, sums: dict[Value, Sum], low: dict[Sum, Value | None]) -> Value:
        """What an operand is, of its image."""
        places = []
        for key in dict.fromkeys(sums.values()):
            parts = [writer.places([axis], [self.top.number(0)])[0] for axis, _ in self._inner(key)]
            parts = [part if step == 1 else writer.value("mul", [part, writer.number(step)], tile_of(part))
                     for part, (_, step) in zip(parts, self._inner(key), strict=True)]
            if not parts:
                continue
            place = reduce(lambda left, right: writer.value(
                "add", [left, right], TileType(index, union_of_axes((left, right)))), parts)
            least = low[key]
            places.append(place if least is None else writer.value("sub", [place, least], tile_of(place)))
        return self._read(writer, image, places)

    def _values_of(self, key: Sum, here: bool = False) -> Value:
        """How many values a sum has: none where an axis has none. As the least of that and what bounds it, so that
        memory can be sized by it. here: of the piece at hand."""
        writer = self.inside if here else self.top
        stops = [self.size if axis == self.product.parted and not here else self.ends[axis] for axis, _ in key]
        if len(key) == 1 and key[0][1] in (1, -1):
            return stops[0]
        steps = [abs(step) for _, step in key]
        ends = self._sum_of([writer.value("mul", [stop, writer.number(step)])
                             for stop, step in zip(stops, steps, strict=True)], writer)
        exact = writer.value("sub", [ends, writer.number(sum(steps) - 1)])
        some = writer.value("min", [self._product_of(stops, writer), writer.number(1)])
        values = writer.value("mul", [exact, some])
        return values if self.product.parted in dict(key) else writer.value("min", [values, self._bound(key, ())])

    def _bound(self, key: Sum, without: Collection[str]) -> Value:
        """What a sum has no more values than, for one coordinate of each of some axes."""
        stops = [self.product.bounds[axis][1] for axis, _ in key]
        steps = [abs(step) for _, step in key]
        numbers = [(stop.op.attributes["value"], step) for stop, step in zip(stops, steps, strict=True)
                   if stop.op is not None and stop.op.name == "const"]
        counted, factor = [axis for axis, _ in key], max(steps)
        if len(numbers) == len(stops) - 1:
            (axis, step), = ((axis, abs(step)) for (axis, step), stop in zip(key, stops, strict=True)
                             if stop.op is None or stop.op.name != "const")
            counted, factor = [axis], max(step, 1 + sum(s * (number - 1) for number, s in numbers))
        return self._product_of([*(self.product.bounds[axis][1] for axis in counted if axis not in without),
                                 self.top.number(factor)])

    def _fill(self, buffer: Value, axes: list[str], stops: list[Value], ops: list[Op], value: Value,
              into: Writer | None = None) -> None:
        """A loop that stores a value, which ops make, to all of a buffer."""
        body = Block()
        body.ops = ops
        writer = Writer(ops, self.product.loop)
        writer.op("store", [buffer, value, *writer.places(axes, [self.top.number(0)] * len(axes))])
        writer.op("yield", [])
        loop = self._loop("tiles", stops, body, axes=axes)
        rename_axes(loop, self.taken)
        (into or self.inside).ops.append(loop)

    def _of_copy(self, copy: Value) -> Value:
        """What the product reads of the copy."""
        places = []
        for group in self.product.copy_axes():
            name = self.names.get(group, group[0])
            places.append(self._at(name) if self.product.parted not in group else self.writer.value(
                "index", [], TileType(index, (name,)), axis=name))
        return self._read(self.writer, copy, places)

    @staticmethod
    def _read(writer: Writer, buffer: Value, places: list[Value]) -> Value:
        assert isinstance(buffer.type, TensorType)
        return writer.value("load", [buffer, *places], TileType(buffer.type.dtype, union_of_axes(places)))


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
    well = len(set(axes)) == len(axes) and set(axes) == set(axes_of(value)) and any(len(key) > 1 for key in keys)
    return sums if well else None
