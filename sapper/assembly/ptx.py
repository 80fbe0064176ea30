"""PTX for assembly by hand: `ptx.fma_rn_f32`, `ptx.ptr[...]`, `ptx.tid_x`, `ptx.block`.

A mnemonic's points are written as `_`, its colons as `__`: `ptx.ld_shared__cta_b32` is ld.shared::cta.b32. One with `_`
in its own name is `ptx.instruction("mbarrier.arrive.expect_tx.shared::cta.b64")`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..targets.ptx import assembly as table
from .build import current as current
from .errors import AssemblyError
from .notation import ptr as ptr
from .warp import unknown
from .warp_block import Mnemonic, WarpBlock
from .warp_block import block as _block
from .warp_product import Fragments, WarpProduct
from .warp_product import product as _product

nobody = table.NOBODY
"""Stands where a result is that nobody wants."""


def block(name: str, *, inputs: str, result: str, features: str = "", implements: str = "", no_spill: bool = False,
          budget: Mapping[str, int] | None = None) -> Callable[[Callable[..., None]], WarpBlock]:
    """A block by hand on rows, `@ptx.block("fast_exp", inputs="f32", result="f32", implements="exp")` over
    `def fast_exp(out, x)`, which each thread runs on its own element; see assembly/warp.py."""
    return _block(table, name, inputs=inputs, result=result, features=features, implements=implements,
                  no_spill=no_spill, budget=budget)


def product(name: str, *, rows: int, columns: int, dtype: str, features: str = "", no_spill: bool = False,
            budget: Mapping[str, int] | None = None) -> Callable[[Callable[[Fragments], None]], WarpProduct]:
    """Matrix instructions of a warp by hand: `@ptx.product("mine", rows=2, columns=2, dtype="bf16", features="sm_80")`
    over `def mine(t)`, which adds t.left[i] @ t.right[j] to t.sums[i][j], for fragments of 16 rows and 8 columns; a
    schedule chooses it by name. assembly/warp_product.py says what `t` has."""
    return _product(table, name, rows=rows, columns=columns, dtype=dtype, features=features, no_spill=no_spill,
                    budget=budget)


def instruction(mnemonic: str) -> Mnemonic:
    """The callable of a mnemonic as the manual writes it. Raises AssemblyError for one that no row has."""
    if not table.forms_of(mnemonic):
        raise unknown(table, mnemonic)
    return Mnemonic(table, mnemonic)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name in table.SPECIAL:
        return table.SPECIAL[name]
    mnemonic = name.removesuffix("_").replace("__", "::").replace("_", ".")
    if not table.forms_of(mnemonic):
        raise unknown(table, mnemonic)
    return Mnemonic(table, mnemonic)


__all__ = ["AssemblyError", "block", "current", "instruction", "nobody", "product", "ptr", "table"]
