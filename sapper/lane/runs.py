"""Runs: neighbours in memory that one lane reads or writes together.

Enters a walk of a target whose lanes are threads and read up to `run_bytes` at once; leaves, in its loops over whole
pieces, `load_run` and `store_run` in place of a load or a store for each row. With a run of R elements the lane axis of
a piece lies otherwise than usually: register j of lane l has

    coordinate offset + (j div R) * R * lanes + l * R + j mod R        instead of        offset + j * lanes + l

which whatever computes on coordinates finds by itself (`Bound.run`); what follows a reduction does not know the
difference, as the elements of a sum, a minimum or a maximum may come in any order.

Loads whose indices are quotients and remainders of that coordinate are in places.py.

What holds: an address that a run is read from is a multiple of the run's bytes. So all that the walk reads or writes
along its lane axis lies in rows that start at such multiples, of tensors that the call says are aligned or of near
memory, and the piece starts at a multiple of R. Else the walk has no runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..ir.nodes import Op, Value
from ..ir.types import DType, RowType
from ..tile.affine import affine
from ..tile.plan import LATE, Walk, axes_of
from ..tile.schedule import Specialization
from ..tile.sums import is_join
from .pairs import Pairs
from .state import Access, element_bytes, row_dtype

RUN_DTYPES = frozenset({"f32", "i32", "bf16", "f16", "i16", "i8", "u8"})


class Runs(Pairs):
    specialization: Specialization
    pending_buffers: dict[Value, Access]
    carried_buffers: dict[Value, Access]

    # The choice.

    def run_of(self, walk: Walk, lane: str | None) -> int:
        """How many neighbours along the lane axis a lane of the walk takes; 1: it has no runs."""
        most = self.facts.run_bytes
        if not most or lane is None or lane not in self.open or not self._any_order(walk, lane):
            return 1
        if any(map(is_join, walk.roots())):
            return 1    # lanes side by side join elements side by side: those of a line are one step of the cache
        # What is gathered is found element by element, wherever in a run its index lies.
        accesses = [(access, op.operands[0], op.operands[1:]) for op in self.reads(walk)
                    if not (access := self.access(op)).gathers or lane in access.axes]
        accesses += [(self.access(op), op.operands[0], op.operands[2:]) for op in walk.roots()
                     if isinstance(op, Op) and op.name == "store"]
        widest = 0
        for access, tensor, indices in accesses:
            if lane in access.axes or any(lane in axes_of(v) for v, _ in access.gathers):
                size = element_bytes(access.dtype)
                if access.axes.get(lane) != size or access.dtype.name not in RUN_DTYPES \
                        or not self._rows_aligned(tensor, indices, lane, most // size):
                    return 1
                widest = max(widest, size)
        for value in self._kept_values(walk):
            if lane in axes_of(value):
                held = self.buffers.get(value) or self.pending_buffers.get(value) or self.carried_buffers.get(value)
                dtype = self.kept_dtype(value) if held is None else held.dtype
                size = element_bytes(dtype)
                if dtype.name not in RUN_DTYPES or value in self.slot_axes or (
                        held is not None and (held.axes.get(lane) != size or not (held.near or held.relative))):
                    return 1
                widest = max(widest, size)
        o, run = self.open[lane], most // widest if widest else 1
        while run > 1 and (run * self.lanes > self.extent_hint(lane) or not self.is_multiple(o.offset, run)):
            run //= 2
        return run

    def _any_order(self, walk: Walk, lane: str) -> bool:
        """Whether the elements along the lane axis may come in any order: none is held in registers for another walk,
        and no op asks which neighbours a lane has."""
        if any(isinstance(root, Value) and lane in axes_of(root) and not any(a in self.open for a in axes_of(root))
               for root in walk.roots()):
            return False
        if any(op.name != "contract" and op.attributes["kind"] not in ("sum", "max", "min") for op in walk.reductions):
            return False
        return not any(op.name == "asm" or (op.name in LATE and op not in walk.reductions)
                       for op in self._computed_ops(walk))

    def _kept_values(self, walk: Walk) -> list[Value]:
        """The values in the compiler's own memory that a walk reads or writes."""
        roots = [v for root in walk.roots() for v in ([root] if isinstance(root, Value) else root.operands)]
        read = [*roots, *(v for op in self._computed_ops(walk) for v in op.operands)]
        written = [root for root in walk.roots() if isinstance(root, Value)]
        return list(dict.fromkeys([*written, *(v for v in read if v in self.buffers)]))

    def kept_dtype(self, value: Value) -> DType:
        raise NotImplementedError("a walk knows what it keeps")

    def kept_access(self, value: Value) -> Access | None:
        raise NotImplementedError("a walk knows what it keeps")

    def _computed_ops(self, walk: Walk) -> list[Op]:
        """What a walk computes, up to what is there already."""
        stack = [v for root in walk.roots() for v in ([root] if isinstance(root, Value) else root.operands)]
        found: dict[Op, None] = {}
        while stack:
            value = stack.pop()
            if value.op is not None and value.op not in found and value not in self.buffers \
                    and value not in self.rows and not value.op.blocks:
                found[value.op] = None
                stack += value.op.operands
        return list(found)

    def reads(self, walk: Walk) -> list[Op]:
        raise NotImplementedError("the model knows what a walk reads")

    def extent_hint(self, axis: str) -> int:
        raise NotImplementedError("the model knows the extents")

    def is_bounded(self, axis: str) -> bool:
        raise NotImplementedError("control knows the extents")

    def streams(self, op: Op) -> bool:
        raise NotImplementedError("the model decides")

    def _rows_aligned(self, tensor: Value, indices: list[Value], lane: str, run: int) -> bool:
        """Whether neighbours along the lane axis from a multiple of `run` on lie at a multiple of their bytes."""
        last = affine(indices[-1])
        return (self.in_lines(tensor)
                and last is not None and last.axes == {lane: 1} and last.constant % run == 0 and not last.scalars
                and not any(lane in axes_of(index) for index in indices[:-1]))

    def in_lines(self, tensor: Value) -> bool:
        """Whether neighbours along a tensor's last dimension are neighbours in memory, and all rows start at lines, as
        those of buffers do which many workers share (scratch.py)."""
        if tensor.op is not None:
            merges = tensor.op.name == "view" and all(after == 1 for _, after in tensor.op.attributes["groups"])
            return self.facts.many_workers and (
                tensor.op.name == "buffer" or (merges and self.in_lines(tensor.op.operands[0])))
        return tensor.name in self.specialization.aligned \
            and self.stride_classes.get(tensor.name, "contiguous") == "contiguous"

    def axis_along(self, op: Op) -> str | None:
        """The axis along which a load or a store goes through memory, where that is plain to see."""
        tensor, indices = op.operands[0], op.operands[1 + (op.name == "store"):]
        forms = [affine(v) for v in indices]
        last = forms[-1]
        if last is None or any(form is None for form in forms) or not (self.in_lines(tensor) or (
                tensor.op is None and self.stride_classes.get(tensor.name, "contiguous") == "contiguous")):
            return None
        axis = next(iter(last.axes), None)
        others = [a for form in forms[:-1] if form is not None for a in form.axes]
        return axis if last.axes == {axis: 1} and not last.scalars and axis not in others else None

    # Loads and stores.

    def _run_along(self, access: Access) -> int:
        """The run of the lane axis that an access goes along; 1 where there is none."""
        lane = next((a for a in access.axes if a in self.bound and self.bound[a].lane), None)
        if lane is None or access.gathers or self.bound[lane].mask is not None \
                or access.axes[lane] != element_bytes(access.dtype):
            return 1
        return self.bound[lane].run

    def run_row(self, access: Access, at: dict[str, int], level: int) -> Value | None:
        """The row at register coordinates of a load that comes in runs, or None."""
        run = self._run_along(access)
        if run == 1:
            return None
        lane = next(a for a in access.axes if self.bound[a].lane)
        number, place = divmod(at[lane], run)
        operands, attributes = self.address(access, {**at, lane: number * run})
        memo = self.levels[level].memo
        key = ("run", access.dtype, tuple(operands), tuple(sorted(attributes.items())))
        if key not in memo:
            row = RowType(row_dtype(access.dtype))
            memo[key] = self.emit_run(level, operands, [row] * run, {"dtype": access.dtype, **attributes})
        found: Value = memo[key][place]
        return found

    def emit_run(self, level: int, operands: list[Value], rows: Sequence[RowType],
                 attributes: dict[str, Any]) -> list[Value]:
        """What a lane reads together."""
        made = Op("load_run", operands, [*rows], attributes, None, self.location)
        self.levels[level].builder.block.ops.append(made)
        for result in made.results:
            self.depths[result] = level
        return list(made.results)

    def store_runs(self, jobs: list[tuple[Op | Value, dict[str, int], Value]]) -> set[int]:
        """Emit what goes in runs among stores and values to be kept; gives their numbers."""
        waiting: dict[tuple[object, ...], list[tuple[int, Value]]] = {}
        done: set[int] = set()
        for number, (root, at, row) in enumerate(jobs):
            access = self._at_scalars(self.access(root), at) if isinstance(root, Op) else self.kept_access(root)
            run = 1 if access is None else self._run_along(access)
            if access is None or run == 1:
                continue
            lane = next(a for a in access.axes if self.bound[a].lane)
            first = {**at, lane: at[lane] // run * run}
            here = waiting.setdefault((root, *sorted(first.items())), [])
            here.append((number, row))
            if len(here) == run:
                operands, attributes = self.address(access, first)
                with self.located(root if isinstance(root, Op) else None):
                    self.effect("store_run", [*operands, *(held for _, held in here)], dtype=access.dtype,
                                streaming=isinstance(root, Op) and self.streams(root), **attributes)
                done.update(n for n, _ in here)
        return done
