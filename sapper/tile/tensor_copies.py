"""A tensor copied to memory of the kernel's own in f32, by a parallel loop before a nest that reads it
(widened_operands.py, turned_operands.py)."""

from __future__ import annotations

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import TensorType, TileType, f32
from .parts import Writer
from .product_parts import axes_brought, rename_axes


def plain_dims(tensor: Value) -> list[int | str]:
    """The dimensions of a tensor that are numbers or names."""
    assert isinstance(tensor.type, TensorType)
    return [dim for dim in tensor.type.dims if not isinstance(dim, tuple)]


def put_last(places: list[Value], at: int) -> list[Value]:
    """With one behind all others."""
    return [*places[:at], *places[at + 1 :], places[at]]


def copy_tensor(function: Function, nest: Op, tensor: Value, last: int = -1, apart: bool = False) -> Value:
    """Add the loop, and return what the tensor is copied to. Its dimensions are plain ones; last: that which comes
    last; apart: see the tile op `buffer`."""
    made: list[Op] = []
    top = Writer(made, nest)
    extents = [top.value("dim", [], name=dim) if isinstance(dim, str) else top.number(dim)
               for dim in plain_dims(tensor)]
    last %= len(extents)
    buffer, zero = top.buffer(f32, put_last(extents, last), apart), top.number(0)
    axes = [f"{tensor.name}{number}" for number in range(len(extents))]
    body = Block()
    writer = Writer(body.ops, nest)
    places = writer.places(axes, [zero] * len(axes))
    dtype = tensor.type.dtype  # type: ignore[union-attr]
    value = writer.value("load", [tensor, *places], TileType(dtype, tuple(axes)))
    if dtype is not f32:
        value = writer.value("cast", [value], TileType(f32, tuple(axes)))
    writer.op("store", [buffer, value, *put_last(places, last)])
    writer.op("yield", [])
    loop = Op("tiles", [v for extent in extents for v in (zero, extent)], [], {"axes": axes, "parallel": True}, [body],
              top.location)
    rename_axes(loop, {axis for op in function.walk() for axis in axes_brought(op)})
    before = function.body.ops.index(nest)
    function.body.ops[before:before] = [*made, loop]
    return buffer
