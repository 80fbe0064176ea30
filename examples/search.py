"""Distances, nearest neighbours, best paths."""

from __future__ import annotations

import numpy as np

import sapper as sp
from sapper import Tensor, each, exp, f32, full, i32, minimum, tiles, u8, where, whole, zeros

from . import Example, empty, normal

B, D, K, M, N, S, T = sp.dims("B D K M N S T")
ROUNDS = 20


@sp.kernel
def nearest_centres(x: Tensor[f32, M, D], centre: Tensor[f32, N, D], nearest: Tensor[i32, M]):
    """A round of k-means: of each point the centre at the least distance."""
    for m in tiles(M):
        n, d = whole(N), whole(D)
        distance = sum(centre[n, d] * centre[n, d], over=d) - 2.0 * (x[m, d] @ centre[n, d])
        nearest[m] = sp.argmin(distance, over=n).to(i32)


@sp.kernel
def nearest_neighbours(x: Tensor[f32, M, D], known: Tensor[f32, N, D], nearest: Tensor[i32, M, 8]):
    """The eight nearest of each point, the nearest first."""
    for m in tiles(M):
        n, d, k = whole(N), whole(D), whole(8)
        closeness = 2.0 * (x[m, d] @ known[n, d]) - sum(known[n, d] * known[n, d], over=d)
        _, place = sp.topk(closeness, k, over=n)
        nearest[m, k] = place.to(i32)


@sp.kernel
def cosine_similarity(a: Tensor[f32, M, K], b: Tensor[f32, N, K], y: Tensor[f32, M, N]):
    for m, n in tiles(M, N):
        k = whole(K)
        lengths = sp.rsqrt(sum(a[m, k] * a[m, k], over=k)) * sp.rsqrt(sum(b[n, k] * b[n, k], over=k))
        y[m, n] = (a[m, k] @ b[n, k]) * lengths


@sp.kernel
def gaussian_sums(x: Tensor[f32, M, D], z: Tensor[f32, N, D], w: Tensor[f32, N, K], y: Tensor[f32, M, K]):
    """Sums of w, weighted by e**-|x - z|**2: kernel regression, and what attention is without a softmax."""
    for m in tiles(M):
        d, k = whole(D), whole(K)
        own = sum(x[m, d] * x[m, d], over=d)
        acc = zeros(m, k, dtype=f32)
        for n in tiles(N):
            other = sum(z[n, d] * z[n, d], over=d)
            acc += exp(2.0 * (x[m, d] @ z[n, d]) - own - other) @ w[n, k]
        y[m, k] = acc


@sp.kernel
def balanced_transport(cost: Tensor[f32, B, M, N], y: Tensor[f32, B, M, N]):
    """Sinkhorn's iterations (arXiv:1306.0895): of as many rows as columns, which are scaled in turns until
    both add up to one."""
    for b in each(B):
        m, n = whole(M), whole(N)
        kernel = exp(-cost[b, m, n])
        rows, columns = full(m, value=1.0, dtype=f32), full(n, value=1.0, dtype=f32)
        for _ in range(ROUNDS):
            rows = 1.0 / sum(kernel * columns, over=n)
            columns = 1.0 / sum(kernel * rows, over=m)
        y[b, m, n] = rows * kernel * columns


@sp.kernel
def best_paths(emission: Tensor[f32, T, S], transition: Tensor[f32, S, S], y: Tensor[f32, S]):
    """Viterbi's scores of paths that end in each state; y holds those of the states before."""
    s, before = whole(S), whole(S)
    score = zeros(s, dtype=f32)
    for t in range(T):
        y[s] = score + emission[t, s]
        score = max(y[before] + transition[before, s], over=before)
    y[s] = score


@sp.kernel
def edit_distances(a: Tensor[u8, M, B], b: Tensor[u8, N, B], row: Tensor[i32, N + 1, B], y: Tensor[i32, B]):
    """Letters to change, insert or delete (Levenshtein), of pairs of words side by side: a pair in each lane. row: one
    of the table of distances of their beginnings, kept from letter to letter of the first word."""
    for p in tiles(B):
        for j in range(N + 1):
            row[j, p] = j.to(i32)
        for i in range(M):
            corner, left = row[0, p], full(p, value=1, dtype=i32) + i.to(i32)
            row[0, p] = left
            for j in range(N):
                above = row[j + 1, p]
                left = minimum(minimum(left, above) + 1, where(a[i, p] == b[j, p], corner, corner + 1))
                row[j + 1, p] = left
                corner = above
        y[p] = row[N, p]


@sp.kernel
def drawn_tokens(logits: Tensor[f32, B, N], share: f32, chance: Tensor[f32, B], token: Tensor[i32, B]):
    """Of the 32 likeliest those that have a share of the probability together (top-p, arXiv:1904.09751), and one of
    these by chance."""
    for b in tiles(B):
        n, k = whole(N), whole(32)
        best, place = sp.topk(logits[b, n], k, over=n)
        power = exp(best - max(best, over=k))
        before = sp.cumsum(power, over=k) - power
        kept = sp.where(before < share * sum(power, over=k), power, 0.0)
        passed = sp.where(sp.cumsum(kept, over=k) < chance[b] * sum(kept, over=k), 1, 0)
        drawn = sp.minimum(sum(passed.to(i32), over=k), 31)
        token[b] = sum(sp.where(k == drawn, place.to(i32), 0), over=k)


@sp.kernel
def run_lengths(x: Tensor[i32, N], value: Tensor[i32, N], start: Tensor[i32, N], runs: Tensor[i32, 1]):
    """What repeats, and where it begins, for each run of equal numbers. Each number goes to the place of its run, which
    moves on where the next one differs: a store at all of them costs less than a branch."""
    for n in tiles(N):
        value[n] = 0
        start[n] = 0
    run = zeros(dtype=i32)
    first = zeros(dtype=i32)
    for n in range(N):
        value[run] = x[n]
        start[run] = first
        ends = where(x[minimum(n + 1, N - 1)] != x[n], 1, 0)
        first = where(ends == 1, (n + 1).to(i32), first)
        run += ends
    runs[0] = run + 1


def _neighbours_reference(x, known):
    closeness = 2 * x @ known.T - (known * known).sum(1)
    return (np.argsort(-closeness, 1, kind="stable")[:, :8].astype(np.int32),)


def _gaussian_reference(x, z, w):
    distance = (x * x).sum(1)[:, None] + (z * z).sum(1) - 2 * x @ z.T
    return (np.exp(-distance) @ w,)


def _cosine_reference(a, b):
    return ((a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T,)


def _transport_reference(cost):
    kernel = np.exp(-cost)
    rows, columns = np.ones((*cost.shape[:2], 1), np.float32), np.ones((len(cost), 1, cost.shape[2]), np.float32)
    for _ in range(ROUNDS):
        rows = 1 / (kernel * columns).sum(2, keepdims=True)
        columns = 1 / (kernel * rows).sum(1, keepdims=True)
    return (rows * kernel * columns,)


def _paths_reference(emission, transition):
    score = np.zeros(len(transition), np.float32)
    for row in emission:
        score = ((score + row)[:, None] + transition).max(0)
    return (score,)


def _torch_cosine(a, b):
    from torch.nn.functional import normalize

    return normalize(a, dim=1) @ normalize(b, dim=1).T


def _torch_gaussian(x, z, w):
    import torch

    return torch.exp(2 * x @ z.T - x.square().sum(1)[:, None] - z.square().sum(1)) @ w


def _torch_transport(cost):
    kernel = (-cost).exp()
    rows, columns = kernel.new_ones(*cost.shape[:2], 1), kernel.new_ones(len(cost), 1, cost.shape[2])
    for _ in range(ROUNDS):
        rows = 1 / (kernel * columns).sum(2, keepdim=True)
        columns = 1 / (kernel * rows).sum(1, keepdim=True)
    return rows * kernel * columns


def _torch_paths(emission, transition):
    score = emission.new_zeros(len(transition))
    for row in emission:
        score = ((score + row)[:, None] + transition).amax(0)
    return score


def _edits_reference(a, b):
    row = np.repeat(np.arange(len(b) + 1)[:, None], a.shape[1], axis=1)
    for i, letter in enumerate(a):
        corner, row[0] = row[0].copy(), i + 1
        for j in range(len(b)):
            above = row[j + 1].copy()
            row[j + 1] = np.minimum(np.minimum(row[j], above) + 1, corner + (letter != b[j]))
            corner = above
    return row, row[-1]


def _drawn_reference(logits, share, chance):
    place = np.argsort(-logits, 1, kind="stable")[:, :32]
    power = np.exp(np.take_along_axis(logits, place, 1) - logits.max(1, keepdims=True))
    kept = np.where(np.cumsum(power, 1) - power < share * power.sum(1, keepdims=True), power, 0)
    drawn = (np.cumsum(kept, 1) < chance[:, None] * kept.sum(1, keepdims=True)).sum(1)
    return (np.take_along_axis(place, np.minimum(drawn, 31)[:, None], 1)[:, 0].astype(np.int32),)


def _torch_drawn(logits, share, chance):
    import torch

    best, place = logits.topk(32, 1)
    power = torch.softmax(best, 1)
    kept = torch.where(power.cumsum(1) - power < share, power, 0)
    drawn = (kept.cumsum(1) < chance[:, None] * kept.sum(1, keepdim=True)).sum(1, keepdim=True)
    return place.gather(1, drawn.clamp(max=31))


def _runs_reference(x):
    start = np.flatnonzero(np.append(True, x[1:] != x[:-1])).astype(np.int32)
    rest = np.zeros(len(x) - len(start), np.int32)
    return np.append(x[start], rest), np.append(start, rest), np.array([len(start)], np.int32)


EXAMPLES = [
    Example(nearest_centres, lambda random, s: (
        normal(random, s["M"], s["D"]), normal(random, s["N"], s["D"]), empty(s["M"], dtype=np.int32)),
        lambda x, centre: (((centre * centre).sum(1) - 2 * x @ centre.T).argmin(1).astype(np.int32),),
        {"M": 1024, "N": 256, "D": 64}, {"M": 37, "N": 21, "D": 9},
        lambda x, centre: (centre.square().sum(1) - 2 * x @ centre.T).argmin(1)),
    Example(nearest_neighbours, lambda random, s: (
        normal(random, s["M"], s["D"]), normal(random, s["N"], s["D"]), empty(s["M"], 8, dtype=np.int32)),
        _neighbours_reference, {"M": 512, "N": 2048, "D": 64}, {"M": 19, "N": 37, "D": 9},
        lambda x, known: (2 * x @ known.T - known.square().sum(1)).topk(8)[1]),
    Example(cosine_similarity, lambda random, s: (
        normal(random, s["M"], s["K"]), normal(random, s["N"], s["K"]), empty(s["M"], s["N"])),
        _cosine_reference, {"M": 256, "N": 512, "K": 128}, {"M": 5, "N": 37, "K": 19}, _torch_cosine),
    Example(gaussian_sums, lambda random, s: (
        0.1 * normal(random, s["M"], s["D"]), 0.1 * normal(random, s["N"], s["D"]), normal(random, s["N"], s["K"]),
        empty(s["M"], s["K"])),
        _gaussian_reference, {"M": 512, "N": 1024, "D": 64, "K": 32}, {"M": 37, "N": 70, "D": 9, "K": 5},
        _torch_gaussian),
    Example(balanced_transport, lambda random, s: (
        normal(random, s["B"], s["M"], s["N"]), empty(s["B"], s["M"], s["N"])),
        _transport_reference, {"B": 8, "M": 128, "N": 128}, {"B": 2, "M": 21, "N": 21}, _torch_transport),
    Example(best_paths, lambda random, s: (
        normal(random, s["T"], s["S"]), normal(random, s["S"], s["S"]), empty(s["S"])),
        _paths_reference, {"T": 128, "S": 64}, {"T": 6, "S": 21}, _torch_paths),
    Example(edit_distances, lambda random, s: (
        random.integers(0, 4, (s["M"], s["B"]), np.uint8), random.integers(0, 4, (s["N"], s["B"]), np.uint8),
        empty(s["N"] + 1, s["B"], dtype=np.int32), empty(s["B"], dtype=np.int32)),
        _edits_reference, {"M": 32, "N": 32, "B": 256}, {"M": 4, "N": 6, "B": 37}, results=2),
    Example(drawn_tokens, lambda random, s: (
        3 * normal(random, s["B"], s["N"]), 0.9, random.random(s["B"], dtype=np.float32),
        empty(s["B"], dtype=np.int32)),
        _drawn_reference, {"B": 16, "N": 32768}, {"B": 3, "N": 45}, _torch_drawn),
    Example(run_lengths, lambda random, s: (
        random.integers(0, 3, s["N"], np.int32), *(empty(s["N"], dtype=np.int32) for _ in range(2)),
        empty(1, dtype=np.int32)),
        _runs_reference, {"N": 1 << 17}, {"N": 53}, lambda x: x.unique_consecutive(return_counts=True), results=3),
]
