"""Several sequences through one model at once: one step program over a paged cache.

In: tokens, each with the slot of its sequence and its position there. Out: `Paged`, whose `step` runs them and picks
the next token of the sequences that ask for one. Holds: which tokens, how many, of which sequences and at which
positions are values of a run, so one program serves every step; what a token gives is the same whoever else is in it.

A step is a flat list of tokens: sequences that decode bring one each, one whose prompt is read brings several, which
attend together (runs.py). Programs of the same kernels are made for at most `picks` tokens and for at most `chunk`, as
matrices are walked otherwise for few rows than for many, and for at most `few_tokens` where more are rounded; and one
for one token, with a session's matrix-vector kernels. Few tokens go through that one by one where `prepare` measured
that to be sooner. Who takes part is said by scheduler.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..kernels import embedding, norm, sampling
from ..runtime.buffers import empty
from ..runtime.program import Program, Rows, Variable
from .errors import ModelError
from .runs import Runs, pages_for
from .sampling import BELOW_ONE, CANDIDATES, Sampling
from .session import BaseSession
from .workspace import Sections, Steps

CHUNK, SHARED_CHUNK = 512, 256
"""Most tokens of a step where prompts are read; and where others decode in it: it bounds how long they wait."""
MAX_SLOTS = 256
Array = np.ndarray[Any, np.dtype[Any]]
F32, I32 = np.dtype(np.float32), np.dtype(np.int32)


class Fed(NamedTuple):
    """A token of a step. slot: of its sequence. position: in the sequence."""

    token: int
    slot: int
    position: int


class Pick(NamedTuple):
    """What is to follow a token of a step. row: the token's index in the step. sampling: how the next one is drawn. u:
    a random number in [0, 1)."""

    row: int
    sampling: Sampling
    u: float


TEMPERATURE = attrgetter("sampling.temperature")
"""Of a Pick; 0 where the likeliest token is taken."""


class Known(NamedTuple):
    """A row of a head that drafts (deepseek/speculative_batch.py). row: in the step before. token: the one behind it.
    slot, position: of the row."""

    row: int
    token: int
    slot: int
    position: int


def first(array: Array) -> Array:
    """The one row of one token."""
    return array[:1]


class Paged(BaseSession):
    """A session of several sequences; the first base of an architecture's batch, before its session.

    slots: how many sequences. pages: of the cache, for all of them. context: tokens of one sequence. chunk: most tokens
    of a step; picks: most tokens picked in one. tokens_of_a_slot: how many a sequence that decodes may bring, 2 where
    drafts are made. table [slots, pages of a sequence]: which page holds which positions of a slot's sequence; its
    owner writes it between steps.
    """

    tokens_of_a_slot: ClassVar[int] = 1

    @property
    def picks(self) -> int:
        return self.slots * self.tokens_of_a_slot

    def __init__(
        self, model: Any, slots: int, context: int | None = None, pages: int | None = None, *,
        cache_dtype: str | None = None, threads: int | None = None, interpret: bool = False,
    ) -> None:
        """pages: None for what all slots can fill. Raises ModelError."""
        if not 1 <= slots <= MAX_SLOTS:
            raise ModelError("the sequences at once", str(slots), f"1 to {MAX_SLOTS}")
        self.slots = slots
        longest = model.positions if context is None else context
        self.pages = slots * pages_for(longest) if pages is None else pages
        if self.pages < pages_for(longest):
            raise ModelError("the pages of the cache", str(self.pages), f"{pages_for(longest)} at least, one context")
        self._step_rows = np.arange(0)
        """In which row of its program each token of the last step was."""
        architecture: Any = super()  # a session of it stands behind this class among the bases
        architecture.__init__(model, context, cache_dtype=cache_dtype, threads=threads, interpret=interpret)
        self.table = np.zeros((slots, pages_for(self.context)), np.int32)
        self._slot_of, self._position_of = (empty((self.chunk,), I32) for _ in range(2))
        most = self.picks
        self._wanted = Variable("wanted", most)
        self._ends_of, self._kept, self._next = (empty((most,), I32) for _ in range(3))
        features = self._x.shape[1]
        self._ends, self._normed_ends = (empty((most, features), F32) for _ in range(2))
        self.step_logits = empty((most, self.vocabulary), F32)
        count = min(CANDIDATES, self.vocabulary)
        self._choices = empty((most, count), F32), empty((most, count), I32)
        self._draws = tuple(empty((most,), F32) for _ in range(4))
        self.logits = self.step_logits[0]  # of the program for one token
        self._steps: dict[int, Program] = {}
        self._one: Program | None = None
        self._singly = 1 if self.tokens_of_a_slot == 1 else 0
        self._drawing: Program | None = None

    def _longest_chunk(self) -> int:
        return max(CHUNK, self.picks)

    @cached_property
    def _runs(self) -> Runs:
        return Runs(self.chunk, self.context, self.shortest_run)

    @property
    def _makes_runs(self) -> bool:
        """Whether tokens of a prompt can attend together."""
        return True

    def _has_runs(self, capacity: int) -> bool:
        """Whether tokens of a program for so many attend together: not in one that decodes, nor where all are few."""
        return self._makes_runs and capacity > self.picks and capacity >= self.shortest_run

    def _runs_of_capacity(self) -> Runs | None:
        """The runs of the program that is made; None where all its tokens attend alone."""
        return self._runs if self._has_runs(self._capacity) else None

    def _of_loose(self, array: Array) -> Rows:
        """The rows of the tokens that attend alone: the first ones."""
        runs = self._runs_of_capacity()
        return self._rows(array) if runs is None else Rows(array[: self._capacity], runs.loose)

    def _arrange(self, columns: Array, capacity: int) -> tuple[Array, Array, dict[str, int]]:
        """columns [tokens, numbers], of which slot and position are the last two. They in the order in which they run,
        the row of each there, and the values of the variables that say so."""
        if not self._has_runs(capacity):
            return columns, np.arange(len(columns)), {}
        order, values = self._runs.arrange(columns[:, -2], columns[:, -1], self.table)
        rows = np.empty_like(order)
        rows[order] = np.arange(len(order))
        return columns[order], rows, values

    def _chunk_values(self, count: int, most: int | None = None) -> dict[str, int]:
        values = super()._chunk_values(count, most)
        return {name: value for name, value in values.items() if name not in ("position", "filled")}

    def _of_wanted(self, array: Any) -> Rows:
        return Rows(array, self._wanted)

    def prepare(self) -> None:
        """Make the step programs now, so that no first request waits for them, and measure how many tokens go sooner
        one by one than together. What the cache holds is lost."""
        self.table[...] = 0

        def seconds(count: int) -> float:
            fed = [Fed(0, 0, position % self.context) for position in range(count)]
            times = []
            for _ in range(3):
                started = time.perf_counter()
                self.step(fed, [Pick(count - 1, Sampling(), 0.0)])
                times.append(time.perf_counter() - started)
            return min(times)

        self._singly = 1
        if self.slots > 1:
            self._singly = max(1, min(self.slots - 1, int(seconds(2) / seconds(1))))
        for count in self._capacities():
            seconds(count)

    def _capacities(self) -> list[int]:
        """For how many tokens there are programs, rising."""
        few = min(self.few_tokens(), self.chunk)
        return sorted({self.picks, few or self.picks, self.chunk})

    def step(self, fed: Sequence[Fed], picks: Sequence[Pick] = ()) -> list[int]:
        """Run tokens through the model; the tokens that follow, one for each of `picks`.

        Every position of a sequence was fed before those behind it, or is in the same step; table names the pages.
        """
        count, wanted = len(fed), len(picks)
        assert 0 < count <= self.chunk and wanted <= self.picks, "the scheduler keeps to the limits"
        if count == wanted <= self._singly:
            return [self._step_one(fed[pick.row], pick) for pick in picks]
        capacity = next(size for size in self._capacities() if count <= size)
        columns = np.fromiter(chain.from_iterable(fed), np.int32, 3 * count).reshape(count, 3)
        columns, rows, values = self._arrange(columns, capacity)
        self._step_rows = rows
        self._tokens[:count], self._slot_of[:count], self._position_of[:count] = columns.T
        self._ends_of[:wanted] = rows[[pick.row for pick in picks]]
        program = self._steps.get(capacity)
        if program is None:
            program = self._steps[capacity] = self._step_program(capacity)
        program(**self._chunk_values(count), **values, wanted=wanted)
        if any(map(TEMPERATURE, picks)):
            self._draw(picks)
        made: list[int] = self._next[:wanted].tolist()
        return made

    def _step_one(self, fed: Fed, pick: Pick) -> int:
        self._token[0], self._slot_of[0], self._position_of[0] = fed
        if self._one is None:
            likeliest: Steps = [(sampling.argmax_rows, (self.step_logits[:1], self._next[:1]))]
            self._one = self._program([*self.step_sections(), ("likeliest token", likeliest)])
        self._one()
        if pick.sampling.temperature > 0:
            self._draw([pick])
        return int(self._next[0])

    def _step_program(self, capacity: int) -> Program:
        self._capacity = capacity
        matrix, gain, epsilon = self.head()

        def ends(array: Array) -> Rows:
            return self._of_wanted(array[:capacity])

        last: Steps = [
            (embedding.embedding_f32, (ends(self._ends_of), self._x, ends(self._ends))),
            (norm.rms_norm, (ends(self._ends), gain, epsilon, ends(self._normed_ends))),
            *self._multiply("matmul_nt", self._normed_ends, [matrix], self.step_logits, rows=ends),
            (sampling.argmax_rows, (ends(self.step_logits), ends(self._next))),
        ]
        return self._program([*self.chunk_sections(), ("logits of the last tokens", last), *self._kept_sections()])

    def _kept_sections(self) -> Sections:
        """What a step leaves besides."""
        return []

    def foresee(self, rows: Sequence[Known], wanted: Sequence[int]) -> list[int]:
        """Where tokens_of_a_slot is 2: drafts, as deepseek/speculative_batch.py has it."""
        raise NotImplementedError

    def _draw(self, picks: Sequence[Pick]) -> None:
        """Draw for those that want it; the others keep the likeliest token."""
        count, most = len(picks), self._choices[0].shape[1]
        self._kept[:count] = [min(how.top_k, most) for _, how, _ in picks]
        settings = [(how.temperature, how.top_p, how.min_p, min(u, BELOW_ONE)) for _, how, u in picks]
        for array, values in zip(self._draws, zip(*settings, strict=True), strict=True):
            array[:count] = values
        if self._drawing is None:
            rows = self._of_wanted
            choices, draws = [rows(array) for array in self._choices], [rows(array) for array in self._draws]
            self._drawing = self._program([("drawing", [
                (sampling.top_k, (rows(self.step_logits), *choices)),
                (sampling.sample, (*choices, rows(self._kept), *draws, rows(self._next))),
            ])])
        self._drawing(wanted=len(picks))
