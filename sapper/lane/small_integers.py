"""Integers of few bits as floats by their bits, where an instruction that converts is slow.

Enters: a lane function. Leaves: the same, in which

    cvt (((word >> shift) & mask) + number)    is    fma (bits, 2**-shift, number - 2**(23 - shift))

where `bits` are those of 2**23 + ((word & mask << shift)), which an `or` makes: 2**23 has 1 as its last place. A shift
that leads past the 23 bits of f32's fraction is done by 16 first, once for all elements there. The number may be added
later, as a float.
Holds: results are the same, all exact: what is subtracted from 2**23 + n is an integer less than 2**23.

A weight of 4 bits then takes an `and` with an `or`, which are one operation (lop3), and a multiply-add, in place of a
shift, an `and`, an addition and a conversion, of which an SM starts a quarter as many (`slow_conversions`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import ROW_F32, ROW_I32, RowType, u8

FRACTION = 23
MAGIC = 0x4B000000
"""The bits of 2**23 in f32."""
ALL_BITS = 0xFFFFFFFF
FAR = 16
"""What is shifted before."""


@dataclass(frozen=True, slots=True)
class Small:
    """((word >> shift) & mask) + number. A byte that is shifted needs no mask."""

    word: Value
    shift: int
    mask: int
    number: int


def convert_by_bits(function: Function) -> int:
    """In place; how many conversions are none now."""
    return _convert(function.body)


def _convert(block: Block) -> int:
    count = sum(_convert(inner) for op in block.ops for inner in op.blocks)
    ops: list[Op] = []
    made: dict[Value, Small] = {}
    for op in block.ops:
        found = small(op.operands[0]) if op.name == "cvt" and op.result.type == ROW_F32 else _moved(op, made)
        if found is None:
            ops.append(op)
            continue
        count += op.name == "cvt"
        made[op.result] = found
        _write(op, found, ops)
    block.ops = ops
    return count


def _moved(op: Op, made: Mapping[Value, Small]) -> Small | None:
    """What a sum, or difference, of a small integer that is a float already and a number is."""
    if op.name not in ("add", "sub") or op.result.type != ROW_F32 or op.operands[0] not in made:
        return None
    number = op.operands[1].op
    if number is None or number.name != "splat_const" or not float(number.attributes["value"]).is_integer():
        return None
    before, more = made[op.operands[0]], int(number.attributes["value"])
    total = before.number + more if op.name == "add" else before.number - more
    return replace(before, number=total) if abs(total) < 1 << FRACTION - 1 else None


def constant_of(value: Value) -> int | None:
    op = value.op
    known = op is not None and op.name == "splat_const" and value.type == ROW_I32
    return int(op.attributes["value"]) if op is not None and known else None


def small(value: Value) -> Small | None:
    """What an integer is, if it is made of few bits of a word by more than taking a byte."""
    number, op = 0, value.op
    while op is not None and op.name in ("add", "sub") and value.type == ROW_I32:
        more = constant_of(op.operands[1])
        if more is None:
            break
        number += more if op.name == "add" else -more
        value = op.operands[0]
        op = value.op
    if value.type != ROW_I32 or op is None or abs(number) >= 1 << FRACTION - 1:
        return None
    shift, mask = 0, ALL_BITS
    if op.name == "and":
        masked = constant_of(op.operands[1])
        if masked is None or masked <= 0 or masked & (masked + 1):
            return None
        mask, value = masked, op.operands[0]
        op = value.op
    while op is not None and op.name in ("shr", "sar"):
        amount = op.attributes["amount"] if len(op.operands) == 1 else constant_of(op.operands[1])
        if amount is None or (mask != ALL_BITS and shift + amount + mask.bit_length() > 32):
            break       # a sign might be among the bits
        shift, value = shift + amount, op.operands[0]
        op = value.op
    if op is not None and op.name == "unpack" and op.attributes["dtype"] is u8:
        mask &= 0xFF >> shift
        shift, value = shift + 8 * op.attributes["place"], op.operands[0]
    if mask == ALL_BITS or (mask == 0xFF and shift % 8 == 0 and not number):
        return None     # conversions may take a byte of a word as it is
    least = shift if shift + mask.bit_length() <= FRACTION else shift - FAR
    fits = mask > 0 and least >= 0 and least + mask.bit_length() <= FRACTION
    return Small(value, shift, mask, number) if fits else None


def _write(op: Op, found: Small, ops: list[Op]) -> None:
    def emit(name: str, operands: list[Value], type: RowType, **attributes: object) -> Value:
        ops.append(Op(name, operands, (type,), attributes, None, op.location))
        return ops[-1].result

    def number(value: float | int, type: RowType) -> Value:
        return emit("splat_const", [], type, value=value)

    word, shift = found.word, found.shift
    if word.type != ROW_I32:
        word = emit("bitcast", [word], ROW_I32)
    if shift + found.mask.bit_length() > FRACTION:
        word, shift = emit("shr", [word], ROW_I32, amount=FAR), shift - FAR
    bits = emit("and", [word, number(found.mask << shift, ROW_I32)], ROW_I32)
    bits = emit("bitcast", [emit("or", [bits, number(MAGIC, ROW_I32)], ROW_I32)], ROW_F32)
    less = number(found.number - 2.0 ** (FRACTION - shift), ROW_F32)
    if shift:
        emit("fma", [bits, number(2.0 ** -shift, ROW_F32), less], ROW_F32)
    else:
        emit("add", [bits, less], ROW_F32)
    last = ops[-1]
    last.results = op.results
    op.result.move_to(last)
