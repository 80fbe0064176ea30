"""Code by hand on RISC-V: the operations of sapper/codegen/translate.py, by registers' numbers.

Enters: an emitter (`s`) and numbers of general registers. Leaves: instructions, by `s.emit`; settle.py puts others in
the place of those that have no word. Holds: x31 and the float register ft11 are used by nothing else; of what an
operation is given it changes what it is to write.
Source: RISC-V ELF psABI, "Integer Register Convention"; Linux system calls of riscv64 (number in a7, arguments from a0
on); riscv_hwprobe(2) in Linux, Documentation/arch/riscv/hwprobe.rst; RISC-V Instruction Set Manual, Volume I, 13.2
(LR/SC) and 30.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .instructions import table
from .registers import LINK as _LINK
from .registers import STACK
from .registers import ZERO as _ZERO

REGISTERS = (16, 13, 12, 9, STACK, 8, 11, 10, 14, 15, 28, 29, 18, 19, 20, 21)
"""x86-64's, by number: arguments are where the convention wants them, what a function keeps is in what it keeps."""
BETWEEN = (5, 6, 7)
COMPARED = (30, 17)
RESULT = 10
INTEGERS, FLOATS, FLOATS_GO_ON = 8, 8, True
"""Arguments of C in registers; whether floats take integer registers when their own are used up."""
LINK, ZERO = _LINK, _ZERO
_SYSTEM_CALL, _PUSH_BYTES = 17, 16
_BRANCHES = {"e": ("beq", False), "ne": ("bne", False), "b": ("bltu", False), "ae": ("bgeu", False),
             "a": ("bltu", True), "be": ("bgeu", True), "l": ("blt", False), "ge": ("bge", False), "g": ("blt", True),
             "le": ("bge", True)}
"""The row, and whether its operands are turned round."""
_BINARY = {"add": "add", "sub": "sub", "and": "and", "or": "or", "xor": "xor", "mul": "mul", "high": "mulh",
           "div": "divu", "signed div": "div", "shl": "sll"}
_SHIFTS = {"shl": "slli", "shr": "srli", "sar": "srai"}
_LOADS = {(64, False): "ld", (64, True): "ld", (32, False): "lwu", (32, True): "lw", (16, False): "lhu",
          (16, True): "lh", (8, False): "lbu", (8, True): "lb"}
_STORES = {64: "sd", 32: "sw", 16: "sh", 8: "sb"}
_HWPROBE, _EXTENSIONS = 258, 4
"""riscv_hwprobe(2), and the key of RISCV_HWPROBE_KEY_IMA_EXT_0."""
_BITS = {"v": 2, "zbb": 4, "zfh": 27, "zfhmin": 28, "zvfh": 30, "zvfhmin": 31}
"""What the bits of that key say is there."""
_HINTS = frozenset({"zicbop"})
"""What does nothing where it is not known."""


def rows(target: Any) -> Mapping[str, Any]:
    return table(target.vector_bits)


def number(s: Any, register: int, value: int) -> None:
    s.emit("li", register, s.immediate(value))


def move(s: Any, register: int, source: int) -> None:
    if register != source:
        s.emit("mv", register, source)


def add_number(s: Any, register: int, source: int, value: int) -> None:
    if -2048 <= value < 2048:
        if value or register != source:
            s.emit("addi", register, source, s.immediate(value))
        return
    number(s, 31, value)
    s.emit("add", register, source, 31)


def load(s: Any, register: int, base: int, disp: int, bits: int, signed: bool) -> None:
    """`signed`: of fewer than 64 bits the sign fills the rest, else zeros."""
    s.emit(_LOADS[bits, signed], register, s.memory(base, disp))


def store(s: Any, register: int, base: int, disp: int, bits: int) -> None:
    s.emit(_STORES[bits], s.memory(base, disp), register)


def binary(s: Any, operation: str, register: int, left: int, right: int) -> None:
    s.emit(_BINARY[operation], register, left, right)


def shift(s: Any, operation: str, register: int, source: int, amount: int) -> None:
    if amount:
        s.emit(_SHIFTS[operation], register, source, s.immediate(amount))
    else:
        move(s, register, source)


def branch(s: Any, condition: str, left: int, right: int, label: str) -> None:
    row, turned = _BRANCHES[condition]
    s.emit(row, *((right, left) if turned else (left, right)), label)


def jump(s: Any, label: str) -> None:
    s.emit("j", label)


def jump_to(s: Any, register: int) -> None:
    s.emit("jr", register)


def call(s: Any, label: str) -> None:
    s.emit("jal", label)


def call_at(s: Any, register: int) -> None:
    s.emit("jalr", register)


def leave(s: Any) -> None:
    s.emit("ret")


def trap(s: Any) -> None:
    s.emit("unimp")


def push(s: Any, register: int) -> None:
    add_number(s, STACK, STACK, -_PUSH_BYTES)
    store(s, register, STACK, 0, 64)


def pop(s: Any, register: int) -> None:
    load(s, register, STACK, 0, 64, False)
    add_number(s, STACK, STACK, _PUSH_BYTES)


def distance(s: Any, label: str) -> None:
    s.emit("distance", label)


def system_call(s: Any, number_of_call: int) -> None:
    number(s, _SYSTEM_CALL, number_of_call)
    s.emit("ecall")


def fence(s: Any) -> None:
    s.emit("fence")


def pause(s: Any) -> None:
    s.emit("pause")


def clock(s: Any, register: int) -> None:
    s.emit("rdtime", register)


def prefetch(s: Any, features: frozenset[str], base: int, disp: int) -> None:
    if "zicbop" in features:
        s.emit("prefetch.r", s.memory(base, disp))


def add_to(s: Any, old: int, addend: int, address: int) -> None:
    """Of 32 bits, as those that follow."""
    s.emit("amoadd.w", old, addend, s.memory(address))


def swap(s: Any, old: int, value: int, address: int) -> None:
    s.emit("amoswap.w", old, value, s.memory(address))


def compare_swap(s: Any, expected: int, value: int, address: int) -> None:
    """`expected`, which has its sign above it, becomes what was there."""
    again, done = s.new_label(), s.new_label()
    memory = s.memory(address)
    s.label(again)
    s.emit("lr.w", 31, memory)
    s.emit("bne", 31, expected, done)
    s.emit("sc.w", 31, value, memory)
    s.emit("bnez", 31, again)
    move(s, 31, expected)
    s.label(done)
    move(s, expected, 31)


def to_float(s: Any, bits: int, register: int, source: int) -> None:
    s.emit("fcvt.s.l" if bits == 32 else "fcvt.d.l", _float(s, register), source)


def divide_double(s: Any, register: int, left: int, right: int) -> None:
    s.emit("fdiv.d", _float(s, register), _float(s, left), _float(s, right))


def narrow(s: Any, register: int, source: int) -> None:
    s.emit("fcvt.s.d", _float(s, register), _float(s, source))


def multiply_single(s: Any, register: int, left: int, right: int) -> None:
    """right: a general register with the bits of a float."""
    s.emit("fmv.w.x", _float(s, 31), right)
    s.emit("fmul.s", _float(s, register), _float(s, left), _float(s, 31))


def to_single(s: Any, register: int, source: int) -> None:
    """The bits of a float, or of one of 16 bits, from a general register."""
    s.emit("fmv.w.x", _float(s, register), source)


def widen_half(s: Any, register: int, source: int) -> None:
    """Above a float of 16 bits there are ones (20.2)."""
    s.emit("fmv.x.w", 31, _float(s, source))
    s.emit("slli", 31, 31, s.immediate(48))
    s.emit("xori", 31, 31, s.immediate(-1))
    s.emit("srli", 31, 31, s.immediate(48))
    s.emit("xori", 31, 31, s.immediate(-1))
    s.emit("fmv.d.x", _float(s, register), 31)
    s.emit("fcvt.s.h", _float(s, register), _float(s, register))


def store_arguments(s: Any, base: int) -> None:
    """Those in registers: integers, then floats."""
    for place in range(INTEGERS):
        s.emit("sd", s.memory(base, 8 * place), 10 + place)
    for place in range(FLOATS):
        s.emit("fsd", s.memory(base, 8 * (INTEGERS + place)), _float(s, 10 + place))


def from_single(s: Any, register: int, source: int) -> None:
    s.emit("fmv.x.w", register, _float(s, source))


def _float(s: Any, number_of_register: int) -> Any:
    return s.physical("fpr", number_of_register)


def check_cpu(s: Any, target: Any) -> None:
    """A function: 1 where the processor has what the target has, and vectors of its length, else 0. Linux is asked
    (since 6.4; an older one knows no such call, and the answer is 0). Raises KeyError for a feature of which nothing
    is known here."""
    wanted = sum(1 << _BITS[name] for name in target.features - _HINTS)
    add_number(s, STACK, STACK, -_PUSH_BYTES)
    number(s, BETWEEN[0], _EXTENSIONS)
    store(s, BETWEEN[0], STACK, 0, 64)
    store(s, ZERO, STACK, 8, 64)
    move(s, 10, STACK)
    for register, value in ((11, 1), (12, 0), (13, 0), (14, 0)):
        number(s, register, value)
    system_call(s, _HWPROBE)
    load(s, BETWEEN[0], STACK, 8, 64, False)
    add_number(s, STACK, STACK, _PUSH_BYTES)
    s.emit("bnez", 10, "lacking")
    number(s, BETWEEN[1], wanted)
    s.emit("and", BETWEEN[0], BETWEEN[0], BETWEEN[1])
    s.emit("bne", BETWEEN[0], BETWEEN[1], "lacking")
    s.emit("csrr.vlenb", BETWEEN[0])
    number(s, BETWEEN[1], target.vector_bits // 8)
    s.emit("bne", BETWEEN[0], BETWEEN[1], "lacking")
    number(s, RESULT, 1)
    s.emit("ret")
    s.label("lacking")
    number(s, RESULT, 0)
    s.emit("ret")
