"""Micro-kernels: the inner loop of a contraction by hand, inside generated loops.

Enters: a function that writes instructions over the registers of a `Tile`. Leaves: `Contraction`, which lane IR names
in its op `asm_contract` (lane/ops.py says what that computes). Holds: the sums stay in registers, from and to the
generated code round it; a piece reads its operands and its constants and stores nothing; its instructions keep their
order; it is interpreted from the meanings of its rows wherever lane IR is.

What is round the loop is generated: packing, tasks, edges, prologue, epilogue, and every tile that the piece does not
say it takes. The idea of a kernel that is all loops and packing but for a small piece by hand: F. Van Zee and R. van de
Geijn, "BLIS: a framework for rapidly instantiating BLAS functionality" (ACM TOMS 2015).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from ..codegen.machine import Label, MachineFunction, Register
from ..codegen.print import print_function
from ..ir.types import DTYPES, DType
from ..lang.by_hand import CONTRACTIONS, PIECES
from .block import names_in, put
from .build import Assembly, Named, Region
from .emulate import VECTOR_BYTES, Emulator
from .errors import features_named
from .notation import Reg
from .polynomial import Polynomial, Symbol
from .registers import check_alone, check_kept
from .static import check_static


@dataclass(slots=True)
class Tile(Assembly):
    """What the author of a micro-kernel writes into.

    products[c][r][v]: of the contraction with right operand c the registers of row r, vector v; they hold the sums so
    far, and the new ones at the end. sums: those of the first. depth: how many steps, a multiple of the piece's; it may
    be 0. left: the address of the first row's first element; left_stride: bytes from one row to the next, or from one
    step to the next where the rows lie side by side. rights: for
    each right operand the address of the first step's first vector; right: the first. All of these may be overwritten.
    vector_bits: of a row. block_bytes: where the left operand lies in blocks, from one to the next.
    """

    products: list[list[list[Reg]]] = field(default_factory=list)
    depth: Reg = field(default=None)  # type: ignore[assignment]
    left: Reg = field(default=None)  # type: ignore[assignment]
    left_stride: Reg = field(default=None)  # type: ignore[assignment]
    rights: list[Reg] = field(default_factory=list)
    vector_bits: int = 0

    @property
    def sums(self) -> list[list[Reg]]:
        return self.products[0]

    @property
    def right(self) -> Reg:
        return self.rights[0]

    @property
    def block_bytes(self) -> int:
        return len(self.sums) * self.vector_bytes

    @property
    def vector_bytes(self) -> int:
        return self.vector_bits // 8

    def vector(self) -> Reg:
        """A virtual register of a row's size."""
        return self.row(self.vector_bits)

    @property
    def scalars(self) -> tuple[Reg, ...]:
        return self.depth, self.left, self.left_stride, *self.rights

    @property
    def places(self) -> list[Any]:
        """The registers of all sums, in the order of the lane op's."""
        return [reg.register for product in self.products for row in product for reg in row]


@dataclass(frozen=True)
class Contraction(Named):
    """See lang/by_hand.py: ContractionPiece. write(tile): called while an assembly is built."""

    table: Any
    name: str
    write: Callable[[Tile], None]
    vector_bits: int
    rows: tuple[int, ...]
    vectors: tuple[int, ...]
    step: int = 1
    dtype: DType = DTYPES["f32"]
    right_dtype: DType = DTYPES["f32"]
    left: str = "rows"
    rights: int = 1
    features: frozenset[str] = frozenset()
    no_spill: bool = False
    budget: Mapping[str, int] = field(default_factory=dict, hash=False)
    _machines: dict[tuple[int, int], tuple[Tile, MachineFunction]] = field(default_factory=dict, compare=False,
                                                                          repr=False)

    @property
    def elements(self) -> int:
        return 32 // self.dtype.bits

    @property
    def element_bytes(self) -> int:
        return 4

    @property
    def result(self) -> DType:
        return DTYPES["f32" if self.dtype.is_float else "i32"]

    def tiles(self) -> list[tuple[int, int]]:
        """(rows, vectors) of every tile that it is written for."""
        return list(product(self.rows, self.vectors))

    def digest(self) -> str:
        """A hash of the instructions that it is made of."""
        texts = [print_function(self.assemble(tile).machine()) for tile in self.tiles()]
        return hashlib.sha256(f"{''.join(texts)}{self.no_spill}{sorted(self.budget.items())}".encode()).hexdigest()

    # --- Writing ----------------------------------------------------------------------------------------------------

    def assemble(self, tile: tuple[int, int], first_register: int = 0) -> Tile:
        """The piece for a tile of (rows, vectors), over new virtual registers."""
        made = Tile(self.name, self.table, vector_bits=self.vector_bits, register_count=first_register,
                    features=self.features)
        made.products = [[[made.input(made.vector()) for _ in range(tile[1])] for _ in range(tile[0])]
                         for _ in range(self.rights)]
        made.results = frozenset(made.places)
        depth = Polynomial.of(Symbol.new("depth" if self.step == 1 else f"depth/{self.step}")) * self.step
        stride = Symbol.new("left_stride", natural=False)
        made.depth = made.input(made.r64(), None, depth)
        made.left_stride = made.input(made.r64(), None, Polynomial.of(stride))
        if self.left == "blocks":
            left = Region("the left operand", False, depth * (tile[0] * self.element_bytes))
        elif self.left == "columns":
            left = Region("the left operand", False, Polynomial.of(tile[0] * self.element_bytes), ((depth, stride, 1),))
        else:
            left = Region("the left operand", False, depth * self.element_bytes,
                          ((Polynomial.of(tile[0]), stride, 1),))
        made.left = made.input(made.r64(), left)
        made.rights = [made.input(made.r64(), Region(f"right operand {number}", False,
                                                     depth * (tile[1] * made.vector_bytes)))
                       for number in range(self.rights)]
        with made.building():
            self.write(made)
        return made

    def planted(self, wrong: Tile) -> Contraction:
        """This piece for its first tile, with what `wrong` says in place of what it writes (mutate.py): its checks must
        find the difference."""
        return _Planted(self.table, "planted", self.write, self.vector_bits, self.rows[:1], self.vectors[:1], self.step,
                        self.dtype, self.right_dtype, self.left, self.rights, self.features, self.no_spill,
                        self.budget, wrong=wrong)

    def check(self, target: Any) -> None:
        """The static checks of every tile, each as if it stood alone. Raises AssemblyError."""
        for tile in self.tiles():
            made = self.assemble(tile)
            with made.building():
                made.emit(self.table.RETURN, ())
            check_static(made, target)
            made = self.assemble(tile)
            sums = [reg for product in made.products for row in product for reg in row]
            check_alone(made, target, (*made.scalars, *sums), sums, self.no_spill, self.budget)

    def check_kept(self, machine: Any, target: Any) -> None:
        if self.no_spill:
            check_kept(machine, self.name, Register(*self.table.STACK_POINTER))

    # --- What lang/by_hand.py asks ----------------------------------------------------------------------------------

    def refusal(self, family: str, features: frozenset[str], lanes: int) -> str:
        if family != self.table.FAMILY:
            return f"it is written for {self.table.FAMILY}"
        missing = sorted(self.features - features)
        if missing:
            return f"the target has no {', '.join(missing)}"
        if lanes * 32 != self.vector_bits:
            return f"rows are of {lanes * 32} bits, its vectors of {self.vector_bits}"
        return ""

    def run(self, memory: Any, tile: tuple[int, int], scalars: list[int], sums: list[Any]) -> list[Any]:
        if tile not in self._machines:
            made = self.assemble(tile)
            self._machines[tile] = made, made.machine()
        made, machine = self._machines[tile]
        registers: dict[Any, Any] = {r.register: v for r, v in zip(made.scalars, scalars, strict=True)}
        places = made.places
        for place, value in zip(places, sums, strict=True):
            registers[place] = np.zeros(VECTOR_BYTES, np.uint8)
            registers[place][:value.nbytes] = np.ascontiguousarray(value).view(np.uint8)
        emulator = Emulator(self.table, _ReadOnly(memory), registers)
        emulator.run(machine)
        lanes = np.float32 if self.result.is_float else np.int32
        return [emulator.get(place)[:self.vector_bits // 8].view(lanes).copy() for place in places]

    def select(self, selector: Any, op: Any) -> None:
        """The scalars are copied, as the piece may change them; the sums are changed where they are."""
        rows, first = op.attributes["rows"], 3 + self.rights
        tile = self.assemble((rows, len(op.results) // (rows * self.rights)), selector.register_count)
        selector.register_count = tile.register_count
        selector.assign(op.operands[:first], [reg.register for reg in tile.scalars])
        sums = selector.carried(op.operands[first:], op.results)
        selector.assign(op.operands[first:], sums)
        stands_for = dict(zip(tile.places, sums, strict=True))
        names = names_in(selector, tile, self.name)
        selector.ordered.update(names.labels.values())
        # A label before and one behind: what the piece does between its own is no part of the blocks round it, whose
        # instructions may be put in another order.
        start, end = selector.new_label(self.name), selector.new_label(self.name)
        selector.ordered.add(start)
        selector.body.append(Label(start))
        put(selector, tile, names, stands_for, op.location, self.name)
        selector.body.append(Label(end))
        selector.registers.update(zip(op.results, sums, strict=True))


@dataclass(frozen=True)
class _Planted(Contraction):
    wrong: Tile = field(default=None, compare=False)  # type: ignore[assignment]

    def assemble(self, tile: tuple[int, int], first_register: int = 0) -> Tile:
        return self.wrong


class _ReadOnly:
    """Memory that a micro-kernel sees: what the kernel round it may touch, to be read, and what it allocates itself."""

    def __init__(self, memory: Any) -> None:
        from ..lane.memory import Memory as LaneMemory

        self._memory, self._own = memory, LaneMemory()
        self.allocate = self._own.allocate

    def find(self, address: int, size_bytes: int, write: bool) -> Any:
        found = self._own.find(address, size_bytes, write)
        if not isinstance(found, str):
            return found
        if write:
            return f"a write of {size_bytes} bytes at {address:#x}, where a micro-kernel's memory is read-only"
        return self._memory.find(address, size_bytes, False)


def contraction(table: Any, name: str, *, vector: str, rows: tuple[int, ...], vectors: tuple[int, ...], step: int = 1,
                features: str = "", dtype: str = "f32", right_dtype: str = "", left: str = "rows", rights: int = 1,
                no_spill: bool = False, budget: Mapping[str, int] | None = None,
                ) -> Callable[[Callable[[Tile], None]], Contraction]:
    """Register a micro-kernel; see assembly/x86.py. Raises ValueError for a taken name, or what makes no sense."""
    def refuse(found: str, expected: str) -> ValueError:
        return ValueError(f"micro-kernel {name}: found {found}; expected {expected}")

    kind, bits = table.VIRTUAL.get(vector, ("", 0))
    if kind != "vec":
        raise refuse(f"vectors {vector!r}", "a vector register, such as zmm")
    for what, counts in (("rows", rows), ("vectors", vectors)):
        if not counts or min(counts) < 1 or list(counts) != sorted(set(counts), reverse=True):
            raise refuse(f"{what} {counts}", "positive counts, the largest first")
    if step < 1 or rights < 1:
        raise refuse(f"a step of {step} and {rights} right operands", "at least 1 of each")
    right_dtype = right_dtype or dtype
    if not {dtype, right_dtype} <= {"i8", "u8"} and (dtype != right_dtype or dtype not in ("f32", "bf16")):
        raise refuse(f"operands of {dtype!r} and {right_dtype!r}", "f32, bf16, or each of i8 or u8")
    if left not in ("rows", "columns", "blocks"):
        raise refuse(f"left={left!r}", "'rows', 'columns' or 'blocks'")
    if dtype == right_dtype and dtype in ("i8", "u8") and left != "blocks":
        raise refuse(f"left={left!r} with operands of {dtype} and {dtype}",
                     "'blocks', whose copies have the highest bits inverted: a dot product takes one of either sign")
    if left == "columns" and dtype != "f32":
        raise refuse(f"left='columns' with operands of {dtype}",
                     "f32: of narrow ones a step takes several, which would lie apart")
    if left == "blocks" and (len(rows) > 1 or step % (bits // 32)):
        raise refuse(f"blocks of {rows} rows and a step of {step}", f"one count of rows, and a step of whole blocks, "
                     f"a multiple of {bits // 32}")
    if table.rows_of(name) or f"{table.FAMILY}:{name}" in {**PIECES, **CONTRACTIONS}:
        raise refuse("the name of an instruction or of another block", "another")

    def register(write: Callable[[Tile], None]) -> Contraction:
        made = Contraction(table, name, write, bits, rows, vectors, step, DTYPES[dtype], DTYPES[right_dtype],
                           left, rights,
                           features_named(table, features, f"micro-kernel {name}"), no_spill, dict(budget or {}))
        CONTRACTIONS[made.key] = made
        return made

    return register
