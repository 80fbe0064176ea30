"""Tensors of 16-bit floats that products in loops meet again and again, widened to f32 once.

Enters: a canonical tile function. Leaves: where a nest of parallel loops multiplies elements of such a tensor in loops
in order, a parallel loop before the nest that widens all of the tensor to a buffer, and loads of that in place of
those of the tensor. So rows that each panel of a matrix meets (fp8, whose weights are joined to bf16) are widened
once, not once for each panel. Products that a walk makes by itself are left alone: what these read again is copied, and
so widened, as it is staged. Holds: the meaning is the same; no loop reads more than a tensor has, and none is widened
of which a number that only the call knows says how much is read, as of a cache.

Measured on a Cascade Lake: docs/choices/products.md.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from ..ir.nodes import Function, Op, Value
from ..ir.types import TensorType, TileType, bf16, f16, f32
from .ops import memory_of, place_of
from .plan import axes_of
from .product_parts import axes_brought
from .tensor_copies import copy_tensor, plain_dims

Typical = Callable[[Value], int | None]

_OF_EXTENTS = frozenset({"dim", "const", "index", "add", "sub", "mul", "floordiv", "mod", "min", "max"})
"""What indices are made of that go over all of a dimension."""


def widen_operands(function: Function, typical: Typical, rows: int, columns: int, most_bytes: int) -> None:
    """In place. typical: of an index scalar, None where nothing bounds it before the kernel runs. rows, columns: how
    many a tensor has, and each of them meets, typically at least, for it to be widened. most_bytes: of all such memory,
    typically."""
    stored = {place_of(op.operands[0]) for op in function.walk() if op.name == "store"}
    read: dict[Value, list[Op]] = {}
    for op in function.walk():
        if op.name in ("load", "view"):
            read.setdefault(memory_of(op.operands[0]), []).append(op)
    if not any(_is_narrow(tensor) for tensor in read):
        return
    for nest in [op for op in function.body.ops if op.attributes.get("parallel")]:
        finder = _Finder(nest, typical)
        for tensor, loads in read.items():
            if tensor.op is None and tensor not in stored and _is_narrow(tensor) and all(
                    finder.is_met(load, rows, columns) for load in loads):
                most_bytes -= f32.size_bytes * prod(_extent(function, dim, typical) for dim in plain_dims(tensor))
                if most_bytes >= 0:
                    _widen(function, nest, tensor, loads)


def _is_narrow(tensor: Value) -> bool:
    """Also whether its extents are plain ones."""
    t = tensor.type
    return isinstance(t, TensorType) and t.dtype in (bf16, f16) and len(plain_dims(tensor)) == len(t.dims)


def _extent(function: Function, dim: int | str, typical: Typical) -> int:
    if isinstance(dim, int):
        return dim
    found = next((op for op in function.walk() if op.name == "dim" and op.attributes["name"] == dim), None)
    return (typical(found.result) if found is not None else None) or 1


class _Finder:
    """Looks through a nest. loops: around each load, from the outside. users: the ops that read what is loaded."""

    def __init__(self, nest: Op, typical: Typical) -> None:
        self.typical = typical
        self.loops: dict[Op, tuple[Op, ...]] = {}
        self.users: dict[Value, list[Op]] = {}
        self.bounds: dict[str | Value, tuple[Value, Value]] = {}
        self._enter(nest, ())

    def _enter(self, op: Op, around: tuple[Op, ...]) -> None:
        around = (*around, op)
        names = axes_brought(op) if op.name == "tiles" else op.blocks[0].arguments if op.name == "each" else []
        self.bounds |= dict(zip(names, zip(op.operands[::2], op.operands[1::2], strict=False), strict=False))
        for inner in (inner for block in op.blocks for inner in block.ops):
            if inner.name == "whole":
                self.bounds[inner.attributes["axis"]] = (inner.operands[0], inner.operands[1])
            if inner.name == "load":
                self.loops[inner] = around
            for value in inner.operands:
                self.users.setdefault(value, []).append(inner)
            if inner.blocks:
                self._enter(inner, around)

    def is_met(self, load: Op, least_rows: int, least_columns: int) -> bool:
        """Whether all that reads a load multiplies its rows by columns, in loops in order inside the nest."""
        loops, users = self.loops.get(load, ()), self.users.get(load.result, ())
        parallel = {axis for loop in loops for axis in axes_brought(loop) if loop.attributes.get("parallel")}
        if not users or all(loop.attributes.get("parallel") for loop in loops) or not all(
                self._goes_over_all(index) for index in load.operands[1:]):
            return False
        for user in users:
            if user.name != "contract" or user.result.type.dtype is not f32:  # type: ignore[union-attr]
                return False
            own = axes_of(load.result)
            if not set(own) <= {*parallel, *user.attributes["over"]}:
                return False        # it goes across the lanes, and is widened by vectors
            rows = [axis for axis in own if axis in parallel]
            columns = [axis for axis in axes_of(user.result) if axis in parallel and axis not in own]
            if self._extent(rows) < least_rows or self._extent(columns) < least_columns:
                return False
        return True

    def _extent(self, axes: list[str]) -> int:
        ends = [tuple(map(self.typical, self.bounds[axis])) for axis in axes]
        return prod((stop or 0) - (start or 0) for start, stop in ends)

    def _goes_over_all(self, value: Value) -> bool:
        """Whether an index depends on extents alone, and on what goes over these."""
        op = value.op
        if op is None or op.name == "index":
            place = value if op is None else op.attributes["axis"]
            return place in self.bounds and all(map(self._goes_over_all, self.bounds[place]))
        return op.name in _OF_EXTENTS and all(map(self._goes_over_all, op.operands))


def _widen(function: Function, nest: Op, tensor: Value, loads: list[Op]) -> None:
    """The loop that widens a tensor, before the nest, and the loads of what it leaves."""
    buffer = copy_tensor(function, nest, tensor, apart=True)
    for load in loads:
        load.operands[0] = buffer
        load.result.type = TileType(f32, axes_of(load.result))
