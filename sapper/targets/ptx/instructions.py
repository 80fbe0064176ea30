"""The instruction table of PTX: one row for each instruction, in the notation of rows.py.

Leaves: `TABLE` (rows by name, forms by text). A family of rows stands in a module of its own.
Holds: names are stable; a mnemonic is matched by one row.
Source: NVIDIA, Parallel Thread Execution ISA, version 9.0; the sections are named by their titles.
"""

from __future__ import annotations

from . import instructions_async, instructions_convert, instructions_plain, instructions_tensor, instructions_warp
from .rows import Table, form

__all__ = ["TABLE", "form"]

TABLE = Table()
for _family in (instructions_plain, instructions_convert, instructions_warp, instructions_async,
                instructions_tensor):
    for _row in _family.ROWS:
        TABLE.add(_row)
