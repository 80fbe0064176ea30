"""Products of a warp's fragments by hand: some matrix instructions, in the order that its author likes.

Enters: a function that writes instructions over the registers of a `Fragments`. Leaves: `WarpProduct`, which lane IR
names in its op `asm_multiply` in place of one `matrix_multiply` for each pair of fragments. Holds: the operands'
fragments stay as they are, the sums' take the new ones; nothing touches memory; copies, stages, waits and what follows
the product are generated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..codegen.machine import Instruction, VirtualRegister
from ..ir.types import DTYPES, DType
from ..lang.by_hand import PRODUCTS
from .build import Named
from .errors import AssemblyError, features_named
from .notation import Reg
from .warp import WarpAssembly
from .warp_block import emit_body
from .warp_checks import check_warp
from .warp_registers import check_assembled, check_wanted
from .warp_rows import run_rows


@dataclass(slots=True)
class Fragments(WarpAssembly):
    """What the author of a product writes into.

    left[i], right[j]: the registers of the fragment of rows i, of columns j, as mma takes them. sums[i][j]: those that
    hold the sums so far, and the new ones at the end.
    """

    left: list[tuple[Reg, ...]] = field(default_factory=list)
    right: list[tuple[Reg, ...]] = field(default_factory=list)
    sums: list[list[tuple[Reg, ...]]] = field(default_factory=list)

    @property
    def operands(self) -> list[Reg]:
        """All registers of left and right, in order."""
        return [reg for fragment in (*self.left, *self.right) for reg in fragment]

    @property
    def results(self) -> list[Reg]:
        return [reg for row in self.sums for fragment in row for reg in fragment]


@dataclass(frozen=True)
class WarpProduct(Named):
    """See lang/by_hand.py: ProductPiece. write(fragments): called while an assembly is built."""

    table: Any
    name: str
    write: Callable[[Fragments], None]
    rows: int
    columns: int
    dtype: DType
    features: frozenset[str] = frozenset()
    no_spill: bool = False
    budget: Mapping[str, int] = field(default_factory=dict, hash=False)

    def digest(self) -> str:
        """A hash of its instructions, and of what it asks for."""
        code = [(i.row.mnemonic, i.operands, i.mask) for i in self.assemble().body if isinstance(i, Instruction)]
        return hashlib.sha256(repr((code, self.no_spill, sorted(self.budget.items()))).encode()).hexdigest()

    def assemble(self, first_register: int = 0) -> Fragments:
        """The product over new registers. Raises AssemblyError where it writes one of its operands."""
        made = Fragments(self.name, self.table, register_count=first_register)

        def fragment(what: str) -> tuple[Reg, ...]:
            kind, count = self.table.FRAGMENTS[what]
            return tuple(made.new(kind) for _ in range(count))

        made.left = [fragment("left") for _ in range(self.rows)]
        made.right = [fragment("right") for _ in range(self.columns)]
        made.sums = [[fragment("sums") for _ in range(self.columns)] for _ in range(self.rows)]
        made.inputs = [reg.register for reg in (*made.operands, *made.results)]
        with made.building():
            self.write(made)
        held = {reg.register for reg in made.operands}
        for item in made.body:
            if isinstance(item, Instruction):
                for spec, operand in zip(self.table.operands_of(item.row, len(item.operands)), item.operands,
                                         strict=False):
                    parts = operand if isinstance(operand, tuple) else (operand,)
                    if spec.writes and any(isinstance(p, VirtualRegister) and p in held for p in parts):
                        raise AssemblyError("clobber", f"{self.name} overwrites one of its operands", item.location,
                                            item.row.mnemonic, "operands left as they are")
        return made

    def check(self, target: Any) -> None:
        """The static checks of the product by itself. Raises AssemblyError."""
        made = self.assemble()
        results = {reg.register for reg in made.results}
        check_warp(made, target, results)
        check_wanted(made, target, results | {reg.register for reg in made.operands}, self.budget)

    def check_op(self, op: Any, target: Any) -> None:
        self.check(target)

    def check_kept(self, machine: Any, target: Any) -> None:
        if self.no_spill:
            check_assembled(machine, target, self.name, True, target.registers)

    def run(self, left: list[Any], right: list[Any], sums: list[Any]) -> list[Any]:
        made = self.assemble()
        given = zip((*made.operands, *made.results), (*left, *right, *sums), strict=True)
        held = {reg.register: np.ascontiguousarray(row) for reg, row in given}
        run_rows(made, held, len(sums[0]))
        return [held[reg.register].view(np.float32) for reg in made.results]

    def select(self, selector: Any, op: Any) -> None:
        """Operands where they are; the sums are copied first, as the piece changes them."""
        made = self.assemble(selector.register_count)
        selector.register_count = made.register_count
        count = len(made.operands)
        stands_for = {reg.register: selector.vector(value)
                      for reg, value in zip(made.operands, op.operands[:count], strict=True)}
        sums = [selector.vector(value) for value in op.operands[count:]]
        for reg, row in zip(made.results, sums, strict=True):
            selector.emit("mov.b32", reg.register, row)
        emit_body(selector, op, self.name, made, stands_for)
        for reg, result in zip(made.results, op.results, strict=True):
            selector.emit("mov.b32", selector.define(result), reg.register)

    def planted(self, assembly: WarpAssembly) -> WarpProduct:
        """The product with another assembly, such as one with a planted error, to see whether a check finds it."""
        return _Planted(self.table, "planted", self.write, self.rows, self.columns, self.dtype, self.features,
                        wrong=assembly)


@dataclass(frozen=True)
class _Planted(WarpProduct):
    wrong: Any = field(default=None, compare=False)

    def assemble(self, first_register: int = 0) -> Fragments:
        made: Fragments = self.wrong
        return made


def product(table: Any, name: str, *, rows: int, columns: int, dtype: str, features: str = "", no_spill: bool = False,
            budget: Mapping[str, int] | None = None) -> Callable[[Callable[[Fragments], None]], WarpProduct]:
    """Register a product of fragments; see assembly/ptx.py. Raises ValueError for what makes no sense."""
    if dtype not in ("bf16", "f16"):
        raise ValueError(f"product {name}: found operands of {dtype!r}; expected bf16 or f16")
    if rows < 1 or columns not in (1, 2):
        raise ValueError(f"product {name}: found {rows} fragments of rows and {columns} of columns; expected at least "
                         "1, and 1 or 2, as many as one ldmatrix brings")

    def register(write: Callable[[Fragments], None]) -> WarpProduct:
        made = WarpProduct(table, name, write, rows, columns, DTYPES[dtype],
                           features_named(table, features, f"product {name}"), no_spill,
                           dict(budget or {}))
        PRODUCTS[made.key] = made
        return made

    return register
