"""Matrices in fp8 with scales for blocks of 128 x 128, used as they are (sapper/kernels/fp8_panels.py).

In: rows of a checkpoint's fp8 numbers and their scales. Out: `ScaledMatrix` and, of a mixture, `ScaledExperts`, beside
`Blocks` (linear.py) and `BlockExperts` (experts.py). Holds: no weight is rounded; a token's vector is scaled instead.
The activations of more than a few tokens are rounded to bf16 before they meet a ScaledMatrix, which halves what their
products take, but where all is to be exact, and where it gains nothing (Workspace.widens_blocks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from ..kernels import fp8, fp8_blocks, fp8_panels, moe_fp8, moe_fp8_blocks, narrow
from ..kernels.fp8_panels import FEW_ROWS, PANEL
from ..kernels.moe_blocks import panel_blocks
from ..kernels.moe_fp8 import PAIR
from ..runtime.buffers import Arena
from ..runtime.program import Rows
from .rounded import rows_widened
from .workspace import Steps, Workspace, in_blocks

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True, slots=True)
class RawScaled:
    """Rows of a file, not yet in panels. codes [rows, columns]; scale [A, B]; places [rows / 16]: the row of scales of
    each 16 rows."""

    codes: Array
    scale: Array
    places: Array
    form: str = "fp8"

    @classmethod
    def parse(cls, codes: Array, scale: Array) -> RawScaled | None:
        """None where the rows make no panels."""
        if not len(codes) or len(codes) % PANEL:
            return None
        first_rows = np.arange(0, len(codes), PANEL)
        return cls(codes.view(FP8), scale, (first_rows // fp8.BLOCK).astype(np.int32))

    def _rows(self, codes: Array, places: Array) -> RawScaled:
        """The same with other rows, and the scales that they use."""
        used, numbers = np.unique(places, return_inverse=True)
        return RawScaled(codes, self.scale[used], numbers.reshape(-1).astype(np.int32))

    def split(self, count: int, axis: int) -> list[RawScaled | None]:
        """In so many equal parts by rows (axis 0) or columns (1); [None] where panels or blocks would be cut."""
        if count == 1:
            return [self]
        size, whole = self.codes.shape[axis] // count, PANEL if axis == 0 else fp8.BLOCK
        if self.codes.shape[axis] % count or size % whole:
            return [None]
        codes = np.split(self.codes, count, axis=axis)
        if axis == 0:
            return [self._rows(*part) for part in zip(codes, np.split(self.places, count), strict=True)]
        return [RawScaled(*part, self.places) for part in zip(codes, np.split(self.scale, count, axis=1), strict=True)]

    def reordered(self, order: Any) -> RawScaled | None:
        """With `order` applied to the rows; None where rows of several scales would share a panel."""
        rows = order(np.arange(len(self.codes)).reshape(-1, 1))[:, 0]
        places = np.repeat(self.places, PANEL)[rows].reshape(-1, PANEL)
        if (places != places[:, :1]).any():
            return None
        return self._rows(order(self.codes), places[:, 0])

    @staticmethod
    def together(pieces: Sequence[RawScaled], arena: Arena, exact: bool = True) -> ScaledMatrix:
        """The rows of all pieces, one after the other. exact: the activations of several tokens stay f32 too."""
        scale = np.concatenate([piece.scale for piece in pieces])
        starts = np.cumsum([0] + [len(piece.scale) for piece in pieces[:-1]])
        places = np.concatenate([piece.places + start for piece, start in zip(pieces, starts, strict=True)])
        weights = _panels(pieces, arena)
        return ScaledMatrix(weights, _kept(arena, scale, np.float32), _kept(arena, places, np.int32), exact)

    @staticmethod
    def experts(
        pieces: Sequence[RawScaled], count: int, arena: Arena, exact: bool = True
    ) -> ScaledExperts | None:
        """The pieces as so many matrices of one shape; None where their panels' scales do not lie alike, or they make
        no pairs of panels."""
        del exact
        places = pieces[0].places
        if len(pieces) != count or len(places) % PAIR or any((p.places != places).any() for p in pieces):
            return None
        weights, scale = _panels(pieces, arena), np.stack([piece.scale for piece in pieces])
        return ScaledExperts(
            weights.reshape(count, -1, *weights.shape[1:]), _kept(arena, scale, np.float32),
            _kept(arena, places, np.int32))


def _panels(pieces: Sequence[RawScaled], arena: Arena) -> Array:
    rows, columns = sum(len(piece.codes) for piece in pieces), pieces[0].codes.shape[1]
    target = arena.empty((rows // PANEL, columns, PANEL), FP8)
    first = 0
    for piece in pieces:
        panels = fp8_panels.to_panels(piece.codes)
        target[first : first + len(panels)] = panels
        first += len(panels)
    return target


def _kept(arena: Arena, values: Array, dtype: Any) -> Array:
    target = arena.empty(values.shape, np.dtype(dtype))
    target[...] = values
    return target


@dataclass(frozen=True, slots=True)
class ScaledMatrix:
    """weights [rows / 16, columns, 16], scale [A, B], places [rows / 16]. exact: activations stay f32."""

    weights: Array
    scale: Array
    places: Array
    exact: bool = True

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes + self.scale.nbytes

    @property
    def size(self) -> int:
        return self.weights.size

    @property
    def quantises(self) -> bool:
        return False

    def _inputs(self, x: Array, work: Workspace, place: int = 0) -> tuple[Steps, Array]:
        """x of every row of scales."""
        scaled = work.wide(place, len(self.scale), x.size)
        return [(fp8_panels.scale_inputs, (x, self.scale, scaled))], scaled

    def apply(self, x: Array, y: Array, work: Workspace) -> Steps:
        steps, scaled = self._inputs(x, work)
        return [*steps, (fp8_panels.matvec_fp8, (self.weights, self.places, scaled, y.reshape(-1, PANEL)))]

    def apply_norm(self, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace) -> Steps:
        steps, normed = work.norm(x, gain, epsilon)
        return steps + self.apply(normed, y, work)

    def apply_norm_swiglu(
        self, up: ScaledMatrix, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace
    ) -> Steps:
        steps, normed = work.norm(x, gain, epsilon)
        own, scaled = self._inputs(normed, work)
        others, up_scaled = up._inputs(normed, work, 1)
        arguments = (self.weights, up.weights, self.places, scaled, up_scaled, y.reshape(-1, PANEL))
        return [*steps, *own, *others, (fp8_panels.matvec_swiglu_fp8, arguments)]

    def apply_residual(self, x: Array, residual: Array, y: Array, work: Workspace) -> Steps:
        steps, scaled = self._inputs(x, work)
        vectors = (residual.reshape(-1, PANEL), y.reshape(-1, PANEL))
        return [*steps, (fp8_panels.matvec_residual_fp8, (self.weights, self.places, scaled, *vectors))]

    def look_up(self, tokens: Array, y: Array) -> Steps:
        return [(fp8_panels.embedding_fp8, (tokens, self.weights, self.scale, self.places, y))]

    def rounds_rows(self, rows: int, work: Workspace) -> bool:
        return False    # they are scaled first

    def apply_rows(
        self, name: str, x: Rows, others: Sequence[ScaledMatrix], rest: Sequence[Rows], work: Workspace
    ) -> Steps:
        matrices, columns = (self, *others), self.weights.shape[1]
        task = name.replace("_nt", "").removeprefix("matmul")
        if work.widens_blocks() and len(x.array) > fp8_blocks.FEWEST_ROWS:
            return self._by_blocks(task, x, others, rest, work)
        panels = [Rows(in_blocks(one.array, PANEL), one.count) for one in rest]
        if len(x.array) <= FEW_ROWS:
            weights = [part for one in matrices for part in (one.weights, one.scale)]
            return [(getattr(fp8_panels, f"matmul_few{task}_fp8"), (*weights, self.places, x, *panels))]
        if self.exact or columns % 2:
            return rows_widened(matrices, name, x, rest, work)
        rows = work.narrow(*x.array.shape)
        steps: Steps = [(narrow.narrow_bf16, (x, Rows(rows, x.count)))]
        operands: list[Any] = []
        for place, one in enumerate(matrices, 1):
            slots = work.narrow(len(one.weights), columns * PANEL, place).reshape(-1, columns // 2, PANEL, 2)
            steps.append((fp8_panels.join_panels_fp8, (one.weights, slots)))
            operands += [slots, one.scale]
        pairs = Rows(in_blocks(rows, 2), x.count)
        return [*steps, (getattr(fp8_panels, f"matmul{task}_fp8"), (*operands, self.places, pairs, *panels))]

    def in_f32(self, rows: int, work: Workspace) -> bool:
        """Whether so many rows are multiplied as they are."""
        return self.exact or rows <= FEW_ROWS or work.widens_blocks()

    def _by_blocks(
        self, task: str, x: Rows, others: Sequence[ScaledMatrix], rest: Sequence[Rows], work: Workspace
    ) -> Steps:
        panels, columns, _ = self.weights.shape
        matrices, blocks = (self, *others), panel_blocks(panels, work.workers)
        weights = [part for one in matrices
                   for part in (one.weights.reshape(*blocks, columns, PANEL), one.scale)]
        room = _room_of_blocks(blocks[0], len(matrices), work)
        results = [Rows(in_blocks(one.array, PANEL).reshape(len(one.array), *blocks, PANEL), one.count) for one in rest]
        kernel = getattr(fp8_blocks, f"matmul_blocks{task}_fp8")
        return [(kernel, (*weights, self.places.reshape(blocks), x, *room, *results))]

    def widened(self, work: Workspace, place: int = 0) -> tuple[Array, str, Steps]:
        panels, columns, lanes = self.weights.shape
        wide = work.wide(place, panels * lanes, columns)
        arguments = (self.weights, self.scale, self.places, wide.reshape(panels, lanes, columns))
        return wide, "f32", [(fp8_panels.dequantize_panels_fp8, arguments)]


@dataclass(frozen=True, slots=True)
class ScaledExperts:
    """weights [experts, rows / 16, columns, 16], scale [experts, A, B], places [rows / 16]."""

    weights: Array
    scale: Array
    places: Array

    @property
    def nbytes(self) -> int:
        return int(self.weights[0].nbytes + self.scale[0].nbytes)

    @property
    def size(self) -> int:
        return int(self.weights[0].size)

    @property
    def copies(self) -> bool:
        return False

    def _room(self, count: int, columns: int, work: Workspace, place: int = 0) -> Array:
        rows = self.scale.shape[1]
        return work.wide(place, count * rows, columns).reshape(count, rows, columns)

    def apply_swiglu(self, up: ScaledExperts, experts: Array, x: Array, y: Array, work: Workspace) -> Steps:
        gate_x, up_x = (self._room(len(y), x.size, work, place) for place in (0, 1))
        kernel = fp8_panels.scale_expert_inputs
        return [
            (kernel, (x, self.scale, experts, gate_x)), (kernel, (x, up.scale, experts, up_x)),
            (fp8_panels.expert_matvec_swiglu_fp8, (
                self.weights, up.weights, self.places, experts, gate_x, up_x, y.reshape(len(y), -1, PANEL))),
        ]

    def apply_weighted(
        self, experts: Array, weights: Array, x: Array, residual: Array, y: Array, work: Workspace
    ) -> Steps:
        scaled = self._room(len(x), x.shape[1], work)
        return [
            (fp8_panels.scale_weighted_expert_inputs, (x, self.scale, experts, weights, scaled)),
            (fp8_panels.expert_matvec_fp8, (
                self.weights, self.places, experts, scaled, residual.reshape(-1, PANEL), y.reshape(-1, PANEL))),
        ]

    def rounds(self, matrices: int, rows: int, work: Workspace) -> bool:
        return False

    def apply_groups(
        self, others: Sequence[ScaledExperts], x: Rows, ranges: tuple[Array, ...], y: Rows, work: Workspace
    ) -> Steps:
        if work.widens_blocks():
            return self._by_blocks(others, x, ranges, y, work)
        count, panels, columns, _ = self.weights.shape
        matrices, each = (self, *others), () if others else (PAIR,)
        blocks = *panel_blocks(panels // math.prod(each), work.workers), *each
        operands = [operand for one in matrices
                    for operand in (one.weights.reshape(count, *blocks, columns, PANEL), one.scale)]
        near = [work.wide(place, blocks[0] * math.prod(each) * PANEL, columns).reshape(blocks[0], columns, *each, PANEL)
                for place in range(len(matrices))]
        kernel = moe_fp8.grouped_swiglu_fp8 if others else moe_fp8.grouped_fp8
        result = Rows(y.array.reshape(len(y.array), *blocks, PANEL), y.count)
        return [(kernel, (x, *ranges, *operands, self.places.reshape(blocks), *near, result))]

    def _by_blocks(
        self, others: Sequence[ScaledExperts], x: Rows, ranges: tuple[Array, ...], y: Rows, work: Workspace
    ) -> Steps:
        count, panels, columns, _ = self.weights.shape
        matrices, blocks = (self, *others), panel_blocks(panels, work.workers)
        operands = [operand for one in matrices
                    for operand in (one.weights.reshape(count, *blocks, columns, PANEL), one.scale)]
        kernel = moe_fp8_blocks.grouped_blocks_swiglu_fp8 if others else moe_fp8_blocks.grouped_blocks_fp8
        result = Rows(y.array.reshape(len(y.array), *blocks, PANEL), y.count)
        room = _room_of_blocks(blocks[0], len(matrices), work)
        return [(kernel, (x, *ranges, *operands, self.places.reshape(blocks), *room, result))]


def _room_of_blocks(count: int, matrices: int, work: Workspace) -> list[Array]:
    """Memory of kernels that widen weights by blocks: a block for each of so many, and sums of each matrix."""
    return [work.wide(place, count * rows, PANEL).reshape(count, rows, PANEL)
            for place, rows in enumerate((fp8.BLOCK, *[fp8_blocks.ROWS] * matrices))]
