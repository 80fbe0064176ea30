"""Adapters of low rank (LoRA: Hu et al., 2021, arXiv:2106.09685) of a matrix W that stays as it is:
y = W x + scale * B (A x), A [rank, in], B [out, rank].

    lora_down            low = scale * x A^T
    lora_up              y = carried + low B^T, in place: what W gave is carried
    lora_up_gradient     dlow = scale * dy B
    lora_down_gradient   dx = carried + dlow A, in place

With the factor in `low` and in its gradient, dB = dy^T low and dA = dlow^T x are plain products (matmul_tn). Of 512
rows by 1536 x 576 with a rank of 16 on two cores of a Zen 3, each takes 1 to 4 % of what W does; a sum that goes on
from W's products in one kernel gained nothing beside that.
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, f32, tiles, zeros

from .matmul import product
from .record import Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

M, N, K, R = sp.dims("M N K R")


@sp.kernel
def lora_down(x: Tensor[f32, M, K], a: Tensor[f32, R, K], scale: f32, low: Tensor[f32, M, R]):
    for m, r in tiles(M, R):
        acc = zeros(m, r, dtype=f32)
        for k in tiles(K):
            acc += x[m, k] @ a[r, k]
        low[m, r] = scale * acc


@sp.kernel(in_place=[("y", "carried")])
def lora_up(low: Tensor[f32, M, R], b: Tensor[f32, N, R], carried: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for r in tiles(R):
            acc += low[m, r] @ b[n, r]
        y[m, n] = carried[m, n] + acc


@sp.kernel
def lora_up_gradient(dy: Tensor[f32, M, N], b: Tensor[f32, N, R], scale: f32, dlow: Tensor[f32, M, R]):
    for m, r in tiles(M, R):
        acc = zeros(m, r, dtype=f32)
        for n in tiles(N):
            acc += dy[m, n] @ b[n, r]
        dlow[m, r] = scale * acc


@sp.kernel(in_place=[("dx", "carried")])
def lora_down_gradient(
    dlow: Tensor[f32, M, R], a: Tensor[f32, R, K], carried: Tensor[f32, M, K], dx: Tensor[f32, M, K],
):
    for m, k in tiles(M, K):
        acc = zeros(m, k, dtype=f32)
        for r in tiles(R):
            acc += dlow[m, r] @ a[r, k]
        dx[m, k] = carried[m, k] + acc


# ------------------------------------------------------------------------------------------- references and arguments


SCALE = 0.5
TOLERANCE = Tolerance(
    1e-5, 2e-5, "a sum of rounded products near the root of one over their number, in any order: near 2**-24 times "
                "that root in practice")
CHECKED = (0, 4, 3), (2, 0, 3), (2, 3, 0), (1, 1, 1), (5, 7, 3), (17, 33, 16), (33, 70, 8), (1, 100, 48)
TIMED = (512, 576, 16), (512, 1536, 16), (512, 4096, 64)


def scaled_arguments(random: "np.random.Generator", m: int, summed: int, rank: int, nt: bool) -> Arguments:
    left, right, low = ("x", "a", "low") if nt else ("dy", "b", "dlow")
    scale = 1.0 / np.sqrt(summed + 1.0)
    return {left: normal(random, m, summed),
            right: normal(random, *((rank, summed) if nt else (summed, rank)), scale=scale), "scale": SCALE,
            low: unwritten(m, rank)}


def added_arguments(random: "np.random.Generator", m: int, columns: int, rank: int, nt: bool) -> Arguments:
    left, right, result = ("low", "b", "y") if nt else ("dlow", "a", "dx")
    scale = 1.0 / np.sqrt(rank + 1.0)
    return {left: normal(random, m, rank),
            right: normal(random, *((columns, rank) if nt else (rank, columns)), scale=scale),
            "carried": normal(random, m, columns), result: unwritten(m, columns)}


def scaled_reference(arguments: Arguments, nt: bool) -> dict[str, Array]:
    left, right, low = ("x", "a", "low") if nt else ("dy", "b", "dlow")
    return {low: arguments["scale"] * product(arguments[left], arguments[right], "nt" if nt else "nn")}


def added_reference(arguments: Arguments, nt: bool) -> dict[str, Array]:
    left, right, result = ("low", "b", "y") if nt else ("dlow", "a", "dx")
    return {result: arguments["carried"] + product(arguments[left], arguments[right], "nt" if nt else "nn")}


def _entry(name: str, kernel: Any, of: str, scaled: bool, nt: bool) -> LibraryKernel:
    """of: its dimension besides M and R."""
    make, reference = (scaled_arguments, scaled_reference) if scaled else (added_arguments, added_reference)
    wide = 1 if scaled else 2  # times that [M, of] is met

    def shape(m: int, columns: int, rank: int) -> dict[str, int]:
        return {"M": m, of: columns, "R": rank}

    def made(random: "np.random.Generator", extents: Shape) -> Arguments:
        return make(random, extents["M"], extents[of], extents["R"], nt)

    return LibraryKernel(
        name=name, kernel=kernel, reference=lambda arguments: reference(arguments, nt), make_arguments=made,
        tolerance=TOLERANCE,
        cases=tuple(Case(shape(m, n, r), flops=2 * m * n * r, bytes=4 * (wide * m * n + n * r + m * r))
                    for m, n, r in TIMED),
        check_shapes=tuple(shape(*one) for one in CHECKED),
    )


KERNELS = (
    _entry("lora_down", lora_down, "K", scaled=True, nt=True),
    _entry("lora_up", lora_up, "N", scaled=False, nt=True),
    _entry("lora_up_gradient", lora_up_gradient, "N", scaled=True, nt=False),
    _entry("lora_down_gradient", lora_down_gradient, "K", scaled=False, nt=False),
)
