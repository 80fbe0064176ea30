"""The registers of 64-bit Arm: their numbers, and their names as operands are spelled.

Holds: numbers are those of the encodings, where 31 means the stack pointer or zero, as the operand says; here zero has
a number of its own. Source: Arm Architecture Reference Manual DDI 0487, B1.2.1 and C1.2.5.
"""

from __future__ import annotations

SP, ZERO = 31, 32
LINK = 30
"""x30 holds the return address."""
COUNTS: dict[str, int] = {"gpr": 33, "vec": 32}
"""How many registers of each kind there are, the stack pointer and zero among them."""


def register_name(kind: str, number: int, bits: int) -> str:
    """The name of register `number` of `kind` where `bits` bits of it are used; of vectors, as a scalar.

    Raises KeyError for a register that does not exist.
    """
    if kind == "gpr" and 0 <= number < COUNTS["gpr"]:
        letter = {64: "x", 32: "w"}[bits]
        return {SP: "sp" if bits == 64 else "wsp", ZERO: letter + "zr"}.get(number, f"{letter}{number}")
    if kind == "vec" and 0 <= number < COUNTS["vec"]:
        return f"{ {8: 'b', 16: 'h', 32: 's', 64: 'd', 128: 'q'}[bits]}{number}"
    raise KeyError(f"register: found {kind} {number}; expected one of {COUNTS}")
