"""Loops over weights in blocks that many rows walk part by part.

Enters: a nest of parallel loops the last of which holds several rows at once (residents.py), and in it one loop over an
index (`each`) that carries their sums. Leaves: loops over some hundred rows at a time, over the panels of the weights,
over parts of that loop whose weights stay in the first cache, and over the tiles of these rows, each of which goes on
with its sums: between two parts these lie in scratch memory. So weights come from further away once for all of these
rows, and are unpacked once for them (unpacked.py); what the rows have comes in the order in which it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import gcd

from ..ir.nodes import Block, Op, Value
from ..ir.types import ROW_B32, ROW_I32, S64, RowType, TileType, b32, f32, i32, u8
from ..tile.ops import memory_of
from ..tile.plan import Late, Plan, axes_of
from .extents import Range
from .prefetches import LINE_BYTES
from .state import Access, Capacity, Scalar, row_dtype
from .unpacked import Unpacked, UnpackedOperands

ROWS_OF_PARTS = 128
"""Most rows that meet a part of the weights one tile after the other: what they have of 4096 bytes fills half of a
second cache of 1 MiB, and of what a part costs to unpack each tile of 6 pays a twentieth."""


@dataclass(frozen=True, slots=True)
class DepthPart:
    """The part of a loop that the tiles of rows at hand walk. range: its indices. begins, ends: whether it is the first
    one, and the last. rows: all that go on with their sums. places: of each sum."""

    loop: Op
    range: Range
    begins: Value
    ends: Value
    rows: Range
    places: dict[int, Access] = field(default_factory=dict)


class DepthParts(UnpackedOperands):
    """Emits them. loop_part: the one at hand."""

    loop_part: DepthPart | None = None

    def _loops(self, ranges: list[Range], k: int, body: Callable[[list[Value]], list[Value]]) -> None:
        rows = ranges[-1]
        if rows.loop is None or k != len(ranges) - (2 if rows.below else 1):
            super()._loops(ranges, k, body)
        elif rows.together:
            self._parts_of_depth(ranges, k, body)
        else:
            self._rows_together(ranges, k, body)

    def _rows_together(self, ranges: list[Range], k: int, body: Callable[[list[Value]], list[Value]]) -> None:
        """Loops over as many rows as go on together, groups being nearly alike, and over the ranges inside."""
        rows = ranges[-1]
        extent, tile = self.scalar("s_max", self.extent_of(rows), 0), rows.resident
        most = ROWS_OF_PARTS // tile * tile
        groups = self.ceil_div(extent, most)
        each = self.round_up(self._ceil_quotient(extent, self.scalar("s_max", groups, 1)), tile)

        def group(number: Value) -> None:
            start = self.add(rows.start, self.mul(number, each))
            some = replace(rows, start=start, stop=self.scalar("s_min", self.add(start, each), rows.stop), fixed=None,
                           capacity=Capacity(most), divisor=gcd(rows.divisor, tile), hint=min(rows.hint, most),
                           together=True, below=False)
            self._loops([*ranges[:-1], some], k, body)

        self.counted("rows", 0, groups, 1, group)

    def _parts_of_depth(self, ranges: list[Range], k: int, body: Callable[[list[Value]], list[Value]]) -> None:
        """Loops over parts of about so many steps, all nearly alike, at least one: without an index, sums are as they
        begin."""
        rows = ranges[k]
        assert rows.loop is not None
        (whole,) = self._ranges(rows.loop)
        places: dict[int, Access] = {}
        steps, extent = rows.steps, self.extent_of(whole)
        about = self.scalar("s_max", self.scalar("s_floordiv", self.add(extent, steps // 2), steps), 1)
        each = self.scalar("s_max", self._ceil_quotient(extent, about), 1)
        parts = self.scalar("s_max", self._ceil_quotient(extent, each), 1)

        def part(number: Value) -> None:
            start = self.add(whole.start, self.mul(number, each))
            end = self.add(start, each)
            piece = replace(whole, start=start, stop=self.scalar("s_min", end, whole.stop), fixed=None,
                            hint=min(whole.hint, steps), capacity=Capacity(2 * steps - steps // 2), forward=True)
            begins, ends = (self.emit(self.depth, "s_cmp", [self.value(a), self.value(b)], S64, cond="le")
                            for a, b in ((start, whole.start), (whole.stop, end)))
            assert rows.loop is not None and rows.body is not None
            self.loop_part = DepthPart(rows.loop, piece, begins, ends, rows, places)
            unpacked: dict[Value, Unpacked] = {}
            self._store_unpacked(rows.body, self._worth_unpacking(rows), (), unpacked)
            self.unpacked_places = unpacked
            self._resident(rows, lambda: super(DepthParts, self)._loops(ranges, k + 1, body))
            self.unpacked_places = {}
            self.loop_part = None

        self.counted("part", 0, parts, 1, part)

    def _ceil_quotient(self, a: Scalar, b: Scalar) -> Scalar:
        return self.scalar("s_floordiv", self.sub(self.add(a, b), 1), b)

    def _ranges(self, op: Op) -> list[Range]:
        part = self.loop_part
        return super()._ranges(op) if part is None or part.loop is not op else [replace(part.range)]

    def _full_tiles(self, r: Range, stop: Scalar, tile: Callable[[Value], None]) -> None:
        """Rows that walk parts find what these unpacked, tiles that are not full, too."""
        if r.loop is None:
            super()._full_tiles(r, stop, tile)
        else:
            super(UnpackedOperands, self)._full_tiles(r, stop, tile)

    def around_part(self, plan: Plan, late: Late | None, emit: Callable[[Plan, Late | None], None]) -> None:
        """The items of a block: what follows the loop follows its last part."""
        part = self.loop_part
        if part is None or part.loop not in plan.items:
            emit(plan, late)
            return
        behind = plan.items.index(part.loop) + 1
        emit(replace(plan, items=plan.items[:behind]), None)

        def finish() -> None:
            outer = dict(self.bound)
            self.bound |= {axis: replace(bound, depth=self.depth) for axis, bound in outer.items()}
            emit(replace(plan, items=plan.items[behind:]), late)
            self.bound |= outer

        self.fork(part.ends, finish, lambda: self._keep_carried(part))

    def first_rows(self, loop: Op, number: int, first: Value, points: list[dict[str, int]]) -> list[Value]:
        part = self.loop_part
        if part is None or part.loop is not loop:
            return super().first_rows(loop, number, first, points)
        if not number:
            self._ask_for_next_part(part)
            if self.requests.store_ahead_bytes:
                self.fork(part.ends, lambda: self._ask_for_results(part), lambda: None)
        if number not in part.places:
            part.places[number] = self._place_of_carried(loop.results[number], part.rows)
        blocks: list[Block] = []
        for begins in (True, False):
            self.enter(Block())
            rows = super().first_rows(loop, number, first, points) if begins else [
                self._load_carried(part.places[number], at) for at in points]
            self.effect("yield", rows)
            blocks.append(self.leave())
        made = Op("if", [part.begins], [v.type for v in rows], {}, blocks, loop.location)
        self.finish(made)
        return list(made.results)

    def _ask_for_next_part(self, part: DepthPart) -> None:
        """Each tile of rows asks for its share of the weights of the next part, into the second cache."""
        assert part.rows.axis is not None and part.range.counter is not None
        if not self.facts.software_prefetch:
            return
        tile = self.bound[part.rows.axis]
        counters = {counter for op in part.loop.walk() if op.name == "each" for counter in op.blocks[0].arguments}
        outside, self.scalars = self.scalars, {**self.scalars, **dict.fromkeys(counters, 0),
                                               part.range.counter: part.range.stop}
        matrices = self._stream_steps(part.loop.blocks[0], part.range)
        for op in part.loop.walk():
            if op.name != "load" or not self._is_resident_row(op) or (
                    matrix := memory_of(op.operands[0])) not in matrices:
                continue
            share, access = -(-part.rows.steps * matrices.pop(matrix) // part.rows.hint), self._access(op)
            pieces = tuple(a for a in axes_of(op.result) if a in self.bound and not self.bound[a].lane)
            access.base = self.add(access.base, self.mul(self.sub(tile.offset, part.rows.start), share))
            access.axes = {a: access.axes[a] for a in pieces}
            for at in self._coordinates(pieces):
                operands, attributes = self.address(access, at)
                first = attributes.pop("disp")
                for line in range(first, first + tile.count * share, LINE_BYTES):
                    self.effect("prefetch", operands, level=2, disp=line, **attributes)
        self.scalars = outside

    def _ask_for_results(self, part: DepthPart) -> None:
        """A tile asks for the lines that it stores behind the last part, to be written: rows lie far apart."""
        assert part.rows.body is not None
        for op in part.rows.body.ops:
            if op.name != "store" or self.access(op).gathers:
                continue
            access = self.access(op)
            lane = next(a for a in access.axes if self._is_lane(a))
            for at in self._coordinates(tuple(a for a in access.axes if a != lane)):
                operands, attributes = self.address(access, {**at, lane: 0})
                first = attributes.pop("disp")
                for line in range(first, first + self.bound[lane].count * self.lanes * f32.size_bytes, LINE_BYTES):
                    self.effect("prefetch", operands, level=1, write=True, disp=line, **attributes)

    def _prefetch_streams(self, body: Block, r: Range) -> None:
        """Weights are asked for part by part."""
        if self.loop_part is None:
            super()._prefetch_streams(body, r)
        elif self.requests.next_rows:
            self._prefetch_next_rows_of(body)

    def _step_to_next(self, op: Op, rows: tuple[str, ...]) -> Scalar | None:
        part = self.loop_part
        if part is None or part.rows.axis not in rows:
            return super()._step_to_next(op, rows)
        return self.mul(self.access(op).axes[part.rows.axis], self.bound[part.rows.axis].count)

    def _load_carried(self, place: Access, at: dict[str, int]) -> Value:
        operands, attributes = self.address(place, at)
        return self.emit(self.depth, "load", operands, RowType(place.dtype), dtype=place.dtype, masked=False,
                         **attributes)

    def _keep_carried(self, part: DepthPart) -> None:
        for number, place in part.places.items():
            value = part.loop.results[number]
            for at in self._coordinates(axes_of(value)):
                operands, attributes = self.address(place, at)
                self.effect("store", [self.row(value, at), *operands], dtype=place.dtype, masked=False, streaming=False,
                            **attributes)

    def _place_of_carried(self, value: Value, rows: Range) -> Access:
        """Scratch memory for a sum at all rows that go on with it, and at the pieces of its other axes at hand."""
        assert isinstance(value.type, TileType) and rows.capacity is not None
        axes: list[tuple[str, Capacity | int]] = [
            (axis, rows.capacity if axis == rows.axis else b.count * (self.lanes if b.lane else 1))
            for axis, b in sorted(((a, self.bound[a]) for a in axes_of(value)), key=lambda item: item[1].lane)]
        access = self.allocate(value, value.type.dtype, axes)
        access.relative = False
        for axis, step in access.axes.items():
            first = rows.start if axis == rows.axis else self.bound[axis].offset
            access.base = self.sub(access.base, self.mul(first, step))
        return access

    def _worth_unpacking(self, r: Range) -> frozenset[Value]:
        """And the scales of the weights, which each tile would widen."""
        operands = super()._worth_unpacking(r)
        return operands if r.loop is None else operands | {
            op.result for op in r.loop.walk() if op.name == "cast" and self._is_scale(op, r)}

    def _is_scale(self, op: Op, r: Range) -> bool:
        """Whether a cast widens what is loaded for all rows, a vector or two."""
        narrow, wide = op.operands[0].type, op.result.type
        load = op.operands[0].op
        if load is None or load.name != "load" or not isinstance(narrow, TileType) or not isinstance(wide, TileType):
            return False
        inside = set(axes_of(op.result)) - self.bound.keys()
        widens = narrow.dtype is u8 if wide.dtype is i32 else (
            wide.dtype is f32 and narrow.dtype.size_bytes < f32.size_bytes)
        return widens and r.axis not in inside and bool(inside) and all(
            self._fills_vectors(self._whole_hint(axis)) for axis in inside)

    def _store_plain(self, block: Block, operands: frozenset[Value], around: tuple[Range, ...],
                     places: dict[Value, Unpacked]) -> None:
        scales = [op.result for op in block.ops if op.name == "cast" and op.result in operands]
        if not scales:
            return
        self._set_places(scales, around, places, False)
        for value in scales:
            for at in self._coordinates(axes_of(value)):
                address, attributes = self._unpacked_address(places[value], at)
                self.effect("store", [self.row(value, at), *address], dtype=row_dtype(value.type.dtype), masked=False,  # type: ignore[union-attr]
                            streaming=False, **attributes)

    def _compute(self, value: Value, at: dict[str, int], level: int) -> Value:
        place = self.unpacked_places.get(value)
        if place is None or place.slots:
            return super()._compute(value, at, level)
        operands, attributes = self._unpacked_address(place, at)
        if value.op is not None and value.op.operands[0].type.dtype is u8:  # type: ignore[union-attr]
            row = self.emit(level, "load", operands, ROW_B32, dtype=b32, masked=False, bits=0xFF, **attributes)
            return self.emit(level, "bitcast", [row], ROW_I32)
        dtype = row_dtype(value.type.dtype)  # type: ignore[union-attr]
        return self.emit(level, "load", operands, RowType(dtype), dtype=dtype, masked=False, **attributes)

    def _unpacking_from(self, r: Range, split: bool) -> float:
        """All that is unpacked for rows that walk parts is unpacked once."""
        return 1 if r.loop is not None else super()._unpacking_from(r, split)
