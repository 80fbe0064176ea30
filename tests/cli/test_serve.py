"""`sapper serve`: it says where it listens, answers, and stops cleanly at SIGINT and SIGTERM, also while it answers."""

import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest

from sapper.cli.main import main
from tests.models import small

pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("serve") / "small.gguf"
    return str(small.write_gguf(path, small.random_weights(), numbers={"llama.context_length": 1024}))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("busy", [False, True])
def test_a_signal_stops_it(model: str, number: signal.Signals, busy: bool) -> None:
    command = [sys.executable, "-m", "sapper", "serve", model, "--port", "0", "--slots", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"2 sequences of 1024 tokens; (http://127\.0\.0\.1:\d+)/v1", line)
        assert found, line + process.stderr.read()
        with urllib.request.urlopen(found[1] + "/health", timeout=30) as answer:
            assert answer.status == 200
        if busy:
            body = b'{"prompt": [5], "max_tokens": 1000, "temperature": 2, "seed": 3, "stream": true}'
            stream = urllib.request.urlopen(urllib.request.Request(found[1] + "/v1/completions", body), timeout=30)
            assert stream.readline().startswith(b"data: ")
            threading.Thread(target=lambda: stream.read(), daemon=True).start()
        process.send_signal(number)
        _, rest = process.communicate(timeout=30)
        assert process.returncode == 0, rest
        assert "stopped" in rest and "Traceback" not in rest
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_an_address_that_is_taken_is_told(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", model, "--port", port]) == 1
    assert "expected a free address" in capsys.readouterr().err
    assert main(["serve", model, "--host", "no.such.host.invalid"]) == 1
    assert main(["serve", "/nowhere.gguf", "--port", "0"]) == 1
    assert "found nothing" in capsys.readouterr().err


