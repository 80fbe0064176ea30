"""Short lines that follow each other in memory are one long line, and mean the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapper import Tensor, dims, each, f32, i16, i32, kernel, maximum, sum, tiles, u8, where, whole
from sapper.ir.nodes import Function, Value
from sapper.ir.verifier import verify
from sapper.tile.canonical import canonicalize
from sapper.tile.interpret import interpret
from sapper.tile.joined_lines import join_lines
from sapper.tile.ops import TILE_OPS
from sapper.tile.schedule import Facts, Schedule
from tests.lane.run_lane import run_lane, specialize

B, C, H, M, N, W = dims("B C H M N W")


@kernel
def scaled(x: Tensor[f32, M, N], by: f32, y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = maximum(x[m, n] * by, 1.0)


@kernel
def scaled_rows(x: Tensor[f32, M, N], by: f32, y: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        y[m, n] = maximum(x[m, n] * by, 1.0)


@kernel
def differences(x: Tensor[u8, B, H, W, 3], y: Tensor[i16, B, H, W, 3]):
    """Of pixels that are neighbours, two apart; three axes become one."""
    for b in each(B):
        for h, w, c in tiles(H, W - 2, 3):
            y[b, h, w + 0, c] = x[b, h, w + 2, c].to(i16) - x[b, h, w + 0, c].to(i16)


@kernel
def with_gains(x: Tensor[f32, M, N], gain: Tensor[f32, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = x[m, n] * gain[n]


@kernel
def triangle(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = where(n <= m, x[m, n], 0.0)


@kernel
def turned(x: Tensor[f32, N, M], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = x[n, m]


@kernel
def gathered(x: Tensor[f32, M, N], row: Tensor[i32, M], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        y[m, n] = x[row[m], n]


@kernel
def first_columns(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N - 1):
        y[m, n + 0] = x[m, n + 0] + 1.0


@kernel
def summed(x: Tensor[f32, M, N], y: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        y[m, n] = x[m, n] / sum(x[m, n], over=n)


def joined(made: Any, contiguous: bool = True, most: int = 64) -> tuple[Function, list[list[str]]]:
    function = made.tile_ir()
    canonicalize(function)

    def typical(value: Value) -> int | None:
        op = value.op
        return 16 if op is None or op.name != "const" else op.attributes["value"]

    join_lines(function, typical, lambda tensor: contiguous, most)
    verify(function, TILE_OPS)
    return function, [op.attributes["axes"] for op in function.walk() if op.name == "tiles"]


def arguments_of(made: Any, extents: dict[str, int]) -> dict[str, Any]:
    random = np.random.default_rng(0)
    arguments: dict[str, Any] = {}
    for name, type in made.parameters:
        if not hasattr(type, "dims"):
            arguments[name] = np.float32(1.5)
            continue
        shape = [extents[dim] if isinstance(dim, str) else dim for dim in type.dims]
        arguments[name] = random.standard_normal(shape).astype(np.float32) if type.dtype is f32 else (
            random.integers(0, 256, shape).astype(np.uint8 if type.dtype is u8 else np.int16))
    return arguments


@pytest.mark.parametrize(("made", "axes"), [
    (scaled, [["m_n"]]), (scaled_rows, [["m_n"]]), (differences, [["h", "w_c"]])],
    ids=lambda value: getattr(value, "name", ""))
@pytest.mark.parametrize("extents", [(2, 3, 5, 7), (1, 1, 1, 2), (2, 0, 3, 9), (1, 4, 0, 3)], ids=str)
def test_lines_are_one(made: Any, axes: list[list[str]], extents: tuple[int, ...]) -> None:
    shape = dict(zip("BMHW", extents, strict=True)) | {"N": extents[2]}
    function, found = joined(made)
    assert found == axes
    arguments = arguments_of(made, shape)
    wanted = {name: np.copy(value) for name, value in arguments.items()}
    interpret(made.tile_ir(), wanted)
    for run in ("tile", "lane"):
        given = {name: np.copy(value) for name, value in arguments.items()}
        given = {name: value[()] if value.ndim == 0 else value for name, value in given.items()}
        if run == "tile":
            interpret(function, given)
        else:
            plain = made.tile_ir()
            canonicalize(plain)
            lane = run_lane(plain, given, None, Facts(), specialize(plain, given, dict.fromkeys("BHMNW", 16)))
            labels = {op.attributes["label"] for op in lane.walk() if op.name == "loop"}
            assert any(axes[0][-1] in label for label in labels)
        np.testing.assert_array_equal(given["y"], wanted["y"])


@pytest.mark.parametrize("made", [with_gains, triangle, turned, gathered, first_columns, summed],
                         ids=lambda made: made.name)
def test_what_minds_its_place_stays(made: Any) -> None:
    assert all("_" not in axis for axes in joined(made)[1] for axis in axes)


def test_long_lines_and_such_that_lie_apart_stay() -> None:
    assert joined(scaled, contiguous=False)[1] == joined(scaled, most=15)[1] == [["m", "n"]]
    function = scaled.tile_ir()
    canonicalize(function)
    arguments = arguments_of(scaled, {"M": 5, "N": 7})
    hints = {"M": 16, "N": 16}
    for schedule, strides in ((Schedule(registers={"m": 2}), {}), (None, {"x": (False, True)})):
        known = specialize(function, arguments, hints)
        known.strides.update(strides)
        lane = run_lane(function, dict(arguments), schedule, Facts(), known)
        assert not any("m_n" in op.attributes["label"] for op in lane.walk() if op.name == "loop")
