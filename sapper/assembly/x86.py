"""x86-64 for assembly by hand: `x86.vaddps`, `x86.zmm0`, `x86.ptr[...]`, `x86.dword[...]`, `x86.z`.

Names are the manual's; those that Python keeps for itself have an underscore behind (`x86.and_`), and a prefix is part
of the name (`x86.lock_add`, `x86.vex_vpdpbusd` for AVX-VNNI's).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..targets.x86_64 import assembly as table
from ..targets.x86_64.tiles import configuration as tile_configuration
from .block import Block, Write
from .block import block as _block
from .build import current as current
from .contraction import Contraction, Tile
from .contraction import contraction as _contraction
from .errors import AssemblyError
from .notation import broadcast as broadcast
from .notation import mnemonic_named, names_of, unknown
from .notation import ptr as ptr
from .notation import z as z


def block(name: str, *, inputs: str, result: str, features: str = "", implements: str = "", no_spill: bool = False,
          budget: Mapping[str, int] | None = None) -> Callable[[Write], Block]:
    """A block by hand on x86-64 rows; see assembly/block.py."""
    return _block(table, name, inputs=inputs, result=result, features=features, implements=implements,
                  no_spill=no_spill, budget=budget)


def micro_kernel(name: str, *, vector: str, rows: tuple[int, ...], vectors: tuple[int, ...], step: int = 1,
                 features: str = "", dtype: str = "f32", right_dtype: str = "", left: str = "rows", rights: int = 1,
                 no_spill: bool = False, budget: Mapping[str, int] | None = None,
                 ) -> Callable[[Callable[[Tile], None]], Contraction]:
    """The inner loop of a contraction by hand: `@x86.micro_kernel("mine", vector="zmm", rows=(14,), vectors=(2,),
    step=4, features="avx512f")` over `def mine(tile)`.

    rows, vectors: the tiles that it is written for, the largest first; step: the depth is a multiple of it. dtype: of
    the operands, f32 or bf16, or i8 or u8, which right_dtype may be different in; a step of the depth takes two
    neighbours of bf16, four bytes, whose products are summed in i32. left: "rows", contiguous along the depth where
    they lie; "columns", contiguous along the rows; or "blocks", copied as [depth / lanes][rows][lanes of the depth].
    rights: right operands that meet one left one (2 for
    SwiGLU). no_spill, budget: as of a block. A schedule chooses it by name. assembly/contraction.py says what `tile`
    has.
    """
    return _contraction(table, name, vector=vector, rows=rows, vectors=vectors, step=step, features=features,
                        dtype=dtype, right_dtype=right_dtype, left=left, rights=rights, no_spill=no_spill,
                        budget=budget)


_names: dict[str, Any] = {}


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if not _names:
        _names.update(names_of(table))
    found = _names.get(name)
    if found is None:
        found = mnemonic_named(table, name)
        if found is None:
            raise unknown(table, name)
        _names[name] = found
    return found


__all__ = ["AssemblyError", "block", "broadcast", "current", "micro_kernel", "ptr", "table",
           "tile_configuration", "z"]
