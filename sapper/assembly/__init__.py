"""Assembly by hand: notation, text, checks, interpreter, and what it may stand for.

    notation   rows as Python callables          text         Intel and AT&T syntax -> the same
    build      machine IR from them, with code   static       what must hold on every path, at the author's line
    effects    what a piece reads and writes     emulate      runs it from the meanings of its rows
    override   a kernel or an op done by hand    mutate       planted errors, all of which must be found

Holds: nothing here names a target; what differs is asked of `sapper/targets/<family>/assembly.py`.
"""

from __future__ import annotations

from . import x86 as x86
