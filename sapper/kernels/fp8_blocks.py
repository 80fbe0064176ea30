"""Weights in fp8 with scales for blocks of 128 x 128 (fp8_panels.py), which rows in f32 meet block by block.

    matmul_blocks_fp8, matmul_blocks_residual_fp8, matmul_blocks_swiglu_fp8
                            x @ w.T; residual + x @ w.T; silu(x @ gate.T) * (x @ up.T), y [M, N, T, 16]

The panels of a matrix are viewed as N blocks of T. A block of the depth, 128 of a panel, is widened once for ROWS rows,
into `near`, which stays in the first cache while all of them meet it; what comes of that is scaled and added to `sums`.
So working memory is 8 KiB of either for each of the N, and no row of y or of the weights is read twice. All is f32: no
weight is rounded, and no row.

On a core of a Zen 3, whose registers hold the sums of 4 or 5 rows by a panel, 4096 x 4096 in ms, by rows that widen
what they meet (up to 16; fp8_panels.py), or that are rounded to bf16 to meet slots of it, and so, in brackets gate and
up:

    5 rows 4.0, 3.0 (8.4, 6.5)      16 rows 9.7, 7.2 (22.3, 14.5)      128 rows 58, 49 (117, 96)
    8 rows 4.8, 4.3                 32 rows 15, 14 (32.6, 27.6)        512 rows 226, 198 (438, 426)

4 rows 2.5 and 2.6. Panels in pairs, for which rows come half as often, are copied to lie one after the other: 16 rows
7.5, 128 rows 69. Sums in y, where rows lie pages apart: 512 rows 215.
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, each, f8e4m3, f32, i32, minimum, span, tiles, whole, zeros

from .activation import silu, silu_reference
from .fp8 import BLOCK, blocks
from .fp8_panels import PANEL, SUM, matrix, random_weights
from .moe_blocks import panel_blocks
from .record import Arguments, Array, Case, LibraryKernel, Shape, normal, unwritten

A, B, K, M, N, T = sp.dims("A B K M N T")
FEWEST_ROWS = 4
"""Which registers hold the sums of, where these are few, widen what they meet as quickly."""
ROWS = 128
"""That meet what is widened: their sums by a panel are 8 KiB, and widening takes 3 % of the products' time."""


def add_block(x: Any, start: Any, stop: Any, w: Any, scale: Any, place: Any, expert: tuple[Any, ...], n: Any, t: Any,
              b: Any, near: Any, sums: Any) -> None:
    """Rows start ... stop - 1 of x meet block b of the depth of a panel, which near[n] holds widened; what comes
    of it is added to sums[n].

    expert: which of several matrices: (e,); or () where there is one.
    """
    l = whole(PANEL)
    for k in tiles(span(b * BLOCK, minimum(b * BLOCK + BLOCK, K))):
        near[n, k - b * BLOCK, l] = w[*expert, n, t, k, l].to(f32)
    factor = scale[*expert, place[n, t], b]
    for m, l in tiles(span(start, stop), PANEL):
        acc = zeros(m, l, dtype=f32)
        for k in tiles(span(b * BLOCK, minimum(b * BLOCK + BLOCK, K))):
            acc += x[m, k] @ near[n, k - b * BLOCK, l]
        sums[n, m - start, l] = sums[n, m - start, l] + acc * factor


@sp.kernel
def matmul_blocks_fp8(
    w: Tensor[f8e4m3, N, T, K, PANEL], scale: Tensor[f32, A, B], place: Tensor[i32, N, T], x: Tensor[f32, M, K],
    near: Tensor[f32, N, BLOCK, PANEL], sums: Tensor[f32, N, ROWS, PANEL], y: Tensor[f32, M, N, T, PANEL],
):
    for n in each(N, disjoint=True):
        for g in range((M + ROWS - 1) // ROWS):
            start = g * ROWS
            stop = minimum(start + ROWS, M)
            for t in range(T):
                for m, l in tiles(span(start, stop), PANEL):
                    sums[n, m - start, l] = 0.0
                for b in range(B):
                    add_block(x, start, stop, w, scale, place, (), n, t, b, near, sums)
                for m, l in tiles(span(start, stop), PANEL):
                    y[m, n, t, l] = sums[n, m - start, l]


@sp.kernel
def matmul_blocks_residual_fp8(
    w: Tensor[f8e4m3, N, T, K, PANEL], scale: Tensor[f32, A, B], place: Tensor[i32, N, T], x: Tensor[f32, M, K],
    near: Tensor[f32, N, BLOCK, PANEL], sums: Tensor[f32, N, ROWS, PANEL],
    residual: Tensor[f32, M, N, T, PANEL], y: Tensor[f32, M, N, T, PANEL],
):
    for n in each(N, disjoint=True):
        for g in range((M + ROWS - 1) // ROWS):
            start = g * ROWS
            stop = minimum(start + ROWS, M)
            for t in range(T):
                for m, l in tiles(span(start, stop), PANEL):
                    sums[n, m - start, l] = 0.0
                for b in range(B):
                    add_block(x, start, stop, w, scale, place, (), n, t, b, near, sums)
                for m, l in tiles(span(start, stop), PANEL):
                    y[m, n, t, l] = residual[m, n, t, l] + sums[n, m - start, l]


@sp.kernel
def matmul_blocks_swiglu_fp8(
    gate: Tensor[f8e4m3, N, T, K, PANEL], gate_scale: Tensor[f32, A, B], up: Tensor[f8e4m3, N, T, K, PANEL],
    up_scale: Tensor[f32, A, B], place: Tensor[i32, N, T], x: Tensor[f32, M, K], near: Tensor[f32, N, BLOCK, PANEL],
    gate_sums: Tensor[f32, N, ROWS, PANEL], up_sums: Tensor[f32, N, ROWS, PANEL], y: Tensor[f32, M, N, T, PANEL],
):
    for n in each(N, disjoint=True):
        for g in range((M + ROWS - 1) // ROWS):
            start = g * ROWS
            stop = minimum(start + ROWS, M)
            for t in range(T):
                for m, l in tiles(span(start, stop), PANEL):
                    gate_sums[n, m - start, l] = 0.0
                    up_sums[n, m - start, l] = 0.0
                for b in range(B):
                    add_block(x, start, stop, gate, gate_scale, place, (), n, t, b, near, gate_sums)
                    add_block(x, start, stop, up, up_scale, place, (), n, t, b, near, up_sums)
                for m, l in tiles(span(start, stop), PANEL):
                    y[m, n, t, l] = silu(gate_sums[n, m - start, l]) * up_sums[n, m - start, l]


def reference(arguments: Arguments) -> dict[str, Array]:
    place, x, shape = arguments["place"].reshape(-1), arguments["x"].astype(np.float64), arguments["y"].shape

    def of(name: str, scale: str) -> Array:
        panels = arguments[name]
        found: Array = x @ matrix(panels.reshape(-1, *panels.shape[-2:]), arguments[scale], place).T
        return found.reshape(shape)

    if "gate" in arguments:
        return {"y": silu_reference(of("gate", "gate_scale")) * of("up", "up_scale")}
    found = of("w", "scale")
    return {"y": arguments["residual"] + found if "residual" in arguments else found}


def make_arguments(random: "np.random.Generator", shape: Shape, task: str) -> Arguments:
    n, t, k, a, m = (shape[name] for name in "NTKAM")
    names = ("gate", "up") if task == "swiglu" else ("w",)
    arguments: Arguments = {}
    for name in names:
        arguments |= {name: random_weights(random, n, t, k, PANEL),
                      "scale" if name == "w" else f"{name}_scale": normal(random, a, blocks(k))}
    arguments["place"] = np.sort(random.integers(0, a, (n, t)), axis=None).astype(np.int32).reshape(n, t)
    arguments |= {"x": normal(random, m, k, scale=0.01 / np.sqrt(k + 1.0)), "near": unwritten(n, BLOCK, PANEL)}
    for name in names:
        arguments["sums" if name == "w" else f"{name}_sums"] = unwritten(n, ROWS, PANEL)
    if task == "residual":
        arguments["residual"] = normal(random, m, n, t, PANEL)
    return arguments | {"y": unwritten(m, n, t, PANEL)}


def _entry(kernel: Any, task: str) -> LibraryKernel:
    count = 2 if task == "swiglu" else 1

    def extents(rows: int, columns: int, m: int) -> dict[str, int]:
        n, t = panel_blocks(rows // PANEL, 2)
        return {"N": n, "T": t, "K": columns, "A": max(1, blocks(rows)), "B": blocks(columns), "M": m}

    cases = []
    for rows, columns in ((7168, 2048), (2048, 7168)):
        for m in (16, 128, 512):
            shape = extents(rows, columns, m)
            weights = rows * columns + 4 * shape["A"] * shape["B"] + 4 * shape["N"] * ROWS * PANEL
            results = 4 * m * rows * (2 if task == "residual" else 1)
            cases.append(Case(shape, flops=2 * count * m * rows * columns,
                              bytes=count * weights + 4 * shape["N"] * BLOCK * PANEL + 4 * rows // PANEL
                              + 4 * m * columns + results))
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=reference,
        make_arguments=lambda random, shape: make_arguments(random, shape, task), tolerance=SUM, cases=tuple(cases),
        check_shapes=(extents(16, 1, 1), extents(48, 128, 5), extents(80, 200, 129), extents(144, 448, 19),
                      extents(32, 34, 0)),
        dtype="fp8",
    )


KERNELS = (_entry(matmul_blocks_fp8, ""), _entry(matmul_blocks_residual_fp8, "residual"),
           _entry(matmul_blocks_swiglu_fp8, "swiglu"))
