"""Machine IR -> text that GNU as accepts (Intel syntax).

Enters: a `MachineFunction`, or the functions and tables of a library. Leaves: a whole source file; assembled, its .text
section has the bytes of encode.py.
Virtual registers print too (as %vec3), so that machine IR can be read before allocation; such text does not assemble.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..ir.nodes import Location
from ..targets.x86_64.registers import register_name
from .encode import encode
from .machine import Immediate, Instruction, Label, LabelReference, MachineFunction, Memory, Register, VirtualRegister
from .table import Table
from .unwind import directives

_SIZES = {8: "byte", 16: "word", 32: "dword", 64: "qword", 128: "xmmword", 256: "ymmword", 512: "zmmword"}
_UNSIZED = ("ldtilecfg", "sttilecfg")
"""Instructions before whose memory no size may stand."""


def local_label(name: str) -> str:
    """A label of machine IR as a name that is local to the file; characters that as does not take become _xx."""
    return ".L" + "".join(c if (c.isalnum() and c.isascii()) or c in "._$" else f"_{ord(c):x}" for c in name)


Names = Callable[[str], str]
"""How a label is spelled in the text."""


def _register(register: Any, bits: int) -> str:
    if type(register) is VirtualRegister:
        return repr(register)
    return register_name(register.kind, register.number, bits)


def print_memory(memory: Memory, operand: Any, row: Any, spell: Names = local_label) -> str:
    """`dword ptr [rax + rcx*4 + 8]`, with {1to8} where it is a broadcast."""
    parts = []
    if memory.label is not None:
        parts += ["rip", spell(memory.label)]
    if memory.base is not None:
        parts.append(_register(memory.base, 64))
    if memory.index is not None:
        bits = operand.index_bits or 64
        parts.append(f"{_register(memory.index, bits)}*{memory.scale}")
    text = " + ".join(parts)
    if memory.disp or not text:
        disp = memory.disp
        text = f"{text} {'-' if disp < 0 else '+'} {abs(disp)}" if text else str(disp)
    if row.mnemonic == "lea" or operand.sibmem or row.mnemonic in _UNSIZED:
        return f"[{text}]"
    # Without a register as takes some absolute addresses for immediates; a segment says that it is memory.
    segment = "" if parts else "ds:"
    if memory.broadcast:
        lanes = operand.memory_bits // operand.broadcast_bits
        return f"{_SIZES[operand.broadcast_bits]} ptr {segment}[{text}]{{1to{lanes}}}"
    return f"{_SIZES[operand.memory_bits]} ptr {segment}[{text}]"


def print_instruction(instruction: Instruction, spell: Names = local_label) -> str:
    """One instruction without its comment."""
    row = instruction.row
    texts = []
    found: Any
    for found, operand in zip(instruction.operands, row.operands, strict=True):
        kind = type(found)
        if kind is Register or kind is VirtualRegister:
            texts.append(_register(found, operand.bits))
        elif kind is Memory:
            texts.append(print_memory(found, operand, row, spell))
        elif kind is Immediate:
            texts.append(str(found.value))
        elif kind is LabelReference:
            texts.append(spell(found.name))
    if instruction.mask is not None and texts:
        texts[0] += f"{{{_register(instruction.mask, 64)}}}" + ("{z}" if instruction.zeroing else "")
    return f"{row.mnemonic} {', '.join(texts)}" if texts else str(row.mnemonic)


class Style(NamedTuple):
    """How a family's text is written. head: first lines of a file. comment: what begins one. instruction: prints.
    unwinds: a file says how each frame is left (unwind.py), and which branches are long."""

    head: Sequence[str]
    comment: str
    instruction: Callable[[Instruction, Names], str]
    unwinds: bool = False


INTEL = Style((".intel_syntax noprefix", ".text"), "#", print_instruction, True)


def print_function(function: MachineFunction, style: Style = INTEL) -> str:
    """The whole file: directives, code with the source line of each stretch in a comment, constants."""
    return "\n".join([*style.head, *_function_lines(function, True, _speller(function), style=style)]) + "\n"


def print_file(
    items: Sequence[tuple[MachineFunction | Table, bool]], areas: Mapping[str, int], line_table: bool = False,
    notes: Mapping[str, Sequence[str]] | None = None, remarks: Mapping[str, Mapping[int, str]] | None = None,
    style: Style = INTEL,
) -> str:
    """A file with functions and tables, each with whether others may call it, and areas (name -> bytes) of zeroes.

    line_table: with .file and .loc, from which the assembler makes the lines that debuggers show. notes: lines of
    comment before a function or table, by its name; before the whole file under "". remarks: of a function, by its
    name, the comments of instructions by their place in the body, instead of the usual ones.
    """
    notes = notes or {}
    lines = [*_comment(notes.get("", ()), style), *style.head]
    files: dict[str, int] = {}
    if line_table:
        for function in (item for item, _ in items if isinstance(item, MachineFunction)):
            for item in function.body:
                if isinstance(item, Instruction) and item.location is not None:
                    files.setdefault(item.location.file, len(files) + 1)
        lines += [f".file {number} {_quoted(path)}" for path, number in files.items()]
    symbols = {name: value for item, _ in items if isinstance(item, Table) for name, value in item.symbols.items()}
    lines += [f".set {name}, {value}" for name, value in symbols.items()]
    for number, (piece, exported) in enumerate(items):
        lines += _comment(notes.get(piece.name, ()), style)
        lines += piece.text(local_label, style.comment) if isinstance(piece, Table) else _function_lines(
            piece, exported, _speller(piece, f"{number}."), files, (remarks or {}).get(piece.name), style)
    if areas:
        lines.append(".bss")
        for name, size_bytes in areas.items():
            lines += [".balign 64", f".type {name}, @object", f"{name}:", f"{local_label(name)}:",
                      f"    .zero {size_bytes}",
                      f".size {name}, {size_bytes}"]
    lines.append('.section .note.GNU-stack, "", @progbits')
    return "\n".join(lines) + "\n"


def _comment(lines: Sequence[str], style: Style) -> list[str]:
    return ["", *(f"{style.comment} {line}".rstrip() for line in lines)] if lines else []


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _speller(function: MachineFunction, prefix: str = "") -> Names:
    """Labels of the function are local to the file, and with a prefix apart from those of other functions.

    What stands elsewhere in the file is reached by a local name too: through its own, which a linker may bind to
    another file's, it could not be reached from within a shared library.
    """
    return lambda label: local_label(label if label in function.externals else prefix + label)


def _long_branches(function: MachineFunction) -> set[int]:
    """Places of the branches that need a distance of 32 bits.

    A file says so, because GNU as finds it out in passes: while alignments further up still move, a branch that reaches
    in the end may not, and it stays long.
    """
    offsets = encode(function).offsets
    return {place for place, item in enumerate(function.body)
            if isinstance(item, Instruction) and item.row.control in ("branch", "jump")
            and type(item.operands[0]) is LabelReference and offsets[place + 1] - offsets[place] > 2}


def _function_lines(
    function: MachineFunction, exported: bool, spell: Names, files: Mapping[str, int] | None = None,
    remarks: Mapping[int, str] | None = None, style: Style = INTEL,
) -> list[str]:
    name = function.name
    lines = [*([f".globl {name}"] if exported else []), f".type {name}, @function"]
    align = max([16, *(item.align for item in function.body if isinstance(item, Label)),
                 *(alignment for alignment, _ in function.constants.values())])
    lines += [f".balign {align}", f"{name}:"] if files is None else [
        f".balign {align}, 0xcc", f"{name}:", f"{local_label(name)}:"]
    last: Location | None = None
    told = files is not None and style.unwinds
    long = _long_branches(function) if told else set()
    frames = directives(function) if told else {}
    if told:
        lines.append(".cfi_startproc")
    for place, item in enumerate(function.body):
        lines += frames.get(place, ())
        if isinstance(item, Label):
            if item.align > 1:
                lines.append(f".balign {item.align}")
            lines.append(f"{spell(item.name)}:")
            continue
        comments = []
        location = item.location
        if location is not None and location != last:
            comments.append(f"{location.file}:{location.line}")
            last = location
            if files:
                lines.append(f".loc {files[location.file]} {location.line} {location.column}")
        if item.comment:
            comments.append(item.comment)
        if remarks is not None:
            comments = [remarks[place]] if place in remarks else []
        text = ("    {disp32} " if place in long else "    ") + style.instruction(item, spell)
        lines.append(f"{text:<56}{style.comment} {'; '.join(comments)}".replace("\n", " ") if comments else text)
    if told:
        lines.append(".cfi_endproc")
    if function.constants:
        for label, (alignment, content) in function.constants.items():
            lines += [f".balign {alignment}, 0xcc", f"{spell(label)}:"]
            for start in range(0, len(content), 32):
                lines.append("    .byte " + ", ".join(map(str, content[start:start + 32])))
    lines.append(f".size {name}, . - {name}")
    return lines
