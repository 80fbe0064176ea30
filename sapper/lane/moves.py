"""What it takes to bring elements to other lanes, where lanes are threads: instructions that a warp issues.

Sums, minima and maxima along an axis that lies across the lanes end with a part of each in every lane. Of one row a
butterfly makes it whole in all lanes: log2(lanes) shuffles, each with a join. Several rows can be joined together: in
the first round two rows become one, whose lower lanes go on with the first and whose upper lanes with the second, and
so on, until row i is whole in lane i. To have it in all lanes then takes one more shuffle a row.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..tile.schedule import Moves


def rounds(rows: int, lanes: int) -> Iterator[tuple[int, list[tuple[int, bool]]]]:
    """How rows 0, 1, ... are joined together: of each round the distance between lanes, and the rows that are left
    after it, each with whether it has met the one whose number is greater by the distance; else there is none, and it
    has met its own other half. Distances beyond all rows come last, when one row is left."""
    steps = [lanes >> n for n in range(1, lanes.bit_length())]
    for distance in sorted(steps, key=lambda step: step >= rows):
        yield distance, [(row, row + distance < rows) for row in range(min(rows, distance))]
        rows = min(rows, distance)


def one_by_one(rows: int, lanes: int, moves: Moves) -> int:
    """To join the lanes of each of so many rows, so that all have it."""
    return rows * (lanes.bit_length() - 1) * (moves.shuffle + moves.join)


def together(rows: int, lanes: int, moves: Moves) -> int:
    """The same, of all rows together and with one more shuffle for each."""
    return rows * moves.shuffle + sum(moves.shuffle + moves.join + 2 * moves.select * met
                                      for _, kept in rounds(rows, lanes) for _, met in kept)
