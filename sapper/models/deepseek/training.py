"""Training of a DeepSeek model: what its attention adds to a step (models/trainer.py).

In: a checkpoint. Out: `Trainer`. Holds: what the base holds; rows are in the order of the file, which says how features
pair. All tokens attend naively: keys and values of all heads are made.

    n ── joined ─┬─ (latent queries ── norm ── query) ── queries, turned ──┐
                 ├─ latent ── norm ── expand ── keys and values of heads ──┼─ attention ── mixed
                 └─ shared key, turned ────────────────────────────────────┘
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...kernels import gradients, mla_gradient, norm
from .. import trainer
from ..adapted import product, through_matrix
from ..checkpoint import Checkpoint
from ..errors import ModelError
from ..trained import F32, Kept, Memory, Places
from ..workspace import Steps
from . import config as configs
from .config import LATENT_EPSILON, DeepseekConfig
from .weights import GGUF_NAMES, NAMES

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Attention:
    """joined [(query_rank or heads * head_features) + key_rank + turned_features, features]: rows of the queries'
    latent vector, or of the queries where there is none, then of the latent vector of keys and values, and of the
    shared key. query_gain [query_rank], query [heads * head_features, query_rank], or None. key_gain [key_rank]. expand
    [heads * (key_features + value_features), key_rank]: of each head the key's rows, then the value's."""

    joined: Array
    query_gain: Array | None
    query: Array | None
    key_gain: Array
    expand: Array


@dataclass(frozen=True, slots=True)
class KeptAttention:
    """Of each token what the matrices of the same names give, with what turns turned; query_normed, latent_normed: what
    two of them take. query: None where queries are a part of `joined`. level: see mla_gradient.py."""

    joined: Array
    query_normed: Array | None
    query: Array | None
    latent_normed: Array
    expanded: Array
    level: Array


class Trainer(trainer.Trainer):
    """A DeepSeek-V2, V2-Lite or V3 in training. Its MTP heads, if there are any, stay as they are."""

    config: DeepseekConfig

    def __init__(self, checkpoint: Checkpoint, sequences: int, length: int | None, **options: Any) -> None:
        """Raises ModelError for a checkpoint that is no DeepSeek's, or has an indexer, and as the base does."""
        config = (configs.from_gguf if checkpoint.gguf else configs.from_json)(checkpoint.metadata, checkpoint.where)
        if config.indexer is not None:
            raise ModelError(checkpoint.where, "a model that chooses the positions it attends to (V3.2)",
                             "a model whose tokens attend to all", "train a DeepSeek-V2 or V3")
        super().__init__(checkpoint, config, GGUF_NAMES if checkpoint.gguf else NAMES, sequences, length, **options)

    @property
    def _published(self) -> Mapping[str, str]:
        return NAMES

    @property
    def _width(self) -> int:
        return self.config.heads * self.config.value_features

    @property
    def _first(self) -> int:
        """Rows of `joined` before the latent vector's."""
        return self.config.query_rank or self.config.heads * self.config.head_features

    @property
    def _made_features(self) -> int:
        """Of a head's key and value."""
        return self.config.key_features + self.config.value_features

    # ---- memory

    def _attention_in(self, places: Places) -> Attention:
        config, rank = self.config, self.config.query_rank
        first = "query_latent" if rank else "all_queries"
        latent, queries = config.key_rank + config.turned_features, config.heads * config.head_features
        made = config.heads * self._made_features
        return Attention(
            places.matrix(self._first + latent, config.features, of={first: self._first, "key_latent": latent}),
            places.vector(rank) if rank else None,
            places.matrix(queries, rank, of={"query": queries}) if rank else None,
            places.vector(config.key_rank), places.matrix(made, config.key_rank, of={"expand": made}))

    def _attention_tensors(self, one: Attention, layer: int) -> dict[str, Array]:
        config = self.config
        first, latent = np.split(one.joined, [self._first])
        found = {"query_latent" if config.query_rank else "all_queries": first, "key_latent": latent,
                 "key_gain": one.key_gain}
        if one.query is not None and one.query_gain is not None:
            found |= {"query_gain": one.query_gain, "query": one.query}
        if self._names["expand"].format(layer) in self.checkpoint.tensors or "expand_keys" not in self._names:
            return {**found, "expand": one.expand}
        of_heads = one.expand.reshape(config.heads, self._made_features, -1)
        keys, values = np.split(of_heads, [config.key_features], axis=1)
        return {**found, "expand_keys": keys.swapaxes(1, 2), "expand_values": values}

    def _kept_of_attention(self, memory: Memory) -> KeptAttention:
        config, rows, rank = self.config, self._rows, self.config.query_rank

        def room(columns: int) -> Array:
            return memory.empty((rows, columns), F32)

        return KeptAttention(
            room(self._first + config.key_rank + config.turned_features), room(rank) if rank else None,
            room(config.heads * config.head_features) if rank else None, room(config.key_rank),
            room(config.heads * self._made_features), memory.empty((self.sequences, config.heads, self.length), F32))

    def _make_attention_room(self, memory: Memory) -> None:
        self._dkept = self._kept_of_attention(memory)
        self._dshared = memory.empty((self._rows, self.config.heads, self.config.turned_features), F32)

    # ---- the program

    def _latent(self, kept: KeptAttention) -> Array:
        return kept.joined[:, self._first : self._first + self.config.key_rank]

    def _shared(self, kept: KeptAttention) -> Array:
        return kept.joined[:, self._first + self.config.key_rank :]

    def _of_sequences(self, rows: Array, *extents: int) -> Array:
        return rows.reshape(self.sequences, self.length, *extents, rows.shape[-1])

    def _parts(self, kept: KeptAttention) -> tuple[Array, Array, Array, Array, Array]:
        """What attention meets: queries [sequences, length, heads, key_features], what of them turns, keys, the shared
        one [sequences, length, turned_features], values."""
        config = self.config
        of_heads = self.sequences, self.length, config.heads, -1
        queries = kept.joined[:, : self._first] if kept.query is None else kept.query
        still, turning = np.split(queries.reshape(of_heads), [config.key_features], axis=-1)
        keys, values = np.split(kept.expanded.reshape(of_heads), [config.key_features], axis=-1)
        return still, turning, keys, self._of_sequences(self._shared(kept)), values

    def _turn_both(self, kept: KeptAttention, sine: Array) -> Steps:
        _, turning, _, shared, _ = self._parts(kept)
        return [*self._turn(turning, sine, self.config.interleaved),
                *self._turn(shared[:, :, None], sine, self.config.interleaved)]

    def _attend(self, one: Attention, kept: Kept) -> Steps:
        config, own = self.config, kept.attention
        queries: Steps = []
        if one.query is not None:
            queries = [
                (norm.rms_norm, (own.joined[:, : self._first], one.query_gain, LATENT_EPSILON, own.query_normed)),
                *product(one.query, own.query_normed, own.query)]
        return [
            *product(one.joined, kept.attention_normed, own.joined),
            *queries,
            (norm.rms_norm, (self._latent(own), one.key_gain, LATENT_EPSILON, own.latent_normed)),
            *product(one.expand, own.latent_normed, own.expanded),
            *self._turn_both(own, self._sine),
            (mla_gradient.latent_attention_kept, (
                *self._parts(own), config.score_scale, self._mixed(kept.mixed), own.level)),
        ]

    def _mixed(self, rows: Array) -> Array:
        return rows.reshape(self.sequences, self.length, self.config.heads, -1)

    def _attend_back(self, one: Attention, found: Attention, kept: Kept, dnormed: Array | None) -> Steps:
        config, own, back = self.config, kept.attention, self._dkept
        dstill, dturning, dkeys, _, dvalues = self._parts(back)
        parts, dmixed, scale = self._parts(own), self._mixed(self._dmixed), config.score_scale
        steps: Steps = [
            (mla_gradient.latent_gradient_queries, (
                *parts, own.level, self._mixed(kept.mixed), dmixed, scale, dstill, dturning, back.level)),
            (mla_gradient.latent_gradient_keys, (
                *parts, own.level, back.level, dmixed, scale, dkeys,
                self._dshared.reshape(self.sequences, self.length, *self._dshared.shape[1:]), dvalues)),
            (mla_gradient.head_sums, (self._dshared, self._shared(back))),
            *self._turn_both(back, self._back),
            *through_matrix(one.expand, found.expand, back.expanded, own.latent_normed, back.latent_normed),
            self._latent_back(self._latent(own), one.key_gain, back.latent_normed, self._latent(back), found.key_gain),
        ]
        if one.query is not None:
            first, dfirst = (rows.joined[:, : self._first] for rows in (own, back))
            steps += [
                *through_matrix(one.query, found.query, back.query, own.query_normed, back.query_normed),
                self._latent_back(first, one.query_gain, back.query_normed, dfirst, found.query_gain)]
        return [*steps, *through_matrix(one.joined, found.joined, back.joined, kept.attention_normed, dnormed)]

    def _latent_back(self, x: Array, gain: Any, dy: Any, dx: Array, dgain: Any) -> tuple[Any, tuple[Any, ...]]:
        """The norm of a latent vector, backwards. dgain: None where the gain stays as it is."""
        x, dy, dx = (rows[:, None] for rows in (x, dy, dx))
        if dgain is None:
            return gradients.head_norm_past, (x, gain, LATENT_EPSILON, dy, dx)
        return gradients.head_norm_gradient, (
            x, gain, LATENT_EPSILON, dy, self._factor.reshape(-1, 1), dx, dgain)
