"""Memory of the emulated GPU: global arena, shared memory of the resident blocks, parameters, local and constant
memory.

Enters: addresses of threads. Leaves: values; MemoryFault for what lies outside, is misaligned or was never written.
Holds: one 64-bit generic address space. Shared memory of a block of rank r in its cluster is the window address
(r << 24) | offset, as `mapa` makes it; a symbol's address carries the rank of its own block. Offsets start at
`SHARED_START`, so that address 0 is nobody's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import MemoryFault
from .races import GlobalShadow

Array = NDArray[Any]

GLOBAL_BASE = 0x7_0000_0000
SHARED_BASE = 0x7F00_0000_0000
LOCAL_BASE = 0x7F10_0000_0000
PARAMETER_BASE = 0x7F20_0000_0000
WINDOW = 0x1_0000_0000
"""Bytes of a window of the generic address space."""
SHARED_START = 1024
RANK_SHIFT = 24
GUARD = 512
"""Bytes between two allocations that belong to nobody."""


class Arena:
    """Bytes with views by element size, and which of them were written."""

    def __init__(self, size_bytes: int) -> None:
        self.size = -(-max(size_bytes, 1) // 16) * 16
        self.bytes = np.zeros(self.size, np.uint8)
        self.written = np.zeros(self.size, np.uint8)
        self._make_views()

    def _make_views(self) -> None:
        self.views = {size: self.bytes.view(f"u{size}") for size in (1, 2, 4, 8)}
        self.written_views = {size: self.written.view(f"u{size}") for size in (1, 2, 4, 8)}

    def load(self, offsets: Array, size: int, count: int) -> Array:
        """(count, threads) elements of `size` bytes; offsets are aligned to size."""
        if count == 1:
            return np.asarray(self.views[size][offsets // size][None])
        return np.asarray(self.views[size][(offsets // size)[None, :] + np.arange(count)[:, None]])

    def store(self, offsets: Array, size: int, values: Array) -> None:
        """values: (count, threads)."""
        places = (offsets // size)[None, :] + np.arange(len(values))[:, None]
        self.views[size][places] = values
        self.written_views[size][places] = WRITTEN[size]

    def unwritten(self, offsets: Array, size: int, count: int) -> Array | None:
        """Which threads would read bytes that nobody wrote; None if there are none."""
        places = (offsets // size)[:, None] + np.arange(count)
        missing = self.written_views[size][places] != WRITTEN[size]
        return missing.any(axis=1) if np.count_nonzero(missing) else None


WRITTEN = {1: 1, 2: 0x0101, 4: 0x01010101, 8: 0x0101010101010101}


@dataclass(frozen=True, slots=True)
class Region:
    """The places of one allocation where an access may begin: `last` bytes from `start` at most. What an instruction
    reaches again and again is known by it sooner than by all allocations.

    written: every byte of it was when it was allocated.
    """

    start: int
    last: np.uint64
    written: bool

    def holds(self, offsets: Array) -> bool:
        return not np.count_nonzero((offsets - self.start).view(np.uint64) > self.last)  # what lies before it is huge


class GlobalMemory(Arena):
    """Allocations of the device. It outlives launches."""

    def __init__(self) -> None:
        super().__init__(1 << 16)
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.names: list[str] = []
        self.filled: list[bool] = []
        self.end = GUARD
        self.shadow: GlobalShadow | None = None
        self.agents_used = 0
        self.released: dict[int, int] = {}
        """Address -> the agents that had run before the batch that last released there."""

    def allocate(self, size_bytes: int, name: str = "", written: bool = False) -> int:
        """The address of a new allocation, aligned to 256 bytes."""
        start = -(-self.end // 256) * 256
        self.end = start + size_bytes + GUARD
        if self.end > self.size:
            old_bytes, old_written = self.bytes, self.written
            self.size = max(-(-self.end // 4096) * 4096, 2 * self.size)
            self.bytes, self.written = np.zeros(self.size, np.uint8), np.zeros(self.size, np.uint8)
            self.bytes[:len(old_bytes)], self.written[:len(old_written)] = old_bytes, old_written
            self._make_views()
        self.written[start:start + size_bytes] = int(written)
        self.starts.append(start)
        self.ends.append(start + size_bytes)
        self.names.append(name or f"allocation {len(self.names)}")
        self.filled.append(written)
        self._starts, self._ends = np.array(self.starts), np.array(self.ends)
        return GLOBAL_BASE + start

    def begin_launch(self) -> None:
        """Launches are ordered: nothing races with what an earlier one did."""
        self.shadow = None
        self.agents_used = 0
        self.released.clear()

    def free(self, address: int) -> None:
        """An allocation that is no more: every access to it is one outside of all. Raises MemoryFault."""
        start = address - GLOBAL_BASE
        if start not in self.starts:
            raise MemoryFault(f"found {address:#x}, expected the address of an allocation")
        which = self.starts.index(start)
        for facts in (self.starts, self.ends, self.names, self.filled):
            del facts[which]
        self._starts, self._ends = np.array(self.starts), np.array(self.ends)

    def outside(self, offsets: Array, size_bytes: int) -> Array | None:
        """Which accesses are not inside one allocation; None if all are."""
        if not self.starts:
            return np.ones(len(offsets), bool)
        which = np.searchsorted(self._starts, offsets, side="right") - 1
        wrong = (which < 0) | (offsets + size_bytes > self._ends[which])
        return wrong if np.count_nonzero(wrong) else None

    def region(self, offset: int, size_bytes: int) -> Region:
        """Where accesses of so many bytes stay in the allocation that holds this offset."""
        which = int(np.searchsorted(self._starts, offset, side="right")) - 1
        start, end = self.starts[which], self.ends[which]
        return Region(start, np.uint64(end - start - size_bytes), self.filled[which])

    def describe(self, offset: int) -> str:
        """Name and byte of an offset, or the nearest allocation below it."""
        if not self.starts or offset < self.starts[0]:
            return f"address {GLOBAL_BASE + offset:#x}"
        which = int(np.searchsorted(self._starts, offset, side="right")) - 1
        size = self.ends[which] - self.starts[which]
        return f"{self.names[which]}+{offset - self.starts[which]} (it has {size} bytes)"

    def shadow_for(self, granule: int) -> GlobalShadow:
        """The shadow of a launch; it starts anew, as launches are ordered."""
        self.shadow = GlobalShadow(self.size, granule)
        return self.shadow


class Memory:
    """What a batch of resident blocks sees.

    shared_bytes: of one block, from SHARED_START. symbols: name -> (space, address). workspace: address of the memory
    that a cooperative launch brings, or 0.
    """

    def __init__(self, device: GlobalMemory, parameters: bytes, blocks: int, shared_bytes: int, dynamic_bytes: int,
                 symbols: dict[str, tuple[str, int]], local_bytes: int, threads: int, workspace: int = 0) -> None:
        self.device, self.workspace = device, workspace
        self.dynamic_bytes, self.shared_bytes = dynamic_bytes, shared_bytes
        self.symbols = symbols
        self.shared_stride = -(-(SHARED_START + shared_bytes) // 1024) * 1024
        self.shared = Arena(blocks * self.shared_stride)
        self.parameters = Arena(len(parameters))
        self.parameters.bytes[:len(parameters)] = np.frombuffer(parameters, np.uint8)
        self.parameters.written[:] = 1
        self.parameter_bytes = len(parameters)
        self.local_bytes = local_bytes
        self.local_stride = -(-local_bytes // 16) * 16
        self.local = Arena(self.local_stride * threads)

    def address_of_symbol(self, name: str) -> int:
        """The address of a variable in its own space."""
        found = self.symbols.get(name)
        if found is None:
            raise MemoryFault(f"unknown variable {name!r}; known: {', '.join(sorted(self.symbols))}")
        return found[1]

    def is_shared(self, name: str) -> bool:
        return name in self.symbols and self.symbols[name][0] == "shared"

    @staticmethod
    def shared_rank_bits(rank: Array) -> Array:
        return rank.astype(np.uint64) << np.uint64(RANK_SHIFT)
