"""Matrices packed once: the same results as from the arrays, and clear errors elsewhere."""

from __future__ import annotations

import copy
import pickle

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import Schedule, Tensor, bf16, exp, f32, full, i8, i32, kernel, maximum, tiles, u8, whole, zeros
from sapper.lane.rows import LoweringError
from sapper.runtime.errors import ArgumentError
from sapper.runtime.packed import packed_empty
from sapper.tile.schedule import ScheduleError
from tests.lane.test_packed import arguments_of, expected_of, make_product
from tests.strategies import examples

M, N, K, V = sp.dims("M N K V")
TYPES = ((f32, f32, f32), (f32, bf16, f32), (bf16, bf16, f32), (i8, i8, i32), (u8, i8, i32), (u8, u8, i32))
PRODUCTS = {(order, types): make_product(order, *types) for order in ("nn", "nt", "tt") for types in TYPES}


def small(order, types, m, n, k, seed):
    """Arguments whose products are exact in every type."""
    arguments = arguments_of(order, (i8, i8, i32), m, n, k, seed) if types[0] is f32 else arguments_of(
        order, types, m, n, k, seed)
    if types[0] is f32:
        narrow = np.float32 if types[1] is f32 else arguments_of(order, (bf16, bf16, f32), 1, 1, 1)["b"].dtype
        arguments = {"a": arguments["a"].astype(np.float32), "b": (arguments["b"] // 16).astype(narrow),
                     "c": arguments["c"].astype(np.float32)}
    return arguments


@settings(max_examples=examples(20))
@given(m=st.integers(0, 40), n=st.integers(0, 100), k=st.integers(0, 70), order=st.sampled_from(["nn", "nt", "tt"]),
       types=st.sampled_from(TYPES), seed=st.integers(0, 99))
def test_packed_is_the_same(m, n, k, order, types, seed) -> None:
    product = PRODUCTS[order, types]
    arguments = small(order, types, m, n, k, seed)
    packed = sp.pack(product, "b", arguments["b"])
    assert packed.unpack().tobytes() == np.ascontiguousarray(arguments["b"]).tobytes()
    product(arguments["a"], packed, arguments["c"], threads=1 + seed % 2)
    np.testing.assert_array_equal(arguments["c"], expected_of(order, arguments))


@pytest.mark.parametrize(("n", "k"), [(8, 8), (4, 3), (2, 8)])
def test_a_packed_matrix_of_few_known_elements_stays_as_it_lies(n, k) -> None:
    """Rows of so few would be written out else, element by element."""
    product = make_product("nt", f32, bf16, f32, specialise="N K")
    arguments = small("nt", (f32, bf16, f32), 40, n, k, 1)
    product(arguments["a"], sp.pack(product, "b", arguments["b"]), arguments["c"])
    np.testing.assert_array_equal(arguments["c"], expected_of("nt", arguments))


def test_one_packed_matrix_serves_all_calls() -> None:
    product = PRODUCTS["nt", (i8, i8, i32)]
    weights = arguments_of("nt", (i8, i8, i32), 1, 70, 130)["b"]
    packed = sp.pack(product, "b", weights)
    for m in (1, 4, 33):
        arguments = arguments_of("nt", (i8, i8, i32), m, 70, 130, m)
        expected = expected_of("nt", {**arguments, "b": weights})
        for run in (lambda a, c: product(a, packed, c), lambda a, c: product(a, b=packed, c=c, interpret=True),
                    lambda a, c: sp.prepare(product, a, packed, c)(),
                    lambda a, c: sp.Program([(product, (a, packed, c))])()):
            arguments["c"][...] = -1
            run(arguments["a"], arguments["c"])
            np.testing.assert_array_equal(arguments["c"], expected)



def test_copies_have_memory_of_their_own() -> None:
    """Calls take a packed matrix by its address, and code by hand may ask for aligned panels."""
    product = PRODUCTS["nn", (f32, f32, f32)]
    arguments = small("nn", (f32, f32, f32), 5, 40, 30, 1)
    packed = sp.pack(product, "b", arguments["b"])
    copies = [copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), copy.copy(packed)]
    packed.data[:] = 0
    for each in copies:
        assert each.address == each.data.ctypes.data and each.address % 64 == 0 and each.layout == packed.layout
        for _ in range(3):
            arguments["c"][:] = -1
            product(arguments["a"], each, arguments["c"])
            np.testing.assert_array_equal(arguments["c"], expected_of("nn", arguments))


def test_calls_with_packed_matrices_are_quick(monkeypatch) -> None:
    """From the third call on nothing is bound anew; packed matrices, arrays and other layouts may take turns."""
    product = make_product("nt", i8, i8, i32)
    runs = {}
    for n, k in ((48, 70), (70, 48)):
        arguments = arguments_of("nt", (i8, i8, i32), 3, n, k)
        for b in (arguments["b"], sp.pack(product, "b", arguments["b"])):
            runs[n, type(b).__name__] = (arguments["a"], b, np.zeros((3, n), np.int32), expected_of("nt", arguments))
    for _ in range(2):
        for a, b, c, _expected in runs.values():
            product(a, b, c)
    from sapper.runtime.launch import Launcher

    def refuse(*_: object) -> None:
        raise AssertionError("bound anew")

    monkeypatch.setattr(Launcher, "bind", refuse)
    for a, b, c, expected in (*runs.values(), *reversed(runs.values())):
        c[...] = -1
        product(a, b, c)
        np.testing.assert_array_equal(c, expected)
    a, b, c, _expected = runs[48, "Packed"]
    with pytest.raises(AssertionError, match="bound anew"):
        product(a, b, c[:2])                      # rows that do not fit are found, packed or not
    with pytest.raises(AssertionError, match="bound anew"):
        product(a, runs[70, "Packed"][1], c)


@kernel
def gated(x: Tensor[i8, M, K], gate: Tensor[i8, N, K], up: Tensor[i8, N, K], out: Tensor[i32, M, N]):
    for m, n in tiles(M, N):
        first = zeros(m, n, dtype=i32)
        second = zeros(m, n, dtype=i32)
        for k in tiles(K):
            first += x[m, k] @ gate[n, k]
            second += x[m, k] @ up[n, k]
        out[m, n] = first - second


@kernel
def vector(w: Tensor[i8, N, K], x: Tensor[f32, K], y: Tensor[f32, N]):
    """Weights only are narrow: they are widened, packed or not."""
    for n in tiles(N):
        acc = zeros(n, dtype=f32)
        for k in tiles(K):
            acc += w[n, k].to(f32) @ x[k]
        y[n] = acc


@pytest.mark.parametrize(("m", "n"), [(3, 50), (40, 150)])
def test_several_packed_matrices(m, n) -> None:
    random = np.random.default_rng(0)
    x, gate, up = (random.integers(-128, 128, (rows, 37)).astype(np.int8) for rows in (m, n, n))
    out = np.zeros((m, n), np.int32)
    gated(x, sp.pack(gated, "gate", gate), sp.pack(gated, "up", up), out)
    wide = x.astype(np.int32)
    np.testing.assert_array_equal(out, wide @ gate.T.astype(np.int32) - wide @ up.T.astype(np.int32))


def test_packed_rows_of_a_vector() -> None:
    random = np.random.default_rng(0)
    weights, x = random.integers(-128, 128, (1100, 45)).astype(np.int8), random.integers(-9, 9, 45).astype(np.float32)
    y = np.zeros(1100, np.float32)
    packed = sp.pack(vector, "w", weights)
    vector(packed, x, y, threads=2)
    np.testing.assert_array_equal(y, weights.astype(np.float32) @ x)
    width = packed.panels.width
    assert packed.nbytes == -(-1100 // width) * width * (45 + 4)     # and 4 bytes of a sum for each column


@kernel
def looked_up(token: Tensor[i32, M], w: Tensor[f32, N, K], y: Tensor[f32, M, N], row: Tensor[f32, M, K]):
    """The rows of w are read as well as contracted."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += w[token[m], k] @ w[n, k]
        y[m, n] = acc
    for m, k in tiles(M, K):
        row[m, k] = w[token[m], k]


@kernel
def attention(q: Tensor[f32, M, K], k: Tensor[f32, N, K], v: Tensor[f32, N, V], out: Tensor[f32, M, V]):
    for m in tiles(M):
        d, c = whole(K), whole(V)
        low, total = full(m, value=-1e30, dtype=f32), zeros(m, dtype=f32)
        mass = zeros(m, c, dtype=f32)
        for n in tiles(N):
            score = q[m, d] @ k[n, d]
            high = maximum(low, sp.max(score, over=n))
            weight, fade = exp(score - high), exp(low - high)
            total = total * fade + sp.sum(weight, over=n)
            mass = mass * fade + weight @ v[n, c]
            low = high
        out[m, c] = mass / total


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize(("m", "n", "k", "v"), [(5, 7, 3, 5), (64, 40, 16, 64), (1, 40, 16, 64)])
def test_columns_of_panels_lie_across_the_lanes_of_a_nest(name, m, n, k, v) -> None:
    """And not its rows, for which scores would be plain vectors."""
    random = np.random.default_rng(0)
    q, keys, values = (random.standard_normal(shape).astype(np.float32) for shape in ((m, k), (n, k), (n, v)))
    given = {"q": q, "k": keys, "v": values, "out": np.zeros((m, v), np.float32)}
    weights = np.exp((scores := q.astype(np.float64) @ keys.T) - scores.max(axis=1, keepdims=True))
    want = weights / weights.sum(axis=1, keepdims=True) @ values
    packed = {name: sp.pack(attention, name, given[name])}
    attention(**given | packed)
    # Sums of at most 40 products of f32, and as many weights with 8 ulp of error in each (tests/strategies/agree.py).
    np.testing.assert_allclose(given["out"], want, rtol=1e-4, atol=1e-5)
    given["out"][...] = np.nan
    attention(**given | packed, schedule=Schedule(tile={"n": 4}))       # pieces of the depth of v
    np.testing.assert_allclose(given["out"], want, rtol=1e-4, atol=1e-5)
    if m > 1:
        with pytest.raises(LoweringError, match=rf"found {name} packed in .*; expected a tensor that is packed"):
            attention(**given | packed, schedule=Schedule(lane="m"))


@kernel
def column_by_column(x: Tensor[f32, M, K], w: Tensor[bf16, N, K], y: Tensor[f32, M, N]):
    for n in tiles(N):
        for m in tiles(M):
            k = whole(K)
            y[m, n] = w[n, k] @ x[m, k]


@pytest.mark.parametrize("n", [59, 66, 73, 80, 200])
@pytest.mark.parametrize("static", [False, True])
def test_no_piece_of_a_nest_spans_two_panels(n, static) -> None:
    random = np.random.default_rng(0)
    x, w = (random.integers(-9, 9, (rows, 3)).astype(np.float32) for rows in (4, n))
    y = np.zeros((4, n), np.float32)
    packed = sp.pack(column_by_column, "w", w.astype(ml_dtypes.bfloat16))
    column_by_column(x, packed, y, static=static)
    np.testing.assert_array_equal(y, x @ w.T)
    with pytest.raises(ScheduleError, match="tile of n is 3, but the columns of a packed tensor lie along it"):
        column_by_column(x, packed, y, static=static, schedule=Schedule(tile={"n": 3}))


@kernel
def apart(x: Tensor[f32, M, K], w: Tensor[f32, N, V], y: Tensor[f32, M, N]):
    """Every third element of w is read."""
    for m, n in tiles(M, N):
        k = whole(K)
        y[m, n] = x[m, k] @ w[n, 3 * k + 1]


@kernel
def viewed(x: Tensor[f32, M, K], w: Tensor[f32, N, K], y: Tensor[f32, M, N]):
    """The odd elements of w are contracted."""
    pairs = w.view(N, K // 2, 2)
    for m, n in tiles(M, N):
        k = whole(K // 2)
        y[m, n] = x[m, k + 0] @ pairs[n, k, 1]


@kernel
def stored(x: Tensor[f32, M, K], w: Tensor[f32, N, K], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        k = whole(K)
        y[m, n] = x[m, k] @ w[n, k]
    for n, k in tiles(N, K):
        w[n, k] = 0.0


@kernel
def read_again(x: Tensor[f32, M, K], w: Tensor[f32, N, K], y: Tensor[f32, M, N], z: Tensor[f32, N, K]):
    """What is contracted is stored elsewhere, too."""
    for n in tiles(N):
        k = whole(K)
        row = w[n, k]
        for m in tiles(M):
            y[m, n] = x[m, k] @ row
        z[n, k] = row * 2.0


@kernel
def squared(w: Tensor[f32, N, K], y: Tensor[f32, N]):
    for n in tiles(N):
        k = whole(K)
        y[n] = sum(w[n, k] * w[n, k], over=k)


def test_errors() -> None:
    product, floats = PRODUCTS["nt", (i8, i8, i32)], PRODUCTS["nt", (f32, f32, f32)]
    weights = np.zeros((5, 8), np.int8)
    with pytest.raises(ArgumentError, match="no tensor of that name"):
        sp.pack(product, "w", weights)
    with pytest.raises(ArgumentError, match="dtype f32"):
        sp.pack(product, "b", weights.astype(np.float32))
    with pytest.raises(LoweringError, match=r"w: found 3 reads of it; expected that each is the operand"):
        sp.pack(looked_up, "w", np.zeros((5, 8), np.float32))
    with pytest.raises(LoweringError, match=r"w: found 1 reads of it; .* indexed by plain axes from 0 on"):
        sp.pack(apart, "w", np.zeros((5, 8), np.float32))
    with pytest.raises(LoweringError, match=r"w: found 1 reads of it; expected that each is the operand"):
        sp.pack(viewed, "w", np.zeros((5, 8), np.float32))
    for other in (read_again, squared):
        with pytest.raises(LoweringError, match=r"w: found \d reads of it; .* and of nothing else"):
            sp.pack(other, "w", np.zeros((5, 8), np.float32))
    with pytest.raises(LoweringError, match=r"w: found a store to it; expected that the kernel only reads it"):
        sp.pack(stored, "w", np.zeros((5, 8), np.float32))
    with pytest.raises(LoweringError, match=r"found a packed tensor, w, that is read otherwise than by a contraction"):
        viewed(np.zeros((2, 8), np.float32), sp.pack(floats, "b", np.zeros((5, 8), np.float32)),
               np.zeros((2, 5), np.float32))
    packed = sp.pack(product, "b", weights)
    with pytest.raises(ArgumentError, match="K = 8"):
        product(np.zeros((2, 7), np.int8), packed, np.zeros((2, 5), np.int32))
    with pytest.raises(ArgumentError, match="read-only"):
        floats(np.zeros((2, 8), np.float32), np.zeros((5, 8), np.float32),
               sp.pack(floats, "b", np.zeros((2, 5), np.float32)))
    other = make_product("nn", i8, i8, i32)
    with pytest.raises(LoweringError, match=r"found b packed in .* along dimension 1; expected a tensor that is"):
        other(np.zeros((2, 5), np.int8), packed, np.zeros((2, 8), np.int32))


@settings(max_examples=examples(20))
@given(n=st.integers(1, 100), k=st.integers(1, 40), types=st.sampled_from(TYPES[:3]), seed=st.integers(0, 99))
def test_filled_piece_by_piece_is_packed_at_once(n, k, types, seed) -> None:
    product = PRODUCTS["nt", types]
    whole = sp.pack(product, "b", small("nt", types, 1, n, k, seed)["b"])
    pieces = packed_empty(product, "b", n, k)
    assert pieces.layout == whole.layout
    for first in range(0, n, 2 * whole.panels.width):
        pieces.put(first, whole.unpack()[first : first + 2 * whole.panels.width])
    assert pieces.data.tobytes() == whole.data.tobytes()


def test_only_whole_panels_are_put() -> None:
    packed = packed_empty(PRODUCTS["nt", (f32, f32, f32)], "b", 70, 5)
    columns = np.ones((70, 5), np.float32)
    for first, part in ((1, columns[1:]), (0, columns[:33]), (0, columns[:, :4])):
        with pytest.raises(ValueError, match="expected whole panels"):
            packed.put(first, part)
    with pytest.raises(ValueError, match="expected a dtype whose sums begin at 0"):
        packed_empty(PRODUCTS["nt", (i8, i8, i32)], "b", 70, 5).put(0, columns.astype(np.int8))


def test_the_layout_is_kept_on_disk(tmp_path, monkeypatch) -> None:
    from sapper.codegen import pipeline
    from sapper.runtime import packed

    def never(*_) -> None:
        raise AssertionError("the compiler is asked again")

    product = PRODUCTS["nt", (f32, bf16, f32)]
    monkeypatch.setenv("SAPPER_CACHE_DIR", str(tmp_path))
    packed._kept_panels.cache_clear()
    first = packed_empty(product, "b", 70, 5)
    packed._kept_panels.cache_clear()
    monkeypatch.setattr(pipeline, "panels_of_kernel", never)
    assert packed_empty(product, "b", 70, 5).layout == first.layout
    packed._kept_panels.cache_clear()
