"""What a row of an instruction table does with registers, as the machine passes need to know it.

Enters: rows, and the `Abi` of a target, both as data. Leaves: `RowFacts`, worked out once for each row.
Holds: allocator and checker share these facts, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..ir.nodes import Location
from .machine import Immediate, Instruction, Register, VirtualRegister

READ, WRITE, CHANGE = 1, 2, 3
"""How a row uses one operand: reads it, writes it, or reads and writes it (two-address)."""

NEXT, JUMP, BRANCH, RETURN = 0, 1, 2, 3
"""Where a row goes: on, to its label, either, or out of the function."""


class AllocationError(Exception):
    """A register cannot be found, or the code given is not sound (a register read before it is written).

    location: the source line where too many are wanted, where it is known.
    """

    def __init__(self, message: str, location: Location | None = None) -> None:
        super().__init__(message)
        self.location = location


class RowFacts:
    """What the machine passes need to know about one row of an instruction table.

    access: one of 0 (no register), READ, WRITE, CHANGE for each operand. bits: the width of each operand, 0 where
    it has none. reads, writes: physical registers that the row uses without naming them, as (kind, number).
    mask_access: how the opmask register is used. merges: a write under a mask, not zeroing, keeps the other lanes,
    so the operand is read as well. idiom: the result does not depend on the registers when all are the same one
    (and the last immediate, if `idiom_immediate` is not None, is that). move_bits: this row copies that many low bits
    of operand 1 to operand 0, 0 if it is no copy. side_effects: must not be removed, repeated or moved. only_writes:
    it does nothing but to write operand 0, by what its operands are.
    """

    __slots__ = (
        "access",
        "bits",
        "flow",
        "idiom",
        "idiom_immediate",
        "mask_access",
        "merges",
        "move_bits",
        "name",
        "only_writes",
        "reads",
        "reads_flags",
        "side_effects",
        "writes",
        "writes_flags",
    )

    def __init__(
        self,
        name: str,
        access: tuple[int, ...],
        bits: tuple[int, ...],
        reads: tuple[tuple[str, int], ...],
        writes: tuple[tuple[str, int], ...],
        flow: int,
        reads_flags: bool,
        writes_flags: bool,
        mask_access: int,
        merges: bool,
        idiom: bool,
        idiom_immediate: int | None,
        move_bits: int,
        side_effects: bool,
    ) -> None:
        self.name = name
        self.access = access
        self.bits = bits
        self.reads = reads
        self.writes = writes
        self.flow = flow
        self.reads_flags = reads_flags
        self.writes_flags = writes_flags
        self.mask_access = mask_access
        self.merges = merges
        self.idiom = idiom
        self.idiom_immediate = idiom_immediate
        self.move_bits = move_bits
        self.side_effects = side_effects
        self.only_writes = flow == NEXT and bool(access) and access[0] & WRITE != 0 and not (
            reads or writes or reads_flags or writes_flags or side_effects)


class Abi(Protocol):
    """Register facts of a target, and the rows that the allocator and the frame add by themselves.

    registers: the allocatable numbers of each kind, the ones to prefer first. never_spilled: kinds that have no rows to
    and from the frame. counts: how many registers of each kind
    there are, allocatable or not. full_bits: the widest register of each kind. stack_pointer, frame_scratch: (kind,
    number); frame_scratch is free on entry and at a return. entry_bytes: how far the stack pointer is below a multiple
    of 16 on entry. push_bytes: what one push takes off it. issue: how many instructions enter in a cycle, and how many
    may wait for what they read while others go on.
    move_bits: names of rows that copy so many low bits of register operand 1 to register operand 0, zero the rest and
    do nothing else. idioms: names of rows whose result is a constant when all registers are the same, with the last
    immediate needed for it or None. facts_table: made by the passes, for them to keep here; None at first.
    """

    registers: Mapping[str, Sequence[int]]
    never_spilled: Sequence[str]
    counts: Mapping[str, int]
    full_bits: Mapping[str, int]
    callee_saved: Sequence[tuple[str, int]]
    stack_pointer: tuple[str, int]
    frame_scratch: tuple[str, int]
    entry_bytes: int
    push_bytes: int
    issue: tuple[int, int]
    move_bits: Mapping[str, int]
    idioms: Mapping[str, int | None]
    facts_table: Any

    def spill_row(self, kind: str, bits: int) -> Any:
        """A row [memory, register read] that touches no flags."""
        ...

    def reload_row(self, kind: str, bits: int) -> Any:
        """A row [register written, memory] that touches no flags."""
        ...

    def copy_row(self, row: Any) -> Any:
        """The row that copies from register to register what `row`, one of the two above, moves."""
        ...

    def memory_bits(self, row: Any) -> tuple[int, ...]:
        """For each operand of a row its width in memory, 0 where none of the target's encodings takes memory."""
        ...

    def frame_bytes(self, size_bytes: int) -> int:
        """What is taken off the stack pointer where so many bytes are wanted: no less."""
        ...

    def frame_row(self, what: str, kind: str = "gpr") -> Any:
        """push, pop (one register of the kind); subtract, and (register, immediate); move, load, store; vzeroupper, or
        None where there is none."""
        ...


_ROLES = {"r": READ, "w": WRITE, "rw": CHANGE}
_CONTROL = {"": NEXT, "call": NEXT, "trap": NEXT, "jump": JUMP, "branch": BRANCH, "return": RETURN}


class FactsTable(dict[Any, RowFacts]):
    """Row -> RowFacts, worked out when first asked for."""

    __slots__ = ("abi",)

    def __init__(self, abi: Abi) -> None:
        super().__init__()
        self.abi = abi

    def __missing__(self, row: Any) -> RowFacts:
        operands = row.operands
        facts = self[row] = RowFacts(
            row.name,
            tuple(_ROLES.get(o.role, 0) for o in operands),
            tuple(o.bits if o.kind in ("gpr", "fpr", "vec", "mask", "tile") else o.index_bits for o in operands),
            tuple(row.implicit_reads),
            tuple(row.implicit_writes),
            _CONTROL[row.control],
            row.flags_read != "",
            row.flags_written != "",
            CHANGE if row.mask_role == "rw" else READ,
            bool(operands) and operands[0].kind == "vec" and not row.blend,
            row.name in self.abi.idioms,
            self.abi.idioms.get(row.name),
            self.abi.move_bits.get(row.name, 0),
            row.side_effects,
        )
        return facts


def facts_table(abi: Abi) -> FactsTable:
    """The table of row facts that belongs to `abi`."""
    table = abi.facts_table
    if table is None:
        table = abi.facts_table = FactsTable(abi)
    return table  # type: ignore[no-any-return]


def is_idiom(instruction: Instruction, facts: RowFacts) -> bool:
    """The instruction makes a constant (zero, all ones) whatever its registers hold, since all are the same."""
    if not facts.idiom or instruction.mask is not None:
        return False
    first = None
    last_immediate = None
    for operand in instruction.operands:
        kind = type(operand)
        if kind is Register or kind is VirtualRegister:
            if first is None:
                first = operand
            elif operand != first:
                return False
        elif kind is Immediate:
            if facts.idiom_immediate is None:
                return False  # sub r, 1 has one register only
            last_immediate = operand.value  # type: ignore[union-attr]
        else:
            return False
    return facts.idiom_immediate is None or last_immediate == facts.idiom_immediate
