"""The code object that the eager run executes: the author's, with numbers of Python's own kept to the language's rules.

Enters: a Python function. Leaves: a code object of the same lines, file, names and free variables. Holds: what the code
does is what the author wrote, except where Python's numbers are not the language's:

- `x.to(dtype)` and `x.bits(dtype)` also work where x is a Python number;
- `out[i] += x`, `out[i] = maximum(out[i], x)` and the like are one operation, as an element that i names twice is
  joined with both values;
- `range` of a comprehension gives constants, as tuples are made of;
- a number that a loop carries (`count = 0` before it, `count += 1` in it), that an if merges, or that `a if c else b`
  chooses is known at run time only, so it is a scalar without a dtype, and computes in i32 or f32.
"""

from __future__ import annotations

import ast
import copy
from types import CodeType, FunctionType

from ..lang.liveness import Live, analyse
from ..lang.source import SourceUnavailable, parse_function

WEAKEN = "__sapper_weaken__"
METHOD = "__sapper_method__"
LOCALS = "__sapper_locals__"
UPDATE = "__sapper_update__"
NUMBERS = "__sapper_numbers__"

_made: dict[tuple[CodeType, str], CodeType] = {}
"""By code and file: code objects of equal lines in different files are equal."""


def code_of(function: FunctionType) -> CodeType:
    """The rewritten code of a function, or its own where the source cannot be read. It expects five builtins, named
    WEAKEN (a number to a scalar without a dtype), METHOD (object, method name, arguments), LOCALS, UPDATE (object,
    indices, a function or the name of an operator of Python, value, whether it is the first operand) and NUMBERS
    (Python's range)."""
    original = function.__code__
    key = (original, original.co_filename)
    made = _made.get(key)
    if made is None:
        try:
            made = _rewrite(function)
        except SourceUnavailable:
            made = original
        _made[key] = made
    return made


def _rewrite(function: FunctionType) -> CodeType:
    original = function.__code__
    parsed = parse_function(function)
    node = copy.deepcopy(parsed.node)
    ast.increment_lineno(node, parsed.line_offset)
    assert isinstance(node, ast.FunctionDef | ast.Lambda)
    rewriter = _Rewriter(analyse(node.body) if isinstance(node, ast.FunctionDef) else {})
    if isinstance(node, ast.FunctionDef):
        node.decorator_list = []
        node.body = [part for statement in node.body for part in _as_list(rewriter.visit(statement))]
        body: ast.stmt = node
    else:
        node.body = rewriter.visit(node.body)
        body = ast.copy_location(ast.Expr(node), node)
    # Free variables stay free: a function around it declares them.
    around = ast.parse(f"def around({', '.join(original.co_freevars)}): pass")
    outer = around.body[0]
    assert isinstance(outer, ast.FunctionDef)
    outer.body = [body]
    ast.fix_missing_locations(around)
    module = compile(around, original.co_filename, "exec", dont_inherit=True)
    (outer_code,) = (c for c in module.co_consts if isinstance(c, CodeType))
    (made,) = (c for c in outer_code.co_consts if isinstance(c, CodeType) and c.co_name == original.co_name)
    if set(made.co_freevars) - set(original.co_freevars):
        raise SourceUnavailable(original.co_filename)
    return made.replace(co_qualname=original.co_qualname)


def _as_list(statement: ast.stmt | list[ast.stmt]) -> list[ast.stmt]:
    return statement if isinstance(statement, list) else [statement]


class _Rewriter(ast.NodeTransformer):
    def __init__(self, live: Live) -> None:
        self.live = live

    def weaken(self, names: tuple[str, ...], like: ast.stmt) -> list[ast.stmt]:
        """`name = weaken(name)` for each name that is bound."""
        made: list[ast.stmt] = []
        for name in names:
            statement = ast.parse(f"if {name!r} in {LOCALS}(): {name} = {WEAKEN}({name})").body[0]
            for node in ast.walk(statement):
                ast.copy_location(node, like)
                if isinstance(node, ast.stmt | ast.expr):
                    node.end_lineno = like.lineno  # one line, or a debugger would stop at others
            made.append(statement)
        return made

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.live.update(analyse(node.body))
        return self.generic_visit(node)

    def visit_For(self, node: ast.For) -> list[ast.stmt]:
        names = self.live.get(node, ()) if isinstance(node.iter, ast.Call) else ()
        self.generic_visit(node)
        return [*self.weaken(names, node), node]

    def visit_If(self, node: ast.If) -> list[ast.stmt]:
        names = self.live.get(node, ())
        self.generic_visit(node)
        return [node, *self.weaken(names, node)]

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        self.generic_visit(node)
        target = node.target
        if not isinstance(target, ast.Subscript) or any(isinstance(n, ast.Slice) for n in ast.walk(target.slice)):
            return node
        name = ast.copy_location(ast.Constant(type(node.op).__name__), target)
        update = _call(UPDATE, [target.value, target.slice, name, node.value], node)
        return ast.copy_location(ast.Expr(update), node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        """`out[i] = f(out[i], x)` and `out[i] = out[i] + x`, with the operands in either order, as an update."""
        written = ast.unparse(node.targets[0])
        same = [ast.unparse(operand) == written for operand in _operands(node.value)]
        self.generic_visit(node)
        target, value, operands = node.targets[0], node.value, _operands(node.value)
        if not isinstance(target, ast.Subscript) or len(node.targets) > 1 or not any(same) or any(
                isinstance(n, ast.Slice) for n in ast.walk(target.slice)):
            return node
        by = value.func if isinstance(value, ast.Call) else ast.Constant(type(value.op).__name__)  # type: ignore[attr-defined]
        turned = not same[0]
        given = [by, operands[not turned], ast.Constant(turned)]
        made = _call(UPDATE, [target.value, target.slice, *(ast.copy_location(part, target) for part in given)], node)
        return ast.copy_location(ast.Expr(made), node)

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:
        self.generic_visit(node)
        walked = node.iter
        if isinstance(walked, ast.Call) and isinstance(walked.func, ast.Name) and walked.func.id == "range":
            node.iter = _call(NUMBERS, walked.args, walked)
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        return _call(WEAKEN, [node], node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        target = node.func
        if isinstance(target, ast.Attribute) and target.attr in ("to", "bits") and not node.keywords:
            name = ast.copy_location(ast.Constant(target.attr), target)
            return _call(METHOD, [target.value, name, *node.args], node)
        return node


def _operands(node: ast.expr) -> list[ast.expr]:
    """Of an operation on two values."""
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    return node.args if isinstance(node, ast.Call) and len(node.args) == 2 and not node.keywords else []


def _call(name: str, arguments: list[ast.expr], like: ast.expr | ast.stmt) -> ast.Call:
    function = ast.copy_location(ast.Name(name, ast.Load()), like)
    return ast.copy_location(ast.Call(function, arguments, []), like)
