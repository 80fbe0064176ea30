"""Loops in order that do nothing but add products up: the windows of a convolution.

Enters a canonical tile function. Leaves, in place of such loops in a loop over tiles, one contraction over their ranges
too: `acc += x[p + i, q + j, c] @ w[i, j, c, o]` for all i and j contracts i, j and c. So it is a walk that matrix
instructions take. Holds: the meaning is the same, but for the order of the sum.
"""

from __future__ import annotations

from itertools import count

from ..ir.checker import union_of_axes
from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import TileType, Type, index
from .ops import BINARY, BINARY_INTEGER, UNARY
from .plan import axes_of
from .product_parts import IsProduct, Typical, axes_brought, is_read
from .zeros import is_zero

BROUGHT = frozenset({"load", "cast", "const", "index", *UNARY, *BINARY, *BINARY_INTEGER})
"""What may make operands."""


def join_loops(function: Function, typical: Typical, is_product: IsProduct) -> None:
    """In place. typical, is_product: as product_parts.py has them."""
    taken = {axis for op in function.walk() for axis in axes_brought(op)}
    for tiles in [op for op in function.walk() if op.name == "tiles" and op.attributes["parallel"]]:
        block = tiles.blocks[0]
        for loop in [op for op in block.ops if op.name == "each" and len(op.results) == 1]:
            made = contraction(loop, taken)
            if made is not None and made[-1].result.type == loop.result.type:
                ends = {axis: end for op in (tiles, *made) for axis, end in zip(
                    axes_brought(op), op.operands[1::2], strict=False)}
                if ends.keys() >= {a for v in made[-1].operands for a in axes_of(v)} and is_product(
                        made[-1], {axis: typical(end) or 0 for axis, end in ends.items()}):
                    _replace(block, loop, made)


def _loops(loop: Op) -> list[Op]:
    """Loops in each other, each of which gives what the next one does; the last one has none inside. Empty: others."""
    loops = [loop]
    while True:
        op = loops[-1]
        block = op.blocks[0]
        inside = [o for o in block.ops if o.blocks]
        if op.name != "each" or op.attributes["parallel"] or op.attributes.get("step", 1) != 1 or len(op.results) != 1:
            return []
        if not inside:
            return loops
        if len(inside) > 1 or inside[0].operands[-1] is not block.arguments[-1] \
                or block.ops[-1].operands != inside[0].results:
            return []
        loops += inside


def contraction(loop: Op, taken: set[str]) -> list[Op] | None:
    """The ops that stand for a loop, the contraction last; None where it is something else."""
    loops = _loops(loop)
    if not loops:
        return None
    body = loops[-1].blocks[0]
    total = body.ops[-1].operands[0].op
    carried = body.arguments[-1]
    if total is None or total.name != "add" or total not in body.ops or carried not in total.operands:
        return None
    (term,) = (v.op for v in total.operands if v is not carried)
    if term is None or term.name != "contract" or term not in body.ops or \
            term.result.type.dtype is not carried.type.dtype:  # type: ignore[union-attr]
        return None
    counters = {argument for one in loops for argument in one.blocks[0].arguments[:-1]}
    inside = [op for one in loops for op in one.blocks[0].ops if op not in (*loops, total, term) and op.name != "yield"]
    if any(op.name not in (*BROUGHT, "whole") for op in inside) or any(
            carried in op.operands for op in (*inside, term)):
        return None
    bounds = [v for one in loops for v in one.operands[:-1]] + [v for op in inside if op.name == "whole"
                                                                  for v in op.operands]
    if any(v in counters or v.op in inside for v in bounds):
        return None
    made: list[Op] = []
    values: dict[Value, Value] = {}
    around = []
    for one in loops:
        for number, counter in enumerate(one.blocks[0].arguments[:-1]):
            axis = next(name for n in count() if (name := f"{counter.name}_{n}" if n else counter.name) not in taken)
            taken.add(axis)
            around.append(axis)
            made.append(Op("whole", one.operands[2 * number:2 * number + 2], (), {"axis": axis}, None, one.location))
            made.append(Op("index", [], [TileType(index, (axis,))], {"axis": axis}, None, one.location))
            values[counter] = made[-1].result
    for op in (*inside, term):
        made.append(spread(op, values, around if op is term else []))
    return made if all(set(around) <= set(axes_of(v)) and is_read(v) for v in made[-1].operands) else None


def spread(op: Op, values: dict[Value, Value], over: list[str]) -> Op:
    """The same op of values that span more axes. over: what it contracts besides."""
    operands = [values.get(v, v) for v in op.operands]
    attributes = dict(op.attributes)
    axes = (op.attributes["axis"],) if op.name == "index" else union_of_axes(operands)
    if op.name in ("contract", "reduce"):
        attributes["over"] = [*over, *op.attributes["over"]]
        axes = tuple(axis for axis in axes if axis not in attributes["over"])
    types: list[Type] = [TileType(v.type.dtype, axes) for v in op.results]  # type: ignore[union-attr]
    made = Op(op.name, operands, types, attributes, None, op.location)
    for old, new in zip(op.results, made.results, strict=True):
        new.name = old.name
        values[old] = new
    return made


def _replace(block: Block, loop: Op, made: list[Op]) -> None:
    """Put the ops in the place of a loop, whose sum begins with what was carried in."""
    total = made[-1].result
    begin = loop.operands[-1]
    if not is_zero(begin):
        made.append(Op("add", [begin, total], [loop.result.type], {}, None, loop.location))
        total = made[-1].result
    at = block.ops.index(loop)
    block.ops[at:at + 1] = made
    for outer in block.ops[at:]:
        for op in outer.walk():
            op.operands[:] = [total if v is loop.result else v for v in op.operands]
