"""Instructions of AArch64 that came after Unicorn's processor, by the meanings of their rows.

Enters: a word at which the processor stopped, and its vector registers. Leaves: those as the row has them. Holds: such
rows have operands in vector registers and numbers only; tests compare their meanings with a newer QEMU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from ..targets.aarch64.instructions import ROWS
from ..targets.aarch64.meaning import dtype_of
from ..targets.aarch64.rows import Row

LACKED = frozenset({"i8mm", "bf16"})
"""Features of 2019, which QEMU has since version 6.1; Unicorn 2 is version 5."""
BITS = (1 << 32) - 1


@cache
def _decoded(word: int) -> tuple[Row, tuple[int, ...]] | None:
    """The row of a word, and the number of each operand; None if none of these rows has it."""
    for row in ROWS.values():
        if not row.features & LACKED:
            continue
        form = row.words[0]
        free = sum(1 << place for places in form.fields.values() for place in places)
        if word & ~free & BITS == form.fixed:
            return row, tuple(_number(word, form.fields[operand.field]) for operand in row.operands)
    return None


def _number(word: int, places: tuple[int, ...]) -> int:
    number = 0
    for place in places:
        number = number << 1 | word >> place & 1
    return number


def compute(word: int, read: Callable[[int], int], write: Callable[[int, int], None]) -> bool:
    """Run one instruction. read, write: a vector register, by number. False if it is none of these rows."""
    found = _decoded(word)
    if found is None:
        return False
    row, numbers = found
    reads: list[Any] = []
    for operand, number in zip(row.operands, numbers, strict=True):
        if operand.kind == "vec" and operand.reads:
            dtype = dtype_of(row.dtypes if operand.vector else "u8")
            reads.append(np.frombuffer(read(number).to_bytes(16, "little"), dtype, operand.bits // 8 // dtype.itemsize))
        elif operand.kind == "imm":
            reads.append(number)
    assert row.meaning is not None
    write(numbers[0], int.from_bytes(row.meaning(*reads).tobytes(), "little"))
    return True
