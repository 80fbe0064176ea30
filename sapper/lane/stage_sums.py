"""Sums of a stage of the depth, which scales multiply before they are added to what all stages make (matrix.py).

Integers become floats by where they begin. The bits of 2**23 in f32, plus n of 0 to 2**23 - 1, are those of 2**23 + n;
so are those of 1.5 * 2**23 for n of -2**22 to 2**22 - 1. A subtraction leaves n, exactly, without a conversion.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.nodes import Value
from ..ir.types import ROW_F32, DType, f32, i32
from .state import State

SIGNED_START, UNSIGNED_START = 0x4B400000, 0x4B000000
"""The bits of 1.5 * 2**23 and of 2**23."""
SIGNED_ROOM, UNSIGNED_ROOM = 1 << 22, 1 << 23


def start_of(left: DType, right: DType) -> tuple[int, float]:
    """The bits with which sums of products of these bytes begin, and the float that they are."""
    unsigned = left.kind == right.kind == "u"
    return (UNSIGNED_START, 2.0**23) if unsigned else (SIGNED_START, 1.5 * 2**23)


def are_exact(left: DType, right: DType, depth: int) -> bool:
    """Whether sums of so many products of these bytes stay where f32 has all integers."""
    largest = [1 << dtype.bits - (dtype.kind == "i") for dtype in (left, right)]
    room = UNSIGNED_ROOM if left.kind == right.kind == "u" else SIGNED_ROOM
    return depth * largest[0] * largest[1] <= room


def as_floats(low: State, sums: Sequence[Value], left: DType, right: DType) -> list[Value]:
    """row<f32> of sums of bytes that began with `start_of`."""
    less = low.constant(-start_of(left, right)[1], f32)
    return [low.emit(low.depth, "add", [low.emit(low.depth, "bitcast", [v], ROW_F32), less], ROW_F32) for v in sums]


def start_row(low: State, left: DType, right: DType) -> Value:
    return low.constant(start_of(left, right)[0], i32)


def add_scaled(low: State, totals: Sequence[Value], sums: Sequence[Value], scales: tuple[list[Value], list[Value]],
               blocks: tuple[int, int]) -> list[Value]:
    """Totals with the sums of a stage, times their scales: of two registers for each of so many blocks of rows, and for
    each of columns; none where there are no scales. A block of sums has two registers of two rows by two columns."""
    of_rows, of_columns = scales
    made = []
    for number, (total, value) in enumerate(zip(totals, sums, strict=True)):
        block, register = divmod(number, 4)
        i, j = divmod(block % (blocks[0] * blocks[1]), blocks[1])
        if of_rows and of_columns:
            value = low.emit(low.depth, "mul", [value, of_rows[2 * i + register // 2]], ROW_F32)
        by = of_columns[2 * j + register % 2] if of_columns else of_rows[2 * i + register // 2] if of_rows else None
        made.append(low.emit(low.depth, "add", [total, value], ROW_F32) if by is None else
                    low.emit(low.depth, "fma", [value, by, total], ROW_F32))
    return made
