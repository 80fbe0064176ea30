"""Contractions whose inner loop is a micro-kernel by hand.

Enters a walk, the model's lane axis, and the block that the schedule names. Leaves a `Fit`, or the reason why the block
does not fit there; and, while the walk is emitted, the lane op `asm_contract` in place of the loop over the depth for
every tile that the block is written for. Other tiles, and what the block's step leaves of the depth, are generated.

Holds: several contractions of one walk (the two of SwiGLU) meet the same left operand. Where elements are packed in
slots (bf16), the walk is, too (sapper/lane/packed.py), and the depth is counted in slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ir.nodes import Op, Value
from ..ir.types import TileType
from ..lang.by_hand import CONTRACTIONS, ContractionPiece
from ..tile.plan import Walk
from .state import Bound, Scalar, element_bytes

if TYPE_CHECKING:
    from .model import Model
    from .reductions import Reductions


@dataclass(frozen=True, slots=True)
class Fit:
    """How a micro-kernel serves a walk. rows, depth: axes, beside the lane axis. left, rights: loads of operands."""

    piece: ContractionPiece
    rows: str
    depth: str
    left: Op
    rights: tuple[Op, ...]

    @property
    def staged(self) -> list[Op]:
        """What is copied for it, but for panels that were packed before the call."""
        return [*self.rights, *([self.left] if self.piece.left == "blocks" else [])]


def fit(model: Model, walk: Walk, lane: str | None, key: str) -> Fit | str:
    """The block in a walk whose axis across lanes is `lane`, or why not."""
    piece = CONTRACTIONS[key]
    refusal = piece.refusal(model.facts.family, model.facts.features, model.lanes)
    if refusal:
        return refusal
    if any(op.name != "contract" for op in walk.reductions) or len(walk.reductions) != piece.rights or walk.inner:
        return f"the walk is not {'one contraction' if piece.rights == 1 else f'{piece.rights} contractions'} by itself"
    (depth, *more) = walk.reduced
    rows = [axis for axis in walk.outer if axis != lane]
    if more or len(walk.outer) != 2 or lane not in walk.outer or any(a not in model.open for a in walk.axes):
        return "the contraction is not over one axis, with two axes in its result that this walk loops over"
    lefts: list[Op] = []
    rights: list[Op] = []
    for contraction in walk.reductions:
        if any(v in model.rows or v in model.buffers for v in contraction.operands):
            return "an operand is a copy that the kernel holds, not a tensor"
        loads = [_load_of(v) for v in contraction.operands]
        lefts += [op for op in loads if op is not None and _axes(op) == {rows[0], depth}]
        rights += [op for op in loads if op is not None and _axes(op) == {lane, depth}]
        sums = contraction.result.type
        assert isinstance(sums, TileType)
        if sums.dtype is not piece.result:
            return f"its sums are {piece.result.name}, the contraction's {sums.dtype.name}"
    if not len(lefts) == len(set(rights)) == piece.rights:
        return f"its operands are not tiles in memory over {rows[0]} and {depth}, and {lane} and {depth}"
    left = lefts[0]
    if any(op is not left for op in lefts):
        return "the contractions have no left operand in common"
    for op in (left, *rights):
        dtype, wanted = model.access(op).dtype, piece.dtype if op is left else piece.right_dtype
        if dtype is not wanted:
            return f"{op.operands[0].name} is of {dtype.name}; it takes {wanted.name}"
        if model.access(op).gathers:
            return f"{op.operands[0].name} is gathered"
    refusal = _memory_refusal(model, piece, left, rights, rows[0], depth)
    if refusal:
        return refusal
    for axis, count in ((rows[0], piece.rows[0]), (lane, piece.vectors[0])):
        capacity, tile = model.open[axis].capacity, count * (model.lanes if axis == lane else 1)
        if capacity is not None and not capacity.dims and capacity.constant < tile:
            return f"axis {axis} has {capacity.constant} elements at most; a tile is {tile}"
        wanted = model.schedule.registers.get(axis, count)
        if wanted != count:
            return f"the schedule holds {wanted} of axis {axis} at once; a tile has {count}"
    return Fit(piece, rows[0], depth, left, tuple(rights))


def _memory_refusal(model: Model, piece: ContractionPiece, left: Op, rights: list[Op], rows: str, depth: str) -> str:
    """Why the operands do not lie, and can't be copied, as the piece reads them; "" where they do or can."""
    access, name = model.access(left), left.operands[0].name
    along = rows if piece.left == "columns" else depth
    if access.axes.get(along) != element_bytes(access.dtype):
        return f"{name} is not contiguous along {along}"
    if model.panels_of(left) is not None:
        return f"{name} is packed in panels; it takes rows"
    width = piece.vectors[0] * model.lanes
    panels = [model.panels_of(op) for op in rights]
    for op, found in zip(rights, panels, strict=True):
        if found is not None and (found.width, found.elements) != (width, piece.elements):
            return f"{op.operands[0].name} is packed in panels of {found.width} columns and {found.elements} " \
                f"elements; it takes {width} and {piece.elements}"
    if (None in panels or piece.left == "blocks") and not model.is_bounded(depth):
        return f"no panel can be packed: the range of {depth} is known only as the kernel runs"
    if piece.left == "blocks" and not model.is_bounded(rows):
        return f"no rows can be packed: the range of {rows} is known only as the kernel runs"
    wanted = model.schedule.stage
    copied = {op.operands[0].name for op, found in zip(rights, panels, strict=True) if found is None}
    copied |= {name} if piece.left == "blocks" else set()
    lies = {name} - copied
    if wanted is not None and (not copied <= set(wanted) or lies & set(wanted)):
        takes = f"takes copies of {', '.join(sorted(str(c) for c in copied))}" + (
            f", and {name} where it lies" if lies else "")
        return f"the schedule stages {', '.join(wanted) or 'nothing'}; it {takes}"
    return ""


def takes(low: Reductions, found: Fit, lane: str) -> bool:
    """Whether the piece is written for the tile that is bound."""
    return low.bound[found.rows].count in found.piece.rows and low.bound[lane].count in found.piece.vectors


def emit_steps(low: Reductions, found: Fit, lane: str, sums: list[Value]) -> tuple[list[Value], Scalar] | None:
    """The micro-kernel at the piece of the walk that is bound, if it is written for it.

    sums: rows of the tile, contraction by contraction and row by row. Leaves the new ones, and how much of the depth is
    done; None for another tile.
    """
    piece, rows = found.piece, low.bound[found.rows]
    if not takes(low, found, lane):
        return None
    o = low.open[found.depth]
    done = low.sub(o.extent, low.scalar("s_mod", o.extent, piece.step)) if o.divisor % piece.step else o.extent
    if done == 0:
        return None
    low.bound[found.depth] = Bound(o.offset, 1, False, None, low.depth)
    at = {found.rows: 0, found.depth: 0, lane: 0}
    blocks = low.staged.get(found.left)
    lies = blocks.address(at) if blocks is not None else low.address(low.operand_access(found.left), at)
    left = low.address_of(*lies)
    rights = [low.address_of(*low.staged[op].address(at)) for op in found.rights]
    del low.bound[found.depth]
    apart = found.depth if piece.left == "columns" else found.rows
    stride: Scalar = low.lanes * piece.element_bytes if blocks is not None else low.access(found.left).axes[apart]
    scalars = [low.value(s) for s in (done, left, stride, *rights)]
    op = Op("asm_contract", [*scalars, *sums], [v.type for v in sums],
            {"by": piece.key, "rows": rows.count, "rights": piece.rights}, None, low.location)
    low.finish(op)
    return list(op.results), done


def _load_of(value: Value) -> Op | None:
    return value.op if value.op is not None and value.op.name == "load" else None


def _axes(op: Op) -> set[str]:
    return set(op.result.type.axes)  # type: ignore[union-attr]
