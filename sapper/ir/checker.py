"""What the rules of both stages stand on: the walk over a function, and the error of one that breaks a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from .nodes import Block, Function, Location, Op, Value
from .ops import OpTable
from .text import print_op
from .types import DType, TileType, Type, bool_, i32, i64, index


class VerificationError(ValueError):
    """A function breaks a rule. op is None where the function as a whole does."""

    def __init__(self, function: Function, op: Op | None, found: str, expected: str) -> None:
        self.function = function
        self.op = op
        self.found = found
        self.expected = expected
        self.location: Location | None = op.location if op is not None else function.location
        place = f" at {self.location}" if self.location is not None else ""
        what = f"op {op.name}" if op is not None else "function"
        message = f"{function.stage} {what} in {function.name}{place}: found {found}; expected {expected}"
        if op is not None:
            message += f"\n    {_show(op)}"
        super().__init__(message)


def _show(op: Op) -> str:
    try:
        return print_op(op)
    except TypeError as error:  # the attribute that cannot be printed may be the very fault
        return f"{op.name} ({error})"


def types_of(values: Iterable[Value]) -> str:
    """Their types, for messages."""
    return f"({', '.join([str(v.type) for v in values])})"


def union_of_axes(values: Iterable[Value]) -> tuple[str, ...]:
    """The axes of tile values in order of first appearance."""
    found: dict[str, None] = {}
    for value in values:
        if isinstance(value.type, TileType):
            for axis in value.type.axes:
                found[axis] = None
    return tuple(found)


INDEX = TileType(index)
BOOL = TileType(bool_)

_MIXES_WITH_INDEX = (i32, i64, index)


def join_dtypes(a: DType, b: DType) -> DType | None:
    """The dtype of an elementwise op on a and b: equal, or index where one is index and one i32 or i64."""
    if a == b:
        return a
    if a in _MIXES_WITH_INDEX and b in _MIXES_WITH_INDEX and index in (a, b):
        return index
    return None


class Checker:
    """The walk over one function, and what the rules of the stages ask of it."""

    __slots__ = ("axes", "axes_seen", "defined", "dims", "ever_defined", "function", "inside_tasks", "lanes", "op",
                 "rules", "slots", "table")

    def __init__(self, function: Function, table: OpTable, rules: dict[str, Rule]) -> None:
        self.function = function
        self.table = table
        self.rules = rules
        self.defined: set[Value] = set()  # in scope here
        self.ever_defined: set[Value] = set()
        self.axes: set[str] = set()
        self.axes_seen: set[str] = set()
        self.dims: set[str] | None = None
        self.op: Op | None = None
        self.lanes = 0
        self.slots = 0
        self.inside_tasks = False

    def fail(self, found: str, expected: str) -> NoReturn:
        raise VerificationError(self.function, self.op, found, expected)

    # Structure.

    def run(self) -> None:
        body = self.function.body
        for argument in body.arguments:
            self.define(argument, body)
        self.block(body, None)

    def define(self, value: Value, owner: Op | Block) -> None:
        if value.owner is not owner:
            self.fail(f"%{value.name or '?'} owned by {value.owner!r}", "a value owned by what defines it")
        if value in self.ever_defined:
            self.fail(f"%{value.name or '?'} defined twice", "each value defined once")
        self.ever_defined.add(value)
        self.defined.add(value)

    def block(self, block: Block, owner: Op | None, yields: list[Type] | None = None) -> None:
        """One block, its arguments already defined. yields: what it must yield; the function yields nothing."""
        here: list[Value] = list(block.arguments)
        axes_before = set(self.axes)
        defined, ever_defined, shapes, rules = self.defined, self.ever_defined, self.table.shapes, self.rules
        is_defined = defined.issuperset
        last = len(block.ops) - 1
        for position, op in enumerate(block.ops):
            self.op = op
            name, operands, results, attributes = op.name, op.operands, op.results, op.attributes
            shape = shapes.get(name)
            if shape is None:
                self.fail(f"op {name}", f"an op of the {self.table.stage} IR")
            if not is_defined(operands):
                self.undefined(operands)
            fewest, most, fewest_results, most_results, blocks, required, allowed = shape
            if (not fewest <= len(operands) <= most or not fewest_results <= len(results) <= most_results
                    or len(op.blocks) != blocks):
                self.counts(op)
            if (attributes or required) and attributes.keys() != required and not (
                    required <= attributes.keys() and attributes.keys() <= allowed):
                self.attributes(op)
            if name == "yield" and (position != last or owner is None):
                self.fail("yield in the middle" if owner is not None else "yield in the function's own block",
                          "yield as the last op of a nested block")
            rules[name](self, op)
            self.op = op
            for value in results:
                if value.owner is not op or value in ever_defined:
                    self.define(value, op)
                ever_defined.add(value)
                defined.add(value)
                here.append(value)
        if owner is not None:
            self.yielded(block, owner, yields or [])
        self.axes = axes_before
        defined.difference_update(here)

    def undefined(self, operands: list[Value]) -> NoReturn:
        number, operand = next((i, v) for i, v in enumerate(operands) if v not in self.defined)
        self.fail(f"operand {number} (%{operand.name or '?'}: {operand.type}) that is not defined here",
                  "a value defined above it, in this block or one around it")

    def counts(self, op: Op) -> NoReturn:
        """Of an op that has others than its row says."""
        row = self.table.rows[op.name]
        self.count("operands", len(op.operands), row.operands)
        self.count("results", len(op.results), row.results)
        self.fail(f"{len(op.blocks)} blocks", f"{row.blocks}")

    def attributes(self, op: Op) -> NoReturn:
        """Of an op that lacks some, or has others than its row says."""
        row = self.table.rows[op.name]
        for name in row.attributes:
            if name not in op.attributes:
                self.fail(f"no attribute {name}", f"attributes {', '.join(row.attributes)}")
        found = next(name for name in op.attributes if name not in row.attributes and name not in row.optional)
        known = ", ".join((*row.attributes, *row.optional)) or "none"
        self.fail(f"attribute {found}", f"only {known}")

    def count(self, what: str, found: int, allowed: tuple[int, int | None]) -> None:
        low, high = allowed
        if found < low or (high is not None and found > high):
            limit = f"{low}" if high == low else f"at least {low}" if high is None else f"{low} to {high}"
            self.fail(f"{found} {what}", limit)

    def yielded(self, block: Block, owner: Op, expected: list[Type]) -> None:
        terminator = block.terminator
        values = terminator.operands if terminator is not None else []
        if terminator is None and expected:
            self.op = owner
            self.fail("a block without yield", f"a yield of ({', '.join(map(str, expected))})")
        if [v.type for v in values] != expected:
            self.op = terminator
            self.fail(f"a yield of {types_of(values)}",
                      f"({', '.join(map(str, expected))}), as op {owner.name} returns")

    def nested(self, op: Op, block: Block, arguments: list[Type], yields: list[Type]) -> None:
        """A nested block with arguments of these types, yielding those."""
        if [a.type for a in block.arguments] != arguments:
            self.fail(f"block arguments {types_of(block.arguments)}", f"({', '.join(map(str, arguments))})")
        for argument in block.arguments:
            self.define(argument, block)
        self.block(block, op, yields)
        self.op = op

    # Attributes and types.

    def attribute(self, op: Op, name: str, kind: type, default: Any = None) -> Any:
        value = op.attributes.get(name, default)
        if type(value) is not kind:
            self.fail(f"attribute {name} = {value!r}", f"a value of type {kind.__name__}")
        return value

    def one_of(self, op: Op, name: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        value = op.attributes.get(name, default)
        if value not in allowed or isinstance(value, bool):
            self.fail(f"attribute {name} = {value!r}", "one of " + ", ".join(map(str, allowed)))
        return value

    def names(self, op: Op, name: str) -> list[str]:
        value = op.attributes[name]
        if not isinstance(value, (list, tuple)) or not all(type(v) is str for v in value):
            self.fail(f"attribute {name} = {value!r}", "a list of axis names")
        if len(set(value)) != len(value) or not value:
            self.fail(f"attribute {name} = {list(value)!r}", "at least one axis, each once")
        return list(value)

    def results(self, op: Op, *expected: Type) -> None:
        if tuple([v.type for v in op.results]) != expected:
            self.fail(f"results {types_of(op.results)}", f"({', '.join(map(str, expected))})")

    def operands(self, op: Op, *expected: Type) -> None:
        if tuple([v.type for v in op.operands]) != expected:
            self.fail(f"operands {types_of(op.operands)}", f"({', '.join(map(str, expected))})")

    def bring_axes(self, axes: list[str]) -> None:
        for axis in axes:
            if axis in self.axes_seen:
                self.fail(f"axis {axis} brought into scope twice", "axis names that are unique in the function")
            self.axes_seen.add(axis)
            self.axes.add(axis)


Rule = Callable[[Checker, Op], None]


def nothing(check: Checker, op: Op) -> None:
    """Of ops without operands, results and attributes, and of yield, which the block's owner checks."""


def branches(condition: Type) -> Rule:
    """Of `if`, whose condition is of this type."""

    def rule(check: Checker, op: Op) -> None:
        if op.operands[0].type != condition:
            check.fail(f"a condition of type {op.operands[0].type}", f"{condition}")
        types = [v.type for v in op.results]
        for block in op.blocks:
            check.nested(op, block, [], types)

    return rule
