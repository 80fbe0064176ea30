"""Sums of products of bytes, each block of the depth times scales of its own, as one contraction.

Enters a canonical tile function. Leaves, in place of a loop over blocks that sums up

    acc += contract(x[m, b, k], w[n, b, k]).to(f32) * s[m, b] * t[n, b]        k: the places of block b

one contraction of x[m, j] * s[m, j // size] and w[n, j] * t[n, j // size] over all places j, where the caller says
that this serves: matrix instructions take it, which multiply the sums of each block as the loop does. Blocks lie side
by side in one dimension, `k = whole(span(b * size, b * size + size))`, or have dimensions of their own, of which a view
makes one. Holds: the meaning is the same, but for roundings.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import TensorType, TileType, Type, f32, i32, index
from .affine import affine
from .plan import axes_of
from .product_parts import axes_brought
from .sums import is_join

Serves = Callable[[], bool]


def join_blocks(function: Function, multiple: int, serves: Serves) -> bool:
    """In place; whether a loop was joined. multiple: of blocks' sizes. serves: whether the function as it is then
    does."""
    taken = {axis for op in function.walk() for axis in axes_brought(op)}
    if any(map(is_join, function.walk())):
        return False
    for tiles in [op for op in function.walk() if op.name == "tiles" and op.attributes["parallel"]]:
        block = tiles.blocks[0]
        for loop in [op for op in block.ops if op.name == "each" and len(op.results) == 1]:
            joined = _Joined(loop, taken)
            if joined.finds(multiple):
                before, head = list(block.ops), list(function.body.ops)
                place = block.ops.index(loop)
                block.ops[place:place + 1] = joined.ops
                if block is not function.body:
                    function.body.ops[:0] = joined.head
                loop.result.move_to(joined.ops[-1])
                joined.ops[-1].results = [loop.result]
                if serves():
                    return True
                function.body.ops[:], block.ops[:] = head, before
                loop.results = [joined.ops[-1].result]
                loop.result.move_to(loop)
    return False


class _Joined:
    """ops: what stands for a loop. head: what stands at the function's begin."""

    def __init__(self, loop: Op, taken: set[str]) -> None:
        self.loop, self.taken = loop, taken
        self.ops: list[Op] = []
        self.head: list[Op] = []

    def _emit(self, opcode: str, operands: list[Value], type: Type, ops: list[Op] | None = None,
              **attributes: object) -> Value:
        op = Op(opcode, operands, (type,), attributes, None, self.loop.location)
        (self.ops if ops is None else ops).append(op)
        return op.result

    def _number(self, value: int, ops: list[Op] | None = None) -> Value:
        return self._emit("const", [], TileType(index, ()), ops, value=value)

    def finds(self, multiple: int) -> bool:
        """Whether the loop is such a sum; then the ops are there."""
        loop = self.loop
        body = loop.blocks[0]
        if loop.attributes["parallel"] or loop.attributes.get("step", 1) != 1 or len(body.arguments) != 2 \
                or _constant(loop.operands[0]) != 0 or any(op.blocks or op.name == "store" for op in body.ops):
            return False
        self.block, carried = body.arguments
        factors = self._factors(body, carried)
        wholes = [op for op in body.ops if op.name == "whole"]
        products = [op for op in body.ops if op.name == "contract"]
        if factors is None or len(wholes) != 1 or len(products) != 1:
            return False
        (whole,), (product,) = wholes, products
        (self.depth,) = axes_brought(whole)
        size = self._size(whole)
        if product.attributes["over"] != [self.depth] or size is None or size % multiple or size & (size - 1):
            return False
        self.size = size
        casts = [v for v in factors if v.op is not None and v.op.name == "cast" and v.op.operands[0] is product.result]
        scales = [v for v in factors if v not in casts]
        if len(casts) != 1 or product.result.type.dtype is not i32:  # type: ignore[union-attr]
            return False
        return self._write(product, scales)

    def _factors(self, body: Block, carried: Value) -> list[Value] | None:
        """Of what is added to the carried sum."""
        (total,) = body.ops[-1].operands
        if total.op is None or total.op.name != "add" or carried not in total.op.operands:
            return None
        terms = [v for v in total.op.operands if v is not carried]
        factors = list[Value]()
        while terms:
            value = terms.pop()
            if value.op is not None and value.op.name == "mul":
                terms += value.op.operands
            else:
                factors.append(value)
        used = [v for op in body.ops for v in op.operands]
        return factors if used.count(carried) == 1 and total.type == carried.type else None

    def _size(self, whole: Op) -> int | None:
        """Of a block: from 0, or from the blocks before on."""
        start, stop = (affine(v) for v in whole.operands)
        if start is None or stop is None:
            return None
        between = stop.plus(start.scaled(-1))
        if not between.is_constant or start.constant or start.axes:
            return None
        self.apart = not start.scalars
        return between.constant if self.apart or start.scalars == {self.block: between.constant} else None

    def _write(self, product: Op, scales: list[Value]) -> bool:
        loop = self.loop
        axis = next(name for n in count() if (name := f"{self.depth}_{n}" if n else self.depth) not in self.taken)
        blocks = loop.operands[1]
        total = self._emit("mul", [blocks, self._number(self.size)], TileType(index, ()))
        self.ops.append(Op("whole", [self._number(0), total], (), {"axis": axis}, None, loop.location))
        place = self._emit("index", [], TileType(index, (axis,)), axis=axis)
        number = self._emit("floordiv", [place, self._number(self.size)], TileType(index, (axis,)))
        sides = list[Value]()
        for operand in product.operands:
            load = operand.op
            outer = [a for a in axes_of(operand) if a != self.depth]
            if load is None or load.name != "load" or len(outer) != 1:
                return False
            made = self._load(load, axis, place)
            if made is None:
                return False
            value = self._emit("cast", [made], TileType(f32, axes_of(made)))
            mine = [v for v in scales if axes_of(v) == (outer[0],)]
            if len(mine) > 1:
                return False
            for scale in mine:
                scales = [v for v in scales if v is not scale]
                moved = self._scale(scale, number, axis)
                if moved is None:
                    return False
                value = self._emit("mul", [value, moved], TileType(f32, axes_of(value)))
            sides.append(value)
        if scales:
            return False
        type = loop.result.type
        self._emit("contract", sides, type, over=[axis])
        self._emit("add", [loop.operands[-1], self.ops[-1].result], type)
        self.taken.add(axis)
        return True

    def _load(self, load: Op, axis: str, place: Value) -> Value | None:
        tensor, *indices = load.operands
        t = tensor.type
        assert isinstance(t, TensorType)
        *others, last = indices
        if last.op is None or last.op.name != "index" or any(self.depth in axes_of(v) for v in others):
            return None
        if self.apart:
            if not others or others[-1] is not self.block or t.dims[-1] != self.size or tensor.op is not None:
                return None
            others = others[:-1]
            tensor = self._view(tensor, t)
        if self.block in others or any(v.op is not None and v.op in self.loop.blocks[0].ops and v.op.name != "index"
                                       for v in others):
            return None
        others = [self._again(v) for v in others]
        axes = tuple(axis if a == self.depth else a for a in axes_of(load.result))
        return self._emit("load", [tensor, *others, place], TileType(t.dtype, axes))

    def _again(self, value: Value) -> Value:
        """A coordinate that is asked for inside the loop."""
        op = value.op
        if op is None or op not in self.loop.blocks[0].ops:
            return value
        return self._emit("index", [], value.type, axis=op.attributes["axis"])

    def _view(self, tensor: Value, t: TensorType) -> Value:
        """With the last two dimensions as one."""
        sizes = [self._number(dim, self.head) if isinstance(dim, int) else self._emit(
            "dim", [], TileType(index, ()), self.head, name=dim) for dim in t.dims]
        merged = self._emit("mul", sizes[-2:], TileType(index, ()), self.head)
        groups = [[1, 1]] * (len(sizes) - 2) + [[2, 1]]
        return self._emit("view", [tensor, *sizes[:-2], merged], TensorType(t.dtype, ("?",) * (len(sizes) - 1)),
                          self.head, groups=groups)

    def _scale(self, value: Value, number: Value, axis: str) -> Value | None:
        """A scale of a block, for each place of the block."""
        op = value.op
        if op is None or value.type.dtype.bits > 32:  # type: ignore[union-attr]
            return None
        if op.name == "cast":
            inner = self._scale(op.operands[0], number, axis)
            return None if inner is None else self._emit("cast", [inner], TileType(
                value.type.dtype, axes_of(inner)))  # type: ignore[union-attr]
        if op.name != "load" or any(v.op is not None and v.op in self.loop.blocks[0].ops and v.op.name != "index"
                                    for v in op.operands[1:]):
            return None
        indices = [number if v is self.block else self._again(v) for v in op.operands[1:]]
        axes = tuple(dict.fromkeys(a for v in indices for a in axes_of(v)))
        return self._emit("load", [op.operands[0], *indices], TileType(value.type.dtype, axes))  # type: ignore[union-attr]


def _constant(value: Value) -> int | None:
    return int(value.op.attributes["value"]) if value.op is not None and value.op.name == "const" else None
