"""Where a staged operand of a contraction lies, and how its rows are read and written (staging.py copies it there)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..ir.nodes import Op, Value
from ..ir.types import ROW_B32, ROW_I32, DType, RowType, TensorType, b32, i16, i32
from ..tile.schedule import Panels
from .exact_parts import PARTS, slots_of_parts
from .state import PAIR, Access, Scalar, memory_dtype, row_dtype

if TYPE_CHECKING:
    from .stores import Stores


class StagedPanel:
    """[depth][pieces of the lane axis]: what the rows of a contraction's vector operand are read from.

    dtype: of the rows. memory: how they lie. column_bytes: where there is a panel for each piece of a block, how much
    further than the first that of a column is. in_place: of an element, where it is a piece of a packed tensor.
    squared: rows of slots 2 k and 2 k + 1 lie there zipped: both of a column, then of the next.
    """

    in_place: DType | None = None
    squared = False

    def __init__(self, lowering: Stores, base: Scalar, depth_axis: str, lane: str, dtype: DType,
                 column_bytes: Scalar) -> None:
        self.lowering = lowering
        self.base = base
        self.depth_axis = depth_axis
        self.lane = lane
        self.dtype = dtype
        self.memory = memory_dtype(dtype)
        self.column_bytes = column_bytes
        self.piece_bytes = lowering.lanes * dtype.size_bytes
        self.start_base: Scalar = 0

    @property
    def depth_bytes(self) -> int:
        """From one step of the depth to the next, in the panel of the piece that is bound."""
        return self.lowering.bound[self.lane].count * self.piece_bytes

    def access(self) -> Access:
        """Of the first row at each step of the depth."""
        axes: dict[str, Scalar] = {self.depth_axis: self.depth_bytes}
        if self.column_bytes:
            axes[self.lane] = self.column_bytes
        return Access(self.base, 0, axes, self.memory, relative=True)

    def address(self, at: dict[str, int]) -> tuple[list[Value], dict[str, Any]]:
        """Operands and attributes of a memory op for the row at register coordinates."""
        access = self.access()
        access.disp = at[self.lane] * self.piece_bytes
        return self.lowering.address(access, {self.depth_axis: at[self.depth_axis]})

    def load(self, at: dict[str, int], level: int) -> Value:
        low, k = self.lowering, at[self.depth_axis]
        if not self.squared:
            return self._load(at, level)
        # A loop over single slots is only of the last one, of an even number.
        assert self.depth_axis in low.paired
        first = {**at, self.depth_axis: k & ~1}
        memo = low.levels[level].memo
        key = ("two slots", self, tuple(first.items()))
        if key not in memo:
            zipped = [self._load({**first, self.depth_axis: n}, level) for n in (k & ~1, k | 1)]
            memo[key] = low.emit_rows(level, "unzip", zipped, {})
        found: Value = memo[key][k & 1]
        return found

    def _load(self, at: dict[str, int], level: int) -> Value:
        operands, attributes = self.address(at)
        return self.lowering.emit(level, "load", operands, RowType(self.dtype), dtype=self.memory,
                                  masked=False, **attributes)

    def copy(self, places: list[dict[str, int]], row_at: Callable[[dict[str, int]], Value]) -> None:
        """A row at a time, or two slots; those of a last one alone are there twice. places: what is bound of the depth
        and the lane axis."""
        low = self.lowering
        _copy(self, self.depth_axis, places, row_at, lambda rows: low.emit_rows(low.depth, "zip", rows, {}))

    def store(self, at: dict[str, int], row: Value) -> None:
        operands, attributes = self.address(at)
        self.lowering.effect("store", [row, *operands], dtype=self.memory, masked=False, streaming=False,
                             **attributes)

    def column(self) -> Access:
        """The panel of the bound piece, over the depth and the lane axis, which is then open to the piece alone."""
        low, lane = self.lowering, self.lane
        base = self.base
        if self.column_bytes:
            here = low.sub(low.bound[lane].offset, low.open[lane].offset)
            base = low.add(base, low.mul(here, self.column_bytes))
        return Access(base, 0, {self.depth_axis: self.depth_bytes, lane: self.dtype.size_bytes}, self.memory,
                      relative=True)

    def store_square(self, rows: Sequence[Value], column: Access) -> None:
        """A square, one row for each of as many steps of the depth: a panel is deep enough for it."""
        low = self.lowering
        for step, row in enumerate(rows):
            operands, attributes = low.address(column, {self.depth_axis: step})
            low.effect("store", [row, *operands], dtype=self.memory, masked=False, streaming=False, **attributes)

    def _start_address(self, piece: int) -> tuple[list[Value], dict[str, Any]]:
        low = self.lowering
        relative = bool(self.column_bytes)
        axes: dict[str, Scalar] = {self.lane: i32.size_bytes} if relative else {}
        access = Access(self.start_base, piece * self.piece_bytes, axes, i32, relative=relative)
        return low.address(access, {})

    def start(self, at: dict[str, int], level: int) -> Value:
        """The row that a sum of products with this piece of the lane axis begins with, of i32."""
        operands, attributes = self._start_address(at[self.lane])
        return self.lowering.emit(level, "load", operands, ROW_I32, dtype=i32, masked=False, **attributes)

    def store_start(self, piece: int, row: Value) -> None:
        operands, attributes = self._start_address(piece)
        self.lowering.effect("store", [row, *operands], dtype=i32, masked=False, streaming=False, **attributes)


class PanelOfParts(StagedPanel):
    """[depth in slots][parts][pieces of the lane axis]: floats as sums of bf16 (exact_parts.py). It is written with the
    depth open to elements. floats: the dtype that they had; source: that of their rows."""

    def __init__(self, lowering: Stores, base: Scalar, depth_axis: str, lane: str, floats: DType,
                 column_bytes: Scalar) -> None:
        super().__init__(lowering, base, depth_axis, lane, b32, column_bytes)
        self.floats, self.source = floats, row_dtype(floats)

    @property
    def depth_bytes(self) -> int:
        return PARTS[self.floats] * super().depth_bytes

    def store_pair(self, even: Value, odd: Value, place: Access, step: int = 0, disp: int = 0) -> None:
        """Two steps of the depth, the first of which is even. place: of the first part, over slots of the depth."""
        low, slot_bytes = self.lowering, place.axes[self.depth_axis]
        assert isinstance(slot_bytes, int)
        axes = {**place.axes, self.depth_axis: slot_bytes // PAIR}
        for part, row in enumerate(slots_of_parts(low, low.depth, even, odd, self.floats, True)):
            here = replace(place, disp=place.disp + disp + part * slot_bytes // PARTS[self.floats], axes=axes)
            operands, attributes = low.address(here, {self.depth_axis: step})
            low.effect("store", [row, *operands], dtype=b32, masked=False, streaming=False, **attributes)

    def store_square(self, rows: Sequence[Value], column: Access) -> None:
        for step in range(0, len(rows), PAIR):
            self.store_pair(rows[step], rows[step + 1], column, step)


class PanelInPlace(StagedPanel):
    """The panels of a packed tensor, which need no copy: a piece of the lane axis lies in one of them. before_bytes: of
    what a piece of the depth leaves out before it."""

    def __init__(self, lowering: Stores, op: Op, panels: Panels, lane: str, depth_axis: str) -> None:
        super().__init__(lowering, lowering.slot(f"{op.operands[0].name}.data"), depth_axis, lane,
                         lowering.operand_dtype(op), 0)
        low, t = lowering, op.operands[0].type
        assert isinstance(t, TensorType)
        self.panels = panels
        self.in_place = t.dtype
        if low.packing is None:
            self.memory = t.dtype
        columns, depth = low.extent(t.dims[panels.columns]), low.extent(t.dims[panels.depth])
        self.slot_bytes = panels.elements * t.dtype.size_bytes
        self.piece_bytes = low.lanes * self.slot_bytes
        self.panel_bytes = low.mul(low.ceil_div(depth, panels.elements), panels.width * self.slot_bytes)
        self.start_base = low.add(self.base, low.mul(low.ceil_div(columns, panels.width), self.panel_bytes))
        o = low.open[depth_axis] if low.packing is None else low.packing.elements
        origin = o.offset if o.origin is None else o.origin
        before = low.scalar("s_floordiv", origin, panels.elements)
        if low.packing is not None:
            before = low.add(before, low.open[depth_axis].offset)   # in slots, where a block of the depth is open
        self.before_bytes = low.mul(before, self.depth_bytes)

    @property
    def depth_bytes(self) -> int:
        return self.panels.width * self.slot_bytes

    def _base(self) -> Scalar:
        """Of the panel, or the part of one, in which the piece lies that is bound."""
        low, width = self.lowering, self.panels.width
        bound = low.bound[self.lane]
        base = low.add(self.base, low.mul(low.scalar("s_floordiv", bound.offset, width), self.panel_bytes))
        if bound.count * low.lanes < width:
            base = low.add(base, low.mul(low.scalar("s_mod", bound.offset, width), self.slot_bytes))
        return base

    def access(self) -> Access:
        base = self.lowering.add(self._base(), self.before_bytes)
        return Access(base, 0, {self.depth_axis: self.depth_bytes}, self.memory, relative=True)

    def address(self, at: dict[str, int]) -> tuple[list[Value], dict[str, Any]]:
        low, access = self.lowering, self.access()
        part, piece = self.part_of(at[self.lane])
        access.base = low.add(access.base, low.mul(self.part_bytes(), part))
        access.disp = piece * self.piece_bytes
        return low.address(access, {self.depth_axis: at[self.depth_axis]})

    def part_of(self, piece: int) -> tuple[int, int]:
        """The part of the columns (Bound.parts) in which a piece of those bound lies, and which piece it is there."""
        bound = self.lowering.bound[self.lane]
        return divmod(piece, bound.count // bound.parts)

    def part_bytes(self) -> Scalar:
        """From the panel that is bound to that of the next part."""
        low, bound = self.lowering, self.lowering.bound[self.lane]
        if bound.parts == 1:
            return 0
        return low.mul(low.scalar("s_floordiv", bound.apart, self.panels.width), self.panel_bytes)

    def _start_address(self, piece: int) -> tuple[list[Value], dict[str, Any]]:
        return self.lowering.address(Access(self.start_base, 0, {self.lane: i32.size_bytes}, i32), {self.lane: piece})

    def rest(self, start: Scalar) -> PanelRest:
        """The elements that fill no slot, from a coordinate of the depth on: the beginnings of the last slots."""
        low = self.lowering
        assert self.in_place is not None
        size = self.in_place.size_bytes
        last = low.mul(low.scalar("s_floordiv", start, self.panels.elements), self.depth_bytes)
        before = low.add(low.mul(low.bound[self.lane].offset, self.slot_bytes), low.mul(start, size))
        base = low.sub(low.add(self._base(), last), before)
        return PanelRest(self, Access(base, 0, {self.lane: self.slot_bytes, self.depth_axis: size}, self.in_place))


class PanelOfElements(PanelInPlace):
    """The same of panels that were packed element by element, where rows of slots are wanted: what they are made of."""

    def load(self, at: dict[str, int], level: int) -> Value:
        low, lane = self.lowering, self.lane
        count, memo = low.slot_elements, low.levels[level].memo
        together = count if low.bound[lane].count % count == 0 else 1
        first = at[lane] // together * together
        key = ("slots of elements", self, first, at[self.depth_axis])
        if key not in memo:
            places = [self._neighbour(number, first, at) for number in range(count)]
            memo[key] = self._interleaved(places, level) if together == count else [self._joined(places, level)]
        found: Value = memo[key][at[lane] - first]
        return found

    def _neighbour(self, number: int, piece: int, at: dict[str, int]) -> tuple[list[Value], dict[str, Any]]:
        """Operands and attributes of a memory op for element `number` of the slots at register coordinates."""
        low = self.lowering
        access = Access(low.add(self._base(), self.before_bytes), number * self.depth_bytes + piece * self.piece_bytes,
                        {self.depth_axis: low.slot_elements * self.depth_bytes}, self.memory, relative=True)
        return low.address(access, {self.depth_axis: at[self.depth_axis]})

    def _interleaved(self, places: list[tuple[list[Value], dict[str, Any]]], level: int) -> list[Value]:
        rows = [self.lowering.emit(level, "load", operands, ROW_B32, dtype=b32, masked=False, **attributes)
                for operands, attributes in places]
        return self.lowering.emit_rows(level, "interleave", rows, {})

    def _joined(self, places: list[tuple[list[Value], dict[str, Any]]], level: int) -> Value:
        low = self.lowering
        even, odd = (low.emit(level, "load", operands, ROW_I32, dtype=i16, masked=False, **attributes)
                     for operands, attributes in places)
        even = low.emit(level, "and", [even, low.constant(0xFFFF, i32)], ROW_I32)
        odd = low.emit(level, "shl", [odd], ROW_I32, amount=i16.bits)
        return low.emit(level, "bitcast", [low.emit(level, "or", [even, odd], ROW_I32)], ROW_B32)


class SlotsInPlace:
    """An operand whose slots lie in memory as they are wanted. access: of slots, over the depth and the lane axis."""

    in_place = None

    def __init__(self, lowering: Stores, access: Access, depth_axis: str) -> None:
        step = access.axes[depth_axis]
        assert isinstance(step, int)
        self.lowering, self.access, self.depth_bytes = lowering, access, step

    def address(self, at: dict[str, int]) -> tuple[list[Value], dict[str, Any]]:
        return self.lowering.address(self.access, at)


class PanelRest:
    """Elements of a packed tensor that fill no slot, read as if columns were no panels. access: of the bound columns,
    of the first part."""

    in_place = None

    def __init__(self, panel: PanelInPlace, access: Access) -> None:
        self.panel, self.access = panel, access

    def load(self, at: dict[str, int], level: int) -> Value:
        panel, low, access = self.panel, self.panel.lowering, self.access
        part, piece = panel.part_of(at[panel.lane])
        access = replace(access, base=low.add(access.base, low.mul(panel.part_bytes(), part)))
        return low.fetch_row(access, row_dtype(access.dtype), {**at, panel.lane: piece}, level, None)


class StagedRows:
    """[row blocks][depth blocks][count rows][lanes of depth]: where a contraction reads broadcast elements. squared: of
    two rows the first two slots of both lie before the other two."""

    in_place = None
    squared = False

    def __init__(self, lowering: Stores, base: Scalar, row_axis: str, depth_axis: str, count: int,
                 depth_extent: Scalar, dtype: DType) -> None:
        self.lowering = lowering
        self.base = base
        self.row_axis = row_axis
        self.depth_axis = depth_axis
        self.count = count
        self.depth_extent = depth_extent
        self.dtype = dtype

    @property
    def step_bytes(self) -> int:
        """What a block of rows takes for each step of the depth."""
        return self.count * self.dtype.size_bytes

    def row_start(self) -> Scalar:
        """The first of the rows that are bound, counted from the first that is staged."""
        return self.lowering.sub(self.lowering.bound[self.row_axis].offset, self.lowering.open[self.row_axis].offset)

    def address(self, at: dict[str, int]) -> tuple[list[Value], dict[str, object]]:
        """Operands and attributes of a memory op for the element at register coordinates."""
        return self._address(at, self.squared)

    def _address(self, at: dict[str, int], squared: bool) -> tuple[list[Value], dict[str, object]]:
        low, size = self.lowering, self.dtype.size_bytes
        row, depth = low.bound[self.row_axis], low.bound[self.depth_axis]
        lanes = low.lanes
        row_start = self.row_start()
        if row.count == self.count:
            base = low.add(self.base, low.mul(low.mul(self.depth_extent, size), row_start))
        else:
            block = low.scalar("s_floordiv", row_start, self.count)
            inside = low.sub(row_start, low.mul(block, self.count))
            base = low.add(low.add(self.base, low.mul(low.mul(low.mul(self.depth_extent, size), self.count), block)),
                           low.mul(inside, lanes * size))
            if squared and row.count == 1:
                base = low.sub(base, low.mul(low.scalar("s_and", inside, 1), 2 * size))
        step, depth_start = self.depth_step(at[self.depth_axis])
        if depth.lane:
            index = low.mul(depth_start, self.count * size)
            disp = step * lanes * self.count * size
        else:
            whole = low.scalar("s_and", depth_start, -lanes)
            inside = low.scalar("s_and", depth_start, lanes - 1)
            index = low.add(low.mul(whole, self.count * size), low.mul(inside, size))
            disp = step * size
            if squared:
                index = low.add(index, low.mul(low.scalar("s_and", inside, 2), size))
                disp += (step & 2) * size - (at[self.row_axis] & 1) * 2 * size
        disp += at[self.row_axis] * lanes * size
        return low.memory_operands(base, index, 1, disp)

    def depth_step(self, j: int) -> tuple[int, Scalar]:
        """Register coordinate j of the depth as steps from one that is bound, and that one, counted from the first."""
        depth, first = self.lowering.bound[self.depth_axis], self.lowering.open[self.depth_axis].offset
        if depth.lane or depth.apart == 1:
            return j, self.lowering.sub(depth.offset, first)
        return 0, self.lowering.sub(self.lowering.coordinate(self.depth_axis, j), first)

    def load(self, at: dict[str, int], level: int) -> Value:
        operands, attributes = self.address(at)
        return self.lowering.emit(level, "load_splat", operands, RowType(self.dtype), dtype=self.dtype, **attributes)

    def copy(self, places: list[dict[str, int]], row_at: Callable[[dict[str, int]], Value]) -> None:
        """A vector of the depth at a time, or two of two rows; of a last row alone it is there twice. places: what is
        bound of the rows and the depth."""
        low = self.lowering
        _copy(self, self.row_axis, places, row_at,
              lambda rows: low.emit_rows(low.depth, "exchange", rows, {"distance": 2}))

    def store(self, at: dict[str, int], row: Value) -> None:
        operands, attributes = self._address(at, False)
        self.lowering.effect("store", [row, *operands], dtype=self.dtype, masked=False, streaming=False, **attributes)

    def prefetch_next(self) -> None:
        """Ask for as much of the next block of rows as is read of this one."""
        self._prefetch(self.lowering.add(self.row_start(), self.count), 0, 2)

    def prefetch_ahead(self, ahead_bytes: int) -> None:
        """Ask for as much of this block as is read of it, so far ahead, into the first cache."""
        self._prefetch(self.row_start(), ahead_bytes, 1)

    def _prefetch(self, start: Scalar, ahead_bytes: int, level: int) -> None:
        """start: the first row of a block."""
        low = self.lowering
        row, depth = low.bound[self.row_axis], low.bound[self.depth_axis]
        if row.count != self.count or depth.lane:
            return
        block = low.mul(self.depth_extent, self.step_bytes)
        base = low.add(self.base, low.mul(block, low.scalar("s_floordiv", start, self.count)))
        index = low.mul(low.sub(depth.offset, low.open[self.depth_axis].offset), self.step_bytes)
        for line in range(ahead_bytes, ahead_bytes + depth.count * self.step_bytes, 64):
            operands, attributes = low.memory_operands(base, index, 1, line)
            low.effect("prefetch", operands, level=level, **attributes)


class StagedRowsHere(StagedRows):
    """[depth blocks][count rows][lanes of depth]: the rows that are bound."""

    def row_start(self) -> Scalar:
        return 0

    def prefetch_next(self) -> None:
        """The next rows are copied from the matrix itself, along which the processor sees ahead."""


class StagedColumns(StagedRows):
    """[row blocks][depth][one vector of rows]: broadcast elements whose source is contiguous along the rows."""

    @property
    def step_bytes(self) -> int:
        return self.lowering.lanes * self.dtype.size_bytes

    def _address(self, at: dict[str, int], squared: bool) -> tuple[list[Value], dict[str, object]]:
        low, size = self.lowering, self.dtype.size_bytes
        vector_bytes = low.lanes * size
        row = low.bound[self.row_axis]
        start = low.sub(row.offset, low.open[self.row_axis].offset)
        block = low.scalar("s_floordiv", start, self.count)
        base = low.add(self.base, low.mul(low.mul(self.depth_extent, vector_bytes), block))
        if row.count != self.count and not row.lane:
            base = low.add(base, low.mul(low.sub(start, low.mul(block, self.count)), size))
        step, depth_start = self.depth_step(at[self.depth_axis])
        index = low.mul(depth_start, vector_bytes)
        disp = step * vector_bytes + (0 if row.lane else at[self.row_axis] * size)
        return low.memory_operands(base, index, 1, disp)


def _copy(panel: StagedPanel | StagedRows, axis: str, places: Sequence[dict[str, int]],
          row_at: Callable[[dict[str, int]], Value], together: Callable[[list[Value]], Sequence[Value]]) -> None:
    """The row of each place as it is, or, `squared`, what `together` makes of two neighbours along an axis; a last one
    alone is its own neighbour."""
    for at in places:
        if not panel.squared:
            panel.store(at, row_at(at))
        elif at[axis] % 2 == 0:
            beside = {**at, axis: at[axis] + 1}
            first = row_at(at)
            for place, row in zip((at, beside), together([first, row_at(beside) if beside in places else first]),
                                  strict=True):
                panel.store(place, row)
