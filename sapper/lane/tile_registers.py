"""Contractions on tile registers: a matrix instruction whose operands and sums go through memory.

Enters a walk that contracts narrow operands, or floats in parts, and how tile registers serve it (tile_fit.py);
`emit_walk` emits it. Each piece of the walk goes through three steps:

    load, multiply   along the depth, rows of the left operand and panels of the right one, sums in tile registers
    store            the sums, to a few KiB of scratch memory
    finish           what follows the contraction reads them there, row by row, like any other value

Where nothing follows but a store of the sums as they are, whole pieces go straight to the tensor.

A piece is `ACROSS` tiles of sums high and wide; where two contractions share their left operand, each has half as many
columns. The right operand lies in panels of slots, as packed dot products have them too (packed.py: what is packed for
one serves the other). The left one is read where it lies if its rows are contiguous along the depth; else it is copied.

What holds: every tile is whole, so nothing is configured anew. Rows: the last tile ends where they do, and only those
rows are stored that no tile before it had; where there are fewer than a tile has, they are copied to a place with room
for one. Columns: panels are whole. Depth: what is left of it is copied beside zeros, of both operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..ir.nodes import Block, Op, Value
from ..ir.types import (
    MASK,
    ROW_B32,
    S64,
    TILE_B32,
    TileRegisterType,
    b32,
    bf16,
    i16,
    u8,
)
from ..tile.plan import Walk
from ..tile.sums import is_join
from .prefetches import FEW_ROWS, LINE_BYTES
from .staged import SlotsInPlace
from .state import PAIR, Access, Bound, Open, Scalar, element_bytes
from .tile_bound import dtype_of
from .tile_copies import stage_parts
from .tile_fit import ACROSS, TileWalk, divides
from .tile_left import LeftOperand

if TYPE_CHECKING:
    from .axis_loops import WalkChoice
    from .walk import WalkLowering

FINISHED_ROWS = 4
"""Rows of sums that are finished at once."""

PANEL_PARTS = 3
"""Places of their depth from which few rows meet packed panels at a time (_meets_few)."""


def emit_walk(low: WalkLowering, walk: Walk, choice: WalkChoice) -> None:
    """All of a walk, with the choice that the model made for it."""
    assert choice.tiles is not None
    _Emission(low, walk, choice, choice.tiles).run()


class _Emission(LeftOperand):
    """The emission of one walk. choice: that the model made for it. across: tiles of sums beside each other, of each
    contraction; sum_bytes: of a row of sums in memory. steps: whole tiles along the depth."""

    def __init__(self, low: WalkLowering, walk: Walk, choice: WalkChoice, found: TileWalk) -> None:
        super().__init__(low, walk, found)
        self.choice = choice
        self.across = ACROSS // len(walk.reductions)
        self.sum_bytes = ACROSS * self.row_bytes
        self.sum_dtype = found.dot.result
        self.right_dtype = bf16 if found.parted else dtype_of(found.rights[0].result)

    def run(self) -> None:
        low, found = self.low, self.found
        low.use_tiles()
        self.elements = low.open[found.depth]
        with low.packed(self.choice.packing):
            self.slots = low.open[found.depth]
            if found.right_parts > 1:       # both operands have zeros to the end of the last tile
                deep = self.size * found.dot.elements
                self.rest, self.partial, self.steps = 0, 0, low.ceil_div(self.elements.extent, deep)
                self.left = self.place_left()
                low._panel_blocks(self.choice, found.columns, self._block)
                return
            self.rest = 0 if divides(self.size, self.slots) else low.scalar("s_mod", self.slots.extent, self.size)
            self.steps = low.scalar("s_floordiv", self.slots.extent, self.size)
            fills = divides(found.step_slots, self.elements)
            self.partial = 0 if fills else low.scalar("s_mod", self.elements.extent, found.dot.elements)
            self.left = self.place_left()
            low._panel_blocks(self.choice, found.columns, self._block)

    # Pieces.

    def _block(self) -> list[Value]:
        """All rows, with a block of panels."""
        low, found = self.low, self.found
        for op in found.rights:
            if found.within is not None:
                low.staged[op] = SlotsInPlace(low, self._slots_of(low.access(op)), found.depth)
            elif found.kept:
                low.staged[op] = SlotsInPlace(low, self._kept_slots(op.result), found.depth)
            elif found.right_parts > 1:
                stage_parts(low, op, found.columns, found.depth, self.choice)
            else:
                low._stage(op, self.walk, self.choice)
        high = ACROSS * self.size
        extent, offset = self.range.extent, self.range.offset
        whole = extent if divides(high, self.range) else low.sub(extent, low.scalar("s_mod", extent, high))
        end = low.add(offset, extent)
        if whole != 0:
            low.counted(found.rows, offset, low.add(offset, whole), high, lambda start: self._row(start, start, high))
        if not divides(high, self.range):
            # The last tile ends where the rows do, and begins among those that were done.
            last = low.scalar("s_max", low.sub(end, self.size), offset)

            def rest(start: Value) -> None:
                self._row(start, start if self.left.in_tiles else low.scalar("s_min", start, last),
                          low.scalar("s_min", low.sub(end, start), self.size))

            low.counted(found.rows, low.add(offset, whole), end, self.size, rest)
        for op in found.rights:
            low.staged.pop(op, None)
        return []

    def _kept_slots(self, value: Value) -> Access:
        """Where slots lie that are kept: over all columns, whichever block of them is open."""
        low, found, held = self.low, self.found, self.low.buffers[value]
        axes = {**held.axes, found.depth: low.mul(held.axes[found.depth], PAIR)}
        base = low.sub(held.base, low.mul(self.columns.offset, axes[found.columns]))
        base = low.sub(base, low.mul(self.slots.offset, axes[found.depth]))
        return replace(held, base=base, axes=axes, relative=False)

    def _row(self, start: Value, first: Scalar, count: Scalar) -> None:
        """Pieces from row `first` on, of which `count` rows from `start` on are new."""
        low, found = self.low, self.found
        high = ACROSS if count == ACROSS * self.size else 1
        if self.left.here:
            low.open[found.rows] = Open(start, count, high * self.size, high * self.size if high == ACROSS else 1)
            self._copy_in_tiles(self.left.base)
            low.open[found.rows] = self.range
        before = 0 if self.left.here else low.mul(low.sub(first, self.range.offset), self.left.stride)
        base = low.add(self.left.base, before)

        def piece(_: list[Value]) -> list[Value]:
            sums = self._sums(base, high)
            if high == ACROSS and self._goes_straight():
                self._store_straight(sums, first)
            else:
                self._finish(self._store_near(sums, high), first, Open(start, count, high * self.size))
            return []

        low.axis_loop(found.columns, self.across, True, [], piece)

    def _sums(self, base: Scalar, high: int) -> list[Value]:
        """Multiply all of the depth for the bound columns and rows from `base` on: the tiles of sums, contraction by
        contraction, row by row."""
        low, found = self.low, self.found
        wide = low.bound[found.columns].count
        low.bound[found.depth] = Bound(self.slots.offset, 1, False, None, low.depth)
        panels = [low.staged[op] for op in found.rights]
        rights = [low.address_of(*panel.address({found.depth: 0, found.columns: 0})) for panel in panels]
        strides = [panel.depth_bytes for panel in panels]
        del low.bound[found.depth]
        lefts = [low.add(base, low.mul(self.left.stride, n * self.size)) for n in range(high)]
        kind = TileRegisterType(self.sum_dtype)
        sums = [low.emit(low.depth, "tile_zero", [], kind) for _ in range(len(rights) * high * wide)]
        few = high == 1 and self._meets_few()

        def step(number: Scalar, sums: list[Value]) -> list[Value]:
            low.effect("tile_wake", [])
            rows = [self._parts_of(left, number) for left in lefts]
            tiles = [(low.add(right, low.mul(number, stride * self.size)), stride)
                     for right, stride in zip(rights, strides, strict=True)]
            if few:
                self._ask_ahead(tiles)
            return self._multiply(rows, tiles, wide, sums)

        part = low.scalar("s_floordiv", self.steps, PANEL_PARTS) if few else 0

        def of_parts(number: Scalar, sums: list[Value]) -> list[Value]:
            for place in range(PANEL_PARTS):
                sums = step(low.add(number, low.mul(part, place)), sums)
            return sums

        if part != 0:
            sums = self._rounds(0, part, sums, of_parts)
        if self.steps != 0:
            sums = self._rounds(low.mul(part, PANEL_PARTS), self.steps, sums, step)
        if self.beyond != 0:
            sums = self._rounds(0, low.scalar("s_min", self.beyond, 1), sums,
                                lambda _, sums: self._last(lefts, rights, strides, wide, sums))
        return sums

    def _parts_of(self, left: Scalar, step: Scalar) -> list[tuple[Scalar, Scalar]]:
        """Address and stride of the tiles of a step of the depth, part by part. left: of the rows' first tile."""
        low = self.low
        if not self.left.in_tiles:
            return [(low.add(left, low.mul(step, self.row_bytes)), self.left.stride)]
        size_bytes = self.size * self.row_bytes
        first = low.add(left, low.mul(step, self.found.left_parts * size_bytes))
        return [(low.add(first, part * size_bytes), self.row_bytes) for part in range(self.found.left_parts)]

    def _meets_few(self) -> bool:
        """Whether few rows meet packed panels from several places of their depth (Requests.panel_parts). Measured on a
        Granite Rapids, 16 rows by 4096 x 4096 from memory, of the time as one stream: by two, three, four and five
        places, asked for 2 KiB ahead, bf16 0.99, 0.91, 1.01 and 0.98, i8 1.00, 0.94, 1.02 and 1.03; by three, 1, 3 and
        4 KiB ahead 0.93, 0.91 and 0.94, 0.94, 0.91 and 0.97, into the second cache 0.92 and 0.94, not at all 0.98 and
        0.97; one stream that is asked for 0.98 and 0.97 at best."""
        few = bool(self.low.requests.panel_parts) and self.range.hint <= FEW_ROWS
        return few and all(self.low.staged[op].in_place is not None for op in self.found.rights)

    def _ask_ahead(self, tiles: list[tuple[Scalar, int]]) -> None:
        """Ask for what follows the tiles of a step in their panels, into the first cache."""
        low = self.low
        for start, stride in tiles:
            for line in range(0, stride * self.size, LINE_BYTES):
                operands, attributes = low.memory_operands(start, 0, 1, low.requests.stream_ahead_bytes + line)
                low.effect("prefetch", operands, level=1, **attributes)

    def _store_near(self, sums: list[Value], high: int) -> Scalar:
        """The sums to scratch memory, those of one contraction beside those of the other; where they are."""
        low, wide = self.low, self.low.bound[self.found.columns].count
        to = self._memory("sums", ACROSS * self.size * self.sum_bytes)
        for number, total in enumerate(sums):
            right, (row, column) = number // (high * wide), divmod(number % (high * wide), wide)
            low.effect("tile_store", [total, low.value(to), low.value(self.sum_bytes)],
                       disp=row * self.size * self.sum_bytes + (right * self.across + column) * self.row_bytes)
        return to

    def _goes_straight(self) -> bool:
        """Whether all that follows is a store of the sums as they are, and the columns that are bound are whole."""
        low, found, after = self.low, self.found, self.walk.after
        bound = low.bound[found.columns]
        if len(after) != 1 or len(self.walk.reductions) != 1 or bound.mask is not None:
            return False
        (store,) = after
        if not isinstance(store, Op) or store.operands[1] is not self.walk.reductions[0].result or (
                low.streams(store) or is_join(store)):
            return False
        access = low.access(store)
        plain = access.dtype is self.sum_dtype and not access.gathers
        return (plain and set(access.axes) == {found.rows, found.columns}
                and access.axes[found.columns] == self.sum_dtype.size_bytes)

    def _store_straight(self, sums: list[Value], first: Scalar) -> None:
        """The sums of a whole piece, from row `first` on, to the tensor."""
        low, found = self.low, self.found
        (store,) = self.walk.after
        assert isinstance(store, Op)
        access, wide = low.access(store), low.bound[found.columns].count
        stride = access.axes[found.rows]
        low.bound[found.rows] = Bound(first, 1, False, None, low.depth)
        start = low.address_of(*low.address(access, {}))
        del low.bound[found.rows]
        for number, total in enumerate(sums):
            row, column = divmod(number, wide)
            place = low.add(start, low.mul(stride, row * self.size))
            low.effect("tile_store", [total, low.value(place), low.value(stride)], disp=column * self.row_bytes)

    def _memory(self, name: str, size_bytes: int) -> Scalar:
        low, op = self.low, self.walk.reductions[0]
        key = (f"tile {name}", op)
        if key not in low.stage_memory:
            low.stage_memory[key] = low.scratch([(size_bytes, 1)], u8)
        return low.stage_memory[key]

    def _rounds(self, start: Scalar, stop: Scalar, sums: list[Value],
                body: Callable[[Scalar, list[Value]], list[Value]]) -> list[Value]:
        low = self.low
        block = Block([S64, *[v.type for v in sums]])
        first, last = low.value(start), low.value(stop)
        low.enter(block)
        low.effect("yield", body(block.arguments[0], list(block.arguments[1:])))
        low.leave()
        loop = Op("loop", [first, last, *sums], [v.type for v in sums], {"step": 1, "label": self.found.depth}, [block],
                  low.location)
        low.finish(loop)
        return list(loop.results)

    def _multiply(self, lefts: Sequence[Sequence[tuple[Scalar, Scalar]]], rights: list[tuple[Scalar, int]], wide: int,
                  sums: list[Value]) -> list[Value]:
        """One step of the depth. lefts, rights: address and stride of the tiles of each row, part by part, and of each
        panel."""
        low, sums = self.low, list(sums)
        a: dict[int, tuple[int, Value]] = {}
        b: dict[tuple[int, int], tuple[int, Value]] = {}
        for left_part, right_part in self.found.products:
            for row, left in enumerate(lefts):
                if a.get(row, (None,))[0] != left_part:
                    a[row] = left_part, self._load(*left[left_part], 0)
                for number, (right, stride) in enumerate(rights):
                    for column in range(wide):
                        if b.get((number, column), (None,))[0] != right_part:
                            disp = (right_part * wide + column) * self.row_bytes
                            b[number, column] = right_part, self._load(right, stride, disp)
                        at = (number * len(lefts) + row) * wide + column
                        sums[at] = low.emit(low.depth, "tile_multiply", [sums[at], a[row][1], b[number, column][1]],
                                            sums[at].type, dtype=self.left_dtype, right_dtype=self.right_dtype)
        return sums

    def _load(self, base: Scalar, stride: Scalar, disp: int) -> Value:
        low = self.low
        return low.emit(low.depth, "tile_load", [low.value(base), low.value(stride)], TILE_B32, disp=disp)

    def _last(self, lefts: list[Scalar], rights: list[Scalar], strides: list[int], wide: int,
              sums: list[Value]) -> list[Value]:
        """What is left of the depth, copied beside zeros."""
        low = self.low
        done = low.mul(self.steps, self.row_bytes)
        a: list[list[tuple[Scalar, Scalar]]] = []
        b = []
        mask = low.emit(low.depth_of(self.rest), "mask_first", [low.value(self.rest)], MASK)
        for row, left in enumerate(lefts):
            if self.left.in_tiles:        # zeros follow already
                a.append(self._parts_of(left, self.steps))
                continue
            rest = self._memory("left rest", ACROSS * self.size * self.row_bytes)
            to = low.add(rest, row * self.size * self.row_bytes)
            self._copy_rows(low.add(left, done), self.left.stride, to, self.row_bytes, self.size, 1, mask)
            if self.partial != 0:
                self._copy_partial(low.add(left, low.mul(self.slots.extent, b32.size_bytes)), self.left.stride,
                                   element_bytes(self.left_dtype), self.size,
                                   low.add(to, low.mul(self.rest, b32.size_bytes)), self.row_bytes)
            a.append([(to, self.row_bytes)])
        for number, (right, stride) in enumerate(zip(rights, strides, strict=True)):
            to = low.add(self._memory("right rest", self.size * self.sum_bytes), number * self.across * self.row_bytes)
            load = self.found.rights[number]
            packed = low.staged[load].in_place is not None and self.partial != 0
            filled = low.add(self.rest, low.scalar("s_min", self.partial, 1)) if packed else self.rest
            self._copy_rows(low.add(right, low.mul(self.steps, stride * self.size)), stride, to, self.sum_bytes,
                            filled, wide, None)
            self._clear_rows(to, filled, wide)
            if self.partial != 0 and not packed:
                self._copy_partial_columns(load, low.add(to, low.mul(self.rest, self.sum_bytes)), wide)
            b.append((to, self.sum_bytes))
        return self._multiply(a, b, wide, sums)

    def _copy_partial_columns(self, load: Op, to: Scalar, wide: int) -> None:
        """The elements that fill no slot, of the bound columns of a tensor."""
        low, found = self.low, self.found
        access, bound, columns = low.access(load), low.bound[found.columns], low.open[found.columns]
        left = low.sub(low.add(columns.offset, columns.extent), bound.offset)
        depth = low.add(self.elements.offset, low.mul(self.slots.extent, found.dot.elements))
        start = low.add(low.add(access.base, access.disp), low.mul(depth, access.axes[found.depth]))
        start = low.add(start, low.mul(bound.offset, access.axes[found.columns]))
        self._copy_partial(start, access.axes[found.columns], access.axes[found.depth],
                           low.scalar("s_min", left, wide * low.lanes), to, b32.size_bytes)

    def _copy_partial(self, start: Scalar, across: Scalar, along: Scalar, count: Scalar, to: Scalar,
                      to_across: int) -> None:
        """The elements that fill no slot, one by one: `count` times so many, `across` bytes apart, each `along` behind
        the one before, to places `to_across` apart."""
        low, size = self.low, element_bytes(self.left_dtype)
        narrow = i16 if size == i16.size_bytes else u8

        def outer(number: Value) -> None:
            source = low.add(start, low.mul(number, across))
            place = low.add(to, low.mul(number, to_across))

            def element(at: Value) -> None:
                value = low.emit(low.depth, "s_load", [low.value(low.add(source, low.mul(at, along)))], S64,
                                 dtype=narrow)
                low.effect("s_store", [value, low.value(low.add(place, low.mul(at, size)))], dtype=narrow)

            low.counted("rest", 0, self.partial, 1, element)

        low.counted("rest", 0, count, 1, outer)

    def _copy_rows(self, source: Scalar, stride: Scalar, to: Scalar, to_stride: int, count: Scalar, vectors: int,
                   mask: Value | None) -> None:
        low = self.low

        def row(number: Value) -> None:
            masked = [] if mask is None else [mask]
            for vector in range(vectors):
                at = low.value(low.add(source, low.mul(number, stride)))
                value = low.emit(low.depth, "load", [at, *masked], ROW_B32, dtype=b32, masked=bool(masked),
                                 disp=vector * self.row_bytes)
                low.effect("store", [value, low.value(low.add(to, low.mul(number, to_stride)))], dtype=b32,
                           masked=False, streaming=False, disp=vector * self.row_bytes)

        low.counted("rest", 0, count, 1, row)

    def _clear_rows(self, to: Scalar, start: Scalar, vectors: int) -> None:
        low = self.low

        def row(number: Value) -> None:
            for vector in range(vectors):
                low.effect("store", [self._zeros(), low.value(low.add(to, low.mul(number, self.sum_bytes)))], dtype=b32,
                           masked=False, streaming=False, disp=vector * self.row_bytes)

        low.counted("rest", start, self.size, 1, row)

    def _finish(self, sums: Scalar, first: Scalar, rows: Open) -> None:
        """What follows the contractions, row by row. first: the row that the sums begin with; rows: those to finish."""
        low, found = self.low, self.found
        start = low.sub(sums, low.mul(first, self.sum_bytes))
        start = low.sub(start, low.mul(low.bound[found.columns].offset, self.sum_dtype.size_bytes))
        for number, op in enumerate(self.walk.reductions):
            low.buffers[op.result] = Access(
                start, number * self.across * self.row_bytes,
                {found.rows: self.sum_bytes, found.columns: self.sum_dtype.size_bytes}, self.sum_dtype)

        def finish(carried: list[Value]) -> list[Value]:
            low._roots(self.walk.after)
            return carried

        block = low.open[found.columns]
        low.open[found.columns] = self.columns      # what is kept lies where it does in all of the axis
        low.axis_loop(found.rows, FINISHED_ROWS, False, [], finish, within=rows,
                      tails=low.slot_tails(self.walk.after, found.rows))
        low.open[found.columns] = block
        for op in self.walk.reductions:
            del low.buffers[op.result]
