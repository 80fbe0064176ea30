"""RMSNorm and LayerNorm over the rows of a matrix.

RMSNorm: y = x / sqrt(mean(x**2) + epsilon) * gain (Zhang and Sennrich, 2019).
LayerNorm: y = (x - mean(x)) / sqrt(variance(x) + epsilon) * gain + bias (Ba, Kiros and Hinton, 2016).
All is computed in f32, whatever the type of x, gain, bias and y. `rms_norm_rounded` takes f32 and gives bf16, for what
rounds it anyway, `head_norm` is of each head of a row. `rms_norm_quantize` rounds each row of the first to
i8: q = round(y / scale) with scale = max(abs(y)) / 127, which is 1 for a row of zeros.
"""

from functools import partial
from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, f32, i8, max, round, rsqrt, sum, tiles, where, whole

from .record import (
    NUMPY_DTYPES,
    Arguments,
    Array,
    Case,
    LibraryKernel,
    Shape,
    Tolerance,
    normal,
    rounded_to_bf16,
    torch_view,
    unwritten,
)

M, H, N = sp.dims("M H N")


def rms_norm_reference(arguments: Arguments) -> dict[str, Array]:
    x = arguments["x"].astype(np.float64)
    mean_square = np.square(x).sum(axis=-1, keepdims=True) / x.shape[-1]
    return {"y": x / np.sqrt(mean_square + arguments["epsilon"]) * arguments["gain"].astype(np.float64)}


@sp.kernel
def rms_norm(x: Tensor[f32, M, N], gain: Tensor[f32, N], epsilon: f32, y: Tensor[f32, M, N]):
    for m in tiles(M):
        n = whole(N)
        row = x[m, n]
        mean_square = sum(row * row, over=n) / N.to(f32)
        y[m, n] = row * rsqrt(mean_square + epsilon) * gain[n]


@sp.kernel
def head_norm(x: Tensor[f32, M, H, N], gain: Tensor[f32, N], epsilon: f32, y: Tensor[f32, M, H, N]):
    for m, h in tiles(M, H):
        n = whole(N)
        row = x[m, h, n]
        mean_square = sum(row * row, over=n) / N.to(f32)
        y[m, h, n] = row * rsqrt(mean_square + epsilon) * gain[n]


@sp.kernel
def rms_norm_bf16(x: Tensor[bf16, M, N], gain: Tensor[bf16, N], epsilon: f32, y: Tensor[bf16, M, N]):
    for m in tiles(M):
        n = whole(N)
        row = x[m, n].to(f32)
        mean_square = sum(row * row, over=n) / N.to(f32)
        y[m, n] = (row * rsqrt(mean_square + epsilon) * gain[n].to(f32)).to(bf16)


@sp.kernel
def rms_norm_rounded(x: Tensor[f32, M, N], gain: Tensor[f32, N], epsilon: f32, y: Tensor[bf16, M, N]):
    for m in tiles(M):
        n = whole(N)
        row = x[m, n]
        mean_square = sum(row * row, over=n) / N.to(f32)
        y[m, n] = (row * rsqrt(mean_square + epsilon) * gain[n]).to(bf16)


@sp.kernel
def rms_norm_quantize(
    x: Tensor[f32, M, N], gain: Tensor[f32, N], epsilon: f32, q: Tensor[i8, M, N], scale: Tensor[f32, M]
):
    for m in tiles(M):
        n = whole(N)
        row = x[m, n]
        factor = rsqrt(sum(row * row, over=n) / N.to(f32) + epsilon)
        scaled = row * gain[n]
        largest = max(max(scaled, over=n), max(-scaled, over=n))
        step = where(largest > 0.0, 127.0 / largest, 1.0)
        q[m, n] = round(scaled * step).to(i8)
        scale[m] = where(largest > 0.0, largest * factor / 127.0, 1.0)


def layer_norm_reference(arguments: Arguments) -> dict[str, Array]:
    x = arguments["x"].astype(np.float64)
    centred = x - x.sum(axis=1, keepdims=True) / x.shape[1]
    variance = np.square(centred).sum(axis=1, keepdims=True) / x.shape[1]
    gain, bias = (arguments[name].astype(np.float64) for name in ("gain", "bias"))
    return {"y": centred / np.sqrt(variance + arguments["epsilon"]) * gain + bias}


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


@sp.kernel
def layer_norm_bf16(
    x: Tensor[bf16, M, N], gain: Tensor[bf16, N], bias: Tensor[bf16, N], epsilon: f32, y: Tensor[bf16, M, N]
):
    for m in tiles(M):
        n = whole(N)
        row = x[m, n].to(f32)
        count = N.to(f32)
        centred = row - sum(row, over=n) / count
        variance = sum(centred * centred, over=n) / count
        y[m, n] = (centred * rsqrt(variance + epsilon) * gain[n].to(f32) + bias[n].to(f32)).to(bf16)


def quantize_reference(arguments: Arguments) -> dict[str, Array]:
    """q does not depend on the order of the sum, so that it is the very same in f32."""
    x = arguments["x"].astype(np.float64)
    factor = 1.0 / np.sqrt(np.square(x).sum(axis=1) / x.shape[1] + arguments["epsilon"])
    scaled = arguments["x"] * arguments["gain"]
    largest = np.abs(scaled).max(axis=1, initial=0.0)
    step = np.where(largest > 0, np.float32(127.0) / np.where(largest > 0, largest, 1), np.float32(1.0))
    return {"q": np.rint(scaled * step[:, None]), "scale": np.where(largest > 0, largest * factor / 127, 1.0)}


def rms_norm_arguments(random: "np.random.Generator", shape: Shape, dtype: str) -> Arguments:
    m, n = shape["M"], shape["N"]
    return {"x": normal(random, m, n, dtype=dtype), "gain": normal(random, n, dtype=dtype), "epsilon": 1e-5,
            "y": unwritten(m, n, dtype=dtype)}


def quantize_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    m, n = shape["M"], shape["N"]
    x = normal(random, m, n)
    x[m // 2 : m // 2 + 1] = 0
    return {"x": x, "gain": normal(random, n), "epsilon": 1e-5, "q": np.full((m, n), -128, np.int8),
            "scale": unwritten(m)}


def layer_norm_arguments(random: "np.random.Generator", shape: Shape, dtype: str) -> Arguments:
    m, n = shape["M"], shape["N"]
    return {
        "x": (normal(random, m, n) + np.float32(0.5)).astype(NUMPY_DTYPES[dtype]),
        "gain": normal(random, n, dtype=dtype),
        "bias": normal(random, n, dtype=dtype),
        "epsilon": 1e-5,
        "y": unwritten(m, n, dtype=dtype),
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

    x, gain = torch_view(arguments["x"]), torch_view(arguments["gain"])
    return lambda: torch.nn.functional.rms_norm(x, (x.shape[1],), gain, arguments["epsilon"])


def head_norm_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    m, h, n = shape["M"], shape["H"], shape["N"]
    return {"x": normal(random, m, h, n), "gain": normal(random, n), "epsilon": 1e-5, "y": unwritten(m, h, n)}


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

    x = torch_view(arguments["x"])
    gain, bias = torch_view(arguments["gain"]), torch_view(arguments["bias"])
    return lambda: torch.nn.functional.layer_norm(x, (x.shape[1],), gain, bias, arguments["epsilon"])


TOLERANCE = Tolerance(
    1e-5, 2e-6, "sums of up to 8192 rounded f32 terms in any order, then four roundings; cancellation where x is "
    "near the mean leaves an absolute error"
)
CHECK_SHAPES = ({"M": 0, "N": 8}, {"M": 1, "N": 1}, {"M": 5, "N": 19}, {"M": 3, "N": 576}, {"M": 2, "N": 4099})



def _entry(kernel: Any, form: Any, dtype: str, flops: int, narrow: int) -> LibraryKernel:
    """form: reference, arguments and peers. flops: of an element. narrow: features of the small case."""
    reference, arguments, numpy_peer, torch_peer, vectors = form
    size = NUMPY_DTYPES[dtype].itemsize
    return LibraryKernel(
        name=kernel.name,
        kernel=kernel,
        reference=reference,
        make_arguments=partial(arguments, dtype=dtype),
        tolerance=TOLERANCE if dtype == "f32" else rounded_to_bf16(TOLERANCE),
        cases=tuple(
            Case({"M": m, "N": n}, flops=flops * m * n, bytes=size * (2 * m * n + vectors * n))
            for m, n in ((512, narrow), (8192, 4096))
        ),
        check_shapes=CHECK_SHAPES,
        dtype=dtype,
        peers={"numpy": numpy_peer, "torch": torch_peer} if dtype == "f32" else {"torch": torch_peer},
    )


RMS = rms_norm_reference, rms_norm_arguments, rms_norm_numpy, rms_norm_torch, 1
LAYER = layer_norm_reference, layer_norm_arguments, layer_norm_numpy, layer_norm_torch, 2

KERNELS = (
    _entry(rms_norm, RMS, "f32", 4, 576),
    _entry(rms_norm_bf16, RMS, "bf16", 4, 576),
    _entry(layer_norm, LAYER, "f32", 7, 768),
    _entry(layer_norm_bf16, LAYER, "bf16", 7, 768),
    LibraryKernel(
        name="head_norm", kernel=head_norm, reference=rms_norm_reference, make_arguments=head_norm_arguments,
        tolerance=TOLERANCE,
        cases=(Case({"M": 512, "H": 16, "N": 128}, flops=4 * 512 * 16 * 128, bytes=4 * (2 * 512 * 16 * 128 + 128)),),
        check_shapes=({"M": 0, "H": 2, "N": 8}, {"M": 1, "H": 1, "N": 1}, {"M": 5, "H": 3, "N": 19},
                      {"M": 3, "H": 2, "N": 128}),
    ),
    LibraryKernel(
        name="rms_norm_rounded",
        kernel=rms_norm_rounded,
        reference=rms_norm_reference,
        make_arguments=lambda random, shape: {**rms_norm_arguments(random, shape, "f32"),
                                              "y": unwritten(shape["M"], shape["N"], dtype="bf16")},
        tolerance=rounded_to_bf16(TOLERANCE),
        cases=tuple(Case({"M": m, "N": n}, flops=4 * m * n, bytes=6 * m * n + 4 * n)
                    for m, n in ((512, 576), (8192, 4096))),
        check_shapes=CHECK_SHAPES,
    ),
    LibraryKernel(
        name="rms_norm_quantize",
        kernel=rms_norm_quantize,
        reference=quantize_reference,
        make_arguments=quantize_arguments,
        tolerance=Tolerance(1e-5, 0.0, "the norm's sum in any order, for the scales; the integers are exact"),
        cases=tuple(
            Case({"M": m, "N": n}, flops=7 * m * n, bytes=5 * m * n + 4 * n + 4 * m)
            for m, n in ((512, 576), (8192, 4096))
        ),
        check_shapes=CHECK_SHAPES,
    ),
)
