"""Whether a NaN of a lane function can be carried to infinity, or past it, where its upper half is rounded to bf16.

Enters: a lane function. Leaves: whether none of its f32 rows ever holds a NaN that has one of its lower 16 bits set.
Then adding up to 0x8000 to the bits, as rounding to nearest even does, changes no upper half of a NaN.

What holds: an operation gives one of its operands that are NaN, made quiet, or the NaN that has no lower bits at all
(IEEE 754, 6.2.3, and every target so far). So it comes down to where rows come from: bf16 and integers have no such
NaN, f32 of a tensor may. Memory that is no tensor holds what the function itself has put there.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..ir.nodes import Function, Op, Value
from ..ir.types import ROW_F32, RowType, bf16

_CARRIES = frozenset({
    "add", "sub", "mul", "div", "fma", "min", "max", "neg", "abs", "sqrt", "round", "floor", "ceil", "trunc", "select",
    "shuffle_xor", "broadcast_lane", "exchange", "unzip", "zip", "pick", "fma2_bf16", "splat_const", "round_to", "loop",
    "if", "scale_exponent", "fraction", "copy_sign", "lookup",
})
"""Ops whose results are NaN only by their operands, or are the NaN without lower bits. (Tables have no other.)"""

_LOADS = frozenset({"load", "load_splat", "gather"})
LOW_BITS = 16
FIRST_SLOT = 3
"""Of the words of a call: what is passed, behind where scratch memory lies."""


def short_nans(function: Function) -> bool:
    tensors: set[Value] | None = None
    for op in function.walk():
        if not any(result.type == ROW_F32 for result in op.results) or op.name in _CARRIES:
            continue
        if op.name in _LOADS and op.attributes["dtype"].bits > bf16.bits:
            if tensors is None:
                tensors = _tensor_addresses(function)
            if not tensors.isdisjoint(op.operands):
                return False
        elif op.name in _LOADS:
            if op.attributes["dtype"].is_float and op.attributes["dtype"] is not bf16:
                return False    # f16 has two bits too many; of fp8 this does not ask
        elif op.name == "cvt":
            source = op.operands[0].type
            if not isinstance(source, RowType) or source.dtype.is_float:
                return False
        elif op.name != "bitcast" or not _has_no_low_bits(op.operands[0]):
            return False
    return True


def _has_no_low_bits(value: Value) -> bool:
    """Whether the lower half of an integer row is 0."""
    op = value.op
    if op is None:
        return False
    if op.name == "splat_const":
        number: int = op.attributes["value"]
        return number % (1 << LOW_BITS) == 0
    return (op.name == "shl" and op.attributes.get("amount", 0) >= LOW_BITS) or (
        op.name == "and" and any(_has_no_low_bits(v) for v in op.operands))


def _tensor_addresses(function: Function) -> set[Value]:
    """Scalars that come of a tensor's address, on any way."""
    slots = function.attributes["slots"]
    ops = list(function.walk())
    found = {op.result for op in ops if op.name == "arg" and op.attributes["slot"] >= FIRST_SLOT
             and slots[op.attributes["slot"] - FIRST_SLOT].endswith(".data")}
    before = 0
    while before != len(found):
        before = len(found)
        for op in ops:
            for source, target in _flows(op):
                if source in found:
                    found.add(target)
    return found


def _flows(op: Op) -> Iterator[tuple[Value, Value]]:
    """Which value another one may come of."""
    if not op.blocks:
        yield from ((value, result) for value in op.operands for result in op.results)
        return
    for block in op.blocks:
        if op.name == "loop":
            start, _, *carried = op.operands
            yield from zip((start, *carried), block.arguments, strict=True)
        if op.results:
            given = block.ops[-1].operands
            yield from zip(given, op.results, strict=True)
            if op.name == "loop":
                yield from zip(given, block.arguments[1:], strict=True)
                yield from zip(op.operands[2:], op.results, strict=True)
