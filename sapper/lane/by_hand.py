"""Contractions whose inner loop is a micro-kernel by hand.

Enters a walk, the model's lane axis, and the block that the schedule names. Leaves a `Fit`, or the reason why the block
does not fit there; and, while the walk is emitted, the lane op `asm_contract` in place of the loop over the depth for
every tile that the block is written for. Other tiles, and what the block's step leaves of the depth, are generated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ir.nodes import Op, Value
from ..ir.types import ROW_F32, TileType, f32
from ..lang.by_hand import CONTRACTIONS, ContractionPiece
from ..tile.plan import Walk
from .state import Bound, Scalar, element_bytes

if TYPE_CHECKING:
    from .model import Model
    from .walk import WalkLowering


@dataclass(frozen=True, slots=True)
class Fit:
    """How a micro-kernel serves a walk. rows, depth: axes, beside the lane axis. left, right: loads of its operands."""

    piece: ContractionPiece
    rows: str
    depth: str
    left: Op
    right: Op


def fit(model: Model, walk: Walk, lane: str | None, key: str) -> Fit | str:
    """The block in a walk whose axis across lanes is `lane`, or why not."""
    piece = CONTRACTIONS[key]
    refusal = piece.refusal(model.facts.family, model.facts.features, model.lanes)
    if refusal:
        return refusal
    if len(walk.reductions) != 1 or walk.reductions[0].name != "contract" or walk.inner:
        return "the walk is not one contraction by itself"
    (contraction,) = walk.reductions
    (depth, *more) = walk.reduced
    rows = [axis for axis in walk.outer if axis != lane]
    if more or len(walk.outer) != 2 or lane not in walk.outer or any(a not in model.open for a in walk.axes):
        return "the contraction is not over one axis, with two axes in its result that this walk loops over"
    if any(v in model.rows or v in model.buffers for v in contraction.operands):
        return "an operand is a copy that the kernel holds, not a tensor"
    loads = [_load_of(v) for v in contraction.operands]
    left = next((op for op in loads if op is not None and _axes(op) == {rows[0], depth}), None)
    right = next((op for op in loads if op is not None and _axes(op) == {lane, depth}), None)
    if left is None or right is None or len(loads) != 2:
        return f"its operands are not tiles in memory over {rows[0]} and {depth}, and {lane} and {depth}"
    for op in (left, right):
        dtype = model.access(op).dtype
        if dtype is not piece.dtype:
            return f"{op.operands[0].name} is of {dtype.name}; it takes {piece.dtype.name}"
        if model.access(op).gathers:
            return f"{op.operands[0].name} is gathered"
    sums = contraction.result.type
    assert isinstance(sums, TileType)
    if sums.dtype is not f32:
        return f"its sums are f32, the contraction's {sums.dtype.name}"
    access = model.access(left)
    if access.axes.get(depth) != element_bytes(access.dtype):
        return f"{left.operands[0].name} is not contiguous along {depth}"
    if not model.is_bounded(depth):
        return f"no panel can be packed: the range of {depth} is known only as the kernel runs"
    wanted_stage = model.schedule.stage
    if wanted_stage is not None and (right.operands[0].name not in wanted_stage
                                     or left.operands[0].name in wanted_stage):
        return f"the schedule stages {', '.join(wanted_stage) or 'nothing'}; it takes a panel of " \
               f"{right.operands[0].name}, and {left.operands[0].name} where it lies"
    for axis, count in ((rows[0], piece.rows[0]), (lane, piece.vectors[0])):
        capacity, tile = model.open[axis].capacity, count * (model.lanes if axis == lane else 1)
        if capacity is not None and not capacity.dims and capacity.constant < tile:
            return f"axis {axis} has {capacity.constant} elements at most; a tile is {tile}"
        wanted = model.schedule.registers.get(axis, count)
        if wanted != count:
            return f"the schedule holds {wanted} of axis {axis} at once; a tile has {count}"
    return Fit(piece, rows[0], depth, left, right)


def emit_steps(low: WalkLowering, found: Fit, lane: str, sums: list[Value]) -> tuple[list[Value], Scalar] | None:
    """The micro-kernel at the piece of the walk that is bound, if it is written for it.

    sums: rows of the tile, row by row. Leaves the new ones, and how much of the depth is done; None for another tile.
    """
    piece, rows, columns = found.piece, low.bound[found.rows], low.bound[lane]
    if rows.count not in piece.rows or columns.count not in piece.vectors:
        return None
    o = low.open[found.depth]
    done = low.sub(o.extent, low.scalar("s_mod", o.extent, piece.step)) if o.divisor % piece.step else o.extent
    if done == 0:
        return None
    low.bound[found.depth] = Bound(o.offset, 1, False, None, low.depth)
    left = _address(low, *low.address(low.access(found.left), {found.rows: 0, found.depth: 0}))
    right = _address(low, *low.staged[found.right].address({lane: 0, found.depth: 0}))
    del low.bound[found.depth]
    stride = low.access(found.left).axes[found.rows]
    scalars = [low.value(s) for s in (done, left, stride, right)]
    op = Op("asm_contract", [*scalars, *sums], [ROW_F32] * len(sums), {"by": piece.key, "rows": rows.count}, None,
            low.location)
    low.finish(op)
    return list(op.results), done


def _address(low: WalkLowering, operands: list[Value], attributes: dict[str, object]) -> Scalar:
    address: Scalar = operands[0]
    if attributes["indexed"]:
        address = low.add(address, low.mul(operands[1], attributes["scale"]))  # type: ignore[arg-type]
    return low.add(address, attributes["disp"])  # type: ignore[arg-type]


def _load_of(value: Value) -> Op | None:
    return value.op if value.op is not None and value.op.name == "load" else None


def _axes(op: Op) -> set[str]:
    return set(op.result.type.axes)  # type: ignore[union-attr]
