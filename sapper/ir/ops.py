"""Op tables: what an op may look like. The tables themselves are in sapper/tile/ops.py and sapper/lane/ops.py."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

Shape = tuple[int, float, int, float, int, frozenset[str], frozenset[str]]
"""At least and at most how many operands, likewise results; blocks; attributes that must be there, that may."""


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One row of an op table.

    operands: how many; (low, high), high None for any number.
    results: likewise.
    attributes: names that must be there; optional: names that may.
    blocks: how many nested blocks.
    pure: no effect beyond its results, so it may be merged, moved and dropped.
    doc: one line of meaning.
    """

    name: str
    operands: tuple[int, int | None]
    results: tuple[int, int | None] = (1, 1)
    attributes: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    blocks: int = 0
    pure: bool = True
    doc: str = ""

    def shape(self) -> Shape:
        (fewest, most), (fewest_results, most_results) = self.operands, self.results
        required = frozenset(self.attributes)
        return (fewest, inf if most is None else most, fewest_results, inf if most_results is None else most_results,
                self.blocks, required, required | frozenset(self.optional))


class OpTable:
    """Rows by name."""

    def __init__(self, stage: str, rows: list[OpSpec]) -> None:
        self.stage = stage
        self.rows: dict[str, OpSpec] = {}
        for row in rows:
            if row.name in self.rows:
                raise ValueError(f"{stage} op {row.name} is defined twice")
            self.rows[row.name] = row
        self.shapes = {name: row.shape() for name, row in self.rows.items()}
        """Of each row, for the verifier, which looks at every op."""

    def __getitem__(self, name: str) -> OpSpec:
        return self.rows[name]

    def __contains__(self, name: str) -> bool:
        return name in self.rows
