"""How the tables of zen3_costs.py and zen5_costs.py are read: what a row costs on a core of AMD, by pipes.

Enters: the lines of a table, and a row. Leaves: a `Core`, which gives a latency in cycles and what a row keeps busy,
for bounds of finished code (codegen/explain.py); no code depends on it. Holds: a family that a table lacks (what traps,
jumps, moves the stack, divides integers, or the core does not have) takes Zen 4's figures, of costs.py.

Lines are `latency uses : families`; figures for 128, 256 and 512 bits are parted by `;` (fewer: the last one holds for
the rest). Uses are parted by `+`, as in intel_costs.py: with pipes named by letters, `m` is an operation on a pipe of
`m`, `2*m` two of them, `d:4` the divider for four cycles, `-` nothing but the access of memory. After a `/` stand the
uses of the form with an operand in memory, where they are others than those of the form with registers.
"""

from __future__ import annotations

from typing import NamedTuple

from .costs import accesses_of, cost_of, family_of, is_scattered, operations_of, own_uses, parse_uses
from .rows import Row

__all__ = ["Core", "read_figures"]


class Core(NamedTuple):
    """One of AMD's cores, as `costs` gives Zen 4's figures.

    ISSUE_WIDTH: macro-ops that enter in a cycle. LOAD_LATENCY: cycles to a register, by kind. figures: of
    `read_figures`. pipes: letter -> pipes. load_cycles, store_cycles: of the units that load and store, for an access
    of up to so many bits. address_cycles: of those that make addresses, for an access. vector_stores: bits -> uses of a
    store of a vector of up to so many, beside the access itself. SHUT_BY_512: see costs.py.
    """

    MODEL: str
    ISSUE_WIDTH: int
    LOAD_LATENCY: dict[str, int]
    figures: dict[str, tuple[list[str], list[str]]]
    pipes: dict[str, tuple[str, ...]]
    load_cycles: dict[int, float]
    store_cycles: dict[int, float]
    address_cycles: float
    vector_stores: dict[int, str]
    SHUT_BY_512: tuple[str, ...] = ()

    def latency_of(self, row: Row) -> int:
        """Cycles from a row's register inputs to its result."""
        found = self.figures.get(family_of(row.name))
        return cost_of(row).latency if found is None else int(_of_width(found[0], row))

    def uses_of(self, row: Row, loaded_bits: int, stored_bits: int) -> list[tuple[tuple[str, ...], float]]:
        """What one instruction keeps busy; see costs.uses_of."""
        accesses = accesses_of(row, loaded_bits, stored_bits, self.load_cycles, self.store_cycles)
        uses = [(unit, cycles) for unit, cycles in accesses if cycles]
        uses += [(("agu",), self.address_cycles)] * len(accesses)
        if stored_bits and not is_scattered(row) and any(o.kind == "vec" for o in row.operands):
            uses += self._parsed(next(text for bits, text in self.vector_stores.items() if stored_bits <= bits))
        in_memory = bool(loaded_bits or stored_bits)
        found = self.figures.get(family_of(row.name))
        if found is None:
            return uses + own_uses(row, in_memory)
        registers, slash, memory = _of_width(found[1], row).partition("/")
        return uses + self._parsed(memory if slash and in_memory else registers)

    def operations_of(self, row: Row) -> int:
        return operations_of(row)

    def _parsed(self, text: str) -> list[tuple[tuple[str, ...], float]]:
        return parse_uses(text, self.pipes.__getitem__)


def read_figures(text: str) -> dict[str, tuple[list[str], list[str]]]:
    """Family -> latencies and uses, one to three of each."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for line in text.strip().split("\n"):
        figures, _, families = line.partition(" : ")
        latency, uses = (column.split(";") for column in figures.split())
        for family in families.split():
            found[family] = latency, uses
    return found


def _of_width(figures: list[str], row: Row) -> str:
    return figures[min({256: 1, 512: 2}.get(row.length, 0), len(figures) - 1)]
