"""Contractions on tile registers: a matrix instruction whose operands and sums go through memory.

Enters a walk that contracts narrow operands, on a target with tile registers (`Facts.tiles`). `fit` says how they serve
it, or why they do not; `emit_walk` emits it. Each piece of the walk goes through three steps:

    load, multiply   along the depth, rows of the left operand and panels of the right one, sums in tile registers
    store            the sums, to a few KiB of scratch memory
    finish           what follows the contraction reads them there, row by row, like any other value

Where nothing follows but a store of the sums as they are, whole pieces go straight to the tensor.

A piece is `ACROSS` tiles of sums high and wide; where two contractions share their left operand, each has half as many
columns. The right operand lies in panels of slots, as packed dot products have them too (packed.py: what is packed for
one serves the other). The left one is read where it lies if its rows are contiguous along the depth; else it is copied.

What holds: every tile is whole, so nothing is configured anew. Rows: the last tile ends where they do, and only those
rows are stored that no tile before it had; where there are fewer than a tile has, they are copied to a place with room
for one. Columns: panels are whole. Depth: what is left of it is copied beside zeros, of both operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..ir.nodes import Block, Op, Value
from ..ir.types import (
    MASK,
    ROW_B32,
    S64,
    TILE_B32,
    DType,
    TileRegisterType,
    TileType,
    b32,
    bf16,
    f32,
    i16,
    i32,
    i64,
    u8,
)
from ..tile.affine import affine
from ..tile.ops import memory_of
from ..tile.plan import Walk, axes_of
from ..tile.schedule import TileUnit
from ..tile.sums import is_join
from .exact_parts import PARTS, Products, products
from .packed import DOT2_BF16, DOTS, Dot, Packing, Term
from .prefetches import FEW_ROWS, LINE_BYTES
from .staged import SlotsInPlace
from .state import PAIR, Access, Bound, Capacity, Open, Scalar, element_bytes
from .tile_copies import copy_parts, copy_slots, lies_along_rows, stage_parts, turn_parts

if TYPE_CHECKING:
    from .axis_loops import WalkChoice
    from .model import Model
    from .walk import WalkLowering

ACROSS = 2
"""Tiles of sums in each direction: each operand's tile is then used twice for each time that it is loaded. Four tiles
of sums, two of either operand: all that there are where there are eight."""

FEWEST_ROWS, FEWEST_PACKED_ROWS = 8, 6
"""Rows from which tiles are worth it: where panels have to be made, and where the operand came in panels. Fewer
take as long as a whole tile, for which the panels come from memory no faster."""

FEWEST_PARTED_ROWS = (17, 64)
"""The same where the left operand has several parts, or the right one as well."""

FEWEST_PARTED_COLUMNS = (32, 128)
"""Columns from which copies of a left operand in parts are worth it, likewise."""

COPIED_FOR_COLUMNS = 512
"""Columns from which a copy of a left operand that the second cache does not hold is worth it (_goes_in_tiles). On a
Granite Rapids, of the time without: bf16 of 1024 cubed 0.93, of 2048 cubed 0.80, 128 x 4096 x 4096 0.87, i8 0.98, 0.93;
512 cubed, which the cache holds, 1.06."""

COPIED_BLOCKS = 8
"""Halves of the second cache that such a copy takes at most: each worker has one."""

FINISHED_ROWS = 4
"""Rows of sums that are finished at once."""

PANEL_PARTS = 3
"""Places of their depth from which few rows meet packed panels at a time (_meets_few)."""


AS_IT_IS: Products = ((0, 0),)

PARTED = tuple(dtype for dtype, parts in PARTS.items() if parts > 1)


@dataclass(frozen=True, slots=True)
class TileWalk:
    """How tiles serve a walk. rows, columns, depth: its axes. left: the operand that all contractions have in common.
    rights: the loads of the others, one for each. dot: the products of a slot. products: the parts of both operands
    (exact_parts.py) that are multiplied, one of each where tiles take them as they are. within: the axis of a slot's
    elements, where both operands have one in memory; the depth then counts slots."""

    rows: str
    columns: str
    depth: str
    left: Value
    rights: tuple[Op, ...]
    dot: Dot
    products: Products = AS_IT_IS
    within: str | None = None

    @property
    def step_slots(self) -> int:
        """How much of the depth a slot has."""
        return 1 if self.within is not None else self.dot.elements

    @property
    def left_parts(self) -> int:
        return 1 + max(left for left, _ in self.products)

    @property
    def right_parts(self) -> int:
        return 1 + max(right for _, right in self.products)

    @property
    def parted(self) -> bool:
        """Whether parts of operands are multiplied: the left one is copied, with zeros to the end of its last tile."""
        return len(self.products) > 1

    def packing(self, low: WalkLowering, walk: Walk) -> Packing | None:
        """Of the depth in slots; no operand is turned, as tiles multiply all signs. None where it counts slots."""
        if self.within is not None:
            return None
        return Packing(self.dot, self.depth, walk.reduced, low.open[self.depth], self.right_parts > 1,
                       terms={op: Term() for op in walk.reductions})


def fit(model: Model, walk: Walk, columns: str) -> TileWalk | str:
    """How tiles serve a walk whose axis `columns` lies across the lanes, or why they do not."""
    unit = model.facts.tiles
    if unit is None:
        return "the target has no tile registers" if model.facts.matrix is None else \
            "the target's matrix instructions do not serve this kernel"
    if unit.size != model.lanes:
        return f"a row has {model.lanes} lanes; a tile has {unit.size} columns"
    if walk.inner or not 1 <= len(walk.reductions) <= ACROSS or any(op.name != "contract" for op in walk.reductions):
        return f"the walk is not one contraction by itself, or {ACROSS}"
    within = next((axis for axis in walk.reduced if axis in model.open and model.open[axis].extent == PAIR), None)
    depths = [axis for axis in walk.reduced if len(walk.reduced) == 1 or axis != within]
    if len(depths) != 1 or len(walk.outer) != 2 or columns not in walk.outer or any(
            axis not in model.open for axis in walk.axes):
        return "the contraction is not over one axis, with two axes in its result that this walk loops over"
    (depth,), within = depths, within if len(walk.reduced) > 1 else None
    (rows,) = (axis for axis in walk.outer if axis != columns)
    lefts: list[Value] = []
    rights: list[Op] = []
    dots: set[tuple[Dot, Products]] = set()
    for op in walk.reductions:
        sides = {frozenset(axes_of(v)): v for v in op.operands}
        left, right = sides.get(frozenset({rows, *walk.reduced})), sides.get(frozenset({columns, *walk.reduced}))
        if left is None or right is None:
            return f"its operands are not tiles over {rows} and {depth}, and {columns} and {depth}"
        dtypes = _dtype(left), _dtype(right)
        dot = dot_of(unit, *dtypes, _dtype(op.result))
        if dot is None:
            return f"no tile multiplies {' by '.join(dtype.name for dtype in dtypes)} with sums of " \
                   f"{_dtype(op.result).name}"
        if right.op is None or right.op.name != "load" or right in model.buffers or right in model.rows \
                or model.access(right.op).gathers:
            return "the operand that spans the columns is not read as it lies in a tensor"
        panels = model.panels_of(right.op)
        if panels is not None and panels.elements != dot[0].elements and _dtype(right) not in PARTED and not (
                panels.elements == 1 and dot[0] is DOT2_BF16 and _divides(PAIR, model.open[depth])):
            return f"{right.op.operands[0].name} is packed in slots of {panels.elements} elements, a tile has " \
                   f"{dot[0].elements}"
        lefts.append(left)
        rights.append(right.op)
        dots.add(dot)
    if any(not _same(left, lefts[0]) for left in lefts) or len(dots) > 1:
        return "the contractions have no left operand in common"
    found = TileWalk(rows, columns, depth, lefts[0], tuple(rights), *dots.pop(), within)
    if within is not None and not _lies_in_slots(model, found):
        return f"{within} is no axis of neighbours of bf16 that tiles take as they lie"
    if not model.is_bounded(depth):
        return f"no panel can be packed: the range of {depth} is known only as the kernel runs"
    if not _lies(model, found) and not found.parted and not model.is_bounded(rows):
        return f"the left operand can't be copied: the range of {rows} is known only as the kernel runs"
    return found


def dot_of(unit: TileUnit, left: DType, right: DType, result: DType) -> tuple[Dot, Products] | None:
    """How tiles multiply elements of these dtypes, and which parts of them; None: they don't."""
    if (left.name, right.name) in unit.products:
        dot = next((dot for dot in DOTS if dot.result is result and {left, right} <= {*dot.dtypes}), None)
        return None if dot is None else (dot, AS_IT_IS)
    parts = products(left, right)
    if parts is None or (bf16.name, bf16.name) not in unit.products or result is not f32:
        return None
    return DOT2_BF16, parts


def on_tiles(unit: TileUnit, contraction: Op) -> bool:
    """Whether a contraction is one of types that tiles multiply."""
    return dot_of(unit, *map(_dtype, (*contraction.operands, contraction.result))) is not None


def is_worth(model: Model, found: TileWalk) -> bool:
    """Whether tiles take less time than packed dot products, typically."""
    unit = model.facts.tiles
    assert unit is not None
    least = {found.rows: fewest_rows(model, found), found.depth: unit.size * found.step_slots,
             found.columns: FEWEST_PARTED_COLUMNS[found.right_parts > 1] if found.parted else model.lanes}
    if found.right_parts > 1 and not _few_streams(model, found):
        return False
    return all(model.extent_hint(axis) >= extent for axis, extent in least.items())


def _few_streams(model: Model, found: TileWalk) -> bool:
    """Whether panels of parts come from a tensor in long runs: it was packed, or it is contiguous along the depth, or
    a block has more than one of them."""
    panel_bytes = model.extent_hint(found.depth) * ACROSS * model.lanes * found.right_parts * bf16.size_bytes
    accesses = [model.access(op) for op in found.rights if model.panels_of(op) is None]
    along_depth = all(access.axes.get(found.depth) == element_bytes(access.dtype) for access in accesses)
    return along_depth or 2 * panel_bytes <= model.block_bytes


def fewest_rows(model: Model, found: TileWalk) -> int:
    """Rows from which tiles are worth it."""
    if found.parted:
        return FEWEST_PARTED_ROWS[found.right_parts > 1]
    packed = found.within is not None or all(model.panels_of(op) is not None for op in found.rights)
    return FEWEST_PACKED_ROWS if packed else FEWEST_ROWS


def _dtype(value: Value) -> DType:
    assert isinstance(value.type, TileType)
    return value.type.dtype


def _same(left: Value, other: Value) -> bool:
    """Whether two operands are one, or loads of the same."""
    return left is other or (left.op is not None and other.op is not None and left.op.name == other.op.name == "load"
                             and left.op.operands == other.op.operands)


def _lies(low: WalkLowering, found: TileWalk) -> bool:
    """Whether tiles of the left operand can be read where it lies in a tensor."""
    op = found.left.op
    if op is None or op.name != "load" or found.parted or found.left in low.buffers or found.left in low.rows:
        return False
    access = low.access(op)
    step = element_bytes(access.dtype) * (found.dot.elements if found.within is not None else 1)
    return not access.gathers and access.axes.get(found.depth) == step


def _lies_in_slots(model: Model, found: TileWalk) -> bool:
    """Whether both operands have the elements of a slot as their last dimension, and columns fill tiles."""
    size = found.dot.elements * _dtype(found.left).size_bytes
    accesses = [model.access(op) for op in (found.left.op, *found.rights) if op is not None and op.name == "load"]
    left, *rights = accesses
    lies = len(rights) == len(found.rights) and found.within is not None and all(
        access.axes.get(found.within) == size // found.dot.elements and not access.gathers for access in accesses)
    columns = model.open[found.columns].extent
    return (lies and found.dot is DOT2_BF16 and not found.parted and left.axes.get(found.depth) == size
            and _lies(model, found) and isinstance(columns, int) and columns % model.lanes == 0
            and all(right.axes.get(found.columns) == size and isinstance(right.axes.get(found.depth), int)
                    and model.panels_of(op) is None for op, right in zip(found.rights, rights, strict=True)))


def _divides(size: int, o: Open) -> bool:
    """Whether an extent is known to be a multiple of a size."""
    return (o.extent if isinstance(o.extent, int) else o.divisor) % size == 0


def emit_walk(low: WalkLowering, walk: Walk, choice: WalkChoice) -> None:
    """All of a walk, with the choice that the model made for it."""
    assert choice.tiles is not None
    _Emission(low, walk, choice, choice.tiles).run()


@dataclass(slots=True)
class _Left:
    """Where the left operand lies: its row 0, which is the first of the walk, and how far apart rows are. in_tiles: it
    lies tile by tile (tile_copies.py), zeros behind the depth's end, and the stride is what a row takes of that. here:
    so lie only the rows of the piece at hand, as nobody knows how many there may be."""

    base: Scalar
    stride: Scalar
    in_tiles: bool = False
    here: bool = False


class _Emission:
    """The emission of one walk.

    size: of a tile, rows and slots; row_bytes: of its rows. across: tiles of sums beside each other, of each
    contraction; sum_bytes: of a row of sums in memory. range: the rows. columns: all of them, not a block's.
    elements, slots: the depth. steps: whole tiles along the depth; rest: whole slots beyond them; partial: elements
    beyond these.
    """

    def __init__(self, low: WalkLowering, walk: Walk, choice: WalkChoice, found: TileWalk) -> None:
        unit = low.facts.tiles
        assert unit is not None
        self.low, self.walk, self.choice, self.found = low, walk, choice, found
        self.size, self.row_bytes = unit.size, unit.size * b32.size_bytes
        self.across = ACROSS // len(walk.reductions)
        self.sum_bytes = ACROSS * self.row_bytes
        self.sum_dtype = found.dot.result
        self.left_dtype = bf16 if found.parted else _dtype(found.left)
        self.right_dtype = bf16 if found.parted else _dtype(found.rights[0].result)
        self.range, self.columns = low.open[found.rows], low.open[found.columns]
        self.left = _Left(0, 0)
        self.rest: Scalar = 0
        self.partial: Scalar = 0

    def run(self) -> None:
        low, found = self.low, self.found
        low.use_tiles()
        self.elements = low.open[found.depth]
        with low.packed(self.choice.packing):
            self.slots = low.open[found.depth]
            if found.right_parts > 1:       # both operands have zeros to the end of the last tile
                deep = self.size * found.dot.elements
                self.rest, self.partial, self.steps = 0, 0, low.ceil_div(self.elements.extent, deep)
                self.left = self._left()
                low._panel_blocks(self.choice, found.columns, self._block)
                return
            self.rest = 0 if _divides(self.size, self.slots) else low.scalar("s_mod", self.slots.extent, self.size)
            self.steps = low.scalar("s_floordiv", self.slots.extent, self.size)
            fills = _divides(found.step_slots, self.elements)
            self.partial = 0 if fills else low.scalar("s_mod", self.elements.extent, found.dot.elements)
            self.left = self._left()
            low._panel_blocks(self.choice, found.columns, self._block)

    @property
    def beyond(self) -> Scalar:
        """0 if whole tiles are all of the depth."""
        return self.low.add(self.rest, self.partial)

    # The left operand.

    @property
    def _padded_bytes(self) -> Scalar:
        """Of a copied row: whole tiles."""
        deep = self.size * self.found.step_slots
        return self.low.mul(self.low.ceil_div(self.elements.extent, deep), self.row_bytes)

    def _left(self) -> _Left:
        low, found, extent = self.low, self.found, self.range.extent
        if found.parted or self._goes_in_tiles():
            bounded = low.is_bounded(found.rows)
            dim = None if bounded else self._dim_of_rows()
            room = low._capacity(found.rows) if bounded else ACROSS * self.size
            if dim is not None:
                room = Capacity(1, (dim,)) if isinstance(dim, str) else dim
            place = self._copied_rows("left", room)
            if bounded:
                self._copy_once(place, extent)
            elif dim is not None:       # there is no room for more than that
                self._copy_once(place, low.scalar("s_min", extent, low.extent(dim)))
            return _Left(place, low.mul(self._padded_bytes, found.left_parts), True, not bounded and dim is None)
        if not _lies(low, found):
            copy = self._copy_kept if found.left in low.slot_axes else self._copy_elements
            return self._copy(self._copied_rows("left", low._capacity(found.rows)), extent, copy)
        assert found.left.op is not None
        access = low.access(found.left.op)
        base = low.add(low.add(access.base, access.disp), low.mul(self.range.offset, access.axes[found.rows]))
        lies = _Left(low.add(base, low.mul(self.elements.offset, access.axes[found.depth])), access.axes[found.rows])
        if _divides(self.size, self.range) or (isinstance(extent, int) and extent >= self.size):
            return lies
        few = self._copied_rows("few", self.size)
        copy = self._copy_slots if self.partial == 0 else self._copy_elements
        if isinstance(extent, int):
            return self._copy(few, extent, copy)
        is_few = low.emit(low.depth_of(extent), "s_cmp", [extent, low.value(self.size)], S64, cond="lt")
        self._copy(few, self._selected(is_few, extent, 0), copy)
        return _Left(self._selected(is_few, few, lies.base), self._selected(is_few, self._padded_bytes, lies.stride))

    def _dim_of_rows(self) -> int | str | None:
        """How many rows the tensor has that the left operand is read from, which bounds their range; None if it is
        none, or is read otherwise than by that axis."""
        op = self.found.left.op
        if op is None or op.name != "load" or memory_of(op.operands[0]) is not op.operands[0]:
            return None
        for index, dim in zip(op.operands[1:], op.operands[0].type.dims, strict=True):  # type: ignore[union-attr]
            form = affine(index)
            if form is not None and form.axes == {self.found.rows: 1} and not form.scalars and form.constant == 0:
                return dim if isinstance(dim, int | str) else None
        return None

    def _copy_once(self, place: Scalar, count: Scalar) -> None:
        """Copy the first `count` rows that are open, but not where the worker's walk before had the same ones: words of
        its scratch memory say where the first of them is, and how many there are."""
        low, found, rows = self.low, self.found, self.range

        def copy() -> None:
            low.open[found.rows] = replace(rows, extent=count)
            self._copy_in_tiles(place)
            low.open[found.rows] = rows

        first = self._first_element()
        if first is None:
            copy()
            return
        key = ("tile words", self.walk.reductions[0])       # of the same memory, wherever the walk is emitted
        if key not in low.stage_memory:
            low.stage_memory[key] = low.scratch([(2, 1)], i64)
            low.levels[0].builder.block.ops.append(
                Op("s_store", [low.value(-1), low.value(low.stage_memory[key])], (), {"dtype": i64}))
        words = low.value(low.stage_memory[key])
        others: Value | None = None
        for disp, wanted in ((0, first), (i64.size_bytes, low.value(count))):
            there = low.emit(low.depth, "s_load", [words], S64, dtype=i64, disp=disp)
            differs = low.emit(low.depth, "s_cmp", [there, wanted], S64, cond="ne")
            others = differs if others is None else low.emit(low.depth, "s_or", [others, differs], S64)
        assert others is not None

        def anew() -> None:
            copy()
            low.effect("s_store", [first, words], dtype=i64)
            low.effect("s_store", [low.value(count), words], dtype=i64, disp=i64.size_bytes)

        low.fork(others, anew, lambda: None)

    def _first_element(self) -> Value | None:
        """The address of the left operand's first element, where all that is copied follows from it: it lies in a
        tensor that the kernel only reads."""
        low, found, op = self.low, self.found, self.found.left.op
        if op is None or op.name != "load" or found.left in low.buffers or found.left in low.rows or (
                memory_of(op.operands[0]) in low.stored):
            return None
        access = low.access(op)
        same = all(isinstance(s, int) or low.depth_of(s) == 0 for s in (self.elements.offset, self.elements.extent))
        if access.gathers or not same or access.axes.keys() - {found.rows, found.depth}:
            return None
        start = low.add(access.base, low.mul(self.range.offset, access.axes.get(found.rows, 0)))
        return low.value(low.add(start, access.disp))

    def _copy_in_tiles(self, place: Scalar) -> None:
        """The rows that are open, to tiles from `place` on."""
        low, found, rounds = self.low, self.found, self.found.right_parts > 1
        of = low, found.left, found.rows, found.depth, place
        if found.parted and lies_along_rows(low, found.left, found.rows):
            turn_parts(*of, rounds)
            return
        rows = low.open[found.rows]
        low._loop(found.rows, rows.offset, low.add(rows.offset, rows.extent), 1, False, False, [],
                  lambda _: copy_parts(*of, rounds) if found.parted else copy_slots(*of))

    def _goes_in_tiles(self) -> bool:
        """Whether a left operand that lies in a tensor is copied tile by tile, in the order in which products read it:
        a processor follows one stream from the last cache, and not 32 rows."""
        low, found = self.low, self.found
        if not _lies(low, found) or found.within is not None or self.partial != 0 or not low.is_bounded(found.rows):
            return False
        size_bytes = self.range.hint * self.elements.hint * self.left_dtype.size_bytes
        fits = low.block_bytes <= size_bytes <= COPIED_BLOCKS * low.block_bytes
        return fits and self.columns.hint >= COPIED_FOR_COLUMNS

    def _selected(self, condition: Value, then: Scalar, other: Scalar) -> Value:
        low = self.low
        depth = max(low.depth_of(scalar) for scalar in (condition, then, other))
        return low.emit(depth, "s_select", [condition, low.value(then), low.value(other)], S64)

    def _copied_rows(self, name: str, rows: object) -> Scalar:
        """Scratch memory for so many rows, whole tiles of them."""
        low, op = self.low, self.walk.reductions[0]
        key = (f"tile {name}", op)
        if key not in low.stage_memory:
            low.stage_memory[key] = low.scratch([
                (rows, self.size), (low._capacity(self.found.depth), self.size * self.found.step_slots),  # type: ignore[list-item]
                (self.found.left_parts * self.found.dot.elements // self.found.step_slots, 1)], self.left_dtype)
        return low.stage_memory[key]

    def _copy(self, base: Scalar, count: Scalar, copy: Callable[[Access], None]) -> _Left:
        """The first `count` rows, with zeros behind the depth's end."""
        low, found = self.low, self.found
        stride = self._padded_bytes
        place = Access(low.sub(base, low.mul(self.range.offset, stride)), 0, {found.rows: stride}, b32)

        def row(_: list[Value]) -> list[Value]:
            copy(place)
            return []

        low._loop(found.rows, self.range.offset, low.add(self.range.offset, count), 1, False, False, [], row)
        return _Left(base, stride)

    def _copy_slots(self, place: Access) -> None:
        """A row that is contiguous along the depth: slots as they are, and what is left of the last tile, zeros."""
        low, found = self.low, self.found

        def slots(_: list[Value]) -> list[Value]:
            at = {found.rows: 0, found.depth: 0}
            if found.within is None:
                row = low.slot_row(found.left, at, False)
            else:
                assert found.left.op is not None
                mask = low.bound[found.depth].mask
                row = low.fetch_row(self._slots_of(low.access(found.left.op)), b32, at, low.depth, mask)
            to = Access(place.base, 0, {**place.axes, found.depth: b32.size_bytes}, b32)
            to.base = low.sub(to.base, low.mul(self.slots.offset, b32.size_bytes))
            low.put(to, row, b32, at, (found.rows, found.depth), padded=True)
            return []

        low.axis_loop(found.depth, 1, True, [], slots)

    def _copy_kept(self, place: Access) -> None:
        """A row of slots that are kept (slots.py), which are neighbours along the rows there; the last one may be half
        full, with 0 above."""
        low, found, full = self.low, self.found, self.slots
        low.open[found.depth] = replace(full, extent=low.ceil_div(self.elements.extent, found.dot.elements))

        def slots(_: list[Value]) -> list[Value]:
            at = {found.rows: 0, found.depth: 0}
            to = Access(place.base, 0, {**place.axes, found.depth: b32.size_bytes}, b32)
            low.put(to, low.kept_slots(found.left, at), b32, at, (found.rows, found.depth), padded=True)
            return []

        low.axis_loop(found.depth, 1, True, [], slots)
        low.open[found.depth] = full

    def _copy_elements(self, place: Access) -> None:
        """A row of any value, element by element."""
        low, found = self.low, self.found
        dtype = _dtype(found.left)
        if self.beyond != 0:
            low.bound[found.depth] = Bound(0, 1, False, None, low.depth)
            end = Access(low.add(place.base, low.sub(self._padded_bytes, self.row_bytes)), 0, place.axes, b32)
            operands, attributes = low.address(end, {found.rows: 0})
            low.effect("store", [self._zeros(), *operands], dtype=b32, masked=False, streaming=False, **attributes)
            del low.bound[found.depth]

        def elements(_: list[Value]) -> list[Value]:
            to = Access(low.sub(place.base, low.mul(self.elements.offset, dtype.size_bytes)), 0,
                        {**place.axes, found.depth: dtype.size_bytes}, dtype)
            for at in low._coordinates((found.rows, found.depth)):
                low.put(to, low.row(found.left, at), dtype, at, (found.rows, found.depth))
            return []

        with low.unpacked():
            low.axis_loop(found.depth, 2, True, [], elements)

    def _slots_of(self, access: Access) -> Access:
        """Where the slots of an operand lie that has their elements as its last dimension."""
        return Access(access.base, access.disp, {axis: step for axis, step in access.axes.items()
                                                 if axis != self.found.within}, b32)

    def _zeros(self) -> Value:
        low = self.low
        return low.emit(0, "bitcast", [low.constant(0, i32)], ROW_B32)

    # Pieces.

    def _block(self) -> list[Value]:
        """All rows, with a block of panels."""
        low, found = self.low, self.found
        for op in found.rights:
            if found.within is not None:
                low.staged[op] = SlotsInPlace(low, self._slots_of(low.access(op)), found.depth)
            elif found.right_parts > 1:
                stage_parts(low, op, found.columns, found.depth, self.choice)
            else:
                low._stage(op, self.walk, self.choice)
        high = ACROSS * self.size
        extent, offset = self.range.extent, self.range.offset
        whole = extent if _divides(high, self.range) else low.sub(extent, low.scalar("s_mod", extent, high))
        end = low.add(offset, extent)
        if whole != 0:
            low.counted(found.rows, offset, low.add(offset, whole), high, lambda start: self._row(start, start, high))
        if not _divides(high, self.range):
            # The last tile ends where the rows do, and begins among those that were done.
            last = low.scalar("s_max", low.sub(end, self.size), offset)

            def rest(start: Value) -> None:
                self._row(start, start if self.left.in_tiles else low.scalar("s_min", start, last),
                          low.scalar("s_min", low.sub(end, start), self.size))

            low.counted(found.rows, low.add(offset, whole), end, self.size, rest)
        for op in found.rights:
            low.staged.pop(op, None)
        return []

    def _row(self, start: Value, first: Scalar, count: Scalar) -> None:
        """Pieces from row `first` on, of which `count` rows from `start` on are new."""
        low, found = self.low, self.found
        high = ACROSS if count == ACROSS * self.size else 1
        if self.left.here:
            low.open[found.rows] = Open(start, count, high * self.size, high * self.size if high == ACROSS else 1)
            self._copy_in_tiles(self.left.base)
            low.open[found.rows] = self.range
        before = 0 if self.left.here else low.mul(low.sub(first, self.range.offset), self.left.stride)
        base = low.add(self.left.base, before)

        def piece(_: list[Value]) -> list[Value]:
            sums = self._sums(base, high)
            if high == ACROSS and self._goes_straight():
                self._store_straight(sums, first)
            else:
                self._finish(self._store_near(sums, high), first, Open(start, count, high * self.size))
            return []

        low.axis_loop(found.columns, self.across, True, [], piece)

    def _sums(self, base: Scalar, high: int) -> list[Value]:
        """Multiply all of the depth for the bound columns and rows from `base` on: the tiles of sums, contraction by
        contraction, row by row."""
        low, found = self.low, self.found
        wide = low.bound[found.columns].count
        low.bound[found.depth] = Bound(self.slots.offset, 1, False, None, low.depth)
        panels = [low.staged[op] for op in found.rights]
        rights = [low.address_of(*panel.address({found.depth: 0, found.columns: 0})) for panel in panels]
        strides = [panel.depth_bytes for panel in panels]
        del low.bound[found.depth]
        lefts = [low.add(base, low.mul(self.left.stride, n * self.size)) for n in range(high)]
        kind = TileRegisterType(self.sum_dtype)
        sums = [low.emit(low.depth, "tile_zero", [], kind) for _ in range(len(rights) * high * wide)]
        few = high == 1 and self._meets_few()

        def step(number: Scalar, sums: list[Value]) -> list[Value]:
            low.effect("tile_wake", [])
            rows = [self._parts_of(left, number) for left in lefts]
            tiles = [(low.add(right, low.mul(number, stride * self.size)), stride)
                     for right, stride in zip(rights, strides, strict=True)]
            if few:
                self._ask_ahead(tiles)
            return self._multiply(rows, tiles, wide, sums)

        part = low.scalar("s_floordiv", self.steps, PANEL_PARTS) if few else 0

        def of_parts(number: Scalar, sums: list[Value]) -> list[Value]:
            for place in range(PANEL_PARTS):
                sums = step(low.add(number, low.mul(part, place)), sums)
            return sums

        if part != 0:
            sums = self._rounds(0, part, sums, of_parts)
        if self.steps != 0:
            sums = self._rounds(low.mul(part, PANEL_PARTS), self.steps, sums, step)
        if self.beyond != 0:
            sums = self._rounds(0, low.scalar("s_min", self.beyond, 1), sums,
                                lambda _, sums: self._last(lefts, rights, strides, wide, sums))
        return sums

    def _parts_of(self, left: Scalar, step: Scalar) -> list[tuple[Scalar, Scalar]]:
        """Address and stride of the tiles of a step of the depth, part by part. left: of the rows' first tile."""
        low = self.low
        if not self.left.in_tiles:
            return [(low.add(left, low.mul(step, self.row_bytes)), self.left.stride)]
        size_bytes = self.size * self.row_bytes
        first = low.add(left, low.mul(step, self.found.left_parts * size_bytes))
        return [(low.add(first, part * size_bytes), self.row_bytes) for part in range(self.found.left_parts)]

    def _meets_few(self) -> bool:
        """Whether few rows meet packed panels from several places of their depth (Requests.panel_parts). Measured on a
        Granite Rapids, 16 rows by 4096 x 4096 from memory, of the time as one stream: by two, three, four and five
        places, asked for 2 KiB ahead, bf16 0.99, 0.91, 1.01 and 0.98, i8 1.00, 0.94, 1.02 and 1.03; by three, 1, 3 and
        4 KiB ahead 0.93, 0.91 and 0.94, 0.94, 0.91 and 0.97, into the second cache 0.92 and 0.94, not at all 0.98 and
        0.97; one stream that is asked for 0.98 and 0.97 at best."""
        few = bool(self.low.requests.panel_parts) and self.range.hint <= FEW_ROWS
        return few and all(self.low.staged[op].in_place is not None for op in self.found.rights)

    def _ask_ahead(self, tiles: list[tuple[Scalar, int]]) -> None:
        """Ask for what follows the tiles of a step in their panels, into the first cache."""
        low = self.low
        for start, stride in tiles:
            for line in range(0, stride * self.size, LINE_BYTES):
                operands, attributes = low.memory_operands(start, 0, 1, low.requests.stream_ahead_bytes + line)
                low.effect("prefetch", operands, level=1, **attributes)

    def _store_near(self, sums: list[Value], high: int) -> Scalar:
        """The sums to scratch memory, those of one contraction beside those of the other; where they are."""
        low, wide = self.low, self.low.bound[self.found.columns].count
        to = self._memory("sums", ACROSS * self.size * self.sum_bytes)
        for number, total in enumerate(sums):
            right, (row, column) = number // (high * wide), divmod(number % (high * wide), wide)
            low.effect("tile_store", [total, low.value(to), low.value(self.sum_bytes)],
                       disp=row * self.size * self.sum_bytes + (right * self.across + column) * self.row_bytes)
        return to

    def _goes_straight(self) -> bool:
        """Whether all that follows is a store of the sums as they are, and the columns that are bound are whole."""
        low, found, after = self.low, self.found, self.walk.after
        bound = low.bound[found.columns]
        if len(after) != 1 or len(self.walk.reductions) != 1 or bound.mask is not None:
            return False
        (store,) = after
        if not isinstance(store, Op) or store.operands[1] is not self.walk.reductions[0].result or (
                low.streams(store) or is_join(store)):
            return False
        access = low.access(store)
        plain = access.dtype is self.sum_dtype and not access.gathers
        return (plain and set(access.axes) == {found.rows, found.columns}
                and access.axes[found.columns] == self.sum_dtype.size_bytes)

    def _store_straight(self, sums: list[Value], first: Scalar) -> None:
        """The sums of a whole piece, from row `first` on, to the tensor."""
        low, found = self.low, self.found
        (store,) = self.walk.after
        assert isinstance(store, Op)
        access, wide = low.access(store), low.bound[found.columns].count
        stride = access.axes[found.rows]
        low.bound[found.rows] = Bound(first, 1, False, None, low.depth)
        start = low.address_of(*low.address(access, {}))
        del low.bound[found.rows]
        for number, total in enumerate(sums):
            row, column = divmod(number, wide)
            place = low.add(start, low.mul(stride, row * self.size))
            low.effect("tile_store", [total, low.value(place), low.value(stride)], disp=column * self.row_bytes)

    def _memory(self, name: str, size_bytes: int) -> Scalar:
        low, op = self.low, self.walk.reductions[0]
        key = (f"tile {name}", op)
        if key not in low.stage_memory:
            low.stage_memory[key] = low.scratch([(size_bytes, 1)], u8)
        return low.stage_memory[key]

    def _rounds(self, start: Scalar, stop: Scalar, sums: list[Value],
                body: Callable[[Scalar, list[Value]], list[Value]]) -> list[Value]:
        low = self.low
        block = Block([S64, *[v.type for v in sums]])
        first, last = low.value(start), low.value(stop)
        low.enter(block)
        low.effect("yield", body(block.arguments[0], list(block.arguments[1:])))
        low.leave()
        loop = Op("loop", [first, last, *sums], [v.type for v in sums], {"step": 1, "label": self.found.depth}, [block],
                  low.location)
        low.finish(loop)
        return list(loop.results)

    def _multiply(self, lefts: Sequence[Sequence[tuple[Scalar, Scalar]]], rights: list[tuple[Scalar, int]], wide: int,
                  sums: list[Value]) -> list[Value]:
        """One step of the depth. lefts, rights: address and stride of the tiles of each row, part by part, and of each
        panel."""
        low, sums = self.low, list(sums)
        a: dict[int, tuple[int, Value]] = {}
        b: dict[tuple[int, int], tuple[int, Value]] = {}
        for left_part, right_part in self.found.products:
            for row, left in enumerate(lefts):
                if a.get(row, (None,))[0] != left_part:
                    a[row] = left_part, self._load(*left[left_part], 0)
                for number, (right, stride) in enumerate(rights):
                    for column in range(wide):
                        if b.get((number, column), (None,))[0] != right_part:
                            disp = (right_part * wide + column) * self.row_bytes
                            b[number, column] = right_part, self._load(right, stride, disp)
                        at = (number * len(lefts) + row) * wide + column
                        sums[at] = low.emit(low.depth, "tile_multiply", [sums[at], a[row][1], b[number, column][1]],
                                            sums[at].type, dtype=self.left_dtype, right_dtype=self.right_dtype)
        return sums

    def _load(self, base: Scalar, stride: Scalar, disp: int) -> Value:
        low = self.low
        return low.emit(low.depth, "tile_load", [low.value(base), low.value(stride)], TILE_B32, disp=disp)

    def _last(self, lefts: list[Scalar], rights: list[Scalar], strides: list[int], wide: int,
              sums: list[Value]) -> list[Value]:
        """What is left of the depth, copied beside zeros."""
        low = self.low
        done = low.mul(self.steps, self.row_bytes)
        a: list[list[tuple[Scalar, Scalar]]] = []
        b = []
        mask = low.emit(low.depth_of(self.rest), "mask_first", [low.value(self.rest)], MASK)
        for row, left in enumerate(lefts):
            if self.left.in_tiles:        # zeros follow already
                a.append(self._parts_of(left, self.steps))
                continue
            rest = self._memory("left rest", ACROSS * self.size * self.row_bytes)
            to = low.add(rest, row * self.size * self.row_bytes)
            self._copy_rows(low.add(left, done), self.left.stride, to, self.row_bytes, self.size, 1, mask)
            if self.partial != 0:
                self._copy_partial(low.add(left, low.mul(self.slots.extent, b32.size_bytes)), self.left.stride,
                                   element_bytes(self.left_dtype), self.size,
                                   low.add(to, low.mul(self.rest, b32.size_bytes)), self.row_bytes)
            a.append([(to, self.row_bytes)])
        for number, (right, stride) in enumerate(zip(rights, strides, strict=True)):
            to = low.add(self._memory("right rest", self.size * self.sum_bytes), number * self.across * self.row_bytes)
            load = self.found.rights[number]
            packed = low.staged[load].in_place is not None and self.partial != 0
            filled = low.add(self.rest, low.scalar("s_min", self.partial, 1)) if packed else self.rest
            self._copy_rows(low.add(right, low.mul(self.steps, stride * self.size)), stride, to, self.sum_bytes,
                            filled, wide, None)
            self._clear_rows(to, filled, wide)
            if self.partial != 0 and not packed:
                self._copy_partial_columns(load, low.add(to, low.mul(self.rest, self.sum_bytes)), wide)
            b.append((to, self.sum_bytes))
        return self._multiply(a, b, wide, sums)

    def _copy_partial_columns(self, load: Op, to: Scalar, wide: int) -> None:
        """The elements that fill no slot, of the bound columns of a tensor."""
        low, found = self.low, self.found
        access, bound, columns = low.access(load), low.bound[found.columns], low.open[found.columns]
        left = low.sub(low.add(columns.offset, columns.extent), bound.offset)
        depth = low.add(self.elements.offset, low.mul(self.slots.extent, found.dot.elements))
        start = low.add(low.add(access.base, access.disp), low.mul(depth, access.axes[found.depth]))
        start = low.add(start, low.mul(bound.offset, access.axes[found.columns]))
        self._copy_partial(start, access.axes[found.columns], access.axes[found.depth],
                           low.scalar("s_min", left, wide * low.lanes), to, b32.size_bytes)

    def _copy_partial(self, start: Scalar, across: Scalar, along: Scalar, count: Scalar, to: Scalar,
                      to_across: int) -> None:
        """The elements that fill no slot, one by one: `count` times so many, `across` bytes apart, each `along` behind
        the one before, to places `to_across` apart."""
        low, size = self.low, element_bytes(self.left_dtype)
        narrow = i16 if size == i16.size_bytes else u8

        def outer(number: Value) -> None:
            source = low.add(start, low.mul(number, across))
            place = low.add(to, low.mul(number, to_across))

            def element(at: Value) -> None:
                value = low.emit(low.depth, "s_load", [low.value(low.add(source, low.mul(at, along)))], S64,
                                 dtype=narrow)
                low.effect("s_store", [value, low.value(low.add(place, low.mul(at, size)))], dtype=narrow)

            low.counted("rest", 0, self.partial, 1, element)

        low.counted("rest", 0, count, 1, outer)

    def _copy_rows(self, source: Scalar, stride: Scalar, to: Scalar, to_stride: int, count: Scalar, vectors: int,
                   mask: Value | None) -> None:
        low = self.low

        def row(number: Value) -> None:
            masked = [] if mask is None else [mask]
            for vector in range(vectors):
                at = low.value(low.add(source, low.mul(number, stride)))
                value = low.emit(low.depth, "load", [at, *masked], ROW_B32, dtype=b32, masked=bool(masked),
                                 disp=vector * self.row_bytes)
                low.effect("store", [value, low.value(low.add(to, low.mul(number, to_stride)))], dtype=b32,
                           masked=False, streaming=False, disp=vector * self.row_bytes)

        low.counted("rest", 0, count, 1, row)

    def _clear_rows(self, to: Scalar, start: Scalar, vectors: int) -> None:
        low = self.low

        def row(number: Value) -> None:
            for vector in range(vectors):
                low.effect("store", [self._zeros(), low.value(low.add(to, low.mul(number, self.sum_bytes)))], dtype=b32,
                           masked=False, streaming=False, disp=vector * self.row_bytes)

        low.counted("rest", start, self.size, 1, row)

    def _finish(self, sums: Scalar, first: Scalar, rows: Open) -> None:
        """What follows the contractions, row by row. first: the row that the sums begin with; rows: those to finish."""
        low, found = self.low, self.found
        start = low.sub(sums, low.mul(first, self.sum_bytes))
        start = low.sub(start, low.mul(low.bound[found.columns].offset, self.sum_dtype.size_bytes))
        for number, op in enumerate(self.walk.reductions):
            low.buffers[op.result] = Access(
                start, number * self.across * self.row_bytes,
                {found.rows: self.sum_bytes, found.columns: self.sum_dtype.size_bytes}, self.sum_dtype)

        def finish(carried: list[Value]) -> list[Value]:
            low._roots(self.walk.after)
            return carried

        block = low.open[found.columns]
        low.open[found.columns] = self.columns      # what is kept lies where it does in all of the axis
        low.axis_loop(found.rows, FINISHED_ROWS, False, [], finish, within=rows,
                      tails=low.slot_tails(self.walk.after, found.rows))
        low.open[found.columns] = block
        for op in self.walk.reductions:
            del low.buffers[op.result]
