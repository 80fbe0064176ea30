"""Tile registers at their own station: contractions as lane IR, under the lane interpreter."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper import Tensor, bf16, dims, each, f32, i8, i32, kernel, max, min, span, tiles, whole, zeros
from sapper.codegen.pipeline import facts_of, panels_of_kernel
from sapper.ir.scratch import scratch_bytes
from sapper.ir.text import parse_function, print_function
from sapper.ir.types import f16
from sapper.ir.verifier import VerificationError, verify
from sapper.lane.arithmetic import multiply_tiles
from sapper.lane.choices import choices
from sapper.lane.interpret import run
from sapper.lane.memory import LaneError, Memory
from sapper.lane.ops import LANE_OPS
from sapper.runtime.packed import pack_array
from sapper.targets.x86_64.target import TARGETS
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Facts, Schedule, ScheduleError, TileUnit
from sapper.tune.space import steps
from tests.strategies import examples

from .run_lane import run_lane, specialize
from .test_packed import DOT_NAMES, ORDERS, PAIRS, PRODUCTS, arguments_of, expected_of, make_product

M, N, K, B = dims("M N K B")
NARROW = ("i8", "u8")
PRODUCTS_OF_TILES = frozenset({("bf16", "bf16"), *((a, b) for a in NARROW for b in NARROW)})
MACHINES = {lanes: Facts(lanes=lanes, vector_registers=2 * lanes, dots=DOT_NAMES, l2_bytes=512 * lanes,
                         tiles=TileUnit(lanes, PRODUCTS_OF_TILES, 64)) for lanes in (4, 8, 16)}


def tiles_in(lane):
    return len([op for op in lane.walk() if op.name == "tile_multiply"])


@settings(max_examples=examples(40))
@given(m=st.integers(0, 70), n=st.integers(0, 70), k=st.integers(0, 80), order=st.sampled_from(ORDERS),
       types=st.sampled_from(PAIRS), lanes=st.sampled_from([4, 8, 16]), lane=st.sampled_from([None, "n", "m"]),
       seed=st.integers(0, 99), hint=st.sampled_from([None, 40]))
def test_any_product_is_exact(m, n, k, order, types, lanes, lane, seed, hint) -> None:
    function = reduce_loops(PRODUCTS[order, types].tile_ir())
    arguments = arguments_of(order, types, m, n, k, seed)
    hints = None if hint is None else dict.fromkeys("MNK", hint)
    made = run_lane(function, arguments, Schedule(lane=lane, matrix=True), MACHINES[lanes],
                    specialize(function, arguments, hints), workers=1 + seed % 2)
    assert tiles_in(made)
    np.testing.assert_array_equal(arguments["c"], expected_of(order, arguments))


@pytest.mark.parametrize("types", PAIRS, ids=lambda t: f"{t[0].name}-{t[1].name}")
def test_the_model_takes_tiles_for_many_rows(types) -> None:
    function = reduce_loops(PRODUCTS["nt", types].tile_ir())
    for m in (1, 64):
        arguments = arguments_of("nt", types, m, 64, 64)
        lane = run_lane(function, arguments, facts=MACHINES[16])
        assert bool(tiles_in(lane)) == (m == 64)
        assert not tiles_in(run_lane(function, arguments, Schedule(matrix=False), MACHINES[16]))
        np.testing.assert_array_equal(arguments["c"], expected_of("nt", arguments))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("m", [1, 5, 6, 7, 8, 20])
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("types", [(bf16, bf16, f32), (i8, i8, i32)], ids=lambda t: t[0].name)
def test_a_class_of_few_rows_has_code_for_fewer(m, packs, types) -> None:
    """Which runs, the number of rows says, and not a typical one; the sums are the same."""
    kernel, target = PRODUCTS["nt", types], TARGETS["sapphirerapids"]
    arguments = arguments_of("nt", types, m, 70, 128)
    packed = {"b": pack_array(arguments["b"], types[1], panels_of_kernel(kernel, "b", target))} if packs else None
    lane = run_lane(reduce_loops(kernel.tile_ir()), arguments, None, facts_of(target),
                    specialize(kernel.tile_ir(), arguments, {"M": 8, "N": 512, "K": 512}), packed=packed)
    assert tiles_in(lane) and [op for op in lane.walk() if op.name in DOT_NAMES]
    np.testing.assert_array_equal(arguments["c"], expected_of("nt", arguments))


@pytest.mark.parametrize("types", [(bf16, bf16, f32), (i8, i8, i32)], ids=lambda t: t[0].name)
@pytest.mark.parametrize(("m", "k"), [(7, 48), (16, 512), (9, 333), (20, 640)])
def test_few_rows_meet_packed_panels_from_three_places(types, m, k) -> None:
    """A step has a tile of each, and asks for what follows it; steps that are left have one."""
    kernel, target = PRODUCTS["nt", types], TARGETS["sapphirerapids"]
    arguments = arguments_of("nt", types, m, 70, k)
    packed = {"b": pack_array(arguments["b"], types[1], panels_of_kernel(kernel, "b", target))}
    facts = facts_of(target)
    for parts in (0, 5):
        asked = replace(facts, requests=facts.requests._replace(panel_parts=parts))
        lane = run_lane(reduce_loops(kernel.tile_ir()), arguments, Schedule(matrix=True), asked,
                        specialize(kernel.tile_ir(), arguments, {"M": 8, "N": 512, "K": 512}), packed=packed)
        np.testing.assert_array_equal(arguments["c"], expected_of("nt", arguments))
        arguments["c"][:] = 0
        products = [[op.name for op in loop.blocks[0].ops if op.name in ("tile_multiply", "prefetch")]
                    for loop in lane.walk() if loop.name == "loop" and loop.attributes.get("label") == "k"]
        found = {(step.count("tile_multiply"), step.count("prefetch")) for step in products}
        assert found >= ({(6, 3 * 32), (2, 32), (4, 0)} if parts else {(4, 0), (2, 0)})
        assert ((6, 3 * 32) in found) == (parts > 0)


def test_each_tile_of_an_operand_is_used_twice() -> None:
    function = reduce_loops(PRODUCTS["nt", PAIRS[0]].tile_ir())
    lane = run_lane(function, arguments_of("nt", PAIRS[0], 64, 64, 64), facts=MACHINES[16])
    ops = [op.name for op in lane.walk()]
    assert ops.count("tile_multiply") == ops.count("tile_load") == 4 and ops.count("tile_configure") == 1


def test_each_step_of_the_depth_keeps_the_store_of_its_sums_awake() -> None:
    function = reduce_loops(PRODUCTS["nt", PAIRS[0]].tile_ir())
    lane = run_lane(function, arguments_of("nt", PAIRS[0], 48, 64, 64), facts=MACHINES[16])
    steps = [[op.name for op in loop.walk()] for loop in lane.walk()
             if loop.name == "loop" and loop.attributes.get("label") == "k"]
    counts = [(step.count("tile_multiply"), step.count("tile_wake")) for step in steps if "tile_multiply" in step]
    assert counts == [(4, 1), (2, 1)]


@pytest.mark.parametrize("types", [(bf16, bf16, f32), (i8, i8, i32)], ids=lambda t: t[0].name)
@pytest.mark.parametrize(("m", "k"), [(7, 48), (33, 49), (33, 67), (33, 128)])
def test_panels_that_packed_dot_products_read_serve_tiles(types, m, k) -> None:
    kernel = PRODUCTS["nt", types]
    arguments = arguments_of("nt", types, m, 70, k)
    target = TARGETS["sapphirerapids"]
    packed = {"b": pack_array(arguments["b"], types[1], panels_of_kernel(kernel, "b", target))}
    assert packed["b"].panels == panels_of_kernel(kernel, "b", TARGETS["zen4"])
    assert tiles_in(run_lane(reduce_loops(kernel.tile_ir()), arguments, Schedule(matrix=True), facts_of(target),
                             packed=packed))
    np.testing.assert_array_equal(arguments["c"], expected_of("nt", arguments))


@kernel
def less_by_one(a: Tensor[bf16, M, K], b: Tensor[bf16, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        k = whole(K)
        c[m, n] = (a[m, k] - 1.0) @ b[k, n]


def test_panels_without_slots_serve_no_tiles() -> None:
    """What meets a computed operand is packed element by element."""
    target = TARGETS["sapphirerapids"]
    function = reduce_loops(less_by_one.tile_ir())
    arguments = arguments_of("nn", (bf16, bf16, f32), 33, 40, 31)
    packed = {"b": pack_array(arguments["b"], bf16, panels_of_kernel(less_by_one, "b", target))}
    assert packed["b"].panels.elements == 1
    hinted = specialize(function, arguments, dict.fromkeys("MNK", 64))
    made = run_lane(function, arguments, None, facts_of(target), hinted, packed=packed)
    assert not tiles_in(made)
    want = (arguments["a"].astype(np.float32) - 1.0) @ arguments["b"].astype(np.float32)     # small integers: exact
    np.testing.assert_array_equal(arguments["c"], want)
    with pytest.raises(ScheduleError, match="b is packed in slots of 1 elements, a tile has 2"):
        run_lane(reduce_loops(less_by_one.tile_ir()), arguments, Schedule(matrix=True), facts_of(target), hinted,
                 packed=packed)


def test_sums_that_are_stored_as_they_are_go_straight_to_the_tensor() -> None:
    """From whole pieces: those of the last rows and columns, and those with something to do, pass by near memory."""
    function = reduce_loops(PRODUCTS["nt", PAIRS[-1]].tile_ir())
    whole, ragged = (run_lane(function, arguments_of("nt", PAIRS[-1], m, n, 64), Schedule(matrix=True), MACHINES[16])
                     for m, n in ((64, 64), (70, 70)))
    assert "store" not in [op.name for op in loops_of("m", whole)]
    assert [op.name for op in whole.walk()].count("tile_store") == 4
    assert "store" in [op.name for op in loops_of("m", ragged)]


def loops_of(label, lane):
    return [inner for op in lane.walk() if op.name == "loop" and op.attributes.get("label") == label
            for inner in op.walk()]


@kernel
def gated(x: Tensor[bf16, M, K], gate: Tensor[bf16, N, K], up: Tensor[bf16, N, K], bias: Tensor[f32, N],
          residual: Tensor[f32, M, N], out: Tensor[bf16, M, N]):
    """Two contractions of one operand, and what may follow."""
    for m, n in tiles(M, N):
        left, right = zeros(m, n, dtype=f32), zeros(m, n, dtype=f32)
        for k in tiles(K):
            left += x[m, k] @ gate[n, k]
            right += x[m, k] @ up[n, k]
        out[m, n] = (residual[m, n] + (left + bias[n]) * right).to(bf16)


@kernel
def rounded(x: Tensor[f32, B, M, K], scale: Tensor[f32, M], w: Tensor[bf16, B, K, N], out: Tensor[f32, B, M, N]):
    """A left operand that is computed, in each of several products."""
    for b in each(B):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=f32)
            for k in tiles(K):
                acc += (x[b, m, k] * scale[m]).to(bf16) @ w[b, k, n]
            out[b, m, n] = acc


@kernel
def centred(x: Tensor[bf16, M, K], w: Tensor[bf16, N, K], last: i32, out: Tensor[f32, M, N]):
    """Sums that are kept while their greatest is found, for rows and columns known only as the kernel runs."""
    m, k = whole(M), whole(K)
    for b in each(last // 96 + 1):
        n = whole(span(b * 96, min(b * 96 + 96, last + 1)))
        score = x[m, k] @ w[n, k]
        out[m, n] = score - max(score, over=m) - max(score, over=n)


def small(random, *extents):
    return random.integers(-8, 9, extents)


@settings(max_examples=examples(15))
@given(m=st.integers(1, 70), n=st.integers(1, 50), k=st.integers(1, 80), seed=st.integers(0, 99))
def test_what_follows_reads_the_sums(m, n, k, seed) -> None:
    random = np.random.default_rng(seed)
    bf = ml_dtypes.bfloat16
    arguments = {"x": small(random, m, k).astype(bf), "gate": small(random, n, k).astype(bf),
                 "up": small(random, n, k).astype(bf), "bias": small(random, n).astype(np.float32),
                 "residual": small(random, m, n).astype(np.float32), "out": np.zeros((m, n), bf)}
    lane = run_lane(reduce_loops(gated.tile_ir()), arguments, Schedule(matrix=True), MACHINES[16])
    assert tiles_in(lane)
    x, gate, up = (arguments[name].astype(np.float32) for name in ("x", "gate", "up"))
    wanted = arguments["residual"] + (x @ gate.T + arguments["bias"]) * (x @ up.T)
    np.testing.assert_array_equal(arguments["out"], wanted.astype(bf))


@settings(max_examples=examples(15))
@given(b=st.integers(1, 2), m=st.integers(1, 70), n=st.integers(1, 50), k=st.integers(1, 80), seed=st.integers(0, 99))
def test_a_computed_operand_is_copied(b, m, n, k, seed) -> None:
    random = np.random.default_rng(seed)
    arguments = {"x": small(random, b, m, k).astype(np.float32) / 2, "scale": small(random, m).astype(np.float32),
                 "w": small(random, b, k, n).astype(ml_dtypes.bfloat16), "out": np.zeros((b, m, n), np.float32)}
    lane = run_lane(reduce_loops(rounded.tile_ir()), arguments, Schedule(matrix=True), MACHINES[16])
    assert tiles_in(lane)
    x = (arguments["x"] * arguments["scale"][:, None]).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(arguments["out"], x @ arguments["w"].astype(np.float32))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lanes", [4, 16])
@pytest.mark.parametrize(("m", "n", "k"), [(40, 96, 32), (33, 150, 21), (70, 193, 40)])
def test_sums_that_are_kept(m, n, k, lanes) -> None:
    """They lie in scratch memory of the whole axis, whatever block of panels they come from."""
    random = np.random.default_rng(n)
    x, w = (small(random, extent, k).astype(ml_dtypes.bfloat16) for extent in (m, n))
    arguments = {"x": x, "w": w, "last": n - 1, "out": np.zeros((m, n), np.float32)}
    lane = run_lane(reduce_loops(centred.tile_ir()), arguments, Schedule(matrix=True), MACHINES[lanes])
    assert tiles_in(lane)
    score = x.astype(np.float32) @ w.astype(np.float32).T
    for start in range(0, n, 96):
        part = score[:, start : start + 96]
        wanted = part - part.max(0) - part.max(1, keepdims=True)
        np.testing.assert_array_equal(arguments["out"][:, start : start + 96], wanted)


@kernel
def read_twice(q: Tensor[f32, M, K], w: Tensor[bf16, N, K], last: i32, out: Tensor[f32, B, M, K]):
    """Attention of one token without its softmax: rows meet q as they lie, and what that gives as panels."""
    for b in each(last // 64 + 1):
        m, k = whole(M), whole(K)
        n = whole(span(b * 64, min(b * 64 + 64, last + 1)))
        score = q[m, k].to(bf16) @ w[n, k]
        out[b, m, k] = score.to(bf16) @ w[n, k]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("lanes", "m", "k", "n"), [
    (4, 8, 40, 64), (4, 12, 16, 63), (4, 68, 24, 70), (4, 9, 16, 64), (4, 8, 20, 129), (8, 8, 32, 5), (16, 16, 64, 100),
    (16, 48, 32, 1)])
def test_slots_that_are_kept_are_panels(lanes, m, k, n) -> None:
    """Where they are whole tiles, the other operand of their product is not turned; of 68 columns there are two blocks.
    Few rows then meet what was read one panel after the other."""
    random = np.random.default_rng(n)
    q, w = (random.integers(-1, 2, extents) for extents in ((m, k), (n, k)))
    arguments = {"q": q.astype(np.float32), "w": w.astype(ml_dtypes.bfloat16), "last": n - 1,
                 "out": np.zeros((-(-n // 64), m, k), np.float32)}
    function = reduce_loops(read_twice.tile_ir({"M": m, "K": k}))
    lane = run_lane(function, arguments, None, replace(MACHINES[lanes], l2_bytes=1 << 16),
                    specialize(function, arguments, {"N": 512}))
    assert tiles_in(lane)
    are_tiles = m % lanes == 0 and k % (2 * lanes) == 0
    turned = any(op.name == "exchange" for op in loops_of("n", lane))
    panel_by_panel = any(op.name == "tile_multiply" for op in loops_of("k", lane))
    assert turned != are_tiles
    assert panel_by_panel
    for b, start in enumerate(range(0, n, 64)):
        part = w[start : start + 64]
        np.testing.assert_array_equal(arguments["out"][b], q @ part.T @ part)


def test_nothing_that_is_not_a_number_comes_from_beyond_the_depth() -> None:
    """What lies beyond the ends of rows and panels is multiplied by nothing, not by 0."""
    function = reduce_loops(PRODUCTS["nt", PAIRS[-1]].tile_ir())
    for k in (16, 33, 48):
        arguments = arguments_of("nt", PAIRS[-1], 40, 40, 64)
        for name in "ab":
            whole = arguments[name]
            whole[:, k:] = np.nan
            arguments[name] = whole[:, :k]
        run_lane(function, arguments, Schedule(matrix=True), MACHINES[16])
        np.testing.assert_array_equal(arguments["c"], expected_of("nt", arguments))


@pytest.mark.parametrize(("types", "k", "facts", "reason"), [
    (PAIRS[0], 64, Facts(lanes=16, dots=DOT_NAMES), "the target has no tile registers"),
    ((f16, f16, f32), 64, replace(MACHINES[16], tiles=TileUnit(16, frozenset({("i8", "i8")}), 64)),
     "no tile multiplies f16 by f16"),
])
def test_a_schedule_that_asks_in_vain_is_told_why(types, k, facts, reason) -> None:
    function = reduce_loops(make_product("nt", *types).tile_ir())
    numpy = {f16: np.float16, bf16: ml_dtypes.bfloat16, i8: np.int8}[types[0]]
    result = {f32: np.float32, i32: np.int32}[types[2]]
    arguments = {"a": np.ones((40, k), numpy), "b": np.ones((40, k), numpy), "c": np.zeros((40, 40), result)}
    with pytest.raises(ScheduleError, match=reason):
        run_lane(function, arguments, Schedule(matrix=True), facts)


def test_the_search_tries_vectors_and_nothing_that_only_these_know() -> None:
    function = reduce_loops(PRODUCTS["nt", PAIRS[0]].tile_ir())
    specialization = specialize(function, arguments_of("nt", PAIRS[0], 64, 64, 64))
    made = choices(function, Schedule(), MACHINES[16], specialization)
    assert made.schedule.matrix and not made.schedule.registers and not made.schedule.stage and not made.stageable
    (step,) = steps(Schedule(), made, 32, threads=1)
    assert step.schedule == Schedule(matrix=False)
    assert choices(function, step.schedule, MACHINES[16], specialization).schedule.registers


def test_a_schedule_that_speaks_of_vectors_gets_them() -> None:
    function = reduce_loops(PRODUCTS["nt", PAIRS[0]].tile_ir())
    arguments = arguments_of("nt", PAIRS[0], 64, 64, 64)
    for schedule in (Schedule(registers={"m": 8}), Schedule(order=("n", "m")), Schedule(stage=("b",))):
        assert not tiles_in(run_lane(function, arguments, schedule, MACHINES[16]))


def test_schedules_with_matrix_are_read_back() -> None:
    for matrix in (None, True, False):
        assert Schedule.from_json(Schedule(matrix=matrix).to_json()) == Schedule(matrix=matrix)


PRODUCT = """lane func @product() {lanes = 4, slots = ["a.data", "b.data", "c.data"], tile = 4} {
  %a: s64 = arg {slot = 3}
  %b: s64 = arg {slot = 4}
  %c: s64 = arg {slot = 5}
  %kept: s64 = arg {slot = 0}
  %stride: s64 = s_const {value = 16}
  tile_configure %kept
  %zero: tile<i32> = tile_zero
  %left: tile<b32> = tile_load %a, %stride
  %right: tile<b32> = tile_load %b, %stride {disp = 0}
  %sum: tile<i32> = tile_multiply %zero, %left, %right {dtype = :i8, right_dtype = :i8}
  tile_wake
  tile_store %sum, %c, %stride
  tile_release %kept
}
"""


def parse(text):
    return parse_function(text, {"lane": LANE_OPS})


def run_text(text):
    function = parse(text)
    verify(function, LANE_OPS)
    memory = Memory()
    arrays = [np.full((4, 16), 1, np.int8), np.full((4, 16), 2, np.int8), np.zeros((4, 4), np.int32)]
    run(function, np.array([0, 0, 0, *(memory.add_array(name, a) for name, a in zip("abc", arrays, strict=True))]),
        memory)
    return arrays[2]


def test_text() -> None:
    again = print_function(parse(PRODUCT))
    assert print_function(parse(again)) == again


@pytest.mark.parametrize(("old", "new", "message"), [
    ("tile = 4", "tile = 0", "attribute tile = 0"),
    (", tile = 4", "", "attribute tile = None"),
    ("%zero: tile<i32>", "%zero: tile<f32>", "tile<i32>"),
    ("right_dtype = :i8", "right_dtype = :bf16", "one of i8, u8"),
    ("tile_load %b, %stride", "tile_load %b, %left", "a tile of any type"),
    ("%left, %right {dtype", "%left, %left {dtype", "two, as instructions want different registers"),
    ("tile_store %sum, %c", "tile_store %c, %c", "a tile of any type"),
])
def test_verifier(old, new, message) -> None:
    assert old in PRODUCT
    with pytest.raises(VerificationError, match=message):
        verify(parse(PRODUCT.replace(old, new, 1)), LANE_OPS)


def test_a_product_by_hand() -> None:
    assert (run_text(PRODUCT) == 32).all()


def test_tiles_are_used_between_configuration_and_release() -> None:
    with pytest.raises(LaneError, match="found no tile_configure before it"):
        run_text(PRODUCT.replace("  tile_configure %kept\n", ""))
    with pytest.raises(LaneError, match="found tiles that are configured"):
        run_text(PRODUCT.replace("  tile_release %kept\n", "  tile_configure %kept\n"))


@settings(max_examples=examples(20))
@given(seed=st.integers(0, 999))
def test_sums_of_pairs_are_what_the_manual_says(seed) -> None:
    """Against the same in exact arithmetic where nothing rounds, and NumPy's where something does."""
    random = np.random.default_rng(seed)
    a, b = (random.standard_normal((16, 32)).astype(ml_dtypes.bfloat16) for _ in range(2))
    c = random.standard_normal((16, 16)).astype(np.float32)
    got = multiply_tiles(c, a.view(np.uint32), b.view(np.uint32), (ml_dtypes.bfloat16,) * 2)
    right = b.reshape(16, 16, 2).transpose(0, 2, 1).reshape(32, 16).astype(np.float64)
    np.testing.assert_allclose(got, c + a.astype(np.float64) @ right, atol=1e-4)
    tiny = np.full((16, 32), 1e-39, ml_dtypes.bfloat16)
    assert (multiply_tiles(c, tiny.view(np.uint32), b.view(np.uint32), (ml_dtypes.bfloat16,) * 2) == c).all()


def test_no_more_memory_is_set_aside_for_panels_than_there_are() -> None:
    """A block of panels takes half of the second cache, at most: 256 KiB here, and 16 KiB are all panels."""
    function = reduce_loops(PRODUCTS["nt", PAIRS[-1]].tile_ir({"N": 64, "K": 128}))
    arguments = arguments_of("nt", PAIRS[-1], 64, 64, 128)
    facts = replace(MACHINES[16], l2_bytes=1 << 19)
    made = run_lane(function, arguments, None, facts, specialize(function, arguments, {"M": 512}))
    np.testing.assert_array_equal(arguments["c"], expected_of("nt", arguments))
    assert tiles_in(made) and scratch_bytes(made.attributes["scratch"], {"M": 64, "N": 64, "K": 128}) < 1 << 16


@kernel
def in_slots(x: Tensor[bf16, M, K, 2], w: Tensor[bf16, K, 32, 2], y: Tensor[f32, M, 32]):
    for m, n in tiles(M, 32):
        acc = zeros(m, n, dtype=f32)
        for k, i in tiles(K, 2):
            acc += x[m, k, i] @ w[k, n, i]
        y[m, n] = acc


@kernel
def some_in_slots(x: Tensor[bf16, M, K, 2], bounds: Tensor[i32, 2], gate: Tensor[bf16, K, 32, 2],
                  up: Tensor[bf16, K, 32, 2], y: Tensor[f32, M, 32]):
    for m, n in tiles(span(bounds[0], bounds[1]), 32):
        gates = zeros(m, n, dtype=f32)
        ups = zeros(m, n, dtype=f32)
        for k, i in tiles(K, 2):
            gates += x[m, k, i] @ gate[k, n, i]
            ups += x[m, k, i] @ up[k, n, i]
        y[m, n] = gates * ups


@settings(max_examples=examples(15))
@given(m=st.integers(0, 70), k=st.integers(1, 50), lanes=st.sampled_from([8, 16]), seed=st.integers(0, 9))
def test_operands_that_lie_in_slots_are_taken_as_they_are(m, k, lanes, seed) -> None:
    """By rows of all tensors, and by some that only memory counts."""
    random = np.random.default_rng(seed)
    x, gate, up = (random.integers(-8, 9, extents).astype(ml_dtypes.bfloat16)
                   for extents in ((m, k, 2), (k, 32, 2), (k, 32, 2)))
    products = [np.einsum("mki,kni->mn", x.astype(np.float64), w.astype(np.float64)) for w in (gate, up)]
    arguments = {"x": x, "w": gate, "y": np.zeros((m, 32), np.float32)}
    lane = run_lane(reduce_loops(in_slots.tile_ir()), arguments, Schedule(matrix=True), MACHINES[lanes])
    assert tiles_in(lane) and not [op for op in lane.walk() if op.name == "interleave"]
    np.testing.assert_array_equal(arguments["y"], products[0])
    first, last = sorted(random.integers(0, m + 1, 2))
    arguments = {"x": x, "bounds": np.array([first, last], np.int32), "gate": gate, "up": up,
                 "y": np.full((m, 32), -1, np.float32)}
    assert tiles_in(run_lane(reduce_loops(some_in_slots.tile_ir()), arguments, Schedule(matrix=True), MACHINES[lanes]))
    expected = np.full((m, 32), -1.0)
    expected[first:last] = (products[0] * products[1])[first:last]
    np.testing.assert_array_equal(arguments["y"], expected)


def test_slots_that_tiles_do_not_take() -> None:
    @kernel
    def apart(x: Tensor[bf16, M, 2, K], w: Tensor[bf16, K, 32, 2], y: Tensor[f32, M, 32]):
        for m, n in tiles(M, 32):
            acc = zeros(m, n, dtype=f32)
            for k, i in tiles(K, 2):
                acc += x[m, i, k] @ w[k, n, i]
            y[m, n] = acc

    arguments = {"x": np.ones((40, 2, 32), ml_dtypes.bfloat16), "w": np.ones((32, 32, 2), ml_dtypes.bfloat16),
                 "y": np.zeros((40, 32), np.float32)}
    with pytest.raises(ScheduleError, match="i is no axis of neighbours of bf16 that tiles take as they lie"):
        run_lane(reduce_loops(apart.tile_ir()), arguments, Schedule(matrix=True), MACHINES[16])
