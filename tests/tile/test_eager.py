"""The eager run: means what the tile IR means, can be debugged, and says what is wrong at the author's line."""

from __future__ import annotations

import io
import linecache
import pdb
import sys
import types

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper.ir.types import bf16, bool_, f32, f64, i8, i32
from sapper.lang import context
from sapper.lang.builtins import each, exp, full, maximum, span, tiles, where, whole, zeros
from sapper.lang.dims import dims
from sapper.lang.errors import KernelError
from sapper.lang.kernel import kernel
from sapper.lang.tensor import Tensor
from sapper.tile import eager
from sapper.tile.interpret import interpret
from sapper.tile.rounding import expect
from tests.strategies import assert_agree, assert_expected, assert_meaning, examples, kernels
from tests.strategies.generate import built
from tests.strategies.nests import TILE_SIZES, nests

M, N, K = dims("M N K")
BF16 = ml_dtypes.bfloat16


def copied(arguments):
    return {name: np.array(value) if isinstance(value, np.ndarray) else value for name, value in arguments.items()}


@given(kernels(), st.integers(0, 2**32 - 1))
@settings(max_examples=examples(40))
def test_random_kernels_agree_with_their_tile_ir_at_every_tile_size(case, seed):
    kernel, function = built(case)
    arguments = case.make_arguments(seed)
    expected = expect(function, arguments, seed=seed)
    for size in (1, 3, None):
        given_to_eager, given_to_ir = copied(arguments), copied(arguments)
        eager.run(kernel, given_to_eager, size)
        assert_expected(given_to_eager, expected, f"eager, tile size {size}")
        interpret(function, given_to_ir, size)
        assert_expected(given_to_ir, expected, f"tile IR, tile size {size}")


@given(kernels(dtypes=("i32", "u8")), st.integers(0, 2**32 - 1))
@settings(max_examples=examples(15))
def test_random_kernels_of_integers_are_exact_and_race_free(case, seed):
    function = case.load().tile_ir()
    arguments = case.make_arguments(seed)
    first, second = copied(arguments), copied(arguments)
    interpret(function, first)
    interpret(function, second, check_races=True)
    for tensor in case.tensors:
        np.testing.assert_array_equal(first[tensor.name], second[tensor.name])


@given(nests(), st.integers(0, 2**32 - 1))
@settings(max_examples=examples(8))
def test_kernels_as_users_write_them_agree_with_their_tile_ir_and_do_not_race(case, seed):
    kernel = case.load()
    function = kernel.tile_ir()
    arguments = case.make_arguments(seed, hostile=False)
    given_to_eager, given_to_ir = copied(arguments), copied(arguments)
    eager.run(kernel, given_to_eager, 9)
    assert_meaning(case, function, arguments, given_to_eager, TILE_SIZES)
    interpret(function, given_to_ir, check_races=True)
    assert_meaning(case, function, arguments, given_to_ir, TILE_SIZES)


@kernel
def matmul(a: Tensor[bf16, M, K], b: Tensor[bf16, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[k, n]
        c[m, n] = acc


@pytest.mark.parametrize("sizes", [None, 4, {"m": 2, "k": 3}])
def test_matmul(sizes):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((5, 9)).astype(BF16), rng.standard_normal((9, 7)).astype(BF16)
    c = np.full((5, 7), np.nan, np.float32)
    eager.run(matmul, [a, b, c], sizes)
    assert_agree(c, (a.astype(float) @ b.astype(float)).astype(np.float32), f32, 9)


def largest(x, axis):
    return max(x, over=axis)  # Python's own name, in a function that knows nothing of sapper


helpers = types.ModuleType("author_helpers")
exec("def doubled(x):\n    return max(x, 0) * 2\n", helpers.__dict__)


@kernel
def softmax(x: Tensor[f32, M, N], out: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        t = x[m, n]
        e = exp(t - largest(t, n))
        out[m, n] = e / sum(e, over=n)


def test_pythons_own_names_mean_sappers_also_in_functions_that_are_called():
    x = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    out = np.zeros_like(x)
    eager.run(softmax, {"x": x, "out": out})
    e = np.exp(x.astype(float) - x.max(1, keepdims=True))
    assert_agree(out, (e / e.sum(1, keepdims=True)).astype(np.float32), f32, 5)
    assert "max" not in largest.__globals__  # the author's module is as it was


def test_functions_of_modules_and_closures_get_the_same_treatment():
    factor = 3

    def scaled(x):
        return abs(x) * factor

    @kernel
    def f(x: Tensor[i32, M], out: Tensor[i32, M]):
        for m in tiles(M):
            out[m] = helpers.doubled(x[m]) + scaled(x[m])

    x, out = np.array([-3, 4], np.int32), np.zeros(2, np.int32)
    eager.run(f, [x, out])
    np.testing.assert_array_equal(out, [9, 8 + 12])


def test_a_kernel_called_by_a_kernel_runs_in_place():
    @kernel
    def outer(x: Tensor[f32, M, N], out: Tensor[f32, M, N]):
        softmax(x, out)

    x, out, expected = np.ones((2, 4), np.float32), np.zeros((2, 4), np.float32), np.full((2, 4), 0.25, np.float32)
    eager.run(outer, [x, out])
    np.testing.assert_array_equal(out, expected)


@kernel
def counted(x: Tensor[f32, M], out: Tensor[f32, 3], n: i32):
    total = 0.0
    count = 0
    for m in tiles(span(0, n)):
        total += sum(x[m], over=m)
        count += sum((x[m] > 0).to(i32), over=m)
    sign = 1 if n > 2 else -1
    out[0] = total
    out[1] = count.to(f32)
    out[2] = sign.to(f32)


@pytest.mark.parametrize(("n", "expected"), [(0, [0, 0, -1]), (3, [3, 2, 1])])
def test_numbers_that_a_loop_carries_are_scalars_without_a_dtype(n, expected):
    x, out, again = np.array([1, -1, 3, 9], np.float32), np.zeros(3, np.float32), np.zeros(3, np.float32)
    eager.run(counted, [x, out, n])
    np.testing.assert_array_equal(out, expected)
    interpret(counted.tile_ir(), {"x": x, "out": again, "n": n})
    np.testing.assert_array_equal(again, expected)


def test_carried_numbers_compute_in_f32():
    @kernel
    def f(out: Tensor[f64, 1], n: i32):
        step = 1.0
        for _ in range(n):
            step = step * 0.1
        out[0] = (step * 1.0).to(f64)

    out, again = np.zeros(1), np.zeros(1)
    eager.run(f, [out, 3])
    interpret(f.tile_ir(), {"out": again, "n": 3})
    assert out[0] == again[0] == np.float64(np.float32(np.float32(np.float32(0.1) * np.float32(0.1)) * np.float32(0.1)))


def test_each_and_scalars():
    @kernel
    def f(lengths: Tensor[i32, M], x: Tensor[i32, M, N], out: Tensor[i32, M]):
        for b in each(M):
            length = lengths[b]
            best = full(value=-1, dtype=i32)
            for n in tiles(span(0, length)):
                best = maximum(best, max(x[b, n], over=n))
            if length == 0 or best < 0:
                best = -best
            elif not length > 2 and True:
                best = best + 100
            out[b] = best if length != 1 else 7

    x = np.arange(12, dtype=np.int32).reshape(3, 4)
    for size in (None, 1):
        out = np.zeros(3, np.int32)
        eager.run(f, [np.array([0, 2, 4], np.int32), x, out], size)
        np.testing.assert_array_equal(out, [1, 105, 11])


# A debugger.

SOURCE = """\
from sapper.ir.types import f32
from sapper.lang.builtins import tiles
from sapper.lang.dims import dims
from sapper.lang.kernel import kernel
from sapper.lang.tensor import Tensor

M, N = dims("M N")

@kernel
def double(x: Tensor[f32, M], out: Tensor[f32, M]):
    for m in tiles(M):
        t = x[m]
        out[m] = t + t
"""


def load(tmp_path, monkeypatch):
    file = tmp_path / "author_kernels.py"
    file.write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "author_kernels", raising=False)
    linecache.checkcache()
    import author_kernels

    return file, author_kernels.double


def test_pdb_stops_at_a_breakpoint_inside_a_kernel(tmp_path, monkeypatch):
    file, double = load(tmp_path, monkeypatch)
    out = io.StringIO()
    debugger = pdb.Pdb(stdin=io.StringIO(f"b {file}:13\nc\np t\np m\np M\np max(t, over=m)\nw\nc\n"), stdout=out,
                       nosigint=True, readrc=False)
    x, result = np.array([1, 2, 3], np.float32), np.zeros(3, np.float32)
    debugger.runcall(eager.run, double, [x, result])
    text = out.getvalue()
    assert "f32[m=3]" in text and "[1. 2. 3.]" in text
    assert "axis m (0 .. 3)" in text and "index 3" in text and "f32 3.0" in text
    assert f"{file}(13)double()" in text and "out[m] = t + t" in text
    np.testing.assert_array_equal(result, [2, 4, 6])


def test_lines_are_the_authors(tmp_path, monkeypatch):
    file, double = load(tmp_path, monkeypatch)
    lines = []

    def trace(frame, event, argument):
        if frame.f_code.co_filename != str(file):
            return None
        if event == "line":
            lines.append(frame.f_lineno)
        return trace

    sys.settrace(trace)
    try:
        eager.run(double, [np.ones(2, np.float32), np.zeros(2, np.float32)], 1)
    finally:
        sys.settrace(None)
    assert lines == [11, 12, 13, 11, 12, 13, 11]


# What is wrong.


def fails(kind, function, *arguments):
    with pytest.raises(KernelError) as caught:
        eager.run(kernel(function), arguments)
    assert caught.value.kind == kind, caught.value
    assert caught.value.file == __file__ and caught.value.found
    return caught.value


X = np.ones((2, 3), np.float32)
I = np.ones((2, 3), np.int32)
X_, I_ = Tensor[f32, M, N], Tensor[i32, M, N]


def test_out_of_bounds_names_the_line():
    @kernel
    def f(x: X_):
        for m in tiles(M):
            n = whole(N)
            x[m, n] = x[m + 1, n]

    with pytest.raises(IndexError, match=r"test_eager.py:\d+:\d+: load of x out of bounds: dimension 0 has extent 2, "
                                         r"found index 2"):
        eager.run(f, [X.copy()])


def test_mixed_dtypes():
    def f(x: X_, i: I_):
        for m in tiles(M):
            n = whole(N)
            x[m, n] = x[m, n] + i[m, n]

    assert "f32 and i32" in fails("dtype-mix", f, X, I).found


def test_tile_as_a_condition():
    def f(x: X_):
        for m, n in tiles(M, N):
            if x[m, n] > 0:
                x[m, n] = 0.0

    fails("scalar-needed", f, X)


def test_stores():
    def wrong_dtype(x: X_, i: I_):
        for m, n in tiles(M, N):
            x[m, n] = i[m, n]

    def lost_axis(x: X_):
        for m, n in tiles(M, N):
            x[m, 0] = x[m, n]

    fails("store-dtype", wrong_dtype, X, I)
    fails("store-axes", lost_axis, X)


def test_operations_without_meaning():
    def division(i: I_):
        for m, n in tiles(M, N):
            i[m, n] = i[m, n] / 2

    def bits(x: X_):
        for m, n in tiles(M, N):
            x[m, n] = x[m, n] & 1

    def literal(i: I_):
        for m, n in tiles(M, N):
            i[m, n] = i[m, n] + 0.5

    def too_large(i: I_):
        for m, n in tiles(M, N):
            i[m, n] = (i[m, n].to(i8) + 200).to(i32)

    def power(x: X_):
        for m, n in tiles(M, N):
            x[m, n] = x[m, n] ** 0.5

    fails("division-dtype", division, I)
    fails("op-dtype", bits, X)
    fails("literal-dtype", literal, I)
    fails("literal-range", too_large, I)
    fails("power", power, X)


def test_contractions_and_reductions():
    def no_axis(x: X_):
        for m, n in tiles(M, N):
            x[m, n] = x[m, 0] @ x[0, n]

    def scalar(x: X_):
        for m, n in tiles(M, N):
            x[m, n] = x[m, n] @ x[0, 0]

    def over(x: X_):
        for m, n in tiles(M, N):
            x[m, n] = sum(x[m, 0], over=n)

    def tensor(x: X_):
        for m, n in tiles(M, N):
            x[m, n] = x + 1.0

    def rank(x: X_):
        for m in tiles(M):
            x[m] = 1.0

    fails("contract-no-shared-axis", no_axis, X)
    fails("contract-scalar", scalar, X)
    fails("over", over, X)
    fails("tensor-without-index", tensor, X)
    fails("rank", rank, X)


def test_weak_choices_take_the_dtype_that_they_meet():
    @kernel
    def f(x: Tensor[bf16, M], flags: Tensor[bool_, M], out: Tensor[bf16, M]):
        for m in tiles(M):
            out[m] = x[m] * where(flags[m], 2, 0.5)

    x, flags, out = np.ones(2, BF16), np.array([True, False]), np.zeros(2, BF16)
    eager.run(f, [x, flags, out])
    np.testing.assert_array_equal(out.astype(np.float32), [2.0, 0.5])


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="takes 3 arguments; 4 were given"):
        eager.run(matmul, [1, 2, 3, 4])
    with pytest.raises(TypeError, match="'c' is missing"):
        eager.run(matmul, [np.zeros((1, 1), BF16), np.zeros((1, 1), BF16)])
    with pytest.raises(ValueError, match=r"dimension 0 of b is 3; expected K = 2"):
        eager.run(matmul, [np.zeros((1, 2), BF16), np.zeros((3, 1), BF16), np.zeros((1, 1), np.float32)])


def test_axes_of_two_calls_of_one_function_are_different():
    def row(x, at):
        n = whole(N)
        return x[at, n]

    running = eager.Context({"M": 2, "N": 3})
    view = eager.TensorView(X, X_.type, "x")
    with context.use(running):
        copy = eager.Overlay().of(row)
        a, b = copy(view, 0), copy(view, 1)
    assert (a.axes, b.axes) == (("n",), ("n_1",))
    assert (a * b).array.shape == (3, 3)
