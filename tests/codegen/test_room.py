"""Calls with room for the frames of the calls below."""

import gc
import sys

import pytest

from sapper.codegen.room import with_room

resource = pytest.importorskip("resource")


def calls_at(depth: int) -> None:
    """Many calls from so many frames down."""
    if depth:
        calls_at(depth - 1)
        return
    for _ in range(300):
        leaf(1)


def leaf(number: int) -> int:
    """Its frame is larger than that of `calls_at`: it finds the end of a chunk wherever that is."""
    a = b = c = d = e = f = g = h = i = j = k = m = number
    return a + b + c + d + e + f + g + h + i + j + k + m


def most_faults() -> int:
    """Of 300 calls from any depth. A chunk of frames that is new for each of them is a page that is not there yet."""
    most = 0
    for depth in range(200):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        calls_at(depth)
        most = max(most, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return most


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="CPython's frames")
def test_calls_from_any_depth_map_no_memory() -> None:
    gc.collect()
    with_room(most_faults)      # touches the room once
    assert most_faults() > 250, "CPython keeps its frames otherwise: sapper/codegen/room.py is not needed"
    assert with_room(most_faults) < 50


def test_what_the_work_gives_and_raises() -> None:
    assert with_room(lambda: 5) == 5
    with pytest.raises(KeyError):
        with_room(lambda: {}["missing"])
