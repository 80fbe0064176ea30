"""Arithmetic of 16 bits on two elements at once, where their pairs are wanted anyway.

Enters: a lane function for a target that computes with pairs of f16 and bf16. Leaves: the same, in which

    pack2 (mul (a, b), mul (c, d))    is    mul2 (pack2 (a, c), pack2 (b, d))

where all of a, b, c and d are numbers of the type that is packed, and so for sums and differences, whose operands may
be such results again. Holds: results are the same, as f32 keeps more than twice the digits of either type, so that
rounding its result is rounding the exact one; but for bf16 below 2**-126, where f32 has lost digits of a product.

A weight of 4 bits times a scale of f16 takes a product for two, and no way to f32 and back.
"""

from __future__ import annotations

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import ROW_B32, ROW_F32, DType
from .small_integers import small

PAIRED = {"add": "add2", "sub": "sub2", "mul": "mul2"}
DIGITS = {"f16": 11, "bf16": 8}
READS = frozenset({"load", "load_splat", "gather", "unpack"})


def compute_pairs(function: Function) -> int:
    """In place; how many ops on pairs there are."""
    return _compute(function.body)


def _compute(block: Block) -> int:
    count = sum(_compute(inner) for op in block.ops for inner in op.blocks)
    writer = _Writer()
    for op in block.ops:
        if op.name == "pack2" and op.attributes["dtype"].name in DIGITS:
            writer.write(op)
        else:
            writer.ops.append(op)
    block.ops = writer.ops
    return count + writer.count


class _Writer:
    """ops: of a block. count: how many of them are on pairs. packed: what was packed in the block before."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.count = 0
        self.packed: dict[tuple[Value, Value, DType], Value] = {}

    def write(self, op: Op) -> None:
        """The pair that an op packs, by arithmetic on pairs where that serves."""
        first, second = op.operands
        made = self._computed(first, second, op)
        if made is None:
            self.ops.append(op)
            return
        last = made.op
        assert last is not None
        last.results = op.results
        op.result.move_to(last)

    def _computed(self, first: Value, second: Value, at: Op) -> Value | None:
        dtype = at.attributes["dtype"]
        a, b = (unrounded(v, dtype).op for v in (first, second))
        if a is None or b is None or a.name != b.name or a.name not in PAIRED or a.result.type != ROW_F32 or not all(
                is_narrow(v, dtype) for v in (*a.operands, *b.operands)):
            return None
        pairs = [self._pair(one, other, at) for one, other in zip(a.operands, b.operands, strict=True)]
        self.count += 1
        self.ops.append(Op(PAIRED[a.name], pairs, (ROW_B32,), {"dtype": dtype}, None, at.location))
        return self.ops[-1].result

    def _pair(self, first: Value, second: Value, at: Op) -> Value:
        dtype = at.attributes["dtype"]
        key = first, second, dtype
        if key not in self.packed:
            made = self._computed(first, second, at) if _is_rounded(first) and _is_rounded(second) else None
            if made is None:
                rows = [unrounded(v, dtype) for v in (first, second)]
                self.ops.append(Op("pack2", rows, (ROW_B32,), {"dtype": dtype}, None, at.location))
                made = self.ops[-1].result
            self.packed[key] = made
        return self.packed[key]


def _is_rounded(value: Value) -> bool:
    return value.op is not None and value.op.name == "round_to"


def unrounded(value: Value, dtype: DType) -> Value:
    """A row that packing rounds as well."""
    op = value.op
    return op.operands[0] if op is not None and op.name == "round_to" and op.attributes["dtype"] is dtype else value


def is_narrow(value: Value, dtype: DType) -> bool:
    """Whether a row holds numbers of a type for sure."""
    op = value.op
    if op is None:
        return False
    if op.name == "round_to" or op.name in READS:
        return op.attributes["dtype"] is dtype
    if op.name != "cvt":
        return False
    found = small(op.operands[0])
    return found is not None and max(abs(found.number), found.mask + abs(found.number)) <= 1 << DIGITS[dtype.name]
