"""Elements that are computed for products: once, by a loop before, where many rows or columns meet them."""

from __future__ import annotations

import numpy as np
import pytest

from sapper.ir.nodes import Function
from sapper.ir.types import f32, i8, i32, u8
from sapper.lang.builtins import each, exp, maximum, tiles, where, whole
from sapper.lang.dims import dims
from sapper.lang.kernel import kernel
from sapper.lang.tensor import Tensor
from sapper.tile.schedule import Schedule

from .run_lane import run_lane, specialize
from .test_nest_lanes import AVX2, AVX512, normal

D, G, H, K, M, N = dims("D G H K M N")


@kernel
def powers(x: Tensor[f32, M, K], w: Tensor[f32, K, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        k = whole(K)
        y[m, n] = exp(x[m, k]) @ w[k, n]


@kernel
def powers_of_both(x: Tensor[f32, M, K], w: Tensor[f32, N, K], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        k = whole(K)
        y[m, n] = maximum(exp(x[m, k]) @ exp(w[n, k]), 0.0)


@kernel
def sums_beside(x: Tensor[f32, M, K], w: Tensor[f32, K, N], y: Tensor[f32, M, N]):
    for m in tiles(M):
        k = whole(K)
        power = exp(x[m, k])
        for n in tiles(N):
            y[m, n] = (power / sum(power, over=k)) @ w[k, n]


@kernel
def widened(x: Tensor[f32, M, K], w: Tensor[i8, N, K], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        k = whole(K)
        y[m, n] = x[m, k] @ w[n, k].to(f32)


@kernel
def gathered(x: Tensor[f32, M, K], place: Tensor[i32, M], w: Tensor[f32, K, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        k = whole(K)
        y[m, n] = x[place[m], k] @ w[k, n]


def powers_of(lane: Function) -> list[int]:
    """How many loops stand round each power."""
    found = []

    def count(ops: list, depth: int) -> None:
        for op in ops:
            if op.name == "exp":
                found.append(depth)
            for block in op.blocks:
                count(block.ops, depth + (op.name == "loop"))

    count(lane.body.ops, 0)
    return found


@pytest.mark.sampled(3)
@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 1, 1), (33, 17, 7), (5, 70, 33), (65, 130, 17)])
@pytest.mark.parametrize("workers", [1, 3])
def test_elements_are_computed_once(rows: int, columns: int, depth: int, facts: object, workers: int) -> None:
    x, w = normal(rows, depth), normal(depth, columns)
    for made, second, wanted in (
            (powers, w, np.exp(x) @ w), (powers_of_both, np.ascontiguousarray(w.T), np.exp(x) @ np.exp(w)),
            (sums_beside, w, np.exp(x) / np.exp(x).sum(1, keepdims=True) @ w)):
        function = made.tile_ir()
        arguments = {"x": x, "w": second, "y": np.full((rows, columns), np.nan, np.float32)}
        known = specialize(function, arguments, dict.fromkeys("KMN", 128))
        lane = run_lane(function, arguments, facts=facts, specialization=known, workers=workers)
        np.testing.assert_allclose(arguments["y"], wanted, rtol=1e-4, atol=1e-4 * np.sqrt(depth))
        barriers = sum(op.name == "barrier" for op in lane.walk())
        assert barriers == {powers: 1, powers_of_both: 2, sums_beside: 1}[made]
        assert powers_of(lane) and max(powers_of(lane)) <= 2     # rows and columns, and no loop over what meets them


def test_few_rows_and_what_is_but_widened_or_gathered_stay() -> None:
    """A schedule that names loops speaks of those that are written."""
    def barriers(made: object, hints: dict[str, int], schedule: Schedule | None = None) -> int:
        function = made.tile_ir()  # type: ignore[attr-defined]
        w = np.ones((70, 8) if made is widened else (8, 70), np.int8 if made is widened else np.float32)
        arguments = {"x": np.ones((40, 8), np.float32), "w": w, "y": np.zeros((40, 70), np.float32)}
        if made is gathered:
            arguments["place"] = np.arange(40, dtype=np.int32)
        lane = run_lane(function, arguments, schedule, AVX2, specialize(function, arguments, hints))
        np.testing.assert_allclose(arguments["y"], 8 * np.e if made is powers else 8.0, rtol=1e-5)
        return sum(op.name == "barrier" for op in lane.walk())

    many = dict.fromkeys("KMN", 128)
    assert barriers(powers, many) == 1
    assert barriers(powers, many | {"N": 8}) == 0
    assert barriers(powers, many, Schedule(registers={"m": 4})) == 0
    assert barriers(widened, many) == barriers(gathered, many) == 0


@kernel
def nibbles(x: Tensor[f32, M, K], w: Tensor[u8, N, K // 2], y: Tensor[f32, M, N]):
    """The depth is an extent that is computed in the loop."""
    for m, n in tiles(M, N):
        k = whole(K // 2)
        pair = w[n, k].to(i32)
        y[m, n] = x[m, 2 * k] @ ((pair & 15) - 8).to(f32) + x[m, 2 * k + 1] @ ((pair >> 4) - 8).to(f32)


def test_halves_of_bytes() -> None:
    x, w = normal(30, 18), np.random.default_rng(2).integers(0, 256, (35, 9), np.uint8)
    arguments = {"x": x, "w": w, "y": np.zeros((30, 35), np.float32)}
    function = nibbles.tile_ir()
    lane = run_lane(function, arguments, None, AVX2, specialize(function, arguments, dict.fromkeys("KMN", 128)))
    wide = np.stack([(w & 15).astype(np.int32) - 8, (w >> 4).astype(np.int32) - 8], 2).reshape(35, 18)
    np.testing.assert_allclose(arguments["y"], x @ wide.T, rtol=1e-4, atol=1e-4)
    assert [op.name for op in lane.walk()].count("barrier") >= 1


@kernel
def normed_weights(
    q: Tensor[f32, M, G, H, D], k: Tensor[f32, N, G, D], seen: Tensor[i32, M, N], v: Tensor[f32, N, G, D],
    y: Tensor[f32, M, G, H, D],
):
    """Few queries and heads together: weights that add up to one meet the values."""
    for g in each(G):
        m, h, n, d = whole(M), whole(H), whole(N), whole(D)
        score = where(seen[m, n] != 0, q[m, g, h, d] @ k[n, g, d], -1e9)
        power = exp(score - max(score, over=n))
        y[m, g, h, d] = (power / sum(power, over=n)) @ v[n, g, d]


@pytest.mark.parametrize("facts", [AVX512, AVX2], ids=["16 lanes", "8 lanes"])
@pytest.mark.parametrize(("positions", "heads", "extent"), [(70, 3, 21), (17, 4, 32), (1, 1, 1)])
def test_quotients_are_made_once_along_the_longest_axis(facts, positions: int, heads: int, extent: int) -> None:
    """Not anew for each piece of columns, nor across the few heads, along which neighbours are masked lanes."""
    q, k, v = normal(5, 2, heads, extent), normal(positions, 2, extent), normal(positions, 2, extent)
    seen = np.tri(5, positions, 3, dtype=np.int32)
    arguments = {"q": q, "k": k, "seen": seen, "v": v, "y": np.full_like(q, np.nan)}
    function = normed_weights.tile_ir()
    hints = {"M": 8, "H": 4, "N": 512, "D": 64, "G": 2}
    lane = run_lane(function, arguments, None, facts, specialize(function, arguments, hints))
    score = np.where(seen[:, None, None] != 0, np.einsum("mghd,ngd->mghn", q, k), np.float32(-1e9))
    power = np.exp(score - score.max(3, keepdims=True))
    power /= power.sum(3, keepdims=True)
    np.testing.assert_allclose(arguments["y"], np.einsum("mghn,ngd->mghd", power, v), rtol=1e-4, atol=1e-5)
    dividing = {op.attributes["label"] for op in lane.walk() if op.name == "loop" and any(
        inner.name == "div" for inner in op.blocks[0].ops)}
    assert dividing == {"n"}
    products = [op for op in lane.walk() if op.name == "loop" and any(i.name == "fma" for i in op.blocks[0].ops)]
    assert products and not any(inner.name == "div" for op in products for inner in op.walk())
