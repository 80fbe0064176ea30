"""Matrices that a file has in blocks, read some rows at a time: into panels as they are, or widened by our own kernels.

In: tensors of a file, the rows of one after those of the other. Out: `Blocks`, or memory that was filled. Holds: beside
what is filled, no more than ROWS_AT_ONCE rows are there, or one tensor whose rows change their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ..kernels.quantized import FORMS, PANEL, Form
from ..kernels.widen import widening_kernels
from ..runtime.buffers import Arena
from ..runtime.packed import Packed
from .gguf_file import TensorEntry
from .grouped import GroupedEntry
from .linear import Blocks
from .raw_blocks import RawBlocks, filled_panels

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Order: TypeAlias = Callable[[Array], Array]
ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class BlockRows:
    """A matrix of a file whose numbers are in blocks of `form`, and whose rows make panels. order: what puts its rows
    in another one, or None."""

    form: Form
    entry: TensorEntry | GroupedEntry
    order: Order | None

    @classmethod
    def of(cls, entry: Any, order: Order | None) -> BlockRows | None:
        """None for a tensor that is no such matrix. Raises ModelError for one whose parts don't fit together."""
        if isinstance(entry, GroupedEntry):
            entry.check()
            form = entry.form
        elif (isinstance(entry, TensorEntry) and entry.format in RawBlocks.FORMATS
              and entry.format not in RawBlocks.SEEN_FIRST):
            form = FORMS[RawBlocks.FORMATS[entry.format][1]]
        else:
            return None
        if len(entry.shape) != 2 or entry.shape[0] % PANEL or entry.shape[1] % form.block:
            return None
        return cls(form, entry, order)

    @property
    def rows(self) -> int:
        return self.entry.shape[0]

    @property
    def blocks(self) -> int:
        """Of a row."""
        return self.entry.shape[1] // self.form.block

    def pieces(self, multiple: int = PANEL) -> Iterator[RawBlocks]:
        """All rows in order, always a multiple of so many but at the end. Raises ModelError as reading does."""
        step = self.rows if self.order is not None else ROWS_AT_ONCE // multiple * multiple
        for first in range(0, self.rows, step):
            part = self.entry.rows(first, min(first + step, self.rows))
            raw = (part.raw(part.shape[0]) if isinstance(part, GroupedEntry)
                   else RawBlocks.parse(part.data, part.shape, part.format))
            assert raw is not None, "rows of a matrix of which `of` said that it makes panels"
            yield raw if self.order is None else raw.reordered(self.order)


def alike(parts: Sequence[BlockRows | None]) -> list[BlockRows] | None:
    """Matrices of one form; None where one is missing, or of another form."""
    found = [part for part in parts if part is not None]
    return found if len(found) == len(parts) and len({part.form for part in found}) == 1 else None


def in_panels(parts: Sequence[BlockRows], arena: Arena, exact: bool) -> Blocks:
    """The rows of all parts, which are `alike`, as one matrix. exact: see Blocks."""
    rows, pieces = sum(part.rows for part in parts), (piece for part in parts for piece in part.pieces())
    return Blocks(parts[0].form, filled_panels(parts[0].form, rows, parts[0].blocks, pieces, arena.empty), exact)


def widen_into(target: Array | Packed, parts: Sequence[BlockRows], dtype: str) -> bool:
    """Fill a matrix in f32 or bf16, plain or packed, with the rows of all parts; False, and nothing is filled, where it
    is packed in panels that the parts do not fill."""
    width = target.panels.width if isinstance(target, Packed) else PANEL
    if width % PANEL or any(part.rows % width for part in parts):
        return False
    first = 0
    for part in parts:
        kernels = widening_kernels(part.form, dtype)
        for piece in part.pieces(width):
            count = len(piece.parts[1])
            quants, scales = filled_panels(part.form, count, part.blocks, [piece], np.empty)
            if isinstance(target, Packed):
                place = target.blocks[first // width : (first + count) // width]
                split = count // width, width // PANEL
                quants, scales = (one.reshape(*split, *one.shape[1:]) for one in (quants, scales))
                if target.panels.elements == 2:
                    kernels.widen_pairs(quants, scales, place.reshape(
                        split[0], part.blocks, part.form.halves, part.form.words, 2, split[1], PANEL, 2))
                else:
                    kernels.widen_panels(quants, scales, place.reshape(
                        split[0], part.blocks, part.form.block, split[1], PANEL))
            else:
                place = target[first : first + count]
                kernels.widen_rows(quants, scales, place.reshape(-1, PANEL, part.blocks, part.form.block))
            first += count
    return True
