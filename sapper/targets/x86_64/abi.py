"""The System V calling convention of x86-64, by register number.

Source: System V Application Binary Interface, AMD64 supplement, 3.2. Holds: the direction flag is clear at entry,
rsp + 8 is a multiple of 16 at entry, and leaf functions may use `RED_ZONE_BYTES` below rsp.
"""

from __future__ import annotations

from .registers import R8, R9, R10, R11, R12, R13, R14, R15, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP

ARGUMENTS = (RDI, RSI, RDX, RCX, R8, R9)
"""General registers that bring the first six integer arguments."""
RESULT = RAX
STACK_POINTER = RSP
CALLEE_SAVED = (RBX, RBP, R12, R13, R14, R15)
"""A function leaves these as it found them."""
ALLOCATABLE = (RAX, RCX, RDX, RSI, RDI, R8, R9, R10, R11, RBX, RBP, R12, R13, R14, R15)
"""In order of preference: those that cost no push and pop first."""
MASK_ALLOCATABLE = (1, 2, 3, 4, 5, 6, 7)
"""k0 as an opmask means `no mask`, so it is kept out of allocation."""
RED_ZONE_BYTES = 128
STACK_ALIGN_BYTES = 16
