"""Products over several axes as products of matrices (sapper/tile/as_matrices.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapper import Tensor, bf16, dims, each, f32, i8, i32, kernel, maximum, minimum, tiles, where, whole, zeros
from sapper.ir.nodes import Function, Value
from sapper.ir.types import TensorType
from sapper.ir.verifier import verify
from sapper.runtime.check import check_kernel
from sapper.tile import as_matrices, matrix_form, matrix_writer
from sapper.tile.as_matrices import is_matrices, multiply_as_matrices
from sapper.tile.canonical import canonicalize
from sapper.tile.interpret import interpret
from sapper.tile.joined_products import part_joined_products
from sapper.tile.ops import TILE_OPS
from sapper.tile.plan import axes_of
from sapper.tile.semantics import numpy_dtype
from tests.strategies import examples

B, C, D, H, O, P, Q, R, W = dims("B C D H O P Q R W")


@kernel
def strided(x: Tensor[f32, B, C, H, W], w: Tensor[f32, O, C, 3, 3], y: Tensor[f32, B, O, P, Q]):
    for b, o, p, q in tiles(B, O, P, Q):
        acc = zeros(b, o, p, q, dtype=f32)
        for c in tiles(C):
            i, j = whole(3), whole(3)
            acc += w[o, c, i, j] @ x[b, c, 2 * p + i, 2 * q + j]
        y[b, o, p, q] = acc


@kernel
def points(x: Tensor[f32, B, C, P, Q], w: Tensor[f32, O, C], bias: Tensor[f32, O], z: Tensor[f32, B, O, P, Q],
           y: Tensor[f32, B, O, P, Q]):
    """Both operands lie well; what comes after reads a matrix, too."""
    for b, o, p, q in tiles(B, O, P, Q):
        c = whole(C)
        y[b, o, p, q] = maximum(w[o, c] @ x[b, c, p, q] + bias[o], 0.0) + z[b, o, p, q]


@kernel
def channels_last(x: Tensor[f32, B, H, W, C], w: Tensor[f32, 3, 3, C, O], y: Tensor[f32, B, P, Q, O]):
    for b, p, q, o in tiles(B, P, Q, O):
        acc = zeros(b, p, q, o, dtype=f32)
        for c in tiles(C):
            i, j = whole(3), whole(3)
            acc += x[b, p + i, q + j, c] @ w[i, j, c, o]
        y[b, p, q, o] = acc


@kernel
def patches(x: Tensor[f32, B, C, P, 4, Q, 4], w: Tensor[f32, O, C, 4, 4], y: Tensor[f32, B, P, Q, O]):
    for b, p, q, o in tiles(B, P, Q, O):
        c, i, j = whole(C), whole(4), whole(4)
        y[b, p, q, o] = x[b, c, p, i, q, j] @ w[o, c, i, j]


@kernel
def edges(x: Tensor[f32, B, C, P, Q], w: Tensor[f32, O, C, 3, 3], y: Tensor[f32, B, O, P, Q]):
    """Zeros around an image: the operand is computed."""
    for b, o, p, q in tiles(B, O, P, Q):
        c, i, j = whole(C), whole(3), whole(3)
        u, v = p + i - 1, q + j - 1
        inside = (u >= 0) & (u < P) & (v >= 0) & (v < Q)
        y[b, o, p, q] = w[o, c, i, j] @ where(
            inside, x[b, c, maximum(minimum(u, P - 1), 0), maximum(minimum(v, Q - 1), 0)], 0.0)


@kernel
def heads(x: Tensor[f32, B, R, C], w: Tensor[f32, C, H, D], y: Tensor[f32, B, H, R, D]):
    for b, h, r, d in tiles(B, H, R, D):
        c = whole(C)
        y[b, h, r, d] = x[b, r, c] @ w[c, h, d]


@kernel
def out_of_heads(x: Tensor[f32, B, H, R, D], w: Tensor[f32, H, D, O], y: Tensor[f32, B, R, O]):
    for b, r, o in tiles(B, R, O):
        h, d = whole(H), whole(D)
        y[b, r, o] = x[b, h, r, d] @ w[h, d, o]


@kernel
def line(x: Tensor[f32, B, C, W], w: Tensor[f32, O, C, 4], first: Tensor[i32, 1], y: Tensor[f32, B, O, Q]):
    """An index that is loaded in the loop."""
    for b, o, q in tiles(B, O, Q):
        c, j = whole(C), whole(4)
        y[b, o, q] = w[o, c, j] @ x[b, c, 2 * q + j + first[0]]


@kernel
def of_bytes(x: Tensor[i8, B, H, W, C], w: Tensor[i8, O, 3, 3, C], y: Tensor[i32, B, P, Q, O]):
    for b, p, q, o in tiles(B, P, Q, O):
        i, j, c = whole(3), whole(3), whole(C)
        y[b, p, q, o] = x[b, p + i, q + j, c] @ w[o, i, j, c]


@kernel
def widened(x: Tensor[bf16, B, H, R, D], w: Tensor[bf16, H, D, O], y: Tensor[bf16, B, R, O]):
    for b, r, o in tiles(B, R, O):
        h, d = whole(H), whole(D)
        y[b, r, o] = (x[b, h, r, d].to(f32) @ w[h, d, o].to(f32)).to(bf16)


@kernel
def grouped(x: Tensor[f32, B, R, C, H, W], w: Tensor[f32, R, O, C, 3, 3], y: Tensor[f32, B, R, O, P, Q]):
    """Loops around, whose counters are dimensions."""
    for b, g in each(B, R):
        for o, p, q in tiles(O, P, Q):
            c, i, j = whole(C), whole(3), whole(3)
            y[b, g, o, p, q] = w[g, o, c, i, j] @ x[b, g, c, p + i, q + j]


@kernel
def by_input(g: Tensor[f32, B, O, P, Q], w: Tensor[f32, O, C, 3, 3], dx: Tensor[f32, B, C, H, W]):
    """The gradient: places fall as taps rise, and the weights lie otherwise."""
    for b, c, h, v in tiles(B, C, H, W):
        o, i, j = whole(O), whole(3), whole(3)
        p, q = h - i, v - j
        inside = (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        dx[b, c, h, v] = w[o, c, i, j] @ where(
            inside, g[b, o, maximum(minimum(p, P - 1), 0), maximum(minimum(q, Q - 1), 0)], 0.0)


@kernel
def by_weights(x: Tensor[f32, B, C, H, W], g: Tensor[f32, B, O, P, Q], dw: Tensor[f32, O, C, 3, 3]):
    """Images lie apart from points."""
    for o, c, i, j in tiles(O, C, 3, 3):
        b, p, q = whole(B), whole(P), whole(Q)
        dw[o, c, i, j] = g[b, o, p, q] @ x[b, c, p + i, q + j]


@kernel
def by_weights_with_edges(x: Tensor[f32, B, C, P, Q], g: Tensor[f32, B, O, P, Q], dw: Tensor[f32, O, C, 3, 3]):
    for o, c, i, j in tiles(O, C, 3, 3):
        b, p, q = whole(B), whole(P), whole(Q)
        u, v = p + i - 1, q + j - 1
        inside = (u >= 0) & (u < P) & (v >= 0) & (v < Q)
        dw[o, c, i, j] = g[b, o, p, q] @ where(
            inside, x[b, c, maximum(minimum(u, P - 1), 0), maximum(minimum(v, Q - 1), 0)], 0.0)


@kernel
def volume(x: Tensor[f32, B, C, R, P, Q], w: Tensor[f32, O, C, 3, 3, 3], y: Tensor[f32, B, O, R, P, Q]):
    """Edges in three directions, of which one is a loop around."""
    for b, o, n, p, q in tiles(B, O, R, P, Q):
        c, t, i, j = whole(C), whole(3), whole(3), whole(3)
        r, u, v = n + t - 1, p + i - 1, q + j - 1
        inside = (r >= 0) & (r < R) & (u >= 0) & (u < P) & (v >= 0) & (v < Q)
        y[b, o, n, p, q] = w[o, c, t, i, j] @ where(inside, x[
            b, c, maximum(minimum(r, R - 1), 0), maximum(minimum(u, P - 1), 0), maximum(minimum(v, Q - 1), 0)], 0.0)


KERNELS = (strided, points, channels_last, patches, edges, heads, out_of_heads, line, of_bytes, widened, grouped,
           by_input, by_weights, by_weights_with_edges, volume)


def prepared(made: Any) -> Function:
    function: Function = made.tile_ir()
    canonicalize(function)
    return function


def contiguous(tensor: Value) -> bool:
    return True


def rewritten(made: Any, sizes: dict[str, int] | None = None, is_contiguous: Callable[[Value], bool] = contiguous,
              piece_bytes: int = 1 << 24, fewest: int = 28) -> Function:
    """By extents that are typically 256, or as they are."""
    function = prepared(made)

    def typical(value: Value) -> int | None:
        op = value.op
        assert op is not None
        return op.attributes["value"] if op.name == "const" else 256 if sizes is None else sizes[op.attributes["name"]]

    multiply_as_matrices(function, typical, is_contiguous, fewest if sizes is None else 1, piece_bytes)
    verify(function, TILE_OPS)
    return function


def is_changed(function: Function) -> bool:
    return any(op.name in ("view", "buffer", "each") for op in function.walk())


def arguments_of(made: Any, sizes: dict[str, int], seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    found: dict[str, Any] = {}
    for tensor in made.tile_ir().tensors():
        assert isinstance(tensor.type, TensorType)
        shape = [dim if isinstance(dim, int) else sizes[dim] for dim in tensor.type.dims]
        dtype = tensor.type.dtype
        found[tensor.name] = (random.integers(-9, 9, shape) if dtype is i8 else np.zeros(shape) if dtype is i32 else
                              random.standard_normal(shape)).astype(numpy_dtype(dtype))
    return found


@pytest.mark.parametrize(("made", "copies", "around", "axes", "over"), [
    (strided, True, 2, ["o", "p_q"], "c_i_j"), (points, False, 1, ["o", "p_q"], "c"),
    (channels_last, True, 2, ["p_q", "o"], "i_j_c"), (patches, True, 2, ["p_q", "o"], "c_i_j"),
    (edges, True, 2, ["o", "p_q"], "c_i_j"), (heads, False, 2, ["r", "d"], "c"),
    (out_of_heads, True, 2, ["r", "o"], "h_d"), (line, True, 2, ["o", "q"], "c_j"),
    (of_bytes, True, 2, ["p_q", "o"], "i_j_c"), (widened, True, 2, ["r", "o"], "h_d"),
    (grouped, True, 3, ["o", "p_q"], "c_i_j"), (by_input, True, 2, ["c", "h_v"], "o_i_j"),
    (by_weights, True, 1, ["o", "c_i_j"], "p_q"), (by_weights_with_edges, True, 1, ["o", "c_i_j"], "p_q"),
    (volume, True, 3, ["o", "p_q"], "c_t_i_j"),
], ids=lambda value: getattr(value, "name", ""))
def test_what_becomes_of_them(made: Any, copies: bool, around: int, axes: list[str], over: str) -> None:
    function = rewritten(made)
    assert any(op.name == "buffer" for op in function.walk()) is copies
    (product,) = (op for op in function.walk() if op.name == "contract")
    assert product.attributes["over"] == [over]
    *_, nest = function.body.ops
    assert (nest.attributes["count"] if nest.name == "each" else 0) == around
    loop = nest.blocks[0].ops[-2] if around else nest
    loop = loop.blocks[0].ops[-2] if loop.name == "each" else loop
    assert loop.attributes["axes"] == axes and loop.attributes["parallel"]


@settings(max_examples=examples(60))
@given(st.sampled_from(KERNELS), st.lists(st.integers(1, 4), min_size=9, max_size=9), st.integers(0, 99),
       st.sampled_from((1, 64, 1 << 20)))
def test_meaning(made: Any, extents: list[int], seed: int, piece_bytes: int) -> None:
    sizes = dict(zip("BCDOPQR", extents, strict=False)) | {"H": extents[7], "W": extents[8]}
    if made in (strided, channels_last, line, of_bytes, grouped, by_weights):
        sizes |= {"H": 2 * sizes["P"] + 2, "W": 2 * sizes["Q"] + 3}
    given_ = arguments_of(made, sizes, seed)
    wanted = {name: array.copy() for name, array in given_.items()}
    interpret(prepared(made), wanted)
    with pytest.MonkeyPatch.context() as patch:     # pieces of some lines
        for module in (as_matrices, matrix_form, matrix_writer):
            patch.setattr(module, "PIECE_COLUMNS", 1 if piece_bytes < 1 << 20 else 128)
        patch.setattr(matrix_writer, "MULTIPLE", 1)
        patch.setattr(matrix_form, "MOST_WHOLE", 0 if piece_bytes < 1 << 20 else 1 << 20)
        interpret(rewritten(made, sizes, piece_bytes=piece_bytes), given_)
    for name, array in wanted.items():      # f32 sums of up to 64 products; another order may round to the next bf16
        of_bf16 = array.dtype == numpy_dtype(bf16)
        np.testing.assert_allclose(given_[name].astype(np.float64), array.astype(np.float64),
                                   rtol=2.0**-7 if of_bf16 else 1e-5, atol=1e-5)


def test_what_is_left() -> None:
    @kernel
    def counted(x: Tensor[f32, B, C, P, Q], w: Tensor[f32, O, C], y: Tensor[f32, B, O, P, Q]):
        """A coordinate of an axis that would be one with another."""
        for b, o, p, q in tiles(B, O, P, Q):
            c = whole(C)
            y[b, o, p, q] = w[o, c] @ x[b, c, p, q] + q.to(f32)

    @kernel
    def in_part(x: Tensor[f32, B, C, P, Q], w: Tensor[f32, O, C], y: Tensor[f32, B, O, P, Q]):
        """Lines are not stored as a whole."""
        for b, o, p, q in tiles(B, O, P, Q - 1):
            c = whole(C)
            y[b, o, p, q] = w[o, c] @ x[b, c, p, q]

    @kernel
    def summed(x: Tensor[f32, B, C, P, Q], w: Tensor[f32, O, C], y: Tensor[f32, O, P, Q]):
        """Elements are met again."""
        for b, o, p, q in tiles(B, O, P, Q):
            c = whole(C)
            y[o + 0 * b, p, q] += w[o, c] @ x[b, c, p, q]

    @kernel
    def plain(x: Tensor[f32, R, C], w: Tensor[f32, C, D], y: Tensor[f32, R, D]):
        for r, d in tiles(R, D):
            c = whole(C)
            y[r, d] = x[r, c] @ w[c, d]

    for made in (counted, in_part, summed, plain):
        assert not is_changed(rewritten(made)), made.name
    assert not is_changed(rewritten(points, is_contiguous=lambda tensor: tensor.name != "z"))
    assert is_changed(rewritten(points, is_contiguous=lambda tensor: tensor.name != "bias"))
    few = {"B": 2, "C": 8, "H": 64, "W": 64, "O": 8, "P": 28, "Q": 28}
    function = prepared(strided)
    multiply_as_matrices(function, lambda v: v.op.attributes.get("value", few.get(v.op.attributes.get("name", ""))),  # type: ignore[union-attr]
                         contiguous, 28, 1 << 30)
    assert not is_changed(function)


def test_neighbouring_points_are_copied_for_many_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    @kernel
    def window(x: Tensor[f32, B, C, P, W], w: Tensor[f32, O, C, 3], y: Tensor[f32, B, O, P, Q]):
        for b, o, p, q in tiles(B, O, P, Q):
            c, j = whole(C), whole(3)
            y[b, o, p, q] = w[o, c, j] @ x[b, c, p, q + j]

    assert is_changed(rewritten(window))
    monkeypatch.setattr(as_matrices, "WELL_READ_ROWS", 257)
    assert not is_changed(rewritten(window)) and is_changed(rewritten(strided))


@kernel
def scattered(x: Tensor[f32, B, C, P, Q], w: Tensor[f32, C, O, 3, 3], y: Tensor[f32, B, O, H, W]):
    """A transposed convolution: products are made first, then summed at their places."""
    for b, o, h, v in tiles(B, O, H, W):
        y[b, o, h, v] = 0.0
    for b, o, i, j, p, q in tiles(B, O, 3, 3, P, Q):
        c = whole(C)
        y[b, o, 2 * p + i, 2 * q + j] += w[c, o, i, j] @ x[b, c, p, q]


@pytest.mark.parametrize("extents", [(2, 3, 4, 5, 6), (1, 1, 1, 1, 1), (0, 2, 2, 2, 2), (2, 2, 2, 0, 3)], ids=str)
def test_products_summed_at_places_are_matrices(extents: tuple[int, ...]) -> None:
    sizes = dict(zip("BCOPQ", extents, strict=True))
    sizes |= {"H": 2 * sizes["P"] + 1, "W": 2 * sizes["Q"] + 1}
    given_ = arguments_of(scattered, sizes, 1)
    wanted = {name: array.copy() for name, array in given_.items()}
    interpret(prepared(scattered), wanted)
    function = prepared(scattered)

    def typical(value: Value) -> int:
        assert value.op is not None
        return int(value.op.attributes.get("value", 256))

    part_joined_products(function, typical, 28, 1 << 60, lambda loop: is_matrices(
        function, loop, typical, contiguous, 28))
    multiply_as_matrices(function, typical, contiguous, 28, 1 << 24)
    verify(function, TILE_OPS)
    (product,) = (op for op in function.walk() if op.name == "contract")
    assert len(axes_of(product.result)) == 2 and len(product.attributes["over"]) == 1
    interpret(function, given_)
    for name, array in wanted.items():
        np.testing.assert_allclose(given_[name], array, rtol=1e-4, atol=1e-4)


def test_memory_of_copies_is_bounded() -> None:
    """By a line and a piece, whatever the extents: of images that are as large as they may be, too."""
    for made in (edges, channels_last, grouped, volume):
        function = rewritten(made)
        buffers = [op for op in function.walk() if op.name == "buffer"]
        assert buffers and all(op.attributes.get("own") for op in buffers)
        for op in buffers:      # the least of what is needed and of a sum that has no extent of all lines
            (size,) = op.operands
            assert size.op is not None and size.op.name == "min" and size.op.operands[1].op.name == "add"  # type: ignore[union-attr]


@pytest.mark.parametrize("made", [strided, points, channels_last, out_of_heads, of_bytes, widened, grouped, by_input,
                                  by_weights_with_edges, scattered],
                         ids=lambda made: made.name)
def test_check(made: Any) -> None:
    report = check_kernel(made, runs=4)
    assert report.ok, report
