"""How many examples a random test draws."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sapper.kernels.record import LibraryKernel

FUZZ = int(os.environ.get("SAPPER_FUZZ", "0"))
"""0: a run of the suite. n: a search for faults with other examples in each run, n times as many."""


def examples(count: int) -> int:
    """max_examples of a test for which `count` are many enough: a run of the suite, which draws the same ones each time
    and is to end within 25 minutes on two slow cores, takes a third of them."""
    return count * FUZZ if FUZZ else max(1, count // 3)


def dealt(entries: Sequence[LibraryKernel], place: int, places: int) -> Sequence[LibraryKernel]:
    """What one of so many tests takes of the library in a run of the suite: neighbours of a type and of a kind of
    products in turn; all of it in a search for faults."""
    ordered = sorted(entries, key=lambda entry: (entry.products, entry.dtype))
    return entries if FUZZ else ordered[place::places]
