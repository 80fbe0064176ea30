"""Where the elements of a matrix instruction's operands lie: c[16, 8] += a[16, 16] @ b[16, 8], in 32 lanes.

Leaves: for each operand (row, column) of every register, slot and lane. A slot is one of the two 16-bit elements of a
b32 register, the low half first, or of four of 8 bits. Source: PTX ISA, "Matrix Fragments for mma.m16n8k16 with
floating point type", "... mma.m16n8k32".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS, COLUMNS, DEPTH, LANES = 16, 8, 16, 32

DEPTH_BYTES = 32
"""Of the depth, whatever the elements: 16 of 16 bits, 32 of 8."""

_group, _member = np.arange(LANES) // 4, np.arange(LANES) % 4
_low, _high = (np.arange(n).reshape(-1, 1, 1) for n in (2, 4))

Places = tuple[NDArray[Any], NDArray[Any]]
"""Row and column, indexed [register, slot, lane], or [register, lane] for c."""


def left_places(slots: int) -> Places:
    """Of a, whose registers hold so many elements."""
    slot = np.arange(slots).reshape(1, -1, 1)
    rows, columns = np.broadcast_arrays(_group + 8 * (_high % 2), slots * _member + slot + 4 * slots * (_high // 2))
    return rows, columns


def right_places(slots: int) -> Places:
    slot = np.arange(slots).reshape(1, -1, 1)
    rows, columns = np.broadcast_arrays(slots * _member + slot + 4 * slots * _low, _group)
    return rows, columns


A, B = left_places(2), right_places(2)
C: Places = ((_group + 8 * (_high // 2))[:, 0], (2 * _member + _high % 2)[:, 0])


ROW_BYTES = 128
"""Of rows in near memory, over which chunks of 16 bytes are swizzled."""
PANEL = 64
"""Elements of such a row."""


def swizzled(address: NDArray[Any]) -> NDArray[Any]:
    """Where a byte of rows of 128 bytes that lie one after the other goes: chunk c of the row at 128 r to c ^ (r mod 8)
    (PTX ISA, "Swizzling Modes", 128 bytes)."""
    turned: NDArray[Any] = address ^ (address >> 3 & 0x70)
    return turned


def near_offsets(outer: NDArray[Any], depth: NDArray[Any], along_depth: bool, panel_bytes: int,
                 size: int = 2) -> NDArray[Any]:
    """Bytes to elements of `size` bytes of an operand whose rows lie along the depth, or else, in panels, along the
    outer axis; before swizzling (PTX ISA, "Strides" of wgmma's operands in shared memory)."""
    if along_depth:
        return np.asarray(outer * ROW_BYTES + depth * size)
    return np.asarray(outer // PANEL * panel_bytes + depth * ROW_BYTES + outer % PANEL * 2)

GROUP_DEPTH_BYTES = 32
"""Of the depth of a matrix instruction of a group of warps."""

SUMS_ROWS, SUMS_COLUMNS = 128, 512
"""Of a worker's sums memory, f32 each (PTX ISA, "Tensor Memory": its lanes and columns)."""
ROW_PLACES = 1 << 16
"""From a place in sums memory to the one a row below."""
