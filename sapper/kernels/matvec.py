"""Matrix times vector, the work of decoding one token: y[n] = sum_k w[n, k] * x[k], weights [out, in].

Bound by the bytes of the weights, so whatever else one token needs is done in the same pass:

    matvec                y = w @ x
    matvec_residual       y = residual + w @ x
    norm_matvec           y = w @ rms_norm(x)
    matvec_swiglu         y = silu(gate @ x) * (up @ x)
    norm_matvec_swiglu    y = silu(gate @ rms_norm(x)) * (up @ rms_norm(x))

The norm's factor 1 / sqrt(mean(x**2) + epsilon) is one number for the whole vector; it is applied to the sum. Every
tile of rows works it out anew from x, which lies in the nearest cache: that is cheaper than a kernel of its own.
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, bf16, f32, rsqrt, sum, tiles, whole, zeros

from .activation import silu, silu_reference
from .record import NUMPY_DTYPES, Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

N, K = sp.dims("N K")


def make_matvec(weight: Any) -> Any:
    @sp.kernel(name=f"matvec_{weight.name}")
    def matvec(w: Tensor[weight, N, K], x: Tensor[f32, K], y: Tensor[f32, N]):
        for n in tiles(N):
            acc = zeros(n, dtype=f32)
            for k in tiles(K):
                acc += w[n, k] @ x[k]
            y[n] = acc

    return matvec


def make_matvec_residual(weight: Any) -> Any:
    @sp.kernel(name=f"matvec_residual_{weight.name}")
    def matvec_residual(w: Tensor[weight, N, K], x: Tensor[f32, K], residual: Tensor[f32, N], y: Tensor[f32, N]):
        for n in tiles(N):
            acc = zeros(n, dtype=f32)
            for k in tiles(K):
                acc += w[n, k] @ x[k]
            y[n] = residual[n] + acc

    return matvec_residual


def make_matvec_swiglu(weight: Any) -> Any:
    @sp.kernel(name=f"matvec_swiglu_{weight.name}")
    def matvec_swiglu(gate: Tensor[weight, N, K], up: Tensor[weight, N, K], x: Tensor[f32, K], y: Tensor[f32, N]):
        for n in tiles(N):
            gate_sum = zeros(n, dtype=f32)
            up_sum = zeros(n, dtype=f32)
            for k in tiles(K):
                gate_sum += gate[n, k] @ x[k]
                up_sum += up[n, k] @ x[k]
            y[n] = silu(gate_sum) * up_sum

    return matvec_swiglu


def make_norm_matvec(weight: Any) -> Any:
    @sp.kernel(name=f"norm_matvec_{weight.name}")
    def norm_matvec(
        w: Tensor[weight, N, K], x: Tensor[f32, K], gain: Tensor[f32, K], epsilon: f32, y: Tensor[f32, N]
    ):
        for n in tiles(N):
            i = whole(K)
            vector = x[i]
            scale = rsqrt(sum(vector * vector, over=i) / K.to(f32) + epsilon)
            acc = zeros(n, dtype=f32)
            for k in tiles(K):
                acc += w[n, k] @ (x[k] * gain[k])
            y[n] = acc * scale

    return norm_matvec


def make_norm_matvec_swiglu(weight: Any) -> Any:
    @sp.kernel(name=f"norm_matvec_swiglu_{weight.name}")
    def norm_matvec_swiglu(
        gate: Tensor[weight, N, K], up: Tensor[weight, N, K], x: Tensor[f32, K], gain: Tensor[f32, K], epsilon: f32,
        y: Tensor[f32, N],
    ):
        for n in tiles(N):
            i = whole(K)
            vector = x[i]
            scale = rsqrt(sum(vector * vector, over=i) / K.to(f32) + epsilon)
            gate_sum = zeros(n, dtype=f32)
            up_sum = zeros(n, dtype=f32)
            for k in tiles(K):
                normed = x[k] * gain[k]
                gate_sum += gate[n, k] @ normed
                up_sum += up[n, k] @ normed
            y[n] = silu(gate_sum * scale) * (up_sum * scale)

    return norm_matvec_swiglu


matvec_f32 = make_matvec(f32)
matvec_bf16 = make_matvec(bf16)
matvec_residual_f32 = make_matvec_residual(f32)
matvec_residual_bf16 = make_matvec_residual(bf16)
matvec_swiglu_f32 = make_matvec_swiglu(f32)
matvec_swiglu_bf16 = make_matvec_swiglu(bf16)
norm_matvec_f32 = make_norm_matvec(f32)
norm_matvec_bf16 = make_norm_matvec(bf16)
norm_matvec_swiglu_f32 = make_norm_matvec_swiglu(f32)
norm_matvec_swiglu_bf16 = make_norm_matvec_swiglu(bf16)


def reference(arguments: Arguments) -> dict[str, Array]:
    x = arguments["x"].astype(np.float64)
    if "gain" in arguments:
        x = x / np.sqrt(np.square(x).mean() + arguments["epsilon"]) * arguments["gain"]
    if "gate" in arguments:
        up = arguments["up"].astype(np.float64) @ x
        return {"y": silu_reference(arguments["gate"].astype(np.float64) @ x) * up}
    result = arguments["w"].astype(np.float64) @ x
    return {"y": arguments["residual"] + result if "residual" in arguments else result}


def make_arguments(random: "np.random.Generator", shape: Shape, weight: str, form: str) -> Arguments:
    """Weights are scaled by 1 / sqrt(K), as in a network, so that results are near 1 and one tolerance serves all K."""
    n, k = shape["N"], shape["K"]
    scale = 1.0 / np.sqrt(k + 1.0)
    names = ("gate", "up") if form.endswith("swiglu") else ("w",)
    arguments: Arguments = {name: normal(random, n, k, dtype=weight, scale=scale) for name in names}
    arguments["x"] = normal(random, k)
    if form.startswith("norm"):
        arguments["gain"] = normal(random, k)
        arguments["epsilon"] = 1e-5
    if form == "residual":
        arguments["residual"] = normal(random, n)
    arguments["y"] = unwritten(n)
    return arguments


def numpy_peer(arguments: Arguments) -> Any:
    w, x, out = arguments["w"], arguments["x"], np.empty_like(arguments["y"])
    return lambda: np.matmul(w, x, out=out)


def torch_peer(arguments: Arguments) -> Any:
    """In the type of the weights: PyTorch has no product of f32 and bf16."""
    import torch

    w = arguments["w"]
    if w.dtype == NUMPY_DTYPES["bf16"]:
        matrix = torch.from_numpy(w.view(np.int16)).view(torch.bfloat16)
    else:
        matrix = torch.from_numpy(w)
    x = torch.from_numpy(arguments["x"]).to(matrix.dtype)
    out = torch.empty(w.shape[0], dtype=matrix.dtype)
    return lambda: torch.mv(matrix, x, out=out)


SHAPES = ((4096, 4096), (14336, 4096), (49152, 576))
CHECK_SHAPES = (
    {"N": 0, "K": 4}, {"N": 3, "K": 0}, {"N": 1, "K": 1}, {"N": 5, "K": 19}, {"N": 33, "K": 100}, {"N": 70, "K": 576}
)


def _entry(kernel: Any, form: str, weight: str, shapes: tuple[tuple[int, int], ...]) -> LibraryKernel:
    size = NUMPY_DTYPES[weight].itemsize
    count = 2 if form.endswith("swiglu") else 1
    extra = 4 if form == "residual" else 0
    vectors = 8 if form.startswith("norm") else 4
    name = {"": "matvec", "residual": "matvec_residual", "swiglu": "matvec_swiglu", "norm": "norm_matvec",
            "norm_swiglu": "norm_matvec_swiglu"}
    peers: dict[str, Any] = {} if form else {"torch": torch_peer}
    if not form and weight == "f32":
        peers["numpy"] = numpy_peer
    return LibraryKernel(
        name=f"{name[form]}_{weight}",
        kernel=kernel,
        reference=reference,
        make_arguments=lambda random, shape: make_arguments(random, shape, weight, form),
        tolerance=Tolerance(
            1e-5, 2e-5, "a sum of K rounded products near 1 / sqrt(K) in any order: near 2**-24 * sqrt(K) in practice"
        ),
        cases=tuple(
            Case({"N": n, "K": k}, flops=2 * count * n * k, bytes=count * size * n * k + (4 + extra) * n + vectors * k)
            for n, k in shapes
        ),
        # An empty vector has no mean.
        check_shapes=tuple(s for s in CHECK_SHAPES if s["K"] > 0 or not form.startswith("norm")),
        dtype=weight,
        peers=peers,
    )


KERNELS = (
    _entry(matvec_f32, "", "f32", SHAPES),
    _entry(matvec_bf16, "", "bf16", SHAPES),
    _entry(matvec_residual_f32, "residual", "f32", ((4096, 14336),)),
    _entry(matvec_residual_bf16, "residual", "bf16", ((576, 576), (576, 1536), (4096, 14336))),
    _entry(matvec_swiglu_f32, "swiglu", "f32", ((14336, 4096),)),
    _entry(matvec_swiglu_bf16, "swiglu", "bf16", ((1536, 576), (14336, 4096))),
    _entry(norm_matvec_f32, "norm", "f32", ((6144, 4096),)),
    _entry(norm_matvec_bf16, "norm", "bf16", ((960, 576), (6144, 4096))),
    _entry(norm_matvec_swiglu_f32, "norm_swiglu", "f32", ((14336, 4096),)),
    _entry(norm_matvec_swiglu_bf16, "norm_swiglu", "bf16", ((1536, 576), (14336, 4096))),
)
