"""Where reports are printed: as wide as the terminal, and wide enough for every table where there is none; and how
times are written in them."""

from __future__ import annotations

import signal
import sys
from typing import Any, NoReturn

from .signals import Ended

WIDTH = 140


def console() -> Any:
    """A rich Console on standard output."""
    from rich.console import Console

    made = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    made.on_broken_pipe = _end      # type: ignore[method-assign]
    return made


def _end() -> NoReturn:
    """The reader went away: rich would end the process with a status of 1."""
    raise Ended(signal.SIGPIPE)


def time_text(seconds: float) -> str:
    """Three digits, and the unit that has one to three of them before the point."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 0.9995:  # what is less is not rounded to 1
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
