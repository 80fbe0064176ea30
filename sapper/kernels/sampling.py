"""From logits to a token: argmax, the k largest, and a draw among them.

argmax: the lowest index of the largest value in each row.
top_k: the K largest values in falling order, ties by rising index.
sample_top_k: draws one of K candidates, whose values fall, given a random number u in [0, 1). By their probabilities
    softmax(values), the fewest first ones are kept that reach top_p, and of these the ones with at least min_p of the
    first one's; the draw has the probabilities softmax(values / temperature) of what is kept. The first is always kept.
    The caller owns the random generator, so that a seed gives the same text everywhere.
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, argmax, exp, f32, i32, tiles, topk, whole, zeros

from .record import EXACT, Arguments, Array, Case, LibraryKernel, Shape, normal, unwritten

M, N, K = sp.dims("M N K")


def argmax_reference(arguments: Arguments) -> dict[str, Array]:
    return {"index": arguments["x"].argmax(axis=1).astype(np.int32)}


@sp.kernel
def argmax_rows(x: Tensor[f32, M, N], index: Tensor[i32, M]):
    for m in tiles(M):
        n = whole(N)
        index[m] = argmax(x[m, n], over=n).to(i32)


def top_k_reference(arguments: Arguments) -> dict[str, Array]:
    order = np.argsort(-arguments["x"], kind="stable")[: arguments["values"].size]
    return {"values": arguments["x"][order], "indices": order.astype(np.int32)}


@sp.kernel
def top_k(x: Tensor[f32, N], values: Tensor[f32, K], indices: Tensor[i32, K]):
    n, k = whole(N), whole(K)
    found, places = topk(x[n], k, over=n)
    values[k] = found
    indices[k] = places.to(i32)


def sample_reference(arguments: Arguments) -> dict[str, Array]:
    values = arguments["values"].astype(np.float32)
    weight = np.exp(values - values[0]).astype(np.float32)
    before = np.concatenate([[np.float32(0)], np.cumsum(weight, dtype=np.float32)])
    kept = (before[:-1] < np.float32(arguments["top_p"]) * before[-1]) & (weight >= np.float32(arguments["min_p"]))
    kept[0] = True
    drawn = np.exp((values - values[0]) / np.float32(arguments["temperature"])).astype(np.float32)
    running = np.cumsum(np.where(kept, drawn, np.float32(0)), dtype=np.float32)
    chosen = int(np.count_nonzero(running <= np.float32(arguments["u"]) * running[-1]))
    return {"token": arguments["indices"][[chosen]]}


@sp.kernel
def sample_top_k(
    values: Tensor[f32, K], indices: Tensor[i32, K], temperature: f32, top_p: f32, min_p: f32, u: f32,
    token: Tensor[i32, 1],
):
    highest = values[0]
    mass = zeros(dtype=f32)
    for j in range(K):
        mass += exp(values[j] - highest)
    limit = top_p * mass
    total = zeros(dtype=f32)
    before = zeros(dtype=f32)
    for j in range(K):
        weight = exp(values[j] - highest)
        kept = j < 1 or (before < limit and weight >= min_p)
        total += exp((values[j] - highest) / temperature) if kept else 0.0
        before += weight
    threshold = u * total
    running = zeros(dtype=f32)
    before = zeros(dtype=f32)
    chosen = indices[0]
    for j in range(K):
        weight = exp(values[j] - highest)
        kept = j < 1 or (before < limit and weight >= min_p)
        # The last candidate whose part of the running sum starts at or below the threshold wins.
        chosen = indices[j] if kept and running <= threshold else chosen
        running += exp((values[j] - highest) / temperature) if kept else 0.0
        before += weight
    token[0] = chosen


def argmax_arguments(random: np.random.Generator, shape: Shape) -> Arguments:
    m, n = shape["M"], shape["N"]
    x = normal(random, m, n)
    if n > 3:
        x[:, n // 2] = x[:, 1] = 9.0  # A tie, of which the lower index is wanted.
    return {"x": x, "index": unwritten(m, dtype="i32")}


def top_k_arguments(random: np.random.Generator, shape: Shape) -> Arguments:
    n, k = shape["N"], shape["K"]
    x = np.round(normal(random, n) * np.float32(8)) / np.float32(8)  # Coarse, so that there are ties.
    return {"x": x, "values": unwritten(k), "indices": unwritten(k, dtype="i32")}


def sample_arguments(random: np.random.Generator, shape: Shape) -> Arguments:
    k = shape["K"]
    values = -np.sort(-normal(random, k, scale=2.0))
    indices = random.permutation(1000)[:k].astype(np.int32)
    return {
        "values": values, "indices": indices, "temperature": 0.7, "top_p": shape["tenths"] / 10, "min_p": 0.05,
        "u": float(random.random()),
        "token": unwritten(1, dtype="i32"),
    }


def argmax_numpy(arguments: Arguments) -> Any:
    x = arguments["x"]
    return lambda: np.argmax(x, axis=1)


def argmax_torch(arguments: Arguments) -> Any:
    import torch

    x = torch.from_numpy(arguments["x"])
    return lambda: torch.argmax(x, dim=1)


def top_k_torch(arguments: Arguments) -> Any:
    import torch

    x, k = torch.from_numpy(arguments["x"]), arguments["values"].size
    return lambda: torch.topk(x, k)


KERNELS = (
    LibraryKernel(
        name="argmax_rows",
        kernel=argmax_rows,
        reference=argmax_reference,
        make_arguments=argmax_arguments,
        tolerance=EXACT,
        cases=tuple(Case({"M": m, "N": n}, flops=0, bytes=4 * m * n + 4 * m) for m, n in ((1, 49152), (512, 49152))),
        check_shapes=({"M": 0, "N": 4}, {"M": 1, "N": 1}, {"M": 3, "N": 17}, {"M": 2, "N": 4099}),
        peers={"numpy": argmax_numpy, "torch": argmax_torch},
    ),
    LibraryKernel(
        name="top_k",
        kernel=top_k,
        reference=top_k_reference,
        make_arguments=top_k_arguments,
        tolerance=EXACT,
        cases=(Case({"N": 49152, "K": 40}, flops=0, bytes=4 * 49152 + 8 * 40),),
        check_shapes=({"N": 1, "K": 1}, {"N": 5, "K": 5}, {"N": 100, "K": 7}, {"N": 1000, "K": 20}),
        peers={"torch": top_k_torch},
    ),
    LibraryKernel(
        name="sample_top_k",
        kernel=sample_top_k,
        reference=sample_reference,
        make_arguments=sample_arguments,
        tolerance=EXACT,
        cases=(Case({"K": 40, "tenths": 9}, flops=6 * 40, bytes=8 * 40 + 4),),
        check_shapes=tuple({"K": k, "tenths": p} for k, p in ((1, 10), (2, 5), (5, 9), (34, 8))),
    ),
)
