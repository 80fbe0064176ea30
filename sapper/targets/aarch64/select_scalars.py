"""Selection rules of AArch64: 64-bit scalars, their comparisons, jumps on conditions.

See select.py. Flags live only between the instruction that sets them and the next one.
"""

from __future__ import annotations

from typing import Any

from ...ir.nodes import Op, Value
from .rows import bit_mask_code
from .select_common import MIRRORED, Rule, add_number, address, is_sum_immediate, load_immediate

INVERTED = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}


def add_immediate(s: Any, register: Any, number: int) -> None:
    add_number(s, register, register, number)


def add_register(s: Any, register: Any, other: Any) -> None:
    s.emit("add.64", register, register, other)


def subtract_register(s: Any, register: Any, other: Any) -> None:
    s.emit("sub.64", register, register, other)


def subtract_branch(s: Any, register: Any, number: int, label: str) -> None:
    """Take a number off; jump if what remains is above 0."""
    if is_sum_immediate(number):
        s.emit("subs.imm.64", register, register, number)
    else:
        add_number(s, register, register, -number)
        s.emit("cmp.imm.64", register, 0)
    s.branch("b.gt", label)


def jump(s: Any, label: str) -> None:
    s.branch("b", label)


def _compare(s: Any, left: Any, right: Any) -> None:
    """Set the flags by registers, or a register and a number."""
    if not isinstance(right, int):
        s.emit("cmp.64", left, right)
    elif is_sum_immediate(right):
        s.emit("cmp.imm.64", left, right)
    elif is_sum_immediate(-right):
        s.emit("cmn.imm.64", left, -right)
    else:
        other = s.new("gpr")
        load_immediate(s, other, right)
        s.emit("cmp.64", left, other)


def compare_branch(s: Any, condition: str, a: Any, b: Any, label: str) -> None:
    """b: a register, or an immediate."""
    _compare(s, a, getattr(b, "value", b))
    s.branch("b." + condition, label)


def branch_unless(s: Any, value: Value, label: str) -> None:
    """Jump if the condition is 0."""
    number = s.constant_of(value)
    if number is not None:
        if not number:
            s.branch("b", label)
    elif value in s.deferred:
        s.branch("b." + INVERTED[test_condition(s, value)], label)
    else:
        s.branch("cbz.64", label, s.scalar(value))


def test_condition(s: Any, value: Value) -> str:
    """Set the flags by a scalar; the condition under which it is not 0."""
    if value in s.deferred:
        op = value.op
        assert op is not None
        return _FLAG_SETTERS[op.name](s, op)
    _compare(s, s.scalar(value), 0)
    return "ne"


def compare_scalars(s: Any, op: Op) -> str:
    """Set the flags by an s_cmp; its condition."""
    a, b = op.operands
    condition: str = op.attributes["cond"]
    if s.small_constant(a) is not None and s.small_constant(b) is None:
        a, b, condition = b, a, MIRRORED[condition]
    number = s.small_constant(b)
    left = s.scalar(a)
    _compare(s, left, number if number is not None else s.scalar(b))
    return condition


def test_mask(s: Any, op: Op) -> str:
    """Set the flags by mask_any or mask_all: the largest lane of a mask, or the smallest, is not 0."""
    mask = s.vector(op.operands[0])
    found, number = s.new("vec"), s.new("gpr")
    name = "umax" if op.name == "mask_any" else "umin"
    if s.lanes == 4:
        s.emit(f"{name}v.4s", found, mask)
    else:
        s.emit(f"{name}p.2s", found, mask, mask)
    s.emit("fmov.from_s", number, found)
    _compare(s, number, 0)
    return "ne"


_FLAG_SETTERS = {"s_cmp": compare_scalars, "mask_any": test_mask, "mask_all": test_mask}
"""Ops that an `if` or a selection may ask by flags alone."""


def _truth(setter: Any) -> Rule:
    def rule(s: Any, op: Op) -> None:
        s.emit(f"cset.{setter(s, op)}", s.define(op.results[0]))
    return rule


def arg(s: Any, op: Op) -> None:
    s.emit("ldr.64", s.define(op.results[0]), s.memory(s.facts.arguments, disp=8 * op.attributes["slot"]))


def worker(s: Any, op: Op) -> None:
    s.emit("mov.64", s.define(op.results[0]), s.facts.worker)


def workers(s: Any, op: Op) -> None:
    s.emit("mov.64", s.define(op.results[0]), s.facts.workers)


def s_add(s: Any, op: Op) -> None:
    a, b = op.operands
    if s.constant_of(a) is not None:
        a, b = b, a
    number = s.small_constant(b)
    left = s.scalar(a)
    if number is not None:
        add_number(s, s.define(op.results[0]), left, number)
    else:
        right = s.scalar(b)
        s.emit("add.64", s.define(op.results[0]), left, right)


def s_sub(s: Any, op: Op) -> None:
    a, b = op.operands
    number = s.small_constant(b)
    left = s.scalar(a)
    if number is not None:
        add_number(s, s.define(op.results[0]), left, -number)
    else:
        right = s.scalar(b)
        s.emit("sub.64", s.define(op.results[0]), left, right)


def _power(number: int | None) -> int | None:
    """Which power of 2 it is."""
    return number.bit_length() - 1 if number is not None and number > 0 and number & (number - 1) == 0 else None


def _shift(s: Any, name: str, result: Value, a: Value, amount: int) -> None:
    left = s.scalar(a)
    if amount:
        s.emit(f"{name}.imm.64", s.define(result), left, amount)
    else:
        s.emit("mov.64", s.define(result), left)


def s_mul(s: Any, op: Op) -> None:
    a, b = op.operands
    if s.constant_of(a) is not None:
        a, b = b, a
    power = _power(s.constant_of(b))
    if power is not None:
        _shift(s, "lsl", op.results[0], a, power)
        return
    left, right = s.scalar(a), s.scalar(b)
    s.emit("mul.64", s.define(op.results[0]), left, right)


def _scalar_bits(name: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        a, b = op.operands
        if s.constant_of(a) is not None:
            a, b = b, a
        number = s.constant_of(b)
        left = s.scalar(a)
        if number is not None and bit_mask_code(number) is not None:
            s.emit(f"{name}.imm.64", s.define(op.results[0]), left, number)
        else:
            right = s.scalar(b)
            s.emit(f"{name}.64", s.define(op.results[0]), left, right)
    return rule


def _scalar_shift(name: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        a, b = op.operands
        number = s.constant_of(b)
        if number is not None:
            _shift(s, name, op.results[0], a, number & 63)
        else:
            left, right = s.scalar(a), s.scalar(b)
            s.emit(f"{name}.64", s.define(op.results[0]), left, right)
    return rule


def _scalar_choice(condition: str) -> Rule:
    """s_min, s_max: the first operand where the condition holds."""
    def rule(s: Any, op: Op) -> None:
        left, right = (s.scalar(value) for value in op.operands)
        s.emit("cmp.64", left, right)
        s.emit(f"csel.{condition}", s.define(op.results[0]), left, right)
    return rule


def divide_scalars(s: Any, a: Any, b: Any) -> tuple[Any, Any]:
    """Floor division of general registers: fresh registers of quotient and remainder.

    sdiv truncates; where there is a remainder whose sign is not the divisor's, the quotient is one less and the
    remainder one divisor more.
    """
    whole, rest, signs, fix, none = (s.new("gpr") for _ in range(5))
    s.emit("sdiv.64", whole, a, b)
    s.emit("msub.64", rest, whole, b, a)
    s.emit("eor.64", signs, rest, b)
    s.emit("asr.imm.64", fix, signs, 63)
    load_immediate(s, none, 0)
    s.emit("cmp.imm.64", rest, 0)
    less = s.new("gpr")
    s.emit("csel.eq", less, none, fix)
    quotient, more, remainder = (s.new("gpr") for _ in range(3))
    s.emit("add.64", quotient, whole, less)
    s.emit("and.64", more, less, b)
    s.emit("add.64", remainder, rest, more)
    return quotient, remainder


def s_floordiv(s: Any, op: Op) -> None:
    a, b = op.operands
    power = _power(s.constant_of(b))
    if power is not None:
        _shift(s, "asr", op.results[0], a, power)
        return
    quotient, _ = divide_scalars(s, s.scalar(a), s.scalar(b))
    s.emit("mov.64", s.define(op.results[0]), quotient)


def s_mod(s: Any, op: Op) -> None:
    a, b = op.operands
    power = _power(s.constant_of(b))
    if power:
        left = s.scalar(a)
        s.emit("and.imm.64", s.define(op.results[0]), left, (1 << power) - 1)
        return
    if power == 0:
        load_immediate(s, s.define(op.results[0]), 0)
        return
    _, remainder = divide_scalars(s, s.scalar(a), s.scalar(b))
    s.emit("mov.64", s.define(op.results[0]), remainder)


def s_select(s: Any, op: Op) -> None:
    condition, a, b = op.operands
    number = s.constant_of(condition)
    if number is not None:
        s.emit("mov.64", s.define(op.results[0]), s.scalar(a if number else b))
        return
    left, right = s.scalar(a), s.scalar(b)
    code = test_condition(s, condition)
    s.emit(f"csel.{code}", s.define(op.results[0]), left, right)


_LOADS = {"i64": ("ldr.64", 8), "f64": ("ldr.64", 8), "i32": ("ldrsw", 4), "f32": ("ldr.32", 4), "b32": ("ldr.32", 4),
          "i16": ("ldrsh", 2), "f16": ("ldrh", 2), "bf16": ("ldrh", 2), "i8": ("ldrsb", 1), "u8": ("ldrb", 1),
          "bool": ("ldrb", 1)}
_STORES = {8: "str.64", 4: "str.32", 2: "strh", 1: "strb"}


def s_load(s: Any, op: Op) -> None:
    name, size = _LOADS[op.attributes["dtype"].name]
    memory = address(s, op, 0, size)
    s.emit(name, s.define(op.results[0]), memory)


def s_store(s: Any, op: Op) -> None:
    size: int = op.attributes["dtype"].size_bytes
    memory = address(s, op, 1, size)
    s.emit(_STORES[size], memory, s.scalar(op.operands[0]))


RULES: dict[str, Rule] = {
    "arg": arg, "worker": worker, "workers": workers, "s_add": s_add, "s_sub": s_sub, "s_mul": s_mul,
    "s_min": _scalar_choice("lt"), "s_max": _scalar_choice("gt"), "s_and": _scalar_bits("and"),
    "s_or": _scalar_bits("orr"), "s_xor": _scalar_bits("eor"), "s_shl": _scalar_shift("lsl"),
    "s_shr": _scalar_shift("lsr"), "s_sar": _scalar_shift("asr"), "s_floordiv": s_floordiv, "s_mod": s_mod,
    "s_cmp": _truth(compare_scalars), "s_select": s_select, "s_load": s_load, "s_store": s_store,
    "mask_any": _truth(test_mask), "mask_all": _truth(test_mask),
}
