"""How workers share what attends by itself: the cuts, and room for what they leave of rows that they part.

In: how many workers there are. Out: `Shares`, whose steps cut rows, once for all layers, and merge what was parted.
Holds: the arrays that the kernels read and write (sapper/kernels/shares.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..kernels import shares
from ..runtime import settings
from ..runtime.buffers import empty
from .workspace import Steps

Array = np.ndarray[Any, np.dtype[Any]]
F32, I32 = np.dtype(np.float32), np.dtype(np.int32)


def workers_of(options: Mapping[str, Any]) -> int:
    """How many workers programs of these options have at most."""
    given: int | None = options.get("threads")
    return settings.threads() if given is None else given


class Shares:
    """One for each worker. cuts: arguments of kernels that attend, from where on each begins; left: what they leave."""

    def __init__(self, workers: int, heads: int, features: int) -> None:
        """heads: of a row, which read the same; features: of what each finds."""
        extents = workers, 2, heads
        self.workers = workers
        self.cuts = empty((workers + 1,), I32), empty((workers + 1,), I32)
        self.left = empty(extents, F32), empty(extents, F32), empty((*extents, features), F32)

    def of_tokens(self, place: Any, rows: int, grain: int = shares.GRAIN) -> Steps:
        """Cuts of tokens at places, of which each has so many rows."""
        return [(shares.share_tokens, (place, rows, grain, *self.cuts))]

    def merge(self, out: Array) -> Steps:
        """The rest of what the rows of `out` [rows, heads, features] find."""
        return [(shares.merge_shares, (*self.cuts, *self.left, out))] if self.workers > 1 else []
