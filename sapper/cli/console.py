"""Where reports are printed: as wide as the terminal, and wide enough for every table where there is none."""

from __future__ import annotations

import sys
from typing import Any

WIDTH = 140


def console() -> Any:
    """A rich Console on standard output."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
