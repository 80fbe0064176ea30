"""Whether the registers suffice that a piece by hand asks for: its budget, and `no_spill`.

Enters: an assembly before allocation, or the code round a piece after it. Leaves: nothing, or AssemblyError
("registers") at the author's line. Holds: a budget counts what the piece itself wants at once, inputs and results
included; `no_spill` means that nothing of the piece lies in memory, whatever stands round it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..codegen.allocate import Allocation, allocate
from ..codegen.machine import Instruction, MachineFunction, Memory, Register
from ..codegen.row_facts import AllocationError
from .build import Assembly
from .errors import AssemblyError
from .notation import Mem, Reg

ZEROS_BYTES = 64
"""Of what stands for the inputs of a piece by itself."""


class Limited:
    """A register file with fewer registers of some kinds: the first ones, as many as the budget says.

    Raises AssemblyError for a kind that there is not.
    """

    def __init__(self, file: Any, budget: Mapping[str, int], location: Any = None) -> None:
        unknown = sorted(set(budget) - set(file.registers))
        if unknown:
            raise AssemblyError("registers", f"a budget for registers of kind {unknown[0]}", location, unknown[0],
                                ", ".join(file.registers), "name a kind of register")
        self._file = file
        self.registers = {kind: tuple(numbers)[:budget.get(kind, len(numbers))]
                          for kind, numbers in file.registers.items()}
        self.facts_table: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def allocated(machine: MachineFunction, file: Any, no_spill: bool, budget: Mapping[str, int]) -> Allocation:
    """The allocation with a budget. Raises AssemblyError at the line where most registers are wanted."""
    location = first_line(machine)
    registers: Any = Limited(file, budget, location) if budget else file
    try:
        made = allocate(machine, registers, no_spill=no_spill)
    except AllocationError as error:
        limits = ", ".join(f"{len(numbers)} {kind}" for kind, numbers in registers.registers.items())
        raise AssemblyError("registers", f"{machine.name}: the registers do not suffice", error.location or location,
                            str(error), f"at most {limits}", "hold fewer values at once, or allow spills") from None
    return made


def check_alone(assembly: Assembly, target: Any, inputs: Iterable[Reg], results: Iterable[Reg], no_spill: bool,
                budget: Mapping[str, int]) -> None:
    """Raise AssemblyError where a piece by itself wants more registers than its budget, or than there are. It gets
    loads of its inputs before it, and moves that read its results behind it."""
    if not no_spill and not budget:
        return
    table, where = assembly.table, first_line(assembly.machine())
    own, assembly.body = assembly.body, []
    zeros = Mem(assembly.constant(bytes(ZEROS_BYTES)))
    for reg in inputs:
        assembly.emit(table.LOADS[reg.kind], (reg, zeros), location=where)
    assembly.body += own
    for reg in results:
        assembly.emit(table.MOVE, (reg, reg), location=where)
    assembly.emit(table.RETURN, (), location=where)
    # A budget is kept without memory: with it, anything would do.
    allocated(assembly.machine(), assembly.table.register_file(target), True, budget)


def check_kept(machine: MachineFunction, name: str, stack: Register) -> None:
    """Raise AssemblyError where the allocator put something of the piece called `name` into memory.

    machine: after allocation; instructions of the piece have its name as comment, and those that the allocator adds
    beside an instruction have its line. stack: the stack pointer, through which no piece reaches memory itself.
    """
    own = [item for item in machine.body if isinstance(item, Instruction) and item.comment == name]
    lines = {item.location for item in own}
    added = [item for item in machine.body if isinstance(item, Instruction) and item.comment in ("spill", "reload")
             and item.location in lines]
    folded = [item for item in own if any(isinstance(o, Memory) and o.base == stack for o in item.operands)]
    for item in (*added, *folded):
        what = f"a {item.comment} of a register of it" if item.comment != name else "an operand in the frame"
        raise AssemblyError("registers", f"{name}: the registers do not suffice in {machine.name}", item.location, what,
                            "all of its values in registers (no_spill)",
                            "a smaller tile, or fewer values held round it; or allow spills")


def first_line(machine: MachineFunction) -> Any:
    """The first line that its author wrote."""
    return next((item.location for item in machine.body if isinstance(item, Instruction)), None)
