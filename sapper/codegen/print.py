"""Machine IR -> text that GNU as accepts (Intel syntax).

Enters: a `MachineFunction`. Leaves: a whole source file; assembled, its .text section has the bytes of encode.py.
Virtual registers print too (as %vec3), so that machine IR can be read before allocation; such text does not assemble.
"""

from __future__ import annotations

from typing import Any

from ..ir.nodes import Location
from ..targets.x86_64.registers import register_name
from .machine import Immediate, Instruction, Label, LabelReference, MachineFunction, Memory, Register, VirtualRegister

_SIZES = {8: "byte", 16: "word", 32: "dword", 64: "qword", 128: "xmmword", 256: "ymmword", 512: "zmmword"}


def local_label(name: str) -> str:
    """A label of machine IR as a name that is local to the file; characters that as does not take become _xx."""
    return ".L" + "".join(c if (c.isalnum() and c.isascii()) or c in "._$" else f"_{ord(c):x}" for c in name)


def _register(register: Any, bits: int) -> str:
    if type(register) is VirtualRegister:
        return repr(register)
    return register_name(register.kind, register.number, bits)


def print_memory(memory: Memory, operand: Any, row: Any) -> str:
    """`dword ptr [rax + rcx*4 + 8]`, with {1to8} where it is a broadcast."""
    parts = []
    if memory.label is not None:
        parts += ["rip", local_label(memory.label)]
    if memory.base is not None:
        parts.append(_register(memory.base, 64))
    if memory.index is not None:
        bits = operand.index_bits or 64
        parts.append(f"{_register(memory.index, bits)}*{memory.scale}")
    text = " + ".join(parts)
    if memory.disp or not text:
        disp = memory.disp
        text = f"{text} {'-' if disp < 0 else '+'} {abs(disp)}" if text else str(disp)
    if row.mnemonic == "lea":
        return f"[{text}]"
    # Without a register as takes some absolute addresses for immediates; a segment says that it is memory.
    segment = "" if parts else "ds:"
    if memory.broadcast:
        lanes = operand.memory_bits // operand.broadcast_bits
        return f"{_SIZES[operand.broadcast_bits]} ptr {segment}[{text}]{{1to{lanes}}}"
    return f"{_SIZES[operand.memory_bits]} ptr {segment}[{text}]"


def print_instruction(instruction: Instruction) -> str:
    """One instruction without its comment."""
    row = instruction.row
    texts = []
    found: Any
    for found, operand in zip(instruction.operands, row.operands, strict=True):
        kind = type(found)
        if kind is Register or kind is VirtualRegister:
            texts.append(_register(found, operand.bits))
        elif kind is Memory:
            texts.append(print_memory(found, operand, row))
        elif kind is Immediate:
            texts.append(str(found.value))
        elif kind is LabelReference:
            texts.append(local_label(found.name))
    if instruction.mask is not None and texts:
        texts[0] += f"{{{_register(instruction.mask, 64)}}}" + ("{z}" if instruction.zeroing else "")
    return f"{row.mnemonic} {', '.join(texts)}" if texts else str(row.mnemonic)


def print_function(function: MachineFunction) -> str:
    """The whole file: directives, code with the source line of each stretch in a comment, constants."""
    name = function.name
    lines = [".intel_syntax noprefix", ".text", f".globl {name}", f".type {name}, @function"]
    align = max([16, *(item.align for item in function.body if isinstance(item, Label)),
                 *(alignment for alignment, _ in function.constants.values())])
    lines += [f".balign {align}", f"{name}:"]
    last: Location | None = None
    for item in function.body:
        if isinstance(item, Label):
            if item.align > 1:
                lines.append(f".balign {item.align}")
            lines.append(f"{local_label(item.name)}:")
            continue
        comments = []
        location = item.location
        if location is not None and location != last:
            comments.append(f"{location.file}:{location.line}")
            last = location
        if item.comment:
            comments.append(item.comment)
        text = "    " + print_instruction(item)
        lines.append(f"{text:<56}# {'; '.join(comments)}".replace("\n", " ") if comments else text)
    if function.constants:
        for label, (alignment, content) in function.constants.items():
            lines += [f".balign {alignment}, 0xcc", f"{local_label(label)}:"]
            for start in range(0, len(content), 32):
                lines.append("    .byte " + ", ".join(map(str, content[start:start + 32])))
    lines.append(f".size {name}, . - {name}")
    return "\n".join(lines) + "\n"
