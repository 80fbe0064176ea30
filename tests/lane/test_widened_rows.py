"""Rows that are widened while something meets them first (sapper/lane/widened_rows.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import Tensor, bf16, each, f32, i32, max, maximum, span, tiles, where, whole, zeros
from sapper.ir.nodes import Block
from sapper.lane.lower import lower
from sapper.tile.interpret import interpret
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.requests import Requests
from sapper.tile.schedule import Facts, Schedule
from tests.lane.run_lane import run_lane, specialize
from tests.strategies import examples

B, H, N = sp.dims("B H N")
ALONE = Facts()     # one multiply-add starts in a cycle
STREAMS = replace(ALONE, requests=Requests(row_streams=4))
AHEAD = replace(ALONE, fma_per_cycle=2, vector_registers=16)


def make(width: int) -> Any:
    @sp.kernel
    def attend(q: Tensor[f32, B, H, width], rows: Tensor[bf16, N, width], last: i32, out: Tensor[f32, B, H, width]):
        """Rows that are keys and values: products with sums of their own, and sums of what these weigh."""
        for b in each(B):
            for h in tiles(H):
                e = whole(width)
                acc = zeros(h, e, dtype=f32)
                highest = zeros(h, dtype=f32)
                for n in tiles(span(b, last + 1)):
                    row = rows[n, e]
                    score = q[b, h, e] @ row
                    higher = maximum(highest, max(score, over=n))
                    acc = acc * where(higher >= highest, 1.0, 0.0) + score @ row
                    highest = higher
                out[b, h, e] = acc

    return attend


ATTEND = {width: make(width) for width in (32, 24)}


def arguments_of(width: int, b: int, h: int, last: int, more: int = 0, seed: int = 0) -> dict[str, Any]:
    """Small integers, of which all sums are exact; rows past the last one hold NaN."""
    random = np.random.default_rng(seed)
    rows = random.integers(-1, 2, (last + 1 + more, width)).astype(ml_dtypes.bfloat16)
    rows[last + 1:] = np.nan
    return {"q": random.integers(-1, 2, (b, h, width)).astype(np.float32), "rows": rows, "last": last,
            "out": np.full((b, h, width), np.nan, np.float32)}


def blocks_that_widen(facts: Facts, width: int) -> list[Block]:
    """The innermost blocks that load rows."""
    function = reduce_loops(ATTEND[width].tile_ir())
    lowered = lower(function, Schedule(), facts, specialize(function, arguments_of(width, 2, 16, 255), {"N": 2048}))
    blocks = [lowered.body, *(block for op in lowered.walk() for block in op.blocks)]
    return [block for block in blocks if any(op.name == "load" and op.attributes["dtype"] is bf16 for op in block.ops)]


def multiplies(block: Block) -> bool:
    return any(op.name in ("fma", "mul") for op in block.ops)


def test_rows_are_widened_beside_the_products_that_meet_them_first() -> None:
    found = blocks_that_widen(ALONE, 32)
    assert found and all(map(multiplies, found))


def test_the_piece_before_widens_them_where_registers_are_few() -> None:
    """Of what a block stores as it multiplies, it loads nothing: that was stored before."""
    def places(block: Block, name: str) -> set[object]:
        return {(op.operands[-1], op.attributes["disp"]) for op in block.ops if op.name == name
                and op.attributes["dtype"] is f32}

    found = [block for block in blocks_that_widen(AHEAD, 32) if multiplies(block)]
    assert found
    for block in found:
        assert places(block, "store") and not places(block, "store") & places(block, "load_splat")


@pytest.mark.parametrize(("facts", "width"), [(replace(ALONE, fma_per_cycle=2), 32), (ALONE, 24)])
def test_a_walk_of_their_own_widens_them(facts: Facts, width: int) -> None:
    """Where multiply-adds leave no time for it, or the rows are no whole vectors."""
    found = blocks_that_widen(facts, width)
    assert found and not any(map(multiplies, found))


@settings(max_examples=examples(8), deadline=None)
@example(width=32, b=1, h=16, last=40, more=0, facts=ALONE, workers=1, seed=0)
@given(width=st.sampled_from(sorted(ATTEND)), b=st.integers(1, 3), h=st.sampled_from([3, 16, 20]),
       last=st.integers(0, 150), more=st.integers(0, 3), facts=st.sampled_from([ALONE, STREAMS, AHEAD]),
       workers=st.integers(1, 2), seed=st.integers(0, 99))
def test_any_rows(width: int, b: int, h: int, last: int, more: int, facts: Facts, workers: int, seed: int) -> None:
    function = reduce_loops(ATTEND[width].tile_ir())
    arguments = arguments_of(width, b, h, last, more, seed)
    expected = {name: value if isinstance(value, int) else value.copy() for name, value in arguments.items()}
    interpret(function, expected)
    run_lane(function, arguments, facts=facts, specialization=specialize(function, arguments, {"N": 2048}),
             workers=workers)
    np.testing.assert_array_equal(arguments["out"], expected["out"])


def test_each_line_of_the_next_tile_is_asked_for_once() -> None:
    """By the block that widens: so many bytes as it reads."""
    def bytes_of(block: Block, name: str) -> int:
        return sum(64 if op.name == "prefetch" else 32 for op in block.ops if op.name == name and (
            name == "prefetch" or op.attributes["dtype"] is bf16))

    found = [block for block in blocks_that_widen(STREAMS, 32) if bytes_of(block, "prefetch")]
    assert found and all(bytes_of(block, "prefetch") == bytes_of(block, "load") for block in found)
    assert not any(bytes_of(block, "prefetch") for block in blocks_that_widen(ALONE, 32))
