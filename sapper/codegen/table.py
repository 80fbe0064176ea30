"""Constant tables that stand beside functions: numbers, and where functions are.

Enters: lines of numbers and names. Leaves: bytes with their relocations, and lines for GNU as with the same bytes.
Holds: a name stands for its distance from the table's start, so that a table needs no relocation when it is loaded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .encode import EncodedCode

Value = int | str
"""A number, or the name of a function or table of the file."""
_DIRECTIVES = {1: ".byte", 4: ".long", 8: ".quad"}


@dataclass(frozen=True, slots=True)
class Line:
    """Numbers of size_bytes each (1, 4 or 8), on a line with a comment; without numbers, a line of comment.

    words: how numbers are spelled, by position, where a name says more (names of `symbols`).
    """

    size_bytes: int = 4
    values: Sequence[Value] = ()
    comment: str = ""
    words: Mapping[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class Table:
    """name: of the table in the file. symbols: numbers that have a name in its lines."""

    name: str
    lines: list[Line] = field(default_factory=list)
    symbols: Mapping[str, int] = field(default_factory=dict)
    align_bytes: int = 16

    def encoded(self) -> EncodedCode:
        content = bytearray()
        relocations: list[tuple[int, str, int]] = []
        for line in self.lines:
            for value in line.values:
                if isinstance(value, str):
                    if line.size_bytes != 4:
                        raise ValueError(f"table {self.name}: found {value} in {line.size_bytes} bytes; expected 4")
                    relocations.append((len(content), value, len(content)))
                    content += bytes(4)
                elif line.size_bytes == 8:
                    content += struct.pack("<q", value)
                else:
                    content += value.to_bytes(line.size_bytes, "little", signed=value < 0)
        return EncodedCode(bytes(content), len(content), {}, [], self.align_bytes, relocations)

    def text(self, spell: Callable[[str], str], comment: str = "#") -> list[str]:
        """Lines for GNU as. spell: a name of the file as its local label. comment: what begins one."""
        start = spell(self.name)
        lines = [f".balign {self.align_bytes}, 0xcc", f".type {self.name}, @object", f"{self.name}:", f"{start}:"]
        for line in self.lines:
            if not line.values:
                lines.append(f"{comment} {line.comment}" if line.comment else "")
                continue
            spelled = [line.words.get(i) or (f"{spell(v)} - {start}" if isinstance(v, str) else str(v))
                       for i, v in enumerate(line.values)]
            text = f"    {_DIRECTIVES[line.size_bytes]} {', '.join(spelled)}"
            lines.append(f"{text:<46}  {comment} {line.comment}" if line.comment else text)
        return [*lines, f".size {self.name}, . - {self.name}"]
