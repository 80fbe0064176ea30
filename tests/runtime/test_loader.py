"""Executable memory: what is loaded runs, and no page is ever writable and executable."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading

import pytest

from sapper.runtime.errors import LaunchError
from sapper.runtime.loader import CodeArena, load
from sapper.runtime.system import PAGE_BYTES

from .conftest import ADD_I64, assemble

RETURN = assemble(("ret",))


def mappings() -> list[tuple[int, int, str]]:
    found = []
    with open("/proc/self/maps") as lines:
        for line in lines:
            span, flags, *_ = line.split()
            start, end = (int(x, 16) for x in span.split("-"))
            found.append((start, end, flags))
    return found


def flags_at(address: int) -> str:
    return next(flags for start, end, flags in mappings() if start <= address < end)


def test_loaded_code_is_executable_and_not_writable() -> None:
    block = load(ADD_I64)
    assert block.read() == ADD_I64
    assert block.address % PAGE_BYTES == 0
    assert flags_at(block.address).startswith("r-x")
    load(RETURN).function(0, 0, 1)


def test_no_mapping_is_writable_and_executable_while_many_kernels_are_loaded() -> None:
    others = {start for start, _, _ in mappings()}  # other libraries, PyTorch's for one, are less strict
    arena = CodeArena(reserve_bytes=16 * PAGE_BYTES)
    blocks = [arena.add(RETURN * (1 + 3000 * (i % 4))) for i in range(40)]
    ours = [flags for start, _, flags in mappings() if start not in others]
    assert ours and not [flags for flags in ours if "w" in flags and "x" in flags]
    for block in blocks:
        block.function(0, 0, 1)
    assert len({block.address for block in blocks}) == 40


GUARDED = """
import ctypes
import struct
import sys
import numpy as np
from sapper.kernels.add import vector_add
from sapper.kernels.matmul import matmul_nn_f32
from sapper.runtime import system

# seccomp(2): mmap and mprotect of x86-64 fail with EACCES where they ask for PROT_WRITE and PROT_EXEC at once.
LOAD, AND, EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
program = [(LOAD, 0, 0, 0), (EQUAL, 2, 0, 9), (EQUAL, 1, 0, 10), (EQUAL, 0, 3, 329), (LOAD, 0, 0, 32), (AND, 0, 0, 6),
           (EQUAL, 1, 0, 6), (RETURN, 0, 0, 0x7FFF0000), (RETURN, 0, 0, 0x00050000 | 13)]
filter = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(Program(len(program), ctypes.addressof(filter))), 0, 0):
    sys.exit(77)
for protection in (6, 7):
    try:
        system.map_memory(4096, protection)
    except Exception as error:
        assert "Permission denied" in str(error), error
    else:
        raise AssertionError("the filter lets through what it is to stop")
x, y = np.ones(1 << 16, np.float32), np.zeros(1 << 16, np.float32)
for threads in (1, 2):
    vector_add(x, x, y, threads=threads)
    assert (y == 2).all()
    a, c = np.ones((40, 40), np.float32), np.zeros((40, 40), np.float32)
    matmul_nn_f32(a, a, c, threads=threads)
    assert (c == 40).all()
"""


def test_no_call_ever_asks_for_memory_that_is_writable_and_executable() -> None:
    """Not even for a moment: in this process the kernel of the system refuses it, and all the same kernels compile,
    load and run on one worker and on two."""
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, check=False, timeout=100)
    if done.returncode == 77:
        pytest.skip("this system has no seccomp filters")
    assert (done.returncode, done.stderr) == (0, "")


def test_pages_of_a_dropped_block_are_used_again() -> None:
    arena = CodeArena(reserve_bytes=4 * PAGE_BYTES)
    address = arena.add(RETURN).address
    gc.collect()
    assert arena.add(ADD_I64).address == address


def test_rest_of_the_last_page_traps() -> None:
    arena = CodeArena()
    first = arena.add(b"\x90" * PAGE_BYTES)
    del first
    block = arena.add(RETURN)
    with open("/proc/self/mem", "rb") as memory:
        memory.seek(block.address)
        page = memory.read(PAGE_BYTES)
    assert page == RETURN + b"\xcc" * (PAGE_BYTES - len(RETURN))


def test_loading_from_many_threads() -> None:
    arena = CodeArena(reserve_bytes=64 * PAGE_BYTES)
    codes: list[tuple[bytes, object]] = []

    def work(n: int) -> None:
        for i in range(20):
            code = assemble(("mov.64", 0, _number(1000 * n + i)), ("ret",))
            codes.append((code, arena.add(code)))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(codes) == 80
    assert all(block.read() == code for code, block in codes)  # type: ignore[attr-defined]


def _number(value: int) -> object:
    from sapper.codegen.machine import Immediate

    return Immediate(value)


def test_empty_code_is_refused() -> None:
    with pytest.raises(ValueError, match="0 bytes"):
        load(b"")


def test_refusal_of_the_system_is_explained() -> None:
    arena = CodeArena(reserve_bytes=1 << 60)
    with pytest.raises(LaunchError, match=r"mmap .* expected .* mend"):
        arena.add(RETURN)


def test_a_child_loads_its_own_code_without_disturbing_the_parent() -> None:
    arena = CodeArena()
    arena.add(RETURN)
    child = os.fork()
    if child == 0:
        arena.add(ADD_I64).function  # noqa: B018
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    block = arena.add(RETURN)
    block.function(0, 0, 1)
    assert block.read() == RETURN
