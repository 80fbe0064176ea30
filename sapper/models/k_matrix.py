"""Matrices in GGUF's Q3_K to Q6_K, used as the file has them but for the order (sapper/kernels/k_quants.py).

In: a tensor of a GGUF file. Out: `KMatrix`, beside `Blocks` (linear.py). Holds: dequantised they are, bit for bit,
what ggml makes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ..kernels import k_quants
from ..kernels.k_quants import PANEL, SPLITS, SUPER
from ..kernels.moe_k import experts_of
from ..kernels.moe_rounded import rounded_k_experts
from ..kernels.near import near_k_kernels
from ..runtime.buffers import Arena
from ..runtime.packed import Packed
from ..runtime.program import Rows
from .experts import PanelExperts
from .rounded import is_rounded, rows_rounded, rows_widened
from .workspace import Steps, Workspace, in_blocks

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


ROWS_AT_ONCE = 128
"""That become panels at a time: bytes of their quants stay in a second cache."""


@dataclass(frozen=True, slots=True)
class RawK:
    """Rows of a file, not yet in panels. kind: ggml's name of the format. raw: bytes [rows, super blocks, of each]."""

    kind: str
    raw: Array

    @classmethod
    def parse(cls, data: memoryview, shape: tuple[int, ...], kind: str) -> RawK | None:
        """None for another format, or rows that make no panels."""
        if kind not in SPLITS or len(shape) != 2 or shape[0] % PANEL or shape[1] % SUPER:
            return None
        return cls(kind, np.frombuffer(data, np.uint8).reshape(shape[0], shape[1] // SUPER, SPLITS[kind][1]))

    @property
    def form(self) -> str:
        return SPLITS[self.kind][0]

    def split(self, count: int, axis: int) -> list[RawK | None]:
        """In so many equal parts by rows (axis 0) or columns (1); [None] where columns do not part between blocks."""
        if self.raw.shape[axis] % count:
            return [None]
        return [RawK(self.kind, part) for part in np.split(self.raw, count, axis=axis)]

    def reordered(self, order: Any) -> RawK:
        return RawK(self.kind, order(self.raw))

    @staticmethod
    def together(pieces: Sequence[RawK], arena: Arena, exact: bool = False) -> KMatrix:
        """The rows of all pieces, one after the other. exact: see Blocks."""
        form, panels = pieces[0].form, sum(len(piece.raw) for piece in pieces) // PANEL
        target = arena.empty((panels, pieces[0].raw.shape[1], k_quants.WORDS[form], PANEL, k_quants.SLOT), np.uint8)
        start = 0
        for piece in pieces:
            for first in range(0, len(piece.raw), ROWS_AT_ONCE):
                rows = piece.raw[first : first + ROWS_AT_ONCE]
                stop = start + len(rows) // PANEL
                target[start:stop] = k_quants.panels_of(form, SPLITS[piece.kind][2](rows))
                start = stop
        return KMatrix(form, target, exact)

    @staticmethod
    def experts(pieces: Sequence[RawK], count: int, arena: Arena, exact: bool = False) -> KExperts | None:
        """The same as matrices of one shape, so many; None where all is to be exact, for which there are no kernels."""
        return None if exact else KExperts(RawK.together(pieces, arena), count)


@dataclass(frozen=True, slots=True)
class KMatrix:
    """form: one of k_quants.WORDS. w: in panels. exact: activations stay f32, else they are quantised too. rounded:
    see Blocks."""

    form: str
    w: Array
    exact: bool = False
    rounded: bool = False

    @property
    def parts(self) -> tuple[Array, ...]:
        return (self.w,)

    @property
    def block(self) -> int:
        """As of Blocks."""
        return SUPER

    @property
    def nbytes(self) -> int:
        return self.w.nbytes

    @property
    def shape(self) -> tuple[int, int]:
        return self.w.shape[0] * PANEL, self.w.shape[1] * SUPER

    @property
    def size(self) -> int:
        rows, columns = self.shape
        return rows * columns

    @property
    def quantises(self) -> bool:
        return not self.exact

    def _kernel(self, task: str) -> Any:
        return getattr(k_quants.kernels_of(self.form), task)

    def quantized_rows(self, x: Array | Rows, work: Workspace) -> tuple[Steps, tuple[Array, ...]]:
        """Rows as operands of products, and the step that makes them."""
        rows, columns = x.array.shape if isinstance(x, Rows) else x.shape
        operands = work.super_quants(rows, columns)
        groups = Rows(in_blocks(x.array, SUPER), x.count) if isinstance(x, Rows) else in_blocks(x, SUPER)
        return [(k_quants.quantize_super, (groups, *operands))], operands

    def operands(self, x: Array, work: Workspace) -> tuple[Steps, tuple[Array, ...]]:
        """The same of a vector, or of rows of vectors."""
        return self.quantized_rows(x.reshape(-1, x.shape[-1]), work)

    @property
    def quants(self) -> tuple[int, ...]:
        """What quantised rows are alike by."""
        return (SUPER,)

    def product(self, task: str, matrices: Sequence[KMatrix], operands: Sequence[Array], *vectors: Array) -> Steps:
        """A product with a vector that is quantised. task: what comes after "matmul" in the kernel's name."""
        panels = (in_blocks(vector, PANEL)[None] for vector in vectors)
        return [(self._kernel(f"matmul{task}"), (*(one.w for one in matrices), *operands, *panels))]

    def rows_product(
        self, name: str, matrices: Sequence[KMatrix], operands: Sequence[Array], rest: Sequence[Rows]
    ) -> Steps:
        """`apply_rows` of rows that are quantised."""
        panels = [Rows(in_blocks(one.array, PANEL), one.count) for one in rest]
        return [(self._kernel(name.replace("_nt", "")), (*(one.w for one in matrices), *operands, *panels))]

    def _apply(self, task: str, matrices: Sequence[KMatrix], x: Array, work: Workspace, *vectors: Array) -> Steps:
        """A product with a vector. task: as of `product`."""
        if not self.exact:
            steps, operands = self.operands(x, work)
            return steps + self.product(task, matrices, operands, *vectors)
        panels = [in_blocks(vector, PANEL) for vector in vectors]
        return [(self._kernel(f"matvec{task}"), (*(one.w for one in matrices), in_blocks(x, SUPER), *panels))]

    def apply(self, x: Array, y: Array, work: Workspace) -> Steps:
        return self._apply("", [self], x, work, y)

    def apply_norm(self, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace) -> Steps:
        steps, normed = work.norm(x, gain, epsilon)
        return steps + self.apply(normed, y, work)

    def apply_norm_swiglu(
        self, up: KMatrix, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace
    ) -> Steps:
        steps, normed = work.norm(x, gain, epsilon)
        return steps + self._apply("_swiglu", [self, up], normed, work, y)

    def apply_residual(self, x: Array, residual: Array, y: Array, work: Workspace) -> Steps:
        return self._apply("_residual", [self], x, work, residual, y)

    def look_up(self, tokens: Array, y: Array) -> Steps:
        return [(self._kernel("embedding"), (tokens, self.w, in_blocks(y, SUPER)))]

    def apply_rows(
        self, name: str, x: Rows, others: Sequence[KMatrix], rest: Sequence[Rows], work: Workspace
    ) -> Steps:
        matrices = (self, *others)
        if self.exact:
            return rows_widened(matrices, name, x, rest, work)
        if self.rounds_rows(len(x.array), work):
            return rows_rounded(matrices, name, x, rest, work)
        steps, operands = self.quantized_rows(x, work)
        return steps + self.rows_product(name, matrices, operands, rest)

    def rounds(self, work: Workspace) -> bool:
        return self.rounded or (self.quantises and work.rounds_many())

    def rounds_rows(self, rows: int, work: Workspace) -> bool:
        return not self.exact and self.rounds(work) and is_rounded(rows, self.shape[0])

    def widened(self, work: Workspace, place: int = 0) -> tuple[Array, str, Steps]:
        rows, columns = self.shape
        wide = work.wide(place, rows, columns)
        panels = in_blocks(wide, SUPER).reshape(rows // PANEL, PANEL, -1, SUPER)
        return wide, "f32", [(self._kernel("dequantize"), (self.w, panels))]

    def near_kernels(self, result: str) -> Any:
        return near_k_kernels(self.form, result)

    def packed(self, rows: slice, work: Workspace, place: int) -> tuple[Packed, Steps]:
        """As Blocks.packed."""
        made = work.packed_pairs(place, rows.stop - rows.start, self.shape[1])
        panels, pairs = self.w[rows.start // PANEL : rows.stop // PANEL], made.blocks
        w = panels.reshape(len(pairs), -1, *panels.shape[1:])
        blocks = pairs.reshape(len(pairs), panels.shape[1], SUPER // 2, w.shape[1], PANEL, 2)
        return made, [(self._kernel("widen_pairs"), (w, blocks))]


@dataclass(frozen=True, slots=True)
class KExperts(PanelExperts):
    """Weights in super-blocks."""

    together: KMatrix

    @property
    def copies(self) -> bool:
        return True

    def _parts(self) -> tuple[Array, ...]:
        return (self.together.w.reshape(self.count, -1, *self.together.w.shape[1:]),)

    @property
    def _rounded_kernels(self) -> Any:
        return rounded_k_experts(self.together.form)

    def _kernel(self, task: str) -> Any:
        return getattr(experts_of(self.together.form), task)

    def apply_weighted(
        self, experts: Array, weights: Array, x: Array, residual: Array, y: Array, work: Workspace
    ) -> Steps:
        steps, operands = self.together.operands(x, work)
        vectors = (in_blocks(one, PANEL) for one in (residual, work.wide(0, len(experts), y.size), y))
        return [*steps, (self._kernel("expert_matmul"), (*self._parts(), experts, weights, *operands, *vectors))]
