"""Pieces on register rows: one instruction, or a block that computes one row from others.

Enters: an instruction's mnemonic, or a function that writes instructions over register operands. Leaves: `Block`,
which lane IR names in its op `asm` (see lang/by_hand.py). Holds: a block reads its inputs and leaves them as they are;
its registers are virtual, so that it takes its place among what is generated round it; it touches no memory but its
own constants; it is interpreted from the meanings of its rows wherever lane IR is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..codegen.machine import Instruction, Label, LabelReference, Memory, Register, VirtualRegister
from ..codegen.print import print_function
from ..codegen.row_facts import WRITE, facts_table
from ..ir.nodes import Location
from ..ir.types import DTYPES, DType
from ..lang.by_hand import PIECES
from .build import Assembly, Named, current, with_immediates
from .emulate import VECTOR_BYTES, Emulator
from .errors import AssemblyError, features_named
from .notation import Reg
from .registers import check_alone, check_kept
from .static import check_static

Write = Callable[..., None]


@dataclass(frozen=True)
class Block(Named):
    """A piece on rows. write(out, *inputs, *immediates): called while an assembly is built.

    name: how a schedule names it. implements: the tile op that it may stand for, "" for none. features: beside those
    that its instructions need by themselves. inputs, result: dtypes of rows (f32, i32, f64, i64). no_spill, budget: see
    registers.py.
    """

    table: Any
    name: str
    write: Write
    inputs: tuple[DType, ...] | None = None
    result: DType | None = None
    features: frozenset[str] = frozenset()
    implements: str = ""
    no_spill: bool = False
    budget: Mapping[str, int] = field(default_factory=dict, hash=False)
    known: dict[Any, bool] = field(default_factory=dict, compare=False, repr=False)
    interpreted: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def digest(self) -> str:
        """A hash of the instructions that it is made of."""
        texts = []
        for lanes in (8, 16):
            sizes = tuple(lanes * d.bits for d in (self.result, *(self.inputs or ())) if d is not None)
            try:
                texts.append(print_function(self.written(sizes).machine()))
            except AssemblyError as error:
                texts.append(error.kind)
        texts.append(f"{self.no_spill}{sorted(self.budget.items())}")
        return hashlib.sha256("".join(texts).encode()).hexdigest()

    # --- Writing ----------------------------------------------------------------------------------------------------

    def assemble(self, sizes: tuple[int, ...], immediates: list[int], first_register: int = 0,
                 ) -> tuple[Assembly, Reg, list[Reg]]:
        """The block over new virtual registers: (assembly, result, inputs). sizes: bits of the result and inputs.

        Raises AssemblyError where the block cannot be written at these sizes, or writes one of its inputs.
        """
        assembly = Assembly(self.name, self.table)
        assembly.register_count = first_register
        assembly.features = self.features if self.inputs is not None else None
        out, *inputs = (assembly.row(bits) for bits in sizes)
        for reg in inputs:
            assembly.input(reg)
        with assembly.building():
            self.write(out, *inputs, *immediates)
        held = {reg.register for reg in inputs}
        facts = facts_table(SimpleNamespace(idioms={}, move_bits={}, facts_table=None))
        for item in assembly.body:
            if isinstance(item, Instruction):
                if item.row.control == "return":
                    raise AssemblyError("effects", f"{self.name} returns", item.location, item.row.mnemonic,
                                        "a block, which runs on into its kernel's code", "leave it out")
                for how, operand in zip(facts[item.row].access, item.operands, strict=True):
                    if how & WRITE and isinstance(operand, VirtualRegister) and operand in held:
                        raise AssemblyError("clobber", f"{self.name} overwrites one of its inputs", item.location,
                                            repr(operand), "inputs left as they are", "copy it to a new register")
        return assembly, out, inputs

    def check(self, target: Any, sizes: tuple[int, ...], immediates: list[int]) -> None:
        """The static checks of the block as if it stood alone. Raises AssemblyError."""
        assembly, out, _ = self.assemble(sizes, immediates)
        with assembly.building():
            assembly.emit(self.table.MOVE, (assembly.row(sizes[0]), out))
            assembly.emit(self.table.RETURN, ())
        end = assembly.body[-2]
        assert isinstance(end, Instruction)
        try:
            check_static(assembly, target)
        except AssemblyError as error:
            if self.inputs is None or error.kind != "undefined" or error.location is not end.location:
                raise
            code = self.write.__code__
            raise AssemblyError("undefined", f"{self.name} may end without a result",
                                Location(code.co_filename, code.co_firstlineno, 1, 1), error.found,
                                "a write of its first parameter on every path", "write it") from None
        assembly, out, inputs = self.assemble(sizes, immediates)
        check_alone(assembly, target, inputs, (out,), self.no_spill, self.budget)

    def check_op(self, op: Any, target: Any) -> None:
        sizes = tuple(target.lanes * v.type.dtype.bits for v in (op.results[0], *op.operands))
        try:
            self.check(target, sizes, op.attributes["immediates"])
        except AssemblyError as error:
            if self.inputs is None:  # one instruction, which its author wrote where the kernel names it
                error.location = op.location
            raise

    def check_kept(self, machine: Any, target: Any) -> None:
        if self.no_spill:
            check_kept(machine, self.name, Register(*self.table.STACK_POINTER))

    # --- What lang/by_hand.py asks ----------------------------------------------------------------------------------

    def misfit(self, tiles: int, immediates: int) -> str:
        """Its inputs, where there are not so many."""
        return "" if self.inputs is None or len(self.inputs) == tiles else ", ".join(map(str, self.inputs)) or "no tile"

    def usable(self, family: str, features: frozenset[str], lanes: int, inputs: tuple[Any, ...], result: Any) -> bool:
        if family != self.table.FAMILY or not self.features <= features:
            return False
        if self.inputs is not None and (inputs, result) != (self.inputs, self.result):
            return False
        key = (features, lanes, inputs, result)
        if key not in self.known:
            target = SimpleNamespace(name=family, features=features)
            self.known[key] = self._writable(target, tuple(lanes * d.bits for d in (result, *inputs)))
        return self.known[key]

    def _writable(self, target: Any, sizes: tuple[int, ...]) -> bool:
        """Whether each instruction has a form for these registers whose features the target has."""
        try:
            assembly = self.written(sizes)
        except AssemblyError as error:
            if error.kind in ("operands", "notation"):
                return False
            raise
        for item in assembly.body:
            if isinstance(item, Instruction):
                evex = item.mask is not None or any(isinstance(o, Memory) and o.broadcast for o in item.operands)
                if not self.table.legal_encodings(item.row, target.features, evex):
                    return False
        return True

    def written(self, sizes: tuple[int, ...]) -> Assembly:
        """The block with as many immediates (all 0) as it takes."""
        made: Assembly = with_immediates(self.name, self.assemble, sizes)
        return made

    def run(self, rows: list[Any], immediates: list[int]) -> Any:
        """The block's result on rows, from the meanings of its instructions; rows may be of what is not known."""
        result = self.result or DTYPES[_dtype_name(rows[0].dtype)]
        lanes = len(rows[0])
        key = (lanes * result.bits, *(8 * r.nbytes for r in rows)), tuple(immediates)
        if key not in self.interpreted:  # a loop comes here again and again
            assembly, out, inputs = self.assemble(key[0], immediates)
            self.interpreted[key] = assembly.machine(), out, inputs
        function, out, inputs = self.interpreted[key]
        registers = {}
        for reg, row in zip(inputs, rows, strict=True):
            registers[reg.register] = self.table.padded(row.copy().view(np.uint8), VECTOR_BYTES)
        emulator = Emulator(self.table, _Alone(), registers)
        emulator.run(function)
        raw = emulator.get(out.register)[:lanes * result.bits // 8]
        return raw.view(f"{'f' if result.is_float else 'i'}{result.bits // 8}").copy()

    def select(self, selector: Any, op: Any) -> None:
        """Emit the block for a lane op: inputs where they are, the result in a new register, then where it belongs."""
        lanes = selector.lanes
        types = [v.type.dtype for v in (op.results[0], *op.operands)]
        rows = [selector.vector(v) for v in op.operands]
        assembly, out, inputs = self.assemble(tuple(lanes * d.bits for d in types), op.attributes["immediates"],
                                              selector.register_count)
        selector.register_count = assembly.register_count
        stands_for = {reg.register: row for reg, row in zip(inputs, rows, strict=True)}
        put(selector, assembly, names_in(selector, assembly, "asm"), stands_for, op.location, self.name)
        target = selector.define(op.results[0])
        selector.emit(f"{self.table.MOVE}.{types[0].bits * lanes}", target, out.register)


class _Alone:
    """Memory of a block: what it allocates itself (constants, an unused stack)."""

    def __init__(self) -> None:
        from ..lane.memory import Memory as LaneMemory

        self._memory = LaneMemory()
        self.find = self._memory.find
        self.allocate = self._memory.allocate


@dataclass(frozen=True)
class Names:
    """What a piece's labels and constants are called in a kernel."""

    labels: dict[str, str]
    constants: dict[str, str]


def names_in(selector: Any, piece: Any, stem: str) -> Names:
    """New names in the function that is being selected; stem: what labels are called."""
    return Names({label.name: selector.new_label(stem) for label in piece.labels},
                 {name: selector.constant_label(*entry) for name, entry in piece.constants.items()})


def put(selector: Any, piece: Any, names: Names, stands_for: dict[Any, Any], location: Any, comment: str) -> None:
    """Emit a piece's instructions where a kernel is being selected.

    stands_for: the kernel's registers by the piece's. location: where an instruction has none of its own.
    """
    for item in piece.body:
        if isinstance(item, Label):
            selector.body.append(Label(names.labels[item.name], item.align))
            continue
        operands = [_renamed(o, stands_for, names) for o in item.operands]
        selector.body.append(Instruction(item.row, operands, item.mask, item.zeroing, item.location or location,
                                         comment))


def _renamed(operand: Any, stands_for: dict[Any, Any], names: Names) -> Any:
    """An operand of a piece where it stands in a kernel."""
    if isinstance(operand, VirtualRegister):
        return stands_for.get(operand, operand)
    if isinstance(operand, LabelReference):
        return LabelReference(names.labels[operand.name])
    if isinstance(operand, Memory):
        return Memory(stands_for.get(operand.base, operand.base), stands_for.get(operand.index, operand.index),
                      operand.scale, operand.disp, operand.broadcast,
                      None if operand.label is None else names.constants[operand.label])
    return operand


def _dtype_name(dtype: Any) -> str:
    return f"{'f' if dtype.kind == 'f' else 'i'}{8 * dtype.itemsize}"


@cache
def instruction_piece(table: Any, mnemonic: str) -> Block:
    """One instruction as a piece. Where it changes its first operand, the first input is copied there before."""
    rows = table.rows_of(mnemonic)

    def write(out: Reg, *inputs: Any) -> None:
        changes = [row for row in rows if row.operands and row.operands[0].role == "rw"
                   and len(row.operands) == len(inputs)]
        if changes:
            first, *rest = inputs
            current().emit(table.MOVE, (out, first))
            current().emit(mnemonic, (out, *rest))
        else:
            current().emit(mnemonic, (out, *inputs))

    return Block(table, mnemonic, write)


def block(table: Any, name: str, *, inputs: str = "", result: str = "", features: str = "", implements: str = "",
          no_spill: bool = False, budget: Mapping[str, int] | None = None) -> Callable[[Write], Block]:
    """`@x86.block("fast_exp", inputs="f32", result="f32", implements="exp")` over `def fast_exp(out, x)`.

    inputs, result: dtypes of the rows. no_spill: nothing of it may lie in memory; budget: most registers of a kind
    that it takes at once; both are errors where they can't hold. Registers the block, so that a schedule can choose it
    by name. Raises ValueError for dtypes that rows do not have, or a name that another block has.
    """
    dtypes = []
    for word in (*inputs.split(), result):
        if word not in ("f32", "i32", "f64", "i64"):
            raise ValueError(f"block {name}: found dtype {word!r}; expected f32, i32, f64 or i64")
        dtypes.append(DTYPES[word])
    if table.rows_of(name):
        raise ValueError(f"block {name}: found the name of an instruction; expected another")

    def register(write: Write) -> Block:
        made = Block(table, name, write, tuple(dtypes[:-1]), dtypes[-1],
                     features_named(table, features, f"block {name}"), implements,
                     no_spill, dict(budget or {}))
        PIECES[made.key] = made
        return made

    return register
