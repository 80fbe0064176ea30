"""The arrays that a kernel is timed on.

Enters: arguments by name. Leaves: the same values in memory of the runtime, and as many copies of what is large as it
takes for a copy to be out of the caches when its turn comes again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy

from ..runtime.buffers import empty
from .measure import copies_to_be_cold

LARGE_SHARE = 16
"""Arrays of at least this part of a case's bytes are its weights: they are copied where a case shall be cold."""


def placed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments with every array in memory of the runtime: aligned, on huge pages where it is large."""
    result: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, numpy.ndarray):
            copy = empty(value.shape, value.dtype)
            copy[...] = value
            value = copy
        result[name] = value
    return result


def copies(arguments: dict[str, Any], cold: bool, cache_bytes: int) -> list[dict[str, Any]]:
    """The arguments, and where they shall be cold as many more with large arrays of their own as outlast the cache."""
    if not cold:
        return [arguments]
    sizes = {name: a.nbytes for name, a in arguments.items() if isinstance(a, numpy.ndarray)}
    large = {name for name, size in sizes.items() if LARGE_SHARE * size >= sum(sizes.values())}
    count = copies_to_be_cold(sum(sizes[name] for name in large), cache_bytes)
    return [arguments, *({**arguments, **placed({n: arguments[n] for n in large})} for _ in range(count - 1))]
