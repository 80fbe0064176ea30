"""Products over several axes as loops over all but one (sapper/tile/several_depths.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapper import Tensor, dims, each, f32, kernel, maximum, tiles, whole
from sapper.ir.nodes import Function
from sapper.ir.verifier import verify
from sapper.runtime.check import check_kernel
from sapper.tile.canonical import canonicalize
from sapper.tile.interpret import interpret
from sapper.tile.ops import TILE_OPS
from sapper.tile.several_depths import loop_over_depths

B, C, O, P, Q = dims("B C O P Q")


@kernel
def weights_gradient(x: Tensor[f32, B, C, P + 2, Q + 2], g: Tensor[f32, B, O, P, Q], dw: Tensor[f32, O, C, 3, 3]):
    for i, j in each(3, 3):
        for o, c in tiles(O, C):
            b, p, q = whole(B), whole(P), whole(Q)
            dw[o, c, i, j] = g[b, o, p, q] @ x[b, c, p + i, q + j]


@kernel
def used_again(x: Tensor[f32, P, C, Q], g: Tensor[f32, P, O, Q], y: Tensor[f32, O, C], z: Tensor[f32, P, O, C]):
    """An axis of the product is one of something else, too; what is read does not depend on all axes."""
    for o, c in tiles(O, C):
        p, q = whole(P), whole(Q)
        y[o, c] = 2.0 * (x[p, c, q] @ g[p, o, q]) + 1.0
        z[p, o, c] = x[p, c, 0] * g[p, o, 0]


@kernel
def columns(x: Tensor[f32, P, Q, C], g: Tensor[f32, P, O, Q], y: Tensor[f32, O, C]):
    """One operand lies along the columns."""
    for o, c in tiles(O, C):
        p, q = whole(P), whole(Q)
        y[o, c] = x[p, q, c] @ g[p, o, q]


def prepared(made: Any) -> Function:
    function: Function = made.tile_ir()
    canonicalize(function)
    return function


def depths(function: Function) -> list[int]:
    """How many axes products are over."""
    return [len(op.attributes["over"]) for op in function.walk() if op.name == "contract"]


@pytest.mark.parametrize(("made", "before", "after"), [(weights_gradient, 3, 1), (used_again, 2, 1), (columns, 2, 2)],
                         ids=lambda value: getattr(value, "name", ""))
def test_loops(made: Any, before: int, after: int) -> None:
    rng = np.random.default_rng(0)
    sizes = {"B": 2, "C": 3, "O": 4, "P": 5, "Q": 6}
    function = prepared(made)
    shapes = {t.name: tuple(sizes[d] if isinstance(d, str) else d if isinstance(d, int) else sizes[d[1]] + 2
                            for d in t.type.dims) for t in function.tensors()}
    given = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    wanted = {name: array.copy() for name, array in given.items()}
    interpret(function, wanted)
    loop_over_depths(function, lambda axis: 27, 28)
    assert depths(function) == [before]                 # too few rows
    loop_over_depths(function, lambda axis: 28, 28)
    assert depths(function) == [after]
    verify(function, TILE_OPS)
    interpret(function, given)
    for name, array in wanted.items():
        np.testing.assert_allclose(given[name], array, rtol=1e-4, atol=1e-4)


@kernel
def of_computed_elements(x: Tensor[f32, B, C, Q], g: Tensor[f32, B, O, Q], y: Tensor[f32, O, C]):
    for o, c in tiles(O, C):
        b, q = whole(B), whole(Q)
        y[o, c] = maximum(g[b, o, q], 0.0) @ x[b, c, q]


def test_loops_that_were_parted_before_have_axes_of_other_names() -> None:
    report = check_kernel(of_computed_elements, runs=3)
    assert report.ok, report
