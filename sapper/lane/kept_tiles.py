"""Tiles of slots that stay in scratch memory for later runs of the loop that makes them.

Enters: a walk that keeps a tile of a tensor as slots (slots.py) in a loop over tiles, as of the values in attention.
Where loops around that one come to the same elements again (blocks of queries, heads that share a cache), leaves the
walk in a branch: it is done where its tile ends beyond what is there, as a word of scratch memory says. Tasks of one
call that begin at the same address find what a worker's task before has left. Tiles lie one after the other, as many as
some second caches have room for; each of the others takes the place behind these. Where tile registers take them turned
(tile_slots.py), they are turned in that branch, and stay so.

What holds: every run of the loop begins at the same coordinate and takes its tiles in order, so all that comes before a
tile is there when its turn comes. A tile of an odd extent is always made anew, and ends what is there: its last slot is
half empty, where a longer tile has an element that this run must not read. So is one for tile registers that is not
full: what they read behind its end is zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from math import prod

from ..ir.nodes import Op, Value
from ..ir.types import S64, bf16, i64
from ..tile.ops import place_of
from ..tile.plan import Walk, axes_of
from .carried import CarriedLowering
from .extents import Range
from .state import PAIR, Access, Capacity, Level, Scalar
from .tile_slots import TileSlots, fit, turn

ROOM = 4
"""Second caches that tiles may fill: from the last one they still come sooner than they are made. Measured on a Zen 4,
ms of attention in bf16 to 8192 positions of a head of 128: none kept 90.4, 2048 of them 88.1, 4096 86.3, all 84.8."""

TURNED_ROOM = 2
"""The same of tiles that tile registers take."""

BEYOND = 1 << 40
"""More than there are coordinates."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Where tiles of a value lie. r: the range of their loop. first: the first of those that stay, which have `room`
    coordinates. word: address of the one that says how many of these are there. tiles: of what tile registers take
    turned, as they lie then."""

    value: Value
    r: Range
    first: Access
    room: int
    word: Value
    tiles: TileSlots | None


class KeptTiles(CarriedLowering):
    """Emits walks that keep tiles."""

    def walk(self, walk: Walk) -> None:
        kept = self._kept(walk)
        if kept is None:
            self.turned = {value: place for value, place in self.turned.items() if value not in walk.inner}
            super().walk(walk)
            return
        depth, tiles = self.slot_axes[kept.value], kept.tiles
        o, per_element = self.open[depth], kept.first.axes[depth]
        start, end = (self.sub(at, kept.r.start) for at in (o.offset, self.add(o.offset, o.extent)))
        place = self.add(kept.first.base, self.mul(self.scalar("s_min", start, kept.room), per_element))
        if tiles is None:
            self.pending_buffers[kept.value] = replace(kept.first, base=place)
        else:
            self.turned[kept.value] = place
        whole = PAIR if tiles is None else kept.r.step
        needed = self.add(end, self.mul(self.scalar("s_mod", o.extent, whole), BEYOND))
        there = self.emit(self.depth, "s_load", [kept.word], S64, dtype=i64)
        missing = self.emit(self.depth, "s_cmp", [self.value(needed), there], S64, cond="gt")

        def make() -> None:
            super(KeptTiles, self).walk(walk)
            if tiles is not None:
                self.buffers.update(self.pending_buffers)
                turn(self, tiles, place, self.scalar("s_floordiv", self.add(o.extent, PAIR - 1), PAIR))
            self.effect("s_store", [self.value(self.scalar("s_min", end, kept.room)), kept.word], dtype=i64)

        self.fork(missing, make, lambda: None)

    def _kept(self, walk: Walk) -> Kept | None:
        """Where the tiles of a walk lie that keeps nothing else; None where they do not stay, as no loop typically
        comes to them again, or what is loaded changes."""
        value = walk.inner[0] if len(walk.inner) == len(walk.roots()) == 1 else None
        if not isinstance(value, Value) or value not in self.slot_axes or value.op is None or value.op.name != "load":
            return None
        depth = self.slot_axes[value]
        r = next((r for _, r in self.streaming_loops if r.axis == depth), None)
        others = [axis for axis in axes_of(value) if axis != depth]
        width = self.open[others[0]] if len(others) == 1 and others[0] in self.open else None
        tiles = None if self.facts.tiles is None else self._tile_slots(value, depth)
        if r is None or width is None or not isinstance(width.extent, int) or self._is_stored(value.op.operands[0]) or (
                tiles is None and self.facts.tiles is not None):    # which clear what follows a tile
            return None
        loaded = self.access(value.op)
        level = max(map(self.depth_of, (loaded.base, r.start, width.offset, *loaded.axes.values())))
        runs = prod(around.iterations for around in self.levels[level + 1:self.depth_of(self.open[depth].offset)])
        row_bytes = -(-width.extent // self.lanes) * self.lanes * bf16.size_bytes
        room = (ROOM if tiles is None else TURNED_ROOM) * self.facts.l2_bytes // row_bytes // r.step * r.step
        if loaded.gathers or runs < 2 or room == 0:
            return None
        outer = self.levels[level]
        key = ("kept tiles", value)
        if key not in outer.memo:
            places: list[tuple[str, Capacity | int]] = [(depth, room + r.step), (others[0], width.extent)]
            first = self.allocate_slots(value, places)
            word, place = (self.value(self.scratch([(1, 1)], i64)) for _ in range(2))
            outer.memo[key] = Kept(value, r, first, room, word, tiles)
            starts = {depth: r.start, others[0]: width.offset}
            self._find(outer, level, word, place, reduce(self.add, (
                self.mul(stride, starts[axis]) for axis, stride in loaded.axes.items() if axis in starts),
                self.add(loaded.base, loaded.disp)))
        found: Kept = outer.memo[key]
        return found

    def _find(self, outer: Level, level: int, word: Value, place: Value, first: Scalar) -> None:
        """Have a word say that nothing is there, but where what is there begins at the same address: another task of
        this call has left it. place: address of the word with that address."""
        self.levels[0].builder.block.ops.append(Op("s_store", [self.value(0), place], (), {"dtype": i64}))
        there, held = (self.emit(level, "s_load", [one], S64, dtype=i64) for one in (word, place))
        same = self.emit(level, "s_cmp", [held, self.value(first)], S64, cond="eq")
        left = self.emit(level, "s_mul", [there, same], S64)
        for value, at in ((left, word), (self.value(first), place)):
            outer.builder.block.ops.append(Op("s_store", [value, at], (), {"dtype": i64}))

    def _tile_slots(self, value: Value, depth: str) -> TileSlots | None:
        """How tile registers serve the products that alone read a value, if that is turned for them."""
        users = self.users.get(value, [])
        lane = next((axis for axis, bound in self.bound.items() if bound.lane), None)
        if not users or any(op.name != "contract" for op in users) or lane is None:
            return None
        rows = tuple(axis for axis in axes_of(users[0].result) if axis not in self.bound)
        found = fit(self, Walk(rows, (depth,), users), lane, value)
        return found if found is not None and found.left is value else None

    def _is_stored(self, tensor: Value) -> bool:
        place = place_of(tensor)
        return any(op.name == "store" and place_of(op.operands[0]) is place for op in self.function.walk())
