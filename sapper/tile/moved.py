"""Narrow floats that are only moved, as integers: none is widened when it is read, and rounded when it is stored.

Enters: a tile function. Leaves: the same function, in which a tensor of bf16, f16 or float8 is one of integers of that
size, if all that is loaded from it is stored to such tensors, and all that is stored to it loaded from such. Holds:
memory is the same in the end, bit for bit.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.nodes import Function, Op, Value
from ..ir.types import DType, bf16, f8e4m3, f8e5m2, f16, i8, i16
from .ops import memory_of
from .sums import is_join

MOVED_AS: dict[DType, DType] = {bf16: i16, f16: i16, f8e4m3: i8, f8e5m2: i8}


def move_as_integers(function: Function) -> None:
    """In place."""
    accesses = [op for op in function.walk() if op.name in ("load", "store") and _dtype(op.operands[0]) in MOVED_AS]
    if not accesses:
        return
    moved = {memory_of(op.operands[0]) for op in accesses}
    loads = {op.result: memory_of(op.operands[0]) for op in accesses if op.name == "load"}
    stores = {op for op in accesses if op.name == "store" and not is_join(op)}
    # Pairs of tensors of which neither is moved unless the other is; None: what is not moved.
    bound: list[tuple[Value, Value | None]] = [
        (memory_of(op.operands[0]), loads.get(op.operands[1]) if op in stores else None)
        for op in accesses if op.name == "store"]
    bound += [(loads[v], memory_of(op.operands[0]) if op in stores else None)
              for op in function.walk() for v in op.operands if v in loads]
    while fixed := {t for pair in bound for t in pair if t in moved and not moved.issuperset(pair)}:
        moved -= fixed
    for op in accesses:
        if memory_of(op.operands[0]) in moved:
            _retype(op)


def _dtype(value: Value) -> DType:
    return value.type.dtype  # type: ignore[union-attr]


def _retype(op: Op) -> None:
    """A load or store, and the tensor with what it is a view of."""
    tensors: list[Value] = [op.operands[0]]
    while tensors[-1].op is not None and tensors[-1].op.name == "view":
        tensors.append(tensors[-1].op.operands[0])
    for value in (*tensors, *op.results):
        dtype = _dtype(value)
        value.type = replace(value.type, dtype=MOVED_AS.get(dtype, dtype))     # type: ignore[type-var]
