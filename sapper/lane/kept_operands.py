"""Which operands of a contraction are worth a copy in scratch memory, or are computed there before it.

Part of the analytic model (model.py), for walks whose nest holds tiles of results (nests.py). Enters: a contraction and
one of its operands, what is bound and open around it. Leaves: whether the plan keeps the operand.
"""

from __future__ import annotations

from math import prod

from ..ir.nodes import Op, Value
from ..ir.types import bf16, f32, i32
from ..tile.affine import affine
from ..tile.plan import COSTLY, LATE, axes_of, ops_behind
from ..tile.schedule import Panels
from .packed import dot_for
from .register_factors import STAGE_ROWS, RegisterFactors


class KeptOperands(RegisterFactors):
    """Decides it."""

    def keeps_operand(self, contraction: Op, value: Value, outside: bool) -> bool:
        """Whether an operand of a contraction whose result spans a lane axis held in registers is worth a copy in
        scratch memory: one that spans that axis, if every iteration of a loop reads it again; one that does not, of
        which an element is spread over the lanes at a time, if it is narrow in memory: it is widened by vectors."""
        lanes = {a for a in contraction.result.type.axes if a in self.bound and self.bound[a].lane}  # type: ignore[union-attr]
        axes = value.type.axes  # type: ignore[union-attr]
        if not lanes and not outside and (
                self._is_met_by_rows(contraction, value) or self._is_computed_once(contraction, value)):
            return True
        if not lanes and (outside or not self._fits_near(contraction, value)):
            return False
        if not axes or value in self.rows or (value in self.buffers and value not in self.slot_axes):
            return False
        if not all(a in self.bound or (a in self.open and self.is_bounded(a)) for a in axes):
            return False
        if self._multiplies_slots(contraction):
            return False
        depth = self._slot_depth(contraction)
        if depth is not None:
            if self._lies_as_slots(value, depth) or (
                    not lanes and value.op is not None and value.op.name == "load"):
                return False
            self.slot_axes[value] = depth
            return True
        # Rounded here, where no dot product takes it narrow: once, not anew for all that meet it. MLA decode of 16
        # heads on a Zen 3: 0.37 of the time.
        rounded = "fma2_bf16" in self.facts.dots and value.type.dtype is bf16 and (  # type: ignore[union-attr]
            value.op is not None and value.op.name != "load")
        if rounded:
            return True
        if not lanes:
            return False
        if lanes & set(axes):
            return outside
        source = value.op.operands[0] if value.op is not None and value.op.name == "cast" else value
        if source.op is None or source.op.name != "load":
            return False
        return source.type.dtype.bits < 32 or self._lies_apart(contraction, source.op)  # type: ignore[union-attr]

    def _lies_apart(self, contraction: Op, load: Op) -> bool:
        """Whether rows are met a few columns at a time, again and again, and do not follow one another in memory, as
        those of one head in [position, head, dim]: where registers are few. Rows a power of two apart share a few sets
        of the first cache, so that all of them come from behind it for each few columns. Measured on a Zen 3,
        latent_attention_f32 of 512 tokens and 16 heads of 128, of the time where the values lie: 0.87 in quiet
        minutes, 0.7 while another works on the core."""
        over, axes = contraction.attributes["over"], axes_of(load.result)
        if isinstance(self.stride_classes.get(load.operands[0].name), Panels):
            return False
        if not self.sixteen_registers or len(over) != 1 or len(axes) != 2 or over[0] not in axes:
            return False
        (columns,) = set(axes) - set(over)
        access, size = self.access(load), load.result.type.dtype.size_bytes  # type: ignore[union-attr]
        if columns not in self.open or access.gathers or access.axes.get(columns) != size:
            return False
        extent = self.open[columns].extent
        return not (isinstance(extent, int) and access.axes.get(over[0]) == extent * size)

    def _multiplies_slots(self, contraction: Op) -> bool:
        """Whether packed dot products serve a contraction: over several axes, or over one along bytes of whole slots.
        Of bf16 along one, see _slot_depth."""
        dot, over = dot_for(contraction, self.facts), contraction.attributes["over"]
        return dot is not None and (len(over) > 1 or (
            dot.result is i32 and over[0] in self.open and self.extent_hint(over[0]) >= dot.elements))

    def multiplies_wide(self, value: Value) -> bool:
        """Whether a value is kept for products of f32 alone, where to widen it takes a multiply-add's place, or, where
        registers are few, a load's: a vector serves two or three multiply-adds there, and what widens it is read beside
        it. Measured on a Zen 3, of the time: attention_rounded_f32 of 1024 tokens and heads of 128 0.80,
        latent_attention_rounded of 512 tokens 0.82."""
        users = self.users.get(value, ())
        scarce = self.facts.shared_pipes or (self.facts.fma_per_cycle >= 2 and self.sixteen_registers)
        return scarce and "fma2_bf16" in self.facts.dots and bool(users) and all(
            user.name == "contract" for user in users)

    def _slot_depth(self, contraction: Op) -> str | None:
        """The axis along which a contraction that holds lanes of its result takes slots of bf16, or None: where the
        target lacks the dot product, or an operand is neither slots in memory, not gathered, nor a value of its own."""
        if len(contraction.attributes["over"]) != 1 or "dot2_bf16" not in self.facts.dots:
            return None
        depth: str = contraction.attributes["over"][0]
        if depth in self.bound:
            return None
        for value in contraction.operands:
            op = value.op
            if value.type.dtype is not bf16 or op is None or op.name in LATE or op.blocks:  # type: ignore[union-attr]
                return None
            if op.name == "load" and (any(affine(index) is None for index in op.operands[1:]) or (
                    (panels := self.panels_of(op)) is not None and panels.elements == 1)):
                return None
            # Panels have their columns in the lanes, and a slot's neighbours are to come from two rows.
            if op.name != "load" and any(behind.name == "load" and depth in axes_of(behind.result)
                                         and self.panels_of(behind) is not None for behind in ops_behind(value)):
                return None
            if op.name != "load" and any(
                    user.name != "contract" or tuple(user.attributes["over"]) != (depth,)
                    for user in self.users.get(value, ())):
                return None
        return depth

    def _fits_near(self, contraction: Op, value: Value) -> bool:
        """Whether a value that is computed for a contraction has room in the caches of a core, typically, and an axis
        besides the contracted ones to go across the lanes as it is computed."""
        op, axes = value.op, axes_of(value)
        if op is None or op.name == "load" or value.type.dtype is not bf16:  # type: ignore[union-attr]
            return False
        if not all(a in self.bound or a in self.open for a in axes):
            return False
        across = [a for a in axes if a in self.open and a not in contraction.attributes["over"]]
        return any(self.extent_hint(a) >= self.lanes for a in across) and (
            prod(self.extent_hint(a) for a in axes) * bf16.size_bytes <= self.facts.l2_bytes // 2)

    def _is_met_by_rows(self, contraction: Op, value: Value) -> bool:
        """Whether a vector that is computed from several meets the rows of a matrix one by one: each row would read all
        of these again, from a first cache that takes the matrix too. Measured on a Zen 5, bf16 of 6144 x 4096 by a
        vector and a gain: 59 % of what plain reads reach where they are multiplied for each row, and 93 where once."""
        in_order = self.requests.row_streams or self.requests.stream_level == 1
        if not in_order or value.op is None or value.type.dtype is not f32:  # type: ignore[union-attr]
            return False
        axes, over = axes_of(value), contraction.attributes["over"]
        rows = [a for a in axes_of(contraction.result) if a in self.open and self.extent_hint(a) >= STAGE_ROWS]
        loads = {op for op in self._loads_behind(value) if set(axes_of(op.result)) & set(axes)}
        return (axes == tuple(over) and len(loads) > 1 and len(rows) == len(axes_of(contraction.result)) == 1
                and all(a in self.open and self.is_bounded(a) for a in axes))

    def _is_computed_once(self, contraction: Op, value: Value) -> bool:
        """Whether rows that meet a matrix are computed, as of a window whose edges are 0 in a block (nest_lanes.py), or
        by what takes long, as the quotients of a softmax: by vectors once, where else each of their elements, spread
        over the lanes, would be for each piece of columns."""
        op, axes = value.op, axes_of(value)
        if op is None or op.name in ("load", "cast", *LATE) or op.blocks or value.type.dtype is not f32:  # type: ignore[union-attr]
            return False
        columns = [a for a in axes_of(contraction.result) if a not in axes and a in self.open]
        again = bool(self.chunked & set(axes)) or (op.name in COSTLY and not self.facts.many_workers)
        return again and all(a in self.open and self.has_room(a) for a in axes) and (
            any(self.extent_hint(a) >= self.lanes for a in columns)
            and prod(map(self.extent_hint, axes)) * f32.size_bytes <= self.facts.l2_bytes // 2)

    def _loads_behind(self, value: Value) -> list[Op]:
        """The loads that a value is computed from, as far as it is not kept."""
        def ends(v: Value) -> bool:
            return v.op is None or bool(v.op.blocks) or v.op.name in LATE or v in self.buffers or v in self.rows

        return [op for op in ops_behind(value, ends) if op.name == "load"]

    def _lies_as_slots(self, value: Value, depth: str) -> bool:
        """Whether a value is read from memory in which neighbours along an axis are neighbours, and spans no lanes."""
        op = value.op
        if op is None or op.name != "load" or op.operands[0].op is not None:
            return False
        forms = [affine(index) for index in op.operands[1:]]
        strides = self.stride_classes.get(op.operands[0].name, "contiguous")
        unit = len(forms) - 1 if strides == "contiguous" else None
        if isinstance(strides, tuple) and not isinstance(strides, Panels) and True in strides:
            unit = strides.index(True)
        if unit is None or any(form is None for form in forms) or forms[unit].axes.get(depth) != 1:  # type: ignore[union-attr]
            return False
        lanes = {a for a in value.type.axes if a in self.bound and self.bound[a].lane}  # type: ignore[union-attr]
        return not lanes and not any(depth in form.axes for n, form in enumerate(forms) if n != unit)  # type: ignore[union-attr]
