"""The registers of x86-64: their numbers, and their names at every size.

Leaves: name tables by kind and size. Holds: numbers are those of the encodings (rax 0, rcx 1, ... r15 15).
Source: Intel SDM volume 1, 3.7.2.1 and 18.1, volume 2, 2.7.
"""

from __future__ import annotations

_LEGACY = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")

GPR_NAMES: dict[int, tuple[str, ...]] = {
    64: tuple(f"r{n}" for n in _LEGACY) + tuple(f"r{n}" for n in range(8, 16)),
    32: tuple(f"e{n}" for n in _LEGACY) + tuple(f"r{n}d" for n in range(8, 16)),
    16: (*_LEGACY, *(f"r{n}w" for n in range(8, 16))),
    8: ("al", "cl", "dl", "bl", "spl", "bpl", "sil", "dil", *(f"r{n}b" for n in range(8, 16))),
}
VEC_NAMES: dict[int, tuple[str, ...]] = {
    bits: tuple(f"{letter}mm{n}" for n in range(32)) for bits, letter in ((128, "x"), (256, "y"), (512, "z"))
}
MASK_NAMES: tuple[str, ...] = tuple(f"k{n}" for n in range(8))
TILE_NAMES: tuple[str, ...] = tuple(f"tmm{n}" for n in range(8))

COUNTS: dict[str, int] = {"gpr": 16, "vec": 32, "mask": 8, "tile": 8, "tilecfg": 1}
"""How many registers of each kind the encodings reach; a target without AVX-512 has 16 of "vec" and none of "mask".
"tilecfg" is the configuration of the tiles, which no operand names."""

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 = range(16)


def register_name(kind: str, number: int, bits: int) -> str:
    """The name of register `number` of `kind` when it is used at `bits` bits.

    Raises KeyError or IndexError for a register that does not exist.
    """
    if kind == "gpr":
        return GPR_NAMES[bits][number]
    if kind == "vec":
        return VEC_NAMES[bits][number]
    if kind == "mask":
        return MASK_NAMES[number]
    if kind == "tile":
        return TILE_NAMES[number]
    if kind == "tilecfg":
        return "tilecfg"
    raise KeyError(f"register kind: found {kind!r}; expected one of {', '.join(COUNTS)}")
