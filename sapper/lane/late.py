"""Loops over rows whose last walk follows a row behind.

Enters: a loop over rows, and a `Late` (sapper/tile/plan.py): the walk of its body that only stores past the caches.
Leaves: three loops. The first row without that walk; the other rows, where the host walk also does each piece of the
late walk for the row before; the late walk of the last row. Holds: what passes from a row to the next are the rows
that the late walk reads, carried by the loops, and one scratch buffer, whose pieces are read before the host replaces
them.

Such stores leave the core at the speed of memory. All of a row's at once keep the core waiting; among the arithmetic
of the next row, of which a host that keeps what it computes has much, they cost hardly anything. (Software pipelining:
Lam, PLDI 1988, here by one iteration.)
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.nodes import Block, Value
from ..tile.plan import Late, Plan, axes_of
from .axis_loops import Carried
from .model import Model
from .state import Access, Bound, Scalar, row_dtype
from .stores import Behind


@dataclass(slots=True)
class LateWalk:
    """The body of a loop over rows, and which walk of it is late."""

    block: Block
    plan: Plan
    late: Late


class LateLowering(Model):
    """Emits loops over rows with a late walk. Subclasses emit the items of blocks (`begin_block`, `items`)."""

    def begin_block(self, block: Block) -> None:
        raise NotImplementedError("control begins blocks")

    def items(self, block: Block, plan: Plan, late: Late | None) -> None:
        raise NotImplementedError("control emits items")

    def late_rows(self, axis: str, start: Scalar, stop: Scalar, body: LateWalk) -> None:
        """All rows of `axis` from start to stop, one at a time."""
        late = body.late
        buffers: dict[Value, Access] = {}

        def bind(carried: Carried, behind: bool) -> Carried:
            here = self.bound[axis]
            here.resident = True
            self.begin_block(body.block)
            if not buffers:
                buffers.update({value: self._buffer_for(value) for value in late.buffers})
            self.carried_buffers.update(buffers)
            self.enter_again()
            if behind:
                before = Bound(self.sub(here.offset, 1), 1, False, None, self.depth, resident=True)
                self.behind = Behind(late.host, late.walk, {axis: before}, self._held(late, carried), buffers)
            self.items(body.block, body.plan, late)
            self.behind = None
            results = [self.row(value, dict.fromkeys(axes_of(value), 0)) for value in late.rows]
            self.leave()
            return results

        def last(carried: Carried) -> Carried:
            self.bound[axis].resident = True
            self.begin_block(body.block)
            self.rows.update(self._held(late, carried))
            self.buffers.update(buffers)
            self.walk(late.walk)
            return carried

        dtypes = [row_dtype(v.type.dtype) for v in late.rows]  # type: ignore[union-attr]
        nothing = [self.constant(0.0 if dtype.is_float else 0, dtype) for dtype in dtypes]
        second = self.scalar("s_min", self.add(start, 1), stop)
        carried = self._loop(axis, start, second, 1, False, False, nothing, lambda values: bind(values, False))
        carried = self._loop(axis, second, stop, 1, False, False, carried, lambda values: bind(values, True))
        final = self.scalar("s_max", self.sub(stop, 1), start)
        self._loop(axis, final, stop, 1, False, False, carried, last)
        for value in late.buffers:
            del self.carried_buffers[value]

    @staticmethod
    def _held(late: Late, carried: Carried) -> dict[Value, dict[tuple[int, ...], Value]]:
        return {value: {(0,) * len(axes_of(value)): row} for value, row in zip(late.rows, carried, strict=True)}
