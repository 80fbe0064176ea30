"""AdamW (Loshchilov and Hutter, arXiv:1711.05101), after the gradient was clipped by its norm (Pascanu, Mikolov and
Bengio, arXiv:1211.5063).

    squares       sums of squares of PART numbers each
    clip_factor   norm = sqrt(sum of all), factor = min(1, limit / norm)
    adamw         g = factor * gradient; m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g**2;
                  p = keep * p - rate * m / (sqrt(v) * spread + epsilon)

    mean_loss     the mean of the losses whose targets count, those from 0 on
    step_numbers  what these take, and share = 1 / the number of targets that count, for gradients of a mean

keep, rate and spread are the caller's: of the step's own rate r, 1 - r * decay, r / (1 - beta1**step) and
1 / sqrt(1 - beta2**step). step_numbers makes them of its `recipe`, in f64: RECIPE names what is in it, NUMBERS what
comes out, of which "balance" is as it was (balance_experts in moe_gradient.py); `steps` counts the steps, 0 before the
first.
"""

import numpy as np

import sapper as sp
from sapper import Tensor, each, exp, f32, f64, i32, log, min, rsqrt, span, sqrt, sum, tiles, where, whole

from .record import Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

N, R = sp.dims("N R")
PART = 1 << 14
RECIPE = ("rate", "decay", "clip", "beta1", "beta2", "epsilon", "balance")
NUMBERS = ("share", "limit", "keep", "rate", "spread", "beta1", "beta2", "epsilon", "balance")


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


@sp.kernel
def mean_loss(losses: Tensor[f32, R], targets: Tensor[i32, R], mean: Tensor[f64, 1]):
    for i in tiles(1):
        r = whole(R)
        counts = targets[r] >= 0
        total = sum(where(counts, losses[r].to(f64), 0.0), over=r)
        mean[i] = total / sum(where(counts, 1, 0), over=r).to(f64)


@sp.kernel(in_place=[("next_steps", "steps")])
def step_numbers(
    recipe: Tensor[f64, 7], targets: Tensor[i32, R], steps: Tensor[f64, 1], next_steps: Tensor[f64, 1],
    numbers: Tensor[f32, 9],
):
    for i in tiles(1):
        r = whole(R)
        counted = sum(where(targets[r] >= 0, 1, 0), over=r)
        rate, decay, clip = recipe[i], recipe[i + 1], recipe[i + 2]
        beta1, beta2, epsilon = recipe[i + 3], recipe[i + 4], recipe[i + 5]
        step = steps[i] + 1.0
        next_steps[i] = step
        numbers[i] = (1.0 / counted.to(f64)).to(f32)
        numbers[i + 1] = clip.to(f32)
        numbers[i + 2] = (1.0 - rate * decay).to(f32)
        numbers[i + 3] = (rate / (1.0 - exp(step * log(beta1)))).to(f32)
        numbers[i + 4] = (1.0 / sqrt(1.0 - exp(step * log(beta2)))).to(f32)
        numbers[i + 5] = beta1.to(f32)
        numbers[i + 6] = beta2.to(f32)
        numbers[i + 7] = epsilon.to(f32)
        numbers[i + 8] = recipe[i + 6].to(f32)


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


def mean_loss_reference(arguments: Arguments) -> dict[str, Array]:
    losses = arguments["losses"].astype(np.float64)[arguments["targets"] >= 0]
    return {"mean": losses.mean(keepdims=True)}


def some_targets(random: "np.random.Generator", count: int) -> Array:
    """Of which about one in three does not count; the first does."""
    targets = random.integers(-50, 100, count).astype(np.int32)
    targets[0] = 7
    return targets


def step_numbers_reference(arguments: Arguments) -> dict[str, Array]:
    rate, decay, clip, *betas, epsilon, balance = (float(number) for number in arguments["recipe"])
    step = arguments["steps"] + 1.0
    mean, square = (1.0 - beta ** step[0] for beta in betas)
    counted = int((arguments["targets"] >= 0).sum())
    return {"next_steps": step, "numbers": np.array(
        [1.0 / counted, clip, 1.0 - rate * decay, rate / mean, square**-0.5, *betas, epsilon, balance])}


KERNELS = (
    LibraryKernel(
        name="mean_loss", kernel=mean_loss, reference=mean_loss_reference,
        make_arguments=lambda random, shape: {
            "losses": normal(random, shape["R"]), "targets": some_targets(random, shape["R"]),
            "mean": np.full(1, np.nan)},
        tolerance=Tolerance(1e-13, 1e-14, "a sum of R terms in f64, in any order, which may cancel"),
        cases=(Case({"R": 8192}, flops=8192, bytes=8 * 8192 + 8),),
        check_shapes=({"R": 1}, {"R": 3}, {"R": 33}, {"R": 300}),
    ),
    LibraryKernel(
        name="step_numbers", kernel=step_numbers, reference=step_numbers_reference,
        make_arguments=lambda random, shape: {
            "recipe": np.array([3e-4, 0.1, 1.0, 0.9, 0.95, 1e-8, 1e-3]), "targets": some_targets(random, shape["R"]),
            "steps": np.array([2.0]), "next_steps": np.full(1, np.nan),
            "numbers": unwritten(9)},
        tolerance=Tolerance(2.0**-23, 0.0, "one rounding to f32, and those of f64, which may move it to the next f32"),
        cases=(Case({"R": 512}, flops=520, bytes=4 * 512 + 108),),
        check_shapes=({"R": 1}, {"R": 3}, {"R": 33}, {"R": 300}),
    ),
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
