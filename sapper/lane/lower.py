"""Tile IR -> lane IR: control, tasks, carried values, scratch memory.

Enters a tile IR function (canonical: reductions are whole), a schedule, the target's facts and the specialisation;
leaves a lane IR function with the attributes `lanes`, `slots`, `scratch` (see `Lowering.scratch`), `counters`
and `tasks` (a list for each parallel loop, see `Lowering._most_tasks`; empty when unknown).
Parallel loops at the top become `tasks`; the parts of a function (sapper/tile/parts.py) wait for each other at a
`barrier`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd, lcm, prod
from typing import TYPE_CHECKING

from ..ir.nodes import Block, Function, Op, Value
from ..ir.types import MASK, S64, DType, RowType, TensorType, TileType, bool_
from ..lang.by_hand import CONTRACTIONS, PIECES, PRODUCTS, block_names, pieces_named
from ..tile.affine import affine
from ..tile.parts import split_parts
from ..tile.plan import (
    LATE,
    ORDERED,
    Late,
    Plan,
    Walk,
    axes_of,
    early_scalars,
    is_scalar_integer,
    late_walk,
    plan_block,
)
from ..tile.schedule import TASKS_PER_WORKER, DimClass, Facts, LoweringError, Schedule, ScheduleError, Specialization
from .axis_loops import WalkChoice
from .chained_groups import ChainGroupLowering
from .late import LateLowering, LateWalk
from .ops import TASK_COUNTERS
from .ordered import OrderedLowering
from .prefetches import NEAR_AHEAD_BYTES
from .row_waits import WORTH, waits_of
from .state import Access, Bound, Capacity, Open, Scalar, element_bytes, row_dtype
from .tile_blocks import CHUNK_TILES, FEWEST_ROWS, is_worth, serves

if TYPE_CHECKING:
    from .layout import Layout

SEQUENTIAL_TILE = 64
"""Default size of a sequential tile: its intermediate tiles then stay in L1."""

RESIDENT_VECTORS = 2
"""Vectors of a lane axis that carried values span: an element spread over the lanes serves so many multiply-adds."""

RESIDENT_ROWS = FEWER_ROWS = 4
"""Rows that carried values span where the lane axis is another; and in the tail of more."""

MOST_ROWS, OPERAND_REGISTERS = 12, 6
"""Rows at once of sums that a loop scales and carries, and how many registers are left for what they are made of."""
PIECES_OF_MANY_ROWS = 2
"""Vectors of the operand that spans the lanes, for many rows: a load that spreads an element takes a cycle, as does the
dot product that it is for. Few rows wait for memory, which is quicker as one stream than as two."""

BAND_TILES = 8
"""Rows of tiles that are computed together."""

TASK_ELEMENTS = 16384
"""A task along the one axis of a loop computes at least about so many elements, in steps of a row and of no more than
TASK_INDICES indices: a few microseconds' work."""
TASK_INDICES = 1024

ROWS_OF_TASK = 4
"""Rows that a task's are a multiple of, but for the last one's."""

ROWS_OF_FEW, VECTORS_OF_FEW = 8, 8
"""What a task takes where workers are many: rows, and rows of lanes along what is contiguous: a run of eight elements
of 16 bits, or two of four f32, for each lane; not measured."""

SHORT_LIST, FEW_ELEMENTS = 8, 256
"""How many largest elements of how many are found for a row in each lane; measured: three times as fast as rows one by
one for 6 of 64."""

LONG_REDUCTION = 16384
"""Typical extent from which on a reduction at the top of a kernel is shared among workers."""

LINE_BYTES, PAGE_BYTES = 64, 4096

BETWEEN_BYTES = 17 * LINE_BYTES
"""Between buffers of whole pages. A load waits for earlier stores that the last 12 bits of its address might be one of
(Intel 248966, memory disambiguation), and walks take several buffers at one pace: products of blocks of 4 bits for a
gated layer took 2.7 times as long on a Granite Rapids where nothing was between."""

FAR_AHEAD_BYTES = 32768
"""How far ahead weights are asked for by loops that use them for several rows: there arithmetic takes longer than
memory, and what is asked into the second cache does not stand in its way. Measured on a Zen 4, Q4_1 of 14336 x 4096: 4
rows at 80 % of memory's speed, against 60 % where it is asked into L1; a single row at 69 %, against 85 %."""

OFTEN = 8
"""Weights that so many pieces of rows read one after the other are in the caches for all of them but the first."""

DIRECT_AHEAD_BYTES = 3072
"""And by loops of a single row that multiply weights as they are read, which arithmetic keeps up with: near enough that
the processor sees some accesses miss, and asks for more by itself. Measured on a Zen 4, 8 bits of 14336 x 4096: 29 to
32 GB/s, against 26 to 28 where they are asked into L1."""

PIECES_AHEAD_BYTES = 8192
"""And by loops of a single row over pieces of a stream that another loop goes on with elsewhere, as those of a super
block of Q4_K and Q6_K: the processor's own prefetching starts anew with each, and the first cache waits for too few
lines at a time to make up for it. Measured on a Zen 4, 14336 x 4096: 21.6 and 26.5 GB/s, against 19.7 and 17.6 where
they are asked for as other weights are, which lose by this (25 to 20 GB/s)."""

STAGED_ROWS_CAP = 2016
"""Most rows of a staged operand in one task (a multiple of 14 and 6), which bounds scratch memory."""


NO_TILE = "the kernel has no contraction that is walked in such tiles"
"""Why a micro-kernel is not used, where nothing else is known."""
NO_FRAGMENTS = "the kernel has no contraction on matrix instructions of single warps"
"""The same of products of fragments."""


@dataclass(slots=True)
class Range:
    """One dimension of a loop nest: an axis of `tiles`, or an index of `each`. resident: how many coordinates a loop
    over tiles takes at once. walked: what spans them is in scratch memory, and walks loop over them."""

    start: Scalar
    stop: Scalar
    axis: str | None = None
    counter: Value | None = None
    step: int = 1
    hint: int = 1024
    divisor: int = 1
    capacity: Capacity | None = None
    resident: int = 0
    lane: bool = False
    late: LateWalk | None = None
    walked: bool = False


@dataclass(slots=True)
class Split:
    """A range that tasks share. granule: what none of them parts. chunks: how many parts, of `each` granules; the first
    `more` of them have one more, so that those taken last are not the longer ones."""

    range: Range
    granule: int
    chunks: Scalar
    each: Scalar
    more: Scalar


def has_wide_rows(function: Function) -> bool:
    """Whether a row of 64-bit elements will be needed: most registers have half as many lanes of them.

    An i64 scalar stays a scalar as an index, a bound or an operand of other integer scalars.
    """
    def wide(value: Value) -> bool:
        t = value.type
        return isinstance(t, TileType) and t.dtype.bits == 64 and t.dtype.name != "index"

    for op in function.walk():
        for result in op.results:
            if wide(result) and (not is_scalar_integer(result) or Lowering._made_of_rows(op)):
                return True
        if op.name in ("load", "tiles", "each", "whole", "if", "yield"):
            continue
        if op.name == "store":
            if wide(op.operands[1]):
                return True
        elif any(wide(v) and (not is_scalar_integer(v) or not all(is_scalar_integer(r) for r in op.results))
                 for v in op.operands):
            return True
    return False


def lower(function: Function, schedule: Schedule, facts: Facts, specialization: Specialization) -> Function:
    """Lower a canonical tile IR function. Raises LoweringError for an element type that no register row holds."""
    return Lowering(function, schedule, facts, specialization, lanes_of(function, facts)).run()


def _parts(function: Function, specialization: Specialization) -> Function:
    """The function as parts that meet at barriers; see tile/parts.py."""
    def is_bounded(start: Value, stop: Value) -> bool:
        return hint(start, specialization)[2] is not None and hint(stop, specialization)[2] is not None

    def is_long(start: Value, stop: Value) -> bool:
        return hint(stop, specialization)[0] >= LONG_REDUCTION

    return split_parts(function, is_long, is_bounded)


def hint(value: Value, specialization: Specialization) -> tuple[int, int, Capacity | None]:
    """(typical value, divisor, bound for scratch memory) of an index scalar."""
    op = value.op
    if op is not None and op.name == "const":
        c = int(op.attributes["value"])
        return c, (64 if c % 64 == 0 else 16 if c % 16 == 0 else 1), Capacity(c)
    if op is not None and op.name == "dim":
        name = op.attributes["name"]
        dim = specialization.dims.get(name, DimClass())
        return dim.hint, dim.divisor, Capacity(1, (name,))
    if op is not None and op.name in ("min", "add", "sub", "mul", "floordiv"):
        (a, of_a, most_a), (b, of_b, most_b) = (hint(v, specialization) for v in op.operands)
        # Where typical values make no difference, as of a loop's counter, the first one bounds it.
        difference = a - b if a > b else a
        known = {"min": min(a, b), "add": a + b, "sub": difference, "mul": a * b, "floordiv": a // max(1, b)}
        divisor = {"mul": max(of_a, of_b), "floordiv": 1}.get(op.name, gcd(of_a, of_b))
        return max(1, known[op.name]), divisor, _most(op.name, most_a, most_b)
    return 256, 1, None


def _most(name: str, a: Capacity | None, b: Capacity | None) -> Capacity | None:
    """A bound of the result of an op on extents with these bounds, none of them negative."""
    if name == "min":
        return min((c for c in (a, b) if c is not None), key=lambda c: len(c.dims), default=None)
    if name in ("sub", "floordiv"):
        return a
    if name == "mul" and a is not None and b is not None:
        return Capacity(a.constant * b.constant, (*a.dims, *b.dims))
    return None


def lanes_of(function: Function, facts: Facts) -> int:
    """Lanes of a row: fewer on most targets where the function has 64-bit elements."""
    return facts.lanes_of_wide_rows if has_wide_rows(function) else facts.lanes


def result_layouts(function: Function, schedule: Schedule, facts: Facts,
                   specialization: Specialization) -> dict[Op, Layout]:
    """Where each reduction or contraction of a canonical function keeps its results, as `lower` would choose.

    A walk that is lowered several times, once for each tail, is reported where it holds the most registers.
    """
    found: dict[Op, Layout] = {}
    lanes = lanes_of(function, facts)

    class Recording(Lowering):
        def choose(self, walk: Walk) -> WalkChoice:
            choice = super().choose(walk)
            bound = {axis: b.count for axis, b in self.bound.items()}
            for op in walk.reductions:
                layout = choice.layout(axes_of(op.result), lanes, bound)
                if op not in found or found[op].level_extent("register") < layout.level_extent("register"):
                    found[op] = layout
            return choice

    Recording(function, schedule, facts, specialization, lanes).run()
    return found


class Lowering(ChainGroupLowering, OrderedLowering, LateLowering):
    def __init__(self, function: Function, schedule: Schedule, facts: Facts, specialization: Specialization,
                 lanes: int) -> None:
        super().__init__(_parts(function, specialization), schedule, facts, specialization, lanes)
        self.block_loads = []
        self.asking = []
        self.pending_buffers: dict[Value, Access] = {}
        self.carried_buffers: dict[Value, Access] = {}
        self.stage_memory: dict[tuple[str, Op], Scalar] = {}
        self.scratch_sizes: list[list[object]] = []
        self.scratch_end: Scalar = 0
        self.counters = 0
        self.task_counts: list[list[list[object]] | None] = []
        self._check_schedule()

    def _check_schedule(self) -> None:
        axes = {a for op in self.function.walk() for a in (
            op.attributes["axes"] if op.name == "tiles" else [op.attributes["axis"]] if op.name == "whole" else [])}
        named = {*self.schedule.tile, *self.schedule.registers, *self.schedule.order, *self.schedule.chunks,
                 *self.schedule.split, *self.schedule.cluster,
                 *(axis for axis in (self.schedule.lane, self.schedule.stream) if axis)}
        for axis in sorted(named - axes):
            raise ScheduleError(f"schedule of {self.function.name}: no axis {axis!r}; expected one of "
                                f"{', '.join(sorted(axes))}")
        tensors = {t.name for t in self.function.tensors()}
        for name in (*(self.schedule.stage or ()), *(self.schedule.streaming or ())):
            if name not in tensors:
                raise ScheduleError(f"schedule of {self.function.name}: no tensor {name!r}; expected one of "
                                    f"{', '.join(sorted(tensors))}")
        for name in self.schedule.assembly:
            chosen = pieces_named(name)
            if not chosen:
                raise ScheduleError(f"schedule of {self.function.name}: no block {name!r}; expected one of "
                                    f"{', '.join(block_names()) or 'none, as no block is registered'}")
            for piece in chosen:
                if piece.key in CONTRACTIONS:
                    self.contractions.append(piece.key)
                elif piece.key in PRODUCTS:
                    self.products.append(piece.key)
                elif piece.key.startswith(f"{self.facts.family}:"):
                    self.blocks[PIECES[piece.key].implements] = piece.key
        for axis, tile in self.schedule.tile.items():
            if axis == self.schedule.lane and tile % self.lanes:
                raise ScheduleError(f"schedule of {self.function.name}: tile of the lane axis {axis} is {tile}; "
                                    f"expected a multiple of the {self.lanes} lanes")

    def run(self) -> Function:
        lowered = Function(self.function.name, "lane", self.function.location)
        lowered.body = self.entry
        self.find_matrix_walk()
        self.settle_shares()
        self.settle_cluster()
        for number, part in enumerate(self._parts()):
            parallel = any(op.attributes.get("parallel") for op in part.ops)
            if number:
                again = parallel and self.counters >= TASK_COUNTERS  # the counter was used by an earlier loop
                self.effect("barrier", [], **({"reset": self.counters % TASK_COUNTERS} if again else {}))
            if parallel:
                self._parallel(part)
            else:
                self._on_first_worker(lambda part=part: self.block(part))  # type: ignore[misc]
        if self.caller_tiles is not None:
            self.effect("tile_release", [self.caller_tiles])
        if self.streaming_tensors & self.specialization.aligned:
            self.effect("fence_streaming", [])
        lowered.attributes = {"lanes": self.lanes, "slots": list(self.slots), "scratch": self.scratch_sizes,
                              "counters": min(self.counters, TASK_COUNTERS),
                              "tasks": [] if None in self.task_counts else self.task_counts}
        if self.contractions or self.products:
            used = {op.attributes["by"] for op in lowered.walk() if op.name in ("asm_contract", "asm_multiply")}
            lowered.attributes["refused"] = [
                [key, self.refused.get(key, reason)] for keys, reason in (
                    (self.contractions, NO_TILE), (self.products, NO_FRAGMENTS)) for key in keys if key not in used]
        if self.warps > 1:
            lowered.attributes |= {"warps": self.warps, "near_bytes": self.place_records(self.near_bytes_used),
                                   "near_buffers": [list(found) for found in self.near_buffers]}
        if self.caller_tiles is not None:
            assert self.facts.tiles is not None
            lowered.attributes["tile"] = self.facts.tiles.size
        if self.tensor_maps:
            lowered.attributes["tensor_maps"] = self.tensor_maps
        if self.cluster > 1:
            lowered.attributes["cluster"] = self.cluster
        return lowered

    def _parallel(self, part: Block) -> None:
        """A part of the function whose loops share out tasks. Groups of a worker's warps share out the same."""
        counters, task_counts = self.counters, list(self.task_counts)

        def share() -> None:
            self.counters, self.task_counts = counters, list(task_counts)
            self.block(part, top=True)

        self.parts(share)

    def _parts(self) -> list[Block]:
        """The blocks of the function's parts, once its buffers have memory."""
        body = self.function.body
        if not any(op.name == "part" for op in body.ops):
            return [body]
        self.begin_block(body)
        for op in body.ops:
            if op.name == "buffer":
                self._buffer(op)
        return [op.blocks[0] for op in body.ops if op.name == "part"]

    def _buffer(self, op: Op) -> None:
        """Memory that all workers see: in the scratch memory of the first."""
        tensor = op.result
        assert isinstance(tensor.type, TensorType)
        size: Scalar = 1
        strides: list[Scalar] = []
        extents: list[tuple[Capacity | int, int]] = []
        for value in reversed(op.operands):
            capacity = self.hint(value)[2]
            assert capacity is not None, "split_parts asks first"
            strides.insert(0, size)
            extents.insert(0, (capacity, 1))
            size = self.mul(size, self._rounded(capacity, 1))
        self.tensor_bases[tensor] = self.scratch(extents, tensor.type.dtype, shared=True)
        self.tensor_strides[tensor] = strides

    # Scratch memory.

    def scratch(self, extents: list[tuple[Capacity | int, int]], dtype: DType, shared: bool = False) -> Scalar:
        """Address of a new scratch buffer: product over axes of their capacity, rounded up to a multiple each. shared:
        one for all workers.

        The attribute `scratch` lists every buffer, and what is between them, as [element bytes, [[constant, [dims],
        multiple], ...]].
        """
        size = element_bytes(dtype)
        words: Scalar = size
        record: list[object] = []
        for capacity, multiple in extents:
            c = capacity if isinstance(capacity, Capacity) else Capacity(capacity)
            words = self.mul(words, self._rounded(c, multiple))
            record.append([c.constant, list(c.dims), multiple])
        base = self.add(self._scratch_base(shared), self.scratch_end)
        self.scratch_end = self.add(self.scratch_end, self.round_up(words, 64))
        self.scratch_sizes.append([size, record])
        if isinstance(words, int) and words % PAGE_BYTES == 0:
            self.scratch_end = self.add(self.scratch_end, BETWEEN_BYTES)
            self.scratch_sizes.append([1, [[BETWEEN_BYTES, [], 1]]])
        return base

    def _rounded(self, capacity: Capacity, multiple: int) -> Scalar:
        extent: Scalar = capacity.constant
        for dim in capacity.dims:
            extent = self.mul(extent, self.slot(f"dim.{dim}"))
        return self.round_up(extent, multiple)

    def _scratch_base(self, shared: bool = False) -> Scalar:
        memo = self.levels[0].memo
        if shared:
            if "first scratch" not in memo:
                memo["first scratch"] = self.emit(0, "arg", [], S64, slot=0)
        elif "scratch" not in memo:
            base = self.emit(0, "arg", [], S64, slot=0)
            each = self.emit(0, "arg", [], S64, slot=1)
            worker = self.emit(0, "worker", [], S64)
            memo["scratch"] = self.add(base, self.mul(worker, each))
        return memo["first scratch" if shared else "scratch"]  # type: ignore[no-any-return]

    def allocate(self, value: Value, dtype: DType, axes: list[tuple[str, Capacity | int]]) -> Access:
        """A scratch buffer for a tile: the last axis is contiguous and padded to whole rows (twice, for tails)."""
        extents: list[tuple[Capacity | int, int]] = [(c, 1) for _, c in axes[:-1]]
        extents.append((axes[-1][1], self.lanes))
        base = self.scratch(extents, dtype)
        access = Access(base, 0, {}, dtype if dtype is bool_ else self._memory(dtype), relative=True)
        step: Scalar = element_bytes(dtype)
        for (axis, capacity), (_, multiple) in zip(reversed(axes), reversed(extents), strict=True):
            access.axes[axis] = step
            c = capacity if isinstance(capacity, Capacity) else Capacity(capacity)
            step = self.mul(step, self._rounded(c, multiple))
        return access

    @staticmethod
    def _memory(dtype: DType) -> DType:
        from .state import memory_dtype
        return memory_dtype(dtype)

    # Facts of scalars.

    def hint(self, value: Value) -> tuple[int, int, Capacity | None]:
        return hint(value, self.specialization)

    def _range(self, start: Value, stop: Value) -> Range:
        first, last = self.integer(start), self.integer(stop)
        _, divisor, capacity = self.hint(stop)
        capacity = self.most_from(start, stop) or capacity
        if first != 0:
            divisor = gcd(divisor, self.hint(start)[1])
        return Range(first, last, hint=self._extent_hint(start, stop), divisor=divisor, capacity=capacity)

    def most_from(self, start: Value, stop: Value) -> Capacity | None:
        """A bound of the extent of start ... min(start + constant, ...), or None."""
        for end in stop.op.operands if stop.op is not None and stop.op.name == "min" else ():
            parts = end.op.operands if end.op is not None and end.op.name == "add" else []
            for part, other in zip(parts, reversed(parts), strict=True):
                if part is start and other.op is not None and other.op.name == "const":
                    return Capacity(int(other.op.attributes["value"]))
        return None

    def _extent_hint(self, start: Value, stop: Value) -> int:
        hint = self.hint(stop)[0]
        known = start.op is not None and start.op.name in ("const", "dim")
        return max(1, hint - self.hint(start)[0]) if known else hint

    def _open(self, axis: str, r: Range) -> None:
        self.open[axis] = Open(r.start, self.sub(r.stop, r.start), r.hint, r.divisor, r.capacity)

    # Blocks.

    def block(self, block: Block, yields_kept: frozenset[int] = frozenset(), top: bool = False) -> None:
        if self.chain is not None and block is self.chain.body:
            self.chained(block)
            return
        self.begin_block(block)
        bound = self._bind_short_axis(block)
        self.items(block, plan_block(block, self.wholes, yields_kept, self.keeps_operand, self.is_bounded), None, top)
        if bound is not None:
            del self.bound[bound]

    def is_bounded(self, axis: str) -> bool:
        """Whether scratch memory may be set aside for a value over an axis."""
        o = self.open.get(axis)
        return o is None or isinstance(o.extent, int) or o.capacity is not None

    def begin_block(self, block: Block) -> None:
        """Forget what earlier lowerings of the block held; open its whole axes; compute its integer scalars."""
        homes: dict[object, int] = self.home  # type: ignore[assignment]
        for op in block.ops:
            homes[op] = self.depth
            for result in op.results:
                homes[result] = self.depth
                self.rows.pop(result, None)
                self.buffers.pop(result, None)
                self.scalars.pop(result, None)
            if op.name == "whole":
                r = self._range(op.operands[0], op.operands[1])
                self._open(op.attributes["axis"], r)
        self._early_scalars(block)

    def _early_scalars(self, block: Block) -> None:
        for value in early_scalars(block):
            self.integer(value)

    def _bind_short_axis(self, block: Block) -> str | None:
        """Bind an axis of `whole` that is a vector or two long and spanned by a sum that `each` carries: the lanes hold
        it in the loop, and the sum stays in registers."""
        if any(b.lane for b in self.bound.values()):
            return None
        carried = {axis for op in block.ops if op.name == "each" for value in op.results for axis in axes_of(value)
                   if any(inner.name == "contract" for inner in op.walk())}
        for op in block.ops:
            if op.name != "whole" or op.attributes["axis"] not in carried:
                continue
            axis = str(op.attributes["axis"])
            o = self.open[axis]
            if isinstance(o.extent, int) and self._fills_vectors(o.extent) and self.schedule.lane in (None, axis):
                del self.open[axis]
                self.bound[axis] = Bound(o.offset, o.extent // self.lanes, True, None, self.depth, resident=True)
                return axis
        return None

    def _fills_vectors(self, extent: int) -> bool:
        return extent in (self.lanes, RESIDENT_VECTORS * self.lanes)

    def items(self, block: Block, plan: Plan, late: Late | None, top: bool = False) -> None:
        """The walks and control ops of a block, but for a late walk."""
        outer = self.block_loads, self.asking
        walks = [item for item in plan.items if isinstance(item, Walk)]
        self.asking = []
        if late is not None:
            self.asking = [late.host]
        elif self.facts.software_prefetch and any(op.name == "store" and self.streams(op) for op in block.ops):
            storing = [w for w in walks if any(isinstance(root, Op) and self.streams(root) for root in w.inner)]
            # Once is enough where memory is read line by line: at best while results leave.
            self.asking = storing if self.facts.line_by_line and storing else walks
        self.block_loads = [op for op in block.ops if op.name == "load" and op.result.type.axes]  # type: ignore[union-attr]
        items = plan.items if late is None else plan.items[:-1]
        for item in items:
            self._item(item, top)
        self.block_loads, self.asking = outer

    def _on_first_worker(self, body: Callable[[], None]) -> None:
        first = self.emit(self.depth, "s_cmp", [self.emit(0, "worker", [], S64), self.value(0)], S64, cond="eq")
        then, other = Block(), Block()
        self.enter(then)
        body()
        self.effect("yield", [])
        self.leave()
        self.enter(other)
        self.effect("yield", [])
        self.leave()
        self.finish(Op("if", [first], (), {}, [then, other]))

    def _item(self, item: Walk | Op, top: bool) -> None:
        if isinstance(item, Walk):
            if self.matrix_walk is not None:
                self.matrix(item, self.matrix_walk)
            else:
                self.walk(item)
            self.buffers.update(self.pending_buffers)
            self.pending_buffers.clear()
        elif item.name == "tiles" and item.attributes["parallel"] and not top and self._is_plain(item):
            self._as_whole(item)
        elif item.name in ("tiles", "each"):
            self._nest(item, top and bool(item.attributes["parallel"]))
        elif item.name == "if":
            self._if(item)
        elif item.name in ORDERED:
            self.ordered(item)
        else:
            raise LoweringError(f"no lowering for {item.name}", item)

    @staticmethod
    def _is_plain(op: Op) -> bool:
        return not op.results and not any(o.blocks or o.name in ORDERED for o in op.blocks[0].ops)

    def _as_whole(self, op: Op) -> None:
        """A parallel loop inside a task, without control inside: its axes are walked like whole axes."""
        for i, axis in enumerate(op.attributes["axes"]):
            self._open(axis, self._range(op.operands[2 * i], op.operands[2 * i + 1]))
        self.block(op.blocks[0])
        for axis in op.attributes["axes"]:
            del self.open[axis]

    # Loop nests.

    def _chain(self, op: Op) -> list[Op]:
        """`op` and the parallel loops nested perfectly in it, as long as their bounds exist outside."""
        chain = [op]
        while True:
            inner = chain[-1].blocks[0]
            control = [o for o in inner.ops if o.blocks]
            others = [o for o in inner.ops if o.name in (*LATE, "store", "whole")]
            defined = {r for o in inner.ops for r in o.results} | {a for c in chain for a in c.blocks[0].arguments}
            if (len(control) != 1 or others or control[0].name not in ("tiles", "each")
                    or not control[0].attributes["parallel"] or any(v in defined for v in control[0].operands)
                    or any(isinstance(r.type, TileType) and r.type.axes for o in inner.ops for r in o.results
                           if o is not control[0])):
                return chain
            chain.append(control[0])

    def _ranges(self, op: Op) -> list[Range]:
        if op.name == "tiles":
            ranges = [self._range(op.operands[2 * i], op.operands[2 * i + 1])
                      for i in range(len(op.attributes["axes"]))]
            for r, axis in zip(ranges, op.attributes["axes"], strict=True):
                r.axis = axis
            return ranges
        count = op.attributes["count"]
        ranges = [self._range(op.operands[2 * i], op.operands[2 * i + 1]) for i in range(count)]
        for r, counter in zip(ranges, op.blocks[0].arguments, strict=False):
            r.counter = counter
            r.step = op.attributes.get("step", 1)
        return ranges

    def _residents(self, ranges: list[Range], plan: Plan) -> None:
        """Axes of values that pass between walks or into control ops get a size: they stay in registers."""
        nested = any(isinstance(item, Op) for item in plan.items)
        on_tiles = self._rows_on_tiles(ranges, plan)
        sums = self._sums_in_registers(ranges, plan) if on_tiles is None else {}
        for r in ranges if self.chain is None else ():
            if r.axis is None:
                continue
            if r.axis == on_tiles:
                r.resident, r.walked = CHUNK_TILES * self.lanes, True
                continue
            carries = nested and self._carries_contractions(r.axis, plan)
            lane = r.axis == self.schedule.lane or (self.schedule.lane is None and (
                (carries and r.hint >= self.lanes) or (nested and self._lists_by_lane(r, plan))))
            if r.axis in plan.crossing or nested or lane or (r.axis in self.schedule.tile and len(plan.items) > 1):
                r.lane = lane and len(plan.items) > 1
                if lane and not r.lane and not nested:
                    continue
                size = 1
                if r.lane:
                    size = self.lanes if r.hint < RESIDENT_VECTORS * self.lanes else RESIDENT_VECTORS * self.lanes
                elif carries and not any(other.lane or other.resident > 1 for other in ranges):
                    size = self._resident_rows(r)
                else:
                    size = sums.get(r.axis) or self._rows_that_wait(r, plan)
                r.resident = self.schedule.tile.get(r.axis, size)

    def _rows_that_wait(self, r: Range, plan: Plan) -> int:
        """Two where they wait for sums of themselves for long. Not where results go past the caches: memory takes
        longer then, and the last walk may follow a row behind instead (late.py)."""
        assert r.axis is not None
        stores = [root for item in plan.items if isinstance(item, Walk) for root in item.roots()
                  if isinstance(root, Op) and root.name == "store"]
        if self.facts.many_workers or r.hint < 2 or any(map(self.streams, stores)):
            return 1
        waits = waits_of(r.axis, plan, self.facts, self._whole_hint)
        return 2 if waits is not None and waits.saved >= WORTH else 1

    def _resident_rows(self, r: Range) -> int:
        """Rows that loops inside contract at once: what those read (a cache of keys) is then read once for all."""
        extent = self.sub(r.stop, r.start)
        rows = extent if isinstance(extent, int) else r.hint
        pieces = -(-rows // RESIDENT_ROWS)
        return -(-rows // max(1, pieces))

    def _sums_in_registers(self, ranges: list[Range], plan: Plan) -> dict[str, int]:
        """How much at once of the axes over which `each` carries sums of contractions, one operand of which spans the
        lanes. As many rows of the other as the registers hold: what the first costs to read and to unpack is paid once
        for all of them. And more than one piece of the first, so that an element spread over the lanes serves each."""
        for item in plan.items:
            contractions = [op for op in item.walk() if op.name == "contract"] if isinstance(item, Op) else []
            if not isinstance(item, Op) or item.name != "each" or not item.results or not contractions:
                continue
            walked = {r.axis for r in ranges if r.axis is not None}
            lanes = {a for value in item.results for a in axes_of(value)} - walked
            operands = [frozenset(axes_of(value)) for op in contractions for value in op.operands]
            columns = {a for axes in operands if axes & lanes for a in axes & walked}
            rows = {a for axes in operands if not axes & lanes for a in axes & walked} - columns
            spanning = [axes for axes in operands if axes & lanes]
            if len(columns) > 1 or len(rows) > 1 or 2 * len(spanning) != len(operands):
                continue
            if len(lanes) != 1 or not self._fills_vectors(self._whole_hint(*lanes)):
                continue
            hints = {r.axis: r.hint for r in ranges if r.axis is not None}
            each = self._whole_hint(*lanes) // self.lanes
            vectors = len(item.results) * each
            many = max((hints[a] for a in rows), default=1)
            # For each a carried sum, and one of integers that is scaled before it is added; some for operands. Where
            # these are few, carried sums may lie in memory, as every block of products touches them but once.
            free = self.facts.vector_registers - OPERAND_REGISTERS
            most = max(1, free // (2 * vectors), min(FEWER_ROWS, free // each))
            pieces = max(1, min(PIECES_OF_MANY_ROWS // vectors, most)) if many > 2 * MOST_ROWS else 1
            found = {a: min(pieces, hints[a]) for a in columns}
            most = max(1, min(MOST_ROWS, most) // prod(found.values()))
            return found | dict.fromkeys(rows, most if many > 2 * MOST_ROWS else -(-many // -(-many // most)))
        return {}

    def _rows_on_tiles(self, ranges: list[Range], plan: Plan) -> str | None:
        """The axis of many rows over which `each` carries sums of contractions that tile registers take."""
        for item in plan.items:
            if not isinstance(item, Op) or item.name != "each" or not item.results:
                continue
            contractions = [op for op in item.walk() if op.name == "contract"]
            body = plan_block(item.blocks[0], self.wholes)
            plain = all(isinstance(inner, Walk) for inner in body.items)
            if not contractions or not plain or not all(serves(self, op) for op in contractions) or not (
                    is_worth(self, contractions, len(item.results), self._whole_hint)):
                continue
            forced = self.schedule.tile.keys() | self.schedule.registers.keys()     # they speak of vectors
            walked = {r.axis: r.hint for r in ranges if r.axis is not None}
            lanes = {a for value in item.results for a in axes_of(value)} - walked.keys()
            rows = {a for op in contractions for value in op.operands if not lanes & set(axes_of(value))
                    for a in axes_of(value) if a in walked}
            if len(lanes) == len(rows) == 1 and not rows & forced and self._whole_hint(*lanes) == self.lanes and (
                    walked[next(iter(rows))] >= FEWEST_ROWS * self.lanes):
                return rows.pop()
        return None

    def _late(self, ranges: list[Range], body: Block, plan: Plan) -> LateWalk | None:
        """Which walk of the body follows a row behind, where all that the loops bind are single rows."""
        if not self.facts.software_prefetch:
            return None  # Such a target hides memory's time in another way.
        if any(r.axis is not None and (r.resident != 1 or r.lane) for r in ranges) or ranges[-1].axis is None:
            return None
        late = late_walk(plan, body, frozenset(r.axis for r in ranges if r.axis is not None), self.streams)
        return None if late is None else LateWalk(body, plan, late)

    @staticmethod
    def _carries_contractions(axis: str, plan: Plan) -> bool:
        """Whether a loop inside contracts tiles over this axis again and again (attention): with the axis across lanes
        no lane ever needs another, so that its maxima and sums are plain vectors."""
        return any(inner.name == "contract" and axis in inner.result.type.axes  # type: ignore[union-attr]
                   for item in plan.items if isinstance(item, Op) and item.name == "tiles" and item.results
                   for inner in item.walk())

    def _lists_by_lane(self, r: Range, plan: Plan) -> bool:
        """Whether short lists of the largest of few elements are made for many rows (experts of tokens): a list in each
        lane needs no branch, though every element goes down it."""
        for item in plan.items:
            if isinstance(item, Op) and item.name == "topk" and r.axis in axes_of(item.results[0]):
                over, into = (self._whole_hint(a) for a in (item.attributes["over"][0], item.attributes["into"]))
                if into <= SHORT_LIST and over <= FEW_ELEMENTS and r.hint >= 4 * self.lanes:
                    return True
        return False

    def _whole_hint(self, axis: str) -> int:
        """Typical extent of an axis of `whole`; 0 of any other."""
        return next((self._extent_hint(*op.operands) for op in self.function.walk()
                     if op.name == "whole" and op.attributes["axis"] == axis), 0)

    def _nest(self, op: Op, tasks: bool) -> None:
        chain = self._chain(op) if op.attributes["parallel"] else [op]
        ranges = [r for o in chain for r in self._ranges(o)]
        body = chain[-1].blocks[0]
        parallel = bool(op.attributes["parallel"])
        if parallel:
            plan = plan_block(body, self.wholes)
            self._residents(ranges, plan)
            if len(chain) == 1:
                ranges[-1].late = self._late(ranges, body, plan)

        def inner(carried: list[Value]) -> list[Value]:
            for o in chain[:-1]:
                self._open_block(o.blocks[0])
            if not op.results:
                self.block(body)
                return []
            raise AssertionError("carried values are threaded by _sequential")

        if tasks:
            self._tasks(ranges, body, inner)
        elif parallel and not op.results:
            self._loops(ranges, 0, inner)
        else:
            self._sequential(op, ranges)

    def _open_block(self, block: Block) -> None:
        """Pure ops between the loops of a perfect nest belong to the innermost level."""
        homes: dict[object, int] = self.home  # type: ignore[assignment]
        for op in block.ops:
            if not op.blocks:
                homes[op] = self.depth
                for result in op.results:
                    homes[result] = self.depth
                    self.scalars.pop(result, None)
        self._early_scalars(block)

    def _loops(self, ranges: list[Range], k: int, body: Callable[[list[Value]], list[Value]]) -> None:
        """Loops over indices and resident axes; other axes become open."""
        if k == len(ranges):
            body([])
            return
        r = ranges[k]
        if r.axis is None:
            assert r.counter is not None
            self.counted("each", r.start, r.stop, r.step, lambda iv: self._with_counter(r, iv, ranges, k, body))
            return
        if not r.resident:
            self._open(r.axis, r)
            self._loops(ranges, k + 1, body)
            self.open.pop(r.axis, None)
            return
        if r.late is not None:
            self.late_rows(r.axis, r.start, r.stop, r.late)
            return
        self._resident(r, lambda: self._loops(ranges, k + 1, body))

    def _with_counter(self, r: Range, iv: Value, ranges: list[Range], k: int,
                      body: Callable[[list[Value]], list[Value]]) -> None:
        assert r.counter is not None
        self.scalars[r.counter] = iv
        self.home[r.counter] = self.depth
        self._loops(ranges, k + 1, body)

    def _resident(self, r: Range, body: Callable[[], None]) -> None:
        """A loop over tiles whose elements along the axis stay in registers: full tiles, then single rows (or one
        masked row of lanes)."""
        assert r.axis is not None
        axis = r.axis
        size, lanes = r.resident, self.lanes
        count = size // lanes if r.lane else size

        def at(iv: Value, n: int, mask: Value | None) -> None:
            self.bound[axis] = Bound(iv, n, r.lane, mask, self.depth, resident=True, stop=r.stop, hint=r.hint)
            body()
            del self.bound[axis]

        if r.walked:
            def walked(iv: Value) -> None:
                rows = size if r.divisor % size == 0 else self.scalar("s_min", self.sub(r.stop, iv), size)
                self.open[axis] = Open(iv, rows, min(size, r.hint), gcd(size, r.divisor), Capacity(size))
                body()
                del self.open[axis]

            self.counted(axis, r.start, r.stop, size, walked)
            return
        extent = self.sub(r.stop, r.start)
        if size == 1 or r.divisor % size == 0:
            self.counted(axis, r.start, r.stop, size, lambda iv: at(iv, count, None))
            return
        full = self.add(r.start, self.sub(extent, self.scalar("s_mod", extent, size)))
        if not isinstance(extent, int) or extent >= size:
            self.counted(axis, r.start, full, size, lambda iv: at(iv, count, None))
        if isinstance(extent, int) and extent % size == 0:
            return
        if r.lane:
            def masked(iv: Value) -> None:
                mask = self.emit(self.depth, "mask_first", [self.value(self.sub(r.stop, iv))], MASK)
                at(iv, 1, mask)
            self.counted(axis, full, r.stop, lanes, masked)
        else:
            if size > FEWER_ROWS:
                rest = self.sub(r.stop, full)
                fewer = self.add(full, self.sub(rest, self.scalar("s_mod", rest, FEWER_ROWS)))
                self.counted(axis, full, fewer, FEWER_ROWS, lambda iv: at(iv, FEWER_ROWS, None))
                full = fewer
            self.counted(axis, full, r.stop, 1, lambda iv: at(iv, 1, None))

    # Tasks.

    def _granule(self, r: Range) -> int:
        """What the size of a task along a range is a multiple of."""
        if r.axis is None:
            return r.step
        if r.resident:
            return r.resident
        return 1

    def _tasks(self, ranges: list[Range], block: Block, body: Callable[[list[Value]], list[Value]]) -> None:
        """Split the ranges into tasks: about TASKS_PER_WORKER for each worker, fewer where there is less to do.

        block: what is done for each of their indices; body emits it.
        """
        workers = self.emit(0, "workers", [], S64)
        alone = self.emit(0, "s_cmp", [workers, self.value(1)], S64, cond="eq")
        stages = any(self._task_cap(r) for r in ranges)
        target: Scalar = self.emit(
            0, "s_select", [alone, self.value(1), self.value(self.mul(workers, TASKS_PER_WORKER))], S64)
        split: dict[int, Split] = {}
        total: Scalar = 1
        left: Scalar = target
        granules = self._task_granules(ranges, block)
        order = list(range(len(ranges)))
        if stages or any(self.panel_width(r.axis) > 1 for r in ranges):
            # What all tasks along an axis stage or read is the operand without it: the axis of the larger one is split.
            order.sort(key=lambda i: -ranges[i].hint if ranges[i].axis is not None else -1 << 40)
        for i in order:
            r, granule = ranges[i], granules[i]
            extent = self.sub(r.stop, r.start)
            if r.axis is not None and r.axis == self.cluster_axis:
                split[i] = Split(r, granule, self.round_up(self.ceil_div(extent, granule), self.cluster), 1, 0)
                total = self.mul(total, split[i].chunks)
                continue
            if isinstance(extent, int) and extent <= granule:
                split[i] = Split(r, granule, 1, 1, 0)
                continue
            if self.tiles_are_tasks or (self.facts.many_workers and not self.schedule.chunks):
                split[i] = Split(r, granule, self.ceil_div(extent, granule), 1, 0)
                total = self.mul(total, split[i].chunks)
                continue
            count = self.scalar("s_max", self.ceil_div(extent, granule), 0)
            chunks: Scalar = self.schedule.chunks.get(r.axis, 0) if r.axis is not None else 0
            if not chunks:
                chunks = left
            cap = self._task_cap(r)
            if cap:
                chunks = self.scalar("s_max", chunks, self.ceil_div(extent, cap))
            chunks = self.scalar("s_min", chunks, self.scalar("s_max", count, 1))
            each_chunk = self.scalar("s_floordiv", count, chunks)
            split[i] = Split(r, granule, chunks, each_chunk, self.sub(count, self.mul(chunks, each_chunk)))
            total = self.mul(total, chunks)
            left = self._ceil_div(left, self.scalar("s_max", chunks, 1))
        plans = [split[i] for i in range(len(ranges))]
        counter = self.counters % TASK_COUNTERS
        self.counters += 1
        self.task_counts.append(self._most_tasks(ranges, granules))
        if self.shares is not None:
            counts = {part.range.axis: part.chunks for part in plans if not isinstance(part.chunks, int)}
            self.each_segment(total, counts, lambda number, known: self._task(number, [
                replace(part, chunks=known.get(part.range.axis, part.chunks)) for part in plans], body))
            return
        task = Block([S64])
        total_value = self.value(total)
        self.enter(task)
        self._task(task.arguments[0], plans, body)
        self.effect("yield", [])
        self.leave()
        self.finish(Op("tasks", [total_value], (), {"counter": counter}, [task], self.location))

    def _task(self, number: Scalar, plans: list[Split], body: Callable[[list[Value]], list[Value]]) -> None:
        """Piece `number` of the ranges as they are split."""
        pieces: list[Range] = []
        if self.cluster_axis is not None:
            number = self.scalar("s_floordiv", number, self.cluster)
            plans = [replace(part, chunks=self.scalar("s_floordiv", part.chunks, self.cluster))
                     if part.range.axis == self.cluster_axis else part for part in plans]
        banded = self._banded(number, plans) if self.tiles_are_tasks and self.chain is None else {}
        for position, part in enumerate(reversed(plans)):
            r, granule, chunks = part.range, part.granule, part.chunks
            together = r.axis is not None and r.axis == self.cluster_axis
            if chunks == 1 and not together:
                pieces.insert(0, r)
                continue
            last = position == len([p for p in plans if p.chunks != 1]) - 1 and all(
                p.chunks == 1 for p in list(reversed(plans))[position + 1:])
            mine = number if last else self.scalar("s_mod", number, chunks)
            number = number if last else self.scalar("s_floordiv", number, chunks)
            mine = banded.get(r.axis, mine)
            if together:
                mine = self.add(self.mul(mine, self.cluster), self.rank())
            start = self.add(r.start, self._chunk_start(part, mine))
            exact = part.each == 1 and part.more == 0 and r.divisor % granule == 0 and not together
            stop = self.add(start, granule) if exact else self.scalar(
                "s_min", self.add(r.start, self._chunk_start(part, self.add(mine, 1))), r.stop)
            # Every task but the last has a whole number of granules; the last ends where the range does.
            divisor = gcd(granule, r.divisor)
            cap = self._task_cap(r)
            capacity = Capacity(cap) if cap else r.capacity
            pieces.insert(0, Range(start, stop, r.axis, r.counter, r.step, r.hint, divisor, capacity, r.resident,
                                   r.lane, r.late, r.walked))
        self._loops(pieces, 0, body)

    def _chunk_start(self, part: Split, number: Scalar) -> Scalar:
        """Where a chunk begins, from the start of its range."""
        before = self.add(self.mul(number, part.each), self.scalar("s_min", number, part.more))
        return self.mul(before, part.granule)

    def _banded(self, number: Scalar, plans: list[Split]) -> dict[str | None, Scalar]:
        """Which tile of rows and columns task `number` is: workers that run at once then share both operands in the
        last-level cache. The tiles of BAND_TILES rows are taken column by column, then those of the next rows."""
        found = self.matrix_walk
        assert found is not None
        counts = {part.range.axis: part.chunks for part in plans}
        rows, columns = (counts.get(axis, 1) for axis in (found.rows, found.columns))
        if rows == 1 or columns == 1:       # or the extent is known only inside of a task
            return {}
        inside = number if len([c for c in counts.values() if c != 1]) == 2 else \
            self.scalar("s_mod", number, self.mul(rows, columns))
        of_band = self.mul(columns, BAND_TILES)
        band = self.scalar("s_floordiv", inside, of_band)
        first = self.mul(band, BAND_TILES)
        high = self.scalar("s_max", self.scalar("s_min", self.sub(rows, first), BAND_TILES), 1)
        rest = self.scalar("s_mod", inside, of_band)
        return {found.rows: self.add(first, self.scalar("s_mod", rest, high)),
                found.columns: self.scalar("s_floordiv", rest, high)}

    def _most_tasks(self, ranges: list[Range], granules: list[int]) -> list[list[object]] | None:
        """How many tasks a loop may have at most: a product of factors [constant, [dims], size], each the quotient of
        constant * product of dims and size, rounded up; None where an extent is known only as the kernel runs."""
        factors: list[list[object]] = []
        for r, granule in zip(ranges, granules, strict=True):
            chunks = self.schedule.chunks.get(r.axis, 0) if r.axis is not None else 0
            if chunks:
                factors.append([chunks, [], 1])
            elif r.capacity is None:
                return None
            else:
                together = self.cluster if r.axis is not None and r.axis == self.cluster_axis else 1
                factors.append([r.capacity.constant, list(r.capacity.dims), granule * together])
                factors += [[together, [], 1]] if together > 1 else []
        return factors + self.most_shares()

    def _ceil_div(self, a: Scalar, b: Scalar) -> Scalar:
        return self.scalar("s_floordiv", self.sub(self.add(a, b), 1), b)

    def _task_granules(self, ranges: list[Range], block: Block) -> list[int]:
        if self.chain is not None:
            return [self.chain_rows() if r.axis == self.chain.rows else self._granule(r) for r in ranges]
        if self.matrix_walk is not None:
            sizes = dict(zip((self.matrix_walk.rows, self.matrix_walk.columns), self.matrix_tile(), strict=True))
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
            granules.append(lcm(granule, self.panel_width(r.axis)))
        return granules

    def _few(self, r: Range, ranges: list[Range], block: Block) -> int:
        """What a task of one warp among thousands takes of a range: whole rows of lanes where tensors are contiguous
        along it, and few rows else."""
        if r.axis is None or r.resident:
            return self._granule(r)
        along = [op for outer in block.ops for op in outer.walk() if self._runs_along(op, r.axis)]
        if not along:
            granule = ROWS_OF_FEW
        elif r is not [other for other in ranges if other.axis is not None and not other.resident][-1]:
            granule = self.lanes
        else:
            lanes = TASK_ELEMENTS // self._elements(block, r.axis) // self.lanes
            run = self.facts.run_bytes // max(element_bytes(op.result.type.dtype) for op in along)  # type: ignore[union-attr]
            granule = max(1, min(max(VECTORS_OF_FEW, run), lanes)) * self.lanes
        return lcm(granule, self.panel_width(r.axis))

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
        if r.axis is None or r.resident or self.matrix_walk is not None or self.chain is not None:
            return 0
        contracts = [op for op in self.function.walk() if op.name == "contract"]
        if any(r.axis in op.result.type.axes for op in contracts) and r.hint >= 28:  # type: ignore[union-attr]
            return STAGED_ROWS_CAP
        return 0

    # Sequential loops and branches with carried values.

    def _place(self, value: Value) -> str:
        t = value.type
        assert isinstance(t, TileType)
        if is_scalar_integer(value):
            return "scalar"
        if all(a in self.bound and self.bound[a].resident for a in t.axes):
            return "rows"
        return "buffer"

    def _sequential(self, op: Op, ranges: list[Range]) -> None:
        body = op.blocks[0]
        bounds = 2 * len(ranges)
        initial = op.operands[bounds:]
        arguments = body.arguments[len(ranges):] if op.name == "each" else body.arguments
        terminator = body.terminator
        outs = terminator.operands if terminator is not None else []
        places = [self._place(v) for v in arguments]
        carried: list[Value] = []
        points: list[list[dict[str, int]]] = []
        buffers: list[Access | None] = []
        kept: set[int] = set()
        for i, (argument, first, place) in enumerate(zip(arguments, initial, places, strict=True)):
            at_all = self._coordinates(argument.type.axes) if place == "rows" else []  # type: ignore[union-attr]
            points.append(at_all)
            buffers.append(None)
            if place == "scalar":
                carried.append(self.value(self.integer(first)))
            elif place == "rows":
                carried += [self.row(first, at) for at in at_all]
            else:
                kept.add(i)
                buffers[i] = self._initial_buffer(argument, first)
        for r in ranges:
            if r.axis is not None:
                tile = self.schedule.tile.get(r.axis, SEQUENTIAL_TILE)
                r.step = tile

        def run(k: int, values: list[Value]) -> list[Value]:
            if k == len(ranges):
                return self._iteration(op, body, arguments, outs, places, points, buffers, frozenset(kept), values)
            r = ranges[k]
            block = Block([S64, *[v.type for v in values]])
            first, last = self.value(r.start), self.value(r.stop)
            self.enter(block)
            iv = block.arguments[0]
            if r.axis is None:
                assert r.counter is not None
                self.scalars[r.counter] = iv
                self.home[r.counter] = self.depth
            else:
                extent = self.scalar("s_min", self.sub(r.stop, iv), r.step)
                exact = r.divisor % r.step == 0
                self.open[r.axis] = Open(iv, r.step if exact else extent, min(r.step, r.hint), 1, Capacity(r.step))
            results = run(k + 1, list(block.arguments[1:]))
            if r.counter is not None and k + 1 == len(ranges):
                self._prefetch_streams(body, r)
            self.effect("yield", results)
            self.leave()
            if r.axis is not None:
                del self.open[r.axis]
            loop = Op("loop", [first, last, *values], [v.type for v in values],
                      {"step": r.step, "label": r.axis or "each"}, [block], op.location)
            self.finish(loop)
            return list(loop.results)

        results = iter(run(0, carried))
        for result, place, at_all, buffer in zip(op.results, places, points, buffers, strict=True):
            self._receive(result, place, at_all, buffer, results)

    def _prefetch_streams(self, body: Block, r: Range) -> None:
        """Ask for what a loop over an index will read later for contractions: what spans the lanes is a matrix, read
        from one end to the other. The processor's own prefetching stops at the end of each page."""
        contracts = any(inner.name == "contract" for op in body.ops for inner in op.walk())
        if not self.facts.software_prefetch or not contracts:
            return
        several = any(b.resident and not b.lane and b.count > 1 for b in self.bound.values())
        direct = any(inner.name == "contract" and value.op is not None and value.op.name == "load"
                     and self._is_resident_row(value.op) for inner in body.ops for value in inner.operands)
        asked: set[tuple[Value, int]] = set()
        for op in body.ops:
            if op.name != "load" or not self._is_resident_row(op):
                continue
            access, strides = self.access(op), self._scalar_strides(op)
            step = strides.pop(r.counter, 0) * r.step if r.counter is not None else 0
            again = max((b.hint // b.count for a, b in self.bound.items()
                         if b.resident and not b.lane and a not in access.axes), default=1)
            if access.gathers or not 0 < step <= PAGE_BYTES or again >= OFTEN:
                continue
            ahead, level = (FAR_AHEAD_BYTES, 2) if several else (DIRECT_AHEAD_BYTES, 2) if direct else (
                NEAR_AHEAD_BYTES, 1)
            if not several and strides and isinstance(r.start, int) and isinstance(r.stop, int) and (
                    (r.stop - r.start) // r.step * step not in strides.values()):
                ahead, level = PIECES_AHEAD_BYTES, 2
            rows = [a for a in axes_of(op.result) if a in self.bound and not self.bound[a].lane]
            first = access.disp // LINE_BYTES * LINE_BYTES
            last = access.disp + min(step, self._reach_bytes(op, step))
            fixed = replace(access, axes={a: access.axes[a] for a in rows if a in access.axes}, disp=0)
            for at in self._coordinates(tuple(rows)):
                operands, attributes = self.address(fixed, at)
                place = attributes.pop("disp") + ahead
                for line in range(place + first, place + last, LINE_BYTES):
                    if (operands[-1], line) not in asked:
                        asked.add((operands[-1], line))
                        self.effect("prefetch", operands, level=level, disp=line, **attributes)

    def _reach_bytes(self, op: Op, most: int) -> int:
        """From the first byte to behind the last of what a load reads at one index and one row; `most` if unknown."""
        access = self.access(op)
        reach = element_bytes(access.dtype)
        for axis, stride in access.axes.items():
            if axis in self.bound and not self.bound[axis].lane:
                continue
            count = self.lanes if axis in self.bound else self.open[axis].extent if axis in self.open else 1
            if not isinstance(stride, int) or not isinstance(count, int):
                return most
            reach += (count - 1) * stride
        return reach

    def _is_resident_row(self, op: Op) -> bool:
        return any(a in self.bound and self.bound[a].lane and self.bound[a].resident for a in axes_of(op.result))

    def _scalar_strides(self, op: Op) -> dict[Value, int]:
        """By how many bytes a load moves with each index; those of which this is known only as the kernel runs are left
        out."""
        total: dict[Value, int] = {}
        unknown: set[Value] = set()
        for value, stride in zip(op.operands[1:], self.strides(op.operands[0]), strict=True):
            form = affine(value)
            for scalar, coefficient in (form.scalars if form is not None else {}).items():
                if isinstance(stride, int):
                    total[scalar] = total.get(scalar, 0) + coefficient * stride
                else:
                    unknown.add(scalar)
        size = element_bytes(op.operands[0].type.dtype)  # type: ignore[union-attr]
        return {scalar: stride * size for scalar, stride in total.items() if scalar not in unknown}

    def _receive(self, value: Value, place: str, points: list[dict[str, int]], buffer: Access | None,
                 rows: object) -> None:
        if place == "scalar":
            self.scalars[value] = next(rows)  # type: ignore[call-overload]
        elif place == "rows":
            axes = value.type.axes  # type: ignore[union-attr]
            self.rows[value] = {tuple(at[a] for a in axes): next(rows) for at in points}  # type: ignore[call-overload]
        else:
            assert buffer is not None
            self.buffers[value] = buffer

    def _iteration(self, op: Op, body: Block, arguments: list[Value], outs: list[Value], places: list[str],
                   points: list[list[dict[str, int]]], buffers: list[Access | None], kept: frozenset[int],
                   values: list[Value]) -> list[Value]:
        received = iter(values)
        copies: list[tuple[Value, Access]] = []
        for i, (argument, place) in enumerate(zip(arguments, places, strict=True)):
            self.home[argument] = self.depth
            self._receive(argument, place, points[i], buffers[i], received)
            if place == "buffer":
                buffer = buffers[i]
                assert buffer is not None
                if self._in_place(body, argument, outs[i], kept):
                    self.carried_buffers[outs[i]] = buffer
                elif outs[i] is not argument:
                    copies.append((outs[i], buffer))
        self.block(body, kept)
        for value, buffer in copies:
            self._copy(value, buffer)
        results: list[Value] = []
        for out, place, at_all in zip(outs, places, points, strict=True):
            if place == "scalar":
                results.append(self.value(self.integer(out)))
            elif place == "rows":
                results += [self.row(out, at) for at in at_all]
        for out in outs:
            self.carried_buffers.pop(out, None)
        return results

    def _in_place(self, body: Block, argument: Value, out: Value, kept: frozenset[int]) -> bool:
        """Whether the new value may overwrite the old one point by point: nothing else reads the old one later."""
        if out is argument or out.op is None or out.op not in body.ops:
            return False
        plan = plan_block(body, self.wholes, kept, self.keeps_operand, self.is_bounded)
        seen = False
        for item in plan.items:
            if isinstance(item, Walk):
                roots = item.roots()
                reads = [r for r in roots if self._reaches(r, argument, body)]
                if seen and reads:
                    return False
                if out in [r for r in roots if isinstance(r, Value)]:
                    seen = True
                    if any(isinstance(r, Op) and r.name != "store" for r in reads):
                        return False
            elif seen and any(argument in inner.operands for inner in item.walk()):
                return False
        return seen

    @staticmethod
    def _reaches(root: Op | Value, argument: Value, body: Block) -> bool:
        members = set(body.ops)
        stack = list(root.operands) if isinstance(root, Op) else list(root.op.operands if root.op else [])
        visited: set[Value] = set()
        while stack:
            v = stack.pop()
            if v is argument:
                return True
            if v in visited or v.op is None or v.op not in members or v.op.name in LATE:
                continue
            visited.add(v)
            stack += v.op.operands
        return False

    def _initial_buffer(self, argument: Value, first: Value) -> Access:
        buffer = self._buffer_for(argument)
        self._copy(first, buffer)
        return buffer

    def _copy(self, value: Value, buffer: Access) -> None:
        """Walk a tile value into a scratch buffer."""
        self.carried_buffers[value] = buffer
        kept = self.pending_buffers
        held = self.buffers.get(value)
        self.pending_buffers = {}
        walk = Walk(value.type.axes, (), [], [value])  # type: ignore[union-attr]
        self.walk(walk)
        self.pending_buffers = kept
        del self.carried_buffers[value]
        if held is not None:
            self.buffers[value] = held

    def _if(self, op: Op) -> None:
        condition = self.value(self.integer(op.operands[0]))
        places = [self._place(v) for v in op.results]
        points = [self._coordinates(v.type.axes) if p == "rows" else []  # type: ignore[union-attr]
                  for v, p in zip(op.results, places, strict=True)]
        buffers = [self._buffer_for(v) if p == "buffer" else None for v, p in zip(op.results, places, strict=True)]
        types: list[RowType | object] = []
        blocks = []
        for branch in op.blocks:
            block = Block()
            self.enter(block)
            self.block(branch)
            outs = branch.terminator.operands if branch.terminator is not None else []
            results: list[Value] = []
            for out, place, at_all, buffer in zip(outs, places, points, buffers, strict=True):
                if place == "scalar":
                    results.append(self.value(self.integer(out)))
                elif place == "rows":
                    results += [self.row(out, at) for at in at_all]
                else:
                    assert buffer is not None
                    self._copy(out, buffer)
            self.effect("yield", results)
            self.leave()
            types = [v.type for v in results]
            blocks.append(block)
        made = Op("if", [condition], types, {}, blocks, op.location)  # type: ignore[arg-type]
        self.finish(made)
        rows = iter(made.results)
        for result, place, at_all, buffer in zip(op.results, places, points, buffers, strict=True):
            self._receive(result, place, at_all, buffer, rows)


__all__ = ["Lowering", "LoweringError", "lower", "row_dtype"]
