"""Which contractions tile registers serve as walks of their own, and from how many rows on they are worth it.

Enters a walk, on a target with tile registers (`Facts.tiles`). Leaves: how they serve it, `TileWalk`, which
tile_registers.py emits, or why they do not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from ..ir.nodes import Op, Value
from ..ir.types import DType, b32, bf16, f32
from ..tile.plan import Walk, axes_of
from ..tile.schedule import TileUnit
from .exact_parts import PARTS, Products, products
from .packed import DOT2_BF16, DOTS, Dot, Packing, Term
from .prefetches import FEW_ROWS
from .state import PAIR, Open, element_bytes
from .tile_bound import dtype_of

if TYPE_CHECKING:
    from .model import Model
    from .walk import WalkLowering

ACROSS = 2
"""Tiles of sums in each direction: each operand's tile is then used twice for each time that it is loaded. Four tiles
of sums, two of either operand: all that there are where there are eight."""

FEWEST_ROWS, FEWEST_PACKED_ROWS = 8, 6
"""Rows from which tiles are worth it: where panels have to be made, and where the operand came in panels. Fewer
take as long as a whole tile, for which the panels come from memory no faster."""

FEWEST_PARTED_ROWS, FEWEST_PACKED_PARTED_ROWS = (17, 64), 14
"""The same where the left operand has several parts, or the right one as well; and where only the left one has, and the
other came in panels. On a Granite Rapids 16 rows of f32 by bf16 take 0.93 of the time of vectors with 4096 x 4096 from
memory, 0.73 with 1536 x 576, 12 rows 1.10 and 0.86."""

FEWEST_PARTED_COLUMNS = (32, 128)
"""Columns from which copies of a left operand in parts are worth it, likewise."""


AS_IT_IS: Products = ((0, 0),)

PARTED = tuple(dtype for dtype, parts in PARTS.items() if parts > 1)


@dataclass(frozen=True, slots=True)
class TileWalk:
    """How tiles serve a walk. rows, columns, depth: its axes. left: the operand that all contractions have in common.
    rights: what makes the others, one for each: loads, or, `kept`, one whose result lies in slots. dot: the products of
    a slot. products: the parts of both operands (exact_parts.py) that are multiplied, one of each where tiles take them
    as they are. within: the axis of a slot's elements, where both operands have one in memory; the depth then counts
    slots. near: few rows meet what another product has just read as rows, which the second cache has."""

    rows: str
    columns: str
    depth: str
    left: Value
    rights: tuple[Op, ...]
    dot: Dot
    products: Products = AS_IT_IS
    within: str | None = None
    kept: bool = False
    near: bool = False

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
    kept = False
    for op in walk.reductions:
        sides = {frozenset(axes_of(v)): v for v in op.operands}
        left, right = sides.get(frozenset({rows, *walk.reduced})), sides.get(frozenset({columns, *walk.reduced}))
        if left is None or right is None:
            return f"its operands are not tiles over {rows} and {depth}, and {columns} and {depth}"
        dtypes = dtype_of(left), dtype_of(right)
        dot = dot_of(unit, *dtypes, dtype_of(op.result))
        if dot is None:
            return f"no tile multiplies {' by '.join(dtype.name for dtype in dtypes)} with sums of " \
                   f"{dtype_of(op.result).name}"
        if not is_read(model, right):
            if within is not None or len(walk.reductions) > 1 or not _fills_tiles(model, right, columns, depth):
                return "the operand that spans the columns is not read as it lies in a tensor, nor kept in tiles"
            kept = True
        assert right.op is not None
        panels = None if kept else model.panels_of(right.op)
        if panels is not None and panels.elements != dot[0].elements and dtype_of(right) not in PARTED and not (
                panels.elements == 1 and dot[0] is DOT2_BF16 and divides(PAIR, model.open[depth])):
            return f"{right.op.operands[0].name} is packed in slots of {panels.elements} elements, a tile has " \
                   f"{dot[0].elements}"
        lefts.append(left)
        rights.append(right.op)
        dots.add(dot)
    if any(not _same(left, lefts[0]) for left in lefts) or len(dots) > 1:
        return "the contractions have no left operand in common"
    found = TileWalk(rows, columns, depth, lefts[0], tuple(rights), *dots.pop(), within, kept)
    if kept and not lies_in_rows(model, found):
        return "neither operand is read as it lies in a tensor"
    if within is not None and not _lies_in_slots(model, found):
        return f"{within} is no axis of neighbours of bf16 that tiles take as they lie"
    if not model.is_bounded(depth):
        return f"no panel can be packed: the range of {depth} is known only as the kernel runs"
    if not lies_in_rows(model, found) and not found.parted and not model.is_bounded(rows):
        return f"the left operand can't be copied: the range of {rows} is known only as the kernel runs"
    return replace(found, near=_is_near(model, found))


def _is_near(model: Model, found: TileWalk) -> bool:
    """Whether few rows meet panels of what another product has just read as rows, all of which the second cache
    holds."""
    if found.kept or found.within is not None or found.parted or model.extent_hint(found.rows) > FEW_ROWS:
        return False
    read_bytes = sum(prod(model.extent_hint(axis) for axis in axes_of(op.result)) * element_bytes(
        model.access(op).dtype) for op in found.rights)
    return read_bytes <= model.block_bytes and all(tuple(op.operands) in model.read_in_rows for op in found.rights)


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
    return dot_of(unit, *map(dtype_of, (*contraction.operands, contraction.result))) is not None


def is_worth(model: Model, found: TileWalk) -> bool:
    """Whether tiles take less time than packed dot products, typically."""
    unit = model.facts.tiles
    assert unit is not None
    least = {found.rows: fewest_rows(model, found), found.depth: unit.size * found.step_slots,
             found.columns: FEWEST_PARTED_COLUMNS[found.right_parts > 1] if found.parted else model.lanes}
    if found.right_parts > 1 and not _few_streams(model, found):
        return False
    hints = {axis: model.extent_hint(axis) for axis in least} | {found.rows: model.rows_hint(found.rows)}
    return all(hints[axis] >= extent for axis, extent in least.items())


def _few_streams(model: Model, found: TileWalk) -> bool:
    """Whether panels of parts come from a tensor in long runs: it was packed, or it is contiguous along the depth, or
    a block has more than one of them."""
    panel_bytes = model.extent_hint(found.depth) * ACROSS * model.lanes * found.right_parts * bf16.size_bytes
    accesses = [model.access(op) for op in found.rights if model.panels_of(op) is None]
    along_depth = all(access.axes.get(found.depth) == element_bytes(access.dtype) for access in accesses)
    return along_depth or 2 * panel_bytes <= model.block_bytes


def fewest_rows(model: Model, found: TileWalk) -> int:
    """Rows from which tiles are worth it."""
    packed = found.within is not None or (not found.kept and all(
        model.panels_of(op) is not None for op in found.rights))
    if found.parted:
        return FEWEST_PACKED_PARTED_ROWS if packed and found.right_parts == 1 else \
            FEWEST_PARTED_ROWS[found.right_parts > 1]
    return FEWEST_PACKED_ROWS if packed else FEWEST_ROWS


def _same(left: Value, other: Value) -> bool:
    """Whether two operands are one, or loads of the same."""
    return left is other or (left.op is not None and other.op is not None and left.op.name == other.op.name == "load"
                             and left.op.operands == other.op.operands)


def is_read(low: WalkLowering, value: Value) -> bool:
    """Whether a value is loaded, not kept, and each axis of it goes along one of a tensor."""
    loads = value.op is not None and value.op.name == "load" and value not in low.buffers and value not in low.rows
    return loads and not low.access(value.op).gathers   # type: ignore[arg-type]


def lies_in_rows(low: WalkLowering, found: TileWalk) -> bool:
    """Whether tiles of the left operand can be read where it lies in a tensor."""
    if found.parted or found.left.op is None or not is_read(low, found.left):
        return False
    access = low.access(found.left.op)
    step = element_bytes(access.dtype) * (found.dot.elements if found.within is not None else 1)
    return access.axes.get(found.depth) == step


def is_kept(model: WalkLowering, value: Value, depth: str) -> bool:
    """Whether a value lies in scratch memory as slots along the depth (slots.py), rows of them one after the other."""
    return value in model.buffers and model.slot_axes.get(value) == depth and isinstance(
        model.buffers[value].axes[depth], int)


def _fills_tiles(model: Model, value: Value, columns: str, depth: str) -> bool:
    """Whether slots that are kept are whole tiles: so many columns, across, and so much of the depth, in any case."""
    deep, wide = model.open[depth].extent, model.open[columns].extent
    return (is_kept(model, value, depth) and model.buffers[value].axes[columns] == b32.size_bytes
            and isinstance(deep, int) and deep % (PAIR * model.lanes) == 0
            and isinstance(wide, int) and wide % model.lanes == 0)


def _lies_in_slots(model: Model, found: TileWalk) -> bool:
    """Whether both operands have the elements of a slot as their last dimension, and columns fill tiles."""
    size = found.dot.elements * dtype_of(found.left).size_bytes
    accesses = [model.access(op) for op in (found.left.op, *found.rights) if op is not None and op.name == "load"]
    left, *rights = accesses
    lies = len(rights) == len(found.rights) and found.within is not None and all(
        access.axes.get(found.within) == size // found.dot.elements and not access.gathers for access in accesses)
    columns = model.open[found.columns].extent
    return (lies and found.dot is DOT2_BF16 and not found.parted and left.axes.get(found.depth) == size
            and lies_in_rows(model, found) and isinstance(columns, int) and columns % model.lanes == 0
            and all(right.axes.get(found.columns) == size and isinstance(right.axes.get(found.depth), int)
                    and model.panels_of(op) is None for op, right in zip(found.rights, rights, strict=True)))


def divides(size: int, o: Open) -> bool:
    """Whether an extent is known to be a multiple of a size."""
    return (o.extent if isinstance(o.extent, int) else o.divisor) % size == 0
