"""Rows that lie a stride apart that is known when the kernel runs: how many addresses they take, and which loops."""

import numpy as np
import pytest

from sapper.ir.nodes import Block, Function
from sapper.kernels import find
from sapper.lane.lower import lower
from sapper.lane.ops import ADDRESS_AT
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import DimClass, Facts, Schedule, Specialization

from .run_lane import run_lane, specialize

AVX512, AVX2 = Facts(lanes=16, vector_registers=32), Facts(lanes=8, vector_registers=16)


def first_square(function: Function) -> Block:
    """The body of the first loop that exchanges lanes."""
    return next(op.blocks[0] for op in function.walk() if op.name == "loop"
                and any(inner.name == "exchange" for inner in op.blocks[0].ops))


def bases(block: Block, name: str) -> int:
    """How many addresses the ops of a name count from."""
    return len({op.operands[ADDRESS_AT[name]] for op in block.ops if op.name == name})


@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
def test_eight_rows_have_one_address(facts: Facts) -> None:
    """In whole squares: at an edge each has its own, as those that are not there are the last one."""
    function = reduce_loops(find("transpose_f32").kernel.tile_ir())
    x = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    square = first_square(lower(function, Schedule(), facts, specialize(function, {"x": x, "y": x})))
    assert bases(square, "load") == bases(square, "store") == facts.lanes // 8


@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (37, 50), (16, 7), (5, 40), (0, 3)])
def test_rows_of_strided_memory(rows: int, columns: int, facts: Facts) -> None:
    function = reduce_loops(find("transpose_f32").kernel.tile_ir())
    x = np.random.default_rng(rows).standard_normal((rows, columns + 9), np.float32)[:, 4:columns + 4]
    y = np.full((columns, rows + 3), np.nan, np.float32)
    hints = {"M": 64, "N": 64}
    arguments = {"x": x, "y": y[:, :rows]}
    run_lane(function, arguments, facts=facts, specialization=specialize(function, arguments, hints))
    np.testing.assert_array_equal(y[:, :rows], x.T)
    assert np.isnan(y[:, rows:]).all()


def test_a_panel_is_turned_by_one_square_in_a_loop() -> None:
    """Not by as many as the panel is wide, one after the other."""
    function = reduce_loops(find("matmul_nt_f32").kernel.tile_ir())
    dims = {name: DimClass(512, 64) for name in "MNK"}
    lane = lower(function, Schedule(registers={"m": 6, "n": 4}), AVX512, Specialization(dims))
    assert sum(op.name == "exchange" for op in lane.walk()) == 16 // 2 * 4


@pytest.mark.parametrize(("divisor", "tails"), [(64, 0), (16, 1), (1, 1)])
def test_blocks_of_a_whole_number_of_tiles_have_no_tail(divisor: int, tails: int) -> None:
    """Attention takes its queries in blocks of 32, the last one min(first + 32, T): a multiple of what T is."""
    function = reduce_loops(find("attention_bf16").kernel.tile_ir())
    dims = {"T": DimClass(512, divisor), "D": DimClass(64, 64), "P": DimClass(512, 1)}
    lane = lower(function, Schedule(), AVX512, Specialization(dims))
    assert sum(op.name == "loop" and op.attributes["label"] == "t" for op in lane.walk()) == 1 + tails
