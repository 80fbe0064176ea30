"""From one distribution of a tile over lanes to another, or out to memory: each way that there is, and its price.

Enters: layouts of a warp's part of a tile, in words of 32 bits at levels register and lane, and what the target says of
moves (`Moves`). Leaves: ways with prices, of which `cheapest` takes one:

    names        the registers are called otherwise
    shuffles     the steps of `layout.convert`: exchanges of 4 instructions for two registers, swaps of 2 for one
    near memory  stored as the one has it, loaded as the other wants it, with the banks' conflicts (banks.py)

What goes to memory may be brought to any distribution before, in which a lane has more neighbours, and so fewer
sectors are touched at once; or go as it is. A store that fills half of its sectors takes the port twice as long.

A processor works at instructions, at what passes between lanes (shuffles take the way of near memory, 128 bytes in a
cycle) and at its port to the last cache at the same time, on one warp or another: the busiest of the three counts, and
of equals fewer instructions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from math import gcd, prod

import numpy as np

from ..tile.schedule import Moves
from .banks import PHASE_BYTES, prove
from .layout import LANE, REGISTER, Array, Exchange, Factor, Layout, LayoutError, Rename, Step, convert

WORD_BYTES, RUN_BYTES = 4, 16
"""Of a register, and most that a lane reads or writes at once."""
NEAR_MEMORY = "near memory"
"""The name of that way."""
MEETINGS = 2
"""Around near memory: before what was written is read, and before it is written again."""
ROW_BYTES = 1 << 16
"""From row to row of a tensor, for counting: no two rows share a sector."""


@dataclass(frozen=True, slots=True)
class Price:
    """Of a warp. issued: instructions. passes: of 128 bytes between lanes, near memory and memory. sectors: of memory.
    near_bytes: of near memory."""

    issued: int = 0
    passes: int = 0
    sectors: int = 0
    near_bytes: int = 0

    def __add__(self, other: Price) -> Price:
        return Price(self.issued + other.issued, self.passes + other.passes, self.sectors + other.sectors,
                     max(self.near_bytes, other.near_bytes))

    def times(self, count: int) -> Price:
        return Price(self.issued * count, self.passes * count, self.sectors * count, self.near_bytes)

    def cycles(self, moves: Moves) -> float:
        """Of a processor, if all of its warps do the same."""
        return max(self.issued / moves.issued, self.passes, self.sectors * moves.sector_bytes / moves.port_bytes)


@dataclass(frozen=True, slots=True)
class Way:
    """name: see the head of the file; "as it is" for nothing. held: how the tile lies in the end. steps: on registers,
    that lead there."""

    name: str
    held: Layout
    price: Price
    steps: tuple[Step, ...] = field(default=())


def cheapest(ways: Iterable[Way], moves: Moves, warps: int = 1, at_hand: int = 0, near_bytes: int = 0) -> Way:
    """warps: of a worker. at_hand: bytes of near memory that a worker has anyway, of near_bytes of a processor, 0 if
    there is enough; if it needs more, there are fewer workers at once, which do as much less."""
    def cycles(way: Way) -> float:
        needed = max(at_hand, way.price.near_bytes * warps)
        if needed == at_hand or not near_bytes:
            return way.price.cycles(moves)
        residents = near_bytes // needed
        return way.price.cycles(moves) * (near_bytes // max(1, at_hand)) / residents if residents else float("inf")

    return min(ways, key=lambda way: (cycles(way), way.price.issued))


@cache
def conversions(source: Layout, target: Layout, moves: Moves, row_padding: int = WORD_BYTES) -> tuple[Way, ...]:
    """From one distribution to another, both of the same lanes. row_padding: bytes after each row in near memory."""
    found = convert(source, target)
    ways = [_through_near_memory(source, target, row_padding)]
    if found.kind in ("none", "rename"):
        ways.append(Way("as it is" if found.kind == "none" else "names", target, Price(), found.steps))
    elif found.kind == "shuffle":
        registers = source.level_extent(REGISTER)
        price = Price()
        for step in found.steps:
            if isinstance(step, Exchange):
                price += Price(moves.shuffle + 3 * moves.select, 1).times(registers // 2)
            elif not isinstance(step, Rename):
                price += Price(moves.shuffle + moves.select, 1).times(registers)
        ways.append(Way("shuffles", target, price, found.steps))
    return tuple(ways)


def _through_near_memory(source: Layout, target: Layout, row_padding: int) -> Way:
    """Rows of the last axis one after the other, each lane with as many neighbours at once as it holds."""
    last = list(source.axes)[-1]
    extent = source.shape[last]
    row_bytes = extent * WORD_BYTES + row_padding
    price = Price(issued=MEETINGS, near_bytes=row_bytes * (_words(source) // extent))
    for held in (source, target):
        places, run = _places(held, last, row_bytes, WORD_BYTES)
        run = gcd(run, row_bytes // WORD_BYTES)
        patterns = Counter(tuple((first - first[0]).tolist()) for first in places[::run])     # a proof is of every base
        for pattern, count in patterns.items():
            price += Price(1, prove(pattern, run * WORD_BYTES).total).times(count)
    return Way(NEAR_MEMORY, target, price)


@cache
def moved(held: Layout, axis: str, element_bytes: int, moves: Moves, aligned: bool = True) -> Price:
    """To store, or to load, a tile in memory where neighbours along an axis lie together, by a distribution of its
    elements over lanes. aligned: rows begin with a sector; otherwise anywhere, and each element goes by itself."""
    places, run = _places(held, axis, ROW_BYTES, element_bytes)
    size = run * element_bytes if aligned else element_bytes
    price = Price()
    for first in places[::run] if aligned else places + element_bytes:
        sectors = np.unique(np.concatenate([first // moves.sector_bytes, (first + size - 1) // moves.sector_bytes]))
        price += Price(1, -(-len(first) * size // PHASE_BYTES), len(sectors))
    return price


def _words(held: Layout) -> int:
    return prod(held.shape.values())


def _places(held: Layout, axis: str, row_bytes: int, element_bytes: int) -> tuple[Array, int]:
    """Bytes to the element of each register and lane, where neighbours along the axis lie together; and how many of
    them a lane holds in registers that follow each other, up to RUN_BYTES, and below that the lanes."""
    registers, lanes = (np.arange(held.level_extent(level)) for level in (REGISTER, LANE))
    grid = np.meshgrid(registers, lanes, indexing="ij")
    place = {level: at for level, at in zip((REGISTER, LANE), grid, strict=True) if level in held.levels}
    element = held.element(place)
    row = np.zeros_like(grid[0])
    for other, coordinate in element.items():
        if other != axis:
            row = row * held.shape[other] + coordinate
    run = held.axes[axis][-1] if held.axes[axis] else None
    count = gcd(run.extent, RUN_BYTES // element_bytes) if run is not None and run.level == REGISTER \
        and run.stride == 1 else 1
    return row * row_bytes + element[axis] * element_bytes, count


def turned(held: Layout, axis: str, bits: int) -> Layout:
    """The distribution in which so many bits of the lane's number along an axis have changed places with those of the
    register's above them: a lane then holds that many more neighbours. Raises LayoutError if there are too few."""
    single: list[Factor] = []       # from the least significant on
    for f in reversed(held.axes[axis]):
        if f.level == LANE or any(one.level == LANE for one in single):
            extent, stride = f.extent, f.stride
            while extent % 2 == 0:
                single.append(Factor(2, f.level, stride))
                extent, stride = extent // 2, stride * 2
            if extent > 1:
                single.append(Factor(extent, f.level, stride))
        else:
            single.append(f)
    lanes = [i for i, f in enumerate(single) if f.level == LANE]
    above = [i for i, f in enumerate(single) if f.level == REGISTER and f.extent == 2 and lanes and i > lanes[-1]]
    if len(lanes) < bits or len(above) < bits:
        raise LayoutError(f"axis {axis}: found {len(lanes)} bits of lanes, {len(above)} of registers above; expected "
                          f"{bits}")
    for low, high in zip(lanes[:bits], above[:bits], strict=True):
        single[low], single[high] = single[high], single[low]
    return Layout({**held.axes, axis: tuple(reversed(single))})
