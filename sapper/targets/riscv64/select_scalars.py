"""Selection rules of RISC-V: 64-bit scalars, their comparisons, jumps on conditions.

See select.py. There are no flags: a branch compares two registers.
"""

from __future__ import annotations

from typing import Any

from ...ir.nodes import Op, Value
from .select_common import MIRRORED, Rule, load_immediate

INVERTED = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}
_BRANCHES = {"eq": "beq", "ne": "bne", "lt": "blt", "ge": "bge"}
_AGAINST_ZERO = {"eq": "beqz", "ne": "bnez", "lt": "bltz", "ge": "bgez", "gt": "bgtz", "le": "blez"}


def is_short(number: int | None) -> bool:
    return number is not None and -2048 <= number < 2048


def add_number(s: Any, destination: Any, source: Any, number: int) -> None:
    """destination = source + number; they may be one register."""
    if is_short(number):
        s.emit("addi", destination, source, number)
    else:
        other = s.new("gpr")
        load_immediate(s, other, number)
        s.emit("add", destination, source, other)


def add_immediate(s: Any, register: Any, number: int) -> None:
    add_number(s, register, register, number)


def add_register(s: Any, register: Any, other: Any) -> None:
    s.emit("add", register, register, other)


def subtract_register(s: Any, register: Any, other: Any) -> None:
    s.emit("sub", register, register, other)


def subtract_branch(s: Any, register: Any, number: int, label: str) -> None:
    """Take a number off; jump if what remains is above 0."""
    add_number(s, register, register, -number)
    s.branch("bgtz", label, register)


def jump(s: Any, label: str) -> None:
    s.branch("j", label)


def compare_branch(s: Any, condition: str, a: Any, b: Any, label: str) -> None:
    """b: a register, or an immediate."""
    number = b if isinstance(b, int) else getattr(b, "value", None)
    if number == 0:
        s.branch(_AGAINST_ZERO[condition], label, a)
        return
    if number is not None:
        b = s.new("gpr")
        load_immediate(s, b, number)
    if condition in _BRANCHES:
        s.branch(_BRANCHES[condition], label, a, b)
    else:
        s.branch(_BRANCHES[MIRRORED[condition]], label, b, a)


def branch_unless(s: Any, value: Value, label: str) -> None:
    """Jump if the condition is 0."""
    number = s.constant_of(value)
    if number is not None:
        if not number:
            s.branch("j", label)
        return
    op = value.op
    if value not in s.deferred or op is None:
        s.branch("beqz", label, s.scalar(value))
    elif op.name == "s_cmp":
        left, right, condition = _compared(s, op)
        compare_branch(s, INVERTED[condition], left, right, label)
    else:
        count = _lanes_on(s, op)
        if op.name == "mask_any":
            s.branch("beqz", label, count)
        else:
            compare_branch(s, "ne", count, s.lanes, label)


def _compared(s: Any, op: Op) -> tuple[Any, Any, str]:
    """A register, a register or number, and the condition between them."""
    a, b = op.operands
    condition: str = op.attributes["cond"]
    if s.small_constant(a) is not None and s.small_constant(b) is None:
        a, b, condition = b, a, MIRRORED[condition]
    number = s.small_constant(b)
    left = s.scalar(a)
    return left, number if number is not None else s.scalar(b), condition


def _lanes_on(s: Any, op: Op) -> Any:
    count = s.new("gpr")
    s.emit("vcpop.m", count, s.vector(op.operands[0]))
    return count


def _truth_of_compared(s: Any, op: Op, made: Any) -> None:
    """1 where the condition holds."""
    left, right, condition = _compared(s, op)
    if condition in ("eq", "ne"):
        difference = left
        if right != 0:
            difference = s.new("gpr")
            if isinstance(right, int):
                add_number(s, difference, left, -right)
            else:
                s.emit("sub", difference, left, right)
        s.emit("seqz" if condition == "eq" else "snez", made, difference)
        return
    if isinstance(right, int):
        right, number = s.new("gpr"), right
        load_immediate(s, right, number)
    if condition in ("gt", "le"):
        left, right = right, left
    less = made if condition in ("lt", "gt") else s.new("gpr")
    s.emit("slt", less, left, right)
    if less is not made:
        s.emit("xori", made, less, 1)


def _truth_of_mask(s: Any, op: Op, made: Any) -> None:
    count = _lanes_on(s, op)
    if op.name == "mask_any":
        s.emit("snez", made, count)
    else:
        difference = s.new("gpr")
        add_number(s, difference, count, -s.lanes)
        s.emit("seqz", made, difference)


_TRUTHS = {"s_cmp": _truth_of_compared, "mask_any": _truth_of_mask, "mask_all": _truth_of_mask}


def _truth(s: Any, op: Op) -> None:
    _TRUTHS[op.name](s, op, s.define(op.results[0]))


def arg(s: Any, op: Op) -> None:
    s.emit("ld", s.define(op.results[0]), s.memory(s.facts.arguments, disp=8 * op.attributes["slot"]))


def worker(s: Any, op: Op) -> None:
    s.emit("mv", s.define(op.results[0]), s.facts.worker)


def workers(s: Any, op: Op) -> None:
    s.emit("mv", s.define(op.results[0]), s.facts.workers)


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
        s.emit("add", s.define(op.results[0]), left, right)


def s_sub(s: Any, op: Op) -> None:
    a, b = op.operands
    number = s.small_constant(b)
    left = s.scalar(a)
    if number is not None:
        add_number(s, s.define(op.results[0]), left, -number)
    else:
        right = s.scalar(b)
        s.emit("sub", s.define(op.results[0]), left, right)


def _power(number: int | None) -> int | None:
    """Which power of 2 it is."""
    return number.bit_length() - 1 if number is not None and number > 0 and number & (number - 1) == 0 else None


def _shift(s: Any, name: str, result: Value, a: Value, amount: int) -> None:
    left = s.scalar(a)
    if amount:
        s.emit(f"{name}i", s.define(result), left, amount)
    else:
        s.emit("mv", s.define(result), left)


def s_mul(s: Any, op: Op) -> None:
    a, b = op.operands
    if s.constant_of(a) is not None:
        a, b = b, a
    power = _power(s.constant_of(b))
    if power is not None:
        _shift(s, "sll", op.results[0], a, power)
        return
    left, right = s.scalar(a), s.scalar(b)
    s.emit("mul", s.define(op.results[0]), left, right)


def _scalar_bits(name: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        a, b = op.operands
        if s.constant_of(a) is not None:
            a, b = b, a
        number = s.constant_of(b)
        left = s.scalar(a)
        if is_short(number):
            s.emit(f"{name}i", s.define(op.results[0]), left, number)
        else:
            right = s.scalar(b)
            s.emit(name, s.define(op.results[0]), left, right)
    return rule


def _scalar_shift(name: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        a, b = op.operands
        number = s.constant_of(b)
        if number is not None:
            _shift(s, name, op.results[0], a, number & 63)
        else:
            left, right = s.scalar(a), s.scalar(b)
            s.emit(name, s.define(op.results[0]), left, right)
    return rule


def _two(name: str) -> Rule:
    def rule(s: Any, op: Op) -> None:
        left, right = (s.scalar(value) for value in op.operands)
        s.emit(name, s.define(op.results[0]), left, right)
    return rule


def divide_scalars(s: Any, a: Any, b: Any) -> tuple[Any, Any]:
    """Floor division of general registers: fresh registers of quotient and remainder.

    div truncates; where there is a remainder whose sign is not the divisor's, the quotient is one less and the
    remainder one divisor more.
    """
    whole, rest, signs, negative, some, less = (s.new("gpr") for _ in range(6))
    s.emit("div", whole, a, b)
    s.emit("rem", rest, a, b)
    s.emit("xor", signs, rest, b)
    s.emit("srai", negative, signs, 63)
    s.emit("snez", some, rest)
    # -1 where there is a remainder: 0 - some.
    wrong = s.new("gpr")
    s.emit("neg", wrong, some)
    s.emit("and", less, negative, wrong)
    quotient, more, remainder = (s.new("gpr") for _ in range(3))
    s.emit("add", quotient, whole, less)
    s.emit("and", more, less, b)
    s.emit("add", remainder, rest, more)
    return quotient, remainder


def s_floordiv(s: Any, op: Op) -> None:
    a, b = op.operands
    power = _power(s.constant_of(b))
    if power is not None:
        _shift(s, "sra", op.results[0], a, power)
        return
    quotient, _ = divide_scalars(s, s.scalar(a), s.scalar(b))
    s.emit("mv", s.define(op.results[0]), quotient)


def s_mod(s: Any, op: Op) -> None:
    a, b = op.operands
    power = _power(s.constant_of(b))
    if power == 0:
        load_immediate(s, s.define(op.results[0]), 0)
    elif power and is_short((1 << power) - 1):
        left = s.scalar(a)
        s.emit("andi", s.define(op.results[0]), left, (1 << power) - 1)
    elif power:
        left, high = s.scalar(a), s.new("gpr")
        s.emit("slli", high, left, 64 - power)
        s.emit("srli", s.define(op.results[0]), high, 64 - power)
    else:
        _, remainder = divide_scalars(s, s.scalar(a), s.scalar(b))
        s.emit("mv", s.define(op.results[0]), remainder)


def s_select(s: Any, op: Op) -> None:
    """b ^ ((a ^ b) & -condition)."""
    condition, a, b = op.operands
    number = s.constant_of(condition)
    if number is not None:
        s.emit("mv", s.define(op.results[0]), s.scalar(a if number else b))
        return
    left, right, holds, all_ones, differing, kept = s.scalar(a), s.scalar(b), *(s.new("gpr") for _ in range(4))
    made = condition.op
    if condition in s.deferred and made is not None:
        _TRUTHS[made.name](s, made, holds)
    else:
        s.emit("snez", holds, s.scalar(condition))
    s.emit("neg", all_ones, holds)
    s.emit("xor", differing, left, right)
    s.emit("and", kept, differing, all_ones)
    s.emit("xor", s.define(op.results[0]), kept, right)


LOADS = {"i64": "ld", "f64": "ld", "i32": "lw", "f32": "lwu", "b32": "lwu", "i16": "lh", "f16": "lhu", "bf16": "lhu",
         "i8": "lb", "u8": "lbu", "bool": "lbu"}
STORES = {8: "sd", 4: "sw", 2: "sh", 1: "sb"}


def s_load(s: Any, op: Op) -> None:
    memory = s.address(op, 0)
    s.emit(LOADS[op.attributes["dtype"].name], s.define(op.results[0]), memory)


def s_store(s: Any, op: Op) -> None:
    memory = s.address(op, 1)
    s.emit(STORES[op.attributes["dtype"].size_bytes], memory, s.scalar(op.operands[0]))


RULES: dict[str, Rule] = {
    "arg": arg, "worker": worker, "workers": workers, "s_add": s_add, "s_sub": s_sub, "s_mul": s_mul,
    "s_min": _two("min"), "s_max": _two("max"), "s_and": _scalar_bits("and"), "s_or": _scalar_bits("or"),
    "s_xor": _scalar_bits("xor"), "s_shl": _scalar_shift("sll"), "s_shr": _scalar_shift("srl"),
    "s_sar": _scalar_shift("sra"), "s_floordiv": s_floordiv, "s_mod": s_mod, "s_cmp": _truth, "s_select": s_select,
    "s_load": s_load, "s_store": s_store, "mask_any": _truth, "mask_all": _truth,
}
