"""Reads a directory of safetensors files with its config.json.

In: a directory. Out: `SafetensorsDirectory` with `config` (config.json) and `tensors` (name -> `TensorEntry`). Holds:
sizes are checked against the file before anything is read; a broken file raises ModelError and nothing else.
Format: eight bytes of header length, a JSON header, the data (safetensors project, docs/source/index.mdx).
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .errors import ModelError
from .stored import FileBytes, Stored

DTYPES = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 100_000_000
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: name, shape, safetensors' name of its dtype, and its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    source: Stored

    @property
    def data(self) -> memoryview:
        """Its bytes. Raises ModelError where they are no longer there."""
        return self.source.read()

    @property
    def nbytes(self) -> int:
        """What it takes in the file."""
        return len(self.source)

    def part(self, index: int) -> TensorEntry:
        """An element of its first axis: a tensor of one axis less."""
        one = self.rows(index, index + 1)
        return TensorEntry(f"{self.name}[{index}]", self.shape[1:], self.type, one.source)

    def rows(self, first: int, last: int) -> TensorEntry:
        """Elements first to last - 1 of its first axis."""
        size_bytes = len(self.source) // self.shape[0]
        source = self.source.part(first * size_bytes, last * size_bytes)
        return TensorEntry(self.name, (last - first, *self.shape[1:]), self.type, source)

    def read(self) -> Array:
        """Its elements as f32."""
        if self.type not in DTYPES:
            raise ModelError(f"tensor {self.name}", f"dtype {self.type}", f"one of {', '.join(DTYPES)}")
        return np.frombuffer(self.data, DTYPES[self.type]).reshape(self.shape).astype(np.float32, copy=False)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(path, f"{path.stat().st_size} bytes", f"at most {MAX_JSON_BYTES}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise ModelError(path, found, "a JSON file, as directories of checkpoints have it", "check the path") from None
    if not isinstance(value, dict):
        raise ModelError(path, f"a {type(value).__name__}", "a JSON object")
    return value


def _read_header(path: Path, tensors: dict[str, TensorEntry]) -> None:
    """Add the tensors of a file."""
    try:
        file = FileBytes(path)
    except OSError as error:
        raise ModelError(path, str(error), "a safetensors file") from None
    header_bytes = struct.unpack("<Q", file.read(0, 8))[0] if len(file) >= 8 else len(file)
    if header_bytes > min(len(file) - 8, MAX_HEADER_BYTES):
        raise ModelError(path, f"a header of {header_bytes} bytes", "one that fits the file", "get the file again")
    try:
        header = json.loads(bytes(file.read(8, 8 + header_bytes)))
    except (ValueError, RecursionError) as error:
        raise ModelError(path, f"a header that is no JSON ({error})", "one that is", "get the file again") from None
    if not isinstance(header, dict):
        raise ModelError(path, "a header that is no JSON object", "a JSON object", "get the file again")
    body = file.part(8 + header_bytes, len(file))
    for name, entry in header.items():
        if name != "__metadata__":
            _add(path, name, entry, body, tensors)


def _add(path: Path, name: str, entry: Any, body: Stored, tensors: dict[str, TensorEntry]) -> None:
    where = f"{path}, tensor {name!r}"
    try:
        shape, dtype, (start, stop) = tuple(entry["shape"]), entry["dtype"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ModelError(where, repr(entry)[:100], "shape, dtype and data_offsets") from None
    numbers = [*shape, start, stop]
    if not all(type(n) is int and 0 <= n < 2**48 for n in numbers) or not isinstance(dtype, str) or len(shape) > 8:
        raise ModelError(where, repr(entry)[:100], "whole numbers of a sane size")
    count = 1
    for extent in shape:
        count *= extent
    if not start <= stop <= len(body) or (dtype in DTYPES and stop - start != count * DTYPES[dtype].itemsize):
        raise ModelError(
            where, f"bytes {start} to {stop} for {shape} of {dtype}",
            f"the tensor's size, within {len(body)} bytes",
            "get the file again",
        )
    if name in tensors:
        raise ModelError(where, "the tensor for the second time", "each tensor once")
    tensors[name] = TensorEntry(name, shape, dtype, body.part(start, stop))


def read_tensors(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file, by name. Raises ModelError if it is missing, truncated or malformed."""
    found: dict[str, TensorEntry] = {}
    _read_header(path, found)
    return found


class SafetensorsDirectory:
    """A directory with config.json and one or more *.safetensors files."""

    def __init__(self, path: str | Path) -> None:
        """Raises ModelError if a file is missing, truncated or malformed."""
        self.path = Path(path)
        self.config = read_json(self.path / "config.json")
        self.tensors: dict[str, TensorEntry] = {}
        for file in self._files():
            _read_header(file, self.tensors)

    def _files(self) -> list[Path]:
        """The files that hold the weights: those of the index, or model.safetensors, or all that there are."""
        index = self.path / INDEX
        if not index.exists():
            whole = self.path / "model.safetensors"
            files = [whole] if whole.exists() else sorted(self.path.glob("*.safetensors"))
            if not files:
                raise ModelError(self.path, "no *.safetensors file", "one or more")
            return files
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ModelError(f"{index}, key weight_map", repr(places)[:80], "an object: tensor -> file")
        files = []
        for name in dict.fromkeys(str(place) for place in places.values()):
            file = self.path / name
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelError(f"{index}, key weight_map", repr(name)[:80], "the name of a *.safetensors file")
            if not file.is_file():
                raise ModelError(file, "nothing", "a file that the index names", "get the file")
            files.append(file)
        return sorted(files)
