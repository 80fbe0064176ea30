"""The matrices of all heads that make keys and values, with weights in blocks, used as they are; see mla.py.

A matrix for each of H heads lies in panels (quantized.py, k_quants.py), one head after the other, and meets a part of
its own of each row of activations, which were quantised as a whole: H times S groups, of which a head's first G count.

    head_matmul    y[m, h] = w[h] @ x[m, h] for M of C rows

So queries go into the latent space, where a file has the rows of w [H, C, D] in blocks along D (a head's query has
features behind those D, which turn), and so does what was found there come out, with w [H, V, C].
"""

from functools import cache
from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, each, f16, f32, i8, i32, tiles, u8, whole, zeros

from . import k_quants, quantized
from .k_quants import BLOCK_BYTES, SCALE_TYPES, SIXTEEN, SUM, SUPER, WORDS
from .quantized import FORMS, PANEL, SLOT, TOLERANCE, Form, kernel_suffix, product_kernels
from .record import Arguments, Array, Case, LibraryKernel, Shape, unwritten

C, G, H, M, P, S = sp.dims("C G H M P S")


@cache
def head_matmul_of(form: Form, group: int) -> Any:
    """The kernel for weights of that form, where so many activations share a scale."""
    halves, scale_rows, words, parts = form.halves, form.scales, form.words, group // form.block
    group_sum = product_kernels(form, group).group_sum

    @sp.kernel(name=f"head_matmul_{kernel_suffix(form, group)}")
    def head_matmul(
        quants: Tensor[u8, H, P, G, parts, words, PANEL, SLOT], scales: Tensor[f16, H, P, G, parts, scale_rows, PANEL],
        x: Tensor[i8, H, S, C, group], x_scales: Tensor[f32, H, S, C], sums: Tensor[f32, H, S, parts, C],
        starts: Tensor[i32, H, S, parts, C], y: Tensor[f32, M, H, P, PANEL],
    ):
        together = quants.view(H * P, G, parts, words, PANEL, SLOT)
        rows = scales.view(H * P, G, parts, scale_rows, PANEL)
        q, factors = x.view(H * S, C, parts, halves, words, SLOT), x_scales.view(H * S, C)
        totals, begin = sums.view(H * S, parts, C), starts.view(H * S, parts, C)
        for h in each(H):
            for p, m in tiles(P, M):
                l = whole(PANEL)
                acc = zeros(m, p, l, dtype=f32)
                for g in each(G):
                    acc += group_sum(
                        zeros(m, p, l, dtype=f32), together, rows, q, factors, totals, begin, h * P + p, g, m, l,
                        h * S + g)
                y[m, h, p, l] = acc

    return head_matmul


@cache
def head_matmul_of_k(form: str) -> Any:
    """The same for Q3_K to Q6_K."""
    words, scale_type, product = WORDS[form], SCALE_TYPES[form], k_quants.kernels_of(form)
    super_sum, blocks, size_bytes = product.super_sum, product.blocks, words * PANEL * SLOT

    @sp.kernel(name=f"head_matmul_{form}")
    def head_matmul(
        w: Tensor[u8, H, P, G, words, PANEL, SLOT], x: Tensor[i8, H, S, C, SUPER], x_scales: Tensor[f32, H, S, C],
        digits: Tensor[i8, H, S, C, SIXTEEN], starts: Tensor[i32, H, S, SIXTEEN, C], y: Tensor[f32, M, H, P, PANEL],
    ):
        together, parts = w.view(H * P, G, words, PANEL, SLOT), w.view(H * P, G, size_bytes, dtype=scale_type)
        factor = w.view(H * P, G, size_bytes // 2, dtype=f16)
        q, scales = x.view(H * S, C, *blocks), x_scales.view(H * S, C)
        digit, begin = digits.view(H * S, C, 2, 2, SLOT), starts.view(H * S, SIXTEEN, C)
        for h in each(H):
            for p, m in tiles(P, M):
                l = whole(PANEL)
                acc = zeros(m, p, l, dtype=f32)
                for g in each(G):
                    acc += super_sum(zeros(m, p, l, dtype=i32), together, parts, factor, q, scales, digit, begin,
                                     h * P + p, g, m, l, h * S + g)
                y[m, h, p, l] = acc

    return head_matmul


# ------------------------------------------------------------------------------------------- references and arguments


def reference(arguments: Arguments, form: Form | str) -> dict[str, Array]:
    y, joined = arguments["y"], {
        name: part.reshape(-1, *part.shape[2:]) for name, part in arguments.items() if name != "y"}
    if isinstance(form, Form):
        w, x = quantized.matrix_of(joined, form), quantized.activations(joined)
    else:
        w, x = k_quants.rows_of(form, joined["w"]), k_quants.activations(joined)
    w, x = w.reshape(y.shape[1], -1, w.shape[1]), x.reshape(len(x), y.shape[1], -1)[: len(y), :, : w.shape[1]]
    return {"y": np.einsum("hnk,mhk->mhn", w, x).reshape(y.shape)}


def make_arguments(random: "np.random.Generator", shape: Shape, form: Form | str, group: int) -> Arguments:
    h, p, g, s, c, m = (shape[name] for name in "HPGSCM")
    if isinstance(form, Form):
        weights = quantized.random_blocks(random, form, h * p, (g, group // form.block))
        rows = quantized.random_activations(random, form, h * s, group, m, c - m)
    else:
        weights = {"w": k_quants.random_panels(random, form, h * p, g)}
        rows = k_quants.random_activations(random, h * s, m, c - m)
    return {
        **{name: part.reshape(h, p, *part.shape[1:]) for name, part in weights.items()},
        **{name: part.reshape(h, s, *part.shape[1:]) for name, part in rows.items()}, "y": unwritten(m, h, p, PANEL)}


def _entry(kernel: Any, form: Form | str, group: int, matrices: tuple[tuple[int, int, int], ...]) -> LibraryKernel:
    """matrices: of a head: rows, columns, and columns of its part of the activations."""
    if isinstance(form, Form):
        name, weight_bytes, row_bytes = form.name, group // form.block * form.block_bytes, 8 * group // form.block
    else:
        name, weight_bytes, row_bytes = form, BLOCK_BYTES[form], 5 * SIXTEEN
    h, cases = 16, []
    for n, k, wide in matrices:
        shape = {"H": h, "P": n // PANEL, "G": k // group, "S": wide // group, "C": 1, "M": 1}
        cases.append(Case(shape, flops=2 * h * n * k,
                          bytes=h * (k // group * (n * weight_bytes + group + 4 + row_bytes) + 4 * n)))
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=lambda arguments: reference(arguments, form),
        make_arguments=lambda random, shape: make_arguments(random, shape, form, group),
        tolerance=TOLERANCE if isinstance(form, Form) else SUM, cases=tuple(cases),
        check_shapes=tuple(dict(zip("HPGSCM", extents, strict=True)) for extents in (
            (1, 1, 1, 1, 1, 1), (3, 2, 2, 3, 9, 7), (2, 3, 1, 1, 33, 33), (2, 5, 3, 4, 1, 1))),
        dtype=name, products="i8",
    )


KEYS, VALUES = (512, 128, 192), (128, 512, 512)
KERNELS = (
    *(_entry(head_matmul_of(form, form.block), form, form.block, (KEYS, VALUES))
      for form in (FORMS[name] for name in ("q4", "q4m", "q8"))),
    *(_entry(head_matmul_of_k(form), form, SUPER, (VALUES,)) for form in ("q4k", "q5k", "q6k")),
)
