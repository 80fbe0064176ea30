"""The one IR data structure that tile IR and lane IR share: SSA values, ops with nested blocks, functions.

An op has operands, attributes, results and blocks (its nested regions, one block each). A block has arguments
and ends in `yield` where the op that owns it carries or returns values. What ops exist, and what they mean, is
said by the op tables (sapper/tile/ops.py, sapper/lane/ops.py); this module knows no op by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from .types import TensorType, TileType, Type


@dataclass(frozen=True, slots=True)
class Location:
    """A place in the author's source. line and columns count from 1; end_column is one past the last."""

    file: str
    line: int
    column: int = 1
    end_column: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class Value:
    """One SSA value: the result of an op, or an argument of a block. name is a hint for printing only.

    op: the op that defines it; None for a block argument.
    """

    __slots__ = ("name", "op", "owner", "type")

    def __init__(self, type: Type, owner: Op | Block | None, name: str = "") -> None:
        self.type = type
        self.owner = owner
        self.op: Op | None = owner if isinstance(owner, Op) else None
        self.name = name

    def move_to(self, op: Op) -> None:
        """Have it be the result of another op, which lists it among its results."""
        self.owner = self.op = op

    def __repr__(self) -> str:
        return f"%{self.name or '?'}: {self.type}"


class Op:
    """One operation. `results` are made from `types`; `location` is where the author wrote it."""

    __slots__ = ("attributes", "blocks", "location", "name", "operands", "results")

    def __init__(
        self,
        name: str,
        operands: list[Value],
        types: tuple[Type, ...] | list[Type] = (),
        attributes: dict[str, Any] | None = None,
        blocks: Sequence[Block] | None = None,
        location: Location | None = None,
    ) -> None:
        self.name = name
        self.operands = operands
        self.attributes: dict[str, Any] = {} if attributes is None else attributes
        # Most have one result: no comprehension, which is a call.
        self.results = [Value(types[0], self)] if len(types) == 1 else [Value(t, self) for t in types]
        self.blocks: Sequence[Block] = blocks or ()
        self.location = location

    @property
    def result(self) -> Value:
        (only,) = self.results
        return only

    def walk(self) -> Iterator[Op]:
        """This op, then every op nested in it, in order."""
        return _walk([self])

    def __repr__(self) -> str:
        return f"<op {self.name}>"


def _walk(pending: list[Op]) -> Iterator[Op]:
    """pending: the last comes first."""
    while pending:
        op = pending.pop()
        yield op
        if op.blocks:
            for block in reversed(op.blocks):
                pending += reversed(block.ops)


class Block:
    """Arguments and a list of ops. same: which argument stands for all that may be one memory (Function.unite)."""

    __slots__ = ("arguments", "ops", "same")

    def __init__(self, types: tuple[Type, ...] | list[Type] = ()) -> None:
        self.arguments = [Value(t, self) for t in types]
        self.ops: list[Op] = []
        self.same: dict[Value, Value] | None = None

    @property
    def terminator(self) -> Op | None:
        return self.ops[-1] if self.ops and self.ops[-1].name == "yield" else None


class Function:
    """A kernel at one stage.

    stage: "tile" or "lane". arguments: the values of body.arguments, named as the author named them.
    attributes: facts for the whole function, by stage (see docs/ir.md).
    """

    __slots__ = ("attributes", "body", "location", "name", "stage")

    def __init__(self, name: str, stage: str, location: Location | None = None) -> None:
        self.name = name
        self.stage = stage
        self.body = Block()
        self.attributes: dict[str, Any] = {}
        self.location = location

    @property
    def arguments(self) -> list[Value]:
        return self.body.arguments

    def add_argument(self, name: str, type: Type) -> Value:
        value = Value(type, self.body, name)
        self.body.arguments.append(value)
        return value

    def unite(self) -> None:
        """Note which arguments may be one memory, as the attribute in_place says: pairs of their names."""
        by_name = {value.name: value for value in self.arguments}
        same = {value: value for value in self.arguments}
        for pair in self.attributes.get("in_place", ()):
            one, other = (same[by_name[name]] for name in pair)
            same = {value: one if place is other else place for value, place in same.items()}
        self.body.same = same

    def walk(self) -> Iterator[Op]:
        """Every op, in order; what an op holds is looked at when the op has been given out."""
        return _walk(self.body.ops[::-1])

    def count_uses(self) -> Counter[Value]:
        """How often each value is an operand."""
        return Counter(chain.from_iterable(op.operands for op in self.walk()))

    def take_apart(self) -> None:
        """Free what it holds: ops and their results refer to each other, and would wait for the collector."""
        for op in list(self.walk()):
            op.operands.clear()
            op.results.clear()
            for block in op.blocks:
                block.arguments.clear()
                block.ops.clear()
        self.body.ops.clear()

    def tensors(self) -> list[Value]:
        return [a for a in self.arguments if isinstance(a.type, TensorType)]

    def scalars(self) -> list[Value]:
        return [a for a in self.arguments if isinstance(a.type, TileType)]


class Builder:
    """Appends ops to a block. `location` is given to every op made while it is set."""

    __slots__ = ("block", "location")

    def __init__(self, block: Block, location: Location | None = None) -> None:
        self.block = block
        self.location = location

    def add(
        self,
        name: str,
        operands: list[Value],
        types: tuple[Type, ...] | list[Type] = (),
        blocks: Sequence[Block] | None = None,
        **attributes: Any,
    ) -> Op:
        op = Op(name, operands, types, attributes, blocks, self.location)
        self.block.ops.append(op)
        return op

    def value(self, name: str, operands: list[Value], type: Type, **attributes: Any) -> Value:
        """Append an op with one result and return the result."""
        op = Op(name, operands, (type,), attributes, None, self.location)
        self.block.ops.append(op)
        return op.results[0]
