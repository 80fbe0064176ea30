"""Machine IR -> text for GNU as.

Enters: an instruction, a row's syntax. Leaves: a line. Virtual registers print too (as %vec3), so that machine IR can
be read before allocation; such text does not assemble.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .registers import register_name

COMMENT = "//"
"""What begins a comment."""
_PLACE = re.compile(r"<[^>]+>")


def head(target: Any) -> tuple[str, ...]:
    """Lines at the start of a file."""
    optional = "".join(f"+{name}" for name in ("dotprod", "i8mm", "bf16") if target.has(name))
    return (f".arch armv8.2-a{optional}" if optional else ".arch armv8.1-a", ".text")


def _is_virtual(register: Any) -> bool:
    return hasattr(register, "hint")


def _register(register: Any, bits: int) -> str:
    return repr(register) if _is_virtual(register) else register_name(register.kind, register.number, bits)


def _memory(memory: Any, spell: Callable[[str], str]) -> str:
    if memory.label is not None:
        return spell(memory.label)
    parts = [_register(memory.base, 64)]
    if memory.index is not None:
        parts.append(_register(memory.index, 64))
        if memory.scale > 1:
            parts.append(f"lsl #{memory.scale.bit_length() - 1}")
    elif memory.disp:
        parts.append(f"#{memory.disp}")
    return f"[{', '.join(parts)}]"


def _operand(found: Any, operand: Any, spell: Callable[[str], str]) -> str:
    if operand.kind == "imm":
        return f"{operand.mark}{found.value}"
    if operand.kind == "label":
        return spell(found.name)
    if operand.kind == "mem":
        return _memory(found, spell)
    if operand.vector:
        return repr(found) if _is_virtual(found) else f"v{found.number}"
    return _register(found, operand.bits)


def print_instruction(instruction: Any, spell: Callable[[str], str] = str) -> str:
    """One instruction without its comment."""
    row = instruction.row
    spelled = [_operand(found, operand, spell)
               for found, operand in zip(instruction.operands, row.operands, strict=True)]
    texts = iter(spelled[::-1] if row.stores else spelled)
    return _PLACE.sub(lambda _: next(texts), row.syntax)
