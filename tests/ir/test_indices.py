"""Rows that say how an index is computed: proofs about ranges, and values one by one, against plain Python."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.ir import indices
from sapper.ir.indices import Row, TooMany, freedom, outside, proves
from tests.strategies import examples
from tests.strategies.indices import SIZES, is_outside, leaves_of, rows


@settings(max_examples=examples(400))
@given(rows(), SIZES)
def test_what_is_said_of_an_index_is_so(row: Row, sizes: dict[tuple[str, str], int]) -> None:
    found, wrong = outside(row, sizes), is_outside(row, sizes)
    assert (found is not None) == wrong
    assert not (wrong and proves(row, leaves_of(sizes)))
    if found is not None:
        assert not 0 <= found[0] < found[1]


@settings(max_examples=examples(150))
@given(rows(), SIZES, st.data())
def test_whatever_is_free_stays_inside(row: Row, sizes: dict[tuple[str, str], int], data: st.DataObject) -> None:
    free = freedom(row, sizes, {("scalar", "p"): (-20, 20), ("dim", "A"): (0, 9), ("scalar", "f"): (0, 1)})
    if free is None:
        return
    assert all(low <= sizes[leaf] <= high for leaf, (low, high) in free.items())
    other = sizes | {leaf: data.draw(st.integers(*ends)) for leaf, ends in free.items()}
    assert not is_outside(row, other)


@settings(max_examples=examples(100))
@given(rows(), SIZES)
def test_many_values_are_looked_at_part_by_part(row: Row, sizes: dict[tuple[str, str], int]) -> None:
    whole = outside(row, sizes) is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indices, "CHUNK", 3)
        assert (outside(row, sizes) is not None) == whole


def walked(count: int, extent: int, *ops: list[Any]) -> Row:
    """x[the last of ops], for node 2 from 0 to count."""
    nodes = [["number", 0], ["dim", "N"], ["counter", 0], *ops, ["number", extent]]
    return Row("x", "indexed", 0, "x[i]", nodes, [[0, 1, 1]], [], len(nodes) - 2, len(nodes) - 2, len(nodes) - 1)


def test_rests_of_steps_are_known_without_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 * k % 8 is even: 6 at most."""
    row = walked(0, 7, ["number", 2], ["mul", 2, 3], ["number", 8], ["mod", 4, 5])
    assert proves(row, {("dim", "N"): (0, 2**31 - 1, 1)})
    assert not proves(row._replace(nodes=[*row.nodes[:-1], ["number", 6]]), {("dim", "N"): (4, 4, 0)})


def test_what_takes_too_many_values_is_said_so() -> None:
    """A billion values that no range tells: (k * k) % 1000003 is below 1000003 but not below 1000002."""
    row = walked(0, 1000002, ["mul", 2, 2], ["number", 1000003], ["mod", 3, 4], ["xor", 5, 5], ["add", 5, 6])
    assert outside(row, {("dim", "N"): 1000}) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indices, "MOST_POINTS", 1 << 18)
        with pytest.raises(TooMany):
            outside(row, {("dim", "N"): 2**31 - 1})
