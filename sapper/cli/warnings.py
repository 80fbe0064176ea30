"""Warnings of sapper in commands.

Holds: what sapper warns of is one line, without the place in its source that Python shows; other warnings stay as they
are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

OWN = "SapperWarning"


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    before = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], filename: str, lineno: int,
                  line: str | None = None) -> str:
        if category.__name__ == OWN:  # by its name: the class comes with the runtime, which not every command loads
            return f"warning: {message}\n"
        return before(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before
