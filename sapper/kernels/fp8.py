"""Weights in fp8 with a scale for each block of 128 x 128, as DeepSeek-V3's checkpoints hold them, made wide.

w [N, K]: the bits of f8e4m3 numbers (OCP 8-bit floating point, 2023: a sign, 4 bits of exponent with bias 7, 3 of
mantissa; no infinities, NaN is all ones). scale [A, B]: A = ceil(N / 128), B = ceil(K / 128); the last blocks may be
smaller. y [N, K] = w * scale, in f32.

The 7 bits below the sign, moved to where f32 has its exponent and mantissa, are the number times 2**-120, subnormal
numbers included, as 127 - 7 = 120.

`quantize_fp8` is the other way for activations, which have a scale for 128 elements of a row.
"""

from typing import Any

import ml_dtypes
import numpy as np

import sapper as sp
from sapper import Tensor, f8e4m3, f32, i32, max, tiles, u8, where, whole

from .record import Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

M, N, K, A, B = sp.dims("M N K A B")
BLOCK = 128
LARGEST, SMALLEST = 448.0, 1e-35
REBIAS = 2.0**120
NAN = float("nan")


@sp.kernel
def dequantize_fp8(w: Tensor[u8, N, K], scale: Tensor[f32, A, B], y: Tensor[f32, N, K]):
    for n, k in tiles(N, K):
        bits = w[n, k].to(i32)
        magnitude = ((bits & 127) << 20).bits(f32) * REBIAS
        value = where(bits > 127, -magnitude, magnitude)
        value = where((bits & 127) == 127, NAN, value)
        y[n, k] = value * scale[n // BLOCK, k // BLOCK]


@sp.kernel
def quantize_fp8(x: Tensor[f32, M, B, BLOCK], y: Tensor[f8e4m3, M, B, BLOCK], scale: Tensor[f32, M, B]):
    """Rows in fp8 with a scale for each 1 x 128, as DeepSeek-V3 holds activations: the largest of 128 becomes 448.
    Where it is below SMALLEST they become zeros: 448 divided by it could overflow."""
    for m, b in tiles(M, B):
        i = whole(BLOCK)
        numbers = x[m, b, i]
        largest = max(abs(numbers), over=i)
        scale[m, b] = where(largest < SMALLEST, 1.0, largest / LARGEST)
        y[m, b, i] = (numbers * where(largest < SMALLEST, 0.0, LARGEST / largest)).to(f8e4m3)


def blocks(extent: int) -> int:
    """How many scales that many rows or columns have."""
    return -(-extent // BLOCK)


def reference(arguments: Arguments) -> dict[str, Array]:
    w, scale = arguments["w"], arguments["scale"].astype(np.float64)
    each_block = np.ones((BLOCK, BLOCK))
    wide = np.kron(scale, each_block)[: w.shape[0], : w.shape[1]]
    return {"y": w.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * wide}


def quantize_reference(arguments: Arguments) -> dict[str, Array]:
    """In f32: every step is rounded as IEEE 754 says, so the results are the same, bit for bit."""
    x = arguments["x"]
    largest = np.abs(x).max(axis=2)
    small = largest < np.float32(SMALLEST)
    scale = np.where(small, np.float32(1), largest / np.float32(LARGEST))
    inverse = np.where(small, np.float32(0), np.float32(LARGEST) / np.where(small, np.float32(1), largest))
    return {"y": (x * inverse[:, :, None]).astype(ml_dtypes.float8_e4m3fn), "scale": scale}


def quantize_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    m, b = shape["M"], shape["B"]
    x = normal(random, m, b, BLOCK)
    x[:1, :1] = 0.0
    x[-1:, -1:] *= np.float32(1e-37)
    return {"x": x, "y": unwritten(m, b, BLOCK).astype(ml_dtypes.float8_e4m3fn), "scale": unwritten(m, b)}


def make_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    """All numbers of the format, subnormal ones and NaN included."""
    n, k = shape["N"], shape["K"]
    return {
        "w": random.integers(0, 256, (n, k)).astype(np.uint8),
        "scale": normal(random, shape["A"], shape["B"], scale=0.01), "y": unwritten(n, k),
    }


def _shape(n: int, k: int) -> dict[str, int]:
    return {"N": n, "K": k, "A": blocks(n), "B": blocks(k)}


def _case(n: int, k: int) -> Case:
    return Case(_shape(n, k), flops=2 * n * k, bytes=5 * n * k + 4 * blocks(n) * blocks(k))


def torch_peer(arguments: Arguments) -> Any:
    """Without the scales: PyTorch has no step that applies them by blocks."""
    import torch

    w = torch.from_numpy(arguments["w"]).view(torch.float8_e4m3fn)
    return lambda: w.to(torch.float32)


KERNELS = (
    LibraryKernel(
        name="dequantize_fp8",
        kernel=dequantize_fp8,
        reference=reference,
        make_arguments=make_arguments,
        tolerance=Tolerance(2.0**-24, 0.0, "the number is exact, the product is rounded once to f32"),
        cases=(_case(2048, 7168),),
        check_shapes=(_shape(0, 5), _shape(1, 1), _shape(5, 19), _shape(130, 33), _shape(576, 200)),
        dtype="fp8",
        peers={"torch": torch_peer},
    ),
    LibraryKernel(
        name="quantize_fp8",
        kernel=quantize_fp8,
        reference=quantize_reference,
        make_arguments=quantize_arguments,
        tolerance=Tolerance(0.0, 0.0, "the same roundings in the same order"),
        cases=(Case({"M": 4096, "B": 56}, flops=4 * 4096 * 7168, bytes=4096 * 56 * (5 * BLOCK + 4)),),
        check_shapes=({"M": 0, "B": 1}, {"M": 1, "B": 1}, {"M": 3, "B": 2}, {"M": 5, "B": 7}),
        dtype="fp8",
    ),
)
