"""Elements side by side that are spread one by one -> one load, whose lanes are spread.

Enters: a lane function for a target whose multiply-adds, and products of bytes, take one lane of a register as a
factor. Leaves: the same function, in which spread elements that make a whole row are a `load` and a `broadcast_lane` of
each of its lanes, which such an instruction has for nothing. Holds: the row is loaded where the first of them was;
nothing between writes memory.

    %a = load_splat %x {disp = 0}           %r = load %x {disp = 0}
    %b = load_splat %x {disp = 4}      ->   %a = broadcast_lane %r {lane = 0}
    ...                                     %b = broadcast_lane %r {lane = 1}
"""

from __future__ import annotations

from ..ir.nodes import Block, Function, Op
from ..ir.types import b32, f32, f64
from .even_odd import PASSED_BY_LOADS


def join_splats(function: Function) -> int:
    """In place; how many rows are loaded now."""
    return _visit(function.body, function.attributes["lanes"])


def _visit(block: Block, lanes: int) -> int:
    count = 0
    found: dict[tuple[object, ...], dict[int, Op]] = {}     # of one place in memory, by displacement
    loads: dict[Op, Op] = {}        # the first of a row -> its load
    lane_of: dict[Op, tuple[Op, int]] = {}      # spread element -> the load that has it, and its lane
    for op in block.ops:
        count += sum(_visit(inner, lanes) for inner in op.blocks)
        if op.name == "load_splat" and op.attributes["dtype"] in (b32, f32, f64):
            a = op.attributes
            size = a["dtype"].size_bytes
            near = found.setdefault((*op.operands, a["dtype"], a.get("scale", 1), a.get("near", False)), {})
            disp = a.get("disp", 0)
            near.setdefault(disp, op)
            for start in range(disp - (lanes - 1) * size, disp + 1, size):
                row = [near.get(start + lane * size) for lane in range(lanes)]
                if None not in row:
                    members = [member for member in row if member is not None]
                    first = min(members, key=block.ops.index)
                    load = Op("load", first.operands, (first.result.type,), {**first.attributes, "disp": start}, None,
                              first.location)
                    loads[first] = load
                    lane_of |= {member: (load, lane) for lane, member in enumerate(members)}
                    for lane in range(lanes):
                        del near[start + lane * size]
                    break
        elif op.name not in PASSED_BY_LOADS:
            found = {}
    if not loads:
        return count
    ops: list[Op] = []
    for op in block.ops:
        if op in loads:
            ops.append(loads[op])
        if op in lane_of:
            load, lane = lane_of[op]
            spread = Op("broadcast_lane", [load.result], (op.result.type,), {"lane": lane}, None, op.location)
            spread.results[0] = op.result
            op.result.move_to(spread)
            op = spread
        ops.append(op)
    block.ops = ops
    return count + len(loads)
