"""Code by hand in rows of other families: it does what the rows of x86-64 do on this processor."""

from __future__ import annotations

import hashlib
import random
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapper.ahead.digest import digest, digest_function
from sapper.codegen.compile import encoded, text_of
from sapper.codegen.encode import encode
from sapper.codegen.listing import Listing, at
from sapper.codegen.machine import Immediate, MachineFunction, Memory, Register
from sapper.codegen.translate import INVERSE, TranslationError, cpu_check, translated
from sapper.emulate import CODE_RUNNERS
from sapper.runtime.loader import load
from sapper.runtime.program_code import program_function
from sapper.runtime.workers_code import enter, launch_function, leave, work_function
from sapper.targets import target
from sapper.targets.linux import CALLS
from sapper.targets.x86_64.instructions import ROWS
from sapper.targets.x86_64.registers import R8, R9, R10, R11, R12, R13, R14, R15, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP
from tests.codegen.run_native import RUNNABLE
from tests.targets.on_emulators import TARGETS, needs_emulator
from tests.targets.riscv64.by_meaning import run_by_meaning

NAMES = [names[0] for names in TARGETS.values()]
RECORDED = Path(__file__).with_name("translated.txt")
"""Digests of the bytes of what starts and runs programs, as emulators ran it in tests/ahead/test_families.py;
`python -m tests.codegen.test_translate` makes them."""
GENERAL = (RAX, RBX, RCX, RDX, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15)
DATA, DATA_BYTES = 128, 256
"""In the state: registers before it."""
natively = pytest.mark.skipif(not RUNNABLE, reason="this CPU runs no kernels")


class Program:
    """A function of random operations: loads all registers from the state, and puts them there again."""

    def __init__(self, seed: int, count: int, rules: tuple[str, ...] = ()) -> None:
        self.choose, self.emit, self.labels = random.Random(seed), Listing(), 0
        enter(self.emit)
        self.emit("mov.64", RBP, at(RDI, 24))
        for place, register in enumerate(GENERAL):
            self.emit("mov.64", register, at(RBP, 8 * place))
        for _ in range(count):
            getattr(self, self.choose.choice(rules or self.RULES))()
        for place, register in enumerate(GENERAL):
            self.emit("mov.64", at(RBP, 8 * place), register)
        leave(self.emit)
        for name in ("routine", "again"):       # the first one runs on into the second
            self.emit.label(name)
            self.emit("push", RSI)
            self.emit("add.64", RSI, Immediate(3))
            self.emit("pop", RAX)
        self.emit("cmp.64", RAX, RSI)
        self.emit("ret")

    RULES = ("overflows", "signed_quotients",
             "moves", "bytes", "extended", "addresses", "computed", "computed", "memory_computed", "shifted",
             "products", "compared", "compared", "borrowed", "called", "stacked", "atomic", "floats")

    @property
    def function(self) -> MachineFunction:
        return MachineFunction("program", self.emit.body, {})

    def register(self) -> int:
        return self.choose.choice(GENERAL)

    def memory(self) -> Memory:
        """Somewhere in the data, perhaps with an index."""
        disp = DATA + self.choose.randrange(0, DATA_BYTES // 2)
        if self.choose.random() < 0.6:
            return at(RBP, disp)
        index, scale = self.choose.choice(GENERAL), self.choose.choice([1, 2, 4, 8])
        self.emit("and.64", index, Immediate(15))
        return Memory(Register("gpr", RBP), Register("gpr", index), scale, disp)

    def number(self) -> Immediate:
        return Immediate(self.choose.choice([0, 1, -1, 7, -128, 2047, 4096, 0x7FFFFFFF, -0x80000000, 65535,
                                             self.choose.randrange(-1 << 31, 1 << 31)]))

    def label(self) -> str:
        self.labels += 1
        return f"label{self.labels}"

    # --- What it is made of -----------------------------------------------------------------------------------------

    def moves(self) -> None:
        bits, register = self.choose.choice(["32", "64"]), self.register()
        how = self.choose.randrange(5)
        if how == 0:
            self.emit(f"mov.{bits}", register, self.memory())
        elif how == 1:
            self.emit(f"mov.{bits}", self.memory(), register)
        elif how == 2:
            self.emit(f"mov.{bits}", register, self.register())
        elif how == 3:
            self.emit(f"mov.{bits}", self.memory(), self.number())
        else:
            self.emit("mov.64", register, Immediate(self.choose.randrange(-1 << 63, 1 << 63)))

    def bytes(self) -> None:
        memory = self.memory()
        self.emit("mov.8", self.register(), memory)
        self.emit("mov.8", self.memory(), self.register())

    def extended(self) -> None:
        row = self.choose.choice([name for name in ROWS if name.startswith(("movzx.", "movsx."))] + ["movsxd"])
        from_register = row == "movzx.8.32" and self.choose.random() < 0.5
        source: Any = self.register() if from_register else self.memory()
        self.emit(row, self.register(), source)

    def addresses(self) -> None:
        index = self.choose.choice([None, self.register()])
        memory = Memory(Register("gpr", self.register()), None if index is None else Register("gpr", index),
                        1 if index is None else self.choose.choice([1, 2, 4, 8]), self.number().value)
        self.emit(self.choose.choice(["lea.64", "lea.32"]), self.register(), memory)

    def computed(self) -> None:
        bits, name = self.choose.choice(["32", "64"]), self.choose.choice(["add", "sub", "and", "or", "xor"])
        register, how = self.register(), self.choose.randrange(3)
        second = [self.register, self.number, self.memory][how if name in ("add", "sub") else how % 2]()
        self.emit(f"{name}.{bits}", register, second)
        if self.choose.random() < 0.3:
            self.emit(self.choose.choice(["not.32", "not.64", "neg.64"]), self.register())

    def memory_computed(self) -> None:
        memory = self.memory()
        if self.choose.random() < 0.5:
            self.emit("add.32", memory, self.number())
        else:
            self.emit(self.choose.choice(["add.64", "and.64"]), memory, self.register())

    def shifted(self) -> None:
        bits = self.choose.choice([32, 64])
        name = self.choose.choice(["shl", "shr", "rol"])
        bits = 64 if name == "rol" else bits
        self.emit(f"{name}.imm.{bits}", self.register(), Immediate(self.choose.randrange(1, bits)))
        if self.choose.random() < 0.3:
            self.emit("shl.cl.64", self.choose.choice([r for r in GENERAL if r != RCX]), RCX)

    def products(self) -> None:
        how = self.choose.randrange(3)
        if how == 0:
            self.emit("imul.64", self.register(), self.register())
        elif how == 1:
            self.emit(self.choose.choice(["imul.imm.64", "imul.imm.32"]), self.register(), self.register(),
                      self.number())
        else:
            divisor = self.choose.choice([r for r in GENERAL if r not in (RAX, RDX)])
            self.emit("shr.imm.64", RAX, Immediate(32))
            self.emit("shr.imm.64", divisor, Immediate(40))
            self.emit("mul.64", divisor)
            self.emit("or.64", divisor, Immediate(1 << 20))         # not 0
            self.emit("shr.imm.64", divisor, Immediate(self.choose.randrange(20)))
            self.emit("div.64", divisor)

    def setter(self) -> list[str]:
        """What sets flags, and the conditions that hold of it."""
        bits, name = self.choose.choice(["32", "64"]), self.choose.choice(["cmp", "cmp", "cmp", "test", "sub", "add",
                                                                           "and", "cmp.8"])
        if name == "cmp.8":
            memory = self.memory()
            self.emit("cmp.8", memory, Immediate(self.choose.randrange(-128, 128)))
            return [c for c in INVERSE if c not in ("s", "ns", "o", "no")]
        register = self.register()
        if name == "test":
            self.emit(f"test.{bits}", register, register if self.choose.random() < 0.5 else self.register())
        elif name == "cmp":
            how = self.choose.randrange(3)
            second: Any = [self.register, self.number, self.memory][how]()
            self.emit(f"cmp.{bits}", register, second)
        else:
            self.emit(f"{name}.{bits}", register, self.choose.choice([self.register, self.number])())
        if name in ("cmp", "sub"):
            return [c for c in INVERSE if c not in ("s", "ns", "o", "no")]
        return ["e", "ne", "s", "ns"] if name == "add" else ["e", "ne", "s", "ns", "l", "ge", "g", "le"]

    def compared(self) -> None:
        condition = self.choose.choice(self.setter())
        if self.choose.random() < 0.5:
            self.emit("mov.64", self.register(), Immediate(self.choose.randrange(99)))      # leaves flags
        how = self.choose.randrange(3)
        if how == 0 and f"cmov{condition}.64" in ROWS:
            self.emit(f"cmov{condition}.{self.choose.choice(['32', '64'])}", self.register(), self.register())
        elif how == 1 and f"set{condition}.8" in ROWS:
            self.emit(f"set{condition}.8", self.register())
        else:
            label = self.label()
            self.emit(f"j{condition}", label)
            self.computed()
            self.emit.label(label)

    def borrowed(self) -> None:
        self.emit("cmp.32", self.register(), Immediate(1))
        self.emit("sbb.64", self.register(), Immediate(self.choose.choice([-1, 5])))

    def overflows(self) -> None:
        register, label = self.register(), self.label()
        if self.choose.random() < 0.5:      # near the end of what there is
            self.emit("mov.64", register, Immediate(self.choose.choice([-1 << 63, (1 << 63) - 1, 1 << 32, -3])))
        name = self.choose.choice(["add", "sub", "imul"])
        second: Any = self.choose.choice([self.register, self.memory] + [self.number] * (name != "imul"))()
        self.emit(f"{name}.64", register, second)
        self.emit(self.choose.choice(["jo", "jno"]) if "jno" in ROWS else "jo", label)
        self.emit("add.64", RDX, Immediate(1))
        self.emit.label(label)
        if self.choose.random() < 0.5:
            self.emit("cmp.64", RDX, Immediate(5))
            self.emit("cmovl.64", RDX, self.memory())

    def signed_quotients(self) -> None:
        divisor = self.choose.choice([r for r in GENERAL if r not in (RAX, RDX)])
        self.emit("sar.imm.64", divisor, Immediate(self.choose.randrange(1, 50)))
        self.emit("or.64", divisor, Immediate(1 << 8))      # neither 0 nor -1
        self.emit("and.64", divisor, Immediate(-256))
        self.emit("cqo")
        self.emit("idiv.64", divisor)

    def called(self) -> None:
        """Flags outlive a routine."""
        label = self.label()
        self.emit("call", self.choose.choice(["routine", "again"]))
        self.emit(self.choose.choice(["jb", "je", "jg"]), label)
        self.emit("add.64", RDX, Immediate(1))
        self.emit.label(label)

    def stacked(self) -> None:
        first, second = self.choose.choice([r for r in GENERAL if r != R9]), self.register()
        self.emit("push", first)
        self.emit("sub.64", RSP, Immediate(24))
        self.emit("mov.64", at(RSP, 8), second)
        self.emit("lea.64", R9, at(RSP, 8))
        self.emit("add.64", at(R9), first)
        self.emit("mov.64", R9, at(RSP, 8))
        self.emit("add.64", RSP, Immediate(24))
        self.emit("pop", self.register())

    def atomic(self) -> None:
        memory = at(RBP, DATA + 4 * self.choose.randrange(DATA_BYTES // 4))
        how = self.choose.randrange(4)
        if how == 0:
            self.emit("lock.xadd.32", memory, self.register())
        elif how == 1:
            self.emit("xchg.32", memory, self.register())
        elif how == 2:
            self.emit("lock.sub.32", memory, self.number())
        else:
            if self.choose.random() < 0.5:
                self.emit("mov.32", RAX, memory)
            label = self.label()
            self.emit("lock.cmpxchg.32", memory, self.choose.choice([r for r in GENERAL if r != RAX]))
            self.emit("jne", label)
            self.emit("add.64", RSI, Immediate(1))
            self.emit.label(label)
            self.emit("mov.32", RAX, memory)      # what it is where nothing was exchanged is left open

    def floats(self) -> None:
        first, second = Register("vec", 0), Register("vec", 1)
        for register, source in ((first, self.register()), (second, self.register())):
            self.emit("vmovq.to_vec", register, source)
            self.emit("vcvtsi2sd.64", register, register, source)
        self.emit("vdivsd", first, first, second)
        self.emit("vcvtsd2ss", first, first, first)
        memory = at(RBP, DATA + 4 * self.choose.randrange(DATA_BYTES // 4))
        self.emit("vmovss", memory, first)
        source = self.register()
        self.emit("vmovd.to_vec", first, source)
        self.emit("vcvtsi2ss.32", first, first, source)
        self.emit("mov.32", memory, Immediate(0x3E800000))
        self.emit("vmulss", first, first, memory)
        self.emit("vmovss", memory, first)


def a_state(seed: int) -> np.ndarray:
    choose = random.Random(seed)
    words = [choose.choice([choose.getrandbits(64), choose.getrandbits(32), choose.randrange(100)])
             for _ in range((DATA + DATA_BYTES) // 8)]
    return np.array(words, np.uint64)


def by_this_cpu(function: MachineFunction, state: np.ndarray) -> np.ndarray:
    left = state.copy()
    words = np.array([0, 0, 0, left.ctypes.data], np.int64)
    load(encode(function).code).function(words.ctypes.data, 0, 1)
    return left


def by_emulator(function: MachineFunction, state: np.ndarray, name: str) -> np.ndarray:
    facts, left = target(name), state.copy()
    runner = CODE_RUNNERS[facts.family]
    code = encoded(translated(function, facts, ordered=True), facts).code
    import_module(f"sapper.emulate.{runner.module}").run_code(
        code, lambda buffers: [buffers.add_array(left)], 0, **{fact: getattr(facts, fact) for fact in runner.facts})
    return left


def by_meaning(function: MachineFunction, state: np.ndarray) -> np.ndarray:
    left = state.copy()
    run_by_meaning(translated(function, target("rva23u64")), 128, lambda buffers: [buffers.add_array(left)], 0)
    return left


@natively
@pytest.mark.parametrize("rule", sorted(set(Program.RULES)))
def test_each_operation_by_the_meanings_of_rows(rule: str) -> None:
    for seed in range(3):
        function, state = Program(seed, 12, (rule,)).function, a_state(seed)
        np.testing.assert_array_equal(by_meaning(function, state), by_this_cpu(function, state))


@natively
@pytest.mark.parametrize("family", [pytest.param(one, marks=needs_emulator(one)) for one in TARGETS])
def test_random_programs(family: str) -> None:
    for seed in range(4):
        function, state = Program(seed, 300).function, a_state(seed)
        for name in TARGETS[family][:1]:
            np.testing.assert_array_equal(by_emulator(function, state, name), by_this_cpu(function, state))


@pytest.mark.parametrize("size", [0, 1, 3, 4, 11, 31, 32, 100, 263])
@natively
def test_the_digest_by_the_meanings_of_rows(size: int) -> None:
    """Code that programs have, as continuous integration can run it."""
    content = np.random.default_rng(size).integers(0, 256, 512, np.uint8)
    emit = Listing()
    enter(emit)
    emit("mov.64", RBX, at(RDI, 24))
    emit("mov.64", RDI, RBX)
    emit("mov.32", RSI, Immediate(size))
    emit("call", "digest")
    emit("mov.64", at(RBX, 504), RAX)
    leave(emit)
    emit.label("digest")
    function = MachineFunction("digested", emit.body + digest_function().machine.body, {})
    made = content.copy()
    run_by_meaning(translated(function, target("rva23u64")), 128, lambda buffers: [buffers.add_array(made)], 0)
    assert int(made[504:].view(np.uint64)[0]) == digest(content[:size])


def recorded() -> list[str]:
    """Lines of `family function digest`."""
    lines = []
    for name in NAMES:
        facts = target(name)
        functions = [translated(made, facts, ordered=True)
                     for made in (program_function(), work_function(), launch_function())]
        functions += [translated(digest_function().machine, facts), *cpu_check(facts, facts.features, often=True)[0]]
        lines += [f"{facts.family} {made.name} {hashlib.sha256(encoded(made, facts).code).hexdigest()[:16]}"
                  for made in functions]
    return lines


def test_code_is_that_which_emulators_ran() -> None:
    """What continuous integration, which has no emulator of a whole process, can tell."""
    assert recorded() == RECORDED.read_text().splitlines()


@pytest.mark.parametrize(("name", "message"), [
    ("jb after add", "a carry"), ("flags of imul", "flags"), ("unknown call", "a system call that is not known"),
    ("vector", "a row without a rule"),
])
def test_what_has_no_meaning_elsewhere(name: str, message: str) -> None:
    emit = Listing()
    if name == "jb after add":
        emit("add.64", RAX, RCX)
        emit("jb", "end")
    elif name == "flags of imul":
        emit("imul.64", RAX, RCX)
        emit("je", "end")
    elif name == "unknown call":
        emit("mov.32", RAX, Immediate(39))
        emit("syscall")
    else:
        emit("vaddps.128", *(Register("vec", 0),) * 3)
    emit.label("end")
    emit("ret")
    with pytest.raises(TranslationError, match=message):
        translated(MachineFunction("f", emit.body, {}), target("neoverse-n1"))


def test_a_return_of_the_function_and_of_a_routine() -> None:
    emit = Listing()
    emit("call", "routine")
    emit.label("routine")
    emit("ret")
    with pytest.raises(TranslationError, match="a return of the function and of a routine"):
        translated(MachineFunction("f", emit.body, {}), target("neoverse-n1"))


@natively
@pytest.mark.parametrize("condition", ["b", "ae", "a", "be", "e", "l"])
def test_branches_that_go_far(condition: str) -> None:
    """RISC-V's reach 4 KiB."""
    emit = Listing()
    enter(emit)
    emit("mov.64", RBP, at(RDI, 24))
    emit("mov.64", RAX, at(RBP, 0))
    emit("cmp.64", RAX, at(RBP, 8))
    emit(f"j{condition}", "far")
    for _ in range(1500):
        emit("add.64", RAX, Immediate(1))
    emit.label("far")
    emit("mov.64", at(RBP, 16), RAX)
    leave(emit)
    function = MachineFunction("far", emit.body, {})
    for pair in ((1, 2), (3, 3), ((1 << 64) - 1, 1)):
        state = np.array([*pair, 0], np.uint64)
        np.testing.assert_array_equal(by_meaning(function, state), by_this_cpu(function, state))


def test_loads_and_stores_of_several_threads_have_barriers() -> None:
    emit = Listing()
    emit("mov.64", RAX, at(RDI))
    emit("mov.64", at(RDI, 8), RAX)
    emit("ret")
    function = MachineFunction("f", emit.body, {})
    for name, barrier in zip(NAMES, ("dmb ish", "fence rw, rw"), strict=True):
        facts = target(name)
        lines = [line.strip() for line in text_of(translated(function, facts, ordered=True), facts).splitlines()]
        assert [line.split()[0] for line in lines if line == barrier or line[:2] in ("ld", "st", "sd")][:6].count(
            barrier.split()[0]) == 2
        assert barrier not in text_of(translated(function, facts), facts)


GENERIC, OWN = Path("/usr/include/asm-generic/unistd.h"), Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


@pytest.mark.skipif(not (GENERIC.exists() and OWN.exists()), reason="the headers of Linux are not installed")
def test_system_calls_have_the_numbers_of_linux() -> None:
    def numbers(path: Path, prefix: str) -> dict[str, int]:
        found = re.findall(rf"^#define {prefix}(\w+)\s+(\d+)", path.read_text(), re.MULTILINE)
        return {name.removeprefix("3264_"): int(number) for name, number in found}

    ours, theirs = numbers(OWN, "__NR_"), numbers(GENERIC, "__NR_?")
    names = {number: name for name, number in ours.items()}
    instead = {"open": "openat", "readlink": "readlinkat", "rename": "renameat2", "unlink": "unlinkat"}
    for number, (generic, order) in CALLS.items():
        name = names[number]
        assert theirs[instead.get(name, name)] == generic, name
        assert (order[0] < 0) == (name in instead)


if __name__ == "__main__":
    RECORDED.write_text("\n".join(recorded()) + "\n")
