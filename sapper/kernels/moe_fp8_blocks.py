"""A mixture of experts whose weights are fp8 (moe_fp8.py), which rows meet block by block (fp8_blocks.py).

    grouped_blocks_fp8             y[m] = w[e] @ x[m], y [J, N, T, 16]
    grouped_blocks_swiglu_fp8      y[m] = silu(gate[e] @ x[m]) * (up[e] @ x[m]), y [J, N, T, 16]

Rows and panels as in moe_fp8.py. A block of the depth of a panel is widened once for up to ROWS rows of an expert;
FEWEST_ROWS or fewer widen what they meet as they meet it. Experts without rows are not read, and working memory is a
block and the sums of ROWS rows for each of the N. All is f32: no weight is rounded.
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, each, f8e4m3, f32, i32, minimum, span, tiles, whole, zeros

from .activation import silu
from .fp8 import BLOCK, blocks
from .fp8_blocks import FEWEST_ROWS, ROWS, add_block
from .fp8_panels import PANEL, SUM, random_weights
from .moe import row_apart
from .moe_blocks import panel_blocks
from .moe_fp8 import multiply_few_gated, reference
from .record import Arguments, Case, LibraryKernel, Shape, normal, unwritten

A, B, E, J, K, N, T = sp.dims("A B E J K N T")


@sp.kernel
def grouped_blocks_fp8(
    x: Tensor[f32, J, K], first: Tensor[i32, E], last: Tensor[i32, E], w: Tensor[f8e4m3, E, N, T, K, PANEL],
    scale: Tensor[f32, E, A, B], place: Tensor[i32, N, T], near: Tensor[f32, N, BLOCK, PANEL],
    sums: Tensor[f32, N, ROWS, PANEL], y: Tensor[f32, J, N, T, PANEL],
):
    for n in each(N, disjoint=True):
        for e in range(E):
            if last[e] - first[e] > FEWEST_ROWS:
                for g in range((last[e] - first[e] + ROWS - 1) // ROWS):
                    start = first[e] + g * ROWS
                    stop = minimum(start + ROWS, last[e])
                    for t in range(T):
                        for m, l in tiles(span(start, stop), PANEL):
                            sums[n, m - start, l] = 0.0
                        for b in range(B):
                            add_block(x, start, stop, w, scale, place, (e,), n, t, b, near, sums)
                        for m, l in tiles(span(start, stop), PANEL):
                            y[m, n, t, l] = sums[n, m - start, l]
            else:
                for t in each(T):
                    a = place[n, t]
                    for m in tiles(span(first[e], last[e])):
                        l = whole(PANEL)
                        acc = zeros(m, l, dtype=f32)
                        for b in each(B):
                            part = zeros(m, l, dtype=f32)
                            for k in tiles(span(b * BLOCK, minimum(b * BLOCK + BLOCK, K))):
                                part += x[m, k] @ w[e, n, t, k, l].to(f32)
                            acc += part * scale[e, a, b]
                        y[m, n, t, l] = acc


@sp.kernel
def grouped_blocks_swiglu_fp8(
    x: Tensor[f32, J, K], first: Tensor[i32, E], last: Tensor[i32, E], gate: Tensor[f8e4m3, E, N, T, K, PANEL],
    gate_scale: Tensor[f32, E, A, B], up: Tensor[f8e4m3, E, N, T, K, PANEL], up_scale: Tensor[f32, E, A, B],
    place: Tensor[i32, N, T], near: Tensor[f32, N, BLOCK, PANEL], gate_sums: Tensor[f32, N, ROWS, PANEL],
    up_sums: Tensor[f32, N, ROWS, PANEL], y: Tensor[f32, J, N, T, PANEL],
):
    for n in each(N, disjoint=True):
        for e in range(E):
            if last[e] - first[e] > FEWEST_ROWS:
                for g in range((last[e] - first[e] + ROWS - 1) // ROWS):
                    start = first[e] + g * ROWS
                    stop = minimum(start + ROWS, last[e])
                    for t in range(T):
                        for m, l in tiles(span(start, stop), PANEL):
                            gate_sums[n, m - start, l] = 0.0
                            up_sums[n, m - start, l] = 0.0
                        for b in range(B):
                            add_block(x, start, stop, gate, gate_scale, place, (e,), n, t, b, near, gate_sums)
                            add_block(x, start, stop, up, up_scale, place, (e,), n, t, b, near, up_sums)
                        for m, l in tiles(span(start, stop), PANEL):
                            y[m, n, t, l] = silu(gate_sums[n, m - start, l]) * up_sums[n, m - start, l]
            else:
                for t in each(T):
                    multiply_few_gated(x, first, last, e, n, t, gate, gate_scale, up, up_scale, place, y)


def make_arguments(random: "np.random.Generator", shape: Shape, swiglu: bool) -> Arguments:
    """Experts of uneven load: every third has no rows."""
    e, n, t, k, a, j = (shape[name] for name in "ENTKAJ")
    counts = np.bincount(random.choice([one for one in range(e) if one % 3 != 1], j), minlength=e)
    last = np.cumsum(counts).astype(np.int32)
    x = np.empty((j, row_apart(k)), np.float32)[:, :k]
    x[...] = normal(random, j, k, scale=0.01 / np.sqrt(k + 1.0))
    made: Arguments = {"x": x, "first": (last - counts).astype(np.int32), "last": last}
    names = ("gate", "up") if swiglu else ("w",)
    for name in names:
        made |= {name: random_weights(random, e, n, t, k, PANEL),
                 "scale" if name == "w" else f"{name}_scale": normal(random, e, a, blocks(k))}
    made["place"] = np.sort(random.integers(0, a, (n, t)), axis=None).astype(np.int32).reshape(n, t)
    made["near"] = unwritten(n, BLOCK, PANEL)
    for name in names:
        made["sums" if name == "w" else f"{name}_sums"] = unwritten(n, ROWS, PANEL)
    return made | {"y": unwritten(j, n, t, PANEL)}


def _entry(kernel: Any, swiglu: bool) -> LibraryKernel:
    count = 2 if swiglu else 1
    cases = []
    e, rows, columns = (18, 768, 1024) if swiglu else (18, 1024, 768)
    n, t = panel_blocks(rows // PANEL, 2)
    a, b = blocks(rows), blocks(columns)
    weights = count * (e * (rows * columns + 4 * a * b) + 4 * n * ROWS * PANEL) + 4 * n * BLOCK * PANEL
    weights += 4 * rows // PANEL
    for j in (24, 512 * 6):
        cases.append(Case({"E": e, "N": n, "T": t, "K": columns, "A": a, "B": b, "J": j},
                          flops=2 * count * j * rows * columns, bytes=weights + 4 * j * (rows + columns) + 8 * e))
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=reference,
        make_arguments=lambda random, shape: make_arguments(random, shape, swiglu), tolerance=SUM, cases=tuple(cases),
        check_shapes=tuple(dict(zip(("E", "N", "T", "K", "A", "B", "J"), extents, strict=True)) for extents in (
            (1, 1, 1, 1, 1, 1, 1), (4, 2, 1, 34, 1, 1, 7), (3, 1, 2, 130, 2, 2, 33), (2, 2, 2, 200, 2, 2, 0),
            (2, 1, 1, 34, 1, 1, 139))),
        dtype="fp8",
    )


KERNELS = (_entry(grouped_blocks_fp8, False), _entry(grouped_blocks_swiglu_fp8, True))
