"""What the rows cost, by processor: latency, reciprocal throughput, pipes.

Enters: a row, which names a class of costs. Holds: figures are cycles, of whole vector registers, for register forms.
Sources: of the SpacemiT X60 LLVM's RISCVSchedSpacemitX60.td, made by experiments on the processor (in order, two
instructions a cycle, a data path of 128 bits: a register of 256 bits takes two cycles); nothing was measured here. Of
the profile: a core of that kind whose registers are as long as its data path.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .rows import Row


class Cost(NamedTuple):
    """latency: from the registers read to the result. throughput: of one among many. ports: that can execute it."""

    latency: int
    throughput: float
    ports: tuple[str, ...]


_PIPES = {"integer": ("alu0", "alu1"), "alu": ("alu0",), "branch": ("alu0",), "memory": ("memory0", "memory1"),
          "float": ("float",), "vector": ("vector",), "vector float": ("vector_float",),
          "vector memory": ("vector_memory",), "none": ()}


@dataclass(frozen=True, slots=True)
class Core:
    """A processor. ISSUE_WIDTH: instructions that enter in a cycle. LOAD_LATENCY: cycles from an address to a register.
    passes: cycles that a pipe of vectors takes for a register."""

    MODEL: str
    ISSUE_WIDTH: int
    passes: int
    LOAD_LATENCY: dict[str, int] = field(default_factory=lambda: {"gpr": 4, "fpr": 4, "vec": 5})
    SHUT_BY_512: tuple[str, ...] = ()

    def cost_of(self, row: Row) -> Cost:
        """Raises KeyError for a class of costs that is not listed."""
        latency, cycles, kind = _CLASSES[row.cost]
        pipes = _PIPES[kind]
        passes = self.passes if kind.startswith("vector") else 1
        return Cost(latency, cycles * passes / max(1, len(pipes)), pipes)

    def latency_of(self, row: Row) -> int:
        return self.cost_of(row).latency

    def uses_of(self, row: Row, loaded_bits: int, stored_bits: int) -> list[tuple[tuple[str, ...], float]]:
        """What one instruction keeps busy: pipes that may do it, and cycles of all of them together."""
        del loaded_bits, stored_bits
        cost = self.cost_of(row)
        return [(cost.ports, cost.throughput)] if cost.ports else []

    @staticmethod
    def operations_of(row: Row) -> int:
        """Arithmetic operations on floats in all lanes; a multiply-add counts as two."""
        count = _OPERATIONS.get(row.mnemonic.partition(".")[0], 0)
        return count * row.vector_bits // row.element if count else 0


_OPERATIONS = {"vfadd": 1, "vfsub": 1, "vfrsub": 1, "vfmul": 1, "vfdiv": 1, "vfrdiv": 1, "vfsqrt": 1, "vfmacc": 2,
               "vfnmsac": 2}
_CLASSES: dict[str, tuple[int, float, str]] = {
    "alu": (1, 1, "integer"), "mul": (6, 1, "integer"), "div": (20, 20, "alu"), "branch": (1, 1, "branch"),
    "load": (0, 1, "memory"), "store": (1, 1, "memory"), "atomic": (12, 12, "memory"), "hint": (1, 1, "memory"),
    "system": (50, 50, "alu"), "state": (1, 1, "alu"), "fadd": (4, 1, "float"), "to float": (4, 1, "integer"),
    "load vector": (0, 1, "vector memory"), "store vector": (1, 1, "vector memory"),
    "gather": (0, 8, "vector memory"), "scatter": (1, 8, "vector memory"),
    "vector": (4, 1, "vector"), "vector mul": (4, 1, "vector"), "vector div": (20, 20, "vector"),
    "permute": (4, 2, "vector"), "from vector": (4, 1, "vector"), "convert": (4, 1, "vector float"),
    "vector fadd": (4, 1, "vector float"), "fma": (5, 1, "vector float"), "fdiv": (12, 12, "vector float"),
    "none": (0, 0, "none"),
}
"""Latency, cycles of one pipe, and which pipes, by the class that a row names; of loads the core has the latency."""

CORES = {"spacemit-x60": Core("SpacemiT X60", 2, 2), "rva23u64": Core("RVA23, in order", 2, 1)}


def model_of(target: Any) -> Core:
    """What the bounds of code for a target are worked out from; of a level: the first core."""
    return CORES.get(target.name, CORES["spacemit-x60"])
