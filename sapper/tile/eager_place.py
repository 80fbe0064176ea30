"""Where the author's function stands while it runs, and errors there.

Enters: the running call, found on Python's stack. Leaves: a place in the author's file, the names that the call's value
goes to, a KernelError. Holds: frames of sapper's own lang and tile packages are passed over.
"""

from __future__ import annotations

import dis
import itertools
import sys
from types import CodeType, FrameType
from typing import NoReturn

from ..ir.nodes import Location
from ..lang.errors import KernelError


def author_frame() -> FrameType:
    """The innermost frame outside sapper's own lang and tile packages: the author's line."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("sapper.lang.", "sapper.tile.")):
        frame = frame.f_back
    assert frame is not None
    return frame


def author_place() -> Location:
    frame = author_frame()
    file, line = frame.f_code.co_filename, frame.f_lineno
    position = next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None), None)
    if position is None or position[2] is None or position[3] is None or position[0] != line:
        return Location(file, line)
    return Location(file, line, position[2] + 1, max(position[2], position[3] if position[1] == line else 0) + 1)


def fail(kind: str, headline: str, found: str = "", expected: str = "", mend: str = "") -> NoReturn:
    raise KernelError(kind, headline, author_place(), found, expected, mend)


_targets: dict[tuple[CodeType, int], list[str]] = {}


def assigned_names() -> list[str]:
    """The names that the value of the running call is about to be stored to: the loop variables of
    `for m, n in tiles(M, N)`, or n of `n = whole(N)`. Empty if it goes elsewhere."""
    frame = author_frame()
    key = (frame.f_code, frame.f_lasti)
    names = _targets.get(key)
    if names is None:
        names = _targets[key] = []
        for instruction in dis.get_instructions(frame.f_code):
            if instruction.offset <= frame.f_lasti:
                continue
            if instruction.opname.startswith("STORE_") and instruction.argval is not None:
                stored = instruction.argval
                names.extend(stored if isinstance(stored, tuple) else [str(stored)])
            elif instruction.opname not in ("GET_ITER", "FOR_ITER", "UNPACK_SEQUENCE", "CACHE", "NOP", "EXTENDED_ARG"):
                break
    return names
