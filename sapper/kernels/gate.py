"""The gate of a mixture of experts: from the router's logits to the experts of each token and their weights.

logits [T, G, N]: of N experts in each of G groups, expert g * N + n. Of each token the `kept` best groups are looked
at, and of their experts the `chosen` best are taken, the best first; among equals the one of lower index.

    softmax   scores are a softmax over all experts; a group is as good as its best expert (DeepSeek-V2, 2024)
    sigmoid   scores are sigmoids; experts are compared by score + bias, which is finite, a group of two or more by the
              sum of its two best (DeepSeek-V3, 2024)

A weight is the score without the bias, over the sum of those taken where `normalise` says so, times `scale`. experts,
weights [T, K]: the places after the first `chosen` get the shared experts, which are numbered from G * N on and have
weight 1.
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, argmax, each, exp, f32, i32, max, min, sigmoid, sum, where, whole, zeros

from .record import Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

T, G, N, K = sp.dims("T G N K")
MINUS_INFINITY = float("-inf")
SMALLEST_TOTAL = 1e-20
"""Keeps weights finite where all scores are 0, as the published code does."""


def choose(score, choice, group, t, g, n, kept, chosen, normalise, scale, experts, weights):
    """The rounds of both choices. choice, score: tiles over the groups g and their experts n; group: a tile over g."""
    count = G * N
    expert = g * N + n
    open_groups = g < 0
    for _ in range(kept):
        best_group = argmax(where(open_groups, MINUS_INFINITY, group), over=g)
        open_groups = open_groups | (g == best_group)
    left = where(open_groups, choice, MINUS_INFINITY)
    total = zeros(dtype=f32)
    for k in range(chosen):
        best = max(left, over=(g, n))
        # No index is out of range, whatever the logits: if all are NaN, the last expert is taken.
        found = min(where(left == best, expert, count - 1), over=(g, n))
        weight = sum(where(expert == found, score, 0.0), over=(g, n))
        left = where(expert == found, MINUS_INFINITY, left)
        total = total + weight
        experts[t, k] = found.to(i32)
        weights[t, k] = weight
    factor = scale / (total + SMALLEST_TOTAL) if normalise else scale
    for k in range(chosen):
        weights[t, k] = weights[t, k] * factor
    for k in range(chosen, K):
        experts[t, k] = (count + k - chosen).to(i32)
        weights[t, k] = zeros(dtype=f32) + 1.0


@sp.kernel
def gate_softmax(
    logits: Tensor[f32, T, G, N], kept: i32, chosen: i32, normalise: bool, scale: f32, experts: Tensor[i32, T, K],
    weights: Tensor[f32, T, K],
):
    for t in each(T):
        g = whole(G)
        n = whole(N)
        row = logits[t, g, n]
        power = exp(row - max(row, over=(g, n)))
        score = power / sum(power, over=(g, n))
        choose(score, score, max(score, over=n), t, g, n, kept, chosen, normalise, scale, experts, weights)


@sp.kernel
def gate_sigmoid(
    logits: Tensor[f32, T, G, N], bias: Tensor[f32, G, N], kept: i32, chosen: i32, normalise: bool, scale: f32,
    experts: Tensor[i32, T, K], weights: Tensor[f32, T, K],
):
    for t in each(T):
        g = whole(G)
        n = whole(N)
        score = sigmoid(logits[t, g, n])
        choice = score + bias[g, n]
        first = argmax(choice, over=n)
        second = max(where(n == first, MINUS_INFINITY, choice), over=n)
        group = max(choice, over=n) + second
        choose(score, choice, group, t, g, n, kept, chosen, normalise, scale, experts, weights)


def reference(arguments: Arguments) -> dict[str, Array]:
    logits = arguments["logits"].astype(np.float64)
    tokens, groups, size = logits.shape
    kept, chosen = arguments["kept"], arguments["chosen"]
    if "bias" in arguments:
        score = 1.0 / (1.0 + np.exp(-logits))
        choice = score + arguments["bias"]
        group = np.sort(choice, axis=2)[:, :, -2:].sum(axis=2)
    else:
        power = np.exp(logits - logits.max(axis=(1, 2), keepdims=True, initial=-np.inf))
        score = choice = power / power.sum(axis=(1, 2), keepdims=True)
        group = score.max(axis=2)
    dropped = np.argsort(-group, axis=1, kind="stable")[:, kept:]
    left = choice.copy()
    np.put_along_axis(left, dropped[:, :, None], -np.inf, axis=1)
    experts = np.argsort(-left.reshape(tokens, groups * size), axis=1, kind="stable")[:, :chosen]
    weights = np.take_along_axis(score.reshape(tokens, groups * size), experts, axis=1)
    if arguments["normalise"]:
        weights = weights / (weights.sum(axis=1, keepdims=True) + SMALLEST_TOTAL)
    shared = arguments["experts"].shape[1] - chosen
    numbers = np.broadcast_to(groups * size + np.arange(shared), (tokens, shared))
    return {
        "experts": np.concatenate([experts, numbers], axis=1).astype(np.int32),
        "weights": np.concatenate([weights * arguments["scale"], np.ones((tokens, shared))], axis=1),
    }


def make_arguments(random: "np.random.Generator", shape: Shape, biased: bool) -> Arguments:
    """Each group's last two experts are equals, so that there are ties."""
    t, g, n, k = shape["T"], shape["G"], shape["N"], shape["K"]
    logits = normal(random, t, g, n)
    logits[:, :, -2:-1] = logits[:, :, -1:]
    arguments: Arguments = {"logits": logits}
    if biased:
        arguments["bias"] = normal(random, g, n, scale=0.1)
        arguments["bias"][:, -2:-1] = arguments["bias"][:, -1:]
    return arguments | {
        "kept": shape["kept"], "chosen": shape["chosen"], "normalise": biased, "scale": 2.5,
        "experts": unwritten(t, k, dtype="i32"), "weights": unwritten(t, k),
    }


def torch_peer(arguments: Arguments) -> Any:
    """Softmax and choice in PyTorch's own steps, for gates without groups."""
    import torch

    logits = torch.from_numpy(arguments["logits"]).flatten(1)
    chosen = arguments["chosen"]
    return lambda: torch.topk(torch.softmax(logits, dim=-1), chosen, dim=-1)


def _shape(t: int, g: int, n: int, kept: int, chosen: int, shared: int) -> dict[str, int]:
    return {"T": t, "G": g, "N": n, "K": chosen + shared, "kept": kept, "chosen": chosen}


def _entry(kernel: Any, biased: bool, extents: tuple[tuple[int, int, int, int, int, int], ...]) -> LibraryKernel:
    return LibraryKernel(
        name=kernel.name,
        kernel=kernel,
        reference=reference,
        make_arguments=lambda random, shape: make_arguments(random, shape, biased),
        tolerance=Tolerance(1e-5, 1e-7, "a score is within a few ulp, the sum of those taken in any order"),
        cases=tuple(
            Case(_shape(t, g, n, kept, chosen, shared), flops=(6 + chosen) * t * g * n,
                 bytes=4 * t * g * n + (4 * g * n if biased else 0) + 8 * t * (chosen + shared))
            for t, g, n, kept, chosen, shared in extents
        ),
        check_shapes=(
            _shape(0, 1, 4, 1, 2, 0), _shape(1, 1, 2, 1, 2, 1), _shape(5, 4, 2, 2, 3, 2), _shape(3, 1, 64, 1, 6, 2),
            _shape(4, 8, 20, 3, 6, 1),
        ),
        peers={} if biased else {"torch": torch_peer},
    )


KERNELS = (
    _entry(gate_softmax, False, ((1, 1, 64, 1, 6, 2), (512, 1, 64, 1, 6, 2))),
    _entry(gate_sigmoid, True, ((1, 8, 32, 4, 8, 1), (512, 8, 32, 4, 8, 1))),
)
