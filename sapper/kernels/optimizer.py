"""AdamW (Loshchilov and Hutter, arXiv:1711.05101), after the gradient was clipped by its norm (Pascanu, Mikolov and
Bengio, arXiv:1211.5063).

    squares       sums of squares of PART numbers each
    clip_factor   norm = sqrt(sum of all), factor = min(1, limit / norm)
    adamw         g = factor * gradient; m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g**2;
                  p = keep * p - rate * m / (sqrt(v) * spread + epsilon)

    mean_loss     the mean of the losses whose targets count, those from 0 on
    step_numbers  what these take, and share = 1 / the number of targets that count, for gradients of a mean
    plan_step     the recipe of the step that comes next, of a program's SETTINGS, each a quotient of two whole numbers:
                  the rate rises over the first `warmup` steps, and falls along half a cosine to `least` of itself
    tell_step     a loss in ten thousandths and a norm in hundredths, and whether both are finite: what is printed

keep, rate and spread are the caller's: of the step's own rate r, 1 - r * decay, r / (1 - beta1**step) and
1 / sqrt(1 - beta2**step). step_numbers makes them of its `recipe`, in f64: RECIPE names what is in it, NUMBERS what
comes out, of which "balance" is as it was (balance_experts in moe_gradient.py); `steps` counts the steps, 0 before the
first.
"""

import builtins
import math
from typing import Any

import numpy as np

import sapper as sp
from sapper import (
    Tensor,
    abs,
    cos,
    each,
    exp,
    f32,
    f64,
    i32,
    i64,
    log,
    max,
    min,
    rsqrt,
    span,
    sqrt,
    sum,
    tiles,
    where,
    whole,
)

from .record import Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

N, R = sp.dims("N R")
PART = 1 << 14
RECIPE = ("rate", "decay", "clip", "beta1", "beta2", "epsilon", "balance")
NUMBERS = ("share", "limit", "keep", "rate", "spread", "beta1", "beta2", "epsilon", "balance")
SETTINGS = ("steps", "rate", "warmup", "decay", "clip", "balance")
FIXED = ("least", "beta1", "beta2", "epsilon")
"""What no program sets."""
TOLD = 2_000_000_000
"""The largest number that is told."""


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


def setting(settings: Any, i: Any, row: int) -> Any:
    return settings[i + row, 0].to(f64) / settings[i + row, 1].to(f64)


@sp.kernel
def plan_step(
    settings: Tensor[i64, 6, 2], fixed: Tensor[f64, 4], steps: Tensor[f64, 1], recipe: Tensor[f64, 7],
):
    for i in tiles(1):
        number = steps[i] + 1.0
        total, highest, warmup = setting(settings, i, 0), setting(settings, i, 1), setting(settings, i, 2)
        done = min((number - warmup) / max(1.0, total - warmup), 1.0)
        fallen = fixed[i] + (1.0 - fixed[i]) * 0.5 * (1.0 + cos(math.pi * done))
        recipe[i] = where(number <= warmup, highest * number / warmup, highest * fallen)
        recipe[i + 1] = setting(settings, i, 3)
        recipe[i + 2] = setting(settings, i, 4)
        recipe[i + 3] = fixed[i + 1]
        recipe[i + 4] = fixed[i + 2]
        recipe[i + 5] = fixed[i + 3]
        recipe[i + 6] = setting(settings, i, 5)


@sp.kernel
def tell_step(loss: Tensor[f64, 1], norm: Tensor[f32, 1], told: Tensor[i32, 3]):
    for i in tiles(1):
        told[i] = min(loss[i] * 1e4 + 0.5, TOLD).to(i32)
        told[i + 1] = min(norm[i].to(f64) * 100.0 + 0.5, TOLD).to(i32)
        told[i + 2] = where((abs(loss[i]) < math.inf) & (norm[i] < math.inf), 1, 0)


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


def plan_reference(arguments: Arguments) -> dict[str, Array]:
    total, highest, warmup, decay, clip, balance = (float(a) / float(b) for a, b in arguments["settings"])
    least, *others = (float(number) for number in arguments["fixed"])
    number = float(arguments["steps"][0]) + 1.0
    done = builtins.min((number - warmup) / builtins.max(1.0, total - warmup), 1.0)
    rate = highest * (number / warmup if number <= warmup else least + (1.0 - least) * 0.5 * (
        1.0 + math.cos(math.pi * done)))
    return {"recipe": np.array([rate, decay, clip, *others, balance])}


def plan_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    """A step before the rate's highest, or behind it."""
    return {"settings": np.array([(500, 1), (1, 10_000), (10, 1), (1, 10), (1, 1), (0, 1)]),
            "fixed": np.array([0.1, 0.9, 0.95, 1e-8]), "steps": np.array([float(random.integers(0, 500))]),
            "recipe": np.full(7, np.nan)}


def tell_reference(arguments: Arguments) -> dict[str, Array]:
    loss, norm = float(arguments["loss"][0]), float(arguments["norm"][0])
    return {"told": np.array([math.floor(loss * 1e4 + 0.5), math.floor(norm * 100.0 + 0.5), 1])}


KERNELS = (
    LibraryKernel(
        name="plan_step", kernel=plan_step, reference=plan_reference, make_arguments=plan_arguments,
        tolerance=Tolerance(1e-14, 0.0, "six roundings in f64, and a cosine within 1.5 ulp"),
        cases=(Case({}, flops=30, bytes=192),), check_shapes=({}, {}),
    ),
    LibraryKernel(
        name="tell_step", kernel=tell_step, reference=tell_reference,
        make_arguments=lambda random, shape: {
            "loss": random.uniform(0.0, 12.0, 1), "norm": random.uniform(0.0, 9.0, 1).astype(np.float32),
            "told": np.zeros(3, np.int32)},
        tolerance=Tolerance(0.0, 0.0, "whole numbers"), cases=(Case({}, flops=6, bytes=24),), check_shapes=({},),
    ),
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
