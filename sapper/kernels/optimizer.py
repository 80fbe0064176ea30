"""AdamW (Loshchilov and Hutter, arXiv:1711.05101), after the gradient was clipped by its norm (Pascanu, Mikolov and
Bengio, arXiv:1211.5063).

    squares       sums of squares of PART numbers each
    clip_factor   norm = sqrt(sum of all), factor = min(1, limit / norm)
    adamw         g = factor * gradient; m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g**2;
                  p = keep * p - rate * m / (sqrt(v) * spread + epsilon)

keep, rate and spread are the caller's: of the step's own rate r, 1 - r * decay, r / (1 - beta1**step) and
1 / sqrt(1 - beta2**step).
"""

import numpy as np

import sapper as sp
from sapper import Tensor, each, f32, min, rsqrt, span, sqrt, sum, tiles, whole

from .record import Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

N, R = sp.dims("N R")
PART = 1 << 14


def parts_of(count: int) -> int:
    """How many sums `squares` makes of so many numbers."""
    return -(-count // PART)


@sp.kernel
def squares(x: Tensor[f32, N], y: Tensor[f32, R]):
    for r in each(R):
        n = whole(span(r * PART, min((r + 1) * PART, N)))
        y[r] = sum(x[n] * x[n], over=n)


@sp.kernel
def clip_factor(square: Tensor[f32, R], limit: f32, factor: Tensor[f32, 1], norm: Tensor[f32, 1]):
    for i in tiles(1):
        r = whole(R)
        total = sum(square[r], over=r)
        norm[i] = sqrt(total)
        factor[i] = min(1.0, limit * rsqrt(total))


@sp.kernel(in_place=[("next_p", "p"), ("next_m", "m"), ("next_v", "v")])
def adamw(
    p: Tensor[f32, N], m: Tensor[f32, N], v: Tensor[f32, N], gradient: Tensor[f32, N], factor: Tensor[f32, 1],
    keep: f32, rate: f32, spread: f32, beta1: f32, beta2: f32, epsilon: f32,
    next_p: Tensor[f32, N], next_m: Tensor[f32, N], next_v: Tensor[f32, N],
):
    for n in tiles(N):
        g = gradient[n] * factor[0]
        mean = beta1 * m[n] + (1.0 - beta1) * g
        square = beta2 * v[n] + (1.0 - beta2) * g * g
        next_m[n] = mean
        next_v[n] = square
        next_p[n] = keep * p[n] - rate * mean / (sqrt(square) * spread + epsilon)


# ------------------------------------------------------------------------------------------- references and arguments


def squares_reference(arguments: Arguments) -> dict[str, Array]:
    x = np.zeros(PART * len(arguments["y"]))
    x[: len(arguments["x"])] = arguments["x"]
    return {"y": np.square(x).reshape(-1, PART).sum(axis=1)}


def clip_reference(arguments: Arguments) -> dict[str, Array]:
    norm = np.sqrt(arguments["square"].astype(np.float64).sum(keepdims=True))
    return {"factor": np.minimum(1.0, arguments["limit"] / norm), "norm": norm}


def adamw_reference(arguments: Arguments) -> dict[str, Array]:
    p, m, v, gradient = (arguments[name].astype(np.float64) for name in ("p", "m", "v", "gradient"))
    g = gradient * arguments["factor"].astype(np.float64)
    beta1, beta2 = (float(np.float32(arguments[name])) for name in ("beta1", "beta2"))
    mean, square = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    step = arguments["rate"] * mean / (np.sqrt(square) * arguments["spread"] + arguments["epsilon"])
    return {"next_m": mean, "next_v": square, "next_p": arguments["keep"] * p - step}


def adamw_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    n = shape["N"]
    return {"p": normal(random, n), "m": normal(random, n), "v": np.square(normal(random, n)) + np.float32(0.01),
            "gradient": normal(random, n), "factor": np.full(1, 0.5, np.float32), "keep": 0.999, "rate": 0.01,
            "spread": 2.0, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "next_p": unwritten(n), "next_m": unwritten(n),
            "next_v": unwritten(n)}


KERNELS = (
    LibraryKernel(
        name="squares", kernel=squares, reference=squares_reference,
        make_arguments=lambda random, shape: {"x": normal(random, shape["N"]), "y": unwritten(parts_of(shape["N"]))},
        tolerance=Tolerance(2e-6, 0.0, "a sum of PART squares in f32, in any order"),
        cases=tuple(Case({"N": n}, flops=2 * n, bytes=4 * n + 4 * parts_of(n)) for n in (1 << 18, 1 << 24)),
        check_shapes=({"N": 0}, {"N": 1}, {"N": 19}, {"N": PART + 33}),
    ),
    LibraryKernel(
        name="clip_factor", kernel=clip_factor, reference=clip_reference,
        make_arguments=lambda random, shape: {"square": np.square(normal(random, shape["R"])), "limit": 1.5,
                                              "factor": unwritten(1), "norm": unwritten(1)},
        tolerance=Tolerance(2e-6, 0.0, "a sum of R terms in f32, in any order, and its root"),
        cases=(Case({"R": 8192}, flops=8192, bytes=4 * 8192 + 8),),
        check_shapes=({"R": 1}, {"R": 3}, {"R": 33}, {"R": 300}),
    ),
    LibraryKernel(
        name="adamw", kernel=adamw, reference=adamw_reference, make_arguments=adamw_arguments,
        tolerance=Tolerance(2e-6, 1e-6, "1 - beta is rounded in f32, 2**-25 of 0.05; then six roundings, and sums that "
                            "may cancel"),
        cases=tuple(Case({"N": n}, flops=14 * n, bytes=28 * n + 4) for n in (1 << 18, 1 << 24)),
        check_shapes=({"N": 0}, {"N": 1}, {"N": 19}, {"N": 515}),
    ),
)
