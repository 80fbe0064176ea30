"""A function that is made again and again, kept as what cannot be changed.

Enters: a Function. Leaves: any number of functions like it, each with values, ops and lists of its own. Holds: what is
kept refers to none of them, and has no cycles: it is freed as soon as nobody wants it.
"""

from __future__ import annotations

from typing import Any

from .nodes import Block, Function, Op, Value

_Block = tuple[tuple[Any, ...], tuple[Any, ...], Any]
"""(type and name of each argument, ops, pairs of arguments that stand for each other); values by number."""


class Kept:
    """A function as it was when it was kept."""

    __slots__ = ("attributes", "body", "location", "name", "stage")

    def __init__(self, function: Function) -> None:
        self.name, self.stage, self.location = function.name, function.stage, function.location
        self.attributes = _own(function.attributes)
        self.body = _kept(function.body, {})

    def made(self) -> Function:
        """A new function."""
        function = Function(self.name, self.stage, self.location)
        function.attributes = _own(self.attributes)
        function.body = _made(self.body, [])
        return function


def _own(held: Any) -> Any:
    """An attribute with lists and dicts of its own."""
    kind = held.__class__
    if kind is list:
        return [_own(item) for item in held]
    if kind is dict:
        return {name: _own(item) for name, item in held.items()}
    return held


def _kept(block: Block, numbers: dict[Value, int]) -> _Block:
    """numbers: of the values so far."""
    for argument in block.arguments:
        numbers[argument] = len(numbers)
    arguments = tuple([(value.type, value.name) for value in block.arguments])
    ops = []
    for op in block.ops:
        operands = tuple([numbers[value] for value in op.operands])
        blocks = tuple([_kept(inner, numbers) for inner in op.blocks])
        results = op.results
        for value in results:
            numbers[value] = len(numbers)
        ops.append((op.name, operands, tuple([value.type for value in results]),
                    tuple([value.name for value in results]), _own(op.attributes), blocks, op.location))
    same = None if block.same is None else [(numbers[one], numbers[other]) for one, other in block.same.items()]
    return arguments, tuple(ops), same


def _made(kept: _Block, values: list[Value]) -> Block:
    """values: those so far, by number."""
    block = Block()
    arguments, ops, same = kept
    block.arguments = [Value(type, block, name) for type, name in arguments]
    values += block.arguments
    for name, operands, types, names, attributes, inner, location in ops:
        blocks = [_made(one, values) for one in inner] if inner else None
        op = Op(name, [values[number] for number in operands], types, _own(attributes), blocks, location)
        for value, hint in zip(op.results, names, strict=True):
            value.name = hint
        values += op.results
        block.ops.append(op)
    if same is not None:
        block.same = {values[one]: values[other] for one, other in same}
    return block
