"""What register allocation and the frame need to know about AArch64, as data.

Leaves: `register_file()`. Holds: rows named here touch no flags. Sources: Procedure Call Standard (IHI 0055) 6.1; Arm
Architecture Reference Manual DDI 0487, C7.2 (a scalar load zeroes the rest of its register).
"""

from __future__ import annotations

from functools import cache
from typing import Any

from . import abi
from .instructions import ROWS
from .registers import COUNTS

_MOVE_BITS = {"mov.64": 64, "ldr.64": 64, "str.64": 64, "mov.16b": 128, "ldr.q": 128, "str.q": 128}
_SPILLS = {"gpr": "str.64", "vec": "str.q"}
_RELOADS = {"gpr": "ldr.64", "vec": "ldr.q"}
_COPIES = {"ldr.64": "mov.64", "str.64": "mov.64", "ldr.q": "mov.16b", "str.q": "mov.16b"}
_FRAME_ROWS = {"subtract": "sub.stack", "add": "add.stack", "and": "and.imm.64", "move": "mov.64", "load": "ldr.64",
               "store": "str.64"}
_SHORT_FRAME_BYTES, _STEP_BYTES = 4096, 4096
"""What an immediate takes off the stack pointer: less than the first, or multiples of the second."""


class RegisterFile:
    """See `Abi` in sapper/codegen/row_facts.py, which this satisfies."""

    def __init__(self) -> None:
        self.registers = {"gpr": abi.ALLOCATABLE, "vec": abi.VECTOR_ALLOCATABLE}
        self.never_spilled = ()
        self.counts = COUNTS
        self.full_bits = {"gpr": 64, "vec": 128}
        self.callee_saved = (*(("gpr", n) for n in abi.CALLEE_SAVED), *(("vec", n) for n in abi.CALLEE_SAVED_VECTORS))
        self.stack_pointer = ("gpr", abi.STACK_POINTER)
        self.frame_scratch = ("gpr", abi.SCRATCH)
        self.entry_bytes, self.push_bytes = 0, abi.STACK_ALIGN_BYTES
        self.issue = (6, 48)
        self.move_bits = _MOVE_BITS
        self.idioms: dict[str, int | None] = {}
        self.facts_table: Any = None

    def spill_row(self, kind: str, bits: int) -> Any:
        """A row [memory, register]."""
        del bits    # all of a register
        return ROWS[_SPILLS[kind]]

    def reload_row(self, kind: str, bits: int) -> Any:
        """A row [register, memory]."""
        del bits
        return ROWS[_RELOADS[kind]]

    def copy_row(self, row: Any) -> Any:
        """The row that copies what such a row moves."""
        return ROWS[_COPIES[row.name]]

    def memory_bits(self, row: Any) -> tuple[int, ...]:
        """No row takes memory in place of a register."""
        return (0,) * len(row.operands)

    def frame_bytes(self, size_bytes: int) -> int:
        """What the frame takes so that one instruction makes room for `size_bytes`."""
        return size_bytes if size_bytes < _SHORT_FRAME_BYTES else -(-size_bytes // _STEP_BYTES) * _STEP_BYTES

    def frame_row(self, what: str, kind: str = "gpr") -> Any:
        """The row for push, pop (of a kind), subtract, add, and, move, load or store; None for vzeroupper."""
        if what in ("push", "pop"):
            return ROWS[f"{what}.{kind}"]
        return ROWS.get(_FRAME_ROWS.get(what, ""))


@cache
def register_file() -> RegisterFile:
    """The register facts, which all targets of the family share."""
    return RegisterFile()
