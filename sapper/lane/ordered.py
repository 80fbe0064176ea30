"""Ops that take an axis in its order: scans and the k largest.

Enters a `scan` or `topk` op whose outer axes are bound or open; leaves lane IR appended to the current level, and the
results in scratch memory.

A scan goes along its axis with a carried total. Across the lanes of a row it takes log2(lanes) steps: each lane holds
what was summed up to it, and the sum of its block; blocks double, and the upper half of each adds the sum of the lower
(G. Blelloch, "Prefix sums and their applications", 1990, here on a butterfly, where a step is one exchange).

The k largest are a sorted list in scratch memory. A row is compared with the last of the list at once; only where an
element is larger, which of n random ones about k ln(n / k) are, is it put into its place. With another axis across the
lanes there is a list for each lane, and every element goes down it.
"""

from __future__ import annotations

from collections.abc import Callable

from ..ir.nodes import Block, Op, Value
from ..ir.types import MASK, S64, DType, RowType, TileType, bf16, f16, i32
from ..tile.plan import Walk, axes_of
from .axis_loops import Carried
from .model import Model
from .state import Access, Scalar, row_dtype

ROWS_AT_ONCE = 4
"""Rows that are compared with the end of the list in one step."""

UNROLLED_ROWS = 4
"""Rows of a list up to which going down it is no loop."""


def lowest_of(dtype: DType, sign: int) -> float | int:
    """What loses every comparison by `>` (sign 1) or `<` (sign -1) among the values of a dtype."""
    if dtype.is_float:
        return float("-inf") * sign
    bits = 32 if dtype.kind == "x" else dtype.bits
    if dtype.kind == "u":
        return 0 if sign > 0 else (1 << bits) - 1
    return -(1 << (bits - 1)) if sign > 0 else (1 << (bits - 1)) - 1


class OrderedLowering(Model):
    """Emits scans and the k largest."""

    def ordered(self, op: Op) -> None:
        """One op: a loop over each outer axis that is still open, then its axis."""
        (axis,) = op.attributes["over"]
        operand = op.operands[0]
        lane = next((a for a in axes_of(operand) if a in self.bound and self.bound[a].lane), None)
        buffers = [self._ordered_buffer(value, axis if lane is None else None) for value in op.results]
        self.buffers.update(zip(op.results, buffers, strict=True))
        outer = [a for a in axes_of(operand) if a != axis and a in self.open]
        if lane is None and op.name == "scan":
            lane = self._lane(Walk(tuple(a for a in axes_of(operand) if a != axis), (axis,), [op]), [*outer, axis],
                              False)
        if lane is None:
            lane = axis
        outer.sort(key=lambda a: a == lane)

        def loops(left: list[str]) -> None:
            if left:
                def body(carried: Carried) -> Carried:
                    loops(left[1:])
                    return carried

                self.axis_loop(left[0], 1, left[0] == lane, [], body)
                return
            points = self._coordinates(tuple(a for a in axes_of(operand) if a != axis))
            for at in points:
                if op.name == "scan":
                    self._scan(op, axis, axis == lane, at, buffers[0])
                elif axis == lane:
                    self._largest(op, axis, at, buffers)
                else:
                    self._largest_by_lane(op, axis, at, buffers)

        loops(outer)

    def _ordered_buffer(self, value: Value, last: str | None) -> Access:
        """Scratch memory for a result; `last`, if it spans that, is the axis along memory."""
        axes = [(a, self.extent_of_buffer(a, value)) for a in axes_of(value)]
        axes.sort(key=lambda pair: (pair[0] == last, pair[0] in self.bound and self.bound[pair[0]].lane))
        return self.allocate(value, value.type.dtype, axes)  # type: ignore[union-attr]

    def _if_any(self, condition: Value, then: Callable[[], Carried], otherwise: Carried) -> Carried:
        """What `then` gives where a scalar is not 0."""
        taken, other = Block(), Block()
        self.enter(taken)
        self.effect("yield", then())
        self.leave()
        self.enter(other)
        self.effect("yield", otherwise)
        self.leave()
        made = Op("if", [condition], [v.type for v in otherwise], {}, [taken, other], self.location)
        self.finish(made)
        return list(made.results)

    def _repeat(self, stop: Scalar, carried: Carried, body: Callable[[Value, Carried], Carried]) -> Carried:
        """A loop over 0 .. stop - 1."""
        block = Block([S64, *[v.type for v in carried]])
        first, last = self.value(0), self.value(stop)
        self.enter(block)
        self.effect("yield", body(block.arguments[0], list(block.arguments[1:])))
        self.leave()
        made = Op("loop", [first, last, *carried], [v.type for v in carried], {"step": 1}, [block], self.location)
        self.finish(made)
        return list(made.results)

    # Scans.

    def _scan(self, op: Op, axis: str, across: bool, at: dict[str, int], buffer: Access) -> None:
        kind = op.attributes["kind"]
        operand, result = op.operands[0], op.result
        tile = result.type
        assert isinstance(tile, TileType)
        sample = self._row_type(operand)
        neutral = self.constant(
            (0.0 if sample.dtype.is_float else 0) if kind == "sum" else
            lowest_of(tile.dtype, 1 if kind == "max" else -1), sample.dtype)

        def join(a: Value, b: Value) -> Value:
            return self.emit(self.depth, "add" if kind == "sum" else kind, [a, b], a.type)

        def body(carried: Carried) -> Carried:
            here = {**at, axis: 0}
            total = carried[0]
            row = self.row(operand, here)
            if kind != "sum" and sample.dtype.is_float:  # NaN takes no part
                row = self.emit(self.depth, "select", [
                    self.emit(self.depth, "cmp", [row, row], MASK, cond="eq"), row, neutral], row.type)
            if not across:
                new = join(row, total)
                self._keep_scanned(new, result, buffer, here)
                return [new]
            mask = self.bound[axis].mask
            if mask is not None:
                row = self.emit(self.depth, "select", [mask, row, neutral], row.type)
            prefix = block = row
            distance = 1
            while distance < self.lanes:
                other = self._shuffled(block, distance)
                block = join(block, other)
                prefix = self.emit(self.depth, "select", [self._upper(distance), join(prefix, other), prefix],
                                   prefix.type)
                distance *= 2
            self._keep_scanned(join(prefix, total), result, buffer, here)
            return [join(block, total)]

        self.axis_loop(axis, 1, across, [neutral], body)

    def _keep_scanned(self, row: Value, result: Value, buffer: Access, at: dict[str, int]) -> None:
        dtype = result.type.dtype  # type: ignore[union-attr]
        if dtype in (bf16, f16):
            row = self.emit(self.depth, "round_to", [row], row.type, dtype=dtype)
        elif dtype.is_integer:
            row = self.wrap(row, dtype, self.depth)
        self.put(buffer, row, dtype, at, axes_of(result), padded=True)

    def _row_type(self, value: Value) -> RowType:
        return RowType(row_dtype(value.type.dtype))  # type: ignore[union-attr]

    # The k largest, the axis across the lanes.

    def _list(self, op: Op) -> tuple[Scalar, Scalar, Scalar]:
        """Addresses of a list of values and of one of places, and how many elements they have."""
        count_axis = op.attributes["into"]
        extent = self.open[count_axis]
        capacity = self.extent_of_buffer(count_axis, op.results[0])
        row = self._row_type(op.operands[0]).dtype
        bases = []
        for dtype in (row, i32):
            # A row before the first: what lies before the list counts as larger than any element.
            self.scratch([(self.lanes * max(1, 64 // (self.lanes * dtype.size_bytes)), 1)], dtype)
            bases.append(self.scratch([(capacity, self.lanes)], dtype))
        return bases[0], bases[1], extent.extent

    def _list_memory(self, name: str, base: Scalar, place: Scalar, dtype: DType, row: Value | None = None,
                disp: int = 0) -> Value | None:
        """A load or store at base + place elements + disp bytes, here and now."""
        operands, attributes = self.memory_operands(base, place, dtype.size_bytes, disp)
        if row is not None:
            if name == "store":
                attributes |= {"masked": False, "streaming": False}
            self.effect(name, [row, *operands], dtype=dtype, **attributes)
            return None
        if name == "load":
            attributes["masked"] = False
        return self.emit(self.depth, name, operands, RowType(dtype), dtype=dtype, **attributes)

    def _fetched(self, name: str, base: Scalar, place: Scalar, dtype: DType, disp: int = 0) -> Value:
        found = self._list_memory(name, base, place, dtype, None, disp)
        assert found is not None
        return found

    def _rows_of(self, count: Scalar, body: Callable[[Scalar], None]) -> None:
        """`body` with the first place of each row of a list, the last row first."""
        rows = self.ceil_div(count, self.lanes)
        if isinstance(rows, int) and rows <= UNROLLED_ROWS:
            for number in reversed(range(rows)):
                body(number * self.lanes)
            return

        def one(number: Value, carried: Carried) -> Carried:
            body(self.mul(self.sub(self.sub(rows, 1), number), self.lanes))
            return carried

        self._repeat(rows, [], one)

    def _largest(self, op: Op, axis: str, at: dict[str, int], buffers: list[Access]) -> None:
        operand = op.operands[0]
        source = operand.type.dtype  # type: ignore[union-attr]
        row = self._row_type(operand)
        lanes = self.lanes
        values, places, count = self._list(op)
        group = self.scratch([(ROWS_AT_ONCE * lanes, 1)], row.dtype)
        group_places = self.scratch([(ROWS_AT_ONCE * lanes, 1)], i32)
        lowest = self.constant(lowest_of(source, 1), row.dtype)
        highest = self.constant(lowest_of(source, -1), row.dtype)
        start = self.emit(self.depth, "splat", [self.value(self.open[axis].offset)], RowType(i32))
        self._list_memory("store", values, 0, row.dtype, highest, -lanes * row.dtype.size_bytes)
        self._list_memory("store", places, 0, i32, start, -lanes * 4)

        def clear(place: Scalar) -> None:
            self._list_memory("store", values, place, row.dtype, lowest)
            self._list_memory("store", places, place, i32, start)

        self._rows_of(count, clear)

        def least() -> Value:
            """The end of the list: what an element must be larger than."""
            return self._fetched("load_splat", values, count, row.dtype, -row.dtype.size_bytes)

        def insert(element: Value, place: Value) -> Carried:
            def shift(first: Scalar) -> None:
                own = self._fetched("load", values, first, row.dtype)
                before = self._fetched("load", values, first, row.dtype, -row.dtype.size_bytes)
                own_place = self._fetched("load", places, first, i32)
                place_before = self._fetched("load", places, first, i32, -4)
                stays = self.emit(self.depth, "cmp", [own, element], MASK, cond="ge")
                moves = self.emit(self.depth, "cmp", [before, element], MASK, cond="lt")
                for base, dtype, new, mine, previous in ((values, row.dtype, element, own, before),
                                                         (places, i32, place, own_place, place_before)):
                    moved = self.emit(self.depth, "select", [moves, previous, new], new.type)
                    self._list_memory("store", base, first, dtype,
                                 self.emit(self.depth, "select", [stays, mine, moved], new.type))

            self._rows_of(count, shift)
            return [least()]

        def is_larger(candidate: Value, end: Value) -> Value:
            return self.emit(self.depth, "cmp", [candidate, end], MASK, cond="gt")

        def any_of(mask: Value) -> Value:
            return self.emit(self.depth, "mask_any", [mask], S64)

        def each_lane(first: Scalar, carried: Carried) -> Carried:
            def one(lane: Value, ends: Carried) -> Carried:
                here = self.add(first, lane)
                element = self._fetched("load_splat", group, here, row.dtype)
                found = any_of(is_larger(element, ends[0]))
                return self._if_any(found, lambda: insert(element, self._fetched("load_splat", group_places, here,
                                                                                 i32)), ends)

            return self._repeat(lanes, carried, one)

        def body(carried: Carried) -> Carried:
            bound = self.bound[axis]
            rows = [self.row(operand, {**at, axis: j}) for j in range(bound.count)]
            if bound.mask is not None:
                rows = [self.emit(self.depth, "select", [bound.mask, r, lowest], r.type) for r in rows]
            found = is_larger(rows[0], carried[0])
            for r in rows[1:]:
                found = self.emit(self.depth, "mask_or", [found, is_larger(r, carried[0])], MASK)

            def look() -> Carried:
                for j, r in enumerate(rows):
                    self._list_memory("store", group, j * lanes, row.dtype, r)
                    coordinate = self._coordinate(axis, {**at, axis: j}, self.depth)
                    self._list_memory("store", group_places, j * lanes, i32, coordinate)
                if len(rows) == 1:
                    return each_lane(0, carried)

                def one(number: Value, ends: Carried) -> Carried:
                    first = self.mul(number, lanes)
                    some = any_of(is_larger(self._fetched("load", group, first, row.dtype), ends[0]))
                    return self._if_any(some, lambda: each_lane(first, ends), ends)

                return self._repeat(len(rows), carried, one)

            return self._if_any(any_of(found), look, carried)

        self.axis_loop(axis, ROWS_AT_ONCE, True, [least()], body)
        into = op.attributes["into"]
        for base, dtype, value, buffer in zip((values, places), (row.dtype, i32), op.results, buffers, strict=True):
            def copy(carried: Carried, base: Scalar = base, dtype: DType = dtype, value: Value = value,
                     buffer: Access = buffer) -> Carried:
                found = self._fetched("load", base, self.bound[into].offset, dtype)
                self.put(buffer, found, value.type.dtype, {**at, into: 0}, axes_of(value), padded=True)  # type: ignore[union-attr]
                return carried

            self.axis_loop(into, 1, True, [], copy)

    # The k largest, another axis across the lanes.

    def _largest_by_lane(self, op: Op, axis: str, at: dict[str, int], buffers: list[Access]) -> None:
        operand = op.operands[0]
        source = operand.type.dtype  # type: ignore[union-attr]
        row = self._row_type(operand)
        into = op.attributes["into"]
        lowest = self.constant(lowest_of(source, 1), row.dtype)
        start = self.emit(self.depth, "splat", [self.value(self.open[axis].offset)], RowType(i32))

        def element(buffer: Access, value: Value, new: Value | None) -> Value:
            """The row of a list that the axis `into` is bound to; `new` takes its place."""
            found = self._fetch(buffer, value, {**at, into: 0}, self.depth, None, padded=True) if new is None else new
            if new is not None:
                self.put(buffer, new, value.type.dtype, {**at, into: 0}, axes_of(value), padded=True)  # type: ignore[union-attr]
            return found

        def clear(carried: Carried) -> Carried:
            for buffer, value, first in zip(buffers, op.results, (lowest, start), strict=True):
                element(buffer, value, first)
            return carried

        self.axis_loop(into, 1, False, [], clear)

        def body(carried: Carried) -> Carried:
            new = self.row(operand, {**at, axis: 0})
            place = self._coordinate(axis, {**at, axis: 0}, self.depth)

            def down(below: Carried) -> Carried:
                """The larger of what comes down and what is here stays, of equal ones the earlier."""
                mine = [element(b, v, None) for b, v in zip(buffers, op.results, strict=True)]
                larger, equal = (self.emit(self.depth, "cmp", [below[0], mine[0]], MASK, cond=c) for c in ("gt", "eq"))
                earlier = self.emit(self.depth, "cmp", [below[1], mine[1]], MASK, cond="lt")
                first = self.emit(self.depth, "mask_and", [equal, earlier], MASK)
                larger = self.emit(self.depth, "mask_or", [larger, first], MASK)
                gone = []
                for buffer, value, comes, own in zip(buffers, op.results, below, mine, strict=True):
                    element(buffer, value, self.emit(self.depth, "select", [larger, comes, own], own.type))
                    gone.append(self.emit(self.depth, "select", [larger, own, comes], own.type))
                return gone

            self.axis_loop(into, 1, False, [new, place], down)
            return carried

        self.axis_loop(axis, 1, False, [], body)


