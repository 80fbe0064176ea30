"""The memory that an interpreter may touch: registered buffers of this process, and nothing else.

Leaves: `Memory`, and the error of a program that goes wrong, `LaneError`.
"""

from __future__ import annotations

import bisect
import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class LaneError(RuntimeError):
    """A lane program did what it must not: an access outside every buffer, a division of scalars by zero, ..."""


class Memory:
    """The buffers that a program may touch, by address. They are real memory of this process."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._buffers: list[tuple[str, int, int, bool, NDArray[np.uint8]]] = []
        self._last: tuple[int, int, bool, NDArray[np.uint8]] = (0, 0, False, np.empty(0, np.uint8))
        """Start, end, whether it may be written, and bytes of the buffer that was found last: often the next one."""
        self._keep: list[Any] = []

    def add(self, name: str, address: int, size_bytes: int, writable: bool = True) -> None:
        """Register `size_bytes` of memory at `address`.

        Buffers that overlap (views of one array) become one, which may be written if any of them may.
        """
        if size_bytes == 0:
            return
        self._last = (0, 0, False, np.empty(0, np.uint8))
        end = address + size_bytes
        at = bisect.bisect_left(self._starts, address)
        while at > 0 and self._starts[at - 1] + self._buffers[at - 1][2] > address:
            at -= 1
        while at < len(self._starts) and self._starts[at] < end:
            other, start, size, other_writable, _ = self._buffers.pop(at)
            self._starts.pop(at)
            name, writable = f"{other}+{name}", writable or other_writable
            address, end = min(address, start), max(end, start + size)
        size_bytes = end - address
        storage = (ctypes.c_uint8 * size_bytes).from_address(address)
        view = np.ctypeslib.as_array(storage)
        self._starts.insert(at, address)
        self._buffers.insert(at, (name, address, size_bytes, writable, view))

    def add_array(self, name: str, array: Array) -> int:
        """Register all bytes that an array's elements span (also those its strides skip); the address of its first."""
        data = int(array.__array_interface__["data"][0])
        if array.size:
            spans = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
            low = sum([s for s in spans if s < 0])
            high = sum([s for s in spans if s > 0]) + array.itemsize
            self.add(name, data + low, high - low, bool(array.flags.writeable))
        self._keep.append(array)
        return data

    def allocate(self, name: str, size_bytes: int, align_bytes: int = 64) -> int:
        """New zeroed memory, aligned, kept alive by this object; its address."""
        store = np.zeros(size_bytes + align_bytes, np.uint8)
        address = -(-int(store.ctypes.data) // align_bytes) * align_bytes
        self._keep.append(store)
        self.add(name, address, size_bytes)
        return address

    def find(self, address: int, size_bytes: int, write: bool) -> NDArray[np.uint8] | str:
        """The bytes at an address as a view, or a sentence saying why not."""
        start, end, writable, view = self._last
        if start <= address and address + size_bytes <= end and (writable or not write):
            return view[address - start : address - start + size_bytes]
        at = bisect.bisect_right(self._starts, address) - 1
        if at >= 0:
            name, start, size, writable, view = self._buffers[at]
            offset = address - start
            if offset + size_bytes <= size:
                if write and not writable:
                    return f"a write of {size_bytes} bytes at byte {offset} of {name}, which is read-only"
                self._last = start, start + size, writable, view
                return view[offset : offset + size_bytes]
        return f"{'a write' if write else 'a read'} of {size_bytes} bytes at {address:#x}, {self._nearest(address)}"

    def _nearest(self, address: int) -> str:
        best: tuple[int, str] | None = None
        for name, start, size, _, _ in self._buffers:
            if address >= start:
                near = (address - start - size, f"{address - start - size} bytes past the end of {name} ({size} bytes)")
            else:
                near = (start - address, f"{start - address} bytes before {name}")
            if best is None or near < best:
                best = near
        return best[1] if best is not None else "with no buffer registered"
