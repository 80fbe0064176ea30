"""Products that are passed on become loops of their own, which mean the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sapper as sp
from sapper import Tensor, bf16, each, exp, f32, i32, max, maximum, sum, tiles, where, whole, zeros
from sapper.ir.nodes import Function, Op, Value
from sapper.ir.text import parse_function, print_function
from sapper.ir.verifier import verify
from sapper.lang.kernel import Kernel
from sapper.tile.canonical import canonicalize
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS
from sapper.tile.product_parts import IsMade, part_products
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.semantics import numpy_dtype
from tests.strategies import KernelCase, assert_meaning, examples
from tests.strategies.nests import TILE_SIZES, nests

FEW_POINTS = 500
"""Of nests that are run one element of a loop at a time."""
B, H, K, M, N = sp.dims("B H K M N")


@sp.kernel
def two_layers(x: Tensor[bf16, M, K], w1: Tensor[bf16, K, H], w2: Tensor[bf16, H, N], y: Tensor[f32, M, N]):
    for m in tiles(M):
        k, h = whole(K), whole(H)
        hidden = maximum(x[m, k] @ w1[k, h], 0.0).to(bf16)
        for n in tiles(N):
            y[m, n] = hidden @ w2[h, n]


@sp.kernel
def gated(x: Tensor[f32, M, K], gate: Tensor[f32, K, H], up: Tensor[f32, K, H], down: Tensor[f32, H, N],
          kept: Tensor[f32, M, H], y: Tensor[f32, M, N]):
    """Two products meet element by element, and their product is stored, too."""
    for m in tiles(M):
        k, h, n = whole(K), whole(H), whole(N)
        hidden = maximum(x[m, k] @ gate[k, h], 0.0) * (x[m, k] @ up[k, h])
        kept[m, h] = hidden
        y[m, n] = hidden @ down[h, n]


@sp.kernel
def attention(q: Tensor[f32, B, M, K], k: Tensor[f32, B, N, K], v: Tensor[f32, B, N, K], bias: Tensor[f32, M, N],
              y: Tensor[f32, B, M, K]):
    for b in each(B):
        for m in tiles(M):
            d, n = whole(K), whole(N)
            score = q[b, m, d] @ k[b, n, d] + bias[m, n]
            weight = exp(score - max(score, over=n))
            y[b, m, d] = (weight @ v[b, n, d]) / sum(weight, over=n)


@sp.kernel
def nearest(x: Tensor[f32, M, K], centre: Tensor[f32, N, K], found: Tensor[i32, M]):
    """The squares of the centres are no row's."""
    for m in tiles(M):
        n, k = whole(N), whole(K)
        found[m] = sp.argmin(sum(centre[n, k] * centre[n, k], over=k) - 2.0 * (x[m, k] @ centre[n, k]), over=n).to(i32)


@sp.kernel
def masked(x: Tensor[f32, M, K], w: Tensor[f32, K, N], y: Tensor[f32, M, N]):
    """The operand is computed."""
    for m, n in tiles(M, N):
        k = whole(K)
        y[m, n] = where(k <= m, exp(x[m, k]), 0.0) @ w[k, n]


@sp.kernel
def gathered(x: Tensor[f32, N, K], row: Tensor[i32, M], w: Tensor[f32, K, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        k = whole(K)
        y[m, n] = x[row[m], k] @ w[k, n]


@sp.kernel
def scaled(x: Tensor[f32, M, K], w: Tensor[f32, K, N], scale: Tensor[f32, N], y: Tensor[f32, M, N]):
    """Both operands are computed, each for its own axis of the loop."""
    for m, n in tiles(M, N):
        k = whole(K)
        y[m, n] = (x[m, k] * sum(x[m, k], over=k)) @ (w[k, n] * scale[n])


@sp.kernel
def sums_of_sums(u: Tensor[f32, B, M, H], z: Tensor[f32, M, H], x: Tensor[f32, M, K], w: Tensor[f32, K, N],
                 y: Tensor[f32, B, M, N]):
    """A sum over what follows a sum that spans fewer axes, though another one of its own axes is made before."""
    for b, m, n in tiles(B, M, N):
        k, h = whole(K), whole(H)
        first, shared = sum(u[b, m, h], over=h), sum(z[m, h], over=h)
        y[b, m, n] = x[m, k] @ w[k, n] + first + sum(u[b, m, h] * shared, over=h)


KERNELS = {two_layers: 2, gated: 3, attention: 3, nearest: 3, masked: 2, gathered: 2, scaled: 3, sums_of_sums: 6}
"""And how many loops become of each."""


def parted(k: Kernel, most_bytes: int = 1 << 40, is_made: IsMade = lambda value, depth: False) -> Function:
    function = k.tile_ir()
    reduce_loops(function)
    canonicalize(function)

    def typical(value: Value) -> int | None:
        made = value.op
        return None if made is None else {"const": made.attributes.get("value"), "dim": 100}.get(made.name)

    def is_product(op: Op, extents: Mapping[str, int]) -> bool:
        return len(op.result.type.axes) == 2 and all(len(v.type.axes) == 2 for v in op.operands)

    part_products(function, typical, is_product, most_bytes, is_made)
    return function


@sp.kernel
def weighted(x: Tensor[f32, M, K], w: Tensor[f32, H, K], v: Tensor[f32, N, H], y: Tensor[f32, M, N]):
    """Both layers compute their weights."""
    for m in tiles(M):
        k, h, n = whole(K), whole(H), whole(N)
        y[m, n] = maximum(x[m, k] @ (w[h, k] * 2.0), 0.0) @ (v[n, h] + 1.0)


def test_operands_that_are_made_on_their_way() -> None:
    """They are computed in the loops of their products, those of the first layer alone if the second asks for none."""
    for depths, count in (((), 4), (("k",), 3), (("h", "k"), 2)):
        asked = list[str]()

        def is_made(value: Value, depth: str, depths: tuple[str, ...] = depths, asked: list[str] = asked) -> bool:
            asked.append(depth)
            return depth in depths

        function = parted(weighted, is_made=is_made)
        verify(function, TILE_OPS)
        assert len(loops_of(function)) == count and set(asked) == {"h", "k"}
        given, wanted = (arguments_of(weighted, {"H": 9, "K": 5, "M": 7, "N": 11}) for _ in range(2))
        interpret(function, given)
        interpret(weighted.tile_ir(), wanted)
        np.testing.assert_allclose(given["y"], wanted["y"], rtol=1e-4, atol=1e-5)


def loops_of(function: Function) -> list[Op]:
    return [op for op in function.body.ops if op.blocks]


def arguments_of(k: Kernel, sizes: Mapping[str, int]) -> dict[str, Any]:
    rng = np.random.default_rng(4)
    given = {}
    for name, type in k.parameters:
        shape = tuple(sizes[d] for d in type.dims)
        given[name] = rng.integers(0, sizes["N"], shape, np.int32) if type.dtype is i32 else \
            rng.standard_normal(shape).astype(numpy_dtype(type.dtype))
    return given


@pytest.mark.parametrize("k", KERNELS, ids=lambda k: k.name)
def test_the_meaning_is_the_same(k: Kernel) -> None:
    """Each product is the only one of its loop; the text is read back."""
    function = parted(k)
    verify(function, TILE_OPS)
    assert len(loops_of(function)) == KERNELS[k]
    for loop in loops_of(function):
        assert [len(v.type.axes) for op in loop.walk() if op.name == "contract" for v in op.operands].count(2) <= 2
    text = print_function(function)
    assert print_function(parse_function(text, {"tile": TILE_OPS})) == text
    for sizes in ({"B": 2, "H": 9, "K": 5, "M": 7, "N": 11}, {"B": 1, "H": 1, "K": 1, "M": 3, "N": 1}):
        given, wanted = arguments_of(k, sizes), arguments_of(k, sizes)
        interpret(function, given)
        interpret(k.tile_ir(), wanted)
        for name, array in given.items():
            np.testing.assert_allclose(array.astype(np.float64), wanted[name].astype(np.float64), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("k", KERNELS, ids=lambda k: k.name)
def test_no_element_is_passed_twice(k: Kernel) -> None:
    """What spans one axis of a loop over two is not made again along the other one."""
    interpret(parted(k), arguments_of(k, {"B": 2, "H": 3, "K": 2, "M": 3, "N": 4}), check_races=True)


@settings(max_examples=examples(80))
@given(case=nests(FEW_POINTS), seed=st.integers(0, 1000))
def test_kernels_as_users_write_them(case: KernelCase, seed: int) -> None:
    """Whatever becomes of their products: the meaning is the same, and no element is passed twice."""
    kernel = case.load()
    arguments = case.make_arguments(seed, hostile=False)
    interpret(parted(kernel), arguments, check_races=True)
    assert_meaning(case, kernel.tile_ir(), case.make_arguments(seed, hostile=False), arguments, TILE_SIZES)


@sp.kernel
def alone(x: Tensor[f32, M, K], w: Tensor[f32, K, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        k = whole(K)
        y[m, n] = maximum(x[m, k] @ w[k, n], 0.0)


@sp.kernel
def scaled_by_all(x: Tensor[f32, M, K], scale: Tensor[f32, K], w: Tensor[f32, K, N], gain: Tensor[f32, N],
                  v: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    """What all rows share spans no axis: a loop of its own would walk none."""
    for m, n in tiles(M, N):
        k = whole(K)
        v[m, n] = (x[m, k] + 1.0) @ (w[k, n] * gain[n])
        y[m, n] = (x[m, k] * sum(scale[k] * scale[k], over=k)) @ w[k, n]


@sp.kernel
def in_order(x: Tensor[f32, M, K], w: Tensor[f32, K, K], y: Tensor[f32, M, K]):
    for m in tiles(M):
        k, h = whole(K), whole(K)
        carried = zeros(m, dtype=f32)
        for _ in range(3):
            carried += sum(maximum(x[m, k] @ w[k, h], 0.0), over=h)
        y[m, k] = x[m, k] + carried


@sp.kernel(in_place=[("y", "x")])
def on_itself(x: Tensor[f32, M, K], w: Tensor[f32, K, K], v: Tensor[f32, K, K], y: Tensor[f32, M, K]):
    """A call may pass one array as both: a row must be read whole before any of it is stored."""
    for m in tiles(M):
        k, h, n = whole(K), whole(K), whole(K)
        y[m, n] = maximum(x[m, k] @ w[k, h], 0.0) @ v[h, n]


@pytest.mark.parametrize("k", [alone, in_order, on_itself, scaled_by_all], ids=lambda k: k.name)
def test_others_stay(k: Kernel) -> None:
    assert len(loops_of(parted(k))) == 1


def test_what_is_passed_is_bounded() -> None:
    """100 x 100 sums of bf16."""
    assert len(loops_of(parted(two_layers, 20000))) == 2
    assert len(loops_of(parted(two_layers, 19999))) == 1
