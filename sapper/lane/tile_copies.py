"""Operands of products on tile registers, copied tile by tile, or as sums of bf16 (exact_parts.py), or both.

Enters a walk of tile_registers.py. Leaves: rows of the left operand as [tiles of rows][steps of the depth][parts][rows
of a tile][its slots], which products read from one end to the other; panels of parts of the right one. Holds: there are
zeros from the end of the depth to that of the last tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..ir.nodes import Op, Value
from ..ir.types import MASK, ROW_B32, ROW_F32, TileType, b32, bf16, f32, i32, u8
from .exact_parts import PARTS, slots_of_parts
from .staged import PanelInPlace, PanelOfParts
from .state import PAIR, Open, Scalar, element_bytes

if TYPE_CHECKING:
    from .axis_loops import WalkChoice
    from .walk import WalkLowering

COPIED_VECTORS = 4
"""Of a row that are copied at once."""


def _row_in_tiles(low: WalkLowering, row_axis: str, base: Scalar, steps: Scalar, step_bytes: int) -> Scalar:
    """Where the first slots of the bound row lie, of tiles from `base` on. steps: of the depth."""
    number = low.sub(low.bound[row_axis].offset, low.open[row_axis].offset)
    tile = low.scalar("s_floordiv", number, low.lanes)
    above = low.add(base, low.mul(tile, low.mul(steps, step_bytes)))
    return low.add(above, low.mul(low.scalar("s_mod", number, low.lanes), low.lanes * b32.size_bytes))


def copy_slots(low: WalkLowering, value: Value, row_axis: str, depth_axis: str, base: Scalar) -> list[Value]:
    """The bound row of a value that is contiguous along the depth, to tiles from `base` on."""
    o, tile_bytes = low.open[depth_axis], low.lanes * low.lanes * b32.size_bytes
    place = low.sub(_row_in_tiles(low, row_axis, base, low.ceil_div(o.extent, low.lanes), tile_bytes),
                    low.mul(o.offset, tile_bytes // low.lanes))

    def slots(_: list[Value]) -> list[Value]:
        start = low.bound[depth_axis].offset
        to = low.value(low.add(place, low.mul(start, tile_bytes // low.lanes)))
        for at in low._coordinates((row_axis, depth_axis)):
            low.effect("store", [low.slot_row(value, at, False), to], dtype=b32, masked=False, streaming=False,
                       disp=at[depth_axis] * tile_bytes)
        return []

    return low.axis_loop(depth_axis, COPIED_VECTORS, True, [], slots)


def copy_parts(low: WalkLowering, value: Value, row_axis: str, depth_axis: str, base: Scalar,
               rounds: bool) -> list[Value]:
    """The bound row of any floats, part by part, to tiles from `base` on. rounds: see slots_of_parts."""
    assert isinstance(value.type, TileType) and low.packing is not None
    dtype, o = value.type.dtype, low.packing.elements
    deep, row_bytes = low.lanes * PAIR, low.lanes * b32.size_bytes
    step_bytes = PARTS[dtype] * low.lanes * row_bytes
    place = low.sub(_row_in_tiles(low, row_axis, base, low.ceil_div(o.extent, deep), step_bytes),
                    low.mul(o.offset, step_bytes // deep))

    def rows(_: list[Value]) -> list[Value]:
        mask, made = low.bound[depth_axis].mask, []
        for at in low._coordinates((row_axis, depth_axis)):
            row = low.row(value, at)
            made.append(row if mask is None else low.emit(
                low.depth, "select", [mask, row, low.constant(0.0, f32)], ROW_F32))
        return made

    def store(start: Scalar, halves: list[Value]) -> None:
        even, odd = low.emit_rows(low.depth, "unzip", halves, {})
        for part, row in enumerate(slots_of_parts(low, low.depth, even, odd, dtype, rounds)):
            to = low.value(low.add(place, low.mul(start, step_bytes // deep)))
            low.effect("store", [row, to], dtype=b32, masked=False, streaming=False,
                       disp=part * low.lanes * row_bytes)

    def whole(_: list[Value]) -> list[Value]:
        store(low.bound[depth_axis].offset, rows([]))
        return []

    def last(start: Value) -> None:
        halves: list[Value] = []
        for number in range(PAIR):
            first = low.add(start, number * low.lanes)
            mask = low.emit(low.depth, "mask_first", [low.value(low.sub(stop, first))], MASK)
            halves += low._bind(depth_axis, first, 1, True, mask, [], rows)
        store(start, halves)

    with low.unpacked():
        stop = low.add(o.offset, o.extent)
        divides = (o.extent if isinstance(o.extent, int) else o.divisor) % deep == 0
        end = stop if divides else low.sub(stop, low.scalar("s_mod", o.extent, deep))
        low._loop(depth_axis, o.offset, end, PAIR, True, False, [], whole)
        if not divides:
            low.counted(depth_axis, end, stop, deep, last)
    return []


def lies_along_rows(low: WalkLowering, value: Value, row_axis: str) -> bool:
    """Whether a value is a load that is contiguous along its rows' axis, which turn_parts takes."""
    op = value.op
    if op is None or op.name != "load" or value in low.buffers or value in low.rows:
        return False
    access = low.access(op)
    return not access.gathers and access.axes.get(row_axis) == element_bytes(access.dtype)


def turn_parts(low: WalkLowering, value: Value, row_axis: str, depth_axis: str, base: Scalar, rounds: bool) -> None:
    """All rows of a load that is contiguous along them, part by part, to tiles from `base` on: slots of as many rows as
    a tile has are stored beside each other, and each tile is turned where it lies."""
    assert isinstance(value.type, TileType) and low.packing is not None
    dtype, o, rows = value.type.dtype, low.packing.elements, low.open[row_axis]
    deep, row_bytes = low.lanes * PAIR, low.lanes * b32.size_bytes
    tile_bytes = low.lanes * row_bytes
    step_bytes = PARTS[dtype] * tile_bytes
    steps, stop = low.ceil_div(o.extent, deep), low.add(o.offset, o.extent)
    divides = (o.extent if isinstance(o.extent, int) else o.divisor) % deep == 0
    zeros = low.emit(0, "bitcast", [low.constant(0, i32)], ROW_B32)

    def tile(_: list[Value]) -> list[Value]:
        number = low.sub(low.bound[row_axis].offset, rows.offset)
        first = low.add(base, low.mul(low.scalar("s_floordiv", number, low.lanes), low.mul(steps, step_bytes)))
        low.counted(depth_axis, 0, steps, 1, lambda at: step(low.add(first, low.mul(at, step_bytes)), at))
        return []

    def step(place: Scalar, number: Value) -> None:
        start = low.add(o.offset, low.mul(number, deep))
        count = deep if divides else low.scalar("s_min", low.sub(stop, start), deep)

        def pair(_: list[Value]) -> list[Value]:
            made = [low.row(value, at) for at in low._coordinates((row_axis, depth_axis))]
            made += [low.constant(0.0, f32)] * (PAIR - len(made))
            at = low.mul(low.sub(low.bound[depth_axis].offset, start), row_bytes // PAIR)
            for part, row in enumerate(slots_of_parts(low, low.depth, made[0], made[1], dtype, rounds)):
                put(row, low.add(place, at), part * tile_bytes)
            return []

        def clear(slot: Value) -> None:
            for part in range(PARTS[dtype]):
                put(zeros, low.add(place, low.mul(slot, row_bytes)), part * tile_bytes)

        low.axis_loop(depth_axis, PAIR, False, [], pair, within=Open(start, count, deep, deep if divides else 1))
        if not divides:
            low.counted("rest", low.ceil_div(count, PAIR), low.lanes, 1, clear)
        for part in range(PARTS[dtype]):
            square = [low.emit(low.depth, "load", [low.value(place)], ROW_B32, dtype=b32, masked=False,
                               disp=part * tile_bytes + slot * row_bytes) for slot in range(low.lanes)]
            for line, row in enumerate(low.transposed(square, low.depth)):
                put(row, place, part * tile_bytes + line * row_bytes)

    def put(row: Value, place: Scalar, disp: int) -> None:
        low.effect("store", [row, low.value(place)], dtype=b32, masked=False, streaming=False, disp=disp)

    with low.unpacked():
        masked = (rows.extent if isinstance(rows.extent, int) else rows.divisor) % low.lanes != 0
        low._loop(row_axis, rows.offset, low.add(rows.offset, rows.extent), 1, True, masked, [], tile)


def stage_parts(low: WalkLowering, op: Op, lane: str, depth_axis: str, choice: WalkChoice) -> None:
    """Stage what a load reads: a panel for each piece of the columns that are open."""
    packed = low.panels_of(op)
    low.staged.pop(op, None)        # the copy itself reads the tensor
    panel = _panel(low, op, lane, depth_axis, choice)
    access = low.access(op)
    along_depth = packed is None and access.axes.get(depth_axis) == element_bytes(access.dtype) and not access.gathers

    def squares(_: list[Value]) -> list[Value]:
        low._transpose_into(op, panel, lane, depth_axis, access)
        return []

    def clear(_: list[Value]) -> list[Value]:
        _clear(low, panel, low.ceil_div(filled, low.lanes if along_depth else PAIR), along_depth)
        return []

    def over_pieces(body: Callable[[list[Value]], list[Value]]) -> list[Value]:
        return low.axis_loop(lane, choice.counts[lane], True, [], body)

    def pair(_: list[Value]) -> list[Value]:
        columns = range(low.bound[lane].count)
        rows = [[low.operand_row(op, {depth_axis: step, lane: column}) for column in columns]
                for step in range(low.bound[depth_axis].count)]
        odd = rows[1] if len(rows) > 1 else [low.constant(0.0, f32)] * len(columns)
        for column in columns:
            panel.store_pair(rows[0][column], odd[column], panel.access(), disp=column * panel.piece_bytes)
        return []

    with low.unpacked():
        if packed is not None:
            low.staged[op] = PanelInPlace(low, op, packed, lane, depth_axis)
            over_pieces(lambda _: low.axis_loop(depth_axis, PAIR, False, [], pair))
            low.staged.pop(op)
        elif along_depth:
            over_pieces(squares)
        else:       # all pieces of a step of the depth, which lie side by side, before the next step
            low.axis_loop(depth_axis, PAIR, False, [], lambda _: over_pieces(pair))
        filled = low.open[depth_axis].extent
    over_pieces(clear)
    low.staged[op] = panel


def _panel(low: WalkLowering, op: Op, lane: str, depth_axis: str, choice: WalkChoice) -> PanelOfParts:
    """Where the parts lie: room for one panel, and for a block of them."""
    assert isinstance(op.result.type, TileType)
    dtype, width = op.result.type.dtype, choice.counts[lane] * low.lanes
    parts, key = PARTS[dtype], ("panel", op)
    if key not in low.stage_memory:
        depth = (low._capacity(depth_axis), low.lanes * low.slot_elements)
        low.stage_memory[key] = low.scratch([depth, (width * parts, 1)], bf16)
        all_bytes = low._all_panels_bytes(op, depth_axis, width) * parts * bf16.size_bytes // dtype.size_bytes
        low.scratch([(min(low.block_bytes, all_bytes), 64)], u8)
    return PanelOfParts(low, low.stage_memory[key], depth_axis, lane, dtype,
                        low.mul(low._panel_depth(depth_axis), b32.size_bytes * parts))


def _clear(low: WalkLowering, panel: PanelOfParts, filled: Scalar, squares: bool) -> None:
    """Zeros in the slots of the bound piece behind those that were filled, so many pairs or squares."""
    start = low.mul(filled, low.lanes // PAIR) if squares else filled
    stop = low._panel_depth(panel.depth_axis)
    vectors = low.bound[panel.lane].count * PARTS[panel.floats]
    zeros = low.emit(0, "bitcast", [low.constant(0, i32)], ROW_B32)
    base = low.add(panel.base, low.mul(low.sub(low.bound[panel.lane].offset, low.open[panel.lane].offset),
                                       panel.column_bytes))

    def slot(number: Value) -> None:
        for vector in range(vectors):
            low.effect("store", [zeros, low.value(low.add(base, low.mul(number, panel.depth_bytes)))], dtype=b32,
                       masked=False, streaming=False, disp=vector * panel.piece_bytes)

    if not (isinstance(start, int) and isinstance(stop, int) and start == stop):
        low.counted("rest", start, stop, 1, slot)
