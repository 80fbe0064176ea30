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
    """A running loop. iterations: what the author would call each so far, as `b = 2`. joins: stores that join may meet
    in it."""

    __slots__ = ("iterations", "joins", "touched")

    def __init__(self, joins: bool = False) -> None:
        self.iterations: list[str] = []
        self.joins = joins
        self.touched: dict[Hashable, tuple[Array, Array, Array]] = {}

    def of(self, memory: Hashable, size: int) -> tuple[Array, Array, Array]:
        """Who wrote, who read, and who joined a value with each element: 0 nobody, -1 several, else the number of an
        iteration, from 1."""
        found = self.touched.get(memory)
        if found is None:
            found = self.touched[memory] = (np.zeros(size, np.int64), np.zeros(size, np.int64),
                                            np.zeros(size, np.int64))
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
        self._write(memory, size, flat, False)

    def join(self, memory: Hashable, size: int, flat: Array) -> None:
        """A store that joins values with elements, of which it may meet some again."""
        self._write(memory, size, flat, True)

    def _write(self, memory: Hashable, size: int, flat: Array, joins: bool) -> None:
        for loop in self.loops:
            writer, reader, joiner = loop.of(memory, size)
            now = len(loop.iterations)
            together = joins and loop.joins
            for before, what in (
                    (writer, "is written by two iterations of a parallel loop: {} and {}"),
                    (reader, "is written by one iteration of a parallel loop and read by another: {1}, {0}"),
                    *([] if together else [(joiner, "is written by two iterations of a parallel loop: {} and {}")])):
                other = flat[(before[flat] != 0) & (before[flat] != now)]
                if other.size:
                    raise Meeting(int(other[0]), what.format(loop.name(int(before[other[0]])), loop.name(now)))
            if together:
                joiner[flat] = _with(joiner[flat], now)
            else:
                writer[flat] = now

    def load(self, memory: Hashable, size: int, flat: Array) -> None:
        for loop in self.loops:
            writer, reader, joiner = loop.of(memory, size)
            now = len(loop.iterations)
            for before in (writer, joiner):
                other = flat[(before[flat] != 0) & (before[flat] != now)]
                if other.size:
                    raise Meeting(int(other[0]), "is read by one iteration of a parallel loop and written by another: "
                                  f"{loop.name(now)}, {loop.name(int(before[other[0]]))}")
            reader[flat] = _with(reader[flat], now)


def _with(before: Array, now: int) -> Array:
    """Who touched elements, the iteration `now` among them."""
    return np.where((before == 0) | (before == now), now, -1)
