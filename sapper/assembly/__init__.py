"""Assembly by hand: notation, text, checks, interpreter, and what it may stand for.

    notation   rows as Python callables          text         Intel and AT&T syntax -> the same
    build      machine IR from them, with code   static       what must hold on every path, at the author's line
    footprint  where each access lies            polynomial   what follows from inequalities between extents
    effects    what a piece reads and writes     emulate      runs it from the meanings of its rows
    override   a kernel or an op done by hand    mutate       planted errors, all of which must be found
    warp       the same where the target's assembler gives registers; warp_checks: what must hold of it

Holds: nothing here names a target but `x86` and `ptx`, which users write with; what differs is asked of
`sapper/targets/<family>/assembly.py`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """A family's notation, loaded when it is first used."""
    if name not in ("ptx", "x86"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f".{name}", __name__)
