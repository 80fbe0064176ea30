"""Numbers of lane IR as the bits that instructions of any family make."""

from __future__ import annotations

import struct

from ..ir.types import DType


def constant_bits(dtype: DType, number: float) -> int:
    """The bits of a number in an element of a row: of floats the nearest, infinite beyond the largest."""
    if not dtype.is_float:
        return int(number) & ((1 << dtype.bits) - 1)
    code, integer = {32: ("<f", "<I"), 64: ("<d", "<Q")}[dtype.bits]
    try:
        data = struct.pack(code, float(number))
    except OverflowError:
        data = struct.pack(code, float("inf") if number > 0 else float("-inf"))
    return int(struct.unpack(integer, data)[0])
