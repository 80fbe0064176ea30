"""A mixture of experts with weights in blocks of 32 (sapper/kernels/quantized.py), used as they are.

The panels of all E experts lie together: quants [E, P, B, W, 16, 4], scales [E, P, B, S, 16].

    expert_matmul_swiglu    y[k] = silu(gate[e] @ x) * (up[e] @ x), e = experts[k]: of one token, the experts it takes
    expert_matmul           y = residual + sum over k of weights[k] * (w[e] @ x[k])
    grouped_swiglu          y[m] = silu(gate[e] @ x[m]) * (up[e] @ x[m]) for the rows m of each expert e (moe.py)
    grouped                 y[m] = w[e] @ x[m]

x is quantised, as quantize_blocks makes it; expert_matvec_swiglu and expert_matvec are the first two with x in f32.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, each, f16, f32, i8, i32, span, tiles, u8, whole, zeros

from .activation import silu, silu_reference
from .quantized import (
    BLOCK,
    BLOCK_BYTES,
    FORMS,
    HALVES,
    PANEL,
    SCALES,
    SLOT,
    TOLERANCE,
    activations,
    matrix,
    random_activations,
    random_blocks,
)
from .record import Arguments, Array, Case, LibraryKernel, Shape, normal, unwritten

E, K, P, B, C, J = sp.dims("E K P B C J")


def make_kernels(form: str) -> SimpleNamespace:
    """The kernels of one form of weights; see above."""
    halves, scale_rows = HALVES[form], SCALES[form]
    words = BLOCK // (SLOT * halves)
    block_sum, exact_sum = FORMS[form].block_sum, FORMS[form].exact_sum

    @sp.kernel(name=f"expert_matmul_swiglu_{form}")
    def expert_matmul_swiglu(
        gate: Tensor[u8, E, P, B, words, PANEL, SLOT], gate_scales: Tensor[f16, E, P, B, scale_rows, PANEL],
        up: Tensor[u8, E, P, B, words, PANEL, SLOT], up_scales: Tensor[f16, E, P, B, scale_rows, PANEL],
        experts: Tensor[i32, K], x: Tensor[i8, B, 1, BLOCK], x_scales: Tensor[f32, B, 2, 1], starts: Tensor[i32, B, 1],
        y: Tensor[f32, K, P, PANEL],
    ):
        gates, ups = gate.view(E * P, B, words, PANEL, SLOT), up.view(E * P, B, words, PANEL, SLOT)
        gate_rows = gate_scales.view(E * P, B, scale_rows, PANEL)
        up_rows = up_scales.view(E * P, B, scale_rows, PANEL)
        parts = x.view(B, 1, halves, words, SLOT)
        for k in each(K):
            e = experts[k]
            for p in tiles(P):
                l = whole(PANEL)
                gate_sum = zeros(p, l, dtype=f32)
                up_sum = zeros(p, l, dtype=f32)
                for b in each(B):
                    gate_sum += block_sum(gates, gate_rows, parts, x_scales, starts, e * P + p, b, 0, l)
                    up_sum += block_sum(ups, up_rows, parts, x_scales, starts, e * P + p, b, 0, l)
                y[k, p, l] = silu(gate_sum) * up_sum

    @sp.kernel(name=f"expert_matmul_{form}")
    def expert_matmul(
        quants: Tensor[u8, E, P, B, words, PANEL, SLOT], scales: Tensor[f16, E, P, B, scale_rows, PANEL],
        experts: Tensor[i32, K], weights: Tensor[f32, K], x: Tensor[i8, B, K, BLOCK], x_scales: Tensor[f32, B, 2, K],
        starts: Tensor[i32, B, K], residual: Tensor[f32, P, PANEL], y: Tensor[f32, P, PANEL],
    ):
        together, rows = quants.view(E * P, B, words, PANEL, SLOT), scales.view(E * P, B, scale_rows, PANEL)
        parts = x.view(B, K, halves, words, SLOT)
        for p in tiles(P):
            l = whole(PANEL)
            total = residual[p, l]
            for k in each(K):
                e = experts[k]
                acc = zeros(p, l, dtype=f32)
                for b in each(B):
                    acc += block_sum(together, rows, parts, x_scales, starts, e * P + p, b, k, l)
                total += weights[k] * acc
            y[p, l] = total

    @sp.kernel(name=f"grouped_swiglu_{form}")
    def grouped_swiglu(
        x: Tensor[i8, B, C, BLOCK], x_scales: Tensor[f32, B, 2, C], starts: Tensor[i32, B, C], first: Tensor[i32, E],
        last: Tensor[i32, E], gate: Tensor[u8, E, P, B, words, PANEL, SLOT],
        gate_scales: Tensor[f16, E, P, B, scale_rows, PANEL], up: Tensor[u8, E, P, B, words, PANEL, SLOT],
        up_scales: Tensor[f16, E, P, B, scale_rows, PANEL], y: Tensor[f32, J, P, PANEL],
    ):
        gates, ups = gate.view(E * P, B, words, PANEL, SLOT), up.view(E * P, B, words, PANEL, SLOT)
        gate_rows = gate_scales.view(E * P, B, scale_rows, PANEL)
        up_rows = up_scales.view(E * P, B, scale_rows, PANEL)
        parts, factors, begin = x.view(B, C, halves, words, SLOT), x_scales.view(B, 2, C), starts.view(B, C)
        for p in each(P):
            for e in each(E):
                for m in tiles(span(first[e], last[e])):
                    l = whole(PANEL)
                    gate_sum = zeros(m, l, dtype=f32)
                    up_sum = zeros(m, l, dtype=f32)
                    for b in each(B):
                        gate_sum += block_sum(gates, gate_rows, parts, factors, begin, e * P + p, b, m, l)
                        up_sum += block_sum(ups, up_rows, parts, factors, begin, e * P + p, b, m, l)
                    y[m, p, l] = silu(gate_sum) * up_sum

    @sp.kernel(name=f"grouped_{form}")
    def grouped(
        x: Tensor[i8, B, C, BLOCK], x_scales: Tensor[f32, B, 2, C], starts: Tensor[i32, B, C], first: Tensor[i32, E],
        last: Tensor[i32, E], quants: Tensor[u8, E, P, B, words, PANEL, SLOT],
        scales: Tensor[f16, E, P, B, scale_rows, PANEL], y: Tensor[f32, J, P, PANEL],
    ):
        together, rows = quants.view(E * P, B, words, PANEL, SLOT), scales.view(E * P, B, scale_rows, PANEL)
        parts, factors, begin = x.view(B, C, halves, words, SLOT), x_scales.view(B, 2, C), starts.view(B, C)
        for p in each(P):
            for e in each(E):
                for m in tiles(span(first[e], last[e])):
                    l = whole(PANEL)
                    acc = zeros(m, l, dtype=f32)
                    for b in each(B):
                        acc += block_sum(together, rows, parts, factors, begin, e * P + p, b, m, l)
                    y[m, p, l] = acc

    @sp.kernel(name=f"expert_matvec_swiglu_{form}")
    def expert_matvec_swiglu(
        gate: Tensor[u8, E, P, B, words, PANEL, SLOT], gate_scales: Tensor[f16, E, P, B, scale_rows, PANEL],
        up: Tensor[u8, E, P, B, words, PANEL, SLOT], up_scales: Tensor[f16, E, P, B, scale_rows, PANEL],
        experts: Tensor[i32, K], x: Tensor[f32, B, BLOCK], y: Tensor[f32, K, P, PANEL],
    ):
        gates, ups = gate.view(E * P, B, words, PANEL, dtype=i32), up.view(E * P, B, words, PANEL, dtype=i32)
        gate_rows = gate_scales.view(E * P, B, scale_rows, PANEL)
        up_rows = up_scales.view(E * P, B, scale_rows, PANEL)
        parts = x.view(B, halves, words, SLOT)
        for k in each(K):
            e = experts[k]
            for p in tiles(P):
                l = whole(PANEL)
                gate_sum = zeros(p, l, dtype=f32)
                up_sum = zeros(p, l, dtype=f32)
                for b in each(B):
                    gate_sum += exact_sum(gates, gate_rows, parts, e * P + p, b, l, b)
                    up_sum += exact_sum(ups, up_rows, parts, e * P + p, b, l, b)
                y[k, p, l] = silu(gate_sum) * up_sum

    @sp.kernel(name=f"expert_matvec_{form}")
    def expert_matvec(
        quants: Tensor[u8, E, P, B, words, PANEL, SLOT], scales: Tensor[f16, E, P, B, scale_rows, PANEL],
        experts: Tensor[i32, K], weights: Tensor[f32, K], x: Tensor[f32, K, B, BLOCK], residual: Tensor[f32, P, PANEL],
        y: Tensor[f32, P, PANEL],
    ):
        together, rows = quants.view(E * P, B, words, PANEL, dtype=i32), scales.view(E * P, B, scale_rows, PANEL)
        parts = x.view(K * B, halves, words, SLOT)
        for p in tiles(P):
            l = whole(PANEL)
            total = residual[p, l]
            for k in each(K):
                e = experts[k]
                acc = zeros(p, l, dtype=f32)
                for b in each(B):
                    acc += exact_sum(together, rows, parts, e * P + p, b, l, k * B + b)
                total += weights[k] * acc
            y[p, l] = total

    return SimpleNamespace(
        expert_matmul_swiglu=expert_matmul_swiglu, expert_matmul=expert_matmul, grouped_swiglu=grouped_swiglu,
        grouped=grouped, expert_matvec_swiglu=expert_matvec_swiglu, expert_matvec=expert_matvec,
    )


EXPERTS = {form: make_kernels(form) for form in HALVES}
"""The kernels of each form, by name."""


# ------------------------------------------------------------------------------------------- references and arguments


def _matrices(arguments: Arguments, name: str) -> Array:
    """The matrices [E, N, K] of panels, in float64."""
    quants, scales = arguments[name], arguments["scales" if name == "quants" else f"{name}_scales"]
    wide: Array = matrix(*(part.reshape(-1, *part.shape[2:]) for part in (quants, scales)))
    return wide.reshape(len(quants), -1, wide.shape[1])


def swiglu_reference(arguments: Arguments) -> dict[str, Array]:
    x = activations(arguments)[0]
    gate, up = (_matrices(arguments, name)[arguments["experts"]] for name in ("gate", "up"))
    return {"y": (silu_reference(gate @ x) * (up @ x)).reshape(arguments["y"].shape)}


def weighted_reference(arguments: Arguments) -> dict[str, Array]:
    exact = arguments["x"].dtype == np.float32
    x = arguments["x"].astype(np.float64).reshape(len(arguments["x"]), -1) if exact else activations(arguments)
    w = _matrices(arguments, "quants")[arguments["experts"]]
    found = np.einsum("k,knj,kj->n", arguments["weights"].astype(np.float64), w, x)
    return {"y": arguments["residual"] + found.reshape(arguments["y"].shape)}


def grouped_reference(arguments: Arguments) -> dict[str, Array]:
    y = arguments["y"].astype(np.float64)
    x = activations(arguments)
    for e, (first, last) in enumerate(zip(arguments["first"], arguments["last"], strict=True)):
        names = [name for name in ("quants", "gate", "up") if name in arguments]
        made = [x[first:last] @ _matrices(arguments, name)[e].T for name in names]
        rows = made[0] if len(made) == 1 else silu_reference(made[0]) * made[1]
        y[first:last] = rows.reshape(last - first, *y.shape[1:])
    return {"y": y}


def make_arguments(random: np.random.Generator, shape: Shape, form: str, task: str) -> Arguments:
    e, p, b = shape["E"], shape["P"], shape["B"]
    swiglu = task.endswith("swiglu")
    weights: Arguments = {}
    for prefix in ("gate", "up") if swiglu else ("",):
        panels = random_blocks(random, form, e * p, b, prefix)
        weights |= {name: part.reshape(e, p, *part.shape[1:]) for name, part in panels.items()}
    if task.startswith("grouped"):
        j = shape["J"]
        cuts = np.sort(random.integers(0, j + 1, e - 1)).astype(np.int32)
        ranges = {"first": np.concatenate([[0], cuts]).astype(np.int32), "last": np.append(cuts, j).astype(np.int32)}
        rows = random_activations(random, b, j, shape["C"] - j)
        return rows | ranges | weights | {"y": unwritten(j, p, PANEL)}
    k = shape["K"]
    arguments: Arguments = weights | {"experts": random.permutation(e)[:k].astype(np.int32)}
    if not swiglu:
        arguments["weights"] = random.random(k, np.float32)
    if "matmul" in task:
        arguments |= random_activations(random, b, 1 if swiglu else k)
    else:
        arguments["x"] = normal(random, *(() if swiglu else (k,)), b, BLOCK)
    if swiglu:
        return arguments | {"y": unwritten(k, p, PANEL)}
    return arguments | {"residual": normal(random, p, PANEL), "y": unwritten(p, PANEL)}


def _entry(kernel: Any, form: str, task: str) -> LibraryKernel:
    swiglu, grouped = task.endswith("swiglu"), task.startswith("grouped")
    count = 2 if swiglu else 1
    e, k, p, b = (18, 6, 48, 32) if swiglu else (18, 6, 64, 24)
    n, rows = p * PANEL, 512 * k if grouped else 1 if swiglu else k
    row_bytes = b * (BLOCK + 12) if "matvec" not in task else 4 * b * BLOCK
    weight_bytes = count * (e if grouped else k) * n * b * BLOCK_BYTES[form]
    results = 4 * n * (rows if grouped else k if swiglu else 2)
    checks: tuple[dict[str, int], ...] = (
        {"E": 1, "K": 1, "P": 1, "B": 1}, {"E": 4, "K": 2, "P": 3, "B": 2}, {"E": 5, "K": 3, "P": 2, "B": 3})
    shape = {"E": e, "K": k, "P": p, "B": b}
    if grouped:
        checks = ({"E": 1, "P": 1, "B": 1, "C": 1, "J": 1}, {"E": 4, "P": 2, "B": 2, "C": 9, "J": 7},
                  {"E": 3, "P": 3, "B": 1, "C": 33, "J": 33})
        shape = {"E": e, "P": p, "B": b, "C": rows, "J": rows}
    references = {"expert": weighted_reference, "expert_swiglu": swiglu_reference}
    return LibraryKernel(
        name=kernel.name, kernel=kernel,
        reference=grouped_reference if grouped else references["expert_swiglu" if swiglu else "expert"],
        make_arguments=lambda random, shape: make_arguments(random, shape, form, task), tolerance=TOLERANCE,
        cases=(Case(shape, flops=2 * count * (rows if grouped else k) * n * b * BLOCK,
                    bytes=weight_bytes + rows * row_bytes + results + (8 * e if grouped else 0)),),
        check_shapes=checks, dtype=form, products="f32" if "matvec" in task else "i8",
    )


KERNELS = tuple(
    _entry(kernel, form, task) for form, kernels in EXPERTS.items() for task, kernel in vars(kernels).items())
