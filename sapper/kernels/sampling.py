"""From logits to a token: argmax, the k largest, and a draw among them.

argmax: the lowest index of the largest value in each row.
top_k: of each row the K largest values in falling order, ties by rising index.
sample: draws one of a row's first `count` candidates, whose values fall, given a random number u in [0, 1). By their
    probabilities softmax(values), the fewest first ones are kept that reach top_p, and of these the ones with at least
    min_p of the first one's; the draw has the probabilities softmax(values / temperature) of what is kept. The first is
    always kept, and taken at temperature 0. The caller owns the random generator, so that a seed gives the same text
    everywhere.
"""

from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, argmax, each, exp, f32, i32, tiles, topk, whole, zeros

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
    order = np.argsort(-arguments["x"], kind="stable", axis=1)[:, : arguments["values"].shape[1]]
    return {"values": np.take_along_axis(arguments["x"], order, 1), "indices": order.astype(np.int32)}


@sp.kernel
def top_k(x: Tensor[f32, M, N], values: Tensor[f32, M, K], indices: Tensor[i32, M, K]):
    for m in each(M):
        n, k = whole(N), whole(K)
        found, places = topk(x[m, n], k, over=n)
        values[m, k] = found
        indices[m, k] = places.to(i32)


def sample_reference(arguments: Arguments) -> dict[str, Array]:
    names = ("count", "temperature", "top_p", "min_p", "u")
    token = np.empty(len(arguments["token"]), np.int32)
    for m, (values, indices) in enumerate(zip(arguments["values"], arguments["indices"], strict=True)):
        count, temperature, top_p, min_p, u = (arguments[name][m] for name in names)
        if temperature == 0:
            token[m] = indices[0]
            continue
        values = values[: int(count)]
        weight = np.exp(values - values[0]).astype(np.float32)
        before = np.concatenate([[np.float32(0)], np.cumsum(weight, dtype=np.float32)])
        kept = (before[:-1] < top_p * before[-1]) & (weight >= min_p)
        kept[0] = True
        drawn = np.exp((values - values[0]) / temperature).astype(np.float32)
        running = np.cumsum(np.where(kept, drawn, np.float32(0)), dtype=np.float32)
        token[m] = indices[np.count_nonzero(running <= u * running[-1])]
    return {"token": token}


@sp.kernel
def sample(
    values: Tensor[f32, M, K], indices: Tensor[i32, M, K], count: Tensor[i32, M], temperature: Tensor[f32, M],
    top_p: Tensor[f32, M], min_p: Tensor[f32, M], u: Tensor[f32, M], token: Tensor[i32, M],
):
    for m in each(M):
        highest = values[m, 0]
        chosen = indices[m, 0]
        heat = temperature[m]
        if heat > 0.0:
            mass = zeros(dtype=f32)
            for j in range(count[m]):
                mass += exp(values[m, j] - highest)
            limit = top_p[m] * mass
            total = zeros(dtype=f32)
            before = zeros(dtype=f32)
            for j in range(count[m]):
                weight = exp(values[m, j] - highest)
                kept = j < 1 or (before < limit and weight >= min_p[m])
                total += exp((values[m, j] - highest) / heat) if kept else 0.0
                before += weight
            threshold = u[m] * total
            running = zeros(dtype=f32)
            before = zeros(dtype=f32)
            for j in range(count[m]):
                weight = exp(values[m, j] - highest)
                kept = j < 1 or (before < limit and weight >= min_p[m])
                # The last candidate whose part of the running sum starts at or below the threshold wins.
                chosen = indices[m, j] if kept and running <= threshold else chosen
                running += exp((values[m, j] - highest) / heat) if kept else 0.0
                before += weight
        token[m] = chosen


def argmax_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    m, n = shape["M"], shape["N"]
    x = normal(random, m, n)
    if n > 3:
        x[:, n // 2] = x[:, 1] = 9.0  # A tie, of which the lower index is wanted.
    return {"x": x, "index": unwritten(m, dtype="i32")}


def top_k_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    m, n, k = shape["M"], shape["N"], shape["K"]
    x = np.round(normal(random, m, n) * np.float32(8)) / np.float32(8)  # Coarse, so that there are ties.
    return {"x": x, "values": unwritten(m, k), "indices": unwritten(m, k, dtype="i32")}


def sample_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    m, k = shape["M"], shape["K"]
    values = -np.sort(-normal(random, m, k, scale=2.0), axis=1)

    def each_row(low: float, high: float) -> Array:
        return random.uniform(low, high, m).astype(np.float32)

    temperature = each_row(0.5, 1.5)
    temperature[m // 2 :: 3] = 0.0
    return {
        "values": values, "indices": random.integers(0, 1000, (m, k)).astype(np.int32),
        "count": random.integers(1, k + 1, m).astype(np.int32), "temperature": temperature,
        "top_p": each_row(0.3, 1.0), "min_p": each_row(0.0, 0.2), "u": each_row(0.0, 0.999),
        "token": unwritten(m, dtype="i32"),
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

    x, k = torch.from_numpy(arguments["x"]), arguments["values"].shape[1]
    return lambda: torch.topk(x, k, dim=1)


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
        cases=(Case({"M": 1, "N": 49152, "K": 40}, flops=0, bytes=4 * 49152 + 8 * 40),),
        check_shapes=tuple({"M": m, "N": n, "K": k} for m, n, k in ((1, 1, 1), (3, 5, 5), (2, 30, 7), (2, 1000, 20))),
        peers={"torch": top_k_torch},
    ),
    LibraryKernel(
        name="sample",
        kernel=sample,
        reference=sample_reference,
        make_arguments=sample_arguments,
        tolerance=EXACT,
        cases=(Case({"M": 8, "K": 40}, flops=6 * 8 * 40, bytes=8 * 8 * 40 + 24 * 8),),
        check_shapes=tuple({"M": m, "K": k} for m, k in ((0, 3), (1, 1), (1, 2), (3, 5), (7, 34))),
    ),
)
