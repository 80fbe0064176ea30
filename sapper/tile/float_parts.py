"""Products of floats by bf16 in loops that hold their results, as in attention -> three products of bf16.

Enters: a canonical tile function. Leaves: where a loop over tiles in order contracts floats with bf16 and carries what
comes of it, the floats as sums of three bf16 (sapper/lane/exact_parts.py), and the contraction as the sum of theirs,
the least first. Products that a walk makes by itself are left alone: these are parted as they are copied.

    %s = contract %x, %k        ->      %s = add (add (contract %c, %k), (contract %b, %k)), (contract %a, %k)
                                        a: x with the lower half of its bits 0; b: what is left so of x - a; c: the rest

Holds: nothing of a float is lost down to 2**-126, and infinities and NaN stay what they are, but where a float meets an
infinite bf16: times a part that is 0 this is no number.
"""

from __future__ import annotations

from ..ir.nodes import Block, Builder, Function, Op, Value
from ..ir.types import DType, TileType, bf16, bool_, f32, i32
from .plan import axes_of

UPPER_HALF = -1 << 16
"""Sign, exponent, and as many places of a float as bf16 has."""


def part_floats(function: Function) -> bool:
    """In place; whether there was any such product."""
    loops = [op for op in function.walk() if op.name == "tiles" and not op.attributes["parallel"] and op.results]
    found = [contractions for loop in loops
             if (contractions := [op for op in loop.walk() if op.name == "contract"])
             and all(map(_is_parted, contractions))]
    if found:
        parts = _Parts(function)
        for op in dict.fromkeys(op for contractions in found for op in contractions):
            parts.replace(op)
    return bool(found)


def _is_parted(op: Op) -> bool:
    return (_tile(op.result).dtype is f32 and sorted(_tile(v).dtype.name for v in op.operands) == ["bf16", "f32"]
            and all(v.op is not None for v in op.operands))


class _Parts:
    """blocks: of each op. parts: of a float."""

    def __init__(self, function: Function) -> None:
        self.body = function.body
        self.blocks: dict[Op, Block] = {}
        self._enter(function.body)
        self.parts: dict[Value, list[Value]] = {}

    def _enter(self, block: Block) -> None:
        for op in block.ops:
            self.blocks[op] = block
            for inner in op.blocks:
                self._enter(inner)

    def replace(self, op: Op) -> None:
        """A contraction, by the sum of those of the parts."""
        side = next(n for n, v in enumerate(op.operands) if _tile(v).dtype is f32)
        made = Builder(Block(), op.location)
        total: Value | None = None
        for part in reversed(self._parts_of(op.operands[side])):
            operands = [part if n == side else v for n, v in enumerate(op.operands)]
            product = made.value("contract", operands, op.result.type, **op.attributes)
            total = product if total is None else made.value("add", [total, product], op.result.type)
        assert total is not None and total.op is not None
        block = self.blocks.pop(op)
        place = block.ops.index(op)
        block.ops[place:place + 1] = made.block.ops
        self.blocks.update(dict.fromkeys(made.block.ops, block))
        total.op.results[0] = op.result     # nothing that uses it has to change
        op.result.move_to(total.op)

    def _parts_of(self, value: Value) -> list[Value]:
        """The greatest first."""
        if value in self.parts:
            return self.parts[value]
        source, axes = value.op, axes_of(value)
        assert source is not None
        floats, integers = TileType(f32, axes), TileType(i32, axes)
        made = Builder(Block(), source.location)

        def cut(one: Value) -> Value:
            bits = made.value("bitcast", [one], integers)
            return made.value("bitcast", [made.value("and", [bits, upper], integers)], floats)

        upper = self._constant(i32, UPPER_HALF)
        first = cut(value)
        rest = made.value("sub", [value, first], floats)
        if not _is_a_weight(value):
            size = made.value("abs", [value], floats)
            infinite = made.value("eq", [size, self._constant(f32, float("inf"))], TileType(bool_, axes))
            rest = made.value("select", [infinite, self._constant(f32, 0.0), rest], floats)
        second = cut(rest)
        last = made.value("sub", [rest, second], floats)
        self.parts[value] = [made.value("cast", [part], TileType(bf16, axes)) for part in (first, second, last)]
        block = self.blocks[source]
        place = block.ops.index(source) + 1
        block.ops[place:place] = made.block.ops
        self.blocks.update(dict.fromkeys(made.block.ops, block))
        return self.parts[value]

    def _constant(self, dtype: DType, number: float) -> Value:
        made = Op("const", [], (TileType(dtype, ()),), {"value": number})
        self.body.ops.insert(0, made)
        return made.result


def _is_a_weight(value: Value) -> bool:
    """Whether a value is a power whose exponent is what a number is below the largest of its kind: not infinite."""
    power = value.op
    below = power.operands[0].op if power is not None and power.name in ("exp", "exp2") else None
    if below is None or below.name != "sub":
        return False
    score, highest = below.operands
    largest = [highest, *(highest.op.operands if highest.op is not None and highest.op.name == "max" else [])]
    return any(v.op is not None and v.op.name == "reduce" and v.op.attributes["kind"] == "max"
               and v.op.operands[0] is score for v in largest)


def _tile(value: Value) -> TileType:
    assert isinstance(value.type, TileType)
    return value.type
