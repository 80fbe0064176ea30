"""Causal latent attention (mla.py) for training, the naive way: what it keeps of its forward pass, and its gradients.

Each head's query has D numbers that meet its own keys, and S turned ones that meet the key which all heads share:

    score = scale * (q . keys + turned . shared),   out = softmax(score) values

q, dq [B, T, H, D], turned, dturned [B, T, H, S], keys, dkeys [B, T, H, D], shared [B, T, S], values, dvalues
[B, T, H, V], out, dout [B, T, H, V] of B sequences of T tokens; level, along [B, H, T]. What these are, and how the
gradients come about, is as in attention_gradient.py.

    latent_attention_kept     out and level
    latent_gradient_queries   from dout: dq, dturned and along
    latent_gradient_keys      from dout and along: dkeys, dvalues, and each head's part of the shared key's gradient
    head_sums                 these parts together
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, each, exp, f32, full, log, min, span, sum, tiles, where, whole, zeros

from .attention_gradient import BLOCK
from .online_softmax import attend
from .record import Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

B, T, H, D, S, V, M, N = sp.dims("B T H D S V M N")
MINUS_INFINITY = float("-inf")


@sp.kernel(specialise="D S V")
def latent_attention_kept(
    q: Tensor[f32, B, T, H, D], turned: Tensor[f32, B, T, H, S], keys: Tensor[f32, B, T, H, D],
    shared: Tensor[f32, B, T, S], values: Tensor[f32, B, T, H, V], scale: f32,
    out: Tensor[f32, B, T, H, V], level: Tensor[f32, B, H, T],
):
    for b, h in each(B, H):
        for block in each((T + BLOCK - 1) // BLOCK, disjoint=True):
            first = block * BLOCK
            stop = min(first + BLOCK, T)
            for t in tiles(span(first, stop)):
                d, s, v = whole(D), whole(S), whole(V)
                query, turn = q[b, t, h, d] * scale, turned[b, t, h, s] * scale
                highest = full(t, value=MINUS_INFINITY, dtype=f32)
                total = zeros(t, dtype=f32)
                acc = zeros(t, v, dtype=f32)
                for p in tiles(span(0, stop)):
                    score = query @ keys[b, p, h, d] + turn @ shared[b, p, s]
                    score = where(p <= t, score, MINUS_INFINITY)
                    highest, total, acc = attend(highest, total, acc, score, values[b, p, h, v], p, exp, f32)
                out[b, t, h, v] = acc * (1.0 / total)
                level[b, h, t] = highest + log(total)


@sp.kernel(specialise="D S V")
def latent_gradient_queries(
    q: Tensor[f32, B, T, H, D], turned: Tensor[f32, B, T, H, S], keys: Tensor[f32, B, T, H, D],
    shared: Tensor[f32, B, T, S], values: Tensor[f32, B, T, H, V], level: Tensor[f32, B, H, T],
    out: Tensor[f32, B, T, H, V], dout: Tensor[f32, B, T, H, V], scale: f32,
    dq: Tensor[f32, B, T, H, D], dturned: Tensor[f32, B, T, H, S], along: Tensor[f32, B, H, T],
):
    for b, h in each(B, H):
        for block in each((T + BLOCK - 1) // BLOCK, disjoint=True):
            first = block * BLOCK
            stop = min(first + BLOCK, T)
            for t in tiles(span(first, stop)):
                d, s, v = whole(D), whole(S), whole(V)
                query, turn, given, top = q[b, t, h, d], turned[b, t, h, s], dout[b, t, h, v], level[b, h, t]
                own = sum(given * out[b, t, h, v], over=v)
                acc, turning = zeros(t, d, dtype=f32), zeros(t, s, dtype=f32)
                for p in tiles(span(0, stop)):
                    score = (query @ keys[b, p, h, d] + turn @ shared[b, p, s]) * scale
                    weight = exp(where(p <= t, score, MINUS_INFINITY) - top)
                    dscore = weight * (given @ values[b, p, h, v] - own)
                    acc += dscore @ keys[b, p, h, d]
                    turning += dscore @ shared[b, p, s]
                dq[b, t, h, d] = acc * scale
                dturned[b, t, h, s] = turning * scale
                along[b, h, t] = own


@sp.kernel(specialise="D S V")
def latent_gradient_keys(
    q: Tensor[f32, B, T, H, D], turned: Tensor[f32, B, T, H, S], keys: Tensor[f32, B, T, H, D],
    shared: Tensor[f32, B, T, S], values: Tensor[f32, B, T, H, V], level: Tensor[f32, B, H, T],
    along: Tensor[f32, B, H, T], dout: Tensor[f32, B, T, H, V], scale: f32,
    dkeys: Tensor[f32, B, T, H, D], dshared: Tensor[f32, B, T, H, S], dvalues: Tensor[f32, B, T, H, V],
):
    for b, h in each(B, H):
        for block in each((T + BLOCK - 1) // BLOCK, disjoint=True):
            first = block * BLOCK
            stop = min(first + BLOCK, T)
            for p in tiles(span(first, stop)):
                d, s, v = whole(D), whole(S), whole(V)
                key, common, value = keys[b, p, h, d], shared[b, p, s], values[b, p, h, v]
                dkey, dcommon, dvalue = zeros(p, d, dtype=f32), zeros(p, s, dtype=f32), zeros(p, v, dtype=f32)
                for t in tiles(span(first, T)):
                    score = (key @ q[b, t, h, d] + common @ turned[b, t, h, s]) * scale
                    weight = exp(where(p <= t, score, MINUS_INFINITY) - level[b, h, t])
                    dvalue += weight @ dout[b, t, h, v]
                    dscore = weight * (value @ dout[b, t, h, v] - along[b, h, t])
                    dkey += dscore @ q[b, t, h, d]
                    dcommon += dscore @ turned[b, t, h, s]
                dkeys[b, p, h, d] = dkey * scale
                dshared[b, p, h, s] = dcommon * scale
                dvalues[b, p, h, v] = dvalue


@sp.kernel
def head_sums(x: Tensor[f32, M, H, N], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        h = whole(H)
        y[m, n] = sum(x[m, h, n], over=h)


# ------------------------------------------------------------------------------------------- references and arguments


def _softmax(arguments: Arguments) -> tuple[Array, Array]:
    """In float64: weights [B, H, T, T] and level."""
    q, turned, keys, shared = (arguments[name].astype(np.float64) for name in ("q", "turned", "keys", "shared"))
    score = np.einsum("bthd,bphd->bhtp", q, keys) + np.einsum("bths,bps->bhtp", turned, shared)
    score = np.where(np.tri(q.shape[1], dtype=bool), score * arguments["scale"], -np.inf)
    highest = score.max(axis=-1, keepdims=True, initial=-np.inf)
    weight = np.exp(score - highest)
    total = weight.sum(axis=-1, keepdims=True)
    return weight / total, (highest + np.log(total))[..., 0]


def kept_reference(arguments: Arguments) -> dict[str, Array]:
    weight, level = _softmax(arguments)
    return {"out": np.einsum("bhtp,bphv->bthv", weight, arguments["values"]), "level": level}


def _gradients(arguments: Arguments) -> dict[str, Array]:
    names = ("q", "turned", "keys", "shared", "values", "dout")
    q, turned, keys, shared, values, dout = (arguments[name].astype(np.float64) for name in names)
    weight, _ = _softmax(arguments)
    along = np.einsum("bhtp,bphv,bthv->bht", weight, values, dout, optimize=True)
    dscore = weight * (np.einsum("bthv,bphv->bhtp", dout, values) - along[..., None]) * arguments["scale"]
    return {
        "dq": np.einsum("bhtp,bphd->bthd", dscore, keys), "dturned": np.einsum("bhtp,bps->bths", dscore, shared),
        "along": along, "dkeys": np.einsum("bhtp,bthd->bphd", dscore, q),
        "dshared": np.einsum("bhtp,bths->bphs", dscore, turned), "dvalues": np.einsum("bhtp,bthv->bphv", weight, dout),
    }


def queries_reference(arguments: Arguments) -> dict[str, Array]:
    found = _gradients(arguments)
    return {name: found[name] for name in ("dq", "dturned", "along")}


def keys_reference(arguments: Arguments) -> dict[str, Array]:
    found = _gradients(arguments)
    return {name: found[name] for name in ("dkeys", "dshared", "dvalues")}


def _operands(random: "np.random.Generator", shape: Shape) -> Arguments:
    b, t, h, d, s, v = (shape[name] for name in "BTHDSV")
    return {"q": normal(random, b, t, h, d), "turned": normal(random, b, t, h, s), "keys": normal(random, b, t, h, d),
            "shared": normal(random, b, t, s), "values": normal(random, b, t, h, v)}


def kept_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    b, t, h, v = (shape[name] for name in "BTHV")
    return {**_operands(random, shape), "scale": (shape["D"] + shape["S"]) ** -0.5, "out": unwritten(b, t, h, v),
            "level": unwritten(b, h, t)}


def gradient_arguments(random: "np.random.Generator", shape: Shape, keys: bool) -> Arguments:
    """With what the forward pass, and for keys the gradient by queries, left."""
    b, t, h, d, s, v = (shape[name] for name in "BTHDSV")
    made = _operands(random, shape)
    scale = (d + s) ** -0.5
    dout = normal(random, b, t, h, v)
    kept = {name: array.astype(np.float32, order="C")
            for name, array in kept_reference({**made, "scale": scale}).items()}
    if keys:
        along = np.einsum("bthv,bthv->bht", kept["out"], dout).astype(np.float32, order="C")
        return {**made, "level": kept["level"], "along": along, "dout": dout, "scale": scale,
                "dkeys": unwritten(b, t, h, d), "dshared": unwritten(b, t, h, s), "dvalues": unwritten(b, t, h, v)}
    return {**made, "level": kept["level"], "out": kept["out"], "dout": dout, "scale": scale,
            "dq": unwritten(b, t, h, d), "dturned": unwritten(b, t, h, s), "along": unwritten(b, h, t)}


def torch_forward(arguments: Arguments) -> Any:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q, turned, keys, shared, values = (
        torch.from_numpy(arguments[name]) for name in ("q", "turned", "keys", "shared", "values"))
    common = shared[:, :, None].expand_as(turned)
    q, k, v = (one.transpose(1, 2).contiguous()
               for one in (torch.cat([q, turned], -1), torch.cat([keys, common], -1), values))
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=True)


TOLERANCE = Tolerance(2e-5, 2e-5, "sums in f32 of up to T products of D + S or V terms, of rounded weights and "
                      "differences; what is near 0 keeps the error of its terms")


def _shape(b: int, t: int, h: int, d: int, s: int, v: int) -> dict[str, int]:
    return {"B": b, "T": t, "H": h, "D": d, "S": s, "V": v}


def _entry(kernel: Any, reference: Any, make_arguments: Any, products: tuple[int, int], moved: Any,
           peers: Any) -> LibraryKernel:
    """products: causal ones of D + S, and of V terms. moved: how often arrays of the sizes of q, turned, shared, values
    and level."""
    cases = []
    for b, t, h, d, s, v in ((1, 512, 16, 128, 64, 128), (1, 512, 8, 32, 16, 32)):
        sizes = (h * d, h * s, s, h * v, h)
        cases.append(Case(
            _shape(b, t, h, d, s, v), flops=b * h * t * (t + 1) * (products[0] * (d + s) + products[1] * v),
            bytes=4 * b * t * int(np.dot(moved, sizes))))
    return LibraryKernel(
        name=kernel.name, kernel=kernel, reference=reference, make_arguments=make_arguments, tolerance=TOLERANCE,
        cases=tuple(cases), peers=peers,
        check_shapes=(_shape(1, 0, 1, 8, 4, 8), _shape(1, 1, 1, 1, 2, 1), _shape(2, 9, 3, 8, 4, 12),
                      _shape(1, 37, 2, 19, 6, 11)),
    )


KERNELS = (
    _entry(latent_attention_kept, kept_reference, kept_arguments, (1, 1), (2, 1, 1, 2, 1), {"torch": torch_forward}),
    _entry(latent_gradient_queries, queries_reference,
           lambda random, shape: gradient_arguments(random, shape, False), (2, 1), (3, 2, 1, 3, 2), {}),
    _entry(latent_gradient_keys, keys_reference,
           lambda random, shape: gradient_arguments(random, shape, True), (2, 2), (3, 2, 1, 3, 2), {}),
    LibraryKernel(
        name="head_sums", kernel=head_sums,
        reference=lambda arguments: {"y": arguments["x"].astype(np.float64).sum(axis=1)},
        make_arguments=lambda random, shape: {"x": normal(random, shape["M"], shape["H"], shape["N"]),
                                              "y": unwritten(shape["M"], shape["N"])},
        tolerance=Tolerance(1e-6, 1e-5, "a sum over heads in f32, in any order"),
        cases=(Case({"M": 512, "H": 16, "N": 64}, flops=512 * 16 * 64, bytes=4 * 512 * 17 * 64),),
        check_shapes=({"M": 0, "H": 2, "N": 3}, {"M": 1, "H": 1, "N": 1}, {"M": 5, "H": 3, "N": 19},
                      {"M": 9, "H": 4, "N": 33}),
    ),
)
