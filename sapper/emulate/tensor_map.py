"""Tensor maps: what the tensor copies know of a tensor in global memory.

Enters: a NumPy array and a box. Leaves: the 128 bytes of a kernel's parameter. Holds: dimensions and boxes are given as
the array has them, the contiguous one last; in the 128 bytes they stand innermost first, in a form of the emulator's
own (the real one is opaque: PTX ISA, "tensormap"; CUDA Driver API, cuTensorMapEncodeTiled, for the conditions checked
here).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .errors import EmulationError

SWIZZLES = (0, 32, 64, 128)
"""Bytes of the row over which 16-byte chunks are permuted; 0: none."""
_MAGIC = b"TMAP"
_FORM = struct.Struct("<4sBBBBQ5Q4Q5H")
_DTYPES: tuple[Any, ...] = (np.uint8, np.uint16, np.uint32, np.int32, np.uint64, np.int64, np.float16, np.float32,
                            np.float64, ml_dtypes.bfloat16, np.int8, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)


class TensorMap:
    """An argument of a launch. box: elements of a tile, by dimension as in the array. swizzle: of SWIZZLES. memory: the
    argument at whose start the array lies; None: the array itself."""

    def __init__(self, array: NDArray[Any], box: Sequence[int], swizzle: int = 0,
                 memory: NDArray[Any] | None = None) -> None:
        size = array.dtype.itemsize
        if len(box) != array.ndim or not 1 <= array.ndim <= 5:
            raise EmulationError(f"found a box of {len(box)} dimensions for an array of {array.ndim}, expected 1 to 5")
        if any(not 1 <= extent <= 256 for extent in box):
            raise EmulationError(f"found a box {tuple(box)}, expected extents of 1 to 256")
        if swizzle not in SWIZZLES:
            raise EmulationError(f"found swizzle {swizzle}, expected one of {SWIZZLES}")
        if swizzle and box[-1] * size > swizzle:
            raise EmulationError(f"the box has rows of {box[-1] * size} bytes, expected at most its swizzle, {swizzle}")
        if box[-1] * size % 16:
            raise EmulationError(f"the box has rows of {box[-1] * size} bytes, expected a multiple of 16")
        if array.size and any(stride % 16 for stride in array.strides[:-1]):
            raise EmulationError(f"found strides of {array.strides[:-1]} bytes, expected multiples of 16")
        self.array, self.box, self.swizzle = array, tuple(box), swizzle
        self.memory = array if memory is None else memory

    def encode(self, address: int) -> bytes:
        array = self.array
        dtype = [np.dtype(one) for one in _DTYPES].index(array.dtype)
        pad = [0] * 5
        dimensions = (*array.shape[::-1], *pad)[:5]
        strides = (*array.strides[-2::-1], *pad)[:4] if array.ndim > 1 else pad[:4]
        box = (*self.box[::-1], *pad)[:5]
        return _FORM.pack(_MAGIC, dtype, array.ndim, SWIZZLES.index(self.swizzle), 0, address, *dimensions, *strides,
                          *box).ljust(128, b"\0")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A decoded map, innermost dimension first. strides: bytes, of all dimensions."""

    address: int
    dtype: Any
    dimensions: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    @property
    def size_bytes(self) -> int:
        """Of the box, parts outside the tensor included."""
        return int(np.prod(self.box)) * int(self.dtype.itemsize)

    def box_offsets(self, coordinates: tuple[int, ...], unit: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(byte offsets from `address` of each `unit` bytes of the box in order, whether they are inside)."""
        size = int(self.dtype.itemsize)
        inner = self.box[0] * size // unit
        offsets = (coordinates[0] * size + np.arange(inner) * unit)[None, :]
        inside = (offsets >= 0) & (offsets < self.dimensions[0] * size)
        for axis in range(1, len(self.box)):
            index = coordinates[axis] + np.arange(self.box[axis])
            good = (index >= 0) & (index < self.dimensions[axis])
            offsets = (index * self.strides[axis])[:, None] + offsets.reshape(1, -1)
            inside = good[:, None] & inside.reshape(1, -1)
        return offsets.reshape(-1), inside.reshape(-1)

    def unit(self, coordinates: tuple[int, ...]) -> int:
        """The bytes that may be moved at once: 8 where rows and edges allow, else one element."""
        size = int(self.dtype.itemsize)
        edges = (coordinates[0] * size, self.dimensions[0] * size, self.box[0] * size)
        return 8 if all(edge % 8 == 0 for edge in edges) else size


def decode(data: bytes) -> Tensor:
    """The map of 128 bytes. Raises EmulationError where they are none."""
    if data[:4] != _MAGIC:
        raise EmulationError("found 128 bytes that are no tensor map; expected a TensorMap as the argument")
    _, dtype, rank, swizzle, _, address, *numbers = _FORM.unpack(data[:_FORM.size])
    dimensions, strides, box = numbers[:5], numbers[5:9], numbers[9:14]
    kind = np.dtype(_DTYPES[dtype])
    return Tensor(address, kind, tuple(dimensions[:rank]), (kind.itemsize, *strides[:rank - 1]), tuple(box[:rank]),
                  SWIZZLES[swizzle])


def swizzled(offsets: NDArray[np.int64], swizzle: int) -> NDArray[np.int64]:
    """Byte addresses in shared memory after swizzling: the number of the 16-byte chunk inside its row of `swizzle`
    bytes is combined by XOR with the number of the 128-byte row (PTX ISA, "Swizzling Modes")."""
    if not swizzle:
        return offsets
    bits = {32: 1, 64: 3, 128: 7}[swizzle]
    return offsets ^ ((offsets >> 3) & (bits << 4))
