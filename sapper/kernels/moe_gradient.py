"""Gradients of a mixture of experts (moe.py, gate.py). The rows of each expert are one range, as `group_tokens` left
them; a token's row of its expert k is place[t, k].

    grouped_matmul_nn        dx[m] = dy[m] @ w[e] for the rows m of each expert e
    grouped_matmul_tn        dw[e] = the sum over these rows of dy[m] times x[m]. With rows a line further apart
                             (moe.row_apart) 2048 x 1024 x 768 for 16 experts take 0.6 to 0.75 of the time on a Zen 3
    expert_swiglu_gradient   hidden = silu(gate) * up, of which a token's rows meet weights that its gate gave: from the
                             gradient dy of what is to be multiplied by the weight, dgate and dup; dweights; and
                             hidden times the weight, which the gradient of the next matrix is made with
    gate_softmax_gradient, gate_sigmoid_gradient    from dweights to dlogits. Which experts are chosen is taken for
                             given: weights depend on the scores of the chosen ones, and where scores are a softmax
                             these on all logits. The bias of the choice has no gradient
    balance_experts          bias + rate where an expert got fewer rows than the mean of all, bias - rate where it got
                             more (DeepSeek-V3, 2024, section 2.1.2)
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, each, exp, f32, i32, max, sigmoid, span, sum, tiles, where, whole, zeros

from .gate import SMALLEST_TOTAL
from .moe import TOLERANCE
from .record import NUMPY_DTYPES, Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

T, K, E, J, F, B, L = sp.dims("T K E J F B L")


def make_grouped_matmul_nn(weight: Any) -> Any:
    @sp.kernel(name=f"grouped_matmul_nn_{weight.name}")
    def grouped_matmul_nn(
        x: Tensor[f32, J, F], start: Tensor[i32, E], stop: Tensor[i32, E], w: Tensor[weight, E, F, B, L],
        y: Tensor[f32, J, B, L],
    ):
        for e, b in each(E, B, disjoint=True):
            for m, l in tiles(span(start[e], stop[e]), L):
                acc = zeros(m, l, dtype=f32)
                for f in tiles(F):
                    acc += x[m, f] @ w[e, f, b, l]
                y[m, b, l] = acc

    return grouped_matmul_nn


grouped_matmul_nn_f32 = make_grouped_matmul_nn(f32)
grouped_matmul_nn_bf16 = make_grouped_matmul_nn(bf16)


@sp.kernel
def grouped_matmul_tn_f32(
    dy: Tensor[f32, J, B, L], x: Tensor[f32, J, F], start: Tensor[i32, E], stop: Tensor[i32, E],
    dw: Tensor[f32, E, B, L, F],
):
    """How long sums are is not known before, so that rows are met where they lie: those of a block, the width of a few
    lines, stay in the second cache for all columns."""
    for e in each(E):
        for b in each(B):
            for l, f in tiles(L, F):
                acc = zeros(l, f, dtype=f32)
                for m in tiles(span(start[e], stop[e])):
                    acc += dy[m, b, l] @ x[m, f]
                dw[e, b, l, f] = acc


@sp.kernel(in_place=[("weighted", "dy")])
def expert_swiglu_gradient(
    gate: Tensor[f32, J, F], up: Tensor[f32, J, F], dy: Tensor[f32, J, F], place: Tensor[i32, T, K],
    weights: Tensor[f32, T, K], dgate: Tensor[f32, J, F], dup: Tensor[f32, J, F], dweights: Tensor[f32, T, K],
    weighted: Tensor[f32, J, F],
):
    for t, k in each(T, K, disjoint=True):
        m = place[t, k]
        weight = weights[t, k]
        f = whole(F)
        part = sigmoid(gate[m, f])
        silu = gate[m, f] * part
        hidden = silu * up[m, f]
        given = dy[m, f]
        dweights[t, k] = sum(given * hidden, over=f)
        dup[m, f] = weight * given * silu
        dgate[m, f] = weight * given * up[m, f] * (part + silu * (1.0 - part))
        weighted[m, f] = weight * hidden


def through_weights(score, experts, dweights, t, e, normalise, scale):
    """The gradient of the scores of a token."""
    dscore = zeros(e, dtype=f32)
    taken = zeros(e, dtype=f32)
    for k in range(K):
        dscore += where(e == experts[t, k], dweights[t, k] * scale, 0.0)
        taken += where(e == experts[t, k], 1.0, 0.0)
    total = sum(taken * score, over=e) + SMALLEST_TOTAL
    along = sum(dscore * score, over=e) / total if normalise else 0.0
    return taken * (dscore - along) * (1.0 / total if normalise else 1.0)


@sp.kernel
def gate_softmax_gradient(
    logits: Tensor[f32, T, E], experts: Tensor[i32, T, K], dweights: Tensor[f32, T, K], normalise: bool, scale: f32,
    dlogits: Tensor[f32, T, E],
):
    for t in each(T):
        e = whole(E)
        row = logits[t, e]
        power = exp(row - max(row, over=e))
        score = power / sum(power, over=e)
        dscore = through_weights(score, experts, dweights, t, e, normalise, scale)
        dlogits[t, e] = score * (dscore - sum(dscore * score, over=e))


@sp.kernel
def gate_sigmoid_gradient(
    logits: Tensor[f32, T, E], experts: Tensor[i32, T, K], dweights: Tensor[f32, T, K], normalise: bool, scale: f32,
    dlogits: Tensor[f32, T, E],
):
    for t in each(T):
        e = whole(E)
        score = sigmoid(logits[t, e])
        dscore = through_weights(score, experts, dweights, t, e, normalise, scale)
        dlogits[t, e] = dscore * score * (1.0 - score)


@sp.kernel(in_place=[("next_bias", "bias")])
def balance_experts(
    start: Tensor[i32, E], stop: Tensor[i32, E], rate: f32, bias: Tensor[f32, E], next_bias: Tensor[f32, E],
):
    for e in tiles(E):
        share, all_rows = (stop[e] - start[e]) * E.to(i32), stop[E - 1]
        next_bias[e] = bias[e] + rate * where(share < all_rows, 1.0, where(share > all_rows, -1.0, 0.0))


# ------------------------------------------------------------------------------------------- references and arguments


def _wide(arguments: Arguments, *names: str) -> tuple[Array, ...]:
    return tuple(arguments[name].astype(np.float64) for name in names)


def nn_reference(arguments: Arguments) -> dict[str, Array]:
    x, w = _wide(arguments, "x", "w")
    y = np.empty(arguments["y"].shape)
    for e, (start, stop) in enumerate(zip(arguments["start"], arguments["stop"], strict=True)):
        y[start:stop] = np.einsum("mf,fbl->mbl", x[start:stop], w[e])
    return {"y": y}


def tn_reference(arguments: Arguments) -> dict[str, Array]:
    dy, x = _wide(arguments, "dy", "x")
    return {"dw": np.stack([np.einsum("mbl,mf->blf", dy[start:stop], x[start:stop])
                            for start, stop in zip(arguments["start"], arguments["stop"], strict=True)])}


def swiglu_reference(arguments: Arguments) -> dict[str, Array]:
    gate, up, dy, weights = _wide(arguments, "gate", "up", "dy", "weights")
    place = arguments["place"]
    of_row = np.empty((len(gate), 1))
    of_row[place.reshape(-1), 0] = weights.reshape(-1)
    part = 1.0 / (1.0 + np.exp(-gate))
    hidden = gate * part * up
    return {"dgate": of_row * dy * up * part * (1.0 + gate * (1.0 - part)), "dup": of_row * dy * gate * part,
            "dweights": (dy * hidden).sum(axis=1)[place], "weighted": of_row * hidden}


def gate_reference(arguments: Arguments, softmax: bool) -> dict[str, Array]:
    logits, dweights = _wide(arguments, "logits", "dweights")
    experts, scale = arguments["experts"], arguments["scale"]
    power = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    score = power / power.sum(axis=1, keepdims=True) if softmax else 1.0 / (1.0 + np.exp(-logits))
    taken = np.take_along_axis(score, experts, axis=1)
    dtaken = scale * dweights
    if arguments["normalise"]:
        total = taken.sum(axis=1, keepdims=True) + SMALLEST_TOTAL
        dtaken = (dtaken - (dtaken * taken).sum(axis=1, keepdims=True) / total) / total
    dscore = np.zeros(score.shape)
    np.put_along_axis(dscore, experts, dtaken, axis=1)
    if softmax:
        return {"dlogits": score * (dscore - (dscore * score).sum(axis=1, keepdims=True))}
    return {"dlogits": dscore * score * (1.0 - score)}


def balance_reference(arguments: Arguments) -> dict[str, Array]:
    counts = arguments["stop"] - arguments["start"]
    return {"next_bias": arguments["bias"] + arguments["rate"] * np.sign(counts.mean() - counts)}


def _ranges(random: "np.random.Generator", e: int, j: int) -> Arguments:
    """Of experts of uneven load: every third has no rows."""
    busy = [n for n in range(e) if n % 3 != 1] or [0]
    counts = np.bincount(random.choice(busy, j), minlength=e)
    stop = np.cumsum(counts).astype(np.int32)
    return {"start": (stop - counts).astype(np.int32), "stop": stop}


def nn_arguments(random: "np.random.Generator", shape: Shape, weight: str) -> Arguments:
    e, f, b, l, j = (shape[name] for name in "EFBLJ")
    return {"x": normal(random, j, f), **_ranges(random, e, j),
            "w": normal(random, e, f, b, l, dtype=weight, scale=1.0 / np.sqrt(f + 1.0)), "y": unwritten(j, b, l)}


def tn_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    e, b, l, f, j = (shape[name] for name in "EBLFJ")
    return {"dy": normal(random, j, b, l), "x": normal(random, j, f, scale=1.0 / np.sqrt(j + 1.0)),
            **_ranges(random, e, j), "dw": unwritten(e, b, l, f)}


def swiglu_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    t, k, f = (shape[name] for name in "TKF")
    j = t * k
    return {"gate": normal(random, j, f, scale=2.0), "up": normal(random, j, f), "dy": normal(random, j, f),
            "place": random.permutation(j).reshape(t, k).astype(np.int32), "weights": random.random((t, k), np.float32),
            "dgate": unwritten(j, f), "dup": unwritten(j, f), "dweights": unwritten(t, k), "weighted": unwritten(j, f)}


def gate_arguments(random: "np.random.Generator", shape: Shape, normalise: bool) -> Arguments:
    t, k, e = (shape[name] for name in "TKE")
    experts = np.stack([random.permutation(e)[:k] for _ in range(t)]) if t else np.empty((0, k))
    return {"logits": normal(random, t, e), "experts": experts.astype(np.int32), "dweights": normal(random, t, k),
            "normalise": normalise, "scale": 2.5, "dlogits": unwritten(t, e)}


def balance_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    """Rows for each expert on average: 4, which some have."""
    e = shape["E"]
    return {**_ranges(random, e, 4 * e), "rate": 0.001, "bias": normal(random, e, scale=0.1), "next_bias": unwritten(e)}


def _grouped_shape(names: str, *extents: int) -> dict[str, int]:
    return dict(zip(names, extents, strict=True))


def _gate_entry(kernel: Any, softmax: bool) -> LibraryKernel:
    """The published softmax is not normalised, the sigmoid is."""
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=lambda arguments: gate_reference(arguments, softmax),
        make_arguments=lambda random, shape: gate_arguments(random, shape, not softmax),
        tolerance=Tolerance(2e-5, 2e-6, "scores within a few ulp, sums in any order, and differences that may cancel"),
        cases=tuple(Case({"T": 512, "K": k, "E": e}, flops=512 * e * (8 + 4 * k), bytes=4 * 512 * (2 * e + 2 * k))
                    for k, e in ((6, 64), (8, 256))),
        check_shapes=({"T": 0, "K": 2, "E": 4}, {"T": 1, "K": 1, "E": 1}, {"T": 5, "K": 3, "E": 8},
                      {"T": 4, "K": 6, "E": 33}),
    )


def _nn_entry(kernel: Any, weight: str) -> LibraryKernel:
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=nn_reference,
        make_arguments=lambda random, shape: nn_arguments(random, shape, weight), tolerance=TOLERANCE,
        cases=(Case(_grouped_shape("EFBLJ", 16, 1024, 12, 64, 2048), flops=2 * 2048 * 1024 * 768,
                    bytes=NUMPY_DTYPES[weight].itemsize * 16 * 1024 * 768 + 4 * 2048 * (1024 + 768) + 8 * 16),),
        check_shapes=tuple(_grouped_shape("EFBLJ", *extents) for extents in (
            (2, 3, 1, 4, 0), (1, 1, 1, 1, 1), (5, 3, 1, 7, 11), (3, 33, 2, 19, 29))),
        dtype=weight,
    )


KERNELS = (
    _nn_entry(grouped_matmul_nn_f32, "f32"),
    _nn_entry(grouped_matmul_nn_bf16, "bf16"),
    LibraryKernel(
        name="grouped_matmul_tn_f32", kernel=grouped_matmul_tn_f32, reference=tn_reference, make_arguments=tn_arguments,
        tolerance=TOLERANCE,
        cases=(Case(_grouped_shape("EBLFJ", 16, 16, 64, 768, 2048), flops=2 * 2048 * 1024 * 768,
                    bytes=4 * (16 * 1024 * 768 + 2048 * (1024 + 768)) + 8 * 16),),
        check_shapes=tuple(_grouped_shape("EBLFJ", *extents) for extents in (
            (2, 1, 3, 4, 0), (1, 1, 1, 1, 1), (5, 1, 7, 3, 11), (3, 2, 19, 33, 29))),
    ),
    LibraryKernel(
        name="expert_swiglu_gradient", kernel=expert_swiglu_gradient, reference=swiglu_reference,
        make_arguments=swiglu_arguments,
        tolerance=Tolerance(1e-5, 1e-5, "sigmoid is within 3 ulp, 1 - sigmoid keeps its error; a sum of F products"),
        cases=(Case({"T": 512, "K": 6, "F": 768}, flops=20 * 512 * 6 * 768, bytes=4 * 512 * 6 * (6 * 768 + 3)),),
        check_shapes=({"T": 0, "K": 2, "F": 3}, {"T": 1, "K": 1, "F": 1}, {"T": 5, "K": 3, "F": 19},
                      {"T": 4, "K": 6, "F": 130}),
    ),
    _gate_entry(gate_softmax_gradient, True),
    _gate_entry(gate_sigmoid_gradient, False),
    LibraryKernel(
        name="balance_experts", kernel=balance_experts, reference=balance_reference, make_arguments=balance_arguments,
        tolerance=Tolerance(2e-7, 1e-9, "one addition, rounded to f32, of a rate that is"),
        cases=(Case({"E": 256}, flops=4 * 256, bytes=16 * 256),),
        check_shapes=({"E": 1}, {"E": 4}, {"E": 19}, {"E": 64}),
    ),
)
