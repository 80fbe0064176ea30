"""Rows whose lanes are joined: one after the other or together, by what takes fewer instructions."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sapper as sp
from sapper import Tensor, emulate, f32, i32, tiles, whole
from sapper.codegen.pipeline import Compiled, compile_kernel, facts_of
from sapper.lane.moves import one_by_one, rounds, together
from sapper.targets import target
from sapper.targets.ptx.target import MOVES
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Moves, Schedule

from .run_lane import run_lane

D, F = sp.dims("D F")
THREADS = target("sm_80")
ONE_BY_ONE, TOGETHER = replace(MOVES, select=1000), replace(MOVES, shuffle=0, select=0)
"""By which the one way is the cheaper one for several rows, and the other."""


@sp.kernel
def row_sums(a: Tensor[f32, D, F], out: Tensor[f32, D, 2]):
    for d in tiles(D):
        f = whole(F)
        out[d, 0] = sp.sum(a[d, f], over=f)


@sp.kernel
def row_maxima(a: Tensor[i32, D, F], out: Tensor[i32, D, 2]):
    for d in tiles(D):
        f = whole(F)
        out[d, 0] = sp.max(a[d, f], over=f)


def schedule(rows: int) -> Schedule:
    return Schedule(lane="f", registers={"d": rows})


def compiled(kernel: Any, rows: int, moves: Moves) -> Compiled:
    return compile_kernel(kernel, {}, {"a": "contiguous", "out": "contiguous"}, dict.fromkeys("DF", (2**31 - 1, 1)),
                          replace(THREADS, moves=moves), schedule(rows))


def instructions(code: Compiled) -> Counter[str]:
    """Opcodes of the text."""
    lines = (re.match(r"\s+(?:@!?%\w+ )?([a-z]\w*)[.\s;]", line) for line in code.text().splitlines())
    return Counter(found.group(1) for found in lines if found is not None)


@given(rows=st.integers(1, 32), lanes=st.sampled_from([4, 8, 16, 32]))
def test_every_row_is_whole_in_its_lane(rows: int, lanes: int) -> None:
    rows = min(rows, lanes)
    held = {row: [{(row, lane)} for lane in range(lanes)] for row in range(rows)}
    for distance, kept in rounds(rows, lanes):
        joined = {}
        for row, met in kept:
            mine = [held[row + distance if met and lane & distance else row] for lane in range(lanes)]
            joined[row] = [mine[lane][lane] | mine[lane][lane ^ distance] for lane in range(lanes)]
        held = joined
    (last,) = held.values()
    for row in range(rows):
        assert last[row] == {(row, lane) for lane in range(lanes)}


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 12])
def test_the_choice_is_that_of_the_shorter_text(rows: int) -> None:
    chosen, apart, at_once = (instructions(compiled(row_sums, rows, moves)) for moves in (
        MOVES, ONE_BY_ONE, TOGETHER))
    assert chosen.total() == min(apart.total(), at_once.total())
    assert (apart["shfl"] - at_once["shfl"]) * (rows > 1) >= 0
    assert (chosen == at_once) == (rows == 1 or together(rows, 32, MOVES) < one_by_one(rows, 32, MOVES))


def test_instructions_of_the_ways() -> None:
    """Of 8 rows: 40 shuffles, each with a join; or 7 joins of two rows and 2 of one with itself, and 8 shuffles."""
    assert one_by_one(8, 32, MOVES) == 80
    assert together(8, 32, MOVES) == 7 * 4 + 2 * 2 + 8
    assert together(1, 32, MOVES) == one_by_one(1, 32, MOVES) + 1
    assert [together(rows, 4, MOVES) for rows in (2, 4)] == [one_by_one(rows, 4, MOVES) for rows in (2, 4)] == [8, 16]


@pytest.mark.parametrize("rows", [2, 3, 5, 8])
@pytest.mark.parametrize("kernel", [row_sums, row_maxima], ids=lambda kernel: kernel.name)
def test_the_lanes_have_the_same(kernel: Any, rows: int) -> None:
    """At the lane station and on the emulator."""
    numbers = np.random.default_rng(rows).integers(-99, 99, (37, 71))
    dtype = np.float32 if kernel is row_sums else np.int32
    a = numbers.astype(dtype)
    expected = a.sum(1) if kernel is row_sums else a.max(1)
    for moves in (ONE_BY_ONE, TOGETHER):
        out = np.zeros((37, 2), dtype)
        facts = replace(facts_of(THREADS), moves=moves)
        run_lane(reduce_loops(kernel.tile_ir()), {"a": a, "out": out}, schedule(rows), facts)
        np.testing.assert_array_equal(out[:, 0], expected)
        out[:] = 0
        emulate.run(kernel, a, out, target="sm_80", workers=3, code=compiled(kernel, rows, moves))
        np.testing.assert_array_equal(out[:, 0], expected)
