"""What calls let the compiler assume of tensors (sapper/runtime/specialise.py)."""

from __future__ import annotations

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, f32, tiles
from sapper.runtime.arguments import Parameter, Signature
from sapper.runtime.specialise import aligned_tensors

M, N = sp.dims("M N")


@sp.kernel
def copied(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = x[m, n]


@pytest.mark.parametrize("columns", [1, 4, 8, 16, 20, 22])
def test_rows_start_at_lines_or_at_pieces(columns: int) -> None:
    """Pieces of 16 bytes are what a GPU reads at once; rows of 4 bytes are part of longer ones."""
    memory = np.zeros(4 * 32 + 16, np.float32)
    start = -memory.ctypes.data % 64 // 4
    x = memory[start:start + 4 * columns].reshape(4, columns)
    signature = Signature(copied.name, [Parameter.of(name, type) for name, type in copied.parameters])
    binding = signature.bind((x, np.empty_like(x)))
    assert ("x" in aligned_tensors(signature, binding, 0)) == (columns in (1, 16))
    assert ("x" in aligned_tensors(signature, binding, 0, 16)) == (columns != 22)
