"""What is written by hand in a target's assembly, beside the tile kernel that says what it computes.

Enters: what `@kernel.assembly(...)`, `asm(...)` and schedules are given. Leaves: `ByHand`, a whole kernel, which the
runtime takes where its conditions hold; `PIECES`, instructions and blocks on register rows, `CONTRACTIONS`, inner loops
of contractions, and `PRODUCTS`, of a warp's fragments, by name.
Holds: nothing here knows a target; pieces and `write` are handed to what does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class ByHand:
    """Assembly for one family of targets.

    name: for messages. family: "x86_64". features: those that the code needs. write: writes it, given the assembly.
    contiguous: tensors that must lie in C order. divisible: dim -> what its extent must be a multiple of (1, 16 or 64
    where the extent is not compiled in). no_spill, budget: see assembly.finish. reorder: the scheduler may choose the
    order inside straight stretches. flushes_denormals: denormal inputs and results count as zero, as vdpbf16ps has it;
    declared, since the kernel itself keeps them.
    """

    name: str
    family: str
    features: frozenset[str]
    write: Callable[[Any], None]
    contiguous: tuple[str, ...] = ()
    divisible: Mapping[str, int] = field(default_factory=dict)
    no_spill: bool = False
    budget: Mapping[str, int] = field(default_factory=dict)
    reorder: bool = False
    flushes_denormals: bool = False

    def refusal(self, target: Any, static_dims: Mapping[str, int], unit_strides: Mapping[str, Any],
                dim_classes: Mapping[str, tuple[int, int]]) -> str:
        """Why the code can't be taken for a specialisation (see runtime/specialise.py), "" where it can."""
        if target.family != self.family:
            return f"the target is a {target.family}, not a {self.family}"
        missing = sorted(self.features - target.features)
        if missing:
            return f"{target.name} has no {', '.join(missing)}"
        for name in self.contiguous:
            if unit_strides.get(name) != "contiguous":
                return f"{name} is not contiguous"
        for dim, factor in self.divisible.items():
            extent = static_dims.get(dim)
            bound, divisor = dim_classes.get(dim, (0, 1))
            known = extent if extent is not None else 1 if bound == 1 else divisor
            if known % factor:
                return f"{dim} is not known to be a multiple of {factor}"
        return ""

    def calls(self) -> str:
        """What a call must be like, in words; "" where any call will do."""
        needs = [f"{', '.join(self.contiguous)} contiguous"] if self.contiguous else []
        return ", ".join(needs + [f"{dim} a multiple of {factor}" for dim, factor in self.divisible.items()])


class Piece(Protocol):
    """What pieces by hand have in common. key: "family:name", by which the IRs speak of it. module: where it is
    written. features: those that its author declares."""

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> str: ...

    @property
    def module(self) -> str: ...

    @property
    def features(self) -> frozenset[str]: ...


class RowPiece(Piece, Protocol):
    """An instruction or a block that computes one row from others; made by what knows the target.

    implements: the op that a schedule may let it stand for, "": a tile op by its name; "to_bf16", the cast;
    "sum_of_lanes" and its like, what a reduction does across the lanes of one row; "sum_of_each_row", the same of as
    many rows as there are lanes, row i to lane i.
    """

    @property
    def implements(self) -> str: ...

    def usable(self, family: str, features: frozenset[str], lanes: int, inputs: tuple[Any, ...], result: Any) -> bool:
        """Whether it takes rows of these dtypes (of rows: f32, i32, f64, i64) on such a target."""
        ...

    def digest(self) -> str:
        """Changes when the piece does."""
        ...

    def run(self, rows: list[Any], immediates: list[int]) -> Any:
        """The result on rows as arrays: what the instructions mean."""
        ...

    def select(self, selector: Any, op: Any) -> None:
        """Emit it for a lane op."""
        ...

    def check_op(self, op: Any, target: Any) -> None:
        """The static checks of the piece as a lane op has it. Raises AssemblyError."""
        ...

    def check_kept(self, machine: Any, target: Any) -> None:
        """Raise AssemblyError where registers that it asks for don't hold in a function that it stands in (machine IR
        as it goes to the encoder, or to the target's assembler)."""
        ...


PIECES: dict[str, RowPiece] = {}
"""Pieces that kernels and schedules may name, by key."""


class ContractionPiece(Piece, Protocol):
    """The inner loop of a contraction: `sums[r, n] += sum_d left[r, d] * right[d, n]` over some steps of the depth d;
    or of several with one left operand.

    dtype, right_dtype: of the operands in memory. result: of the sums, f32, or i32 of integers, which wrap. elements:
    how many of an operand's a step of the depth takes, which lie side by side (2 of bf16, 4 of i8). rows, vectors: the
    tiles that it can be written for, in rows of `left` and vectors of `right`, the largest first. step: the depth that
    it is asked for is a multiple of it. rights: how many right operands there are, each a packed panel,
    [depth][vectors], aligned to a vector. left: how the left operand lies, "rows": where it is, each row contiguous
    along the depth; "columns": where it is, contiguous along its rows, the depth apart; "blocks": copied, [depth /
    lanes][rows][lanes of the depth].
    Where both operands are i8, or both u8, the left one is in blocks, with the highest bit of its bytes inverted, which
    makes it the other type (lane/packed.py says how the sums make up for that).
    """

    @property
    def dtype(self) -> Any: ...

    @property
    def right_dtype(self) -> Any: ...

    @property
    def result(self) -> Any: ...

    @property
    def elements(self) -> int: ...

    @property
    def element_bytes(self) -> int:
        """Bytes of a step of the depth in one row."""
        ...

    @property
    def left(self) -> str: ...

    @property
    def rights(self) -> int: ...

    @property
    def rows(self) -> tuple[int, ...]: ...

    @property
    def vectors(self) -> tuple[int, ...]: ...

    @property
    def step(self) -> int: ...

    def refusal(self, family: str, features: frozenset[str], lanes: int) -> str:
        """Why such a target can't run it, "" where it can."""
        ...

    def check(self, target: Any) -> None:
        """The static checks of every tile. Raises AssemblyError."""
        ...

    def digest(self) -> str:
        """Changes when the piece does."""
        ...

    def run(self, memory: Any, tile: tuple[int, int], scalars: list[int], sums: list[Any]) -> list[Any]:
        """What its instructions mean. scalars: as the lane op `asm_contract` has them; sums: rows as arrays."""
        ...

    def select(self, selector: Any, op: Any) -> None:
        """Emit it for a lane op `asm_contract`."""
        ...

    def check_kept(self, machine: Any, target: Any) -> None:
        """As of RowPiece."""
        ...


CONTRACTIONS: dict[str, ContractionPiece] = {}
"""Inner loops of contractions that schedules may name, by key."""


class ProductPiece(Piece, Protocol):
    """Products of a warp's fragments by hand: `sums[i][j] += left[i] @ right[j]` for some blocks of rows i and of
    columns j, as lane/fragments.py lays them out in registers.

    dtype: of the elements of both operands, bf16 or f16; the sums are f32. rows, columns: how many fragments of each
    operand it takes.
    """

    @property
    def dtype(self) -> Any: ...

    @property
    def rows(self) -> int: ...

    @property
    def columns(self) -> int: ...

    def digest(self) -> str:
        """Changes when the piece does."""
        ...

    def run(self, left: list[Any], right: list[Any], sums: list[Any]) -> list[Any]:
        """The new sums on rows as arrays, each operand's registers in order: what the instructions mean."""
        ...

    def select(self, selector: Any, op: Any) -> None:
        """Emit it for a lane op `asm_multiply`."""
        ...

    def check_op(self, op: Any, target: Any) -> None:
        """As of RowPiece."""
        ...

    def check_kept(self, machine: Any, target: Any) -> None:
        """As of RowPiece."""
        ...


PRODUCTS: dict[str, ProductPiece] = {}
"""Products of fragments that schedules may name, by key."""


def piece_of(key: str) -> RowPiece | ContractionPiece | ProductPiece:
    """The piece of a key."""
    return CONTRACTIONS.get(key) or PRODUCTS.get(key) or PIECES[key]


def bare_name(name: str) -> str:
    """The name of a block, without the module that it is written in."""
    return name.rpartition(":")[2]


def pieces_named(name: str) -> list[RowPiece | ContractionPiece | ProductPiece]:
    """The blocks of every family that a schedule means by a name: those that stand for an op. `my.blocks:fast_exp` says
    where the block is written, so that it is found wherever the schedule is read: that module is imported, if there is
    one of this name."""
    module, _, name = name.rpartition(":")
    if module:
        with suppress(ModuleNotFoundError):
            import_module(module)
    rows = [p for p in PIECES.values() if p.implements and p.key.partition(":")[2] == name]
    loops = [p for p in CONTRACTIONS.values() if p.key.partition(":")[2] == name]
    return [*rows, *loops, *(p for p in PRODUCTS.values() if p.key.partition(":")[2] == name)]


def block_names() -> list[str]:
    """The names that a schedule may have in `assembly`, sorted."""
    keys = [p.key for p in PIECES.values() if p.implements] + list(CONTRACTIONS) + list(PRODUCTS)
    return sorted({key.partition(":")[2] for key in keys})
