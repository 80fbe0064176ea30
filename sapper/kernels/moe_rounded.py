"""A mixture of experts whose weights in blocks (quantized.py, k_quants.py) are rounded to bf16, as are the activations.

Many tokens, in the order of their experts (moe.py): rows first[e] ... last[e] - 1 are those of expert e.

    grouped_rounded            y[m] = w[e] @ x[m], y [J, P, R, 32]
    grouped_swiglu_rounded     y[m] = silu(gate[e] @ x[m]) * (up[e] @ x[m]), in bf16, as the next product takes it

A task has R panels of each expert, 32 rows of weights each. A panel is widened once, into `near`, meets all rows of
activations that are the expert's, and makes room for the next one: 64 KiB for 1024 columns, which stay in the second
cache, as do the rows of activations until all panels of the expert have met them. (Of 16 experts with 128 rows each a
Granite Rapids takes 0.8 of the time that panels take whose turn comes before the expert's; a worker's last cache is
slow.) So near [P, K / 2, 32, 2], which holds a panel of each task, is working memory. Weights lie in it as products of
bf16 read them: columns in pairs, which are neighbours, and 32 rows beside each other. Experts without rows are not
widened.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, each, f16, f32, i32, span, tiles, u8

from .activation import silu_reference
from .k_quants import BLOCK_BYTES, SCALE_TYPES, SUPER, WORDS, kernels_of, random_panels
from .moe import TOLERANCE
from .near import ROWS, TOGETHER, Source, gated, product, rounded_rows
from .quantized import FORMS, PANEL, SLOT, Form, random_blocks
from .record import Arguments, Array, Case, LibraryKernel, Shape, normal, rounded_to_bf16, unwritten
from .widen import put_pairs

B, E, J, P, R, S = sp.dims("B E J P R S")


def multiply(rows: Any, wide: Any, pairs: Any, first: Any, last: Any, p: Any, r: Any, y: Any) -> None:
    """Rows first .. last - 1 of the activations by what was widened of an expert. pairs: of columns."""
    for m, l in tiles(span(first, last), ROWS):
        y[m, p, r, l] = product(rows, wide, pairs, p, m, l)


def multiply_gated(
    rows: Any, gate: Any, up: Any, pairs: Any, first: Any, last: Any, p: Any, r: Any, y: Any,
) -> None:
    """The same by two matrices, joined by silu."""
    for m, l in tiles(span(first, last), ROWS):
        y[m, p, r, l] = gated(rows, gate, up, pairs, p, m, l).to(bf16)


@cache
def rounded_experts(form: Form) -> SimpleNamespace:
    """The kernels of a form of blocks."""
    halves, words, scale_rows, size = form.halves, form.words, form.scales, form.block
    pairs = size // 2

    @sp.kernel(name=f"grouped_rounded_{form.name}")
    def grouped_rounded(
        x: Tensor[bf16, J, B, size], first: Tensor[i32, E], last: Tensor[i32, E],
        quants: Tensor[u8, E, P, R, TOGETHER, B, words, PANEL, SLOT],
        scales: Tensor[f16, E, P, R, TOGETHER, B, scale_rows, PANEL],
        near: Tensor[bf16, P, B, pairs, ROWS, 2], y: Tensor[f32, J, P, R, ROWS],
    ):
        joined = quants.view(E * P * R * TOGETHER, B, words, PANEL, dtype=i32)
        factors = scales.view(E * P * R * TOGETHER, B, scale_rows, PANEL)
        slots = near.view(P, B, halves, words, 2, TOGETHER, PANEL, dtype=i32)
        rows, wide = x.view(J, B * pairs, 2), near.view(P, B * pairs, ROWS, 2)
        for p in each(P, disjoint=True):
            for e in range(E):
                if last[e] > first[e]:
                    for r in range(R):
                        panel = ((e * P + p) * R + r) * TOGETHER
                        for b, j in tiles(B, TOGETHER):
                            put_pairs(form, joined, factors, panel + j, slots, p, b, j)
                        multiply(rows, wide, B * pairs, first[e], last[e], p, r, y)

    @sp.kernel(name=f"grouped_swiglu_rounded_{form.name}")
    def grouped_swiglu_rounded(
        x: Tensor[bf16, J, B, size], first: Tensor[i32, E], last: Tensor[i32, E],
        gate: Tensor[u8, E, P, R, TOGETHER, B, words, PANEL, SLOT],
        gate_scales: Tensor[f16, E, P, R, TOGETHER, B, scale_rows, PANEL],
        up: Tensor[u8, E, P, R, TOGETHER, B, words, PANEL, SLOT],
        up_scales: Tensor[f16, E, P, R, TOGETHER, B, scale_rows, PANEL],
        near_gate: Tensor[bf16, P, B, pairs, ROWS, 2], near_up: Tensor[bf16, P, B, pairs, ROWS, 2],
        y: Tensor[bf16, J, P, R, ROWS],
    ):
        gates = gate.view(E * P * R * TOGETHER, B, words, PANEL, dtype=i32)
        ups = up.view(E * P * R * TOGETHER, B, words, PANEL, dtype=i32)
        gate_factors = gate_scales.view(E * P * R * TOGETHER, B, scale_rows, PANEL)
        up_factors = up_scales.view(E * P * R * TOGETHER, B, scale_rows, PANEL)
        gate_slots = near_gate.view(P, B, halves, words, 2, TOGETHER, PANEL, dtype=i32)
        up_slots = near_up.view(P, B, halves, words, 2, TOGETHER, PANEL, dtype=i32)
        rows = x.view(J, B * pairs, 2)
        wide_gate, wide_up = near_gate.view(P, B * pairs, ROWS, 2), near_up.view(P, B * pairs, ROWS, 2)
        for p in each(P, disjoint=True):
            for e in range(E):
                if last[e] > first[e]:
                    for r in range(R):
                        panel = ((e * P + p) * R + r) * TOGETHER
                        for b, j in tiles(B, TOGETHER):
                            put_pairs(form, gates, gate_factors, panel + j, gate_slots, p, b, j)
                            put_pairs(form, ups, up_factors, panel + j, up_slots, p, b, j)
                        multiply_gated(rows, wide_gate, wide_up, B * pairs, first[e], last[e], p, r, y)

    return SimpleNamespace(grouped_rounded=grouped_rounded, grouped_swiglu_rounded=grouped_swiglu_rounded)


@cache
def rounded_k_experts(form: str) -> SimpleNamespace:
    """The kernels of a form of super blocks."""
    words, scale_type, made, pairs = WORDS[form], SCALE_TYPES[form], kernels_of(form), SUPER // 2
    put, blocks, size_bytes = made.put_pairs, made.pair_blocks, words * PANEL * SLOT

    @sp.kernel(name=f"grouped_rounded_{form}")
    def grouped_rounded(
        x: Tensor[bf16, J, S, SUPER], first: Tensor[i32, E], last: Tensor[i32, E],
        w: Tensor[u8, E, P, R, TOGETHER, S, words, PANEL, SLOT], near: Tensor[bf16, P, S, pairs, ROWS, 2],
        y: Tensor[f32, J, P, R, ROWS],
    ):
        joined = w.view(E * P * R * TOGETHER, S, words, PANEL, dtype=i32)
        parts = w.view(E * P * R * TOGETHER, S, size_bytes, dtype=scale_type)
        factor = w.view(E * P * R * TOGETHER, S, size_bytes // 2, dtype=f16)
        slots = near.view(P, S, *blocks, TOGETHER, PANEL, dtype=i32)
        rows, wide = x.view(J, S * pairs, 2), near.view(P, S * pairs, ROWS, 2)
        for p in each(P, disjoint=True):
            for e in range(E):
                if last[e] > first[e]:
                    for r in range(R):
                        panel = ((e * P + p) * R + r) * TOGETHER
                        for s, j in tiles(S, TOGETHER):
                            put(joined, parts, factor, panel + j, slots, p, s, j)
                        multiply(rows, wide, S * pairs, first[e], last[e], p, r, y)

    @sp.kernel(name=f"grouped_swiglu_rounded_{form}")
    def grouped_swiglu_rounded(
        x: Tensor[bf16, J, S, SUPER], first: Tensor[i32, E], last: Tensor[i32, E],
        gate: Tensor[u8, E, P, R, TOGETHER, S, words, PANEL, SLOT],
        up: Tensor[u8, E, P, R, TOGETHER, S, words, PANEL, SLOT],
        near_gate: Tensor[bf16, P, S, pairs, ROWS, 2], near_up: Tensor[bf16, P, S, pairs, ROWS, 2],
        y: Tensor[bf16, J, P, R, ROWS],
    ):
        gates = gate.view(E * P * R * TOGETHER, S, words, PANEL, dtype=i32)
        ups = up.view(E * P * R * TOGETHER, S, words, PANEL, dtype=i32)
        gate_parts = gate.view(E * P * R * TOGETHER, S, size_bytes, dtype=scale_type)
        up_parts = up.view(E * P * R * TOGETHER, S, size_bytes, dtype=scale_type)
        gate_factor = gate.view(E * P * R * TOGETHER, S, size_bytes // 2, dtype=f16)
        up_factor = up.view(E * P * R * TOGETHER, S, size_bytes // 2, dtype=f16)
        gate_slots = near_gate.view(P, S, *blocks, TOGETHER, PANEL, dtype=i32)
        up_slots = near_up.view(P, S, *blocks, TOGETHER, PANEL, dtype=i32)
        rows = x.view(J, S * pairs, 2)
        wide_gate, wide_up = near_gate.view(P, S * pairs, ROWS, 2), near_up.view(P, S * pairs, ROWS, 2)
        for p in each(P, disjoint=True):
            for e in range(E):
                if last[e] > first[e]:
                    for r in range(R):
                        panel = ((e * P + p) * R + r) * TOGETHER
                        for s, j in tiles(S, TOGETHER):
                            put(gates, gate_parts, gate_factor, panel + j, gate_slots, p, s, j)
                            put(ups, up_parts, up_factor, panel + j, up_slots, p, s, j)
                        multiply_gated(rows, wide_gate, wide_up, S * pairs, first[e], last[e], p, r, y)

    return SimpleNamespace(grouped_rounded=grouped_rounded, grouped_swiglu_rounded=grouped_swiglu_rounded)


# ------------------------------------------------------------------------------------------- references and arguments


def reference(arguments: Arguments, form: Source) -> dict[str, Array]:
    y = arguments["y"].astype(np.float64)
    x = arguments["x"].astype(np.float64).reshape(len(y), -1)
    matrices = [rounded_rows(arguments, form, name, 4).reshape(len(arguments["first"]), -1, x.shape[1])
                for name in ("quants", "w", "gate", "up") if name in arguments]
    for e, (first, last) in enumerate(zip(arguments["first"], arguments["last"], strict=True)):
        made = [x[first:last] @ one[e].T for one in matrices]
        rows = made[0] if len(made) == 1 else silu_reference(made[0]) * made[1]
        y[first:last] = rows.reshape(last - first, *y.shape[1:])
    return {"y": y}


def make_arguments(random: "np.random.Generator", shape: Shape, form: Source, swiglu: bool) -> Arguments:
    """Experts of uneven load: every third has no rows."""
    e, p, r, j = (shape[name] for name in "EPRJ")
    depth, size = (shape["B"], form.block) if isinstance(form, Form) else (shape["S"], SUPER)
    counts = np.bincount(random.choice([n for n in range(e) if n % 3 != 1], j), minlength=e)
    last = np.cumsum(counts).astype(np.int32)
    made: Arguments = {"x": normal(random, j, depth, size, dtype="bf16"), "first": (last - counts).astype(np.int32),
                       "last": last}
    names = ("gate", "up") if swiglu else ("",)
    for name in names:
        if isinstance(form, Form):
            parts = random_blocks(random, form, e * p * r * TOGETHER, (depth,), name)
        else:
            parts = {name or "w": random_panels(random, form, e * p * r * TOGETHER, depth)}
        made |= {key: part.reshape(e, p, r, TOGETHER, *part.shape[1:]) for key, part in parts.items()}
    room = {f"near_{name}" if name else "near": unwritten(p, depth, size // 2, ROWS, 2, dtype="bf16") for name in names}
    return made | room | {"y": unwritten(j, p, r, ROWS, dtype="bf16" if swiglu else "f32")}


def _entry(kernel: Any, form: Source, swiglu: bool) -> LibraryKernel:
    if isinstance(form, Form):
        depth, size, block_bytes, dtype = "B", form.block, form.block_bytes, form.name
    else:
        depth, size, block_bytes, dtype = "S", SUPER, BLOCK_BYTES[form], form
    count, e, p, r, columns, j = 2 if swiglu else 1, 18, 8, 3, 1024, 512 * 6
    n = p * r * ROWS
    weights, near = e * n * columns // size * block_bytes, 2 * p * ROWS * columns
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=lambda arguments: reference(arguments, form),
        make_arguments=lambda random, shape: make_arguments(random, shape, form, swiglu),
        tolerance=rounded_to_bf16(TOLERANCE) if swiglu else TOLERANCE,
        cases=(Case({"E": e, "P": p, "R": r, depth: columns // size, "J": j}, flops=2 * count * j * n * columns,
                    bytes=count * (weights + near) + j * (2 * columns + (2 if swiglu else 4) * n) + 8 * e),),
        check_shapes=({"E": 1, "P": 1, "R": 1, depth: 1, "J": 1}, {"E": 4, "P": 2, "R": 1, depth: 2, "J": 7},
                      {"E": 3, "P": 1, "R": 2, depth: 1, "J": 33}),
        dtype=dtype, products="bf16",
    )


_FORMS = {FORMS[name]: rounded_experts(FORMS[name]) for name in ("q4", "q8", "q4m_128")}
_K_FORMS = {form: rounded_k_experts(form) for form in ("q4k", "q5k", "q6k")}
KERNELS = tuple(_entry(kernel, form, task == "grouped_swiglu_rounded")
                for made in (_FORMS, _K_FORMS) for form, kernels in made.items()
                for task, kernel in vars(kernels).items() if form != "q5k" or task == "grouped_rounded")
