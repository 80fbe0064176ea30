"""Matrices whose weights were quantised in groups by `sapper quantize`: how they lie in safetensors files.

In: the tensors of a directory and its config. Out: tensors of which those that come in two parts are `GroupedEntry`.
Holds: a matrix NAME [..., N, K] of a form (sapper/kernels/quantized.py) is stored as

    NAME.FORM.quants    U8 [..., N, K * bits / 8]; of 4 bits, a block's first half lies in the low halves of its bytes
    NAME.FORM.scales    F16 [..., N, K / block, 1 or 2]: of each block the scale and, in a form with minima, the minimum

and `config.json` says {"quantization_config": {"quant_method": "sapper", "version": 1}}. What was read from a GGUF file
keeps its names and its metadata: `metadata.gguf` is such a file without tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.quantized import FORMS, PANEL, Form
from .errors import ModelError
from .raw_blocks import RawBlocks
from .safetensors_file import TensorEntry

Array = np.ndarray[Any, np.dtype[Any]]
METHOD, VERSION = "sapper", 1
METADATA = "metadata.gguf"
SETTINGS = "quantization_config"
_PART = re.compile(r"(?P<name>.+)\.(?P<form>q[48]m?(_\d+)?)\.(?P<part>quants|scales)")


def part_names(name: str, form: Form) -> tuple[str, str]:
    """Of a matrix: its quants and its scales."""
    return f"{name}.{form.name}.quants", f"{name}.{form.name}.scales"


def part_shapes(shape: tuple[int, ...], form: Form) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a matrix of this shape: those of its quants and its scales."""
    *outer, columns = shape
    return (*outer, columns * form.bits // 8), (*outer, columns // form.block, form.scales)


@dataclass(frozen=True, slots=True)
class GroupedEntry:
    """A matrix, or several of one shape, in a form. where: the directory, for messages."""

    where: str
    form: Form
    quants: TensorEntry
    scales: TensorEntry

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.quants.shape[:-1], self.quants.shape[-1] * self.form.halves)

    @property
    def nbytes(self) -> int:
        """What it takes in the file."""
        return self.quants.nbytes + self.scales.nbytes

    def part(self, index: int) -> GroupedEntry:
        """An element of its first axis: a tensor of one axis less."""
        return GroupedEntry(self.where, self.form, self.quants.part(index), self.scales.part(index))

    def rows(self, first: int, last: int) -> GroupedEntry:
        """Elements first to last - 1 of its first axis."""
        return GroupedEntry(self.where, self.form, self.quants.rows(first, last), self.scales.rows(first, last))

    def check(self) -> None:
        """Raises ModelError for what does not fit together."""
        rows, columns = math.prod(self.shape[:-1]), self.shape[-1]
        wanted = part_shapes(self.shape, self.form)[1]
        for entry, dtype, shape, count in (
                (self.quants, "U8", self.quants.shape, rows * columns * self.form.bits // 8),
                (self.scales, "F16", wanted, 2 * math.prod(wanted))):
            found = entry.type, entry.shape, len(entry.source)
            if found != (dtype, shape, count) or columns % self.form.block:
                raise ModelError(f"{self.where}, tensor {entry.name}", f"{entry.type} {entry.shape}, {found[2]} bytes",
                                 f"{dtype} {shape}, {count} bytes", "quantize the model again")

    def parts(self) -> tuple[Array, ...]:
        """Quants [rows, blocks, bytes], scale and perhaps minimum [rows, blocks]. Raises as `check` does."""
        self.check()
        rows, blocks = math.prod(self.shape[:-1]), self.shape[-1] // self.form.block
        quants = np.frombuffer(self.quants.data, np.uint8).reshape(rows, blocks, -1)
        scales = np.frombuffer(self.scales.data, "<f2").reshape(rows, blocks, self.form.scales)
        return quants, *(scales[:, :, i] for i in range(self.form.scales))

    def raw(self, rows: int) -> RawBlocks | None:
        """As one matrix of so many rows; None where they make no panels."""
        return None if rows % PANEL else RawBlocks(self.form, self.parts())

    def read(self) -> Array:
        """Its elements, as f32. Raises as `parts` does."""
        return dequantized(self.form, *self.parts()).reshape(self.shape)


def dequantized(form: Form, quants: Array, *scales: Array) -> Array:
    """Blocks as f32 [rows, columns]. quants, scales: as GroupedEntry.parts gives them."""
    if form.bits == 4:
        quants = np.concatenate([quants & 15, quants >> 4], axis=2)
    wide: Array = quants.astype(np.float32)
    if not form.minimum:
        wide -= np.float32(form.offset)
    wide *= scales[0].astype(np.float32)[:, :, None]
    if form.minimum:
        wide += scales[1].astype(np.float32)[:, :, None]
    return wide.reshape(len(wide), -1)


def is_grouped(config: Mapping[str, Any]) -> bool:
    settings = config.get(SETTINGS)
    return isinstance(settings, dict) and settings.get("quant_method") == METHOD


def with_groups(
    where: str, tensors: Mapping[str, TensorEntry], config: Mapping[str, Any]
) -> dict[str, TensorEntry | GroupedEntry]:
    """The tensors of a model that `is_grouped`. Raises ModelError for another version, or a part that is alone."""
    version = config[SETTINGS].get("version")
    if version != VERSION:
        raise ModelError(f"{where}, key {SETTINGS}, version", repr(version)[:80], str(VERSION),
                         "quantize the model again, or take a newer sapper")
    found: dict[str, TensorEntry | GroupedEntry] = {}
    for name, entry in tensors.items():
        match = _PART.fullmatch(name)
        form = FORMS.get(match["form"]) if match is not None else None
        if match is None or form is None:
            found[name] = entry
            continue
        pair = [tensors.get(part) for part in part_names(match["name"], form)]
        if pair[0] is None or pair[1] is None or match["name"] in tensors:
            raise ModelError(f"{where}, tensor {name}", "a part of a matrix", "its quants and its scales, once",
                             "quantize the model again")
        found[match["name"]] = GroupedEntry(where, form, pair[0], pair[1])
    return found
