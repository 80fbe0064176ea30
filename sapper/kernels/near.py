"""Rows in bf16 by weights in blocks (quantized.py, k_quants.py), which are rounded to bf16 as they meet them.

    matmul_near             y [M, P, R, 32] = x @ w.T
    matmul_residual_near    y = residual + x @ w.T
    matmul_swiglu_near      y = silu(x @ gate.T) * (x @ up.T), in f32 or, as the next product takes it, in bf16

A task has R panels of 32 rows of weights each. A panel is widened once, into the task's part of `near`, meets all rows
of activations, and makes room for the next one: it stays in the caches of who widened it. Widened by a kernel and
multiplied by another, a MiB at a time, weights come from the cache of another core half of the time, and workers wait
for each other twice for each MiB: SmolLM2's 1536 x 576 in Q4_1 by 16, 64, 128 and 512 rows takes 86, 102, 160 and 468
us so, and 104, 125, 235 and 567 by two kernels, on two threads of a Granite Rapids; 4096 x 4096 in Q4_0 by 64 1634 and
2901. Weights lie in near [P, K / 2, 32, 2] as products of bf16 read them: columns in pairs, 32 rows beside each other.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, each, f16, f32, i32, tiles, u8, zeros

from .activation import silu, silu_reference
from .k_quants import BLOCK_BYTES, SCALE_TYPES, SUPER, WORDS, kernels_of, random_panels, rows_of
from .moe import TOLERANCE
from .quantized import FORMS, PANEL, SLOT, Form, matrix, random_blocks
from .record import NUMPY_DTYPES, Arguments, Array, Case, LibraryKernel, Shape, normal, rounded_to_bf16, unwritten
from .widen import DTYPES, put_pairs

B, M, P, R, S = sp.dims("B M P R S")
TOGETHER = 2
ROWS = TOGETHER * PANEL
"""Rows of weights that are widened at a time."""


def product(rows: Any, wide: Any, pairs: Any, p: Any, m: Any, l: Any) -> Any:
    """Rows m of the activations by the rows l of what task p widened. pairs: of columns."""
    acc = zeros(m, l, dtype=f32)
    for h, i in tiles(pairs, 2):
        acc += rows[m, h, i] @ wide[p, h, l, i]
    return acc


def gated(rows: Any, gate: Any, up: Any, pairs: Any, p: Any, m: Any, l: Any) -> Any:
    """The same by two matrices, joined by silu."""
    gate_sum = zeros(m, l, dtype=f32)
    up_sum = zeros(m, l, dtype=f32)
    for h, i in tiles(pairs, 2):
        row = rows[m, h, i]
        gate_sum += row @ gate[p, h, l, i]
        up_sum += row @ up[p, h, l, i]
    return silu(gate_sum) * up_sum


@cache
def near_kernels(form: Form, result: str = "f32") -> SimpleNamespace:
    """The kernels of a form of blocks. result: of matmul_swiglu, "f32" or "bf16"."""
    halves, words, scale_rows, size = form.halves, form.words, form.scales, form.block
    pairs, given = size // 2, DTYPES[result]

    def put(quants: Any, scales: Any, near: Any, p: Any, r: Any, j: Any, b: Any) -> None:
        """Half a panel of task p, widened, to `near`."""
        joined = quants.view(P * R * TOGETHER, B, words, PANEL, dtype=i32)
        factors = scales.view(P * R * TOGETHER, B, scale_rows, PANEL)
        slots = near.view(P, B, halves, words, 2, TOGETHER, PANEL, dtype=i32)
        put_pairs(form, joined, factors, (p * R + r) * TOGETHER + j, slots, p, b, j)

    @sp.kernel(name=f"matmul_near_{form.name}")
    def matmul(
        x: Tensor[bf16, M, B, size], quants: Tensor[u8, P, R, TOGETHER, B, words, PANEL, SLOT],
        scales: Tensor[f16, P, R, TOGETHER, B, scale_rows, PANEL], near: Tensor[bf16, P, B, pairs, ROWS, 2],
        y: Tensor[f32, M, P, R, ROWS],
    ):
        rows, wide = x.view(M, B * pairs, 2), near.view(P, B * pairs, ROWS, 2)
        for p in each(P, disjoint=True):
            for r in range(R):
                for j, b in tiles(TOGETHER, B):
                    put(quants, scales, near, p, r, j, b)
                for m, l in tiles(M, ROWS):
                    y[m, p, r, l] = product(rows, wide, B * pairs, p, m, l)

    @sp.kernel(name=f"matmul_residual_near_{form.name}")
    def matmul_residual(
        x: Tensor[bf16, M, B, size], quants: Tensor[u8, P, R, TOGETHER, B, words, PANEL, SLOT],
        scales: Tensor[f16, P, R, TOGETHER, B, scale_rows, PANEL], near: Tensor[bf16, P, B, pairs, ROWS, 2],
        residual: Tensor[f32, M, P, R, ROWS], y: Tensor[f32, M, P, R, ROWS],
    ):
        rows, wide = x.view(M, B * pairs, 2), near.view(P, B * pairs, ROWS, 2)
        for p in each(P, disjoint=True):
            for r in range(R):
                for j, b in tiles(TOGETHER, B):
                    put(quants, scales, near, p, r, j, b)
                for m, l in tiles(M, ROWS):
                    y[m, p, r, l] = residual[m, p, r, l] + product(rows, wide, B * pairs, p, m, l)

    @sp.kernel(name=f"matmul_swiglu_near_{form.name}_{result}")
    def matmul_swiglu(
        x: Tensor[bf16, M, B, size], gate: Tensor[u8, P, R, TOGETHER, B, words, PANEL, SLOT],
        gate_scales: Tensor[f16, P, R, TOGETHER, B, scale_rows, PANEL],
        up: Tensor[u8, P, R, TOGETHER, B, words, PANEL, SLOT],
        up_scales: Tensor[f16, P, R, TOGETHER, B, scale_rows, PANEL],
        near_gate: Tensor[bf16, P, B, pairs, ROWS, 2], near_up: Tensor[bf16, P, B, pairs, ROWS, 2],
        y: Tensor[given, M, P, R, ROWS],
    ):
        rows = x.view(M, B * pairs, 2)
        wide_gate, wide_up = near_gate.view(P, B * pairs, ROWS, 2), near_up.view(P, B * pairs, ROWS, 2)
        for p in each(P, disjoint=True):
            for r in range(R):
                for j, b in tiles(TOGETHER, B):
                    put(gate, gate_scales, near_gate, p, r, j, b)
                    put(up, up_scales, near_up, p, r, j, b)
                for m, l in tiles(M, ROWS):
                    y[m, p, r, l] = gated(rows, wide_gate, wide_up, B * pairs, p, m, l).to(given)

    return SimpleNamespace(matmul=matmul, matmul_residual=matmul_residual, matmul_swiglu=matmul_swiglu)


@cache
def near_k_kernels(form: str, result: str = "f32") -> SimpleNamespace:
    """The same of a form of super blocks."""
    words, scale_type, made = WORDS[form], SCALE_TYPES[form], kernels_of(form)
    pairs, given = SUPER // 2, DTYPES[result]
    put_super, blocks, size_bytes = made.put_pairs, made.pair_blocks, words * PANEL * SLOT

    def put(w: Any, near: Any, p: Any, r: Any, j: Any, s: Any) -> None:
        """Half a panel of task p, widened, to `near`."""
        joined = w.view(P * R * TOGETHER, S, words, PANEL, dtype=i32)
        parts = w.view(P * R * TOGETHER, S, size_bytes, dtype=scale_type)
        factor = w.view(P * R * TOGETHER, S, size_bytes // 2, dtype=f16)
        slots = near.view(P, S, *blocks, TOGETHER, PANEL, dtype=i32)
        put_super(joined, parts, factor, (p * R + r) * TOGETHER + j, slots, p, s, j)

    @sp.kernel(name=f"matmul_near_{form}")
    def matmul(
        x: Tensor[bf16, M, S, SUPER], w: Tensor[u8, P, R, TOGETHER, S, words, PANEL, SLOT],
        near: Tensor[bf16, P, S, pairs, ROWS, 2], y: Tensor[f32, M, P, R, ROWS],
    ):
        rows, wide = x.view(M, S * pairs, 2), near.view(P, S * pairs, ROWS, 2)
        for p in each(P, disjoint=True):
            for r in range(R):
                for j, s in tiles(TOGETHER, S):
                    put(w, near, p, r, j, s)
                for m, l in tiles(M, ROWS):
                    y[m, p, r, l] = product(rows, wide, S * pairs, p, m, l)

    @sp.kernel(name=f"matmul_residual_near_{form}")
    def matmul_residual(
        x: Tensor[bf16, M, S, SUPER], w: Tensor[u8, P, R, TOGETHER, S, words, PANEL, SLOT],
        near: Tensor[bf16, P, S, pairs, ROWS, 2], residual: Tensor[f32, M, P, R, ROWS], y: Tensor[f32, M, P, R, ROWS],
    ):
        rows, wide = x.view(M, S * pairs, 2), near.view(P, S * pairs, ROWS, 2)
        for p in each(P, disjoint=True):
            for r in range(R):
                for j, s in tiles(TOGETHER, S):
                    put(w, near, p, r, j, s)
                for m, l in tiles(M, ROWS):
                    y[m, p, r, l] = residual[m, p, r, l] + product(rows, wide, S * pairs, p, m, l)

    @sp.kernel(name=f"matmul_swiglu_near_{form}_{result}")
    def matmul_swiglu(
        x: Tensor[bf16, M, S, SUPER], gate: Tensor[u8, P, R, TOGETHER, S, words, PANEL, SLOT],
        up: Tensor[u8, P, R, TOGETHER, S, words, PANEL, SLOT], near_gate: Tensor[bf16, P, S, pairs, ROWS, 2],
        near_up: Tensor[bf16, P, S, pairs, ROWS, 2], y: Tensor[given, M, P, R, ROWS],
    ):
        rows = x.view(M, S * pairs, 2)
        wide_gate, wide_up = near_gate.view(P, S * pairs, ROWS, 2), near_up.view(P, S * pairs, ROWS, 2)
        for p in each(P, disjoint=True):
            for r in range(R):
                for j, s in tiles(TOGETHER, S):
                    put(gate, near_gate, p, r, j, s)
                    put(up, near_up, p, r, j, s)
                for m, l in tiles(M, ROWS):
                    y[m, p, r, l] = gated(rows, wide_gate, wide_up, S * pairs, p, m, l).to(given)

    return SimpleNamespace(matmul=matmul, matmul_residual=matmul_residual, matmul_swiglu=matmul_swiglu)


# ------------------------------------------------------------------------------------------- references and arguments


Source = Form | str
"""A form of blocks, or the name of one of super blocks."""


def rounded_rows(arguments: Arguments, form: Source, name: str, places: int) -> Array:
    """The rows [N, K] of panels that lie in so many axes: computed and rounded in f32, then to bf16; in float64."""
    w = arguments[name]
    panels = w.reshape(-1, *w.shape[places:])
    if isinstance(form, Form):
        scales = arguments["scales" if name == "quants" else f"{name}_scales"]
        wide = matrix(form, panels, scales.reshape(-1, *scales.shape[places:]))
    else:
        wide = rows_of(form, panels)
    return wide.astype(np.float32).astype(NUMPY_DTYPES["bf16"]).astype(np.float64)


def reference(arguments: Arguments, form: Source) -> dict[str, Array]:
    y = arguments["y"]
    x = arguments["x"].astype(np.float64)
    x = x.reshape(len(y), x.shape[1] * x.shape[2])
    made = [x @ rounded_rows(arguments, form, name, 3).T for name in ("quants", "w", "gate", "up") if name in arguments]
    rows = (made[0] if len(made) == 1 else silu_reference(made[0]) * made[1]).reshape(y.shape)
    return {"y": rows + arguments["residual"] if "residual" in arguments else rows}


def make_arguments(random: "np.random.Generator", shape: Shape, form: Source, task: str, result: str) -> Arguments:
    m, p, r = (shape[name] for name in "MPR")
    depth, size = (shape["B"], form.block) if isinstance(form, Form) else (shape["S"], SUPER)
    made: Arguments = {"x": normal(random, m, depth, size, dtype="bf16")}
    names = ("gate", "up") if task == "matmul_swiglu" else ("",)
    for name in names:
        if isinstance(form, Form):
            parts = random_blocks(random, form, p * r * TOGETHER, (depth,), name)
        else:
            parts = {name or "w": random_panels(random, form, p * r * TOGETHER, depth)}
        made |= {key: part.reshape(p, r, TOGETHER, *part.shape[1:]) for key, part in parts.items()}
    made |= {f"near_{name}" if name else "near": unwritten(p, depth, size // 2, ROWS, 2, dtype="bf16")
             for name in names}
    if task == "matmul_residual":
        made["residual"] = normal(random, m, p, r, ROWS)
    return made | {"y": unwritten(m, p, r, ROWS, dtype=result)}


def _entry(form: Source, task: str, result: str) -> LibraryKernel:
    kernels: Any = near_kernels(form, result) if isinstance(form, Form) else near_k_kernels(form, result)
    kernel = getattr(kernels, task)
    depth, size, block_bytes, dtype = ("B", form.block, form.block_bytes, form.name) if isinstance(form, Form) else (
        "S", SUPER, BLOCK_BYTES[form], form)
    count, p, r, columns = 2 if task == "matmul_swiglu" else 1, 8, 8, 1024
    n = p * r * ROWS
    weights, near = n * columns // size * block_bytes, 2 * p * ROWS * columns
    moved = 2 if result == "bf16" else 8 if task == "matmul_residual" else 4
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=lambda arguments: reference(arguments, form),
        make_arguments=lambda random, shape: make_arguments(random, shape, form, task, result),
        tolerance=rounded_to_bf16(TOLERANCE) if result == "bf16" else TOLERANCE,
        cases=tuple(Case({"M": m, "P": p, "R": r, depth: columns // size}, flops=2 * count * m * n * columns,
                         bytes=count * (weights + near) + m * (2 * columns + moved * n)) for m in (32, 128)),
        check_shapes=({"M": 0, "P": 1, "R": 1, depth: 1}, {"M": 1, "P": 1, "R": 2, depth: 1},
                      {"M": 35, "P": 2, "R": 1, depth: 2}),
        dtype=dtype, products="bf16",
    )


KERNELS = tuple(_entry(form, task, result) for form, task, result in (
    (FORMS["q4m"], "matmul", "f32"), (FORMS["q4m"], "matmul_swiglu", "bf16"), (FORMS["q8"], "matmul_residual", "f32"),
    ("q4k", "matmul_residual", "f32"), ("q4k", "matmul_swiglu", "bf16"), ("q6k", "matmul", "f32"),
    ("q6k", "matmul_swiglu", "f32")))
