"""Matrices packed once for the kernels that read them again and again.

Enters a kernel, the name of one of its tensors, and an array. Leaves a `Packed`, which calls take in place of the
array: the compiler knows its layout (tile.schedule.Panels) and neither copies nor transposes it. Holds: which layout
that is follows from the kernel, the types and the target alone, so one packed matrix serves calls of all shapes.

Rows of a panel lie in the order in which a contraction reads them, so that a panel is one stream from memory, and as
the slots of packed dot products want them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy

from ..ir.types import DType
from ..tile.schedule import Panels
from .arguments import Parameter, as_array, view_tensor
from .buffers import empty
from .cache import disk_cache
from .dtypes import numpy_dtype
from .errors import ArgumentError

Array = numpy.ndarray[Any, numpy.dtype[Any]]

START_PRODUCT = {"i8": -128, "u8": 128}
"""A turned operand makes each product too large by 128 (of i8) or -128 (of u8) times the other's element: sums start
with that taken off (sapper/lane/packed.py)."""


class Packed:
    """A matrix in panels. shape: of the matrix, as the kernel declares it. data: its bytes, on huge pages if large, at
    `address`. layout: all that code depends on."""

    __slots__ = ("address", "data", "dtype", "layout", "panels", "shape")

    def __init__(self, data: Array, shape: tuple[int, int], dtype: DType, panels: Panels) -> None:
        self.data = data
        self.shape = shape
        self.dtype = dtype
        self.panels = panels
        self.address: int = data.ctypes.data
        self.layout = (shape, dtype.name, panels)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy lies elsewhere, and is as aligned as this one is."""
        return _again, (self.data, self.shape, self.dtype, self.panels)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def blocks(self) -> Array:
        """The panels as an array: [panels, slots along the depth, columns of a panel, elements of a slot]."""
        width, elements = self.panels.width, self.panels.elements
        columns, depth = self.shape[self.panels.columns], self.shape[self.panels.depth]
        parts = -(-columns // width), -(-depth // elements), width, elements
        plain = self.data[:int(numpy.prod(parts)) * self.dtype.size_bytes].view(numpy_dtype(self.dtype))
        return plain.reshape(parts)

    def put(self, first: int, columns: Array) -> None:
        """Fill some columns, given as rows: from a multiple of the width on, to the last or another multiple of it."""
        blocks, (count, depth) = self.blocks, columns.shape
        _, slots, width, elements = blocks.shape
        if self.dtype.name in START_PRODUCT:
            raise ValueError(f"put: found {self.dtype.name}; expected a dtype whose sums begin at 0; mend: pack_array")
        if first % width or depth != self.shape[self.panels.depth] or (count % width and (
                first + count != self.shape[self.panels.columns])):
            raise ValueError(f"put: found {count} columns of {depth} elements from {first} on; expected whole panels "
                             f"of {width} columns of {self.shape[self.panels.depth]}")
        for start in range(0, count, width):
            part = columns[start : start + width]
            panel = blocks[(first + start) // width]
            if depth == slots * elements:
                panel[:, : len(part)] = part.reshape(len(part), slots, elements).swapaxes(0, 1)
            else:
                for element in range(elements):
                    alike = part[:, element::elements]
                    panel[: alike.shape[1], : len(part), element] = alike.T

    def __repr__(self) -> str:
        return f"Packed({self.dtype.name}{list(self.shape)}, {self.panels})"

    def unpack(self) -> Array:
        """The matrix as a plain array, of the bits that were packed."""
        blocks = self.blocks
        panels, slots, width, elements = blocks.shape
        columns, depth = self.shape[self.panels.columns], self.shape[self.panels.depth]
        matrix = blocks.transpose(0, 2, 1, 3).reshape(panels * width, slots * elements)[:columns, :depth]
        return numpy.ascontiguousarray(matrix if self.panels.columns == 0 else matrix.T)


def _again(data: Array, shape: tuple[int, int], dtype: DType, panels: Panels) -> Packed:
    """What was copied or pickled."""
    memory = empty(data.shape, "u8")
    memory[:] = data
    return Packed(memory, shape, dtype, panels)


def pack(kernel: Any, name: str, array: Any, target: Any = None) -> Packed:
    """A matrix in the layout in which `kernel` reads its tensor `name`: pass it in place of the array.

    array: NumPy, or with `__dlpack__`, of the tensor's dtype and two dimensions; it is copied. target: as for a call,
    by default this CPU. Raises ArgumentError for another array, KernelError or LoweringError (a ValueError) where the
    kernel does more with the tensor than contract it.
    """
    from ..codegen.pipeline import panels_of_kernel
    from .launch import configuration

    types = dict(kernel.parameters)
    if name not in types or not hasattr(types[name], "dims"):
        known = ", ".join(n for n, t in kernel.parameters if hasattr(t, "dims"))
        raise ArgumentError("type", kernel.name, name, "no tensor of that name", f"one of {known}", "name a tensor")
    view = view_tensor(array, kernel.name, Parameter.of(name, types[name]))
    if len(view.shape) != 2:
        raise ArgumentError("rank", kernel.name, name, f"shape {view.shape}", "a matrix", "pack matrices one by one")
    panels = panels_of_kernel(kernel, name, configuration().find_target(target))
    return pack_array(as_array(view), view.dtype, panels)


def packed_empty(
    kernel: Any, name: str, rows: int, columns: int, memory: Callable[..., Array] = empty, target: Any = None
) -> Packed:
    """A matrix [rows, columns] in the layout in which `kernel` reads its tensor `name`, to be filled by `put`.

    memory: what makes it, like `empty`. target: that it is for (None: this CPU). Raises as `pack` does.
    """
    dtype = dict(kernel.parameters)[name].dtype
    panels = _kept_panels(kernel, name, target)
    shape = (rows, columns)
    parts = -(-shape[panels.columns] // panels.width) * panels.width, -(-shape[panels.depth] // panels.elements)
    data = memory((parts[0] * parts[1] * panels.elements * dtype.size_bytes,), "u8")
    if shape[panels.columns] % panels.width or shape[panels.depth] % panels.elements:
        data[:] = 0  # what is left of the last panel and the last slots
    return Packed(data, shape, dtype, panels)


@cache
def _kept_panels(kernel: Any, name: str, target: Any) -> Panels:
    """How a tensor of a kernel is packed; kept on disk beside compiled kernels, so that a process that compiles nothing
    need not load the compiler."""
    from .launch import configuration

    now = configuration()
    target = now.find_target(None) if target is None else target
    kept = disk_cache()
    key = json.dumps(["panels", now.toolchain_key(), kernel.name, kernel.source_digest(), name, now.target_key(target)])
    found = kept.get(key) if kept is not None else None
    if found is not None:
        return Panels(*json.loads(found)["panels"])
    from ..codegen.pipeline import panels_of_kernel

    panels = panels_of_kernel(kernel, name, target)
    if kept is not None:
        kept.put(key, json.dumps({"name": f"panels of {name} of {kernel.name}", "panels": panels}).encode())
    return panels


def pack_array(matrix: Array, dtype: DType, panels: Panels) -> Packed:
    width, elements = panels.width, panels.elements
    shape = matrix.shape
    if panels.columns == 1:
        matrix = matrix.T
    columns, depth = matrix.shape
    parts = -(-columns // width), width, -(-depth // elements), elements
    padded = numpy.zeros((parts[0] * width, parts[2] * elements), matrix.dtype)
    padded[:columns, :depth] = matrix
    blocks = padded.reshape(parts).transpose(0, 2, 1, 3)
    starts = numpy.zeros(0, numpy.int32)
    if dtype.name in START_PRODUCT:
        whole = padded[:, :depth // elements * elements].sum(axis=1, dtype=numpy.int64)
        starts = (whole * START_PRODUCT[dtype.name]).astype(numpy.int32)
    data = empty((blocks.size * dtype.size_bytes + starts.nbytes,), "u8")
    data[:blocks.size * dtype.size_bytes].view(matrix.dtype).reshape(blocks.shape)[...] = blocks
    data[blocks.size * dtype.size_bytes:].view(numpy.int32)[...] = starts
    return Packed(data, (shape[0], shape[1]), dtype, panels)
