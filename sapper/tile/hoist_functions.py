"""Functions of inputs over whole axes, computed once before the loop whose iterations all need them.

Enters a canonical tile function. Leaves: values in a loop that cost much (exp, a quotient), are the same in all
iterations and span axes of `whole` alone stand before it, with the axes. A worker then keeps them in memory of its own,
as it does what is written there by hand, and computes them anew neither for each row nor for each tile; where there are
parts (parts.py), the first worker computes them for all, in one part before the others. Holds: the meaning is the same,
bit for bit: only what is loaded from tensors that the function does not store to moves, by indices that lie in the
tensor, and what is computed of that. A loop that is empty would not have loaded it, but could have.

What a reduction takes as it is stays, too, as it is computed for a tile, and so does a matrix of a product, which is
packed for that; not a weight of elements that have all of its axes. So does all of a loop without reductions, where one
walk has such a value in a register for its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from ..ir.nodes import Block, Function, Op, Value
from ..ir.rewriter import eliminate_dead
from ..ir.types import TileType
from .hoist import MOVED, Bounds, Ranges
from .ops import COMPARE, TILE_OPS, UNARY_FLOAT, memory_of, place_of
from .parts import copy_op
from .plan import COSTLY, LATE, axes_of

PURE = MOVED | {*UNARY_FLOAT, *COMPARE, "select", "const", "dim", "full"} - {"load"}
"""Ops that are the same wherever they stand, whatever their operands are."""

FEWEST_TRIPS = 64
"""Iterations from which on a value is worth its memory: a worker has several of its own, and several tiles of them."""

WEIGHT_TRIPS = 1024
"""The same of weights, which packed panels are made of: on two threads of a Granite Rapids 400 and 1000 rows of 16 by
256 weights took 1.3 of the time."""

Typical = Callable[[Value], int | None]
"""A typical value of an index scalar; None where nothing bounds it before the kernel runs."""


def is_weight(contraction: Op, value: Value) -> bool:
    """Whether an operand of a contraction meets one that has all of its axes, and so is no matrix of a product."""
    return contraction.name == "contract" and any(
        set(axes_of(value)) < set(axes_of(other)) for other in contraction.operands)


def trips_of(loop: Op, typical: Typical) -> int:
    """How often the body of a loop is typically run, tiles taken as one element."""
    count = len(loop.attributes["axes"]) if loop.name == "tiles" else loop.attributes["count"]
    return prod(extent_of(typical, *loop.operands[2 * n:2 * n + 2]) for n in range(count))


def extent_of(typical: Typical, start: Value, stop: Value) -> int:
    return max(1, (typical(stop) or 1) - (typical(start) or 0))


def hoist_functions(function: Function, typical: Typical, most_bytes: int) -> int:
    """In place; how many values stand before the loop now. most_bytes: memory for one of them."""
    return sum(_Hoist(function, loop, typical, most_bytes).run() for loop in list(function.body.ops)
               if loop.name in ("tiles", "each") and any(op.name in LATE for op in loop.walk()))


class _Hoist:
    def __init__(self, function: Function, loop: Op, typical: Typical, most_bytes: int) -> None:
        self.function = function
        self.loop = loop
        self.typical = typical
        self.most_bytes = most_bytes
        self.stored = {place_of(op.operands[0]) for op in function.walk() if op.name == "store"}
        self.inside = {op: number for number, op in enumerate(loop.walk())}
        self.users: dict[Value, list[Op]] = {}
        for op in self.inside:
            for value in op.operands:
                self.users.setdefault(value, []).append(op)
        self.same: dict[Value, bool] = {}
        self.axes: Bounds = {}
        self.ranges = Ranges(self.axes, {}, frozenset())
        self.moved_axes = self._axes_that_may_move()
        outside = {op.attributes["axis"]: op for op in function.body.ops if op.name == "whole"}
        self.axes |= {axis: (op.operands[0], op.operands[1]) for axis, op in (outside | self.moved_axes).items()}

    def _axes_that_may_move(self) -> dict[str, Op]:
        """What brings each axis of `whole` whose range is known before the loop."""
        return {op.attributes["axis"]: op for op in self.inside
                if op.name == "whole" and all(map(self._stays_same, op.operands))}

    def _stays_same(self, value: Value) -> bool:
        """Whether a value is the same in all iterations, and may be computed before the first."""
        if value not in self.same:
            op = value.op
            if op is None or op not in self.inside:
                self.same[value] = op is not None or value.owner is self.function.body
            elif op.name == "index":
                self.same[value] = op.attributes["axis"] in self.axes
            elif op.name == "load":
                tensor = op.operands[0]
                self.same[value] = (memory_of(tensor) is tensor and tensor.op is None
                                    and place_of(tensor) not in self.stored
                                    and all(map(self._stays_same, op.operands[1:])) and self.ranges.is_inside(op))
            else:
                self.same[value] = op.name in PURE and all(map(self._stays_same, op.operands))
        return self.same[value]

    def _behind(self, value: Value) -> list[Op]:
        """The ops of the loop that make a value, in their order."""
        found: set[Op] = set()
        waiting = [value]
        while waiting:
            op = waiting.pop().op
            if op is not None and op in self.inside and op not in found:
                found.add(op)
                waiting += op.operands
        return sorted(found, key=self.inside.__getitem__)

    def _blocks(self) -> list[tuple[Block, int]]:
        """The blocks of the loop, and of loops in it, each with how often it is typically run."""
        found, waiting = [], [(self.loop, 1)]
        while waiting:
            loop, times = waiting.pop()
            times *= trips_of(loop, self.typical)
            found.append((loop.blocks[0], times))
            waiting += [(op, times) for op in loop.blocks[0].ops if op.name in ("tiles", "each")]
        return found

    def _wanted(self, block: Block, times: int) -> list[Value]:
        """Values of a block that others of the loop use, not the same in all iterations, and that are worth it."""
        return [op.result for op in block.ops if len(op.results) == 1 and isinstance(op.result.type, TileType)
                and self._stays_same(op.result) and self._is_worth_it(op.result, times)]

    def _is_worth_it(self, value: Value, times: int) -> bool:
        axes = axes_of(value)
        users = self.users.get(value, [])
        if not axes or not any(op.name in COSTLY for op in self._behind(value)) or all(
                (op.name in LATE and not (times >= WEIGHT_TRIPS and is_weight(op, value)))
                or (len(op.results) == 1 and self._stays_same(op.result)) for op in users):
            return False
        ends = [self.axes[axis] for axis in axes]
        if any(self.typical(stop) is None for _, stop in ends):
            return False
        size: int = value.type.dtype.size_bytes  # type: ignore[union-attr]
        return prod(extent_of(self.typical, *pair) for pair in ends) * size <= self.most_bytes

    def run(self) -> int:
        values = [value for block, times in self._blocks() if times >= FEWEST_TRIPS
                  for value in self._wanted(block, times)]
        needed = {op for value in values for op in self._behind(value)}
        axes = {op.attributes["axis"] for op in needed if op.name == "index"} & self.moved_axes.keys()
        before: list[Op] = []
        made: dict[Value, Value] = {}
        for op in self.inside:
            if op.name == "whole" and op.attributes["axis"] in axes:
                needed |= {o for v in op.operands for o in self._behind(v)}
        for op in self.inside:
            if op in needed or (op.name == "whole" and op.attributes["axis"] in axes):
                before.append(copy_op(op, made))
        for block in [block for op in self.inside for block in op.blocks]:
            block.ops[:] = [op for op in block.ops if not (op.name == "whole" and op.attributes["axis"] in axes)]
        replaced = {value: made[value] for value in values}
        for op in self.inside:
            op.operands = [replaced.get(v, v) for v in op.operands]
        place = self._place(before)
        self.function.body.ops[place:place] = before
        if values:
            eliminate_dead(self.function, TILE_OPS)
        return len(values)

    def _place(self, moved: list[Op]) -> int:
        """Before whatever runs in the body of the function, if nothing that is moved needs what is made later."""
        ops = self.function.body.ops
        first = next(n for n, op in enumerate(ops) if op.blocks or op.name in LATE or op.name == "store")
        known = {value for op in ops[:first] for value in op.results} | {v for op in moved for v in op.results}
        needed = (v for op in moved for v in op.operands if v.op is not None)
        return first if all(v in known for v in needed) else ops.index(self.loop)
