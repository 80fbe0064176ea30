"""Lines of few elements that follow each other in memory, as one long line: pixels of three channels, rows of five.

Enters: a canonical tile function. Leaves: where a parallel loop over tiles, which computes elements one by one, reads
and writes tensors along two of its axes that are neighbours there, the second of them all of its dimension and short,
one axis in their place, along which views of the tensors lie:

    for h, w, c in tiles(H, W, 3): y[h, w, c] = x[h, w + 1, c] - x[h, w, c]
    for h, n in tiles(H, W * 3):   y[h, n] = x[h, n + 3] - x[h, n]

So vectors are full, while a line by itself fills a part of one. Holds: the meaning is the same.

Measured on a Zen 3, one thread: docs/choices/nests.md.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import TensorType, TileType, index
from .affine import Affine, affine
from .matrix_form import axis_at
from .parts import Writer
from .plan import LATE, axes_of
from .product_parts import Typical, axes_brought
from .sums import is_join
from .zeros import is_zero

_REFUSED = frozenset({*LATE, "asm", "buffer", "view", "part"})
_COORDINATES = frozenset({"add", "sub", "mul"})


def join_lines(function: Function, typical: Typical, is_contiguous: Callable[[Value], bool], most: int) -> None:
    """In place. typical: of an index scalar, None where nothing bounds it before the kernel runs. is_contiguous:
    whether a tensor is known to lie in C order. most: elements of a line, typically, that is short."""
    for nest in list(function.body.ops):
        for block in [function.body, *(block for op in nest.walk() for block in op.blocks)]:
            for loop in [op for op in block.ops if op.name == "tiles" and (op is nest or block is not function.body)]:
                while (found := _Lines(loop, typical, is_contiguous, most).pair()) is not None:
                    _join(function, nest, block, loop, *found)


class _Lines:
    """Looks at one loop."""

    def __init__(self, loop: Op, typical: Typical, is_contiguous: Callable[[Value], bool], most: int) -> None:
        self.loop, self.typical, self.is_contiguous, self.most = loop, typical, is_contiguous, most

    def pair(self) -> tuple[str, str] | None:
        """Two axes that are one line, the second going along memory first."""
        loop = self.loop
        ops = loop.blocks[0].ops
        if not loop.attributes["parallel"] or loop.results or "repeats" in loop.attributes or any(
                op.blocks or op.name in _REFUSED or is_join(op) for op in ops):
            return None
        bounds = _bounds(loop)
        known = [axis for axis, (start, _) in bounds.items() if is_zero(start)]
        for outer, inner in permutations(known, 2):
            extent = self.typical(bounds[inner][1])
            if outer in loop.attributes["axes"] and extent is not None and extent <= self.most and all(
                    self._fits(op, outer, inner, bounds[inner][1]) for op in ops):
                return outer, inner
        return None

    def _fits(self, op: Op, outer: str, inner: str, stop: Value) -> bool:
        """Whether an op has both axes or none, as neighbours where it is one on memory."""
        pair = {outer, inner}
        if op.name in ("index", "whole") or _is_coordinate(op):
            return True
        first = {"load": 1, "store": 2}.get(op.name, len(op.operands))
        values = [*op.operands[:first], *op.results]
        if any(pair & set(axes_of(v)) not in (set(), pair) for v in values if isinstance(v.type, TileType)) or any(
                v.op is not None and (v.op.name == "index" or _is_coordinate(v.op)) and pair & set(axes_of(v))
                for v in op.operands[:first] if isinstance(v.type, TileType)):
            return False
        places = op.operands[first:]
        at = [n for n, place in enumerate(places) if pair & set(axes_of(place))]
        if not at:
            return True
        tensor = op.operands[0]
        assert isinstance(tensor.type, TensorType)
        dims = tensor.type.dims
        form = affine(places[at[0]])
        return (at == [at[0], at[0] + 1] and form is not None and form.axes == {outer: 1}
                and axis_at(places[at[1]]) == inner and tensor.op is None and self.is_contiguous(tensor)
                and not any(isinstance(dim, tuple) for dim in dims) and _is_extent(stop, dims[at[1]]))


def _bounds(loop: Op) -> dict[str, tuple[Value, Value]]:
    """Start and stop of axes that a loop brings, or what is in it: with nothing summed, these are walked likewise."""
    pairs = {axis: loop.operands[2 * n:2 * n + 2] for n, axis in enumerate(loop.attributes["axes"])}
    pairs |= {op.attributes["axis"]: op.operands for op in loop.blocks[0].ops if op.name == "whole"}
    return {axis: (start, stop) for axis, (start, stop) in pairs.items()}


def _is_coordinate(op: Op) -> bool:
    """Whether an op makes an index of others, which a place may be and an element is not."""
    return op.name in _COORDINATES and op.results[0].type == TileType(index, axes_of(op.result))


def _is_extent(stop: Value, dim: object) -> bool:
    op = stop.op
    return op is not None and dim == (op.attributes["name"] if op.name == "dim" else
                                      op.attributes["value"] if op.name == "const" else None)


def _join(function: Function, nest: Op, block: Block, loop: Op, outer: str, inner: str) -> None:
    """nest: what stands at the top. block: where the loop is."""
    taken = {axis for op in function.walk() for axis in axes_brought(op)}
    name = next(made for n in range(len(taken) + 1) if (made := f"{outer}_{inner}" + (f"_{n}" if n else ""))
                not in taken)
    before: list[Op] = []
    top = Writer(before, loop)
    bounds = _bounds(loop)
    around: list[Op] = []
    writer = Writer(around, loop)
    stop = bounds[inner][1].op
    assert stop is not None
    length = writer.value(stop.name, [], **stop.attributes)     # a number or a dimension, known before the loop
    start, size = writer.number(0), writer.value("mul", [bounds[outer][1], length])
    views: dict[tuple[Value, int], Value] = {}

    def view(tensor: Value, at: int) -> Value:
        if (tensor, at) not in views:
            assert isinstance(tensor.type, TensorType)
            sizes = [top.number(dim) if isinstance(dim, int) else top.value("dim", [], name=dim)
                     for dim in tensor.type.dims]
            sizes[at:at + 2] = [top.value("mul", sizes[at:at + 2])]
            views[tensor, at] = top.op("view", [tensor, *sizes], [TensorType(
                tensor.type.dtype, ("?",) * len(sizes))], None, groups=[
                [2 if n == at else 1, 1] for n in range(len(sizes))]).result
        return views[tensor, at]

    ops: list[Op] = []
    for op in loop.blocks[0].ops:
        first = {"load": 1, "store": 2}.get(op.name, len(op.operands))
        at = next((n for n, place in enumerate(op.operands[first:]) if outer in axes_of(place)), None)
        if at is not None and first < len(op.operands):
            writer = Writer(ops, op)
            place = writer.value("index", [], TileType(index, (name,)), axis=name)
            form = affine(op.operands[first + at])
            assert form is not None
            moved = _scalar(writer, Affine(form.constant, {}, form.scalars))
            if moved is not None:
                place = writer.value("add", [place, writer.value("mul", [moved, length])], place.type)  # type: ignore[arg-type]
            op.operands[first + at:first + at + 2] = [place]
            op.operands[0] = view(op.operands[0], at)
        ops.append(op)
        for value in op.results:
            if isinstance(value.type, TileType) and op.name != "index" and not _is_coordinate(op):
                value.type = TileType(value.type.dtype, tuple(dict.fromkeys(
                    name if axis in (outer, inner) else axis for axis in value.type.axes)))
    loop.blocks[0].ops[:] = ops
    _drop(loop.blocks[0], outer, inner)
    axes = [name if axis == outer else axis for axis in loop.attributes["axes"] if axis != inner]
    loop.attributes["axes"] = axes
    loop.operands = [v for axis in axes for v in ((start, size) if axis == name else bounds[axis])]
    at = block.ops.index(loop)
    block.ops[at:at] = around
    at = function.body.ops.index(nest)
    function.body.ops[at:at] = before


def _scalar(writer: Writer, form: Affine) -> Value | None:
    """A sum without axes; None for 0."""
    terms = [value if factor == 1 else writer.value("mul", [value, writer.number(factor)])
             for value, factor in form.scalars.items()]
    terms += [writer.number(form.constant)] if form.constant else []
    total = terms[0] if terms else None
    for term in terms[1:]:
        assert total is not None
        total = writer.value("add", [total, term])
    return total


def _drop(block: Block, outer: str, inner: str) -> None:
    """Leave out axes that are no more, and coordinates of them."""
    block.ops[:] = [op for op in block.ops if (
        op.attributes["axis"] != inner if op.name == "whole" else not (op.name == "index" or _is_coordinate(op)) or (
            {outer, inner}.isdisjoint(axes_of(op.result))))]
