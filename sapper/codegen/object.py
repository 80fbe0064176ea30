"""Encoded functions -> ELF64 files for Linux: an object (.o) that any linker takes, a shared library (.so), or a
static executable.

Enters: `Part`s, each a function, and `areas`, zeroed writable memory that they share. Leaves: the bytes of the file.
Holds: same input, same bytes; the stack is marked as not executable, and no segment is writable and executable.
A function reaches another, or an area, through the relocations of its code: between functions they are resolved here,
and in a shared library all are, so it has none left. With `debug` the file says where code comes from (dwarf.py).
Backtraces pass through functions that have frame rows (unwind.py). `system` says for what processors a file is.

    .o   .text  .bss  .note.GNU-stack  .eh_frame  .debug_*  .symtab .strtab .shstrtab, .rela.*: for the linker
    an executable   headers and .text | .bss | not loaded: the rest
    .so  read only: headers .hash .dynsym .dynstr .eh_frame_hdr .eh_frame | executable: .text | writable: .dynamic .bss
         | not loaded: the rest

Of a library's loaded sections the address is the offset in the file.
Source: System V ABI, chapters 4 and 5 (object files, program loading), and its supplements (targets/system.py).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..ir.nodes import Location
from ..targets.system import System
from ..targets.x86_64.system import SYSTEM
from .dwarf import Fixup, Lines, debug_sections
from .encode import EncodedCode
from .unwind import HEADER_BYTES, HEADER_ENTRY_BYTES, Frames, Row, debug_frame, eh_frame, eh_frame_header

_HEADER_BYTES, _SECTION_BYTES, _SYMBOL_BYTES, _SEGMENT_BYTES, _RELA_BYTES = 64, 64, 24, 56, 24
_PROGBITS, _SYMTAB, _STRTAB, _RELA, _HASH, _DYNAMIC, _NOBITS, _DYNSYM = 1, 2, 3, 4, 5, 6, 8, 11
_WRITE, _ALLOC, _EXECUTE, _INFO_LINK = 1, 2, 4, 0x40
_LOCAL, _GLOBAL = 0, 1
_OBJECT, _FUNCTION, _SECTION = 1, 2, 3
_RELOCATABLE, _EXECUTABLE, _SHARED = 1, 2, 3
_BASE = 0x400000
"""Where an executable is loaded."""
_LOAD, _DYNAMIC_SEGMENT, _GNU_STACK, _GNU_EH_FRAME = 1, 2, 0x6474E551, 0x6474E550
_DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT, _DT_SONAME = 4, 5, 6, 10, 11, 14
_AREA_ALIGN = 64


@dataclass(frozen=True, slots=True)
class Part:
    """One function. exported: others may call it by its name. source: where the author defined it, for debuggers.
    frame: how its frame lies, for who unwinds the stack."""

    name: str
    code: EncodedCode
    exported: bool = True
    source: Location | None = None
    frame: Sequence[Row] = ()


@dataclass(slots=True)
class _Content:
    """A section. size_bytes: of one without content in the file. address: 0 for what is not loaded."""

    name: str
    kind: int
    flags: int = 0
    content: bytes = b""
    link: str = ""
    info: int | str = 0
    align: int = 1
    entry_bytes: int = 0
    size_bytes: int = 0
    address: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class _Symbol:
    name: str
    kind: int
    section: str
    value: int
    size_bytes: int
    bind: int


class _Layout:
    """.text with all functions in it, the areas of .bss, and what of the code still waits for the address of .bss.

    places, areas: name -> (offset, bytes). waiting: (offset in .text, offset in .bss, addend).
    """

    def __init__(self, parts: Sequence[Part], areas: Mapping[str, int]) -> None:
        if not parts:
            raise ValueError("object file: found no function; expected at least one")
        self.parts = parts
        self.align = 16
        self.places: dict[str, tuple[int, int]] = {}
        text = bytearray()
        for part in parts:
            _check_name(part.name)
            if part.name in self.places:
                raise ValueError(f"object file: found function {part.name!r} twice; expected each name once")
            text += b"\xcc" * (-len(text) % part.code.align_bytes)
            self.places[part.name] = len(text), len(part.code.code)
            text += part.code.code
            self.align = max(self.align, part.code.align_bytes)
        self.areas: dict[str, tuple[int, int]] = {}
        self.bss_bytes = 0
        for name, size_bytes in areas.items():
            _check_name(name)
            self.areas[name] = self.bss_bytes, size_bytes
            self.bss_bytes += -(-size_bytes // _AREA_ALIGN) * _AREA_ALIGN
        self.waiting: list[tuple[int, int, int]] = []
        for part in parts:
            start = self.places[part.name][0]
            for offset, label, addend in part.code.relocations:
                field = start + offset
                if label in self.places:
                    text[field:field + 4] = struct.pack("<i", self.places[label][0] + addend - field)
                elif label in self.areas:
                    self.waiting.append((field, self.areas[label][0], addend))
                else:
                    raise ValueError(f"object file: function {part.name} reaches {label!r}; expected a function or an "
                                     f"area of the file: {', '.join([*self.places, *self.areas])}")
        self.text = text

    def place_bss(self, distance: int) -> bytes:
        """.text for a .bss that starts so many bytes after it."""
        text = bytearray(self.text)
        for field, area, addend in self.waiting:
            text[field:field + 4] = struct.pack("<i", distance + area + addend - field)
        return bytes(text)

    def lines(self) -> list[Lines]:
        return [Lines(p.name, self.places[p.name][0], p.code.code_bytes, p.code.line_table, p.source, p.exported)
                for p in self.parts]

    def frames(self) -> list[Frames]:
        return [Frames(self.places[p.name][0], p.code.code_bytes, p.frame) for p in self.parts]

    def symbols(self, base: int = 0, bss: int = 0) -> list[_Symbol]:
        """Local ones first. base, bss: addresses of .text and .bss."""
        hidden: list[_Symbol] = []
        exported: list[_Symbol] = []
        for part in self.parts:
            start, size_bytes = self.places[part.name]
            bind = _GLOBAL if part.exported else _LOCAL
            (exported if part.exported else hidden).append(
                _Symbol(part.name, _FUNCTION, ".text", base + start, size_bytes, bind))
        hidden += [_Symbol(name, _OBJECT, ".bss", bss + start, size_bytes, _LOCAL)
                   for name, (start, size_bytes) in self.areas.items()]
        return hidden + exported


def _check_name(name: str) -> None:
    if not name or "\0" in name:
        raise ValueError(f"object file: found function name {name!r}; expected text without NUL")


def _strings(names: Sequence[str]) -> tuple[bytes, dict[str, int]]:
    """A string table and where each name is in it."""
    table, places = bytearray(b"\0"), {"": 0}
    for name in names:
        if name not in places:
            places[name] = len(table)
            table += name.encode() + b"\0"
    return bytes(table), places


def _symbol_table(
    symbols: Sequence[_Symbol], string_at: Mapping[str, int], numbers: Mapping[str, int]
) -> tuple[bytes, int]:
    """The table, and the number of its first symbol that is not local."""
    table = bytearray(_SYMBOL_BYTES)
    for s in symbols:
        table += struct.pack("<IBBHQQ", string_at[s.name], s.bind << 4 | s.kind, 0, numbers[s.section], s.value,
                             s.size_bytes)
    return bytes(table), 1 + sum(s.bind == _LOCAL for s in symbols)


def _file(kind: int, sections: list[_Content], segments: Sequence[bytes], body: bytearray, system: System,
          entry: int = 0) -> bytes:
    """The whole file. body: what comes before the section headers, with room for the file's own header. entry: address
    at which a program begins."""
    names, name_at = _strings([s.name for s in sections] + [".shstrtab"])
    sections.append(_Content(".shstrtab", _STRTAB, content=names, offset=len(body)))
    body += names
    numbers = {s.name: i for i, s in enumerate(sections, 1)}
    body += bytes(-len(body) % 8)
    headers = bytearray(_SECTION_BYTES)
    for s in sections:
        info = numbers[s.info] if isinstance(s.info, str) else s.info
        headers += struct.pack("<IIQQQQIIQQ", name_at[s.name], s.kind, s.flags, s.address, s.offset,
                               len(s.content) or s.size_bytes, numbers.get(s.link, 0), info, s.align, s.entry_bytes)
    body[:_HEADER_BYTES] = struct.pack(
        "<4sBBBBQHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 0, kind, system.machine, 1, entry,
        _HEADER_BYTES if segments else 0, len(body), system.flags, _HEADER_BYTES, _SEGMENT_BYTES if segments else 0,
        len(segments), _SECTION_BYTES, len(sections) + 1, len(sections))
    table = b"".join(segments)
    body[_HEADER_BYTES:_HEADER_BYTES + len(table)] = table
    return bytes(body + headers)


def _append(body: bytearray, section: _Content, loaded: bool = False) -> None:
    """Put a section at the end of the file; one that is loaded has its offset as address."""
    body += bytes(-len(body) % section.align)
    section.offset = len(body)
    if loaded:
        section.address = section.offset
    body += section.content


def _symbol_sections(symbols: Sequence[_Symbol], before: Sequence[_Content]) -> list[_Content]:
    """.symtab and .strtab. before: the sections that come before, which the symbols name."""
    strings, string_at = _strings([s.name for s in symbols])
    table, first_global = _symbol_table(symbols, string_at, {s.name: i for i, s in enumerate(before, 1)})
    return [_Content(".symtab", _SYMTAB, 0, table, ".strtab", first_global, 8, _SYMBOL_BYTES),
            _Content(".strtab", _STRTAB, content=strings)]


def write_object(parts: Sequence[Part], areas: Mapping[str, int] | None = None, debug: bool = False,
                 system: System = SYSTEM) -> bytes:
    """The object file with every function in its .text, each aligned as it asks, and areas (name -> bytes) in .bss.

    Raises ValueError for an empty set, for a name that is empty, contains a NUL or stands twice, and for code that
    reaches what is not in the file.
    """
    layout = _Layout(parts, areas or {})
    sections = [_Content(".text", _PROGBITS, _ALLOC | _EXECUTE, bytes(layout.text), align=layout.align)]
    if layout.areas:
        sections.append(_Content(".bss", _NOBITS, _ALLOC | _WRITE, align=_AREA_ALIGN, size_bytes=layout.bss_bytes))
    sections.append(_Content(".note.GNU-stack", _PROGBITS))
    fixups: list[Fixup] = []
    if any(part.frame for part in parts):
        frames, fixups, _ = eh_frame(layout.frames())
        sections.append(_Content(".eh_frame", _PROGBITS, _ALLOC, frames, align=8))
    if debug:
        made = debug_sections(layout.lines())
        fixups = fixups + made.fixups
        sections += [_Content(name, _PROGBITS, content=content) for name, content in made.contents.items()]
    # Relocations name sections by the symbols that stand for them.
    targets = dict.fromkeys([*(f.target for f in fixups), *([".bss"] if layout.waiting else [])])
    symbols = [_Symbol("", _SECTION, name, 0, 0, _LOCAL) for name in targets] + layout.symbols()
    number_of = {name: i for i, name in enumerate(targets, 1)}
    tables: dict[str, bytearray] = {}

    def relocate(section: str, offset: int, target: str, kind: int, addend: int) -> None:
        tables.setdefault(section, bytearray()).extend(
            struct.pack("<QQq", offset, number_of[target] << 32 | kind, addend))

    for field, area, addend in layout.waiting:
        relocate(".text", field, ".bss", system.relative_32, area + addend)
    for f in fixups:
        kind = system.relative_32 if f.relative else system.absolute_64 if f.size_bytes == 8 else system.absolute_32
        relocate(f.section, f.offset, f.target, kind, f.addend)
    sections += [_Content(f".rela{name}", _RELA, _INFO_LINK, bytes(table), ".symtab", name, 8, _RELA_BYTES)
                 for name, table in tables.items()]
    sections += _symbol_sections(symbols, sections)
    body = bytearray(_HEADER_BYTES)
    for section in sections:
        _append(body, section)
    return _file(_RELOCATABLE, sections, (), body, system)


def elf_hash(name: str) -> int:
    """The hash function of DT_HASH (chapter 5, hash table)."""
    value = 0
    for byte in name.encode():
        value = (value << 4) + byte
        high = value & 0xF0000000
        value = (value ^ high >> 24) & ~high & 0xFFFFFFFF
    return value


def _hash_table(names: Sequence[str]) -> bytes:
    """Buckets and chains for the symbols 1, 2, ... of these names."""
    count = max(1, len(names))
    buckets, chains = [0] * count, [0] * (len(names) + 1)
    for number, name in enumerate(names, 1):
        bucket = elf_hash(name) % count
        chains[number], buckets[bucket] = buckets[bucket], number
    return struct.pack(f"<{2 + count + len(chains)}I", count, len(chains), *buckets, *chains)


def write_shared_object(
    parts: Sequence[Part], soname: str, areas: Mapping[str, int] | None = None, debug: bool = False,
    exported_areas: bool = False, system: System = SYSTEM,
) -> bytes:
    """A shared library with the exported functions, ready to be loaded and linked against: no linker has to run.

    soname: what programs that are linked against it ask for. exported_areas: areas are symbols too.
    Raises ValueError as `write_object` does.
    """
    layout = _Layout(parts, areas or {})
    exported = [s for s in layout.symbols() if s.bind == _GLOBAL or (exported_areas and s.kind == _OBJECT)]
    exported = [_Symbol(s.name, s.kind, s.section, s.value, s.size_bytes, _GLOBAL) for s in exported]
    strings, string_at = _strings([*(s.name for s in exported), soname])
    segment_count = 6
    body = bytearray(_HEADER_BYTES + segment_count * _SEGMENT_BYTES)
    hashes = _Content(".hash", _HASH, _ALLOC, _hash_table([s.name for s in exported]), ".dynsym", align=8,
                      entry_bytes=4)
    dynsym = _Content(".dynsym", _DYNSYM, _ALLOC, bytes(_SYMBOL_BYTES * (1 + len(exported))), ".dynstr", 1, 8,
                      _SYMBOL_BYTES)
    dynstr = _Content(".dynstr", _STRTAB, _ALLOC, strings)
    # Their contents need the address of .text; their sizes do not.
    frames, _, entries_at = eh_frame(layout.frames())
    header = _Content(".eh_frame_hdr", _PROGBITS, _ALLOC, bytes(HEADER_BYTES + HEADER_ENTRY_BYTES * len(entries_at)),
                      align=4)
    unwinding = _Content(".eh_frame", _PROGBITS, _ALLOC, frames, align=8)
    for section in (hashes, dynsym, dynstr, header, unwinding):
        _append(body, section, loaded=True)
    read_end = len(body)
    text = _Content(".text", _PROGBITS, _ALLOC | _EXECUTE, bytes(layout.text),
                    align=max(layout.align, system.page_bytes))
    _append(body, text, loaded=True)
    dynamic = _Content(".dynamic", _DYNAMIC, _ALLOC | _WRITE, bytes(16 * 7), ".dynstr", align=system.page_bytes,
                       entry_bytes=16)
    _append(body, dynamic, loaded=True)
    write_end = len(body)
    bss = _Content(".bss", _NOBITS, _ALLOC | _WRITE, align=_AREA_ALIGN, size_bytes=layout.bss_bytes)
    bss.offset = bss.address = -(-write_end // _AREA_ALIGN) * _AREA_ALIGN

    text.content = layout.place_bss(bss.address - text.address)
    body[text.offset:text.offset + len(text.content)] = text.content
    unwinding.content = eh_frame(layout.frames(), text.address - unwinding.address)[0]
    header.content = eh_frame_header(entries_at, unwinding.address - header.address, text.address - header.address)
    for section in (header, unwinding):
        body[section.offset:section.offset + len(section.content)] = section.content
    loaded = [hashes, dynsym, dynstr, header, unwinding, text, dynamic, bss]
    numbers = {s.name: i for i, s in enumerate(loaded, 1)}
    addresses = {".text": text.address, ".bss": bss.address}
    placed = [_Symbol(s.name, s.kind, s.section, addresses[s.section] + s.value, s.size_bytes, s.bind)
              for s in exported]
    dynsym.content = _symbol_table(placed, string_at, numbers)[0]
    body[dynsym.offset:dynsym.offset + len(dynsym.content)] = dynsym.content
    entries = [(_DT_SONAME, string_at[soname]), (_DT_HASH, hashes.address), (_DT_STRTAB, dynstr.address),
               (_DT_SYMTAB, dynsym.address), (_DT_STRSZ, len(strings)), (_DT_SYMENT, _SYMBOL_BYTES), (0, 0)]
    dynamic.content = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    body[dynamic.offset:write_end] = dynamic.content

    rest: list[_Content] = []
    if debug:
        made = debug_sections(layout.lines(), text.address)
        rest += [_Content(name, _PROGBITS, content=content) for name, content in made.contents.items()]
    rest += _symbol_sections(layout.symbols(text.address, bss.address), loaded)
    for section in rest:
        _append(body, section)
    read, write, execute = 4, 2, 1
    memory_end = bss.address + bss.size_bytes

    def segment(kind: int, flags: int, begin: int, file_end: int, end: int, align: int) -> bytes:
        return struct.pack("<IIQQQQQQ", kind, flags, begin, begin, begin, file_end - begin, end - begin, align)

    text_end = text.offset + len(text.content)
    segments = (
        segment(_LOAD, read, 0, read_end, read_end, system.page_bytes),
        segment(_LOAD, read | execute, text.offset, text_end, text_end, system.page_bytes),
        segment(_LOAD, read | write, dynamic.offset, write_end, memory_end, system.page_bytes),
        segment(_DYNAMIC_SEGMENT, read | write, dynamic.offset, write_end, write_end, 8),
        segment(_GNU_STACK, read | write, 0, 0, 0, 16),
        segment(_GNU_EH_FRAME, read, header.offset, header.offset + len(header.content),
                header.offset + len(header.content), 4),
    )
    assert len(segments) == segment_count
    return _file(_SHARED, [*loaded, *rest], segments, body, system)


def write_executable(
    parts: Sequence[Part], entry: str, areas: Mapping[str, int] | None = None, debug: bool = False,
    system: System = SYSTEM,
) -> bytes:
    """A static executable that begins at the function `entry`, with no interpreter and no library.

    Raises ValueError as `write_object` does, and for an entry that is not there.
    """
    layout = _Layout(parts, areas or {})
    if entry not in layout.places:
        raise ValueError(f"executable: found no function {entry!r}; expected the entry among the functions")
    segment_count = 3
    body = bytearray(_HEADER_BYTES + segment_count * _SEGMENT_BYTES)
    text = _Content(".text", _PROGBITS, _ALLOC | _EXECUTE, bytes(layout.text),
                    align=max(layout.align, system.page_bytes))
    _append(body, text)
    text_end = len(body)
    text.address = _BASE + text.offset
    bss = _Content(".bss", _NOBITS, _ALLOC | _WRITE, align=_AREA_ALIGN, size_bytes=layout.bss_bytes, offset=text_end)
    bss.address = _BASE + -(-text_end // system.page_bytes) * system.page_bytes
    text.content = layout.place_bss(bss.address - text.address)
    body[text.offset:text_end] = text.content
    sections = [text, bss]
    if debug:
        made = debug_sections(layout.lines(), text.address)
        sections += [_Content(name, _PROGBITS, content=content) for name, content in made.contents.items()]
    sections += _symbol_sections(layout.symbols(text.address, bss.address), sections)
    for section in sections[2:]:
        _append(body, section)
    read, write, execute = 4, 2, 1

    def segment(kind: int, flags: int, address: int, file_bytes: int, size_bytes: int, align: int) -> bytes:
        offset = address - _BASE if address else 0
        return struct.pack("<IIQQQQQQ", kind, flags, offset, address, address, file_bytes, size_bytes, align)

    segments = [segment(_LOAD, read | execute, _BASE, text_end, text_end, system.page_bytes)]
    if bss.size_bytes:
        segments.append(segment(_LOAD, read | write, bss.address, 0, bss.size_bytes, system.page_bytes))
    segments.append(segment(_GNU_STACK, read | write, 0, 0, 0, 16))
    assert len(segments) <= segment_count
    return _file(_EXECUTABLE, sections, segments, body, system, text.address + layout.places[entry][0])


def write_loaded(name: str, address: int, size_bytes: int, lines: Sequence[tuple[int, Location]],
                 source: Location | None, frame: Sequence[Row] = ()) -> bytes:
    """An object that describes code which lies in memory already: its symbol, lines and frame, without the code.

    This is what gdb reads through its JIT interface. lines: (offset, location). Symbols count from .text.
    """
    made = debug_sections([Lines(name, 0, size_bytes, lines, source)], address)
    made.contents[".debug_frame"] = debug_frame(Frames(0, size_bytes, frame), address)
    sections = [_Content(".text", _NOBITS, _ALLOC | _EXECUTE, align=16, size_bytes=size_bytes, address=address)]
    sections += [_Content(section, _PROGBITS, content=content) for section, content in made.contents.items()]
    sections += _symbol_sections([_Symbol(name, _FUNCTION, ".text", 0, size_bytes, _GLOBAL)], sections)
    body = bytearray(_HEADER_BYTES)
    for section in sections:
        _append(body, section)
    return _file(_RELOCATABLE, sections, (), body, SYSTEM)
