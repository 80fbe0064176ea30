"""What a walk leaves behind: stores, and values kept in scratch memory or registers for the walks after it.

Enters the roots of a walk at one piece of its axes; leaves their rows computed, and stored or kept. A walk that is done
beside this one, for other rows (late.py), comes between."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from ..ir.nodes import Op, Value
from ..ir.types import DType, TileType, bf16, bool_
from ..tile.affine import Affine, affine
from ..tile.plan import Walk, axes_of
from ..tile.sums import is_join
from .joins import Joins
from .narrow_stores import MOST_ROWS, Job
from .rows import LoweringError, Rows
from .state import PAIR, Access, Bound, Capacity, row_dtype


@dataclass(slots=True)
class Behind:
    """A walk that is done piece by piece with its host, for other rows. bound: where these are; rows, buffers: the kept
    values that it reads, of these rows."""

    host: Walk
    walk: Walk
    bound: dict[str, Bound]
    rows: dict[Value, Rows]
    buffers: dict[Value, Access]


class Stores(Joins):
    """pending_buffers, carried_buffers: where kept values lie, of the walk at hand and of loops that carry them.
    behind: what a walk does beside its own work.
    """

    pending_buffers: dict[Value, Access]
    carried_buffers: dict[Value, Access]
    behind: Behind | None = None

    def _roots(self, roots: list[Op | Value], host: Walk | None = None) -> None:
        """All rows of all roots first where the walk stores what it also loads, so that no load sees a new value. What
        is done beside the walk `host` comes between."""
        jobs: list[tuple[Op | Value, dict[str, int], Value]] = []
        squares: list[Op] = []
        joined: list[tuple[Op, dict[str, int], Value, str]] = []
        for root in roots:
            overwrites = isinstance(root, Op) and not is_join(root)
            if isinstance(root, Op) and overwrites and self.stores_squares(root, self.access(root)):
                squares.append(root)
                continue
            together = self.stored_joined(root) if isinstance(root, Op) and overwrites else None
            if isinstance(root, Op) and together is not None:
                value = root.operands[1]
                others = tuple(a for a in self.access(root).axes if a != together)
                joined += [(root, at, self.joined_row(value, at, together), together)
                           for at in self._coordinates(others)]
                continue
            value = root if isinstance(root, Value) else root.operands[1]
            axes = list(value.type.axes)  # type: ignore[union-attr]
            if isinstance(root, Op):
                for index in root.operands[2:]:
                    axes += [a for a in index.type.axes if a not in axes]  # type: ignore[union-attr]
            depth = self.slot_axes.get(root) if isinstance(root, Value) else None
            for at in self._coordinates(tuple(axes)):
                if depth is None:
                    jobs.append((root, at, self.row(value, at)))
                elif at[depth] % PAIR == 0:
                    jobs.append((root, at, self.slots_of(value, at)))
        if self.behind is not None and self.behind.host is host:
            self._roots_behind(self.behind, host)
        for job in joined:
            self.store_joined(*job)
        rounded: list[Job] = []
        filled = self.filled_stores(jobs)
        done = self.store_runs([] if filled or self.lane_run == 1 else jobs)
        done |= {number for together in filled.values() for number in together}
        for root in roots:
            if isinstance(root, Op) and is_join(root):
                with self.located(root):
                    self.join(root, [(at, row) for other, at, row in jobs if other is root])
        for number, (root, at, row) in enumerate(jobs):
            if number in filled and isinstance(root, Op):
                with self.located(root):
                    self.store_filled(root, at, [jobs[n][2] for n in filled[number]], self.streams(root))
            elif number in done or is_join(root):
                continue
            elif isinstance(root, Value):
                self._keep(root, at, row)
            elif self.rounds_by_instruction(root, at, row):
                rounded.append((root, at, row))
            else:
                self._store(root, at, row)
        if len(rounded) > MOST_ROWS:
            for root, at, row in rounded:
                self._store(root, at, row)
        elif rounded:
            self.store_rounded(rounded, [self.streams(op) for op, _, _ in rounded])
        for op in squares:
            self._store_squares(op)

    def _store_squares(self, op: Op) -> None:
        access, value = self.access(op), op.operands[1]
        lane = next(a for a in access.axes if self.bound[a].lane)
        axis = self.square_axis(op, access, lane)
        assert axis is not None
        for at in self._coordinates(tuple(access.axes)):
            if at[axis] == 0:
                rows = [self.row(value, {**at, axis: i}) for i in range(self.lanes)]
                self.store_square(op, access, at, rows, self.streams(op))

    def _roots_behind(self, behind: Behind, host: Walk) -> None:
        """The same piece of the walk behind, at a level of its own: the same ops have other rows there."""
        self.enter_again()
        bound, rows, buffers = self.bound, self.rows, self.buffers
        self.bound = {**bound, **{a: replace(bound[a], depth=self.depth) for a in host.axes}, **behind.bound}
        self.rows, self.buffers = {**rows, **behind.rows}, {**buffers, **behind.buffers}
        self.request_stores(behind.walk.inner)
        self._roots(behind.walk.inner)
        self.bound, self.rows, self.buffers = bound, rows, buffers
        self.leave()

    def _store(self, op: Op, at: dict[str, int], row: Value) -> None:
        value = op.operands[1]
        axes = tuple(at)
        access = self._at_scalars(self.access(op), at)
        # A value that does not span the lane axis is stored by every lane that the index spans, through a full row.
        with self.located(op):
            self.put(access, row, value.type.dtype, at, axes, streaming=self.streams(op))  # type: ignore[union-attr]

    def streams(self, op: Op) -> bool:
        raise NotImplementedError("the model decides")

    def request_stores(self, roots: list[Op | Value]) -> None:
        raise NotImplementedError("prefetching says how")

    def kept_access(self, value: Value) -> Access | None:
        """Where a value that is kept lies in scratch memory; None where registers keep it."""
        if all(a not in self.open for a in axes_of(value)):
            return None
        if value not in self.pending_buffers:
            self.pending_buffers[value] = self._buffer_for(value)
        return self.pending_buffers[value]

    def kept_dtype(self, value: Value) -> DType:
        """Of the elements of a kept value: what was loaded is widened once, not each time that the copy is read. So is
        what was rounded to bf16 for a product of f32, where that would take the place of multiply-adds, or of loads."""
        dtype: DType = value.type.dtype  # type: ignore[union-attr]
        loaded = value.op is not None and value.op.name == "load" and dtype is not bool_
        return row_dtype(dtype) if loaded or (dtype is bf16 and self.multiplies_wide(value)) else dtype

    def multiplies_wide(self, value: Value) -> bool:
        raise NotImplementedError("the model knows the target")

    def _keep(self, value: Value, at: dict[str, int], row: Value) -> None:
        t = value.type
        assert isinstance(t, TileType)
        access = self.kept_access(value)
        if access is None:
            self.rows.setdefault(value, {})[tuple(at[a] for a in t.axes)] = row
            return
        # Scratch memory is padded to whole rows: masks would only cost.
        narrow = any(self.bound[axis].narrow for axis in t.axes)
        self.put(access, row, t.dtype, at, t.axes, padded=not narrow)

    def _buffer_for(self, value: Value) -> Access:
        known = self.carried_buffers.get(value)
        if known is not None:
            return known
        axes = [(axis, self.extent_of_buffer(axis, value)) for axis in value.type.axes]  # type: ignore[union-attr]
        lanes_last = sorted(axes, key=lambda pair: pair[0] in self.bound and self.bound[pair[0]].lane)
        if lanes_last and not any(axis in self.bound and self.bound[axis].lane for axis, _ in axes):
            # Dot products leave numbers, which may lie in any order: walks that follow shall find full rows.
            extents = {axis: self.extent_hint(axis) for axis, _ in axes}
            longest = max(extents, key=lambda axis: extents[axis])
            if extents[lanes_last[-1][0]] < self.lanes <= extents[longest]:
                lanes_last.sort(key=lambda pair: pair[0] == longest)
        if value in self.slot_axes:
            return self.allocate_slots(value, lanes_last)
        return self.allocate(value, self.kept_dtype(value), lanes_last)

    def extent_of_buffer(self, axis: str, value: Value) -> Capacity | int:
        """How many elements along an axis scratch memory for a value has."""
        o = self.open.get(axis)
        if o is None:
            bound = self.bound[axis]
            return bound.count * (self.lanes if bound.lane else 1)
        if isinstance(o.extent, int):
            return o.extent
        capacity = o.capacity or self._walked_dimensions.get(axis)
        if capacity is None:
            raise LoweringError(f"the extent of axis {axis} is only known when the kernel runs, and a value over "
                                "it must be kept in scratch memory; walk it with tiles(...)", value.op)
        return capacity

    def has_room(self, axis: str) -> bool:
        """Whether scratch memory may be set aside for a value over an axis, as it is bounded, or no longer than what it
        walks."""
        return self.is_bounded(axis) or axis in self._walked_dimensions

    @cached_property
    def _walked_dimensions(self) -> dict[str, Capacity]:
        """The extent of a tensor that an axis walks, which is then no longer, whatever its range is made of: one that
        is read or written, in the block that brings the axis, at an index that is the axis by itself, or else its
        quotient, as in a table of pages."""
        found: dict[int, dict[str, Capacity]] = {}
        inside = [(op.attributes["axes"] if op.name == "tiles" else (), block)
                  for op in self.function.walk() for block in op.blocks]
        for axes, block in [((), self.function.body), *inside]:
            brought = {*axes, *(op.attributes["axis"] for op in block.ops if op.name == "whole")}
            for access in block.ops if brought else ():
                if access.name in ("load", "store") and access.operands[0].op is None:
                    indices = access.operands[1 if access.name == "load" else 2:]
                    dims = access.operands[0].type.dims  # type: ignore[union-attr]
                    for dim, index in zip(dims, indices, strict=True):
                        axis, divisor = _quotient(index)
                        if axis in brought and not isinstance(dim, tuple):
                            found.setdefault(divisor, {}).setdefault(axis, Capacity(
                                divisor * dim) if isinstance(dim, int) else Capacity(divisor, (dim,)))
        return {axis: most for divisor in sorted(found, reverse=True) for axis, most in found[divisor].items()}


def _quotient(index: Value) -> tuple[str, int]:
    """The axis and the divisor of an index that is an axis by itself (1), or divided by a number; ("", 1) of others."""
    divisor, op = 1, index.op
    if op is not None and op.name == "floordiv":
        by = affine(op.operands[1])
        if by is None or not by.is_constant or by.constant < 1:
            return "", 1
        divisor, index = by.constant, op.operands[0]
    form = affine(index)
    (axis,) = form.axes if form is not None and len(form.axes) == 1 else ("",)
    return (axis, divisor) if form == Affine(axes={axis: 1}) else ("", 1)
