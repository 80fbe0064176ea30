"""From a kernel's Python source to tile IR.

Enters: a Kernel, and the extents that are fixed. Leaves: an ir Function of stage "tile". The source is read by
walking its ast with an environment of values (see operations.py): what concerns Python objects alone is computed
at once, what concerns tiles and scalars becomes ops. A called function is read in place, with names of its own.
"""

from __future__ import annotations

import ast
import builtins as python
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

from ..ir.nodes import Block, Function, Location, Op, Value
from ..ir.types import DType, TensorType, TileType, bool_, f32, i32, index
from . import builtins as surface
from .access import Accesses
from .affine import Affine
from .dims import OPERATORS, Dim, DimExpression
from .errors import KernelError
from .kernel import Kernel
from .liveness import analyse, assigned_names
from .operations import (
    INDEX,
    MOVABLE,
    Axis,
    Frame,
    LoopRange,
    LoopScope,
    Span,
    axes_of,
    dtype_of,
    is_tensor,
    is_tile,
    near,
)
from .source import SourceUnavailable, parse_function

BINARY_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.FloorDiv: "floordiv", ast.Mod: "mod",
    ast.LShift: "shl", ast.RShift: "shr", ast.BitAnd: "and", ast.BitOr: "or", ast.BitXor: "xor",
}
COMPARE_OPERATORS: dict[type[ast.cmpop], str] = {
    ast.Eq: "eq", ast.NotEq: "ne", ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge",
}
STATEMENT_MENDS: dict[str, str] = {
    "While": "walk a range: for i in range(n)",
    "With": "a kernel holds nothing to close",
    "Try": "a kernel raises nothing",
    "Raise": "a kernel raises nothing; check arguments before the call",
    "Delete": "names need no deleting",
    "Global": "pass values as arguments and return them",
    "Nonlocal": "pass values as arguments and return them",
    "Import": "import outside the kernel",
    "ImportFrom": "import outside the kernel",
    "ClassDef": "define classes outside the kernel",
    "AnnAssign": "leave the annotation out, or write .to(dtype)",
    "Match": "write if and elif",
    "Break": "give the range its end: span(start, stop)",
    "Continue": "put the rest of the body under an if",
}
EXPRESSION_MENDS: dict[str, str] = {
    "ListComp": "write a loop", "SetComp": "write a loop", "DictComp": "write a loop", "GeneratorExp": "write a loop",
    "Yield": "store results to a tensor argument", "YieldFrom": "store results to a tensor argument",
    "Await": "leave it out", "List": "write a tuple", "Dict": "write a tuple", "Set": "write a tuple",
    "NamedExpr": "assign in a statement of its own", "Slice": "bring an axis with whole(...) and index with it",
}


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


class Retry(Exception):
    """A weak number carried through a loop turned out to have a dtype: read the loop again with it."""

    def __init__(self, name: str, dtype: DType) -> None:
        super().__init__(name)
        self.name = name
        self.dtype = dtype


def build(kernel: Kernel, static: Mapping[str, int]) -> Function:
    """The tile IR of a kernel. static: extents fixed at compile time, by dimension name."""
    return Frontend(kernel, static).run()


class Frontend(Accesses):
    """Reads one kernel."""

    def __init__(self, kernel: Kernel, static: Mapping[str, int]) -> None:
        self.kernel = kernel
        names: dict[str, None] = {}
        for _, type in kernel.parameters:
            if isinstance(type, TensorType):
                for dim in type.dims:
                    if isinstance(dim, str):
                        names[dim] = None
        place = Location(kernel.source_file, kernel.source_line)
        super().__init__(Function(kernel.name, "tile", place), static, list(names))
        self.function.attributes["dims"] = list(names)

    def run(self) -> Function:
        kernel, function = self.kernel, self.function
        self.frame = self.frame_of(kernel.python_function, None, None)
        for name, type in kernel.parameters:
            value = function.add_argument(name, type)
            self.levels[value] = 0
            self.frame.env[name] = value
        body = self.frame.parsed.node.body  # type: ignore[attr-defined]
        self.block(body)
        if self.static:  # the proofs compared dimensions by name; from here on the fixed ones are numbers
            for value in function.arguments:
                if isinstance(value.type, TensorType):
                    value.type = TensorType(dtype_of(value), tuple(
                        self.static.get(d, d) if isinstance(d, str) else d for d in value.type.dims))
            function.attributes["dims"] = [n for n in self.dim_names if n not in self.static]
        if self.requirements:
            function.attributes["requires"] = [
                [*key[:2], constant, *key[2:]] for key, constant in self.requirements.items()
            ]
        used = {operand for op in function.walk() for operand in op.operands}
        function.body.ops[:0] = [op for op in self.prelude if op.results[0] in used]
        return function

    # Frames and names.

    def frame_of(self, function: FunctionType, caller: Frame | None, call_node: ast.AST | None) -> Frame:
        code = function.__code__
        try:
            parsed = parse_function(function)
        except SourceUnavailable:
            if caller is not None:
                self.fail("source-unavailable", f"the source of {function.__name__} cannot be read", call_node,
                          code.co_filename, "a Python source file", "define the function in a file")
            raise KernelError("source-unavailable", f"the source of {function.__name__} cannot be read",
                              Location(code.co_filename, code.co_firstlineno), code.co_filename,
                              "a Python source file", "define the kernel in a file") from None
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
                          near(name, [n for n in frame.env if n != name]))
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
        mend = near(name, known)
        if name in surface.NAMES:
            mend = f"from sapper import {name}"
        self.fail("unknown-name", f"{name} is not defined", node, name, "a name defined in the kernel or around it",
                  mend)

    def bind(self, name: str, value: Any, node: ast.AST) -> None:
        if isinstance(value, Value) and not value.name and value.op is not None:
            value.name = name
        self.frame.env[name] = value
        self.frame.assigned_at[name] = node

    # Statements.

    def block(self, body: list[ast.stmt]) -> Returned | None:
        last = len(body) - 1
        for position, statement in enumerate(body):
            handler = STATEMENTS.get(type(statement))
            if handler is None:
                kind = type(statement).__name__
                self.fail("unsupported-statement", f"{STATEMENT_WORDS.get(kind, kind.lower())} in a kernel", statement,
                          f"a {kind} statement", "assignments, for, if, calls, assert and return",
                          STATEMENT_MENDS.get(kind, ""))
            returned: Returned | None = handler(self, statement)
            if returned is not None:
                if isinstance(statement, ast.Return) and position != last:
                    self.fail("return-in-the-middle", "statements follow a return", statement, "a return",
                              "a return as the last statement", "delete what follows")
                return returned
        return None

    def pass_statement(self, node: ast.Pass) -> None:
        return None

    def expression_statement(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self.call(node.value, True)
        elif not isinstance(node.value, ast.Constant):
            self.evaluate(node.value)

    def return_statement(self, node: ast.Return) -> Returned:
        frame = self.frame
        if frame.nesting:
            self.fail("return-in-the-middle", "a return inside a loop or a run-time if", node, "a return",
                      "a return as the last statement of the function",
                      "assign the result to a name in both branches and return that")
        if frame.caller is None and node.value is not None and not (
                isinstance(node.value, ast.Constant) and node.value.value is None):
            self.fail("kernel-returns-value", f"kernel {self.kernel.name} returns a value", node,
                      ast.unparse(node.value), "no value: results are stored to tensor arguments",
                      "add a parameter out: Tensor[...] and write out[...] = ...")
        return Returned(None if node.value is None else self.evaluate(node.value))

    def assert_statement(self, node: ast.Assert) -> None:
        value = self.evaluate(node.test)
        if isinstance(value, DimExpression):
            value = self.operand(value, node.test)
        if isinstance(value, (Value, Axis)):
            self.fail("assertion", "an assert about a run-time value", node, self.describe(value),
                      "a condition on Python constants", "check it before the call")
        if not value:
            said = ""
            if node.msg is not None:
                message = self.evaluate(node.msg)
                said = message if isinstance(message, str) else self.describe(message)
            self.fail("assertion", "an assert does not hold", node, ast.unparse(node.test), said or "a true condition")

    def define_function(self, node: ast.FunctionDef) -> None:
        if node.decorator_list:
            self.fail("unsupported-statement", "a decorated function in a kernel", node,
                      ast.unparse(node.decorator_list[0]),
                      "a plain function", "define it outside the kernel")
        self.bind(node.name, LocalFunction(node, self.frame), node)

    def assign(self, node: ast.Assign) -> None:
        value = self.evaluate(node.value, node.targets[0])
        for target in node.targets:
            self.assign_to(target, value, node.value)

    def assign_to(self, target: ast.expr, value: Any, value_node: ast.expr) -> None:
        if isinstance(target, ast.Name):
            if isinstance(value, LoopRange):
                self.fail("bad-argument", f"{value.kind}(...) stands only after `in` of a for loop", value_node,
                          self.describe(value), "a value", f"write for {target.id} in {ast.unparse(value_node)}:")
            self.bind(target.id, value, target)
        elif isinstance(target, (ast.Tuple, ast.List)):
            if not isinstance(value, tuple):
                self.fail("tuple", "only a tuple can be unpacked", value_node, self.describe(value), "a tuple")
            if len(value) != len(target.elts) or any(isinstance(t, ast.Starred) for t in target.elts):
                self.fail("tuple", "a tuple of another length is unpacked", target, f"{len(value)} values",
                          f"{len(target.elts)} values")
            same = isinstance(value_node, ast.Tuple) and len(value_node.elts) == len(value)
            for position, (element, part) in enumerate(zip(target.elts, value, strict=True)):
                self.assign_to(element, part,
                               value_node.elts[position] if same else value_node)  # type: ignore[attr-defined]
        elif isinstance(target, ast.Subscript):
            items, nodes = self.subscript_items(target)
            self.store(self.evaluate(target.value), items, value, target, nodes, value_node)
        else:
            self.fail("unsupported-statement", "an assignment to this is not possible in a kernel", target,
                      ast.unparse(target), "a name, a tuple of names, or an element of a tensor")

    def augmented_assign(self, node: ast.AugAssign) -> None:
        target = node.target
        if isinstance(target, ast.Name):
            before = self.lookup(target.id, target)
            self.bind(target.id, self.apply(node.op, before, self.evaluate(node.value), node, target, node.value), node)
            return
        if not isinstance(target, ast.Subscript):
            self.fail("unsupported-statement", "an assignment to this is not possible in a kernel", target,
                      ast.unparse(target), "a name or an element of a tensor")
        tensor = self.evaluate(target.value)
        if not is_tensor(tensor):
            self.fail("subscript", "only a tensor's elements can be assigned", target, self.describe(tensor),
                      "a tensor")
        items, nodes = self.subscript_items(target)
        before = self.load(tensor, items, target, nodes)
        after = self.apply(node.op, before, self.evaluate(node.value), node, target, node.value)
        self.store(tensor, items, after, target, nodes, node.value)

    # Control.

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

    def if_statement(self, node: ast.If) -> Returned | None:
        test = self.condition(self.evaluate(node.test), node.test, "the condition of if")
        if isinstance(test, bool):
            return self.block(node.body if test else node.orelse)
        frame = self.frame
        env = frame.env
        before_at = dict(frame.assigned_at)
        branches: list[tuple[Block, dict[str, Any], dict[str, ast.AST]]] = []
        frame.nesting += 1
        self.guards += 1
        for body in (node.body, node.orelse):
            block = Block()
            outside = self.open_block(block)
            frame.env = dict(env)
            frame.assigned_at = dict(before_at)
            self.block(body)
            branches.append((block, frame.env, frame.assigned_at))
            self.close_block(outside)
        self.guards -= 1
        frame.nesting -= 1
        frame.env = env
        frame.assigned_at = before_at
        (then, then_env, then_at), (other, other_env, other_at) = branches
        merged: list[tuple[str, Value, Value, bool]] = []
        live = frame.live.get(node, ())
        for name in assigned_names([node]):
            written_at = then_at.get(name) or other_at.get(name) or node
            if name not in live:
                env[name] = Gone("missing-branch", "is not bound after the if", f"assign {name} before the if")
                continue
            values: list[Any] = []
            for branch_env in (then_env, other_env):
                value = branch_env.get(name)
                if name not in branch_env or (isinstance(value, Gone) and value.kind == "missing-branch"):
                    env[name] = Gone("missing-branch", "is assigned in one branch of the if only",
                                     f"assign {name} before the if, or in both branches")
                    break
                if isinstance(value, Gone):
                    env[name] = value
                    break
                values.append(value)
            if len(values) < 2:
                continue
            if values[0] is values[1] or self.same_object(values[0], values[1]):
                env[name] = values[0]
                continue
            merged.append((name, *self.merge(name, values[0], values[1], then, other, written_at)))
        self.at(node)
        place = self.builder.location
        then.ops.append(Op("yield", [entry[1] for entry in merged], (), None, None, place))
        other.ops.append(Op("yield", [entry[2] for entry in merged], (), None, None, place))
        op = self.builder.add("if", [test], [entry[1].type for entry in merged], [then, other])
        for (name, _, _, weak), result in zip(merged, op.results, strict=True):
            self.levels[result] = self.level
            if weak:
                self.weak.add(result)
            self.bind(name, result, node)
        return None

    def same_object(self, a: Any, b: Any) -> bool:
        """Two Python objects that are the same constant; values never are."""
        if isinstance(a, (Value, Axis)) or isinstance(b, (Value, Axis)):
            return a is b
        if isinstance(a, tuple) and isinstance(b, tuple):
            return len(a) == len(b) and all(self.same_object(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, (bool, int, float, str, DimExpression, DType)):
            return type(a) is type(b) and repr(a) == repr(b)
        return a is b

    def merge(self, name: str, a: Any, b: Any, then: Block, other: Block, node: Any) -> tuple[Value, Value, bool]:
        """The values of the branches of an if as values of one type, made at the end of the branches."""
        for side in (a, b):
            if not isinstance(side, (bool, int, float, DimExpression, Axis)) and not is_tile(side):
                self.fail("branch-type", f"the branches give {name} different objects", node,
                          f"{self.describe(a)}, and {self.describe(b)}", "tiles or scalars of one type",
                          "choose between them with a condition on constants")
        outside = self.open_block(then)
        a = self.operand(a, node)
        self.builder.block = other
        b = self.operand(b, node)
        weak = all(not isinstance(v, Value) or v in self.weak for v in (a, b))
        dtypes = [dtype_of(v) if isinstance(v, Value) else self.default_dtype(v) for v in (a, b)]
        strong = [d for d, v in zip(dtypes, (a, b), strict=True) if isinstance(v, Value) and v not in self.weak]
        target = strong[0] if strong else f32 if f32 in dtypes else index if index in dtypes else dtypes[0]
        if index in dtypes and i32 in dtypes:
            target = index
        sides = []
        for block, side in ((then, a), (other, b)):
            self.builder.block = block
            value = self.value(side, target, node)
            if target == index and dtype_of(value) == i32:
                value = self.raw_cast(value, index)
            sides.append(value)
        self.builder.block = other
        first, second = sides
        if first.type != second.type and self.permuted(first, second):
            second = self.reordered(second, first)
        self.builder.block = then
        self.close_block_quietly(outside)
        self.check_leaving(name, first, node)
        self.check_leaving(name, second, node)
        if first.type != second.type:
            self.fail("branch-type", f"the branches give {name} different types", node,
                      f"{first.type}, and {second.type}", "one type", self.type_mend(first, second))
        return first, second, weak

    def close_block_quietly(self, outside: Block) -> None:
        self.builder.block = outside
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

    def reordered(self, value: Value, like: Value) -> Value:
        """A value with its axes named in the order of `like`: a select whose condition spans them in that order."""
        type = like.type
        assert isinstance(type, TileType)
        true = self.emit("full", [self.constant(True, bool_, None)], TileType(bool_, type.axes))
        return self.emit("select", [true, value, value], type)

    def type_mend(self, have: Value, want: Value) -> str:
        left, right = have.type, want.type
        assert isinstance(left, TileType) and isinstance(right, TileType)
        if left.dtype != right.dtype:
            return f"write .to({left.dtype.name})"
        return f"start from full({', '.join(right.axes)}, value=..., dtype={right.dtype.name})"

    def for_statement(self, node: ast.For) -> None:
        if node.orelse:
            self.fail("unsupported-statement", "else of a for loop", node.orelse[0], "else", "a loop without else",
                      "put the statements after the loop")
        walked = self.evaluate(node.iter)
        if isinstance(walked, tuple):
            for item in walked:
                self.assign_to(node.target, item, node.iter)
                self.block(node.body)
            return
        if not isinstance(walked, LoopRange):
            self.fail("bad-range", "this cannot be walked", node.iter, self.describe(walked),
                      "tiles(...), each(...), range(...) or a tuple",
                      "write tiles(...) for tiles, each(...) for indices" if isinstance(walked, (DimExpression, Span,
                                                                                                 int))
                      else "")
        targets = node.target.elts if isinstance(node.target, ast.Tuple) else [node.target]
        names = [t.id for t in targets if isinstance(t, ast.Name)]
        if len(names) != len(targets) or len(set(names)) < len(names):
            self.fail("unsupported-statement", "loop variables are names", node.target, ast.unparse(node.target),
                      "different names")
        if len(names) != len(walked.spans):
            self.fail("bad-range", f"{walked.kind} of {len(walked.spans)} extents, {len(names)} loop variables",
                      node.target, f"{len(names)} names", f"{len(walked.spans)}",
                      "name one variable for each extent")
        # The range is computed before the loop.
        bounds: list[Value] = []
        forms: list[tuple[Affine, Affine]] = []
        for span in walked.spans:
            bounds.append(self.value(span.start, index, node.iter))
            bounds.append(self.value(span.stop, index, node.iter))
            forms.append((self.dim_form(span.start, node.iter), self.dim_form(span.stop, node.iter)))
        carried = [n for n in self.frame.live.get(node, ()) if self.is_carried(n, node)]
        dtypes: dict[str, DType] = {}
        for _ in range(2 * len(carried) + 2):
            state = (len(self.accesses), dict(self.frame.env), dict(self.frame.assigned_at), dict(self.axes),
                     self.level, self.guards, self.ragged, self.frame.nesting, self.builder.block, len(self.known))
            try:
                self.loop(node, walked, names, bounds, forms, carried, dtypes)
                return
            except Retry as retry:
                if dtypes.get(retry.name) == retry.dtype:
                    raise AssertionError("a loop was read twice with the same dtype") from None
                dtypes[retry.name] = retry.dtype
                count, self.frame.env, self.frame.assigned_at, self.axes, self.level, self.guards = state[:6]
                self.ragged, self.frame.nesting, self.builder.block, depth = state[6:]
                del self.accesses[count:]
                del self.known[depth:]
        self.fail("carried-type", f"{' and '.join(carried)} find no dtype that stays the same in the loop", node,
                  "numbers without a dtype", "a dtype", "start from full(value=0, dtype=f32)")

    def is_carried(self, name: str, node: ast.For) -> bool:
        if name not in self.frame.env or isinstance(self.frame.env[name], Gone):
            return False
        value = self.frame.env[name]
        if isinstance(value, (bool, int, float, DimExpression)) or is_tile(value):
            return True
        self.fail("carried-kind", f"{name} is assigned in the loop and used again, but is no tile or scalar",
                  node.target,
                  self.describe(value), "a tile or a scalar", "give the name in the loop another name")

    def loop(self, node: ast.For, walked: LoopRange, names: list[str], bounds: list[Value],
             forms: list[tuple[Affine, Affine]], carried: list[str], dtypes: dict[str, DType]) -> None:
        frame = self.frame
        self.at(node)
        location = self.builder.location
        initial: list[Value] = []
        weak: list[bool] = []
        for name in carried:
            value = self.operand(frame.env[name], node)
            unsettled = not isinstance(value, Value) or value in self.weak
            weak.append(unsettled and name not in dtypes)
            initial.append(self.value(value, dtypes.get(name), node))
        self.level += 1
        ragged = any(not isinstance(s, str) for pair in forms for bound in pair for s in bound.terms) or any(
            self.empty_range(*pair) for pair in forms)
        self.ragged += ragged
        scope = LoopScope(walked.kind, self.level, self.guards + self.ragged, node, names, bool(carried))
        outer_env = frame.env
        body = Block([INDEX] * len(names) if walked.kind != "tiles" else ())
        outside = self.open_block(body)
        frame.env = dict(outer_env)
        frame.nesting += 1
        first_access = len(self.accesses)
        axis_names: list[str] = []
        for position, name in enumerate(names):
            start, stop = forms[position]
            if walked.kind == "tiles":
                axis = self.new_axis(name, start, stop, scope, body, None, node)
                scope.variables.append(axis)
                axis_names.append(axis.name)
                frame.env[name] = axis
            else:
                value = body.arguments[position]
                value.name = name
                self.levels[value] = self.level
                if walked.step == 1:
                    self.ranges[value] = (start, stop)
                elif not start.terms and not stop.terms:  # the last value lies a whole number of steps from the first
                    steps = max((stop.constant - start.constant - 1) // walked.step, 0)
                    self.ranges[value] = (start, Affine(start.constant + steps * walked.step + 1))
                scope.variables.append(value)
                frame.env[name] = value
            frame.assigned_at[name] = node.target
        arguments: list[Value] = []
        for name, value, unsettled in zip(carried, initial, weak, strict=True):
            argument = Value(value.type, body, name)
            body.arguments.append(argument)
            arguments.append(argument)
            self.levels[argument] = self.level
            if unsettled:
                self.weak.add(argument)
            frame.env[name] = argument
        self.block(node.body)
        yields = [self.carried_result(name, argument, node) for name, argument in zip(carried, arguments, strict=True)]
        self.builder.location = location
        self.builder.add("yield", yields)
        inner_env = frame.env
        frame.nesting -= 1
        frame.env = outer_env
        self.close_block(outside)
        attributes: dict[str, Any] = self.finish_loop(scope, first_access)
        self.level -= 1
        self.ragged -= ragged
        if walked.kind == "tiles":
            attributes = {"axes": axis_names, **attributes}
        else:
            attributes = {"count": len(names), **attributes}
            if walked.step != 1:
                attributes["step"] = walked.step
        self.builder.location = location
        op = Op("tiles" if walked.kind == "tiles" else "each", [*bounds, *initial], [v.type for v in initial],
                attributes,
                [body], location)
        self.builder.block.ops.append(op)
        line = node.lineno + frame.parsed.line_offset
        for name in inner_env:
            if inner_env[name] is not outer_env.get(name, outer_env) and name not in carried:
                what = "is a variable of" if name in names else "is assigned in"
                outer_env[name] = Gone("use-outside-loop", f"{what} the loop of line {line} and used after it",
                                       f"give {name} a value before the loop so that the loop carries it"
                                       if name not in names else "move the use into the loop")
        for name, result, unsettled in zip(carried, op.results, weak, strict=True):
            self.levels[result] = self.level
            result.name = name
            if unsettled:
                self.weak.add(result)
            outer_env[name] = result

    def carried_result(self, name: str, argument: Value, node: ast.For) -> Value:
        """What the body leaves in a carried name, as a value of the type that entered."""
        frame = self.frame
        value = frame.env[name]
        place = frame.assigned_at.get(name, node)
        if isinstance(value, Gone):
            self.fail(value.kind, f"{name} {value.because}", place, name, "a value at the end of the loop", value.mend)
        if not isinstance(value, (bool, int, float, DimExpression, Axis)) and not is_tile(value):
            self.fail("carried-kind", f"{name} is carried through the loop, but becomes no tile or scalar", place,
                      self.describe(value), f"{argument.type}")
        value = self.operand(value, place)
        type = argument.type
        assert isinstance(type, TileType)
        if isinstance(value, Value):
            have = value.type
            assert isinstance(have, TileType)
            if argument in self.weak:
                if value not in self.weak and not have.axes:
                    raise Retry(name, have.dtype)
                if value in self.weak and have.dtype != type.dtype:
                    raise Retry(name, have.dtype)
            elif value in self.weak and not have.axes:
                value = self.value(value, type.dtype, place)
        elif argument in self.weak and isinstance(value, float) and type.dtype != f32:
            raise Retry(name, f32)
        else:
            value = self.constant(value, type.dtype, place)
        if value.type == type:
            return value
        if self.permuted(value, argument):
            return self.reordered(value, argument)
        have = value.type
        assert isinstance(have, TileType)
        mend = f"start from zeros({', '.join([*have.axes, f'dtype={have.dtype.name}'])}) or full(...)"
        if set(have.axes) == set(type.axes):
            mend = f"write .to({type.dtype.name})"
        elif set(have.axes) < set(type.axes):
            mend = f"start from a value that spans [{', '.join(have.axes)}], or assign another name"
        self.fail("carried-type", f"carried value {name} changes type", place, f"{have} at the end of the loop",
                  f"{type}, as before the loop", mend)

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
                  "arithmetic, comparisons, indices, calls, tuples and conditions", EXPRESSION_MENDS.get(kind, ""))

    def constant_expression(self, node: ast.Constant) -> Any:
        if isinstance(node.value, (complex, bytes)):
            self.fail("unsupported-expression", "this constant has no meaning in a kernel", node, repr(node.value),
                      "a number, a bool or a string")
        return node.value

    def name_expression(self, node: ast.Name) -> Any:
        value = self.frame.env.get(node.id)
        if value is None or isinstance(value, Gone):
            return self.lookup(node.id, node)
        return value

    def tuple_expression(self, node: ast.Tuple) -> tuple[Any, ...]:
        return tuple(self.elements(node.elts))

    def elements(self, nodes: list[ast.expr]) -> list[Any]:
        values: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                parts = self.evaluate(node.value)
                if not isinstance(parts, tuple):
                    self.fail("tuple", "only a tuple can be unpacked", node, self.describe(parts), "a tuple")
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
                                  "two comparisons", f"write ({ast.unparse(left_node)} ...) & (...)")
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
                      "== != < <= > >=")
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
        for block, compute, side_node in zip(blocks, (then, other), nodes, strict=True):
            outside = self.open_block(block)
            sides.append(self.operand(compute(), side_node))
            self.close_block(outside)
        self.guards -= 1
        if all(op.name in MOVABLE for block in blocks for op in block.ops):
            for block in blocks:
                self.builder.block.ops.extend(block.ops)
            if name:
                return self.both(name, test, sides[0 if name == "and" else 1], node)
            return self.where(test, sides[0], sides[1], node, (node, *nodes))
        first, second, weak = self.merge("the expression", sides[0], sides[1], blocks[0], blocks[1], node)
        self.at(node)
        for block, value in zip(blocks, (first, second), strict=True):
            block.ops.append(Op("yield", [value], (), None, None, self.builder.location))
        result = self.builder.add("if", [test], [first.type], blocks).result
        self.levels[result] = self.level
        if weak:
            self.weak.add(result)
        return result

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
                          "a tile is used whole: reduce it, or load what is needed from the tensor")
            if isinstance(base, (dict, list)):
                self.fail("unsupported-constant", f"a {type(base).__name__} in a kernel", node.value,
                          ast.unparse(node.value),
                          "numbers, strings, tuples, dtypes and functions", "make it a tuple")
            self.fail("subscript", "this cannot be indexed", node, self.describe(base), "a tensor or a tuple")
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
                      "a constant integer", "put the values into a tensor")
        if not -len(base) <= position < len(base):
            self.fail("tuple", "a tuple has no such element", node.slice, str(position), f"below {len(base)}")
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
                    return tuple(Dim(d) if isinstance(d, str) else d for d in base.type.dims)
                self.no_attribute(node, base, ("shape", "dtype"), "index the tensor first" if name in ("to",
                                                                                                       "bits") else "")
            mend = "axes have names, so a tile needs no transposing" if name in ("T", "transpose") else ""
            if name in surface.NAMES:
                mend = f"write {name}({ast.unparse(node.value)})"
            if name in ("to", "bits"):
                mend = f"call it: .{name}(dtype)"
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
                  mend or near(node.attr, known))

    # Calls.

    def call(self, node: ast.Call, statement: bool, hint: ast.expr | None = None) -> Any:
        target = node.func
        if isinstance(target, ast.Attribute) and target.attr in ("to", "bits"):
            base = self.evaluate(target.value)
            if isinstance(base, (Axis, bool, int, float, DimExpression)) or is_tile(base):
                arguments, _ = self.arguments(node)
                if len(arguments) != 1 or node.keywords:
                    self.fail("call-arguments", f"{target.attr}() takes one dtype", node, ast.unparse(node),
                              "one dtype",
                              f"write .{target.attr}(f32)")
                method = self.cast if target.attr == "to" else self.bits
                return method(base, arguments[0], node, target.value)
        function = self.evaluate(target)
        handler = FUNCTIONS.get(function) if isinstance(function, (FunctionType, BuiltinFunctionType, type)) else None
        if handler is not None:
            arguments, keywords = self.arguments(node)
            return handler(self, node, arguments, keywords, hint)
        if isinstance(function, Kernel):
            function = function.python_function
        if isinstance(function, (FunctionType, LocalFunction)):
            arguments, keywords = self.arguments(node)
            result = self.inline(function, node, arguments, keywords)
            if result is None and not statement:
                self.fail("missing-return", f"{ast.unparse(target)} returns nothing", node, "no value",
                          "a function that returns its result", "end it with return ...")
            return result
        if isinstance(function, DType):
            self.fail("not-a-function", f"the dtype {function.name} is no function", node, ast.unparse(node),
                      "a function",
                      f"write x.to({function.name}), or full(value=..., dtype={function.name})")
        if isinstance(function, BuiltinFunctionType) and getattr(function, "__module__", None) == "math":
            arguments, keywords = self.arguments(node)
            if not keywords and all(isinstance(a, (bool, int, float)) for a in arguments):
                try:
                    return function(*arguments)
                except (ArithmeticError, ValueError, TypeError) as error:
                    self.fail("constant-arithmetic", "a function of constants fails", node,
                              f"{ast.unparse(node)}: {error}")
            known = function.__name__ in surface.NAMES
            self.fail("unsupported-function", f"math.{function.__name__} on a run-time value", node, ast.unparse(node),
                      "constants", f"use sapper's {function.__name__}" if known else "")
        if not callable(function) or isinstance(function, (Value, Axis)):
            mend = f"index it: {ast.unparse(target)}[...]" if is_tensor(function) else ""
            self.fail("not-a-function", "this is no function", node, self.describe(function), "a function", mend)
        name = ast.unparse(target)
        simple = name.rpartition(".")[2]
        mend = f"use sapper's {simple}" if simple in surface.NAMES else near(simple, surface.NAMES)
        self.fail("unsupported-function", f"{name}() has no meaning in a kernel", node, self.describe(function),
                  "functions of sapper, and Python functions with source", mend)

    def arguments(self, node: ast.Call) -> tuple[list[Any], dict[str, Any]]:
        keywords: dict[str, Any] = {}
        positional = self.elements(node.args)
        for keyword in node.keywords:
            if keyword.arg is None:
                self.fail("unsupported-expression", "** in a call", node, ast.unparse(node), "arguments by name")
            keywords[keyword.arg] = self.evaluate(keyword.value)
        return positional, keywords

    def inline(self, function: FunctionType | LocalFunction, node: ast.Call, arguments: list[Any],
               keywords: dict[str, Any]) -> Any:
        caller = self.frame
        if isinstance(function, LocalFunction):
            defined: Any = function.node
            name = getattr(defined, "name", "<lambda>")
            body = defined.body if isinstance(defined, ast.FunctionDef) else []
            parameters = defined.args
            local = {a.arg for a in (*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs)}
            local.update(assigned_names(body))
            home = function.frame
            frame = Frame(name, defined, home.parsed, home.function_globals, {}, frozenset(local), analyse(body),
                          caller,
                          node, home)
            self.frame = home
            defaults = [self.evaluate(d) for d in parameters.defaults]
            keyword_defaults = {a.arg: self.evaluate(d) for a, d in zip(parameters.kwonlyargs, parameters.kw_defaults,
                                                                        strict=True) if d is not None}
            self.frame = caller
        else:
            frame = self.frame_of(function, caller, node)
            name = function.__name__
            defined = frame.parsed.node
            parameters = defined.args
            defaults = [constant_of(d) for d in function.__defaults__ or ()]
            keyword_defaults = {n: constant_of(d) for n, d in (function.__kwdefaults__ or {}).items()}
        above: Frame | None = caller
        while above is not None:
            if above.key is frame.key:
                self.fail("recursion", f"{name} calls itself", node, name, "a function that is inlined once",
                          "write a loop")
            above = above.caller
        if isinstance(defined, (ast.AsyncFunctionDef,)):
            self.fail("unsupported-function", f"{name} is a coroutine", node, name, "a plain function")
        self.parameters(frame.env, name, parameters, defaults, keyword_defaults, arguments, keywords, node)
        self.frame = frame
        if isinstance(defined, ast.Lambda):
            result = self.evaluate(defined.body)
        else:
            returned = self.block(defined.body)
            result = None if returned is None else returned.value
        self.frame = caller
        return result

    def parameters(self, env: dict[str, Any], name: str, parameters: ast.arguments, defaults: list[Any],
                   keyword_defaults: dict[str, Any], arguments: list[Any], keywords: dict[str, Any],
                   node: ast.Call) -> None:
        """Bind the arguments of a call to the parameters of the function."""
        positional = [a.arg for a in (*parameters.posonlyargs, *parameters.args)]
        known = [*positional, *(a.arg for a in parameters.kwonlyargs)]
        if parameters.kwarg is not None:
            self.fail("unsupported-function", f"{name} takes **{parameters.kwarg.arg}", node,
                      f"**{parameters.kwarg.arg}",
                      "named parameters")
        if len(arguments) > len(positional) and parameters.vararg is None:
            self.fail("call-arguments", f"{name} takes {len(positional)} arguments", node,
                      f"{len(arguments)} arguments",
                      f"{name}({', '.join(known)})")
        for parameter, default in zip(positional[len(positional) - len(defaults) :], defaults, strict=True):
            env[parameter] = default
        env.update(keyword_defaults)
        env.update(zip(positional, arguments, strict=False))
        if parameters.vararg is not None:
            env[parameters.vararg.arg] = tuple(arguments[len(positional) :])
        given = set(positional[: len(arguments)])
        for keyword, value in keywords.items():
            if keyword not in known or keyword in given:
                self.fail("call-arguments", f"{name} does not take {keyword} here", node, f"{keyword}=...",
                          f"{name}({', '.join(known)})", near(keyword, known))
            env[keyword] = value
        for parameter in known:
            if parameter not in env:
                self.fail("call-arguments", f"{name} lacks its argument {parameter}", node, ast.unparse(node),
                          f"{name}({', '.join(known)})")

    # The functions of the language.

    def expect(self, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], low: int, high: int | None,
               names: tuple[str, ...] = ()) -> None:
        title = ast.unparse(node.func)
        for keyword in keywords:
            if keyword not in names:
                self.fail("call-arguments", f"{title}() takes no {keyword}", node, f"{keyword}=...",
                          ", ".join(names) or "no keywords", near(keyword, names))
        if len(arguments) < low or (high is not None and len(arguments) > high):
            wanted = f"{low}" if high == low else f"at least {low}" if high is None else f"{low} to {high}"
            self.fail("call-arguments", f"{title}() takes {wanted} arguments", node, f"{len(arguments)} arguments",
                      wanted)

    def span_of(self, value: Any, node: Any, what: str) -> Span:
        if isinstance(value, Span):
            return value
        if isinstance(value, Axis):
            self.fail("bad-range", f"{what} walks an extent, not an axis", node, self.describe(value),
                      "a Dim, an integer or a span", "use the axis itself as an index")
        if not isinstance(value, DimExpression):
            value = self.index_scalar(value, node, what)
        if isinstance(value, int) and value < 0:
            self.fail("bad-range", f"{what} walks a negative extent", node, str(value), "a non-negative extent")
        return Span(0, value)

    def call_tiles(self, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> LoopRange:
        kind = "tiles" if FUNCTIONS_TILES is self.evaluate(node.func) else "each"
        self.expect(node, arguments, keywords, 1, None)
        return LoopRange(kind, [self.span_of(a, n, kind) for a, n in zip(arguments, self.nodes(node, arguments),
                                                                         strict=True)])

    def nodes(self, node: ast.Call, arguments: list[Any]) -> list[Any]:
        """The nodes of a call's arguments; the call itself where * unpacks some."""
        return list(node.args) if len(node.args) == len(arguments) else [node] * len(arguments)

    def call_range(self, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> LoopRange:
        self.expect(node, arguments, keywords, 1, 3)
        values = [a if isinstance(a, DimExpression) else self.index_scalar(a, n, "a bound of range")
                  for a, n in zip(arguments, self.nodes(node, arguments), strict=True)]
        step = values[2] if len(values) == 3 else 1
        if isinstance(step, DimExpression):
            step = self.dimension(step, node)
        if not isinstance(step, int) or step < 1:
            self.fail("bad-range", "the step of range", node, self.describe(step), "a positive constant",
                      "walk upwards and compute the index: n - 1 - i")
        start, stop = (0, values[0]) if len(values) == 1 else values[:2]
        return LoopRange("range", [Span(start, stop)], step)

    def call_span(self, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> Span:
        self.expect(node, arguments, keywords, 2, 2)
        start, stop = (a if isinstance(a, DimExpression) else self.index_scalar(a, n, "a bound of span")
                       for a, n in zip(arguments, self.nodes(node, arguments), strict=True))
        if isinstance(start, int) and (start < 0 or (isinstance(stop, int) and stop < start)):
            self.fail("bad-range", "a span runs upwards from 0 or later", node, ast.unparse(node),
                      "0 <= start <= stop")
        return Span(start, stop)

    def call_whole(self, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> Axis:
        self.expect(node, arguments, keywords, 1, 1)
        span = self.span_of(arguments[0], node, "whole")
        start = self.value(span.start, index, node)
        stop = self.value(span.stop, index, node)
        self.at(node)
        op = self.builder.add("whole", [start, stop])
        name = hint.id if isinstance(hint, ast.Name) else "axis"
        axis = self.new_axis(name, self.dim_form(span.start, node), self.dim_form(span.stop, node), None,
                             self.builder.block, op, node)
        op.attributes["axis"] = axis.name
        return axis

    def call_zeros(self, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> Value:
        self.expect(node, arguments, keywords, 0, None, ("dtype",))
        if "dtype" not in keywords:
            self.fail("call-arguments", "zeros needs a dtype", node, ast.unparse(node), "dtype=...", "write dtype=f32")
        dtype = keywords["dtype"]
        zero: Any = False if dtype in (bool, bool_) else 0
        return self.full(arguments, zero, dtype, node, self.nodes(node, arguments), node)

    def call_full(self, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> Value:
        self.expect(node, arguments, keywords, 0, None, ("value", "dtype"))
        if "value" not in keywords:
            self.fail("call-arguments", "full needs a value", node, ast.unparse(node), "value=...", "write value=0")
        value_node = next(k.value for k in node.keywords if k.arg == "value")
        return self.full(arguments, keywords["value"], keywords.get("dtype"), node, self.nodes(node, arguments),
                         value_node)

    def call_where(self, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> Any:
        self.expect(node, arguments, keywords, 3, 3)
        return self.where(arguments[0], arguments[1], arguments[2], node, self.nodes(node, arguments))

    def call_pairwise(self, kind: str, node: ast.Call, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        self.expect(node, arguments, keywords, 2, None)
        nodes = self.nodes(node, arguments)
        result = arguments[0]
        for value, value_node in zip(arguments[1:], nodes[1:], strict=True):
            result = self.binary(kind, result, value, node, nodes[0], value_node)
        return result

    def call_reduction(self, kind: str, node: ast.Call, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        over = keywords.get("over")
        if over is None and kind in ("max", "min") and len(arguments) > 1:
            nodes = self.nodes(node, arguments)
            if isinstance(arguments[1], Axis) and is_tile(arguments[0]) and (
                    arguments[1].name in axes_of(arguments[0]) and dtype_of(arguments[0]).kind == "f"):
                self.fail("over", f"{kind} with an axis as its second operand", node, ast.unparse(node), "over=...",
                          f"write {kind}({ast.unparse(nodes[0])}, over={ast.unparse(nodes[1])})")
            return self.call_pairwise(kind, node, arguments, {k: v for k, v in keywords.items() if k != "over"})
        if "over" not in keywords or over is None:
            mend = f"write {ast.unparse(node.func)}({ast.unparse(node.args[0]) if node.args else 't'}, over=n)"
            self.fail("over", f"{kind} needs the axes to reduce over", node, ast.unparse(node), "over=...", mend)
        self.expect(node, arguments, keywords, 1, 1, ("over",))
        over_node = next(k.value for k in node.keywords if k.arg == "over")
        return self.reduce(kind, arguments[0], over, node, node.args[0], over_node)

    def call_convert(self, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> Any:
        function = self.evaluate(node.func)
        self.expect(node, arguments, keywords, 1, 1)
        value = arguments[0]
        if isinstance(value, (bool, int, float, str)):
            try:
                return function(value)
            except (ValueError, OverflowError) as error:
                self.fail("constant-arithmetic", "a conversion of a constant fails", node, str(error))
        return self.cast(value, {float: f32, int: i32, bool: bool_}[function], node, node.args[0])

    def call_len(self, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> int:
        self.expect(node, arguments, keywords, 1, 1)
        if not isinstance(arguments[0], (tuple, str)):
            self.fail("bad-argument", "len of something that is no tuple", node, self.describe(arguments[0]), "a tuple",
                      "write t.shape[0] for the extent of a tensor" if is_tensor(arguments[0]) else "")
        return len(arguments[0])


def constant_of(value: Any) -> Any:
    """A Python object as the kernel sees it: NumPy's scalars are numbers."""
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    return value


def _unary(name: str) -> Any:
    def call(self: Frontend, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> Any:
        self.expect(node, arguments, keywords, 1, 1)
        return self.unary(name, arguments[0], node, self.nodes(node, arguments)[0])

    return call


def _pairwise(kind: str) -> Any:
    def call(self: Frontend, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> Any:
        return self.call_pairwise(kind, node, arguments, keywords)

    return call


def _reduction(kind: str) -> Any:
    def call(self: Frontend, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> Any:
        return self.call_reduction(kind, node, arguments, keywords)

    return call


FUNCTIONS_TILES = surface.tiles
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **{getattr(surface, name): _unary(name) for name in surface.UNARY_NAMES},
    **{getattr(surface, name): _reduction(name) for name in ("sum", "max", "min", "argmax", "argmin")},
    surface.maximum: _pairwise("max"), surface.minimum: _pairwise("min"),
    surface.tiles: Frontend.call_tiles, surface.each: Frontend.call_tiles, surface.whole: Frontend.call_whole,
    surface.span: Frontend.call_span, surface.zeros: Frontend.call_zeros, surface.full: Frontend.call_full,
    surface.where: Frontend.call_where,
    # Python's own names mean sapper's.
    python.abs: _unary("abs"), python.round: _unary("round"), python.sum: _reduction("sum"),
    python.max: _reduction("max"), python.min: _reduction("min"), python.range: Frontend.call_range,
    python.float: Frontend.call_convert, python.int: Frontend.call_convert, python.bool: Frontend.call_convert,
    python.len: Frontend.call_len,
}

STATEMENTS: dict[type[ast.stmt], Callable[..., Any]] = {
    ast.Pass: Frontend.pass_statement, ast.Expr: Frontend.expression_statement, ast.Return: Frontend.return_statement,
    ast.Assert: Frontend.assert_statement, ast.FunctionDef: Frontend.define_function, ast.Assign: Frontend.assign,
    ast.AugAssign: Frontend.augmented_assign, ast.If: Frontend.if_statement, ast.For: Frontend.for_statement,
}
STATEMENT_WORDS = {"AnnAssign": "an annotated assignment", "ClassDef": "a class", "AsyncFunctionDef": "a coroutine",
                   "ImportFrom": "an import", "Import": "an import", "Delete": "del"}
EXPRESSIONS: dict[type[ast.expr], Callable[..., Any]] = {
    ast.Constant: Frontend.constant_expression, ast.Name: Frontend.name_expression,
    ast.Tuple: Frontend.tuple_expression,
    ast.BinOp: Frontend.binary_expression, ast.UnaryOp: Frontend.unary_expression,
    ast.Compare: Frontend.compare_expression, ast.BoolOp: Frontend.bool_expression, ast.IfExp: Frontend.if_expression,
    ast.Subscript: Frontend.subscript_expression, ast.Lambda: Frontend.lambda_expression,
    ast.Attribute: Frontend.attribute_expression,
}
EXPRESSION_WORDS = {"ListComp": "a comprehension", "SetComp": "a comprehension", "DictComp": "a comprehension",
                    "GeneratorExp": "a generator", "Yield": "yield", "YieldFrom": "yield", "Await": "await",
                    "List": "a list", "Dict": "a dict", "Set": "a set", "NamedExpr": ":=", "JoinedStr": "an f-string",
                    "Starred": "*", "Slice": "a slice"}
