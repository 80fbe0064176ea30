"""Matrices in GGUF's Q4_K and Q6_K, used as the file has them but for the order (sapper/kernels/k_quants.py).

In: a tensor of a GGUF file. Out: `KMatrix`, beside `Blocks` of linear.py. Holds: dequantised they are, bit for bit,
what ggml makes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ..kernels import k_quants
from ..kernels.k_quants import GROUPS, HALF, PANEL, SIXTEEN, SUPER
from ..runtime.buffers import Arena
from ..runtime.program import Rows
from .linear import Experts, Steps, Workspace, rows_widened

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
_SPLIT = {"Q4_K": ("q4k", 144, k_quants.split_q4k), "Q6_K": ("q6k", 210, k_quants.split_q6k)}
"""ggml's name -> form, bytes of 256 weights, how they are taken apart."""


@dataclass(frozen=True, slots=True)
class RawK:
    """Rows of a file, not yet in panels. parts: as k_quants.split_q4k and split_q6k give them."""

    form: str
    parts: tuple[Array, ...]

    @classmethod
    def parse(cls, data: memoryview, shape: tuple[int, ...], kind: str) -> RawK | None:
        """None for another format, or rows that make no panels. kind: ggml's name of the format."""
        if kind not in _SPLIT or len(shape) != 2 or shape[0] % PANEL or shape[1] % SUPER:
            return None
        form, size, split = _SPLIT[kind]
        return cls(form, split(np.frombuffer(data, np.uint8).reshape(shape[0], shape[1] // SUPER, size)))

    def split(self, count: int, axis: int) -> list[RawK | None]:
        """In so many equal parts by rows (axis 0) or columns (1); [None] where columns do not part between blocks."""
        if self.parts[-1].shape[axis] % count:
            return [None]
        pieces = zip(*(np.split(part, count, axis=axis) for part in self.parts), strict=True)
        return [RawK(self.form, tuple(piece)) for piece in pieces]

    def reordered(self, order: Any) -> RawK:
        return RawK(self.form, tuple(order(part) for part in self.parts))

    @staticmethod
    def together(pieces: Sequence[RawK], arena: Arena, exact: bool = True) -> KMatrix:
        """The rows of all pieces, one after the other. exact: activations are f32 in any case."""
        del exact
        parts = []
        for group in zip(*(piece.parts for piece in pieces), strict=True):
            panels = [k_quants.to_panels(part) for part in group]
            target = arena.empty((sum(len(p) for p in panels), *panels[0].shape[1:]), panels[0].dtype)
            np.concatenate(panels, out=target)
            parts.append(target)
        return KMatrix(pieces[0].form, tuple(parts))

    @staticmethod
    def experts(pieces: Sequence[RawK], count: int, arena: Arena, exact: bool = True) -> Experts | None:
        """None: there are no kernels for a mixture."""
        del pieces, count, arena, exact
        return None


@dataclass(frozen=True, slots=True)
class KMatrix:
    """form: "q4k" or "q6k". parts: in panels, in the order of the kernels."""

    form: str
    parts: tuple[Array, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def shape(self) -> tuple[int, int]:
        panels, groups = self.parts[0].shape[:2]
        return panels * PANEL, groups * SUPER // GROUPS[self.form]

    @property
    def size(self) -> int:
        rows, columns = self.shape
        return rows * columns

    def _kernel(self, task: str) -> Any:
        return getattr(k_quants, f"{task}_{self.form}")

    def _groups(self, vector: Array) -> Array:
        """A vector, or one for each row, as the kernels of this form take it."""
        inside = (2, HALF) if self.form == "q4k" else (SIXTEEN,)
        return vector.reshape(*vector.shape[:-1], -1, *inside)

    def _operands(self, x: Array, work: Workspace) -> tuple[Steps, tuple[Array, ...]]:
        if self.form != "q4k":
            return [], (self._groups(x),)
        groups, sums = self._groups(x), work.wide(0, x.size // (2 * HALF), 2)
        return [(k_quants.half_group_sums, (groups, sums))], (groups, sums)

    def _norm(self, x: Array, gain: Array, epsilon: float, work: Workspace) -> tuple[Steps, tuple[Array, ...]]:
        steps, normed = work.norm(x, gain, epsilon)
        more, operands = self._operands(normed, work)
        return [*steps, *more], operands

    def apply_norm(self, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace) -> Steps:
        steps, operands = self._norm(x, gain, epsilon, work)
        return [*steps, (self._kernel("matvec"), (*self.parts, *operands, y.reshape(-1, PANEL)))]

    def apply_norm_swiglu(
        self, up: KMatrix, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace
    ) -> Steps:
        steps, operands = self._norm(x, gain, epsilon, work)
        return [*steps, (self._kernel("matvec_swiglu"), (*self.parts, *up.parts, *operands, y.reshape(-1, PANEL)))]

    def apply_residual(self, x: Array, residual: Array, y: Array, work: Workspace) -> Steps:
        steps, operands = self._operands(x, work)
        vectors = (residual.reshape(-1, PANEL), y.reshape(-1, PANEL))
        return [*steps, (self._kernel("matvec_residual"), (*self.parts, *operands, *vectors))]

    def look_up(self, tokens: Array, y: Array) -> Steps:
        return [(self._kernel("embedding"), (tokens, *self.parts, self._groups(y)))]

    def apply_rows(
        self, name: str, x: Rows, others: Sequence[KMatrix], rest: Sequence[Rows], work: Workspace
    ) -> Steps:
        return rows_widened((self, *others), name, x, rest, work)

    def widened(self, work: Workspace, place: int = 0) -> tuple[Array, str, Steps]:
        rows, columns = self.shape
        wide = work.wide(place, rows, columns)
        panels = self._groups(wide.reshape(rows // PANEL, PANEL, columns))
        return wide, "f32", [(self._kernel("dequantize"), (*self.parts, panels))]
