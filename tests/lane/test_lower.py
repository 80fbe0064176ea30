"""Lowering at its own station: tile IR against lane IR under the lane interpreter."""

from __future__ import annotations

import builtins
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.ir.nodes import Block, Function, Op
from sapper.ir.text import parse_function
from sapper.ir.types import f32, i8, i32
from sapper.ir.verifier import verify
from sapper.kernels import library
from sapper.kernels.record import LibraryKernel
from sapper.lane import interpret
from sapper.lane.choices import choices
from sapper.lane.lower import lower
from sapper.lane.packed import DOTS
from sapper.lang.builtins import each, max, span, sum, tiles, whole, zeros
from sapper.lang.dims import dims
from sapper.lang.kernel import kernel
from sapper.lang.tensor import Tensor
from sapper.tile.canonical import canonicalize
from sapper.tile.ops import TILE_OPS
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.requests import Requests
from sapper.tile.rounding import expect
from sapper.tile.schedule import DimClass, Facts, Schedule, ScheduleError, Specialization
from tests.kernels.shapes import interpreted
from tests.lang.test_random_kernels import kernel_of
from tests.strategies import assert_expected, built, examples, kernels
from tests.strategies.amount import FUZZ, dealt
from tests.strategies.schedule import as_far_as_followed, draw_schedule

from .run_lane import evaluate, run_lane, specialize

AVX512 = Facts(lanes=16, vector_registers=32)
AVX2 = Facts(lanes=8, vector_registers=16)
NARROW = Facts(lanes=4, vector_registers=8, l2_bytes=4096)        # so small that panels are walked in several blocks
LIBRARY = {k.name: k for k in library()}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("entry", "facts"), [
    pytest.param(entry, facts, id=f"{entry.name}-{facts.lanes} lanes")
    for place, facts in enumerate((AVX512, NARROW)) for entry in dealt(list(LIBRARY.values()), place, 2)])
def test_library_kernel(entry: LibraryKernel, facts: Facts) -> None:
    """Of the first two shapes the wide machine takes one and the narrow one the other, each for half of the kernels; in
    a search for faults two each, for all."""
    function = reduce_loops(entry.kernel.tile_ir())
    for number, shape in enumerate(entry.check_shapes[facts is NARROW:4 if FUZZ else 2:2]):
        arguments = entry.make_arguments(np.random.default_rng(number), interpreted(entry, shape))
        expected = entry.reference(arguments)
        run_lane(function, arguments, facts=facts, workers=1 + number % 2)
        assert entry.compare(arguments, expected) is None


@settings(max_examples=examples(60))
@given(case=kernels(), seed=st.integers(0, 1000), facts=st.sampled_from([AVX512, AVX2, NARROW]),
       workers=st.integers(1, 3), hint=st.sampled_from([None, 1, 7, 40, 1000, 20000]))
def test_random_kernels(case, seed, facts, workers, hint) -> None:
    """Every kernel of the language means the same as lane IR, at any lane count, for any hints of the model."""
    kernel, original = built(case)
    arguments = case.make_arguments(seed)
    expectations = expect(original, arguments)
    function = reduce_loops(kernel.tile_ir())
    hints = None if hint is None else dict.fromkeys(case.sizes(seed), hint)
    run_lane(function, arguments, facts=facts, specialization=specialize(function, arguments, hints), workers=workers)
    assert_expected(arguments, expectations, repr(case))


@settings(max_examples=examples(60))
@given(case=kernels(), data=st.data(), seed=st.integers(0, 1000), facts=st.sampled_from([AVX512, AVX2, NARROW]),
       workers=st.integers(1, 3), hint=st.sampled_from([None, 40, 20000]))
def test_random_schedules(case, data, seed, facts, workers, hint) -> None:
    """No schedule changes what a kernel means; one that can't be followed is refused with a reason."""
    kernel, original = built(case)
    arguments = case.make_arguments(seed)
    expectations = expect(original, arguments)
    function = reduce_loops(kernel.tile_ir())
    schedule = draw_schedule(data, function)
    hints = None if hint is None else dict.fromkeys(case.sizes(seed), hint)
    try:
        as_far_as_followed(schedule, lambda taken: run_lane(
            function, arguments, taken, facts, specialize(function, arguments, hints), workers))
    except ScheduleError as error:
        assert "expected" in str(error)
        return
    assert_expected(arguments, expectations, f"{schedule}\n{case!r}")


@settings(max_examples=examples(40))
@given(m=st.integers(0, 70), n=st.integers(0, 70), k=st.integers(0, 40), rows=st.integers(1, 14),
       wide=st.integers(1, 3), depth=st.integers(1, 9), order=st.sampled_from([(), ("m", "n"), ("n", "m")]),
       stage=st.sampled_from([None, (), ("a",), ("b",), ("a", "b")]),
       name=st.sampled_from(["matmul_nn_f32", "matmul_nt_f32", "matmul_tn_f32"]), lane=st.sampled_from([None, "n"]))
def test_matmul_schedules(m, n, k, rows, wide, depth, order, stage, name, lane) -> None:
    """No schedule changes what is computed."""
    entry = LIBRARY[name]
    function = reduce_loops(entry.kernel.tile_ir())
    arguments = entry.make_arguments(np.random.default_rng(m), {"M": m, "N": n, "K": k})
    expected = entry.reference(arguments)
    schedule = Schedule(lane=lane, registers={"m": rows, "n": wide, "k": depth}, order=order, stage=stage)
    try:
        run_lane(function, arguments, schedule, AVX512,
                 specialize(function, arguments, {"M": 100, "N": 100, "K": 100}), workers=2)
    except ScheduleError:
        assert order == ("m", "n") and stage   # what is staged is copied inside the loop over the lane axis
        return
    assert entry.compare(arguments, expected) is None


def test_a_step_of_depth_never_crosses_two_blocks_of_a_staged_operand() -> None:
    """Rows are copied in blocks of as many steps as there are lanes: a step of 3 once read past the block's end."""
    entry = LIBRARY["matmul_nn_f32"]
    function = reduce_loops(entry.kernel.tile_ir())
    arguments = entry.make_arguments(np.random.default_rng(0), {"M": 28, "N": 64, "K": 33})
    expected = entry.reference(arguments)
    run_lane(function, arguments, Schedule(registers={"k": 3}), AVX512,
             specialize(function, arguments, {"M": 512, "N": 512, "K": 512}))
    assert entry.compare(arguments, expected) is None


@pytest.mark.parametrize(("schedule", "part"), [
    (Schedule(lane="q"), "no axis 'q'"),
    (Schedule(stage=("z",)), "no tensor 'z'"),
    (Schedule(lane="m", tile={"m": 5}), "multiple of the 16 lanes"),
    (Schedule(order=("m", "n"), stage=("b",)), "lane axis n outermost"),
])
def test_illegal_schedules_are_refused(schedule: Schedule, part: str) -> None:
    entry = LIBRARY["matmul_nn_f32"]
    arguments = entry.make_arguments(np.random.default_rng(0), {"M": 3, "N": 3, "K": 3})
    with pytest.raises(ScheduleError, match=part.replace("(", "\\(")):
        run_lane(reduce_loops(entry.kernel.tile_ir()), arguments, schedule)


def test_a_tile_of_an_axis_that_the_model_puts_across_the_lanes_is_whole_vectors() -> None:
    function = reduce_loops(LIBRARY["latent_attention_decode_f32"].kernel.tile_ir({"H": 16, "C": 64, "S": 32}))
    canonicalize(function)
    specialization = Specialization({"P": DimClass(1000), "B": DimClass(16)}, {})
    for rows, part in ((12, "tile of h is 12, and the model has h across the lanes"), (32, None)):
        try:
            lower(function, Schedule(tile={"h": rows}), AVX512, specialization)
            assert part is None
        except ScheduleError as error:
            assert part is not None and part in str(error)


def test_schedule_json_round_trip() -> None:
    schedule = Schedule("n", {"m": 4}, {"k": 2}, ("n", "m"), ("b",), None, {"m": 3}, requests={"again": False}, lanes=8)
    assert Schedule.from_json(schedule.to_json()) == schedule
    with pytest.raises(ScheduleError, match="unknown schedule entry"):
        Schedule.from_json({"slots": 3})


@pytest.mark.parametrize("dtype", ["i8", "u8", "i16", "i32"])
def test_reductions_of_nothing_give_the_extremes_of_their_dtype(dtype: str) -> None:
    text = f"""tile func @extremes(%a: tensor<{dtype}, N>, %low: tensor<{dtype}, 1>, %high: tensor<{dtype}, 1>) {{
      %zero: index = const {{value = 0}}
      %N: index = dim {{name = "N"}}
      whole %zero, %N {{axis = "n"}}
      %i: index[n] = index {{axis = "n"}}
      %x: {dtype}[n] = load %a, %i
      %least: {dtype} = reduce %x {{kind = "min", over = ["n"]}}
      %most: {dtype} = reduce %x {{kind = "max", over = ["n"]}}
      store %low, %least, %zero
      store %high, %most, %zero
    }}"""
    info = np.iinfo(dtype.replace("i", "int").replace("u8", "uint8"))
    arguments = {name: np.zeros(size, info.dtype) for name, size in (("a", 0), ("low", 1), ("high", 1))}
    run_lane(parse_function(text, {"tile": TILE_OPS}), arguments)
    assert (arguments["low"][0], arguments["high"][0]) == (info.max, info.min)


D, E, F = dims("D E F")


@kernel
def contract_over_span(a: Tensor[i8, D, F], b: Tensor[i8, E, F], low: i32, high: i32, out: Tensor[i32, D, E]):
    for d, e in tiles(D, E):
        total = zeros(d, e, dtype=i32)
        for f in tiles(span(low, high)):
            total += a[d, f] @ b[e, f]
        out[d, e] = total


@kernel
def contract_beside_a_maximum(a: Tensor[f32, D, F], b: Tensor[f32, F], low: Tensor[f32, D], out: Tensor[f32, D]):
    for d in tiles(D):
        f = whole(F)
        x = a[d, f]
        low[d] = max(x, over=f)
        out[d] = x @ b[f]


def test_what_has_no_bound_is_not_staged() -> None:
    """Scratch memory for a range that is known only as the kernel runs could not be sized."""
    rng = np.random.default_rng(5)
    a, b = (rng.integers(-100, 100, (n, 90), np.int8) for n in (70, 110))
    arguments = {"a": a, "b": b, "low": 3, "high": 80, "out": np.zeros((70, 110), np.int32)}
    function = reduce_loops(contract_over_span.tile_ir())
    wide = specialize(function, arguments, dict.fromkeys("DEF", 1000))
    run_lane(function, arguments, facts=AVX512, specialization=wide)
    np.testing.assert_array_equal(arguments["out"], a[:, 3:80].astype(np.int32) @ b[:, 3:80].astype(np.int32).T)


@kernel
def sums_of_spans(a: Tensor[f32, F, E], low: Tensor[i32, D], high: Tensor[i32, D], rows: Tensor[f32, D, E],
                  out: Tensor[f32, D], first: Tensor[f32, D]):
    for d in each(D):
        f = whole(span(low[d], high[d]))
        first[d] = sum(a[f, 0], over=f)
        for e in tiles(E):
            along = zeros(e, dtype=f32)
            for g in tiles(span(low[d], high[d])):
                along += sum(a[g, e], over=g)
            rows[d, e] = along
        total = zeros(dtype=f32)
        for g in tiles(span(low[d], high[d])):
            total += sum(a[g, 1], over=g)
        out[d] = total


@pytest.mark.parametrize("facts", [AVX512, AVX2, NARROW], ids=["16 lanes", "8 lanes", "4 lanes"])
def test_a_span_that_ends_before_it_begins_is_empty(facts: Facts) -> None:
    """And reads nothing outside of its tensor."""
    low, high = (np.array(ends, np.int32) for ends in ([7, 20, 3, 39, 25, 0, 30, 2], [3, 3, 3, 0, 24, -5, -30, 33]))
    a = np.random.default_rng(3).integers(-9, 9, (40, 33)).astype(np.float32)
    arguments = {"a": a, "low": low, "high": high, "rows": np.ones((8, 33), np.float32), "out": np.ones(8, np.float32),
                 "first": np.ones(8, np.float32)}
    run_lane(reduce_loops(sums_of_spans.tile_ir()), arguments, facts=facts)
    expected = np.array([a[start:builtins.max(start, stop)].sum(0) for start, stop in zip(low, high, strict=True)])
    np.testing.assert_array_equal(arguments["rows"], expected)
    np.testing.assert_array_equal(arguments["out"], expected[:, 1])
    np.testing.assert_array_equal(arguments["first"], expected[:, 0])


@kernel
def turned_rows(a: Tensor[i8, F, E], out: Tensor[i8, D, E, F]):
    for f in tiles(F):
        d = whole(D)
        e = whole(E)
        out[d, e, f] = a[f, e] + out[d, E - 1 - e, f]


def test_lanes_of_a_tensor_that_is_known_to_be_empty() -> None:
    """All of its strides are 0 then."""
    arguments = {"a": np.zeros((0, 40), np.int8), "out": np.zeros((3, 40, 0), np.int8)}
    run_lane(reduce_loops(turned_rows.tile_ir({"F": 0})), arguments, facts=AVX512)


def test_a_contraction_walked_with_another_reduction() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((20, 30)).astype(np.float32), rng.standard_normal(30).astype(np.float32)
    arguments = {"a": a, "b": b, "low": np.zeros(20, np.float32), "out": np.zeros(20, np.float32)}
    run_lane(reduce_loops(contract_beside_a_maximum.tile_ir()), arguments, facts=AVX2)
    np.testing.assert_array_equal(arguments["low"], a.max(1))
    np.testing.assert_allclose(arguments["out"], a @ b, rtol=1e-4, atol=1e-5)


@kernel
def sum_in_another_order(a: Tensor[f32, D, F], b: Tensor[f32, E, F], out: Tensor[f32, D, E]):
    for d, e in tiles(D, E):
        total = zeros(d, e, dtype=f32)
        for f in tiles(F):
            total += b[e, f] @ a[d, f]
        out[d, e] = total


def test_a_sum_whose_axes_come_in_another_order() -> None:
    function = reduce_loops(sum_in_another_order.tile_ir())
    verify(function, TILE_OPS)
    a, b = (np.arange(n * 20, dtype=np.float32).reshape(n, 20) % 7 for n in (5, 9))
    arguments = {"a": a, "b": b, "out": np.zeros((5, 9), np.float32)}
    run_lane(function, arguments)
    np.testing.assert_array_equal(arguments["out"], a @ b.T)


def ops_named(function: Function, *names: str) -> list[str]:
    return [op.name for op in function.walk() if op.name in names]


@kernel
def row_sums(a: Tensor[f32, D, F], bias: Tensor[f32, D], out: Tensor[f32, D]):
    for d in tiles(D):
        f = whole(F)
        out[d] = sum(a[d, f] * a[d, f], over=f) + bias[d]


@kernel
def row_sums_of_larger(a: Tensor[f32, D, F], out: Tensor[f32, D]):
    for d in tiles(D):
        f = whole(F)
        out[d] = sum(a[d, f] + 1.0, over=f)


@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
def test_zeros_behind_the_end_of_a_row_need_no_select(facts: Facts) -> None:
    wide = np.full((7, 40), np.inf, np.float32)
    wide[:, :21] = np.random.default_rng(3).integers(-9, 9, (7, 21))
    a = wide[:, :21]
    schedule = Schedule(lane="f", registers={"d": 1})
    for summed, selects, expected in ((row_sums, 0, (a * a).sum(1)), (row_sums_of_larger, 1, (a + 1).sum(1))):
        arguments = {"a": a, "bias": np.zeros(7, np.float32), "out": np.full(7, np.nan, np.float32)}
        function = reduce_loops(summed.tile_ir())
        arguments = {tensor.name: arguments[tensor.name] for tensor in function.tensors()}
        lane = run_lane(function, arguments, schedule, facts)
        np.testing.assert_array_equal(arguments["out"], expected)
        assert len(ops_named(lane, "select")) == selects


@kernel
def row_sums_apart(a: Tensor[f32, D, F], out: Tensor[f32, D, 2]):
    for d in tiles(D):
        f = whole(F)
        out[d, 0] = sum(a[d, f] * a[d, f], over=f)


@pytest.mark.parametrize("rows", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
def test_sums_of_several_rows_are_finished_jointly(rows: int, facts: Facts) -> None:
    a = np.random.default_rng(rows).integers(-9, 9, (37, 21)).astype(np.float32)
    arguments = {"a": a, "bias": np.arange(37, dtype=np.float32), "out": np.full(37, np.nan, np.float32)}
    function = reduce_loops(row_sums.tile_ir())
    schedule = Schedule(lane="f", registers={"d": rows})
    run_lane(function, arguments, schedule, facts)
    np.testing.assert_array_equal(arguments["out"], (a * a).sum(1) + np.arange(37))
    lane = lower(function, schedule, facts, specialize(function, arguments))
    assert ("exchange" in ops_named(lane, "exchange")) == (rows <= facts.lanes)


def test_sums_that_do_not_lie_side_by_side_are_finished_one_by_one() -> None:
    a = np.random.default_rng(2).integers(-9, 9, (11, 21)).astype(np.float32)
    arguments = {"a": a, "out": np.full((11, 2), 5, np.float32)}
    function = reduce_loops(row_sums_apart.tile_ir())
    schedule = Schedule(lane="f", registers={"d": 4})
    run_lane(function, arguments, schedule, AVX512)
    np.testing.assert_array_equal(arguments["out"][:, 0], (a * a).sum(1))
    assert (arguments["out"][:, 1] == 5).all()
    assert not ops_named(lower(function, schedule, AVX512, specialize(function, arguments)), "exchange", "scatter")


def test_what_follows_a_contraction_is_a_loop_where_it_is_long() -> None:
    """Unrolled, each of the 28 sums of the main loop and each of those of the tails would have an error function."""
    entry = LIBRARY["matmul_nt_gelu_f32"]
    function = reduce_loops(entry.kernel.tile_ir())
    arguments = entry.make_arguments(np.random.default_rng(3), {"M": 33, "N": 70, "K": 19})
    wide = specialize(function, arguments, {"M": 100, "N": 100, "K": 100})
    lane = lower(function, Schedule(), AVX512, wide)
    assert len(ops_named(lane, "erf")) < 28
    run_lane(function, arguments, facts=AVX512, specialization=wide)
    assert entry.compare(arguments, entry.reference(arguments)) is None


def test_attention_reads_its_queries_once_and_widens_keys_by_vectors() -> None:
    entry = LIBRARY["attention_bf16"]
    function = reduce_loops(entry.kernel.tile_ir())
    arguments = entry.make_arguments(np.random.default_rng(4), {"T": 70, "H": 1, "G": 2, "D": 16, "position": 9})
    specialization = specialize(function, arguments, {"T": 512, "D": 64, "P": 512})
    lane = lower(function, Schedule(), AVX512, specialization)

    def depth_of_gathers(block: Block, loops: int) -> int:
        return builtins.max([0, *(loops for op in block.ops if op.name == "gather"),
                             *(depth_of_gathers(inner, loops + (op.name == "loop")) for op in block.ops
                               for inner in op.blocks)])

    assert depth_of_gathers(lane.body, 0) <= 5         # heads, groups, blocks, queries, elements: no positions
    splats = [op for op in lane.walk() if op.name == "load_splat" and op.attributes["dtype"].name == "bf16"]
    assert not splats
    run_lane(function, arguments, facts=AVX512, specialization=specialization)
    assert entry.compare(arguments, entry.reference(arguments)) is None


@pytest.mark.parametrize("group", [1, 3, 4, 5, 6, 9])
def test_decode_holds_the_rows_that_share_a_cache_together(group: int) -> None:
    entry = LIBRARY["attention_decode_f32"]
    function = reduce_loops(entry.kernel.tile_ir())
    arguments = entry.make_arguments(np.random.default_rng(5), {"H": 2, "G": group, "D": 20, "position": 77})
    run_lane(function, arguments, facts=AVX512, workers=2)
    assert entry.compare(arguments, entry.reference(arguments)) is None


def test_the_most_tasks_of_each_parallel_loop() -> None:
    from sapper.codegen.pipeline import to_lane
    from sapper.kernels import find
    from sapper.tile.schedule import Specialization

    def tasks(name: str, schedule: Schedule) -> object:
        return to_lane(find(name).kernel.tile_ir(), schedule, AVX512, Specialization()).attributes["tasks"]

    assert tasks("matmul_nn_f32", Schedule()) == [[[1, ["M"], 4], [1, ["N"], 64]]]
    assert tasks("matmul_nn_f32", Schedule(chunks={"m": 3})) == [[[3, [], 1], [1, ["N"], 64]]]
    assert tasks("top_k", Schedule()) == [[[1, ["M"], 1]]]
    assert tasks("group_tokens", Schedule()) == []             # nothing in it is parallel


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("granules", [18, 31, 5, 30, 120])
def test_tasks_differ_by_one_granule_at_most(granules: int, workers: int) -> None:
    """A matrix of 18 panels is 5, 5, 4 and 4 for two workers: 9 for each, and not 10 and 8."""
    function = reduce_loops(LIBRARY["matvec_f32"].kernel.tile_ir())
    canonicalize(function)
    lane = lower(function, Schedule(), AVX512, Specialization())
    (((_, _, granule),),) = lane.attributes["tasks"]
    (tasks,) = [op for op in lane.walk() if op.name == "tasks"]
    loop = next(op for op in tasks.blocks[0].ops if op.name == "loop")
    rows = granules * granule
    known: dict[object, int] = {"workers": workers, **dict.fromkeys(range(3, 8), rows)}
    total = evaluate(tasks.operands[0], known)
    starts = [evaluate(loop.operands[0], {**known, tasks.blocks[0].arguments[0]: task}) for task in range(total)]
    sizes = [(stop - start) / granule for start, stop in zip(starts, [*starts[1:], rows], strict=True)]
    assert starts[0] == 0 and sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] in (0, 1)
    assert total == (1 if workers == 1 else builtins.min(2 * workers, granules))


@pytest.mark.parametrize(("rows", "columns", "workers", "by_columns"), [
    (1024, 1024, 1, True), (1024, 1024, 2, True), (256, 2048, 3, False), (96, 1536, 3, True), (512, 576, 2, False),
    (512, 64 * 33, 2, True), (512, 64 * 31, 2, False)])
def test_tasks_of_a_product_share_its_columns_where_these_make_tasks_alike(
        rows: int, columns: int, workers: int, by_columns: bool) -> None:
    """Each task then copies panels of its own columns; else all of them, for its rows. Far more rows than columns are
    shared out themselves, and so are rows that are copied from a matrix which is contiguous along them."""
    def shares(extents: dict[str, DimClass], name: str = "matmul_nn_f32") -> tuple[int, int]:
        """How many tasks there are, and the most rows of one."""
        function = reduce_loops(LIBRARY[name].kernel.tile_ir())
        canonicalize(function)
        lane = lower(function, Schedule(), AVX512, Specialization(extents))
        (tasks,) = [op for op in lane.walk() if op.name == "tasks"]
        slots = {slot: number + 3 for number, slot in enumerate(lane.attributes["slots"])}
        sizes = {"dim.M": rows, "dim.N": columns, "dim.K": 64}
        known: dict[object, int] = {"workers": workers, **{slots[name]: size for name, size in sizes.items() if name in
                                                           slots}}
        total = evaluate(tasks.operands[0], known)
        loop = next(op for op in tasks.walk() if op.name == "loop" and op.attributes["label"] == "m")
        first = {**known, tasks.blocks[0].arguments[0]: 0}
        return total, evaluate(loop.operands[1], first) - evaluate(loop.operands[0], first)

    usual = {"M": DimClass(512, 4), "N": DimClass(512, 64), "K": DimClass(512, 64)}
    total, task_rows = shares(usual)
    assert total == (1 if workers == 1 else 2 * workers)
    assert (task_rows > rows // 2) == by_columns       # what is left of them has loops of its own
    _, task_rows = shares(usual, "matmul_tn_f32")
    assert task_rows <= rows // 2 or workers == 1
    _, task_rows = shares({"M": DimClass(2049, 4), "N": DimClass(512, 64), "K": DimClass(512, 64)})
    assert task_rows <= rows // 2 or workers == 1


@pytest.mark.parametrize("hint", [16, 512])
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_few_rows_leave_their_columns_to_all_workers(rows: int, hint: int) -> None:
    """Also where their nine granules make no tasks alike: rows make too few."""
    function = reduce_loops(LIBRARY["matmul_nt_f32"].kernel.tile_ir())
    canonicalize(function)
    lane = lower(function, Schedule(), AVX512, Specialization({"M": DimClass(hint), "N": DimClass(512, 64)}))
    slots = {slot: number + 3 for number, slot in enumerate(lane.attributes["slots"])}
    sizes = {"dim.M": rows, "dim.N": 576, "dim.K": 64}
    known: dict[object, int] = {slots[name]: size for name, size in sizes.items() if name in slots}
    for tasks in (op for op in lane.walk() if op.name == "tasks"):
        assert evaluate(tasks.operands[0], {"workers": 1, **known}) == 1
        assert evaluate(tasks.operands[0], {"workers": 2, **known}) == 4


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["matmul_nt_i8", "matmul_nt_bf16_bf16"])
def test_a_worker_copies_rows_once_for_all_of_its_tasks_that_share_columns(
        name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of another task are copied anew."""
    entry, build = LIBRARY[name], interpret._BUILDERS["load"]
    counted = [0]

    def load(program: interpret.Program, op: Op) -> Any:
        step = build(program, op)

        def run(environment: Any) -> None:
            counted[0] += 1
            step(environment)

        return run

    monkeypatch.setitem(interpret._BUILDERS, "load", load)

    def loads(chunks: dict[str, int], workers: int) -> int:
        arguments = entry.make_arguments(np.random.default_rng(1), {"M": 56, "N": 256, "K": 12})
        function = reduce_loops(entry.kernel.tile_ir())
        canonicalize(function)
        counted[0] = 0
        facts = replace(AVX512, dots=frozenset(dot.name for dot in DOTS))
        hints = {"M": 56, "N": 512, "K": 512}
        run_lane(function, arguments, Schedule(chunks=chunks), facts, specialize(function, arguments, hints), workers)
        assert entry.compare(arguments, entry.reference(arguments)) is None
        return counted[0]

    once, parted = loads({"m": 1, "n": 1}, 1), loads({"m": 2, "n": 1}, 1)
    assert loads({"m": 1, "n": 4}, 1) == once < loads({"m": 1, "n": 4}, 2)
    assert loads({"m": 2, "n": 4}, 1) == parted


def test_bits_of_an_integer_scalar() -> None:
    import sapper as sp

    n = sp.dims("N")

    @sp.kernel
    def turned(x: sp.Tensor[sp.i8, n], w: sp.Tensor[sp.u8, n], y: sp.Tensor[sp.u8, n], z: sp.Tensor[sp.i8, n]):
        for i in sp.each(n):
            y[i] = x[i].bits(sp.u8)
            z[i] = w[i].bits(sp.i8)

    x = np.array([-128, -1, 0, 1, 127], np.int8)
    arguments = {"x": x, "w": x.view(np.uint8), "y": np.zeros(5, np.uint8), "z": np.zeros(5, np.int8)}
    run_lane(turned.tile_ir(), arguments)
    np.testing.assert_array_equal(arguments["y"], x.view(np.uint8))
    np.testing.assert_array_equal(arguments["z"], x)


def test_bits_of_f16_are_refused_with_their_line() -> None:
    text = """tile func @half(%x: tensor<f16, M>, %out: tensor<i16, M>) {
  %zero: index = const {value = 0}
  %M: index = dim {name = "M"}
  tiles %zero, %M {axes = ["m"], parallel = true} {
    %im: index[m] = index {axis = "m"}
    %v: f16[m] = load %x, %im
    %w: i16[m] = bitcast %v loc("model.py":7:9)
    store %out, %w, %im
  }
}"""
    from sapper.ir.text import parse_function
    from sapper.lane.rows import LoweringError
    from sapper.tile.ops import TILE_OPS

    function = parse_function(text, {"tile": TILE_OPS})
    with pytest.raises(LoweringError, match=r"model.py:7:9: bits of f16 as i16 are not supported; cast through f32"):
        run_lane(function, {"x": np.ones(3, np.float16), "out": np.zeros(3, np.int16)})


# --- What kernels by hand taught the model ----------------------------------------------------------------------------

M, N, K = dims("M N K")


@kernel
def product(a: Tensor[f32, M, K], b: Tensor[f32, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        total = zeros(m, n, dtype=f32)
        for k in tiles(K):
            total += a[m, k] @ b[k, n]
        c[m, n] = total


@kernel
def sums_of_rows(x: Tensor[f32, M, N], y: Tensor[f32, M]):
    for m in tiles(M):
        n = whole(N)
        y[m] = sum(x[m, n], over=n)


def chosen(kernel_: object, facts: Facts, schedule: Schedule | None = None) -> Schedule:
    """The model's choices where every extent is a large multiple of 64."""
    function = kernel_.tile_ir()  # type: ignore[attr-defined]
    reduce_loops(function)
    canonicalize(function)
    dims = Specialization(dict.fromkeys("MNK", DimClass(1024, 64)))
    return choices(function, schedule or Schedule(), facts, dims).schedule


def test_no_fewer_sums_than_hide_the_latency() -> None:
    avx2 = Facts(lanes=8, vector_registers=16)
    assert chosen(product, avx2).registers["m"] == 6          # 4 would divide 64, and leave 8 sums for 8 in flight
    assert chosen(product, Facts()).registers["m"] == 14


def test_no_far_fewer_rows_than_fit() -> None:
    two = Facts(fma_per_cycle=2)                              # 4 would divide 64, and read a panel half as often again
    assert chosen(product, two).registers == {"m": 6, "n": 4, "k": 4}


def test_rows_that_are_read_where_they_lie_are_asked_for_ahead() -> None:
    """Those after the rows at hand, once in each step of the depth; the result is what it was."""
    random = np.random.default_rng(0)
    arguments = {"a": random.integers(-9, 9, (30, 12)).astype(np.float32),
                 "b": random.integers(-9, 9, (12, 40)).astype(np.float32), "c": np.zeros((30, 40), np.float32)}
    facts = Facts(lanes=4, vector_registers=8, l2_bytes=4096)
    asks = []
    for prefetches in (True, False):
        lane = run_lane(reduce_loops(product.tile_ir()), arguments, Schedule(registers={"m": 3, "n": 1, "k": 4}),
                        facts=replace(facts, software_prefetch=prefetches))
        np.testing.assert_array_equal(arguments["c"], arguments["a"] @ arguments["b"])
        sums = [loop.blocks[0].ops for loop in lane.walk() if loop.name == "loop"
                and any(op.name == "fma" for op in loop.blocks[0].ops)]
        asks.append([len({tuple(op.operands) for op in ops if op.name == "prefetch"}) for ops in sums])
    assert asks[0][0] == 3 and not any(asks[1])


def recorded(monkeypatch: pytest.MonkeyPatch, load_name: str) -> tuple[list[int], dict[int, bool]]:
    """The lines that runs from here on ask for ahead, in order; and of each that a load of that name reads, whether it
    had been asked for by then."""
    asked: list[int] = []
    early: dict[int, bool] = {}
    build_load = interpret._BUILDERS[load_name]

    def prefetch(program: interpret.Program, op: Op) -> Any:
        address, _ = program.address(op, 0)
        return lambda environment: asked.append(address(environment) // 64)

    def load(program: interpret.Program, op: Op) -> Any:
        (address, _), step = program.address(op, 0), build_load(program, op)

        def run(environment: Any) -> None:
            line = address(environment) // 64
            if line not in early:
                early[line] = line in asked
            step(environment)

        return run

    monkeypatch.setitem(interpret._BUILDERS, "prefetch", prefetch)
    monkeypatch.setitem(interpret._BUILDERS, load_name, load)
    return asked, early


@pytest.mark.parametrize(("name", "shape", "rows", "row_bytes"), [
    ("expert_matvec_f32", {"E": 3, "K": 2, "B": 3, "I": 64, "L": 32}, "I", 128),     # lanes that span a whole axis
    ("absorb_f32", {"H": 2, "D": 64, "C": 256}, "D", 512),                           # pieces of 128 columns
])
def test_rows_of_weights_are_asked_for_ahead(name: str, shape: dict[str, int], rows: str, row_bytes: int,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one row of sums: every line once, and before it is read, but for the first rows of each stretch."""
    entry = LIBRARY[name]
    arguments = entry.make_arguments(np.random.default_rng(1), shape)
    if "experts" in arguments:
        arguments["experts"][:] = [2, 0]
    asked, early = recorded(monkeypatch, "load")
    facts = replace(AVX512, requests=Requests(stream_ahead_bytes=2048))
    run_lane(reduce_loops(entry.kernel.tile_ir()), arguments, facts=facts)
    lines = arguments["w"].nbytes // 64 * shape.get("K", 1) // shape.get("E", 1)
    ahead = 2048 // row_bytes
    assert len(asked) == len(set(asked)) == lines
    assert builtins.sum(early.values()) >= lines * (shape[rows] - ahead) // shape[rows] > lines // 2


def test_rows_of_one_step_are_asked_for_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache whose rows are a vector or less each, so that no loop walks along them."""
    entry = LIBRARY["attention_paged_f32"]
    arguments = entry.make_arguments(np.random.default_rng(1), {
        "T": 2, "B": 2, "H": 1, "G": 2, "D": 16, "W": 1, "position": 150})
    asked, _ = recorded(monkeypatch, "load")
    expected = entry.reference(arguments)
    function = reduce_loops(entry.kernel.tile_ir({"G": 2, "D": 16}))
    run_lane(function, arguments, facts=replace(AVX512, software_prefetch=True))
    assert asked and entry.compare(arguments, expected) is None


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "width"), [
    ("latent_attention_decode_f32", 1), ("latent_attention_decode_rounded", 2)])
@pytest.mark.parametrize("prefetches", [True, False])
def test_rows_that_all_lanes_meet_at_once_are_asked_for_ahead(name: str, width: int, prefetches: bool,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache whose rows all heads read, a head in each lane, by elements or by pairs of bf16: most lines are asked for
    before they are read. Where it is known that the rows follow one another, each is asked for about once."""
    entry = LIBRARY[name]
    extents = {"H": 16, "C": 64, "S": 32}
    arguments = entry.make_arguments(np.random.default_rng(1), extents | {"position": 199})
    asked, early = recorded(monkeypatch, "load_splat")
    expected = entry.reference(arguments)
    facts = replace(AVX512, software_prefetch=prefetches, dots=frozenset({"dot2_bf16"}))
    run_lane(reduce_loops(entry.kernel.tile_ir(extents)), arguments, facts=facts)
    assert entry.compare(arguments, expected) is None
    lines = 200 * (64 + 32) * 4 // width // 64
    if not prefetches:
        assert not asked
        return
    assert len(early) >= lines and builtins.sum(early.values()) > 0.8 * lines
    assert len(asked) < 1.3 * lines


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "depth", "line_by_line"), [
    ("matmul_nt_f32", 64, False), ("matmul_nt_bf16_bf16", 128, False), ("matmul_nt_i8", 256, False),
    ("matmul_swiglu_f32", 64, False), ("matmul_nt_f32", 64, True)])
def test_the_next_block_of_panels_is_asked_for_while_rows_meet_one(name: str, depth: int, line_by_line: bool,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is copied from rows along the depth, of which so few rows of the left matrix ask for a part; also where
    memory is best read line by line."""
    entry, rows, columns = LIBRARY[name], 56, 160
    arguments = entry.make_arguments(np.random.default_rng(1), {"M": rows, "N": columns, "K": depth})
    _, early = recorded(monkeypatch, "load")
    facts = replace(AVX512, l2_bytes=32 << 10, fma_per_cycle=2.0, dots=frozenset({"dot2_bf16", "dot4_u8i8"}),
                    requests=Requests(line_by_line=line_by_line))
    expected = entry.reference(arguments)
    run_lane(reduce_loops(entry.kernel.tile_ir()), arguments, facts=facts)
    assert entry.compare(arguments, expected) is None
    weights = [arguments[w] for w in ("b", "gate", "up") if w in arguments]
    lines = builtins.sum(w.nbytes for w in weights) // 64
    found = builtins.sum(early.values())
    assert lines // 4 <= found <= lines * (columns - 16) // columns


def blocks_in(lane: Function) -> int:
    """Loops along the lane axis n that count blocks, not columns."""
    return len([op for op in lane.walk() if op.name == "loop" and op.attributes["label"] == "n"
                and op.attributes["step"] == 1])


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("n", "k"), [(200, 5), (129, 17), (64, 40), (31, 3)])
@pytest.mark.parametrize("l2_bytes", [256, 4096, 16384])
def test_panels_are_walked_in_blocks(n: int, k: int, l2_bytes: int) -> None:
    """A block has from one panel to eight; the last one of all may be short, and narrower than a vector."""
    function = reduce_loops(product.tile_ir())
    random = np.random.default_rng(n)
    arguments = {"a": random.integers(-9, 9, (30, k)).astype(np.float32),
                 "b": random.integers(-9, 9, (k, n)).astype(np.float32), "c": np.zeros((30, n), np.float32)}
    facts = Facts(lanes=4, vector_registers=8, l2_bytes=l2_bytes)
    assert blocks_in(run_lane(function, arguments, facts=facts)) == 1
    np.testing.assert_array_equal(arguments["c"], arguments["a"] @ arguments["b"])
    without = run_lane(function, arguments, Schedule(stage=()), facts)
    assert not blocks_in(without)


def test_few_rows_are_read_where_they_lie() -> None:
    """Of those at once: more may share a set of the first cache."""
    few, facts = {"m": 4}, Facts(lanes=8, vector_registers=16)
    assert chosen(product, facts, Schedule(registers=few)).stage == ("b",)
    assert chosen(product, facts, Schedule(registers={"m": 6})).stage == chosen(product, Facts()).stage == ("a", "b")
    assert chosen(product, facts, Schedule(registers=few, stage=("a", "b"))).stage == ("a", "b")


def test_rows_are_summed_several_at_once() -> None:
    assert chosen(sums_of_rows, Facts()).registers["m"] == 8


@pytest.mark.parametrize(("scatter", "outer", "inner"), [(True, "m", "n"), (False, "n", "m")])
def test_a_transpose_walks_along_the_lines_that_its_lanes_touch(scatter: bool, outer: str, inner: str) -> None:
    """The lanes are those of m, along which y is contiguous: each touches a line of x. Squares of registers use all of
    these up at once, and store lines of y one after the other."""
    function = LIBRARY["transpose_f32"].kernel.tile_ir()
    arguments = {"x": np.zeros((100, 300), np.float32), "y": np.zeros((300, 100), np.float32)}
    lane = lower(function, Schedule(), replace(AVX512, transposes_by_scatter=scatter), specialize(function, arguments))
    nests = [op for op in lane.walk() if op.name == "loop" and any(i.name == "loop" for i in op.walk() if i is not op)]
    assert {op.attributes["label"] for op in nests} == {outer}
    assert all(i.attributes["label"] == inner for op in nests for i in op.blocks[0].ops if i.name == "loop")


def test_a_page_of_positions_is_typically_whole() -> None:
    """Its extent is min(64, position + 1 - 64 * i): a loop's counter tells nothing of how large that is."""
    for name in ("attention_paged_f32", "latent_attention_paged_f32"):
        function = LIBRARY[name].kernel.tile_ir()
        reduce_loops(function)
        canonicalize(function)
        assert choices(function, Schedule(), AVX512, Specialization()).hints["p"] == 64


def test_a_chain_of_many_ops() -> None:
    """Two hundred ops that each need the one before, on a limit of Python's that does not suffice for them."""
    steps = "\n".join(f"        t = t * 0.5 + x[m] * {1 + i % 7}.0" for i in range(100))
    kernel = kernel_of(f"@kernel\ndef k(x: Tensor[f32, M], y: Tensor[f32, M]):\n    for m in tiles(M):\n"
                       f"        t = x[m]\n{steps}\n        y[m] = t\n")
    x = np.linspace(-1, 1, 21, dtype=np.float32)
    arguments = {"x": x, "y": np.zeros(21, np.float32)}
    function = kernel.tile_ir()
    canonicalize(function)
    before = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(1000)
        run_lane(function, arguments)
        assert sys.getrecursionlimit() == 1000
    finally:
        sys.setrecursionlimit(before)
    expected = x.astype(np.float64)
    for i in range(100):
        expected = expected * 0.5 + x * (1 + i % 7)
    np.testing.assert_allclose(arguments["y"], expected, rtol=1e-5)
