"""Moves cheap ops down to where their results are wanted, past loops that do not use them.

Enters: a lane function. Leaves: the same ops in another order, some of them in an inner block. Holds: no op moves into
a loop that has no loop inside, so that none runs more often than an outer loop goes round; ops with effects stay.

For targets where a register that is held through a loop is dearer than the number in it: lowering makes every scalar in
the outermost block where it can, and what only the end of a tile reads would otherwise wait there all the time.
"""

from __future__ import annotations

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import RowType

CHEAP = frozenset({
    "arg", "worker", "workers", "warp", "near_memory", "s_const", "s_add", "s_sub", "s_mul", "s_min", "s_max", "s_and",
    "s_or", "s_xor", "s_shl", "s_shr", "s_sar", "s_cmp", "s_select", "splat", "splat_const", "iota", "mask_first",
})
_CHEAP_ROWS = frozenset({"add", "sub", "mul", "and", "or", "xor", "shl", "shr", "sar", "min", "max"})


def is_cheap(op: Op) -> bool:
    if op.name in _CHEAP_ROWS:
        type = op.results[0].type
        return isinstance(type, RowType) and type.dtype.is_integer
    return op.name in CHEAP


def sink(function: Function) -> None:
    """Sink the ops of a function, in place."""
    _Sinking().place(function.body, [])


class _Sinking:
    def __init__(self) -> None:
        self.loops: dict[Block, bool] = {}

    def has_loop(self, block: Block) -> bool:
        if block not in self.loops:
            self.loops[block] = any(op.name == "loop" or any(map(self.has_loop, op.blocks)) for op in block.ops)
        return self.loops[block]

    def place(self, block: Block, above: list[Op]) -> None:
        """Order a block anew. above: cheap ops from outside, all of whose users are in it, in their order."""
        fixed = [op for op in block.ops if not is_cheap(op)]
        # Where each value is wanted: at which fixed op, and whether that is in a block of it where ops may go.
        wanted: dict[Value, list[tuple[int, bool]]] = {}
        for number, op in enumerate(fixed):
            open_inside = op.name in ("loop", "tasks") and self.has_loop(op.blocks[0])
            for value in op.operands:
                wanted.setdefault(value, []).append((number, False))
            for inner in op.walk():
                for value in inner.operands:
                    wanted.setdefault(value, []).append((number, open_inside))
        before: list[list[Op]] = [[] for _ in fixed]
        inside: list[list[Op]] = [[] for _ in fixed]
        for op in reversed([*above, *filter(is_cheap, block.ops)]):
            places = wanted.get(op.results[0])
            if not places:
                continue
            first = min(places)[0]
            goes_inside = all(place == (first, True) for place in places)
            (inside if goes_inside else before)[first].append(op)
            for value in op.operands:
                wanted.setdefault(value, []).append((first, goes_inside))
        block.ops[:] = [op for number, last in enumerate(fixed) for op in (*reversed(before[number]), last)]
        for op, moved in zip(fixed, inside, strict=True):
            for nested in op.blocks:
                if self.has_loop(nested):
                    self.place(nested, moved[::-1])
