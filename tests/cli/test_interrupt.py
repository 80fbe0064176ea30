"""Ctrl-C in the commands that take long: status 130, no traceback, and no process or thread left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sapper.cli.signals import Ended, as_ended, ending
from tests.models import small


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small.write_gguf(tmp_path_factory.mktemp("interrupt") / "small.gguf", small.random_weights()))


@pytest.mark.parametrize(("arguments", "started"), [
    (("check", "--library", "--runs", "12"), "vector_add: right"),
    (("demo", "--no-model"), "measuring"),
    (("generate", "MODEL", "--prompt", "a", "--raw", "--tokens", "1000"), ""),
    (("bench", "matmul", "--against", ""), None),
], ids=lambda value: value[0] if isinstance(value, tuple) else "")
def test_ctrl_c(arguments: tuple[str, ...], started: str | None, model: str, tmp_path: Path) -> None:
    """started: what it prints when it is under way; bench, which prints nothing before its table, has then kept the
    first kernel that it compiled."""
    command = [sys.executable, "-m", "sapper", *[a.replace("MODEL", model) for a in arguments]]
    environment = dict(os.environ, SAPPER_INTERPRET="1" if arguments[0] == "generate" else "")
    if started is None:
        environment["SAPPER_CACHE_DIR"] = str(tmp_path)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                               env=environment)
    try:
        assert process.stdout is not None
        seen = b""
        limit = time.monotonic() + 60
        while started is None and not any(tmp_path.iterdir()):
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.02)
        while started is not None and (not seen or started.encode() not in seen):
            piece = os.read(process.stdout.fileno(), 4096)
            assert piece, seen.decode()
            seen += piece
        os.kill(process.pid, signal.SIGINT)
        rest, _ = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    told = (seen + rest).decode()
    assert process.returncode == 130, told
    assert "Traceback" not in told
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


class Freed:
    """An object that is hit by a signal while it is freed, some times."""

    def __init__(self, number: int, times: int) -> None:
        self.number, self.times = number, times

    def __del__(self) -> None:
        if self.times:
            Freed(self.number, self.times - 1)
            signal.raise_signal(self.number)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_something_is_freed_is_not_lost(number: signal.Signals, times: int) -> None:
    """Python drops the exceptions of `__del__`."""
    def command() -> None:
        Freed(number, times)
        time.sleep(20)

    with pytest.raises(Ended) as ended, ending(), as_ended():
        command()
    assert ended.value.status == 128 + number


def test_other_faults_while_something_is_freed_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Faulty:
        def __del__(self) -> None:
            raise ValueError("freed")

    told: list[BaseException | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: told.append(dropped.exc_value))
    before = sys.unraisablehook
    with ending():
        Faulty()
    assert [str(one) for one in told] == ["freed"] and sys.unraisablehook is before
