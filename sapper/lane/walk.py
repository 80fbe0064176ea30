"""Walks as loops over register-sized pieces.

Enters a walk of a plan (sapper/tile/plan.py) and its choices (lane axis, register factors, loop order, staging);
leaves lane IR appended to the current level. What a walk is made of has a file each, one class on top of the other:

    axis_loops.py   loops over one axis, and `WalkChoice`
    stores.py       results that are stored, or kept for the walks after it
    prefetches.py   memory that is asked for early
    staging.py      operands that are copied first, to where staged.py says
    reductions.py   sums and contractions

Where tile registers serve a walk, tile_registers.py emits it, or tile_bound.py and those on top of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from math import gcd

from ..ir.nodes import Op, Value
from ..ir.types import MASK, S64, RowType, b32, i32, u8
from ..tile.ops import place_of
from ..tile.plan import Walk, axes_of
from ..tile.sums import is_join
from .axis_loops import Carried, WalkChoice
from .followed import Followed
from .prefetches import FEW_ROWS
from .reductions import Accumulator, Reductions
from .staged import PanelInPlace, StagedRows
from .staging import BLOCK_PANELS, DEEP_BLOCKS
from .state import PAIR, Access, Capacity, Open, Scalar
from .tile_registers import emit_walk
from .two_by_two import LANES

ROLLED_ROWS = 2
"""Rows computed at once where what follows a reduction is a loop over rows."""


class WalkLowering(Reductions):
    """Emits walks: the loops over their outer axes, and in these staging, reductions and stores.

    caller_tiles: where tile registers are configured, the address of scratch memory that keeps how they were before.
    followed: what became of the schedule. sum_places: of the walk at hand, where sums are between two blocks of the
    depth. depth_ends: where the depth is open to a block of it, whether it is the last one. turned: where tiles of
    slots lie that stay turned for tile registers (kept_tiles.py). in_slots: contractions that these took from slots
    (tile_slots.py).
    """

    turned: dict[Value, Scalar]
    in_slots: set[Op]
    caller_tiles: Value | None = None
    followed: Followed
    sum_places: dict[Op, Access]
    depth_ends: Value | None = None

    def walk(self, walk: Walk) -> None:
        choice = self.choose(walk)
        for made in (choice, choice.few):
            if made is not None:
                self.followed.add(made)
        if choice.few is not None:
            self._walk_few(walk, choice, choice.few)
        elif choice.tiles is not None:
            emit_walk(self, walk, choice)
        elif choice.bound is not None:
            choice.bound.emit(self, walk)
        else:
            with self.packed(choice.packing):
                self._walk(walk, choice)

    def _walk_few(self, walk: Walk, choice: WalkChoice, few: WalkChoice) -> None:
        """Both ways of a walk that stores all that it makes: where fewer rows than are worth tiles, or another
        order of the walk, or less of the depth than is worth blocks of it, are there, and else."""
        few_axis = choice.few_axis or (choice.order[-1] if choice.tiles is None else choice.tiles.rows)
        rows = self.value(self.open[few_axis].extent)
        are_few = self.emit(self.depth_of(rows), "s_cmp", [rows, self.value(choice.fewest)], S64, cond="lt")

        def on_vectors(chosen: WalkChoice) -> None:
            kept, self.stage_memory = self.stage_memory, {}     # of other sizes
            with self.packed(chosen.packing):
                self._walk(walk, chosen)
            self.stage_memory = kept

        def many() -> None:
            if choice.tiles is None:
                on_vectors(choice)
            else:
                emit_walk(self, walk, choice)

        self.fork(are_few, lambda: on_vectors(few), many)

    def _walk(self, walk: Walk, choice: WalkChoice) -> None:
        self.paired, self.lane_run, self.squared = self.paired_axes(walk), choice.run, self._squared_depth(choice)
        if self.squared is not None:
            self.paired.add(self.squared)
        pending = list(choice.staged)
        order = choice.order
        if choice.blocked:
            order = [order[0], *order] if choice.deep else [*order, order[0]]
        if choice.blocked and choice.depth_block:
            for op in [op for op in pending if choice.lane not in axes_of(op.result)]:
                pending.remove(op)
                self._stage(op, walk, choice)

        def outer(k: int) -> None:
            axis = order[k] if k < len(order) else None
            for op in list(pending):
                if k < 2 and op in choice.rows_here:
                    continue
                if axis is None or axis not in op.result.type.axes or (choice.deep and k == 1):  # type: ignore[union-attr]
                    pending.remove(op)
                    self._stage(op, walk, choice)
            if axis is None:
                self._piece(walk, choice)
            else:
                mine = list(pending)

                def body(carried: Carried) -> Carried:
                    pending[:] = mine
                    outer(k + 1)  # noqa: F821
                    return carried

                if choice.column_block and k == 0:
                    self._column_blocks(choice, axis, lambda: self._depth_blocks(walk, choice, order))
                elif choice.depth_block and not choice.blocked and not choice.column_block and k == len(order) - 1:
                    self._depth_blocks(walk, choice, order[-1:])
                elif axis == choice.parted and choice.parts > 1:
                    self.parted_lanes(axis, choice.counts[axis], choice.parts, body)
                elif axis == choice.parted:
                    self.parted_loop(axis, choice.counts[axis], [], body)
                elif choice.blocked and k == 0:
                    self._panel_blocks(choice, axis, lambda: self._depth_of_panels(walk, choice, body))
                else:
                    contracts = any(r.name == "contract" for r in walk.reductions)
                    self.axis_loop(axis, choice.counts[axis], axis == choice.lane, [], body,
                                   tails=self._tails(axis, choice.counts[axis]) if contracts else None,
                                   again=axis == choice.lane and self._may_store_again(walk))
                pending[:] = []

        if choice.errors_first is not None:
            self._sum_errors_first(walk, choice, choice.errors_first)
        copied = [op for op in choice.staged if op not in choice.rows_here]
        if copied and len(order) > 1 and not self.is_bounded(order[1]):
            # An expert that no token takes has no rows: then what rows would meet is not copied.
            rows = self.open[order[1]].extent
            some = self.emit(self.depth_of(rows), "s_cmp", [self.value(rows), self.value(0)], S64, cond="gt")
            self.fork(some, lambda: outer(0), lambda: None)  # noqa: F821
        else:
            outer(0)
        self.errors_before.clear()
        del outer   # it holds itself, and so all that it reads
        self.lane_run = 1
        for op in (*choice.staged, *choice.joined_once):
            self.staged.pop(op, None)

    def _may_store_again(self, walk: Walk) -> bool:
        """Whether a walk does nothing but store, side by side, what it makes of other tensors, so that it may do so
        once more."""
        if not self.requests.last_whole or walk.reductions or walk.after or self.behind is not None:
            return False
        stored = set()
        for root in walk.inner:
            if not isinstance(root, Op) or root.name != "store" or is_join(root) or self.streams(root) or (
                    self.access(root).gathers):
                return False
            stored.add(place_of(root.operands[0]))
        waiting, seen = [v for root in walk.inner for v in root.operands[1:]], set()    # type: ignore[union-attr]
        while waiting:
            op = waiting.pop().op
            if op is None or op in seen:
                continue
            seen.add(op)
            if op.name == "load" and place_of(op.operands[0]) in stored:
                return False
            waiting += op.operands[op.name == "load":]
        return True

    def _sum_errors_first(self, walk: Walk, choice: WalkChoice, axis: str) -> None:
        """Keep in scratch memory what products of each row of an axis with turned ones are too large by, lane by lane:
        all other rows meet it."""
        (depth,) = choice.reduced
        zero = self.constant(0, i32)
        for operand in {v: None for op in walk.reductions if (v := self.straight_operand(op)) is not None}:
            place = self.allocate(operand, i32, [(axis, self.extent_of_buffer(axis, operand)), (depth, self.lanes)])
            step = place.axes[axis]
            base = self.sub(place.base, self.mul(self.open[axis].offset, step))
            place = Access(base, place.disp, {axis: step}, place.dtype)

            def rows(carried: Carried, operand: Value = operand, place: Access = place) -> Carried:
                points = self._coordinates((axis,))

                def add(totals: Carried) -> Carried:
                    for inner in self._coordinates((depth,)):
                        totals = [self.add_error(self.slot_row(operand, {**inner, **at}, False),
                                                 operand.type.dtype is u8, total)  # type: ignore[union-attr]
                                  for at, total in zip(points, totals, strict=True)]
                    return totals

                totals = self.axis_loop(depth, choice.counts[depth], depth == choice.lane, [zero] * len(points), add)
                for at, total in zip(points, totals, strict=True):
                    operands, attributes = self.address(place, at)
                    self.effect("store", [total, *operands], dtype=i32, masked=False, streaming=False, **attributes)
                return carried

            self.axis_loop(axis, choice.counts[axis], False, [], rows, tails=self._tails(axis, choice.counts[axis]))
            self.errors_before[operand] = place

    def _squared_depth(self, choice: WalkChoice) -> str | None:
        """The depth of a walk on slots, if an even number of them, and of rows, meet vectors of columns at once."""
        packing, lane = choice.packing, choice.lane
        if not self.facts.two_by_two or packing is None or lane is None or lane in choice.reduced or (
                self.lanes != LANES or choice.depth_parts or choice.on_tiles or packing.depth in self.bound):
            return None
        rows = [choice.counts[axis] for axis in choice.order if axis != lane]
        even = any(count % 2 == 0 for count in rows) and choice.counts[packing.depth] % 2 == 0
        return packing.depth if len(choice.reduced) == 1 and even else None

    def _tails(self, axis: str, count: int) -> tuple[int, ...]:
        """How many rows of a contraction at once what is left of its rows is cut into: each piece reads all of the
        other operand again, from memory where there are few rows in all. Of a sequential loop only the last tile leaves
        any but what all do, of which a power of two is taken: code for them is not worth its length. Of a nest a block
        may be all that a task has."""
        o = self.open[axis]
        if o.capacity == Capacity(o.hint) and not isinstance(o.extent, int) and axis not in self.chunked:
            if axis in self.paired:
                return (PAIR,) if count > PAIR else ()
            left = o.hint % count if self.sixteen_registers else 0
            return (1 << left.bit_length() - 1,) if left > 1 else ()
        sizes = (8, 4, 2) if o.hint <= FEW_ROWS else () if self.facts.many_workers else (4, 2)
        return tuple(size for size in sizes if size < count)

    def _panel_blocks(self, choice: WalkChoice, lane: str, body: Callable[[], object]) -> None:
        """Run `body` with the lane axis open to one block of panels after another."""
        o = self.open[lane]
        size = self._block_columns(choice, lane)
        self.most_columns = o.most

        def block(start: Scalar, extent: Scalar) -> None:
            width = choice.counts[lane] * self.lanes
            capacity = Capacity(BLOCK_PANELS * width) if choice.depth_block else None
            self.open[lane] = Open(start, extent, min(o.hint, BLOCK_PANELS * width), gcd(o.divisor, width), capacity)
            body()

        def numbered(number: Value) -> None:
            start = self.mul(number, size)
            if choice.block_ahead:
                last = self.mul(self.sub(blocks, 1), size)
                self.next_block = self.add(o.offset, self.scalar("s_min", self.add(start, size), last))
            block(self.add(o.offset, start), self.scalar("s_min", self.sub(o.extent, start), size))
            self.next_block = None

        if isinstance(size, int) and isinstance(o.extent, int) and o.extent <= size:
            block(o.offset, o.extent)
        else:
            blocks = self.scalar("s_floordiv", self.sub(self.add(o.extent, size), 1), size)
            self.counted(lane, 0, blocks, 1, numbered)
        self.open[lane], self.most_columns = o, None

    def _block_columns(self, choice: WalkChoice, lane: str) -> Scalar:
        """Columns of a block: of as many panels as fill half of the second cache, or half of that where what becomes
        the next ones is asked for meanwhile, or more, where these are walked one by one."""
        width = choice.counts[lane] * self.lanes
        (depth_axis,) = choice.reduced
        depth = self._panel_depth(depth_axis)
        if choice.depth_block:
            depth = self.scalar("s_min", depth, choice.depth_block)
        parts = 1 if choice.tiles is None else choice.tiles.right_parts
        panel_bytes = self.mul(depth, width * 4 * parts * sum(
            lane in op.result.type.axes for op in choice.staged))  # type: ignore[union-attr]
        room_bytes = self.block_bytes * (DEEP_BLOCKS if choice.deep else 1) // (2 if choice.block_ahead else 1)
        fitting = self.scalar("s_floordiv", room_bytes, self.scalar("s_max", panel_bytes, 1))
        panels = self.scalar("s_max", self.scalar("s_min", fitting, 1 if choice.near else BLOCK_PANELS), 1)
        if choice.tiles is not None and not choice.tiles.kept and all(
                self.panels_of(op) is not None for op in choice.staged):
            row_bytes = self.mul(depth, b32.size_bytes * choice.tiles.left_parts)
            rows_bytes = self.mul(row_bytes, self.open[choice.tiles.rows].extent)
            stay = self.emit(self.depth_of(rows_bytes), "s_cmp",
                             [self.value(rows_bytes), self.value(self.block_bytes)], S64, cond="le")
            level = max(self.depth_of(stay), self.depth_of(panels))
            panels = self.emit(level, "s_select", [stay, self.value(1), self.value(panels)], S64)
        return self.mul(panels, width)

    def _depth_of_panels(self, walk: Walk, choice: WalkChoice, body: Callable[[Carried], Carried]) -> None:
        """Run `body` for a block of panels: of all of their depth, or of one block of it after another, between which
        the sums of all rows are in scratch memory."""
        if not choice.depth_block:
            body([])
            return
        lane, rows = choice.order
        self.sum_places = {}

        def clear(carried: Carried) -> Carried:
            accumulators = self._start_all(walk, choice, 1)
            for a in accumulators:
                a.rows = self._zeros(a)
            self._keep_sums(accumulators, choice.order)
            return carried

        self.axis_loop(rows, 1, False, [], lambda carried: self.axis_loop(
            lane, choice.counts[lane], True, carried, clear))

        def block(left: Scalar) -> None:
            for op, staged in self.staged.items():
                if isinstance(staged, StagedRows):
                    self.staged[op] = self.place_of_rows(op, rows, choice.reduced[0], choice)
            self.depth_ends = self.emit(self.depth, "s_cmp", [self.value(left), self.value(0)], S64, cond="le")
            body([])
            self.depth_ends = None

        self.blocks_of_depth(choice, block)

    def _piece_of_depth(self, walk: Walk, choice: WalkChoice, ends: Value) -> None:
        """What a block of the depth adds to the sums of a piece, and, where the depth ends, what follows them. What
        sums in panels that were packed begin with is for all of the depth."""
        accumulators = self._start_all(walk, choice, 1)
        starts = {a.op: a.rows for a in accumulators if self._starts_in_place(a)}
        for a in accumulators:
            a.rows = self._zeros(a) if a.op in starts else a.rows
        self._ask_for_sums(accumulators)
        carried = [v for a in accumulators for v in a.carried()]
        self._unpack(accumulators, self._reduce(walk, choice, 0, accumulators, carried))
        self._take_errors_off(accumulators)
        self._add_kept_sums(accumulators)
        sums = [dict(a.rows) for a in accumulators]

        def finish() -> None:
            outer = {axis: self.bound[axis] for axis in choice.order}
            self.bound |= {axis: replace(bound, depth=self.depth) for axis, bound in outer.items()}
            for a in accumulators:
                a.errors = {}
                if a.op in starts:
                    a.rows = {key: self.emit(self.depth, "add", [row, starts[a.op][key]], row.type)
                              for key, row in a.rows.items()}
            self._reduce_rest(walk, choice, accumulators)
            self._finish_piece(walk, choice, accumulators)
            self.bound |= outer

        def keep() -> None:
            for a, rows in zip(accumulators, sums, strict=True):
                a.rows = rows
            self._keep_sums(accumulators, choice.order)

        self.fork(ends, finish, keep)

    def _starts_in_place(self, a: Accumulator) -> bool:
        straight = self.straight_operand(a.op)
        staged = self.staged.get(straight.op) if straight is not None and straight.op is not None else None
        return isinstance(staged, PanelInPlace)

    def _piece(self, walk: Walk, choice: WalkChoice) -> None:
        """All of the walk at one piece of its outer axes."""
        if walk.reductions and self.depth_ends is not None:
            self._piece_of_depth(walk, choice, self.depth_ends)
        elif walk.reductions:
            slots = self._slots(walk, choice)
            accumulators = self._start_all(walk, choice, slots)
            carried = [v for a in accumulators for v in a.carried()]
            carried = self._reduce(walk, choice, 0, accumulators, carried)
            self._unpack(accumulators, carried)
            self._finish_piece(walk, choice, accumulators)
        else:
            self._prefetch_next_rows(walk, choice)
            self.request_stores(walk.inner)
            self._roots(walk.inner, walk)

    def _finish_piece(self, walk: Walk, choice: WalkChoice, accumulators: list[Accumulator]) -> None:
        """What follows the reductions, once all of the reduced axes are in them."""
        self._take_errors_off(accumulators)
        joint = choice.joint if choice.joint is not None and self.bound[choice.joint].count > 1 else None
        if joint is not None:
            self._finish_jointly(walk, choice, accumulators, joint)
        elif choice.rolled is not None and self.bound[choice.rolled].count > ROLLED_ROWS:
            self._finish_in_loop(walk, choice, accumulators, choice.rolled)
        else:
            self._finish(walk, choice, accumulators, self._joined_in_registers(walk, choice))

    def _column_blocks(self, choice: WalkChoice, lane: str, body: Callable[[], None]) -> None:
        """Run `body` with the lane axis open to as many columns at a time as have their sums in scratch memory."""
        o, size = self.open[lane], choice.column_block

        def block(start: Value) -> None:
            extent = self.scalar("s_min", self.sub(self.add(o.offset, o.extent), start), size)
            self.open[lane] = Open(start, extent, min(o.hint, size), gcd(o.divisor, size), Capacity(size))
            body()

        if isinstance(o.extent, int) and o.extent <= size:
            body()      # its length stays known
        else:
            self.counted(lane, o.offset, self.add(o.offset, o.extent), size, block)
        self.open[lane] = o

    def _depth_blocks(self, walk: Walk, choice: WalkChoice, axes: list[str]) -> None:
        """All of the walk at one piece of the axes that are not among these: their pieces at one block of the depth
        after another, and at what is left of it. Between these the sums are in scratch memory."""
        (depth_axis,) = choice.reduced
        depth, size = self.open[depth_axis], choice.depth_block
        together = choice.depth_parts or size
        self.sum_places = {}

        def over_pieces(body: Callable[[list[Accumulator]], None], part: Open | None = None, number: int = 0) -> None:
            def piece(carried: Carried) -> Carried:
                if part is not None and number == 0:
                    for op in choice.joined_once:
                        self._stage_part(op, choice, part)
                if number + 1 < len(axes):
                    over_pieces(body, part, number + 1)
                else:
                    body(self._start_all(walk, choice, 1))
                return carried

            axis = axes[number]
            tails = self._tails(axis, choice.counts[axis]) if choice.column_block else None
            self.axis_loop(axis, choice.counts[axis], axis == choice.lane, [], piece, tails=tails)

        def keep(accumulators: list[Accumulator]) -> None:
            self._keep_sums(accumulators, axes)

        def add_to(accumulators: list[Accumulator], part: Open) -> None:
            """Add what a part of the depth makes. What all columns go by has sums of its own: these round less."""
            for a in accumulators:
                a.rows = self._zeros(a) if choice.column_block else self._kept_sums(a)
            self.depth_part = part
            carried = [v for a in accumulators for v in a.carried()]
            self._unpack(accumulators, self._reduce(walk, choice, 0, accumulators, carried, part))
            self.depth_part = None
            if choice.column_block:
                self._add_kept_sums(accumulators)

        def block(start: Value) -> None:
            steps: Scalar = size
            if size > together:     # of each place
                steps = self.scalar("s_min", self.sub(self.add(depth.offset, apart), start), size // together)
            part = Open(start, steps, size, size, None, apart=apart)

            def piece(accumulators: list[Accumulator]) -> None:
                add_to(accumulators, part)
                if choice.errors_first is None:
                    self._take_errors_off(accumulators)
                keep(accumulators)

            over_pieces(piece, part)

        def last(accumulators: list[Accumulator]) -> None:
            add_to(accumulators, rest)
            self._reduce_rest(walk, choice, accumulators)
            self._finish_piece(walk, choice, accumulators)

        over_pieces(keep)
        end = self.add(depth.offset, self.sub(depth.extent, self.scalar("s_mod", depth.extent, together)))
        apart: Scalar = 1
        if choice.depth_parts:
            apart = self.scalar("s_floordiv", depth.extent, together)
            self.counted(depth_axis, depth.offset, self.add(depth.offset, apart), size // together, block)
        else:
            self.counted(depth_axis, depth.offset, end, size, block)
        rest = Open(end, self.sub(self.add(depth.offset, depth.extent), end), depth.hint, gcd(depth.divisor, together))
        over_pieces(last, rest)

    def _reduce_rest(self, walk: Walk, choice: WalkChoice, accumulators: list[Accumulator]) -> None:
        """Add the elements of the depth that fill no slot."""
        (depth_axis,) = choice.reduced
        with self.rest_of_depth() if self.packing is not None else nullcontext(False) as any_left:
            if any_left:
                plain = replace(choice, counts={**choice.counts, depth_axis: 1}, prefetched=[], reread=[])
                carried = [v for a in accumulators for v in a.carried()]
                self._unpack(accumulators, self._reduce(walk, plain, 0, accumulators, carried))

    # Sums that are in scratch memory between two blocks of the depth.

    def _keep_sums(self, accumulators: list[Accumulator], axes: list[str]) -> None:
        """axes: those along all of which there is room for sums."""
        for a in accumulators:
            if a.op not in self.sum_places:
                self.sum_places[a.op] = self._place_of_sums(a, axes)
            place = self.sum_places[a.op]
            for (point, _), row in a.rows.items():
                operands, attributes = self.address(place, dict(zip(axes_of(a.op.result), point, strict=True)))
                self.effect("store", [row, *operands], dtype=place.dtype, masked=False, streaming=False, **attributes)

    def _kept_sums(self, a: Accumulator) -> dict[tuple[tuple[int, ...], int], Value]:
        rows, place = {}, self.sum_places[a.op]
        for (point, slot), row in a.rows.items():
            operands, attributes = self.address(place, dict(zip(axes_of(a.op.result), point, strict=True)))
            rows[point, slot] = self.emit(self.depth, "load", operands, row.type, dtype=place.dtype, masked=False,
                                          **attributes)
        return rows

    def _ask_for_sums(self, accumulators: list[Accumulator]) -> None:
        """Those of many rows lie in the last cache: they come while products are made that are added to them."""
        for a in accumulators:
            for point, _ in a.rows:
                at = dict(zip(axes_of(a.op.result), point, strict=True))
                operands, attributes = self.address(self.sum_places[a.op], at)
                self.effect("prefetch", operands, level=1, write=True, **attributes)

    def _add_kept_sums(self, accumulators: list[Accumulator]) -> None:
        for a in accumulators:
            for key, row in self._kept_sums(a).items():
                a.rows[key] = self.emit(self.depth, "add", [row, a.rows[key]], row.type)

    def _zeros(self, a: Accumulator) -> dict[tuple[tuple[int, ...], int], Value]:
        return {key: self.constant(0.0 if row.type.dtype.is_float else 0, row.type.dtype)  # type: ignore[union-attr]
                for key, row in a.rows.items()}

    def _place_of_sums(self, a: Accumulator, walked: list[str]) -> Access:
        """Scratch memory for the sums along all of some axes, at the pieces of the others that are bound."""
        row = next(iter(a.rows.values()))
        assert isinstance(row.type, RowType)
        axes = [(axis, self.extent_of_buffer(axis, a.op.result))
                for axis in sorted(axes_of(a.op.result), key=lambda axis: self.bound[axis].lane)]
        access = self.allocate(a.op.result, row.type.dtype, axes)
        access.relative = False
        for axis, step in access.axes.items():
            first = self.open[axis].offset if axis in walked else self.bound[axis].offset
            access.base = self.sub(access.base, self.mul(first, step))
        return access

    def _finish(self, walk: Walk, choice: WalkChoice, accumulators: list[Accumulator],
                joint: str | None = None) -> None:
        for accumulator in accumulators:
            self._complete(accumulator, choice, joint)
        self._roots(walk.after)

    def _finish_jointly(self, walk: Walk, choice: WalkChoice, accumulators: list[Accumulator], axis: str) -> None:
        """The rows of `axis`, whose lanes are summed, become one row along it: with fewer instructions than each by
        itself, and what follows is computed for all of them at once."""
        rows = self.bound[axis]
        mask = None if rows.count == self.lanes else self.emit(0, "mask_first", [self.value(rows.count)], MASK)

        def finish(carried: Carried) -> Carried:
            self._finish(walk, choice, accumulators, axis)
            return carried

        self._bind(axis, rows.offset, 1, True, mask, [], finish, narrow=mask is not None)

    def _finish_in_loop(self, walk: Walk, choice: WalkChoice, accumulators: list[Accumulator], axis: str) -> None:
        """The results go through scratch memory, so that what follows is code for a few rows, run for all."""
        rows = self.bound[axis]
        for a in accumulators:
            value = a.value
            axes: list[tuple[str, Capacity | int]] = [
                (name, self.bound[name].count * (self.lanes if self.bound[name].lane else 1))
                for name in sorted(value.type.axes, key=lambda name: self.bound[name].lane)]  # type: ignore[union-attr]
            access = self.allocate(value, value.type.dtype, axes)  # type: ignore[union-attr]
            access.relative = False
            for name, step in access.axes.items():
                access.base = self.sub(access.base, self.mul(self.bound[name].offset, step))
            self._complete(a, choice)
            for at in self._coordinates(value.type.axes):  # type: ignore[union-attr]
                self.put(access, self.row(value, at), value.type.dtype, at, value.type.axes, padded=True)  # type: ignore[union-attr]
            self.buffers[value] = access

        def finish(carried: Carried) -> Carried:
            self._roots(walk.after)
            return carried

        step = ROLLED_ROWS if rows.count % ROLLED_ROWS == 0 else 1
        self._loop(axis, rows.offset, self.add(rows.offset, rows.count), step, False, False, [], finish)
        for a in accumulators:
            del self.buffers[a.value]

    def use_tiles(self) -> None:
        """Have the tile registers configured, once, before all that is being emitted."""
        if self.caller_tiles is None:
            assert self.facts.tiles is not None
            self.caller_tiles = self.value(self.scratch([(self.facts.tiles.kept_bytes, 1)], u8))
            self.levels[0].builder.block.ops.append(Op("tile_configure", [self.caller_tiles], ()))
