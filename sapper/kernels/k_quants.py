"""Weights in GGUF's Q4_K and Q6_K, repacked once: matrix times vector, embedding, widening.

    q4k   weight = (d * scale) * q - d_min * minimum, q 0 ... 15; scale and minimum of 6 bits for 32 weights, d and
          d_min for 256
    q6k   weight = (d * scale) * q, q -32 ... 31; scale of 8 bits for 16 weights, d for 256

A matrix [N, K] lies in panels of 16 rows, which are neighbours among the lanes, each read from one end to the other.
q4k: quants [P, G, 32, 16] bytes, of a group of 64 weights element i in the low half and element 32 + i in the high one;
scale, minimum [P, G, 2, 16]. q6k: quants [P, G, 16, 16] as i8, groups of 16; scale [P, G, 16]. d, d_min [P, S, 16].
The 6 bits of scales and of q6k's numbers are made bytes at load, no number is changed.

Formats: ggml's `block_q4_K` and `block_q6_K`, ggml-common.h; `dequantize_row_q4_K` and `dequantize_row_q6_K`,
ggml-quants.c, whose order of roundings this keeps.
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, each, f16, f32, i8, i32, sum, u8, whole, zeros

from .activation import silu, silu_reference
from .record import Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

G, P, S, T = sp.dims("G P S T")
PANEL, SUPER = 16, 256
HALF, PAIR, SIXTEEN = 32, 64, 16
GROUPS = {"q4k": SUPER // PAIR, "q6k": SUPER // SIXTEEN}
"""Groups of 256 weights."""


def q4k_group(
    quants: Any, scale: Any, minimum: Any, d: Any, d_min: Any, x: Any, sums: Any, p: Any, g: Any, l: Any
) -> Any:
    """The products of one group of the panel p, summed."""
    i = whole(HALF)
    packed = quants[p, g, i, l].to(i32)
    low, high = (packed & 15).to(f32) @ x[g, 0, i], (packed >> 4).to(f32) @ x[g, 1, i]
    scaled = low * scale[p, g, 0, l].to(f32) + high * scale[p, g, 1, l].to(f32)
    least = minimum[p, g, 0, l].to(f32) * sums[g, 0] + minimum[p, g, 1, l].to(f32) * sums[g, 1]
    return scaled * d[p, g // 4, l].to(f32) - least * d_min[p, g // 4, l].to(f32)


def q6k_group(quants: Any, scale: Any, d: Any, x: Any, p: Any, g: Any, l: Any) -> Any:
    i = whole(SIXTEEN)
    return (quants[p, g, i, l].to(f32) @ x[g, i]) * (d[p, g // 16, l].to(f32) * scale[p, g, l].to(f32))


@sp.kernel
def matvec_q4k(
    quants: Tensor[u8, P, G, HALF, PANEL], scale: Tensor[u8, P, G, 2, PANEL], minimum: Tensor[u8, P, G, 2, PANEL],
    d: Tensor[f16, P, S, PANEL], d_min: Tensor[f16, P, S, PANEL], x: Tensor[f32, G, 2, HALF], sums: Tensor[f32, G, 2],
    y: Tensor[f32, P, PANEL],
):
    for p in each(P):
        l = whole(PANEL)
        acc = zeros(l, dtype=f32)
        for g in each(G):
            acc += q4k_group(quants, scale, minimum, d, d_min, x, sums, p, g, l)
        y[p, l] = acc


@sp.kernel
def matvec_residual_q4k(
    quants: Tensor[u8, P, G, HALF, PANEL], scale: Tensor[u8, P, G, 2, PANEL], minimum: Tensor[u8, P, G, 2, PANEL],
    d: Tensor[f16, P, S, PANEL], d_min: Tensor[f16, P, S, PANEL], x: Tensor[f32, G, 2, HALF], sums: Tensor[f32, G, 2],
    residual: Tensor[f32, P, PANEL], y: Tensor[f32, P, PANEL],
):
    for p in each(P):
        l = whole(PANEL)
        acc = zeros(l, dtype=f32)
        for g in each(G):
            acc += q4k_group(quants, scale, minimum, d, d_min, x, sums, p, g, l)
        y[p, l] = residual[p, l] + acc


@sp.kernel
def matvec_swiglu_q4k(
    gate: Tensor[u8, P, G, HALF, PANEL], gate_scale: Tensor[u8, P, G, 2, PANEL],
    gate_minimum: Tensor[u8, P, G, 2, PANEL], gate_d: Tensor[f16, P, S, PANEL], gate_d_min: Tensor[f16, P, S, PANEL],
    up: Tensor[u8, P, G, HALF, PANEL], up_scale: Tensor[u8, P, G, 2, PANEL], up_minimum: Tensor[u8, P, G, 2, PANEL],
    up_d: Tensor[f16, P, S, PANEL], up_d_min: Tensor[f16, P, S, PANEL], x: Tensor[f32, G, 2, HALF],
    sums: Tensor[f32, G, 2], y: Tensor[f32, P, PANEL],
):
    for p in each(P):
        l = whole(PANEL)
        gate_sum = zeros(l, dtype=f32)
        up_sum = zeros(l, dtype=f32)
        for g in each(G):
            gate_sum += q4k_group(gate, gate_scale, gate_minimum, gate_d, gate_d_min, x, sums, p, g, l)
            up_sum += q4k_group(up, up_scale, up_minimum, up_d, up_d_min, x, sums, p, g, l)
        y[p, l] = silu(gate_sum) * up_sum


@sp.kernel
def matvec_q6k(
    quants: Tensor[i8, P, G, SIXTEEN, PANEL], scale: Tensor[i8, P, G, PANEL], d: Tensor[f16, P, S, PANEL],
    x: Tensor[f32, G, SIXTEEN], y: Tensor[f32, P, PANEL],
):
    for p in each(P):
        l = whole(PANEL)
        acc = zeros(l, dtype=f32)
        for g in each(G):
            acc += q6k_group(quants, scale, d, x, p, g, l)
        y[p, l] = acc


@sp.kernel
def matvec_residual_q6k(
    quants: Tensor[i8, P, G, SIXTEEN, PANEL], scale: Tensor[i8, P, G, PANEL], d: Tensor[f16, P, S, PANEL],
    x: Tensor[f32, G, SIXTEEN], residual: Tensor[f32, P, PANEL], y: Tensor[f32, P, PANEL],
):
    for p in each(P):
        l = whole(PANEL)
        acc = zeros(l, dtype=f32)
        for g in each(G):
            acc += q6k_group(quants, scale, d, x, p, g, l)
        y[p, l] = residual[p, l] + acc


@sp.kernel
def matvec_swiglu_q6k(
    gate: Tensor[i8, P, G, SIXTEEN, PANEL], gate_scale: Tensor[i8, P, G, PANEL], gate_d: Tensor[f16, P, S, PANEL],
    up: Tensor[i8, P, G, SIXTEEN, PANEL], up_scale: Tensor[i8, P, G, PANEL], up_d: Tensor[f16, P, S, PANEL],
    x: Tensor[f32, G, SIXTEEN], y: Tensor[f32, P, PANEL],
):
    for p in each(P):
        l = whole(PANEL)
        gate_sum = zeros(l, dtype=f32)
        up_sum = zeros(l, dtype=f32)
        for g in each(G):
            gate_sum += q6k_group(gate, gate_scale, gate_d, x, p, g, l)
            up_sum += q6k_group(up, up_scale, up_d, x, p, g, l)
        y[p, l] = silu(gate_sum) * up_sum


@sp.kernel
def dequantize_q4k(
    quants: Tensor[u8, P, G, HALF, PANEL], scale: Tensor[u8, P, G, 2, PANEL], minimum: Tensor[u8, P, G, 2, PANEL],
    d: Tensor[f16, P, S, PANEL], d_min: Tensor[f16, P, S, PANEL], y: Tensor[f32, P, PANEL, G, 2, HALF],
):
    """A matrix [N, K], row by row."""
    for p, g in each(P, G):
        l = whole(PANEL)
        i = whole(HALF)
        packed = quants[p, g, i, l].to(i32)
        all_scale, all_least = d[p, g // 4, l].to(f32), d_min[p, g // 4, l].to(f32)
        least = all_least * minimum[p, g, 0, l].to(f32)
        y[p, l, g, 0, i] = (all_scale * scale[p, g, 0, l].to(f32)) * (packed & 15).to(f32) - least
        least = all_least * minimum[p, g, 1, l].to(f32)
        y[p, l, g, 1, i] = (all_scale * scale[p, g, 1, l].to(f32)) * (packed >> 4).to(f32) - least


@sp.kernel
def dequantize_q6k(
    quants: Tensor[i8, P, G, SIXTEEN, PANEL], scale: Tensor[i8, P, G, PANEL], d: Tensor[f16, P, S, PANEL],
    y: Tensor[f32, P, PANEL, G, SIXTEEN],
):
    """A matrix [N, K], row by row."""
    for p, g in each(P, G):
        l = whole(PANEL)
        i = whole(SIXTEEN)
        y[p, l, g, i] = (d[p, g // 16, l].to(f32) * scale[p, g, l].to(f32)) * quants[p, g, i, l].to(f32)


@sp.kernel
def embedding_q4k(
    tokens: Tensor[i32, T], quants: Tensor[u8, P, G, HALF, PANEL], scale: Tensor[u8, P, G, 2, PANEL],
    minimum: Tensor[u8, P, G, 2, PANEL], d: Tensor[f16, P, S, PANEL], d_min: Tensor[f16, P, S, PANEL],
    y: Tensor[f32, T, G, 2, HALF],
):
    """Rows tokens[t] of the matrix. The caller sees to it that 0 <= tokens[t] < N."""
    for t in each(T):
        p = tokens[t] // PANEL
        l = tokens[t] % PANEL
        for g in each(G):
            i = whole(HALF)
            packed = quants[p, g, i, l].to(i32)
            all_scale, all_least = d[p, g // 4, l].to(f32), d_min[p, g // 4, l].to(f32)
            least = all_least * minimum[p, g, 0, l].to(f32)
            y[t, g, 0, i] = (all_scale * scale[p, g, 0, l].to(f32)) * (packed & 15).to(f32) - least
            least = all_least * minimum[p, g, 1, l].to(f32)
            y[t, g, 1, i] = (all_scale * scale[p, g, 1, l].to(f32)) * (packed >> 4).to(f32) - least


@sp.kernel
def embedding_q6k(
    tokens: Tensor[i32, T], quants: Tensor[i8, P, G, SIXTEEN, PANEL], scale: Tensor[i8, P, G, PANEL],
    d: Tensor[f16, P, S, PANEL], y: Tensor[f32, T, G, SIXTEEN],
):
    """Rows tokens[t] of the matrix. The caller sees to it that 0 <= tokens[t] < N."""
    for t in each(T):
        p = tokens[t] // PANEL
        l = tokens[t] % PANEL
        for g in each(G):
            i = whole(SIXTEEN)
            y[t, g, i] = (d[p, g // 16, l].to(f32) * scale[p, g, l].to(f32)) * quants[p, g, i, l].to(f32)


@sp.kernel
def half_group_sums(x: Tensor[f32, G, 2, HALF], sums: Tensor[f32, G, 2]):
    for g in each(G):
        i = whole(HALF)
        sums[g, 0] = sum(x[g, 0, i], over=i)
        sums[g, 1] = sum(x[g, 1, i], over=i)


# ------------------------------------------------------------------------------------------------- layout and reference


def to_panels(rows: Array) -> Array:
    """[N, G, ...] to [N / 16, G, ..., 16], as a view; N a multiple of 16."""
    return np.moveaxis(rows.reshape(-1, PANEL, *rows.shape[1:]), 1, -1)


def split_q4k(raw: Array) -> tuple[Array, ...]:
    """Bytes [N, S, 144] of block_q4_K to quants [N, G, 32], scale, minimum [N, G, 2], d, d_min [N, S].

    d, d_min, 12 bytes with 8 scales and 8 minima of 6 bits (`get_scale_min_k4`, ggml-quants.c), 128 bytes of quants.
    """
    n, s = raw.shape[:2]
    d, d_min = (raw[:, :, at : at + 2].copy().view("<f2")[:, :, 0] for at in (0, 2))
    low, middle, high = (raw[:, :, 4 + at : 8 + at] for at in (0, 4, 8))
    scale = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=2)
    minimum = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=2)
    quants = raw[:, :, 16:].reshape(n, s * 4, HALF)
    return quants, scale.reshape(n, s * 4, 2), minimum.reshape(n, s * 4, 2), d, d_min


def split_q6k(raw: Array) -> tuple[Array, ...]:
    """Bytes [N, S, 210] of block_q6_K to quants [N, G, 16], scale [N, G], d [N, S].

    128 bytes with the lower 4 bits, 64 with the upper 2, 16 scales, d. Of 128 weights, byte i of 64 has the lower bits
    of weights i and 64 + i; byte i of 32 the upper bits of weights i, 32 + i, 64 + i and 96 + i.
    """
    n, s = raw.shape[:2]
    lower = raw[:, :, :128].reshape(n, s, 2, 1, 64)
    upper = raw[:, :, 128:192].reshape(n, s, 2, 1, 32)
    four = np.concatenate([lower & 15, lower >> 4], axis=3).reshape(n, s, 2, 4, 32)
    two = (upper >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    quants = (four | (two << 4)).astype(np.int8) - np.int8(32)
    scale = raw[:, :, 192:208].copy().view(np.int8)
    d = raw[:, :, 208:].copy().view("<f2")[:, :, 0]
    return quants.reshape(n, s * 16, SIXTEEN), scale.reshape(n, s * 16), d


def matrix(form: str, parts: tuple[Array, ...]) -> Array:
    """The matrix [N, K] of panels, in float64."""
    per = GROUPS[form]
    if form == "q4k":
        quants, scale, minimum, d, d_min = (part.astype(np.float64) for part in parts)
        both = np.stack([parts[0] & 15, parts[0] >> 4], axis=2).astype(np.float64)
        d, d_min = (np.repeat(one, per, axis=1)[:, :, None] for one in (d, d_min))
        wide = both * (scale * d)[:, :, :, None] - (minimum * d_min)[:, :, :, None]
    else:
        quants, scale, d = (part.astype(np.float64) for part in parts)
        wide = quants * (scale * np.repeat(d, per, axis=1))[:, :, None]
    columns = int(np.prod(wide.shape[1:-1]))
    found: Array = np.moveaxis(wide, -1, 1).reshape(len(wide) * PANEL, columns)
    return found


NAMES = {"q4k": ("quants", "scale", "minimum", "d", "d_min"), "q6k": ("quants", "scale", "d")}


def _names(form: str, prefix: str) -> tuple[str, ...]:
    return tuple(prefix if name == "quants" else f"{prefix}_{name}" for name in NAMES[form]) if prefix else NAMES[form]


def _matrix_of(arguments: Arguments, form: str, prefix: str = "") -> Array:
    return matrix(form, tuple(arguments[name] for name in _names(form, prefix)))


def reference(arguments: Arguments, form: str) -> dict[str, Array]:
    if "sums" in arguments and "quants" not in arguments and "gate" not in arguments:
        return {"sums": arguments["x"].astype(np.float64).sum(axis=2)}
    if "x" not in arguments:
        wide = _matrix_of(arguments, form)
        wide = wide[arguments["tokens"]] if "tokens" in arguments else wide
        return {"y": wide.reshape(arguments["y"].shape)}
    x = arguments["x"].astype(np.float64).reshape(-1)
    if "gate" in arguments:
        found = silu_reference(_matrix_of(arguments, form, "gate") @ x) * (_matrix_of(arguments, form, "up") @ x)
    else:
        found = _matrix_of(arguments, form) @ x
    found = found.reshape(arguments["y"].shape)
    return {"y": arguments["residual"] + found if "residual" in arguments else found}


def random_parts(random: np.random.Generator, form: str, p: int, s: int) -> tuple[Array, ...]:
    """Weights near 1 / sqrt(K)."""
    g = s * GROUPS[form]
    unit = 1.0 / np.sqrt(SUPER * s + 1.0)
    d = (unit * random.uniform(0.002, 0.005, (p, s, PANEL))).astype(np.float16)
    if form == "q6k":
        quants = random.integers(-32, 32, (p, g, SIXTEEN, PANEL)).astype(np.int8)
        return quants, random.integers(-128, 128, (p, g, PANEL)).astype(np.int8), (d / 2).astype(np.float16)
    quants = random.integers(0, 256, (p, g, HALF, PANEL)).astype(np.uint8)
    scale, minimum = (random.integers(0, 64, (p, g, 2, PANEL)).astype(np.uint8) for _ in range(2))
    return quants, scale, minimum, d, (d * np.float16(7.5)).astype(np.float16)


def make_arguments(random: np.random.Generator, shape: Shape, form: str, task: str) -> Arguments:
    g = shape["G"]
    inside = (2, HALF) if form == "q4k" else (SIXTEEN,)
    x = normal(random, g, *inside)
    if task == "sums":
        return {"x": x, "sums": unwritten(g, 2)}
    p, s = shape["P"], shape["S"]
    arguments: Arguments = {}
    for prefix in ("gate", "up") if task == "swiglu" else ("",):
        arguments |= dict(zip(_names(form, prefix), random_parts(random, form, p, s), strict=True))
    if task == "dequantize":
        return arguments | {"y": unwritten(p, PANEL, g, *inside)}
    if task == "embedding":
        t = shape["T"]
        tokens = random.integers(0, max(1, p * PANEL), t).astype(np.int32)
        return {"tokens": tokens} | arguments | {"y": unwritten(t, g, *inside)}
    arguments["x"] = x
    if form == "q4k":
        arguments["sums"] = x.astype(np.float64).sum(axis=2).astype(np.float32)
    if task == "residual":
        arguments["residual"] = normal(random, p, PANEL)
    return arguments | {"y": unwritten(p, PANEL)}


SUM = Tolerance(
    2e-5, 5e-5, "a sum of K rounded products near 1 / sqrt(K) in any order, of parts that partly cancel"
)
PLAIN = Tolerance(2e-6, 1e-6, "products and a difference, each rounded once, of parts that partly cancel")
GROUP_BYTES = {"q4k": HALF + 4 + 1, "q6k": SIXTEEN + 1 + 1 / 8}
"""Of a row: quants, scales, and a share of what 256 weights have in common."""


def _entry(kernel: Any, form: str, task: str) -> LibraryKernel:
    per, count = GROUPS[form], 2 if task == "swiglu" else 1
    cases = []
    for p, s in ((128, 8), (896, 16)):
        g, n, k = s * per, p * PANEL, s * SUPER
        shape = {"P": p, "G": g, "S": s} if task != "sums" else {"G": g}
        weights = round(count * n * g * GROUP_BYTES[form])
        if task == "sums":
            cases.append(Case(shape, flops=k, bytes=4 * (k + 2 * g)))
        elif task == "embedding":
            row_bytes = 4 * k + g * GROUP_BYTES[form]
            cases.append(Case(shape | {"T": 128}, flops=2 * 128 * k, bytes=round(128 * row_bytes)))
        elif task == "dequantize":
            cases.append(Case(shape, flops=2 * n * k, bytes=weights + 4 * n * k))
        else:
            vectors = n * (2 if task == "residual" else 1) + k + (2 * g if form == "q4k" else 0)
            cases.append(Case(shape, flops=2 * count * n * k, bytes=weights + 4 * vectors))
    check_shapes = [{"P": p, "G": s * per, "S": s} for p, s in ((0, 1), (1, 1), (3, 2), (2, 3))]
    if task == "sums":
        check_shapes = [{"G": 4}, {"G": 12}]
    elif task == "embedding":
        check_shapes = [shape | {"T": 3} for shape in check_shapes[1:]]
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=lambda arguments: reference(arguments, form),
        make_arguments=lambda random, shape: make_arguments(random, shape, form, task),
        tolerance=PLAIN if task in ("dequantize", "embedding") else SUM, cases=tuple(cases),
        check_shapes=tuple(check_shapes), dtype=form,
    )


KERNELS = (
    _entry(matvec_q4k, "q4k", ""),
    _entry(matvec_residual_q4k, "q4k", "residual"),
    _entry(matvec_swiglu_q4k, "q4k", "swiglu"),
    _entry(matvec_q6k, "q6k", ""),
    _entry(matvec_residual_q6k, "q6k", "residual"),
    _entry(matvec_swiglu_q6k, "q6k", "swiglu"),
    _entry(dequantize_q4k, "q4k", "dequantize"),
    _entry(dequantize_q6k, "q6k", "dequantize"),
    _entry(embedding_q4k, "q4k", "embedding"),
    _entry(embedding_q6k, "q6k", "embedding"),
    _entry(half_group_sums, "q4k", "sums"),
)
