"""Attention of single tokens, shared out to workers by positions.

A row is what attends by itself: a token, or a key head of a token with the query heads that share it, in the order of
memory. Each sees a number of positions. Those of all rows, one row after the other, are cut into W shares, each as long
as the others, wherever rows end: share w begins at position at[w] of row row[w], and ends where share w + 1 begins. So
rows may be fewer than workers, or more but no multiple of them, and as different from each other as sequences are.

A kernel that attends takes the shares as its tasks (`rows_of_share`, `part_of_row`). Of a row that it has as a whole it
writes the result; of one that it shares, of which there are two at most, the maximum of the scores, the sum of the
weights and what they make of the values (`leave`): in [w, CONTINUED] of a row that an earlier share begins, in
[w, BEGUN] of one that it begins itself. Then `merge_shares` joins the parts, which are at most W - 1 rows': where there
are many rows, all of this is little beside them.

    share_tokens    the cuts, for tokens at places of their own
    merge_shares    what the parts of rows give together
"""

from collections.abc import Callable
from typing import Any

import numpy as np

import sapper as sp
from sapper import Tensor, each, exp, f32, i32, i64, where, whole, zeros

from .online_softmax import join
from .record import EXACT, Arguments, Array, Case, LibraryKernel, Shape, Tolerance, normal, unwritten

T, R, G, D, V, W = sp.dims("T R G D V W")
GRAIN = 16
"""Positions of which a share begins at a multiple: a lane or more for each on most targets, and half a microsecond's
work at least for a core."""
CONTINUED, BEGUN = 0, 1


def cut(flat: Any, count: Any, grain: Any) -> Any:
    """Row and position of place `flat` of rows of `count` positions each. What is left of a row that is too short for a
    part of its own goes with what is before."""
    at = (flat % count + grain // 2) // grain * grain
    over = at > 0 and at + grain > count
    return flat // count + (1 if over else 0), 0 if over else at


@sp.kernel
def share_tokens(place: Tensor[i32, T], rows: i32, grain: i32, row: Tensor[i32, V], at: Tensor[i32, V]):
    """Cuts of V - 1 shares. rows: of each token, which see the positions 0 ... place[t]."""
    shares = V - 1
    for w in range(V):      # the last one, and all where there is no token
        row[w] = T.to(i32) * rows
        at[w] = zeros(dtype=i32)
    total = zeros(dtype=i64)
    for t in range(T):
        total = total + (place[t].to(i64) + 1) * rows.to(i64)
    before = zeros(dtype=i64)
    for t in range(T):
        count = place[t].to(i64) + 1
        behind = before + count * rows.to(i64)
        for w in range((before * shares + total - 1) // total, (behind * shares + total - 1) // total):
            inside, begin = cut(w * total // shares - before, count, grain)
            row[w] = (t * rows + inside).to(i32)
            at[w] = begin.to(i32)
        before = behind


def rows_of_share(row: Any, at: Any, w: Any) -> Any:
    """The first row of share w, and the one behind its last. A share may be empty."""
    first, last = row[w], row[w + 1]
    part = at[w + 1] > 0 and (first < last or at[w] < at[w + 1])
    return first, last + (1 if part else 0)


def part_of_row(row: Any, at: Any, w: Any, r: Any, count: Any) -> Any:
    """Where what share w has of row r begins and ends, of `count` positions."""
    return at[w] if r == row[w] else 0, at[w + 1] if r == row[w + 1] else count


def leave(highest: Any, total: Any, partial: Any, w: Any, begin: Any, g: Any, d: Any, top: Any, sums: Any,
          acc: Any) -> None:
    """What share w found in its part of a row, from position `begin` on; of no position that is kept, nothing."""
    part = BEGUN if begin == 0 else CONTINUED
    highest[w, part, g] = top
    total[w, part, g] = sums
    partial[w, part, g, d] = acc * where(sums > 0.0, 1.0 / sums, 0.0)


@sp.kernel(specialise="D")
def merge_shares(
    row: Tensor[i32, W + 1], at: Tensor[i32, W + 1], highest: Tensor[f32, W, 2, G], total: Tensor[f32, W, 2, G],
    partial: Tensor[f32, W, 2, G, D], out: Tensor[f32, R, G, D],
):
    """The results of the rows that several shares have: each is that of the share that begins it."""
    for g, w in each(G, W, disjoint=True):
        mine = row[w + 1]
        if at[w + 1] > 0 and (at[w] == 0 or row[w] < mine):
            d = whole(D)
            top = highest[w, BEGUN, g]
            sums = total[w, BEGUN, g]
            acc = partial[w, BEGUN, g, d] * sums
            for b in range(w + 1, W):
                if row[b] == mine and (row[b + 1] > mine or at[b + 1] > at[b]):
                    more = total[b, CONTINUED, g]
                    top, sums, acc = join(top, sums, acc, highest[b, CONTINUED, g], more,
                                          partial[b, CONTINUED, g, d] * more, exp)
            out[mine, g, d] = acc / sums


# ------------------------------------------------------------------------------------------- references and arguments


LEAST = -1e30
"""Below all scores: what a part leaves that has no position which is kept (sparse_paged.py)."""


def cuts(counts: list[int], shares: int, grain: int = GRAIN) -> tuple[Array, Array]:
    """row and at for rows of so many positions."""
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    found = []
    for w in range(shares + 1):
        flat = w * total // shares
        row = int(np.searchsorted(ends, flat, side="right"))
        if row == len(ends):
            found.append((row, 0))
            continue
        at = (flat - int(ends[row]) + counts[row] + grain // 2) // grain * grain
        found.append((row + 1, 0) if at and at + grain > counts[row] else (row, at))
    row_of, at_of = np.array(found, np.int32).T
    return np.ascontiguousarray(row_of), np.ascontiguousarray(at_of)


def parts(row: Array, at: Array, counts: list[int]) -> list[list[tuple[int, int, int, int]]]:
    """Of each row what shares have of it: share, part of it, first position, one past the last."""
    found: list[list[tuple[int, int, int, int]]] = [[] for _ in counts]
    for w in range(len(row) - 1):
        for r in range(row[w], row[w + 1] + 1):
            begin = int(at[w]) if r == row[w] else 0
            end = int(at[w + 1]) if r == row[w + 1] else counts[r]
            if begin < end:
                found[r].append((w, CONTINUED if begin else BEGUN, begin, end))
    return found


def shared_reference(
    arguments: Arguments, counts: list[int], found: Callable[[int, slice], tuple[Array, Array]]
) -> dict[str, Array]:
    """What shares leave, and the results of whole rows. counts: of each row; found: the scores of a row and the values
    that they weigh, at some of its positions."""
    expected = {name: arguments[name].astype(np.float64) for name in ("highest", "total", "partial", "out")}
    out = expected["out"].reshape(-1, *expected["partial"].shape[2:])
    for r, shared in enumerate(parts(arguments["row"], arguments["at"], counts)):
        for w, part, begin, end in shared:
            score, values = found(r, slice(begin, end))
            top = np.maximum(score.max(axis=-1), LEAST)
            weight = np.exp(score - top[:, None])
            if end - begin == counts[r]:
                out[r] = weight @ values / weight.sum(axis=-1, keepdims=True)
            else:
                expected["highest"][w, part], expected["total"][w, part] = top, weight.sum(axis=-1)
                total = weight.sum(axis=-1, keepdims=True)
                expected["partial"][w, part] = np.divide(weight @ values, total, where=total > 0, out=np.zeros(
                    (len(weight), values.shape[1])))
    return expected


def places_reference(arguments: Arguments) -> dict[str, Array]:
    counts = [int(place) + 1 for place in arguments["place"] for _ in range(arguments["rows"])]
    row, at = cuts(counts, len(arguments["row"]) - 1, arguments["grain"])
    return {"row": row, "at": at}


def merge_reference(arguments: Arguments) -> dict[str, Array]:
    out = arguments["out"].astype(np.float64)
    highest, total, partial = (arguments[name].astype(np.float64) for name in ("highest", "total", "partial"))
    most = int(arguments["at"].max()) + 1       # of no row the end is asked for
    for r, found in enumerate(parts(arguments["row"], arguments["at"], [most] * len(out))):
        if len(found) > 1:
            index = tuple(zip(*((w, part) for w, part, _, _ in found), strict=True))
            weight = np.exp(highest[index] - highest[index].max(axis=0))
            weight *= total[index]
            out[r] = (weight[..., None] * partial[index]).sum(axis=0) / weight.sum(axis=0)[..., None]
    return {"out": out}


def buffers(shares: int, *extents: int) -> Arguments:
    """highest, total and partial for rows of these extents."""
    return {"highest": unwritten(shares, 2, *extents[:-1]), "total": unwritten(shares, 2, *extents[:-1]),
            "partial": unwritten(shares, 2, *extents)}


def token_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    return {"place": random.integers(0, shape["position"] + 1, shape["T"]).astype(np.int32), "rows": shape["rows"],
            "grain": GRAIN, "row": unwritten(shape["V"], dtype="i32"), "at": unwritten(shape["V"], dtype="i32")}


def merge_arguments(random: "np.random.Generator", shape: Shape) -> Arguments:
    rows, g, d, shares = (shape[name] for name in ("R", "G", "D", "W"))
    counts = [int(count) for count in random.integers(1, shape["position"] + 2, rows)]
    row, at = cuts(counts, shares)
    return {
        "row": row, "at": at, "highest": normal(random, shares, 2, g),
        "total": 1.0 + random.random((shares, 2, g), np.float32), "partial": normal(random, shares, 2, g, d),
        "out": unwritten(rows, g, d),
    }


KERNELS = (
    LibraryKernel(
        name="share_tokens", kernel=share_tokens, reference=places_reference, make_arguments=token_arguments,
        tolerance=EXACT,
        cases=(Case({"T": 16, "rows": 3, "V": 17, "position": 511}, flops=0, bytes=4 * (16 + 2 * 17)),),
        check_shapes=(
            {"T": 0, "rows": 2, "V": 4, "position": 0}, {"T": 1, "rows": 1, "V": 2, "position": 6},
            {"T": 1, "rows": 1, "V": 9, "position": 70}, {"T": 5, "rows": 3, "V": 4, "position": 150},
            {"T": 7, "rows": 1, "V": 33, "position": 40},
        ),
        dtype="i32",
    ),
    LibraryKernel(
        name="merge_shares", kernel=merge_shares, reference=merge_reference, make_arguments=merge_arguments,
        tolerance=Tolerance(2e-5, 5e-6, "exp of a difference of a few units is relative to it; sums run in any order"),
        cases=(Case({"R": 1, "G": 16, "D": 512, "W": 16, "position": 4095}, flops=4 * 16 * 512 * 16,
                    bytes=4 * (2 * 17 + 16 * (2 * 16 * 514 + 512))),),
        check_shapes=(
            {"R": 1, "G": 1, "D": 1, "W": 1, "position": 3}, {"R": 1, "G": 3, "D": 19, "W": 7, "position": 60},
            {"R": 4, "G": 2, "D": 33, "W": 3, "position": 150}, {"R": 2, "G": 4, "D": 64, "W": 8, "position": 40},
        ),
    ),
)
