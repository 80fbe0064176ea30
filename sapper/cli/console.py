"""Where reports are printed: as wide as the terminal, and wide enough for every table where there is none."""

from __future__ import annotations

import os
import sys
from typing import Any

WIDTH = 140


def console() -> Any:
    """A rich Console on standard output."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if known else WIDTH)
