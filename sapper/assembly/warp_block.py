"""Instructions and blocks on register rows where the target's assembler gives registers (PTX).

Enters: a mnemonic, or a function that writes code which each thread runs on its own elements. Leaves: `Mnemonic` and
`WarpBlock`, pieces as lang/by_hand.py has them. Holds: what they mean is what the meanings of their rows say, with
approximate results as far off as the manual allows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from ..codegen.machine import Instruction, Label, LabelReference, Memory, VirtualRegister
from ..ir.types import DTYPES, DType
from ..lang.by_hand import PIECES
from .build import Named, current, with_immediates
from .errors import AssemblyError, author_location, features_named
from .notation import Reg
from .symbolic import Lanes
from .warp import WarpAssembly
from .warp_checks import check_warp
from .warp_registers import check_assembled, check_wanted
from .warp_rows import run_rows


class Mnemonic:
    """An instruction of the table as a callable, which adds it to the assembly being built; in a tile kernel it is
    named in `asm`."""

    implements = ""
    module = __name__
    features: frozenset[str] = frozenset()
    """Its author declares none: those of its row count."""

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

    def check_op(self, op: Any, target: Any) -> None:
        _one(self.table, self.name).check_op(op, target)

    def check_kept(self, machine: Any, target: Any) -> None:
        """An instruction asks for nothing."""

    def __repr__(self) -> str:
        return f"<{self.family} {self.name}>"


@dataclass(frozen=True)
class WarpBlock(Named):
    """One row from others, by code that each thread runs on its own elements. See block.Block, whose part it takes."""

    table: Any
    name: str
    write: Callable[..., None]
    inputs: tuple[DType, ...] | None = None
    result: DType | None = None
    features: frozenset[str] = frozenset()
    implements: str = ""
    no_spill: bool = False
    budget: Mapping[str, int] = field(default_factory=dict, hash=False)

    def digest(self) -> str:
        made = self.written((32,) * (1 + len(self.inputs or (0,))))
        code = [(i.row.mnemonic, i.operands, i.mask) for i in made.body if isinstance(i, Instruction)]
        return hashlib.sha256(repr((code, self.no_spill, sorted(self.budget.items()))).encode()).hexdigest()

    def assemble(self, sizes: tuple[int, ...], immediates: list[int], first_register: int = 0,
                 ) -> tuple[WarpAssembly, Reg, list[Reg]]:
        """The block over new registers: (assembly, result, inputs). sizes: bits of an element of each."""
        assembly = WarpAssembly(self.name, self.table, register_count=first_register)
        out, *inputs = (assembly.new(self.table.NAME_OF_BITS[bits]) for bits in sizes)
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
        assembly, out, _ = self.assemble(sizes, immediates)
        check_warp(assembly, target, {out.register})
        check_wanted(assembly, target, {out.register}, self.budget)

    def check_op(self, op: Any, target: Any) -> None:
        self.check(target, tuple(v.type.dtype.bits for v in (op.results[0], *op.operands)), op.attributes["immediates"])

    def check_kept(self, machine: Any, target: Any) -> None:
        if self.no_spill:
            check_assembled(machine, target, self.name, True, target.registers)

    def run(self, rows: list[Any], immediates: list[int]) -> Any:
        """The block's result on rows, from the meanings of its instructions; also on rows of which nothing is known
        (symbolic.py). Raises NotSymbolic where a step needs a value that is not known."""
        result = self.result or DTYPES[f"{'f' if rows[0].dtype.kind == 'f' else 'i'}{8 * rows[0].itemsize}"]
        assembly, out, inputs = self.assemble((result.bits, *(8 * r.itemsize for r in rows)), immediates)
        held = {reg.register: row if isinstance(row, Lanes) else np.ascontiguousarray(row)
                for reg, row in zip(inputs, rows, strict=True)}
        run_rows(assembly, held, len(rows[0]))
        if out.register not in held:
            raise AssemblyError("undefined", f"{self.name} leaves nothing in its result", author_location(), "no write",
                                "an instruction that writes it")
        return held[out.register].view(f"{'f' if result.is_float else 'i'}{result.bits // 8}")

    def select(self, selector: Any, op: Any) -> None:
        """Emit the block for a lane op: inputs where they are, the result in a register of its own."""
        types = [v.type.dtype for v in (op.results[0], *op.operands)]
        rows = [selector.vector(v) for v in op.operands]
        assembly, out, inputs = self.assemble(tuple(d.bits for d in types), op.attributes["immediates"],
                                              selector.register_count)
        selector.register_count = assembly.register_count
        stands_for = {reg.register: row for reg, row in zip(inputs, rows, strict=True)}
        emit_body(selector, op, self.name, assembly, stands_for)
        selector.emit("mov.b32" if types[0].bits == 32 else "mov.b64", selector.define(op.results[0]), out.register)


def emit_body(selector: Any, op: Any, name: str, assembly: WarpAssembly, stands_for: Mapping[Any, Any]) -> None:
    """The instructions of a piece in the code round it. stands_for: registers of that by those of the piece."""
    labels = {label.name: selector.new_label("asm") for label in assembly.labels}
    for item in assembly.body:
        if isinstance(item, Label):
            selector.body.append(Label(labels[item.name], 1))
            continue
        operands = [_renamed(o, stands_for, labels) for o in item.operands]
        mask = stands_for.get(item.mask, item.mask)
        selector.body.append(Instruction(item.row, operands, mask, False, item.location or op.location, name))


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
          no_spill: bool = False, budget: Mapping[str, int] | None = None,
          ) -> Callable[[Callable[..., None]], WarpBlock]:
    """Register a block on rows, so that a schedule can choose it by name. no_spill: the kernel that it stands in must
    spill nothing; budget: {"registers": most that the block itself wants at once}; see warp_registers.py. Raises
    ValueError for dtypes that rows do not have."""
    dtypes = []
    for word in (*inputs.split(), result):
        if word not in ("f32", "i32", "f64", "i64"):
            raise ValueError(f"block {name}: found dtype {word!r}; expected f32, i32, f64 or i64")
        dtypes.append(DTYPES[word])

    def register(write: Callable[..., None]) -> WarpBlock:
        made = WarpBlock(table, name, write, tuple(dtypes[:-1]), dtypes[-1],
                         features_named(table, features, f"block {name}"), implements,
                         no_spill, dict(budget or {}))
        PIECES[made.key] = made
        return made

    return register
