"""Prologue and epilogue: saved registers, the stack frame, vzeroupper.

Enters: a machine function after allocation; slots are at [stack pointer + 0 .. frame_bytes).
Leaves: the same function with a prologue before its first item and an epilogue before each return.

    entry rsp ->  return address          (rsp + 8 is a multiple of 16 here; elsewhere it is in a register)
                  saved registers         push, only those that the code uses
                  entry rsp, less pushes  only where the frame is aligned to more than 16 bytes
    rsp       ->  slots                   frame_bytes, aligned as the widest spilled register

Source: System V ABI AMD64 supplement, 3.2.2. vzeroupper before a return: AMD and Intel optimization guides; it spares
the caller's SSE code a dependency on the upper halves.
"""

from __future__ import annotations

from .machine import Immediate, Instruction, Label, MachineFunction, Memory, Register
from .row_facts import RETURN, Abi, facts_table


def _round_up(size_bytes: int, align_bytes: int) -> int:
    return -(-size_bytes // align_bytes) * align_bytes


def finish_frame(function: MachineFunction, abi: Abi, origin: list[int] | None = None) -> None:
    """Add prologue and epilogues in place.

    origin: the list that belongs to the body (see Allocation); it gets -1 for each instruction added.
    """
    saved, wide, align_bytes = _needs(function, abi)
    prologue, epilogue = _ends(abi, saved, function.frame_bytes, align_bytes)
    if wide and (cleans := abi.frame_row("vzeroupper")) is not None:
        epilogue.insert(0, Instruction(cleans, [], comment="frame"))
    if prologue or epilogue:
        _insert(function, abi, prologue, epilogue, origin)


def _needs(function: MachineFunction, abi: Abi) -> tuple[list[Register], bool, int]:
    """Callee-saved registers that are written, whether any is wider than 128 bits, and the alignment of the frame."""
    facts_of = facts_table(abi)
    stack = Register(*abi.stack_pointer)
    saved_candidates = {Register(*pair) for pair in abi.callee_saved}
    used: set[Register] = set()
    wide = False
    align_bytes = 8
    for item in function.body:
        if type(item) is not Instruction:
            continue
        facts = facts_of[item.row]
        if not wide and max(facts.bits, default=0) > 128:
            wide = True
        for operand in item.operands:
            kind = type(operand)
            if kind is Register:
                if operand in saved_candidates:
                    used.add(operand)
            elif kind is Memory and operand.base == stack:  # type: ignore[union-attr]
                align_bytes = max(align_bytes, max(facts.bits) // 8)
        if facts.writes:
            used.update(register for register in saved_candidates if register in facts.writes)
    return sorted(used, key=lambda r: (r.kind, r.number)), wide, align_bytes


def _ends(abi: Abi, saved: list[Register], size_bytes: int, align_bytes: int) -> tuple[
        list[Instruction], list[Instruction]]:
    """Prologue and epilogue."""
    stack = Register(*abi.stack_pointer)
    prologue: list[Instruction] = []
    epilogue: list[Instruction] = []

    def add(to: list[Instruction], what: str, *operands: Register | Immediate | Memory) -> None:
        first = operands[0]
        kind = first.kind if isinstance(first, Register) else "gpr"
        to.append(Instruction(abi.frame_row(what, kind), list(operands), comment="frame"))

    for register in saved:
        add(prologue, "push", register)
    if size_bytes:
        if align_bytes <= 16:
            pushed = abi.entry_bytes + abi.push_bytes * len(saved)
            whole = abi.frame_bytes(_round_up(size_bytes, 16) + -pushed % 16)
            add(prologue, "subtract", stack, Immediate(whole))
            add(epilogue, "add", stack, Immediate(whole))
        else:
            scratch = Register(*abi.frame_scratch)
            whole = _round_up(size_bytes + 8, align_bytes)
            add(prologue, "move", scratch, stack)
            add(prologue, "subtract", stack, Immediate(whole))
            add(prologue, "and", stack, Immediate(-align_bytes))
            add(prologue, "store", Memory(stack, disp=size_bytes), scratch)
            add(epilogue, "load", stack, Memory(stack, disp=size_bytes))
    for register in reversed(saved):
        add(epilogue, "pop", register)
    return prologue, epilogue


def _insert(function: MachineFunction, abi: Abi, prologue: list[Instruction], epilogue: list[Instruction],
            origin: list[int] | None) -> None:
    """The prologue before the body, the epilogue before each return."""
    facts_of = facts_table(abi)
    body: list[Instruction | Label] = [*prologue]
    new_origin = [-1] * len(prologue)
    done = 0  # how much of the code has its frame
    for place, item in enumerate(function.body):
        if epilogue and type(item) is Instruction and facts_of[item.row].flow == RETURN:
            body += function.body[done:place]
            body += [Instruction(model.row, list(model.operands), location=item.location, comment=model.comment)
                     for model in epilogue]
            if origin is not None:
                new_origin += [*origin[done:place], *[-1] * len(epilogue)]
            done = place
    body += function.body[done:]
    if origin is not None:
        new_origin += origin[done:]
    function.body = body
    if origin is not None:
        origin[:] = new_origin
