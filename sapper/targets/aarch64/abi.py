"""The procedure call standard of 64-bit Arm, by register number.

Source: Procedure Call Standard for the Arm 64-bit Architecture (IHI 0055), 6.1 and 6.4. Holds: the stack pointer is a
multiple of 16 wherever memory is reached by it, at entry as well; nothing below it is ours. x18 belongs to the
platform, x29 to chains of frames: neither is used.
"""

from __future__ import annotations

from .registers import SP

ARGUMENTS = (0, 1, 2, 3, 4, 5, 6, 7)
"""General registers that bring the first eight integer arguments."""
STACK_POINTER = SP
SCRATCH = 17
"""x17 may change on any call, even on the way there."""
CALLEE_SAVED = (19, 20, 21, 22, 23, 24, 25, 26, 27, 28)
"""General registers that a function leaves as it found them."""
CALLEE_SAVED_VECTORS = (8, 9, 10, 11, 12, 13, 14, 15)
"""Vector registers of whose lower 64 bits that is true."""
ALLOCATABLE = (*range(18), *CALLEE_SAVED)
"""In order of preference: those that cost no saving first."""
VECTOR_ALLOCATABLE = (*range(8), *range(16, 32), *CALLEE_SAVED_VECTORS)
STACK_ALIGN_BYTES = 16
