"""What loops carry in registers, and in which order it is made (sapper/lane/carried.py)."""

from __future__ import annotations

import numpy as np

from sapper import Tensor, dims, f32, kernel, tiles, zeros
from sapper.ir.nodes import Op
from sapper.lane.lower import lower
from sapper.tile.reduce_loops import reduce_loops
from sapper.tile.schedule import Facts, Schedule

from .run_lane import run_lane, specialize

C, N, O = dims("C N O")


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
