"""The calling convention of 64-bit RISC-V with floats of 64 bits (lp64d), by register number.

Source: RISC-V ELF psABI, "Procedure Calling Convention". Holds: the stack pointer is a multiple of 16 at entry; nothing
below it is ours. x3 and x4 belong to the platform. No vector register outlives a call, nor a call of the system
(Linux, Documentation/arch/riscv/vector.rst).
"""

from __future__ import annotations

from .registers import STACK

ARGUMENTS = (10, 11, 12, 13, 14, 15, 16, 17)
"""General registers that bring the first eight integer arguments."""
STACK_POINTER = STACK
SCRATCH = 31
"""What one instruction can't say is put together here (settle.py): nobody else has it."""
FRAME_SCRATCH = 30
"""Free on entry and at a return."""
CALLEE_SAVED = (8, 9, *range(18, 28))
"""General registers that a function leaves as it found them."""
CALLEE_SAVED_FLOATS = (8, 9, *range(18, 28))
ALLOCATABLE = (*ARGUMENTS, 5, 6, 7, 28, 29, 30, *CALLEE_SAVED)
"""In order of preference: those that cost no saving first."""
FLOAT_ALLOCATABLE = (*range(10, 18), *range(8), 28, 29, 30, 31, *CALLEE_SAVED_FLOATS)
VECTOR_ALLOCATABLE = tuple(range(1, 32))
"""v0 is for masks."""
STACK_ALIGN_BYTES = 16
