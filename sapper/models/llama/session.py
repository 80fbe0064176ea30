"""The forward pass: tokens in, logits out, with a KV cache. Every number is computed by sapper's kernels.

In: a LlamaModel. Out: `Session`, whose `feed` runs tokens and leaves the logits of the last one in `logits`. Holds: all
buffers are made once; NumPy only makes views of them.

    tokens ── embedding ── x ─┬─ norm, qkv ── rotate_and_cache ── attention ── output, + x ── y ─┬─ norm, gate, up
                              └───────────────────────────────── next layer ── x = y + down(SwiGLU) ─────┘
    x ── norm, logits of the last token

One token goes through matrix-vector kernels with the norm inside, several through matrix kernels, up to CHUNK at once.
Each is one program: the position and the number of tokens are its variables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...kernels import attention, embedding, matmul, norm, rope, sampling
from ...runtime.buffers import empty
from ...runtime.program import Program, Rows, Variable
from ..errors import ModelError
from .linear import Matrix, Steps, Workspace
from .model import LlamaModel
from .weights import DTYPES

CHUNK = 512
"""Tokens that go through the layers together: enough for the matrix kernels to reach their speed, and few enough for
the activations to stay in the caches."""

Array = np.ndarray[Any, np.dtype[Any]]
Sections = list[tuple[str, Steps]]
"""Steps in order, with a heading for each part."""


class Session:
    """One conversation with a model.

    position: tokens fed so far. logits [vocabulary], f32: after `feed`, for the token that comes next. picked [1], i32:
    the token that `pick` chose.
    """

    def __init__(
        self, model: LlamaModel, context: int | None = None, *, cache_dtype: str = "f32", threads: int | None = None,
        interpret: bool = False,
    ) -> None:
        """context: how many tokens fit (None: as many as the model can). cache_dtype: "f32" or "bf16", of keys and
        values. threads: workers of each kernel (None: the runtime chooses). interpret: run under the reference
        interpreter. Raises ModelError for a context or a dtype that cannot be.
        """
        config = model.config
        self.context = config.positions if context is None else context
        if not 1 <= self.context <= config.positions:
            raise ModelError("the context", f"{self.context} tokens", f"1 to {config.positions}")
        if cache_dtype not in DTYPES:
            raise ModelError("the dtype of the cache", repr(cache_dtype), f"one of {', '.join(DTYPES)}")
        self.model = model
        self.position = 0
        self._options: dict[str, Any] = {} if threads is None else {"threads": threads}
        if interpret:
            self._options = {"interpret": True}
        pairs, groups = config.head_features // 2, config.kv_heads
        self._cosine, self._sine = model.rope_tables(self.context)
        cache_shape = (groups, self.context, 2, pairs)
        self._keys = [empty(cache_shape, DTYPES[cache_dtype]) for _ in range(config.layers)]
        self._values = [empty(cache_shape, DTYPES[cache_dtype]) for _ in range(config.layers)]
        self._scale = config.head_features**-0.5
        self._attention = getattr(attention, f"attention_{cache_dtype}")
        self._attention_decode = getattr(attention, f"attention_decode_{cache_dtype}")
        self._rotate_and_cache = getattr(rope, f"rotate_and_cache_{cache_dtype}")
        self._work = Workspace(max(config.features, config.hidden, config.heads * config.head_features))
        self._token = empty((1,), np.dtype(np.int32))
        self.logits = empty((config.vocabulary,), np.dtype(np.float32))
        self.picked = empty((1,), np.dtype(np.int32))
        self._candidates: tuple[Array, Array] | None = None
        self.chunk = min(CHUNK, self.context)
        self._make_buffers(self.chunk)
        self._decode: Program | None = None
        self._prefill: Program | None = None

    def _make_buffers(self, rows: int) -> None:
        """Activations for that many tokens; memory that is not used is never there."""
        config = self.model.config
        kind = np.dtype(np.float32)
        self._tokens = empty((rows,), np.dtype(np.int32))
        self._last = empty((1,), np.dtype(np.int32))
        self._x = empty((rows, config.features), kind)
        self._y = empty((rows, config.features), kind)
        self._normed = empty((rows, config.features), kind)
        self._qkv = empty((rows, config.heads + 2 * config.kv_heads, 2, config.head_features // 2), kind)
        self._turned = empty((rows, config.heads, 2, config.head_features // 2), kind)
        self._mixed = empty((rows, config.heads * config.head_features), kind)
        self._hidden = empty((rows, config.hidden), kind)

    def feed(self, tokens: Sequence[int]) -> None:
        """Run tokens through the model, after those fed before; `logits` are then those of the last one.

        Raises ModelError if there are none, if one is not in the vocabulary, or if the context is full.
        """
        vocabulary = self.model.config.vocabulary
        if not len(tokens):
            raise ModelError("the tokens", "none", "at least one", "give a prompt")
        wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise ModelError("the tokens", f"{wrong}", f"numbers from 0 to {vocabulary - 1}")
        if self.position + len(tokens) > self.context:
            raise ModelError(
                "the context", f"{self.position} + {len(tokens)} tokens", f"at most {self.context}",
                "take a shorter prompt, or a larger context",
            )
        if len(tokens) == 1:
            self._feed_one(tokens[0])
            return
        for start in range(0, len(tokens), self.chunk):
            self._feed_several(tokens[start : start + self.chunk])

    # ---- one token

    def step_sections(self) -> Sections:
        """The kernels of one token, `_token`, in order; their variable is `position`."""
        config, weights = self.model.config, self.model.weights
        heads, groups, size, epsilon = config.heads, config.kv_heads, config.head_features, config.epsilon
        x, y, mixed, hidden = self._x[0], self._y[0], self._mixed[0], self._hidden[0]
        qkv = self._qkv[:1]
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + groups], qkv[:, heads + groups :]
        turned = self._turned[:1]
        queries = turned.reshape(groups, config.group, size)
        out = mixed.reshape(groups, config.group, size)
        position = Variable("position", 0)
        work = self._work
        sections = [("embedding", weights.embedding.look_up(self._token, self._x[:1]))]
        for number, layer in enumerate(weights.layers):
            keys, values = self._keys[number], self._values[number]
            flat_keys, flat_values = (cache.reshape(groups, self.context, size) for cache in (keys, values))
            sections += [
                (f"layer {number}: attention", [
                    *layer.qkv.apply_norm(x, layer.attention_gain, epsilon, qkv.reshape(-1), work),
                    (self._rotate_and_cache, (q, k, v, self._cosine, self._sine, position, turned, keys, values)),
                    (self._attention_decode, (queries, flat_keys, flat_values, position, self._scale, out)),
                    *layer.output.apply_residual(mixed, x, y, work),
                ]),
                (f"layer {number}: feed-forward", [
                    *layer.gate.apply_norm_swiglu(layer.up, y, layer.feed_forward_gain, epsilon, hidden, work),
                    *layer.down.apply_residual(hidden, y, x, work),
                ]),
            ]
        return [*sections, ("logits", weights.logits.apply_norm(x, weights.gain, epsilon, self.logits, work))]

    def _feed_one(self, token: int) -> None:
        self._token[0] = token
        if self._decode is None:
            self._decode = self._program(self.step_sections())
        self._decode(position=self.position)
        self.position += 1

    def _program(self, sections: Sections) -> Program:
        return Program([step for _, steps in sections for step in steps], static=True, **self._options)

    # ---- several tokens

    def prefill_sections(self) -> Sections:
        """The kernels of a chunk of tokens in order: the first `count` of `_tokens`, of which `_last` is the last one's
        index, behind `position` others."""
        config, weights, work = self.model.config, self.model.weights, self._work
        heads, groups, size, epsilon = config.heads, config.kv_heads, config.head_features, config.epsilon
        count, position = Variable("count", self.chunk), Variable("position", 0)

        def rows(array: Array) -> Rows:
            return Rows(array, count)

        def multiply(name: str, inputs: Array, matrices: Sequence[Matrix], *rest: Array) -> Steps:
            """The matrix kernel of that name, for the dtype in which the matrices can be had."""
            plain = [matrix.widened(work, place) for place, matrix in enumerate(matrices)]
            kernel = getattr(matmul, f"{name}_{plain[0][1]}")
            arguments = (rows(inputs), *(weight for weight, _, _ in plain), *map(rows, rest))
            return [*(step for _, _, steps in plain for step in steps), (kernel, arguments)]

        x, y, normed, mixed, hidden, qkv = self._x, self._y, self._normed, self._mixed, self._hidden, self._qkv
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + groups], qkv[:, heads + groups :]
        queries = self._turned.reshape(self.chunk, groups, config.group, size)
        out = mixed.reshape(self.chunk, groups, config.group, size)
        look_up = weights.embedding.look_up(self._tokens, x)
        sections = [("embedding", [(kernel, (rows(tokens), *parts, rows(into)))
                                   for kernel, (tokens, *parts, into) in look_up])]
        for number, layer in enumerate(weights.layers):
            keys, values = self._keys[number], self._values[number]
            flat_keys, flat_values = (cache.reshape(groups, self.context, size) for cache in (keys, values))
            sections += [
                (f"layer {number}: attention", [
                    (norm.rms_norm, (rows(x), layer.attention_gain, epsilon, rows(normed))),
                    *multiply("matmul_nt", normed, [layer.qkv], qkv.reshape(self.chunk, -1)),
                    (self._rotate_and_cache, (rows(q), rows(k), rows(v), self._cosine, self._sine, position,
                                              rows(self._turned), keys, values)),
                    (self._attention, (rows(queries), flat_keys, flat_values, position, self._scale, rows(out))),
                    *multiply("matmul_nt_residual", mixed, [layer.output], x, y),
                ]),
                (f"layer {number}: feed-forward", [
                    (norm.rms_norm, (rows(y), layer.feed_forward_gain, epsilon, rows(normed))),
                    *multiply("matmul_swiglu", normed, [layer.gate, layer.up], hidden),
                    *multiply("matmul_nt_residual", hidden, [layer.down], y, x),
                ]),
            ]
        logits = [(embedding.embedding_f32, (self._last, x, y[:1])),
                  *weights.logits.apply_norm(y[0], weights.gain, epsilon, self.logits, work)]
        return [*sections, ("logits of the last token", logits)]

    def _feed_several(self, tokens: Sequence[int]) -> None:
        count = len(tokens)
        self._tokens[:count] = tokens
        self._last[0] = count - 1
        if self._prefill is None:
            self._prefill = self._program(self.prefill_sections())
        self._prefill(count=count, position=self.position)
        self.position += count

    # ---- what the programs work on, by name

    def cache_arrays(self) -> dict[str, Array]:
        """The memory that lasts from one run of a program to the next."""
        return {f"layer {i} {part}": cache for part, caches in (("keys", self._keys), ("values", self._values))
                for i, cache in enumerate(caches)}

    def arrays(self) -> dict[str, Array]:
        """Inputs, outputs, tables, activations and the cache; `tokens`, `last` and `token` are set before a run."""
        return {
            "tokens": self._tokens, "last": self._last, "token": self._token, "logits": self.logits,
            "picked": self.picked, "cosine": self._cosine, "sine": self._sine, "x": self._x, "y": self._y,
            "normed": self._normed, "qkv": self._qkv, "turned": self._turned, "mixed": self._mixed,
            "hidden": self._hidden, **self._work.arrays(), **self.cache_arrays(),
        }

    # ---- choosing a token

    def pick(self, temperature: float = 0.0, top_k: int = 40, u: float = 0.0) -> int:
        """The next token, by `logits`. temperature 0: the likeliest; otherwise drawn among the top_k likeliest.

        u: a random number in [0, 1). Raises ModelError for a temperature, top_k or u out of range.
        """
        vocabulary = self.model.config.vocabulary
        if not 0.0 <= temperature <= 1e6 or not 0.0 <= u < 1.0 or top_k < 1:
            raise ModelError(
                "sampling", f"temperature {temperature}, top_k {top_k}, u {u}",
                "temperature >= 0, top_k >= 1, u in [0, 1)",
            )
        if temperature == 0.0:
            sampling.argmax_rows(self.logits.reshape(1, -1), self.picked, **self._options)
            return int(self.picked[0])
        count = min(top_k, vocabulary)
        if self._candidates is None or len(self._candidates[0]) != count:
            self._candidates = empty((count,), np.dtype(np.float32)), empty((count,), np.dtype(np.int32))
        values, indices = self._candidates
        sampling.top_k(self.logits, values, indices, **self._options)
        sampling.sample_top_k(values, indices, temperature, u, self.picked, **self._options)
        return int(self.picked[0])
