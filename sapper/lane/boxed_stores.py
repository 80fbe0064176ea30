"""Sums of a tile stored by copies of boxes: what a group of warps computed goes out by the copy engine.

Enters a store of what is computed, element by element, of sums that lie spread over lanes (spread.py) and of what is
loaded beside them, in boxes that end where the tensor does. Leaves, in place of stores by lanes, for some columns after
the others:

    store_wait     until the copies of the piece before the last have read: pieces have two places in near memory
    store_matrix   each warp its 16 rows of 16 bits to near memory, 16 x 16 elements at once, in panels of 128 bytes,
                   swizzled; or store_run, 16 x 8 elements of f32
    store_fence    the copies see them
    tensor_store   16 rows x 128 bytes; what lies beyond the tensor's end is left out by the copy

and a store_wait for all before the warp ends.

Of f32 a lane holds two neighbours. Rows of a block of 8 columns would meet in the banks, since the swizzle leaves the
32 bytes of rows 2 i and 2 i + 1 in the same ones. So odd rows take the block 16 columns further at the same time, and
that of even rows when these take theirs.
"""

from __future__ import annotations

from typing import Any

from ..ir.extents import names_in
from ..ir.nodes import Op, Value
from ..ir.types import MASK, ROW_B32, ROW_F32, ROW_I32, DType, TensorType, TileType, f32, i32
from ..tile.affine import Affine, affine
from ..tile.plan import Walk
from . import fragments
from .fragment_stores import FragmentStores, is_extent
from .fragments import ROW_BYTES
from .matrix import MatrixWalk
from .state import Bound, Scalar

MOST_DIMENSIONS = 5
STORED_DTYPES = ("bf16", "f16", "f32")
EXCHANGED_BYTES = 64
"""From a block of 8 columns of f32 to the one that odd rows take with it."""


class BoxedStores(FragmentStores):
    """boxed: the stores that go so, with their tensor maps. piece_columns: of them that lie in near memory at once, in
    each of `piece_places`, from sums_at on, for each warp. tensor_maps: of the function."""

    piece_columns: int
    piece_places = 1
    sums_at: int
    tensor_maps: list[list[object]]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.boxed: dict[Op, int] = {}

    # Which stores, and boxes of tensors.

    @staticmethod
    def _turns_sums(root: Op | Value, found: MatrixWalk) -> bool:
        """Whether a store goes along the rows of the tile: a warp of a group has 16 of them, for 32 lanes."""
        if not isinstance(root, Op) or root.name != "store":
            return False
        form = affine(root.operands[-1])
        return form is None or found.rows in form.axes

    def _boxed_store(self, walk: Walk, found: MatrixWalk) -> Op | None:
        """The store of the walk, where it is all that follows, of what can be computed where the sums are."""
        if len(walk.after) != 1 or not isinstance(walk.after[0], Op) or self.schedule.chunks:
            return None     # chunks need not end where a tile does
        store = walk.after[0]
        sums = {reduction.result for reduction in walk.reductions}
        if store.name != "store" or not self._made_of_sums(store.operands[1], sums):
            return None
        return store if self.is_boxed(store, found.rows, found.columns) else None

    def is_boxed(self, store: Op, rows: str, columns: str, high: int = 0) -> bool:
        """Whether a store is of boxes of rows x columns that end where the tensor and the loops do. high: rows of a
        tile, where the loop over them may end earlier, too, after whole tiles."""
        tensor, value = store.operands[:2]
        t = tensor.type
        assert isinstance(t, TensorType)
        forms = [affine(v) for v in store.operands[2:]]
        plain = all(form is not None and len(form.axes) < 2 and all(f == 1 for f in form.axes.values())
                    for form in forms)
        if not plain or t.dtype.name not in STORED_DTYPES or _dtype(value) is not t.dtype \
                or len(forms) > MOST_DIMENSIONS:
            return False
        for dim, form in zip(t.dims, forms, strict=True):
            assert form is not None
            axis = next(iter(form.axes), None)
            if axis is not None and (form.constant or form.scalars or not (
                    self._ends_at(axis, dim) or (axis == rows and high and self._blocks_end_at(axis, dim, high)))):
                return False
        last = forms[-1]
        assert last is not None
        return tensor.op is None and self.in_lines(tensor) and columns in last.axes and any(
            form is not None and rows in form.axes for form in forms)

    def _blocks_end_at(self, axis: str, dim: object, high: int) -> bool:
        """Whether an axis ends where a tensor's dimension does, or earlier, after whole tiles of `high` rows."""
        found = self._range_of(axis)
        if found is None or found[1].op is None or found[1].op.name != "min":
            return False
        start = affine(found[0])
        for end, other in (found[1].op.operands, reversed(found[1].op.operands)):
            stop = affine(other)
            extent = None if start is None or stop is None else stop.plus(start.scaled(-1))
            if is_extent(end, dim) and extent is not None and extent.is_constant \
                    and extent.constant % high == 0:
                return True
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
        for name in dict.fromkeys(name for dim in t.dims for name in names_in(dim)):
            self.slot(f"dim.{name}")
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

    def panel_columns(self, store: Op) -> int:
        """Columns of a box: a row of it has ROW_BYTES."""
        return ROW_BYTES // _dtype(store.operands[1]).size_bytes

    def fit_pieces(self, store: Op, columns: int, most_bytes: int) -> None:
        """Settle how many columns a warp has in near memory at once: all of them, or else two pieces."""
        size = _dtype(store.operands[1]).size_bytes
        self.piece_columns, self.piece_places = columns, 1
        while fragments.ROWS * self.piece_columns * self.piece_places * size > most_bytes:
            self.piece_columns, self.piece_places = self.piece_columns // 2, 2
        assert self.piece_columns % self.panel_columns(store) == 0, "near memory has no room for a box of sums"

    def pieces_bytes(self, store: Op) -> int:
        """Of near memory, for a warp's pieces."""
        return self.piece_places * self._piece_bytes(store)

    def _piece_bytes(self, store: Op) -> int:
        return fragments.ROWS * self.piece_columns * _dtype(store.operands[1]).size_bytes

    def _hold_sums(self, walk: Walk, found: MatrixWalk, sums: list[Value], mine: Value, column: Value) -> None:
        """Give each sum's register its coordinates, for a warp's 16 rows from `mine` on."""
        each = len(sums) // len(walk.reductions)
        rows, columns = self.open[found.rows], self.open[found.columns]
        down = self.down(mine, 2, self.row_of(self.sub(self.sub(self.add(rows.offset, rows.extent), 1), mine)))
        down.repeats = False        # another warp may store the last row that is read
        across = self.along(column, 2 * each)
        ends = self.inside(across, self.sub(self.add(columns.offset, columns.extent), column))
        across.valid = [mask for mask in ends[::2] for _ in range(2)]       # rows of boxes have even numbers of columns
        for axis, spread in ((found.rows, down), (found.columns, across)):
            self.bound[axis] = Bound(spread.origin, len(spread.numbers), False, None, self.depth, spread=spread)
        for number, reduction in enumerate(walk.reductions):
            held = self.rows[reduction.result] = {}
            for at, value in enumerate(sums[number * each:(number + 1) * each]):
                place = {found.rows: at % 4 // 2, found.columns: at // 4 * 2 + at % 2}
                held[tuple(place[a] for a in reduction.result.type.axes)] = value  # type: ignore[union-attr]

    def _store_boxed_walk(self, store: Op, walk: Walk, found: MatrixWalk, sums: list[Value], mine: Value,
                          column: Value) -> None:
        self._hold_sums(walk, found, sums, mine, column)
        self.store_boxes(store, found.rows, found.columns)
        for axis in (found.rows, found.columns):
            del self.bound[axis]
        for reduction in walk.reductions:
            del self.rows[reduction.result]

    def store_boxes(self, store: Op, rows: str, columns: str) -> None:
        """A warp's rows of all columns, both of which are bound to coordinates that are spread, 16 rows at once."""
        down, across = self.bound[rows].spread, self.bound[columns].spread
        assert down is not None and across is not None
        value, size = store.operands[1], _dtype(store.operands[1]).size_bytes
        own = self.add(self.near(), self.add(self.sums_at, self.mul(self.warp(), self.pieces_bytes(store))))
        panel, panel_bytes = self.panel_columns(store), fragments.ROWS * ROW_BYTES
        put = self._put_wide if size == f32.size_bytes else self._put_pairs
        pieces = [(block, side) for block in range(len(down.numbers) // 2)
                  for side in range(0, 4 * len(across.numbers), self.piece_columns)]
        for number, (block, side) in enumerate(pieces):
            place = self.value(self.add(own, number % self.piece_places * self._piece_bytes(store)))
            self.effect("store_wait", [], pending=self.piece_places - 1)
            for at in range(0, self.piece_columns, panel):
                put(value, (rows, 2 * block), columns, side + at, place, at // panel * panel_bytes)
            self.effect("store_fence", [])
            with self.located(store):
                for at in range(0, self.piece_columns, panel):
                    column = self.value(self.add(across.origin, side + at))
                    self.effect("tensor_store", [place, *self._coordinates_of(
                        store, {rows: self.value(self.add(down.origin, block * fragments.ROWS)), columns: column})],
                        map=self.boxed[store], disp=at // panel * panel_bytes)

    def _put_pairs(self, value: Value, rows: tuple[str, int], columns: str, side: int, place: Value,
                   disp: int) -> None:
        """A panel of 16-bit elements to near memory, 16 x 16 at once. rows: their axis, and the first one's register.
        side: its first column in the tile."""
        axis, top = rows
        op, dtype = value.op, _dtype(value)
        offsets = self.matrix_offsets()
        # Rounding a pair rounds each: what is rounded anyway is not rounded before.
        wide = op.operands[0] if op is not None and op.name == "cast" and _dtype(op.operands[0]) is f32 else value
        for at in range(0, fragments.PANEL, 2 * fragments.COLUMNS):
            some = [self.row(wide, {axis: top + register // 2, columns: (side + here) // 4 + register % 2})
                    for here in range(at, at + 2 * fragments.COLUMNS, fragments.COLUMNS) for register in range(4)]
            pairs = [self.emit(self.depth, "pack2", list(two), ROW_B32, dtype=dtype)
                     for two in zip(some[::2], some[1::2], strict=True)]
            self.effect("store_matrix", [place, offsets, *pairs], flip=at * dtype.size_bytes, disp=disp)

    def matrix_offsets(self) -> Value:
        """Where each lane's row of 16 bytes of 16 x 16 elements goes, for store_matrix."""
        lane = self.iota()
        eight = self.bits(0, "and", self.bits(0, "shr", lane, 3), 1)
        below = self.emit(0, "add", [self.bits(0, "shl", eight, 3), self.bits(0, "and", lane, 7)], ROW_I32)
        return self.swizzled(below, self.bits(0, "shr", lane, 4), ROW_BYTES)

    def _put_wide(self, value: Value, rows: tuple[str, int], columns: str, side: int, place: Value,
                  disp: int) -> None:
        """A panel of f32, 8 rows x 8 columns at once, those of odd rows EXCHANGED_BYTES further."""
        axis, top = rows
        lane = self.iota()
        row = self.bits(0, "shr", lane, 2)
        odd = self.emit(0, "cmp", [self.bits(0, "and", row, 1), self.constant(1, i32)], MASK, cond="eq")
        chunk = self.bits(0, "and", self.bits(0, "shr", lane, 1), 1)
        start = self.emit(0, "add", [self.swizzled(row, chunk, ROW_BYTES),
                                     self.bits(0, "shl", self.bits(0, "and", lane, 1), 3)], ROW_I32)
        turned = self.emit(0, "select", [odd, self.bits(0, "xor", start, EXCHANGED_BYTES), start], ROW_I32)
        block_bytes = fragments.COLUMNS * f32.size_bytes
        exchanged = EXCHANGED_BYTES // block_bytes
        for block in range(ROW_BYTES // block_bytes):
            offsets = self.bits(self.depth, "xor", turned, block * block_bytes) if block else turned
            for half in range(2):
                mine, other = ([self.row(value, {axis: top + half, columns: side // 4 + 2 * b + register})
                                for register in range(2)] for b in (block, block ^ exchanged))
                pair = [self.emit(self.depth, "select", [odd, far, near], ROW_F32)
                        for near, far in zip(mine, other, strict=True)]
                self.effect("store_run", [place, offsets, *pair], dtype=f32, gathered=True, scale=1, near=True,
                            disp=disp + half * 8 * ROW_BYTES, disjoint=True, streaming=False)


def _dtype(value: Value) -> DType:
    assert isinstance(value.type, TileType)
    return value.type.dtype
