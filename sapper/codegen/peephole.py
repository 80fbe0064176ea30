"""Small rules on allocated code.

Enters: a machine function after allocation, with or without its frame. Leaves: the same function, shorter; and how
often each rule applied. Holds: a rule looks at neighbours within a basic block (and at labels), and does not change
what any register, flag or memory byte outside the frame holds where it is read.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

from .machine import Instruction, Label, LabelReference, MachineFunction, Memory, Register
from .row_facts import JUMP, RETURN, WRITE, Abi, FactsTable, facts_table


def peephole(function: MachineFunction, abi: Abi) -> dict[str, int]:
    """Apply all rules in place. Returns rule name -> number of times.

    One pass is enough: none makes work for itself or for one before it.
    """
    table = facts_table(abi)
    return {name: rule(function, abi, table) for name, rule in RULES}


def _drop(function: MachineFunction, places: list[int]) -> int:
    gone = set(places)
    if gone:
        function.body = [item for place, item in enumerate(function.body) if place not in gone]
    return len(gone)


def _move_to_itself(function: MachineFunction, abi: Abi, table: FactsTable) -> int:
    """A copy of a whole register to itself does nothing. (A narrower one sets the rest to zero.)"""
    return _drop(
        function,
        [
            place
            for place, item in enumerate(function.body)
            if type(item) is Instruction
            and len(item.operands) == 2
            and type(item.operands[0]) is Register
            and item.operands[0] == item.operands[1]
            and item.mask is None
            and (bits := table[item.row].move_bits)
            and bits >= abi.full_bits[item.operands[0].kind]
        ],
    )


_NEVER_ON = (JUMP, RETURN)


def _unreachable(function: MachineFunction, abi: Abi, table: FactsTable) -> int:
    """What follows a jump or a return, up to the next label, never runs."""
    places = []
    dead = False
    for place, item in enumerate(function.body):
        if type(item) is Label:
            dead = False
        elif dead:
            places.append(place)
        elif table[item.row].flow in _NEVER_ON:  # type: ignore[union-attr]
            dead = True
    return _drop(function, places)


def _jump_to_next(function: MachineFunction, abi: Abi, table: FactsTable) -> int:
    """A jump, conditional or not, to a label with no other instruction in between goes where the code goes anyway."""
    places = []
    behind: set[str] = set()  # the labels right behind, but for jumps that go
    for place in range(len(function.body) - 1, -1, -1):
        item = function.body[place]
        if type(item) is Label:
            behind.add(item.name)
        elif behind and type(item) is Instruction:
            target = next((o.name for o in item.operands if type(o) is LabelReference), None)
            if target in behind and table[item.row].flow:
                places.append(place)
            else:
                behind.clear()
    return _drop(function, places)


def _slot(operand: object, stack: Register) -> int | None:
    """The offset of a slot of the frame, or None."""
    if type(operand) is not Memory:
        return None
    base = operand.base
    if base is None or base.number != stack.number or base.kind != stack.kind:
        return None
    return operand.disp if operand.index is None and not operand.broadcast else None


def _known_reload(function: MachineFunction, abi: Abi, table: FactsTable) -> int:
    """A load from a slot whose value is still in a register: in the same one, nothing is to do; else a copy."""
    if not function.frame_bytes:
        return 0
    stack = Register(*abi.stack_pointer)
    known: dict[int, tuple[Register, object]] = {}  # slot -> the register with its value, and what copies so much
    slots_of: dict[Register, set[int]] = {}  # register -> the slots whose value it may hold: those of `known`, and more
    places: list[int] = []
    count = 0

    def learn(slot: int, register: Register, row: object) -> None:
        known[slot] = (register, row)
        slots_of.setdefault(register, set()).add(slot)

    for place, item in enumerate(function.body):
        if type(item) is not Instruction:
            known.clear()
            continue
        facts = table[item.row]
        operands = item.operands
        loaded: tuple[int, Register] | None = None
        if facts.move_bits and item.mask is None and len(operands) == 2:
            target, source = operands
            stored = _slot(target, stack)
            if stored is not None and type(source) is Register:
                for slot in [slot for slot in known if -64 < slot - stored < 64]:
                    del known[slot]
                learn(stored, source, abi.copy_row(item.row))
                continue
            offset = _slot(source, stack)
            if offset is not None and type(target) is Register and target != stack:
                holder = known.get(offset)
                if holder is not None and holder[1] is abi.copy_row(item.row):
                    count += 1
                    if holder[0] == target:
                        places.append(place)
                        continue
                    operands[1] = holder[0]
                    item.row = holder[1]
                loaded = (offset, target)
        if known:
            written: list[Any] = [o for o, how in zip(operands, facts.access, strict=True) if how & WRITE]
            if facts.writes:
                written += [Register(*pair) for pair in facts.writes]
            if item.mask is not None and facts.mask_access & WRITE:
                written.append(item.mask)
            for changed in written:
                if type(changed) is Memory:
                    if _slot(changed, stack) is not None:
                        known.clear()
                elif changed == stack:
                    known.clear()
                else:
                    for slot in slots_of.pop(changed, ()):
                        if slot in known and known[slot][0] == changed:
                            del known[slot]
        if loaded is not None and loaded[0] not in known:
            learn(*loaded, abi.copy_row(item.row))
    _drop(function, places)
    return count


def _dead_spill(function: MachineFunction, abi: Abi, table: FactsTable) -> int:
    """A store to a slot that no instruction reads."""
    if not function.frame_bytes:
        return 0
    stack = Register(*abi.stack_pointer)
    read: set[int] = set()
    stores: list[tuple[int, int, int]] = []  # place, first byte, end
    for place, item in enumerate(function.body):
        if type(item) is not Instruction:
            continue
        for position, operand in enumerate(item.operands):
            if type(operand) is not Memory or operand.base != stack:
                continue
            facts = table[item.row]
            if facts.access[position] != WRITE:
                read.add(operand.disp)
            elif facts.move_bits and type(item.operands[1]) is Register and _slot(operand, stack) is not None:
                stores.append((place, operand.disp, operand.disp + facts.move_bits // 8))
    first_bytes = sorted(read)
    return _drop(function, [place for place, first, end in stores if not _any_within(first_bytes, first - 63, end)])


def _any_within(numbers: list[int], low: int, high: int) -> bool:
    """Whether one of the sorted numbers is at least low and below high."""
    position = bisect_left(numbers, low)
    return position < len(numbers) and numbers[position] < high


RULES = (
    ("move to itself", _move_to_itself),
    ("unreachable", _unreachable),
    ("jump to next", _jump_to_next),
    ("known reload", _known_reload),
    ("dead spill", _dead_spill),
)
"""Name and rule, in the order in which they are tried."""
