"""Calls: functions of the language, and Python functions, which are read in place.

Enters: the ast node of a call. Leaves: its value. A called Python function gets a frame of its own; its ops land in
the block at hand. Every handler of a function of the language takes the node, the arguments, the keywords and
the target that the result is assigned to.
"""

from __future__ import annotations

import ast
import builtins as python
from abc import abstractmethod
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import Any

from ..ir.nodes import Value
from ..ir.types import DType, TileType, bool_, f32, i32, index
from . import builtins as surface
from .bindings import Axis, Descent, Frame, LoopRange, Span, axes_of, dtype_of, is_tensor, is_tile, near
from .by_hand import PIECES
from .dims import DimExpression, dims
from .expressions import Expressions, LocalFunction, Returned, constant_of
from .kernel import Kernel, kernel
from .liveness import analyse, assigned_names

DEBUGGING = (print, breakpoint)
"""What the interpreter runs and the compiler refuses."""

OUTSIDE = (dims, kernel)
"""Of the language, for the program that calls kernels."""


class Calls(Expressions):
    """Reads calls."""

    @abstractmethod
    def block(self, body: list[ast.stmt]) -> Returned | None:
        """Read statements; see frontend.py."""

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
        if isinstance(target, ast.Attribute) and target.attr == "view":
            base = self.evaluate(target.value)
            if is_tensor(base):
                arguments, keywords = self.arguments(node)
                self.expect(node, arguments, keywords, 0, None, ("dtype",))
                return self.view(base, arguments, keywords.get("dtype"), node, self.nodes(node, arguments))
        function = self.evaluate(target)
        handler = FUNCTIONS.get(function) if isinstance(function, (FunctionType, BuiltinFunctionType, type)) else None
        if handler is not None:
            arguments, keywords = self.arguments(node)
            return handler(self, node, arguments, keywords, hint)
        if isinstance(function, Kernel):
            function = function.python_function
        if any(function is known for known in OUTSIDE):
            self.fail("unsupported-function", f"{ast.unparse(target)}() has no meaning in a kernel", node,
                      ast.unparse(node), "what a kernel computes", "write it above the kernel")
        if isinstance(function, (FunctionType, LocalFunction)):
            arguments, keywords = self.arguments(node)
            result = self.inline(function, node, arguments, keywords)
            if result is None and not statement:
                self.fail("missing-return", f"{ast.unparse(target)} returns nothing", node, "no value",
                          "a function that returns its result", "end it with return ...")
            return result
        if isinstance(function, DType):
            of = self.text(node.args[0]) if node.args else "x"
            self.fail("not-a-function", f"the dtype {function.name} is no function", node, ast.unparse(node),
                      "a function", f"write {of}.to({function.name}), or full(value=..., dtype={function.name})")
        if isinstance(function, BuiltinFunctionType) and getattr(function, "__module__", None) == "math":
            arguments, keywords = self.arguments(node)
            if not keywords and all(isinstance(a, (bool, int, float)) for a in arguments):
                try:
                    return function(*arguments)
                except (ArithmeticError, ValueError, TypeError) as error:
                    self.fail("constant-arithmetic", "a function of constants fails", node,
                              f"{ast.unparse(node)}: {error}",
                              "arguments that the function is defined for", "compute it outside the kernel")
            known = function.__name__ in surface.NAMES
            self.fail("unsupported-function", f"math.{function.__name__} on a run-time value", node, ast.unparse(node),
                      "constants", f"use sapper's {function.__name__}" if known else surface.ELSEWHERE.get(
                          function.__name__, "write it with sapper's functions, or compute it before the call"))
        if not callable(function) or isinstance(function, (Value, Axis)):
            mend = f"index it: {ast.unparse(target)}[...]" if is_tensor(function) else "drop the brackets"
            self.fail("not-a-function", "this is no function", node, self.describe(function), "a function", mend)
        if any(function is known for known in DEBUGGING):
            self.fail("unsupported-function", f"{function.__name__}() runs under the interpreter only", node,
                      ast.unparse(node), "a kernel without it, to be compiled",
                      "call the kernel with interpret=True, or set SAPPER_INTERPRET=1; take it out when you are done")
        name = ast.unparse(target)
        simple = name.rpartition(".")[2]
        mend = f"use sapper's {simple}" if simple in surface.NAMES else surface.likely(
            simple, surface.NAMES, "write a Python function for it, or compute it before the call")
        self.fail("unsupported-function", f"{name}() has no meaning in a kernel", node, self.describe(function),
                  "functions of sapper, and Python functions with source", mend)

    def arguments(self, node: ast.Call) -> tuple[list[Any], dict[str, Any]]:
        keywords: dict[str, Any] = {}
        positional = self.elements(node.args)
        for keyword in node.keywords:
            if keyword.arg is None:
                self.fail("unsupported-expression", "** in a call", node, ast.unparse(node), "arguments by name",
                          "write each name=value")
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
            self.fail("unsupported-function", f"{name} is a coroutine", node, name, "a plain function",
                      "drop the async")
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
                      "named parameters", "name its parameters one by one")
        if len(arguments) > len(positional) and parameters.vararg is None:
            self.fail("call-arguments", f"{name} takes {len(positional)} arguments", node,
                      f"{len(arguments)} arguments",
                      f"{name}({', '.join(known)})", "leave out what it does not take")
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
                          f"{name}({', '.join(known)})", near(keyword, known, "leave it out"))
            env[keyword] = value
        for parameter in known:
            if parameter not in env:
                self.fail("call-arguments", f"{name} lacks its argument {parameter}", node, ast.unparse(node),
                          f"{name}({', '.join(known)})", f"pass {parameter}, or give it a default")

    # The functions of the language.

    def expect(self, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], low: int, high: int | None,
               names: tuple[str, ...] = ()) -> None:
        title = ast.unparse(node.func)
        for keyword in keywords:
            if keyword not in names:
                self.fail("call-arguments", f"{title}() takes no {keyword}", node, f"{keyword}=...",
                          ", ".join(names) or "no keywords", near(keyword, names, "leave it out"))
        if len(arguments) < low or (high is not None and len(arguments) > high):
            wanted = f"{low}" if high == low else f"at least {low}" if high is None else f"{low} to {high}"
            self.fail("call-arguments", f"{title}() takes {wanted} arguments", node, f"{len(arguments)} arguments",
                      wanted, "pass as many as that")

    def span_of(self, value: Any, node: Any, what: str) -> Span:
        if isinstance(value, Span):
            return value
        if isinstance(value, Axis):
            self.fail("bad-range", f"{what} walks an extent, not an axis", node, self.describe(value),
                      "a Dim, an integer or a span", "use the axis itself as an index")
        if not isinstance(value, DimExpression):
            value = self.index_scalar(value, node, what)
        if isinstance(value, int) and value < 0:
            self.fail("bad-range", f"{what} walks a negative extent", node, str(value), "a non-negative extent",
                      "subtract less, or swap the two")
        return Span(0, value)

    def call_tiles(self, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> LoopRange:
        kind = "tiles" if FUNCTIONS_TILES is self.evaluate(node.func) else "each"
        self.expect(node, arguments, keywords, 1, None, ("disjoint",) if kind == "each" else ())
        disjoint = keywords.get("disjoint", False)
        if not isinstance(disjoint, bool):
            self.fail("bad-argument", "disjoint= asserts something, or does not", node, self.describe(disjoint),
                      "True or False", "write disjoint=True")
        spans = [self.span_of(a, n, kind) for a, n in zip(arguments, self.nodes(node, arguments), strict=True)]
        return LoopRange(kind, spans, disjoint=disjoint)

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
        if not isinstance(step, int) or not step:
            self.fail("bad-range", "the step of range", node, self.describe(step), "a constant other than 0",
                      "count with a step of 1 and compute the index: start + i * step")
        start, stop = (0, values[0]) if len(values) == 1 else values[:2]
        if step > 0:
            return LoopRange("range", [Span(start, stop)], step)
        steps = self.apply(ast.Sub(), start, stop, node, node, node)
        if step < -1:
            steps = self.apply(ast.Add(), steps, -step - 1, node, node, node)
            steps = self.apply(ast.FloorDiv(), steps, -step, node, node, node)
        return LoopRange("range", [Span(0, steps)], down=Descent(start, -step))

    def call_span(self, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> Span:
        self.expect(node, arguments, keywords, 2, 2)
        start, stop = (a if isinstance(a, DimExpression) else self.index_scalar(a, n, "a bound of span")
                       for a, n in zip(arguments, self.nodes(node, arguments), strict=True))
        if isinstance(start, int) and (start < 0 or (isinstance(stop, int) and stop < start)):
            self.fail("bad-range", "a span runs upwards from 0 or later", node, ast.unparse(node),
                      "0 <= start <= stop", "swap the two, or begin at 0")
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
        self.walks[axis.name] = start, stop, 1
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

    def call_asm(self, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> Value:
        self.expect(node, arguments, keywords, 2, None, ("meaning", "tolerance"))
        piece, *inputs = arguments
        key = getattr(piece, "key", None)
        if not isinstance(key, str):
            self.fail("bad-argument", "asm names an instruction or a block", node, self.describe(piece),
                      "an instruction such as x86.vrcp14ps, or a block", "import it: from sapper import x86")
        meaning = keywords.get("meaning")
        if not isinstance(meaning, (FunctionType, LocalFunction)):
            self.fail("call-arguments", "asm needs a meaning", node, ast.unparse(node),
                      "meaning=a function of the tiles", "write meaning=lambda t: ...")
        tiles = [a for a in inputs if isinstance(a, Value)]
        immediates = [a for a in inputs if isinstance(a, int) and not isinstance(a, bool)]
        tolerance = keywords.get("tolerance", 0.0)
        if len(tiles) + len(immediates) != len(inputs) or not tiles or not isinstance(tolerance, (int, float)):
            self.fail("bad-argument", "asm takes tiles, then immediates", node, ast.unparse(node),
                      "tiles and integers", "write the tiles first")
        misfit = getattr(piece, "misfit", None)
        if misfit is not None and (forms := misfit(len(tiles), len(immediates))):
            self.fail("bad-argument", f"{piece.name} computes no tile from these", node,
                      f"tiles: {len(tiles)}, immediates: {len(immediates)}", forms,
                      "give as many tiles as it has inputs; one that it changes counts")
        value = self.inline(meaning, node, list(tiles), {})
        if not isinstance(value, Value) or not isinstance(value.type, TileType):
            self.fail("bad-argument", "the meaning of asm is no tile", node, self.describe(value), "a tile",
                      "pass meaning= a function that returns a tile")
        self.only_elementwise(value, tiles, node)
        PIECES[key] = piece
        self.at(node)
        result = self.emit("asm", [value, *tiles], value.type)
        assert result.op is not None
        result.op.attributes.update(by=key, immediates=immediates, tolerance=float(tolerance))
        return result

    def only_elementwise(self, value: Value, inputs: list[Value], node: ast.Call) -> None:
        """A meaning computes each element from the same element of the inputs, as an instruction on rows does."""
        pending = [value]
        while pending:
            found = pending.pop()
            if found in inputs or found.op is None:
                continue
            if found.op.name in ("reduce", "contract", "scan", "topk", "load", "index") or found.op.blocks:
                self.fail("bad-argument", "the meaning of asm is not elementwise", node, found.op.name,
                          "arithmetic on the inputs", "do it outside, and give its result as an input")
            pending += found.op.operands

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

    def over_of(self, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], count: int) -> Any:
        """The node of `over`, which has to be there."""
        self.expect(node, arguments, keywords, count, count, ("over",))
        if "over" not in keywords:
            name = ast.unparse(node.func)
            self.fail("over", f"{name} needs the axis to go along", node, ast.unparse(node), "over=...",
                      f"write {ast.unparse(node)[:-1]}, over=n)")
        return next(k.value for k in node.keywords if k.arg == "over")

    def call_scan(self, name: str, node: ast.Call, arguments: list[Any], keywords: dict[str, Any]) -> Value:
        over_node = self.over_of(node, arguments, keywords, 1)
        return self.scan(name.removeprefix("cum"), name, arguments[0], keywords["over"], node,
                         self.nodes(node, arguments)[0], over_node)

    def call_topk(self, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> Any:
        over_node = self.over_of(node, arguments, keywords, 2)
        return self.topk(arguments[0], arguments[1], keywords["over"], node, self.nodes(node, arguments), over_node)

    def call_convert(self, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> Any:
        function = self.evaluate(node.func)
        self.expect(node, arguments, keywords, 1, 1)
        value = arguments[0]
        if isinstance(value, (bool, int, float, str)):
            try:
                return function(value)
            except (ValueError, OverflowError) as error:
                self.fail("constant-arithmetic", "a conversion of a constant fails", node, str(error),
                          "a constant that can be converted", "change the constant")
        return self.cast(value, {float: f32, int: i32, bool: bool_}[function], node, node.args[0])

    def call_len(self, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> int:
        self.expect(node, arguments, keywords, 1, 1)
        if not isinstance(arguments[0], (tuple, str)):
            self.fail("bad-argument", "len of something that is no tuple", node, self.describe(arguments[0]), "a tuple",
                      "write t.shape[0] for the extent of a tensor" if is_tensor(arguments[0]) else
                      "a tile has no length: its axes have names")
        return len(arguments[0])


def _unary(name: str) -> Any:
    def call(self: Calls, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> Any:
        self.expect(node, arguments, keywords, 1, 1)
        return self.unary(name, arguments[0], node, self.nodes(node, arguments)[0])

    return call


def _pairwise(kind: str) -> Any:
    def call(self: Calls, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> Any:
        return self.call_pairwise(kind, node, arguments, keywords)

    return call


def _reduction(kind: str) -> Any:
    def call(self: Calls, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> Any:
        return self.call_reduction(kind, node, arguments, keywords)

    return call


def _scan(name: str) -> Any:
    def call(self: Calls, node: ast.Call, arguments: list[Any], keywords: dict[str, Any], hint: Any) -> Any:
        return self.call_scan(name, node, arguments, keywords)

    return call


FUNCTIONS_TILES = surface.tiles
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **{getattr(surface, name): _unary(name) for name in surface.UNARY_NAMES},
    **{getattr(surface, name): _reduction(name) for name in ("sum", "max", "min", "argmax", "argmin")},
    **{getattr(surface, name): _scan(name) for name in ("cumsum", "cummax", "cummin")}, surface.topk: Calls.call_topk,
    surface.maximum: _pairwise("max"), surface.minimum: _pairwise("min"),
    surface.tiles: Calls.call_tiles, surface.each: Calls.call_tiles, surface.whole: Calls.call_whole,
    surface.span: Calls.call_span, surface.zeros: Calls.call_zeros, surface.full: Calls.call_full,
    surface.where: Calls.call_where, surface.asm: Calls.call_asm,
    # Python's own names mean sapper's.
    python.abs: _unary("abs"), python.round: _unary("round"), python.sum: _reduction("sum"),
    python.max: _reduction("max"), python.min: _reduction("min"), python.range: Calls.call_range,
    python.float: Calls.call_convert, python.int: Calls.call_convert, python.bool: Calls.call_convert,
    python.len: Calls.call_len,
}
