"""Parallel loops at the top of a kernel, shared out to workers as tasks.

Enters: the ranges of a loop nest. Leaves: `tasks`, each of which takes a piece of every range; for the attribute
`tasks`, how many there are at most. Holds: a piece is a multiple of the range's granule, but for the last one's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd, lcm, prod

from ..ir.nodes import Block, Op, Value
from ..ir.types import S64, TileType
from ..tile.affine import affine
from ..tile.plan import axes_of
from ..tile.schedule import TASKS_PER_WORKER
from ..tile.sums import is_join
from .extents import Range
from .nests import NestLowering
from .ops import TASK_COUNTERS
from .prefetches import FEW_ROWS
from .state import Capacity, Scalar, element_bytes

BAND_TILES = 8
"""Rows of tiles that are computed together."""

TASK_ELEMENTS = 16384
"""A task along the one axis of a loop computes at least about so many elements, in steps of a row and of no more than
TASK_INDICES indices: a few microseconds' work."""
TASK_INDICES = 1024

JOINED_BYTES = 512
"""What a task at least has of a row that is added to at places. Workers take the places in the same order, at the same
pace, and where the parts of a row meet in a line of the cache, this goes to and fro between them: rows of NumPy begin
16 bytes past a line. Measured on two cores of a Granite Rapids, 65536 rows added at 64 places, one thread, two that
share rows in pieces of 16 f32 at least, us: of 32 f32 228 and 1472, of 64 330 and 1672, of 128 771 and 3298; at 4096
places 313 and 634, 620 and 959, 2166 and 1974, and of 256 5713 and 3363."""

FEW_INDICES = 4
"""Indices of an `each` for each task up to which one more or less of them is noticed."""

ROWS_OF_TASK = 4
"""Rows that a task's are a multiple of, but for the last one's."""

ROWS_OF_FEW, VECTORS_OF_FEW = 8, 8
"""What a task takes where workers are many: rows, and rows of lanes along what is contiguous: two runs for each lane,
of four f32 or eight elements of 16 bits; not measured."""

ROWS_FOR_COLUMN = 4
"""Up to how many times as many rows as columns a product's columns are shared out first."""
ALIKE = 8
"""From how many granules on for each chunk those that have one more are nearly as long as the others."""

PIECES_PER_WORKER = 2
"""Of indices that are taken together (tile/indices_together.py). The longer they are, the less is brought near anew."""

STAGED_ROWS_CAP = 2016
"""Most rows of a staged operand in one task (a multiple of 14 and 6), which bounds scratch memory."""


@dataclass(slots=True)
class Split:
    """A range that tasks share. granule: what none of them parts. chunks: how many parts, of `each` granules; the first
    `more` of them have one more, so that those taken last are not the longer ones."""

    range: Range
    granule: int
    chunks: Scalar
    each: Scalar
    more: Scalar


class TaskLowering(NestLowering):
    """Emits tasks. counters: loops so far that share out tasks; task_counts: how many tasks each has at most.
    staged_rows: most rows of a staged operand in one."""

    staged_rows = STAGED_ROWS_CAP
    counters: int
    task_counts: list[list[list[object]] | None]

    def _tasks(self, ranges: list[Range], block: Block, body: Callable[[list[Value]], list[Value]]) -> None:
        """Split the ranges into tasks: about TASKS_PER_WORKER for each worker, fewer where there is less to do.

        block: what is done for each of their indices; body emits it.
        """
        columns = self._columns_of_tasks(ranges) if self._copies_rows(ranges) else None
        plans, total = self._split(ranges, block, columns)
        counter = self.counters % TASK_COUNTERS
        self.counters += 1
        self.task_counts.append(self._most_tasks(ranges, [part.granule for part in plans]))
        if self.shares is not None:
            counts = {part.range.axis: part.chunks for part in plans if not isinstance(part.chunks, int)}
            together = self.scalar("s_floordiv", total, self.cluster)
            self.each_segment(together, counts, lambda number, known: self._task(number, [
                replace(part, chunks=known.get(part.range.axis, part.chunks)) for part in plans], body))
            return
        task = Block([S64])
        total_value = self.value(self.ceil_div(total, self.warps) if self.warps_have_tasks else total)
        self.enter(task)
        axes = tuple(r.axis for r in ranges if r.axis is not None)
        self.task_axes = axes if columns is not None and len(axes) == len(ranges) else ()
        if self.warps_have_tasks:       # so many together are a task of their worker
            mine = self.value(self.add(self.mul(task.arguments[0], self.warps), self.warp()))
            known = self.emit(self.depth, "s_cmp", [mine, self.value(total)], S64, cond="lt")
            self.fork(known, lambda: self._task(mine, plans, body), lambda: None)
        else:
            self._task(task.arguments[0], plans, body)
        self.task_axes = ()
        self.effect("yield", [])
        self.leave()
        self.finish(Op("tasks", [total_value], (), {"counter": counter}, [task], self.location))

    def _copies_rows(self, ranges: list[Range]) -> bool:
        """Whether tasks stage rows of a contraction."""
        return any(self._task_cap(r) for r in ranges)

    def _split(self, ranges: list[Range], block: Block, columns: int | None) -> tuple[list[Split], Scalar]:
        """How tasks share each range, and how many tasks there are. columns: the range of the columns of a product of
        which tasks stage operands."""
        workers = self.emit(0, "workers", [], S64)
        alone = self.emit(0, "s_cmp", [workers, self.value(1)], S64, cond="eq")
        target: Scalar = self.emit(
            0, "s_select", [alone, self.value(1), self.value(self.mul(workers, TASKS_PER_WORKER))], S64)
        total: Scalar = 1
        left: Scalar = target
        granules = self._task_granules(ranges, block)
        order = self._splitting_order(ranges, columns)
        split: dict[int, Split] = {}
        for i in order:
            r, granule = ranges[i], granules[i]
            extent = self.sub(r.stop, r.start)
            whole = self._whole_pieces(r, granule, extent)
            if whole is not None:
                split[i] = Split(r, granule, whole, 1, 0)
                total = self.mul(total, whole)
                continue
            count = self.scalar("s_max", self.ceil_div(extent, granule), 0)
            chunks: Scalar = self.schedule.chunks.get(r.axis, 0) if r.axis is not None else 0
            if r.end is not None:
                chunks = self.mul(workers, PIECES_PER_WORKER)
            elif not chunks:
                chunks = left if i != columns else self._even_chunks(count, left, self._granules_beside(
                    [(o, g) for j, (o, g) in enumerate(zip(ranges, granules, strict=True)) if j not in (i, *split)]))
            cap = self._task_cap(r)
            if cap:
                chunks = self.scalar("s_max", chunks, self.ceil_div(extent, cap))
            chunks = self.scalar("s_min", chunks, self.scalar("s_max", count, 1))
            each_chunk = self.scalar("s_floordiv", count, chunks)
            split[i] = Split(r, granule, chunks, each_chunk, self.sub(count, self.mul(chunks, each_chunk)))
            total = self.mul(total, chunks)
            left = self._ceil_div(left, self.scalar("s_max", chunks, 1))
            if r.axis is None and not self._copies_rows(ranges) and i != order[-1]:
                left = self._left_of_few(count, workers, target, left)
        return [split[i] for i in range(len(ranges))], total

    def _splitting_order(self, ranges: list[Range], columns: int | None) -> list[int]:
        """Which range is split first."""
        order = list(range(len(ranges)))
        if self._copies_rows(ranges) or any(self.panel_width(r.axis) > 1 for r in ranges):
            # What all tasks along an axis stage or read is the operand without it: the axis of the larger one is split.
            order.sort(key=lambda i: -ranges[i].hint if ranges[i].axis is not None else -1 << 40)
        if columns is not None:
            order.sort(key=lambda i: ranges[i].axis is not None and i != columns)
        return order

    def _whole_pieces(self, r: Range, granule: int, extent: Scalar) -> Scalar | None:
        """How many tasks share a range of which each has one granule; None where they have several."""
        if r.axis is not None and r.axis == self.cluster_axis:
            return self.round_up(self.ceil_div(extent, granule), self.cluster)
        if isinstance(extent, int) and extent <= granule:
            return 1
        if self.tiles_are_tasks or (self.facts.many_workers and not self.schedule.chunks):
            return self.ceil_div(extent, granule)
        return None

    def _left_of_few(self, count: Scalar, workers: Value, target: Scalar, left: Scalar) -> Scalar:
        """Of five experts one worker of two would have three: each is shared by all workers then."""
        over = self.scalar("s_mod", count, workers)
        many = self.value(self.mul(target, FEW_INDICES))
        few = self.emit(0, "s_cmp", [self.value(count), many], S64, cond="lt")
        uneven = self.emit(0, "s_cmp", [self.value(over), self.value(0)], S64, cond="ne")
        uneven = self.emit(0, "s_and", [few, uneven], S64)
        return self.scalar("s_max", left, self.emit(0, "s_select", [uneven, workers, self.value(1)], S64))

    def _task(self, number: Scalar, plans: list[Split], body: Callable[[list[Value]], list[Value]]) -> None:
        """Piece `number` of the ranges as they are split."""
        pieces: dict[int, Range] = {}
        places = {id(part.range): place for place, part in enumerate(plans)}
        growing = self._growing(plans)
        if growing is not None:
            number = self._in_rounds(number, plans) if self.facts.many_workers else number
            plans = [growing, *(part for part in plans if part is not growing)]
        if self.cluster_axis is not None:
            if self.turn is None:       # of a segment it is that of the cluster's tiles
                number = self.scalar("s_floordiv", number, self.cluster)
            plans = [replace(part, chunks=self.scalar("s_floordiv", part.chunks, self.cluster))
                     if part.range.axis == self.cluster_axis else part for part in plans]
        banded = self._banded(number, plans) if self.tiles_are_tasks and self.chain is None else {}
        for position, part in enumerate(reversed(plans)):
            r, granule, chunks = part.range, part.granule, part.chunks
            together = r.axis is not None and r.axis == self.cluster_axis
            if chunks == 1 and not together:
                pieces[places[id(r)]] = r
                continue
            last = position == len([p for p in plans if p.chunks != 1]) - 1 and all(
                p.chunks == 1 for p in list(reversed(plans))[position + 1:])
            mine = number if last else self.scalar("s_mod", number, chunks)
            number = number if last else self.scalar("s_floordiv", number, chunks)
            mine = self.sub(self.sub(chunks, 1), mine) if part is growing else banded.get(r.axis, mine)
            if together:
                mine = self.add(self.mul(mine, self.cluster), self.rank())
            once = self.few_registers and (part.each, part.more) == (1, 0)
            start = self.add(r.start, self.mul(mine, granule) if once else self._chunk_start(part, mine))
            alike = (part.each, part.more) == (1, 0)
            exact = alike and r.divisor % granule == 0 and not together
            stop = self.add(start, granule) if alike else \
                self.add(r.start, self._chunk_start(part, self.add(mine, 1)))
            if not exact:
                stop = self.scalar("s_min", stop, r.stop)
            # Every task but the last has a whole number of granules; the last ends where the range does.
            divisor = gcd(granule, r.divisor)
            cap = self._task_cap(r)
            single = self.facts.many_workers and alike and not self.has_warps_together
            short = single and (r.axis is None or not self._is_of_product(r.axis))
            capacity = Capacity(cap) if cap else Capacity(granule) if single else r.capacity
            pieces[places[id(r)]] = replace(
                r, start=start, stop=stop, divisor=divisor, capacity=capacity, once=once, forward=True, fixed=None,
                hint=min(r.hint, granule) if short else r.hint)
        self._loops([pieces[place] for place in range(len(pieces))], 0, body)

    def _chunk_start(self, part: Split, number: Scalar) -> Scalar:
        """Where a chunk begins, from the start of its range."""
        before = self.mul(number, part.each)
        if part.more != 0:
            before = self.add(before, self.scalar("s_min", number, part.more))
        return self.mul(before, part.granule)

    def _growing(self, plans: list[Split]) -> Split | None:
        """The range along which tasks grow, as a causal mask lets later rows see more: those with a chain, where there
        are many workers. Such tasks go from the longest to the shortest."""
        loop = self._loop_of_task(plans)
        if loop is None or self.schedule.chunks:
            return None
        start, stop = loop.operands[:2]
        return next((part for part in plans if part.range.counter is not None and part.chunks != 1
                     and _grows(stop, part.range.counter) and not _depends(start, part.range.counter)), None)

    def _loop_of_task(self, plans: list[Split]) -> Op | None:
        """The loop in order that takes a task its time."""
        if self.facts.many_workers:
            return self.chain.loop if self.chain is not None else None
        body = plans[-1].range.body
        ordered = () if body is None else (op for outer in body.ops for op in outer.walk())
        return next((op for op in ordered if op.name == "tiles" and not op.attributes["parallel"]), None)

    def _in_rounds(self, number: Scalar, plans: list[Split]) -> Scalar:
        """Which task a worker takes as `number`: each second round of tasks is dealt out backwards, but for one that is
        not whole, so that who has the longest of one round has the shortest of the next."""
        workers = self.emit_once("workers")
        total: Scalar = 1
        for part in plans:
            total = self.mul(total, part.chunks)
        round_ = self.scalar("s_floordiv", number, workers)
        first = self.mul(round_, workers)
        place = self.sub(number, first)
        odd = self.emit(self.depth, "s_cmp", [self.value(self.scalar("s_mod", round_, 2)), self.value(1)], S64,
                        cond="eq")
        whole = self.emit(self.depth, "s_cmp", [self.value(self.add(first, workers)), self.value(total)], S64,
                          cond="le")
        back = self.emit(self.depth, "s_and", [odd, whole], S64)
        turned = self.value(self.sub(self.sub(workers, 1), place))
        return self.add(first, self.emit(self.depth, "s_select", [back, turned, self.value(place)], S64))

    def _banded(self, number: Scalar, plans: list[Split]) -> dict[str | None, Scalar]:
        """Which tile of rows and columns task `number` is: workers that run at once then share both operands in the
        last-level cache. The tiles of BAND_TILES rows are taken column by column, then those of the next rows."""
        across, along = self.axes_of_tiles
        counts = {part.range.axis: part.chunks for part in plans}
        rows, columns = (counts.get(axis, 1) for axis in (across, along))
        if rows == 1 or columns == 1:       # or the extent is known only inside of a task
            return {}
        inside = number if len([c for c in counts.values() if c != 1]) == 2 else \
            self.scalar("s_mod", number, self.mul(rows, columns))
        of_band = self.mul(columns, BAND_TILES)
        band = self.scalar("s_floordiv", inside, of_band)
        first = self.mul(band, BAND_TILES)
        high = self.scalar("s_max", self.scalar("s_min", self.sub(rows, first), BAND_TILES), 1)
        rest = self.scalar("s_mod", inside, of_band)
        return {across: self.add(first, self.scalar("s_mod", rest, high)), along: self.scalar("s_floordiv", rest, high)}

    def _most_tasks(self, ranges: list[Range], granules: list[int]) -> list[list[object]] | None:
        """How many tasks a loop may have at most: a product of factors [constant, [dims], size], each the quotient of
        constant * product of dims and size, rounded up; None where an extent is known only as the kernel runs."""
        factors: list[list[object]] = []
        for r, granule in zip(ranges, granules, strict=True):
            chunks = self.schedule.chunks.get(r.axis, 0) if r.axis is not None else 0
            if r.axis is not None:
                self.followed.settable.add(("chunks", r.axis))
            if chunks:
                factors.append([chunks, [], 1])
            elif r.capacity is None or r.capacity.is_sum:
                return None
            else:
                together = self.cluster if r.axis is not None and r.axis == self.cluster_axis else 1
                factors.append([r.capacity.constant, list(r.capacity.dims), granule * together])
                factors += [[together, [], 1]] if together > 1 else []
        return factors + self.most_shares()

    def _columns_of_tasks(self, ranges: list[Range]) -> int | None:
        """The range of columns, where a matrix product's tasks are to share those first: each task then copies panels
        of its own columns alone, where tasks that share rows copy all of them, each for itself. Not where there are
        far fewer columns than rows, as each task reads all of these, nor where they are copied from a matrix that is
        contiguous along them, which takes longer than panels do. Measured on two cores of a Zen 5, products of 1024 x
        1024 x 1024, by columns and by rows: f32 4.30 and 4.43 ms, of a left matrix along its rows 4.67 and 4.59; i8
        1.09 and 1.13; f32 of 512 x 512 x 512 0.536 and 0.563."""
        inner = [i for i, r in enumerate(ranges) if r.axis is not None and not r.resident]
        if len(inner) < 2 or any(ranges[i].hint > ROWS_FOR_COLUMN * ranges[inner[-1]].hint for i in inner):
            return None
        rows = {ranges[i].axis for i in inner[:-1]}
        for op in self.function.walk():
            if op.name == "contract" and any(self._is_contiguous_along(v, rows) for v in op.operands):
                return None
        return inner[-1]

    def _is_contiguous_along(self, value: Value, axes: set[str | None]) -> bool:
        """Whether a value is an operand that was loaded from memory in which neighbours along one of the axes are
        neighbours."""
        while value.op is not None and value.op.name == "cast":
            value = value.op.operands[0]
        op = value.op
        if op is None or op.name != "load":
            return False
        strides = self.stride_classes.get(op.operands[0].name, "contiguous")
        unit = strides.index(True) if isinstance(strides, tuple) and True in strides else -1
        form = affine(op.operands[1:][unit])
        return form is not None and bool(axes & form.axes.keys())

    def _even_chunks(self, count: Scalar, wanted: Scalar, beside: Scalar) -> Scalar:
        """As many chunks as are wanted of `count` granules, if they are alike, or nearly, or if there are not so many
        granules `beside`, of what else may be shared; else one."""
        rest = self.value(self.scalar("s_mod", count, wanted))
        alike = self.emit(self.depth, "s_cmp", [rest, self.value(0)], S64, cond="eq")
        many = self.emit(self.depth, "s_cmp", [self.value(count), self.value(self.mul(wanted, ALIKE))], S64, cond="ge")
        few = self.emit(self.depth, "s_cmp", [self.value(beside), self.value(wanted)], S64, cond="lt")
        shared = self.emit(self.depth, "s_or", [self.emit(self.depth, "s_or", [alike, many], S64), few], S64)
        return self.emit(self.depth, "s_select", [shared, self.value(wanted), self.value(1)], S64)

    def _granules_beside(self, ranges: list[tuple[Range, int]]) -> Scalar:
        """How many granules there are of these ranges together."""
        total: Scalar = 1
        for r, granule in ranges:
            total = self.mul(total, self.ceil_div(self.sub(r.stop, r.start), granule))
        return total

    def _ceil_div(self, a: Scalar, b: Scalar) -> Scalar:
        return self.scalar("s_floordiv", self.sub(self.add(a, b), 1), b)

    # How large a task is.

    def _granule(self, r: Range) -> int:
        """What the size of a task along a range is a multiple of."""
        if r.axis is None:
            return r.step
        if r.resident:
            return r.resident
        return 1

    def _task_granules(self, ranges: list[Range], block: Block) -> list[int]:
        if self.chain is not None:
            return [self.chain_rows() if r.axis == self.chain.rows else self._granule(r) for r in ranges]
        if self.has_warps_together:
            sizes = dict(zip(self.axes_of_tiles, self.size_of_tiles, strict=True))
            return [sizes.get(r.axis or "", self._granule(r)) for r in ranges]
        if self.facts.many_workers and not self.schedule.chunks:
            return [self._few(r, ranges, block) for r in ranges]
        granules = []
        inner = [r for r in ranges if r.axis is not None and not r.resident]
        for r in ranges:
            granule = self._granule(r)
            if r.axis is not None and not r.resident:
                if r is inner[-1]:
                    granule = 64 * self.lanes // 16 if self.lanes >= 16 else 64
                    if len(ranges) == 1:
                        elements = self._elements(block, r.axis)
                        granule = max(1, min(TASK_ELEMENTS // elements, TASK_INDICES) // self.lanes) * self.lanes
                else:
                    granule = self.tile_rows(r.axis) or ROWS_OF_TASK
                    if r.hint <= r.divisor <= FEW_ROWS and any(self.panel_width(o.axis) > 1 for o in inner):
                        granule = lcm(granule, r.divisor)       # all rows that there are meet what was packed
                added = self._bytes_added_to(block, r.axis)
                granule = lcm(granule, JOINED_BYTES // added) if added else granule
            granules.append(lcm(granule, self.panel_width(r.axis)))
        return granules

    def _bytes_added_to(self, block: Block, axis: str) -> int:
        """The size of elements, neighbours in memory along an axis, that a loop adds to at places; 0 if there are
        none."""
        for op in (op for outer in block.ops for op in outer.walk() if is_join(op)):
            form, strides = affine(op.operands[-1]), self.stride_classes.get(op.operands[0].name, "contiguous")
            unit = strides == "contiguous" or (isinstance(strides, tuple) and strides[-1])
            if unit and form is not None and form.axes.get(axis) == 1:
                return element_bytes(op.operands[0].type.dtype)  # type: ignore[union-attr]
        return 0

    def _few(self, r: Range, ranges: list[Range], block: Block) -> int:
        """What a task of one warp among thousands takes of a range: whole rows of lanes where tensors are contiguous
        along it, and few rows else."""
        if r.axis is None or r.resident:
            return self._granule(r)
        along = [op for outer in block.ops for op in outer.walk() if self._runs_along(op, r.axis)]
        if not along:
            # Rows of a product share what they meet; others, if long, go to a warp each.
            long = 1 if self._is_of_product(r.axis) else self._elements(block, r.axis)
            granule = max(1, min(ROWS_OF_FEW, TASK_ELEMENTS // long))
        elif r is not [other for other in ranges if other.axis is not None and not other.resident][-1]:
            granule = self.lanes
        else:
            lanes = TASK_ELEMENTS // self._elements(block, r.axis) // self.lanes
            run = self.facts.run_bytes // max(element_bytes(op.result.type.dtype) for op in along)  # type: ignore[union-attr]
            granule = max(1, run, min(max(VECTORS_OF_FEW, 2 * run), lanes)) * self.lanes
        return lcm(granule, self.panel_width(r.axis))

    def _is_of_product(self, axis: str) -> bool:
        """Whether something is contracted to a tile of this axis and another one of the same loop."""
        loops = [op for op in self.function.walk() if op.name == "tiles" and axis in op.attributes["axes"]]
        others = {other for op in loops for other in op.attributes["axes"]} - {axis}
        return any(op.name == "contract" and axis in axes_of(op.result) and not others.isdisjoint(axes_of(op.result))
                   for op in self.function.walk())

    def _runs_along(self, op: Op, axis: str) -> bool:
        """Whether a load may read neighbours in memory for neighbours along an axis."""
        if op.name != "load" or len(op.operands) < 2:
            return False
        last = affine(op.operands[-1])
        return last is None or axis in last.axes

    def _elements(self, block: Block, axis: str) -> int:
        """Typical number of elements that the longest op of a block computes, or sums, for one index of an axis."""
        hints: dict[str, int] = {}
        most = 1
        for op in (inner for outer in block.ops for inner in outer.walk()):
            if op.name in ("tiles", "whole"):
                axes = op.attributes["axes"] if op.name == "tiles" else [op.attributes["axis"]]
                for i, name in enumerate(axes):
                    hints[name] = self._extent_hint(op.operands[2 * i], op.operands[2 * i + 1])
            for result in op.results:
                if isinstance(result.type, TileType) and axis in result.type.axes:
                    spanned = {*result.type.axes, *op.attributes.get("over", ())} - {axis}
                    most = max(most, prod(hints.get(name, 1) for name in spanned))
        return most

    def _task_cap(self, r: Range) -> int:
        """Rows of a contraction that one task stages at most."""
        if r.axis is None or r.resident or self.has_warps_together:
            return 0
        if self.requests.rows_end_to_end and self._meets_few(r.axis):
            return 0
        contracts = [op for op in self.function.walk() if op.name == "contract"]
        if any(r.axis in op.result.type.axes for op in contracts) and r.hint >= 28:  # type: ignore[union-attr]
            return self.staged_rows
        return 0

    def _meets_few(self, axis: str) -> bool:
        """Whether the columns along an axis meet few rows, of which alone copies are made, or one that has no axis."""
        op = next(op for op in self.function.walk() if op.name == "tiles" and axis in op.attributes["axes"])
        others = [n for n, other in enumerate(op.attributes["axes"]) if other != axis]
        return all(self._extent_hint(*op.operands[2 * n:2 * n + 2]) <= FEW_ROWS for n in others)


def _depends(value: Value, other: Value) -> bool:
    return value is other or (value.op is not None and any(_depends(v, other) for v in value.op.operands))


def _grows(value: Value, other: Value) -> bool:
    """Whether a scalar grows with another one that it is made of, as far as that is plain."""
    if value is other:
        return True
    if value.op is None or not _depends(value, other):
        return False
    first, *rest = value.op.operands
    if value.op.name in ("add", "min", "max"):
        return all(_grows(v, other) for v in value.op.operands if _depends(v, other))
    if value.op.name == "cast":
        return _grows(first, other)
    if value.op.name in ("mul", "floordiv"):
        return _grows(first, other) and _is_positive(rest[0])
    return value.op.name == "sub" and _grows(first, other) and not _depends(rest[0], other)


def _is_positive(value: Value) -> bool:
    """As far as that is plain."""
    op = value.op
    if op is None:
        return False
    if op.name in ("min", "max"):
        return (any if op.name == "max" else all)(_is_positive(v) for v in op.operands)
    return op.name == "const" and op.attributes["value"] > 0
