"""Rows whose lanes hold what a matrix instruction's sums do, and what is read and computed beside them.

A row of the lane machine holds here what a register of the instruction's sums does (fragments.py: C): with
g = lane div 4 and t = lane mod 4,

    register i of the rows' axis      coordinate 8 i + g
    register j of any other axis      coordinate 8 (j div 2) + 2 t + j mod 2

Enters: axes bound to coordinates that are spread so over lanes and registers (`Spread`). Elementwise ops need nothing
new; loads get a place for each lane, two neighbours at once where they lie together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..ir.nodes import Op, Value
from ..ir.types import MASK, ROW_B32, ROW_F32, ROW_I32, DType, RowType, TileType, b32, f32, i32
from ..tile.plan import axes_of
from .matrix import MatrixLowering, MatrixWalk, Part
from .pieces import ELEMENT_BYTES
from .places import Places, RunPlaces
from .rows import LoweringError
from .state import Access, Bound, Scalar, element_bytes, row_dtype

PAIRED_DTYPES = frozenset({"f32", "i32", "bf16", "f16"})


@dataclass(slots=True)
class Spread:
    """Where the coordinates of an axis lie: origin + lane + number[j] for register j. lane: row<i32>, of each register
    where `lanes` has more than one. valid: of each register, which lanes are inside; empty: all are. repeats: lanes
    that are not repeat the last that is, so that loads need no mask."""

    origin: Scalar
    lanes: list[Value]
    numbers: list[int]
    valid: list[Value] = field(default_factory=list)
    repeats: bool = False

    def lane(self, j: int) -> Value:
        return self.lanes[j if len(self.lanes) > 1 else 0]

    def mask(self, j: int) -> Value | None:
        return self.valid[j] if self.valid else None

    def load_mask(self, j: int) -> Value | None:
        return None if self.repeats else self.mask(j)


class SpreadLowering(MatrixLowering):
    """Coordinates, loads and pairs along axes that are spread. places: of a piece that is being computed."""

    places: Places | None = None

    def along(self, origin: Scalar, extent: int) -> Spread:
        """Of the registers of a sum's columns."""
        lane = self.bits(0, "shl", self.bits(0, "and", self.iota(), 3), 1)
        return Spread(origin, [lane], [8 * (j // 2) + j % 2 for j in range(extent // 4)])

    def down(self, origin: Scalar, count: int, last: Value) -> Spread:
        """Of `count` registers of a sum's rows, up to the row `last`, counted from the origin."""
        group = self.bits(0, "shr", self.iota(), 2)
        rows, valid = [], []
        for number in range(count):
            row = self.emit(0, "add", [group, self.constant(8 * number, i32)], ROW_I32) if number else group
            rows.append(self.emit(self.depth, "min", [row, last], ROW_I32))
            valid.append(self.emit(self.depth, "cmp", [row, last], MASK, cond="le"))
        return Spread(origin, rows, [0] * count, valid, repeats=True)

    def inside(self, spread: Spread, extent: Scalar) -> list[Value]:
        """Which lanes of each register lie before the extent, counted from the origin. Numbers are compared with the
        lane's distance from there: they are none that a loop would hold in registers."""
        ahead = self.emit(self.depth, "sub", [spread.lanes[0], self.row_of(extent)], ROW_I32)
        return [self.emit(self.depth, "cmp", [ahead, self.constant(-number, i32)], MASK, cond="lt")
                for number in spread.numbers]

    def _coordinate(self, axis: str, at: dict[str, int], level: int) -> Value:
        bound = self.bound[axis]
        if bound.spread is None:
            return super()._coordinate(axis, at, level)
        lane = bound.spread.lane(at[axis])
        origin = self.row_of(self.add(bound.spread.origin, bound.spread.numbers[at[axis]]))
        return self.emit(level, "add", [lane, origin], ROW_I32)

    def stage_scales(self, found: MatrixWalk, here: Value, rows: Part,
                     columns: Part) -> tuple[list[Value], list[Value]]:
        """By what the sums of a stage from a coordinate of the depth on are multiplied: for each register of a warp's
        rows, and of its columns; none where there is no scale."""
        made: list[list[Value]] = [[], []]
        scales = found.scales[0] if found.is_scaled else (None, None)
        for number, (axis, part) in enumerate(((found.rows, rows), (found.columns, columns))):
            scale = scales[number]
            if scale is None:
                continue
            start, most, stop = part
            left = self.sub(stop, start)
            if number == 0:
                spread = self.down(start, most // 8, self.row_of(self.sub(left, 1)))
            else:
                spread = self.along(start, most)
                spread.valid = self.inside(spread, left)
            zero = self.constant(0, i32)
            for name, where in ((axis, spread), (found.depth, Spread(here, [zero], [0]))):
                self.bound[name] = Bound(where.origin, len(where.numbers), False, None, self.depth, spread=where)
            deep = self.piece_depth()
            places = Places(self, {axis: most, found.depth: deep}, {axis: 1, found.depth: deep})
            loaded: dict[tuple[Value, Value, int, Value | None], Value] = {}
            for j in range(len(spread.numbers)):
                base, offsets, disp = places.address(scale, {axis: j, found.depth: 0})
                mask = spread.load_mask(j)
                key = (base, offsets, disp, mask)
                if key not in loaded:
                    with self.located(scale):
                        loaded[key] = self.emit(
                            self.depth, "gather", [base, offsets, *([] if mask is None else [mask])], ROW_F32,
                            dtype=_dtype(scale.result), scale=1, disp=disp, masked=mask is not None)
                made[number].append(loaded[key])
            for name in (axis, found.depth):
                del self.bound[name]
        return made[0], made[1]

    def places_of(self, value: Value) -> Places | None:
        """Those of the piece, or of the run, that a value is an element of."""
        if self.places is not None:
            return self.places
        lane = next((a for a in axes_of(value) if a in self.bound and self.bound[a].run > 1), None)
        places = None if lane is None else RunPlaces(self, lane)
        return places if places is not None and places.holds else None

    def _compute(self, value: Value, at: dict[str, int], level: int) -> Value:
        places = self.places_of(value)
        if places is not None:
            known = places.row(value, at, level)
            if known is not None:
                return known
            chosen = places.chosen(value, at)
            if chosen is not None:
                return self.row(chosen, at)
        return super()._compute(value, at, level)

    # Pairs of 16 bits.

    def pair(self, value: Value, at: dict[str, int], axis: str, level: int) -> Value:
        """Two neighbours along an axis as a slot of 16-bit elements."""
        dtype: DType = value.type.dtype  # type: ignore[union-attr]
        op = value.op
        spread = self.bound[axis].spread
        assert spread is not None
        if op is not None and op.name == "load" and not spread.valid:
            access = self.access(op)
            if access.axes.get(axis) == ELEMENT_BYTES and self.in_lines(op.operands[0]):
                base, offsets, disp = self.spread_address(access, at)
                return self.emit(level, "gather", [base, offsets], ROW_B32, dtype=b32, scale=1, disp=disp,
                                 masked=False)
        # Rounding a pair rounds each: what is rounded anyway is not rounded before.
        wide = op.operands[0] if op is not None and op.name == "cast" and _dtype(op.operands[0]) is f32 else value
        rows = []
        for more in range(2):
            here = {**at, axis: at[axis] + more}
            row = self.row(wide, here)
            mask = spread.mask(here[axis])
            if mask is not None:
                row = self.emit(level, "select", [mask, row, self.constant(0.0, row_dtype(dtype))], ROW_F32)
            rows.append(row)
        return self.emit(level, "pack2", rows, ROW_B32, dtype=dtype)

    # Memory.

    def spread_address(self, access: Access, at: dict[str, int]) -> tuple[Value, Value, int]:
        """Base, offsets of the lanes, disp."""
        base, disp = access.base, access.disp
        offsets: Value | None = None
        for axis, stride in access.axes.items():
            bound = self.bound[axis]
            spread = bound.spread
            if spread is None:
                base = self.add(base, self.mul(self.add(bound.offset, at[axis]), stride))
                continue
            base = self.add(base, self.mul(spread.origin, stride))
            number = spread.numbers[at[axis]]
            if isinstance(stride, int):
                disp += number * stride
            else:
                base = self.add(base, self.mul(stride, number))
            lane = spread.lane(at[axis])
            where = max(self.depths.get(lane, 0), self.depth_of(stride))
            memo = self.levels[where].memo
            key = ("spread", lane, stride)
            if key not in memo:
                memo[key] = self.emit(where, "mul", [lane, self.row_of(stride)], ROW_I32)
            part: Value = memo[key]
            if offsets is None:
                offsets = part
                continue
            where = max(self.depths.get(offsets, 0), where)
            memo = self.levels[where].memo
            key = ("spread sum", offsets, part)
            if key not in memo:
                memo[key] = self.emit(where, "add", [offsets, part], ROW_I32)
            offsets = memo[key]
        if offsets is None:
            offsets = self.constant(0, i32)
        return self.value(base), offsets, disp

    def _load(self, op: Op, at: dict[str, int], level: int) -> Value:
        axes = op.result.type.axes  # type: ignore[union-attr]
        if not any(self.bound[a].spread for a in axes):
            places = self.places_of(op.result)
            row = places.load(op, at, level) if isinstance(places, RunPlaces) and op not in self.staged else None
            return super()._load(op, at, level) if row is None else row
        if self.places is not None:
            return self.places.look_up(op, at, level)
        access = self.access(op)
        if access.gathers:
            raise LoweringError("found a gather among what is held as sums of matrix instructions", op)
        axis = next((a for a in axes if self._in_pairs(op, access, a, at)), None)
        here = at if axis is None else {**at, axis: at[axis] & -2}
        base, offsets, disp = self.spread_address(access, here)
        inside = self.all_of(*(self._load_mask(a, at) for a in axes))
        mask = [] if inside is None else [inside]
        if axis is not None:
            memo = self.levels[level].memo
            key = ("pair", op, tuple(here[a] for a in axes))
            if key not in memo:
                made = Op("load_run", [base, offsets, *mask], [RowType(row_dtype(access.dtype))] * 2, {
                    "dtype": access.dtype, "gathered": True, "scale": 1, "disp": disp, "masked": bool(mask)}, None,
                    self.location)
                self.levels[level].builder.block.ops.append(made)
                for result in made.results:
                    self.depths[result] = level
                memo[key] = made.results
            found: Value = memo[key][at[axis] % 2]
            return found
        return self.emit(level, "gather", [base, offsets, *mask], RowType(row_dtype(_dtype(op.result))),
                         dtype=access.dtype, scale=1, disp=disp, masked=bool(mask))

    def all_of(self, *masks: Value | None) -> Value | None:
        """The lanes that are on in all masks; None: in all lanes. Made once."""
        total: Value | None = None
        for mask in masks:
            if mask is None or total is None:
                total = mask if total is None else total
                continue
            depth = max(self.depths.get(total, 0), self.depths.get(mask, 0))
            memo = self.levels[depth].memo
            key = ("all of", total, mask)
            if key not in memo:
                memo[key] = self.emit(depth, "mask_and", [total, mask], MASK)
            total = memo[key]
        return total

    def _in_pairs(self, op: Op, access: Access, axis: str, at: dict[str, int]) -> bool:
        """Whether the neighbours along an axis that a lane holds are neighbours in memory and can be read together."""
        spread = self.bound[axis].spread
        if spread is None or access.dtype.name not in PAIRED_DTYPES or len(spread.lanes) > 1 or len(spread.numbers) < 2:
            return False
        return access.axes[axis] == element_bytes(access.dtype) and self.is_multiple(spread.origin, 2) \
            and spread.load_mask(at[axis] & -2) is spread.load_mask(at[axis] | 1) \
            and self._rows_aligned(op.operands[0], op.operands[1:], axis, 2)

    def _load_mask(self, axis: str, at: dict[str, int]) -> Value | None:
        spread = self.bound[axis].spread
        return None if spread is None else spread.load_mask(at[axis])


def _dtype(value: Value) -> DType:
    assert isinstance(value.type, TileType)
    return value.type.dtype
