"""The tensors of an eager run: loads, stores and views of a NumPy array.

Enters: a tensor argument and, for each access, its indices. Leaves: tiles, or the array changed in place. Holds: every
index is checked against the extents; loops whose author asserts that their iterations are disjoint see each access.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from ..ir.types import TensorType, bool_, index
from ..lang import builtins as language
from ..lang import context
from . import races, semantics
from .eager_place import author_place, fail
from .eager_values import Operators, Tile, as_dtype, as_tile, scalar_index, whole_number
from .semantics import Array, Axes

JOINS: dict[Any, str] = {
    python_operator.add: "add", python_operator.sub: "add", python_operator.and_: "and", python_operator.or_: "or",
    python_operator.xor: "xor", language.maximum: "max", language.max: "max", language.minimum: "min",
    language.min: "min",
}
"""Of functions by which an element may be updated several times in one statement: the op that joins the values."""


class TensorView(Operators):
    """A tensor argument: reached only by indices, one for each dimension. shape: an int for a static extent, else an
    index scalar."""

    __slots__ = ("array", "dtype", "memory", "name", "shape")

    def __init__(self, array: Array, type: TensorType, name: str, memory: Array | None = None) -> None:
        self.array = array
        self.memory = array if memory is None else memory
        self.dtype = type.dtype
        self.name = name
        self.shape = tuple(extent if isinstance(dim, int) else scalar_index(extent)
                           for dim, extent in zip(type.dims, array.shape, strict=True))

    def refuse(self) -> NoReturn:
        fail("tensor-without-index", f"tensor {self.name} is used as a value", self.name,
            f"{self.name}[...] with an index for each dimension")

    def _indices(self, indices: Any, doing: str) -> tuple[tuple[Array, ...], Axes]:
        given = [as_tile(i, index) for i in (indices if isinstance(indices, tuple) else (indices,))]
        if len(given) != self.array.ndim:
            fail("rank", f"{self.name} is indexed with the wrong number of indices", f"{len(given)}",
                 f"{self.array.ndim}")
        for tile in given:
            if not tile.dtype.is_integer:
                fail("gather-dtype", f"an index of {self.name} that is no integer", str(tile.dtype),
                     "an integer dtype")
        axes = semantics.union_axes(*(tile.axes for tile in given))
        where = tuple(semantics.align(tile.array, tile.axes, axes) for tile in given)
        semantics.check_bounds(self.array.shape, where, self.name, lambda: str(author_place()), doing)
        if any(index.size == 0 for index in where):  # NumPy would still check the indices that are not empty
            where = tuple(np.broadcast_arrays(*where))
        return where, axes

    def _touch(self, where: tuple[Array, ...], store: bool, join: bool = False) -> None:
        """Tell the loops whose iterations are asserted to be disjoint which bytes are meant."""
        touches = context.current().touches
        if not touches.loops or not self.array.size:
            return
        spans = [(extent - 1) * step for extent, step in zip(self.memory.shape, self.memory.strides, strict=True)]
        first = -sum(min(0, span) for span in spans)  # bytes from the lowest address of the tensor to its element 0
        size = first + sum(max(0, span) for span in spans) + self.memory.itemsize
        start = first + self.array.__array_interface__["data"][0] - self.memory.__array_interface__["data"][0]
        places = sum((index * step for index, step in zip(where, self.array.strides, strict=True)), np.int64(start))
        flat = (np.asarray(places).reshape(-1, 1) + np.arange(self.array.itemsize)).reshape(-1)
        try:
            (touches.join if join else touches.store if store else touches.load)(self.name, size, flat)
        except races.Meeting as meeting:
            element = np.argwhere(flat == meeting.element)[0, 0] // self.array.itemsize
            place = [int(i.reshape(-1)[element]) for i in np.broadcast_arrays(*where)]
            fail("disjoint", f"{self.name}[{', '.join(map(str, place))}] {meeting.what}", "iterations that meet",
                 "iterations none of which touches what another writes",
                 "leave disjoint=True out, or mend the indices")

    def __getitem__(self, indices: Any) -> Tile:
        where, axes = self._indices(indices, "load")
        self._touch(where, store=False)
        return Tile(np.array(self.array[where]), axes, self.dtype)

    def __setitem__(self, indices: Any, value: Any) -> None:
        where, axes = self._indices(indices, "store")
        self._touch(where, store=True)
        tile = as_tile(value, self.dtype)
        self._check_stored(tile, axes)
        self.array[where] = semantics.align(tile.array, tile.axes, axes)

    def _check_stored(self, tile: Tile, axes: Axes) -> None:
        if tile.dtype is not self.dtype:
            fail("store-dtype", f"a stored value has another element type than {self.name}", str(tile.dtype),
                 str(self.dtype), f"write value.to({self.dtype})")
        lost = [axis for axis in tile.axes if axis not in axes]
        if lost:
            fail("store-axes", f"a value stored to {self.name} spans axes that the index lacks",
                 f"axes {', '.join(lost)}", f"axes among {', '.join(axes) or 'none'}",
                 "index with them, or reduce them first")

    def update(self, indices: Any, operator: Callable[[Any, Any], Any], value: Any, turned: bool = False) -> None:
        """self[indices] = operator(self[indices], value), but that an element that several indices name is joined with
        the values of all of them. turned: the operands change places."""
        after = operator(value, self[indices]) if turned else operator(self[indices], value)
        where, axes = self._indices(indices, "store")
        name = None if turned and operator is python_operator.sub else JOINS.get(operator)
        flat = np.ravel_multi_index(np.broadcast_arrays(*where), self.array.shape) if where and self.array.size else ()
        if name is None or self.dtype is bool_ or np.unique(flat).size == np.size(flat):
            self[indices] = after
            return
        tile = as_tile(value, self.dtype)
        self._check_stored(as_tile(after, self.dtype), axes)
        self._touch(where, store=True, join=True)
        added = semantics.align(tile.array, tile.axes, axes)
        added = semantics.elementwise("neg", [added], self.dtype) if operator is python_operator.sub else added
        elements, total = semantics.joined(name, self.array, where, added)
        self.array[elements] = total

    def view(self, *extents: Any, dtype: Any = None) -> TensorView:
        """The same memory with other extents, or as another dtype."""
        kind = self.dtype if dtype is None else as_dtype(dtype)
        sizes = [whole_number(extent) for extent in extents] or list(self.array.shape)
        try:
            array = semantics.view(self.array, sizes, kind)
        except ValueError as error:
            fail("view", f"{self.name} cannot be viewed like this", str(error))
        return TensorView(array, TensorType(kind, tuple(sizes)), self.name, self.memory)

    def __repr__(self) -> str:
        return f"tensor {self.name}: {self.dtype}{list(self.array.shape)}\n{self.array}"
