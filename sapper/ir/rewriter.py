"""Small, named, pure rewrite rules over ops, and the walk that applies them.

Enters: a function and a RuleSet. Leaves: the function with every rule applied until none fires. Holds: values are
replaced, never changed in type; a rule sees operands that have been rewritten already; what a rule builds is rewritten
in its turn; the order of ops is kept, so the outcome does not depend on hashing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .nodes import Block, Function, Op, Value
from .ops import OpTable
from .types import Type

_DEPTH_LIMIT = 150
"""How often what a rule made may be rewritten in its turn; rules that need more feed each other for ever."""

Replacement = Sequence[Value] | None
Trace = Callable[[str, Op], None]
"""Called with the rule's name and the op that it replaces, each time one fires."""


class RewriteError(RuntimeError):
    """Rules overlap, or do not come to an end."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rewrite.

    function: from an op and the Rewriter (to build new ops with) to the values that take the place of the op's
    results, or None where the rule does not apply. It changes neither the op nor anything else.
    ops: names of the ops it looks at. priority: on one op name, higher ones are tried first.
    """

    name: str
    ops: tuple[str, ...]
    function: Callable[[Op, Rewriter], Replacement]
    priority: int = 0


class RuleSet:
    """Rules by op name. Two rules on one op name must differ in priority: their order is a decision, no accident.

    by_block: some read which values the block at hand has defined.
    """

    def __init__(self, rules: Iterable[Rule], by_block: bool = False) -> None:
        self.by_block = by_block
        self.by_op: dict[str, list[Rule]] = {}
        names: set[str] = set()
        for rule in rules:
            if rule.name in names:
                raise RewriteError(f"found two rules named {rule.name}; expected names to be unique")
            names.add(rule.name)
            for op in rule.ops:
                there = self.by_op.setdefault(op, [])
                for other in there:
                    if other.priority == rule.priority:
                        raise RewriteError(
                            f"found rules {other.name} and {rule.name} on op {op} with equal priority {rule.priority}; "
                            "expected one of them to come first"
                        )
                there.append(rule)
        for there in self.by_op.values():
            there.sort(key=lambda r: -r.priority)


class Rewriter:
    """The walk. A rule may read `function` and `here`, and call `build` and `substitute`."""

    __slots__ = ("by_block", "depth", "fires", "function", "here", "location", "new", "replaced", "rules", "trace")

    def __init__(self, function: Function, rules: RuleSet, trace: Trace | None = None) -> None:
        self.function = function
        self.rules = rules.by_op
        self.by_block = rules.by_block
        self.trace = trace
        self.fires = 0
        self.depth = 0
        self.replaced: dict[Value, Value] = {}
        self.new: list[Op] = []
        self.here: set[Value] = set()
        """The values that the block at hand has defined so far, where rules go by them."""
        self.location: Any = None

    def build(self, name: str, operands: list[Value], type: Type, **attributes: Any) -> Value:
        """A new op with one result, placed before the one that is replaced."""
        op = Op(name, operands, (type,), attributes, None, self.location)
        self.new.append(op)
        return op.results[0]

    def build_op(self, name: str, operands: list[Value], types: Sequence[Type] = (),
                 attributes: dict[str, Any] | None = None) -> Op:
        """The same for any number of results."""
        op = Op(name, operands, tuple(types), attributes, None, self.location)
        self.new.append(op)
        return op

    def inline(self, block: Block, arguments: Sequence[Value]) -> list[Value]:
        """Place a block's ops before the op that is replaced, its arguments bound; what it yields."""
        for old, new in zip(block.arguments, arguments, strict=True):
            self.replaced[old] = new
        terminator = block.terminator
        self.new.extend(block.ops if terminator is None else block.ops[:-1])
        return list(terminator.operands) if terminator is not None else []

    def final(self, value: Value) -> Value:
        """What a value has been replaced by, so far."""
        replaced = self.replaced
        while value in replaced:
            value = replaced[value]
        return value

    def run(self) -> int:
        """Rewrite the whole function; how often rules fired."""
        self.block(self.function.body)
        return self.fires

    def block(self, block: Block) -> None:
        outside = self.here
        self.here = set(block.arguments)
        out: list[Op] = []
        self.visit(block.ops, out)
        block.ops = out
        self.here = outside

    def visit(self, ops: list[Op], out: list[Op]) -> None:
        """Rewrite ops in turn; what becomes of them goes out."""
        replaced = self.replaced
        for op in ops:
            if replaced:
                operands = op.operands
                for position, value in enumerate(operands):
                    if value in replaced:
                        operands[position] = self.final(value)
            rules = self.rules.get(op.name)
            if rules is not None and self.replace(op, rules, out):
                continue
            if op.blocks:
                for block in op.blocks:
                    self.block(block)
            out.append(op)
            if self.by_block:
                self.here.update(op.results)

    def replace(self, op: Op, rules: list[Rule], out: list[Op]) -> bool:
        """Apply the first rule that does; gives whether there was one."""
        self.location = op.location
        for rule in rules:
            values = rule.function(op, self)
            if values is None:
                continue
            self.fired(rule, op)
            new, self.new = self.new, []
            self.depth += 1
            self.visit(new, out)
            self.depth -= 1
            for old, value in zip(op.results, values, strict=True):
                value = self.final(value)
                if not value.name:
                    value.name = old.name
                self.replaced[old] = value
            return True
        return False

    def fired(self, rule: Rule, op: Op) -> None:
        self.fires += 1
        if self.trace is not None:
            self.trace(rule.name, op)
        if self.depth > _DEPTH_LIMIT:
            raise RewriteError(f"found {self.depth} rewrites of one op's rewrites, the last by rule {rule.name}; "
                               "expected them to end")


def rewrite(function: Function, rules: RuleSet, trace: Trace | None = None) -> int:
    """Apply rules to a function, in place; how often they fired."""
    return Rewriter(function, rules, trace).run()


def count_fires(counts: dict[str, int]) -> Trace:
    """A trace that counts fires by rule name."""

    def trace(name: str, op: Op) -> None:
        counts[name] = counts.get(name, 0) + 1

    return trace


def eliminate_dead(function: Function, table: OpTable, readers: frozenset[str] = frozenset()) -> int:
    """Remove ops on which nothing with an effect depends; how many. An op with blocks counts once, with what is in it.

    readers: names of ops that the table calls impure only because they read memory. Ops with blocks that stay lose the
    results that are not needed: what nobody reads, or only to make it anew, as a value that a loop carries for itself.
    """
    droppable = {name for name, row in table.rows.items() if row.pure and not row.blocks} | readers
    needed, live = _reaching_effects(function, droppable)
    return _keep_needed(function.body, needed, live)


def _keep_needed(block: Block, needed: set[Op], live: set[Value]) -> int:
    kept = [op for op in block.ops if op in needed or op.name == "yield"]
    removed = len(block.ops) - len(kept)
    if removed:
        block.ops = kept
    for op in kept:
        if op.blocks:
            _keep_results(op, live)
            for inner in op.blocks:
                removed += _keep_needed(inner, needed, live)
    return removed


def _keep_results(op: Op, live: set[Value]) -> None:
    """Narrow an op with blocks to the results that are live, themselves or inside a loop."""
    count = len(op.results)
    gone = {i for i in range(count) if _slot(op, i).isdisjoint(live)}
    if not gone:
        return
    for block in op.blocks:
        assert block.terminator is not None
        if _carries(op):
            first = len(block.arguments) - count
            block.arguments = [v for i, v in enumerate(block.arguments) if i - first not in gone]
        block.terminator.operands = [v for i, v in enumerate(block.terminator.operands) if i not in gone]
    if _carries(op):
        first = len(op.operands) - count
        op.operands = [v for i, v in enumerate(op.operands) if i - first not in gone]
    op.results = [v for i, v in enumerate(op.results) if i not in gone]


def _carries(op: Op) -> bool:
    """Whether the results of an op with blocks are carried round: a loop's. A branch takes no values in."""
    return len(op.blocks) == 1


def _slot(op: Op, i: int) -> set[Value]:
    """Result i of an op with blocks, and what stands for it inside a loop."""
    if not _carries(op):
        return {op.results[i]}
    return {op.results[i], op.blocks[0].arguments[i - len(op.results)]}


def _reaching_effects(function: Function, droppable: set[str]) -> tuple[set[Op], set[Value]]:
    """The ops and the values on which something with an effect depends; ops with effects among them."""
    places: dict[Value, int] = {}       # which result of an op with blocks a value is, or stands for inside it
    around: dict[Op | Block, Op] = {}   # of ops and blocks, the op they stand in
    pending: list[Op] = []
    blocks: list[tuple[Block, Op | None]] = [(function.body, None)]
    while blocks:
        block, outside = blocks.pop()
        if outside is not None:
            around[block] = outside
            around.update(dict.fromkeys(block.ops, outside))
        for op in block.ops:
            if op.blocks:
                places.update(zip(op.results, range(len(op.results)), strict=True))
                for inner in op.blocks:
                    carried = inner.arguments[len(inner.arguments) - len(op.results):] if inner.arguments else []
                    places.update(zip(carried, range(len(carried)), strict=True))
                    blocks.append((inner, op))
            elif op.name not in droppable and op.name != "yield":
                pending.append(op)
    needed: set[Op] = set(pending)
    live: set[Value] = set()

    while pending:
        op = pending.pop()
        outer = around.get(op)
        if outer is not None and outer not in needed:
            needed.add(outer)
            pending.append(outer)
        values = op.operands[: len(op.operands) - len(op.results)] if op.blocks and _carries(op) else op.operands
        while values:
            more: list[Value] = []  # what one of them stands for
            for value in values:
                if value in live:
                    continue
                live.add(value)
                owner = value.op
                if owner is None:       # an argument of a block: of the function's body, of a loop, ...
                    owner = around.get(value.owner)     # type: ignore[arg-type]
                    if owner is None:
                        continue
                if owner not in needed:
                    needed.add(owner)
                    pending.append(owner)
                place = places.get(value)
                if place is not None:
                    more += [block.terminator.operands[place] for block in owner.blocks if block.terminator is not None]
                    if _carries(owner):
                        more += [owner.operands[place - len(owner.results)], *_slot(owner, place)]
            values = more
    return needed, live


__all__ = ["RewriteError", "Rewriter", "Rule", "RuleSet", "count_fires", "eliminate_dead", "rewrite"]
