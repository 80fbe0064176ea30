"""Matrix products of 8-bit integers, and what brings floats there and back.

    matmul_*_i8            c = a @ b, i8 by i8, sums in i32 that wrap: exact
    matmul_nt_u8           the same of u8 by i8
    quantize_rows          x[m, :] = scale[m] * q[m, :], about: the largest of a row becomes 127 or -127
    matmul_nt_i8_scaled    c[m, n] = a_scale[m] * b_scale[n] * sum_k a[m, k] * b[n, k]

NN and NT: the order of the operands in memory, as in sapper/kernels/matmul.py. Symmetric quantisation by rows as in
Dettmers et al., "LLM.int8()", 2022, section 2.
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, abs, f32, i8, i32, max, maximum, round, tiles, u8, where, whole, zeros

from .matmul import CHECK_SHAPES, SQUARES, product
from .record import Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

M, N, K = sp.dims("M N K")
LARGEST, SMALLEST = 127, 1e-36


@sp.kernel
def matmul_nn_i8(a: Tensor[i8, M, K], b: Tensor[i8, K, N], c: Tensor[i32, M, N]):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=i32)
        for k in tiles(K):
            acc += a[m, k] @ b[k, n]
        c[m, n] = acc


def make_matmul_nt(activation: Any) -> Any:
    @sp.kernel(name=f"matmul_nt_{activation.name}")
    def matmul_nt(a: Tensor[activation, M, K], b: Tensor[i8, N, K], c: Tensor[i32, M, N]):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=i32)
            for k in tiles(K):
                acc += a[m, k] @ b[n, k]
            c[m, n] = acc

    return matmul_nt


matmul_nt_i8 = make_matmul_nt(i8)
matmul_nt_u8 = make_matmul_nt(u8)


@sp.kernel
def matmul_nt_i8_scaled(
    a: Tensor[i8, M, K], b: Tensor[i8, N, K], a_scale: Tensor[f32, M], b_scale: Tensor[f32, N], c: Tensor[f32, M, N]
):
    for m, n in tiles(M, N):
        acc = zeros(m, n, dtype=i32)
        for k in tiles(K):
            acc += a[m, k] @ b[n, k]
        c[m, n] = acc.to(f32) * a_scale[m] * b_scale[n]


@sp.kernel
def quantize_rows(x: Tensor[f32, M, K], q: Tensor[i8, M, K], scale: Tensor[f32, M]):
    """A row whose largest element is below SMALLEST becomes zeros: 127 divided by it could overflow."""
    for m in tiles(M):
        k = whole(K)
        row = x[m, k]
        largest = maximum(max(abs(row), over=k), 0.0)
        scale[m] = largest / LARGEST
        q[m, k] = round(row * where(largest < SMALLEST, 0.0, LARGEST / largest)).to(i8)


# ------------------------------------------------------------------------------------------------- references and cases


def matmul_reference(arguments: Arguments, order: str) -> dict[str, Array]:
    """In float64, which holds these sums exactly up to K = 2**37; those of K <= 2**16 fit i32 too."""
    result = product(arguments["a"], arguments["b"], order)
    if "a_scale" in arguments:
        result = result * arguments["a_scale"][:, None] * arguments["b_scale"]
    return {"c": result}


def quantize_reference(arguments: Arguments) -> dict[str, Array]:
    """With the roundings of the kernel, as what lies between two integers may go either way otherwise."""
    x = arguments["x"]
    largest = np.abs(x).max(axis=1, initial=np.float32(0))
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(largest < np.float32(SMALLEST), np.float32(0), np.float32(LARGEST) / largest)
    return {"q": np.rint(x * inverse[:, None]), "scale": largest / np.float32(LARGEST)}


def make_matmul_arguments(random: "np.random.Generator", shape: Shape, order: str, activation: str,
                          scaled: bool) -> Arguments:
    m, n, k = shape["M"], shape["N"], shape["K"]
    a = random.integers(0, 256, (m, k)).astype(np.uint8)
    arguments: Arguments = {"a": a if activation == "u8" else a.view(np.int8)}
    arguments["b"] = random.integers(-128, 128, (n, k) if order == "nt" else (k, n)).astype(np.int8)
    if scaled:
        unit = 1.0 / (LARGEST * np.sqrt(k + 1.0))
        arguments["a_scale"] = (unit * random.uniform(0.5, 1, m)).astype(np.float32)
        arguments["b_scale"] = (random.uniform(0.5, 1, n) / LARGEST).astype(np.float32)
    return arguments | {"c": unwritten(m, n, dtype="f32" if scaled else "i32")}


def make_quantize_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    m, k = shape["M"], shape["K"]
    x = normal(random, m, k)
    x[m // 2:m // 2 + 1] = 0
    return {"x": x, "q": np.full((m, k), -128, np.int8), "scale": unwritten(m)}


def torch_peer(arguments: Arguments, order: str) -> Any:
    import torch

    a, b = torch.from_numpy(arguments["a"]), torch.from_numpy(arguments["b"])
    right = b.T if order == "nt" else b
    out = torch.empty(arguments["c"].shape, dtype=torch.int32)
    return lambda: torch._int_mm(a, right, out=out)


def case(m: int, n: int, k: int, scaled: bool = False) -> Case:
    """flops: two for each product. bytes: every operand once."""
    return Case({"M": m, "N": n, "K": k}, flops=2 * m * n * k,
                bytes=m * k + n * k + 4 * m * n + (4 * (m + n) if scaled else 0))


SHAPES = (*SQUARES, (128, 4096, 4096))
LONG_SUMS = ({"M": 3, "N": 5, "K": 1030}, {"M": 30, "N": 17, "K": 66})


def _matmul(kernel: Any, order: str, activation: str = "i8", scaled: bool = False,
            shapes: tuple[tuple[int, int, int], ...] = SHAPES) -> LibraryKernel:
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=lambda arguments: matmul_reference(arguments, order),
        make_arguments=lambda random, shape: make_matmul_arguments(random, shape, order, activation, scaled),
        tolerance=Tolerance(3e-7, 0.0, "an exact sum below 2**24 or rounded once, and two products, each rounded once")
        if scaled else Tolerance(0.0, 0.0, "sums of integers are exact"),
        cases=tuple(case(*shape, scaled) for shape in shapes),
        check_shapes=(*CHECK_SHAPES, *LONG_SUMS), dtype=activation, products="i8",
        peers={} if scaled or activation == "u8" else {"torch": lambda arguments: torch_peer(arguments, order)},
    )


KERNELS = (
    _matmul(matmul_nn_i8, "nn"),
    _matmul(matmul_nt_i8, "nt"),
    _matmul(matmul_nt_u8, "nt", "u8"),
    _matmul(matmul_nt_i8_scaled, "nt", scaled=True, shapes=SHAPES[1:2]),
    LibraryKernel(
        name="quantize_rows", kernel=quantize_rows, reference=quantize_reference,
        make_arguments=make_quantize_arguments,
        tolerance=Tolerance(0.0, 0.0, "the reference rounds as the kernel does"),
        cases=tuple(Case({"M": m, "K": k}, flops=4 * m * k, bytes=5 * m * k + 4 * m)
                    for m, k in ((1, 4096), (128, 4096), (2048, 4096))),
        check_shapes=({"M": 0, "K": 3}, {"M": 3, "K": 0}, {"M": 1, "K": 1}, {"M": 5, "K": 19}, {"M": 34, "K": 130}),
        dtype="i8",
    ),
)
