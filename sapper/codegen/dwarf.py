"""Where code comes from, as DWARF 4: what gdb, perf, objdump and addr2line need to show an instruction's Python line.

Enters: functions with their places and line tables. Leaves: the sections .debug_abbrev, .debug_info and .debug_line,
and the fields in them that hold an address or an offset, for files that are still to be linked.
Holds: one compilation unit; one sequence of rows for each function that has a line table; its first row, from the
function's start on, is the line of its `def`.
Source: DWARF Debugging Information Format version 4, sections 3.1, 3.3, 6.2, 7.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..ir.nodes import Location

_VERSION = 4
_PYTHON = 0x14
_COMPILE_UNIT, _SUBPROGRAM = 0x11, 0x2E
_NAME, _STMT_LIST, _LOW_PC, _HIGH_PC, _LANGUAGE = 0x03, 0x10, 0x11, 0x12, 0x13
_COMP_DIR, _PRODUCER, _DECL_FILE, _DECL_LINE, _EXTERNAL = 0x1B, 0x25, 0x3A, 0x3B, 0x3F
_ADDR, _DATA2, _DATA4, _DATA8, _STRING, _FLAG, _SEC_OFFSET = 0x01, 0x05, 0x06, 0x07, 0x08, 0x0C, 0x17
_COPY, _ADVANCE_PC, _ADVANCE_LINE, _SET_FILE, _SET_COLUMN = 1, 2, 3, 4, 5
_END_SEQUENCE, _SET_ADDRESS = 1, 2
_OPERANDS = bytes((0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1))
"""How many operands the standard opcodes 1 to 12 have."""


@dataclass(frozen=True, slots=True)
class Lines:
    """One function. start, size_bytes: its code in .text. table: (offset in the function, location) in order.

    source: where the function is defined; None for one that was written by no author, which gets no rows.
    """

    name: str
    start: int
    size_bytes: int
    table: Sequence[tuple[int, Location]]
    source: Location | None = None
    exported: bool = True


@dataclass(frozen=True, slots=True)
class Fixup:
    """A field of size_bytes at `offset` of `section` that holds the address of section `target`, plus `addend`.

    relative: less the field's own address.
    """

    section: str
    offset: int
    size_bytes: int
    target: str
    addend: int
    relative: bool = False


@dataclass(slots=True)
class DebugSections:
    contents: dict[str, bytes]
    fixups: list[Fixup] = field(default_factory=list)


def unsigned(value: int) -> bytes:
    """ULEB128 (7.6)."""
    out = bytearray()
    while True:
        low, value = value & 0x7F, value >> 7
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


def signed(value: int) -> bytes:
    """SLEB128 (7.6)."""
    out = bytearray()
    while True:
        low, value = value & 0x7F, value >> 7
        done = (value == 0 and not low & 0x40) or (value == -1 and low & 0x40)
        out.append(low | (0 if done else 0x80))
        if done:
            return bytes(out)


def _text(value: str) -> bytes:
    return value.encode("utf-8", "surrogateescape").replace(b"\0", b"?") + b"\0"


def debug_sections(functions: Sequence[Lines], text_address: int = 0) -> DebugSections:
    """The three sections. text_address: of .text, 0 where a linker will give it one; fixups say where it goes."""
    files = _Files()
    lines, line_fixups = _line_section(functions, text_address, files)
    info, info_fixups = _info_section(functions, text_address, files)
    return DebugSections({".debug_abbrev": _abbreviations(), ".debug_info": info, ".debug_line": lines},
                         info_fixups + line_fixups)


class _Files:
    """Numbers of source files, from 1, in the order in which they are met."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, path: str) -> int:
        return self.numbers.setdefault(path, len(self.numbers) + 1)

    def tables(self) -> bytes:
        """The directories, then the files: name, number of the directory, no time or size (6.2.4)."""
        directories: dict[str, int] = {}
        files = bytearray()
        for path in self.numbers:
            directory, name = os.path.split(path)
            number = directories.setdefault(directory, len(directories) + 1) if directory else 0
            files += _text(name) + unsigned(number) + b"\0\0"
        return b"".join(map(_text, directories)) + b"\0" + bytes(files) + b"\0"


def _line_section(functions: Sequence[Lines], text_address: int, files: _Files) -> tuple[bytes, list[Fixup]]:
    program = bytearray()
    fields: list[tuple[int, int]] = []  # (offset in the program, offset in .text)
    for function in functions:
        if function.source is None:
            continue
        program += bytes((0, 9, _SET_ADDRESS))
        fields.append((len(program), function.start))
        program += struct.pack("<Q", text_address + function.start)
        here, line = 0, 1
        for offset, location in _rows(function):
            if offset > here:
                program += bytes((_ADVANCE_PC,)) + unsigned(offset - here)
            program += bytes((_SET_FILE,)) + unsigned(files.number(location.file))
            program += bytes((_SET_COLUMN,)) + unsigned(max(0, location.column))
            if location.line != line:
                program += bytes((_ADVANCE_LINE,)) + signed(location.line - line)
            program.append(_COPY)
            here, line = offset, location.line
        program += bytes((_ADVANCE_PC,)) + unsigned(function.size_bytes - here) + bytes((0, 1, _END_SEQUENCE))
    # Least instruction length, operations per instruction, default is_stmt, line base and range, opcode base.
    head = struct.pack("<BBBbBB", 1, 1, 1, -5, 14, 13) + _OPERANDS + files.tables()
    body = struct.pack("<HI", _VERSION, len(head)) + head
    section = struct.pack("<I", len(body) + len(program)) + body + bytes(program)
    begin = 4 + len(body)
    return section, [Fixup(".debug_line", begin + at, 8, ".text", addend) for at, addend in fields]


def _rows(function: Lines) -> list[tuple[int, Location]]:
    """The table with the `def` line where it says nothing: from the start to its first entry."""
    assert function.source is not None
    rows = list(function.table)
    if not rows or rows[0][0] > 0:
        rows.insert(0, (0, function.source))
    return rows


_UNIT_FORMS = ((_PRODUCER, _STRING), (_LANGUAGE, _DATA2), (_NAME, _STRING), (_COMP_DIR, _STRING), (_LOW_PC, _ADDR),
               (_HIGH_PC, _DATA8), (_STMT_LIST, _SEC_OFFSET))
_FUNCTION_FORMS = ((_NAME, _STRING), (_EXTERNAL, _FLAG), (_LOW_PC, _ADDR), (_HIGH_PC, _DATA8))
_SOURCE_FORMS = (*_FUNCTION_FORMS, (_DECL_FILE, _DATA4), (_DECL_LINE, _DATA4))


def _abbreviations() -> bytes:
    table = bytearray()
    for code, (tag, children, forms) in enumerate(((_COMPILE_UNIT, 1, _UNIT_FORMS), (_SUBPROGRAM, 0, _FUNCTION_FORMS),
                                                   (_SUBPROGRAM, 0, _SOURCE_FORMS)), 1):
        table += unsigned(code) + unsigned(tag) + bytes((children,))
        for attribute, form in forms:
            table += unsigned(attribute) + unsigned(form)
        table += b"\0\0"
    return bytes(table) + b"\0"


def _info_section(functions: Sequence[Lines], text_address: int, files: _Files) -> tuple[bytes, list[Fixup]]:
    """One unit that spans all functions, and a subprogram for each."""
    out = bytearray(struct.pack("<IHIB", 0, _VERSION, 0, 8))
    fixups = [Fixup(".debug_info", 6, 4, ".debug_abbrev", 0)]

    def address(offset: int) -> None:
        fixups.append(Fixup(".debug_info", len(out), 8, ".text", offset))
        out.extend(struct.pack("<Q", text_address + offset))

    named = next((f.source.file for f in functions if f.source is not None), "")
    begin = min((f.start for f in functions), default=0)
    end = max((f.start + f.size_bytes for f in functions), default=0)
    out += unsigned(1) + _text("sapper") + struct.pack("<H", _PYTHON) + _text(named) + _text(os.path.dirname(named))
    address(begin)
    out += struct.pack("<Q", end - begin)
    fixups.append(Fixup(".debug_info", len(out), 4, ".debug_line", 0))
    out += struct.pack("<I", 0)
    for function in functions:
        out += unsigned(2 if function.source is None else 3) + _text(function.name) + bytes((function.exported,))
        address(function.start)
        out += struct.pack("<Q", function.size_bytes)
        if function.source is not None:
            out += struct.pack("<II", files.number(function.source.file), function.source.line)
    out.append(0)
    out[:4] = struct.pack("<I", len(out) - 4)
    return bytes(out), fixups
