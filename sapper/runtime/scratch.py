"""Scratch memory and sync blocks, lent to one launch at a time.

Enters: how many scratch bytes a kernel wants. Leaves: a `WorkArea` whose addresses go into words 0 to 2 of the
argument block (docs/ir.md). Holds: an area is used by one launch at a time. A launch takes one off a list and puts it
back after, so there are as many areas as launches that ever ran at once, and the one used last, warm in the cache, is
used next.
"""

from __future__ import annotations

import ctypes

from .buffers import Mapping
from .system import PAGE_BYTES, round_up

SYNC_BYTES = 1024
COUNTER_LINE_BYTES = 64
COUNTER_BYTES = 8 * COUNTER_LINE_BYTES
BARRIER_OFFSET = COUNTER_BYTES
"""i32 arrived at +0, i32 generation at +4 of it; then 56 bytes unused."""

NO_COUNTS = bytes(COUNTER_BYTES)
_LEAST_BYTES = 8 << 20  # address space only: pages that no kernel touches are never there


class WorkArea:
    """A sync block, and scratch of capacity bytes on huge pages, which are not there before a kernel touches them.

    sync: address of the sync block, zero at first. scratch: page-aligned address. counters: the task counters' bytes.
    """

    __slots__ = ("_mapping", "_sync_page", "capacity_bytes", "counters", "scratch", "sync")

    def __init__(self, capacity_bytes: int = 0) -> None:
        mapping = Mapping(max(capacity_bytes, _LEAST_BYTES) + PAGE_BYTES)
        self._mapping = mapping
        self._sync_page = Mapping(PAGE_BYTES, huge=False)
        self.sync = self._sync_page.address
        self.scratch = mapping.address + PAGE_BYTES  # not in the cache sets of all that begins on a huge page
        self.capacity_bytes = mapping.size_bytes - PAGE_BYTES
        counters = (ctypes.c_char * COUNTER_BYTES).from_address(self.sync)
        self.counters = memoryview(counters).cast("B")


areas: list[WorkArea] = []
"""Areas for launches by one worker that are free right now."""


def take_area(scratch_bytes: int) -> WorkArea:
    """An area with at least so much scratch, from the free ones or new; give it back with `areas.append`."""
    try:
        area = areas.pop()  # not `if areas`: another thread may take the last one in between
    except IndexError:
        return WorkArea(scratch_bytes)
    # One that has become too small is dropped for the larger one.
    return area if area.capacity_bytes >= scratch_bytes else WorkArea(scratch_bytes)


def stride_bytes(scratch_bytes: int) -> int:
    """Distance between the scratch of one worker and the next: whole pages, so that no two share one."""
    return round_up(scratch_bytes, PAGE_BYTES)
