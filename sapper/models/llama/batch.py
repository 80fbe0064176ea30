"""Several sequences through a Llama, or a model much like it, at once: attention over pages of keys and values.

In: a LlamaModel. Out: `Batch`. Holds: what models/batch.py says; all but attention is that of a session's chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...kernels import paged, runs
from ...kernels.paged import PAGE
from ..batch import Array, Paged, first
from ..shares import Shares, workers_of
from ..weights import DTYPES
from ..workspace import Steps
from .session import Session


class Batch(Paged, Session):
    """Sequences of one model."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """As Paged has it. Raises ModelError."""
        super().__init__(*arguments, **options)
        config = self.model.config
        extents = config.kv_heads, self._runs.room * PAGE, config.head_features
        self._gathered_pages = tuple(self._arena.empty(extents, DTYPES[self._cache_dtype]) for _ in range(2))
        self._sharing = Shares(workers_of(self._options), config.group, config.head_features)

    def _cache_extents(self, groups: int, *features: int) -> tuple[int, ...]:
        return self.pages, groups, PAGE, *features

    def _attend(self, layer: int) -> Steps:
        return [*self._put(layer, self._rows), *self._attend_alone(layer, self._of_loose), *self._attend_runs(layer)]

    def _attend_one(self, layer: int) -> Steps:
        return [*self._put(layer, first), *self._attend_alone(layer, first)]

    def _put(self, layer: int, rows: Callable[[Array], Any]) -> Steps:
        """Keys and values to their pages."""
        q, k, v, _, _ = self._parts()
        return [(getattr(paged, f"{self._before}rotate_and_cache_paged_{self._cache_dtype}"), (
            rows(q), rows(k), rows(v), *self._norms(layer), self._cosine, self._sine, rows(self._slot_of),
            rows(self._position_of), self.table, rows(self._turned), self._keys[layer], self._values[layer],
        ))]

    def _pages(self, layer: int) -> tuple[Array, Array]:
        """Keys and values [pages, kv_heads, PAGE, features]."""
        keys, values = (cache[layer].reshape(*cache[layer].shape[:3], -1) for cache in (self._keys, self._values))
        return keys, values

    def _cut_one(self) -> Steps:
        return self._sharing.of_tokens(first(self._position_of), self.model.config.kv_heads)

    def _cut(self) -> Steps:
        return self._sharing.of_tokens(self._of_loose(self._position_of), self.model.config.kv_heads)

    def _attend_alone(self, layer: int, rows: Callable[[Array], Any]) -> Steps:
        _, _, _, queries, out = self._parts()
        shares = self._sharing
        return [
            (getattr(paged, f"attention_paged_{self._cache_dtype}"), (
                rows(queries), *self._pages(layer), rows(self._slot_of), rows(self._position_of), self.table,
                *shares.cuts, self._scale, *shares.left, rows(out))),
            *shares.merge(out.reshape(-1, *out.shape[2:])),
        ]

    def _attend_runs(self, layer: int) -> Steps:
        if (of_step := self._runs_of_capacity()) is None:
            return []
        _, _, _, queries, out = self._parts()
        products = "rounded" if self._attends_rounded else self._cache_dtype
        attend = getattr(runs, f"attention_runs_{products}")
        return [
            (getattr(runs, f"gather_pages_{self._cache_dtype}"), (
                *self._pages(layer), of_step.page, *self._gathered_pages)),
            (attend, (queries, *self._gathered_pages, *of_step.operands, self._scale, out)),
        ]
