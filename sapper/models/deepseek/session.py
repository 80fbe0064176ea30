"""DeepSeek's forward pass: tokens in, logits out, with a cache of latent vectors.

In: a config and weights. Out: `Session`, whose `feed` runs tokens and leaves the logits of the last one in `logits`.
Holds: what BaseSession holds; a token reads the weights of the experts that it goes through, and of no others.

    tokens ── embedding ── x ── norm, joined ─┬─ (latent queries ── norm) ── queries ─┬─ attention ── output, + x ── y
                                              └─ compress ── cache ───────────────────┘
    y ─┬─ norm, gate, up ── SwiGLU ── down, + y ── x                       dense layers
       └─ norm, router ── gate ── experts: SwiGLU, weighted sum, + y ── x  mixtures
    x ── norm, logits of the last token

One token attends absorbed, several attend naively; see sapper/kernels/mla.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...kernels import embedding, gate, mla, moe, norm
from ...runtime.buffers import empty
from ...runtime.program import Variable
from ..linear import Steps, Workspace
from ..session import BaseSession
from ..weights import DTYPES
from .config import LATENT_EPSILON, DeepseekConfig
from .weights import AttentionWeights, DeepseekWeights, DenseWeights, LayerWeights, MixtureWeights

Array = np.ndarray[Any, np.dtype[Any]]
F32, I32 = np.dtype(np.float32), np.dtype(np.int32)


class Session(BaseSession):
    """One conversation with a DeepSeek model."""

    def __init__(
        self, config: DeepseekConfig, weights: DeepseekWeights, context: int | None = None, *,
        cache_dtype: str = "f32", threads: int | None = None, interpret: bool = False,
    ) -> None:
        """As BaseSession has it; cache_dtype is that of the latent vectors and of the shared keys."""
        widest = max(config.features, config.hidden, config.query_rank, config.heads * config.value_features)
        super().__init__(
            config.vocabulary, config.positions, context, cache_dtype, threads, interpret, Workspace(widest)
        )
        self.config, self.weights = config, weights
        self._cache_dtype = cache_dtype
        pairs = config.turned_features // 2
        self._cosine, self._sine = config.rope.tables(self.context)
        kind = DTYPES[cache_dtype]
        self._latents = [empty((self.context, config.key_rank), kind) for _ in weights.layers]
        self._keys = [empty((self.context, 2, pairs), kind) for _ in weights.layers]
        splits = -(-self.context // mla.SPLIT)
        self._highest, self._total = (empty((splits, config.heads), F32) for _ in range(2))
        self._partial = empty((splits, config.heads, config.key_rank), F32)
        self._absorbed, self._met = (empty((config.heads, config.key_rank), F32) for _ in range(2))
        self._expanded = empty((0,), F32)

    def _make_buffers(self, rows: int) -> None:
        config = self.config
        pairs = config.turned_features // 2
        self._x, self._y, self._normed = (empty((rows, config.features), F32) for _ in range(3))
        first = config.query_rank or config.heads * config.head_features
        self._joined = empty((rows, first + config.key_rank + config.turned_features), F32)
        self._query_latent = empty((rows, config.query_rank), F32)
        self._queries = empty((rows, config.heads * config.head_features), F32) if config.query_rank else self._joined
        self._turned = empty((rows, config.heads, 2, pairs), F32)
        self._mixed = empty((rows, config.heads * config.value_features), F32)
        self._hidden = empty((rows, config.hidden), F32)
        mixture = config.mixture
        if mixture is None:
            return
        count, taken = mixture.experts, mixture.taken
        self._scores = empty((rows, count), F32)
        self._experts, self._place = (empty((rows, taken), I32) for _ in range(2))
        self._shares = empty((rows, taken), F32)
        self._start, self._stop = (empty((count + mixture.shared,), I32) for _ in range(2))
        self._owners = empty((rows * taken,), I32)
        self._gathered, self._results = (empty((rows * taken, config.features), F32) for _ in range(2))
        self._expert_hidden = empty((rows * taken, mixture.hidden), F32)

    # ---- parts that one token and several share

    def _parts(self, rows: int) -> tuple[Array, Array, Array, Array]:
        """Views of `rows` tokens: queries [rows, heads, key_features], what of them turns [rows, heads, 2, pairs],
        latent vectors [rows, key_rank], shared keys [rows, 2, pairs].
        """
        config = self.config
        size, pairs = config.head_features, config.turned_features // 2
        joined = self._joined[:rows]
        queries = self._queries[:rows, : config.heads * size].reshape(rows, config.heads, size)
        first = joined.shape[1] - config.turned_features - config.key_rank
        return (
            queries[:, :, : config.key_features],
            queries[:, :, config.key_features :].reshape(rows, config.heads, 2, pairs),
            joined[:, first : first + config.key_rank], joined[:, first + config.key_rank :].reshape(rows, 2, pairs),
        )

    def _compress(self, rows: int, one: AttentionWeights, layer: int, position: Any) -> Steps:
        """The new tokens' rows of the cache, and their turned queries."""
        _, turning, latent, key = self._parts(rows)
        return [(getattr(mla, f"compress_{self._cache_dtype}"), (
            turning, latent, key, one.key_gain, LATENT_EPSILON, self._cosine, self._sine, position, self._turned[:rows],
            self._latents[layer], self._keys[layer],
        ))]

    def _gate(self, rows: int, one: MixtureWeights) -> Steps:
        """From scores to experts and their shares."""
        mixture = self.config.mixture
        assert mixture is not None
        scores = self._scores[:rows].reshape(rows, mixture.groups, mixture.experts // mixture.groups)
        settings = (mixture.kept, mixture.chosen, mixture.normalise, mixture.scale, self._experts[:rows],
                    self._shares[:rows])
        if one.bias is None:
            return [(gate.gate_softmax, (scores, *settings))]
        return [(gate.gate_sigmoid, (scores, one.bias.reshape(scores.shape[1:]), *settings))]

    def _heads_of(self, one: AttentionWeights) -> tuple[Array, Array]:
        """The rows of `expand` that make keys [heads, key_features, key_rank], and values."""
        config = self.config
        rows = config.key_features + config.value_features
        matrices = one.expand.weights.reshape(config.heads, rows, config.key_rank)
        return matrices[:, : config.key_features], matrices[:, config.key_features :]

    # ---- one token

    def _decode_steps(self) -> Steps:
        weights, position = self.weights, Variable("position", 0)
        steps = weights.embedding.look_up(self._token, self._x[:1])
        for number, layer in enumerate(weights.layers):
            steps += self._attend_one(layer.attention, number, position)
            one = layer.feed_forward
            steps += self._dense_one(one) if isinstance(one, DenseWeights) else self._mixture_one(one)
        return steps + weights.logits.apply_norm(
            self._x[0], weights.gain, self.config.epsilon, self.logits, self._work)

    def _attend_one(self, one: AttentionWeights, layer: int, position: Variable) -> Steps:
        """x to y."""
        config, work, dtype, cache = self.config, self._work, one.expand.dtype, self._cache_dtype
        x, y, joined = self._x[0], self._y[0], self._joined[0]
        steps = one.joined.apply_norm(x, one.gain, config.epsilon, joined, work)
        if one.query is not None and one.query_gain is not None:
            latent = joined[: config.query_rank]
            steps += one.query.apply_norm(latent, one.query_gain, LATENT_EPSILON, self._queries[0], work)
        keys, values = self._heads_of(one)
        flat_keys = self._keys[layer].reshape(self.context, -1)
        splits = (self._highest, self._total, self._partial)
        return [
            *steps, *self._compress(1, one, layer, position),
            (getattr(mla, f"absorb_{dtype}"), (self._parts(1)[0][0], keys, self._absorbed)),
            (getattr(mla, f"latent_attention_decode_{cache}"), (
                self._absorbed, self._turned[0].reshape(config.heads, -1), self._latents[layer], flat_keys, position,
                config.score_scale, *splits,
            )),
            (mla.merge_splits, (*splits, position, self._met)),
            (getattr(mla, f"project_values_{dtype}"), (self._met, values, self._mixed[0].reshape(config.heads, -1))),
            *one.output.apply_residual(self._mixed[0], x, y, work),
        ]

    def _dense_one(self, one: DenseWeights) -> Steps:
        """y to x."""
        x, y, hidden, epsilon, work = self._x[0], self._y[0], self._hidden[0], self.config.epsilon, self._work
        return [*one.gate.apply_norm_swiglu(one.up, y, one.gain, epsilon, hidden, work),
                *one.down.apply_residual(hidden, y, x, work)]

    def _mixture_one(self, one: MixtureWeights) -> Steps:
        """y to x."""
        x, y, epsilon = self._x[0], self._y[0], self.config.epsilon
        experts, hidden = self._experts[0], self._expert_hidden[: one.taken]
        return [
            *one.router.apply_norm(y, one.gain, epsilon, self._scores[0], self._work), *self._gate(1, one),
            *one.gate.apply_norm_swiglu(one.up, experts, y, one.gain, epsilon, hidden),
            *one.down.apply_weighted(experts, self._shares[0], hidden, y, x),
        ]

    # ---- several tokens

    def _feed_several(self, tokens: Sequence[int], last: bool) -> None:
        weights, count = self.weights, len(tokens)
        x = self._x[:count]
        self._run(weights.embedding.look_up(np.array(tokens, dtype=np.int32), x))
        for number, layer in enumerate(weights.layers):
            self._layer(layer, number, count)
        if last:
            self._run(weights.logits.apply_norm(
                x[count - 1], weights.gain, self.config.epsilon, self.logits, self._work))

    def _layer(self, layer: LayerWeights, number: int, count: int) -> None:
        self._attend(layer.attention, number, count)
        one = layer.feed_forward
        y, normed = self._y[:count], self._normed[:count]
        norm.rms_norm(y, one.gain, self.config.epsilon, normed, **self._options)
        if isinstance(one, DenseWeights):
            self._multiply("matmul_swiglu", normed, [one.gate, one.up], self._hidden[:count])
            self._multiply("matmul_nt_residual", self._hidden[:count], [one.down], y, self._x[:count])
        else:
            self._mixture(one, count)

    def _attend(self, one: AttentionWeights, layer: int, count: int) -> None:
        """x to y."""
        config, options, position = self.config, self._options, self.position
        x, joined, normed = self._x[:count], self._joined[:count], self._normed[:count]
        norm.rms_norm(x, one.gain, config.epsilon, normed, **options)
        self._multiply("matmul_nt", normed, [one.joined], joined)
        if one.query is not None and one.query_gain is not None:
            latent = self._query_latent[:count]
            norm.rms_norm(joined[:, : config.query_rank], one.query_gain, LATENT_EPSILON, latent, **options)
            self._multiply("matmul_nt", latent, [one.query], self._queries[:count])
        self._run(self._compress(count, one, layer, position))
        keys, values = self._expand(one, layer, position + count)
        shared = self._keys[layer][: position + count].reshape(position + count, -1)
        turned = self._turned[:count].reshape(count, config.heads, -1)
        mixed = self._mixed[:count]
        attention = getattr(mla, f"latent_attention_{self._cache_dtype}")
        attention(self._parts(count)[0], turned, keys, shared, values, position, config.score_scale,
                  mixed.reshape(count, config.heads, -1), **options)
        self._multiply("matmul_nt_residual", mixed, [one.output], x, self._y[:count])

    def _expand(self, one: AttentionWeights, layer: int, filled: int) -> tuple[Array, Array]:
        """The keys and values of all heads at the first `filled` positions."""
        config = self.config
        rows, columns = filled, len(one.expand.weights)
        if self._expanded.size < rows * columns:
            self._expanded = empty((min(self.context, 2 * rows) * columns,), F32)
        expanded = self._expanded[: rows * columns].reshape(rows, columns)
        kernel = getattr(mla, f"expand_{self._cache_dtype}_{one.expand.dtype}")
        kernel(self._latents[layer][:filled], one.expand.weights, expanded, **self._options)
        heads = expanded.reshape(rows, config.heads, config.key_features + config.value_features)
        return heads[:, :, : config.key_features], heads[:, :, config.key_features :]

    def _mixture(self, one: MixtureWeights, count: int) -> None:
        """The norm of y, and y, to x."""
        normed = self._normed[:count]
        self._multiply("matmul_nt", normed, [one.router], self._scores[:count])
        rows = count * one.taken
        experts, place, owners = self._experts[:count], self._place[:count], self._owners[:rows]
        gathered, hidden, results = self._gathered[:rows], self._expert_hidden[:rows], self._results[:rows]
        start, stop = self._start, self._stop
        self._run([
            *self._gate(count, one), (moe.group_tokens, (experts, start, stop, place, owners)),
            (embedding.embedding_f32, (owners, normed, gathered)),
            *one.gate.grouped_swiglu(one.up, gathered, start, stop, hidden),
            *one.down.grouped(hidden, start, stop, results),
            (moe.combine_experts, (results, place, self._shares[:count], self._y[:count], self._x[:count])),
        ])
