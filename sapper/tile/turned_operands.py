"""Tensors of whose rows products gather the same elements, turned before the loops that multiply them.

Enters: a canonical tile function. Leaves: where a product has an operand `x[.., m, .., g]` of f32, m an axis of its
rows and g gathered by what does not know m (columns of a sparse matrix, one of a few), a parallel loop before the nest
that copies the tensor with m's dimension last, and a load of that in place of the gather: so lanes along m take
neighbours, where single elements were gathered. Holds: the meaning is the same; only tensors that nothing in the
function stores to are copied.

Measured on a Cascade Lake, one thread: docs/choices/nests.md.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from ..ir.nodes import Function, Op, Value
from ..ir.types import f32
from .ops import place_of
from .plan import axes_of, ops_behind
from .product_parts import axes_brought
from .tensor_copies import copy_tensor, plain_dims, put_last

Typical = Callable[[Value], int | None]

READ_AGAIN = 8
"""How often each element is read, typically and at least, for a copy to be worth it."""


def turn_gathered(
    function: Function, typical: Typical, extent: Callable[[int | str], int], fewest: int, most_bytes: int
) -> None:
    """In place. typical: of an index scalar, None where nothing bounds it before the kernel runs; extent: of a
    dimension. fewest: rows that take the same elements, typically. most_bytes: of all such memory, typically."""
    stored = {place_of(op.operands[0]) for op in function.walk() if op.name == "store"}
    extents = {axis: (typical(stop) or 0) - (typical(start) or 0) for op in function.walk()
               if op.name in ("tiles", "whole")
               for axis, start, stop in zip(axes_brought(op), op.operands[::2], op.operands[1::2], strict=False)}
    for nest in [op for op in function.body.ops if op.attributes.get("parallel")]:
        turned: dict[tuple[Value, int], Value] = {}
        for product in [op for op in nest.walk() if op.name == "contract"]:
            for load in [v.op for v in product.operands if v.op is not None and v.op.name == "load"]:
                tensor, rows = load.operands[0], _rows(load, product)
                sizes = [extent(dim) for dim in plain_dims(tensor)]
                if not rows or tensor.op is not None or tensor in stored or len(sizes) < len(load.operands) - 1:
                    continue
                at = max(rows, key=sizes.__getitem__)
                met = prod(max(1, extents[axis]) for axis in axes_of(load.result)) // max(1, prod(sizes))
                if sizes[at] < fewest or met < READ_AGAIN:
                    continue
                if (tensor, at) not in turned:
                    most_bytes -= f32.size_bytes * prod(sizes)
                    if most_bytes < 0:
                        continue
                    turned[tensor, at] = copy_tensor(function, nest, tensor, last=at)
                load.operands[:] = [turned[tensor, at], *put_last(load.operands[1:], at)]


def _rows(load: Op, product: Op) -> list[int]:
    """The dimensions, but the last, that rows of a product index which take the same elements of it."""
    *others, gathered = load.operands[1:]
    if load.result.type.dtype is not f32 or not any(  # type: ignore[union-attr]
            op.name == "load" for op in ops_behind(gathered)):
        return []
    found = []
    for at, place in enumerate(others):
        axis = place.op.attributes["axis"] if place.op is not None and place.op.name == "index" else None
        if axis in axes_of(product.result) and not any(
                axis in axes_of(other) for number, other in enumerate(load.operands[1:]) if number != at):
            found.append(at)
    return found
