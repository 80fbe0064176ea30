"""Generated code for perf and gdb: where it lies, what it is called, which Python line each instruction comes from.

Enters: a `CodeBlock` that was just loaded, its kernel's name and lines. Leaves: what the tools read. Holds: nothing is
done, nothing is written, unless the environment asks for it (settings.py):

    SAPPER_PERF=map       /tmp/perf-PID.map: address, size and name of each kernel; enough for `perf report`
    SAPPER_PERF=jitdump   jit-PID.dump in the directory for temporary files: code and lines too, for `perf annotate`:
                          perf record -k mono ...; perf inject --jit -i perf.data -o jit.data; perf annotate -i jit.data
    SAPPER_GDB=1          gdb's JIT interface: `break kernels.py:12`, `list`, `info line *$pc` work in kernels

gdb looks for a function that it can stop in and a list beside it, by name, in the libraries of a process. This one has
none by a C compiler, so it loads one that object.py wrote.
Source: linux tools/perf/Documentation/jit-interface.txt and jitdump-specification.txt; gdb manual, "JIT Compilation
Interface".
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

from ..ir.nodes import Location
from . import settings
from .loader import CodeBlock

Lines = Sequence[tuple[int, Location]]
Frame = Sequence[tuple[int, Any]]

_JITDUMP_MAGIC, _JITDUMP_VERSION, _MACHINE_X86_64 = 0x4A695444, 1, 62
_HEADER_BYTES = 40
_CODE_LOAD, _DEBUG_INFO, _UNWINDING_INFO = 0, 2, 4
_REGISTER, _UNREGISTER = 1, 2

_lock = threading.RLock()


def announce(name: str, block: CodeBlock, lines: Lines, source: Location, frame: Frame = ()) -> None:
    """Tell the tools that the environment names of a block.

    name: of the kernel. lines: (offset, location) where it changes. source: where the kernel is defined. frame: how its
    frame lies, so that backtraces pass through it (codegen/unwind.py).
    """
    if not settings.debugging():
        return
    kind = settings.perf()
    with _lock:
        if kind == "map":
            _write_map(name, block)
        elif kind == "jitdump":
            _jitdump().add(name, block, lines, source, frame)
        if settings.gdb():
            _gdb().add(name, block, lines, source, frame)


def _write_map(name: str, block: CodeBlock) -> None:
    with open(f"/tmp/perf-{os.getpid()}.map", "a", encoding="utf-8") as file:
        file.write(f"{block.address:x} {block.size_bytes:x} sapper:{name}\n")


class JitDump:
    """The file that `perf inject --jit` reads. A page of it is mapped executable, by which perf finds it."""

    def __init__(self, directory: str) -> None:
        self.path = os.path.join(directory, f"jit-{os.getpid()}.dump")
        self.count = 0
        self._file = open(self.path, "w+b", buffering=0)  # noqa: SIM115  (open as long as the process runs)
        self._file.write(struct.pack("<IIIIIIQQ", _JITDUMP_MAGIC, _JITDUMP_VERSION, _HEADER_BYTES, _MACHINE_X86_64, 0,
                                     os.getpid(), time.monotonic_ns(), 0))
        self._marker = mmap.mmap(self._file.fileno(), _HEADER_BYTES, mmap.MAP_PRIVATE,
                                 mmap.PROT_READ | mmap.PROT_EXEC)

    def add(self, name: str, block: CodeBlock, lines: Lines, source: Location, frame: Frame = ()) -> None:
        """Lines and unwinding tables first, then the code that they belong to, as the specification wants it.

        perf takes each line to reach to the next entry, and the last to reach nowhere: so there is one at the end.
        """
        rows = [(0, source), *lines]
        rows.append((block.size_bytes, rows[-1][1]))
        entries = b"".join(struct.pack("<QII", block.address + offset, at.line, 0) + os.fsencode(at.file) + b"\0"
                           for offset, at in rows)
        self._record(_DEBUG_INFO, struct.pack("<QQ", block.address, len(rows)) + entries)
        if frame:
            self._record(_UNWINDING_INFO, unwinding_info(block.size_bytes, frame))
        self._record(_CODE_LOAD, struct.pack(
            "<IIQQQQ", os.getpid(), threading.get_native_id(), block.address, block.address, block.size_bytes,
            self.count) + f"sapper:{name}".encode() + b"\0" + block.read())
        self.count += 1

    def _record(self, kind: int, content: bytes) -> None:
        self._file.write(struct.pack("<IIQ", kind, 16 + len(content), time.monotonic_ns()) + content)


def unwinding_info(size_bytes: int, frame: Frame) -> bytes:
    """The content of a record of unwinding tables: their size, that of the index, how much of it the process has mapped
    (nothing), then .eh_frame and .eh_frame_hdr, for which perf makes room 8-byte aligned behind the code."""
    from ..codegen.unwind import Frames, eh_frame, eh_frame_header

    away = -(-size_bytes // 8) * 8
    table, _, places = eh_frame([Frames(0, size_bytes, frame)], -away)
    index = eh_frame_header(places, -len(table), -away - len(table))
    return struct.pack("<QQQ", len(table) + len(index), len(index), 0) + table + index


class Gdb:
    """The list of objects that gdb reads, and the function at which it stops when the list changes.

    The descriptor: u32 version, u32 action, u64 entry at hand, u64 first entry. An entry: u64 next, u64 previous, u64
    address and u64 size of the object.
    """

    def __init__(self) -> None:
        import tempfile

        from ..codegen.encode import encode
        from ..codegen.listing import Listing
        from ..codegen.machine import MachineFunction
        from ..codegen.object import Part, write_shared_object

        emit = Listing()
        emit("ret")
        name = "__jit_debug_register_code"
        code = encode(MachineFunction(name, emit.body, {}))
        content = write_shared_object([Part(name, code)], "sapper-gdb.so", {"__jit_debug_descriptor": 24},
                                      exported_areas=True)
        with tempfile.NamedTemporaryFile(prefix="sapper-gdb-", suffix=".so", delete=False) as file:
            file.write(content)
        # gdb reads the file when the process loads it or when it attaches, so it stays until the process ends.
        self._library = ctypes.CDLL(file.name)
        self._remove_file = weakref.finalize(self, _unlink, file.name)
        self._descriptor = (ctypes.c_uint64 * 3).in_dll(self._library, "__jit_debug_descriptor")
        self._stop_here = self._library[name]
        self._descriptor[0] = 1
        self._kept: dict[int, tuple[Any, Any]] = {}  # by address of the entry: the entry, the object

    def add(self, name: str, block: CodeBlock, lines: Lines, source: Location, frame: Frame = ()) -> None:
        from ..codegen.object import write_loaded

        content = write_loaded(name, block.address, block.size_bytes, lines, source, frame)
        symbols = ctypes.create_string_buffer(content, len(content))
        entry = (ctypes.c_uint64 * 4)()
        at = ctypes.addressof(entry)
        first = self._descriptor[2]
        entry[:] = [first, 0, ctypes.addressof(symbols), len(content)]
        if first:
            self._kept[first][0][1] = at
        self._kept[at] = entry, symbols
        self._descriptor[2] = at
        self._tell(_REGISTER, at)
        weakref.finalize(block, self.remove, at).atexit = False

    def remove(self, at: int) -> None:
        """Take an entry out of the list, when its code is gone."""
        with _lock:
            entry, _ = self._kept[at]
            following, before = entry[0], entry[1]
            if before:
                self._kept[before][0][0] = following
            else:
                self._descriptor[2] = following
            if following:
                self._kept[following][0][1] = before
            self._tell(_UNREGISTER, at)
            del self._kept[at]

    def entries(self) -> list[tuple[int, bytes]]:
        """(address of the entry, object) in the order of the list."""
        found = []
        at = self._descriptor[2]
        while at:
            entry = (ctypes.c_uint64 * 4).from_address(at)
            found.append((at, ctypes.string_at(entry[2], entry[3])))
            at = entry[0]
        return found

    def _tell(self, action: int, at: int) -> None:
        self._descriptor[0] = 1 | action << 32  # version, then the action
        self._descriptor[1] = at
        self._stop_here()
        self._descriptor[0] = 1


def _unlink(path: str) -> None:
    if os.path.exists(path):
        os.unlink(path)


_the_jitdump: JitDump | None = None
_the_gdb: Gdb | None = None


def _jitdump() -> JitDump:
    global _the_jitdump
    if _the_jitdump is None:
        import tempfile

        _the_jitdump = JitDump(tempfile.gettempdir())
    return _the_jitdump


def _gdb() -> Gdb:
    global _the_gdb
    if _the_gdb is None:
        _the_gdb = Gdb()
    return _the_gdb


def _after_fork() -> None:
    """A child's dump is a file of its own; the list of its code is the parent's, and goes on."""
    global _the_jitdump, _lock
    _the_jitdump = None
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)
