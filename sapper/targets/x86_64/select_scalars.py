"""Selection rules of x86-64: 64-bit scalars, their comparisons, jumps on conditions.

See select.py. Flags live only between the instruction that sets them and the next one.
Source: Intel SDM volume 2; the manual's operand order throughout.
"""

from __future__ import annotations

from typing import Any

from ...ir.nodes import Op, Value
from .registers import RAX, RDX
from .select_common import MIRRORED, Key, OwnConstants, Rule

_BUT_SIGNS: Key = ("s", 4, 0x7FFF7FFF)
"""All bits of two bf16 but their signs."""

CODES = {"eq": "e", "ne": "ne", "lt": "l", "le": "le", "gt": "g", "ge": "ge"}
INVERTED_CODES = {"e": "ne", "ne": "e", "l": "ge", "ge": "l", "g": "le", "le": "g", "b": "ae", "ae": "b"}


def add_immediate(s: Any, register: Any, number: int) -> None:
    s.emit("add.64", register, number)


def add_register(s: Any, register: Any, other: Any) -> None:
    s.emit("add.64", register, other)


def subtract_branch(s: Any, register: Any, number: int, label: str) -> None:
    """Take a number off; jump if what remains is above 0."""
    s.emit("sub.64", register, number)
    s.branch("jg", label)


def subtract_register(s: Any, register: Any, other: Any) -> None:
    s.emit("sub.64", register, other)


def jump(s: Any, label: str) -> None:
    s.branch("jmp", label)


def compare_branch(s: Any, condition: str, a: Any, b: Any, label: str) -> None:
    s.emit("cmp.64", a, b)
    s.branch("j" + CODES[condition], label)


def branch_unless(s: Any, value: Value, label: str) -> None:
    """Jump if the condition is 0."""
    number = s.constant_of(value)
    if number is not None:
        if not number:
            s.branch("jmp", label)
        return
    s.branch("j" + INVERTED_CODES[test_condition(s, value)], label)


def test_condition(s: Any, value: Value) -> str:
    """Set the flags by a scalar; the condition code under which it is not 0."""
    if value in s.deferred:
        op = value.op
        assert op is not None
        return _FLAG_SETTERS[op.name](s, op)
    register = s.scalar(value)
    s.emit("test.64", register, register)
    return "ne"


def compare_scalars(s: Any, op: Op) -> str:
    """Set the flags by an s_cmp; its condition code."""
    a, b = op.operands
    condition = op.attributes["cond"]
    if s.small_constant(a) is not None and s.small_constant(b) is None:
        a, b, condition = b, a, MIRRORED[condition]
    number = s.small_constant(b)
    left = s.scalar(a)
    if number == 0:
        s.emit("test.64", left, left)
    else:
        s.emit("cmp.64", left, number if number is not None else s.scalar(b))
    return CODES[condition]


def test_mask(s: Any, op: Op) -> str:
    """Set the flags by mask_any or mask_all; the condition code under which it holds."""
    mask = s.vector(op.operands[0])
    every = op.name == "mask_all"
    lanes = s.lanes
    if s.facts.opmask:
        if not every:
            s.emit("kortestw", mask, mask)
            return "ne"
        if lanes in (8, 16):
            s.emit("kortestw" if lanes == 16 else "kortestb", mask, mask)
            return "b"
        bits = s.new("gpr")
        s.emit("kmovw.from_mask", bits, mask)
    else:
        bits = s.new("gpr")
        s.emit(f"vmovmskps.{s.facts.bits4}", bits, mask)
        if not every:
            s.emit("test.32", bits, bits)
            return "ne"
    s.emit("cmp.32", bits, (1 << lanes) - 1)
    return "e"


def test_zero_bf16(s: Any, op: Op) -> str:
    """Set the flags by any_zero_bf16; the condition code under which it holds. The sign bits do not count."""
    bits = s.constant(_BUT_SIGNS)
    found = None
    for value in op.operands:
        zero = s.new("mask")
        s.emit(f"vptestnmw.{s.facts.bits4}", zero, s.vector(value), bits)
        if found is not None:
            both = s.new("mask")
            s.emit("kord", both, found, zero)
            zero = both
        found = zero
    s.emit("kortestd", found, found)
    return "ne"


_FLAG_SETTERS = {"s_cmp": compare_scalars, "mask_any": test_mask, "mask_all": test_mask,
                 "any_zero_bf16": test_zero_bf16}
"""Ops that an `if` or a selection may ask by flags alone."""


def arg(s: Any, op: Op) -> None:
    s.emit("mov.64", s.define(op.results[0]), s.memory(s.facts.arguments, disp=8 * op.attributes["slot"]))


def worker(s: Any, op: Op) -> None:
    s.emit("mov.64", s.define(op.results[0]), s.facts.worker)


def workers(s: Any, op: Op) -> None:
    s.emit("mov.64", s.define(op.results[0]), s.facts.workers)


def s_add(s: Any, op: Op) -> None:
    a, b = op.operands
    result = op.results[0]
    if s.constant_of(a) is not None:
        a, b = b, a
    number = s.small_constant(b)
    left = s.scalar(a)
    if number is not None:
        register, place = s.tie(result, (a,))
        if place == 0:
            s.emit("add.64", register, number)
        else:
            s.emit("lea.64", register, s.memory(left, disp=number))
        return
    right = s.scalar(b)
    register, place = s.tie(result, (a, b))
    if place >= 0:
        s.emit("add.64", register, right if place == 0 else left)
    else:
        s.emit("lea.64", register, s.memory(left, right))


def s_sub(s: Any, op: Op) -> None:
    a, b = op.operands
    result = op.results[0]
    number = s.small_constant(b)
    if number is not None and -number < 2**31:
        left = s.scalar(a)
        register, place = s.tie(result, (a,))
        if place == 0:
            s.emit("sub.64", register, number)
        else:
            s.emit("lea.64", register, s.memory(left, disp=-number))
        return
    _two_address(s, "sub.64", op, False)


def _two_address(s: Any, name: str, op: Op, commutative: bool) -> None:
    """result = a op b where the instruction overwrites a; b may be an immediate."""
    a, b = op.operands
    if commutative and s.constant_of(a) is not None:
        a, b = b, a
    number = s.small_constant(b)
    left = s.scalar(a)
    right = number if number is not None else s.scalar(b)
    register, place = s.tie(op.results[0], (a, b) if commutative and number is None else (a,))
    if place == 0:
        s.emit(name, register, right)
    elif place == 1:
        s.emit(name, register, left)
    elif register is right and register is not left:
        spare = s.new("gpr")
        s.emit("mov.64", spare, left)
        s.emit(name, spare, right)
        s.emit("mov.64", register, spare)
    else:
        if register is not left:
            s.emit("mov.64", register, left)
        s.emit(name, register, right)


def s_mul(s: Any, op: Op) -> None:
    a, b = op.operands
    result = op.results[0]
    if s.constant_of(a) is not None:
        a, b = b, a
    number = s.small_constant(b)
    if number is None:
        _two_address(s, "imul.64", op, True)
        return
    left = s.scalar(a)
    if number > 0 and number & (number - 1) == 0:
        _shift_by(s, "shl", result, a, number.bit_length() - 1)
    elif number in (3, 5, 9):
        s.emit("lea.64", s.define(result), s.memory(left, left, number - 1))
    else:
        s.emit("imul.imm.64", s.define(result), left, number)


def _shift_by(s: Any, name: str, result: Value, a: Value, amount: int) -> None:
    left = s.scalar(a)
    register, place = s.tie(result, (a,))
    if place < 0:
        if name == "shl" and 0 < amount <= 3:
            s.emit("lea.64", register, s.memory(None, left, 1 << amount) if amount > 1 else s.memory(left, left))
            return
        if register is not left:
            s.emit("mov.64", register, left)
    if amount:
        s.emit(f"{name}.imm.64", register, amount)


def _scalar_shift(name: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        a, b = op.operands
        number = s.constant_of(b)
        if number is not None:
            _shift_by(s, name, op.results[0], a, number & 63)
        else:
            left, right = s.scalar(a), s.scalar(b)
            s.emit(f"{name}x.64", s.define(op.results[0]), left, right)
    return rule


def _scalar_bits(name: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        _two_address(s, f"{name}.64", op, True)
    return rule


def _scalar_choice(code: str) -> Rule:
    """s_min, s_max: the operand for which `other code kept` moves over the kept one."""
    def rule(s: Any, op: Op) -> None:
        a, b = op.operands
        if s.constant_of(a) is not None:
            a, b = b, a
        left, right = s.scalar(a), s.scalar(b)
        register, place = s.tie(op.results[0], (a, b))
        if place == 1:
            left, right = right, left
        if place < 0:
            s.emit("mov.64", register, left)
        s.emit("cmp.64", right, register)
        s.emit(f"cmov{code}.64", register, right)
    return rule


def divide_scalars(s: Any, a: Any, b: Any, number: int | None) -> tuple[Any, Any]:
    """Floor division of general registers: fresh registers of quotient and remainder.

    idiv truncates; where there is a remainder whose sign is not the divisor's, the quotient is one less and the
    remainder one divisor more. number: the divisor, if it is a constant.
    """
    rax, rdx = s.physical("gpr", RAX), s.physical("gpr", RDX)
    quotient, remainder, fix = s.new("gpr"), s.new("gpr"), s.new("gpr")
    s.emit("mov.64", rax, a)
    s.emit("cqo")
    s.emit("idiv.64", b)
    s.emit("mov.64", quotient, rax)
    s.emit("mov.64", remainder, rdx)
    s.emit("mov.64", fix, remainder)
    if number is None:
        s.emit("xor.64", fix, b)
        s.emit("sar.imm.64", fix, 63)
        s.emit("test.64", remainder, remainder)
        s.emit("cmove.64", fix, remainder)
    else:
        if number < 0:
            s.emit("neg.64", fix)
        s.emit("sar.imm.64", fix, 63)
    s.emit("add.64", quotient, fix)
    s.emit("and.64", fix, b)
    s.emit("add.64", remainder, fix)
    return quotient, remainder


def s_floordiv(s: Any, op: Op) -> None:
    a, b = op.operands
    number = s.constant_of(b)
    if number is not None and number > 0 and number & (number - 1) == 0:
        _shift_by(s, "sar", op.results[0], a, number.bit_length() - 1)
        return
    quotient, _ = divide_scalars(s, s.scalar(a), s.scalar(b), number)
    s.emit("mov.64", s.define(op.results[0]), quotient)


def s_mod(s: Any, op: Op) -> None:
    a, b = op.operands
    number = s.constant_of(b)
    if number is not None and 0 < number <= 2**31 and number & (number - 1) == 0:
        left = s.scalar(a)
        register, place = s.tie(op.results[0], (a,))
        if place < 0 and register is not left:
            s.emit("mov.64", register, left)
        s.emit("and.64", register, number - 1)
        return
    _, remainder = divide_scalars(s, s.scalar(a), s.scalar(b), number)
    s.emit("mov.64", s.define(op.results[0]), remainder)


def _set_by(s: Any, op: Op, code: str) -> None:
    low = s.new("gpr")
    s.emit(f"set{code}", low)
    s.emit("movzx.8.32", s.define(op.results[0]), low)


def s_cmp(s: Any, op: Op) -> None:
    _set_by(s, op, compare_scalars(s, op))


def _mask_test(s: Any, op: Op) -> None:
    _set_by(s, op, test_mask(s, op))


def _zero_test(s: Any, op: Op) -> None:
    _set_by(s, op, test_zero_bf16(s, op))


def s_select(s: Any, op: Op) -> None:
    condition, a, b = op.operands
    number = s.constant_of(condition)
    if number is not None:
        s.emit("mov.64", s.define(op.results[0]), s.scalar(a if number else b))
        return
    left, right = s.scalar(a), s.scalar(b)
    code = test_condition(s, condition)
    # Moves leave the flags alone, so the result's register may even be one that was compared.
    register, place = s.tie(op.results[0], (b, a))
    if place == 0:
        s.emit(f"cmov{code}.64", register, left)
    elif place == 1:
        s.emit(f"cmov{INVERTED_CODES[code]}.64", register, right)
    else:
        s.emit("mov.64", register, right)
        s.emit(f"cmov{code}.64", register, left)


SCALAR_LOADS = {"i64": "mov.64", "f64": "mov.64", "i32": "movsxd", "f32": "mov.32", "i16": "movsx.16.64",
                 "f16": "movzx.16.32", "bf16": "movzx.16.32", "i8": "movsx.8.64", "u8": "movzx.8.32",
                 "bool": "movzx.8.32", "b32": "mov.32"}


def s_load(s: Any, op: Op) -> None:
    memory = s.address(op, 0)
    s.emit(SCALAR_LOADS[op.attributes["dtype"].name], s.define(op.results[0]), memory)


def s_store(s: Any, op: Op) -> None:
    value = op.operands[0]
    bits = op.attributes["dtype"].bits
    memory = s.address(op, 1)
    if value in s.deferred:     # the sum of what is there and another
        other = next(term for term in s.deferred[value].operands if term not in s.deferred)
        number = s.small_constant(other)
        s.emit(f"add.{bits}", memory, s.scalar(other) if number is None else number)
        return
    number = s.constant_of(value)
    if number is not None:
        low = (number + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))
        if bits < 64 or -2**31 <= low < 2**31:
            s.emit(f"mov.{bits}", memory, low)
            return
    s.emit(f"mov.{bits}", memory, s.scalar(value))


RULES: dict[str, Rule] = {
    "arg": arg, "worker": worker, "workers": workers, "s_add": s_add, "s_sub": s_sub, "s_mul": s_mul,
    "s_min": _scalar_choice("l"), "s_max": _scalar_choice("g"), "s_and": _scalar_bits("and"),
    "s_or": _scalar_bits("or"), "s_xor": _scalar_bits("xor"), "s_shl": _scalar_shift("shl"),
    "s_shr": _scalar_shift("shr"), "s_sar": _scalar_shift("sar"), "s_floordiv": s_floordiv, "s_mod": s_mod,
    "s_cmp": s_cmp, "s_select": s_select, "s_load": s_load, "s_store": s_store, "mask_any": _mask_test,
    "mask_all": _mask_test, "any_zero_bf16": _zero_test,
}

OWN_CONSTANTS: dict[str, OwnConstants] = {"any_zero_bf16": lambda s, op: (_BUT_SIGNS,)}
