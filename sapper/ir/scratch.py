"""How much scratch memory a lowered function asks for: the meaning of its attributes `scratch` and `shared_scratch`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from .extents import evaluate_nested
from .types import Dim

BUFFER_ALIGN_BYTES = 64

Buffers = tuple[tuple[int, tuple[tuple[int, tuple[Dim, ...], int], ...]], ...]
"""Each buffer as (element bytes, ((constant, dims, multiple), ...)): along each axis it has room for the product of
constant and dims, which may be made of others (`ir.extents`), rounded up to a multiple."""


def constant_bytes(buffers: Buffers) -> int:
    """What they take where extents are no more than 1."""
    return scratch_bytes(buffers, defaultdict(lambda: 1))


def scratch_bytes(buffers: Buffers, dims: Mapping[str, int]) -> int:
    """Bytes of all buffers, one after the other, for these extents."""
    total = 0
    for size_bytes, axes in buffers:
        for constant, factors, multiple in axes:
            extent = constant
            for factor in factors:
                extent *= evaluate_nested(factor, dims)
            size_bytes *= -(-extent // multiple) * multiple
        total += -(-size_bytes // BUFFER_ALIGN_BYTES) * BUFFER_ALIGN_BYTES
    return total
