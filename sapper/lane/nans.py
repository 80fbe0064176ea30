"""Whether a NaN of a lane function can be carried to infinity, or past it, where its upper half is rounded to bf16.

Enters: a lane function. Leaves: whether none of its f32 rows ever holds a NaN that has one of its lower 16 bits set.
Then adding up to 0x8000 to the bits, as rounding to nearest even does, changes no upper half of a NaN.

What holds: an operation gives one of its operands that are NaN, made quiet, or the NaN that has no lower bits at all
(IEEE 754, 6.2.3, and every target so far). So it comes down to where rows come from: bf16 and integers have no such
NaN, f32 of a tensor may. Memory that is no tensor holds what the function itself has put there. Of a scalar that is
passed, as the epsilon of a norm, the lower bits of a NaN are cut off once for a call (`shorten_scalars`), where nothing
else is in the way.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..ir.nodes import Function, Op, Value
from ..ir.types import ROW_F32, ROW_I32, S64, RowType, bf16
from .ops import SHORT

_CARRIES = frozenset({
    "add", "sub", "mul", "div", "fma", "min", "max", "neg", "abs", "sqrt", "round", "floor", "ceil", "trunc", "select",
    "shuffle_xor", "broadcast_lane", "exchange", "unzip", "zip", "pick", "fma2_bf16", "splat_const", "round_to", "loop",
    "if", "scale_exponent", "fraction", "copy_sign", "lookup",
})
"""Ops whose results are NaN only by their operands, or are the NaN without lower bits. (Tables have no other.)"""

_LOADS = frozenset({"load", "load_splat", "gather"})
LOW_BITS = 16
QUIET, INFINITY, MAGNITUDE = 0x400000, 0x7F800000, 0x7FFFFFFF
"""Bits of f32: of a quiet NaN, those of infinity, and all but the sign."""
FIRST_SLOT = 3
"""Of the words of a call: what is passed, behind where scratch memory lies."""


def shorten_scalars(function: Function) -> int:
    """In place: how many scalars of f32 that are passed lose the lower bits of a NaN, so that rounding to bf16 need not
    look for any."""
    if not any(_rounds(op) for op in function.walk()) or short_nans(function):
        return 0
    slots = function.attributes["slots"]

    def scalar(op: Op) -> Op | None:
        """The word of which a row is the splat."""
        splat = op.operands[0].op if op.name == "bitcast" and op.result.type == ROW_F32 else None
        word = splat.operands[0].op if splat is not None and splat.name == "splat" else None
        passed = word is not None and word.name == "arg" and word.attributes["slot"] >= FIRST_SLOT and (
            slots[word.attributes["slot"] - FIRST_SLOT].startswith("scalar."))
        return word if passed else None

    rows = {op: word for op in function.walk() if (word := scalar(op)) is not None}
    if not rows or not short_nans(function, frozenset(rows)):
        return 0
    made: dict[Op, Value] = {}
    ops: list[Op] = []
    for op in function.body.ops:
        ops.append(op)
        if op in rows.values():
            made[op] = _shortened(op, ops)
    if len(made) < len(set(rows.values())):
        return 0    # of a part that several workers share
    function.body.ops = ops
    for op, word in rows.items():
        op.operands[0] = made[word]
    return len(made)


def _rounds(op: Op) -> bool:
    return op.attributes.get("dtype") is bf16 and (
        op.name in ("round_to", "pack2") or (op.name == "store" and not op.attributes.get("exact")))


def _shortened(word: Op, ops: list[Op]) -> Value:
    """A splat of a word of f32 whose NaN is quiet and has no lower bits."""

    def emit(name: str, *operands: Value, **attributes: object) -> Value:
        ops.append(Op(name, list(operands), (S64,), attributes, None, word.location))
        return ops[-1].result

    def number(value: int) -> Value:
        return emit("s_const", value=value)

    bits = word.result
    is_nan = emit("s_cmp", emit("s_and", bits, number(MAGNITUDE)), number(INFINITY), cond="gt")
    short = emit("s_or", emit("s_and", bits, number(-1 << LOW_BITS)), number(QUIET))
    ops.append(Op("splat", [emit("s_select", is_nan, short, bits)], (ROW_I32,), {SHORT: True}, None, word.location))
    return ops[-1].result


def short_nans(function: Function, passed: frozenset[Op] = frozenset()) -> bool:
    """passed: rows that will be."""
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
        elif op not in passed and (op.name != "bitcast" or not _has_no_low_bits(op.operands[0])):
            return False
    return True


def _has_no_low_bits(value: Value) -> bool:
    """Whether the lower half of an integer row is 0, if as f32 it is NaN."""
    op = value.op
    if op is None:
        return False
    if op.name == "splat":
        return SHORT in op.attributes
    if op.name == "bitcast":
        return op.operands[0].type != ROW_F32 and _has_no_low_bits(op.operands[0])
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
