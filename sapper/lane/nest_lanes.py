"""Nests of which more than one walk is made: which axis lies across the lanes, and products that are made in blocks.

Enters: the ranges of a loop nest, the plan of its body, and what its loops inside carry. Leaves: the axis whose
neighbours are neighbours in memory; how much of it, and of another axis, registers hold; or the size of blocks whose
products lie in scratch memory (docs/choices/nests.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from math import prod

from ..ir.nodes import Block, Op, Value
from ..ir.types import f32
from ..tile.affine import affine
from ..tile.ops import memory_of
from ..tile.plan import ORDERED, Plan, Walk, axes_of
from ..tile.schedule import Panels
from .extents import Range
from .scratch import ScratchLowering
from .windows import is_near

MOST_ROWS, OPERAND_REGISTERS = 12, 6
"""Rows at once of sums that a loop scales and carries, and how many registers are left for what they are made of."""

CHUNK_ROWS, CHUNK_COLUMNS, FEWEST_IN_CHUNK = 128, 512, 32
"""Most rows and columns at once of products that walks pass on in scratch memory: each stages the other matrix; and the
fewest that these are cut down to."""

CHUNKS = 4
"""Blocks of such products from which on workers share them well enough."""

MOST_APART = 4
"""Elements between those of neighbouring lanes that still lie in few lines."""

NEST_VECTORS = 4
"""Vectors across the lanes of what loops inside carry, or walks pass on, where the axis is one of neighbours in memory:
as many chains that do not wait for each other, and as many lines at once of each row that is read."""


WINDOW_ROWS, WINDOW_VECTORS = 4, 2
"""Rows and vectors of sums of which each reads what is its own. Measured on a Zen 4, windows of 3 x 3 of 56 x 56 f32,
in us, one row of 4, 2 vectors 385, 342, two of two 334, four of 1, 2, 4 296, 291, 298, eight of one 292."""


class NestLanes(ScratchLowering):
    """Chooses lanes, registers and blocks of nests."""

    @staticmethod
    def _is_plain(op: Op) -> bool:
        """Whether a loop carries nothing and has no control inside: its axes may be walked like those of `whole`."""
        return not op.results and not any(o.blocks or o.name in ORDERED for o in op.blocks[0].ops)

    def _chunks_of_products(self, ranges: list[Range], plan: Plan, carried: bool = False) -> dict[str, int]:
        """How much at once of the axes of a nest that products of matrices span, and pass on to other walks: in
        registers these would meet the other matrix row by row. Half of the second cache holds what is passed on.
        carried: loops inside may carry their sums."""
        control = [item for item in plan.items if isinstance(item, Op) and item.blocks]
        if self.facts.many_workers or any(not self._is_plain(op) and not (carried and op.results) for op in control):
            return {}
        if any(r.axis is not None and self._carries_contractions(r.axis, plan) for r in ranges):
            return {}
        hints = {r.axis: r.hint for r in ranges if r.axis is not None}
        inside = [op for item in control for op in item.walk()]
        products = [op for op in (*(op for walk in plan.items if isinstance(walk, Walk) for op in walk.reductions),
                                  *inside) if op.name == "contract"]
        rows = {a for op in products for value, other in (op.operands, op.operands[::-1])
                for a in axes_of(value) if a not in axes_of(other) and len(axes_of(other)) > 1} & hints.keys()
        if not rows or not (plan.crossing & rows or inside):
            return {}
        first, *_ = spanned = [a for a in hints if a in rows]
        chunks = {a: min(hints[a], CHUNK_ROWS if a == first else CHUNK_COLUMNS) for a in spanned}
        beside = prod(r.hint for r in ranges if r.axis not in rows)
        for axis in sorted(chunks, key=lambda a: a == first):     # columns are parted first: each is staged but once
            while beside * prod(-(-hints[a] // n) for a, n in chunks.items()) < CHUNKS and (
                    chunks[axis] >= 2 * FEWEST_IN_CHUNK):
                chunks[axis] //= 2

        def size_bytes(value: Value) -> int:
            return f32.size_bytes * prod(chunks.get(a) or self._whole_hint(a) or 1 for a in axes_of(value))

        passed = sum(size_bytes(value) for value in (*plan.kept, *(v for op in control for v in op.results)))
        for axis in chunks:
            while passed > self.facts.l2_bytes // 2 and chunks[axis] > self.lanes:
                chunks[axis], passed = chunks[axis] // 2, passed // 2
        return {a: -(-n // self.lanes) * self.lanes for a, n in chunks.items()}

    @staticmethod
    def _joins_slots(plan: Plan) -> bool:
        """Whether loops inside multiply elements of which a lane takes several: a copy joins these for many rows."""
        products = [op for item in plan.items if isinstance(item, Op) for op in item.walk() if op.name == "contract"]
        return any(v.type.dtype.bits < f32.bits for op in products for v in op.operands)  # type: ignore[union-attr]

    def _neighbours(self, ranges: list[Range], plan: Plan, body: Block, nested: bool) -> str | None:
        """The axis of a nest along which most of what its loops and walks read and write lies side by side, more than
        along any axis inside; None where there is none, or lanes are taken. What has fewer elements than a lane's share
        of the largest, as a number for each row beside the rows, does not count: gathered, it takes less. nested: there
        are loops inside, whose values take a lane each, even if their elements are gathered, unless an axis inside
        may."""
        if any(b.lane for b in self.bound.values()) or self.reads_panels(body) or any(
                r.axis is not None and self._carries_contractions(r.axis, plan) for r in ranges):
            return None
        found: Counter[str] = Counter()
        hints = {r.axis: r.hint for r in ranges if r.axis is not None}
        accesses = list(self._accesses(body, 1, hints))
        most = max((elements for _, elements in accesses), default=0)
        for op, elements in accesses:
            if elements * self.lanes >= most:
                found.update(self._steps_of(op))
        walked = {axis: extent for axis, extent in hints.items() if extent > 1}
        best = max(found, key=lambda axis: (found[axis], walked.get(axis, 0)), default=None)
        if best is not None and best not in walked:
            best = self._lanes_of_state(best, walked.keys(), found, body) or best
        if best not in walked or self.schedule.lane not in (None, best):
            return None
        gathers = nested and found.keys() <= walked.keys() and not (
            self.facts.many_workers or self._loops_along_memory(body))
        return best if found[best] > 0 or gathers else None

    def _accesses(self, body: Block, rounds: int, hints: Mapping[str, int]) -> Iterator[tuple[Op, int]]:
        """Loads and stores, each with how many elements it has in all, typically. hints: extents of the axes walked."""
        for op in body.ops:
            if op.name in ("load", "store"):
                axes = {axis for index in op.operands[1 if op.name == "load" else 2:] for axis in axes_of(index)}
                yield op, rounds * prod(hints.get(axis) or self._whole_hint(axis) or 1 for axis in axes)
            ends = op.operands[:2 * op.attributes["count"]] if op.name == "each" else ()
            inside = rounds * prod(self._extent_hint(*pair) for pair in zip(ends[::2], ends[1::2], strict=True))
            for block in op.blocks:
                yield from self._accesses(block, inside, hints)

    def reads_panels(self, body: Block) -> bool:
        """Whether a packed tensor is read in a nest: the columns of its panels lie across the lanes."""
        return any(op.name == "load" and isinstance(self.stride_classes.get(memory_of(op.operands[0]).name), Panels)
                   for outer in body.ops for op in outer.walk())

    @staticmethod
    def _lanes_of_state(inner: str, walked: Collection[str], found: Mapping[str, int], body: Block) -> str | None:
        """The axis of a nest to which an axis inside leaves the lanes, though more lies side by side along that one:
        where loops carry a state over both, sum it along the inner one, and read nothing that spans both. Each lane has
        sums of its own then, and what lies along the inner axis is read an element for all lanes. Measured on a Zen 3,
        gated delta rule of 4 heads, 64 x 64, 256 tokens: 8.2 and 1.6 ms."""
        ops = [op for outer in body.ops for op in outer.walk()]
        states = {a for op in ops if op.name in ("each", "tiles") for v in op.results
                  if inner in axes_of(v) for a in axes_of(v) if a in walked and found[a] > 0}
        sums = any(op.name in ("contract", "reduce") and inner in op.attributes["over"]
                   and states.intersection(axes_of(op.result)) for op in ops)
        spanned = [{a for v in op.operands[1:] for a in axes_of(v)} for op in ops if op.name in ("load", "store")]
        if len(states) != 1 or not sums or any(inner in axes and states & axes for axes in spanned):
            return None
        return states.pop()

    def _steps_of(self, op: Op) -> dict[str, int]:
        """Of each axis that an access goes along: 1 if its neighbours are neighbours in memory, 0 if they lie near each
        other there (sapper/lane/windows.py), else -1."""
        found: dict[str, int] = {}
        unit = self._unit_dimension(op.operands[0])
        for dimension, index in enumerate(op.operands[1 if op.name == "load" else 2:]):
            form = affine(index)
            for axis in axes_of(index):
                step = form.axes.get(axis, 0) if form is not None and dimension == unit else 0
                taken = dimension == unit and op.name == "load" and self.picks(op) and is_near(index, axis)
                near = 1 if step == 1 else 0 if taken or 1 < step <= MOST_APART else -1
                found[axis] = min(near, found.get(axis, 1))
        return found

    def _loops_along_memory(self, body: Block) -> bool:
        """Whether loops inside, of more than a few rounds, go along neighbours in memory."""
        counters = {counter for outer in body.ops for loop in outer.walk() if loop.name == "each"
                    for counter, stop in zip(loop.blocks[0].arguments, loop.operands[1::2], strict=False)
                    if stop.op is None or stop.op.name != "const" or stop.op.attributes["value"] > self.lanes}
        for op in (inner for outer in body.ops for inner in outer.walk() if inner.name in ("load", "store")):
            unit = self._unit_dimension(op.operands[0])
            form = affine(op.operands[unit + (1 if op.name == "load" else 2)]) if unit is not None else None
            if form is not None and not counters.isdisjoint(form.scalars):
                return True
        return False

    def _unit_dimension(self, tensor: Value) -> int | None:
        """The dimension of a tensor along which neighbours are neighbours in memory, if one is known to be."""
        view = tensor.op
        if view is not None and view.name == "buffer":
            return len(view.operands) - 1
        if view is None:
            strides = self.stride_classes.get(tensor.name, "contiguous")
            if strides == "contiguous":
                return len(tensor.type.dims) - 1  # type: ignore[union-attr]
            return strides.index(True) if isinstance(strides, tuple) and True in strides else None
        source, groups = self._unit_dimension(view.operands[0]), view.attributes["groups"]
        if view.operands[0].type.dtype.size_bytes != view.result.type.dtype.size_bytes:  # type: ignore[union-attr]
            return len(view.operands) - 2
        merged = made = 0
        for axes, count in groups:
            merged, made = merged + axes, made + count
            if source == merged - 1:
                return int(made) - 1 if count else None
        return None

    def _sums_across(self, across: str, ranges: list[Range], plan: Plan) -> dict[str, int]:
        """Vectors of the axis across the lanes, and coordinates of another one, of what loops inside carry, where they
        read for all of the other axis the same: as many as registers hold, so that what is read serves several."""
        loops = [loop for item in plan.items if isinstance(item, Op) for loop in item.walk() if loop.results]
        carried = max((loop.results for loop in loops), key=len, default=[])
        hints = {r.axis: r.hint for r in ranges if r.axis is not None}
        rows = {a for value in carried for a in axes_of(value) if a in hints} - {across}
        read = [set(axes_of(op.result)) for loop in loops for op in loop.walk() if op.name == "load"]
        shared = {a for a in rows if any(across in axes and a not in axes for axes in read)}
        # Of several other axes one may be such: output channels, beside lines of an image.
        beside = rows if len(rows) == 1 else shared
        if len(beside) != 1 or not all({across, *rows} <= set(axes_of(value)) for value in carried):
            return {}
        (axis,) = beside
        most = max(1, (self.facts.vector_registers - OPERAND_REGISTERS) // len(carried))
        if not shared:
            full = any(r.axis == across and r.divisor % (NEST_VECTORS * self.lanes) == 0 for r in ranges)
            if full or len(carried) > 1 or not any({across, axis} <= axes for axes in read):
                return {}
            # Nothing is read for several, as of a window: as many as do not wait for each other, in what is left of
            # columns, too. Full lines are best read one row after another.
            vectors = min(WINDOW_VECTORS, max(1, hints[across] // self.lanes))
            return {across: vectors, axis: max(1, min(WINDOW_ROWS, most // vectors, hints[axis]))}
        found = []
        for vectors in (1, 2, NEST_VECTORS):
            if vectors == 1 or (vectors <= most and vectors * self.lanes <= hints[across]):
                at_once = max(1, min(most // vectors, MOST_ROWS, hints[axis]))
                found.append((vectors * at_once / (vectors + at_once), vectors, at_once))
        _, vectors, at_once = max(found)
        return {across: vectors, axis: at_once}

    def _vectors_of_nest(self, r: Range, plan: Plan) -> int:
        """Vectors at once of an axis across the lanes: what loops inside carry takes half of the registers at most."""
        carried = max((len([v for v in loop.results if r.axis in axes_of(v)]) for item in plan.items
                       if isinstance(item, Op) for loop in item.walk() if loop.results and loop.blocks), default=1)
        fitting = min(NEST_VECTORS, self.facts.vector_registers // 2 // max(1, carried), r.hint // self.lanes)
        return 1 << max(1, fitting).bit_length() - 1

    @staticmethod
    def _carries_contractions(axis: str, plan: Plan) -> bool:
        """Whether a loop inside, or inside a loop over pages, gives a tile of scores over this axis and its own again
        and again (attention): with the axis across lanes no lane ever needs another, so that maxima and sums of scores
        are plain vectors."""
        return any(inner.name == "contract" and axis in axes_of(inner.result)
                   and set(axes_of(inner.result)) & set(loop.attributes["axes"])
                   for item in plan.items if isinstance(item, Op) for loop in item.walk()
                   if loop.name == "tiles" and loop.results for inner in loop.walk())
