"""The forward pass: tokens in, logits out, with a KV cache. Every number is computed by sapper's kernels.

In: a LlamaModel. Out: `Session`, whose `feed` runs tokens and leaves the logits of the last one in `logits`. Holds: all
buffers are made once; NumPy only makes views of them.

    tokens ── embedding ── x ─┬─ norm, qkv ── rotate_and_cache ── attention ── output, + x ── y ─┐
                              └─────────────── next layer ── x ── feed-forward (models/mixing.py) ┘
    x ── norm, logits of the last token

Where each head of queries and keys has a norm (Qwen3), norm_rotate_and_cache takes the place of rotate_and_cache.

One token goes through matrix-vector kernels with the norm inside, several through matrix kernels, up to CHUNK at once.
Each is one program: the position and the number of tokens are its variables, and where there are experts `routed_N`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...kernels import add, attention, rope
from ...runtime.program import Variable
from ..errors import ModelError
from ..linear import Matrix
from ..mixing import Mixing
from ..workspace import Sections, Steps, Workspace

if TYPE_CHECKING:
    from .model import LlamaModel
    from .weights import LlamaWeights

Array = np.ndarray[Any, np.dtype[Any]]


def cache_dtype_of(form: str, weights: LlamaWeights) -> str:
    """The dtype of the cache of a model whose weights are held in that form: f32 where all else is exact. It is read as
    a whole for each token, and bf16 leaves the perplexity of SmolLM2 where it was (docs/models.md)."""
    return "f32" if form in ("f32", "file-f32") else "bf16"


class Session(Mixing):
    """One conversation with a Llama model."""

    model: LlamaModel
    _qkv: Array
    _turned: Array
    _mixed: Array

    def __init__(
        self, model: LlamaModel, context: int | None = None, *, cache_dtype: str | None = None,
        threads: int | None = None, interpret: bool = False,
    ) -> None:
        """As BaseSession has it; cache_dtype: None for what suits the weights."""
        config, cache_dtype = model.config, cache_dtype or model.cache_dtype
        if config.windowed and context is not None and context > config.positions:
            raise ModelError("the context", f"{context} tokens", f"1 to {config.positions}, {config.limit}")
        mixture = config.mixture
        work = Workspace(max(config.features, config.hidden, config.heads * config.head_features,
                             0 if mixture is None else mixture.taken * mixture.hidden), threads)
        super().__init__(config.vocabulary, config.positions, context, cache_dtype, threads, interpret, work)
        self.model = model
        pairs, groups = config.head_features // 2, config.kv_heads
        self._cosine, self._sine = config.rope.tables(self.context, model.weights.rope_factors)
        extents = self._cache_extents(groups, 2, pairs)
        self._keys, self._values = (self._caches(config.layers, extents) for _ in range(2))
        self._scale = config.head_features**-0.5
        self._attention_decode = getattr(attention, f"attention_decode_{cache_dtype}")
        self._rotate_and_cache = getattr(rope, f"{self._before}rotate_and_cache_{cache_dtype}")
        rows, kind = self.chunk, np.dtype(np.float32)  # Memory that is not used is never there.
        self._x, self._y = (self._arena.empty((rows, config.features), kind) for _ in range(2))
        experts = [] if mixture is None else self._mixture_turns(rows, mixture)
        self._take_turns({
            "_qkv": ((rows, config.heads + 2 * config.kv_heads, 2, pairs), kind),
            "_turned": ((rows, config.heads, 2, pairs), kind),
            "_mixed": ((rows, config.heads * config.head_features), kind),
        }, {"_hidden": ((rows, config.hidden), kind)},
            *({name: (extents, kind) for name, extents in part.items()} for part in experts))
        if mixture is not None:
            self._make_mixture_buffers(rows, mixture)

    def _chunk_values(self, count: int, most: int | None = None) -> dict[str, int]:
        return super()._chunk_values(count, most) | self._routed_values(count, self.model.weights.layers)

    @property
    def _before(self) -> str:
        """What the names of kernels that turn queries and keys begin with."""
        return "norm_" if self.model.config.normed else ""

    def _norms(self, layer: int) -> tuple[Any, ...]:
        """What these kernels take behind queries, keys and values."""
        weights = self.model.weights.layers[layer]
        return (weights.query_gain, weights.key_gain, self.model.config.epsilon) if self.model.config.normed else ()

    def _cache_extents(self, groups: int, *features: int) -> tuple[int, ...]:
        """Of the keys, and of the values, of a layer."""
        return groups, self.context, *features

    def state(self) -> dict[str, Array]:
        return {f"layer {i} {part}": cache for part, caches in (("keys", self._keys), ("values", self._values))
                for i, cache in enumerate(caches)}

    def step_sections(self) -> Sections:
        weights, work, epsilon = self.model.weights, self._work, self.model.config.epsilon
        x, y, mixed = self._x[0], self._y[0], self._mixed[0]
        qkv = self._qkv[:1]
        sections = [("embedding", [*weights.embedding.look_up(self._token, self._x[:1]), *self._cut_one()])]
        for number, layer in enumerate(weights.layers):
            bias = [] if layer.bias is None else [(add.add_bias_in_place, (qkv.reshape(1, -1), layer.bias))]
            sections += [
                (f"layer {number}: attention", [
                    *layer.qkv.apply_norm(x, layer.attention_gain, epsilon, qkv.reshape(-1), work), *bias,
                    *self._attend_one(number),
                    *layer.output.apply_residual(mixed, x, y, work),
                ]),
                self._feed_forward_one(number, layer.feed_forward),
            ]
        return [*sections, ("logits", weights.logits.apply_norm(x, weights.gain, epsilon, self.logits, work))]

    def chunk_sections(self) -> Sections:
        weights, rows, epsilon = self.model.weights, self._rows, self.model.config.epsilon
        # Where a half of a layer puts its result, its input lies after the norm before.
        x, y, mixed, qkv = self._x, self._y, self._mixed, self._qkv
        flat_qkv = qkv.reshape(self.chunk, -1)
        sections = [("embedding", [*self._look_up(weights.embedding, x), *self._cut()])]
        for number, layer in enumerate(weights.layers):
            bias = [] if layer.bias is None else [(add.add_bias_in_place, (rows(flat_qkv), layer.bias))]
            to_attention = self._as_met(y, layer.qkv)
            sections += [
                (f"layer {number}: attention", [
                    *self._norm(x, layer.attention_gain, epsilon, to_attention),
                    *self._multiply("matmul_nt", to_attention, [layer.qkv], flat_qkv), *bias,
                    *self._attend(number),
                    *self._multiply("matmul_nt_residual", mixed, [layer.output], x, y),
                ]),
                self._feed_forward(number, layer.feed_forward),
            ]
        return sections

    def _parts(self) -> tuple[Array, Array, Array, Array, Array]:
        """Views of all tokens' rows: queries, keys and values [rows, heads, 2, pairs], turned queries and what
        attention gives [rows, kv_heads, group, head_features]."""
        config, qkv = self.model.config, self._qkv
        heads, groups = config.heads, config.kv_heads
        turned, out = (array.reshape(self.chunk, groups, config.group, config.head_features)
                       for array in (self._turned, self._mixed))
        return qkv[:, :heads], qkv[:, heads : heads + groups], qkv[:, heads + groups :], turned, out

    def _attend_one(self, layer: int) -> Steps:
        """From the queries, keys and values of one token to what attention gives."""
        position, groups = Variable("position", 0), self.model.config.kv_heads
        q, k, v, queries, out = (array[:1] for array in self._parts())
        keys, values = self._keys[layer], self._values[layer]
        flat = (cache.reshape(groups, self.context, -1) for cache in (keys, values))
        return [
            (self._rotate_and_cache, (q, k, v, *self._norms(layer), self._cosine, self._sine, position,
                                      self._turned[:1], keys, values)),
            (self._attention_decode, (queries[0], *flat, position, self._scale, out[0])),
        ]

    @property
    def _attends_rounded(self) -> bool:
        """Whether the tokens of a prompt attend in products of bf16, where keys and values are bf16; it follows the
        target of the code."""
        return self._cache_dtype == "bf16" and self._work.multiplies_bf16()

    def _attend(self, layer: int) -> Steps:
        """From queries, keys and values of a chunk's tokens to what attention gives."""
        rows, position, groups = self._rows, Variable("position", 0), self.model.config.kv_heads
        q, k, v, queries, out = self._parts()
        keys, values = self._keys[layer], self._values[layer]
        flat = (cache.reshape(groups, self.context, -1) for cache in (keys, values))
        attend = (attention.attention_rounded_f32 if self._attends_rounded
                  else getattr(attention, f"attention_{self._cache_dtype}"))
        return [
            (self._rotate_and_cache, (rows(q), rows(k), rows(v), *self._norms(layer), self._cosine, self._sine,
                                      position, rows(self._turned), keys, values)),
            (attend, (rows(queries), *flat, position, self._scale, rows(out))),
        ]

    def head(self) -> tuple[Matrix, Array, float]:
        return self.model.weights.logits, self.model.weights.gain, self.model.config.epsilon
