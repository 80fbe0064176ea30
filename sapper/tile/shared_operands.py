"""Elements that several contractions read are loaded once.

Enters a canonical tile function. Leaves: loads of the same elements of a tensor that products of matrices in one block
read along the same axes, as the real and imaginary parts of complex ones do, are one load, so that what it copies,
holds and spreads is so once. Holds: the meaning is the same; the kernel stores to no such tensor.
"""

from __future__ import annotations

from ..ir.nodes import Block, Function, Op, Value
from .ops import place_of
from .plan import axes_of


def share_operands(function: Function) -> None:
    """In place."""
    stored = {place_of(op.operands[0]) for op in function.walk() if op.name == "store"}
    readers: dict[Value, list[Op]] = {}
    for op in function.walk():
        for value in op.operands:
            readers.setdefault(value, []).append(op)

    def visit(block: Block) -> None:
        first: dict[tuple[object, ...], Value] = {}
        members = set(block.ops)
        for op in list(block.ops):
            for nested in op.blocks:
                visit(nested)
            read_by = readers.get(op.result, []) if op.name == "load" else []
            if not read_by or place_of(op.operands[0]) in stored or any(
                    reader.name != "contract" or reader not in members or len(axes_of(reader.result)) < 2
                    for reader in read_by):
                continue
            over = {tuple(sorted(reader.attributes["over"])) for reader in read_by}
            kept = first.setdefault((*sorted(over), op.operands[0], *map(_key, op.operands[1:])), op.result)
            if kept is not op.result:
                for reader in read_by:
                    reader.operands = [kept if value is op.result else value for value in reader.operands]
                block.ops.remove(op)

    visit(function.body)


def _key(index: Value) -> object:
    """The same for the same coordinates of an axis."""
    op = index.op
    return op.attributes["axis"] if op is not None and op.name == "index" else index
