"""Assembly by hand where the target's assembler gives registers (PTX): notation and kernels.

Enters: calls of mnemonics while a `WarpAssembly` is current. Leaves: machine IR over virtual registers, whose text the
vendor's assembler takes. Holds: registers have a size and no type; instructions stay in the order in which they were
written; warp_checks.py says what must hold of them. Instructions and blocks on rows are in warp_block.py.

    v = a.b32()                                  a register of 32 bits: f32, s32 or two bf16, as the instruction sees it
    ptx.ld_global_f32(v, ptx.ptr[x + 8])         ld.global.f32; :: is written __
    ptx.bra(head, when=p)                        under a predicate
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from ..codegen.compile import CompiledCode, text_of
from ..codegen.machine import Immediate, Instruction, Label, LabelReference, MachineFunction, Memory, VirtualRegister
from ..codegen.pipeline import Compiled, stored_tensors
from ..ir.nodes import Location
from ..lane.ops import FIRST_WORDS
from ..lang.by_hand import ByHand
from .arguments import Arguments
from .build import made_current
from .errors import AssemblyError, UnknownInstruction, author_location
from .notation import LabelName, Mem, Reg

WARP_LANES = 32


@dataclass(frozen=True, slots=True)
class FloatBits:
    """A float that is given by its bits. width: 32 or 64."""

    bits: int
    width: int


def unknown(table: Any, mnemonic: str, location: Location | None = None) -> AssemblyError:
    """The error for a form that no row has: the nearest ones."""
    def nearest() -> str:
        near = get_close_matches(mnemonic, table.mnemonics(), 5, 0.6)
        return f"a form of the table of {table.FAMILY}" + (f"; near: {', '.join(near)}" if near else "")

    return UnknownInstruction(f"no row of the table has a form {mnemonic}", mnemonic, nearest, location)


@dataclass(slots=True)
class WarpAssembly(Arguments):
    """A piece of assembly that each thread of a warp runs. parameters, stored, slots: of a kernel, as
    KernelAssembly has them; empty for a block. inputs: registers that hold something at entry. tensors: of a register
    with an address the tensor that it points into."""

    name: str
    table: Any
    body: list[Instruction | Label] = field(default_factory=list)
    labels: list[LabelName] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    tensors: dict[Any, str] = field(default_factory=dict)
    register_count: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    stored: tuple[str, ...] = ()
    slots: list[str] = field(default_factory=list)

    # --- Registers --------------------------------------------------------------------------------------------------

    def new(self, name: str) -> Reg:
        """A virtual register: "b32", "b64", "b16", "pred"."""
        kind, bits = self.table.VIRTUAL[name]
        self.register_count += 1
        return Reg(kind, bits, VirtualRegister(kind, self.register_count))

    def b32(self) -> Reg:
        return self.new("b32")

    def b64(self) -> Reg:
        return self.new("b64")

    def b16(self) -> Reg:
        return self.new("b16")

    def pred(self) -> Reg:
        return self.new("pred")

    # --- Code -------------------------------------------------------------------------------------------------------

    def emit(self, mnemonic: str, operands: Sequence[Any], when: Reg | None = None, comment: str = "",
             location: Location | None = None) -> None:
        """One instruction. when: the predicate under which it runs. Raises AssemblyError."""
        where = location or author_location()
        found = self.table.forms_of(mnemonic)
        if not found:
            raise unknown(self.table, mnemonic, where)
        (form,) = found
        specs = self.table.operands_of(form, len(operands))
        needed = [spec for spec in specs if not spec.optional]
        if not len(needed) <= len(operands) <= len(specs):
            raise self._wrong(form, where, f"{len(operands)} operands")
        made = [self._operand(form, spec, given, where) for spec, given in zip(specs, operands, strict=False)]
        if when is not None and when.kind != "pred":
            raise self._wrong(form, where, f"when={when!r}, which is no predicate")
        self.body.append(Instruction(form, made, None if when is None else when.register, False, where, comment))

    def _wrong(self, form: Any, where: Any, found: str) -> AssemblyError:
        wants = ", ".join(f"{spec.role}:{spec.type or 'address'}" + (f"*{spec.count}" if spec.count else "")
                          for spec in form.operands)
        return AssemblyError("operands", f"{form.mnemonic} takes no such operands", where, found, wants or "none")

    def _operand(self, form: Any, spec: Any, given: Any, where: Any) -> Any:
        if spec.count:
            if not isinstance(given, (tuple, list)) or len(given) != spec.count:
                raise self._wrong(form, where, f"{given!r} where {spec.count} registers stand in braces")
            return tuple(self._register(form, spec, part, where) for part in given)
        if spec.role == "l" and isinstance(given, LabelName):
            return LabelReference(given.name)
        if spec.role == "m" and isinstance(given, Mem) and given.address.base is not None \
                and given.address.index is None and given.address.base.bits == 64:
            return Memory(given.address.base.register, None, 1, given.address.disp, False, None)
        if spec.role in ("r", "i") and isinstance(given, (int, float)) and not isinstance(given, bool):
            return Immediate(self._number(form, spec, given, where))
        if isinstance(given, FloatBits) and spec.role in ("r", "i") and spec.type and spec.bits == given.width:
            return Immediate(given.bits)
        opcode = form.mnemonic.partition(".")[0]
        if spec.role == "r" and given in self.table.SPECIAL.values() and opcode in self.table.READS_SPECIAL:
            return given
        if spec.role == "w" and given is self.table.NOBODY and opcode in self.table.RESULT_FOR_NOBODY:
            return given
        return self._register(form, spec, given, where)

    def _register(self, form: Any, spec: Any, given: Any, where: Any) -> Any:
        if spec.role not in ("r", "w", "rw") or not isinstance(given, Reg) or given.bits != spec.bits:
            raise self._wrong(form, where, repr(given))
        return given.register

    def _number(self, form: Any, spec: Any, given: float, where: Any) -> int:
        if spec.type in ("f32", "f64"):
            return int(struct.unpack("<I" if spec.type == "f32" else "<Q",
                                     struct.pack("<f" if spec.type == "f32" else "<d", given))[0])
        if not isinstance(given, int):
            raise self._wrong(form, where, repr(given))
        return given

    def text(self, source: str, **operands: Any) -> None:
        """PTX as text: `a.text("fma.rn.f32 @sum, @x, 0f40000000, @sum;", sum=s, x=x)`; see warp_text.py.

        operands: what `@name` stands for.
        """
        from .warp_text import WarpTextReader

        WarpTextReader(self, operands, author_location()).read(source)

    def label(self, name: str = "") -> LabelName:
        made = LabelName(f".{name or 'label'}{len(self.labels)}")
        self.labels.append(made)
        return made

    def place(self, label: LabelName) -> None:
        if label.placed:
            raise AssemblyError("notation", "a label is placed twice", author_location(), label.name, "one place")
        label.placed = True
        self.body.append(Label(label.name, 1))

    def here(self, name: str = "") -> LabelName:
        made = self.label(name)
        self.place(made)
        return made

    @contextmanager
    def building(self) -> Iterator[WarpAssembly]:
        """Mnemonics called inside add to this assembly."""
        with made_current(self):
            yield self

    @contextmanager
    def loop(self, start: Reg | int, stop: Reg, step: Reg | int = 1) -> Iterator[Reg]:
        """A loop that runs while counter < stop, the counter going up by step, in 64 bits; gives the counter. All
        threads of a warp run it as often as long as the three are the same in all."""
        counter, on = self.b64(), self.pred()
        head, end = self.label("loop"), self.label("done")
        self.emit("mov.b64", (counter, start))
        self.emit("setp.ge.s64", (on, counter, stop))
        self.emit("bra", (end,), on)
        self.place(head)
        yield counter
        self.emit("add.s64", (counter, counter, step))
        self.emit("setp.lt.s64", (on, counter, stop))
        self.emit("bra", (head,), on)
        self.place(end)

    def machine(self) -> MachineFunction:
        for label in self.labels:
            if not label.placed:
                raise AssemblyError("notation", f"label {label.name} is not placed", label.location,
                                    mend="a.place(label)")
        return MachineFunction(self.name, list(self.body), {}, parameters=(*FIRST_WORDS, *self.slots))

    # --- A kernel's arguments ---------------------------------------------------------------------------------------

    def _word(self, slot: str) -> Reg:
        self.slot_number(slot)
        made = self.b64()
        (form,) = self.table.forms_of("ld.param.b64")
        self.body.append(Instruction(form, [made.register, Memory(None, None, 1, 0, False, slot)], None, False,
                                     author_location()))
        return made

    def data(self, name: str) -> Reg:
        """The address of a tensor's first element. It may be stored to if the kernel stores to it."""
        self.parameter(name, True)
        made = self._word(f"{name}.data")
        self.tensors[made.register] = name
        return made

    def lane(self) -> Reg:
        """The number of this thread in its warp, of 32 bits."""
        made = self.b32()
        self.emit("mov.u32", (made, self.table.SPECIAL["tid_x"]))
        self.emit("and.b32", (made, made, WARP_LANES - 1))
        return made

    def worker(self) -> tuple[Reg, Reg]:
        """The number of this warp in the launch, and how many there are, of 64 bits."""
        special = self.table.SPECIAL
        number, total, warps, own = (self.b32() for _ in range(4))
        self.emit("mov.u32", (number, special["ctaid_x"]))
        self.emit("mov.u32", (total, special["nctaid_x"]))
        self.emit("mov.u32", (warps, special["ntid_x"]))
        self.emit("shr.u32", (warps, warps, 5))
        self.emit("mov.u32", (own, special["tid_x"]))
        self.emit("shr.u32", (own, own, 5))
        self.emit("mad.lo.s32", (number, number, warps, own))
        self.emit("mul.lo.s32", (total, total, warps))
        wide = self.b64(), self.b64()
        for to, source in zip(wide, (number, total), strict=True):
            self.emit("cvt.u64.u32", (to, source))
        return wide


# --- Kernels --------------------------------------------------------------------------------------------------------

def build_kernel(kernel: Any, piece: ByHand, table: Any) -> WarpAssembly:
    """Let the author's function write. Raises AssemblyError."""
    assembly = WarpAssembly(kernel.name, table, parameters=dict(kernel.parameters),
                            stored=stored_tensors(kernel.tile_ir()))
    with assembly.building():
        piece.write(assembly)
    return assembly


def compile_kernel(kernel: Any, assembly: WarpAssembly, target: Any, no_spill: bool = False,
                   budget: Mapping[str, int] | None = None) -> Compiled:
    """Text for a target, all static checks passed. no_spill, budget: see warp_registers.py. Raises AssemblyError."""
    from .warp_checks import check_warp
    from .warp_registers import check_kernel

    check_warp(assembly, target)
    machine = assembly.machine()
    check_kernel(assembly, machine, target, no_spill, budget or {})
    text = text_of(machine, target)
    code = text.encode()
    made = CompiledCode(kernel.name, code, len(code), 1, [], 0, list(assembly.slots), 0, 1, machine, target,
                        {"instructions": machine.instruction_count()})
    function = kernel.tile_ir()
    return Compiled(kernel.name, code, tuple(assembly.slots), (), 1, assembly.stored,
                    tuple(tuple(r) for r in function.attributes.get("requires", ())), (), (), 1, 0, lambda: made.text,
                    made)
