"""Floats that meet bf16 in loops that carry what comes of it, as parts (sapper/tile/float_parts.py)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sapper import Tensor, bf16, dims, each, exp, f32, kernel, max, sum, tiles, whole, zeros
from sapper.ir.nodes import Function
from sapper.ir.types import DType
from sapper.ir.verifier import verify
from sapper.kernels import find
from sapper.tile.canonical import canonicalize
from sapper.tile.float_parts import part_floats
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS
from sapper.tile.parts import copy_function
from sapper.tile.reduce_loops import reduce_loops

T, P, D = dims("T P D")


def make_chained(name: str, cache: DType) -> Any:
    @kernel(name=name)
    def chained(q: Tensor[f32, T, D], keys: Tensor[cache, P, D], values: Tensor[bf16, P, D], out: Tensor[f32, T, D]):
        for t in tiles(T):
            d = whole(D)
            acc = zeros(t, d, dtype=f32)
            for p in tiles(P):
                acc = 2.0 * acc + (keys[p, d] @ q[t, d]) @ values[p, d]
            out[t, d] = acc

    return chained


chained = make_chained("chained", bf16)
of_floats = make_chained("of_floats", f32)  # keys would be three parts, too


@kernel
def alone(x: Tensor[f32, T, D], w: Tensor[bf16, P, D], y: Tensor[f32, T, P]):
    """A walk by itself, in no loop that carries anything."""
    for t, p in tiles(T, P):
        d = whole(D)
        y[t, p] = x[t, d] @ w[p, d]


@kernel
def weighted(scores: Tensor[f32, T, P], values: Tensor[bf16, P, D], out: Tensor[f32, T, D]):
    """A softmax by each block of positions."""
    for t in tiles(T):
        d = whole(D)
        acc = zeros(t, d, dtype=f32)
        for p in tiles(P):
            score = scores[t, p]
            weight = exp(score - max(score, over=p))
            acc = acc + (weight @ values[p, d]) / sum(weight, over=p)
        out[t, d] = acc


@kernel
def one_by_one(q: Tensor[f32, T, D], keys: Tensor[bf16, P, D], out: Tensor[f32, T]):
    for t in tiles(T):
        d = whole(D)
        acc = zeros(t, dtype=f32)
        for p in each(P):
            acc = 0.5 * acc + q[t, d] @ keys[p, d]
        out[t] = acc


def canonical(kernel: Any) -> Function:
    function = kernel.tile_ir()
    reduce_loops(function)
    canonicalize(function)
    return function


def contractions(function: Function) -> list[Any]:
    return [op for op in function.walk() if op.name == "contract"]


def made(function: Function, name: str) -> int:
    return [op.name for op in function.walk()].count(name)


def arguments(seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    q = np.ldexp(random.uniform(1, 2, (5, 7)), random.integers(-40, 40, (5, 7))).astype(np.float32)
    keys, values = (random.standard_normal((6, 7)).astype(ml_dtypes.bfloat16) for _ in range(2))
    return {"q": q, "keys": keys, "values": values, "out": np.zeros((5, 7), np.float32)}


def run(function: Function, given: dict[str, Any]) -> np.ndarray[Any, Any]:
    with np.errstate(invalid="ignore", over="ignore"):
        interpret(function, given)
    return given["out"]  # type: ignore[no-any-return]


def test_three_products_are_added_the_least_first() -> None:
    function = canonical(chained)
    parted = copy_function(function)
    assert part_floats(parted)
    verify(parted, TILE_OPS)
    assert len(contractions(function)) == 2 and len(contractions(parted)) == 6
    assert all(v.type.dtype is bf16 for op in contractions(parted) for v in op.operands)
    whole_ones, parts = run(function, arguments()), run(parted, arguments())
    np.testing.assert_allclose(parts, whole_ones, rtol=2e-5)    # sums of f32, in another order
    first = contractions(parted)[0]     # of what two parts leave, which is a difference
    rounded = next(v for v in first.operands if v.op is not None and v.op.name == "cast")
    assert rounded.op is not None and rounded.op.operands[0].op.name == "sub"


@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF, 0x80000000])
def test_what_is_infinite_or_no_number_stays_so(bits: int) -> None:
    """0x7F800001 is no number whose upper half is infinite; 0x7F7FFFFF rounds to an infinite bf16."""
    function = canonical(chained)
    parted = copy_function(function)
    part_floats(parted)
    given = arguments()
    given["q"] = np.ones((5, 7), np.float32)
    given["q"][2, 3] = np.array(bits, np.uint32).view(np.float32)
    given["keys"][:] = given["values"][:] = np.eye(6, 7)
    found, expected = run(parted, {**given, "out": np.zeros((5, 7), np.float32)}), run(function, given)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kernel", [of_floats, alone, one_by_one], ids=lambda k: k.name)
def test_other_products_are_left_alone(kernel: Any) -> None:
    function = canonical(kernel)
    count = len(contractions(function))
    assert not part_floats(function) and len(contractions(function)) == count


def test_weights_of_a_softmax_are_not_infinite() -> None:
    """And so nothing asks whether they are; nor in attention, where the largest score is that of all before, too."""
    function = canonical(weighted)
    assert part_floats(function) and made(function, "eq") == 0
    function = canonical(find("attention_bf16").kernel)
    assert part_floats(function) and made(function, "eq") == 1      # of queries
    assert len(contractions(function)) == 6
