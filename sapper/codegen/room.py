"""Room for the frames of deep calls.

CPython keeps the frames of Python functions in chunks of 16 KiB, which it asks of the system as calls get deeper and
gives back as soon as they return (`push_chunk` and `_PyThreadState_PopFrame`, Python/pystate.c, since 3.11). Where a
loop calls across the end of a chunk, every call maps and unmaps memory, at 3 to 8 µs; a compilation, whose calls are
some hundred deep, did so thousands of times. A chunk is doubled until the frame that it is for fits. So a function that
claims a frame of somewhat more than half a chunk gets with it the rest, for all calls below.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

ROOM_BYTES = 256 * 1024
"""Of frames of 300 bytes, as those of the compiler are in the mean, some 800."""

T = TypeVar("T")


def _call(work: Callable[[], Any]) -> Any:
    return work()


_CALL_WITH_ROOM = FunctionType(_call.__code__.replace(co_stacksize=ROOM_BYTES // 8), globals())
"""`_call` with a frame of a little more than ROOM_BYTES, of which nothing but the usual is ever touched."""


def with_room(work: Callable[[], T]) -> T:
    """What `work` gives, called with room for the frames of its calls."""
    made: T = _CALL_WITH_ROOM(work)
    return made
