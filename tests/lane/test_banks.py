"""Proofs of bank conflicts: the same as counting, for linear places and others, wherever they begin."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.lane import fragments
from sapper.lane.banks import LANES, linear_columns, phase_lanes, prove, rank
from sapper.lane.pieces import CHUNK_BYTES, SWIZZLED_ROWS
from tests.strategies.amount import examples

WIDTHS = st.sampled_from([1, 2, 4, 8, 16])


def counted(places: list[int], width: int) -> tuple[int, ...]:
    """Cycles of each phase, byte by byte."""
    cycles = []
    for first in range(0, len(places), phase_lanes(width)):
        phase = places[first:first + phase_lanes(width)]
        words = {byte // 4 for place in phase for byte in range(place, place + width)}
        cycles.append(max(Counter(word % 32 for word in words).values()))
    return tuple(cycles)


def linear(columns: list[int], start: int, width: int) -> list[int]:
    places = []
    for lane in range(LANES):
        place = start
        for bit, column in enumerate(columns):
            place ^= column if lane >> bit & 1 else 0
        places.append(place // width * width)
    return places


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(st.integers(0, 4095), min_size=5, max_size=5), st.integers(0, 4095), WIDTHS)
def test_ranks_say_what_counting_says(columns: list[int], start: int, width: int) -> None:
    places = linear(columns, start, width)
    proof = prove(places, width)
    assert proof.linear and proof.cycles == counted(places, width)
    assert proof.free == (proof.word_rank == proof.bank_rank) == (proof.meet is None)


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(st.integers(0, 255), min_size=LANES, max_size=LANES), WIDTHS, st.integers(0, 63), st.integers(0, 127))
def test_any_places_wherever_they_begin(chosen: list[int], width: int, base: int, flip: int) -> None:
    places = [place * width for place in chosen]
    proof = prove(places, width)
    assert proof.cycles == counted(places, width)
    unit = max(width, 4)
    moved = [(place ^ flip * unit) + base * unit for place in places]
    assert counted(moved, width) == proof.cycles
    if proof.meet is not None:
        one, other, bank = proof.meet
        assert one // phase_lanes(width) == other // phase_lanes(width) and places[one] // 4 != places[other] // 4
        assert {(places[lane] // 4 - places[0] // 4) % 32 for lane in (one, other)} == {bank}


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.integers(0, 63), max_size=7))
def test_the_rank_is_that_of_all_sums(rows: list[int]) -> None:
    sums = {0}
    for row in rows:
        sums |= {row ^ other for other in sums}
    assert len(sums) == 1 << rank(rows)


def test_what_is_linear() -> None:
    assert linear_columns([0, 4, 8, 12]) == [4, 8]
    assert linear_columns([48 * row for row in range(8)]) is None       # padded rows: 48 + 96 carries
    assert linear_columns([0, 4, 8]) is None


def chunks(rows: int, row_bytes: int, chunk: int, turn: int) -> list[int]:
    """Where chunk `chunk` of each row lies whose chunks are swizzled by bits of the row's number (matrix.py)."""
    return [row * row_bytes + ((chunk ^ row & turn) * CHUNK_BYTES) for row in range(rows)]


@pytest.mark.parametrize("row_bytes", [128, 256, 512])
def test_rows_of_swizzled_chunks_lie_in_different_banks(row_bytes: int) -> None:
    """Eight rows of one chunk, as load_matrix reads them, and eight chunks of a row, as a copy writes them. With fewer
    bits, or none, they meet."""
    for chunk in range(8):
        proof = prove(chunks(8, row_bytes, chunk, SWIZZLED_ROWS - 1), CHUNK_BYTES)
        assert proof.linear and proof.free and proof.bank_rank == 3
        assert prove(chunks(8, row_bytes, chunk, 3), CHUNK_BYTES).cycles == (2,)
        assert prove(chunks(8, row_bytes, chunk, 0), CHUNK_BYTES).cycles == (8,)
    for row in range(8):
        places = [(chunk ^ row) * CHUNK_BYTES for chunk in range(8)]
        assert prove(places, CHUNK_BYTES).free


@pytest.mark.parametrize(("along_depth", "size"), [(True, 2), (True, 1), (False, 2)])
def test_operands_of_groups_lie_in_different_banks(along_depth: bool, size: int) -> None:
    """A matrix of eight rows of 16 bytes, which tensor cores read at once: eight outer coordinates, or, where rows lie
    along the outer axis, eight of the depth."""
    steps = np.arange(8)
    for other in range(0, 64, CHUNK_BYTES // size):
        outer, depth = (steps, np.full(8, other)) if along_depth else (np.full(8, other), steps)
        plain = fragments.near_offsets(outer, depth, along_depth, 8192, size)
        assert prove(fragments.swizzled(plain).tolist(), CHUNK_BYTES).free
        assert prove(plain.tolist(), CHUNK_BYTES).cycles == (8,)


def test_a_proof_says_who_meets() -> None:
    assert str(prove([8 * lane for lane in range(LANES)], 4)) == \
        "2 cycles for 1: lanes 0 and 16 meet in bank 0; rank 4 of 5"
    assert str(prove([36 * lane for lane in range(LANES)], 4)) == "no conflicts: each lane compared"
    assert str(prove([4 * lane for lane in range(LANES)], 4)) == "no conflicts: rank 5 of 5"
