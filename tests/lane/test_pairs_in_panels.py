"""Products of rows with panels of pairs of bf16 where what widens takes a multiply-add's place (a Cascade Lake)."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from sapper.ir.nodes import Function, Op
from sapper.kernels.fp8_panels import matmul_fp8, matmul_swiglu_fp8, product_reference
from sapper.lane.lower import lower
from sapper.tile.canonical import canonicalize
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.requests import Requests
from sapper.tile.schedule import Facts, Schedule

from .run_lane import run_lane, specialize

AHEAD = 1 << 10
CORE = Facts(lanes=16, vector_registers=32, picks=True, fma_per_cycle=2.0, dots=frozenset({"fma2_bf16"}),
             shared_pipes=True, requests=Requests(reread_ahead_bytes=AHEAD))
HINTS = {"M": 128, "P": 64, "H": 1024, "A": 8, "B": 16}


def arguments_of(rows: int, gated: bool) -> dict[str, np.ndarray]:
    random = np.random.default_rng(rows)
    p, h = 3 - 2 * gated, 66        # a block of the depth, and what is left of another
    found: dict[str, np.ndarray] = {}
    for name in ("gate", "up") if gated else ("w",):
        found[name] = random.standard_normal((p, h, 16, 2)).astype(ml_dtypes.bfloat16)
        found[f"{name}_scale" if gated else "scale"] = random.standard_normal((2, 2)).astype(np.float32)
    found |= {"place": np.array([0, 1, 1], np.int32)[:p],
              "x": random.standard_normal((rows, h, 2)).astype(ml_dtypes.bfloat16)}
    return found | {"y": np.full((rows, p, 16), np.nan, np.float32)}


def prepared(made: object) -> Function:
    function: Function = reduce_loops(made.tile_ir())  # type: ignore[attr-defined]
    canonicalize(function)
    return function


def products(lane: Function) -> Op:
    """The loop with the most multiply-adds."""
    def own(loop: Op) -> int:
        return sum(op.name in ("fma", "fma2_bf16") for op in loop.blocks[0].ops)

    return max((op for op in lane.walk() if op.name == "loop"), key=own)


def count(loop: Op, name: str) -> int:
    return sum(op.name == name for op in loop.blocks[0].ops)


@pytest.mark.parametrize(("made", "rows"), [(matmul_fp8, 13), (matmul_swiglu_fp8, 5)], ids=["plain", "gated"])
def test_products_are_right(made: object, rows: int) -> None:
    arguments = arguments_of(rows, made is matmul_swiglu_fp8)
    function = prepared(made)
    specialization = specialize(function, arguments, HINTS)
    run_lane(function, arguments, facts=CORE, specialization=specialization)
    np.testing.assert_allclose(arguments["y"], product_reference(arguments)["y"], rtol=1e-3, atol=1e-3)


def lowered(facts: Facts, rows: int = 128) -> Function:
    function = prepared(matmul_fp8)
    return lower(function, Schedule(), facts, specialize(function, arguments_of(12, False), HINTS | {"M": rows}))


def test_rows_are_widened_before_and_panels_once_for_all_that_are_held() -> None:
    """Twelve rows by two panels, a pair of numbers of each."""
    loop = products(lowered(CORE))
    assert count(loop, "fma") == 12 * 2 * 2
    assert count(loop, "shl") == count(loop, "and") == 2
    apart = products(lowered(replace(CORE, shared_pipes=False)))
    assert count(apart, "fma") == 0 and count(apart, "fma2_bf16") > 0


def test_rows_are_widened_before_where_registers_are_few() -> None:
    """Five rows by the two vectors of a panel: a shift and a mask for each of these, none for the rows."""
    facts = replace(CORE, lanes=8, vector_registers=16, shared_pipes=False, split_dots=CORE.dots)
    loop = products(lowered(facts))
    assert count(loop, "fma") == 2 * count(loop, "shl") * 5 == 2 * count(loop, "and") * 5 > 0
    apart = products(lowered(replace(facts, vector_registers=32)))
    assert count(apart, "fma") == 0 and count(apart, "fma2_bf16") > 0


def test_panels_are_asked_for_ahead() -> None:
    """A line of each in a step of the depth."""
    asked = [op for op in products(lowered(CORE)).blocks[0].ops if op.name == "prefetch"]
    assert [(op.attributes["level"], op.attributes["disp"]) for op in asked] == [(1, AHEAD)] * 2
    assert not count(products(lowered(replace(CORE, requests=Requests()))), "prefetch")


def test_few_rows_meet_a_panel_at_once_as_a_stream_from_memory() -> None:
    requests = CORE.requests._replace(rows_together=16, stream_ahead_bytes=3 << 10)
    loop = products(lowered(replace(CORE, requests=requests), 16))
    assert count(loop, "fma") == 16 * 2
    assert [op.attributes["disp"] for op in loop.blocks[0].ops if op.name == "prefetch"] == [3 << 10]
    assert count(products(lowered(replace(CORE, requests=requests), 4)), "fma") == 0     # what widens is not worth it
