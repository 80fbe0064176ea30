"""How many cycles one access of near memory takes: proved from where its lanes reach, for every stage, tile and warp.

Near memory of a GPU has 32 banks, each of which gives one word of 4 bytes a cycle. An access is served in phases: lanes
that move 128 bytes together, all 32 with 4 bytes each, 8 with 16. In a phase, different words of one bank come one
after the other; the same word serves all who want it. Source: CUDA C++ Programming Guide, "Shared Memory".

Enters: bytes from some address to where each lane of a warp reaches. Leaves: a `Proof`. Holds: it speaks for every
base, since neither an aligned base that is added nor bits that are inverted in all lanes bring lanes to one bank that
were in two, or apart that were in one.

Where a lane's place is linear over GF(2), each bit of the address the exclusive or of some bits of the lane's number,
as swizzled layouts are, the rank of a matrix decides: n bits tell the lanes of a phase apart; with rank r of their
effect on words, and rank b of that on banks, each bank that is reached gives 2 ** (r - b) words. Without conflicts is
r = b. Other places, as those of padded rows, are enumerated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

BANKS, WORD_BYTES = 32, 4
PHASE_BYTES = BANKS * WORD_BYTES
LANES = 32


@dataclass(frozen=True, slots=True)
class Proof:
    """Of one access by the lanes of a warp.

    cycles: of each phase. linear: whether ranks say so; otherwise all lanes were compared. word_rank, bank_rank: of
    the first phase, if linear. meet: two lanes of one phase that want different words of one bank, if there are any,
    and the bank, counted from that of lane 0.
    """

    cycles: tuple[int, ...]
    linear: bool
    word_rank: int = 0
    bank_rank: int = 0
    meet: tuple[int, int, int] | None = None

    @property
    def total(self) -> int:
        return sum(self.cycles)

    @property
    def free(self) -> bool:
        """Of conflicts."""
        return max(self.cycles) <= 1

    def __str__(self) -> str:
        how = f"rank {self.bank_rank} of {self.word_rank}" if self.linear else "each lane compared"
        if self.meet is None:
            return f"no conflicts: {how}"
        one, other, bank = self.meet
        return f"{self.total} cycles for {len(self.cycles)}: lanes {one} and {other} meet in bank {bank}; {how}"


def prove(places: Sequence[int], width: int) -> Proof:
    """places: of each of up to 32 lanes the first byte, from a common address that is a multiple of 4 bytes and of
    `width`, the bytes of a lane (1, 2, 4, 8 or 16). The first lane is the first of a phase."""
    columns = linear_columns(places)
    size = phase_lanes(width)
    phases = [places[first:first + size] for first in range(0, len(places), size)]
    if columns is None or len(places) % size:
        return Proof(tuple(map(max, (_words_of_banks(phase, width).values() for phase in phases))), False,
                     meet=_meeting(places, width))
    # Other lanes of a phase differ from its first one by what these columns add, in every phase alike.
    effect = [column // WORD_BYTES for column in columns[:size.bit_length() - 1]]
    words, banks = rank(effect), rank([column % BANKS for column in effect])
    return Proof((1 << (words - banks),) * len(phases), True, words, banks,
                 _meeting(places, width) if words > banks else None)


def phase_lanes(width: int) -> int:
    """Lanes that are served together, of so many bytes each."""
    return min(LANES, PHASE_BYTES // width)


def linear_columns(places: Sequence[int]) -> list[int] | None:
    """What each bit of the lane's number adds to a place by exclusive or, but for the place of lane 0; None where
    places are no such sums. There are 2 ** n lanes."""
    count = len(places).bit_length() - 1
    if len(places) != 1 << count:
        return None
    columns = [places[1 << bit] ^ places[0] for bit in range(count)]
    for lane, place in enumerate(places):
        expected = places[0]
        for bit, column in enumerate(columns):
            if lane >> bit & 1:
                expected ^= column
        if place != expected:
            return None
    return columns


def rank(rows: Sequence[int]) -> int:
    """Over GF(2), of rows as bits of numbers."""
    basis: list[int] = []
    for row in rows:
        for reduced in basis:
            row = min(row, row ^ reduced)
        if row:
            basis.append(row)
    return len(basis)


def _words_of_banks(places: Sequence[int], width: int) -> Counter[int]:
    words = {place // WORD_BYTES + more for place in places for more in range(max(1, width // WORD_BYTES))}
    return Counter(word % BANKS for word in words)


def _meeting(places: Sequence[int], width: int) -> tuple[int, int, int] | None:
    """The first two lanes of a phase that meet in a bank, which is counted from that of lane 0."""
    size = phase_lanes(width)
    start = places[0] // WORD_BYTES
    for other, place in enumerate(places):
        for one in range(other // size * size, other):
            here, there = place // WORD_BYTES, places[one] // WORD_BYTES
            if here != there and here % BANKS == there % BANKS:
                return one, other, (here - start) % BANKS
    return None
