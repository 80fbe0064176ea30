"""What the rows cost, by processor: latency, reciprocal throughput, pipes.

Enters: a row, which names a class of costs. Holds: figures are cycles, of vectors of 128 bits, for register forms.
Sources: Arm Software Optimization Guides of Neoverse N1 (PJDOC-466751330-9707), V1 (PJDOC-466751330-9685), N2
(PJDOC-466751330-18256) and V2 (PJDOC-466751330-593177), chapters 2 and 3; nothing was measured.
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


def _pipes(stem: str, count: int) -> tuple[str, ...]:
    return tuple(f"{stem}{number}" for number in range(count))


@dataclass(frozen=True)
class Core:
    """A processor. ISSUE_WIDTH: instructions that enter in a cycle. LOAD_LATENCY: cycles from an address to a register.
    integer, vector, memory: pipes of each kind; half of the vectors' (at least one) shift, convert and multiply
    integers, divide, or reach across lanes."""

    MODEL: str
    ISSUE_WIDTH: int
    integer: int
    vector: int
    memory: int
    LOAD_LATENCY: dict[str, int] = field(default_factory=lambda: {"gpr": 4, "vec": 5})
    SHUT_BY_512: tuple[str, ...] = ()

    def cost_of(self, row: Row) -> Cost:
        """Raises KeyError for a class of costs that is not listed."""
        latency, cycles, kind = _CLASSES[row.cost]
        pipes = {"integer": _pipes("alu", self.integer), "vector": _pipes("v", self.vector),
                 "half": _pipes("v", max(1, self.vector // 2)), "memory": _pipes("memory", self.memory),
                 "alu": ("alu0",), "branch": ("branch",)}[kind]
        return Cost(latency, cycles / len(pipes), pipes)

    def latency_of(self, row: Row) -> int:
        """Of a multiply-add by way of its factors; one that takes over a sum could begin two cycles later."""
        return self.cost_of(row).latency

    def uses_of(self, row: Row, loaded_bits: int, stored_bits: int) -> list[tuple[tuple[str, ...], float]]:
        """What one instruction keeps busy: pipes that may do it, and cycles of all of them together."""
        del loaded_bits, stored_bits
        cost = self.cost_of(row)
        return [(cost.ports, cost.throughput)]

    @staticmethod
    def operations_of(row: Row) -> int:
        """Arithmetic operations on floats in all lanes; a multiply-add counts as two."""
        count = _OPERATIONS.get(row.mnemonic, 0)
        return count * row.length // int(row.dtypes[1:]) if count else 0


_OPERATIONS = {"fadd": 1, "fsub": 1, "fmul": 1, "fdiv": 1, "fsqrt": 1, "fmla": 2, "fmls": 2,
               "bfdot": 2, "bfmmla": 4}
_CLASSES: dict[str, tuple[int, float, str]] = {
    "alu": (1, 1, "integer"), "alu shifted": (2, 1, "alu"), "mul": (2, 1, "alu"), "div": (12, 12, "alu"),
    "branch": (1, 1, "branch"), "load": (0, 1, "memory"), "load vector": (0, 1, "memory"), "store": (1, 2, "memory"),
    "atomic": (8, 16, "memory"), "hint": (1, 1, "memory"), "system": (50, 50, "alu"), "vector": (2, 1, "vector"),
    "fadd": (2, 1, "vector"), "fmul": (3, 1, "vector"), "fma": (4, 1, "vector"), "fdiv": (10, 5, "half"),
    "fsqrt": (12, 6, "half"), "convert": (3, 1, "half"), "vector mul": (4, 1, "half"), "vector shift": (2, 1, "half"),
    "dot": (3, 1, "vector"), "bf16 dot": (4, 1, "vector"), "bf16 matrices": (5, 1, "vector"),
    "bf16 convert": (4, 1, "half"),
    "across": (5, 1, "half"), "to vector": (3, 1, "memory"), "from vector": (2, 1, "half"),
}
"""Latency, cycles of one pipe, and which pipes, by the class that a row names; of loads the core has the latency."""

CORES = {"neoverse-n1": Core("Neoverse N1", 4, 3, 2, 2), "neoverse-v1": Core("Neoverse V1", 8, 4, 4, 3),
         "neoverse-n2": Core("Neoverse N2", 5, 4, 2, 3), "neoverse-v2": Core("Neoverse V2", 8, 6, 4, 3)}


def model_of(target: Any) -> Core:
    """What the bounds of code for a target are worked out from; of a level: the first core."""
    return CORES.get(target.name, CORES["neoverse-n1"])
