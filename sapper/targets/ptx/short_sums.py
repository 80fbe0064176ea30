"""Sums of products of 8-bit floats as the tensor cores of some levels make them: with fewer bits than f32 has.

Enters: a level and an instruction, then elements and the sums so far. Leaves: what the level's instruction leaves in
its sums. Holds: so many products and the sum so far are added at once, all of them as multiples of one power of two,
the largest exponent's over 2^bits; what is below is cut off, toward zero. A result in f32 keeps so many bits of its
fraction, likewise cut; one in f16 is rounded to nearest. NVIDIA documents none of it. Sources: DeepSeek-V3 Technical
Report (arXiv 2412.19437), 3.3.2 and 3.5.2: 32 products are aligned by the largest exponent, 14 bits are kept of each,
as of the sums in registers; SageAttention2 (arXiv 2411.10958): the sums have 8 bits of exponent and 13 of fraction;
"MMA-Sim" (arXiv 2511.10909), whose model is compared with Ada, Hopper and Blackwell devices bit by bit: the sum so far
is aligned with the products, Ada adds 16 products at once, `mma.sync` of Hopper and all of Blackwell keep 25 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .levels import number_of

Array = NDArray[Any]
LEAST_EXPONENT = {"e4m3": -6, "e5m2": -14}
"""Of an element, that of the smallest numbers included: theirs have no leading 1."""
LEAST_OF_SUM = -126
NOTHING = -(1 << 10)
"""The exponent of 0."""


@dataclass(frozen=True, slots=True)
class ShortSum:
    """products: that are added at once, with the sum so far. bits: of the fraction that is kept."""

    products: int
    bits: int


_LEVELS = {("wgmma", 90): ShortSum(32, 13), ("mma", 89): ShortSum(16, 13)}


def short_sum(level: str, opcode: str, types: tuple[str, str]) -> ShortSum | None:
    """How an instruction with elements of these two types adds; None: as precisely as f32, or more. opcode: "mma",
    "wgmma"."""
    return _LEVELS.get((opcode, number_of(level))) if all(type in LEAST_EXPONENT for type in types) else None


def add_products(how: ShortSum, types: tuple[str, str], a: Array, b: Array, sums: Array) -> Array:
    """Sums (..., m, n) of f32 or f16 with the products of a (..., m, k) and b (..., k, n) added, f32 both."""
    for start in range(0, a.shape[-1], how.products):
        some = slice(start, start + how.products)
        sums = _add(how.bits, types, a[..., :, None, some], np.swapaxes(b[..., some, :], -1, -2)[..., None, :, :], sums)
    return sums


def _add(bits: int, types: tuple[str, str], a: Array, b: Array, sums: Array) -> Array:
    """a: (..., m, 1, k); b: (..., 1, n, k)."""
    products = a.astype(np.float64) * b
    highest = (_exponents(a, LEAST_EXPONENT[types[0]]) + _exponents(b, LEAST_EXPONENT[types[1]])).max(axis=-1)
    highest = np.maximum(np.maximum(highest, _exponents(sums, LEAST_OF_SUM)), 2 * LEAST_OF_SUM)
    unit = np.exp2(highest - float(bits))
    with np.errstate(invalid="ignore"):
        total = np.trunc(products / unit[..., None]).sum(axis=-1) + np.trunc(sums.astype(np.float64) / unit)
    total = total * unit + 0.0
    if sums.dtype == np.float16:
        return np.asarray(total, np.float16)
    unit = np.exp2(_exponents(total, LEAST_OF_SUM).astype(np.float64).clip(2 * LEAST_OF_SUM) - bits)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.trunc(total / unit) * unit, np.float32)


def _exponents(values: Array, least: int) -> Array:
    """Floor of log2 |x|, `least` at least; NOTHING for 0. Of what is not finite any: it makes the sum so."""
    _, exponents = np.frexp(values)
    return np.where(values == 0, NOTHING, np.maximum(exponents.astype(np.int32) - 1, least))
