"""Lives of virtual registers: against all paths of random programs, and the columns that they are drawn in."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sapper.codegen.lives import held, limits, lives, stretches
from sapper.codegen.machine import Immediate, Instruction, Label, LabelReference, VirtualRegister
from sapper.targets.ptx import assembly as table
from sapper.targets.ptx.rows import form

MOV, ADD, BRA, RET = (form(text) for text in ("mov.b32", "add.s32", "bra", "ret"))
REGISTERS = [VirtualRegister("vec", number) for number in range(4)]
P = VirtualRegister("pred", 9)


def paths_of(body: list[Any]) -> list[list[int]]:
    """Where each place may go on to."""
    places = {item.name: place for place, item in enumerate(body) if isinstance(item, Label)}
    found = []
    for place, item in enumerate(body):
        target = [places[o.name] for o in getattr(item, "operands", ()) if isinstance(o, LabelReference)]
        ends = isinstance(item, Instruction) and item.row in (BRA, RET) and item.mask is None
        found.append([*target, *([] if ends or place + 1 == len(body) else [place + 1])])
    return found


def is_wanted(body: list[Any], register: VirtualRegister, place: int, after: bool) -> bool:
    """By search: whether some path reads a register before an instruction without a predicate writes it."""
    paths, seen = paths_of(body), set()
    stack = list(paths[place]) if after else [place]
    while stack:
        here = stack.pop()
        if here in seen:
            continue
        seen.add(here)
        item = body[here]
        if isinstance(item, Instruction):
            written, *read = item.operands or [None]
            if item.mask is register or any(o is register for o in (read if item.row in (MOV, ADD) else [])):
                return True
            if written is register and item.mask is None:
                continue
        stack += paths[here]
    return False


@st.composite
def programs(draw: st.DrawFn) -> list[Any]:
    body: list[Any] = []
    labels = [f".l{n}" for n in range(draw(st.integers(0, 3)))]
    register = st.sampled_from(REGISTERS)
    for _ in range(draw(st.integers(1, 12))):
        mask = draw(st.sampled_from([None, P]))
        kind = draw(st.sampled_from(["mov", "add", "bra", "ret"]))
        if kind == "mov":
            body.append(Instruction(MOV, [draw(register), Immediate(1)], mask))
        elif kind == "add":
            body.append(Instruction(ADD, [draw(register), draw(register), draw(register)], mask))
        elif kind == "bra" and labels:
            body.append(Instruction(BRA, [LabelReference(draw(st.sampled_from(labels)))], mask))
        elif kind == "ret" and mask is not None:
            body.append(Instruction(RET, [], mask))
    for label in labels:
        body.insert(draw(st.integers(0, len(body))), Label(label))
    return [*body, Instruction(RET, [])]


@given(programs())
def test_a_register_is_wanted_where_a_path_reads_it(body: list[Any]) -> None:
    found = lives(body, table)
    for register, points in zip(found.registers, found.points, strict=True):
        for place, item in enumerate(body):
            writes = isinstance(item, Instruction) and item.row in (MOV, ADD) and item.operands[0] is register
            assert points >> 2 * place & 1 == is_wanted(body, register, place, False)
            assert points >> 2 * place + 1 & 1 == (writes or is_wanted(body, register, place, True))


@given(programs())
def test_columns_hold_each_register_once_and_no_two_at_a_point(body: list[Any]) -> None:
    found = lives(body, table)
    drawn: dict[VirtualRegister, int] = {}
    for column in found.columns:
        taken = 0
        for first, last, register in column.lives:
            bits = (2 << last) - (1 << first)
            assert register.kind == column.kind and not taken & bits
            taken |= bits
            drawn[register] = drawn.get(register, 0) | bits
    assert drawn == {r: p for r, p in zip(found.registers, found.points, strict=True) if p}
    wanted = [sum(letter != "." for letter, column in zip(row, found.columns, strict=True) if column.kind == "vec")
              for row in found.letters]
    assert all(least <= most for least, most in zip(found.words, wanted, strict=True))


@given(st.integers(0, 2**40))
def test_stretches_are_the_bits(bits: int) -> None:
    parts = list(stretches(bits))
    assert sum((2 << last) - (1 << first) for first, last in parts) == bits
    assert all(before[1] + 1 < after[0] for before, after in pairwise(parts))


def test_registers_of_64_bits_count_twice_and_predicates_not() -> None:
    wide, narrow = VirtualRegister("gpr", 0), VirtualRegister("vec", 1)
    body: list[Any] = [
        Instruction(form("mov.b64"), [wide, Immediate(1)]), Instruction(MOV, [narrow, Immediate(2)]),
        Instruction(form("setp.eq.s32"), [P, narrow, Immediate(2)]),
        Instruction(form("cvt.u32.u64"), [narrow, wide], P), Instruction(RET, [])]
    assert lives(body, table).words == [2, 3, 3, 2, 0]  # a predicated write keeps nothing that nobody reads
    assert lives(body[:-1], table, [narrow]).words == [2, 3, 3, 3]
    assert lives(body, table).letters[1] == "|.w" and [c.kind for c in lives(body, table).columns] == [
        "gpr", "pred", "vec"]


def roles(*budgets: int) -> list[Any]:
    """Two roles of warps side by side: the first reads what the other writes. Nops stand where buffers are touched."""
    change = form("setmaxnreg.inc.sync.aligned.u32"), form("setmaxnreg.dec.sync.aligned.u32")
    bump = Instruction(ADD, [REGISTERS[0], REGISTERS[0], REGISTERS[0]])
    return [bump, Instruction(BRA, [LabelReference(".copy")], P), Instruction(change[0], [Immediate(budgets[0])]), bump,
            bump, Instruction(BRA, [LabelReference(".end")]), Label(".copy"),
            Instruction(change[1], [Immediate(budgets[1])]), bump, bump, Label(".end"), bump, Instruction(RET, [])]


def test_buffers_are_held_between_warps_that_write_and_warps_that_read() -> None:
    reads, writes = [0] * 13, [0] * 13
    reads[4], writes[8] = 1, 1
    assert held(roles(232, 24), table, reads, writes) == [0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0]
    # On one path a buffer is held from its write to its last read, and beside it as long as other warps may read it.
    reads[3], writes[0] = 2, 2
    assert [bits >> 1 for bits in held(roles(232, 24), table, reads, writes)] == [0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0]


def test_a_budget_holds_from_where_it_is_set() -> None:
    assert limits(roles(232, 24), table, 168) == [168, 168, 168, 232, 232, 232, 168, 168, 24, 24, 24, 24, 24]
