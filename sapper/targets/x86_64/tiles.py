"""The tile registers of x86-64 (AMX): their configuration, and what the rows on them compute.

A tile register is a matrix of up to `ROWS` rows of up to `ROW_BYTES` bytes. How many of each it has says the
configuration, 64 bytes that ldtilecfg takes; until then no tile may be used, and ldtilecfg makes all of them zero.

    byte 0          palette: 1, the eight registers above; 0 is the state before any configuration
    byte 1          start row: where an interrupted load goes on, 0 otherwise
    bytes 16 ..     bytes of a row of each tile, 16 bits each
    bytes 48 ..     rows of each tile, 8 bits each

Here a tile's value is an array of bytes [rows][bytes of a row], of just its configured shape; the processor keeps zeros
beyond, which no instruction reads. The configuration is the register ("tilecfg", 0), which rows read and write by
implication: code before any ldtilecfg reads what was never written.
Source: Intel SDM volume 1, chapter 18 (tiles, palettes), volume 2, LDTILECFG, TILELOADD, TDPBF16PS, TDPBSSD and their
kin (operation, #GP and #UD conditions).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = Any
Meaning = Callable[..., Any]
Shape = tuple[int, int]
"""Rows, and bytes of a row."""

TILES, ROWS, ROW_BYTES = 8, 16, 64
"""Of palette 1 (CPUID leaf 0x1D, subleaf 1)."""
CONFIGURATION_BYTES = 64
_ROW_BYTES_AT, _ROWS_AT = 16, 48

CONFIGURATION = ("tilecfg", 0)
EVERY_TILE = tuple(("tile", number) for number in range(TILES))


def configuration(shapes: Sequence[Shape]) -> bytes:
    """The 64 bytes for ldtilecfg that give tile n the shape shapes[n]; (0, 0), or no entry, for a tile without use.

    Raises ValueError for what the processor refuses.
    """
    if len(shapes) > TILES:
        raise ValueError(f"tile configuration: found {len(shapes)} shapes; expected at most {TILES}")
    raw = np.zeros(CONFIGURATION_BYTES, np.uint8)
    raw[0] = 1
    for number, (rows, row_bytes) in enumerate(shapes):
        if not (0 < rows <= ROWS and 0 < row_bytes <= ROW_BYTES) and (rows, row_bytes) != (0, 0):
            raise ValueError(f"tile configuration, tile {number}: found {rows} rows of {row_bytes} bytes; expected 1 "
                             f"to {ROWS} rows of 1 to {ROW_BYTES} bytes, or (0, 0) for a tile without use")
        raw[_ROW_BYTES_AT + 2 * number:][:2] = row_bytes & 0xFF, row_bytes >> 8
        raw[_ROWS_AT + number] = rows
    return raw.tobytes()


def shapes_of(raw: Array) -> tuple[Shape, ...]:
    """The shape of each tile under a configuration of palette 1 (64 bytes); none under palette 0.

    Raises OverflowError where ldtilecfg would trap.
    """
    found = np.frombuffer(bytes(raw), np.uint8)
    palette = int(found[0])
    if palette == 0:
        return ()
    row_bytes = found[_ROW_BYTES_AT:_ROWS_AT].view(np.uint16).tolist()
    rows = found[_ROWS_AT:].tolist()
    if palette != 1:
        raise OverflowError(f"palette {palette}: a tile configuration of another palette than 0 or 1 traps")
    if found[2:_ROW_BYTES_AT].any() or any(row_bytes[TILES:]) or any(rows[TILES:]):
        raise OverflowError("a tile configuration whose reserved bytes are not zero traps")
    shapes = tuple(zip(rows[:TILES], row_bytes[:TILES], strict=True))
    for number, (height, width) in enumerate(shapes):
        if height > ROWS or width > ROW_BYTES or (height == 0) != (width == 0):
            raise OverflowError(f"tile {number} of {height} rows of {width} bytes traps")
    return shapes


# --- Meanings: reads are tiles, [rows][bytes] -----------------------------------------------------------------------

def load_configuration(raw: Array) -> tuple[Array, ...]:
    """ldtilecfg: the configuration, and all tiles zero; a tile without use has no rows."""
    shapes = shapes_of(raw)
    kept = raw.copy() if shapes else np.zeros(CONFIGURATION_BYTES, np.uint8)
    return kept, *(np.zeros(shapes[n] if shapes else (0, 0), np.uint8) for n in range(TILES))


def release() -> tuple[Array, ...]:
    """tilerelease: as before any configuration."""
    return load_configuration(np.zeros(CONFIGURATION_BYTES, np.uint8))


def keep(value: Array, *_: Any) -> Array:
    """sttilecfg, and tiles to and from memory."""
    return value


def zero(_: Array) -> Array:
    """tilezero."""
    return np.uint8(0)


def product_fault(total: Shape, a: Shape, b: Shape) -> str:
    """Why a product of tiles of these shapes traps (#UD), or nothing."""
    (m, n4), (m_of_a, k4), (k, n4_of_b) = total, a, b
    if n4 % 4 or k4 % 4 or n4_of_b % 4 or m != m_of_a or k != k4 // 4 or n4 != n4_of_b or not (m and n4 and k4):
        return f"tiles of {m} x {n4}, {m_of_a} x {k4} and {k} x {n4_of_b} (rows x bytes)"
    return ""


PRODUCT_SHAPES = "tiles of M x 4N, M x 4K and K x 4N"


def _check(total: Array, a: Array, b: Array) -> None:
    fault = product_fault(total.shape, a.shape, b.shape)
    if fault:
        raise OverflowError(f"a product of {fault} traps; expected {PRODUCT_SHAPES}")


def dot_integers(a_dtype: str, b_dtype: str) -> Meaning:
    """tdpbssd and its kin: total[m, n] += the sum over k of four products of bytes a[m, 4k + i] * b[k, 4n + i], i32
    that wraps."""
    def compute(total: Array, a: Array, b: Array, *_: Any) -> Array:
        _check(total, a, b)
        left = a.view(a_dtype).astype(np.int32)
        right = b.view(b_dtype).astype(np.int32).reshape(len(b), -1, 4).transpose(0, 2, 1).reshape(a.shape[1], -1)
        return (total.view(np.uint32) + (left @ right).view(np.uint32)).view(np.uint8)
    return compute


def dot_pairs(widen: Meaning, flush: Meaning, multiply_add: Meaning, add: Meaning) -> Meaning:
    """tdpbf16ps, tdpfp16ps: the sums over k of a[m, 2k] * b[k, 2n] and of a[m, 2k + 1] * b[k, 2n + 1] apart, each step
    a fused multiply-add in f32; then both added, and that to total[m, n].

    widen: 16-bit elements (as u16) to f32. flush: f32 that are denormal to zero, done to what goes in and comes out.
    """
    def compute(total: Array, a: Array, b: Array, *_: Any) -> Array:
        _check(total, a, b)
        left, right = flush(widen(a.view(np.uint16))), flush(widen(b.view(np.uint16)))
        m, n = len(a), total.shape[1] // 4
        sums = [np.zeros(m * n, np.float32), np.zeros(m * n, np.float32)]
        for k in range(len(b)):
            for i in (0, 1):
                x, y = np.repeat(left[:, 2 * k + i], n), np.tile(right[k, i::2], m)
                sums[i] = flush(multiply_add(x, y, sums[i]))
        both = flush(add(*sums))
        return flush(add(flush(total.view(np.float32).reshape(-1)), both)).reshape(m, n).view(np.uint8)
    return compute
