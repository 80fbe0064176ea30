"""What nests pass to loops inside, or from walk to walk: which axis lies across the lanes, how much of it is held at
once, and products that are passed on in blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.recurrent import recurrence
from examples.search import drawn_tokens, nearest_centres
from examples.statistics import softmax_of_columns
from sapper.ir.nodes import Function
from sapper.ir.types import f32, i8, i32, u8
from sapper.kernels import library
from sapper.kernels.fp8_panels import matmul_few_fp8, matrix, random_weights
from sapper.lang.builtins import (
    abs,
    each,
    exp,
    full,
    maximum,
    minimum,
    span,
    tanh,
    tiles,
    topk,
    where,
    whole,
    zeros,
)
from sapper.lang.dims import dims
from sapper.lang.kernel import kernel
from sapper.lang.tensor import Tensor
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Facts, Schedule, ScheduleError
from tests.strategies.amount import examples

from .run_lane import run_lane, specialize

AVX512 = Facts(lanes=16, vector_registers=32)
AVX2 = Facts(lanes=8, vector_registers=16)
C, D, K, M, N, T = dims("C D K M N T")


@kernel
def recurrence_of_rows(a: Tensor[f32, C, T], b: Tensor[f32, C, T], y: Tensor[f32, C, T]):
    """The same where tokens are neighbours in memory."""
    for c in tiles(C):
        h = zeros(c, dtype=f32)
        for t in range(T):
            h = a[c, t] * h + b[c, t]
            y[c, t] = h


@kernel
def costly_recurrence_of_rows(a: Tensor[f32, C, T], b: Tensor[f32, C, T], y: Tensor[f32, C, T]):
    for c in tiles(C):
        h = zeros(c, dtype=f32)
        for t in range(T):
            h = tanh(exp(a[c, t])) * h + b[c, t]
            y[c, t] = h


@kernel
def checksums(x: Tensor[u8, C, T], table: Tensor[i32, 256], y: Tensor[i32, C]):
    for c in tiles(C):
        state = full(c, value=-1, dtype=i32)
        for t in range(T):
            state = table[(state ^ x[c, t].to(i32)) & 255] ^ ((state >> 8) & 0xFFFFFF)
        y[c] = state


@kernel
def windows_of_columns(x: Tensor[f32, N, C], w: Tensor[f32, 3], y: Tensor[f32, N, M]):
    """Rows are far apart, and all that lies side by side is a window."""
    for m in each(M):
        for n in tiles(N):
            acc = zeros(n, dtype=f32)
            for i in range(3):
                acc += w[i] * x[n, m + i]
            y[n, m] = acc


@kernel
def differences(x: Tensor[f32, M, T], y: Tensor[f32, M, N]):
    """Elements of neighbours are two apart, in one line."""
    for m in each(M):
        for n in tiles(N):
            acc = zeros(n, dtype=f32)
            for i in range(2):
                acc = x[m, 2 * n + i] - acc
            y[m, n] = acc


@kernel
def distances(a: Tensor[f32, K, M], b: Tensor[f32, K, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in range(K):
            acc += abs(a[k, m] - b[k, n])
        y[m, n] = acc


def distances_of(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a[:, :, None] - b[:, None, :]).sum(0)


@kernel
def two_layers(x: Tensor[f32, M, K], v: Tensor[f32, K, D], w: Tensor[f32, D, N], y: Tensor[f32, M, N]):
    for m in tiles(M):
        k, d = whole(K), whole(D)
        hidden = x[m, k] @ v[k, d]
        for n in tiles(N):
            y[m, n] = (hidden * hidden) @ w[d, n]


@kernel
def weighted(x: Tensor[f32, M, K], w: Tensor[f32, K, N], y: Tensor[f32, M, N]):
    """A product and a sum read the same powers."""
    for m in tiles(M):
        k, n = whole(K), whole(N)
        power = exp(x[m, k])
        y[m, n] = (power @ w[k, n]) / sum(power, over=k)


@kernel
def part_of_rows(x: Tensor[f32, M, N], first: i32, y: Tensor[f32, M, N]):
    for m, n in tiles(span(first, first + 100), N):
        y[m, n] = 2.0 * x[m, n]


@kernel
def sums_of_rows(x: Tensor[f32, M, N], first: i32, y: Tensor[f32, M]):
    for m in tiles(span(first, first + 100)):
        n = whole(N)
        y[m] = sum(x[m, n], over=n)


@kernel
def chunks(x: Tensor[f32, T], y: Tensor[f32, T]):
    for c in each(T // 8):
        i, j = whole(span(c * 8, c * 8 + 8)), whole(span(c * 8, c * 8 + 8))
        square = x[i] * x[j]
        y[i] = sum(square * max(square, over=i), over=j)


@kernel
def window_sums(x: Tensor[f32, T, C], w: Tensor[f32, N, 3, C], y: Tensor[f32, M, N]):
    """No axis of the sums has neighbours in what is read: that is the one which is summed."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for i in range(3):
            for c in tiles(C):
                acc += x[m + i, c] @ w[n, i, c]
        y[m, n] = acc


@kernel
def window_sums_of_bytes(x: Tensor[i8, T, C], w: Tensor[i8, 3, C, N], y: Tensor[i32, M, N]):
    """Bytes are joined to slots."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=i32)
        for i in range(3):
            for c in tiles(C):
                acc += x[m + i, c] @ w[i, c, n]
        y[m, n] = acc


@kernel
def padded_sums(x: Tensor[f32, M, C], w: Tensor[f32, N, 3, C], y: Tensor[f32, M, N]):
    """Rows past the edges are 0."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for i in range(3):
            row = m + i - 1
            inside = (row >= 0) & (row < M)
            for c in tiles(C):
                acc += where(inside, x[minimum(maximum(row, 0), M - 1), c], 0.0) @ w[n, i, c]
        y[m, n] = acc


@kernel
def window(x: Tensor[f32, T, C], w: Tensor[f32, 3, 3], y: Tensor[f32, M, N]):
    """Each sum reads what is its own, but for the weights."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for i in range(3):
            for j in range(3):
                acc += x[m + i, n + j] * w[i, j]
        y[m, n] = acc


@kernel
def nearest_of_all(x: Tensor[f32, M, D], centre: Tensor[f32, N, D], place: Tensor[i32, M, 3]):
    for m in tiles(M):
        n, d, k = whole(N), whole(D), whole(3)
        closeness = 2.0 * (x[m, d] @ centre[n, d]) - sum(centre[n, d] * centre[n, d], over=d)
        _, found = topk(closeness, k, over=n)
        place[m, k] = found.to(i32)


@kernel
def heads_of_one_cache(q: Tensor[f32, T, M, D], k: Tensor[f32, N, D], v: Tensor[f32, N, D], y: Tensor[f32, T, M, D]):
    """Scores over tokens and heads are carried over both."""
    for t, m in tiles(T, M):
        d = whole(D)
        top, total, acc = zeros(t, m, dtype=f32), zeros(t, m, dtype=f32), zeros(t, m, d, dtype=f32)
        for n in tiles(N):
            score = q[t, m, d] @ k[n, d]
            higher = maximum(top, max(score, over=n))
            weight, fade = exp(score - higher), exp(top - higher)
            total = total * fade + sum(weight, over=n)
            acc = acc * fade + weight @ v[n, d]
            top = higher
        y[t, m, d] = acc / total


@kernel
def largest_of_few(x: Tensor[f32, M, N, D], y: Tensor[f32, M, N, 2]):
    for m, n in tiles(M, N):
        d, k = whole(D), whole(2)
        best, _ = topk(x[m, n, d], k, over=d)
        y[m, n, k] = best


@kernel
def sums_of_rows_held(x: Tensor[f32, T, C], w: Tensor[f32, M, T, D], y: Tensor[f32, K, M, C, D, N]):
    """An operand of the product inside spans, beside what it is summed over and what lies across the lanes, rows that
    the nest holds, several at once."""
    for k in each(K):
        for m, n in tiles(M, N):
            d = whole(D)
            for c in tiles(C):
                acc = zeros(m, c, d, dtype=f32)
                for t in tiles(T):
                    acc -= x[t, c] @ w[m, t, d]
                y[k, m, c, d, n] = acc


def normal(*extents: int) -> np.ndarray:
    return np.random.default_rng(sum(extents)).standard_normal(extents, dtype=np.float32)


def lowered(made: object, arguments: dict[str, np.ndarray], facts: Facts, schedule: Schedule | None = None,
            hints: dict[str, int] | None = None) -> Function:
    function = reduce_loops(made.tile_ir())  # type: ignore[attr-defined]
    return run_lane(function, arguments, schedule, facts, specialize(function, arguments, hints))


def steps(lane: Function, axis: str) -> list[int]:
    return [op.attributes["step"] for op in lane.walk() if op.name == "loop" and op.attributes.get("label") == axis]


def scanned(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    y, h = np.empty_like(b), np.zeros(b.shape[1], np.float32)
    for t in range(len(b)):
        y[t] = h = a[t] * h + b[t]
    return y


@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
@pytest.mark.parametrize("columns", [1, 7, 16, 64, 83, 150])
def test_neighbours_in_memory_lie_across_the_lanes(columns: int, facts: Facts) -> None:
    a, b = normal(5, columns), normal(5, columns + 1)[:, :columns].copy()
    arguments = {"a": a, "b": b, "y": np.zeros_like(a)}
    lane = lowered(recurrence, arguments, facts, hints={"T": 64, "C": 1024})
    np.testing.assert_allclose(arguments["y"], scanned(a, b), rtol=1e-6, atol=1e-6)
    assert not any(op.name == "store_lane0" for op in lane.walk())
    assert steps(lane, "c")[0] == 4 * facts.lanes


def test_rows_that_are_left_widen_what_they_meet_together() -> None:
    """fp8 takes several instructions: of 27 rows 12 and 12 meet a vector at once, then two and one."""
    random = np.random.default_rng(4)
    x, w = normal(27, 130), random_weights(random, 2, 130, 16)
    scale, place = normal(2, 2), np.array([1, 0], np.int32)
    arguments = {"w": w, "scale": scale, "place": place, "x": x, "y": np.zeros((27, 2, 16), np.float32)}
    function = matmul_few_fp8.tile_ir()
    lane = run_lane(function, arguments, None, AVX512, specialize(function, arguments, {"M": 512}))
    wanted = x @ matrix(w, scale, place).T
    np.testing.assert_allclose(arguments["y"].reshape(27, 32), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    assert steps(lane, "m") == [12, 8, 4, 2, 1]


@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
def test_columns_that_are_no_neighbours_are_taken_in_turn(facts: Facts) -> None:
    """Four at a time: each waits for its own last value."""
    a, b = normal(19, 5), normal(19, 6)[:, :5].copy()
    arguments = {"a": a, "b": b, "y": np.zeros_like(a)}
    lane = lowered(recurrence_of_rows, arguments, facts, hints={"T": 64, "C": 1024})
    np.testing.assert_allclose(arguments["y"], scanned(a.T, b.T).T, rtol=1e-6, atol=1e-6)
    assert steps(lane, "c") == [4, 1]


def test_columns_that_wait_for_little_are_taken_one_by_one() -> None:
    """What is computed beside the chain takes longer than that."""
    a, b = normal(19, 5), normal(19, 5)
    arguments = {"a": a, "b": b, "y": np.zeros_like(a)}
    lane = lowered(costly_recurrence_of_rows, arguments, AVX512, hints={"T": 64, "C": 1024})
    np.testing.assert_allclose(arguments["y"], scanned(np.tanh(np.exp(a.T)), b.T).T, rtol=1e-5, atol=1e-5)
    assert steps(lane, "c") == [1]


@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
def test_what_a_loop_carries_may_be_looked_up(rows: int, facts: Facts) -> None:
    """A checksum: the next state is found in a table, at the last one."""
    random = np.random.default_rng(rows)
    x, table = random.integers(0, 256, (rows, 11), np.uint8), random.integers(-2**31, 2**31, 256).astype(np.int32)
    arguments = {"x": x, "table": table, "y": np.zeros(rows, np.int32)}
    lane = lowered(checksums, arguments, facts, hints={"T": 512, "C": 1024})
    state = np.full(rows, -1, np.int32)
    for t in range(11):
        state = table[(state ^ x[:, t]) & 255] ^ (state >> 8 & 0xFFFFFF)
    np.testing.assert_array_equal(arguments["y"], state)
    assert steps(lane, "c") == [4, 1]


def test_turned_tensors_have_other_neighbours() -> None:
    """Strides decide, not the order of the indices."""
    a, b, y = normal(19, 70).T, normal(19, 71)[:, :70].T, np.zeros((19, 70), np.float32).T
    arguments = {"a": a, "b": b, "y": y}
    lane = lowered(recurrence_of_rows, arguments, AVX512, hints={"T": 64, "C": 1024})
    np.testing.assert_allclose(y, scanned(a.T, b.T).T, rtol=1e-6, atol=1e-6)
    assert steps(lane, "c")[0] in (1, 4 * AVX512.lanes)


@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
def test_what_loops_carry_fills_the_lanes_where_nothing_lies_side_by_side(facts: Facts) -> None:
    x, w = normal(83, 11), normal(3)
    arguments = {"x": x, "w": w, "y": np.zeros((83, 9), np.float32)}
    lane = lowered(windows_of_columns, arguments, facts, hints={"M": 64, "N": 512, "C": 66})
    np.testing.assert_allclose(arguments["y"], np.lib.stride_tricks.sliding_window_view(x, 3, 1) @ w, rtol=1e-4,
                               atol=1e-5)
    assert steps(lane, "n")[0] == 4 * facts.lanes


def test_lanes_are_left_to_an_axis_inside() -> None:
    """Which pairs of elements lie along: whole rows, where rows across the lanes would gather them."""
    entry = next(kernel for kernel in library() if kernel.name == "rope_yarn_interleaved")
    arguments = entry.make_arguments(np.random.default_rng(1), {"T": 5, "H": 3, "R": 32, "position": 2})
    expected = entry.reference(arguments)
    lane = lowered(entry.kernel, arguments, AVX512, hints={"T": 512, "H": 128, "R": 32})
    assert entry.compare(arguments, expected) is None
    assert "unzip" in {op.name for op in lane.walk()}


@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
def test_neighbours_may_be_a_few_elements_apart(facts: Facts) -> None:
    x = normal(3, 166)
    arguments = {"x": x, "y": np.zeros((3, 83), np.float32)}
    lane = lowered(differences, arguments, facts, hints={"M": 64, "N": 512, "T": 1024})
    np.testing.assert_array_equal(arguments["y"], x[:, 1::2] - x[:, ::2])
    assert steps(lane, "n")[0] == 4 * facts.lanes


@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
def test_what_walks_pass_on_lies_across_the_lanes(facts: Facts) -> None:
    x = normal(9, 83)
    arguments = {"x": x, "y": np.zeros_like(x)}
    lane = lowered(softmax_of_columns, arguments, facts, hints={"M": 512, "N": 512})
    powers = np.exp(x - x.max(0))
    np.testing.assert_allclose(arguments["y"], powers / powers.sum(0), rtol=1e-5, atol=1e-7)
    assert steps(lane, "n")[0] == 4 * facts.lanes


@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
@pytest.mark.parametrize("shape", [(3, 5, 37), (4, 23, 64), (0, 5, 37), (3, 1, 1)])
def test_loops_hold_as_many_sums_as_there_are_registers(shape: tuple[int, int, int], facts: Facts) -> None:
    k, m, n = shape
    a, b = normal(k, m), normal(k, n)
    arguments = {"a": a, "b": b, "y": np.full((m, n), np.nan, np.float32)}
    lane = lowered(distances, arguments, facts, hints={"K": 64, "M": 64, "N": 256})
    np.testing.assert_allclose(arguments["y"], distances_of(a, b), rtol=1e-5, atol=1e-5)
    carried = max(len(op.results) for op in lane.walk() if op.name == "loop" and op.attributes.get("label") == "each")
    most = facts.vector_registers - 6
    assert most / 2 < carried <= most


@pytest.mark.parametrize(("rows", "tiles_of"), [
    (5, [6, 4, 2, 1]), (35, [6, 4, 2, 1]), (32, [6, 4, 2]), (48, [6, 4, 2])])
def test_what_is_left_of_rows_of_sums_is_taken_together(rows: int, tiles_of: list[int]) -> None:
    """By fours and twos: a single row reads as much of the other operand. None that a divisor rules out."""
    a, b = normal(3, rows), normal(3, 64)
    arguments = {"a": a, "b": b, "y": np.full((rows, 64), np.nan, np.float32)}
    lane = lowered(distances, arguments, AVX512, hints={"K": 64, "M": 64, "N": 256})
    np.testing.assert_allclose(arguments["y"], distances_of(a, b), rtol=1e-5, atol=1e-5)
    assert steps(lane, "m") == tiles_of


@pytest.mark.parametrize("rows", [1, 15, 128, 133])
def test_products_are_passed_on_in_blocks_of_rows(rows: int) -> None:
    x, centre = normal(rows, 9), normal(21, 9)
    arguments = {"x": x, "centre": centre, "nearest": np.zeros(rows, np.int32)}
    lane = lowered(nearest_centres, arguments, AVX512, hints={"M": 1024, "N": 256, "D": 64})
    wanted = ((centre * centre).sum(1) - 2 * x @ centre.T).argmin(1)
    np.testing.assert_array_equal(arguments["nearest"], wanted)
    assert 128 in steps(lane, "m")


def test_blocks_of_rows_leave_room_in_the_second_cache() -> None:
    x, centre = normal(40, 9), normal(21, 9)
    small = Facts(lanes=16, vector_registers=32, l2_bytes=1 << 18)
    found = []
    for facts in (AVX512, small):
        arguments = {"x": x, "centre": centre, "nearest": np.zeros(40, np.int32)}
        lane = lowered(nearest_centres, arguments, facts, hints={"M": 512, "N": 512, "D": 64})
        np.testing.assert_array_equal(arguments["nearest"], ((centre * centre).sum(1) - 2 * x @ centre.T).argmin(1))
        found.append(max(steps(lane, "m")))
    assert found == [128, 32]


def test_layers_are_products_one_after_the_other() -> None:
    x, v, w = normal(40, 5), normal(5, 19), normal(19, 7)
    arguments = {"x": x, "v": v, "w": w, "y": np.zeros((40, 7), np.float32)}
    lane = lowered(two_layers, arguments, AVX512, hints={"M": 512, "K": 256, "D": 1024, "N": 256})
    np.testing.assert_allclose(arguments["y"], (x @ v) ** 2 @ w, rtol=1e-4, atol=1e-4)
    assert max(steps(lane, "m")) <= 14 and sum(op.name == "barrier" for op in lane.walk()) == 1


@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
@pytest.mark.parametrize("shape", [(5, 9, 21), (128, 3, 16), (131, 20, 37)])
def test_sums_that_loops_carry_are_blocks_where_lanes_have_no_neighbours(shape: tuple[int, int, int],
                                                                       facts: Facts) -> None:
    m, c, n = shape
    x, w = normal(m + 2, c), normal(n, 3, c)
    arguments = {"x": x, "w": w, "y": np.full((m, n), np.nan, np.float32)}
    lane = lowered(window_sums, arguments, facts, hints={"M": 256, "N": 256, "C": 64})
    wanted = np.lib.stride_tricks.sliding_window_view(x, 3, axis=0)
    np.testing.assert_allclose(arguments["y"], np.einsum("mci,nic->mn", wanted, w), rtol=1e-4, atol=1e-4)
    assert 128 in steps(lane, "m")
    small = np.random.default_rng(0).integers(-128, 128, (m + 2, c), np.int8)
    weights = np.random.default_rng(1).integers(-128, 128, (3, c, n), np.int8)
    arguments = {"x": small, "w": weights, "y": np.full((m, n), -1, np.int32)}
    lane = lowered(window_sums_of_bytes, arguments, facts, hints={"M": 256, "N": 256, "C": 64})
    windows = np.lib.stride_tricks.sliding_window_view(small.astype(np.int32), 3, axis=0)
    np.testing.assert_array_equal(arguments["y"], np.einsum("mci,icn->mn", windows, weights.astype(np.int32)))
    assert 128 in steps(lane, "m")


@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
@pytest.mark.parametrize("rows", [1, 34, 131])
def test_rows_of_blocks_that_are_computed_are_so_once(rows: int, facts: Facts) -> None:
    """Not for each piece of columns, one element at a time. What is left of a block is taken by fours and twos."""
    x, w = normal(rows, 9), normal(37, 3, 9)
    arguments = {"x": x, "w": w, "y": np.full((rows, 37), np.nan, np.float32)}
    lane = lowered(padded_sums, arguments, facts, hints={"M": 64, "N": 64, "C": 64})
    padded = np.pad(x, ((1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 3, axis=0)
    np.testing.assert_allclose(arguments["y"], np.einsum("mci,nic->mn", windows, w), rtol=1e-4, atol=1e-4)
    products = [{op.name for op in loop.blocks[0].ops} for loop in lane.walk() if loop.name == "loop" and any(
        op.name == "fma" for op in loop.blocks[0].ops)]
    assert products and not any("select" in names for names in products)
    assert {4, 2} <= set(steps(lane, "m"))


@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (8, 56), (9, 63)])
def test_sums_of_a_window_do_not_wait_for_each_other(shape: tuple[int, int], facts: Facts) -> None:
    """Four rows of two vectors, of which short rows leave little."""
    m, n = shape
    x, w = normal(m + 2, n + 2), normal(3, 3)
    arguments = {"x": x, "w": w, "y": np.full((m, n), np.nan, np.float32)}
    lane = lowered(window, arguments, facts, hints={"M": 64, "N": 64})
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3))
    np.testing.assert_allclose(arguments["y"], np.einsum("mnij,ij->mn", windows, w), rtol=1e-4, atol=1e-4)
    assert max(len(op.results) for op in lane.walk() if op.name == "loop") == 8
    assert steps(lane, "m")[0] == 4


def test_products_of_which_the_largest_are_wanted_meet_in_blocks() -> None:
    x, centre = normal(37, 9), normal(21, 9)
    arguments = {"x": x, "centre": centre, "place": np.zeros((37, 3), np.int32)}
    lane = lowered(nearest_of_all, arguments, AVX512, hints={"M": 1024, "N": 256, "D": 64})
    closeness = 2 * x @ centre.T - (centre * centre).sum(1)
    np.testing.assert_array_equal(arguments["place"], np.argsort(-closeness, 1)[:, :3])
    assert 128 in steps(lane, "m")


@pytest.mark.parametrize(("rows", "block"), [(32, 32), (64, 32), (256, 64), (512, 128), (4096, 128)])
def test_there_are_blocks_for_several_workers(rows: int, block: int) -> None:
    arguments = {"x": normal(40, 9), "centre": normal(21, 9), "nearest": np.zeros(40, np.int32)}
    lane = lowered(nearest_centres, arguments, AVX512, hints={"M": rows, "N": 256, "D": 64})
    assert max(steps(lane, "m")) == block


def test_a_schedule_says_how_many_rows_a_block_has() -> None:
    x, centre = normal(40, 9), normal(21, 9)
    arguments = {"x": x, "centre": centre, "nearest": np.zeros(40, np.int32)}
    lane = lowered(nearest_centres, arguments, AVX512, Schedule(tile={"m": 32}), {"M": 1024, "N": 256, "D": 64})
    np.testing.assert_array_equal(arguments["nearest"], ((centre * centre).sum(1) - 2 * x @ centre.T).argmin(1))
    assert 32 in steps(lane, "m") and 128 not in steps(lane, "m")


def test_a_schedule_whose_tile_is_no_multiple_of_the_lanes_is_refused() -> None:
    arguments = {name: normal(5, 70) for name in "aby"}
    with pytest.raises(ScheduleError, match="tile of c is 5"):
        lowered(recurrence, arguments, AVX512, Schedule(tile={"c": 5}), {"T": 64, "C": 1024})


def test_a_schedule_may_put_another_axis_across_the_lanes() -> None:
    x = normal(40, 33)
    arguments = {"x": x, "y": np.zeros_like(x)}
    lane = lowered(softmax_of_columns, arguments, AVX512, Schedule(lane="m"), {"M": 512, "N": 512})
    powers = np.exp(x - x.max(0))
    np.testing.assert_allclose(arguments["y"], powers / powers.sum(0), rtol=1e-5, atol=1e-7)
    assert steps(lane, "n") == [1]


def test_powers_that_a_product_and_a_sum_read_are_computed_once() -> None:
    x, w = normal(21, 35), np.abs(normal(35, 40))
    arguments = {"x": x, "w": w, "y": np.zeros((21, 40), np.float32)}
    lane = lowered(weighted, arguments, AVX512, hints={"M": 256, "K": 256, "N": 256})
    powers = np.exp(x)
    np.testing.assert_allclose(arguments["y"], powers @ w / powers.sum(1, keepdims=True), rtol=1e-5)
    loops = [loop for loop in lane.walk() if loop.name == "loop" and any(op.name == "exp" for op in loop.walk())]
    assert {loop.attributes["label"] for loop in loops} == {"m", "k"}       # none along what the powers meet


@pytest.mark.sampled(3)
@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (17, 34), (70, 5), (5, 70), (65, 65)])
def test_one_axis_of_a_nest_lies_across_the_lanes(tokens: int, heads: int, facts: Facts) -> None:
    """Also where several would."""
    hints = {"T": 64, "M": 64, "N": 64, "D": 8}
    q, k, v = normal(tokens, heads, 9), normal(33, 9), normal(33, 9)
    arguments = {"q": q, "k": k, "v": v, "y": np.full_like(q, np.nan)}
    lowered(heads_of_one_cache, arguments, facts, hints=hints)
    score = q @ k.T
    weight = np.exp(score - score.max(2, keepdims=True))
    np.testing.assert_allclose(arguments["y"], weight @ v / weight.sum(2, keepdims=True), rtol=1e-4, atol=1e-5)
    x = normal(tokens, heads, 7)
    arguments = {"x": x, "y": np.full((tokens, heads, 2), np.nan, np.float32)}
    lowered(largest_of_few, arguments, facts, hints=hints)
    np.testing.assert_array_equal(arguments["y"], -np.sort(-x)[..., :2])


@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
def test_numbers_beside_rows_do_not_take_the_lanes(facts: Facts) -> None:
    """Rows are read as they lie, not gathered because two numbers of each lie along the rows."""
    logits, chance = normal(5, 70), np.array([0.01, 0.4, 0.6, 0.9, 0.99], np.float32)
    arguments = {"logits": logits, "share": 0.9, "chance": chance, "token": np.full(5, -1, np.int32)}
    lane = lowered(drawn_tokens, arguments, facts, hints={"B": 64, "N": 4096})
    places = np.argsort(-logits, 1)[:, :32]
    assert all(token in row for token, row in zip(arguments["token"], places, strict=True))
    assert arguments["token"][0] == places[0, 0]
    loads = [op for op in lane.walk() if op.name in ("load", "gather") and op.attributes["dtype"] is f32]
    assert loads and all(op.name == "load" for op in loads)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
@pytest.mark.parametrize("rows", [1, 3, 5, 16, 33])
@pytest.mark.parametrize("turned", [False, True])
def test_operands_may_span_rows_that_a_nest_holds(turned: bool, rows: int, facts: Facts) -> None:
    """They were copied as if there were one row."""
    x, w = normal(9, 5), normal(rows, 9, 18)
    if turned:
        w = np.ascontiguousarray(w.swapaxes(1, 2)).swapaxes(1, 2)
    for hint in (2, 40):
        arguments = {"x": x, "w": w, "y": np.full((1, rows, 5, 18, 17), np.nan, np.float32)}
        lowered(sums_of_rows_held, arguments, facts, hints={"K": 1, "M": hint, "N": 40, "C": 40, "T": 40, "D": 40})
        np.testing.assert_allclose(arguments["y"], np.broadcast_to(
            -np.einsum("tc,mtd->mcd", x, w)[None, ..., None], arguments["y"].shape), rtol=1e-4, atol=1e-5)


@kernel
def lists_in_a_nest(x: Tensor[f32, N, D], y: Tensor[f32, N, M]):
    for m in tiles(M):
        for n in tiles(N):
            d, k = whole(D), whole(3)
            best, _ = topk(x[n, d] * 2.0, k, over=d)
            y[n, m] = sum(best, over=k)


@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["AVX-512", "AVX2"])
@pytest.mark.parametrize("hint", [16, 1024])
def test_lists_go_row_by_row_where_a_nest_around_has_the_lanes(facts: Facts, hint: int) -> None:
    x = normal(37, 7)
    arguments = {"x": x, "y": np.full((37, 21), np.nan, np.float32)}
    lowered(lists_in_a_nest, arguments, facts, hints={"M": 64, "N": hint, "D": 7})
    largest = 2 * np.sort(x, axis=1)[:, -3:].sum(1)
    np.testing.assert_allclose(arguments["y"], np.broadcast_to(largest[:, None], (37, 21)), rtol=1e-5, atol=1e-5)


def test_a_range_may_begin_anywhere_and_be_of_fixed_length() -> None:
    x = normal(24)
    arguments = {"x": x, "y": np.zeros_like(x)}
    lowered(chunks, arguments, AVX2)
    square = x.reshape(3, 8, 1) * x.reshape(3, 1, 8)
    np.testing.assert_allclose(arguments["y"].reshape(3, 8), (square * square.max(1)[:, None]).sum(2), rtol=1e-5)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("first", [0, 13, 60])
def test_workers_share_a_range_of_fixed_length(first: int, workers: int) -> None:
    """A task has a part of it."""
    x, rows = normal(160, 40), slice(first, first + 100)
    for made, result in ((part_of_rows, 2 * x), (sums_of_rows, x.sum(1))):
        arguments = {"x": x, "first": first, "y": np.zeros_like(result)}
        function = reduce_loops(made.tile_ir())
        run_lane(function, arguments, None, AVX512, specialize(function, arguments), workers)
        expected = np.zeros_like(result)
        expected[rows] = result[rows]
        np.testing.assert_allclose(arguments["y"], expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=examples(40), deadline=None)
@given(st.sampled_from([AVX512, AVX2]), st.integers(0, 9), st.integers(1, 150), st.integers(1, 150), st.integers(1, 40),
       st.sampled_from([1, 40, 256, 1024]))
def test_any_extents(facts: Facts, k: int, m: int, n: int, d: int, hint: int) -> None:
    hints = dict.fromkeys("KMNDTC", hint)
    a, b = normal(k, m), normal(k, n)
    arguments = {"a": a, "b": b, "y": np.full((m, n), np.nan, np.float32)}
    lowered(distances, arguments, facts, hints=hints)
    np.testing.assert_allclose(arguments["y"], distances_of(a, b), rtol=1e-4, atol=1e-5)
    x, v, w = normal(m, k), normal(k, d), normal(d, n)
    arguments = {"x": x, "v": v, "w": w, "y": np.full((m, n), np.nan, np.float32)}
    lowered(two_layers, arguments, facts, hints=hints)
    np.testing.assert_allclose(arguments["y"], (x @ v) ** 2 @ w, rtol=1e-3, atol=1e-3)
