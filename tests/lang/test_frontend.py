"""The front end at its own station: what tile IR a source gives, and that it means what its Python means."""

from __future__ import annotations

import math
import textwrap
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sapper as sp
from sapper import (
    Tensor,
    argmax,
    bf16,
    each,
    erf,
    exp,
    f16,
    f32,
    full,
    i8,
    i32,
    kernel,
    max,
    maximum,
    min,
    rsqrt,
    span,
    sum,
    tiles,
    u8,
    where,
    whole,
    zeros,
)
from sapper.ir.nodes import Function, Op
from sapper.ir.text import parse_function, print_function
from sapper.ir.verifier import verify
from sapper.lang.errors import KernelError
from sapper.tile import eager
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS

M, N, K, B, T, D, H, V, S, HALF, HEADS, GROUPS = sp.dims("M N K B T D H V S HALF HEADS GROUPS")

RANDOM = np.random.default_rng(7)


def floats(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(dtype)


def verified(k: sp.Kernel, static: dict[str, int] | None = None) -> Function:
    """The tile IR, after the verifier and a round trip through text."""
    function = k.tile_ir(static)
    verify(function, TILE_OPS)
    text = print_function(function)
    assert print_function(parse_function(text, {"tile": TILE_OPS})) == text
    return function


def text_of(k: sp.Kernel, static: dict[str, int] | None = None) -> str:
    return print_function(verified(k, static))


def ops(function: Function, name: str) -> list[Op]:
    return [op for op in function.walk() if op.name == name]


def check_meaning(k: sp.Kernel, *arguments: Any, rtol: float = 1e-5) -> list[Any]:
    """Tile IR under the interpreter, with whole tiles and with tiles of 3, agrees with the kernel's own Python run.
    Returns the arguments after the run."""
    function = verified(k)
    names = [name for name, _ in k.parameters]
    results = []
    for mode in ("whole", "tiles", "eager"):
        copies = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
        if mode == "eager":
            eager.run(k, copies)
        else:
            interpret(function, dict(zip(names, copies, strict=True)), 3 if mode == "tiles" else None, check_races=True)
        results.append(copies)
    for copies in results[1:]:
        for first, other in zip(results[0], copies, strict=True):
            if isinstance(first, np.ndarray):
                np.testing.assert_allclose(other.astype(np.float64), first.astype(np.float64), rtol=rtol, atol=1e-5)
    return results[0]


# Whole kernels.


@kernel
def matmul(a: Tensor[bf16, M, K], b: Tensor[bf16, K, N], c: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for k in tiles(K):
            acc += a[m, k] @ b[k, n]
        c[m, n] = acc


def test_matmul_text():
    head, _, body = text_of(matmul).partition("{dims")
    assert head == "tile func @matmul(%a: tensor<bf16, M, K>, %b: tensor<bf16, K, N>, %c: tensor<f32, M, N>) "
    assert "{dims" + body == textwrap.dedent("""\
        {dims = ["M", "K", "N"]} {
          %1: index = const {value = 0}
          %M: index = dim {name = "M"}
          %N: index = dim {name = "N"}
          %2: f32 = const {value = 0.0}
          %K: index = dim {name = "K"}
          tiles %1, %M, %1, %N {axes = ["m", "n"], parallel = true} {
            %3: index[m] = index {axis = "m"}
            %4: index[n] = index {axis = "n"}
            %acc: f32[m, n] = full %2
            %acc_1: f32[m, n] = tiles %1, %K, %acc {axes = ["k"], parallel = false} (%acc_2: f32[m, n]) {
              %5: index[k] = index {axis = "k"}
              %6: bf16[m, k] = load %a, %3, %5
              %7: bf16[k, n] = load %b, %5, %4
              %8: f32[m, n] = contract %6, %7 {over = ["k"]}
              %acc_3: f32[m, n] = add %acc_2, %8
              yield %acc_3
            }
            store %c, %acc_1, %3, %4
            yield
          }
        }
        """)


def test_matmul_meaning():
    a, b = floats(5, 7, dtype=ml_dtypes.bfloat16), floats(7, 6, dtype=ml_dtypes.bfloat16)
    c = check_meaning(matmul, a, b, np.zeros((5, 6), np.float32))[2]
    np.testing.assert_allclose(c, a.astype(np.float32) @ b.astype(np.float32), rtol=1e-5, atol=1e-5)


def test_locations():
    add = next(op for op in ops(matmul.tile_ir(), "add"))
    assert add.location is not None and add.location.file == __file__
    with open(__file__) as file:
        line = file.read().splitlines()[add.location.line - 1]
    assert line[add.location.column - 1 : add.location.end_column - 1] == "acc += a[m, k] @ b[k, n]"


def test_same_source_same_text():
    assert text_of(matmul) == text_of(matmul)


@kernel
def softmax(a: Tensor[f32, M, N], out: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        x = a[m, n]
        e = exp(x - max(x, over=n))
        out[m, n] = e / sum(e, over=n)


def test_softmax():
    a = floats(5, 7)
    e = np.exp(a - a.max(1, keepdims=True))
    out = check_meaning(softmax, a, np.zeros_like(a))[1]
    np.testing.assert_allclose(out, e / e.sum(1, keepdims=True), rtol=1e-5)


@kernel
def attention(
    q: Tensor[f32, T, HEADS, D],
    k: Tensor[f32, S, GROUPS, D],
    v: Tensor[f32, S, GROUPS, D],
    out: Tensor[f32, T, HEADS, D],
    offset: i32,
    scale: f32,
):
    group = HEADS // GROUPS
    for h in each(HEADS):
        g = h // group
        for t in tiles(T):
            d = whole(D)
            top = full(t, value=-math.inf, dtype=f32)
            total = zeros(t, dtype=f32)
            acc = zeros(t, d, dtype=f32)
            for s in tiles(span(0, offset + T)):
                scores = (q[t, h, d] @ k[s, g, d]) * scale
                scores = where(s <= t + offset, scores, float("-inf"))
                new = maximum(top, max(scores, over=s))
                p = exp(scores - new)
                fix = exp(top - new)
                total = total * fix + sum(p, over=s)
                acc = acc * fix + p @ v[s, g, d]
                top = new
            out[t, h, d] = acc / total


def test_attention():
    q, k, v = floats(3, 4, 8), floats(9, 2, 8), floats(9, 2, 8)
    out = check_meaning(attention, q, k, v, np.zeros((3, 4, 8), np.float32), 6, 0.3)[3]
    for h in range(4):
        scores = q[:, h] @ k[:, h // 2].T * 0.3
        scores[np.arange(9)[None, :] > np.arange(3)[:, None] + 6] = -np.inf
        p = np.exp(scores - scores.max(1, keepdims=True))
        np.testing.assert_allclose(out[:, h], p / p.sum(1, keepdims=True) @ v[:, h // 2], rtol=1e-4, atol=1e-5)
    loops = {tuple(op.attributes.get("axes", ["h"])): op.attributes["parallel"] for op in attention.tile_ir().walk()
             if op.name in ("tiles", "each")}
    assert loops == {("h",): True, ("t",): True, ("s",): False}


@kernel
def embedding(tokens: Tensor[i32, T], table: Tensor[bf16, V, D], out: Tensor[f32, T, D]):
    for t, d in tiles(T, D):
        out[t, d] = table[tokens[t], d].to(f32)


def test_embedding():
    tokens = np.array([3, 1, 3], np.int32)
    table = floats(5, 4, dtype=ml_dtypes.bfloat16)
    out = check_meaning(embedding, tokens, table, np.zeros((3, 4), np.float32))[2]
    assert (out == table[tokens].astype(np.float32)).all()


@kernel
def rope(
    x: Tensor[f32, T, H, D], cos: Tensor[f32, T, HALF], sin: Tensor[f32, T, HALF], out: Tensor[f32, T, H, D]
):
    for t, h, i in tiles(T, H, HALF):
        a = x[t, h, 2 * i]
        b = x[t, h, 2 * i + 1]
        out[t, h, 2 * i] = a * cos[t, i] - b * sin[t, i]
        out[t, h, 2 * i + 1] = a * sin[t, i] + b * cos[t, i]


def test_rope():
    function = verified(rope)
    (loop,) = ops(function, "tiles")
    assert loop.attributes == {"axes": ["t", "h", "i"], "parallel": True}
    assert function.attributes["requires"] == [["x", 2, 0, "HALF", 2], ["out", 2, 0, "HALF", 2]]
    x, cos, sin = floats(3, 2, 8), floats(3, 4), floats(3, 4)
    out = check_meaning(rope, x, cos, sin, np.zeros_like(x))[3]
    np.testing.assert_allclose(out[:, :, 0::2], x[:, :, 0::2] * cos[:, None] - x[:, :, 1::2] * sin[:, None], rtol=1e-4,
                               atol=1e-5)


@kernel
def layer_norm(
    x: Tensor[f32, M, N], weight: Tensor[f32, N], bias: Tensor[f32, N], out: Tensor[f32, M, N], epsilon: f32 = 1e-5
):
    for m in tiles(M):
        n = whole(N)
        t = x[m, n]
        centred = t - sum(t, over=n) / N.to(f32)
        variance = sum(centred**2, over=n) / N.to(f32)
        out[m, n] = centred * rsqrt(variance + epsilon) * weight[n] + bias[n]


def test_layer_norm():
    x, weight, bias = floats(3, 8), floats(8), floats(8)
    out = check_meaning(layer_norm, x, weight, bias, np.zeros_like(x), 1e-5)[3]
    expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * weight + bias
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    assert layer_norm.defaults == {"epsilon": 1e-5}


def gelu_of(x):
    return 0.5 * x * (1.0 + erf(x / math.sqrt(2)))


@kernel
def gelu(x: Tensor[f32, M, N], out: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        out[m, n] = gelu_of(x[m, n])


def test_gelu():
    x = floats(4, 5)
    out = check_meaning(gelu, x, np.zeros_like(x))[1]
    expected = np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))(x)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-6)


@kernel
def top_k(x: Tensor[f32, M], values: Tensor[f32, 4], places: Tensor[i32, 4]):
    n = whole(M)
    left = x[n]
    for i in range(4):
        best = argmax(left, over=n)
        values[i] = max(left, over=n)
        places[i] = best.to(i32)
        left = where(n == best, -math.inf, left)


def test_top_k():
    x = floats(20)
    _, values, places = check_meaning(top_k, x, np.zeros(4, np.float32), np.zeros(4, np.int32))
    assert list(places) == list(np.argsort(-x)[:4])
    assert list(values) == list(np.sort(x)[::-1][:4])


# Functions, closures, constants.


def scaled(x, factor=2.0, *, shift=0.0):
    y = x * factor
    return y + shift


def both(x, axis):
    return max(x, over=axis), min(x, over=axis)


def make_affine(slope, offset):
    def affine(x):
        return x * slope + offset

    return affine


class Settings:
    width = 3


def test_inlining():
    three = make_affine(3.0, 1.0)
    halves = (0.5, 0.25)
    settings = Settings()

    @kernel
    def k(a: Tensor[f32, M, N], out: Tensor[f32, M, N]):
        def twice(x):
            return x + x

        for m in tiles(M):
            n = whole(N)
            y = a[m, n]
            high, low = both(y, n)
            square = lambda t: t * t  # noqa: E731
            total = twice(scaled(y, shift=1.5)) + three(y) + square(y)
            for half in halves:
                total += half
            out[m, n] = total * (high - low) + settings.width

    a = floats(4, 5)
    out = check_meaning(k, a, np.zeros_like(a))[1]
    total = 2 * (2 * a + 1.5) + 3 * a + 1 + a * a + 0.75
    np.testing.assert_allclose(out, total * (a.max(1) - a.min(1))[:, None] + 3, rtol=1e-4, atol=1e-5)


def test_lambdas_of_one_line_and_in_lists_of_several():
    negated, doubled = lambda t: -t, lambda t: t * 2.0
    others = {"more": lambda t: t + 1.0, "less": lambda t: t - 1.0,
              "long": (lambda t:
                       t * 3.0), "within": lambda t: (lambda s: s * s)(t)}

    def make(of):
        @kernel
        def k(a: Tensor[f32, M], out: Tensor[f32, M]):
            for m in tiles(M):
                out[m] = of(a[m])

        return k

    a = floats(5)
    for of in (negated, doubled, *others.values()):
        np.testing.assert_array_equal(check_meaning(make(of), a, np.zeros_like(a))[1], of(a))


def test_kernel_called_by_a_kernel_is_inlined():
    @kernel
    def k(a: Tensor[f32, M, N], out: Tensor[f32, M, N]):
        softmax(a, out)

    a = floats(3, 4)
    np.testing.assert_allclose(check_meaning(k, a, np.zeros_like(a))[1].sum(1), 1, rtol=1e-5)


def test_locals_of_functions_are_their_own():
    def overwrite(x):
        y = x + 1.0
        return y

    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            y = a[m]
            z = overwrite(y)
            out[m] = y - z

    assert (check_meaning(k, floats(5), np.zeros(5, np.float32))[1] <= -0.9).all()


def test_constants_choose_branches():
    def build(causal):
        @kernel
        def k(a: Tensor[f32, M], out: Tensor[f32, M]):
            for m in tiles(M):
                if causal:
                    out[m] = where(m < 2, a[m], 0.0)
                else:
                    out[m] = a[m]

        return k

    assert len(ops(verified(build(True)), "select")) == 1
    assert not ops(verified(build(False)), "select")


def test_python_names_mean_sappers():
    world: dict[str, Any] = {"Tensor": Tensor, "f32": f32, "M": M, "N": N, "tiles": tiles, "whole": whole,
                             "kernel": kernel}
    import linecache

    source = textwrap.dedent("""\
        @kernel
        def k(a: Tensor[f32, M, N], out: Tensor[f32, M]):
            for m in tiles(M):
                n = whole(N)
                x = a[m, n]
                acc = sum(abs(x), over=n) + max(x, over=n) - min(x, over=n)
                for i in range(3):
                    acc = max(acc, round(acc)) + float(i)
                out[m] = acc
        """)
    file = "<python-names>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    exec(compile(source, file, "exec"), world)
    a = floats(3, 4)
    function = verified(world["k"])
    out = np.zeros(3, np.float32)
    interpret(function, {"a": a, "out": out})
    acc = np.abs(a).sum(1) + a.max(1) - a.min(1)
    for i in range(3):
        acc = np.maximum(acc, np.round(acc)) + i
    np.testing.assert_allclose(out, acc, rtol=1e-5)


# Control.


def test_weak_numbers_take_the_dtype_of_the_loop():
    @kernel
    def k(x: Tensor[i32, M], y: Tensor[f32, M], out: Tensor[i32, 1], peak: Tensor[f32, 1]):
        total = 0
        best = 0
        for i in range(M):
            total += x[i]
            best = maximum(best, y[i])
        out[0] = total
        peak[0] = best

    x, y = np.arange(6, dtype=np.int32), floats(6)
    _, _, out, peak = check_meaning(k, x, y, np.zeros(1, np.int32), np.zeros(1, np.float32))
    assert out[0] == 15 and peak[0] == np.maximum(y.max(), 0)
    (loop,) = ops(verified(k), "each")
    assert [str(r.type) for r in loop.results] == ["i32", "f32"]


def test_weak_number_becomes_an_index():
    @kernel
    def k(lengths: Tensor[i32, B], out: Tensor[i32, B]):
        position = 0
        for b in range(B):
            position = position + lengths[b] + b
            out[b] = position.to(i32)

    lengths = np.array([3, 0, 2], np.int32)
    assert list(check_meaning(k, lengths, np.zeros(3, np.int32))[1]) == [3, 4, 8]


def test_if_merges_and_short_circuits():
    @kernel
    def k(x: Tensor[i32, M], limit: i32, out: Tensor[i32, M]):
        for i in each(M):
            value = x[i]
            if value > limit and x[value] != 0:
                label = 1
                value = value * 2
            elif value < 0 or value == limit:
                label = 2
            else:
                label = 3
            out[i] = value * 10 + label + (5 if not (value < 1) else 0)

    x = np.array([0, 1, 2, 3, 4], np.int32)
    out = check_meaning(k, x, 2, np.zeros(5, np.int32))[2]
    assert list(out) == [3, 18, 27, 66, 86]
    function = verified(k)
    assert len(ops(function, "if")) == 3  # the two of the statement, and the guarded load of `and`
    assert ops(function, "or") and ops(function, "select")


def test_guarded_load_is_not_out_of_bounds():
    @kernel
    def k(x: Tensor[f32, M], out: Tensor[f32, M]):
        for i in each(M):
            out[i] = x[i - 1] if i > 0 else 0.0

    x = floats(4)
    assert list(check_meaning(k, x, np.zeros(4, np.float32))[1]) == [0, *x[:3]]
    assert len(ops(verified(k), "if")) == 1


def test_name_bound_before_but_assigned_first_is_not_carried():
    @kernel
    def k(a: Tensor[f32, M], out: Tensor[f32, M]):
        x = 0.0
        for m in tiles(M):
            x = a[m]
            out[m] = x
        for m in tiles(M):
            x = a[m] * 2.0
            out[m] += x

    first, second = ops(verified(k), "tiles")
    assert first.attributes["parallel"] and second.attributes["parallel"]
    assert first.attributes["axes"] == ["m"] and second.attributes["axes"] == ["m_1"]
    assert not first.results


def test_range_with_step():
    @kernel
    def k(out: Tensor[i32, 10]):
        for i in range(1, 10, 4):
            out[i] = i.to(i32)

    assert list(check_meaning(k, np.zeros(10, np.int32))[0]) == [0, 1, 0, 0, 0, 5, 0, 0, 0, 9]
    assert ops(verified(k), "each")[0].attributes == {"count": 1, "parallel": False, "step": 4}


def test_range_downwards():
    @kernel
    def k(x: Tensor[f32, M, N], y: Tensor[f32, M, N], first: Tensor[i32, 3]):
        for m in each(M):
            s = zeros(dtype=f32)
            for n in range(N - 1, -1, -1):
                s = s * 0.5 + x[m, n]
                y[m, n] = s
            for n in range(N - 1, m, -3):
                y[m, n] += 100.0
            for n in range(2, 7, -1):
                y[m, n] = -1.0
        odd = [n + 0 for n in range(7, 1, -2)]
        for i in (0, 1, 2):
            first[i] = odd[i]

    x = floats(4, 7)
    y, first = check_meaning(k, x, np.zeros_like(x), np.zeros(3, np.int32))[1:]
    expected = np.zeros_like(x)
    s = np.zeros(4, np.float32)
    for n in range(6, -1, -1):
        s = s * np.float32(0.5) + x[:, n]
        expected[:, n] = s
    for m in range(4):
        for n in range(6, m, -3):
            expected[m, n] += 100
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    assert list(first) == [7, 5, 3]


def test_step_does_not_reach_the_end():
    @kernel
    def k(out: Tensor[i32, 11]):
        for i in range(0, 10, 4):
            out[i + 2] = 1

    assert list(check_meaning(k, np.zeros(11, np.int32))[0]) == [0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1]


def test_carried_axes_in_another_order():
    @kernel
    def k(a: Tensor[f32, M], b: Tensor[f32, N], out: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=f32)
            for _ in range(2):
                acc = b[n] + a[m] + acc
            out[m, n] = acc

    a, b = floats(3), floats(4)
    out = check_meaning(k, a, b, np.zeros((3, 4), np.float32))[2]
    np.testing.assert_allclose(out, 2 * (a[:, None] + b), rtol=1e-5, atol=1e-6)


# Dtypes.


def test_index_mixes_with_integers():
    @kernel
    def k(n: i32, out: Tensor[i32, M]):
        for m in tiles(M):
            out[m] = (m + n).to(i32)

    assert list(check_meaning(k, 5, np.zeros(3, np.int32))[1]) == [5, 6, 7]


def test_contract_dtypes():
    def result(left, right):
        @kernel
        def k(a: Tensor[left, M, K], b: Tensor[right, K], out: Tensor[f32, M]):
            for m in tiles(M):
                j = whole(K)
                out[m] = (a[m, j] @ b[j]).to(f32)

        (op,) = ops(verified(k), "contract")
        return op.result.type.dtype

    assert result(bf16, f32) == f32 and result(f16, f16) == f32 and result(f32, f32) == f32
    assert result(u8, i8) == i32 and result(sp.f64, sp.f64) == sp.f64


def test_unpacking_bits():
    @kernel
    def k(packed: Tensor[u8, M], out: Tensor[f32, M, 2]):
        for m in tiles(M):
            byte = packed[m]
            out[m, 0] = (byte & 15).to(f32) - 8.0
            out[m, 1] = (byte >> 4).to(f32) - 8.0

    packed = np.array([0, 255, 0x5A], np.uint8)
    out = check_meaning(k, packed, np.zeros((3, 2), np.float32))[1]
    assert out.tolist() == [[-8, -8], [7, 7], [2, -3]]
    assert ops(verified(k), "tiles")[0].attributes["parallel"]


def test_bits():
    @kernel
    def k(x: Tensor[bf16, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = (x[m].bits(sp.i16).to(i32) << 16).bits(f32)

    x = floats(5, dtype=ml_dtypes.bfloat16)
    assert (check_meaning(k, x, np.zeros(5, np.float32))[1] == x.astype(np.float32)).all()


def test_powers():
    @kernel
    def k(x: Tensor[f32, M], out: Tensor[f32, M]):
        for m in tiles(M):
            out[m] = x[m] ** 5 + x[m] ** 0 + x[m] ** -2 + 2**3

    x = np.array([1.0, 2.0, -0.5], np.float32)
    assert check_meaning(k, x, np.zeros(3, np.float32))[1].tolist() == [11, 41.25, 12.96875]


# Dimensions.


def test_static_dimensions():
    text = text_of(matmul, {"K": 8, "N": 4})
    assert "%a: tensor<bf16, M, 8>" in text and 'dim {name = "K"}' not in text and '{dims = ["M"]}' in text
    assert "const {value = 8}" in text


def test_static_dimensions_fold():
    @kernel
    def k(a: Tensor[f32, M, N], out: Tensor[f32, M]):
        half = N // 2
        for m in tiles(M):
            if N > 4:
                n = whole(span(half, N))
                out[m] = sum(a[m, n], over=n)
            else:
                n = whole(N)
                out[m] = max(a[m, n], over=n)

    assert len(ops(verified(k), "if")) == 1
    fixed = verified(k, {"N": 8})
    assert not ops(fixed, "if") and not ops(fixed, "floordiv")
    check_meaning(k, floats(3, 8), np.zeros(3, np.float32))
    check_meaning(k, floats(3, 4), np.zeros(3, np.float32))


def test_fixing_a_dimension_does_not_change_types():
    @kernel
    def k(a: Tensor[f32, M, N], out: Tensor[f32, M]):
        for m in tiles(M):
            n = whole(N)
            out[m] = sum(a[m, n], over=n) / N

    for static in ({}, {"N": 8}):
        with pytest.raises(KernelError) as caught:
            k.tile_ir(static)
        assert caught.value.kind == "dtype-mix" and caught.value.mend == "write N.to(f32)"


@pytest.mark.parametrize("static", [{}, {"N": 1}, {"N": 8}, {"N": 8, "M": 24}])
def test_parts_of_rows_are_apart_whether_their_length_is_fixed_or_not(static: dict[str, int]):
    @kernel
    def k(a: Tensor[f32, N], out: Tensor[f32, M]):
        for n in tiles(N):
            out[n + 0] = a[n]
            out[n + N] = -a[n]
            out[n + 2 * N] = a[n]

    verified(k, static)


def test_closed_over_dimension_expression():
    middle = N // 2

    @kernel
    def k(a: Tensor[f32, N], out: Tensor[f32, 1]):
        out[0] = a[middle]

    a = floats(5)
    assert check_meaning(k, a, np.zeros(1, np.float32))[1][0] == a[2]


def test_shape_and_static_extents():
    @kernel
    def k(a: Tensor[f32, M, 4], out: Tensor[f32, M]):
        rows, columns = a.shape
        for m in tiles(rows):
            n = whole(columns)
            out[m] = sum(a[m, n].to(out.dtype), over=n)

    a = floats(3, 4)
    np.testing.assert_allclose(check_meaning(k, a, np.zeros(3, np.float32))[1], a.sum(1), rtol=1e-5)


# Writes: parallel, ordered.


def loop_attributes(k: sp.Kernel) -> list[dict[str, Any]]:
    return [{x: op.attributes.get(x, False) for x in ("parallel", "ordered")} for op in verified(k).walk()
            if op.name in ("tiles", "each")]


PARALLEL, ORDERED, SEQUENTIAL = ({"parallel": p, "ordered": o} for p,
                                 o in ((True, False), (False, True), (False, False)))


def test_in_place_is_parallel():
    @kernel
    def k(a: Tensor[f32, M, N]):
        for m in tiles(M):
            n = whole(N)
            a[m, n] = a[m, n] / sum(a[m, n], over=n)

    assert loop_attributes(k) == [PARALLEL]


def test_scatter_is_ordered():
    @kernel
    def k(a: Tensor[f32, M], places: Tensor[i32, M], out: Tensor[f32, N]):
        for m in tiles(M):
            out[places[m]] = a[m]

    assert loop_attributes(k) == [ORDERED]
    out = check_meaning(k, floats(4), np.array([2, 0, 2, 1], np.int32), np.zeros(3, np.float32))
    assert out[2][2] == out[0][2]


def test_halves_of_a_row_are_apart():
    @kernel
    def k(x: Tensor[f32, M, N], angle: Tensor[f32, M]):
        half = N // 2
        for m, i in tiles(M, half):
            c, s = sp.cos(angle[m]), sp.sin(angle[m])
            a, b = x[m, i + 0], x[m, i + half]
            x[m, i + 0] = a * c - b * s
            x[m, i + half] = a * s + b * c

    assert loop_attributes(k) == [PARALLEL]
    x, angle = floats(3, 8), floats(3)
    a, b, c, s = x[:, :4], x[:, 4:], np.cos(angle)[:, None], np.sin(angle)[:, None]
    turned = np.concatenate([a * c - b * s, a * s + b * c], axis=1)
    np.testing.assert_allclose(check_meaning(k, x.copy(), angle)[0], turned, rtol=1e-5, atol=1e-6)


def test_thirds_of_a_row_and_both_ends_are_apart():
    @kernel
    def k(x: Tensor[i32, M], y: Tensor[i32, M], z: Tensor[i32, 64]):
        third = M // 3
        for i in tiles(third):
            y[i + 0] = x[i + third * 2]
            y[i + third * 2] = x[i + 0]
        for i in tiles(32):
            a = z[i + 0]
            z[i + 0] = z[63 - i]
            z[63 - i] = a

    assert loop_attributes(k) == [PARALLEL, PARALLEL]
    x = np.arange(7, dtype=np.int32)
    found = check_meaning(k, x, np.zeros(7, np.int32), np.arange(64, dtype=np.int32))
    assert found[1].tolist() == [4, 5, 0, 0, 0, 1, 0] and found[2].tolist() == list(range(63, -1, -1))


def test_gathered_rows_are_not_apart_for_a_constant():
    """Where `places` differs in two iterations, so may what one adds to it."""
    @kernel
    def k(a: Tensor[f32, M], places: Tensor[i32, M], out: Tensor[f32, N]):
        for m in each(M):
            out[places[m]] = a[m]
            out[places[m] + 1] = a[m]

    assert loop_attributes(k) == [ORDERED]


def test_split_axes_are_digits():
    @kernel
    def k(a: Tensor[f32, 6, 4], out: Tensor[f32, 24]):
        for h in each(6):
            for d in tiles(4):
                out[h * 4 + d] = a[h, d]

    assert loop_attributes(k) == [PARALLEL, PARALLEL]

    @kernel
    def overlapping(a: Tensor[f32, 6, 4], out: Tensor[f32, 24]):
        for h in each(6):
            for d in tiles(4):
                out[h * 3 + d] = a[h, d]

    assert loop_attributes(overlapping) == [ORDERED, PARALLEL]


def test_digits_make_out_what_they_are_of():
    """Where `x // 4` and `x % 4` are the same, x is."""
    @kernel
    def blocks(a: Tensor[f32, M, N], out: Tensor[f32, D, K, 4, 3]):
        for m, n in tiles(M, N):
            out[m // 4, n // 3, m % 4, n % 3] = a[m, n]

    @kernel
    def four_digits(a: Tensor[f32, M], out: Tensor[f32, D, 2, 2, 4]):
        for m in tiles(M):
            out[m // 16, m // 8 % 2, m % 2, m % 8 // 2] = a[m]

    @kernel
    def of_a_dimension(a: Tensor[f32, M, N], out: Tensor[f32, D, K, N]):
        for m, n in tiles(M, N):
            out[m // K, m % K, n] = a[m, n]
            out[m // K, m % K, n] = a[m, n] + out[m // K, m % K, n]

    @kernel
    def of_a_sum(a: Tensor[f32, M, N], out: Tensor[f32, D, 4]):
        for m in each(M):
            for n in tiles(3):
                out[(3 * m + n) // 4, (3 * m + n) % 4] = a[m, n + 0]

    @kernel
    def one_lost(a: Tensor[f32, M], out: Tensor[f32, D, 2, 4]):
        for m in each(M):
            out[m // 16, m // 8 % 2, m % 4] = a[m]

    @kernel
    def bases_apart(a: Tensor[f32, M], out: Tensor[f32, D, 4]):
        for m in each(M):
            out[m // 8, m % 4] = a[m]

    @kernel
    def rests_of_others(a: Tensor[f32, M], out: Tensor[f32, D, 3, 4]):
        for m in each(M):
            out[m // 8, m % 8 // 3, m % 3] = a[m]

    assert loop_attributes(blocks) == loop_attributes(four_digits) == loop_attributes(of_a_dimension) == [PARALLEL]
    assert loop_attributes(of_a_sum) == [PARALLEL, PARALLEL]
    assert loop_attributes(one_lost) == loop_attributes(bases_apart) == loop_attributes(rests_of_others) == [ORDERED]
    a = floats(10, 7)
    padded = np.zeros((12, 9), np.float32)
    padded[:10, :7] = a
    found = check_meaning(blocks, a, np.zeros((3, 3, 4, 3), np.float32))[1]
    np.testing.assert_array_equal(found, padded.reshape(3, 4, 3, 3).transpose(0, 2, 1, 3))
    a = floats(32)
    found = check_meaning(four_digits, a, np.zeros((2, 2, 2, 4), np.float32))[1]
    np.testing.assert_array_equal(found, a.reshape(2, 2, 4, 2).transpose(0, 1, 3, 2))


def test_digits_in_one_index():
    """What rests and shorter axes reach is known, and so that parts of a row are apart."""
    @kernel
    def butterflies(a: Tensor[f32, M, 16], out: Tensor[f32, M, 32]):
        for m, n in tiles(M, 16):
            out[m, 8 * (n // 4) + n % 4] = a[m, n]
            out[m, 8 * (n // 4) + n % 4 + 4] = -a[m, n]

    @kernel
    def halves(a: Tensor[f32, M, 16], out: Tensor[f32, N]):
        for m, n in tiles(M, 16):
            out[32 * m + n] = a[m, n]
            out[32 * m + n + 16] = -a[m, n]

    @kernel
    def by_dimensions(a: Tensor[f32, M, N], out: Tensor[f32, M, K]):
        for m, d, n in tiles(M, K // N // 2, N):
            out[m, 2 * N * d + n] = a[m, n]
            out[m, 2 * N * d + n + N] = -a[m, n]

    @kernel
    def too_near(a: Tensor[f32, M, 16], out: Tensor[f32, M, 32]):
        for m, n in tiles(M, 16):
            out[m, 8 * (n // 4) + n % 4] = a[m, n]
            out[m, 8 * (n // 4) + n % 4 + 3] = -a[m, n]

    @kernel
    def too_long(a: Tensor[f32, M, N], out: Tensor[f32, M, K]):
        for m, d, n in tiles(M, K // N, N):
            out[m, N * d + n] = a[m, n]
            out[m, N * d + n + N] = -a[m, n]

    assert loop_attributes(butterflies) == loop_attributes(halves) == loop_attributes(by_dimensions) == [PARALLEL]
    for kernel_ in (too_near, too_long):
        with pytest.raises(KernelError, match="two stores to out may meet"):
            kernel_.tile_ir()
    a = floats(3, 16)
    found = check_meaning(butterflies, a, np.zeros((3, 32), np.float32))[1]
    expected = np.stack([a.reshape(3, 4, 4), -a.reshape(3, 4, 4)], axis=2).reshape(3, 32)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(check_meaning(halves, a, np.zeros(96, np.float32))[1],
                                  np.concatenate([a, -a], 1).reshape(-1))


def test_rows_that_are_turned():
    """A rest names an element once where what it is of walks no more than the divisor."""
    @kernel
    def turned(a: Tensor[f32, M, N], by: Tensor[i32, M], out: Tensor[f32, M, N]):
        for m in each(M):
            n = whole(N)
            out[m, (n + by[m]) % N] = a[m, n]

    @kernel
    def another_extent(a: Tensor[f32, M, N], by: Tensor[i32, M], out: Tensor[f32, M, K]):
        for m in each(M):
            n = whole(N)
            out[m, (n + by[m]) % K] = a[m, n]

    @kernel
    def by_each(a: Tensor[f32, M, N], by: Tensor[i32, N], out: Tensor[f32, M, N]):
        for m in each(M):
            n = whole(N)
            out[m, (n + by[n]) % N] = a[m, n]

    assert loop_attributes(turned) == [PARALLEL]
    for kernel_ in (another_extent, by_each):
        with pytest.raises(KernelError, match="may write an element of out twice"):
            kernel_.tile_ir()
    a, by = floats(3, 7), np.array([2, -5, 70], np.int32)
    found = check_meaning(turned, a, by, np.zeros((3, 7), np.float32))[2]
    np.testing.assert_array_equal(found, np.stack([np.roll(row, step) for row, step in zip(a, by, strict=True)]))


def test_tuples_of_conditional_expressions():
    def both(a, b):
        return a + b, a - b

    @kernel
    def k(a: Tensor[f32, 2, M], flag: sp.bool_, place: Tensor[i32, M], out: Tensor[f32, 2, M]):
        for m in tiles(M):
            first, second = both(a[0, m], a[1, m]) if flag else (a[1, m], a[0, m])
            low, high = (a[0, place[m]], 1.0) if flag else (2.0, a[1, place[m]])
            out[0, m] = first * low
            out[1, m] = second * high

    a, place = floats(2, 5), np.array([4, 3, 0, 1, 2], np.int32)
    found = check_meaning(k, a, True, place, np.zeros((2, 5), np.float32))[3]
    np.testing.assert_array_equal(found, [(a[0] + a[1]) * a[0, place], a[0] - a[1]])
    found = check_meaning(k, a, False, place, np.zeros((2, 5), np.float32))[3]
    np.testing.assert_array_equal(found, [a[1] * 2, a[0] * a[1, place]])

    @kernel
    def uneven(a: Tensor[f32, 2, M], flag: sp.bool_, out: Tensor[f32, M]):
        for m in tiles(M):
            found = (a[0, m], a[1, m]) if flag else a[0, m]
            out[m] = found

    with pytest.raises(KernelError, match=r"a tuple of 2 and one value(.|\n)*give both sides the same number"):
        uneven.tile_ir()


def test_steps_in_turns():
    """What was before, and what comes after, in two or three buffers."""
    @kernel
    def two(u: Tensor[f32, 2, M], steps: i32):
        for s in range(steps):
            now = s % 2
            for m in tiles(span(1, M - 1)):
                u[1 - now, m] = u[now, m - 1] + u[now, m + 1] - u[1 - now, m]

    @kernel
    def three(u: Tensor[f32, 3, M], steps: i32):
        for s in range(steps):
            for m in tiles(M):
                u[(s + 2) % 3, m] = u[(s + 1) % 3, m] - u[s % 3, sp.minimum(m + 1, M - 1)]

    @kernel
    def same(u: Tensor[f32, 3, M], steps: i32):
        for s in range(steps):
            for m in tiles(M):
                u[(s + 3) % 3, m] = u[s % 3, sp.minimum(m + 1, M - 1)]

    @kernel
    def by_memory(u: Tensor[f32, 3, M], at: Tensor[i32, M]):
        for m in tiles(M):
            u[(at[m] + 1) % 3, m] = u[at[m] % 3, sp.minimum(m + 1, M - 1)]

    assert loop_attributes(two) == loop_attributes(three) == [SEQUENTIAL, PARALLEL]
    for kernel_ in (same, by_memory):
        with pytest.raises(KernelError, match="u is read and written"):
            kernel_.tile_ir()
    u = floats(2, 7)
    expected = u.copy()
    for s in range(3):
        now = s % 2
        expected[1 - now, 1:-1] = expected[now, :-2] + expected[now, 2:] - expected[1 - now, 1:-1]
    np.testing.assert_array_equal(check_meaning(two, u, 3)[0], expected)


def test_strides_that_are_dimensions_are_the_base_of_digits():
    R, ROWS = N // M, (N + K - 1) // K

    @kernel
    def heads_of_groups(a: Tensor[f32, K, N], b: Tensor[f32, M], out: Tensor[f32, K, N]):
        for k, m in each(K, M):
            for r in tiles(R):
                out[k, m * (N // M) + r] = a[k, m * R + r]

    @kernel
    def three(a: Tensor[f32, M, N, K], out: Tensor[f32, D]):
        for m, n, k in tiles(M, N, K):
            out[m * (K * N) + n * K + k] = a[m, n, k]

    @kernel
    def pairs(a: Tensor[f32, M, N], out: Tensor[f32, D]):
        for m, n in tiles(M, N // 2):
            out[m * N + 2 * n] = -a[m, 2 * n + 1]
            out[m * N + 2 * n + 1] = a[m, 2 * n]

    @kernel
    def chunks(a: Tensor[f32, N], b: Tensor[f32, K], out: Tensor[f32, N]):
        for p in each(ROWS):
            for n in tiles(span(p * K, sp.minimum(p * K + K, N))):
                out[n] = a[n]

    @kernel
    def one_too_long(a: Tensor[f32, M, N], out: Tensor[f32, K]):
        for m in each(M):
            for n in tiles(N + 1):
                out[m * N + n] = a[m, 0]

    @kernel
    def another_stride(a: Tensor[f32, M, N], out: Tensor[f32, K]):
        for m in each(M):
            for n in tiles(N):
                out[m * M + n] = a[m, n]

    @kernel
    def a_digit_more(a: Tensor[f32, M, N], out: Tensor[f32, K]):
        for m in each(M):
            for n in range(N):
                for d in range(3):
                    out[m * N + n + d % 4] = a[m, n]

    assert loop_attributes(heads_of_groups) == loop_attributes(chunks) == [PARALLEL, PARALLEL]
    assert loop_attributes(three) == loop_attributes(pairs) == [PARALLEL]
    assert loop_attributes(one_too_long) == loop_attributes(another_stride) == [ORDERED, PARALLEL]
    assert loop_attributes(a_digit_more)[0] == ORDERED      # nothing bounds d % 4, which differs between two rows
    a = floats(2, 6)
    np.testing.assert_array_equal(check_meaning(chunks, a[0], floats(4), np.zeros(6, np.float32))[2], a[0])
    np.testing.assert_array_equal(check_meaning(pairs, a, np.zeros(12, np.float32))[1].reshape(2, 3, 2)[..., 1],
                                  a[:, ::2])


def test_chunks_are_apart():
    """Also where the last one ends early, and whichever way they are numbered."""
    @kernel
    def k(x: Tensor[f32, M], out: Tensor[f32, M], turned: Tensor[f32, M]):
        for b in each((M + 7) // 8):
            m = whole(span(b * 8, min(b * 8 + 8, M)))
            out[m] = x[m] - max(x[m], over=m)
        for b in each((M + 7) // 8):
            for m in tiles(span(0, min(8, M - b * 8))):
                turned[b * 8 + m] = out[b * 8 + m]

    assert loop_attributes(k) == [PARALLEL, PARALLEL, PARALLEL]
    x = floats(21)
    top = np.repeat([part.max() for part in (x[:8], x[8:16], x[16:])], 8)[:21]
    found = check_meaning(k, x, np.zeros_like(x), np.zeros_like(x))
    np.testing.assert_array_equal(found[1], x - top)
    np.testing.assert_array_equal(found[2], x - top)

    @kernel
    def overlapping(x: Tensor[f32, M], out: Tensor[f32, M]):
        for b in each(M // 8):
            m = whole(span(b * 8, min(b * 8 + 9, M)))
            out[m] = x[m] - max(x[m], over=m)

    assert loop_attributes(overlapping) == [ORDERED]


def test_ragged_groups_are_ordered():
    @kernel
    def k(starts: Tensor[i32, B], x: Tensor[f32, M, D], out: Tensor[f32, M, D]):
        for b in each(B - 1):
            for m, d in tiles(span(starts[b], starts[b + 1]), D):
                out[m, d] = x[m, d] * 2.0

    assert loop_attributes(k) == [ORDERED, PARALLEL]
    x = floats(5, 4)
    out = check_meaning(k, np.array([0, 2, 2, 5], np.int32), x, np.zeros((5, 4), np.float32))[2]
    np.testing.assert_allclose(out, 2 * x)


def test_guarded_store_is_ordered():
    @kernel
    def k(x: Tensor[i32, M], out: Tensor[i32, 1]):
        for i in each(M):
            if x[i] > 0:
                out[0] = i.to(i32)

    assert loop_attributes(k) == [ORDERED]


def test_recurrence_in_each_is_ordered_and_range_is_sequential():
    @kernel
    def k(a: Tensor[f32, M]):
        for m in each(span(1, M)):
            a[m] = a[m - 1] + 1.0

    @kernel
    def again(a: Tensor[f32, M]):
        for m in range(1, M):
            a[m] = a[m - 1] + 1.0

    assert loop_attributes(k) == [ORDERED]
    assert loop_attributes(again) == [SEQUENTIAL]
    np.testing.assert_allclose(check_meaning(k, np.zeros(4, np.float32))[0], [0, 1, 2, 3])


def test_inner_loop_that_may_be_empty_proves_nothing():
    @kernel
    def k(x: Tensor[f32, M], out: Tensor[f32, M]):
        for i in each(M):
            total = 0.0
            for j in each(span(0, i)):
                total += x[i - 1] + x[i - j - 1]
            out[i] = total

    x = floats(4)
    out = check_meaning(k, x, np.zeros(4, np.float32))[1]
    np.testing.assert_allclose(out, [i * x[i - 1] + x[:i].sum() for i in range(4)], rtol=1e-5, atol=1e-6)


def test_conditions_and_empty_ranges_prove_nothing():
    @kernel
    def k(x: Tensor[f32, M, 4], out: Tensor[f32, M, 4]):
        for b in each(M):
            if b > 0:
                for i in tiles(span(0, 4)):
                    out[b, i] = x[b - 1, i]
                for i in tiles(span(b, 4)):
                    out[b, i - 1] = 0.0
            for i in tiles(span(4, 4)):
                out[b, i + 4] = 0.0

    verified(k)
    verified(k, {"M": 0})

    @kernel
    def first(x: Tensor[f32, M], out: Tensor[f32, M]):
        for m in each(M):
            out[m] = x[0]

    verified(first, {"M": 0})


def test_cache_write_then_read_is_parallel_over_heads():
    @kernel
    def k(x: Tensor[f32, H, D], cache: Tensor[f32, H, S, D], position: i32, out: Tensor[f32, H, D]):
        for h in each(H):
            d = whole(D)
            cache[h, position, d] = x[h, d]
            acc = zeros(d, dtype=f32)
            for s in tiles(span(0, position + 1)):
                acc += sum(cache[h, s, d], over=s)
            out[h, d] = acc

    assert loop_attributes(k) == [PARALLEL, SEQUENTIAL]


# Many kernels at once.


def test_speed_of_the_front_end():
    """A 20-line kernel takes a few milliseconds of the thread; the limit leaves room for a busy machine."""
    import time

    attention.tile_ir()
    times = []
    for _ in range(10):
        start = time.thread_time()
        attention.tile_ir()
        times.append(time.thread_time() - start)
    assert sorted(times)[0] < 0.02


def test_i8_literal_and_store():
    @kernel
    def k(a: Tensor[i8, M], out: Tensor[i8, M]):
        for m in tiles(M):
            out[m] = where(a[m] > 100, 100, a[m]) + 1

    a = np.array([120, 5, -7], np.int8)
    assert check_meaning(k, a, np.zeros(3, np.int8))[1].tolist() == [101, 6, -6]
