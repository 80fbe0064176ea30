"""The forward pass: tokens in, logits out, with a KV cache. Every number is computed by sapper's kernels.

In: a config and weights. Out: `Session`, whose `feed` runs tokens and leaves the logits of the last one in `logits`.
Holds: what BaseSession holds.

    tokens ── embedding ── x ─┬─ norm, qkv ── rotate_and_cache ── attention ── output, + x ── y ─┬─ norm, gate, up
                              └───────────────────────────────── next layer ── x = y + down(SwiGLU) ─────┘
    x ── norm, logits of the last token

One token goes through matrix-vector kernels with the norm inside, several through matrix kernels, CHUNK at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...kernels import add, attention, norm, rope
from ...runtime.buffers import empty
from ...runtime.program import Variable
from ..linear import Steps, Workspace
from ..session import BaseSession
from ..weights import DTYPES
from .config import LlamaConfig
from .weights import LlamaWeights

Array = np.ndarray[Any, np.dtype[Any]]


class Session(BaseSession):
    """One conversation with a Llama model."""

    def __init__(
        self, config: LlamaConfig, weights: LlamaWeights, context: int | None = None, *, cache_dtype: str = "f32",
        threads: int | None = None, interpret: bool = False,
    ) -> None:
        """As BaseSession has it."""
        work = Workspace(max(config.features, config.hidden, config.heads * config.head_features))
        super().__init__(config.vocabulary, config.positions, context, cache_dtype, threads, interpret, work)
        self.config, self.weights = config, weights
        pairs, groups = config.head_features // 2, config.kv_heads
        self._cosine, self._sine = config.rope.tables(self.context, weights.rope_factors)
        cache_shape = (groups, self.context, 2, pairs)
        self._keys = [empty(cache_shape, DTYPES[cache_dtype]) for _ in range(config.layers)]
        self._values = [empty(cache_shape, DTYPES[cache_dtype]) for _ in range(config.layers)]
        self._scale = config.head_features**-0.5
        self._attention = getattr(attention, f"attention_{cache_dtype}")
        self._attention_decode = getattr(attention, f"attention_decode_{cache_dtype}")
        self._rotate_and_cache = getattr(rope, f"rotate_and_cache_{cache_dtype}")

    def _make_buffers(self, rows: int) -> None:
        config = self.config
        kind = np.dtype(np.float32)
        self._x = empty((rows, config.features), kind)
        self._y = empty((rows, config.features), kind)
        self._normed = empty((rows, config.features), kind)
        self._qkv = empty((rows, config.heads + 2 * config.kv_heads, 2, config.head_features // 2), kind)
        self._turned = empty((rows, config.heads, 2, config.head_features // 2), kind)
        self._mixed = empty((rows, config.heads * config.head_features), kind)
        self._hidden = empty((rows, config.hidden), kind)

    def _decode_steps(self) -> Steps:
        config, weights, work = self.config, self.weights, self._work
        heads, groups, size, epsilon = config.heads, config.kv_heads, config.head_features, config.epsilon
        x, y, mixed, hidden = self._x[0], self._y[0], self._mixed[0], self._hidden[0]
        qkv = self._qkv[:1]
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + groups], qkv[:, heads + groups :]
        turned = self._turned[:1]
        queries = turned.reshape(groups, config.group, size)
        out = mixed.reshape(groups, config.group, size)
        position = Variable("position", 0)
        steps = weights.embedding.look_up(self._token, self._x[:1])
        for layer, keys, values in zip(weights.layers, self._keys, self._values, strict=True):
            flat_keys, flat_values = (cache.reshape(groups, self.context, size) for cache in (keys, values))
            steps += [
                *layer.qkv.apply_norm(x, layer.attention_gain, epsilon, qkv.reshape(-1), work),
                *self._add_bias(qkv, layer.bias),
                (self._rotate_and_cache, (q, k, v, self._cosine, self._sine, position, turned, keys, values)),
                (self._attention_decode, (queries, flat_keys, flat_values, position, self._scale, out)),
                *layer.output.apply_residual(mixed, x, y, work),
                *layer.gate.apply_norm_swiglu(layer.up, y, layer.feed_forward_gain, epsilon, hidden, work),
                *layer.down.apply_residual(hidden, y, x, work),
            ]
        return steps + weights.logits.apply_norm(x, weights.gain, epsilon, self.logits, work)

    def _add_bias(self, qkv: Array, bias: Array | None) -> Steps:
        return [] if bias is None else [(add.add_bias_in_place, (qkv.reshape(len(qkv), -1), bias))]

    def _feed_several(self, tokens: Sequence[int], last: bool) -> None:
        config, weights, options = self.config, self.weights, self._options
        count, position = len(tokens), self.position
        heads, groups, size, epsilon = config.heads, config.kv_heads, config.head_features, config.epsilon
        x, y, normed, mixed = self._x[:count], self._y[:count], self._normed[:count], self._mixed[:count]
        hidden, qkv, turned = self._hidden[:count], self._qkv[:count], self._turned[:count]
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + groups], qkv[:, heads + groups :]
        queries = turned.reshape(count, groups, config.group, size)
        out = mixed.reshape(count, groups, config.group, size)
        self._run(weights.embedding.look_up(np.array(tokens, dtype=np.int32), x))
        for layer, keys, values in zip(weights.layers, self._keys, self._values, strict=True):
            flat_keys, flat_values = (cache.reshape(groups, self.context, size) for cache in (keys, values))
            norm.rms_norm(x, layer.attention_gain, epsilon, normed, **options)
            self._multiply("matmul_nt", normed, [layer.qkv], qkv.reshape(count, -1))
            self._run(self._add_bias(qkv, layer.bias))
            self._rotate_and_cache(q, k, v, self._cosine, self._sine, position, turned, keys, values, **options)
            self._attention(queries, flat_keys, flat_values, position, self._scale, out, **options)
            self._multiply("matmul_nt_residual", mixed, [layer.output], x, y)
            norm.rms_norm(y, layer.feed_forward_gain, epsilon, normed, **options)
            self._multiply("matmul_swiglu", normed, [layer.gate, layer.up], hidden)
            self._multiply("matmul_nt_residual", hidden, [layer.down], y, x)
        if last:
            self._run(weights.logits.apply_norm(x[count - 1], weights.gain, epsilon, self.logits, self._work))
