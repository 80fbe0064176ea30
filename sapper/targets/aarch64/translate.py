"""Code by hand on AArch64: the operations of sapper/codegen/translate.py, by registers' numbers.

Enters: an emitter (`s`) and numbers of general registers. Leaves: instructions, by `s.emit`. Holds: x16, x17 and the
vector register 31 are used by nothing else; of what an operation is given it changes what it is to write.
Source: Procedure Call Standard for the Arm 64-bit Architecture (IHI 0055), 6.1; Linux system calls of arm64 (number in
x8, arguments from x0 on); Arm Architecture Reference Manual DDI 0487, B2.3 (DMB), D24.2 (ID_AA64ISAR0_EL1 and
ID_AA64ISAR1_EL1), and Linux, Documentation/arch/arm64/cpu-feature-registers.rst (who may read them).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .instructions import ROWS
from .registers import LINK as _LINK
from .registers import SP
from .registers import ZERO as _ZERO
from .select_common import is_sum_immediate, load_immediate

REGISTERS = (8, 3, 2, 19, SP, 20, 1, 0, 4, 5, 9, 10, 21, 22, 23, 24)
"""x86-64's, by number: arguments are where the standard wants them, what a function keeps is in what it keeps."""
BETWEEN = (11, 12, 13)
COMPARED = (14, 15)
RESULT = 0
INTEGERS, FLOATS, FLOATS_GO_ON = 8, 8, False
"""Arguments of C in registers; whether floats take integer registers when their own are used up."""
LINK, ZERO = _LINK, _ZERO
_NEAR, _SYSTEM_CALL = 16, 8
_CONDITIONS = {"e": "eq", "ne": "ne", "b": "lo", "ae": "hs", "be": "ls", "a": "hi", "l": "lt", "ge": "ge", "le": "le",
               "g": "gt"}
_BINARY = {"add": "add.64", "sub": "sub.64", "and": "and.64", "or": "orr.64", "xor": "eor.64", "mul": "mul.64",
           "high": "smulh.64", "div": "udiv.64", "signed div": "sdiv.64", "shl": "lsl.64"}
_SHIFTS = {"shl": "lsl.imm.64", "shr": "lsr.imm.64", "sar": "asr.imm.64"}
_LOADS = {(64, False): "ldr.64", (64, True): "ldr.64", (32, False): "ldr.32", (32, True): "ldrsw", (16, False): "ldrh",
          (16, True): "ldrsh", (8, False): "ldrb", (8, True): "ldrsb"}
_STORES = {64: "str.64", 32: "str.32", 16: "strh", 8: "strb"}
_FEATURES = {"lse": (0, 20, 2), "dotprod": (0, 44, 1), "bf16": (1, 44, 1), "i8mm": (1, 52, 1)}
"""Of ID_AA64ISAR0_EL1 or ID_AA64ISAR1_EL1: the lowest bit of four, and what they are at least."""
_EVERYWHERE = frozenset({"neon"})
"""What each of these processors has."""


def rows(target: Any) -> Mapping[str, Any]:
    del target
    return ROWS


class _Immediates:
    """`s` for who takes numbers for immediates."""

    def __init__(self, s: Any) -> None:
        self.s = s

    def emit(self, row: str, register: Any, *numbers: int) -> None:
        self.s.emit(row, register, *map(self.s.immediate, numbers))


def number(s: Any, register: int, value: int) -> None:
    load_immediate(_Immediates(s), register, value)


def move(s: Any, register: int, source: int) -> None:
    if SP in (register, source):
        s.emit("add.imm.64", register, source, s.immediate(0))
    elif register != source:
        s.emit("mov.64", register, source)


def add_number(s: Any, register: int, source: int, value: int) -> None:
    if is_sum_immediate(abs(value)):
        if value or register != source:
            s.emit("add.imm.64" if value >= 0 else "sub.imm.64", register, source, s.immediate(abs(value)))
        return
    number(s, _NEAR, value)
    if SP in (register, source):
        move(s, _NEAR + 1, source)
        s.emit("add.64", _NEAR, _NEAR, _NEAR + 1)
        move(s, register, _NEAR)
    else:
        s.emit("add.64", register, source, _NEAR)


def _place(s: Any, base: int, disp: int, bits: int) -> Any:
    size = bits // 8
    if -256 <= disp < 256 or (disp % size == 0 and 0 <= disp < size << 12):
        return s.memory(base, disp)
    add_number(s, _NEAR, base, disp)
    return s.memory(_NEAR)


def load(s: Any, register: int, base: int, disp: int, bits: int, signed: bool) -> None:
    """`signed`: of fewer than 64 bits the sign fills the rest, else zeros."""
    s.emit(_LOADS[bits, signed], register, _place(s, base, disp, bits))


def store(s: Any, register: int, base: int, disp: int, bits: int) -> None:
    s.emit(_STORES[bits], _place(s, base, disp, bits), register)


def binary(s: Any, operation: str, register: int, left: int, right: int) -> None:
    s.emit(_BINARY[operation], register, left, right)


def shift(s: Any, operation: str, register: int, source: int, amount: int) -> None:
    if amount:
        s.emit(_SHIFTS[operation], register, source, s.immediate(amount))
    else:
        move(s, register, source)


def branch(s: Any, condition: str, left: int, right: int, label: str) -> None:
    s.emit("cmp.64", left, right)
    s.emit(f"b.{_CONDITIONS[condition]}", label)


def jump(s: Any, label: str) -> None:
    s.emit("b", label)


def jump_to(s: Any, register: int) -> None:
    s.emit("br", register)


def call(s: Any, label: str) -> None:
    s.emit("bl", label)


def call_at(s: Any, register: int) -> None:
    s.emit("blr", register)


def leave(s: Any) -> None:
    s.emit("ret")


def trap(s: Any) -> None:
    s.emit("udf")


def push(s: Any, register: int) -> None:
    s.emit("push.gpr", register)


def pop(s: Any, register: int) -> None:
    s.emit("pop.gpr", register)


def distance(s: Any, label: str) -> None:
    s.emit("distance", label)


def system_call(s: Any, number_of_call: int) -> None:
    number(s, _SYSTEM_CALL, number_of_call)
    s.emit("svc")


def fence(s: Any) -> None:
    s.emit("dmb")


def pause(s: Any) -> None:
    s.emit("yield")


def clock(s: Any, register: int) -> None:
    s.emit("mrs.cntvct_el0", register)


def prefetch(s: Any, features: frozenset[str], base: int, disp: int) -> None:
    del features
    s.emit("prfm.pldl2keep", _place(s, base, disp, 64))


def add_to(s: Any, old: int, addend: int, address: int) -> None:
    """Of 32 bits, as those that follow."""
    s.emit("ldaddal.32", addend, old, s.memory(address))


def swap(s: Any, old: int, value: int, address: int) -> None:
    s.emit("swpal.32", value, old, s.memory(address))


def compare_swap(s: Any, expected: int, value: int, address: int) -> None:
    """`expected` becomes what was there."""
    s.emit("casal.32", expected, value, s.memory(address))


def to_float(s: Any, bits: int, register: int, source: int) -> None:
    s.emit("scvtf.s" if bits == 32 else "scvtf.d", _vector(s, register), source)


def divide_double(s: Any, register: int, left: int, right: int) -> None:
    s.emit("fdiv.2d", _vector(s, register), _vector(s, left), _vector(s, right))


def narrow(s: Any, register: int, source: int) -> None:
    s.emit("fcvtn.2s", _vector(s, register), _vector(s, source))


def multiply_single(s: Any, register: int, left: int, right: int) -> None:
    """right: a general register with the bits of a float."""
    s.emit("dup.2s", _vector(s, 31), right)
    s.emit("fmul.2s", _vector(s, register), _vector(s, left), _vector(s, 31))


def to_single(s: Any, register: int, source: int) -> None:
    """The bits of a float, or of one of 16 bits, from a general register."""
    s.emit("dup.2s", _vector(s, register), source)


def widen_half(s: Any, register: int, source: int) -> None:
    s.emit("fcvtl.4s", _vector(s, register), _vector(s, source))


def store_arguments(s: Any, base: int) -> None:
    """Those in registers: integers, then floats."""
    for place in range(INTEGERS):
        s.emit("str.64", s.memory(base, 8 * place), place)
    for place in range(FLOATS):
        s.emit("str.d", s.memory(base, 8 * (INTEGERS + place)), _vector(s, place))


def from_single(s: Any, register: int, source: int) -> None:
    s.emit("fmov.from_s", register, _vector(s, source))


def _vector(s: Any, number_of_register: int) -> Any:
    return s.physical("vec", number_of_register)


def check_cpu(s: Any, target: Any) -> None:
    """A function: 1 where the processor has what the target has, else 0. Linux answers for ID registers. Raises
    KeyError for a feature of which nothing is known here."""
    for name in sorted(target.features - _EVERYWHERE):
        register, low, least = _FEATURES[name]
        s.emit(f"mrs.id_aa64isar{register}_el1", BETWEEN[0])
        s.emit("lsl.imm.64", BETWEEN[1], BETWEEN[0], s.immediate(60 - low))
        s.emit("lsr.imm.64", BETWEEN[1], BETWEEN[1], s.immediate(60))
        s.emit("cmp.imm.64", BETWEEN[1], s.immediate(least))
        s.emit("b.lo", "lacking")
    number(s, RESULT, 1)
    s.emit("ret")
    s.label("lacking")
    s.emit("mov.64", RESULT, ZERO)
    s.emit("ret")
