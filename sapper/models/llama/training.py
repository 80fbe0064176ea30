"""Training of a Llama, and of models much like it: what its attention adds to a step (models/trainer.py).

In: a checkpoint. Out: `Trainer`. Holds: what the base holds; rows are in the order of the file, which says how features
pair.

    n ── qkv (+ bias) ── (norms of heads) ── turned ── attention ── mixed
    dmixed ── dqkv, of turned ones ── turned back ── (norms of heads) ── dqkv ── dn
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...kernels import add, attention_gradient, gradients, norm
from .. import trainer
from ..adapted import product, through_matrix
from ..checkpoint import Checkpoint
from ..trained import F32, Kept, Memory, Places
from ..workspace import Steps
from . import config as configs
from .config import LlamaConfig
from .weights import GGUF_NAMES, JSON_NAMES, file_order

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Attention:
    """qkv [(heads + 2 * kv_heads) * head_features, features]: query rows, then key, then value rows; bias of them, or
    None. query_gain, key_gain [head_features], of the norms of each head, or None."""

    qkv: Array
    bias: Array | None
    query_gain: Array | None
    key_gain: Array | None


@dataclass(frozen=True, slots=True)
class KeptAttention:
    """qkv [rows, (heads + 2 * kv_heads) * head_features]. turned [rows, (heads + kv_heads) * head_features]: queries
    and keys where heads have norms; else they turn where they lie. level: see attention_gradient.py."""

    qkv: Array
    turned: Array | None
    level: Array


class Trainer(trainer.Trainer):
    """A Llama in training, or a Mistral, Qwen2, Qwen3 or Qwen3-MoE."""

    config: LlamaConfig

    def __init__(self, checkpoint: Checkpoint, sequences: int, length: int | None, **options: Any) -> None:
        """Raises ModelError for a checkpoint that is no Llama's, and as the base does."""
        read = configs.from_gguf if checkpoint.gguf else configs.from_json
        self._interleaved = checkpoint.gguf and checkpoint.architecture == "llama"
        super().__init__(
            checkpoint, read(checkpoint.metadata, checkpoint.where), GGUF_NAMES if checkpoint.gguf else JSON_NAMES,
            sequences, length, **options)

    @property
    def _published(self) -> Mapping[str, str]:
        return JSON_NAMES

    def _order_of(self, role: str) -> Array | None:
        return file_order(self.checkpoint, self.config, role)

    @property
    def _width(self) -> int:
        return self.config.heads * self.config.head_features

    @property
    def _scale(self) -> float:
        return float(self.config.head_features**-0.5)

    # ---- memory

    def _attention_in(self, places: Places) -> Attention:
        config, size = self.config, self.config.head_features
        rows = (config.heads + 2 * config.kv_heads) * size
        gains = [places.vector(size) if config.normed else None for _ in range(2)]
        of = {"query": config.heads * size, "key": config.kv_heads * size, "value": config.kv_heads * size}
        return Attention(places.matrix(rows, config.features, of=of), places.vector(rows) if config.biased else None,
                         *gains)

    def _attention_tensors(self, one: Attention, layer: int) -> dict[str, Array]:
        size, heads, kv_heads = self.config.head_features, self.config.heads, self.config.kv_heads
        ends = [heads * size, (heads + kv_heads) * size]
        roles = ("query", "key", "value")
        found = dict(zip(roles, np.split(one.qkv, ends), strict=True))
        if one.bias is not None:
            found |= zip((f"{role}_bias" for role in roles), np.split(one.bias, ends), strict=True)
        if one.query_gain is not None and one.key_gain is not None:
            found |= {"query_gain": one.query_gain, "key_gain": one.key_gain}
        return found

    def _kept_of_attention(self, memory: Memory) -> KeptAttention:
        config, size, rows = self.config, self.config.head_features, self._rows
        both, kv_heads = config.heads + config.kv_heads, config.kv_heads
        return KeptAttention(
            memory.empty((rows, (both + kv_heads) * size), F32),
            memory.empty((rows, both * size), F32) if config.normed else None, self._level_in(memory))

    def _level_in(self, memory: Memory) -> Array:
        return memory.empty((self.sequences, self.config.kv_heads, self.config.group, self.length), F32)

    def _make_attention_room(self, memory: Memory) -> None:
        self._dkept = self._kept_of_attention(memory)
        self._head_factors = memory.empty((self._rows * self.config.heads,), F32)

    # ---- the program

    def _heads(self, rows: Array) -> Array:
        """[sequences, length, heads, head_features]"""
        return rows.reshape(self.sequences, self.length, -1, self.config.head_features)

    def _grouped(self, heads: Array) -> Array:
        config = self.config
        return heads.reshape(self.sequences, self.length, config.kv_heads, config.group, config.head_features)

    def _parts(self, rows: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values, if there are any, as `_heads`."""
        heads, kv_heads = self.config.heads, self.config.kv_heads
        queries, keys, values = np.split(self._heads(rows), [heads, heads + kv_heads], axis=2)
        return queries, keys, values

    def _turned(self, kept: KeptAttention) -> tuple[Array, Array, Array]:
        """Queries and keys that turn, and both together."""
        heads, kv_heads = self.config.heads, self.config.kv_heads
        both = self._heads(kept.qkv if kept.turned is None else kept.turned)[:, :, : heads + kv_heads]
        return both[:, :, :heads], both[:, :, heads:], both

    def _norms(self, one: Attention) -> list[tuple[int, Array]]:
        """Where queries and keys stand among parts, and the gains of their norms."""
        gains = [] if one.query_gain is None or one.key_gain is None else [one.query_gain, one.key_gain]
        return list(enumerate(gains))

    def _flat(self, heads: Array) -> Array:
        """[rows, heads, head_features]"""
        return heads.reshape(self._rows, *heads.shape[2:])

    def _attend(self, one: Attention, kept: Kept) -> Steps:
        own: KeptAttention = kept.attention
        parts, (queries, keys, both) = self._parts(own.qkv), self._turned(own)
        turned = queries, keys
        return [
            *product(one.qkv, kept.attention_normed, own.qkv),
            *([] if one.bias is None else [(add.add_bias_in_place, (own.qkv, one.bias))]),
            *((norm.head_norm, (self._flat(parts[i]), gain, self.config.epsilon, self._flat(turned[i])))
              for i, gain in self._norms(one)),
            *self._turn(both, self._sine, self._interleaved),
            (attention_gradient.attention_kept, (
                self._grouped(queries), keys, parts[2], self._scale, self._grouped(kept.mixed), own.level)),
        ]

    def _attend_back(self, one: Attention, found: Attention, kept: Kept, dnormed: Array | None) -> Steps:
        own: KeptAttention = kept.attention
        parts, (queries, keys, _) = self._parts(own.qkv), self._turned(own)
        dqkv, along = self._dkept.qkv, self._dkept.level
        dparts, (dqueries, dkeys, dboth) = self._parts(dqkv), self._turned(self._dkept)
        dturned, dmixed, queries = (dqueries, dkeys), self._grouped(self._dmixed), self._grouped(queries)
        steps: Steps = [
            (attention_gradient.attention_gradient_queries, (
                queries, keys, parts[2], own.level, self._grouped(kept.mixed), dmixed, self._scale,
                self._grouped(dqueries), along)),
            (attention_gradient.attention_gradient_keys, (
                queries, keys, parts[2], own.level, along, dmixed, self._scale, dkeys, dparts[2])),
            *self._turn(dboth, self._back, self._interleaved),
        ]
        dgains = found.query_gain, found.key_gain
        for i, gain in self._norms(one):
            steps.append(self._heads_back(self._flat(parts[i]), gain, self._flat(dturned[i]), self._flat(dparts[i]),
                                          dgains[i]))
        if found.bias is not None:
            steps.append((gradients.column_sums, (dqkv, found.bias)))
        return [*steps, *through_matrix(one.qkv, found.qkv, dqkv, kept.attention_normed, dnormed)]

    def _heads_back(self, x: Array, gain: Array, dy: Array, dx: Array, dgain: Array | None) -> tuple[Any, Any]:
        """The norm of heads, backwards. dgain: None where the gain stays as it is."""
        if dgain is None:
            return gradients.head_norm_past, (x, gain, self.config.epsilon, dy, dx)
        factors = self._head_factors[: self._rows * x.shape[1]].reshape(self._rows, -1)
        return gradients.head_norm_gradient, (x, gain, self.config.epsilon, dy, factors, dx, dgain)
