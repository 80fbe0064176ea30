"""Signals that come while something must not be cut in two."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from sapper.runtime.signals import held


def test_a_signal_counts_at_the_end() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), held():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("all")
    assert done == ["all"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_around_fork_is_not_lost() -> None:
    """Python drops what a handler raises in what was registered for after a fork."""
    def interrupt() -> None:
        if waiting:
            signal.raise_signal(signal.SIGINT)

    waiting = [True]
    os.register_at_fork(after_in_parent=interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), held():
            child = os.fork()
            if child == 0:
                os._exit(0)
    finally:
        waiting.clear()
    assert os.waitpid(child, 0)[1] == 0


def test_other_threads_take_no_signals() -> None:
    seen = []

    def work() -> None:
        with held():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
