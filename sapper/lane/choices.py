"""What a kernel's lowering chooses, written down as a schedule: where a search for a better one starts.

Enters a canonical tile IR function and all that `lower` takes; leaves a `Schedule` that names every part. A walk is
lowered several times, for tails and for each loop around it, and a schedule speaks of an axis wherever it is walked, so
the largest register factor of each axis is told, and the order and lane axis of the walk that holds most registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

from ..ir.nodes import Function
from ..ir.types import f32
from ..lang.by_hand import CONTRACTIONS, PIECES, bare_name
from ..tile.ops import memory_of
from ..tile.plan import Walk
from ..tile.schedule import Facts, MatrixGroup, Schedule, Specialization
from .axis_loops import WalkChoice
from .by_hand import Fit, fit
from .carried import SEQUENTIAL_TILE
from .extents import Range
from .lower import Lowering, lanes_of


@dataclass(frozen=True, slots=True)
class ProductChoice:
    """A product on matrix instructions that several warps run together, and what a schedule can say of it.

    axes: its rows, columns, depth. tile: rows and columns that a worker computes at once; tiles: those that fit, the
    largest first. shares: into how many parts a tile's depth is split at most, 0 where all workers part it evenly,
    None: tiles are whole. shareable: whether they must not be. cluster: (axis, workers) of one, (None, 1): there is
    none; clusters: how many workers may be one. cycles: that a processor works on it, by the model, for typical extents
    (`Specialization.dims`).
    """

    axes: tuple[str, str, str]
    tile: tuple[int, int]
    tiles: tuple[tuple[int, int], ...]
    shares: int | None
    shareable: bool
    cluster: tuple[str | None, int]
    clusters: tuple[int, ...]
    cycles: float

    def schedule(self) -> Schedule:
        """All of it, as a schedule asks for it."""
        rows, columns, depth = self.axes
        axis, workers = self.cluster
        return Schedule(tile={rows: self.tile[0], columns: self.tile[1]},
                        split={depth: self.shares or 1} if self.shares != 0 and self.shareable else {},
                        stream=depth if self.shares == 0 else None,
                        cluster={axis or rows: workers} if self.clusters else {})


@dataclass(frozen=True, slots=True)
class Choices:
    """schedule: all that was chosen. lanes: of a row. parallel: axes that are split into tasks, as far as they are
    named. stageable: tensors that contractions read. hints: extent of each axis, about. blocks: by hand, which the
    schedule does not name and that would fit, as `module:name`. by_hand: axes of the tiles of micro-kernels. A walk on
    tile registers has no choices but that. product: what warps multiply together; then nothing is said of its
    registers, its order and its lanes, as a schedule that says anything of them takes it off the matrix
    instructions."""

    schedule: Schedule
    lanes: int
    parallel: tuple[str, ...]
    stageable: tuple[str, ...]
    hints: dict[str, int]
    blocks: tuple[str, ...] = ()
    by_hand: frozenset[str] = frozenset()
    product: ProductChoice | None = None


def choices(function: Function, schedule: Schedule, facts: Facts, specialization: Specialization) -> Choices:
    """Raises what `lower` raises for a schedule that can't be followed."""
    registers: dict[str, int] = {}
    hints: dict[str, int] = {}
    tile: dict[str, int] = {}
    staged: set[str] = set()
    contracted: set[str] = set()
    blocks: set[str] = set()
    fixed: set[str] = set()
    on_tiles: set[str] = set()
    most: tuple[bool, int] = (False, 0)
    chosen: WalkChoice | None = None

    class Recording(Lowering):
        def choose(self, walk: Walk) -> WalkChoice:
            nonlocal most, chosen
            choice = super().choose(walk)
            for axis, count in choice.counts.items():
                if not choice.on_tiles:
                    registers[axis] = max(registers.get(axis, 1), count)
                hints[axis] = max(hints.get(axis, 1), self.extent_hint(axis))
            staged.update(memory_of(op.operands[0]).name for op in choice.staged if not choice.on_tiles)
            if not choice.on_tiles and any(reduction.name == "contract" for reduction in walk.reductions):
                contracted.update(memory_of(op.operands[0]).name for op in self.reads(walk))
            blocks.update(f"{piece.module}:{piece.name}" for key, piece in CONTRACTIONS.items()
                          if walk.reductions and choice.by_hand is None
                          and isinstance(fit(self, walk, choice.lane, key), Fit))
            if choice.on_tiles:
                on_tiles.update(choice.counts)
            if choice.by_hand is not None:
                fixed.update((choice.by_hand.rows, choice.lane or ""))
            held = bool(walk.reductions), prod(choice.counts[axis] for axis in choice.order)
            if held > most and not choice.on_tiles:
                most, chosen = held, choice
            return choice

        def _resident(self, r: Range, body: Callable[[], None]) -> None:
            if r.axis is not None and not r.walked:
                tile[r.axis] = r.resident
                hints[r.axis] = max(hints.get(r.axis, 1), r.hint)
            super()._resident(r, body)

    facts = schedule.steered(facts)
    lowering = Recording(function, schedule, facts, specialization, lanes_of(function, facts))
    lowering.run()
    tile |= lowering.sequential_tiles
    parallel: list[str] = []
    for op in function.walk():
        if op.name == "tiles" and op.attributes.get("parallel"):
            parallel += [axis for axis in op.attributes["axes"] if ("chunks", axis) in lowering.followed.settable]
        elif op.name == "tiles":
            for axis in op.attributes["axes"]:
                tile.setdefault(axis, SEQUENTIAL_TILE)
    if lowering.chain is not None:
        tile.pop(lowering.chain.step, None)     # what it takes at once follows from the target
    tile = {axis: count for axis, count in tile.items() if ("tile", axis) in lowering.followed.settable}
    registers = {axis: count for axis, count in registers.items() if axis not in on_tiles}
    told = Schedule(
        lane=chosen.lane if chosen is not None else schedule.lane, tile={**tile, **schedule.tile}, registers=registers,
        order=tuple(chosen.order) if chosen is not None else schedule.order, stage=tuple(sorted(staged)),
        streaming=tuple(sorted(lowering.streaming_tensors)), chunks=dict(schedule.chunks), assembly=schedule.assembly,
        matrix=True if on_tiles else schedule.matrix, requests=dict(schedule.requests), lanes=schedule.lanes)
    if (lowering.part_walks or lowering.part_vectors) and lowering.part is not lowering.function.body:
        told = schedule     # what says more of how loops are walked leaves products where they are
    product = _product(lowering)
    if product is not None:
        told = replace(product.schedule(), stage=(), streaming=told.streaming, assembly=schedule.assembly,
                       chunks=dict(schedule.chunks), matrix=schedule.matrix, requests=dict(schedule.requests))
    present = {op.name for op in function.walk()}
    blocks.update(f"{piece.module}:{piece.name}" for piece in PIECES.values()
                  if piece.implements in present and piece.usable(facts.family, facts.features, lowering.lanes, (f32,),
                                                                  f32))
    named = {bare_name(name) for name in schedule.assembly}
    return Choices(told, lowering.lanes, tuple(parallel), tuple(sorted(contracted)), hints,
                   tuple(sorted(name for name in blocks if bare_name(name) not in named)), frozenset(fixed), product)


def _product(lowering: Lowering) -> ProductChoice | None:
    found = lowering.matrix_walk
    if found is None or lowering.warps == 1 or lowering.part is not lowering.function.body:
        return None
    tile, shareable, cycles = lowering.matrix_tile(), lowering.can_share(), lowering.product_cycles()
    unit = lowering.matrix_unit()
    lowering.schedule = replace(lowering.schedule, tile={})     # of the tiles, not of the one that was asked for
    return ProductChoice((found.rows, found.columns, found.depth), tile, tuple(lowering.fitting_tiles()),
                         lowering.shares, shareable, (lowering.cluster_axis, lowering.cluster),
                         unit.clusters if isinstance(unit, MatrixGroup) else (), cycles)
