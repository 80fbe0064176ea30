"""Where reports are printed: as wide as the terminal, and wide enough for every table where there is none; how
times are written in them; and how far long work is."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from .signals import Ended

WIDTH = 140
_ANY_WIDTH = 10_000


def console() -> Any:
    """A rich Console on standard output."""
    from rich.console import Console

    made = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    made.on_broken_pipe = _end      # type: ignore[method-assign]
    return made


def print_whole(made: Any, table: Any) -> None:
    """A table none of whose columns that are not to be wrapped is cut: a narrower terminal breaks the lines."""
    from rich.measure import Measurement

    for column in table.columns:
        if column.no_wrap:
            column.min_width = max(Measurement.get(made, made.options, cell).maximum
                                   for cell in (column.header, *column.cells))
    before = made.width
    made.width = max(before, Measurement.get(made, made.options.update(width=_ANY_WIDTH), table).minimum)
    made.print(table)
    made.width = before


def _end() -> NoReturn:
    """The reader went away: rich would end the process with a status of 1."""
    raise Ended(signal.SIGPIPE)


def time_text(seconds: float) -> str:
    """Three digits, and the unit that has one to three of them before the point."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 0.9995:  # what is less is not rounded to 1
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


@contextmanager
def told_parts(progress: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Gives what tells of parts of a long work on stderr (how much is done, of how much, the part's name): in one line
    of a terminal, which is gone at the end; elsewhere a line every five seconds. progress: whether at all."""
    live = progress and sys.stderr.isatty()
    last = 0.0

    def report(done: int, total: int, name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        if progress and now - last >= (0.2 if live else 5.0):
            last = now
            line = f"{100 * done / max(1, total):.0f} %: {name}"
            print(f"\r{line:<78.78}" if live else line, end="" if live else "\n", file=sys.stderr, flush=True)

    try:
        yield report
    finally:
        if live:
            print(f"\r{'':<78}\r", end="", file=sys.stderr, flush=True)
