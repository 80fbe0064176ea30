"""Linux on RISC-V. Source: RISC-V ELF psABI, "ELF Object Files" and "Relocations"; RISC-V Instruction Set Manual,
Volume I, chapter 8 (the time CSR)."""

from __future__ import annotations

from ..system import System
from .registers import GENERAL
from .translate import REGISTERS

_NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
SYSTEM = System("64-bit RISC-V", machine=243, flags=4, page_bytes=4096, absolute_64=2, absolute_32=1, relative_32=57,
                mode_offset=16, clock_mhz=24,
                tools="riscv64-linux-gnu-", registers=", ".join(
                    f"{name} {GENERAL[number]}"
                    for name, number in zip(_NAMES, REGISTERS, strict=True)))
"""Flags: floats of 64 bits go in float registers (lp64d). Its clock runs at 10 to 100 MHz."""
