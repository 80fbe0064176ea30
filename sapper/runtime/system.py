"""The few calls into the C library that Python does not offer: mapping memory at chosen protections and alignments.

Enters: sizes in bytes. Leaves: addresses. Holds: nothing but the library handle; who maps memory owns it.
Constants are those of Linux on x86-64 and AArch64 (asm-generic/mman-common.h).
"""

from __future__ import annotations

import ctypes
import errno
import os

from .errors import LaunchError

PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20

PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC = 0, 1, 2, 4
MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE = 0x01, 0x02, 0x20, 0x4000
MADV_DONTNEED, MADV_HUGEPAGE, MADV_POPULATE_WRITE = 4, 14, 23
_MAP_FAILED = 2**64 - 1
_PR_SET_PDEATHSIG = 1

_library = ctypes.CDLL(None, use_errno=True)
_mmap = _library.mmap
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_mmap.restype = ctypes.c_size_t
_munmap = _library.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_mprotect = _library.mprotect
_mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_madvise = _library.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _error(what: str, size_bytes: int) -> LaunchError:
    code = ctypes.get_errno()
    mend = (
        "free memory or raise the limit (ulimit -v)"
        if code == errno.ENOMEM
        else "allow this process to map executable memory (SELinux execmem, container profile)"
    )
    return LaunchError(
        f"{what} of {size_bytes} bytes: found {os.strerror(code)}; expected memory from the system; mend: {mend}"
    )


def map_memory(size_bytes: int, protection: int, flags: int = MAP_PRIVATE) -> int:
    """Map anonymous zeroed memory and return its address (page aligned). Raises LaunchError."""
    address: int = _mmap(None, size_bytes, protection, flags | MAP_ANONYMOUS, -1, 0)
    if address == _MAP_FAILED:
        raise _error("mmap", size_bytes)
    return address


def map_aligned(size_bytes: int) -> int:
    """Map private read-write memory, aligned to HUGE_PAGE_BYTES; size_bytes is a page multiple.

    The ends that alignment leaves over are given back, so that munmap(address, size_bytes) frees all of it.
    """
    whole = size_bytes + HUGE_PAGE_BYTES
    start = map_memory(whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE)
    address = round_up(start, HUGE_PAGE_BYTES)
    if address > start:
        unmap_memory(start, address - start)
    end = start + whole
    if end > address + size_bytes:
        unmap_memory(address + size_bytes, end - address - size_bytes)
    return address


def unmap_memory(address: int, size_bytes: int) -> None:
    if _munmap(address, size_bytes):
        raise _error("munmap", size_bytes)


def protect_memory(address: int, size_bytes: int, protection: int) -> None:
    if _mprotect(address, size_bytes, protection):
        raise _error("mprotect", size_bytes)


def advise_huge_pages(address: int, size_bytes: int) -> bool:
    """Ask for huge pages; False where the system has none (which costs speed, not correctness)."""
    return bool(_madvise(address, size_bytes, MADV_HUGEPAGE) == 0)


def populate(address: int, size_bytes: int) -> bool:
    """Have the system put zeroed pages behind memory now rather than where it is first touched; False where it can't:
    Linux does since 5.14. The interpreter is free meanwhile."""
    return bool(_madvise(address, size_bytes, MADV_POPULATE_WRITE) == 0)


def discard(address: int, size_bytes: int) -> None:
    """Give pages back to the system; the memory stays mapped, and is zero when it is touched next."""
    if _madvise(address, size_bytes, MADV_DONTNEED):
        raise _error("madvise", size_bytes)


def available_bytes() -> int | None:
    """Of memory that programs may take without driving others out; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return None


def trim_heap() -> None:
    """Give the system back what the C library keeps of freed memory, where it is one that can (glibc)."""
    trim = getattr(_library, "malloc_trim", None)
    if trim is not None:
        trim(0)


def end_with_parent() -> None:
    """Let this process be killed when the thread that forked it ends, however that happens (prctl(2))."""
    import signal

    _library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
