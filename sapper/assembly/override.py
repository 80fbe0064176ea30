"""A whole kernel by hand: the assembly that its author's function writes, and the code that it becomes.

Enters: a `lang.Kernel`, one of its `ByHand`, a target. Leaves: `Override`: code with the calling convention of
docs/ir.md. Holds: the code is the same for every specialisation that the piece admits, so it is made and checked once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from ..codegen.compile import CompiledCode
from ..codegen.machine import Instruction, MachineFunction, Register
from ..codegen.pipeline import Compiled, stored_tensors
from ..codegen.print import print_function
from ..ir.types import Dim, TensorType, spell_nested
from ..lang.by_hand import ByHand
from ..targets import FAMILIES, has_module, module_of
from .arguments import Arguments
from .build import Assembly, Region
from .errors import AssemblyError, author_location, features_named
from .finish import Finished, finish
from .notation import Mem, Reg
from .polynomial import Polynomial, Symbol
from .warp import WarpAssembly, build_kernel
from .warp import compile_kernel as compile_warp

FIRST_SLOT_BYTES = 24
"""Words 0 to 2 of the argument block: scratch, scratch bytes of each worker, sync block (docs/ir.md)."""

ARGUMENT_BLOCK = Region("the argument block", False)


@dataclass(slots=True)
class KernelAssembly(Arguments, Assembly):
    """What the author of a kernel by hand writes into: an assembly that has the kernel's arguments (arguments.py).

    scratch_size: (element bytes, axes) of the scratch memory, as Compiled has it. parallel: it asks which worker it is.
    contiguous: tensors that lie in C order in every call. dims: the extents that a call may have, as formulas.
    computed: quotients and rests of them.
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    stored: tuple[str, ...] = ()
    slots: list[str] = field(default_factory=list)
    strides: dict[str, Symbol] = field(default_factory=dict)
    scratch_size: tuple[Any, ...] = ()
    parallel: bool = False
    contiguous: tuple[str, ...] = ()
    dims: Mapping[str, Polynomial] = field(default_factory=dict)
    computed: dict[Dim, Symbol] = field(default_factory=dict)

    def _argument(self, number: int) -> Reg:
        return Reg("gpr", 64, Register(*self.table.ARGUMENTS[number]))

    def _word(self, slot: str, region: Region | None = None) -> Reg:
        at = FIRST_SLOT_BYTES + 8 * self.slot_number(slot)
        block = self._argument(0)
        self.words.setdefault(block.register, {})[at] = region
        number = self._number(slot)
        if number is not None:
            self.word_numbers[block.register, at] = number
        made = self.r64()
        self.emit("mov", (made, Mem(block + at)), slot)
        return made

    def _number(self, slot: str) -> Polynomial | None:
        kind, _, name = slot.partition(".")
        if kind == "dim":
            return self.dims[name]
        if name.startswith("stride."):
            return Polynomial.of(self.strides.setdefault(slot, Symbol.new(slot, natural=False)))
        return None

    def _extent(self, dim: Dim) -> Polynomial:
        """Of what is divided nothing is known but that it is a number of its own."""
        if not isinstance(dim, tuple):
            return self.dims[dim] if isinstance(dim, str) else Polynomial.of(dim)
        op, left, right = dim
        a, b = self._extent(left), self._extent(right)
        if op in ("add", "sub"):
            return a + b if op == "add" else a - b
        return a * b if op == "mul" else Polynomial.of(self.computed.setdefault(dim, Symbol.new(spell_nested(dim))))

    def _region(self, name: str) -> Region:
        """The memory of a tensor: all of it in one piece, or an element at each step of its strides."""
        tensor = self.parameter(name, True)
        extents = [self._extent(d) for d in tensor.dims]
        bytes_ = tensor.dtype.bits // 8
        if name in self.contiguous:
            return Region(name, name in self.stored, prod(extents, start=Polynomial.of(bytes_)))
        axes = []
        for number, extent in enumerate(extents):
            slot = f"{name}.stride.{number}"
            axes.append((extent, self.strides.setdefault(slot, Symbol.new(slot, natural=False)), bytes_))
        return Region(name, name in self.stored, bytes_, tuple(axes))

    def data(self, name: str) -> Reg:
        """The address of a tensor's first element. It may be stored to if the kernel stores to it."""
        return self._word(f"{name}.data", self._region(name))

    def worker(self) -> Reg:
        """The number of this worker, from 0. A kernel that asks for it is run by all workers at once."""
        return self._copy(1)

    def workers(self) -> Reg:
        """How many workers run the kernel."""
        return self._copy(2)

    def _copy(self, number: int) -> Reg:
        self.parallel = True
        made = self.r64()
        self.emit("mov", (made, self._argument(number)))
        return made

    def scratch(self, element_bytes: int, *axes: tuple[int, tuple[str, ...], int]) -> Reg:
        """Memory of this worker, 64-byte aligned: the product over axes of constant times dims, each rounded up to a
        multiple: (constant, dims, multiple). Once in a kernel."""
        if self.scratch_size:
            raise AssemblyError("notation", "scratch memory is asked for twice", author_location(),
                                mend="ask once for all, and add offsets")
        self.scratch_size = ((element_bytes, tuple(axes)),)
        block = self._argument(0)
        least = Polynomial.of(element_bytes)  # without what is rounded up
        for constant, dims, _ in axes:
            least = prod((self.dims[d] for d in dims), start=least * constant)
        self.words.setdefault(block.register, {})[0] = Region("scratch", True, least)
        # Offsets count from where this worker's part begins, so that the bytes of those before it are none.
        self.word_numbers[block.register, 8] = Polynomial.of(0)
        made, each = self.r64(), self.r64()
        self.emit("mov", (each, Mem(block + 8)))
        self.emit("imul", (each, self._argument(1)))
        self.emit("mov", (made, Mem(block + 0)))
        self.emit("add", (made, each))
        return made


@dataclass(frozen=True, slots=True)
class Override:
    """A kernel by hand as code. source: before allocation, what is interpreted. finished: None where the target's
    assembler allocates."""

    piece: ByHand
    assembly: Any = field(repr=False)
    source: MachineFunction = field(repr=False)
    finished: Finished | None = field(repr=False)
    compiled: Compiled = field(repr=False)


def table_of(family: str) -> Any:
    """What a family of targets says of assembly by hand."""
    return module_of(family, "assembly")


def features_of(family: str, features: str, who: str) -> frozenset[str]:
    """The features that a kernel by hand asks for. Raises ValueError for a family that has no assembly by hand, and for
    a feature that no target has. who: for the message."""
    families = [name for name in FAMILIES if has_module(name, "assembly")]
    if family not in families:
        raise ValueError(f"{who}: found family={family!r}; expected one that has assembly by hand: "
                         f"{', '.join(families)}")
    return features_named(table_of(family), features, who)


def build(kernel: Any, piece: ByHand) -> Any:
    """Let the author's function write: a KernelAssembly, or a WarpAssembly where the target's assembler gives the
    registers. Raises AssemblyError."""
    table = table_of(piece.family)
    if table.ASSEMBLER_ALLOCATES:
        return build_kernel(kernel, piece, table)
    stored = stored_tensors(kernel.tile_ir())
    assembly = KernelAssembly(kernel.name, table, parameters=dict(kernel.parameters), stored=stored,
                              contiguous=piece.contiguous, dims=_extents(kernel, piece), features=piece.features)
    assembly.inputs[assembly._argument(0).register] = ARGUMENT_BLOCK
    worker, workers = (Polynomial.of(Symbol.new(name)) for name in ("worker", "workers"))
    for number, value in ((1, worker), (2, workers)):
        assembly.input(assembly._argument(number), None, value)
    assembly.assumed = (workers - worker - 1,)
    with assembly.building():
        piece.write(assembly)
    return assembly


def _extents(kernel: Any, piece: ByHand) -> dict[str, Polynomial]:
    """Each dim as a formula, a multiple where the piece asks for one."""
    found: dict[str, Polynomial] = {}
    for _, parameter in kernel.parameters:
        for dim in parameter.dims if isinstance(parameter, TensorType) else ():
            if isinstance(dim, str) and dim not in found:
                factor = piece.divisible.get(dim, 1)
                symbol = Symbol.new(dim if factor == 1 else f"{dim}/{factor}")
                found[dim] = Polynomial.of(symbol) * factor
    return found


def digest(kernel: Any, piece: ByHand) -> str:
    """A hash of what the author's function writes, and of what it asks for."""
    assembly = build(kernel, piece)
    if isinstance(assembly, WarpAssembly):
        lines = [(i.row.mnemonic, i.operands, i.mask) if isinstance(i, Instruction) else i.name for i in assembly.body]
        asked = piece.no_spill, sorted(piece.budget.items())
        return hashlib.sha256(f"{lines}{piece.family}{sorted(piece.features)}{assembly.slots}{asked}".encode()
                              ).hexdigest()
    text = print_function(assembly.machine())
    facts = (piece.family, sorted(piece.features), piece.contiguous, sorted(piece.divisible.items()), piece.no_spill,
             sorted(piece.budget.items()), piece.reorder, assembly.slots, assembly.scratch_size, assembly.parallel)
    return hashlib.sha256(f"{text}{facts}".encode()).hexdigest()


def compile_by_hand(kernel: Any, piece: ByHand, target: Any) -> Override:
    """Code for a target, all static checks passed. Raises AssemblyError."""
    assembly = build(kernel, piece)
    if isinstance(assembly, WarpAssembly):
        compiled = compile_warp(kernel, assembly, target, piece.no_spill, piece.budget)
        return Override(piece, assembly, assembly.machine(), None, compiled)
    function = kernel.tile_ir()
    finished = finish(assembly, target, piece.no_spill, dict(piece.budget), piece.reorder)
    encoded, counters = finished.encoded, int(assembly.parallel)
    made = CompiledCode(
        kernel.name, encoded.code, encoded.code_bytes, encoded.align_bytes, encoded.line_table, finished.frame_bytes,
        list(assembly.slots), 0, counters, finished.machine, target,
        {"spills": finished.spills, "instructions": finished.machine.instruction_count()})
    compiled = Compiled(
        kernel.name, finished.code, tuple(assembly.slots), assembly.scratch_size, counters, assembly.stored,
        tuple(tuple(r) for r in function.attributes.get("requires", ())), (), (), 1, 0, lambda: made.text, made)
    return Override(piece, assembly, assembly.machine(), finished, compiled)
