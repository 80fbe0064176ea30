"""A mixture of experts for one token, with weights in blocks of 32 (sapper/kernels/quantized.py), used as they are.

The panels of all E experts lie together: quants [E, P, B, 16 or 32, L], scale and, of q4, minimum [E, P, B, L].

    expert_matvec_swiglu_q4, _q8   y[k] = silu(gate[e] @ x) * (up[e] @ x), e = experts[k]
    expert_matvec_q4, _q8          y = residual + sum over k of weights[k] * (w[e] @ x[k])
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, each, f16, f32, i8, i32, tiles, u8, whole, zeros

from .activation import silu, silu_reference
from .quantized import BLOCK, BLOCK_BYTES, HALF, PANEL, TOLERANCE, matrix, random_blocks
from .record import Arguments, Array, Case, LibraryKernel, Shape, normal, unwritten

E, K, P, B, L = sp.dims("E K P B L")


def q4_products(packed: Any, scale: Any, minimum: Any, low_x: Any, high_x: Any, sums: Any) -> Any:
    """The products of a block, summed. packed: over the block's bytes; low_x, high_x: what their halves meet."""
    bits = packed.to(i32)
    products = (bits & 15).to(f32) @ low_x + (bits >> 4).to(f32) @ high_x
    return products * scale.to(f32) + minimum.to(f32) * sums


def q8_products(quants: Any, scale: Any, x: Any) -> Any:
    return (quants.to(f32) @ x) * scale.to(f32)


@sp.kernel
def expert_matvec_swiglu_q4(
    gate: Tensor[u8, E, P, B, HALF, L], gate_scale: Tensor[f16, E, P, B, L], gate_minimum: Tensor[f16, E, P, B, L],
    up: Tensor[u8, E, P, B, HALF, L], up_scale: Tensor[f16, E, P, B, L], up_minimum: Tensor[f16, E, P, B, L],
    experts: Tensor[i32, K], x: Tensor[f32, B, 2, HALF], sums: Tensor[f32, B], y: Tensor[f32, K, P, L],
):
    for k in each(K):
        e = experts[k]
        for p in tiles(P):
            l = whole(L)
            gate_sum = zeros(p, l, dtype=f32)
            up_sum = zeros(p, l, dtype=f32)
            for b in each(B):
                i = whole(HALF)
                low, high = x[b, 0, i], x[b, 1, i]
                gate_sum += q4_products(
                    gate[e, p, b, i, l], gate_scale[e, p, b, l], gate_minimum[e, p, b, l], low, high, sums[b])
                up_sum += q4_products(
                    up[e, p, b, i, l], up_scale[e, p, b, l], up_minimum[e, p, b, l], low, high, sums[b])
            y[k, p, l] = silu(gate_sum) * up_sum


@sp.kernel
def expert_matvec_swiglu_q8(
    gate: Tensor[i8, E, P, B, BLOCK, L], gate_scale: Tensor[f16, E, P, B, L], up: Tensor[i8, E, P, B, BLOCK, L],
    up_scale: Tensor[f16, E, P, B, L], experts: Tensor[i32, K], x: Tensor[f32, B, BLOCK], y: Tensor[f32, K, P, L],
):
    for k in each(K):
        e = experts[k]
        for p in tiles(P):
            l = whole(L)
            gate_sum = zeros(p, l, dtype=f32)
            up_sum = zeros(p, l, dtype=f32)
            for b in each(B):
                i = whole(BLOCK)
                gate_sum += q8_products(gate[e, p, b, i, l], gate_scale[e, p, b, l], x[b, i])
                up_sum += q8_products(up[e, p, b, i, l], up_scale[e, p, b, l], x[b, i])
            y[k, p, l] = silu(gate_sum) * up_sum


@sp.kernel
def expert_matvec_q4(
    quants: Tensor[u8, E, P, B, HALF, L], scale: Tensor[f16, E, P, B, L], minimum: Tensor[f16, E, P, B, L],
    experts: Tensor[i32, K], weights: Tensor[f32, K], x: Tensor[f32, K, B, 2, HALF], sums: Tensor[f32, K, B],
    residual: Tensor[f32, P, L], y: Tensor[f32, P, L],
):
    for p in tiles(P):
        l = whole(L)
        total = residual[p, l]
        for k in each(K):
            e = experts[k]
            acc = zeros(p, l, dtype=f32)
            for b in each(B):
                i = whole(HALF)
                acc += q4_products(quants[e, p, b, i, l], scale[e, p, b, l], minimum[e, p, b, l], x[k, b, 0, i],
                                   x[k, b, 1, i], sums[k, b])
            total += weights[k] * acc
        y[p, l] = total


@sp.kernel
def expert_matvec_q8(
    quants: Tensor[i8, E, P, B, BLOCK, L], scale: Tensor[f16, E, P, B, L], experts: Tensor[i32, K],
    weights: Tensor[f32, K], x: Tensor[f32, K, B, BLOCK], residual: Tensor[f32, P, L], y: Tensor[f32, P, L],
):
    for p in tiles(P):
        l = whole(L)
        total = residual[p, l]
        for k in each(K):
            e = experts[k]
            acc = zeros(p, l, dtype=f32)
            for b in each(B):
                i = whole(BLOCK)
                acc += q8_products(quants[e, p, b, i, l], scale[e, p, b, l], x[k, b, i])
            total += weights[k] * acc
        y[p, l] = total


# ------------------------------------------------------------------------------------------- references and arguments


def _matrices(arguments: Arguments, name: str) -> Array:
    """The matrices [E, N, K] of panels, in float64."""
    prefix = "" if name == "quants" else f"{name}_"
    parts = [arguments[key] for key in (name, f"{prefix}scale", f"{prefix}minimum") if key in arguments]
    quants, scale, *minimum = (part.reshape(-1, *part.shape[2:]) for part in parts)
    wide: Array = matrix(quants, scale, minimum[0] if minimum else None)
    return wide.reshape(len(parts[0]), -1, wide.shape[1])


def swiglu_reference(arguments: Arguments) -> dict[str, Array]:
    x = arguments["x"].astype(np.float64).reshape(-1)
    gate, up = (_matrices(arguments, name)[arguments["experts"]] for name in ("gate", "up"))
    return {"y": (silu_reference(gate @ x) * (up @ x)).reshape(arguments["y"].shape)}


def weighted_reference(arguments: Arguments) -> dict[str, Array]:
    x = arguments["x"].astype(np.float64).reshape(len(arguments["experts"]), -1)
    w = _matrices(arguments, "quants")[arguments["experts"]]
    found = np.einsum("k,knj,kj->n", arguments["weights"].astype(np.float64), w, x)
    return {"y": arguments["residual"] + found.reshape(arguments["y"].shape)}


def make_arguments(random: np.random.Generator, shape: Shape, form: str, swiglu: bool) -> Arguments:
    e, k, p, b = shape["E"], shape["K"], shape["P"], shape["B"]
    halves = (2, HALF) if form == "q4" else (BLOCK,)
    arguments: Arguments = {}
    for prefix in ("gate", "up") if swiglu else ("",):
        panels = random_blocks(random, form, e * p, b, prefix)
        arguments |= {name: part.reshape(e, p, *part.shape[1:]) for name, part in panels.items()}
    arguments["experts"] = random.permutation(e)[:k].astype(np.int32)
    x = normal(random, *(() if swiglu else (k,)), b, *halves)
    if not swiglu:
        arguments["weights"] = random.random(k, np.float32)
    arguments["x"] = x
    if form == "q4":
        arguments["sums"] = x.astype(np.float64).sum(axis=(-2, -1)).astype(np.float32)
    if swiglu:
        return arguments | {"y": unwritten(k, p, PANEL)}
    return arguments | {"residual": normal(random, p, PANEL), "y": unwritten(p, PANEL)}


def _entry(kernel: Any, form: str, swiglu: bool) -> LibraryKernel:
    count = 2 if swiglu else 1
    e, k, p, b = (18, 6, 48, 32) if swiglu else (18, 6, 64, 24)
    n = p * PANEL
    vectors = 4 * (b * BLOCK + k * n) if swiglu else 4 * (k * b * BLOCK + 2 * n)
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=swiglu_reference if swiglu else weighted_reference,
        make_arguments=lambda random, shape: make_arguments(random, shape, form, swiglu), tolerance=TOLERANCE,
        cases=(Case({"E": e, "K": k, "P": p, "B": b}, flops=2 * count * k * n * b * BLOCK,
                    bytes=count * k * n * b * BLOCK_BYTES[form] + vectors),),
        check_shapes=(
            {"E": 1, "K": 1, "P": 1, "B": 1}, {"E": 4, "K": 2, "P": 3, "B": 2}, {"E": 5, "K": 3, "P": 2, "B": 3},
        ),
        dtype=form,
    )


KERNELS = (
    _entry(expert_matvec_swiglu_q4, "q4", True),
    _entry(expert_matvec_swiglu_q8, "q8", True),
    _entry(expert_matvec_q4, "q4", False),
    _entry(expert_matvec_q8, "q8", False),
)
