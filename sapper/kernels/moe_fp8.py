"""A mixture of experts whose weights are fp8 with a scale for each block of 128 x 128 (fp8_panels.py).

Many tokens, in the order of their experts (moe.py): rows first[e] ... last[e] - 1 are those of expert e.

    grouped_fp8             y[m] = w[e] @ x[m], y [J, N, T, 2, 16]
    grouped_swiglu_fp8      y[m] = silu(gate[e] @ x[m]) * (up[e] @ x[m]), y [J, N, T, 16]

The panels of an expert are viewed as N blocks of T, or of T pairs where one matrix meets the rows, so that two vectors
of weights meet each number of a row (`panel_blocks`): a core walks the experts once for each block, and an expert's
rows come from its second cache for all panels of it but the first. What many rows meet is widened once, with its
scales, into `near`, which makes room for the next panel's: working memory of a panel (or two) for each block. FEW_ROWS
or fewer widen what they meet as they meet it. Experts without rows are not read. All is f32: no weight is rounded.

Rows of x should not lie pages apart (`row_apart`): many are read side by side.
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, each, f8e4m3, f32, i32, minimum, span, tiles, whole, zeros

from .activation import silu, silu_reference
from .fp8 import BLOCK, blocks
from .fp8_panels import FEW_ROWS, PANEL, SUM, gated_sum, matrix, random_weights
from .moe import row_apart
from .moe_blocks import panel_blocks
from .record import Arguments, Array, Case, LibraryKernel, Shape, normal, unwritten

A, B, E, J, K, N, T = sp.dims("A B E J K N T")
PAIR = 2


@sp.kernel
def grouped_fp8(
    x: Tensor[f32, J, K], first: Tensor[i32, E], last: Tensor[i32, E], w: Tensor[f8e4m3, E, N, T, PAIR, K, PANEL],
    scale: Tensor[f32, E, A, B], place: Tensor[i32, N, T, PAIR], near: Tensor[f32, N, K, PAIR, PANEL],
    y: Tensor[f32, J, N, T, PAIR, PANEL],
):
    wide, out = near.view(N, K, PAIR * PANEL), y.view(J, N, T, PAIR * PANEL)
    for n in each(N, disjoint=True):
        for e in range(E):
            if last[e] - first[e] > FEW_ROWS:
                for t in range(T):
                    for i in each(PAIR):
                        for b in each(B):
                            factor, l = scale[e, place[n, t, i], b], whole(PANEL)
                            for k in tiles(span(b * BLOCK, minimum(b * BLOCK + BLOCK, K))):
                                near[n, k, i, l] = w[e, n, t, i, k, l].to(f32) * factor
                    for m, l in tiles(span(first[e], last[e]), PAIR * PANEL):
                        acc = zeros(m, l, dtype=f32)
                        for k in tiles(K):
                            acc += x[m, k] @ wide[n, k, l]
                        out[m, n, t, l] = acc
            else:
                for t, i in each(T, PAIR):
                    a = place[n, t, i]
                    for m in tiles(span(first[e], last[e])):
                        l = whole(PANEL)
                        acc = zeros(m, l, dtype=f32)
                        for b in each(B):
                            part = zeros(m, l, dtype=f32)
                            for k in tiles(span(b * BLOCK, minimum(b * BLOCK + BLOCK, K))):
                                part += x[m, k] @ w[e, n, t, i, k, l].to(f32)
                            acc += part * scale[e, a, b]
                        y[m, n, t, i, l] = acc


def multiply_few_gated(x: Any, first: Any, last: Any, e: Any, n: Any, t: Any, gate: Any, gate_scale: Any, up: Any,
                       up_scale: Any, place: Any, y: Any) -> None:
    """An expert's rows, which are few, meet a panel of both its matrices and widen what they meet as they meet it."""
    a = place[n, t]
    for m in tiles(span(first[e], last[e])):
        l = whole(PANEL)
        y[m, n, t, l] = gated_sum(gate, gate_scale, up, up_scale, x, (e,), (n, t), a, m, l)


@sp.kernel
def grouped_swiglu_fp8(
    x: Tensor[f32, J, K], first: Tensor[i32, E], last: Tensor[i32, E], gate: Tensor[f8e4m3, E, N, T, K, PANEL],
    gate_scale: Tensor[f32, E, A, B], up: Tensor[f8e4m3, E, N, T, K, PANEL], up_scale: Tensor[f32, E, A, B],
    place: Tensor[i32, N, T], near_gate: Tensor[f32, N, K, PANEL], near_up: Tensor[f32, N, K, PANEL],
    y: Tensor[f32, J, N, T, PANEL],
):
    for n in each(N, disjoint=True):
        for e in range(E):
            if last[e] - first[e] > FEW_ROWS:
                for t in range(T):
                    a = place[n, t]
                    for b in each(B):
                        gate_factor, up_factor, l = gate_scale[e, a, b], up_scale[e, a, b], whole(PANEL)
                        for k in tiles(span(b * BLOCK, minimum(b * BLOCK + BLOCK, K))):
                            near_gate[n, k, l] = gate[e, n, t, k, l].to(f32) * gate_factor
                            near_up[n, k, l] = up[e, n, t, k, l].to(f32) * up_factor
                    for m, l in tiles(span(first[e], last[e]), PANEL):
                        gate_sum = zeros(m, l, dtype=f32)
                        up_sum = zeros(m, l, dtype=f32)
                        for k in tiles(K):
                            row = x[m, k]
                            gate_sum += row @ near_gate[n, k, l]
                            up_sum += row @ near_up[n, k, l]
                        y[m, n, t, l] = silu(gate_sum) * up_sum
            else:
                for t in each(T):
                    multiply_few_gated(x, first, last, e, n, t, gate, gate_scale, up, up_scale, place, y)


# ------------------------------------------------------------------------------------------- references and arguments


def reference(arguments: Arguments) -> dict[str, Array]:
    y = arguments["y"].astype(np.float64)
    x, place = arguments["x"].astype(np.float64), arguments["place"].reshape(-1)

    def product(e: int, name: str, scale: str, rows: slice) -> Array:
        panels = arguments[name][e]
        found: Array = x[rows] @ matrix(panels.reshape(-1, *panels.shape[-2:]), arguments[scale][e], place).T
        return found

    for e, (first, last) in enumerate(zip(arguments["first"], arguments["last"], strict=True)):
        rows = slice(first, last)
        if "w" in arguments:
            made = product(e, "w", "scale", rows)
        else:
            gate, up = (product(e, name, f"{name}_scale", rows) for name in ("gate", "up"))
            made = silu_reference(gate) * up
        y[rows] = made.reshape(last - first, *y.shape[1:])
    return {"y": y}


def make_arguments(random: "np.random.Generator", shape: Shape, swiglu: bool) -> Arguments:
    """Experts of uneven load: every third has no rows."""
    e, n, t, k, a, j = (shape[name] for name in "ENTKAJ")
    panels = (n, t) if swiglu else (n, t, PAIR)
    counts = np.bincount(random.choice([one for one in range(e) if one % 3 != 1], j), minlength=e)
    last = np.cumsum(counts).astype(np.int32)
    x = np.empty((j, row_apart(k)), np.float32)[:, :k]
    x[...] = normal(random, j, k, scale=0.01 / np.sqrt(k + 1.0))
    made: Arguments = {"x": x, "first": (last - counts).astype(np.int32), "last": last}
    for name in ("gate", "up") if swiglu else ("w",):
        made |= {name: random_weights(random, e, *panels, k, PANEL),
                 "scale" if name == "w" else f"{name}_scale": normal(random, e, a, blocks(k))}
    made["place"] = np.sort(random.integers(0, a, panels), axis=None).astype(np.int32).reshape(panels)
    room = {"near_gate": unwritten(n, k, PANEL), "near_up": unwritten(n, k, PANEL)}
    return made | (room if swiglu else {"near": unwritten(n, k, PAIR, PANEL)}) | {"y": unwritten(j, *panels, PANEL)}


def _entry(kernel: Any, swiglu: bool) -> LibraryKernel:
    count = 2 if swiglu else 1
    cases = []
    e, rows, columns = (18, 768, 1024) if swiglu else (18, 1024, 768)
    each_panels = 1 if swiglu else PAIR
    n, t = panel_blocks(rows // PANEL // each_panels, 2)
    a, b = blocks(rows), blocks(columns)
    weights = count * (e * (rows * columns + 4 * a * b) + 4 * n * columns * each_panels * PANEL) + 4 * rows // PANEL
    for j in (24, 512 * 6):
        cases.append(Case({"E": e, "N": n, "T": t, "K": columns, "A": a, "B": b, "J": j},
                          flops=2 * count * j * rows * columns, bytes=weights + 4 * j * (rows + columns) + 8 * e))
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=reference,
        make_arguments=lambda random, shape: make_arguments(random, shape, swiglu), tolerance=SUM, cases=tuple(cases),
        check_shapes=tuple(dict(zip(("E", "N", "T", "K", "A", "B", "J"), extents, strict=True)) for extents in (
            (1, 1, 1, 1, 1, 1, 1), (4, 2, 1, 34, 1, 1, 7), (3, 1, 2, 130, 2, 2, 33), (2, 2, 2, 200, 2, 2, 0))),
        dtype="fp8",
    )


KERNELS = (_entry(grouped_fp8, False), _entry(grouped_swiglu_fp8, True))
