"""Lowering at its own station: tile IR against lane IR under the lane interpreter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.ir.text import parse_function
from sapper.ir.types import f32, i8, i32
from sapper.kernels import library
from sapper.lang.builtins import max, span, tiles, whole, zeros
from sapper.lang.dims import dims
from sapper.lang.errors import KernelError
from sapper.lang.kernel import kernel
from sapper.lang.tensor import Tensor
from sapper.tile.ops import TILE_OPS
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.rounding import expect
from sapper.tile.schedule import Facts, Schedule, ScheduleError
from tests.strategies import assert_expected, examples, kernels, reject_unbuildable

from .run_lane import run_lane, specialize

AVX512 = Facts(lanes=16, vector_registers=32)
AVX2 = Facts(lanes=8, vector_registers=16)
NARROW = Facts(lanes=4, vector_registers=8)
LIBRARY = {k.name: k for k in library()}


@pytest.mark.parametrize("facts", [AVX512, NARROW], ids=["16 lanes", "4 lanes"])
@pytest.mark.parametrize("name", LIBRARY)
def test_library_kernel(name: str, facts: Facts) -> None:
    entry = LIBRARY[name]
    function = reduce_loops(entry.kernel.tile_ir())
    for number, shape in enumerate(entry.check_shapes[:4]):
        arguments = entry.make_arguments(np.random.default_rng(number), shape)
        expected = entry.reference(arguments)
        run_lane(function, arguments, facts=facts, workers=1 + number % 2)
        assert entry.compare(arguments, expected) is None


@settings(max_examples=examples(60))
@given(case=kernels(), seed=st.integers(0, 1000), facts=st.sampled_from([AVX512, AVX2, NARROW]),
       workers=st.integers(1, 3), hint=st.sampled_from([None, 1, 7, 40, 1000]))
def test_random_kernels(case, seed, facts, workers, hint) -> None:
    """Every kernel of the language means the same as lane IR, at any lane count, for any hints of the model."""
    kernel = case.load()
    try:
        original = kernel.tile_ir()
    except KernelError as error:
        reject_unbuildable(error)
        return
    arguments = case.make_arguments(seed)
    expectations = expect(original, arguments)
    function = reduce_loops(kernel.tile_ir())
    hints = None if hint is None else dict.fromkeys(case.sizes(seed), hint)
    run_lane(function, arguments, facts=facts, specialization=specialize(function, arguments, hints), workers=workers)
    assert_expected(arguments, expectations, repr(case))


@settings(max_examples=examples(40))
@given(m=st.integers(0, 70), n=st.integers(0, 70), k=st.integers(0, 40), rows=st.integers(1, 14),
       wide=st.integers(1, 3), depth=st.sampled_from([1, 2, 4, 8]),
       stage=st.sampled_from([None, (), ("a",), ("b",), ("a", "b")]),
       name=st.sampled_from(["matmul_nn_f32", "matmul_nt_f32", "matmul_tn_f32"]), lane=st.sampled_from([None, "n"]))
def test_matmul_schedules(m, n, k, rows, wide, depth, stage, name, lane) -> None:
    """No schedule changes what is computed."""
    entry = LIBRARY[name]
    function = reduce_loops(entry.kernel.tile_ir())
    arguments = entry.make_arguments(np.random.default_rng(m), {"M": m, "N": n, "K": k})
    expected = entry.reference(arguments)
    schedule = Schedule(lane=lane, registers={"m": rows, "n": wide, "k": depth}, stage=stage)
    run_lane(function, arguments, schedule, AVX512,
             specialize(function, arguments, {"M": 100, "N": 100, "K": 100}), workers=2)
    assert entry.compare(arguments, expected) is None


@pytest.mark.parametrize(("schedule", "part"), [
    (Schedule(lane="q"), "no axis 'q'"),
    (Schedule(tile={"m": 0}), "tile of axis m is 0"),
    (Schedule(registers={"m": 0}), "registers of axis m"),
    (Schedule(stage=("z",)), "no tensor 'z'"),
    (Schedule(lane="m", tile={"m": 5}), "multiple of the 16 lanes"),
])
def test_illegal_schedules_are_refused(schedule: Schedule, part: str) -> None:
    entry = LIBRARY["matmul_nn_f32"]
    arguments = entry.make_arguments(np.random.default_rng(0), {"M": 3, "N": 3, "K": 3})
    with pytest.raises(ScheduleError, match=part.replace("(", "\\(")):
        run_lane(reduce_loops(entry.kernel.tile_ir()), arguments, schedule)


def test_schedule_json_round_trip() -> None:
    schedule = Schedule("n", {"m": 4}, {"k": 2}, ("n", "m"), ("b",), None, {"m": 3})
    assert Schedule.from_json(schedule.to_json()) == schedule
    with pytest.raises(ScheduleError, match="unknown schedule entry"):
        Schedule.from_json({"lanes": 3})


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


def test_a_contraction_walked_with_another_reduction() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((20, 30)).astype(np.float32), rng.standard_normal(30).astype(np.float32)
    arguments = {"a": a, "b": b, "low": np.zeros(20, np.float32), "out": np.zeros(20, np.float32)}
    run_lane(reduce_loops(contract_beside_a_maximum.tile_ir()), arguments, facts=AVX2)
    np.testing.assert_array_equal(arguments["low"], a.max(1))
    np.testing.assert_allclose(arguments["out"], a @ b, rtol=1e-4, atol=1e-5)


def test_parts_of_a_kernel_pass_no_values() -> None:
    """Parts meet at barriers; a value of one worker must not be read by another."""
    from sapper.ir.text import parse_function
    from sapper.lane.ops import LANE_OPS
    from sapper.lane.rows import LoweringError
    from sapper.tile.ops import TILE_OPS

    text = """tile func @parts(%x: tensor<f32, M>, %out: tensor<f32, M>) {
  %zero: index = const {value = 0}
  %M: index = dim {name = "M"}
  whole %zero, %M {axis = "r"}
  %ir: index[r] = index {axis = "r"}
  %v: f32[r] = load %x, %ir
  %t: f32 = reduce %v {kind = "sum", over = ["r"]}
  tiles %zero, %M {axes = ["m"], parallel = true} {
    %im: index[m] = index {axis = "m"}
    store %out, %t, %im
  }
}"""
    function = parse_function(text, {"tile": TILE_OPS, "lane": LANE_OPS})
    x = np.ones(5, np.float32)
    with pytest.raises(LoweringError, match="used by a later part"):
        run_lane(function, {"x": x, "out": np.zeros(5, np.float32)})


def test_the_most_tasks_of_each_parallel_loop() -> None:
    from sapper.codegen.pipeline import to_lane
    from sapper.kernels import find
    from sapper.tile.schedule import Specialization

    def tasks(name: str, schedule: Schedule) -> object:
        return to_lane(find(name).kernel.tile_ir(), schedule, AVX512, Specialization()).attributes["tasks"]

    assert tasks("matmul_nn_f32", Schedule()) == [[[1, ["M"], 4], [1, ["N"], 64]]]
    assert tasks("matmul_nn_f32", Schedule(chunks={"m": 3})) == [[[3, [], 1], [1, ["N"], 64]]]
    assert tasks("top_k", Schedule()) == []


def test_types_without_arithmetic_are_refused_with_their_line() -> None:
    from sapper.ir.text import parse_function
    from sapper.lane.lower import lower
    from sapper.lane.ops import LANE_OPS
    from sapper.lane.rows import LoweringError
    from sapper.tile.ops import TILE_OPS
    from sapper.tile.schedule import Specialization

    text = """tile func @narrow(%x: tensor<f8e4m3, M>, %out: tensor<f32, M>) {
  %zero: index = const {value = 0}
  %M: index = dim {name = "M"}
  tiles %zero, %M {axes = ["m"], parallel = true} {
    %im: index[m] = index {axis = "m"}
    %v: f8e4m3[m] = load %x, %im loc("model.py":7:9)
    %w: f32[m] = cast %v
    store %out, %w, %im
  }
}"""
    function = parse_function(text, {"tile": TILE_OPS, "lane": LANE_OPS})
    with pytest.raises(LoweringError, match=r"model.py:7:9: found a value of f8e4m3"):
        lower(function, Schedule(), AVX512, Specialization())
