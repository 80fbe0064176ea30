"""Weights in blocks that share a scale, used as they are: matrices of any number of rows, vectors, embedding.

A `Form` says how: 4 or 8 bits; 32, 64 or 128 weights to a block; and whether a block has a minimum.

    q4, q8      weight = scale * (q - 8), scale * (q - 128)    GGUF's Q4_0; Q8_0, whose quants are those less 128
    q4m, q8m    weight = scale * q + minimum                   GGUF's Q4_1; a zero point is -minimum / scale
    q4_64, ...  the same with blocks of 64 or 128              of `sapper quantize`

A matrix [N, K] lies in panels of 16 rows, so that neighbours in memory are neighbours among the lanes, and each panel
is read from one end to the other. A lane of 32 bits takes four quants that are neighbours along K, as packed dot
products (`vpdpbusd`) want them: quants [P, B, W, 16, 4] and scales [P, B, S, 16], where row n is lane n % 16 of panel
n // 16, and column k is element k % block of block k // block. Of 8 bits, byte [w, lane, s] is element 4 * w + s of
its block. Of 4 bits, the byte holds element 4 * w + s in its low half and that plus block / 2 in its high half, as in
GGUF. S is 1, for the scale, or 2, with the minimum.

There are two ways to multiply:

- **matmul**, for any number of rows: the activations are quantised too, each group of A of a row to i8 with a scale of
  its own (`quantize_groups`); A is 32, 64 or 128, and a group is one block or several (`group_for`). The products of
  quants are summed exactly in i32, 64 by one instruction; each block's sum meets the scale of its weights, and each
  group's that of its activations. What this costs: |x - scale * q| <= scale / 2 = max|x| / 254 of a group, so that a
  product with a row w is off by at most the sum over groups of max|x| / 254 times the sum of their |w|. As the errors
  are independent it is some 0.4 % of the two norms' product, over the root of K, in practice. llama.cpp takes groups
  of 32, and of 256 for its K-quants. A multiplication of a sum takes as long as one of 64 quants: of a group of 128 in
  blocks of 32, 5 beside 32 (with minima 9), of one block of 128, 2.
- **matvec**, one vector, with the activations in f32 as they are.

Of a block's sum over scale * q + minimum times x, only the sum over q * x needs every element: the scale is applied
once, and the minimum meets the sum of the block's x, which all rows share. What quants without a minimum are too large
by is taken off by what a block's sum begins with, -8 or -128 times the sum of its activations.
Formats: ggml's `block_q4_0`, `block_q4_1` and `block_q8_0`, ggml-common.h; its `quantize_row_q8_1_ref` for activations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, abs, each, f16, f32, i8, i32, max, round, rsqrt, sum, tiles, u8, where, whole, zeros

from .activation import silu, silu_reference
from .record import EXACT, Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

P, B, C, G, M, T = sp.dims("P B C G M T")
BLOCKS, PANEL, SLOT = (32, 64, 128), 16, 4
GROUPS = (128, 64, 32)
"""Activations that share a scale; the first that divides their number is best."""
PAGE_BYTES, LINE_BYTES = 4096, 64
LARGEST = 127.0
"""The largest magnitude of a quantised activation."""


@dataclass(frozen=True, slots=True)
class Form:
    """bits of a quant; block: weights that share a scale; minimum: whether they share that too."""

    bits: int
    block: int = 32
    minimum: bool = False

    @property
    def name(self) -> str:
        return f"q{self.bits}{'m' if self.minimum else ''}{'' if self.block == 32 else f'_{self.block}'}"

    @property
    def halves(self) -> int:
        """Quants in a byte."""
        return 8 // self.bits

    @property
    def words(self) -> int:
        """Lanes of a row's block."""
        return self.block // (SLOT * self.halves)

    @property
    def scales(self) -> int:
        """Of a block: its scale, and its minimum."""
        return 2 if self.minimum else 1

    @property
    def offset(self) -> int:
        """What quants are larger by than what is scaled."""
        return 0 if self.minimum else 1 << self.bits - 1

    @property
    def block_bytes(self) -> int:
        return self.block * self.bits // 8 + 2 * self.scales


FORMS = {form.name: form for form in (
    Form(bits, block, minimum) for bits in (4, 8) for minimum in (False, True) for block in BLOCKS)}
"""By name."""


def rows_apart(rows: int, group: int) -> int:
    """How many rows C to make room for, that the groups of a row, i8 [G, C, group], do not lie pages apart, and so in
    one set of a first cache (quantising 3072 rows of 1024 took 1.36 times as long on a Zen 5 where they did)."""
    return rows if rows * group % PAGE_BYTES else rows + -(-LINE_BYTES // group)


def group_for(block: int, columns: int) -> int:
    """How many activations share a scale where a product is fastest: the block itself, or several. Models take the
    block, which is more accurate (models/linear.py)."""
    return next((group for group in GROUPS if group > block and columns % group == 0), block)


# ------------------------------------------------------------------------------------------------------------- kernels


def kernel_suffix(form: Form, group: int) -> str:
    """What ends the names of kernels of quantised activations."""
    return form.name if group == group_for(form.block, GROUPS[0]) else f"{form.name}_by{group}"


@cache
def product_kernels(form: Form, group: int) -> SimpleNamespace:
    """The kernels with quantised activations, `group` of which share a scale, and the function that other kernels share
    (moe_blocks.py). A row's blocks are [G, D], D = group / block of them in a group of activations.

    matmul, matmul_residual, matmul_swiglu     y [M, P, 16] from what quantize_groups makes of C >= M rows
    """
    halves, words, parts, rows = form.halves, form.words, group // form.block, form.scales

    def block_products(quants: Any, low: Any, high: Any, p: Any, g: Any, d: Any, l: Any, w: Any, s: Any) -> Any:
        """The products of a block, before its scale. low, high: the activations that meet the two halves of bytes."""
        packed = quants[p, g, d, w, l, s]
        return (packed & 15) @ low + (packed >> 4) @ high if form.bits == 4 else packed @ low

    def scaled(products: Any, scales: Any, starts: Any, p: Any, g: Any, d: Any, at: Any, m: Any, l: Any) -> Any:
        """Those times the scale of the weights: over p, m and l. at: the group of the activations."""
        scale = scales[p, g, d, 0, l].to(f32)
        return (products if form.minimum else products + starts[at, d, m]).to(f32) * scale

    def block_sum(
        products: Any, scales: Any, sums: Any, starts: Any, p: Any, g: Any, d: Any, at: Any, m: Any, l: Any
    ) -> Any:
        """What a block of the panels p and the rows m adds: over p, m and l."""
        if form.minimum:
            return scaled(products, scales, starts, p, g, d, at, m, l) + scales[p, g, d, 1, l].to(f32) * sums[at, d, m]
        return scaled(products, scales, starts, p, g, d, at, m, l)

    def group_sum(
        nothing: Any, quants: Any, scales: Any, x: Any, x_scales: Any, sums: Any, starts: Any, p: Any, g: Any, m: Any,
        l: Any, other: Any = None,
    ) -> Any:
        """The products of a group. nothing: zeros over p, m and l. other: the group of the activations where it is
        not g."""
        w, s, at = whole(words), whole(SLOT), g if other is None else other
        if parts == 1:
            products = block_products(quants, x[at, m, 0, 0, w, s], x[at, m, 0, halves - 1, w, s], p, g, 0, l, w, s)
            return block_sum(products, scales, sums, starts, p, g, 0, at, m, l) * x_scales[at, m]
        total = nothing
        for d in range(parts):
            products = block_products(quants, x[at, m, d, 0, w, s], x[at, m, d, halves - 1, w, s], p, g, d, l, w, s)
            if form.minimum:  # a sum for each of the two products, which may become part of it
                total += scales[p, g, d, 1, l].to(f32) * sums[at, d, m]
            total += scaled(products, scales, starts, p, g, d, at, m, l)
        return total * x_scales[at, m]

    def two_group_sums(
        nothing: Any, one: Any, one_scales: Any, other: Any, other_scales: Any, x: Any, x_scales: Any, sums: Any,
        starts: Any, p: Any, g: Any, m: Any, l: Any,
    ) -> Any:
        """Those of two matrices. Each activation is read once for both, where registers hold all sums: not those of a
        group beside those of its blocks."""
        if parts > 1:
            return (group_sum(nothing, one, one_scales, x, x_scales, sums, starts, p, g, m, l),
                    group_sum(nothing, other, other_scales, x, x_scales, sums, starts, p, g, m, l))
        w, s = whole(words), whole(SLOT)
        low, high = x[g, m, 0, 0, w, s], x[g, m, 0, halves - 1, w, s]
        products = block_products(one, low, high, p, g, 0, l, w, s)
        others = block_products(other, low, high, p, g, 0, l, w, s)
        return (block_sum(products, one_scales, sums, starts, p, g, 0, g, m, l) * x_scales[g, m],
                block_sum(others, other_scales, sums, starts, p, g, 0, g, m, l) * x_scales[g, m])

    @sp.kernel(name=f"matmul_{kernel_suffix(form, group)}")
    def matmul(
        quants: Tensor[u8, P, G, parts, words, PANEL, SLOT], scales: Tensor[f16, P, G, parts, rows, PANEL],
        x: Tensor[i8, G, C, group], x_scales: Tensor[f32, G, C], sums: Tensor[f32, G, parts, C],
        starts: Tensor[i32, G, parts, C], y: Tensor[f32, M, P, PANEL],
    ):
        q, factors = x.view(G, C, parts, halves, words, SLOT), x_scales.view(G, C)
        totals, begin = sums.view(G, parts, C), starts.view(G, parts, C)  # of C rows, M are filled
        for p, m in tiles(P, M):
            l = whole(PANEL)
            acc = zeros(m, p, l, dtype=f32)
            for g in each(G):
                acc += group_sum(
                    zeros(m, p, l, dtype=f32), quants, scales, q, factors, totals, begin, p, g, m, l)
            y[m, p, l] = acc

    @sp.kernel(name=f"matmul_residual_{kernel_suffix(form, group)}")
    def matmul_residual(
        quants: Tensor[u8, P, G, parts, words, PANEL, SLOT], scales: Tensor[f16, P, G, parts, rows, PANEL],
        x: Tensor[i8, G, C, group], x_scales: Tensor[f32, G, C], sums: Tensor[f32, G, parts, C],
        starts: Tensor[i32, G, parts, C], residual: Tensor[f32, M, P, PANEL], y: Tensor[f32, M, P, PANEL],
    ):
        q, factors = x.view(G, C, parts, halves, words, SLOT), x_scales.view(G, C)
        totals, begin = sums.view(G, parts, C), starts.view(G, parts, C)
        for p, m in tiles(P, M):
            l = whole(PANEL)
            acc = zeros(m, p, l, dtype=f32)
            for g in each(G):
                acc += group_sum(
                    zeros(m, p, l, dtype=f32), quants, scales, q, factors, totals, begin, p, g, m, l)
            y[m, p, l] = residual[m, p, l] + acc

    @sp.kernel(name=f"matmul_swiglu_{kernel_suffix(form, group)}")
    def matmul_swiglu(
        gate: Tensor[u8, P, G, parts, words, PANEL, SLOT], gate_scales: Tensor[f16, P, G, parts, rows, PANEL],
        up: Tensor[u8, P, G, parts, words, PANEL, SLOT], up_scales: Tensor[f16, P, G, parts, rows, PANEL],
        x: Tensor[i8, G, C, group], x_scales: Tensor[f32, G, C], sums: Tensor[f32, G, parts, C],
        starts: Tensor[i32, G, parts, C], y: Tensor[f32, M, P, PANEL],
    ):
        q, factors = x.view(G, C, parts, halves, words, SLOT), x_scales.view(G, C)
        totals, begin = sums.view(G, parts, C), starts.view(G, parts, C)
        for p, m in tiles(P, M):
            l = whole(PANEL)
            gate_sum = zeros(m, p, l, dtype=f32)
            up_sum = zeros(m, p, l, dtype=f32)
            for g in each(G):
                of_gate, of_up = two_group_sums(
                    zeros(m, p, l, dtype=f32), gate, gate_scales, up, up_scales, q, factors, totals, begin, p, g, m, l)
                gate_sum += of_gate
                up_sum += of_up
            y[m, p, l] = silu(gate_sum) * up_sum

    return SimpleNamespace(
        matmul=matmul, matmul_residual=matmul_residual, matmul_swiglu=matmul_swiglu, group_sum=group_sum,
        two_group_sums=two_group_sums)


@cache
def exact_kernels(form: Form) -> SimpleNamespace:
    """The kernels with plain activations, and the function that other kernels share (moe_blocks.py).

    matvec, matvec_residual, matvec_swiglu     y [P, 16] from x [B, block] in f32
    dequantize, embedding                      rows in f32
    """
    halves, words, scale_rows, size = form.halves, form.words, form.scales, form.block
    mask = (1 << form.bits) - 1

    def weights(quants: Any, scales: Any, p: Any, b: Any, l: Any, h: Any, w: Any, s: Any) -> Any:
        """What is scaled, in f32: a tile over p, b, l, and h, w, s, the elements of a block. quants: four to an i32, as
        shifting a lane is quicker than reading bytes that lie apart."""
        q = quants[p, b, w, l] >> h.to(i32) * form.bits + s.to(i32) * 8 & mask
        return (q if form.minimum else q - form.offset).to(f32)

    def exact_sum(quants: Any, scales: Any, x: Any, p: Any, b: Any, l: Any, at: Any) -> Any:
        """The products of one block of the panels p and of block `at` of a vector in f32."""
        h, w, s = whole(halves), whole(words), whole(SLOT)
        products = weights(quants, scales, p, b, l, h, w, s) @ x[at, h, w, s]
        scaled = products * scales[p, b, 0, l].to(f32)
        if form.minimum:
            return scaled + scales[p, b, 1, l].to(f32) * sum(x[at, h, w, s], over=(h, w, s))
        return scaled

    def weight_rows(quants: Any, scales: Any, p: Any, b: Any, l: Any, h: Any, w: Any, s: Any) -> Any:
        scaled = weights(quants, scales, p, b, l, h, w, s) * scales[p, b, 0, l].to(f32)
        if form.minimum:
            return scaled + scales[p, b, 1, l].to(f32)
        return scaled

    @sp.kernel(name=f"matvec_{form.name}")
    def matvec(
        quants: Tensor[u8, P, B, words, PANEL, SLOT], scales: Tensor[f16, P, B, scale_rows, PANEL],
        x: Tensor[f32, B, size], y: Tensor[f32, P, PANEL],
    ):
        joined, parts = quants.view(P, B, words, PANEL, dtype=i32), x.view(B, halves, words, SLOT)
        for p in tiles(P):
            l = whole(PANEL)
            acc = zeros(p, l, dtype=f32)
            for b in each(B):
                acc += exact_sum(joined, scales, parts, p, b, l, b)
            y[p, l] = acc

    @sp.kernel(name=f"matvec_residual_{form.name}")
    def matvec_residual(
        quants: Tensor[u8, P, B, words, PANEL, SLOT], scales: Tensor[f16, P, B, scale_rows, PANEL],
        x: Tensor[f32, B, size], residual: Tensor[f32, P, PANEL], y: Tensor[f32, P, PANEL],
    ):
        joined, parts = quants.view(P, B, words, PANEL, dtype=i32), x.view(B, halves, words, SLOT)
        for p in tiles(P):
            l = whole(PANEL)
            acc = zeros(p, l, dtype=f32)
            for b in each(B):
                acc += exact_sum(joined, scales, parts, p, b, l, b)
            y[p, l] = residual[p, l] + acc

    @sp.kernel(name=f"matvec_swiglu_{form.name}")
    def matvec_swiglu(
        gate: Tensor[u8, P, B, words, PANEL, SLOT], gate_scales: Tensor[f16, P, B, scale_rows, PANEL],
        up: Tensor[u8, P, B, words, PANEL, SLOT], up_scales: Tensor[f16, P, B, scale_rows, PANEL],
        x: Tensor[f32, B, size], y: Tensor[f32, P, PANEL],
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

    @sp.kernel(name=f"dequantize_{form.name}")
    def dequantize(
        quants: Tensor[u8, P, B, words, PANEL, SLOT], scales: Tensor[f16, P, B, scale_rows, PANEL],
        out: Tensor[f32, P, PANEL, B, size],
    ):
        """A matrix [N, K], row by row."""
        joined, parts = quants.view(P, B, words, PANEL, dtype=i32), out.view(P, PANEL, B, halves, words, SLOT)
        for p, b in tiles(P, B):
            l, h, w, s = whole(PANEL), whole(halves), whole(words), whole(SLOT)
            parts[p, l, b, h, w, s] = weight_rows(joined, scales, p, b, l, h, w, s)

    @sp.kernel(name=f"embedding_{form.name}")
    def embedding(
        tokens: Tensor[i32, T], quants: Tensor[u8, P, B, words, PANEL, SLOT],
        scales: Tensor[f16, P, B, scale_rows, PANEL], y: Tensor[f32, T, B, size],
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
        matvec=matvec, matvec_residual=matvec_residual, matvec_swiglu=matvec_swiglu, dequantize=dequantize,
        embedding=embedding, exact_sum=exact_sum, weight_rows=weight_rows,
    )


@cache
def quantize_kernels(block: int, group: int) -> SimpleNamespace:
    """quantize_groups, rms_norm_quantize_groups: x is about scale * q, scale = max|x| / 127 of a group. A row's groups
    lie apart, so that those of many rows are read together. Of each block of a group there are, for what its weights
    are larger or smaller by, sums: the sum of its q, and starts: -offset times that."""
    parts = group // block

    def quantized(vector: Any, d: Any, i: Any) -> Any:
        """Groups over d and i: the factors that undo their quantisation, and the quants as whole numbers in f32."""
        largest = max(max(abs(vector), over=i), over=d)
        return largest / LARGEST, round(vector * where(largest > 0.0, LARGEST / largest, 0.0))

    @sp.kernel(name=f"quantize_groups_{block}_{group}")
    def quantize_groups(
        x: Tensor[f32, M, G, group], offset: i32, q: Tensor[i8, G, C, group], scales: Tensor[f32, G, C],
        sums: Tensor[f32, G, parts, C], starts: Tensor[i32, G, parts, C],
    ):
        rows, places, factors = x.view(M, G, parts, block), q.view(G, C, parts, block), scales.view(G, C)
        totals, begin = sums.view(G, parts, C), starts.view(G, parts, C)  # of C rows, M are filled
        for m, g in tiles(M, G):
            i, j = whole(block), whole(group)
            largest = max(abs(x[m, g, j]), over=j)
            factors[g, m] = largest / LARGEST
            inverse = where(largest > 0.0, LARGEST / largest, 0.0)
            for d in range(parts):  # one after the other, each along the lanes
                quants = round(rows[m, g, d, i] * inverse).to(i32)
                places[g, m, d, i] = quants.to(i8)
                total = sum(quants, over=i)
                totals[g, d, m] = total.to(f32)
                begin[g, d, m] = total * (0 - offset)

    @sp.kernel(name=f"rms_norm_quantize_groups_{block}_{group}")
    def rms_norm_quantize_groups(
        x: Tensor[f32, G, group], gain: Tensor[f32, G, group], epsilon: f32, offset: i32, q: Tensor[i8, G, 1, group],
        scales: Tensor[f32, G, 1], sums: Tensor[f32, G, parts, 1], starts: Tensor[i32, G, parts, 1],
    ):
        """RMSNorm (Zhang and Sennrich, 2019) of one vector, quantised."""
        rows, gains, places = x.view(G, parts, block), gain.view(G, parts, block), q.view(G, parts, block)
        g, d, i = whole(G), whole(parts), whole(block)
        vector = rows[g, d, i]
        squares = sum(sum(sum(vector * vector, over=i), over=d), over=g)
        factor = rsqrt(squares / (G * group).to(f32) + epsilon)
        scale, quants = quantized(vector * factor * gains[g, d, i], d, i)
        places[g, d, i] = quants.to(i8)
        total = sum(quants, over=i)
        scales[g, 0] = scale
        sums[g, d, 0] = total
        starts[g, d, 0] = total.to(i32) * (0 - offset)

    return SimpleNamespace(quantize_groups=quantize_groups, rms_norm_quantize_groups=rms_norm_quantize_groups)


# ------------------------------------------------------------------------------------------------- layout and reference


def panel_shapes(form: Form, rows: int, blocks: int) -> list[tuple[tuple[int, ...], Any]]:
    """Shape and dtype of quants and scales in panels, for rows of so many blocks (see fill_panels)."""
    panels = rows // PANEL
    return [((panels, blocks, form.words, PANEL, SLOT), np.dtype(np.uint8)),
            ((panels, blocks, form.scales, PANEL), np.dtype(np.float16))]


def fill_panels(targets: Sequence[Array], quants: Array, *scales: Array) -> None:
    """Puts blocks of rows, quants [N, B, bytes] (of 4 bits two to a byte) and scales [N, B], in panels."""
    n, b, size = quants.shape
    slots = quants.view(np.uint32).reshape(n // PANEL, PANEL, b, size // SLOT)  # four bytes are moved as one
    targets[0].view(np.uint32)[..., 0] = slots.transpose(0, 2, 3, 1)
    for number, scale in enumerate(scales):
        targets[1][:, :, number] = scale.reshape(n // PANEL, PANEL, b).transpose(0, 2, 1)


def matrix(form: Form, quants: Array, scales: Array) -> Array:
    """The matrix [N, K] of panels, in float64. The blocks of a row may be in groups."""
    panels = len(quants)
    blocks = int(np.prod(quants.shape[1:])) // (form.words * PANEL * SLOT)
    slots: Array = quants.reshape(panels, blocks, form.words, PANEL, SLOT).transpose(0, 3, 1, 2, 4)
    slots = slots.reshape(panels * PANEL, blocks, form.words * SLOT)
    rows: Array = scales.astype(np.float64).reshape(panels, blocks, form.scales, PANEL).transpose(0, 3, 1, 2)
    rows = rows.reshape(panels * PANEL, blocks, form.scales)
    if form.bits == 4:
        slots = np.concatenate([slots & 15, slots >> 4], axis=2)
    values = (slots.astype(np.float64) - form.offset) * rows[:, :, :1]
    if form.minimum:
        values += rows[:, :, 1:]
    return values.reshape(panels * PANEL, blocks * form.block)


def matrix_of(arguments: Arguments, form: Form, prefix: str = "") -> Array:
    return matrix(form, arguments[prefix or "quants"], arguments[f"{prefix}_scales" if prefix else "scales"])


def activations(arguments: Arguments) -> Array:
    """x [M, K] of a kernel's arguments, in float64."""
    x: Array = arguments["x"].astype(np.float64)
    if x.ndim == 2:
        return x.reshape(1, -1)
    x = x * arguments["x_scales"][:, :, None].astype(np.float64)
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)


def product_reference(arguments: Arguments, form: Form) -> dict[str, Array]:
    y = arguments["y"]
    x = activations(arguments)[: len(y) if y.ndim == 3 else 1]
    if "gate" in arguments:
        gate, up = (matrix_of(arguments, form, name) for name in ("gate", "up"))
        result = silu_reference(x @ gate.T) * (x @ up.T)
    else:
        result = x @ matrix_of(arguments, form).T
    result = result.reshape(y.shape)
    return {"y": result + arguments["residual"] if "residual" in arguments else result}


def dequantize_reference(arguments: Arguments, form: Form) -> dict[str, Array]:
    return {"out": matrix_of(arguments, form).reshape(arguments["out"].shape)}


def embedding_reference(arguments: Arguments, form: Form) -> dict[str, Array]:
    return {"y": matrix_of(arguments, form)[arguments["tokens"]].reshape(arguments["y"].shape)}


def quantize_rows(x: Array, block: int, offset: int) -> dict[str, Array]:
    """q, scales, sums and starts of rows [M, G, group] in f32, as quantize_groups has them."""
    x = x.astype(np.float32)
    largest = np.abs(x).max(axis=-1)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(LARGEST) / largest, np.float32(0))
    q = np.rint(x * inverse[..., None])
    sums = q.reshape(*q.shape[:2], q.shape[2] // block, block).sum(axis=-1).transpose(1, 2, 0)
    return {
        "q": q.astype(np.int8).swapaxes(0, 1), "scales": (largest / np.float32(LARGEST)).T,
        "sums": sums.astype(np.float32), "starts": (sums * -offset).astype(np.int32),
    }


def quantize_reference(arguments: Arguments, block: int) -> dict[str, Array]:
    x = arguments["x"]
    if "gain" in arguments:
        wide = x.astype(np.float64)
        x = (wide / np.sqrt(np.square(wide).mean() + arguments["epsilon"]) * arguments["gain"])[None]
    expected = {}
    for name, made in quantize_rows(x, block, arguments["offset"]).items():
        expected[name] = arguments[name].copy()  # What lies beyond the rows stays as it is.
        place = expected[name][:, : len(x)] if name in ("q", "scales") else expected[name][:, :, : len(x)]
        place[...] = made
    return expected


# -------------------------------------------------------------------------------------------------- arguments and cases


def random_blocks(
    random: "np.random.Generator", form: Form, p: int, blocks: tuple[int, ...], prefix: str = ""
) -> Arguments:
    """Weights near 1 / sqrt(K), as in a network. blocks: of a row, by groups where they are in groups."""
    unit = 1.0 / np.sqrt(form.block * np.prod(blocks) + 1.0)
    quants = random.integers(0, 256, (p, *blocks, form.words, PANEL, SLOT)).astype(np.uint8)
    scales = unit * random.uniform(0.05, 0.2, (p, *blocks, form.scales, PANEL)) * 2.0 ** (4 - form.bits)
    if form.minimum:
        scales[..., 1, :] *= -(2.0 ** (form.bits - 1))
    return {prefix or "quants": quants, f"{prefix}_scales" if prefix else "scales": scales.astype(np.float16)}


def random_activations(
    random: "np.random.Generator", form: Form, g: int, group: int, rows: int, more: int = 0
) -> Arguments:
    """Quantised rows, with room for some more."""
    made = quantize_rows(normal(random, rows + more, g, group), form.block, form.offset)
    names = {"q": "x", "scales": "x_scales", "sums": "sums", "starts": "starts"}
    return {names[name]: np.ascontiguousarray(part) for name, part in made.items()}


def make_arguments(random: "np.random.Generator", shape: Shape, form: Form, group: int, task: str) -> Arguments:
    p, parts = shape["P"], group // form.block
    blocks = (shape["G"], parts) if task.startswith("matmul") else (shape["B"],)
    arguments: Arguments = {}
    for prefix in ("gate", "up") if task.endswith("swiglu") else ("",):
        arguments |= random_blocks(random, form, p, blocks, prefix)
    if task == "dequantize":
        return arguments | {"out": unwritten(p, PANEL, *blocks, form.block)}
    if task == "embedding":
        t = shape["T"]
        tokens = {"tokens": random.integers(0, np.maximum(1, p * PANEL), t).astype(np.int32)}
        return tokens | arguments | {"y": unwritten(t, *blocks, form.block)}
    rows: tuple[int, ...] = ()
    if task.startswith("matmul"):
        rows = (shape["M"],)
        arguments |= random_activations(random, form, shape["G"], group, shape["M"], shape["C"] - shape["M"])
    else:
        arguments["x"] = normal(random, *blocks, form.block)
    if task.endswith("residual"):
        arguments["residual"] = normal(random, *rows, p, PANEL)
    return arguments | {"y": unwritten(*rows, p, PANEL)}


def quantize_arguments(random: "np.random.Generator", shape: Shape, block: int, group: int, task: str) -> Arguments:
    g, c = shape["G"], shape.get("C", 1)
    results = {"q": np.full((g, c, group), -1, np.int8), "scales": unwritten(g, c),
               "sums": unwritten(g, group // block, c), "starts": unwritten(g, group // block, c, dtype="i32")}
    if task == "norm":
        vectors: Arguments = {name: normal(random, g, group) for name in ("x", "gain")}
        return vectors | {"epsilon": 1e-5, "offset": 8} | results
    x = normal(random, shape["M"], g, group)
    x[:, ::3] *= 20
    x[shape["M"] // 2 :, 0] = 0
    return {"x": x, "offset": 128} | results


TOLERANCE = Tolerance(
    2e-5, 5e-5, "a sum of K rounded products near 1 / sqrt(K) in any order, of parts that partly cancel: scale * q and "
    "the minimum are of one size and opposite signs"
)
PLAIN = Tolerance(1e-6, 1e-6, "a product and a sum, each rounded once")
NORMED = Tolerance(
    1e-5, 1.0, "the norm is a sum in another order, so that a value in the middle between two quants may go to either"
)
MATRICES = ((96, 640), (896, 4096))
"""Panels and columns."""
ROWS = (1, 4, 16, 512)


def _cases(form: Form, group: int, task: str) -> tuple[Case, ...]:
    count = 2 if task.endswith("swiglu") else 1
    cases = []
    for p, k in MATRICES:
        n, b, g = p * PANEL, k // form.block, k // group
        weights = count * n * b * form.block_bytes
        if task == "embedding":
            cases.append(Case({"T": 128, "P": p, "B": b}, flops=256 * k, bytes=128 * (4 * k + b * form.block_bytes)))
        elif task == "dequantize":
            cases.append(Case({"P": p, "B": b}, flops=2 * n * k, bytes=weights + 4 * n * k))
        elif task.startswith("matmul"):
            for m in ROWS:
                vectors = 4 * m * n * (2 if task.endswith("residual") else 1) + m * (k + 4 * g + 8 * b)
                shape = {"P": p, "G": g, "C": rows_apart(m, group), "M": m}
                cases.append(Case(shape, flops=2 * count * m * n * k, bytes=weights + vectors))
        else:
            vectors = n * (2 if task.endswith("residual") else 1) + k
            cases.append(Case({"P": p, "B": b}, flops=2 * count * n * k, bytes=weights + 4 * vectors))
    return tuple(cases)


CHECK_SHAPES: dict[str, tuple[dict[str, int], ...]] = {
    "embedding": ({"T": 0, "P": 1, "B": 1}, {"T": 3, "P": 2, "B": 1}, {"T": 5, "P": 3, "B": 3}),
    "matvec": ({"P": 0, "B": 2}, {"P": 1, "B": 1}, {"P": 3, "B": 2}, {"P": 5, "B": 3}),
    "matmul": ({"P": 0, "G": 2, "C": 1, "M": 1}, {"P": 3, "G": 2, "C": 1, "M": 1}, {"P": 2, "G": 3, "C": 9, "M": 7},
               {"P": 3, "G": 1, "C": 31, "M": 31}),
}
TASKS: dict[str, tuple[Any, Tolerance]] = {
    **dict.fromkeys(("matmul", "matmul_residual", "matmul_swiglu", "matvec", "matvec_residual", "matvec_swiglu"),
                    (product_reference, TOLERANCE)),
    "dequantize": (dequantize_reference, PLAIN), "embedding": (embedding_reference, PLAIN),
}


def _entry(form: Form, group: int, task: str) -> LibraryKernel:
    products = task.startswith("matmul")
    kernel = getattr(product_kernels(form, group) if products else exact_kernels(form), task)
    reference, tolerance = TASKS[task]
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=lambda arguments: reference(arguments, form),
        make_arguments=lambda random, shape: make_arguments(random, shape, form, group, task), tolerance=tolerance,
        cases=_cases(form, group, task), check_shapes=CHECK_SHAPES.get(task.split("_")[0], CHECK_SHAPES["matvec"]),
        dtype=form.name, products="i8" if products else "f32",
    )


def _quantize_entry(block: int, group: int, task: str) -> LibraryKernel:
    kernels = quantize_kernels(block, group)
    kernel = kernels.rms_norm_quantize_groups if task == "norm" else kernels.quantize_groups
    cases = []
    for _, k in MATRICES:
        g, b = k // group, k // block
        if task == "norm":
            cases.append(Case({"G": g}, flops=6 * k, bytes=9 * k + 4 * g + 8 * b))
        else:
            cases.append(Case({"M": 512, "G": g, "C": rows_apart(512, group)}, flops=512 * 4 * k,
                              bytes=512 * (5 * k + 4 * g + 8 * b)))
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=lambda arguments: quantize_reference(arguments, block),
        make_arguments=lambda random, shape: quantize_arguments(random, shape, block, group, task),
        tolerance=NORMED if task == "norm" else EXACT, cases=tuple(cases),
        check_shapes=({"G": 1}, {"G": 2}, {"G": 9}) if task == "norm" else (
            {"M": 0, "G": 2, "C": 1}, {"M": 1, "G": 3, "C": 1}, {"M": 5, "G": 2, "C": 7}),
        dtype="q8",
    )


LISTED = (("q4", 128), ("q4m", 128), ("q8", 128), ("q4m_128", 128))
"""Forms and groups of the library's list; others are made where they are used."""
KERNELS = (
    *(_entry(FORMS[name], group, task) for name, group in LISTED for task in TASKS),
    _entry(FORMS["q4m"], 32, "matmul"),
    *(_quantize_entry(*sizes, task) for sizes in ((32, 128), (128, 128)) for task in ("quantize", "norm")),
)
