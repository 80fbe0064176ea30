"""Several sequences that draft: a batch with DeepSeek's MTP head.

In: a DeepseekModel with its MTP head. Out: `SpeculativeBatch`, whose step may bring two tokens of each sequence, the
last one chosen and a draft behind it, and picks behind both; whose `foresee` then makes the next drafts. Holds: what
models/batch.py says. A page that sequences share has the head's rows of the one that wrote it, of which the last knows
the token behind the page: drafts may differ by that, tokens do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...kernels import embedding, norm, sampling
from ...runtime.program import Program
from ..batch import Fed, Known, Pick
from ..sampling import Sampling
from ..workspace import Sections, Steps
from .batch import Batch
from .head import Head


class SpeculativeBatch(Batch, Head):
    """Sequences of one model, with drafts."""

    tokens_of_a_slot = 2

    def __init__(self, model: Any, slots: int, *arguments: Any, **options: Any) -> None:
        """As Batch has it. Raises ModelError also for a model without an MTP head."""
        self.check_head(model)
        super().__init__(model, slots, *arguments, **options)
        self._make_head(model)
        self._heads: dict[int, Program] = {}

    def _kept_sections(self) -> Sections:
        return [("hidden states", self._keep_hidden())]

    def prepare(self) -> None:
        self.table[...] = 0
        for least in (1, *self._capacities()):
            count = min(least, self.chunk)
            self.step([Fed(0, 0, row % self.context) for row in range(count)], [Pick(count - 1, Sampling(), 0.0)])
            self.foresee([Known(row, 0, 0, row % self.context) for row in range(count)], [count - 1])

    def foresee(self, rows: Sequence[Known], wanted: Sequence[int]) -> list[int]:
        """The head's rows of the step before, and drafts behind those whose indices are `wanted`."""
        count = len(rows)
        capacity = self.picks if count <= self.picks else self.chunk
        columns, places, values = self._arrange(np.array(rows, np.int32), capacity)
        self._which[:count] = self._step_rows[columns[:, 0]]
        self._behind[:count], self._slot_of[:count], self._position_of[:count] = columns[:, 1:].T
        self._ends_of[: len(wanted)] = places[list(wanted)]
        program = self._heads.get(capacity)
        if program is None:
            program = self._heads[capacity] = self._head_program(capacity)
        program(**self._chunk_values(count), **values, wanted=len(wanted))
        return [int(token) for token in self._next[: len(wanted)]]

    def _head_program(self, capacity: int) -> Program:
        self._capacity = capacity
        matrix, _, epsilon = self.head()
        ends = self._of_wanted
        drafts: Steps = [
            (embedding.embedding_f32, (ends(self._ends_of), self._x, ends(self._ends))),
            (norm.rms_norm, (ends(self._ends), self._head.gain, epsilon, ends(self._normed_ends))),
            *self._multiply("matmul_nt", self._normed_ends, [matrix], self.step_logits, rows=ends),
            (sampling.argmax_rows, (ends(self.step_logits), ends(self._next))),
        ]
        return self._program([*self._rows_sections(), ("drafts", drafts)])
