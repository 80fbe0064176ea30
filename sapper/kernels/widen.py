"""Weights in blocks (quantized.py) as plain ones, in f32 or bf16, as matrices hold them that are widened at load.

    widen_panels    [Q, K, J * 16]: panels of J * 16 rows, packed for products (sapper.pack), column after column
    widen_pairs     [Q, K / 2, J * 16, 2]: the same of bf16, as products with rows of bf16 read them: columns in pairs
    widen_rows      [N, K]: row by row

Sixteen rows are neighbours among the lanes of both kinds of panel, so that nothing is turned around on the way.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, f16, f32, i32, tiles, u8, whole

from .quantized import FORMS, PANEL, PLAIN, SLOT, Form, exact_kernels, matrix, random_blocks
from .record import NUMPY_DTYPES, Arguments, Array, Case, LibraryKernel, Shape, unwritten

P, Q, J, B = sp.dims("P Q J B")
DTYPES = {"f32": f32, "bf16": bf16}


def rounded(form: Form, words: Any, scale: Any, minimum: Any, place: int) -> Any:
    """The weights whose quants begin at bit `place` of words: bf16 in the upper halves of an i32."""
    quants = words >> place & (1 << form.bits) - 1
    if form.minimum:
        return (quants.to(f32) * scale + minimum).to(bf16).to(f32).bits(i32)
    return ((quants - form.offset).to(f32) * scale).to(bf16).to(f32).bits(i32)


def put_pairs(form: Form, quants: Any, scales: Any, p: Any, slots: Any, q: Any, b: Any, j: Any) -> None:
    """Block b of the panel p, its columns in pairs, into panel j of those that lie together as q. quants: [panel, B,
    words, 16] of i32. slots: [q, B, halves, words, 2, J, 16] of i32."""
    l, w = whole(PANEL), whole(form.words)
    four = quants[p, b, w, l]
    scale, minimum = scales[p, b, 0, l].to(f32), scales[p, b, form.scales - 1, l].to(f32)
    for h in range(form.halves):
        for pair in (0, 1):
            low = rounded(form, four, scale, minimum, h * form.bits + pair * 16)
            high = rounded(form, four, scale, minimum, h * form.bits + pair * 16 + 8)
            slots[q, b, h, w, pair, j, l] = high | (low >> 16 & 0xFFFF)


@cache
def widening_kernels(form: Form, name: str) -> SimpleNamespace:
    """widen_panels, widen_rows of weights in blocks of that form into the dtype of that name; widen_pairs into bf16."""
    dtype, halves, words, scale_rows, size = DTYPES[name], form.halves, form.words, form.scales, form.block
    weight_rows = exact_kernels(form).weight_rows

    @sp.kernel(name=f"widen_panels_{form.name}_{name}")
    def widen_panels(
        quants: Tensor[u8, Q, J, B, words, PANEL, SLOT], scales: Tensor[f16, Q, J, B, scale_rows, PANEL],
        out: Tensor[dtype, Q, B, size, J, PANEL],
    ):
        joined = quants.view(Q * J, B, words, PANEL, dtype=i32)
        factors, parts = scales.view(Q * J, B, scale_rows, PANEL), out.view(Q, B, halves, words, SLOT, J, PANEL)
        for q, b, j in tiles(Q, B, J):
            l, h, w, s = whole(PANEL), whole(halves), whole(words), whole(SLOT)
            parts[q, b, h, w, s, j, l] = weight_rows(joined, factors, q * J + j, b, l, h, w, s).to(dtype)

    @sp.kernel(name=f"widen_rows_{form.name}_{name}")
    def widen_rows(
        quants: Tensor[u8, P, B, words, PANEL, SLOT], scales: Tensor[f16, P, B, scale_rows, PANEL],
        out: Tensor[dtype, P, PANEL, B, size],
    ):
        joined, parts = quants.view(P, B, words, PANEL, dtype=i32), out.view(P, PANEL, B, halves, words, SLOT)
        for p, b in tiles(P, B):
            l, h, w, s = whole(PANEL), whole(halves), whole(words), whole(SLOT)
            parts[p, l, b, h, w, s] = weight_rows(joined, scales, p, b, l, h, w, s).to(dtype)

    @sp.kernel(name=f"widen_pairs_{form.name}")
    def widen_pairs(
        quants: Tensor[u8, Q, J, B, words, PANEL, SLOT], scales: Tensor[f16, Q, J, B, scale_rows, PANEL],
        out: Tensor[bf16, Q, B, halves, words, 2, J, PANEL, 2],
    ):
        joined, factors = quants.view(Q * J, B, words, PANEL, dtype=i32), scales.view(Q * J, B, scale_rows, PANEL)
        slots = out.view(Q, B, halves, words, 2, J, PANEL, dtype=i32)
        for q, b, j in tiles(Q, B, J):
            put_pairs(form, joined, factors, q * J + j, slots, q, b, j)

    return SimpleNamespace(widen_panels=widen_panels, widen_pairs=widen_pairs, widen_rows=widen_rows)


# -------------------------------------------------------------------------------------------------- arguments and cases


def reference(arguments: Arguments, form: Form) -> dict[str, Array]:
    quants, scales, out = (arguments[name] for name in ("quants", "scales", "out"))
    if quants.ndim == 6:
        q, j = quants.shape[:2]
        wide = matrix(form, *(one.reshape(q * j, *one.shape[2:]) for one in (quants, scales)))
        if out.ndim == 8:
            wide = wide.reshape(q, j, PANEL, *out.shape[1:5], 2).transpose(0, 3, 4, 5, 6, 1, 2, 7)
        else:
            wide = wide.reshape(q, j * PANEL, wide.shape[1]).swapaxes(1, 2)
    else:
        wide = matrix(form, quants, scales)
    return {"out": wide.reshape(out.shape).astype(out.dtype)}


def make_arguments(random: "np.random.Generator", shape: Shape, form: Form, name: str, task: str) -> Arguments:
    b = shape["B"]
    if "P" in shape:
        made = random_blocks(random, form, shape["P"], (b,))
        return made | {"out": unwritten(shape["P"], PANEL, b, form.block, dtype=name)}
    q, j = shape["Q"], shape["J"]
    made = random_blocks(random, form, q * j, (b,))
    made = {key: one.reshape(q, j, *one.shape[1:]) for key, one in made.items()}
    if task == "widen_pairs":
        return made | {"out": unwritten(q, b, form.halves, form.words, 2, j, PANEL, 2, dtype=name)}
    return made | {"out": unwritten(q, b, form.block, j, PANEL, dtype=name)}


def _entry(form: Form, name: str, task: str) -> LibraryKernel:
    kernel: Any = getattr(widening_kernels(form, name), task)
    p, b = 96, 640 // form.block
    weights = p * PANEL * b * form.block
    moved = p * PANEL * b * form.block_bytes + weights * NUMPY_DTYPES[name].itemsize
    panels = task != "widen_rows"
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=lambda arguments: reference(arguments, form),
        make_arguments=lambda random, shape: make_arguments(random, shape, form, name, task),
        tolerance=PLAIN,
        cases=(Case({"Q": p // 2, "J": 2, "B": b} if panels else {"P": p, "B": b}, flops=2 * weights, bytes=moved),),
        check_shapes=({"Q": 0, "J": 2, "B": 1}, {"Q": 2, "J": 1, "B": 3}, {"Q": 1, "J": 3, "B": 2}) if panels else (
            {"P": 0, "B": 2}, {"P": 1, "B": 1}, {"P": 3, "B": 2}),
        dtype=name,
    )


KERNELS = tuple(_entry(FORMS[form], name, task) for form, name, task in (
    ("q4m", "bf16", "widen_panels"), ("q8", "f32", "widen_panels"), ("q4", "bf16", "widen_rows"),
    ("q4", "bf16", "widen_pairs"), ("q4m_128", "bf16", "widen_pairs"), ("q8", "bf16", "widen_pairs")))
