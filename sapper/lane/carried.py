"""Sequential loops and branches, with the values that they carry.

Enters: `tiles` and `each` that are not parallel, `if`. Leaves: loops and branches of lane IR. Holds: a carried value is
a scalar, or rows where all its axes are resident, or else a scratch buffer, which the body overwrites in place where
nothing reads the old value later, and to which the new one is copied where something does.
"""

from __future__ import annotations

from collections.abc import Collection
from math import lcm, prod

from ..ir.nodes import Block, Op, Value
from ..ir.types import S64, RowType, TileType, f32
from ..tile.plan import LATE, Walk, axes_of, is_scalar_integer, plan_block
from .extents import Range
from .nests import NestLowering
from .prefetches import LINE_BYTES
from .register_factors import BESIDE_SUMS, FEW_AT_ONCE, MOST_WHOLE_VECTORS, STAGE_ROWS
from .residents import RESIDENT_VECTORS
from .state import Access, Capacity, Open, element_bytes
from .stream_prefetches import StreamPrefetches

SEQUENTIAL_TILE, MOST_SEQUENTIAL = 64, 512
"""Default size of a sequential tile: its intermediate tiles then stay in L1; and the most where a few rows meet it."""


class CarriedLowering(NestLowering, StreamPrefetches):
    """Emits sequential loops and branches. Subclasses emit blocks."""

    def block(self, block: Block, yields_kept: frozenset[int] = frozenset(), top: bool = False) -> None:
        raise NotImplementedError("control emits blocks")

    def _place(self, value: Value) -> str:
        t = value.type
        assert isinstance(t, TileType)
        if is_scalar_integer(value):
            return "scalar"
        if all(a in self.bound and self.bound[a].resident for a in t.axes):
            return "rows"
        return "buffer"

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

    # Loops.

    def sequential_tile(self, body: Block, axis: str, r: Range) -> int:
        """The size of a sequential tile that the schedule leaves open: where few rows meet what it reads, as many
        coordinates as have room for their products in an eighth of L1. Each tile begins two streams from memory, of
        keys and of values. Measured on a Zen 4, attention of 8 x 4 heads to 4096 positions in f32, from memory: 64,
        128, 256 and 512 positions 22.3, 25.4, 25.9 and 26.8 GB/s, by two threads 39.5, 45.4, 50.4 and 51.6.

        Where registers are few, and hold a few columns of the values at a time for these rows, no more than leave half
        of L1 to the values, which are read again for the next columns, in whole steps. Measured on a Zen 3, of the time
        by 256 positions, 8 x 4 heads of 128 and 4096 positions, 32, 48, 64 and 96: bf16 0.89, 0.88, 0.89 and 0.96, from
        memory 1.03, 0.94, 0.98 and 1.09, f32 0.76, 0.78, 0.83 and 0.78; heads of 64 in f32 0.94, 0.87, 0.86 and 0.88.
        One head of 64, of which registers hold a row, 48 and 96: 1.06 and 1.03, f32 1.11 and 1.07; of 128 0.92 to 1.1.
        Rows of 128 in f32, of which half of L1 has no room for 48, by 30 and 24, of the time by 48, while others work
        on the machine: 8 x 4 heads 0.93 and 0.93, 4 x 8 heads 0.89 and 1.44 (fewer rows than are many), 12 x 2 0.94 and
        0.96, 8 x 4 and 512 positions 0.92 and 0.89.
        r: no tile is longer than it typically is."""
        products = [axes_of(op.result) for op in body.ops if op.name == "contract" and axis in axes_of(op.result)]
        rows = [[a for a in axes if a != axis] for axes in products]
        known = all(a in self.bound or a in self.open for axes in rows for a in axes)
        if self.facts.many_workers or not rows or not known:
            return SEQUENTIAL_TILE
        vectors = max((bound.count for bound in self.bound.values() if bound.lane), default=1)
        if self.sixteen_registers and vectors > RESIDENT_VECTORS:
            # Whole steps of as many rows as have sums, and whole lines of what is loaded a line at a time.
            unit = lcm((self.facts.vector_registers - BESIDE_SUMS) // vectors, LINE_BYTES // f32.size_bytes)
            return max(unit, SEQUENTIAL_TILE // unit * unit)
        product_bytes = f32.size_bytes * max(prod(map(self.extent_hint, axes)) for axes in rows)
        fitting = min(MOST_SEQUENTIAL, r.hint, self.near_bytes // 8 // product_bytes)
        if r.capacity is not None and not r.capacity.dims:
            fitting = min(fitting, r.capacity.constant)
        read_bytes = self._read_by_columns(body, axis) if self.sixteen_registers else 0
        if read_bytes:
            step = (self.facts.vector_registers - BESIDE_SUMS) // FEW_AT_ONCE
            unit, fitting = lcm(step, LINE_BYTES // f32.size_bytes), min(fitting, self.near_bytes // 2 // read_bytes)
            least = -(-STAGE_ROWS // step) * step
            return fitting // unit * unit or max(least, fitting // step * step)
        return 1 << max(SEQUENTIAL_TILE, fitting).bit_length() - 1

    def _read_by_columns(self, body: Block, axis: str) -> int:
        """Bytes of a row along `axis` of what contractions over it read for a few of its columns at a time, and again
        for the next ones. Not for a single other, which memory bounds, nor for lanes that loops around hold: those meet
        columns one by one, of which a line serves many."""
        most = 0
        for op in body.ops if not any(bound.lane for bound in self.bound.values()) else ():
            axes = axes_of(op.result) if op.name == "contract" and axis in op.attributes["over"] else ()
            columns = max((a for a in axes if a in self.open), key=self.extent_hint, default=None)
            if columns is None:
                continue
            others, vectors = {a for a in axes if a != columns}, -(-self.extent_hint(columns) // self.lanes)
            met = prod(map(self.extent_hint, others))
            if met == 1 or (vectors <= MOST_WHOLE_VECTORS and vectors * met <= self.facts.vector_registers):
                continue
            sizes = [element_bytes(v.type.dtype) for v in op.operands  # type: ignore[union-attr]
                     if columns in axes_of(v) and not others & set(axes_of(v))]
            most = max(most, *(self.extent_hint(columns) * size for size in sizes), 0)
        return most

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
                carried += self.first_rows(op, i, first, at_all)
            else:
                kept.add(i)
                buffers[i] = self._initial_buffer(argument, first)
        for r in ranges:
            if r.axis is not None:
                self.followed.settable.add(("tile", r.axis))
                if r.axis not in self.sequential_tiles:
                    chosen = self.schedule.tile.get(r.axis)
                    self.sequential_tiles[r.axis] = chosen or self.sequential_tile(body, r.axis, r)
                r.step = self.sequential_tiles[r.axis]

        def run(k: int, values: list[Value]) -> list[Value]:
            if k == len(ranges):
                return self._iteration(body, arguments, outs, places, points, buffers, frozenset(kept), values)
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
            self.streaming_loops.append((body, r))
            results = run(k + 1, list(block.arguments[1:]))  # noqa: F821
            if r.counter is not None and k + 1 == len(ranges):
                self._prefetch_streams(body, r)
            self.streaming_loops.pop()
            self.effect("yield", results)
            self.leave()
            if r.axis is not None:
                del self.open[r.axis]
            loop = Op("loop", [first, last, *values], [v.type for v in values],
                      {"step": r.step, "label": r.axis or "each"}, [block], op.location)
            self.finish(loop)
            return list(loop.results)

        results = iter(run(0, carried))
        del run     # it holds itself, and so all that it reads
        for result, place, at_all, buffer in zip(op.results, places, points, buffers, strict=True):
            self._receive(result, place, at_all, buffer, results)

    def first_rows(self, loop: Op, number: int, first: Value, points: list[dict[str, int]]) -> list[Value]:
        """What the carried value of that number is before a loop, at some points."""
        return [self.row(first, at) for at in points]

    def _iteration(self, body: Block, arguments: list[Value], outs: list[Value], places: list[str],
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
        for argument, out, place, at_all in zip(arguments, outs, places, points, strict=True):
            if place == "scalar":
                results.append(self.value(self.integer(out)))
            elif place == "rows":
                for step in self._steps(argument, out, body):
                    for at in at_all:
                        self.row(step, at)
                results += [self.row(out, at) for at in at_all]
        for out in outs:
            self.carried_buffers.pop(out, None)
        return results

    @staticmethod
    def _steps(argument: Value, out: Value, body: Block) -> list[Value]:
        """The values between a carried one and the next that something is added to in turn (`acc += a * x`, and again,
        and again). Each is made at all places before the one that follows: what several places read for it, as a weight
        or a row of an image, then need not stay in a register until the last place is done with it all. None where
        walks make what is added: it lies ready for all places then."""
        members, seen = set(body.ops), set[Value]()
        if any(op.blocks or op.name in LATE for op in body.ops):
            return []

        def path(value: Value) -> list[Value] | None:
            if value is argument:
                return []
            op = value.op
            if op is None or op not in members or op.name not in ("add", "sub", "max", "min") or value in seen or (
                    axes_of(value) != axes_of(argument)):
                return None
            seen.add(value)
            found = (path(operand) for operand in op.operands)
            return next(([*before, value] for before in found if before is not None), None)

        return (path(out) or [])[:-1]

    def _in_place(self, body: Block, argument: Value, out: Value, kept: frozenset[int]) -> bool:
        """Whether the new value may overwrite the old one point by point: nothing else reads the old one later, but for
        sums in the same walk, if that comes to each point once. What walks before have kept is not made again."""
        if out is argument or out.op is None or out.op not in body.ops:
            return False
        plan = plan_block(body, self.wholes, kept, self.keeps_operand, self.has_room,
                          self.facts.requests.keep_cost)
        seen = False
        made: set[Value] = set()
        for item in plan.items:
            if isinstance(item, Walk):
                roots = item.roots()
                reads = [r for r in roots if self._reaches(r, argument, body, made)]
                if seen and reads:
                    return False
                if out in [r for r in roots if isinstance(r, Value)]:
                    seen = True
                    once = out in item.inner and set(item.axes) == set(axes_of(out))
                    if not once and any(isinstance(r, Op) and r.name != "store" for r in reads):
                        return False
                made |= {r for r in roots if isinstance(r, Value) and r is not out}
            elif seen and any(argument in inner.operands for inner in item.walk()):
                return False
        return seen

    @staticmethod
    def _reaches(root: Op | Value, argument: Value, body: Block, made: Collection[Value]) -> bool:
        """Whether a root is made of the argument, but for what is made by then."""
        members = set(body.ops)
        stack = list(root.operands) if isinstance(root, Op) else list(root.op.operands if root.op else [])
        visited: set[Value] = set()
        while stack:
            v = stack.pop()
            if v is argument:
                return True
            if v in visited or v in made or v.op is None or v.op not in members or v.op.name in LATE:
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

    # Branches.

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
