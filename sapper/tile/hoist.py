"""Operands of contractions that a loop in turn does not change, brought before it.

Enters a canonical tile function. Leaves: of a loop that is not parallel, loads and elementwise ops that a contraction
in it multiplies, and that are the same in all of its iterations, stand before it: so the model may keep them in the
form in which the loop reads them (the queries of attention). Holds: the meaning is the same. A loop that is empty at
run time would not have loaded them, so only loads move whose indices are surely inside the tensor whenever the loop is
reached; nothing moves past a store to the same memory.
"""

from __future__ import annotations

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import TensorType
from .ops import BINARY, BINARY_FLOAT, UNARY, place_of
from .signs import never_negative

MOVED = {"load", "cast", "bitcast", *UNARY, *BINARY, *BINARY_FLOAT}
"""Ops that bring an operand before a loop; all but loads can be computed whatever their operands are."""

Bounds = dict[str, tuple[Value, Value]]
"""Start and stop of each axis in scope."""


def hoist_operands(function: Function) -> None:
    """In place, inner loops first: what no loop changes leaves all of them."""
    _block(function.body, {}, {})


def _block(block: Block, axes: Bounds, counters: dict[Value, tuple[Value, Value]]) -> None:
    """axes, counters: the ranges in scope where the block begins."""
    axes = dict(axes)
    position = 0
    while position < len(block.ops):
        op = block.ops[position]
        position += 1
        if op.name == "whole":
            axes[op.attributes["axis"]] = (op.operands[0], op.operands[1])
        inner, counted = dict(axes), dict(counters)
        if op.name == "tiles":
            inner |= {axis: (op.operands[2 * n], op.operands[2 * n + 1])
                      for n, axis in enumerate(op.attributes["axes"])}
        elif op.name == "each":
            counted |= {op.blocks[0].arguments[n]: (op.operands[2 * n], op.operands[2 * n + 1])
                        for n in range(op.attributes["count"])}
        for nested in op.blocks:
            _block(nested, inner, counted)
        if op.name in ("tiles", "each") and not op.attributes["parallel"]:
            moved = _invariant(op, _Ranges(axes, counters))
            op.blocks[0].ops[:] = [o for o in op.blocks[0].ops if o not in moved]
            block.ops[position - 1:position - 1] = moved
            position += len(moved)


def _invariant(loop: Op, ranges: _Ranges) -> list[Op]:
    """The ops of the body of a loop that may stand before it and that a contraction multiplies, in their order."""
    body = loop.blocks[0]
    members = set(body.ops)
    stored = {place_of(op.operands[0]) for op in loop.walk() if op.name == "store"}
    axes = set(loop.attributes["axes"] if loop.name == "tiles" else ())
    axes |= {op.attributes["axis"] for op in body.ops if op.name == "whole"}
    arguments = set(body.arguments)
    may: dict[Value, bool] = {}

    def stays_same(value: Value) -> bool:
        if value not in may:
            op = value.op
            if op is None or op not in members:
                may[value] = value not in arguments
            elif op.name == "index":
                may[value] = op.attributes["axis"] not in axes
            elif op.name == "load" and (place_of(op.operands[0]) in stored or not ranges.is_inside(op)):
                may[value] = False
            else:
                may[value] = op.name in MOVED | {"const"} and all(map(stays_same, op.operands))
        return may[value]

    wanted: set[Op] = set()

    def want(value: Value) -> None:
        if value.op is not None and value.op in members and value.op not in wanted:
            wanted.add(value.op)
            for operand in value.op.operands:
                want(operand)

    for op in loop.walk():
        for value in op.operands if op.name == "contract" else ():
            if value.op in members and value.op.name in MOVED and stays_same(value):
                want(value)
    return [op for op in body.ops if op in wanted]


class _Ranges:
    """What is known of indices. axes, counters: their start and stop."""

    def __init__(self, axes: Bounds, counters: dict[Value, tuple[Value, Value]]) -> None:
        self.axes = axes
        self.counters = counters

    def is_inside(self, load: Op) -> bool:
        """Whether every index of a load is a coordinate, or a counter, that surely lies in the tensor."""
        tensor = load.operands[0]
        if not isinstance(tensor.type, TensorType) or tensor.op is not None:
            return False
        return all(self._lies_below(index, extent)
                   for index, extent in zip(load.operands[1:], tensor.type.dims, strict=True))

    def _range(self, value: Value) -> tuple[Value, Value] | None:
        if value.op is not None and value.op.name == "index":
            return self.axes.get(value.op.attributes["axis"])
        return self.counters.get(value)

    def _start_of(self, value: Value) -> Value | None:
        found = self._range(value)
        return found[0] if found is not None else None

    def _lies_below(self, index: Value, extent: int | str) -> bool:
        found = self._range(index)
        return found is not None and never_negative(found[0], self._start_of) and self._is_at_most(found[1], extent)

    def _is_at_most(self, value: Value, extent: int | str) -> bool:
        op = value.op
        if op is None:
            return False
        if op.name == "dim":
            return bool(op.attributes["name"] == extent)
        if op.name == "const":
            return isinstance(extent, int) and op.attributes["value"] <= extent
        return op.name == "min" and any(self._is_at_most(v, extent) for v in op.operands)
