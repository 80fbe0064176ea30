"""The source of a Python function as an ast, with places in the author's file.

Enters: a function object. Leaves: ParsedFunction. The lines are those that the code object covers, found without
tokenizing the file; inspect is the fall-back. Holds: of a file that was written anew since a kernel of it was defined,
a function is what compiles to its code, wherever it stands now; there is no other.
"""

from __future__ import annotations

import ast
import inspect
import linecache
from collections import OrderedDict
from types import CodeType, FunctionType
from typing import Any

from ..ir.nodes import Location
from .stamps import noted, stamp


class SourceUnavailable(Exception):
    """The function's file cannot be read, or does not hold the function."""


class SourceChanged(SourceUnavailable):
    """The function's file was written anew, and no longer holds it."""


class ParsedFunction:
    """A function's ast node (FunctionDef or Lambda), and how its lines and columns map to the file's.

    live: what sapper/lang/liveness.py found, by loop or branch node; filled on demand.
    """

    __slots__ = ("column_offset", "file", "line_offset", "lines", "live", "node")

    def __init__(self, node: ast.AST, file: str, line_offset: int, column_offset: int, lines: list[str]) -> None:
        self.node = node
        self.file = file
        self.line_offset = line_offset
        self.column_offset = column_offset
        self.lines = lines
        self.live: dict[ast.AST, Any] | None = None

    def location(self, node: Any) -> Location:
        """The place of an ast node; columns count characters from 1. Kept on the node."""
        place: Location | None = getattr(node, "sapper_location", None)
        if place is None:
            line, column = node.lineno, node.col_offset
            end = node.end_col_offset if node.end_lineno == line else len(self.lines[line - 1].encode())
            text = self.lines[line - 1]
            if not text.isascii():  # ast counts bytes of UTF-8
                raw = text.encode()
                column, end = len(raw[:column].decode(errors="replace")), len(raw[:end].decode(errors="replace"))
            place = Location(self.file, line + self.line_offset, column + self.column_offset + 1,
                             end + self.column_offset + 1)
            node.sapper_location = place
        return place


_parsed: OrderedDict[tuple[CodeType, str], ParsedFunction] = OrderedDict()
"""By code and file: code objects of equal lines in different files are equal. The KEPT that were asked for last."""
KEPT = 16
"""A function's nodes take some 20 KB, and a fraction of a millisecond to be made again. The kernels of a model and what
they call are a hundred functions."""


def parse_function(function: FunctionType) -> ParsedFunction:
    """The parsed source of a function. Raises SourceUnavailable."""
    key = (function.__code__, function.__code__.co_filename)
    found = _parsed.pop(key, None)
    if found is None:
        found = _parse(function)
    _parsed[key] = found
    if len(_parsed) > KEPT:
        _parsed.popitem(last=False)     # at once, whatever other threads do
    return found


def _parse(function: FunctionType) -> ParsedFunction:
    code = function.__code__
    first = code.co_firstlineno
    now = stamp(code.co_filename)
    if now is not None:
        linecache.checkcache(code.co_filename)  # it may hold what the file was before
    lines = linecache.getlines(code.co_filename, function.__globals__)
    before = noted(function)
    if before is not None and now is not None and before != now:
        return _find(code, lines)
    if not lines or first > len(lines):
        raise SourceUnavailable(code.co_filename)
    try:
        return _parse_lines(code, lines[first - 1 : _last_line(code)], first)
    except SyntaxError:
        pass  # the code object does not cover the last lines, such as a closing bracket
    try:
        block, first = inspect.getsourcelines(function)
        return _parse_lines(code, block, max(first, 1))
    except (OSError, SyntaxError):
        pass  # a lambda may be one entry of a list of many lines
    try:
        return _parse_lines(code, lines, 1)
    except SyntaxError as error:
        raise SourceUnavailable(code.co_filename) from error


def _find(code: CodeType, lines: list[str]) -> ParsedFunction:
    """The function of a code object in a file that may hold it elsewhere, or another one in its place."""
    try:
        tree = ast.parse("".join(lines))
    except SyntaxError:
        raise SourceChanged(code.co_filename) from None
    for node in ast.walk(tree):
        name = "<lambda>" if isinstance(node, ast.Lambda) else getattr(node, "name", "")
        if isinstance(node, (ast.Lambda, ast.FunctionDef)) and name == code.co_name and _compiles_to(node, code):
            return ParsedFunction(node, code.co_filename, 0, 0, lines)
    raise SourceChanged(code.co_filename)


def _compiles_to(node: Any, code: CodeType) -> bool:
    """Whether a function, among names that it closes over, becomes a code object, but for where it stands."""
    held: list[ast.stmt] = [ast.Assign([ast.Name(name, ast.Store())], ast.Constant(None)) for name in code.co_freevars]
    within = ast.parse("def within(): pass").body[0]
    assert isinstance(within, ast.FunctionDef)
    within.body = [*held, ast.Expr(node) if isinstance(node, ast.Lambda) else node]
    module = ast.fix_missing_locations(ast.Module([within], []))
    try:
        made = compile(module, code.co_filename, "exec", code.co_flags & FUTURE, dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    outer = next(c for c in made.co_consts if isinstance(c, CodeType))
    return any(isinstance(c, CodeType) and _facts(c) == _facts(code) for c in outer.co_consts)


FUTURE = 0x1FF0000
"""The flags of code objects that say what came from __future__, as `compile` takes them."""


def _facts(code: CodeType) -> tuple[Any, ...]:
    """What a code object does, without places."""
    constants = tuple(_facts(c) if isinstance(c, CodeType) else (type(c).__name__, repr(c)) for c in code.co_consts)
    return (code.co_name, code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars,
            code.co_argcount)


def _parse_lines(code: CodeType, lines: list[str], first: int) -> ParsedFunction:
    head = lines[0]
    margin = len(head) - len(head.lstrip())
    text = "".join(lines)
    if margin:
        # An indented block parses inside an `if`, with lines and columns kept, strings with newlines too.
        tree = ast.parse("if True:\n" + text)
        offset = first - 2
        lines = ["if True:\n", *lines]
    else:
        tree = ast.parse(text)
        offset = first - 1
    found: list[ast.AST] = []
    if code.co_name == "<lambda>":
        lambdas = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
        found += lambdas if len(lambdas) == 1 else [node for node in lambdas if _is_lambda(node, code, offset)]
    else:
        found += [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == code.co_name]
    if not found:
        raise SourceUnavailable(code.co_filename)
    return ParsedFunction(found[0], code.co_filename, offset, 0, lines)


def _is_lambda(node: ast.Lambda, code: CodeType, offset: int) -> bool:
    """Whether a lambda is that of a code object, among others of its lines: columns tell. offset: between lines of the
    tree and of the file."""
    body = node.body
    span = body.lineno + offset, (body.end_lineno or 0) + offset, body.col_offset, body.end_col_offset
    return node.lineno + offset == code.co_firstlineno and span in code.co_positions()


def _last_line(code: CodeType) -> int:
    last = code.co_firstlineno
    for _, end, _, _ in code.co_positions():
        if end is not None and end > last:
            last = end
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            last = max(last, _last_line(constant))
    return last
