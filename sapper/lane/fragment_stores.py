"""Stores of what lies spread over lanes as sums of matrix instructions do: as it lies, or after shuffles.

Enters a store of a tile whose axes are spread (spread.py); leaves stores of runs, by the way that takes least time
(conversions.py):

    as it is     a lane stores its two neighbours: four lanes 8 elements of a row
    shuffles     2 or 4 blocks of 8 columns at once: bits of the lane's number change places with those of the block's,
                 so that a lane has 4 or 8 neighbours, and fewer sectors are touched at once

The sums of a product may go through near memory, too, in rows (matrix.py): `stays` chooses among the three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import gcd

from ..ir.nodes import Op, Value
from ..ir.types import MASK, ROW_B32, ROW_I32, DType, TensorType, TileType, b32, f32, i32
from ..tile.affine import affine
from ..tile.ops import place_of
from ..tile.plan import COSTLY, Walk, axes_of
from ..tile.schedule import Panels
from ..tile.semantics import ELEMENTWISE
from . import fragments
from .conversions import NEAR_MEMORY, RUN_BYTES, Price, Way, cheapest, conversions, moved, turned
from .layout import LANE, Layout
from .matrix import PADDING_BYTES, MatrixWalk, Part, Sum
from .runs import RUN_DTYPES
from .spread import Spread, SpreadLowering
from .state import Bound, Scalar

PACKED = ("bf16", "f16")
MOST_BITS = 2
"""Of the lane's number along columns."""
MOST_OPS = 4
"""Of what is computed for each element (plan.py: COSTLY). It stands there for each register, while rows in near memory
are stored in a loop: gates and the like would make most of a kernel's text."""


def fragment(rows: int, columns: int, packed: bool = False) -> Layout:
    """Of a warp's sums (fragments.py: C); packed: two neighbours of 16 bits are a word."""
    return Layout.parse(f"m: {rows // 8}@register × 8@lane; n: {columns // fragments.COLUMNS}@register × 4@lane"
                        + ("" if packed else " × 2@register"))


def in_rows(rows: int, columns: int, lanes: int, along_rows: bool, aligned: bool = True) -> Layout:
    """Of rows, or columns, that the lanes read together in near memory, runs of them where they are stored so."""
    if along_rows:
        return Layout.parse(f"m: {rows // lanes}@register × {lanes}@lane; n: {columns}@register")
    run = gcd(columns // lanes, RUN_BYTES // f32.size_bytes) if aligned else 1
    return Layout.parse(f"m: {rows}@register; n: {columns // (lanes * run)}@register × {lanes}@lane × {run}@register")


class FragmentStores(SpreadLowering):
    """Chooses ways for stores of sums, and emits those from registers."""

    # What the stores are.

    def granule(self, store: Op, columns: str, most: int) -> int:
        """So many columns, a power of two, are inside or outside together, from any multiple of their number on, and
        lie in memory at a multiple of their bytes, up to RUN_BYTES. (Rows of a few bytes count as aligned, too, but not
        as multiples of any number: sapper/runtime/specialise.py.)"""
        last, found = affine(store.operands[-1]), self._range_of(columns)
        if last is None or found is None or self.axis_along(store) != columns or not self.in_lines(
                store.operands[0]):
            return 1
        start = affine(found[0])
        if start is None or not start.is_constant:
            return 1
        granule = gcd(self.hint(found[1])[1], most, start.constant, last.constant)
        return granule & -granule

    def _range_of(self, axis: str) -> tuple[Value, Value] | None:
        """Where the loop over an axis starts and stops."""
        for op in self.function.walk():
            axes = op.attributes["axes"] if op.name == "tiles" else \
                [op.attributes["axis"]] if op.name == "whole" else []
            if axis in axes:
                start, stop = op.operands[2 * axes.index(axis):][:2]
                return start, stop
        return None

    def _ends_at(self, axis: str, dim: object) -> bool:
        """Whether an axis ends where a tensor's dimension does."""
        found = self._range_of(axis)
        return found is not None and is_extent(found[1], dim)

    def _made_of_sums(self, value: Value, sums: set[Value]) -> bool:
        """Whether a value is computed element by element of sums of 32 bits, of numbers and of what is loaded for each
        row, each column or each of both."""
        pending, seen = [value], set[Value]()
        while pending:
            v = pending.pop()
            t = v.type
            assert isinstance(t, TileType)
            if v in seen or not t.axes or (v in sums and t.dtype in (f32, i32)):
                continue
            if v in sums or v.op is None or (t.dtype.bits > 32 and t.dtype.name != "index"):
                return False
            if v.op.name == "load":
                tensor = v.op.operands[0]
                if (tensor.op is not None and not self.in_lines(tensor)) or isinstance(
                        self.stride_classes.get(tensor.name), Panels) or any(
                        affine(index) is None for index in v.op.operands[1:]):
                    return False
            elif v.op.name not in (*ELEMENTWISE, "full", "index"):
                return False
            else:
                pending += v.op.operands
            seen.add(v)
        return True

    def _are_plain(self, walk: Walk, found: MatrixWalk) -> bool:
        """Whether all that follows is stores, of what can be computed in few ops where the sums are, along one of the
        axes."""
        sums, axes = {reduction.result for reduction in walk.reductions}, {found.rows, found.columns}
        ops = sum(COSTLY.get(op.name, 1) for op in self._cone(walk)
                  if op.name not in ("store", "load", "cast") and set(axes_of(op.result)) == axes)
        return ops <= MOST_OPS and not self.schedule.chunks and all(      # chunks need not end where a tile does
            isinstance(store, Op) and store.name == "store" and self._made_of_sums(store.operands[1], sums)
            and set(axes_of(store.operands[1])) == axes and self.axis_along(store) in axes
            and _dtype(store).name in RUN_DTYPES for store in walk.after)

    def _cone(self, walk: Walk) -> list[Op]:
        """The stores of a walk, and what makes their values of the sums."""
        pending = [root for root in walk.after if isinstance(root, Op)]
        seen: dict[Op, None] = {}
        sums = {reduction.result for reduction in walk.reductions}
        while pending:
            op = pending.pop(0)
            if op not in seen:
                seen[op] = None
                values = op.operands[1:2] if op.name == "store" else [] if op.name == "load" else op.operands
                pending += [v.op for v in values if v.op is not None and v not in sums]
        return list(seen)

    # The choice.

    def ways_out(self, store: Op, columns: str, high: int, wide: int) -> list[Way]:
        """Out of the registers of a warp, which has high x wide elements of rows and columns."""
        moves, dtype = self.facts.moves, _dtype(store)
        assert moves is not None
        size = dtype.size_bytes
        if self.axis_along(store) != columns:
            held = fragment(high, wide)
            return [Way("as it is", held, moved(held, "m", size, moves, False))]
        granule = self.granule(store, columns, wide)
        packed = dtype.name in PACKED and granule > 1
        held, each = fragment(high, wide, packed), size * (1 + packed)
        ways = [Way("as it is", held, moved(held, "n", each, moves, granule > 1))]
        for bits in range(1, MOST_BITS + 1):
            run = 2 << bits
            if granule % run == 0 and run * size <= RUN_BYTES and wide % (fragments.COLUMNS << bits) == 0 \
                    and not self._is_read(store):
                after = turned(held, "n", bits)
                shuffled = next(way for way in conversions(held, after, moves) if way.name == "shuffles")
                ways.append(Way("shuffles", after, shuffled.price + moved(after, "n", each, moves), shuffled.steps))
        return ways

    def _is_read(self, store: Op) -> bool:
        """Whether what it stores is loaded somewhere: a lane must then not store what another one still reads."""
        return any(op.name == "load" and place_of(op.operands[0]) is place_of(store.operands[0])
                   for op in self.function.walk())

    def ways_of_sums(self, walk: Walk, found: MatrixWalk, high: int, wide: int) -> list[Way]:
        """Of the sums of a warp's high x wide elements, and what the walk computes of them, to where it is stored; none
        if only near memory is one."""
        moves = self.facts.moves
        if moves is None or wide < self.lanes or not self._are_plain(walk, found):
            return []
        held, names, through = fragment(high, wide), [], None
        stored = Price()
        for op in self._cone(walk):
            of_both = op.name == "load" and set(axes_of(op.result)) == {found.rows, found.columns}
            if op.name != "store" and not of_both:
                continue
            size, along = _dtype(op).size_bytes, self.axis_along(op)
            turns, aligned = along != found.columns, self.in_lines(op.operands[0])
            if turns and high % self.lanes:
                return []
            rows = in_rows(high, wide, self.lanes, turns, aligned)
            axis = "m" if turns else "n"
            if through is None:
                near = next(way for way in conversions(held, rows, moves, PADDING_BYTES) if way.name == NEAR_MEMORY)
                through = near.price.times(len(walk.reductions))
                through = replace(through, near_bytes=near.price.near_bytes * len(walk.reductions))
            through += moved(rows, axis, size, moves, aligned)
            if op.name == "load":
                stored += moved(held, axis, size, moves, aligned and not turns)
            else:
                best = cheapest(self.ways_out(op, found.columns, high, wide), moves)
                names.append(best.name)
                stored += best.price
        assert through is not None
        return [Way(" and ".join(dict.fromkeys(names)), held, stored), Way(NEAR_MEMORY, held, through)]

    def stays(self, walk: Walk, found: MatrixWalk, high: int, wide: int, warps: int, at_hand: int) -> bool:
        """Whether it takes least time if they do not go through near memory. at_hand: see `cheapest`."""
        ways, moves, unit = self.ways_of_sums(walk, found, high, wide), self.facts.moves, self.facts.matrix
        if not ways:
            return False
        assert moves is not None and unit is not None
        return cheapest(ways, moves, warps, at_hand, unit.near_bytes) is ways[0]

    # Storing.

    def store_held(self, walk: Walk, found: MatrixWalk, sums: list[list[Sum]], rows: Part, columns: Part) -> None:
        last = self.row_of(self.sub(self.sub(rows[2], 1), rows[0]))
        down, across = self.down(rows[0], rows[1] // 8, last), self.along(columns[0], columns[1])
        down.repeats = False        # another warp may store the last row that is read
        left = self.sub(columns[2], columns[0])
        across.valid = self._inside_by(across, left, max(
            self.granule(store, found.columns, columns[1]) for store in walk.after if isinstance(store, Op)))
        for axis, spread in ((found.rows, down), (found.columns, across)):
            self.bound[axis] = Bound(spread.origin, len(spread.numbers), False, None, self.depth, spread=spread)
        for reduction, some in zip(walk.reductions, sums, strict=True):
            held = self.rows[reduction.result] = {}
            for value, row, column in some:
                place = {found.rows: row // 8, found.columns: column // 8 * 2 + column % 2}
                held[tuple(place[a] for a in axes_of(reduction.result))] = value
        for store in walk.after:
            assert isinstance(store, Op)
            self.store_spread(store, found.rows, found.columns, left)
        for axis in (found.rows, found.columns):
            del self.bound[axis]
        for reduction in walk.reductions:
            del self.rows[reduction.result]

    def _inside_by(self, spread: Spread, extent: Scalar, granule: int) -> list[Value]:
        """Which lanes of each register are before the extent, of which granules are whole: those of whole blocks of 8
        columns share a mask, and so do neighbours."""
        ahead = self.emit(self.depth, "sub", [spread.lanes[0], self.row_of(extent)], ROW_I32)
        shared = granule if granule % fragments.COLUMNS == 0 else min(granule, 2)
        return [self.emit(self.depth, "cmp", [ahead, self.constant(-(number // shared * shared), i32)], MASK, cond="lt")
                for number in spread.numbers]

    def store_spread(self, op: Op, rows: str, columns: str, left: Scalar | None = None,
                     masked: Callable[[Value | None], Value | None] = lambda mask: mask) -> None:
        """A store of elements of both axes by its cheapest way. left: how many columns are inside, None: all. masked:
        what else says which lanes store."""
        moves = self.facts.moves
        assert moves is not None
        down, across = self.bound[rows].spread, self.bound[columns].spread
        assert down is not None and across is not None
        high, wide = 8 * len(down.numbers), 4 * len(across.numbers)
        way = cheapest(self.ways_out(op, columns, high, wide), moves)
        value, access, granule = op.operands[1], self.access(op), self.granule(op, columns, wide)
        bits, packed = len(way.steps), granule > 1 and _dtype(op).name in PACKED
        run = 2 << bits if granule > 1 else 1
        held = self.bound[columns]
        to = held
        if bits:
            lanes = self._along_lanes(way.held, 2 if packed else 1)
            to = replace(held, spread=Spread(across.origin, [lanes], across.numbers))
            if left is not None:
                to.spread.valid = self._inside_by(to.spread, left, granule)
        for at in self._coordinates((rows, columns)):
            if at[columns] % run:
                continue
            if packed:
                words = [self.packed_pair(value, {rows: at[rows], columns: at[columns] + more})
                         for more in range(0, run, 2)]
            else:
                words = [self.row(value, {rows: at[rows], columns: at[columns] + more}) for more in range(run)]
            words = self.exchanged(words, way.steps, self.depth)
            self.bound[columns] = to
            base, offsets, disp = self.spread_address(access, at)
            mask = masked(self.all_of(down.mask(at[rows]), to.spread.mask(at[columns])))
            self.bound[columns] = held
            tail = [] if mask is None else [mask]
            if run == 1:
                self.effect("scatter", [*words, base, offsets, *tail], dtype=access.dtype, scale=1, disp=disp,
                            masked=bool(tail), disjoint=True)
            else:
                self.effect("store_run", [base, offsets, *words, *tail], dtype=b32 if packed else access.dtype,
                            gathered=True, scale=1, disp=disp, masked=bool(tail), disjoint=True,
                            streaming=self.streams(op))

    def _along_lanes(self, held: Layout, word: int) -> Value:
        """row<i32>: which column each lane's first register has, where so many are a word."""
        total, weight = None, word
        for factor in reversed(held.axes["n"]):
            if factor.level == LANE:
                shift = factor.stride.bit_length() - 1
                digit = self.bits(0, "shr", self.iota(), shift) if shift else self.iota()
                part = self.bits(0, "shl", self.bits(0, "and", digit, factor.extent - 1), weight.bit_length() - 1)
                total = part if total is None else self.emit(0, "add", [total, part], ROW_I32)
            weight *= factor.extent
        assert total is not None
        return total

    def packed_pair(self, value: Value, at: dict[str, int]) -> Value:
        """Two neighbours along the last axis as a slot of 16-bit elements. Rounding a pair rounds each: what is rounded
        anyway is not rounded before."""
        op, dtype = value.op, value.type.dtype  # type: ignore[union-attr]
        wide = op.operands[0] if op is not None and op.name == "cast" and _of(op.operands[0]) is f32 else value
        axis = list(at)[-1]
        pair = [self.row(wide, {**at, axis: at[axis] + more}) for more in range(2)]
        return self.emit(self.depth, "pack2", pair, ROW_B32, dtype=dtype)


def is_extent(value: Value, dim: object) -> bool:
    """Whether a scalar is the extent of a dimension, a name or a number."""
    op = value.op
    return op is not None and dim == (op.attributes["name"] if op.name == "dim" else
                                      op.attributes["value"] if op.name == "const" else None)


def _of(value: Value) -> DType:
    assert isinstance(value.type, TileType)
    return value.type.dtype


def _dtype(op: Op) -> DType:
    """Of the tensor that a load or a store is of."""
    t = op.operands[0].type
    assert isinstance(t, TensorType)
    return t.dtype
