"""What loops carry, in which order it is made (sapper/lane/carried.py), and how much of it lies in scratch memory."""

from __future__ import annotations

import numpy as np

from sapper import Tensor, dims, each, f32, i32, kernel, span, tiles, whole, zeros
from sapper.ir.nodes import Op
from sapper.ir.scratch import scratch_bytes
from sapper.lane.lower import lower
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Facts, Schedule

from .run_lane import run_lane, specialize

B, C, K, M, N, O = dims("B C K M N O")


@kernel
def taps(x: Tensor[f32, C, N], w: Tensor[f32, O, C, 2], y: Tensor[f32, O, N]):
    for o, n in tiles(O, N):
        acc = zeros(o, n, dtype=f32)
        for c in range(C):
            acc += w[o, c, 0] * x[c, n]
            acc += w[o, c, 1] * (x[c, n] * x[c, n])
        y[o, n] = acc


def test_what_is_added_in_turn_is_added_at_all_places_first() -> None:
    """A weight is then read for its row of sums and let go, not kept until all others of the row are read."""
    random = np.random.default_rng(0)
    x, w = random.standard_normal((5, 19), np.float32), random.standard_normal((7, 5, 2), np.float32)
    arguments = {"x": x, "w": w, "y": np.full((7, 19), np.nan, np.float32)}
    facts, function = Facts(lanes=8, vector_registers=16), reduce_loops(taps.tile_ir())
    lane = lower(function, Schedule(), facts, specialize(function, arguments))
    loops = [op.blocks[0] for op in lane.walk() if op.name == "loop" and op.attributes["label"] == "each"]
    body = max(loops, key=lambda block: len(block.arguments))
    sums = body.arguments[1:]
    assert len(sums) >= 4

    def adds_to(op: Op) -> bool:
        return op.name in ("fma", "add") and any(v in sums for v in op.operands)

    first = [op for op in body.ops if adds_to(op)]
    last = [v.op for v in body.ops[-1].operands]
    assert len(first) == len(set(last)) == len(sums)
    assert max(map(body.ops.index, first)) < min(map(body.ops.index, last))  # type: ignore[arg-type]

    run_lane(reduce_loops(taps.tile_ir()), arguments, facts=facts)
    expected = w[..., 0] @ x + w[..., 1] @ (x * x)
    np.testing.assert_allclose(arguments["y"], expected, rtol=0, atol=10 * 40 * 2.0**-24)   # ten products below 40


@kernel
def outer(first: Tensor[i32, 2], last: Tensor[i32, 2], a: Tensor[f32, M, N, K], b: Tensor[f32, B, M, K],
          other: Tensor[i32, N], y: Tensor[f32, M, N, B, M], z: Tensor[f32, M, N, B, M]):
    """A result with the rows of both operands, carried over a ragged loop, of which all has to be kept."""
    for m, n, x in tiles(M, N, B):
        w = whole(M)
        acc = zeros(m, n, x, w, dtype=f32)
        for j in each(2):
            for k in tiles(span(first[j], last[j])):
                acc += a[m, n, k] @ b[x, w, k]
        y[m, n, x, w] = acc
        z[m, other[n], x, w] += acc


def test_what_is_carried_for_several_axes_takes_no_more_memory_than_there_is() -> None:
    """A task has so many rows of each of two axes that a worker would keep 17 GB for results of 700 KB."""
    random, (m, n, x, k) = np.random.default_rng(0), (20, 17, 25, 9)
    arguments = {
        "first": np.array([0, 5], np.int32), "last": np.array([4, 9], np.int32),
        "a": random.integers(-4, 5, (m, n, k)).astype(np.float32),
        "b": random.integers(-4, 5, (x, m, k)).astype(np.float32), "other": random.permutation(n).astype(np.int32),
        "y": np.zeros((m, n, x, m), np.float32), "z": np.ones((m, n, x, m), np.float32)}
    function, facts = reduce_loops(outer.tile_ir()), Facts(lanes=16, vector_registers=32)
    specialization = specialize(function, arguments, dict.fromkeys("BKMN", 64))
    lane = run_lane(function, arguments, facts=facts, specialization=specialization)
    assert scratch_bytes(lane.attributes["scratch"], {"B": x, "K": k, "M": m, "N": n}) < 1 << 26
    taken = np.r_[0:4, 5:9]
    wanted = np.einsum("mnk,xwk->mnxw", arguments["a"][..., taken], arguments["b"][..., taken])
    np.testing.assert_array_equal(arguments["y"], wanted)
    np.testing.assert_array_equal(arguments["z"][:, arguments["other"]], 1 + wanted)
