"""Which iteration of a parallel loop touched what.

Enters: the loops that run, and each load and store as numbers of elements (or bytes) of a memory. Leaves: nothing, or a
`Meeting` that names the element and both iterations: two wrote it, or one wrote what another read.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from .semantics import Array


class Meeting(Exception):
    """Two iterations meet. element: the number of what they touch; what: a sentence about it."""

    def __init__(self, element: int, what: str) -> None:
        super().__init__(what)
        self.element = element
        self.what = what


class Loop:
    """A running loop. iterations: what the author would call each so far, as `b = 2`."""

    __slots__ = ("iterations", "touched")

    def __init__(self) -> None:
        self.iterations: list[str] = []
        self.touched: dict[Hashable, tuple[Array, Array]] = {}

    def of(self, memory: Hashable, size: int) -> tuple[Array, Array]:
        """Who wrote and who read each element: 0 nobody, -1 several, else the number of an iteration, from 1."""
        found = self.touched.get(memory)
        if found is None:
            found = self.touched[memory] = (np.zeros(size, np.int64), np.zeros(size, np.int64))
        return found

    def name(self, number: int) -> str:
        return self.iterations[number - 1] if number > 0 else "others"


class Touches:
    """All loops that run, the outermost first."""

    __slots__ = ("loops",)

    def __init__(self) -> None:
        self.loops: list[Loop] = []

    def store(self, memory: Hashable, size: int, flat: Array) -> None:
        """A store to elements, none of them twice."""
        in_order = np.sort(flat)
        twice = in_order[:-1][in_order[1:] == in_order[:-1]]
        if twice.size:
            raise Meeting(int(twice[0]), "is written twice by one store")
        for loop in self.loops:
            writer, reader = loop.of(memory, size)
            now = len(loop.iterations)
            for before, what in (
                    (writer, "is written by two iterations of a parallel loop: {} and {}"),
                    (reader, "is written by one iteration of a parallel loop and read by another: {1}, {0}")):
                other = flat[(before[flat] != 0) & (before[flat] != now)]
                if other.size:
                    raise Meeting(int(other[0]), what.format(loop.name(int(before[other[0]])), loop.name(now)))
            writer[flat] = now

    def load(self, memory: Hashable, size: int, flat: Array) -> None:
        for loop in self.loops:
            writer, reader = loop.of(memory, size)
            now = len(loop.iterations)
            other = flat[(writer[flat] != 0) & (writer[flat] != now)]
            if other.size:
                raise Meeting(int(other[0]), "is read by one iteration of a parallel loop and written by another: "
                              f"{loop.name(now)}, {loop.name(int(writer[other[0]]))}")
            before = reader[flat]
            reader[flat] = np.where((before == 0) | (before == now), now, -1)
