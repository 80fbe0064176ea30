"""Long sums of few elements are shared among workers, and mean the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, bf16, emulate, exp, f32, i32, max, min, sum, tiles, where, whole
from sapper.ir.nodes import Function, Value
from sapper.ir.verifier import verify
from sapper.lang.kernel import Kernel
from sapper.tile.canonical import canonicalize
from sapper.tile.interpret import interpret
from sapper.tile.long_sums import share_long_sums
from sapper.tile.ops import TILE_OPS
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.semantics import numpy_dtype

M, N = sp.dims("M N")


@sp.kernel
def of_columns(x: Tensor[f32, M, N], dy: Tensor[bf16, M, N], mean: Tensor[f32, M], dw: Tensor[f32, N],
               db: Tensor[bf16, N]):
    """What a row has, what a column has, and sums in bf16."""
    for n in tiles(N):
        m = whole(M)
        dw[n] = 2.0 * sum((x[m, n] - mean[m]) * dy[m, n].to(f32), over=m) + x[0, n]
        db[n] = sum(dy[m, n], over=m)


@sp.kernel
def of_two_axes(x: Tensor[f32, 2, M, N], low: Tensor[f32, 2, N], high: Tensor[f32, 2, N]):
    for k, n in tiles(2, N):
        m = whole(M // 2)
        low[k, n] = min(x[k, 2 * m, n], over=m)
        high[k, n] = max(where(m > 0, x[k, 2 * m, n], -1.0), over=m)


@sp.kernel
def product(x: Tensor[f32, M], w: Tensor[f32, M, N], y: Tensor[f32, N]):
    for n in tiles(N):
        m = whole(M)
        y[n] = x[m] @ w[m, n]


@sp.kernel
def of_rows(x: Tensor[f32, N, M], y: Tensor[f32, M], found: Tensor[f32, N]):
    """Along memory."""
    for n in tiles(N):
        m = whole(M)
        found[n] = sum(x[n, m] * y[m], over=m)


@sp.kernel
def softmax_of_columns(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    """More than reductions spans the range."""
    for n in tiles(N):
        m = whole(M)
        e = exp(x[m, n] - max(x[m, n], over=m))
        y[m, n] = e / sum(e, over=m)


@sp.kernel
def variance(x: Tensor[f32, M, N], y: Tensor[f32, N]):
    """One sum needs another."""
    for n in tiles(N):
        m = whole(M)
        centred = x[m, n] - sum(x[m, n], over=m) / float(M)
        y[n] = sum(centred * centred, over=m)


@sp.kernel
def places(x: Tensor[f32, M, N], y: Tensor[i32, N]):
    for n in tiles(N):
        m = whole(M)
        y[n] = sp.argmax(x[m, n], over=m).to(i32)


def shared(kernel: Kernel, extent: int = 4096, workers: int = 1000) -> tuple[Function, int]:
    """extent: typical of all dimensions. The function, and how many loops it has at the top."""
    function = reduce_loops(kernel.tile_ir())
    canonicalize(function)

    def typical(value: Value) -> int:
        op = value.op
        assert op is not None
        return int(op.attributes["value"]) if op.name == "const" else extent

    share_long_sums(function, typical, workers)
    verify(function, TILE_OPS)
    return function, len([op for op in function.body.ops if op.attributes.get("parallel")])


def arguments_of(kernel: Kernel, **extents: int) -> dict[str, Any]:
    random = np.random.default_rng(3)
    return {name: random.integers(-8, 9, [extents[d] if isinstance(d, str) else d for d in type.dims]).astype(
        numpy_dtype(type.dtype)) for name, type in kernel.parameters}


@pytest.mark.parametrize("rows", [1, 67, 200])
@pytest.mark.parametrize("kernel", [of_columns, of_two_axes, product], ids=lambda k: k.name)
def test_the_meaning_is_the_same(kernel: Kernel, rows: int) -> None:
    """Of pieces that are empty, short, and whole; small integers have exact sums."""
    function, loops = shared(kernel)
    assert loops == 2
    given, wanted = (arguments_of(kernel, M=rows, N=3) for _ in range(2))
    interpret(function, given, check_races=True)
    interpret(kernel.tile_ir(), wanted)
    for name, array in given.items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def test_pieces_along_memory_begin_at_lines() -> None:
    function, _ = shared(of_rows, extent=32768, workers=1 << 20)
    given, wanted = (arguments_of(of_rows, M=9000, N=2) for _ in range(2))
    interpret(function, given, check_races=True)
    interpret(of_rows.tile_ir(), wanted)
    np.testing.assert_array_equal(given["found"], wanted["found"])


@pytest.mark.parametrize("kernel", [softmax_of_columns, variance, places], ids=lambda k: k.name)
def test_other_loops_stay(kernel: Kernel) -> None:
    assert shared(kernel)[1] == 1


def test_only_long_sums_of_few_elements_are_shared() -> None:
    """4096 columns are 32 tasks of 128."""
    assert shared(product, workers=63)[1] == 1
    assert shared(product, workers=64)[1] == 2
    assert shared(product, extent=128)[1] == 1
    assert shared(of_rows, extent=16384, workers=1 << 20)[1] == 1       # of rows alone pieces of 4096
    assert shared(of_rows, extent=32768, workers=1 << 20)[1] == 2


def test_on_the_emulator() -> None:
    """All workers sum pieces of the rows, and meet."""
    arguments = arguments_of(of_columns, M=203, N=70)
    wanted = {name: array.copy() for name, array in arguments.items()}
    of_columns(*wanted.values(), interpret=True)
    result = emulate.run(of_columns, *arguments.values(), target="sm_80", workers=16,
                         options=emulate.Options(lazy=True))
    for name, array in arguments.items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)
    assert any(name.startswith("atom") for name in result.counters.instructions)     # the barrier
