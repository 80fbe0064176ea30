"""Which tokens of a step attend together, as runs (sapper/kernels/runs.py), and which alone.

In: slot and position of each token of a step, and the table of pages. Out: `Runs.arrange`: an order of the tokens in
which those that attend alone, the loose ones, come first, and the values of the variables. Holds: the arrays that the
kernels read. A run has `shortest` tokens at least, and together they read no more pages than there is room for; what
is too short, or finds no room, is loose.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from ..kernels.paged import PAGE
from ..runtime.buffers import empty
from ..runtime.program import Rows, Variable

Array = np.ndarray[Any, np.dtype[Any]]
I32 = np.dtype(np.int32)


def pages_for(tokens: int) -> int:
    """How many pages so many tokens take."""
    return -(-tokens // PAGE)


class Runs:
    """Of steps of at most `chunk` tokens of sequences of at most `context`.

    loose, number, pages: variables: tokens that attend alone, runs, and pages that these read. room: pages at most:
    those of one context, and of as many tokens again as a step has.
    """

    def __init__(self, chunk: int, context: int, shortest: int) -> None:
        """shortest: tokens of a run."""
        self._shortest = shortest
        self.room = pages_for(context) + pages_for(chunk)
        most = max(chunk // shortest, 1)
        self.loose, self.number, self.pages = (
            Variable(name, value) for name, value in (("loose", chunk), ("runs", most), ("pages", self.room)))
        self._of_runs = tuple(empty((most,), I32) for _ in range(4))
        self._page = empty((self.room,), I32)

    @property
    def operands(self) -> tuple[Rows, ...]:
        """start, count, position and base of each run."""
        return tuple(Rows(array, self.number) for array in self._of_runs)

    @property
    def page(self) -> Rows:
        """The pages that runs read."""
        return Rows(self._page, self.pages)

    def arrange(self, slots: Array, positions: Array, table: Array) -> tuple[Array, dict[str, int]]:
        """slots, positions [tokens]; table [slots, pages of a sequence]. The order of the tokens, and the values of
        the variables."""
        count = len(slots)
        cuts = np.flatnonzero((np.diff(slots) != 0) | (np.diff(positions) != 1)) + 1
        alone = np.ones(count, bool)
        runs: list[tuple[int, int, int]] = []
        filled = 0
        for start, stop in pairwise([0, *cuts.tolist(), count]):
            wanted = pages_for(int(positions[stop - 1]) + 1)
            if stop - start >= self._shortest and filled + wanted <= self.room:
                alone[start:stop] = False
                self._page[filled : filled + wanted] = table[slots[start], :wanted]
                runs.append((stop - start, positions[start], filled * PAGE))
                filled += wanted
        loose = int(alone.sum())
        if runs:
            tokens, *rest = zip(*runs, strict=True)
            starts = np.cumsum([loose, *tokens[:-1]])
            for array, numbers in zip(self._of_runs, (starts, tokens, *rest), strict=True):
                array[: len(runs)] = numbers
        return np.argsort(~alone, kind="stable"), {"loose": loose, "runs": len(runs), "pages": filled}
