"""Sums of a tile stored by copies of boxes: what a group of warps computed goes out by the copy engine.

Enters a walk of groups of warps (groups.py) whose only store is of sums, or of what is computed of them element by
element, rounded to 16 bits, in boxes that end where the tensor does. Leaves, in place of stores by lanes:

    store_matrix   each warp its 16 rows to near memory, 16 x 16 elements at once, in panels of 64 columns, swizzled
    store_fence    the copies see them
    tensor_store   16 rows x 64 columns; what lies beyond the tensor's end is left out by the copy
    store_wait     before near memory is written again, and before the warp ends
"""

from __future__ import annotations

from ..ir.nodes import Op, Value
from ..ir.types import ROW_B32, ROW_I32, TensorType, TileType, f32
from ..tile.affine import Affine, affine
from ..tile.plan import Walk
from ..tile.schedule import MatrixGroup
from ..tile.semantics import ELEMENTWISE
from . import fragments
from .fragments import PANEL, ROW_BYTES
from .matrix import MatrixWalk
from .spread import SpreadLowering
from .state import Bound, Scalar

MOST_DIMENSIONS = 5
STORED_DTYPES = ("bf16", "f16")


class BoxedStores(SpreadLowering):
    """boxed: the walk's store, where it is such a one; stored_map: its tensor map. columns: of the tile; piece_columns:
    of them that lie in near memory at once, from sums_at on, for each warp. tensor_maps: of the function."""

    boxed: Op | None = None
    stored_map = 0
    columns = 0
    piece_columns: int
    sums_at: int
    tensor_maps: list[list[object]]

    def _sums_bytes(self) -> int:
        raise NotImplementedError("groups say how near memory lies")

    # Which stores, and boxes of tensors.

    @staticmethod
    def _turns_sums(root: Op | Value, found: MatrixWalk) -> bool:
        """Whether a store goes along the rows of the tile: its lanes then read the sums of each other's columns, at
        places that the rehearsal of waits (rehearse.py) does not follow."""
        if not isinstance(root, Op) or root.name != "store":
            return False
        form = affine(root.operands[-1])
        return form is None or found.rows in form.axes

    def _boxed_store(self, walk: Walk, found: MatrixWalk) -> Op | None:
        """The store of the walk, where it is all that follows: of what is computed of sums element by element, rounded
        to 16 bits, in boxes that end where the tensor and the loops do."""
        if len(walk.after) != 1 or not isinstance(walk.after[0], Op) or self.schedule.chunks:
            return None     # chunks need not end where a tile does
        store = walk.after[0]
        tensor, value = store.operands[:2]
        t, cast = tensor.type, value.op
        sums = {reduction.result for reduction in walk.reductions}
        assert isinstance(t, TensorType)
        forms = [affine(v) for v in store.operands[2:]]
        plain = all(form is not None and len(form.axes) < 2 and all(f == 1 for f in form.axes.values())
                    for form in forms)
        if store.name != "store" or cast is None or cast.name != "cast" or not self._made_of_sums(
                cast.operands[0], sums) or not plain or t.dtype.name not in STORED_DTYPES \
                or value.type.dtype is not t.dtype or len(forms) > MOST_DIMENSIONS:  # type: ignore[union-attr]
            return None
        for dim, form in zip(t.dims, forms, strict=True):
            assert form is not None
            if form.axes and (form.constant or form.scalars or not self._ends_at(next(iter(form.axes)), dim)):
                return None
        whole = self.specialization.strides.get(tensor.name, "contiguous") == "contiguous" \
            and tensor.name in self.specialization.aligned
        last = forms[-1]
        assert last is not None
        return store if whole and found.columns in last.axes else None

    @staticmethod
    def _made_of_sums(value: Value, sums: set[Value]) -> bool:
        """Whether a value is computed of sums of f32 and of numbers, element by element."""
        pending, seen = [value], set[Value]()
        while pending:
            v = pending.pop()
            t = v.type
            assert isinstance(t, TileType)
            if v in seen or not t.axes or (v in sums and t.dtype is f32):
                continue
            if v in sums or v.op is None or v.op.name not in (*ELEMENTWISE, "full"):
                return False
            seen.add(v)
            pending += v.op.operands
        return True

    def _ends_at(self, axis: str, dim: object) -> bool:
        """Whether an axis ends where a tensor's dimension does."""
        for op in self.function.walk():
            axes = op.attributes["axes"] if op.name == "tiles" else \
                [op.attributes["axis"]] if op.name == "whole" else []
            if axis in axes:
                stop = op.operands[2 * axes.index(axis) + 1].op
                return stop is not None and dim == (stop.attributes["name"] if stop.name == "dim" else
                                                    stop.attributes["value"] if stop.name == "const" else None)
        return False

    @staticmethod
    def _forms(op: Op) -> list[Affine]:
        """Indices of a load or a store."""
        forms = [affine(v) for v in op.operands[1 + (op.name == "store"):]]
        return [form for form in forms if form is not None]

    def _map(self, op: Op, sizes: dict[str, int]) -> int:
        """The tensor map of an op's tensor with boxes of these sizes, along the axes of its indices."""
        tensor = op.operands[0]
        t = tensor.type
        assert isinstance(t, TensorType)
        self.slot(f"{tensor.name}.data")
        for dim in t.dims:
            if isinstance(dim, str):
                self.slot(f"dim.{dim}")
        box = [sizes[next(iter(form.axes))] if form.axes else 1 for form in self._forms(op)]
        record: list[object] = [tensor.name, t.dtype.name, list(t.dims), box]
        if record not in self.tensor_maps:
            self.tensor_maps.append(record)
        return self.tensor_maps.index(record)

    def _coordinates_of(self, op: Op, at: dict[str, Value]) -> list[Value]:
        made = []
        for form in self._forms(op):
            total: Scalar = form.constant
            for scalar, factor in form.scalars.items():
                total = self.add(total, self.mul(self.integer(scalar), factor))
            for axis in form.axes:
                total = self.add(at[axis], total)
            made.append(self.value(total))
        return made

    # Storing.

    def _hold_sums(self, walk: Walk, found: MatrixWalk, sums: list[Value], row: Value, column: Value) -> None:
        """Give each sum's register its coordinates: the upper or the lower row of a lane, and which of its columns."""
        each = len(sums) // len(walk.reductions)
        for axis, start, count in ((found.rows, row, 2), (found.columns, column, each // 2)):
            self.bound[axis] = Bound(start, count, False, None, self.depth)
        for number, reduction in enumerate(walk.reductions):
            mine = self.rows[reduction.result] = {}
            for at, value in enumerate(sums[number * each:(number + 1) * each]):
                place = {found.rows: at % 4 // 2, found.columns: at // 4 * 2 + at % 2}
                mine[tuple(place[a] for a in reduction.result.type.axes)] = value  # type: ignore[union-attr]

    def _store_boxes(self, group: MatrixGroup, walk: Walk, found: MatrixWalk, sums: list[Value], row: Value,
                     column: Value) -> None:
        """The same by copies of boxes: what is computed of the sums goes to near memory rounded, 16 x 16 at once, in
        the panels that the copies take. What the last copies read is written again only when they have done so."""
        store = self.boxed
        assert store is not None and store.operands[1].op is not None
        t, (computed,) = store.operands[0].type, store.operands[1].op.operands
        assert isinstance(t, TensorType)
        self._hold_sums(walk, found, sums, row, column)
        lane = self.iota()
        inside, eight = self.bits(0, "and", lane, 7), self.bits(0, "and", self.bits(0, "shr", lane, 3), 1)
        below = self.emit(0, "add", [self.bits(0, "shl", eight, 3), inside], ROW_I32)
        offsets = self.swizzled(below, self.bits(0, "shr", lane, 4), ROW_BYTES)
        place = self.value(self.add(self.near(), self.add(self.sums_at, self.mul(self.warp(), self._sums_bytes()))))
        start = self.value(self.add(row, self.mul(self.warp(), group.group_rows // group.group_warps)))
        block = 2 * fragments.COLUMNS
        for side in range(0, self.columns, self.piece_columns):
            self.effect("store_wait", [])
            for at in range(0, self.piece_columns, block):
                places = [{found.rows: register // 2, found.columns: (side + here) // 4 + register % 2}
                          for here in range(at, at + block, fragments.COLUMNS) for register in range(4)]
                some = [self.row(computed, at_register) for at_register in places]
                pairs = [self.emit(self.depth, "pack2", list(two), ROW_B32, dtype=t.dtype)
                         for two in zip(some[::2], some[1::2], strict=True)]
                panel, within = divmod(at, PANEL)
                self.effect("store_matrix", [place, offsets, *pairs], flip=within * t.dtype.size_bytes,
                            disp=panel * fragments.ROWS * ROW_BYTES)
            self.effect("store_fence", [])
            with self.located(store):
                for panel in range(self.piece_columns // PANEL):
                    at_column = self.value(self.add(column, side + panel * PANEL))
                    self.effect("tensor_store", [place, *self._coordinates_of(
                        store, {found.rows: start, found.columns: at_column})],
                        map=self.stored_map, disp=panel * fragments.ROWS * ROW_BYTES)
        for axis in (found.rows, found.columns):
            del self.bound[axis]
        for reduction in walk.reductions:
            del self.rows[reduction.result]
