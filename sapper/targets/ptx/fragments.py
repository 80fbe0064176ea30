"""Where the elements of matrices lie in the registers of a warp: the fragments of mma, ldmatrix and wgmma.

Leaves: arrays of (row, column) for each lane, register and slot of a register. Lowering and emulation both use them.
Holds: with g = lane / 4 and t = lane % 4, and e elements in a register of 32 bits (PTX ISA, "Matrix Fragments for
mma.m16n8k16" and its siblings for the other shapes):
  A (16 x K)   register r, slot j: row g + 8 (r mod 2), column e t + j + 4 e (r / 2)
  B (K x 8)    register r, slot j: row e t + j + 4 e r, column g
  C (16 x 8)   32-bit: register r: row g + 8 (r / 2), column 2 t + r mod 2; 16-bit: register r, slot j: row g + 8 r,
               column 2 t + j
  ldmatrix     matrix i of 8 x 8 16-bit elements: register i, slot j: row g, column 2 t + j; transposed: the reverse
  wgmma D      64 x N: warp w of the group has rows 16 w ...; for 32-bit register r: row 16 w + g + 8 (r / 2 mod 2),
               column 8 (r / 4) + 2 t + r mod 2 (PTX ISA, "Register Fragments for wgmma.mma_async")
  tcgen05.ld   of tensor memory, whose rows are lanes: .16x256b register r: row g + 8 (r / 2 mod 2), column 8 (r / 4) +
               2 t + r mod 2; .16x128b: row g + 8 (r mod 2), column 4 (r / 2) + t; .16x64b: row g + 8 (lane mod 2),
               column 2 r + t / 2; .32x32b: row lane, column r; .16x32bx2: row lane mod 16, column r, and for lanes from
               16 on as many columns further as the instruction says (PTX ISA, "Data Movement Shape"; CUTLASS,
               include/cute/atom/copy_traits_sm100.hpp)
  wmma         the ISA leaves it open: element i of a matrix, row after row, lies in lane i / e, e of them in each, by
               registers and slots; registers that are left hold all of it again
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

_LANE = np.arange(32)
GROUP, MEMBER = _LANE // 4, _LANE % 4


@cache
def fragment_a(registers: int, slots: int) -> tuple[Indices, Indices]:
    """(rows, columns) of shape (registers, 32, slots)."""
    r, lane, j = np.ogrid[:registers, :32, :slots]
    rows = GROUP[lane] + 8 * (r % 2) + 0 * j
    columns = slots * MEMBER[lane] + j + 4 * slots * (r // 2)
    return rows, columns


@cache
def fragment_b(registers: int, slots: int) -> tuple[Indices, Indices]:
    r, lane, j = np.ogrid[:registers, :32, :slots]
    rows = slots * MEMBER[lane] + j + 4 * slots * r
    columns = GROUP[lane] + 0 * rows
    return rows, columns


@cache
def fragment_c(registers: int, slots: int) -> tuple[Indices, Indices]:
    """Of 16 x 8 sums: four registers of one slot, or two of two."""
    r, lane, j = np.ogrid[:registers, :32, :slots]
    if slots == 1:
        return GROUP[lane] + 8 * (r // 2) + 0 * j, 2 * MEMBER[lane] + r % 2 + 0 * j
    return GROUP[lane] + 8 * r + 0 * j, 2 * MEMBER[lane] + j + 0 * r


@cache
def fragment_wgmma(registers: int, slots: int) -> tuple[Indices, Indices]:
    """(rows, columns) of the 64 x N sums, of shape (registers, 128, slots)."""
    r, thread, j = np.ogrid[:registers, :128, :slots]
    group, member = thread % 32 // 4, thread % 4
    if slots == 1:
        rows = 16 * (thread // 32) + group + 8 * (r // 2 % 2) + 0 * j
        return rows, 8 * (r // 4) + 2 * member + r % 2 + 0 * rows
    rows = 16 * (thread // 32) + group + 8 * (r % 2) + 0 * j
    return rows, 8 * (r // 2) + 2 * member + j + 0 * rows


@cache
def fragment_tensor(shape: str, registers: int) -> tuple[Indices, Indices]:
    """(lanes, columns) of tensor memory from where an access begins, of shape (registers, 32). shape: of tcgen05.ld;
    what the second half of .16x32bx2 is further on is left out."""
    r, lane = np.ogrid[:registers, :32]
    group, member = lane // 4, lane % 4
    rows, columns = {
        "32x32b": (lane, r), "16x32bx2": (lane % 16, r), "16x64b": (group + 8 * (lane % 2), 2 * r + member // 2),
        "16x128b": (group + 8 * (r % 2), 4 * (r // 2) + member),
        "16x256b": (group + 8 * (r // 2 % 2), 8 * (r // 4) + 2 * member + r % 2)}[shape]
    return rows + 0 * (r + lane), columns + 0 * (r + lane)


def gather(registers: NDArray[Any], rows: Indices, columns: Indices, shape: tuple[int, int]) -> NDArray[Any]:
    """Matrices (warps, *shape) from (registers, warps, lanes, slots) elements."""
    matrix = np.empty((registers.shape[1], *shape), registers.dtype)
    matrix[:, rows, columns] = registers.transpose(1, 0, 2, 3)
    return matrix


def scatter(matrix: NDArray[Any], rows: Indices, columns: Indices) -> NDArray[Any]:
    """The elements (registers, warps, lanes, slots) of matrices (warps, rows, columns)."""
    return matrix[:, rows, columns].transpose(1, 0, 2, 3)


def shape_of(mnemonic: str) -> tuple[int, int, int]:
    """(M, N, K) of m16n8k16."""
    found = re.search(r"m(\d+)n(\d+)k(\d+)", mnemonic)
    assert found is not None
    m, n, k = (int(text) for text in found.groups())
    return m, n, k


def from_opaque(registers: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """Matrices (warps, *shape) from (registers, warps, 32, slots) elements of a wmma fragment."""
    count = shape[0] * shape[1] // 32 // registers.shape[-1]
    return registers[:count].transpose(1, 2, 0, 3).reshape(-1, *shape)


def to_opaque(matrix: NDArray[Any], registers: int, slots: int) -> NDArray[Any]:
    """The elements (registers, warps, 32, slots) of matrices (warps, rows, columns)."""
    once = matrix.reshape(len(matrix), 32, -1, slots).transpose(2, 0, 1, 3)
    return np.concatenate([once] * (registers // len(once)))
