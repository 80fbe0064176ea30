"""The registers of 64-bit RISC-V: their numbers, and their names as operands are spelled.

Holds: numbers are those of the encodings. General registers have the names that the calling convention gives them, as
GNU objdump has them. Source: RISC-V Instruction Set Manual, Volume I, chapters 2, 20 and 30; psABI, "Integer Register
Convention" and "Floating-point Register Convention".
"""

from __future__ import annotations

ZERO, LINK, STACK = 0, 1, 2
GENERAL = ("zero", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "s0", "s1", *(f"a{n}" for n in range(8)),
           *(f"s{n}" for n in range(2, 12)), "t3", "t4", "t5", "t6")
FLOATS = (*(f"ft{n}" for n in range(8)), "fs0", "fs1", *(f"fa{n}" for n in range(8)),
          *(f"fs{n}" for n in range(2, 12)), "ft8", "ft9", "ft10", "ft11")
NAMES: dict[str, tuple[str, ...]] = {"gpr": GENERAL, "fpr": FLOATS, "vec": tuple(f"v{n}" for n in range(32))}
COUNTS: dict[str, int] = {kind: len(names) for kind, names in NAMES.items()}
"""How many registers of each kind there are."""
MASK = 0
"""v0, the only register that instructions under a mask take it from (30.5.3)."""


PAIR = 30
"""v30, and v31 with it: a row of 64-bit offsets, of as many lanes as a register has of 32 bits."""


def register_name(kind: str, number: int, bits: int = 0) -> str:
    """The name of register `number` of `kind`, however many bits of it are used. Raises KeyError for a register that
    does not exist."""
    del bits
    if kind in NAMES and 0 <= number < COUNTS[kind]:
        return NAMES[kind][number]
    raise KeyError(f"register: found {kind} {number}; expected one of {COUNTS}")
