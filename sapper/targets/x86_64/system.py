"""Linux on x86-64. Source: System V ABI AMD64 supplement, 4.1 and 4.4."""

from __future__ import annotations

from ..system import System

SYSTEM = System("x86-64", machine=62, flags=0, page_bytes=4096, absolute_64=1, absolute_32=10, relative_32=2,
                mode_offset=24, clock_mhz=3000)
"""The clock is the time stamp counter."""
