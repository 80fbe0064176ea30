"""Operands of contractions that a loop in turn does not change, brought before it.

Enters a canonical tile function. Leaves: of a loop that is not parallel, loads and elementwise ops that a contraction
in it multiplies, and that are the same in all of its iterations, stand before it: so the model may keep them in the
form in which the loop reads them (the queries of attention). So do axes of theirs that are whole inside of it. Holds:
the meaning is the same. A loop that is empty at run time would not have loaded them, so only loads move whose indices
are surely inside the tensor whenever the loop is reached: by their ranges, or as what stands beside the loop or around
it uses them for the same extent (`y[t, d]` after a loop that reads `q[t, d]`, of a `t` whose range memory says).
Nothing moves past a store to the same memory.
"""

from __future__ import annotations

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import TensorType
from .ops import BINARY, BINARY_FLOAT, UNARY, place_of
from .plan import axes_of
from .signs import never_negative

MOVED = {"load", "cast", "bitcast", *UNARY, *BINARY, *BINARY_FLOAT}
"""Ops that bring an operand before a loop; all but loads can be computed whatever their operands are."""

Bounds = dict[str, tuple[Value, Value]]
"""Start and stop of each axis in scope."""

Used = frozenset[tuple[object, object, frozenset[str]]]
"""Indices that lie in a dimension, as something uses them whatever loops do: axis or scalar, extent, and the axes but
for which nothing is used."""


def hoist_operands(function: Function) -> None:
    """In place, inner loops first: what no loop changes leaves all of them."""
    _block(function.body, {}, {}, frozenset())


def _block(block: Block, axes: Bounds, counters: dict[Value, tuple[Value, Value]], used: Used) -> None:
    """axes, counters: the ranges in scope where the block begins. used: by the blocks around it."""
    axes = dict(axes)
    used |= {(_key(index), extent, frozenset(a for i in op.operands[_first_index(op):] for a in axes_of(i)))
             for op in block.ops if op.name in ("load", "store")
             for index, extent in zip(op.operands[_first_index(op):], _extents(op.operands[0]), strict=True)}
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
            _block(nested, inner, counted, used)
        if op.name in ("tiles", "each") and not op.attributes["parallel"]:
            brought = {inner.attributes["axis"]: (inner.operands[0], inner.operands[1])
                       for inner in op.blocks[0].ops if inner.name == "whole"}
            moved = _invariant(op, Ranges(axes | brought, counters, used))
            op.blocks[0].ops[:] = [o for o in op.blocks[0].ops if o not in moved]
            block.ops[position - 1:position - 1] = moved
            position += len(moved)


def _invariant(loop: Op, ranges: Ranges) -> list[Op]:
    """The ops of the body of a loop that may stand before it and that a contraction multiplies, in their order."""
    body = loop.blocks[0]
    members = set(body.ops)
    stored = {place_of(op.operands[0]) for op in loop.walk() if op.name == "store"}
    axes = set(loop.attributes["axes"] if loop.name == "tiles" else ())
    wholes = {op.attributes["axis"]: op for op in body.ops if op.name == "whole"}
    arguments = set(body.arguments)
    may: dict[Value, bool] = {}

    def stays_same(value: Value) -> bool:
        if value not in may:
            op = value.op
            if op is None or op not in members:
                may[value] = value not in arguments
            elif op.name == "index":
                axis = op.attributes["axis"]
                may[value] = axis not in axes and (axis not in wholes or all(map(stays_same, wholes[axis].operands)))
            elif op.name == "load" and (place_of(op.operands[0]) in stored or not ranges.is_inside(op)):
                may[value] = False
            else:
                may[value] = op.name in MOVED | {"const"} and all(map(stays_same, op.operands))
        return may[value]

    wanted: set[Op] = set()

    def want(op: Op | None) -> None:
        if op in members and op not in wanted:
            assert op is not None
            wanted.add(op)
            if op.name == "index":
                want(wholes.get(op.attributes["axis"]))
            for operand in op.operands:
                want(operand.op)

    for op in loop.walk():
        for value in op.operands if op.name == "contract" else ():
            if value.op in members and value.op.name in MOVED and stays_same(value):
                want(value.op)
    return [op for op in body.ops if op in wanted]


def _first_index(op: Op) -> int:
    """The operand of a load or a store that is its first index."""
    return 2 if op.name == "store" else 1


def _extents(tensor: Value) -> list[object]:
    """Of each dimension: a number, the name of a dimension, what else a view computes, or of a buffer nothing that is
    known."""
    assert isinstance(tensor.type, TensorType)
    if tensor.op is None:
        return list(tensor.type.dims)
    if tensor.op.name != "view":
        return [object() for _ in tensor.type.dims]
    extents: list[object] = []
    for value in tensor.op.operands[1:]:
        op = value.op
        known = op is not None and op.name in ("const", "dim")
        extents.append(op.attributes["value" if op.name == "const" else "name"] if op is not None and known else value)
    return extents


def _key(index: Value) -> object:
    op = index.op
    return op.attributes["axis"] if op is not None and op.name == "index" else index


class Ranges:
    """What is known of indices. axes, counters: their start and stop."""

    def __init__(self, axes: Bounds, counters: dict[Value, tuple[Value, Value]], used: Used) -> None:
        self.axes = axes
        self.counters = counters
        self.used = used

    def is_inside(self, load: Op) -> bool:
        """Whether every index of a load surely lies in the tensor."""
        along = set(axes_of(load.result))
        inside = {(key, extent) for key, extent, others in self.used if along >= others}
        return all((_key(index), extent) in inside or self._lies_below(index, extent)
                   for index, extent in zip(load.operands[1:], _extents(load.operands[0]), strict=True))

    def _range(self, value: Value) -> tuple[Value, Value] | None:
        if value.op is not None and value.op.name == "index":
            return self.axes.get(value.op.attributes["axis"])
        return self.counters.get(value)

    def _start_of(self, value: Value) -> Value | None:
        found = self._range(value)
        return found[0] if found is not None else None

    def _lies_below(self, index: Value, extent: object) -> bool:
        op = index.op
        if op is not None and op.name == "const":
            return isinstance(extent, int) and 0 <= op.attributes["value"] < extent
        found = self._range(index)
        return found is not None and never_negative(found[0], self._start_of) and self._is_at_most(found[1], extent)

    def _is_at_most(self, value: Value, extent: object) -> bool:
        op = value.op
        if value is extent:
            return True
        if op is None:
            return False
        if op.name == "dim":
            return bool(op.attributes["name"] == extent)
        if op.name == "const":
            return isinstance(extent, int) and op.attributes["value"] <= extent
        return op.name == "min" and any(self._is_at_most(v, extent) for v in op.operands)
