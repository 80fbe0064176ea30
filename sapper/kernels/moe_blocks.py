"""A mixture of experts with weights in blocks (sapper/kernels/quantized.py), used as they are.

The panels of all E experts lie together: quants [E, P, B, W, 16, 4], scales [E, P, B, S, 16]; where activations are
quantised, B is [G, D], groups of them and blocks of a group.

    expert_matmul_swiglu    y[k] = silu(gate[e] @ x) * (up[e] @ x), e = experts[k]: of one token, the experts it takes
    expert_matmul           y = residual + sum over k of weights[k] * (w[e] @ x[k])
    grouped_swiglu          y[m] = silu(gate[e] @ x[m]) * (up[e] @ x[m]) for the rows m of each expert e (moe.py)
    grouped                 y[m] = w[e] @ x[m]

x is quantised, as quantize_groups makes it. What many rows meet is viewed as [E, N, T, ...], N blocks of T panels
(`panel_blocks`): a core walks the experts once for each block, so that an expert's rows come from the second cache for
all panels of it but the first. Two experts' rows lie too far apart for the processor to ask for them by itself, and all
of them may take more than the last cache: of 64 experts of 1408 x 2048, 48 rows each, gate and up take 67.0 ms by
blocks of 4 panels and 57.9 by 44, one for each of two cores of a Zen 4, in Q4_K 72.5 and 58.0. expert_matvec_swiglu and
expert_matvec are the first two with x in f32.
"""

import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, each, f16, f32, i8, i32, span, tiles, u8, whole, zeros

from .activation import silu, silu_reference
from .moe import add_products
from .quantized import (
    FORMS,
    LISTED,
    PANEL,
    SLOT,
    TOLERANCE,
    Form,
    activations,
    exact_kernels,
    kernel_suffix,
    matrix,
    product_kernels,
    random_activations,
    random_blocks,
    rows_apart,
)
from .record import Arguments, Array, Case, LibraryKernel, Shape, normal, unwritten

E, K, P, B, C, G, J, N, T = sp.dims("E K P B C G J N T")
LARGEST_BLOCK, FEWEST_BLOCKS = 8, 12
"""Panels of a block, a power of two; and blocks that are to be left for the workers to share, where nobody knows how
many these are."""
UNEVEN = 1.1
"""By how much the worker with the most panels may have more than the mean."""


def panel_blocks(panels: int, workers: int | None = None) -> tuple[int, int]:
    """N and T for so many panels of an expert: the fewest blocks that the workers can share."""
    if workers is not None:
        counts = (n for n in range(1, panels + 1) if panels % n == 0)
        count = next((n for n in counts if -(-n // workers) * workers <= UNEVEN * n), panels)
        return count, panels // count
    size = LARGEST_BLOCK
    while size > 1 and (panels % size or panels // size < FEWEST_BLOCKS):
        size //= 2
    return panels // size, size


@cache
def product_experts(form: Form, group: int) -> SimpleNamespace:
    """The kernels with quantised activations, `group` of which share a scale."""
    halves, scale_rows, words, parts = form.halves, form.scales, form.words, group // form.block
    product, suffix = product_kernels(form, group), kernel_suffix(form, group)
    group_sum, two_group_sums = product.group_sum, product.two_group_sums

    @sp.kernel(name=f"expert_matmul_swiglu_{suffix}")
    def expert_matmul_swiglu(
        gate: Tensor[u8, E, P, G, parts, words, PANEL, SLOT],
        gate_scales: Tensor[f16, E, P, G, parts, scale_rows, PANEL], up: Tensor[u8, E, P, G, parts, words, PANEL, SLOT],
        up_scales: Tensor[f16, E, P, G, parts, scale_rows, PANEL],
        experts: Tensor[i32, K], x: Tensor[i8, G, 1, group], x_scales: Tensor[f32, G, 1],
        sums: Tensor[f32, G, parts, 1], starts: Tensor[i32, G, parts, 1], y: Tensor[f32, K, P, PANEL],
    ):
        gates, ups = gate.view(E * P, G, parts, words, PANEL, SLOT), up.view(E * P, G, parts, words, PANEL, SLOT)
        gate_rows = gate_scales.view(E * P, G, parts, scale_rows, PANEL)
        up_rows = up_scales.view(E * P, G, parts, scale_rows, PANEL)
        q = x.view(G, 1, parts, halves, words, SLOT)
        for k in each(K):
            e = experts[k]
            for p in tiles(P):
                l = whole(PANEL)
                gate_sum = zeros(p, l, dtype=f32)
                up_sum = zeros(p, l, dtype=f32)
                for g in each(G):
                    gate_sum += group_sum(
                        zeros(p, l, dtype=f32), gates, gate_rows, q, x_scales, sums, starts, e * P + p, g, 0, l)
                    up_sum += group_sum(
                        zeros(p, l, dtype=f32), ups, up_rows, q, x_scales, sums, starts, e * P + p, g, 0, l)
                y[k, p, l] = silu(gate_sum) * up_sum

    @sp.kernel(name=f"expert_matmul_{suffix}")
    def expert_matmul(
        quants: Tensor[u8, E, P, G, parts, words, PANEL, SLOT], scales: Tensor[f16, E, P, G, parts, scale_rows, PANEL],
        experts: Tensor[i32, K], weights: Tensor[f32, K], x: Tensor[i8, G, K, group], x_scales: Tensor[f32, G, K],
        sums: Tensor[f32, G, parts, K], starts: Tensor[i32, G, parts, K], residual: Tensor[f32, P, PANEL],
        products: Tensor[f32, K, P, PANEL], y: Tensor[f32, P, PANEL],
    ):
        # An expert's panels are read in one go, and not a panel of each expert by turns: a stream of a few pages is
        # over before the hardware has begun to read ahead.
        together = quants.view(E * P, G, parts, words, PANEL, SLOT)
        rows = scales.view(E * P, G, parts, scale_rows, PANEL)
        q = x.view(G, K, parts, halves, words, SLOT)
        for k in each(K):
            e = experts[k]
            for p in tiles(P):
                l = whole(PANEL)
                acc = zeros(p, l, dtype=f32)
                for g in each(G):
                    acc += group_sum(
                        zeros(p, l, dtype=f32), together, rows, q, x_scales, sums, starts, e * P + p, g, k, l)
                products[k, p, l] = acc
        for p in tiles(P):
            l = whole(PANEL)
            add_products(weights, products, residual, y, p, l)

    @sp.kernel(name=f"grouped_swiglu_{suffix}")
    def grouped_swiglu(
        x: Tensor[i8, G, C, group], x_scales: Tensor[f32, G, C], sums: Tensor[f32, G, parts, C],
        starts: Tensor[i32, G, parts, C], first: Tensor[i32, E], last: Tensor[i32, E],
        gate: Tensor[u8, E, N, T, G, parts, words, PANEL, SLOT],
        gate_scales: Tensor[f16, E, N, T, G, parts, scale_rows, PANEL],
        up: Tensor[u8, E, N, T, G, parts, words, PANEL, SLOT],
        up_scales: Tensor[f16, E, N, T, G, parts, scale_rows, PANEL],
        y: Tensor[f32, J, N, T, PANEL],
    ):
        gates = gate.view(E * N * T, G, parts, words, PANEL, SLOT)
        ups = up.view(E * N * T, G, parts, words, PANEL, SLOT)
        gate_rows = gate_scales.view(E * N * T, G, parts, scale_rows, PANEL)
        up_rows = up_scales.view(E * N * T, G, parts, scale_rows, PANEL)
        q, factors = x.view(G, C, parts, halves, words, SLOT), x_scales.view(G, C)
        totals, begin = sums.view(G, parts, C), starts.view(G, parts, C)
        for n in each(N):
            for e in each(E):
                for t in each(T):
                    for m in tiles(span(first[e], last[e])):
                        l = whole(PANEL)
                        gate_sum = zeros(m, l, dtype=f32)
                        up_sum = zeros(m, l, dtype=f32)
                        for g in each(G):
                            of_gate, of_up = two_group_sums(
                                zeros(m, l, dtype=f32), gates, gate_rows, ups, up_rows, q, factors, totals, begin,
                                (e * N + n) * T + t, g, m, l)
                            gate_sum += of_gate
                            up_sum += of_up
                        y[m, n, t, l] = silu(gate_sum) * up_sum

    @sp.kernel(name=f"grouped_{suffix}")
    def grouped(
        x: Tensor[i8, G, C, group], x_scales: Tensor[f32, G, C], sums: Tensor[f32, G, parts, C],
        starts: Tensor[i32, G, parts, C], first: Tensor[i32, E], last: Tensor[i32, E],
        quants: Tensor[u8, E, N, T, G, parts, words, PANEL, SLOT],
        scales: Tensor[f16, E, N, T, G, parts, scale_rows, PANEL], y: Tensor[f32, J, N, T, PANEL],
    ):
        together = quants.view(E * N * T, G, parts, words, PANEL, SLOT)
        rows = scales.view(E * N * T, G, parts, scale_rows, PANEL)
        q, factors = x.view(G, C, parts, halves, words, SLOT), x_scales.view(G, C)
        totals, begin = sums.view(G, parts, C), starts.view(G, parts, C)
        for n in each(N):
            for e in each(E):
                for t, m in tiles(T, span(first[e], last[e])):
                    l = whole(PANEL)
                    acc = zeros(m, t, l, dtype=f32)
                    for g in each(G):
                        acc += group_sum(
                            zeros(m, t, l, dtype=f32), together, rows, q, factors, totals, begin, (e * N + n) * T + t,
                            g, m, l)
                    y[m, n, t, l] = acc

    return SimpleNamespace(
        expert_matmul_swiglu=expert_matmul_swiglu, expert_matmul=expert_matmul, grouped_swiglu=grouped_swiglu,
        grouped=grouped,
    )


@cache
def exact_experts(form: Form) -> SimpleNamespace:
    """The kernels with plain activations."""
    halves, scale_rows, words, size = form.halves, form.scales, form.words, form.block
    exact_sum = exact_kernels(form).exact_sum

    @sp.kernel(name=f"expert_matvec_swiglu_{form.name}")
    def expert_matvec_swiglu(
        gate: Tensor[u8, E, P, B, words, PANEL, SLOT], gate_scales: Tensor[f16, E, P, B, scale_rows, PANEL],
        up: Tensor[u8, E, P, B, words, PANEL, SLOT], up_scales: Tensor[f16, E, P, B, scale_rows, PANEL],
        experts: Tensor[i32, K], x: Tensor[f32, B, size], y: Tensor[f32, K, P, PANEL],
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

    @sp.kernel(name=f"expert_matvec_{form.name}")
    def expert_matvec(
        quants: Tensor[u8, E, P, B, words, PANEL, SLOT], scales: Tensor[f16, E, P, B, scale_rows, PANEL],
        experts: Tensor[i32, K], weights: Tensor[f32, K], x: Tensor[f32, K, B, size], residual: Tensor[f32, P, PANEL],
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

    return SimpleNamespace(expert_matvec_swiglu=expert_matvec_swiglu, expert_matvec=expert_matvec)


# ------------------------------------------------------------------------------------------- references and arguments


def _matrices(arguments: Arguments, form: Form, name: str) -> Array:
    """The matrices [E, N, K] of panels, in float64."""
    quants, scales = arguments[name], arguments["scales" if name == "quants" else f"{name}_scales"]
    before = 3 if "first" in arguments else 2
    wide: Array = matrix(form, *(part.reshape(-1, *part.shape[before:]) for part in (quants, scales)))
    return wide.reshape(len(quants), -1, wide.shape[1])


def swiglu_reference(arguments: Arguments, form: Form) -> dict[str, Array]:
    x = activations(arguments)[0]
    gate, up = (_matrices(arguments, form, name)[arguments["experts"]] for name in ("gate", "up"))
    return {"y": (silu_reference(gate @ x) * (up @ x)).reshape(arguments["y"].shape)}


def weighted_reference(arguments: Arguments, form: Form) -> dict[str, Array]:
    exact = arguments["x"].dtype == np.float32
    x = arguments["x"].astype(np.float64).reshape(len(arguments["x"]), -1) if exact else activations(arguments)
    w = _matrices(arguments, form, "quants")[arguments["experts"]]
    products = np.einsum("knj,kj->kn", w, x)
    found = arguments["weights"].astype(np.float64) @ products
    expected = {"y": arguments["residual"] + found.reshape(arguments["y"].shape)}
    return expected if exact else expected | {"products": products.reshape(arguments["products"].shape)}


def grouped_reference(arguments: Arguments, form: Form) -> dict[str, Array]:
    y = arguments["y"].astype(np.float64)
    x = activations(arguments)
    for e, (first, last) in enumerate(zip(arguments["first"], arguments["last"], strict=True)):
        names = [name for name in ("quants", "gate", "up") if name in arguments]
        made = [x[first:last] @ _matrices(arguments, form, name)[e].T for name in names]
        rows = made[0] if len(made) == 1 else silu_reference(made[0]) * made[1]
        y[first:last] = rows.reshape(last - first, *y.shape[1:])
    return {"y": y}


def make_arguments(random: "np.random.Generator", shape: Shape, form: Form, group: int, task: str) -> Arguments:
    grouped = task.startswith("grouped")
    e, panels = shape["E"], (shape["N"], shape["T"]) if grouped else (shape["P"],)
    p = math.prod(panels)
    blocks = (shape["B"],) if "matvec" in task else (shape["G"], group // form.block)
    swiglu = task.endswith("swiglu")
    weights: Arguments = {}
    for prefix in ("gate", "up") if swiglu else ("",):
        made = random_blocks(random, form, e * p, blocks, prefix)
        weights |= {name: part.reshape(e, *panels, *part.shape[1:]) for name, part in made.items()}
    if grouped:
        j = shape["J"]
        cuts = np.sort(random.integers(0, j + 1, e - 1)).astype(np.int32)
        ranges = {"first": np.concatenate([[0], cuts]).astype(np.int32), "last": np.append(cuts, j).astype(np.int32)}
        rows = random_activations(random, form, shape["G"], group, j, shape["C"] - j)
        return rows | ranges | weights | {"y": unwritten(j, *panels, PANEL)}
    k = shape["K"]
    arguments: Arguments = weights | {"experts": random.permutation(e)[:k].astype(np.int32)}
    if not swiglu:
        arguments["weights"] = random.random(k, np.float32)
    if "matmul" in task:
        arguments |= random_activations(random, form, shape["G"], group, 1 if swiglu else k)
    else:
        arguments["x"] = normal(random, *(() if swiglu else (k,)), *blocks, form.block)
    if swiglu:
        return arguments | {"y": unwritten(k, p, PANEL)}
    products = {"products": unwritten(k, p, PANEL)} if "matmul" in task else {}
    return arguments | {"residual": normal(random, p, PANEL)} | products | {"y": unwritten(p, PANEL)}


def _entry(kernel: Any, form: Form, group: int, task: str) -> LibraryKernel:
    swiglu, grouped, exact = task.endswith("swiglu"), task.startswith("grouped"), "matvec" in task
    count = 2 if swiglu else 1
    e, k, p, columns = (18, 6, 48, 1024) if swiglu else (18, 6, 64, 768)
    n, rows = p * PANEL, 512 * k if grouped else 1 if swiglu else k
    name, size = ("B", form.block) if exact else ("G", group)
    row_bytes = 4 * columns if exact else columns + 4 * columns // group + 8 * columns // form.block
    weight_bytes = count * (e if grouped else k) * n * columns // form.block * form.block_bytes
    results = 4 * n * (rows if grouped else k if swiglu else 2 if exact else 2 + k)
    checks: tuple[dict[str, int], ...] = (
        {"E": 1, "K": 1, "P": 1, name: 1}, {"E": 4, "K": 2, "P": 3, name: 2}, {"E": 5, "K": 3, "P": 2, name: 3})
    shape = {"E": e, "K": k, "P": p, name: columns // size}
    if grouped:
        checks = ({"E": 1, "N": 1, "T": 1, "G": 1, "C": 1, "J": 1}, {"E": 4, "N": 2, "T": 2, "G": 2, "C": 9, "J": 7},
                  {"E": 3, "N": 1, "T": 3, "G": 1, "C": 33, "J": 33})
        n_blocks, t = panel_blocks(p)
        shape = {"E": e, "N": n_blocks, "T": t, "G": columns // size, "C": rows_apart(rows, group),
                 "J": rows}
    references = {"expert": weighted_reference, "expert_swiglu": swiglu_reference}
    reference = grouped_reference if grouped else references["expert_swiglu" if swiglu else "expert"]
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=lambda arguments: reference(arguments, form),
        make_arguments=lambda random, shape: make_arguments(random, shape, form, group, task), tolerance=TOLERANCE,
        cases=(Case(shape, flops=2 * count * (rows if grouped else k) * n * columns,
                    bytes=weight_bytes + rows * row_bytes + results + (8 * e if grouped else 0)),),
        check_shapes=checks, dtype=form.name, products="f32" if exact else "i8",
    )


KERNELS = tuple(
    _entry(kernel, FORMS[name], group, task) for name, group in LISTED
    for kernels in (product_experts(FORMS[name], group), exact_experts(FORMS[name]))
    for task, kernel in vars(kernels).items())
