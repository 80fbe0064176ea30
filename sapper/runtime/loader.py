"""Executable memory.

Enters: machine code that needs no relocation. Leaves: a `CodeBlock` whose `function` can be called.
Holds: no page is ever writable and executable at once. Code is written into fresh pages while they are read-write,
which are then made read-execute and not written again until every reference to the block is gone. A block takes
whole pages, so making one executable never touches the pages of another that may be running.

A large range is reserved without access (PROT_NONE) and carved up, which keeps kernels near each other. The pages are
private: a forked child has its own copies, and may load more. (A double mapping of a memfd would have to be shared,
and a child would then write into its parent's code.)
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque

from ..targets.x86_64.detect import host
from . import system
from .system import PAGE_BYTES, PROT_EXEC, PROT_NONE, PROT_READ, PROT_WRITE

RESERVE_BYTES = 64 << 20
_TRAP = 0xCC  # int3: a stray jump into the rest of a page stops there

KERNEL_PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
"""void kernel(int64_t *args, int64_t worker, int64_t workers); pointers, as ctypes passes those fastest."""


class CodeBlock:
    """One piece of machine code in executable memory; its pages may be reused when the object is gone.

    address: of the first byte, page aligned. size_bytes: of the code.
    function: callable with (address of the argument block, worker, workers).
    """

    __slots__ = ("__weakref__", "_arena", "_page_count", "address", "function", "size_bytes")

    def __init__(self, address: int, size_bytes: int, page_count: int, arena: CodeArena) -> None:
        self.address = address
        self.size_bytes = size_bytes
        self.function = KERNEL_PROTOTYPE(address)
        self._page_count = page_count
        self._arena = arena

    def read(self) -> bytes:
        """The code's bytes."""
        return ctypes.string_at(self.address, self.size_bytes)

    def __del__(self) -> None:
        # A queue, not the lock: this may run in the middle of anything, even inside CodeArena.add.
        self._arena.returned.append((self.address, self._page_count))


class CodeArena:
    """Reserved address ranges out of which code blocks are cut. Safe to use from several threads."""

    def __init__(self, reserve_bytes: int = RESERVE_BYTES) -> None:
        self.reserve_bytes = reserve_bytes
        self.returned: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()
        self._free: dict[int, list[int]] = {}
        self._next = self._end = 0
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def add(self, code: bytes) -> CodeBlock:
        """Copy code into executable memory. Raises LaunchError where the system refuses."""
        if not code:
            raise ValueError("no code to load: found 0 bytes; expected at least one instruction")
        page_count = -(-len(code) // PAGE_BYTES)
        with self._lock:
            address = self._take(page_count)
            size_bytes = page_count * PAGE_BYTES
            system.protect_memory(address, size_bytes, PROT_READ | PROT_WRITE)
            ctypes.memmove(address, code, len(code))
            ctypes.memset(address + len(code), _TRAP, size_bytes - len(code))
            system.protect_memory(address, size_bytes, PROT_READ | PROT_EXEC)
        return CodeBlock(address, len(code), page_count, self)

    def _take(self, page_count: int) -> int:
        while self.returned:
            address, count = self.returned.popleft()
            self._free.setdefault(count, []).append(address)
        reusable = self._free.get(page_count)
        if reusable:
            return reusable.pop()
        size_bytes = page_count * PAGE_BYTES
        if self._next + size_bytes > self._end:
            reserve = max(self.reserve_bytes, size_bytes)
            self._next = system.map_memory(reserve, PROT_NONE, system.MAP_PRIVATE | system.MAP_NORESERVE)
            self._end = self._next + reserve
        address = self._next
        self._next += size_bytes
        return address


_arena: CodeArena | None = None


def load(code: bytes) -> CodeBlock:
    """Copy machine code into this process's executable memory.

    Detection of the host comes before the first code that is loaded: it asks the system for what code may need.
    """
    global _arena
    if _arena is None:
        host()
        _arena = CodeArena()
    return _arena.add(code)
