"""Random numbers of a seed, in Python; draw.py and learn.py have the same in machine code, for a model's file.

Holds: a number of `random` is a multiple of 2^-24 in [0, 1), so that an f32 has it exactly.
Source: SplitMix64, of G. Steele, D. Lea and C. Flood, "Fast splittable pseudorandom number generators" (2014).
"""

from __future__ import annotations

STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""What the state counts by, and the factors that mix it."""
_ALL = 2**64 - 1


class Draws:
    """state: to put an earlier one back is to draw the same numbers again."""

    def __init__(self, seed: int) -> None:
        self.state = seed & _ALL

    def bits(self) -> int:
        """The next 64."""
        self.state = mixed = self.state + STEP & _ALL
        mixed = (mixed ^ mixed >> 30) * FIRST & _ALL
        mixed = (mixed ^ mixed >> 27) * SECOND & _ALL
        return mixed ^ mixed >> 31

    def random(self) -> float:
        return (self.bits() >> 40) * 2.0**-24

    def order(self, count: int) -> list[int]:
        """0 ... count - 1 in any order (Fisher and Yates). count: below 2^32."""
        places = list(range(count))
        for last in range(count - 1, 0, -1):
            other = (self.bits() >> 32) * (last + 1) >> 32
            places[last], places[other] = places[other], places[last]
        return places
