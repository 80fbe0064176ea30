"""How much scratch memory a lowered function asks for: the meaning of its attributes `scratch` and `shared_scratch`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

BUFFER_ALIGN_BYTES = 64

Buffers = tuple[tuple[int, tuple[tuple[int, tuple[str, ...], int], ...]], ...]
"""Each buffer as (element bytes, ((constant, dims, multiple), ...)): along each axis it has room for the product of
constant and dims, rounded up to a multiple."""


def constant_bytes(buffers: Buffers) -> int:
    """What they take where extents are no more than 1."""
    return scratch_bytes(buffers, defaultdict(lambda: 1))


def scratch_bytes(buffers: Buffers, dims: Mapping[str, int]) -> int:
    """Bytes of all buffers, one after the other, for these extents."""
    total = 0
    for size_bytes, axes in buffers:
        for constant, names, multiple in axes:
            extent = constant
            for name in names:
                extent *= dims[name]
            size_bytes *= -(-extent // multiple) * multiple
        total += -(-size_bytes // BUFFER_ALIGN_BYTES) * BUFFER_ALIGN_BYTES
    return total
