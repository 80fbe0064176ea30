"""One random kernel: its source, and arguments that fit it."""

from __future__ import annotations

import hashlib
import linecache
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from sapper.ir.types import DType
from sapper.tile.semantics import numpy_dtype

SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 24, 33)
"""Empty, single, ragged and even extents."""

MOST_ELEMENTS = 2000
"""The product of all extents stays below this: interpreters walk nested loops one index at a time."""

SPECIALS = (np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-40, -1e-45, 1e-6, 3e38, -6e4, 1.0, -1.0)
"""Hostile floats, denormals of f32 among them."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor parameter.

    dims: names, or static sizes. role: "data", "output" (also read, perhaps), or "index": integers from 0 up to, but
    without, the extent `below`; "length": up to and with it; "starts": likewise, rising, from 0 to it; "places": as
    "index", and no two are equal.
    """

    name: str
    dtype: DType
    dims: tuple[str | int, ...]
    role: str = "data"
    below: str = ""


@dataclass(frozen=True)
class KernelCase:
    """A kernel as source text.

    name: the kernel's name in it. tensors, scalars: parameters. derived: extents that follow from others, as
    (dimension, base, factor, offset): dimension = base * factor + offset. positive: dimensions that may not be empty.
    features: what it uses, for choosing and for statistics. extents: of all dimensions, where they are no matter of the
    seed. in_place: pairs (output, data) for which one array may be given: each element is read before it is written.
    """

    source: str
    name: str
    tensors: tuple[TensorSpec, ...]
    scalars: tuple[tuple[str, DType, str], ...] = ()
    derived: tuple[tuple[str, str, int, int], ...] = ()
    positive: frozenset[str] = frozenset()
    features: frozenset[str] = field(default=frozenset())
    extents: tuple[tuple[str, int], ...] = ()
    in_place: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        return f"KernelCase({self.name}: {', '.join(sorted(self.features))})\n{self.source}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # or Hypothesis would print field by field

    def load(self) -> Any:
        """The Kernel. The source is run as a module whose lines linecache knows, so that inspect finds them."""
        digest = hashlib.sha256(self.source.encode()).hexdigest()[:16]
        file = f"<kernel {digest}>"
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
        namespace: dict[str, Any] = {"__name__": f"random_kernel_{digest}"}
        exec(compile(self.source, file, "exec"), namespace)
        return namespace[self.name]

    def settled(self, expected: Mapping[str, Any]) -> dict[str, Any]:
        """What is expected of tensors but for those that an output may have taken the place of."""
        return {name: one for name, one in expected.items() if name not in [data for _, data in self.in_place]}

    def sizes(self, seed: int) -> dict[str, int]:
        """An extent for each dimension."""
        if self.extents:
            return dict(self.extents)
        rng = np.random.default_rng(seed)
        derived = {dimension for dimension, *_ in self.derived}
        names = list(dict.fromkeys(
            [d for t in self.tensors for d in t.dims if isinstance(d, str) and d not in derived]
            + [base for _, base, _, _ in self.derived]))
        sizes = {}
        for name in names:
            size = int(rng.choice(SIZES))
            sizes[name] = max(1, size) if name in self.positive else size
        while math.prod(max(1, size) for size in sizes.values()) > MOST_ELEMENTS:
            largest = max(sizes, key=lambda name: sizes[name])
            sizes[largest] //= 2
        for dimension, base, factor, offset in self.derived:
            sizes[dimension] = sizes[base] * factor + offset
        return sizes

    def make_arguments(self, seed: int, hostile: bool = True, strided: bool = True) -> dict[str, Any]:
        """Arguments by name, the same for the same seed.

        hostile: NaN, infinities, denormals and extreme integers among the elements. strided: transposed, padded,
        stepped and, for inputs, reversed arrays among the tensors.
        """
        rng = np.random.default_rng([seed, 1])
        sizes = self.sizes(seed)
        arguments: dict[str, Any] = {}
        for tensor in self.tensors:
            shape = tuple(sizes[d] if isinstance(d, str) else d for d in tensor.dims)
            if tensor.role in ("index", "length"):
                limit = sizes[tensor.below] + (tensor.role == "length")
                values = rng.integers(0, max(1, limit), shape)
            elif tensor.role == "starts":
                values = np.sort(rng.integers(0, sizes[tensor.below] + 1, shape))
                values[0], values[-1] = 0, sizes[tensor.below]
            elif tensor.role == "places":
                values = rng.permutation(sizes[tensor.below])[:math.prod(shape)].reshape(shape)
            else:
                values = random_values(rng, shape, tensor.dtype, hostile and tensor.role == "data")
            values = np.asarray(values).astype(numpy_dtype(tensor.dtype))
            arguments[tensor.name] = lay_out(rng, values, tensor.role != "output") if strided else values
        for output, data in self.in_place:
            if rng.random() < 0.75:
                arguments[output] = arguments[data] = arguments[data].copy()
        for name, dtype, role in self.scalars:
            if role:
                arguments[name] = int(rng.integers(0, sizes[role] + 1))
            else:
                arguments[name] = random_values(rng, (), dtype, False).astype(numpy_dtype(dtype)).item()
        return arguments


def random_values(rng: np.random.Generator, shape: tuple[int, ...], dtype: DType, hostile: bool) -> np.ndarray:
    """Random elements of a dtype, as an array of it; one in eight is extreme if hostile."""
    target = numpy_dtype(dtype)
    if dtype.is_float:
        values = rng.standard_normal(shape) * np.exp2(rng.integers(-3, 4, shape))
        if hostile:
            values = np.where(rng.random(shape) < 0.125, rng.choice(np.array(SPECIALS), shape), values)
        with np.errstate(all="ignore"):
            return np.asarray(values.astype(np.float32).astype(target) if target != np.float64 else values)
    if dtype.kind == "b":
        return np.asarray(rng.random(shape) < 0.5)
    info = ml_dtypes.iinfo(target)
    values = rng.integers(max(int(info.min), -100), min(int(info.max), 100), shape, endpoint=True)
    if hostile:
        ends = np.array([int(info.min), int(info.max), 0, 1, int(info.max) - 1], np.int64)
        values = np.where(rng.random(shape) < 0.125, rng.choice(ends, shape), values)
    return np.asarray(values).astype(target)


def lay_out(rng: np.random.Generator, values: np.ndarray, reverse: bool = False) -> np.ndarray:
    """The same elements in a random layout: as they are, transposed, with padded rows, every other element, or, if
    reverse, backwards along some axes (negative strides)."""
    if values.ndim == 0:
        return values
    choice = int(rng.integers(0, 5 if reverse else 4))
    if choice == 0:
        return values
    if choice == 4:
        backwards = tuple(slice(None, None, int(step)) for step in rng.choice([1, -1], values.ndim))
        return np.ascontiguousarray(values[backwards])[backwards]
    if choice == 1:
        order = rng.permutation(values.ndim)
        return np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))
    padded = [n + int(rng.integers(1, 4)) for n in values.shape] if choice == 2 else [2 * n for n in values.shape]
    room = np.zeros(padded, values.dtype)
    view = room[tuple(slice(0, n) if choice == 2 else slice(0, 2 * n, 2) for n in values.shape)]
    view[...] = values
    return view


__all__ = ["KernelCase", "TensorSpec", "lay_out", "random_values"]
