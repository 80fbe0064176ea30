"""Indices that are shared out to workers, several at a time around a loop in order.

Enters: a canonical tile function. Leaves: where a loop over indices, whose iterations are independent, is around a loop
in order, and that around tiles of products, as the blocks of a mixture's columns are around its experts, the loop in
order around that over the indices, and around both one over pieces of these (`each` with `pieces`: its body is given
where a piece begins and where it ends). What products of several indices have in common, as the rows of an expert, is
then near for all of them. Holds: each index has its iterations in the same order.
"""

from __future__ import annotations

from collections.abc import Callable

from ..ir.nodes import Block, Function, Op, Value
from .parts import INDEX


def take_together(function: Function, is_worth: Callable[[Op], bool]) -> None:
    """In place. is_worth: whether what a product has in common with that of the next index is worth it."""
    function.body.ops[:] = [_together(op, is_worth) or op for op in function.body.ops]


def _together(indices: Op, is_worth: Callable[[Op], bool]) -> Op | None:
    """The loop that takes the place of one over indices."""
    if indices.name != "each" or not indices.attributes["parallel"] or indices.attributes["count"] != 1 or (
            indices.attributes.get("step", 1) != 1):
        return None
    (index,) = indices.blocks[0].arguments
    ordered = _only_loop(indices.blocks[0])
    if ordered is None or ordered.name != "each" or ordered.attributes["parallel"] or ordered.results:
        return None
    tiles = _only_loop(ordered.blocks[0])
    if tiles is None or tiles.name != "tiles" or not tiles.attributes["parallel"]:
        return None
    moving = _behind(index, [*indices.blocks[0].ops, *ordered.blocks[0].ops])
    if not moving.isdisjoint(ordered.operands) or not moving.isdisjoint(tiles.operands) or not any(
            op.name == "contract" and is_worth(op) and _is_shared(op, moving | _behind_in(tiles, moving))
            for op in tiles.walk()):
        return None
    outer = Op("each", indices.operands, (), {**indices.attributes, "pieces": True}, [Block([INDEX, INDEX])],
               indices.location)
    first, stop = outer.blocks[0].arguments
    late: list[Op] = []
    for op in indices.blocks[0].ops:
        if op is not ordered and op.name != "yield":
            (late if not moving.isdisjoint(op.results) else outer.blocks[0].ops).append(op)
    inner = Op("each", [first, stop], (), {"count": 1, "parallel": True}, [Block()], indices.location)
    block = inner.blocks[0]
    block.arguments.append(index)
    index.owner = block
    early = [op for op in ordered.blocks[0].ops if op is not tiles and moving.isdisjoint(op.results)
             and op.name != "yield"]
    block.ops += [*late, *(op for op in ordered.blocks[0].ops if op not in early and op.name != "yield"),
                  Op("yield", [], [], {}, None, indices.location)]
    ordered.blocks[0].ops[:] = [*early, inner, Op("yield", [], [], {}, None, indices.location)]
    outer.blocks[0].ops += [ordered, Op("yield", [], [], {}, None, indices.location)]
    return outer


def _only_loop(block: Block) -> Op | None:
    """The loop that is all that a block does, but for scalars."""
    loops = [op for op in block.ops if op.blocks]
    others = [op for op in block.ops if not op.blocks]
    if len(loops) != 1 or loops[0].results or any(op.name not in ("yield", "load") and not op.results for op in others):
        return None
    return loops[0]


def _behind(value: Value, ops: list[Op]) -> set[Value]:
    """A value and all that some ops compute from it."""
    found = {value}
    for op in ops:
        if not op.blocks and not found.isdisjoint(op.operands):
            found.update(op.results)
    return found


def _behind_in(loop: Op, values: set[Value]) -> set[Value]:
    found: set[Value] = set(values)
    for op in loop.walk():
        if not op.blocks and not found.isdisjoint(op.operands):
            found.update(op.results)
    return found


def _is_shared(contraction: Op, moving: set[Value]) -> bool:
    """Whether one operand alone is that of an index."""
    return sum(operand in moving for operand in contraction.operands) == 1
