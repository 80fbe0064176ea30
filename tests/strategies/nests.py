"""Random kernels of the forms that users write, at extents where vectors, tiles and what is left of them meet.

`generate` draws over the whole language and keeps extents small. Here a kernel has a nest of one to three axes of
tiles around what models are made of: products whose operands are loaded, computed, gathered or windows, several of them
in a row; softmax along a loop; states that a loop carries; sums, largest elements and scans along one axis while others
are tiled; ragged rows; rows of experts; a loop of tiles inside; a second nest that reads what the first one stored. Two
axes are long in most: around the lanes of a vector, of several, and of a warp. Values are tame, so that the bounds of
rounding are tight and an element that is wrong, or not written, shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from sapper.codegen.pipeline import facts_of
from sapper.ir.nodes import Function
from sapper.ir.types import DTYPES, DType, f32, i32
from sapper.lane.packed import panels_for
from sapper.runtime.packed import Packed, pack_array
from sapper.tile.schedule import LoweringError

from .generate import HEADER
from .kernel_case import KernelCase, TensorSpec

LONG = (8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 63, 64, 65, 70, 96, 128, 133)
SHORT = (1, 2, 3, 4, 5, 7, 1, 2, 3, 4, 5, 7, 0)
MOST_POINTS = 12000
"""The product of the extents of a nest: the lane interpreter takes some seconds for as many."""

TILE_SIZES = (None, 9, 16)
"""At which the interpreter runs them; one by one would take long."""
GUESSES = (1, 8, 64, 64, 512, 2048, 16384)

FLOATS = ("f32", "f32", "f32", "f32", "bf16", "f16", "f64")
INTEGERS = ("i32", "i32", "i8", "u8", "i64")
FACTORS = (("f32", "f32", "f32"), ("f32", "f32", "f32"), ("f32", "f32", "f32"), ("bf16", "bf16", "f32"),
           ("bf16", "bf16", "f32"), ("f32", "bf16", "f32"), ("bf16", "f32", "f32"), ("f16", "f16", "f32"),
           ("f16", "f32", "f32"), ("i8", "i8", "i32"), ("u8", "i8", "i32"), ("f64", "f64", "f64"))
"""Element types of the operands of a product, and of its sum."""
NARROW = {"f32": ("bf16", "f16", "f8e4m3", "i8", "u8", "i4"), "bf16": ("f8e4m3", "f8e5m2", "i8"),
          "f16": ("f8e5m2",), "i32": ("i8", "u8", "i4"), "i8": ("i4",)}
"""What is stored of an element type that is then widened."""

Choose = Callable[[Sequence[Any]], Any]


class _Axis:
    """A name in scope that walks a dimension. kind: tiles, whole, each, range, or carried: of a loop of tiles along
    which sums are made."""

    __slots__ = ("dim", "kind", "name")

    def __init__(self, name: str, dim: str, kind: str) -> None:
        self.name, self.dim, self.kind = name, dim, kind


class _Value:
    __slots__ = ("axes", "dtype", "text")

    def __init__(self, text: str, dtype: DType, axes: frozenset[str]) -> None:
        self.text, self.dtype, self.axes = text, dtype, axes


class Writer:
    """A kernel being written. scope: the axes and indices of loops that are open."""

    def __init__(self, choose: Choose, most_points: int = MOST_POINTS) -> None:
        self.choose = choose
        self.most_points = most_points
        self.lines: list[str] = []
        self.depth = 1
        self.tensors: list[TensorSpec] = []
        self.scalars: list[tuple[str, DType, str]] = []
        self.extents: dict[str, Callable[[dict[str, int]], int]] = {}
        self.sizes: dict[str, int] = {}
        self.scope: list[_Axis] = []
        self.values: list[_Value] = []
        self.nest: list[str] = []
        self.nests: list[list[str]] = []
        self.outputs: list[tuple[str, DType, tuple[str, ...]]] = []
        self.layers = False
        self.replaceable: list[tuple[str, DType, frozenset[str]]] = []
        self.in_place: list[tuple[str, str]] = []
        self.features: set[str] = set()
        self.counter = 0

    # Choices and names.

    def chance(self, percent: int) -> bool:
        return self.choose(range(100)) < percent

    def some(self, options: Iterable[Any], percent: int) -> list[Any]:
        return [option for option in options if self.chance(percent)]

    def shuffled(self, options: Iterable[Any]) -> list[Any]:
        left, result = list(options), []
        while left:
            result.append(left.pop(self.choose(range(len(left)))))
        return result

    def fresh(self, prefix: str) -> str:
        self.counter += 1
        return f"{prefix}{self.counter}"

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def new_dim(self, long: int, least: int = 0) -> str:
        """A dimension of its own; long: percent of those that are so."""
        name = self.fresh("D")
        self.sizes[name] = max(least, self.choose(LONG if self.chance(long) else SHORT))
        return name

    def name_value(self, text: str, dtype: DType, axes: Iterable[str]) -> _Value:
        value = _Value(self.fresh("v"), dtype, frozenset(axes))
        self.line(f"{value.text} = {text}")
        self.values.append(value)
        return value

    # Scope.

    def open(self, dims: Sequence[str], kind: str, ranges: Sequence[str] | None = None) -> list[_Axis]:
        axes = [_Axis(self.fresh("x" if kind in ("tiles", "whole", "carried") else "j"), dim, kind) for dim in dims]
        names = ", ".join(axis.name for axis in axes)
        walked = ", ".join(ranges or dims)
        if kind == "whole":
            for axis, one in zip(axes, ranges or dims, strict=True):
                self.line(f"{axis.name} = whole({one})")
        else:
            self.line(f"for {names} in {'tiles' if kind == 'carried' else kind}({walked}):")
            self.depth += 1
        self.scope += axes
        self.nest += dims
        return axes

    def close(self, axes: Sequence[_Axis], values: int) -> None:
        """End a loop; what was named in it is out of scope."""
        for axis in axes:
            self.scope.remove(axis)
        del self.values[values:]
        self.depth -= 1

    def of_kind(self, *kinds: str) -> list[_Axis]:
        return [axis for axis in self.scope if axis.kind in kinds]

    def spans(self) -> list[_Axis]:
        return self.of_kind("tiles", "whole", "carried")

    def named(self, names: Iterable[str]) -> list[_Axis]:
        return [axis for axis in self.scope if axis.name in set(names)]

    # Loads.

    def load(self, axes: Iterable[str], dtype: DType) -> str:
        """A tensor of an element type at indices that span just these axes."""
        plain = 85 if self.layers else 55       # percent of axes that index by themselves
        wanted = self.named(axes)
        known = [(name, dims) for name, own, dims in self.outputs if own is dtype
                 and sorted(dims) == sorted(axis.dim for axis in wanted) and len(set(dims)) == len(dims)]
        if known and self.chance(80):
            name, dims = self.choose(known)
            by_dim = {axis.dim: axis.name for axis in wanted}
            return f"{name}[{', '.join(by_dim[dim] for dim in dims)}]"
        others = [axis for axis in self.some(self.of_kind("each", "range"), 60) if axis not in wanted]
        entries: list[tuple[str, str | int]] = []
        left = self.shuffled([*wanted, *others]) if self.chance(60) else [*others, *wanted]
        while left:
            axis = left.pop(0)
            choice = self.choose(range(100))
            if choice >= 100 - plain:
                entries.append((axis.name, axis.dim))
                continue
            form = self.choose(("plain", "window", "offset", "stride", "back", "gather", "quotient", "rest", "pages"))
            if form == "window" and left:
                self.features.add("window")
                other = left.pop(0)
                entries.append((f"{axis.name} + {other.name}", self.derived(
                    lambda sizes, a=axis.dim, b=other.dim: max(1, sizes[a] + sizes[b] - 1))))
            elif form == "offset":
                by = self.choose((1, 2, 5))
                entries.append((f"{axis.name} + {by}", self.derived(lambda sizes, a=axis.dim, by=by: sizes[a] + by)))
            elif form == "stride":
                self.features.add("stride")
                step = self.choose((2, 3))
                entries.append((f"{step} * {axis.name} + 1", self.derived(
                    lambda sizes, a=axis.dim, step=step: step * sizes[a] + 1)))
            elif form == "back":
                self.features.add("backwards")
                entries.append((f"{axis.dim} - 1 - {axis.name}", axis.dim))
            elif form == "gather":
                self.features.add("gather")
                rows, table = self.new_dim(40, 1), self.fresh("at")
                kind = DTYPES[self.choose(("i32", "i64"))]
                self.tensors.append(TensorSpec(table, kind, (_extent(axis.dim),), "index", rows))
                entries.append((f"{table}[{axis.name}]", rows))
            elif form == "quotient":
                self.features.add("quotient")
                by = self.choose((2, 4, 16))
                entries.append((f"{axis.name} // {by}", self.derived(
                    lambda sizes, a=axis.dim, by=by: -(-sizes[a] // by))))
            elif form == "pages":
                self.features.add("pages")
                rows, table, by = self.new_dim(15, 1), self.fresh("at"), self.choose((2, 4, 16))
                self.tensors.append(TensorSpec(table, i32, (self.derived(
                    lambda sizes, a=axis.dim, by=by: -(-sizes[a] // by)),), "index", rows))
                entries += [(f"{table}[{axis.name} // {by}]", rows), (f"{axis.name} % {by}", by)]
            elif form == "rest":
                by = self.choose((2, 3, 8))
                entries.append((f"{axis.name} % {by}", by))
            else:
                entries.append((axis.name, axis.dim))
        if self.chance(10):
            entries.insert(self.choose(range(len(entries) + 1)), ("1", 3))
        if not entries:
            entries = [("0", 1)]
        stored, text = dtype, self.fresh("t")
        if dtype.name in NARROW and self.chance(12):
            self.features.add("narrow")
            stored = DTYPES[self.choose(NARROW[dtype.name])]
        self.tensors.append(TensorSpec(text, stored, tuple(_extent(dim) for _, dim in entries)))
        indices = [index for index, _ in entries]
        if stored is dtype and set(indices) == {axis.name for axis in self.scope} == {axis.name for axis in wanted}:
            self.replaceable.append((f"{text}[{', '.join(indices)}]", dtype, frozenset(indices)))
        text = f"{text}[{', '.join(indices)}]"
        return text if stored is dtype else f"{text}.to({dtype.name})"

    def derived(self, extent: Callable[[dict[str, int]], int]) -> str:
        name = self.fresh("E")
        self.extents[name] = extent
        return name

    # Expressions.

    def convert(self, text: str, have: DType, want: DType) -> str:
        if have is want:
            return text
        if have.is_float and want.is_integer:
            low = "0.0" if want.kind == "u" else "-60.0"
            text = f"minimum(maximum({text}, {low}), 60.0)"
        return f"({text}).to({want.name})"

    def condition(self, axes: Sequence[str], dtype: DType, value: str) -> str:
        """A bool that spans no other axes."""
        if axes and self.chance(70):
            a = self.choose(axes)
            dim = next(axis.dim for axis in self.scope if axis.name == a)
            others = [b for b in axes if b != a]
            if others and self.chance(60):
                return f"{a} {self.choose(('<=', '<', '>', '!='))} {self.choose(others)}"
            return self.choose((f"{a} % 3 != 1", f"{a} < {dim} - 2", f"{a} >= 3", f"{a} // 2 % 2 == 0"))
        return f"{value} > {'0.25' if dtype.is_float else '3'}"

    def operand(self, axes: Iterable[str], dtype: DType, depth: int = 1) -> str:
        """A value that spans just these axes: one that has a name, a load, or computed."""
        axes = sorted(axes)
        named = [v for v in self.values if v.axes == frozenset(axes) and v.dtype is dtype]
        if named and self.chance(40):
            return self.choose(named).text
        if axes and dtype.name in ("f32", "bf16") and self.chance(8):
            return self.nibbles(axes, dtype)
        if depth <= 0 or self.chance(50):
            return self.load(axes, dtype)
        self.features.add("computed")
        a = self.operand(axes, dtype, depth - 1)
        if self.chance(25):
            zero = "0.0" if dtype.is_float else "0"
            return f"where({self.condition(axes, dtype, a)}, {a}, {zero})"
        whole = [axis.name for axis in self.of_kind("whole") if axis.name in axes]
        if whole and dtype.is_float and self.chance(20):
            self.features.add("normed")
            over = self.choose(whole)
            b = self.operand([over, *self.some([axis for axis in axes if axis != over], 50)], dtype, 0)
            return self.choose(("({a} * sum({b}, over={o}))", "({a} - max({b}, over={o}))",
                                "({a} * rsqrt(sum({b} * {b}, over={o}) + 1.0))")).format(a=a, b=b, o=over)
        part = self.some(axes, 50)
        b = self.operand(part, dtype, 0) if part or self.chance(30) else ("0.5" if dtype.is_float else "3")
        return self.combine(a, b, dtype, axes)

    def nibbles(self, axes: Sequence[str], dtype: DType) -> str:
        """Elements of 4 bits, two in a byte, times scales of groups."""
        self.features.add("nibbles")
        first, *others = self.shuffled(self.named(axes))
        packed, scale, group = self.fresh("t"), self.fresh("t"), self.choose((4, 16, 32))
        rows = [axis.dim for axis in others]
        halves = self.derived(lambda sizes, a=first.dim: -(-sizes[a] // 2))
        groups = self.derived(lambda sizes, a=first.dim: -(-sizes[a] // group))
        self.tensors += [TensorSpec(packed, DTYPES["u8"], tuple(map(_extent, [*rows, halves]))),
                         TensorSpec(scale, dtype, tuple(map(_extent, [*rows, groups])))]
        before = "".join(f"{axis.name}, " for axis in others)
        bits = f"({packed}[{before}{first.name} // 2] >> ({first.name} % 2 * 4).to(u8)) & 15"
        return f"(({bits}).to({dtype.name}) * {scale}[{before}{first.name} // {group}])"

    def combine(self, a: str, b: str, dtype: DType, axes: Sequence[str]) -> str:
        if dtype.is_float:
            forms = ("({a} + {b})", "({a} - {b})", "({a} * {b})", "({a} * {b})", "maximum({a}, {b})", "tanh({a} + {b})",
                     "({a} * sigmoid({b}))", "exp(minimum({a} * {b}, 2.0))", "({a} / (1.0 + abs({b})))",
                     "where({c}, {a}, {b})", "({a}).to(bf16).to({t})", "abs({a} - {b})", "minimum({a}, {b})")
        else:
            forms = ("({a} + {b})", "({a} - {b})", "({a} * {b})", "maximum({a}, {b})", "minimum({a}, {b})",
                     "({a} & {b})", "({a} ^ {b})", "where({c}, {a}, {b})", "({a} // 3 + {b})")
        form = self.choose(forms)
        if "{c}" in form and not (a.strip("-.0123456789") or b.strip("-.0123456789")):
            form = forms[0]
        made = form.format(a=a, b=b, t=dtype.name, c=self.condition(axes, dtype, a) if "{c}" in form else "")
        return made

    def elementwise(self) -> _Value | None:
        """Something made of values that have a name, perhaps of other axes."""
        if not self.values:
            return None
        value = self.choose(self.values)
        if not value.dtype.compute or value.dtype.kind == "b":
            return None
        dtype = value.dtype if self.chance(80) else DTYPES[self.choose(FLOATS if value.dtype.is_float else INTEGERS)]
        other = self.choose([v for v in self.values if v.dtype.is_float == value.dtype.is_float] or [value])
        text = self.convert(value.text, value.dtype, dtype)
        if self.chance(60):
            axes = value.axes | other.axes
            second = self.convert(other.text, other.dtype, dtype)
        else:
            axes = value.axes
            second = self.operand(self.some(sorted(value.axes), 70), dtype, 0)
        return self.name_value(self.combine(text, second, dtype, sorted(axes)), dtype, axes)

    # What is made along an axis.

    def reduction(self) -> _Value | None:
        """A sum, largest element, its place, a scan or the largest few along axes of `whole`."""
        whole = [axis.name for axis in self.of_kind("whole")]
        if not whole:
            return None
        fitting = [v for v in self.values if v.axes.intersection(whole) and v.dtype.kind != "b"]
        if not fitting or self.chance(30):
            dtype = DTYPES[self.choose(FLOATS if self.chance(75) else INTEGERS)]
            axes = {self.choose(whole), *self.some([axis.name for axis in self.spans()], 60)}
            fitting = [self.name_value(self.operand(axes, dtype, 2), dtype, axes)]
        value = self.choose(fitting)
        along = [axis for axis in whole if axis in value.axes]
        over = self.choose(along)
        kind = self.choose(("sum", "sum", "max", "min", "argmax", "argmin", "cumsum", "cummax", "topk", "softmax",
                            "both"))
        self.features.add(kind)
        if kind == "softmax" and value.dtype.is_float:
            power = self.name_value(f"exp({value.text} - max({value.text}, over={over}))", value.dtype, value.axes)
            return self.name_value(f"{power.text} / sum({power.text}, over={over})", value.dtype, value.axes)
        if kind in ("softmax", "both"):
            return self.name_value(f"sum({value.text}, over=({', '.join(along)},))", value.dtype,
                                   value.axes.difference(along))
        if kind.startswith("cum"):
            return self.name_value(f"{kind}({value.text}, over={over})", value.dtype, value.axes)
        if kind == "topk":
            count = _Axis(self.fresh("x"), str(self.choose((1, 2, 3, 5))), "whole")
            self.line(f"{count.name} = whole({count.dim})")
            best, places = self.fresh("v"), self.fresh("v")
            self.line(f"{best}, {places} = topk({value.text}, {count.name}, over={over})")
            axes = value.axes - {over}
            if self.chance(50):
                return self.name_value(f"sum({best} * ({count.name} + 1).to({value.dtype.name}), over={count.name})",
                                       value.dtype, axes)
            return self.name_value(f"sum({places}.to(i32) * ({count.name} + 1).to(i32), over={count.name})", i32, axes)
        if kind.startswith("arg"):
            return self.name_value(f"{kind}({value.text}, over={over}).to(i32)", i32, value.axes - {over})
        return self.name_value(f"{kind}({value.text}, over={over})", value.dtype, value.axes - {over})

    def factors(self, shared: Sequence[str], outer: Sequence[str]) -> tuple[str, DType, frozenset[str]]:
        """A product over `shared`; each of the axes `outer` is one operand's."""
        left, right, total = (DTYPES[name] for name in self.choose(FACTORS[:7] if self.layers else FACTORS))
        of_left = self.some(outer, 50)
        of_right = [axis for axis in outer if axis not in of_left]
        if self.layers and len(outer) > 1:
            of_left, of_right = outer[:1], outer[1:2]
            outer = outer[:2]
        a, b = self.operand([*shared, *of_left], left), self.operand([*shared, *of_right], right)
        return f"{a} @ {b}", total, frozenset(outer)

    def product(self) -> _Value | None:
        """A product over axes of `whole`, perhaps of a value that has a name."""
        whole = [axis.name for axis in self.of_kind("whole")]
        if not whole:
            return None
        self.features.add("product")
        fitting = [v for v in self.values if v.axes.intersection(whole) and v.dtype.name in ("f32", "bf16", "f64")]
        if fitting and self.chance(70):  # chained
            self.features.add("chained")
            value = self.choose(fitting)
            shared = [self.choose(sorted(value.axes.intersection(whole)))]
            free = [axis.name for axis in self.spans() if axis.name not in value.axes]
            outer = self.some(free, 60)
            dtype = DTYPES["f64"] if value.dtype.name == "f64" else DTYPES[self.choose(("f32", "bf16"))]
            total = DTYPES["f64"] if value.dtype.name == "f64" else f32
            text = value.text
            if self.chance(30):
                text = self.combine(text, self.operand(shared, value.dtype, 0), value.dtype, sorted(value.axes))
            b = self.operand([*shared, *outer], dtype)
            pair = (text, b) if self.chance(70) else (b, text)
            return self.name_value(f"{pair[0]} @ {pair[1]}", total, (value.axes | set(outer)) - set(shared))
        shared = [self.choose(whole)]
        others = [axis.name for axis in self.spans() if axis.name not in shared and axis.kind != "carried"]
        text, dtype, axes = self.factors(shared, self.some(others, 80))
        return self.name_value(text, dtype, axes)

    def state_axes(self) -> list[str]:
        """Of what loops inside carry."""
        return self.some([axis.name for axis in self.of_kind("tiles")], 85) + self.some(
            [axis.name for axis in self.of_kind("whole")], 25)

    def state(self, axes: Sequence[str], dtype: DType, value: str = "0") -> _Value:
        start = f"zeros({', '.join([*axes, f'dtype={dtype.name}'])})" if value == "0" else \
            f"full({', '.join([*axes, f'value={value}', f'dtype={dtype.name}'])})"
        return self.name_value(start, dtype, axes)

    def walk(self) -> tuple[list[str], list[str]]:
        """The dims and ranges of a loop that carries something."""
        dim = self.new_dim(50)
        batches = self.of_kind("each")
        if batches and self.chance(25):
            self.features.add("ragged")
            batch = self.choose(batches)
            start, stop = self.fresh("at"), self.fresh("at")
            self.tensors += [TensorSpec(table, i32, (_extent(batch.dim),), "length", dim) for table in (start, stop)]
            return [dim], [f"span({start}[{batch.name}], {stop}[{batch.name}])"]
        if self.chance(10):
            self.features.add("span")
            stop = self.fresh("s")
            self.scalars.append((stop, i32, dim))
            return [dim], [f"span(0, {stop})"]
        return [dim], [dim]

    def sums(self) -> None:
        """A loop that adds products up, or takes sums or largest elements of what it reads."""
        self.features.add("sums")
        axes = self.state_axes()
        products = self.chance(65)
        left, right, total = (DTYPES[name] for name in self.choose(FACTORS))
        if not products:
            left = total = DTYPES[self.choose(("f32", "f32", "i32", "f64"))]
        states = [self.state(axes, total) for _ in range(self.choose((1, 1, 1, 2)))]
        outer = None
        before = len(self.values)
        if self.chance(25):
            self.features.add("windows")
            outer = self.open([str(self.choose((2, 3)))], self.choose(("range", "each")))
        dims, ranges = self.walk()
        walked = self.open(dims, "carried", ranges)
        along = [walked[0].name]
        of_left = self.some(axes, 50)
        of_right = [axis for axis in axes if axis not in of_left]
        a = self.operand([*along, *of_left], left)
        for state in states:
            if products:
                text = f"{a} @ {self.operand([*along, *of_right], right)}"
                if self.chance(15):
                    text = f"{self.operand(self.some(axes, 50), total, 0)} * ({text})"
                self.line(f"{state.text} {self.choose(('+=', '+=', '-='))} {text}")
            else:
                text = self.operand([*along, *axes], left, 2)
                if self.chance(50):
                    self.line(f"{state.text} += sum({text}, over={along[0]})")
                else:
                    self.line(f"{state.text} = maximum({state.text}, max({text}, over={along[0]}))")
        self.close(walked, before)
        if outer is not None:
            self.close(outer, before)

    def written_out(self) -> None:
        """Sums and largest elements index by index, perhaps stored as they grow."""
        self.features.add("written out")
        axes = self.state_axes()
        dtype = DTYPES[self.choose(("f32", "f32", "bf16", "i32", "f64"))]
        total = f32 if dtype.name == "bf16" else dtype
        states = [self.state(axes, total) for _ in range(self.choose((1, 1, 2)))]
        before = len(self.values)
        dims, ranges = self.walk()
        walked = self.open(dims, "range" if dims == ranges and self.chance(20) else "each", ranges)
        along = walked[0].name
        of_left = self.some(axes, 50)
        of_right = [axis for axis in axes if axis not in of_left]
        a = self.convert(self.operand([along, *of_left], dtype), dtype, total)
        for state in states:
            b = self.operand([along, *of_right, *self.some(of_left, 20)], dtype)
            text = f"{a} * {self.convert(b, dtype, total)}"
            kind = self.choose(("+=", "+=", "+=", "-=", "sum", "max"))
            if kind == "max":
                self.line(f"{state.text} = maximum({state.text}, {text})")
            elif kind == "sum":
                self.line(f"{state.text} = {text} + {state.text}")
            else:
                self.line(f"{state.text} {kind} {text}")
        if self.chance(25):
            self.store(self.choose(states))
        self.close(walked, before)

    def softmax(self) -> None:
        """Scores whose sum of powers goes along, and what they weigh."""
        self.features.add("softmax along")
        rows = [axis.name for axis in self.of_kind("tiles")]
        rows = rows if self.chance(75) else self.some(rows, 60)
        depth = self.choose([axis.name for axis in self.of_kind("whole")] or [""])
        if not depth:
            depth = self.open([self.new_dim(40)], "whole")[0].name
        value = depth if self.chance(60) else self.open([self.new_dim(50)], "whole")[0].name
        low, total = self.state(rows, f32, "-1e30"), self.state(rows, f32)
        mass = self.state([*rows, value], f32)
        before = len(self.values)
        dims, ranges = self.walk()
        walked = self.open(dims, "carried", ranges)
        along = walked[0].name
        of_right = self.some(rows, 20)
        narrow = DTYPES[self.choose(("f32", "f32", "bf16"))]
        a = self.operand([depth, *(r for r in rows if r not in of_right)], narrow)
        b = self.operand([depth, along, *of_right], narrow)
        score = self.fresh("v")
        self.line(f"{score} = ({a} @ {b}) * 0.25")
        if self.chance(40) and rows:
            self.line(f"{score} = where({along} <= {self.choose(rows)}, {score}, -1e30)")
        if self.chance(30):
            self.line(f"{score} = {score} + {self.operand([along, *self.some(rows, 40)], f32, 0)}")
        high, weight, fade = self.fresh("v"), self.fresh("v"), self.fresh("v")
        self.line(f"{high} = maximum({low.text}, max({score}, over={along}))")
        self.line(f"{weight} = exp({score} - {high})")
        self.line(f"{fade} = exp({low.text} - {high})")
        self.line(f"{total.text} = {total.text} * {fade} + sum({weight}, over={along})")
        v = self.operand([along, value], narrow, 0)
        weight = weight if narrow is f32 or self.chance(50) else f"{weight}.to(bf16)"
        self.line(f"{mass.text} = {mass.text} * {fade} + {weight} @ {v}")
        self.line(f"{low.text} = {high}")
        self.close(walked, before)
        self.name_value(f"{mass.text} / maximum({total.text}, 1e-20)", f32, [*rows, value])

    def recurrence(self) -> None:
        """A state that goes from index to index."""
        self.features.add("recurrence")
        axes = self.state_axes()
        dtype = DTYPES[self.choose(("f32", "f32", "f64", "i32"))]
        state = self.state(axes, dtype)
        before = len(self.values)
        dim = self.new_dim(15)
        outer = self.open([dim], self.choose(("range", "each")))
        a, b = self.operand(self.some(axes, 70), dtype), self.operand(axes, dtype)
        half = "0.5" if dtype.is_float else "1"
        whole = [axis.name for axis in self.of_kind("whole") if axis.name in axes]
        if whole and dtype is f32 and self.chance(60):  # a delta rule
            along = self.choose(whole)
            rest = [axis for axis in axes if axis != along]
            found = self.fresh("v")
            self.line(f"{found} = {self.operand(rest, f32, 0)} - {self.operand([along], f32, 0)} @ {state.text}")
            self.line(f"{state.text} = {state.text} * {half} + tanh({a}) * {found}")
        else:
            self.line(f"{state.text} = {state.text} * {half} + {self.combine(a, b, dtype, axes)}")
        if self.chance(60):
            self.store(state)
        self.close(outer, before)

    def inner_loop(self) -> None:
        """A loop of tiles inside, whose elements are stored."""
        self.features.add("inner")
        before = len(self.values)
        walked = self.open([self.new_dim(70)], "tiles")
        for _ in range(self.choose((1, 2))):
            self.step(0)
        self.finish_block(before)
        self.close(walked, before)

    def step(self, level: int = 1) -> None:
        """One step of a block."""
        kinds = ["load", "elementwise", "reduction", "product", "product"]
        if self.layers:
            kinds += ["product", "product"]
        else:
            kinds += ["reduction", "sums", "sums", "written_out", *(["softmax", "recurrence"] if level else [])]
        if level:
            kinds.append("inner")
        kind = self.choose(kinds)
        if kind == "load":
            dtype = DTYPES[self.choose(FLOATS if self.chance(75) else INTEGERS)]
            axes = self.some([axis.name for axis in self.spans()], 75)
            self.name_value(self.operand(axes, dtype), dtype, axes)
        elif kind == "inner":
            self.inner_loop()
        else:
            getattr(self, kind)()

    # Stores and nests.

    def store(self, value: _Value) -> None:
        """At an index that has all loops around it."""
        if value.dtype.kind == "b":
            return
        axes = [axis for axis in self.scope if axis.kind != "whole" or axis.name in value.axes]
        order = self.shuffled(axes) if self.chance(40) else axes
        name = self.fresh("o")
        dtype, text = value.dtype, value.text
        if dtype.is_float and self.chance(15):
            dtype = DTYPES[self.choose(("bf16", "f32", "f16"))]
            text = self.convert(text, value.dtype, dtype)
        dims = tuple(axis.dim for axis in order) or ("1",)
        self.tensors.append(TensorSpec(name, dtype, tuple(map(_extent, dims)), "output"))
        if order and not dims[-1].isdigit() and self.chance(5):
            self.features.add("parts of rows")
            length = self.derived(lambda sizes, a=dims[-1]: 2 * sizes[a])
            self.tensors[-1] = TensorSpec(name, dtype, (*map(_extent, dims[:-1]), length), "output")
            before = "".join(f"{axis.name}, " for axis in order[:-1])
            for start in ("0", dims[-1]):
                self.line(f"{name}[{before}{order[-1].name} + {start}] = {text}")
            return
        operator = "+=" if self.chance(10) else "="
        again = [one for one, own, names in self.replaceable if own is dtype
                 and names == {axis.name for axis in order}
                 and sum(one.split("[")[0] in line for line in self.lines) == 1]
        if again and self.chance(30):
            one = self.choose(again)
            self.features.add("in place")
            self.tensors.pop()
            self.line(f"{one} {operator} {text}")
            self.replaceable = [entry for entry in self.replaceable if entry[0] != one]
            return
        tiled = [at for at, axis in enumerate(order) if axis.kind == "tiles"]
        if tiled and not self.of_kind("each", "range") and dtype.name in ("f32", "i32", "f64") and self.chance(8):
            self.features.add("sums at places")
            at = self.choose(tiled)
            table, rows = self.fresh("at"), self.new_dim(30, 1)
            self.tensors.insert(-1, TensorSpec(table, i32, (order[at].dim,), "index", rows))
            self.tensors[-1] = TensorSpec(name, dtype, tuple(_extent(rows if n == at else dim)
                                                             for n, dim in enumerate(dims)), "output")
            indices = [f"{table}[{axis.name}]" if n == at else axis.name for n, axis in enumerate(order)]
            self.line(f"{name}[{', '.join(indices)}] += {text}")
            return
        self.line(f"{name}[{', '.join(axis.name for axis in order) or '0'}] {operator} {text}")
        if order and not any(dim.isdigit() for dim in dims):
            self.stored.append((name, dtype, dims))

    def replaced(self) -> None:
        """An output that may be the array that it is made of, which is used after that, too."""
        self.features.add("one array")
        axes, dtype = list(self.scope), DTYPES[self.choose(("f32", "f32", "bf16", "i32"))]
        dims = tuple(_extent(axis.dim) for axis in axes) or (1,)
        indices = ", ".join(axis.name for axis in axes) or "0"
        data, output = self.fresh("t"), self.fresh("o")
        self.tensors += [TensorSpec(data, dtype, dims), TensorSpec(output, dtype, dims, "output")]
        self.in_place.append((output, data))
        value = self.name_value(f"{data}[{indices}]", dtype, [axis.name for axis in self.spans()])
        self.line(f"{output}[{indices}] = {value.text} * {'0.5' if dtype.is_float else '3'}")

    def finish_block(self, before: int) -> None:
        """Store one or two of what the block made, the last of it most likely."""
        if self.chance(10):
            self.replaced()
        own = self.values[before:] or self.values
        if not own:
            axes = [axis.name for axis in self.spans()]
            own = [self.name_value(self.operand(axes, f32, 2), f32, axes)]
        for value in dict.fromkeys([own[-1], *([self.choose(own)] if self.chance(40) else [])]):
            self.store(value)

    def one_nest(self, read: tuple[str, DType, tuple[str, ...]] | None = None) -> None:
        """read: an output of a nest before, of which this one makes something."""
        self.stored: list[tuple[str, DType, tuple[str, ...]]] = []
        self.scope, self.values, self.nest, self.depth = [], [], [], 1
        self.layers = self.chance(30)
        opened: list[_Axis] = []
        if self.chance(35):
            opened += self.open([self.new_dim(15)], "each")
        tiled = [self.new_dim(90) for _ in range(self.choose((1, 2, 2, 2, 3)))] if read is None else \
            self.some(dict.fromkeys(read[2]), 60)[:2] or [read[2][0]]
        if len(tiled) > 1 and self.chance(30):
            opened += self.open(tiled[:1], "tiles")
            if self.chance(50):
                self.open([self.new_dim(50)], "whole")
            opened += self.open(tiled[1:], "tiles")
        else:
            opened += self.open(tiled, "tiles")
        if read is not None:
            self.features.add("passed")
            for dim in read[2]:
                if dim not in [axis.dim for axis in self.spans()]:
                    self.open([dim], "whole")
            by_dim = {axis.dim: axis.name for axis in self.spans()}
            names = [by_dim[dim] for dim in read[2]]
            self.name_value(f"{read[0]}[{', '.join(names)}]", read[1], names)
        for _ in range(self.choose((1, 2) if self.layers else (0, 1, 1, 1, 2))):
            same = [axis.dim for axis in self.scope]
            self.open([self.choose(same) if self.chance(15) else self.new_dim(55)], "whole")
        for _ in range(self.choose((1, 2, 2, 3, 4))):
            self.step()
        self.finish_block(0)
        self.nests.append(self.nest)
        self.outputs += self.stored
        self.replaceable = []

    def experts(self) -> None:
        """Rows of a batch, each with the matrix that its group has."""
        self.features.add("experts")
        self.stored = []
        self.scope, self.values, self.nest, self.depth = [], [], [], 1
        groups, rows, tokens, columns, depth = (self.new_dim(long, 1) for long in (0, 70, 50, 80, 60))
        left, right, total = (DTYPES[name] for name in self.choose(FACTORS))
        starts, token = self.fresh("at"), self.fresh("at")
        x, w, y = self.fresh("t"), self.fresh("t"), self.fresh("o")
        self.tensors += [
            TensorSpec(starts, i32, (self.derived(lambda sizes: sizes[groups] + 1),), "starts", rows),
            TensorSpec(token, i32, (rows,), "index", tokens), TensorSpec(x, left, (tokens, depth)),
            TensorSpec(w, right, (groups, depth, columns) if self.chance(50) else (groups, columns, depth)),
            TensorSpec(y, total, (rows, columns), "output")]
        turned = self.tensors[-2].dims[1] == columns
        (group,) = self.open([groups], "each", [f"{groups}, disjoint=True"])
        row, column = self.open([rows, columns], "tiles", [
            f"span({starts}[{group.name} + 0], {starts}[{group.name} + 1])", columns])
        a = f"{x}[{token}[{row.name}], {{}}]" if self.chance(70) else f"{x}[{row.name} % 1, {{}}]"
        b = f"{w}[{group.name}, {column.name}, {{}}]" if turned else f"{w}[{group.name}, {{}}, {column.name}]"
        if self.chance(50):
            (k,) = self.open([depth], "whole")
            value = self.name_value(f"{a} @ {b}".replace("{}", k.name), total, [row.name, column.name])
        else:
            value = self.state([row.name, column.name], total)
            walked = self.open([depth], "carried")
            self.line(f"{value.text} += {a} @ {b}".replace("{}", walked[0].name))
            self.close(walked, len(self.values))
        if total.is_float and self.chance(30):
            value = self.name_value(f"maximum({value.text}, 0.0)", total, value.axes)
        self.line(f"{y}[{row.name}, {column.name}] = {value.text}")
        self.outputs.append((y, total, (rows, columns)))
        self.nests.append(self.nest)

    def kernel(self) -> KernelCase:
        if self.chance(6):
            self.experts()
        else:
            self.one_nest()
        for _ in range(self.choose((0, 0, 0, 1, 1, 2))):
            self.features.add("nests")
            self.one_nest(self.choose(self.outputs) if self.outputs else None)
        return self.finish()

    def finish(self) -> KernelCase:
        sizes = dict(self.sizes)

        def points(nest: list[str]) -> int:
            return math.prod(max(1, sizes.get(dim, 3)) for dim in dict.fromkeys(nest))

        for nest in self.nests:
            kept = [dim for dim in dict.fromkeys(nest) if sizes.get(dim, 0) >= min(LONG)][:2]
            while points(nest) > self.most_points:
                rest = [dim for dim in dict.fromkeys(nest) if dim not in kept and sizes.get(dim, 0) > 2]
                largest = max(rest or [dim for dim in nest if dim in sizes], key=lambda dim: sizes[dim])
                sizes[largest] = sizes[largest] // 2
        declared = {dim for tensor in self.tensors for dim in tensor.dims}
        for dim in sizes:
            if dim not in declared and any(dim in line.replace("(", " ").replace(")", " ").replace(",", " ").split()
                                           for line in self.lines):
                self.tensors.append(TensorSpec(self.fresh("t"), f32, (dim,)))
        known = sizes | {str(number): number for number in range(10)}
        for name, extent in self.extents.items():
            sizes[name] = extent(known)
        names = sorted({dim for tensor in self.tensors for dim in tensor.dims if isinstance(dim, str)})
        parameters = [f"{t.name}: Tensor[{', '.join([t.dtype.name, *map(str, t.dims)])}]" for t in self.tensors]
        parameters += [f"{name}: {dtype.name}" for name, dtype, _ in self.scalars]
        source = "\n".join([
            HEADER.rstrip("\n"), f"{', '.join(names)} = dims(\"{' '.join(names)}\")", "",
            f"@kernel(in_place={self.in_place})" if self.in_place else "@kernel",
            f"def random_kernel({', '.join(parameters)}):", *self.lines, ""])
        return KernelCase(source, "random_kernel", tuple(self.tensors), tuple(self.scalars),
                          features=frozenset(self.features), extents=tuple(sorted(sizes.items())),
                          in_place=tuple(self.in_place))


def _extent(dim: str | int) -> str | int:
    return int(dim) if isinstance(dim, int) or dim.isdigit() else dim


def hints(case: KernelCase, guess: int) -> dict[str, int]:
    """What the model takes for typical extents: any, as one extent belongs to a class of many."""
    random = np.random.default_rng(guess)
    return {dim: int(random.choice(GUESSES)) for dim, _ in case.extents}


def packed(case: KernelCase, function: Function, arguments: Mapping[str, Any], target: Any) -> dict[str, Packed]:
    """What of the arguments of a canonical function may be packed (sapper.pack), in its panels."""
    found = {}
    for tensor in case.tensors:
        if len(tensor.dims) == 2:
            try:
                panels = panels_for(function, tensor.name, facts_of(target))
            except LoweringError:
                continue
            found[tensor.name] = pack_array(np.ascontiguousarray(arguments[tensor.name]), tensor.dtype, panels)
    return found


@st.composite
def nests(draw: Any, most_points: int = MOST_POINTS) -> KernelCase:
    """Random kernels of the forms that users write."""
    return Writer(lambda options: draw(st.sampled_from(options)), most_points).kernel()


__all__ = ["TILE_SIZES", "Writer", "hints", "nests", "packed"]
