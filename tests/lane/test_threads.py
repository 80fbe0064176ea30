"""Passes for targets whose lanes are threads: synchronising lanes, ranges of scalars, sinking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.codegen.pipeline import to_lane
from sapper.ir.nodes import Block, Builder, Function, Op, Value
from sapper.ir.types import S64, RowType, f32, i64
from sapper.kernels import find, library
from sapper.lane.interpret import run
from sapper.lane.memory import Memory
from sapper.lane.ranges import Ranges
from sapper.lane.simplify import simplify
from sapper.lane.sink import is_cheap, sink
from sapper.lane.synchronise import synchronise, unsynchronised
from sapper.tile.schedule import Facts, Schedule
from tests.lane.run_lane import run_lane, specialize
from tests.strategies.amount import examples

GPU = Facts(lanes=32, vector_registers=24, wide_lanes=32, indexed_addresses=False, software_prefetch=False,
            transposes_by_scatter=True, many_workers=True)
ROW = RowType(f32)


def lane_function(name: str, number: int = -1) -> Function:
    entry = find(name)
    function = entry.kernel.tile_ir()
    arguments = entry.make_arguments(np.random.default_rng(0), entry.check_shapes[number])
    lane = to_lane(function, Schedule(), GPU, specialize(function, arguments))
    simplify(lane, indexed_addresses=False)
    return lane


# Synchronising lanes.


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", [entry.name for entry in library()])
def test_every_kernel_is_synchronised(name: str) -> None:
    lane = lane_function(name)
    synchronise(lane)
    assert unsynchronised(lane) == []


def blocks_of(function: Function) -> list[Block]:
    return [function.body, *(b for op in function.walk() for b in op.blocks)]


@pytest.mark.parametrize("name", ["matmul_nt_f32", "attention_f32", "attention_decode_f32", "rotate_and_cache_f32"])
def test_no_synchronisation_can_be_left_out(name: str) -> None:
    lane = lane_function(name)
    synchronise(lane)
    placed = [(block, op) for block in blocks_of(lane) for op in block.ops if op.name == "sync_lanes"]
    assert placed
    for block, op in placed:
        number = block.ops.index(op)
        del block.ops[number]
        found = unsynchronised(lane)
        block.ops.insert(number, op)
        # One before a loop may stand for others inside that are then there too.
        assert found or any(inner.name == "sync_lanes" for inner in block.ops[number + 1].walk())


def test_rows_that_meet_lane_by_lane_need_none() -> None:
    """A sum of two vectors, and elementwise work in place: every lane meets its own element again."""
    for name in ("vector_add", "gelu", "swiglu"):
        lane = lane_function(name)
        synchronise(lane)
        assert not [op for op in lane.walk() if op.name == "sync_lanes"], name


class Program:
    def __init__(self) -> None:
        self.function = Function("f", "lane")
        self.builder = Builder(self.function.body)
        self.slots = ["a.data", "b.data", "dim.N"]
        self.function.attributes = {"lanes": 32, "slots": self.slots}

    def add(self, name: str, operands: list[Value], type: Any = None, **attributes: Any) -> Any:
        op = self.builder.add(name, operands, [type] if type is not None else [], **attributes)
        return op.result if type is not None else op

    def arg(self, name: str) -> Value:
        return self.add("arg", [], S64, slot=3 + self.slots.index(name))

    def number(self, value: int) -> Value:
        return self.add("s_const", [], S64, value=value)

    def loop(self, start: Value, stop: Value, step: int, body: Callable[[Value], None]) -> None:
        block, outer = Block([S64]), self.builder
        self.builder = Builder(block)
        body(block.arguments[0])
        self.builder.add("yield", [], [])
        self.builder = outer
        self.builder.add("loop", [start, stop], [], blocks=[block], step=step)


def syncs(program: Program) -> int:
    assert unsynchronised(program.function)
    synchronise(program.function)
    assert unsynchronised(program.function) == []
    return sum(op.name == "sync_lanes" for op in program.function.walk())


def test_a_row_read_by_all_lanes_after_it_was_stored() -> None:
    p = Program()
    a = p.arg("a.data")
    p.add("store", [p.add("load_splat", [p.arg("b.data")], ROW, dtype=f32), a], dtype=f32)
    p.add("store", [p.add("load_splat", [a], ROW, dtype=f32, disp=4), a], dtype=f32, disp=128)
    assert syncs(p) == 3        # before either store (a may be b), and before the load


def test_a_row_moved_by_one_lane() -> None:
    p = Program()
    a = p.arg("a.data")
    p.add("store", [p.add("load", [a], ROW, dtype=f32, disp=4), a], dtype=f32)
    assert syncs(p) == 1


def test_what_a_round_leaves_the_next_one_finds() -> None:
    p = Program()
    a, n = p.arg("a.data"), p.arg("dim.N")

    def body(i: Value) -> None:
        row = p.add("load_splat", [a], ROW, dtype=f32)
        p.add("store", [row, a], dtype=f32)

    p.loop(p.number(0), n, 1, body)
    assert syncs(p) == 2


def test_one_synchronisation_before_a_loop_serves_all_rounds() -> None:
    p = Program()
    a, b, n = p.arg("a.data"), p.arg("b.data"), p.arg("dim.N")
    p.add("store", [p.add("splat_const", [], ROW, value=1.0), a], dtype=f32)

    def body(i: Value) -> None:
        p.add("load_splat", [a], ROW, dtype=f32)

    p.loop(p.number(0), n, 1, body)
    assert b is not None and syncs(p) == 1
    assert [op.name for op in p.function.body.ops][-2:] == ["sync_lanes", "loop"]


# Ranges.


@settings(deadline=None, max_examples=examples(60))
@given(st.data())
def test_scalars_lie_in_their_ranges(data: st.DataObject) -> None:
    """Random scalar programs over two extents and a loop's counter, run for random extents."""
    p = Program()
    p.slots[:] = ["out.data", "dim.M", "dim.N"]
    out, values = p.arg("out.data"), [p.arg("dim.M"), p.arg("dim.N"), p.number(3), p.number(-2), p.number(64)]
    made: list[Value] = []

    def grow(count: int) -> None:
        for _ in range(count):
            name = data.draw(st.sampled_from(["s_add", "s_sub", "s_mul", "s_min", "s_max", "s_and", "s_floordiv",
                                              "s_mod", "s_shl", "s_sar", "s_select", "s_cmp"]))
            a, b, c = (data.draw(st.sampled_from(values)) for _ in range(3))
            if name in ("s_floordiv", "s_mod"):
                b = p.add("s_max", [b, p.number(1)], S64)
            if name in ("s_shl", "s_sar"):
                b = p.number(data.draw(st.integers(0, 5)))
            value = p.add(name, [a, b, c] if name == "s_select" else [a, b], S64,
                          **({"cond": "lt"} if name == "s_cmp" else {}))
            values.append(value)
            made.append(value)

    grow(6)

    def body(counter: Value) -> None:
        values.append(counter)
        values.append(p.add("s_sub", [values[0], counter], S64))
        made.append(values[-1])
        here = len(values)
        grow(6)
        for number, value in enumerate(made):
            p.add("s_store", [value, out], dtype=i64, disp=8 * number)
        del values[here - 2:]

    p.loop(p.number(0), values[0], data.draw(st.sampled_from([1, 7])), body)
    ranges = Ranges(p.function)
    bounds = [ranges.of(value) for value in made]
    for extents in ((1, 1), (5, 2), (data.draw(st.integers(1, 40)), data.draw(st.integers(0, 2**31 - 1)))):
        memory, array = Memory(), np.zeros(len(made), np.int64)
        run(p.function, np.array([0, 0, 0, memory.add_array("out", array), *extents]), memory, 1)
        for value, (low, high) in zip(array.tolist(), bounds, strict=True):
            assert low <= value <= high


def test_extents_divided_into_tasks_are_known_to_be_small() -> None:
    lane = lane_function("swiglu")
    ranges = Ranges(lane)
    divisions = [op for op in lane.walk() if op.name in ("s_floordiv", "s_mod")]
    assert divisions
    for op in divisions:
        assert all(low >= -(2**31) and high < 2**32 for low, high in map(ranges.of, op.operands))


# Sinking.


@pytest.mark.parametrize("name", ["softmax", "matmul_nt_f32", "attention_f32", "rope_interleaved"])
def test_sinking_changes_no_result(name: str) -> None:
    entry = find(name)
    arguments = entry.make_arguments(np.random.default_rng(0), entry.check_shapes[2])
    expected = entry.reference(arguments)
    run_lane(entry.kernel.tile_ir(), arguments, facts=GPU, workers=2, passes=lambda lane: (simplify(lane), sink(lane)))
    assert entry.compare(arguments, expected) is None


def test_what_only_the_end_reads_goes_there() -> None:
    p = Program()
    a, n = p.arg("a.data"), p.arg("dim.N")
    late = p.add("s_mul", [n, p.number(4)], S64)

    def tile(_: Value) -> None:
        p.loop(p.number(0), n, 1, lambda i: p.add("store", [p.add("splat_const", [], ROW, value=0.0), a], dtype=f32))
        p.add("store", [p.add("splat_const", [], ROW, value=1.0), p.add("s_add", [a, late], S64)], dtype=f32)

    p.loop(p.number(0), n, 1, tile)
    before = sorted(op.name for op in p.function.walk())
    sink(p.function)
    (outer,) = [op for op in p.function.body.ops if op.name == "loop"]
    names = [op.name for op in outer.blocks[0].ops]
    assert names.index("s_mul") > names.index("loop")
    assert sorted(op.name for op in p.function.walk()) == before
    inner: Op = next(op for op in outer.blocks[0].ops if op.name == "loop")
    assert not any(is_cheap(op) for op in inner.blocks[0].ops if op.name == "s_mul")
