"""Expressions: from the ast of an expression to a value of the front end (see bindings.py).

Enters: ast nodes, and the frame that says what names mean. Leaves: Python objects, where everything is known at
compile time, or IR values, whose ops are appended to the block at hand.
"""

from __future__ import annotations

import ast
import builtins as python
from abc import abstractmethod
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

from ..ir.extents import OPERATORS
from ..ir.nodes import Block, Location, Op, Value
from ..ir.types import DType, TensorType, TileType, bool_, f32, i32, index
from . import builtins as surface
from .access import Accesses
from .affine import Affine
from .bindings import Axis, Frame, LoopRange, LoopScope, axes_of, dtype_of, is_tensor, is_tile, near
from .dims import Dim, DimExpression
from .elementwise import MOVABLE
from .errors import KernelError
from .liveness import analyse
from .source import SourceChanged, SourceUnavailable, parse_function

BINARY_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.FloorDiv: "floordiv", ast.Mod: "mod",
    ast.LShift: "shl", ast.RShift: "shr", ast.BitAnd: "and", ast.BitOr: "or", ast.BitXor: "xor",
}
COMPARE_OPERATORS: dict[type[ast.cmpop], str] = {
    ast.Eq: "eq", ast.NotEq: "ne", ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge",
}
EXPRESSION_MENDS: dict[str, str] = {
    "SetComp": "write a loop", "DictComp": "write a loop", "GeneratorExp": "write [... for i in range(3)], a tuple",
    "Yield": "store results to a tensor argument", "YieldFrom": "store results to a tensor argument",
    "Await": "leave it out", "List": "write a tuple, (a, b), or [... for i in range(3)]",
    "Dict": "write a tuple", "Set": "write a tuple",
    "NamedExpr": "assign in a statement of its own", "Slice": "bring an axis with whole(...) and index with it",
    "JoinedStr": "make the string outside the kernel", "Starred": "name each value",
}


OF_PYTORCH = {"double": "f64", "float": "f32", "half": "f16", "bfloat16": "bf16", "long": "i64", "int": "i32",
              "short": "i16", "char": "i8", "byte": "u8", "bool": "bool_"}
"""Methods of PyTorch's tensors -> the dtype that they give."""


class Gone:
    """What a name is bound to when its value may no longer be used. kind, because: an error's id and headline."""

    __slots__ = ("because", "kind", "mend")

    def __init__(self, kind: str, because: str, mend: str) -> None:
        self.kind = kind
        self.because = because
        self.mend = mend


class LocalFunction:
    """A function defined inside a kernel, or a lambda: its node, and the frame it sees."""

    __slots__ = ("frame", "node")

    def __init__(self, node: ast.FunctionDef | ast.Lambda, frame: Frame) -> None:
        self.node = node
        self.frame = frame


class Returned:
    """What a return statement gives to the blocks around it."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Expressions(Accesses):
    """Reads expressions. What reads calls and statements is in the classes made of this one."""

    @abstractmethod
    def call(self, node: ast.Call, statement: bool, hint: ast.expr | None = None) -> Any:
        """The value of a call; see calls.py."""

    @abstractmethod
    def assign_to(self, target: ast.expr, value: Any, value_node: ast.expr) -> None:
        """Bind the names of a target; see frontend.py."""

    # Frames and names.

    def frame_of(self, function: FunctionType, caller: Frame | None, call_node: ast.AST | None) -> Frame:
        code = function.__code__
        try:
            parsed = parse_function(function)
        except SourceChanged:
            place = Location(code.co_filename, code.co_firstlineno)
            raise KernelError("source-unavailable", f"the source of {function.__name__} has changed since it was read",
                              place, "a file that was written anew, and holds another function of this name or none",
                              "the function that was imported", "import it again: importlib.reload(module), or begin "
                              "anew") from None
        except SourceUnavailable:
            if caller is not None:
                self.fail("source-unavailable", f"the source of {function.__name__} cannot be read", call_node,
                          code.co_filename, "a Python source file", "define the function in a file, with def")
            raise KernelError("source-unavailable", f"the source of {function.__name__} cannot be read",
                              Location(code.co_filename, code.co_firstlineno), code.co_filename,
                              "a Python source file", "define the kernel in a file that is imported or run, or in a "
                              "notebook's cell") from None
        closure = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        local = frozenset((*code.co_varnames, *code.co_cellvars))
        if parsed.live is None:
            node: Any = parsed.node
            parsed.live = analyse(node.body) if isinstance(node, ast.FunctionDef) else {}
        return Frame(function.__name__, code, parsed, function.__globals__, closure, local, parsed.live, caller,
                     call_node)

    def lookup(self, name: str, node: ast.AST) -> Any:
        frame: Frame | None = self.frame
        while frame is not None:
            if name in frame.env:
                value = frame.env[name]
                if isinstance(value, Gone):
                    self.fail(value.kind, f"{name} {value.because}", node, name, "a name bound here", value.mend)
                return value
            if name in frame.local_names and name not in frame.closure:
                self.fail("unknown-name", f"{name} is used before it is assigned", node, name, "a name bound before",
                          near(name, [n for n in frame.env if n != name], "assign it before"))
            if name in frame.closure:
                try:
                    return constant_of(frame.closure[name].cell_contents)
                except ValueError:
                    break
            if frame.outer is None:
                if name in frame.function_globals:
                    return constant_of(frame.function_globals[name])
                if hasattr(python, name):
                    return getattr(python, name)
            frame = frame.outer
        known = [*self.frame.env, *self.frame.closure, *self.frame.function_globals, *surface.NAMES]
        mend = surface.likely(name, known, "assign it before, or define it outside the kernel")
        extent = self.frame.function_globals.get(name.upper(), self.frame.closure.get(name.upper()))
        if isinstance(getattr(extent, "cell_contents", extent), Dim):
            mend = f"bring the axis: {name} = whole({name.upper()}), or a loop over tiles({name.upper()})"
        if name in surface.NAMES:
            mend = f"from sapper import {name}"
        self.fail("unknown-name", f"{name} is not defined", node, name, "a name defined in the kernel or around it",
                  mend)

    def bind(self, name: str, value: Any, node: ast.AST) -> None:
        if isinstance(value, Value) and not value.name and value.op is not None:
            value.name = name
        self.frame.env[name] = value
        self.frame.assigned_at[name] = node

    # Blocks, and values that leave them.

    def open_block(self, block: Block) -> Block:
        before = self.builder.block
        self.builder.block = block
        self.known.append({})
        return before

    def close_block(self, before: Block) -> None:
        closed = self.builder.block
        self.builder.block = before
        self.known.pop()
        for axis in self.axes.values():
            if axis.block is closed:
                axis.in_scope = False

    def same_object(self, a: Any, b: Any) -> bool:
        """Two Python objects that are the same constant; values never are."""
        if isinstance(a, (Value, Axis)) or isinstance(b, (Value, Axis)):
            return a is b
        if isinstance(a, tuple) and isinstance(b, tuple):
            return len(a) == len(b) and all(self.same_object(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, (bool, int, float, str, DimExpression, DType)):
            return type(a) is type(b) and repr(a) == repr(b)
        return a is b

    def merge(self, name: str, a: Any, b: Any, then: Block, other: Block, node: Any, spread: bool = False
              ) -> tuple[Value, Value, bool]:
        """The values of the branches of an if as values of one type, made at the end of the branches.

        spread: whether a value that spans fewer axes than the other is spread over them. Returns the two values, and
        whether they are weak.
        """
        for side in (a, b):
            if not isinstance(side, (bool, int, float, DimExpression, Axis)) and not is_tile(side):
                self.fail("branch-type", f"the branches give {name} different objects", node,
                          f"{self.describe(a)}, and {self.describe(b)}", "tiles or scalars of one type",
                          "choose between them with a condition on constants")
        a, b = self.operand(a, node), self.operand(b, node)
        weak = all(not isinstance(v, Value) or v in self.weak for v in (a, b))
        dtypes = [dtype_of(v) if isinstance(v, Value) else self.default_dtype(v) for v in (a, b)]
        strong = [d for d, v in zip(dtypes, (a, b), strict=True) if isinstance(v, Value) and v not in self.weak]
        target = strong[0] if strong else f32 if f32 in dtypes else index if index in dtypes else dtypes[0]
        if index in dtypes and i32 in dtypes:
            target = index
        sides: list[Value] = []
        axes: tuple[str, ...] = ()
        for block, side in ((then, a), (other, b)):
            outside = self.reopen_block(block)
            value = self.value(side, target, node)
            if target == index and dtype_of(value) == i32:
                value = self.raw_cast(value, index)
            self.reclose_block(outside)
            self.check_leaving(name, value, node)
            sides.append(value)
            axes = self.joined_axes(*sides)
        for position, block in enumerate((then, other)):
            value = sides[position]
            if axes_of(value) != axes and (spread or len(axes_of(value)) == len(axes)):
                outside = self.reopen_block(block)
                sides[position] = self.spread(value, axes)
                self.reclose_block(outside)
        first, second = sides
        if first.type != second.type:
            self.fail("branch-type", f"the branches give {name} different types", node,
                      f"{first.type}, and {second.type}", "one type", self.type_mend(first, second))
        return first, second, weak

    def reopen_block(self, block: Block) -> Block:
        """Append to a block that was closed; its axes stay out of scope."""
        before = self.builder.block
        self.builder.block = block
        self.known.append({})
        return before

    def reclose_block(self, before: Block) -> None:
        self.builder.block = before
        self.known.pop()

    def check_leaving(self, name: str, value: Value, node: Any) -> None:
        for axis in axes_of(value):
            if not self.axes[axis].in_scope:
                self.fail("axis-out-of-scope", f"{name} leaves the block that brings axis {axis}", node,
                          str(value.type), "axes that are in scope after the block",
                          f"bring {axis} before the block, or reduce over it")

    def permuted(self, a: Value, b: Value) -> bool:
        left, right = a.type, b.type
        assert isinstance(left, TileType) and isinstance(right, TileType)
        return left.dtype == right.dtype and left.axes != right.axes and set(left.axes) == set(right.axes)

    def spread(self, value: Value, axes: tuple[str, ...]) -> Value:
        """A value spread over axes, or with its axes named in another order, which means the same."""
        type = TileType(dtype_of(value), axes)
        if not axes_of(value):
            return self.emit("full", [value], type)
        true = self.emit("full", [self.constant(True, bool_, None)], TileType(bool_, axes))
        return self.emit("select", [true, value, value], type)

    def type_mend(self, have: Value, want: Value) -> str:
        left, right = have.type, want.type
        assert isinstance(left, TileType) and isinstance(right, TileType)
        if left.dtype != right.dtype:
            return f"write .to({left.dtype.name})"
        wide = left if len(left.axes) > len(right.axes) else right
        return f"write full({', '.join([*wide.axes, 'value=...'])}) where the value spans less"

    def new_axis(self, name: str, start: Affine, stop: Affine, loop: LoopScope | None, block: Block, anchor: Op | None,
                 node: Any) -> Axis:
        unique, count = name, 0
        while unique in self.axes:
            count += 1
            unique = f"{name}_{count}"
        axis = Axis(unique, start, stop, loop, self.level, block, anchor, self.frame.parsed.location(node))
        self.axes[unique] = axis
        return axis

    # Expressions.

    def evaluate(self, node: ast.expr, hint: ast.expr | None = None) -> Any:
        """The value of an expression. hint: the target that it is assigned to."""
        handler = EXPRESSIONS.get(type(node))
        if handler is not None:
            return handler(self, node)
        if isinstance(node, ast.Call):
            return self.call(node, False, hint)
        kind = type(node).__name__
        self.fail("unsupported-expression", f"{EXPRESSION_WORDS.get(kind, kind)} in a kernel", node, ast.unparse(node),
                  "arithmetic, comparisons, indices, calls, tuples and conditions",
                  EXPRESSION_MENDS.get(kind, "leave it out"))

    def constant_expression(self, node: ast.Constant) -> Any:
        if isinstance(node.value, (complex, bytes)):
            self.fail("unsupported-expression", "this constant has no meaning in a kernel", node, repr(node.value),
                      "a number, a bool or a string", "leave it out")
        return node.value

    def name_expression(self, node: ast.Name) -> Any:
        value = self.frame.env.get(node.id)
        if value is None or isinstance(value, Gone):
            return self.lookup(node.id, node)
        return value

    def tuple_expression(self, node: ast.Tuple) -> tuple[Any, ...]:
        return tuple(self.elements(node.elts))

    def comprehension(self, node: ast.ListComp) -> tuple[Any, ...]:
        """A tuple of what an expression is for each element of tuples, or of ranges of constants."""
        env, values = self.frame.env, []
        self.frame.env = dict(env)

        def walk(generators: list[ast.comprehension]) -> None:
            if not generators:
                values.append(self.evaluate(node.elt))
                return
            first, *others = generators
            for item in self.constant_items(first.iter):
                self.assign_to(first.target, item, first.iter)
                if all(self.constant_condition(test) for test in first.ifs):
                    walk(others)  # noqa: F821

        walk(node.generators)
        del walk    # it holds itself
        self.frame.env = env
        return tuple(values)

    def constant_items(self, node: ast.expr) -> Sequence[Any]:
        """What a comprehension walks."""
        walked = self.evaluate(node)
        if isinstance(walked, tuple):
            return walked
        if isinstance(walked, LoopRange) and walked.kind == "range" and len(walked.spans) == 1:
            start, stop, down = walked.spans[0].start, walked.spans[0].stop, walked.down
            if type(start) is type(stop) is int:
                if down is None:
                    return range(start, stop, walked.step)
                if type(down.start) is int:
                    return range(down.start, down.start - stop * down.step, -down.step)
        self.fail("bad-range", "a comprehension makes a tuple, whose length is known", node, self.describe(walked),
                  "a tuple, or a range of constants", "write a loop")

    def constant_condition(self, node: ast.expr) -> bool:
        test = self.condition(self.evaluate(node), node, "the condition of a comprehension")
        if not isinstance(test, bool):
            self.fail("assertion", "the condition of a comprehension is about a run-time value", node,
                      self.describe(test), "a condition on Python constants", "write where(condition, a, b)")
        return test

    def elements(self, nodes: list[ast.expr]) -> list[Any]:
        values: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                parts = self.evaluate(node.value)
                if not isinstance(parts, tuple):
                    self.fail("tuple", "only a tuple can be unpacked", node, self.describe(parts), "a tuple",
                              "pass the parts one by one")
                values.extend(parts)
            else:
                values.append(self.evaluate(node))
        return values

    def apply(self, operator: ast.operator, a: Any, b: Any, node: Any, a_node: Any, b_node: Any) -> Any:
        if isinstance(operator, ast.MatMult):
            return self.contract(a, b, node, a_node, b_node)
        if isinstance(operator, ast.Pow):
            return self.power(a, b, node, a_node, b_node)
        if isinstance(a, tuple) and isinstance(b, tuple) and isinstance(operator, ast.Add):
            return a + b
        name = BINARY_OPERATORS[type(operator)]
        if isinstance(a, DimExpression) or isinstance(b, DimExpression):
            # Dimensions with integers stay symbolic, so that bounds can be compared by name.
            whole = all(isinstance(v, (DimExpression, int)) and not isinstance(v, bool) for v in (a, b))
            if whole and name in OPERATORS:
                return DimExpression(name, a, b)
        return self.binary(name, a, b, node, a_node, b_node)

    def binary_expression(self, node: ast.BinOp) -> Any:
        a = self.evaluate(node.left)
        b = self.evaluate(node.right)
        return self.apply(node.op, a, b, node, node.left, node.right)

    def unary_expression(self, node: ast.UnaryOp) -> Any:
        a = self.evaluate(node.operand)
        if isinstance(node.op, ast.USub):
            if isinstance(a, DimExpression):
                return -a
            return self.unary("neg", a, node, node.operand)
        if isinstance(node.op, ast.UAdd):
            return self.operand(a, node.operand)
        if isinstance(node.op, ast.Invert):
            return self.invert(a, node, node.operand)
        test = self.condition(a, node.operand, "the operand of not")
        return (not test) if isinstance(test, bool) else self.invert(test, node, node.operand)

    def compare_expression(self, node: ast.Compare) -> Any:
        left_node, left = node.left, self.evaluate(node.left)
        result: Any = None
        for operator, right_node in zip(node.ops, node.comparators, strict=True):
            right = self.evaluate(right_node)
            part = self.comparison(operator, left, right, node, left_node, right_node)
            if result is None:
                result = part
            else:
                for side in (result, part):
                    if isinstance(side, Value) and axes_of(side):
                        self.fail("chained-comparison", "a chained comparison of tiles", node, ast.unparse(node),
                                  "two comparisons", f"write {separate_comparisons(node)}")
                result = self.both("and", result, part, node)
            left_node, left = right_node, right
        return result

    def comparison(self, operator: ast.cmpop, a: Any, b: Any, node: Any, a_node: Any, b_node: Any) -> Any:
        name = COMPARE_OPERATORS.get(type(operator))
        if name is None:
            if isinstance(operator, (ast.Is, ast.IsNot)) and (a is None or b is None):
                return (a is b) == isinstance(operator, ast.Is)
            if isinstance(operator, (ast.In, ast.NotIn)) and isinstance(b, tuple) and not isinstance(a, (Value, Axis)):
                return any(self.same_object(a, item) for item in b) == isinstance(operator, ast.In)
            self.fail("unsupported-expression", "this comparison has no meaning in a kernel", node, ast.unparse(node),
                      "== != < <= > >=", "compare with each, and combine with & |")
        if name in ("eq", "ne"):
            plain = (str, tuple, DType, type(None))
            if isinstance(a, plain) or isinstance(b, plain):
                return self.same_object(a, b) == (name == "eq")
            if isinstance(a, DimExpression) and isinstance(b, DimExpression) and a._equal(b):
                return name == "eq"
        if all(isinstance(v, (DimExpression, int)) for v in (a, b)) and not all(isinstance(v, int) for v in (a, b)):
            sizes = [self.dimension(v, node) if isinstance(v, DimExpression) else v for v in (a, b)]
            if not any(isinstance(v, Value) for v in sizes):
                return self.binary(name, sizes[0], sizes[1], node, a_node, b_node)
        return self.binary(name, a, b, node, a_node, b_node)

    def both(self, name: str, a: Any, b: Any, node: Any) -> Any:
        """`and` or `or` of two scalar bools."""
        for side, other in ((a, b), (b, a)):
            if isinstance(side, bool):
                return other if side == (name == "and") else side
        self.at(node)
        return self.emit(name, [a, b], TileType(bool_))

    def bool_expression(self, node: ast.BoolOp) -> Any:
        name = "and" if isinstance(node.op, ast.And) else "or"
        what = f"an operand of {name}"
        result = self.condition(self.evaluate(node.values[0]), node.values[0], what)
        for value_node in node.values[1:]:
            if isinstance(result, bool):
                if result != (name == "and"):
                    return result
                result = self.condition(self.evaluate(value_node), value_node, what)
                continue
            test, before = result, result

            def more(value_node: ast.expr = value_node) -> Any:
                return self.condition(self.evaluate(value_node), value_node, what)

            def short(before: Any = before) -> Any:
                return name == "or"

            then, other = (more, short) if name == "and" else (short, more)
            result = self.choose(test, then, other, node, (value_node, value_node), name)
        return result

    def if_expression(self, node: ast.IfExp) -> Any:
        test = self.condition(self.evaluate(node.test), node.test, "the condition of x if c else y")
        if isinstance(test, bool):
            return self.evaluate(node.body if test else node.orelse)
        return self.choose(test, lambda: self.evaluate(node.body), lambda: self.evaluate(node.orelse), node,
                           (node.body, node.orelse), "")

    def choose(self, test: Value, then: Callable[[], Any], other: Callable[[], Any], node: Any, nodes: tuple[Any, Any],
               name: str) -> Any:
        """One of two expressions: a select if both may be computed always, else an if op."""
        sides: list[Any] = []
        blocks = [Block(), Block()]
        self.guards += 1
        for block, compute, side_node, taken in zip(blocks, (then, other), nodes, (True, False), strict=True):
            self.branches.append((test, taken))
            outside = self.open_block(block)
            side = compute()
            sides.append(tuple(self.operand(part, side_node) for part in side) if isinstance(side, tuple)
                         else self.operand(side, side_node))
            self.close_block(outside)
            self.branches.pop()
        self.guards -= 1
        lengths = [len(side) if isinstance(side, tuple) else None for side in sides]
        if lengths[0] != lengths[1]:
            self.fail("branch-type", "the two sides of the expression are not of one kind", node,
                      " and ".join("one value" if n is None else f"a tuple of {n}" for n in lengths),
                      "values, or tuples of one length", "give both sides the same number of values")
        pairs = [(sides[0], sides[1])] if lengths[0] is None else list(zip(*sides, strict=True))
        if all(op.name in MOVABLE for block in blocks for op in block.ops):
            for block in blocks:
                self.builder.block.ops.extend(block.ops)
            if name:
                return self.both(name, test, sides[0 if name == "and" else 1], node)
            chosen = [self.where(test, first, second, node, (node, *nodes)) for first, second in pairs]
            return chosen[0] if lengths[0] is None else tuple(chosen)
        merged = [self.merge("the expression", first, second, blocks[0], blocks[1], node, True)
                  for first, second in pairs]
        self.at(node)
        firsts, seconds = [first for first, _, _ in merged], [second for _, second, _ in merged]
        for block, values in zip(blocks, (firsts, seconds), strict=True):
            block.ops.append(Op("yield", values, (), None, None, self.builder.location))
        results = self.builder.add("if", [test], [first.type for first in firsts], blocks).results
        for result, (_, _, weak) in zip(results, merged, strict=True):
            self.levels[result] = self.level
            if weak:
                self.weak.add(result)
        return results[0] if lengths[0] is None else tuple(results)

    def subscript_items(self, node: ast.Subscript) -> tuple[list[Any], list[ast.expr]]:
        nodes = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        items: list[Any] = []
        item_nodes: list[ast.expr] = []
        for item in nodes:
            if isinstance(item, ast.Slice):
                self.fail("subscript", "a slice is no index", item, ast.unparse(item), "an axis or an integer",
                          "bring an axis: n = whole(N), or whole(span(start, stop)), and index with it")
            value = self.evaluate(item.value if isinstance(item, ast.Starred) else item)
            parts = value if isinstance(value, tuple) else (value,)
            items.extend(parts)
            item_nodes.extend([item] * len(parts))
        return items, item_nodes

    def subscript_expression(self, node: ast.Subscript) -> Any:
        base = self.evaluate(node.value)
        if isinstance(base, (tuple, str)):
            return self.tuple_element(base, node)
        if not is_tensor(base):
            if isinstance(base, (Value, Axis)):
                self.fail("subscript", "a tile cannot be indexed", node, self.describe(base), "a tensor",
                          "leave it out: axes have names, and tiles broadcast by these" if any(
                              isinstance(part, ast.Constant) and part.value is None for part in ast.walk(node.slice))
                          else "a tile is used whole: reduce it, or load what is needed from the tensor")
            if isinstance(base, (dict, list)):
                self.fail("unsupported-constant", f"a {type(base).__name__} in a kernel", node.value,
                          ast.unparse(node.value),
                          "numbers, strings, tuples, dtypes and functions", "make it a tuple")
            self.fail("subscript", "this cannot be indexed", node, self.describe(base), "a tensor or a tuple",
                      "pass an array as a Tensor argument, and constants as a tuple")
        items, nodes = self.subscript_items(node)
        return self.load(base, items, node, nodes)

    def tuple_element(self, base: tuple[Any, ...] | str, node: ast.Subscript) -> Any:
        if isinstance(node.slice, ast.Slice):
            parts = [None if p is None else self.evaluate(p) for p in (node.slice.lower, node.slice.upper,
                                                                       node.slice.step)]
            if all(p is None or isinstance(p, int) for p in parts):
                return base[slice(*parts)]
            position: Any = None
        else:
            position = self.evaluate(node.slice)
        if not isinstance(position, int):
            self.fail("tuple", "a tuple is indexed with a run-time value", node.slice, self.describe(position),
                      "a constant integer", f"walk the tuple, for x in {ast.unparse(node.value)}, or its places by a "
                      "loop that is written out, for k in [k for k in range(4)]; or put the values "
                      "into a tensor")
        if not -len(base) <= position < len(base):
            self.fail("tuple", "a tuple has no such element", node.slice, str(position), f"below {len(base)}",
                      "give a smaller index")
        return constant_of(base[position])

    def lambda_expression(self, node: ast.Lambda) -> LocalFunction:
        return LocalFunction(node, self.frame)

    def attribute_expression(self, node: ast.Attribute) -> Any:
        base = self.evaluate(node.value)
        name = node.attr
        if isinstance(base, Value):
            if name == "dtype":
                return dtype_of(base)
            if isinstance(base.type, TensorType):
                if name == "shape":
                    return self.extents_of(base)
                mend = "call it: .view(...)" if name == "view" else "index the tensor: its axes have names"
                if name in ("to", "bits"):
                    mend = "index the tensor first"
                self.no_attribute(node, base, ("shape", "dtype", "view"), mend)
            mend = "axes have names, so a tile needs no transposing" if name in ("T", "transpose") else ""
            if name in surface.NAMES:
                axes = axes_of(base)
                over = f", over={axes[-1]}" if axes and name in surface.REDUCTIONS else ""
                mend = f"write {name}({ast.unparse(node.value)}{over})"
            if name in ("to", "bits"):
                mend = f"call it: .{name}(dtype)"
            if name in ("astype", "type", "cast"):
                mend = f"write {ast.unparse(node.value)}.to(dtype)"
            if name in OF_PYTORCH:
                mend = f"write {ast.unparse(node.value)}.to({OF_PYTORCH[name]})"
            self.no_attribute(node, base, ("to", "bits", "dtype"), mend)
        if isinstance(base, (Axis, bool, int, float, DimExpression)):
            self.no_attribute(node, base, ("to",), "call it: .to(dtype)" if name == "to" else "")
        try:
            return constant_of(getattr(base, name))
        except AttributeError:
            known = [n for n in dir(base) if not n.startswith("_")]
            self.no_attribute(node, base, known, "")

    def no_attribute(self, node: ast.Attribute, base: Any, known: Any, mend: str) -> None:
        listed = ", ".join(known) if len(known) < 8 else "an attribute that exists"
        self.fail("unknown-attribute", f"{self.describe(base)} has no attribute {node.attr}", node, node.attr, listed,
                  mend or surface.likely(node.attr, known, "use one of these, or a function of sapper"))


def separate_comparisons(node: ast.Compare) -> str:
    """a < b < c as (a < b) & (b < c)"""
    sides = [node.left, *node.comparators]
    return " & ".join(
        f"({ast.unparse(ast.Compare(left, [operator], [right]))})"
        for left, operator, right in zip(sides, node.ops, node.comparators, strict=False))


def constant_of(value: Any) -> Any:
    """A Python object as the kernel sees it: NumPy's scalars are numbers."""
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    return value


EXPRESSIONS: dict[type[ast.expr], Callable[..., Any]] = {
    ast.Constant: Expressions.constant_expression, ast.Name: Expressions.name_expression,
    ast.Tuple: Expressions.tuple_expression, ast.ListComp: Expressions.comprehension,
    ast.BinOp: Expressions.binary_expression, ast.UnaryOp: Expressions.unary_expression,
    ast.Compare: Expressions.compare_expression, ast.BoolOp: Expressions.bool_expression,
    ast.IfExp: Expressions.if_expression,
    ast.Subscript: Expressions.subscript_expression, ast.Lambda: Expressions.lambda_expression,
    ast.Attribute: Expressions.attribute_expression,
}
EXPRESSION_WORDS = {"SetComp": "a comprehension", "DictComp": "a comprehension",
                    "GeneratorExp": "a generator", "Yield": "yield", "YieldFrom": "yield", "Await": "await",
                    "List": "a list", "Dict": "a dict", "Set": "a set", "NamedExpr": ":=", "JoinedStr": "an f-string",
                    "Starred": "*", "Slice": "a slice"}
