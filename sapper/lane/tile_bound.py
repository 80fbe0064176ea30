"""Contractions on tile registers inside a loop that holds the lane axis of their sums: what all of them share.

Enters a walk whose columns are bound to the lanes, and whose rows are open and few enough for scratch memory. Its tiles
multiply rows of the left operand by slots of the right one, and leave their sums in scratch memory, row by row; what
follows reads them there like any other value. tile_blocks.py has blocks of quantised weights, tile_slots.py attention.

What holds: every tile is whole, and none reads beyond a tensor: rows that would are copied. Rows beyond those that
there are have sums that nothing reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..ir.nodes import Block, Op, Value
from ..ir.types import MASK, ROW_B32, S64, TILE_B32, DType, TensorType, TileRegisterType, TileType, b32, i32, u8
from ..tile.affine import affine
from ..tile.ops import memory_of
from ..tile.plan import Walk, axes_of
from .state import Access, Bound, Open, Scalar, element_bytes

if TYPE_CHECKING:
    from .model import Model
    from .walk import WalkLowering

FINISHED_ROWS, FINISHED_VECTORS = 8, 16
"""Rows of sums, and vectors of them, that are finished at once, at most."""


def dtype_of(value: Value) -> DType:
    assert isinstance(value.type, TileType)
    return value.type.dtype


def lies_in_tensor(model: Model, value: Value) -> bool:
    """Whether a value is read where it lies in a tensor that the function is given."""
    op = value.op
    return (op is not None and op.name == "load" and value not in model.buffers and value not in model.rows
            and memory_of(op.operands[0]) in model.function.arguments and not model.access(op).gathers)


@dataclass(slots=True)
class Left:
    """A tile of a left operand that lies in a tensor: `slots` of each row, from `disp` on behind where the access has
    the row."""

    load: Op
    access: Access
    disp: int
    slots: int


class BoundTiles:
    """The emission of one walk. size: of a tile, rows and slots; row_bytes: of its rows. axis, rows: the open rows.
    lane: the axis of the columns; wide: tiles of them. tall: tiles of rows at once. most: of the rows, whole tiles.
    sum_dtype: of the sums."""

    tall = 1

    def __init__(self, low: WalkLowering, walk: Walk, axis: str, lane: str, most: int, sum_dtype: DType) -> None:
        unit = low.facts.tiles
        assert unit is not None
        self.low, self.walk, self.axis, self.lane, self.sum_dtype = low, walk, axis, lane, sum_dtype
        self.size, self.row_bytes = unit.size, unit.size * b32.size_bytes
        self.tile_bytes = self.size * self.row_bytes
        self.rows, self.wide = low.open[axis], low.bound[lane].count
        self.most = -(-most // self.size) * self.size

    def load(self, base: Scalar, stride: Scalar, disp: int = 0) -> Value:
        low = self.low
        return low.emit(low.depth, "tile_load", [low.value(base), low.value(stride)], TILE_B32, disp=disp)

    def zeros(self) -> Value:
        """Sums to begin with."""
        return self.low.emit(self.low.depth, "tile_zero", [], TileRegisterType(self.sum_dtype))

    def multiply(self, total: Value, left: Value, right: Value, dtypes: tuple[DType, DType]) -> Value:
        low = self.low
        return low.emit(low.depth, "tile_multiply", [total, left, right], total.type, dtype=dtypes[0],
                        right_dtype=dtypes[1])

    def has_memory(self, name: str) -> bool:
        return (f"tile {name}", self.walk.reductions[0]) in self.low.stage_memory

    def memory(self, name: str, size_bytes: int) -> Scalar:
        """Scratch memory of that name, the same each time that the walk is emitted."""
        low = self.low
        key = (f"tile {name}", self.walk.reductions[0])
        if key not in low.stage_memory:
            low.stage_memory[key] = low.scratch([(size_bytes, 1)], u8)
        return low.stage_memory[key]

    def clear(self, start: Value, first: int, stop: int) -> None:
        """Zeros in some rows of a tile, stored once, before all that is being emitted."""
        low = self.low
        zeros = low.emit(0, "bitcast", [low.constant(0, i32)], ROW_B32)
        for row in range(first, stop):
            low.levels[0].builder.block.ops.append(Op("store", [zeros, start], (), {
                "dtype": b32, "masked": False, "streaming": False, "disp": row * self.row_bytes}))

    # The left operand.

    def left_rows(self, lefts: Sequence[Left]) -> list[tuple[Scalar, Scalar]]:
        """Address of the first row and stride of each left operand: where it lies, or, if whole tiles there reached
        beyond the tensor, copies of the rows that there are."""
        low, rows = self.low, self.rows
        low.bound[self.axis] = Bound(rows.offset, 1, False, None, low.depth)
        places, strides = [], []
        for left in lefts:
            access = Access(left.access.base, left.disp, left.access.axes, b32)
            places.append(low.address_of(*low.address(access, {})))
            strides.append(left.access.axes[self.axis])
        del low.bound[self.axis]
        last = low.sub(low.round_up(rows.extent, self.tall * self.size), 1)
        beyond: Scalar = 0
        for left, place, stride in zip(lefts, places, strides, strict=True):
            reach = low.add(low.add(place, low.mul(stride, last)), self.row_bytes)
            beyond = low.scalar("s_max", beyond, low.sub(reach, self._end(left.load)))
        reaches = low.emit(low.depth_of(beyond), "s_cmp", [low.value(beyond), low.value(0)], S64, cond="gt")
        copied, in_place = Block(), Block()
        low.enter(copied)
        made = self._copy(lefts, places, strides)
        low.effect("yield", [low.value(scalar) for pair in made for scalar in pair])
        low.leave()
        low.enter(in_place)
        low.effect("yield", [low.value(scalar) for pair in zip(places, strides, strict=True) for scalar in pair])
        low.leave()
        choice = Op("if", [reaches], (S64,) * (2 * len(places)), {}, [copied, in_place], low.location)
        low.finish(choice)
        return list(zip(choice.results[::2], choice.results[1::2], strict=True))

    def _end(self, load: Op) -> Scalar:
        """The address behind the last element of the tensor that a load reads."""
        low, tensor = self.low, memory_of(load.operands[0])
        assert isinstance(tensor.type, TensorType)
        size = element_bytes(tensor.type.dtype)
        end = low.add(low.slot(f"{tensor.name}.data"), size)
        for dim, stride in zip(tensor.type.dims, low.strides(tensor), strict=True):
            end = low.add(end, low.mul(low.mul(low.sub(low.extent(dim), 1), stride), size))
        return end

    def _copy(self, lefts: Sequence[Left], places: Sequence[Scalar],
              strides: Sequence[Scalar]) -> list[tuple[Scalar, Scalar]]:
        """Copies of all rows, each with zeros behind its slots."""
        low = self.low
        base = self.memory("lefts", len(lefts) * self.most * self.row_bytes)
        made: list[tuple[Scalar, Scalar]] = []
        for number, (left, place, stride) in enumerate(zip(lefts, places, strides, strict=True)):
            to = low.add(base, number * self.most * self.row_bytes)
            mask = low.emit(0, "mask_first", [low.value(left.slots)], MASK)

            def row(position: Value, place: Scalar = place, stride: Scalar = stride, to: Scalar = to,
                    mask: Value = mask) -> None:
                source = low.value(low.add(place, low.mul(position, stride)))
                value = low.emit(low.depth, "load", [source, mask], ROW_B32, dtype=b32, masked=True, disp=0)
                low.effect("store", [value, low.value(low.add(to, low.mul(position, self.row_bytes)))], dtype=b32,
                           masked=False, streaming=False, disp=0)

            low.counted("copy", 0, self.rows.extent, 1, row)
            made.append((to, self.row_bytes))
        return made

    # The sums.

    def store(self, totals: Sequence[Value], position: Scalar, first: int = 0) -> None:
        """Sums of a tile of rows, `position` behind the first, to scratch memory: those of each value, tile by tile.
        first: the tile of columns that they begin with."""
        low, stride = self.low, self.wide * self.row_bytes
        sums = self.memory("sums", -(-len(totals) // self.wide) * self.most * stride)
        to = low.value(low.add(sums, low.mul(position, stride)))
        for number, total in enumerate(totals, first):
            value, column = divmod(number, self.wide)
            low.effect("tile_store", [total, to, low.value(stride)],
                       disp=value * self.most * stride + column * self.row_bytes)

    @property
    def rows_at_once(self) -> int:
        return min(FINISHED_ROWS, FINISHED_VECTORS // self.wide)

    def finish(self, values: Sequence[Value]) -> None:
        """What follows the contractions, row by row. values: what the stored sums are."""
        low, stride = self.low, self.wide * self.row_bytes
        sums = self.memory("sums", len(values) * self.most * stride)
        for number, value in enumerate(values):
            axes: dict[str, Scalar] = {self.axis: stride, self.lane: self.sum_dtype.size_bytes}
            low.buffers[value] = Access(sums, number * self.most * stride, axes, self.sum_dtype, relative=True)
        self._keep_in_place(values)

        def rows(carried: list[Value]) -> list[Value]:
            low._roots(self.walk.after)
            return carried

        def finished() -> None:
            low.axis_loop(self.axis, self.rows_at_once, False, [], rows,
                          tails=low.slot_tails(self.walk.after, self.axis))

        all_stay = self._all_stay(values)
        if all_stay is None:
            finished()
        else:
            low.fork(all_stay, lambda: None, finished)
        for value in values:
            del low.buffers[value]

    def _all_stay(self, values: Sequence[Value]) -> Value | None:
        """Whether what follows leaves every sum as it is, where it lies, as coordinates alone say: below the diagonal
        of a causal mask. None where that is not known."""
        low = self.low
        root = self.walk.after[0] if len(self.walk.after) == len(values) == 1 else None
        if not isinstance(root, Value) or root.op is None or root.op.name != "select" or (
                root.op.operands[1] is not values[0] or low.pending_buffers.get(root) != low.buffers[values[0]]):
            return None
        mask = root.op.operands[0].op
        if mask is None or mask.name not in ("le", "lt", "ge", "gt") or not all(
                isinstance(v.type, TileType) and v.type.dtype.is_integer for v in mask.operands):
            return None
        left, right = map(affine, mask.operands)
        if left is None or right is None:
            return None
        above = left.plus(right.scaled(-1)) if mask.name[0] == "g" else right.plus(left.scaled(-1))
        least: Scalar = above.constant
        for value, factor in above.scalars.items():
            least = low.add(least, low.mul(low.integer(value), factor))
        for axis, factor in above.axes.items():
            at = self.rows if axis == self.axis else low.bound.get(axis)
            if at is None:
                return None
            extent = at.extent if isinstance(at, Open) else at.count * (low.lanes if at.lane else 1)
            end = low.add(at.offset, 0 if factor > 0 else low.sub(extent, 1))
            least = low.add(least, low.mul(end, factor))
        return low.emit(low.depth, "s_cmp", [low.value(least), low.value(0)], S64, cond="g" + mask.name[1])

    def _keep_in_place(self, values: Sequence[Value]) -> None:
        """Have one that is made of each sum, and kept for the walks after this one, take its place: half as much lies
        in the caches then."""
        low = self.low
        kept = [root for root in self.walk.after if isinstance(root, Value) and root not in low.carried_buffers
                and root not in low.slot_axes and low.kept_dtype(root) is self.sum_dtype
                and set(axes_of(root)) == {self.axis, self.lane}]
        for root, value in zip(kept, values, strict=False):
            low.pending_buffers[root] = replace(low.buffers[value])
