"""Panels of what all rows of a nest read: the weights of a convolution, a few columns at a time, as rows meet them.

Enters: the ranges of a nest of parallel loops whose loops inside carry sums, one of them across the lanes. Leaves: its
loop outermost, and before the loops in it a copy, [all else][columns at hand], of each matrix that all rows of these
read again; while the loop's body is emitted, loads of the matrix read the copy. A row of the columns at hand is a line
or two, the next one a row of the matrix further on: rows a power of two apart share a few sets of the first cache, and
the other sets stay empty.

What holds: the copy has every element of the matrix in the columns at hand, so a load may index all else as it likes.
Measured on a Zen 3, f32, GFLOP/s of 100, read where it lies and as a panel, convolutions of 3 x 3 by 34 x 34 points,
32 and 64 channels to 64, 64 to 48, and 128 to 128: 59 and 92, 55 and 95, 85 and 95, 40 and 92.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

from ..ir.nodes import Block, Op, Value
from ..ir.types import RowType, TensorType
from ..tile.affine import affine
from ..tile.ops import memory_of
from ..tile.plan import axes_of
from .axis_loops import Carried
from .extents import Range
from .nests import NestLowering
from .register_factors import STAGE_ROWS
from .state import Access, Capacity, Open, Scalar, element_bytes, memory_dtype, row_dtype

ROOM = 4
"""Second caches that a panel may fill: from the last one it still comes sooner than what it is copied from. Measured on
a Zen 3, 3 x 3 of 14 x 14 points, 512, 2048 and 4096 channels to 64, GFLOP/s in place and as panels of 0.3, 1.2 and 2.4
MB: 35 and 75, 38 and 80, 30 and 73."""

COPIED_ROWS = 4
"""Rows of a panel that are copied at once."""


class NestPanels(NestLowering):
    """Emits them. A range's `panels` are the matrices that are copied for each piece of it; panel_memory: where, by
    matrix and columns at once."""

    panel_memory: dict[tuple[Value, int], Scalar]

    def panels_of_nest(self, ranges: list[Range], body: Block) -> list[Value]:
        """The matrices that are worth a copy, for each piece of the range that lies across the lanes."""
        across = next((r for r in ranges if r.lane and r.axis is not None), None)
        if across is None or self.facts.many_workers or self.schedule.stage == () or self.chunked:
            return []
        passes = prod(-(-r.hint // max(1, r.resident)) for r in ranges if r is not across)
        rows = passes * prod(r.resident or 1 for r in ranges if r is not across)
        if rows < STAGE_ROWS or passes < 2 or across.hint <= across.resident:
            return []
        inside = [inner for outer in body.ops for inner in outer.walk()]
        along: set[object] = {v for op in inside if op.name == "each" for v in op.blocks[0].arguments}
        along |= {axis for op in inside for axis in (axes_of(op.result) if op.name == "index" else ())}
        along -= {r.axis for r in ranges}
        loads: dict[Value, list[Op]] = {}
        for op in (op for op in inside if op.name == "load"):
            loads.setdefault(memory_of(op.operands[0]), []).append(op)
        return [tensor for tensor, found in loads.items() if tensor not in self.stored and (
            self.schedule.stage is None or tensor.name in self.schedule.stage) and self._is_panel(
            tensor, found, across, along)]

    def _is_panel(self, tensor: Value, loads: list[Op], across: Range, along: set[object]) -> bool:
        """Whether all loads of a matrix are of neighbours across the lanes, a contraction inside takes each whole, and
        the caches hold what they read for the piece at hand. along: the axes and counters of loops inside."""
        t = tensor.type
        assert isinstance(t, TensorType)
        if tensor.op is not None or self._unit_dimension(tensor) != len(t.dims) - 1 or t.dtype.bits < 32:
            return False
        for op in loads:
            *others, last = [affine(index) for index in op.operands[1:]]
            if op.operands[0] is not tensor or last is None or last.scalars or last.constant or (
                    last.axes != {across.axis: 1}):
                return False
            for form in others:     # each goes along a loop inside, as far as is known from its beginning to its end
                if form is None or form.constant or len(form.axes) + len(form.scalars) != 1 or not (
                        along >= form.axes.keys() | form.scalars.keys()):
                    return False
            if not all(user.name == "contract" for user in self.users.get(op.result, ())):
                return False
        if any(isinstance(dim, tuple) for dim in t.dims):    # no bound for its scratch memory
            return False
        rows = prod(dim if isinstance(dim, int) else self._dim_hint(str(dim)) for dim in t.dims[:-1])
        return rows > 1 and rows * across.resident * t.dtype.size_bytes <= ROOM * self.facts.l2_bytes

    def _dim_hint(self, name: str) -> int:
        found = self.specialization.dims.get(name)
        return 1024 if found is None else found.hint

    def _resident(self, r: Range, body: Callable[[], None]) -> None:
        def with_panels() -> None:
            before = self.tensor_bases.copy(), self.tensor_strides.copy()
            for tensor in r.panels:
                self._copy_panel(tensor, r)
            body()
            self.tensor_bases, self.tensor_strides = before

        super()._resident(r, with_panels if r.panels else body)

    def _copy_panel(self, tensor: Value, r: Range) -> None:
        """Copy a matrix's columns at hand, and have its loads find them there."""
        t, axis = tensor.type, r.axis
        assert isinstance(t, TensorType) and axis is not None
        *dims, _ = t.dims
        size = element_bytes(t.dtype)
        extents: list[Scalar] = [self.extent(dim) for dim in dims]
        strides: list[Scalar] = [1]
        step: Scalar = r.resident
        for extent in reversed(extents):
            strides.insert(0, step)
            step = self.mul(step, extent)
        key = tensor, r.resident
        if key not in self.panel_memory:
            room: list[tuple[Capacity | int, int]] = [
                (d if isinstance(d, int) else Capacity(1, (str(d),)), 1) for d in dims]
            self.panel_memory[key] = self.scratch([*room, (r.resident, 1)], t.dtype)
        place = self.panel_memory[key]
        names = [f"{tensor.name}.{number}" for number in range(len(dims))]
        source = Access(self.slot(f"{tensor.name}.data"), 0, {
            name: self.mul(stride, size) for name, stride in zip([*names, axis], self.strides(tensor), strict=True)},
            memory_dtype(t.dtype))
        first = self.sub(place, self.mul(self.bound[axis].offset, size))
        target = Access(first, 0, {
            name: self.mul(stride, size) for name, stride in zip([*names, axis], strides, strict=True)},
            memory_dtype(t.dtype))

        def copy(carried: Carried) -> Carried:
            mask = self.bound[axis].mask
            masked = [] if mask is None else [mask]
            for at in self._coordinates((names[-1], axis)):
                at = {**dict.fromkeys(names, 0), **at}
                operands, attributes = self.address(source, at)
                row = self.emit(self.depth, "load", [*operands, *masked], RowType(row_dtype(t.dtype)),
                                dtype=source.dtype, masked=bool(masked), **attributes)
                operands, attributes = self.address(target, at)
                self.effect("store", [row, *operands, *masked], dtype=target.dtype, masked=bool(masked),
                            streaming=False, **attributes)
            return carried

        def loops(number: int, carried: Carried) -> Carried:
            if number == len(names):
                return copy(carried)
            count = COPIED_ROWS if number + 1 == len(names) else 1
            return self.axis_loop(names[number], count, False, carried, partial(loops, number + 1))

        for name, extent in zip(names, extents, strict=True):
            self.open[name] = Open(0, extent, 1)
        loops(0, [])
        for name in names:
            del self.open[name]
        self.tensor_bases[tensor], self.tensor_strides[tensor] = first, strides
