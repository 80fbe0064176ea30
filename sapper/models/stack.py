"""Matrices of several forms whose rows follow one another, as queries and keys in Q4_K and values in Q6_K do.

In: `Blocks` and `KMatrix` of as many columns, which quantise what they meet. Out: `Stack`, a matrix of all their rows.
Holds: what they meet is quantised once for all neighbours that take it alike; each gives a part of the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..runtime.program import Rows
from .rounded import is_bf16
from .workspace import Array, Steps, Workspace


@dataclass(frozen=True, slots=True)
class Stack:
    matrices: tuple[Any, ...]
    """`Blocks` and `KMatrix`."""

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.matrices)

    @property
    def size(self) -> int:
        return sum(one.size for one in self.matrices)

    @property
    def quantises(self) -> bool:
        return True

    def _parts(self) -> Iterator[tuple[Any, slice]]:
        """Each matrix, and its rows among all."""
        first = 0
        for one in self.matrices:
            last = first + one.shape[0]
            yield one, slice(first, last)
            first = last

    def _apply(self, task: str, x: Array, work: Workspace, *vectors: Array) -> Steps:
        steps: Steps = []
        operands: tuple[Array, ...] = ()
        before = None
        for one, rows in self._parts():
            if one.quants != before:
                more, operands = one.operands(x, work)
                steps, before = [*steps, *more], one.quants
            steps += one.product(task, [one], operands, *(vector[rows] for vector in vectors))
        return steps

    def apply(self, x: Array, y: Array, work: Workspace) -> Steps:
        return self._apply("", x, work, y)

    def apply_norm(self, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace) -> Steps:
        steps, normed = work.norm(x, gain, epsilon)
        return steps + self.apply(normed, y, work)

    def apply_residual(self, x: Array, residual: Array, y: Array, work: Workspace) -> Steps:
        return self._apply("_residual", x, work, residual, y)

    def apply_norm_swiglu(self, up: Stack, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace) -> Steps:
        steps: Steps = []
        for (one, rows), other in zip(self._parts(), up.matrices, strict=True):
            steps += one.apply_norm_swiglu(other, x, gain, epsilon, y[rows], work)
        return steps

    def look_up(self, tokens: Array, y: Array) -> Steps:
        raise TypeError("rows of several forms are looked up in none: found a Stack; expected one matrix")

    def rounds_rows(self, rows: int, work: Workspace) -> bool:
        return all(one.rounds_rows(rows, work) for one in self.matrices)

    def apply_rows(self, name: str, x: Rows, others: Sequence[Stack], rest: Sequence[Rows], work: Workspace) -> Steps:
        steps: Steps = []
        operands: tuple[Array, ...] = ()
        before = None
        for number, (one, rows) in enumerate(self._parts()):
            results = [Rows(array.array[:, rows], array.count) for array in rest]
            matrices = [one, *(other.matrices[number] for other in others)]
            if is_bf16(x) or one.rounds_rows(len(x.array), work):
                steps += one.apply_rows(name, x, matrices[1:], results, work)
                before = None
                continue
            if one.quants != before:
                more, operands = one.quantized_rows(x, work)
                steps, before = [*steps, *more], one.quants
            steps += one.rows_product(name, matrices, operands, results)
        return steps
