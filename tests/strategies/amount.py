"""How many examples a random test draws."""

from __future__ import annotations

import os

FUZZ = int(os.environ.get("SAPPER_FUZZ", "0"))
"""0: a run of the suite. n: a search for faults with other examples in each run, n times as many."""


def examples(count: int) -> int:
    """max_examples of a test for which `count` are many enough: a run of the suite, which draws the same ones each time
    and is to end within 25 minutes on two slow cores, takes three fifths of them."""
    return count * FUZZ if FUZZ else max(1, count * 3 // 5)
