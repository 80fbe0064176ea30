"""Between arrays of lanes and ints, for what the rows compute: what is not known does it by its own method.

Enters: arrays, bytes and ints, or ones whose values are not known (sapper/assembly/symbolic.py). Leaves: the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any
Meaning = Callable[..., Any]


def plain(value: Any) -> Any:
    """A truth, a lane or a NumPy integer as an int."""
    return value.integer() if hasattr(value, "integer") else int(value)


def number(raw: Array) -> Any:
    """Bytes as an int, the lowest first."""
    return raw.number() if hasattr(raw, "number") else int.from_bytes(raw.tobytes(), "little")


def raw_bytes(value: Any, size_bytes: int) -> Array:
    """The low bytes of an int."""
    if hasattr(value, "bytes"):
        return value.bytes(size_bytes)
    low = int(value) & ((1 << 8 * size_bytes) - 1)
    return np.frombuffer(low.to_bytes(size_bytes, "little"), np.uint8)


def mask_bits(mask: Any, lanes: int) -> Array:
    """The low bits of an int as truths."""
    return mask.bits(lanes) if hasattr(mask, "bits") else np.array([mask >> i & 1 for i in range(lanes)], bool)


def one_lane(value: Any, dtype: Any) -> Array:
    """The low bits of an int as an array of one element."""
    if hasattr(value, "lane"):
        return value.lane(dtype)
    return np.array([value & ((1 << 8 * np.dtype(dtype).itemsize) - 1)], dtype)


def select(truth: Any, then: Any, otherwise: Any) -> Any:
    """then if an int is not 0."""
    return truth.chosen(then, otherwise) if hasattr(truth, "chosen") else then if truth else otherwise


def taken(table: Array, index: Array) -> Array:
    """table[index]."""
    return index.taken_from(table) if hasattr(index, "taken_from") else table[index]


def padded(value: Array, size_bytes: int) -> Array:
    """Bytes with zeros behind them."""
    return np.concatenate([value[:size_bytes], np.zeros(max(0, size_bytes - len(value)), np.uint8)])
