"""The schedules next to a schedule: what a pattern search may try.

Enters a schedule and what the lowering makes of it (`lane.choices`). Leaves `Step`s: each changes one part, or two
register factors against each other, by one rung of a ladder, and is told in a line. Holds: steps come in a fixed order;
one that would hold more than twice the target's registers is left out, since it can only spill. Of a product that warps
multiply together, a step is another of the tiles that fit, other clusters, or another way to go through the depth:
whole tiles, or some share it, or all part it evenly. How many warps and stages there are follows from the tile and the
target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from math import prod

from ..lane.choices import Choices, ProductChoice
from ..lang.by_hand import bare_name
from ..tile.schedule import Schedule

REGISTERS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28)
TILES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
CHUNKS = (1, 2, 4, 8, 16, 32, 64)
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
SPILLING = 2
"""A step is left out where it holds more than this many times the registers that there are."""


@dataclass(frozen=True, slots=True)
class Step:
    """part: what is changed ("registers m", "order"), so that what helped is tried again first. label: for people."""

    part: str
    label: str
    schedule: Schedule


def steps(schedule: Schedule, made: Choices, vector_registers: int, threads: int) -> Iterator[Step]:
    """The neighbours of `schedule`. made: what the lowering makes of it. threads: with more than one, also into how
    many tasks an axis is split."""
    told = made.schedule
    if made.product is not None:
        yield from _of_product(schedule, made.product)
        yield from _streaming(schedule, told)
        return
    free = sorted(told.registers.keys() - made.by_hand)
    for name in made.blocks:
        # A micro-kernel brings its own tile and layouts: the search goes on from there.
        yield Step("block", f"block {bare_name(name)}",
                   replace(schedule, assembly=(*schedule.assembly, name), registers={}, order=(), stage=None))
    if told.matrix:
        yield Step("matrix", "vectors in place of tile registers", replace(schedule, matrix=False))
    for axis in free:
        for count in _beside(REGISTERS, told.registers[axis], most=made.hints[axis]):
            yield from _registers(schedule, made, {axis: count}, vector_registers)
    for first, second in combinations(free, 2):
        for more, less in ((first, second), (second, first)):
            yield from _traded(schedule, made, more, less, vector_registers)
    for axis in sorted(told.tile):
        for count in _beside(TILES, told.tile[axis], most=made.hints.get(axis)):
            yield Step(f"tile {axis}", f"tile {axis} {told.tile[axis]} -> {count}",
                       replace(schedule, tile={**schedule.tile, axis: count}))
    for position in range(0 if made.by_hand else len(told.order) - 1):
        order = list(told.order)
        order[position:position + 2] = reversed(order[position:position + 2])
        yield Step("order", f"order {' '.join(order)}", replace(schedule, order=tuple(order)))
    for tensor in () if made.by_hand else made.stageable:
        stage = told.stage or ()
        changed = tuple(t for t in stage if t != tensor) if tensor in stage else tuple(sorted((*stage, tensor)))
        yield Step(f"stage {tensor}", f"{tensor} {'read in place' if tensor in stage else 'copied to scratch'}",
                   replace(schedule, stage=changed))
    for axis in sorted(told.registers):
        if axis != told.lane:
            # Register factors count vectors of the lane axis and rows of others: they start anew.
            yield Step("lane", f"lane {told.lane} -> {axis}", replace(schedule, lane=axis, registers={}, order=()))
    yield from _streaming(schedule, told)
    if threads > 1:
        for axis in made.parallel:
            now = schedule.chunks.get(axis, 0)
            for count in _beside(CHUNKS, now) if now else (threads, 4 * threads):
                yield Step(f"chunks {axis}", f"tasks along {axis} {now or 'by the model'} -> {count}",
                           replace(schedule, chunks={**schedule.chunks, axis: count}))


def _streaming(schedule: Schedule, told: Schedule) -> Iterator[Step]:
    if told.streaming and schedule.streaming is None:
        yield Step("streaming", "stores through the caches", replace(schedule, streaming=()))


def _of_product(schedule: Schedule, product: ProductChoice) -> Iterator[Step]:
    rows, columns, depth = product.axes
    alone = replace(schedule, split={}, stream=None)
    for tile in product.tiles:
        if tile != product.tile:
            yield Step("tile", f"tile {rows} {columns} {_times(product.tile)} -> {_times(tile)}",
                       replace(schedule, tile={**schedule.tile, rows: tile[0], columns: tile[1]}))
    if product.shareable:
        shares = product.shares
        if shares != 0:
            yield Step("depth", f"{depth} parted evenly among all workers", replace(alone, stream=depth))
        others = (2, 4) if shares == 0 else _beside(SPLITS, shares or 1)
        for parts in others if shares is None else (1, *(n for n in others if n > 1)):
            told = "whole tiles" if parts == 1 else f"each tile's {depth} split among {parts} workers"
            yield Step("depth", told, replace(alone, split={depth: parts}))
    for axis in (rows, columns):
        for workers in product.clusters:
            if product.cluster != (axis, workers):
                yield Step("cluster", f"clusters of {workers} along {axis}", replace(schedule, cluster={axis: workers}))
    if product.cluster[0] is not None:
        yield Step("cluster", "no clusters", replace(schedule, cluster={rows: 1}))


def _times(tile: tuple[int, int]) -> str:
    return f"{tile[0]} x {tile[1]}"


def _beside(ladder: tuple[int, ...], value: int, most: int | None = None) -> list[int]:
    """The next rungs below and above a value."""
    below = [rung for rung in ladder if rung < value]
    above = [rung for rung in ladder if rung > value and (most is None or rung <= most)]
    return below[-1:] + above[:1]


def _registers(schedule: Schedule, made: Choices, counts: dict[str, int], vector_registers: int) -> Iterator[Step]:
    told = made.schedule
    after = {**told.registers, **counts}
    if prod(after[axis] for axis in told.order if axis in after) > SPILLING * vector_registers:
        return
    label = ", ".join(f"{axis} {told.registers[axis]} -> {count}" for axis, count in counts.items())
    yield Step(f"registers {' '.join(counts)}", f"registers {label}",
               replace(schedule, registers={**schedule.registers, **counts}))


def _traded(schedule: Schedule, made: Choices, more: str, less: str, vector_registers: int) -> Iterator[Step]:
    """More of one axis, and so much less of another that as many registers are held: 14 x 2 becomes 7 x 4."""
    told = made.schedule.registers
    up = [rung for rung in REGISTERS if told[more] < rung <= made.hints[more]][:1]
    for count in up:
        held = told[more] * told[less] // count
        down = [rung for rung in REGISTERS if rung <= held]
        if down and down[-1] < told[less]:
            yield from _registers(schedule, made, {more: count, less: down[-1]}, vector_registers)
