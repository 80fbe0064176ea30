"""Random kernels over the whole language, as source text.

Every kernel is a nest of loops over dimensions (each, tiles, whole), in it loads, arithmetic, reductions, carried
loops and branches, at its end stores to outputs, which may be loaded and stored again, there or in nests that follow.
Expressions are typed while they are drawn, so a kernel is refused by the front end only where that is a bug, and
arithmetic that the language leaves undefined (division by zero, shifts too far, floats beyond an integer's range) is
kept out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from hypothesis import reject
from hypothesis import strategies as st

from sapper.ir.nodes import Function
from sapper.ir.types import DTYPES, DType, f32, i32
from sapper.lang.errors import KernelError

from .kernel_case import KernelCase, TensorSpec

Draw = Callable[[st.SearchStrategy[Any]], Any]

ALL_DTYPES = ("f32", "bf16", "f16", "f64", "i32", "i8", "u8", "i16", "i64")
HEADER = """\
from sapper.ir.types import bf16, bool_, f8e4m3, f8e5m2, f16, f32, f64, i4, i8, i16, i32, i64, index, u8
from sapper.lang.builtins import (
    argmax, argmin, ceil, cos, cummax, cummin, cumsum, each, erf, exp, exp2, floor, full, log, log2, maximum, minimum,
    rsqrt, sigmoid, sin, span, sqrt, tanh, tiles, topk, where, whole, zeros,
)
from sapper.lang.dims import dims
from sapper.lang.kernel import kernel
from sapper.lang.tensor import Tensor

SCALE = 0.375
OFFSET = 3
"""
HELPERS = """\

def clamp(x, low, high):
    return min(max(x, low), high)


def softplus(x):
    return log(exp(-abs(x)) + 1.0) + max(x, 0.0)

"""
FLOAT_FUNCTIONS = ("exp({})", "exp2({})", "log(abs({}) + 1.0)", "log2({})", "sqrt(abs({}))", "rsqrt(abs({}) + 0.5)",
                   "tanh({})", "sigmoid({})", "erf({})", "sin(clamp({}, -64.0, 64.0))", "cos(clamp({}, -64.0, 64.0))",
                   "floor({})", "ceil({})", "round({})", "softplus({})", "({}) ** 2", "({}) ** 3", "-({})", "abs({})")
FLOAT_PAIRS = ("{} + {}", "{} - {}", "{} * {}", "{} / {}", "maximum({}, {})", "min({}, {})", "max({}, {})",
               "{} * SCALE + {}")
INTEGER_FUNCTIONS = ("-({})", "abs({})", "~({})", "({}) << 2", "({}) >> 1", "({}) // 3", "({}) % 5", "({}) // -7",
                     "({}) % -3", "({}) ** 2", "({}) * OFFSET")
UNSIGNED_FUNCTIONS = tuple(f for f in INTEGER_FUNCTIONS if "-" not in f[1:])
SAME_SIZE = {"f32": "i32", "i32": "f32", "bf16": "i16", "i16": "bf16", "i8": "u8", "u8": "i8",
             "f64": "i64", "i64": "f64"}
"""What .bits() goes between; the bits of f16 are not compiled."""
INTEGER_PAIRS = ("{} + {}", "{} - {}", "{} * {}", "maximum({}, {})", "minimum({}, {})", "({}) & ({})", "({}) | ({})",
                 "({}) ^ ({})")
STORED_ONLY = {**dict.fromkeys(("f32", "bf16", "f16", "f64"), ("f8e4m3", "f8e5m2")),
               **dict.fromkeys(("i32", "i64", "i8"), ("i4",))}
"""What tensors may be of that are read and written as another type."""
SPAN_LENGTHS = (1, 3, 8, 16, 17)
COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")


class _Value:
    """A name or atom of the kernel in scope: its text, dtype and axes."""

    __slots__ = ("axes", "dtype", "text")

    def __init__(self, text: str, dtype: DType, axes: tuple[str, ...]) -> None:
        self.text = text
        self.dtype = dtype
        self.axes = axes


class _Writer:
    """A kernel being written. loops: for each open dimension the loop variable's name and how it is walked."""

    def __init__(self, draw: Draw, dtypes: tuple[str, ...], functions: bool) -> None:
        self.draw = draw
        self.dtypes = [DTYPES[name] for name in dtypes]
        self.functions = functions
        self.lines: list[str] = []
        self.depth = 1
        self.tensors: list[TensorSpec] = []
        self.scalars: list[tuple[str, DType, str]] = []
        self.derived: dict[str, tuple[str, str, int, int]] = {}
        self.positive: set[str] = set()
        self.features: set[str] = set()
        self.values: list[_Value] = []
        self.stored: list[tuple[str, DType, list[str]]] = []
        self.outside: list[_Value] = []
        self.loops: dict[str, tuple[str, str]] = {}
        self.dims: list[str] = []
        self.counter = 0
        self.dim_counter = 0

    # Choices.

    def one_of(self, options: Any) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def chance(self, percent: int) -> bool:
        return self.draw(st.integers(0, 99)) < percent

    def dtype(self) -> DType:
        return self.one_of(self.dtypes)

    # Text.

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def fresh(self, prefix: str = "v") -> str:
        self.counter += 1
        return f"{prefix}{self.counter}"

    def new_dim(self) -> str:
        self.dim_counter += 1
        name = f"D{self.dim_counter}"
        self.dims.append(name)
        return name

    def name(self, text: str, dtype: DType, axes: tuple[str, ...]) -> _Value:
        """Assign an expression to a new name."""
        value = _Value(self.fresh(), dtype, axes)
        self.line(f"{value.text} = {text}")
        self.values.append(value)
        return value

    def axes(self) -> tuple[str, ...]:
        """The axes in scope: loop variables that are no index scalars."""
        return tuple(variable for variable, kind in self.loops.values() if kind != "each")

    # Loops.

    def open_loop(self, dims: list[str], kind: str) -> None:
        variables = []
        for dim in dims:
            variable = f"x{dim[1:]}"
            variables.append(variable)
            self.loops[dim] = (variable, kind)
        self.features.add(kind)
        if kind == "whole":
            for dim, variable in zip(dims, variables, strict=True):
                self.line(f"{variable} = whole({self.range_of(dim)})")
        else:
            self.line(f"for {', '.join(variables)} in {kind}({', '.join(map(self.range_of, dims))}):")
            self.depth += 1

    def range_of(self, dim: str) -> str:
        """A dimension; or a part of it, as long in each call, whose start a call says."""
        if dim in self.derived or not self.chance(8):
            return dim
        self.features.add("fixed-span")
        length, room, start = self.one_of(SPAN_LENGTHS), self.new_dim(), self.fresh("s")
        self.derived[dim] = (dim, room, 1, length)
        self.scalars.append((start, i32, room))
        return f"span({start}, {start} + {length})"

    # Memory.

    def load(self, dims: list[str], dtype: DType | None = None) -> _Value:
        """A new tensor indexed with the loop variables of some dimensions, perhaps affine or through a table."""
        dtype = dtype or self.dtype()
        name = self.fresh("t")
        order = self.draw(st.permutations(dims)) if dims else []
        indices, extents = [], []
        split: dict[str, int] = {}
        for dim in order:
            variable = self.loops[dim][0]
            choice = self.draw(st.integers(0, 11))
            if choice == 0:
                self.features.add("affine")
                factor, offset = self.one_of([(2, 1), (1, 2), (3, 0)])
                derived = f"{dim}x{factor}p{offset}"
                self.derived[derived] = (derived, dim, factor, offset + 1)
                indices.append({(2, 1): f"2 * {variable} + 1", (1, 2): f"{variable} + 2",
                                (3, 0): f"{variable} * 3"}[factor, offset])
                extents.append(derived)
            elif choice == 1:
                self.features.add("gather")
                table = self.fresh("at")
                rows = self.new_dim()
                self.positive.add(rows)
                kind = self.one_of([DTYPES["i32"], DTYPES["i64"]])
                self.tensors.append(TensorSpec(table, kind, (dim,), "index", rows))
                indices.append(f"{table}[{variable}]")
                extents.append(rows)
            elif choice == 2:
                self.features.add("backwards")
                indices.append(f"{dim} - 1 - {variable}")
                extents.append(dim)
            elif choice == 3:
                derived, factor = self.split(dim)
                split[derived] = factor
                indices.append(f"{variable}, {self.draw(st.integers(0, factor - 1))}")
                extents.append(derived)
            else:
                indices.append(variable)
                extents.append(dim)
        if self.chance(10):
            self.features.add("static-dim")
            position = self.draw(st.integers(0, len(indices)))
            indices.insert(position, str(self.draw(st.integers(0, 2))))
            extents.insert(position, 3)
        if not indices:
            indices, extents = ["1"], [2]
        stored = self.stored_as(dtype)
        self.tensors.append(TensorSpec(name, stored, tuple(extents)))
        in_index = {self.loops[dim][0] for dim in order}
        axes = tuple(a for a in self.axes() if a in in_index)
        text = f"{name}{self.viewed(extents, split)}[{', '.join(indices)}]"
        return self.name(f"{text}.to({dtype.name})" if stored is not dtype else text, dtype, axes)

    def stored_as(self, dtype: DType) -> DType:
        """The dtype itself, or one that is only stored and cast."""
        narrower = STORED_ONLY.get(dtype.name)
        if narrower is None or not self.chance(8):
            return dtype
        self.features.add("stored-only")
        return DTYPES[self.one_of(narrower)]

    def split(self, dim: str) -> tuple[str, int]:
        """A dimension that is a dimension times a factor."""
        self.features.add("view")
        factor = self.one_of([2, 3, 16])
        derived = f"{dim}x{factor}"
        self.derived[derived] = (derived, dim, factor, 0)
        return derived, factor

    @staticmethod
    def viewed(extents: list[Any], split: dict[str, int]) -> str:
        """The view in which the dimensions of `split` are two."""
        if not split:
            return ""
        parts = [f"{e} // {split[e]}, {split[e]}" if e in split else str(e) for e in extents]
        return f".view({', '.join(parts)})"

    def store(self, text: str, dtype: DType, axes: tuple[str, ...], again: bool = False) -> None:
        """Store to a new output whose index names every loop of the nest that is not reduced away."""
        name = self.fresh("o")
        stored = dtype if again else self.stored_as(dtype)
        if stored is not dtype:
            text, dtype = f"({text}).to({stored.name})", stored
        wanted = [dim for dim, (variable, kind) in self.loops.items() if kind != "whole" or variable in axes]
        order = self.draw(st.permutations(wanted)) if wanted else []
        indices = [self.loops[dim][0] for dim in order]
        extents = list(order)
        walked = [at for at, dim in enumerate(order) if self.loops[dim][1] != "whole"]
        if walked and not again and self.chance(10):  # the loop then runs in order; one store of a whole axis can't
            self.features.add("scatter")
            place = self.one_of(walked)
            table, rows = self.fresh("at"), f"{order[place]}s"
            self.derived[rows] = (rows, order[place], 1, self.draw(st.integers(0, 2)))
            kind = self.one_of([DTYPES["i32"], DTYPES["i64"]])
            self.tensors.append(TensorSpec(table, kind, (order[place],), "places", rows))
            indices[place], extents[place] = f"{table}[{indices[place]}]", rows
        split: dict[str, int] = {}
        if order and not again and extents[-1] == order[-1] and self.chance(10):
            extents[-1], factor = self.split(order[-1])
            split[extents[-1]] = factor
            indices[-1] += f", {self.draw(st.integers(0, factor - 1))}"
        target = f"{name}{self.viewed(extents, split)}[{', '.join(indices) if indices else '0'}]"
        self.tensors.append(TensorSpec(name, dtype, tuple(extents) if extents else (1,), "output"))
        if order and extents == order and dtype.compute and dtype.kind != "b":
            self.stored.append((name, dtype, order))
        if again:
            self.features.add("read-and-write")
            self.line(f"{target} += {text}")
        else:
            self.line(f"{target} = {text}")

    # Expressions.

    def atom(self, dtype: DType, within: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        """A value in scope of a dtype, cast if need be, that spans no axis outside `within`."""
        fitting = [v for v in self.values if set(v.axes) <= set(within)]
        exact = [v for v in fitting if v.dtype == dtype]
        if exact and not (fitting and self.chance(10)):
            value = self.one_of(exact)
            return value.text, value.axes
        if fitting and not self.chance(15):
            value = self.one_of(fitting)
            return self.cast(value.text, value.dtype, dtype), value.axes
        choices = [a for a in self.axes() if a in within]
        if choices and self.chance(70):
            self.features.add("coordinate")
            axis = self.one_of(choices)
            return f"{axis}.to({dtype.name})", (axis,)
        scalars = [s for s in self.scalars if s[1] == dtype and not s[2]]
        if not scalars:
            name = self.fresh("s")
            self.scalars.append((name, dtype, ""))
            return name, ()
        return self.one_of(scalars)[0], ()

    def cast(self, text: str, have: DType, want: DType) -> str:
        if have == want:
            return text
        if have.is_float and want.is_integer:
            limit = "100.0"
            text = f"where(abs({text}) < {limit}, {text}, 0.0)"
            if want.kind == "u":
                text = f"abs({text})"
        return f"({text}).to({want.name})"

    def literal(self, dtype: DType) -> str:
        if dtype.is_float:
            return self.one_of(["0.5", "1.0", "-2.0", "3", "0.1", "SCALE", "1.5e-3"])
        return self.one_of(["1", "2", "7", "OFFSET", "3"])

    def condition(self, within: tuple[str, ...], depth: int) -> tuple[str, tuple[str, ...]]:
        """A bool expression."""
        if depth > 0 and self.chance(30):
            a, a_axes = self.condition(within, depth - 1)
            if self.chance(30):
                return f"~({a})", a_axes
            b, b_axes = self.condition(within, depth - 1)
            return f"({a}) {self.one_of('&|^')} ({b})", _union(a_axes, b_axes)
        coordinates = [(v, d) for d, (v, kind) in self.loops.items() if kind == "each" or v in within]
        if coordinates and self.chance(25):
            self.features.add("coordinate")
            (a, dim), axes = self.one_of(coordinates), set(within)
            if len(coordinates) > 1 and self.chance(50):
                b, _ = self.one_of([c for c in coordinates if c[0] != a])
                return f"{a} {self.one_of(COMPARISONS)} {b}", tuple(x for x in self.axes() if x in (a, b) and x in axes)
            return f"{a} {self.one_of(['<', '>='])} {dim} - 2", (a,) if a in axes else ()
        if coordinates and self.chance(10):
            self.features.add("bool-tensor")
            flag = self.load([d for _, d in coordinates if self.chance(70)], DTYPES["bool"])
            self.values.remove(flag)  # no arithmetic on it
            return flag.text, flag.axes
        dtype = self.dtype()
        a, a_axes = self.expression(dtype, within, depth - 1)
        if self.chance(40):
            return f"{a} {self.one_of(COMPARISONS)} {self.literal(dtype)}", a_axes
        b, b_axes = self.expression(dtype, within, depth - 1)
        return f"{a} {self.one_of(COMPARISONS)} {b}", _union(a_axes, b_axes)

    def expression(self, dtype: DType, within: tuple[str, ...], depth: int) -> tuple[str, tuple[str, ...]]:
        """An expression of a dtype in brackets or atomic, and the axes that it spans."""
        if depth <= 0:
            return self.atom(dtype, within)
        choice = self.draw(st.integers(0, 9))
        if choice < 4:
            pattern = self.one_of(FLOAT_PAIRS if dtype.is_float else INTEGER_PAIRS)
            a, a_axes = self.expression(dtype, within, depth - 1)
            if self.chance(25):
                return f"({pattern.format(a, self.literal(dtype))})", a_axes
            b, b_axes = self.expression(dtype, within, depth - 1)
            return f"({pattern.format(a, b)})", _union(a_axes, b_axes)
        if choice < 7:
            known = FLOAT_FUNCTIONS if self.functions else ("-({})", "abs({})", "floor({})", "round({})", "ceil({})")
            whole = UNSIGNED_FUNCTIONS if dtype.kind == "u" else INTEGER_FUNCTIONS
            pattern = self.one_of(known if dtype.is_float else whole)
            a, axes = self.expression(dtype, within, depth - 1)
            return f"({pattern.format(a)})", axes
        if choice < 8 and dtype.name in SAME_SIZE and self.chance(20):
            other = DTYPES[SAME_SIZE[dtype.name]]
            self.features.add("bits")
            a, axes = self.expression(other, within, depth - 1)
            if other.is_float:  # which NaN, and which zero, is not said
                a = f"where((abs({a}) < 1000.0) & (abs({a}) > 0.001), {a}, 1.0)"
            return f"({a}).bits({dtype.name})", axes
        if choice < 8:
            other = self.dtype()
            a, axes = self.expression(other, within, depth - 1)
            if other != dtype:
                self.features.add("cast")
            return self.cast(a, other, dtype), axes
        if choice < 9:
            self.features.add("where")
            test, test_axes = self.condition(within, depth - 1)
            a, a_axes = self.expression(dtype, within, depth - 1)
            if self.chance(30):
                return f"where({test}, {a}, {self.literal(dtype)})", _union(test_axes, a_axes)
            b, b_axes = self.expression(dtype, within, depth - 1)
            return f"where({test}, {a}, {b})", _union(test_axes, a_axes, b_axes)
        return self.atom(dtype, within)

    # Statements.

    def assignable(self) -> list[_Value]:
        """Those that may be assigned anew. A loop of tiles would carry one from before it, and mean something else for
        every tile size."""
        return [v for v in self.values if v.text.startswith("v") and v not in self.outside]

    def assignments(self, count: int, within: tuple[str, ...]) -> None:
        for _ in range(count):
            dtype = self.dtype()
            own = self.assignable()
            if own and self.chance(25):
                value = self.one_of(own)
                self.features.add("augmented")
                text, _ = self.expression(value.dtype, value.axes, 1)
                self.line(f"{value.text} {self.one_of(['+=', '-=', '*='])} {text}")
                continue
            text, axes = self.expression(dtype, within, 2)
            self.name(text, dtype, axes)

    def reduction(self, over: tuple[str, ...], within: tuple[str, ...]) -> _Value | None:
        """A reduction of some value over axes of `whole`."""
        fitting = [v for v in self.values if set(over) <= set(v.axes)]
        if not fitting:
            return None
        value = self.one_of(fitting)
        kinds = ["sum", "max", "min"]
        if len(over) == 1:
            kinds += ["argmax", "argmin", "cumsum", "cummax", "cummin", "topk", "topk"]
        kind = self.one_of(kinds)
        self.features.add(kind)
        if kind.startswith("cum"):
            return self.name(f"{kind}({value.text}, over={over[0]})", value.dtype, value.axes)
        if kind == "topk":
            return self.largest(value, over[0])
        kept = tuple(a for a in value.axes if a not in over)
        named = over[0] if len(over) == 1 else f"({', '.join(over)})"
        text = f"{kind}({value.text}, over={named})"
        if kind.startswith("arg"):
            return self.name(f"{text}.to(i32)", i32, kept)
        if value.dtype in (f32, DTYPES["bf16"], DTYPES["f16"]) and self.chance(50):
            partners = [v for v in fitting if v.dtype == value.dtype and set(v.axes) & set(value.axes) == set(over)]
            if partners:
                other = self.one_of(partners)
                self.features.add("contract")
                return self.name(f"{value.text} @ {other.text}", f32,
                                 tuple(a for a in _union(value.axes, other.axes) if a not in over))
        return self.name(text, value.dtype, kept)

    def largest(self, value: _Value, over: str) -> _Value:
        """topk, and what is made of its values and places at once: its axis is not kept in scope."""
        kept = tuple(a for a in value.axes if a != over)
        count, values, places = self.fresh("k"), self.fresh(), self.fresh()
        self.line(f"{count} = whole({self.one_of([1, 2, 3, 7, 17])})")
        self.line(f"{values}, {places} = topk({value.text}, {count}, over={over})")
        if self.chance(50):
            return self.name(f"sum({places}.to(i32) * ({count}.to(i32) + 1), over={count})", i32, kept)
        return self.name(f"{self.one_of(['min', 'max', 'sum'])}({values}, over={count})", value.dtype, kept)

    def branch(self, within: tuple[str, ...]) -> None:
        """An if on scalars that changes values."""
        own = self.assignable()
        if not own:
            return
        self.features.add("if")
        value = self.one_of(own)
        test, axes = self.condition((), 1)
        assert not axes
        before = len(self.values)
        for keyword in (f"if {test}:", "else:"):
            if keyword == "else:" and self.chance(30):
                break
            self.line(keyword)
            self.depth += 1
            text, spanned = self.expression(value.dtype, value.axes, 2)
            missing = [a for a in value.axes if a not in spanned]
            if missing:
                text = f"{text} + {value.text}"
            self.line(f"{value.text} = {text}")
            self.depth -= 1
            del self.values[before:]

    def carried(self, within: tuple[str, ...]) -> None:
        """A sequential loop over a new dimension that accumulates over axes in scope."""
        dim = self.new_dim()
        variable = f"x{dim[1:]}"
        kind = self.one_of(["sum", "max", "product", "product", "running"])
        wide = [d for d in self.dtypes if d.bits >= 32 and (kind != "product" or d in (f32, i32))]
        dtype = self.one_of(wide or [f32])
        outer = tuple(a for a in within if self.chance(70))
        start = "0" if dtype.is_integer else self.one_of(["0.0", "1.5"])
        total = _Value(self.fresh(), dtype, outer)
        self.line(f"{total.text} = full({', '.join([*outer, f'value={start}', f'dtype={dtype.name}'])})")
        count = None
        if self.chance(30):
            count = _Value(self.fresh(), i32, ())
            self.line(f"{count.text} = 0")
        extent = dim
        if self.chance(30):
            self.features.add("span")
            low, high = self.fresh("s"), self.fresh("s")
            self.scalars += [(low, i32, dim), (high, i32, dim)]
            # One that ends before it begins is empty.
            extent = self.one_of([f"span(minimum({low}, {high}), maximum({low}, {high}))", f"span({low}, {high})"])
        self.features.add("carried")
        before = len(self.values)
        self.values.append(total)
        self.line(f"for {variable} in tiles({extent}):")
        self.depth += 1
        self.loops[dim] = (variable, "tiles")
        dims = {v: d for d, (v, _) in self.loops.items()}
        loads = []
        for _ in range(self.draw(st.integers(1, 2))):
            loads.append(self.load([dim, *(dims[a] for a in outer if self.chance(60))]))
        inside = (*outer, variable)
        if kind == "product":
            factor = DTYPES["i8"] if dtype == i32 else self.one_of([d for d in self.dtypes if d.name in ("bf16", "f32")]
                                                                  or [f32])
            half = self.draw(st.integers(0, len(outer)))
            a = self.load([dim, *(dims[x] for x in outer[:half])], factor)
            b = self.load([dim, *(dims[x] for x in outer[half:])], factor)
            self.features.add("contract")
            self.line(f"{total.text} += {a.text} @ {b.text}")
        else:
            self.values.remove(total)
            text, axes = self.expression(dtype, inside, 2)
            if variable not in axes:
                text = f"({text} + {variable}.to({dtype.name}))"
            part = self.fresh()
            self.line(f"{part} = {text}")
            if kind == "sum":
                self.line(f"{total.text} += sum({part}, over={variable})")
            elif kind == "max":
                self.line(f"{total.text} = maximum({total.text}, max({part}, over={variable}))")
            else:
                best = self.fresh()
                self.line(f"{best} = min({part}, over={variable})")
                self.line(f"{total.text} = where({best} < {total.text}, {best}, {total.text})")
        if count is not None:
            self.line(f"{count.text} += sum(({variable} >= 0).to(i32), over={variable})")
        self.depth -= 1
        del self.loops[dim]
        del self.values[before:]
        self.values.append(total)
        if count is not None:
            self.values.append(count)

    def scalar_loop(self) -> None:
        """A range loop that carries a scalar."""
        self.features.add("range")
        dtype = self.one_of([f32, i32])
        value = _Value(self.fresh(), dtype, ())
        counter = self.fresh("j")
        self.line(f"{value.text} = {'1' if dtype == i32 else '1.0'}")
        dim = self.new_dim()
        name = self.fresh("t")
        self.tensors.append(TensorSpec(name, dtype, (dim,)))
        bound = self.one_of([dim, f"0, {dim}, 2", f"{dim} // 2, {dim}"])
        self.line(f"for {counter} in range({bound}):")
        self.depth += 1
        item = f"{name}[{counter}]"
        self.line(self.one_of([
            f"{value.text} = {value.text} + {item}",
            f"{value.text} = {value.text} - {item} if {counter} > 2 else {item}",
            f"{value.text} = max({value.text}, {item}) if {item} > 1 and {counter} != 3 else {value.text}",
        ]))
        self.depth -= 1
        self.values.append(value)

    def rewrites(self) -> None:
        """Outputs loaded and stored again at the same element, or, along axes of `whole`, at any."""
        self.features.add("rewritten")
        for _ in range(self.draw(st.integers(1, 4))):
            name, dtype, order = self.one_of(self.stored)
            axes = tuple(self.loops[dim][0] for dim in order if self.loops[dim][1] != "each")
            indices = [f"{dim} - 1 - {self.loops[dim][0]}" if self.loops[dim][1] == "whole" and self.chance(30) else
                       self.loops[dim][0] for dim in order]
            target = f"{name}[{', '.join(indices)}]"
            if self.chance(50):
                self.name(target, dtype, axes)
            else:
                text, _ = self.expression(dtype, axes, self.draw(st.integers(0, 1)))
                self.line(f"{target} {self.one_of(['=', '=', '+='])} {text}")

    def another_nest(self) -> None:
        """Loops after the others, over what these stored."""
        self.features.add("nests")
        name, dtype, order = self.one_of(self.stored)
        self.depth = 1
        self.loops.clear()
        self.values.clear()
        for dim in order:
            self.open_loop([dim], self.one_of(["each", "tiles"]))
        indices = ", ".join(self.loops[dim][0] for dim in order)
        self.name(f"{name}[{indices}]", dtype, self.axes())
        self.assignments(self.draw(st.integers(0, 2)), self.axes())
        text, spanned = self.expression(dtype, self.axes(), 2)
        if self.chance(40):
            self.line(f"{name}[{indices}] = {text}")
        else:
            self.store(text, dtype, spanned)

    def before_the_nest(self) -> None:
        """Values made at the top of the kernel, which its loops use."""
        self.features.add("parts")
        dim = self.new_dim()
        self.open_loop([dim], "whole")
        axis = self.loops[dim][0]
        self.load([dim])
        self.assignments(self.draw(st.integers(0, 1)), (axis,))
        self.reduction((axis,), (axis,))
        if self.chance(30):
            self.scalar_loop()
        if self.chance(60):
            del self.loops[dim]
            self.values = [v for v in self.values if axis not in v.axes]

    # The whole kernel.

    def kernel(self) -> KernelCase:
        nest = []
        kinds = ["each", "tiles", "whole"]
        for _ in range(self.draw(st.integers(1, 3))):
            nest.append((self.new_dim(), self.one_of(kinds)))
        nest.sort(key=lambda entry: kinds.index(entry[1]))
        if self.chance(20):
            self.before_the_nest()
        self.outside = list(self.values)
        for kind in kinds:
            dims = [dim for dim, own in nest if own == kind]
            if not dims:
                continue
            if kind != "whole" and len(dims) > 1 and self.chance(40):
                for dim in dims:
                    self.open_loop([dim], kind)
            else:
                self.open_loop(dims, kind)
        axes = self.axes()
        dims = [dim for dim, _ in nest]
        for _ in range(self.draw(st.integers(1, 3))):
            self.load(dims if self.chance(60) else [d for d in dims if self.chance(60)])
        whole = tuple(variable for variable, kind in self.loops.values() if kind == "whole")
        self.assignments(self.draw(st.integers(0, 2)), axes)
        for _ in range(self.draw(st.integers(0, 2))):
            choice = self.draw(st.integers(0, 9))
            if choice < 4 and whole:
                over = whole if len(whole) == 1 or self.chance(30) else (self.one_of(whole),)
                self.reduction(over, axes)
            elif choice < 7:
                self.carried(axes)
            elif choice < 8:
                self.scalar_loop()
            else:
                self.branch(axes)
        self.assignments(self.draw(st.integers(0, 2)), axes)
        for position in range(self.draw(st.integers(1, 2))):
            if self.chance(10):
                self.features.add("bool-tensor")
                text, spanned = self.condition(axes, 2)
                self.store(text, DTYPES["bool"], spanned)
                continue
            dtype = self.dtype()
            text, spanned = self.expression(dtype, axes, 2)
            self.store(text, dtype, spanned, position == 0 and self.chance(20))
        if self.stored and self.chance(25):
            self.rewrites()
        for _ in range(self.draw(st.integers(1, 3)) if self.stored and self.chance(15) else 0):
            self.another_nest()
        return self.finish()

    def finish(self) -> KernelCase:
        parameters = [f"{t.name}: Tensor[{', '.join([t.dtype.name, *map(str, t.dims)])}]" for t in self.tensors]
        parameters += [f"{name}: {dtype.name}" for name, dtype, _ in self.scalars]
        # A dimension that only a loop or a scalar names needs a tensor to come from.
        declared = {d for t in self.tensors for d in t.dims}
        for dim in self.dims:
            if dim not in declared:
                name = self.fresh("t")
                self.tensors.append(TensorSpec(name, f32, (dim,)))
                parameters.append(f"{name}: Tensor[f32, {dim}]")
        names = sorted({d for t in self.tensors for d in t.dims if isinstance(d, str)} | set(self.dims))
        head = [HEADER.rstrip("\n")]
        if names:
            head.append(f"{', '.join(names)}{',' if len(names) == 1 else ''} = "
                        f"{'(' if len(names) == 1 else ''}dims(\"{' '.join(names)}\"){',)' if len(names) == 1 else ''}")
        source = "\n".join([*head, "", HELPERS, "@kernel", f"def random_kernel({', '.join(parameters)}):",
                            *self.lines, ""])
        derived = tuple(self.derived[name] for name in sorted(self.derived))
        return KernelCase(source, "random_kernel", tuple(self.tensors), tuple(self.scalars), derived,
                          frozenset(self.positive), frozenset(self.features))


def _union(*several: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(axis for axes in several for axis in axes))


@st.composite
def kernels(draw: Draw, dtypes: tuple[str, ...] = ALL_DTYPES, functions: bool = True) -> KernelCase:
    """Random kernels. dtypes: names of the element types to use. functions: with exp, tanh and their like."""
    return _Writer(draw, dtypes, functions).kernel()


def _reject_unbuildable(error: KernelError) -> NoReturn:
    """Drop a drawn kernel that the front end rightly refuses: a constant folded to one that its dtype cannot hold."""
    if error.kind in ("literal-range", "constant-arithmetic"):
        reject()
    raise error


def built(case: KernelCase) -> tuple[Any, Function]:
    """The kernel of a case, unless it is one to drop, and its tile IR."""
    kernel = case.load()
    try:
        return kernel, kernel.tile_ir()
    except KernelError as error:
        _reject_unbuildable(error)


__all__ = ["ALL_DTYPES", "built", "kernels"]
