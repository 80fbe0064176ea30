"""Loops whose stores join values with elements that they may meet again, shared out so that no two workers meet.

Enters: a canonical tile function, and what the target joins in memory in one step, whichever worker comes first.
Leaves: of a parallel loop over tiles with other stores that join, the axes along which these never meet stand outside,
and inside those along which they may, as a loop in turn; where that leaves nothing to share out, copies.py may. Holds:
the meaning is the same, save that sums may round otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import DType
from .copies import add_copies


def is_join(root: object) -> bool:
    """Whether this is a store that joins a value with what is there."""
    return isinstance(root, Op) and "join" in root.attributes


def share_sums(function: Function, at_once: Collection[tuple[str, DType]],
               typical: Callable[[Value], int] = lambda _: 1) -> None:
    """In place. at_once: (join, dtype) of what the target joins in one step. typical: of an index scalar."""
    for op in [op for op in function.walk() if "repeats" in op.attributes]:
        stores = [inner for inner in op.walk() if is_join(inner)]
        if all((s.attributes["join"], s.operands[1].type.dtype) in at_once for s in stores):  # type: ignore[union-attr]
            continue
        axes, repeats = op.attributes["axes"], op.attributes["repeats"]
        bounds = {axis: op.operands[2 * n:2 * n + 2] for n, axis in enumerate(axes)}
        apart = [axis for axis in axes if axis not in repeats]
        inner = Op("tiles", [v for axis in repeats for v in bounds[axis]], (),
                   {"axes": repeats, "parallel": False, "repeats": repeats}, op.blocks, op.location)
        if not apart:
            op.attributes = inner.attributes
            if op in function.body.ops:
                add_copies(function, op, typical)
            continue
        op.operands = [v for axis in apart for v in bounds[axis]]
        op.attributes = {"axes": apart, "parallel": True}
        op.blocks = [Block()]
        op.blocks[0].ops += [inner, Op("yield", [], (), {}, None, op.location)]
