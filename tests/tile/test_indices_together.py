"""Indices that workers share out, taken several at a time around a loop in order."""

from __future__ import annotations

from sapper import Tensor, bf16, dims, each, f32, i32, kernel, span, tiles, zeros
from sapper.ir.nodes import Op
from sapper.tile.canonical import canonicalize
from sapper.tile.indices_together import take_together
from sapper.tile.reduce_loops import reduce_loops

J, K, E, B, N = dims("J K E B N")


@kernel
def mixture(x: Tensor[f32, J, K], start: Tensor[i32, E], stop: Tensor[i32, E], w: Tensor[bf16, E, B, N, K],
            y: Tensor[f32, J, B, N]):
    for b in each(B):
        for e in each(E):
            for m, n in tiles(span(start[e], stop[e]), N):
                acc = zeros(m, n, dtype=f32)
                for k in tiles(K):
                    acc += x[m, k] @ w[e, b, n, k]
                y[m, b, n] = acc


@kernel
def of_own_rows(x: Tensor[f32, B, J, K], start: Tensor[i32, E], stop: Tensor[i32, E], w: Tensor[bf16, E, B, N, K],
                y: Tensor[f32, J, B, N]):
    for b in each(B):
        for e in each(E):
            for m, n in tiles(span(start[e], stop[e]), N):
                acc = zeros(m, n, dtype=f32)
                for k in tiles(K):
                    acc += x[b, m, k] @ w[e, b, n, k]
                y[m, b, n] = acc


@kernel
def of_own_bounds(x: Tensor[f32, J, K], start: Tensor[i32, B, E], stop: Tensor[i32, B, E],
                  w: Tensor[bf16, E, B, N, K], y: Tensor[f32, J, B, N]):
    for b in each(B):
        for e in each(E):
            for m, n in tiles(span(start[b, e], stop[b, e]), N):
                acc = zeros(m, n, dtype=f32)
                for k in tiles(K):
                    acc += x[m, k] @ w[e, b, n, k]
                y[m, b, n] = acc


def loops_of(made: object, worth: bool = True) -> list[Op]:
    """The loops over indices, from the outside inwards."""
    function = made.tile_ir()  # type: ignore[attr-defined]
    canonicalize(function)
    reduce_loops(function)
    take_together(function, lambda _: worth)
    found = [op for op in function.walk() if op.name == "each"]
    return sorted(found, key=lambda op: -sum(1 for _ in op.walk()))


def test_a_loop_in_order_goes_around_the_indices_of_a_piece() -> None:
    pieces, experts, blocks = loops_of(mixture)
    assert pieces.attributes["pieces"] and pieces.attributes["parallel"] and not experts.attributes["parallel"]
    assert list(blocks.operands) == pieces.blocks[0].arguments and blocks.attributes["parallel"]
    loads = [op for op in experts.blocks[0].ops if op.name == "load"]
    assert len(loads) == 2      # where an expert's rows are is read once for all blocks


def test_what_indices_have_nothing_in_common_for_is_left() -> None:
    for made in (of_own_rows, of_own_bounds):
        outer, inner = loops_of(made)
        assert "pieces" not in outer.attributes and outer.attributes["parallel"] and not inner.attributes["parallel"]
    assert len(loops_of(mixture, worth=False)) == 2
