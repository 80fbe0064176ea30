"""Weights in fp8 with a scale for each block of 128 x 128, used as they are: matrix times vector, embedding, widening.

A matrix [N, K] lies in panels of 16 rows, w [P, K, 16], so that a panel is one stream from memory and its rows are
neighbours among the lanes. scale [A, B] has its blocks' scales; place [P] says which row of them is a panel's, so that
matrices may be put together though their rows are no multiples of 128. Neither N nor K need be one: 576 and 10944 of
DeepSeek's are not.

A scale is the same for 128 rows, so it is the vector that is scaled, once for every row of scales: x [A, K] is
x[k] * scale[a, k // 128], made by `scale_inputs`. Products and sums are f32, the weights exact.

    matvec_fp8, matvec_residual_fp8, matvec_swiglu_fp8        w @ x; residual + w @ x; silu(gate @ x) * (up @ x)
    expert_matvec_swiglu_fp8                                  y[s] = silu(gate[e] @ x) * (up[e] @ x), e = experts[s]
    expert_matvec_fp8                                         y = residual + sum over s of w[e] @ x[s]
    scale_expert_inputs, scale_weighted_expert_inputs         x of the experts' scales [E, A, B], times weights[s]
    matmul_few_fp8, matmul_few_residual_fp8, matmul_few_swiglu_fp8
                                                              the same for FEW_ROWS of x or fewer [M, K], y [M, P, 16],
                                                              which widen the weights as they meet them, all in f32
    embedding_fp8, dequantize_panels_fp8                      rows; all of them, in f32
    join_panels_fp8                                           all of them in bf16, exactly, without scales, in slots
    matmul_fp8, matmul_residual_fp8, matmul_swiglu_fp8        of these, for many rows in bf16, y [M, P, 16]: products by
                                                              packed dot products, each block's sum scaled in f32

Format: DeepSeek-V3 technical report, section 3.3.2 (scales of 128 x 128); OCP 8-bit Floating Point Specification.
"""

from typing import Any

import ml_dtypes
import numpy as np

import sapper as sp
from sapper import Tensor, bf16, each, f8e4m3, f32, i32, minimum, span, tiles, whole, zeros

from .activation import silu, silu_reference
from .fp8 import BLOCK, blocks
from .record import EXACT, Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

PANEL = 16
A, B, E, H, K, M, P, S, T = sp.dims("A B E H K M P S T")
HALF_BLOCK = BLOCK // 2
FEW_ROWS = 16
"""On a Cascade Lake 16 rows that widen what they meet take as long as widening it for all of them before, and 12 rows
three quarters of that: they are met in one piece (moe_fp8.py)."""
NAN_CODE = 0x7F


@sp.kernel
def scale_inputs(x: Tensor[f32, K], scale: Tensor[f32, A, B], y: Tensor[f32, A, K]):
    for a in each(A):
        for b in each(B):
            factor = scale[a, b]
            for k in tiles(span(b * BLOCK, minimum(b * BLOCK + BLOCK, K))):
                y[a, k] = x[k] * factor


@sp.kernel
def scale_expert_inputs(
    x: Tensor[f32, K], scale: Tensor[f32, E, A, B], experts: Tensor[i32, S], y: Tensor[f32, S, A, K]
):
    for s, a in each(S, A):
        e = experts[s]
        for b in each(B):
            factor = scale[e, a, b]
            for k in tiles(span(b * BLOCK, minimum(b * BLOCK + BLOCK, K))):
                y[s, a, k] = x[k] * factor


@sp.kernel
def scale_weighted_expert_inputs(
    x: Tensor[f32, S, K], scale: Tensor[f32, E, A, B], experts: Tensor[i32, S], weights: Tensor[f32, S],
    y: Tensor[f32, S, A, K],
):
    for s, a in each(S, A):
        e = experts[s]
        for b in each(B):
            factor = scale[e, a, b] * weights[s]
            for k in tiles(span(b * BLOCK, minimum(b * BLOCK + BLOCK, K))):
                y[s, a, k] = x[s, k] * factor


@sp.kernel
def matvec_fp8(w: Tensor[f8e4m3, P, K, PANEL], place: Tensor[i32, P], x: Tensor[f32, A, K], y: Tensor[f32, P, PANEL]):
    for p in each(P):
        a = place[p]
        l = whole(PANEL)
        acc = zeros(l, dtype=f32)
        for k in tiles(K):
            acc += w[p, k, l].to(f32) @ x[a, k]
        y[p, l] = acc


@sp.kernel
def matvec_residual_fp8(
    w: Tensor[f8e4m3, P, K, PANEL], place: Tensor[i32, P], x: Tensor[f32, A, K], residual: Tensor[f32, P, PANEL],
    y: Tensor[f32, P, PANEL],
):
    for p in each(P):
        a = place[p]
        l = whole(PANEL)
        acc = zeros(l, dtype=f32)
        for k in tiles(K):
            acc += w[p, k, l].to(f32) @ x[a, k]
        y[p, l] = residual[p, l] + acc


@sp.kernel
def matvec_swiglu_fp8(
    gate: Tensor[f8e4m3, P, K, PANEL], up: Tensor[f8e4m3, P, K, PANEL], place: Tensor[i32, P],
    gate_x: Tensor[f32, A, K], up_x: Tensor[f32, A, K], y: Tensor[f32, P, PANEL],
):
    for p in each(P):
        a = place[p]
        l = whole(PANEL)
        gate_sum = zeros(l, dtype=f32)
        up_sum = zeros(l, dtype=f32)
        for k in tiles(K):
            gate_sum += gate[p, k, l].to(f32) @ gate_x[a, k]
            up_sum += up[p, k, l].to(f32) @ up_x[a, k]
        y[p, l] = silu(gate_sum) * up_sum


@sp.kernel
def expert_matvec_swiglu_fp8(
    gate: Tensor[f8e4m3, E, P, K, PANEL], up: Tensor[f8e4m3, E, P, K, PANEL], place: Tensor[i32, P],
    experts: Tensor[i32, S], gate_x: Tensor[f32, S, A, K], up_x: Tensor[f32, S, A, K], y: Tensor[f32, S, P, PANEL],
):
    for s, p in each(S, P):
        e = experts[s]
        a = place[p]
        l = whole(PANEL)
        gate_sum = zeros(l, dtype=f32)
        up_sum = zeros(l, dtype=f32)
        for k in tiles(K):
            gate_sum += gate[e, p, k, l].to(f32) @ gate_x[s, a, k]
            up_sum += up[e, p, k, l].to(f32) @ up_x[s, a, k]
        y[s, p, l] = silu(gate_sum) * up_sum


@sp.kernel
def expert_matvec_fp8(
    w: Tensor[f8e4m3, E, P, K, PANEL], place: Tensor[i32, P], experts: Tensor[i32, S], x: Tensor[f32, S, A, K],
    residual: Tensor[f32, P, PANEL], y: Tensor[f32, P, PANEL],
):
    for p in each(P):
        a = place[p]
        l = whole(PANEL)
        total = residual[p, l]
        for s in each(S):
            e = experts[s]
            acc = zeros(l, dtype=f32)
            for k in tiles(K):
                acc += w[e, p, k, l].to(f32) @ x[s, a, k]
            total += acc
        y[p, l] = total


@sp.kernel
def join_panels_fp8(w: Tensor[f8e4m3, P, K, PANEL], slots: Tensor[bf16, P, H, PANEL, 2]):
    """The numbers as bf16, which holds them exactly, two neighbours along K in a slot; K = 2 * H."""
    pairs, joined = w.view(P, K // 2, 2, PANEL), slots.view(P, H, PANEL, dtype=i32)
    for p, h in tiles(P, H):
        l = whole(PANEL)
        low, high = pairs[p, h, 0, l].to(f32).bits(i32), pairs[p, h, 1, l].to(f32).bits(i32)
        joined[p, h, l] = low >> 16 & 0xFFFF | high & -65536


def block_sum(w: Any, x: Any, part: Any, b: Any, p: Any, m: Any, l: Any) -> Any:
    """The products of a block of the depth. part: zeros over m, p and l."""
    for h in tiles(span(b * HALF_BLOCK, minimum(b * HALF_BLOCK + HALF_BLOCK, H))):
        s = whole(2)
        part += x[m, h, s] @ w[p, h, l, s]
    return part


@sp.kernel
def matmul_fp8(
    w: Tensor[bf16, P, H, PANEL, 2], scale: Tensor[f32, A, B], place: Tensor[i32, P], x: Tensor[bf16, M, H, 2],
    y: Tensor[f32, M, P, PANEL],
):
    for p, m in tiles(P, M):
        l = whole(PANEL)
        acc = zeros(m, p, l, dtype=f32)
        for b in each(B):
            acc += block_sum(w, x, zeros(m, p, l, dtype=f32), b, p, m, l) * scale[place[p], b]
        y[m, p, l] = acc


@sp.kernel
def matmul_residual_fp8(
    w: Tensor[bf16, P, H, PANEL, 2], scale: Tensor[f32, A, B], place: Tensor[i32, P], x: Tensor[bf16, M, H, 2],
    residual: Tensor[f32, M, P, PANEL], y: Tensor[f32, M, P, PANEL],
):
    for p, m in tiles(P, M):
        l = whole(PANEL)
        acc = zeros(m, p, l, dtype=f32)
        for b in each(B):
            acc += block_sum(w, x, zeros(m, p, l, dtype=f32), b, p, m, l) * scale[place[p], b]
        y[m, p, l] = residual[m, p, l] + acc


@sp.kernel
def matmul_swiglu_fp8(
    gate: Tensor[bf16, P, H, PANEL, 2], gate_scale: Tensor[f32, A, B], up: Tensor[bf16, P, H, PANEL, 2],
    up_scale: Tensor[f32, A, B], place: Tensor[i32, P], x: Tensor[bf16, M, H, 2], y: Tensor[f32, M, P, PANEL],
):
    for p, m in tiles(P, M):
        l = whole(PANEL)
        gate_sum = zeros(m, p, l, dtype=f32)
        up_sum = zeros(m, p, l, dtype=f32)
        for b in each(B):
            gate_sum += block_sum(gate, x, zeros(m, p, l, dtype=f32), b, p, m, l) * gate_scale[place[p], b]
            up_sum += block_sum(up, x, zeros(m, p, l, dtype=f32), b, p, m, l) * up_scale[place[p], b]
        y[m, p, l] = silu(gate_sum) * up_sum


def panel_sum(w: Any, scale: Any, x: Any, acc: Any, a: Any, p: Any, m: Any, l: Any) -> Any:
    """The products of rows with a panel, each block's scaled. acc: zeros over m and l."""
    for b in each(B):
        part = zeros(m, l, dtype=f32)
        for k in tiles(span(b * BLOCK, minimum(b * BLOCK + BLOCK, K))):
            part += x[m, k] @ w[p, k, l].to(f32)
        acc += part * scale[a, b]
    return acc


@sp.kernel
def matmul_few_fp8(
    w: Tensor[f8e4m3, P, K, PANEL], scale: Tensor[f32, A, B], place: Tensor[i32, P], x: Tensor[f32, M, K],
    y: Tensor[f32, M, P, PANEL],
):
    for p in each(P):
        a = place[p]
        for m in tiles(M):
            l = whole(PANEL)
            acc = panel_sum(w, scale, x, zeros(m, l, dtype=f32), a, p, m, l)
            y[m, p, l] = acc


@sp.kernel
def matmul_few_residual_fp8(
    w: Tensor[f8e4m3, P, K, PANEL], scale: Tensor[f32, A, B], place: Tensor[i32, P], x: Tensor[f32, M, K],
    residual: Tensor[f32, M, P, PANEL], y: Tensor[f32, M, P, PANEL],
):
    for p in each(P):
        a = place[p]
        for m in tiles(M):
            l = whole(PANEL)
            acc = panel_sum(w, scale, x, zeros(m, l, dtype=f32), a, p, m, l)
            y[m, p, l] = residual[m, p, l] + acc


def gated_sum(gate: Any, gate_scale: Any, up: Any, up_scale: Any, x: Any, expert: tuple[Any, ...],
              panel: tuple[Any, ...], a: Any, m: Any, l: Any) -> Any:
    """silu(gate @ x) * (up @ x) of rows m and the lanes l of a panel, which are widened as they are met.

    expert: which of several matrices: (e,); or () where there is one. panel: its place in one. a: of its scales.
    """
    gate_sum = zeros(m, l, dtype=f32)
    up_sum = zeros(m, l, dtype=f32)
    for b in each(B):
        of_gate = zeros(m, l, dtype=f32)
        of_up = zeros(m, l, dtype=f32)
        for k in tiles(span(b * BLOCK, minimum(b * BLOCK + BLOCK, K))):
            row = x[m, k]
            of_gate += row @ gate[*expert, *panel, k, l].to(f32)
            of_up += row @ up[*expert, *panel, k, l].to(f32)
        gate_sum += of_gate * gate_scale[*expert, a, b]
        up_sum += of_up * up_scale[*expert, a, b]
    return silu(gate_sum) * up_sum


@sp.kernel
def matmul_few_swiglu_fp8(
    gate: Tensor[f8e4m3, P, K, PANEL], gate_scale: Tensor[f32, A, B], up: Tensor[f8e4m3, P, K, PANEL],
    up_scale: Tensor[f32, A, B], place: Tensor[i32, P], x: Tensor[f32, M, K], y: Tensor[f32, M, P, PANEL],
):
    for p in each(P):
        a = place[p]
        for m in tiles(M):
            l = whole(PANEL)
            y[m, p, l] = gated_sum(gate, gate_scale, up, up_scale, x, (), (p,), a, m, l)


@sp.kernel
def embedding_fp8(
    tokens: Tensor[i32, T], w: Tensor[f8e4m3, P, K, PANEL], scale: Tensor[f32, A, B], place: Tensor[i32, P],
    y: Tensor[f32, T, K],
):
    """Rows tokens[t] of the matrix. The caller sees to it that 0 <= tokens[t] < N."""
    for t in each(T):
        p = tokens[t] // PANEL
        l = tokens[t] % PANEL
        a = place[p]
        for k in tiles(K):
            y[t, k] = w[p, k, l].to(f32) * scale[a, k // BLOCK]


@sp.kernel
def dequantize_panels_fp8(
    w: Tensor[f8e4m3, P, K, PANEL], scale: Tensor[f32, A, B], place: Tensor[i32, P], y: Tensor[f32, P, PANEL, K]
):
    """A matrix [N, K], row by row."""
    for p in each(P):
        a = place[p]
        l = whole(PANEL)
        for b in each(B):
            factor = scale[a, b]
            for k in tiles(span(b * BLOCK, minimum(b * BLOCK + BLOCK, K))):
                y[p, l, k] = w[p, k, l].to(f32) * factor


# ------------------------------------------------------------------------------------------------- layout and reference


def to_panels(rows: Array) -> Array:
    """[N, K] to [N / 16, K, 16], as a view; N a multiple of 16."""
    return np.moveaxis(rows.reshape(-1, PANEL, rows.shape[1]), 1, -1)


def matrix(w: Array, scale: Array, place: Array) -> Array:
    """The matrix [N, K] of panels, in float64."""
    rows = np.moveaxis(w.astype(np.float64), -1, 1)
    factors = np.repeat(scale.astype(np.float64), BLOCK, axis=1)[place][:, None, : rows.shape[2]]
    wide: Array = (rows * factors).reshape(-1, rows.shape[2])
    return wide


def _plain(w: Array) -> Array:
    """The same without scales."""
    rows = np.moveaxis(w.astype(np.float64), -1, 1)
    return rows.reshape(-1, rows.shape[2])


def _products(w: Array, place: Array, x: Array) -> Array:
    """[P, L]: every panel times its row of x."""
    found: Array = np.einsum("pkl,pk->pl", w.astype(np.float64), x.astype(np.float64)[place])
    return found


def inputs_reference(arguments: Arguments) -> dict[str, Array]:
    scale = np.repeat(arguments["scale"].astype(np.float64), BLOCK, axis=-1)[..., : arguments["x"].shape[-1]]
    x = arguments["x"].astype(np.float64)
    if "experts" in arguments:
        scale = scale[arguments["experts"]]
    if "weights" in arguments:
        return {"y": x[:, None] * scale * arguments["weights"].astype(np.float64)[:, None, None]}
    return {"y": x * scale}


def matvec_reference(arguments: Arguments) -> dict[str, Array]:
    place = arguments["place"]
    if "gate" in arguments:
        gate, up = (_products(arguments[name], place, arguments[f"{name}_x"]) for name in ("gate", "up"))
        return {"y": silu_reference(gate) * up}
    found = _products(arguments["w"], place, arguments["x"])
    return {"y": arguments["residual"] + found if "residual" in arguments else found}


def product_reference(arguments: Arguments) -> dict[str, Array]:
    place, x = arguments["place"], arguments["x"].astype(np.float64)
    x = x.reshape(len(x), -1)

    def of(name: str, scale: str) -> Array:
        slots = arguments[name].astype(np.float64)
        rows = _plain(slots) if slots.ndim == 3 else np.moveaxis(slots, 2, 1).reshape(len(slots) * PANEL, x.shape[1])
        factors = np.repeat(arguments[scale].astype(np.float64), BLOCK, axis=1)[:, : x.shape[1]]
        found: Array = x @ (rows * np.repeat(factors[place], PANEL, axis=0)).T
        return found.reshape(arguments["y"].shape)

    if "gate" in arguments:
        return {"y": silu_reference(of("gate", "gate_scale")) * of("up", "up_scale")}
    found = of("w", "scale")
    return {"y": arguments["residual"] + found if "residual" in arguments else found}


def join_reference(arguments: Arguments) -> dict[str, Array]:
    w = arguments["w"].astype(ml_dtypes.bfloat16)
    return {"slots": w.reshape(len(w), -1, 2, PANEL).swapaxes(2, 3)}


def experts_reference(arguments: Arguments) -> dict[str, Array]:
    def of(name: str, x: str) -> Array:
        found = [_products(arguments[name][e], arguments["place"], arguments[x][s])
                 for s, e in enumerate(arguments["experts"])]
        return np.array(found).reshape(len(found), *arguments["y"].shape[-2:])

    if "gate" in arguments:
        return {"y": silu_reference(of("gate", "gate_x")) * of("up", "up_x")}
    return {"y": arguments["residual"] + of("w", "x").sum(axis=0)}


def rows_reference(arguments: Arguments) -> dict[str, Array]:
    wide = matrix(arguments["w"], arguments["scale"], arguments["place"])
    if "tokens" in arguments:
        wide = wide[arguments["tokens"]]
    return {"y": wide.reshape(arguments["y"].shape)}


def random_weights(random: "np.random.Generator", *extents: int) -> Array:
    """Numbers of the size that a quantiser leaves: up to 448. No NaN, which comes in check_codes."""
    return (random.standard_normal(extents) * 100).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)


def make_arguments(random: "np.random.Generator", shape: Shape, task: str) -> Arguments:
    p, k = shape.get("P", 0), shape["K"]
    a, b = shape.get("A", 1), blocks(k)
    unit = 0.01 / np.sqrt(k + 1.0)  # products near 1 / sqrt(K)
    arguments: Arguments = {}
    if task.endswith("inputs"):
        s = shape.get("S", 0)
        x = normal(random, *((s,) if "weighted" in task else ()), k)
        if task == "inputs":
            return {"x": x, "scale": normal(random, a, b), "y": unwritten(a, k)}
        arguments = {"x": x, "scale": normal(random, shape["E"], a, b)}
        arguments["experts"] = random.permutation(shape["E"])[:s].astype(np.int32)
        if "weighted" in task:
            arguments["weights"] = random.random(s, np.float32)
        return arguments | {"y": unwritten(s, a, k)}
    place = np.sort(random.integers(0, a, p)).astype(np.int32)
    if task == "join":
        w = random_weights(random, p, k, PANEL)
        if p:
            w.view(np.uint8)[0, 0, 0] = NAN_CODE
        return {"w": w, "slots": np.full((p, k // 2, PANEL, 2), np.nan, ml_dtypes.bfloat16)}
    if task.startswith("matmul"):
        m = shape["M"]
        for name in ("gate", "up") if "swiglu" in task else ("w",):
            weights = random_weights(random, p, k, PANEL) if "few" in task else random_weights(
                random, p, k // 2, PANEL, 2).astype(ml_dtypes.bfloat16)
            arguments |= {name: weights, "scale" if name == "w" else f"{name}_scale": normal(random, a, b)}
        x = normal(random, m, k, scale=unit) if "few" in task else normal(
            random, m, k // 2, 2, dtype="bf16", scale=unit)
        arguments |= {"place": place, "x": x}
        if task.endswith("residual"):
            arguments["residual"] = normal(random, m, p, PANEL)
        return arguments | {"y": unwritten(m, p, PANEL)}
    if task in ("embedding", "dequantize"):
        arguments = {"w": random_weights(random, p, k, PANEL), "scale": normal(random, a, b), "place": place}
        if p and k:
            arguments["w"].view(np.uint8)[0, 0, 0] = NAN_CODE
        if task == "dequantize":
            return arguments | {"y": unwritten(p, PANEL, k)}
        tokens = random.integers(0, max(1, p * PANEL), shape["T"]).astype(np.int32)
        return {"tokens": tokens} | arguments | {"y": unwritten(shape["T"], k)}
    experts = (shape["E"],) if "E" in shape else ()
    chosen = (shape["S"],) if "S" in shape else ()
    names = ("gate", "up") if "swiglu" in task else ("w",)
    arguments = {name: random_weights(random, *experts, p, k, PANEL) for name in names} | {"place": place}
    if experts:
        arguments["experts"] = random.permutation(shape["E"])[: shape["S"]].astype(np.int32)
    for name in names:
        arguments["x" if name == "w" else f"{name}_x"] = normal(random, *chosen, a, k, scale=unit)
    if task in ("residual", "experts"):
        arguments["residual"] = normal(random, p, PANEL)
    return arguments | {"y": unwritten(*(chosen if "swiglu" in task else ()), p, PANEL)}


SUM = Tolerance(1e-5, 2e-5, "a sum of K rounded products near 1 / sqrt(K) in any order")
ROUNDED = Tolerance(2.0**-22, 0.0, "one or two products, each rounded once")


def _shape(n: int, k: int, **more: int) -> dict[str, int]:
    return {"P": n // PANEL, "K": k, "A": max(1, blocks(n)), **more}


def _entry(kernel: Any, task: str, reference: Any) -> LibraryKernel:
    count = 2 if "swiglu" in task else 1
    e = {"E": 18, "S": 6} if "expert" in task else {}
    cases, check_shapes = [], []
    for n, k in ((7168, 2048), (2048, 7168)) if not e else ((1408, 2048),):
        shape = _shape(n, k, **e, **({"T": 128} if task == "embedding" else {}))
        chosen, a = shape.get("S", 1), shape["A"]
        if task == "join":
            cases.append(Case({"P": n // PANEL, "K": k, "H": k // 2}, flops=n * k, bytes=3 * n * k))
            continue
        if task.startswith("matmul"):
            few = "few" in task
            for m in (2, 16) if few else (16, 128, 512):
                results = 4 * m * n * (2 if task.endswith("residual") else 1)
                weights, numbers = (n * k, 4 * m * k) if few else (2 * n * k, 2 * m * k)
                cases.append(Case(
                    shape | {"M": m, "B": blocks(k)} if few else shape | {"H": k // 2, "M": m},
                    flops=2 * count * m * n * k,
                    bytes=count * (weights + 4 * a * blocks(k)) + 4 * (n // PANEL) + results + numbers))
            continue
        weights = chosen * n * k
        if task.endswith("inputs"):
            cases.append(Case({name: v for name, v in shape.items() if name != "P"}, flops=chosen * a * k,
                              bytes=4 * (chosen * a * (k + blocks(k)) + k)))
        elif task == "embedding":
            cases.append(Case(shape, flops=128 * k, bytes=128 * 5 * k))
        elif task == "dequantize":
            cases.append(Case(shape, flops=n * k, bytes=5 * n * k + 4 * (a * blocks(k) + n // PANEL)))
        else:
            cases.append(Case(shape, flops=2 * count * weights, bytes=count * (weights + 4 * chosen * a * k)
                              + 4 * (n // PANEL + n * (2 if task in ("residual", "experts") else 1))))
    few = "few" in task
    pairs = task == "join" or (task.startswith("matmul") and not few)
    for n, k in ((16, 34 if pairs else 1), (48, 128), (80, 200), (144, 448)):
        shape = _shape(n, k, **({"E": 4, "S": 3} if e else {}), **({"T": 5} if task == "embedding" else {}))
        if few:
            shape |= {"M": n // 8 + 1, "B": blocks(k)}
        if pairs:
            shape = {"P": n // PANEL, "K": k, "H": k // 2} if task == "join" else shape | {"H": k // 2, "M": n // 8 + 1}
        check_shapes.append({name: v for name, v in shape.items() if name != "P" or not task.endswith("inputs")})
    rounded = task.endswith("inputs") or task in ("embedding", "dequantize")
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=reference,
        make_arguments=lambda random, shape: make_arguments(random, shape, task),
        tolerance=EXACT if task == "join" else ROUNDED if rounded else SUM, cases=tuple(cases),
        check_shapes=tuple(check_shapes), dtype="fp8", products="bf16" if pairs and task != "join" else "f32",
    )


KERNELS = (
    _entry(scale_inputs, "inputs", inputs_reference),
    _entry(scale_expert_inputs, "expert_inputs", inputs_reference),
    _entry(scale_weighted_expert_inputs, "weighted_expert_inputs", inputs_reference),
    _entry(matvec_fp8, "", matvec_reference),
    _entry(matvec_residual_fp8, "residual", matvec_reference),
    _entry(matvec_swiglu_fp8, "swiglu", matvec_reference),
    _entry(expert_matvec_swiglu_fp8, "expert_swiglu", experts_reference),
    _entry(expert_matvec_fp8, "experts", experts_reference),
    _entry(join_panels_fp8, "join", join_reference),
    _entry(matmul_fp8, "matmul", product_reference),
    _entry(matmul_residual_fp8, "matmul_residual", product_reference),
    _entry(matmul_swiglu_fp8, "matmul_swiglu", product_reference),
    _entry(matmul_few_fp8, "matmul_few", product_reference),
    _entry(matmul_few_residual_fp8, "matmul_few_residual", product_reference),
    _entry(matmul_few_swiglu_fp8, "matmul_few_swiglu", product_reference),
    _entry(embedding_fp8, "embedding", rows_reference),
    _entry(dequantize_panels_fp8, "dequantize", rows_reference),
)
