"""The matrices of all heads that make keys and values of latent vectors, in the form in which they are held.

In: a loader's matrices. Out: `DenseHeads`, `KeyBlocks` and `ValueBlocks`. Holds: of a prompt keys and values are made
by rows [heads * features, rank] in f32 or bf16; those in blocks are widened to bf16 for a moment, in memory that all
layers share; but values where the processor has no products of bf16, which are slower than those of 8 bits. One
token's queries are absorbed, and what they find is projected, by the matrices as they are held: by
blocks in products of 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from ...kernels import mla, narrow, paged
from ...kernels.mla_blocks import head_matmul_of, head_matmul_of_k
from ...kernels.quantized import PANEL
from ...kernels.widen import widening_kernels
from ...runtime.packed import Packed
from ...runtime.program import Rows
from ..k_matrix import KMatrix
from ..linear import Blocks, Dense
from ..workspace import PACKED_ROWS, Steps, Workspace, in_blocks

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Vectors: TypeAlias = Array | Rows
"""Rows, or an array of one."""


class Heads(Protocol):
    """What keys and values share."""

    @property
    def nbytes(self) -> int: ...

    @property
    def size(self) -> int:
        """How many weights."""

    @property
    def rounded(self) -> bool:
        """As of Dense."""

    @property
    def dtype(self) -> str:
        """Of `rows`."""

    def rows(self, rounded: bool, work: Workspace) -> tuple[Array | Packed, Steps]:
        """The rows [heads * features, rank], as an array or packed, and the steps that make them. rounded: whether they
        meet bf16, in products of it."""


class Keys(Heads, Protocol):
    def absorb(self, x: Vectors, y: Vectors, work: Workspace) -> Steps:
        """Queries in the latent space: x [rows, heads * features], a head's first ones of which meet its keys; y [rows,
        heads * rank]."""


class Values(Heads, Protocol):
    def project(self, x: Vectors, y: Vectors, work: Workspace) -> Steps:
        """What each head found, from the latent space: x [rows, heads * rank], y [rows, heads * features]."""


def _each(vectors: Vectors, change: Callable[[Array], Array]) -> Vectors:
    return Rows(change(vectors.array), vectors.count) if isinstance(vectors, Rows) else change(vectors)


@dataclass(frozen=True, slots=True)
class DenseHeads:
    """weights [heads, features, rank]; dtype, rounded: see Dense."""

    weights: Array
    dtype: str
    rounded: bool

    @classmethod
    def of(cls, rows: Dense, heads: int) -> DenseHeads:
        return cls(rows.array.reshape(heads, -1, rows.array.shape[1]), rows.dtype, rows.rounded)

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes

    @property
    def size(self) -> int:
        return self.weights.size

    def rows(self, rounded: bool, work: Workspace) -> tuple[Array, Steps]:
        return self.weights.reshape(-1, self.weights.shape[2]), []

    def absorb(self, x: Vectors, y: Vectors, work: Workspace) -> Steps:
        heads, features, _ = self.weights.shape
        return self._apply("absorb", _each(x, lambda one: in_blocks(one, one.shape[1] // heads)[..., :features]), y)

    def project(self, x: Vectors, y: Vectors, work: Workspace) -> Steps:
        return self._apply("project_values", _each(x, lambda one: in_blocks(one, self.weights.shape[2])), y)

    def _apply(self, task: str, x: Vectors, y: Vectors) -> Steps:
        y = _each(y, lambda one: in_blocks(one, one.shape[1] // len(self.weights)))
        if isinstance(x, Rows) or isinstance(y, Rows):
            return [(getattr(paged, f"{task}_rows_{self.dtype}"), (x, self.weights, y))]
        return [(getattr(mla, f"{task}_{self.dtype}"), (x[0], self.weights, y[0]))]


@dataclass(frozen=True, slots=True)
class _BlockHeads:
    """together: the matrices of all heads, one after the other."""

    together: Blocks | KMatrix
    heads: int

    @property
    def nbytes(self) -> int:
        return self.together.nbytes

    @property
    def size(self) -> int:
        return self.together.size

    @property
    def rounded(self) -> bool:
        return self.together.rounded

    @property
    def dtype(self) -> str:
        return "bf16"

    def _of_heads(self, parts: tuple[Array, ...]) -> list[Array]:
        """With an axis for the heads before the others."""
        return [part.reshape(self.heads, -1, *part.shape[1:]) for part in parts]

    def _multiply(self, x: Vectors, y: Vectors, work: Workspace) -> Steps:
        """y[h] = w[h] @ x[h] for each row"""
        steps, operands = self.together.quantized_rows(x, work)
        if isinstance(self.together, Blocks):
            kernel, parts = head_matmul_of(self.together.form, self.together.group), self.together.grouped()
        else:
            kernel, parts = head_matmul_of_k(self.together.form), self.together.parts
        panels = _each(y, lambda one: in_blocks(in_blocks(one, one.shape[1] // self.heads), PANEL))
        return [*steps, (kernel, (*self._of_heads(parts), *self._of_heads(operands), panels))]


@dataclass(frozen=True, slots=True)
class KeyBlocks(_BlockHeads):
    """Keys whose weights [heads, rank, features] are in blocks along what a query meets."""

    together: Blocks

    def absorb(self, x: Vectors, y: Vectors, work: Workspace) -> Steps:
        return self._multiply(x, y, work)

    def rows(self, rounded: bool, work: Workspace) -> tuple[Array, Steps]:
        """A panel's 16 rows, which are neighbours there, become neighbours in a row."""
        form, (rows, features) = self.together.form, self.together.shape
        wide = work.narrow(self.heads * features, rows // self.heads)
        panels = wide.reshape(self.heads, features // form.block, form.block, -1, PANEL)
        return wide, [(widening_kernels(form, "bf16").widen_panels, (*self._of_heads(self.together.parts), panels))]


@dataclass(frozen=True, slots=True)
class ValueBlocks(_BlockHeads):
    """Values whose weights [heads, features, rank] are in blocks along the latent space."""

    @property
    def quantises(self) -> bool:
        """Whether `expand` is there, in products of 8 bits."""
        return self.together.quantises

    def expand(self, latents: Rows, y: Rows, work: Workspace) -> Steps:
        """The values y [rows, heads * features] of a prompt's latent vectors in f32."""
        return self.together.apply_rows("matmul_nt", latents, [], [y], work)

    def project(self, x: Vectors, y: Vectors, work: Workspace) -> Steps:
        return self._multiply(x, y, work)

    def rows(self, rounded: bool, work: Workspace) -> tuple[Array | Packed, Steps]:
        count = self.together.shape[0]
        if rounded and count % PACKED_ROWS == 0 and work.packs_pairs():
            return self.together.packed(slice(0, count), work, 0)
        plain = work.narrow(*self.together.shape)
        if isinstance(self.together, Blocks):
            form = self.together.form
            panels = in_blocks(plain, form.block).reshape(-1, PANEL, plain.shape[1] // form.block, form.block)
            return plain, [(widening_kernels(form, "bf16").widen_rows, (*self.together.parts, panels))]
        wide, _, steps = self.together.widened(work)
        return plain, [*steps, (narrow.narrow_bf16, (wide, plain))]
