"""Several sequences through a DeepSeek model at once: absorbed attention over pages of latent vectors.

In: a DeepseekModel. Out: `Batch`. Holds: what models/batch.py says; all but attention is that of a session's chunk. All
tokens attend absorbed (sapper/kernels/mla.py), also those of a prompt: pages of several sequences are not expanded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...kernels import paged, sparse_paged
from ...kernels.paged import PAGE
from ...runtime.buffers import empty
from ...runtime.program import Variable
from ..batch import F32, Array, Paged, first
from ..linear import Steps, in_blocks
from .config import LATENT_EPSILON
from .session import Session
from .weights import AttentionWeights


class Batch(Paged, Session):
    """Sequences of one model."""

    def _cache_extents(self, *features: int) -> tuple[int, ...]:
        return self.pages, PAGE, *features

    def _meet(self, one: AttentionWeights, layer: int, position: Variable) -> Steps:
        return self._meet_rows(one, layer, self._rows)

    def _meet_one(self, one: AttentionWeights, layer: int, position: Variable) -> Steps:
        return self._meet_rows(one, layer, first)

    def _meet_rows(self, one: AttentionWeights, layer: int, rows: Callable[[Array], Any]) -> Steps:
        config = self.model.config
        _, turning, latent, key = self._parts()
        latents, shared = self._latents[layer], self._keys[layer]
        if not hasattr(self, "_in_latent_space"):
            extents = (self.chunk, config.heads * config.key_rank)
            self._in_latent_space, self._found = (empty(extents, F32) for _ in range(2))
        turned = self._turned.reshape(self.chunk, config.heads, -1)
        where = (rows(self._slot_of), rows(self._position_of), self.table)
        return [
            (getattr(paged, f"compress_paged_{self._cache_dtype}"), (
                rows(turning), rows(latent), rows(key), one.key_gain, LATENT_EPSILON, self._cosine, self._sine,
                *where, rows(self._turned), latents, shared,
            )),
            *one.keys.absorb(rows(self._head_queries), rows(self._in_latent_space), self._work),
            *self._attend_pages(one, layer, rows, where, (
                rows(in_blocks(self._in_latent_space, config.key_rank)), rows(turned), latents,
                shared.reshape(*shared.shape[:2], -1), *where)),
            *one.values.project(rows(self._found), rows(self._mixed), self._work),
        ]

    def _attend_pages(
        self, one: AttentionWeights, layer: int, rows: Callable[[Array], Any], where: Any, operands: tuple[Any, ...]
    ) -> Steps:
        """Attention in the latent space; operands: the first ones of its kernels."""
        config = self.model.config
        result = config.score_scale, rows(in_blocks(self._found, config.key_rank))
        if one.index is None or config.indexer is None:
            return [(getattr(paged, f"latent_attention_paged_{self._cache_dtype}"), (*operands, *result))]
        chosen = rows(self._index_scores), rows(self._lowest), rows(self._last_kept)
        return [
            *self._index(one.index, config.indexer, layer, rows, where, rows(self._position_of)),
            (getattr(sparse_paged, f"latent_attention_paged_sparse_{self._cache_dtype}"), (
                *operands, *chosen, *result)),
        ]

    def _index_kernels(self) -> tuple[Any, Any, Any]:
        return (getattr(sparse_paged, f"cache_index_paged_{self._cache_dtype}"),
                getattr(sparse_paged, f"index_scores_paged_{self._cache_dtype}"), sparse_paged.choose_positions_paged)
