"""Weights that take much unpacking, unpacked to scratch memory once for all rows that meet them.

Enters: a nest of parallel loops the last of which holds several rows at once, and in it loops over an index (`each`)
whose contractions multiply what is unpacked from bytes (packed.py), the same for all rows. Leaves: before the loop over
full tiles of rows, loops that store the slots of these operands in the order in which the tiles load them. What is left
of the rows unpacks them as it reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from ..ir.nodes import Block, Op, Value
from ..ir.types import ROW_B32, S64, b32, u8
from ..tile.plan import Walk, axes_of, plan_block
from .axis_loops import Carried
from .carried import CarriedLowering
from .extents import Range
from .packed import dot_for, possible_bits
from .residents import MUCH_UNPACKING, unpacking_of
from .state import Access, Capacity, Scalar

UNPACKING_BY_PARTS = 7
"""Operations for a vector of weights, those of all tiles of rows together, from which on they are unpacked once where
several instructions make a dot product of bytes (split_dots.py): these take all pipes of vectors, as unpacking does.
Measured on a Zen 3 by 1024 x 4096, four rows at once, in place of unpacking for each four: of Q6_K (4 operations) 8,
16, 32 and 128 rows have 1.10, 1.26, 1.33 and 1.34 times the speed, of Q4_0 (1.5) 16 rows 0.92, 32 1.02, 128 1.06."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Where the rows of an operand lie. first: at the start of all loops around it. counters: of these loops the
    index, where it starts, and by how many bytes it moves on. slots: rows of slots, which packed products read, and
    not of elements; where a walk takes elements after all, as of what fills no slot, it unpacks them itself."""

    first: Access
    counters: tuple[tuple[Value, Scalar, Scalar], ...]
    slots: bool


class UnpackedOperands(CarriedLowering):
    """Emits them. unpacked_places: of the operands that are in scratch memory at hand."""

    unpacked_places: dict[Value, Unpacked]

    def begin_block(self, block: Block) -> None:
        raise NotImplementedError("control begins blocks")

    def _full_tiles(self, r: Range, stop: Scalar, tile: Callable[[Value], None]) -> None:
        operands = self._worth_unpacking(r)
        if not operands:
            super()._full_tiles(r, stop, tile)
            return

        def unpacked() -> None:
            assert r.body is not None
            places: dict[Value, Unpacked] = {}
            self._store_unpacked(r.body, operands, (), places)
            self.unpacked_places = places
            super(UnpackedOperands, self)._full_tiles(r, stop, tile)
            self.unpacked_places = {}

        any_tile = self.emit(self.depth, "s_cmp", [self.value(stop), self.value(r.start)], S64, cond="gt")
        self.fork(any_tile, unpacked, lambda: None)

    def _worth_unpacking(self, r: Range) -> frozenset[Value]:
        """The operands of the contractions inside that typically meet several tiles of rows, if they take much."""
        split = "dot4_u8i8" in self.facts.split_dots
        beside = self.facts.fma_per_cycle >= 2 and not self.facts.shared_pipes     # it has pipes of its own
        if r.body is None or r.lane or r.hint < 2 * r.resident or self.facts.many_workers or (beside and not split):
            return frozenset()
        found: dict[Value, int] = {}
        known: set[str] = set()     # axes of whose extents it is known what they are

        def visit(block: Block) -> None:
            for op in block.ops:
                if op.name == "whole" and all(v.op is not None and v.op.name == "const" for v in op.operands):
                    known.add(op.attributes["axis"])
                elif self._is_entered(op):
                    visit(op.blocks[0])  # noqa: F821
                elif op.name == "contract" and dot_for(op, self.facts) is not None:
                    found.update({v: unpacking_of(v) for v in op.operands if may_be(v, op)})

        def may_be(value: Value, contraction: Op) -> bool:
            inside = set(axes_of(value)) - self.bound.keys()
            unsigned = [v for v in contraction.operands if v.type.dtype is u8]  # type: ignore[union-attr]
            lanes = inside - set(contraction.attributes["over"])
            return unsigned == [value] and r.axis not in inside and inside <= known and (
                self.schedule.lane is None or self.schedule.lane in lanes) and all(
                self._fills_vectors(self._whole_hint(axis)) for axis in lanes)

        visit(r.body)
        del visit   # it holds itself, and so all that it reads
        much = self._unpacking_from(r, split)
        return frozenset(v for v in found if sum(found.values()) >= much * len(found))

    def _unpacking_from(self, r: Range, split: bool) -> float:
        """Operations for a vector of weights from which on these are unpacked once for all rows. split: of several
        instructions that make a dot product."""
        return UNPACKING_BY_PARTS * r.resident / r.hint if split else MUCH_UNPACKING

    def _is_entered(self, op: Op) -> bool:
        """Whether an op is a loop that operands are looked for in: it carries sums, and scratch memory holds what each
        of its indices unpacks."""
        return op.name == "each" and bool(op.results) and all(
            self.hint(stop)[2] is not None for stop in op.operands[1:2 * op.attributes["count"]:2])

    def _store_unpacked(self, block: Block, operands: frozenset[Value], around: tuple[Range, ...],
                        places: dict[Value, Unpacked]) -> None:
        """Those of a block, and of the loops in it, that have no place yet."""
        self.begin_block(block)
        bound = self._bind_short_axis(block)
        plan = plan_block(block, self.wholes, frozenset(), self.keeps_operand, self.is_bounded)
        for walk in plan.items:
            read = [v for op in walk.reductions for v in op.operands] if isinstance(walk, Walk) else []
            here = list(dict.fromkeys(v for v in read if v in operands and v not in places))
            if isinstance(walk, Walk) and here and plan.kept.isdisjoint(read):  # what is kept is no slots
                self._store_walk(walk, here, around, places)
        self._store_plain(block, operands, around, places)
        for op in block.ops:
            if self._is_entered(op) and any(v in operands for inner in op.walk() for v in inner.operands):
                self._store_loop(op, self._ranges(op), operands, around, places)
        if bound is not None:
            del self.bound[bound]

    def _store_plain(self, block: Block, operands: frozenset[Value], around: tuple[Range, ...],
                     places: dict[Value, Unpacked]) -> None:
        """Those of a block that no contraction reads."""

    def _store_loop(self, op: Op, ranges: list[Range], operands: frozenset[Value], around: tuple[Range, ...],
                    places: dict[Value, Unpacked]) -> None:
        if not ranges:
            self._store_unpacked(op.blocks[0], operands, around, places)
            return
        r = ranges[0]

        def turn(index: Value) -> None:
            assert r.counter is not None
            self.scalars[r.counter], self.home[r.counter] = index, self.depth
            self.streaming_loops.append((op.blocks[0], r))
            self._store_loop(op, ranges[1:], operands, (*around, r), places)
            if len(ranges) == 1:
                self._prefetch_streams(op.blocks[0], r)
            self.streaming_loops.pop()

        self.counted("unpack", r.start, r.stop, r.step, turn)

    def _store_walk(self, walk: Walk, operands: list[Value], around: tuple[Range, ...],
                    places: dict[Value, Unpacked]) -> None:
        """The operands of a walk, which lie side by side, if it is packed."""
        packing = self._packing(walk, None)
        if packing is None:
            return
        with self.packed(packing):
            self._set_places(operands, around, places, True)

            def store(carried: Carried) -> Carried:
                for value in operands:
                    for at in self._coordinates(axes_of(value)):
                        row = self.slot_row(value, at, False)
                        address, attributes = self._unpacked_address(places[value], at)
                        self.effect("store", [row, *address], dtype=b32, masked=False, streaming=False, **attributes)
                return carried

            for axis in walk.reduced:
                store = partial(self.axis_loop, axis, 1, False, body=store)
            store([])

    def _set_places(self, operands: list[Value], around: tuple[Range, ...], places: dict[Value, Unpacked],
                    slots: bool) -> None:
        """Scratch memory for operands: [indices of the loops around][operands][coordinates][lanes]."""
        firsts: list[tuple[int, dict[str, Scalar]]] = []
        size = 0
        for value in operands:
            axes: dict[str, Scalar] = {}
            step = self.lanes * b32.size_bytes
            for axis in sorted(axes_of(value), key=lambda axis: not self._is_lane(axis)):
                count = self.bound[axis].count if axis in self.bound else self.open[axis].extent
                assert isinstance(count, int)
                axes[axis] = b32.size_bytes if self._is_lane(axis) else step
                step *= count
            firsts.append((size, axes))
            size += step
        extents: list[tuple[Capacity | int, int]] = [(size, 1)]
        counters: list[tuple[Value, Scalar, Scalar]] = []
        step_bytes: Scalar = size
        for r in reversed(around):
            assert r.counter is not None and r.capacity is not None
            counters.append((r.counter, r.start, step_bytes))
            extents.insert(0, (r.capacity, 1))
            step_bytes = self.mul(step_bytes, self._rounded(r.capacity, 1))
        base = self.scratch(extents, u8)
        for value, (disp, axes) in zip(operands, firsts, strict=True):
            places[value] = Unpacked(Access(base, disp, axes, b32, relative=True), tuple(counters), slots)

    def _is_lane(self, axis: str) -> bool:
        return axis in self.bound and self.bound[axis].lane

    def _unpacked_address(self, place: Unpacked, at: dict[str, int]) -> tuple[list[Value], dict[str, object]]:
        base = place.first.base
        for counter, start, step in place.counters:
            base = self.add(base, self.mul(self.sub(self.scalars[counter], start), step))
        return self.address(replace(place.first, base=base), at)

    def slot_row(self, value: Value, at: dict[str, int], turned: bool) -> Value:
        place = self.unpacked_places.get(value)
        if place is None:
            return super().slot_row(value, at, turned)
        level = self.level_of(value)
        memo = self.levels[level].memo
        key = ("unpacked", value, tuple([at[a] for a in axes_of(value)]))
        if key not in memo:
            operands, attributes = self._unpacked_address(place, at)
            bits = possible_bits(value) * 0x01010101
            memo[key] = self.emit(level, "load", operands, ROW_B32, dtype=b32, masked=False, bits=bits, **attributes)
        found: Value = memo[key]
        return found
