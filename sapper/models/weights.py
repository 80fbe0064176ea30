"""Reads a model's weights into the layout that its kernels take.

In: the tensors of a checkpoint, and where each stands in the model. Out: `Loader`, which gives matrices (linear.py) and
vectors. Holds: every shape is checked before memory is taken; matrices are [out, in], dense in bf16 or f32 or in blocks
as in the file; all lie in memory that asks for huge pages, in the order in which they are asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from ..kernels.moe import PANEL, blocks_of
from ..runtime.buffers import Arena
from ..runtime.system import trim_heap
from . import block_rows
from .block_rows import ROWS_AT_ONCE, BlockRows, Order, alike
from .checkpoint import Entry
from .errors import ModelError
from .experts import DenseExperts, PanelExperts
from .gguf_file import TensorEntry
from .grouped import GroupedEntry
from .linear import Blocks, Dense, Matrix
from .raw_blocks import Raw, RawBlocks, of_one_form
from .scaled import ScaledEntry
from .workspace import PACKED_ROWS, packed_in, packed_pairs_in, reads_pairs

Array = np.ndarray[Any, np.dtype[Any]]
Held = TypeVar("Held")
DTYPES = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}
FORMS = ("file", "file-f32", "file-rounded", "bf16", "bf16-rounded", "f32")
"""How the matrices may be held: in one dtype, or in the blocks of the file. What blocks are multiplied by is quantised
too; with "file-f32" it stays f32, and with "file-rounded", or on tile registers, many rows, and the weights for them,
are rounded to bf16.
Rows that meet bf16 are rounded to it with "bf16-rounded" and "file-rounded" only."""
FLOATS = ("F32", "F16", "BF16")
"""GGUF's formats that are no blocks."""


def check_form(form: str) -> None:
    """Raises ModelError for what is not one of FORMS."""
    if form not in FORMS:
        raise ModelError("the dtype of the weights", repr(form), f"one of {', '.join(FORMS)}")


def half_split_rows(rows: Array, heads: int, turned: int | None = None) -> Array:
    """Rows [heads * D, ...] of the interleaved pairing in the order of the half-split one.

    turned: how many of a head's D rows, the last ones, are in pairs (None: all).
    """
    size, rest = rows.shape[0] // heads, rows.shape[1:]
    turned = size if turned is None else turned
    kept, paired = np.split(rows.reshape(heads, size, *rest), [size - turned], axis=1)
    halves = paired.reshape(heads, turned // 2, 2, *rest).swapaxes(1, 2).reshape(paired.shape)
    return np.concatenate([kept, halves], axis=1).reshape(rows.shape)


@dataclass(frozen=True, slots=True)
class Use:
    """A matrix of the file in a place of the model: its rows, put in the order that the kernels want. kept: how many of
    them that leaves (None: all)."""

    role: str
    rows: int
    order: Order | None = None
    kept: int | None = None


class Loader:
    """where: the file, for messages. tensors: of the file, by name. names: role -> the name of its tensor, with {} for
    the layer. form: one of FORMS. target: whose code reads the weights (None: this CPU's).
    """

    def __init__(self, where: str, tensors: Mapping[str, Entry], names: Mapping[str, str], form: str,
                 target: Any = None) -> None:
        check_form(form)
        self.target = target
        self.where = where
        self.tensors = tensors
        self.names = names
        self.blocks, self.exact = form.startswith("file"), form == "file-f32"
        self.rounded = form.endswith("-rounded")
        self.dtype = "f32" if form == "f32" else "bf16"
        self.arena = Arena()
        if tensors:
            self.arena.expect(self._size_bytes())

    def _size_bytes(self) -> int:
        """What the tensors that have a place in the model take, about."""
        known = {re.sub(r"\d+", "{}", name) for name in self.names.values()}
        used = (entry for name, entry in self.tensors.items() if re.sub(r"\d+", "{}", name) in known)
        return sum(self._size_of(entry) for entry in used)

    def _size_of(self, entry: Entry) -> int:
        plain: int = math.prod(entry.shape) * DTYPES[self.dtype if len(entry.shape) > 1 else "f32"].itemsize
        return min(plain, entry.nbytes) if self.blocks else plain

    @property
    def quantises(self) -> bool:
        """Whether what meets blocks is quantised too."""
        return self.blocks and not self.exact

    def has(self, role: str, *places: int) -> bool:
        return self.names.get(role, "").format(*places) in self.tensors

    def entry(self, role: str, shape: tuple[int, ...], *places: int) -> Entry:
        """The tensor of that role, its shape checked. places: the layer, and the expert where the name has one."""
        name = self.names[role].format(*places)
        where = f"{self.where}, tensor {name}"
        entry = self.tensors.get(name)
        if entry is None:
            raise ModelError(where, "nothing", f"a tensor of shape {shape}", "get the file again")
        if entry.shape != shape:
            raise ModelError(where, f"shape {entry.shape}", f"shape {shape}", "get the file again")
        return entry

    def vector(self, role: str, features: int, *places: int) -> Array:
        """In f32."""
        source = self.entry(role, (features,), *places).read()
        target = self.arena.empty((features,), DTYPES["f32"])
        target[:] = source
        return target

    def wide(self, role: str, rows: int, columns: int, *places: int) -> Dense:
        """A matrix in f32, whatever the form."""
        source = self.entry(role, (rows, columns), *places).read()
        target = self.arena.empty((rows, columns), DTYPES["f32"])
        target[:] = source
        return Dense(target, "f32")

    def matrices(self, uses: Sequence[Use], columns: int, *places: int) -> list[Matrix]:
        """One matrix for each use, all of one form."""
        blocks = self._blocks(uses, columns, places)
        if self.blocks and blocks is not None:
            return [self.held(block_rows.in_panels([part], self.arena, self.exact)) for part in blocks]
        raw = self._raws(uses, columns, places)
        if raw is None:
            return [self._widened([use], columns, places) for use in uses]
        return [self.held(piece.together([piece], self.arena, self.exact)) for piece in raw]

    def joined(self, uses: Sequence[Use], columns: int, *places: int) -> Matrix:
        """The rows of all uses, one after the other, as one matrix; in blocks if all can be, of several forms where
        what they meet is quantised."""
        trim_heap()  # what other matrices were read into does not add to what this one is
        blocks = self._blocks(uses, columns, places)
        if self.blocks and blocks is not None:
            return self.held(block_rows.in_panels(blocks, self.arena, self.exact))
        raw = self._raws(uses, columns, places)
        if raw is None:
            return self._stacked(uses, columns, places) or self._widened(uses, columns, places)
        return self.held(raw[0].together(raw, self.arena, self.exact))

    def _stacked(self, uses: Sequence[Use], columns: int, places: tuple[int, ...]) -> Matrix | None:
        """The same of uses in blocks of several forms, those that follow one another in one form together; None where
        one is not in blocks, or meets what is not quantised."""
        if not self.quantises or len(uses) < 2:
            return None
        from .k_matrix import RawK
        from .stack import Stack

        raw = [self._raw(use, columns, places) for use in uses]
        found = [one for one in raw if isinstance(one, (RawBlocks, RawK))]
        if len(found) < len(raw):
            return None
        runs = [list(run) for _, run in groupby(found, key=lambda one: one.form)]
        return Stack(tuple(self.held(run[0].together(run, self.arena, False)) for run in runs))  # type: ignore[arg-type]

    def held(self, made: Held) -> Held:
        """A matrix, or experts, in the blocks of the file, as the form says what they are multiplied by."""
        if self.rounded:
            from .k_matrix import KMatrix

            if isinstance(made, PanelExperts):
                return replace(made, together=replace(made.together, rounded=True))
            if isinstance(made, (Blocks, KMatrix)):
                return replace(made, rounded=True)
        return made

    def dense(self, uses: Sequence[Use], columns: int, *places: int) -> Dense:
        """The same, never in blocks, as a plain array."""
        rows = sum(use.rows if use.kept is None else use.kept for use in uses)
        blocks = self._blocks(uses, columns, places)
        if blocks is None:
            return self._plain(self._sources(uses, columns, places), rows, columns)
        target = self.arena.empty((rows, columns), DTYPES[self.dtype])
        block_rows.widen_into(target, blocks, self.dtype)
        return Dense(target, self.dtype, self.rounded)

    def dense_of(self, source: Array) -> Dense:
        """A matrix that was put together from several tensors, given in f32, as a plain array."""
        return self._plain([(0, source)], *source.shape)

    def _plain(self, sources: Iterable[tuple[int, Array]], rows: int, columns: int) -> Dense:
        target = self.arena.empty((rows, columns), DTYPES[self.dtype])
        for start, source in sources:
            self.fill(target[start : start + len(source)], source)
        return Dense(target, self.dtype, self.rounded)

    def _widened(self, uses: Sequence[Use], columns: int, places: tuple[int, ...]) -> Dense:
        """Packed, where the kernels of one token and of several agree on how."""
        rows = sum(use.rows if use.kept is None else use.kept for use in uses)
        packed = packed_pairs_in(self.arena, rows, columns, self.target) if self.rounded else packed_in(
            self.arena, rows, columns, self.dtype, self.target)
        if packed is None:
            return self.dense(uses, columns, *places)
        blocks = self._blocks(uses, columns, places)
        if blocks is not None and block_rows.widen_into(packed, blocks, self.dtype):
            return Dense(packed, self.dtype, self.rounded)
        waiting = np.zeros((0, columns), DTYPES[self.dtype])  # rows that fill no panel yet
        done, width = 0, packed.panels.width
        for start, source in self._sources(uses, columns, places):
            for first in range(0, len(source), ROWS_AT_ONCE):
                waiting = np.concatenate([waiting, source[first : first + ROWS_AT_ONCE].astype(waiting.dtype)])
                seen = min(start + first + ROWS_AT_ONCE, start + len(source))
                whole = len(waiting) if seen == rows else len(waiting) // width * width
                packed.put(done, waiting[:whole])
                done, waiting = done + whole, waiting[whole:]
        return Dense(packed, self.dtype, self.rounded)

    def _blocks(self, uses: Sequence[Use], columns: int, places: tuple[int, ...]) -> list[BlockRows] | None:
        """The matrices of all uses, where the file has them in blocks of one form; None where it doesn't."""
        return alike([BlockRows.of(self.entry(use.role, (use.rows, columns), *places), use.order) for use in uses])

    def _sources(self, uses: Sequence[Use], columns: int, places: tuple[int, ...]) -> Iterator[tuple[int, Array]]:
        """The rows of all uses in f32: where each use's begin, and they."""
        entries = [self.entry(use.role, (use.rows, columns), *places) for use in uses]
        start = 0
        for use, entry in zip(uses, entries, strict=True):
            source = entry.read() if use.order is None else use.order(entry.read())
            yield start, source
            start += len(source)

    def fill(self, target: Array, source: Array) -> None:
        """Copy a matrix, some rows at a time: less memory is touched, and it stays in the cache."""
        for first in range(0, len(source), ROWS_AT_ONCE):
            part = source[first : first + ROWS_AT_ONCE]
            target[first : first + len(part)] = part.astype(target.dtype)

    def _raws(self, uses: Sequence[Use], columns: int, places: tuple[int, ...]) -> list[Raw] | None:
        """All as they are, in one form; None where they can't be."""
        return of_one_form([self._raw(use, columns, places) for use in uses]) if self.blocks else None

    def _raw(self, use: Use, columns: int, places: tuple[int, ...]) -> Raw | None:
        shape = (use.rows, columns)
        raw = self.raw(use.role, shape, shape, *places)
        return raw if raw is None or use.order is None else raw.reordered(use.order)

    def raw(self, role: str, shape: tuple[int, ...], rows: tuple[int, ...], *places: int) -> Raw | None:
        """A tensor of that shape as it is, as a matrix of shape `rows`; None where our kernels can't take it so."""
        entry = self.entry(role, shape, *places)
        # What few files have is imported where it is met: a prompt's first token waits for imports as well.
        if isinstance(entry, ScaledEntry):
            from .scaled_matrix import RawScaled

            return RawScaled.parse(*entry.parts()) if rows == shape else None
        if isinstance(entry, GroupedEntry):
            return entry.raw(rows[0]) if rows[1:] == shape[-1:] else None
        if not isinstance(entry, TensorEntry):
            return None
        form = entry.format
        if form in RawBlocks.FORMATS:
            return RawBlocks.parse(entry.data, rows, form)
        if form in FLOATS:
            return None
        from .k_matrix import RawK

        return RawK.parse(entry.data, rows, form)

    def experts(self, count: int, rows: int, columns: int, read: Callable[[int], Array]) -> DenseExperts:
        """Matrices of one shape, together. read: the matrix [rows, columns] of an expert, in f32."""
        panels, size = blocks_of(rows, PANEL)
        if self.rounded and size == PACKED_ROWS and columns % 2 == 0 and reads_pairs(self.target):
            return self._paired_experts(count, panels, columns, read)
        target = self.arena.empty((count, panels, columns, size), DTYPES[self.dtype])
        for expert in range(count):
            for panel, part in zip(target[expert], read(expert).reshape(panels, size, columns), strict=True):
                panel[...] = part.T
        return DenseExperts(target, self.dtype, self.rounded)

    def _paired_experts(self, count: int, panels: int, columns: int, read: Callable[[int], Array]) -> DenseExperts:
        """The same with columns in pairs."""
        target = self.arena.empty((count, panels, columns // 2, PACKED_ROWS, 2), DTYPES[self.dtype])
        for expert in range(count):
            parts = read(expert).reshape(panels, PACKED_ROWS, columns // 2, 2)
            for panel, part in zip(target[expert], parts, strict=True):
                panel[...] = part.swapaxes(0, 1)
        return DenseExperts(target, self.dtype, self.rounded)
