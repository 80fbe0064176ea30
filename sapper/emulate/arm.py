"""AArch64 machine code on an emulator that others wrote: Unicorn, which is QEMU's translator as a library.

Enters: code as docs/ir.md says that it is called, and arguments. Leaves: arrays as the code left them. Holds: buffers
lie as laid_out.py says, so an access beyond one is a fault, of which it is said where; what a function has to leave as
it found it (Procedure Call Standard, IHI 0055, 6.1) is compared. What Unicorn lacks is computed by the meanings of
rows (arm_rows.py). Needs the extra `arm`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from ..runtime.arguments import Binding, Signature
from ..runtime.compiled import CompiledKernel
from ..targets.aarch64.abi import CALLEE_SAVED, CALLEE_SAVED_VECTORS
from ..targets.aarch64.registers import LINK
from .arm_rows import compute
from .errors import DeadlockError, EmulationError, MemoryFault
from .laid_out import LOW, PAGE_BYTES, WordsOf, bound, whole_pages, with_arguments

CODE_AT, STACK_AT, RETURN_AT = 0x10_0000, 0x70_0000_0000, 0x7F_0000_0000
STACK_BYTES = 64 * PAGE_BYTES
STEPS, MOST_STEPS = 997, 50_000_000
"""Instructions that a core runs before the next one's turn, and that all of a call may take."""
UNDEFINED = 1
"""The exception, as QEMU numbers them, that an instruction is none."""


class Core:
    """One core. memory: (address, array of whole pages) that it shares with others. Raises ModuleNotFoundError without
    the package `unicorn`."""

    def __init__(self, code: bytes, memory: Sequence[tuple[int, Any]] = ()) -> None:
        unicorn: Any = import_module("unicorn")     # its types say nothing
        names: Any = import_module("unicorn.arm64_const")
        self.names = names
        self.general = [getattr(names, f"UC_ARM64_REG_X{number}") for number in range(31)]
        self.vectors = [getattr(names, f"UC_ARM64_REG_V{number}") for number in range(32)]
        self.fault: type[Exception] = unicorn.UcError
        self.uc = uc = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        uc.ctl_set_cpu_model(names.UC_CPU_ARM64_MAX)
        uc.mem_map(CODE_AT, whole_pages(len(code)), unicorn.UC_PROT_READ | unicorn.UC_PROT_EXEC)
        uc.mem_write(CODE_AT, code)
        uc.mem_map(STACK_AT, STACK_BYTES, unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE)
        for address, held in memory:
            uc.mem_map_ptr(address, held.nbytes, unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE, held.ctypes.data)
        uc.hook_add(unicorn.UC_HOOK_INTR, lambda _, number, __: self._except(number))
        self.lost = False
        self.at = CODE_AT

    def _except(self, number: int) -> None:
        """The only call of the system is futex: who waits is woken at once, and looks again. Else the instruction is
        none that Unicorn has."""
        if number != UNDEFINED:
            self.uc.reg_write(self.general[0], 0)
            return
        at, uc = self.uc.reg_read(self.names.UC_ARM64_REG_PC), self.uc
        word = int.from_bytes(uc.mem_read(at, 4), "little")
        if compute(word, lambda number: int(uc.reg_read(self.vectors[number])),
                   lambda number, value: uc.reg_write(self.vectors[number], value)):
            uc.reg_write(self.names.UC_ARM64_REG_PC, at + 4)
        else:
            self.lost = True
            uc.emu_stop()

    def begin(self, *arguments: int) -> None:
        """Stand before the first instruction, as a caller leaves registers."""
        self.at = CODE_AT
        self.uc.reg_write(self.names.UC_ARM64_REG_SP, STACK_AT + STACK_BYTES)
        self.uc.reg_write(self.general[LINK], RETURN_AT)
        for kept, number, mark in self._kept():
            self.uc.reg_write(kept[number], mark)
        for number, value in enumerate(arguments):
            self.uc.reg_write(self.general[number], value & LOW)

    def step(self, count: int) -> bool:
        """Some instructions; whether the code is still on its way. Raises MemoryFault, EmulationError."""
        wrong: Exception | str = ""
        try:
            self.uc.emu_start(self.at, RETURN_AT, count=count)
        except self.fault as error:
            wrong = error
        if wrong or self.lost:
            place = self.uc.reg_read(self.names.UC_ARM64_REG_PC) - CODE_AT
            raise MemoryFault(f"{wrong or 'undefined'}: found an access beyond a buffer, or no instruction, at byte "
                              f"{place:#x} of the code; expected neither")
        self.at = int(self.uc.reg_read(self.names.UC_ARM64_REG_PC))
        if self.at != RETURN_AT:
            return True
        for kept, number, mark in self._kept():
            if self.uc.reg_read(kept[number]) & LOW != mark:
                name = f"{'x' if kept is self.general else 'd'}{number}"
                raise EmulationError(f"found {name} changed at the return; expected what the caller had there")
        if self.uc.reg_read(self.names.UC_ARM64_REG_SP) != STACK_AT + STACK_BYTES:
            raise EmulationError("found the stack pointer changed at the return; expected it as it was")
        return False

    def _kept(self) -> list[tuple[list[int], int, int]]:
        """Registers that are the caller's, and what they hold."""
        return [*((self.general, n, 0xC0DE_0000 + n) for n in (*CALLEE_SAVED, 29)),
                *((self.vectors, n, 0xF00D_0000 + n) for n in CALLEE_SAVED_VECTORS)]


def run_code(code: bytes, words_of: WordsOf, scratch: int, workers: int = 1, at_end: bool = True) -> None:
    """Run a kernel's code. words_of, scratch: see laid_out.py. Raises EmulationError and its kin, ModuleNotFoundError
    without `unicorn`."""
    buffers, words = with_arguments(words_of, scratch, workers, at_end)
    cores = [Core(code, buffers.memory) for _ in range(workers)]
    for number, core in enumerate(cores):
        core.begin(words, number, workers)
    running, steps = cores, 0
    turn = STEPS if workers > 1 else MOST_STEPS
    while running:
        if steps >= MOST_STEPS:
            raise DeadlockError(f"found {len(running)} of {workers} workers still running after {steps} instructions "
                                "each; expected them to return")
        running = [core for core in running if core.step(turn)]
        steps += turn
    buffers.give_back()


def run_compiled(compiled: CompiledKernel, signature: Signature, binding: Binding, arguments: Mapping[str, Any],
                 workers: int = 1) -> None:
    """Run a compiled kernel on bound arguments, by name; arrays take what it wrote. Raises as `run_code`."""
    words_of, scratch = bound(compiled, signature, binding, arguments)
    run_code(compiled.code, words_of, scratch, workers if compiled.counters else 1)
