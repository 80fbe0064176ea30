"""A plain vector machine: what each family's `Target` has as long as it says nothing else.

Leaves: `PlainTarget`, from which `Target` inherits. Holds: nothing here is measured; a family says what differs.
`tile.schedule.Facts` tells what the model makes of most of it.
"""

# Without `from __future__ import annotations`: as x86_64/target.py.
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from ..ir.types import DType
    from ..tile.requests import Requests
    from ..tile.schedule import MatrixGroup, MatrixUnit, Moves, TileUnit


T = TypeVar("T")


def by_name(targets: Iterable[T]) -> dict[str, T]:
    """A family's table. Raises ValueError for two of one name."""
    found: dict[str, T] = {}
    for one in targets:
        name: str = one.name  # type: ignore[attr-defined]
        if name in found:
            raise ValueError(f"targets: found two called {name}; expected one")
        found[name] = one
    return found


_LEAST_CACHE_BYTES = 1024
_RATES = ("fma_per_cycle", "fma_latency", "lanes", "vector_registers")


class PlainTarget:
    """A target also has `name`, `family` (its folder), `lanes`, `wide_lanes` (lanes of a row of 8-byte elements),
    `vector_registers`, and `l1_bytes`, `l2_bytes`, `l3_bytes`.

    fma_latency: cycles. fma_per_cycle: multiply-adds of whole registers. assembler_allocates: the compiler stops at
    text, whose registers the vendor's assembler gives; else registers, frame and bytes are its own work. word_bytes:
    of every instruction, where all have one size (codegen/words.py). vector_state: what a vector instruction does
    depends on how many elements of which size the processor was set to before: `settle.py` of the family sets it, and
    puts instructions in the place of rows that have no word. code_by_hand: what runs in C programs and models besides
    kernels is written in the family's own rows; else it is translated to them (codegen/translate.py).
    lanes_are_threads: lanes see each other's stores only after they met; else they are parts of one register.
    indexed_addresses: an address may have an index. memory_operands: of an instruction one operand may be in memory.
    software_prefetch: asking early for what will be read gains time. slow_underflow: an instruction whose result is
    below the normal numbers takes a hundred cycles or more. flushes_functions: exp, exp2 and sigmoid of f32 are 0
    there. quick_denormals: as operands of a product they take none more. slow_products: one of 32-bit integers is two
    operations. slow_conversions: of integers to floats, beside sums.
    fuses_indexed, folded_loads: see x86-64's, which has operands in memory.
    The others: see `Facts`.
    """

    __slots__ = ()
    fma_latency: int = 4
    fma_per_cycle: float = 1.0
    assembler_allocates: bool = False
    word_bytes: int = 0
    vector_state: bool = False
    code_by_hand: bool = False
    lanes_are_threads: bool = False
    indexed_addresses: bool = False
    memory_operands: bool = False
    software_prefetch: bool = False
    rounded_at_once: int = 4
    run_bytes: int = 0
    interleaves: bool = False
    picks: bool = False
    slow_division: bool = False
    slow_underflow: bool = False
    flushes_functions: bool = False
    quick_denormals: bool = False
    sums_apart: bool = False
    slow_products: bool = False
    slow_conversions: bool = False
    lane_factors: bool = False
    fuses_indexed: bool = True
    folded_loads: float = 0
    moves: "Moves | None" = None
    matrix_group: "MatrixGroup | None" = None

    # What a family may work out of what else it says.

    @property
    def fault(self) -> str:
        """What can't be so of its facts, in words; "" for a target that compiles. A family adds what it knows."""
        caches = {name: getattr(self, name) for name in ("l1_bytes", "l2_bytes", "l3_bytes")}
        sizes = list(caches.values())
        if sizes[0] < _LEAST_CACHE_BYTES or sizes != sorted(sizes):
            return (f"found {', '.join(f'{name} {size}' for name, size in caches.items())}; expected bytes, "
                    f"at least {_LEAST_CACHE_BYTES}, each cache as large as the one before it")
        for name in _RATES:
            if getattr(self, name, 1) <= 0:
                return f"found {name} {getattr(self, name)}; expected more than 0"
        return ""

    @property
    def features(self) -> frozenset[str]:
        """Which rows, and which pieces by hand, a member takes."""
        return frozenset()

    @property
    def requests(self) -> "Requests":
        """How memory is best asked for before it is read."""
        from ..tile.requests import USUAL

        return USUAL

    @property
    def matrix(self) -> "MatrixUnit | None":
        """Matrix instructions of threads."""
        return None

    @property
    def tiles(self) -> "TileUnit | None":
        """Tile registers, which memory alone fills and empties."""
        return None

    @property
    def dots(self) -> frozenset[str]:
        """Packed dot products that the model may choose."""
        return frozenset()

    @property
    def joins(self) -> "frozenset[tuple[str, DType]]":
        """What is joined with memory in one step."""
        return frozenset()

    @property
    def flushes_as_it_rounds(self) -> bool:
        """Whether an instruction rounds to bf16, and takes denormals for 0."""
        return False

    @property
    def shared_pipes(self) -> bool:
        """Whether all that computes takes the pipes of multiply-adds."""
        return False

    @property
    def float8_rows(self) -> int:
        """Rows of fp8 that are best widened at once."""
        return 1
