"""Memory of kernels that run as machine code of another processor.

Leaves: `Buffers`: each buffer lies in pages of its own, between pages that can't be reached, so an access beyond one is
a fault; and what a launch wants besides arrays (docs/ir.md). Holds: addresses are those that the code sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..ir.scratch import scratch_bytes
from ..runtime.arguments import Binding, Signature, fill_words
from ..runtime.compiled import CompiledKernel

PAGE_BYTES = 4096
BUFFERS_AT = 0x1000_0000
SYNC_BYTES = 1024
"""Of the sync block (docs/ir.md)."""
LOW = (1 << 64) - 1


def whole_pages(size_bytes: int) -> int:
    return max(1, -(-size_bytes // PAGE_BYTES)) * PAGE_BYTES


class Buffers:
    """Memory in pages of its own, with pages that nobody has between. at_end: arrays end with their pages, else they
    begin with them. laid: of each array where its bytes begin here, where in a launch, and these."""

    def __init__(self, at_end: bool = True) -> None:
        self.at_end = at_end
        self.next = BUFFERS_AT
        self.memory: list[tuple[int, Any]] = []
        self.arrays: list[tuple[Any, Any]] = []
        self.laid: list[tuple[int, int, Any]] = []

    def add(self, size_bytes: int, align_bytes: int = 1) -> tuple[int, Any]:
        """So many bytes: their address, and the bytes, all ones."""
        whole = whole_pages(size_bytes)
        room = np.full(whole + PAGE_BYTES, 0xFF, np.uint8)
        start = -room.ctypes.data % PAGE_BYTES
        pages = room[start:start + whole]
        address, self.next = self.next, self.next + whole + PAGE_BYTES
        self.memory.append((address, pages))
        offset = (whole - size_bytes) // align_bytes * align_bytes if self.at_end else 0
        return address + offset, pages[offset:offset + size_bytes]

    def add_array(self, array: Any) -> int:
        """The address of the first element of a copy, which lies as the array does; `give_back` copies it back. An
        array within another one that was added, as one that is worked on in place, lies there."""
        low = high = 0
        for extent, stride in zip(array.shape, array.strides, strict=True):
            low, high = low + min(0, (extent - 1) * stride), high + max(0, (extent - 1) * stride)
        size = high - low + array.itemsize if array.size else 0
        first = array.ctypes.data + low
        address, held = next(((address + first - start, held[first - start:]) for start, address, held in self.laid
                              if size and start <= first and first + size <= start + held.size), (0, None))
        if held is None:
            address, held = self.add(size, max(1, array.itemsize))
            self.laid.append((first, address, held))
        if size:
            view = np.ndarray(array.shape, array.dtype, held, -low, array.strides)
            view[...] = array
            self.arrays.append((array, view))
        return address - low

    def give_back(self) -> None:
        for array, view in self.arrays:
            if array.flags.writeable:
                array[...] = view


WordsOf = Callable[[Buffers], Sequence[int]]
"""Adds arrays to the buffers and gives the words of the argument block from word 3 on."""


def with_arguments(words_of: WordsOf, scratch: int, workers: int, at_end: bool) -> tuple[Buffers, int]:
    """Memory of a launch, and the address of its argument block. scratch: bytes of each worker."""
    buffers = Buffers(at_end)
    each = max(64, scratch)
    first, _ = buffers.add(each * workers, 64)
    sync, held = buffers.add(SYNC_BYTES, 64)
    held[:] = 0
    words = np.array([word & LOW for word in (first, each, sync, *words_of(buffers))], np.uint64)
    return buffers, buffers.add_array(words)


def bound(compiled: CompiledKernel, signature: Signature, binding: Binding,
          arguments: Mapping[str, Any]) -> tuple[WordsOf, int]:
    """What `with_arguments` wants, of a compiled kernel and bound arguments, by name."""
    names = [parameter.name for parameter in signature.parameters]

    def words_of(buffers: Buffers) -> list[int]:
        added: dict[int, int] = {}

        def address_of(position: int) -> int:
            if position not in added:
                given = arguments[names[position]]
                added[position] = buffers.add_array(getattr(given, "data", given) if not isinstance(given, np.ndarray)
                                                    else given)
            return added[position]

        return fill_words(signature, compiled.slots, binding, address_of)

    return words_of, scratch_bytes(compiled.scratch, binding.dims)
