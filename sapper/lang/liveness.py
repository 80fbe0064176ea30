"""Which names a loop carries and an if merges, from the ast alone.

Enters: the body of a function. Leaves: for each For node the names assigned in its body whose value of one round
is read in the next or after the loop; for each If node the names assigned in a branch and read afterwards; both in
the order of their first assignment. Whether a carried name exists before the loop is the front end's to see.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

Live = dict[ast.AST, tuple[str, ...]]


def analyse(body: list[ast.stmt]) -> Live:
    """The names by For and If node of a function's body, nested functions left out."""
    analysis = _Analysis()
    # A nested function reads the names of its surroundings whenever it is called.
    always: set[str] = set()
    for node in _walk(body):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            always |= analysis.reads(node)
    analysis.block(body, always)
    return analysis.live


def assigned_names(body: list[ast.stmt]) -> list[str]:
    """Names that the statements assign, loop variables included, in order of first appearance."""
    names: dict[str, None] = {}
    _assigned(body, names)
    return list(names)


def _assigned(body: list[ast.stmt], names: dict[str, None]) -> None:
    for statement in body:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                _target_names(target, names)
        elif isinstance(statement, (ast.AugAssign, ast.AnnAssign)):
            _target_names(statement.target, names)
        elif isinstance(statement, ast.For):
            _target_names(statement.target, names)
            _assigned(statement.body, names)
        elif isinstance(statement, ast.If):
            _assigned(statement.body, names)
            _assigned(statement.orelse, names)
        elif isinstance(statement, ast.FunctionDef):
            names[statement.name] = None


def _target_names(target: ast.expr, names: dict[str, None]) -> None:
    if isinstance(target, ast.Name):
        names[target.id] = None
    elif isinstance(target, (ast.Tuple, ast.List)):
        for element in target.elts:
            _target_names(element, names)


def _walk(pending: list[Any]) -> Iterator[ast.AST]:
    """Nodes and all below them, in any order."""
    pending = list(pending)
    while pending:
        node = pending.pop()
        yield node
        for name in node._fields:
            below = getattr(node, name, None)
            if isinstance(below, ast.AST):
                pending.append(below)
            elif isinstance(below, list):
                pending += [item for item in below if isinstance(item, ast.AST)]


class _Analysis:
    def __init__(self) -> None:
        self.live: Live = {}
        self.read: dict[ast.AST, set[str]] = {}

    def reads(self, node: ast.AST) -> set[str]:
        """The names that are read in a node: of a loop in loops they are asked for again and again."""
        found = self.read.get(node)
        if found is None:
            found = self.read[node] = {n.id for n in _walk([node])
                                       if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        return found

    def block(self, body: list[ast.stmt], live_out: set[str]) -> set[str]:
        """The names live before the statements, given those live after."""
        live = live_out
        for statement in reversed(body):
            live = self.statement(statement, live)
        return live

    def statement(self, node: ast.stmt, live: set[str]) -> set[str]:
        if isinstance(node, ast.Assign):
            names: dict[str, None] = {}
            live = set(live)
            for target in node.targets:
                _target_names(target, names)
            live.difference_update(names)
            for target in node.targets:
                if not isinstance(target, ast.Name):
                    live |= self.reads(target)
            return live | self.reads(node.value)
        if isinstance(node, ast.AugAssign):
            live = live | self.reads(node.value) | self.reads(node.target)
            return live | {node.target.id} if isinstance(node.target, ast.Name) else live
        if isinstance(node, ast.For):
            targets: dict[str, None] = {}
            _target_names(node.target, targets)
            assigned: dict[str, None] = {}
            _assigned(node.body, assigned)
            first = self.block(node.body, live)
            body_in = self.block(node.body, live | first)
            wanted = body_in | live
            self.live[node] = tuple(name for name in assigned if name in wanted and name not in targets)
            return live | (body_in - set(targets)) | self.reads(node.iter)
        if isinstance(node, ast.If):
            assigned = {}
            _assigned(node.body, assigned)
            _assigned(node.orelse, assigned)
            self.live[node] = tuple(name for name in assigned if name in live)
            return self.block(node.body, live) | self.block(node.orelse, live) | self.reads(node.test)
        if isinstance(node, ast.FunctionDef):
            return live - {node.name}
        return live | self.reads(node)
