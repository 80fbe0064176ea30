"""Register allocation and the frame: allocated code runs as the code before it, and good code stays good."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.codegen.allocate import Allocation, allocate
from sapper.codegen.check import check
from sapper.codegen.frame import finish_frame
from sapper.codegen.liveness import (
    BRANCH,
    JUMP,
    READ,
    RETURN,
    WRITE,
    AllocationError,
    analyse,
    facts_table,
    is_idiom,
    live_ranges,
)
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
from sapper.targets.x86_64.allocation import RegisterFile, register_file
from sapper.targets.x86_64.instructions import ROWS

RDI, RSI, RAX, RCX = Register("gpr", 7), Register("gpr", 6), Register("gpr", 0), Register("gpr", 1)


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


def small_file(gprs: int = 4, vectors: int = 4, masks: int = 2) -> RegisterFile:
    """x86-64 with few registers, so that allocation has to work for its living."""
    full = register_file(512, True)
    order = (0, 1, 7, 6, 2, 3, 5, 12, 13)  # some callee-saved ones among them
    return RegisterFile(
        {"gpr": order[:gprs], "vec": tuple(range(vectors)), "mask": full.registers["mask"][:masks]}, 512
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


def simulate(function: MachineFunction, abi: RegisterFile, branches: int = 40) -> tuple[list[object], dict[object, int]]:
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
            put(*self.random.choice((("mov.64", self.memory(), some("gpr")), ("vmovups.512", self.memory(), some("vec")))))
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
            put("vcmpps.512", target, some("vec"), some("vec"), Immediate(1))
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


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 1 << 32), st.integers(3, 70), st.integers(6, 9), st.integers(3, 8), st.integers(1, 4))
def test_random_programs_run_as_before(seed: int, statements: int, gprs: int, vectors: int, masks: int) -> None:
    function = Generator(seed, statements).code.function()
    both_run_alike(function, small_file(gprs, vectors, masks))
