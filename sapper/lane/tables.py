"""Tables of 16 floats in a register, where a lane takes one by the low four bits of an index.

Enters: a lane function, for a target that has `lookup`. Leaves: the same, where a 4-bit integer that becomes a float is
looked up: a shift and a lookup in place of two shifts, or a shift and a mask, and a conversion. So is a float that much
is computed for from such an integer alone, as the e2m1 of MXFP4 is from its code: the table is worked out here. Holds:
the same bits; what is no longer used is left to simplify.py. `pick`, a lookup in a table that the kernel was given, has
an index that need not be cut to the bits that it takes, either.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..ir.nodes import Block, Function, Op, Value
from ..ir.rewriter import Replacement, Rewriter, Rule, RuleSet, rewrite
from ..ir.types import MASK, ROW_F32, ROW_I32, u8
from .arithmetic import Array, pure_function

WORD_BITS, INDEX_BITS = 32, 4
SIGNED = tuple(float(n - 16 if n > 7 else n) for n in range(16))
UNSIGNED = tuple(float(n) for n in range(16))
LARGEST_OFFSET = 1 << 20
"""Of which the floats of a table are exact, and no difference leaves 32 bits."""


def use_tables(function: Function) -> int:
    """Look up, in place, what can be; how often."""
    return rewrite(function, _RULES)


def _constant_of(value: Value) -> int | None:
    op = value.op
    return int(op.attributes["value"]) if op is not None and op.name == "splat_const" else None


def _shift(value: Value, name: str) -> tuple[Value, int] | None:
    """(what is shifted, by how many bits) by a shift of this name whose amount is known."""
    op = value.op
    if op is None or op.name != name or "amount" not in op.attributes:
        return None
    return op.operands[0], int(op.attributes["amount"])


def _nibble(op: Op, build: Rewriter) -> Replacement:
    """(x << 28 - s >> 28) as a float, or (x >> s & 15), or that less a number: by a table of -8 to 7, or of 0 to 15, or
    of these less it."""
    if op.results[0].type != ROW_F32 or op.operands[0].type != ROW_I32:
        return None
    integer = op.operands[0]
    high = _shift(integer, "sar")
    if high is not None and high[1] == WORD_BITS - INDEX_BITS:
        before = _shift(high[0], "shl") or (high[0], 0)
        source, amount, table = before[0], WORD_BITS - INDEX_BITS - before[1], SIGNED
        if amount < 0:
            return None
        if amount:
            source = build.build("shr", [source], ROW_I32, amount=amount)
    else:
        integer, offset = _less(integer)
        found = _masked(integer, 1 << INDEX_BITS)
        if found is None or abs(offset) > LARGEST_OFFSET:
            return None
        source, table = found, tuple(number - offset for number in UNSIGNED)
    return [build.build("lookup", [source], ROW_F32, table=table)]


def _less(value: Value) -> tuple[Value, int]:
    """x and c, if a row is x - c; else itself and 0."""
    op = value.op
    offset = _constant_of(op.operands[1]) if op is not None and op.name == "sub" else None
    return (value, 0) if op is None or offset is None else (op.operands[0], offset)


def _masked(value: Value, size: int) -> Value | None:
    """What a value was before all but its low bits, those of a place in a table of `size`, were cut off."""
    op = value.op
    if op is None or op.name != "and":
        return None
    for kept, other in (op.operands, op.operands[::-1]):
        if _constant_of(other) == size - 1:
            return kept
    return None


def _index(op: Op, build: Rewriter) -> Replacement:
    """pick(row, i & lanes - 1) is pick(row, i)."""
    found = _masked(op.operands[1], build.function.attributes["lanes"])
    return None if found is None else [build.build("pick", [op.operands[0], found], op.results[0].type)]


_RULES = RuleSet([
    Rule("nibble-to-float", ("cvt",), _nibble),
    Rule("index-of-pick", ("pick",), _index),
])


# Functions of four bits.

_FUNCTIONS = frozenset({
    "add", "sub", "mul", "min", "max", "neg", "abs", "and", "or", "xor", "not", "shl", "shr", "sar", "cmp", "select",
    "mask_and", "mask_or", "mask_xor", "mask_not", "bitcast", "cvt", "fma",
})


def tabulate(function: Function, least: int) -> int:
    """Look up, in place, what at least so many ops compute from a 4-bit integer and constants; how often."""
    functions, count = _Functions(), 0
    users: dict[Value, list[Op]] = {}
    for op in function.walk():
        for value in op.operands:
            users.setdefault(value, []).append(op)
    for block in list(_blocks(function.body)):
        for place, op in enumerate(block.ops):
            source = functions.source(op.results[0]) if [v.type for v in op.results] == [ROW_F32] else None
            if source is None or source is op.results[0]:
                continue
            value = op.results[0]
            if all(user.results and functions.source(user.results[0]) is source for user in users.get(value, ())):
                continue    # a part of such a function, or of no use
            behind = functions.behind(value, source)
            computed = sum(made.name != "splat_const" for made in behind)
            table = functions.table(behind, source) if computed >= least else None
            if table is not None:
                made = Op("lookup", [_masked(source, 1 << INDEX_BITS) or source], [ROW_F32], {"table": table}, None,
                          op.location)
                made.results[0] = value     # the value stays, so nothing that uses it has to change
                value.move_to(made)
                block.ops[place] = made
                count += 1
    return count


def _blocks(block: Block) -> Iterator[Block]:
    yield block
    for op in block.ops:
        for inner in op.blocks:
            yield from _blocks(inner)


class _Functions:
    """Which values are functions of one integer of four bits."""

    def __init__(self) -> None:
        self.sources: dict[Value, Value | None] = {}
        self.bounds: dict[Value, int | None] = {}

    def source(self, value: Value) -> Value | None:
        """The 4-bit integer that a value is computed from, with constants; itself, if it is one made of something
        else; else None."""
        if value not in self.sources:
            op = value.op
            made = op is not None and op.name in _FUNCTIONS and value.type in (ROW_F32, ROW_I32, MASK)
            found: set[Value | None] = set()
            for operand in op.operands if op is not None and made else ():
                if operand.op is None or operand.op.name != "splat_const":
                    found.add(self.source(operand))
            if len(found) == 1 and None not in found:
                (self.sources[value],) = found
            else:
                bound = self.bound(value) if value.type == ROW_I32 else None
                self.sources[value] = value if bound is not None and bound < 1 << INDEX_BITS and (
                    _constant_of(value) is None) else None
        return self.sources[value]

    def bound(self, value: Value) -> int | None:
        """What an integer that is never negative is at most, if that is plain."""
        if value not in self.bounds:
            op, most = value.op, None
            inner = [self.bound(v) if v.type == ROW_I32 else None for v in op.operands] if op is not None else []
            known = [bound for bound in inner if bound is not None]
            if op is None:
                pass
            elif op.name == "splat_const":
                number = _constant_of(value)
                most = number if number is not None and number >= 0 else None
            elif op.name in ("load", "load_splat") and op.attributes["dtype"] is u8:
                most = 255
            elif op.name == "and" and known:
                most = min(known)
            elif op.name == "select" and len(known) == 2:
                most = max(known)
            elif op.name == "pick":
                most = inner[0]
            elif op.name in ("shr", "sar") and "amount" in op.attributes and known:
                most = known[0] >> op.attributes["amount"]
            self.bounds[value] = most
        return self.bounds[value]

    def behind(self, value: Value, source: Value) -> list[Op]:
        """The ops between, constants among them, what others read first."""
        found: dict[Op, None] = {}

        def visit(v: Value) -> None:
            if v is not source and v.op is not None and v.op not in found:
                for operand in v.op.operands:
                    visit(operand)
                found[v.op] = None

        visit(value)
        return list(found)

    @staticmethod
    def table(ops: list[Op], source: Value) -> tuple[float, ...] | None:
        """What the last of the ops gives for each integer; None where that is no number."""
        lanes = 1 << INDEX_BITS
        known: dict[Value, Array] = {source: np.arange(lanes, dtype=np.int32)}
        with np.errstate(all="ignore"):
            for op in ops:
                function = pure_function(op, lanes)
                if function is None:
                    return None
                known[op.result] = function(*(known[v] for v in op.operands))
        row = known[ops[-1].result]
        return tuple(map(float, row)) if np.isfinite(row).all() else None
