"""Long sums of few elements, shared among many workers.

Enters a canonical tile function. Leaves it as it is, or else parallel loops at the top, which reduce a long range for
so few elements that most workers would have none of them, as two loops: each worker reduces a piece of the range for
some elements, and then the pieces of an element are reduced.

    for n in tiles(N):                      for piece in each(count):
        m = whole(M)                            for n in tiles(N):
        dw[n] = sum(x[m, n], over=m)                m = whole(span(first of the piece, first of the next))
                                                    pieces[piece, n] = sum(x[m, n], over=m)
                                            for n in tiles(N):
                                                p = whole(count)
                                                dw[n] = sum(pieces[p, n], over=p)

Holds: the meaning is the same, save that a sum may round differently; where a piece ends depends on extents alone. A
loop stays where something else than a reduction spans the range, where loops are inside, and where a store joins what
is in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import TileType, bf16, f16, f32, i32, index
from .affine import affine
from .ops import place_of
from .parts import INDEX, Writer, copy_op
from .plan import LATE, axes_of
from .product_parts import axes_brought, rename_axes
from .sums import is_join

PIECES = 256
"""Of a range at most: reducing so many takes a worker some ten microseconds."""

ROWS, COLUMNS = (32, 1), (4096, 1024)
"""The least that a piece has of a range, and what it has a multiple of: of rows, and of what is contiguous in memory,
which a warp walks some hundred elements at once."""

LONG = 8
"""From how many of the shortest pieces on a range is long."""

TASK_COLUMNS = 128
"""Elements that a worker takes along an axis that is contiguous in memory; of another one it has single rows."""

KINDS = ("sum", "max", "min")

Typical = Callable[[Value], int]
"""A typical value of an index scalar."""


def share_long_sums(function: Function, typical: Typical, workers: int) -> None:
    """In place. workers: how many there should be work for."""
    body = function.body
    top = {value for op in body.ops for value in op.results}
    for op in [op for op in body.ops if op.name == "tiles" and op.attributes["parallel"]]:
        over = _range_of(op, top)
        if over is None:
            continue
        bounds = dict(zip(op.attributes["axes"], zip(op.operands[::2], op.operands[1::2], strict=True), strict=True))
        extents = {axis: typical(stop) - typical(start) for axis, (start, stop) in bounds.items()}
        tasks = prod(-(-extent // (TASK_COLUMNS if _is_contiguous(op, axis) else 1))
                     for axis, extent in extents.items())
        piece = COLUMNS if _is_contiguous(op, over.attributes["axis"]) else ROWS
        if 2 * tasks <= workers and typical(over.operands[1]) - typical(over.operands[0]) >= LONG * piece[0]:
            at = body.ops.index(op)
            taken = {axis for inner in function.walk() for axis in axes_brought(inner)}
            body.ops[at:at + 1] = _shared(op, over, -(-workers // tasks), piece, taken)


def _range_of(loop: Op, top: set[Value]) -> Op | None:
    """The `whole` over which all reductions of a loop go; None where it stays."""
    block = loop.blocks[0]
    late = [op for op in block.ops if op.name in LATE]
    wholes = [op for op in block.ops if op.name == "whole"]
    if not late or len(wholes) != 1 or any(op.blocks or is_join(op) or op.name == "view" for op in block.ops):
        return None
    axis = wholes[0].attributes["axis"]
    if any(op.name not in ("reduce", "contract") or op.attributes["over"] != [axis]
           or op.attributes.get("kind", "sum") not in KINDS or set(axes_of(op.result)) != set(loop.attributes["axes"])
           or (op.name == "contract" and len(axes_of(op.result)) > 1) for op in late):
        return None
    behind: set[Op] = set()
    for op in late:
        made = _behind(op, block)
        if not behind.isdisjoint(late) or not made.isdisjoint(late):
            return None
        behind |= made
    rest = [op for op in block.ops if op not in behind and op not in late]
    if any(axis in axes_of(value) for op in rest for value in (*op.operands, *op.results)
           if isinstance(value.type, TileType)):
        return None
    stored = {place_of(op.operands[0]) for op in rest if op.name == "store"}
    loaded = {place_of(op.operands[0]) for op in behind if op.name == "load"}
    if stored & loaded:
        return None
    return wholes[0] if all(_at_top(v, block, top) for v in wholes[0].operands) else None


def _at_top(value: Value, block: Block, top: set[Value]) -> bool:
    """Whether an index scalar is made of what is there before the loop, and of numbers."""
    return value in top or value.op is None or (
        value.op in block.ops and not axes_of(value) and value.op.name != "load"
        and all(_at_top(v, block, top) for v in value.op.operands))


def _behind(op: Op, block: Block) -> set[Op]:
    """The ops of a block from whose results another one is made."""
    found: set[Op] = set()
    stack = list(op.operands)
    while stack:
        source = stack.pop().op
        if source is not None and source in block.ops and source not in found:
            found.add(source)
            stack += source.operands
    return found


def _is_contiguous(loop: Op, axis: str) -> bool:
    """Whether loads of most axes go along one of them in the last dimension of their tensors."""
    loads = [op for op in loop.walk() if op.name == "load" and len(op.operands) > 1]
    most = max((len(axes_of(op.result)) for op in loads), default=0)
    forms = [affine(op.operands[-1]) for op in loads if len(axes_of(op.result)) == most]
    return any(form is not None and form.axes.get(axis) == 1 for form in forms)


def _shared(loop: Op, over: Op, wanted: int, piece: tuple[int, int], taken: set[str]) -> list[Op]:
    """The two loops, and what stands before them. wanted: how many pieces there should be. piece: ROWS or COLUMNS."""
    made: list[Op] = []
    top = Writer(made, loop)
    block, axes = loop.blocks[0], loop.attributes["axes"]
    late = [op for op in block.ops if op.name in LATE]
    outside: dict[Value, Value] = {}
    for op in sorted(_behind(over, block), key=block.ops.index):
        made.append(copy_op(op, outside))
    start, stop = (outside.get(v, v) for v in over.operands)
    zero, extent = top.number(0), top.value("sub", [stop, start])
    parts = top.value("max", [top.value("min", [top.number(min(PIECES, wanted)), top.value(
        "floordiv", [extent, top.number(piece[0])])]), top.number(1)])
    granules = top.value("mul", [parts, top.number(piece[1])])
    rounded = top.value("sub", [top.value("add", [extent, granules]), top.number(1)])
    size = top.value("mul", [top.value("floordiv", [rounded, granules]), top.number(piece[1])])
    bounds = list(zip(loop.operands[::2], loop.operands[1::2], strict=True))
    extents = [top.value("sub", [last, first]) for first, last in bounds]
    starts = [first for first, _ in bounds]

    # Each worker reduces pieces of the range.
    each = Op("each", [zero, parts], (), {"count": 1, "parallel": True}, [Block([INDEX])], loop.location)
    number = each.blocks[0].arguments[0]
    tiles = Op("tiles", list(loop.operands), (), {"axes": list(axes), "parallel": True}, [Block()], loop.location)
    inner = Writer(tiles.blocks[0].ops, loop)
    first = inner.value("min", [inner.value("mul", [number, size]), extent])
    last = inner.value("min", [inner.value("add", [first, size]), extent])
    inner.op("whole", [inner.value("add", [start, first]), inner.value("add", [start, last])],
             axis=over.attributes["axis"])
    values: dict[Value, Value] = {}
    needed = set[Op]().union(*(_behind(op, block) for op in late))
    for op in block.ops:
        if op in needed and op is not over:
            inner.ops.append(copy_op(op, values))
    kept: dict[Op, Value] = {}
    memories: dict[Op, Value] = {}
    for op in late:
        operands = [values.get(v, v) for v in op.operands]
        dtype = op.result.type.dtype  # type: ignore[union-attr]
        if dtype in (bf16, f16):
            operands = [inner.value("cast", [v], TileType(f32, axes_of(v))) for v in operands]
            dtype = f32
        kept[op] = inner.value(op.name, operands, TileType(dtype, axes_of(op.result)), **op.attributes)
    for op, value in kept.items():
        memory = memories[op] = top.buffer(i32 if value.type.dtype is index else value.type.dtype,  # type: ignore[union-attr]
                                           [top.number(PIECES), *extents])
        inner.op("store", [memory, value, number, *inner.places(axes, starts)])
    inner.op("yield", [])
    each.blocks[0].ops += [tiles, Op("yield", [], (), {}, None, loop.location)]
    rename_axes(each, taken)
    made.append(each)

    # And then the pieces.
    final = Op("tiles", list(loop.operands), (), dict(loop.attributes), [Block()], loop.location)
    writer = Writer(final.blocks[0].ops, loop)
    pieces = f"{over.attributes['axis']}_piece"
    writer.op("whole", [zero, parts], axis=pieces)
    values = {}
    for op in block.ops:
        if op in late:
            value = kept[op]
            dtype = value.type.dtype  # type: ignore[union-attr]
            at = writer.value("index", [], TileType(index, (pieces,)), axis=pieces)
            found = writer.value("load", [memories[op], at, *writer.places(axes, starts)],
                                 TileType(dtype, (pieces, *axes)))
            total = writer.value("reduce", [found], TileType(dtype, tuple(axes)),
                                 kind=op.attributes.get("kind", "sum"), over=[pieces])
            type = TileType(op.result.type.dtype, tuple(axes))  # type: ignore[union-attr]
            values[op.result] = total if dtype is type.dtype else writer.value("cast", [total], type)
        elif op is not over and (op not in needed or _is_needed_again(op, block, late)):
            writer.ops.append(copy_op(op, values))
    made.append(final)
    return made


def _is_needed_again(op: Op, block: Block, late: list[Op]) -> bool:
    """Whether something else than the reductions is made of what an op gives."""
    users = [user for user in block.ops if any(v in user.operands for v in op.results)]
    return any(user not in late and (user.name in ("store", "yield") or _is_needed_again(user, block, late))
               for user in users)
