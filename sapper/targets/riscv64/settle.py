"""What stands for several instructions, and how vectors are set: RISC-V's part of sapper/codegen/settle.py.

Enters: an emitter (`s`: emit, physical, memory), an instruction all of whose registers are physical. Leaves:
instructions that have a word, by `s.emit`. Holds: x31 is used by nothing else. A register has one row: LMUL / SEW is
the same throughout a function. Source: RISC-V Instruction Set Manual, Volume I, 2.4, 30.3.4 and 30.6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .abi import SCRATCH, STACK_ALIGN_BYTES
from .registers import MASK, STACK, ZERO

JUMP = "j"
INVERTED = {a: b for pair in (("beq", "bne"), ("blt", "bge"), ("bltu", "bgeu"), ("beqz", "bnez"), ("bltz", "bgez"),
                              ("bgtz", "blez")) for a, b in (pair, pair[::-1])}
"""The branch that is taken where another is not."""
MASK_COPY, MASK_REGISTER = "vmv1r.v.mask", ("vec", MASK)
"""The row that copies its operand to v0."""
LOSES_STATE = "ecall"
"""After it nothing is known of what vectors are set to."""
USUAL_ELEMENT = 32
"""What vectors are set to where any elements do."""
_MULTIPLES = {1: "m1", 2: "m2", 0.5: "mf2", 0.25: "mf4", 0.125: "mf8"}


def set_elements(s: Any, bits: int, lanes: int, vector_bits: int) -> None:
    """So many lanes, of elements of so many bits."""
    s.emit(f"vsetivli.e{bits}.{_MULTIPLES[bits * lanes / vector_bits]}", lanes)


def _short(number: int) -> bool:
    return -2048 <= number < 2048


def load_number(s: Any, register: Any, number: int) -> None:
    """A number of 64 bits in a general register: by its upper 20 and lower 12 bits, or from its upper bits on."""
    number = (number + (1 << 63)) % (1 << 64) - (1 << 63)
    if _short(number):
        s.emit("li.short", register, number)
        return
    low = (number + 2048) % 4096 - 2048
    if -(1 << 31) <= number < 1 << 31:
        s.emit("lui", register, (number - low >> 12) % (1 << 20))
        if low:
            s.emit("addiw", register, register, low)
        return
    high = number - low >> 12
    zeros = (high & -high).bit_length() - 1
    load_number(s, register, high >> zeros)
    s.emit("slli", register, register, 12 + zeros)
    if low:
        s.emit("addi", register, register, low)


def _reach(s: Any, item: Any, place: int) -> None:
    """The same with an address that its word holds: x31, and the lower bits of the distance where it has some."""
    memory, operands = item.operands[place], list(item.operands)
    scratch, rest = s.physical("gpr", SCRATCH), 0
    if _short(memory.disp):
        s.emit("addi", scratch, memory.base, memory.disp)
    else:
        if "m" in item.row.words[0].fields:
            rest = (memory.disp + 2048) % 4096 - 2048
        load_number(s, scratch, memory.disp - rest)
        s.emit("add", scratch, scratch, memory.base)
    operands[place] = s.memory(scratch, disp=rest)
    s.emit(item.row.name, *operands)


def _move_stack(s: Any, number: int) -> None:
    stack = s.physical("gpr", STACK)
    if _short(number):
        s.emit("addi", stack, stack, number)
    else:
        load_number(s, s.physical("gpr", SCRATCH), number)
        s.emit("add", stack, stack, s.physical("gpr", SCRATCH))


def _vector_constant(s: Any, bits: int, register: Any, number: int) -> None:
    number = (number + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)
    if -16 <= number < 16:
        s.emit(f"vmv.v.i.e{bits}", register, number)
        return
    scratch = s.physical("gpr", SCRATCH)
    load_number(s, scratch, number)
    s.emit(f"vmv.v.x.e{bits}", register, scratch)


def _float_constant(s: Any, name: str, register: Any, number: int) -> None:
    scratch = s.physical("gpr", SCRATCH if number else ZERO)
    if number:
        load_number(s, scratch, number)
    s.emit(name, register, scratch)


def _saved(s: Any, registers: list[Any]) -> list[tuple[Any, Any]]:
    """Registers that are pushed one after the other, each with its place on the stack: the last lies lowest."""
    stack = s.physical("gpr", STACK)
    return [(register, s.memory(stack, disp=8 * place)) for place, register in enumerate(reversed(registers))][::-1]


def _bytes_of(count: int) -> int:
    return -(-8 * count // STACK_ALIGN_BYTES) * STACK_ALIGN_BYTES


def _push(s: Any, registers: list[Any]) -> None:
    _move_stack(s, -_bytes_of(len(registers)))
    for register, memory in _saved(s, registers):
        s.emit("sd" if register.kind == "gpr" else "fsd", memory, register)


def _pop(s: Any, registers: list[Any]) -> None:
    """The last that was pushed comes first."""
    for register, memory in _saved(s, registers[::-1])[::-1]:
        s.emit("ld" if register.kind == "gpr" else "fld", register, memory)
    _move_stack(s, _bytes_of(len(registers)))


_EXPANSIONS: dict[str, Callable[..., None]] = {
    "li": lambda s, register, number: load_number(s, register, number.value),
    "fconst.32": lambda s, register, number: _float_constant(s, "fmv.w.x", register, number.value),
    "fconst.64": lambda s, register, number: _float_constant(s, "fmv.d.x", register, number.value),
    "vconst.e32": lambda s, register, number: _vector_constant(s, 32, register, number.value),
    "vconst.e64": lambda s, register, number: _vector_constant(s, 64, register, number.value),
    "undefined": lambda s, register: None,
    "add.stack": lambda s, stack, number: _move_stack(s, number.value),
    "sub.stack": lambda s, stack, number: _move_stack(s, -number.value),
}


TOGETHER: dict[str, Callable[..., None]] = {"push": _push, "pop": _pop}
"""By mnemonic: what is done with the registers of several instructions, one after the other."""


def expand(s: Any, item: Any) -> bool:
    """Whether an instruction became others."""
    made = _EXPANSIONS.get(item.row.name)
    if made is not None:
        made(s, *item.operands)
        return True
    place = next((place for place, form in enumerate(item.row.operands) if form.kind == "mem"), None)
    if place is None or item.operands[place].index is not None \
            or item.row.words[0].reaches(item.operands[place], 0) is not None:
        return False
    _reach(s, item, place)
    return True
