"""How many examples a random test draws."""

from __future__ import annotations

import os

FUZZ = int(os.environ.get("SAPPER_FUZZ", "0"))
"""0: a run of the suite. n: a search for faults with other examples in each run, n times as many."""


def examples(count: int) -> int:
    """max_examples of a test that draws `count` in a run of the suite."""
    return count * max(1, FUZZ)
