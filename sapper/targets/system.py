"""What files and code by hand must know of Linux on a family of processors.

Leaves: `System`, one of which a family's system.py holds. Source: ELF supplements of the families' ABIs; Linux,
include/uapi/asm-generic/stat.h, arch/x86/include/uapi/asm/stat.h.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class System:
    """name: of the family, for people. machine, flags: e_machine and e_flags of its ELF files. page_bytes: of the
    largest pages that processes may have. absolute_64, absolute_32, relative_32: types of relocations, of fields with
    an address of 64 or 32 bits or with the distance of one. mode_offset: of st_mode in a `struct stat`. clock_mhz: how
    fast the clock runs that the code by hand reads, on typical members: by it waiting is bounded, no more. tools: what
    stands before `as` and `ld` in the names of GNU's. registers: what registers are called in comments of code by hand,
    with what they are; "" where these are their names.
    """

    name: str
    machine: int
    flags: int
    page_bytes: int
    absolute_64: int
    absolute_32: int
    relative_32: int
    mode_offset: int
    clock_mhz: int
    tools: str = ""
    registers: str = ""
