"""What register allocation and the frame need to know about x86-64, as data.

Leaves: `register_file(vector_bits, masks)`. Holds: rows named here touch no flags, except `subtract` and `and`, which
stand only where the flags are dead (first and last instructions of a function).
Sources: System V ABI AMD64 supplement 3.2 (saved registers); Intel SDM volume 1, 3.4.1.1 (32-bit results zero the
upper half), volume 2, 2.3.10.1 (VEX and EVEX results zero what lies above them).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from . import abi
from .instructions import ROWS
from .registers import COUNTS

_MOVE_BITS = {
    "mov.64": 64,
    "mov.32": 32,
    "kmovq": 64,
    **{
        f"{mnemonic}.{bits}": bits
        for mnemonic in ("vmovaps", "vmovapd", "vmovups", "vmovupd", "vmovdqa", "vmovdqu")
        for bits in (128, 256)
    },
    **{
        f"{mnemonic}.{bits}": bits
        for mnemonic in (
            "vmovaps", "vmovapd", "vmovups", "vmovupd", "vmovdqa32", "vmovdqa64", "vmovdqu8", "vmovdqu16", "vmovdqu32",
            "vmovdqu64",
        )
        for bits in (128, 256, 512)
    },
}

IDIOMS: dict[str, int | None] = {
    **{f"{mnemonic}.{bits}": None for mnemonic in ("xor", "sub") for bits in (32, 64)},
    **{
        f"{mnemonic}.{bits}": None
        for mnemonic in (
            "vpxor", "vpxord", "vpxorq", "vxorps", "vxorpd", "vpandn", "vpandnd", "vpandnq", "vpsubb", "vpsubw",
            "vpsubd", "vpsubq", "vpcmpeqb", "vpcmpeqw", "vpcmpeqd", "vpcmpeqq",
        )
        for bits in (128, 256, 512)
    },
    **{f"{mnemonic}.{bits}": 0xFF for mnemonic in ("vpternlogd", "vpternlogq") for bits in (128, 256, 512)},
    **{f"{mnemonic}{letter}": None for mnemonic in ("kxor", "kxnor") for letter in "bwdq"},
}

_FRAME_ROWS = {
    "push": "push",
    "pop": "pop",
    "subtract": "sub.64",
    "add": "add.64",
    "and": "and.64",
    "move": "mov.64",
    "load": "mov.64",
    "store": "mov.64",
    "vzeroupper": "vzeroupper",
}


class RegisterFile:
    """See `Abi` in sapper/codegen/row_facts.py, which this satisfies."""

    __slots__ = (
        "callee_saved", "counts", "entry_bytes", "facts_table", "frame_scratch", "full_bits", "idioms", "issue",
        "move_bits", "never_spilled", "push_bytes", "registers", "stack_pointer",
    )

    def __init__(self, registers: dict[str, tuple[int, ...]], vector_bits: int) -> None:
        self.registers = registers
        self.never_spilled = ("tile",)  # tilestored takes a register for how far its rows lie apart
        self.counts = COUNTS
        self.full_bits = {"gpr": 64, "vec": vector_bits, "mask": 64, "tile": 8192, "tilecfg": 512}
        self.callee_saved = tuple(("gpr", number) for number in abi.CALLEE_SAVED)
        self.stack_pointer = ("gpr", abi.STACK_POINTER)
        self.frame_scratch = ("gpr", abi.RESULT)
        self.entry_bytes = self.push_bytes = 8
        self.issue = (6, 48)    # Zen 4 has two queues of 32 for vectors and four of 24; half of that, as blocks follow
        self.move_bits = _MOVE_BITS
        self.idioms = IDIOMS
        self.facts_table: Any = None

    def spill_row(self, kind: str, bits: int) -> Any:
        """A row [memory, register]."""
        return ROWS["mov.64" if kind == "gpr" else "kmovq" if kind == "mask" else f"vmovups.{bits}"]

    reload_row = spill_row
    """A row [register, memory]: the same rows, the other way round."""

    def copy_row(self, row: Any) -> Any:
        """The same one."""
        return row

    def memory_bits(self, row: Any) -> tuple[int, ...]:
        """For each operand of a row its width in memory, 0 where none of the target's encodings takes memory."""
        letters = [encoding.letters for encoding in row.encodings
                   if encoding.space != "evex" or self.registers["mask"]]
        return tuple(operand.memory_bits if any(text[position] in "Mm" for text in letters) else 0
                     for position, operand in enumerate(row.operands))

    def frame_bytes(self, size_bytes: int) -> int:
        """Any number is an immediate."""
        return size_bytes

    def frame_row(self, what: str, kind: str = "gpr") -> Any:
        """The row for push, pop, subtract, add, and, move, load, store or vzeroupper; only general registers are
        saved."""
        del kind
        return ROWS[_FRAME_ROWS[what]]


@lru_cache(maxsize=8)
def register_file(vector_bits: int = 512, masks: bool = True, tiles: bool = True) -> RegisterFile:
    """The register facts of a target whose widest vectors have so many bits.

    masks: the target has AVX-512, hence 32 vector registers and k1 to k7 (k0 cannot be an opmask); else 16 and none.
    tiles: it has AMX.
    """
    return RegisterFile(
        {
            "gpr": abi.ALLOCATABLE,
            "vec": tuple(range(32 if masks else 16)),
            "mask": abi.MASK_ALLOCATABLE if masks else (),
            "tile": tuple(range(COUNTS["tile"])) if tiles else (),
            "tilecfg": tuple(range(COUNTS["tilecfg"])) if tiles else (),  # what the caller configured
        },
        vector_bits,
    )
