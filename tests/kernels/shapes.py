"""Check shapes for interpreters and emulators, which take a microsecond or more for each op.

The library's own, but for those that would take many seconds: of these, extents along which every iteration is like
the one before are cut, as far as each path that the whole shape takes is still taken: another part of a split, another
block of rows, a ragged rest of each. Native code is checked at the whole ones.
"""

from __future__ import annotations

from sapper.kernels.record import LibraryKernel

CUTS: tuple[tuple[tuple[str, ...], dict[str, int], dict[str, int]], ...] = (
    # What names of kernels begin with; the whole shape, or the part of it that tells; what is put in its place.
    # Four parts of at most 2048 positions; each position does the same for all features.
    (("attention_decode_split_",), {"position": 6162, "D": 64}, {"D": 9}),
    # All but the last position of a part; keys and values in bf16 differ in how they are loaded only.
    (("attention_decode_split_bf16",), {"position": 2047, "G": 4, "D": 128}, {"position": 300, "G": 2, "D": 64}),
    (("attention_decode_split_",), {"position": 2047, "G": 4, "D": 128}, {"G": 2, "D": 64}),
    # Two parts of 256 positions and a rest, for a block of rows that share them and a rest.
    (("attention_decode_bf16_128",), {"H": 2, "G": 8, "position": 545}, {"H": 1, "G": 5}),
    # Two tiles of 64 positions and two of up to 32 rows, both with a rest.
    (("attention_bf16_", "attention_f16_"), {"T": 131}, {"T": 37, "position": 33}),
    # Two rows of blocks of scales and four columns stay, with fewer panels and tokens.
    (("matmul_fp8", "matmul_residual_fp8", "matmul_swiglu_fp8"), {"P": 9, "M": 19}, {"P": 3, "M": 7}),
    # Two blocks of up to 16 rows stay, the second with one row.
    (("matmul_",), {"C": 31, "M": 31}, {"C": 17, "M": 17}),
    # Two panels and two blocks, as five by three.
    (("dequantize_q",), {"P": 5, "B": 3}, {"P": 2, "B": 2}),
    # A few tokens for each of two experts, one at a time.
    (("grouped_",), {"E": 3, "T": 3, "C": 33, "J": 33}, {"E": 2, "T": 2, "C": 5, "J": 5}),
    (("grouped_",), {"E": 3, "Q": 2, "J": 33}, {"E": 2, "J": 5}),
)


def interpreted(entry: LibraryKernel, shape: dict[str, int]) -> dict[str, int]:
    """The shape to interpret in place of a check shape of a kernel."""
    for prefixes, told, changes in CUTS:
        if entry.name.startswith(prefixes) and told.items() <= shape.items():
            return shape | changes
    return shape
