"""The error of assembly by hand: where the author wrote it, what was found, what was expected, the likely mend."""

from __future__ import annotations

import contextlib
import linecache
import os
import sys

from ..ir.nodes import Location
from ..lang.errors import advice

KINDS: dict[str, str] = {
    "callee-saved": "a register that the caller relies on is not restored",
    "clobber": "a register that the author holds, or has not declared, is overwritten",
    "effects": "what a piece does is not what it declares",
    "feature": "an instruction needs a feature that the target lacks",
    "flags": "flags are read that no instruction has set, or a comparison's flags are lost before they are read",
    "footprint": "memory outside what was declared",
    "loop": "a loop that can't be shown to end",
    "mixing": "256-bit code returns or calls without vzeroupper",
    "notation": "a line of assembly that means nothing",
    "operands": "no form of the instruction takes these operands",
    "read-only": "a store to an operand that may only be read",
    "registers": "the registers do not suffice",
    "result": "the result is not that of the operation which the code stands for",
    "running-off": "the code runs off its end",
    "stack": "the stack pointer is not where it must be",
    "state": "a mode of the processor is left changed",
    "undefined": "a register is read that holds nothing, or something stale",
    "unknown-instruction": "no row of the table has this mnemonic",
    "unreachable": "code that is never reached",
}


class AssemblyError(Exception):
    """Assembly by hand that is wrong. kind: an id from KINDS. location: the author's line, None where there is none."""

    def __init__(self, kind: str, headline: str, location: Location | None = None, found: str = "", expected: str = "",
                 mend: str = "") -> None:
        if kind not in KINDS:
            raise ValueError(f"unknown kind of error {kind!r}")
        super().__init__(headline)
        self.kind = kind
        self.headline = headline
        self.location = location
        self.found = found
        self.expected = expected
        self.mend = mend

    def __str__(self) -> str:
        lines = [f"{self.headline} [{self.kind}]"]
        place = self.location
        if place is not None:
            lines.append(f"  {place.file}:{place.line}")
            source = linecache.getline(place.file, place.line).strip()
            if source:
                lines.append(f"  {place.line} | {source}")
        lines += advice(self.found, self.expected, self.mend)
        return "\n".join(lines)


_OWN = (os.path.dirname(__file__), os.path.dirname(contextlib.__file__))


def author_location() -> Location | None:
    """The line of the innermost caller outside this package (and outside the machinery of `with`)."""
    frame = sys._getframe(1)
    while frame is not None and os.path.dirname(frame.f_code.co_filename) in _OWN:
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return None
    return Location(frame.f_code.co_filename, frame.f_lineno, 1, 1)
