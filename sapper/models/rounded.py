"""Rows and weights in bf16, and matrices in blocks that are rounded to it, or widened to f32, as they meet many rows.

In: matrices that say how (`Rounds`, `Widens`). Out: the steps of `Matrix.apply_rows` (linear.py). Holds: bf16 is what
was asked for, or is quicker than to quantise the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import ml_dtypes

from ..kernels import matmul, narrow, near
from ..kernels.moe_blocks import panel_blocks
from ..runtime.packed import Packed
from ..runtime.program import Rows
from .workspace import PACKED_ROWS, Array, Steps, Workspace, in_blocks

ROUNDED_ROWS = 32
"""For how many rows there is room where weights are rounded: where it takes less time than to quantise the rows, with
tile registers (FEW_TOKENS in session.py)."""
PACKED_BYTES = 1 << 20
"""Weights that are rounded at a time where rows are many: they stay in the second cache until they have met all rows.
"""
NEAR_BYTES = 1 << 21
"""Rows of activations that each panel of weights meets as it is rounded: those that a second cache has room for. On a
Granite Rapids' 256 rows by 4096 x 4096 in Q4_0 are as quick either way on one thread, and 0.74 on two; 512 take 1.49 of
the time so, and 0.88."""


def narrowed(x: Rows, dtype: str, rounded: bool, work: Workspace) -> tuple[Steps, Rows, str]:
    """Rows as operands of kernels with plain weights of that dtype: the steps that make them, the rows, and how the
    names of the kernels end. rounded: see Dense; what lies there in bf16 is so already."""
    if not rounded:
        return [], x, dtype
    if is_bf16(x):
        return [], x, "bf16_bf16"
    rows = Rows(work.narrow(*x.array.shape), x.count)
    return [(narrow.narrow_bf16, (x, rows))], rows, "bf16_bf16"


def as_bf16(rows: Array) -> Array:
    """As many rows of bf16, in memory of rows of f32."""
    if not rows.flags.c_contiguous:
        apart: Array = rows.view(ml_dtypes.bfloat16)[:, : rows.shape[1]]
        return apart
    together: Array = rows.reshape(-1).view(ml_dtypes.bfloat16)[: rows.size].reshape(rows.shape)
    return together


def is_bf16(x: Rows) -> bool:
    return bool(x.array.dtype == ml_dtypes.bfloat16)


def product_kernel(name: str, dtypes: str, result: Rows) -> Any:
    """Of sapper/kernels/matmul.py. dtypes: as of `narrowed`."""
    return getattr(matmul, f"{name}_{'rounded' if is_bf16(result) else dtypes}")


@runtime_checkable
class Rounds(Protocol):
    """A matrix in blocks that may be rounded to bf16 as it meets many rows. parts: its weights, panels first. block: of
    its form."""

    @property
    def parts(self) -> tuple[Array, ...]: ...

    @property
    def block(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    def near_kernels(self, result: str) -> Any:
        """Those of sapper/kernels/near.py; result: "bf16", or "f32", that of matmul_swiglu."""

    def rounds(self, work: Workspace) -> bool:
        """Whether it is then (`is_rounded` says what are many)."""

    def packed(self, rows: slice, work: Workspace, place: int) -> tuple[Packed, Steps]:
        """Some rows, whole panels of PACKED_ROWS, rounded to bf16, and the steps that make them so."""


def is_rounded(activations: int, rows: int) -> bool:
    """Whether it pays to round so many rows of weights for so many of activations, and they fill panels."""
    return activations >= ROUNDED_ROWS and rows % PACKED_ROWS == 0


def rows_rounded(matrices: Sequence[Rounds], name: str, x: Rows, rest: Sequence[Rows], work: Workspace) -> Steps:
    """`Matrix.apply_rows` with rows and weights rounded to bf16, some of the weights' rows at a time."""
    steps, x, dtypes = narrowed(x, "bf16", True, work)
    rows, columns = matrices[0].shape
    work.check_pairs()
    if x.array.nbytes <= NEAR_BYTES:
        return [*steps, _rounded_near(matrices, name, x, rest, work)]
    at_once = max(1, PACKED_BYTES // (2 * columns * len(matrices) * PACKED_ROWS)) * PACKED_ROWS
    for start in range(0, rows, at_once):
        part = slice(start, min(start + at_once, rows))
        made = [one.packed(part, work, place) for place, one in enumerate(matrices)]
        steps += [step for _, more in made for step in more]
        results = [Rows(one.array[:, part], one.count) for one in rest]
        steps.append((product_kernel(name, dtypes, results[-1]), (x, *(packed for packed, _ in made), *results)))
    return steps


def _rounded_near(
    matrices: Sequence[Rounds], name: str, x: Rows, rest: Sequence[Rows], work: Workspace
) -> tuple[Any, tuple[Any, ...]]:
    """The same by one kernel, in which each panel is rounded by who multiplies it."""
    rows, columns = matrices[0].shape
    blocks, block = panel_blocks(rows // PACKED_ROWS, work.workers), matrices[0].block
    parts = [part.reshape(*blocks, near.TOGETHER, *part.shape[1:]) for one in matrices for part in one.parts]
    room = work.panels_in_pairs(blocks[0], columns, block, len(matrices))
    others = [Rows(in_blocks(one.array, PACKED_ROWS).reshape(-1, *blocks, PACKED_ROWS), one.count) for one in rest]
    kernels = matrices[0].near_kernels("bf16" if is_bf16(rest[-1]) else "f32")
    return getattr(kernels, name.replace("_nt", "")), (Rows(in_blocks(x.array, block), x.count), *parts, *room, *others)


class Widens(Protocol):
    def widened(self, work: Workspace, place: int = 0) -> tuple[Array, str, Steps]:
        """The rows as a plain array, its dtype, and the steps that fill it."""


def rows_widened(matrices: Sequence[Widens], name: str, x: Rows, rest: Sequence[Rows], work: Workspace) -> Steps:
    """`Matrix.apply_rows` by way of plain arrays in f32."""
    plain = [one.widened(work, place) for place, one in enumerate(matrices)]
    steps = [step for _, _, made in plain for step in made]
    return [*steps, (getattr(matmul, f"{name}_f32"), (x, *(wide for wide, _, _ in plain), *rest))]
