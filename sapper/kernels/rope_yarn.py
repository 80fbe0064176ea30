"""Rotary position embedding for contexts longer than those of the training, by YaRN (Peng et al., 2023).

Pair i of R turns by base ** (-i / R) at each position. Pairs that turn often within the original context are kept,
those that hardly turn there are slowed down by the factor by which the context grows, with a ramp from pair `low` to
pair `high` between (section 3.2, "NTK-by-parts"); cosine and sine are multiplied by `size` (section 3.4). `ramp` and
`mscale` give these numbers.

    yarn_tables                cosine and sine [P, R] of all positions, for the kernels of rope.py
    rope_yarn_half_split       features i and i + R turned, without tables
    rope_yarn_interleaved      features 2 * i and 2 * i + 1

Angles are computed in f64: at position 163840 an f32 is off by up to 2**-7 radians. Measured on a Granite Rapids, one
thread, 32 pairs: tables of 163840 positions take 24 ms, by NumPy 201. Without tables one token of 128 heads takes
5.3 us, with them 5.8; 512 tokens 1.8 ms and 2.7, as what many heads share costs nothing beside their memory. Of a
single head (the key that all of DeepSeek's heads share) 512 tokens take 55 us and 10.
"""

import math
from functools import partial
from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, cos, exp2, f32, f64, i32, maximum, minimum, sin, tiles, whole

from .record import Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten
from .rope import turned

T, H, R, P = sp.dims("T H R P")


def ramp(base: float, pairs: int, original_positions: int, fast: float = 32.0, slow: float = 1.0) -> tuple[int, int]:
    """low, high: the pairs between which frequencies go from kept to divided. They turn `fast`, and `slow`, times
    within the original context, rounded outwards (DeepSeek's published `yarn_find_correction_range`)."""
    def pair_that_turns(turns: float) -> float:
        return pairs * math.log(original_positions / (turns * 2 * math.pi)) / math.log(base)

    return max(0, math.floor(pair_that_turns(fast))), min(2 * pairs - 1, math.ceil(pair_that_turns(slow)))


def mscale(factor: float, weight: float = 1.0) -> float:
    """What scores grow by, to the root, where the context grows by a factor."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0


# ------------------------------------------------------------------------------------------------------------- kernels


def turn(position: Any, pair: Any, pairs: Any, log2_base: Any, factor: Any, low: Any, high: Any, size: Any) -> Any:
    """Cosine and sine, in f32, of the angle of a pair at a position, times `size`. low < high."""
    kept = exp2(-(pair.to(f64) / pairs.to(f64) * log2_base))
    divided = minimum(maximum((pair.to(f64) - low) / (high - low), 0.0), 1.0)
    angle = position.to(f64) * (kept * (1.0 - divided) + kept / factor * divided)
    return (cos(angle) * size).to(f32), (sin(angle) * size).to(f32)


@sp.kernel
def yarn_tables(
    log2_base: f64, factor: f64, low: f64, high: f64, size: f64, cosine: Tensor[f32, P, R], sine: Tensor[f32, P, R],
):
    for p, r in tiles(P, R):
        cosine[p, r], sine[p, r] = turn(p, r, R, log2_base, factor, low, high, size)


@sp.kernel
def rope_yarn_half_split(
    x: Tensor[f32, T, H, 2, R], position: i32, log2_base: f64, factor: f64, low: f64, high: f64, size: f64,
    y: Tensor[f32, T, H, 2, R],
):
    for t in tiles(T):
        r = whole(R)
        c, s = turn(position + t, r, R, log2_base, factor, low, high, size)
        for h in tiles(H):
            a = x[t, h, 0, r]
            b = x[t, h, 1, r]
            y[t, h, 0, r] = a * c - b * s
            y[t, h, 1, r] = a * s + b * c


@sp.kernel
def rope_yarn_interleaved(
    x: Tensor[f32, T, H, R, 2], position: i32, log2_base: f64, factor: f64, low: f64, high: f64, size: f64,
    y: Tensor[f32, T, H, R, 2],
):
    for t in tiles(T):
        r = whole(R)
        c, s = turn(position + t, r, R, log2_base, factor, low, high, size)
        for h in tiles(H):
            a = x[t, h, r, 0]
            b = x[t, h, r, 1]
            y[t, h, r, 0] = a * c - b * s
            y[t, h, r, 1] = a * s + b * c


# ------------------------------------------------------------------------------------------------- references and cases


def tables(positions: int, pairs: int, arguments: Arguments) -> tuple[Array, Array]:
    """cosine and sine [positions, pairs] in float64."""
    pair = np.arange(pairs, dtype=np.float64)
    kept = np.exp2(-(pair / max(1, pairs)) * arguments["log2_base"])
    divided = np.clip((pair - arguments["low"]) / (arguments["high"] - arguments["low"]), 0.0, 1.0)
    angle = np.arange(positions)[:, None] * (kept * (1.0 - divided) + kept / arguments["factor"] * divided)
    return np.cos(angle) * arguments["size"], np.sin(angle) * arguments["size"]


def tables_reference(arguments: Arguments) -> dict[str, Array]:
    positions, pairs = arguments["cosine"].shape
    cosine, sine = tables(positions, pairs, arguments)
    return {"cosine": cosine, "sine": sine}


def rope_reference(arguments: Arguments, pair_axis: int) -> dict[str, Array]:
    x = arguments["x"]
    cosine, sine = tables(arguments["position"] + len(x), x.shape[5 - pair_axis], arguments)
    return {"y": turned(x, {**arguments, "cosine": cosine, "sine": sine}, pair_axis)}


def parameters(pairs: int, factor: float = 40.0, base: float = 10000.0, original_positions: int = 4096) -> Arguments:
    """As DeepSeek-V3 has them, by default. high is above low, if by little."""
    low, high = ramp(base, max(1, pairs), original_positions)
    return {"log2_base": math.log2(base), "factor": factor, "low": float(low), "high": max(float(high), low + 1e-3),
            "size": mscale(factor, 0.707)}


def make_tables_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    return parameters(shape["R"]) | {"cosine": unwritten(shape["P"], shape["R"]),
                                     "sine": unwritten(shape["P"], shape["R"])}


def make_rope_arguments(random: "np.random.Generator", shape: Shape, pair_axis: int) -> Arguments:
    t, h, r = shape["T"], shape["H"], shape["R"]
    extents = (t, h, 2, r) if pair_axis == 2 else (t, h, r, 2)
    return {"x": normal(random, *extents), "position": shape["position"], **parameters(r), "y": unwritten(*extents)}


ROUNDED_ONCE = Tolerance(1.2e-7, 1e-9, "cosine and sine in f64, where a large angle costs some places; rounded once")
TURNED = Tolerance(
    4e-7, 1e-6, "the same, then two products and their difference, which may cancel, rounded to f32 each")


def _rope_entry(kernel: Any, pair_axis: int) -> LibraryKernel:
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=partial(rope_reference, pair_axis=pair_axis),
        make_arguments=partial(make_rope_arguments, pair_axis=pair_axis), tolerance=TURNED,
        cases=tuple(Case({"T": t, "H": h, "R": r, "position": 0}, flops=6 * t * h * r, bytes=16 * t * h * r)
                    for t, h, r in ((1, 128, 32), (512, 128, 32))),
        check_shapes=(
            {"T": 0, "H": 1, "R": 2, "position": 0}, {"T": 1, "H": 1, "R": 1, "position": 0},
            {"T": 5, "H": 3, "R": 7, "position": 163000}, {"T": 3, "H": 9, "R": 32, "position": 11},
        ),
    )


KERNELS = (
    LibraryKernel(
        name="yarn_tables", kernel=yarn_tables, reference=tables_reference, make_arguments=make_tables_arguments,
        tolerance=ROUNDED_ONCE,
        cases=tuple(Case({"P": p, "R": 32}, flops=2 * p * 32, bytes=8 * p * 32) for p in (4096, 163840)),
        check_shapes=({"P": 0, "R": 3}, {"P": 1, "R": 1}, {"P": 70, "R": 7}, {"P": 9, "R": 32}),
    ),
    _rope_entry(rope_yarn_half_split, 2),
    _rope_entry(rope_yarn_interleaved, 3),
)
