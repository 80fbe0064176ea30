"""The matrices of a model in the form in which they are held, and the kernels that apply them.

In: arrays. Out: `Dense`, `Blocks` and, of a mixture, `DenseExperts`, `BlockExperts`, which name, for each use of a
matrix, the kernels and their arguments. Holds: the session asks a matrix what to run and never what it is made of.

A use is a list of steps (kernel, arguments), so that the session can run them at once or bind them into a program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from ..kernels import embedding, matvec, moe, moe_blocks, quantized
from ..kernels.quantized import BLOCK, HALF, PANEL
from ..runtime.buffers import Arena, empty
from ..runtime.program import Rows

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Steps: TypeAlias = list[tuple[Any, tuple[Any, ...]]]


class Workspace:
    """Memory that matrices need besides their operands; one for a session.

    normed, sums: vectors of at most `features` elements in all after their norm, and the sums of their blocks.
    """

    def __init__(self, features: int) -> None:
        self.normed = empty((features,))
        self.sums = empty((-(-features // BLOCK),))
        self._wide: list[Array] = []

    def wide(self, place: int, rows: int, columns: int) -> Array:
        """Memory for a matrix in f32; place: 0, or 1 for a second one at the same time."""
        while len(self._wide) <= place:
            self._wide.append(empty((0,)))
        if self._wide[place].size < rows * columns:
            self._wide[place] = empty((rows * columns,))
        return self._wide[place][: rows * columns].reshape(rows, columns)


def named_arrays(value: Any, name: str = "") -> dict[str, Array]:
    """Every array in a structure of dictionaries, sequences, dataclasses and workspaces, by where it stands."""
    parts: list[tuple[Any, Any]]
    if isinstance(value, np.ndarray):
        return {name: value} if value.size else {}
    if isinstance(value, dict):
        parts = list(value.items())
    elif isinstance(value, (tuple, list)):
        parts = list(enumerate(value))
    elif isinstance(value, Workspace):
        parts = [(key.lstrip("_"), part) for key, part in vars(value).items()]
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [(f.name, getattr(value, f.name)) for f in fields(value)]
    else:
        return {}
    return {k: v for key, part in parts for k, v in named_arrays(part, f"{name} {key}".strip()).items()}


class Matrix(Protocol):
    """Weights [rows, columns] and what can be done with them. x, y, gain, residual are vectors in f32."""

    @property
    def nbytes(self) -> int: ...

    @property
    def size(self) -> int:
        """How many weights."""

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

    def widened(self, work: Workspace, place: int = 0) -> tuple[Array, str, Steps]:
        """The rows as a plain array, its dtype, and the steps that fill it, if it has to be made."""


@dataclass(frozen=True, slots=True)
class Dense:
    """weights [rows, columns], f32 or bf16 as `dtype` says."""

    weights: Array
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes

    @property
    def size(self) -> int:
        return self.weights.size

    def apply_norm(self, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace) -> Steps:
        return [(getattr(matvec, f"norm_matvec_{self.dtype}"), (self.weights, x, gain, epsilon, y))]

    def apply_norm_swiglu(
        self, up: Dense, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace
    ) -> Steps:
        kernel = getattr(matvec, f"norm_matvec_swiglu_{self.dtype}")
        return [(kernel, (self.weights, up.weights, x, gain, epsilon, y))]

    def apply_residual(self, x: Array, residual: Array, y: Array, work: Workspace) -> Steps:
        return [(getattr(matvec, f"matvec_residual_{self.dtype}"), (self.weights, x, residual, y))]

    def look_up(self, tokens: Array, y: Array) -> Steps:
        return [(getattr(embedding, f"embedding_{self.dtype}"), (tokens, self.weights, y))]

    def widened(self, work: Workspace, place: int = 0) -> tuple[Array, str, Steps]:
        return self.weights, self.dtype, []


@dataclass(frozen=True, slots=True)
class Blocks:
    """Weights in blocks of 32, in the panels of sapper/kernels/quantized.py. form: "q4" or "q8".

    parts: quants, scale and, of q4, minimum.
    """

    form: str
    parts: tuple[Array, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def size(self) -> int:
        rows, columns = self.shape
        return rows * columns

    @property
    def shape(self) -> tuple[int, int]:
        panels, blocks, lanes = self.parts[1].shape
        return panels * lanes, blocks * BLOCK

    def _blocks(self, vector: Array) -> Array:
        """A vector, or one for each token, as the kernels of this form take it."""
        halves = (2, HALF) if self.form == "q4" else (BLOCK,)
        return vector.reshape(*vector.shape[:-1], -1, *halves)

    def _kernel(self, task: str) -> Any:
        return getattr(quantized, f"{task}_{self.form}")

    def operands(self, x: Array, work: Workspace) -> tuple[Steps, tuple[Array, ...]]:
        """A vector, or one for each row of x, as operands of this form's kernels, and the steps that prepare them."""
        if self.form != "q4":
            return [], (self._blocks(x),)
        sums = work.sums[: x.size // BLOCK]
        steps: Steps = [(quantized.block_sums, (x.reshape(-1, BLOCK), sums))]
        return steps, (self._blocks(x), sums.reshape(*x.shape[:-1], -1))

    def norm(self, x: Array, gain: Array, epsilon: float, work: Workspace) -> tuple[Steps, tuple[Array, ...]]:
        """The same of rms_norm(x)."""
        normed = work.normed[: x.size]
        blocks = [vector.reshape(-1, BLOCK) for vector in (x, gain, normed)]
        sums = work.sums[: x.size // BLOCK]
        steps: Steps = [(quantized.rms_norm_blocks, (*blocks[:2], epsilon, blocks[2], sums))]
        return steps, (self._blocks(normed), *((sums,) if self.form == "q4" else ()))

    def apply_norm(self, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace) -> Steps:
        steps, operands = self.norm(x, gain, epsilon, work)
        return [*steps, (self._kernel("matvec"), (*self.parts, *operands, y.reshape(-1, PANEL)))]

    def apply_norm_swiglu(
        self, up: Blocks, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace
    ) -> Steps:
        steps, operands = self.norm(x, gain, epsilon, work)
        return [*steps, (self._kernel("matvec_swiglu"), (*self.parts, *up.parts, *operands, y.reshape(-1, PANEL)))]

    def apply_residual(self, x: Array, residual: Array, y: Array, work: Workspace) -> Steps:
        steps, operands = self.operands(x, work)
        vectors = (residual.reshape(-1, PANEL), y.reshape(-1, PANEL))
        return [*steps, (self._kernel("matvec_residual"), (*self.parts, *operands, *vectors))]

    def look_up(self, tokens: Array, y: Array) -> Steps:
        return [(self._kernel("embedding"), (tokens, *self.parts, self._blocks(y)))]

    def widened(self, work: Workspace, place: int = 0) -> tuple[Array, str, Steps]:
        rows, columns = self.shape
        wide = work.wide(place, rows, columns)
        panels = self._blocks(wide.reshape(rows // PANEL, PANEL, columns))
        return wide, "f32", [(self._kernel("dequantize"), (*self.parts, panels))]


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

    def apply_norm_swiglu(
        self, up: Any, experts: Array, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace
    ) -> Steps:
        """y[k] = silu(W n) * (up n) of expert experts[k], n = rms_norm(x); up is of the same form."""

    def apply_weighted(
        self, experts: Array, weights: Array, x: Array, residual: Array, y: Array, work: Workspace
    ) -> Steps:
        """y = residual + the sum over k of weights[k] * (W x[k]) of expert experts[k]"""

    def widened(self, work: Workspace, place: int = 0) -> tuple[Array, str, Steps]:
        """The matrices as a plain array, its dtype, and the steps that fill it, if it has to be made."""


def grouped_swiglu(gate: Experts, up: Experts, x: Rows, ranges: tuple[Array, ...], y: Rows, work: Workspace) -> Steps:
    """y[m] = silu(gate x[m]) * (up x[m]) for the rows of each expert"""
    return _grouped("grouped_matmul_swiglu", [gate, up], x, ranges, y, work)


def grouped(matrices: Experts, x: Rows, ranges: tuple[Array, ...], y: Rows, work: Workspace) -> Steps:
    """y[m] = W x[m] for the rows of each expert"""
    return _grouped("grouped_matmul", [matrices], x, ranges, y, work)


def _grouped(
    name: str, matrices: Sequence[Experts], x: Rows, ranges: tuple[Array, ...], y: Rows, work: Workspace
) -> Steps:
    plain = [one.widened(work, place) for place, one in enumerate(matrices)]
    blocks = [weights.reshape(len(weights), *moe.blocks_of(weights.shape[1]), -1) for weights, _, _ in plain]
    result = Rows(y.array.reshape(len(y.array), *blocks[0].shape[1:3]), y.count)
    kernel = getattr(moe, f"{name}_{plain[0][1]}")
    return [*(step for _, _, steps in plain for step in steps), (kernel, (x, *ranges, *blocks, result))]


@dataclass(frozen=True, slots=True)
class DenseExperts:
    """weights [experts, rows, columns], f32 or bf16 as `dtype` says."""

    weights: Array
    dtype: str

    @property
    def nbytes(self) -> int:
        return int(self.weights[0].nbytes)

    @property
    def size(self) -> int:
        return int(self.weights[0].size)

    def apply_norm_swiglu(
        self, up: DenseExperts, experts: Array, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace
    ) -> Steps:
        kernel = getattr(moe, f"expert_norm_matvec_swiglu_{self.dtype}")
        return [(kernel, (self.weights, up.weights, experts, x, gain, epsilon, y))]

    def apply_weighted(
        self, experts: Array, weights: Array, x: Array, residual: Array, y: Array, work: Workspace
    ) -> Steps:
        return [(getattr(moe, f"expert_matvec_{self.dtype}"), (self.weights, experts, weights, x, residual, y))]

    def widened(self, work: Workspace, place: int = 0) -> tuple[Array, str, Steps]:
        return self.weights, self.dtype, []


@dataclass(frozen=True, slots=True)
class BlockExperts:
    """Weights in blocks of 32; together: the panels of all experts, one after the other, as one matrix."""

    together: Blocks
    count: int

    @property
    def nbytes(self) -> int:
        return self.together.nbytes // self.count

    @property
    def size(self) -> int:
        return self.together.size // self.count

    def _parts(self) -> tuple[Array, ...]:
        return tuple(part.reshape(self.count, -1, *part.shape[1:]) for part in self.together.parts)

    def apply_norm_swiglu(
        self, up: BlockExperts, experts: Array, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace
    ) -> Steps:
        steps, operands = self.together.norm(x, gain, epsilon, work)
        kernel = getattr(moe_blocks, f"expert_matvec_swiglu_{self.together.form}")
        panels = y.reshape(len(y), -1, PANEL)
        return [*steps, (kernel, (*self._parts(), *up._parts(), experts, *operands, panels))]

    def apply_weighted(
        self, experts: Array, weights: Array, x: Array, residual: Array, y: Array, work: Workspace
    ) -> Steps:
        steps, operands = self.together.operands(x, work)
        kernel = getattr(moe_blocks, f"expert_matvec_{self.together.form}")
        vectors = (residual.reshape(-1, PANEL), y.reshape(-1, PANEL))
        return [*steps, (kernel, (*self._parts(), experts, weights, *operands, *vectors))]

    def widened(self, work: Workspace, place: int = 0) -> tuple[Array, str, Steps]:
        wide, dtype, steps = self.together.widened(work, place)
        return wide.reshape(self.count, -1, wide.shape[1]), dtype, steps


class Raw(Protocol):
    """Rows of a file in a form in which kernels use them as they are, not yet in the order that these take. Pieces of
    one `form` are put together."""

    @property
    def form(self) -> str: ...

    def split(self, count: int, axis: int) -> Sequence[Raw | None]:
        """In so many equal parts by rows (axis 0) or columns (1); [None] where they do not part between blocks."""

    def reordered(self, order: Any) -> Raw | None:
        """With `order` applied to the rows; None where they can't be."""

    @staticmethod
    def together(pieces: Any, arena: Arena) -> Matrix:
        """The rows of all pieces, one after the other."""

    @staticmethod
    def experts(pieces: Any, count: int, arena: Arena) -> Experts | None:
        """The same as matrices of one shape, so many; None where they can't be."""


@dataclass(frozen=True, slots=True)
class RawBlocks:
    """Rows of a file in blocks of 32, not yet in panels.

    parts: quants [rows, blocks, 16 or 32], scale and, of q4, minimum [rows, blocks].
    """

    form: str
    parts: tuple[Array, ...]

    @classmethod
    def parse(cls, data: memoryview, shape: tuple[int, ...], kind: str) -> RawBlocks | None:
        """From a tensor of a GGUF file; None for a format, a shape or values that the kernels cannot take as they are.

        kind: ggml's name of the format. shape: [rows, columns].
        """
        sizes = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
        if kind not in sizes or len(shape) != 2 or shape[0] % PANEL or shape[1] % BLOCK:
            return None
        raw = np.frombuffer(data, np.uint8).reshape(shape[0], shape[1] // BLOCK, sizes[kind])
        scale = raw[:, :, :2].copy().view("<f2")[:, :, 0]
        if kind == "Q8_0":
            return cls("q8", (raw[:, :, 2:].view(np.int8), scale))
        if kind == "Q4_1":
            return cls("q4", (raw[:, :, 4:], scale, raw[:, :, 2:4].copy().view("<f2")[:, :, 0]))
        with np.errstate(over="ignore"):
            minimum = scale * np.float16(-8)
        return cls("q4", (raw[:, :, 2:], scale, minimum)) if np.isfinite(minimum).all() else None

    def split(self, count: int, axis: int) -> list[RawBlocks | None]:
        """In so many equal parts by rows (axis 0) or columns (1); [None] where columns do not part between blocks."""
        if self.parts[1].shape[axis] % count:
            return [None]
        pieces = zip(*(np.split(part, count, axis=axis) for part in self.parts), strict=True)
        return [RawBlocks(self.form, tuple(piece)) for piece in pieces]

    def reordered(self, order: Any) -> RawBlocks:
        """With `order` applied to the rows of every part."""
        return RawBlocks(self.form, tuple(order(part) for part in self.parts))

    @staticmethod
    def together(pieces: Sequence[RawBlocks], arena: Arena) -> Blocks:
        """The rows of all pieces, one after the other."""
        return in_panels(pieces, arena)

    @staticmethod
    def experts(pieces: Sequence[RawBlocks], count: int, arena: Arena) -> BlockExperts:
        """The same as matrices of one shape, so many."""
        return BlockExperts(in_panels(pieces, arena), count)


def in_panels(pieces: Sequence[RawBlocks], arena: Arena) -> Blocks:
    """The rows of all pieces, one after the other, in panels; the pieces are of one form."""
    parts = []
    for group in zip(*(piece.parts for piece in pieces), strict=True):
        panels = [quantized.to_panels(part) for part in group]
        target = arena.empty((sum(len(p) for p in panels), *panels[0].shape[1:]), panels[0].dtype)
        np.concatenate(panels, out=target)
        parts.append(target)
    return Blocks(pieces[0].form, tuple(parts))
