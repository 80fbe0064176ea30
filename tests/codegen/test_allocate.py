"""Register allocation and the frame: allocated code runs as the code before it, and good code stays good."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.codegen import joined
from sapper.codegen.allocate import Allocation, allocate
from sapper.codegen.check import CheckError, check
from sapper.codegen.frame import finish_frame
from sapper.codegen.liveness import Flow, Ranges, analyse
from sapper.codegen.machine import (
    Immediate,
    Instruction,
    Label,
    LabelReference,
    MachineFunction,
    Memory,
    Register,
    VirtualRegister,
)
from sapper.codegen.peephole import peephole
from sapper.codegen.row_facts import BRANCH, JUMP, READ, RETURN, WRITE, AllocationError, facts_table, is_idiom
from sapper.codegen.schedule import schedule
from sapper.targets.x86_64.allocation import RegisterFile, register_file
from sapper.targets.x86_64.instructions import ROWS
from tests.strategies import examples

RDI, RSI, RAX, RCX = Register("gpr", 7), Register("gpr", 6), Register("gpr", 0), Register("gpr", 1)
RDX = Register("gpr", 2)


class Code:
    """Writes a machine function line by line."""

    def __init__(self) -> None:
        self.body: list[Instruction | Label] = []
        self.count = 0

    def new(self, kind: str) -> VirtualRegister:
        self.count += 1
        return VirtualRegister(kind, self.count)

    def put(self, row: str, *operands: object, mask: object = None, zeroing: bool = False) -> Instruction:
        made = Instruction(ROWS[row], list(operands), mask, zeroing)  # type: ignore[arg-type]
        self.body.append(made)
        return made

    def label(self, name: str) -> None:
        self.body.append(Label(name))

    def function(self) -> MachineFunction:
        return MachineFunction("test", self.body, {"constant": (64, bytes(64))})


def small_file(gprs: int = 4, vectors: int = 4, masks: int = 2, vector_bits: int = 512) -> RegisterFile:
    """x86-64 with few registers, so that allocation has to work for its living."""
    full = register_file(512, True)
    order = (0, 1, 7, 6, 2, 3, 5, 12, 13)  # some callee-saved ones among them
    return RegisterFile(
        {"gpr": order[:gprs], "vec": tuple(range(vectors)), "mask": full.registers["mask"][:masks]},
        vector_bits,
    )


MASK = (1 << 61) - 1


def mix(*parts: object) -> int:
    """A number that depends on all parts and their order, the same in every run."""
    value = 1469598103934665603
    for part in parts:
        if isinstance(part, str):
            for letter in part:
                value = (value * 1099511628211 + ord(letter)) & MASK
        else:
            value = ((value ^ int(part)) * 1099511628211 + 12345) & MASK  # type: ignore[call-overload]
    return value


def simulate(
    function: MachineFunction, abi: RegisterFile, branches: int = 40
) -> tuple[list[object], dict[object, int]]:
    """Run the code with made-up meanings: what an instruction writes is a mix of what it reads.

    Returns what was stored and which branches were taken, in order, and the registers at the end. Copies copy, idioms
    make constants, memory remembers. The run ends after so many branches, so loops end too.
    """
    facts_of = facts_table(abi)
    registers: dict[object, int] = {
        Register(kind, number): mix(kind, number) for kind in ("gpr", "vec", "mask") for number in range(32)
    }
    stack = Register(*abi.stack_pointer)
    registers[stack] = 1 << 40
    memory: dict[int, int] = {}
    labels = {item.name: place for place, item in enumerate(function.body) if isinstance(item, Label)}
    trace: list[object] = []
    place = 0
    while True:
        item = function.body[place]
        place += 1
        if isinstance(item, Label):
            continue
        facts = facts_of[item.row]
        name = facts.name

        def address(where: Memory) -> int:
            if where.base == stack:
                return registers[stack] + where.disp
            parts: list[object] = [where.disp, where.scale, where.label or ""]
            for part in (where.base, where.index):
                parts.append(0 if part is None else registers[part])
            return mix("address", *parts)

        if name == "push":
            registers[stack] -= 8
            memory[registers[stack]] = registers[item.operands[0]]
            continue
        if name == "pop":
            registers[item.operands[0]] = memory[registers[stack]]
            registers[stack] += 8
            continue
        if item.operands and item.operands[0] == stack and isinstance(item.operands[1], Immediate):
            amount = item.operands[1].value
            old = registers[stack]
            registers[stack] = {"sub.64": old - amount, "add.64": old + amount, "and.64": old & amount}[name]
            continue
        merging = item.mask is not None and not item.zeroing and facts.merges
        read: list[object] = [name]
        constant = is_idiom(item, facts)
        for how, operand in zip(facts.access, item.operands, strict=True):
            if isinstance(operand, Register | VirtualRegister):
                if (how & READ or merging) and not constant:
                    read.append(registers[operand])
            elif isinstance(operand, Memory):
                where = address(operand)
                if how & READ:
                    read.append(memory.get(where, mix("memory", where)))
                elif not how:
                    read.append(where)
            elif isinstance(operand, Immediate):
                read.append(operand.value)
        if item.mask is not None:
            read.append(registers[item.mask])
        for pair in facts.reads:
            read.append(registers[Register(*pair)])
        if facts.reads_flags:
            read.append(registers["flags"])
        plain_move = facts.move_bits == abi.full_bits.get(_kind(item), 0) and item.mask is None
        for position, (how, operand) in enumerate(zip(facts.access, item.operands, strict=True)):
            if not how & WRITE:
                continue
            result = read[1] if plain_move else mix(position, *read)
            if isinstance(operand, Memory):
                where = address(operand)
                memory[where] = result  # type: ignore[assignment]
                if operand.base != stack:
                    trace.append((where, result))
            else:
                registers[operand] = result  # type: ignore[assignment]
        if item.mask is not None and facts.mask_access & WRITE:
            registers[item.mask] = 0
        for pair in facts.writes:
            registers[Register(*pair)] = mix("implicit", *pair, *read)
        if facts.writes_flags:
            registers["flags"] = mix("flags", *read)
        if facts.flow == RETURN:
            return trace, registers
        if facts.flow in (BRANCH, JUMP):
            branches -= 1
            if branches == 0:
                return trace, registers
            taken = facts.flow == JUMP or mix(*read) >> 7 & 1
            trace.append(bool(taken))
            if taken:
                place = labels[item.operands[0].name]  # type: ignore[union-attr]


def _kind(item: Instruction) -> str:
    return next((o.kind for o in item.operands if isinstance(o, Register | VirtualRegister)), "")


class Generator:
    """A random structured program: straight code, ifs, loops, copies, two-address ops, fixed registers, masks."""

    def __init__(self, seed: int, statements: int) -> None:
        self.random = random.Random(seed)
        self.code = Code()
        self.labels = 0
        self.budget = statements
        start = self.code.new("gpr")
        self.code.put("mov.64", start, RDI)
        second = self.code.new("gpr")
        self.code.put("mov.64", second, RSI)
        self.defined: dict[str, list[VirtualRegister]] = {"gpr": [start, second], "vec": [], "mask": []}
        for _ in range(2):
            self.vector_constant()
            self.mask_constant()
        while self.budget > 0:
            self.statement(0)
        base = self.defined["gpr"][0]
        for kind, row in (("gpr", "mov.64"), ("vec", "vmovups.512"), ("mask", "kmovq")):
            for number, register in enumerate(self.defined[kind]):
                self.code.put(row, Memory(base, disp=64 * number), register)
        self.code.put("ret")

    def some(self, kind: str) -> VirtualRegister:
        """Mostly one defined lately."""
        pool = self.defined[kind]
        if self.random.random() < 0.6:
            return pool[-1 - min(len(pool) - 1, int(self.random.expovariate(0.5)))]
        return self.random.choice(pool)

    def target(self, kind: str) -> VirtualRegister:
        """A new register, or an old one written again."""
        if self.random.random() < 0.3:
            return self.random.choice(self.defined[kind])
        return self.code.new(kind)

    def define(self, register: VirtualRegister) -> None:
        if register not in self.defined[register.kind]:
            self.defined[register.kind].append(register)

    def vector_constant(self) -> None:
        register = self.target("vec") if self.defined["vec"] else self.code.new("vec")
        if self.random.random() < 0.5:
            self.code.put("vbroadcastss.512", register, Memory(label="constant", disp=4 * self.random.randrange(16)))
        else:
            self.code.put("vpxord.512", register, register, register)
        self.define(register)

    def mask_constant(self) -> None:
        register = self.target("mask") if self.defined["mask"] else self.code.new("mask")
        self.code.put("kxnorq", register, register, register)
        self.define(register)

    def memory(self) -> Memory:
        index = self.some("gpr") if self.random.random() < 0.4 else None
        return Memory(self.some("gpr"), index, 4 if index else 1, 8 * self.random.randrange(8))

    def statement(self, depth: int) -> None:
        self.budget -= 1
        put, some, random_number = self.code.put, self.some, self.random.random()
        if random_number < 0.06 and depth < 3:
            self.if_else(depth)
        elif random_number < 0.12 and depth < 3:
            self.loop(depth)
        elif random_number < 0.25:
            kind, row = self.random.choice((("gpr", "mov.64"), ("vec", "vmovaps.512"), ("vec", "vmovups.512")))
            target = self.target(kind)
            put(row, target, some(kind))
            self.define(target)
        elif random_number < 0.35:
            target = self.target("vec")
            put("vaddps.512", target, some("vec"), some("vec"))
            self.define(target)
        elif random_number < 0.45:
            target = some("vec")
            put("vfmadd231ps.512", target, some("vec"), self.memory() if self.random.random() < 0.3 else some("vec"))
        elif random_number < 0.53:
            target = some("gpr")
            put("add.64", target, self.random.choice((some("gpr"), self.memory(), Immediate(7))))
        elif random_number < 0.60:
            target = self.target("gpr")
            put("lea.64", target, self.memory())
            self.define(target)
        elif random_number < 0.65:
            target = self.target("gpr")
            put(self.random.choice(("mov.64", "mov.32")), target, Immediate(self.random.randrange(5)))
            self.define(target)
        elif random_number < 0.70:
            target = self.target("gpr")
            put("mov.32", target, some("gpr"))
            self.define(target)
        elif random_number < 0.75:
            self.vector_constant()
        elif random_number < 0.80:
            row, kind = self.random.choice((("mov.64", "gpr"), ("vmovups.512", "vec")))
            put(row, self.memory(), some(kind))
        elif random_number < 0.84:
            put("mov.64", RCX, some("gpr"))
            put("shl.cl.64", some("gpr"), RCX)
        elif random_number < 0.87:
            put("mov.64", RAX, some("gpr"))
            put("mov.64", Register("gpr", 2), some("gpr"))
            put("div.64", some("gpr"))
            target = self.target("gpr")
            put("mov.64", target, RAX)
            self.define(target)
        elif random_number < 0.91:
            target = self.target("mask")
            put("vcmpps.k.512", target, some("vec"), some("vec"), Immediate(1))
            self.define(target)
        elif random_number < 0.94:
            put("vaddps.512", some("vec"), some("vec"), some("vec"), mask=some("mask"))
        elif random_number < 0.97:
            target = self.target("vec")
            put("vaddps.512", target, some("vec"), some("vec"), mask=some("mask"), zeroing=True)
            self.define(target)
        else:
            target = self.target("vec")
            put("vaddps.128", target, some("vec"), some("vec"))
            self.define(target)

    def name(self) -> str:
        self.labels += 1
        return f"L{self.labels}"

    def condition(self, label: str) -> None:
        self.code.put("cmp.64", self.some("gpr"), self.some("gpr"))
        self.code.put(self.random.choice(("je", "jb", "jg")), LabelReference(label))

    def if_else(self, depth: int) -> None:
        other, end = self.name(), self.name()
        self.condition(other)
        before = {kind: list(pool) for kind, pool in self.defined.items()}
        for _ in range(self.random.randrange(1, 4)):
            self.statement(depth + 1)
        self.code.put("jmp", LabelReference(end))
        first = self.defined
        self.defined = {kind: list(pool) for kind, pool in before.items()}
        self.code.label(other)
        for _ in range(self.random.randrange(1, 4)):
            self.statement(depth + 1)
        self.code.label(end)
        for kind, pool in self.defined.items():
            self.defined[kind] = [register for register in pool if register in first[kind]]

    def loop(self, depth: int) -> None:
        top = self.name()
        self.code.label(top)
        for _ in range(self.random.randrange(1, 5)):
            self.statement(depth + 1)
        self.condition(top)


def both_run_alike(function: MachineFunction, abi: RegisterFile) -> Allocation:
    allocation = allocate(function, abi)
    check(function, allocation.function, allocation.origin, abi, framed=False)
    before, _ = simulate(function, abi)
    after, _ = simulate(allocation.function, abi)
    assert before == after
    finish_frame(allocation.function, abi, allocation.origin)
    check(function, allocation.function, allocation.origin, abi)
    framed, registers = simulate(allocation.function, abi)
    assert framed == before
    if isinstance(allocation.function.body[-1], Instruction) and len([b for b in framed if isinstance(b, bool)]) < 38:
        for pair in abi.callee_saved:
            assert registers[Register(*pair)] == mix(*pair)
        assert registers[Register(*abi.stack_pointer)] == 1 << 40
    return allocation


@settings(max_examples=examples(150))
@given(st.integers(0, 1 << 32), st.integers(3, 70), st.integers(6, 9), st.integers(3, 8), st.integers(1, 4))
def test_random_programs_run_as_before(seed: int, statements: int, gprs: int, vectors: int, masks: int) -> None:
    function = Generator(seed, statements).code.function()
    both_run_alike(function, small_file(gprs, vectors, masks))


def register_accumulations(sums: int, steps: int, copies: bool = True) -> MachineFunction:
    """The loop of a matrix multiplication: sums/2 rows by two vectors, `steps` products of each in a turn.

    copies: each product is written to a copy of its sum, which is then copied back, as selection from SSA form does.
    """
    code = Code()
    args = code.new("gpr")
    code.put("mov.64", args, RDI)
    left, right, out, count = (code.new("gpr") for _ in range(4))
    for number, register in enumerate((left, right, out, count)):
        code.put("mov.64", register, Memory(args, disp=8 * number))
    totals = [code.new("vec") for _ in range(sums)]
    for total in totals:
        code.put("vpxord.512", total, total, total)
    code.label("loop")
    for step in range(steps):
        panels = [code.new("vec") for _ in range(2)]
        for number, panel in enumerate(panels):
            code.put("vmovups.512", panel, Memory(right, disp=128 * step + 64 * number))
        for row in range(sums // 2):
            element = code.new("vec")
            code.put("vbroadcastss.512", element, Memory(left, disp=4 * row + 256 * step))
            for number, panel in enumerate(panels):
                total = totals[2 * row + number]
                if not copies:
                    code.put("vfmadd231ps.512", total, element, panel)
                    continue
                copy = code.new("vec")
                code.put("vmovaps.512", copy, total)
                code.put("vfmadd231ps.512", copy, element, panel)
                code.put("vmovaps.512", total, copy)
    code.put("add.64", left, Immediate(4 * steps))
    code.put("add.64", right, Immediate(128 * steps))
    code.put("sub.64", count, Immediate(1))
    code.put("jne", LabelReference("loop"))
    for number, total in enumerate(totals):
        code.put("vmovups.512", Memory(out, disp=64 * number), total)
    code.put("ret")
    return code.function()


def names(function: MachineFunction) -> list[str]:
    return [item.row.name for item in function.body if isinstance(item, Instruction)]


@pytest.mark.parametrize("steps", [1, 4])
def test_full_accumulation_loop_has_no_spill_and_no_move(steps: int) -> None:
    """28 sums, two panel vectors and one broadcast: 31 of the 32 vector registers."""
    abi = register_file()
    function = register_accumulations(28, steps)
    allocation = allocate(function, abi, no_spill=True)
    check(function, allocation.function, allocation.origin, abi, framed=False)
    assert allocation.spills == allocation.reloads == allocation.rematerialised == 0
    assert allocation.max_pressure["vec"] == 31
    assert "vmovaps.512" not in names(allocation.function)
    assert allocation.moves_removed == 2 * 28 * steps + 1


def test_no_spill_names_what_is_live_at_the_crowded_place() -> None:
    function = register_accumulations(30, 1)
    with pytest.raises(AllocationError) as caught:
        allocate(function, register_file(), no_spill=True)
    text = str(caught.value)
    assert "33 are wanted, expected at most 32" in text
    assert text.count("%vec") >= 33
    assert "mend" in text
    assert allocate(function, register_file()).spills > 0


def test_constants_are_made_again_instead_of_spilled() -> None:
    code = Code()
    base = code.new("gpr")
    code.put("mov.64", base, RDI)
    constants = [code.new("vec") for _ in range(6)]
    for number, constant in enumerate(constants):
        code.put("vbroadcastss.512", constant, Memory(label="constant", disp=4 * number))
    code.label("loop")
    value = code.new("vec")
    code.put("vmovups.512", value, Memory(base))
    for constant in constants:
        code.put("vaddps.512", value, value, constant)
    code.put("vmovups.512", Memory(base), value)
    code.put("sub.64", base, Immediate(64))
    code.put("jne", LabelReference("loop"))
    code.put("ret")
    function = code.function()
    abi = small_file(6, 4, 1)
    allocation = both_run_alike(function, abi)
    assert allocation.rematerialised and not allocation.spills and not allocation.slots


def test_what_a_loop_uses_is_loaded_before_it_and_stored_after_it() -> None:
    """Nine values, six registers: the inner loop needs three of them, and changes one."""
    code = Code()
    base = code.new("gpr")
    code.put("mov.64", base, RDI)
    values = [code.new("gpr") for _ in range(9)]
    for number, value in enumerate(values):
        code.put("mov.64", value, Memory(base, disp=8 * number))
    code.label("outer")
    for one, other in itertools.pairwise(values):
        code.put("lea.64", one, Memory(one, other))
    code.label("inner")
    code.put("lea.64", values[0], Memory(values[0], values[1], 1, 1))
    code.put("mov.64", Memory(values[1]), values[0])
    code.put("sub.64", values[2], Immediate(1))
    code.put("jne", LabelReference("inner"))
    code.put("sub.64", values[8], Immediate(1))
    code.put("jne", LabelReference("outer"))
    for number, value in enumerate(values):
        code.put("mov.64", Memory(base, disp=8 * number), value)
    code.put("ret")
    allocation = both_run_alike(code.function(), small_file(6, 4, 1))
    body = allocation.function.body
    labels = {item.name: place for place, item in enumerate(body) if isinstance(item, Label)}
    end = next(p for p, item in enumerate(body) if isinstance(item, Instruction) and item.row.name == "jne")
    stack = Register("gpr", 4)

    def in_frame(items: list[Instruction | Label]) -> int:
        return sum(isinstance(o, Memory) and o.base == stack
                   for item in items if isinstance(item, Instruction) for o in item.operands)

    assert in_frame(body[labels["inner"]:end + 1]) == 0
    assert in_frame(body[labels["outer"]:labels["inner"]]) > 3
    assert allocation.spills > 0


def test_a_spilled_value_that_is_read_once_is_a_memory_operand() -> None:
    code = Code()
    base = code.new("gpr")
    code.put("mov.64", base, RDI)
    values = [code.new("gpr") for _ in range(8)]
    for number, value in enumerate(values):
        code.put("mov.64", value, Memory(base, disp=8 * number))
    total = code.new("gpr")
    code.put("mov.32", total, Immediate(0))
    for value in values:
        code.put("add.64", total, value)
    code.put("mov.64", Memory(base), total)
    code.put("ret")
    allocation = both_run_alike(code.function(), small_file(5, 4, 1))
    assert allocation.folded == allocation.spills == 5 and not allocation.reloads


def test_a_row_without_a_memory_form_gets_a_register() -> None:
    """vpsrld by an immediate takes memory only where there is EVEX."""
    for masks, folded in ((1, True), (0, False)):
        code = Code()
        base = code.new("gpr")
        code.put("mov.64", base, RDI)
        values = [code.new("vec") for _ in range(6)]
        for number, value in enumerate(values):
            code.put("vmovups.256", value, Memory(base, disp=32 * number))
        for number, value in enumerate(values):
            shifted = code.new("vec")
            code.put("vpsrld.imm.256", shifted, value, Immediate(1))
            code.put("vmovups.256", Memory(base, disp=32 * number), shifted)
        code.put("ret")
        allocation = both_run_alike(code.function(), small_file(6, 4, masks, 256))
        assert bool(allocation.folded) is folded and bool(allocation.reloads) is not folded


def test_scheduling_and_spilling_analyse_the_code_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[MachineFunction] = []

    def counted(function: MachineFunction, abi: RegisterFile) -> Flow:
        calls.append(function)
        return analyse(function, abi)

    monkeypatch.setattr(joined, "analyse", counted)
    abi = small_file(6, 8, 1)
    function = register_accumulations(20, 2)
    before, _ = simulate(function, abi)
    classes = joined.Classes(function, abi)
    schedule(function, abi, classes)
    allocation = allocate(function, abi, classes=classes)
    assert allocation.spills > 10 and len(calls) == 1
    check(function, allocation.function, allocation.origin, abi, framed=False)
    assert simulate(allocation.function, abi)[0] == before


def test_masks_go_to_memory_and_k0_is_never_used() -> None:
    code = Code()
    base = code.new("gpr")
    code.put("mov.64", base, RDI)
    values = [code.new("vec") for _ in range(2)]
    for number, value in enumerate(values):
        code.put("vmovups.512", value, Memory(base, disp=64 * number))
    masks = [code.new("mask") for _ in range(9)]
    for number, mask in enumerate(masks):
        code.put("vcmpps.k.512", mask, *values, Immediate(number))
    for mask in masks:
        code.put("vaddps.512", values[0], values[0], values[1], mask=mask)
    code.put("vmovups.512", Memory(base), values[0])
    code.put("ret")
    function = code.function()
    allocation = both_run_alike(function, register_file())
    assert allocation.spills == 2
    for item in allocation.function.body:
        if isinstance(item, Instruction):
            assert item.mask != Register("mask", 0) and Register("mask", 0) not in item.operands


def test_fixed_registers_are_reached_without_moves() -> None:
    """A count that ends in cl and a quotient that begins in rax need no copy."""
    code = Code()
    count, value, base = code.new("gpr"), code.new("gpr"), code.new("gpr")
    code.put("mov.64", base, RDI)
    code.put("mov.64", count, Memory(base))
    code.put("mov.64", value, Memory(base, disp=8))
    code.put("mov.64", RCX, count)
    code.put("shl.cl.64", value, RCX)
    code.put("mov.64", Memory(base), value)
    code.put("ret")
    allocation = both_run_alike(code.function(), register_file())
    assert names(allocation.function) == ["mov.64", "mov.64", "shl.cl.64", "mov.64", "ret"]


def test_hint_is_followed() -> None:
    code = Code()
    base = code.new("gpr")
    hinted = VirtualRegister("gpr", 100, Register("gpr", 9))
    code.put("mov.64", base, RDI)
    code.put("mov.64", hinted, Memory(base))
    code.put("mov.64", Memory(base), hinted)
    code.put("ret")
    allocation = both_run_alike(code.function(), register_file())
    assert Register("gpr", 9) in allocation.function.body[0].operands  # type: ignore[union-attr]


def test_gather_keeps_mask_index_and_result_apart() -> None:
    code = Code()
    base = code.new("gpr")
    code.put("mov.64", base, RDI)
    index, result, mask = code.new("vec"), code.new("vec"), code.new("mask")
    code.put("vmovups.512", index, Memory(base))
    code.put("vpxord.512", result, result, result)
    code.put("kxnorq", mask, mask, mask)
    code.put("vgatherdps.512", result, Memory(base, index, 4), mask=mask)
    code.put("vmovups.512", Memory(base), result)
    code.put("ret")
    allocation = both_run_alike(code.function(), register_file())
    gather = next(i for i in allocation.function.body if isinstance(i, Instruction) and i.row.name == "vgatherdps.512")
    assert isinstance(gather.operands[1], Memory) and gather.operands[0] != gather.operands[1].index


def test_register_read_before_written_is_an_error() -> None:
    code = Code()
    value, total = code.new("vec"), code.new("vec")
    code.put("vaddps.512", value, total, total)
    code.put("ret")
    with pytest.raises(AllocationError, match=r"may be read before it is written.*vaddps.512.*mend"):
        allocate(code.function(), register_file())


def test_merging_write_reads_its_target() -> None:
    code = Code()
    mask, value = code.new("mask"), code.new("vec")
    code.put("kxnorq", mask, mask, mask)
    code.put("vmovups.512", value, Memory(RDI), mask=mask)
    code.put("ret")
    with pytest.raises(AllocationError, match="read before it is written"):
        allocate(code.function(), register_file())


@pytest.mark.parametrize(
    ("rows", "message"),
    [([("jmp", LabelReference("nowhere"))], "nowhere"), ([("mov.64", RDI, RSI)], "runs off its end")],
)
def test_broken_control_flow_is_an_error(rows: list[tuple[object, ...]], message: str) -> None:
    code = Code()
    for row in rows:
        code.put(*row)  # type: ignore[arg-type]
    with pytest.raises(AllocationError, match=message):
        allocate(code.function(), register_file())


def test_input_is_not_changed() -> None:
    function = register_accumulations(30, 1)
    before = [(i.row.name, repr(i.operands)) for i in function.body if isinstance(i, Instruction)]
    allocate(function, register_file())
    assert before == [(i.row.name, repr(i.operands)) for i in function.body if isinstance(i, Instruction)]


def test_same_input_same_code() -> None:
    texts = []
    for _ in range(2):
        allocation = allocate(Generator(5, 60).code.function(), small_file(7, 5, 2))
        texts.append([(i.row.name, i.operands) for i in allocation.function.body if isinstance(i, Instruction)])
    assert texts[0] == texts[1]


def test_frame_is_aligned_for_the_widest_spill_and_restores_saved_registers() -> None:
    function = register_accumulations(30, 1)
    abi = register_file()
    allocation = allocate(function, abi)
    finish_frame(allocation.function, abi, allocation.origin)
    check(function, allocation.function, allocation.origin, abi)
    text = names(allocation.function)
    assert text[:4] == ["mov.64", "sub.64", "and.64", "mov.64"]
    assert text[-3:] == ["vzeroupper", "mov.64", "ret"]
    aligned = next(i for i in allocation.function.body if isinstance(i, Instruction) and i.row.name == "and.64")
    assert aligned.operands[1] == Immediate(-64)
    assert all(slot.memory.disp % slot.size_bytes == 0 for slot in allocation.slots)


def test_small_function_has_no_frame() -> None:
    code = Code()
    code.put("mov.64", RAX, Memory(RDI))
    code.put("ret")
    function = code.function()
    allocation = allocate(function, register_file())
    finish_frame(allocation.function, register_file(), allocation.origin)
    assert names(allocation.function) == ["mov.64", "ret"]


def test_loop_depth_and_ranges() -> None:
    function = register_accumulations(4, 1)
    abi = register_file()
    flow = analyse(function, abi)
    assert flow.depth == [0, 1, 0]
    ranges = Ranges(flow, sum(len(n) for n in abi.registers.values()))
    total = flow.node_of[function.body[5].operands[0]]  # type: ignore[union-attr]
    assert ranges.first(total) == 2 * 5 + 1


def test_a_loop_weighs_more_than_the_one_around_it_however_deep_it_lies() -> None:
    """Attention's sums are in a loop in seven others, and went to the frame for what the seventh names."""
    code = Code()
    count = code.new("gpr")
    code.put("mov.64", count, RDI)
    for depth in range(9):
        code.label(f"loop{depth}")
        code.put("add.64", count, Immediate(1))
    for depth in reversed(range(9)):
        code.put("sub.64", count, Immediate(1))
        code.put("jne", LabelReference(f"loop{depth}"))
    code.put("mov.64", RAX, count)
    code.put("ret")
    flow = analyse(code.function(), register_file())
    weight = dict(zip(flow.depth, flow.weight, strict=True))
    assert all(weight[depth] < weight[depth + 1] for depth in range(9))


def test_allocation_and_check_are_fast() -> None:
    abi = register_file()
    function = register_accumulations(28, 14, copies=False)
    best = 1.0
    for _ in range(5):
        start = time.thread_time()
        allocation = allocate(function, abi)
        check(function, allocation.function, allocation.origin, abi, framed=False)
        best = min(best, time.thread_time() - start)
    assert len(function.body) > 600
    assert best < 0.100, f"{best * 1000:.1f} ms for {len(function.body)} instructions; expected some 10"


def instructions(*rows: tuple[object, ...]) -> MachineFunction:
    code = Code()
    for row in rows:
        if len(row) == 1 and str(row[0]).endswith(":"):
            code.label(str(row[0])[:-1])
        else:
            code.put(*row)  # type: ignore[arg-type]
    function = code.function()
    function.frame_bytes = 64
    return function


RSP = Register("gpr", 4)


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [
        ("move to itself", [("mov.64", RDI, RDI), ("ret",)], ["ret"]),
        ("move to itself", [("mov.32", RDI, RDI), ("ret",)], ["mov.32", "ret"]),
        ("jump to next", [("jmp", LabelReference("a")), ("b:",), ("a:",), ("ret",)], ["ret"]),
        ("jump to next", [("je", LabelReference("a")), ("a:",), ("ret",)], ["ret"]),
        ("jump to next", [("je", LabelReference("a")), ("jmp", LabelReference("a")), ("a:",), ("ret",)], ["ret"]),
        ("jump to next", [("je", LabelReference("b")), ("jmp", LabelReference("a")), ("b:",), ("a:",), ("ret",)],
         ["ret"]),
        ("unreachable", [("ret",), ("mov.64", RDI, RSI), ("a:",), ("ret",)], ["ret", "ret"]),
        (
            "known reload",
            [("mov.64", Memory(RSP, disp=8), RDI), ("mov.64", RDI, Memory(RSP, disp=8)), ("a:",),
             ("mov.64", RSI, Memory(RSP, disp=8)), ("ret",)],
            ["mov.64", "mov.64", "ret"],
        ),
        (
            "known reload",
            [("mov.64", RDI, Memory(RSP, disp=8)), ("add.64", RDI, RSI), ("mov.64", RDI, Memory(RSP, disp=8)),
             ("ret",)],
            ["mov.64", "add.64", "mov.64", "ret"],
        ),
        ("dead spill", [("mov.64", Memory(RSP, disp=8), RDI), ("ret",)], ["ret"]),
        (
            "dead spill",
            [("mov.64", Memory(RSP, disp=8), RDI), ("add.64", RSI, Memory(RSP, disp=8)), ("ret",)],
            ["mov.64", "add.64", "ret"],
        ),
    ],
)
def test_peephole_rule(rule: str, before: list[tuple[object, ...]], after: list[str]) -> None:
    function = instructions(*before)
    counts = peephole(function, register_file())
    assert names(function) == after
    assert (counts[rule] > 0) == (len(after) < len([row for row in before if not str(row[0]).endswith(":")]))
    assert all(count == 0 for name, count in counts.items() if name != rule)


def test_reload_into_another_register_becomes_a_copy() -> None:
    function = instructions(
        ("mov.64", Memory(RSP, disp=8), RDI), ("mov.64", RSI, Memory(RSP, disp=8)), ("a:",),
        ("mov.64", RAX, Memory(RSP, disp=8)), ("ret",),
    )
    peephole(function, register_file())
    assert function.body[1].operands == [RSI, RDI]  # type: ignore[union-attr]
    assert names(function)[-2:] == ["mov.64", "ret"]


@settings(max_examples=examples(60))
@given(st.integers(0, 1 << 32), st.integers(10, 70))
def test_peephole_keeps_what_random_programs_do(seed: int, statements: int) -> None:
    function = Generator(seed, statements).code.function()
    abi = small_file(6, 3, 1)
    before, _ = simulate(function, abi)
    allocated = allocate(function, abi).function
    finish_frame(allocated, abi)
    size = len(allocated.body)
    counts = peephole(allocated, abi)
    after, _ = simulate(allocated, abi)
    # The simulator stops after so many jumps, so the runs are the same only where none is gone.
    if not counts["jump to next"] and not counts["unreachable"]:
        assert after == before
    assert len(allocated.body) <= size


def test_subtracting_a_number_is_no_idiom() -> None:
    """sub r, r makes zero whatever r holds; sub r, 1 does not, though it names one register only."""
    same = Instruction(ROWS["sub.64"], [RDI, RDI])
    number = Instruction(ROWS["sub.64"], [RDI, Immediate(1)])
    table = facts_table(register_file())
    assert is_idiom(same, table[same.row]) and not is_idiom(number, table[number.row])
    ones = Instruction(ROWS["vpternlogd.512"], [Register("vec", 1)] * 3 + [Immediate(0xFF)])
    other = Instruction(ROWS["vpternlogd.512"], [Register("vec", 1)] * 3 + [Immediate(0x96)])
    assert is_idiom(ones, table[ones.row]) and not is_idiom(other, table[other.row])


# ---- tiles

def tiled(accumulators: int, operands: int = 2) -> MachineFunction:
    """Products of so many sums, held through a loop, from operands that are loaded in each round."""
    code = Code()
    stride, count = code.new("gpr"), code.new("gpr")
    code.put("ldtilecfg", Memory(RDI))
    code.put("mov.64", stride, Immediate(64))
    code.put("mov.64", count, Immediate(3))
    sums = [code.new("tile") for _ in range(accumulators)]
    for total in sums:
        code.put("tilezero", total)
    code.label("loop")
    loaded = [code.new("tile") for _ in range(operands)]
    for number, operand in enumerate(loaded):
        code.put("tileloadd", operand, Memory(RSI, stride, 1, 1024 * number))
    for number, total in enumerate(sums):
        code.put("tdpbssd", total, loaded[number % operands], loaded[(number + 1) % operands])
    code.put("dec.64", count)
    code.put("jne", LabelReference("loop"))
    for number, total in enumerate(sums):
        code.put("tilestored", Memory(RDI, stride, 1, 1024 * number), total)
    code.put("tilerelease")
    code.put("ret")
    return code.function()


def test_eight_tiles_are_given_out_and_checked() -> None:
    function, abi = tiled(6), register_file()
    allocation = allocate(function, abi)
    check(function, allocation.function, allocation.origin, abi)
    named = {o.number for i in allocation.function.body if isinstance(i, Instruction) for o in i.operands
             if isinstance(o, Register) and o.kind == "tile"}
    assert named == set(range(8)) and allocation.max_pressure["tile"] == 8 and not allocation.spills


def test_tiles_that_do_not_suffice_are_never_spilled() -> None:
    with pytest.raises(AllocationError, match=r"tile registers do not suffice .* 9 are wanted, expected at most 8; "
                                              r"mend: smaller tiles or fewer values kept\. "):
        allocate(tiled(7), register_file())


def test_a_configuration_leaves_no_tile_as_it_was() -> None:
    code = Code()
    tile, stride = code.new("tile"), code.new("gpr")
    code.put("mov.64", stride, Immediate(64))
    code.put("ldtilecfg", Memory(RDI))
    code.put("tilezero", tile)
    code.put("ldtilecfg", Memory(RDI, disp=64))
    code.put("tilestored", Memory(RSI, stride), tile)
    code.put("ret")
    with pytest.raises(AllocationError, match="tile registers do not suffice"):
        allocate(code.function(), register_file())


def test_a_tile_taken_for_another_is_found() -> None:
    function, abi = tiled(2), register_file()
    allocation = allocate(function, abi)
    product = next(i for i in allocation.function.body if isinstance(i, Instruction) and i.row.mnemonic == "tdpbssd")
    product.operands[0] = Register("tile", 7)
    with pytest.raises(CheckError, match="tdpbssd"):
        check(function, allocation.function, allocation.origin, abi)


def test_rows_of_tiles_in_memory_keep_their_order() -> None:
    """Whatever lies between two addresses: a row of one tile may be another row of the other."""
    code = Code()
    stride, tile, other, left, right = code.new("gpr"), *(code.new("tile") for _ in range(4))
    code.put("mov.64", stride, Immediate(2048))
    code.put("ldtilecfg", Memory(RDI))
    code.label("main")
    for number, loaded in enumerate((tile, left, right)):
        code.put("tileloadd", loaded, Memory(RDX, stride, 1, 64 * number))
    for _ in range(6):
        code.put("tdpbssd", tile, left, right)
    code.put("tilestored", Memory(RSI, stride, 1, 2048), tile)
    code.put("tileloadd", other, Memory(RSI, stride, 1, 0))  # its second row is the first of what was stored
    for _ in range(6):
        code.put("tdpbssd", other, left, right)
    code.put("tilestored", Memory(RDI, stride, 1, 0), other)
    code.put("tilerelease")
    code.put("ret")
    function = code.function()
    schedule(function, register_file())
    accesses = [(i.row.mnemonic, o.disp) for i in function.body if isinstance(i, Instruction)
                for o in i.operands if isinstance(o, Memory) and o.base == RSI]
    assert accesses == [("tilestored", 2048), ("tileloadd", 0)]
