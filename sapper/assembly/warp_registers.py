"""Registers of assembly by hand that the target's assembler gives: how many are wanted, and whether a promise holds.

Enters: an assembly over virtual registers, or machine IR as it goes to the assembler; a budget `{"registers": n}`, in
registers of 32 bits of a thread; `no_spill`. Leaves: nothing, or AssemblyError ("registers") at the author's line.
Holds: `wanted` counts what is alive at once in the order written: 64-bit registers count as two, predicates as none.
The assembler may choose another order, so that where it is at hand its word counts: the budget goes into the text, and
what it then spills is an error if nothing may be spilled. Where it is not, the count must then be within the budget, or
what a thread has. Of a block by itself the count alone is held against the budget.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..codegen.compile import text_of
from ..codegen.lives import lives
from ..codegen.machine import Instruction, MachineFunction
from ..codegen.outline import assembled
from .errors import AssemblyError

KIND = "registers"


def check_wanted(assembly: Any, target: Any, results: Collection[Any], budget: Mapping[str, int]) -> None:
    """Raise AssemblyError where an assembly by itself wants more at once than its budget."""
    most = _limit(budget, target, _first(assembly.body))
    count, item = wanted(assembly, results)
    if count > most:
        raise AssemblyError("registers", f"{assembly.name}: the registers do not suffice",
                            getattr(item, "location", None), f"{count} registers of 32 bits are wanted at once",
                            f"at most {most}")


def check_kernel(assembly: Any, machine: MachineFunction, target: Any, no_spill: bool,
                 budget: Mapping[str, int]) -> None:
    """Raise AssemblyError where a kernel by hand can't keep its promises. The budget is written into `machine`, so that
    whoever assembles its text keeps to it."""
    if not no_spill and not budget:
        return
    limit = _limit(budget, target, _first(machine.body))
    if budget:
        machine.most_registers = limit
    if not check_assembled(machine, target, machine.name, no_spill, limit) and no_spill:
        check_wanted(assembly, target, (), budget)


def check_assembled(machine: MachineFunction, target: Any, name: str, no_spill: bool, most: int) -> bool:
    """Raise AssemblyError where the target's assembler takes more registers, or spills though it must not, in a
    function with the piece called `name`. Whether that assembler is at hand and could be asked."""
    made = assembled(text_of(machine, target), target)
    if "missing" in made:
        return False
    own = (i.location for i in machine.body if isinstance(i, Instruction) and i.comment == name)
    if made["registers"] > most or (no_spill and made["spilled_bytes"]):
        raise AssemblyError("registers", f"{name}: the registers do not suffice", next(own, _first(machine.body)),
                            f"{made['registers']} registers and {made['spilled_bytes']} bytes spilled, by "
                            f"{made['assembler']}", f"at most {most} registers{', none spilled' * no_spill}")
    return True


def wanted(assembly: Any, results: Collection[Any] = ()) -> tuple[int, Any]:
    """(most registers of 32 bits that are alive at once, the instruction there). results: alive at the end."""
    words = lives(assembly.body, assembly.table, results).words
    most = max(words, default=0)
    return most, assembly.body[words.index(most)] if most else None


def _limit(budget: Mapping[str, int], target: Any, location: Any) -> int:
    unknown = sorted(set(budget) - {KIND})
    if unknown:
        raise AssemblyError("registers", f"a budget for registers of kind {unknown[0]}", location, unknown[0], KIND,
                            f'budget={{"{KIND}": n}}')
    most: int = target.registers
    return min(budget.get(KIND, most), most)


def _first(body: Any) -> Any:
    return next((item.location for item in body if isinstance(item, Instruction)), None)
