"""What SIGINT and SIGTERM do to a command.

Holds: either ends it through its clean-up, by an exception of the main thread; the status is then 128 + the signal's
number. What must not be cut in two is done within `runtime.signals.held`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

AGAIN_SECONDS = 0.02
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGPIPE: ""}


class Ended(BaseException):
    """A signal ended the command, or what Python makes of one: KeyboardInterrupt and BrokenPipeError, once no part of
    the command wants them."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(WORDS[number])
        self.status = 128 + number


@contextmanager
def as_ended() -> Iterator[None]:
    """Raises Ended for what nobody wanted."""
    try:
        yield
    except KeyboardInterrupt:
        raise Ended(signal.SIGINT) from None
    except BrokenPipeError:
        raise Ended(signal.SIGPIPE) from None


@contextmanager
def ending() -> Iterator[None]:
    """SIGTERM raises Ended in the main thread; elsewhere nothing changes.

    Python drops what is raised while it frees an object (`__del__`), and memory of gigabytes takes long to free: a
    signal whose exception was lost there comes again a little later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> NoReturn:
        raise Ended(signal.SIGTERM)

    def lost(dropped: sys.UnraisableHookArgs) -> None:
        number = {KeyboardInterrupt: signal.SIGINT, Ended: signal.SIGTERM}.get(dropped.exc_type)
        if number is None:
            tell(dropped)
            return
        again = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), number))
        again.daemon = True
        coming.append(again)
        again.start()

    coming: list[threading.Timer] = []
    before, tell = signal.signal(signal.SIGTERM, end), sys.unraisablehook
    sys.unraisablehook = lost
    try:
        yield
    finally:
        sys.unraisablehook = tell
        for again in coming:
            again.cancel()
        signal.signal(signal.SIGTERM, before)
