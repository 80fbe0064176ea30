"""Gradients of what a model computes besides its matrices and attention (attention_gradient.py).

dy stands for the gradient of the loss by y. `carried` is what the residual stream brings past a norm: that gradient and
the one through the norm add up. A gradient of a vector of weights is a sum over all tokens.

    rms_norm_gradient        of rms_norm: dx = carried + its own, dgain
    head_norm_gradient       of head_norm, or of rms_norm as one head, past which nothing is carried
    rms_norm_past, head_norm_past    the same where the gain stays as it is: dx alone
    swiglu_gradient          of y = silu(gate) * up
    cross_entropy_gradient   what each token costs, and dlogits of the sum of that times `share`; a target below 0 costs
                             nothing
    embedding_gradient       adds to rows of a table's gradient
    column_sums              of a bias that all rows share; of losses, their sum
    clear                    zeros
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, each, exp, f32, i32, log, max, rsqrt, sigmoid, sum, tiles, where, whole

from .record import EXACT, Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

M, H, N, V = sp.dims("M H N V")


@sp.kernel(in_place=[("dx", "carried")])
def rms_norm_gradient(
    x: Tensor[f32, M, N], gain: Tensor[f32, N], epsilon: f32, dy: Tensor[f32, M, N], carried: Tensor[f32, M, N],
    factor: Tensor[f32, M], dx: Tensor[f32, M, N], dgain: Tensor[f32, N],
):
    """factor: what each row was multiplied by, for the second loop."""
    for m in tiles(M):
        n = whole(N)
        row, d = x[m, n], dy[m, n] * gain[n]
        scale = rsqrt(sum(row * row, over=n) / N.to(f32) + epsilon)
        along = sum(d * row, over=n) * scale * scale / N.to(f32)
        dx[m, n] = carried[m, n] + scale * (d - row * along)
        factor[m] = scale
    for n in tiles(N):
        m = whole(M)
        dgain[n] = sum(dy[m, n] * x[m, n] * factor[m], over=m)


@sp.kernel
def head_norm_gradient(
    x: Tensor[f32, M, H, N], gain: Tensor[f32, N], epsilon: f32, dy: Tensor[f32, M, H, N], factor: Tensor[f32, M, H],
    dx: Tensor[f32, M, H, N], dgain: Tensor[f32, N],
):
    for m, h in tiles(M, H):
        n = whole(N)
        row, d = x[m, h, n], dy[m, h, n] * gain[n]
        scale = rsqrt(sum(row * row, over=n) / N.to(f32) + epsilon)
        along = sum(d * row, over=n) * scale * scale / N.to(f32)
        dx[m, h, n] = scale * (d - row * along)
        factor[m, h] = scale
    for n in tiles(N):
        m, h = whole(M), whole(H)
        dgain[n] = sum(dy[m, h, n] * x[m, h, n] * factor[m, h], over=(m, h))


@sp.kernel(in_place=[("dx", "carried")])
def rms_norm_past(
    x: Tensor[f32, M, N], gain: Tensor[f32, N], epsilon: f32, dy: Tensor[f32, M, N], carried: Tensor[f32, M, N],
    dx: Tensor[f32, M, N],
):
    for m in tiles(M):
        n = whole(N)
        row, d = x[m, n], dy[m, n] * gain[n]
        scale = rsqrt(sum(row * row, over=n) / N.to(f32) + epsilon)
        along = sum(d * row, over=n) * scale * scale / N.to(f32)
        dx[m, n] = carried[m, n] + scale * (d - row * along)


@sp.kernel
def head_norm_past(
    x: Tensor[f32, M, H, N], gain: Tensor[f32, N], epsilon: f32, dy: Tensor[f32, M, H, N], dx: Tensor[f32, M, H, N],
):
    for m, h in tiles(M, H):
        n = whole(N)
        row, d = x[m, h, n], dy[m, h, n] * gain[n]
        scale = rsqrt(sum(row * row, over=n) / N.to(f32) + epsilon)
        along = sum(d * row, over=n) * scale * scale / N.to(f32)
        dx[m, h, n] = scale * (d - row * along)


@sp.kernel
def swiglu_gradient(
    gate: Tensor[f32, M, N], up: Tensor[f32, M, N], dy: Tensor[f32, M, N], dgate: Tensor[f32, M, N],
    dup: Tensor[f32, M, N],
):
    for m, n in tiles(M, N):
        part = sigmoid(gate[m, n])
        silu = gate[m, n] * part
        dup[m, n] = dy[m, n] * silu
        dgate[m, n] = dy[m, n] * up[m, n] * (part + silu * (1.0 - part))


@sp.kernel(in_place=[("dlogits", "logits")])
def cross_entropy_gradient(
    logits: Tensor[f32, M, V], target: Tensor[i32, M], share: f32, loss: Tensor[f32, M], dlogits: Tensor[f32, M, V],
):
    for m in each(M):
        v = whole(V)
        wanted = target[m]
        highest = max(logits[m, v], over=v)
        total = sum(exp(logits[m, v] - highest), over=v)
        counts = where(wanted >= 0, 1.0, 0.0)
        loss[m] = counts * (log(total) + highest - logits[m, max(wanted, 0)])
        dlogits[m, v] = (exp(logits[m, v] - highest) * (1.0 / total) - where(v == wanted, 1.0, 0.0)) * (share * counts)


@sp.kernel
def embedding_gradient(dy: Tensor[f32, M, N], tokens: Tensor[i32, M], table: Tensor[f32, V, N]):
    for m, n in tiles(M, N):
        table[tokens[m], n] += dy[m, n]


@sp.kernel
def column_sums(x: Tensor[f32, M, N], y: Tensor[f32, N]):
    for n in tiles(N):
        m = whole(M)
        y[n] = sum(x[m, n], over=m)


@sp.kernel
def clear(x: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        x[m, n] = 0.0


# ------------------------------------------------------------------------------------------- references and arguments


def _wide(arguments: Arguments, *names: str) -> tuple[Array, ...]:
    return tuple(arguments[name].astype(np.float64) for name in names)


def norm_reference(arguments: Arguments) -> dict[str, Array]:
    x, gain, dy = _wide(arguments, "x", "gain", "dy")
    scale = 1.0 / np.sqrt(np.square(x).sum(axis=-1, keepdims=True) / x.shape[-1] + arguments["epsilon"])
    d = dy * gain
    along = (d * x).sum(axis=-1, keepdims=True) * scale**2 / x.shape[-1]
    return {"dx": arguments.get("carried", 0.0) + scale * (d - x * along), "factor": scale[..., 0],
            "dgain": (dy * x * scale).sum(axis=tuple(range(x.ndim - 1)))}


def norm_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    m, n = shape["M"], shape["N"]
    return {"x": normal(random, m, n), "gain": normal(random, n), "epsilon": 1e-5, "dy": normal(random, m, n),
            "carried": normal(random, m, n), "factor": unwritten(m), "dx": unwritten(m, n), "dgain": unwritten(n)}


def head_norm_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    m, h, n = shape["M"], shape["H"], shape["N"]
    return {"x": normal(random, m, h, n), "gain": normal(random, n), "epsilon": 1e-5, "dy": normal(random, m, h, n),
            "factor": unwritten(m, h), "dx": unwritten(m, h, n), "dgain": unwritten(n)}


def past(arguments: Arguments) -> Arguments:
    """Arguments, or results, without those that belong to the gradient of the gain."""
    return {name: value for name, value in arguments.items() if name not in ("factor", "dgain")}


def swiglu_reference(arguments: Arguments) -> dict[str, Array]:
    gate, up, dy = _wide(arguments, "gate", "up", "dy")
    part = 1.0 / (1.0 + np.exp(-gate))
    return {"dgate": dy * up * part * (1.0 + gate * (1.0 - part)), "dup": dy * gate * part}


def swiglu_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    m, n = shape["M"], shape["N"]
    return {name: normal(random, m, n, scale=2.0) for name in ("gate", "up", "dy")} | {
        name: unwritten(m, n) for name in ("dgate", "dup")}


def cross_entropy_reference(arguments: Arguments) -> dict[str, Array]:
    (logits,), target = _wide(arguments, "logits"), arguments["target"]
    highest = logits.max(axis=1, keepdims=True)
    power = np.exp(logits - highest)
    total = power.sum(axis=1, keepdims=True)
    wanted = np.arange(logits.shape[1]) == target[:, None]
    loss = (np.log(total) + highest)[:, 0] - np.where(wanted, logits, 0).sum(axis=1)
    return {"loss": np.where(target >= 0, loss, 0.0),
            "dlogits": (power / total - wanted) * np.where(target >= 0, arguments["share"], 0.0)[:, None]}


def cross_entropy_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    m, v = shape["M"], shape["V"]
    target = random.integers(0, v, m).astype(np.int32)
    target[2::3] = -1
    return {"logits": normal(random, m, v, scale=3.0), "target": target, "share": 0.25, "loss": unwritten(m),
            "dlogits": unwritten(m, v)}


def cross_entropy_torch(arguments: Arguments) -> Any:
    import torch

    logits = torch.from_numpy(arguments["logits"]).requires_grad_()
    target = torch.from_numpy(arguments["target"].astype(np.int64))

    def run() -> None:
        logits.grad = None
        torch.nn.functional.cross_entropy(logits, target, reduction="sum", ignore_index=-1).backward()

    return run


def embedding_reference(arguments: Arguments) -> dict[str, Array]:
    table, dy = _wide(arguments, "table", "dy")
    np.add.at(table, arguments["tokens"], dy)
    return {"table": table}


def embedding_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    m, n, v = shape["M"], shape["N"], shape["V"]
    return {"dy": normal(random, m, n), "tokens": random.integers(0, v, m).astype(np.int32),
            "table": normal(random, v, n)}


MATRICES = ({"M": 0, "N": 8}, {"M": 1, "N": 1}, {"M": 5, "N": 19}, {"M": 34, "N": 33}, {"M": 2, "N": 515})
SIZES = ((512, 576), (4096, 4096))
NORM_TOLERANCE = Tolerance(2e-5, 1e-5, "sums of N and of M products in f32, in any order, and differences of them")
SUMS = "a sum over rows in f32, in any order"

KERNELS = (
    LibraryKernel(
        name="rms_norm_gradient", kernel=rms_norm_gradient, reference=norm_reference, make_arguments=norm_arguments,
        tolerance=NORM_TOLERANCE,
        cases=tuple(Case({"M": m, "N": n}, flops=12 * m * n, bytes=16 * m * n + 4 * m + 8 * n) for m, n in SIZES),
        check_shapes=MATRICES,
    ),
    LibraryKernel(
        name="head_norm_gradient", kernel=head_norm_gradient, reference=norm_reference,
        make_arguments=head_norm_arguments, tolerance=NORM_TOLERANCE,
        cases=(Case({"M": 512, "H": 16, "N": 128}, flops=12 * 512 * 16 * 128,
                    bytes=4 * (3 * 512 * 16 * 128 + 512 * 16 + 2 * 128)),),
        check_shapes=({"M": 0, "H": 2, "N": 8}, {"M": 1, "H": 1, "N": 1}, {"M": 5, "H": 3, "N": 19},
                      {"M": 34, "H": 2, "N": 33}),
    ),
    LibraryKernel(
        name="rms_norm_past", kernel=rms_norm_past, reference=lambda arguments: past(norm_reference(arguments)),
        make_arguments=lambda random, shape: past(norm_arguments(random, shape)), tolerance=NORM_TOLERANCE,
        cases=tuple(Case({"M": m, "N": n}, flops=9 * m * n, bytes=16 * m * n + 4 * n) for m, n in SIZES),
        check_shapes=MATRICES,
    ),
    LibraryKernel(
        name="head_norm_past", kernel=head_norm_past, reference=lambda arguments: past(norm_reference(arguments)),
        make_arguments=lambda random, shape: past(head_norm_arguments(random, shape)), tolerance=NORM_TOLERANCE,
        cases=(Case({"M": 512, "H": 16, "N": 128}, flops=9 * 512 * 16 * 128, bytes=4 * (3 * 512 * 16 * 128 + 128)),),
        check_shapes=({"M": 0, "H": 2, "N": 8}, {"M": 1, "H": 1, "N": 1}, {"M": 5, "H": 3, "N": 19},
                      {"M": 34, "H": 2, "N": 33}),
    ),
    LibraryKernel(
        name="swiglu_gradient", kernel=swiglu_gradient, reference=swiglu_reference, make_arguments=swiglu_arguments,
        tolerance=Tolerance(4e-6, 2e-6, "sigmoid is within 3 ulp, then six roundings; 1 - sigmoid keeps its error"),
        cases=tuple(Case({"M": m, "N": n}, flops=15 * m * n, bytes=20 * m * n) for m, n in ((512, 1536), (4096, 4096))),
        check_shapes=MATRICES,
    ),
    LibraryKernel(
        name="cross_entropy_gradient", kernel=cross_entropy_gradient, reference=cross_entropy_reference,
        make_arguments=cross_entropy_arguments,
        tolerance=Tolerance(4e-6, 4e-6, "the sum of V terms in f32, its logarithm, and differences that may cancel"),
        cases=(Case({"M": 128, "V": 49152}, flops=8 * 128 * 49152, bytes=8 * 128 * 49152 + 8 * 128),),
        check_shapes=({"M": 0, "V": 3}, {"M": 1, "V": 1}, {"M": 3, "V": 17}, {"M": 5, "V": 300}),
        peers={"torch": cross_entropy_torch},
    ),
    LibraryKernel(
        name="embedding_gradient", kernel=embedding_gradient, reference=embedding_reference,
        make_arguments=embedding_arguments, tolerance=Tolerance(1e-6, 1e-5, "a sum over the rows of a token in f32"),
        cases=(Case({"M": 512, "N": 576, "V": 49152}, flops=512 * 576, bytes=4 * 3 * 512 * 576 + 4 * 512),),
        check_shapes=({"M": 0, "N": 8, "V": 2}, {"M": 1, "N": 1, "V": 1}, {"M": 7, "N": 19, "V": 3},
                      {"M": 30, "N": 33, "V": 5}),
    ),
    LibraryKernel(
        name="column_sums", kernel=column_sums,
        reference=lambda arguments: {"y": arguments["x"].astype(np.float64).sum(axis=0)},
        make_arguments=lambda random, shape: {"x": normal(random, shape["M"], shape["N"]), "y": unwritten(shape["N"])},
        tolerance=Tolerance(1e-6, 1e-5, SUMS),
        cases=tuple(Case({"M": m, "N": n}, flops=m * n, bytes=4 * m * n + 4 * n) for m, n in SIZES),
        check_shapes=MATRICES,
    ),
    LibraryKernel(
        name="clear", kernel=clear, reference=lambda arguments: {"x": np.zeros(arguments["x"].shape)},
        make_arguments=lambda random, shape: {"x": normal(random, shape["M"], shape["N"])}, tolerance=EXACT,
        cases=tuple(Case({"M": m, "N": n}, flops=0, bytes=4 * m * n) for m, n in SIZES), check_shapes=MATRICES,
    ),
)
