"""Encoded functions -> an ELF64 relocatable object (.o) that any linker for x86-64 Linux takes.

Enters: names and `EncodedCode`. Leaves: the bytes of the file. Holds: one .text section, one global function symbol for
each function, no relocation; the stack is marked as not executable. Same input, same bytes.
Source: System V ABI, chapter 4 (object files); AMD64 supplement, 4.1.
"""

from __future__ import annotations

import struct

from .encode import EncodedCode

_HEADER_BYTES, _SECTION_BYTES, _SYMBOL_BYTES = 64, 64, 24
_PROGBITS, _SYMTAB, _STRTAB = 1, 2, 3
_ALLOC_EXECUTE = 0x2 | 0x4
_GLOBAL_FUNCTION = 1 << 4 | 2
_MACHINE_X86_64 = 62


def _strings(names: list[str]) -> tuple[bytes, dict[str, int]]:
    """A string table and where each name is in it."""
    table, places = b"\0", {"": 0}
    for name in names:
        if name not in places:
            places[name] = len(table)
            table += name.encode() + b"\0"
    return table, places


def write_object(functions: dict[str, EncodedCode]) -> bytes:
    """The object file with every function of `functions` (name -> code) in its .text, each aligned as it asks.

    Raises ValueError for an empty set, and for a name that is empty or contains a NUL.
    """
    if not functions:
        raise ValueError("object file: found no function; expected at least one")
    text = bytearray()
    places: list[tuple[str, int, int]] = []
    align = 16
    for name, encoded in functions.items():
        if not name or "\0" in name:
            raise ValueError(f"object file: found function name {name!r}; expected text without NUL")
        text += b"\xcc" * (-len(text) % encoded.align_bytes)
        places.append((name, len(text), len(encoded.code)))
        text += encoded.code
        align = max(align, encoded.align_bytes)
    strings, string_at = _strings([name for name, _, _ in places])
    symbols = bytes(_SYMBOL_BYTES) + b"".join(
        struct.pack("<IBBHQQ", string_at[name], _GLOBAL_FUNCTION, 0, 1, start, size) for name, start, size in places)
    # name, type, flags, content, link, info, alignment, entry size. The first symbol that is not local is number 1.
    sections = [
        (".text", _PROGBITS, _ALLOC_EXECUTE, bytes(text), 0, 0, align, 0),
        (".note.GNU-stack", _PROGBITS, 0, b"", 0, 0, 1, 0),
        (".symtab", _SYMTAB, 0, symbols, 4, 1, 8, _SYMBOL_BYTES),
        (".strtab", _STRTAB, 0, strings, 0, 0, 1, 0),
    ]
    section_names, name_at = _strings([*(s[0] for s in sections), ".shstrtab"])
    sections.append((".shstrtab", _STRTAB, 0, section_names, 0, 0, 1, 0))
    body = bytearray(_HEADER_BYTES)
    headers = bytes(_SECTION_BYTES)
    for name, kind, flags, content, link, info, alignment, entry in sections:
        body += bytes(-len(body) % alignment)
        headers += struct.pack("<IIQQQQIIQQ", name_at[name], kind, flags, 0, len(body), len(content), link, info,
                               alignment, entry)
        body += content
    body += bytes(-len(body) % 8)
    body[:_HEADER_BYTES] = struct.pack(
        "<4sBBBBQHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 0, 1, _MACHINE_X86_64, 1, 0, 0, len(body), 0, _HEADER_BYTES, 0,
        0,
        _SECTION_BYTES, len(sections) + 1, len(sections))
    return bytes(body + headers)
