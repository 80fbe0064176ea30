"""Whether a lowering does what its schedule says: an entry that nothing follows is an error.

Enters what became of each walk, and what a schedule could have said of the loops around; leaves an UnfollowedError for
the first entry that nothing follows, with what was found instead. It is enough that one walk follows an entry, as walks
of other parts, and of what is left at edges, may have to do something else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..ir.nodes import Function
from ..tile.ops import memory_of
from ..tile.plan import ops_behind
from ..tile.schedule import Schedule, UnfollowedError
from .axis_loops import WalkChoice


@dataclass(slots=True)
class Followed:
    """settable: (entry, axis) of tiles and chunks that a schedule can set. counts: how many coordinates, or vectors, of
    each axis walks hold at once. lanes: the axes that lie across them. orders: of the loops of each walk, the outermost
    first. on_matrix: a walk runs on matrix instructions; tiles: what a worker then has of each axis at once."""

    settable: set[tuple[str, str]] = field(default_factory=set)
    counts: dict[str, set[int]] = field(default_factory=dict)
    lanes: set[str] = field(default_factory=set)
    orders: list[tuple[str, ...]] = field(default_factory=list)
    on_matrix: bool = False
    tiles: dict[str, int] = field(default_factory=dict)

    def add(self, choice: WalkChoice) -> None:
        """Note what a walk became."""
        self.on_matrix |= choice.on_tiles
        for axis, count in choice.counts.items():
            self.counts.setdefault(axis, set()).add(count)
        if choice.lane is not None:
            self.lanes.add(choice.lane)
        self.orders.append((*choice.order, *choice.reduced))

    def add_product(self, tiles: dict[str, int]) -> None:
        """Note a product on matrix instructions of several warps."""
        self.on_matrix = True
        self.tiles |= tiles

    def check(self, function: Function, schedule: Schedule) -> None:
        """Raises UnfollowedError."""
        def refuse(entry: str, name: str, said: str, found: str, mend: str = "leave it out") -> None:
            raise UnfollowedError(
                f"schedule of {function.name}: {entry} {said}: found {found}; mend: {mend}", entry, name)

        for axis, count in schedule.registers.items():
            if count not in self.counts.get(axis, ()):
                taken = sorted(self.counts.get(axis, ()))
                found = f"loops that hold {_listed(taken)} of it at once and can hold no other number" if taken else \
                    f"no loop that holds several of it at once; expected one of {_listed(sorted(self.counts))}"
                refuse("registers", axis, f"{axis} = {count}", found, self._instead(axis))
        for axis in schedule.order:
            if not any(self._is_ordered(order, axis, schedule) for order in self.orders):
                refuse("order", axis, " ".join(schedule.order), "loops "
                       f"{_listed(sorted({' '.join(order) for order in self.orders if order})) or 'over nothing'}, "
                       "which can't go like this", "leave it out, and what is summed over stays inside")
        if schedule.lane is not None and schedule.lane not in self.lanes:
            refuse("lane", schedule.lane, schedule.lane,
                   f"{_listed(sorted(self.lanes))} across the lanes of all loops, and none that could have it there")
        for axis, count in schedule.tile.items():
            if self.tiles.get(axis, count) != count:
                refuse("tile", axis, f"{axis} = {count}",
                       f"tiles of {self.tiles[axis]}, as matrix instructions take them")
            if ("tile", axis) not in self.settable and axis not in self.tiles:
                refuse("tile", axis, f"{axis} = {count}",
                       f"nothing that a piece of {axis} would hold or hand on{self._instead_of('tile')}",
                       f"registers says how many of {axis} a loop holds, chunks into how many tasks it is split"
                       if axis in self.counts else "leave it out")
        for axis, count in schedule.chunks.items():
            if ("chunks", axis) not in self.settable:
                refuse("chunks", axis, f"{axis} = {count}", f"no tasks along {axis}{self._instead_of('chunks')}")
        contracted = {memory_of(read.operands[0]).name for op in function.walk() if op.name == "contract"
                      for value in op.operands for read in ops_behind(value) if read.name == "load"}
        for tensor in schedule.stage or ():
            if tensor not in contracted:
                refuse("stage", tensor, tensor, f"a tensor that no contraction reads; expected some of "
                       f"{_listed(sorted(contracted))}")
        stored = {op.operands[0].name for op in function.walk() if op.name == "store" and op.operands[0].op is None}
        for tensor in schedule.streaming or ():
            if tensor not in stored:
                refuse("streaming", tensor, tensor, f"a tensor that is not stored to as it is; expected some of "
                       f"{_listed(sorted(stored))}")
        if schedule.matrix and not self.on_matrix:
            refuse("matrix", "true", "true", "no contraction that they take")

    def _instead(self, axis: str) -> str:
        return f"tile says how many of {axis} there are at once" if ("tile", axis) in self.settable else "leave it out"

    def _instead_of(self, entry: str) -> str:
        names = sorted(name for of, name in self.settable if of == entry)
        return f"; expected some of {', '.join(names)}" if names else ""

    @staticmethod
    def _is_ordered(order: tuple[str, ...], axis: str, schedule: Schedule) -> bool:
        """Whether loops have an axis that the schedule orders, and begin with all that it names of them."""
        named = tuple(a for a in schedule.order if a in order)
        return axis in named and order[:len(named)] == named


def _listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, names)) or "none"

