"""Building a piece of assembly: instructions over virtual and pinned registers, labels, loops, constants.

Enters: calls of mnemonics while an `Assembly` is current. Leaves: machine IR (sapper/codegen/machine.py) and, by
`finish`, code. Holds: instructions stay in the order in which they were written; virtual registers are allocated by
the compiler's own allocator, and its independent checker proves the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..codegen.machine import (
    Immediate,
    Instruction,
    Label,
    LabelReference,
    MachineFunction,
    Memory,
    Operand,
    Register,
    VirtualRegister,
)
from ..ir.nodes import Location
from .errors import AssemblyError, author_location
from .notation import Address, Given, LabelName, Mem, Reg, choose
from .polynomial import Polynomial, Symbol

MOST_IMMEDIATES = 2
"""Of a block."""
_current: ContextVar[Any] = ContextVar("sapper_assembly", default=None)


def current() -> Any:
    """The assembly being built. Raises AssemblyError outside one."""
    found = _current.get()
    if found is None:
        raise AssemblyError("notation", "an instruction is called outside an assembly", author_location(),
                            mend="call it in a function that an assembly is built from, or name it in asm(...)")
    return found


@contextmanager
def made_current(assembly: Any) -> Iterator[None]:
    """Mnemonics called inside add to an assembly."""
    token = _current.set(assembly)
    try:
        yield
    finally:
        _current.reset(token)


@dataclass(frozen=True, slots=True)
class Region:
    """Memory that a piece may touch: `name`, whether it may be written, and its bytes where they are known, which may
    depend on extents.

    axes: of memory that lies in `size_bytes` pieces apart: (count, stride, unit) for each axis, the stride a symbol in
    units of so many bytes. A stride may be negative.
    """

    name: str
    writable: bool
    size_bytes: int | Polynomial | None = None
    axes: tuple[tuple[Polynomial, Symbol, int], ...] = ()

    def goals(self, offset: Polynomial, bytes_: Polynomial) -> list[Polynomial]:
        """What must not be negative, so that so many bytes from an offset on lie inside."""
        if self.size_bytes is None:
            return [offset]
        goals = []
        for count, stride, unit in self.axes:
            parts = offset.parts(stride)
            steps = None if parts is None else parts[0].divided(unit)
            if parts is None or steps is None:
                return [Polynomial.of(-1)]
            offset = parts[1]
            goals += [steps, count - 1 - steps]
        return [*goals, offset, Polynomial.of(self.size_bytes) - offset - bytes_]

    @property
    def symbols(self) -> set[Symbol]:
        found = set() if self.size_bytes is None else Polynomial.of(self.size_bytes).symbols
        for count, stride, _ in self.axes:
            found |= count.symbols | {stride}
        return found

    def described(self, numbers: Mapping[Symbol, int]) -> str:
        """Its bytes, in words, for some extents."""
        if self.size_bytes is None:
            return "bytes from 0 on"
        size = Polynomial.of(self.size_bytes)
        text = f"{size.value(numbers)} bytes" + (f" ({size})" if size.constant is None else "")
        if self.axes:
            text += " at " + ", ".join(f"0 to {count - 1} times {stride.name}" + (f" * {unit}" if unit > 1 else "")
                                       for count, stride, unit in self.axes)
        return text


@dataclass(slots=True)
class Assembly:
    """A piece of assembly by hand.

    table: the target's facts (`sapper/targets/<family>/assembly.py`). body, constants: as in MachineFunction.
    owners: for each instruction the owner of each pinned register that it names. inputs: registers that hold something
    at entry, with the region that they point to. words: of a register that points to a block of words, the regions that
    these point to, by byte offset. numbers, word_numbers: what the others hold, as formulas. assumed: what is never
    negative.
    results: registers whose last value is what the piece gives, where it stores none. naked: the author writes prologue
    and epilogue; no register is virtual. declared: its effects, as `declare` took them. features: those that its author
    says it needs, None where nothing is said. returns: of routines that were copied to where they are called
    (routines.py), what stands for a return, and for its call.
    """

    name: str
    table: Any
    naked: bool = False
    body: list[Instruction | Label] = field(default_factory=list)
    constants: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    owners: dict[Instruction, dict[Any, Any]] = field(default_factory=dict)
    inputs: dict[Any, Region | None] = field(default_factory=dict)
    words: dict[Any, dict[int, Region | None]] = field(default_factory=dict)
    numbers: dict[Any, Polynomial] = field(default_factory=dict)
    word_numbers: dict[tuple[Any, int], Polynomial] = field(default_factory=dict)
    assumed: tuple[Polynomial, ...] = ()
    results: frozenset[Any] = frozenset()
    labels: list[LabelName] = field(default_factory=list)
    register_count: int = 0
    declared: dict[str, Any] | None = None
    features: frozenset[str] | None = None
    returns: dict[Instruction, Instruction] = field(default_factory=dict)

    def declare(self, reads: str = "", writes: str = "", clobbers: str = "", features: str | None = None,
                aligned: Mapping[str, int] | None = None) -> None:
        """Say what the piece does: regions that it reads and writes, physical registers that it overwrites, separated
        by blanks; features of the CPU that it needs; how many bytes a region must be aligned to, which is 1 for one
        that is not named. What the rows say is compared with it (effects.py)."""
        self.declared = {"reads": reads, "writes": writes, "clobbers": clobbers, "features": features,
                         "aligned": aligned, "location": author_location()}

    # --- Registers --------------------------------------------------------------------------------------------------

    def new(self, name: str) -> Reg:
        """A virtual register: "r64", "r32", "xmm", "ymm", "zmm", "k", "tmm" on x86-64."""
        kind, bits = self.table.VIRTUAL[name]
        if self.naked:
            raise AssemblyError("registers", "a naked function has no virtual registers", author_location(), name,
                                "registers by name", "name them, or leave naked out")
        self.register_count += 1
        return Reg(kind, bits, VirtualRegister(kind, self.register_count))

    def r64(self) -> Reg:
        return self.new("r64")

    def xmm(self) -> Reg:
        return self.new("xmm")

    def ymm(self) -> Reg:
        return self.new("ymm")

    def zmm(self) -> Reg:
        return self.new("zmm")

    def tile(self) -> Reg:
        return self.new("tmm")

    def row(self, bits: int) -> Reg:
        """A virtual vector register of so many bits."""
        self.register_count += 1
        return Reg("vec", bits, VirtualRegister("vec", self.register_count))

    def mask(self) -> Reg:
        return self.new("k")

    def pin(self, name: str) -> Reg:
        """The register of this name as an object of its own: if anything else overwrites it while the object is still
        read, that is an error."""
        found = self.table.REGISTERS.get(name)
        if found is None:
            raise AssemblyError("notation", "no register has this name", author_location(), name,
                                "a register of the target, such as rax, zmm3 or k1")
        kind, number, bits = found
        return Reg(kind, bits, Register(kind, number), owner=object())

    # --- Code -------------------------------------------------------------------------------------------------------

    def emit(self, mnemonic: str, operands: Sequence[Any], comment: str = "", location: Location | None = None) -> None:
        """One instruction, as a mnemonic adds it."""
        given: list[Given] = [int(o) if isinstance(o, (int, np.integer)) else o for o in operands]
        for operand in given:
            if not isinstance(operand, (Reg, Mem, int, LabelName)):
                raise AssemblyError("notation", f"an operand of {mnemonic}", author_location(),
                                    f"{type(operand).__name__}: {operand!r}", "a register, memory, an integer, a label")
        self.add(choose(self.table, mnemonic, given), given, comment, location)

    def add(self, row: Any, given: Sequence[Given], comment: str = "", location: Location | None = None) -> None:
        """One instruction whose row is known."""
        where = location or author_location()
        mask, zeroing = None, False
        owners: dict[Any, Any] = {}
        made: list[Operand] = []
        for operand in given:
            if isinstance(operand, (Reg, Mem)) and operand.mask is not None:
                if operand is not given[0] or not row.masking:
                    raise AssemblyError("operands", f"{row.mnemonic} takes no opmask there", where,
                                        found=repr(operand), expected="an opmask on the first operand, if any")
                mask, zeroing = operand.mask, operand.zeroing
                self._own(mask, owners)
            if isinstance(operand, Reg):
                self._own(operand, owners)
                made.append(operand.register)
            elif isinstance(operand, Mem):
                made.append(self._memory(operand, where))
                for part in (operand.address.base, operand.address.index):
                    if part is not None:
                        self._own(part, owners)
            elif isinstance(operand, LabelName):
                made.append(LabelReference(operand.name))
            else:
                made.append(Immediate(operand))
        if row.mask_role == "rw" and mask is None:
            raise AssemblyError("operands", f"{row.mnemonic} needs an opmask", where,
                                expected="an opmask on the first operand", mend="write r[k]")
        instruction = Instruction(row, made, None if mask is None else mask.register, zeroing, where, comment)
        self.body.append(instruction)
        if owners:
            self.owners[instruction] = owners

    def _memory(self, operand: Mem, where: Location | None) -> Memory:
        """Memory of machine IR. Raises AssemblyError for registers that can't be part of an address."""
        address = operand.address
        base, index, scale = address.base, address.index, address.scale
        stack = Register(*self.table.STACK_POINTER)
        if index is not None and base is not None and index.register == stack and scale == 1:
            base, index = index, base
        for part, vector in ((base, ""), (index, " or a vector")):
            if part is not None and (part.kind, part.bits) != ("gpr", 64) and not (vector and part.kind == "vec"):
                raise AssemblyError("operands", "a register of an address", where, repr(part),
                                    f"a general register of 64 bits{vector}", "write r.r64: all its bits count")
        if index is not None and index.register == stack:
            raise AssemblyError("operands", "the stack pointer as an index", where, repr(index),
                                mend="make it the base, or copy it")
        return Memory(None if base is None else base.register, None if index is None else index.register,
                      scale, address.disp, operand.spread != 0, address.label)

    @staticmethod
    def _own(reg: Reg, owners: dict[Any, Any]) -> None:
        if isinstance(reg.register, Register) and reg.owner is not None:
            owners[reg.register] = reg.owner

    def text(self, source: str, syntax: str = "intel", **operands: Any) -> None:
        """Assembly as text: `a.text("vaddps @acc, @acc, [@x + 64]", acc=acc, x=x)`; see text.py.

        syntax: "intel" or "att". operands: what `@name` stands for; `@x:32` is the register x at 32 bits.
        """
        from .text import TextReader

        TextReader(self, syntax, operands, author_location()).read(source)

    def label(self, name: str = "") -> LabelName:
        """A label, still to be placed."""
        made = LabelName(f".{name or 'label'}{len(self.labels)}")
        self.labels.append(made)
        return made

    def place(self, label: LabelName, align: int = 1) -> None:
        """Put a label here. align: a power of two; the code before it is padded."""
        if label.placed:
            raise AssemblyError("notation", "a label is placed twice", author_location(), label.name, "one place")
        label.placed = True
        self.body.append(Label(label.name, align))

    def here(self, name: str = "", align: int = 1) -> LabelName:
        """A label at this place."""
        made = self.label(name)
        self.place(made, align)
        return made

    def constant(self, value: Any, align_bytes: int = 64) -> Address:
        """The address of constant bytes beside the code; equal ones share a place. value: an array, or bytes."""
        data = value if isinstance(value, bytes) else np.ascontiguousarray(value).tobytes()
        for label, (alignment, held) in self.constants.items():
            if held == data and alignment >= align_bytes:
                return Address(label=label)
        label = f".constant{len(self.constants)}"
        self.constants[label] = (align_bytes, data)
        return Address(label=label)

    def input(self, reg: Reg, region: Region | None = None, number: Polynomial | None = None) -> Reg:
        """Declare that a register holds something at entry: a number (as a formula, where it is to bound addresses), or
        the address of a region."""
        self.inputs[reg.register] = region
        if number is not None:
            self.numbers[reg.register] = number
        return reg

    def machine(self) -> MachineFunction:
        """The machine IR. Raises AssemblyError for a label that is used and not placed."""
        for label in self.labels:
            if not label.placed:
                raise AssemblyError("notation", f"label {label.name} is not placed", label.location,
                                    mend="a.place(label)")
        return MachineFunction(self.name, list(self.body), dict(self.constants))

    @contextmanager
    def building(self) -> Iterator[Assembly]:
        """Mnemonics called inside add to this assembly."""
        with made_current(self):
            yield self

    @contextmanager
    def loop(self, start: Reg | int, stop: Reg | int, step: int = 1, align: int = 32) -> Iterator[Reg]:
        """A loop that runs while counter + step <= stop, the counter going up by step; gives the counter.

        After it the counter's register holds where it stopped: start another loop there for what is left (`start` may
        be the counter itself). step: positive. Where numbers say that it runs at all, it does not ask.
        """
        if step < 1:
            raise AssemblyError("loop", "a loop that does not go up", author_location(), str(step), "a positive step")
        emit, where = self.emit, author_location()
        counter = start if isinstance(start, Reg) else self.new("r64")
        if not isinstance(start, Reg):
            emit("mov" if start else "xor", (counter, start) if start else (counter.r32, counter.r32), location=where)
        last: Reg | int
        if isinstance(stop, Reg) and step > 1:
            last = self.new("r64")
            emit("lea", (last, Mem(stop - (step - 1))), location=where)
        elif isinstance(stop, Reg):
            last = stop
        else:
            last = stop - (step - 1) if isinstance(start, Reg) else start + max(0, stop - start) // step * step
        head, end = self.label("loop"), self.label("done")
        if isinstance(start, Reg) or isinstance(last, Reg) or start == last:
            emit("cmp", (counter, last), location=where)
            emit("jge", (end,), location=where)
        self.place(head, align)
        yield counter
        emit("add", (counter, step), location=where)
        emit("cmp", (counter, last), location=where)
        emit("jl", (head,), location=where)
        self.place(end)


class Named:
    """A piece by hand with a name in its target's family. table: of the family. write: its author's function."""

    table: Any
    name: str
    write: Callable[..., Any]

    @property
    def key(self) -> str:
        return f"{self.table.FAMILY}:{self.name}"

    @property
    def module(self) -> str:
        return self.write.__module__


def function(table: Any, name: str, write: Any, naked: bool = False) -> Assembly:
    """An assembly that `write(assembly)` fills."""
    assembly = Assembly(name, table, naked)
    with assembly.building():
        write(assembly)
    return assembly


def with_immediates(name: str, assemble: Callable[[tuple[int, ...], list[int]], tuple[Any, Any, Any]],
                    sizes: tuple[int, ...]) -> Any:
    """The assembly of a block with as many immediates, all 0, as its author's function takes. sizes: bits of an element
    of the result and the inputs. Raises AssemblyError as `assemble` does, or where no number of immediates fits."""
    refusal: AssemblyError | None = None
    for count in range(MOST_IMMEDIATES + 1):
        try:
            return assemble(sizes, [0] * count)[0]
        except TypeError as error:  # the author's function takes another number of arguments
            refusal = refusal or AssemblyError("notation", f"{name} takes no {len(sizes) - 1} inputs", None, str(error))
        except AssemblyError as error:
            if error.kind != "operands":
                raise
            refusal = error
    assert refusal is not None
    raise refusal
