"""A mixture of experts with weights in Q3_K to Q6_K (sapper/kernels/k_quants.py), used as they are.

The panels of all E experts lie together: w [E, P, S, R, 16, 4]. x is quantised, as quantize_super makes it.

    expert_matmul_swiglu, expert_matmul, grouped_swiglu, grouped     as in moe_blocks.py
"""

import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, each, f16, f32, i8, i32, span, tiles, u8, whole, zeros

from .activation import silu, silu_reference
from .k_quants import (
    BLOCK_BYTES,
    PANEL,
    SCALE_TYPES,
    SIXTEEN,
    SLOT,
    SUM,
    SUPER,
    WORDS,
    activations,
    kernels_of,
    random_activations,
    random_panels,
    rows_of,
)
from .moe import add_products
from .moe_blocks import panel_blocks
from .record import Arguments, Array, Case, LibraryKernel, Shape, unwritten

C, E, J, K, N, P, S, T = sp.dims("C E J K N P S T")


@cache
def experts_of(form: str) -> SimpleNamespace:
    """The kernels of a form."""
    words, scale_type, product = WORDS[form], SCALE_TYPES[form], kernels_of(form)
    super_sum, blocks, size_bytes = product.super_sum, product.blocks, words * PANEL * SLOT

    @sp.kernel(name=f"expert_matmul_swiglu_{form}")
    def expert_matmul_swiglu(
        gate: Tensor[u8, E, P, S, words, PANEL, SLOT], up: Tensor[u8, E, P, S, words, PANEL, SLOT],
        experts: Tensor[i32, K], x: Tensor[i8, S, 1, SUPER], x_scales: Tensor[f32, S, 1],
        digits: Tensor[i8, S, 1, SIXTEEN], starts: Tensor[i32, S, SIXTEEN, 1], y: Tensor[f32, K, P, PANEL],
    ):
        gates, ups = gate.view(E * P, S, words, PANEL, SLOT), up.view(E * P, S, words, PANEL, SLOT)
        gate_parts = gate.view(E * P, S, size_bytes, dtype=scale_type)
        up_parts = up.view(E * P, S, size_bytes, dtype=scale_type)
        gate_factor = gate.view(E * P, S, size_bytes // 2, dtype=f16)
        up_factor = up.view(E * P, S, size_bytes // 2, dtype=f16)
        q, digit = x.view(S, 1, *blocks), digits.view(S, 1, 2, 2, SLOT)
        for k in each(K):
            e = experts[k]
            for p in tiles(P):
                l = whole(PANEL)
                gate_sum = zeros(p, l, dtype=f32)
                up_sum = zeros(p, l, dtype=f32)
                for s in each(S):
                    gate_sum += super_sum(zeros(p, l, dtype=i32), gates, gate_parts, gate_factor, q, x_scales, digit,
                                          starts, e * P + p, s, 0, l)
                    up_sum += super_sum(zeros(p, l, dtype=i32), ups, up_parts, up_factor, q, x_scales, digit,
                                        starts, e * P + p, s, 0, l)
                y[k, p, l] = silu(gate_sum) * up_sum

    @sp.kernel(name=f"expert_matmul_{form}")
    def expert_matmul(
        w: Tensor[u8, E, P, S, words, PANEL, SLOT], experts: Tensor[i32, K], weights: Tensor[f32, K],
        x: Tensor[i8, S, K, SUPER], x_scales: Tensor[f32, S, K], digits: Tensor[i8, S, K, SIXTEEN],
        starts: Tensor[i32, S, SIXTEEN, K], residual: Tensor[f32, P, PANEL], products: Tensor[f32, K, P, PANEL],
        y: Tensor[f32, P, PANEL],
    ):
        together, parts = w.view(E * P, S, words, PANEL, SLOT), w.view(E * P, S, size_bytes, dtype=scale_type)
        factor = w.view(E * P, S, size_bytes // 2, dtype=f16)
        q, digit = x.view(S, K, *blocks), digits.view(S, K, 2, 2, SLOT)
        for k in each(K):  # as in moe_blocks.py
            e = experts[k]
            for p in tiles(P):
                l = whole(PANEL)
                acc = zeros(p, l, dtype=f32)
                for s in each(S):
                    acc += super_sum(zeros(p, l, dtype=i32), together, parts, factor, q, x_scales, digit, starts,
                                     e * P + p, s, k, l)
                products[k, p, l] = acc
        for p in tiles(P):
            l = whole(PANEL)
            add_products(weights, products, residual, y, p, l)

    @sp.kernel(name=f"grouped_swiglu_{form}")
    def grouped_swiglu(
        x: Tensor[i8, S, C, SUPER], x_scales: Tensor[f32, S, C], digits: Tensor[i8, S, C, SIXTEEN],
        starts: Tensor[i32, S, SIXTEEN, C], first: Tensor[i32, E], last: Tensor[i32, E],
        gate: Tensor[u8, E, N, T, S, words, PANEL, SLOT], up: Tensor[u8, E, N, T, S, words, PANEL, SLOT],
        y: Tensor[f32, J, N, T, PANEL],
    ):
        gates, ups = gate.view(E * N * T, S, words, PANEL, SLOT), up.view(E * N * T, S, words, PANEL, SLOT)
        gate_parts = gate.view(E * N * T, S, size_bytes, dtype=scale_type)
        up_parts = up.view(E * N * T, S, size_bytes, dtype=scale_type)
        gate_factor = gate.view(E * N * T, S, size_bytes // 2, dtype=f16)
        up_factor = up.view(E * N * T, S, size_bytes // 2, dtype=f16)
        q, digit = x.view(S, C, *blocks), digits.view(S, C, 2, 2, SLOT)
        scales, begin = x_scales.view(S, C), starts.view(S, SIXTEEN, C)
        for n in each(N):
            for e in each(E):
                for t in each(T):
                    for m in tiles(span(first[e], last[e])):
                        l = whole(PANEL)
                        gate_sum = zeros(m, l, dtype=f32)
                        up_sum = zeros(m, l, dtype=f32)
                        for s in each(S):
                            gate_sum += super_sum(zeros(m, l, dtype=i32), gates, gate_parts, gate_factor, q, scales,
                                                  digit, begin, (e * N + n) * T + t, s, m, l)
                            up_sum += super_sum(zeros(m, l, dtype=i32), ups, up_parts, up_factor, q, scales, digit,
                                                begin, (e * N + n) * T + t, s, m, l)
                        y[m, n, t, l] = silu(gate_sum) * up_sum

    @sp.kernel(name=f"grouped_{form}")
    def grouped(
        x: Tensor[i8, S, C, SUPER], x_scales: Tensor[f32, S, C], digits: Tensor[i8, S, C, SIXTEEN],
        starts: Tensor[i32, S, SIXTEEN, C], first: Tensor[i32, E], last: Tensor[i32, E],
        w: Tensor[u8, E, N, T, S, words, PANEL, SLOT], y: Tensor[f32, J, N, T, PANEL],
    ):
        together, parts = w.view(E * N * T, S, words, PANEL, SLOT), w.view(E * N * T, S, size_bytes, dtype=scale_type)
        factor = w.view(E * N * T, S, size_bytes // 2, dtype=f16)
        q, digit = x.view(S, C, *blocks), digits.view(S, C, 2, 2, SLOT)
        scales, begin = x_scales.view(S, C), starts.view(S, SIXTEEN, C)
        for n in each(N):
            for e in each(E):
                for t, m in tiles(T, span(first[e], last[e])):
                    l = whole(PANEL)
                    acc = zeros(m, t, l, dtype=f32)
                    for s in each(S):
                        acc += super_sum(zeros(m, t, l, dtype=i32), together, parts, factor, q, scales, digit, begin,
                                         (e * N + n) * T + t, s, m, l)
                    y[m, n, t, l] = acc

    return SimpleNamespace(
        expert_matmul_swiglu=expert_matmul_swiglu, expert_matmul=expert_matmul, grouped_swiglu=grouped_swiglu,
        grouped=grouped,
    )


# ------------------------------------------------------------------------------------------- references and arguments


def _matrices(arguments: Arguments, form: str, name: str) -> Array:
    """The matrices [E, N, K] of panels, in float64."""
    w = arguments[name]
    wide = rows_of(form, w.reshape(-1, *w.shape[-4:]))
    return wide.reshape(len(w), -1, wide.shape[1])


def reference(arguments: Arguments, form: str) -> dict[str, Array]:
    y, x = arguments["y"], activations(arguments)
    names = [name for name in ("w", "gate", "up") if name in arguments]
    matrices = [_matrices(arguments, form, name) for name in names]

    def applied(rows: Array, e: int) -> Array:
        made = [rows @ one[e].T for one in matrices]
        found: Array = made[0] if len(made) == 1 else silu_reference(made[0]) * made[1]
        return found

    if "first" in arguments:
        result = y.astype(np.float64)
        for e, (first, last) in enumerate(zip(arguments["first"], arguments["last"], strict=True)):
            result[first:last] = applied(x[first:last], e).reshape(last - first, *y.shape[1:])
        return {"y": result}
    if "weights" not in arguments:
        return {"y": np.stack([applied(x[0], e) for e in arguments["experts"]]).reshape(y.shape)}
    products = np.stack([applied(x[k], e) for k, e in enumerate(arguments["experts"])])
    total = arguments["weights"].astype(np.float64) @ products
    return {"products": products.reshape(arguments["products"].shape),
            "y": arguments["residual"] + total.reshape(y.shape)}


def make_arguments(random: "np.random.Generator", shape: Shape, form: str, task: str) -> Arguments:
    swiglu, grouped = task.endswith("swiglu"), task.startswith("grouped")
    e, s, each_expert = shape["E"], shape["S"], (shape["N"], shape["T"]) if grouped else (shape["P"],)
    p = math.prod(each_expert)
    panels: Arguments = {
        name: (made := random_panels(random, form, e * p, s)).reshape(e, *each_expert, *made.shape[1:])
        for name in (("gate", "up") if swiglu else ("w",))}
    if grouped:
        j = shape["J"]
        cuts = np.sort(random.integers(0, j + 1, e - 1)).astype(np.int32)
        ranges = {"first": np.concatenate([[0], cuts]).astype(np.int32), "last": np.append(cuts, j).astype(np.int32)}
        return random_activations(random, s, j, shape["C"] - j) | ranges | panels | {
            "y": unwritten(j, *each_expert, PANEL)}
    k = shape["K"]
    arguments = panels | {"experts": random.permutation(e)[:k].astype(np.int32)}
    if swiglu:
        return arguments | random_activations(random, s, 1) | {"y": unwritten(k, p, PANEL)}
    arguments["weights"] = random.random(k, np.float32)
    residual = random.standard_normal((p, PANEL)).astype(np.float32)
    return arguments | random_activations(random, s, k) | {
        "residual": residual, "products": unwritten(k, p, PANEL), "y": unwritten(p, PANEL)}


def _entry(kernel: Any, form: str, task: str) -> LibraryKernel:
    swiglu, grouped = task.endswith("swiglu"), task.startswith("grouped")
    count, e, k, p, s = 2 if swiglu else 1, 18, 6, 48, 4
    n, rows = p * PANEL, 512 * k if grouped else 1 if swiglu else k
    weight_bytes = count * (e if grouped else k) * n * s * BLOCK_BYTES[form]
    results = 4 * n * (rows if grouped else k if swiglu else 2 + k)
    checks: tuple[dict[str, int], ...] = (
        {"E": 1, "K": 1, "P": 1, "S": 1}, {"E": 4, "K": 2, "P": 3, "S": 2}, {"E": 5, "K": 3, "P": 2, "S": 1})
    shape = {"E": e, "K": k, "P": p, "S": s}
    if grouped:
        checks = ({"E": 1, "N": 1, "T": 1, "S": 1, "C": 1, "J": 1}, {"E": 4, "N": 2, "T": 2, "S": 2, "C": 9, "J": 7},
                  {"E": 3, "N": 1, "T": 3, "S": 1, "C": 33, "J": 33})
        n_blocks, t = panel_blocks(p)
        shape = {"E": e, "N": n_blocks, "T": t, "S": s, "C": rows, "J": rows}
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=lambda arguments: reference(arguments, form),
        make_arguments=lambda random, shape: make_arguments(random, shape, form, task), tolerance=SUM,
        cases=(Case(shape, flops=2 * count * (rows if grouped else k) * n * s * SUPER,
                    bytes=weight_bytes + rows * s * (SUPER + 84) + results + (8 * e if grouped else 0)),),
        check_shapes=checks, dtype=form, products="i8",
    )


LISTED = {"q3k": ("expert_matmul", "grouped_swiglu"), "q5k": ("expert_matmul_swiglu", "grouped")}
"""Of forms that are not all in the library, those that are."""
KERNELS = tuple(_entry(kernel, form, task) for form in WORDS for task, kernel in vars(experts_of(form)).items()
                if task in LISTED.get(form, task))
