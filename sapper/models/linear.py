"""The matrices of a model in the form in which they are held, and the kernels that apply them.

In: arrays. Out: `Dense`, `Blocks` and, of a mixture, `DenseExperts`, `BlockExperts`, which name, for each use of a
matrix, the kernels and their arguments. Holds: the session asks a matrix what to run and never what it is made of.

A use is a list of steps (kernel, arguments), so that the session can run them at once or bind them into a program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Protocol, Self, TypeAlias, runtime_checkable

import ml_dtypes
import numpy as np

from ..kernels import embedding, matmul, matvec, moe, moe_pairs, moe_rounded, narrow, near, norm, quantized
from ..kernels.k_quants import SIXTEEN, SUPER
from ..kernels.moe_blocks import exact_experts, panel_blocks, product_experts
from ..kernels.near import near_kernels
from ..kernels.quantized import FORMS, PANEL, Form
from ..kernels.widen import widening_kernels
from ..runtime import settings
from ..runtime.buffers import LINE_BYTES, Arena, empty
from ..runtime.packed import Packed, packed_empty
from ..runtime.program import Rows
from .errors import ModelError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Steps: TypeAlias = list[tuple[Any, tuple[Any, ...]]]


WORK_BYTES = 1 << 28
"""Of address space for each kind of memory that matrices need, of which a session touches megabytes."""

APART_BYTES = 5 * LINE_BYTES
"""Between arrays of a set: their sizes are powers of two often, and a kernel that writes the same row of each, in steps
of KiB, would find all of it in one set of a cache (quantising 512 rows took 1.8 times as long on a Zen 5)."""


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


def narrowed(x: Rows, dtype: str, rounded: bool, work: Workspace) -> tuple[Steps, Rows, str]:
    """Rows as operands of kernels with plain weights of that dtype: the steps that make them, the rows, and how the
    names of the kernels end. rounded: see Dense; what lies there in bf16 is so already."""
    if not rounded:
        return [], x, dtype
    if is_bf16(x):
        return [], x, "bf16_bf16"
    rows = Rows(work.narrow(*x.array.shape), x.count)
    return [(narrow.narrow_bf16, (x, rows))], rows, "bf16_bf16"


def as_bf16(rows: Array) -> Array:
    """As many rows of bf16, in memory of rows of f32."""
    if not rows.flags.c_contiguous:
        apart: Array = rows.view(ml_dtypes.bfloat16)[:, : rows.shape[1]]
        return apart
    together: Array = rows.reshape(-1).view(ml_dtypes.bfloat16)[: rows.size].reshape(rows.shape)
    return together


def is_bf16(x: Rows) -> bool:
    return bool(x.array.dtype == ml_dtypes.bfloat16)


def product_kernel(name: str, dtypes: str, result: Rows) -> Any:
    """Of sapper/kernels/matmul.py. dtypes: as of `narrowed`."""
    return getattr(matmul, f"{name}_{'rounded' if is_bf16(result) else dtypes}")


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

    def _apply(self, task: str, matrices: Sequence[Blocks], operands: Sequence[Array], *vectors: Array) -> Steps:
        """A product with a vector. task: what comes after "matmul" or "matvec" in the kernel's name."""
        panels = [in_blocks(vector, PANEL) for vector in vectors]
        if self.exact:
            weights = [part for one in matrices for part in one.parts]
            return [(self._kernel(f"matvec{task}"), (*weights, *operands, *panels))]
        weights = [part for one in matrices for part in one.grouped()]
        return [(self._kernel(f"matmul{task}"), (*weights, *operands, *(one[None] for one in panels)))]

    def apply(self, x: Array, y: Array, work: Workspace) -> Steps:
        steps, operands = self.operands(x, work)
        return steps + self._apply("", [self], operands, y)

    def apply_norm(self, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace) -> Steps:
        steps, operands = self.norm(x, gain, epsilon, work)
        return steps + self._apply("", [self], operands, y)

    def apply_norm_swiglu(
        self, up: Blocks, x: Array, gain: Array, epsilon: float, y: Array, work: Workspace
    ) -> Steps:
        steps, operands = self.norm(x, gain, epsilon, work)
        return steps + self._apply("_swiglu", [self, up], operands, y)

    def apply_residual(self, x: Array, residual: Array, y: Array, work: Workspace) -> Steps:
        steps, operands = self.operands(x, work)
        return steps + self._apply("_residual", [self], operands, residual, y)

    def look_up(self, tokens: Array, y: Array) -> Steps:
        return [(self._kernel("embedding"), (tokens, *self.parts, in_blocks(y, self.form.block)))]

    def apply_rows(self, name: str, x: Rows, others: Sequence[Blocks], rest: Sequence[Rows], work: Workspace) -> Steps:
        matrices = (self, *others)
        if self.exact:
            return rows_widened(matrices, name, x, rest, work)
        if self.rounds_rows(len(x.array), work):
            return rows_rounded(matrices, name, x, rest, work)
        steps, operands = self.quantized_rows(x, work)
        parts = [part for one in matrices for part in one.grouped()]
        panels = [Rows(in_blocks(one.array, PANEL), one.count) for one in rest]
        return [*steps, (self._kernel(name.replace("_nt", "")), (*parts, *operands, *panels))]

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


ROUNDED_ROWS = 32
"""For how many rows there is room where weights are rounded: where it takes less time than to quantise the rows, with
tile registers (FEW_TOKENS in session.py)."""
PACKED_ROWS = near.ROWS
"""Rows of a panel of `Packed` bf16."""
PACKED_BYTES = 1 << 20
"""Weights that are rounded at a time where rows are many: they stay in the second cache until they have met all rows.
"""
NEAR_BYTES = 1 << 21
"""Rows of activations that each panel of weights meets as it is rounded: those that a second cache has room for. On a
Granite Rapids' 256 rows by 4096 x 4096 in Q4_0 are as quick either way on one thread, and 0.74 on two; 512 take 1.49 of
the time so, and 0.88."""


@runtime_checkable
class Rounds(Protocol):
    """A matrix in blocks that may be rounded to bf16 as it meets many rows. parts: its weights, panels first. block: of
    its form."""

    @property
    def parts(self) -> tuple[Array, ...]: ...

    @property
    def block(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    def near_kernels(self, result: str) -> Any:
        """Those of sapper/kernels/near.py; result: "bf16", or "f32", that of matmul_swiglu."""

    def rounds(self, work: Workspace) -> bool:
        """Whether it is then (`is_rounded` says what are many)."""

    def packed(self, rows: slice, work: Workspace, place: int) -> tuple[Packed, Steps]:
        """Some rows, whole panels of PACKED_ROWS, rounded to bf16, and the steps that make them so."""


def is_rounded(activations: int, rows: int) -> bool:
    """Whether it pays to round so many rows of weights for so many of activations, and they fill panels."""
    return activations >= ROUNDED_ROWS and rows % PACKED_ROWS == 0


ROUNDED_MIXTURE_ROWS = 32
"""The same of an expert, on average. On a Zen 5 without tile registers products of bf16 then take 1.8 times as long as
those of 8 bits, of 170 rows 1.3 times: who rounds wants the accuracy."""


ROUNDED_MIXTURE_BYTES = 3 << 23
"""How much memory rounding takes at most where nobody asked for it: a V2-Lite's 4096 rows, which its shared experts
have too, take 17 MB."""


def is_rounded_mixture(activations: int, experts: int, rows: int) -> bool:
    """`is_rounded` of rows of activations that so many experts share, each of so many rows of weights."""
    return activations >= ROUNDED_MIXTURE_ROWS * experts and rows % PACKED_ROWS == 0


def rows_rounded(matrices: Sequence[Rounds], name: str, x: Rows, rest: Sequence[Rows], work: Workspace) -> Steps:
    """`Matrix.apply_rows` with rows and weights rounded to bf16, some of the weights' rows at a time."""
    steps, x, dtypes = narrowed(x, "bf16", True, work)
    rows, columns = matrices[0].shape
    work.check_pairs()
    if x.array.nbytes <= NEAR_BYTES:
        return [*steps, _rounded_near(matrices, name, x, rest, work)]
    at_once = max(1, PACKED_BYTES // (2 * columns * len(matrices) * PACKED_ROWS)) * PACKED_ROWS
    for start in range(0, rows, at_once):
        part = slice(start, min(start + at_once, rows))
        made = [one.packed(part, work, place) for place, one in enumerate(matrices)]
        steps += [step for _, more in made for step in more]
        results = [Rows(one.array[:, part], one.count) for one in rest]
        steps.append((product_kernel(name, dtypes, results[-1]), (x, *(packed for packed, _ in made), *results)))
    return steps


def _rounded_near(
    matrices: Sequence[Rounds], name: str, x: Rows, rest: Sequence[Rows], work: Workspace
) -> tuple[Any, tuple[Any, ...]]:
    """The same by one kernel, in which each panel is rounded by who multiplies it."""
    rows, columns = matrices[0].shape
    blocks, block = panel_blocks(rows // PACKED_ROWS, work.workers), matrices[0].block
    parts = [part.reshape(*blocks, near.TOGETHER, *part.shape[1:]) for one in matrices for part in one.parts]
    room = [work.narrow(blocks[0] * PACKED_ROWS, columns, 1 + place).reshape(
        blocks[0], columns // block, block // 2, PACKED_ROWS, 2) for place in range(len(matrices))]
    others = [Rows(in_blocks(one.array, PACKED_ROWS).reshape(-1, *blocks, PACKED_ROWS), one.count) for one in rest]
    kernels = matrices[0].near_kernels("bf16" if is_bf16(rest[-1]) else "f32")
    return getattr(kernels, name.replace("_nt", "")), (Rows(in_blocks(x.array, block), x.count), *parts, *room, *others)


class Widens(Protocol):
    def widened(self, work: Workspace, place: int = 0) -> tuple[Array, str, Steps]:
        """The rows as a plain array, its dtype, and the steps that fill it."""


def rows_widened(matrices: Sequence[Widens], name: str, x: Rows, rest: Sequence[Rows], work: Workspace) -> Steps:
    """`Matrix.apply_rows` by way of plain arrays in f32."""
    plain = [one.widened(work, place) for place, one in enumerate(matrices)]
    steps = [step for _, _, made in plain for step in made]
    return [*steps, (getattr(matmul, f"{name}_f32"), (x, *(wide for wide, _, _ in plain), *rest))]


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
class PanelExperts:
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

    def _parts(self) -> tuple[Array, ...]:
        """The weights as operands of kernels, an expert after the other."""
        raise NotImplementedError

    def _kernel(self, task: str) -> Any:
        raise NotImplementedError

    @property
    def _rounded_kernels(self) -> Any:
        """Those of sapper/kernels/moe_rounded.py."""
        raise NotImplementedError

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
        room = [work.narrow(blocks[0] * PACKED_ROWS, columns, 1 + place).reshape(
            blocks[0], columns // block, block // 2, PACKED_ROWS, 2) for place in range(len(matrices))]
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


class Raw(Protocol):
    """Rows of a file in a form in which kernels use them as they are, not yet in the order that these take. Pieces of
    one `form` are put together."""

    @property
    def form(self) -> Any: ...

    def split(self, count: int, axis: int) -> Sequence[Raw | None]:
        """In so many equal parts by rows (axis 0) or columns (1); [None] where they do not part between blocks."""

    def reordered(self, order: Any) -> Raw | None:
        """With `order` applied to the rows; None where they can't be."""

    @staticmethod
    def together(pieces: Any, arena: Arena, exact: bool) -> Matrix:
        """The rows of all pieces, one after the other. exact: see Blocks."""

    @staticmethod
    def experts(pieces: Any, count: int, arena: Arena, exact: bool) -> Experts | None:
        """The same as matrices of one shape, so many; None where they can't be."""


@dataclass(frozen=True, slots=True)
class RawBlocks:
    """Rows of a file in blocks, not yet in panels.

    parts: quants [rows, blocks, bytes], scale and perhaps minimum [rows, blocks]. signed: whether quants of 8 bits have
    their sign; in panels they are larger by 128 instead.
    """

    FORMATS: ClassVar = {"Q4_0": (18, "q4"), "Q4_1": (20, "q4m"), "Q5_0": (22, "q8"), "Q5_1": (24, "q8m"),
                         "Q8_0": (34, "q8")}
    """ggml's name of a format -> bytes of a block, and its form. Quants of 5 bits are held in 8, as the same numbers:
    of files in Q4_K_M they are what has rows of no multiple of 256."""

    form: Form
    parts: tuple[Array, ...]
    signed: bool = False

    @classmethod
    def parse(cls, data: memoryview, shape: tuple[int, ...], kind: str) -> RawBlocks | None:
        """From a tensor of a GGUF file; None for a format or a shape that the kernels cannot take as they are.

        kind: ggml's name of the format. shape: [rows, columns].
        """
        if kind not in cls.FORMATS or len(shape) != 2:
            return None
        size, name = cls.FORMATS[kind]
        form = FORMS[name]
        if shape[0] % PANEL or shape[1] % form.block:
            return None
        raw = np.frombuffer(data, np.uint8).reshape(shape[0], shape[1] // form.block, size)
        scales = tuple(raw[:, :, at : at + 2].view("<f2")[:, :, 0] for at in range(0, 2 * form.scales, 2))
        quants = raw[:, :, 2 * form.scales :]
        if kind.startswith("Q5"):
            quants = five_bits(quants)
            return cls(form, (quants if form.minimum else quants - np.uint8(16), *scales), signed=not form.minimum)
        return cls(form, (quants, *scales), signed=form.bits == 8)

    def with_minimum(self) -> RawBlocks | None:
        """The same numbers in the form that has minima; None where one is no f16."""
        if self.form.minimum:
            return self
        quants, scale = self.parts
        with np.errstate(over="ignore"):
            minimum = scale * np.float16(-self.form.offset)  # exact: a power of two
        if not np.isfinite(minimum).all():
            return None
        return replace(self, form=replace(self.form, minimum=True), parts=(quants, scale, minimum))

    def split(self, count: int, axis: int) -> list[RawBlocks | None]:
        """In so many equal parts by rows (axis 0) or columns (1); [None] where columns do not part between blocks."""
        if self.parts[1].shape[axis] % count:
            return [None]
        pieces = zip(*(np.split(part, count, axis=axis) for part in self.parts), strict=True)
        return [replace(self, parts=tuple(piece)) for piece in pieces]

    def reordered(self, order: Any) -> RawBlocks:
        """With `order` applied to the rows of every part."""
        return replace(self, parts=tuple(order(part) for part in self.parts))

    @staticmethod
    def together(pieces: Sequence[RawBlocks], arena: Arena, exact: bool) -> Blocks:
        """The rows of all pieces, one after the other."""
        return in_panels(pieces, arena, exact)

    @staticmethod
    def experts(pieces: Sequence[RawBlocks], count: int, arena: Arena, exact: bool) -> BlockExperts:
        """The same as matrices of one shape, so many."""
        return BlockExperts(in_panels(pieces, arena, exact), count)


def five_bits(blocks: Array) -> Array:
    """Quants 0 ... 31 of ggml's block_q5_0 and block_q5_1, u8 [..., 32], from what follows their scales, u8 [..., 20]:
    the upper bits, 4 bytes, and the others, two in a byte (ggml-common.h)."""
    upper = np.unpackbits(blocks[..., :4], axis=-1, bitorder="little") << np.uint8(4)
    low = blocks[..., 4:]
    quants: Array = np.concatenate([low & np.uint8(15), low >> np.uint8(4)], axis=-1)
    quants |= upper
    return quants


def of_one_form(pieces: Sequence[Raw | None]) -> list[Raw] | None:
    """Pieces that can be put together: some with minima and some without take these as well. None where they can't."""
    found = [piece for piece in pieces if piece is not None]
    if len(found) < len(pieces) or not found:
        return None
    forms = {piece.form for piece in found}
    if len(forms) > 1 and all(isinstance(piece, RawBlocks) for piece in found):
        wider = [piece.with_minimum() for piece in found if isinstance(piece, RawBlocks)]
        found = [piece for piece in wider if piece is not None]
        forms = {piece.form for piece in found}
    return found if len(forms) == 1 and len(found) == len(pieces) else None


def in_panels(pieces: Sequence[RawBlocks], arena: Arena, exact: bool = False) -> Blocks:
    """The rows of all pieces, one after the other, in panels; the pieces are of one form. exact: see Blocks."""
    rows, blocks = sum(len(piece.parts[1]) for piece in pieces), pieces[0].parts[1].shape[1]
    return Blocks(pieces[0].form, filled_panels(pieces[0].form, rows, blocks, pieces, arena.empty), exact)


def filled_panels(
    form: Form, rows: int, blocks: int, pieces: Iterable[RawBlocks], memory: Callable[..., Array]
) -> tuple[Array, ...]:
    """Quants and scales of so many rows in panels, in new memory. pieces: all rows, in order."""
    targets = tuple(memory(shape, dtype) for shape, dtype in quantized.panel_shapes(form, rows, blocks))
    start = 0
    for piece in pieces:
        stop = start + len(piece.parts[1]) // PANEL
        quantized.fill_panels([target[start:stop] for target in targets], *piece.parts)
        if piece.signed:  # in place: a copy of an embedding would be a third of a small model
            targets[0][start:stop] ^= np.uint8(128)
        start = stop
    return targets
