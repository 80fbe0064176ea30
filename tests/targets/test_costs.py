"""Every row has figures, and they are of the right order."""

from __future__ import annotations

import pytest

from sapper.targets.x86_64.costs import _table, cost_of, family_of
from sapper.targets.x86_64.instructions import ROWS

PIPES = {f"fp{n}" for n in range(4)} | {f"alu{n}" for n in range(4)} | {"load", "store", "branch"}


def test_every_row_has_a_cost_and_no_figure_is_orphaned() -> None:
    for row in ROWS.values():
        cost = cost_of(row)
        assert 1 <= cost.latency <= 100 and 0 < cost.throughput <= 100, row.name
        assert cost.ports and set(cost.ports) <= PIPES, row.name
    assert set(_table()) == {family_of(name) for name in ROWS}


@pytest.mark.parametrize(("name", "latency", "throughput"), [
    ("vaddps.256", 3, 0.5), ("vaddps.512", 3, 1), ("vfmadd231ps.256", 4, 0.5), ("vfmadd231ps.512", 4, 1),
    ("vdivps.256", 11, 3), ("add.64", 1, 0.25), ("imul.64", 3, 1), ("vpaddd.256", 1, 0.25)])
def test_figures_of_well_known_rows(name: str, latency: int, throughput: float) -> None:
    row = ROWS[name]
    assert (row.latency, row.throughput) == (latency, throughput)


def test_multiplies_and_adds_take_different_pipes() -> None:
    assert set(ROWS["vfmadd231ps.512"].ports) == {"fp0", "fp1"}
    assert set(ROWS["vaddps.512"].ports) == {"fp2", "fp3"}
    assert ROWS["jne"].ports == ("branch",)
