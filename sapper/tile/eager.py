"""The eager run: the author's own Python function, on NumPy.

Enters: a kernel and its arguments. Leaves: the arguments, changed in place. Holds: the function's own code object runs,
line by line, with tiles, scalars, axes (eager_values.py) and tensors (eager_tensor.py) that are backed by NumPy arrays,
so that pdb, breakpoints and print work inside a kernel. It means what the tile IR means (sapper/tile/interpret.py):
both compute through semantics.py.

Names that Python defines itself (sum, max, min, abs, round, range, int, float, bool) mean sapper's inside a kernel: a
copy of the function runs (eager_overlay.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..ir.types import TensorType, bool_, f64, index
from ..lang import builtins as language
from ..lang import context
from ..lang.kernel import Kernel
from . import races, semantics
from .eager_overlay import Overlay
from .eager_place import assigned_names, fail
from .eager_tensor import TensorView
from .eager_values import (
    Axis,
    Span,
    Tile,
    as_dtype,
    as_tile,
    binary,
    bounds_of,
    pair,
    plain,
    scalar_index,
    unary,
    whole_number,
)
from .interpret import bind_arguments


def run(kernel: Kernel, arguments: Sequence[Any] | Mapping[str, Any],
        tile_sizes: Mapping[str, int] | int | None = None) -> None:
    """Run a kernel's Python function; tensors among the arguments are changed in place.

    arguments: in the order of the kernel's parameters, or by name; scalars may be left out if they have defaults.
    They are checked as sapper.tile.interpret.bind_arguments says.
    tile_sizes: by the name of the loop variable, or one size for all; an axis without one is a single tile.
    KernelError: what has no meaning, at the author's line. IndexError: an access out of bounds.
    """
    names = [name for name, _ in kernel.parameters]
    if not isinstance(arguments, Mapping):
        if len(arguments) > len(names):
            raise TypeError(f"{kernel.name} takes {len(names)} arguments; {len(arguments)} were given")
        arguments = dict(zip(names, arguments, strict=False))
    bound, dims = bind_arguments(kernel.name, kernel.parameters, {**kernel.defaults, **arguments})
    values: list[Any] = []
    for name, type in kernel.parameters:
        if isinstance(type, TensorType):
            values.append(TensorView(bound[name], type, name))
        else:
            values.append(Tile(bound[name].copy(), (), type.dtype))
    running = Context(dims, tile_sizes)
    with context.use(running), np.errstate(all="ignore"):
        Overlay().of(kernel.python_function)(*values)


class Context:
    """What the functions of sapper.lang.builtins do during one eager run.

    dims: extents by name. tile_sizes: see run.
    """

    def __init__(self, dims: Mapping[str, int],
                 tile_sizes: Mapping[str, int] | int | None = None) -> None:
        self.dims = dims
        self.tile_sizes = tile_sizes
        self.touches = races.Touches()
        self._used: dict[str, int] = {}

    def dim(self, name: str) -> int:
        """The extent of a symbolic dimension in this call."""
        if name not in self.dims:
            fail("unbound-dim", "a dimension that no parameter has", name, ", ".join(self.dims))
        return self.dims[name]

    # Loops, ranges and axes.

    def _axis_names(self, count: int) -> list[tuple[str, str]]:
        """For each of count axes, the author's name and one that is unique in this run."""
        names = assigned_names()
        if len(names) != count:
            names = ["axis"] * count
        unique = []
        for name in names:
            used = self._used.get(name, 0)
            self._used[name] = used + 1
            unique.append((name, f"{name}_{used}" if used else name))
        return unique

    def tiles(self, *extents: Any) -> Iterator[Any]:
        """Axes, tile by tile, the last one fastest."""
        if not extents:
            fail("bad-range", "tiles() without an extent", "", "tiles(M, ...)")
        steps: list[list[Axis]] = []
        for (name, unique), extent in zip(self._axis_names(len(extents)), extents, strict=True):
            start, stop = bounds_of(extent)
            size = self.tile_sizes.get(name) if isinstance(self.tile_sizes, Mapping) else self.tile_sizes
            size = max(1, stop - start) if size is None else size
            steps.append([Axis(unique, at, min(at + size, stop))
                          for at in range(start, stop, size)])
        return self._walk(steps)

    def each(self, *extents: Any, disjoint: bool = False) -> Iterator[Any]:
        """Index scalars, the last one fastest. disjoint: whether iterations meet is watched."""
        if not extents:
            fail("bad-range", "each() without an extent", "", "each(B, ...)")
        walked = self._walk([[scalar_index(at) for at in range(*bounds_of(extent))] for extent in extents])
        return self._watched(walked, assigned_names()) if disjoint else walked

    def _watched(self, walked: Iterator[Any], names: list[str]) -> Iterator[Any]:
        loop = races.Loop()
        self.touches.loops.append(loop)
        for item in walked:
            indices = item if isinstance(item, tuple) else (item,)
            loop.iterations.append(", ".join(f"{name} = {int(i)}" for name, i in zip(names, indices, strict=True)))
            yield item
        self.touches.loops.remove(loop)

    @staticmethod
    def _walk(steps: Sequence[Sequence[Any]]) -> Iterator[Any]:
        return iter(steps[0]) if len(steps) == 1 else itertools.product(*steps)

    def whole(self, extent: Any) -> Axis:
        """An axis that is one tile."""
        start, stop = bounds_of(extent)
        ((_, unique),) = self._axis_names(1)
        return Axis(unique, start, max(start, stop), True)

    def span(self, start: Any, stop: Any) -> Span:
        """A range with a start."""
        return Span(start, stop)

    def range(self, *bounds: Any) -> Iterator[Tile]:
        """Python's range, over index scalars."""
        numbers = [whole_number(bound) for bound in bounds]
        return (scalar_index(at) for at in range(*numbers))

    # Tiles from nothing.

    def zeros(self, *axes: Any, dtype: Any) -> Tile:
        """A tile of zeros."""
        dtype = as_dtype(dtype)
        return self.full(*axes, value=False if dtype is bool_ else 0, dtype=dtype)

    def full(self, *axes: Any, value: Any, dtype: Any = None) -> Tile:
        """A tile that holds one value everywhere."""
        value = plain(value)
        if dtype is not None:
            dtype = as_dtype(dtype)
        elif isinstance(value, Tile) and not value.weak:
            dtype = value.dtype
        else:
            fail("call-arguments", "full needs a dtype", repr(value), "dtype=...", "write dtype=f32")
        scalar = as_tile(value, dtype)
        if scalar.axes:
            fail("scalar-needed", "full of a tile", repr(scalar).splitlines()[0], "a scalar")
        if scalar.dtype is not dtype:
            fail("dtype-mix", "full of a value of another dtype", str(scalar.dtype), str(dtype),
                 f"write value.to({dtype})")
        for axis in axes:
            if not isinstance(axis, Axis):
                fail("unknown-axis", "a value is used where an axis is expected", repr(axis), "a loop variable")
        shape = tuple(axis.stop - axis.start for axis in axes)
        return Tile(np.full(shape, scalar.array), tuple(axis.axes[0] for axis in axes), dtype)

    # Elementwise.

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        """a where the condition holds, else b."""
        if isinstance(condition, bool):
            return a if condition else b
        chosen = as_tile(condition, bool_)
        if chosen.dtype is not bool_:
            fail("op-dtype", "a condition that is no bool", str(chosen.dtype), "bool", "compare it, as in x != 0")
        left, right, weak = pair(a, b)
        axes = semantics.union_axes(chosen.axes, left.axes, right.axes)
        operands = [semantics.align(tile.array, tile.axes, axes) for tile in (chosen, left, right)]
        return Tile(semantics.elementwise("select", operands, left.dtype), axes, left.dtype, weak)

    def maximum(self, a: Any, b: Any) -> Any:
        """a if a > b else b."""
        a, b = plain(a), plain(b)
        return binary("max", a, b) if isinstance(a, Tile) or isinstance(b, Tile) else a if a > b else b

    def minimum(self, a: Any, b: Any) -> Any:
        """a if a < b else b."""
        a, b = plain(a), plain(b)
        return binary("min", a, b) if isinstance(a, Tile) or isinstance(b, Tile) else a if a < b else b

    # Reductions.

    def _reduce(self, kind: str, x: Any, over: Any) -> Tile:
        x = plain(x)
        if not isinstance(x, Tile):
            fail("bad-argument", f"{kind} of a constant", repr(x), "a tile")
        axes = over if isinstance(over, tuple) else (over,)
        names = []
        for axis in axes:
            if not isinstance(axis, Axis) or axis.axes[0] not in x.axes:
                fail("over", f"{kind}(..., over=) names no axis of the tile", repr(axis),
                     f"axes among {', '.join(x.axes)}")
            names.append(axis.axes[0])
        if kind in ("argmax", "argmin") and len(names) != 1:
            fail("over", f"{kind} over several axes", ", ".join(names), "one axis")
        if not x.dtype.compute or x.dtype is bool_:
            fail("op-dtype", f"{kind} of {x.dtype}", str(x.dtype), "a number", "write x.to(i32)")
        dtype = index if kind.startswith("arg") else x.dtype
        value = semantics.reduce(kind, x.array, x.axes, names, dtype, [axis.start for axis in axes])
        return Tile(value, tuple(axis for axis in x.axes if axis not in names), dtype)

    def sum(self, x: Any, *, over: Any) -> Tile:
        """The sum over axes."""
        return self._reduce("sum", x, over)

    def max(self, *values: Any, over: Any = None) -> Any:
        """Over axes, or of several values."""
        return self._extreme("max", values, over)

    def min(self, *values: Any, over: Any = None) -> Any:
        """Over axes, or of several values."""
        return self._extreme("min", values, over)

    def _extreme(self, kind: str, values: tuple[Any, ...], over: Any) -> Any:
        if over is not None:
            if len(values) != 1:
                fail("bad-argument", f"{kind} over an axis takes one tile", str(len(values)), "1")
            return self._reduce(kind, values[0], over)
        if len(values) < 2:
            fail("bad-argument", f"{kind} of one value", str(len(values)), f"{kind}(a, b), or {kind}(t, over=n)")
        result = values[0]
        for value in values[1:]:
            result = self.maximum(result, value) if kind == "max" else self.minimum(result, value)
        return result

    def argmax(self, x: Any, *, over: Any) -> Tile:
        """The coordinate of the largest element."""
        return self._reduce("argmax", x, over)

    def argmin(self, x: Any, *, over: Any) -> Tile:
        """The coordinate of the smallest element."""
        return self._reduce("argmin", x, over)

    # Axes taken in their order.

    def _ordered(self, what: str, x: Any, over: Any) -> Tile:
        """The operand, checked."""
        x = plain(x)
        if not isinstance(x, Tile) or not isinstance(over, Axis) or over.axes[0] not in x.axes:
            fail("over", f"{what}(..., over=) names no axis of the tile", repr(over), "an axis of the tile")
        if not x.dtype.compute or x.dtype is bool_:
            fail("op-dtype", f"{what} of {x.dtype}", str(x.dtype), "a number", "write x.to(i32)")
        self._need_whole(what, over)
        return x

    @staticmethod
    def _need_whole(what: str, axis: Axis) -> None:
        if not axis.whole:
            fail("whole-axis", f"{what} along axis {axis.axes[0]} of a loop", repr(axis), "an axis of `whole`",
                 f"take {axis.axes[0]} = whole(...)")

    def _scan(self, kind: str, x: Any, over: Any) -> Tile:
        x = self._ordered(f"cum{kind}", x, over)
        return Tile(semantics.scan(kind, x.array, x.axes.index(over.axes[0]), x.dtype), x.axes, x.dtype)

    def cumsum(self, x: Any, *, over: Any) -> Tile:
        """The sum of each element and all before it."""
        return self._scan("sum", x, over)

    def cummax(self, x: Any, *, over: Any) -> Tile:
        """The largest of each element and all before it."""
        return self._scan("max", x, over)

    def cummin(self, x: Any, *, over: Any) -> Tile:
        """The smallest of each element and all before it."""
        return self._scan("min", x, over)

    def topk(self, x: Any, k: Any, *, over: Any) -> tuple[Tile, Tile]:
        """The largest elements, and their coordinates."""
        x = self._ordered("topk", x, over)
        if not isinstance(k, Axis) or k.start or k.axes[0] in x.axes:
            fail("unknown-axis", "the second axis of topk counts the results", repr(k),
                 "an axis from 0 that the tile does not span", "take another: k = whole(8)")
        self._need_whole("topk", k)
        name = over.axes[0]
        values, places = semantics.topk(x.array, x.axes, name, k.stop, over.start)
        axes = (*(axis for axis in x.axes if axis != name), k.axes[0])
        return Tile(values, axes, x.dtype), Tile(places, axes, index)


def _constant_function(name: str, x: Any) -> Any:
    """A function of a Python number is one, as precise as Python has it."""
    if name == "abs":
        return abs(x)
    return float(semantics.elementwise(name, [np.asarray(float(x))], f64))


def _make_unary(name: str) -> Any:
    def method(self: Context, x: Any) -> Any:
        x = plain(x)
        return unary(name, x) if isinstance(x, Tile) else _constant_function(name, x)

    method.__name__ = name
    method.__doc__ = f"{name}, elementwise."
    return method


def _asm(self: Context, piece: Any, *inputs: Any, meaning: Any, tolerance: float = 0.0) -> Any:
    """What the piece means; only compiled code runs it."""
    return meaning(*[i for i in inputs if isinstance(plain(i), Tile)])


Context.asm = _asm  # type: ignore[attr-defined]

for _name in language.UNARY_NAMES:
    setattr(Context, _name, _make_unary(_name))


__all__ = ["Axis", "Context", "Overlay", "Span", "TensorView", "Tile", "run"]
