"""The experts of a mixture in the form in which they are held, and the kernels that apply them.

In: arrays, or matrices in blocks one after the other. Out: `DenseExperts` and `BlockExperts`, which name, for each use,
the kernels and their arguments. Holds: what is so of matrices (linear.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from ..kernels import moe, moe_pairs, moe_rounded, narrow, near
from ..kernels.moe_blocks import exact_experts, panel_blocks, product_experts
from ..kernels.quantized import PANEL
from ..runtime.program import Rows
from .linear import Blocks
from .rounded import is_bf16, narrowed
from .workspace import PACKED_ROWS, Array, Steps, Workspace, in_blocks


class Experts(Protocol):
    """Weights [experts, rows, columns], a matrix for each expert, and what can be done with them.

    experts: indices; ranges: where each expert's rows begin and end, of tokens in their order (sapper/kernels/moe.py).
    """

    @property
    def nbytes(self) -> int:
        """Of one expert."""

    @property
    def size(self) -> int:
        """How many weights one expert has."""

    @property
    def copies(self) -> bool:
        """Whether apply_groups takes x in f32 apart first, so that y may lie where x does."""

    def apply_swiglu(self, up: Any, experts: Array, x: Array, y: Array, work: Workspace) -> Steps:
        """y[k] = silu(W x) * (up x) of expert experts[k]; up is of the same form."""

    def apply_weighted(
        self, experts: Array, weights: Array, x: Array, residual: Array, y: Array, work: Workspace
    ) -> Steps:
        """y = residual + the sum over k of weights[k] * (W x[k]) of expert experts[k]"""

    def rounds(self, matrices: int, rows: int, work: Workspace) -> bool:
        """Whether apply_groups may round rows for which there is such room to bf16, with so many matrices that they
        meet."""

    def apply_groups(
        self, others: Sequence[Any], x: Rows, ranges: tuple[Array, ...], y: Rows, work: Workspace
    ) -> Steps:
        """y[m] = W x[m] for the rows of each expert; with others = [up]: silu(W x[m]) * (up x[m]). x lies in bf16 where
        it is rounded; of two matrices y does so then, too."""


FEW_ROWS, FEW_ROUNDED_ROWS = 4, 2
"""Rows of an expert, on average, up to which they go sooner one by one; and up to which that is so though they are to
be rounded. On one thread of a Granite Rapids a step of 2, 4, 8 and 12 sequences of the bench's DeepSeek, whose tokens
take 6 of 18 experts, takes 39, 55, 87 and 102 ms one by one and in f32, and 67, 76, 87 and 90 rounded."""

ROUNDED_MIXTURE_ROWS = 32
"""The same of an expert, on average. On a Zen 5 without tile registers products of bf16 then take 1.8 times as long as
those of 8 bits, of 170 rows 1.3 times: who rounds wants the accuracy."""


ROUNDED_MIXTURE_BYTES = 3 << 23
"""How much memory rounding takes at most where nobody asked for it: a V2-Lite's 4096 rows, which its shared experts
have too, take 17 MB."""


def is_rounded_mixture(activations: int, experts: int, rows: int) -> bool:
    """`is_rounded` of rows of activations that so many experts share, each of so many rows of weights."""
    return activations >= ROUNDED_MIXTURE_ROWS * experts and rows % PACKED_ROWS == 0


def _groups_of(arrays: Sequence[Array], dtypes: str, x: Rows, ranges: tuple[Array, ...], y: Rows) -> Steps:
    """`apply_groups` of plain arrays [experts, rows, columns]."""
    blocks = [weights.reshape(len(weights), *moe.blocks_of(weights.shape[1]), -1) for weights in arrays]
    return _groups_in_blocks(blocks, dtypes, x, ranges, y)


def _groups_in_blocks(blocks: Sequence[Array], dtypes: str, x: Rows, ranges: tuple[Array, ...], y: Rows) -> Steps:
    """The same of arrays [experts, blocks, rows of a block, columns]."""
    result = Rows(y.array.reshape(len(y.array), *blocks[0].shape[1:3]), y.count)
    few = len(x.array) <= FEW_ROWS * len(blocks[0]) and "bf16_bf16" not in dtypes
    name = ("grouped_matvec" if few else "grouped_matmul") + ("_swiglu" if len(blocks) > 1 else "")
    return [(getattr(moe, f"{name}_{dtypes}"), (x, *ranges, *blocks, result))]


@dataclass(frozen=True, slots=True)
class DenseExperts:
    """weights [experts, panels, columns, rows of a panel], f32 or bf16 as `dtype` says, or [experts, panels, pairs of
    columns, rows of a panel, 2] of bf16 (moe_pairs.py). rounded: see Dense."""

    weights: Array
    dtype: str
    rounded: bool = False

    @property
    def nbytes(self) -> int:
        return int(self.weights[0].nbytes)

    @property
    def size(self) -> int:
        return int(self.weights[0].size)

    @property
    def copies(self) -> bool:
        return False

    @property
    def in_pairs(self) -> bool:
        return self.weights.ndim > 4

    def apply_swiglu(self, up: DenseExperts, experts: Array, x: Array, y: Array, work: Workspace) -> Steps:
        if self.in_pairs:
            row = work.narrow(1, x.size)
            return [(narrow.narrow_bf16, (x[None], row)), (moe_pairs.expert_pairs_swiglu, (
                self.weights, up.weights, experts, in_blocks(row[0], 2), self._in_panels(y)))]
        kernel = getattr(moe, f"expert_matvec_swiglu_{self.dtype}")
        return [(kernel, (self.weights, up.weights, experts, x, self._in_panels(y)))]

    def _in_panels(self, vectors: Array) -> Array:
        """[..., rows] as [..., panels, rows of a panel]."""
        return vectors.reshape(*vectors.shape[:-1], self.weights.shape[1], self.weights.shape[3])

    def apply_weighted(
        self, experts: Array, weights: Array, x: Array, residual: Array, y: Array, work: Workspace
    ) -> Steps:
        products = work.wide(0, len(experts), y.size)
        results = [self._in_panels(one) for one in (residual, products, y)]
        if self.in_pairs:
            rows = work.narrow(*x.shape)
            return [(narrow.narrow_bf16, (x, rows)), (moe_pairs.expert_pairs, (
                self.weights, experts, weights, in_blocks(rows, 2), *results))]
        return [(getattr(moe, f"expert_matvec_{self.dtype}"), (self.weights, experts, weights, x, *results))]

    def rounds(self, matrices: int, rows: int, work: Workspace) -> bool:
        """Few rows go one by one: products of bf16 would copy all weights for them, but where these lie in pairs."""
        return self.in_pairs or (self.rounded and rows > FEW_ROUNDED_ROWS * len(self.weights))

    def apply_groups(
        self, others: Sequence[DenseExperts], x: Rows, ranges: tuple[Array, ...], y: Rows, work: Workspace
    ) -> Steps:
        if self.in_pairs:
            steps, x, _ = narrowed(x, self.dtype, True, work)
            kernel = (moe_pairs.grouped_pairs if not others else moe_pairs.grouped_pairs_swiglu_bf16 if is_bf16(y) else
                      moe_pairs.grouped_pairs_swiglu_f32)
            weights = [one.weights for one in (self, *others)]
            return [*steps, (kernel, (
                Rows(in_blocks(x.array, 2), x.count), *ranges, *weights, Rows(self._in_panels(y.array), y.count)))]
        blocks = [one.weights.swapaxes(2, 3) for one in (self, *others)]
        return _groups_in_blocks(blocks, "bf16_bf16" if is_bf16(x) else self.dtype, x, ranges, y)


@dataclass(frozen=True, slots=True)
class PanelExperts(ABC):
    """Experts in the panels of a form of blocks. together: the panels of all, one after the other, as one matrix."""

    together: Any
    count: int

    @property
    def nbytes(self) -> int:
        return int(self.together.nbytes) // self.count

    @property
    def size(self) -> int:
        return int(self.together.size) // self.count

    # ---- what a form says

    @abstractmethod
    def _parts(self) -> tuple[Array, ...]:
        """The weights as operands of kernels, an expert after the other."""

    @abstractmethod
    def _kernel(self, task: str) -> Any:
        """That of a task, such as "grouped"."""

    @property
    @abstractmethod
    def _rounded_kernels(self) -> Any:
        """Those of sapper/kernels/moe_rounded.py."""

    # ---- products

    def apply_swiglu(self, up: Self, experts: Array, x: Array, y: Array, work: Workspace) -> Steps:
        steps, operands = self.together.operands(x, work)
        return [*steps, (self._kernel("expert_matmul_swiglu"), (
            *self._parts(), *up._parts(), experts, *operands, in_blocks(y, PANEL)))]

    def apply_groups(
        self, others: Sequence[Self], x: Rows, ranges: tuple[Array, ...], y: Rows, work: Workspace
    ) -> Steps:
        if is_bf16(x):
            return self._groups_rounded(others, x, ranges, y, work)
        steps, operands = self.together.quantized_rows(x, work)
        blocks = panel_blocks(self._rows // PANEL, work.workers)
        parts = [part.reshape(self.count, *blocks, *part.shape[2:])
                 for one in (self, *others) for part in one._parts()]
        kernel = self._kernel("grouped_swiglu" if others else "grouped")
        return [*steps, (kernel, (
            *operands, *ranges, *parts, Rows(y.array.reshape(len(y.array), *blocks, PANEL), y.count)))]

    @property
    def _rows(self) -> int:
        """Of one expert."""
        return int(self.together.shape[0]) // self.count

    def rounds(self, matrices: int, rows: int, work: Workspace) -> bool:
        room_bytes = 2 * self.together.shape[1] * (rows + matrices * self._rounded_blocks(work)[0] * PACKED_ROWS)
        wanted = self.together.rounded or (room_bytes <= ROUNDED_MIXTURE_BYTES and self.together.rounds(work))
        return wanted and is_rounded_mixture(rows, self.count, self._rows)

    def _groups_rounded(
        self, others: Sequence[Self], x: Rows, ranges: tuple[Array, ...], y: Rows, work: Workspace
    ) -> Steps:
        """apply_groups of rows in bf16, with weights rounded to it."""
        matrices, columns, block = (self, *others), self.together.shape[1], self.together.block
        blocks = self._rounded_blocks(work)
        parts = [part.reshape(self.count, *blocks, near.TOGETHER, *part.shape[1:])
                 for one in matrices for part in one.together.parts]
        room = work.panels_in_pairs(blocks[0], columns, block, len(matrices))
        kernel = getattr(self._rounded_kernels, "grouped_swiglu_rounded" if others else "grouped_rounded")
        return [(kernel, (
            Rows(in_blocks(x.array, block), x.count), *ranges, *parts, *room,
            Rows(y.array.reshape(len(y.array), *blocks, PACKED_ROWS), y.count)))]

    def _rounded_blocks(self, work: Workspace) -> tuple[int, int]:
        """How many blocks an expert's rows are for the kernels that round, and of how many panels each."""
        return panel_blocks(self._rows // PACKED_ROWS, work.workers)


@dataclass(frozen=True, slots=True)
class BlockExperts(PanelExperts):
    """Weights in blocks."""

    together: Blocks

    @property
    def copies(self) -> bool:
        return not self.together.exact

    def _parts(self) -> tuple[Array, ...]:
        parts = self.together.parts if self.together.exact else self.together.grouped()
        return tuple(part.reshape(self.count, -1, *part.shape[1:]) for part in parts)

    @property
    def _rounded_kernels(self) -> Any:
        return moe_rounded.rounded_experts(self.together.form)

    def _kernel(self, task: str) -> Any:
        if self.together.exact:
            return getattr(exact_experts(self.together.form), task.replace("matmul", "matvec"))
        return getattr(product_experts(self.together.form, self.together.group), task)

    def apply_weighted(
        self, experts: Array, weights: Array, x: Array, residual: Array, y: Array, work: Workspace
    ) -> Steps:
        steps, operands = self.together.operands(x, work)
        count = len(experts)
        products = () if self.together.exact else (in_blocks(work.wide(0, count, y.size), PANEL),)
        vectors = in_blocks(residual, PANEL), *products, in_blocks(y, PANEL)
        return [*steps, (self._kernel("expert_matmul"), (*self._parts(), experts, weights, *operands, *vectors))]

    def apply_groups(
        self, others: Sequence[Self], x: Rows, ranges: tuple[Array, ...], y: Rows, work: Workspace
    ) -> Steps:
        if not self.together.exact:
            return PanelExperts.apply_groups(self, others, x, ranges, y, work)
        plain = [one.together.widened(work, place) for place, one in enumerate((self, *others))]
        wide = [rows.reshape(self.count, -1, rows.shape[1]) for rows, _, _ in plain]
        return [*(step for _, _, steps in plain for step in steps), *_groups_of(wide, "f32", x, ranges, y)]
