"""What calls let the compiler assume of tensors (sapper/runtime/specialise.py)."""

from __future__ import annotations

import numpy as np
import pytest

import sapper as sp
from sapper import Program, Tensor, f32, tiles
from sapper.runtime.arguments import Parameter, Signature
from sapper.runtime.buffers import empty
from sapper.runtime.specialise import LARGE_BYTES, aligned_tensors, large_in_program
from sapper.targets.x86_64.detect import host_target

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


@pytest.mark.parametrize(("cache_bytes", "large_bytes"),
                         [(0, LARGE_BYTES), (2 << 20, LARGE_BYTES), (64 << 20, 32 << 20)])
def test_what_a_program_keeps_in_its_caches(cache_bytes: int, large_bytes: int) -> None:
    """What is large for a call may be read from the last cache by the next kernel of a program."""
    target = host_target()._replace(l3_bytes=cache_bytes)
    assert large_in_program(target) == large_bytes
    columns = 1024
    for size in (large_bytes // 2, large_bytes):
        x = empty((size // 4 // columns, columns), np.float32)
        x[...] = 0
        for caches in (target, host_target()):
            program = Program([(copied, (x, empty(x.shape, np.float32)))], target=caches)
            assert bool(program._launches[0].specialisation.aligned) == (size >= large_in_program(caches))
