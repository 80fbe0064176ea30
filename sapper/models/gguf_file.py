"""Reads GGUF files: metadata and the places of the tensors.

In: a path. Out: `GgufFile` with `metadata` (plain Python values) and `tensors` (name -> `TensorEntry`), whose `read`
widens any block format that the `gguf` package can dequantise to f32; `open_parts` opens a model that is in several
files, NAME-00001-of-00003.gguf and so on. Holds: every size is checked against the file's
length before anything is allocated or read, so a broken file raises ModelError and nothing else.

The header is walked here rather than by gguf.GGUFReader, which trusts the counts that the file states (a count of 2**62
would keep it busy for ever) and takes seconds for the 100 000 strings of a vocabulary. Format: the GGUF specification,
versions 2 and 3, in the ggml project's docs/gguf.md.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import strings
from .errors import ModelError
from .stored import FileBytes, Stored

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}
MAX_ARRAY_DEPTH = 4
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
MAX_PARTS = 9999
PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
HEAD_BYTES = 1 << 22
"""Read at first: most vocabularies are in it."""

FORMATS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 30: ("BF16", 1, 2), 39: ("MXFP4", 32, 17),
}
"""ggml's number of a format -> its name, and of how many elements and bytes a block is: of those that most files have,
as the gguf package, which knows all, takes a while to be imported."""
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file. shape: outermost first, as NumPy counts. type: ggml's number of its format.
    source: its bytes in the file, or at hand.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    source: Stored | memoryview

    @property
    def data(self) -> memoryview:
        """Its bytes. Raises ModelError where they are no longer there."""
        return self.source if isinstance(self.source, memoryview) else self.source.read()

    @property
    def nbytes(self) -> int:
        """What it takes in the file."""
        return len(self.source)

    @property
    def format(self) -> str:
        """ggml's name of its format."""
        if self.type in FORMATS:
            return FORMATS[self.type][0]
        import gguf

        return str(gguf.GGMLQuantizationType(self.type).name)

    def part(self, index: int) -> TensorEntry:
        """An element of its first axis, which is not its last: a tensor of one axis less."""
        one = self.rows(index, index + 1)
        return TensorEntry(f"{self.name}[{index}]", self.shape[1:], self.type, one.source)

    def rows(self, first: int, last: int) -> TensorEntry:
        """Elements first to last - 1 of its first axis, which is not its last."""
        size_bytes = len(self.source) // self.shape[0]
        start, stop = first * size_bytes, last * size_bytes
        part = self.source[start:stop] if isinstance(self.source, memoryview) else self.source.part(start, stop)
        return TensorEntry(self.name, (last - first, *self.shape[1:]), self.type, part)

    def read(self) -> Array:
        """Its elements, as f32, in an array of `shape`. Raises ModelError for a format that cannot be dequantised."""
        raw = np.frombuffer(self.data, dtype=np.uint8)
        if self.format == "F32":
            return raw.view("<f4").reshape(self.shape)
        if self.format == "F16":
            return raw.view("<f2").astype(np.float32).reshape(self.shape)
        import gguf

        kind = gguf.GGMLQuantizationType(self.type)
        rows = raw.reshape(*self.shape[:-1], len(raw) // max(1, int(np.prod(self.shape[:-1]))))
        try:
            values = gguf.quants.dequantize(rows, kind)
        except NotImplementedError:
            raise ModelError(
                f"tensor {self.name}", f"format {kind.name}", "one that the gguf package can dequantise",
                "convert the model to Q8_0, Q4_K, Q4_1, F16 or BF16",
            ) from None
        return np.asarray(values, dtype=np.float32).reshape(self.shape)


class GgufFile:
    """A GGUF file, opened.

    metadata: key -> bool, int, float, str or a list of these. metadata_bytes: where it ends. tensors: by name, in the
    file's order.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises ModelError if the file is missing, truncated or malformed."""
        self.path = Path(path)
        try:
            self._file = FileBytes(self.path)
        except OSError as error:
            raise ModelError(self.path, str(error), "a GGUF file", "check the path") from None
        self._head = memoryview(b"")  # the beginning of the file, as far as it was needed
        self._offset = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorEntry] = {}
        self._parse()

    def _fail(self, found: str, expected: str) -> ModelError:
        return ModelError(f"{self.path} at byte {self._offset}", found, expected, "get the file again")

    def _take(self, size_bytes: int) -> memoryview:
        start = self._offset
        stop = start + size_bytes
        if stop > len(self._file):
            raise self._fail(f"{len(self._file) - start} bytes to the end of the file", f"{size_bytes} more")
        if stop > len(self._head):
            self._head = self._file.read(0, min(len(self._file), max(stop, 2 * len(self._head), HEAD_BYTES)))
        self._offset = stop
        return self._head[start:stop]

    def _number(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        # Bytes that are no UTF-8 survive, and come out again, as surrogates: some vocabularies hold such pieces.
        return str(self._take(self._number("Q")), "utf-8", "surrogateescape")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self._string()
        if kind == BOOL:
            return self._number("B") != 0
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind != ARRAY:
            raise self._fail(f"value type {kind}", "a type from 0 to 12")
        if depth == MAX_ARRAY_DEPTH:
            raise self._fail("deeper arrays", f"arrays nested at most {MAX_ARRAY_DEPTH} deep")
        element, count = self._number("I"), self._number("Q")
        code = SCALARS.get(element)
        if code is not None:
            raw = self._take(count * struct.calcsize("<" + code))
            return np.frombuffer(raw, "<u1" if code == "?" else np.dtype(code).newbyteorder("<")).tolist()
        if count > (len(self._file) - self._offset) // 8:  # A string or an array takes 8 bytes at the least.
            raise self._fail(f"an array of {count} elements", "no more than the file can hold")
        if element == STRING:
            return self._strings(count)
        return [self._value(element, depth + 1) for _ in range(count)]

    def _strings(self, count: int) -> list[str]:
        """So many strings one after the other, as `_string` reads each: vocabularies have 100 000."""
        texts: list[str] = []
        while len(texts) < count:
            texts.append(self._string())  # with its checks; more of the head is there after it
            found, size_bytes = strings.leading_strings(self._head[self._offset :], count - len(texts))
            texts += found
            self._offset += size_bytes
        return texts

    def _parse(self) -> None:
        magic = bytes(self._take(min(4, len(self._file))))
        if magic != MAGIC:
            raise self._fail(f"the first bytes {magic!r}", f"{MAGIC!r}")
        version = self._number("I")
        if version not in VERSIONS:
            raise self._fail(f"GGUF version {version}", f"one of {VERSIONS}")
        tensor_count, key_count = self._number("Q"), self._number("Q")
        for count, least, what in ((key_count, 13, "keys"), (tensor_count, 24, "tensors")):
            if count > len(self._file) // least:
                raise self._fail(f"{count} {what}", "no more than the file can hold")
        for _ in range(key_count):
            key = self._string()
            if key in self.metadata:
                raise self._fail(f"key {key!r} for the second time", "each key once")
            self.metadata[key] = self._value(self._number("I"))
        self.metadata_bytes = self._offset
        places: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(tensor_count):
            name = self._string()
            dimensions = self._number("I")
            if not 1 <= dimensions <= MAX_DIMENSIONS:
                raise self._fail(f"tensor {name!r} of {dimensions} dimensions", f"1 to {MAX_DIMENSIONS}")
            extents = tuple(self._number("Q") for _ in range(dimensions))
            places.append((name, extents[::-1], self._number("I"), self._number("Q")))
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise self._fail(f"general.alignment {alignment!r}", "a power of two")
        start = -(-self._offset // alignment) * alignment
        for name, shape, kind, offset in places:
            if name in self.tensors:
                raise self._fail(f"tensor {name!r} for the second time", "each tensor once")
            self.tensors[name] = self._tensor(name, shape, kind, start + offset)

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorEntry:
        where = f"{self.path}, tensor {name!r}"
        if kind in FORMATS:
            _, elements, size_bytes = FORMATS[kind]
        else:
            import gguf

            try:
                elements, size_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
            except (ValueError, KeyError):
                raise ModelError(where, f"format {kind}", "a format that ggml defines", "get the file again") from None
        count = 1
        for extent in shape:
            count *= extent
        if shape[-1] % elements or min(shape) < 1:
            raise ModelError(
                where, f"shape {shape}", f"rows of a multiple of {elements} elements", "get the file again"
            )
        total_bytes = count // elements * size_bytes
        if offset + total_bytes > len(self._file):
            raise ModelError(
                where, f"bytes {offset} to {offset + total_bytes}", f"no byte beyond {len(self._file)}, the file's end",
                "the file is cut short: get it again",
            )
        return TensorEntry(name, shape, kind, self._file.part(offset, offset + total_bytes))


def open_parts(path: Path) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """The metadata and the tensors of a model: of one file, or of all that its first one counts (split.count), which
    lie beside it. Raises ModelError, also for another part than the first."""
    first = GgufFile(path)
    count = first.metadata.get("split.count", 1)
    if type(count) is not int or not 1 <= count <= MAX_PARTS:
        raise ModelError(f"{path}, key split.count", repr(count)[:80], f"a whole number from 1 to {MAX_PARTS}")
    if count == 1:
        return first.metadata, first.tensors
    found = PART_NAME.fullmatch(path.name)
    if found is None or int(found[2]) != 1 or int(found[3]) != count:
        raise ModelError(path, f"a part of a model in {count} files", f"the first: NAME-00001-of-{count:05d}.gguf",
                         "take the first file; the others are found beside it")
    tensors = dict(first.tensors)
    for number in range(2, count + 1):
        place = path.with_name(f"{found[1]}-{number:05d}-of-{count:05d}.gguf")
        part = GgufFile(place)
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (number - 1, count):
            raise ModelError(f"{place}, keys split.no and split.count", "others", f"{number - 1} and {count}",
                             "get the file again")
        for name, entry in part.tensors.items():
            if name in tensors:
                raise ModelError(f"{place}, tensor {name!r}", "the tensor for the second time", "each tensor once")
            tensors[name] = entry
    return first.metadata, tensors


def metadata_bytes(path: Path) -> bytes:
    """A GGUF file with the metadata of another, and no tensors. Raises ModelError."""
    file = GgufFile(path)
    try:
        with path.open("rb") as source:
            head = source.read(file.metadata_bytes)
    except OSError as error:
        raise ModelError(path, str(error), "a GGUF file", "check the path") from None
    return head[:8] + struct.pack("<Q", 0) + head[16:]
