"""What each instruction of a machine function reads and writes.

Enters: instructions, and the row facts of the target. Leaves: for each, the nodes that it only reads, only writes, and
reads and writes (sapper/codegen/liveness.py says what a node is). Holds: every register that a row has as an operand,
in an address or as a mask, or uses without naming it, is in one of them.
"""

from __future__ import annotations

from typing import NamedTuple

from .machine import AnyRegister, Instruction, Memory, Register, VirtualRegister
from .row_facts import CHANGE, READ, WRITE, Abi, AllocationError, RowFacts, is_idiom


class Nodes:
    """The numbers of registers: first all the physical ones that there are, the allocatable before the others, then
    virtual ones in order of first appearance.

    registers: the one of each node. node_of: the other way. kind_of: index into `kinds` of each. physical: how many
    are.
    """

    def __init__(self, abi: Abi) -> None:
        self.kinds = list(dict.fromkeys([*abi.registers, *abi.counts]))
        self._kind_index = {kind: index for index, kind in enumerate(self.kinds)}
        self.registers: list[AnyRegister] = []
        self.kind_of: list[int] = []
        self.node_of: dict[AnyRegister, int] = {}
        allocatable = {kind: list(numbers) for kind, numbers in abi.registers.items()}
        for of_kinds in (allocatable, {kind: range(count) for kind, count in abi.counts.items()}):
            for kind, numbers in of_kinds.items():
                for number in numbers:
                    if (register := Register(kind, number)) not in self.node_of:
                        self._add(register)
        self.physical = len(self.registers)

    def _add(self, register: AnyRegister) -> int:
        node = self.node_of[register] = len(self.registers)
        self.registers.append(register)
        self.kind_of.append(self._kind_index[register.kind])
        return node

    def of(self, register: AnyRegister) -> int:
        """The number of a register; a virtual one gets its number here."""
        node = self.node_of.get(register)
        if node is None:
            if type(register) is Register:
                raise AllocationError(f"found register {register}; the target has none of that name")
            if register.kind not in self._kind_index:
                raise AllocationError(f"register {register!r} is of a kind that the target lacks; "
                                      f"expected {self.kinds}")
            node = self._add(register)
        return node


class Accesses(NamedTuple):
    """Nodes that one instruction only reads, only writes, and reads and writes, in the order of its operands."""

    reads: list[int]
    writes: list[int]
    changes: list[int]


def accesses_of(item: Instruction, facts: RowFacts, nodes: Nodes) -> Accesses:
    """Raises AllocationError for operands that the row does not take."""
    found = Accesses([], [], [])
    reads, writes, changes = found
    access, operands, mask = facts.access, item.operands, item.mask
    if len(access) != len(operands):
        raise AllocationError(f"{facts.name} has {len(operands)} operands; expected {len(access)}")
    known, node_for = nodes.node_of.get, nodes.of
    # Where a write goes: under a mask, not zeroing, it keeps what the other lanes hold.
    written_to = changes if mask is not None and facts.merges and not item.zeroing else writes
    constant = facts.idiom and is_idiom(item, facts)
    for operand, how in zip(operands, access):  # noqa: B905  of equal length, as was checked
        kind_type = type(operand)
        if kind_type is VirtualRegister or kind_type is Register:
            node = known(operand)     # type: ignore[arg-type]
            if node is None:
                node = node_for(operand)    # type: ignore[arg-type]
            if how == READ:
                if not constant:
                    reads.append(node)
            elif how == WRITE:
                written_to.append(node)
            elif constant:
                writes.append(node)
            elif how == CHANGE:
                changes.append(node)
            else:
                raise AllocationError(f"{facts.name} takes no register where {operand!r} stands")
        elif kind_type is Memory:
            part: AnyRegister | None
            for part in (operand.base, operand.index):  # type: ignore[union-attr,assignment]
                if part is not None:
                    node = known(part)
                    reads.append(node_for(part) if node is None else node)
    if mask is not None:
        (reads if facts.mask_access == READ else changes).append(node_for(mask))
    for pair in facts.reads:
        node = nodes.node_of[Register(*pair)]
        if node not in reads:
            reads.append(node)
    for pair in facts.writes:
        writes.append(nodes.node_of[Register(*pair)])
    return found


def is_copy(item: Instruction, facts: RowFacts, found: Accesses) -> bool:
    """Whether it does nothing but to copy one register to another."""
    return bool(facts.move_bits) and len(found.reads) == len(found.writes) == 1 and not any(
        type(operand) is Memory for operand in item.operands[:2])
