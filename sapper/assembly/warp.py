"""Assembly by hand where the target's assembler gives registers (PTX): notation, kernels, blocks.

Enters: calls of mnemonics while a `WarpAssembly` is current. Leaves: machine IR over virtual registers, whose text the
vendor's assembler takes. Holds: registers have a size and no type; instructions stay in the order in which they were
written; warp_checks.py says what must hold of them.

    v = a.b32()                                  a register of 32 bits: f32, s32 or two bf16, as the instruction sees it
    ptx.ld_global_f32(v, ptx.ptr[x + 8])         ld.global.f32; :: is written __
    ptx.bra(head, when=p)                        under a predicate
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from math import prod
from typing import Any

import numpy as np

from ..codegen.compile import CompiledCode, text_of
from ..codegen.machine import Immediate, Instruction, Label, LabelReference, MachineFunction, Memory, VirtualRegister
from ..codegen.pipeline import Compiled, stored_tensors
from ..ir.types import DTYPES, DType, TensorType
from ..lane.ops import FIRST_WORDS
from ..lang.by_hand import PIECES, ByHand
from .build import current, made_current, with_immediates
from .errors import AssemblyError, author_location
from .notation import LabelName, Mem, Reg
from .symbolic import Lanes, NotSymbolic

WARP_LANES = 32


class Mnemonic:
    """An instruction of the table as a callable, which adds it to the assembly being built; in a tile kernel it is
    named in `asm`."""

    implements = ""
    module = __name__

    def __init__(self, table: Any, name: str) -> None:
        self.table, self.name = table, name
        self.family: str = table.FAMILY

    @property
    def key(self) -> str:
        return f"{self.family}:{self.name}"

    def __call__(self, *operands: Any, when: Reg | None = None, comment: str = "") -> None:
        made = current()
        if not isinstance(made, WarpAssembly):
            raise AssemblyError("notation", f"{self.name} is called in an assembly of another family",
                                author_location(), self.name, f"an assembly of {self.family}")
        made.emit(self.name, operands, when, comment)

    def usable(self, family: str, features: frozenset[str], lanes: int, inputs: tuple[Any, ...], result: Any) -> bool:
        return bool(_one(self.table, self.name).usable(family, features, lanes, inputs, result))

    def digest(self) -> str:
        return self.key

    def run(self, rows: list[Any], immediates: list[int]) -> Any:
        return _one(self.table, self.name).run(rows, immediates)

    def select(self, selector: Any, op: Any) -> None:
        _one(self.table, self.name).select(selector, op)

    def __repr__(self) -> str:
        return f"<{self.family} {self.name}>"


def unknown(table: Any, mnemonic: str) -> AssemblyError:
    near = get_close_matches(mnemonic, table.mnemonics(), 5, 0.6)
    return AssemblyError("unknown-instruction", f"no row of the table has a form {mnemonic}", author_location(),
                         mnemonic, f"a form of the table of {table.FAMILY}" + (f"; near: {', '.join(near)}" if near
                                                                              else ""))


@dataclass(slots=True)
class WarpAssembly:
    """A piece of assembly that each thread of a warp runs. parameters, stored, slots, contiguous: of a kernel, as
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

    def emit(self, mnemonic: str, operands: Sequence[Any], when: Reg | None = None, comment: str = "") -> None:
        """One instruction. when: the predicate under which it runs. Raises AssemblyError."""
        where = author_location()
        found = self.table.forms_of(mnemonic)
        if not found:
            raise unknown(self.table, mnemonic)
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
        if spec.role == "r" and given in self.table.SPECIAL.values():
            return given
        if spec.role == "w" and given is self.table.NOBODY:
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
        if slot not in self.slots:
            self.slots.append(slot)
        made = self.b64()
        (form,) = self.table.forms_of("ld.param.b64")
        self.body.append(Instruction(form, [made.register, Memory(None, None, 1, 0, False, slot)], None, False,
                                     author_location()))
        return made

    def _parameter(self, name: str, tensor: bool) -> Any:
        found = self.parameters.get(name)
        if found is None or isinstance(found, TensorType) != tensor:
            what = "tensor" if tensor else "scalar"
            names = [n for n, t in self.parameters.items() if isinstance(t, TensorType) == tensor]
            raise AssemblyError("notation", f"{self.name} has no {what} {name}", author_location(), name,
                                ", ".join(names) or "none")
        return found

    def data(self, name: str) -> Reg:
        """The address of a tensor's first element. It may be stored to if the kernel stores to it."""
        self._parameter(name, True)
        made = self._word(f"{name}.data")
        self.tensors[made.register] = name
        return made

    def stride(self, name: str, dimension: int) -> Reg:
        """The stride of a tensor's dimension in elements."""
        tensor = self._parameter(name, True)
        if not 0 <= dimension < len(tensor.dims):
            raise AssemblyError("notation", f"{name} has no dimension {dimension}", author_location(), str(dimension),
                                f"0 to {len(tensor.dims) - 1}")
        return self._word(f"{name}.stride.{dimension}")

    def extent(self, dim: str) -> Reg:
        """The extent of a symbolic dimension."""
        known = [d for t in self.parameters.values() if isinstance(t, TensorType) for d in t.dims if isinstance(d, str)]
        if dim not in known:
            raise AssemblyError("notation", f"{self.name} has no dimension {dim}", author_location(), dim,
                                ", ".join(dict.fromkeys(known)))
        return self._word(f"dim.{dim}")

    def scalar(self, name: str) -> Reg:
        """The word of a scalar parameter: integers sign-extended, f32 bits in the low half, f64 bits."""
        self._parameter(name, False)
        return self._word(f"scalar.{name}")

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


def compile_kernel(kernel: Any, assembly: WarpAssembly, target: Any) -> Compiled:
    """Text for a target, all static checks passed. Raises AssemblyError."""
    from .warp_checks import check_warp

    check_warp(assembly, target)
    machine = assembly.machine()
    text = text_of(machine, target)
    code = text.encode()
    made = CompiledCode(kernel.name, code, len(code), 1, [], 0, list(assembly.slots), 0, 1, machine, target,
                        {"instructions": machine.instruction_count()})
    function = kernel.tile_ir()
    return Compiled(kernel.name, code, tuple(assembly.slots), (), 1, assembly.stored,
                    tuple(tuple(r) for r in function.attributes.get("requires", ())), (), (), 1, 0, lambda: made.text,
                    made)


# --- Instructions and blocks on rows ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class WarpBlock:
    """One row from others, by code that each thread runs on its own elements. See block.Block, whose part it takes."""

    table: Any
    name: str
    write: Callable[..., None]
    inputs: tuple[DType, ...] | None = None
    result: DType | None = None
    features: frozenset[str] = frozenset()
    implements: str = ""

    @property
    def key(self) -> str:
        return f"{self.table.FAMILY}:{self.name}"

    @property
    def module(self) -> str:
        return self.write.__module__

    def digest(self) -> str:
        made = self.written((32,) * (1 + len(self.inputs or (0,))))
        return hashlib.sha256(repr([(i.row.mnemonic, i.operands) for i in made.body
                                    if isinstance(i, Instruction)]).encode()).hexdigest()

    def assemble(self, sizes: tuple[int, ...], immediates: list[int], first_register: int = 0,
                 ) -> tuple[WarpAssembly, Reg, list[Reg]]:
        """The block over new registers: (assembly, result, inputs). sizes: bits of an element of each."""
        assembly = WarpAssembly(self.name, self.table, register_count=first_register)
        names = {bits: name for name, (_, bits) in self.table.VIRTUAL.items()}
        out, *inputs = (assembly.new(names[bits]) for bits in sizes)
        assembly.inputs = [reg.register for reg in inputs]
        with assembly.building():
            self.write(out, *inputs, *immediates)
        return assembly, out, inputs

    def written(self, sizes: tuple[int, ...]) -> WarpAssembly:
        made: WarpAssembly = with_immediates(self.name, self.assemble, sizes)
        return made

    def usable(self, family: str, features: frozenset[str], lanes: int, inputs: tuple[Any, ...], result: Any) -> bool:
        if family != self.table.FAMILY or not self.features <= features:
            return False
        if self.inputs is not None and (inputs, result) != (self.inputs, self.result):
            return False
        try:
            assembly = self.written(tuple(d.bits for d in (result, *inputs)))
        except AssemblyError as error:
            if error.kind in ("operands", "notation"):
                return False
            raise
        level = self.table.level_of(features)
        return not any(item.row.illegal_on(level) for item in assembly.body if isinstance(item, Instruction))

    def check(self, target: Any, sizes: tuple[int, ...], immediates: list[int]) -> None:
        """The static checks of the block as if it stood alone. Raises AssemblyError."""
        from .warp_checks import check_warp

        assembly, out, _ = self.assemble(sizes, immediates)
        check_warp(assembly, target, {out.register})

    def run(self, rows: list[Any], immediates: list[int]) -> Any:
        """The block's result on rows, from the meanings of its instructions. Raises NotSymbolic for rows of which
        nothing is known: the meanings of these rows take numbers."""
        if any(isinstance(row, Lanes) or row.dtype == object for row in rows):
            raise NotSymbolic(f"{self.name} is run on numbers only")
        result = self.result or DTYPES[f"{'f' if rows[0].dtype.kind == 'f' else 'i'}{8 * rows[0].itemsize}"]
        assembly, out, inputs = self.assemble((result.bits, *(8 * r.itemsize for r in rows)), immediates)
        held = {reg.register: np.ascontiguousarray(row) for reg, row in zip(inputs, rows, strict=True)}
        random = np.random.default_rng(0)
        for item in assembly.body:
            if not isinstance(item, Instruction) or item.row.row.meaning is None or item.row.row.unit:
                what = item.name if isinstance(item, Label) else item.row.mnemonic
                raise AssemblyError("notation", f"{what} is not interpreted in a block on rows",
                                    getattr(item, "location", None), what, "instructions on a thread's own registers")
            self._step(item, held, len(rows[0]), random)
        return held[out.register].view(f"{'f' if result.is_float else 'i'}{result.bits // 8}")

    def _step(self, item: Instruction, held: dict[Any, Any], lanes: int, random: Any) -> None:
        form = item.row
        sources = []
        specs = self.table.operands_of(form, len(item.operands))
        for spec, operand in zip(specs, item.operands, strict=False):
            if not spec.reads and spec.role != "i":
                continue
            if isinstance(operand, Immediate):
                width = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}[self.table.bits_of(spec.type)]
                low = operand.value & ((1 << self.table.bits_of(spec.type)) - 1)
                sources.append(self._seen(np.full(lanes, low, width), spec.type))
            elif operand in held:
                sources.append(self._seen(held[operand], spec.type))
            else:
                raise AssemblyError("undefined", f"{form.mnemonic} reads a register that was never written",
                                    item.location, repr(operand))
        results = form.row.meaning(form, *sources)
        tolerance = self.table.tolerance(form)
        targets = [o for spec, o in zip(specs, item.operands, strict=False) if spec.writes]
        for operand, value in zip(targets, results if isinstance(results, tuple) else (results,), strict=False):
            value = np.asarray(value)
            if tolerance and value.dtype.kind == "f":
                with np.errstate(all="ignore"):
                    off = value * (1 + tolerance * random.choice([-1.0, 1.0], value.shape))
                value = np.where(np.isfinite(off), off, value).astype(value.dtype)
            made = np.ascontiguousarray(value)
            if item.mask is not None:
                before = held.get(operand)
                if before is None:
                    raise AssemblyError("undefined", f"{form.mnemonic} writes some lanes of what holds nothing",
                                        item.location, repr(operand))
                bits = made.reshape(lanes, -1).view(before.dtype).reshape(lanes)
                made = np.where(held[item.mask].view(np.bool_), bits, before)
            held[operand] = made.reshape(lanes, -1).view(f"u{prod(made.shape[1:], start=made.itemsize)}") \
                .reshape(lanes) if made.dtype != np.bool_ else made

    def _seen(self, raw: Any, type_: str) -> Any:
        """A register as an operand of a type sees it."""
        found = self.table.ARRAYS[type_]
        if isinstance(found, tuple):
            return raw.view(found[0]).reshape(len(raw), found[1])
        return raw.view(found)

    def select(self, selector: Any, op: Any) -> None:
        """Emit the block for a lane op: inputs where they are, the result in a register of its own."""
        types = [v.type.dtype for v in (op.results[0], *op.operands)]
        rows = [selector.vector(v) for v in op.operands]
        assembly, out, inputs = self.assemble(tuple(d.bits for d in types), op.attributes["immediates"],
                                              selector.register_count)
        selector.register_count = assembly.register_count
        stands_for = {reg.register: row for reg, row in zip(inputs, rows, strict=True)}
        labels = {label.name: selector.new_label("asm") for label in assembly.labels}
        for item in assembly.body:
            if isinstance(item, Label):
                selector.body.append(Label(labels[item.name], 1))
                continue
            operands = [_renamed(o, stands_for, labels) for o in item.operands]
            selector.body.append(Instruction(item.row, operands, item.mask, False, item.location or op.location,
                                             self.name))
        selector.emit("mov.b32" if types[0].bits == 32 else "mov.b64", selector.define(op.results[0]), out.register)


def _renamed(operand: Any, stands_for: Mapping[Any, Any], labels: Mapping[str, str]) -> Any:
    if isinstance(operand, tuple):
        return tuple(_renamed(part, stands_for, labels) for part in operand)
    if isinstance(operand, LabelReference):
        return LabelReference(labels[operand.name])
    if isinstance(operand, Memory):
        return Memory(stands_for.get(operand.base, operand.base), None, 1, operand.disp, False, operand.label)
    return stands_for.get(operand, operand) if isinstance(operand, VirtualRegister) else operand


@cache
def _one(table: Any, mnemonic: str) -> WarpBlock:
    """One instruction as a piece."""
    def write(out: Reg, *inputs: Any) -> None:
        made = current()
        assert isinstance(made, WarpAssembly)
        made.emit(mnemonic, (out, *inputs))

    return WarpBlock(table, mnemonic, write)


def block(table: Any, name: str, *, inputs: str, result: str, features: str = "", implements: str = "",
          ) -> Callable[[Callable[..., None]], WarpBlock]:
    """Register a block on rows, so that a schedule can choose it by name. Raises ValueError for dtypes that rows do not
    have."""
    dtypes = []
    for word in (*inputs.split(), result):
        if word not in ("f32", "i32", "f64", "i64"):
            raise ValueError(f"block {name}: found dtype {word!r}; expected f32, i32, f64 or i64")
        dtypes.append(DTYPES[word])

    def register(write: Callable[..., None]) -> WarpBlock:
        made = WarpBlock(table, name, write, tuple(dtypes[:-1]), dtypes[-1], frozenset(features.split()), implements)
        PIECES[made.key] = made
        return made

    return register
