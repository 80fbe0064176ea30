"""Matrices of a model in training that stay as they are, and those among them that have adapters of low rank.

In: where weights lie. Out: `Lora`, what adapters there are to be; `AdaptedPlaces`, which makes matrices with them; the
steps of a product with any matrix, forwards and backwards. Holds: only adapters have gradients; of a matrix whose rows
have several (those of queries, keys and values) the down projections are one product.

    y = W x + scale * B (A x)        low = scale * A x,  y = W x + B low
    dlow = scale * B^T dy,  dB = dy low,  dA = dlow x,  dx = W^T dy + A^T dlow
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from ..kernels import lora, matmul
from ..runtime.buffers import Arena
from .workspace import Steps

Array = np.ndarray[Any, np.dtype[Any]]
F32 = np.dtype(np.float32)
Value = TypeVar("Value")
MAX_RANK = 4096


@dataclass(frozen=True, slots=True)
class Lora:
    """Adapters of one rank. modules: the matrices that have them, by the last part of the names that their model
    publishes ("q_proj"); none stands for all that can, of a model with experts for those of attention, as PEFT takes
    the names of dense parts for experts' there. stable: whether the factor is alpha over the root of the rank (rsLoRA:
    Kalajdzievski, 2023, arXiv:2312.03732) and not over the rank. seed: of what they are drawn by."""

    rank: int
    alpha: float
    modules: tuple[str, ...] = ()
    stable: bool = False
    seed: int = 0

    @property
    def scale(self) -> float:
        return float(self.alpha / (self.rank**0.5 if self.stable else self.rank))


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a matrix, and their adapter. role: of these rows. up: B [rows, rank]. ranks: where A lies in `down`,
    and A x in `low`."""

    role: str
    rows: slice
    up: Array
    ranks: slice


@dataclass(frozen=True, slots=True)
class Adapted:
    """A matrix with adapters, or what belongs to these. base: W, None of what belongs to others. down: A of all parts
    [ranks of all, columns]. low: A x, times the factor, of the tokens of a step, or its gradient."""

    base: Array | None
    down: Array
    parts: tuple[Part, ...]
    scale: float
    low: Array


class Room(Protocol):
    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array: ...


class Again:
    """Memory in which each array lies where the one before it did."""

    def __init__(self) -> None:
        self._arena = Arena(1 << 26)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        self._arena.again()
        return self._arena.empty(shape, dtype)


@dataclass(frozen=True, slots=True)
class AdaptedPlaces:
    """Where the weights of a model with adapters lie, or as many numbers that belong to adapters; used as Places.

    tokens: of a step. published: role -> the name of its tensor, as models publish it. base: Places of what stays as it
    is, None of what belongs to others. matrices: where adapters lie; lows: where what they give does. seen: the modules
    of all matrices that can have adapters, and whether these are of attention.
    """

    lora: Lora
    tokens: int
    published: Mapping[str, str]
    base: Any
    matrices: Any
    lows: Room
    seen: dict[str, bool] = field(default_factory=dict)

    def matrix(self, *extents: int, of: Mapping[str, int] | None = None) -> Any:
        """of: roles and how many rows each has, of one that can have adapters."""
        base = None if self.base is None else self.base.matrix(*extents)
        rank, parts, start, chosen = self.lora.rank, [], 0, []
        for role, count in (of or {}).items():
            module = module_of(self.published[role])
            self.seen[module] = ".self_attn." in self.published[role]
            if not self.lora.modules or module in self.lora.modules:
                chosen.append((role, slice(start, start + count)))
            start += count
        if not chosen:
            return base
        down = self.matrices.empty((rank * len(chosen), extents[-1]), F32)
        for place, (role, rows) in enumerate(chosen):
            up = self.matrices.empty((rows.stop - rows.start, rank), F32)
            parts.append(Part(role, rows, up, slice(place * rank, (place + 1) * rank)))
        low = self.lows.empty((self.tokens, rank * len(chosen)), F32)
        return Adapted(base, down, tuple(parts), self.lora.scale, low)

    def router(self, *extents: int) -> Any:
        return None if self.base is None else self.base.router(*extents)

    def vector(self, extent: int) -> Any:
        return None if self.base is None else self.base.vector(extent)

    def flat(self, kind: str) -> Array:
        """All adapters as one vector; there are no vectors."""
        if kind == "vectors":
            return np.empty(0, np.float32)
        numbers: Array = self.matrices.reached.view(np.float32)
        return numbers


def module_of(name: str) -> str:
    """The last part of a matrix' name: "q_proj" of "model.layers.{}.self_attn.q_proj.weight"."""
    return name.removesuffix(".weight").rpartition(".")[2]


def adapted_in(value: Any) -> Iterator[Adapted]:
    """All in a structure of dataclasses, in order."""
    if isinstance(value, Adapted):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            yield from adapted_in(getattr(value, one.name))


def bases(value: Value) -> Value:
    """The same structure with matrices in place of adapted ones."""
    if isinstance(value, Adapted):
        return value.base  # type: ignore[return-value]
    if isinstance(value, tuple):
        return tuple(bases(one) for one in value)  # type: ignore[return-value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: bases(getattr(value, one.name)) for one in fields(value)})
    return value


def base_of(matrix: Any) -> Array:
    """A matrix without adapters."""
    base: Any = matrix.base if isinstance(matrix, Adapted) else matrix
    return base  # type: ignore[no-any-return]


# ---- steps


def with_weights(name: str, weights: Array, module: Any = matmul) -> Any:
    """The kernel of that name for weights of this dtype."""
    return getattr(module, f"{name}_{'f32' if weights.dtype == F32 else 'bf16'}")


def product(matrix: Any, x: Array, y: Array) -> Steps:
    """y = W x"""
    base = base_of(matrix)
    return [(with_weights("matmul_nt", base), (x, base, y)), *_adapters(matrix, x, y)]


def product_residual(matrix: Any, x: Array, residual: Array, y: Array) -> Steps:
    """y = residual + W x"""
    base = base_of(matrix)
    return [(with_weights("matmul_nt_residual", base), (x, base, residual, y)), *_adapters(matrix, x, y)]


def _adapters(matrix: Any, x: Array, y: Array) -> Steps:
    """Add what they give."""
    if not isinstance(matrix, Adapted):
        return []
    low = matrix.low
    return [
        (lora.lora_down, (x, matrix.down, matrix.scale, low)),
        *((lora.lora_up, (low[:, part.ranks], part.up, y[:, part.rows], y[:, part.rows])) for part in matrix.parts)]


def through_matrix(matrix: Any, dmatrix: Any, dy: Any, x: Array, dx: Any) -> Steps:
    """From the gradient of y = W x to those of W, or of its adapters, and of x. dmatrix: None where there are none; dx:
    None where nobody asks for it."""
    base = base_of(matrix)
    steps: Steps = [] if dx is None else [(with_weights("matmul_nn", base), (dy, base, dx))]
    if isinstance(matrix, Adapted):
        low, dlow = matrix.low, dmatrix.low
        for part, dpart in zip(matrix.parts, dmatrix.parts, strict=True):
            given = dy[:, part.rows]
            steps += [(lora.lora_up_gradient, (given, part.up, matrix.scale, dlow[:, part.ranks])),
                      (matmul.matmul_tn_f32, (given, low[:, part.ranks], dpart.up))]
        steps.append((matmul.matmul_tn_f32, (dlow, x, dmatrix.down)))
        if dx is not None:
            steps.append((lora.lora_down_gradient, (dlow, matrix.down, dx, dx)))
    elif dmatrix is not None:
        steps.append((matmul.matmul_tn_f32, (dy, x, dmatrix)))
    return steps
