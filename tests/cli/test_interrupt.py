"""Ctrl-C in the commands that take long: status 130, no traceback, and no process or thread left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

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
def test_ctrl_c(arguments: tuple[str, ...], started: str | None, model: str) -> None:
    """started: what it prints when it is under way; bench prints nothing before its table."""
    command = [sys.executable, "-m", "sapper.cli.main", *[a.replace("MODEL", model) for a in arguments]]
    environment = dict(os.environ, SAPPER_INTERPRET="1" if arguments[0] == "generate" else "")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                               env=environment)
    try:
        assert process.stdout is not None
        seen = b""
        if started is None:
            time.sleep(3)
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
