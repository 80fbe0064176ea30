"""What a launch counts: instructions, bank conflicts, sectors; in all, and by line of the text.

Enters: each access, from the units of the emulator. Leaves: `Counters`. Holds: figures are sums over all warps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .memory import SHARED_START

Array = NDArray[Any]


@dataclass(slots=True)
class Accesses:
    """Accesses of memory. shared_accesses: warp instructions on shared memory; shared_cycles: cycles they take with
    their bank conflicts, shared_ideal: without. global_accesses: warp instructions on global memory; global_sectors:
    32-byte sectors they touch, global_ideal: the least that their bytes need."""

    shared_accesses: int = 0
    shared_cycles: int = 0
    shared_ideal: int = 0
    global_accesses: int = 0
    global_sectors: int = 0
    global_ideal: int = 0


@dataclass(slots=True)
class LineCounters(Accesses):
    """Of one instruction of the text, over all warps that ran it. runs: how many did.

    read, written: the bytes of a block's shared memory that it reads and writes, one mark for each granule (of the
    race detector); None: none. granule_bytes: of a granule."""

    runs: int = 0
    read: Array | None = None
    written: Array | None = None
    granule_bytes: int = 4

    def touches(self, first: int, size_bytes: int) -> tuple[bool, bool]:
        """Whether it reads, and whether it writes, any of these bytes of shared memory."""
        part = slice(first // self.granule_bytes, -(-(first + size_bytes) // self.granule_bytes))
        return (self.read is not None and bool(self.read[part].any()),
                self.written is not None and bool(self.written[part].any()))


@dataclass(slots=True)
class Counters(Accesses):
    """Of a launch. instructions: executed by warps, by opcode. lines: accesses by line of the text, where Options.lines
    asks for it."""

    instructions: dict[str, int] = field(default_factory=dict)
    lines: dict[int, LineCounters] = field(default_factory=dict)

    def count_shared(self, line: LineCounters | None, accesses: int, cycles: int, ideal: int) -> None:
        for counted in (self, line):
            if counted is not None:
                counted.shared_accesses += accesses
                counted.shared_cycles += cycles
                counted.shared_ideal += ideal

    def count_global(self, line: LineCounters | None, accesses: int, sectors: int, ideal: int) -> None:
        for counted in (self, line):
            if counted is not None:
                counted.global_accesses += accesses
                counted.global_sectors += sectors
                counted.global_ideal += ideal

    def of_line(self, line: int) -> LineCounters:
        return self.lines.setdefault(line, LineCounters())


@dataclass(slots=True)
class Journal:
    """Notes in Counters.lines what each line touches of the shared memory of its block: `bytes_of_block`, at a multiple
    of `stride` in the memory of all resident blocks."""

    counters: Counters
    granule_bytes: int
    stride: int
    bytes_of_block: int

    def note(self, kind: str, places: Array, line: int) -> None:
        """places: granules of the memory of all resident blocks. kind: "read" or "written"."""
        counted = self.counters.of_line(line)
        marks = getattr(counted, kind)
        if marks is None:
            counted.granule_bytes = self.granule_bytes
            marks = np.zeros(-(-self.bytes_of_block // self.granule_bytes), bool)
            setattr(counted, kind, marks)
        marks[(places * self.granule_bytes % self.stride - SHARED_START) // self.granule_bytes] = True
