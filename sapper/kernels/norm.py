"""RMSNorm and LayerNorm over the rows of a matrix.

RMSNorm: y = x / sqrt(mean(x**2) + epsilon) * gain (Zhang and Sennrich, 2019).
LayerNorm: y = (x - mean(x)) / sqrt(variance(x) + epsilon) * gain + bias (Ba, Kiros and Hinton, 2016).
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, f32, rsqrt, sum, tiles, whole

from .record import Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

M, N = sp.dims("M N")


def rms_norm_reference(arguments: Arguments) -> dict[str, Array]:
    x = arguments["x"].astype(np.float64)
    mean_square = np.square(x).sum(axis=1, keepdims=True) / x.shape[1]
    return {"y": x / np.sqrt(mean_square + arguments["epsilon"]) * arguments["gain"]}


@sp.kernel
def rms_norm(x: Tensor[f32, M, N], gain: Tensor[f32, N], epsilon: f32, y: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        row = x[m, n]
        mean_square = sum(row * row, over=n) / N.to(f32)
        y[m, n] = row * rsqrt(mean_square + epsilon) * gain[n]


def layer_norm_reference(arguments: Arguments) -> dict[str, Array]:
    x = arguments["x"].astype(np.float64)
    centred = x - x.sum(axis=1, keepdims=True) / x.shape[1]
    variance = np.square(centred).sum(axis=1, keepdims=True) / x.shape[1]
    return {"y": centred / np.sqrt(variance + arguments["epsilon"]) * arguments["gain"] + arguments["bias"]}


@sp.kernel
def layer_norm(
    x: Tensor[f32, M, N], gain: Tensor[f32, N], bias: Tensor[f32, N], epsilon: f32, y: Tensor[f32, M, N]
):
    for m in tiles(M):
        n = whole(N)
        row = x[m, n]
        count = N.to(f32)
        centred = row - sum(row, over=n) / count
        variance = sum(centred * centred, over=n) / count
        y[m, n] = centred * rsqrt(variance + epsilon) * gain[n] + bias[n]


def rms_norm_arguments(random: np.random.Generator, shape: Shape) -> Arguments:
    m, n = shape["M"], shape["N"]
    return {"x": normal(random, m, n), "gain": normal(random, n), "epsilon": 1e-5, "y": unwritten(m, n)}


def layer_norm_arguments(random: np.random.Generator, shape: Shape) -> Arguments:
    m, n = shape["M"], shape["N"]
    return {
        "x": normal(random, m, n) + np.float32(0.5),
        "gain": normal(random, n),
        "bias": normal(random, n),
        "epsilon": 1e-5,
        "y": unwritten(m, n),
    }


def rms_norm_numpy(arguments: Arguments) -> Any:
    x, gain, out = arguments["x"], arguments["gain"], np.empty_like(arguments["y"])
    epsilon = np.float32(arguments["epsilon"])

    def run() -> None:
        scale = 1.0 / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + epsilon)
        np.multiply(x, scale, out=out)
        np.multiply(out, gain, out=out)

    return run


def rms_norm_torch(arguments: Arguments) -> Any:
    import torch

    x, gain = torch.from_numpy(arguments["x"]), torch.from_numpy(arguments["gain"])
    return lambda: torch.nn.functional.rms_norm(x, (x.shape[1],), gain, arguments["epsilon"])


def layer_norm_numpy(arguments: Arguments) -> Any:
    x, gain, bias, out = arguments["x"], arguments["gain"], arguments["bias"], np.empty_like(arguments["y"])
    epsilon = np.float32(arguments["epsilon"])

    def run() -> None:
        np.subtract(x, x.mean(axis=1, keepdims=True), out=out)
        scale = 1.0 / np.sqrt(np.square(out).mean(axis=1, keepdims=True) + epsilon)
        np.multiply(out, scale, out=out)
        np.multiply(out, gain, out=out)
        np.add(out, bias, out=out)

    return run


def layer_norm_torch(arguments: Arguments) -> Any:
    import torch

    x = torch.from_numpy(arguments["x"])
    gain, bias = torch.from_numpy(arguments["gain"]), torch.from_numpy(arguments["bias"])
    return lambda: torch.nn.functional.layer_norm(x, (x.shape[1],), gain, bias, arguments["epsilon"])


TOLERANCE = Tolerance(
    1e-5, 2e-6, "sums of up to 8192 rounded f32 terms in any order, then four roundings; cancellation where x is "
    "near the mean leaves an absolute error"
)
CHECK_SHAPES = ({"M": 0, "N": 8}, {"M": 1, "N": 1}, {"M": 5, "N": 19}, {"M": 3, "N": 576}, {"M": 2, "N": 4099})

KERNELS = (
    LibraryKernel(
        name="rms_norm",
        kernel=rms_norm,
        reference=rms_norm_reference,
        make_arguments=rms_norm_arguments,
        tolerance=TOLERANCE,
        cases=tuple(
            Case({"M": m, "N": n}, flops=4 * m * n, bytes=8 * m * n + 4 * n) for m, n in ((512, 576), (8192, 4096))
        ),
        check_shapes=CHECK_SHAPES,
        peers={"numpy": rms_norm_numpy, "torch": rms_norm_torch},
    ),
    LibraryKernel(
        name="layer_norm",
        kernel=layer_norm,
        reference=layer_norm_reference,
        make_arguments=layer_norm_arguments,
        tolerance=TOLERANCE,
        cases=tuple(
            Case({"M": m, "N": n}, flops=7 * m * n, bytes=8 * m * n + 8 * n) for m, n in ((512, 768), (8192, 4096))
        ),
        check_shapes=CHECK_SHAPES,
        peers={"numpy": layer_norm_numpy, "torch": layer_norm_torch},
    ),
)
