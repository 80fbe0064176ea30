"""Writes a model as a directory of safetensors that `load_model` reads.

In: a checkpoint, and what becomes of each of its tensors. Out: safetensors files, `config.json` and what else the model
needs; of what was read from a GGUF file, `metadata.gguf` (grouped.py). Holds: tensors are made and written one by one;
the directory appears when it is whole, or not at all.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..runtime.buffers import LINE_BYTES
from .checkpoint import Checkpoint
from .errors import ModelError
from .gguf_file import metadata_bytes
from .grouped import METADATA, METHOD, SETTINGS, VERSION
from .safetensors_file import DTYPES, INDEX

MODEL = "model.safetensors"
SHARD_BYTES = 4 << 30
COPIED = (".json", ".txt", ".model", ".jinja", ".md")
"""Kinds of files that a directory's tokenizer and its users may need."""
MAX_COPIED_BYTES = 100_000_000
OWN = {SETTINGS: {"quant_method": METHOD, "version": VERSION}}
"""What config.json says where tensors are in groups, or have the names of GGUF."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one tensor of the checkpoint becomes: tensors (name, dtype, shape), of which `make` gives the bytes."""

    source: str
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    make: Callable[[], tuple[Any, ...]]

    @property
    def nbytes(self) -> int:
        return sum(_size(dtype) * math.prod(shape) for _, dtype, shape in self.tensors)


def check_new(target: Path) -> None:
    """Raises ModelError where something has that name."""
    if os.path.lexists(target):
        raise ModelError(target, "something that is there", "a new directory", "remove it, or choose another name")


def write_directory(
    checkpoint: Checkpoint, target: Path, config: Mapping[str, Any], pieces: Sequence[Piece], *,
    beside: Mapping[str, Sequence[Piece]] | None = None, shard_bytes: int = SHARD_BYTES,
    report: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> int:
    """The bytes of all tensors of the model. config: what config.json is to hold. beside: safetensors files that are no
    part of the model, by name. report: called before each tensor with the number of bytes that were written, will be,
    and its name. Raises ModelError for a target that is there or can't be written; then nothing is left."""
    check_new(target)
    shards = _shards(pieces, shard_bytes)
    files = {MODEL if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors": shard
             for number, shard in enumerate(shards, 1)}
    names = {name: file for file, shard in files.items() for piece in shard for name, _, _ in piece.tensors}
    size = sum(piece.nbytes for piece in pieces)
    everything = [*files.items(), *(beside or {}).items()]
    total, done = sum(piece.nbytes for _, some in everything for piece in some), 0
    with _directory(target) as folder:
        _write_config(checkpoint, config, folder)
        for file_name, some in everything:
            with _synced(folder / file_name) as file:
                file.write(header_of(some))
                for piece in some:
                    report(done, total, piece.source)
                    for array in piece.make():
                        file.write(array)
                    done += piece.nbytes
        if len(shards) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": names}
            with _synced(folder / INDEX) as file:
                file.write(json.dumps(index, indent=1).encode())
    return size


def write_files(target: Path, texts: Mapping[str, bytes], tensors: Mapping[str, Sequence[Piece]]) -> None:
    """A directory of files, by name, and of safetensors files. Raises ModelError as write_directory does."""
    check_new(target)
    with _directory(target) as folder:
        for name, text in texts.items():
            with _synced(folder / name) as file:
                file.write(text)
        for name, some in tensors.items():
            with _synced(folder / name) as file:
                file.write(header_of(some))
                for piece in some:
                    for array in piece.make():
                        file.write(array)


def _size(dtype: str) -> int:
    return 1 if dtype == "U8" else DTYPES[dtype].itemsize


def _shards(pieces: Sequence[Piece], most_bytes: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = [[]]
    held = 0
    for piece in pieces:
        if shards[-1] and held + piece.nbytes > most_bytes:
            shards.append([])
            held = 0
        shards[-1].append(piece)
        held += piece.nbytes
    return shards


def header_of(pieces: Sequence[Piece]) -> bytes:
    """Length and JSON header of a safetensors file, padded so that the data begins on a cache line."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for piece in pieces:
        for name, dtype, shape in piece.tensors:
            size_bytes = _size(dtype) * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (at, at + size_bytes)}
            at += size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % LINE_BYTES)
    return struct.pack("<Q", len(text)) + text


def _write_config(checkpoint: Checkpoint, config: Mapping[str, Any], folder: Path) -> None:
    with _synced(folder / "config.json") as file:
        file.write(json.dumps(config, indent=2, ensure_ascii=False).encode())
    if checkpoint.gguf:
        source = checkpoint.path / METADATA if checkpoint.path.is_dir() else checkpoint.path
        with _synced(folder / METADATA) as file:
            file.write(metadata_bytes(source))
        return
    for path in sorted(checkpoint.path.iterdir()):
        known = path.suffix in COPIED and path.name not in ("config.json", INDEX)
        if known and path.is_file() and path.stat().st_size <= MAX_COPIED_BYTES:
            with _synced(folder / path.name) as file:
                file.write(path.read_bytes())


@contextlib.contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _directory(target: Path) -> Iterator[Path]:
    """A directory beside its place, which it takes in the end; after an error, or an interrupt, nothing is left."""
    folder = target.parent / f".{target.name}.{secrets.token_hex(8)}"    # known before it is there: see below
    try:
        folder.mkdir(0o700)
        yield folder
        os.chmod(folder, 0o755)
        os.rename(folder, target)
    except OSError as error:
        raise ModelError(target, f"that it can't be written: {error.strerror or error}",
                         "a new directory in one that can be written, with room for the model") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)   # also if a signal came as soon as it was made


