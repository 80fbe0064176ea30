"""Kernels and blocks in assembly by hand, each beside the tile kernel that it stands for.

docs/assembly.md has what each gains, measured beside the generated code. Nothing of the library takes them by itself:
`attach()` puts a kernel where it won, and schedules name blocks, those that `sapper tune` found too.
"""

from __future__ import annotations

from . import contraction as contraction
from . import fragments as fragments
from . import nibbles as nibbles
from . import rows as rows
