"""AArch64 code on an emulator that others wrote: Unicorn, which is QEMU's translator as a library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapper.codegen.compile import CompiledCode, compile_lane
from sapper.codegen.pipeline import facts_of, finish_lane, to_lane
from sapper.ir.nodes import Function
from sapper.ir.scratch import scratch_bytes
from sapper.targets import target
from sapper.tile.schedule import Schedule
from tests.lane.run_lane import argument_words, dims_of, specialize

unicorn = pytest.importorskip("unicorn", reason="the package unicorn is not installed")
arm64 = pytest.importorskip("unicorn.arm64_const")

PAGE_BYTES = 4096
CODE_AT, STACK_AT, RETURN_AT, FIRST_BUFFER_AT = 0x10_0000, 0x7000_0000, 0x20_0000_0000, 0x1000_0000
STACK_BYTES = 64 * PAGE_BYTES
GENERAL = [getattr(arm64, f"UC_ARM64_REG_X{n}") for n in range(31)]
VECTORS = [getattr(arm64, f"UC_ARM64_REG_V{n}") for n in range(32)]
SYNC_BYTES, STEPS = 1024, 997
MOST_STEPS = 20_000_000
SAVED, SAVED_VECTORS = range(19, 30), range(8, 16)


class Crash(Exception):
    """The code reached memory that is not its own, or an instruction that does not exist."""


class Core:
    """One core. memory: (address, array of bytes) that it shares with others."""

    def __init__(self, code: bytes, memory: list[tuple[int, np.ndarray]], stack_at: int = STACK_AT) -> None:
        self.uc = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self.uc.ctl_set_cpu_model(arm64.UC_CPU_ARM64_MAX)
        self._map(CODE_AT, _pages(len(code)), unicorn.UC_PROT_READ | unicorn.UC_PROT_EXEC)
        self.uc.mem_write(CODE_AT, code)
        self._map(stack_at, STACK_BYTES)
        for address, held in memory:
            self.uc.mem_map_ptr(address, held.nbytes, unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE,
                                held.ctypes.data)
        self.uc.reg_write(arm64.UC_ARM64_REG_SP, stack_at + STACK_BYTES)
        self.uc.reg_write(GENERAL[30], RETURN_AT)
        for number in SAVED:
            self.uc.reg_write(GENERAL[number], 0xC0DE_0000 + number)
        for number in SAVED_VECTORS:
            self.uc.reg_write(VECTORS[number], 0xF00D_0000 + number)
        self.uc.hook_add(unicorn.UC_HOOK_INTR, lambda *_: self.uc.reg_write(GENERAL[0], 0))  # futex: woken at once
        self.at = CODE_AT

    def _map(self, address: int, size: int, rights: int = 3) -> None:
        self.uc.mem_map(address, size, rights)

    def begin(self, *arguments: int) -> None:
        self.at = CODE_AT
        self.uc.reg_write(arm64.UC_ARM64_REG_SP, self.stack_top)
        self.uc.reg_write(GENERAL[30], RETURN_AT)
        for number, value in enumerate(arguments):
            self.uc.reg_write(GENERAL[number], value)

    @property
    def stack_top(self) -> int:
        return int(self.uc.reg_read(arm64.UC_ARM64_REG_SP))

    def step(self, count: int) -> bool:
        """Some instructions; whether the code is still on its way. Raises Crash."""
        try:
            self.uc.emu_start(self.at, RETURN_AT, count=count)
        except unicorn.UcError as error:
            raise Crash(f"{error} at {self.uc.reg_read(arm64.UC_ARM64_REG_PC) - CODE_AT:#x}") from None
        self.at = int(self.uc.reg_read(arm64.UC_ARM64_REG_PC))
        return self.at != RETURN_AT

    def kept(self) -> bool:
        """Whether what a function has to leave as it found it is so."""
        return all(self.uc.reg_read(GENERAL[n]) == 0xC0DE_0000 + n for n in SAVED) and all(
            self.uc.reg_read(VECTORS[n]) & (1 << 64) - 1 == 0xF00D_0000 + n for n in SAVED_VECTORS)


def _pages(size_bytes: int) -> int:
    return max(1, -(-size_bytes // PAGE_BYTES)) * PAGE_BYTES


class Buffers:
    """Arrays in pages of their own, with pages that nobody has between them."""

    def __init__(self) -> None:
        self.next = FIRST_BUFFER_AT
        self.memory: list[tuple[int, np.ndarray]] = []
        self.arrays: list[tuple[Any, np.ndarray]] = []

    def add(self, size_bytes: int, align_bytes: int = 1, at_end: bool = True) -> tuple[int, np.ndarray]:
        """So many bytes, next to a page that can't be reached; their address, and the bytes."""
        whole = _pages(size_bytes)
        room = np.zeros(whole + PAGE_BYTES, np.uint8)
        start = -room.ctypes.data % PAGE_BYTES
        pages = room[start:start + whole]
        pages[:] = 0xFF
        address, self.next = self.next, self.next + whole + PAGE_BYTES
        self.memory.append((address, pages))
        offset = (whole - size_bytes) // align_bytes * align_bytes if at_end else 0
        return address + offset, pages[offset:offset + size_bytes]

    def add_array(self, array: np.ndarray, at_end: bool = True) -> int:
        """The address of a copy, which `give_back` copies to the array."""
        base, low, high = array, 0, 0
        for extent, stride in zip(base.shape, base.strides, strict=True):
            reach = (extent - 1) * stride
            low, high = low + min(0, reach), high + max(0, reach)
        size = 0 if base.size == 0 else high - low + base.itemsize
        address, held = self.add(size, max(1, base.itemsize), at_end)
        if size:
            view = np.ndarray(base.shape, base.dtype, held, -low, base.strides)
            view[...] = base
            self.arrays.append((array, view))
        return address - low

    def give_back(self) -> None:
        for array, view in self.arrays:
            if array.flags.writeable:
                array[...] = view


def compile_for(function: Function, arguments: dict[str, Any], name: str = "neoverse-n1",
                hints: dict[str, int] | None = None, schedule: Schedule | None = None) -> tuple[CompiledCode, Function]:
    """Machine code for these arguments, its allocation proved by the independent checker; and its lane IR."""
    facts = target(name)
    assumed = specialize(function, arguments, hints)
    lane = finish_lane(to_lane(function, schedule or Schedule(), facts_of(facts), assumed), facts)
    return compile_lane(lane, facts, checked=True), lane


def run_emulated(function: Function, arguments: dict[str, Any], workers: int = 1, name: str = "neoverse-n1",
                 hints: dict[str, int] | None = None, schedule: Schedule | None = None,
                 at_end: bool = True) -> CompiledCode:
    """Compile for these arguments (the function is changed) and run; arrays take what was written.

    AssertionError where the code reaches beyond its buffers, does not end or does not leave registers as it found them.
    """
    made, lane = compile_for(function, arguments, name, hints, schedule)
    buffers = Buffers()
    each = max(64, scratch_bytes(lane.attributes["scratch"], dims_of(function, arguments)))
    scratch, _ = buffers.add(each * workers, 64)
    sync, held = buffers.add(SYNC_BYTES, 64)
    held[:] = 0
    slots = argument_words(function, lane.attributes["slots"], arguments,
                           lambda name: buffers.add_array(arguments[name], at_end))
    words = buffers.add_array(np.array([scratch, each, sync, *slots], np.int64))
    cores = [Core(made.bytes, buffers.memory) for _ in range(workers)]
    for number, core in enumerate(cores):
        core.begin(words, number, workers)
    running, steps = list(cores), 0
    while running:
        try:
            running = [core for core in running if core.step(STEPS if workers > 1 else MOST_STEPS)]
        except Crash as crash:
            raise AssertionError(f"{crash}\n{made.text}") from None
        steps += STEPS if workers > 1 else MOST_STEPS
        assert steps <= MOST_STEPS or not running, f"still running after {steps} instructions\n{made.text}"
    assert all(core.kept() for core in cores), f"a register that is the caller's was changed\n{made.text}"
    buffers.give_back()
    return made
