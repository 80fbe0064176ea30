"""Quotients and remainders of what a lane has neighbours of (sapper/lane/places.py): weights of few bits by vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, bf16, each, emulate, f16, f32, i8, i32, sum, targets, tiles, u8, whole, zeros
from sapper.codegen.pipeline import compile_kernel
from sapper.targets.ptx import assembler
from sapper.tile.interpret import interpret

from .test_computed import arguments_of, needs_machine_code

M, N, K, B, KB, NB = sp.dims("M N K B KB NB")


@sp.kernel
def int4(x: Tensor[bf16, K], w: Tensor[u8, N, K // 2], s: Tensor[f32, N, KB], y: Tensor[bf16, N]):
    for n in tiles(N):
        acc = zeros(n, dtype=f32)
        for k in tiles(K):
            q = (w[n, k // 2].to(i32) >> (k % 2 * 4)) & 15
            acc += x[k] @ ((q - 8).to(f32) * s[n, k // 128]).to(bf16)
        y[n] = acc.to(bf16)


@sp.kernel
def int8(x: Tensor[f32, K], w: Tensor[i8, N, K], s: Tensor[f32, NB, KB], y: Tensor[f32, N]):
    """Scales of blocks of 64 x 128."""
    for n in tiles(N):
        acc = zeros(n, dtype=f32)
        for k in tiles(K):
            acc += x[k] @ (w[n, k].to(f32) * s[n // 64, k // 128])
        y[n] = acc


@sp.kernel
def halves(x: Tensor[f32, B, 32], w: Tensor[u8, N, B, 16], s: Tensor[f16, N, B], y: Tensor[f32, N]):
    """Which half it is differs from lane to lane."""
    for n in tiles(N):
        acc = zeros(n, dtype=f32)
        for b in each(B):
            j = whole(16)
            q, scale = w[n, b, j], s[n, b].to(f32)
            acc += x[b, j] @ (((q & 15).to(f32) - 8.0) * scale)
            acc += x[b, j + 16] @ (((q >> 4).to(f32) - 8.0) * scale)
        y[n] = acc


@sp.kernel
def few_rows(x: Tensor[f16, 2, K], w: Tensor[u8, N, K // 2], s: Tensor[f16, N, KB], z: Tensor[u8, N, KB],
             y: Tensor[f32, 2, N]):
    pairs = x.view(2, K // 2, 2)
    for n in tiles(N):
        m, h = whole(2), whole(K // 2)
        q, scale, zero = w[n, h].to(i32), s[n, h // 32], z[n, h // 32].to(i32)
        low, high = ((q & 15) - zero).to(f16) * scale, ((q >> 4) - zero).to(f16) * scale
        y[m, n] = pairs[m, h, 0] @ low + pairs[m, h, 1] @ high


@sp.kernel
def widened(w: Tensor[u8, N, K // 2], s: Tensor[f32, N, KB], y: Tensor[bf16, N, K]):
    for n, k in tiles(N, K):
        q = (w[n, k // 2].to(i32) >> (k % 2 * 4)) & 15
        y[n, k] = ((q - 8).to(f32) * s[n, k // 64]).to(bf16)


@sp.kernel
def moved(x: Tensor[f32, N, K], w: Tensor[i32, N, K], y: Tensor[f32, N, K]):
    """Coordinates that are moved first, remainders of remainders, and one that would be less than 0."""
    for n, k in tiles(N, K):
        a = x[n, (k + 5) // 16] + x[n, (k + 300) % 64] + x[n, k % 32 // 4 * 2 + 1] + x[n, (k + 3) % 16 // 2]
        y[n, k] = a + (w[n, k // 2 * 2] >> (k % 8 * 4) & 15).to(f32) + x[n, (k + 31) // 32 - 0 * k]


@sp.kernel
def of_columns(w: Tensor[i32, K, NB], s: Tensor[f32, KB, N], y: Tensor[f32, N]):
    """Eight columns in a word."""
    for n in tiles(N):
        k = whole(K)
        y[n] = sum((w[k, n // 8] >> (n % 8 * 4) & 15).to(f32) * s[k // 16, n], over=k)


KERNELS = (int4, int8, halves, few_rows, widened, moved, of_columns)
EXTENTS = ({"N": 12, "K": 1280, "B": 40, "KB": 80, "NB": 4}, {"N": 34, "K": 342, "B": 13, "KB": 32, "NB": 5})


@pytest.mark.sampled(2)
@pytest.mark.parametrize("extents", EXTENTS, ids=["whole", "ragged"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_on_the_emulator(kernel: Any, extents: dict[str, int]) -> None:
    arguments = arguments_of(kernel, extents)
    copies = {name: array.copy() for name, array in arguments.items()}
    interpret(kernel.tile_ir(), copies)
    emulate.run(kernel, *arguments.values(), target="sm_80", workers=2)
    found, wanted = (a["y"].astype(np.float64) for a in (arguments, copies))
    np.testing.assert_allclose(found, wanted, rtol=1e-2, atol=1e-4 * np.abs(wanted).max())


@needs_machine_code
@pytest.mark.parametrize(("kernel", "most"), [(int4, 7.0), (int8, 6.0), (halves, 9.0)], ids=["int4", "int8", "halves"])
def test_machine_code(kernel: Any, most: float) -> None:
    """Instructions for each weight: element by element, with lanes along the columns of `int4`, they were 23, 12 and
    33. A weight has a shift or a mask, a conversion, a product with its scale and a multiply-add."""
    names = [name for name, _ in kernel.parameters]
    text = compile_kernel(kernel, {}, dict.fromkeys(names, "contiguous"),
                          dict.fromkeys(("N", "K", "B", "KB", "NB"), (2**31 - 1, 64)), targets.target("sm_80"), None,
                          frozenset(names)).text()
    (made,) = assembler.assemble([text], "sm_80").values()
    assert made.spilled_bytes == 0
    loop = max((loop for loop in made.loops() if not loop["SHFL"]), key=lambda loop: loop["FFMA"])
    assert loop.total() <= most * 64 and loop["LDG"] <= 20
