"""Matrix products, with what may follow one in the same pass.

Three orders of the operands in memory, named as in BLAS, N for as it is and T for transposed:

    NN   c[m, n] = sum_k a[m, k] * b[k, n]
    NT   c[m, n] = sum_k a[m, k] * b[n, k]      weights [out, in] as checkpoints hold them
    TN   c[m, n] = sum_k a[k, m] * b[k, n]

The activations a are f32, b is f32 or bf16 (widened as it is read, products and sums in f32). Where both are bf16
(`matmul_*_bf16_bf16`) a target's packed dot products take them. Epilogues: an activation function, a bias, a residual
that is added. `matmul_swiglu` contracts one activation with two weights and joins the two: silu(a @ gate) * (a @ up).
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, f32, tiles, zeros

from .activation import gelu_of, gelu_reference, silu, silu_reference
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
    unwritten,
)

M, N, K = sp.dims("M N K")


def as_is(x):
    return x


def make_matmul_nn(weight: Any, left: Any = f32) -> Any:
    @sp.kernel(name=f"matmul_nn_{weight.name}" + ("" if left is f32 else f"_{left.name}"))
    def matmul_nn(a: Tensor[left, M, K], b: Tensor[weight, K, N], c: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=f32)
            for k in tiles(K):
                acc += a[m, k] @ b[k, n]
            c[m, n] = acc

    return matmul_nn


def make_matmul_nt(weight: Any, activation: Any = as_is, suffix: str = "", left: Any = f32) -> Any:
    """c = activation(a @ b.T)."""

    @sp.kernel(name=f"matmul_nt_{weight.name}{suffix}")
    def matmul_nt(a: Tensor[left, M, K], b: Tensor[weight, N, K], c: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=f32)
            for k in tiles(K):
                acc += a[m, k] @ b[n, k]
            c[m, n] = activation(acc)

    return matmul_nt


def make_matmul_tn(weight: Any) -> Any:
    @sp.kernel(name=f"matmul_tn_{weight.name}")
    def matmul_tn(a: Tensor[f32, K, M], b: Tensor[weight, K, N], c: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=f32)
            for k in tiles(K):
                acc += a[k, m] @ b[k, n]
            c[m, n] = acc

    return matmul_tn


def make_matmul_nt_bias(weight: Any, activation: Any = as_is, suffix: str = "") -> Any:
    """c = activation(a @ b.T + bias)."""

    @sp.kernel(name=f"matmul_nt_bias{suffix}_{weight.name}")
    def matmul_nt_bias(a: Tensor[f32, M, K], b: Tensor[weight, N, K], bias: Tensor[f32, N], c: Tensor[f32, M, N]):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=f32)
            for k in tiles(K):
                acc += a[m, k] @ b[n, k]
            c[m, n] = activation(acc + bias[n])

    return matmul_nt_bias


def make_matmul_nt_residual(weight: Any, left: Any = f32) -> Any:
    """c = residual + a @ b.T."""

    @sp.kernel(name=f"matmul_nt_residual_{weight.name}" + ("" if left is f32 else f"_{left.name}"))
    def matmul_nt_residual(
        a: Tensor[left, M, K], b: Tensor[weight, N, K], residual: Tensor[f32, M, N], c: Tensor[f32, M, N]
    ):
        for m, n in tiles(M, N):
            acc = zeros(m, n, dtype=f32)
            for k in tiles(K):
                acc += a[m, k] @ b[n, k]
            c[m, n] = residual[m, n] + acc

    return matmul_nt_residual


def make_matmul_swiglu(name: str, weight: Any, left: Any = f32, result: Any = f32) -> Any:
    """c = silu(a @ gate.T) * (a @ up.T)."""

    @sp.kernel(name=name)
    def matmul_swiglu(
        a: Tensor[left, M, K], gate: Tensor[weight, N, K], up: Tensor[weight, N, K], c: Tensor[result, M, N]
    ):
        for m, n in tiles(M, N):
            gate_sum = zeros(m, n, dtype=f32)
            up_sum = zeros(m, n, dtype=f32)
            for k in tiles(K):
                x = a[m, k]
                gate_sum += x @ gate[n, k]
                up_sum += x @ up[n, k]
            c[m, n] = (silu(gate_sum) * up_sum).to(result)

    return matmul_swiglu


matmul_nn_f32 = make_matmul_nn(f32)
matmul_nn_bf16 = make_matmul_nn(bf16)
matmul_nn_bf16_bf16 = make_matmul_nn(bf16, bf16)
matmul_nt_f32 = make_matmul_nt(f32)
matmul_nt_bf16 = make_matmul_nt(bf16)
matmul_nt_bf16_bf16 = make_matmul_nt(bf16, suffix="_bf16", left=bf16)
matmul_tn_f32 = make_matmul_tn(f32)
matmul_tn_bf16 = make_matmul_tn(bf16)
matmul_nt_gelu_f32 = make_matmul_nt(f32, gelu_of, "_gelu")
matmul_nt_silu_f32 = make_matmul_nt(f32, silu, "_silu")
matmul_nt_bias_f32 = make_matmul_nt_bias(f32)
matmul_nt_bias_gelu_f32 = make_matmul_nt_bias(f32, gelu_of, "_gelu")
matmul_nt_residual_f32 = make_matmul_nt_residual(f32)
matmul_nt_residual_bf16 = make_matmul_nt_residual(bf16)
matmul_nt_residual_bf16_bf16 = make_matmul_nt_residual(bf16, bf16)
matmul_swiglu_f32 = make_matmul_swiglu("matmul_swiglu_f32", f32)
matmul_swiglu_bf16 = make_matmul_swiglu("matmul_swiglu_bf16", bf16)
matmul_swiglu_bf16_bf16 = make_matmul_swiglu("matmul_swiglu_bf16_bf16", bf16, bf16)
matmul_swiglu_rounded = make_matmul_swiglu("matmul_swiglu_rounded", bf16, bf16, bf16)


def product(a: Array, b: Array, order: str) -> Array:
    """The product in float64, the operands lying as `order` ("nn", "nt", "tn") says."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    return (a64.T if order[0] == "t" else a64) @ (b64.T if order[1] == "t" else b64)


def reference(arguments: Arguments, order: str, activation: str) -> dict[str, Array]:
    result = product(arguments["a"], arguments["b"], order)
    if "bias" in arguments:
        result = result + arguments["bias"]
    if "residual" in arguments:
        result = result + arguments["residual"]
    if activation == "gelu":
        result = gelu_reference(result)
    elif activation == "silu":
        result = silu_reference(result)
    return {"c": result}


def swiglu_reference(arguments: Arguments) -> dict[str, Array]:
    a = arguments["a"]
    return {"c": silu_reference(product(a, arguments["gate"], "nt")) * product(a, arguments["up"], "nt")}


def make_arguments(random: "np.random.Generator", shape: Shape, order: str, weight: str, extra: str,
                   left: str = "f32", result: str = "f32") -> Arguments:
    """Weights are scaled by 1 / sqrt(K), as in a network, so that results are near 1 and one tolerance serves all K."""
    m, n, k = shape["M"], shape["N"], shape["K"]
    scale = 1.0 / np.sqrt(k + 1.0)
    arguments: Arguments = {"a": normal(random, *((k, m) if order[0] == "t" else (m, k)), dtype=left)}
    if extra == "swiglu":
        arguments["gate"] = normal(random, n, k, dtype=weight, scale=scale)
        arguments["up"] = normal(random, n, k, dtype=weight, scale=scale)
    else:
        arguments["b"] = normal(random, *((n, k) if order[1] == "t" else (k, n)), dtype=weight, scale=scale)
    if extra == "bias":
        arguments["bias"] = normal(random, n)
    elif extra == "residual":
        arguments["residual"] = normal(random, m, n)
    arguments["c"] = unwritten(m, n, dtype=result)
    return arguments


def torch_peer(arguments: Arguments, order: str) -> Any:
    """Products in the type of the weights: PyTorch has no product of f32 and bf16."""
    import torch

    def tensor(array: Array) -> Any:
        if array.dtype == NUMPY_DTYPES["bf16"]:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    b = tensor(arguments["b"])
    a = tensor(arguments["a"]).to(b.dtype)
    left, right = (a.T if order[0] == "t" else a), (b.T if order[1] == "t" else b)
    out = torch.empty(arguments["c"].shape, dtype=b.dtype)
    return lambda: torch.matmul(left, right, out=out)


def numpy_peer(arguments: Arguments, order: str) -> Any:
    a, b, out = arguments["a"], arguments["b"], np.empty_like(arguments["c"])
    left, right = (a.T if order[0] == "t" else a), (b.T if order[1] == "t" else b)
    return lambda: np.matmul(left, right, out=out)


def case(m: int, n: int, k: int, weight_size: int, extra: str, left_size: int = 4, result_size: int = 4) -> Case:
    """flops: two for each product; the epilogue's are left out. bytes: every operand once."""
    weights = 2 if extra == "swiglu" else 1
    more = 4 * n if extra == "bias" else 4 * m * n if extra == "residual" else 0
    size = left_size * m * k + weights * weight_size * n * k + result_size * m * n + more
    return Case({"M": m, "N": n, "K": k}, flops=2 * weights * m * n * k, bytes=size)


SQUARES = ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048))
FEW_ROWS = (128, 4096, 4096)
MODEL_SHAPES = ((512, 576, 576), (512, 1536, 576), (512, 576, 1536))
CHECK_SHAPES = (
    {"M": 0, "N": 4, "K": 3}, {"M": 2, "N": 3, "K": 0}, {"M": 1, "N": 1, "K": 1}, {"M": 5, "N": 7, "K": 3},
    {"M": 17, "N": 33, "K": 65}, {"M": 33, "N": 70, "K": 129}, {"M": 1, "N": 100, "K": 576},
)


TOLERANCE = Tolerance(
    1e-5, 2e-5, "a sum of K rounded products near 1 / sqrt(K) in any order: near 2**-24 * sqrt(K) in practice"
)


def _entry(
    name: str, kernel: Any, order: str, weight: str, extra: str = "", activation: str = "",
    shapes: tuple[tuple[int, int, int], ...] = SQUARES, left: str = "f32", result: str = "f32",
) -> LibraryKernel:
    peers: dict[str, Any] = {}
    if not extra and not activation:
        peers["torch"] = lambda arguments: torch_peer(arguments, order)
        if weight == "f32":
            peers["numpy"] = lambda arguments: numpy_peer(arguments, order)
    return LibraryKernel(
        name=name,
        kernel=kernel,
        reference=swiglu_reference if extra == "swiglu"
        else lambda arguments: reference(arguments, order, activation),
        make_arguments=lambda random, shape: make_arguments(random, shape, order, weight, extra, left, result),
        tolerance=TOLERANCE if result == "f32" else rounded_to_bf16(TOLERANCE),
        cases=tuple(case(m, n, k, NUMPY_DTYPES[weight].itemsize, extra, NUMPY_DTYPES[left].itemsize,
                         NUMPY_DTYPES[result].itemsize) for m, n, k in shapes),
        check_shapes=CHECK_SHAPES,
        dtype=weight,
        products="bf16" if left == weight == "bf16" else "f32",
        peers=peers,
    )


KERNELS = (
    _entry("matmul_nn_f32", matmul_nn_f32, "nn", "f32"),
    _entry("matmul_nt_f32", matmul_nt_f32, "nt", "f32"),
    _entry("matmul_tn_f32", matmul_tn_f32, "tn", "f32"),
    _entry("matmul_nn_bf16", matmul_nn_bf16, "nn", "bf16"),
    _entry("matmul_nt_bf16", matmul_nt_bf16, "nt", "bf16", shapes=(*SQUARES, *MODEL_SHAPES)),
    _entry("matmul_tn_bf16", matmul_tn_bf16, "tn", "bf16"),
    _entry("matmul_nn_bf16_bf16", matmul_nn_bf16_bf16, "nn", "bf16", left="bf16", shapes=(*SQUARES, FEW_ROWS)),
    _entry("matmul_nt_bf16_bf16", matmul_nt_bf16_bf16, "nt", "bf16", left="bf16", shapes=(*SQUARES, FEW_ROWS)),
    _entry("matmul_nt_gelu_f32", matmul_nt_gelu_f32, "nt", "f32", activation="gelu", shapes=SQUARES[1:2]),
    _entry("matmul_nt_silu_f32", matmul_nt_silu_f32, "nt", "f32", activation="silu", shapes=SQUARES[1:2]),
    _entry("matmul_nt_bias_f32", matmul_nt_bias_f32, "nt", "f32", extra="bias", shapes=SQUARES[1:2]),
    _entry("matmul_nt_bias_gelu_f32", matmul_nt_bias_gelu_f32, "nt", "f32", extra="bias", activation="gelu",
           shapes=SQUARES[1:2]),
    _entry("matmul_nt_residual_f32", matmul_nt_residual_f32, "nt", "f32", extra="residual", shapes=SQUARES[1:2]),
    _entry("matmul_nt_residual_bf16", matmul_nt_residual_bf16, "nt", "bf16", extra="residual", shapes=MODEL_SHAPES),
    _entry("matmul_nt_residual_bf16_bf16", matmul_nt_residual_bf16_bf16, "nt", "bf16", extra="residual",
           shapes=MODEL_SHAPES, left="bf16"),
    _entry("matmul_swiglu_f32", matmul_swiglu_f32, "nt", "f32", extra="swiglu", shapes=SQUARES[1:2]),
    _entry("matmul_swiglu_bf16", matmul_swiglu_bf16, "nt", "bf16", extra="swiglu", shapes=MODEL_SHAPES[1:2]),
    _entry("matmul_swiglu_bf16_bf16", matmul_swiglu_bf16_bf16, "nt", "bf16", extra="swiglu", shapes=MODEL_SHAPES[1:2],
           left="bf16"),
    _entry("matmul_swiglu_rounded", matmul_swiglu_rounded, "nt", "bf16", extra="swiglu", shapes=MODEL_SHAPES[1:2],
           left="bf16", result="bf16"),
)
