"""Products that are summed at their places: made first, then summed.

Enters: a canonical tile function. Leaves: where all that loops do is to join the elements of a product with memory that
they meet again and again (a convolution written as a scatter: `y[o, 2 * h + i] += x[c, h] @ w[c, o, i]`), loops before
them that make the product, rows by columns, in memory of the kernel's own, and a load of it in its place. A walk that
joins holds no rows and columns of sums at once. Holds: the meaning is the same; what is read is nowhere stored to.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from ..ir.checker import union_of_axes
from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import TileType, f32
from .ops import place_of
from .parts import Writer
from .plan import LATE, axes_of
from .product_parts import axes_brought, copied, rename_axes
from .sums import is_join
from .zeros import is_zero

Typical = Callable[[Value], int | None]


def part_joined_products(function: Function, typical: Typical, fewest: int, most_bytes: int,
                         takes: Callable[[Op], bool] | None = None) -> None:
    """In place. typical: of an index scalar, None where nothing bounds it before the kernel runs. fewest: the longer of
    rows and columns. most_bytes: of the memory for a product, typically. takes: whether a loop over all axes is taken
    as one product of matrices (as_matrices.py), where only such are to be made."""
    stored = {place_of(op.operands[0]) for op in function.walk() if op.name == "store"}
    top = {value for op in function.body.ops for value in op.results} | set(function.arguments)
    for nest in [op for op in function.body.ops if op.name == "tiles"]:
        found = _found(nest)
        if found is None:
            continue
        loops, block, product = found
        bounds = {axis: (loop.operands[2 * n], loop.operands[2 * n + 1])
                  for loop in loops for n, axis in enumerate(loop.attributes["axes"])}
        wholes = [op for op in block.ops if op.name == "whole"]
        ranges = [*bounds.values(), *((op.operands[0], op.operands[1]) for op in wholes)]
        if any(v not in top or typical(v) is None for pair in ranges for v in pair):
            continue
        extents = {axis: max(1, (typical(stop) or 0) - (typical(start) or 0)) for axis, (start, stop) in bounds.items()}
        if set(bounds) != set(axes_of(product.result)) or {*product.attributes["over"]} != {
                op.attributes["axis"] for op in wholes}:
            continue
        ops = _behind(product, top)
        pair = _rows_and_columns(product, extents)
        if pair is None or max(extents[axis] for axis in pair) < fewest:
            continue
        if f32.size_bytes * prod(extents.values()) > most_bytes or any(
                op.name == "load" and place_of(op.operands[0]) in stored for op in ops):
            continue
        order = None if takes is None else _order(product, pair[1])
        if order is not None and not all(is_zero(start) for start, _ in bounds.values()):
            continue
        if takes is None or (order is not None and sorted(order) == sorted(bounds)):
            _part(function, nest, block, product, ops, wholes, bounds, pair, order, takes)


def _order(product: Op, columns: str) -> list[str] | None:
    """The axes of a product so that those of each operand that follow each other in memory do so in the result: rows
    before columns, behind what the columns' operand has beside."""
    over = product.attributes["over"]
    left, right = product.operands if columns in axes_of(product.operands[1]) else product.operands[::-1]
    places: list[list[str]] = []
    for value in (left, right):
        assert value.op is not None
        found = [axes_of(place) for place in value.op.operands[1:]]
        if any(len(axes) != 1 for axes in found):
            return None
        places.append([axis for axes in found for axis in axes])
    end = len(places[1])
    while end and places[1][end - 1] not in over:
        end -= 1
    outer = [axis for axis in places[1][:end] if axis not in over]
    return [*outer, *(axis for axis in places[0] if axis not in over and axis not in outer), *places[1][end:]]


def _found(nest: Op) -> tuple[list[Op], Block, Op] | None:
    """The loops over tiles, one in the other, the innermost one's block, and the product whose elements it joins."""
    loops = [nest]
    while True:
        block = loops[-1].blocks[0]
        inside = [op for op in block.ops if op.blocks]
        if not inside:
            break
        if len(inside) > 1 or inside[0].name != "tiles" or any(op.name in ("store", "load", *LATE) for op in block.ops):
            return None
        loops += inside
    products = [op for op in block.ops if op.name in LATE]
    stores = [op for op in block.ops if op.name == "store"]
    if not any("repeats" in loop.attributes for loop in loops) or len(products) != 1 or (
            products[0].name != "contract" or not stores or not all(map(is_join, stores))):
        return None
    result = products[0].result.type
    return (loops, block, products[0]) if isinstance(result, TileType) and result.dtype is f32 else None


def _behind(product: Op, top: set[Value]) -> list[Op]:
    """The ops in a nest that compute the operands of a product, in order, each after what it needs."""
    found: dict[Op, None] = {}

    def visit(value: Value) -> None:
        op = value.op
        if op is not None and value not in top and op not in found:
            for operand in op.operands[op.name == "load":]:
                visit(operand)
            found[op] = None

    for value in product.operands:
        visit(value)
    return list(found)


def _rows_and_columns(product: Op, extents: dict[str, int]) -> tuple[str, str] | None:
    """The longest axis of one operand and the axis of the other along which that lies in memory, where one does."""
    over = set(product.attributes["over"])
    for value, other in (product.operands, product.operands[::-1]):
        op = value.op
        columns = [axis for axis in axes_of(op.operands[-1]) if axis not in over] if (
            op is not None and op.name == "load" and len(op.operands) > 1) else []
        rows = [axis for axis in axes_of(other) if axis not in over]
        if len(columns) == 1 and rows and columns[0] not in rows:
            return max(rows, key=lambda axis: extents[axis]), columns[0]
    return None


def _part(function: Function, nest: Op, block: Block, product: Op, ops: list[Op], wholes: list[Op],
          bounds: dict[str, tuple[Value, Value]], pair: tuple[str, str], order: list[str] | None,
          takes: Callable[[Op], bool] | None) -> None:
    """order: of the axes, all of one loop over tiles, if that is taken as it is."""
    made: list[Op] = []
    top = Writer(made, product)
    axes = order or [axis for axis in bounds if axis != pair[1]] + [pair[1]]
    buffer = top.buffer(f32, [bounds[axis][1] if order else top.value("sub", [bounds[axis][1], bounds[axis][0]])
                              for axis in axes])
    others = [] if order else [axis for axis in axes if axis not in pair]
    around = Block([top.number(0).type] * len(others))
    made.pop()
    counters = dict(zip(others, around.arguments, strict=True))
    for axis, counter in counters.items():
        counter.name = axis
    body = Block()
    used = {axis for op in ops for axis in axes_of(op.result)}
    body.ops += [Op("whole", op.operands, (), dict(op.attributes), None, op.location)
                 for op in wholes if op.attributes["axis"] in used]
    values: dict[Value, Value] = {}
    for op in ops:
        if op.name == "index" and op.attributes["axis"] in counters:
            values[op.result] = counters[op.attributes["axis"]]
        else:
            body.ops.append(copied(op, values))
    body.ops.append(copied(product, values))
    writer = Writer(body.ops, product)
    places = [writer.value("sub", [counters[axis], bounds[axis][0]]) if axis in counters
              else writer.places([axis], [bounds[axis][0]])[0] for axis in axes]
    writer.op("store", [buffer, values[product.result], *places])
    writer.op("yield", [])
    tiled = order or list(pair)
    loop = Op("tiles", [v for axis in tiled for v in bounds[axis]], [], {"axes": tiled, "parallel": True}, [body],
              product.location)
    if takes is not None and not takes(loop):
        return
    rename_axes(loop, {axis for op in function.walk() for axis in axes_brought(op)})
    if others:
        around.ops += [loop, Op("yield", [], [], {}, None, product.location)]
        loop = Op("each", [v for axis in others for v in bounds[axis]], [], {"count": len(others), "parallel": True},
                  [around], product.location)
    at = function.body.ops.index(nest)
    function.body.ops[at:at] = [*made, loop]
    read: list[Op] = []
    reader = Writer(read, product)
    value = reader.value("load", [buffer, *reader.places(axes, [bounds[axis][0] for axis in axes])],
                         TileType(f32, tuple(axes)))
    value.name = product.result.name
    at = block.ops.index(product)
    block.ops[at:at + 1] = read
    changed = {product.result}
    for op in block.ops:
        if changed.intersection(op.operands):       # its axes come in another order
            op.operands = [value if v is product.result else v for v in op.operands]
            for result in op.results:
                assert isinstance(result.type, TileType)
                result.type = TileType(result.type.dtype, union_of_axes(op.operands))
                changed.add(result)
    gone = {*ops, *wholes}
    needed: set[Value] = set()
    for op in reversed(list(block.ops)):
        if op in gone and not any(v in needed for v in op.results) and (
                op.name != "whole" or op.attributes["axis"] not in {
                    o.attributes["axis"] for o in block.ops if o.name == "index"}):
            block.ops.remove(op)
        else:
            needed.update(op.operands)
