"""Weights in blocks of 32 with a scale each, used as they are: matrices of any number of rows, vectors, embedding.

    q4   weight = scale * q + minimum, q 0 ... 15      GGUF's Q4_1, and Q4_0 with minimum = -8 * scale
    q8   weight = scale * (q - 128), q 0 ... 255       GGUF's Q8_0, whose quants are those less 128

A matrix [N, K] lies in panels of 16 rows, so that neighbours in memory are neighbours among the lanes, and each panel
is read from one end to the other. A lane of 32 bits takes four quants that are neighbours along K, as packed dot
products (`vpdpbusd`) want them: quants [P, B, W, 16, 4] and scales [P, B, S, 16], where row n is lane n % 16 of panel
n // 16, and column k is element k % 32 of block k // 32. Of q8, W is 8 and byte [w, lane, s] is element 4 * w + s of
its block. Of q4, W is 4, and the byte holds element 4 * w + s in its low half and that plus 16 in its high half, as in
GGUF. S is 1, for the scale, or 2, with the minimum.

There are two ways to multiply:

- **matmul**, for any number of rows: the activations are quantised too, each block of 32 of a row to i8 with a scale of
  its own (`quantize_blocks`, as llama.cpp does). The products of quants are summed exactly in i32, 64 by one
  instruction; each block's sum is then scaled. What this costs: |x - scale * q| <= scale / 2 = max|x| / 254 of a block,
  so that a product with a row w is off by at most the sum over blocks of max|x| / 254 times the sum of their |w|. As
  the errors are independent it is some 0.3 % of the two norms' product, over the root of K, in practice.
- **matvec**, one vector, with the activations in f32 as they are.

Of a block's sum over scale * q + minimum times x, only the sum over q * x needs every element: the scale is applied
once, and the minimum meets the sum of the block's x, which all rows share. What q8 adds to its quants is taken off by
what a block's sum begins with, -128 times the sum of its activations.
Formats: ggml's `block_q4_0`, `block_q4_1` and `block_q8_0`, ggml-common.h; its `quantize_row_q8_1_ref` for activations.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, abs, each, f16, f32, i8, i32, max, round, rsqrt, sum, tiles, u8, where, whole, zeros

from .activation import silu, silu_reference
from .record import EXACT, Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

P, B, C, M, T = sp.dims("P B C M T")
BLOCK, PANEL, SLOT = 32, 16, 4
HALVES = {"q4": 2, "q8": 1}
"""How many quants a byte holds."""
SCALES = {"q4": 2, "q8": 1}
"""A block's scale, and its minimum."""
OFFSET = 128
"""What the quants of q8 are larger by than GGUF's, so that they are unsigned."""
LARGEST = 127.0
"""The largest magnitude of a quantised activation."""


# ------------------------------------------------------------------------------------------------------------- kernels


def make_kernels(form: str) -> SimpleNamespace:
    """The kernels of one form of weights, and the functions on blocks that other kernels share (moe_blocks.py).

    matmul, matmul_residual, matmul_swiglu     y [M, P, 16] from what quantize_blocks makes of C >= M rows
    matvec, matvec_residual, matvec_swiglu     y [P, 16] from x [B, 32] in f32
    dequantize, embedding                      rows in f32
    """
    halves, scale_rows = HALVES[form], SCALES[form]
    words, half_bits = BLOCK // (SLOT * halves), 8 // halves
    mask = (1 << half_bits) - 1

    def block_sum(
        quants: Any, scales: Any, x: Any, x_scales: Any, starts: Any, p: Any, b: Any, m: Any, l: Any
    ) -> Any:
        """The products of one block of the panels p and the quantised rows m, summed: a tile over p, m and l."""
        w, s = whole(words), whole(SLOT)
        scale = scales[p, b, 0, l].to(f32) * x_scales[b, 0, m]
        if form == "q4":
            pairs = quants[p, b, w, l, s]
            products = (pairs & 15) @ x[b, m, 0, w, s] + (pairs >> 4) @ x[b, m, 1, w, s]
            return products.to(f32) * scale + scales[p, b, 1, l].to(f32) * x_scales[b, 1, m]
        return (quants[p, b, w, l, s] @ x[b, m, 0, w, s] + starts[b, m]).to(f32) * scale

    def weights(quants: Any, scales: Any, p: Any, b: Any, l: Any, h: Any, w: Any, s: Any) -> Any:
        """What is scaled, in f32: a tile over p, b, l, and h, w, s, the elements of a block. quants: four to an i32, as
        shifting a lane is quicker than reading bytes that lie apart."""
        q = quants[p, b, w, l] >> h.to(i32) * half_bits + s.to(i32) * 8 & mask
        return (q if form == "q4" else q - OFFSET).to(f32)

    def exact_sum(quants: Any, scales: Any, x: Any, p: Any, b: Any, l: Any, at: Any) -> Any:
        """The products of one block of the panels p and of block `at` of a vector in f32."""
        h, w, s = whole(halves), whole(words), whole(SLOT)
        products = weights(quants, scales, p, b, l, h, w, s) @ x[at, h, w, s]
        scaled = products * scales[p, b, 0, l].to(f32)
        if form == "q4":
            return scaled + scales[p, b, 1, l].to(f32) * sum(x[at, h, w, s], over=(h, w, s))
        return scaled

    def weight_rows(quants: Any, scales: Any, p: Any, b: Any, l: Any, h: Any, w: Any, s: Any) -> Any:
        scaled = weights(quants, scales, p, b, l, h, w, s) * scales[p, b, 0, l].to(f32)
        if form == "q4":
            return scaled + scales[p, b, 1, l].to(f32)
        return scaled

    @sp.kernel(name=f"matmul_{form}")
    def matmul(
        quants: Tensor[u8, P, B, words, PANEL, SLOT], scales: Tensor[f16, P, B, scale_rows, PANEL],
        x: Tensor[i8, B, C, BLOCK], x_scales: Tensor[f32, B, 2, C], starts: Tensor[i32, B, C],
        y: Tensor[f32, M, P, PANEL],
    ):
        parts, factors, begin = x.view(B, C, halves, words, SLOT), x_scales.view(B, 2, C), starts.view(B, C)
        for p, m in tiles(P, M):
            l = whole(PANEL)
            acc = zeros(m, p, l, dtype=f32)
            for b in each(B):
                acc += block_sum(quants, scales, parts, factors, begin, p, b, m, l)
            y[m, p, l] = acc

    @sp.kernel(name=f"matmul_residual_{form}")
    def matmul_residual(
        quants: Tensor[u8, P, B, words, PANEL, SLOT], scales: Tensor[f16, P, B, scale_rows, PANEL],
        x: Tensor[i8, B, C, BLOCK], x_scales: Tensor[f32, B, 2, C], starts: Tensor[i32, B, C],
        residual: Tensor[f32, M, P, PANEL], y: Tensor[f32, M, P, PANEL],
    ):
        parts, factors, begin = x.view(B, C, halves, words, SLOT), x_scales.view(B, 2, C), starts.view(B, C)
        for p, m in tiles(P, M):
            l = whole(PANEL)
            acc = zeros(m, p, l, dtype=f32)
            for b in each(B):
                acc += block_sum(quants, scales, parts, factors, begin, p, b, m, l)
            y[m, p, l] = residual[m, p, l] + acc

    @sp.kernel(name=f"matmul_swiglu_{form}")
    def matmul_swiglu(
        gate: Tensor[u8, P, B, words, PANEL, SLOT], gate_scales: Tensor[f16, P, B, scale_rows, PANEL],
        up: Tensor[u8, P, B, words, PANEL, SLOT], up_scales: Tensor[f16, P, B, scale_rows, PANEL],
        x: Tensor[i8, B, C, BLOCK], x_scales: Tensor[f32, B, 2, C], starts: Tensor[i32, B, C],
        y: Tensor[f32, M, P, PANEL],
    ):
        parts, factors, begin = x.view(B, C, halves, words, SLOT), x_scales.view(B, 2, C), starts.view(B, C)
        for p, m in tiles(P, M):
            l = whole(PANEL)
            gate_sum = zeros(m, p, l, dtype=f32)
            up_sum = zeros(m, p, l, dtype=f32)
            for b in each(B):
                gate_sum += block_sum(gate, gate_scales, parts, factors, begin, p, b, m, l)
                up_sum += block_sum(up, up_scales, parts, factors, begin, p, b, m, l)
            y[m, p, l] = silu(gate_sum) * up_sum

    @sp.kernel(name=f"matvec_{form}")
    def matvec(
        quants: Tensor[u8, P, B, words, PANEL, SLOT], scales: Tensor[f16, P, B, scale_rows, PANEL],
        x: Tensor[f32, B, BLOCK], y: Tensor[f32, P, PANEL],
    ):
        joined, parts = quants.view(P, B, words, PANEL, dtype=i32), x.view(B, halves, words, SLOT)
        for p in tiles(P):
            l = whole(PANEL)
            acc = zeros(p, l, dtype=f32)
            for b in each(B):
                acc += exact_sum(joined, scales, parts, p, b, l, b)
            y[p, l] = acc

    @sp.kernel(name=f"matvec_residual_{form}")
    def matvec_residual(
        quants: Tensor[u8, P, B, words, PANEL, SLOT], scales: Tensor[f16, P, B, scale_rows, PANEL],
        x: Tensor[f32, B, BLOCK], residual: Tensor[f32, P, PANEL], y: Tensor[f32, P, PANEL],
    ):
        joined, parts = quants.view(P, B, words, PANEL, dtype=i32), x.view(B, halves, words, SLOT)
        for p in tiles(P):
            l = whole(PANEL)
            acc = zeros(p, l, dtype=f32)
            for b in each(B):
                acc += exact_sum(joined, scales, parts, p, b, l, b)
            y[p, l] = residual[p, l] + acc

    @sp.kernel(name=f"matvec_swiglu_{form}")
    def matvec_swiglu(
        gate: Tensor[u8, P, B, words, PANEL, SLOT], gate_scales: Tensor[f16, P, B, scale_rows, PANEL],
        up: Tensor[u8, P, B, words, PANEL, SLOT], up_scales: Tensor[f16, P, B, scale_rows, PANEL],
        x: Tensor[f32, B, BLOCK], y: Tensor[f32, P, PANEL],
    ):
        gates, ups = gate.view(P, B, words, PANEL, dtype=i32), up.view(P, B, words, PANEL, dtype=i32)
        parts = x.view(B, halves, words, SLOT)
        for p in tiles(P):
            l = whole(PANEL)
            gate_sum = zeros(p, l, dtype=f32)
            up_sum = zeros(p, l, dtype=f32)
            for b in each(B):
                gate_sum += exact_sum(gates, gate_scales, parts, p, b, l, b)
                up_sum += exact_sum(ups, up_scales, parts, p, b, l, b)
            y[p, l] = silu(gate_sum) * up_sum

    @sp.kernel(name=f"dequantize_{form}")
    def dequantize(
        quants: Tensor[u8, P, B, words, PANEL, SLOT], scales: Tensor[f16, P, B, scale_rows, PANEL],
        out: Tensor[f32, P, PANEL, B, BLOCK],
    ):
        """A matrix [N, K], row by row."""
        joined, parts = quants.view(P, B, words, PANEL, dtype=i32), out.view(P, PANEL, B, halves, words, SLOT)
        for p, b in tiles(P, B):
            l, h, w, s = whole(PANEL), whole(halves), whole(words), whole(SLOT)
            parts[p, l, b, h, w, s] = weight_rows(joined, scales, p, b, l, h, w, s)

    @sp.kernel(name=f"embedding_{form}")
    def embedding(
        tokens: Tensor[i32, T], quants: Tensor[u8, P, B, words, PANEL, SLOT],
        scales: Tensor[f16, P, B, scale_rows, PANEL], y: Tensor[f32, T, B, BLOCK],
    ):
        """Rows tokens[t] of the matrix. The caller sees to it that 0 <= tokens[t] < N."""
        joined, parts = quants.view(P, B, words, PANEL, dtype=i32), y.view(T, B, halves, words, SLOT)
        for t in each(T):
            p = tokens[t] // PANEL
            l = tokens[t] % PANEL
            for b in tiles(B):
                h, w, s = whole(halves), whole(words), whole(SLOT)
                parts[t, b, h, w, s] = weight_rows(joined, scales, p, b, l, h, w, s)

    return SimpleNamespace(
        matmul=matmul, matmul_residual=matmul_residual, matmul_swiglu=matmul_swiglu, matvec=matvec,
        matvec_residual=matvec_residual, matvec_swiglu=matvec_swiglu, dequantize=dequantize, embedding=embedding,
        block_sum=block_sum, exact_sum=exact_sum,
    )


FORMS = {form: make_kernels(form) for form in HALVES}
"""The kernels of each form, by name."""


def quantized(vector: Any, i: Any) -> Any:
    """Blocks over i: the factors that undo their quantisation, and the quants as whole numbers in f32."""
    largest = max(abs(vector), over=i)
    return largest / LARGEST, round(vector * where(largest > 0.0, LARGEST / largest, 0.0))


@sp.kernel
def quantize_blocks(
    x: Tensor[f32, M, B, BLOCK], q: Tensor[i8, B, C, BLOCK], scales: Tensor[f32, B, 2, C], starts: Tensor[i32, B, C],
):
    """Rows in blocks of 32: x is about scale * q, scale = max|x| / 127 of the block. A row's blocks lie apart, so that
    those of many rows are read together. scales: the scale, and scale times the sum of q. starts: -128 times the
    sum."""
    places, factors, begin = q.view(B, C, BLOCK), scales.view(B, 2, C), starts.view(B, C)  # of which M are filled
    for m, b in tiles(M, B):
        i = whole(BLOCK)
        scale, quants = quantized(x[m, b, i], i)
        places[b, m, i] = quants.to(i8)
        total = sum(quants, over=i)
        factors[b, 0, m] = scale
        factors[b, 1, m] = scale * total
        begin[b, m] = total.to(i32) * -OFFSET


@sp.kernel
def rms_norm_quantize_blocks(
    x: Tensor[f32, B, BLOCK], gain: Tensor[f32, B, BLOCK], epsilon: f32, q: Tensor[i8, B, 1, BLOCK],
    scales: Tensor[f32, B, 2, 1], starts: Tensor[i32, B, 1],
):
    """RMSNorm (Zhang and Sennrich, 2019) of one vector, quantised as by quantize_blocks."""
    b = whole(B)
    i = whole(BLOCK)
    vector = x[b, i]
    factor = rsqrt(sum(sum(vector * vector, over=i), over=b) / (B * BLOCK).to(f32) + epsilon)
    scale, quants = quantized(vector * factor * gain[b, i], i)
    q[b, 0, i] = quants.to(i8)
    total = sum(quants, over=i)
    scales[b, 0, 0] = scale
    scales[b, 1, 0] = scale * total
    starts[b, 0] = total.to(i32) * -OFFSET


# ------------------------------------------------------------------------------------------------- layout and reference


def panel_shapes(parts: Sequence[Array], rows: int, blocks: int) -> list[tuple[tuple[int, ...], Any]]:
    """Shape and dtype of quants and scales in panels, for rows of GGUF's blocks (see fill_panels)."""
    quants, *scales = parts
    panels = rows // PANEL
    return [((panels, blocks, quants.shape[2] // SLOT, PANEL, SLOT), np.dtype(np.uint8)),
            ((panels, blocks, len(scales), PANEL), scales[0].dtype)]


def fill_panels(targets: Sequence[Array], quants: Array, *scales: Array) -> None:
    """Puts GGUF's blocks of rows, quants [N, B, 16] (two to a byte) or [N, B, 32] (i8) and scales [N, B], in panels."""
    n, b, size = quants.shape
    slots = quants.view(np.uint32).reshape(n // PANEL, PANEL, b, size // SLOT)  # four bytes are moved as one
    targets[0].view(np.uint32)[..., 0] = slots.transpose(0, 2, 3, 1)
    if quants.dtype == np.int8:
        targets[0][...] ^= np.uint8(OFFSET)
    for number, scale in enumerate(scales):
        targets[1][:, :, number] = scale.reshape(n // PANEL, PANEL, b).transpose(0, 2, 1)


def matrix(quants: Array, scales: Array) -> Array:
    """The matrix [N, K] of panels, in float64."""
    panels, blocks, words = quants.shape[:3]
    slots = quants.transpose(0, 3, 1, 2, 4).reshape(panels * PANEL, blocks, words * SLOT)
    rows = scales.astype(np.float64).transpose(0, 3, 1, 2).reshape(panels * PANEL, blocks, scales.shape[2])
    if scales.shape[2] == 1:
        values = (slots.astype(np.float64) - OFFSET) * rows[:, :, :1]
    else:
        values = np.concatenate([slots & 15, slots >> 4], axis=2) * rows[:, :, :1] + rows[:, :, 1:]
    return values.reshape(panels * PANEL, blocks * BLOCK)


def matrix_of(arguments: Arguments, prefix: str = "") -> Array:
    return matrix(arguments[prefix or "quants"], arguments[f"{prefix}_scales" if prefix else "scales"])


def activations(arguments: Arguments) -> Array:
    """x [M, K] of a kernel's arguments, in float64."""
    x: Array = arguments["x"].astype(np.float64)
    if x.ndim == 2:
        return x.reshape(1, -1)
    x = x * arguments["x_scales"][:, 0, :, None].astype(np.float64)
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)


def product_reference(arguments: Arguments) -> dict[str, Array]:
    y = arguments["y"]
    x = activations(arguments)[: len(y) if y.ndim == 3 else 1]
    if "gate" in arguments:
        result = silu_reference(x @ matrix_of(arguments, "gate").T) * (x @ matrix_of(arguments, "up").T)
    else:
        result = x @ matrix_of(arguments).T
    result = result.reshape(y.shape)
    return {"y": result + arguments["residual"] if "residual" in arguments else result}


def dequantize_reference(arguments: Arguments) -> dict[str, Array]:
    return {"out": matrix_of(arguments).reshape(arguments["out"].shape)}


def embedding_reference(arguments: Arguments) -> dict[str, Array]:
    return {"y": matrix_of(arguments)[arguments["tokens"]].reshape(arguments["y"].shape)}


def quantize_rows(x: Array) -> tuple[Array, Array, Array]:
    """q, scales and starts of rows [M, B, 32] in f32, as quantize_blocks has them."""
    x = x.astype(np.float32)
    largest = np.abs(x).max(axis=-1)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(LARGEST) / largest, np.float32(0))
    q = np.rint(x * inverse[..., None])
    scale = largest / np.float32(LARGEST)
    total = q.sum(axis=-1)
    scales = np.stack([scale, scale * total], axis=-1).astype(np.float32)
    return q.astype(np.int8).swapaxes(0, 1), scales.transpose(1, 2, 0), (total * -OFFSET).astype(np.int32).T


def quantize_reference(arguments: Arguments) -> dict[str, Array]:
    x = arguments["x"]
    if "gain" in arguments:
        wide = x.astype(np.float64)
        x = (wide / np.sqrt(np.square(wide).mean() + arguments["epsilon"]) * arguments["gain"])[None]
    names = ("q", "scales", "starts")
    rows = len(x)
    expected = {}
    for name, made in zip(names, quantize_rows(x), strict=True):
        expected[name] = arguments[name].copy()  # What lies beyond the rows stays as it is.
        place = expected[name][:, :rows] if name != "scales" else expected[name][:, :, :rows]
        place[...] = made
    return expected


# -------------------------------------------------------------------------------------------------- arguments and cases


def random_blocks(random: np.random.Generator, form: str, p: int, b: int, prefix: str = "") -> Arguments:
    """Weights near 1 / sqrt(K), as in a network."""
    unit = 1.0 / np.sqrt(BLOCK * b + 1.0)
    quants = random.integers(0, 256, (p, b, BLOCK // (SLOT * HALVES[form]), PANEL, SLOT)).astype(np.uint8)
    scales = unit * random.uniform(0.05, 0.2, (p, b, SCALES[form], PANEL))
    if form == "q8":
        scales /= 8
    else:
        scales[:, :, 1] *= -8.0
    return {prefix or "quants": quants, f"{prefix}_scales" if prefix else "scales": scales.astype(np.float16)}


def random_activations(random: np.random.Generator, b: int, rows: int, more: int = 0) -> Arguments:
    """Quantised rows, with room for some more."""
    q, scales, starts = quantize_rows(normal(random, rows + more, b, BLOCK))
    return {"x": np.ascontiguousarray(q), "x_scales": np.ascontiguousarray(scales),
            "starts": np.ascontiguousarray(starts)}


def make_arguments(random: np.random.Generator, shape: Shape, form: str, task: str) -> Arguments:
    b = shape["B"]
    if task == "norm":
        return {"x": normal(random, b, BLOCK), "gain": normal(random, b, BLOCK), "epsilon": 1e-5, **_unwritten(b, 1)}
    if task == "quantize":
        x = normal(random, shape["M"], b, BLOCK)
        x[:, ::3] *= 20
        x[shape["M"] // 2 :, 0] = 0
        return {"x": x, **_unwritten(b, shape["C"])}
    p = shape["P"]
    arguments: Arguments = {}
    for prefix in ("gate", "up") if task.endswith("swiglu") else ("",):
        arguments |= random_blocks(random, form, p, b, prefix)
    if task == "dequantize":
        return arguments | {"out": unwritten(p, PANEL, b, BLOCK)}
    if task == "embedding":
        t = shape["T"]
        tokens = {"tokens": random.integers(0, np.maximum(1, p * PANEL), t).astype(np.int32)}
        return tokens | arguments | {"y": unwritten(t, b, BLOCK)}
    rows: tuple[int, ...] = ()
    if task.startswith("matmul"):
        rows = (shape["M"],)
        arguments |= random_activations(random, b, shape["M"], shape["C"] - shape["M"])
    else:
        arguments["x"] = normal(random, b, BLOCK)
    if task.endswith("residual"):
        arguments["residual"] = normal(random, *rows, p, PANEL)
    return arguments | {"y": unwritten(*rows, p, PANEL)}


def _unwritten(b: int, c: int) -> Arguments:
    return {"q": np.full((b, c, BLOCK), -1, np.int8), "scales": unwritten(b, 2, c),
            "starts": unwritten(b, c, dtype="i32")}


TOLERANCE = Tolerance(
    2e-5, 5e-5, "a sum of K rounded products near 1 / sqrt(K) in any order, of parts that partly cancel: scale * q and "
    "the minimum are of one size and opposite signs"
)
PLAIN = Tolerance(1e-6, 1e-6, "a product and a sum, each rounded once")
BLOCK_BYTES = {"q4": 20, "q8": 34}
"""Of 32 weights: 4 or 8 bits each, and the scale and minimum."""
NORMED = Tolerance(
    1e-5, 1.0, "the norm is a sum in another order, so that a value in the middle between two quants may go to either"
)
MATRICES = ((96, 18), (896, 128))
ROWS = (1, 4, 16, 512)


def _cases(form: str, task: str) -> tuple[Case, ...]:
    count = 2 if task.endswith("swiglu") else 1
    cases = []
    for p, b in MATRICES:
        n, k, weights = p * PANEL, b * BLOCK, count * p * PANEL * b * BLOCK_BYTES[form]
        if task == "norm":
            cases.append(Case({"B": b}, flops=6 * k, bytes=9 * k + 12 * b))
        elif task == "quantize":
            cases.append(Case({"M": 512, "B": b, "C": 512}, flops=512 * 4 * k, bytes=512 * (5 * k + 12 * b)))
        elif task == "embedding":
            cases.append(Case({"T": 128, "P": p, "B": b}, flops=256 * k, bytes=128 * (4 * k + b * BLOCK_BYTES[form])))
        elif task == "dequantize":
            cases.append(Case({"P": p, "B": b}, flops=2 * n * k, bytes=weights + 4 * n * k))
        elif task.startswith("matmul"):
            for m in ROWS:
                vectors = 4 * m * n * (2 if task.endswith("residual") else 1) + m * (k + 12 * b)
                shape = {"P": p, "B": b, "C": m, "M": m}
                cases.append(Case(shape, flops=2 * count * m * n * k, bytes=weights + vectors))
        else:
            vectors = n * (2 if task.endswith("residual") else 1) + k
            cases.append(Case({"P": p, "B": b}, flops=2 * count * n * k, bytes=weights + 4 * vectors))
    return tuple(cases)


CHECK_SHAPES: dict[str, tuple[dict[str, int], ...]] = {
    "norm": ({"B": 1}, {"B": 2}, {"B": 18}),
    "quantize": ({"M": 0, "B": 2, "C": 1}, {"M": 1, "B": 3, "C": 1}, {"M": 5, "B": 2, "C": 7}),
    "embedding": ({"T": 0, "P": 1, "B": 1}, {"T": 3, "P": 2, "B": 1}, {"T": 5, "P": 3, "B": 3}),
    "matvec": ({"P": 0, "B": 2}, {"P": 1, "B": 1}, {"P": 3, "B": 2}, {"P": 5, "B": 3}),
    "matmul": ({"P": 0, "B": 2, "C": 1, "M": 1}, {"P": 3, "B": 2, "C": 1, "M": 1}, {"P": 2, "B": 3, "C": 9, "M": 7},
               {"P": 3, "B": 1, "C": 31, "M": 31}),
}


def _entry(kernel: Any, form: str, task: str, reference: Any, tolerance: Tolerance) -> LibraryKernel:
    shapes = CHECK_SHAPES.get(task.split("_")[0], CHECK_SHAPES["matvec"])
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=reference,
        make_arguments=lambda random, shape: make_arguments(random, shape, form, task), tolerance=tolerance,
        cases=_cases(form, task), check_shapes=shapes, dtype=form,
        products="i8" if task.startswith("matmul") else "f32",
    )


TASKS: dict[str, tuple[Any, Tolerance]] = {
    **dict.fromkeys(("matmul", "matmul_residual", "matmul_swiglu", "matvec", "matvec_residual", "matvec_swiglu"),
                    (product_reference, TOLERANCE)),
    "dequantize": (dequantize_reference, PLAIN), "embedding": (embedding_reference, PLAIN),
}
KERNELS = (
    *(_entry(getattr(kernels, task), form, task, *found) for form, kernels in FORMS.items()
      for task, found in TASKS.items()),
    _entry(quantize_blocks, "q8", "quantize", quantize_reference, EXACT),
    _entry(rms_norm_quantize_blocks, "q8", "norm", quantize_reference, NORMED),
)
