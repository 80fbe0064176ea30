"""What the sessions of all architectures share: feeding tokens, the two programs, choosing the next token.

In: a vocabulary and a context. Out: `BaseSession`, whose subclasses say what one token and what a chunk of tokens run.
Holds: all buffers are made once; NumPy only makes views of them; every number is computed by sapper's kernels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels import cross_entropy, embedding, norm, sampling
from ..runtime.buffers import LINE_BYTES, Arena, empty
from ..runtime.program import Program, Rows, Variable
from ..runtime.system import round_up
from .errors import ModelError
from .linear import Matrix
from .rounded import ROUNDED_ROWS, Rounds, as_bf16
from .sampling import BELOW_ONE, CANDIDATES, Sampling
from .weights import DTYPES
from .workspace import Sections, Steps, Workspace, named_arrays

if TYPE_CHECKING:
    from ..ahead.plan import Model
    from ..runtime.profile import Launched

CHUNK = 512
"""Tokens that go through the layers together: enough for the matrix kernels to reach their speed, and few enough for
the activations to stay in the caches."""

FEW_TOKENS = 24
"""Up to so many tokens are quantised sooner than weights are rounded to bf16 for them. On two threads of a Granite
Rapids 16, 24 and 32 rows by 1536 x 576 in Q4_1 take 49, 76 and 106 us quantised and 57, 73 and 71 rounded, by 4096 x
4096 in Q4_K 0.91, 1.55 and 1.95 ms and 1.11, 1.33 and 1.27; on one in Q8_0 1.95, 2.75 and 3.43, and 2.41, 3.01 and
2.86."""
SHORTEST_RUN = 8
"""So many tokens attend together sooner than one by one: over 500 positions of SmolLM2 on two threads of a Granite
Rapids 4 tokens take 1.06 of the time, 8 0.92, 16 0.84."""

SCORED = 128
"""Rows of logits that `losses` holds at once: 25 MB of them for 49152 tokens."""

SORTED_FROM = 4096
"""Candidates from which on NumPy puts all logits in order: the kernel that finds the k largest takes time with k * k,
of 151936 logits 7 ms for 4000, 54 for 10000 and 3.4 s for all, and NumPy 12 for any; of 49152 5, 37 and 350, and 3."""

Array = np.ndarray[Any, np.dtype[Any]]
Buffers = dict[str, tuple[tuple[int, ...], "np.dtype[Any]"]]
"""Name of an attribute -> extents and dtype of its array."""


class Scoring:
    """Memory of `losses` for so many rows: which of the chunk's, the tokens that follow them, and what these cost."""

    def __init__(self, count: int, features: int, vocabulary: int) -> None:
        self.rows, self.targets = (empty((count,), np.dtype(np.int32)) for _ in range(2))
        self.x, self.normed = (empty((count, features), np.dtype(np.float32)) for _ in range(2))
        self.logits = empty((count, vocabulary), np.dtype(np.float32))
        self.losses = empty((count,), np.dtype(np.float32))
        self.program: Program | None = None


class BaseSession(ABC):
    """One conversation with a model.

    context: how many tokens fit. chunk: how many go through the layers together. position: tokens fed so far. logits
    [vocabulary], f32: after `feed`, for the token that comes next. picked [1], i32: the likeliest one by them.
    """

    def __init__(
        self, vocabulary: int, positions: int, context: int | None, cache_dtype: str, threads: int | None,
        interpret: bool, work: Workspace,
    ) -> None:
        """context: how many tokens fit (None: `positions`, as many as the model can). cache_dtype: "f32" or "bf16".
        threads: workers of each kernel (None: the runtime chooses). interpret: run under the reference interpreter.
        Raises ModelError for a context or a dtype that cannot be.
        """
        self.context = positions if context is None else context
        if not 1 <= self.context <= positions:
            raise ModelError("the context", f"{self.context} tokens", f"1 to {positions}")
        if cache_dtype not in DTYPES:
            raise ModelError("the dtype of the cache", repr(cache_dtype), f"one of {', '.join(DTYPES)}")
        self.vocabulary = vocabulary
        self._cache_dtype = cache_dtype
        self._arena = Arena()  # of a chunk's buffers: on huge pages of its own each would waste half a page
        self.chunk = self._capacity = self._longest_chunk()
        self.position = 0
        self.logits = empty((vocabulary,), np.dtype(np.float32))
        self._options: dict[str, Any] = {} if threads is None else {"threads": threads}
        if interpret:
            self._options = {"interpret": True}
        self._work = work
        self._token, self._last, self.picked, self._drawn = (empty((1,), np.dtype(np.int32)) for _ in range(4))
        self._token_word = self._token.data  # storing in it asks less of the caches than NumPy does
        self._tokens = empty((self.chunk,), np.dtype(np.int32))
        self._count = Variable("count", self.chunk)
        self._candidates: tuple[Array, Array] | None = None
        self._settings = tuple(empty((1,), np.dtype(np.float32)) for _ in range(4))
        self._kept = empty((1,), np.dtype(np.int32))
        self._decode: Program | None = None
        self._prefills: dict[int, Program] = {}
        self._scoring: Scoring | None = None
        self._few: int | None = None
        self._x: Array
        self._y: Array
        self._turns: Buffers = {}

    def _longest_chunk(self) -> int:
        return min(CHUNK, self.context)

    @property
    def shortest_run(self) -> int:
        """So many tokens of a sequence attend sooner together than one by one."""
        return SHORTEST_RUN

    def _caches(self, layers: int, extents: tuple[int, ...]) -> list[Array]:
        """An array of the cache for each layer, all in the same huge pages: those of a short context are small, and a
        token reads each of them once."""
        kind = DTYPES[self._cache_dtype]
        arena = Arena(layers * round_up(math.prod(extents) * kind.itemsize, LINE_BYTES))
        return [arena.empty(extents, kind) for _ in range(layers)]

    def _cut_one(self) -> Steps:
        """Before the layers of one token: how workers share its attention, where they part it (shares.py)."""
        return []

    def _cut(self) -> Steps:
        """The same for a chunk's tokens."""
        return []

    def _take_turns(self, *sets: Buffers) -> None:
        """Make arrays, of which no two sets are in use at the same time: they lie in the same memory."""
        def places(one: Buffers) -> list[int]:
            sizes = [round_up(math.prod(extents) * kind.itemsize, LINE_BYTES) for extents, kind in one.values()]
            return list(accumulate(sizes, initial=0))

        memory = self._arena.empty((max(places(one)[-1] for one in sets),), np.dtype(np.uint8))
        for one in sets:
            for (name, (extents, kind)), start in zip(one.items(), places(one), strict=False):
                size = math.prod(extents) * kind.itemsize
                setattr(self, name, memory[start : start + size].view(kind).reshape(extents))
            self._turns |= one

    def _lie_apart(self) -> None:
        """Give arrays that take turns memory of their own, before any program is made: for a file, whose plan shares
        it byte by byte."""
        for name, (extents, kind) in self._turns.items():
            setattr(self, name, empty(extents, kind))

    # ---- what an architecture says

    @abstractmethod
    def step_sections(self) -> Sections:
        """The kernels of one token, `_token`, in order; their variable is `position`."""

    @abstractmethod
    def chunk_sections(self) -> Sections:
        """The kernels that take a chunk of tokens through all layers, to `_x`: the first `count` of `_tokens`, behind
        `position` others; their variables are those of `_chunk_values`."""

    @abstractmethod
    def head(self) -> tuple[Matrix, Array, float]:
        """What makes logits of `_x`: the matrix, the gain of the norm before it, and the norm's epsilon."""

    @abstractmethod
    def state(self) -> dict[str, Array]:
        """The memory that lasts from one run of a program to the next, by name."""

    def prefill_sections(self) -> Sections:
        """The kernels of a chunk of tokens in order, and of the logits of the last one, whose index is `_last`."""
        matrix, gain, epsilon = self.head()
        logits: Steps = [(embedding.embedding_f32, (self._last, self._x, self._y[:1])),
                         *matrix.apply_norm(self._y[0], gain, epsilon, self.logits, self._work)]
        return [*self.chunk_sections(), ("logits of the last token", logits)]

    def program_sections(self) -> dict[str, Sections]:
        """What feeds a chunk of tokens, and one token."""
        return {"prefill": self._picking(self.prefill_sections()), "step": self._picking(self.step_sections())}

    def _picking(self, sections: Sections) -> Sections:
        """These, and then the likeliest token behind them: a launch of its own would wake the workers anew, by Python
        that the weights have driven out of the caches."""
        return [*sections, ("likeliest token", [(sampling.argmax_rows, (self.logits.reshape(1, -1), self.picked))])]

    def _chunk_values(self, count: int, most: int | None = None) -> dict[str, int]:
        """The values of the variables of prefill_sections for so many tokens at self.position, in a program for as many
        as `most` (None: the one that `_prefill` has for them)."""
        return {"count": count, "position": self.position}

    # ---- as a file (sapper/ahead)

    def whole(self, name: str, description: str, weights: dict[str, Array], target: Any = None) -> Model:
        """The programs and the names of what they work on, for C functions that begin with `name`.

        weights: names of constants. target: that the programs are for (None: this CPU). A third program draws.
        """
        from ..ahead.plan import DRAWING, Model

        self._work.target, self._work.chooses = target, False
        self._lie_apart()
        programs = self.program_sections()
        state = self.state()
        count = min(CANDIDATES, self.vocabulary)
        choices = empty((1, count), np.dtype(np.float32)), empty((1, count), np.dtype(np.int32))
        programs["draw"] = [("drawing", self._draw_steps(self.logits.reshape(1, -1), choices, self._drawn))]
        drawing = dict(zip(DRAWING, (self._kept, *self._settings, self._drawn), strict=True))
        found = named_arrays({key.lstrip("_"): value for key, value in vars(self).items() if key != "model"})
        named = [*state.values(), *drawing.values()]
        buffers = {key: array for key, array in found.items() if all(array is not one for one in named)}
        return Model(
            name, programs, weights | buffers | state | drawing, tuple(state), self.context, self.vocabulary,
            self.chunk, description, candidates=CANDIDATES,
            variables={"prefill": self._linear_values(), "step": {"position": (1, 0)}, "draw": {}},
        )

    def _draw_steps(self, logits: Array, choices: tuple[Array, Array], into: Array) -> Steps:
        """A token among the candidates that `choices` has room for, by the settings."""
        return [(sampling.top_k, (logits, *choices)),
                (sampling.sample, (*choices, self._kept, *self._settings, into))]

    def _linear_values(self) -> dict[str, tuple[int, int]]:
        """Each variable of a chunk as (times the position, times the number of tokens)."""
        def values(position: int, count: int) -> dict[str, int]:
            kept, self.position = self.position, position
            try:
                return self._chunk_values(count, self.chunk)
            finally:
                self.position = kept

        of_position, of_count, both = values(1, 0), values(0, 1), values(3, 5)
        for variable, value in both.items():
            assert value == 3 * of_position[variable] + 5 * of_count[variable], f"{variable} is linear in both"
        return {variable: (of_position[variable], of_count[variable]) for variable in both}

    # ---- tokens in

    def feed(self, tokens: Sequence[int]) -> None:
        """Run tokens through the model, after those fed before; `logits` are then those of the last one.

        Raises ModelError if there are none, if one is not in the vocabulary, or if the context is full.
        """
        if len(tokens) == 1 and 0 <= tokens[0] < self.vocabulary and self.position < self.context:
            self._feed_one(tokens[0])  # straight on: between two tokens each line of Python comes from memory
            return
        self._check(tokens)
        for start in range(0, len(tokens), self.chunk):
            self._feed_several(tokens[start : start + self.chunk])

    def _check(self, tokens: Sequence[int]) -> None:
        if not len(tokens):
            raise ModelError("the tokens", "none", "at least one", "give a prompt")
        wrong = next((token for token in tokens if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            raise ModelError("the tokens", f"{wrong}", f"numbers from 0 to {self.vocabulary - 1}")
        if self.position + len(tokens) > self.context:
            raise ModelError(
                "the context", f"{self.position} + {len(tokens)} tokens", f"at most {self.context}",
                "take a shorter prompt, or a larger context",
            )

    def _feed_one(self, token: int) -> None:
        step = self._decode or self._step()
        self._token_word[0] = token
        step(position=self.position)
        self.position += 1

    def _step(self) -> Program:
        if self._decode is None:
            self._decode = self._program(self._picking(self.step_sections()))
        return self._decode

    def profile(self, runs: int = 9) -> list[Launched]:
        """Where the time of one more token would go, as Program.profile has it; the median of several runs. The token
        is not fed, and of a context that is full the last one is overwritten: rewind before feeding again.

        Raises LaunchError under the reference interpreter.
        """
        from ..runtime.profile import middle

        step, position = self._step(), min(self.position, self.context - 1)
        return middle([step.profile(position=position) for _ in range(runs)])

    def _feed_several(self, tokens: Sequence[int]) -> None:
        count = len(tokens)
        self._tokens[:count] = tokens
        self._last[0] = count - 1
        self._prefill(count)(**self._chunk_values(count))
        self.position += count

    def _prefill(self, count: int) -> Program:
        """The program for a chunk of so many tokens."""
        most = next(size for size in (*self._small_chunks(), self.chunk) if count <= size)
        if most not in self._prefills:
            capacity, self._capacity = self._capacity, most
            try:
                self._prefills[most] = self._program(self._picking(self.prefill_sections()))
            finally:
                self._capacity = capacity
        return self._prefills[most]

    def _small_chunks(self) -> list[int]:
        """Up to how many tokens have programs of their own, in order."""
        few = self.few_tokens()
        return [few] if few else []

    def few_tokens(self) -> int:
        """Up to how many tokens have a program of their own, as many are rounded; 0 where none are."""
        if self._few is None:  # asked before each step of a batch, and it takes some 0.1 ms to tell
            self._few = self._find_few_tokens()
        return self._few

    def _find_few_tokens(self) -> int:
        """The matrix of the logits stands for all."""
        matrix, _, _ = self.head()
        rounds = self.chunk >= ROUNDED_ROWS and isinstance(matrix, Rounds) and matrix.rounds(self._work)
        return FEW_TOKENS if rounds else 0

    def rewind(self, position: int) -> None:
        """Forget the tokens from a position on. Raises ModelError for a position that was not reached."""
        if not 0 <= position <= self.position:
            raise ModelError("the position", f"{position}", f"0 to {self.position}, the tokens fed so far")
        self.position = position

    def losses(self, tokens: Sequence[int], first: int = 0) -> list[float]:
        """Feed tokens; what each token behind tokens[first] costs: minus the logarithm of its probability, given those
        before it. Raises ModelError as `feed` does."""
        self._check(tokens)
        if self._scoring is None:
            self._scoring = Scoring(min(SCORED, self.chunk), self._x.shape[1], self.vocabulary)
        scoring = self._scoring
        found: list[float] = []
        for start in range(0, len(tokens), self.chunk):
            part = tokens[start : start + self.chunk]
            self._feed_several(part)
            rows = range(max(first - start, 0), min(len(part), len(tokens) - 1 - start))
            for group in (rows[i : i + len(scoring.rows)] for i in range(0, len(rows), len(scoring.rows))):
                scoring.rows[: len(group)] = group
                scoring.targets[: len(group)] = [tokens[start + row + 1] for row in group]
                if scoring.program is None:
                    scoring.program = self._program([("losses", self._scoring_steps(scoring))])
                scoring.program(count=len(group))
                found += scoring.losses[: len(group)].tolist()
        return found

    def _scoring_steps(self, scoring: Scoring) -> Steps:
        matrix, gain, epsilon = self.head()
        rows = self._rows
        return [
            (embedding.embedding_f32, (rows(scoring.rows), self._x, rows(scoring.x))),
            (norm.rms_norm, (rows(scoring.x), gain, epsilon, rows(scoring.normed))),
            *self._multiply("matmul_nt", scoring.normed, [matrix], scoring.logits),
            (cross_entropy.cross_entropy, (rows(scoring.logits), rows(scoring.targets), rows(scoring.losses))),
        ]

    def _program(self, sections: Sections) -> Program:
        return Program([step for _, steps in sections for step in steps], static=True, **self._options)

    # ---- parts of programs

    def _rows(self, array: Array) -> Rows:
        """The rows of a chunk's tokens."""
        return Rows(array[: self._capacity], self._count)

    def _look_up(self, matrix: Matrix, x: Array, tokens: Array | None = None) -> Steps:
        """x: the rows of the matrix that belong to a chunk's tokens."""
        return [(kernel, (self._rows(numbers), *parts, self._rows(into)))
                for kernel, (numbers, *parts, into) in matrix.look_up(self._tokens if tokens is None else tokens, x)]

    def _norm(self, x: Array, gain: Array, epsilon: float, y: Array) -> Steps:
        """y, in f32 or bf16, are the rows x after their norm."""
        kernel = norm.rms_norm if y.dtype == np.float32 else norm.rms_norm_rounded
        return [(kernel, (self._rows(x), gain, epsilon, self._rows(y)))]

    def _as_met(self, array: Array, *matrices: Matrix) -> Array:
        """Rows, or in their memory as many in bf16 where all these matrices, which make or meet them, round them so."""
        rounds = all(one.rounds_rows(self._capacity, self._work) for one in matrices)
        return as_bf16(array) if rounds else array

    def _multiply(
        self, name: str, x: Array, matrices: Sequence[Matrix], *rest: Array, rows: Callable[[Array], Rows] | None = None
    ) -> Steps:
        """The matrix kernel of that name on a chunk. rows: which rows of the arrays (None: the chunk's tokens')."""
        rows = rows or self._rows
        return matrices[0].apply_rows(name, rows(x), matrices[1:], [rows(one) for one in rest], self._work)

    # ---- choosing a token

    def follow(self, token: int, choose: Callable[[Array], int]) -> list[int]:
        """Feed a chosen token; the tokens that `choose` gives for the logits behind it, here one."""
        self.feed((token,))
        return [choose(self.logits)]

    def pick(
        self, temperature: float = 0.0, top_k: int = 40, u: float = 0.0, *, top_p: float = 1.0, min_p: float = 0.0,
        logits: Array | None = None,
    ) -> int:
        """The next token. temperature 0: the likeliest; otherwise drawn as Sampling says.

        u: a random number in [0, 1). logits: of the token (None: those of the last one fed, as they were then). Raises
        ModelError for a setting out of range.
        """
        Sampling(temperature, top_k, top_p, min_p).check()
        if not 0.0 <= u < 1.0:
            raise ModelError("sampling", f"u {u}", "a number in [0, 1)")
        if temperature == 0.0 and (logits is None or logits is self.logits):
            return int(self.picked[0])
        logits = (self.logits if logits is None else logits).reshape(1, -1)
        if temperature == 0.0:
            sampling.argmax_rows(logits, self._drawn, **self._options)
            return int(self._drawn[0])
        count = min(top_k, self.vocabulary)
        if self._candidates is None or self._candidates[0].shape[1] != count:
            self._candidates = empty((1, count), np.dtype(np.float32)), empty((1, count), np.dtype(np.int32))
        self._kept[0] = count
        for setting, value in zip(self._settings, (temperature, top_p, min_p, u), strict=True):
            setting[0] = min(value, BELOW_ONE) if setting is self._settings[3] else value
        steps = self._draw_steps(logits, self._candidates, self._drawn)
        if count > SORTED_FROM:
            values, indices = self._candidates
            indices[0] = np.argsort(-logits[0], kind="stable")[:count]  # of equals the lower index first, as the kernel
            values[0] = logits[0, indices[0]]
            steps = steps[1:]
        for kernel, arguments in steps:
            kernel(*arguments, **self._options)
        return int(self._drawn[0])
