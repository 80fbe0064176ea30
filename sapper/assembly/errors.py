"""The error of assembly by hand: where the author wrote it, what was found, what was expected, the likely mend."""

from __future__ import annotations

import contextlib
import linecache
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

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


MENDS: dict[str, str] = {
    "callee-saved": "push it at the start and pop it before each return",
    "clobber": "take another register, or save the value",
    "effects": "declare what it does, or mend the code",
    "feature": "ask for the feature, or write it otherwise",
    "flags": "set the flags right before they are read: cmp or test",
    "footprint": "end the loop earlier, or take the last elements one by one or under an opmask",
    "loop": "use a.loop(start, stop, step)",
    "mixing": "vzeroupper before it",
    "notation": "see the notation in docs/tour/11-a-block.md",
    "operands": "write one of the forms that are expected",
    "read-only": "declare it writable if it is an output",
    "registers": "hold fewer values at once",
    "result": "see which lanes are wrong, and run it under the interpreter of rows",
    "running-off": "end with x86.ret(), or jump back",
    "stack": "as many bytes pushed as popped, on every path",
    "state": "store the mode first and load it before the end",
    "undefined": "write it first, or declare it as input",
    "unknown-instruction": "add a row: docs/add-an-instruction.md shows it in ten lines",
    "unreachable": "delete it",
}
"""What usually mends an error of each kind, where it is not said more closely."""

assert MENDS.keys() == KINDS.keys()


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
        self.mend = mend or MENDS[kind]

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


class UnknownInstruction(AssemblyError, AttributeError):
    """A mnemonic that no row has. An AttributeError, too, for who asks whether a module of mnemonics has a name: that
    does not wait for the search for near ones, which `nearest` is, made when the message is read."""

    def __init__(self, headline: str, found: str, nearest: Callable[[], str], location: Location | None = None) -> None:
        self.nearest = nearest
        super().__init__("unknown-instruction", headline, location or author_location(), found)

    @property
    def expected(self) -> str:
        return self.nearest()

    @expected.setter
    def expected(self, value: str) -> None:
        """It is always what `nearest` says."""


def features_named(table: Any, text: str, who: str) -> frozenset[str]:
    """Features as authors name them, separated by blanks. Raises ValueError for one that no target has: the piece would
    never be used, and nothing would say so. who: for the message."""
    names = frozenset(text.split())
    known = table.known_features()
    for name in sorted(names - known):
        near = get_close_matches(name, sorted(known), 4, 0.5)
        listed = f"near: {', '.join(near)}" if near else ", ".join(sorted(known))
        raise ValueError(f"{who}: found the feature {name!r}; expected what a {table.FAMILY} may have; {listed}")
    return names


_OWN = (os.path.dirname(__file__), os.path.dirname(contextlib.__file__))


def author_location() -> Location | None:
    """The line of the innermost caller outside this package (and outside the machinery of `with`)."""
    frame = sys._getframe(1)
    while frame is not None and os.path.dirname(frame.f_code.co_filename) in _OWN:
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return None
    return Location(frame.f_code.co_filename, frame.f_lineno, 1, 1)
