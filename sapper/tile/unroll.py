"""Short loops in order within longer ones, as over the taps of a window, written out.

Enters: a canonical tile function. Leaves: where a loop in order has in it one over few known numbers that carries
tiles, and whose body only loads and computes, the iterations of the latter one after the other. So what is read lies at
known distances, a few multiply-adds do not wait for a counter and a branch, and what an iteration of the longer loop
has in common with the next (places and weights of what is gathered for each channel) is computed before it. Holds: the
meaning is the same.

So are loops over parts of a block of weights, where asked: a processor that follows each load by how far it has moved
on then sees all of a block move on by as much, and not by one distance within it and another to the next.

Measured on a Zen 3, f32, GFLOP/s of 100, convolutions of 3 x 3 with channels first, 32 x 32 points, 64 channels to 64,
and 14 x 14, 256 to 256: 71 and 52 by loops, 86 and 62 written out. Bilinear samples of 8 planes of 64 x 64, beside
PyTorch: 0.82 and 1.18.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import DType, TileType, i32, index, u8
from .ops import memory_of
from .parts import copy_op
from .plan import LATE, axes_of
from .product_parts import axes_brought, rename_axes

MOST_OPS = 160
"""Ops that a loop may become: a window of 3 x 3 is 54, one of 5 x 5 150."""

MOST_BLOCK_OPS = 1024
"""The same of a block of weights: one of Q6_K is some 560, one of Q4_K 110."""


Typical = Callable[[Value], int]
"""A typical value of an index scalar."""


def unroll(function: Function, typical: Typical | None = None) -> None:
    """In place, inner loops first. typical: where parts of blocks of weights are written out, too."""
    _Unroll(function, typical).block(function.body, None)


class _Unroll:
    """taken: names of axes. extents: of those of tiles, typically."""

    def __init__(self, function: Function, typical: Typical | None) -> None:
        self.taken = {axis for op in function.walk() for axis in axes_brought(op)}
        self.extents: dict[str, int] | None = None
        if typical is not None:
            self.extents = {axis: typical(stop) - typical(start) for op in function.walk() if op.name == "tiles"
                            for axis, start, stop in zip(op.attributes["axes"], op.operands[::2], op.operands[1::2],
                                                         strict=False)}

    def block(self, block: Block, around: Op | None) -> None:
        """around: the loop in order that the block is the body of."""
        for op in list(block.ops):
            for inner in op.blocks:
                self.block(inner, op if _is_in_order(op) else None)
            points = None if around is None else self._points(op, around)
            if points is not None:
                at = block.ops.index(op)
                made, results = self._written_out(op, points)
                block.ops[at:at + 1] = made
                _replace(block.ops[at + len(made):], dict(zip(op.results, results, strict=True)))

    def _points(self, op: Op, around: Op) -> list[tuple[int, ...]] | None:
        """What the counters of a loop are in turn; None for one that stays a loop."""
        if op.name != "each" or not _is_in_order(op) or not any(map(axes_of, op.results)):
            return None
        ends = op.operands[:2 * op.attributes["count"]]
        bounds: list[int] = [v.op.attributes["value"] for v in ends if v.op is not None and v.op.name == "const"]
        body = op.blocks[0].ops
        if len(bounds) < len(ends) or any(inner.blocks or inner.name == "store" for inner in body):
            return None
        most = MOST_OPS
        if any(inner.name in (*LATE, "whole") for inner in body):
            if not self._is_of_blocks(op, around):
                return None
            most = MOST_BLOCK_OPS
        step = op.attributes.get("step", 1)
        points = list(product(*(range(start, stop, step)
                                for start, stop in zip(bounds[::2], bounds[1::2], strict=True))))
        return points if len(points) * len(body) <= most else None

    def _is_of_blocks(self, loop: Op, around: Op) -> bool:
        """Whether a loop is over parts of blocks of bytes that typically a single row meets, and all that the loop
        around it reads is of one matrix. Gate and up of Q4_K, written out, take 1.4 of the time as two streams and as
        long as in loops from two places each."""
        late = [op for op in loop.walk() if op.name in LATE]
        matrices = {memory_of(op.operands[0]) for op in around.walk() if op.name == "load" and _dtype(op.result) is u8}
        return self.extents is not None and len(matrices) == 1 and all(
            op.name == "contract" and _dtype(op.result) is i32 and any(self._is_row(v, op) for v in op.operands)
            for op in late)

    def _is_row(self, value: Value, contraction: Op) -> bool:
        assert self.extents is not None
        return all(self.extents.get(axis) == 1 for axis in axes_of(value) if axis not in contraction.attributes["over"])

    def _written_out(self, loop: Op, points: list[tuple[int, ...]]) -> tuple[list[Op], list[Value]]:
        """The ops that a loop becomes, each iteration with axes of its own, and what they carry in the end."""
        counters = loop.attributes["count"]
        carried = loop.operands[2 * counters:]
        made: list[Op] = []
        for point in points:
            numbers = [Op("const", [], (TileType(index),), {"value": number}, None, loop.location) for number in point]
            copy = copy_op(loop, {})
            rename_axes(copy, self.taken)
            (body,) = copy.blocks
            _replace(body.ops, dict(zip(body.arguments, [*(op.result for op in numbers), *carried], strict=True)))
            made += [*numbers, *body.ops[:-1]]
            carried = body.ops[-1].operands
        return made, carried


def _is_in_order(op: Op) -> bool:
    return op.name in ("tiles", "each") and not op.attributes["parallel"]


def _dtype(value: Value) -> DType:
    dtype: DType = value.type.dtype  # type: ignore[union-attr]
    return dtype


def _replace(ops: list[Op], values: dict[Value, Value]) -> None:
    for op in ops:
        for inner in op.walk():
            inner.operands = [values.get(v, v) for v in inner.operands]
