"""Products of matrices that are passed on: a loop that makes them among other things becomes several.

Enters a canonical tile function. Leaves it as it is, or else parallel loops at the top, which have products whose
results or operands other ops of the same rows make, as loops one after the other. So each product is a walk by itself,
which matrix instructions take, and all workers share it. What passes between lies in buffers that all of them see.

    a product              its rows and columns are tiles; with it goes what is made of its elements one by one
    what spans no row      once, before (the squares of centres)
    all the rest           sums, maxima and what is made of these, for the rows, or columns, that they span

Holds: the meaning is the same. A loop stays where loops in order are inside, where a store joins what is in memory, and
where it loads a tensor that it stores to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, pairwise
from math import prod

from ..ir.checker import union_of_axes
from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import DType, TileType, bool_, f32, i32, index
from .affine import affine
from .ops import place_of
from .parts import Writer, copy_op
from .plan import LATE, ORDERED, axes_of
from .sums import is_join

EXTENT_OPS = frozenset({"add", "sub", "mul", "floordiv", "mod", "min", "max"})

Typical = Callable[[Value], int | None]
"""A typical value of an index scalar; None where nothing bounds it before the kernel runs."""

IsProduct = Callable[[Op, Mapping[str, int]], bool]
"""Whether matrix instructions are worth a contraction, by typical extents of axes."""


IsMade = Callable[[Value, str], bool]
"""Whether a product makes an operand itself, on the way to it. Its last axis that is contracted."""


def part_products(function: Function, typical: Typical, is_product: IsProduct, most_bytes: int,
                  is_made: IsMade = lambda value, depth: False) -> None:
    """In place. most_bytes: of buffers, by typical extents."""
    body = function.body
    for op in [op for op in body.ops if op.attributes.get("parallel")]:
        loops = _nest(op, function)
        if loops:
            nest = _Nest(body, loops, typical, is_product, is_made)
            if nest.form() and nest.buffer_bytes() <= most_bytes:
                at = body.ops.index(op)
                body.ops[at:at + 1] = []
                body.ops[at:at] = nest.write({axis for left in function.walk() for axis in axes_brought(left)})


def lift_extents(function: Function) -> None:
    """Have index scalars that are made of dimensions and numbers, as K // 2 is, before the loops that they are in."""
    top = {value for op in function.body.ops for value in op.results}
    for nest in [op for op in function.body.ops if op.blocks]:
        lifted: list[Op] = []
        blocks = list(nest.blocks)
        while blocks:
            block = blocks.pop()
            for op in block.ops:
                blocks += op.blocks
                if op.name in EXTENT_OPS and not axes_of(op.result) and _tile(op.result).dtype is index and (
                        top.issuperset(op.operands)):
                    lifted.append(op)
                    top.add(op.result)
        gone = set(lifted)
        blocks = list(nest.blocks) if lifted else []
        while blocks:
            block = blocks.pop()
            block.ops[:] = [op for op in block.ops if op not in gone]
            blocks += [inner for op in block.ops for inner in op.blocks]
        at = function.body.ops.index(nest)
        function.body.ops[at:at] = lifted


def _nest(top: Op, function: Function) -> list[Op]:
    """The loops of a nest that may be parted, `each` in `each`, the last of them over tiles; none of any other."""
    loops = [top]
    while loops[-1].name == "each":
        inside = [op for op in loops[-1].blocks[0].ops if op.blocks or op.name in (*LATE, "store", "whole")]
        if len(inside) != 1 or not inside[0].attributes.get("parallel"):
            return []
        loops += inside
    ops = list(loops[-1].walk())[1:]
    if any(op.blocks and (op.name != "tiles" or not op.attributes["parallel"]) for op in ops) or any(
            is_join(op) or op.name in (*ORDERED, "buffer", "view") for op in ops):
        return []
    stored = {place_of(op.operands[0]) for op in ops if op.name == "store"}
    loaded = {place_of(op.operands[0]) for op in top.walk() if op.name == "load"}
    return [] if stored & loaded else loops


@dataclass(slots=True, eq=False)
class _Loop:
    """What becomes a loop over tiles of some axes. ops: what no other loop makes. product: what it is of, if it is of
    one."""

    tiled: tuple[str, ...]
    product: Op | None = None
    ops: list[Op] = field(default_factory=list)


class _Nest:
    """A loop nest at the top. ops: what its innermost loop does, also in loops inside. bounds: start and stop of every
    axis. made: the ops of values in the nest. home: the loop that makes a value; every loop may make others again."""

    def __init__(self, body: Block, loops: list[Op], typical: Typical, is_product: IsProduct, is_made: IsMade) -> None:
        *self.eaches, self.tiles = loops
        self.typical, self.is_product, self.is_made = typical, is_product, is_made
        self.bounds: dict[str, tuple[Value, Value]] = {}
        self.ops: list[Op] = []
        self._flatten(self.tiles)
        for op in body.ops:
            if op.name == "whole":
                self.bounds[op.attributes["axis"]] = (op.operands[0], op.operands[1])
        outer = [op for op in body.ops if op.name == "index"]
        outer += [op for each in self.eaches for op in each.blocks[0].ops if not op.blocks]
        self.made = {value: op for op in (*outer, *self.ops) for value in op.results}
        self.loops: list[_Loop] = []
        self.home: dict[Value, _Loop] = {}
        self.placed: set[Op] = set()

    def _flatten(self, loop: Op) -> None:
        for number, axis in enumerate(loop.attributes["axes"]):
            self.bounds[axis] = (loop.operands[2 * number], loop.operands[2 * number + 1])
        for op in loop.blocks[0].ops:
            if op.name == "whole":
                self.bounds[op.attributes["axis"]] = (op.operands[0], op.operands[1])
            elif op.name == "tiles":
                self._flatten(op)
            elif op.name != "yield":
                self.ops.append(op)

    # Which loop does what.

    def form(self) -> bool:
        """Share out the ops. False: there is nothing to part, or it can't be."""
        if any(isinstance(v.type, TileType) and v.type.axes and v not in self.made for op in self.ops
               for v in op.operands):
            return False        # it is made at the top
        ranges = [*self.bounds.values(), *(pair for each in self.eaches for pair in _pairs(each.operands))]
        inner = {argument for each in self.eaches for argument in each.blocks[0].arguments}
        if any(v in self.made or v in inner or self.typical(v) is None for pair in ranges for v in pair):
            return False
        extents = {axis: self._extent(axis) for axis in self.bounds}
        products = {op for op in self.ops if op.name == "contract" and self.is_product(op, extents)}
        self.fixed = self._fixed(products)
        rows = set(self.tiles.attributes["axes"])
        left = [op for op in self.ops if op in self.fixed]
        while left:
            for op in left:
                if op not in products and op.results and axes_of(op.result) and rows.isdisjoint(axes_of(op.result)):
                    self._place([op], _Loop(axes_of(op.result)))
            for op in left:
                if op in products:
                    self._place([op], self._partner(op) or _Loop(axes_of(op.result), op))
            for op in left:
                self._join(op, products)
            rest: dict[tuple[str, ...], _Loop] = {}
            for op in left:
                if op not in products:
                    spanned = union_of_axes([*op.operands, *op.results])
                    tiled = tuple(axis for axis in self.tiles.attributes["axes"] if axis in spanned)
                    self._place([op], rest.setdefault(tiled, _Loop(tiled)))
            before, left = left, [op for op in left if op not in self.placed]
            if len(left) == len(before):
                return False
        if not all(loop.tiled for loop in self.loops):
            return False        # a sum that all elements share spans no axis: its loop would walk none
        return bool(products) and len(self.loops) > 1 and all(
            value.type.dtype is not bool_ for value in self.passed())  # type: ignore[union-attr]

    def _fixed(self, products: set[Op]) -> set[Op]:
        """Ops that one loop does for all: sums and stores, operands of products that are neither read as they lie nor
        made on their way, and what is made of these."""
        begin = {v.op for op in products for v in op.operands
                 if not is_read(v) and not self.is_made(v, op.attributes["over"][-1])}
        fixed: set[Op] = set()
        for op in self.ops:
            if op in begin or op.name in (*LATE, "store") or any(v.op in fixed for v in op.operands):
                fixed.add(op)
        return fixed

    def _place(self, ops: list[Op], loop: _Loop) -> None:
        """Those of the ops, in order, that are not placed, and whose operands are, in no loop after this one, become
        its own."""
        for op in ops:
            if op not in self.placed and all(v.op in self.placed or v.op not in self.fixed for v in op.operands):
                homes = [self.home[v] for v in op.operands if v in self.home]
                if loop in self.loops and any(self.loops.index(home) > self.loops.index(loop) for home in homes):
                    continue
                if loop not in self.loops:
                    self.loops.append(loop)
                loop.ops.append(op)
                self.placed.add(op)
                self.home.update(dict.fromkeys(op.results, loop))

    def _partner(self, op: Op) -> _Loop | None:
        """The loop of the product before, if instructions make both at once: of one matrix on the left, and of narrow
        ones on the right. On the left f32 has room if all lie along what is contracted."""
        loop = self.loops[-1] if self.loops else None
        if loop is None or loop.product is None or len(loop.ops) > 1 or loop.tiled != axes_of(op.result) \
                or loop.product.attributes["over"] != op.attributes["over"]:
            return None
        operands = [*loop.product.operands, *op.operands]
        loads = [v.op for v in operands if v.op is not None and v.op.name == "load"]
        if len(loads) < len(operands) or loads[0].operands != loads[2].operands:
            return None
        left, right, _, other = (_tile(v).dtype for v in operands)
        along = all(op.attributes["over"][-1] in axes_of(load.operands[-1]) for load in loads)
        fits = right is other and right.bits < f32.bits and (left.bits < f32.bits or along)
        return loop if fits else None

    def _join(self, op: Op, products: set[Op]) -> None:
        """What is made of elements of a product, one by one, goes with it: with the last one of those that it needs."""
        homes = [self.home[v] for v in op.operands if v in self.home]
        if homes and op not in products and op.name not in LATE:
            last = max(homes, key=self.loops.index)
            value = op.operands[1] if op.name == "store" else op.result
            if last.product is not None and set(axes_of(value)) == set(last.tiled):
                self._place([op], last)

    def passed(self) -> list[Value]:
        """The values that pass from one loop to another."""
        return list(dict.fromkeys(v for loop in self.loops for op in loop.ops for v in op.operands
                                  if self.home.get(v, loop) is not loop))

    def buffer_bytes(self) -> int:
        counts = prod(self.typical(stop) or 1 for each in self.eaches for _, stop in _pairs(each.operands))
        return sum(counts * _memory_dtype(v).size_bytes * prod(map(self._extent, axes_of(v))) for v in self.passed())

    def _extent(self, axis: str) -> int:
        start, stop = (self.typical(v) or 0 for v in self.bounds[axis])
        return max(1, stop - start)

    # The loops.

    def write(self, taken: set[str]) -> list[Op]:
        """taken: names of axes so far; those of the loops are added."""
        made: list[Op] = []
        top = Writer(made, self.tiles)
        counters = [pair for each in self.eaches for pair in _pairs(each.operands)]
        self.buffers = {}
        for value in self.passed():
            ranges = (*counters, *(self.bounds[axis] for axis in self._order(value)))
            self.buffers[value] = top.buffer(_memory_dtype(value), [
                top.value("sub", [stop, start]) for start, stop in ranges])
        for loop in self.loops:
            made.append(self._write(loop))
            rename_axes(made[-1], taken)
        return made

    def _write(self, loop: _Loop) -> Op:
        """One loop, in `each` loops of its own."""
        values: dict[Value, Value] = {}
        ops: list[Op] = []
        location = loop.ops[0].location
        eaches = []
        for each in self.eaches:
            block = Block([a.type for a in each.blocks[0].arguments])
            for old, new in zip(each.blocks[0].arguments, block.arguments, strict=True):
                new.name, values[old] = old.name, new
            eaches.append(Op("each", list(each.operands), (), dict(each.attributes), [block], each.location))
        for op in self.ops:
            if op in loop.ops:
                for value in op.operands:
                    self._bring(value, loop, values, ops)
                ops.append(copied(op, values))
                for value in op.results:
                    if value in self.buffers:
                        self._keep(value, values, Writer(ops, op))
        spanned = [a for op in ops for a in op.attributes.get("over", ())]
        spanned += [a for op in ops for v in op.operands if isinstance(v.type, TileType) for a in v.type.axes]
        wholes = [Op("whole", list(self.bounds[axis]), (), {"axis": axis}, None, location)
                  for axis in dict.fromkeys(spanned) if axis not in loop.tiled]
        body = Block()
        body.ops = [*wholes, *ops]
        bounds = [v for axis in loop.tiled for v in self.bounds[axis]]
        nest = [*eaches, Op("tiles", bounds, (), {"axes": list(loop.tiled), "parallel": True}, [body], location)]
        for outer, inner in pairwise(nest):
            outer.blocks[0].ops.append(inner)
        for op in nest:
            op.blocks[0].ops.append(Op("yield", [], (), {}, None, location))
        return nest[0]

    def _bring(self, value: Value, loop: _Loop, values: dict[Value, Value], ops: list[Op]) -> None:
        """Have a value of another loop from its buffer, and make one that every loop may make."""
        op = self.made.get(value)
        if op is None or value in values:
            return
        if self.home.get(value, loop) is not loop:
            writer = Writer(ops, op)
            read = writer.value("load", [self.buffers[value], *self._places(value, values, writer)],
                                TileType(_memory_dtype(value), self._order(value)))
            dtype = _tile(value).dtype
            values[value] = read if dtype is _memory_dtype(value) else writer.value("cast", [read], TileType(
                dtype, self._order(value)))
            values[value].name = value.name
            return
        for operand in op.operands:
            self._bring(operand, loop, values, ops)
        ops.append(copied(op, values))

    def _order(self, value: Value) -> tuple[str, ...]:
        """The axes of a value in its buffer: what is made of a product lies as its sums are stored best, what a
        product over several axes reads has its own axis last, but where the other operand lies as it does. Measured on
        a Zen 3, one thread, a line of points at a time, 3 x 3 taps with edges, ms with axes in the order in which they
        come up, so, and PyTorch: 32 channels of 32 x 32 points to 32 5.0, 0.8 and 0.7, 64 to 64 17, 2.8 and 2.2."""
        home, axes = self.home[value], axes_of(value)
        if home.product is not None:
            return home.tiled
        product = next((op for loop in self.loops for op in loop.ops if op.name == "contract" and value in op.operands),
                       None)
        over = [] if product is None else product.attributes["over"]
        if product is None or len(over) < 2:
            return axes
        read = product.operands[value is product.operands[0]].op
        along = read is None or read.name != "load" or axes[-1] in axes_of(read.operands[-1])
        return axes if along else (*over, *(axis for axis in axes if axis not in over))

    def _keep(self, value: Value, values: dict[Value, Value], writer: Writer) -> None:
        kept, dtype = values[value], _memory_dtype(value)
        if _tile(value).dtype is not dtype:
            kept = writer.value("cast", [kept], TileType(dtype, axes_of(kept)))
        writer.op("store", [self.buffers[value], kept, *self._places(value, values, writer)])

    def _places(self, value: Value, values: Mapping[Value, Value], writer: Writer) -> list[Value]:
        """Where a value lies in its buffer."""
        counters = [writer.value("sub", [values[counter], start]) for each in self.eaches
                    for counter, (start, _) in zip(each.blocks[0].arguments, _pairs(each.operands), strict=True)]
        axes = self._order(value)
        return [*counters, *writer.places(axes, [self.bounds[axis][0] for axis in axes])]


def axes_brought(op: Op) -> list[str]:
    """The axes that an op brings."""
    return list(op.attributes["axes"]) if op.name == "tiles" else [op.attributes["axis"]] if op.name == "whole" else []


def rename_axes(loop: Op, taken: set[str]) -> None:
    """Give the axes that a loop brings names that no others have."""
    names = {}
    for axis in (axis for op in loop.walk() for axis in axes_brought(op)):
        names[axis] = next(name for n in count() if (name := f"{axis}_{n}" if n else axis) not in taken)
        taken.add(names[axis])
    for op in loop.walk():
        for key, named in op.attributes.items():
            if key in ("axes", "over"):
                op.attributes[key] = [names.get(axis, axis) for axis in named]
            elif key == "axis":
                op.attributes[key] = names.get(named, named)
        for value in (*op.results, *(v for block in op.blocks for v in block.arguments)):
            if isinstance(value.type, TileType):
                value.type = TileType(value.type.dtype, tuple(names.get(axis, axis) for axis in value.type.axes))


def copied(op: Op, values: dict[Value, Value]) -> Op:
    """An op on other operands, whose axes may come in another order."""
    made = copy_op(op, values)
    if made.name not in ("index", "full"):
        over = op.attributes.get("over", ())
        for value in made.results:
            axes = tuple(axis for axis in union_of_axes(made.operands) if axis not in over)
            value.type = TileType(_tile(value).dtype, axes)
    return made


def _pairs(bounds: list[Value]) -> Iterator[tuple[Value, Value]]:
    """Starts and stops."""
    return zip(bounds[::2], bounds[1::2], strict=True)


def _tile(value: Value) -> TileType:
    assert isinstance(value.type, TileType)
    return value.type


def _memory_dtype(value: Value) -> DType:
    dtype = _tile(value).dtype
    return i32 if dtype is index else dtype


def is_read(value: Value) -> bool:
    """Whether a value is loaded as it lies in a tensor, but for a cast."""
    op = value.op
    if op is not None and op.name == "cast":
        op = op.operands[0].op
    return op is not None and op.name == "load" and all(affine(v) is not None for v in op.operands[1:])
