"""Machine IR -> text for GNU as.

Enters: an instruction, a row's syntax. Leaves: a line. Virtual registers print too (as %vec3), so that machine IR can
be read before allocation; such text does not assemble.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .registers import register_name

COMMENT = "#"
"""What begins a comment."""
_PLACE = re.compile(r"<[^>]+>")


def head(target: Any) -> tuple[str, ...]:
    """Lines at the start of a file. Without `c` no instruction is made shorter than it is written."""
    extensions = "_".join(sorted(target.features - {"v"}))
    return (f".option arch, rv64gv_{extensions}_zihintpause", ".option norelax", ".text")


def _register(register: Any) -> str:
    return repr(register) if hasattr(register, "hint") else register_name(register.kind, register.number)


def _operand(found: Any, operand: Any, vector: bool, spell: Callable[[str], str]) -> str:
    if operand.kind == "imm":
        return str(found.value)
    if operand.kind == "label":
        return spell(found.name)
    if operand.kind == "mem":
        place = f"{'' if vector and not found.disp else found.disp}({_register(found.base)})"
        return place if found.index is None else f"{place}, {_register(found.index)}"
    return _register(found)


def print_instruction(instruction: Any, spell: Callable[[str], str] = str) -> str:
    """One instruction without its comment."""
    row = instruction.row
    plain = row.vector_bits > 0 or row.cost == "atomic"
    spelled = [_operand(found, operand, plain, spell)
               for found, operand in zip(instruction.operands, row.operands, strict=True)]
    texts = iter(spelled[::-1] if row.stores else spelled)
    return _PLACE.sub(lambda _: next(texts), row.syntax)
