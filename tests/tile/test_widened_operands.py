"""Tensors that products in loops meet again and again, widened once (sapper/tile/widened_operands.py)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sapper import Tensor, bf16, dims, each, f16, f32, i32, kernel, minimum, span, tiles, whole, zeros
from sapper.ir.nodes import Function, Value
from sapper.ir.types import DType, TensorType
from sapper.ir.verifier import verify
from sapper.tile.canonical import canonicalize
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.widened_operands import widen_operands

B, H, L, M, N, P = dims("B H L M N P")
LANES, PART = 4, 3


def block_sum(w: Any, x: Any, part: Any, b: Any, p: Any, m: Any, l: Any) -> Any:
    for h in tiles(span(b * PART, minimum(b * PART + PART, H))):
        s = whole(2)
        part += x[m, h, s] @ w[p, h, l, s]
    return part


def make_scaled(left: DType) -> Any:
    right = f16 if left is f16 else bf16

    @kernel
    def scaled(w: Tensor[right, P, H, LANES, 2], x: Tensor[left, M, H, 2], factor: Tensor[f32, B],
               y: Tensor[f32, M, P, LANES]):
        for p, m in tiles(P, M):
            l = whole(LANES)
            acc = zeros(m, p, l, dtype=f32)
            for b in each(B):
                acc += block_sum(w, x, zeros(m, p, l, dtype=f32), b, p, m, l) * factor[b]
            y[m, p, l] = acc

    return scaled


@kernel
def plain(x: Tensor[bf16, M, H], w: Tensor[bf16, N, H], y: Tensor[f32, M, N]):
    """What a walk makes by itself: rows are widened as they are staged."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for h in tiles(H):
            acc += x[m, h] @ w[n, h]
        y[m, n] = acc


@kernel
def of_a_cache(x: Tensor[bf16, M, H], w: Tensor[bf16, N, B, H], length: i32, y: Tensor[f32, M, N]):
    """A number of the call says how much is read."""
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=f32)
        for b in each(B):
            part = zeros(m, n, dtype=f32)
            for h in tiles(span(0, minimum(length, H))):
                part += x[m, h] @ w[n, b, h]
            acc += part * 0.5
        y[m, n] = acc


@kernel
def stored(w: Tensor[bf16, P, H, LANES], x: Tensor[bf16, M, H], factor: Tensor[f32, B], y: Tensor[f32, M, P, LANES]):
    """The rows are made by the kernel itself."""
    for m, h in tiles(M, H):
        x[m, h] = (x[m, h].to(f32) * 2.0).to(bf16)
    for p, m in tiles(P, M):
        l = whole(LANES)
        acc = zeros(m, p, l, dtype=f32)
        for b in each(B):
            part = zeros(m, p, l, dtype=f32)
            for h in tiles(H):
                part += x[m, h] @ w[p, h, l]
            acc += part * factor[b]
        y[m, p, l] = acc


SIZES = {"B": 3, "H": 8, "M": 5, "N": 4, "P": 6}


def prepared(made: Any) -> Function:
    function: Function = reduce_loops(made.tile_ir())
    canonicalize(function)
    return function


def arguments_of(function: Function) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    dtypes: dict[str, Any] = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
    found: dict[str, Any] = {
        t.name: rng.standard_normal([SIZES.get(d, d) for d in t.type.dims]).astype(dtypes[t.type.dtype.name])
        for t in function.tensors()}
    return found | {v.name: 5 for v in function.arguments if not isinstance(v.type, TensorType)}


def typical(value: Value) -> int | None:
    op = value.op
    if op is None:
        return None
    return int(op.attributes["value"]) if op.name == "const" else SIZES.get(op.attributes.get("name", ""))


def buffers(function: Function) -> int:
    return sum(op.name == "buffer" for op in function.walk())


@pytest.mark.parametrize("left", [bf16, f16, f32], ids=lambda dtype: dtype.name)
def test_rows_that_panels_meet_in_loops_in_order_are_widened_once(left: DType) -> None:
    """The weights are not: they go across the lanes."""
    function = prepared(make_scaled(left))
    given = arguments_of(function)
    wanted = {name: np.copy(array) for name, array in given.items()}
    interpret(function, wanted)
    widen_operands(function, typical, SIZES["M"], SIZES["P"], 1 << 20)
    narrow = left is not f32
    assert buffers(function) == narrow
    verify(function, TILE_OPS)
    interpret(function, given)
    np.testing.assert_array_equal(given["y"], wanted["y"])
    (product,) = [op for op in function.walk() if op.name == "contract"]
    assert [v.type.dtype for v in product.operands] == [f32, f16 if left is f16 else bf16]  # type: ignore[union-attr]
    nest = next(op for op in function.body.ops if product in list(op.walk()))
    assert all(op.name != "buffer" for op in nest.walk())


@pytest.mark.parametrize(("rows", "columns", "most_bytes"), [
    (6, 6, 1 << 20), (5, 7, 1 << 20), (5, 6, 4 * 5 * 8 * 2 - 1)])
def test_few_rows_or_panels_and_what_has_no_room_are_not(rows: int, columns: int, most_bytes: int) -> None:
    function = prepared(make_scaled(bf16))
    widen_operands(function, typical, rows, columns, most_bytes)
    assert not buffers(function)


@pytest.mark.parametrize("made", [plain, of_a_cache, stored], ids=lambda made: made.name)
def test_what_is_left_alone(made: Any) -> None:
    function = prepared(made)
    widen_operands(function, typical, 1, 1, 1 << 20)
    assert not buffers(function)
