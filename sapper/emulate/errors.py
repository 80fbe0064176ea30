"""What can go wrong in emulated PTX. Every message says where (line of the text, block, warp, lane), what was found,
and what was expected."""

from __future__ import annotations


class EmulationError(RuntimeError):
    """A fault of the PTX text or of the run. line: of the PTX text, or 0."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(f"line {line}: {message}" if line else message)
        self.line = line


class ParseError(EmulationError):
    """Text that is not PTX as far as the emulator knows it."""


class MemoryFault(EmulationError):
    """An access outside of memory, misaligned, or of bytes that nobody wrote."""


class RaceError(EmulationError):
    """Two accesses to one byte that nothing orders, or an asynchronous access that nothing waited for."""


class DeadlockError(EmulationError):
    """Nobody can go on."""


class ConvergenceError(EmulationError):
    """An instruction for whole warps was reached by a part of one."""
