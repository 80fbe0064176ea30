"""The allocation checker: it passes sound code and catches each kind of planted fault."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from sapper.codegen.allocate import Allocation, allocate
from sapper.codegen.check import CheckError, check
from sapper.codegen.frame import finish_frame
from sapper.codegen.machine import Immediate, Instruction, Label, LabelReference, MachineFunction, Memory, Register
from sapper.targets.x86_64.allocation import RegisterFile, register_file
from sapper.targets.x86_64.instructions import ROWS

from .test_allocate import RAX, RDI, Code, Generator, small_file


def loop_with_spills() -> tuple[MachineFunction, Allocation, RegisterFile]:
    """A loop over more sums than there are registers, with general registers that must be saved."""
    code = Code()
    base = code.new("gpr")
    code.put("mov.64", base, RDI)
    counters = [code.new("gpr") for _ in range(6)]
    for number, counter in enumerate(counters):
        code.put("mov.64", counter, Memory(base, disp=8 * number))
    sums = [code.new("vec") for _ in range(5)]
    for total in sums:
        code.put("vmovups.512", total, Memory(base))
    code.label("loop")
    for number, total in enumerate(sums):
        loaded, copy = code.new("vec"), code.new("vec")
        code.put("vmovups.512", loaded, Memory(base, counters[number % 5], 8, 64))
        code.put("vmovaps.512", copy, total)
        code.put("vfmadd231ps.512", copy, loaded, total)
        code.put("vmovaps.512", total, copy)
    for counter in counters[1:]:
        code.put("add.64", counter, Immediate(8))
    code.put("sub.64", counters[0], Immediate(1))
    code.put("jne", LabelReference("loop"))
    for number, total in enumerate(sums):
        code.put("vmovups.512", Memory(base, disp=64 * number), total)
    code.put("ret")
    abi = small_file(7, 4, 1)
    function = code.function()
    allocation = allocate(function, abi)
    finish_frame(allocation.function, abi, allocation.origin)
    check(function, allocation.function, allocation.origin, abi)
    assert allocation.spills and allocation.reloads
    return function, allocation, abi


def added(allocation: Allocation, row: str, store: bool) -> list[int]:
    """Places of added loads from, or stores to, the frame."""
    return [
        place
        for place, item in enumerate(allocation.function.body)
        if isinstance(item, Instruction)
        and allocation.origin[place] < 0
        and item.row.name == row
        and isinstance(item.operands[0 if store else 1], Memory)
    ]


def drop(allocation: Allocation, place: int) -> None:
    del allocation.function.body[place]
    del allocation.origin[place]


def vector_operands(allocation: Allocation, row: str) -> Instruction:
    return next(i for i in allocation.function.body if isinstance(i, Instruction) and i.row.name == row)


def swapped_register(allocation: Allocation) -> None:
    fma = vector_operands(allocation, "vfmadd231ps.512")
    fma.operands[1] = Register("vec", (fma.operands[1].number + 1) % 4)  # type: ignore[union-attr]


def swapped_address(allocation: Allocation) -> None:
    for item in allocation.function.body:
        if isinstance(item, Instruction) and any(isinstance(o, Memory) and o.index for o in item.operands):
            old = item.operands[1]
            assert isinstance(old, Memory)
            item.operands[1] = Memory(old.index, old.base, old.scale, old.disp)
            return


def missing_reload(allocation: Allocation) -> None:
    drop(allocation, added(allocation, "vmovups.512", False)[0])


def missing_spill(allocation: Allocation) -> None:
    drop(allocation, added(allocation, "vmovups.512", True)[-1])


def reload_of_another_slot(allocation: Allocation) -> None:
    places = added(allocation, "vmovups.512", False)
    items = [allocation.function.body[place] for place in places]
    other = next(i for i in items if i.operands[1].disp != items[0].operands[1].disp)  # type: ignore[union-attr]
    items[0].operands[1] = other.operands[1]  # type: ignore[union-attr]


def overlapping_slots(allocation: Allocation) -> None:
    allocation.slots[1].memory.disp = allocation.slots[0].memory.disp + 8


def same_slot_for_two(allocation: Allocation) -> None:
    allocation.slots[1].memory.disp = allocation.slots[0].memory.disp


def slot_past_the_frame(allocation: Allocation) -> None:
    allocation.slots[0].memory.disp += 1024


def callee_saved_not_restored(allocation: Allocation) -> None:
    drop(allocation, next(
        p for p, i in enumerate(allocation.function.body) if isinstance(i, Instruction) and i.row.name == "pop"
    ))


def callee_saved_restored_wrongly(allocation: Allocation) -> None:
    pops = [i for i in allocation.function.body if isinstance(i, Instruction) and i.row.name == "pop"]
    pops[0].operands[0], pops[1].operands[0] = pops[1].operands[0], pops[0].operands[0]


def stack_pointer_not_restored(allocation: Allocation) -> None:
    drop(allocation, next(
        p
        for p, i in enumerate(allocation.function.body)
        if isinstance(i, Instruction) and allocation.origin[p] < 0 and i.operands[:1] == [Register("gpr", 4)]
        and isinstance(i.operands[1], Memory)
    ))


def dropped_instruction(allocation: Allocation) -> None:
    drop(allocation, next(
        p for p, i in enumerate(allocation.function.body) if isinstance(i, Instruction) and i.row.name == "sub.64"
        and allocation.origin[p] >= 0
    ))


def changed_immediate(allocation: Allocation) -> None:
    next(
        i for p, i in enumerate(allocation.function.body)
        if isinstance(i, Instruction) and i.row.name == "add.64" and allocation.origin[p] >= 0
    ).operands[1] = Immediate(16)


def changed_order(allocation: Allocation) -> None:
    body = allocation.function.body
    place = next(p for p, i in enumerate(body) if isinstance(i, Instruction) and i.row.name == "sub.64"
                 and allocation.origin[p] >= 0)
    for row in (body, allocation.origin):
        row[place], row[place - 1] = row[place - 1], row[place]  # type: ignore[index]


def added_arithmetic(allocation: Allocation) -> None:
    place = next(p for p, i in enumerate(allocation.function.body) if isinstance(i, Label))
    allocation.function.body.insert(place, Instruction(ROWS["add.64"], [RAX, Immediate(1)]))
    allocation.origin.insert(place, -1)


FAULTS: list[Callable[[Allocation], None]] = [
    swapped_register, swapped_address, missing_reload, missing_spill, reload_of_another_slot, overlapping_slots,
    same_slot_for_two, slot_past_the_frame, callee_saved_not_restored, callee_saved_restored_wrongly,
    stack_pointer_not_restored, dropped_instruction, changed_immediate, changed_order, added_arithmetic,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_fault_is_caught(fault: Callable[[Allocation], None]) -> None:
    function, allocation, abi = loop_with_spills()
    fault(allocation)
    with pytest.raises(CheckError):
        check(function, allocation.function, allocation.origin, abi)


def test_dropped_move_is_caught() -> None:
    code = Code()
    first, second = code.new("gpr"), code.new("gpr")
    code.put("mov.64", first, RDI)
    code.put("mov.64", second, first)
    code.put("add.64", second, first)
    code.put("mov.64", Memory(first), second)
    code.put("ret")
    abi = register_file()
    function = code.function()
    allocation = allocate(function, abi)
    check(function, allocation.function, allocation.origin, abi, framed=False)
    place = next(p for p, i in enumerate(allocation.function.body) if i.row.name == "mov.64")  # type: ignore[union-attr]
    drop(allocation, place)
    with pytest.raises(CheckError, match="expected it to hold"):
        check(function, allocation.function, allocation.origin, abi, framed=False)


def test_value_across_a_clobber_is_caught() -> None:
    code = Code()
    kept, divisor = code.new("gpr"), code.new("gpr")
    code.put("mov.64", kept, RDI)
    code.put("mov.64", divisor, RDI)
    code.put("mov.64", RAX, kept)
    code.put("mov.64", Register("gpr", 2), kept)
    code.put("div.64", divisor)
    code.put("mov.64", Memory(kept), RAX)
    code.put("ret")
    abi = register_file()
    function = code.function()
    allocation = allocate(function, abi)
    check(function, allocation.function, allocation.origin, abi, framed=False)
    # Let the last instruction take its address from rdx, which the division has overwritten.
    allocation.function.body[-2].operands[0] = Memory(Register("gpr", 2))  # type: ignore[union-attr]
    with pytest.raises(CheckError, match="expected it to hold"):
        check(function, allocation.function, allocation.origin, abi, framed=False)


def test_narrow_copy_does_not_hand_on_a_wide_value() -> None:
    code = Code()
    wide, copy = code.new("gpr"), code.new("gpr")
    code.put("mov.64", wide, RDI)
    code.put("mov.32", copy, wide)
    code.put("mov.64", Memory(copy), wide)
    code.put("ret")
    abi = register_file()
    function = code.function()
    allocation = allocate(function, abi)
    check(function, allocation.function, allocation.origin, abi, framed=False)
    place = next(p for p, i in enumerate(allocation.function.body) if i.row.name == "mov.32")  # type: ignore[union-attr]
    drop(allocation, place)
    with pytest.raises(CheckError, match="missing"):
        check(function, allocation.function, allocation.origin, abi, framed=False)


def test_lost_upper_halves_are_caught() -> None:
    """vzeroupper before the last use of a wide register."""
    code = Code()
    base, value = code.new("gpr"), code.new("vec")
    code.put("mov.64", base, RDI)
    code.put("vmovups.512", value, Memory(base))
    code.put("vmovups.512", Memory(base, disp=64), value)
    code.put("ret")
    abi = register_file()
    function = code.function()
    allocation = allocate(function, abi)
    finish_frame(allocation.function, abi, allocation.origin)
    check(function, allocation.function, allocation.origin, abi)
    body = allocation.function.body
    store = next(p for p, o in enumerate(allocation.origin) if o == 2)
    assert body[store + 1].row.name == "vzeroupper"  # type: ignore[union-attr]
    for row in (body, allocation.origin):
        row[store], row[store + 1] = row[store + 1], row[store]  # type: ignore[index]
    with pytest.raises(CheckError, match="expected it to hold"):
        check(function, allocation.function, allocation.origin, abi)


@pytest.mark.parametrize("wrong", ["disp", "broadcast", "row"])
def test_operands_in_the_frame_are_checked(wrong: str) -> None:
    code = Code()
    base = code.new("gpr")
    code.put("mov.64", base, RDI)
    values = [code.new("gpr") for _ in range(8)]
    for number, value in enumerate(values):
        code.put("mov.64", value, Memory(base, disp=8 * number))
    for value in values:
        code.put("imul.64", base, value)
    for value in values:
        code.put("shl.imm.64", value, Immediate(1))
        code.put("mov.64", Memory(base), value)
    code.put("ret")
    abi = small_file(5, 4, 1)
    function = code.function()
    allocation = allocate(function, abi)
    check(function, allocation.function, allocation.origin, abi, framed=False)
    folded = [item for place, item in enumerate(allocation.function.body) if allocation.origin[place] >= 0
              and isinstance(item, Instruction) and item.row.name == "imul.64" and isinstance(item.operands[1], Memory)]
    assert len(folded) == allocation.folded > 1
    if wrong == "disp":
        folded[0].operands[1] = folded[1].operands[1]
    elif wrong == "broadcast":
        folded[0].operands[1] = replace(folded[0].operands[1], broadcast=True)  # type: ignore[type-var]
    else:  # the opposite: memory that the instruction would have to write
        shift = vector_operands(allocation, "shl.imm.64")
        shift.operands[0] = folded[0].operands[1]
    with pytest.raises(CheckError):
        check(function, allocation.function, allocation.origin, abi, framed=False)


def test_random_faults_are_caught() -> None:
    """Change one register of an instruction that matters; the code must then differ or be refused."""
    caught = tried = 0
    for seed in range(60):
        function = Generator(seed, 25).code.function()
        abi = small_file(7, 5, 3)
        allocation = allocate(function, abi)
        finish_frame(allocation.function, abi, allocation.origin)
        chance = random.Random(seed)
        places = [
            p for p, i in enumerate(allocation.function.body)
            if isinstance(i, Instruction) and allocation.origin[p] >= 0
            and any(isinstance(o, Register) for o in i.operands)
        ]
        item = allocation.function.body[chance.choice(places)]
        assert isinstance(item, Instruction)
        position = chance.choice([n for n, o in enumerate(item.operands) if isinstance(o, Register)])
        old = item.operands[position]
        assert isinstance(old, Register)
        others = [n for n in abi.registers[old.kind] if n != old.number]
        item.operands[position] = Register(old.kind, chance.choice(others))
        tried += 1
        try:
            check(function, allocation.function, allocation.origin, abi)
        except CheckError:
            caught += 1
    # The rest read a register that holds the same value, or write one that is never read.
    assert caught > 0.75 * tried
