"""The tile interpreter: runs tile IR on NumPy arrays.

Enters: a tile function and its arguments. Leaves: the arguments, changed in place as the kernel changes them. Holds:
the result does not depend on the tile sizes, except for the rounding order of reductions, so that one run with whole
axes as tiles (the default) is what a kernel means.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..ir.extents import evaluate_nested, names_in
from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import Dim, DType, TensorType, TileType, Type, spell_nested
from . import races, semantics
from .ops import memory_of
from .semantics import Array, Axes

Perturb = Callable[[Op, list[Array], Array], Array]
"""(op, operands, result) -> result: sees each computed result and may change it within its rounding error (see
sapper/tile/rounding.py)."""


class RaceError(Exception):
    """Two iterations of a parallel loop touch one element, and one of them writes it."""


def bind_arguments(
    kernel: str, parameters: Sequence[tuple[str, Type]], arguments: Mapping[str, Any]
) -> tuple[dict[str, Array], dict[str, int]]:
    """Arguments by name, and the extent of each symbolic dimension.

    parameters: name and type (TensorType, or a TileType without axes) of each. arguments: an array of the parameter's
    dtype for each tensor (any strides), a number or 0-dimensional array for each scalar. Tensors are used as they
    are; scalars become 0-dimensional arrays.
    TypeError: a missing, unknown or wrongly typed argument. ValueError: rank, or extents that disagree.
    OverflowError: an integer that its dtype cannot hold.
    """
    names = [name for name, _ in parameters]
    for name in arguments:
        if name not in names:
            raise TypeError(f"{kernel} has no parameter {name!r}; expected {', '.join(names)}")
    bound: dict[str, Array] = {}
    dims: dict[str, int] = {}
    made_by: dict[str, str] = {}
    computed: list[tuple[Dim, int, str]] = []
    for name, type in parameters:
        if name not in arguments:
            raise TypeError(f"{kernel}: argument {name!r} is missing")
        given = arguments[name]
        if not isinstance(type, TensorType):
            assert isinstance(type, TileType)
            bound[name] = scalar_argument(kernel, name, type.dtype, given)
            continue
        bound[name] = tensor_argument(kernel, name, type, given)
        for position, (dim, extent) in enumerate(zip(type.dims, given.shape, strict=True)):
            place = f"dimension {position} of {name}"
            if isinstance(dim, int):
                if extent != dim:
                    raise ValueError(f"{kernel}: {place} is {extent}; expected {dim}")
            elif isinstance(dim, tuple):
                computed.append((dim, extent, place))
            elif dims.setdefault(dim, extent) != extent:
                raise ValueError(
                    f"{kernel}: {place} is {extent}; expected {dim} = {dims[dim]} (from {made_by[dim]})")
            else:
                made_by.setdefault(dim, place)
    for dim, extent, place in computed:
        wanted = evaluate_nested(dim, dims)
        if extent != wanted:
            known = ", ".join(f"{name} = {dims[name]} (from {made_by[name]})" for name in dict.fromkeys(names_in(dim)))
            raise ValueError(f"{kernel}: {place} is {extent}; expected {spell_nested(dim)} = {wanted}, where {known}")
    return bound, dims


def tensor_argument(kernel: str, name: str, expected: TensorType, given: Any) -> Array:
    """Check dtype and rank of an array given for a tensor parameter (TypeError, ValueError)."""
    if not isinstance(given, np.ndarray):
        raise TypeError(f"{kernel}: argument {name} is a {type(given).__name__}; expected a NumPy array")
    if given.dtype != semantics.numpy_dtype(expected.dtype):
        raise TypeError(f"{kernel}: argument {name} holds {given.dtype}; expected {expected.dtype}")
    if given.ndim != len(expected.dims):
        raise ValueError(f"{kernel}: argument {name} has {given.ndim} dimensions; expected {len(expected.dims)} "
                         f"({', '.join(map(spell_nested, expected.dims))})")
    return given


def scalar_argument(kernel: str, name: str, dtype: DType, given: Any) -> Array:
    """A number given for a scalar parameter as a 0-dimensional array of its dtype (TypeError, OverflowError)."""
    item = np.asarray(given)
    if item.ndim:
        raise TypeError(f"{kernel}: argument {name} has {item.ndim} dimensions; expected a scalar {dtype}")
    if item.dtype == semantics.numpy_dtype(dtype):
        return item
    if dtype.is_float:
        if item.dtype.kind not in "fiu":
            raise TypeError(f"{kernel}: argument {name} is a {type(given).__name__}; expected a {dtype}")
        return semantics.constant(given, dtype)
    if dtype.kind == "b" or item.dtype.kind not in "iub":
        raise TypeError(f"{kernel}: argument {name} is a {type(given).__name__}; expected a {dtype}")
    info = np.iinfo(semantics.numpy_dtype(dtype))
    if not info.min <= int(given) <= info.max:
        raise OverflowError(f"{kernel}: argument {name} is {given}; expected a {dtype} in {info.min} .. {info.max}")
    return semantics.constant(int(given), dtype)


def interpret(
    function: Function,
    arguments: Mapping[str, Any],
    tile_sizes: Mapping[str, int] | int | None = None,
    *,
    check_races: bool = False,
    perturb: Perturb | None = None,
) -> None:
    """Run a tile function; tensors among the arguments are changed in place.

    arguments: by parameter name, see bind_arguments for what they must be and what it raises.
    tile_sizes: by axis name, or one size for all axes; an axis of `tiles` without one is a single tile. The last tile
        of an axis is as small as it must be.
    check_races: every coordinate of a parallel loop counts as an iteration (the axes of a loop that stores are walked
        one by one, tile_sizes or not: slow, for small shapes); RaceError if two iterations write one element, or one
        reads what another writes, or one store (of `whole` axes) writes an element twice.
    perturb: see Perturb; for judging how sensitive a result is to rounding.
    IndexError: a load or store outside its tensor. Nothing is rolled back then.
    """
    parameters = [(value.name, value.type) for value in function.arguments]
    by_name, dims = bind_arguments(function.name, parameters, arguments)
    bound = {value: by_name[value.name] for value in function.arguments}
    run = _Run(bound, dims, tile_sizes, races.Touches() if check_races else None, perturb)
    with np.errstate(all="ignore"):
        run.block(function.body)


def _place(op: Op) -> str:
    return str(op.location) if op.location else f"op {op.name}"


class _Run:
    """One run: values so far, and the range of each axis in scope."""

    __slots__ = ("cells", "dims", "perturb", "races", "ranges", "tile_sizes", "values")

    def __init__(self, bound: dict[Value, Array], dims: dict[str, int],
                 tile_sizes: Mapping[str, int] | int | None, touches: races.Touches | None,
                 perturb: Perturb | None) -> None:
        self.values = bound
        self.dims = dims
        self.tile_sizes = tile_sizes
        self.races = touches
        self.perturb = perturb
        self.ranges: dict[str, tuple[int, int]] = {}
        self.cells: dict[Value, Array] = {}

    def block(self, block: Block) -> list[Array]:
        """Run a block; what its `yield` yields."""
        values = self.values
        for op in block.ops:
            name = op.name
            if name == "yield":
                return [values[operand] for operand in op.operands]
            handler = _HANDLERS.get(name)
            if handler is not None:
                handler(self, op)
                continue
            if name not in semantics.ELEMENTWISE:
                raise ValueError(f"{_place(op)}: the tile interpreter knows no op {name!r}")
            type = op.results[0].type
            assert isinstance(type, TileType)
            result = semantics.elementwise(name, [self.on(operand, type.axes) for operand in op.operands], type.dtype)
            self.define(op, result)
        return []

    def on(self, value: Value, axes: Axes) -> Array:
        """A value, ready to broadcast over axes."""
        type = value.type
        assert isinstance(type, TileType)
        return semantics.align(self.values[value], type.axes, axes)

    def define(self, op: Op, result: Array) -> None:
        if self.perturb is not None:
            result = self.perturb(op, [self.values[operand] for operand in op.operands], result)
        self.values[op.results[0]] = result

    def extent(self, axis: str) -> int:
        start, stop = self.ranges[axis]
        return stop - start

    def dim(self, op: Op) -> None:
        name = op.attributes["name"]
        if name not in self.dims:
            raise ValueError(f"{_place(op)}: no tensor argument has the dimension {name}")
        self.values[op.results[0]] = np.asarray(self.dims[name], np.int64)

    def const(self, op: Op) -> None:
        type = op.results[0].type
        assert isinstance(type, TileType)
        self.values[op.results[0]] = semantics.constant(op.attributes["value"], type.dtype)

    def full(self, op: Op) -> None:
        type = op.results[0].type
        assert isinstance(type, TileType)
        shape = tuple(self.extent(axis) for axis in type.axes)
        self.values[op.results[0]] = np.full(shape, self.values[op.operands[0]])

    def index(self, op: Op) -> None:
        self.values[op.results[0]] = np.arange(*self.ranges[op.attributes["axis"]], dtype=np.int64)

    def whole(self, op: Op) -> None:
        start, stop = (int(self.values[operand]) for operand in op.operands)
        self.ranges[op.attributes["axis"]] = (start, max(start, stop))

    def access(self, op: Op, indices: Sequence[Value], axes: Axes, doing: str) -> tuple[Array, tuple[Array, ...]]:
        """The array of a load or store, and its index arrays, checked."""
        tensor = op.operands[0]
        array = self.values[tensor]
        where = tuple(self.on(index, axes) for index in indices)
        if len(where) != array.ndim:
            raise ValueError(f"{_place(op)}: {len(where)} indices for {tensor.name}, which has {array.ndim} dimensions")
        semantics.check_bounds(array.shape, where, tensor.name, lambda: _place(op), doing)
        if any(index.size == 0 for index in where):  # NumPy would still check the indices that are not empty
            where = tuple(np.broadcast_arrays(*where))
        return array, where

    def touch(self, op: Op, array: Array, where: tuple[Array, ...],
              record: Callable[[Value, int, Array], None]) -> None:
        tensor, shape, flat = self.touched(op, array, where)
        try:
            record(tensor, math.prod(shape), flat)
        except races.Meeting as meeting:
            place = np.unravel_index(meeting.element, shape)[:len(tensor.type.dims)]  # type: ignore[union-attr]
            raise RaceError(f"{_place(op)}: {tensor.name}[{', '.join(str(int(i)) for i in place)}] {meeting.what}"
                            ) from None

    def touched(self, op: Op, array: Array, where: tuple[Array, ...]) -> tuple[Value, tuple[int, ...], Array]:
        """A tensor, its shape, and which of its elements are meant, as numbers in C order; where views of the tensor
        are taken, its bytes, which are one more dimension."""
        tensor = op.operands[0]
        cells = self.cells.get(tensor)
        if cells is not None:
            root = memory_of(tensor)
            return root, self.cells[root].shape, np.asarray(cells[where]).reshape(-1)
        if not where:
            return tensor, array.shape, np.zeros(1, np.int64)
        flat = np.ravel_multi_index(np.broadcast_arrays(*where), array.shape)
        return tensor, array.shape, np.asarray(flat).reshape(-1)

    def load(self, op: Op) -> None:
        type = op.results[0].type
        assert isinstance(type, TileType)
        array, where = self.access(op, op.operands[1:], type.axes, "load")
        if self.races is not None and array.size:
            self.touch(op, array, where, self.races.load)
        self.define(op, np.asanyarray(array[where]))

    def store(self, op: Op) -> None:
        indices = op.operands[2:]
        axes = semantics.union_axes(*(i.type.axes for i in indices if isinstance(i.type, TileType)))
        array, where = self.access(op, indices, axes, "store")
        join = op.attributes.get("join")
        if self.races is not None and array.size:
            self.touch(op, array, where, self.races.store if join is None else self.races.join)
        if join is None:
            array[where] = self.on(op.operands[1], axes)
        elif array.size:
            self.join(op, join, array, where, self.on(op.operands[1], axes))

    def join(self, op: Op, name: str, array: Array, where: tuple[Array, ...], values: Array) -> None:
        elements, total = semantics.joined(name, array, where, values)
        if self.perturb is not None:
            size = semantics.joined("add", np.abs(array.astype(np.float64)), where, np.abs(values.astype(np.float64)))
            count = semantics.joined("add", np.zeros(array.shape), where, np.ones(()))
            total = self.perturb(op, [size[1], count[1]], total)
        array[elements] = total

    def view(self, op: Op) -> None:
        type = op.results[0].type
        assert isinstance(type, TensorType)
        extents = [int(self.values[extent]) for extent in op.operands[1:]]
        try:
            self.values[op.results[0]] = semantics.view(self.values[op.operands[0]], extents, type.dtype)
        except ValueError as error:
            raise ValueError(f"{_place(op)}: view of {op.operands[0].name}: {error}") from None
        if self.races is not None:
            root = memory_of(op.operands[0])
            whole = self.values[root]
            if root not in self.cells:
                self.cells[root] = np.arange(whole.nbytes, dtype=np.int64).reshape((*whole.shape, whole.itemsize))
            self.cells[op.results[0]] = self.cells[root].reshape((*extents, self.values[op.results[0]].itemsize))

    def buffer(self, op: Op) -> None:
        type = op.results[0].type
        assert isinstance(type, TensorType)
        shape = tuple(int(self.values[extent]) for extent in op.operands)
        self.values[op.results[0]] = np.zeros(shape, semantics.numpy_dtype(type.dtype))

    def part(self, op: Op) -> None:
        self.block(op.blocks[0])

    def reduce(self, op: Op) -> None:
        operand, kind, over = op.operands[0], op.attributes["kind"], op.attributes["over"]
        type, result = operand.type, op.results[0].type
        assert isinstance(type, TileType) and isinstance(result, TileType)
        x = self.values[operand]
        starts = [self.ranges[axis][0] for axis in over]
        value = semantics.reduce(kind, x, type.axes, over, result.dtype, starts)
        kept = tuple(axis for axis in type.axes if axis not in over)
        self.define(op, semantics.align(value, kept, result.axes))

    def scan(self, op: Op) -> None:
        type = op.operands[0].type
        assert isinstance(type, TileType)
        at = type.axes.index(op.attributes["over"][0])
        self.define(op, semantics.scan(op.attributes["kind"], self.values[op.operands[0]], at, type.dtype))

    def topk(self, op: Op) -> None:
        type = op.operands[0].type
        assert isinstance(type, TileType)
        (over,) = op.attributes["over"]
        found = semantics.topk(self.values[op.operands[0]], type.axes, over, self.extent(op.attributes["into"]),
                               self.ranges[over][0])
        self.values.update(zip(op.results, found, strict=True))

    def contract(self, op: Op) -> None:
        a, b = op.operands
        result = op.results[0].type
        assert isinstance(a.type, TileType) and isinstance(b.type, TileType) and isinstance(result, TileType)
        self.define(op, semantics.contract(self.values[a], a.type.axes, self.values[b], b.type.axes,
                                           op.attributes["over"], result.axes, result.dtype))

    def tiles(self, op: Op) -> None:
        axes: list[str] = op.attributes["axes"]
        count = len(axes)
        bounds = [int(self.values[operand]) for operand in op.operands[: 2 * count]]
        one_by_one = self.races is not None and any(inner.name == "store" for inner in op.walk())
        steps: list[list[tuple[int, int]]] = []
        for position, axis in enumerate(axes):
            start, stop = bounds[2 * position: 2 * position + 2]
            if one_by_one:
                size: int | None = 1
            else:
                size = self.tile_sizes.get(axis) if isinstance(self.tile_sizes, Mapping) else self.tile_sizes
            if size is None:
                size = max(1, stop - start)
            elif size < 1:
                raise ValueError(f"tile size of axis {axis} is {size}; expected at least 1")
            steps.append([(at, min(at + size, stop)) for at in range(start, stop, size)])

        def iterations() -> Iterator[list[Array]]:
            for ranges in itertools.product(*steps):
                for axis, tile in zip(axes, ranges, strict=True):
                    self.ranges[axis] = tile
                yield []

        self.loop(op, op.operands[2 * count:], iterations())

    def each(self, op: Op) -> None:
        count = op.attributes["count"]
        step = op.attributes.get("step", 1)
        bounds = [int(self.values[operand]) for operand in op.operands[: 2 * count]]
        ranges = [range(bounds[2 * i], bounds[2 * i + 1], step) for i in range(count)]
        self.loop(op, op.operands[2 * count:],
                  ([np.asarray(i, np.int64) for i in indices] for indices in itertools.product(*ranges)))

    def loop(self, op: Op, initial: Sequence[Value], iterations: Iterator[list[Array]]) -> None:
        carried = [self.values[value] for value in initial]
        block = op.blocks[0]
        touches = races.Loop(op.name == "tiles") if self.races is not None and op.attributes["parallel"] else None
        if touches is not None and self.races is not None:
            self.races.loops.append(touches)
        for indices in iterations:
            if touches is not None:
                touches.iterations.append(self.iteration(op, indices))
            for argument, value in zip(block.arguments, (*indices, *carried), strict=True):
                self.values[argument] = value
            yielded = self.block(block)
            if carried:
                carried = yielded
        if touches is not None and self.races is not None:
            self.races.loops.pop()
        for result, value in zip(op.results, carried, strict=True):
            self.values[result] = value

    def iteration(self, op: Op, indices: list[Array]) -> str:
        """An iteration as its author would name it."""
        if op.name == "each":
            names = [argument.name or "index" for argument in op.blocks[0].arguments]
            return ", ".join(f"{name} = {int(i)}" for name, i in zip(names, indices, strict=False))
        return ", ".join(f"{axis} = {self.ranges[axis][0]}" for axis in op.attributes["axes"])

    def branch(self, op: Op) -> None:
        taken = op.blocks[0] if bool(self.values[op.operands[0]]) else op.blocks[1]
        for result, value in zip(op.results, self.block(taken), strict=True):
            self.values[result] = value


_HANDLERS: dict[str, Callable[[_Run, Op], None]] = {
    "dim": _Run.dim, "const": _Run.const, "full": _Run.full, "index": _Run.index, "whole": _Run.whole,
    "load": _Run.load, "store": _Run.store, "reduce": _Run.reduce, "contract": _Run.contract,
    "scan": _Run.scan, "topk": _Run.topk, "tiles": _Run.tiles,
    "each": _Run.each, "if": _Run.branch, "buffer": _Run.buffer, "view": _Run.view, "part": _Run.part,
}
