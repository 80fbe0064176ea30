"""Causal attention for training: what it keeps of its forward pass, and its gradients (Dao, arXiv:2307.08691, 3.1).

q, out [B, T, H, G, D]: queries of B sequences of T tokens; H key/value heads serve G query heads each. k, v
[B, T, H, D]. Token t sees tokens 0 ... t. level [B, H, G, T]: of each query the logarithm of the sum of
its scores' powers, so that a weight of its softmax is exp(score - level), and nothing of T x T lies in memory.

    attention_kept               out and level
    attention_gradient_queries   from dout: dq, and along [B, H, G, T]: dout . out of each query
    attention_gradient_keys      from dout and along: dk and dv, sums over queries and over the heads of a group

With w = softmax(scale q k): dv = w dout, ds = w (dout v - along), dq = scale ds k, dk = scale ds q. A block of queries
ends its walk at the last token that it sees, a block of keys begins its own at the first that sees it. The scale
multiplies scores, not operands: an operand that is computed would be so again for each tile that it meets (on a Zen 3
the gradient by keys takes 0.6 of the time so).
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, each, exp, f32, full, log, min, span, sum, tiles, where, whole, zeros

from .online_softmax import attend
from .record import Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

B, T, H, G, D = sp.dims("B T H G D")
MINUS_INFINITY = float("-inf")
BLOCK = 32
"""Queries, or keys, that meet the others together."""


@sp.kernel(specialise="D")
def attention_kept(
    q: Tensor[f32, B, T, H, G, D], k: Tensor[f32, B, T, H, D], v: Tensor[f32, B, T, H, D], scale: f32,
    out: Tensor[f32, B, T, H, G, D], level: Tensor[f32, B, H, G, T],
):
    for b, h, g in each(B, H, G):
        for block in each((T + BLOCK - 1) // BLOCK, disjoint=True):
            first = block * BLOCK
            stop = min(first + BLOCK, T)
            for t in tiles(span(first, stop)):
                d = whole(D)
                query = q[b, t, h, g, d] * scale
                highest = full(t, value=MINUS_INFINITY, dtype=f32)
                total = zeros(t, dtype=f32)
                acc = zeros(t, d, dtype=f32)
                for p in tiles(span(0, stop)):
                    score = where(p <= t, query @ k[b, p, h, d], MINUS_INFINITY)
                    highest, total, acc = attend(highest, total, acc, score, v[b, p, h, d], p, exp, f32)
                out[b, t, h, g, d] = acc * (1.0 / total)
                level[b, h, g, t] = highest + log(total)


@sp.kernel(specialise="D")
def attention_gradient_queries(
    q: Tensor[f32, B, T, H, G, D], k: Tensor[f32, B, T, H, D], v: Tensor[f32, B, T, H, D],
    level: Tensor[f32, B, H, G, T], out: Tensor[f32, B, T, H, G, D], dout: Tensor[f32, B, T, H, G, D], scale: f32,
    dq: Tensor[f32, B, T, H, G, D], along: Tensor[f32, B, H, G, T],
):
    for b, h, g in each(B, H, G):
        for block in each((T + BLOCK - 1) // BLOCK, disjoint=True):
            first = block * BLOCK
            stop = min(first + BLOCK, T)
            for t in tiles(span(first, stop)):
                d = whole(D)
                query, given, top = q[b, t, h, g, d], dout[b, t, h, g, d], level[b, h, g, t]
                own = sum(given * out[b, t, h, g, d], over=d)
                acc = zeros(t, d, dtype=f32)
                for p in tiles(span(0, stop)):
                    weight = exp(where(p <= t, (query @ k[b, p, h, d]) * scale, MINUS_INFINITY) - top)
                    dscore = weight * (given @ v[b, p, h, d] - own)
                    acc += dscore @ k[b, p, h, d]
                dq[b, t, h, g, d] = acc * scale
                along[b, h, g, t] = own


@sp.kernel(specialise="D")
def attention_gradient_keys(
    q: Tensor[f32, B, T, H, G, D], k: Tensor[f32, B, T, H, D], v: Tensor[f32, B, T, H, D],
    level: Tensor[f32, B, H, G, T], along: Tensor[f32, B, H, G, T], dout: Tensor[f32, B, T, H, G, D], scale: f32,
    dk: Tensor[f32, B, T, H, D], dv: Tensor[f32, B, T, H, D],
):
    for b, h in each(B, H):
        for block in each((T + BLOCK - 1) // BLOCK, disjoint=True):
            first = block * BLOCK
            stop = min(first + BLOCK, T)
            for p in tiles(span(first, stop)):
                d = whole(D)
                key, value = k[b, p, h, d], v[b, p, h, d]
                dkey, dvalue = zeros(p, d, dtype=f32), zeros(p, d, dtype=f32)
                for g in range(G):
                    for t in tiles(span(first, T)):
                        score = where(p <= t, (key @ q[b, t, h, g, d]) * scale, MINUS_INFINITY)
                        weight = exp(score - level[b, h, g, t])
                        dvalue += weight @ dout[b, t, h, g, d]
                        dscore = weight * (value @ dout[b, t, h, g, d] - along[b, h, g, t])
                        dkey += dscore @ q[b, t, h, g, d]
                dk[b, p, h, d] = dkey * scale
                dv[b, p, h, d] = dvalue


# ------------------------------------------------------------------------------------------- references and arguments


def _softmax(q: Array, k: Array, scale: float) -> tuple[Array, Array]:
    """In float64: weights [B, H, G, T, T] and level."""
    score = np.einsum("bthgd,bphd->bhgtp", q, k, dtype=np.float64) * scale
    score = np.where(np.tri(q.shape[1], dtype=bool), score, -np.inf)
    highest = score.max(axis=-1, keepdims=True, initial=-np.inf)
    weight = np.exp(score - highest)
    total = weight.sum(axis=-1, keepdims=True)
    return weight / total, (highest + np.log(total))[..., 0]


def kept_reference(arguments: Arguments) -> dict[str, Array]:
    weight, level = _softmax(arguments["q"], arguments["k"], arguments["scale"])
    return {"out": np.einsum("bhgtp,bphd->bthgd", weight, arguments["v"]), "level": level}


def _gradients(arguments: Arguments) -> dict[str, Array]:
    q, k, v, dout = (arguments[name].astype(np.float64) for name in ("q", "k", "v", "dout"))
    weight, _ = _softmax(q, k, arguments["scale"])
    out = np.einsum("bhgtp,bphd->bthgd", weight, v)
    along = np.einsum("bthgd,bthgd->bhgt", out, dout)
    dscore = weight * (np.einsum("bthgd,bphd->bhgtp", dout, v) - along[..., None]) * arguments["scale"]
    return {"dq": np.einsum("bhgtp,bphd->bthgd", dscore, k), "along": along,
            "dk": np.einsum("bhgtp,bthgd->bphd", dscore, q), "dv": np.einsum("bhgtp,bthgd->bphd", weight, dout)}


def queries_reference(arguments: Arguments) -> dict[str, Array]:
    found = _gradients(arguments)
    return {name: found[name] for name in ("dq", "along")}


def keys_reference(arguments: Arguments) -> dict[str, Array]:
    found = _gradients(arguments)
    return {name: found[name] for name in ("dk", "dv")}


def _operands(random: "np.random.Generator", shape: Shape) -> Arguments:
    b, t, h, g, d = (shape[name] for name in "BTHGD")
    return {"q": normal(random, b, t, h, g, d), "k": normal(random, b, t, h, d), "v": normal(random, b, t, h, d),
            "scale": d**-0.5}


def kept_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    b, t, h, g, d = (shape[name] for name in "BTHGD")
    return {**_operands(random, shape), "out": unwritten(b, t, h, g, d), "level": unwritten(b, h, g, t)}


def gradient_arguments(random: "np.random.Generator", shape: Shape, keys: bool) -> Arguments:
    """With what the forward pass, and for keys the gradient by queries, left."""
    made = _operands(random, shape)
    dout = normal(random, *made["q"].shape)
    kept = {name: array.astype(np.float32, order="C") for name, array in kept_reference(made).items()}
    along = np.einsum("bthgd,bthgd->bhgt", kept["out"], dout).astype(np.float32, order="C")
    q, k, v, scale = made.values()
    if keys:
        return {"q": q, "k": k, "v": v, "level": kept["level"], "along": along, "dout": dout, "scale": scale,
                "dk": unwritten(*k.shape), "dv": unwritten(*v.shape)}
    return {"q": q, "k": k, "v": v, "level": kept["level"], "out": kept["out"], "dout": dout, "scale": scale,
            "dq": unwritten(*q.shape), "along": unwritten(*along.shape)}


def _torch_operands(arguments: Arguments) -> Any:
    """Queries, keys and values as PyTorch takes them, each head with keys of its own."""
    import torch

    group = arguments["q"].shape[3]
    q = torch.from_numpy(arguments["q"]).flatten(2, 3).transpose(1, 2).contiguous()
    k, v = (torch.from_numpy(arguments[name]).repeat_interleave(group, 2).transpose(1, 2).contiguous() for name in "kv")
    return q, k, v


def torch_forward(arguments: Arguments) -> Any:
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = _torch_operands(arguments)
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=True)


TOLERANCE = Tolerance(2e-5, 2e-5, "sums in f32 of up to G * T products of D terms, of rounded weights and differences; "
                      "what is near 0 keeps the error of its terms")
CHECK_SHAPES = ({"B": 1, "T": 0, "H": 1, "G": 1, "D": 8}, {"B": 1, "T": 1, "H": 1, "G": 1, "D": 1},
                {"B": 2, "T": 9, "H": 2, "G": 3, "D": 8}, {"B": 1, "T": 37, "H": 1, "G": 2, "D": 19})


def _entry(kernel: Any, reference: Any, make_arguments: Any, products: int, moved: Any, peers: Any) -> LibraryKernel:
    """products: causal ones. moved: how often the operands' and results' sizes of queries, of keys, and of levels."""
    cases = []
    for b, t, h, g, d in ((1, 512, 3, 3, 64), (1, 2048, 8, 4, 128)):
        queries, keys, levels = moved
        size = b * t * h * (queries * g * d + keys * d + levels * g)
        cases.append(Case({"B": b, "T": t, "H": h, "G": g, "D": d}, flops=products * b * h * g * t * (t + 1) * d,
                          bytes=4 * size))
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=reference, make_arguments=make_arguments, tolerance=TOLERANCE,
        cases=tuple(cases), check_shapes=CHECK_SHAPES, peers=peers,
    )


KERNELS = (
    _entry(attention_kept, kept_reference, kept_arguments, 2, (2, 2, 1), {"torch": torch_forward}),
    _entry(attention_gradient_queries, queries_reference,
           lambda random, shape: gradient_arguments(random, shape, False), 3, (4, 2, 2), {}),
    _entry(attention_gradient_keys, keys_reference,
           lambda random, shape: gradient_arguments(random, shape, True), 4, (2, 4, 2), {}),
)
