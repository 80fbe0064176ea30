"""Signals that wait while something is done that must not be cut in two.

Holds: what comes within `held` counts at its end, once. Python drops what a handler raises in a callback of its own, as
those that it has around fork(2): a Ctrl-C there would be lost.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held() -> Iterator[None]:
    """Signals that have a handler in Python wait until the end. In other threads than the main one, which takes no
    signals, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: handler for number in NUMBERS if callable(handler := signal.getsignal(number))}
    for number in before:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
