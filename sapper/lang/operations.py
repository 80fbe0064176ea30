"""Typed operations: from values of the front end to tile IR ops, with every check on dtypes, axes and scalars.

What a name in a kernel may be bound to: an IR Value (a tile or scalar, or a tensor argument), an Axis, a Span, a
LoopRange, or a plain Python object (numbers, dtypes, tuples, functions, Dims, ...), which exists at compile time
only. Python numbers are weak: they take the dtype of what they meet. A value made of Python numbers alone whose
choice falls at run time (`1 if c else 2`) is weak too, until it meets a dtype.
"""

from __future__ import annotations

import ast
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from ..ir.nodes import Block, Builder, Function, Location, Op, Value
from ..ir.types import DType, TensorType, TileType, bf16, bool_, f16, f32, f64, i8, i32, i64, index, u8
from .affine import Affine
from .dims import OPERATORS, Dim, DimExpression, evaluate
from .errors import KernelError
from .source import ParsedFunction

INDEX = TileType(index)
BOOL = TileType(bool_)

UNARY_FLOAT = frozenset({"exp", "exp2", "log", "log2", "sqrt", "rsqrt", "tanh", "sigmoid", "erf", "sin", "cos",
                         "floor", "ceil", "round"})
SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "mod": "%", "shl": "<<", "shr": ">>",
           "and": "&", "or": "|", "xor": "^", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
           "min": "minimum", "max": "maximum"}
PYTHON_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    **OPERATORS,
    "div": lambda a, b: a / b, "shl": lambda a, b: a << b, "shr": lambda a, b: a >> b,
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "min": lambda a, b: a if a < b else b, "max": lambda a, b: a if a > b else b,
}
PYTHON_UNARY: dict[str, Callable[[Any], Any]] = {
    "abs": abs, "exp": math.exp, "exp2": lambda x: 2.0**x, "log": math.log, "log2": math.log2, "sqrt": math.sqrt,
    "rsqrt": lambda x: 1.0 / math.sqrt(x), "tanh": math.tanh, "sigmoid": lambda x: 1.0 / (1.0 + math.exp(-x)),
    "erf": math.erf, "sin": math.sin, "cos": math.cos,
    "floor": lambda x: float(math.floor(x)), "ceil": lambda x: float(math.ceil(x)), "round": lambda x: float(round(x)),
}
COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
MOVABLE = frozenset({"const", "dim", "index", "full", "cast", "bitcast", "select", "neg", "abs", "not", "add", "sub",
                     "mul", "div", "min", "max", "shl", "shr", "and", "or", "xor", *COMPARISONS, *UNARY_FLOAT})
"""Ops without effect or hazard, which may run though their result is not wanted (division by zero is a hazard)."""
PRODUCT_DTYPE: dict[tuple[str, str], DType] = {
    **{(a.name, b.name): f32 for a in (bf16, f32) for b in (bf16, f32)},
    **{(a.name, b.name): f32 for a in (f16, f32) for b in (f16, f32)},
    **{(a.name, b.name): i32 for a in (i8, u8) for b in (i8, u8)},
    ("f64", "f64"): f64,
}


class Axis:
    """An axis in scope: name, unique in the function, and what it walks.

    start, stop: the range as affine forms. loop: the LoopScope that brings it, None for `whole`.
    level: how many loops enclose it, its own included. block and anchor: where its `index` op goes.
    """

    __slots__ = ("anchor", "block", "coordinate", "in_scope", "level", "location", "loop", "name", "start", "stop")

    def __init__(self, name: str, start: Affine, stop: Affine, loop: LoopScope | None, level: int, block: Block,
                 anchor: Op | None, location: Location) -> None:
        self.name = name
        self.start = start
        self.stop = stop
        self.loop = loop
        self.level = level
        self.block = block
        self.anchor = anchor
        self.location = location
        self.coordinate: Value | None = None
        self.in_scope = True

    def __repr__(self) -> str:
        return f"axis {self.name}"


class LoopScope:
    """A loop while its body is read.

    kind: "tiles", "each" or "range". variables: Axes, or index Values. guards: open branches and ragged loops.
    disjoint: see LoopRange.
    """

    __slots__ = ("carries", "disjoint", "guards", "kind", "level", "names", "node", "variables")

    def __init__(self, kind: str, level: int, guards: int, node: ast.For, names: list[str], carries: bool) -> None:
        self.kind = kind
        self.level = level
        self.guards = guards
        self.node = node
        self.names = names
        self.carries = carries
        self.disjoint = False
        self.variables: list[Any] = []


class Span:
    """`span(start, stop)`: two ints, Dims or integer scalars."""

    __slots__ = ("start", "stop")

    def __init__(self, start: Any, stop: Any) -> None:
        self.start = start
        self.stop = stop


class LoopRange:
    """What a for loop walks. kind: "tiles", "each" or "range"; spans: one for each loop variable; step of a range.
    disjoint: the author asserts that no iteration touches what another writes."""

    __slots__ = ("disjoint", "kind", "spans", "step")

    def __init__(self, kind: str, spans: list[Span], step: int = 1, disjoint: bool = False) -> None:
        self.disjoint = disjoint
        self.kind = kind
        self.spans = spans
        self.step = step


class Frame:
    """One function being read: its source, names, and the call that led to it.

    env: the local names. function_globals, closure: where other names are. outer: the frame of the function in which
    a nested one was defined. nesting: how many run-time loops and branches of this frame are open.
    """

    __slots__ = ("assigned_at", "call_node", "caller", "closure", "env", "function_globals", "key", "live",
                 "local_names",
                 "name", "nesting", "outer", "parsed")

    def __init__(self, name: str, key: Any, parsed: ParsedFunction, function_globals: Mapping[str, Any],
                 closure: Mapping[str, Any], local_names: frozenset[str], live: Mapping[ast.AST, tuple[str, ...]],
                 caller: Frame | None, call_node: ast.AST | None, outer: Frame | None = None) -> None:
        self.name = name
        self.key = key
        self.parsed = parsed
        self.function_globals = function_globals
        self.closure = closure
        self.local_names = local_names
        self.live = live
        self.caller = caller
        self.call_node = call_node
        self.outer = outer
        self.env: dict[str, Any] = {}
        self.assigned_at: dict[str, ast.AST] = {}
        self.nesting = 0


def is_tile(value: Any) -> bool:
    return isinstance(value, Value) and isinstance(value.type, TileType)


def is_tensor(value: Any) -> bool:
    return isinstance(value, Value) and isinstance(value.type, TensorType)


def dtype_of(value: Value) -> DType:
    """The element type of a tile, scalar or tensor."""
    return value.type.dtype  # type: ignore[union-attr]


def axes_of(value: Value) -> tuple[str, ...]:
    """The axes of a tile or scalar."""
    return value.type.axes  # type: ignore[union-attr]


def dims_of(value: Value) -> tuple[str | int, ...]:
    """The extents of a tensor."""
    return value.type.dims  # type: ignore[union-attr]


def near(name: str, known: Iterable[str], otherwise: str) -> str:
    """`did you mean ...?`, or what else to do where no name is near."""
    close = difflib.get_close_matches(name, list(known), 1, 0.65)
    return f"did you mean {close[0]}?" if close else otherwise


class Operations:
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
        self.guards = 0  # open run-time branches
        self.ragged = 0  # open loops whose range depends on run-time values, so that it may be empty

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
                self.fail("literal-dtype", f"a float literal meets {dtype.name}", node, f"{number!r} with {dtype.name}",
                          "an integer", f"write {int(number)}" if number.is_integer() else "write .to(f32) on the tile")
            number = int(number)
            bits = 64 if dtype.kind == "x" else dtype.bits
            low, high = (0, 2**bits - 1) if dtype.kind == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            if not low <= number <= high:
                self.fail("literal-range", f"{dtype.name} cannot hold {number}", node, str(number), f"{low} to {high}",
                          "cast the tile to a wider dtype")
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
                              near(name, self.dim_names, "give a parameter that dimension, or pass a scalar"))
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
            walk = f"for {axes} in tiles({', '.join(map(str, dims))})"
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

    def raw_cast(self, value: Value, dtype: DType) -> Value:
        result = self.emit("cast", [value], TileType(dtype, axes_of(value)))
        if dtype.kind in "xiu" and value in self.forms:
            self.forms[result] = self.forms[value]
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

    # Elementwise.

    def need_compute(self, value: Value, node: Any, what: str) -> None:
        dtype = dtype_of(value)
        if not dtype.compute:
            to = "f32" if dtype.kind == "f" else "i32"
            self.fail("dtype-not-computed", f"{dtype.name} can be stored and cast, but not computed with", node,
                      f"{what} of {dtype.name}", "a dtype that can be computed with",
                      f"write {self.text(node)}.to({to})")

    def text(self, node: Any) -> str:
        """The source of an expression, with brackets where a method call needs them."""
        text = ast.unparse(node)
        return text if isinstance(node, (ast.Name, ast.Subscript, ast.Call, ast.Attribute)) else f"({text})"

    def unify(self, a: Any, b: Any, what: str, node: Any, a_node: Any, b_node: Any) -> tuple[Value, Value]:
        """Two operands, at least one of them a Value, brought to one dtype by the rules of the language."""
        if not isinstance(a, Value):
            return self.constant(a, dtype_of(b), a_node), b
        if not isinstance(b, Value):
            return a, self.constant(b, dtype_of(a), b_node)
        left: DType = dtype_of(a)
        right: DType = dtype_of(b)
        if left == right:
            return a, b
        if a in self.weak:
            if b not in self.weak or left.kind != "f":
                return self.strengthen(a, right, a_node), b
            return a, self.strengthen(b, left, b_node)
        if b in self.weak:
            return a, self.strengthen(b, left, b_node)
        if left.kind == "x" and right in (i32, i64):
            return a, self.raw_cast(b, index)
        if right.kind == "x" and left in (i32, i64):
            return self.raw_cast(a, index), b
        self.mix(left, right, what, node, a_node, b_node)

    def mix(self, left: DType, right: DType, what: str, node: Any, a_node: Any, b_node: Any) -> NoReturn:
        if left.kind == right.kind == "f":
            narrow, wide = (a_node, right) if left.bits < right.bits or left == bf16 else (b_node, left)
        elif (left.kind == "f") != (right.kind == "f"):
            narrow, wide = (b_node, left) if left.kind == "f" else (a_node, right)
        else:
            narrow, wide = (a_node, right) if left.bits < right.bits else (b_node, left)
        if wide.kind == "x":
            mend = f"write {self.text(narrow)}.to(i32)"
        else:
            mend = f"write {self.text(narrow)}.to({wide.name})"
        self.fail("dtype-mix", f"{what} mixes {left.name} and {right.name}", node, f"{left.name} and {right.name}",
                  "equal dtypes", mend)

    def joined_axes(self, *values: Value) -> tuple[str, ...]:
        axes: tuple[str, ...] = axes_of(values[0])
        for value in values[1:]:
            more = axes_of(value)
            if more != axes:
                axes = axes + tuple(axis for axis in more if axis not in axes)
        return axes

    def binary(self, name: str, a: Any, b: Any, node: Any, a_node: Any, b_node: Any) -> Any:
        """An elementwise op on two operands; two Python numbers give one."""
        a, b = self.operand(a, a_node), self.operand(b, b_node)
        symbol = SYMBOLS[name]
        if not isinstance(a, Value) and not isinstance(b, Value):
            try:
                return PYTHON_BINARY[name](a, b)
            except (ArithmeticError, TypeError, ValueError) as error:
                self.fail("constant-arithmetic", "arithmetic on constants fails", node,
                          f"{a!r} {symbol} {b!r}: {error}", "constants that it is defined for", "change the constants")
        for side, side_node in ((a, a_node), (b, b_node)):
            if isinstance(side, Value):
                self.need_compute(side, side_node, symbol)
        if name in ("floordiv", "mod") and not isinstance(b, Value) and b == 0:
            self.fail("constant-arithmetic", "division by zero", node, f"{symbol} 0",
                      "a divisor other than 0", "divide by something else")
        simple = self.simplified(name, a, b)
        if simple is not None:
            return simple
        weak = all(not isinstance(v, Value) or v in self.weak for v in (a, b))
        if weak:  # the wider kind of the two: a float if either is one
            kinds = [dtype_of(v) if isinstance(v, Value) else self.default_dtype(v)
                     for v in (a, b)]
            joint = f32 if f32 in kinds else i32 if i32 in kinds else kinds[0]
            if joint.kind != "b" and bool_ not in kinds:
                a, b = self.value(a, joint, a_node), self.value(b, joint, b_node)
        a, b = self.unify(a, b, symbol, node, a_node, b_node)
        dtype: DType = dtype_of(a)
        self.check_domain(name, dtype, symbol, node, a_node)
        self.at(node)
        axes = self.joined_axes(a, b)
        if name in COMPARISONS:
            return self.emit(name, [a, b], TileType(bool_, axes))
        result = self.emit(name, [a, b], TileType(dtype, axes))
        if dtype.kind in "xi" and name in ("add", "sub", "mul") and result not in self.forms:
            left, right = self.form_of(a), self.form_of(b)
            if name == "mul":
                if not right.terms:
                    self.forms[result] = left.times(right.constant)
                elif not left.terms:
                    self.forms[result] = right.times(left.constant)
            else:
                self.forms[result] = left.plus(right, 1 if name == "add" else -1)
        if weak and name not in COMPARISONS:
            self.weak.add(result)
        return result

    def simplified(self, name: str, a: Any, b: Any) -> Any:
        """x + 0, x * 1 and the like on indices, which affine expressions of constants leave behind."""
        if isinstance(a, Value) and isinstance(b, int) and dtype_of(a).kind == "x":
            if (b == 0 and name in ("add", "sub")) or (b == 1 and name in ("mul", "floordiv")):
                return a
        elif (isinstance(b, Value) and isinstance(a, int) and dtype_of(b).kind == "x"
              and ((a == 0 and name == "add") or (a == 1 and name == "mul"))):
            return b
        return None

    def check_domain(self, name: str, dtype: DType, symbol: str, node: Any, a_node: Any) -> None:
        if name == "div" and dtype.kind != "f":
            self.fail("division-dtype", f"/ on {dtype.name}", node, dtype.name, "floats",
                      f"write // to divide integers, or {self.text(a_node)}.to(f32)")
        if name in ("floordiv", "mod", "shl", "shr") and dtype.kind not in "xiu":
            mend = "write floor(a / b)" if name == "floordiv" else "cast to an integer dtype"
            self.fail("op-dtype", f"{symbol} on {dtype.name}", node, dtype.name, "integers", mend)
        if name in ("and", "or", "xor") and dtype.kind == "f":
            self.fail("op-dtype", f"{symbol} on {dtype.name}", node, dtype.name, "integers or bools",
                      "compare first, or write .bits(i32)")
        if dtype.kind == "b" and name not in ("and", "or", "xor", "eq", "ne"):
            self.fail("op-dtype", f"{symbol} on bool", node, "bool", "numbers", f"write {self.text(a_node)}.to(f32)")

    def unary(self, name: str, a: Any, node: Any, a_node: Any) -> Any:
        """An elementwise function of one operand (also "neg"); a Python number gives one."""
        a = self.operand(a, a_node)
        if not isinstance(a, Value):
            try:
                return -a if name == "neg" else PYTHON_UNARY[name](a)
            except (ArithmeticError, ValueError) as error:
                self.fail("constant-arithmetic", f"{name} of a constant fails", node, f"{name}({a!r}): {error}",
                          "a constant that it is defined for", "change the constant")
        self.need_compute(a, a_node, name)
        dtype: DType = dtype_of(a)
        if a in self.weak and name in UNARY_FLOAT and dtype.kind != "f":
            a, dtype = self.raw_cast(a, f32), f32
            self.weak.add(a)
        if (name in UNARY_FLOAT and dtype.kind != "f") or dtype.kind == "b":
            wanted = "floats" if name in UNARY_FLOAT else "numbers"
            self.fail("op-dtype", f"{name} on {dtype.name}", node, dtype.name, wanted,
                      f"write {self.text(a_node)}.to(f32)")
        self.at(node)
        result = self.emit(name, [a], a.type)
        if name == "neg" and dtype.kind in "xi":
            self.forms[result] = self.form_of(a).times(-1)
        if a in self.weak:
            self.weak.add(result)
        return result

    def invert(self, a: Any, node: Any, a_node: Any) -> Any:
        """~a"""
        a = self.operand(a, a_node)
        if not isinstance(a, Value):
            if isinstance(a, bool):
                return not a
            if isinstance(a, int):
                return ~a
            self.fail("op-dtype", "~ on a float", node, repr(a), "an integer or a bool",
                      "write -a, or convert it to an integer")
        self.need_compute(a, a_node, "~")
        if dtype_of(a).kind == "f":
            self.fail("op-dtype", f"~ on {dtype_of(a).name}", node, dtype_of(a).name,
                      "integers or bools", f"write {self.text(a_node)}.bits(i32)")
        self.at(node)
        return self.emit("not", [a], TileType(dtype_of(a), axes_of(a)))

    def power(self, a: Any, b: Any, node: Any, a_node: Any, b_node: Any) -> Any:
        """a ** b for a constant small integer b, as products."""
        a = self.operand(a, a_node)
        b = self.operand(b, b_node)
        if not isinstance(a, Value) and not isinstance(b, Value):
            try:
                result = a**b
            except ArithmeticError as error:
                self.fail("constant-arithmetic", "arithmetic on constants fails", node, f"{a!r} ** {b!r}: {error}",
                          "constants that it is defined for", "change the constants")
            if isinstance(result, complex):
                self.fail("constant-arithmetic", "arithmetic on constants fails", node, f"{a!r} ** {b!r} is complex",
                          "a real result", "take a positive base, or an integer power")
            return result
        if isinstance(b, float) and b.is_integer():
            b = int(b)
        if isinstance(b, Value) or not isinstance(b, int) or isinstance(b, bool) or not -16 <= b <= 16:
            mend = {0.5: "write sqrt(x)", -0.5: "write rsqrt(x)"}.get(b) if isinstance(b, float) else None
            self.fail("power", "** needs a small constant integer", node, self.describe(b), "an integer from -16 to 16",
                      mend or ("write exp2(x)" if a == 2 else "write exp(log(x) * y)"))
        if b < 0 and dtype_of(a).kind != "f":
            self.fail("power", "a negative power of an integer", node, f"{dtype_of(a).name} ** {b}", "a float",
                      f"write {self.text(a_node)}.to(f32)")
        if b == 0:
            one = self.constant(1, dtype_of(a), node)
            return self.emit("full", [one], TileType(dtype_of(a), axes_of(a))) if axes_of(a) else one
        result = None
        square, exponent = a, abs(b)
        while True:
            if exponent & 1:
                result = square if result is None else self.binary("mul", result, square, node, a_node, a_node)
            exponent >>= 1
            if not exponent:
                break
            square = self.binary("mul", square, square, node, a_node, a_node)
        return self.binary("div", 1, result, node, node, a_node) if b < 0 else result

    def where(self, condition: Any, a: Any, b: Any, node: Any, nodes: Sequence[Any]) -> Any:
        """a where the condition holds, else b."""
        condition = self.operand(condition, nodes[0])
        a, b = self.operand(a, nodes[1]), self.operand(b, nodes[2])
        if isinstance(condition, Value):
            if dtype_of(condition) != bool_:
                self.fail("op-dtype", "the condition of where is no bool", nodes[0], self.describe(condition), "bool",
                          f"write {self.text(nodes[0])} != 0")
        elif not isinstance(condition, bool):
            self.fail("op-dtype", "the condition of where is no bool", nodes[0], self.describe(condition), "bool",
                      f"write {self.text(nodes[0])} != 0")
        else:
            return a if condition else b
        a, b, weak = self.pair(a, b, "where", node, nodes[1], nodes[2])
        for side, side_node in ((a, nodes[1]), (b, nodes[2])):
            self.need_compute(side, side_node, "where")
        self.at(node)
        result = self.emit("select", [condition, a, b],
                           TileType(dtype_of(a), self.joined_axes(condition, a, b)))
        if weak:
            self.weak.add(result)
        return result

    def pair(self, a: Any, b: Any, what: str, node: Any, a_node: Any, b_node: Any) -> tuple[Value, Value, bool]:
        """Two operands of one dtype, numbers allowed on both sides; whether the result is weak."""
        weak = all(not isinstance(v, Value) or v in self.weak for v in (a, b))
        if weak:
            kinds = [dtype_of(v) if isinstance(v, Value) else self.default_dtype(v)
                     for v in (a, b)]
            joint = f32 if f32 in kinds else kinds[0]
            a, b = self.value(a, joint, a_node), self.value(b, joint, b_node)
        a, b = self.unify(a, b, what, node, a_node, b_node)
        return a, b, weak

    def cast(self, a: Any, dtype: Any, node: Any, a_node: Any) -> Any:
        """a.to(dtype)"""
        dtype = bool_ if dtype is bool else dtype
        if not isinstance(dtype, DType):
            self.fail("bad-argument", "to() needs a dtype", node, self.describe(dtype), "a dtype such as f32",
                      "write .to(f32)")
        a = self.operand(a, a_node)
        if not isinstance(a, Value):
            if dtype.kind in "xiu" and isinstance(a, float):
                a = int(a)
            elif dtype.kind == "b":
                a = bool(a)
            if not dtype.compute:
                return self.raw_cast(self.constant(a, f32 if dtype.kind == "f" else i32, a_node), dtype)
            return self.constant(a, dtype, a_node)
        if dtype_of(a) == dtype and a not in self.weak:
            return a
        self.at(node)
        if dtype_of(a) == dtype:
            return self.builder.value("cast", [a], a.type)
        return self.raw_cast(a, dtype)

    def bits(self, a: Any, dtype: Any, node: Any, a_node: Any) -> Any:
        """a.bits(dtype)"""
        if not isinstance(dtype, DType) or dtype.kind in "xb":
            self.fail("bad-argument", "bits() needs a dtype", node, self.describe(dtype), "a dtype such as i32",
                      "write .bits(i32)")
        value = self.value(a, None, a_node)
        have: DType = dtype_of(value)
        if have.kind in "xb" or have.bits != dtype.bits:
            self.fail("op-dtype", f"bits() from {have.name} to {dtype.name}", node, f"{have.bits} bits to {dtype.bits}",
                      "dtypes of one width", "write .to(dtype) to convert the value")
        self.at(node)
        return self.emit("bitcast", [value], TileType(dtype, axes_of(value)))

    # Tiles from nothing.

    def full(self, axes: Sequence[Any], value: Any, dtype: Any, node: Any, axis_nodes: Sequence[Any],
             value_node: Any) -> Value:
        """A scalar spread over axes."""
        dtype = bool_ if dtype is bool else dtype
        if dtype is not None and not isinstance(dtype, DType):
            self.fail("bad-argument", "dtype is no dtype", node, self.describe(dtype), "a dtype such as f32",
                      "write dtype=f32")
        names = tuple(self.axis(a, n, "zeros and full need").name for a, n in zip(axes, axis_nodes, strict=True))
        if len(set(names)) < len(names):
            self.fail("bad-argument", "an axis is named twice", node, ", ".join(names), "different axes",
                      "name each axis once")
        value = self.operand(value, value_node)
        if isinstance(value, Value):
            have = dtype_of(value)
            if axes_of(value):
                self.fail("scalar-needed", "full spreads one value", value_node, self.describe(value), "a scalar",
                          "assign the tile itself: zeros and full make one from a single value")
            if dtype is not None and have != dtype and value not in self.weak:
                self.fail("dtype-mix", f"full of {dtype.name} from {have.name}", value_node, have.name, dtype.name,
                          f"write {self.text(value_node)}.to({dtype.name})")
        if dtype is None and (not isinstance(value, Value) or value in self.weak):
            self.fail("call-arguments", "full needs a dtype", node, self.describe(value), "dtype=...",
                      "write dtype=f32")
        if dtype is not None and not dtype.compute:
            self.fail("dtype-not-computed", f"{dtype.name} can be stored and cast, but not computed with", node,
                      f"a tile of {dtype.name}", "a dtype that can be computed with", "cast where it is stored")
        scalar = self.value(value, dtype, value_node)
        if not names:
            return scalar
        self.at(node)
        return self.emit("full", [scalar], TileType(dtype_of(scalar), names))

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

    # Reductions and contractions.

    def over_axes(self, over: Any, type: TileType, node: Any, what: str) -> list[Axis]:
        axes = [self.axis(a, node, "over needs") for a in (over if isinstance(over, tuple) else (over,))]
        for axis in axes:
            if axis.name not in type.axes:
                self.fail("over", f"{what} over axis {axis.name}, which the tile does not span", node,
                          f"{axis.name}; the tile is {type}",
                          f"one of {', '.join(type.axes)}" if type.axes else "a tile (this is a scalar)",
                          near(axis.name, type.axes, "reduce over an axis that it spans"))
        if not axes or len({a.name for a in axes}) < len(axes):
            self.fail("over", f"{what} needs different axes", node, str([a.name for a in axes]), "one or more axes",
                      "name each axis once")
        return axes

    def reduce(self, kind: str, a: Any, over: Any, node: Any, a_node: Any, over_node: Any) -> Value:
        """sum, max, min, argmax, argmin of a tile over axes."""
        a = self.operand(a, a_node)
        if not isinstance(a, Value):
            self.fail("over", f"{kind} of a number", a_node, repr(a), "a tile", "use the number itself")
        self.need_compute(a, a_node, kind)
        type: TileType = a.type  # type: ignore[assignment]
        axes = self.over_axes(over, type, over_node, kind)
        for axis in axes:
            self.need_sequential(axis, "reduce-parallel-axis", kind, node)
        if type.dtype.kind == "b":
            self.fail("op-dtype", f"{kind} on bool", node, str(type), "numbers", f"write {self.text(a_node)}.to(i32)")
        if kind in ("argmax", "argmin") and len(axes) > 1:
            self.fail("over", f"{kind} over several axes", node, ", ".join(x.name for x in axes), "one axis",
                      "reduce one axis after the other")
        names = [axis.name for axis in axes]
        dtype = index if kind in ("argmax", "argmin") else type.dtype
        self.at(node)
        return self.emit_fresh("reduce", [a], TileType(dtype, tuple(x for x in type.axes if x not in names)),
                               kind=kind, over=names)

    def ordered(self, what: str, a: Any, over: Any, node: Any, a_node: Any, over_node: Any) -> tuple[Value, Axis]:
        """The operand and the axis of an op that takes an axis in its order."""
        a = self.operand(a, a_node)
        if not isinstance(a, Value):
            self.fail("over", f"{what} of a number", a_node, repr(a), "a tile", "use the number itself")
        self.need_compute(a, a_node, what)
        type: TileType = a.type  # type: ignore[assignment]
        axes = self.over_axes(over, type, over_node, what)
        if len(axes) > 1:
            self.fail("over", f"{what} over several axes", node, ", ".join(x.name for x in axes), "one axis",
                      "name one axis; go over the others one after another")
        if type.dtype.kind == "b":
            self.fail("op-dtype", f"{what} on bool", node, str(type), "numbers", f"write {self.text(a_node)}.to(i32)")
        self.need_whole(axes[0], what, over_node)
        return a, axes[0]

    def need_whole(self, axis: Axis, what: str, node: Any) -> None:
        if axis.loop is not None:
            self.fail("whole-axis", f"{what} along axis {axis.name} of a loop", node,
                      f"{axis.name}, of which a tile is a part whose size the schedule picks", "an axis of `whole`",
                      f"take {axis.name} = whole(...)")

    def scan(self, kind: str, what: str, a: Any, over: Any, node: Any, a_node: Any, over_node: Any) -> Value:
        """cumsum, cummax, cummin"""
        a, axis = self.ordered(what, a, over, node, a_node, over_node)
        self.at(node)
        return self.emit_fresh("scan", [a], a.type, kind=kind, over=[axis.name])

    def topk(self, a: Any, into: Any, over: Any, node: Any, nodes: Sequence[Any], over_node: Any
             ) -> tuple[Value, Value]:
        """topk(a, into, over=...)"""
        a, axis = self.ordered("topk", a, over, node, nodes[0], over_node)
        into = self.axis(into, nodes[1], "topk gives its results along")
        self.need_whole(into, "topk", nodes[1])
        type: TileType = a.type
        if into.start != Affine(0) or into.name in type.axes:
            self.fail("unknown-axis", "the second axis of topk counts the results", nodes[1], self.describe(into),
                      "an axis from 0 that the tile does not span", "take another: k = whole(8)")
        axes = (*[x for x in type.axes if x != axis.name], into.name)
        self.at(node)
        op = self.builder.add("topk", [a], [TileType(type.dtype, axes), TileType(index, axes)], over=[axis.name],
                              into=into.name)
        for value in op.results:
            self.levels[value] = self.level
        return op.results[0], op.results[1]

    def emit_fresh(self, name: str, operands: list[Value], type: TileType, **attributes: Any) -> Value:
        return self.builder.value(name, operands, type, **attributes)

    def need_sequential(self, axis: Axis, kind: str, what: str, node: Any) -> None:
        """Reducing over the axis of a loop gives one tile's part; unless the loop carries it on, it is lost."""
        loop = axis.loop
        if loop is not None and not loop.carries:
            self.fail(kind, f"{what} over axis {axis.name} of a loop that carries no value", node,
                      f"{what} over {axis.name}: the part of one tile, whose size the schedule picks",
                      "an axis of `whole`, or a loop that accumulates",
                      f"take {axis.name} = whole(...), or carry the result: acc += ... in the loop over {axis.name}")

    def contract(self, a: Any, b: Any, node: Any, a_node: Any, b_node: Any) -> Value:
        """a @ b: the sum of products over the axes that both span."""
        a, b = self.operand(a, a_node), self.operand(b, b_node)
        for side, side_node in ((a, a_node), (b, b_node)):
            if not isinstance(side, Value) or not axes_of(side):
                self.fail("contract-scalar", "@ on a scalar", side_node, self.describe(side), "a tile", "write *")
            self.need_compute(side, side_node, "@")
        left: TileType = a.type
        right: TileType = b.type
        over = [axis for axis in left.axes if axis in right.axes]
        if not over:
            self.fail("contract-no-shared-axis", "@ on tiles that share no axis", node, f"{left} @ {right}",
                      "an axis that both span", "index both with the axis to sum over, or write * for an outer product")
        for name in over:
            self.need_sequential(self.axes[name], "contract-parallel-axis", "@", node)
        dtype = PRODUCT_DTYPE.get((left.dtype.name, right.dtype.name))
        if dtype is None:
            if left.dtype != right.dtype and left.dtype.kind == right.dtype.kind == "f":
                self.mix(left.dtype, right.dtype, "@", node, a_node, b_node)
            self.fail("contract-dtype", f"@ on {left.dtype.name} and {right.dtype.name}", node, f"{left} @ {right}",
                      "floats of 16 or 32 bits (f32), f64 (f64), or i8 and u8 (i32)", "cast both to f32")
        axes = tuple(x for x in self.joined_axes(a, b) if x not in over)
        self.at(node)
        return self.emit_fresh("contract", [a, b], TileType(dtype, axes), over=over)

    # Scalars.

    def index_scalar(self, value: Any, node: Any, what: str) -> Any:
        """An int, Dim or integer scalar as an int or an index Value."""
        value = self.operand(value, node)
        if isinstance(value, (bool, float)):
            self.fail("bad-range", f"{what} is no integer", node, repr(value), "an integer",
                      "write an int, or .to(i32)")
        if isinstance(value, int):
            return value
        type: TileType = value.type
        if type.axes:
            self.fail("scalar-needed", f"{what} is a tile", node, self.describe(value), "a scalar",
                      "load it with an index of each(...)")
        if type.dtype.kind not in "xiu":
            self.fail("bad-range", f"{what} is no integer", node, self.describe(value), "an integer scalar",
                      f"write {self.text(node)}.to(i32)")
        self.need_compute(value, node, what)
        if type.dtype.kind != "x":
            self.at(node)
            value = self.raw_cast(value, index)
        return value

    def condition(self, value: Any, node: Any, what: str) -> Any:
        """A Python bool, or a scalar bool Value."""
        if value is None or isinstance(value, (str, tuple)):
            return bool(value)
        value = self.operand(value, node)
        if isinstance(value, (bool, int, float)):
            return bool(value)
        type: TileType = value.type
        if type.axes:
            self.fail("scalar-needed", f"{what} is a tile", node, self.describe(value), "a scalar bool",
                      "write where(condition, a, b)" if what.startswith("the condition") else "write & | ~ on tiles")
        if type.dtype != bool_:
            self.fail("op-dtype", f"{what} is no bool", node, self.describe(value), "bool",
                      f"write {self.text(node)} != 0")
        return value
