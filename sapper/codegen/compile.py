"""Lane IR -> machine code: selection, scheduling, allocation, frame, peephole rules, encoding, in this order.

Enters: a lane function and a target. Leaves: `CompiledCode`. Holds: the same function and target give the same bytes.
Where a target's data says that its assembler allocates (PTX), selection is the last step and the bytes are the text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..ir.nodes import Function, Location
from ..targets import module_of
from .machine import MachineFunction

if TYPE_CHECKING:
    from .encode import EncodedCode
    from .print import Style


@dataclass(slots=True)
class CompiledCode:
    """A kernel that can run. See docs/ir.md for its calling convention.

    bytes: code, then its constants; position-independent, to be loaded at a multiple of `align_bytes`. Or the text,
    where the target's assembler allocates.
    code_bytes: where the code ends. line_table: (offset, location) where the location changes, in order of offset.
    frame_bytes: stack taken by spills. slots: what words 3, 4, ... of the argument block hold. scratch_bytes: of each
    worker. counters: how many of the sync block's task counters are used; 0: the sync block is not touched at all.
    machine: the instructions, for printing and for tests.
    """

    name: str
    bytes: bytes
    code_bytes: int
    align_bytes: int
    line_table: list[tuple[int, Location]]
    frame_bytes: int
    slots: list[str]
    scratch_bytes: int
    counters: int
    machine: MachineFunction
    target: Any
    statistics: dict[str, int] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Assembly that the vendor's assembler takes, made when asked for where it is not what `bytes` are."""
        return self.bytes.decode() if self.target.assembler_allocates else text_of(self.machine, self.target)


def rules_of(target: Any) -> Any:
    """The selection rules of the target's family."""
    return module_of(target.family, "select")


def text_of(machine: MachineFunction, target: Any) -> str:
    """A machine function as the target's assembler takes it."""
    if target.assembler_allocates:
        text: str = module_of(target.family, "text").print_function(machine, target.name)
        return text
    from .print import print_function

    return print_function(machine, style_of(target))


def style_of(target: Any) -> Style:
    """How machine code of the target's family is written as text for GNU as."""
    if not target.word_bytes:
        from .print import INTEL

        return INTEL
    from .words import style_of as style_of_words

    return style_of_words(target)


def encoded(machine: MachineFunction, target: Any, checked: bool = True) -> EncodedCode:
    """The bytes of a machine function, all of whose registers are physical. checked: that the target has each
    instruction. Raises EncodeError."""
    if target.word_bytes:
        from .words import encode as encode_words

        return encode_words(machine, target, checked)
    from .encode import encode

    return encode(machine, target.features if checked else None)


def settle_vectors(machine: MachineFunction, registers: Any, target: Any, lanes: int) -> None:
    """In place: each row has a word, and vectors are set to elements, where a target asks for that. registers: its
    facts. lanes: of the function's rows."""
    if target.vector_state:
        from .settle import settle

        settle(machine, registers, target, lanes)


def counters_of(function: Function) -> int:
    """How many task counters a function uses, at least 1 if it has a barrier."""
    used = 0
    for op in function.walk():
        if op.name == "tasks":
            used = max(used, int(op.attributes["counter"]) + 1)
        elif op.name == "barrier":
            used = max(used, 1)
    return used


def compile_lane(function: Function, target: Any, checked: bool = False) -> CompiledCode:
    """Compile a lane function for a target.

    checked: prove the allocation with check.py, which knows nothing of how it was made. Raises SelectionError for
    an op that the target lacks, AllocationError, EncodeError.
    """
    from .allocate import allocate
    from .frame import finish_frame
    from .joined import Classes
    from .peephole import peephole
    from .schedule import schedule
    from .select import select

    rules = rules_of(target)
    selected = select(function, rules, target)
    slots = list(function.attributes.get("slots", []))
    scratch_bytes = int(function.attributes.get("scratch_bytes", 0))
    if target.assembler_allocates:
        text = text_of(selected, target).encode()
        return CompiledCode(function.name, text, len(text), 1, [], 0, slots, scratch_bytes, counters_of(function),
                            selected, target, {"instructions": selected.instruction_count()})
    registers = rules.register_file(target)
    classes = Classes(selected, registers)
    schedule(selected, registers, classes)
    allocation = allocate(selected, registers, classes=classes)
    machine = allocation.function
    finish_frame(machine, registers, allocation.origin)
    if checked:
        from .check import check

        check(selected, machine, allocation.origin, registers)
    peephole(machine, registers)
    settle_vectors(machine, registers, target, function.attributes["lanes"])
    code = encoded(machine, target)
    return CompiledCode(
        function.name, code.code, code.code_bytes, code.align_bytes, code.line_table, machine.frame_bytes,
        slots, scratch_bytes, counters_of(function), machine, target,
        {"spills": allocation.spills, "reloads": allocation.reloads, "rematerialised": allocation.rematerialised,
         "folded": allocation.folded, "instructions": machine.instruction_count()})
