"""Kernels and blocks in x86-64 assembly by hand, each beside the tile kernel that it stands for.

docs/assembly.md has what each gains, measured beside the generated code. Nothing of the library takes them by itself:
`attach()` puts them where they won.
"""

from __future__ import annotations
