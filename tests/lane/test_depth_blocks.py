"""Few rows that meet a matrix in blocks of the depth: more than the registers hold, if it is packed in panels; any, if
it lies [in, out] in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16

from sapper import Kernel, Tensor, bf16, dims, each, f32, i8, i32, kernel, tiles, u8, whole, zeros
from sapper.codegen.pipeline import facts_of, panels_of_kernel
from sapper.ir.nodes import Block, Function
from sapper.kernels import library
from sapper.lane.lower import lower
from sapper.runtime.packed import pack_array
from sapper.targets.x86_64.target import TARGETS
from sapper.tile.canonical import canonicalize
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.requests import Requests
from sapper.tile.schedule import DimClass, Facts, Schedule, Specialization
from tests.strategies import examples

from .run_lane import evaluate, run_lane, specialize
from .test_lower import recorded

LIBRARY = {k.name: k for k in library()}
M, N, K = dims("M N K")
STEPS = 32
FACTS = replace(facts_of(TARGETS["zen5"]), l2_bytes=2 * 8 * STEPS * 2 * 64)
"""Blocks of STEPS steps, so that interpreted products have several."""
NAMES = ("matmul_nt_f32", "matmul_nn_f32", "matmul_nt_bf16_bf16", "matmul_nt_i8", "matmul_nn_i8", "matmul_nt_gelu_f32",
         "matmul_nt_residual_f32", "matmul_nt_bf16")


def run(name: str, rows: int, columns: int, depth: int, facts: Facts = FACTS, schedule: Schedule | None = None,
        workers: int = 1) -> Function:
    """Lower a product with its right matrix packed, run it and compare it with the reference."""
    entry = LIBRARY[name]
    function = reduce_loops(entry.kernel.tile_ir())
    canonicalize(function)
    arguments = entry.make_arguments(np.random.default_rng(1), {"M": rows, "N": columns, "K": depth})
    dtype = dict(entry.kernel.parameters)["b"].dtype
    packed = {"b": pack_array(arguments["b"], dtype, panels_of_kernel(entry.kernel, "b", TARGETS["zen5"]))}
    hints = {"M": 8 if rows <= 16 else 64, "N": 512, "K": 512}
    specialization = specialize(function, arguments, hints)
    lane = run_lane(function, arguments, schedule, facts, specialization, workers, packed=packed)
    assert entry.compare(arguments, entry.reference(arguments)) is None
    return lane


def in_blocks(lane: Function, loops: tuple[str, ...] = ("k", "m", "k")) -> bool:
    """Whether loops over the depth stand in one over rows, and that in one over the depth."""
    def found(block: Block, around: tuple[Any, ...]) -> bool:
        labels = [(op, (*around, op.attributes.get("label"))) for op in block.ops if op.blocks]
        return any(label[-len(loops):] == loops or found(inner, label) for op, label in labels for inner in op.blocks)

    return found(lane.body, ())


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("depth", [3, 64, 131, 200])
def test_sums_pass_from_block_to_block(name: str, depth: int) -> None:
    """One block, several, and such as leave some of the depth, or elements that fill no slot."""
    for columns, workers in ((96, 1), (70, 2)):
        assert in_blocks(run(name, 16, columns, depth, workers=workers))


@settings(max_examples=examples(10), deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 140), st.integers(1, 300), st.integers(1, 3))
def test_any_columns_and_any_depth(name: str, columns: int, depth: int, workers: int) -> None:
    run(name, 16, columns, depth, workers=workers)


def test_only_where_registers_lack_room_for_all_rows_that_are_known() -> None:
    assert in_blocks(run("matmul_nt_f32", 16, 64, 70))
    assert not in_blocks(run("matmul_nt_f32", 15, 64, 70))       # may be fewer
    assert not in_blocks(run("matmul_nt_f32", 32, 64, 70))       # many: arithmetic takes longer than memory
    assert not in_blocks(run("matmul_nt_f32", 16, 64, 70, schedule=Schedule(registers={"m": 8, "n": 2})))
    assert in_blocks(run("matmul_nt_f32", 16, 64, 70, replace(FACTS, fma_per_cycle=1.0)))
    assert in_blocks(run("matmul_nt_f32", 16, 64, 70, replace(FACTS, vector_registers=16)))     # a quarter of them
    assert not in_blocks(run("matmul_nt_f32", 16, 64, 70, replace(FACTS, software_prefetch=False)))


PLACES, AHEAD = 5, 1 << 10
FROM_PLACES = replace(FACTS, requests=Requests(panel_parts=PLACES, long_row_ahead_bytes=AHEAD))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("depth", [3, 64, 131, 200])
def test_blocks_are_made_of_several_places(name: str, depth: int) -> None:
    """Some steps of each at a time; less than a step of each, and such depths as leave some steps of them all."""
    for columns, workers in ((96, 1), (70, 2)):
        assert in_blocks(run(name, 16, columns, depth, FROM_PLACES, workers=workers))


def test_each_line_of_each_place_is_asked_for_along_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By both pieces of rows, all the same bytes ahead: so as many lines as a panel has, one behind the other."""
    depth = 147
    asked, _ = recorded(monkeypatch, "load")
    run("matmul_nt_f32", 16, 32, depth, FROM_PLACES)
    assert sorted(asked) == [line for line in range(min(asked), min(asked) + 2 * depth) for _ in range(2)]


@pytest.mark.parametrize(("name", "depth"), [("matmul_nt_f32", 128), ("matmul_nt_f32", 147), ("matmul_nt_i8", 1000)])
def test_each_line_of_a_panel_is_asked_for_once_a_block_ahead(name: str, depth: int,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all panels but the first block, before it is read; and as many lines past the last one's end."""
    asked, early = recorded(monkeypatch, "load")
    run(name, 16, 128, depth)
    slots = -(-depth // 4) if name == "matmul_nt_i8" else depth
    lines = 4 * slots * 2
    assert len(asked) == len(set(asked)) == lines
    assert sum(early.values()) == lines - STEPS * 2


IN_MEMORY = replace(facts_of(TARGETS["zen4"]), l2_bytes=4 * 64 * 64)
"""Sums of 64 columns at a time."""
PLAIN_NAMES = ("matmul_nn_f32", "matmul_nn_bf16", "matmul_nn_bf16_bf16", "matmul_nn_i8")


def run_plain(name: str, rows: int, columns: int, depth: int, facts: Facts = IN_MEMORY,
              schedule: Schedule | None = None, workers: int = 1) -> Function:
    """The same as `run` with both matrices as they are."""
    entry = LIBRARY[name]
    function = reduce_loops(entry.kernel.tile_ir())
    canonicalize(function)
    arguments = entry.make_arguments(np.random.default_rng(1), {"M": rows, "N": columns, "K": depth})
    hints = {"M": 1 if rows == 1 else 8 if rows <= 16 else 64, "N": 512, "K": 512}
    lane = run_lane(function, arguments, schedule, facts, specialize(function, arguments, hints), workers)
    assert entry.compare(arguments, entry.reference(arguments)) is None
    return lane


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", PLAIN_NAMES)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_columns_go_by_inside_a_block_of_rows_in_memory(name: str, rows: int) -> None:
    for columns, depth, workers in ((150, 64, 1), (64, 131, 1), (70, 200, 2), (200, 3, 2)):
        lane = run_plain(name, rows, columns, depth, workers=workers)
        assert in_blocks(lane, ("k", "n", "m", "k")[:3 if rows == 1 else 4])     # 16 rows may be no loop
    asked = [op for op in lane.walk() if op.name == "prefetch"]
    assert asked


@settings(max_examples=examples(10), deadline=None)
@given(st.sampled_from(PLAIN_NAMES), st.integers(1, 16), st.integers(1, 140), st.integers(1, 300), st.integers(1, 3))
def test_any_rows_in_memory(name: str, rows: int, columns: int, depth: int, workers: int) -> None:
    run_plain(name, rows, columns, depth, workers=workers)


def test_only_where_few_rows_meet_them_once() -> None:
    inside = ("k", "n", "m", "k")
    assert in_blocks(run_plain("matmul_nn_f32", 16, 64, 70), inside)
    assert in_blocks(run_plain("matmul_nn_i8", 16, 64, 70), inside)
    assert not in_blocks(run_plain("matmul_nn_f32", 40, 64, 70), inside)
    assert not in_blocks(run_plain("matmul_nn_f32", 4, 64, 70, schedule=Schedule(order=("n", "m"))), inside)
    other = replace(IN_MEMORY, fma_per_cycle=2.0)
    assert not in_blocks(run_plain("matmul_nn_f32", 4, 64, 70, other), inside)
    assert in_blocks(run_plain("matmul_nn_f32", 4, 64, 70, replace(other, vector_registers=16)), inside)
    other = replace(other, requests=Requests(rows_in_blocks=16))
    assert in_blocks(run_plain("matmul_nn_f32", 4, 64, 70, other), inside)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", PLAIN_NAMES)
@pytest.mark.parametrize("rows", [1, 4, 9, 16])
def test_blocks_have_as_many_rows_as_the_target_says(name: str, rows: int) -> None:
    facts = replace(facts_of(TARGETS["cascadelake"]), l2_bytes=4 * 64 * 64)
    assert facts.requests.rows_in_blocks == 16
    elements = 4 if name.endswith("i8") else 1
    for columns, depth in ((150, 131), (64, 200)):
        assert 16 // elements in depth_steps(run_plain(name, rows, columns, depth, facts)) or rows == 1


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", PLAIN_NAMES)
@pytest.mark.parametrize("rows", [1, 4, 9])
def test_columns_go_by_inside_where_registers_are_few(name: str, rows: int) -> None:
    """Though two multiply-adds start in a cycle."""
    facts = replace(facts_of(TARGETS["zen3"]), l2_bytes=4 * 64 * 64)
    for columns, depth in ((150, 131), (64, 200)):
        lane = run_plain(name, rows, columns, depth, facts)
        assert in_blocks(lane, ("k", "n", "m", "k")[:3 if rows == 1 else 4])


@pytest.mark.parametrize(("rows", "met"), [(1, 1), (4, 4)])
def test_bytes_that_are_joined_meet_four_rows(rows: int, met: int) -> None:
    """Four vectors at a time, where there are 16 registers."""
    lane = run_plain("matmul_nn_i8", rows, 64, 128, facts_of(TARGETS["zen3"]))
    joined = [[op.name for op in block.ops] for op in lane.walk() for block in op.blocks
              if any(o.name == "interleave" for o in block.ops)]
    assert joined
    assert any(names.count("dot4_i8i8") == 4 * met * names.count("interleave") for names in joined)


@pytest.mark.parametrize(("rows", "bytes_"), [(1, 16 << 10), (4, 4 << 10)])
def test_a_single_row_has_its_sums_in_half_of_the_first_cache(rows: int, bytes_: int) -> None:
    """So that pieces of rows are long; several have theirs in a part of the second."""
    facts = replace(IN_PIECES, l1_bytes=32 << 10, l2_bytes=256 << 10)
    lane = run_plain("matmul_nn_f32", rows, 64, 128, facts)
    steps = {op.attributes["step"] for op in lane.walk() if op.name == "loop" and op.attributes.get("label") == "n"}
    assert max(steps) * 4 == bytes_


END_TO_END = facts_of(TARGETS["zen3"])
IN_PIECES = replace(END_TO_END, requests=END_TO_END.requests._replace(rows_end_to_end=0))


def depth_steps(lane: Function) -> set[int]:
    """How many rows of the matrix the loops go by that have one over the columns inside."""
    return {op.attributes["step"] for op in lane.walk() if op.name == "loop" and op.attributes.get("label") == "k"
            and any(inner.attributes.get("label") == "n" for inner in op.blocks[0].ops)}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["matmul_nn_f32", "matmul_nn_bf16"])
@pytest.mark.parametrize(("rows", "steps", "in_pieces"), [(1, {1}, {16}), (3, {8, 64}, {64}), (9, {8, 64}, {64}),
                                                          (16, {64}, {64})])
def test_few_meet_as_many_rows_of_the_matrix_as_the_processor_follows(name: str, rows: int, steps: set[int],
                                                                      in_pieces: set[int]) -> None:
    """How many there are is known as the kernel runs; more than four pass too many sums through memory. A single one
    meets a row of each part of the matrix in each step."""
    for columns, depth in ((40, 131), (150, 70), (64, 7)):
        assert depth_steps(run_plain(name, rows, columns, depth, END_TO_END)) == steps
    assert depth_steps(run_plain(name, rows, 40, 131, IN_PIECES)) == in_pieces


@kernel
def weighted(q: Tensor[f32, K], place: Tensor[i32, K], table: Tensor[f32, M, 48], out: Tensor[f32, 48]):
    for n in tiles(48):
        total = zeros(n, dtype=f32)
        for k in tiles(K):
            total += q[k] @ table[place[k], n]
        out[n] = total


def test_gathered_rows_of_a_known_length_may_lie_anywhere() -> None:
    random = np.random.default_rng(0)
    q, table = (random.integers(-9, 10, shape).astype(np.float32) for shape in (40, (5, 48)))
    place, out = random.integers(0, 5, 40).astype(np.int32), np.zeros(48, np.float32)
    run_lane(reduce_loops(weighted.tile_ir()), {"q": q, "place": place, "table": table, "out": out}, facts=END_TO_END)
    np.testing.assert_array_equal(out, q @ table[place])


@kernel
def columns_of(x: Tensor[f32, K], w: Tensor[f32, K, N], y: Tensor[f32, N]):
    for n in tiles(N):
        acc = zeros(n, dtype=f32)
        for k in tiles(K):
            acc += x[k] @ w[k, n]
        y[n] = acc


@kernel
def absorbed(x: Tensor[f32, M, K], w: Tensor[bf16, M, K, N], y: Tensor[f32, M, N]):
    for m in each(M):
        n, k = whole(N), whole(K)
        y[m, n] = x[m, k] @ w[m, k, n].to(f32)


@pytest.mark.parametrize("made", [columns_of, absorbed], ids=lambda made: made.name)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_vector_without_an_axis_of_rows_meets_them_from_end_to_end(made: Kernel, workers: int) -> None:
    """As a row of a matrix does, from several places of it, whatever its rows' length; elsewhere a few columns meet all
    of the depth."""
    function = reduce_loops(made.tile_ir())
    canonicalize(function)
    for columns, depth in ((70, 131), (1, 1)):
        random = np.random.default_rng(columns)
        batch = () if made is columns_of else (2,)
        x, w = (random.integers(-4, 5, (*batch, *extents)) for extents in ((depth,), (depth, columns)))
        arguments = {"x": x.astype(np.float32), "w": w.astype(np.float32 if made is columns_of else bfloat16),
                     "y": np.full((*batch, columns), np.nan, np.float32)}
        for facts, typical, steps in ((END_TO_END, 4096, {1}), (END_TO_END, 256, {1}), (IN_PIECES, 4096, set())):
            specialization = specialize(function, arguments, {"M": 2, "N": typical, "K": 512})
            lane = run_lane(function, arguments, None, facts, specialization, workers)
            np.testing.assert_array_equal(arguments["y"], (x[..., None, :] @ w)[..., 0, :])     # exact in f32
            assert depth_steps(lane) == steps


def test_bytes_that_few_meet_are_read_in_one_way() -> None:
    """A single vector's from end to end: two slots of four rows."""
    assert depth_steps(run_plain("matmul_nn_i8", 1, 70, 131, END_TO_END)) == {2}
    assert depth_steps(run_plain("matmul_nn_i8", 3, 70, 131, END_TO_END)) == {16}


@pytest.mark.parametrize(("rows", "workers", "facts", "total"), [
    (1, 1, END_TO_END, 1), (3, 1, END_TO_END, 1), (3, 2, END_TO_END, 4), (64, 1, END_TO_END, 5), (1, 1, IN_PIECES, 5),
])
def test_a_task_has_rows_from_end_to_end(rows: int, workers: int, facts: Facts, total: int) -> None:
    """Else it has as many columns at most as operands of so many rows are copied for."""
    function = reduce_loops(LIBRARY["matmul_nn_f32"].kernel.tile_ir())
    canonicalize(function)
    classes = {"M": DimClass(1 if rows == 1 else 8 if rows <= 16 else 64), "N": DimClass(2048, 64), "K": DimClass(2048)}
    lane = lower(function, Schedule(), facts, Specialization(classes))
    known: dict[object, int] = {"workers": workers} | {
        3 + place: {"dim.M": rows, "dim.N": 8192, "dim.K": 100}.get(slot, 0)
        for place, slot in enumerate(lane.attributes["slots"])}
    (tasks,) = [op for op in lane.walk() if op.name == "tasks"]
    assert evaluate(tasks.operands[0], known) == total


def run_deep(name: str, rows: int, columns: int, depth: int, facts: Facts, workers: int = 1) -> Function:
    """A product of many rows, where half of the second cache has room for a panel of the typical depth, or for more."""
    entry = LIBRARY[name]
    function = reduce_loops(entry.kernel.tile_ir())
    canonicalize(function)
    arguments = entry.make_arguments(np.random.default_rng(2), {"M": rows, "N": columns, "K": depth})
    specialization = specialize(function, arguments, {"M": 128, "N": 512, "K": 64})
    lane = run_lane(function, arguments, None, facts, specialization, workers)
    assert entry.compare(arguments, entry.reference(arguments)) is None
    return lane


PANEL_BYTES = 64 * 16 * 4
ONE_PANEL, MANY_PANELS = (replace(END_TO_END, l2_bytes=2 * panels * PANEL_BYTES) for panels in (1, 8))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("rows", "columns", "depth", "workers"), [
    (40, 150, 64, 1), (35, 64, 131, 1), (70, 17, 30, 2), (64, 200, 300, 1), (30, 90, 7, 3)])
def test_deep_panels_are_copied_together_and_walked_one_by_one(rows: int, columns: int, depth: int,
                                                               workers: int) -> None:
    lane = run_deep("matmul_nn_f32", rows, columns, depth, ONE_PANEL, workers)
    assert in_blocks(lane, ("n", "n", "m", "k"))
    lane = run_deep("matmul_nn_f32", rows, columns, depth, MANY_PANELS, workers)
    assert in_blocks(lane, ("n", "m", "n", "k")) and not in_blocks(lane, ("n", "n", "m", "k"))


@pytest.mark.parametrize(("name", "facts"), [
    ("matmul_nn_f32", replace(facts_of(TARGETS["zen4"]), l2_bytes=2 * 2 * PANEL_BYTES)),    # two lines of each row
    ("matmul_nt_f32", ONE_PANEL),       # rows along the depth
    ("matmul_nn_bf16", ONE_PANEL),      # widened
], ids=["two lines", "along the depth", "widened"])
def test_other_panels_are_walked_by_blocks_that_stay_in_the_second_cache(name: str, facts: Facts) -> None:
    assert not in_blocks(run_deep(name, 40, 150, 64, facts), ("n", "n", "m", "k"))


@kernel
def complex_rows(a: Tensor[f32, M, K], b: Tensor[f32, M, K], c: Tensor[f32, K, N], d: Tensor[f32, K, N],
                 out: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        k = whole(K)
        out[m, n] = a[m, k] @ c[k, n] - b[m, k] @ d[k, n]


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("depth", [64, 131])
def test_sums_of_several_products_wait_side_by_side(rows: int, depth: int) -> None:
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((rows, depth), dtype=np.float32) for _ in range(2))
    c, d = (random.standard_normal((depth, 150), dtype=np.float32) for _ in range(2))
    arguments = {"a": a, "b": b, "c": c, "d": d, "out": np.full((rows, 150), np.nan, np.float32)}
    function = reduce_loops(complex_rows.tile_ir())
    canonicalize(function)
    hints = {"M": 1 if rows == 1 else 8, "N": 512, "K": 512}
    lane = run_lane(function, arguments, None, IN_MEMORY, specialize(function, arguments, hints))
    np.testing.assert_allclose(arguments["out"], a @ c - b @ d, rtol=1e-4, atol=1e-4)
    assert in_blocks(lane, ("k", "n", "m", "k")[:3 if rows == 1 else 4])


def joining(lane: Function) -> list[tuple[Any, ...]]:
    """The labels of the loops around each place where bytes of the matrix are joined to slots."""
    def found(block: Block, around: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        here = [around] if any(op.name == "interleave" for op in block.ops) else []
        return here + [label for op in block.ops for inner in op.blocks
                       for label in found(inner, (*around, op.attributes.get("label")))]

    return found(lane.body, ())


def test_slots_are_joined_once_for_rows_that_are_known_to_take_several_pieces() -> None:
    for depth in (64, 131, 200):
        assert {around[-2:] for around in joining(run_plain("matmul_nn_i8", 16, 150, depth))} == {("n", "k")}
        assert {around[-2:] for around in joining(run_plain("matmul_nn_i8", 15, 150, depth))} == {("m", "k")}


def test_the_bytes_of_the_matrix_are_turned() -> None:
    """A single row has one sum that mends: a dot product for each vector and one for the row. Those of several rows are
    summed before."""
    for rows, mending in ((1, 1), (4, 0)):
        lane = run_plain("matmul_nn_i8", rows, 64, 128)
        joined = [block for op in lane.walk() for block in op.blocks if any(o.name == "interleave" for o in block.ops)]
        assert joined
        for block in joined:
            names = [op.name for op in block.ops]
            assert names.count("dot4_u8i8") % (4 + mending) == 0
            assert names.count("xor") == 4 * names.count("interleave")


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "rows", "block"), [
    ("matmul_nn_f32", 1, 16), ("matmul_nn_f32", 4, 64), ("matmul_nn_bf16_bf16", 1, 16), ("matmul_nn_i8", 1, 16),
    ("matmul_nn_i8", 4, 64), ("matmul_nn_i8", 16, 64)])
@pytest.mark.parametrize("lines", [8, 9, 24])
def test_each_line_of_a_block_is_asked_for_before(name: str, rows: int, block: int, lines: int,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that it begins with; but for those that the first one begins with."""
    _, early = recorded(monkeypatch, "load")
    columns = lines * 64 // LIBRARY[name].make_arguments(
        np.random.default_rng(1), {"M": 1, "N": 1, "K": 1})["b"].itemsize
    run_plain(name, rows, columns, 3 * block, replace(IN_MEMORY, l2_bytes=1 << 20))
    first = 4 if rows == 1 else 2 if rows == 16 else 1
    assert sum(early.values()) >= (3 * lines - first) * block


@kernel
def product_and_more(a: Tensor[u8, M, K], b: Tensor[i8, K, N], d: Tensor[i32, M, N], c: Tensor[i32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=i32)
        for k in tiles(K):
            acc += a[m, k] @ b[k, n]
        c[m, n] = acc + d[m, n]


def test_what_sums_begin_with_is_added_once() -> None:
    function = reduce_loops(product_and_more.tile_ir())
    canonicalize(function)
    random = np.random.default_rng(1)
    arguments = {"a": random.integers(0, 256, (3, 200)).astype(np.uint8), "d": random.integers(-9, 9, (3, 150)).astype(
        np.int32), "b": random.integers(-128, 128, (200, 150)).astype(np.int8), "c": np.zeros((3, 150), np.int32)}
    arguments = {name: arguments[name] for name in "abdc"}
    hints = {"M": 8, "N": 512, "K": 512}
    lane = run_lane(function, arguments, facts=IN_MEMORY, specialization=specialize(function, arguments, hints))
    assert in_blocks(lane, ("k", "n", "m", "k"))
    np.testing.assert_array_equal(
        arguments["c"], arguments["a"].astype(np.int32) @ arguments["b"].astype(np.int32) + arguments["d"])


MANY = replace(facts_of(TARGETS["cascadelake"]), l2_bytes=2 * 30 * 64 * 4, requests=Requests(depth_block=32))
"""Rows of 64 steps, and a panel of them, fill half of the second cache."""
MANY_NAMES = ("matmul_nt_f32", "matmul_nn_f32", "matmul_tn_f32", "matmul_nt_i8", "matmul_nn_i8", "matmul_nt_bf16_bf16",
              "matmul_nn_bf16", "matmul_nt_gelu_f32", "matmul_nt_residual_f32", "matmul_swiglu_f32")


def run_many(name: str, rows: int, columns: int, depth: int, facts: Facts = MANY, packed: bool = False,
             workers: int = 1, typical: int = 64, schedule: Schedule | None = None, deep: int = 0,
             typical_rows: int = 30) -> Function:
    """A product of more rows than the registers hold, of so many blocks of the depth at least if by blocks; compare it
    with the reference."""
    entry = LIBRARY[name]
    function = reduce_loops(entry.kernel.tile_ir())
    canonicalize(function)
    arguments = entry.make_arguments(np.random.default_rng(1), {"M": rows, "N": columns, "K": depth})
    placed = {}
    if packed:
        dtype = dict(entry.kernel.parameters)["b"].dtype
        placed = {"b": pack_array(arguments["b"], dtype, panels_of_kernel(entry.kernel, "b", TARGETS["cascadelake"]))}
    hints = {"M": typical_rows, "N": 512, "K": 4 * typical if name.endswith("i8") else typical}
    specialization = specialize(function, arguments, hints)
    with patch("sapper.lane.model.DEEP", deep):
        lane = run_lane(function, arguments, schedule, facts, specialization, workers, packed=placed)
    assert entry.compare(arguments, entry.reference(arguments)) is None
    return lane


def in_depth_blocks(lane: Function) -> bool:
    return in_blocks(lane, ("n", "k", "m", "n", "k"))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", MANY_NAMES)
@pytest.mark.parametrize(("rows", "columns", "depth", "workers"), [(30, 150, 131, 1), (47, 70, 256, 2), (30, 17, 0, 1)])
def test_many_rows_meet_one_block_of_the_depth_after_another(name: str, rows: int, columns: int, depth: int,
                                                             workers: int) -> None:
    """Whole blocks, such as leave some, or elements that fill no slot, and no depth."""
    assert in_depth_blocks(run_many(name, rows, columns, depth, workers=workers))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["matmul_nt_f32", "matmul_nt_i8", "matmul_nt_bf16_bf16", "matmul_nt_bf16"])
@pytest.mark.parametrize("depth", [3, 131])
def test_many_rows_meet_blocks_of_packed_panels(name: str, depth: int) -> None:
    assert in_depth_blocks(run_many(name, 30, 150, depth, packed=True))


@settings(max_examples=examples(10), deadline=None)
@given(st.sampled_from(MANY_NAMES), st.integers(1, 60), st.integers(1, 200), st.integers(0, 300), st.integers(1, 3),
       st.booleans())
def test_any_of_many_rows(name: str, rows: int, columns: int, depth: int, workers: int, packed: bool) -> None:
    run_many(name, rows, columns, depth, workers=workers, packed=packed and "nt" in name and "swiglu" not in name)


@pytest.mark.parametrize("name", ["matmul_nt_f32", "matmul_nn_f32", "matmul_nt_i8"])
def test_more_rows_than_a_block_has_steps_meet_it(name: str) -> None:
    """Their sums do not stay in the second cache."""
    assert in_depth_blocks(run_many(name, 70, 150, 140, typical_rows=80))


def test_sums_are_asked_for_before_the_products_that_are_added_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, early = recorded(monkeypatch, "load")
    lane = run_many("matmul_nt_f32", 70, 64, 64, typical_rows=80)
    written = [op for op in lane.walk() if op.name == "prefetch" and op.attributes.get("write")]
    assert written and {op.attributes["level"] for op in written} == {1}
    sums = set(asked) & set(early)
    assert len(sums) >= 70 * 2 and all(early[line] for line in sums)    # two vectors of each row at a time


def test_what_is_not_so_deep_has_wide_panels_where_there_are_many_rows() -> None:
    """Of 64 steps one of four vectors fills half of the second cache; for 30 rows the next one is to lie beside it."""
    facts = replace(MANY, l2_bytes=2 * 64 * 4 * 64)

    def vectors(rows: int) -> int:
        lane = run_many("matmul_nt_f32", 30, 150, 60, facts, deep=2, typical_rows=rows)
        products = [op for op in lane.walk() if op.name == "fma"]
        return max(sum(one.operands[0] is op.operands[0] for one in products) for op in products)

    assert vectors(80) > vectors(30)


@pytest.mark.parametrize("depth", [60, 64, 131])
def test_how_deep_it_is_says_the_call(depth: int) -> None:
    assert in_depth_blocks(run_many("matmul_nt_f32", 30, 70, depth, deep=2))


def test_the_depth_is_walked_in_blocks_where_rows_would_come_from_the_last_cache() -> None:
    assert not in_depth_blocks(run_many("matmul_nt_f32", 30, 150, 131, facts_of(TARGETS["zen4"])))
    assert not in_depth_blocks(run_many("matmul_nt_f32", 30, 150, 131, replace(MANY, l2_bytes=1 << 20)))
    assert not in_depth_blocks(run_many("matmul_nt_f32", 30, 150, 131, typical=32))      # one block
    assert not in_depth_blocks(run_many("matmul_nt_f32", 30, 150, 131, schedule=Schedule(stage=("b",))))
