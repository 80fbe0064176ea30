"""What register allocation and the frame need to know about RISC-V, as data.

Leaves: `register_file(VLEN)`. Sources: RISC-V ELF psABI; RISC-V Instruction Set Manual, Volume I, 30.7.9 (whole
registers to and from memory).
"""

from __future__ import annotations

from functools import cache
from typing import Any

from . import abi
from .instructions import table
from .registers import COUNTS

_SPILLS = {"gpr": "sd", "fpr": "fsd", "vec": "vs1r.v"}
_RELOADS = {"gpr": "ld", "fpr": "fld", "vec": "vl1re8.v"}
_COPIES = {"ld": "mv", "sd": "mv", "fld": "fmv.d", "fsd": "fmv.d", "vl1re8.v": "vmv1r.v", "vs1r.v": "vmv1r.v"}
_FRAME_ROWS = {"subtract": "sub.stack", "add": "add.stack", "and": "and.stack", "move": "mv", "load": "ld",
               "store": "sd"}
_ISSUE = (2, 1)
"""Two enter in a cycle, and who waits has the others behind it wait: as of the X60 (costs.py)."""


class RegisterFile:
    """See `Abi` in sapper/codegen/row_facts.py, which this satisfies."""

    def __init__(self, vector_bits: int) -> None:
        self.rows = table(vector_bits)
        self.registers = {"gpr": abi.ALLOCATABLE, "vec": abi.VECTOR_ALLOCATABLE, "fpr": abi.FLOAT_ALLOCATABLE}
        self.never_spilled = ()
        self.counts = COUNTS
        self.full_bits = {"gpr": 64, "fpr": 64, "vec": vector_bits}
        self.callee_saved = (*(("gpr", n) for n in abi.CALLEE_SAVED), *(("fpr", n) for n in abi.CALLEE_SAVED_FLOATS))
        self.stack_pointer = ("gpr", abi.STACK_POINTER)
        self.frame_scratch = ("gpr", abi.FRAME_SCRATCH)
        self.entry_bytes, self.push_bytes = 0, abi.STACK_ALIGN_BYTES
        self.issue = _ISSUE
        self.move_bits = {name: vector_bits if name[0] == "v" else 64 for name in (*_COPIES, *_COPIES.values())}
        self.idioms: dict[str, int | None] = {}
        self.facts_table: Any = None

    def spill_row(self, kind: str, bits: int) -> Any:
        """A row [memory, register]."""
        del bits    # all of a register
        return self.rows[_SPILLS[kind]]

    def reload_row(self, kind: str, bits: int) -> Any:
        """A row [register, memory]."""
        del bits
        return self.rows[_RELOADS[kind]]

    def copy_row(self, row: Any) -> Any:
        """The row that copies what such a row moves."""
        return self.rows[_COPIES[row.name]]

    def memory_bits(self, row: Any) -> tuple[int, ...]:
        """No row takes memory in place of a register."""
        return (0,) * len(row.operands)

    def frame_bytes(self, size_bytes: int) -> int:
        """What the frame takes: as much as is wanted."""
        return size_bytes

    def frame_row(self, what: str, kind: str = "gpr") -> Any:
        """The row for push, pop (of a kind), subtract, add, and, move, load or store; None for vzeroupper."""
        if what in ("push", "pop"):
            return self.rows[f"{what}.{kind}"]
        name = _FRAME_ROWS.get(what)
        return None if name is None else self.rows[name]


@cache
def register_file(vector_bits: int) -> RegisterFile:
    """The register facts of all targets whose vector registers have so many bits."""
    return RegisterFile(vector_bits)
