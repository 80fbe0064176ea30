"""Several sequences through a DeepSeek model at once: absorbed attention over pages of latent vectors.

In: a DeepseekModel. Out: `Batch`. Holds: what models/batch.py says; all but attention is that of a session's chunk. All
tokens attend absorbed (sapper/kernels/mla.py), also those of a prompt: pages of several sequences are not expanded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...kernels import norm, paged, sparse_paged
from ...kernels.paged import PAGE
from ...runtime.buffers import empty
from ...runtime.program import Variable
from ..batch import F32, Array, Paged, first
from ..linear import Steps
from .config import INDEX_EPSILON, LATENT_EPSILON, Indexer
from .session import Session
from .weights import AttentionWeights, IndexWeights


class Batch(Paged, Session):
    """Sequences of one model."""

    def _cache_extents(self, *features: int) -> tuple[int, ...]:
        return self.pages, PAGE, *features

    def _meet(self, one: AttentionWeights, layer: int, position: Variable) -> Steps:
        weights: Steps = [] if one.index is None else self._multiply(
            "matmul_nt", self._normed, [one.index.head_weights], self._index_weights)
        return weights + self._meet_rows(one, layer, self._rows)

    def _meet_one(self, one: AttentionWeights, layer: int, position: Variable) -> Steps:
        weights: Steps = [] if one.index is None else one.index.head_weights.apply_norm(
            self._x[0], one.gain, self.model.config.epsilon, self._index_weights[0], self._work)
        return weights + self._meet_rows(one, layer, first)

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
            *self._index_pages(one.index, config.indexer, layer, rows, where),
            (getattr(sparse_paged, f"latent_attention_paged_sparse_{self._cache_dtype}"), (
                *operands, *chosen, *result)),
        ]

    def _index_pages(
        self, one: IndexWeights, indexer: Indexer, layer: int, rows: Callable[[Array], Any], where: Any
    ) -> Steps:
        """What Session._index does, over pages."""
        turning, rest, own_key = self._index_parts(indexer)
        key_turning, key_rest = self._index_key_parts()
        keys, rests = self._index_keys[layer], self._index_rests[layer]
        flat = self._index_turned.reshape(self.chunk, indexer.heads, -1)
        return [
            (norm.layer_norm, (rows(own_key), one.gain, one.bias, INDEX_EPSILON, rows(self._index_key))),
            (getattr(sparse_paged, f"cache_index_paged_{self._cache_dtype}"), (
                rows(turning), rows(key_turning), rows(key_rest), self._cosine, self._sine, *where,
                rows(self._index_turned), keys, rests,
            )),
            (getattr(sparse_paged, f"index_scores_paged_{self._cache_dtype}"), (
                rows(flat), rows(rest), rows(self._index_weights), keys.reshape(*keys.shape[:2], -1), rests, *where,
                rows(self._index_scores),
            )),
            (sparse_paged.choose_positions_paged, (
                rows(self._index_scores), rows(self._position_of), self._most_kept, rows(self._lowest),
                rows(self._last_kept))),
        ]
