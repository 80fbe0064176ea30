"""Products of a warp's fragments by hand, for schedules to name.

    serpentine_2x2    two fragments of rows and two of columns, the second row backwards: each matrix instruction shares
                      an operand with the one before, which an SM's register file then need not read again

Source: CUTLASS visits the instructions of a warp's tile in such a serpentine "to maximise register reuse"
(include/cutlass/gemm/warp/mma_tensor_op.h).
"""

from __future__ import annotations

from typing import Any

from sapper import ptx


def _serpentine(dtype: str) -> Any:
    def write(t: Any) -> None:
        multiply = ptx.instruction(f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32")
        for i, row in enumerate(t.sums):
            for j in range(len(row))[::-1 if i % 2 else 1]:
                multiply(row[j], t.left[i], t.right[j], row[j])

    return write


serpentine_2x2 = ptx.product("serpentine_2x2", rows=2, columns=2, dtype="bf16", features="sm_80")(_serpentine("bf16"))
serpentine_2x2_f16 = ptx.product("serpentine_2x2_f16", rows=2, columns=2, dtype="f16", features="sm_80")(
    _serpentine("f16"))
