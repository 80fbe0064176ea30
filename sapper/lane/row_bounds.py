"""Between which bounds the integers of a row lie, as far as the few ops behind it tell.

Enters: an i32 row of a lane function that is being written. Leaves: its least and greatest element, or those of i32.
What stays within a narrower type need not be cut to it (`wrap` in rows.py): two bits of a byte less one, as a weight
of three values, take three operations in place of seven.
"""

from __future__ import annotations

from ..ir.nodes import Value
from ..ir.types import ROW_I32, i8, i16, u8

Bounds = tuple[int, int]

ANY: Bounds = (-(1 << 31), (1 << 31) - 1)
DEEPEST = 8
"""Ops that are looked through."""


def bounds_of(row: Value, deepest: int = DEEPEST) -> Bounds:
    low, high = _bounds(row, deepest)
    return (low, high) if ANY[0] <= low <= high <= ANY[1] else ANY


def _bounds(row: Value, deepest: int) -> Bounds:
    op = row.op
    if op is None or not deepest or row.type != ROW_I32:
        return ANY
    name = op.name
    if name == "splat_const":
        value = op.attributes["value"]
        return value, value
    if name in ("load", "load_splat", "gather"):
        dtype = op.attributes["dtype"]
        plain = dtype in (u8, i8, i16) and not op.attributes.get("bits") and not op.attributes.get("twice")
        return _of_bits(dtype.bits, dtype is not u8) if plain else ANY
    if name == "sar" and "amount" in op.attributes:
        low, high = bounds_of(op.operands[0], deepest - 1)
        return low >> op.attributes["amount"], high >> op.attributes["amount"]
    if name == "shl" and "amount" in op.attributes:
        low, high = bounds_of(op.operands[0], deepest - 1)
        return low << op.attributes["amount"], high << op.attributes["amount"]
    if name not in ("and", "or", "add", "sub", "mul", "min", "max", "select"):
        return ANY
    (a, b), (c, d) = (bounds_of(v, deepest - 1) for v in op.operands[-2:])
    if name == "and":       # what has no sign takes that of the other
        least = [high for low, high in ((a, b), (c, d)) if low >= 0]
        return (0, min(least)) if least else ANY
    if name == "or":
        return (0, (1 << max(b, d).bit_length()) - 1) if min(a, c) >= 0 else ANY
    if name == "select":
        return min(a, c), max(b, d)
    if name in ("min", "max"):
        pick = min if name == "min" else max
        return pick(a, c), pick(b, d)
    if name == "add":
        return a + c, b + d
    if name == "sub":
        return a - d, b - c
    corners = [x * y for x in (a, b) for y in (c, d)]
    return min(corners), max(corners)


def _of_bits(bits: int, signed: bool) -> Bounds:
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def is_within(row: Value, bits: int, signed: bool) -> bool:
    """Whether all elements are integers of so many bits."""
    low, high = bounds_of(row)
    least, most = _of_bits(bits, signed)
    return least <= low and high <= most
