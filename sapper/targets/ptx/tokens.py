"""PTX text as tokens: the emulator and assembly by hand read them.

Enters: text. Leaves: `Token`s without blanks and comments, and the values of numbers. Holds: each token knows its line;
what is no PTX raises TokenError with the line. Source: PTX ISA, chapter "Syntax".
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

_SPACE = r"(?:\s+|//[^\n]*|/\*.*?\*/)*+"
_TOKEN = re.compile(_SPACE + r"""(?:
    (?P<name>[%$A-Za-z_][\w$]*+(?:::[\w$]+)*+) | (?P<mark>[][{}(),;:|@!+*<>=~&/-]) | (?P<directive>\.\w++(?:::\w+)*+) |
    (?P<number>(?:0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]{1,16}U?|
                  [0-9]+\.[0-9]+(?:[eE][+-]?[0-9]+)?|0[0-7]{0,22}U?|[1-9][0-9]{0,19}U?)(?![0-9a-fA-F])) |
    (?P<string>"(?:\\.|[^"\\])*") | (?P<end>\Z))""", re.VERBOSE | re.DOTALL)
"""A token, and what blanks and comments come before it. No two kinds begin alike: the most frequent are tried first."""


class TokenError(ValueError):
    """Text that is no PTX. line: of it, from 1."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


class Token(NamedTuple):
    """kind: string, number, directive, name or mark. start, end: places in the text."""

    kind: str
    text: str
    line: int
    start: int
    end: int


def tokens(text: str) -> list[Token]:
    """All tokens, in order."""
    found: list[Token] = []
    position, line, count, new, add = 0, 1, text.count, tuple.__new__, found.append
    for match in iter(_TOKEN.scanner(text).match, None):  # type: ignore[attr-defined]
        kind = match.lastgroup
        start, end = match.span(kind)
        if start > position and (start > position + 1 or text[position] == "\n"):
            line += count("\n", position, start)
        if kind == "end":
            return found
        add(new(Token, (kind, text[start:end], line, start, end)))
        if kind == "string":
            line += count("\n", start, end)
        position = end
    start = position + len(re.match(_SPACE, text[position:], re.DOTALL).group())  # type: ignore[union-attr]
    raise TokenError(f"found {text[start:start + 20]!r}, expected PTX", line + count("\n", position, start))


def number(text: str) -> tuple[int, float | None]:
    """(bits, value) of a number: bits of an integer, or of a float that is written by its bits; the value where it is
    a float. Bits of a decimal float depend on its type, and are 0 here."""
    if text[:2] in ("0f", "0F"):
        bits = int(text[2:], 16)
        return bits, float(struct.unpack("<f", struct.pack("<I", bits))[0])
    if text[:2] in ("0d", "0D"):
        bits = int(text[2:], 16)
        return bits, float(struct.unpack("<d", struct.pack("<Q", bits))[0])
    if "." in text:
        return 0, float(text)
    digits = text.rstrip("U")
    octal = len(digits) > 1 and digits[0] == "0" and digits[1] not in "xX"
    return int(digits, 8 if octal else 0), None
