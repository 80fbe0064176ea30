"""Rows of a file in blocks, as they lie there, and how matrices and experts are made of them.

In: a tensor of a GGUF file. Out: `Blocks` and `BlockExperts`. Holds: the same numbers, in the order that kernels take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np

from ..kernels import quantized
from ..kernels.quantized import FORMS, PANEL, Form
from ..runtime.buffers import Arena
from .experts import BlockExperts, Experts
from .linear import Blocks, Matrix
from .workspace import Array


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
                         "Q8_0": (34, "q8"), "IQ4_NL": (18, "q8"), "MXFP4": (17, "q8")}
    """ggml's name of a format -> bytes of a block, and its form. Quants of 5 bits are held in 8, as the same numbers:
    of files in Q4_K_M they are what has rows of no multiple of 256. So are codes, as the whole numbers that they stand
    for."""
    SEEN_FIRST: ClassVar = ("MXFP4",)
    """Those of which only the blocks tell whether all are the same numbers."""

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
        if kind == "MXFP4":
            parts = powers_of_two(raw)
            return None if parts is None else cls(form, parts, signed=True)
        scales = tuple(raw[:, :, at : at + 2].view("<f2")[:, :, 0] for at in range(0, 2 * form.scales, 2))
        quants = raw[:, :, 2 * form.scales :]
        if kind.startswith("Q5"):
            quants = five_bits(quants)
            return cls(form, (quants if form.minimum else quants - np.uint8(16), *scales), signed=not form.minimum)
        if kind == "IQ4_NL":
            quants = IQ4_CODES[halves_of(quants)].view(np.uint8)
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


IQ4_CODES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
"""What the codes of IQ4_NL stand for (`kvalues_iq4nl`, ggml-common.h)."""
E2M1_CODES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
"""Twice the numbers of 4 bits of MXFP4 (`kvalues_mxfp4`)."""
LEAST_POWER, LARGEST_POWER, HALVED_BIAS = -24, 15, 128
"""Of two, that are f16; what half an e8m0's power of two is less than its code."""


def halves_of(low: Array) -> Array:
    """Numbers of 4 bits, u8 [..., 32], of bytes [..., 16]: those in the low halves, then those in the high ones."""
    return np.concatenate([low & np.uint8(15), low >> np.uint8(4)], axis=-1)


def powers_of_two(blocks: Array) -> tuple[Array, Array] | None:
    """Quants i8 [..., 32], as u8, and scales in f16 of ggml's block_mxfp4, u8 [..., 17]; None where no f16 is the scale
    of one. Quants take over what their scale can't have."""
    quants, power = E2M1_CODES[halves_of(blocks[..., 1:])], blocks[..., 0].astype(np.int32) - HALVED_BIAS
    held = np.clip(power, LEAST_POWER, LARGEST_POWER)
    beyond = power != held
    with np.errstate(over="ignore"):
        moved = np.ldexp(quants[beyond].astype(np.float64), (power - held)[beyond][:, None])
    if (np.abs(moved) > 127).any() or (moved != np.rint(moved)).any():
        return None
    quants[beyond] = moved.astype(np.int8)
    return quants.view(np.uint8), np.ldexp(np.float32(1), held).astype(np.float16)


def five_bits(blocks: Array) -> Array:
    """Quants 0 ... 31 of ggml's block_q5_0 and block_q5_1, u8 [..., 32], from what follows their scales, u8 [..., 20]:
    the upper bits, 4 bytes, and the others, two in a byte (ggml-common.h)."""
    upper = np.unpackbits(blocks[..., :4], axis=-1, bitorder="little") << np.uint8(4)
    quants = halves_of(blocks[..., 4:])
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
