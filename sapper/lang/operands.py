"""Operands: from what names are bound to, to IR values; and how ops are made.

Enters: what a name or literal is bound to (bindings.py), with its node in the source. Leaves: IR values, in the block
at hand; an error at the author's line for what is no operand. Holds: constants and dimensions stand once, at the head
of the function, and the coordinates of an axis at the head of its scope; equal computations on indices are made once;
of each integer value there is the affine form, of each value how many of the open loops it may depend on.

Python numbers are weak: they take the dtype of what they meet. A value made of Python numbers alone whose choice falls
at run time (`1 if c else 2`) is weak too, until it meets a dtype.
"""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NoReturn

from ..ir.nodes import Builder, Function, Op, Value
from ..ir.types import DType, TensorType, TileType, bool_, f32, i32, index, spell_nested
from .affine import Affine
from .bindings import Axis, Carried, Frame, LoopRange, Span, Walked, axes_of, dims_of, dtype_of, near
from .dims import Dim, DimExpression, evaluate, nested
from .errors import KernelError

INDEX = TileType(index)


class Operands(ABC):
    """Makes ops in the block at hand. frame: where errors are reported; static: fixed extents by dimension name."""

    def __init__(self, function: Function, static: Mapping[str, int], dim_names: list[str]) -> None:
        self.function = function
        self.static = static
        self.dim_names = dim_names
        self.builder = Builder(function.body)
        self.frame: Frame
        self.prelude: list[Op] = []
        self.dim_values: dict[str, Value] = {}
        self.dim_expressions: dict[Value, DimExpression] = {}
        self.constants: dict[tuple[str, str], Value] = {}
        self.known: list[dict[tuple[Any, ...], Value]] = [{}, {}]  # of the head, of the body, of open blocks
        self.forms: dict[Value, Affine] = {}
        self.levels: dict[Value, int] = {}
        self.weak: set[Value] = set()
        self.level = 0
        self.axes: dict[str, Axis] = {}
        self.ranges: dict[Value, tuple[Affine, Affine]] = {}
        self.counters: dict[Value, Value] = {}  # of how many steps a counter has taken
        self.guards = 0  # open run-time branches
        self.ragged = 0  # open loops whose range depends on run-time values, so that it may be empty
        self.branches: list[tuple[Value, bool]] = []  # conditions of the open branches, and which side it is
        self.walks: dict[Any, Walked] = {}  # of axes by name, and of indices of loops
        self.carries: dict[Value, Carried] = {}  # of scalars to which each step of a loop adds the same

    # Errors.

    def fail(self, kind: str, headline: str, node: Any, found: str, expected: str, mend: str) -> NoReturn:
        notes = []
        frame: Frame | None = self.frame
        place = self.frame.parsed.location(node)
        while frame is not None and frame.caller is not None:
            call = frame.caller.parsed.location(frame.call_node)
            notes.append(f"in {frame.name}(), called from {call.file}:{call.line}")
            frame = frame.caller
        raise KernelError(kind, headline, place, found, expected, mend, tuple(notes))

    def at(self, node: Any) -> None:
        """Ops made from here on come from this place in the source."""
        self.builder.location = self.frame.parsed.location(node)

    def describe(self, value: Any) -> str:
        """A value in the words of an error message."""
        if isinstance(value, Value):
            if isinstance(value.type, TensorType):
                return f"tensor {value.name} ({value.type})"
            if value in self.weak:
                return "a number without a dtype"
            return f"{value.type}" if axes_of(value) else f"a scalar {value.type}"
        if isinstance(value, Axis):
            return f"axis {value.name}"
        if isinstance(value, (bool, int, float)):
            return f"the Python number {value!r}"
        if isinstance(value, DimExpression):
            return f"dimension {value!r}"
        if isinstance(value, Span):
            return "a span"
        if isinstance(value, LoopRange):
            return f"{value.kind}(...)"
        if isinstance(value, DType):
            return f"the dtype {value.name}"
        if value is None:
            return "None"
        name = getattr(value, "__name__", None)
        return f"{type(value).__name__} {name}" if name else f"the Python {type(value).__name__} {value!r}"

    def text(self, node: Any) -> str:
        """The source of an expression, with brackets where a method call needs them."""
        text = ast.unparse(node)
        return text if isinstance(node, (ast.Name, ast.Subscript, ast.Call, ast.Attribute)) else f"({text})"

    # Constants, dimensions and coordinates.

    def constant(self, number: Any, dtype: DType, node: Any) -> Value:
        """A Python number as a scalar of a dtype; the op stands at the head of the function, once."""
        if dtype.kind == "b":
            if not isinstance(number, bool):
                self.fail("dtype-mix", "a number meets a bool", node, f"{number!r}", "True or False",
                          "compare, or write .to(dtype)")
        elif dtype.kind == "f":
            number = float(number)
        else:
            if isinstance(number, float):
                mend = f"write {int(number)}" if number.is_integer() else "write .to(f32) on the tile"
                if number in (float("inf"), float("-inf")) and dtype.kind in "iu":
                    lowest = 0 if dtype.kind == "u" else -(2 ** (dtype.bits - 1))
                    mend = f"write {lowest if number < 0 else lowest + 2 ** dtype.bits - 1}, the farthest that it holds"
                self.fail("literal-dtype", f"a float literal meets {dtype.name}", node, f"{number!r} with {dtype.name}",
                          "an integer", mend)
            number = int(number)
            bits = 64 if dtype.kind == "x" else dtype.bits
            low, high = (0, 2**bits - 1) if dtype.kind == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            if not low <= number <= high:
                self.fail("literal-range", f"{dtype.name} cannot hold {number}", node, str(number), f"{low} to {high}",
                          f"write {number:#x} - 2**{bits} for these bits, or cast the tile to a wider dtype"
                          if high < number < 2**bits else "cast the tile to a wider dtype")
        key = (dtype.name, repr(number))
        value = self.constants.get(key)
        if value is None:
            op = Op("const", [], (TileType(dtype),), {"value": number}, None, self.builder.location)
            self.prelude.append(op)
            value = self.constants[key] = op.results[0]
            self.levels[value] = 0
            if dtype.kind in "xiu":
                self.forms[value] = Affine(number)
        return value

    def default_dtype(self, number: Any) -> DType:
        """The dtype of a number that has met none: f32, i32 or bool."""
        return bool_ if isinstance(number, bool) else i32 if isinstance(number, int) else f32

    @abstractmethod
    def binary(self, name: str, a: Any, b: Any, node: Any, a_node: Any, b_node: Any) -> Any:
        """An elementwise op on two operands; two Python numbers give one."""

    def dimension(self, value: DimExpression, node: Any) -> Value | int:
        """A Dim or DimExpression as an int if it is fixed, else as an index scalar."""
        if isinstance(value, Dim):
            name = value.name
            if name in self.static:
                return self.static[name]
            found = self.dim_values.get(name)
            if found is None:
                if name not in self.dim_names:
                    self.fail("unbound-dim", f"dimension {name} has no value in this kernel", node, f"dimension {name}",
                              f"one of {', '.join(self.dim_names) or 'none: no tensor has a symbolic dimension'}",
                              near(name, self.dim_names, "give a parameter that dimension, or pass a scalar")
                              if self.frame.caller is None else "dimensions of a kernel go by name in what it calls, "
                              "too: name them alike, or walk t.shape[0] of a tensor t")
                op = Op("dim", [], (INDEX,), {"name": name}, None, None)
                self.prelude.append(op)
                found = self.dim_values[name] = op.results[0]
                found.name = name
                self.forms[found] = Affine(0, {name: 1})
                self.levels[found] = 0
            return found
        try:
            return evaluate(value, self.static)
        except KeyError:
            value = _rounded_up(value)
            left, right = (self.dimension(v, node) if isinstance(v, DimExpression) else v
                           for v in (value.left, value.right))
            result: Value | int = self.binary(value.op, left, right, node, node, node)
            if isinstance(result, Value):
                self.dim_expressions[result] = value
            return result
        except ZeroDivisionError:
            self.fail("constant-arithmetic", "division by zero", node, repr(value),
                      "a divisor other than 0", "divide by something else")

    def coordinate(self, axis: Axis, node: Any) -> Value:
        """The coordinate tile of an axis, one op at the head of the axis's scope."""
        self.check_axis(axis, node)
        value = axis.coordinate
        if value is None:
            op = Op("index", [], (TileType(index, (axis.name,)),), {"axis": axis.name}, None, axis.location)
            ops = axis.block.ops
            place = 0 if axis.anchor is None else ops.index(axis.anchor) + 1
            while place < len(ops) and ops[place].name == "index":
                place += 1
            ops.insert(place, op)
            value = axis.coordinate = op.results[0]
            self.forms[value] = Affine(0, {axis: 1})
            self.levels[value] = axis.level
        return value

    def axis(self, value: Any, node: Any, what: str) -> Axis:
        if not isinstance(value, Axis):
            mend = "name the variable of a loop over tiles, or of whole"
            if isinstance(value, DimExpression):
                mend = f"bring one: n = whole({value!r}), or for n in tiles({value!r})"
            self.fail("unknown-axis", f"{what} axes", node, self.describe(value),
                      "an axis (a variable of tiles, or whole)",
                      mend)
        self.check_axis(value, node)
        return value

    def check_axis(self, axis: Axis, node: Any) -> None:
        if not axis.in_scope:
            what = "loop" if axis.loop is not None else "block"
            self.fail("axis-out-of-scope", f"axis {axis.name} is used outside the {what} that brings it", node,
                      f"axis {axis.name}", "an axis in scope", f"move the use into the {what}")

    # Operands.

    def operand(self, value: Any, node: Any) -> Any:
        """A value that takes part in arithmetic: a tile or scalar Value, or a Python number."""
        if isinstance(value, Value):
            if isinstance(value.type, TileType):
                return value
            dims = dims_of(value)
            axes = ", ".join(dim.lower() if isinstance(dim, str) else "ijkpqrs"[i % 7] for i, dim in enumerate(dims))
            walk = f"for {axes} in tiles({', '.join(map(spell_nested, dims))})"
            self.fail("tensor-without-index", f"tensor {value.name} is used as a value", node, self.describe(value),
                      "a tile", f"walk it: {walk}, and index {value.name}[{axes}]")
        if isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, Axis):
            return self.coordinate(value, node)
        if isinstance(value, DimExpression):
            # An index scalar whether it is fixed or not, so that types do not depend on what is fixed.
            size = self.dimension(value, node)
            return size if isinstance(size, Value) else self.constant(size, index, node)
        if value is None:
            self.fail("missing-return", "a value is wanted where there is none", node, "None", "a tile or a number",
                      "let the function return its result")
        if isinstance(value, LoopRange):
            self.fail("bad-argument", f"{value.kind}(...) stands only after `in` of a for loop", node,
                      self.describe(value), "a tile or a number", f"write for n in {value.kind}(...)")
        kind = "bad-argument" if isinstance(value, (Span, tuple, str, DType)) or callable(value) else (
            "unsupported-constant")
        self.fail(kind, "this is no value to compute with", node, self.describe(value), "a tile, a scalar or a number",
                  "close over numbers, strings, tuples of them, dtypes and functions only"
                  if kind == "unsupported-constant" else "compute with numbers, scalars and tiles only")

    def value(self, value: Any, dtype: DType | None, node: Any) -> Value:
        """An operand as an IR value; a Python number takes dtype, or its default."""
        value = self.operand(value, node)
        if isinstance(value, Value):
            if dtype is not None and value in self.weak and dtype_of(value) != dtype:
                return self.strengthen(value, dtype, node)
            return value
        return self.constant(value, dtype or self.default_dtype(value), node)

    def strengthen(self, value: Value, dtype: DType, node: Any) -> Value:
        """A weak value takes the dtype that it meets."""
        have = dtype_of(value)
        if have == dtype:
            return value
        if (have.kind == "f" and dtype.kind != "f") or (have.kind == "b") != (dtype.kind == "b"):
            self.fail("literal-dtype", f"a {'float' if have.kind == 'f' else have.name} number meets {dtype.name}",
                      node,
                      f"{have.name} with {dtype.name}", "numbers of one kind", "write .to(dtype) on one of the two")
        return self.raw_cast(value, dtype)

    def need_compute(self, value: Value, node: Any, what: str) -> None:
        dtype = dtype_of(value)
        if not dtype.compute:
            to = "f32" if dtype.kind == "f" else "i32"
            self.fail("dtype-not-computed", f"{dtype.name} can be stored and cast, but not computed with", node,
                      f"{what} of {dtype.name}", "a dtype that can be computed with",
                      f"write {self.text(node)}.to({to})")

    def joined_axes(self, *values: Value) -> tuple[str, ...]:
        axes: tuple[str, ...] = axes_of(values[0])
        for value in values[1:]:
            more = axes_of(value)
            if more != axes:
                axes = axes + tuple(axis for axis in more if axis not in axes)
        return axes

    def raw_cast(self, value: Value, dtype: DType) -> Value:
        result = self.emit("cast", [value], TileType(dtype, axes_of(value)))
        if dtype.size_bytes >= 4 and dtype.kind in "xiu" and (value in self.forms or dtype_of(value) is index):
            self.forms[result] = self.form_of(value)    # narrow integers wrap
        return result

    def emit(self, name: str, operands: list[Value], type: TileType, **attributes: Any) -> Value:
        """One op with one result; equal computations on indices are made once."""
        if type.dtype.kind != "x":
            return self.builder.value(name, operands, type, **attributes)
        key = (name, *operands, type.axes, *attributes.values())
        for known in reversed(self.known):
            if key in known:
                found: Value = known[key]
                return found
        value: Value = self.builder.value(name, operands, type, **attributes)
        self.known[-1][key] = value
        return value

    def level_of(self, value: Value) -> int:
        """How many of the open loops a value may depend on."""
        known = self.levels.get(value)
        if known is None:
            op = value.op
            known = self.level if op is None else max((self.level_of(o) for o in op.operands), default=0)
            self.levels[value] = known
        return known

    def form_of(self, value: Value) -> Affine:
        """The affine form of an integer value; an opaque value is a symbol of its own."""
        form = self.forms.get(value)
        if form is None:
            form = self.forms[value] = Affine(0, {value: 1})
        return form


def _rounded_up(value: DimExpression) -> DimExpression:
    """-(-a // b) as (a + b - 1) // b, of which no part is negative; others as they are."""
    match nested(value):
        case ["sub", 0, ["floordiv", ["sub", 0, _], int(b)]] if b > 0:
            negative: Any = value.right
            return DimExpression("floordiv", DimExpression("add", negative.left.right, b - 1), b)
    return value
