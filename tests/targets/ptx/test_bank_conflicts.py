"""Every access of shared memory in every kernel of the library is proved, and free of bank conflicts but for slots."""

from __future__ import annotations

import pytest

from sapper import targets
from sapper.codegen.pipeline import compile_kernel
from sapper.emulate.conflicts import shared_accesses
from sapper.kernels import library
from sapper.kernels.record import LibraryKernel
from tests.strategies.amount import dealt

from .test_library import text_of

LARGE = (8192, 64)
"""Extents, and what they are multiples of: rows are whole, boxes can be copied."""


SLOTS = "4 cycles for 1: lanes 1 and 8 meet in bank 4; rank 3 of 5"
"""Slots that rows along the depth store by themselves, as no chunk of theirs can be copied (lane/plain_pieces.py)."""


def texts_of(entry: LibraryKernel) -> tuple[list[str], str]:
    """For tensors that are aligned, by level; and for any, which sm_90a copies as sm_80 does."""
    kernel = entry.kernel
    tensors = [name for name, type in kernel.parameters if hasattr(type, "dims")]
    aligned = [compile_kernel(kernel, {}, dict.fromkeys(tensors, "contiguous"),
                              dict.fromkeys(kernel.tile_ir().attributes["dims"], LARGE), targets.target(level), None,
                              frozenset(tensors)).text() for level in ("sm_80", "sm_90a")]
    return aligned, text_of(entry, "sm_80")


@pytest.mark.long
def test_every_access_is_free_of_conflicts() -> None:
    """Of kernels that contract: no other has shared memory. Every sixth one of those of a type, and all in a search
    for faults: neighbours differ in what comes before or after the product."""
    proved: dict[str, int] = {}
    contracting = [entry for entry in library()
                   if any(op.name == "contract" for op in entry.kernel.tile_ir().walk())]
    for entry in dealt(contracting, 0, 6):
        aligned, plain = texts_of(entry)
        for text in (*aligned, plain):
            body = text.split("\n", 2)[2]
            if ".shared" in body and body not in proved:
                accesses = shared_accesses(text)
                met = [a for a in accesses if a.proof is None or not a.proof.free]
                if text is plain:
                    met = [a for a in met if not a.text.startswith("st.shared.b32") or str(a.proof) != SLOTS]
                assert met == [], entry.name
                proved[body] = len(accesses)
    assert len(proved) > 12 and sum(proved.values()) > 1_200
