"""Memory of a launch on another processor's emulator."""

from __future__ import annotations

import numpy as np

from sapper.emulate.laid_out import PAGE_BYTES, Buffers


def test_arrays_lie_in_pages_of_their_own() -> None:
    buffers = Buffers()
    first, second = (buffers.add_array(np.full(3, value)) for value in (1.0, 2.0))
    assert second - first >= PAGE_BYTES
    assert [pages[-24:].view(np.float64).tolist() for _, pages in buffers.memory] == [[1.0] * 3, [2.0] * 3]


def test_an_array_within_another_lies_there() -> None:
    """As what is worked on in place: what one name stores, the other loads, and neither copies the old back."""
    array = np.arange(12.0).reshape(3, 4)
    buffers = Buffers(at_end=False)
    whole, same, part = (buffers.add_array(one) for one in (array, array[:], array[1:, ::2]))
    assert (same, part) == (whole, whole + 32) and len(buffers.memory) == 1
    buffers.arrays[-1][1][...] = -1.0
    buffers.give_back()
    assert array.tolist() == [[0, 1, 2, 3], [-1, 5, -1, 7], [-1, 9, -1, 11]]
