"""What products of tiles can do at most: a loop over four sums of theirs, by hand, as lane programs know no tiles.

Enters: a mnemonic. Leaves: an `Assembly` with the arguments of a kernel, whose words are `SLOTS`. Holds: four sums are
enough for a product's latency (intel_costs.py), and the loop touches no memory.
"""

from __future__ import annotations

from ..assembly import x86
from ..assembly.build import Assembly, Region
from ..targets.x86_64.tiles import ROW_BYTES, ROWS

SUMS, UNROLLED = 4, 2
TILE_BYTES = ROWS * ROW_BYTES
SLOTS = ("scalar.repeats", "scalar.out")
FIRST_WORD_BYTES = 24

PRODUCTS = {"tdpbf16ps": b"\x80\x3f", "tdpbusd": b"\x01"}
"""Mnemonics, and the element 1 of what they multiply."""


def operations(multiply: str) -> int:
    """Multiplications and additions in one round of the loop."""
    return 2 * ROWS * (ROW_BYTES // 4) * (ROW_BYTES // len(PRODUCTS[multiply])) * SUMS * UNROLLED


def tile_program(multiply: str) -> Assembly:
    """`repeats` rounds of products of tiles of ones; each worker's sums go to its `SUMS` tiles at `out`."""
    made = Assembly(f"peak_{multiply}", x86.table)
    block, worker = x86.rdi, x86.rsi
    made.input(block, Region("the argument block", False))
    made.input(worker)
    made.words[block.register] = {FIRST_WORD_BYTES + 8: Region("out", True)}
    ones = PRODUCTS[multiply] * (TILE_BYTES // len(PRODUCTS[multiply]))
    with made.building():
        repeats, out, line, place = (made.r64() for _ in range(4))
        x86.mov(repeats, x86.ptr[block + FIRST_WORD_BYTES])
        x86.mov(out, x86.ptr[block + (FIRST_WORD_BYTES + 8)])
        x86.imul(worker, worker, SUMS * TILE_BYTES)
        x86.add(out, worker)
        x86.mov(line, ROW_BYTES)
        x86.lea(place, x86.ptr[made.constant(ones)])
        x86.ldtilecfg(x86.ptr[made.constant(x86.tile_configuration([(ROWS, ROW_BYTES)] * 8))])
        sums, left, right = [made.tile() for _ in range(SUMS)], made.tile(), made.tile()
        for tile in (left, right):
            x86.tileloadd(tile, x86.ptr[place + line])
        for total in sums:
            x86.tilezero(total)
        with made.loop(0, repeats):
            for total in sums * UNROLLED:
                getattr(x86, multiply)(total, left, right)
        for number, total in enumerate(sums):
            x86.tilestored(x86.ptr[out + line + number * TILE_BYTES], total)
        x86.tilerelease()
        x86.ret()
    return made
