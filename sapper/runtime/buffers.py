"""Memory for tensors and scratch, backed by huge pages.

Enters: shapes and sizes. Leaves: NumPy arrays (`empty`, `Arena.empty`), or raw mappings (`Mapping`) that live as long
as the object. Holds: an array of HUGE_THRESHOLD_BYTES or more starts on a 2 MiB boundary and has asked for huge pages,
which about doubles what a core reads from DRAM on streams; a smaller one, and any of an arena, on a 64-byte boundary.
"""

from __future__ import annotations

import ctypes
import math
import operator
from collections.abc import Iterable
from threading import Thread
from typing import Any

import numpy

from . import system
from .dtypes import AnyDType, numpy_dtype
from .system import HUGE_PAGE_BYTES, round_up

HUGE_THRESHOLD_BYTES = 1 << 20
LINE_BYTES = 64
FETCHED_BYTES = 8 << 20
"""Fetched at once: a millisecond's work."""


class Mapping:
    """Private zeroed memory on a 2 MiB boundary that has asked for huge pages; freed with the object.

    address, size_bytes: what may be used; huge: False where it lies on plain pages, as the system refused huge ones or
    nobody asked.
    """

    __slots__ = ("_mapped_bytes", "address", "huge", "size_bytes")

    def __init__(self, size_bytes: int, huge: bool = True) -> None:
        """huge: ask for huge pages; of less than one, the first byte that is touched takes all of it."""
        self._mapped_bytes = 0
        self.size_bytes = size_bytes
        mapped_bytes = round_up(max(size_bytes, 1), HUGE_PAGE_BYTES)
        self.address = system.map_aligned(mapped_bytes)
        self._mapped_bytes = mapped_bytes
        self.huge = huge and system.advise_huge_pages(self.address, mapped_bytes)

    def __del__(self) -> None:
        if self._mapped_bytes and system is not None:   # None where the interpreter ends, and its memory with it
            system.unmap_memory(self.address, self._mapped_bytes)

    def bytes_view(self) -> ctypes.Array[ctypes.c_char]:
        """The memory as a ctypes array that keeps the mapping alive."""
        view = (ctypes.c_char * self.size_bytes).from_address(self.address)
        view.mapping = self  # type: ignore[attr-defined]
        return view


def empty(shape: int | tuple[int, ...], dtype: AnyDType = "f32") -> numpy.ndarray[Any, Any]:
    """An uninitialised C-order array for weights and results.

    shape: of elements. dtype: a sapper dtype, its name, or anything that numpy.dtype takes.
    Raises LaunchError when there is no memory, ValueError for a negative extent or what is no dtype.
    """
    extents, element = _described(shape, dtype)
    count = math.prod(extents)
    size_bytes = count * element.itemsize
    if size_bytes >= HUGE_THRESHOLD_BYTES:
        memory: Any = Mapping(size_bytes).bytes_view()
        return numpy.frombuffer(memory, dtype=element, count=count).reshape(extents)
    raw = numpy.empty(size_bytes + LINE_BYTES, numpy.uint8)
    offset = -raw.ctypes.data % LINE_BYTES
    return raw[offset : offset + size_bytes].view(element).reshape(extents)


class Arena:
    """Arrays one after another in the same huge pages: `arena.empty(shape, dtype)`.

    For what is read in order, such as the weights of a model: small matrices lie on huge pages too, and a kernel that
    reads ahead of itself, at the end of one matrix reads the beginning of the next. Memory that no array has touched
    is address space only. A block is freed with the last array in it.
    """

    __slots__ = ("_block", "_block_bytes", "_fetching", "_reached_bytes", "_used_bytes")

    def __init__(self, block_bytes: int = 1 << 30) -> None:
        """block_bytes: of address space taken at once; a larger array gets a block of its own."""
        self._block_bytes = block_bytes
        self._block: Any = None
        self._used_bytes = self._reached_bytes = 0
        self._fetching: _Fetching | None = None

    def expect(self, size_bytes: int) -> None:
        """Take memory for so many bytes at once, and have a thread fetch it from the system: zeroing it takes about as
        long as filling it, which waits for it no more. What proves too much is given back by `settle`."""
        mapping = Mapping(max(self._block_bytes, size_bytes))
        self._block, self._used_bytes, self._reached_bytes = mapping.bytes_view(), 0, 0
        self._fetching = _Fetching(mapping, size_bytes)

    def settle(self) -> None:
        """Give back what was fetched and is not used yet."""
        if self._fetching is not None:
            self._fetching.end(self._used_bytes)
            self._fetching = None

    def empty(self, shape: int | tuple[int, ...], dtype: AnyDType = "f32") -> numpy.ndarray[Any, Any]:
        """Like the function `empty`, after the array made last, on the next 64-byte boundary."""
        extents, element = _described(shape, dtype)
        count = math.prod(extents)
        start = round_up(self._used_bytes, LINE_BYTES)
        end = start + count * element.itemsize
        if self._block is None or end > len(self._block):
            self.settle()
            start, end = 0, count * element.itemsize
            self._block, self._reached_bytes = Mapping(max(end, self._block_bytes)).bytes_view(), 0
        self._used_bytes = end
        self._reached_bytes = max(self._reached_bytes, end)
        return numpy.frombuffer(self._block, dtype=element, count=count, offset=start).reshape(extents)

    def again(self) -> None:
        """Put the next array where the first one lies: for sets of arrays of which no two are in use at the same time.
        A larger set then takes no more memory than what it is larger by."""
        self._used_bytes = 0

    @property
    def reached(self) -> numpy.ndarray[Any, Any]:
        """All bytes of the block that an array has lain in: u8."""
        return numpy.frombuffer(self._block or b"", dtype=numpy.uint8, count=self._reached_bytes)


class _Fetching:
    """A thread that fetches the first bytes of a mapping from the system."""

    def __init__(self, mapping: Mapping, size_bytes: int) -> None:
        self._mapping, self._size_bytes = mapping, round_up(size_bytes, HUGE_PAGE_BYTES)
        self._ended = False
        self._thread = Thread(target=self._run, name="sapper-memory", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for start in range(0, self._size_bytes, FETCHED_BYTES):
            size_bytes = min(FETCHED_BYTES, self._size_bytes - start)
            if self._ended or not system.populate(self._mapping.address + start, size_bytes):
                break

    def end(self, used_bytes: int) -> None:
        """Give back what lies behind the bytes that are used."""
        self._ended = True
        self._thread.join()
        used_bytes = round_up(used_bytes, HUGE_PAGE_BYTES)
        if used_bytes < self._size_bytes:
            system.discard(self._mapping.address + used_bytes, self._size_bytes - used_bytes)


def _described(shape: int | tuple[int, ...], dtype: AnyDType) -> tuple[tuple[int, ...], numpy.dtype[Any]]:
    try:
        extents = tuple(map(operator.index, shape if isinstance(shape, Iterable) else (shape,)))
    except TypeError:
        raise ValueError(f"empty: found shape {shape!r}; expected integers") from None
    if any(extent < 0 for extent in extents):
        raise ValueError(f"empty: found shape {extents}; expected extents of 0 or more")
    try:
        return extents, numpy_dtype(dtype)
    except TypeError:
        raise ValueError(f"empty: found dtype {dtype!r}; expected a dtype of sapper, its name such as 'f32', or one of "
                         "NumPy") from None
