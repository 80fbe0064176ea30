"""Several sequences through a Llama or Qwen2 model at once: attention over pages of keys and values.

In: a LlamaModel. Out: `Batch`. Holds: what models/batch.py says; all but attention is that of a session's chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...kernels import paged
from ...kernels.paged import PAGE
from ..batch import Array, Paged, first
from ..linear import Steps
from .session import Session


class Batch(Paged, Session):
    """Sequences of one model."""

    def _cache_extents(self, groups: int, *features: int) -> tuple[int, ...]:
        return self.pages, groups, PAGE, *features

    def _attend(self, layer: int) -> Steps:
        return self._attend_rows(layer, self._rows)

    def _attend_one(self, layer: int) -> Steps:
        return self._attend_rows(layer, first)

    def _attend_rows(self, layer: int, rows: Callable[[Array], Any]) -> Steps:
        q, k, v, queries, out = self._parts()
        keys, values = self._keys[layer], self._values[layer]
        where = (rows(self._slot_of), rows(self._position_of), self.table)
        flat = (cache.reshape(*cache.shape[:3], -1) for cache in (keys, values))
        return [
            (getattr(paged, f"rotate_and_cache_paged_{self._cache_dtype}"), (
                rows(q), rows(k), rows(v), self._cosine, self._sine, *where, rows(self._turned), keys, values,
            )),
            (getattr(paged, f"attention_paged_{self._cache_dtype}"), (
                rows(queries), *flat, *where, self._scale, rows(out),
            )),
        ]
