"""The matrices of a model in the form in which they are held, and the kernels that apply them.

In: arrays. Out: `Dense` and `Blocks`, which name, for each use of a matrix, the kernels and their arguments. Holds: the
session asks a matrix what to run and never what it is made of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..kernels import embedding, matmul, matvec, narrow, norm, quantized
from ..kernels.near import near_kernels
from ..kernels.quantized import PANEL, Form
from ..kernels.widen import widening_kernels
from ..runtime.packed import Packed
from ..runtime.program import Rows
from .rounded import is_rounded, narrowed, product_kernel, rows_rounded, rows_widened
from .workspace import Array, Steps, Workspace, in_blocks


class Matrix(Protocol):
    """Weights [rows, columns] and what can be done with them. x, y, gain, residual are vectors in f32."""

    @property
    def nbytes(self) -> int: ...

    @property
    def size(self) -> int:
        """How many weights."""

    @property
    def quantises(self) -> bool:
        """Whether it quantises the vector that it meets."""

    def apply(self, x: Array, y: Array, work: Workspace) -> Steps:
        """y = W x"""

    def apply_norm(self, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace) -> Steps:
        """y = W rms_norm(x)"""

    def apply_norm_swiglu(
        self, up: Any, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace
    ) -> Steps:
        """y = silu(W n) * (up n), n = rms_norm(x); up is of the same form."""

    def apply_residual(self, x: Array, residual: Array, y: Array, work: Workspace) -> Steps:
        """y = residual + W x"""

    def look_up(self, tokens: Array, y: Array) -> Steps:
        """y[t] = row tokens[t]"""

    def rounds_rows(self, rows: int, work: Workspace) -> bool:
        """Whether apply_rows rounds so many rows to bf16: they may lie so already, and so may what it gives."""

    def apply_rows(self, name: str, x: Rows, others: Sequence[Any], rest: Sequence[Rows], work: Workspace) -> Steps:
        """The matrix kernel of that name (sapper/kernels/matmul.py) on the rows x. others: further matrices of the same
        form that it takes; rest: its other operands, and the result."""


@dataclass(frozen=True, slots=True)
class Dense:
    """weights [rows, columns], f32 or bf16 as `dtype` says, as an array or packed. rounded, of bf16: several rows of
    activations are rounded to it as well, so that packed dot products take them, and a single one where the weights are
    packed in pairs; otherwise they stay f32."""

    weights: Array | Packed
    dtype: str
    rounded: bool = False

    @property
    def quantises(self) -> bool:
        return False

    @property
    def nbytes(self) -> int:
        """Without what fills the last panel."""
        weights = self.weights
        return self.size * (weights.dtype.size_bytes if isinstance(weights, Packed) else weights.itemsize)

    @property
    def size(self) -> int:
        return math.prod(self.weights.shape)

    @property
    def array(self) -> Array:
        """The weights where they are not packed."""
        assert isinstance(self.weights, np.ndarray)
        return self.weights

    @property
    def in_pairs(self) -> bool:
        """Whether columns lie in pairs, as products of bf16 alone read them."""
        return isinstance(self.weights, Packed) and self.weights.panels.elements > 1

    def apply(self, x: Array, y: Array, work: Workspace) -> Steps:
        if self.in_pairs:
            return self._rounded_row("matmul_nt", x, work, y)
        return [(getattr(matvec, f"matvec_{self.dtype}"), (self.weights, x, y))]

    def apply_norm(self, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace) -> Steps:
        if self.in_pairs:
            return self._rounded_row("matmul_nt", x, work, y, norm_by=(gain, epsilon))
        steps, normed = work.norm(x, gain, epsilon)
        return steps + self.apply(normed, y, work)

    def apply_norm_swiglu(
        self, up: Dense, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace
    ) -> Steps:
        if self.in_pairs:
            return self._rounded_row("matmul_swiglu", x, work, y, others=(up,), norm_by=(gain, epsilon))
        steps, normed = work.norm(x, gain, epsilon)
        return [*steps, (getattr(matvec, f"matvec_swiglu_{self.dtype}"), (self.weights, up.weights, normed, y))]

    def apply_residual(self, x: Array, residual: Array, y: Array, work: Workspace) -> Steps:
        if self.in_pairs:
            return self._rounded_row("matmul_nt_residual", x, work, residual, y)
        return [(getattr(matvec, f"matvec_residual_{self.dtype}"), (self.weights, x, residual, y))]

    def _rounded_row(self, name: str, x: Array, work: Workspace, *rest: Array, others: Sequence[Dense] = (),
                     norm_by: tuple[Array, float] | None = None) -> Steps:
        """The matrix kernel of that name on one row, rounded to bf16; norm_by: after its norm by this gain and epsilon.
        """
        row = work.narrow(1, x.size)
        step = (narrow.narrow_bf16, (x[None], row)) if norm_by is None else (
            norm.rms_norm_rounded, (x[None], *norm_by, row))
        weights = [one.weights for one in (self, *others)]
        return [step, (getattr(matmul, f"{name}_bf16_bf16"), (row, *weights, *(one[None] for one in rest)))]

    def look_up(self, tokens: Array, y: Array) -> Steps:
        if self.in_pairs:
            assert isinstance(self.weights, Packed)
            return [(embedding.embedding_pairs_bf16, (tokens, self.weights.blocks, in_blocks(y, 2)))]
        if isinstance(self.weights, Packed):
            panels = self.weights.blocks[..., 0]
            return [(getattr(embedding, f"embedding_panels_{self.dtype}"), (tokens, panels, y))]
        return [(getattr(embedding, f"embedding_{self.dtype}"), (tokens, self.weights, y))]

    def rounds_rows(self, rows: int, work: Workspace) -> bool:
        return self.rounded

    def apply_rows(self, name: str, x: Rows, others: Sequence[Dense], rest: Sequence[Rows], work: Workspace) -> Steps:
        steps, x, dtypes = narrowed(x, self.dtype, self.rounded, work)
        kernel = product_kernel(name, dtypes, rest[-1])
        return [*steps, (kernel, (x, *(one.weights for one in (self, *others)), *rest))]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Weights in blocks, in the panels of sapper/kernels/quantized.py.

    parts: quants and scales. exact: activations stay f32; otherwise they are quantised too, which is much faster.
    rounded: those of many tokens (ROUNDED_ROWS) are rounded to bf16 instead, and so are the weights that they meet.
    """

    form: Form
    parts: tuple[Array, ...]
    exact: bool = False
    rounded: bool = False

    @property
    def quantises(self) -> bool:
        return not self.exact

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def size(self) -> int:
        rows, columns = self.shape
        return rows * columns

    @property
    def shape(self) -> tuple[int, int]:
        panels, blocks = self.parts[0].shape[:2]
        return panels * PANEL, blocks * self.form.block

    @property
    def block(self) -> int:
        """Weights of a row that share a scale."""
        return self.form.block

    @property
    def group(self) -> int:
        """Activations that share a scale: as many as weights do. Of 128 where weights share by 32, products of 4096
        columns take 3 to 10 % less time (of 8 bits up to 30 %), and logits of SmolLM2 are off by 1.6 times as much."""
        return self.form.block

    def _kernel(self, task: str) -> Any:
        kernels = (quantized.product_kernels(self.form, self.group) if task.startswith("matmul")
                   else quantized.exact_kernels(self.form))
        return getattr(kernels, task)

    def grouped(self) -> tuple[Array, ...]:
        """The parts with a row's blocks by groups of activations."""
        each = self.group // self.form.block
        return tuple(part.reshape(len(part), -1, each, *part.shape[2:]) for part in self.parts)

    def operands(self, x: Array, work: Workspace) -> tuple[Steps, tuple[Array, ...]]:
        """A vector, or rows of vectors, as operands of this form's kernels, and the steps that prepare them."""
        if self.exact:
            return [], (in_blocks(x, self.form.block),)
        return self.quantized_rows(x.reshape(-1, x.shape[-1]), work)

    def quantized_rows(self, x: Array | Rows, work: Workspace) -> tuple[Steps, tuple[Array, ...]]:
        """The same of rows, perhaps a variable number of them, always quantised."""
        kernels = quantized.quantize_kernels(self.form.block, self.group)
        rows, columns = x.array.shape if isinstance(x, Rows) else x.shape
        operands = work.quants(rows, columns, self.form.block, self.group)
        groups = Rows(in_blocks(x.array, self.group), x.count) if isinstance(x, Rows) else in_blocks(x, self.group)
        return [(kernels.quantize_groups, (groups, self.form.offset, *operands))], operands

    def norm(self, x: Array, gain: Array, epsilon: float, work: Workspace) -> tuple[Steps, tuple[Array, ...]]:
        """The same of rms_norm(x)."""
        if self.exact:
            steps, normed = work.norm(x, gain, epsilon)
            return steps, (in_blocks(normed, self.form.block),)
        operands = work.quants(1, x.size, self.form.block, self.group)
        vectors = in_blocks(x, self.group), in_blocks(gain, self.group)
        kernels = quantized.quantize_kernels(self.form.block, self.group)
        return [(kernels.rms_norm_quantize_groups, (*vectors, epsilon, self.form.offset, *operands))], operands

    @property
    def quants(self) -> tuple[int, ...]:
        """What quantised rows are alike by."""
        return self.form.block, self.group, self.form.offset

    def product(self, task: str, matrices: Sequence[Blocks], operands: Sequence[Array], *vectors: Array) -> Steps:
        """A product with a vector, which `operands` gave. task: what comes after "matmul" or "matvec" in the kernel's
        name."""
        panels = [in_blocks(vector, PANEL) for vector in vectors]
        if self.exact:
            weights = [part for one in matrices for part in one.parts]
            return [(self._kernel(f"matvec{task}"), (*weights, *operands, *panels))]
        weights = [part for one in matrices for part in one.grouped()]
        return [(self._kernel(f"matmul{task}"), (*weights, *operands, *(one[None] for one in panels)))]

    def apply(self, x: Array, y: Array, work: Workspace) -> Steps:
        steps, operands = self.operands(x, work)
        return steps + self.product("", [self], operands, y)

    def apply_norm(self, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace) -> Steps:
        steps, operands = self.norm(x, gain, epsilon, work)
        return steps + self.product("", [self], operands, y)

    def apply_norm_swiglu(
        self, up: Blocks, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace
    ) -> Steps:
        steps, operands = self.norm(x, gain, epsilon, work)
        return steps + self.product("_swiglu", [self, up], operands, y)

    def apply_residual(self, x: Array, residual: Array, y: Array, work: Workspace) -> Steps:
        steps, operands = self.operands(x, work)
        return steps + self.product("_residual", [self], operands, residual, y)

    def look_up(self, tokens: Array, y: Array) -> Steps:
        return [(self._kernel("embedding"), (tokens, *self.parts, in_blocks(y, self.form.block)))]

    def apply_rows(self, name: str, x: Rows, others: Sequence[Blocks], rest: Sequence[Rows], work: Workspace) -> Steps:
        matrices = (self, *others)
        if self.exact:
            return rows_widened(matrices, name, x, rest, work)
        if self.rounds_rows(len(x.array), work):
            return rows_rounded(matrices, name, x, rest, work)
        steps, operands = self.quantized_rows(x, work)
        return steps + self.rows_product(name, matrices, operands, rest)

    def rows_product(
        self, name: str, matrices: Sequence[Blocks], operands: Sequence[Array], rest: Sequence[Rows]
    ) -> Steps:
        """`apply_rows` of rows that are quantised."""
        parts = [part for one in matrices for part in one.grouped()]
        panels = [Rows(in_blocks(one.array, PANEL), one.count) for one in rest]
        return [(self._kernel(name.replace("_nt", "")), (*parts, *operands, *panels))]

    def rounds(self, work: Workspace) -> bool:
        return self.rounded or (self.quantises and work.rounds_many())

    def rounds_rows(self, rows: int, work: Workspace) -> bool:
        return not self.exact and self.rounds(work) and is_rounded(rows, self.shape[0])

    def widened(self, work: Workspace, place: int = 0) -> tuple[Array, str, Steps]:
        """The rows as a plain array, its dtype, and the step that fills it."""
        rows, columns = self.shape
        wide = work.wide(place, rows, columns)
        panels = in_blocks(wide, self.form.block).reshape(rows // PANEL, PANEL, -1, self.form.block)
        return wide, "f32", [(self._kernel("dequantize"), (*self.parts, panels))]

    def near_kernels(self, result: str) -> Any:
        return near_kernels(self.form, result)

    def packed(self, rows: slice, work: Workspace, place: int) -> tuple[Packed, Steps]:
        """Some rows, whole panels of PACKED_ROWS, rounded to bf16, and the step that makes them so."""
        panels, width = slice(rows.start // PANEL, rows.stop // PANEL), self.shape[1]
        packed = work.packed_pairs(place, rows.stop - rows.start, width)
        blocks = packed.blocks
        quants, scales = (part[panels].reshape(len(blocks), 2, *part.shape[1:]) for part in self.parts)
        pairs = blocks.reshape(len(blocks), width // self.form.block, self.form.halves, self.form.words, 2, 2, PANEL, 2)
        return packed, [(widening_kernels(self.form, "bf16").widen_pairs, (quants, scales, pairs))]
