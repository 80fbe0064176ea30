"""Long sums at places that may be met again all along a loop, in copies that workers share out.

Enters: a loop in turn at the top of a function, whose stores join (sums.py). Leaves: where what it adds to is far
smaller than the loop is long, parts of the loop that add to copies of their own, and a loop that adds up the copies.
Axes in a part have the names that they have in the loop. Holds: the meaning is the same, save that a sum may round
otherwise; the parts depend on extents alone, so that the result is the same for any number of workers.

    for i in start .. stop: out[x[i]] += y[i]

becomes, with as many copies as there are values enough for, or none:

    for c in copies, parallel:     copy[c] = 0; for i in a part of start .. stop: copy[c, x[i]] += y[i]
    for i in start .. stop:        out[x[i]] += y[i], if there are no copies
    for v in out, parallel:        out[v] += sum of copy[c, v] over c, if there are
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import Dim, DType, TensorType, TileType, f32, f64, i32, i64, index
from .parts import INDEX, Writer, copy_op

COPIES = 8
"""Most copies: of two workers each has some left when the other is late."""
TERMS_PER_ELEMENT = 8
"""Values that a copy gets for each of its elements at least: it is cleared and added up by vectors."""
MOST_ELEMENTS, FEWEST_TERMS = 4096, 16384
"""Typical elements of what is copied at most, which bounds memory, and values that are added at least: ten
microseconds' work."""
COPIED: dict[DType, float | int] = {f32: 0.0, f64: 0.0, i32: 0, i64: 0}
"""Element types that are copied, and what a copy begins with."""


def add_copies(function: Function, loop: Op, typical: Callable[[Value], int]) -> None:
    """In place. typical: of an index scalar."""
    stores = [op for op in loop.walk() if "join" in op.attributes]
    out = stores[0].operands[0]
    type = out.type
    assert isinstance(type, TensorType)
    if type.dtype not in COPIED or out.op is not None or any(
            store.attributes["join"] != "add" or store.operands[0] is not out for store in stores):
        return
    ops: list[Op] = []
    top = Writer(ops, loop)

    def extent_of(dim: Dim) -> Value:
        if isinstance(dim, tuple):
            op, left, right = dim
            return top.value(op, [extent_of(left), extent_of(right)])
        return top.value("dim", [], name=dim) if isinstance(dim, str) else top.number(dim)

    extents = [extent_of(dim) for dim in type.dims]
    bounds = [loop.operands[n:n + 2] for n in range(0, len(loop.operands), 2)]
    if prod(typical(stop) for _, stop in bounds) < FEWEST_TERMS or prod(map(typical, extents)) > MOST_ELEMENTS:
        return
    zero, one = top.number(0), top.number(1)

    def product(values: list[Value], first: Value) -> Value:
        for value in values:
            first = top.value("mul", [first, value])
        return first

    lengths = [top.value("max", [top.value("sub", [stop, start]), zero]) for start, stop in bounds]
    fewest = top.value("max", [product(extents, top.number(TERMS_PER_ELEMENT)), one])
    worth = top.value("floordiv", [product(lengths[1:], lengths[0]), fewest])
    several = top.value("min", [top.value("floordiv", [worth, top.number(2)]), one])
    copies = top.value("min", [top.value("mul", [worth, several]), top.number(COPIES)])
    copy = top.buffer(type.dtype, [top.number(COPIES), *extents])
    rounded = top.value("sub", [top.value("add", [lengths[0], copies]), one])
    size = top.value("floordiv", [rounded, top.value("max", [copies, one])])
    *axes, number_axis = _fresh(function, [*(f"{out.name}_{n}" for n in range(len(extents))), "copy"])

    def elements(extents: list[Value], into: Writer) -> tuple[Writer, list[Value]]:
        """A loop over elements, and their coordinates in it."""
        block = Block()
        into.op("tiles", [v for extent in extents for v in (zero, extent)], [], [block], axes=axes, parallel=True)
        inner = Writer(block.ops, loop)
        return inner, [inner.value("index", [], TileType(index, (axis,)), axis=axis) for axis in axes]

    block = Block([INDEX])
    part, number = Writer(block.ops, loop), block.arguments[0]
    clear, at = elements(extents, part)
    empty = clear.value("const", [], TileType(type.dtype), value=COPIED[type.dtype])
    clear.op("store", [copy, empty, number, *at])
    clear.op("yield", [])
    start, stop = bounds[0]
    first = part.value("add", [start, part.value("mul", [number, size])])
    last = part.value("min", [stop, part.value("add", [first, size])])
    made = copy_op(loop, {out: copy})
    made.operands[:2] = [first, last]
    for store in made.walk():
        if "join" in store.attributes:
            store.operands.insert(2, number)
    block.ops.append(made)
    part.op("yield", [])
    top.op("each", [zero, copies], [], [block], count=1, parallel=True)

    any_copies = top.value("min", [copies, one])
    loop.operands[0] = top.value("add", [start, top.value("mul", [lengths[0], any_copies])])
    ops.append(loop)
    merge, at = elements([top.value("mul", [extents[0], any_copies]), *extents[1:]], top)
    merge.op("whole", [zero, copies], axis=number_axis)
    which = merge.value("index", [], TileType(index, (number_axis,)), axis=number_axis)
    spread = TileType(type.dtype, (number_axis, *axes))
    total = merge.value("reduce", [merge.value("load", [copy, which, *at], spread)],
                        TileType(type.dtype, tuple(axes)), kind="sum", over=[number_axis])
    before = merge.value("load", [out, *at], TileType(type.dtype, tuple(axes)))
    merge.op("store", [out, merge.value("add", [before, total], TileType(type.dtype, tuple(axes))), *at])
    merge.op("yield", [])
    place = function.body.ops.index(loop)
    function.body.ops[place:place + 1] = ops


def _fresh(function: Function, names: list[str]) -> list[str]:
    """The names, as axes that the function has not."""
    taken = {axis for op in function.walk() for axis in (*op.attributes.get("axes", ()), op.attributes.get("axis", ""))}
    return [next(n for n in (name, *(f"{name}_{k}" for k in range(len(taken)))) if n not in taken) for name in names]
