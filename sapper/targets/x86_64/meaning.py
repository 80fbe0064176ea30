"""Running one row: its operands are read, its meaning computes, what it gives is merged by its opmask.

Enters: a row, the raw value of each operand (bytes or an int; or what is not known, sapper/assembly/symbolic.py), its
opmask and flags. Leaves: all of them afterwards. What rows compute is in meaning_general, meaning_lanes and
meaning_floats.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .meaning_lanes import pack_bits
from .meaning_values import Array, mask_bits, number, padded, plain, raw_bytes


def _read(operand: Any, raw: Any) -> Any:
    """An operand's raw value (bytes of a vector or of memory, or an int) as its meaning takes it."""
    if not isinstance(raw, np.ndarray) or operand.kind == "tile" or operand.sibmem:
        return raw
    if operand.index_bits == 0 and operand.memory_bits:
        size_bytes = operand.memory_bits // 8
        if len(raw) > size_bytes:
            raw = raw[:size_bytes]
        elif operand.broadcast_bits and len(raw) == operand.broadcast_bits // 8:
            raw = np.tile(raw, size_bytes // len(raw))
    if operand.kind == "gpr" or operand.kind == "mask":
        return number(raw)
    return raw.view(f"{operand.dtype[0]}{int(operand.dtype[1:]) // 8}") if operand.dtype else number(raw)


def _merge(row: Any, result: Array, old: Array, first: Any, mask: int, zeroing: bool) -> Array:
    """`result` under the opmask. old: lanes of the destination before, at least as many."""
    lanes = len(result)
    if row.packing:
        on = mask_bits(mask, lanes)
        out = np.zeros_like(result) if zeroing else old[:lanes].copy()
        if row.packing == "compress":
            out[:on.sum()] = result[on]
        else:
            out[on] = result[:on.sum()]
        return out
    if row.scalar:
        off = np.zeros_like(result[:1]) if zeroing else old[:1]
        return np.concatenate([np.where(mask_bits(mask, 1), result[:1], off), result[1:]])
    off = np.zeros_like(result) if zeroing else (first if row.blend else old)[:lanes]
    # Through the bits, so that a NaN keeps its payload.
    bits = f"u{result.itemsize}"
    return np.where(mask_bits(mask, lanes), result.view(bits), off.view(bits)).view(result.dtype)


def execute(
    row: Any,
    operands: list[Any],
    in_memory: tuple[bool, ...],
    mask: int | None = None,
    zeroing: bool = False,
    flags: dict[str, int] | None = None,
    implicit: tuple[Any, ...] = (),
) -> tuple[list[Any], list[Any], dict[str, int], int | None]:
    """Run a row's meaning, opmask included.

    operands: one raw value for each explicit operand, before the instruction: uint8 arrays (a whole vector register of
        the operand's bits, the bytes of memory, one broadcast element, the gathered elements, the [rows][bytes] of a
        tile), ints for general registers, masks and immediates. in_memory: which of them are memory. implicit: of
        `row.implicit_reads`.
    Returns (operands afterwards, values of `row.implicit_writes`, defined flags written, opmask afterwards).
    Raises ValueError for a row without a meaning, OverflowError where the processor would trap.
    """
    if row.meaning is None:
        raise ValueError(f"row {row.name}: found no meaning; expected a row that computes values")
    specs = row.operands
    reads = [_read(o, v) for o, v in zip(specs, operands, strict=True) if o.reads or o.role == "a"]
    if row.flags_read:
        reads.append(flags)
    result = row.meaning(*reads, *implicit)
    values: list[Any] = list(result) if isinstance(result, tuple) else [result]
    written_flags = values.pop() if values and isinstance(values[-1], dict) else {}
    after = list(operands)
    for position, operand in enumerate(specs):
        if not operand.writes:
            continue
        value = values.pop(0)
        if operand.kind == "tile" or operand.sibmem:
            after[position] = np.ascontiguousarray(np.broadcast_to(value, operands[position].shape))
        elif operand.kind == "mask" and not in_memory[position]:
            after[position] = (pack_bits(value) if isinstance(value, np.ndarray) else plain(value)) \
                & (-1 if mask is None else mask) & ((1 << 64) - 1)
        elif operand.kind == "gpr" and not in_memory[position]:
            after[position] = plain(value) & ((1 << operand.bits) - 1)
        elif not isinstance(value, np.ndarray):
            after[position] = raw_bytes(value, operand.memory_bits // 8)
        else:
            old = operands[position]
            value = value if value.flags.c_contiguous else value.copy()
            if in_memory[position]:
                value = value[:len(old) // value.itemsize]
            if mask is not None:
                view = old[:len(old) // value.itemsize * value.itemsize].view(value.dtype)
                value = _merge(row, value, view, reads[0] if row.blend else None, mask, zeroing)
            after[position] = padded(value.view(np.uint8), len(old) if in_memory[position] else operand.bits // 8)
    mask_after = 0 if row.masking == "required" and mask is not None else mask
    return after, [v if isinstance(v, np.ndarray) else plain(v) for v in values], written_flags, mask_after
