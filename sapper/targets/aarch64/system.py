"""Linux on AArch64. Source: ELF for the Arm 64-bit Architecture (IHI 0056), 5.1 and 5.7; Arm Architecture Reference
Manual DDI 0487, D12.1.2 (the generic timer)."""

from __future__ import annotations

from ..system import System
from .translate import REGISTERS

_NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
SYSTEM = System("64-bit Arm", machine=183, flags=0, page_bytes=1 << 16, absolute_64=257, absolute_32=258,
                relative_32=261, mode_offset=16, clock_mhz=100,
                tools="aarch64-linux-gnu-", registers=", ".join(
                    f"{name} {'sp' if name == 'rsp' else f'x{number}'}"
                    for name, number in zip(_NAMES, REGISTERS, strict=True)))
"""Its clock runs at 25 MHz to 1 GHz."""
