"""Few rows meet all vectors of the panels of several matrices, so that these are read as they lie; short rows that
share a line ask for it once, and pages that stand in a table for the next of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from sapper.ir.nodes import Function, Op
from sapper.kernels import library
from sapper.lane.lower import lower
from sapper.tile.canonical import canonicalize
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.requests import Requests
from sapper.tile.schedule import DimClass, Facts, Panels, Schedule, Specialization

LIBRARY = {entry.name: entry for entry in library()}
PLAIN = Facts(l2_bytes=1 << 20)


def lowered(name: str, facts: Facts, strides: dict[str, Panels], dims: dict[str, tuple[int, int]],
            static: dict[str, int] | None = None) -> Function:
    function = reduce_loops(LIBRARY[name].kernel.tile_ir(static))
    canonicalize(function)
    return lower(function, Schedule(), facts, Specialization(
        {dim: DimClass(*known) for dim, known in dims.items()}, dict(strides)))


def products(lane: Function, name: str) -> Op:
    """The loop with the most products."""
    return max((op for op in lane.walk() if op.name == "loop"), key=lambda loop: count(loop, name))


def count(loop: Op, name: str) -> int:
    return sum(op.name == name for op in loop.blocks[0].ops)


@pytest.mark.parametrize(("name", "registers", "rows", "held", "whole"), [
    ("matmul_swiglu_f32", 32, 1, 1, True), ("matmul_swiglu_f32", 32, 8, 4, True),
    ("matmul_swiglu_bf16", 32, 8, 4, True), ("matmul_swiglu_f32", 32, 512, 14, False),
    ("matmul_swiglu_f32", 16, 8, 6, False), ("matmul_nt_f32", 32, 8, 14, True),
])
def test_few_rows_meet_whole_panels(name: str, registers: int, rows: int, held: int, whole: bool) -> None:
    """Both vectors of each panel, by four rows where several matrices share the registers; many rows, and those of
    fewer registers, meet a vector of each."""
    matrices = ("gate", "up") if "swiglu" in name else ("b",)
    facts = replace(PLAIN, vector_registers=registers)
    lane = lowered(name, facts, dict.fromkeys(matrices, Panels(0, 1, 32)),
                   {"M": (rows, 1), "N": (2048, 64), "K": (2048, 64)})
    loop, vectors = products(lane, "fma"), len(matrices) * (2 if whole else 1)
    steps, rest = divmod(count(loop, "fma"), held * vectors)
    assert not rest and count(loop, "load") == steps * vectors


def test_rows_of_an_expert_meet_whole_panels_of_pairs() -> None:
    """However many they are: both vectors of both matrices in a step, one of each where registers are few."""
    for registers, vectors in ((32, 4), (16, 2)):
        facts = replace(PLAIN, dots=frozenset({"dot2_bf16"}), vector_registers=registers)
        lane = lowered("grouped_pairs_swiglu_bf16", facts, {}, {
            "J": (2048, 1), "I": (512, 64), "E": (16, 1), "B": (64, 1)})
        loop = products(lane, "dot2_bf16")
        steps, rest = divmod(count(loop, "dot2_bf16"), 6 * vectors)
        assert not rest and count(loop, "load") == steps * vectors


def test_rows_that_share_a_line_ask_for_it_once() -> None:
    """Four rows of sixteen bytes in each step: one line, at each distance."""
    facts = replace(PLAIN, requests=Requests(row_streams=4))
    loop = products(lowered("matvec_fp8", facts, {}, {"P": (128, 1), "K": (7168, 64), "A": (16, 1)}), "fma")
    lines = Counter((op.operands[-1], op.attributes["disp"] // 64)
                    for op in loop.blocks[0].ops if op.name == "prefetch")
    assert set(lines.values()) == {1}


@pytest.mark.parametrize("name", ["attention_paged_bf16", "attention_paged_f32"])
def test_the_next_page_is_asked_for(name: str) -> None:
    """Where it stands in the table, each line once, and not what lies behind the page at hand."""
    facts = replace(PLAIN, requests=Requests(row_streams=4))
    lane = lowered(name, facts, {}, dict.fromkeys("THNBS", (16, 1)), {"G": 3, "D": 64})
    asked = [op for op in lane.walk() if op.name == "prefetch"]
    assert asked and all(op.attributes["disp"] < 64 * 64 for op in asked)
    pages = [op for op in lane.walk() if op.name == "loop" and count(op, "s_load") == 2][-1]
    here, there = (op.result for op in pages.blocks[0].ops if op.name == "s_load")
    assert [op.operands for op in pages.blocks[0].ops if op.name == "s_sub" and there in op.operands] == [[there, here]]
