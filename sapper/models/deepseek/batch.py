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
from ..linear import Steps
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
        config, dtype = self.model.config, one.expand.dtype
        queries, turning, latent, key = self._parts()
        latents, shared = self._latents[layer], self._keys[layer]
        keys, values = self._heads_of(one)
        extents = (self.chunk, config.heads, config.key_rank)
        if not hasattr(self, "_in_latent_space"):
            self._in_latent_space, self._found = (empty(extents, F32) for _ in range(2))
        turned, out = (array.reshape(self.chunk, config.heads, -1) for array in (self._turned, self._mixed))
        where = (rows(self._slot_of), rows(self._position_of), self.table)
        return [
            (getattr(paged, f"compress_paged_{self._cache_dtype}"), (
                rows(turning), rows(latent), rows(key), one.key_gain, LATENT_EPSILON, self._cosine, self._sine,
                *where, rows(self._turned), latents, shared,
            )),
            (getattr(paged, f"absorb_rows_{dtype}"), (rows(queries), keys, rows(self._in_latent_space))),
            *self._attend_pages(one, layer, rows, where, (
                rows(self._in_latent_space), rows(turned), latents, shared.reshape(*shared.shape[:2], -1), *where)),
            (getattr(paged, f"project_values_rows_{dtype}"), (rows(self._found), values, rows(out))),
        ]

    def _attend_pages(
        self, one: AttentionWeights, layer: int, rows: Callable[[Array], Any], where: Any, operands: tuple[Any, ...]
    ) -> Steps:
        """Attention in the latent space; operands: the first ones of its kernels."""
        config = self.model.config
        result = config.score_scale, rows(self._found)
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
