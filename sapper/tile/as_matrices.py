"""Products over several axes, as products of matrices.

Enters: a canonical tile function. Leaves: in place of a parallel loop over tiles that has one product, of rows or
columns or a depth of several axes, as a convolution's of channels and the places of a window, one of a matrix by a
matrix, each of whose rows, columns and depth are a single axis: axes that follow each other in memory are taken as one,
by views. What does not lie so, patches of an image, or only every other point, is copied first, by a loop of its own;
an image whose edges are cut off by `where` and clamped indices, once more before that, with its edges.
Other axes, as images of a batch, are loops around, as those over indices are that are so already: then each worker
copies for itself, some lines at a time, what it multiplies at once, so that copies stay in the caches and take so much
memory whatever the extents are. So the product can be staged as any of two matrices.

    for b, o, p, q in tiles(B, O, P, Q):                                 for b, t in each(B, P / lines):
        y[b, o, p, q] = w[o, c, i, j] @ x[b, c, 2 * p + i, 2 * q + j]        d[c, i, j, p, q] = x, of some lines
                                                                             for o, r in tiles(O, lines * Q):
                                                                                 y[b, o, r] = w[o, k] @ d[k, r]

Where the depth lies as one axis in neither operand, as that of a gradient does: if the last part of it does in one
(points of images, for the weights), a loop in order over the rest adds up products; else what is a matrix but for the
order of its axes is turned first (weights, for the input).

Holds: the meaning is the same, but for the order of sums.

Measured on a Zen 3, one thread: docs/choices/nests.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import reduce
from itertools import count, pairwise
from math import prod

from ..ir.checker import union_of_axes
from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import DType, TensorType, TileType, index
from .affine import affine
from .ops import load_of, place_of
from .parts import INDEX, Writer, copy_op
from .plan import LATE, axes_of
from .product_parts import Typical, axes_brought, copied, rename_axes
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

WELL_READ_ROWS = 48
"""How many rows meet patches of neighbouring points at least for these to be copied: they are read as well where they
lie. Measured on a Zen 3, one thread, windows of 3 x 3, times the speed where they are read in place: 32 channels of
56 x 56 points to 32 0.95, 64 to 48 1.05, 64 to 64, 8 images, 1.06, 96 of 28 x 28 to 96 1.7, 128 to 128 1.4, 3 x 3 x 3
of 32 channels of 8 x 28 x 28 to 32 1.4."""

PIECE_COLUMNS, MULTIPLE = 128, 64
"""Rows or columns of a piece of the copy at least: all of the other operand is read for each. What a piece of a line is
a multiple of."""

MOST_WHOLE = 16
"""Pieces up to which one image is copied as a whole, or are several of few points each, so that workers share rows of
the product, too: of 8 images of 7 x 7 points, 512 channels, two that have an image each, and so all rows, take 1.2
times as long."""

_REFUSED = frozenset({"asm", "buffer", "view", "part"})


def multiply_as_matrices(function: Function, typical: Typical, is_contiguous: Callable[[Value], bool], fewest: int,
                         piece_bytes: int) -> None:
    """In place. typical: of an index scalar, None where nothing bounds it before the kernel runs. is_contiguous:
    whether a tensor is known to lie in C order. fewest: rows and columns from which on it is worth it, typically.
    piece_bytes: of a copy that a worker makes for itself, about."""
    for nest in [op for op in function.body.ops if op.attributes.get("parallel")]:
        loops = _nest(nest)
        found = _Finder(function, loops, typical, is_contiguous, fewest).product() if loops else None
        if found is not None:
            found.part(typical, piece_bytes)
            taken = {axis for op in function.walk() for axis in axes_brought(op)}
            at = function.body.ops.index(nest)
            function.body.ops[at:at + 1] = _Writer(found, taken, piece_bytes).write()


def is_matrices(function: Function, loop: Op, typical: Typical, is_contiguous: Callable[[Value], bool],
                fewest: int) -> bool:
    """Whether a loop that is not yet in a function becomes a product of matrices."""
    return _Finder(function, [loop], typical, is_contiguous, fewest).product() is not None


def _nest(top: Op) -> list[Op]:
    """A loop over tiles, behind those over indices that do nothing but it; none of any other."""
    loops = [top]
    while loops[-1].name == "each":
        inside = [op for op in loops[-1].blocks[0].ops if op.blocks]
        beside = [op for op in loops[-1].blocks[0].ops if not op.blocks and op.name != "yield"]
        if loops[-1].results or loops[-1].attributes.get("step", 1) != 1 or loops[-1].attributes.get("pieces") or (
                len(inside) != 1 or not inside[0].attributes.get("parallel")) or any(
                op.name in ("load", "store", "whole", *LATE, *_REFUSED) for op in beside):
            return []
        loops += inside
    return loops if loops[-1].name == "tiles" else []


@dataclass(slots=True)
class _Product:
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

        size_bytes = _tile(self.copied).dtype.size_bytes
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


class _Finder:
    """Looks at one loop."""

    def __init__(self, function: Function, loops: list[Op], typical: Typical, is_contiguous: Callable[[Value], bool],
                 fewest: int) -> None:
        *self.around, self.loop = loops
        self.typical, self.is_contiguous, self.fewest = typical, is_contiguous, fewest
        self.counters: dict[Value, str] = {}
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
        axes = list(map(self._axis, stores[0].operands[2:]))
        if sorted(axis or "" for axis in axes) != sorted([*self.loop.attributes["axes"], *self.counters.values()]):
            return None
        outer, rows, columns = _sides([axis for axis in axes if axis], contract)
        self.stored_outer = outer
        if not rows or not columns:
            return None
        left, right = contract.operands if rows[0] in axes_of(contract.operands[0]) else contract.operands[::-1]
        over = contract.attributes["over"]
        if not all(set(over) <= set(axes_of(value)) for value in (left, right)):
            return None
        depths = self._depth(left, rows, over), self._depth(right, columns, over)
        turned, ordered = None, ()
        if not (depths[0] or depths[1]) and self._only_stores(contract, stores):
            depths = self._last_depth(left, rows, over), self._last_depth(right, columns, over)
            depths = depths if not (depths[0] and depths[1]) else (None, None)
            ordered = tuple(axis for axis in over if axis not in (depths[0] or depths[1] or over))
        if not (depths[0] or depths[1]):
            turned = self._turned(left, right)
        depth = depths[0] or depths[1] or tuple(over)
        few = min(map(self._extent, (rows, columns))) < self.fewest or self._extent(depth) < LEAST_DEPTH
        if few or not (depths[0] or depths[1] or turned):
            return None
        found = _Product(self.loop, self.ops, contract, self.sums, self.counters, self.bounds, rows, columns, depth,
                         outer)
        if turned is not None or depths[0] != depths[1]:
            found.copied = (right if turned is left else left) if turned is not None else right if depths[0] else left
            found.turned, found.runs, found.ordered = turned, self._runs(turned, found), ordered
            well = found.copied is right and _goes_along(right, columns[-1])
            if not self._may_move(found) or (well and self._extent(rows) < WELL_READ_ROWS):
                return None
        groups = [group for group in (rows, columns, depth) if len(group) > 1]
        after = found.behind([v for op in stores for v in op.operands], through=False)
        changes = groups or found.copied is not None or not set(outer) <= set(self.counters.values())
        return found if changes and all(self._fits(op, groups) for op in (*after, *stores)) else None

    def _axis(self, place: Value) -> str | None:
        """The axis whose coordinate an index is, or the counter that is taken as one."""
        return self.counters.get(place) or _axis(place)

    def _turned(self, left: Value, right: Value) -> Value | None:
        """The operand that is a matrix but for the order of its axes, where the other one is none."""
        plain = [value for value in (left, right) if self._is_plain(value)]
        return plain[0] if len(plain) == 1 and set(axes_of(plain[0])).isdisjoint(self.stored_outer) else None

    def _runs(self, turned: Value | None, found: _Product) -> list[Group]:
        """The axes of a copy of the other operand in order, neighbours that are so there, too, together."""
        load = None if turned is None else load_of(turned)
        if load is None:
            return []
        own = list(map(_axis, load.operands[1:]))
        axes = [*found.rows, *found.depth] if found.is_right else [*found.depth, *found.columns]
        runs: list[Group] = []
        for axis in axes:
            if runs and (runs[-1][-1], axis) in pairwise(own):
                runs[-1] = (*runs[-1], axis)
            else:
                runs.append((axis,))
        return runs if self._fits(load, [run for run in runs if len(run) > 1]) else [(axis,) for axis in axes]

    def _is_plain(self, value: Value) -> bool:
        load = load_of(value)
        return load is not None and load.operands[0] not in self.stored and all(
            _axis(place) is not None for place in load.operands[1:])

    def _look(self) -> bool:
        """Take note of what the loop does, in order, where loops that add products up are sums, and of bounds; whether
        there is nothing else in it."""
        for number, op in enumerate(self.around):
            for place, counter in enumerate(op.blocks[0].arguments):
                axis = self.counters[counter] = f"{counter.name or 'i'}.{number}.{place}"   # like none that is written
                self.bounds[axis] = op.operands[2 * place], op.operands[2 * place + 1]
            self.ops += [inner for inner in op.blocks[0].ops if not inner.blocks and inner.name != "yield"]
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

    def _last_depth(self, value: Value, group: Group, over: Collection[str]) -> Group | None:
        """The last of the axes that are contracted, in the order in which an operand has them, if these are many
        elements that follow each other in memory, and others are not among them."""
        load = load_of(value)
        own = [] if load is None else list(map(_axis, load.operands[1:]))
        end = len(own)
        while end and own[end - 1] in over:
            end -= 1
        depth = tuple(axis for axis in own[end:] if axis)
        if load is None or not depth or len(depth) == len(over) or self._extent(depth) < PIECE_COLUMNS:
            return None
        return depth if self._fits(load, [axes for axes in (group, depth) if len(axes) > 1]) else None

    @staticmethod
    def _only_stores(contract: Op, stores: list[Op]) -> bool:
        """Whether nothing is done with a product but to store it, as it is."""
        (store, *others), type = stores, stores[0].operands[0].type
        return not others and store.operands[1] is contract.result and isinstance(type, TensorType) and (
            type.dtype is _tile(contract.result).dtype and type.dtype.name in ("f32", "i32"))

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
            extents = dims if tensor.op is None or tensor.op.name != "buffer" else tensor.op.operands
            if found != group or not all(map(self._is_whole, group, extents[at:at + len(group)])):
                return False
            at, merges = at + len(group), True
        if tensor.op is not None and tensor.op.name == "buffer":
            return True
        return not merges or (tensor.op is None and self.is_contiguous(tensor) and not any(
            isinstance(dim, tuple) for dim in dims))

    def _is_whole(self, axis: str, dim: object) -> bool:
        """Whether an axis is all of a dimension."""
        if dim is self.bounds[axis][1]:
            return True
        stop = self.bounds[axis][1].op
        return stop is not None and dim == (stop.attributes.get("name") if stop.name == "dim" else
                                            stop.attributes.get("value") if stop.name == "const" else None)

    def _may_move(self, found: _Product) -> bool:
        """Whether the operand that is copied may be made before the loop."""
        values = [value for value in (found.copied, found.turned) if value is not None]
        return all(op.name != "load" or place_of(op.operands[0]) not in self.stored
                   for op in found.behind(values, through=True))


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
    well = len(set(axes)) == len(axes) and set(axes) == set(axes_of(value)) and any(len(key) > 1 for key in keys)
    return sums if well else None


class _Writer:
    """Writes a product of matrices. made: what comes before its loop. around: what that is in, if anything; counters:
    of outer axes, of it; first: where the piece at hand begins, along the axis that is parted, and ends: where axes
    end, this one from there on. names, extents: of groups as axes. values: what stands for values of the loop as it
    was."""

    def __init__(self, product: _Product, taken: set[str], piece_bytes: int) -> None:
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
        elements = top.number(piece_bytes // _tile(product.copied).dtype.size_bytes)
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
                type = TileType(_tile(op.result).dtype, tuple(a for a in union_of_axes(operands) if a != depth))
                self.values[op.result] = self.writer.value("contract", operands, type, over=[depth])
            elif op.name == "load":
                self.values[op.result] = self._loaded(op.result)
            elif op.name == "store":
                tensor, places = self._place_of(op.operands[0], op.operands[2:])
                value = self.values.get(op.operands[1], op.operands[1])
                if product.ordered:
                    self._clear(tensor, places, _tile(value).dtype)
                    before = self._read(self.writer, tensor, places)
                    value = self.writer.value("add", [before, value], _tile(before))
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
        dtype = _tile(product.copied).dtype
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
        own = [_axis(place) or "" for place in load.operands[1:]]
        runs = product.runs
        names = {run: "_".join(run) for run in runs}
        ops: list[Op] = []
        writer = Writer(ops, product.loop)
        ends = [self._product_of([product.bounds[axis][1] for axis in run]) for run in runs]
        places = dict(zip(runs, writer.places(list(names.values()), [self.top.number(0)] * len(runs)), strict=True))
        there = sorted(runs, key=lambda run: own.index(run[0]))
        source = self._view(load.operands[0], tuple(map(len, there)))
        read = self._read(writer, source, [places[run] for run in there])
        buffer = self.top.buffer(_tile(load.result).dtype, sizes)
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
                    values[op.result] = writer.value("add", [at, self.first], _tile(at))
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
                values[value] = writer.value("add", [place, shift], _tile(place))
        needed = _behind(self.product.copied, values)
        for op in made:
            if op in needed:
                copy = copy_op(op, values)
                copy.result.type = TileType(_tile(copy.result).dtype, union_of_axes(copy.operands))
                ops.append(copy)
        dtype = _tile(self.product.copied).dtype
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
            parts = [part if step == 1 else writer.value("mul", [part, writer.number(step)], _tile(part))
                     for part, (_, step) in zip(parts, self._inner(key), strict=True)]
            if not parts:
                continue
            place = reduce(lambda left, right: writer.value(
                "add", [left, right], TileType(index, union_of_axes((left, right)))), parts)
            least = low[key]
            places.append(place if least is None else writer.value("sub", [place, least], _tile(place)))
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
