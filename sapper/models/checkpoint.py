"""A model's files, opened: what kind they are, their metadata and their tensors.

In: a path or a name. Out: `Checkpoint`. Holds: nothing was read but headers, metadata and the vocabulary; tensors are
read when they are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from . import tokenizer as tokenizers
from .errors import ModelError
from .gguf_file import GgufFile, open_parts
from .grouped import METADATA, is_grouped, with_groups
from .locate import find_model
from .safetensors_file import SafetensorsDirectory
from .scaled import with_scales

Array = np.ndarray[Any, np.dtype[Any]]


class Entry(Protocol):
    """A tensor of a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int:
        """What it takes in the file."""

    def read(self) -> Array:
        """Its elements, as f32."""


@runtime_checkable
class Parted(Protocol):
    """A tensor of which parts can be had."""

    def part(self, index: int) -> Entry:
        """An element of its first axis: a tensor of one axis less."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """gguf: whether names and metadata are GGUF's, or else those of a directory of safetensors. metadata: GGUF's, or
    config.json. where: the place of the metadata, for messages. tensors: by name.
    """

    path: Path
    gguf: bool
    where: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Entry]

    @property
    def architecture(self) -> str:
        """What the metadata says that it is; "" if it says nothing."""
        value = self.metadata.get("general.architecture" if self.gguf else "model_type")
        return value if isinstance(value, str) else ""

    def tokenizer(self, vocabulary: int) -> tokenizers.Tokenizer:
        """Its tokenizer. vocabulary: rows of the embedding. Raises ModelError if there is none, or it does not fit."""
        if self.gguf:
            tokenizer = tokenizers.from_gguf(self.metadata, self.where)
        else:
            tokenizer = tokenizers.from_directory(self.path)
        if tokenizer.size > vocabulary:
            raise ModelError(
                self.path, f"{tokenizer.size} tokens in the tokenizer",
                f"at most {vocabulary}, the rows of the embedding",
            )
        return tokenizer


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a model's files. model: a path, or a name that sapper.models.locate knows. Raises ModelError."""
    path = find_model(model)
    if path.is_dir():
        directory = SafetensorsDirectory(path)
        where = str(path / "config.json")
        if is_grouped(directory.config):
            grouped = with_groups(where, directory.tensors, directory.config)
            if (path / METADATA).exists():
                return Checkpoint(path, True, str(path / METADATA), GgufFile(path / METADATA).metadata, grouped)
            return Checkpoint(path, False, where, directory.config, grouped)
        tensors = with_scales(where, directory.tensors, directory.config)
        return Checkpoint(path, False, where, directory.config, tensors)
    return Checkpoint(path, True, str(path), *open_parts(path))
