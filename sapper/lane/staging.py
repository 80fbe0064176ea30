"""Staging: operands of a contraction copied to scratch memory in the order in which the inner loop reads them.

Enters a load and the axis that lies in the lanes; leaves loops that copy it, and in `staged` where it lies then
(staged.py). Panels are turned from rows on the way where the lanes run across these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import gcd

from ..ir.nodes import Op, Value
from ..ir.types import MASK, ROW_I32, S64, RowType, i4, i32, i64, u8
from ..tile.plan import Walk, axes_of
from ..tile.schedule import Panels
from .axis_loops import Carried, WalkChoice
from .prefetches import Prefetches
from .rows import LoweringError
from .staged import PanelInPlace, PanelOfElements, PanelOfParts, StagedColumns, StagedPanel, StagedRows, StagedRowsHere
from .state import Access, Bound, Capacity, Open, Scalar, element_bytes, memory_dtype, row_dtype

WIDE_ROW_BYTES = 128
"""Rows of a panel from this size on are copied panel by panel: they are whole cache lines."""

DEEP_BLOCKS = 4
"""How many blocks panels are copied for together that are so deep that a block has two at most, if they come from rows
of a matrix far apart: a line of each row for every panel takes longer than the products of 64 rows with it. Measured on
a Zen 3, f32 [in, out] by 128 rows, in ms, one block and four: 4096 x 4096 66.5 and 52.7 (NumPy 51), of 64 rows 42.4 and
32.0 (27 to 32), 2048 x 2048 16.5 and 13.5 (13.5), of 512 rows 48.0 and 48.0 (46.5). Eight blocks are as quick. Of bf16,
whose copy is widened, neither is."""

BLOCK_PANELS = 8
"""Most panels that are walked with the same rows: these then come from the last cache so many times less often."""

COPIED_STEPS = 8
"""Rows of memory, each along the rows of a contraction, that are copied side by side from one end to the other: a line
of each is read once, for all blocks that have a part in it. One block after another reads every line for itself, a page
or more from the one before: products of 2048 x 2048 x 2048 in f32 with a left matrix that lies so went from 238 to
248 GFLOP/s on a Zen 5."""


class Staging(Prefetches):
    """stage_memory: scratch memory of each staged operand. task_axes: those of which the task at hand has a piece, if
    it has pieces of nothing else. all_depth: where the depth is open to a block of it, how it is open to all.
    most_columns: of which there are blocks of panels, if that is known. read_in_rows: the operands of the loads that
    tile registers have read as rows where they lie."""

    stage_memory: dict[tuple[str, Op], Scalar]
    read_in_rows: set[tuple[Value, ...]]
    task_axes: tuple[str, ...] = ()
    all_depth: Open | None = None
    most_columns: int | None = None

    def _panel_depth(self, depth_axis: str) -> Scalar:
        """Steps of the depth that a panel has room for: transposed squares are stored whole."""
        return self.round_up(self.open[depth_axis].extent, self.lanes)

    def _stage(self, op: Op, walk: Walk, choice: WalkChoice) -> None:
        lane = choice.lane
        self.staged.pop(op, None)        # the copy itself reads the tensor
        axes = op.result.type.axes  # type: ignore[union-attr]
        (depth_axis,) = [a for a in axes if a in walk.reduced]
        rows = [a for a in axes if a not in walk.reduced and a in self.open]
        panels = self.panels_of(op)
        if panels is not None:
            assert lane is not None
            made = PanelInPlace if panels.elements == self.slot_elements else PanelOfElements
            self.staged[op] = made(self, op, panels, lane, depth_axis)
            if op in choice.widened:
                self.staged[op] = self._stage_panels(op, lane, depth_axis, walk, choice)
        elif lane is not None and lane in axes:
            self.staged[op] = self._stage_panels(op, lane, depth_axis, walk, choice)
        else:
            (row_axis,) = rows
            if op in choice.rows_here:
                self.staged[op] = self._stage_rows_here(op, row_axis, depth_axis, choice)
                return
            self._once_for_rows(op, row_axis, depth_axis, choice)

    def _once_for_rows(self, op: Op, row_axis: str, depth_axis: str, choice: WalkChoice) -> None:
        """Stage rows, but not where the worker's task before had the same ones: tasks of a product that share its
        columns have all rows, and a worker takes several. A word of its scratch memory says which rows lie there."""
        depth, access = self.open[depth_axis], self.access(op)

        def stage() -> None:
            place = self.place_of_rows(op, row_axis, depth_axis, choice)
            if choice.blocked and choice.depth_block:
                self.blocks_of_depth(choice, lambda _: self._fill(
                    op, self.place_of_rows(op, row_axis, depth_axis, choice)))
            else:
                self._fill(op, place)
            self.staged[op] = place

        same = all(isinstance(s, int) or self.depth_of(s) == 0 for s in (depth.offset, depth.extent))
        if set(self.task_axes) != {row_axis, choice.lane} or not same or access.gathers or self.bound:
            stage()
            return
        word = self.value(self.scratch([(1, 1)], i64))
        self.levels[0].builder.block.ops.append(Op("s_store", [self.value(-1), word], (), {"dtype": i64}))
        first = self.value(self.open[row_axis].offset)
        there = self.emit(self.depth, "s_load", [word], S64, dtype=i64)
        others = self.emit(self.depth, "s_cmp", [there, first], S64, cond="ne")

        def copy() -> None:
            stage()
            self.effect("s_store", [first, word], dtype=i64)

        self.fork(others, copy, lambda: None)

    def blocks_of_depth(self, choice: WalkChoice, body: Callable[[Scalar], None]) -> None:
        """Run `body` with the depth open to one block of it after another, and given what is left of it behind the
        block; once where there is no depth."""
        (axis,) = choice.reduced
        whole, size = self.open[axis], choice.depth_block
        end = self.add(whole.offset, whole.extent)

        def block(start: Value) -> None:
            left = self.sub(end, start)
            exact = isinstance(whole.extent, int) and whole.extent % size == 0
            extent = size if exact else self.scalar("s_min", left, size)
            self.all_depth = whole
            self.open[axis] = Open(start, extent, min(whole.hint, size), gcd(whole.divisor, size), Capacity(size))
            body(self.sub(left, size))
            self.all_depth = None
            self.open[axis] = whole

        self.counted(axis, whole.offset, self.scalar("s_max", end, self.add(whole.offset, 1)), size, block)

    def _before_block(self, depth_axis: str, step_bytes: Scalar) -> Scalar:
        """Bytes of what is staged of the depth before the block of it that is open, a step of all rows taking some."""
        if self.all_depth is None:
            return 0
        return self.mul(self.sub(self.open[depth_axis].offset, self.all_depth.offset), step_bytes)

    def panels_of(self, op: Op) -> Panels | None:
        """The panels in which a load's tensor was packed."""
        tensor = op.operands[0]
        found = self.stride_classes.get(tensor.name) if tensor.op is None else None
        return found if isinstance(found, Panels) else None

    def stages_columns(self, op: Op, row_axis: str, counts: Mapping[str, int]) -> bool:
        """Whether an operand that is staged along its rows is contiguous there, and a vector holds so many of them."""
        access = self.access(op)
        contiguous = access.axes.get(row_axis) == element_bytes(access.dtype) and not access.gathers
        return contiguous and counts[row_axis] <= self.lanes

    def _stage_panels(self, op: Op, lane: str, depth_axis: str, walk: Walk, choice: WalkChoice) -> StagedPanel:
        """Copy [depth][piece] for the piece that the lane axis is bound to, or one after another for all of a block."""
        dtype = self.operand_dtype(op)
        width = choice.counts[lane] * self.lanes
        base = self._panel_memory(op, lane, depth_axis, choice)
        column_bytes = self.mul(self._panel_depth(depth_axis), dtype.size_bytes) if choice.blocked else 0
        panel = StagedPanel(self, base, depth_axis, lane, dtype, column_bytes)
        panel.squared = self.squared == depth_axis
        turned = any(self.straight_operand(contraction) is op.result for contraction in walk.reductions)
        if turned:
            key = ("start", op)
            if key not in self.stage_memory:
                panels = BLOCK_PANELS if choice.blocked else 1
                self.stage_memory[key] = self.scratch([(panels * width, 1)], i32)
            panel.start_base = self.stage_memory[key]

        def starts(carried: Carried) -> Carried:
            if turned:
                self._stage_start(op, panel)
            return carried

        access = self.access(op)
        along_depth = access.axes.get(depth_axis) == element_bytes(access.dtype) and not access.gathers

        def over_pieces(copy: Callable[[Carried], Carried]) -> Carried:
            return self.axis_loop(lane, choice.counts[lane], True, [], copy) if choice.blocked else copy([])

        def transpose(carried: Carried) -> Carried:
            into = self._scatter_into if self.transposes_by_scatter else self._transpose_into
            into(op, panel, lane, depth_axis, self.operand_access(op))
            return starts(carried)

        def copy(carried: Carried) -> Carried:
            panel.copy(self._coordinates((depth_axis, lane)), lambda at: self.operand_row(op, at))
            if self.prefetches_rows and not choice.near and not access.gathers and op not in self.staged:
                self._prefetch_rows(op, panel)
            return carried

        if along_depth:
            over_pieces(transpose)
        elif isinstance(self.staged.get(op), PanelOfElements):
            over_pieces(lambda _: self.axis_loop(depth_axis, 4, False, [], copy))
        elif choice.blocked and not choice.near and width * element_bytes(access.dtype) < WIDE_ROW_BYTES:
            # All pieces of a step of the depth, which lie side by side, before the next step.
            self.axis_loop(depth_axis, 2 if panel.squared else 1, False, [], lambda _: over_pieces(copy))
            if turned:
                over_pieces(starts)
        else:
            over_pieces(lambda _: starts(self.axis_loop(depth_axis, 4, False, [], copy)))
        return panel

    def _all_panels_bytes(self, op: Op, depth_axis: str, width: int) -> int:
        """What copies of all panels of an operand take, where that is known, or else more than any block."""
        deep = self._in_elements(depth_axis).most
        if deep is None or self.most_columns is None:
            return self.block_bytes * DEEP_BLOCKS
        rows = -(-deep // (self.lanes * self.slot_elements)) * self.lanes * self.slot_elements
        dtype = op.result.type.dtype  # type: ignore[union-attr]
        size = element_bytes(row_dtype(dtype) if self.packing is None else dtype)
        return -(-self.most_columns // width) * width * rows * size

    def _stage_part(self, op: Op, choice: WalkChoice, part: Open) -> None:
        """Join the slots of one part of the depth, [depth][piece] for the piece that the lane axis is bound to."""
        lane = choice.lane
        (depth_axis,) = choice.reduced
        assert lane is not None
        self.staged.pop(op, None)        # the copy itself reads the tensor
        key = ("part", op)
        if key not in self.stage_memory:
            self.stage_memory[key] = self._scratch_of(
                op, [(choice.depth_block * self.slot_elements, 1), (choice.counts[lane] * self.lanes, 1)])
        panel = StagedPanel(self, self.stage_memory[key], depth_axis, lane, self.operand_dtype(op), 0)
        before = self.sub(part.offset, self.open[depth_axis].offset)
        panel.base = self.sub(panel.base, self.mul(before, panel.depth_bytes))

        def copy(carried: Carried) -> Carried:
            for at in self._coordinates((depth_axis, lane)):
                panel.store(at, self.operand_row(op, at))
            return carried

        self.axis_loop(depth_axis, 1, False, [], copy, part)
        self.staged[op] = panel

    def _panel_memory(self, op: Op, lane: str, depth_axis: str, choice: WalkChoice) -> Scalar:
        width, key = choice.counts[lane] * self.lanes, ("panel", op)
        if key not in self.stage_memory:
            depth = (self._capacity(depth_axis), self.lanes * self.slot_elements)
            self.stage_memory[key] = self._scratch_of(op, [depth, (width, 1)])
            if choice.blocked:       # a block has one panel, or fits: the room for both follows on that for one
                room_bytes = self.block_bytes * (DEEP_BLOCKS if choice.deep else 1)
                self.scratch([(min(room_bytes, self._all_panels_bytes(op, depth_axis, width)), 64)], u8)
        return self.stage_memory[key]

    def _stage_start(self, op: Op, panel: StagedPanel) -> None:
        """What sums of products with a panel's columns begin with: minus what they will be too large by."""
        bound = self.bound[panel.lane]
        first = op.result.type.dtype is u8  # type: ignore[union-attr]

        def column_sums(carried: Carried) -> Carried:
            sums = list(carried)
            for at in self._coordinates((panel.depth_axis, panel.lane)):
                row = panel.load(at, self.depth)
                sums[at[panel.lane]] = self.add_error(row, first, sums[at[panel.lane]])
            return sums

        zero = self.constant(0, i32)
        for piece, total in enumerate(self.axis_loop(panel.depth_axis, 4, False, [zero] * bound.count, column_sums)):
            panel.store_start(piece, self.emit(self.depth, "sub", [zero, total], ROW_I32))

    def _scratch_of(self, op: Op, extents: list[tuple[Capacity | int, int]]) -> Scalar:
        """Scratch memory for so many elements of an operand: as wide as in memory where they are packed in slots."""
        dtype = op.result.type.dtype  # type: ignore[union-attr]
        return self.scratch(extents, row_dtype(dtype) if self.packing is None else dtype)

    def _scatter_into(self, op: Op, panel: StagedPanel, lane: str, depth_axis: str, access: Access) -> None:
        """The source is contiguous along the depth: load rows along it, and scatter each down a column of the panel."""
        piece, walked = self.bound[lane], self.open[lane]
        extent: Scalar = piece.count * self.lanes
        if piece.mask is not None:
            extent = self.scalar("s_min", self.sub(self.add(walked.offset, walked.extent), piece.offset), extent)
        column = Access(panel.base, 0, {depth_axis: panel.depth_bytes, lane: panel.dtype.size_bytes},
                        memory_dtype(panel.dtype), relative=True)
        self.open[lane] = Open(piece.offset, extent, piece.count * self.lanes)

        def copy(carried: Carried) -> Carried:
            for at in self._coordinates((lane, depth_axis)):
                self.put(column, self.operand_row(op, at), panel.dtype, at, (lane, depth_axis), disjoint=True)
            return carried

        self.axis_loop(lane, 4, False, [], lambda carried: self.axis_loop(depth_axis, 1, True, carried, copy))
        self.open[lane] = walked

    def _transpose_into(self, op: Op, panel: StagedPanel, lane: str, depth_axis: str, access: Access) -> None:
        """The source is contiguous along the depth: load squares of rows, exchange lanes with rows, store. One square
        at a time, as it is long."""
        lanes = self.lanes
        piece, walked = self.bound[lane], self.open[lane]
        last = None if piece.mask is None else self.sub(self.add(walked.offset, walked.extent), 1)
        column = panel.column()
        dtype = panel.source if isinstance(panel, PanelOfParts) else panel.dtype

        def square(carried: Carried) -> Carried:
            outer, inner = self.bound[lane], self.bound[depth_axis]
            tail = [inner.mask] if inner.mask is not None else []
            rows = []
            for i in range(lanes):
                if last is None:
                    self.bound[lane] = Bound(outer.offset, lanes, False, None, outer.depth)
                else:     # rows past the edge repeat the last: their lanes are never used
                    offset = self.scalar("s_min", self.add(outer.offset, i), last)
                    self.bound[lane] = Bound(offset, 1, False, None, outer.depth)
                operands, attributes = self.address(access, {lane: i if last is None else 0})
                row = self.emit(self.depth, "load", [*operands, *tail], RowType(dtype), dtype=access.dtype,
                                masked=bool(tail), **attributes)
                # The byte in which an i4 lies may hold more than its bits.
                rows.append(self.wrap(row, i4, self.depth) if op.result.type.dtype is i4 else row)  # type: ignore[union-attr]
            self.bound[lane] = outer
            self.bound[depth_axis] = Bound(inner.offset, lanes, False, None, inner.depth)
            squares = self._squares_of_two(rows) if panel.squared else self.transposed(rows, self.depth)
            panel.store_square(squares, column)
            self.bound[depth_axis] = inner
            return carried

        def rows_of_squares(carried: Carried) -> Carried:
            return self.axis_loop(depth_axis, 1, True, carried, square)

        self.open[lane] = Open(piece.offset, piece.count * lanes, piece.count)
        if piece.count == 1:
            rows_of_squares([])
        else:
            end = self.add(piece.offset, piece.count * lanes)
            self._loop(lane, piece.offset, end, 1, True, False, [], rows_of_squares)
        self.open[lane] = walked

    def _squares_of_two(self, rows: list[Value]) -> list[Value]:
        """Four rows along the depth -> slots two by two: 0 and 1 of rows 0 and 1, of 2 and 3, then slots 2 and 3."""
        halves = [self.emit_rows(self.depth, "exchange", rows[n:n + 2], {"distance": 2}) for n in (0, 2)]
        return [row for slots in zip(*halves, strict=True) for row in slots]

    def place_of_rows(self, op: Op, row_axis: str, depth_axis: str, choice: WalkChoice) -> StagedRows:
        """Where all of row_axis and depth go: blocks of [count rows][lanes of depth], in the order in which the loops
        run."""
        if self.stages_columns(op, row_axis, choice.counts):
            return self._place_of_columns(op, row_axis, depth_axis, choice)
        dtype = self.operand_dtype(op)
        count = choice.counts[row_axis]
        key = ("rows", op)
        if key not in self.stage_memory:
            # There may be far fewer rows than have room: what lay behind these would be on huge pages of its own.
            lane = choice.lane
            for other in choice.staged if lane is not None and not choice.depth_block else ():
                axes = axes_of(other.result)
                if lane in axes and depth_axis in axes and (self.panels_of(other) is None or other in choice.widened):
                    self._panel_memory(other, lane, depth_axis, choice)
            self.stage_memory[key] = self._scratch_of(op, [
                (self._capacity(row_axis), count), (self._capacity(depth_axis), self.lanes * self.slot_elements)])
        depth_extent = self.round_up(self.open[depth_axis].extent, self.lanes)
        before = self._before_block(depth_axis, self.mul(
            self.round_up(self.open[row_axis].extent, count), dtype.size_bytes))
        base = self.add(self.stage_memory[key], before)
        staged = StagedRows(self, base, row_axis, depth_axis, count, depth_extent, dtype)
        staged.squared = self.squared == depth_axis and count % 2 == 0
        return staged

    def _fill(self, op: Op, staged: StagedRows) -> None:
        row_axis, depth_axis = staged.row_axis, staged.depth_axis
        if isinstance(staged, StagedColumns):
            self._fill_columns(op, staged)
            return

        def rows(carried: Carried) -> Carried:
            def copy(inner: Carried) -> Carried:
                staged.copy(self._coordinates((row_axis, depth_axis)), lambda at: self.operand_row(op, at))
                return inner
            return self.axis_loop(depth_axis, 1, True, carried, copy)

        def two_rows(carried: Carried) -> Carried:
            """The last one alone is met by itself."""
            here = self.bound[row_axis]
            left = self.sub(self.sub(stop, 1), here.offset)
            self.bound[row_axis] = replace(here, apart=self.scalar("s_min", left, 1))
            rows(carried)
            self.bound[row_axis] = here
            return carried

        if staged.squared:
            o = self.open[row_axis]
            stop = self.add(o.offset, o.extent)
            self._loop(row_axis, o.offset, stop, 2, False, False, [], rows if o.divisor % 2 == 0 else two_rows)
            return
        self.axis_loop(row_axis, staged.count, False, [], rows)

    def _stage_rows_here(self, op: Op, row_axis: str, depth_axis: str, choice: WalkChoice) -> StagedRows:
        """As all rows, of those that are bound alone: where nobody knows how many there may be."""
        dtype, count = self.operand_dtype(op), choice.counts[row_axis]
        key = ("rows", op)
        if key not in self.stage_memory:
            self.stage_memory[key] = self._scratch_of(op, [
                (count, 1), (self._capacity(depth_axis), self.lanes * self.slot_elements)])
        staged = StagedRowsHere(self, self.stage_memory[key], row_axis, depth_axis, count, 0, dtype)
        staged.squared = self.squared == depth_axis and count % 2 == 0

        def copy(carried: Carried) -> Carried:
            staged.copy(self._coordinates((row_axis, depth_axis)), lambda at: self.operand_row(op, at))
            return carried

        self.axis_loop(depth_axis, 1, True, [], copy)
        return staged

    def _place_of_columns(self, op: Op, row_axis: str, depth_axis: str, choice: WalkChoice) -> StagedColumns:
        """Of a matrix that is contiguous along the rows' axis: one vector for each step of the depth."""
        dtype = self.operand_dtype(op)
        count = choice.counts[row_axis]
        key = ("columns", op)
        if key not in self.stage_memory:
            blocks = self._capacity(row_axis)
            c = blocks if isinstance(blocks, Capacity) else Capacity(blocks)
            # A block of `count` rows takes one vector: lanes / count times the rows, rounded up to whole blocks.
            widened = Capacity(c.constant * -(-self.lanes // count), c.dims)
            self.stage_memory[key] = self._scratch_of(
                op, [(widened, self.lanes), (self._capacity(depth_axis), self.slot_elements)])
        before = self._before_block(depth_axis, self.mul(
            self.ceil_div(self.open[row_axis].extent, count), self.lanes * dtype.size_bytes))
        base = self.add(self.stage_memory[key], before)
        return StagedColumns(self, base, row_axis, depth_axis, count, self.open[depth_axis].extent, dtype)

    def _fill_columns(self, op: Op, staged: StagedColumns) -> None:
        row_axis, depth_axis, count = staged.row_axis, staged.depth_axis, staged.count
        rows = self.open[row_axis]

        def block(carried: Carried) -> Carried:
            here = self.bound[row_axis]
            left = self.sub(self.add(rows.offset, rows.extent), here.offset)
            mask = self.emit(self.depth, "mask_first", [self.value(self.scalar("s_min", left, count))], MASK)
            self.bound[row_axis] = Bound(here.offset, 1, True, mask, here.depth)
            for at in self._coordinates((row_axis, depth_axis)):
                staged.store(at, self.operand_row(op, at))
            self.bound[row_axis] = here
            return carried

        def steps(carried: Carried) -> Carried:
            # Every block, the last one too, has a vector of its own; the mask cuts what it lacks.
            stop = self.add(rows.offset, rows.extent)
            return self._loop(row_axis, rows.offset, stop, count, False, False, carried, block)

        self.axis_loop(depth_axis, max(1, COPIED_STEPS // self.slot_elements), False, [], steps)

    def _in_elements(self, axis: str) -> Open:
        """How an axis is open, if it is the one along which slots lie in elements."""
        return self.open[axis] if self.packing is None or axis != self.packing.depth else self.packing.elements

    def _capacity(self, axis: str) -> Capacity | int:
        """Most elements along an axis."""
        o = self._in_elements(axis)
        if isinstance(o.extent, int):
            return o.extent
        if o.capacity is None:
            raise LoweringError(f"axis {axis} has no bound that scratch memory could be sized by")
        return o.capacity
