"""Weights in blocks of 32 with a scale each, used as they are: matrix times vector, embedding, widening.

    q4   weight = scale * q + minimum, q 0 ... 15      GGUF's Q4_1, and Q4_0 with minimum = -8 * scale
    q8   weight = scale * q, q -128 ... 127            GGUF's Q8_0

A matrix [N, K] lies in panels of L = 16 rows, so that neighbours in memory are neighbours among the lanes, and each
panel is read from one end to the other: quants [P, B, 16 or 32, L], scale and minimum [P, B, L], where row n is lane
n % L of panel n // L, and column k is element k % 32 of block k // 32. A byte of q4 holds element i of its block in
its low half and element i + 16 in its high half, as in GGUF. Vectors are [B, 2, 16] or [B, 32], the same memory.

Of a block's sum over scale * q + minimum times x, only the sum over q * x needs every element: the scale is applied
once, and the minimum meets the sum of the block's x (`sums`), which all rows share and rms_norm_blocks and block_sums
make.
Formats: ggml's `block_q4_0`, `block_q4_1` and `block_q8_0`, ggml-common.h.
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, each, f16, f32, i8, i32, rsqrt, sum, tiles, u8, whole, zeros

from .activation import silu, silu_reference
from .record import Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

P, B, L, T = sp.dims("P B L T")
BLOCK, HALF, PANEL = 32, 16, 16


def q4_block(quants: Any, scale: Any, minimum: Any, x: Any, sums: Any, p: Any, b: Any, l: Any) -> Any:
    """The products of one block of the panels p, summed, as a tile over p and l."""
    i = whole(HALF)
    packed = quants[p, b, i, l].to(i32)
    low, high = (packed & 15).to(f32), (packed >> 4).to(f32)
    products = low @ x[b, 0, i] + high @ x[b, 1, i]
    return products * scale[p, b, l].to(f32) + minimum[p, b, l].to(f32) * sums[b]


def q8_block(quants: Any, scale: Any, x: Any, p: Any, b: Any, l: Any) -> Any:
    i = whole(BLOCK)
    return (quants[p, b, i, l].to(f32) @ x[b, i]) * scale[p, b, l].to(f32)


@sp.kernel
def matvec_q4(
    quants: Tensor[u8, P, B, HALF, L], scale: Tensor[f16, P, B, L], minimum: Tensor[f16, P, B, L],
    x: Tensor[f32, B, 2, HALF], sums: Tensor[f32, B], y: Tensor[f32, P, L],
):
    for p in tiles(P):
        l = whole(L)
        acc = zeros(p, l, dtype=f32)
        for b in each(B):
            acc += q4_block(quants, scale, minimum, x, sums, p, b, l)
        y[p, l] = acc


@sp.kernel
def matvec_residual_q4(
    quants: Tensor[u8, P, B, HALF, L], scale: Tensor[f16, P, B, L], minimum: Tensor[f16, P, B, L],
    x: Tensor[f32, B, 2, HALF], sums: Tensor[f32, B], residual: Tensor[f32, P, L], y: Tensor[f32, P, L],
):
    for p in tiles(P):
        l = whole(L)
        acc = zeros(p, l, dtype=f32)
        for b in each(B):
            acc += q4_block(quants, scale, minimum, x, sums, p, b, l)
        y[p, l] = residual[p, l] + acc


@sp.kernel
def matvec_swiglu_q4(
    gate: Tensor[u8, P, B, HALF, L], gate_scale: Tensor[f16, P, B, L], gate_minimum: Tensor[f16, P, B, L],
    up: Tensor[u8, P, B, HALF, L], up_scale: Tensor[f16, P, B, L], up_minimum: Tensor[f16, P, B, L],
    x: Tensor[f32, B, 2, HALF], sums: Tensor[f32, B], y: Tensor[f32, P, L],
):
    for p in tiles(P):
        l = whole(L)
        gate_sum = zeros(p, l, dtype=f32)
        up_sum = zeros(p, l, dtype=f32)
        for b in each(B):
            gate_sum += q4_block(gate, gate_scale, gate_minimum, x, sums, p, b, l)
            up_sum += q4_block(up, up_scale, up_minimum, x, sums, p, b, l)
        y[p, l] = silu(gate_sum) * up_sum


@sp.kernel
def matvec_q8(
    quants: Tensor[i8, P, B, BLOCK, L], scale: Tensor[f16, P, B, L], x: Tensor[f32, B, BLOCK], y: Tensor[f32, P, L]
):
    for p in tiles(P):
        l = whole(L)
        acc = zeros(p, l, dtype=f32)
        for b in each(B):
            acc += q8_block(quants, scale, x, p, b, l)
        y[p, l] = acc


@sp.kernel
def matvec_residual_q8(
    quants: Tensor[i8, P, B, BLOCK, L], scale: Tensor[f16, P, B, L], x: Tensor[f32, B, BLOCK],
    residual: Tensor[f32, P, L], y: Tensor[f32, P, L],
):
    for p in tiles(P):
        l = whole(L)
        acc = zeros(p, l, dtype=f32)
        for b in each(B):
            acc += q8_block(quants, scale, x, p, b, l)
        y[p, l] = residual[p, l] + acc


@sp.kernel
def matvec_swiglu_q8(
    gate: Tensor[i8, P, B, BLOCK, L], gate_scale: Tensor[f16, P, B, L], up: Tensor[i8, P, B, BLOCK, L],
    up_scale: Tensor[f16, P, B, L], x: Tensor[f32, B, BLOCK], y: Tensor[f32, P, L],
):
    for p in tiles(P):
        l = whole(L)
        gate_sum = zeros(p, l, dtype=f32)
        up_sum = zeros(p, l, dtype=f32)
        for b in each(B):
            gate_sum += q8_block(gate, gate_scale, x, p, b, l)
            up_sum += q8_block(up, up_scale, x, p, b, l)
        y[p, l] = silu(gate_sum) * up_sum


@sp.kernel
def dequantize_q4(
    quants: Tensor[u8, P, B, HALF, L], scale: Tensor[f16, P, B, L], minimum: Tensor[f16, P, B, L],
    out: Tensor[f32, P, L, B, 2, HALF],
):
    """A matrix [N, K], row by row."""
    for p, b in tiles(P, B):
        l = whole(L)
        i = whole(HALF)
        packed = quants[p, b, i, l].to(i32)
        out[p, l, b, 0, i] = (packed & 15).to(f32) * scale[p, b, l].to(f32) + minimum[p, b, l].to(f32)
        out[p, l, b, 1, i] = (packed >> 4).to(f32) * scale[p, b, l].to(f32) + minimum[p, b, l].to(f32)


@sp.kernel
def dequantize_q8(
    quants: Tensor[i8, P, B, BLOCK, L], scale: Tensor[f16, P, B, L], out: Tensor[f32, P, L, B, BLOCK]
):
    """A matrix [N, K], row by row."""
    for p, b in tiles(P, B):
        l = whole(L)
        i = whole(BLOCK)
        out[p, l, b, i] = quants[p, b, i, l].to(f32) * scale[p, b, l].to(f32)


@sp.kernel
def embedding_q4(
    tokens: Tensor[i32, T], quants: Tensor[u8, P, B, HALF, L], scale: Tensor[f16, P, B, L],
    minimum: Tensor[f16, P, B, L], y: Tensor[f32, T, B, 2, HALF],
):
    """Rows tokens[t] of the matrix. The caller sees to it that 0 <= tokens[t] < N."""
    for t in each(T):
        p = tokens[t] // PANEL
        l = tokens[t] % PANEL
        for b in tiles(B):
            i = whole(HALF)
            packed = quants[p, b, i, l].to(i32)
            y[t, b, 0, i] = (packed & 15).to(f32) * scale[p, b, l].to(f32) + minimum[p, b, l].to(f32)
            y[t, b, 1, i] = (packed >> 4).to(f32) * scale[p, b, l].to(f32) + minimum[p, b, l].to(f32)


@sp.kernel
def embedding_q8(
    tokens: Tensor[i32, T], quants: Tensor[i8, P, B, BLOCK, L], scale: Tensor[f16, P, B, L],
    y: Tensor[f32, T, B, BLOCK],
):
    """Rows tokens[t] of the matrix. The caller sees to it that 0 <= tokens[t] < N."""
    for t in each(T):
        p = tokens[t] // PANEL
        l = tokens[t] % PANEL
        for b in tiles(B):
            i = whole(BLOCK)
            y[t, b, i] = quants[p, b, i, l].to(f32) * scale[p, b, l].to(f32)


@sp.kernel
def rms_norm_blocks(
    x: Tensor[f32, B, BLOCK], gain: Tensor[f32, B, BLOCK], epsilon: f32, y: Tensor[f32, B, BLOCK],
    sums: Tensor[f32, B],
):
    """RMSNorm (Zhang and Sennrich, 2019) of one vector, and the sum of each block of the result."""
    b = whole(B)
    i = whole(BLOCK)
    vector = x[b, i]
    factor = rsqrt(sum(sum(vector * vector, over=i), over=b) / (B * BLOCK).to(f32) + epsilon)
    normed = vector * factor * gain[b, i]
    y[b, i] = normed
    sums[b] = sum(normed, over=i)


@sp.kernel
def block_sums(x: Tensor[f32, B, BLOCK], sums: Tensor[f32, B]):
    for b in tiles(B):
        i = whole(BLOCK)
        sums[b] = sum(x[b, i], over=i)


# ------------------------------------------------------------------------------------------------- layout and reference


def to_panels(rows: Array) -> Array:
    """[N, B, ...] to [N / 16, B, ..., 16], as a view; N a multiple of 16."""
    return np.moveaxis(rows.reshape(-1, PANEL, *rows.shape[1:]), 1, -1)


def matrix(quants: Array, scale: Array, minimum: Array | None) -> Array:
    """The matrix [N, K] of panels, in float64."""
    values = quants.astype(np.float64)
    if minimum is not None:
        values = np.concatenate([quants & 15, quants >> 4], axis=2).astype(np.float64)
    values = values * scale[:, :, None].astype(np.float64)
    if minimum is not None:
        values += minimum[:, :, None].astype(np.float64)
    panels, blocks, _, lanes = values.shape
    return np.moveaxis(values, -1, 1).reshape(panels * lanes, blocks * BLOCK)


def _matrix_of(arguments: Arguments, prefix: str = "") -> Array:
    names = (f"{prefix}_scale", f"{prefix}_minimum") if prefix else ("scale", "minimum")
    return matrix(arguments[prefix or "quants"], arguments[names[0]], arguments.get(names[1]))


def matvec_reference(arguments: Arguments) -> dict[str, Array]:
    x = arguments["x"].astype(np.float64).reshape(-1)
    if "gate" in arguments:
        result = silu_reference(_matrix_of(arguments, "gate") @ x) * (_matrix_of(arguments, "up") @ x)
    else:
        result = _matrix_of(arguments) @ x
    result = result.reshape(arguments["y"].shape)
    return {"y": result + arguments["residual"] if "residual" in arguments else result}


def dequantize_reference(arguments: Arguments) -> dict[str, Array]:
    return {"out": _matrix_of(arguments).reshape(arguments["out"].shape)}


def embedding_reference(arguments: Arguments) -> dict[str, Array]:
    return {"y": _matrix_of(arguments)[arguments["tokens"]].reshape(arguments["y"].shape)}


def norm_reference(arguments: Arguments) -> dict[str, Array]:
    x = arguments["x"].astype(np.float64)
    y = x / np.sqrt(np.square(x).mean() + arguments["epsilon"]) * arguments["gain"]
    return {"y": y, "sums": y.sum(axis=1)}


def sums_reference(arguments: Arguments) -> dict[str, Array]:
    return {"sums": arguments["x"].astype(np.float64).sum(axis=1)}


def random_blocks(random: np.random.Generator, form: str, p: int, b: int, prefix: str = "") -> Arguments:
    """Weights near 1 / sqrt(K), as in a network."""
    unit = 1.0 / np.sqrt(BLOCK * b + 1.0)
    name = f"{prefix}_" if prefix else ""
    scale = (unit * random.uniform(0.05, 0.2, (p, b, PANEL))).astype(np.float16)
    if form == "q8":
        quants = random.integers(-128, 128, (p, b, BLOCK, PANEL)).astype(np.int8)
        return {prefix or "quants": quants, f"{name}scale": (scale / 8).astype(np.float16)}
    quants = random.integers(0, 256, (p, b, HALF, PANEL)).astype(np.uint8)
    minimum = (-8.0 * unit * random.uniform(0.05, 0.2, (p, b, PANEL))).astype(np.float16)
    return {prefix or "quants": quants, f"{name}scale": scale, f"{name}minimum": minimum}


def make_arguments(random: np.random.Generator, shape: Shape, form: str, task: str) -> Arguments:
    b = shape["B"]
    if task in ("norm", "sums"):
        arguments: Arguments = {"x": normal(random, b, BLOCK)}
        if task == "norm":
            arguments |= {"gain": normal(random, b, BLOCK), "epsilon": 1e-5, "y": unwritten(b, BLOCK)}
        return arguments | {"sums": unwritten(b)}
    p = shape["P"]
    halves = (2, HALF) if form == "q4" else (BLOCK,)
    arguments = {}
    for prefix in ("gate", "up") if task == "swiglu" else ("",):
        arguments |= random_blocks(random, form, p, b, prefix)
    if task == "dequantize":
        return arguments | {"out": unwritten(p, PANEL, b, *halves)}
    if task == "embedding":
        t = shape["T"]
        tokens = {"tokens": random.integers(0, max(1, p * PANEL), t).astype(np.int32)}
        return tokens | arguments | {"y": unwritten(t, b, *halves)}
    x = normal(random, b, *halves)
    arguments["x"] = x
    if form == "q4":
        arguments["sums"] = x.astype(np.float64).sum(axis=(1, 2)).astype(np.float32)
    if task == "residual":
        arguments["residual"] = normal(random, p, PANEL)
    return arguments | {"y": unwritten(p, PANEL)}


TOLERANCE = Tolerance(
    2e-5, 5e-5, "a sum of K rounded products near 1 / sqrt(K) in any order, of parts that partly cancel: scale * q and "
    "the minimum are of one size and opposite signs"
)
PLAIN = Tolerance(1e-6, 1e-6, "a product and a sum, each rounded once")
BLOCK_BYTES = {"q4": 20, "q8": 34}
"""Of 32 weights: 4 or 8 bits each, and the scale and minimum."""


def _entry(kernel: Any, form: str, task: str, reference: Any) -> LibraryKernel:
    count = 2 if task == "swiglu" else 1
    cases = []
    for p, b in ((96, 18), (896, 128)):
        n, k, weights = p * PANEL, b * BLOCK, count * p * PANEL * b * BLOCK_BYTES[form]
        if task in ("norm", "sums"):
            shape, flops, size = {"B": b}, 4 * k, 4 * k * (3 if task == "norm" else 1) + 4 * b
        elif task == "embedding":
            shape, flops, size = {"T": 128, "P": p, "B": b}, 256 * k, 128 * (4 * k + b * BLOCK_BYTES[form])
        elif task == "dequantize":
            shape, flops, size = {"P": p, "B": b}, 2 * n * k, weights + 4 * n * k
        else:
            vectors = n * (2 if task == "residual" else 1) + k + (b if form == "q4" else 0)
            shape, flops, size = {"P": p, "B": b}, 2 * count * n * k, weights + 4 * vectors
        cases.append(Case(shape, flops=flops, bytes=size))
    check_shapes: tuple[dict[str, int], ...] = ({"P": 0, "B": 2}, {"P": 1, "B": 1}, {"P": 3, "B": 2}, {"P": 5, "B": 3})
    if task in ("norm", "sums"):
        check_shapes = ({"B": 1}, {"B": 2}, {"B": 18})
    elif task == "embedding":
        check_shapes = ({"T": 0, "P": 1, "B": 1}, {"T": 3, "P": 2, "B": 1}, {"T": 5, "P": 3, "B": 3})
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=reference,
        make_arguments=lambda random, shape: make_arguments(random, shape, form, task),
        tolerance=PLAIN if task in ("dequantize", "embedding") else TOLERANCE, cases=tuple(cases),
        check_shapes=check_shapes, dtype=form,
    )


KERNELS = (
    _entry(matvec_q4, "q4", "", matvec_reference),
    _entry(matvec_residual_q4, "q4", "residual", matvec_reference),
    _entry(matvec_swiglu_q4, "q4", "swiglu", matvec_reference),
    _entry(matvec_q8, "q8", "", matvec_reference),
    _entry(matvec_residual_q8, "q8", "residual", matvec_reference),
    _entry(matvec_swiglu_q8, "q8", "swiglu", matvec_reference),
    _entry(dequantize_q4, "q4", "dequantize", dequantize_reference),
    _entry(dequantize_q8, "q8", "dequantize", dequantize_reference),
    _entry(embedding_q4, "q4", "embedding", embedding_reference),
    _entry(embedding_q8, "q8", "embedding", embedding_reference),
    _entry(rms_norm_blocks, "q4", "norm", norm_reference),
    _entry(block_sums, "q4", "sums", sums_reference),
)
