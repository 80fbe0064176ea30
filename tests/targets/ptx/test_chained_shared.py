"""Multi-head latent attention of one token: latent vectors are cut into slices, one for each of several warps."""

from __future__ import annotations

from collections import Counter

import ml_dtypes
import numpy as np
import pytest

import sapper as sp
from sapper import Tensor, bf16, emulate, f32, full, targets, tiles, whole, zeros
from sapper.codegen.pipeline import compile_kernel, facts_of, finish_lane, to_lane
from sapper.ir.nodes import Function
from sapper.kernels import find
from sapper.kernels.online_softmax import attend_scaled
from sapper.lane.rehearse import rehearse
from sapper.tile.schedule import DimClass, Schedule, Specialization

from .left_out import replaced

ENTRY = find("latent_attention_decode_narrow")
TENSORS = [name for name, type in ENTRY.kernel.parameters if hasattr(type, "dims")]
PRODUCT = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


def lowered(heads: int, latent: int = 512, level: str = "sm_80") -> Function:
    known = Specialization({d: DimClass(2048, 1) for d in "PB"}, dict.fromkeys(TENSORS, "contiguous"),
                           frozenset(TENSORS))
    tile = ENTRY.kernel.tile_ir({"H": heads, "C": latent, "S": 64})
    return to_lane(tile, Schedule(), facts_of(targets.target(level)), known)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("level", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(("heads", "position"), [(16, 70), (20, 256 + 33), (1, 0)])
def test_on_the_emulator(heads: int, position: int, level: str, lazy: bool) -> None:
    """Races, uninitialised reads and accesses out of bounds raise; positions that are not filled are NaN."""
    arguments = ENTRY.make_arguments(np.random.default_rng(5), {"H": heads, "C": 512, "S": 64, "position": position})
    counters = emulate.run(ENTRY.kernel, *arguments.values(), target=level, workers=2, static=frozenset("HCS"),
                           aligned=TENSORS, options=emulate.Options(lazy=lazy)).counters
    wrong = ENTRY.compare(arguments, ENTRY.reference(arguments))
    assert wrong is None, wrong
    on_groups = level == "sm_90a" and heads > 16        # test_chained_pairs.py
    assert (PRODUCT in counters.instructions) != on_groups and counters.shared_cycles == counters.shared_ideal


@pytest.mark.parametrize(("heads", "latent", "level", "warps", "step"), [
    (128, 512, "sm_80", 8, 32), (16, 512, "sm_86", 4, 32), (32, 512, "sm_80", 8, 32), (128, 256, "sm_80", 8, 64),
    (16, 384, "sm_80", 0, 0)])
def test_shapes(heads: int, latent: int, level: str, warps: int, step: int) -> None:
    """Four slices of 128 numbers for each 16 heads, as sums and queries fit registers, and pieces near memory. What is
    no longer than before is not cut; what can't be cut into whole panels is not taken."""
    lane = lowered(heads, latent, level)
    assert lane.attributes.get("warps", 0) == warps
    steps = {op.attributes["step"] for op in lane.walk() if op.name == "loop" and op.attributes["label"] == "p"}
    assert steps == {step} or not warps
    if warps:
        products = Counter(op.name for op in lane.walk())["matrix_multiply"]
        slices = 4 if latent > 256 else 1
        # Scores over a slice of the latent vector and over 64 numbers, then a slice of the sums; in each of two loops.
        assert products == 2 * ((latent // slices + 64) // 16 * step // 8 + latent // slices // 8 * step // 16)


H, P = sp.dims("H P")


@sp.kernel
def with_a_greatest(q: Tensor[bf16, H, 512], latents: Tensor[bf16, P, 512], out: Tensor[f32, H, 512],
                    greatest: Tensor[f32, H]):
    for h in tiles(H):
        c = whole(512)
        top = full(h, value=-1e30, dtype=f32)
        total = zeros(h, dtype=f32)
        acc = zeros(h, c, dtype=f32)
        for p in tiles(P):
            score = q[h, c] @ latents[p, c]
            top, total, acc = attend_scaled(top, total, acc, score, 0.0625, latents[p, c], p, sp.exp2, bf16)
        out[h, c] = acc / total
        greatest[h] = sp.max(acc, over=c)


@pytest.mark.parametrize(("heads", "level"), [(16, "sm_80"), (64, "sm_90a")])
def test_what_reduces_the_long_axis_is_not_cut(heads: int, level: str) -> None:
    """A warp that has a part of the vector alone would find the greatest number of that part."""
    random = np.random.default_rng(3)
    q, latents = (random.standard_normal((n, 512)).astype(ml_dtypes.bfloat16) for n in (heads, 20))
    expected, made = ([np.zeros((heads, 512), np.float32), np.zeros(heads, np.float32)] for _ in range(2))
    with_a_greatest(q, latents, *expected, interpret=True)
    emulate.run(with_a_greatest, q, latents, *made, target=level, workers=2,
                aligned=["q", "latents", "out", "greatest"])
    for wanted, found in zip(expected, made, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2**-6, atol=2**-6)


def test_every_meeting_is_needed() -> None:
    """Each of sync_warps, left out by itself, is found at the lane station, of few heads or of many: before the loops,
    and in both of them before the piece and before the parts are read."""
    found = []
    for heads in (16, 128):
        caught: list[bool] = []
        while True:
            lane = finish_lane(lowered(heads), targets.target("sm_80"))
            blocks = [lane.body, *(b for op in lane.walk() for b in op.blocks)]
            places = [(b, op) for b in blocks for op in b.ops if op.name == "sync_warps"]
            if len(caught) == len(places):
                break
            block, op = places[len(caught)]
            block.ops.remove(op)
            caught.append(bool(rehearse(lane)))
        found.append(caught)
    assert [any(pair) for pair in zip(*found, strict=True)] == [True] * 5


@pytest.mark.parametrize("number", range(1, 5))
def test_no_meeting_can_be_left_out_on_the_emulator(number: int) -> None:
    """The same in the text: an error, or a wrong result."""
    static = {"H": 16, "C": 512, "S": 64}
    arguments = ENTRY.make_arguments(np.random.default_rng(5), {**static, "position": 100})
    extents = {"P": arguments["latents"].shape[0], "B": 1}
    compiled = compile_kernel(ENTRY.kernel, static, dict.fromkeys(TENSORS, "contiguous"),
                              dict.fromkeys("PB", (4096, 1)), targets.target("sm_80"), None, frozenset(TENSORS))
    words = [arguments[s.split(".")[0]] if s.endswith("data") else extents[s.split(".")[1]] if s.startswith("dim") else
             arguments[s.split(".")[1]] for s in compiled.slots]
    words = [int(np.float32(w).view(np.int32)) if isinstance(w, float) else w for w in words]
    faulty = emulate.load(replaced(compiled.text(), r"bar\.sync 0;", "", number))
    try:
        faulty.launch(grid=(1,), block=(32 * compiled.warps,), arguments=[
            np.zeros(64), 64, np.zeros(1024, np.uint8), *words], shared_bytes=compiled.near_bytes,
            options=emulate.Options(lazy=True))
    except emulate.EmulationError:
        return
    assert ENTRY.compare(arguments, ENTRY.reference(arguments)) is not None
