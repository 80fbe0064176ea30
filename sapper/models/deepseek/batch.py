"""Several sequences through a DeepSeek model at once: attention over pages of latent vectors.

In: a DeepseekModel. Out: `Batch`. Holds: what models/batch.py says; all but attention is that of a session's chunk.
Tokens that attend alone do so absorbed (sapper/kernels/mla.py); for runs the pages of their sequences are gathered, and
keys and values made of them, as of a session's cache. With an indexer all tokens attend alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from ...kernels import paged, runs, sparse_paged
from ...kernels.paged import PAGE
from ...kernels.shares import GRAIN
from ...runtime.buffers import empty
from ...runtime.program import Variable
from ..batch import Array, Paged, first
from ..shares import Shares, workers_of
from ..weights import DTYPES
from ..workspace import Steps, in_blocks
from .config import LATENT_EPSILON
from .session import F32, Session
from .weights import AttentionWeights


class Batch(Paged, Session):
    """Sequences of one model."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """As Paged has it. Raises ModelError."""
        super().__init__(*arguments, **options)
        config = self.model.config
        self._gathered_pages = tuple(self._arena.empty((self._most_filled, features), DTYPES[self._cache_dtype])
                                     for features in (config.key_rank, config.turned_features))
        self._sharing = Shares(workers_of(self._options), config.heads, config.key_rank)

    @property
    def _makes_runs(self) -> bool:
        return self.model.config.indexer is None

    @property
    def _most_filled(self) -> int:
        return self._runs.room * PAGE

    def _arrange(self, columns: Array, capacity: int) -> tuple[Array, Array, dict[str, int]]:
        columns, rows, values = super()._arrange(columns, capacity)
        return columns, rows, values | {"filled": values["pages"] * PAGE} if values else values

    def _cache_extents(self, *features: int) -> tuple[int, ...]:
        return self.pages, PAGE, *features

    def _meet(self, one: AttentionWeights, layer: int, position: Variable) -> Steps:
        return [*self._put(one, layer, self._rows), *self._attend_alone(one, layer, self._of_loose),
                *self._attend_runs(one, layer)]

    def _meet_one(self, one: AttentionWeights, layer: int, position: Variable) -> Steps:
        return [*self._put(one, layer, first), *self._attend_alone(one, layer, first)]

    def _where(self, rows: Callable[[Array], Any]) -> tuple[Any, ...]:
        return rows(self._slot_of), rows(self._position_of), self.table

    def _put(self, one: AttentionWeights, layer: int, rows: Callable[[Array], Any]) -> Steps:
        """Latent vectors and shared keys to their pages."""
        _, turning, latent, key = self._parts()
        return [(getattr(paged, f"compress_paged_{self._cache_dtype}"), (
            rows(turning), rows(latent), rows(key), one.key_gain, LATENT_EPSILON, self._cosine, self._sine,
            *self._where(rows), rows(self._turned), self._latents[layer], self._keys[layer],
        ))]

    @cached_property
    def _in_latent_space(self) -> tuple[Array, Array]:
        """Beside the keys and values of runs."""
        extents = self.chunk, self.model.config.heads * self.model.config.key_rank
        return empty(extents, F32), empty(extents, F32)

    def _cut_one(self) -> Steps:
        return self._cut_tokens(first)

    def _cut(self) -> Steps:
        return self._cut_tokens(self._of_loose)

    def _cut_tokens(self, rows: Callable[[Array], Any]) -> Steps:
        return self._sharing.of_tokens(rows(self._position_of), 1, PAGE if self._attends_rounded else GRAIN)

    def _pages(self, layer: int) -> tuple[Array, Array]:
        """Latent vectors [pages, PAGE, rank] and shared keys [pages, PAGE, features]."""
        return self._latents[layer], self._keys[layer].reshape(self.pages, PAGE, -1)

    def _attend_alone(self, one: AttentionWeights, layer: int, rows: Callable[[Array], Any]) -> Steps:
        """Absorbed attention, each token by itself."""
        config = self.model.config
        turned = self._turned.reshape(self.chunk, config.heads, -1)
        queries, found = self._in_latent_space
        operands = rows(in_blocks(queries, config.key_rank)), rows(turned), *self._pages(layer), *self._where(rows)
        return [
            *one.keys.absorb(rows(self._head_queries), rows(queries), self._work),
            *self._attend_pages(one, layer, rows, operands),
            *one.values.project(rows(found), rows(self._mixed), self._work),
        ]

    def _attend_pages(
        self, one: AttentionWeights, layer: int, rows: Callable[[Array], Any], operands: tuple[Any, ...]
    ) -> Steps:
        """Attention in the latent space; operands: the first ones of its kernels."""
        config, shares = self.model.config, self._sharing
        found = in_blocks(self._in_latent_space[1], config.key_rank)
        result = *shares.cuts, config.score_scale, *shares.left, rows(found)
        if one.index is None or config.indexer is None:
            products = "rounded" if self._attends_rounded else self._cache_dtype
            return [(getattr(paged, f"latent_attention_paged_{products}"), (*operands, *result)), *shares.merge(found)]
        chosen = rows(self._index_scores), rows(self._lowest), rows(self._last_kept)
        return [
            *self._index(one.index, config.indexer, layer, rows, self._where(rows), rows(self._position_of)),
            (getattr(sparse_paged, f"latent_attention_paged_sparse_{self._cache_dtype}"), (
                *operands, *chosen, *result)),
            *shares.merge(found),
        ]

    def _attend_runs(self, one: AttentionWeights, layer: int) -> Steps:
        """Naive attention of the tokens of runs."""
        if (of_step := self._runs_of_capacity()) is None:
            return []
        latents, shared = self._gathered_pages
        (keys, values), expansion = self._expand(one, latents)
        turned, out = (array.reshape(self.chunk, len(keys[0]), -1) for array in (self._turned, self._mixed))
        products = "rounded" if self._attends_rounded else self._cache_dtype
        gather = getattr(runs, f"gather_latents_{self._cache_dtype}")
        attend = getattr(runs, f"latent_attention_runs_{products}")
        return [
            (gather, (*self._pages(layer), of_step.page, latents, shared)),
            *expansion,
            (attend, (self._parts()[0], turned, keys, shared, values, *of_step.operands,
                      self.model.config.score_scale, out)),
        ]

    def _index_kernels(self) -> tuple[Any, Any, Any]:
        return (getattr(sparse_paged, f"cache_index_paged_{self._cache_dtype}"),
                getattr(sparse_paged, f"index_scores_paged_{self._cache_dtype}"), sparse_paged.choose_positions_paged)
