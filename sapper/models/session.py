"""What the sessions of all architectures share: feeding tokens, running kernels, choosing the next token.

In: a vocabulary and a context. Out: `BaseSession`, whose subclasses say what one token and what several tokens run.
Holds: all buffers are made once; NumPy only makes views of them; every number is computed by sapper's kernels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..kernels import matmul, sampling
from ..runtime.buffers import empty
from ..runtime.program import Program
from .errors import ModelError
from .linear import Matrix, Steps, Workspace
from .weights import DTYPES

CHUNK = 512
"""Tokens that go through the layers together: enough for the matrix kernels to reach their speed, and few enough for
the activations to stay in the caches."""

Array = np.ndarray[Any, np.dtype[Any]]


class BaseSession(ABC):
    """One conversation with a model.

    context: how many tokens fit. position: tokens fed so far. logits [vocabulary], f32: after `feed`, for the token
    that comes next.
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
        self.position = 0
        self.logits = empty((vocabulary,), np.dtype(np.float32))
        self._options: dict[str, Any] = {} if threads is None else {"threads": threads}
        if interpret:
            self._options = {"interpret": True}
        self._work = work
        self._token = empty((1,), np.dtype(np.int32))
        self._picked = empty((1,), np.dtype(np.int32))
        self._candidates: tuple[Array, Array] | None = None
        self._decode: Program | None = None
        self._rows = 0

    # ---- what an architecture says

    @abstractmethod
    def _make_buffers(self, rows: int) -> None:
        """Activations for that many tokens."""

    @abstractmethod
    def _decode_steps(self) -> Steps:
        """The kernels of one token, self._token, in order; scalars that change are Variables named "position"."""

    @abstractmethod
    def _feed_several(self, tokens: Sequence[int], last: bool) -> None:
        """Run up to CHUNK tokens from self.position on; last: leave the logits of the last one."""

    # ---- tokens in

    def feed(self, tokens: Sequence[int]) -> None:
        """Run tokens through the model, after those fed before; `logits` are then those of the last one.

        Raises ModelError if there are none, if one is not in the vocabulary, or if the context is full.
        """
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
        if len(tokens) == 1:
            self._feed_one(tokens[0])
            return
        for start in range(0, len(tokens), CHUNK):
            part = tokens[start : start + CHUNK]
            self._reserve(len(part))
            self._feed_several(part, last=start + len(part) == len(tokens))
            self.position += len(part)

    def _reserve(self, rows: int) -> None:
        """Have room for the activations of that many tokens."""
        if rows > self._rows:
            self._rows = rows
            self._make_buffers(rows)
            self._decode = None  # It is bound to the old buffers.

    def _feed_one(self, token: int) -> None:
        self._reserve(1)
        self._token[0] = token
        if self._decode is None:
            self._decode = Program(self._decode_steps(), static=True, **self._options)
        self._decode(position=self.position)
        self.position += 1

    # ---- kernels

    def _run(self, steps: Steps) -> None:
        for kernel, arguments in steps:
            kernel(*arguments, **self._options)

    def _multiply(self, name: str, x: Array, matrices: Sequence[Matrix], *rest: Array) -> None:
        """Run the matrix kernel of that name, for the dtype in which the matrices can be had."""
        plain = [matrix.widened(self._work, place) for place, matrix in enumerate(matrices)]
        for _, _, steps in plain:
            self._run(steps)
        getattr(matmul, f"{name}_{plain[0][1]}")(x, *(weights for weights, _, _ in plain), *rest, **self._options)

    # ---- choosing a token

    def pick(self, temperature: float = 0.0, top_k: int = 40, u: float = 0.0) -> int:
        """The next token, by `logits`. temperature 0: the likeliest; otherwise drawn among the top_k likeliest.

        u: a random number in [0, 1). Raises ModelError for a temperature, top_k or u out of range.
        """
        if not 0.0 <= temperature <= 1e6 or not 0.0 <= u < 1.0 or top_k < 1:
            raise ModelError(
                "sampling", f"temperature {temperature}, top_k {top_k}, u {u}",
                "temperature >= 0, top_k >= 1, u in [0, 1)",
            )
        if temperature == 0.0:
            sampling.argmax_rows(self.logits.reshape(1, -1), self._picked, **self._options)
            return int(self._picked[0])
        count = min(top_k, self.vocabulary)
        if self._candidates is None or len(self._candidates[0]) != count:
            self._candidates = empty((count,), np.dtype(np.float32)), empty((count,), np.dtype(np.int32))
        values, indices = self._candidates
        sampling.top_k(self.logits, values, indices, **self._options)
        sampling.sample_top_k(values, indices, temperature, u, self._picked, **self._options)
        return int(self._picked[0])
