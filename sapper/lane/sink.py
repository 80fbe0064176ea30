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


_CHEAP_CHOICES = frozenset({"cmp", "select"})
OUTSIDE = -1
"""Of all blocks of an op."""


def is_cheap(op: Op, choices: bool = False) -> bool:
    """Whether an op costs less than a register. choices: whether that holds of comparisons of rows, and selections."""
    if op.name in _CHEAP_ROWS or (choices and op.name in _CHEAP_CHOICES):
        type = op.results[0].type
        return isinstance(type, RowType) and (type.dtype.is_integer or op.name == "cmp")
    return op.name in CHEAP


def sink(function: Function) -> None:
    """Sink the ops of a function, in place. Where the parts that warps play (groups.py) leave few registers (attribute
    `few_registers`), into these as well: what several parts want is made in each. So it is for several loops of tasks
    where workers have several warps, as one that multiplies matrices has no register left for the others."""
    few = bool(function.attributes.get("few_registers"))
    _Sinking(few, function.attributes.get("warps", 1) > 1).place(function.body, [])


class _Sinking:
    """few: whether registers are, and ops go into the parts of an `if`. apart: each loop of tasks makes its own."""

    def __init__(self, few: bool, apart: bool) -> None:
        self.few, self.apart = few, apart
        self.opened = frozenset(("loop", "tasks", *(["if"] if few else [])))
        self.loops: dict[Block, bool] = {}
        self.read: dict[Block, set[Value]] = {}

    def has_loop(self, block: Block) -> bool:
        if block not in self.loops:
            self.loops[block] = any(op.name == "loop" or any(map(self.has_loop, op.blocks)) for op in block.ops)
        return self.loops[block]

    def reads(self, block: Block) -> set[Value]:
        """What the ops of a block read, and those inside them."""
        found = self.read.get(block)
        if found is None:
            found = self.read[block] = set()
            for op in block.ops:
                found.update(op.operands)
                for nested in op.blocks:
                    found |= self.reads(nested)
        return found

    def place(self, block: Block, above: list[Op]) -> None:
        """Order a block anew. above: cheap ops from outside, all of whose users are in it, in their order."""
        fixed: list[Op] = []
        cheap = list(above)
        for op in block.ops:
            (cheap if is_cheap(op, self.few) else fixed).append(op)
        # Where what they give is wanted: at which fixed op, and in which block of it where ops may go, or OUTSIDE.
        wanted: dict[Value, set[tuple[int, int]]] = {op.results[0]: set() for op in cheap}
        for number, op in enumerate(fixed):
            outside = number, OUTSIDE
            for value in op.operands:
                if value in wanted:
                    wanted[value].add(outside)
            for which, nested in enumerate(op.blocks):
                place = (number, which) if op.name in self.opened and self.has_loop(nested) else outside
                for value in wanted.keys() & self.reads(nested):
                    wanted[value].add(place)
        before: list[list[Op]] = [[] for _ in fixed]
        inside: list[list[list[Op]]] = [[[] for _ in op.blocks] for op in fixed]
        copies: dict[tuple[int, int], dict[Value, Value]] = {}
        for op in reversed(cheap):
            places = sorted(wanted[op.results[0]])
            if not places:
                continue
            first = places[0][0]
            apart = self.apart and all(which != OUTSIDE and fixed[number].name == "tasks" for number, which in places)
            if not apart and any(number != first or which == OUTSIDE for number, which in places):
                before[first].append(op)
                places = [(first, OUTSIDE)]
            else:
                for number, which in places:
                    queue = inside[number][which]
                    if (number, which) == places[0]:
                        queue.append(op)
                    else:
                        queue.append(_copy(op))
                        copies.setdefault((number, which), {})[op.result] = queue[-1].result
            for value in op.operands:
                if value in wanted:
                    wanted[value].update(places)
        for (number, which), copied in copies.items():
            _rename(copied, inside[number][which], fixed[number].blocks[which])
        if copies:
            self.read.clear()
        block.ops[:] = [op for number, last in enumerate(fixed) for op in (*reversed(before[number]), last)]
        for op, moved in zip(fixed, inside, strict=True):
            for nested, some in zip(op.blocks, moved, strict=True):
                if self.has_loop(nested):
                    self.place(nested, some[::-1])


def _copy(op: Op) -> Op:
    return Op(op.name, list(op.operands), [v.type for v in op.results], dict(op.attributes), None, op.location)


def _rename(copied: dict[Value, Value], moved: list[Op], block: Block) -> None:
    """Let the ops that move into a block, and those in it, read the copies that are made for it."""
    for user in (*moved, *(found for own in block.ops for found in own.walk())):
        if not copied.keys().isdisjoint(user.operands):
            user.operands[:] = [copied.get(v, v) for v in user.operands]
