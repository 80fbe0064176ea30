"""A mixture of experts in bf16 whose weights lie in pairs, as products of bf16 read them; activations in bf16.

Weights are panels [E, B, I / 2, 32, 2] of 32 output features, packed once: columns in pairs, which are neighbours, and
32 rows beside each other. Panels that products make of rows of weights, each time anew, cost a prompt of 512 tokens a
sixth of its mixtures on two threads of a Zen 4 (16 experts of 768 x 1024: gate and up 17.0 and 14.6 ms, down 9.3 and
7.3), and 16 tokens half of them (2.0 and 1.1 ms, 1.25 and 0.66). Otherwise as moe.py:

    expert_pairs_swiglu     y[k] = silu(gate[e] @ x) * (up[e] @ x), e = experts[k], for one token
    expert_pairs            y = residual + sum over k of weights[k] * products[k], products[k] = w[e] @ x[k]
    grouped_pairs_swiglu    y[m] = silu(gate[e] @ x[m]) * (up[e] @ x[m]) for the rows m = start[e] ... stop[e] - 1 of
                            each expert e, in f32 or, as the next product takes it, in bf16
    grouped_pairs           y[m] = w[e] @ x[m]
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, each, f32, i32, span, tiles, whole, zeros

from .activation import silu, silu_reference
from .moe import TOLERANCE, add_products
from .near import ROWS
from .record import Arguments, Array, Case, LibraryKernel, Shape, normal, rounded_to_bf16, unwritten
from .widen import DTYPES

K, E, I, J, B = sp.dims("K E I J B")


@sp.kernel
def expert_pairs_swiglu(
    gate: Tensor[bf16, E, B, I, ROWS, 2], up: Tensor[bf16, E, B, I, ROWS, 2], experts: Tensor[i32, K],
    x: Tensor[bf16, I, 2], y: Tensor[f32, K, B, ROWS],
):
    for k, b in each(K, B):
        e = experts[k]
        l = whole(ROWS)
        gate_sum = zeros(l, dtype=f32)
        up_sum = zeros(l, dtype=f32)
        for i, s in tiles(I, 2):
            gate_sum += gate[e, b, i, l, s] @ x[i, s]
            up_sum += up[e, b, i, l, s] @ x[i, s]
        y[k, b, l] = silu(gate_sum) * up_sum


@sp.kernel
def expert_pairs(
    w: Tensor[bf16, E, B, I, ROWS, 2], experts: Tensor[i32, K], weights: Tensor[f32, K], x: Tensor[bf16, K, I, 2],
    residual: Tensor[f32, B, ROWS], products: Tensor[f32, K, B, ROWS], y: Tensor[f32, B, ROWS],
):
    for k, b in each(K, B):
        e = experts[k]
        l = whole(ROWS)
        acc = zeros(l, dtype=f32)
        for i, s in tiles(I, 2):
            acc += w[e, b, i, l, s] @ x[k, i, s]
        products[k, b, l] = acc
    for b in each(B):
        l = whole(ROWS)
        add_products(weights, products, residual, y, b, l)


def make_grouped_pairs_swiglu(result: Any) -> Any:
    @sp.kernel(name=f"grouped_pairs_swiglu_{result.name}")
    def grouped_pairs_swiglu(
        x: Tensor[bf16, J, I, 2], start: Tensor[i32, E], stop: Tensor[i32, E], gate: Tensor[bf16, E, B, I, ROWS, 2],
        up: Tensor[bf16, E, B, I, ROWS, 2], y: Tensor[result, J, B, ROWS],
    ):
        for b in each(B):
            for e in each(E):
                for m, l in tiles(span(start[e], stop[e]), ROWS):
                    gate_sum = zeros(m, l, dtype=f32)
                    up_sum = zeros(m, l, dtype=f32)
                    for i, s in tiles(I, 2):
                        row = x[m, i, s]
                        gate_sum += row @ gate[e, b, i, l, s]
                        up_sum += row @ up[e, b, i, l, s]
                    y[m, b, l] = (silu(gate_sum) * up_sum).to(result)

    return grouped_pairs_swiglu


@sp.kernel
def grouped_pairs(
    x: Tensor[bf16, J, I, 2], start: Tensor[i32, E], stop: Tensor[i32, E], w: Tensor[bf16, E, B, I, ROWS, 2],
    y: Tensor[f32, J, B, ROWS],
):
    for b in each(B):
        for e in each(E):
            for m, l in tiles(span(start[e], stop[e]), ROWS):
                acc = zeros(m, l, dtype=f32)
                for i, s in tiles(I, 2):
                    acc += x[m, i, s] @ w[e, b, i, l, s]
                y[m, b, l] = acc


grouped_pairs_swiglu_f32 = make_grouped_pairs_swiglu(f32)
grouped_pairs_swiglu_bf16 = make_grouped_pairs_swiglu(bf16)


# ------------------------------------------------------------------------------------------- references and arguments


def matrix(panels: Array) -> Array:
    """Panels [B, I / 2, 32, 2] as rows [B * 32, I], exact."""
    rows: Array = panels.astype(np.float64).transpose(0, 2, 1, 3).reshape(panels.shape[0] * ROWS, -1)
    return rows


def product(arguments: Arguments, expert: int, x: Array) -> Array:
    """What an expert makes of rows x [m, I / 2, 2] or of one [I / 2, 2]: [..., B, 32]."""
    rows = x.astype(np.float64).reshape(*x.shape[:-2], 2 * x.shape[-2])

    def by(name: str) -> Array:
        found: Array = rows @ matrix(arguments[name][expert]).T
        return found

    y = silu_reference(by("gate")) * by("up") if "gate" in arguments else by("w")
    return y.reshape(*y.shape[:-1], y.shape[-1] // ROWS, ROWS)


def expert_reference(arguments: Arguments) -> dict[str, Array]:
    x, experts = arguments["x"], arguments["experts"]
    if "gate" in arguments:
        return {"y": np.stack([product(arguments, e, x) for e in experts])}
    products = np.stack([product(arguments, e, row) for e, row in zip(experts, x, strict=True)])
    total = np.einsum("k,kbl->bl", arguments["weights"].astype(np.float64), products)
    return {"products": products, "y": arguments["residual"] + total}


def grouped_reference(arguments: Arguments) -> dict[str, Array]:
    y = np.empty(arguments["y"].shape)
    for e, (start, stop) in enumerate(zip(arguments["start"], arguments["stop"], strict=True)):
        y[start:stop] = product(arguments, e, arguments["x"][start:stop])
    return {"y": y}


def panels(random: "np.random.Generator", shape: Shape, swiglu: bool) -> Arguments:
    """Scaled by 1 / sqrt of what is summed over, so that results are near 1."""
    e, b, i = (shape[name] for name in "EBI")
    return {name: normal(random, e, b, i, ROWS, 2, dtype="bf16", scale=1.0 / np.sqrt(2 * i + 1.0))
            for name in (("gate", "up") if swiglu else ("w",))}


def expert_arguments(random: "np.random.Generator", shape: Shape, swiglu: bool) -> Arguments:
    e, k, b, i = (shape[name] for name in "EKBI")
    given = panels(random, shape, swiglu) | {"experts": random.permutation(e)[:k].astype(np.int32)}
    if swiglu:
        return given | {"x": normal(random, i, 2, dtype="bf16"), "y": unwritten(k, b, ROWS)}
    return given | {"weights": random.random(k, np.float32), "x": normal(random, k, i, 2, dtype="bf16"),
                    "residual": normal(random, b, ROWS), "products": unwritten(k, b, ROWS), "y": unwritten(b, ROWS)}


def grouped_arguments(random: "np.random.Generator", shape: Shape, swiglu: bool, result: str) -> Arguments:
    """Experts of uneven load: every third has no rows."""
    e, b, i, j = (shape[name] for name in "EBIJ")
    busy = [n for n in range(e) if n % 3 != 1] or [0]
    counts = np.bincount(random.choice(busy, j), minlength=e)
    stop = np.cumsum(counts).astype(np.int32)
    return {"x": normal(random, j, i, 2, dtype="bf16"), "start": (stop - counts).astype(np.int32), "stop": stop,
            **panels(random, shape, swiglu), "y": unwritten(j, b, ROWS, dtype=result)}


def _expert_entry(kernel: Any, swiglu: bool) -> LibraryKernel:
    count, cases = 2 if swiglu else 1, []
    for e, k, hidden, features in ((18, 6, 768, 1024), (66, 8, 1408, 2048)):
        outputs, inputs = (hidden, features) if swiglu else (features, hidden)
        vectors = 2 * inputs + 4 * k * outputs if swiglu else 2 * k * inputs + 4 * (2 + k) * outputs + 4 * k
        cases.append(Case({"E": e, "K": k, "B": outputs // ROWS, "I": inputs // 2},
                          flops=2 * count * k * hidden * features, bytes=2 * count * k * hidden * features + vectors))
    shapes = (1, 1, 1, 1), (5, 3, 1, 19), (4, 4, 2, 32), (3, 2, 3, 50)
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=expert_reference,
        make_arguments=lambda random, shape: expert_arguments(random, shape, swiglu), tolerance=TOLERANCE,
        cases=tuple(cases), check_shapes=tuple(dict(zip("EKBI", shape, strict=True)) for shape in shapes),
        dtype="bf16", products="bf16",
    )


def _grouped_entry(kernel: Any, swiglu: bool, result: str = "f32") -> LibraryKernel:
    count, size = 2 if swiglu else 1, DTYPES[result].size_bytes
    b, i = (24, 512) if swiglu else (32, 384)

    def shape(e: int, b: int, i: int, j: int) -> dict[str, int]:
        return {"E": e, "B": b, "I": i, "J": j}

    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=grouped_reference,
        make_arguments=lambda random, shape: grouped_arguments(random, shape, swiglu, result),
        tolerance=rounded_to_bf16(TOLERANCE) if result == "bf16" else TOLERANCE,
        cases=tuple(
            Case(shape(16, b, i, j), flops=4 * count * j * b * ROWS * i,
                 bytes=4 * count * 16 * b * ROWS * i + j * (size * b * ROWS + 4 * i) + 128) for j in (64, 2048)),
        check_shapes=(shape(2, 1, 3, 0), shape(1, 1, 1, 1), shape(5, 1, 3, 11), shape(7, 2, 17, 29),
                      shape(3, 5, 65, 40)),
        dtype="bf16", products="bf16",
    )


KERNELS = (
    _expert_entry(expert_pairs_swiglu, True),
    _expert_entry(expert_pairs, False),
    _grouped_entry(grouped_pairs_swiglu_f32, True),
    _grouped_entry(grouped_pairs_swiglu_bf16, True, "bf16"),
    _grouped_entry(grouped_pairs, False),
)
