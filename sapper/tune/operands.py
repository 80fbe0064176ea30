"""The arrays that a kernel is timed on.

Enters: arguments by name. Leaves: the same values in memory of the runtime, and as many copies of what is large as it
takes for a copy to be out of the caches when its turn comes again. Holds: copies of weights lie as those of a model do,
one after another in the same huge pages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy

from ..runtime.buffers import LINE_BYTES, Arena, empty
from ..runtime.system import round_up
from .measure import copies_to_be_cold

LARGE_SHARE = 16
"""Arrays of at least this part of a case's bytes are its weights: they are copied where a case shall be cold."""


def placed(arguments: Mapping[str, Any], make: Callable[..., Any] = empty) -> dict[str, Any]:
    """The same arguments with every array in memory of the runtime, by default aligned, on huge pages where it is
    large. make: an array of a shape and a dtype."""
    result: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, numpy.ndarray):
            copy = make(value.shape, value.dtype)
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
    arena = Arena(max(1, count * sum(round_up(sizes[name], LINE_BYTES) for name in large)))
    return [{**arguments, **placed({n: a for n, a in arguments.items() if n in large}, arena.empty)}
            for _ in range(count)]
