"""A piece of assembly by hand becomes code: checked, allocated, framed, encoded.

Enters: an `Assembly` and a target. Leaves: `Finished`. Holds: the allocation is proved by codegen/check.py; what the
author pinned is that register; with `no_spill` no instruction is added but prologue and epilogue; the same assembly
and target give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..codegen.check import check as check_allocation
from ..codegen.encode import EncodedCode, EncodeError, encode, encode_instruction
from ..codegen.frame import finish_frame
from ..codegen.machine import Label, MachineFunction
from ..codegen.schedule import schedule as order_instructions
from .build import Assembly
from .effects import compare
from .errors import AssemblyError
from .registers import Limited, allocated, first_line
from .static import check_static


@dataclass(slots=True)
class Finished:
    """machine: after allocation. encoded: its code. pressure: most registers wanted of each kind.

    spills: instructions that store or load a spilled register.
    """

    machine: MachineFunction
    encoded: EncodedCode
    pressure: dict[str, int]
    spills: int
    frame_bytes: int

    @property
    def code(self) -> bytes:
        return self.encoded.code


def finish(assembly: Assembly, target: Any, no_spill: bool = False, budget: dict[str, int] | None = None,
           reorder: bool = False) -> Finished:
    """Code for a target.

    no_spill: registers must suffice. budget: most registers of a kind ("gpr", "vec", "mask") to take. reorder: let the
    scheduler choose the order inside straight stretches; else it stays the author's.
    Raises AssemblyError, at the author's line, for all that sapper/assembly/static.py checks, and for registers that
    do not suffice.
    """
    check_static(assembly, target)
    if assembly.declared is not None:
        compare(assembly, target, **assembly.declared)
    machine = assembly.machine()
    file = assembly.table.register_file(target)
    registers: Any = Limited(file, budget, first_line(machine)) if budget else file
    if assembly.naked:
        _legal(machine, target)
        encoded = encode(machine, target.features)
        return Finished(machine, encoded, {}, 0, 0)
    if reorder:
        order_instructions(machine, registers)
    allocation = allocated(machine, file, no_spill, budget or {})
    done = allocation.function
    finish_frame(done, registers, allocation.origin)
    check_allocation(machine, done, allocation.origin, registers)
    _legal(done, target)
    encoded = encode(done, target.features)
    return Finished(done, encoded, allocation.max_pressure, allocation.spills + allocation.reloads, done.frame_bytes)


def _legal(machine: MachineFunction, target: Any) -> None:
    """Encode each instruction by itself, so that what has no encoding is reported at its line."""
    features = frozenset(target.features)
    for item in machine.body:
        if isinstance(item, Label) or item.row.control in ("jump", "branch", "call"):
            continue
        try:
            encode_instruction(item, features)
        except EncodeError as error:
            raise AssemblyError("operands", f"{item.row.mnemonic} has no encoding", item.location,
                                found=str(error)) from None
