"""The kernel library: each module holds its plain NumPy reference, the kernel, its check and its benchmark together.

In: nothing. Out: `library()`, every kernel with what belongs to it. Holds: names are unique.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .record import LibraryKernel

MODULES = (
    "add", "softmax", "norm", "embedding", "rope", "rope_yarn", "activation",
    "matmul", "batched", "integer", "matvec", "narrow",
    "quantized", "widen", "k_quants", "near", "fp8", "fp8_panels", "fp8_blocks",
    "shares", "attention", "attention_narrow", "paged", "mla", "mla_blocks", "mla_narrow", "mla_rounded",
    "runs",
    "sparse", "sparse_paged", "gate", "moe", "moe_blocks", "moe_k", "moe_rounded", "moe_pairs", "moe_fp8",
    "moe_fp8_blocks",
    "sampling", "cross_entropy", "movement",
    "gradients", "attention_gradient", "mla_gradient", "moe_gradient", "lora", "optimizer",
)
"""The modules with a `KERNELS` tuple, in the order in which `library` lists them."""


def library() -> list[LibraryKernel]:
    """Every kernel of the library, in a fixed order."""
    from importlib import import_module

    entries: list[LibraryKernel] = []
    for module in MODULES:
        entries += import_module(f"{__name__}.{module}").KERNELS
    return entries


def find(name: str) -> LibraryKernel:
    """The library kernel of that name. Raises KeyError with names like it."""
    entries = {entry.name: entry for entry in library()}
    if name not in entries:
        from ..lang.bindings import near

        raise KeyError(f"no library kernel {name!r}; expected one that `sapper kernels` lists; mend: "
                       + near(name, entries, "choose one of these"))
    return entries[name]
