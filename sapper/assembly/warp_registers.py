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
from ..codegen.machine import Instruction, Label, LabelReference, MachineFunction, Memory, VirtualRegister
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
    body, table = assembly.body, assembly.table
    places = {item.name: place for place, item in enumerate(body) if isinstance(item, Label)}
    after: list[set[Any]] = [set() for _ in body]
    before: list[set[Any]] = [set() for _ in body]
    changed = True
    while changed:
        changed = False
        for place in range(len(body) - 1, -1, -1):
            item = body[place]
            live = set(results) if place + 1 == len(body) else set(before[place + 1])
            reads: set[Any] = set()
            writes: set[Any] = set()
            if isinstance(item, Instruction):
                opcode = item.row.row.opcode
                if opcode in table.ENDS and item.mask is None:
                    live = set()
                for operand in item.operands:
                    if isinstance(operand, LabelReference):
                        live = (live if item.mask is not None else set()) | before[places[operand.name]]
                reads, writes = _accesses(table, item)
            start = (live - writes) | reads
            if start != before[place] or live != after[place]:
                before[place], after[place], changed = start, live, True
    # A result that nobody reads still takes its register at its instruction.
    most, where = 0, None
    for place, item in enumerate(body):
        if isinstance(item, Instruction):
            written = {o for o in _registers(item) if o not in before[place]}
            count = max(_words(before[place], table), _words(after[place] | written, table))
            if count > most:
                most, where = count, item
    return most, where


def _accesses(table: Any, item: Instruction) -> tuple[set[Any], set[Any]]:
    """Registers that an instruction reads, and those that it gives a new value in every thread."""
    reads: set[Any] = {item.mask}
    writes: set[Any] = set()
    for spec, operand in zip(table.operands_of(item.row, len(item.operands)), item.operands, strict=False):
        for part in operand if isinstance(operand, tuple) else (operand,):
            if isinstance(part, Memory):
                reads.add(part.base)
            elif isinstance(part, VirtualRegister):
                if spec.reads:
                    reads.add(part)
                if spec.writes and item.mask is None:
                    writes.add(part)
    return reads - {None}, writes


def _registers(item: Instruction) -> set[Any]:
    return {part for operand in item.operands for part in (operand if isinstance(operand, tuple) else (operand,))
            if isinstance(part, VirtualRegister)}


def _words(registers: Collection[Any], table: Any) -> int:
    """Registers of 32 bits; two of 16 share one."""
    bits: int = sum(size for register in registers for kind, size in table.VIRTUAL.values()
               if kind == register.kind and size > 1)
    return -(-bits // 32)


def _limit(budget: Mapping[str, int], target: Any, location: Any) -> int:
    unknown = sorted(set(budget) - {KIND})
    if unknown:
        raise AssemblyError("registers", f"a budget for registers of kind {unknown[0]}", location, unknown[0], KIND,
                            f'budget={{"{KIND}": n}}')
    most: int = target.registers
    return min(budget.get(KIND, most), most)


def _first(body: Any) -> Any:
    return next((item.location for item in body if isinstance(item, Instruction)), None)
