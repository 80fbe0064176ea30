"""Memory that a model's matrices need beside their operands, and what goes on between them: steps.

Out: `Workspace`, one for a session, and room for packed weights. A use of a matrix is a list of steps (kernel,
arguments), so that the session can run them at once or bind them into a program.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from ..kernels import matmul, matvec, near, norm, quantized
from ..kernels.k_quants import SIXTEEN, SUPER
from ..runtime import settings
from ..runtime.buffers import LINE_BYTES, Arena, empty
from ..runtime.packed import Packed, packed_empty
from .errors import ModelError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Steps: TypeAlias = list[tuple[Any, tuple[Any, ...]]]
Sections: TypeAlias = list[tuple[str, Steps]]
"""Steps in order, with a heading for each part."""


WORK_BYTES = 1 << 28
"""Of address space for each kind of memory that matrices need, of which a session touches megabytes."""

APART_BYTES = 5 * LINE_BYTES
"""Between arrays of a set: their sizes are powers of two often, and a kernel that writes the same row of each, in steps
of KiB, would find all of it in one set of a cache (quantising 512 rows took 1.8 times as long on a Zen 5)."""

PACKED_ROWS = near.ROWS
"""Rows of a panel of `Packed` bf16."""


class Workspace:
    """Memory that matrices need besides their operands; one for a session. What is asked for again lies where it did
    before, of another size too: a product is done with it before the next one begins.

    normed: a vector of at most `features` elements after its norm. workers: who share the work (None: as many as
    SAPPER_THREADS allows). target: whose code reads it (None: this CPU's). chooses: whether it is for programs of few
    rows and of many, of which a call takes the one that suits it.
    """

    target: Any = None
    chooses = True

    def __init__(self, features: int, workers: int | None = None) -> None:
        self.workers = settings.threads() if workers is None else workers
        self.normed = empty((features,))
        self._quants, self._super_quants = Arena(WORK_BYTES), Arena(WORK_BYTES)
        self._wide: list[Arena] = []
        self._narrow: list[Arena] = []

    def arrays(self) -> dict[str, Any]:
        """All memory that was asked for, by what it is for."""
        return {"normed": self.normed, "quants": self._quants.reached, "super_quants": self._super_quants.reached,
                "wide": [memory.reached for memory in self._wide],
                "narrow": [memory.reached for memory in self._narrow]}

    def norm(self, x: Array, gain: Array, epsilon: float) -> tuple[Steps, Array]:
        """The step that makes rms_norm(x) of a vector, and where: a kernel of its own, as every task of a product would
        compute it anew, and slower weights (28.3 GB/s instead of 30 on a Zen 4)."""
        normed = self.normed[: x.size]
        return [(norm.rms_norm, (x.reshape(1, -1), gain, epsilon, normed.reshape(1, -1)))], normed

    def quants(self, rows: int, columns: int, block: int, group: int) -> tuple[Array, ...]:
        """Memory for rows that are quantised (sapper/kernels/quantized.py): q, scales, sums and starts."""
        groups, rows = columns // group, quantized.rows_apart(rows, group)
        of_blocks = groups, group // block, rows
        return self._set(self._quants, ((groups, rows, group), np.int8), ((groups, rows), np.float32),
                         (of_blocks, np.float32), (of_blocks, np.int32))

    def super_quants(self, rows: int, columns: int) -> tuple[Array, ...]:
        """The same for those of sapper/kernels/k_quants.py: q, scales, digits and starts."""
        blocks, rows = columns // SUPER, quantized.rows_apart(rows, SUPER)
        return self._set(self._super_quants, ((blocks, rows, SUPER), np.int8), ((blocks, rows), np.float32),
                         ((blocks, rows, SIXTEEN), np.int8), ((blocks, SIXTEEN, rows), np.int32))

    @staticmethod
    def _set(memory: Arena, *arrays: tuple[tuple[int, ...], Any]) -> tuple[Array, ...]:
        memory.again()
        made = []
        for shape, dtype in arrays:
            made.append(memory.empty(shape, dtype))
            memory.empty((APART_BYTES,), np.uint8)
        return tuple(made)

    def narrow(self, rows: int, columns: int, place: int = 0) -> Array:
        """Memory for rows in bf16; place: as of `wide`. The first is where rows are quantised, too, as no product has
        both; in a file, whose plan shares memory itself, it is not."""
        if not self._narrow and self.chooses:
            self._narrow.append(self._quants)
        return self._rows(self._narrow, place, rows, columns, ml_dtypes.bfloat16)

    def packed(self, place: int, rows: int, columns: int) -> Packed:
        """Memory for a matrix in bf16 as products of bf16 read it; place: as of `wide`."""
        def memory(shape: tuple[int, ...], _: Any) -> Array:
            kept = self.narrow(-(-shape[0] // (2 * columns)), columns, 1 + place)
            return kept.reshape(-1).view(np.uint8)[: shape[0]]

        return packed_empty(matmul.matmul_nt_bf16_bf16, "b", rows, columns, memory, self.target)

    def packed_pairs(self, place: int, rows: int, columns: int) -> Packed:
        """The same, its columns in pairs. Raises ModelError as check_pairs does."""
        self.check_pairs()
        return self.packed(place, rows, columns)

    def panels_in_pairs(self, panels: int, columns: int, block: int, matrices: int) -> list[Array]:
        """Memory for so many panels of each of some matrices in bf16, their columns in blocks and in pairs."""
        shape = (panels, columns // block, block // 2, PACKED_ROWS, 2)
        return [self.narrow(panels * PACKED_ROWS, columns, 1 + place).reshape(shape) for place in range(matrices)]

    def check_pairs(self) -> None:
        """Raises ModelError where products of bf16 do not read columns in pairs."""
        if not self.packs_pairs():
            raise ModelError("the dtype of the weights", "one whose products are of bf16",
                             "a processor that multiplies pairs of bf16 (AVX512-BF16)", "load it as `file`")

    def rounds_many(self) -> bool:
        """Whether many rows that would be quantised, and the weights in blocks that they meet, are rounded to bf16
        instead: tile registers multiply these in half the time (`file-rounded` in docs/models.md), and more is left of
        them. Few rows are quantised, as all weights would be widened for them."""
        return self.chooses and self.has_tiles()

    def has_tiles(self) -> bool:
        """Whether tile registers multiply bf16."""
        unit = self._target().tiles
        return unit is not None and ("bf16", "bf16") in unit.products

    def widens_blocks(self) -> bool:
        """Whether several rows in f32 meet weights in fp8 best that are widened a block at a time
        (sapper/kernels/fp8_blocks.py): where registers hold the sums of few rows, and slots of bf16 are multiplied no
        faster than f32."""
        target = self._target()
        return not target.lanes_are_threads and target.vector_registers <= 16 and "dot2_bf16" not in target.dots

    def _target(self) -> Any:
        from ..runtime.launch import configuration

        return configuration().find_target(None) if self.target is None else self.target

    def multiplies_bf16(self) -> bool:
        """Whether the processor has products of bf16: to round to it only takes time where it has none."""
        return self.has_tiles() or "dot2_bf16" in self._target().dots

    def packs_pairs(self) -> bool:
        """See reads_pairs."""
        return reads_pairs(self.target)

    def wide(self, place: int, rows: int, columns: int) -> Array:
        """Memory for a matrix in f32; place: 0, or 1 for a second one at the same time."""
        return self._rows(self._wide, place, rows, columns, np.float32)

    def _rows(self, places: list[Arena], place: int, rows: int, columns: int, dtype: Any) -> Array:
        while len(places) <= place:
            places.append(Arena(WORK_BYTES))
        return self._set(places[place], ((rows, columns), dtype))[0]


def in_blocks(rows: Array, size: int) -> Array:
    """The last axis of a contiguous array in blocks, as a view."""
    blocks = rows.view()
    blocks.shape = (*rows.shape[:-1], rows.shape[-1] // size, size)
    return blocks


def named_arrays(value: Any, name: str = "") -> dict[str, Array]:
    """Every array in a structure of dictionaries, sequences, dataclasses and workspaces, by where it stands."""
    parts: list[tuple[Any, Any]]
    if isinstance(value, Packed):
        value = value.data
    if isinstance(value, np.ndarray):
        return {name: value} if value.size else {}
    if isinstance(value, dict):
        parts = list(value.items())
    elif isinstance(value, (tuple, list)):
        parts = list(enumerate(value))
    elif isinstance(value, Workspace):
        return named_arrays(value.arrays(), name)
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [(f.name, getattr(value, f.name)) for f in fields(value)]
    else:
        return {}
    return {k: v for key, part in parts for k, v in named_arrays(part, f"{name} {key}".strip()).items()}


def packed_in(arena: Arena, rows: int, columns: int, dtype: str, target: Any = None) -> Packed:
    """Room for weights in the panels that the kernels of `Dense` read with activations in f32: for one vector a panel
    is one stream from memory, where rows side by side are many short ones. target: see packed_empty."""
    return packed_empty(getattr(matvec, f"matvec_{dtype}"), "w", rows, columns, arena.empty, target)


def packed_pairs_in(arena: Arena, rows: int, columns: int, target: Any = None) -> Packed | None:
    """The same for activations in bf16, as products of pairs read them: 17 to 64 rows by 3072 x 576 take 0.5 to 0.8 of
    the time that plain weights take on a Zen 4, which each product would pack anew. None where the processor has no
    such products, or a column would be without a pair."""
    if columns % 2 or not reads_pairs(target):
        return None
    return packed_empty(matmul.matmul_nt_bf16_bf16, "b", rows, columns, arena.empty, target)


def reads_pairs(target: Any) -> bool:
    """Whether products of bf16 read panels of PACKED_ROWS rows with columns in pairs."""
    panels = packed_empty(matmul.matmul_nt_bf16_bf16, "b", PACKED_ROWS, 2, empty, target).panels
    return (panels.width, panels.elements) == (PACKED_ROWS, 2)
