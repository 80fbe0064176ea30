"""Tile IR -> lane IR: functions, their parts and blocks.

Enters a tile IR function (canonical: reductions are whole), a schedule, the target's facts and the specialisation;
leaves a lane IR function with the attributes `lanes`, `slots`, `scratch` (see scratch.py), `counters` and `tasks` (a
list for each parallel loop, see `TaskLowering._most_tasks`; empty when unknown). Parallel loops at the top become
`tasks`; the parts of a function (sapper/tile/parts.py) wait for each other at a `barrier`. What control is made of has
a file each:

    extents.py             what is known of extents
    scratch.py             scratch memory
    nest_lanes.py          lanes of nests, and products in blocks
    residents.py           axes that stay in registers
    nests.py               nests of parallel loops
    nest_panels.py         what all rows of a nest read, copied a few columns at a time
    tasks.py               parallel loops as tasks
    carried.py             sequential loops, branches, and what they carry
    stream_prefetches.py   memory that such loops ask for early
    kept_tiles.py          what such loops make that later runs of them find
    unpacked.py            weights that are unpacked before rows meet them
    depth_parts.py         loops over weights that many rows walk part by part

Walks are in walk.py; the ops that go along an axis in order in ordered.py; late walks in late.py; products on matrix
instructions in matrix.py, groups.py, sums_memory.py and chained.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from threading import Lock
from typing import TYPE_CHECKING, Any

from ..ir.nodes import Block, Function, Op, Value
from ..ir.scratch import constant_bytes
from ..ir.types import S64, TensorType, TileType, f32
from ..lang.by_hand import CONTRACTIONS, PIECES, PRODUCTS, block_names, pieces_named
from ..tile.as_matrices import is_matrices, multiply_as_matrices
from ..tile.block_scales import join_blocks
from ..tile.chained_axes import keep_columns_whole
from ..tile.clamps import FEWEST_VECTORS, part_clamps
from ..tile.counter_axes import spread_counters
from ..tile.float_parts import part_floats
from ..tile.gathered_operands import bring_gathered
from ..tile.group_columns import lift_columns
from ..tile.hoist import hoist_operands
from ..tile.hoist_functions import WEIGHT_TRIPS, extent_of, hoist_functions, is_weight, trips_of
from ..tile.indices_together import take_together
from ..tile.interchange import interchange
from ..tile.joined_depths import join_depths
from ..tile.joined_lines import join_lines
from ..tile.joined_products import part_joined_products
from ..tile.long_sums import share_long_sums
from ..tile.loop_products import join_loops
from ..tile.nests import part_nests
from ..tile.parts import copy_function, split_parts
from ..tile.plan import (
    COSTLY,
    LATE,
    ORDERED,
    Late,
    Plan,
    Walk,
    axes_of,
    early_scalars,
    is_scalar_integer,
    ops_behind,
    plan_block,
)
from ..tile.product_parts import axes_brought, lift_extents, part_products
from ..tile.schedule import DimClass, Facts, LoweringError, Panels, Schedule, ScheduleError, Specialization
from ..tile.several_depths import loop_over_depths
from ..tile.shared_operands import share_operands
from ..tile.short_axes import write_out_short_axes
from ..tile.sums import share_sums
from ..tile.turned_operands import turn_gathered
from ..tile.unroll import unroll
from ..tile.widened_operands import widen_operands
from ..tile.wraps import part_wraps
from .axis_loops import WalkChoice
from .computed_pieces import find_computed
from .depth_parts import DepthParts
from .extents import Range, hint, may_be_negative
from .followed import Followed
from .late import LateWalk
from .matrix import FEWEST, SPLIT_DTYPES
from .nest_panels import NestPanels
from .ops import TASK_COUNTERS
from .ordered import OrderedLowering
from .pieces import CHUNK_BYTES, ELEMENT_BYTES
from .register_factors import FEW_AT_ONCE, STAGE_ROWS
from .tasks import TaskLowering
from .tile_bound import dtype_of
from .tile_fit import on_tiles
from .widened_rows import WidenedRows
from .windows import PAIR_STRIDES, PICKED, STRIDES

if TYPE_CHECKING:
    from .layout import Layout

FRAMES_OF_OP, FRAMES_BESIDE = 40, 1000
"""Python's frames for each of a chain of ops that need each other (22 of elementwise ones), and all others."""

LONG_REDUCTION = 16384
"""Typical extent from which on a reduction at the top of a kernel is shared among workers."""

WARPS_AT_WORK = 16
"""For how many warps of each processor of a GPU long sums are shared: with some KB of each on their way, memory is read
at its speed (an A100 has 1.5 TB/s, which is 8 KB for each processor in 600 ns)."""

MOST_PASSED_BYTES = 1 << 32
"""By typical extents, of what such loops pass to others: scores of 8 x 8 heads by 2048 x 2048 positions twice. An H100
has 80 GB."""

MOST_OPERAND_BYTES, MOST_BESIDE = 1 << 28, 2
"""The same of elements computed for products on a CPU: f32 of 8192 x 8192; and, where the function also sums or orders,
in units of its largest tensor: no scores of all queries and positions."""

COPY_CACHES = 2
"""How many second caches a copy fills that a worker makes for itself of an operand of a product. Measured on a Zen 3,
half of one to four make no difference beyond that of two runs."""

MOST_CONSTANT_BYTES, FEWER_STAGED_ROWS = 1 << 26, (252, 28)
"""Scratch memory of a worker that no extent of a call makes less, and how many rows a task has at most where it would
be more: what is kept for several axes has room for so many of each."""

SHORT_LINE_VECTORS = 3
"""Vectors of f32 that a line has at most, typically, for those that follow each other in memory to be joined where
elements are computed one by one. On a Zen 3 rows of 64 f32 gain nothing."""

NO_TILE = "the kernel has no contraction that is walked in such tiles"
"""Why a micro-kernel is not used, where nothing else is known."""
NO_FRAGMENTS = "the kernel has no contraction on matrix instructions of single warps"
"""The same of products of fragments."""


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
    facts = schedule.steered(facts)
    lanes = lanes_of(function, facts)
    parted = _lower_in_parts(function, schedule, facts, specialization, lanes)
    function, lowered = parted or (function, Lowering(function, schedule, facts, specialization, lanes).run())
    for rows in FEWER_STAGED_ROWS:
        if constant_bytes(lowered.attributes["scratch"]) <= MOST_CONSTANT_BYTES:
            break
        again = Lowering(function, schedule, facts, specialization, lanes)      # what was rewritten stays as it is
        again.staged_rows = rows
        lowered = again.run()
    return lowered


def _lower_in_parts(function: Function, schedule: Schedule, facts: Facts, specialization: Specialization,
                    lanes: int) -> tuple[Function, Function] | None:
    """The function with floats in parts, and what it becomes, where tile registers then take all of its products."""
    if facts.tiles is None or schedule.matrix is False or schedule.registers:
        return None
    parted = copy_function(function)
    if not part_floats(parted):
        return None
    lowering = Lowering(parted, schedule, facts, specialization, lanes)
    lowered = lowering.run()
    contractions = {op for op in lowering.function.walk() if op.name == "contract"}
    return (parted, lowered) if contractions <= lowering.in_slots else None


class _Depth:
    """Python's limit of recursion while functions are lowered, in any thread: as before when the last one is done. What
    is written in Python takes no C stack."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.inside = self.before = 0

    @contextmanager
    def enough_for(self, function: Function) -> Iterator[None]:
        """Walks may go down chains of values as long as the function."""
        needed = FRAMES_OF_OP * sum(1 for _ in function.walk()) + FRAMES_BESIDE
        with self.lock:
            if not self.inside:
                self.before = sys.getrecursionlimit()
            self.inside += 1
            sys.setrecursionlimit(max(needed, sys.getrecursionlimit()))
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if not self.inside:
                    sys.setrecursionlimit(self.before)


_DEPTH = _Depth()


def _parts(function: Function, specialization: Specialization, weight_bytes: int) -> Function:
    """The function as parts that meet at barriers; see tile/parts.py. weight_bytes: of what costs much and contractions
    of a parallel loop take as weights, so much goes through a buffer, from which panels are packed as from a tensor."""
    def is_bounded(start: Value, stop: Value) -> bool:
        return not may_be_negative(start) and (
            hint(start, specialization)[2] is not None and hint(stop, specialization)[2] is not None)

    def is_long(start: Value, stop: Value) -> bool:
        return hint(stop, specialization)[0] >= LONG_REDUCTION

    ranges = {op.attributes["axis"]: op.operands for op in function.body.ops if op.name == "whole"}
    typical = _typical(specialization)

    def is_passed(loop: Op, contraction: Op, value: Value) -> bool:
        mine = [ranges[axis] for axis in axes_of(value) if axis in ranges]
        if not is_weight(contraction, value) or len(mine) < len(axes_of(value)) or not all(
                is_bounded(*pair) for pair in mine) or not any(op.name in COSTLY for op in ops_behind(value)):
            return False
        size_bytes = prod(extent_of(typical, *pair) for pair in mine) * dtype_of(value).size_bytes
        return size_bytes <= weight_bytes and trips_of(loop, typical) >= WEIGHT_TRIPS

    return split_parts(function, is_long, is_bounded, is_passed)


def lanes_of(function: Function, facts: Facts) -> int:
    """Lanes of a row: fewer on most targets where the function has 64-bit elements."""
    return facts.lanes_of_wide_rows if has_wide_rows(function) else facts.lanes


def result_layouts(function: Function, schedule: Schedule, facts: Facts,
                   specialization: Specialization) -> dict[Op, Layout]:
    """Where each reduction or contraction of a canonical function keeps its results, as `lower` would choose.

    A walk that is lowered several times, once for each tail, is reported where it holds the most registers.
    """
    found: dict[Op, Layout] = {}
    facts = schedule.steered(facts)
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


def _says_nothing(schedule: Schedule) -> bool:
    """Whether a schedule leaves it to the model how loops are walked."""
    return schedule == Schedule(assembly=schedule.assembly, chunks=schedule.chunks, requests=schedule.requests,
                                lanes=schedule.lanes)


def _halves_for_rows(facts: Facts) -> bool:
    """Whether to take slots of bf16 apart for each row that meets them costs much: a shift may take one of two pipes
    that multiply, and registers hold the sums of few vectors by which each half is met. Measured on a Zen 3, fp8 in
    slots, of the time: 128 rows by 4096 x 4096 0.72, 32 by 2048 x 2048 0.70, 512 0.77, 128 for gate and up 0.89."""
    return facts.fma_per_cycle >= 2 and facts.vector_registers <= 16 and "fma2_bf16" in facts.split_dots


def _typical(specialization: Specialization) -> Callable[[Value], int | None]:
    """What gives a typical value of an index scalar; None where nothing bounds it before the kernel runs."""
    def typical(value: Value) -> int | None:
        typical, _, most = hint(value, specialization)
        return None if most is None else typical

    return typical


def _lanes_step(facts: Facts, specialization: Specialization) -> Callable[[Value, int], bool]:
    """Whether neighbouring lanes may well be so many elements of a tensor apart: threads at any distance, others where
    lanes take elements of rows. Those of 64 bits would be gathered: rows of 3 and 4 of f64 take 1.05 to 1.2 of the time
    on a Cascade Lake then."""
    def may(tensor: Value, elements: int) -> bool:
        dtype = tensor.type.dtype  # type: ignore[union-attr]
        steps = STRIDES if facts.picks and dtype in PICKED else PAIR_STRIDES
        return facts.many_workers or (
            elements in steps and specialization.strides.get(tensor.name, "contiguous") == "contiguous")

    return may


class Lowering(TaskLowering, DepthParts, NestPanels, WidenedRows, OrderedLowering):
    """Emits a function: its parts, their blocks, and the walks and control ops of these."""

    def __init__(self, function: Function, schedule: Schedule, facts: Facts, specialization: Specialization,
                 lanes: int, as_it_is: bool = False) -> None:
        share_sums(function, facts.joins, lambda value: hint(value, specialization)[0])
        interchange(function)
        if not facts.many_workers and not as_it_is and _says_nothing(schedule):
            join_lines(function, _typical(specialization), lambda tensor: specialization.strides.get(
                tensor.name, "contiguous") == "contiguous", SHORT_LINE_VECTORS * lanes)
        write_out_short_axes(function, lanes // 2, lanes // 4 * facts.many_workers, _lanes_step(facts, specialization),
                             {schedule.lane, *schedule.tile, *schedule.registers, *schedule.order, *schedule.chunks},
                             {name for name, kind in specialization.strides.items() if isinstance(kind, Panels)})
        if facts.many_workers:
            part_nests(function)
        else:
            part_wraps(function)
            share_operands(function)
            spread_counters(function)
            if not as_it_is and _says_nothing(schedule):
                bring_gathered(function, _typical(specialization), STAGE_ROWS, MOST_OPERAND_BYTES, "mul")
                typical = _typical(specialization)

                def is_contiguous(tensor: Value) -> bool:
                    return specialization.strides.get(tensor.name, "contiguous") == "contiguous"

                part_joined_products(function, typical, STAGE_ROWS, MOST_OPERAND_BYTES, lambda loop: is_matrices(
                    function, loop, typical, is_contiguous, STAGE_ROWS))
                multiply_as_matrices(function, typical, is_contiguous, STAGE_ROWS, COPY_CACHES * facts.l2_bytes)
            unroll(function, (lambda value: hint(value, specialization)[0]) if facts.requests.blocks_written_out
                   else None)
            part_clamps(function, FEWEST_VECTORS * lanes, _typical(specialization))
            hoist_functions(function, _typical(specialization), facts.l2_bytes // 4)
        hoist_operands(function)
        if facts.many_workers and not as_it_is:
            self._prepare_products(function, schedule, facts, specialization, lanes)
            self._share_long_sums(function, schedule, facts, specialization)
        elif not as_it_is:
            if facts.tiles is not None and schedule.matrix is not False:
                take_together(function, partial(on_tiles, facts.tiles))
            self._compute_operands_once(function, schedule, specialization)
            if facts.shared_pipes or _halves_for_rows(facts):      # to widen takes a multiply-add's place
                widen_operands(function, _typical(specialization), FEW_AT_ONCE + 1, STAGE_ROWS, MOST_OPERAND_BYTES)
        weight_bytes = 0 if facts.many_workers else facts.l2_bytes // 4
        super().__init__(_parts(function, specialization, weight_bytes), schedule, facts, specialization, lanes)
        self.block_loads = []
        self.asking = []
        self.in_slots = set()
        self.streaming_loops = []
        self.pending_buffers = {}
        self.turned = {}
        self.carried_buffers = {}
        self.unpacked_places = {}
        self.sequential_tiles = {}
        self.stage_memory = {}
        self.read_in_rows = set()
        self.panel_memory = {}
        self.chunked = frozenset()
        self.scratch_sizes = []
        self.scratch_end = 0
        self.shared_sizes = []
        self.shared_end = 0
        self.counters = 0
        self.task_counts = []
        self.followed = Followed()
        if not as_it_is:
            self._check_schedule()

    @staticmethod
    def _prepare_products(function: Function, schedule: Schedule, facts: Facts, specialization: Specialization,
                          lanes: int) -> None:
        """Have products that matrix instructions can take as loops of their own, and loops that add them up as single
        ones, if the schedule says nothing of how loops are walked, and not all is one walk that they take as it is."""
        unit = facts.matrix
        if unit is None or schedule.matrix is False or schedule.registers or schedule.tile or not any(
                op.name == "contract" for op in function.walk()):
            return

        def whole() -> Lowering:
            lowering = Lowering(function, schedule, facts, specialization, lanes, as_it_is=True)
            lowering.find_matrix_walk()
            return lowering

        def is_one_product() -> bool:
            lowering = whole()
            return lowering.warps > 1 and lowering.part is function.body

        if lift_columns(function, lambda: whole().nest is not None) or is_one_product():
            return
        contiguous = all(specialization.strides.get(tensor.name, "contiguous") == "contiguous"
                         for tensor in function.tensors())
        if contiguous and (join_blocks(function, unit.depth * ELEMENT_BYTES, is_one_product)
                           or join_depths(function, is_one_product)):
            return
        dtypes = {*unit.dtypes, *SPLIT_DTYPES}

        typical = _typical(specialization)

        def fits(value: Value, depth: str) -> bool:
            """Bytes only where they can be copied as they lie, 16 at once."""
            t, load = value.type, value.op
            assert isinstance(t, TileType)
            if t.dtype.name not in unit.byte_dtypes or load is None or load.name != "load":
                return t.dtype.name in dtypes
            name, dims = load.operands[0].name, load.operands[0].type.dims  # type: ignore[union-attr]
            last = dims[-1]
            divisor = last if isinstance(last, int) else \
                specialization.dims.get(last, DimClass()).divisor if isinstance(last, str) else 1
            return name in specialization.aligned and specialization.strides.get(name, "contiguous") == "contiguous" \
                and divisor % CHUNK_BYTES == 0 and depth in axes_of(load.operands[-1])

        def is_product(op: Op, extents: Mapping[str, int]) -> bool:
            over: list[str] = op.attributes["over"]
            outer = axes_of(op.result)
            return len(outer) == 2 and all(
                len(axes_of(v)) == 1 + len(over) and fits(v, over[-1]) for v in op.operands
            ) and min(extents[axis] for axis in (*outer, over[-1])) >= FEWEST

        def has_few_rows() -> bool:
            """Lanes along the depth then read all operands of a product in runs (runs.py)."""
            ends = {axis: op.operands[2 * number + 1] for op in function.walk() for number, axis in enumerate(
                axes_brought(op))}
            return all(len(axes_of(op.result)) < 2 or min(typical(ends[axis]) or 1 for axis in axes_of(op.result))
                       < FEWEST for op in function.walk() if op.name == "contract")

        if contiguous and has_few_rows() and join_depths(function, lambda: True, fewest=2):
            return

        def is_made(value: Value, depth: str) -> bool:
            outer = [axis for axis in axes_of(value) if axis != depth]
            return len(outer) == 1 and dtype_of(value).name in unit.dtypes and find_computed(
                specialization.strides, value, {outer[0]: FEWEST, depth: unit.depth}) is not None

        join_loops(function, typical, is_product)
        part_products(function, typical, is_product, MOST_PASSED_BYTES, is_made)

    @staticmethod
    def _share_long_sums(function: Function, schedule: Schedule, facts: Facts, specialization: Specialization) -> None:
        """If the schedule says nothing of how loops are walked."""
        if facts.matrix is not None and schedule == Schedule(assembly=schedule.assembly):
            share_long_sums(function, lambda value: hint(value, specialization)[0],
                            facts.matrix.workers * WARPS_AT_WORK)

    @staticmethod
    def _compute_operands_once(function: Function, schedule: Schedule, specialization: Specialization) -> None:
        """Have elements that are computed, or gathered, for products made before these, by a loop of their own, not
        anew for each piece of rows or columns that they meet; and products over several axes as loops. Measured on a
        Zen 3, 128 x 1024 x 1024, one thread, in ms: SwiGLU's elements 63 and 3.9, weights of MXFP4 by 64 rows 16.4 and
        4.9, a maximum with 0 5.8 and 4.0. Where sums are made beside, 512 x 2048 x 2048: of a softmax 131 and 54, of
        rows that are normalised 71 and 49, and rounded to bf16 64 and 47, that are quantised to bytes 86 and 41; two
        layers, 16 rows by 2048 x 512 and back, 8.2 and 1.3."""
        late = [op for op in function.walk() if op.name in LATE]
        if not _says_nothing(schedule) or not late:
            return

        typical = _typical(specialization)
        keep_columns_whole(function, typical)

        def is_computed(value: Value) -> bool:
            """What is but gathered is copied for the product as it is."""
            op = value.op
            if op is not None and op.name == "cast":
                op = op.operands[0].op
            return op is None or op.name != "load"

        def is_product(op: Op) -> bool:
            return len(axes_of(op.result)) == 2 and all(
                len(axes_of(v)) == 1 + len(op.attributes["over"]) for v in op.operands)

        def is_of_computed(op: Op, extents: Mapping[str, int]) -> bool:
            rows = axes_of(op.result)
            return is_product(op) and any(
                is_computed(v) and all(extents[axis] >= STAGE_ROWS for axis in rows if axis not in axes_of(v))
                for v in op.operands)

        def is_parted(op: Op, extents: Mapping[str, int]) -> bool:
            """Also what a loop over rows makes all columns of, as others read them."""
            return is_of_computed(op, extents) or (is_product(op) and not wholes.isdisjoint(axes_of(op.result)))

        def extent(dim: Any) -> int:
            return dim if isinstance(dim, int) else specialization.dims.get(dim, DimClass()).hint

        def tensor_bytes(tensor: Value) -> int:
            assert isinstance(tensor.type, TensorType)
            return tensor.type.dtype.size_bytes * prod(map(extent, tensor.type.dims))

        def extents() -> dict[str, int]:
            return {axis: hint(op.operands[2 * i + 1], specialization)[0] for op in function.walk()
                    if op.name in ("tiles", "whole") for i, axis in enumerate(axes_brought(op))}

        known = extents()
        wholes = {op.attributes["axis"] for op in function.walk() if op.name == "whole"}
        if any(op.name == "contract" and is_of_computed(op, known) for op in late):
            alone = all(op.name == "contract" and is_of_computed(op, known) and all(
                dtype_of(v) is f32 for v in op.operands) for op in late)
            largest = max(tensor_bytes(argument) for argument in function.tensors())
            lift_extents(function)
            part_products(function, typical, is_parted, MOST_OPERAND_BYTES if alone else min(
                MOST_OPERAND_BYTES, MOST_BESIDE * largest))
        bring_gathered(function, typical, STAGE_ROWS, MOST_OPERAND_BYTES, "contract")
        turn_gathered(function, typical, extent, FEW_AT_ONCE + 1, MOST_OPERAND_BYTES)
        loop_over_depths(function, extents().__getitem__, STAGE_ROWS)    # loops that were parted have other axes
        part_joined_products(function, typical, STAGE_ROWS, MOST_OPERAND_BYTES)

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
                                    f"{', '.join(block_names()) or 'none, as no block is registered'}; mend: import "
                                    "the module that it is written in, or name that too, as in "
                                    "sapper.kernels.by_hand.rows:exp_by_table")
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
        with _DEPTH.enough_for(self.function):
            return self._lowered()

    def _lowered(self) -> Function:
        lowered = Function(self.function.name, "lane", self.function.location)
        lowered.body = self.entry
        self.find_matrix_walk()
        self.settle_product()
        for number, part in enumerate(self._parts()):
            self.take_part(part)
            parallel = any(op.attributes.get("parallel") for op in part.ops)
            if number:
                again = parallel and self.counters >= TASK_COUNTERS  # the counter was used by an earlier loop
                self.effect("barrier", [], **({"reset": self.counters % TASK_COUNTERS} if again else {}))
            if parallel:
                self._parallel(part)
            else:
                self._on_first_worker(lambda part=part: self.block(part))  # type: ignore[misc]
        self.followed.check(self.function, self.schedule)
        if self.caller_tiles is not None:
            self.effect("tile_release", [self.caller_tiles])
        if self.streaming_tensors & self.specialization.aligned:
            self.effect("fence_streaming", [])
        lowered.attributes = {"lanes": self.lanes, "slots": list(self.slots), "scratch": self.scratch_sizes,
                              "counters": min(self.counters, TASK_COUNTERS),
                              "tasks": [] if None in self.task_counts else self.task_counts}
        steady = self._steady()
        if steady:
            lowered.attributes["steady"] = steady
        if self.contractions or self.products:
            used = {op.attributes["by"] for op in lowered.walk() if op.name in ("asm_contract", "asm_multiply")}
            lowered.attributes["refused"] = [
                [key, self.refused.get(key, reason)] for keys, reason in (
                    (self.contractions, NO_TILE), (self.products, NO_FRAGMENTS)) for key in keys if key not in used]
        if self.reached:
            lowered.attributes["reached"] = list(map(list, self.reached))
        if self.shared_sizes:
            lowered.attributes["shared_scratch"] = self.shared_sizes
        if self.warps > 1:
            lowered.attributes |= {"warps": self.warps, "near_bytes": self.place_records(self.near_bytes_used),
                                   "near_buffers": [list(found) for found in self.near_buffers]}
        if self.few_registers:
            lowered.attributes["few_registers"] = True
        if self.caller_tiles is not None:
            assert self.facts.tiles is not None
            lowered.attributes["tile"] = self.facts.tiles.size
        if self.tensor_maps:
            lowered.attributes["tensor_maps"] = self.tensor_maps
        if self.cluster > 1:
            lowered.attributes["cluster"] = self.cluster
        return lowered

    def _steady(self) -> list[str]:
        """The slots of tensors that nothing is stored to meanwhile. Where one may be the very tensor that the function
        stores to (`in_place`), both have one dtype."""
        tensors = self.function.tensors()
        dtypes = {v.type.dtype for v in tensors if v in self.stored}    # type: ignore[union-attr]
        return [slot for v in tensors if v.type.dtype not in dtypes     # type: ignore[union-attr]
                and (slot := f"{v.name}.data") in self.slots]

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
        parted = any(op.name == "part" for op in body.ops)
        buffers = [op for op in body.ops if op.name == "buffer"]
        if parted or buffers:
            self.begin_block(body)
            for op in buffers:
                self._buffer(op)
        if not parted:
            return [body]
        return [op.blocks[0] for op in body.ops if op.name == "part"]

    # Blocks.

    def block(self, block: Block, yields_kept: frozenset[int] = frozenset(), top: bool = False) -> None:
        if self.chain is not None and block is self.chain.body:
            self.chained(block)
            self.followed.on_matrix = True
            return
        if self.nest is not None and block is self.nest.body:
            self.block_products(block)
            self.followed.on_matrix = True
            return
        if self.vectors is not None and block is self.vectors.body:
            self.panel_vectors(block)
            self.followed.on_matrix = True
            return
        self.begin_block(block)
        bound = self._bind_short_axis(block)
        self.items(block, plan_block(block, self.wholes, yields_kept, self.keeps_operand, self.has_room,
                                     self.facts.requests.keep_cost), None, top)
        if bound is not None:
            del self.bound[bound]

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

    def items(self, block: Block, plan: Plan, late: Late | None, top: bool = False) -> None:
        """The walks and control ops of a block, but for a late walk."""
        self.around_part(plan, late, lambda some, behind: self._items(block, some, behind, top))

    def _items(self, block: Block, plan: Plan, late: Late | None, top: bool) -> None:
        outer = self.block_loads, self.asking
        self.prefetch_packed(block)
        walks = [item for item in plan.items if isinstance(item, Walk)]
        self.asking = []
        if late is not None:
            self.asking = [late.host]
        elif self.facts.software_prefetch and any(
                op.name == "store" and self.goes_to_memory(op) for op in block.ops):
            storing = [w for w in walks if any(isinstance(root, Op) and self.goes_to_memory(root) for root in w.inner)]
            # Where once is enough, it is best while results leave.
            self.asking = storing if self.requests.once and storing else walks
        self.block_loads = [op for op in block.ops if op.name == "load" and op.result.type.axes]  # type: ignore[union-attr]
        items = plan.items if late is None else plan.items[:-1]
        for item, following in zip(items, [*items, None][1:], strict=True):
            if not isinstance(item, Walk) or not self.is_widened_by(item, following):
                self._item(item, top)
        self.block_loads, self.asking = outer

    def _item(self, item: Walk | Op, top: bool) -> None:
        if isinstance(item, Walk):
            if self.matrix_walk is not None:
                self.matrix(item, self.matrix_walk)
                rows, columns = self.matrix_tile()
                self.followed.add_product({self.matrix_walk.rows: rows, self.matrix_walk.columns: columns} | (
                    {self.matrix_walk.depth: self.deep} if self.groups else {}))
            else:
                self.walk(item)
            self.buffers.update(self.pending_buffers)
            self.pending_buffers.clear()
        elif item in self.shared_loops and self.matrix_walk is not None:
            self._by_warps(item)
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

    def _on_first_worker(self, body: Callable[[], None]) -> None:
        number = self.emit(0, "worker", [], S64)
        if self.warps > 1:
            number = self.value(self.add(self.mul(number, self.warps), self.warp()))
        first = self.emit(self.depth, "s_cmp", [number, self.value(0)], S64, cond="eq")
        self.fork(first, body, lambda: None)

    # Loops.

    def _as_whole(self, op: Op) -> None:
        """A parallel loop inside a task, without control inside: its axes are walked like whole axes."""
        for i, axis in enumerate(op.attributes["axes"]):
            self._open(axis, self._range(op.operands[2 * i], op.operands[2 * i + 1]))
        self.block(op.blocks[0])
        for axis in op.attributes["axes"]:
            del self.open[axis]

    def _by_warps(self, op: Op) -> None:
        """A loop beside the product of a group, which may make what that reads: each warp has its part of it. Before it
        all have left the product of the group before."""
        self.effect("sync_warps", [])
        walk, self.matrix_walk, self.warps_have_tasks = self.matrix_walk, None, True
        self._nest(op, False)
        self.matrix_walk, self.warps_have_tasks = walk, False
        self.effect("sync_warps", [])

    def _part_of_warp(self, r: Range) -> Range:
        """So many of a range as each warp has, but for the last ones."""
        size = self.ceil_div(self.extent_of(r), self.warps)
        start = self.scalar("s_min", self.add(r.start, self.mul(self.warp(), size)), r.stop)
        return replace(r, start=start, stop=self.scalar("s_min", self.add(start, size), r.stop), fixed=None,
                       hint=-(-r.hint // self.warps), divisor=1)

    def _nest(self, op: Op, tasks: bool) -> None:
        chain = self._chain(op) if op.attributes["parallel"] else [op]
        ranges = [r for o in chain for r in self._ranges(o)]
        body = chain[-1].blocks[0]
        parallel = bool(op.attributes["parallel"])
        if parallel:
            if op in self.shared_loops and self.warps_have_tasks:
                longest = max(range(len(ranges)), key=lambda number: ranges[number].hint)
                ranges[longest] = self._part_of_warp(ranges[longest])
            plan = plan_block(body, self.wholes, keep_cost=self.facts.requests.keep_cost)
            late = self._late(ranges, body, plan) if len(chain) == 1 else None
            self._residents(ranges, body, plan, late is not None)
            panels = self.panels_of_nest(ranges, body) if late is None else []
            if panels:
                ranges.sort(key=lambda r: not r.lane)
                ranges[0].panels = tuple(panels)
            ranges[-1].body = body
            if late is not None and all(r.axis is None or (r.resident == 1 and not r.lane) for r in ranges):
                ranges[-1].late = LateWalk(body, plan, late)

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
